"""JAX's `keras.distribution` on 8 virtual CPU devices: tests/mesh_program.py, mesh by mesh."""

import concurrent.futures
import json
import os
import socket

import keras
import pytest

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="`keras.distribution` has meshes on JAX"
)

PROGRAM = "import sys, mesh_program; mesh_program.main(*sys.argv[1:])"


def have_devices(monkeypatch, count):
    """For processes that are started later; JAX makes its devices once."""
    flag = f"--xla_force_host_platform_device_count={count}"
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} {flag}")


@pytest.mark.parametrize("mesh", ["8", "2x4", "4x2"])
def test_everything_on_a_mesh_is_as_on_one_device(mesh, tmp_path, run_python, monkeypatch):
    have_devices(monkeypatch, 8)
    seen = json.loads(run_python(PROGRAM, None, tmp_path, mesh).splitlines()[-1])
    held = seen.pop("one to mesh: bytes")
    if mesh == "2x4":
        places = seen.pop("where A and B of query and output lie")
        # Gemma's queries are (heads, hidden, head_dim), the outputs (heads, head_dim, hidden).
        assert places == [
            ["P('batch', None)", "P(None, 'model')"],
            ["P('model', None)", "P(None, 'batch')"],
        ]
    is_in_parts = mesh != "8"
    for name, found in seen.items():
        if name.endswith("some weights are in parts"):
            assert found == is_in_parts, name
        elif isinstance(found, bool):
            assert found, name
        else:
            assert found < 1e-5, name
    # While a file is loaded the first device has its parts and one weight at a time as a whole.
    of_adapter, of_model, own, largest, total = held
    assert of_adapter < total / 4
    if is_in_parts:
        assert of_model <= own + largest + 256 < total


def test_two_processes_train_one_model_and_the_first_writes(tmp_path, run_python, monkeypatch):
    have_devices(monkeypatch, 4)
    monkeypatch.setenv("JAX_CPU_COLLECTIVES_IMPLEMENTATION", "gloo")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = "import mesh_processes_program"
    common = tmp_path / "common"
    for name in ("common", "0", "1"):
        (tmp_path / name).mkdir()

    def run(number):
        printed = run_python(program, None, tmp_path / str(number), common, number, port)
        return json.loads(printed.splitlines()[-1])

    with concurrent.futures.ThreadPoolExecutor(2) as both:
        first, second = both.map(run, (0, 1))
    assert first.pop("written") == ["own.dcft.safetensors"]
    assert second.pop("written") == []
    for seen in (first, second):
        assert seen.pop("the merged base lies as the base")
        assert max(seen.values()) < 1e-5
