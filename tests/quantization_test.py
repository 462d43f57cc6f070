"""Adapters on quantized bases, and quantizing what is adapted."""

import gc
import weakref

import keras
import numpy as np
import pytest
from one_backend import only_on
from tools import (
    TEXTS,
    array,
    bert_classifier,
    differences,
    predict,
    randomize_adapters,
    task_losses,
    values,
    vectors,
)

from keras_dcft import enable_dcft, load_dcft_weights, merge_dcft, remove_dcft, save_dcft_weights
from keras_dcft.paths import dcft_layers


def modes(layer, *names) -> list:
    """Those of the modes that this Keras has for a layer."""
    return [name for name in names if name in layer.variable_serialization_spec]


DENSE, EINSUM_DENSE = keras.layers.Dense(1), keras.layers.EinsumDense("a,ab->b", 1)
MODES = modes(EINSUM_DENSE, "int8", "int4", "float8", "ternary")


def dense_model(activation="relu"):
    model = keras.Sequential(
        [
            keras.Input((12,)),
            keras.layers.Dense(20, activation=activation),
            keras.layers.EinsumDense("bi,ijk->bjk", (4, 6), bias_axes="jk", activation=activation),
            keras.layers.Flatten(),
            keras.layers.Dense(9),
        ]
    )
    model.compile(keras.optimizers.Adam(0.01), "mse")
    return model


def frozen(model):
    """What must not change: a float8 layer goes on measuring its scales."""
    trained = {id(v) for v in model.trainable_variables}
    return [v for v in model.weights if id(v) not in trained and not v.overwrite_with_gradient]


@pytest.mark.compiled  # Keras's float8 does not train in TensorFlow's eager mode
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("first", ["quantized", "adapted"])
def test_a_quantized_base_is_adapted_trained_and_saved(mode, first, tmp_path):
    model = dense_model()
    if first == "quantized":
        model.quantize(mode)
        base = predict(model, vectors())
        enable_dcft(model, kernel_size=4, dropout=0.1)
    else:
        enable_dcft(model, kernel_size=4, dropout=0.1)
        model.quantize(mode)
        base = predict(model, vectors())
    layers = list(dcft_layers(model).values())
    assert [layer.quantization_mode for layer in layers] == [mode] * 3
    np.testing.assert_allclose(predict(model, vectors()), base, atol=1e-6)
    before = values(frozen(model))
    adapters = [v for v in model.trainable_variables if v.name.startswith("dcft_")]
    assert [v.dtype for v in adapters] == ["float32"] * 9
    losses = model.fit(vectors(), np.ones((4, 9)), epochs=30, verbose=0).history["loss"]
    assert losses[-1] < 0.9 * losses[0]
    assert all(d == 0 for d in differences(before, values(frozen(model))))
    expected = predict(model, vectors())

    model.save(tmp_path / "m.keras")
    restored = keras.saving.load_model(tmp_path / "m.keras")
    assert [layer.quantization_mode for layer in dcft_layers(restored).values()] == [mode] * 3
    np.testing.assert_array_equal(predict(restored, vectors()), expected)
    path = tmp_path / "a.dcft.safetensors"
    save_dcft_weights(model, path)
    remove_dcft(restored)
    assert [type(layer).__name__ for layer in restored.layers[:2]] == ["Dense", "EinsumDense"]
    load_dcft_weights(restored, path)
    np.testing.assert_allclose(predict(restored, vectors()), expected, atol=1e-6)


def test_quantizing_an_adapted_model_frees_the_floating_point_kernels():
    model = dense_model()
    enable_dcft(model, kernel_size=4)
    kernels = [weakref.ref(layer._kernel) for layer in dcft_layers(model).values()]
    model.quantize("int8")
    gc.collect()
    assert [kernel() for kernel in kernels] == [None] * 3
    remove_dcft(model)
    assert [v.name for v in model.trainable_variables] == ["bias"] * 3


@pytest.mark.parametrize("mode", modes(DENSE, "int8", "int4", "ternary"))
def test_the_increment_goes_in_before_the_activation(mode):
    model = dense_model(activation="tanh")
    model.quantize(mode)
    layer = model.layers[0]
    layer.activation = None
    linear = array(layer(vectors()))
    layer.activation = keras.activations.tanh
    enable_dcft(model, kernel_size=4)
    randomize_adapters(model)
    increment = vectors() @ array(layer.dcft_increment())
    np.testing.assert_allclose(
        array(layer(vectors())), np.tanh(linear + increment), rtol=1e-4, atol=1e-5
    )
    assert layer.activation is keras.activations.tanh


@pytest.mark.parametrize("mode", modes(DENSE, "int8", "int4", "ternary"))
def test_integers_are_not_merged_and_have_no_effective_kernel(mode):
    model = dense_model()
    model.quantize(mode)
    enable_dcft(model, kernel_size=4)
    randomize_adapters(model)
    before = predict(model, vectors())
    with pytest.raises(ValueError, match="load it into the model before it was quantized"):
        merge_dcft(model)
    np.testing.assert_array_equal(predict(model, vectors()), before)
    with pytest.raises(ValueError, match="holds a quantized weight"):
        _ = model.layers[0].kernel
    assert array(model.layers[0]._kernel).dtype in ("int8", "uint8")  # ternary kernels


def test_an_adapter_trained_on_int8_is_merged_into_the_float_model(tmp_path):
    floating = dense_model()
    quantized = keras.models.clone_model(floating)
    quantized.set_weights(floating.get_weights())
    quantized.quantize("int8")
    enable_dcft(quantized, kernel_size=4)
    randomize_adapters(quantized)
    path = tmp_path / "a.dcft.safetensors"
    save_dcft_weights(quantized, path)
    load_dcft_weights(floating, path)
    expected = predict(quantized, vectors())
    merge_dcft(floating)
    assert np.abs(predict(floating, vectors()) - expected).max() < 0.1 * np.abs(expected).max()


def calibration(mode, structure):
    config_class = getattr(keras.quantizers, f"{mode.upper()}Config", None)
    if config_class is None:
        pytest.skip(f"this Keras has no quantization mode {mode}")
    rng = np.random.default_rng(0)
    return config_class(
        dataset=[rng.integers(0, 19, (1, 6)) for _ in range(4)],
        tokenizer=lambda ids: ids,
        weight_bits=4,
        num_samples=4,
        sequence_length=6,
        group_size=8,
        quantization_layer_structure=structure,
    )


@pytest.mark.parametrize("mode", ["gptq", "awq"])
def test_calibrating_an_adapted_model_is_refused(mode):
    model = dense_model()
    enable_dcft(model, kernel_size=4)
    config = calibration(mode, None)
    for target in (model, model.layers[0]):
        with pytest.raises(ValueError, match="Quantize the model first"):
            target.quantize(mode, config=config)
    assert [layer.quantization_mode for layer in dcft_layers(model).values()] == [None] * 3


# Calibrating is Keras's, and takes long on JAX.
@pytest.mark.parametrize(
    "mode", [pytest.param("gptq", marks=only_on("torch", "tensorflow")), "awq"]
)
def test_a_calibrated_base_is_adapted(mode, tmp_path):
    inputs = keras.Input((6,), dtype="int32")
    embedding = keras.layers.Embedding(19, 16)
    block = keras.Sequential(
        [
            keras.layers.Dense(24, activation="relu"),
            keras.layers.EinsumDense("btd,dh->bth", (None, 16)),
        ],
        name="block",
    )
    model = keras.Model(inputs, block(embedding(inputs)))
    structure = {"pre_block_layers": [embedding], "sequential_blocks": [block]}
    model.quantize(mode, config=calibration(mode, structure))
    x = np.random.default_rng(1).integers(0, 19, (4, 6))
    model.compile(keras.optimizers.Adam(0.01), "mse")
    base = predict(model, x)
    enable_dcft(model, kernel_size=4)
    np.testing.assert_allclose(predict(model, x), base, atol=1e-6)
    before = values(frozen(model))
    losses = model.fit(x, np.ones_like(base), epochs=20, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert all(d == 0 for d in differences(before, values(frozen(model))))
    expected = predict(model, x)
    path = tmp_path / "a.dcft.safetensors"
    save_dcft_weights(model, path)
    remove_dcft(model)
    np.testing.assert_array_equal(predict(model, x), base)
    load_dcft_weights(model, path)
    np.testing.assert_array_equal(predict(model, x), expected)


def test_what_cannot_be_trained_is_said():
    task = bert_classifier()
    predict(task, TEXTS)  # Keras quantizes no layer that is not built: here, the tokenizer
    task.quantize("int8")
    with pytest.warns(UserWarning, match="of logits, outside of the backbone, cannot be"):
        enable_dcft(task, kernel_size=4)
    model = dense_model()
    model.quantize("int8")
    with pytest.raises(ValueError, match="must not name layers with quantized weights"):
        enable_dcft(model, kernel_size=4, trainable_layers="dense_1")


def test_a_quantized_task_with_its_embeddings(tmp_path):
    task = bert_classifier()
    task.backbone.quantize("int8")
    base = predict(task, TEXTS)
    enable_dcft(task, kernel_size=4, target_layers=["query", "token_embedding$"])
    np.testing.assert_allclose(predict(task, TEXTS), base, atol=1e-5)
    losses = task_losses(task, steps=3)
    assert np.all(np.isfinite(losses))
    expected = predict(task, TEXTS)
    kernel = next(x for x in dcft_layers(task).values() if "query" in x.name)._kernel
    assert kernel.dtype == "int8"
    task.save(tmp_path / "m.keras")
    restored = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(predict(restored, TEXTS), expected)


def test_what_is_frozen_beside_the_adapters_is_quantized_as_well(tmp_path):
    inputs = keras.Input((6,), dtype="int32")
    x = keras.layers.Embedding(20, 12)(inputs)
    outputs = keras.layers.Dense(8, name="left_out")(keras.layers.Dense(8)(x))
    model = keras.Model(inputs, outputs)
    enable_dcft(model, kernel_size=4, exclude_layers="left_out")
    model.quantize("int8")
    assert [layer.quantization_mode for layer in model.layers[1:]] == ["int8"] * 3
    model.save(tmp_path / "m.keras")
    restored = keras.saving.load_model(tmp_path / "m.keras")
    words = np.arange(12).reshape(2, 6)
    np.testing.assert_array_equal(predict(restored, words), predict(model, words))
