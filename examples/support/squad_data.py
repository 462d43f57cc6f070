"""Questions on texts in SQuAD's format, and the score that SQuAD's own scripts give to answers."""

import collections
import dataclasses
import json
import random
import re
import string
from pathlib import Path
from typing import NamedTuple

HELD_OUT_SHARE = 0.2


class Answer(NamedTuple):
    """What the context says, and the index of its first character there."""

    text: str
    start: int


@dataclasses.dataclass
class Question:
    """A question on a context.

    Attributes:
        id: str, unique in the data.
        article: int, the number of the article that the context is from.
        context, text: str; `text` is the question itself.
        answers: list of `Answer`, each as right as the others; empty if the context has none.
    """

    id: str
    article: int
    context: str
    text: str
    answers: list


def load_question_data(dataset: str, data_dir=None, held_out_file=None, train_size=None, seed=0):
    """Loads a file in SQuAD's format, or SQuAD through TensorFlow Datasets.

    Args:
        dataset: str, `squad`, `squad/v2.0`, or a JSON file.
        data_dir: where `tensorflow_datasets` keeps SQuAD, or None for its own folder.
        held_out_file: a JSON file with held-out questions. Without it, SQuAD's validation split is
            held out, or a fifth of a file's articles.
        train_size: int, the most training questions to keep, or None for all.
        seed: int, of every shuffle here.

    Returns:
        Training questions and held-out questions, two lists of `Question`.

    Raises:
        ValueError, OSError: in one line, if there is no such data or it is badly formed.
    """
    if dataset in SQUAD_CONFIGS:
        train, held_out = squad_data(dataset, data_dir)
    elif held_out_file is None:
        train, held_out = split_by_article(load_questions(dataset), HELD_OUT_SHARE, seed)
    else:
        train = load_questions(dataset)
    if held_out_file is not None:
        held_out = load_questions(held_out_file)
    random.Random(seed).shuffle(train)
    train = train[:train_size]
    if not any(question.answers for question in train):
        raise ValueError(f"{dataset}: none of the {len(train)} training questions has an answer.")
    return train, held_out


def split_by_article(questions: list, share: float, seed: int = 0):
    """Training and held-out questions, no article on both sides."""
    articles = sorted({question.article for question in questions})
    if len(articles) < 2:
        raise ValueError("Of one article none can be held out: --held-out-file is needed.")
    random.Random(seed).shuffle(articles)
    held_out = set(articles[: min(max(1, round(share * len(articles))), len(articles) - 1)])
    sides = {False: [], True: []}
    for question in questions:
        sides[question.article in held_out].append(question)
    return sides[False], sides[True]


# --- a file ---


def load_questions(path) -> list:
    """The questions of a JSON file in the format of SQuAD 1.1 or 2.0.

    Raises:
        ValueError: in one line with the file and the question, if it is badly formed.
        OSError: if it cannot be read.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file in UTF-8 ({error}).") from error
    questions = list(_questions(data, path))
    repeated = [i for i, n in collections.Counter(q.id for q in questions).items() if n > 1]
    if repeated:
        raise ValueError(f"{path}: several questions have the id {repeated[0]}.")
    if not any(question.answers for question in questions):
        raise ValueError(f"{path}: none of its {len(questions)} questions has an answer.")
    return questions


def _questions(data, path):
    for article, entry in enumerate(_field(data, "data", list, path)):
        for paragraph in _field(entry, "paragraphs", list, f"{path}, article {article}"):
            context = _field(paragraph, "context", str, f"{path}, article {article}")
            for record in _field(paragraph, "qas", list, f"{path}, article {article}"):
                question_id = _field(record, "id", str, f"{path}, article {article}")
                place = f"{path}, question {question_id}"
                text = _field(record, "question", str, place)
                answers = _answers(record, context, place)
                yield Question(question_id, article, context, text, answers)


def _answers(record: dict, context: str, place: str) -> list:
    answers = []
    for entry in _field(record, "answers", list, place):
        answer = Answer(
            _field(entry, "text", str, place), _field(entry, "answer_start", int, place)
        )
        # A negative index would count from the context's end.
        if answer.start < 0 or not context.startswith(answer.text, answer.start):
            raise ValueError(
                f"{place}: the context does not say {answer.text!r} at `answer_start`. "
                f"Received: {answer.start}"
            )
        answers.append(answer)
    if answers and record.get("is_impossible"):
        raise ValueError(f"{place}: has answers, and `is_impossible` says that it has none.")
    return answers


def _field(record, name: str, kind: type, place):
    value = record.get(name) if isinstance(record, dict) else None
    if not isinstance(value, kind):
        raise ValueError(
            f"{place}: not in SQuAD's format, `{name}` must be a {kind.__name__}. "
            f"Found: {str(value)[:40]}"
        )
    return value


# --- SQuAD through TensorFlow Datasets ---

SQUAD_CONFIGS = {"squad": "squad/v1.1", "squad/v1.1": "squad/v1.1", "squad/v2.0": "squad/v2.0"}


def squad_data(dataset: str, data_dir):
    """SQuAD 1.1 or 2.0, its validation split as the held-out questions."""
    import tensorflow_datasets as tfds

    name = SQUAD_CONFIGS[dataset]
    if data_dir is not None and not (Path(data_dir) / name).is_dir():
        raise OSError(f"--data-dir has no folder {name}. Received: {data_dir}")
    splits = tfds.load(
        name,
        split=["train", "validation"],
        data_dir=data_dir,
        download=data_dir is None,
    )
    return tuple(list(_tfds_questions(split)) for split in splits)


def _tfds_questions(split):
    import tensorflow_datasets as tfds

    articles = {}
    for row in tfds.as_numpy(split):
        answers = row["answers"]
        yield Question(
            id=row["id"].decode("utf-8"),
            article=articles.setdefault(row["title"], len(articles)),
            context=row["context"].decode("utf-8"),
            text=row["question"].decode("utf-8"),
            answers=[
                Answer(text.decode("utf-8"), int(start))
                for text, start in zip(answers["text"], answers["answer_start"])
            ],
        )


# --- the score ---


def score(predictions: dict, questions: list) -> dict:
    """Exact match and F1 as SQuAD's evaluation scripts compute them, from 0 to 100.

    If a question has no answer, all are scored as the script for SQuAD 2.0 does it, else as that
    for 1.1. The two differ only where nothing is left of an answer once it is normalized.

    Args:
        predictions: dict of question id to answer, the empty string for none.
        questions: list of `Question`.
    """
    answers_may_be_empty = any(not question.answers for question in questions)
    exact_match = f1 = 0.0
    for question in questions:
        prediction = _normalized(predictions[question.id])
        golds = [_normalized(answer.text) for answer in question.answers]
        if answers_may_be_empty:
            golds = [gold for gold in golds if gold] or [""]
        exact_match += prediction in golds
        f1 += max(_f1(prediction, gold, answers_may_be_empty) for gold in golds)
    return {
        "exact_match": 100 * exact_match / len(questions),
        "f1": 100 * f1 / len(questions),
    }


def _normalized(answer: str) -> str:
    """An answer without case, punctuation, articles and irregular white space, in this order."""
    answer = "".join(c for c in answer.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", answer).split())


def _f1(prediction: str, gold: str, answers_may_be_empty: bool) -> float:
    predicted, right = prediction.split(), gold.split()
    if not predicted or not right:
        return float(answers_may_be_empty and predicted == right)
    shared = (collections.Counter(predicted) & collections.Counter(right)).total()
    return 2 * shared / (len(predicted) + len(right))
