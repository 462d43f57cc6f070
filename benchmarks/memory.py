"""Memory of a decoder's training step and of what comes before it: DCFT, LoRA and the floor.

    python benchmarks/memory.py                    # PyTorch and JAX, an hour on one core
    python benchmarks/memory.py --backends jax --subjects "no second copy"
    python benchmarks/memory.py --report           # the tables, into docs/scaling.md

A random Llama of 107 M parameters, each decoder block rematerialized (`keras.remat`), the base in
bfloat16, int8 or int4. The *floor* trains one vector, the first block's norm. Each number comes
from a process of its own: the highest memory in a second and third training step, above what the
process had before the model was made, when it had trained a tiny one. On JAX also what XLA counts.
One JSON line for each in `benchmarks/results/memory.jsonl`; what is there is not measured again.
"""

import argparse
import ctypes
import functools
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import measuring
from measuring import add_line, conditions, fill, lines_of, memory_in_use, work

RESULTS = measuring.RESULTS / "memory.jsonl"
PAGE = measuring.DOCS / "scaling.md"
BACKENDS = ("torch", "jax")
SIZE = {
    "vocabulary_size": 8192,
    "num_layers": 8,
    "num_query_heads": 16,
    "num_key_value_heads": 4,
    "hidden_dim": 1024,
    "intermediate_dim": 2816,
}
LARGE = {
    "vocabulary_size": 32000,
    "num_layers": 16,
    "num_query_heads": 32,
    "num_key_value_heads": 8,
    "hidden_dim": 2048,
    "intermediate_dim": 8192,
}
FLOOR, DCFT = "floor", "DCFT, kernel size 8"
METHODS = (FLOOR, DCFT, "LoRA, rank 1", "LoRA, rank 8")
BASES = ("bfloat16", "int8", "int4")
TOKENS, MANY_TOKENS = 512, 4096
if measuring.QUICK:
    SIZE |= {"vocabulary_size": 64, "num_layers": 1, "num_query_heads": 4}
    SIZE |= {"hidden_dim": 64, "intermediate_dim": 32}
    LARGE = SIZE
    METHODS, BASES, TOKENS, MANY_TOKENS = (FLOOR, DCFT), ("bfloat16",), 8, 16
TRAINING, COPIES, WRITING = "training step", "no second copy", "writing"
DONE = (
    "enabling",
    "loading an adapter file",
    "loading `.keras`, plain",
    "loading `.keras`, adapted",
)
if measuring.QUICK:
    DONE = ("enabling",)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="+", default=BACKENDS)
    parser.add_argument("--subjects", nargs="+", default=(TRAINING, COPIES))
    parser.add_argument("--report", action="store_true", help="print the tables, fill the page")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.report:
        return report(lines_of(RESULTS))
    if options.worker:
        setting = json.loads(options.worker)
        worker = {TRAINING: training_step, COPIES: no_second_copy, WRITING: written}
        result = worker[setting["subject"]](setting)
        return print("RESULT " + json.dumps({**setting, **result, **conditions("Llama")}))
    # What is freed goes back to the system at once, so that the next peak is not above it.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    # For CPUs alone XLA orders operations to run at the same time, and then makes all kernels
    # float32 before it needs the first.
    os.environ["XLA_FLAGS"] = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
    done = lines_of(RESULTS)
    for backend in options.backends:
        for setting in settings(backend):
            if setting["subject"] not in options.subjects:
                continue
            asked = {**setting, "backend": backend}
            if any(is_of(run, asked) for run in done):
                continue
            print(backend, setting, flush=True)
            try:
                result = work(__file__, backend, json.dumps(setting))
            except subprocess.CalledProcessError:  # Keras's LoRA in integers, on PyTorch
                result = {**asked, "failed": True}
            add_line(result, RESULTS)


def is_of(run, setting) -> bool:
    return all(run.get(key) == setting.get(key) for key in (*setting, "is_large"))


def settings(backend):
    for base in BASES:
        for method in METHODS:
            yield {"subject": TRAINING, "base": base, "tokens": TOKENS, "method": method}
    for what in DONE:
        yield {"subject": COPIES, "what": what}
    if backend == "torch":  # alone: these take minutes each
        on_bfloat16 = {"subject": TRAINING, "base": "bfloat16"}
        for method in METHODS:
            yield {**on_bfloat16, "tokens": MANY_TOKENS, "method": method}
        for method in METHODS[:3]:
            yield {**on_bfloat16, "tokens": TOKENS, "method": method, "is_large": True}


# --- what a worker does ---


def make_model(**size):
    import keras
    import keras_hub

    keras.config.set_dtype_policy("bfloat16")
    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.LlamaBackbone(**{**SIZE, **size})
    return keras_hub.models.LlamaCausalLM(backbone=backbone, preprocessor=None)


def rematerialize(block):
    """Computes a block's activations again in the backward pass.

    As `keras.RematScope` does, which on JAX makes a tracer of `training`, at which dropout fails.
    """
    import keras

    call = block.call

    def call_again(*args, training=None, **kwargs):
        return keras.remat(functools.partial(call, training=training))(*args, **kwargs)

    block.call = call_again


def training_step(setting) -> dict:
    import numpy as np

    warm_up()
    before = memory_in_use()
    model = make_model(**(LARGE if "is_large" in setting else {}))
    parameters = model.count_params()
    if setting["base"] != "bfloat16":
        model.quantize(setting["base"])
    base_bytes = sum(bytes_of(weight) for weight in model.weights)
    apply(model, setting["method"])
    step = train(model, setting["tokens"])
    settle()  # quantizing and compiling are over
    losses = [step(), step()]
    return {
        "parameters": parameters,
        "base_bytes": base_bytes,
        "trainable": sum(int(np.prod(v.shape)) for v in model.trainable_variables),
        "losses": losses,
        "peak_bytes": memory_in_use() - before,
        **counted_by_xla(),
    }


def counted_by_xla() -> dict:
    """What the largest of JAX's compiled functions needs, the step: its arguments and the rest."""
    import keras

    if keras.backend.backend() != "jax":
        return {}
    import jax

    compiled = jax.devices()[0].client.live_executables()
    sizes = [executable.get_compiled_memory_stats() for executable in compiled]
    return {"counted_bytes": max(s.argument_size_in_bytes + s.temp_size_in_bytes for s in sizes)}


def train(model, tokens):
    """Takes a first step; returns what takes a step and gives its loss."""
    import keras
    import numpy as np

    for block in model.backbone.transformer_layers:
        rematerialize(block)
    model.compile(
        optimizer=keras.optimizers.Adam(1e-4),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    tokens = np.random.default_rng(0).integers(1, SIZE["vocabulary_size"], (1, tokens))
    inputs = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}

    def step():
        model.reset_metrics()
        return float(model.train_on_batch(inputs, tokens)[0])

    step()
    return step


def apply(model, method):
    """Trains what a method trains, which is nothing in the embeddings and the output layer."""
    import keras

    from keras_dcft import enable_dcft

    if method == DCFT:
        enable_dcft(model, kernel_size=8)
        return
    for variable in model.trainable_variables:
        variable.trainable = False
    if method == FLOOR:
        [norm, *_] = (v for v in model.variables if "0/self_attention_layernorm" in v.path)
        norm.trainable = True
        return
    for layer in model._flatten_layers():
        if isinstance(layer, (keras.layers.Dense, keras.layers.EinsumDense)):
            layer.enable_lora(int(method.split()[-1]))


def no_second_copy(setting) -> dict:
    """The highest memory while something is done, above what was there before it was."""
    import keras

    from keras_dcft import enable_dcft, load_dcft_weights

    warm_up()
    what = setting["what"]
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "model.keras" if "keras" in what else "adapter.dcft.safetensors"))
        if what != "enabling":  # in a process of its own: this one never had that model
            asked = {"subject": WRITING, "what": what, "path": path}
            work(__file__, keras.backend.backend(), json.dumps(asked))
        model = None if "keras" in what else make_model()
        settle()
        before = memory_in_use()
        if what == "enabling":
            enable_dcft(model, kernel_size=8)
        elif model is not None:
            load_dcft_weights(model, path)
        else:
            model = keras.models.load_model(path, compile=False)
        added = memory_in_use() - before
    base = [weight for weight in model.weights if "/dcft_" not in weight.path]
    return {"base_bytes": sum(map(bytes_of, base)), "added_bytes": added}


def written(setting) -> dict:
    from keras_dcft import enable_dcft, save_dcft_weights

    model = make_model()
    if "plain" not in setting["what"]:
        enable_dcft(model, kernel_size=8)
    if "keras" in setting["what"]:
        model.save(setting["path"])
    else:
        save_dcft_weights(model, setting["path"])
    return {}


def warm_up():
    """Loads what every program loads by its first step: libraries, threads, the compiler."""
    train(make_model(num_layers=1, hidden_dim=128, intermediate_dim=256), TOKENS)
    settle()


def settle():
    """Waits for what JAX is still at work on, and gives back what was freed."""
    import keras

    if keras.backend.backend() == "jax":
        import jax

        jax.block_until_ready(jax.live_arrays())
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    memory_in_use()  # from which the peak starts anew


def bytes_of(weight) -> int:
    return weight.value.nbytes


# --- the page ---


def report(runs):
    text = training_table(runs) + "\n\n" + copies_table(runs)
    fill(PAGE, "memory.py", text)
    print(text)


def training_table(runs) -> str:
    lines = [
        "| backend | parameters | base | its bytes | tokens | floor | "
        + " | ".join(f"{method} | / floor" for method in METHODS[1:])
        + " |",
        "|---|---:|---|---:|---:|---:|" + "---:|" * (2 * len(METHODS) - 2),
    ]
    peaks = {}
    for run in (run for run in runs if run["subject"] == TRAINING):
        key = run["backend"], run["base"], run["tokens"], "is_large" in run
        peaks.setdefault(key, {})[run["method"]] = run
    for (backend, base, tokens, _), by_method in peaks.items():
        if not {FLOOR, DCFT} <= set(by_method):
            continue
        floor = by_method[FLOOR]
        for counted, name in (("peak_bytes", backend), ("counted_bytes", f"{backend}, counted")):
            if counted in floor:
                cells = [cells_of(by_method.get(m), floor, counted) for m in METHODS[1:]]
                lines.append(
                    f"| {name} | {floor['parameters'] / 1e6:,.0f} M | {base} "
                    f"| {megabytes(floor['base_bytes'])} | {tokens:,} "
                    f"| {megabytes(floor[counted])} | {' | '.join(cells)} |"
                )
    return "\n".join(lines)


def cells_of(run, floor, counted) -> str:
    if run is None:
        return "- | -"
    if "failed" in run:
        return "fails | -"
    return f"{megabytes(run[counted])} | {run[counted] / floor[counted]:.2f}"


def copies_table(runs) -> str:
    lines = ["| backend | what | added at its peak | share of the base |", "|---|---|---:|---:|"]
    for run in runs:
        if run["subject"] == COPIES:
            lines.append(
                f"| {run['backend']} | {run['what']} | {megabytes(run['added_bytes'])} "
                f"| {run['added_bytes'] / run['base_bytes']:.2f} |"
            )
    return "\n".join(lines)


def megabytes(number_of_bytes) -> str:
    return f"{number_of_bytes / 1e6:,.0f} MB"


if __name__ == "__main__":
    sys.exit(main())
