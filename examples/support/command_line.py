"""What the examples' command lines share: options, checked numbers, errors in one line.

Imports nothing that takes long, so that `--help` need not.
"""

import argparse
import importlib
import os
import sys
from pathlib import Path

# By the measurements in docs/results.md and the README; full fine-tuning wants far smaller ones.
LEARNING_RATES = {"dcft": 5e-3, "lora": 5e-3, "head": 5e-3, "full": 1e-4}


class DefaultsOnce(argparse.RawDescriptionHelpFormatter):
    """Adds each option's default to its text; that it has none tells nobody anything."""

    def _get_help_string(self, action):
        default = action.default
        if default is None or default is False or default in ([], argparse.SUPPRESS):
            return action.help
        values = default if isinstance(default, list) else [default]
        return f"{action.help} (default: {', '.join(map(str, values))})"


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line without the usage."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=DefaultsOnce)

    def error(self, message):
        self.exit(2, f"error: {message}\n")


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1. Received: {text}")
    return value


def positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number. Received: {text}")
    return value


def add_training_options(parser, *, epochs, batch_size, methods=tuple(LEARNING_RATES)):
    """Adds the options with which the examples train one model by one method.

    Args:
        parser: `OneLineParser`.
        epochs, batch_size: ints, the defaults.
        methods: tuple of str, the ways there are.
    """
    add = parser.add_argument
    add("--method", choices=methods, default="dcft", help="what is trained, and how")
    add("--kernel-size", type=positive_int, default=8, help="DCFT's; larger trains fewer numbers")
    add("--rank", type=positive_int, default=1, help="DCFT's or LoRA's")
    add("--epochs", type=positive_int, default=epochs, help="how often to go through the data")
    add("--batch-size", type=positive_int, default=batch_size, help="examples in a step")
    rates = ", ".join(f"{LEARNING_RATES[method]:g} for {method}" for method in methods)
    add("--learning-rate", type=positive_float, help=f"where it starts; without it {rates}")
    add("--seed", type=int, default=0, help="of data and training")


def with_learning_rate(options):
    """The options, with the method's learning rate where none was asked for."""
    if options.learning_rate is None:
        options.learning_rate = LEARNING_RATES[options.method]
    return options


def import_quietly(module: str):
    """Imports what brings TensorFlow, which writes to the terminal until it has a logger."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    terminal = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        importlib.import_module(module)
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        os.close(nowhere)


def run_or_exit(run, options):
    """Runs a program's work; what is wrong with its data or settings ends it with one line."""
    try:
        run(options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


def file_size(path: Path) -> str:
    """A file's size for people: `91.56 MB`, `0.9 kB`."""
    size = path.stat().st_size
    return f"{size / 1e6:,.2f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def progress_verbosity() -> int:
    """Keras's `verbose`: a progress bar in a terminal, a line an epoch in a file."""
    return 1 if sys.stdout.isatty() else 2
