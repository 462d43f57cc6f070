"""Where the time goes: training steps and predictions by kind of operation.

    python benchmarks/profile_step.py                       # everything, some 20 minutes
    python benchmarks/profile_step.py --backends jax
    python benchmarks/profile_step.py --report              # the table from the results

Each subject runs in a process of its own on one CPU core, so that what its operations take adds up
to the time of the whole. Three kinds are told apart: products of matrices, *thin* products, which
have a side of at most 16 (with the expanded factors: `rank * kernel_size` columns), and other
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
from training_step import (
    BACKENDS,
    FLOOR,
    FULL_INCREMENT,
    MAIN,
    PEFT,
    device,
    make_step,
    store,
    versions,
    work,
)

RESULTS = Path(__file__).parent / "results" / "profile.json"
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
THIN = 16
RUNS = 5


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
        "backend": backend,
        "model": subject,
        "device": device(),
        "versions": versions(),
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
    sides = {}
    for path in glob.glob(f"{folder}/hlo/*cpu_after_optimizations.txt"):
        module = Path(path).name.split(".")[1]
        for instruction, side in smallest_sides(Path(path).read_text()).items():
            sides[module, instruction] = side
    for event in events(folder):
        stats = dict(event.stats)
        if "hlo_op" in stats:
            side = sides.get((stats["hlo_module"], stats["hlo_op"]))
            kinds[kind_of(side)] += event.duration_ns / 1e6
    return kinds


def smallest_sides(program) -> dict:
    """Of each instruction of an XLA program that is or holds a product, its smallest side."""
    shapes, in_computation, sides, calls = {}, {}, {}, {}
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
            operands = [shapes[computation, operand] for operand in operands]
            # Stacks of matrices, as attention multiplies, are none of an adapter's products.
            matrices = [shapes[computation, name], *operands]
            flat = all(len(matrix) <= 2 for matrix in matrices)
            side = min(min(matrix, default=1) for matrix in matrices) if flat else THIN + 1
            sides[name] = in_computation[computation] = side
        called = re.search(r"calls=%([\w.\-]+)", rest)
        if called:
            calls[name] = called[1]
    for name, called in calls.items():
        if called in in_computation:
            sides[name] = in_computation[called]
    return sides


def tensorflow_profile(run, folder) -> Counter:
    import tensorflow as tf

    options = tf.profiler.experimental.ProfilerOptions(python_tracer_level=0)
    with tf.profiler.experimental.Profile(folder, options):
        kinds = Counter({"all": milliseconds_of(run)})
    for event in events(folder):
        # What a thread runs is called `name/in/the/model:Operation`.
        name, _, operation = event.name.rpartition(":")
        if not name or "::" in event.name or event.name.startswith("Eager"):
            continue
        side = None
        if "MatMul" in operation or "Einsum" in operation:
            # The base layers' products are `Tensordot/MatMul` and `einsum/Einsum`.
            thin = operation.endswith("MatMul") and "Batch" not in operation
            side = THIN if thin and "Tensordot" not in name and "einsum" not in name else THIN + 1
        kinds[kind_of(side)] += event.duration_ns / 1e6
    return kinds


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
        side = None
        if event.key in ("aten::mm", "aten::addmm"):
            matrices = [shape for shape in event.input_shapes if len(shape) == 2]
            side = min(n for shape in matrices for n in shape)
        elif event.key in ("aten::bmm", "aten::baddbmm") or "attention" in event.key:
            side = THIN + 1
        kinds[kind_of(side)] += event.self_cpu_time_total / 1e3
    return kinds


def kind_of(smallest_side) -> str:
    if smallest_side is None:
        return "other operations"
    return "thin products" if smallest_side <= THIN else "products"


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
