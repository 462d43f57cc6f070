"""How the cost of DCFT grows: with rank, kernel size, width and tokens; and the cost of enabling.

    python benchmarks/growth.py                  # all backends, some 15 minutes on two cores
    python benchmarks/growth.py --report         # table and chart from the results

One dense layer behind a trainable offset, so that the backward pass runs through it: the *floor*
(layer frozen), DCFT, and Keras's LoRA of rank 1, turn by turn in one process for each backend. Then
`enable_dcft` on a random Llama of 1.1 B parameters in bfloat16: time and added memory. Results go
to `benchmarks/results/growth.json`.
"""

import argparse
import json
import sys
import time

import measuring
from measuring import BACKENDS, conditions, memory_in_use, store, work

RESULTS = measuring.RESULTS / "growth.json"
CHART = measuring.DOCS / "growth.png"
TYPICAL = {"width": 1024, "tokens": 1024, "kernel_size": 8, "rank": 1}
SWEEPS = {
    "rank": (1, 2, 4, 8, 16),
    "kernel_size": (1, 2, 4, 8, 16, 32),
    "width": (256, 512, 1024, 2048, 4096),
    "tokens": (256, 512, 1024, 2048, 4096),
}
SUBJECTS = ("one layer", "enabling")
METHODS = ("floor", "DCFT", "Keras LoRA, rank 1")
if measuring.BEFORE:
    METHODS += ("DCFT, earlier version",)
DECODER = {
    "vocabulary_size": 32000,
    "num_layers": 16,
    "num_query_heads": 32,
    "hidden_dim": 2048,
    "intermediate_dim": 8192,
    "num_key_value_heads": 8,
}
if measuring.QUICK:
    TYPICAL |= {"width": 16, "tokens": 8}
    SWEEPS = {"rank": (1, 2), "kernel_size": (2, 8), "width": (16, 32), "tokens": (4, 8)}
    DECODER |= {"vocabulary_size": 64, "num_layers": 1, "hidden_dim": 64, "intermediate_dim": 32}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="+", default=BACKENDS, choices=BACKENDS)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--report", action="store_true", help="print the table, draw the chart")
    parser.add_argument("--subjects", nargs="+", default=SUBJECTS, choices=SUBJECTS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.report:
        results = json.loads(RESULTS.read_text())
        draw([run for run in results if run["model"] == "one layer"])
        return print(table([run for run in results if run["model"] == "enabling"]))
    if options.worker:
        worker = enabling if options.worker == "enabling" else one_layer
        return print("RESULT " + json.dumps(worker(options.rounds)))
    for backend in options.backends:
        for subject in options.subjects:
            print(f"{backend}: {subject}", flush=True)
            store(work(__file__, backend, subject, "--rounds", str(options.rounds)), RESULTS)


def one_layer(rounds) -> dict:
    points = []
    for axis, values in SWEEPS.items():
        for value in values:
            seconds = times_of({**TYPICAL, axis: value}, rounds)
            point = {"axis": axis, "value": value}
            for name in METHODS:
                point[name] = {
                    "milliseconds": measuring.milliseconds(seconds[name]),
                    "ratio to floor": measuring.ratio(seconds[name], seconds["floor"]),
                }
            points.append(point)
    return {**conditions("one layer"), "typical": TYPICAL, "rounds": rounds, "points": points}


def times_of(sizes, rounds) -> dict:
    import keras
    import numpy as np

    import keras_dcft

    class Offset(keras.layers.Layer):
        def build(self, input_shape):
            self.offset = self.add_weight(shape=(input_shape[-1],), initializer="zeros")

        def call(self, inputs):
            return inputs + self.offset

    def make(name):
        keras.utils.set_random_seed(0)
        width = sizes["width"]
        layer = keras.layers.Dense(width)
        model = keras.Sequential([keras.Input((width,)), Offset(), layer])
        if name.startswith("DCFT"):
            package = measuring.package_before() if "earlier" in name else keras_dcft
            package.enable_dcft(
                model,
                kernel_size=sizes["kernel_size"],
                rank=sizes["rank"],
                trainable_layers="offset",
            )
        else:
            for variable in layer.variables:
                variable.trainable = False
        if name == "Keras LoRA, rank 1":
            layer.enable_lora(1)
        model.compile(optimizer=keras.optimizers.Adam(1e-4), loss="mse")
        inputs = np.random.default_rng(0).normal(size=(sizes["tokens"], width)).astype("float32")
        return lambda: model.train_on_batch(inputs, inputs)

    steps = {name: make(name) for name in METHODS}
    for step in steps.values():
        step()
        step()
    return measuring.take_turns(steps, rounds)


def enabling(rounds) -> dict:
    """Once, as a model of this size is slow to make; and once more after `remove_dcft`.

    The second time nothing is compiled that was compiled before: what enabling itself takes.
    """
    import keras
    import keras_hub

    from keras_dcft import remove_dcft

    keras.config.set_dtype_policy("bfloat16")
    backbone = keras_hub.models.LlamaBackbone(**DECODER)
    base_parameters = backbone.count_params()
    for weight in backbone.weights:  # JAX is still at work on them
        getattr(weight.value, "block_until_ready", lambda: None)()
    first = cost_of_enabling(backbone)
    layers = len(backbone.dcft_config["layers"])
    remove_dcft(backbone)
    return {
        **conditions("enabling"),
        "parameters": base_parameters,
        "weight_bytes": 2 * base_parameters,
        "layers": layers,
        "first": first,
        "again": cost_of_enabling(backbone),
    }


def cost_of_enabling(backbone) -> dict:
    from keras_dcft import enable_dcft

    memory_in_use()
    before, start = memory_in_use(), time.perf_counter()
    enable_dcft(backbone, kernel_size=8)
    seconds = time.perf_counter() - start
    return {"seconds": round(seconds, 3), "added_bytes": memory_in_use() - before}


def table(results) -> str:
    rows = [
        "| backend | parameters | adapted layers | time | added memory "
        "| again, after `remove_dcft` |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for run in results:
        first, again = (
            (
                f"{run[turn]['seconds']:.2f} s",
                f"{run[turn]['added_bytes'] / 1e6:.1f} MB, "
                f"{100 * run[turn]['added_bytes'] / run['weight_bytes']:.2f} %",
            )
            for turn in ("first", "again")
        )
        rows.append(
            f"| {run['backend']} | {run['parameters']:,} | {run['layers']} "
            f"| {' | '.join(first)} | {', '.join(again)} |"
        )
    return "\n".join(rows)


def draw(results):
    import matplotlib.pyplot as plt

    names = [name for name in results[0]["points"][0] if name not in ("axis", "value")]
    colors = dict(zip(names, ("black", "tab:blue", "tab:orange", "tab:cyan")))
    swept_axes = list(dict.fromkeys(point["axis"] for point in results[0]["points"]))
    figure, axes = plt.subplots(
        len(results),
        len(swept_axes),
        figsize=(15, 3.2 * len(results) + 0.6),
        squeeze=False,
        layout="constrained",
    )
    for row, run in zip(axes, results):
        for axis, swept in zip(row, swept_axes):
            points = [point for point in run["points"] if point["axis"] == swept]
            values = [point["value"] for point in points]
            for name in names:
                spreads = [point[name]["milliseconds"] for point in points]
                axis.plot(
                    values,
                    [s["median"] for s in spreads],
                    "o-",
                    markersize=3,
                    color=colors[name],
                    label=name,
                )
                low, high = zip(*(s["quartiles"] for s in spreads))
                axis.fill_between(values, low, high, color=colors[name], alpha=0.15)
            axis.set_xscale("log", base=2)
            if swept in ("width", "tokens"):
                axis.set_yscale("log")
            else:
                axis.set_ylim(bottom=0)
            axis.set_xticks(values, values)
            axis.grid(alpha=0.3)
            axis.set(xlabel=swept.replace("_", " "), title=run["backend"])
        row[0].set_ylabel("ms per step")
    axes[0][0].legend()
    typical = results[0]["typical"].items()
    others = ", ".join(f"{name.replace('_', ' ')} {size}" for name, size in typical)
    figure.suptitle(f"One dense layer; what is not swept: {others}; {results[0]['device']}")
    figure.savefig(CHART, dpi=100)


if __name__ == "__main__":
    sys.exit(main())
