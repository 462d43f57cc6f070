import json
import subprocess
import sys

import keras
import numpy as np
import pytest
from conftest import ROOT, SHARED_TFDS
from finetune_text_classifier import accuracy
from text_data import LIBRARY_NAMES, TextData, docstring_data, load_text_data, table_data
from tools import TEXTS, bert_classifier, predict

import keras_dcft  # noqa: F401 (registers the classes of the files loaded here)

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
    """A small table that a fine-tuned BERT can learn: sentiment words in frames."""
    rng = np.random.default_rng(0)
    words = {"good": ["great", "lovely", "superb"], "bad": ["awful", "dull", "terrible"]}
    rows = [
        f"A {rng.choice(words[label])} film with a {rng.choice(words[label])} cast.\t{label}"
        for label in rng.choice(["good", "bad"], 400)
    ]
    path = tmp_path_factory.mktemp("data") / "films.tsv"
    path.write_text("text\tlabel\n" + "\n".join(rows) + "\n")
    return path


@pytest.mark.real
@pytest.mark.parametrize("method", ["dcft", "lora", "head", "full"])
def test_the_main_job_with_every_method(method, table, tmp_path):
    result = run_example(
        "--dataset", table, "--method", method, "--epochs", 3, "--batch-size", 8,
        "--output-dir", tmp_path, "--rank", 1, "--no-head-baseline",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["backend"] == keras.backend.backend()
    # Keras merges its LoRA into the kernels when it saves, which rounds.
    assert results["reload_difference"] <= (1e-4 if method == "lora" else 0)
    trained = {
        "dcft": 7648 + 770,
        "lora": 133056 + 770,
        "head": 770,
        "full": results["base_parameters"] + 770,
    }[method]
    assert results["trainable_parameters"] == trained
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    assert keras.saving.load_model(tmp_path / "model.keras").count_params() > 22e6
    if method != "head":
        assert results["accuracy_after"] > 0.9
    for line in ("Held-out accuracy", "majority class", "Training time", "Reloaded"):
        assert line in result.stdout


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
    ],
)
def test_bad_options_give_one_line_and_an_exit_code(arguments, message, tmp_path):
    result = run_example("--output-dir", tmp_path, *arguments)
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if "error: " in line]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in result.stderr


@pytest.mark.real
def test_an_unusable_preset_or_kernel_size_gives_one_line(table, tmp_path):
    for arguments, message in [
        (["--preset", str(tmp_path / "none")], "error: "),
        (["--kernel-size", "1000"], "error: `kernel_size` must not be larger"),
    ]:
        result = run_example(
            "--dataset", table, "--no-head-baseline", "--output-dir", tmp_path, *arguments
        )
        assert result.returncode == 1
        assert message in result.stderr.splitlines()[-1]
        assert "Traceback" not in result.stderr


def test_accuracy_on_pairs_takes_both_texts(rng):
    classifier = bert_classifier()
    for variable in classifier.trainable_variables:  # so that the pairs' outputs differ
        variable.assign(rng.normal(size=variable.shape))
    pairs = [(first, second) for first in TEXTS[:4] for second in TEXTS[:4]]
    first, second = map(list, zip(*pairs))
    logits = predict(classifier, (first, second))
    bias = classifier.layers[-1].bias
    bias.assign_add([0, np.median(logits[:, 0] - logits[:, 1])])  # half of them in either class
    labels = np.argmax(predict(classifier, (first, second)), axis=1)
    assert (np.argmax(predict(classifier, first), axis=1) != labels).any()
    assert accuracy(classifier, TextData([], [], pairs, list(labels), ["0", "1"])) == 1


def test_docstrings_are_real_distinct_masked_and_split_by_module():
    data = docstring_data()
    assert data.classes == ["keras", "numpy", "python", "tensorflow"]
    assert len(data.train_texts) > 2000
    assert len(data.held_out_texts) > 400
    assert set(data.train_labels) == set(data.held_out_labels) == {0, 1, 2, 3}
    everything = data.train_texts + data.held_out_texts
    assert len(set(everything)) == len(everything)
    assert not any(LIBRARY_NAMES.search(text) for text in everything)
    again = docstring_data()
    assert again == data


def test_train_size_keeps_the_first():
    data = load_text_data("docstrings", None, 100)
    assert len(data.train_texts) == len(data.train_labels) == 100


@pytest.mark.skipif(not SHARED_TFDS.is_dir(), reason=f"GLUE is not at {SHARED_TFDS}")
@pytest.mark.parametrize(("task", "held_out"), [("sst2", 872), ("rte", 277)])
def test_glue_single_sentences_and_pairs(task, held_out):
    data = load_text_data(f"glue/{task}", SHARED_TFDS, 500)
    assert len(data.train_texts) == 500
    assert len(data.held_out_texts) == held_out
    assert isinstance(data.train_texts[0], tuple if task == "rte" else str)
