"""The learning rate that adapted models get, and what is said of one that is too low."""

import pickle
import warnings

import keras
import keras_hub
import numpy as np
import pytest
from tools import (
    LABELS,
    TEXTS,
    bert_backbone,
    bert_classifier,
    sequential,
    vectors,
)

from keras_dcft import enable_dcft, merge_dcft, remove_dcft


@keras.saving.register_keras_serializable("keras_dcft_tests")
def constant():
    return 5e-5


def rate_of(model):
    return pytest.approx(float(model.optimizer.learning_rate), rel=1e-4)


def test_a_task_that_nobody_compiled_trains_at_the_rate_for_adapters():
    task = bert_classifier()
    assert rate_of(task) == 5e-5
    enable_dcft(task, kernel_size=4)
    assert rate_of(task) == 5e-3
    task.fit(TEXTS, LABELS, verbose=0)
    for release in (merge_dcft, remove_dcft):
        assert rate_of(release(task)) == 5e-5
        assert rate_of(enable_dcft(task, kernel_size=4)) == 5e-3


def test_compiling_by_default_takes_it_too():
    task = enable_dcft(bert_classifier(), kernel_size=4)
    task.compile(keras.optimizers.Adam(1e-2))
    assert rate_of(task) == 1e-2
    task.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    assert rate_of(task) == 5e-3
    task = keras_hub.models.GPT2CausalLM(
        keras_hub.models.GPT2Backbone(
            vocabulary_size=30, num_layers=1, num_heads=2, hidden_dim=16, intermediate_dim=36
        )
    )
    assert rate_of(enable_dcft(task, kernel_size=4)) == 5e-3
    task.compile(sampler="greedy")
    assert rate_of(task) == 5e-3


def test_a_task_from_a_file_or_preset_has_it(tmp_path):
    task = enable_dcft(bert_classifier(), kernel_size=4)
    task.save_to_preset(str(tmp_path / "preset"))
    loaded = keras_hub.models.TextClassifier.from_preset(str(tmp_path / "preset"))
    assert rate_of(loaded) == 5e-3
    task.save(tmp_path / "model.keras")
    for other in (
        keras.saving.load_model(tmp_path / "model.keras"),
        pickle.loads(pickle.dumps(task)),
    ):
        assert rate_of(other) == 5e-3


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: keras.optimizers.Adam(1e-3),
        lambda: keras.optimizers.Adam(5e-5, beta_1=0.8),
        lambda: keras.optimizers.SGD(5e-5),
        lambda: keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(5e-5, 10)),
        lambda: keras.optimizers.Adam(constant),
    ],
)
def test_a_users_own_optimizer_is_left_alone(optimizer):
    task = bert_classifier()
    task.compile(optimizer(), loss="sparse_categorical_crossentropy")
    before = task.optimizer.get_config()
    enable_dcft(task, kernel_size=4)
    task.fit(TEXTS, LABELS, verbose=0)
    remove_dcft(task)
    assert task.optimizer.get_config() == before


def test_a_low_rate_is_warned_of_once():
    model = enable_dcft(sequential(), kernel_size=4)
    model.compile(keras.optimizers.AdamW(1e-4), "mse")
    with pytest.warns(UserWarning, match="at 0.0001 adapters learn next to nothing"):
        model.fit(vectors(), np.ones((4, 9)), verbose=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Compile with a larger|Little of the model")
        model.fit(vectors(), np.ones((4, 9)), verbose=0)
        for quiet in (keras.optimizers.Adam(5e-4), keras.optimizers.SGD(1e-5)):
            model.compile(quiet, "mse")
            model.fit(vectors(), np.ones((4, 9)), verbose=0)
        task = enable_dcft(bert_classifier(), kernel_size=4)
        task.fit(TEXTS, LABELS, verbose=0)
        enable_dcft(bert_backbone(), kernel_size=4)


def test_a_model_of_which_little_is_adapted_is_warned_of():
    inputs = keras.Input((6, 8))
    outputs = keras.layers.Dense(3, name="head")(keras.layers.LSTM(32, name="memory")(inputs))
    with pytest.warns(UserWarning, match=r"1\.9 % of its 5,347.*'memory/lstm_cell' \(LSTMCell\)"):
        enable_dcft(keras.Model(inputs, outputs), kernel_size=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = keras.Model(inputs, outputs)
        remove_dcft(model)
        enable_dcft(model, kernel_size=2, target_layers="head")
        remove_dcft(model)
        enable_dcft(model, kernel_size=2, trainable_layers="memory")


def test_a_new_head_that_would_stay_as_it_is_is_warned_of():
    inputs = keras.Input((12,))
    body = keras.Model(inputs, keras.layers.Dense(10)(keras.layers.Dense(10)(inputs)))
    model = keras.Model(inputs, keras.layers.Dense(9, name="head")(body.output))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        remove_dcft(enable_dcft(model, kernel_size=4))  # all of it is new
        body.set_weights([np.ones(weight.shape) for weight in body.weights])
        remove_dcft(enable_dcft(model, kernel_size=4, trainable_layers="head"))
        remove_dcft(enable_dcft(model, kernel_size=4, target_layers=".*"))
        task = bert_classifier()
        task.backbone.set_weights([np.ones(weight.shape) for weight in task.backbone.weights])
        task.backbone.get_layer("pooled_dense").bias.assign(np.zeros(16))  # as MiniLM's is
        enable_dcft(task, kernel_size=4)
    with pytest.warns(UserWarning, match=r"'head' looks new.*trainable_layers=\['\^head\$'\]"):
        enable_dcft(model, kernel_size=4)
