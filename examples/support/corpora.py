"""Running text for language models: installed libraries' docstrings, or files."""

import dataclasses
import random
import re
from pathlib import Path

from support.text_data import HELD_OUT_SHARE, docstrings, library_modules


@dataclasses.dataclass
class Corpus:
    """Texts of one kind.

    Attributes:
        name: str, what to call them.
        train, held_out: lists of str.
    """

    name: str
    train: list
    held_out: list


def docstring_corpus(libraries, seed: int = 0) -> Corpus:
    """The different docstrings of installed libraries, each in one line, in random order.

    Whole modules go to either side of the split, so that near-copies within a module do not leak.
    """
    rng = random.Random(seed)
    corpus = Corpus(f"docstrings of {' and '.join(libraries)}", [], [])
    seen = {""}
    for module in (module for library in libraries for module in library_modules(library)):
        side = corpus.held_out if rng.random() < HELD_OUT_SHARE else corpus.train
        texts = dict.fromkeys(text for text in docstrings(module) if text not in seen)
        seen.update(texts)
        side.extend(texts)
    rng.shuffle(corpus.train)
    rng.shuffle(corpus.held_out)
    return corpus


def read_text(path: str) -> str:
    """The text in a UTF-8 file."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a UTF-8 text file ({error.reason}).") from error


def file_corpus(texts: dict, tokenizer, length: int) -> Corpus:
    """Pieces of texts; the end of each text is held out.

    Args:
        texts: dict of names to texts.
        tokenizer: a KerasHub tokenizer.
        length: int, the most tokens in a piece.

    Raises:
        ValueError: if not one text is long enough to hold a piece out.
    """
    corpus = Corpus(", ".join(texts), [], [])
    for text in texts.values():
        found = pieces(text, tokenizer, length)
        kept = round((1 - HELD_OUT_SHARE) * len(found))
        corpus.train += found[:kept]
        corpus.held_out += found[kept:]
    if not corpus.held_out:
        raise ValueError(
            f"{corpus.name}: too little text to hold some out; one file must have 3 pieces of "
            f"{length} tokens. Received: {len(corpus.train)} pieces in all."
        )
    return corpus


def pieces(text: str, tokenizer, length: int) -> list:
    """Cuts a text between words into pieces of at most `length` tokens.

    Only a word that has more tokens than that makes a longer piece.
    """
    words = re.findall(r"\s*\S+", text)
    found, room = [], 0
    for word, tokens in zip(words, tokenizer(words) if words else []):
        if len(tokens) > room:
            found.append([])
            room = length
        found[-1].append(word)
        room -= len(tokens)
    return ["".join(piece) for piece in found]
