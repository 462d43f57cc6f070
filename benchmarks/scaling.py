"""What training costs where nothing fits one device: counted on KerasHub's models, not measured.

    python benchmarks/scaling.py              # the tables, in half a minute and 1 GB
    python benchmarks/scaling.py --report     # into docs/scaling.md, with the plot

Backbones are built with KerasHub's own classes and the published sizes inside of a
`keras.StatelessScope`, where variables have shapes and no values. Bytes are exact. Times are not
measured: they follow from `ASSUMED` alone.
"""

import argparse
import dataclasses
import math
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import keras_hub
from measuring import DOCS, QUICK, fill

from keras_dcft import dcft_parameter_table

PAGE = DOCS / "scaling.md"
CHART = PAGE.with_name("scaling.png")

# name: (class, what its preset holds, published parameters)
MODELS = {
    "Gemma 2B": (
        "GemmaBackbone",
        {
            "vocabulary_size": 256000,
            "num_layers": 18,
            "num_query_heads": 8,
            "num_key_value_heads": 1,
            "hidden_dim": 2048,
            "intermediate_dim": 32768,
            "head_dim": 256,
        },
        2_506_172_416,
    ),
    "Llama 3 8B": (
        "Llama3Backbone",
        {
            "vocabulary_size": 128256,
            "num_layers": 32,
            "num_query_heads": 32,
            "num_key_value_heads": 8,
            "hidden_dim": 4096,
            "intermediate_dim": 14336,
        },
        8_030_261_248,
    ),
    "Gemma 2 27B": (
        "GemmaBackbone",
        {
            "vocabulary_size": 256000,
            "num_layers": 46,
            "num_query_heads": 32,
            "num_key_value_heads": 16,
            "hidden_dim": 4608,
            "intermediate_dim": 73728,
            "head_dim": 128,
            "use_post_ffw_norm": True,
            "use_post_attention_norm": True,
        },
        27_227_128_320,
    ),
    "Llama 3 70B": (
        "Llama3Backbone",
        {
            "vocabulary_size": 128256,
            "num_layers": 80,
            "num_query_heads": 64,
            "num_key_value_heads": 8,
            "hidden_dim": 8192,
            "intermediate_dim": 28672,
        },
        70_553_706_496,
    ),
    "Qwen3 MoE 235B": (
        "Qwen3MoeBackbone",
        {
            "vocabulary_size": 151936,
            "num_layers": 94,
            "num_query_heads": 64,
            "num_key_value_heads": 4,
            "hidden_dim": 4096,
            "intermediate_dim": 12288,
            "moe_intermediate_dim": 1536,
            "num_experts": 128,
            "top_k": 8,
            "head_dim": 128,
        },
        235_093_634_560,
    ),
}
if QUICK:
    MODELS = {"Gemma 2 27B": MODELS["Gemma 2 27B"]}
KERNEL_SIZES = (8, 2)
LORA_RANKS = (1, 8, 16)
FULL = "full fine-tuning"

DEVICES = (8, 64, 1000)
GROUP = 8
NUMBER_BYTES = 4  # of what is trained, its gradient and each of Adam's two slots: float32
BASE_BYTES = 2  # a frozen number: bfloat16
ASSUMED = {
    "tokens of a group of 8 devices in a step": 16_384,
    "device memory, bytes": 80e9,
    "device, operations a second": 0.4 * 989e12,
    "between devices of a group, bytes a second": 450e9,
    "fast network, bytes a second and device": 50e9,
    "slow network, bytes a second and device": 1.25e9,
    "each hop of an all-reduce, seconds": 10e-6,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", action="store_true", help="fill docs/scaling.md, draw its plot")
    options = parser.parse_args()
    costs = [costs_of(name, abstract_backbone(name)) for name in MODELS]
    text = "\n\n".join((bytes_table(costs), layout_table(costs), bottleneck_table(costs)))
    print(text)
    if options.report:
        fill(PAGE, "scaling.py", text)
        draw(costs)


# --- counting ---


def abstract_backbone(name):
    """One of the `MODELS` with all of its variables, none of which has a value."""
    cls, arguments, published = MODELS[name]
    backbone = without_memory(getattr(keras_hub.models, cls), **arguments)
    if backbone.count_params() != published:
        raise ValueError(
            f"{name} must have its published number of parameters, {published:,}. "
            f"Received: {backbone.count_params():,}"
        )
    return backbone


def without_memory(cls, **arguments):
    """A Keras model whose variables have shapes and no values."""
    with keras.StatelessScope(initialize_variables=False):
        model = cls(dtype="bfloat16", **arguments)
    keras.utils.clear_session()  # which forgets what would be given values at the next chance
    return model


@dataclasses.dataclass(frozen=True)
class Costs:
    """What is known of a model.

    Attributes:
        name: str.
        parameters: int.
        used_parameters: float, by how many a token is multiplied.
        layers, hidden_dim: ints.
        trainable: dict of methods to trainable numbers.
        sharded_bytes: int, of the base on a device of a group under KerasHub's layout map.
        cut_twice: int, numbers of the base that the map cuts along the data axis as well.
        left_whole: dict of names of weights that the map shards in no axis to their numbers.
        uneven: list of the names of weights that the map would cut unevenly.
    """

    name: str
    parameters: int
    used_parameters: float
    layers: int
    hidden_dim: int
    trainable: dict
    sharded_bytes: int
    cut_twice: int
    left_whole: dict
    uneven: list


def costs_of(name, backbone) -> Costs:
    return Costs(
        name=name,
        parameters=backbone.count_params(),
        used_parameters=used_parameters(backbone),
        layers=backbone.num_layers,
        hidden_dim=backbone.hidden_dim,
        trainable=trainable_numbers(backbone),
        **layout_on_a_group(backbone),
    )


def trainable_numbers(backbone) -> dict:
    """By method; LoRA is on the same matrices, an (in, rank) and a (rank, out) factor on each."""
    table = dcft_parameter_table(backbone, KERNEL_SIZES)
    dcft = {f"DCFT, kernel size {size}": count for size, count in table.dcft_parameters}
    per_rank = sum(rows + columns for rows, columns in table.shapes)
    lora = {f"LoRA, rank {rank}": rank * per_rank for rank in LORA_RANKS}
    return {**dcft, **lora, FULL: table.base_parameters}


def used_parameters(backbone) -> float:
    """By how many numbers a token is multiplied: all, but for looking up and experts not chosen."""
    share = getattr(backbone, "top_k", 1) / getattr(backbone, "num_experts", 1)
    used = sum(
        math.prod(weight.shape)
        * (share if len(weight.shape) == 3 and "expert" in weight.path else 1)
        for weight in backbone.weights
    )
    embedding = backbone.token_embedding
    looked_up = 0 if embedding.tie_weights else math.prod(embedding.embeddings.shape)
    return used - looked_up


def layout_on_a_group(backbone) -> dict:
    """What `Backbone.get_layout_map` makes of the base on a mesh of (1, 8)."""
    mesh = keras.distribution.DeviceMesh(
        (1, GROUP), ("batch", "model"), [f"device:{number}" for number in range(GROUP)]
    )
    layout_map = type(backbone).get_layout_map(mesh)
    sharded_bytes, cut_twice, left_whole, uneven = 0, 0, {}, {}
    for weight in backbone.weights:
        layout = layout_map[weight.path]
        axes = layout.axes if layout is not None else ()
        size = math.prod(weight.shape)
        name = "/".join(weight.path.split("/")[-2:])  # one for all blocks
        cut_twice += size if {"batch", "model"} <= set(axes) else 0
        if "model" not in axes:
            left_whole[name] = left_whole.get(name, 0) + size
            sharded_bytes += BASE_BYTES * size
        elif weight.shape[axes.index("model")] % GROUP:
            uneven[name] = None
            sharded_bytes += BASE_BYTES * size
        else:
            sharded_bytes += BASE_BYTES * size // GROUP
    return {
        "sharded_bytes": sharded_bytes,
        "cut_twice": cut_twice,
        "left_whole": left_whole,
        "uneven": list(uneven),
    }


# --- what follows ---


def sent(payload, devices) -> float:
    """Bytes that each device sends in an all-reduce of a payload in bytes."""
    return 2 * (devices - 1) / devices * payload


def gathered(payload, groups) -> float:
    """Bytes that a device gets of weights cut over groups: forwards, again, and backwards."""
    return 3 * (groups - 1) / groups * payload


def all_reduce_seconds(payload, devices, network) -> float:
    hops = 2 * math.ceil(math.log2(devices))
    wait = hops * ASSUMED["each hop of an all-reduce, seconds"]
    return sent(payload, devices) / ASSUMED[network] + wait


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step on paper.

    Attributes:
        memory: float, bytes on each device.
        compute, group, network: floats, seconds: products; activations between the devices of a
            group; gradients between all devices, and weights where full fine-tuning gathers them.
    """

    memory: float
    compute: float
    group: float
    network: float

    def bottleneck(self) -> str:
        if self.memory > ASSUMED["device memory, bytes"]:
            return f"memory, {self.memory / 1e9:.0f} GB"
        longest = max(("compute", "group", "network"), key=lambda part: getattr(self, part))
        names = {"compute": "compute", "group": "links in the group", "network": "network"}
        return f"{names[longest]}, {ratio(self.network / self.compute)}"


def step(costs: Costs, method, devices, network) -> Step:
    """Groups of 8 devices; each holds the base once, cut in 8, and takes rows of its own.

    Full fine-tuning where that is too large keeps weights and optimizer state cut over all devices,
    and gathers a group's share anew for each pass.
    """
    tokens = ASSUMED["tokens of a group of 8 devices in a step"]
    activations = 2 * tokens * costs.hidden_dim  # bfloat16, of one block
    if devices == GROUP:
        network = "between devices of a group, bytes a second"
    groups = devices // GROUP
    trained = costs.trainable[method]
    products = 8 if method == FULL else 6  # forwards, again for the gradients, and those
    compute = (
        products * costs.used_parameters * tokens / (GROUP * ASSUMED["device, operations a second"])
    )
    group = (
        6
        * costs.layers
        * all_reduce_seconds(activations, GROUP, "between devices of a group, bytes a second")
    )
    kept = costs.layers * activations
    if method != FULL:
        memory = kept + BASE_BYTES * costs.parameters / GROUP + 4 * NUMBER_BYTES * trained
        return Step(
            memory,
            compute,
            group,
            all_reduce_seconds(NUMBER_BYTES * trained, devices, network),
        )
    share = trained / GROUP
    memory = kept + 4 * NUMBER_BYTES * share
    if groups == 1:
        return Step(memory, compute, group, 0.0)
    if memory <= ASSUMED["device memory, bytes"]:
        return Step(
            memory, compute, group, all_reduce_seconds(NUMBER_BYTES * share, groups, network)
        )
    # A block's weights are whole in the group for the time of the block only.
    weights = gathered(BASE_BYTES * share, groups)
    gradients = (groups - 1) / groups * NUMBER_BYTES * share
    memory = kept + 4 * NUMBER_BYTES * trained / devices
    return Step(memory, compute, group, (weights + gradients) / ASSUMED[network])


# --- the page ---


def amount(number_of_bytes) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number_of_bytes >= size:
            return f"{number_of_bytes / size:.3g} {unit}"
    return f"{number_of_bytes / 1e3:.3g} kB"


def ratio(value) -> str:
    return f"{value:.0f}" if value >= 10 else "< 0.001" if value < 0.001 else f"{value:.2g}"


def bytes_table(all_costs) -> str:
    lines = [
        "| model | method | trainable numbers | gradients | Adam's state | checkpoint "
        "| sent by each of 64 devices in a step |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for costs in all_costs:
        for method, count in costs.trainable.items():
            gradients = NUMBER_BYTES * count
            cells = (gradients, 2 * gradients, 3 * gradients, sent(gradients, 64))
            lines.append(
                f"| {costs.name} | {method} | {count:,} | {' | '.join(map(amount, cells))} |"
            )
    return "\n".join(lines)


def layout_table(all_costs) -> str:
    lines = [
        "| model | base in bfloat16 | on each of 8 devices | stays whole | cannot be cut in 8 "
        "| gathered by each of 64 devices in a step, mesh (8, 8) |",
        "|---|---:|---:|---|---|---:|",
    ]
    for costs in all_costs:
        whole = [
            f"`{name}` ({amount(BASE_BYTES * size)})"
            for name, size in costs.left_whole.items()
            if BASE_BYTES * size >= 1e8
        ]
        uneven = ", ".join(f"`{name}`" for name in costs.uneven)
        lines.append(
            f"| {costs.name} | {amount(BASE_BYTES * costs.parameters)} "
            f"| {amount(costs.sharded_bytes)} | {', '.join(whole) or 'norms'} | {uneven or '-'} "
            f"| {amount(gathered(BASE_BYTES * costs.cut_twice / GROUP, 64 // GROUP))} |"
        )
    return "\n".join(lines)


BOTTLENECK_COLUMNS = [(8, "fast network, bytes a second and device")] + [
    (devices, f"{speed} network, bytes a second and device")
    for devices in DEVICES[1:]
    for speed in ("fast", "slow")
]


def bottleneck_table(all_costs) -> str:
    heads = ["8"] + [
        f"{devices:,}, {network.split()[0]} network" for devices, network in BOTTLENECK_COLUMNS[1:]
    ]
    lines = [f"| model | method | {' | '.join(heads)} |", "|---|---|" + "---|" * len(heads)]
    for costs in all_costs:
        for method in costs.trainable:
            cells = [step(costs, method, *column).bottleneck() for column in BOTTLENECK_COLUMNS]
            lines.append(f"| {costs.name} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(all_costs):
    from matplotlib.figure import Figure

    methods = list(all_costs[0].trainable)
    colors = dict(
        zip(methods, ("tab:blue", "tab:cyan", "gold", "tab:orange", "tab:red", "dimgray"))
    )
    figure = Figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    width = 0.8 / len(methods)
    for place, method in enumerate(methods):
        left.bar(
            [number + (place - (len(methods) - 1) / 2) * width for number in range(len(all_costs))],
            [sent(NUMBER_BYTES * costs.trainable[method], 64) for costs in all_costs],
            width,
            color=colors[method],
            label=method,
        )
    left.set_yscale("log")
    left.set_ylim(top=1e14)
    left.set_xticks(
        range(len(all_costs)), [costs.name.replace(" MoE", "\nMoE") for costs in all_costs]
    )
    left.set(ylabel="bytes", title="Sent by each of 64 devices in a step")
    left.legend(ncols=3, loc="upper left", fontsize=9)
    left.grid(axis="y", alpha=0.3)

    costs = next(costs for costs in all_costs if costs.name == "Gemma 2 27B")
    devices = [16, 32, 64, 128, 256, 512, 1024]
    for method in methods:
        seconds = [
            step(costs, method, n, "slow network, bytes a second and device").network
            for n in devices
        ]
        right.plot(devices, seconds, "o-", markersize=3, color=colors[method], label=method)
    compute = step(costs, methods[0], 64, "slow network, bytes a second and device").compute
    right.axhline(compute, color="black", linestyle="--", linewidth=1)
    right.annotate(
        f"computing, with adapters: {compute:.2f} s",
        (16, compute),
        xytext=(0, 5),
        textcoords="offset points",
    )
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.set_xticks(devices, devices)
    right.set(
        xlabel="devices",
        ylabel="seconds",
        title=f"{costs.name}: gradients on the slow network, each step",
    )
    right.grid(alpha=0.3)
    figure.savefig(CHART, dpi=100)


if __name__ == "__main__":
    main()
