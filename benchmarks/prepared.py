"""The data and weights of `long_training.py` in files, so that it runs without a tokenizer.

`prepare` needs TensorFlow, for the tokenizer and the data sets; what reads the files does not.
"""

import dataclasses
import functools
import json
from pathlib import Path

import keras
import keras_hub
import measuring
import numpy as np
from keras import ops
from lanes import Examples
from support.question_answering import Window, Windows, answers
from support.squad_data import Answer, Question, score

SST2_SENTENCES = 8 if measuring.QUICK else 20_000
PARTS = ("train", "validation", "reported")
WORD_EMBEDDINGS = "embeddings.npz"


@dataclasses.dataclass
class Data:
    """A task's examples.

    Attributes:
        train, validation, reported: `Examples`.
        measures: function of the name of a part and its logits, an array (examples, ...), that
            returns a dict of the score and of what else tells something.
    """

    train: Examples
    validation: Examples
    reported: Examples
    measures: callable


# --- reading ---


def read(folder, task) -> Data:
    arrays = np.load(Path(folder) / f"{task}.npz")
    parts = {
        part: Examples(
            **{field.name: arrays[f"{part}_{field.name}"] for field in dataclasses.fields(Examples)}
        )
        for part in PARTS
    }
    if task == "xquad":
        windows = _read_windows(Path(folder) / "xquad.json", parts)
        return Data(**parts, measures=lambda part, logits: _spans(*windows[part], logits))
    return Data(**parts, measures=lambda part, logits: _accuracy(parts[part], logits))


def _accuracy(examples, logits) -> dict:
    classes = logits.argmax(axis=-1)
    return {
        "score": float(np.mean(classes == examples.labels)),
        "predicted": len(np.unique(classes)),
    }


def _spans(windows, questions, logits) -> dict:
    found = answers(windows, logits[:, 0], logits[:, 1])
    scores = score(found, questions)
    return {
        "score": scores["f1"] / 100,
        "exact_match": scores["exact_match"] / 100,
        "predicted": len(set(found.values())),
    }


def make_backbone(folder, dropout=None):
    """The real MiniLM, whose embeddings of words that are in no example are zeros."""
    folder = Path(folder)
    config = json.loads((folder / "backbone.json").read_text())
    if dropout is not None:
        config["dropout"] = dropout
    backbone = keras_hub.models.BertBackbone.from_config(config)
    arrays = np.load(folder / "backbone.npz")
    weights = [arrays.get(str(i)) for i in range(len(backbone.weights))]
    words = np.load(folder / WORD_EMBEDDINGS)
    shape = backbone.token_embedding.embeddings.shape
    weights[weights.index(None)] = embeddings = np.zeros(shape, "float32")
    embeddings[words["ids"]] = words["vectors"]
    backbone.set_weights(weights)
    return backbone


def make_model(task, backbone, head_dropout: float = 0.1):
    """The model of `quality.py` for a task."""
    if task != "xquad":
        return keras_hub.models.BertTextClassifier(backbone, 2, dropout=head_dropout)
    # As `finetune_question_answering.make_model`, in a file that needs TensorFlow.
    inputs = backbone.input
    logits = keras.layers.Dense(2, name="span")(backbone(inputs)["sequence_output"])
    logits = keras.layers.Permute((2, 1), name="start_and_end")(logits)
    padding = 1.0 - ops.cast(ops.expand_dims(inputs["padding_mask"], 1), "float32")
    return keras.Model(inputs, logits - 1e9 * padding)


# --- writing ---


def prepare(folder, data_dir, squad):
    """Writes all files; `quality.py` says what the parts of the data are."""
    import quality

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ids = [np.zeros(1, int)]
    for task in ("sst2", "xquad", "rte"):
        parts = quality.load_xquad(squad) if task == "xquad" else _glue_parts(task, data_dir)
        arrays = {}
        for part in PARTS:
            inputs = parts[part]["inputs"]
            arrays[f"{part}_token_ids"] = inputs["token_ids"].astype("uint16")
            arrays[f"{part}_segment_ids"] = inputs["segment_ids"].astype("uint8")
            arrays[f"{part}_lengths"] = inputs["padding_mask"].sum(axis=1).astype("uint8")
            arrays[f"{part}_labels"] = parts[part]["labels"].astype("uint8")
            ids.append(inputs["token_ids"].ravel())
        np.savez_compressed(folder / f"{task}.npz", **arrays)
        if task == "xquad":
            _write_windows(folder / "xquad.json", {part: parts[part] for part in PARTS})
    _write_backbone(folder, np.unique(np.concatenate(ids)))


def _glue_parts(task, data_dir) -> dict:
    """As in `quality.py`, with more of SST-2."""
    import quality
    from support.methods import default_preset
    from support.text_classifier import make_classifier
    from support.text_data import glue_data

    everything = glue_data(f"glue/{task}", data_dir)
    texts, labels = everything.train_texts, everything.train_labels
    train = SST2_SENTENCES if task == "sst2" else round(0.85 * len(texts))
    validation = slice(train, train + 3000)
    preprocessor = make_classifier(default_preset(), everything).preprocessor
    encode = functools.partial(quality.encoded, preprocessor)
    return {
        "train": encode(texts[:train], labels[:train]),
        "validation": encode(texts[validation], labels[validation]),
        "reported": encode(everything.held_out_texts, everything.held_out_labels),
    }


def _write_backbone(folder, ids):
    """The weights, of the word embeddings those that occur, in a file of their own."""
    from support.methods import default_preset

    backbone = keras_hub.models.Backbone.from_preset(str(default_preset()))
    (folder / "backbone.json").write_text(json.dumps(backbone.get_config()))
    words = backbone.token_embedding.embeddings
    arrays = {str(i): np.array(w) for i, w in enumerate(backbone.weights) if w is not words}
    np.savez_compressed(folder / "backbone.npz", **arrays)
    np.savez_compressed(folder / WORD_EMBEDDINGS, ids=ids, vectors=np.array(words)[ids])


def _write_windows(path, parts):
    contexts = {}
    written = {}
    for part, examples in parts.items():
        questions = examples["questions"]
        numbers = {question.id: i for i, question in enumerate(questions)}
        written[part] = {
            "questions": [
                {
                    **dataclasses.asdict(question),
                    "context": contexts.setdefault(question.context, len(contexts)),
                }
                for question in questions
            ],
            "windows": [
                {
                    "question": numbers[row.question.id],
                    "context_start": row.context_start,
                    "offsets": row.offsets.tolist(),
                }
                for row in examples["windows"].rows
            ],
        }
    path.write_text(json.dumps({"contexts": list(contexts), "parts": written}))


def _read_windows(path, parts) -> dict:
    """For each part its `Windows` and its questions."""
    data = json.loads(path.read_text())
    found = {}
    for part, written in data["parts"].items():
        questions = [
            Question(
                record["id"],
                record["article"],
                data["contexts"][record["context"]],
                record["text"],
                [Answer(*answer) for answer in record["answers"]],
            )
            for record in written["questions"]
        ]
        rows = []
        for record, ids, labels in zip(
            written["windows"], parts[part].token_ids, parts[part].labels
        ):
            start, offsets = record["context_start"], np.array(record["offsets"], "int32")
            context_ids = ids[start : start + len(offsets)].tolist()
            question = questions[record["question"]]
            rows.append(Window(question, [], context_ids, offsets, start, tuple(labels)))
        found[part] = Windows(rows, {}, parts[part].labels), questions
    return found
