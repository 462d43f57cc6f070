"""`AdapterBank`: a batch whose rows have an adapter each, against one adapter for all, and others.

    python benchmarks/bank.py                   # all backends, some 15 minutes on two cores
    python benchmarks/bank.py --report          # the tables from the results

The real MiniLM with 32 rows of 48 tokens, and a GPT-2 of 6 layers that generates. In each backend's
process the variants take turns, so that the machine's drift hits all alike. Results go to
`benchmarks/results/bank.json`.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import measuring
from measuring import BACKENDS, compare, conditions, spread, store, work
from training_step import VOCABULARY

RESULTS = measuring.RESULTS / "bank.json"
ROWS, TOKENS = 32, 48
SIZES, TYPICAL_SIZE = (10, 100, 1_000, 10_000), 1_000
PROMPTS, PROMPT, GENERATED = 8, 16, 48
SUBJECTS = ("predict", "generate", "peft")
PEFT_ADAPTERS = {1: 100, 8: 100}
GENERATOR = {"num_layers": 6, "num_heads": 8, "hidden_dim": 512, "intermediate_dim": 2048}
if measuring.QUICK:
    ROWS, TOKENS = 2, 8
    SIZES, TYPICAL_SIZE = (2, 4), 4
    PROMPTS, PROMPT, GENERATED = 2, 4, 4
    PEFT_ADAPTERS = {1: 3}
    GENERATOR = {"num_layers": 1, "num_heads": 2, "hidden_dim": 32, "intermediate_dim": 64}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="+", default=BACKENDS, choices=BACKENDS)
    parser.add_argument("--subjects", nargs="+", default=SUBJECTS, choices=SUBJECTS)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--report", action="store_true", help="print the tables and stop")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.report:
        return print(tables(json.loads(RESULTS.read_text())))
    if options.worker:
        return print("RESULT " + json.dumps(measure(options.worker, options.rounds)))
    for backend in options.backends:
        for subject in options.subjects:
            if subject != "peft" or backend == "torch":
                print(f"{backend}: {subject}", flush=True)
                rounds = ("--rounds", str(options.rounds))
                store(work(__file__, backend, subject, *rounds), RESULTS)


def measure(subject, rounds) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        run = {"predict": predicting, "generate": generating, "peft": with_peft}[subject]
        measured = run(Path(folder), rounds)
    return {
        **conditions(subject),
        "rounds": rounds,
        **measured,
    }


def adapter_files(model, folder) -> list:
    """Files of adapters with random values; the model then has the last of them."""
    import numpy as np

    from keras_dcft import enable_dcft, save_dcft_weights

    enable_dcft(model, kernel_size=8)
    files = []
    for number in range(ROWS):
        for variable in model.trainable_variables:
            if "dcft" in variable.name:
                values = np.random.default_rng(number).normal(size=variable.shape)
                variable.assign(0.05 * values)
        files.append(folder / f"{number}.dcft.safetensors")
        save_dcft_weights(model, files[-1])
    return files


def predicting(folder, rounds) -> dict:
    import keras
    import keras_hub
    import numpy as np
    from support.methods import default_preset

    from keras_dcft import AdapterBank, activate_dcft, load_dcft_weights, remove_dcft

    keras.utils.set_random_seed(0)

    def make():
        preset = str(default_preset())
        return keras_hub.models.BertTextClassifier.from_preset(
            preset, num_classes=2, preprocessor=None
        )

    token_ids = np.random.default_rng(0).integers(1000, VOCABULARY, (ROWS, TOKENS)).astype("int32")
    inputs = {
        "token_ids": token_ids,
        "padding_mask": np.ones_like(token_ids),
        "segment_ids": np.zeros_like(token_ids),
    }
    rows = [{name: x[i : i + 1] for name, x in inputs.items()} for i in range(ROWS)]
    one, swapped, base = make(), make(), make()
    files = adapter_files(one, folder)
    for number, file in enumerate(files[:2]):
        load_dcft_weights(swapped, file, name=str(number))
    result, growth = {}, {}
    for size in SIZES:
        bank = AdapterBank(base, {"0": files[0]}, capacity=size)
        adding = []
        for number in range(1, size):
            start = time.perf_counter()
            bank.add(str(number), files[number % ROWS])
            adding.append(1000 * (time.perf_counter() - start))
        names = [str(random.Random(i).randrange(size)) for i in range(ROWS)]
        variants = {
            "one": lambda: one.predict_on_batch(inputs),
            "bank": lambda: bank.predict(inputs, names),  # noqa: B023
        }
        if size == TYPICAL_SIZE:
            variants["base"] = lambda: base.predict_on_batch(inputs)
            variants["swapped"] = lambda: [
                activate_dcft(swapped, str(i % 2)).predict_on_batch(row)
                for i, row in enumerate(rows)
            ]
            result = compare(variants, rounds)
        measured = result if size == TYPICAL_SIZE else compare(variants, max(3, rounds // 3))
        growth[size] = {
            "batch": measured["milliseconds"]["bank"],
            "ratio": measured["ratio to one"]["bank"],
            "adding": spread(adding),
            "bytes per adapter": bank._table.nbytes / (size + 1),
        }
        bank.close()
    remove_dcft(one)
    return {**result, "growth": growth, "file bytes": files[0].stat().st_size}


def generating(folder, rounds) -> dict:
    import keras
    import keras_hub
    import numpy as np

    from keras_dcft import AdapterBank

    keras.utils.set_random_seed(0)

    def make():
        keras.utils.set_random_seed(0)
        backbone = keras_hub.models.GPT2Backbone(
            VOCABULARY, **GENERATOR, max_sequence_length=PROMPT + GENERATED
        )
        model = keras_hub.models.GPT2CausalLM(backbone, preprocessor=None)
        model.compile(sampler="greedy")
        return model

    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (PROMPTS, PROMPT)).astype("int32")
    inputs = {
        "token_ids": np.pad(tokens, [(0, 0), (0, GENERATED)]),
        "padding_mask": np.pad(np.ones_like(tokens), [(0, 0), (0, GENERATED)]),
    }
    one, base = make(), make()
    files = adapter_files(one, folder)
    bank = AdapterBank(base, {str(i): file for i, file in enumerate(files)})
    names = [str(i) for i in range(PROMPTS)]
    variants = {
        "one": lambda: one.generate(inputs, stop_token_ids=None),
        "bank": lambda: bank.generate(inputs, names, stop_token_ids=None),
        "base": lambda: plain.generate(inputs, stop_token_ids=None),
    }
    plain = make()
    result = compare(variants, max(3, rounds // 3))
    result["tokens per second"] = {
        name: round(PROMPTS * GENERATED * 1000 / spent["median"], 1)
        for name, spent in result["milliseconds"].items()
    }
    return result


def with_peft(folder, rounds) -> dict:
    """Hugging Face PEFT's mixed batches of LoRA on the same weights, beside the bank on torch."""
    import keras_hub
    import numpy as np
    import peft
    import torch
    import transformers
    from support.methods import default_preset

    from keras_dcft import AdapterBank

    preset = str(default_preset())
    ids = np.random.default_rng(0).integers(1000, VOCABULARY, (ROWS, TOKENS)).astype("int32")
    backbone = keras_hub.models.BertBackbone.from_preset(preset)
    one = keras_hub.models.BertBackbone.from_preset(preset)
    files = adapter_files(one, folder)
    bank = AdapterBank(backbone, {str(i): file for i, file in enumerate(files)})
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids), "segment_ids": ids * 0}
    variants = {"bank": lambda: bank.predict(inputs, [str(i) for i in range(ROWS)])}
    adding, memory = {}, {}
    for rank, count in PEFT_ADAPTERS.items():
        model = transformers.BertModel.from_pretrained(preset, attn_implementation="eager").eval()
        config = peft.LoraConfig(
            r=rank, target_modules=["query", "key", "value", "dense"], init_lora_weights=False
        )
        model = peft.get_peft_model(model, config, adapter_name="0").eval()
        seconds = []
        for number in range(1, count):
            start = time.perf_counter()
            model.add_adapter(str(number), config)
            seconds.append(1000 * (time.perf_counter() - start))
        names = [str(random.Random(i).randrange(count)) for i in range(ROWS)]
        tensor = torch.from_numpy(ids)

        def run(model=model, names=names, tensor=tensor):
            with torch.no_grad():
                return model(tensor, torch.ones_like(tensor), adapter_names=names)

        variants[f"PEFT, rank {rank}, {count} adapters"] = run
        adding[rank] = spread(seconds)
        lora = [p for name, p in model.named_parameters() if "lora" in name]
        memory[rank] = sum(p.nbytes for p in lora) / count
    return {**compare(variants, rounds), "adding": adding, "bytes per adapter": memory}


def tables(results) -> str:
    lines = [
        "| | backend | one adapter for all | bank / one | swapped / one | base / one |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for run in results:
        if run["model"] != "peft":
            ratios = run["ratio to one"]
            what = "MiniLM, 32 rows" if run["model"] == "predict" else "GPT-2, 8 prompts"
            cells = [f"{ratios[name]['median']:.2f}" if name in ratios else "" for name in RATIOS]
            spent = run["milliseconds"]["one"]["median"]
            lines.append(f"| {what} | {run['backend']} | {spent:,.0f} ms | {' | '.join(cells)} |")
    lines += [
        "",
        "| backend | adapters | bank / one | adding one | memory for each / its file |",
        "|---|---:|---:|---:|---:|",
    ]
    for run in results:
        for size, of_size in run.get("growth", {}).items():
            lines.append(
                f"| {run['backend']} | {int(size):,} | {of_size['ratio']['median']:.2f} | "
                f"{of_size['adding']['median']:.1f} ms | "
                f"{of_size['bytes per adapter'] / run['file bytes']:.2f} |"
            )
    lines += ["", "| mixed batch on torch | time | / bank | adding one | memory for each |"]
    lines += ["|---|---:|---:|---:|---:|"]
    for run in results:
        if run["model"] == "peft":
            for name, spent in run["milliseconds"].items():
                rank = name.split(",")[1].split()[1] if "PEFT" in name else None
                ratio = run["ratio to bank"].get(name, {"median": 1})["median"]
                adding = f"{run['adding'][rank]['median']:.0f} ms" if rank else ""
                size = f"{run['bytes per adapter'][rank] / 1e3:,.0f} KB" if rank else ""
                lines.append(
                    f"| {name} | {spent['median']:,.0f} ms | {ratio:.2f} | {adding} | {size} |"
                )
    return "\n".join(lines)


RATIOS = ("bank", "swapped", "base")


if __name__ == "__main__":
    sys.exit(main())
