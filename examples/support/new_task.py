"""What the examples on images and sound share: a base is taken to a new task."""

import dataclasses
import functools
import json
import sys
import time
from pathlib import Path

import keras
import numpy as np

from keras_dcft import dcft_summary, save_dcft_weights
from keras_dcft.settings import counted
from support.command_line import LEARNING_RATES, file_size, progress_verbosity
from support.methods import apply_method, build_optimizer, linear_decay, load_task


@dataclasses.dataclass
class Task:
    """What to learn.

    Attributes:
        name: str, what to call it.
        train, held_out: `tf.data.Dataset`s of batches, inputs and labels.
        classes: list of str, the labels' names.
        metric: function that makes the metric of held-out examples.
    """

    name: str
    train: object
    held_out: object
    classes: list
    metric: object = functools.partial(keras.metrics.SparseCategoricalAccuracy, name="accuracy")


def train(model, task, epochs, learning_rate) -> float:
    """Trains with Adam and a linear decay; returns the seconds that `fit` took."""
    # Keras's mean IoU takes longer than a step does, on PyTorch.
    compile_model(model, "accuracy", linear_decay(learning_rate, epochs * len(task.train)))
    build_optimizer(model)
    start = time.perf_counter()
    model.fit(task.train, epochs=epochs, shuffle=False, verbose=progress_verbosity())
    return time.perf_counter() - start


def compile_model(model, metric, learning_rate):
    model.compile(
        optimizer=keras.optimizers.Adam(learning_rate),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[metric],
    )


def score(model, task, options) -> float:
    """The task's metric on what is held out; compiles, with the rate that a saved model goes on."""
    metric = task.metric()
    compile_model(model, metric, options.learning_rate)
    return model.evaluate(task.held_out, verbose=0, return_dict=True)[metric.name]


def adapt(make, task, options):
    """Trains the head alone and then by the method; saves, loads again, reports.

    Args:
        make: function that makes a model of the base and a new head, and says what of it is
            adapted: the model itself if it is a KerasHub task, else the base inside.
        task: `Task`.
        options: of the command line.
    """
    output_dir = Path(options.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    results = {**vars(options), "task": task.name, "backend": keras.backend.backend()}

    model, base = make()
    results["before"] = score(model, task, options)
    if options.method != "head":
        print(f"\nThe head alone on {task.name}, to compare with:", flush=True)
        apply_method(base, "head")
        train(model, task, options.epochs, LEARNING_RATES["head"])
        results["head_only"] = score(model, task, options)
        model, base = make()
    apply_method(base, options.method, options.kernel_size, options.rank)
    trainable = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    print(
        f"\nMethod {options.method} on the {keras.backend.backend()} backend: {trainable:,} of "
        f"{model.count_params():,} parameters are trained.",
        flush=True,
    )
    if options.method == "dcft":
        dcft_summary(model)
    seconds = train(model, task, options.epochs, options.learning_rate)
    results["after"] = score(model, task, options)

    files = [output_dir / "model.keras"]
    model.save(files[0])
    if options.method == "dcft":
        files.append(output_dir / "adapter.dcft.safetensors")
        save_dcft_weights(model, files[1], notes={"classes": task.classes})
    difference = reload_difference(model, files[0], task)
    results |= {
        "classes": task.classes,
        "trainable_parameters": trainable,
        "training_seconds": round(seconds, 1),
        "reload_difference": difference,
    }
    files.append(output_dir / "results.json")
    files[-1].write_text(json.dumps(results, indent=2, default=str) + "\n")

    measure = task.metric().name.replace("_", " ")
    print(f"\n{'Held-out ' + measure:<28}before training   {results['before']:.3f}")
    if "head_only" in results:
        print(f"{'':<28}head only         {results['head_only']:.3f}")
    print(f"{'':<28}{options.method:<18}{results['after']:.3f}")
    print(f"{'Training time':<28}{seconds:.0f} s for {counted(options.epochs, 'epoch')}")
    for file in files:
        print(f"{'Written':<28}{file} ({file_size(file)})")
    print(f"{'Reloaded':<28}predictions differ by {difference:g}")
    # Keras merges its LoRA into the kernels when it saves, which rounds.
    if difference > (1e-4 if options.method == "lora" else 0):
        sys.exit("error: the reloaded model predicts something else.")


def reload_difference(model, file, task) -> float:
    """By how much the outputs of a model saved and loaded again differ from its own."""
    inputs, _ = next(iter(task.held_out))
    outputs, again = (m.predict(inputs, verbose=0) for m in (model, load_task(file)))
    return float(np.abs(outputs - again).max())
