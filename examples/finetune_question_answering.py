"""Fine-tunes a KerasHub backbone to answer questions in a text's own words, with DCFT.

    python examples/finetune_question_answering.py --dataset dev-v2.0.json
    python examples/finetune_question_answering.py --dataset squad --data-dir ~/tfds
    python examples/finetune_question_answering.py --dataset my.json --held-out-file other.json

The data are in SQuAD's format, 1.1 or 2.0 (with questions that have no answer). A dense layer on
the backbone's sequence output says where an answer starts and ends; contexts too long for the
backbone are split into windows that overlap. It trains through `model.fit`, saves a `.keras` file,
loads that again and compares predictions. It leaves `model.keras`, `training.png` and
`results.json` in `--output-dir`. `--method` trains the same model on the same data in the same
order with Keras's LoRA, the head alone, or in full.
"""

import json
import sys
import time
import warnings
from pathlib import Path

from support.command_line import (
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
    parser = OneLineParser("Fine-tunes a KerasHub backbone to answer questions, with DCFT.")
    add = parser.add_argument
    add("--preset", help="KerasHub preset or folder; without it the real MiniLM BERT")
    add("--dataset", default="squad", help="a JSON file in SQuAD's format, squad, or squad/v2.0")
    add("--data-dir", help="folder of tensorflow_datasets, for squad")
    add("--held-out-file", help="a JSON file to evaluate on; without it a fifth of the articles")
    add_training_options(parser, epochs=3, batch_size=16)
    add("--train-size", type=positive_int, help="the most training questions to use")
    add("--sequence-length", type=positive_int, default=192, help="tokens of a window")
    add("--stride", type=positive_int, default=64, help="tokens that two windows share")
    add("--output-dir", default="finetuned", help="where everything is written")
    return with_learning_rate(parser.parse_args(arguments))


if __name__ == "__main__":
    parse_options()  # so that --help and mistakes need not wait for the imports

import_quietly("keras_hub")

import keras
import keras_hub
import matplotlib
import numpy as np
import tensorflow as tf
from keras import ops
from support.methods import (
    apply_method,
    build_optimizer,
    default_preset,
    linear_decay,
)
from support.question_answering import answers, make_windows
from support.squad_data import load_question_data, score

from keras_dcft.settings import counted

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PREDICTION_BATCH = 64
SAMPLES = 3


def main(arguments=None):
    run_or_exit(run, parse_options(arguments))


def run(options):
    output_dir = Path(options.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(options.seed)

    train_questions, held_out_questions = load_question_data(
        options.dataset, options.data_dir, options.held_out_file, options.train_size, options.seed
    )
    preset = options.preset or default_preset()
    backbone, preprocessor = load_preset(preset, options.sequence_length)
    train_windows = make_windows(train_questions, preprocessor, options.stride)
    held_out_windows = make_windows(held_out_questions, preprocessor, options.stride)
    print(
        f"Data: {options.dataset}, {counted(len(train_questions), 'training question')} in "
        f"{counted(len(train_windows.rows), 'window')} of {options.sequence_length} tokens, and "
        f"{counted(len(held_out_questions), 'held-out question')} in "
        f"{len(held_out_windows.rows):,}."
    )
    may_be_empty = any(not question.answers for question in train_questions)
    base_parameters = backbone.count_params()
    model = make_model(backbone)
    before = score(predict_answers(model, held_out_windows, may_be_empty), held_out_questions)
    apply_method(backbone, options.method, options.kernel_size, options.rank)
    trainable = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    print(
        f"\nMethod {options.method} on the {keras.backend.backend()} backend: {trainable:,} "
        f"trainable parameters, {100 * trainable / base_parameters:.3f} % of the base's "
        f"{base_parameters:,}."
    )
    record = LossRecord()
    seconds = train(model, train_windows, options, record)
    predictions = predict_answers(model, held_out_windows, may_be_empty)
    after = score(predictions, held_out_questions)

    model_file = output_dir / "model.keras"
    model.save(model_file)
    difference = reload_difference(model, model_file, held_out_windows)
    plot_file = output_dir / "training.png"
    record.save(plot_file, options)
    results = {
        "method": options.method,
        "backend": keras.backend.backend(),
        "seed": options.seed,
        "dataset": options.dataset,
        "train_questions": len(train_questions),
        "held_out_questions": len(held_out_questions),
        "train_windows": len(train_windows.rows),
        "held_out_windows": len(held_out_windows.rows),
        "sequence_length": options.sequence_length,
        "stride": options.stride,
        "kernel_size": options.kernel_size,
        "rank": options.rank,
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "exact_match_before": before["exact_match"],
        "f1_before": before["f1"],
        "exact_match_after": after["exact_match"],
        "f1_after": after["f1"],
        "trainable_parameters": trainable,
        "base_parameters": base_parameters,
        "training_seconds": round(seconds, 1),
        "model_file_bytes": model_file.stat().st_size,
        "reload_difference": difference,
    }
    results_file = output_dir / "results.json"
    results_file.write_text(json.dumps(results, indent=2) + "\n")

    every = -(-len(held_out_questions) // SAMPLES)  # not all on one article
    print_samples(held_out_questions[::every], predictions)
    print("\nHeld-out                              exact match      F1")
    for name, scores in (("before training", before), (options.method, after)):
        print(f"                    {name:<18}{scores['exact_match']:11.2f}{scores['f1']:8.2f}")
    print(f"Training time       {seconds:.0f} s for {counted(options.epochs, 'epoch')}")
    for file in (model_file, plot_file, results_file):
        print(f"Written             {file} ({file_size(file)})")
    print(f"Reloaded            predictions differ by {difference:g}")
    # Keras merges its LoRA into the kernels when it saves, which rounds.
    if difference > (1e-4 if options.method == "lora" else 0):
        sys.exit("error: the reloaded model predicts something else.")


def load_preset(preset, sequence_length: int):
    """A KerasHub backbone and the preprocessor that goes with it."""
    backbone = keras_hub.models.Backbone.from_preset(str(preset))
    longest = getattr(backbone, "max_sequence_length", sequence_length)
    if sequence_length > longest:
        raise ValueError(
            f"--sequence-length must be at most {longest} with this preset. "
            f"Received: {sequence_length}"
        )
    preprocessor = keras_hub.models.TextClassifierPreprocessor.from_preset(
        str(preset), sequence_length=sequence_length
    )
    return backbone, preprocessor


def make_model(backbone):
    """A functional model around a backbone, with the backbone's inputs.

    Its output is an array (batch, 2, length) of logits of where an answer starts and ends.
    """
    inputs = backbone.input
    if not {"token_ids", "padding_mask"} <= set(inputs):
        raise ValueError(
            "The preset must be of a backbone with one sequence of tokens and a padding mask. "
            f"Received: {type(backbone).__name__} with {list(inputs)}"
        )
    outputs = backbone(inputs)
    sequence = outputs["sequence_output"] if isinstance(outputs, dict) else outputs
    logits = keras.layers.Dense(2, dtype="float32", name="span")(sequence)
    logits = keras.layers.Permute((2, 1), dtype="float32", name="start_and_end")(logits)
    padding = 1.0 - ops.cast(ops.expand_dims(inputs["padding_mask"], 1), "float32")
    return keras.Model(inputs, logits - 1e9 * padding)


def train(model, windows, options, record) -> float:
    """Trains with Adam and a linear decay; returns the seconds that `fit` took."""
    dataset = (
        tf.data.Dataset.from_tensor_slices((model_inputs(model, windows), windows.labels))
        .shuffle(len(windows.rows), seed=options.seed)
        .batch(options.batch_size)
    )
    steps = options.epochs * len(dataset)
    model.compile(
        optimizer=keras.optimizers.Adam(linear_decay(options.learning_rate, steps)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    build_optimizer(model)
    start = time.perf_counter()
    with warnings.catch_warnings():
        # BERT's pooler is adapted like all dense layers, but no answer depends on it.
        warnings.filterwarnings("ignore", r"Gradients do not exist for variables \['pooled_dense")
        model.fit(
            dataset,
            epochs=options.epochs,
            callbacks=[record],
            shuffle=False,
            verbose=progress_verbosity(),
        )
    return time.perf_counter() - start


def model_inputs(model, windows) -> dict:
    """What of the windows this model takes: not all backbones know of segments."""
    return {name: windows.inputs[name] for name in model.input}


def predict_answers(model, windows, may_be_empty: bool) -> dict:
    """A dict of question id to the model's answer."""
    logits = model.predict(
        model_inputs(model, windows), batch_size=PREDICTION_BATCH, verbose=progress_verbosity()
    )
    return answers(windows, logits[:, 0], logits[:, 1], may_be_empty)


def reload_difference(model, model_file, windows) -> float:
    """By how much the logits of a model saved and loaded again differ from its own."""
    # TensorFlow rounds otherwise in a batch of another shape than it has compiled for.
    sample = {name: x[:PREDICTION_BATCH] for name, x in model_inputs(model, windows).items()}
    logits, reloaded_logits = (
        each.predict(sample, batch_size=PREDICTION_BATCH, verbose=0)
        for each in (model, keras.saving.load_model(model_file))
    )
    return float(np.abs(logits - reloaded_logits).max())


def print_samples(questions: list, predictions: dict):
    for question in questions:
        golds = dict.fromkeys(answer.text for answer in question.answers)
        print(f"\nQuestion            {question.text}")
        print(f"  predicted         {predictions[question.id] or '(no answer)'}")
        print(f"  gold              {' | '.join(golds) or '(no answer)'}")


class LossRecord(keras.callbacks.Callback):
    """Keeps the loss of each step, and draws it."""

    def __init__(self):
        super().__init__()
        self.losses = []
        self._mean = 0.0

    def on_train_batch_end(self, batch, logs=None):
        # Keras reports the mean since the epoch's start.
        self.losses.append(logs["loss"] * (batch + 1) - self._mean * batch)
        self._mean = logs["loss"]

    def save(self, path, options):
        figure, axes = plt.subplots(figsize=(6, 3.8), layout="constrained")
        window = max(1, len(self.losses) // 25)
        smooth = np.convolve(self.losses, np.ones(window) / window, mode="valid")
        axes.plot(self.losses, color="tab:blue", alpha=0.2, linewidth=1)
        axes.plot(
            np.arange(len(smooth)) + window - 1,
            smooth,
            color="tab:blue",
            label=f"mean of {counted(window, 'step')}",
        )
        axes.set(title="Training loss", xlabel="step", ylabel="cross-entropy", ylim=(0, None))
        axes.legend()
        figure.suptitle(f"{options.method} on {Path(options.dataset).name}")
        figure.savefig(path, dpi=120)
        plt.close(figure)


if __name__ == "__main__":
    main()
