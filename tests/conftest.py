import functools
import gc
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Tests compile the same small programs again and again, which JAX does once for all of them here.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
if os.environ.get("KERAS_BACKEND") == "jax":  # and what runs once need not be optimized
    os.environ.setdefault(
        "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    )

import pytest

# What takes long to import is imported where it is used: the process that hands out the tests to
# others, which wait for it, reads this file too and uses none of it.

ROOT = Path(__file__).parent.parent
SHARED_TFDS = ROOT.parent / "shared" / "tfds"
BACKENDS = ("tensorflow", "jax", "torch")
# Of the files at the end of the alphabet.
LONG = ("snippets_test", "strategy_test", "torch_test", "training_modes_test")


def pytest_addoption(parser):
    parser.addoption(
        "--all-walks",
        action="store_true",
        help="do everything to every KerasHub backbone, not to the third that is this backend's",
    )


def pytest_collection():
    """Settings that must be made before the tests are read."""
    import hypothesis
    import keras

    # Every new shape compiles something, on JAX every operation, so single examples may be slow.
    hypothesis.settings.register_profile(
        "keras",
        deadline=None,
        derandomize=True,
        max_examples={"jax": 10, "tensorflow": 80, "torch": 200}[keras.backend.backend()],
    )
    hypothesis.settings.load_profile("keras")


def pytest_collection_modifyitems(items):
    """Long tests go first: at the end they would leave the other processes without work."""
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(autouse=True)
def _fresh_state():
    import keras

    keras.utils.clear_session()
    # What earlier tests left, hundreds of thousands of objects of TensorFlow's graphs that Keras
    # never frees, would be looked through again and again.
    gc.freeze()
    keras.utils.set_random_seed(0)


@pytest.fixture(autouse=True)
def _compiled_only_where_it_matters(request):
    """TensorFlow compiles nothing, JAX no predictions, but in tests marked `compiled`."""
    from tools import run_eagerly

    is_eager = not request.node.get_closest_marker("compiled")
    run_eagerly(is_eager)
    yield
    run_eagerly(False)


@functools.cache
def reads_minilm() -> bool:
    """Whether this KerasHub reads the layout of MiniLM's file: BERT alone, without a head."""
    import keras_hub
    import safetensors
    from support.methods import default_preset

    try:
        keras_hub.models.BertBackbone.from_preset(str(default_preset()))
    except safetensors.SafetensorError:
        return False
    return True


@pytest.fixture(autouse=True)
def _real_weights_where_they_can_be_read(request):
    if request.node.get_closest_marker("real") and not reads_minilm():
        pytest.skip("this KerasHub does not read MiniLM's layout")


@pytest.fixture
def rng():
    import numpy as np

    return np.random.default_rng(0)


@pytest.fixture
def run_python():
    """Runs a program in a process of its own, on any backend, and returns what it printed.

    JAX has as many virtual devices there as it is told.
    """

    import keras
    from workers import virtual_devices

    def run(program, backend=None, *arguments, devices=1):
        backend = backend or keras.backend.backend()
        environment = {"KERAS_BACKEND": backend, "PYTHONPATH": str(ROOT / "tests")}
        if backend == "jax":
            environment |= virtual_devices(devices)
        result = subprocess.run(
            [sys.executable, "-c", program, *map(str, arguments)],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=1200,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run
