"""Trains an adapted model on a mesh of virtual devices, and may kill itself in the middle.

    main(FOLDER, "backup" or "checkpoint")    # dies in the third epoch
    main(FOLDER)                              # goes on with both

The second writes as JSON, `losses.json`, the losses of the epochs that each came to, beside those
of a training that nothing disturbed.
"""

import json
import os
import signal

import keras
import numpy as np

from keras_dcft import DCFTCheckpoint, enable_dcft, load_dcft_weights

EPOCHS = 4
KINDS = ("backup", "checkpoint")


class Death(keras.callbacks.Callback):
    """Kills the process in the middle of an epoch, without a chance to tidy up."""

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.epoch == 2 and batch == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder, kind, *callbacks):
    """The losses of the epochs that were left to do, and on how many devices the model lies."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((12,)), keras.layers.Dense(8), keras.layers.Dense(4)])
    enable_dcft(model, kernel_size=2)
    first = 0
    if kind == "backup":
        own = keras.callbacks.BackupAndRestore(folder / "backup")
        optimizer = keras.optimizers.Adam(0.05)
    else:
        own = DCFTCheckpoint(str(folder / "{epoch}.dcft.safetensors"))
        written = sorted(folder.glob("*.dcft.safetensors"))
        if written:
            load_dcft_weights(model, written[-1])
            first = int(written[-1].name.partition(".")[0])
        optimizer = keras.optimizers.SGD(0.05)  # which has no state that would be lost
    model.compile(optimizer, "mse")
    rng = np.random.default_rng(0)
    inputs, targets = rng.normal(size=(32, 12)), rng.normal(size=(32, 4))
    history = model.fit(
        inputs,
        targets,
        batch_size=8,
        shuffle=False,
        epochs=EPOCHS,
        initial_epoch=first,
        callbacks=[*callbacks, own],
        verbose=0,
    )
    kernel = model.layers[0].dcft_frozen_weight().value
    return history.history["loss"], len(kernel.sharding.device_set)


def main(folder, *dying):
    mesh = keras.distribution.DataParallel(devices=keras.distribution.list_devices("cpu"))
    with mesh.scope():
        for kind in dying:
            train(folder / kind, kind, Death())
        seen = {
            name: train(folder / name, kind)
            for kind in KINDS
            for name in (f"undisturbed {kind}", kind)
        }
    (folder / "losses.json").write_text(json.dumps(seen))
