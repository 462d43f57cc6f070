"""Questions and contexts as windows of tokens, and answers in the context's own words.

KerasHub's tokenizers give ids without saying where in the text a token is from. It is found word
by word: what a word's pieces are does not depend on the words around it.
"""

import dataclasses
import re
import string
import unicodedata

import keras_hub
import numpy as np

LONGEST_ANSWER = 30  # tokens, as in BERT's own fine-tuning on SQuAD

# A word with the space before it and the line breaks after it, which byte-pair tokenizers merge
# with it. ASCII, because a no-break space is not a space to all tokenizers.
WORD = re.compile(r"[ \t]?\S+[\r\n]*|\s+?(?=[ \t]?\S|\Z)", re.ASCII)
UNKNOWN_PIECES = ("[UNK]", "<unk>")


# --- tokens and where they are ---


def tokens_with_offsets(tokenizer, texts: list) -> list:
    """The tokens of texts, each with the characters that it is from.

    Args:
        tokenizer: a KerasHub tokenizer.
        texts: list of str.

    Returns:
        A pair for each text: the token ids as a list, and an array (tokens, 2) of the index of
        each token's first character and of the one after its last.

    Raises:
        ValueError: if the tokenizer does not tokenize word by word.
    """
    split_texts = [WORD.findall(text) for text in texts]
    words = sorted({word for split_text in split_texts for word in split_text})
    known = {
        word: (ids, _piece_offsets(tokenizer, word, ids))
        for word, ids in zip(words, _token_ids(tokenizer, words))
    }
    tokens = []
    for split_text, expected_ids in zip(split_texts, _token_ids(tokenizer, texts)):
        ids, offsets, position = [], [np.zeros((0, 2), "int32")], 0
        for word in split_text:
            word_ids, word_offsets = known[word]
            ids += word_ids
            offsets.append(word_offsets + position)
            position += len(word)
        if ids != expected_ids:
            raise ValueError(
                f"{type(tokenizer).__name__} tokenizes a text otherwise than its words, so that "
                "answers cannot be mapped back to the text."
            )
        tokens.append((ids, np.concatenate(offsets)))
    return tokens


def _token_ids(tokenizer, texts: list) -> list:
    return [[int(i) for i in ids] for ids in tokenizer.tokenize(texts)] if texts else []


def _piece_offsets(tokenizer, word: str, ids: list):
    """An array (pieces, 2) of where in the word its pieces are.

    A piece is found by its length, what an unknown piece stands for as the rest of the word. Where
    that does not add up, each of the pieces is given the whole word.
    """
    lengths = np.array([_piece_length(tokenizer, i) for i in ids], "int32")
    word_ends = np.cumsum([_normalized_length(tokenizer, character) for character in word])
    unknown = np.flatnonzero(lengths < 0)
    if len(unknown) == 1:
        lengths[unknown] = word_ends[-1] - lengths[lengths >= 0].sum()
    ends = np.cumsum(lengths)
    if not ids or min(lengths) < 0 or ends[-1] != word_ends[-1]:
        first = len(word) - len(word.lstrip(string.whitespace))
        return np.tile(np.array([first, len(word.rstrip(string.whitespace))]), (len(ids), 1))
    firsts = np.searchsorted(word_ends, ends - lengths, side="right")
    lasts = np.searchsorted(word_ends, ends, side="left")
    return np.stack([firsts, np.where(lengths > 0, lasts + 1, firsts)], axis=1)


def _piece_length(tokenizer, token_id: int) -> int:
    """How many characters of a word a token is, without marks for spaces; -1 if it is unknown."""
    piece = tokenizer.id_to_token(token_id)
    if piece in UNKNOWN_PIECES:
        return -1
    return len(piece.removeprefix("##").strip("▁ĠĊĉč"))


def _normalized_length(tokenizer, character: str) -> int:
    """How many characters a tokenizer makes of one before it looks for pieces."""
    if character in string.whitespace:
        return 0
    if isinstance(tokenizer, keras_hub.tokenizers.BytePairTokenizer):
        return len(character.encode("utf-8"))
    if unicodedata.category(character) in ("Cc", "Cf"):  # soft hyphens, for example, are dropped
        return 0
    if getattr(tokenizer, "strip_accents", False):
        decomposed = unicodedata.normalize("NFD", character)
        character = "".join(c for c in decomposed if unicodedata.category(c) != "Mn")
    # SentencePiece tokenizers have no such setting and always normalize.
    if getattr(tokenizer, "lowercase", True):
        character = unicodedata.normalize("NFKC", character).casefold()
    return len(character)


# --- windows ---


@dataclasses.dataclass
class Window:
    """A question and a part of its context that fit into a model together.

    Attributes:
        question: a `Question`.
        question_ids, context_ids: lists of token ids.
        offsets: array (tokens of the part, 2), their characters in the whole context.
        context_start: int, the position of the part's first token in the window.
        labels: the positions of the first and the last token of the question's first answer; zeros,
            the start token, if the window does not have both.
    """

    question: object
    question_ids: list
    context_ids: list
    offsets: np.ndarray
    context_start: int
    labels: tuple


@dataclasses.dataclass
class Windows:
    """Windows in the order of their questions, and what a model is fed of them.

    Attributes:
        rows: list of `Window`.
        inputs: dict of `token_ids`, `segment_ids` and `padding_mask`, arrays (windows, length).
        labels: array (windows, 2).
    """

    rows: list
    inputs: dict
    labels: np.ndarray


def make_windows(questions: list, preprocessor, stride: int) -> Windows:
    """Splits contexts into windows; all windows of a question begin with the question.

    Args:
        questions: list of `Question`.
        preprocessor: a `keras_hub.models.TextClassifierPreprocessor`, whose packer and sequence
            length are used.
        stride: int, how many tokens a window shares with the one before.

    Raises:
        ValueError: if the sequences are too short for the stride.
    """
    if preprocessor.packer is None:
        preprocessor.build(None)
    tokenizer, packer = preprocessor.tokenizer, preprocessor.packer
    contexts = list(dict.fromkeys(question.context for question in questions))
    tokens = dict(zip(contexts, tokens_with_offsets(tokenizer, contexts)))
    question_ids = _token_ids(tokenizer, [question.text for question in questions])
    rows = [
        window
        for question, ids in zip(questions, question_ids)
        for window in _windows_of(question, ids, *tokens[question.context], packer, stride)
    ]
    labels = np.array([row.labels for row in rows], "int32")
    return Windows(rows, _packed(rows, packer), labels)


def _windows_of(question, question_ids: list, context_ids: list, offsets, packer, stride: int):
    special = len(packer.start_value) + len(packer.sep_value) + len(packer.end_value)
    room = packer.sequence_length - special
    if stride >= room - room // 2:
        raise ValueError(
            f"--stride must be less than {room - room // 2}, what a long question leaves to the "
            f"context of {packer.sequence_length} tokens. Received: {stride}"
        )
    question_ids = question_ids[: room // 2]
    room -= len(question_ids)
    context_start = len(packer.start_value) + len(question_ids) + len(packer.sep_value)
    answer = _answer_tokens(question, offsets)
    for start in range(0, max(1, len(context_ids) - stride), room - stride):
        part = slice(start, start + room)
        yield Window(
            question,
            question_ids,
            context_ids[part],
            offsets[part],
            context_start,
            _labels(answer, part, context_start),
        )


def _packed(rows: list, packer) -> dict:
    """What the packer makes of the rows, at once: the packer itself takes minutes for SQuAD."""
    shape = len(rows), packer.sequence_length
    inputs = {
        "token_ids": np.full(shape, packer.pad_value, "int32"),
        "segment_ids": np.zeros(shape, "int32"),
        "padding_mask": np.zeros(shape, "int32"),
    }
    for number, row in enumerate(rows):
        ids = [*packer.start_value, *row.question_ids, *packer.sep_value, *row.context_ids]
        ids += packer.end_value
        inputs["token_ids"][number, : len(ids)] = ids
        inputs["segment_ids"][number, row.context_start : len(ids)] = 1
        inputs["padding_mask"][number, : len(ids)] = 1
    return inputs


def _answer_tokens(question, offsets):
    """The first and last token of the question's first answer, or None."""
    if not question.answers:
        return None
    answer = question.answers[0]
    first = np.searchsorted(offsets[:, 1], answer.start, side="right")
    last = np.searchsorted(offsets[:, 0], answer.start + len(answer.text), side="left") - 1
    return (first, last) if first <= last else None


def _labels(answer, part: slice, context_start: int) -> tuple:
    if answer is None or answer[0] < part.start or answer[1] >= part.stop:
        return 0, 0
    return tuple(context_start + token - part.start for token in answer)


# --- answers ---


def answers(windows: Windows, start_logits, end_logits, may_be_empty: bool = False) -> dict:
    """The best answer to each question over all of its windows.

    Args:
        windows: a `Windows`.
        start_logits, end_logits: arrays (windows, length).
        may_be_empty: whether a question may have no answer. The start token's logits then compete
            with the best answer's, in the window where they are lowest.

    Returns:
        A dict of question id to answer, the empty string for none.
    """
    best = {row.question.id: (-np.inf, "") for row in windows.rows}
    null_scores = dict.fromkeys(best, np.inf)
    for row, starts, ends in zip(windows.rows, start_logits, end_logits):
        key = row.question.id
        null_scores[key] = min(null_scores[key], starts[0] + ends[0])
        if row.context_ids:
            span_score, characters = _best_span(row, starts, ends)
            best[key] = max(best[key], (span_score, row.question.context[characters]))
    return {
        key: "" if may_be_empty and null_scores[key] > span_score else text
        for key, (span_score, text) in best.items()
    }


def _best_span(row: Window, start_logits, end_logits):
    """The score of the best span in a window, and the characters of the context that it is."""
    context = slice(row.context_start, row.context_start + len(row.context_ids))
    scores = start_logits[context, None] + end_logits[None, context]
    allowed = np.triu(np.ones(scores.shape, bool)) & np.tri(*scores.shape, LONGEST_ANSWER - 1, bool)
    scores = np.where(allowed, scores, -np.inf)
    first, last = np.unravel_index(np.argmax(scores), scores.shape)
    return scores[first, last], slice(row.offsets[first, 0], row.offsets[last, 1])
