"""What the examples' command lines share: checked numbers, errors in one line.

Imports nothing that takes long, so that `--help` need not.
"""

import argparse
import sys
from pathlib import Path

# By the measurements in docs/results.md and the README; full fine-tuning wants far smaller ones.
LEARNING_RATES = {"dcft": 5e-3, "lora": 5e-3, "head": 5e-3, "full": 1e-4}


class DefaultsOnce(argparse.ArgumentDefaultsHelpFormatter):
    """Adds each option's default to its text, where it has one; `None` tells nobody anything."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line without the usage."""

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


def run_or_exit(run, options):
    """Runs a program's work; what is wrong with its data or settings ends it with one line."""
    try:
        run(options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {str(error).strip().splitlines()[0]}")


def file_size(path: Path) -> str:
    """A file's size for people: `91.56 MB`, `0.9 kB`."""
    size = path.stat().st_size
    return f"{size / 1e6:,.2f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def progress_verbosity() -> int:
    """Keras's `verbose`: a progress bar in a terminal, a line an epoch in a file."""
    return 1 if sys.stdout.isatty() else 2
