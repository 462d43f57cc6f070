"""The main job on SST-2 with every method and backend: the table at the end of docs/results.md.

    python benchmarks/main_job.py --data-dir ~/tfds             # some two hours on two cores
    python benchmarks/main_job.py --table                       # the table from the results so far

Runs `examples/finetune_text_classifier.py` on 8,000 SST-2 sentences for 2 epochs, each run in its
own process, one JSON line each in `benchmarks/results/main_job.jsonl`; runs already there are
skipped, so that an interrupted benchmark goes on.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import measuring
from measuring import BACKENDS, add_line, lines_of, run_program

from keras_dcft.settings import DEFAULT_ALPHA

PROGRAM = measuring.ROOT / "examples" / "finetune_text_classifier.py"
RESULTS = measuring.RESULTS / "main_job.jsonl"
STEPS = measuring.RESULTS / "training_step.json"

# (backend, method, learning rate, seed, kernel size)
RUNS = [
    ("tensorflow", "dcft", 5e-3, 0, 8),
    ("tensorflow", "dcft", 5e-3, 1, 8),
    ("tensorflow", "dcft", 5e-3, 2, 8),
    ("tensorflow", "lora", 5e-3, 0, 8),
    ("tensorflow", "head", 5e-3, 0, 8),
    ("torch", "dcft", 5e-3, 0, 8),
    ("jax", "dcft", 5e-3, 0, 8),
    ("tensorflow", "lora", 1e-3, 0, 8),
    ("tensorflow", "full", 1e-4, 0, 8),
    ("tensorflow", "lora", 5e-3, 1, 8),
    ("tensorflow", "lora", 5e-3, 2, 8),
    ("tensorflow", "dcft", 1e-3, 0, 8),
    ("tensorflow", "dcft", 5e-3, 0, 4),
]
if measuring.QUICK:
    RUNS = [(backend, "dcft", 5e-3, 0, 8) for backend in BACKENDS]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="folder of tensorflow_datasets")
    parser.add_argument("--backends", nargs="+", default=BACKENDS, choices=BACKENDS)
    parser.add_argument("--table", action="store_true", help="print the table and stop")
    options = parser.parse_args()
    results = lines_of(RESULTS)
    # With another alpha it was another method; docs/ablation.md compares.
    results = [run for run in results if run.get("alpha") in (None, DEFAULT_ALPHA)]
    if options.table:
        return print(table(results))
    keys = ("backend", "method", "learning_rate", "seed", "kernel_size")
    done = {tuple(result[key] for key in keys) for result in results}
    for number, run in enumerate(RUNS, 1):
        backend, method, learning_rate, seed, kernel_size = run
        print(f"[{number}/{len(RUNS)}] {', '.join(map(str, run))}", flush=True)
        if run in done or backend not in options.backends:
            continue
        with tempfile.TemporaryDirectory() as folder:
            command = ["--dataset", "glue/sst2", "--train-size", "8000", "--epochs", "2"]
            command += ["--method", method, "--learning-rate", str(learning_rate)]
            command += ["--rank", "1", "--seed", str(seed)]
            command += ["--kernel-size", str(kernel_size)]
            command += ["--no-head-baseline", "--output-dir", folder]
            command += ["--data-dir", options.data_dir] if options.data_dir else []
            run_program(PROGRAM, backend, *command)
            result = json.loads((Path(folder) / "results.json").read_text())
        add_line(result, RESULTS)


NAME_OF_STEP = {"DCFT, kernel size 8": "DCFT, kernel size 8, rank 1"}
NAMES = {"lora": "Keras LoRA, rank 1", "head": "head only", "full": "full fine-tuning"}


def table(results) -> str:
    """A row for each method, backend and learning rate, with the accuracies of its seeds.

    The time of a step is that of `training_step.py`, where the methods take turns; these runs had
    the machine to themselves or shared it, as it came.
    """
    measured = [run for run in json.loads(STEPS.read_text()) if run["model"] == "minilm"]
    steps = {run["backend"]: run["methods"] for run in measured}
    groups = {}
    for run in sorted(results, key=lambda run: run["method"] != "dcft"):
        name = NAMES.get(run["method"], f"DCFT, kernel size {run['kernel_size']}")
        groups.setdefault((name, run["backend"], run["learning_rate"]), []).append(run)
    rows = [
        "| method | backend | trainable | learning rate | accuracy, by seed | mean | step |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for (name, backend, rate), runs in groups.items():
        step = steps[backend].get(NAME_OF_STEP.get(name, name))
        milliseconds = f"{step['milliseconds']['median']:.0f} ms" if step else ""
        found = [run["accuracy_after"] for run in sorted(runs, key=lambda run: run["seed"])]
        rows.append(
            f"| {name} | {backend} | {runs[0]['trainable_parameters']:,} | {rate:g} "
            f"| {', '.join(f'{x:.3f}' for x in found)} | {statistics.mean(found):.3f} "
            f"| {milliseconds} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    main()
