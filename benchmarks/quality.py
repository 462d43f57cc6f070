"""Quality against trainable numbers: DCFT, LoRA, head only and full fine-tuning on real data.

    python benchmarks/quality.py --data-dir ~/tfds --squad xquad.en.json   # hours on two cores
    python benchmarks/quality.py --tasks sst2 --data-dir ~/tfds            # a part of it
    python benchmarks/quality.py --report       # docs/results.md and its chart

The real MiniLM BERT. Every method is tried with three learning rates; where the best lies at the
edge of the grid, the grid grows. The rate is chosen on a validation part of the *training* data,
and what is reported is another set that no choice looks at: SST-2's and RTE's own validation
splits, and held-out articles of XQuAD. More seeds follow at the chosen rate. One JSON line a run in
`benchmarks/results/quality.jsonl`; runs already there are skipped: an interrupted sweep goes on.

Examples are batched by length and cut to the longest of their batch, as padding would be most of
the work; all methods get the same batches in the same order.
"""

import argparse
import functools
import os
import statistics
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import keras
import keras_hub
import measuring
import numpy as np
import tensorflow as tf
from finetune_question_answering import load_preset, make_model, model_inputs
from measuring import QUICK, add_line, fill, lines_of
from support.methods import build_optimizer, default_preset, enable_keras_lora, linear_decay
from support.question_answering import answers, make_windows
from support.squad_data import load_questions, score, split_by_article
from support.text_classifier import make_classifier
from support.text_data import glue_data

from keras_dcft import PAPER_RECIPES, LinearWarmupDecay, enable_dcft

RESULTS = measuring.RESULTS / "quality.jsonl"
PAGE = measuring.DOCS / "results.md"
CHART = measuring.DOCS / "quality.png"

# On the matrix view, with frozen biases: kernel size 1 is exactly that.
MATRIX_LORA = {f"LoRA, rank {r}": {"kernel_size": 1, "rank": r} for r in (1, 8)}
DCFT = {f"DCFT, kernel size {d}": {"kernel_size": d} for d in (2, 4, 8, 16)}
RECIPE = "DCFT, kernel size 8, the paper's recipe"
KERAS_LORA = "Keras LoRA, rank 1"
HEAD, FULL = "head only", "full fine-tuning"
METHODS = (*DCFT, RECIPE, *MATRIX_LORA, KERAS_LORA, HEAD, FULL)
MAIN = ("DCFT, kernel size 2", "DCFT, kernel size 8", "LoRA, rank 1")
WITH_MORE_SEEDS = (*MAIN, RECIPE)
SEEDS = (0, 1, 2)
RATES = {HEAD: (5e-3, 1e-2, 2e-2), FULL: (5e-5, 1e-4, 2e-4)}
ADAPTER_RATES = (2e-3, 5e-3, 1e-2)

EPOCHS = {"sst2": 2, "rte": 2, "xquad": 3}
MEASURES = {"sst2": "accuracy", "rte": "accuracy", "xquad": "F1"}
# XQuAD and RTE are small: with batches of 32 they would be some hundred steps.
BATCH_SIZES = {"sst2": 32, "rte": 8, "xquad": 8}
SST2_SENTENCES = 4000
if measuring.QUICK:
    EPOCHS = dict.fromkeys(EPOCHS, 1)
    ADAPTER_RATES = (5e-3,)
    SST2_SENTENCES = 8


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="folder of tensorflow_datasets with GLUE")
    parser.add_argument("--squad", help="a file in SQuAD's format, for the task xquad")
    parser.add_argument("--tasks", nargs="+", choices=EPOCHS, default=list(EPOCHS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--report", action="store_true", help="write the page and the chart")
    options = parser.parse_args()
    if options.report:
        return report(finished())
    if "xquad" in options.tasks and not options.squad:
        parser.error("the task xquad needs --squad")
    for task in options.tasks:
        data = load(task, options)
        for method in methods_of(task, options.methods):
            sweep(task, method, data)


def methods_of(task, methods):
    if task != "xquad":
        return methods
    return [method for method in methods if method in (*MAIN, FULL)]


def finished() -> list:
    """The runs so far, but for those of other epochs or batches."""
    runs = lines_of(RESULTS)
    current = {task: (EPOCHS[task], BATCH_SIZES[task]) for task in EPOCHS}
    return [run for run in runs if (run["epochs"], run["batch_size"]) == current[run["task"]]]


def sweep(task, method, data):
    """All runs of a method on a task that are still to be done."""
    mine = [run for run in finished() if (run["task"], run["method"]) == (task, method)]
    rates = sorted({*RATES.get(method, ADAPTER_RATES), *(run["learning_rate"] for run in mine)})
    while True:
        for rate in rates:
            run_once(task, method, rate, 0, data)
        best = best_rate(finished(), task, method)
        if QUICK or rates[0] < best < rates[-1]:
            break
        rates = [best / 2, *rates] if best == rates[0] else [*rates, best * 2]
    for seed in SEEDS if method in WITH_MORE_SEEDS else SEEDS[:1]:
        run_once(task, method, best, seed, data)


def best_rate(runs, task, method) -> float:
    runs = [r for r in runs if (r["task"], r["method"], r["seed"]) == (task, method, 0)]
    return max(runs, key=lambda run: run["validation"])["learning_rate"]


def run_once(task, method, rate, seed, data):
    run = {"task": task, "method": method, "learning_rate": rate, "seed": seed}
    if any(run.items() <= done.items() for done in finished()):
        return
    print(f"{task}: {method}, rate {rate:g}, seed {seed}", flush=True)
    result = {**run, **measure(task, method, rate, seed, data)}
    add_line(result, RESULTS)
    print(f"    validation {result['validation']:.4f}, reported {result['reported']:.4f}")


# --- one run ---


def measure(task, method, rate, seed, data) -> dict:
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    model, backbone = make(task)
    apply(model, backbone, method)
    train = data["train"]
    train_batches, steps = batches(train, EPOCHS[task], BATCH_SIZES[task], seed)
    schedule = linear_decay(rate, steps)
    if method == RECIPE:
        schedule = LinearWarmupDecay(rate, steps)
    model.compile(
        optimizer=keras.optimizers.Adam(schedule),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        # XLA would compile for every length.
        jit_compile=False,
    )
    build_optimizer(model)
    history = model.fit(train_batches, steps_per_epoch=steps, verbose=0).history
    return {
        "validation": data["score"](model, data["validation"]),
        "reported": data["score"](model, data["reported"]),
        "training_loss": history["loss"][-1],
        "trainable_parameters": sum(int(np.prod(v.shape)) for v in model.trainable_variables),
        "train_examples": len(train["labels"]),
        "epochs": EPOCHS[task],
        "batch_size": BATCH_SIZES[task],
        "backend": keras.backend.backend(),
    }


def make(task):
    """The model, and the backbone in it."""
    if task == "xquad":
        backbone, _ = load_preset(default_preset(), 192)
        return make_model(backbone), backbone
    classifier = keras_hub.models.TextClassifier.from_preset(
        str(default_preset()), num_classes=2, preprocessor=None
    )
    return classifier, classifier.backbone


def apply(model, backbone, method):
    if method in DCFT:
        enable_dcft(backbone, **DCFT[method])
    elif method == RECIPE:
        # Their scale for larger models, with which these results were made.
        arguments = PAPER_RECIPES["cola"]["arguments"] | {"alpha": 4.0}
        enable_dcft(backbone, kernel_size=8, **arguments)
    elif method in MATRIX_LORA:
        enable_dcft(backbone, alpha=MATRIX_LORA[method]["rank"], **MATRIX_LORA[method])
        start_as_lora(backbone)
    elif method == KERAS_LORA:
        enable_keras_lora(backbone, 1)
    elif method == HEAD:
        backbone.trainable = False


def start_as_lora(backbone):
    """LoRA's start: A random, B zero; the filter of kernel size 1 is one number, 1."""
    for layer in backbone._flatten_layers():
        if hasattr(layer, "dcft_filter"):
            initializer = keras.initializers.HeUniform()
            layer.dcft_a.assign(initializer(layer.dcft_a.shape))
            layer.dcft_b.assign(np.zeros(layer.dcft_b.shape))
            layer.dcft_filter.assign([[1.0]])


# --- data ---


def load(task, options) -> dict:
    """Training, validation and reported examples, and how a model is scored on them."""
    if task == "xquad":
        return load_xquad(options.squad)
    everything = glue_data(f"glue/{task}", options.data_dir)
    texts, labels = everything.train_texts, everything.train_labels
    train = SST2_SENTENCES if task == "sst2" else round(0.85 * len(texts))
    validation = slice(train, train + 3000)
    preprocessor = make_classifier(default_preset(), everything).preprocessor
    encode = functools.partial(encoded, preprocessor)
    return {
        "train": encode(texts[:train], labels[:train]),
        "validation": encode(texts[validation], labels[validation]),
        "reported": encode(everything.held_out_texts, everything.held_out_labels),
        "score": accuracy,
    }


def encoded(preprocessor, texts, labels) -> dict:
    texts = tuple(map(list, zip(*texts))) if isinstance(texts[0], tuple) else texts
    inputs, _ = preprocessor(texts, labels)  # pairs alone would pass for inputs and labels
    inputs = {name: np.array(values) for name, values in inputs.items()}
    return {"inputs": inputs, "labels": np.array(labels)}


def accuracy(model, examples) -> float:
    order = by_length(examples)
    parts = np.array_split(order, range(128, len(order), 128))
    logits = [model.predict_on_batch(cut(examples, part)[0]) for part in parts]
    return float(np.mean(np.concatenate(logits).argmax(-1) == examples["labels"][order]))


def load_xquad(path) -> dict:
    """XQuAD by article: a fifth is reported, and of the others a fifth validated on."""
    rest, reported = split_by_article(load_questions(path), 0.2)
    train, validation = split_by_article(rest, 0.2)
    _, preprocessor = load_preset(default_preset(), 192)

    def windows_of(questions):
        windows = make_windows(questions, preprocessor, stride=64)
        return {
            "inputs": windows.inputs,
            "labels": windows.labels,
            "windows": windows,
            "questions": questions,
        }

    parts = {"train": train, "validation": validation, "reported": reported}
    return {name: windows_of(part) for name, part in parts.items()} | {"score": squad_f1}


def squad_f1(model, examples) -> float:
    windows = examples["windows"]
    logits = model.predict(model_inputs(model, windows), batch_size=64, verbose=0)
    found = answers(windows, logits[:, 0], logits[:, 1])
    return score(found, examples["questions"])["f1"] / 100


def batches(examples, epochs, batch_size, seed):
    """All batches of a training as one dataset, and their number."""
    generator = np.random.default_rng(seed)
    parts = [
        part for _ in range(epochs) for part in shuffled_parts(examples, batch_size, generator)
    ]
    signature = (
        {
            name: tf.TensorSpec((None, None), values.dtype)
            for name, values in examples["inputs"].items()
        },
        tf.TensorSpec((None,) * examples["labels"].ndim, examples["labels"].dtype),
    )
    dataset = tf.data.Dataset.from_generator(
        lambda: (cut(examples, part) for part in parts), output_signature=signature
    )
    return dataset.prefetch(8), len(parts)


def shuffled_parts(examples, batch_size, generator) -> list:
    """An epoch's batches as indices: of like length, in random order."""
    order = generator.permutation(len(examples["labels"]))
    parts = []
    for group in np.array_split(order, range(16 * batch_size, len(order), 16 * batch_size)):
        group = group[by_length(examples, group)]
        parts += np.array_split(group, range(batch_size, len(group), batch_size))
    return [parts[i] for i in generator.permutation(len(parts))]


def by_length(examples, part=slice(None)):
    return np.argsort(examples["inputs"]["padding_mask"][part].sum(axis=1), kind="stable")


def cut(examples, part):
    """The examples with these indices, without columns that are all padding."""
    inputs = {name: values[part] for name, values in examples["inputs"].items()}
    length = -(-int(inputs["padding_mask"].sum(axis=1).max()) // 8) * 8
    inputs = {name: values[:, :length] for name, values in inputs.items()}
    return inputs, examples["labels"][part]


# --- the report ---


def summary(runs) -> list:
    """A row for each task and method: its scores over seeds at the rate chosen by validation."""
    rows = []
    for task in EPOCHS:
        for method in METHODS:
            mine = [run for run in runs if (run["task"], run["method"]) == (task, method)]
            if mine:
                rate = best_rate(mine, task, method)
                chosen = [run for run in mine if run["learning_rate"] == rate]
                rows.append(
                    {
                        "task": task,
                        "method": method,
                        "rate": rate,
                        "tried": sorted({run["learning_rate"] for run in mine}),
                        "scores": [run["reported"] for run in chosen],
                        "validation": [run["validation"] for run in chosen],
                        "trainable": chosen[0]["trainable_parameters"],
                    }
                )
    return rows


def table(rows) -> str:
    lines = [
        "| task | method | trainable | rate (tried) | validation | reported | seeds |",
        "|---|---|---:|---|---:|---:|---:|",
    ]
    for row in rows:
        tried = ", ".join(f"{rate:g}" for rate in row["tried"])
        lines.append(
            f"| {row['task']} | {row['method']} | {row['trainable']:,} | {row['rate']:g} ({tried}) "
            f"| {mean_and_deviation(row['validation'])} | {mean_and_deviation(row['scores'])} "
            f"| {len(row['scores'])} |"
        )
    return "\n".join(lines)


def mean_and_deviation(scores) -> str:
    deviation = f" ± {statistics.stdev(scores):.4f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.4f}{deviation}"


def draw(rows):
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure = Figure(figsize=(6 * len(tasks), 6), layout="constrained")
    for axis, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks):
        mine = [(statistics.mean(row["scores"]), row) for row in rows if row["task"] == task]
        mine.sort(key=lambda pair: pair[0])
        gap = (mine[-1][0] - mine[0][0]) / 30  # between two labels
        label_height = -np.inf
        for mean, row in mine:
            color = "tab:blue" if "DCFT" in row["method"] else "tab:orange"
            axis.plot([row["trainable"]] * len(row["scores"]), row["scores"], ".", color=color)
            axis.plot(row["trainable"], mean, "D", color=color)
            label_height = max(mean, label_height + gap)
            axis.annotate(
                row["method"].replace("kernel size ", ""),
                (row["trainable"], mean),
                xytext=(1.02, label_height),
                textcoords=("axes fraction", "data"),
                arrowprops={"arrowstyle": "-", "lw": 0.5, "color": color, "alpha": 0.6},
                verticalalignment="center",
                fontsize=8,
            )
        axis.set_xscale("log")
        axis.margins(y=0.1)
        axis.set(title=task, xlabel="trainable numbers", ylabel=MEASURES[task])
        axis.grid(alpha=0.3)
    figure.savefig(CHART, dpi=110)


def report(runs):
    rows = summary(runs)
    draw(rows)
    fill(PAGE, "quality.py", table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
