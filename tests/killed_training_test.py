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


def train(folder, kind, dies_in):
    return subprocess.run(
        [sys.executable, ROOT / "tests" / "killed_training_program.py", folder, kind, str(dies_in)],
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("kind", ["backup", "checkpoint"])
def test_a_killed_training_has_the_losses_of_an_undisturbed_one(kind, tmp_path):
    for name in ("undisturbed", "killed"):
        (tmp_path / name).mkdir()
    whole = train(tmp_path / "undisturbed", kind, -1)
    assert whole.returncode == 0, whole.stderr
    expected = json.loads(whole.stdout.splitlines()[-1])
    assert expected["devices"] == 4
    assert len(expected["losses"]) == 4
    assert train(tmp_path / "killed", kind, 2).returncode == -signal.SIGKILL
    for file in (tmp_path / "killed").glob("*.dcft.safetensors"):
        read_dcft_notes(file)  # whole, by its checksum
    again = train(tmp_path / "killed", kind, -1)
    assert again.returncode == 0, again.stderr
    losses = json.loads(again.stdout.splitlines()[-1])["losses"]
    assert losses == pytest.approx(expected["losses"][-len(losses) :], rel=1e-5)
    assert len(losses) == 2
