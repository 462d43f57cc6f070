import json

import finetune_glue
import keras
import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import SHARED_TFDS
from finetune_glue import TASK_METRICS, load_task, main, parse_options, settings_of, task_metrics
from one_backend import only_on
from tools import bert_classifier

# task: columns in their order, number of classes or 0 for a regression, names of the metrics
TASKS = {
    "cola": (("sentence",), 2, ["matthews"]),
    "sst2": (("sentence",), 2, ["accuracy"]),
    "mrpc": (("sentence1", "sentence2"), 2, ["accuracy", "f1"]),
    "qqp": (("question1", "question2"), 2, ["accuracy", "f1"]),
    "stsb": (("sentence1", "sentence2"), 0, ["pearson", "spearman"]),
    "mnli": (("premise", "hypothesis"), 3, ["accuracy"]),
    "qnli": (("question", "sentence"), 2, ["accuracy"]),
    "rte": (("sentence1", "sentence2"), 2, ["accuracy"]),
    "wnli": (("sentence1", "sentence2"), 2, ["accuracy"]),
}
TRAIN_ROWS, VALIDATION_ROWS = 24, 15


def rows(columns, classes, count, last_word="film"):
    """Examples that can be learned: the label is how many words of praise the first text has."""
    for number in range(count):
        praise = number % (classes or 5)
        texts = ["very " * praise + f"bad {last_word}", "a film"]
        label = praise if classes else float(praise)
        yield {**dict(zip(columns, texts)), "label": label, "idx": number}


def write_task(folder, task):
    """A GLUE task as `tensorflow_datasets` stores it, by its own writer and GLUE's own features."""
    columns, classes, _ = TASKS[task]
    builder = tfds.builder(f"glue/{task}", data_dir=folder)
    builder.data_path.mkdir(parents=True)
    splits = {"train": list(rows(columns, classes, TRAIN_ROWS))}
    for suffix in ("_matched", "_mismatched") if task == "mnli" else ("",):
        last_word = "films" if suffix == "_mismatched" else "film"
        splits["validation" + suffix] = list(rows(columns, classes, VALIDATION_ROWS, last_word))
    writer = tfds.core.SequentialWriter(builder.info, max_examples_per_shard=1000)
    writer.initialize_splits(list(splits))
    writer.add_examples(splits)
    writer.close_all()


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    for task in TASKS:
        write_task(folder, task)
    return str(folder)


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    keras.utils.set_random_seed(0)
    folder = tmp_path_factory.mktemp("preset")
    bert_classifier().save_to_preset(folder)
    return str(folder)


@pytest.fixture
def arguments(glue, preset, tmp_path):
    """Of a quick run whose lines go to `tmp_path / "glue.jsonl"`."""
    return [
        "--data-dir", glue, "--preset", preset, "--output", str(tmp_path / "glue.jsonl"),
        "--epochs", "1", "--batch-size", "12", "--kernel-size", "4",
    ]  # fmt: skip


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "glue.jsonl").read_text().splitlines()]


def test_the_tasks_are_glue():
    assert set(TASK_METRICS) == set(TASKS)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_loaded_from_tfds_files_and_has_its_metrics(task, glue):
    columns, classes, metrics = TASKS[task]
    data, validation = load_task(task, glue, None, 0)
    assert len(data.classes) == classes
    expected = [
        (tuple(row[c] for c in columns) if len(columns) > 1 else row[columns[0]], row["label"])
        for row in rows(columns, classes, TRAIN_ROWS)
    ]
    examples = list(zip(data.train_texts, data.train_labels))
    assert sorted(examples) == sorted(expected)
    assert examples != expected  # shuffled
    assert {type(label) for label in data.train_labels} == {int if classes else float}
    assert list(validation) == (["_matched", "_mismatched"] if task == "mnli" else [""])
    for suffix, (texts, labels) in validation.items():
        assert len(texts) == len(labels) == VALIDATION_ROWS
        first = texts[0] if len(columns) == 1 else texts[0][0]
        assert first == ("bad films" if suffix == "_mismatched" else "bad film")
        outputs = np.random.default_rng(0).normal(size=(len(labels), classes or 1))
        assert list(task_metrics(task, labels, outputs)) == metrics


def test_metrics_of_a_classification_worked_out_by_hand():
    labels = [1, 1, 1, 0, 0, 0, 0, 0]
    predictions = np.array([1, 1, 0, 1, 0, 0, 0, 0])  # 2 true positives of 3, 4 negatives of 5
    outputs = np.stack([1 - predictions, predictions], axis=1)
    assert task_metrics("cola", labels, outputs) == {"matthews": pytest.approx(7 / 15)}
    assert task_metrics("qnli", labels, outputs) == {"accuracy": 0.75}
    assert task_metrics("mrpc", labels, outputs) == {
        "accuracy": 0.75,
        "f1": pytest.approx(2 / 3),
    }


def test_metrics_of_a_regression_worked_out_by_hand():
    outputs = np.array([[1.0], [2.0], [3.0], [10.0]])
    assert task_metrics("stsb", [1.0, 2.0, 3.0, 4.0], outputs) == {
        "pearson": pytest.approx(14 / 250**0.5),
        "spearman": pytest.approx(1),
    }


@pytest.mark.filterwarnings("ignore::scipy.stats.ConstantInputWarning")
@pytest.mark.parametrize("value", [2.0, np.nan])
def test_an_undefined_correlation_is_zero(value):
    outputs = np.full((3, 1), value, "float32")
    assert task_metrics("stsb", [0.0, 1.0, 2.0], outputs) == {"pearson": 0.0, "spearman": 0.0}


@only_on("torch")
def test_a_regression_learns(arguments, tmp_path):
    changed = ["--method", "full", "--learning-rate", "0.03", "--epochs", "5"]
    main(["--task", "stsb", *arguments, *changed, "--batch-size", "6"])
    (run,) = lines(tmp_path)
    assert list(run["metrics"]) == ["pearson", "spearman"]
    assert run["metrics"]["pearson"] > 0.9
    assert run["metrics"]["spearman"] > 0.9
    assert run["score"] == pytest.approx(sum(run["metrics"].values()) / 2)


@only_on("torch")
def test_a_line_has_settings_and_results_and_both_of_mnlis_splits(arguments, preset, tmp_path):
    main(["--task", "mnli", "--train-size", "12", "--seeds", "3", *arguments])
    (run,) = lines(tmp_path)
    assert list(run["metrics"]) == ["accuracy_matched", "accuracy_mismatched"]
    del run["metrics"], run["score"], run["seconds"], run["trainable_parameters"]
    assert run == {
        "task": "mnli",
        "method": "dcft",
        "backend": keras.backend.backend(),
        "seed": 3,
        "preset": preset,
        "kernel_size": 4,
        "rank": 1,
        "recipe": None,
        "learning_rate": 5e-3,
        "epochs": 1,
        "batch_size": 12,
        "train_size": 12,
        "sequence_length": None,
        "train_examples": 12,
        "held_out_examples": 2 * VALIDATION_ROWS,
    }


@only_on("torch")
def test_the_papers_recipe_is_followed(arguments, preset, tmp_path, monkeypatch):
    trained = []
    train = finetune_glue.train

    def watched(classifier, data, settings):
        seconds = train(classifier, data, settings)
        trained.append(classifier)
        return seconds

    monkeypatch.setattr(finetune_glue, "train", watched)
    main(["--task", "rte", *arguments, "--recipe", "paper", "--sequence-length", "8"])
    (run,) = lines(tmp_path)
    assert (run["recipe"], run["learning_rate"], run["epochs"]) == ("paper", 1.2e-3, 1)
    [classifier] = trained
    config = classifier.backbone.dcft_config
    assert (config["alpha"], config["orthogonality"]) == (16.0, 0.3)
    assert config["trainable_layers"] == ["pooled_dense"]
    assert len(config["layers"]) == 2 * 6
    assert classifier.dropout == 0.2
    optimizer = classifier.optimizer
    assert type(optimizer).__name__ == "AdamW"
    assert optimizer.weight_decay == 0.01
    schedule = keras.saving.deserialize_keras_object(optimizer.get_config()["learning_rate"])
    # Two steps: too few for the authors' 200 of warm-up.
    assert (schedule.peak_learning_rate, schedule.steps) == (1.2e-3, 2)
    assert schedule.warmup_share == 0.5
    options = parse_options(["--task", "rte", "--recipe", "paper", "--preset", preset])
    settings = settings_of("rte", 0, "dcft", options)
    assert (settings["epochs"], settings["batch_size"], settings["sequence_length"]) == (
        50,
        32,
        320,
    )


@only_on("torch")
def test_an_interrupted_sweep_goes_on_where_it_was_cut_off(arguments, tmp_path, capsys):
    sweep = ["--task", "cola", "--method", "head", "--seeds", "0", "1", *arguments]
    main(sweep)
    assert "[2/2] cola, head, seed 1" in capsys.readouterr().out
    output = tmp_path / "glue.jsonl"
    first, second = output.read_text().splitlines()
    output.write_text(f"{first}\n{second[:40]}")  # as if killed while it wrote

    main(sweep)
    printed = capsys.readouterr().out
    assert "line 2: not JSON, ignored" in printed
    assert printed.count("already") == 1
    kept, cut_off, repeated = output.read_text().splitlines()
    assert (kept, cut_off) == (first, second[:40])
    differing = {"seconds": 0}
    assert json.loads(repeated) | differing == json.loads(second) | differing

    main(sweep)
    assert capsys.readouterr().out.count("already") == 2
    assert len(output.read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("method", "changed", "repeated"),
    [
        ("dcft", [], False),
        ("dcft", ["--kernel-size", "2"], True),
        ("lora", ["--kernel-size", "2"], False),  # it has none
        ("lora", ["--rank", "2"], True),
        ("head", ["--rank", "2"], False),
        ("head", ["--learning-rate", "0.005"], False),  # its default
        ("head", ["--epochs", "2"], True),
        ("head", ["--batch-size", "2"], True),
        ("head", ["--train-size", "20"], True),
        ("dcft", ["--recipe", "paper"], True),
        ("head", ["--sequence-length", "4"], True),
        ("head", ["--preset", "other"], True),
        ("head", ["--seeds", "1"], True),
        ("head", ["--task", "rte"], True),
    ],
)
def test_runs_are_repeated_only_with_other_settings(
    method, changed, repeated, arguments, tmp_path, monkeypatch
):
    measured = []

    def measure(settings, data_dir):
        measured.append(settings)
        results = {"metrics": {"accuracy": 0.5}, "score": 0.5, "trainable_parameters": 1}
        return {**settings, **results}

    monkeypatch.setattr(finetune_glue, "measure", measure)
    once = ["--task", "qnli", "--method", method, *arguments]
    main(once)
    main(once + changed)
    assert len(measured) == len(lines(tmp_path)) == 1 + repeated


def test_runs_of_another_backend_do_not_count(arguments, tmp_path, monkeypatch):
    options = parse_options(["--task", "rte", *arguments])
    settings = settings_of("rte", 0, "dcft", options)
    monkeypatch.setattr(keras.backend, "backend", lambda: "another")
    assert settings_of("rte", 0, "dcft", options) == {**settings, "backend": "another"}


def test_the_table_has_mean_and_deviation_over_seeds(arguments, tmp_path, capsys):
    sweep = ["--task", "mrpc", "--seeds", "0", "1", *arguments]
    options = parse_options(sweep)
    with (tmp_path / "glue.jsonl").open("w") as file:
        for seed, accuracy in enumerate([0.5, 0.7]):
            run = settings_of("mrpc", seed, "dcft", options)
            run["metrics"] = {"accuracy": accuracy, "f1": 0.8}
            run.update(score=(accuracy + 0.8) / 2, trainable_parameters=1234)
            file.write(json.dumps(run) + "\n")
    main(sweep)
    printed = capsys.readouterr().out
    for text in ("accuracy 0.600 ± 0.141", "f1 0.800 ± 0.000", "0.700 ± 0.071", "1,234"):
        assert text in printed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--task", "ax"], "argument --task: invalid choice: 'ax'"),
        (["--method", "magic"], "argument --method: invalid choice: 'magic'"),
        (["--seeds", "x"], "argument --seeds: invalid int value: 'x'"),
        (["--epochs", "0"], "argument --epochs: must be at least 1. Received: 0"),
        (["--learning-rate", "-1"], "argument --learning-rate: must be a positive number"),
        (["--data-dir", "/nowhere"], "--data-dir has no folder glue/rte"),
        (["--train-size", "1"], "glue/rte: the training examples all have one label."),
        (["--preset", "/nowhere"], "Unknown preset identifier"),
        (["--kernel-size", "1000"], "`kernel_size` must not be larger"),
        (["--sequence-length", "13"], "must be at most the preset's 12. Received: 13"),
        (["--output", "/"], "Is a directory: '/'"),
        (["--recipe", "paper", "--task", "wnli"], "no recipe for --task wnli"),
        (["--recipe", "paper", "--method", "lora"], "--recipe paper is for --method dcft"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(changed, message, arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--task", "rte", *arguments, *changed])
    said = capsys.readouterr().err.strip() if stop.value.code == 2 else stop.value.code
    assert said.startswith("error: ")
    assert message in said
    assert len(said.splitlines()) == 1


@pytest.mark.real
@pytest.mark.skipif(not SHARED_TFDS.is_dir(), reason=f"GLUE is not at {SHARED_TFDS}")
@only_on("torch")
def test_the_real_minilm_on_the_real_rte(tmp_path):
    main([
        "--task", "rte", "--data-dir", str(SHARED_TFDS), "--train-size", "64", "--epochs", "1",
        "--sequence-length", "32", "--output", str(tmp_path / "glue.jsonl"),
    ])  # fmt: skip
    (run,) = lines(tmp_path)
    assert run["train_examples"] == 64
    assert run["held_out_examples"] == 277
    assert run["trainable_parameters"] == 7648 + 770
    assert 0.4 < run["score"] < 0.7
