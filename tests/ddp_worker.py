"""One process of a training with several of PyTorch's; `ddp_test.py` starts them."""

import gc
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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
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


def train(model, module, inputs, labels, epochs, batch_size, callbacks=()):
    """Trains an adapted, compiled Keras model; `module` calls it and averages gradients."""
    rank, processes = dist.get_rank(), dist.get_world_size()
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


def shard_base(model, blocks, mesh):
    """Cuts the frozen weights of blocks into parts, and averages the gradients of the others."""
    for block in blocks:
        frozen = [v for v in block.weights if not v.trainable]
        whole = {v.value for v in block.variables} - {v.value for v in frozen}
        fully_shard(block, mesh=mesh, ignored_params=whole, reshard_after_forward=True)
        block.unshard()
        for variable in frozen:  # from now on what is gathered whenever the block computes
            variable._value = block.torch_params[variable.path]
        block.reshard()
    in_blocks = {id(layer) for block in blocks for layer in block._flatten_layers()}
    for layer in model._flatten_layers():  # the layers around have the uncut weights still
        if id(layer) not in in_blocks:
            layer.torch_params.update({v.path: v.value for v in layer.variables})

    def average(parameter):
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()

    for variable in model.trainable_variables:
        variable.value.register_post_accumulate_grad_hook(average)


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
    seen = {"losses": train(model, module, inputs, labels, EPOCHS, BATCH_SIZE), "sent": sent}
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
    seen["losses of the other"] = train(model, module, inputs, labels, 1, BATCH_SIZE)
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


def bytes_held():
    """Of all tensors that this process has."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def sharded(folder):
    """Trains with a base of which each process has its part."""
    rank = dist.get_rank()
    model = adapted_classifier("sharded")
    inputs, labels = data(model)
    blocks = [layer for layer in model.backbone.layers if hasattr(layer, "intermediate_dim")]
    base = [v for block in blocks for v in block.weights if not v.trainable]
    model.optimizer.build(model.trainable_variables)
    seen = {"base": sum(v.value.nbytes for v in base), "held": [bytes_held()]}
    shard_base(model, blocks, init_device_mesh("cpu", (dist.get_world_size(),)))
    seen["held"].append(bytes_held())
    seen["losses"] = train(model, model, inputs, labels, EPOCHS, BATCH_SIZE)
    model.zero_grad()
    seen["held"].append(bytes_held())
    outputs = array(model(inputs).detach())
    np.savez(folder / f"{rank}.npz", outputs, *values(model.trainable_variables))
    for block in blocks:
        block.unshard()
    save_dcft_weights(model, folder / f"{rank}.dcft.safetensors")
    for block in blocks:
        block.reshard()
    seen["held"].append(bytes_held())
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
    return train(model, module, *data(model), EPOCHS, BATCH_SIZE, [backup, *killed])


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
    return train(model, module, inputs, labels, EPOCHS, BATCH_SIZE, [*callbacks, *killed])


def main(folder, what, *arguments):
    dist.init_process_group("gloo")
    if what in ("undisturbed", "sharded"):
        seen = {"undisturbed": undisturbed, "sharded": sharded}[what](folder)
    else:
        killed = [Killed()] if arguments == ("killed",) and dist.get_rank() == 1 else []
        seen = {"backup": with_backup, "checkpoint": with_checkpoint}[what](folder, killed)
    (folder / f"{what}{dist.get_rank()}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()
