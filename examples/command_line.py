"""What the examples' command lines share: checked numbers, errors in one line."""

import argparse
import sys


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


def progress_verbosity() -> int:
    """Keras's `verbose`: a progress bar in a terminal, a line an epoch in a file."""
    return 1 if sys.stdout.isatty() else 2
