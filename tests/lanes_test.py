"""Trainings that run beside each other are the trainings that Keras does one by one."""

import functools
import sys
from pathlib import Path

import keras
import keras_hub
import numpy as np
import pytest

from keras_dcft import LinearWarmupDecay, enable_dcft

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

if keras.config.backend() != "jax":
    pytest.skip("lanes are JAX's", allow_module_level=True)

from lanes import Examples, Lanes, Settings, flat_values, inputs_of, plan
from support.methods import linear_decay

LENGTHS = (8, 16)
STEPS = 20


@pytest.fixture
def examples():
    generator = np.random.default_rng(0)
    lengths = generator.integers(2, 17, size=75)
    token_ids = generator.integers(1, 50, size=(75, 16))
    token_ids[np.arange(16) >= lengths[:, None]] = 0
    segment_ids = np.zeros_like(token_ids)
    return Examples(token_ids, segment_ids, lengths, generator.integers(0, 2, size=75))


def classifier(method, seed):
    keras.utils.set_random_seed(2)  # lanes share their base
    backbone = keras_hub.models.BertBackbone(50, 1, 2, 16, 32, dropout=0.0, max_sequence_length=16)
    keras.utils.set_random_seed(seed)
    model = keras_hub.models.BertTextClassifier(backbone, 2, dropout=0.0)
    if method != "full":
        enable_dcft(backbone, 4, orthogonality=0.1)
    return model


def losses_of_keras(model, optimizer, examples, made):
    """The losses of the plan's steps, by `train_on_batch`."""
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    losses = []
    for kind, picked in zip(made.kinds, made.order):
        picked, length = picked[picked >= 0], made.lengths[kind]
        lengths = examples.lengths[picked]
        inputs = {
            "token_ids": examples.token_ids[picked, :length],
            "segment_ids": examples.segment_ids[picked, :length],
            "padding_mask": np.arange(length) < lengths[:, None],
        }
        model.reset_metrics()  # Keras gives the mean of all batches so far
        labels = examples.labels[picked]
        losses.append(float(model.train_on_batch(inputs, labels, return_dict=True)["loss"]))
    return losses


def cut(made):
    made.kinds, made.order = made.kinds[:STEPS], made.order[:STEPS]
    return made


def test_a_plan_has_each_example_once_an_epoch_and_none_cut_short(examples):
    made = plan(examples.lengths, LENGTHS, epochs=2, batch_size=8, seed=1)
    for epoch in np.split(made.order, 2):
        assert sorted(epoch[epoch >= 0]) == list(range(75))
    for kind, picked in zip(made.kinds, made.order):
        assert max(examples.lengths[picked[picked >= 0]]) <= LENGTHS[kind]
    assert len(set(made.kinds)) == len(LENGTHS)


def test_plans_of_other_seeds_have_other_batches_of_the_same_lengths(examples):
    one, other = (plan(examples.lengths, LENGTHS, 2, 8, seed) for seed in (1, 2))
    assert (one.kinds == other.kinds).all()
    assert (one.order != other.order).any()


@pytest.mark.parametrize("method", ["the paper's", "full"])
def test_lanes_train_as_keras_does(examples, method):
    schedule, decay = linear_decay, 0.0
    if method == "the paper's":
        schedule, decay = functools.partial(LinearWarmupDecay, warmup_share=0.2), 0.1
    runs = [(5e-3, 0), (2e-2, 1)] if method == "the paper's" else [(2e-2, 1)]
    plans = [cut(plan(examples.lengths, LENGTHS, 2, 8, seed)) for _, seed in runs]
    expected, first_values = [], []
    for (rate, seed), made in zip(runs, plans):
        model = classifier(method, seed)
        first_values.append(flat_values(model))
        optimizer = keras.optimizers.AdamW(schedule(rate, STEPS), weight_decay=decay)
        expected.append(losses_of_keras(model, optimizer, examples, made))

    lanes = Lanes(model, examples, examples, Settings(schedule(1.0, STEPS), decay))
    state = lanes.start(first_values, list(range(len(runs))), STEPS)
    rates = [rate for rate, _ in runs]
    state, before = lanes.run(state, rates, plans, 0, STEPS // 2)
    state, after = lanes.run(state, rates, plans, STEPS // 2, STEPS)
    np.testing.assert_allclose(state["losses"], expected, rtol=1e-4)
    # The last lane's model is the one that Keras has trained.
    inputs = {name: np.array(v) for name, v in inputs_of(examples.arrays()).items()}
    np.testing.assert_allclose(after[-1], model.predict_on_batch(inputs), atol=1e-4)
    assert abs(after - before).max() > 1e-3
