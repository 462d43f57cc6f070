import gc
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import hypothesis
import keras
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
SHARED_TFDS = ROOT.parent / "shared" / "tfds"
BACKENDS = ("tensorflow", "jax", "torch")

# Every new shape compiles something, so single examples may be slow.
hypothesis.settings.register_profile("keras", deadline=None, derandomize=True)
hypothesis.settings.load_profile("keras")


@pytest.fixture(autouse=True)
def _fresh_state():
    keras.utils.clear_session()
    # What earlier tests left, hundreds of thousands of objects of TensorFlow's graphs that Keras
    # never frees, would be looked through again and again.
    gc.freeze()
    keras.utils.set_random_seed(0)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def run_python():
    """Runs a program in a process of its own, on any backend, and returns what it printed."""

    def run(program, backend=None):
        backend = backend or keras.backend.backend()
        result = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": str(ROOT / "tests")},
            capture_output=True,
            text=True,
            timeout=1200,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run
