"""Trains an adapted model on a mesh of virtual devices, and may kill itself in the middle.

    python killed_training_program.py FOLDER backup|checkpoint EPOCH_TO_DIE_IN

Prints the losses of the epochs that it came to, as JSON. Started again, it goes on.
"""

import json
import os
import signal
import sys
from pathlib import Path

import keras
import numpy as np

from keras_dcft import DCFTCheckpoint, enable_dcft, load_dcft_weights

EPOCHS = 4
folder, kind, dies_in = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])


class Death(keras.callbacks.Callback):
    """Kills the process in the middle of an epoch, without a chance to tidy up."""

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.epoch == dies_in and batch == 1:
            os.kill(os.getpid(), signal.SIGKILL)


devices = keras.distribution.list_devices("cpu")
mesh = keras.distribution.DataParallel(devices=devices)
with mesh.scope():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((12,)), keras.layers.Dense(8), keras.layers.Dense(4)])
    enable_dcft(model, kernel_size=2)
    first, callbacks = 0, [Death()]
    if kind == "backup":
        callbacks.append(keras.callbacks.BackupAndRestore(folder / "backup"))
        optimizer = keras.optimizers.Adam(0.05)
    else:
        callbacks.append(DCFTCheckpoint(str(folder / "{epoch}.dcft.safetensors")))
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
        callbacks=callbacks,
        verbose=0,
    )
kernel = model.layers[0].dcft_frozen_weight().value
print(json.dumps({"losses": history.history["loss"], "devices": len(kernel.sharding.device_set)}))
