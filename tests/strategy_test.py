"""TensorFlow's strategies, on two devices of one process and in two processes on loopback."""

import json

import keras
import numpy as np
import pytest
from tools import array, differences, sequential, values, vectors
from workers import free_ports, run_program, run_workers

from keras_dcft import enable_dcft, load_dcft_weights, merge_dcft, remove_dcft

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="about TensorFlow's strategies"
)

OUTSIDE_OF_THE_SCOPE = """
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import sys
import numpy as np
import keras
from tools import differences, sequential, subclassed, values, vectors
from keras_dcft import (
    dcft_disabled, enable_dcft, load_dcft_weights, merge_dcft, remove_dcft, save_dcft_weights
)

strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
path = sys.argv[1] + "/a.dcft.safetensors"


def check(make, inputs, targets, *verbs):
    with strategy.scope():
        model = make()
    model.fit(inputs, targets, batch_size=4, verbose=0)
    for undo in verbs:
        enable_dcft(model, kernel_size=4)
        trained = model.trainable_variables
        frozen = [v for v in model.weights if not v.trainable]
        before, before_frozen = values(trained), values(frozen)
        model.fit(inputs, targets, batch_size=4, epochs=3, verbose=0)
        assert max(differences(before, values(trained))) > 0
        assert max(differences(before_frozen, values(frozen))) == 0
        with dcft_disabled(model):
            model.predict(inputs, verbose=0)
        save_dcft_weights(model, path)
        load_dcft_weights(model, path)
        undo(model)
        before = values(model.trainable_variables)
        model.fit(inputs, targets, batch_size=4, verbose=0)
        assert max(differences(before, values(model.trainable_variables))) > 0
    load_dcft_weights(model, path)
    model.fit(inputs, targets, batch_size=4, verbose=0)
    print("fine")


plain = sequential()
with strategy.scope():
    try:
        enable_dcft(plain, kernel_size=4)
    except ValueError as error:
        print("fine", "Leave the scope of the strategy" in str(error))
plain.fit(vectors(8), np.ones((8, 9)), verbose=0)
check(sequential, vectors(8), np.ones((8, 9)), remove_dcft, merge_dcft)
check(subclassed, vectors(8), np.ones((8, 4, 5)), merge_dcft)
"""


def test_every_verb_outside_of_the_scope(tmp_path):
    printed = run_program(OUTSIDE_OF_THE_SCOPE, tmp_path / "log", tmp_path)
    assert [line[:4] for line in printed.splitlines()].count("fine") == 3


def one_device(optimizer, orders):
    """Two batches of rows in each of these orders, with Keras's own step.

    Returns:
        The model and the losses of the steps.
    """
    keras.utils.set_random_seed(0)
    model = sequential()
    enable_dcft(model, kernel_size=4, orthogonality=0.1, trainable_layers="normalization")
    model.compile(optimizer, "mse")
    inputs, targets, losses = vectors(16), vectors(16, 9), []
    for order in orders:
        for rows in np.split(order, 2):
            model.reset_metrics()
            losses.append(float(model.train_on_batch(inputs[rows], targets[rows])))
    return model, losses


def assert_is_as_on_one_device(seen, folder, model):
    """What a process says of the verbs, what it trained and what was written."""
    for of_the_verbs in (seen["outside"], seen["inside"]):
        assert of_the_verbs["zero"] == dict.fromkeys(of_the_verbs["zero"], 0)
        assert of_the_verbs["trained"]
    assert 0 <= seen["merged"] < 1e-5
    trained = values(model.trainable_variables)
    outputs, *found = np.load(folder / "0.npz").values()
    assert max(differences(found, trained)) < 1e-4  # Adam divides by what may be tiny
    restored = keras.saving.load_model(folder / "m.keras")
    loaded = load_dcft_weights(remove_dcft(model), folder / "a.dcft.safetensors")
    for one in (restored, loaded):
        assert max(differences(found, values(one.trainable_variables))) == 0
        assert np.abs(array(one(vectors(16))) - outputs).max() < 1e-5
        assert np.abs(array(merge_dcft(one)(vectors(16))) - outputs).max() < 1e-5


def test_fit_on_two_devices_killed_and_restarted_is_as_on_one(tmp_path):
    program = "strategy_worker"
    run_workers(program, [{}], tmp_path, "checkpoint", 0, killed=0)
    run_workers(program, [{}], tmp_path, "checkpoint", -1)
    seen = json.loads((tmp_path / "0.json").read_text())
    model, losses = one_device(keras.optimizers.SGD(0.1), [np.arange(16)] * 4)
    epochs = np.reshape(losses, (4, 2)).mean(1)
    assert seen["losses"] == pytest.approx(epochs[2:], rel=1e-5)  # it was killed in the third
    assert_is_as_on_one_device(seen, tmp_path, model)


def environments():
    """Those of two workers of one cluster."""
    cluster = {"worker": [f"127.0.0.1:{port}" for port in free_ports(2)]}
    for index in range(2):
        task = {"type": "worker", "index": index}
        yield {"TF_CONFIG": json.dumps({"cluster": cluster, "task": task})}


def test_a_loop_in_two_processes_killed_and_restarted_is_as_in_one(tmp_path):
    program = "strategy_worker"
    run_workers(program, environments(), tmp_path, "backup", 1, killed=1)
    run_workers(program, environments(), tmp_path, "backup", -1)
    first, second = (json.loads((tmp_path / f"{worker}.json").read_text()) for worker in range(2))
    orders = [np.random.default_rng(epoch).permutation(16) for epoch in range(4)]
    model, losses = one_device(keras.optimizers.Adam(0.03), orders)
    assert first["losses"] == second["losses"] == pytest.approx(losses[4:], rel=1e-5)
    of_first, of_second = (np.load(tmp_path / f"{worker}.npz").values() for worker in range(2))
    assert max(differences(of_first, of_second)) == 0
    assert first["inside"] == second["inside"]
    assert_is_as_on_one_device(first, tmp_path, model)
