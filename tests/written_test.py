"""What stands in a file under the base's names is the base, however this Keras writes it."""

import keras
import numpy as np
import pytest
from tools import array, values

from keras_dcft import enable_dcft
from keras_dcft.adapter import ADAPTER_VARIABLES
from keras_dcft.keras_internals import own_weights

LAYERS = {
    "dense": lambda: keras.layers.Dense(6, activation="relu"),
    "einsum_dense": lambda: keras.layers.EinsumDense("bi,ijk->bjk", (3, 4), bias_axes="jk"),
    "embedding": lambda: keras.layers.Embedding(9, 8),
    "tied": lambda: keras.layers.ReversibleEmbedding(9, 8),
    "untied": lambda: keras.layers.ReversibleEmbedding(9, 8, tie_weights=False),
}
MODES = ["", "int8", "int4", "float8", "ternary", "int8 afterwards", "int4 afterwards"]


def is_in_this_keras(kind, mode) -> bool:
    return (mode.split() or [None])[0] in LAYERS[kind]().variable_serialization_spec


def base_model(kind):
    keras.utils.set_random_seed(3)
    is_dense = "dense" in kind
    inputs = keras.Input((8,), dtype="float32" if is_dense else "int32")
    return keras.Sequential([inputs, LAYERS[kind]()])


CASES = [(kind, mode) for kind in LAYERS for mode in MODES if is_in_this_keras(kind, mode)]


@pytest.fixture(params=CASES, ids=str)
def plain_and_adapted(request):
    """The same layer twice, quantized in the same way, one of them with an adapter with values."""
    kind, mode = request.param
    name, _, afterwards = mode.partition(" ")
    layers = []
    for is_adapted in (False, True):
        model = base_model(kind)
        if name and not afterwards:
            model.quantize(name)
        if is_adapted:
            enable_dcft(model, kernel_size=4, target_layers=".*")
        if afterwards:
            model.quantize(name)
        layers.append(model.layers[0])
        assert layers[-1].quantization_mode == (name or None)
    for variable in layers[1].trainable_variables:
        if variable.name.startswith("dcft_"):
            variable.assign(np.random.default_rng(1).normal(size=variable.shape))
    return layers


def stored(layer):
    store = {}
    layer.save_own_variables(store)
    return store


def test_an_adapted_layer_writes_what_its_base_layer_would_and_the_adapter(plain_and_adapted):
    plain, adapted = plain_and_adapted
    expected, found = stored(plain), stored(adapted)
    adapter = {name: found.pop(name) for name in ADAPTER_VARIABLES}
    assert list(found) == list(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(array(found[name]), array(value))
    for name, value in adapter.items():
        assert value is getattr(adapted, name)


def test_what_is_written_is_no_copy(plain_and_adapted):
    _, adapted = plain_and_adapted
    own = {id(variable) for variable in own_weights(adapted)}
    found = {id(value) for value in stored(adapted).values()}
    assert found == own
    assert id(adapted.dcft_frozen_weight()) in found


def test_what_is_written_is_read_by_the_base_layer_and_by_an_adapted_one(plain_and_adapted):
    plain, adapted = plain_and_adapted
    whole = {name: array(value) for name, value in stored(adapted).items()}
    for variable in own_weights(adapted):
        variable.assign(np.zeros(variable.shape))
    adapted.load_own_variables(whole)
    for name, value in stored(adapted).items():
        np.testing.assert_array_equal(array(value), whole[name])
    base = {name: value for name, value in whole.items() if name not in ADAPTER_VARIABLES}
    plain.load_own_variables(base)
    assert list(stored(plain)) == list(base)


def test_the_config_is_that_of_the_base_layer_and_the_settings(plain_and_adapted):
    plain, adapted = plain_and_adapted
    expected, found = plain.get_config(), adapted.get_config()
    settings = {"kernel_size", "rank", "alpha", "dropout", "orthogonality"}
    settings |= {"factor_initializer", "filter_initializer"}
    assert set(found) - set(expected) <= settings
    without = ("name", "trainable")
    for key in set(expected) - set(without):
        assert found[key] == expected[key], key


def test_a_keras_that_would_write_something_else_is_refused(monkeypatch):
    def writes_the_effective_kernel(self, store):
        store["0"] = self._kernel + 1.0
        store["1"] = self.bias

    writes_the_effective_kernel.__module__ = keras.layers.Dense.save_own_variables.__module__
    layer = enable_dcft(base_model("dense"), kernel_size=4).layers[0]
    monkeypatch.setattr(keras.layers.Dense, "save_own_variables", writes_the_effective_kernel)
    store = {}
    with pytest.raises(RuntimeError, match=r"does not write the frozen weight of a Dense"):
        layer.save_own_variables(store)
    assert store == {}


class KeepsACount(keras.layers.Dense):
    """A user's layer that writes its weights in a way of its own, and a number beside them."""

    count = 0

    def save_own_variables(self, store):
        keras.layers.Layer.save_own_variables(self, store)
        store["kernel_again"] = array(self.kernel)
        store["count"] = np.array(self.count)

    def load_own_variables(self, store):
        self.count = int(store.pop("count"))
        del store["kernel_again"]
        keras.layers.Layer.load_own_variables(self, store)


def test_a_class_with_its_own_way_of_writing_sees_its_base_layer():
    layers = []
    for count in (0, 7):
        keras.utils.set_random_seed(count)
        model = keras.Sequential([keras.Input((8,)), KeepsACount(6)])
        layers.append(enable_dcft(model, kernel_size=4).layers[0])
        layers[-1].count = count
        layers[-1].dcft_filter.assign(np.ones((4, 4)))
    first, second = layers
    store = {name: array(value) for name, value in stored(second).items()}
    assert set(store) == {"0", "1", "kernel_again", "count", *ADAPTER_VARIABLES}
    np.testing.assert_array_equal(store["0"], array(second._kernel))
    np.testing.assert_array_equal(store["kernel_again"], array(second._kernel))
    first.load_own_variables(store)
    assert first.count == 7
    for one, other in zip(values(first.weights), values(second.weights)):
        np.testing.assert_array_equal(one, other)


def test_a_part_of_an_adapter_is_refused_before_anything_changes():
    layer = enable_dcft(base_model("dense"), kernel_size=4).layers[0]
    before = values(layer.weights)
    store = {name: np.ones(value.shape) for name, value in stored(layer).items()}
    del store["dcft_filter"]
    with pytest.raises(ValueError, match=r"the file has only \['dcft_a', 'dcft_b'\]"):
        layer.load_own_variables(store)
    for one, other in zip(before, values(layer.weights)):
        np.testing.assert_array_equal(one, other)
