import hashlib
import json
import subprocess
import sys
import threading

import keras
import keras_hub
import numpy as np
import pytest
import safetensors.numpy
from one_backend import only_on
from tools import (
    LABELS,
    MODELS,
    TEXTS,
    array,
    bert_backbone,
    bert_classifier,
    differences,
    predict,
    randomize_adapters,
    sequential,
    values,
    vectors,
)

from keras_dcft import (
    dcft_disabled,
    enable_dcft,
    load_dcft_weights,
    merge_dcft,
    remove_dcft,
    save_dcft_weights,
)
from keras_dcft.files import _checksum


def adapted(kind, **arguments):
    model = MODELS[kind][0]()
    enable_dcft(model, kernel_size=4, **arguments)
    randomize_adapters(model)
    return model


def plain_like(model, kind):
    """A new model with the base weights of an adapted one."""
    plain = MODELS[kind][0]()
    enable_dcft(plain, kernel_size=4)
    plain.set_weights(model.get_weights())
    return remove_dcft(plain)


def snapshot(model):
    classes = [(type(layer), layer.trainable) for layer in model._flatten_layers()]
    return classes, [(v.path, v.trainable) for v in model.weights], values(model.weights)


def assert_unchanged(model, before):
    after = snapshot(model)
    assert after[:2] == before[:2]
    assert all(d == 0 for d in differences(before[2], after[2]))


@pytest.mark.parametrize("kind", MODELS)
def test_a_file_brings_the_adapter_to_a_plain_model(kind, tmp_path):
    model, inputs = adapted(kind), MODELS[kind][1]()
    if kind == "task":
        model.fit(TEXTS, LABELS, verbose=0)
    expected = predict(model, inputs)
    path = tmp_path / "a.dcft.safetensors"
    save_dcft_weights(model, path)
    plain = plain_like(model, kind)
    assert load_dcft_weights(plain, path) is plain
    assert type(plain) is type(model)
    assert plain.dcft_config == model.dcft_config
    np.testing.assert_array_equal(predict(plain, inputs), expected)
    randomize_adapters(plain, seed=9)
    assert np.abs(predict(plain, inputs) - expected).max() > 0
    load_dcft_weights(plain, path)
    np.testing.assert_array_equal(predict(plain, inputs), expected)


def test_a_file_holds_exactly_what_was_trained(tmp_path):
    model = adapted("task", trainable_layers="layer_norm")
    path = tmp_path / "a.dcft.safetensors"
    model.trainable = False  # a flag of the moment, which does not change what was trained
    save_dcft_weights(model, path)
    model.trainable = True
    tensors = safetensors.numpy.load_file(path)
    assert sum(t.size for t in tensors.values()) == sum(
        int(np.prod(v.shape)) for v in model.trainable_variables
    )
    assert "trained/logits/0.kernel" in tensors
    assert any("layer_norm" in name for name in tensors)
    assert "adapter/pooled_dense/dcft_filter" in tensors


def test_what_was_made_trainable_by_hand_is_in_the_file(tmp_path):
    model = adapted("sequential")
    plain = plain_like(model, "sequential")
    other = enable_dcft(plain_like(model, "sequential"), kernel_size=4)
    gamma = model.layers[1].gamma
    gamma.trainable = True
    gamma.assign(gamma + 0.5)
    path = tmp_path / "a.dcft.safetensors"
    save_dcft_weights(model, path)
    names = set(safetensors.numpy.load_file(path))
    assert {name for name in names if not name.startswith("adapter/")} == {
        "trained/layer_normalization/0.gamma"
    }
    for target in (plain, other):
        load_dcft_weights(target, path)
        np.testing.assert_array_equal(predict(target, vectors()), predict(model, vectors()))
        assert len(target.trainable_variables) == 7


def test_what_is_frozen_around_an_adapted_backbone_is_not_in_the_file(tmp_path):
    def make():
        first, second = bert_backbone(), bert_backbone()
        inputs = first.input
        joined = keras.layers.concatenate([b(inputs)["pooled_output"] for b in (first, second)])
        second.trainable = False
        model = keras.Model(inputs, keras.layers.Dense(3, name="head")(joined))
        return model, first

    model, first = make()
    enable_dcft(first, kernel_size=4)
    randomize_adapters(model)
    path = tmp_path / "a.dcft.safetensors"
    save_dcft_weights(model, path)
    tensors = safetensors.numpy.load_file(path)
    trained = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    assert sum(t.size for t in tensors.values()) == trained
    # Switched off for a moment as a whole, a model still has a trained head.
    model.trainable = False
    save_dcft_weights(model, path)
    assert "trained/head/0.kernel" in safetensors.numpy.load_file(path)


def test_statistics_of_a_trained_layer_are_kept(tmp_path):
    def make():
        return keras.Sequential(
            [keras.Input((12,)), keras.layers.Dense(8), keras.layers.BatchNormalization()]
        )

    model = make()
    enable_dcft(model, kernel_size=4, trainable_layers="normalization")
    model.compile("adam", "mse")
    model.fit(vectors(8), np.ones((8, 8)), epochs=3, verbose=0)
    path = tmp_path / "a.dcft.safetensors"
    save_dcft_weights(model, path)
    other = make()
    other.layers[0].set_weights([array(model.layers[0]._kernel), array(model.layers[0].bias)])
    load_dcft_weights(other, path)
    np.testing.assert_array_equal(predict(other, vectors()), predict(model, vectors()))


def test_bfloat16_values_survive(tmp_path):
    def make():
        return keras.Sequential(
            [
                keras.Input((12,)),
                keras.layers.Dense(8, dtype="bfloat16"),
                keras.layers.Dense(8, dtype="bfloat16", name="trained"),
            ]
        )

    model = enable_dcft(make(), kernel_size=4, trainable_layers="trained")
    path = tmp_path / "a.dcft.safetensors"
    save_dcft_weights(model, path)
    other = load_dcft_weights(make(), path)
    trained = [v for v in other.trainable_variables if v.dtype == "bfloat16"]
    assert len(trained) == 2
    assert differences(values(trained), values(model.layers[1].weights)) == [0, 0]


# --- damage ---


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter") / "a.dcft.safetensors"
    save_dcft_weights(adapted("sequential"), path)
    return path.read_bytes()


def damaged_versions(intact):
    lengths = {len(intact) * percent // 100 for percent in range(100)} | set(range(256))
    for length in sorted(x for x in lengths if x < len(intact)):
        yield f"the first {length} bytes", intact[:length]
    header = 8 + int.from_bytes(intact[:8], "little")
    for position in range(header):
        flipped = bytes([intact[position] ^ 0x11])
        yield f"byte {position} flipped", intact[:position] + flipped + intact[position + 1 :]
    middle = (header + len(intact)) // 2
    yield "a flipped value", intact[:middle] + b"\x55" + intact[middle + 1 :]
    yield "another file", hashlib.sha256(intact).digest() * 10


def test_every_damage_is_an_error_that_changes_nothing(intact, tmp_path):
    path = tmp_path / "a.dcft.safetensors"
    path.write_bytes(intact)
    plain, enabled = sequential(), adapted("sequential")
    states = [(model, snapshot(model)) for model in (plain, enabled)]
    for description, content in damaged_versions(intact):
        path.write_bytes(content)
        for model, _ in states:
            with pytest.raises(ValueError, match=r"a\.dcft\.safetensors: ") as raised:
                load_dcft_weights(model, path)
            assert raised.value, description
    for model, before in states:
        assert_unchanged(model, before)
    path.write_bytes(intact)
    load_dcft_weights(plain, path)


def rewritten(intact, change):
    """The file with its metadata or tensors changed, and a checksum that fits."""
    tensors = safetensors.numpy.load(intact)
    size = int.from_bytes(intact[:8], "little")
    metadata = json.loads(intact[8 : 8 + size])["__metadata__"]
    change(tensors, metadata)
    metadata["checksum"] = _checksum(tensors, metadata)
    return safetensors.numpy.save(tensors, metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t, m: m.update(format_version="3"),
            "newer keras_dcft.* format version 3; .* reads 2",
        ),
        (
            lambda t, m: m.update(format="other"),
            "save_dcft_weights` wrote. The file has format='other'",
        ),
        (
            lambda t, m: t.pop("adapter/dense/dcft_a"),
            "'adapter/dense/dcft_a' the file has nothing of that name; the model has shape",
        ),
        (
            lambda t, m: t.update(more=np.zeros(2)),
            "'more' the file has shape .2,.; the model has nothing",
        ),
        (
            lambda t, m: t.update({"adapter/dense/dcft_a": np.zeros((4, 1), "float32")}),
            r"'adapter/dense/dcft_a' the file has shape \(4, 1\); the model has shape \(3, 1\)",
        ),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(intact, change, message, tmp_path):
    path = tmp_path / "a.dcft.safetensors"
    path.write_bytes(rewritten(intact, change))
    for model in (sequential(), adapted("sequential")):
        before = snapshot(model)
        with pytest.raises(ValueError, match=message):
            load_dcft_weights(model, path)
        assert_unchanged(model, before)


def test_other_architectures_and_settings_are_refused(tmp_path):
    path = tmp_path / "a.dcft.safetensors"
    save_dcft_weights(adapted("backbone"), path)
    with pytest.raises(ValueError, match=r"file has layer 'token_embedding'.*model has no 'token_"):
        load_dcft_weights(sequential(), path)
    save_dcft_weights(adapted("sequential"), path)
    wider = keras.Sequential([keras.Input((12,)), keras.layers.Dense(24), keras.layers.Dense(9)])
    with pytest.raises(ValueError, match=r"'dense' .* \(12, 20\); the model has .* \(12, 24\)"):
        load_dcft_weights(wider, path)
    deeper = keras.Sequential([keras.Input((12,)), *(keras.layers.Dense(n) for n in (20, 9, 9))])
    with pytest.raises(ValueError, match="file has no 'dense_2'; the model has layer 'dense_2'"):
        load_dcft_weights(deeper, path)
    words = [
        keras.Sequential([keras.Input((3,), dtype="int32"), keras.layers.Embedding(n, 12)])
        for n in (29, 32)
    ]
    enable_dcft(words[0], kernel_size=4, target_layers="embedding")
    save_dcft_weights(words[0], tmp_path / "words.dcft.safetensors")
    with pytest.raises(ValueError, match=r"'embedding' .* \(29, 12\); the model has .* \(32, 12\)"):
        load_dcft_weights(words[1], tmp_path / "words.dcft.safetensors")
    for arguments, found in [
        ({"rank": 2}, "file has rank=1; the model has rank=2"),
        ({"alpha": 8}, "file has alpha=16.0; the model has alpha=8.0"),
        (
            {"kernel_size": 2},
            "file has kernel_size of 'dense'=4; the model has kernel_size of 'dense'=2",
        ),
    ]:
        model = enable_dcft(sequential(), **{"kernel_size": 4, **arguments})
        before = snapshot(model)
        with pytest.raises(ValueError, match=found):
            load_dcft_weights(model, path)
        assert_unchanged(model, before)


def test_names_and_folders_are_checked(tmp_path):
    model = adapted("sequential")
    for call in (save_dcft_weights, load_dcft_weights):
        with pytest.raises(ValueError, match=r"must end with `\.dcft\.safetensors`"):
            call(model, tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError):
        load_dcft_weights(model, tmp_path / "none.dcft.safetensors")
    with pytest.raises(FileNotFoundError):
        save_dcft_weights(model, tmp_path / "none" / "a.dcft.safetensors")
    with pytest.raises(ValueError, match="Call `enable_dcft"):
        save_dcft_weights(sequential(), tmp_path / "a.dcft.safetensors")
    assert list(tmp_path.iterdir()) == []


SAVE_AND_BE_KILLED = """
import os, pathlib, random, select, signal, sys, time
import keras, numpy as np, safetensors.numpy
from keras_dcft import enable_dcft, load_dcft_weights, read_dcft_notes, save_dcft_weights

def make():
    layers = [keras.Input((300,)), keras.layers.Dense(1000, name="wide"), keras.layers.Dense(20)]
    return enable_dcft(keras.Sequential(layers), kernel_size=4, trainable_layers="wide")

def write(tell):
    # Nothing may have been computed before the fork: backends have threads, which are not forked.
    model = make()
    for variable in model.trainable_variables:
        variable.assign(np.full(variable.shape, number))
    os.write(tell, b".")
    while True:
        save_dcft_weights(model, path, notes={"number": number})
        os.write(tell, b".")

path, kills = pathlib.Path(sys.argv[1]) / "a.dcft.safetensors", int(sys.argv[2])
seen = [None]
for number in range(kills):
    told, tell = os.pipe()
    writer = os.fork()
    if writer == 0:
        write(tell)
    # Every second is killed in a later save, the others in the first, mostly.
    for _ in range(1 + (number + 1) % 2):
        assert select.select([told], [], [], 60)[0], number
        os.read(told, 1)
    time.sleep(random.Random(number).uniform(0, 0.1))
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    os.close(told), os.close(tell)
    seen.append(read_dcft_notes(path)["notes"]["number"])
    values = {float(x) for v in safetensors.numpy.load_file(path).values() for x in np.unique(v)}
    assert values == {seen[-1]}, (number, values)
    assert seen[-1] in (number, *seen[-2:-1] * (number % 2)), (number, seen)
load_dcft_weights(make(), path)
print(len(seen) - 1, len(set(seen)) - 1)
"""


@only_on("torch")
def test_a_file_is_whole_after_every_kill(tmp_path):
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SAVE_AND_BE_KILLED, str(tmp_path), "8"],
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert result.returncode == 0, result.stderr
    kills, versions = map(int, result.stdout.split())
    assert kills == 8
    assert versions >= 4


def test_readers_of_a_file_that_is_replaced_see_the_old_or_the_new(tmp_path):
    path = tmp_path / "a.dcft.safetensors"
    model = adapted("sequential")
    errors, seen, stop = [], set(), threading.Event()

    def write(number):
        for variable in model.trainable_variables:
            variable.assign(np.full(variable.shape, number))
        save_dcft_weights(model, path)

    write(0)

    def read():
        try:
            reader = adapted("sequential")
            while not stop.is_set():
                load_dcft_weights(reader, path)
                found = {float(x) for v in values(reader.trainable_variables) for x in v.ravel()}
                assert len(found) == 1
                seen.update(found)
        except BaseException as error:
            errors.append(error)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    try:
        for number in range(1, 40):
            write(number)
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    assert errors == []
    assert len(seen) > 1


@pytest.mark.real
@only_on("torch")
def test_the_minilm_file_is_small(tmp_path):
    import keras_hub
    from support.methods import default_preset

    backbone = keras_hub.models.BertBackbone.from_preset(str(default_preset()))
    enable_dcft(backbone)
    path = tmp_path / "a.dcft.safetensors"
    save_dcft_weights(backbone, path)
    assert path.stat().st_size < 60_000


@pytest.mark.compiled
def test_swapping_neither_retraces_nor_touches_the_base(tmp_path, monkeypatch):
    model = adapted("sequential")
    call = type(model).call
    inputs = vectors()
    paths = []
    for seed in range(2):
        randomize_adapters(model, seed)
        paths.append((tmp_path / f"{seed}.dcft.safetensors", predict(model, inputs)))
        save_dcft_weights(model, paths[-1][0])
    base = [v for v in model.weights if "dcft" not in v.name]
    before, function = values(base), model.predict_function
    calls = []
    monkeypatch.setattr(
        type(model),
        "call",
        lambda self, *args, **kwargs: calls.append(1) or call(self, *args, **kwargs),
    )
    for path, expected in paths * 2:
        load_dcft_weights(model, path)
        np.testing.assert_array_equal(predict(model, inputs), expected)
    assert model.predict_function is function
    # Tracing runs the model's Python code, which PyTorch does each time.
    assert len(calls) == (4 if keras.backend.backend() == "torch" else 0)
    assert differences(before, values(base)) == [0.0] * len(base)


# --- merged, removed, switched off ---


@pytest.mark.parametrize("kind", MODELS)
def test_merged_models_are_plain_and_predict_the_same(kind, tmp_path):
    model, inputs = adapted(kind), MODELS[kind][1]()
    cls = model.dcft_base_class
    expected = predict(model, inputs)
    assert merge_dcft(model) is model
    assert type(model) is cls
    assert not any(type(x).__module__.startswith("keras_dcft") for x in model._flatten_layers())
    assert not any("dcft" in v.path for v in model.variables)
    difference = np.abs(predict(model, inputs) - expected).max()
    assert difference <= 1e-5 * max(1, np.abs(expected).max())
    enable_dcft(model, kernel_size=2)
    assert np.abs(predict(model, inputs) - expected).max() <= 2e-5 * max(1, np.abs(expected).max())


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("reloaded", [False, True])
def test_removing_gives_the_base_model_back(kind, reloaded, tmp_path):
    model, inputs = MODELS[kind][0](), MODELS[kind][1]()
    model._flatten_layers(include_self=False)[-1].trainable = False
    expected = predict(model, inputs)  # before the snapshot: a task's preprocessor is built by it
    before, cls = snapshot(model), type(model)
    enable_dcft(model, kernel_size=4, dropout=0.1)
    randomize_adapters(model)
    if reloaded:
        model.save(tmp_path / "m.keras")
        model = keras.saving.load_model(tmp_path / "m.keras")
    assert remove_dcft(model) is model
    assert type(model) is cls
    np.testing.assert_array_equal(predict(model, inputs), expected)
    if not reloaded:
        assert_unchanged(model, before)


def test_a_removed_or_merged_model_trains_in_full_again():
    for undo in (remove_dcft, merge_dcft):
        model = adapted("sequential")
        model.fit(vectors(), np.ones((4, 9)), verbose=0)
        undo(model)
        before = values(model.weights)
        model.fit(vectors(), np.ones((4, 9)), verbose=0)
        assert all(d > 0 for d in differences(before, values(model.weights)))


def test_directly_built_layers_are_merged_and_removed():
    import keras_dcft

    for undo in (remove_dcft, merge_dcft):
        model = keras.Sequential([keras.Input((12,)), keras_dcft.DCFTDense(8, dropout=0.1)])
        randomize_adapters(model)
        expected = predict(model, vectors())
        undo(model)
        assert type(model.layers[0]) is keras.layers.Dense
        assert [v.name for v in model.trainable_variables] == ["kernel", "bias"]
        same = np.abs(predict(model, vectors()) - expected).max() < 1e-5
        assert same == (undo is merge_dcft)


@pytest.mark.parametrize("verb", [merge_dcft, remove_dcft, lambda m: dcft_disabled(m).__enter__()])
def test_what_is_not_adapted_is_refused(verb):
    with pytest.raises(ValueError, match="must have DCFT layers"):
        verb(sequential())
    with pytest.raises(TypeError, match=r"must be a keras\.Model"):
        verb("model")


def test_a_part_of_an_adapted_model_is_merged_and_removed_alone():
    for verb in (merge_dcft, remove_dcft):
        model = adapted("functional_around_backbone")
        inputs = MODELS["functional_around_backbone"][1]()
        expected = predict(model, inputs)
        backbone = next(x for x in model.layers if type(x).__name__ == "BertBackbone")
        verb(backbone)
        assert type(backbone) is keras_hub.models.BertBackbone
        assert list(model.dcft_config["layers"]) == ["head"]
        same = np.abs(predict(model, inputs) - expected).max() < 1e-5
        assert same == (verb is merge_dcft)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.compiled) if kind in ("task", "sequential") else kind
        for kind in MODELS
    ],
)
def test_disabled_models_predict_as_their_base(kind):
    model, inputs = MODELS[kind][0](), MODELS[kind][1]()
    base = predict(model, inputs)
    enable_dcft(model, kernel_size=4)
    randomize_adapters(model)
    expected = predict(model, inputs)
    function = model.predict_function
    with dcft_disabled(model):
        assert np.abs(predict(model, inputs) - base).max() < 1e-6
        with dcft_disabled(model):
            assert np.abs(predict(model, inputs) - base).max() < 1e-6
        assert np.abs(predict(model, inputs) - base).max() < 1e-6
    np.testing.assert_array_equal(predict(model, inputs), expected)
    assert model.predict_function is function
    with pytest.raises(RuntimeError, match="inside"), dcft_disabled(model):
        raise RuntimeError("inside")
    np.testing.assert_array_equal(predict(model, inputs), expected)


def test_a_part_can_be_disabled():
    model = adapted("task")
    inputs = TEXTS[:4]
    expected = predict(model, inputs)
    with dcft_disabled(model.backbone):
        assert np.abs(predict(model, inputs) - expected).max() > 0
    np.testing.assert_array_equal(predict(model, inputs), expected)


def test_what_is_saved_while_disabled_has_its_adapters(tmp_path):
    model = adapted("sequential")
    expected = predict(model, vectors())
    with dcft_disabled(model):
        model.save(tmp_path / "m.keras")
        save_dcft_weights(model, tmp_path / "a.dcft.safetensors")
        with pytest.raises(ValueError, match="inside `dcft_disabled`"):
            merge_dcft(model)
    restored = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(predict(restored, vectors()), expected)
    randomize_adapters(model, seed=5)
    load_dcft_weights(model, tmp_path / "a.dcft.safetensors")
    np.testing.assert_array_equal(predict(model, vectors()), expected)


def test_low_precision_kernels_are_merged_to_their_own_precision():
    model = keras.Sequential([keras.Input((12,)), keras.layers.Dense(8, dtype="bfloat16")])
    enable_dcft(model, kernel_size=4)
    randomize_adapters(model)
    layer = model.layers[0]
    base, increment = array(keras.ops.cast(layer._kernel, "float32")), array(layer.dcft_increment())
    merge_dcft(model)
    merged = array(keras.ops.cast(layer.kernel, "float32"))
    assert layer.kernel.dtype == "bfloat16"
    assert np.all(np.abs(merged - (base + increment)) <= 2**-8 * np.abs(base + increment))


def test_backbone_and_task_files_say_what_is_missing(tmp_path):
    path = tmp_path / "a.dcft.safetensors"
    save_dcft_weights(adapted("task"), path)
    backbone = bert_backbone()
    before = snapshot(backbone)
    with pytest.raises(ValueError, match=r"'trained/logits/\d.*model has nothing"):
        load_dcft_weights(backbone, path)
    assert_unchanged(backbone, before)
    save_dcft_weights(adapted("backbone"), path)
    with pytest.raises(ValueError, match=r"'trained/logits/0\.kernel' the file has nothing"):
        load_dcft_weights(bert_classifier(), path)


def test_all_that_lies_outside_of_the_adapted_part_is_saved(tmp_path):
    import keras_dcft

    def make():
        layers = [keras.layers.Dense(8), keras.layers.BatchNormalization(center=False, scale=False)]
        inner = keras.Sequential([keras.Input((12,)), *layers], name="inner")
        outer = [inner, keras_dcft.DCFTDense(8, kernel_size=4), keras.layers.BatchNormalization()]
        model = keras.Sequential([keras.Input((12,)), *outer])
        model.compile("adam", "mse")
        return model, inner

    model, inner = make()
    enable_dcft(inner, kernel_size=4, trainable_layers="normalization")
    randomize_adapters(model)
    model.fit(vectors(8), np.ones((8, 8)), epochs=2, verbose=0)
    path = tmp_path / "a.dcft.safetensors"
    save_dcft_weights(model, path)
    other, other_inner = make()
    other_inner.layers[0].set_weights([array(inner.layers[0]._kernel), array(inner.layers[0].bias)])
    enable_dcft(other_inner, kernel_size=4, trainable_layers="normalization")
    load_dcft_weights(other, path)
    np.testing.assert_array_equal(predict(other, vectors()), predict(model, vectors()))


def test_what_cannot_be_adapted_is_not_loaded_into(tmp_path):
    path = tmp_path / "a.dcft.safetensors"
    save_dcft_weights(adapted("sequential"), path)
    with_lora, constrained = sequential(), sequential()
    with_lora.layers[0].enable_lora(2)
    constrained.layers[0].kernel_constraint = keras.constraints.NonNeg()
    cases = [(with_lora, "has Keras LoRA enabled"), (constrained, "has a kernel constraint")]
    for model, message in cases:
        before = snapshot(model)
        with pytest.raises(ValueError, match=message):
            load_dcft_weights(model, path)
        assert_unchanged(model, before)


def test_what_is_no_model_or_not_built_is_refused(tmp_path):
    path = tmp_path / "a.dcft.safetensors"
    save_dcft_weights(adapted("sequential"), path)
    for call in (save_dcft_weights, load_dcft_weights):
        with pytest.raises(TypeError, match=r"must be a keras\.Model"):
            call("model", path)
    with pytest.raises(ValueError, match="must be built"):
        load_dcft_weights(keras.Sequential([keras.layers.Dense(4)]), path)


def test_weights_loaded_while_disabled_are_kept(tmp_path):
    model = adapted("sequential")
    expected = predict(model, vectors())
    model.save_weights(tmp_path / "m.weights.h5")
    randomize_adapters(model, seed=4)
    with dcft_disabled(model):
        model.load_weights(tmp_path / "m.weights.h5")
    np.testing.assert_array_equal(predict(model, vectors()), expected)
