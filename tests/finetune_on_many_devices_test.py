import re
import subprocess
import sys

import keras
import pytest
from conftest import ROOT
from finetune_on_many_devices import main, mesh_shape, parse_options

PROGRAM = ROOT / "examples" / "finetune_on_many_devices.py"


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "numbers.txt"
    path.write_text("one two three four five six seven eight nine ten\n" * 60)
    return path


def run_example(*arguments):
    return subprocess.run(
        [sys.executable, PROGRAM, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=1200,
    )


@pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="`keras.distribution` has meshes on JAX"
)
def test_it_trains_on_eight_devices_and_one_device_computes_the_same(text_file, tmp_path):
    result = run_example(
        "--mesh", "2x4", "--devices", 8, "--shard-adapters", "--text-file", text_file,
        "--sequence-length", 16, "--epochs", 2, "--learning-rate", 0.02, "--output-dir", tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    printed = result.stdout
    assert "Mesh: 2 x 4 of cpu:0 to cpu:7, ('batch', 'model')." in printed
    assert "Training 1,344 of 362,432 parameters." in printed

    losses = {n: float(x) for n, x in re.findall(r"^  (\S.*?) {2,}(\d+\.\d+)$", printed, re.M)}
    assert losses["epoch 2"] < losses["epoch 1"]
    assert losses["held out, after"] < 0.95 * losses["held out, before"]
    assert losses["held out, on one device"] == pytest.approx(losses["held out, after"], rel=1e-4)
    (difference,) = re.findall(r"^Outputs +differ on one device by (\S+)", printed, re.M)
    assert float(difference) < 1e-4
    assert (tmp_path / "adapter.dcft.safetensors").stat().st_size < 20_000

    lines = {" ".join(line.split()) for line in printed.splitlines()}
    assert {
        "query/kernel 2 by (model, batch, -) 1/8",
        "ffw_linear/kernel 2 by (model, batch) 1/8",
        "final_normalization/scale 1 whole everywhere 1/1",
        "dcft_a 10 by (batch, -) 1/2",
        "dcft_b 10 by (-, model) 1/4",
        "dcft_filter 14 whole everywhere 1/1",
    } <= lines
    (held, whole), (adapters, all_adapters) = (
        map(float, re.search(rf"^{name} +(\S+) +(\S+)$", printed, re.M).groups())
        for name in ("base", "adapters")
    )
    assert whole / 8 <= held < whole / 7
    assert adapters < all_adapters


def test_elsewhere_it_says_that_it_needs_jax():
    if keras.backend.backend() == "jax":
        pytest.skip("JAX is here")
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == (
        "error: `keras.distribution` cuts models with JAX: start this program with "
        f"KERAS_BACKEND=jax. Received: KERAS_BACKEND={keras.backend.backend()}"
    )


def test_the_mesh_has_a_place_for_each_device():
    assert [mesh_shape(count) for count in (8, 3, 1)] == [(2, 4), (1, 3), (1, 1)]
    assert parse_options(["--mesh", "4x2"]).devices == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mesh", "2x4", "--devices", "4"], "argument --mesh: must have a place for each of 4"),
        (["--mesh", "2x4", "--batch-size", "3"], "argument --batch-size: must be a multiple of"),
        (["--mesh", "8"], "argument --mesh: must be two numbers, such as 2x4. Received: 8"),
        (["--devices", "0"], "argument --devices: must be at least 1. Received: 0"),
        (["--text-file", "/nowhere.txt"], "No such file or directory: '/nowhere.txt'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    said = capsys.readouterr().err.strip() if stop.value.code == 2 else stop.value.code
    assert said.startswith("error: ")
    assert message in said
    assert len(said.splitlines()) == 1
