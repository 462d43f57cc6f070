import json
import re
import subprocess
import sys

import finetune_text_classifier
import keras
import keras_hub
import numpy as np
import pytest
from conftest import ROOT, SHARED_TFDS
from finetune_text_classifier import accuracy, advice_on_few_steps, main, parse_options
from one_backend import only_on
from support import text_data
from support.text_data import (
    LIBRARY_NAMES,
    TextData,
    docstring_data,
    glue_split,
    load_text_data,
    table_data,
)
from tools import TEXTS, array, bert_classifier

import keras_dcft

PROGRAM = ROOT / "examples" / "finetune_text_classifier.py"


def run_example(*arguments):
    return subprocess.run(
        [sys.executable, PROGRAM, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=1200,
    )


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A small table that a fine-tuned BERT can learn: what is good, and what is bad."""
    rng = np.random.default_rng(0)
    rows = [
        f"A {rng.choice(['film', 'very', 'films'])} {label} film.\t{label}"
        for label in rng.choice(["good", "bad"], 200)
    ]
    path = tmp_path_factory.mktemp("data") / "films.tsv"
    path.write_text("text\tlabel\n" + "\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def tiny_preset(tmp_path_factory):
    keras.utils.set_random_seed(0)
    folder = tmp_path_factory.mktemp("preset")
    bert_classifier().save_to_preset(folder)
    return folder


def check_main_job(folder, printed, method, trained):
    results = json.loads((folder / "results.json").read_text())
    assert results["backend"] == keras.backend.backend()
    # Keras merges its LoRA into the kernels when it saves, which rounds.
    assert results["reload_difference"] <= (1e-4 if method == "lora" else 0)
    assert results["trainable_parameters"] == trained
    assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")
    for line in ("Held-out accuracy", "majority class", "Training time", "Reloaded"):
        assert line in printed
    assert "for 1 epoch\n" in printed
    assert "0.00 MB" not in printed
    assert (folder / "adapter.dcft.safetensors").is_file() == (method == "dcft")
    return results


# On the others `test_real_minilm_trains_and_comes_back_from_a_preset` trains it.
@pytest.mark.real
@only_on("torch")
def test_the_main_job_with_the_real_bert(table, tmp_path, capfd):
    arguments = ["--dataset", str(table), "--epochs", "1", "--batch-size", "4"]
    arguments += ["--no-head-baseline", "--output-dir", str(tmp_path)]
    subprocess.run([sys.executable, PROGRAM, *arguments], check=True, timeout=1200)
    results = check_main_job(tmp_path, capfd.readouterr().out, "dcft", 7648 + 770)
    assert results["accuracy_after"] > 0.9 > 0.7 > results["majority_class_accuracy"]
    assert keras.saving.load_model(tmp_path / "model.keras").count_params() > 22e6


def changed_weights(folder, preset):
    """What of the backbone in a run's file is not as it was in the preset."""
    backbone = keras_hub.models.Backbone.from_preset(str(preset))
    before = {v.path: array(v) for v in backbone.weights}
    after = {v.path: v for v in keras.saving.load_model(folder / "model.keras").backbone.weights}
    return {path for path in before if (array(after[path]) != before[path]).any()}


# How many are trained: Keras's LoRA trains the biases of its layers too.
@pytest.mark.parametrize(
    ("method", "trained"),
    [
        pytest.param("dcft", 2 * (4 * 68 + 2 * 71) + 68 + 34, marks=only_on("tensorflow", "jax")),
        pytest.param("lora", 544 + 248 + 34, marks=only_on("torch")),
        pytest.param("head", 34, marks=only_on("torch")),
        pytest.param("full", 5416 + 34, marks=only_on("torch")),
    ],
)
def test_the_main_job_with_other_methods(method, trained, table, tiny_preset, tmp_path, capsys):
    main(
        f"--preset {tiny_preset} --dataset {table} --method {method} --epochs 1 --batch-size 8 "
        f"--train-size 40 --learning-rate 0.03 --output-dir {tmp_path}".split()
    )
    printed = capsys.readouterr().out
    results = check_main_job(tmp_path, printed, method, trained)
    assert results["train_examples"] == 40
    changed = changed_weights(tmp_path, tiny_preset)
    kinds = {path.rsplit("/", 1)[-1] for path in changed}
    assert (
        kinds
        == {
            "dcft": set(),
            "lora": {"kernel", "bias"},
            "head": set(),
            "full": {"kernel", "bias", "embeddings", "gamma", "beta"},
        }[method]
    )
    assert "Only 5 steps: try --batch-size 8 --epochs 20 for so few texts.\n" in printed
    # The head alone, to compare with, is trained beside the other methods.
    assert ("head_only_accuracy" in results) == ("head only  " in printed) == (method != "head")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"sentence\tclass\nx\t1\n", "must name the columns `text` and `label`"),
        (b"", "must name the columns `text` and `label`"),
        (b"text\tlabel\nx\t1\ny\t1\n", "at least two classes are needed"),
        (b"text\tlabel\nx\t1\ny\n", "line 3: expected 2 columns"),
        (b"text\tlabel\nx\t1\ny\t2\t3\n", "line 3: expected 2 columns"),
        (b"text\tlabel\n\xff\xfe\x00\t1\n", "not a UTF-8 text file"),
    ],
)
def test_badly_formed_tables_are_explained(content, message, tmp_path):
    path = tmp_path / "data.tsv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        table_data(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernel-size", "0"], "argument --kernel-size: must be at least 1. Received: 0"),
        (["--epochs", "x"], "argument --epochs: invalid positive_int value: 'x'"),
        (["--learning-rate", "-1"], "argument --learning-rate: must be a positive number"),
        (["--method", "magic"], "argument --method: invalid choice: 'magic'"),
        (["--dataset", "nothing.tsv"], "No such file or directory: 'nothing.tsv'"),
        (["--dataset", "glue/none"], "must name a GLUE task"),
        (["--dataset", "glue/stsb"], "argument --dataset: a regression"),
        (["--dataset", "other"], "--dataset must be `docstrings`, `glue/<task>`"),
        (["--dataset", "glue/rte", "--data-dir", "/nowhere"], "--data-dir has no folder glue/rte"),
        (["--preset", "/nowhere"], "one of: 1) a built-in preset identifier like `'bert_base_en'`"),
        (["--kernel-size", "1000"], "`kernel_size` must not be larger"),
    ],
)
def test_bad_options_give_one_line_and_an_exit_code(
    arguments, message, table, tiny_preset, tmp_path, capsys
):
    defaults = ["--dataset", table, "--preset", tiny_preset, "--output-dir", tmp_path]
    with pytest.raises(SystemExit) as stop:
        main([*map(str, defaults), "--no-head-baseline", *arguments])
    # Either a message, which Python prints, or a status after the parser has printed one.
    said = capsys.readouterr().err.strip() if stop.value.code == 2 else stop.value.code
    assert said.startswith("error: ")
    assert message in said
    assert len(said.splitlines()) == 1


def run_main(folder, *arguments):
    main(["--output-dir", str(folder), "--no-head-baseline", "--epochs", "1", *map(str, arguments)])


@only_on("torch")
def test_texts_are_classified_with_what_was_written(table, tiny_preset, tmp_path, capsys):
    run_main(
        tmp_path, "--preset", tiny_preset, "--dataset", table, "--kernel-size", 4,
        "--batch-size", 8, "--learning-rate", 0.03,
    )  # fmt: skip
    assert json.loads((tmp_path / "results.json").read_text())["classes"] == ["bad", "good"]
    capsys.readouterr()
    texts = ["a good film", "a very bad film"]
    run_main(tmp_path, "--predict", *texts)
    lines = capsys.readouterr().out.splitlines()
    model = keras.saving.load_model(tmp_path / "model.keras", compile=False)
    logits = model.predict(texts, verbose=0)
    for line, text, row in zip(lines, texts, logits, strict=True):
        name, probability, rest = line.split(maxsplit=2)
        assert (name, rest) == (["bad", "good"][row.argmax()], text)
        assert float(probability) == pytest.approx(1 / (1 + np.exp(-np.ptp(row))), abs=1e-3)
    plain = keras_hub.models.TextClassifier.from_preset(str(tiny_preset), num_classes=2)
    plain.preprocessor.sequence_length = model.preprocessor.sequence_length
    keras_dcft.load_dcft_weights(plain, tmp_path / "adapter.dcft.safetensors")
    np.testing.assert_array_equal(plain.predict(texts, verbose=0), logits)


@only_on("torch")
@pytest.mark.parametrize(
    ("batch_size", "advice"),
    [("32", "Only 14 steps: try --batch-size 8 --epochs 4 for so few texts.\n"), ("8", "")],
)
def test_few_steps_are_told_how_to_be_more(batch_size, advice):
    options = parse_options(["--batch-size", batch_size])  # for two epochs
    assert advice_on_few_steps(200, options) == advice


@only_on("torch")
def test_pairs_are_classified_as_pairs(tiny_preset, tmp_path, capsys, monkeypatch):
    pairs = [("a good film", "good"), ("a bad film", "bad")] * 8
    data = TextData(pairs, [1, 0] * 8, pairs[:4], [1, 0] * 2, ["other", "same"])
    monkeypatch.setattr(finetune_text_classifier, "load_text_data", lambda *_: data)
    run_main(tmp_path, "--preset", tiny_preset, "--kernel-size", 4)
    capsys.readouterr()
    run_main(tmp_path, "--predict", "a good film", "bad")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("  a good film | bad")
    with pytest.raises(SystemExit, match=r"needs pairs, .* Received: 1 text"):
        run_main(tmp_path, "--predict", "a good film")


def test_there_is_nothing_to_classify_with_before_training(tmp_path):
    with pytest.raises(SystemExit, match=r"without model\.keras and results\.json"):
        run_main(tmp_path, "--predict", "a good film")


PROGRAMS = sorted((ROOT / "examples").glob("*.py"))
HELP = """
import io, runpy, sys
from contextlib import redirect_stdout
sys.path.insert(0, sys.argv.pop(1))
for program in sys.argv[1:]:
    sys.argv = [program, "--help"]
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as stop:
        assert stop.code == 0, program
    print("END", sorted({"keras", "tensorflow", "jax", "torch", "numpy"} & set(sys.modules)))
"""


@only_on("torch")
def test_help_imports_no_backend_and_says_everything_once(run_python):
    printed = run_python(HELP, None, PROGRAMS[0].parent, *PROGRAMS)
    *texts, rest = printed.split("END []\n")
    assert rest == ""
    for program, text in zip(PROGRAMS, texts, strict=True):
        assert text.startswith(f"usage: {program.name} ")
        options = " ".join(text.split()).split(" options: ")[1]
        for option in re.split(r"(?<!,) (?=--?[a-z-]+(?: [A-Z{]|,| [a-z]))", options):
            assert option.count("default") <= 1, option
            assert not re.search(r"None|\[\]|False", option), option
            described = re.sub(
                r"^(-h, )?--[a-z-]+(, --[a-z-]+)?( [A-Z_]+( \[.*?\])?| {.*?})?", "", option
            )
            assert re.search(r"[a-zA-Z']+ [a-zA-Z]+", described), option


@only_on("torch")
def test_an_error_is_all_that_the_terminal_sees(tmp_path):
    result = run_example("--output-dir", tmp_path, "--dataset", "nothing.tsv")
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line == "error: [Errno 2] No such file or directory: 'nothing.tsv'"
    assert result.stdout == ""


def test_accuracy_on_pairs_takes_both_texts(rng):
    classifier = bert_classifier()
    for variable in classifier.trainable_variables:  # so that the pairs' outputs differ
        variable.assign(rng.normal(size=variable.shape))

    def logits(texts):
        return array(classifier(classifier.preprocessor(texts, y=None)))  # y: pairs are texts

    pairs = [(first, second) for first in TEXTS[:4] for second in TEXTS[:4]]
    first, second = map(list, zip(*pairs))
    found = logits((first, second))
    bias = classifier.layers[-1].bias
    bias.assign_add([0, np.median(found[:, 0] - found[:, 1])])  # half of them in either class
    labels = np.argmax(logits((first, second)), axis=1)
    assert (np.argmax(logits(first), axis=1) != labels).any()
    assert accuracy(classifier, TextData([], [], pairs, list(labels), ["0", "1"])) == 1


@only_on("torch")
def test_docstrings_are_real_distinct_masked_and_split_by_module():
    data = docstring_data()
    assert data.classes == ["keras", "numpy", "python", "tensorflow"]
    assert len(data.train_texts) > 2000
    assert len(data.held_out_texts) > 400
    assert set(data.train_labels) == set(data.held_out_labels) == {0, 1, 2, 3}
    everything = data.train_texts + data.held_out_texts
    assert len(set(everything)) == len(everything)
    assert not any(LIBRARY_NAMES.search(text) for text in everything)


@only_on("torch")
def test_docstrings_are_drawn_by_the_seed(monkeypatch):
    monkeypatch.setattr(text_data, "DOCSTRINGS_PER_LIBRARY", 30)
    data = docstring_data()
    assert len(data.train_texts) == 4 * 24
    assert len(data.held_out_texts) == 4 * 6
    assert docstring_data() == data
    assert docstring_data(seed=1) != data


@only_on("torch")
def test_train_size_keeps_the_first(monkeypatch):
    monkeypatch.setattr(text_data, "DOCSTRINGS_PER_LIBRARY", 30)
    data = load_text_data("docstrings", None, 50)
    everything = docstring_data()
    assert data.train_texts == everything.train_texts[:50]
    assert data.train_labels == everything.train_labels[:50]
    assert data.held_out_texts == everything.held_out_texts


needs_glue = pytest.mark.skipif(not SHARED_TFDS.is_dir(), reason=f"GLUE is not at {SHARED_TFDS}")


@needs_glue
def test_real_glue_pairs():
    data = load_text_data("glue/rte", SHARED_TFDS, 500)
    assert len(data.train_texts) == len(data.train_labels) == 500
    assert len(data.held_out_texts) == 277
    assert {type(text) for text in data.train_texts} == {tuple}
    assert data.classes == ["entailment", "not_entailment"]


@needs_glue
def test_real_glue_single_sentences():
    examples, classes = glue_split("sst2", "validation", SHARED_TFDS)
    assert len(examples) == 872
    assert {type(text) for text, _ in examples} == {str}
    assert {label for _, label in examples} == {0, 1}
    assert classes == ["negative", "positive"]
