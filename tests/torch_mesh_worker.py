"""One process of a training with `keras.distribution` on PyTorch; `torch_mesh_test.py` starts it.

Each check is done beside the same in this process alone. Writes differences, and bools.
"""

import json

import keras
import keras_hub
import numpy as np
import torch.distributed as dist
from tools import array, differences, randomize_adapters

from keras_dcft import enable_dcft, load_dcft_weights, merge_dcft, remove_dcft, save_dcft_weights

RNG = np.random.default_rng(0)
INPUTS = {
    "token_ids": RNG.integers(1, 64, (8, 6)),
    "padding_mask": np.ones((8, 6), "int32"),
}
TARGETS = RNG.integers(1, 64, (8, 6))


def make():
    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.GemmaBackbone(
        vocabulary_size=64,
        num_layers=1,
        num_query_heads=4,
        num_key_value_heads=4,
        hidden_dim=32,
        intermediate_dim=64,
        head_dim=8,
    )
    model = enable_dcft(keras_hub.models.GemmaCausalLM(backbone), kernel_size=4)
    randomize_adapters(model)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss)
    return model


def losses(model, rows=slice(None)):
    inputs, targets = {name: x[rows] for name, x in INPUTS.items()}, TARGETS[rows]
    settings = {"batch_size": len(targets), "epochs": 3, "shuffle": False, "verbose": 0}
    return model.fit(inputs, targets, **settings).history["loss"]


def whole(variables):
    """As arrays; of what lies in parts every process has to ask."""
    tensors = [v.value.detach() for v in variables]
    return [array(t.full_tensor() if hasattr(t, "full_tensor") else t) for t in tensors]


def placements(variables):
    return [str(getattr(v.value, "placements", None)) for v in variables]


def distribution_of(kind):
    """Each process is given its own rows; Keras cannot divide what tasks make of arrays."""
    if kind == "data":
        return keras.distribution.DataParallel(auto_shard_dataset=False)
    mesh = keras.distribution.DeviceMesh((1, 2), ("batch", "model"))
    layout_map = keras_hub.models.GemmaBackbone.get_layout_map(mesh)
    return keras.distribution.ModelParallel(
        layout_map=layout_map, batch_dim_name="batch", auto_shard_dataset=False
    )


def main(folder, kind):
    keras.distribution.initialize()
    rank = dist.get_rank()
    one = make()
    expected = losses(one)
    path = folder / "a.dcft.safetensors"
    with distribution_of(kind).scope():
        model = make()
        base = [v for v in model.weights if not v.trainable]
        before = placements(base)
        seen = {"some weights are in parts": any("Shard" in place for place in before)}
        # Along its batch axis the mesh of ModelParallel has one device, which has all rows.
        rows = np.split(np.arange(8), 2)[rank] if kind == "data" else slice(None)
        seen["losses"] = max(differences(losses(model, rows), expected))
        trained = whole(model.trainable_variables)
        seen["adapters"] = max(differences(trained, whole(one.trainable_variables)))
        save_dcft_weights(model, path)
        dist.barrier()
        remove_dcft(model)
        load_dcft_weights(model, path)
        seen["loaded"] = max(differences(whole(model.trainable_variables), trained))
        merge_dcft(model)
        seen["the base lies as before"] = placements(model.weights) == before
        merged = whole(model.weights)
    merge_dcft(one)
    seen["merged"] = max(differences(merged, whole(one.weights)))
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()
