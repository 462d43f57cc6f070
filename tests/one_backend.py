"""Tests of what no backend has a part in, or another test tries on all, are for one of them."""

import keras
import pytest


def only_on(backend: str):
    """Skips a test on the other backends."""
    elsewhere = keras.backend.backend() != backend
    return pytest.mark.skipif(elsewhere, reason=f"tried on {backend}")
