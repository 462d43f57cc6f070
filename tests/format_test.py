"""What is in an adapter file, told without a model: by the package, and by docs/format.md alone."""

import re
import subprocess
import sys

import keras
import numpy as np
import pytest
from conftest import ROOT
from one_backend import only_on
from tools import array, bert_classifier, randomize_adapters

from keras_dcft import enable_dcft, load_dcft_weights, read_dcft_notes, save_dcft_weights
from keras_dcft.__main__ import main
from keras_dcft.files import read
from keras_dcft.paths import dcft_layers

V1 = ROOT / "tests" / "golden" / "v1"


def from_the_page(name):
    """The function of this name that docs/format.md has."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "format.md").read_text(), re.S)
    (block,) = (block for block in blocks if f"def {name}(" in block)
    scope = {}
    exec(block, scope)
    return scope[name]


def many_layouts():
    """Sides that the kernel size does not divide, and kernels of several axes in any order."""
    inputs = keras.Input((5, 14))
    x = keras.layers.Dense(13, name="dense")(inputs)
    x = keras.layers.EinsumDense("btd,dnh->btnh", (None, 3, 5), name="query")(x)
    x = keras.layers.EinsumDense("btnh,nhd->btd", (None, 11), name="output")(x)
    x = keras.layers.EinsumDense("btd,ndh->btnh", (None, 3, 7), name="contracted_second")(x)
    return keras.Model(inputs, x)


def words():
    return keras.Sequential(
        [keras.Input((3,), dtype="int32"), keras.layers.Embedding(29, 10, name="embedding")]
    )


@pytest.fixture
def classifier_file(tmp_path):
    path = tmp_path / "mine.dcft.safetensors"
    model = enable_dcft(bert_classifier(), kernel_size={"query|value": 2, ".*": 4}, rank=2)
    save_dcft_weights(model, path, notes={"accuracy": 0.75, "classes": ["no", "yes"]})
    return path, model


def as_matrix(layer):
    if isinstance(layer, keras.layers.EinsumDense):
        inputs, kernel = layer.equation.split("->")[0].split(",")
        order = sorted(range(len(kernel)), key=lambda n: kernel[n] not in inputs)
        rows = np.prod([n for n, c in zip(layer._kernel.shape, kernel) if c in inputs])
        return array(layer.dcft_increment()).transpose(order).reshape(rows, -1)
    return array(layer.dcft_increment())


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (many_layouts, {"kernel_size": 4}),
        (many_layouts, {"kernel_size": {"query|output": 2, ".*": 3}, "rank": 2, "alpha": 5}),
        (words, {"kernel_size": 4, "target_layers": "embedding"}),
    ],
)
def test_the_pages_reader_finds_the_increments(make, arguments, tmp_path):
    model = enable_dcft(make(), **arguments)
    randomize_adapters(model)
    path = tmp_path / "a.dcft.safetensors"
    save_dcft_weights(model, path)
    found, layers = from_the_page("increments")(path), dcft_layers(model)
    assert list(found) == list(layers)
    for name, layer in layers.items():
        expected = as_matrix(layer)
        assert found[name].shape == expected.shape
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6)


def test_the_pages_checksum_is_the_files(classifier_file):
    for path in (classifier_file[0], *V1.glob("*.dcft.safetensors")):
        assert from_the_page("checksum")(path) == read(path)[1]["checksum"]


def test_layers_that_share_a_weight_are_there_once(tmp_path):
    inputs = keras.Input((3,), dtype="int32")
    embedding = keras.layers.ReversibleEmbedding(29, 12, name="embedding")
    x = keras.layers.Dense(12, name="dense")(embedding(inputs))
    model = keras.Model(inputs, embedding(x, reverse=True))
    enable_dcft(model, kernel_size=4, target_layers=".*")
    randomize_adapters(model)
    save_dcft_weights(model, tmp_path / "a.dcft.safetensors")
    found = from_the_page("increments")(tmp_path / "a.dcft.safetensors")
    assert sorted(found) == ["dense", "embedding"]
    expected = array(model.get_layer("embedding").dcft_increment())
    np.testing.assert_allclose(found["embedding"], expected, rtol=1e-5, atol=1e-6)


def test_notes_tell_what_is_in_a_file(classifier_file):
    path, model = classifier_file
    found = read_dcft_notes(str(path))
    trained = {v.path: v for v in model.trainable_variables}
    sizes = {name: int(np.prod(v.shape)) for name, v in trained.items()}
    in_adapters = sum(size for name, size in sizes.items() if "dcft_" in name)
    assert found["format_version"] == 2
    assert {name: found["settings"][name] for name in model.dcft_config} == model.dcft_config
    assert (found["base"]["model_class"], found["base"]["part"]) == (
        "BertBackbone",
        "bert_backbone",
    )
    assert set(found["base"]["fingerprints"]) == set(model.dcft_config["layers"])
    assert found["base"]["architecture"]["token_embedding"] == [11, 16]
    assert found["notes"] == {"accuracy": 0.75, "classes": ["no", "yes"]}
    assert found["counts"] == {
        "adapters": in_adapters,
        "trained_in_full": sum(sizes.values()) - in_adapters,
        "tensors": len(trained),
    }
    assert found["tensors"]["trained/logits/0.kernel"] == {"dtype": "float32", "shape": [16, 2]}


def test_notes_of_version_1():
    found = read_dcft_notes(V1 / "trainable_layers.dcft.safetensors")
    assert (found["format_version"], found["base"]["fingerprints"]) == (1, {})
    assert found["notes"] == {"name": "trainable_layers"}
    assert found["counts"]["trained_in_full"] > 26


def test_a_file_of_version_2_without_matrix_shapes_is_loaded(classifier_file):
    # As the first of that version were.
    import safetensors.numpy

    from keras_dcft.files import _checksum

    path, model = classifier_file
    tensors, metadata = read(path)
    del metadata["matrix_shapes"]
    metadata["checksum"] = _checksum(tensors, metadata)
    path.write_bytes(safetensors.numpy.save(tensors, metadata))
    assert load_dcft_weights(model, path) is model


def test_the_command_prints_a_file_and_names_those_it_cannot_read(classifier_file, capsys):
    path = str(classifier_file[0])
    assert main([path]) == 0
    printed, errors = capsys.readouterr()
    assert errors == ""
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    for line in (
        path,
        "Format version 2, the checksum fits",
        "Base BertBackbone at 'bert_backbone'",
        "Rank 2",
        "Kernel sizes 2 (4 layers), 4 (9 layers)",
        "Trained in full logits",
        'Note: classes ["no", "yes"]',
        "adapter/pooled_dense/dcft_a float32 4 x 2",
        "trained/logits/1.bias float32 2",
    ):
        assert line in lines, printed
    content = bytearray(classifier_file[0].read_bytes())
    content[-1] ^= 1
    damaged, missing = f"{path[:-21]}bad.dcft.safetensors", f"{path[:-21]}none.dcft.safetensors"
    with open(damaged, "wb") as file:
        file.write(content)
    assert main([damaged, missing, path]) == 1
    printed, errors = capsys.readouterr()
    assert "Rank" in printed
    first, second = errors.splitlines()
    assert first == f"{damaged}: damaged, its checksum does not fit its content."
    assert "No such file" in second
    assert missing in second


@only_on("torch")
def test_it_is_run_as_a_module(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "Checks adapter files" in " ".join(capsys.readouterr().out.split())
    file = str(V1 / "head.dcft.safetensors")
    command = [sys.executable, "-m", "keras_dcft", file, "none.dcft.safetensors"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 1, result.stderr
    assert "version 1, the checksum fits" in " ".join(result.stdout.split())
    assert "Traceback" not in result.stderr
