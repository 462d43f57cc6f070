"""Switching off: threads, overlapping blocks, traced functions; and what removing gives."""

import concurrent.futures
import functools
import threading

import keras
import numpy as np
import pytest
from keras import ops
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
    keras_internals,
    load_dcft_weights,
    merge_dcft,
    remove_dcft,
    save_dcft_weights,
)


def trained(kind, **arguments):
    """An adapted model in which all that is trained differs from the base, and the base."""
    model, inputs = MODELS[kind][0](), MODELS[kind][1]()
    before = values(model.weights), predict(model, inputs)
    enable_dcft(model, kernel_size=4, **arguments)
    change(model)
    return model, inputs, *before


def change(model, seed=0):
    randomize_adapters(model, seed=seed)
    rng = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        if not variable.name.startswith("dcft_"):
            variable.assign_add(rng.normal(size=variable.shape, scale=0.3))


CASES = [
    ("task", {}),
    ("task", {"trainable_layers": "layer_norm"}),
    ("backbone", {"trainable_layers": "pooled_dense"}),
    ("sequential", {"trainable_layers": "dense_1"}),
    ("subclassed", {"trainable_layers": "^dense$"}),
    ("functional_around_backbone", {"trainable_layers": "head"}),
]


@pytest.mark.parametrize(("kind", "arguments"), CASES)
def test_removing_and_disabling_give_all_of_the_base_back(kind, arguments, tmp_path):
    model, inputs, weights, base = trained(kind, **arguments)
    path = tmp_path / "a.dcft.safetensors"
    expected = predict(model, inputs)
    save_dcft_weights(model, path)
    with dcft_disabled(model):
        np.testing.assert_array_equal(predict(model, inputs), base)
        model.save(tmp_path / "m.keras")
        save_dcft_weights(model, tmp_path / "b.dcft.safetensors")
    np.testing.assert_array_equal(predict(model, inputs), expected)
    restored = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(predict(restored, inputs), expected)
    for removed in (remove_dcft(restored), remove_dcft(model)):
        assert differences(weights, values(removed.weights)) == [0] * len(weights)
        np.testing.assert_array_equal(predict(removed, inputs), base)
    for name in ("a", "b"):
        load_dcft_weights(model, tmp_path / f"{name}.dcft.safetensors")
        np.testing.assert_array_equal(predict(model, inputs), expected)
        remove_dcft(model)
    assert differences(weights, values(model.weights)) == [0] * len(weights)


def test_batch_statistics_of_a_trained_layer_are_put_back():
    layers = [keras.layers.Dense(8), keras.layers.BatchNormalization(), keras.layers.Dense(9)]
    model = keras.Sequential([keras.Input((12,)), *layers])
    model.compile("adam", "mse")
    before = values(model.weights)
    enable_dcft(model, kernel_size=4, trainable_layers="normalization")
    model.fit(vectors(), np.ones((4, 9)), epochs=2, verbose=0)
    assert max(differences(before[2:6], values(model.layers[1].weights))) > 0
    remove_dcft(model)
    assert differences(before, values(model.weights)) == [0] * len(before)


def test_another_file_on_an_adapted_model_is_as_on_a_clean_one(tmp_path):
    make = bert_backbone
    first, second = make(), make()
    second.set_weights(first.get_weights())
    base = first.get_weights()
    names = []
    for seed, by_hand in enumerate([True, False]):
        enable_dcft(first, kernel_size=4)
        if by_hand:
            first.get_layer("pooled_dense").bias.trainable = True
        change(first, seed)
        names.append(tmp_path / f"{seed}.dcft.safetensors")
        save_dcft_weights(first, names[-1])
        remove_dcft(first)
        assert differences(base, first.get_weights()) == [0] * len(base)
    load_dcft_weights(first, names[0])
    load_dcft_weights(first, names[1])
    load_dcft_weights(second, names[1])
    inputs = MODELS["backbone"][1]()
    np.testing.assert_array_equal(predict(first, inputs), predict(second, inputs))
    assert len(first.trainable_variables) == len(second.trainable_variables)


@pytest.mark.parametrize("frozen", ["adapted", "bias", "kernel"])
def test_what_is_made_trainable_by_hand_trains_and_is_kept(frozen, tmp_path):
    model = enable_dcft(sequential(), kernel_size=4)
    layer = model.layers[0]
    base = values(v for v in model.weights if not v.name.startswith("dcft_"))
    variable = {"adapted": layer.bias, "bias": model.layers[1].beta, "kernel": layer._kernel}[
        frozen
    ]
    randomize_adapters(model)
    variable.trainable = True
    before = array(variable)
    model.fit(vectors(), np.ones((4, 9)), epochs=2, verbose=0)
    assert np.abs(array(variable) - before).max() > 0
    expected = predict(model, vectors())
    model.save(tmp_path / "m.keras")
    save_dcft_weights(model, tmp_path / "a.dcft.safetensors")
    restored = keras.saving.load_model(tmp_path / "m.keras")
    names = [v.name for v in model.trainable_variables]
    assert [v.name for v in restored.trainable_variables] == names
    np.testing.assert_array_equal(predict(restored, vectors()), expected)
    for removed in (remove_dcft(model), remove_dcft(restored)):
        assert differences(base, values(removed.weights)) == [0] * len(base)
        load_dcft_weights(removed, tmp_path / "a.dcft.safetensors")
        np.testing.assert_array_equal(predict(removed, vectors()), expected)
        assert sorted(v.name for v in removed.trainable_variables) == sorted(names)


@pytest.mark.parametrize("where", ["layer", "backbone", "model", "head"])
def test_what_the_user_froze_comes_back_frozen(where, tmp_path):
    model = bert_classifier()
    enable_dcft(model, kernel_size=4)
    change(model)
    target = {
        "layer": model.backbone.get_layer("transformer_layer_0"),
        "backbone": model.backbone,
        "model": model,
        "head": model.get_layer("logits"),
    }[where]
    target.trainable = False
    model.fit(TEXTS, LABELS, verbose=0) if where != "model" else None
    names = [v.path for v in model.trainable_variables]
    model.save(tmp_path / "m.keras")
    model.save_to_preset(str(tmp_path / "preset"))
    restored = [
        keras.saving.load_model(tmp_path / "m.keras"),
        type(model).dcft_base_class.from_preset(str(tmp_path / "preset")),
    ]
    for other in restored:
        assert [v.path for v in other.trainable_variables] == names
        np.testing.assert_array_equal(predict(other, TEXTS), predict(model, TEXTS))
    before = [v.name for v in bert_classifier().trainable_variables]
    assert [v.name for v in remove_dcft(restored[0]).trainable_variables] == before


def test_a_resumed_training_with_frozen_layers_is_the_uninterrupted_one(tmp_path):
    model = enable_dcft(sequential(), kernel_size=4)
    randomize_adapters(model)
    model.layers[0].trainable = False
    model.compile("adam", "mse")
    model.fit(vectors(), np.ones((4, 9)), epochs=2, verbose=0, shuffle=False)
    model.save(tmp_path / "m.keras")
    resumed = keras.saving.load_model(tmp_path / "m.keras")
    assert len(resumed.trainable_variables) == 3
    slots = values(model.optimizer.variables)
    assert differences(slots, values(resumed.optimizer.variables)) == [0] * len(slots)
    for one in (model, resumed):
        one.fit(vectors(), np.ones((4, 9)), epochs=2, verbose=0, shuffle=False)
    np.testing.assert_array_equal(predict(resumed, vectors()), predict(model, vectors()))


# --- threads and overlapping blocks ---


def test_blocks_of_two_threads_lose_nothing():
    model, inputs, _, base = trained("task")
    expected = values(model.weights)
    start = threading.Barrier(2)
    found = []

    def work():
        start.wait()
        for _ in range(20):
            with dcft_disabled(model):
                found.append([array(v) for v in model.get_layer("logits").weights])

    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        for future in [threads.submit(work) for _ in range(2)]:
            future.result()
    assert len(found) == 40
    assert differences(expected, values(model.weights)) == [0] * len(expected)
    assert all(differences(found[0], other) == [0, 0] for other in found)
    with dcft_disabled(model):
        np.testing.assert_array_equal(predict(model, inputs), base)


def test_overlapping_blocks_are_counted():
    model, inputs, _, base = trained("task")
    expected = predict(model, inputs)

    def disabled(part):
        with dcft_disabled(part):
            yield

    blocks = [disabled(model), disabled(model.backbone), disabled(model)]
    for block in blocks:
        next(block)
    for block in blocks[:2]:
        np.testing.assert_array_equal(predict(model, inputs), base)
        next(block, None)
    np.testing.assert_array_equal(predict(model, inputs), base)
    next(blocks[2], None)
    np.testing.assert_array_equal(predict(model, inputs), expected)


def test_a_call_sees_the_old_or_the_new_adapter(tmp_path):
    model = enable_dcft(sequential(), kernel_size=4)
    paths, outputs = [], []
    for seed in range(2):
        randomize_adapters(model, seed=seed, scale=1.0)
        paths.append(tmp_path / f"{seed}.dcft.safetensors")
        save_dcft_weights(model, paths[-1])
        outputs.append(predict(model, vectors()))
    seen, stop = [], threading.Event()

    def work():
        while not stop.is_set():
            seen.append(model.predict(vectors(), batch_size=1, verbose=0))

    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        futures = [threads.submit(work) for _ in range(2)]
        for number in range(20):
            load_dcft_weights(model, paths[number % 2])
        stop.set()
        for future in futures:
            future.result()
    assert len(seen) >= 2
    assert np.abs(outputs[0] - outputs[1]).max() > 1
    for found in seen:
        assert min(np.abs(found - expected).max() for expected in outputs) < 1e-3


def test_an_error_while_it_is_switched_off_leaves_nothing_off(monkeypatch):
    model = trained("task")[0]
    expected = values(model.weights)
    exchange, calls = keras_internals.exchange_value, []

    def fails_at_the_third(variable, value):
        calls.append(variable)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return exchange(variable, value)

    monkeypatch.setattr(keras_internals, "exchange_value", fails_at_the_third)
    with pytest.raises(KeyboardInterrupt), dcft_disabled(model):
        pass
    assert differences(expected, values(model.weights)) == [0] * len(expected)


def test_a_model_is_not_changed_inside_its_own_prediction():
    model = enable_dcft(sequential(), kernel_size=4)

    class Merges(keras.callbacks.Callback):
        def on_predict_batch_end(self, batch, logs=None):
            merge_dcft(model)

    with pytest.raises(RuntimeError, match="cannot be changed while this thread predicts"):
        model.predict(vectors(), callbacks=[Merges()], verbose=0)
    assert len(model.trainable_variables) == 6


# --- functions that are traced ---


class Preference(keras.Model):
    """Trains against its own base as the reference, as DPO and distillation do."""

    def __init__(self, policy, training=False):
        super().__init__()
        self.policy = policy
        self.training = training
        self.reference = self.add_weight(shape=(4, 9), trainable=False, initializer="zeros")

    def call(self, inputs):
        return self.policy(inputs)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        with dcft_disabled(self.policy):
            with dcft_disabled(self):  # blocks nest also where they are traced
                self.policy(x, training=self.training)
            reference = self.policy(x, training=self.training)
        self.reference.assign(reference)
        return ops.mean((y_pred - ops.stop_gradient(reference) - y) ** 2)


@pytest.mark.compiled
@pytest.mark.parametrize("jit", [False, True] if keras.backend.backend() != "torch" else [False])
@pytest.mark.parametrize("trainable_layers", [None, "dense_1"])
def test_the_base_is_the_reference_inside_a_compiled_step(jit, trainable_layers):
    policy = sequential()
    base = predict(policy, vectors())
    enable_dcft(policy, kernel_size=4, trainable_layers=trainable_layers)
    change(policy)
    model = Preference(policy)
    model(vectors())
    model.compile("adam", "mse", jit_compile=jit)
    before = values(policy.trainable_variables)
    for _ in range(2):
        model.fit(vectors(), np.ones((4, 9)), batch_size=4, shuffle=False, epochs=2, verbose=0)
        np.testing.assert_allclose(array(model.reference), base, rtol=1e-5, atol=1e-6)
    assert all(d > 0 for d in differences(before, values(policy.trainable_variables)))
    assert np.abs(predict(policy, vectors()) - base).max() > 1e-2
    with dcft_disabled(policy):
        np.testing.assert_allclose(predict(policy, vectors()), base, rtol=1e-6, atol=1e-6)


def difference_from(base, x=None, y=None, y_pred=None, sample_weight=None, training=True):
    return ops.mean((y_pred - base - y) ** 2)


@pytest.mark.compiled
def test_gradients_beside_a_reference_are_those_without():
    gradients = []
    for with_reference in (True, False):
        keras.utils.set_random_seed(0)
        policy = sequential()
        base = predict(policy, vectors())
        enable_dcft(policy, kernel_size=4, trainable_layers="dense_1")
        change(policy)

        model = Preference(policy)
        if not with_reference:
            model.compute_loss = functools.partial(difference_from, ops.convert_to_tensor(base))
        model(vectors())
        model.compile(keras.optimizers.SGD(1.0), "mse")
        before = values(policy.trainable_variables)
        model.fit(vectors(), np.ones((4, 9)), batch_size=4, shuffle=False, verbose=0)
        after = values(policy.trainable_variables)
        gradients.append([b - a for a, b in zip(before, after)])
    assert max(differences(*gradients)) < 1e-5
