"""Several adapters of one model, by name: activating, saving, merging and removing each."""

import pickle
import threading

import h5py
import keras
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from keras import ops
from tools import (
    MODELS,
    array,
    bert_classifier,
    differences,
    predict,
    randomize_adapters,
    sequential,
    values,
    vectors,
)

from keras_dcft import (
    DCFTCheckpoint,
    DCFTDense,
    activate_dcft,
    convert_to_lora,
    dcft_disabled,
    dcft_summary,
    enable_dcft,
    keras_internals,
    load_dcft_weights,
    merge_dcft,
    remove_dcft,
    save_dcft_weights,
)


def change(model, seed):
    """Other values for all that an adapted model trains."""
    rng = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        variable.assign(array(variable) + rng.normal(size=variable.shape, scale=0.3))


def with_adapters(kind, others):
    """A model with adapters, its inputs, and what it predicts with each; None is the base."""
    model, inputs = MODELS[kind][0](), MODELS[kind][1]()
    expected = {None: predict(model, inputs)}
    for seed, (name, arguments) in enumerate({"default": {}, **others}.items()):
        enable_dcft(model, **{"kernel_size": 4, **arguments}, name=name)
        activate_dcft(model, name)
        change(model, seed)
        expected[name] = predict(model, inputs)
    assert len({outputs.tobytes() for outputs in expected.values()}) == len(expected)
    return model, inputs, expected


def assert_all_are_as(model, inputs, expected):
    for name in [*reversed(expected), list(expected)[-1]]:
        activate_dcft(model, name)
        np.testing.assert_array_equal(predict(model, inputs), expected[name], err_msg=str(name))


CASES = [
    (
        "task",
        {
            "few": {"kernel_size": 2, "target_layers": "query|value"},
            "norm": {"rank": 2, "alpha": 2.0, "trainable_layers": "layer_norm"},
        },
    ),
    ("backbone", {"pool": {"trainable_layers": "pooled_dense"}, "table": {"target_layers": "tok"}}),
    ("sequential", {"second": {"trainable_layers": "dense_1"}, "drop": {"dropout": 0.5}}),
    ("subclassed", {"same": {}, "first": {"trainable_layers": "^dense$"}}),
    (
        "functional_around_backbone",
        {"head": {"trainable_layers": "head"}, "query": {"target_layers": "query"}},
    ),
]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{'-'.join(case[1])}")
def adapted(request):
    return with_adapters(*request.param)


def test_each_computes_when_it_is_active(adapted):
    assert_all_are_as(*adapted)


def test_all_of_them_and_which_is_active_come_back_from_a_file(adapted, tmp_path):
    model, inputs, expected = adapted
    for name in (None, list(expected)[1]):
        activate_dcft(model, name)
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        np.testing.assert_array_equal(predict(loaded, inputs), expected[name])
        assert loaded.dcft_adapters == model.dcft_adapters
        assert len(loaded.trainable_variables) == len(model.trainable_variables)
    assert_all_are_as(loaded, inputs, expected)


def test_they_are_pickled(adapted):
    model, inputs, expected = adapted
    assert_all_are_as(pickle.loads(pickle.dumps(model)), inputs, expected)


def test_each_has_a_file_of_its_own_that_others_load(adapted, tmp_path):
    model, inputs, expected = adapted
    fresh = pickle.loads(pickle.dumps(model))
    remove_dcft(fresh)
    for name in list(expected)[1:]:
        path = tmp_path / f"{name}.dcft.safetensors"
        save_dcft_weights(model, path, name=name)
        load_dcft_weights(fresh, path, name=name)
    assert fresh.dcft_adapters == {n: model.dcft_adapters[n] for n in fresh.dcft_adapters}
    assert_all_are_as(fresh, inputs, expected)
    # Into an adapter that waits, and into one that computes.
    first, second = list(expected)[1:3]
    path = tmp_path / f"{second}.dcft.safetensors"
    for active in (first, second):
        activate_dcft(model, second)
        change(model, 7)
        activate_dcft(model, active)
        load_dcft_weights(model, path, name=second)
        activate_dcft(model, second)
        np.testing.assert_array_equal(predict(model, inputs), expected[second])


def test_removing_one_leaves_the_others_and_removing_all_the_base(adapted):
    model, inputs, expected = adapted
    names = list(expected)[1:]
    activate_dcft(model, names[1])
    remove_dcft(model, names[1])
    np.testing.assert_array_equal(predict(model, inputs), expected.pop(None))
    del expected[names[1]]
    assert sorted(model.dcft_adapters) == sorted(expected)
    assert_all_are_as(model, inputs, expected)
    remove_dcft(model)
    assert not hasattr(model, "dcft_adapters")
    assert not any("dcft" in name for layer in model._flatten_layers() for name in vars(layer))


@pytest.mark.parametrize("active", [0, 1, None])
def test_one_is_merged(adapted, active):
    model, inputs, expected = adapted
    names = list(expected)[1:]
    activate_dcft(model, None if active is None else names[active])
    merge_dcft(model, names[1])
    np.testing.assert_allclose(predict(model, inputs), expected[names[1]], atol=1e-5)
    assert not hasattr(model, "dcft_adapters")


def test_a_weighted_sum_is_merged_exactly(adapted):
    model, _, expected = adapted
    names = list(expected)[1:]
    merged = {}
    for name in (*names, None):
        single = pickle.loads(pickle.dumps(model))
        merged[name] = values((merge_dcft(single, name) if name else remove_dcft(single)).weights)
    weights = dict(zip(names, (0.7, 0.3, -0.5)))
    merge_dcft(model, weights=weights)
    for number, weight in enumerate(values(model.weights)):
        base = merged[None][number].astype("float64")
        change = sum(w * (merged[name][number] - base) for name, w in weights.items())
        np.testing.assert_allclose(weight, base + change, atol=2e-6)


def test_disabling_and_other_calls_work_with_each(adapted, tmp_path):
    model, inputs, expected = adapted
    for name in list(expected)[1:]:
        activate_dcft(model, name)
        with dcft_disabled(model):
            np.testing.assert_allclose(predict(model, inputs), expected[None], atol=1e-6)
            with pytest.raises(ValueError, match="inside `dcft_disabled`"):
                activate_dcft(model, None)
        np.testing.assert_array_equal(predict(model, inputs), expected[name])
    printed = []
    dcft_summary(model, print_fn=printed.append)
    for name in list(expected)[1:]:
        assert f'adapter "{name}"' in printed[0]
    assert printed[0].count("not active") == len(expected) - 2
    assert f"active '{name}'" in repr(model)


def test_a_preset_brings_all_of_them(tmp_path):
    import keras_hub

    model, inputs, expected = with_adapters(*CASES[0])
    model.save_to_preset(str(tmp_path))
    loaded = keras_hub.models.TextClassifier.from_preset(str(tmp_path))
    assert_all_are_as(loaded, inputs, expected)


def test_a_part_of_a_model_brings_its_own():
    model, inputs, expected = with_adapters(*CASES[4])
    outputs = model.get_layer("head").input
    part = keras.Model(model.inputs, outputs)
    before = {}
    for name in list(expected)[1:]:
        activate_dcft(model, name)
        before[name] = predict(part, inputs)
    assert_all_are_as(pickle.loads(pickle.dumps(part)), inputs, before)


def test_directly_built_layers_have_several():
    layers = [keras.Input((12,)), DCFTDense(16, kernel_size=4), DCFTDense(4, kernel_size=2)]
    model = keras.Sequential(layers)
    change(model, 0)
    expected = {"default": predict(model, vectors())}
    enable_dcft(model, kernel_size=3, name="other", target_layers="dense_1")
    activate_dcft(model, "other")
    change(model, 1)
    expected["other"] = predict(model, vectors())
    assert_all_are_as(model, vectors(), expected)
    assert_all_are_as(pickle.loads(pickle.dumps(model)), vectors(), expected)


def test_several_parts_have_their_own():
    towers = [enable_dcft(sequential(), kernel_size=4) for _ in range(2)]
    enable_dcft(towers[0], kernel_size=4, name="legal")
    inputs = keras.Input((12,))
    model = keras.Model(inputs, keras.layers.Add()([tower(inputs) for tower in towers]))
    activate_dcft(model, "legal")
    randomize_adapters(model)
    expected = predict(model, vectors())
    assert {tower.dcft_config == towers[1].dcft_config for tower in towers} == {True}
    loaded = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(predict(loaded, vectors()), expected)
    activate_dcft(loaded, "default")
    assert np.abs(predict(loaded, vectors()) - expected).max() > 1e-3
    activate_dcft(loaded, "legal")
    np.testing.assert_array_equal(predict(loaded, vectors()), expected)


@pytest.mark.parametrize("kind", ["task", "functional_around_backbone"])
def test_a_file_with_a_head_for_a_waiting_adapter_does_not_change_that_of_all(kind, tmp_path):
    path, own = tmp_path / "other.dcft.safetensors", tmp_path / "own.dcft.safetensors"
    make, inputs = MODELS[kind][0], MODELS[kind][1]()

    def adapted():
        keras.utils.set_random_seed(0)
        model = make()
        [backbone] = (layer for layer in model.layers if "bert_backbone" in layer.name)
        return model, enable_dcft(backbone, kernel_size=4)

    other, _ = adapted()
    change(other, 1)
    save_dcft_weights(other, path)

    model, backbone = adapted()
    change(model, 2)
    save_dcft_weights(model, own)
    expected = predict(model, inputs)
    with pytest.raises(ValueError, match="one set of values for all its adapters"):
        load_dcft_weights(model, path, name="other")
    assert list(backbone.dcft_adapters) == ["default"]
    np.testing.assert_array_equal(predict(model, inputs), expected)

    # The head that the model has makes no difference, and so is no hindrance.
    load_dcft_weights(model, own, name="same")
    np.testing.assert_array_equal(predict(model, inputs), expected)
    with pytest.raises(ValueError, match="one set of values for all its adapters"):
        load_dcft_weights(model, path, name="same")
    np.testing.assert_array_equal(predict(model, inputs), expected)
    load_dcft_weights(model, path, name="default")  # into what computes
    np.testing.assert_allclose(predict(model, inputs), predict(other, inputs), atol=1e-5)


class Counted(keras.layers.Layer):
    """Counts how often it is called, in compiled functions how often they are traced."""

    calls = 0

    def call(self, inputs):
        type(self).calls += 1
        return inputs


@pytest.mark.compiled
@pytest.mark.skipif(keras.backend.backend() == "torch", reason="PyTorch traces nothing")
def test_adapters_of_one_shape_are_exchanged_without_a_trace():
    layers = [keras.layers.Dense(16), Counted(), keras.layers.Dense(4)]
    model = keras.Sequential([keras.Input((12,)), *layers])
    model.compile(keras.optimizers.Adam(0.1), "mse")
    enable_dcft(enable_dcft(model, kernel_size=4), kernel_size=4, name="other")
    model.fit(vectors(), np.ones((4, 4)), verbose=0)
    model.predict(vectors(), verbose=0)
    before = Counted.calls
    outputs = []
    for name in ("other", "default", "other"):
        activate_dcft(model, name)
        assert [float(np.abs(v).max()) for v in values(model.optimizer.variables[2:])] == [0.0] * 12
        model.fit(vectors(), np.ones((4, 4)), verbose=0)
        outputs.append(model.predict(vectors(), verbose=0))
    assert Counted.calls == before
    assert all(np.abs(outputs[0] - other).max() > 1e-4 for other in outputs[1:])
    activate_dcft(model, "default")
    np.testing.assert_array_equal(model.predict(vectors(), verbose=0), outputs[1])
    activate_dcft(model, None)
    model.predict(vectors(), verbose=0)
    activate_dcft(model, "other")
    model.fit(vectors(), np.ones((4, 4)), verbose=0)
    assert np.abs(model.predict(vectors(), verbose=0) - outputs[2]).max() > 1e-4


def test_only_the_active_one_trains():
    model = bert_classifier()
    enable_dcft(model, kernel_size=4)
    enable_dcft(model, kernel_size=4, name="other", trainable_layers="pooled")
    inputs = MODELS["task"][1]()
    activate_dcft(model, "other")
    waiting = predict(activate_dcft(model, "default"), inputs)
    activate_dcft(model, "other")
    model.fit(inputs, np.array([0, 1] * 2)[: len(predict(model, inputs))], epochs=2, verbose=0)
    trained = predict(model, inputs)
    np.testing.assert_array_equal(predict(activate_dcft(model, "default"), inputs), waiting)
    np.testing.assert_array_equal(predict(activate_dcft(model, "other"), inputs), trained)
    assert np.abs(trained - waiting).max() > 0


def test_what_is_made_trainable_by_hand_belongs_to_the_active_one(tmp_path):
    model = enable_dcft(sequential(), kernel_size=4, target_layers="^dense$")
    enable_dcft(model, kernel_size=4, target_layers="^dense$", name="other")
    base = values(model.weights)
    model.layers[-1].bias.trainable = True
    change(model, 1)
    trained = predict(model, vectors())
    activate_dcft(model, "other")
    assert not model.layers[-1].bias.trainable
    activate_dcft(model, None)
    assert not any(differences(base, values(model.weights))[3:])
    path = tmp_path / "a.dcft.safetensors"
    save_dcft_weights(model, path, name="default")
    load_dcft_weights(model, path, name="third")
    for one in (pickle.loads(pickle.dumps(model)), model):
        for name in ("third", "default"):
            activate_dcft(one, name)
            assert one.layers[-1].bias.trainable
            np.testing.assert_array_equal(predict(one, vectors()), trained)


def test_a_callback_writes_the_one_that_it_is_told(tmp_path):
    model = enable_dcft(enable_dcft(sequential(), kernel_size=4), kernel_size=2, name="other")
    model.compile("adam", "mse")
    path = tmp_path / "a.dcft.safetensors"
    for name in ("missing", None):
        callbacks = [DCFTCheckpoint(path, name=name)]
        with pytest.raises(ValueError, match="'default', 'other'"):
            model.fit(vectors(), np.ones((4, 9)), callbacks=callbacks, verbose=0)
    activate_dcft(model, "other")
    callbacks = [DCFTCheckpoint(path, name="other")]
    model.fit(vectors(), np.ones((4, 9)), callbacks=callbacks, verbose=0)
    loaded = load_dcft_weights(sequential_like(model), path)
    np.testing.assert_array_equal(predict(loaded, vectors()), predict(model, vectors()))


def sequential_like(model):
    return remove_dcft(pickle.loads(pickle.dumps(model)))


def test_quantizing_asks_for_what_waits_in_floating_point():
    model = enable_dcft(sequential(), kernel_size=4, target_layers="^dense$")
    arguments = {"target_layers": "^dense$", "trainable_layers": "dense_1", "name": "other"}
    enable_dcft(model, kernel_size=4, **arguments)
    with pytest.raises(ValueError, match="Remove the adapters that are not active"):
        model.quantize("int8")
    remove_dcft(model, "other")
    model.quantize("int8")
    enable_dcft(model, kernel_size=2, name="other", target_layers="^dense$")
    for name in ("other", "default"):
        activate_dcft(model, name)
        change(model, 3)
    before = {n: predict(activate_dcft(model, n), vectors()) for n in ("default", "other")}
    assert_all_are_as(model, vectors(), before)


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_quantized_backbone_brings_those_that_adapt_more_than_the_active_one(mode):
    model, inputs = MODELS["backbone"][0](), MODELS["backbone"][1]()
    enable_dcft(model, kernel_size=4)
    enable_dcft(model, kernel_size=8, name="query", target_layers="query")
    model.quantize(mode)
    expected = {}
    for seed, name in enumerate(("default", "query")):
        activate_dcft(model, name)
        change(model, seed)
        expected[name] = predict(model, inputs)
    assert_all_are_as(pickle.loads(pickle.dumps(model)), inputs, expected)


def test_a_call_sees_the_one_or_the_other():
    model = sequential()
    for seed, name in enumerate(("default", "same", "finer")):
        enable_dcft(model, kernel_size=2 if name == "finer" else 4, name=name)
        activate_dcft(model, name)
        change(model, seed)
    expected = [predict(activate_dcft(model, n), vectors()) for n in ("default", "same", "finer")]
    seen, errors, stop = [], [], threading.Event()

    def call():
        try:
            while not stop.is_set():
                seen.append(model.predict(vectors(), verbose=0))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    try:
        for name in ("same", "default", "same", "finer", "default") * 2:
            activate_dcft(model, name)
    finally:
        stop.set()
        thread.join()
    assert not errors
    for outputs in seen:
        assert min(np.abs(outputs - one).max() for one in expected) < 1e-5


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: enable_dcft(m, name="other"), ValueError, "'default', 'other'"),
        (lambda m: enable_dcft(m, name=3), TypeError, "Received: name=3"),
        (lambda m: enable_dcft(m, name=""), ValueError, "Received: name=''"),
        (lambda m: enable_dcft(m, name="new", target_layers="x"), ValueError, "matches nothing"),
        (lambda m: activate_dcft(m, "new"), ValueError, "'default', 'other'. Received: name='new'"),
        (lambda m: activate_dcft(m, 3), TypeError, "Received: name=3"),
        (lambda m: activate_dcft(sequential(), "a"), ValueError, "must have DCFT layers"),
        (lambda m: merge_dcft(m), ValueError, "'default', 'other'. Received: name=None"),
        (lambda m: merge_dcft(m, "new"), ValueError, "Received: name='new'"),
        (lambda m: merge_dcft(m, weights={"new": 1}), ValueError, "Received: name='new'"),
        (lambda m: merge_dcft(m, weights={}), TypeError, "Received: weights={}"),
        (lambda m: merge_dcft(m, weights=[1]), TypeError, r"Received: weights=\[1\]"),
        (lambda m: merge_dcft(m, weights={"other": "1"}), TypeError, "must be a number"),
        (lambda m: merge_dcft(m, weights={"other": np.nan}), ValueError, "must be finite"),
        (lambda m: merge_dcft(m, "other", weights={"other": 1}), ValueError, "beside `weights`"),
        (lambda m: remove_dcft(m, "new"), ValueError, "Received: name='new'"),
        (lambda m: save_dcft_weights(m, "x.dcft.safetensors"), ValueError, "Received: name=None"),
    ],
)
def test_errors_change_nothing(call, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = enable_dcft(enable_dcft(sequential(), kernel_size=4), kernel_size=2, name="other")
    change(model, 0)
    before, adapters = predict(model, vectors()), model.dcft_adapters
    with pytest.raises(error, match=message):
        call(model)
    np.testing.assert_array_equal(predict(model, vectors()), before)
    assert model.dcft_adapters == adapters
    assert not list(tmp_path.iterdir())


def test_another_adapter_stays_inside_of_what_is_adapted():
    backbone_of = MODELS["functional_around_backbone"][0]()
    backbone = next(x for x in backbone_of.layers if isinstance(x, keras.Model))
    enable_dcft(backbone, kernel_size=4)
    with pytest.raises(ValueError, match="'head' belong to no adapted model"):
        enable_dcft(backbone_of, kernel_size=4, name="other")
    assert list(backbone.dcft_adapters) == ["default"]


def test_an_error_while_activating_leaves_the_one_that_was_active(monkeypatch):
    from keras_dcft import named

    model, inputs, expected = with_adapters(*CASES[0])
    activate_dcft(model, "default")
    adapt = named.adapt

    def interrupted(model, config):
        monkeypatch.setattr(named, "adapt", adapt)
        adapt(model, config)
        raise KeyboardInterrupt

    monkeypatch.setattr(named, "adapt", interrupted)
    with pytest.raises(KeyboardInterrupt):
        activate_dcft(model, "few")
    np.testing.assert_array_equal(predict(model, inputs), expected["default"])
    assert_all_are_as(model, inputs, expected)


def test_a_weights_file_brings_all_of_them_or_changes_nothing(tmp_path):
    model, inputs, expected = with_adapters(*CASES[2])
    path = tmp_path / "a.weights.h5"
    model.save_weights(path)
    other = pickle.loads(pickle.dumps(model))
    for seed, name in enumerate([*model.dcft_adapters, "drop"]):
        activate_dcft(other, name)
        change(other, 20 + seed)
    before = {n: predict(activate_dcft(other, n), inputs) for n in other.dcft_adapters}
    activate_dcft(other, "drop")
    with h5py.File(path, "r+") as file:  # the last layer's bias is of another size
        weights = file["layers/dcft_dense_1/vars"]
        del weights["1"]
        weights["1"] = np.zeros(4, "float32")
    with pytest.raises(ValueError, match="shape"):
        other.load_weights(path)
    for name, outputs in before.items():
        np.testing.assert_array_equal(predict(activate_dcft(other, name), inputs), outputs)
    model.save_weights(path)
    activate_dcft(other, "default")
    with pytest.raises(ValueError, match="activate the adapter that was active"):
        other.load_weights(path)
    np.testing.assert_array_equal(predict(other, inputs), before["default"])
    activate_dcft(other, "drop")
    other.load_weights(path)
    assert_all_are_as(other, inputs, expected)


def test_the_only_adapter_comes_back_while_the_base_is_active():
    model = enable_dcft(sequential(), kernel_size=4)
    change(model, 0)
    expected = {None: None, "default": predict(model, vectors())}
    expected[None] = predict(activate_dcft(model, None), vectors())
    loaded = pickle.loads(pickle.dumps(model))
    assert not loaded.trainable_variables
    np.testing.assert_array_equal(predict(loaded, vectors()), expected[None])
    assert_all_are_as(loaded, vectors(), expected)


def test_what_was_thawed_by_hand_trains_in_no_other_adapter_and_not_in_the_base():
    model = enable_dcft(enable_dcft(sequential(), kernel_size=4), kernel_size=4, name="legal")
    model.compile("adam", "mse")
    bias = model.layers[-1].bias
    for name in ("legal", "default", "legal", None, "legal"):
        activate_dcft(model, name)
        if name == "default":
            bias.trainable = True
            model.fit(vectors(), np.ones((4, 9)), verbose=0)
        assert bias.trainable == (name == "default")


def test_layers_that_share_a_weight_are_merged_and_activated_once():
    model = keras.Sequential([keras.Input((8,)), *(keras.layers.Dense(8) for _ in range(3))])
    first, second, _ = model.layers
    with keras_internals.unlocked(second):
        second._untrack_variable(second._kernel)
        second._kernel = first._kernel
    base = array(model.layers[0]._kernel)
    arguments = {"trainable_layers": ["^dense$", "^dense_1$"], "kernel_size": 4}
    enable_dcft(enable_dcft(model, **arguments), **arguments, name="other")
    activate_dcft(model, "other")
    model.layers[0]._kernel.assign(base + 1)
    activate_dcft(activate_dcft(model, "default"), "other")
    np.testing.assert_allclose(array(model.layers[0]._kernel), base + 1, atol=1e-6)
    merge_dcft(model, weights={"other": 0.5})
    np.testing.assert_allclose(array(model.layers[0]._kernel), base + 0.5, atol=1e-6)


def test_a_head_with_infinity_is_not_merged():
    model = enable_dcft(sequential(), kernel_size=4, trainable_layers="dense_1")
    model.layers[-1].bias.assign(np.full(9, np.inf))
    with pytest.raises(ValueError, match="must be finite"):
        merge_dcft(model)


NAMES = ("one", "two", "three")
PATHS = ("dense", "dense_1", "dense_2")
# Orders have nothing to do with the backend, so the quickest tries most.
EXAMPLES = 40 if keras.backend.backend() == "torch" else 10


class Verbs(RuleBasedStateMachine):
    """Any order of the verbs, beside base and adapters kept in plain NumPy."""

    def __init__(self):
        super().__init__()
        keras.utils.clear_session()
        dense = [keras.layers.Dense(n) for n in (8, 6, 3)]
        self.model = keras.Sequential([keras.Input((5,)), *dense])
        self.inputs = np.random.default_rng(0).normal(size=(4, 5)).astype("float32")
        weights = values(self.model.weights)
        self.base = {p: tuple(weights[2 * i : 2 * i + 2]) for i, p in enumerate(PATHS)}
        self.adapters, self.active, self.seed = {}, None, 0

    def check(self):
        outputs = self.inputs.astype("float64")
        for path in PATHS:
            kernel, bias = self.adapters.get(self.active, self.base)[path]
            outputs = outputs @ kernel + bias
        found = array(self.model(self.inputs))
        np.testing.assert_allclose(found, outputs, atol=2e-4, rtol=1e-4)
        assert sorted(getattr(self.model, "dcft_adapters", ())) == sorted(self.adapters)
        if self.active is None and self.adapters:
            assert not self.model.trainable_variables

    @precondition(lambda self: len(self.adapters) < len(NAMES))
    @rule(
        data=st.data(),
        kernel_size=st.sampled_from((1, 2, 3)),
        rank=st.sampled_from((1, 2)),
        trained=st.sampled_from((None, "dense_1", "dense_2")),
    )
    def enable(self, data, kernel_size, rank, trained):
        name = data.draw(st.sampled_from([n for n in NAMES if n not in self.adapters]))
        enable_dcft(self.model, kernel_size, rank=rank, trainable_layers=trained, name=name)
        if not self.adapters:
            self.active = name
        self.adapters[name] = dict(self.base)
        self.check()

    @precondition(lambda self: self.adapters)
    @rule(data=st.data())
    def activate(self, data):
        self.active = data.draw(st.sampled_from([None, *sorted(self.adapters)]))
        activate_dcft(self.model, self.active)
        self.check()

    @precondition(lambda self: self.active is not None)
    @rule()
    def train(self):
        self.seed += 1
        change(self.model, self.seed)
        adapter = {}
        for path, layer in zip(PATHS, self.model.layers):
            kernel, bias = (array(v).astype("float64") for v in (layer._kernel, layer.bias))
            if hasattr(layer, "dcft_a"):
                a, b, k = (array(v) for v in (layer.dcft_a, layer.dcft_b, layer.dcft_filter))
                rows, columns = kernel.shape
                kernel = kernel + layer.dcft_settings.scale * np.kron(a @ b, k)[:rows, :columns]
            adapter[path] = kernel, bias
        self.adapters[self.active] = adapter
        self.check()

    @precondition(lambda self: self.adapters)
    @rule(data=st.data())
    def remove(self, data):
        name = data.draw(st.sampled_from(sorted(self.adapters)))
        remove_dcft(self.model, name)
        del self.adapters[name]
        self.active = None if self.active == name else self.active
        self.check()

    @precondition(lambda self: 0 < len(self.adapters) < len(NAMES))
    @rule(data=st.data())
    def copy_by_a_file(self, data):
        source = data.draw(st.sampled_from(sorted(self.adapters)))
        target = data.draw(st.sampled_from([n for n in NAMES if n not in self.adapters]))
        path = f"{self.folder}/a.dcft.safetensors"
        save_dcft_weights(self.model, path, name=source)
        load_dcft_weights(self.model, path, name=target)
        self.adapters[target] = self.adapters[source]
        self.check()

    @rule()
    def reload(self):
        self.model.save(f"{self.folder}/a.keras")
        self.model = keras.models.load_model(f"{self.folder}/a.keras")
        self.check()

    @precondition(lambda self: self.adapters)
    @rule()
    def disable(self):
        active, self.active = self.active, None
        with dcft_disabled(self.model):
            outputs = self.inputs.astype("float64")
            for path in PATHS:
                outputs = outputs @ self.base[path][0] + self.base[path][1]
            np.testing.assert_allclose(array(self.model(self.inputs)), outputs, atol=2e-4)
        self.active = active
        self.check()

    @precondition(lambda self: self.adapters)
    @rule(weights=st.tuples(*[st.sampled_from((-0.5, 0.25, 1.0))] * len(NAMES)))
    def merge(self, weights):
        weights = dict(zip(sorted(self.adapters), weights))
        merge_dcft(self.model, weights=weights)
        self.base = {
            path: tuple(
                base + sum(w * (self.adapters[n][path][i] - base) for n, w in weights.items())
                for i, base in enumerate(self.base[path])
            )
            for path in PATHS
        }
        self.adapters, self.active = {}, None
        self.check()


def test_any_order_of_the_verbs(tmp_path):
    Verbs.folder = tmp_path
    run_state_machine_as_test(
        Verbs, settings=settings(max_examples=EXAMPLES, stateful_step_count=12, deadline=None)
    )


def test_enabling_another_adapter_changes_nothing_yet():
    model = sequential()
    enable_dcft(model, kernel_size=4)
    outputs = ops.convert_to_numpy(model(vectors()))
    enable_dcft(model, kernel_size=4, name="other")
    np.testing.assert_array_equal(array(model(vectors())), outputs)


@pytest.mark.compiled
def test_no_verb_leaves_a_stale_function(tmp_path):
    model = sequential()

    def check(verb=lambda: None):
        model.predict(vectors(), verbose=0)  # compiled, where a backend compiles
        before = array(model(vectors()))
        verb()
        after = array(model(vectors()))
        np.testing.assert_allclose(model.predict(vectors(), verbose=0), after, atol=1e-5)
        return abs(after - before).max() > 1e-3

    check(lambda: enable_dcft(model, kernel_size=4, name="a"))
    assert check(lambda: change(model, 1))
    check(lambda: enable_dcft(model, kernel_size=3, name="b"))
    assert check(lambda: activate_dcft(model, "b"))
    assert check(lambda: change(model, 2))
    assert check(lambda: remove_dcft(model, "b"))
    assert check(lambda: activate_dcft(model, "a"))
    enable_dcft(model, kernel_size=3, name="b")
    assert check(lambda: merge_dcft(model, weights={"a": 0.5, "b": 0.5}))
    check(lambda: enable_dcft(model, kernel_size=4))
    assert check(lambda: change(model, 3))
    check(lambda: convert_to_lora(model))
