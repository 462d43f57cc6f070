"""Text classification data for the examples: docstrings, GLUE, or a table of text and labels."""

import ast
import csv
import dataclasses
import importlib.util
import random
import re
import sys
import sysconfig
from pathlib import Path

HELD_OUT_SHARE = 0.2


@dataclasses.dataclass
class TextData:
    """Training and held-out examples.

    Attributes:
        train_texts, held_out_texts: list of str, or of pairs of str.
        train_labels, held_out_labels: list of int.
        classes: the labels' names.
    """

    train_texts: list
    train_labels: list
    held_out_texts: list
    held_out_labels: list
    classes: list


def load_text_data(dataset: str, data_dir, train_size, seed: int = 0) -> TextData:
    """Loads `docstrings`, `glue/<task>` or a TSV or CSV file.

    Args:
        dataset: str.
        data_dir: where `tensorflow_datasets` keeps GLUE, or None for its own folder.
        train_size: int, the most training examples to keep, or None for all.
        seed: int, of every shuffle here.

    Raises:
        ValueError, OSError: in one line, if there is no such data or it is badly formed.
    """
    if dataset == "docstrings":
        data = docstring_data(seed)
    elif dataset.startswith("glue/"):
        data = glue_data(dataset, data_dir, seed)
    elif Path(dataset).suffix in (".tsv", ".csv"):
        data = table_data(Path(dataset), seed)
    else:
        raise ValueError(
            "--dataset must be `docstrings`, `glue/<task>` or a .tsv or .csv file. "
            f"Received: {dataset}"
        )
    if train_size is not None:
        data.train_texts = data.train_texts[:train_size]
        data.train_labels = data.train_labels[:train_size]
    if len(set(data.train_labels)) < 2:
        raise ValueError(f"{dataset}: the training examples are all of one class.")
    return data


# --- docstrings: real text on every machine, labelled by the library it documents ---

LIBRARIES = ("keras", "numpy", "python", "tensorflow")
LIBRARY_NAMES = re.compile(
    r"\b(np|tf|torch\w*|\w*(keras|numpy|tensorflow|pytorch)\w*|c?python\w*)\b", re.IGNORECASE
)
DOCSTRINGS_PER_LIBRARY = 750


def docstring_data(seed: int = 0) -> TextData:
    """Docstrings of installed libraries; the task is to tell which library one is from.

    Library names are masked, equal docstrings kept once, and whole modules go to either side of
    the split, so that near-copies within a module do not leak.
    """
    libraries = [name for name in LIBRARIES if name == "python" or importlib.util.find_spec(name)]
    if len(libraries) == len(LIBRARIES) - 1 and importlib.util.find_spec("torch"):
        libraries.append("torch")
    rng = random.Random(seed)
    sides = {False: [], True: []}
    seen = set()
    for label, library in enumerate(libraries):
        modules = _library_modules(library)
        rng.shuffle(modules)
        counts = {False: 0, True: 0}
        for module in modules:
            held_out = rng.random() < HELD_OUT_SHARE
            share = HELD_OUT_SHARE if held_out else 1 - HELD_OUT_SHARE
            if counts[held_out] >= share * DOCSTRINGS_PER_LIBRARY:
                continue
            for text in _docstrings(module):
                if text in seen or counts[held_out] >= share * DOCSTRINGS_PER_LIBRARY:
                    continue
                seen.add(text)
                counts[held_out] += 1
                sides[held_out].append((text, label))
    return _from_pairs(sides[False], sides[True], libraries, rng)


def _library_modules(library: str) -> list:
    if library == "python":
        root = Path(sysconfig.get_paths()["stdlib"])
    else:
        root = Path(importlib.util.find_spec(library).origin).parent
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
    return sorted(p for p in root.rglob("*.py") if not skipped & set(p.relative_to(root).parts))


def _docstrings(module: Path):
    try:
        tree = ast.parse(module.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for node in ast.walk(tree):
        docstring = ast.get_docstring(node) if isinstance(node, documented) else None
        if docstring:
            text = " ".join(LIBRARY_NAMES.sub("library", docstring).split())[:160]
            if len(text) >= 40:
                yield text


# --- GLUE through TensorFlow Datasets ---

GLUE_TEXT_COLUMNS = {
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "mrpc": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}


def glue_data(dataset: str, data_dir, seed: int = 0) -> TextData:
    """A GLUE classification task, its validation split as the held-out examples."""
    task = dataset.removeprefix("glue/")
    if task not in GLUE_TEXT_COLUMNS:
        raise ValueError(
            f"--dataset must name a GLUE classification task of {sorted(GLUE_TEXT_COLUMNS)}. "
            f"Received: {dataset}"
        )
    import tensorflow_datasets as tfds

    columns = GLUE_TEXT_COLUMNS[task]
    validation = "validation_matched" if task == "mnli" else "validation"
    if data_dir is not None and not (Path(data_dir) / "glue" / task).is_dir():
        raise OSError(f"--data-dir has no folder glue/{task}. Received: {data_dir}")
    splits, info = tfds.load(
        dataset,
        split={"train": "train", "held_out": validation},
        data_dir=data_dir,
        download=data_dir is None,
        with_info=True,
    )

    def rows(split):
        for row in tfds.as_numpy(split):
            texts = tuple(row[column].decode("utf-8") for column in columns)
            yield (texts if len(texts) > 1 else texts[0]), int(row["label"])

    classes = info.features["label"].names
    held_out = list(rows(splits["held_out"]))
    return _from_pairs(list(rows(splits["train"])), held_out, classes, random.Random(seed))


# --- a file ---


def table_data(path: Path, seed: int = 0) -> TextData:
    """A UTF-8 TSV or CSV file whose header names the columns `text` and `label`."""
    csv.field_size_limit(sys.maxsize)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            columns = reader.fieldnames or []
            if "text" not in columns or "label" not in columns:
                raise ValueError(
                    f"{path}: the first line must name the columns `text` and `label`. "
                    f"Found: {columns}"
                )
            rows = []
            for row in reader:
                if None in row or row["text"] is None or not row["label"]:
                    raise ValueError(
                        f"{path}, line {reader.line_num}: expected {len(columns)} columns, "
                        "text and label filled in."
                    )
                rows.append((row["text"], row["label"]))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a UTF-8 text file ({error.reason}).") from error
    except csv.Error as error:
        raise ValueError(f"{path}: not a readable table ({error}).") from error
    classes = sorted({label for _, label in rows})
    if len(classes) < 2:
        raise ValueError(f"{path}: at least two classes are needed. Found: {classes}")
    pairs = [(text, classes.index(label)) for text, label in rows]
    rng = random.Random(seed)
    rng.shuffle(pairs)
    held_out = max(1, round(HELD_OUT_SHARE * len(pairs)))
    return _from_pairs(pairs[held_out:], pairs[:held_out], classes, rng)


def _from_pairs(train, held_out, classes, rng) -> TextData:
    rng.shuffle(train)
    return TextData(
        train_texts=[text for text, _ in train],
        train_labels=[label for _, label in train],
        held_out_texts=[text for text, _ in held_out],
        held_out_labels=[label for _, label in held_out],
        classes=list(classes),
    )
