"""Fine-tunes a KerasHub text classifier with DCFT, and shows what that gives.

    python examples/finetune_text_classifier.py                      # real BERT, no download
    python examples/finetune_text_classifier.py --dataset glue/sst2 --data-dir ~/tfds
    python examples/finetune_text_classifier.py --dataset reviews.tsv --method lora
    python examples/finetune_text_classifier.py --predict "What a film!"    # with what was written

It trains through `model.fit`, saves a `.keras` file, loads that again and compares predictions. It
leaves `model.keras`, the adapter alone in `adapter.dcft.safetensors`, `training.png` and
`results.json` in `--output-dir`. `--method` trains the same model on the same data in the same
order with Keras's LoRA, the head alone, or in full. The backend is chosen as always in Keras:
`KERAS_BACKEND=jax python examples/...`.
"""

import argparse
import json
import math
import sys
import time
from collections import Counter
from pathlib import Path

from support.command_line import (
    LEARNING_RATES,
    OneLineParser,
    add_training_options,
    file_size,
    import_quietly,
    positive_int,
    progress_verbosity,
    run_or_exit,
    with_learning_rate,
)


def parse_options(arguments=None):
    parser = OneLineParser("Fine-tunes a KerasHub text classifier with DCFT.")
    add = parser.add_argument
    add("--preset", help="KerasHub preset or folder; without it the real MiniLM BERT")
    add("--dataset", default="docstrings", help="docstrings, glue/<task>, or a .tsv or .csv file")
    add("--data-dir", help="folder of tensorflow_datasets, for glue/<task>")
    add_training_options(parser, epochs=2, batch_size=32)
    add("--train-size", type=positive_int, help="the most training examples to use")
    add("--sequence-length", type=positive_int, help="in tokens; without it as the data wants")
    add("--output-dir", default="finetuned", help="where everything is written")
    add(
        "--head-baseline",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also train the head alone, to compare with",
    )
    add(
        "--predict",
        nargs="+",
        metavar="TEXT",
        help="train nothing, but classify texts with what an earlier run left in --output-dir; "
        "where it was trained on pairs, two texts are one",
    )
    options = parser.parse_args(arguments)
    if options.dataset == "glue/stsb":
        parser.error("argument --dataset: a regression, which finetune_glue.py trains: glue/stsb")
    return with_learning_rate(options)


if __name__ == "__main__":
    parse_options()  # so that --help and mistakes need not wait for the imports

import_quietly("keras_hub")

import keras
import matplotlib
import numpy as np
import tensorflow as tf
from support.methods import apply_method, build_optimizer, default_preset, linear_decay, load_task
from support.text_classifier import batches, make_classifier
from support.text_data import load_text_data

from keras_dcft import save_dcft_weights
from keras_dcft.increments import parameter_count
from keras_dcft.paths import walk
from keras_dcft.reclassing import DENSE_CLASSES, matrix_shape_of
from keras_dcft.settings import counted

matplotlib.use("Agg")
from matplotlib import pyplot as plt

FEW_STEPS, ENOUGH_STEPS = 50, 100
SMALL_BATCH = 8
MODEL_FILE = "model.keras"
RESULTS_FILE = "results.json"


def main(arguments=None):
    options = parse_options(arguments)
    run_or_exit(predict if options.predict else run, options)


def run(options):
    output_dir = Path(options.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(options.seed)

    data = load_text_data(options.dataset, options.data_dir, options.train_size, options.seed)
    preset = options.preset or default_preset()
    print(
        f"Data: {options.dataset}, {counted(len(data.train_texts), 'training example')} and "
        f"{len(data.held_out_texts):,} held out, classes {', '.join(data.classes)}."
    )
    majority = Counter(data.held_out_labels).most_common(1)[0][1] / len(data.held_out_labels)

    results = {
        "method": options.method,
        "backend": keras.backend.backend(),
        "seed": options.seed,
        "dataset": options.dataset,
        "classes": data.classes,
        "texts_per_example": 2 if isinstance(data.train_texts[0], tuple) else 1,
        "train_examples": len(data.train_texts),
        "held_out_examples": len(data.held_out_texts),
        "majority_class_accuracy": majority,
        "kernel_size": options.kernel_size,
        "rank": options.rank,
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "sequence_length": options.sequence_length,
        "learning_rate": options.learning_rate,
    }
    classifier = make_classifier(preset, data, options.sequence_length)
    base_parameters = classifier.backbone.count_params()
    lora_parameters = lora_rank_1_parameters(classifier.backbone)
    results["accuracy_before"] = accuracy(classifier, data)
    apply_method(classifier, options.method, options.kernel_size, options.rank)
    results["alpha"] = classifier.dcft_config["alpha"] if options.method == "dcft" else None
    trainable = sum(int(np.prod(v.shape)) for v in classifier.trainable_variables)
    print(
        f"\nMethod {options.method} on the {keras.backend.backend()} backend: {trainable:,} "
        f"trainable parameters, {100 * trainable / base_parameters:.3f} % of the base's "
        f"{base_parameters:,}.\nLoRA of rank 1 on the same layers would train "
        f"{lora_parameters:,} and the head."
    )
    print(advice_on_few_steps(len(data.train_texts), options), end="")
    record = PlotRecord()
    record.held_out.append((0, results["accuracy_before"]))
    seconds = train(classifier, data, options, record)
    results["accuracy_after"] = record.held_out[-1][1]
    if options.method != "head" and options.head_baseline:
        print("\nHead only, for comparison (the base model is frozen and has no adapter):")
        results["head_only_accuracy"] = head_only_accuracy(preset, data, options)

    model_file = output_dir / MODEL_FILE
    written = [model_file]
    classifier.save(model_file)
    if options.method == "dcft":
        written.append(output_dir / "adapter.dcft.safetensors")
        save_dcft_weights(classifier, written[-1])
    reloaded = load_task(model_file)
    sample = tf.constant(data.held_out_texts[:64])
    sample = tuple(tf.unstack(sample, axis=1)) if sample.shape.rank == 2 else sample
    difference = float(
        np.abs(reloaded.predict(sample, verbose=0) - classifier.predict(sample, verbose=0)).max()
    )
    plot_file = output_dir / "training.png"
    record.save(plot_file, options, majority, results.get("head_only_accuracy"))
    results.update(
        trainable_parameters=trainable,
        base_parameters=base_parameters,
        lora_rank_1_parameters=lora_parameters,
        training_seconds=round(seconds, 1),
        model_file_bytes=model_file.stat().st_size,
        reload_difference=difference,
    )
    results_file = output_dir / RESULTS_FILE
    results_file.write_text(json.dumps(results, indent=2) + "\n")

    print(f"\nHeld-out accuracy   before training   {results['accuracy_before']:.3f}")
    print(f"                    majority class    {majority:.3f}")
    if "head_only_accuracy" in results:
        print(f"                    head only         {results['head_only_accuracy']:.3f}")
    print(f"                    {options.method:<18}{results['accuracy_after']:.3f}")
    print(f"Training time       {seconds:.0f} s for {counted(options.epochs, 'epoch')}")
    for file in (*written, plot_file, results_file):
        print(f"Written             {file} ({file_size(file)})")
    print(f"Reloaded            predictions differ by {difference:g}")
    # Keras merges its LoRA into the kernels when it saves, which rounds.
    if difference > (1e-4 if options.method == "lora" else 0):
        sys.exit("error: the reloaded model predicts something else.")


def predict(options):
    """Prints the class of each text, by the model that an earlier run has written."""
    folder = Path(options.output_dir)
    missing = [name for name in (MODEL_FILE, RESULTS_FILE) if not (folder / name).is_file()]
    if missing:
        raise OSError(
            f"--predict needs what a run without it writes into --output-dir. Received: {folder} "
            f"without {' and '.join(missing)}"
        )
    results = json.loads((folder / RESULTS_FILE).read_text())
    size = results["texts_per_example"]
    if len(options.predict) % size:
        raise ValueError(
            "--predict needs pairs, two texts for each example, as the model was trained on them. "
            f"Received: {counted(len(options.predict), 'text')}"
        )
    columns = [tf.constant(options.predict[n::size]) for n in range(size)]
    logits = load_task(folder / MODEL_FILE).predict(
        tuple(columns) if size > 1 else columns[0], verbose=0
    )
    probabilities = keras.ops.convert_to_numpy(keras.ops.softmax(logits.astype("float32")))
    width = max(map(len, results["classes"]))
    for number, row in enumerate(probabilities):
        text = " | ".join(options.predict[number * size : (number + 1) * size])
        print(f"{results['classes'][row.argmax()]:<{width}}  {row.max():.3f}  {text}")


def advice_on_few_steps(examples, options) -> str:
    """A line that says how to train for more steps, where there are few; otherwise nothing."""
    steps = options.epochs * math.ceil(examples / options.batch_size)
    if steps >= FEW_STEPS:
        return ""
    batch_size = min(options.batch_size, SMALL_BATCH)
    epochs = math.ceil(ENOUGH_STEPS / math.ceil(examples / batch_size))
    return (
        f"Only {counted(steps, 'step')}: try --batch-size {batch_size} --epochs {epochs} for so "
        "few texts.\n"
    )


def head_only_accuracy(preset, data, options) -> float:
    keras.utils.set_random_seed(options.seed)
    classifier = make_classifier(preset, data, options.sequence_length)
    apply_method(classifier, "head")
    options = argparse.Namespace(**{**vars(options), "learning_rate": LEARNING_RATES["head"]})
    record = PlotRecord()
    train(classifier, data, options, record)
    return record.held_out[-1][1]


def train(classifier, data, options, record) -> float:
    """Trains with Adam and a linear decay; returns the seconds that `fit` took."""
    dataset = batches(data.train_texts, data.train_labels, options.batch_size, options.seed)
    steps = options.epochs * len(dataset)
    classifier.compile(
        optimizer=keras.optimizers.Adam(linear_decay(options.learning_rate, steps)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    build_optimizer(classifier)
    start = time.perf_counter()
    classifier.fit(
        dataset,
        validation_data=batches(data.held_out_texts, data.held_out_labels, 64),
        epochs=options.epochs,
        callbacks=[record],
        shuffle=False,
        verbose=progress_verbosity(),
    )
    return time.perf_counter() - start


def accuracy(classifier, data) -> float:
    held_out = batches(data.held_out_texts, data.held_out_labels, 64)
    logits = classifier.predict(held_out, verbose=0)
    return float(np.mean(np.argmax(logits, axis=-1) == np.array(data.held_out_labels)))


def lora_rank_1_parameters(backbone) -> int:
    """What rank 1 LoRA on the matrix view of every dense kernel trains: kernel size 1 less d²."""
    kernels = [layer for layer in walk(backbone).values() if type(layer) in DENSE_CLASSES]
    return sum(parameter_count(*matrix_shape_of(layer), kernel_size=1) - 1 for layer in kernels)


class PlotRecord(keras.callbacks.Callback):
    """Keeps the loss of each step and the held-out accuracy of each epoch, and draws them."""

    def __init__(self):
        super().__init__()
        self.losses = []
        self.held_out = []
        self._mean = 0.0

    def on_train_batch_end(self, batch, logs=None):
        # Keras reports the mean since the epoch's start.
        self.losses.append(logs["loss"] * (batch + 1) - self._mean * batch)
        self._mean = logs["loss"]

    def on_epoch_end(self, epoch, logs=None):
        self.held_out.append((len(self.losses), logs["val_accuracy"]))

    def save(self, path, options, majority, head_only):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
        window = max(1, len(self.losses) // 25)
        smooth = np.convolve(self.losses, np.ones(window) / window, mode="valid")
        left.plot(self.losses, color="tab:blue", alpha=0.2, linewidth=1)
        left.plot(
            np.arange(len(smooth)) + window - 1,
            smooth,
            color="tab:blue",
            label=f"mean of {counted(window, 'step')}",
        )
        left.set(title="Training loss", xlabel="step", ylabel="cross-entropy", ylim=(0, None))
        left.legend()
        steps, values = zip(*self.held_out)
        right.plot(steps, values, "o-", color="tab:orange", label=options.method)
        if head_only is not None:
            right.axhline(head_only, color="tab:green", linestyle="--", label="head only")
        right.axhline(majority, color="grey", linestyle=":", label="majority class")
        right.set(title="Held-out accuracy", xlabel="step", ylim=(0, 1))
        right.legend(loc="lower right")
        figure.suptitle(f"{options.method} on {Path(options.dataset).name}")
        figure.savefig(path, dpi=120)
        plt.close(figure)


if __name__ == "__main__":
    main()
