"""JAX's `keras.distribution` on 8 virtual CPU devices: tests/mesh_program.py, mesh by mesh."""

import json

import keras
import pytest

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="`keras.distribution` has meshes on JAX"
)

PROGRAM = "import sys, mesh_program; mesh_program.main(*sys.argv[1:])"


@pytest.mark.parametrize("mesh", ["8", "2x4", "4x2"])
def test_everything_on_a_mesh_is_as_on_one_device(mesh, tmp_path, run_python):
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
