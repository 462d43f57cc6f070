"""Fine-tuning on a base in float32, bfloat16, int8 and int4; and what merging into int8 would lose.

    python benchmarks/precision.py --data-dir ~/tfds
    python benchmarks/precision.py --table

The real MiniLM BERT on 2,000 SST-2 sentences, 2 epochs, accuracy on the 872 validation sentences,
and the bytes of the frozen weights. For the quantized bases also `requantized`: the adapter merged
into the float32 model and that quantized anew, the best that merging into integers could give. One
JSON line a run in `benchmarks/results/precision.jsonl`; runs already there are skipped.
"""

import argparse
import math
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import keras
import measuring
import numpy as np
from finetune_text_classifier import accuracy, batches, make_classifier
from measuring import add_line, lines_of
from support.methods import default_preset, linear_decay
from support.text_data import load_text_data

from keras_dcft import enable_dcft, load_dcft_weights, merge_dcft, save_dcft_weights

RESULTS = measuring.RESULTS / "precision.jsonl"
BASES = ("float32", "bfloat16", "int8", "int4")
SENTENCES, TOKENS = 2000, 32
if measuring.QUICK:
    # Integers alone take a minute on a core.
    BASES, SENTENCES, TOKENS = ("float32", "bfloat16"), 8, 8
QUANTIZED = ("int8", "int4")
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1, "uint8": 1}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="folder of tensorflow_datasets")
    parser.add_argument("--table", action="store_true", help="print the table and stop")
    options = parser.parse_args()
    results = lines_of(RESULTS)
    if options.table:
        return print(table(results))
    done = {(run["base"], run["backend"]) for run in results}
    data = load_text_data("glue/sst2", options.data_dir, SENTENCES)
    for number, base in enumerate(BASES, 1):
        print(f"[{number}/{len(BASES)}] {base}", flush=True)
        if (base, keras.backend.backend()) not in done:
            result = measure(base, data)
            print(f"    {result}", flush=True)
            add_line(result, RESULTS)


def make_base(base, data):
    keras.config.set_dtype_policy("bfloat16" if base == "bfloat16" else "float32")
    keras.utils.set_random_seed(0)
    classifier = make_classifier(default_preset(), data)
    classifier.preprocessor.sequence_length = TOKENS
    if base in QUANTIZED:
        classifier.backbone.quantize(base)  # not the head, which is to be trained
    return classifier


def measure(base, data) -> dict:
    classifier = enable_dcft(make_base(base, data))
    train = batches(data.train_texts, data.train_labels, 32, shuffle_seed=0)
    schedule = linear_decay(5e-3, 2 * len(train))
    classifier.compile(
        optimizer=keras.optimizers.Adam(schedule),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    began = time.perf_counter()
    classifier.fit(train, epochs=2, shuffle=False, verbose=0)
    result = {
        "base": base,
        "backend": keras.backend.backend(),
        "accuracy": round(accuracy(classifier, data), 4),
        "frozen_bytes": sum(
            math.prod(v.shape) * BYTES[v.dtype]
            for v in classifier.backbone.weights
            if not v.trainable and v.dtype in BYTES
        ),
        "seconds": round(time.perf_counter() - began, 1),
    }
    if base in QUANTIZED:
        result.update(requantized(classifier, base, data))
    return result


def requantized(classifier, base, data) -> dict:
    logits = classifier.predict(data.held_out_texts, verbose=0)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/a.dcft.safetensors"
        save_dcft_weights(classifier, path)
        merged = load_dcft_weights(make_base("float32", data), path)
    merge_dcft(merged)
    in_float = accuracy(merged, data)
    merged.backbone.quantize(base)
    after = merged.predict(data.held_out_texts, verbose=0)
    return {
        "merged_into_float32_accuracy": round(in_float, 4),
        "requantized_accuracy": round(accuracy(merged, data), 4),
        "requantized_logit_error": round(float(np.abs(after - logits).mean()), 4),
        "mean_logit": round(float(np.abs(logits).mean()), 4),
    }


def table(results) -> str:
    rows = [
        "| base | accuracy | frozen weights | merged into float32 | that quantized anew "
        "| mean change of its logits |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for run in results:
        merged = "| | |"
        if "requantized_accuracy" in run:
            merged = (
                f"{run['merged_into_float32_accuracy']:.4f} | {run['requantized_accuracy']:.4f} "
                f"| {run['requantized_logit_error']:.3f} of {run['mean_logit']:.3f} |"
            )
        rows.append(
            f"| {run['base']} | {run['accuracy']:.4f} | {run['frozen_bytes'] / 1e6:.1f} MB "
            f"| {merged}"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    main()
