"""Fine-tunes a causal language model with DCFT on a mesh of devices, with JAX.

    python examples/finetune_on_many_devices.py                        # 8 virtual devices of a CPU
    python examples/finetune_on_many_devices.py --mesh 4x2 --shard-adapters
    python examples/finetune_on_many_devices.py --preset gemma2_2b_en --mesh 2x4 --dtype bfloat16
    python examples/finetune_on_many_devices.py --preset gemma2_27b_en --cluster --only-on-mesh

The same program runs on a CPU, several GPUs and a TPU pod. Without a preset it takes a small Gemma
with random weights. KerasHub's own layout map cuts the base over a mesh of data-parallel x
model-parallel devices; `enable_dcft` adapts it where it lies, and each device has all adapters or,
with `--shard-adapters`, its part. It trains through `model.fit` on NumPy's docstrings or on files,
prints how everything lies and what each device holds, writes the adapter file and loads it again
into the model on one device, where losses and outputs must be the same.

On a cluster, start it with `--cluster` once for each process: on a TPU pod nothing else is needed,
elsewhere `keras.distribution.initialize` reads `KERAS_DISTRIBUTION_JOB_ADDRESSES` and the like.
"""

import argparse
import collections
import math
import os
import sys
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

from support.command_line import (
    LEARNING_RATES,
    OneLineParser,
    file_size,
    import_quietly,
    positive_float,
    positive_int,
    progress_verbosity,
    run_or_exit,
)

AXES = ("batch", "model")


def mesh_sizes(text: str) -> tuple:
    sizes = tuple(map(positive_int, text.split("x")))
    if len(sizes) != len(AXES):
        raise argparse.ArgumentTypeError(f"must be two numbers, such as 2x4. Received: {text}")
    return sizes


def parse_options(arguments=None):
    parser = OneLineParser("Fine-tunes a causal language model with DCFT on a mesh of devices.")
    add = parser.add_argument
    add(
        "--mesh",
        type=mesh_sizes,
        help="data-parallel x model-parallel, such as 2x4; without it two rows of all devices",
    )
    add(
        "--devices",
        type=positive_int,
        help="how many; without it as --mesh, else all, 8 virtual ones of a CPU",
    )
    add("--cluster", action="store_true", help="this is one of several processes")
    add("--shard-adapters", action="store_true", help="cut adapters as their layers' weights are")
    add("--only-on-mesh", action="store_true", help="the base does not fit one device")
    add("--preset", help="KerasHub preset or folder; without it a small Gemma, random")
    add("--dtype", default="float32", help="of weights and activations, such as bfloat16")
    add("--text-file", nargs="+", default=[], help="UTF-8 files; without them NumPy's docstrings")
    add("--train-size", type=positive_int, help="the first texts alone; without it all")
    add("--kernel-size", type=positive_int, default=8, help="larger trains fewer numbers")
    add("--rank", type=positive_int, default=1, help="inside the subspace")
    add("--epochs", type=positive_int, default=3, help="how often to go through the data")
    add("--batch-size", type=positive_int, default=8, help="texts in a step, on all devices")
    rate = LEARNING_RATES["dcft"]
    add("--learning-rate", type=positive_float, default=rate, help="of Adam")
    add("--sequence-length", type=positive_int, default=48, help="tokens in a text")
    add("--seed", type=int, default=0, help="of data and training")
    add("--output-dir", default="finetuned/many_devices", help="where the adapter is written")
    options = parser.parse_args(arguments)
    if options.mesh is not None:
        options.devices = options.devices or math.prod(options.mesh)
        rows, columns = options.mesh
        if rows * columns != options.devices:
            parser.error(
                f"argument --mesh: must have a place for each of {options.devices} devices. "
                f"Received: {rows}x{columns}"
            )
        if options.batch_size % rows:
            parser.error(
                f"argument --batch-size: must be a multiple of the mesh's first size, {rows}. "
                f"Received: {options.batch_size}"
            )
    return options


if __name__ == "__main__":
    parse_options()  # so that --help and mistakes need not wait for the imports

import_quietly("keras_hub")

import keras
import keras_hub
import numpy as np
import tensorflow as tf
from support.corpora import docstring_corpus, file_corpus, read_text
from support.small_gpt2 import byte_pair_tokenizer

from keras_dcft import enable_dcft, load_dcft_weights, save_dcft_weights, shard_adapters

VIRTUAL_DEVICES = 8
SMALL_GEMMA = {
    "vocabulary_size": 1024,
    "num_layers": 2,
    "num_query_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 16,
    "hidden_dim": 128,
    "intermediate_dim": 256,
}
HELD_OUT_TEXTS = 64


def main(arguments=None):
    run_or_exit(run, parse_options(arguments))


def run(options):
    texts = {path: read_text(path) for path in options.text_file}
    devices = start_devices(options)
    corpus = None if texts else docstring_corpus(("numpy",), options.seed)
    keras.config.set_dtype_policy(options.dtype)
    preprocessor = load_preprocessor(options, list(texts.values()) or corpus.train)
    if texts:
        # The start token takes one place.
        corpus = file_corpus(texts, preprocessor.tokenizer, options.sequence_length - 1)
    batches = batches_of(corpus.train[: options.train_size], preprocessor, options)
    held_out = batches_of(corpus.held_out[:HELD_OUT_TEXTS], preprocessor, options)
    shape = options.mesh or mesh_shape(len(devices))
    mesh = keras.distribution.DeviceMesh(shape, AXES, devices)
    say(f"Mesh: {' x '.join(map(str, mesh.shape))} of {devices[0]} to {devices[-1]}, {AXES}.")

    path = Path(options.output_dir, "adapter.dcft.safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    losses, logits = train_on(mesh, batches, held_out, path, options)
    difference = None
    if is_first() and not options.only_on_mesh:
        alone = load_dcft_weights(make(options), path)
        compile_model(alone, options)
        losses["held out, on one device"] = held_out_loss(alone, held_out)
        if logits is not None:
            difference = np.abs(logits_of(alone, held_out) - logits).max() / np.abs(logits).max()
    if is_first():
        report(losses, difference, path)
        check(losses, difference, options)


# --- devices ---


def start_devices(options) -> list:
    """The names of the devices to use, which JAX makes at its first use and no more."""
    if keras.backend.backend() != "jax":
        raise ValueError(
            "`keras.distribution` cuts models with JAX: start this program with "
            f"KERAS_BACKEND=jax. Received: KERAS_BACKEND={keras.backend.backend()}"
        )
    import jax

    # Which has no effect on GPUs and TPUs.
    processes = int(os.environ.get("KERAS_DISTRIBUTION_NUM_PROCESSES", 1))
    jax.config.update("jax_num_cpu_devices", (options.devices or VIRTUAL_DEVICES) // processes)
    if options.cluster:
        keras.distribution.initialize()
    found = keras.distribution.list_devices()
    if len(found) < (options.devices or 1):
        raise ValueError(f"--devices: there are {len(found)}. Received: {options.devices}")
    return found[: options.devices]


def mesh_shape(count) -> tuple:
    """Two rows, where that many devices make two."""
    return (2, count // 2) if count % 2 == 0 else (1, count)


def is_cluster() -> bool:
    import jax

    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this is the process that prints and reads back."""
    import jax

    return jax.process_index() == 0


def say(text):
    if is_first():
        print(text, flush=True)


# --- model and training ---


def load_preprocessor(options, texts):
    """What makes tokens of texts: before `fit`, so that Keras can share batches among processes."""
    length = options.sequence_length
    if options.preset is None:
        # Any tokenizer does for weights that are random.
        tokenizer = byte_pair_tokenizer(texts, SMALL_GEMMA["vocabulary_size"])
        return keras_hub.models.GPT2CausalLMPreprocessor(tokenizer, sequence_length=length)
    return keras_hub.models.CausalLMPreprocessor.from_preset(options.preset, sequence_length=length)


def make(options):
    """The model on one device or, in a distribution's scope, on many."""
    keras.utils.set_random_seed(options.seed)
    if options.preset is None:
        backbone = keras_hub.models.GemmaBackbone(**SMALL_GEMMA)
        return keras_hub.models.GemmaCausalLM(backbone, preprocessor=None)
    return keras_hub.models.CausalLM.from_preset(options.preset, preprocessor=None)


def adapted_on(mesh, options):
    """The distribution of KerasHub's layout map, and an adapted model that was made under it."""
    backbone = backbone_class(options.preset)
    layout_map = backbone.get_layout_map(mesh, *reversed(AXES))
    distribution = keras.distribution.ModelParallel(layout_map=layout_map, batch_dim_name=AXES[0])
    with distribution.scope():
        model = enable_dcft(make(options), kernel_size=options.kernel_size, rank=options.rank)
        if options.shard_adapters:
            shard_adapters(layout_map, model)
        compile_model(model, options)
    return distribution, model


def backbone_class(preset):
    """The class of a preset's backbone, before there is one: its layout map comes first."""
    if preset is None:
        return keras_hub.models.GemmaBackbone
    with keras.StatelessScope(initialize_variables=False):
        model = keras_hub.models.Backbone.from_preset(preset, load_weights=False)
    keras.utils.clear_session()  # which forgets what would be given values at the next chance
    if not hasattr(type(model), "get_layout_map"):
        raise ValueError(
            f"--preset: {type(model).__name__} must have a `get_layout_map`, as Gemma's and "
            f"Llama's backbones have. Received: {preset}"
        )
    return type(model)


def train_on(mesh, batches, held_out, path, options):
    """Trains on a mesh and writes the adapter file; returns losses by name, and logits."""
    distribution, model = adapted_on(mesh, options)
    with distribution.scope():
        losses = {"held out, before": held_out_loss(model, held_out)}
        losses |= {f"epoch {n}": loss for n, loss in enumerate(fit(model, batches, options), 1)}
        losses["held out, after"] = held_out_loss(model, held_out)
        say(f"\n{layout_table(model)}\n\n{memory_table(model)}")
        save_dcft_weights(model, path)
        # What lies on several processes `predict` cannot give to one of them.
        return losses, None if is_cluster() else logits_of(model, held_out)


def compile_model(model, options):
    model.compile(
        optimizer=keras.optimizers.Adam(options.learning_rate),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=[],
    )


def batches_of(texts, preprocessor, options):
    """Whole batches, which can be cut over the mesh's first axis."""
    if len(texts) < options.batch_size:
        raise ValueError(
            f"--batch-size must be at most the number of texts, {len(texts)}. "
            f"Received: {options.batch_size}"
        )
    tokens = keras.tree.map_structure(np.array, preprocessor(texts))
    return tf.data.Dataset.from_tensor_slices(tokens).batch(options.batch_size, drop_remainder=True)


def fit(model, batches, options) -> list:
    """Trains; returns the mean loss of each epoch."""
    trainable = sum(math.prod(v.shape) for v in model.trainable_variables)
    say(f"Training {trainable:,} of {model.count_params():,} parameters.")
    verbose = progress_verbosity() if is_first() else 0
    return model.fit(batches, epochs=options.epochs, shuffle=False, verbose=verbose).history["loss"]


def held_out_loss(model, batches) -> float:
    return model.evaluate(batches, verbose=0, return_dict=True)["loss"]


def logits_of(model, batches):
    """What the model says to the first batch."""
    inputs, _, _ = next(iter(batches))
    return model.predict(inputs, verbose=0).astype("float32")


# --- report ---


def layout_table(model) -> str:
    """How weights lie: those of one name that lie alike in one line."""
    kinds = collections.Counter()
    for variable in model.variables:
        sharding = variable.value.sharding
        is_adapter = variable.name.startswith("dcft_")
        name = "/".join(variable.path.split("/")[-1 if is_adapter else -2 :])
        axes = ", ".join(axis or "-" for axis in sharding.spec)
        part, whole = map(math.prod, (sharding.shard_shape(variable.shape), variable.shape))
        cut = f"by ({axes})" if part < whole else "whole everywhere"
        kinds[name, cut, f"1/{whole // part}"] += 1
    lines = [f"{'Weight':<34}{'number':>6}  {'cut':<24}on each device"]
    for (name, cut, share), number in kinds.items():
        lines.append(f"{name:<34}{number:>6}  {cut:<24}{share:>14}")
    return "\n".join(lines)


def memory_table(model) -> str:
    """What the devices of this process hold, and beside it what the whole would be on one."""
    optimizer = model.optimizer.variables
    adapters = [v for v in model.variables if v.name.startswith("dcft_")]
    theirs = {id(v) for v in adapters}
    base = [v for v in model.variables if id(v) not in theirs]
    lines = [f"{'Memory':<18}{'each device, MB':>18}{'one alone, MB':>18}"]
    for name, variables in {"base": base, "adapters": adapters, "optimizer": optimizer}.items():
        held = collections.Counter()
        for shard in (s for v in variables for s in v.value.addressable_shards):
            held[shard.device] += shard.data.nbytes
        whole = sum(v.value.nbytes for v in variables)
        lines.append(f"{name:<18}{max(held.values()) / 1e6:>18,.3f}{whole / 1e6:>18,.3f}")
    peaks = [device.memory_stats() for device in held]
    if all(peaks):  # a CPU does not count
        most = max(peak["peak_bytes_in_use"] for peak in peaks)
        lines.append(f"{'peak':<18}{most / 1e6:>18,.3f}")
    return "\n".join(lines)


def report(losses, difference, path):
    print("\nLoss")
    for name, loss in losses.items():
        print(f"  {name:<26}{loss:.5f}")
    print(f"\nWritten     {path} ({file_size(path)})")
    if difference is not None:
        print(f"Outputs     differ on one device by {difference:.1e} of the largest")


def check(losses, difference, options):
    """Ends the program if one device does not compute what the mesh did."""
    # Sums in another order round differently.
    tolerance = 1e-4 if options.dtype == "float32" else 2e-2
    mesh = losses["held out, after"]
    alone = losses.get("held out, on one device", mesh)
    if abs(alone / mesh - 1) > tolerance or (difference or 0) > tolerance:
        sys.exit("error: the adapter file does not give on one device what the mesh had.")


if __name__ == "__main__":
    main()
