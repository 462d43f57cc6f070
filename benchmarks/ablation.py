"""What makes DCFT better or worse at a fixed number of trainable numbers and steps.

    python benchmarks/ablation.py --data-dir ~/tfds     # some two minutes a run on two cores
    python benchmarks/ablation.py --task xquad --squad xquad.en.json     # eight minutes a run
    python benchmarks/ablation.py --report              # the tables in docs/ablation.md

The real MiniLM BERT, on the training data, batches and epochs of `quality.py`. On SST-2 every
variant changes what its name says of a reference: kernel size 8, rank 1, alpha 4, A and B drawn
from N(0, 0.02²), a zero filter, Adam at 5e-3 with a linear decay. On XQuAD, the reference is the
default: alpha 16, N(0, 0.01²). Score and loss are of the *validation part of the training data*; no
reported set plays a part. One JSON line a run in `benchmarks/results/ablation.jsonl`; runs already
there are skipped.
"""

import argparse
import dataclasses
import functools
import os
import re
import statistics
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import keras
import measuring
import numpy as np
import tensorflow as tf
from keras import initializers, optimizers
from measuring import add_line, fill, lines_of
from quality import (
    BATCH_SIZES,
    EPOCHS,
    MEASURES,
    batches,
    load,
    make,
    start_as_lora,
)
from support.methods import build_optimizer, linear_decay

from keras_dcft import PAPER_RECIPES, LinearWarmupDecay, enable_dcft
from keras_dcft.paths import dcft_layers, walk

RESULTS = measuring.RESULTS / "ablation.jsonl"
PAGE = measuring.DOCS / "ablation.md"


def normal(deviation):
    return initializers.RandomNormal(stddev=deviation)


@dataclasses.dataclass
class Variant:
    """What is changed.

    Attributes:
        arguments: of `enable_dcft`; kernel size 8 unless they say otherwise.
        start: sets the adapters' first values, from the adapted backbone and the data.
        rate: the learning rate.
        warm_up: the rate rises first, in a tenth of the steps, as in the paper.
        rates: factors of the learning rate for A and B, and for the filter.
        shared: one filter for all layers of one kind.
        longer: how many times the task's epochs.
    """

    arguments: dict = dataclasses.field(default_factory=dict)
    start: callable = None
    rate: float = 5e-3
    warm_up: bool = False
    rates: tuple = (1.0, 1.0)
    weight_decay: float = 0.0
    shared: bool = False
    longer: int = 1


# --- starts ---


def zero_b(backbone, data):
    """As LoRA starts: A random, B zero; the filter orthogonal."""
    for layer in dcft_layers(backbone).values():
        layer.dcft_a.assign(initializers.HeUniform()(layer.dcft_a.shape))
        layer.dcft_b.assign(np.zeros(layer.dcft_b.shape))
        layer.dcft_filter.assign(initializers.Orthogonal()(layer.dcft_filter.shape))


def lora(backbone, data):
    start_as_lora(backbone)


def scale_wide_layers(factor, backbone, data):
    """Another alpha for the feed-forward kernels, four times as large as the others."""
    for layer in dcft_layers(backbone).values():
        if layer.dcft_adapter.matrix_shape[0] != layer.dcft_adapter.matrix_shape[1]:
            layer.alpha *= factor


def from_kernel(backbone, data):
    """A and B the directions of the kernel's own best approximation by an increment."""
    for layer in dcft_layers(backbone).values():
        set_directions(layer, np.array(layer.dcft_frozen_weight()))


def from_gradient(backbone, data):
    """A and B the directions of the best approximation of the first batches' kernel gradients."""
    plain, plain_backbone = make("sst2")
    layers = walk(plain_backbone)
    kernels = {path: layers[path]._kernel for path in backbone.dcft_config["layers"]}
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    dataset, _ = batches(data["train"], 1, BATCH_SIZES["sst2"], 1000)
    sums = {path: 0.0 for path in kernels}
    for inputs, labels in dataset.take(16):
        with tf.GradientTape() as tape:
            value = loss(labels, plain(inputs, training=False))
        found = tape.gradient(value, [kernel.value for kernel in kernels.values()])
        sums = {path: sums[path] + g.numpy() for path, g in zip(kernels, found)}
    adapted = walk(backbone)
    for path, gradient in sums.items():
        set_directions(adapted[path], gradient)


def set_directions(layer, weight):
    """A and B of unit norm from the best approximation of a matrix by (A B) x filter (van Loan)."""
    d, (rows, columns) = layer.dcft_settings.kernel_size, layer.dcft_adapter.matrix_shape
    blocks = weight.reshape(rows // d, d, columns // d, d).transpose(0, 2, 1, 3)
    left, _, _ = np.linalg.svd(blocks.reshape(-1, d * d), full_matrices=False)
    u, _, vh = np.linalg.svd(left[:, 0].reshape(rows // d, columns // d), full_matrices=False)
    layer.dcft_a.assign(u[:, : layer.rank])
    layer.dcft_b.assign(vh[: layer.rank])


# What every variant starts from.
REFERENCES = {"sst2": {"alpha": 4.0, "factor_initializer": normal(0.02)}, "xquad": {}}

SST2_VARIANTS = {
    "reference": Variant(),
    "LoRA, rank 1": Variant({"kernel_size": 1, "alpha": 1.0}, lora),
    "LoRA, rank 1, rate 1e-2": Variant({"kernel_size": 1, "alpha": 1.0}, lora, rate=1e-2),
    # The start
    "all N(0, 0.02²), the paper's": Variant({"filter_initializer": normal(0.02)}),
    "orthonormal A and B": Variant({"factor_initializer": initializers.Orthogonal()}),
    "zero B, orthogonal filter": Variant(start=zero_b),
    "A and B from the kernel": Variant(start=from_kernel),
    "A and B from the first gradient": Variant(start=from_gradient),
    # Sizes
    "alpha 8": Variant({"alpha": 8.0}),
    "alpha 16": Variant({"alpha": 16.0}),
    "alpha 64": Variant({"alpha": 64.0}),
    "alpha 16, rate 1e-2": Variant({"alpha": 16.0}, rate=1e-2),
    # Both: A and B change faster for their size, as alpha makes up for their start
    **{
        f"alpha {alpha}, A and B N(0, {deviation}²)": Variant(
            {"alpha": float(alpha), "factor_initializer": normal(deviation)}
        )
        for alpha, deviation in ((64, 0.005), (64, 0.001), (256, 0.0025), (256, 0.005), (16, 0.01))
    },
    **{
        f"alpha 64, A and B N(0, 0.005²), {name}": Variant(
            {"alpha": 64.0, "factor_initializer": normal(0.005), **arguments}
        )
        for name, arguments in {
            "kernel size 2": {"kernel_size": 2},
            "rank 2, kernel size 12": {"rank": 2, "kernel_size": 12},
            "rank 4": {"rank": 4},
        }.items()
    },
    # The default, in other forms and with an alpha for each layer
    **{
        f"alpha 16, A and B N(0, 0.01²), {name}": Variant(
            {"alpha": 16.0, "factor_initializer": normal(0.01), **arguments}, start
        )
        for name, arguments, start in (
            ("rank 2, kernel size 16", {"rank": 2, "kernel_size": 16}, None),
            ("rank 4, kernel size 16", {"rank": 4, "kernel_size": 16}, None),
            ("alpha halved in wide layers", {}, functools.partial(scale_wide_layers, 0.5)),
            ("alpha doubled in wide layers", {}, functools.partial(scale_wide_layers, 2.0)),
        )
    },
    # Learning rates
    "rate 1e-2": Variant(rate=1e-2),
    **{
        f"alpha 16, A and B N(0, 0.01²), rate 1e-2, warm-up{more}": Variant(
            {"alpha": 16.0, "factor_initializer": normal(0.01), **arguments},
            rate=1e-2,
            warm_up=True,
        )
        for more, arguments in (("", {}), (", orthogonality 0.1", {"orthogonality": 0.1}))
    },
    "filter's rate x 4": Variant(rates=(1.0, 4.0)),
    "A's and B's rate x 4": Variant(rates=(4.0, 1.0)),
    # Form, at about the same count
    "rank 4, kernel size 8": Variant({"rank": 4}),
    "filters shared by kind": Variant(shared=True),
    "LoRA, rank 1, one block of six": Variant(
        {"kernel_size": 1, "alpha": 1.0, "target_layers": "transformer_layer_5/"}, lora
    ),
    # Regularisation and length
    "orthogonality 0.1": Variant({"orthogonality": 0.1}),
    "the paper's arguments": Variant(PAPER_RECIPES["cola"]["arguments"] | {"alpha": 4.0}),
    "weight decay 0.1": Variant(weight_decay=0.1),
    "twice the epochs": Variant(longer=2),
    "alpha 16, A and B N(0, 0.01²), twice the epochs": Variant(
        {"alpha": 16.0, "factor_initializer": normal(0.01)}, longer=2
    ),
    "alpha 16, A and B N(0, 0.01²), kernel size 2, twice the epochs": Variant(
        {"alpha": 16.0, "factor_initializer": normal(0.01), "kernel_size": 2}, longer=2
    ),
    "LoRA, rank 1, twice the epochs": Variant({"kernel_size": 1, "alpha": 1.0}, lora, longer=2),
}

# The reference and LoRA themselves are among the runs of `quality.py`.
XQUAD_VARIANTS = {
    "A's and B's rate x 4": Variant(rates=(4.0, 1.0)),
    "alpha 64": Variant({"alpha": 64.0}),
    "rate 1e-2, warm-up": Variant(rate=1e-2, warm_up=True),
    "rank 4": Variant({"rank": 4}),
    "twice the epochs": Variant(longer=2),
    "rate 1e-2, twice the epochs": Variant(rate=1e-2, longer=2),
    "LoRA, rank 1, twice the epochs": Variant({"kernel_size": 1, "alpha": 1.0}, lora, longer=2),
}

VARIANTS = {"sst2": SST2_VARIANTS, "xquad": XQUAD_VARIANTS}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="folder of tensorflow_datasets with GLUE")
    parser.add_argument("--squad", help="a file in SQuAD's format, for the task xquad")
    parser.add_argument("--task", choices=VARIANTS, default="sst2")
    parser.add_argument("--variants", nargs="+", help="without it all of the task's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--report", action="store_true", help="write the tables in the docs")
    options = parser.parse_args()
    if options.report:
        for task in VARIANTS:
            fill(PAGE, f"ablation.py on {task}", table(task, finished()))
        return
    names = options.variants or VARIANTS[options.task]
    if unknown := set(names) - set(VARIANTS[options.task]):
        parser.error(f"--variants: not of {options.task}: {', '.join(unknown)}")
    if options.task == "xquad" and not options.squad:
        parser.error("the task xquad needs --squad")
    data = load(options.task, options)
    for seed in options.seeds:
        for name in names:
            run = {"task": options.task, "variant": name, "seed": seed}
            if any(run.items() <= done.items() for done in finished()):
                continue
            result = {**run, **measure(options.task, VARIANTS[options.task][name], seed, data)}
            add_line(result, RESULTS)
            print(result, flush=True)


def finished() -> list:
    return lines_of(RESULTS)


def measure(task, variant, seed, data) -> dict:
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    model, backbone = make(task)
    enable_dcft(backbone, **{**REFERENCES[task], **variant.arguments})
    if variant.start:
        variant.start(backbone, data)
    epochs = EPOCHS[task] * variant.longer
    dataset, steps = batches(data["train"], epochs, BATCH_SIZES[task], seed)
    model.compile(
        optimizer=optimizer(variant, steps),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        # The loss without the orthogonality penalty.
        metrics=[keras.metrics.SparseCategoricalCrossentropy(from_logits=True, name="entropy")],
        jit_compile=False,
    )
    build_optimizer(model)
    history = model.fit(dataset, steps_per_epoch=steps, verbose=0).history
    validation, validation_steps = batches(data["validation"], 1, 128, 0)
    evaluated = model.evaluate(validation, steps=validation_steps, verbose=0, return_dict=True)
    return {
        "score": data["score"](model, data["validation"]),
        "loss": evaluated["entropy"],
        "training_loss": history["loss"][-1],
        "trainable_parameters": count(backbone, variant),
        "steps": steps,
        "backend": keras.backend.backend(),
    }


def optimizer(variant, steps):
    def adam(factor=1.0):
        decay = LinearWarmupDecay if variant.warm_up else linear_decay
        schedule = decay(variant.rate * factor, steps)
        if variant.shared:
            return SharedFilters(schedule)
        return optimizers.AdamW(schedule, weight_decay=variant.weight_decay)

    if variant.rates == (1.0, 1.0):
        return adam()
    factors, filters = variant.rates
    return optimizers.MultiOptimizer(
        optimizers.OptimizerMap(
            adam(), {".*/dcft_[ab]": adam(factors), ".*/dcft_filter": adam(filters)}
        )
    )


class SharedFilters(optimizers.Adam):
    """Adam that moves the filters of all layers of one kind by the sum of their gradients.

    They start equal, so they stay equal, as one variable would that the layers share.
    """

    def apply(self, grads, trainable_variables=None):
        kinds = [kind(v) for v in self._trainable_variables]
        sums = {k: sum(g for g, other in zip(grads, kinds) if other == k) for k in kinds if k}
        super().apply([sums.get(k, g) for k, g in zip(kinds, grads)], trainable_variables)


def kind(variable):
    """What is the same for the filters of one kind of layer in all blocks."""
    if not variable.path.endswith("dcft_filter"):
        return None
    return re.sub(r"\d+", "", "/".join(variable.path.split("/")[-3:-1]))


def count(backbone, variant) -> int:
    total = sum(int(np.prod(v.shape)) for v in backbone.trainable_variables)
    if variant.shared:
        filters = [v for v in backbone.trainable_variables if kind(v)]
        total -= (len(filters) - len({kind(v) for v in filters})) * int(np.prod(filters[0].shape))
    return total


def table(task, runs) -> str:
    lines = [
        f"| variant | trainable | {MEASURES[task]}, by seed | mean | loss, by seed "
        "| training loss, mean of all steps |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in VARIANTS[task]:
        mine = [run for run in runs if (run["task"], run["variant"]) == (task, name)]
        mine.sort(key=lambda run: run["seed"])
        if mine:
            scores, losses, training = (
                [run[key] for run in mine] for key in ("score", "loss", "training_loss")
            )
            lines.append(
                f"| {name} | {mine[0]['trainable_parameters']:,} | {listed(scores, 4)} | "
                f"{statistics.mean(scores):.4f} | {listed(losses, 3)} | {listed(training, 3)} |"
            )
    return "\n".join(lines)


def listed(values, digits) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)


if __name__ == "__main__":
    main()
