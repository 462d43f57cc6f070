"""JAX's `keras.distribution` on 8 virtual CPU devices: tests/mesh_program.py."""

import concurrent.futures
import json
import socket

import keras
import pytest
from workers import run_program

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="`keras.distribution` has meshes on JAX"
)

MESHES = ("8", "2x4", "4x2")
PROGRAM = "import sys, mesh_program; mesh_program.main(*sys.argv[1:])"


def test_everything_on_a_mesh_is_as_on_one_device(tmp_path):
    printed = run_program(PROGRAM, tmp_path / "log", tmp_path, *MESHES, devices=8)
    of_meshes = json.loads(printed.splitlines()[-1])
    assert tuple(of_meshes) == MESHES
    for mesh, seen in of_meshes.items():
        is_in_parts = mesh != "8"
        if mesh == "2x4":
            places = seen.pop("where A and B of query and output lie")
            # Gemma's queries are (heads, hidden, head_dim), the outputs (heads, head_dim, hidden).
            assert places == [
                [["batch", None], [None, "model"]],
                [["model", None], [None, "batch"]],
            ]
            of_adapter, of_model, own, largest, total = seen.pop("one to mesh: bytes")
            # While a file is loaded the first device has its parts and one weight as a whole.
            assert of_adapter < total / 4
            assert of_model <= own + largest + 256 < total
        for name, found in seen.items():
            if name.endswith("some weights are in parts"):
                assert found == is_in_parts, (mesh, name)
            elif isinstance(found, bool):
                assert found, (mesh, name)
            else:
                assert found < 1e-5, (mesh, name)


def test_two_processes_train_one_model_and_the_first_writes(tmp_path, run_python, monkeypatch):
    monkeypatch.setenv("JAX_CPU_COLLECTIVES_IMPLEMENTATION", "gloo")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = "import mesh_processes_program"
    common = tmp_path / "common"
    for name in ("common", "0", "1"):
        (tmp_path / name).mkdir()

    def run(number):
        printed = run_python(program, None, tmp_path / str(number), common, number, port, devices=4)
        return json.loads(printed.splitlines()[-1])

    with concurrent.futures.ThreadPoolExecutor(2) as both:
        first, second = both.map(run, (0, 1))
    assert first.pop("written") == ["own.dcft.safetensors"]
    assert second.pop("written") == []
    for seen in (first, second):
        assert seen.pop("the merged base lies as the base")
        assert max(seen.values()) < 1e-5
