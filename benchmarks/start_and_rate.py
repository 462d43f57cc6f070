"""Which start, alpha and learning rate suit DCFT: the measurements behind the package's defaults.

    python benchmarks/start_and_rate.py --data-dir ~/tfds \\
        --output benchmarks/results/start_and_rate.jsonl

Fine-tunes the real MiniLM BERT on 4,000 SST-2 training sentences for 2 epochs and reports accuracy
on 3,000 other training sentences; the validation set, on which results are reported elsewhere, is
not looked at. One JSON line a run; runs that the file has already are skipped.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import keras
from finetune_text_classifier import accuracy, batches, make_classifier
from methods import default_preset, linear_decay
from text_data import TextData, glue_data

from keras_dcft import enable_dcft

SMALL = keras.initializers.RandomNormal(stddev=0.02)
LARGER = keras.initializers.RandomNormal(stddev=0.1)
# name: (initializer of A and B, initializer of the filter)
STARTS = {
    "small factors, zero filter": (SMALL, "zeros"),
    "larger factors, zero filter": (LARGER, "zeros"),
    "orthonormal factors, zero filter": (keras.initializers.Orthogonal(), "zeros"),
    "the paper's, all N(0, 0.02^2)": (SMALL, SMALL),
}
RUNS = [
    *((start, 4.0, 5e-3) for start in STARTS),
    ("small factors, zero filter", 4.0, 1e-3),
    ("small factors, zero filter", 4.0, 1e-2),
    ("small factors, zero filter", 16.0, 5e-3),
    ("larger factors, zero filter", 4.0, 1e-3),
    ("larger factors, zero filter", 4.0, 1e-2),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="folder of tensorflow_datasets")
    parser.add_argument("--output", required=True, help="JSON lines file, appended to")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--table", action="store_true", help="print the results so far and stop")
    options = parser.parse_args()
    output = Path(options.output)
    done = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
    if options.table:
        return print(table(done))
    done = {(run["start"], run["alpha"], run["learning_rate"], run["seed"]) for run in done}
    everything = glue_data("glue/sst2", options.data_dir)
    data = TextData(
        everything.train_texts[:4000],
        everything.train_labels[:4000],
        everything.train_texts[4000:7000],
        everything.train_labels[4000:7000],
        everything.classes,
    )
    runs = [(*run, seed) for seed in options.seeds for run in RUNS]
    for number, (start, alpha, learning_rate, seed) in enumerate(runs, 1):
        print(f"[{number}/{len(runs)}] {start}, alpha {alpha}, rate {learning_rate}, seed {seed}")
        if (start, alpha, learning_rate, seed) in done:
            continue
        result = measure(data, start, alpha, learning_rate, seed)
        with output.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(f"    accuracy {result['accuracy']:.4f}", flush=True)


def measure(data, start, alpha, learning_rate, seed):
    keras.utils.set_random_seed(seed)
    classifier = make_classifier(default_preset(), data)
    classifier.preprocessor.sequence_length = 32
    factors, kernel_filter = STARTS[start]
    enable_dcft(
        classifier, alpha=alpha, factor_initializer=factors, filter_initializer=kernel_filter
    )
    train = batches(data.train_texts, data.train_labels, 32, shuffle_seed=seed)
    schedule = linear_decay(learning_rate, 2 * len(train))
    classifier.compile(
        optimizer=keras.optimizers.Adam(schedule),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    began = time.perf_counter()
    history = classifier.fit(train, epochs=2, shuffle=False, verbose=0).history
    return {
        "start": start,
        "alpha": alpha,
        "learning_rate": learning_rate,
        "seed": seed,
        "kernel_size": 8,
        "train_loss": round(history["loss"][-1], 4),
        "accuracy": round(accuracy(classifier, data), 4),
        "seconds": round(time.perf_counter() - began, 1),
        "backend": keras.backend.backend(),
    }


def table(results) -> str:
    rows = [
        "| start | alpha | learning rate | accuracy, by seed | last training loss, by seed |",
        "|---|---:|---:|---:|---:|",
    ]
    groups = {}
    for run in results:
        key = (run["start"], run["alpha"], run["learning_rate"])
        groups.setdefault(key, []).append(run)
    for (start, alpha, learning_rate), runs in groups.items():
        accuracies = ", ".join(f"{run['accuracy']:.4f}" for run in runs)
        losses = ", ".join(f"{run['train_loss']:.3f}" for run in runs)
        rows.append(f"| {start} | {alpha:g} | {learning_rate:g} | {accuracies} | {losses} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
