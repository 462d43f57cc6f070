"""What the package relies on inside Keras. A failure here says what Keras changed."""

import json
import zipfile

import keras
import numpy as np
import pytest
from keras.saving import serialize_keras_object
from tools import array, sequential, values, vectors
from workers import run_program

from keras_dcft import keras_internals


def built(layer, width=6):
    layer.build((None, width))
    return layer


def test_a_built_layer_takes_new_weights_only_while_unlocked():
    layer = built(keras.layers.Dense(4))
    with pytest.raises(ValueError, match="cannot add new elements of state"):
        layer.add_weight(name="late", shape=(1,))
    with keras_internals.unlocked(layer):
        layer.late = layer.add_weight(name="late", shape=(1,))
    assert any(v is layer.late for v in layer.trainable_variables)
    with pytest.raises(ValueError, match="cannot add new elements of state"):
        layer.add_weight(name="later", shape=(1,))


def test_sublayers_are_those_that_keras_sees():
    model = sequential()
    assert keras_internals.sublayers(model)[1:] == model.layers  # the first is the input layer
    assert keras_internals.sublayers(model.layers[0]) == []


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.layers.Dense(1),
        lambda: keras.layers.EinsumDense("a,ab->b", 2),
        keras.layers.LayerNormalization,
    ],
)
def test_automatic_names_are_kerass(make):
    first, second = make(), make()
    automatic = keras_internals.automatic_name(type(first))
    assert [first.name, second.name] == [automatic, f"{automatic}_1"]


def test_frozen_variables_resist_every_toggle_and_keep_their_order():
    layer = built(keras.layers.BatchNormalization())
    names = [v.name for v in layer.weights]
    variables = keras_internals.own_trainable_variables(layer)
    keras_internals.freeze_variables(layer)
    layer.trainable = False
    layer.trainable = True
    assert layer.trainable_variables == []
    assert [v.name for v in layer.weights] == names
    keras_internals.thaw_variables(layer, variables, [True, False])
    assert [v.name for v in layer.weights] == names
    assert [v.name for v in layer.trainable_variables] == ["gamma"]
    layer.trainable = False  # TensorFlow's layers ignore an assignment that changes nothing
    layer.trainable = True
    assert [v.name for v in layer.trainable_variables] == ["gamma", "beta"]


def test_frozen_variables_are_saved_and_loaded_as_before():
    layer, store = built(keras.layers.BatchNormalization()), {}
    for number, variable in enumerate(layer.weights):
        variable.assign(np.full(6, number))
    keras_internals.freeze_variables(layer)
    layer.save_own_variables(store)
    assert [array(store[str(i)])[0] for i in range(4)] == [0, 1, 2, 3]
    other = built(keras.layers.BatchNormalization())
    other.load_own_variables(store)
    assert [array(v)[0] for v in other.weights] == [0, 1, 2, 3]


def test_removed_variables_are_gone():
    layer = built(keras.layers.Dense(4))
    bias = layer.bias
    keras_internals.untrack_variable(layer, bias)
    assert [v.name for v in layer.weights] == ["kernel"]
    if keras.backend.backend() == "torch":
        assert bias.path not in layer.torch_params


def test_removed_seed_generators_are_gone():
    layer = keras.layers.Dropout(0.5)
    assert len(layer.variables) == 1
    keras_internals.untrack_seed(layer, layer.seed_generator)
    assert layer.variables == []


def test_the_flag_of_one_layer_leaves_those_below():
    model = sequential()
    keras_internals.set_trainable_flag(model, False)
    assert not model.trainable
    assert model.layers[0].trainable


def test_every_model_holding_a_layer_is_found():
    layer = keras.layers.Dense(4)
    inner = keras.Sequential([keras.Input((6,)), layer])
    outer = keras.Sequential([keras.Input((6,)), inner])
    other = sequential()
    found = {id(model) for model in keras_internals.models_holding([layer])}
    assert {id(inner), id(outer)} <= found
    assert id(other) not in found


def test_resetting_forgets_functions_and_slots_but_not_settings():
    model = sequential()
    model.compile(keras.optimizers.SGD(0.25, momentum=0.5), "mse", metrics=["mae"])
    model.fit(vectors(), np.ones((4, 9)), verbose=0)
    model.predict(vectors(), verbose=0)
    keras_internals.reset_compiled_state(model)
    assert model.train_function is None
    assert model.predict_function is None
    assert not model.optimizer.built
    state = "_compiled_trainable_state"  # not tracked, and so not exported
    assert type(getattr(model, state, None)) is type(getattr(sequential(), state, None))
    assert model.optimizer.get_config()["momentum"] == 0.5
    assert model.get_compile_config()["optimizer"]["config"]["learning_rate"] == 0.25
    before = values(model.trainable_variables)
    history = model.fit(vectors(), np.ones((4, 9)), verbose=0).history
    assert set(history) == {"loss", "mae"}
    assert np.abs(before[0] - array(model.trainable_variables[0])).max() > 0


def test_a_view_has_the_state_but_for_what_is_left_out():
    layer = built(keras.layers.BatchNormalization())
    trainable, frozen = layer.trainable_variables, layer.non_trainable_variables
    view = keras_internals.view_as(
        layer, keras.layers.BatchNormalization, without=[layer.beta, frozen[0]]
    )
    assert type(view) is keras.layers.BatchNormalization
    assert [v.name for v in view.weights] == ["gamma", "moving_variance"]
    assert view.gamma is layer.gamma
    view.epsilon, view.mark = 0.5, "set on the view"
    assert layer.epsilon == 0.001
    assert not hasattr(layer, "mark")
    keras_internals.keep_state(layer, view)
    assert (layer.epsilon, layer.mark) == (0.5, "set on the view")
    assert layer.trainable_variables == trainable
    assert layer.non_trainable_variables == frozen


def test_a_wrapped_quantize_is_put_back():
    layer = built(keras.layers.Dense(4))
    before = vars(layer).get("quantize")
    seen = []
    keras_internals.wrap_quantize(layer, lambda *told: seen.append(told), type_check=False)
    layer.quantize("int8")
    assert seen == [(layer, "int8")]
    keras_internals.unwrap_quantize(layer)
    assert vars(layer).get("quantize") is before


def test_a_mask_that_is_set_reaches_the_next_layer():
    seen = []

    class Sees(keras.layers.Layer):
        def call(self, inputs, mask=None):
            seen.append(mask)
            return inputs

    inputs, mask = keras.Input((3,)), keras.Input((3,), dtype="bool")
    keras_internals.set_mask(inputs, None)
    Sees()(inputs)
    keras_internals.set_mask(inputs, mask)
    Sees()(inputs)
    assert seen[0] is None
    assert seen[-1] is not None


def test_own_weights_are_those_of_the_layer_alone():
    model = sequential()
    assert keras_internals.own_weights(model) == []
    layer = built(keras.layers.BatchNormalization())
    assert keras_internals.own_weights(layer) == layer.weights


def test_metrics_tell_their_direction_before_they_are_built():
    model = sequential()
    metrics = [keras.metrics.F1Score(name="f"), keras.losses.huber, "acc"]
    model.compile(metrics=[metrics], weighted_metrics=["mae", lambda y, p: p])
    direction = {
        n: keras_internals.metric_direction(model, n) for n in ("f", "huber", "acc", "mae")
    }
    assert direction == {"f": "up", "huber": "down", "acc": "up", "mae": "down"}
    assert keras_internals.metric_direction(model, "loss") is None
    assert keras_internals.metric_direction(model, "no such") is None


def test_pytorch_sees_variables_that_were_added_below():
    model = sequential()
    layer = model.layers[0]
    with keras_internals.unlocked(layer):
        late = layer.add_weight(name="late", shape=(1,))
    keras_internals.track_torch_parameters([model, *model.layers])
    if keras.backend.backend() == "torch":
        for module in (model, layer):
            assert any(p is late.value for p in module.parameters())
            assert any(late.path in name for name in module.state_dict())


def test_a_whole_model_as_hdf5_is_known_while_it_is_written(tmp_path):
    seen = []

    class Asks(keras.layers.Dense):
        def get_config(self):
            try:
                keras_internals.check_config_is_for_keras_file()
            except ValueError:
                seen.append("refused")
            return super().get_config()

    model = keras.Sequential([keras.Input((3,)), Asks(4)])
    model.save(tmp_path / "m.keras")
    assert seen == []
    model.save(tmp_path / "m.h5")
    assert seen


def test_a_value_is_exchanged_and_put_back():
    variable = keras.Variable(np.ones(3, "float32"))
    kept = keras_internals.exchange_value(variable, np.zeros(3, "float32"))
    assert array(variable).tolist() == [0, 0, 0]
    keras_internals.put_value_back(variable, kept)
    assert array(variable).tolist() == [1, 1, 1]
    kept = keras_internals.exchange_value(variable, np.zeros(3, "float32"))
    keras_internals.put_value_back(variable, keras_internals.kept_value(kept, [2.0, 2.0, 2.0]))
    assert array(variable).tolist() == [2, 2, 2]


@pytest.mark.parametrize("way", [keras_internals.serialized_view, serialize_keras_object])
def test_a_serialized_view_is_not_taken_for_another_object(way, tmp_path):
    view = keras.layers.Dense(4)  # one for all has the `id` that views of two layers may have

    class Views(keras.layers.Dense):
        def get_config(self):
            return {**super().get_config(), "view": way(view)}

    model = keras.Sequential([keras.Input((4,)), Views(4), Views(4)])
    model.save(tmp_path / "m.keras")
    config = json.loads(zipfile.ZipFile(tmp_path / "m.keras").read("config.json"))
    views = [layer["config"]["view"] for layer in config["config"]["layers"][1:]]
    is_shared = ["shared_object_id" in view for view in views]
    assert any(is_shared) == (way is serialize_keras_object)


@pytest.mark.parametrize("mode", [None, "int8"])
def test_a_diverted_layer_is_computed_by_something_else_until_it_is_let_go(mode):
    layer = built(keras.layers.Dense(4))
    if mode is not None:
        layer.quantize(mode)
    inputs = np.ones((2, layer.input_spec.axes[-1]), "float32")
    before, state = array(layer(inputs)), set(vars(layer))
    diversions = {}
    for _ in range(2):
        keras_internals.divert(layer, lambda layer: diversions.get(id(layer)))
    np.testing.assert_array_equal(array(layer(inputs)), before)
    diversions[id(layer)] = lambda inputs, **arguments: 2 * inputs
    np.testing.assert_array_equal(array(layer(inputs)), 2 * inputs)
    assert not {"call", "quantized_call"} & set(vars(keras_internals.view_as(layer, type(layer))))
    keras_internals.undivert(layer)
    np.testing.assert_array_equal(array(layer(inputs)), 2 * inputs)
    keras_internals.undivert(layer)
    np.testing.assert_array_equal(array(layer(inputs)), before)
    assert set(vars(layer)) == state


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.optimizers.Adam(0.1),
        lambda: keras.optimizers.SGD(0.1, momentum=0.9),
        lambda: keras.optimizers.Adagrad(0.1, initial_accumulator_value=0.5),
        lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Nadam(0.1), 8.0),
    ],
)
def test_an_optimizer_begins_anew(make):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile(make(), "mse")
    model.optimizer.build(model.trainable_variables)
    before = [array(variable) for variable in model.optimizer.variables]
    model.fit(np.ones((4, 3)), np.ones((4, 2)), epochs=2, verbose=0)
    model.optimizer.learning_rate = 0.25
    keras_internals.restart_optimizer(model)
    changed = [
        number
        for number, variable in enumerate(model.optimizer.variables)
        if not np.array_equal(array(variable), before[number])
    ]
    assert [model.optimizer.variables[number].path for number in changed] == [
        model.optimizer.learning_rate.path
    ]
    assert float(model.optimizer.learning_rate) == 0.25


HOW_A_VARIABLE_LIES = """
import keras
import numpy as np
from keras_dcft import keras_internals

mesh = keras.distribution.DeviceMesh((1, 2), ("batch", "model"))
layout_map = keras.distribution.LayoutMap(mesh)
layout_map[".*kernel"] = (None, "model")
distribution = keras.distribution.ModelParallel(layout_map=layout_map)
layer = keras.layers.Dense(4)
with distribution.scope():
    layer.build((None, 2))
kernel = layer.kernel
layout = keras_internals.layout_of(kernel)
assert layout.axes == (None, "model")
assert tuple(kernel.value.sharding.spec) == (None, "model")
(of_pattern,) = keras_internals.layouts_by_pattern(distribution).items()
assert of_pattern[0] == ".*kernel"
assert of_pattern[1].axes == layout.axes
assert of_pattern[1].device_mesh.backend_mesh == layout.device_mesh.backend_mesh
other = keras.distribution.TensorLayout(("model", None), mesh)
keras_internals.set_layout(kernel, other)
assert tuple(kernel.value.sharding.spec) == ("model", None)
kernel.assign(np.ones(kernel.shape))
assert tuple(kernel.value.sharding.spec) == ("model", None)
"""


def test_how_a_variable_lies_is_kept_with_it(tmp_path):
    if keras.backend.backend() != "jax":
        assert keras_internals.layout_of(built(keras.layers.Dense(4)).kernel) is None
        return
    # JAX makes its devices once, and on one device alone nothing lies in any way.
    run_program(HOW_A_VARIABLE_LIES, tmp_path / "log", devices=2)


def test_without_a_cluster_every_process_is_the_first():
    assert keras_internals.is_first_process()
    assert keras_internals.layouts_by_pattern(None) == {}
