import json

import keras
import numpy as np
import pytest
from tools import array, bert_backbone, bert_classifier, sequential

from keras_dcft import DCFTDense, dcft_parameter_table, enable_dcft
from keras_dcft.increments import parameter_count
from keras_dcft.paths import walk
from keras_dcft.planning import plan_adaptation
from keras_dcft.settings import AdapterSettings

SETTINGS = {"rank": 1, "alpha": 4.0, "dropout": 0.0, "orthogonality": 0.0}


def plan(model, kernel_size=4, **arguments):
    settings = {name: arguments.pop(name, value) for name, value in SETTINGS.items()}
    return plan_adaptation(model, kernel_size, AdapterSettings(**settings), **arguments)


def test_walk_gives_readable_paths_parents_first():
    paths = list(walk(bert_backbone()))
    query = "transformer_layer_0/self_attention_layer/query"
    assert query in paths
    assert paths.index("transformer_layer_0") < paths.index(query)
    assert "pooled_dense" in paths


def test_paths_do_not_depend_on_what_was_made_before():
    first = list(walk(sequential()))
    assert first == list(walk(sequential()))
    assert "dense" in first
    assert "dense_1" in first


def test_paths_do_not_depend_on_the_models_name():
    def paths(name):
        layers = [keras.layers.Dense(8, name="net_first"), keras.layers.Dense(8)]
        return list(walk(keras.Sequential([keras.Input((8,)), *layers], name=name)))[1:]

    assert paths("net") == paths("other") == ["net_first", "dense"]


def test_a_layer_used_twice_is_met_once():
    shared = keras.layers.Dense(8, name="shared")
    inputs = keras.Input((8,))
    inner = keras.Sequential([shared], name="inner")
    model = keras.Model(inputs, inner(shared(shared(inputs))))
    assert [layer for layer in walk(model).values()].count(shared) == 1
    assert list(plan(model)["layers"]) == ["shared"]


def test_siblings_of_one_name_get_different_paths():
    class Twins(keras.layers.Layer):
        def __init__(self):
            super().__init__(name="twins")
            self.left = keras.layers.Dense(8, name="dense_layer")
            self.right = keras.layers.Dense(8, name="dense_layer")

        def build(self, shape):
            self.left.build(shape)
            self.right.build(shape)

        def call(self, inputs):
            return self.left(inputs) + self.right(inputs)

    model = keras.Sequential([keras.Input((8,)), Twins()])
    assert list(plan(model)["layers"]) == ["twins/dense_layer", "twins/dense_layer_1"]


def test_numbered_names_do_not_collide_with_chosen_ones():
    class Three(keras.layers.Layer):
        def __init__(self):
            super().__init__(name="three")
            self.parts = [keras.layers.Dense(8, name=name) for name in ("x", "x", "x_1")]

        def build(self, shape):
            for part in self.parts:
                part.build(shape)

        def call(self, inputs):
            return sum(part(inputs) for part in self.parts)

    model = keras.Sequential([keras.Input((8,)), Three()])
    assert len(plan(model)["layers"]) == 3


def test_the_plan_is_plain_data_and_changes_nothing():
    model = bert_backbone()
    before = [(type(layer), layer.trainable) for layer in walk(model).values()]
    config = plan(model, rank=2, trainable_layers="layer_norm")
    assert [(type(layer), layer.trainable) for layer in walk(model).values()] == before
    assert config["rank"] == 2
    assert len(config["layers"]) == 13
    assert set(config["layers"].values()) == {4}
    assert all("layer_norm" in path for path in config["trainable_layers"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"target_layers": "query"}, 2),
        ({"target_layers": ["query$", "value$"]}, 4),
        ({"target_layers": lambda layer: isinstance(layer, keras.layers.EinsumDense)}, 8),
        ({"exclude_layers": "pooled"}, 12),
        ({"target_layers": "layer_1/", "exclude_layers": ["feedforward"]}, 4),
        ({"trainable_layers": "transformer_layer_0$"}, 7),
    ],
)
def test_patterns_and_predicates_choose_layers(arguments, expected):
    assert len(plan(bert_backbone(), **arguments)["layers"]) == expected


def test_everything_below_a_trained_layer_is_trained():
    config = plan(bert_backbone(), trainable_layers="transformer_layer_0$")
    assert "transformer_layer_0/self_attention_layer/query" in config["trainable_layers"]


def test_auto_takes_the_size_with_the_fewest_numbers_for_each_layer():
    model = keras.Sequential([keras.Input((200,)), keras.layers.Dense(100), keras.layers.Dense(3)])
    for rank in (1, 2):
        layers = plan(model, kernel_size="auto", rank=rank)["layers"]
        for layer, (path, chosen) in zip(model.layers, layers.items()):
            rows, columns = layer.kernel.shape
            counts = {
                d: parameter_count(rows, columns, d, rank) for d in range(1, min(rows, columns) + 1)
            }
            assert counts[chosen] == min(counts.values()), path
    assert plan(model, kernel_size={"dense_1": "auto", "": 5})["layers"]["dense"] == 5
    [(name, count)] = dcft_parameter_table(model, ["auto"]).dcft_parameters
    assert name == "auto"
    assert count == sum(
        int(np.prod(v.shape)) for v in enable_dcft(model, "auto").trainable_variables
    )
    with pytest.raises(TypeError, match='an int, "auto", or'):
        plan(model, kernel_size="most")


def test_kernel_size_by_pattern_first_match_counts():
    sizes = {"query|key": 2, "layer_0": 3, ".*": 4}
    layers = plan(bert_backbone(), kernel_size=sizes)["layers"]
    assert layers["transformer_layer_0/self_attention_layer/query"] == 2
    assert layers["transformer_layer_0/self_attention_layer/value"] == 3
    assert layers["transformer_layer_1/self_attention_layer/value"] == 4


def unbuilt():
    return keras.Sequential([keras.layers.Dense(8)])


def without_dense():
    return keras.Sequential([keras.Input((8,)), keras.layers.LayerNormalization()])


def with_lora():
    model = sequential()
    model.layers[0].enable_lora(1)
    return model


def with_constraint():
    return keras.Sequential([keras.Input((8,)), keras.layers.Dense(8, kernel_constraint="non_neg")])


def with_subclass():
    class Scaled(keras.layers.Dense):
        def call(self, inputs):
            return 2 * super().call(inputs)

    return keras.Sequential([keras.Input((8,)), Scaled(8, name="scaled")])


def with_shared_axis():
    layer = keras.layers.EinsumDense("bnd,ndh->bnh", (4, 8), name="per_head")
    return keras.Sequential([keras.Input((4, 8)), layer])


def with_dcft_layer():
    return keras.Sequential([keras.Input((8,)), DCFTDense(8)])


def with_spectral_normalization():
    wrapper = keras.layers.SpectralNormalization(keras.layers.Dense(8, name="inside"))
    return keras.Sequential([keras.Input((8,)), wrapper])


@pytest.mark.parametrize(
    ("make", "arguments", "error", "message"),
    [
        (unbuilt, {}, ValueError, "must be built"),
        (without_dense, {}, ValueError, "at least one built Dense or EinsumDense"),
        (with_lora, {}, ValueError, "Layer 'dense' has Keras LoRA enabled"),
        (with_constraint, {}, ValueError, "Layer 'dense' has a kernel constraint"),
        (
            with_subclass,
            {},
            ValueError,
            "'scaled' is of type Scaled, .* with its own `call`",
        ),
        (with_spectral_normalization, {}, ValueError, "inside' is inside SpectralNormalization"),
        (with_shared_axis, {}, ValueError, r"'per_head' cannot be adapted: .*shared axes \['n'\]"),
        (with_dcft_layer, {}, ValueError, "already has the adapters 'default'"),
        (sequential, {"kernel_size": 0}, ValueError, "Received: kernel_size=0"),
        (sequential, {"kernel_size": -3}, ValueError, "Received: kernel_size=-3"),
        (sequential, {"kernel_size": True}, TypeError, "Received: kernel_size=True"),
        (sequential, {"kernel_size": 8.0}, TypeError, "Received: kernel_size=8.0"),
        (sequential, {"kernel_size": "8"}, TypeError, "Received: kernel_size='8'"),
        (
            sequential,
            {"kernel_size": [8]},
            TypeError,
            'an int, "auto", or a dict of regular expressions',
        ),
        (sequential, {"kernel_size": {4: 8}}, TypeError, "Received: kernel_size=8 at 4"),
        (sequential, {"kernel_size": {}}, ValueError, "Received: kernel_size={}"),
        (sequential, {"kernel_size": {"dense": 2.5}}, TypeError, "Received: kernel_size=2.5"),
        (sequential, {"kernel_size": {"nothing": 2}}, ValueError, "matched 'dense', 'dense_1'"),
        (sequential, {"kernel_size": {"dense_1": 2}}, ValueError, "leaves out 'dense'"),
        (
            sequential,
            {"kernel_size": {"dense": 2, "e_1": 4}},
            ValueError,
            "pattern 'e_1' before 'dense', or not at all",
        ),
        (
            sequential,
            {"kernel_size": {"dense$": 2, "e_1": 4, ".*": 2}},
            ValueError,
            r"pattern '\.\*' before 'dense\$', 'e_1', or",
        ),
        (sequential, {"rank": True}, TypeError, "Received: rank=True"),
        (sequential, {"rank": 0}, ValueError, "Received: rank=0"),
        (sequential, {"alpha": "4"}, TypeError, "Received: alpha='4'"),
        (sequential, {"dropout": -0.1}, ValueError, "Received: dropout=-0.1"),
        (sequential, {"orthogonality": float("inf")}, ValueError, "Received: orthogonality=inf"),
        (sequential, {"target_layers": "query"}, ValueError, "matched 'dense', 'dense_1'"),
        (sequential, {"target_layers": ["dense", "query"]}, ValueError, "Received: 'query'"),
        (sequential, {"target_layers": "("}, ValueError, "valid regular expressions"),
        (sequential, {"target_layers": []}, ValueError, "leave it out to adapt every dense layer"),
        (without_dense, {"target_layers": "dense"}, ValueError, "matched no layer"),
        (without_dense, {"target_layers": "norm"}, ValueError, "of type LayerNormalization, which"),
        (sequential, {"target_layers": 3}, TypeError, "Received: target_layers=3"),
        (sequential, {"target_layers": [3]}, TypeError, r"Received: target_layers=\[3\]"),
        (sequential, {"target_layers": lambda layer: False}, ValueError, "selects nothing"),
        (sequential, {"exclude_layers": "query"}, ValueError, "`exclude_layers` has a pattern"),
        (sequential, {"trainable_layers": "query"}, ValueError, "`trainable_layers` has a pattern"),
        (sequential, {"exclude_layers": "dense"}, ValueError, "leave no layer to adapt"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_changes(make, arguments, error, message):
    model = make()
    before = [(type(layer), layer.trainable, len(layer.weights)) for layer in model.layers]
    kernels = [array(v) for v in model.weights]
    with pytest.raises(error, match=message):
        enable_dcft(model, **{"kernel_size": 4, **arguments})
    assert [(type(layer), layer.trainable, len(layer.weights)) for layer in model.layers] == before
    for kernel, variable in zip(kernels, model.weights):
        np.testing.assert_array_equal(kernel, array(variable))


def test_too_large_a_kernel_size_names_the_layers_and_two_ways_out():
    model = sequential()
    with pytest.raises(ValueError, match="smaller side") as raised:
        enable_dcft(model, kernel_size=10)
    message = str(raised.value)
    assert "'dense_1' (20 x 9)" in message
    assert "'dense'" not in message
    assert "exclude_layers=['^dense_1$']" in message
    assert "trainable_layers=['^dense_1$']" in message
    enable_dcft(model, kernel_size=10, trainable_layers=["^dense_1$"])
    assert list(model.dcft_config["layers"]) == ["dense"]


@pytest.mark.parametrize("model", ["a string", keras.layers.Dense, None])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(TypeError, match=r"`model` must be a keras\.Model"):
        enable_dcft(model)


def test_enabling_twice_is_refused():
    for model in (sequential(), bert_classifier()):
        enable_dcft(model, kernel_size=4)
        with pytest.raises(ValueError, match="already has the adapters 'default'"):
            enable_dcft(model, kernel_size=4)


def test_the_numbers_of_numpy_are_numbers():
    model = enable_dcft(
        sequential(),
        kernel_size={"dense_1": np.int64(2), ".*": np.int32(4)},
        rank=np.int64(2),
        alpha=np.float32(8),
        dropout=np.float64(0.5),
        orthogonality=np.float16(0.25),
    )
    config = model.dcft_config
    assert json.loads(json.dumps(config)) == config
    assert config["layers"] == {"dense": 4, "dense_1": 2}
    assert (config["rank"], config["alpha"]) == (2, 8.0)
    for value in [*config["layers"].values(), config["rank"]]:
        assert type(value) is int
    assert type(config["orthogonality"]) is float
    assert list(plan(sequential(), kernel_size=np.uint8(3))["layers"].values()) == [3, 3]


@pytest.mark.parametrize("kernel_size", [np.float32(8), np.bool_(True), np.array([8])])
def test_what_is_no_int_of_numpy_is_refused(kernel_size):
    with pytest.raises(TypeError, match="`kernel_size` must be an int"):
        enable_dcft(sequential(), kernel_size=kernel_size)
