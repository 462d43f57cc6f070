"""One training step in every way that Keras can run it, and in every precision."""

import contextlib

import keras
import numpy as np
import pytest
from tools import (
    array,
    backbone_inputs,
    bert_backbone,
    differences,
    predict,
    randomize_adapters,
    sequential,
    values,
    vectors,
)

from keras_dcft import enable_dcft, load_dcft_weights, merge_dcft, remove_dcft, save_dcft_weights
from keras_dcft.paths import dcft_layers

pytestmark = pytest.mark.compiled

TARGETS = np.ones((4, 9), "float32")


def assert_trains(model, inputs=None, targets=TARGETS):
    """Fits and asserts that all adapters and nothing else changed, and that losses are finite."""
    inputs = vectors() if inputs is None else inputs
    adapters = [v for v in model.trainable_variables if v.name.startswith("dcft_")]
    ids = {id(v) for v in adapters}
    frozen = [v for v in model.weights if id(v) not in ids and "seed" not in v.path]
    assert len(adapters) == 3 * len(dcft_layers(model))
    before, before_frozen = values(adapters), values(frozen)
    assert {v.dtype for v in adapters} == {"float32"}
    settings = {"batch_size": 2, "epochs": 4, "shuffle": False, "verbose": 0}
    losses = model.fit(inputs, targets, **settings).history["loss"]
    assert np.all(np.isfinite(losses))
    assert all(d > 0 for d in differences(before, values(adapters)))
    assert all(d == 0 for d in differences(before_frozen, values(frozen)))


WAYS = [
    {"jit_compile": True},
    {"jit_compile": False},
    {"jit_compile": "auto"},
    {"run_eagerly": True},
]
if keras.backend.backend() != "torch":  # Keras allows one step only there
    WAYS.append({"steps_per_execution": 2})


@pytest.mark.parametrize("arguments", WAYS, ids=str)
def test_ways_of_running(arguments):
    model = enable_dcft(sequential(), kernel_size=4, dropout=0.1)
    model.compile(keras.optimizers.Adam(0.01), "mse", **arguments)
    assert_trains(model)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="about torch.compile")
def test_a_compiled_function_sees_what_is_trainable():
    import torch

    model = enable_dcft(sequential(), kernel_size=4)
    model.layers[0].bias.trainable = True

    def trained(x):
        return x + 1, [v.path for v in model.trainable_variables]

    _, expected = trained(torch.ones(1))
    _, seen = torch.compile(trained, backend="eager")(torch.ones(1))
    assert seen == expected
    assert 6 < len(seen) < len(model.variables)


@pytest.mark.parametrize(
    "arguments", [{"gradient_accumulation_steps": 2}, {"use_ema": True}, {"clipnorm": 1.0}], ids=str
)
def test_optimizer_settings(arguments):
    model = enable_dcft(sequential(), kernel_size=4)
    model.compile(keras.optimizers.Adam(0.01, **arguments), "mse")
    assert_trains(model)


def test_gradients_accumulate_to_those_of_the_whole_batch():
    after = []
    for steps, batch_size in ((None, 4), (2, 2)):
        keras.utils.set_random_seed(1)
        model = enable_dcft(sequential(), kernel_size=4)
        randomize_adapters(model)
        optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=steps)
        model.compile(optimizer, "mse")
        model.fit(vectors(), TARGETS, batch_size=batch_size, shuffle=False, verbose=0)
        after.append(values(model.trainable_variables))
    for one, other in zip(*after):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "scope",
    [
        {"mode": "full"},
        {"mode": "activations"},
        {"mode": "larger_than", "output_size_threshold": 8},
        {"mode": "list_of_layers", "layer_names": ["dense"]},
    ],
    ids=lambda scope: scope["mode"],
)
def test_rematerialization(scope):
    # Of the layers, not of the model: Keras fails there on plain models as well on JAX, and so it
    # does on plain layers in TensorFlow's graphs.
    eagerly = keras.backend.backend() == "tensorflow"
    trained = []
    for context in (contextlib.nullcontext(), keras.RematScope(**scope)):
        keras.utils.clear_session()
        keras.utils.set_random_seed(1)
        with context:
            layers = [keras.layers.Dense(20, activation="relu"), keras.layers.Dense(9)]
        model = enable_dcft(keras.Sequential([keras.Input((12,)), *layers]), kernel_size=4)
        randomize_adapters(model)
        model.compile(keras.optimizers.SGD(0.01), "mse", run_eagerly=eagerly)
        assert_trains(model)
        trained.append(values(model.trainable_variables))
    for one, other in zip(*trained):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def precise(policy):
    keras.config.set_dtype_policy(policy)
    try:
        layers = [keras.layers.Dense(20, activation="relu"), keras.layers.Dense(9)]
        return keras.Sequential([keras.Input((12,)), *layers])
    finally:
        keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16", "bfloat16"])
def test_precisions(policy, tmp_path):
    model = precise(policy)
    model.compile("adam", "mse")
    base = predict(model, vectors()).astype("float32")
    enable_dcft(model, kernel_size=4)
    np.testing.assert_array_equal(predict(model, vectors()).astype("float32"), base)
    model.compile(keras.optimizers.Adam(0.01), "mse")
    assert ("LossScale" in type(model.optimizer).__name__) == (policy == "mixed_float16")
    layer = model.layers[0]
    weights = "bfloat16" if policy == "bfloat16" else "float32"
    assert (layer._kernel.dtype, layer.dcft_filter.dtype) == (weights, "float32")
    outputs = layer(vectors())
    assert keras.backend.standardize_dtype(outputs.dtype) == layer.compute_dtype
    assert layer.compute_dtype == policy.removeprefix("mixed_")
    assert_trains(model)

    adapters = values(model.trainable_variables)
    kernels = [array(keras.ops.cast(x._kernel, "float32")) for x in model.layers]
    expected = predict(model, vectors()).astype("float32")
    model.save(tmp_path / "m.keras")
    restored = keras.saving.load_model(tmp_path / "m.keras")
    assert differences(adapters, values(restored.trainable_variables)) == [0] * 6
    for layer, kernel in zip(restored.layers, kernels):
        np.testing.assert_array_equal(array(keras.ops.cast(layer._kernel, "float32")), kernel)
    np.testing.assert_array_equal(predict(restored, vectors()).astype("float32"), expected)
    path = tmp_path / "a.dcft.safetensors"
    save_dcft_weights(model, path)
    remove_dcft(restored)
    np.testing.assert_array_equal(predict(restored, vectors()).astype("float32"), base)
    load_dcft_weights(restored, path)
    np.testing.assert_array_equal(predict(restored, vectors()).astype("float32"), expected)
    merge_dcft(model)
    tolerance = 1e-5 if policy == "float32" else 3e-2
    difference = np.abs(predict(model, vectors()).astype("float32") - expected).max()
    assert difference <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize(("dtype", "bits"), [("float32", 24), ("float16", 11), ("bfloat16", 8)])
def test_merging_rounds_to_the_kernels_bits_and_no_further(dtype, bits):
    model = enable_dcft(precise(dtype), kernel_size=4)
    randomize_adapters(model)
    bases = [array(keras.ops.cast(layer._kernel, "float32")) for layer in model.layers]
    increments = [array(layer.dcft_increment()) for layer in model.layers]
    merge_dcft(model)
    for layer, base, increment in zip(model.layers, bases, increments):
        assert layer.kernel.dtype == dtype
        merged = array(keras.ops.cast(layer.kernel, "float32")).astype("float64")
        exact = base.astype("float64") + increment
        # The sum is rounded to float32 first; below 2**-14, float16 has steps of 2**-24.
        rounding = (2.0**-bits + 2.0**-24) * np.abs(exact) + 2.0**-25 * (dtype == "float16")
        assert np.all(np.abs(merged - exact) <= rounding)


def test_policies_by_layer(tmp_path):
    policies = keras.dtype_policies.DTypePolicyMap(default_policy="float32")
    plain = bert_backbone()
    config = plain.get_config()
    path = plain.transformer_layers[0]._self_attention_layer.query_dense.path
    policies[path.replace(plain.name, "low")] = keras.dtype_policies.DTypePolicy("mixed_bfloat16")
    model = type(plain).from_config({**config, "dtype": policies, "name": "low"})
    enable_dcft(model, kernel_size=4)
    randomize_adapters(model)
    low = [layer for layer in dcft_layers(model).values() if layer.compute_dtype == "bfloat16"]
    assert len(low) == 1
    model.compile(keras.optimizers.Adam(0.01), "mse")
    outputs = {name: np.ones(x.shape) for name, x in model(backbone_inputs()).items()}
    assert_trains(model, backbone_inputs(), outputs)
    expected = predict(model, backbone_inputs())
    model.save(tmp_path / "m.keras")
    restored = keras.saving.load_model(tmp_path / "m.keras")
    assert [x.compute_dtype for x in dcft_layers(restored).values()] == [
        x.compute_dtype for x in dcft_layers(model).values()
    ]
    np.testing.assert_array_equal(predict(restored, backbone_inputs()), expected)
