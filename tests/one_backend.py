"""Tests of what no backend has a part in, or another test tries on all, are for some of them."""

import keras
import pytest


def only_on(*backends: str):
    """Skips a test on the other backends."""
    elsewhere = keras.backend.backend() not in backends
    return pytest.mark.skipif(elsewhere, reason=f"tried on {' and '.join(backends)}")
