"""One process of a training with PyTorch's DistributedDataParallel; `ddp_test.py` starts them."""

import json
import os
import signal
import sys

import keras
import numpy as np
import torch
import torch.distributed as dist
from tools import LABELS, TEXTS, array, bert_classifier, values
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

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


def train(module, inputs, labels, epochs, batch_size, callbacks=()):
    """Trains an adapted, compiled Keras model inside of a DistributedDataParallel."""
    model, rank, processes = module.module, dist.get_rank(), dist.get_world_size()
    variables = model.trainable_variables
    callbacks = keras.callbacks.CallbackList(callbacks, model=model)
    callbacks.on_train_begin()
    steps, losses = len(labels) // batch_size, []
    for epoch in range(int(model.optimizer.iterations) // steps, epochs):
        callbacks.on_epoch_begin(epoch)
        order = np.random.default_rng(epoch).permutation(len(labels))  # the same everywhere
        for step in range(steps):
            callbacks.on_train_batch_begin(step)
            rows = order[step * batch_size :][:batch_size][rank::processes]
            x = {name: torch.as_tensor(value[rows]) for name, value in inputs.items()}
            y = torch.as_tensor(labels[rows])
            model.zero_grad()
            loss = model.compute_loss(x, y, module(x, training=True), training=True)
            loss.backward()  # averages the gradients over the processes
            with torch.no_grad():
                model.optimizer.apply([v.value.grad for v in variables], variables)
            dist.all_reduce(loss := loss.detach() / processes)
            losses.append(float(loss))
            callbacks.on_train_batch_end(step, {"loss": losses[-1]})
        callbacks.on_epoch_end(epoch, {"loss": np.mean(losses[-steps:])})
    callbacks.on_train_end()
    return losses


def adapted_classifier(what):
    """An adapter file has no state of an optimizer, so there it is one that has none."""
    keras.utils.set_random_seed(0)
    is_stateless = what == "checkpoint"
    optimizer = keras.optimizers.SGD(0.1) if is_stateless else keras.optimizers.Adam(0.03)
    model = enable_dcft(bert_classifier(), kernel_size=4, orthogonality=0.1)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=None)
    return model


def data(model):
    return keras.tree.map_structure(array, model.preprocessor(TEXTS)), LABELS


def undisturbed(folder):
    """Trains, counting what is sent; then every verb, on every process."""
    rank = dist.get_rank()
    model = adapted_classifier("undisturbed")
    inputs, labels = data(model)
    with dcft_disabled(model):
        base = array(model(inputs))
    module = DistributedDataParallel(model)
    sent = []

    def counted(_, bucket):
        sent.append(bucket.buffer().nbytes)
        return allreduce_hook(dist.group.WORLD, bucket)

    module.register_comm_hook(None, counted)
    seen = {"losses": train(module, inputs, labels, EPOCHS, BATCH_SIZE), "sent": sent}
    if rank == 0:
        save_dcft_weights(model, folder / "a.dcft.safetensors")
        model.save(folder / "m.keras")
    outputs = array(module(inputs).detach())
    np.savez(folder / f"{rank}.npz", outputs, *values(model.trainable_variables))
    with dcft_disabled(model), torch.no_grad():
        seen["disabled"] = float(np.abs(array(module(inputs)) - base).max())

    enable_dcft(model, kernel_size=8, name="other")
    activate_dcft(model, "other")
    module = DistributedDataParallel(model)
    seen["losses of the other"] = train(module, inputs, labels, 1, BATCH_SIZE)
    seen["others"] = [array(v).tolist() for v in model.trainable_variables]
    activate_dcft(model, "default")
    seen["activated"] = float(np.abs(array(model(inputs).detach()) - outputs).max())
    remove_dcft(model)
    seen["removed"] = float(np.abs(array(model(inputs).detach()) - base).max())
    dist.barrier()
    load_dcft_weights(model, folder / "a.dcft.safetensors")
    seen["loaded"] = float(np.abs(array(model(inputs).detach()) - outputs).max())
    merge_dcft(model)
    seen["merged"] = float(np.abs(array(model(inputs).detach()) - outputs).max())
    return seen


class Killed(keras.callbacks.Callback):
    """Ends the process in the middle of an epoch."""

    def on_train_batch_begin(self, batch, logs=None):
        if int(self.model.optimizer.iterations) == 5:
            os.kill(os.getpid(), signal.SIGKILL)


def with_backup(folder, killed):
    """All read the backup, the first process writes it."""
    rank = dist.get_rank()
    model = adapted_classifier("backup")
    save_freq = "epoch" if rank == 0 else sys.maxsize
    backup = keras.callbacks.BackupAndRestore(
        folder / "backup", save_freq, delete_checkpoint=rank == 0
    )
    module = DistributedDataParallel(model)
    return train(module, *data(model), EPOCHS, BATCH_SIZE, [backup, *killed])


def with_checkpoint(folder, killed):
    """All read the adapter file, the first process writes it."""
    path = folder / "latest.dcft.safetensors"
    model = adapted_classifier("checkpoint")
    inputs, labels = data(model)
    if path.exists():
        load_dcft_weights(model, path)
        steps = len(labels) // BATCH_SIZE
        model.optimizer.iterations.assign(read_dcft_notes(path)["notes"]["epoch"] * steps)
    callbacks = [DCFTCheckpoint(path)] if dist.get_rank() == 0 else []
    module = DistributedDataParallel(model)
    return train(module, inputs, labels, EPOCHS, BATCH_SIZE, [*callbacks, *killed])


def main(folder, what, *arguments):
    dist.init_process_group("gloo")
    if what == "undisturbed":
        seen = undisturbed(folder)
    else:
        killed = [Killed()] if arguments == ("killed",) and dist.get_rank() == 1 else []
        seen = {"backup": with_backup, "checkpoint": with_checkpoint}[what](folder, killed)
    (folder / f"{what}{dist.get_rank()}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()
