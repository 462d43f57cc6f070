"""`keras.distribution` on PyTorch, where Keras has it: two processes on loopback."""

import importlib.util
import json

import keras
import pytest
from workers import free_ports, run_workers

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "torch"
    or importlib.util.find_spec("keras.src.backend.torch.distribution_lib") is None,
    reason="about PyTorch, and a Keras that has a distribution for it",
)


@pytest.mark.parametrize("kind", ["data", "model"])
def test_two_processes_train_as_one(kind, tmp_path):
    (port,) = free_ports(1)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    environments = [{**shared, "RANK": str(rank)} for rank in range(2)]
    run_workers("torch_mesh_worker", environments, tmp_path, kind)
    for rank in range(2):
        seen = json.loads((tmp_path / f"{rank}.json").read_text())
        assert seen.pop("some weights are in parts") == (kind == "model")
        assert seen.pop("the base lies as before")
        assert seen.pop("loaded") == 0
        assert max(seen.values()) < 1e-5, seen
