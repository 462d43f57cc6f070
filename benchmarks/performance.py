"""Writes docs/performance.md from the results of the speed benchmarks.

Tables and charts are made from the results; a figure in the text that is none of their values was
measured by hand, with what the text names.

    python benchmarks/performance.py

Reads the results of those benchmarks in `benchmarks/results/`, and draws the charts that the page
shows.
"""

import json
import math

import growth
import inference
import measuring
import profile_step
import traffic
import training_step
from measuring import BACKENDS, lines_of
from training_step import BEFORE, FLOOR, FULL_INCREMENT, MAIN, PEFT

PAGE = measuring.DOCS / "performance.md"
LORA = "Keras LoRA, rank 1"

# (model, compared with, the most that the ratio should be)
TARGETS = [
    ("base", FLOOR, 1.10),
    ("base", PEFT, 1.00),
    ("minilm", FLOOR, 1.20),
]
# What others take beyond the floor can be saved, the floor cannot: (model, compared with, the most
# that DCFT should take of it).
TARGETS_BEYOND_FLOOR = [
    ("base", FULL_INCREMENT, 0.30),
    ("base", LORA, 0.30),
]

PAGE_TEXT = """# Performance

Made by `benchmarks/performance.py` from `benchmarks/results/`. The *floor* is the cheapest step
that an adapter on every layer can have which leaves the base layers' products to Keras: all is
frozen but one bias in the first block, so that the backward pass runs through the whole model and
forms no other weight gradient. "DCFT 8, full increment" forms base plus increment at every call, as
the authors' code does.

Within a run all methods take turns, round by round, so that the machine's drift hits all alike; a
ratio is the median over rounds of the quotient of two steps of one round, its quartiles in
parentheses. First steps (tracing, compiling) and peak memory come from a process for each method,
one at a time. On the day of these runs, 2026-11-29, the two cores were about half as fast as on
2026-11-24: what is not a ratio, as enabling and loading, is to be compared within a day only. At
base width on PyTorch the full increment is of a run beside the floor and DCFT alone.

## Aims

{targets}

{reasons}

## Training step

![step time over the floor's](training_step.png)

{training}

### An earlier version beside

"Earlier version" is the package of 2026-11-27, before commit 42a1dfc, in the same runs
(`BENCHMARKS_BEFORE`), both with kernel size 8 and rank 1.

{before}

### Profile

Milliseconds of a step, or of a prediction, by kind of operation (`benchmarks/profile_step.py`), on
one core, so that the parts add up; "Python, calls" is what is left, on PyTorch with the profiler's
own work, and below zero where two threads shared the core. Thin products have a side of 8 or 16.
Each row is a process of its own, one after the other: a few percent between rows are noise, and the
ratios to go by are those above. PyTorch's rows, and JAX's of MiniLM's step, are of 2026-11-29,
when the machine was slower, the others of 2026-11-24, before the changes that the earlier version
stands beside.

{profile}

## Inference

Merged, a model is the base model, with other numbers in its kernels. Unmerged, it also multiplies
with the thin factors.

{inference}

## Growth

![step time against rank, kernel size, width and tokens](growth.png)

The increment costs `tokens · rank · kernel size · (in + out)` multiplications, three times as many
with the backward pass. What the step of one layer takes beyond the floor's, at both ends of each
sweep (below zero is noise), mostly grows with that cost or more slowly: products of 2 to 16 columns
take about as long.

{growth}

Enabling takes time by the number of layers and copies no weight. On a random Llama in bfloat16:

{enabling}

On JAX most of the time and the memory go to XLA, which compiles the drawing of the first values,
once for each shape; the second time in a process there is nothing to compile.

## Swapping adapter files

`load_dcft_weights` into a model that is adapted already with the same settings assigns values and
compiles nothing (`benchmarks/swap.py`, MiniLM, kernel size 8):

{swaps}

## On a GPU

`training_step.py`, `inference.py` and `growth.py` are written to run on a GPU as they are, with
PyTorch and JAX, and there measure device memory: `python benchmarks/training_step.py --models wide`
is a BERT of hidden size 4096 with 8 layers on 8 x 1024 tokens in bfloat16. {gpu}
"""

REASONS = """Why the missed ones are missed, by the profile below:

- **Beyond the floor.** DCFT's whole step is {dcft_of_full}
  of the full increment's, and {dcft_of_lora}
  of that of Keras's LoRA. The aims were 0.60 and 0.80 once, but the floor itself is
  {floor_of_full} of the one,
  {floor_of_lora} of the other,
  and what leaves the base layers' products to Keras cannot be below it. So now they are shares of
  what those two take beyond the floor. At base width the thin products take
  {thin_above}
  of a step's milliseconds on one core, where DCFT is {one_core_lora}
  of LoRA.
- **PyTorch.** Keras's own floor is {floor_of_peft} of a whole step of Hugging Face's LoRA, whose
  `transformers` model is the faster code, so what is left for adapters of 25 layers is little.
  Tried and kept: base, bias and increment in one product, with sums and gradients in place
  (`fused.py`), factors padded to 16 columns before they are expanded, no cut where nothing is cut
  off. Tried without gain: the bias as a row of the output factor, products of 8 or 32 columns. What
  MiniLM's step takes beyond the floor on one core: {beyond_torch}.
- **TensorFlow below the floor.** In graphs an adapted `EinsumDense` multiplies all rows at once.
  Keras's einsum on TensorFlow does so for each row of the batch by itself: a query layer of MiniLM
  takes 20.3 ms for 16 x 64 tokens, forward and backward, in one product 7.4 ms (two cores,
  2026-11-29). The floor's layers, and LoRA's, are Keras's own and could gain as much. Run eagerly
  the layers compute as Keras's do, since only there is the start equal to the base model to the
  last bit.
- **JAX.** On MiniLM all that DCFT takes beyond the floor are thin products, two more for each
  layer, each a pass over the activations; on one core
  {beyond_jax}.
  The aim lies within the quartiles. Kept: the input factor is expanded by its
  transpose, whose gradient is a matrix of few long rows, not of many short ones.
  For 2,048 rows and a layer of 3,072 by 768, XLA takes 5.9 ms for all gradients of that product
  instead of 19.0, for 1,024 rows and 384 by 384 0.5 ms instead of 1.3; MiniLM's whole step is 0.98
  (0.90 to 1.04 in 45 turns) of what it was. Tried without gain, MiniLM's step beside that: base
  plus increment formed once for each step, with the factors' gradients by thin products (0.97 with
  quartiles of 0.89 and 1.08, on TensorFlow 0.99); B's gradient in a view of rows, blocks and
  positions by `custom_gradient` (1.05 and 1.00; that gradient alone takes 0.3 ms instead of 0.7);
  one `custom_gradient` for both thin products (1.02 on TensorFlow, 0.97 at base width); A's and the
  filter's gradients in such a view, without D's (alone 1.6 to 2.3 times as long); the second
  product as a sum of broadcasts, which has no product at all and is slower by half; A, then the
  filter, as two contractions. Not tried: factors in bfloat16, which would not be exact, and one
  read of the inputs for query, key and value, since layers do not know of each other.
- **Enabling.** It makes three variables for each of 112 layers. In a profile on TensorFlow, of as
  many layers of an eighth of the width, 64 % of the time is in Keras's `add_weight`, 2 ms a
  variable, 16 % in finding the models that hold the layers. The code is that of 2026-11-24, when it
  took 0.68 s on TensorFlow, 1.71 on JAX, 0.57 on PyTorch. On JAX the added memory is what XLA's
  compiler keeps of drawing the first values (0.8 to 1.7 % in five runs). The second time in a
  process it is {enabled_again:.2f} %.
- **Unmerged inference.** The base products take as long as in the base model, and the thin ones
  come on top: {thin_in_predict}
  of MiniLM's milliseconds on one core. Eight columns are 4 % of the multiplications of a layer 384
  wide, at less than half the speed of square products; 16 columns on PyTorch are twice that. A
  `generate` step has one token for each text, so expanding the factors weighs as much as using
  them, and on PyTorch each of those small operations is a call of its own, which is most of what
  adapters cost there. On TensorFlow the same shows, but smaller. Beyond the base:
  {beyond_generate}.
  The products are the same in both models, and their difference noise. Since then, on TensorFlow
  and JAX, `generate` makes the factors once, ahead of the first token. A merged model has the base
  model's layers, and how far it is from 1 here is how far noise goes.
- **Loading an adapter file.** In a profile on TensorFlow 42 % is the comparison of the file's base
  with the model's, which reads each of 37 adapted weights once, 85 MB; 30 % assigns 115 variables,
  one after the other, 7 to 14 % walks the model. Within one night reading the weights where they
  lie, where that can be, took it from 130 to 107 ms (TensorFlow), 88 to 62 (JAX), 64 to 46
  (PyTorch).
"""


def main():
    profiled = json.loads(profile_step.RESULTS.read_text())
    steps = json.loads(training_step.RESULTS.read_text())
    predicted = json.loads(inference.RESULTS.read_text())
    grown = json.loads(growth.RESULTS.read_text())
    for runs in (predicted, grown, profiled):
        runs.sort(key=lambda run: (run["model"], BACKENDS.index(run["backend"])))
    swaps = lines_of(measuring.RESULTS / "swap.jsonl")
    enabled = [run for run in grown if run["model"] == "enabling"]
    swept = [run for run in grown if run["model"] == "one layer"]
    training_step.draw(steps, training_step.CHART)
    growth.draw(swept)
    PAGE.write_text(
        PAGE_TEXT.format(
            targets=target_table(steps, predicted, enabled, swaps),
            reasons=REASONS.format(
                floor_of_full=shares(steps, FLOOR, FULL_INCREMENT),
                dcft_of_full=shares(steps, MAIN, FULL_INCREMENT),
                dcft_of_lora=shares(steps, MAIN, LORA),
                floor_of_lora=shares(steps, FLOOR, LORA),
                floor_of_peft=shares(steps, FLOOR, PEFT),
                thin_above=thin_share(profiled, "base, training step", MAIN),
                thin_in_predict=thin_share(profiled, "minilm, predict", "adapted"),
                one_core_lora=by_backend(
                    f"{one_core(run, MAIN) / one_core(run, LORA):.2f}"
                    for run in profiles_of(profiled, "base, training step")
                ),
                beyond_torch=beyond(profiled, "minilm, training step", "torch", MAIN, FLOOR),
                beyond_jax=beyond(profiled, "minilm, training step", "jax", MAIN, FLOOR),
                beyond_generate=beyond(
                    profiled, "generate, predict", "tensorflow", "adapted", "base"
                ),
                enabled_again=enabled_again(enabled),
            ),
            training=training_step.table(steps),
            before=before_table(steps, predicted),
            profile=profile_step.table(profiled),
            inference=inference.table(predicted),
            growth=growth_table(swept),
            enabling=growth.table(enabled),
            swaps=swap_table(swaps),
            gpu=gpu_note(steps),
        )
    )
    print(f"Written: {PAGE}")


def target_table(steps, predicted, enabled, swaps) -> str:
    rows = ["| what | aim | backend | measured | |", "|---|---:|---|---:|---|"]
    for model, other, most in TARGETS:
        for run in cpu_runs(steps, model):
            ratio = run["methods"][MAIN].get(f"ratio to {other}")
            if ratio:
                what = f"{model}: DCFT / {other}"
                rows.append(target_row(what, f"≤ {most:.2f}", run, ratio, 0, most))
    for model, other, most in TARGETS_BEYOND_FLOOR:
        for run in cpu_runs(steps, model):
            what = f"{model}: (DCFT - floor) / ({other} - floor)"
            rows.append(
                target_row(what, f"≤ {most:.2f}", run, beyond_floor(run, other), -math.inf, most)
            )
    for model in ("base", "minilm"):
        for run in cpu_runs(steps, model):
            ours, lora = (run["methods"][m]["peak_memory_bytes"] for m in (MAIN, LORA))
            ratio = {"median": ours / lora}
            what = f"{model}: peak memory, DCFT / {LORA}"
            rows.append(target_row(what, "≤ 1.00", run, ratio, 0, 1))
    for run in predicted:
        if "cores of" not in run["device"]:
            continue
        for name, low, high in (("merged", 0.97, 1.03), ("adapted", 0, 1.10)):
            aim = f"{low}–{high}" if low else f"≤ {high:.2f}"
            what = f"{run['model']}: inference, {name} / base"
            rows.append(target_row(what, aim, run, run["ratio to base"][name], low, high))
    for run in enabled:
        seconds = {"median": run["first"]["seconds"]}
        rows.append(target_row("enabling 1.1 B, seconds", "≤ 0.5", run, seconds, 0, 0.5))
        share = {"median": 100 * run["first"]["added_bytes"] / run["weight_bytes"]}
        rows.append(target_row("enabling 1.1 B, added memory, %", "≤ 0.5", run, share, 0, 0.5))
    for run in swaps:
        low, high = run["quartiles_milliseconds"]
        ratio = {"median": run["median_milliseconds"], "quartiles": [low, high]}
        rows.append(target_row("loading an adapter file, ms", "≤ 20", run, ratio, 0, 20))
    return "\n".join(rows)


def before_table(steps, predicted) -> str:
    """Today's version over the earlier one, of the runs that had both."""
    rows = ["| | backend | time | first step | peak memory |", "|---|---|---:|---:|---:|"]
    for run in steps:
        ratio = run["methods"][MAIN].get(f"ratio to {BEFORE}")
        if ratio:
            told = [told_ratio(ratio)]
            for key, unit, text in (
                ("first_step_seconds", 1, "{:.1f} s, it was {:.1f}"),
                ("peak_memory_bytes", 1e6, "{:,.0f} MB, it was {:,.0f}"),
            ):
                values = (run["methods"][m][key] / unit for m in (MAIN, BEFORE))
                told.append(text.format(*values))
            rows.append(f"| {run['model']}, step | {run['backend']} | {' | '.join(told)} |")
    for run in predicted:
        now, before = (run["ratio to base"].get(x) for x in ("adapted", "adapted, earlier version"))
        if before:
            told = f"{now['median']:.2f} of the base, it was {before['median']:.2f}"
            rows.append(f"| {run['model']}, inference | {run['backend']} | {told} | | |")
    return "\n".join(rows)


def told_ratio(ratio) -> str:
    return "{:.2f} ({:.2f}–{:.2f})".format(ratio["median"], *ratio["quartiles"])


def beyond_floor(run, other) -> dict:
    """What DCFT takes beyond the floor, of what another method takes, by the medians."""
    ours, others = (run["methods"][m][f"ratio to {FLOOR}"]["median"] - 1 for m in (MAIN, other))
    return {"median": ours / others}


def target_row(what, aim, run, ratio, low, high) -> str:
    told = f"{ratio['median']:.3f}"
    if "quartiles" in ratio:
        told += " ({:.2f}–{:.2f})".format(*ratio["quartiles"])
    reached = low <= ratio["median"] <= high
    return f"| {what} | {aim} | {run['backend']} | {told} | {'reached' if reached else 'missed'} |"


def cpu_runs(steps, model) -> list:
    return [run for run in steps if run["model"] == model and "cores of" in run["device"]]


def shares(steps, method, other) -> str:
    """A method's step over another's at base width, for each backend that has both."""
    found = [
        f"{run['methods'][method][f'ratio to {other}']['median']:.2f} ({run['backend']})"
        for run in cpu_runs(steps, "base")
        if f"ratio to {other}" in run["methods"][method]
    ]
    return ", ".join(found)


def profiles_of(profiled, subject) -> list:
    return [run for run in profiled if run["model"] == subject]


def one_core(run, method, kind="all") -> float:
    return run["milliseconds"][method][kind]


def by_backend(told) -> str:
    return ", ".join(f"{x} ({backend})" for x, backend in zip(told, BACKENDS))


def thin_share(profiled, subject, method) -> str:
    """The thin products' milliseconds and the whole's, for each backend."""
    return by_backend(
        f"{one_core(run, method, 'thin products'):.0f} of {one_core(run, method):.0f}"
        for run in profiles_of(profiled, subject)
    )


def beyond(profiled, subject, backend, method, other) -> str:
    """What a method takes longer than another, and in what kind of operation."""
    [run] = [run for run in profiles_of(profiled, subject) if run["backend"] == backend]
    more = {
        k: one_core(run, method, k) - one_core(run, other, k) for k in (*profile_step.KINDS, "all")
    }
    python = more["all"] - sum(more[kind] for kind in profile_step.KINDS)
    told = [f"{more[kind]:+.0f} {kind}" for kind in profile_step.KINDS] + [f"{python:+.0f} Python"]
    return f"{more['all']:+.0f} ms, of which {', '.join(told)}"


def growth_table(grown) -> str:
    backends = [run["backend"] for run in grown]
    rows = [f"| swept | cost | {' | '.join(backends)} |", "|---|---:|" + "---:|" * len(backends)]
    for axis in dict.fromkeys(point["axis"] for point in grown[0]["points"]):
        told = []
        for run in grown:
            points = [point for point in run["points"] if point["axis"] == axis]
            values = [point["value"] for point in points]
            first, last = (
                point["DCFT"]["milliseconds"]["median"] - point["floor"]["milliseconds"]["median"]
                for point in (points[0], points[-1])
            )
            told.append(f"{first:.1f} to {last:.1f} ms")
        swept = f"{axis.replace('_', ' ')}, {values[0]} to {values[-1]}"
        rows.append(f"| {swept} | x {values[-1] // values[0]} | {' | '.join(told)} |")
    return "\n".join(rows)


def enabled_again(enabled) -> float:
    run = next(run for run in enabled if run["backend"] == "jax")
    return 100 * run["again"]["added_bytes"] / run["weight_bytes"]


def swap_table(swaps) -> str:
    rows = ["| backend | file | time per swap (quartiles) |", "|---|---:|---:|"]
    for run in swaps:
        low, high = run["quartiles_milliseconds"]
        rows.append(
            f"| {run['backend']} | {run['file_bytes'] / 1e3:.1f} KB "
            f"| {run['median_milliseconds']:.0f} ms ({low:.0f}–{high:.0f}) |"
        )
    return "\n".join(rows)


GPU_TEXT = """Rows above from: {devices}.

The limit is what the bytes and operations beyond the floor take at the device's own rates, as
`benchmarks/traffic.py` measured them:

{traffic}

With the product of base and increment in one (`fused.py`), DCFT's step at hidden size 4096 is 1.27
of the floor, below Keras's LoRA (1.50); before, in a run of the same day on the same kind of card,
it was 1.58, and the time beyond the floor has gone from 97.8 to 44.3 ms. What is left is Python,
not traffic: on PyTorch Keras runs eagerly, and each small operation is a call and a launch, some
millisecond for each adapted layer with its gradients, the same at hidden size 4096 as at 384. That
is why the small model gains least (2.23 to 2.01), and is behind Keras's LoRA. HF PEFT's own model,
whose floor is 0.57 of Keras's, takes 1.66 of that floor. JAX's steps were not measured: compiling
them did not end within the time that the card was lent for.
"""


def gpu_note(steps) -> str:
    devices = sorted({run["device"] for run in steps if "cores of" not in run["device"]})
    if not devices:
        return "None has been at hand: there are no results yet."
    rates = json.loads(traffic.RESULTS.read_text())
    return GPU_TEXT.format(devices=", ".join(devices), traffic=traffic.table(steps, rates))


if __name__ == "__main__":
    main()
