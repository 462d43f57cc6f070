"""One of two processes that make one mesh, each with half of 8 devices: see tests/mesh_test.py.

Arguments: a folder of its own, one that both have, its number, and a free port.
"""

import json
import sys
from pathlib import Path

import jax
import keras
import mesh_program
import numpy as np
from mesh_program import adapters_of, difference, lie_alike, make, outputs
from tools import randomize_adapters, values

from keras_dcft import enable_dcft, load_dcft_weights, merge_dcft, save_dcft_weights, shard_adapters

own, common, number, port = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
keras.distribution.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=number)
assert jax.device_count() == 8

SETTINGS = {"kernel_size": 4, "rank": 2, "trainable_layers": "ffw_linear$"}
INPUTS, TARGETS = mesh_program.INPUTS, mesh_program.TARGETS


def losses(model, rows=slice(None)):
    model.compile(
        optimizer=keras.optimizers.Adam(0.01),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    inputs, targets = {name: x[rows] for name, x in INPUTS.items()}, TARGETS[rows]
    weights = np.ones(targets.shape)  # Keras 3.13 cannot lay out that there are none
    found = []
    for _ in range(3):
        model.reset_metrics()
        step = model.train_on_batch(inputs, targets, weights, return_dict=True)
        found.append(float(step["loss"]))
    return found


seen = {}
layout_map = mesh_program.layout_map_of("gemma", (4, 2))
distribution = keras.distribution.ModelParallel(layout_map=layout_map, auto_shard_dataset=False)
one = enable_dcft(make("gemma"), **SETTINGS)
randomize_adapters(one)
expected = losses(one)
with distribution.scope():
    model = make("gemma")
    shardings = [v.value.sharding for v in model.weights]
    enable_dcft(model, **SETTINGS)
    randomize_adapters(model)
    shard_adapters(layout_map, model)
    # Keras takes the rows of this process and makes one batch of those of all.
    seen["losses"] = difference(losses(model, np.split(np.arange(8), 2)[number]), expected)
    assert not all(v.value.is_fully_replicated for v in adapters_of(model))
    save_dcft_weights(model, own / "own.dcft.safetensors")
    save_dcft_weights(model, common / "common.dcft.safetensors")
    seen["written"] = sorted(path.name for path in own.iterdir())
    merge_dcft(model)
    seen["the merged base lies as the base"] = lie_alike(model.weights, shardings)
if number == 0:
    read = load_dcft_weights(make("gemma"), common / "common.dcft.safetensors")
    seen["adapters"] = difference(values(adapters_of(read)), values(adapters_of(one)))
    seen["outputs"] = difference(outputs(read), outputs(one))
print(json.dumps(seen))
