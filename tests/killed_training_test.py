"""A training on several devices that is killed goes on where it was."""

import json
import os
import signal
import subprocess
import sys

import keras
import pytest
from conftest import ROOT

from keras_dcft import read_dcft_notes

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="keras.distribution is JAX's"
)


def train(folder, *dying):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    return subprocess.run(
        [sys.executable, ROOT / "tests" / "killed_training_program.py", folder, *dying],
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_killed_training_has_the_losses_of_an_undisturbed_one(tmp_path):
    kinds = ("backup", "checkpoint")
    for kind in kinds:
        (tmp_path / kind).mkdir()
        (tmp_path / f"undisturbed {kind}").mkdir()
        assert train(tmp_path, kind).returncode == -signal.SIGKILL
    for file in tmp_path.glob("*/*.dcft.safetensors"):
        read_dcft_notes(file)  # whole, by its checksum
    finished = train(tmp_path)
    assert finished.returncode == 0, finished.stderr
    seen = json.loads(finished.stdout.splitlines()[-1])
    for kind in kinds:
        expected, devices = seen[f"undisturbed {kind}"]
        assert devices == 4
        assert len(expected) == 4
        losses, _ = seen[kind]
        assert losses == pytest.approx(expected[-len(losses) :], rel=1e-5)
        assert len(losses) == 2
