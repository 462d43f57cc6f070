"""Each benchmark works, from measuring to its tables: tiny settings, and no time is looked at.

Each is tried on one backend, and each backend has its part of them.
"""

import importlib.util
import json
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest
from conftest import ROOT
from one_backend import only_on
from tools import TEXTS, bert_classifier, predict, randomize_adapters
from workers import free_ports, run_workers

from keras_dcft import enable_dcft, save_dcft_weights

sys.path.insert(0, str(ROOT / "benchmarks"))

import measuring
import training_step

RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"
DCFT = "DCFT, kernel size 8, rank 1"

needs_tfds = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow_datasets") is None,
    reason="tensorflow_datasets is not installed, by which a tiny GLUE is written and read",
)


@pytest.fixture
def run(tmp_path):
    """Runs a benchmark, which writes to a folder, and returns what it printed."""
    tmp_path.joinpath("benchmarks", "results").mkdir(parents=True)
    shutil.copytree(DOCS, tmp_path / "docs")
    shutil.copy(ROOT / "README.md", tmp_path)
    before = written_at()

    def run(program, *arguments):
        environment = {"BENCHMARKS_QUICK": str(tmp_path)}
        run_workers("benchmarks_program", [environment], tmp_path, program, *map(str, arguments))
        return (tmp_path / "0.log").read_text()

    yield run
    assert written_at() == before  # the project's own results and pages


def written_at() -> dict:
    files = [ROOT / "README.md", *DOCS.rglob("*"), *RESULTS.iterdir()]
    return {file: file.stat().st_mtime_ns for file in files}


def results_of(tmp_path, name) -> list:
    path = tmp_path / "benchmarks" / "results" / name
    return json.loads(path.read_text()) if path.suffix == ".json" else measuring.lines_of(path)


def row_of(printed, first) -> list:
    """The cells of the only row of the tables that begins with these."""
    [row] = [line for line in printed.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in row.strip("|").split("|")]


# --- time and memory ---


@only_on("torch")
def test_training_step(run, tmp_path):
    methods = ["floor", DCFT, "DCFT 8, full increment", "Keras LoRA, rank 1"]
    arguments = ["--backends", "torch", "--models", "base", "--rounds", "2", "--processes", "1"]
    run("training_step", *arguments, "--methods", *methods)
    [result] = results_of(tmp_path, "training_step.json")
    assert list(result["methods"]) == methods
    for measured in result["methods"].values():
        assert measured["milliseconds"]["median"] > 0
        assert measured["peak_memory_bytes"] > 0
    assert result["methods"]["floor"]["ratio to floor"]["median"] == 1
    assert result["methods"]["floor"]["trainable_parameters"] == 32
    printed = run("training_step", "--report")
    trained = result["methods"][DCFT]["trainable_parameters"]
    assert row_of(printed, DCFT)[3] == f"{trained:,}"
    assert (tmp_path / "docs" / "training_step.png").stat().st_size


def test_the_full_increment_computes_what_dcft_does():
    tasks = [bert_classifier(), bert_classifier()]
    for task, method in zip(tasks, (DCFT, training_step.FULL_INCREMENT)):
        training_step.apply_method(task, method)
    randomize_adapters(tasks[0])
    tasks[1].set_weights(tasks[0].get_weights())
    expected, found = (predict(task, TEXTS) for task in tasks)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@only_on("torch")
def test_growth(run, tmp_path):
    run("growth", "--backends", "torch", "--rounds", "2")
    layer, enabled = results_of(tmp_path, "growth.json")
    assert len(layer["points"]) == 8
    for point in layer["points"]:
        assert point["floor"]["ratio to floor"] == {"median": 1, "quartiles": [1, 1]}
        assert point["DCFT"]["milliseconds"]["median"] > 0
    printed = run("growth", "--report")
    assert row_of(printed, "torch")[1:3] == [
        f"{enabled['parameters']:,}",
        str(enabled["layers"]),
    ]


@only_on("torch")
def test_inference(run, tmp_path):
    run("inference", "--backends", "torch", "--models", "base", "generate", "--rounds", "2")
    results = results_of(tmp_path, "inference.json")
    assert [result["model"] for result in results] == ["base", "generate"]
    for result in results:
        assert list(result["milliseconds"]) == ["base", "merged", "adapted"]
        assert list(result["ratio to base"]) == ["merged", "adapted"]
    assert row_of(run("inference", "--report"), "base, 2 x 8")[1] == "torch"


@only_on("torch")
@pytest.mark.real
def test_bank(run, tmp_path):
    pytest.importorskip("peft")
    run("bank", "--backends", "torch", "--rounds", "2")
    results = results_of(tmp_path, "bank.json")
    assert [result["model"] for result in results] == ["predict", "generate", "peft"]
    assert list(results[0]["growth"]) == ["2", "4"]
    assert all(size["bytes per adapter"] > 0 for size in results[0]["growth"].values())
    printed = run("bank", "--report")
    assert "| torch | 4 | " in printed
    assert row_of(printed, "bank")[2] == "1.00"


@only_on("torch")
def test_memory(run, tmp_path):
    page = tmp_path / "docs" / "scaling.md"
    page.write_text("<!-- made by benchmarks/memory.py -->\n<!-- end -->\n")
    run("memory", "--backends", "torch")
    lines = results_of(tmp_path, "memory.jsonl")
    steps = [line for line in lines if line["subject"] == "training step"]
    assert [step["tokens"] for step in steps][:4] == [8, 8, 16, 16]
    assert all(np.isfinite(step["losses"]).all() for step in steps)
    assert {line["what"] for line in lines if line not in steps} == {"enabling"}
    printed = run("memory", "--report")
    assert printed.strip() in page.read_text()
    assert f"| bfloat16 | {steps[0]['base_bytes'] / 1e6:,.0f} MB | 8 | " in printed


@only_on("torch")
def test_profile_step(run, tmp_path):
    run("profile_step", "--backends", "torch")
    [result] = results_of(tmp_path, "profile.json")
    floor, dcft = result["milliseconds"]["floor"], result["milliseconds"][DCFT]
    assert floor["products"] > 0
    assert dcft["thin products"] > floor["thin products"]
    assert row_of(run("profile_step", "--report"), f"base, training step | torch | {DCFT}")


@only_on("tensorflow")
def test_thin_products_are_known_by_their_names_in_tensorflow():
    import profile_step
    import tensorflow as tf

    inputs = keras.Input((6, 48))
    attention = keras.layers.MultiHeadAttention(4, 12)
    x = keras.layers.Dense(48, name="dense")(attention(inputs, inputs))
    model = keras.Model(inputs, keras.layers.Dense(2, name="logits")(x[:, 0]))
    enable_dcft(model, kernel_size=8, trainable_layers="logits")

    @tf.function
    def gradients(inputs):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(inputs, training=True))
        return tape.gradient(loss, model.trainable_variables)

    graph = gradients.get_concrete_function(tf.zeros((5, 6, 48))).graph
    operations = [operation for operation in graph.get_operations() if "MatMul" in operation.type]
    products = [profile_step.product_of(o.name, o.type) for o in operations]
    found = [
        profile_step.is_one_of_last_two(name, {n for where, n in products if where == layer})
        for layer, name in products
    ]
    shapes = [[tuple(x.shape) for x in (*o.inputs, *o.outputs)] for o in operations]
    assert found == [profile_step.is_thin(one) for one in shapes]
    assert sum(found) == 3 * 5 + 2 * 6  # the first layers' inputs need no gradient
    assert len(found) - sum(found) == 3 + 2 * 2 + 3


@only_on("torch")
def test_traffic(run, tmp_path):
    """Its report alone: what it measures are a GPU's rates."""
    for name in ("traffic.json", "training_step.json"):
        shutil.copy(RESULTS / name, tmp_path / "benchmarks" / "results")
    limits = [line for line in run("traffic", "--report").splitlines() if f"| {DCFT} |" in line]
    rates = {rate["device"] for rate in json.loads((RESULTS / "traffic.json").read_text())}
    assert {line.split("|")[1].strip() for line in limits} <= rates
    assert limits


@only_on("torch")
@pytest.mark.real
def test_swap(run, tmp_path):
    run("swap")
    [result] = results_of(tmp_path, "swap.jsonl")
    assert result["swaps"] == 2
    assert result["median_milliseconds"] > 0


@only_on("jax")
def test_performance(run, tmp_path):
    shutil.copytree(RESULTS, tmp_path / "benchmarks" / "results", dirs_exist_ok=True)
    run("performance")
    page = (tmp_path / "docs" / "performance.md").read_text()
    aims = page.partition("## Aims")[2].partition("Why the")[0]
    assert "(DCFT - floor) / (DCFT 8, full increment - floor) | ≤ 0.30 |" in aims
    assert aims in (DOCS / "performance.md").read_text()


# --- sizes and models ---


@only_on("jax")
def test_scaling(run, tmp_path):
    printed = run("scaling", "--report")
    assert printed.strip() in (tmp_path / "docs" / "scaling.md").read_text()


@only_on("torch")
@pytest.mark.real
def test_file_sizes(run, tmp_path):
    printed = run("file_sizes")
    assert printed.strip() in (tmp_path / "docs" / "transformers.md").read_text()


@only_on("torch")
def test_backbones(run, tmp_path):
    run("backbones", "--backends", "torch")
    [result] = results_of(tmp_path, "backbones.jsonl")
    assert result["backbone"] == "BertBackbone"
    page = (tmp_path / "docs" / "backbones.md").read_text()
    assert row_of(page, "BertBackbone")[4] == "torch"


# --- trainings ---


@pytest.fixture
def glue(tmp_path):
    """A folder with a tiny GLUE."""
    from finetune_glue_test import write_task

    for task in ("sst2", "rte"):
        write_task(tmp_path / "glue", task)
    return tmp_path / "glue"


@pytest.fixture
def squad(tmp_path):
    """A file with a question on each of five articles."""
    articles = [
        {
            "title": f"film {number}",
            "paragraphs": [
                {
                    "context": f"The film {number} was good.",
                    "qas": [
                        {
                            "id": str(number),
                            "question": "How was it?",
                            "answers": [{"text": "good", "answer_start": 15}],
                        }
                    ],
                }
            ],
        }
        for number in range(5)
    ]
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"data": articles}))
    return path


@only_on("tensorflow")
@pytest.mark.real
@needs_tfds
def test_quality(run, tmp_path, glue):
    method = "DCFT, kernel size 4"
    run("quality", "--tasks", "sst2", "--methods", method, "--data-dir", glue)
    [result] = results_of(tmp_path, "quality.jsonl")
    assert (result["train_examples"], result["epochs"]) == (8, 1)
    printed = run("quality", "--report")
    assert row_of(printed, f"sst2 | {method}")[2] == f"{result['trainable_parameters']:,}"
    assert printed.strip() in (tmp_path / "docs" / "results.md").read_text()


@only_on("tensorflow")
@pytest.mark.real
@needs_tfds
def test_ablation(run, tmp_path, glue):
    run("ablation", "--variants", "alpha 8", "--seeds", "0", "--data-dir", glue)
    [result] = results_of(tmp_path, "ablation.jsonl")
    assert np.isfinite(result["loss"])
    run("ablation", "--report")
    page = (tmp_path / "docs" / "ablation.md").read_text()
    assert f"| alpha 8 | {result['trainable_parameters']:,} | {result['score']:.4f} |" in page


@only_on("jax")
@pytest.mark.real
@needs_tfds
def test_long_training(run, tmp_path, glue, squad):
    run("long_training", "--prepare", tmp_path / "data", "--data-dir", glue, "--squad", squad)
    few = ["--tasks", "rte", "--methods", "DCFT, kernel size 8", "--rates", 1, "--seeds", 1]
    output = ["--output", tmp_path / "long_training.jsonl"]
    for _ in range(2):  # started again, it finds nothing to do
        run("long_training", "--data", tmp_path / "data", *few, "--lanes", 1, *output)
    results = measuring.lines_of(tmp_path / "long_training.jsonl")
    assert [result["step"] for result in results] == [1, 2, 5, 10]
    form = "DCFT, kernel size 8, rank 4"
    for seed, count in enumerate((3, 2)):  # trainings that were cut off after a half and a quarter
        for result in results[:count]:
            line = result | {"method": form, "seed": seed}
            measuring.add_line(line, tmp_path / "long_training.jsonl")
    printed = run("long_training", "--report", *output)
    assert row_of(printed, "rte | DCFT, kernel size 8")[-1] == "1"
    page = (tmp_path / "docs" / "long_training.md").read_text()
    half = f"{results[2]['validation']['score']:.3f}"
    assert row_of(page, f"rte | {form}")[-3:] == [half, "–", "2, then 1"]


@only_on("torch")
@pytest.mark.real
@needs_tfds
def test_precision(run, tmp_path, glue):
    run("precision", "--data-dir", glue)
    full, half = results_of(tmp_path, "precision.jsonl")
    assert half["frozen_bytes"] * 2 == full["frozen_bytes"]
    assert row_of(run("precision", "--table"), "bfloat16")


@only_on("torch")
@pytest.mark.real
@needs_tfds
def test_main_job(run, tmp_path, glue):
    shutil.copy(RESULTS / "training_step.json", tmp_path / "benchmarks" / "results")
    run("main_job", "--backends", "torch", "--data-dir", glue)
    [result] = results_of(tmp_path, "main_job.jsonl")
    assert (result["backend"], result["method"]) == ("torch", "dcft")
    assert row_of(run("main_job", "--table"), "DCFT, kernel size 8 | torch")


@only_on("tensorflow")
@pytest.mark.real
def test_serving(run, tmp_path):
    pytest.importorskip("httpx")
    from serve_many_adapters import SUFFIX, make_base

    model = enable_dcft(make_base(), kernel_size=8)
    for name in ("one", "other"):
        path = tmp_path / "adapters" / f"{name}{SUFFIX}"
        path.parent.mkdir(exist_ok=True)
        save_dcft_weights(model, path, notes={"classes": ["no", "yes"]})
    [port] = free_ports(1)
    few = ["--seconds", 2, "--clients", 2, "--port", port]
    run("serving", "--adapters", tmp_path / "adapters", *few)
    [result] = results_of(tmp_path, "serving.jsonl")
    assert result["wrong"] == result["errors"] == 0
    assert result["right"] > 0


# --- what they share ---


def test_turns_are_each_ones_in_each_round():
    taken = []
    variants = {name: lambda name=name: taken.append(name) for name in "abc"}
    seconds = measuring.take_turns(variants, 4)
    assert {name: len(of) for name, of in seconds.items()} == {"a": 4, "b": 4, "c": 4}
    rounds = [taken[i : i + 3] for i in range(0, len(taken), 3)]
    assert len(rounds) == 5  # the first is not measured
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert len(set(map(tuple, rounds))) > 1


def test_a_ratio_is_of_the_same_turn():
    assert measuring.ratio([1, 2, 30], [1, 1, 10]) == {"median": 2, "quartiles": [1, 3]}


def test_a_result_takes_the_place_of_the_last_of_its_conditions(tmp_path):
    path = tmp_path / "results.json"
    one = {"backend": "jax", "model": "base", "device": "a", "value": 1}
    for result in (one, one | {"device": "b"}, one | {"value": 2}):
        measuring.store(result, path)
    assert json.loads(path.read_text()) == [one | {"device": "b"}, one | {"value": 2}]


WORKER = """
import json, os, sys
print("not this")
if "fail" in sys.argv:
    sys.exit(3)
print("RESULT " + json.dumps([os.environ["KERAS_BACKEND"], *sys.argv[1:]]))
"""


@pytest.mark.parametrize("quick", [False, True])
def test_a_workers_result_is_read(tmp_path, monkeypatch, quick):
    monkeypatch.setattr(measuring, "QUICK", quick)
    file = tmp_path / "worker.py"
    file.write_text(WORKER)
    assert measuring.work(file, "jax", "a b") == ["jax", "--worker", "a b"]
    with pytest.raises(subprocess.CalledProcessError, match="status 3"):
        measuring.work(file, "jax", "fail")
