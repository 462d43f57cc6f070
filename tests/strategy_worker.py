"""One process of a training with TensorFlow's strategies; `strategy_test.py` starts them."""

import json
import os
import signal
import sys

import tensorflow as tf

if "TF_CONFIG" in os.environ:
    # Before anything of TensorFlow's is computed: the strategy starts the communication.
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    worker = strategy.cluster_resolver.task_id
else:
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    worker = 0

import keras
import numpy as np
from tools import array, sequential, values, vectors

from keras_dcft import (
    DCFTCheckpoint,
    activate_dcft,
    dcft_disabled,
    enable_dcft,
    load_dcft_weights,
    merge_dcft,
    read_dcft_notes,
    remove_dcft,
    save_dcft_weights,
)

EPOCHS, BATCH_SIZE = 4, 8
DATA = vectors(16), vectors(16, 9)


def train(strategy, model, inputs, labels, epochs, batch_size, callbacks=()):
    """Trains an adapted, compiled Keras model that was made in the strategy's scope."""
    variables, optimizer = model.trainable_variables, model.optimizer
    with strategy.scope():
        optimizer.build(variables)
    callbacks = keras.callbacks.CallbackList(callbacks, model=model)
    callbacks.on_train_begin()

    def step_of_a_replica(x, y):
        with tf.GradientTape() as tape:
            loss = model.compute_loss(x, y, model(x, training=True), training=True)
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))
        return loss  # which Keras has divided by the number of replicas

    @tf.function
    def step_of_all(x, y):
        return strategy.reduce("SUM", strategy.run(step_of_a_replica, (x, y)), axis=None)

    steps, losses = len(labels) // batch_size, []
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    for epoch in range(int(optimizer.iterations.numpy()) // steps, epochs):
        callbacks.on_epoch_begin(epoch)
        order = np.random.default_rng(epoch).permutation(len(labels))  # the same everywhere
        rows = keras.tree.map_structure(lambda a: a[order], (inputs, labels))  # noqa: B023
        batches = tf.data.Dataset.from_tensor_slices(rows).batch(batch_size).with_options(options)
        for step, batch in enumerate(strategy.experimental_distribute_dataset(batches)):
            callbacks.on_train_batch_begin(step)
            losses.append(float(step_of_all(*batch)))
            callbacks.on_train_batch_end(step, {"loss": losses[-1]})
        callbacks.on_epoch_end(epoch, {"loss": np.mean(losses[-steps:])})
    callbacks.on_train_end()
    return losses


def adapted_model(what):
    """An adapter file has no state of an optimizer, so there it is one that has none."""
    keras.utils.set_random_seed(0)
    model = sequential()
    enable_dcft(model, kernel_size=4, orthogonality=0.1, trainable_layers="normalization")
    is_stateless = what == "checkpoint"
    optimizer = keras.optimizers.SGD(0.1) if is_stateless else keras.optimizers.Adam(0.03)
    model.compile(optimizer, "mse")
    return model


class Killed(keras.callbacks.Callback):
    """Ends the process in the middle of an epoch."""

    def on_train_batch_begin(self, batch, logs=None):
        if int(self.model.optimizer.iterations.numpy()) == 5:
            os.kill(os.getpid(), signal.SIGKILL)


def fit_with_checkpoint(model, folder, killed):
    """`fit` on two devices of one process."""
    path, epoch = folder / "latest.dcft.safetensors", 0
    if path.exists():
        load_dcft_weights(model, path)
        epoch = read_dcft_notes(path)["notes"]["epoch"]
    callbacks = [DCFTCheckpoint(path), *killed]
    options = {"batch_size": BATCH_SIZE, "shuffle": False, "verbose": 0}
    history = model.fit(*DATA, epochs=EPOCHS, initial_epoch=epoch, callbacks=callbacks, **options)
    return history.history["loss"]


def train_with_backup(model, folder, killed):
    """A loop of two processes. All read the backup, the first writes it."""
    save_freq = "epoch" if worker == 0 else sys.maxsize
    backup = keras.callbacks.BackupAndRestore(
        folder / "backup", save_freq, delete_checkpoint=worker == 0
    )
    return train(strategy, model, *DATA, EPOCHS, BATCH_SIZE, [backup, *killed])


def verbs(model, base, path):
    """How far the outputs are from what they should be."""
    inputs, labels = DATA
    outputs = array(model(inputs))

    def away_from(expected):
        return float(np.abs(array(model(inputs)) - expected).max())

    with dcft_disabled(model):
        seen = {"disabled": away_from(base)}
    enable_dcft(model, kernel_size=8, name="other")
    activate_dcft(model, "other")
    seen["enabled"] = away_from(base)
    losses = train(strategy, model, inputs, labels, 1, BATCH_SIZE)
    is_trained = float(away_from(base) > 0)
    activate_dcft(model, "default")
    seen["activated"] = away_from(outputs)
    remove_dcft(model)
    seen["removed"] = away_from(base)
    load_dcft_weights(model, path)
    seen["loaded"] = away_from(outputs)
    return {"zero": seen, "trained": is_trained, "losses": losses}


def main(folder, what, number):
    with strategy.scope():
        model = adapted_model(what)
    inputs, _ = DATA
    with dcft_disabled(model):
        base = array(model(inputs))
    killed = [Killed()] if worker == number else []
    run = {"checkpoint": fit_with_checkpoint, "backup": train_with_backup}[what]
    seen = {"losses": run(model, folder, killed)}
    np.savez(folder / f"{worker}.npz", array(model(inputs)), *values(model.trainable_variables))
    path = folder / "a.dcft.safetensors"
    if worker == 0:
        model.save(folder / "m.keras")
        save_dcft_weights(model, path)
    outputs = array(model(inputs))
    seen["outside"] = verbs(model, base, path)
    with strategy.scope():
        seen["inside"] = verbs(model, base, path)
        merge_dcft(model)
    seen["merged"] = float(np.abs(array(model(inputs)) - outputs).max())
    (folder / f"{worker}.json").write_text(json.dumps(seen))
