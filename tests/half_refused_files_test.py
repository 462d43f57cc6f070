"""Files that fit in part: all of it or nothing, and a word where something is amiss."""

import warnings

import keras
import numpy as np
import pytest
from tools import (
    MODELS,
    VOCABULARY,
    bert_backbone,
    differences,
    predict,
    randomize_adapters,
    sequential,
    values,
    vectors,
)

from keras_dcft import (
    DCFTDense,
    enable_dcft,
    fingerprints,
    keras_internals,
    load_dcft_weights,
    merge_dcft,
    remove_dcft,
    save_dcft_weights,
)
from keras_dcft.fingerprints import TOLERANCE, fingerprint


def with_head(backbone):
    return keras.Model(backbone.input, keras.layers.Dense(2)(backbone.output["pooled_output"]))


@pytest.mark.parametrize("kind", [*MODELS, "other root", "direct"])
def test_whole_models_are_not_written_as_hdf5(kind, tmp_path):
    if kind == "direct":
        model = keras.Sequential([keras.Input((12,)), DCFTDense(8)])
    elif kind == "other root":
        model = with_head(enable_dcft(bert_backbone(), kernel_size=4))
    else:
        model = enable_dcft(MODELS[kind][0](), kernel_size=4)
    for name in ("m.h5", "m.hdf5"):
        with pytest.raises(ValueError, match=r"as `\.keras`"):
            model.save(tmp_path / name)
        if kind in MODELS:
            assert not (tmp_path / name).exists()


@pytest.mark.parametrize("kind", MODELS)
def test_weights_of_the_base_are_loaded_into_an_adapted_model(kind, tmp_path):
    model, other = MODELS[kind][0](), MODELS[kind][0]()
    other.save_weights(tmp_path / "base.weights.h5")
    enable_dcft(model, kernel_size=4)
    randomize_adapters(model)
    adapters = [v for v in model.weights if v.name.startswith("dcft_")]
    before, classes = values(adapters), [type(x) for x in model._flatten_layers()]
    model.load_weights(tmp_path / "base.weights.h5")
    assert differences(before, values(adapters)) == [0] * len(adapters)
    assert [type(x) for x in model._flatten_layers()] == classes
    expected = other.get_weights()
    assert differences(expected, remove_dcft(model).get_weights()) == [0] * len(expected)


@pytest.mark.parametrize("is_adapted", [False, True])
def test_weights_that_do_not_fit_change_nothing(is_adapted, tmp_path):
    layers = [keras.layers.Dense(20), keras.layers.LayerNormalization(), keras.layers.Dense(7)]
    other = keras.Sequential([keras.Input((12,)), *layers])
    if is_adapted:
        enable_dcft(other, kernel_size=2)
    other.save_weights(tmp_path / "other.weights.h5")
    model = enable_dcft(sequential(), kernel_size=4)
    before = values(model.variables)
    with pytest.raises(ValueError, match="could not be loaded"):
        model.load_weights(tmp_path / "other.weights.h5")
    assert differences(before, values(model.variables)) == [0] * len(before)


# --- another base ---


def kernels(dtype="float32"):
    inputs = keras.Input((48,), dtype=dtype)
    x = keras.layers.Dense(64, dtype=dtype)(inputs)
    x = keras.layers.EinsumDense("ab,bcd->acd", (4, 16), dtype=dtype, bias_axes="cd")(x)
    x = keras.layers.EinsumDense("acd,cde->ae", 40, dtype=dtype)(x)
    return keras.Model(inputs, x)


def test_fingerprints_are_the_same_read_in_place_and_by_calling_the_layer(monkeypatch):
    layers = kernels().layers[1:]
    for layer in layers:
        array = keras_internals.array_in_place(layer._kernel)
        if keras.config.backend() == "torch":  # as FSDP does
            assert layer._kernel.value.untyped_storage().resizable()
        np.testing.assert_array_equal(array, values([layer._kernel])[0])
    in_place = [fingerprint(layer) for layer in layers]
    monkeypatch.setattr(fingerprints.keras_internals, "array_in_place", lambda variable: None)
    np.testing.assert_allclose([fingerprint(layer) for layer in layers], in_place, atol=2e-4)


@pytest.mark.parametrize("change", ["bfloat16", "float16", "int8", "int4", "float8"])
def test_fingerprints_stay_when_a_weight_is_cast_or_quantized(change):
    model = kernels()
    before = [fingerprint(layer) for layer in model.layers[1:]]
    if "8" in change or "4" in change:
        model.quantize(change)
    if change in ("bfloat16", "float16"):
        other = kernels(change)
        other.set_weights(model.get_weights())
        model = other
    after = [fingerprint(layer) for layer in model.layers[1:]]
    root_mean_square = np.sqrt(np.mean(np.subtract(before, after) ** 2, axis=1))
    assert root_mean_square.max() < (TOLERANCE / 1.5 if change == "int4" else 0.05)
    unrelated = [fingerprint(layer) for layer in kernels().layers[1:]]
    assert np.sqrt(np.mean(np.subtract(before, unrelated) ** 2, axis=1)).min() > 1.5 * TOLERANCE


@pytest.mark.parametrize("kind", MODELS)
def test_an_adapter_of_another_base_is_loaded_with_a_warning(kind, tmp_path):
    model, other = MODELS[kind][0](), MODELS[kind][0]()
    weights = model.get_weights()
    path = tmp_path / "a.dcft.safetensors"
    enable_dcft(model, kernel_size=4)
    randomize_adapters(model)
    save_dcft_weights(model, path)
    with pytest.warns(UserWarning, match=r"trained on another base.* of \d+ adapted layers"):
        load_dcft_weights(other, path)
    remove_dcft(other)
    other.set_weights(weights)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*another base")
        load_dcft_weights(other, path)


def test_a_merged_base_is_another(tmp_path):
    model = enable_dcft(sequential(), kernel_size=4)
    randomize_adapters(model)
    save_dcft_weights(model, tmp_path / "a.dcft.safetensors")
    merge_dcft(model)
    with pytest.warns(UserWarning, match="trained on another base"):
        load_dcft_weights(model, tmp_path / "a.dcft.safetensors")


def test_an_embedding_with_other_rows_is_said(tmp_path):
    def words(rows):
        layers = [keras.layers.Embedding(rows, 12, name="words"), keras.layers.Dense(8)]
        return keras.Sequential([keras.Input((3,), dtype="int32"), *layers])

    model, resized = words(len(VOCABULARY)), words(len(VOCABULARY) + 5)
    resized.layers[1].set_weights(model.layers[1].get_weights())
    save_dcft_weights(enable_dcft(model, kernel_size=4), tmp_path / "a.dcft.safetensors")
    with pytest.warns(UserWarning, match="'words': 11 rows in the file, 16 here"):
        load_dcft_weights(resized, tmp_path / "a.dcft.safetensors")
    assert len(resized.trainable_variables) == 3


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_adapter_that_diverged_is_neither_loaded_nor_merged(value, tmp_path):
    model = enable_dcft(sequential(), kernel_size=4)
    model.layers[0].dcft_b.assign(np.full((1, 5), value))
    save_dcft_weights(model, tmp_path / "a.dcft.safetensors")
    before = values(model.weights)
    with pytest.raises(ValueError, match="NaN or infinity in 'dense/dcft_b'"):
        merge_dcft(model)
    assert isinstance(model.layers[0], DCFTDense)
    for other in (sequential(), enable_dcft(sequential(), kernel_size=4)):
        state = values(other.weights)
        with pytest.raises(ValueError, match="NaN or infinity in 'adapter/dense/dcft_b'"):
            load_dcft_weights(other, tmp_path / "a.dcft.safetensors")
        assert differences(state, values(other.weights)) == [0] * len(state)
    remove_dcft(model)
    assert len(before) - 6 == len(model.weights)


def test_a_missing_folder_is_named(tmp_path):
    model = enable_dcft(sequential(), kernel_size=4)
    path = tmp_path / "none" / "a.dcft.safetensors"
    with pytest.raises(FileNotFoundError, match="none") as caught:
        save_dcft_weights(model, path)
    assert str(path) in str(caught.value)


def test_integers_are_named_by_their_paths():
    model = sequential()
    model.quantize("int8")
    enable_dcft(model, kernel_size=4)
    with pytest.raises(ValueError, match="quantized layers dense, dense_1"):
        merge_dcft(model)
    assert predict(model, vectors()).shape == (4, 9)


def test_messages_about_files_are_short(tmp_path):
    def deep(size):
        layers = [keras.layers.Dense(8, name=f"layer_{i}_{'x' * 60}") for i in range(100)]
        return enable_dcft(
            keras.Sequential([keras.Input((8,)), *layers]), kernel_size={"_99_": size, ".*": 4}
        )

    save_dcft_weights(deep(4), tmp_path / "a.dcft.safetensors")
    with pytest.raises(
        ValueError, match=r"kernel_size of 'layer_99_x*'=4; the model has"
    ) as caught:
        load_dcft_weights(deep(2), tmp_path / "a.dcft.safetensors")
    assert len(str(caught.value)) < 1500
    with pytest.raises(ValueError, match="load it into a model of the architecture") as caught:
        load_dcft_weights(sequential(), tmp_path / "a.dcft.safetensors")
    assert len(str(caught.value)) < 1500
