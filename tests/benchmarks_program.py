"""Runs one of the benchmarks, in a process of its own: see `benchmarks_test.py`."""

import runpy
import sys
from pathlib import Path

from tools import run_eagerly

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def main(folder, program, *arguments):
    path = str(BENCHMARKS / f"{program}.py")
    run_eagerly()  # as most tests: tracing would take longer than all that is traced
    sys.argv = [path, *arguments]
    sys.path.insert(0, str(BENCHMARKS))
    runpy.run_path(path, run_name="__main__")
