"""A training on several devices that is killed goes on where it was."""

import json

import keras
import pytest
from workers import run_workers, virtual_devices

from keras_dcft import read_dcft_notes

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="keras.distribution is JAX's"
)


def train(folder, *dying):
    killed = 0 if dying else None
    run_workers("killed_training_program", [virtual_devices(4)], folder, *dying, killed=killed)


def test_a_killed_training_has_the_losses_of_an_undisturbed_one(tmp_path):
    kinds = ("backup", "checkpoint")
    for kind in kinds:
        (tmp_path / kind).mkdir()
        (tmp_path / f"undisturbed {kind}").mkdir()
        train(tmp_path, kind)
    for file in tmp_path.glob("*/*.dcft.safetensors"):
        read_dcft_notes(file)  # whole, by its checksum
    train(tmp_path)
    seen = json.loads((tmp_path / "losses.json").read_text())
    for kind in kinds:
        expected, devices = seen[f"undisturbed {kind}"]
        assert devices == 4
        assert len(expected) == 4
        losses, _ = seen[kind]
        assert losses == pytest.approx(expected[-len(losses) :], rel=1e-5)
        assert len(losses) == 2
