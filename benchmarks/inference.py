"""Time of predicting and generating: the base model, merged, and with live adapters.

    python benchmarks/inference.py                   # all backends, some 10 minutes on two cores
    python benchmarks/inference.py --report          # the table from the results

In each backend's process the three variants take turns, so that the machine's drift hits all alike.
Results go to `benchmarks/results/inference.json`.
"""

import argparse
import json
import sys
from pathlib import Path

import measuring
from measuring import BACKENDS, conditions, store, work
from training_step import (
    MODELS,
    VOCABULARY,
    arguments_of,
    batch_of,
    make_classifier,
)

RESULTS = measuring.RESULTS / "inference.json"
SUBJECTS = (*MODELS, "generate")
PROMPT, GENERATED, BATCH = 16, 48, 4
GENERATOR = {"num_layers": 6, "num_heads": 8, "hidden_dim": 512, "intermediate_dim": 2048}
if measuring.QUICK:
    PROMPT, GENERATED, BATCH = 4, 4, 2
    GENERATOR = {"num_layers": 1, "num_heads": 2, "hidden_dim": 32, "intermediate_dim": 64}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="+", default=BACKENDS, choices=BACKENDS)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument(
        "--models", nargs="+", default=["minilm", "base", "generate"], choices=SUBJECTS
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="print the table and stop")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.report:
        return print(table(json.loads(options.output.read_text())))
    if options.worker:
        return print("RESULT " + json.dumps(measure(options.worker, options.rounds)))
    for backend in options.backends:
        for subject in options.models:
            print(f"{backend}: {subject}", flush=True)
            rounds = options.rounds if subject != "generate" else max(3, options.rounds // 3)
            store(work(__file__, backend, subject, "--rounds", str(rounds)), options.output)


def measure(subject, rounds) -> dict:
    measuring.load_beside_others()
    make = make_generator if subject == "generate" else make_predictor
    before = ("adapted, earlier version",) if measuring.BEFORE else ()
    variants = {name: make(subject, name) for name in ("base", "merged", "adapted", *before)}
    result = {
        **conditions(subject),
        "arguments": None if subject == "generate" else arguments_of(subject),
        "rounds": rounds,
        **measuring.compare(variants, rounds),
    }
    if subject == "generate":
        result["tokens per second"] = {
            name: round(BATCH * GENERATED * 1000 / spent["median"], 1)
            for name, spent in result["milliseconds"].items()
        }
    return result


def make_variant(model, name):
    """The model itself, or adapted with random adapters, or merged after that."""
    import numpy as np

    import keras_dcft

    if name == "base":
        return model
    package = measuring.package_before() if "earlier" in name else keras_dcft
    package.enable_dcft(model, kernel_size=8)
    for variable in model.trainable_variables:
        if "dcft" in variable.name:
            variable.assign(0.05 * np.random.default_rng(0).normal(size=variable.shape))
    return package.merge_dcft(model) if name == "merged" else model


def make_predictor(subject, name):
    import keras
    import numpy as np

    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(MODELS[subject][2])
    task = make_variant(make_classifier(subject), name)
    token_ids, _ = batch_of(subject)
    inputs = {
        "token_ids": token_ids,
        "padding_mask": np.ones_like(token_ids),
        "segment_ids": np.zeros_like(token_ids),
    }
    return lambda: task.predict_on_batch(inputs)


def make_generator(subject, name):
    import keras
    import keras_hub
    import numpy as np

    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.GPT2Backbone(
        VOCABULARY, **GENERATOR, max_sequence_length=PROMPT + GENERATED
    )
    model = make_variant(keras_hub.models.GPT2CausalLM(backbone, preprocessor=None), name)
    prompt = np.random.default_rng(0).integers(0, VOCABULARY, (BATCH, PROMPT)).astype("int32")
    inputs = {
        "token_ids": np.pad(prompt, [(0, 0), (0, GENERATED)]),
        "padding_mask": np.pad(np.ones_like(prompt), [(0, 0), (0, GENERATED)]),
    }
    return lambda: model.generate(inputs, stop_token_ids=None)


def table(results) -> str:
    rows = [
        "| | backend | device | base | merged / base | adapted / base | earlier version / base "
        "| tokens per second: base, merged, adapted |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for run in results:
        ratios = [
            run["ratio to base"].get(name)
            for name in ("merged", "adapted", "adapted, earlier version")
        ]
        told = (
            f"{r['median']:.2f} ({r['quartiles'][0]:.2f}–{r['quartiles'][1]:.2f})" if r else ""
            for r in ratios
        )
        tokens = ", ".join(f"{x:.0f}" for x in list(run.get("tokens per second", {}).values())[:3])
        batch_and_tokens = (
            f"GPT-2, 6 layers of 512, {BATCH} x {PROMPT} + {GENERATED}"
            if run["model"] == "generate"
            else "{}, {} x {}".format(run["model"], *MODELS[run["model"]][:2])
        )
        if run["model"] == "minilm" and run.get("arguments"):
            batch_and_tokens += ", random weights"
        rows.append(
            f"| {batch_and_tokens} | {run['backend']} | {run['device']} "
            f"| {run['milliseconds']['base']['median']:.1f} ms | {' | '.join(told)} | {tokens} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
