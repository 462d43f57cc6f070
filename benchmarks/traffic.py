"""Adapters on a GPU beside the memory traffic that their products need.

    python benchmarks/traffic.py            # measures the device's rates
    python benchmarks/traffic.py --report   # the table, from them and training_step.py's results

What a method needs beyond the floor is worked out from the shapes: every tensor that one of its
products takes is read, every one that it gives is written, sums in place. `separate` is the same
with each product formed on its own and added after, as eager code does. No time can be below the
larger of bytes over a copy's rate and operations over a large square product's.
"""

import argparse
import json
from pathlib import Path

import measuring
from measuring import spread, store
from training_step import (
    DCFT,
    FLOOR,
    FULL_INCREMENT,
    HF_FLOOR,
    LORA,
    MINILM_SHAPE,
    PEFT,
)
from training_step import RESULTS as STEPS

RESULTS = measuring.RESULTS / "traffic.json"
ITEM_BYTES = {"float32": 4, "bfloat16": 2}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", action="store_true", help="print the table and stop")
    parser.add_argument("--steps", type=Path, default=STEPS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.report:
        return print(
            table(json.loads(options.steps.read_text()), json.loads(options.output.read_text()))
        )
    measuring.load_beside_others()
    import torch  # noqa: F401, before it is this program's turn

    measuring.time_alone()
    for dtype in ITEM_BYTES:
        store(measure(dtype), options.output)


def measure(dtype, size=2**30, side=8192) -> dict:
    """What the device reaches on a copy and on a square product of random numbers."""
    import torch

    source = torch.randn(size // ITEM_BYTES[dtype], device="cuda", dtype=getattr(torch, dtype))
    target = torch.empty_like(source)
    copied = [2 * source.nbytes / seconds(lambda: target.copy_(source)) for _ in range(9)]
    left, right = torch.randn(2, side, side, device="cuda", dtype=getattr(torch, dtype))
    multiplied = [2 * side**3 / seconds(lambda: left @ right) for _ in range(9)]
    return {
        "backend": "torch",
        "model": f"copy and product, {dtype}",
        "device": torch.cuda.get_device_name(),
        "dtype": dtype,
        "copy, GB read and written a second": spread([x / 1e9 for x in copied]),
        "square product, TFLOP/s": spread([x / 1e12 for x in multiplied]),
        "versions": {"torch": torch.__version__},
    }


def seconds(run) -> float:
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def products(arguments, batch, tokens):
    """(inputs, outputs, rows) of every product that is adapted in a BERT with a pooler."""
    hidden, wide = arguments["hidden_dim"], arguments["intermediate_dim"]
    rows = batch * tokens
    block = [(hidden, hidden, rows)] * 4 + [(hidden, wide, rows), (wide, hidden, rows)]
    return block * arguments["num_layers"] + [(hidden, hidden, batch)]


def needs(method, shapes, item) -> dict | None:
    """Bytes and multiplications (two operations each) of a step beyond the floor's."""
    if method in DCFT or method == PEFT:
        width = DCFT[method]["kernel_size"] * DCFT[method]["rank"] if method in DCFT else 1
        return {
            "bytes": sum(item * thin_elements(*shape, width, False) for shape in shapes),
            "separate": sum(item * thin_elements(*shape, width, True) for shape in shapes),
            "operations": sum(6 * n * width * (i + o) for i, o, n in shapes),
        }
    if method in LORA or method == FULL_INCREMENT:
        # The kernel with the increment in it is formed from the kernel, its gradient from inputs
        # and the outputs' gradient, and the small factors' from that.
        bytes_moved = sum(item * (4 * i * o + n * (i + o)) for i, o, n in shapes)
        operations = sum(2 * n * i * o for i, o, n in shapes)
        return {"bytes": bytes_moved, "separate": bytes_moved, "operations": operations}
    return None


def thin_elements(inputs, outputs, rows, width, separate) -> int:
    """Elements that `inputs · D · U`, added to the base's outputs, and its gradients move."""
    added = 4 if separate else 2  # write, read both, write; or read and write in place
    wide = rows * (
        (1 + 1 + added) * inputs  # forward, D's gradient, the inputs' gradient
        + (added + 1 + 1) * outputs  # the outputs, their gradient for H's and for U's
    )
    return wide + 6 * rows * width + 3 * width * (inputs + outputs)


def table(steps, measured) -> str:
    rates = {(run["device"], run["dtype"]): run for run in measured}
    rows = [
        "| device | model | backend | method | beyond the floor | bytes | in separate products "
        "| limit | beyond the floor / limit |",
        "|---|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for run in steps:
        rate = rates.get((run["device"], run["dtype"]))
        if not rate:
            continue
        arguments = run["arguments"] or MINILM_SHAPE
        shapes = products(arguments, run["batch"], run["tokens"])
        for method in run["methods"]:
            need = needs(method, shapes, ITEM_BYTES[run["dtype"]])
            floor = HF_FLOOR if method == PEFT else FLOOR
            if not need or floor not in run["methods"]:
                continue
            ours, base = (
                run["methods"][name]["milliseconds"]["median"] for name in (method, floor)
            )
            beyond = ours - base
            bandwidth = rate["copy, GB read and written a second"]["median"] * 1e9
            operations = rate["square product, TFLOP/s"]["median"] * 1e12
            limit = 1000 * max(need["bytes"] / bandwidth, need["operations"] / operations)
            rows.append(
                f"| {run['device']} | {run['model']} | {run['backend']} | {method} "
                f"| {beyond:.1f} ms | {need['bytes'] / 1e9:.2f} GB "
                f"| {need['separate'] / 1e9:.2f} GB | {limit:.2f} ms | {beyond / limit:.2f} |"
            )
    return "\n".join(rows)


if __name__ == "__main__":
    main()
