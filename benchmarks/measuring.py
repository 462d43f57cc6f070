"""What the benchmarks share: turns, spreads, devices, worker processes, results and pages.

With `BENCHMARKS_QUICK`, which names a folder, a program only shows that it works: it measures tiny
settings (`QUICK`), and what it writes goes to that folder, as if it was the project's
(`make benchmarks-quick`).

Several programs may run at once where `BENCHMARKS_LOCK` names a file: they load and compile beside
each other, and each times alone. Where `BENCHMARKS_BEFORE` names a checkout of an earlier version,
its DCFT takes turns beside today's in `training_step.py`, `inference.py` and `growth.py`.
"""

import fcntl
import functools
import importlib
import json
import os
import platform
import random
import resource
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

QUICK = "BENCHMARKS_QUICK" in os.environ
ROOT = Path(__file__).parent.parent
WRITTEN = Path(os.environ.get("BENCHMARKS_QUICK", ROOT))
RESULTS = WRITTEN / "benchmarks" / "results"
DOCS = WRITTEN / "docs"
BACKENDS = ("tensorflow", "jax", "torch")
BEFORE = os.environ.get("BENCHMARKS_BEFORE")


# --- turns and spreads ---


def take_turns(variants, rounds) -> dict:
    """Seconds of each variant, a list of one for each round.

    All take a turn in each round, in random order, so that the machine's drift hits all alike.
    Whoever calls has run them before, so that they are compiled while others may still load.

    Args:
        variants: dict of names to functions without arguments.
        rounds: int.
    """
    time_alone()
    for run in variants.values():
        run()
    seconds = {name: [] for name in variants}
    order = list(variants)
    for number in range(rounds):
        random.Random(number).shuffle(order)
        for name in order:
            start = time.perf_counter()
            variants[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def compare(variants, rounds) -> dict:
    """Milliseconds of each variant, and the ratios to the first in the same turn."""
    for run in variants.values():
        run()
        run()
    seconds = take_turns(variants, rounds)
    first, *others = variants
    return {
        "milliseconds": {name: milliseconds(of) for name, of in seconds.items()},
        f"ratio to {first}": {name: ratio(seconds[name], seconds[first]) for name in others},
    }


def milliseconds(seconds) -> dict:
    return spread([1000 * s for s in seconds])


def ratio(seconds, others) -> dict:
    return spread([a / b for a, b in zip(seconds, others)])


def spread(values) -> dict:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {"median": round(middle, 4), "quartiles": [round(low, 4), round(high, 4)]}


def load_beside_others():
    """Waits while another worker times."""
    _lock(fcntl.LOCK_SH)


def time_alone():
    """Waits until no other worker loads or times, and keeps others from it until this one ends."""
    _lock(fcntl.LOCK_EX)


def _lock(kind):
    if "BENCHMARKS_LOCK" in os.environ:
        fcntl.flock(_lock_file(os.environ["BENCHMARKS_LOCK"]), kind)


@functools.cache
def _lock_file(path) -> int:
    return os.open(path, os.O_CREAT | os.O_RDWR)  # held until the process ends


# --- versions of the package ---


@functools.cache
def package_before():
    """The package as the earlier checkout has it, under a name of its own: `keras_dcft_before`."""
    folder = Path(tempfile.mkdtemp())
    source = Path(BEFORE) / "keras_dcft"
    for file in source.rglob("*.py"):
        copy = folder / "keras_dcft_before" / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(file.read_text().replace("keras_dcft", "keras_dcft_before"))
    sys.path.append(str(folder))
    return importlib.import_module("keras_dcft_before")


# --- the machine ---


def conditions(model) -> dict:
    """By what a result is told from others, and with what it was made."""
    import keras

    backend = keras.backend.backend()
    return {"backend": backend, "model": model, "device": device(), "versions": versions()}


def device() -> str:
    if device_kind() == "cpu":
        names = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
        name = names[0].split(":")[1].strip() if names else platform.processor()
        return f"{len(os.sched_getaffinity(0))} cores of {name}"
    import keras

    if keras.backend.backend() == "torch":
        import torch

        return torch.cuda.get_device_name()
    if keras.backend.backend() == "jax":
        import jax

        return jax.devices()[0].device_kind
    import tensorflow as tf

    [gpu, *_] = tf.config.list_physical_devices("GPU")
    return tf.config.experimental.get_device_details(gpu)["device_name"]


def device_kind() -> str:
    import keras

    if keras.backend.backend() == "torch":
        import torch

        return "gpu" if torch.cuda.is_available() else "cpu"
    return keras.distribution.list_devices()[0].split(":")[0]


def versions() -> dict:
    import keras

    names = ["keras", "keras-hub", keras.backend.backend()]
    names += ["transformers", "peft"] if keras.backend.backend() == "torch" else []
    # The modules' own: nightlies are installed under other names.
    modules = {name: importlib.import_module(name.replace("-", "_")) for name in names}
    return {name: module.__version__ for name, module in modules.items()}


def wait_for(variables):
    """Until the device is done with a step that changes these variables."""
    import keras

    if keras.backend.backend() == "torch" and device_kind() == "gpu":
        import torch

        torch.cuda.synchronize()
    if keras.backend.backend() == "jax":
        import jax

        jax.block_until_ready([variable.value for variable in variables])


def peak_memory() -> int:
    """Highest memory of this process so far, or of its GPU."""
    if device_kind() == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return _peak_of_gpu()


def memory_in_use() -> int:
    """Highest memory so far (on a CPU since the last call): copies that were dropped count."""
    if device_kind() == "cpu":
        status = Path("/proc/self/status").read_text().splitlines()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    return _peak_of_gpu()


def _peak_of_gpu() -> int:
    import keras

    if keras.backend.backend() == "torch":
        import torch

        return torch.cuda.max_memory_allocated()
    if keras.backend.backend() == "jax":
        import jax

        return jax.devices()[0].memory_stats()["peak_bytes_in_use"]
    import tensorflow as tf

    return tf.config.experimental.get_memory_info("GPU:0")["peak"]


# --- processes ---


def work(file, backend, *arguments) -> dict:
    """Runs a benchmark's file as a worker in a process of its own; its `RESULT` line is read."""
    with tempfile.TemporaryFile("w+") as printed:
        run_program(file, backend, "--worker", *arguments, printed=printed)
        printed.seek(0)
        lines = [line for line in printed.read().splitlines() if line.startswith("RESULT ")]
    return json.loads(lines[-1].removeprefix("RESULT "))


def run_program(file, backend, *arguments, printed=None):
    """Runs a Python program to its end in a process of its own.

    Args:
        file: path.
        backend: str, Keras's.
        arguments: strings, of the program.
        printed: file for what it prints, or None for where this program prints.

    Raises:
        subprocess.CalledProcessError: the program failed.
    """
    environment = {**os.environ, "KERAS_BACKEND": backend}
    command = [sys.executable, str(file), *arguments]
    if QUICK:
        _run_forked(command, environment, printed)
    else:
        subprocess.run(command, env=environment, stdout=printed, check=True)


def _run_forked(command, environment, printed):
    """In a copy of this process, which may have imported what takes longer than a tiny run."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if printed is not None:
                os.dup2(printed.fileno(), 1)
                sys.stdout = os.fdopen(1, "w", closefd=False)
            os.environ.update(environment)
            sys.argv = command[1:]
            sys.path[0] = str(Path(command[1]).parent)
            runpy.run_path(command[1], run_name="__main__")
            status = 0
        except SystemExit as end:
            status = 1 if isinstance(end.code, str) else end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        raise subprocess.CalledProcessError(status, command)


# --- results and pages ---


def store(result, path):
    """Puts a result in a JSON file in place of the last of the same conditions."""
    keys = ("backend", "model", "device")
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # other programs may be storing as well
        file.seek(0)
        results = json.loads(file.read() or "[]")
        same = [all(old[key] == result[key] for key in keys) for old in results]
        results = [old for old, replaced in zip(results, same) if not replaced] + [result]
        file.truncate(0)
        file.write(json.dumps(results, indent=1) + "\n")


def lines_of(path) -> list:
    """The results of a file of JSON lines, none where there is no file yet."""
    path = Path(path)
    return [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []


def add_line(result, path):
    """In one piece, as several processes may write to the file."""
    with Path(path).open("a") as file:
        file.write(json.dumps(result) + "\n")


def fill(page, program, text):
    """Puts what a program made between its marks in a page."""
    start, end = f"<!-- made by benchmarks/{program} -->", "<!-- end -->"
    before, rest = page.read_text().split(start)
    page.write_text(f"{before}{start}\n\n{text}\n\n{end}{rest.split(end, 1)[1]}")
