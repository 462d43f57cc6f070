"""Text data for the examples: docstrings, GLUE, or a table of text and labels."""

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
        train_labels, held_out_labels: list of int, or of float in a regression.
        classes: the labels' names, none in a regression.
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
        raise ValueError(f"{dataset}: the training examples all have one label.")
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
        modules = library_modules(library)
        rng.shuffle(modules)
        counts = {False: 0, True: 0}
        for module in modules:
            held_out = rng.random() < HELD_OUT_SHARE
            share = HELD_OUT_SHARE if held_out else 1 - HELD_OUT_SHARE
            if counts[held_out] >= share * DOCSTRINGS_PER_LIBRARY:
                continue
            for docstring in docstrings(module):
                text = LIBRARY_NAMES.sub("library", docstring)[:160]
                full = counts[held_out] >= share * DOCSTRINGS_PER_LIBRARY
                if len(text) < 40 or text in seen or full:
                    continue
                seen.add(text)
                counts[held_out] += 1
                sides[held_out].append((text, label))
    return _from_pairs(sides[False], sides[True], libraries, rng)


def library_modules(library: str) -> list:
    """The files of an installed library, its tests left out; `python` is the standard library."""
    if library == "python":
        root = Path(sysconfig.get_paths()["stdlib"])
    else:
        root = Path(importlib.util.find_spec(library).origin).parent
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
    return sorted(p for p in root.rglob("*.py") if not skipped & set(p.relative_to(root).parts))


def docstrings(module: Path):
    """The docstrings in a Python file, each in one line."""
    try:
        tree = ast.parse(module.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for node in ast.walk(tree):
        docstring = ast.get_docstring(node) if isinstance(node, documented) else None
        if docstring:
            yield " ".join(docstring.split())


# --- GLUE through TensorFlow Datasets ---

GLUE_TEXT_COLUMNS = {
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "mrpc": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"),
    "stsb": ("sentence1", "sentence2"),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}


def glue_data(dataset: str, data_dir, seed: int = 0) -> TextData:
    """A GLUE task, its validation split (MNLI's matched one) as the held-out examples."""
    task = dataset.removeprefix("glue/")
    if task not in GLUE_TEXT_COLUMNS:
        raise ValueError(
            f"--dataset must name a GLUE task of {sorted(GLUE_TEXT_COLUMNS)}. Received: {dataset}"
        )
    train, classes = glue_split(task, "train", data_dir)
    validation = "validation_matched" if task == "mnli" else "validation"
    held_out, _ = glue_split(task, validation, data_dir)
    return _from_pairs(train, held_out, classes, random.Random(seed))


def glue_split(task: str, split: str, data_dir):
    """The (text or pair of texts, label) of each row of a GLUE split, and the labels' names."""
    check_glue_folder(task, data_dir)
    import tensorflow_datasets as tfds

    rows, info = tfds.load(
        f"glue/{task}", split=split, data_dir=data_dir, download=data_dir is None, with_info=True
    )
    examples = []
    for row in tfds.as_numpy(rows):
        texts = tuple(row[column].decode("utf-8") for column in GLUE_TEXT_COLUMNS[task])
        examples.append((texts if len(texts) > 1 else texts[0], row["label"].item()))
    return examples, getattr(info.features["label"], "names", [])


def check_glue_folder(task: str, data_dir):
    """Raises an OSError if a folder is given that does not have the task."""
    if data_dir is None or any(Path(data_dir, "glue", task).glob("*/dataset_info.json")):
        return
    raise OSError(
        f"--data-dir has no folder glue/{task} written by tensorflow_datasets. Received: {data_dir}"
    )


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
