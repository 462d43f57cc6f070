r"""Fine-tunes a KerasHub encoder on GLUE tasks, and compares methods over seeds.

    python examples/finetune_glue.py --task rte --method dcft lora --seeds 0 1 2
    python examples/finetune_glue.py --task all --preset deberta_v3_base_en --data-dir ~/tfds
    python examples/finetune_glue.py --task mrpc --preset deberta_v3_base_en --recipe paper \
        --kernel-size 2

Each run appends one JSON line to `--output`. Runs that the file has already, with the same settings
and backend, are skipped, so that an interrupted sweep goes on. Scores are on the validation splits:
the labels of GLUE's test splits are not public.
"""

import functools
import itertools
import json
import statistics
import sys
import time
from pathlib import Path

from support.command_line import (
    LEARNING_RATES,
    OneLineParser,
    import_quietly,
    positive_float,
    positive_int,
    progress_verbosity,
    run_or_exit,
)

TASK_METRICS = {
    "cola": ("matthews",),
    "sst2": ("accuracy",),
    "mrpc": ("accuracy", "f1"),
    "qqp": ("accuracy", "f1"),
    "stsb": ("pearson", "spearman"),
    "mnli": ("accuracy",),
    "qnli": ("accuracy",),
    "rte": ("accuracy",),
    "wnli": ("accuracy",),
}
DEFAULTS = {"epochs": 3, "batch_size": 32, "sequence_length": None}


def parse_options(arguments=None):
    parser = OneLineParser(
        "Fine-tunes a KerasHub encoder on GLUE tasks, and compares methods over seeds."
    )
    add = parser.add_argument
    tasks = [*TASK_METRICS, "all"]
    add("--task", nargs="+", choices=tasks, required=True, help="what to train for, one by one")
    add("--preset", help="KerasHub preset or folder; without it the real MiniLM BERT")
    add("--data-dir", help="folder of tensorflow_datasets; without it, its own, and a download")
    ways = "what is trained, and how; several are compared"
    add("--method", nargs="+", choices=LEARNING_RATES, default=["dcft"], help=ways)
    add("--kernel-size", type=positive_int, default=8, help="DCFT's; larger trains fewer numbers")
    add("--rank", type=positive_int, default=1, help="DCFT's or LoRA's")
    rates = ", ".join(f"{rate:g} for {method}" for method, rate in LEARNING_RATES.items())
    add("--learning-rate", type=positive_float, help=f"where it starts; without it {rates}")
    add("--recipe", choices=["paper"], help="the authors' settings by task, for dcft")
    add("--epochs", type=positive_int, help="without it 3, or the recipe's")
    add("--batch-size", type=positive_int, help="examples in a step; without it 32")
    add("--train-size", type=positive_int, help="the most training examples to use")
    add("--seeds", type=int, nargs="+", default=[0], help="of data and training, one by one")
    add("--sequence-length", type=positive_int, help="without it as the data, or the recipe, wants")
    add("--output", default="finetuned/glue.jsonl", help="JSON lines file, appended to")
    options = parser.parse_args(arguments)
    if options.recipe and options.method != ["dcft"]:
        parser.error("--recipe paper is for --method dcft")
    return options


if __name__ == "__main__":
    parse_options()  # so that --help and mistakes need not wait for the imports

import_quietly("keras_hub")

import keras
import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from support.methods import (
    apply_method,
    build_optimizer,
    default_preset,
    linear_decay,
)
from support.text_classifier import batches, make_classifier
from support.text_data import check_glue_folder, glue_split, load_text_data

from keras_dcft import PAPER_RECIPES, LinearWarmupDecay


def main(arguments=None):
    run_or_exit(run, parse_options(arguments))


def run(options):
    everything = PAPER_RECIPES if options.recipe else TASK_METRICS
    tasks = everything if "all" in options.task else options.task
    for task in tasks:
        if task not in everything:
            raise ValueError(f"--recipe: the paper has no recipe for --task {task}")
    for task in tasks:
        check_glue_folder(task, options.data_dir)
    # Methods innermost: they share their data, and an interrupted sweep can be compared.
    sweep = dict.fromkeys(itertools.product(tasks, options.seeds, options.method))
    output = Path(options.output)
    known = finished_runs(output)
    results = []
    with open_output(output) as file:
        for number, (task, seed, method) in enumerate(sweep, 1):
            print(f"[{number}/{len(sweep)}] {task}, {method}, seed {seed}", flush=True)
            settings = settings_of(task, seed, method, options)
            result = next((done for done in known if settings.items() <= done.items()), None)
            if result is None:
                result = measure(settings, options.data_dir)
                file.write(json.dumps(result) + "\n")
                file.flush()
            else:
                print(f"    is in {output} already")
            results.append(result)
    # Outside of a terminal rich takes 80 columns, which MNLI does not fit.
    width = None if sys.stdout.isatty() else 110
    Console(highlight=False, width=width).print(table(results))


def finished_runs(path: Path) -> list:
    """The runs in a file; a line that was cut off when a sweep was killed is passed over."""
    runs = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else (), 1):
        try:
            runs.append(json.loads(line))
        except json.JSONDecodeError:
            print(f"{path}, line {number}: not JSON, ignored; its run is repeated if asked for.")
    return runs


def open_output(path: Path):
    """Opens a file to append lines, where its last one was cut off too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a")
    if path.read_bytes()[-1:] not in (b"", b"\n"):
        file.write("\n")
    return file


def settings_of(task, seed, method, options) -> dict:
    """What a run's result depends on; null is what the method does without, or the default."""
    defaults = {**DEFAULTS, "learning_rate": LEARNING_RATES[method]}
    if options.recipe:
        defaults = {name: PAPER_RECIPES[task][name] for name in defaults}
    return {
        "task": task,
        "method": method,
        "backend": keras.backend.backend(),
        "seed": seed,
        "preset": options.preset or str(default_preset()),
        "kernel_size": options.kernel_size if method == "dcft" else None,
        "rank": options.rank if method in ("dcft", "lora") else None,
        "recipe": options.recipe,
        "train_size": options.train_size,
        **{name: getattr(options, name) or default for name, default in defaults.items()},
    }


def measure(settings, data_dir) -> dict:
    """Trains one model, and adds to its settings what came of it."""
    keras.utils.clear_session()  # or a sweep would keep the graphs of all its models
    keras.utils.set_random_seed(settings["seed"])
    task = settings["task"]
    data, validation = load_task(task, data_dir, settings["train_size"], settings["seed"])
    recipe = PAPER_RECIPES[task] if settings["recipe"] else None
    head = {"dropout": recipe["head_dropout"]} if recipe else {}
    classifier = make_classifier(settings["preset"], data, settings["sequence_length"], **head)
    apply_method(classifier, settings["method"], settings["kernel_size"], settings["rank"], recipe)
    seconds = train(classifier, data, settings)
    metrics = {}
    for suffix, (texts, labels) in validation.items():
        outputs = classifier.predict(batches(texts, labels, 64), verbose=0)
        for name, value in task_metrics(task, labels, outputs).items():
            metrics[name + suffix] = value
    return {
        **settings,
        "train_examples": len(data.train_texts),
        "held_out_examples": sum(len(texts) for texts, _ in validation.values()),
        "metrics": metrics,
        "score": statistics.mean(metrics.values()),
        "trainable_parameters": sum(int(np.prod(v.shape)) for v in classifier.trainable_variables),
        "seconds": round(seconds, 1),
    }


@functools.lru_cache(maxsize=1)
def load_task(task, data_dir, train_size, seed):
    """A task's `TextData`, and {suffix of metric names: (texts, labels)} to validate on."""
    data = load_text_data(f"glue/{task}", data_dir, train_size, seed)
    if task != "mnli":
        return data, {"": (data.held_out_texts, data.held_out_labels)}
    mismatched, _ = glue_split(task, "validation_mismatched", data_dir)
    return data, {
        "_matched": (data.held_out_texts, data.held_out_labels),
        "_mismatched": tuple(map(list, zip(*mismatched))),
    }


def train(classifier, data, settings) -> float:
    """Trains with Adam and a linear decay, or as the paper; returns the seconds of `fit`."""
    dataset = batches(data.train_texts, data.train_labels, settings["batch_size"], settings["seed"])
    steps = settings["epochs"] * len(dataset)
    if data.classes:
        loss, metric = keras.losses.SparseCategoricalCrossentropy(from_logits=True), "accuracy"
    else:
        loss, metric = keras.losses.MeanSquaredError(), "mean_absolute_error"
    if settings["recipe"]:
        optimizer = paper_optimizer(PAPER_RECIPES[settings["task"]], settings, steps)
    else:
        optimizer = keras.optimizers.Adam(linear_decay(settings["learning_rate"], steps))
    classifier.compile(optimizer=optimizer, loss=loss, metrics=[metric])
    build_optimizer(classifier)
    start = time.perf_counter()
    classifier.fit(dataset, epochs=settings["epochs"], shuffle=False, verbose=progress_verbosity())
    return time.perf_counter() - start


def paper_optimizer(recipe, settings, steps):
    """AdamW with the authors' warm-up, which takes half of a training that is too short for it."""
    share = recipe.get("warmup_share", min(recipe.get("warmup_steps", 0) / steps, 0.5))
    schedule = LinearWarmupDecay(settings["learning_rate"], steps, warmup_share=share)
    return keras.optimizers.AdamW(schedule, weight_decay=recipe["weight_decay"])


# --- metrics ---


def task_metrics(task: str, labels, outputs) -> dict:
    """The task's metrics by name.

    Args:
        task: str.
        labels: list of n int, or of float in a regression.
        outputs: array (n, classes) of logits, or (n, 1) of values in a regression.
    """
    predictions = outputs[:, 0] if outputs.shape[1] == 1 else np.argmax(outputs, axis=1)
    return {name: float(METRICS[name](labels, predictions)) for name in TASK_METRICS[task]}


def correlation(statistic):
    """A correlation that is 0 where it is undefined."""

    def metric(labels, predictions):
        # That of equal predictions is undefined: they say nothing about the labels. And JSON,
        # like a mean over seeds, has no place for NaN.
        value = statistic(labels, predictions).statistic
        return value if np.isfinite(value) else 0.0

    return metric


METRICS = {
    "accuracy": accuracy_score,
    "f1": f1_score,
    "matthews": matthews_corrcoef,
    "pearson": correlation(pearsonr),
    "spearman": correlation(spearmanr),
}


# --- the table ---


def table(results) -> Table:
    """A row for each task and method: mean and standard deviation over the seeds."""
    groups = {}
    for result in results:
        groups.setdefault((result["task"], result["method"]), []).append(result)
    shown = Table("Task", "Method", "Metrics", title="GLUE, validation splits")
    for name in ("Score", "Seeds", "Trainable"):
        shown.add_column(name, justify="right")
    for (task, method), runs in groups.items():
        metrics = [
            f"{name} {mean_and_deviation([run['metrics'][name] for run in runs])}"
            for name in runs[0]["metrics"]
        ]
        shown.add_row(
            task,
            method,
            "\n".join(metrics),
            mean_and_deviation([run["score"] for run in runs]),
            str(len(runs)),
            f"{runs[0]['trainable_parameters']:,}",
        )
    return shown


def mean_and_deviation(values) -> str:
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


if __name__ == "__main__":
    main()
