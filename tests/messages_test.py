"""No message grows with the model or with what was given."""

import functools

import keras
import pytest
from tools import sequential, vectors

from keras_dcft import (
    DCFTCheckpoint,
    dcft_parameter_table,
    enable_dcft,
    kernel_size_for_budget,
)

MOST = 1500
LAYERS = 200
LONG = "long " * 2000


def dense(number, cls=keras.layers.Dense, **options):
    return cls(8, name=f"transformer_layer_{number}_feedforward_output_dense", **options)


def many(make=dense):
    return keras.Sequential([keras.Input((8,)), *map(make, range(LAYERS))])


# What is refused leaves a model as it was, so that one will do for all who look at it.
plain = functools.cache(many)


@functools.cache
def numbered():
    keras.layers.Dense(8)
    return many(lambda number: keras.layers.Dense(8))


class Unused(keras.layers.Layer):
    def __init__(self):
        super().__init__(name="unused")
        self.below = [dense(number) for number in range(LAYERS)]

    def build(self, shape):
        pass

    def call(self, inputs):
        return inputs


def unbuilt():
    return keras.Sequential([keras.Input((8,)), Unused()])


def adapted():
    return enable_dcft(many(), kernel_size=2)


def quantized():
    model = many()
    for layer in model.layers:
        layer.quantize("int8")
    return model


def with_lora():
    model = many()
    for layer in model.layers:
        layer.enable_lora(1)
    return model


class Constraint(keras.constraints.Constraint):
    def __repr__(self):
        return LONG


class Twice(keras.layers.Dense):
    def call(self, inputs, training=None):
        return 2 * super().call(inputs)


class Experts(keras.layers.Layer):
    def build(self, shape):
        self.experts = self.add_weight(name="experts", shape=(3, 8, 8))

    def call(self, inputs):
        return inputs


def with_constraint():
    return many(lambda number: dense(number, kernel_constraint=Constraint()))


def with_subclass():
    return many(lambda number: dense(number, Twice))


def with_experts():
    return keras.Sequential([keras.Input((8,)), dense(0), Experts(name="e" * 2000)])


def with_spectral_normalization():
    return many(lambda number: keras.layers.SpectralNormalization(dense(number)))


def with_shared_axis():
    layers = [
        keras.layers.EinsumDense("bnd,ndh->bnh", (4, 8), name=f"per_head_of_{number}")
        for number in range(LAYERS)
    ]
    return keras.Sequential([keras.Input((4, 8)), *layers])


@functools.cache
def sharing():
    """All layers share the first one's kernel."""
    model = many()
    first, *others = model.layers
    for layer in others:
        layer._tracker.unlock()
        layer._untrack_variable(layer._kernel)
        layer._kernel = first._kernel
        layer._trainable_variables.append(first._kernel)
        layer._tracker.lock()
    return model


SELECTIONS = [
    "nothing",
    "(" + "x" * 3000,
    "(?P<" + "-" * 3000 + ">x)",
    [3] * 1000,
    LONG,
    lambda layer: False,
]


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        *(
            (plain, {argument: selection})
            for argument in ("target_layers", "exclude_layers", "trainable_layers")
            for selection in SELECTIONS
        ),
        (plain, {"target_layers": []}),
        (plain, {"exclude_layers": ["output"] * 1000}),
        (plain, {"kernel_size": 100}),
        (plain, {"kernel_size": {f"layer_{number}_": 100 for number in range(LAYERS)}}),
        (plain, {"kernel_size": LONG}),
        (plain, {"kernel_size": [8] * 1000}),
        (plain, {"kernel_size": {"output": LONG}}),
        (plain, {"kernel_size": {LONG: 2}}),
        (plain, {"kernel_size": {LONG: "2"}}),
        (plain, {"kernel_size": {}}),
        (plain, {"kernel_size": {"layer_1_": 4}}),
        (plain, {"kernel_size": {f"layer_{number}_": 4 for number in range(LAYERS - 1)}}),
        (plain, {"kernel_size": {f"layer_{n}_": 4 for n in range(LAYERS)} | {".*": 2}}),
        (plain, {"kernel_size": {".*": 2, "layer": 4}}),
        (numbered, {"target_layers": r"_\d*1\d*$"}),
        (numbered, {"kernel_size": {r"_\d*1\d*$": 2, ".*": 4}}),
        (unbuilt, {}),
        (unbuilt, {"target_layers": "dense"}),
        (adapted, {}),
        (quantized, {"trainable_layers": "dense"}),
        (with_lora, {}),
        (with_constraint, {}),
        (with_subclass, {}),
        (with_experts, {"target_layers": ["e", "dense"]}),
        (with_spectral_normalization, {}),
        (with_shared_axis, {}),
        (sharing, {"exclude_layers": "layer_7_"}),
        (sharing, {"kernel_size": {"layer_7_": 2, ".*": 4}}),
        (lambda: [LONG], {}),
        (lambda: keras.Sequential([dense(n) for n in range(LAYERS)]), {}),
    ],
)
def test_enabling(make, arguments):
    with pytest.raises((TypeError, ValueError)) as raised:
        enable_dcft(make(), **{"kernel_size": 4, **arguments})
    assert 40 < len(str(raised.value)) <= MOST


@pytest.mark.parametrize(
    ("count", "arguments"),
    [
        (kernel_size_for_budget, {"parameters": 1}),
        (kernel_size_for_budget, {"parameters": 10**5, "target_layers": "nothing"}),
        (dcft_parameter_table, {"kernel_sizes": ([8] * 1000,)}),
        (dcft_parameter_table, {"kernel_sizes": (LONG,)}),
        (dcft_parameter_table, {"kernel_sizes": ({LONG: 2},)}),
        (dcft_parameter_table, {"exclude_layers": "nothing"}),
    ],
)
def test_counting(count, arguments):
    with pytest.raises((TypeError, ValueError)) as raised:
        count(plain(), **arguments)
    assert 40 < len(str(raised.value)) <= MOST


@pytest.mark.parametrize(
    "arguments",
    [
        {"filepath": LONG},
        {"mode": LONG},
        {"save_freq": LONG},
        {"monitor": LONG},
        {"filepath": "{" + "x" * 3000 + "}.dcft.safetensors"},
        {"filepath": "x" * 3000 + "{x}.dcft.safetensors"},
    ],
)
def test_checkpoints(arguments):
    class Logged(DCFTCheckpoint):
        def on_epoch_end(self, epoch, logs=None):
            super().on_epoch_end(epoch, {f"logged_value_{number}": 0 for number in range(500)})

    model = enable_dcft(sequential(), kernel_size=4)

    def train():
        callback = Logged(**{"filepath": "a.dcft.safetensors", **arguments})
        model.fit(vectors(), vectors(width=9), verbose=0, callbacks=[callback])

    with pytest.raises((TypeError, ValueError, KeyError)) as raised:
        train()
    assert 40 < len(str(raised.value)) <= MOST


def test_a_list_of_what_was_logged(tmp_path):
    model = enable_dcft(sequential(), kernel_size=4)
    callback = DCFTCheckpoint(tmp_path / "a.dcft.safetensors", save_best_only=True)
    callback.set_model(model)
    with pytest.warns(UserWarning, match="Logged were") as warned:
        callback.on_epoch_end(0, {f"logged_value_{number}": 0 for number in range(500)})
    assert len(str(warned[0].message)) <= MOST
