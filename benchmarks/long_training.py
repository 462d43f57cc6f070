"""Who leads after how many steps: DCFT, LoRA and full fine-tuning in long trainings.

    python benchmarks/long_training.py --prepare DATA --data-dir ~/tfds --squad xquad.en.json
    python benchmarks/long_training.py --data DATA --processes 12      # needs no TensorFlow
    python benchmarks/long_training.py --report     # the page, its chart, README's table

The real MiniLM BERT on JAX, meant for a GPU: the trainings of one method at several learning rates,
or with several seeds, are lanes of one program (`lanes.py`). SST-2 with 20,000 sentences for 8
epochs, XQuAD for 12 and RTE for 20. Each training is scored after 1/8, 1/4, 1/2 and all of its
steps. The rate is chosen with seed 0 on a validation part of the training data, as in `quality.py`;
where the best is at the edge of the grid, the grid grows, twice at most. Then come two more seeds.
Other forms of DCFT are run on SST-2; on XQuAD those that lead there, by a second start.

One JSON line for each score in `benchmarks/results/long_training.jsonl`; trainings whose last line
is there are skipped: a sweep that was cut off goes on.
"""

import argparse
import collections
import dataclasses
import functools
import itertools
import multiprocessing
import os
import sys
import time
import traceback
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import jax
import keras
import measuring
import numpy as np
from keras import initializers
from lanes import Examples, Lanes, Settings, flat_values, plan
from measuring import add_line, fill, lines_of
from prepared import make_backbone, make_model, prepare, read
from rivals import FilterPerRank, FourierFT, LoRAXS, UniLoRA, VeRA, replace_adapters
from support.methods import linear_decay

from keras_dcft import PAPER_RECIPES, LinearWarmupDecay, enable_dcft
from keras_dcft.paths import dcft_layers

RESULTS = measuring.RESULTS / "long_training.jsonl"
PAGE = measuring.DOCS / "long_training.md"
# Scores against steps, and against trainable numbers.
CHART = measuring.DOCS / "long_training.png"
NUMBERS_CHART = measuring.DOCS / "score_by_numbers.png"
USERS_PAGE = measuring.DOCS / "choices.md"

MEASURES = {"sst2": "accuracy", "xquad": "F1", "rte": "accuracy"}
TASKS = ("sst2", "xquad", "rte")
EPOCHS = {"sst2": 8, "xquad": 12, "rte": 20}
BATCH_SIZES = {"sst2": 32, "xquad": 8, "rte": 16}
# To which batches are cut; few, as each is compiled.
LENGTHS = {"sst2": (12, 24, 48), "xquad": (144, 192), "rte": (64, 128)}
MOST_GROWTHS = 2  # of the grid of rates, where the best is at its edge
SHARES = (1 / 8, 1 / 4, 1 / 2, 1)
if measuring.QUICK:
    EPOCHS = dict.fromkeys(TASKS, 1)
    BATCH_SIZES = dict.fromkeys(TASKS, 2)
    LENGTHS = {"sst2": (48,), "xquad": (192,), "rte": (128,)}
    MOST_GROWTHS = 0


# --- methods ---


# The authors have no question answering by spans; XQuAD's recipe is that of QNLI.
RECIPES = {task: PAPER_RECIPES[{"xquad": "qnli"}.get(task, task)] for task in TASKS}
WARMUP_SHARES = {"sst2": 0.02, "xquad": 0.03, "rte": 0.05}  # of the authors' steps


@dataclasses.dataclass(frozen=True)
class Method:
    """A way of fine-tuning.

    Attributes:
        arguments: dict, of `enable_dcft`; None for full fine-tuning.
        start: function of the adapted backbone that sets the first values, or None.
        rates: tuple of floats, the learning rates that are tried first, in order.
        is_recipe: whether the task's recipe is followed.
        rate_factors: as in `Settings`.
    """

    arguments: dict | None
    start: callable = None
    rates: tuple = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
    is_recipe: bool = False
    rate_factors: dict = dataclasses.field(default_factory=dict)


def start_as_lora(backbone):
    """LoRA's start: A random, B zero; the filter of kernel size 1 is one number, 1."""
    for layer in dcft_layers(backbone).values():
        layer.dcft_a.assign(initializers.HeUniform()(layer.dcft_a.shape))
        layer.dcft_b.assign(np.zeros(layer.dcft_b.shape))
        layer.dcft_filter.assign([[1.0]])


def start_linear(backbone):
    """B zero, A and the filter of full size: the first steps are linear, not cubic."""
    for layer in dcft_layers(backbone).values():
        layer.dcft_a.assign(initializers.HeUniform()(layer.dcft_a.shape))
        layer.dcft_b.assign(np.zeros(layer.dcft_b.shape))
        layer.dcft_filter.assign(initializers.Orthogonal()(layer.dcft_filter.shape))


def lora(**arguments):
    # On the matrix view of the kernels, which kernel size 1 is.
    return Method({"kernel_size": 1, "alpha": 1.0, **arguments}, start_as_lora)


def rival(form, arguments=None, rates=Method.rates, rate_factors=None, **sizes):
    start = functools.partial(replace_adapters, form=form, **sizes)
    return Method({"kernel_size": 1, **(arguments or {})}, start, rates, False, rate_factors or {})


BIG_RATES = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)


def fourier(numbers):
    # The layers, the scale and how many times the head's rate the entries have (0.05 and 0.006)
    # are those of its authors' script for SST-2 with RoBERTa base.
    targets, factors = {"target_layers": ["query", "value"]}, {"entries": 8.0}
    return rival(FourierFT, targets, BIG_RATES, factors, numbers=numbers, scale=140.0)


def recipe(kernel_size):
    return Method({"kernel_size": kernel_size}, is_recipe=True)


MAIN = {
    "DCFT, kernel size 8": Method({"kernel_size": 8}),
    "LoRA, rank 1": lora(),
    "DCFT, kernel size 2": Method({"kernel_size": 2}),
    "LoRA, rank 1, query and value": lora(target_layers=["query", "value"]),
    "LoRA, rank 1, last three blocks": lora(target_layers="transformer_layer_[345]/"),
    "the paper's recipe, kernel size 8": recipe(8),
    "the paper's recipe, kernel size 2": recipe(2),
    "full fine-tuning": Method(None, rates=(2.5e-5, 5e-5, 1e-4, 2e-4, 4e-4)),
}
# What else may be made of DCFT.
FORMS = {
    "DCFT, kernel size 8, B from zero": Method(
        {"kernel_size": 8}, start_linear, rates=(6.25e-5, 1.25e-4, 2.5e-4, 5e-4, 1e-3)
    ),
    "DCFT, kernel size 8, B's rate x 4": Method({"kernel_size": 8}, rate_factors={"dcft_b": 4.0}),
    "DCFT, kernel size 8, rank 4": Method({"kernel_size": 8, "rank": 4}),
    "DCFT, kernel size 8, rank 4, scale by root": Method(
        {"kernel_size": 8, "rank": 4, "alpha": 32.0}
    ),
    "DCFT, kernel size 8, rank 4, a filter each": rival(
        FilterPerRank, {"kernel_size": 8, "rank": 4}
    ),
    # With about as many numbers as kernel size 2.
    "DCFT, kernel size 8, rank 3, a filter each": rival(
        FilterPerRank, {"kernel_size": 8, "rank": 3}
    ),
}
# What else the numbers of kernel sizes 8 and 2 buy.
RIVALS = {
    "DCFT, kernel size 4": Method({"kernel_size": 4}),
    "DCFT, kernel size 12": Method({"kernel_size": 12}),
    "LoRA-XS, rank 14": rival(LoRAXS, rank=14),
    "LoRA-XS, rank 24": rival(LoRAXS, rank=24),
    "VeRA, rank 256, query and value": rival(
        VeRA, {"target_layers": ["query", "value"]}, BIG_RATES, rank=256
    ),
    "VeRA, rank 16": rival(VeRA, rates=BIG_RATES, rank=16),
    "Uni-LoRA, rank 4, 7,648 numbers": rival(UniLoRA, rates=BIG_RATES, numbers=7648, rank=4),
    "Uni-LoRA, rank 4, 21,268 numbers": rival(UniLoRA, rates=BIG_RATES, numbers=21_268, rank=4),
    "FourierFT, query and value, 637 entries each": fourier(637),
    "FourierFT, query and value, 1,772 entries each": fourier(1772),
}
METHODS = MAIN | RIVALS | FORMS
WITH_ONE_SEED = ("full fine-tuning",)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--prepare", metavar="FOLDER", help="write data and weights there; needs TensorFlow")
    add("--data-dir", help="folder of tensorflow_datasets with GLUE, to prepare from")
    add("--squad", help="a file in SQuAD's format, to prepare from")
    add("--data", help="a folder that was prepared")
    add("--output", default=str(RESULTS), help="the file of results")
    add("--tasks", nargs="+", choices=TASKS, default=TASKS)
    add("--methods", nargs="+", choices=METHODS, default=tuple(METHODS))
    add("--only-main", action="store_true", help="leave out other methods and other forms of DCFT")
    add("--processes", type=int, default=1, help="how many work at a time")
    add("--rates", type=int, default=5, help="how many are tried first, of each method's grid")
    add("--seeds", type=int, default=3, help="how many, at the best rate")
    add("--lanes", type=int, default=5, help="trainings beside each other, at least")
    add("--seconds", type=float, default=1e6, help="stop after that")
    add("--most-steps", type=int, help="stop all trainings then, to try the program")
    add("--report", action="store_true", help="write the page and the chart")
    options = parser.parse_args()
    if options.report:
        return report(lines_of(options.output))
    if options.prepare:
        return prepare(options.prepare, options.data_dir, options.squad)
    if not options.data:
        parser.error("--data is needed, a folder written with --prepare.")
    jobs = jobs_of(options)
    if not jobs:
        parser.error(
            "nothing to run: other methods and forms are run on sst2 and xquad, a form on xquad "
            "if it leads on sst2, and not with --only-main."
        )
    run_all(jobs, options)


def jobs_of(options) -> list:
    jobs = [(task, method) for task in TASKS for method in MAIN]
    if not options.only_main:
        # What else there is, is compared on the first two tasks.
        jobs += itertools.product(TASKS[:2], RIVALS)
        lines = lines_of(options.output)
        jobs += [(TASKS[0], form) for form in FORMS]
        jobs += [(TASKS[1], form) for form in FORMS if leads(form, lines)]
    return [job for job in jobs if job[0] in options.tasks and job[1] in options.methods]


def leads(form, lines) -> bool:
    """Whether a form leads the paper's form, with as many numbers or fewer, on the first task.

    In the means of the validation scores, by more than seeds differ by. A form is to gain on both
    tasks: one that does not lead on the first is not run on the second.
    """
    rows = {row["method"]: row for row in summary(lines) if row["task"] == TASKS[0]}
    if form not in rows:
        return False
    others = [rows[name] for name in ("DCFT, kernel size 8", "DCFT, kernel size 2") if name in rows]
    others = [row for row in others if row["trainable"] <= rows[form]["trainable"]]
    scores = [row["validation"][-1] for row in (rows[form], *others[-1:])]
    if len(scores) < 2 or min(map(len, scores)) < 2:
        return False
    return scores[0].mean() - scores[1].mean() > np.hypot(*(np.std(s, ddof=1) for s in scores))


def run_all(jobs, options):
    end = time.time() + options.seconds
    # A tiny run is shorter than importing anew.
    context = multiprocessing.get_context("fork" if measuring.QUICK else "spawn")
    with context.Pool(options.processes) as pool:
        waited_for = [pool.apply_async(sweep, (*job, options)) for job in jobs]
        for result in waited_for:
            result.wait(max(0.0, end - time.time()))
    # Leaving the block has ended what was still running.


def sweep(task, method, options):
    """All trainings of a method on a task that are still to be done."""
    try:
        trainer = Trainer(task, method, options)
        grid = METHODS[method].rates
        left_out = (len(grid) - options.rates) // 2
        trainer.train([(rate, 0) for rate in grid[left_out : left_out + options.rates]])
        for _ in range(MOST_GROWTHS):
            best, tried = trainer.best_rate(), trainer.tried()
            if best == min(tried):
                trainer.train([(best / 2, 0), (best / 4, 0)])
            elif best == max(tried):
                trainer.train([(best * 2, 0), (best * 4, 0)])
        if method not in WITH_ONE_SEED:
            best = trainer.best_rate()
            trainer.train([(best, seed) for seed in range(options.seeds)])
    except Exception:  # the other jobs go on
        traceback.print_exc()


class Trainer:
    """The trainings of a method on a task."""

    def __init__(self, task, method, options):
        self.task, self.name, self.method = task, method, METHODS[method]
        self.options = options
        self.data = read(options.data, task)
        steps = len(self.plan(0).kinds)
        self.last = min(steps, options.most_steps or steps)
        schedule, weight_decay = linear_decay(1.0, steps), 0.0
        if self.method.is_recipe:
            schedule = LinearWarmupDecay(1.0, steps, WARMUP_SHARES[task])
            weight_decay = RECIPES[task]["weight_decay"]
        model = self.make(0)
        self.values = {0: flat_values(model)}
        self.trainable = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
        self.lanes = Lanes(
            model,
            self.data.train,
            _joined(self.data.validation, self.data.reported),
            Settings(schedule, weight_decay, self.method.rate_factors),
        )

    @functools.cache  # noqa: B019 (a trainer lives as long as its process works on a job)
    def plan(self, seed):
        task, train = self.task, self.data.train
        return plan(train.lengths, LENGTHS[task], EPOCHS[task], BATCH_SIZES[task], seed)

    def make(self, seed):
        """The model as it is before its first step."""
        keras.utils.set_random_seed(seed)
        backbone = make_backbone(self.options.data)
        arguments = dict(self.method.arguments or {})
        head_dropout = 0.1
        if self.method.is_recipe:
            recipe = RECIPES[self.task]
            arguments |= recipe["arguments"]
            head_dropout = recipe["head_dropout"]
        model = make_model(self.task, backbone, head_dropout)
        if self.method.arguments is not None:
            enable_dcft(backbone, **arguments)
        if self.method.start:
            self.method.start(backbone)
        return model

    def first_values(self, seed):
        if seed not in self.values:
            self.values[seed] = flat_values(self.make(seed))
        return self.values[seed]

    def lines(self) -> list:
        """What is finished, of the trainings' ends."""
        return [
            line
            for line in lines_of(self.options.output)
            if (line["task"], line["method"]) == (self.task, self.name)
            and line["step"] == self.last
        ]

    def tried(self) -> set:
        return {line["learning_rate"] for line in self.lines()}

    def best_rate(self) -> float:
        lines = [line for line in self.lines() if line["seed"] == 0]
        return max(lines, key=lambda line: line["validation"]["score"])["learning_rate"]

    def train(self, runs):
        """Those of the runs, pairs of rate and seed, that are not done, beside each other."""
        done = {(line["learning_rate"], line["seed"]) for line in self.lines()}
        runs = [run for run in runs if run not in done]
        if not runs:
            return
        # A program of as many lanes is there already; what the lanes repeat is not looked at.
        lanes = runs + runs[-1:] * (self.options.lanes - len(runs))
        rates, seeds = zip(*lanes)
        plans = [self.plan(seed) for seed in seeds]
        steps = len(plans[0].kinds)
        state = self.lanes.start([self.first_values(seed) for seed in seeds], seeds, steps)
        started = time.time()
        state, _ = self.lanes.run(state, rates, plans, 0, 0)
        self.say(f"{len(lanes)} lanes, compiled in {time.time() - started:.1f} s")
        first = 0
        for share in SHARES:
            last, started = round(share * self.last), time.time()
            state, logits = self.lanes.run(state, rates, plans, first, last)
            seconds = time.time() - started
            losses = np.array(state["losses"])[:, first:last].mean(axis=1)
            for run, lane, loss in zip(runs, logits, losses):
                self.write(run, last, steps, lane, float(loss), seconds / len(lanes))
            self.say(f"{last} of {steps} steps, {seconds:.1f} s")
            first = last

    def say(self, text):
        print(f"{time.strftime('%X')} {self.task}, {self.name}: {text}", flush=True)

    def write(self, run, last, steps, logits, loss, seconds):
        parts = np.split(logits, [len(self.data.validation.labels)])
        line = {
            "task": self.task,
            "method": self.name,
            "learning_rate": run[0],
            "seed": run[1],
            "step": last,
            "steps": steps,
            "validation": self.data.measures("validation", parts[0]),
            "reported": self.data.measures("reported", parts[1]),
            "training_loss": loss,
            "trained_on": len(self.data.train.labels),
            "trainable_parameters": self.trainable,
            "seconds": round(seconds, 2),
            "device": jax.devices()[0].device_kind,
        }
        add_line(line, self.options.output)


def _joined(one: Examples, other: Examples) -> Examples:
    pairs = zip(one.arrays().items(), other.arrays().values())
    return Examples(**{name: np.concatenate([x, y]) for (name, x), y in pairs})


# --- the report ---


def summary(lines) -> list:
    """A row for each task and method: its scores by step at the rate chosen by validation."""
    rows = []
    for task in TASKS:
        for method in METHODS:
            # A sweep that was cut off and went on has a score twice.
            mine = {
                (line["learning_rate"], line["seed"], line["step"]): line
                for line in lines
                if (line["task"], line["method"]) == (task, method)
            }
            ends = [line for line in mine.values() if line["step"] == line["steps"]]
            with_first_seed = [line for line in ends if line["seed"] == 0]
            if with_first_seed:
                best = max(with_first_seed, key=lambda line: line["validation"]["score"])
                rate = best["learning_rate"]
                seeds = [line["seed"] for line in ends if line["learning_rate"] == rate]
                steps = sorted({step for _, _, step in mine})
                rows.append(
                    {
                        "task": task,
                        "method": method,
                        "trainable": best["trainable_parameters"],
                        "rate": rate,
                        "tried": sorted(line["learning_rate"] for line in with_first_seed),
                        "collapsed": sorted(
                            line["learning_rate"]
                            for line in with_first_seed
                            if line["validation"]["predicted"] == 1
                        ),
                        "steps": steps,
                        # Arrays (steps, seeds).
                        **{
                            part: np.array(
                                [
                                    [mine[rate, seed, step][part]["score"] for seed in seeds]
                                    for step in steps
                                ]
                            )
                            for part in ("validation", "reported")
                        },
                    }
                )
    return rows


def table(rows) -> str:
    lines = [
        "| task | method | trainable | rate (tried) | reported after 1/8 | 1/4 | 1/2 "
        "| all of the steps | validation | seeds |",
        "|---|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        tried = ", ".join(
            f"{rate:g}" + (" one class" if rate in row["collapsed"] else "")
            for rate in row["tried"]
        )
        *before, last = row["reported"]
        scores = [f"{scores.mean():.3f}" for scores in before] + [with_deviation(last)]
        lines.append(
            f"| {row['task']} | {row['method']} | {row['trainable']:,} | {row['rate']:g} ({tried}) "
            f"| {' | '.join(scores)} | {with_deviation(row['validation'][-1])} | {len(last)} |"
        )
    return "\n".join(lines)


# Beside which other forms of DCFT are seen.
REFERENCES = ("DCFT, kernel size 8", "DCFT, kernel size 2", "LoRA, rank 1")


def forms_table(lines) -> str:
    """Validation scores of other forms of DCFT, also of unfinished trainings."""
    texts = [
        "| task | method | trainable | rate | validation after 1/8 | 1/4 | 1/2 "
        "| all of the steps | seeds |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    tasks = {line["task"] for line in lines if line["method"] in FORMS}
    for task, method in itertools.product(TASKS, (*REFERENCES, *FORMS)):
        mine = [line for line in lines if (line["task"], line["method"]) == (task, method)]
        rates = collections.Counter(line["learning_rate"] for line in mine)
        if method in REFERENCES:  # the rate that all seeds were run with
            rates = dict(rates.most_common(1))
        if task in tasks:
            texts += [
                _form_row([line for line in mine if line["learning_rate"] == rate])
                for rate in sorted(rates)
            ]
    return "\n".join(texts)


def _form_row(lines) -> str:
    """The row of a task's and a method's trainings at one rate."""
    line = lines[0]
    by_share = {share: {} for share in SHARES}
    for other in lines:
        share = min(SHARES, key=lambda share: abs(share - other["step"] / other["steps"]))
        by_share[share][other["seed"]] = other["validation"]["score"]
    scores = [
        with_deviation([*of_seeds.values()]) if of_seeds else "–" for of_seeds in by_share.values()
    ]
    # Trainings may end on the way: the last mean is then of fewer seeds than the first.
    counts = dict.fromkeys(len(of_seeds) for of_seeds in by_share.values() if of_seeds)
    return (
        f"| {line['task']} | {line['method']} | {line['trainable_parameters']:,} "
        f"| {line['learning_rate']:g} | {' | '.join(scores)} | {', then '.join(map(str, counts))} |"
    )


def headline(rows, short_rows) -> str:
    """The scores of short and long trainings, of what was run on the first two tasks."""
    tasks = TASKS[:2]
    names = [f"{task}, {length}" for task in tasks for length in ("short", "long")]
    lines = [
        "| method | trainable | " + " | ".join(names) + " |",
        "|---|---:|" + "---:|" * len(names),
    ]
    short = {(row["task"], row["method"]): row["scores"] for row in short_rows}
    for method in MAIN:
        mine = {row["task"]: row for row in rows if row["method"] == method}
        if set(tasks) <= set(mine):
            scores = [
                with_deviation(of_length) if of_length is not None else "–"
                for task in tasks
                for of_length in (short.get((task, method)), mine[task]["reported"][-1])
            ]
            trainable = f"{mine[tasks[0]]['trainable']:,}"
            lines.append(f"| {method} | {trainable} | {' | '.join(scores)} |")
    return "\n".join(lines)


def with_deviation(scores) -> str:
    deviation = f" ± {np.std(scores, ddof=1):.3f}" if len(scores) > 1 else ""
    return f"{np.mean(scores):.3f}{deviation}"


def draw_by_steps(rows):
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure = Figure(figsize=(6 * len(tasks), 6), layout="constrained")
    axes = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axis, task in zip(axes, tasks):
        for row in (row for row in rows if row["task"] == task and row["method"] in MAIN):
            scores, color = row["reported"], f"C{list(MAIN).index(row['method'])}"
            axis.plot(row["steps"], scores.mean(axis=1), "o-", label=row["method"], color=color)
            axis.plot(row["steps"], scores, ".", color=color, alpha=0.4)
        axis.set_xscale("log", base=2)
        steps = sorted({step for row in rows if row["task"] == task for step in row["steps"]})
        axis.set_xticks(steps, map(str, steps))
        axis.set(title=task, xlabel="steps", ylabel=f"{MEASURES[task]}, reported set")
        axis.grid(alpha=0.3)
    lines = {
        line.get_label(): line for axis in axes for line in axis.get_legend_handles_labels()[0]
    }
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=3, fontsize=9)
    figure.savefig(CHART, dpi=110)


# Methods of one kind have one color: the beginnings of their names.
KINDS = {
    "DCFT": "DCFT",
    "the paper's recipe": "DCFT, the paper's recipe",
    "LoRA,": "LoRA, rank 1",
    "LoRA-XS": "LoRA-XS",
    "VeRA": "VeRA",
    "Uni-LoRA": "Uni-LoRA",
    "FourierFT": "FourierFT",
}


def draw_by_numbers(rows):
    """The scores at the end against trainable numbers, of what is no form of DCFT."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.5), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, task in zip(axes, TASKS):
        mine = [row for row in rows if row["task"] == task and row["method"] not in FORMS]
        for i, (start, kind) in enumerate(KINDS.items()):
            of_kind = [row for row in mine if row["method"].startswith(start)]
            if not of_kind:
                continue
            of_kind.sort(key=lambda row: row["trainable"])
            scores = [row["reported"][-1] for row in of_kind]
            numbers = [row["trainable"] for row in of_kind]
            # LoRAs on other matrices are no line.
            style = "D" if kind.startswith("LoRA, ") else "D-"
            axis.plot(numbers, [np.mean(s) for s in scores], style, color=f"C{i}", label=kind)
            for number, of_seeds in zip(numbers, scores):
                axis.plot([number] * len(of_seeds), of_seeds, ".", color=f"C{i}", alpha=0.4)
        for row in mine:
            if row["method"] == "full fine-tuning":
                axis.axhline(
                    np.mean(row["reported"][-1]), color="gray", ls="--", label="full fine-tuning"
                )
        axis.set_xscale("log", base=2)
        axis.set_xticks([8000, 16000, 32000], ["8,000", "16,000", "32,000"])
        axis.set(title=task, xlabel="trainable numbers", ylabel=f"{MEASURES[task]}, reported set")
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)
    figure.savefig(NUMBERS_CHART, dpi=110)


def report(lines):
    from quality import finished
    from quality import summary as short_summary

    rows = summary(lines)
    draw_by_steps(rows)
    draw_by_numbers(rows)
    main = [row for row in rows if row["method"] in MAIN]
    others = [row for row in rows if row["method"] in RIVALS]
    fill(PAGE, "long_training.py", table(main))
    fill(PAGE, "long_training.py, the others", table(others))
    fill(PAGE, "long_training.py, other forms", forms_table(lines))
    short_and_long = headline(rows, short_summary(finished()))
    for page in (measuring.WRITTEN / "README.md", USERS_PAGE):
        fill(page, "long_training.py", short_and_long)
    print(table(rows))


if __name__ == "__main__":
    main()
