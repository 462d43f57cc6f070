"""The table of KerasHub's backbones in `docs/backbones.md`.

    python benchmarks/backbones.py             # all backbones on all backends, some 15 minutes
    python benchmarks/backbones.py --table     # writes the table from the results so far

Every backbone that KerasHub exports, in a tiny configuration with random weights, is adapted,
trained for a step, saved, loaded, removed and merged (`tests/backbones/checks.py`); one JSON line
each in `benchmarks/results/backbones.jsonl`. What is there already is skipped.
"""

import argparse
import gc
import os
import sys
import tempfile
import time

import measuring
from measuring import BACKENDS, add_line, lines_of, run_program

RESULTS = measuring.RESULTS / "backbones.jsonl"
TABLE = measuring.DOCS / "backbones.md"
UNNAMED = 0.1  # of a backbone's parameters, in layers too small to name

INTRODUCTION = """# Every KerasHub backbone

Made by `benchmarks/backbones.py`: each backbone that KerasHub 0.32 exports, in a tiny configuration
with random weights: adapted at kernel size 2 (start equal to the base to the last bit), trained for
one step from random adapters (A, B and the filter of every adapted layer changed, nothing else),
saved and loaded as `.keras` (difference 0), removed (difference 0) and merged (difference below
1e-4). "Passed on" names the backends on which all of this held; exceptions are in the last column.
Numbers are those of the tiny configurations; the shares of large models are higher, as embeddings
weigh less.

"Not covered" names the classes of layers whose own weights are not adapted, the largest first,
until less than {unnamed:.0f} % of the parameters is left. Embeddings can be adapted, but are not by
default. What the others hold are no `Dense` or `EinsumDense` kernels: convolutions, positions,
normalizations, weights that a layer multiplies by itself, and experts' weights, which cannot be
adapted ([models.md](models.md) says why).

| backbone | adapted layers | their share of parameters | trainable | passed on | not covered |
|---|---:|---:|---:|---|---|
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="+", default=BACKENDS, choices=BACKENDS)
    parser.add_argument("--table", action="store_true", help="write the table and stop")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        return run_here()
    if not options.table:
        for backend in options.backends:
            run_program(__file__, backend, "--here")
    introduction = INTRODUCTION.format(unnamed=100 * UNNAMED)
    TABLE.write_text(introduction + "\n".join(rows(lines_of(RESULTS))) + "\n")


def run_here():
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.path.insert(0, str(measuring.ROOT / "tests"))
    import backbones
    import keras
    from backbones.checks import WITHOUT_FILES, WITHOUT_GRADIENT, measure

    backend = keras.backend.backend()
    done = {run["backbone"] for run in lines_of(RESULTS) if run["backend"] == backend}
    exported = ["BertBackbone"] if measuring.QUICK else backbones.exported()
    names = [name for name in exported if name not in done]
    for number, name in enumerate(names, 1):
        print(f"[{number}/{len(names)}] {backend} {name}", flush=True)
        keras.utils.clear_session()
        gc.freeze()  # as in tests/conftest.py
        keras.utils.set_random_seed(0)
        start = time.process_time()  # that of the clock includes other programs
        with tempfile.TemporaryDirectory() as folder:
            seen = measure(name, folder)
        seen["cpu_seconds"] = round(time.process_time() - start, 1)
        notes = [WITHOUT_FILES[name]] if name in WITHOUT_FILES else []
        notes += [WITHOUT_GRADIENT[name][1]] if name in WITHOUT_GRADIENT else []
        run = {"backbone": name, "backend": backend, **seen, "notes": notes}
        add_line(run, RESULTS)


def passed(run) -> bool:
    exact = ("start_difference", "file_difference", "removed_difference")
    return (
        not any(run.get(key, 0) for key in exact)
        and not run["changed_base_weights"]
        and not run["untrained"]
        and run["merged_difference"] < 1e-4
    )


def others(run) -> list:
    """The largest classes of layers that are not adapted, each with its share in words."""
    unnamed = sum(run["other_parameters"].values())
    named = []
    for kind, size in sorted(run["other_parameters"].items(), key=lambda item: -item[1]):
        if unnamed < UNNAMED * run["parameters"]:
            break
        unnamed -= size
        named.append(f"{kind} {100 * size / run['parameters']:.0f} %")
    return named


def rows(results):
    names = sorted({run["backbone"] for run in results})
    for name in names:
        runs = [run for run in results if run["backbone"] == name]
        runs.sort(key=lambda run: BACKENDS.index(run["backend"]))
        run = runs[0]
        if not run["dense_layers"]:
            told = ", ".join(r["backend"] for r in runs if "at least one built" in r["error"])
            yield f"| {name} | 0 | | | {told} | nothing dense: a clear error |"
            continue
        same = all(r["adapted"] == run["adapted"] for r in runs)
        where = ", ".join(r["backend"] for r in runs if passed(r))
        left = [] if same else ["**other layers on other backends**"]
        left += others(run)
        if run["narrow"]:
            left.append("too narrow for kernel size 2: " + ", ".join(run["narrow"]))
        unbuilt = {path for r in runs for path in r["unbuilt"]}
        if unbuilt:
            left.append(f"{len(unbuilt)} dense layers that the backbone never builds or calls")
        left += sorted({note for r in runs for note in r["notes"]})
        share = 100 * run["dense_parameters"] / run["parameters"]
        yield (
            f"| {name} | {len(run['adapted'])} | {share:.0f} % | {run['trainable']:,} | {where} | "
            f"{'; '.join(left)} |"
        )


if __name__ == "__main__":
    main()
