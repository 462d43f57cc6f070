"""Where the time goes: training steps and predictions by kind of operation.

    python benchmarks/profile_step.py                       # everything, some 20 minutes
    python benchmarks/profile_step.py --backends jax
    python benchmarks/profile_step.py --report              # the table from the results

Each subject runs in a process of its own on one CPU core, so that what its operations take adds up
to the time of the whole. Three kinds are told apart: products of matrices, *thin* products, which
have a side of 8 or 16 (as the expanded factors have, `rank * kernel_size` wide), and other
operations: sums, copies, random numbers, normalizations. What is left is Python, calling the
backend, and on PyTorch the profiler itself. Products are recognised by their shapes on JAX (in
XLA's compiled program) and PyTorch, and by their names on TensorFlow, whose profiler does not tell
shapes. Results go to `benchmarks/results/profile.json`.
"""

import argparse
import glob
import json
import os
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import inference
import measuring
from measuring import BACKENDS, conditions, store, work
from training_step import FLOOR, FULL_INCREMENT, MAIN, PEFT, make_step

RESULTS = measuring.RESULTS / "profile.json"
LORA = "Keras LoRA, rank 1"
STEPS = (FLOOR, MAIN, LORA, FULL_INCREMENT, PEFT)
PREDICTIONS = ("base", "adapted")
SUBJECTS = {
    "minilm, training step": STEPS,
    "base, training step": STEPS,
    "minilm, predict": PREDICTIONS,
    "generate, predict": PREDICTIONS,
}
KINDS = ("products", "thin products", "other operations")
WIDTHS = (8, 16)  # of the expanded factors; 16 on PyTorch
RUNS = 5
if measuring.QUICK:
    SUBJECTS = {"base, training step": (FLOOR, MAIN)}
    RUNS = 1


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="+", default=BACKENDS, choices=BACKENDS)
    parser.add_argument("--subjects", nargs="+", default=SUBJECTS, choices=SUBJECTS)
    parser.add_argument("--report", action="store_true", help="print the table and stop")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.report:
        return print(table(json.loads(RESULTS.read_text())))
    if options.worker:
        return print("RESULT " + json.dumps(measure(*options.worker)))
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    for backend in options.backends:
        for subject in options.subjects:
            result = {}
            for variant in SUBJECTS[subject]:
                if variant == PEFT and backend != "torch":
                    continue
                print(f"{backend}, {subject}: {variant}", flush=True)
                measured = work(__file__, backend, subject, variant)
                result.setdefault("milliseconds", {})[variant] = measured.pop("milliseconds")
                result.update(measured)
            store(result, RESULTS)


def measure(subject, variant) -> dict:
    import keras

    backend = keras.backend.backend()
    with tempfile.TemporaryDirectory() as folder:
        # Before JAX starts; only it heeds this.
        os.environ["XLA_FLAGS"] = f"--xla_dump_to={folder}/hlo --xla_dump_hlo_as_text"
        model, what = subject.split(", ")
        if what == "training step":
            run = make_step(model, variant)
        elif model == "generate":
            run = inference.make_generator(model, variant)
        else:
            run = inference.make_predictor(model, variant)
        for _ in range(3):
            run()
        profile = {"jax": jax_profile, "tensorflow": tensorflow_profile, "torch": torch_profile}
        kinds = profile[backend](run, folder)
    milliseconds = {kind: round(kinds[kind] / RUNS, 2) for kind in (*KINDS, "all")}
    return {
        **conditions(subject),
        "milliseconds": milliseconds,
    }


def milliseconds_of(run) -> float:
    start = time.perf_counter()
    for _ in range(RUNS):
        run()
    return 1000 * (time.perf_counter() - start)


def jax_profile(run, folder) -> Counter:
    import jax

    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # it would slow down what it looks at
    with jax.profiler.trace(folder, profiler_options=options):
        kinds = Counter({"all": milliseconds_of(run)})
    thin = {}
    for path in glob.glob(f"{folder}/hlo/*cpu_after_optimizations.txt"):
        module = Path(path).name.split(".")[1]
        for instruction, is_so in thin_products(Path(path).read_text()).items():
            thin[module, instruction] = is_so
    for event in events(folder):
        stats = dict(event.stats)
        if "hlo_op" in stats:
            kind = kind_of(thin.get((stats["hlo_module"], stats["hlo_op"])))
            kinds[kind] += event.duration_ns / 1e6
    return kinds


def thin_products(program) -> dict:
    """Of each instruction of an XLA program that is or holds a product, whether it is thin."""
    shapes, thin_in, thin, calls = {}, {}, {}, {}
    computation = None
    for line in program.splitlines():
        if line.endswith("{"):
            computation = re.match(r"(?:ENTRY )?%?([\w.\-]+)", line)[1]
            continue
        found = re.match(r"\s+(?:ROOT )?%([\w.\-]+) = \w+\[([\d,]*)\]\S* ([\w\-]+)\((.*)", line)
        if not found:
            continue
        name, shape, operation, rest = found.groups()
        shapes[computation, name] = [int(n) for n in shape.split(",") if n]
        if operation == "dot":
            operands = re.findall(r"%([\w.\-]+)", rest)[:2]
            tensors = [shapes[computation, one] for one in (name, *operands)]
            thin[name] = thin_in[computation] = is_thin(tensors)
        called = re.search(r"calls=%([\w.\-]+)", rest)
        if called:
            calls[name] = called[1]
    return thin | {name: thin_in[called] for name, called in calls.items() if called in thin_in}


def is_thin(shapes) -> bool:
    # Stacks of matrices, as attention multiplies, are none of an adapter's products.
    flat = all(len(shape) <= 2 for shape in shapes)
    return flat and any(side in WIDTHS for shape in shapes for side in shape)


def tensorflow_profile(run, folder) -> Counter:
    import tensorflow as tf

    options = tf.profiler.experimental.ProfilerOptions(python_tracer_level=0)
    with tf.profiler.experimental.Profile(folder, options):
        kinds = Counter({"all": milliseconds_of(run)})
    spent, products = Counter(), {}
    for event in events(folder):
        # What a thread runs is called `name/in/the/model:Operation`.
        name, _, operation = event.name.rpartition(":")
        if not name or "::" in event.name or event.name.startswith("Eager"):
            continue
        product = None
        if "MatMul" in operation or "Einsum" in operation:
            product = product_of(name, operation)
            products.setdefault(product[0], set()).add(product[1])
        spent[product] += event.duration_ns / 1e6
    for product, milliseconds in spent.items():
        thin = None if product is None else is_one_of_last_two(product[1], products[product[0]])
        kinds[kind_of(thin)] += milliseconds
    return kinds


def product_of(name, operation) -> tuple[str, str]:
    """The layer's and the product's own name in that of a TensorFlow operation or its gradient.

    What Keras multiplies as `Tensordot/MatMul` or `einsum/Einsum` has no name of its own, nor have
    stacks of matrices, as attention multiplies.
    """
    name = name.replace("gradient_tape/", "").replace("ArithmeticOptimizer/", "")
    found = re.match(r"(.*?)/(?:FoldTransposeInto)?(?:MatMul_)?(MatMul(?:_\d+)?)(?:/|$)", name)
    if not found or "Batch" in operation or "Tensordot" in name or "einsum/" in name:
        return name, ""
    return found.groups()


def is_one_of_last_two(product, products) -> bool:
    """Whether a product is thin: an adapted layer multiplies with its two factors last."""
    numbered = sorted(products - {""}, key=lambda one: int(one.partition("_")[2] or 0))
    return len(numbered) > 1 and product in numbered[-2:]


def events(folder):
    from jax.profiler import ProfileData

    [path] = glob.glob(f"{folder}/plugins/profile/*/*.xplane.pb")
    for plane in ProfileData.from_file(path).planes:
        for line in plane.lines:
            yield from line.events


def torch_profile(run, folder) -> Counter:
    import torch

    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        kinds = Counter({"all": milliseconds_of(run)})
    for event in profile.key_averages(group_by_input_shape=True):
        if not event.key.startswith("aten::"):
            continue
        thin = None
        if event.key in ("aten::mm", "aten::addmm"):
            thin = is_thin([shape for shape in event.input_shapes if len(shape) == 2])
        elif event.key in ("aten::bmm", "aten::baddbmm") or "attention" in event.key:
            thin = False
        kinds[kind_of(thin)] += event.self_cpu_time_total / 1e3
    return kinds


def kind_of(thin) -> str:
    """Of an operation's time; None is for what is no product."""
    return {None: "other operations", True: "thin products", False: "products"}[thin]


def table(results) -> str:
    rows = [
        "| | backend | | products | thin products | other operations | Python, calls | all |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for run in results:
        for variant, spent in run["milliseconds"].items():
            parts = [spent[kind] for kind in KINDS]
            numbers = (*parts, spent["all"] - sum(parts), spent["all"])
            told = " | ".join(f"{number:.0f}" for number in numbers)
            rows.append(f"| {run['model']} | {run['backend']} | {variant} | {told} |")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
