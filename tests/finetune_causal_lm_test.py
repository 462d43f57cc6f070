import dataclasses
import functools
import json
import re
from pathlib import Path

import finetune_causal_lm
import keras
import numpy as np
import pytest
from finetune_causal_lm import (
    compile_model,
    load_base,
    main,
    measurements,
    parse_options,
    pretrained_preset,
    run,
    write,
)
from one_backend import only_on
from support import corpora
from support.corpora import docstring_corpus, file_corpus, pieces
from support.small_gpt2 import byte_pair_tokenizer
from support.text_data import library_modules
from tools import array, bert_classifier

from keras_dcft import dcft_disabled, enable_dcft

# Where TensorFlow runs functions eagerly, KerasHub's byte-pair tokenizer fails in `fit`. On JAX
# language models are trained and generated with in causal_lm_test.py.
pytestmark = [pytest.mark.compiled, only_on("torch", "tensorflow")]

TINY = {"vocabulary_size": 400, "num_layers": 1, "num_heads": 2, "hidden_dim": 32}
OLD_TEXTS = ["A film about a dog.", "A short film.", "A dog and a film about it."] * 8
NEW_TEXT = "one two three four five six seven eight nine ten\n" * 240
QUICK = [
    "--kernel-size", "4", "--learning-rate", "0.02", "--epochs", "1", "--batch-size", "8",
    "--sequence-length", "16", "--max-length", "10", "--prompt", "one two",
]  # fmt: skip


def few_modules(library):
    return library_modules(library)[:: {"tensorflow": 30, "matplotlib": 20, "numpy": 4}[library]]


@functools.cache
def few_texts(libraries, seed=0):
    corpus = docstring_corpus(libraries, seed)
    return dataclasses.replace(corpus, train=corpus.train[:240], held_out=corpus.held_out[:24])


@pytest.fixture(scope="module", autouse=True)
def _little_text():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(corpora, "library_modules", few_modules)
        monkeypatch.setattr(finetune_causal_lm, "docstring_corpus", few_texts)
        monkeypatch.setattr(finetune_causal_lm, "TIMED_ROUNDS", 1)
        yield


@pytest.fixture(scope="module")
def folder(_little_text, text_file, tmp_path_factory):
    """What a run without a preset leaves."""
    folder = tmp_path_factory.mktemp("causal_lm")
    run(parse_options([*QUICK, "--text-file", text_file, "--output-dir", str(folder)]), **TINY)
    return folder


@pytest.fixture(scope="module")
def preset(folder):
    return str(folder / "base")


@pytest.fixture(scope="module")
def bert_preset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    bert_classifier().save_to_preset(folder)
    return folder


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "numbers.txt"
    path.write_text(NEW_TEXT)
    return str(path)


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def test_the_tokenizer_writes_any_text_back():
    tokenizer = byte_pair_tokenizer(OLD_TEXTS, 300)
    texts = [OLD_TEXTS[0], "def f(x):\n\treturn  x\n", "naïve 日本 🙂"]
    assert tokenizer.detokenize(tokenizer(texts)) == texts
    assert len(tokenizer(" film")) == 1
    assert tokenizer.vocabulary_size() <= 300
    assert tokenizer.end_token_id != tokenizer.pad_token_id


def test_pieces_are_the_text_cut_between_words():
    tokenizer = byte_pair_tokenizer(OLD_TEXTS, 300)
    text = "  A film,\n\nabout a dog and\tanother film " * 5
    found = pieces(text, tokenizer, 12)
    assert len(found) > 5
    assert "".join(found) == text.rstrip()
    assert all(len(tokens) <= 12 for tokens in tokenizer(found))
    assert all(re.match(r"\s", piece) for piece in found)
    assert pieces(" \n", tokenizer, 12) == []
    assert pieces("a unbelievable a", tokenizer, 3) == ["a", " unbelievable", " a"]


def test_the_end_of_each_file_is_held_out():
    tokenizer = byte_pair_tokenizer(OLD_TEXTS, 300)
    corpus = file_corpus({"a": " a" * 50, "b": " film" * 50, "c": " dog"}, tokenizer, 5)
    assert corpus.name == "a, b, c"
    assert corpus.train == [" a" * 5] * 8 + [" film" * 5] * 8 + [" dog"]
    assert corpus.held_out == [" a" * 5] * 2 + [" film" * 5] * 2


@only_on("torch")
def test_docstrings_are_distinct_and_split_by_module():
    corpus = docstring_corpus(["numpy", "matplotlib"])
    assert corpus.name == "docstrings of numpy and matplotlib"
    assert len(corpus.train) > len(corpus.held_out) > 0
    everything = corpus.train + corpus.held_out
    assert len(set(everything)) == len(everything)
    assert "" not in everything
    assert docstring_corpus(["numpy", "matplotlib"]) == corpus
    assert docstring_corpus(["numpy", "matplotlib"], seed=1) != corpus


def test_without_a_preset_it_makes_one_and_learns_the_new_text(folder):
    results = results_of(folder)
    assert results["backend"] == keras.backend.backend()
    base, tuned = (results["measured"][name] for name in ("base", "dcft"))
    assert base["perplexity"]["old"] < 0.7 * TINY["vocabulary_size"]
    assert tuned["perplexity"]["new"] < 0.9 * base["perplexity"]["new"]
    assert tuned["texts"] != base["texts"]
    assert tuned["texts"][0].startswith("one two")
    attention, feedforward = 4 * (8 + 8 + 4**2), 2 * (8 + 32 + 4**2)
    assert results["trainable_parameters"] == attention + feedforward
    assert set(results["tokens_per_second"]) == {"dcft", "merged"}


@only_on("torch")
def test_it_pretrains_for_as_long_as_asked(tmp_path, capsys):
    options = parse_options([*QUICK, "--pretraining-epochs", "3"])
    pretrained_preset(tmp_path, few_texts(finetune_causal_lm.OLD_LIBRARIES), options, TINY)
    printed = capsys.readouterr().out
    assert ", for 3 epochs." in printed
    assert "Epoch 3/3" in printed


def test_what_is_written_gives_the_same_model_again(folder):
    measured = results_of(folder)["measured"]
    for name in ("reloaded", "adapter file"):
        assert measured[name]["perplexity"] == pytest.approx(measured["dcft"]["perplexity"])
        assert measured[name]["texts"] == measured["dcft"]["texts"]
    assert measured["merged"]["perplexity"] == pytest.approx(
        measured["dcft"]["perplexity"], rel=1e-4
    )
    assert (folder / "adapter.dcft.safetensors").stat().st_size < 20_000


def test_with_the_adapters_switched_off_it_is_the_base(folder):
    measured = results_of(folder)["measured"]
    assert measured["switched off"]["perplexity"] == pytest.approx(measured["base"]["perplexity"])
    assert measured["switched off"]["texts"] == measured["base"]["texts"]


@only_on("torch")
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_preset_is_fine_tuned_on_files_in_other_ways(method, preset, text_file, tmp_path, capsys):
    arguments = [
        "--text-file",
        text_file,
        "--method",
        method,
        "--output-dir",
        str(tmp_path),
    ]
    main([*QUICK, "--preset", preset, *arguments])
    results = results_of(tmp_path)
    measured = results["measured"]
    assert results["new_text"] == text_file
    assert measured[method]["perplexity"]["new"] < 0.9 * measured["base"]["perplexity"]["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.keras", "results.json"]
    printed = capsys.readouterr().out
    for text in ("Pre-training", "switched off", "merged"):
        assert text not in printed
    for text in ("Held-out perplexity", "before  'one two", "after   'one two", "model.keras"):
        assert text in printed


def test_padding_is_no_part_of_the_perplexity(preset):
    model = load_base(preset, parse_options([*QUICK, "--max-length", "12"]))
    held_out = {"short": ["A dog.", "A film.", "A short film."]}
    options = parse_options(QUICK)
    padded = measurements(model, held_out, options)
    model.preprocessor.sequence_length = 12
    less_padded = measurements(model, held_out, options)
    assert less_padded["perplexity"] == pytest.approx(padded["perplexity"])

    inputs, labels, weights = model.preprocessor(held_out["short"])
    logits = model(inputs)
    losses = keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)
    weights = np.array(weights, "float32")
    assert 0 < weights.mean() < 1
    mean = (array(losses) * weights).sum() / weights.sum()
    assert padded["perplexity"]["short"] == pytest.approx(np.exp(mean), rel=1e-4)


@only_on("torch")
def test_generate_follows_what_fit_changes(preset):
    """The compiled function that `generate` keeps must read the adapters anew."""
    options = parse_options(QUICK)
    model = load_base(preset, options)
    base = write(model, options)
    enable_dcft(model, kernel_size=4)
    assert write(model, options) == base
    compile_model(model, learning_rate=0.05)
    assert write(model, options) == base
    model.fit(OLD_TEXTS * 4, batch_size=4, verbose=0)
    tuned = write(model, options)
    assert tuned != base
    with dcft_disabled(model):
        assert write(model, options) == base
    compile_model(model)
    assert write(model, options) == tuned


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--method", "head"], "argument --method: invalid choice: 'head'"),
        (["--rank", "0"], "argument --rank: must be at least 1. Received: 0"),
        (["--max-length", "17"], "argument --max-length: must be at most --sequence-length, 16"),
        (["--text-file", "/nowhere.txt"], "No such file or directory: '/nowhere.txt'"),
        (["--text-file", "/"], "Is a directory: '/'"),
        (["--text-file", "binary"], "binary: not a UTF-8 text file (invalid start byte)."),
        (["--text-file", "short"], "short: too little text to hold some out"),
        (["--preset", "/nowhere"], "--preset /nowhere: Unknown preset identifier"),
        (["--preset", "bert"], "Unable to find a subclass of CausalLM"),
        (["--sequence-length", "17"], "reads at most 16 tokens. Received: 17"),
        (["--prompt", "A", "a " * 20], "--prompt: must have fewer tokens than --max-length, 10"),
        (["--kernel-size", "1000"], "`kernel_size` must not be larger"),
        (["--output-dir", "/dev/null"], "File exists: '/dev/null'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    changed, message, preset, bert_preset, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("binary").write_bytes(b"\xff\xfe\x00")
    Path("short").write_text("Two words.")
    Path("bert").symlink_to(bert_preset)
    with pytest.raises(SystemExit) as stop:
        main([*QUICK, "--preset", preset, *changed])
    said = capsys.readouterr().err.strip() if stop.value.code == 2 else stop.value.code
    assert said.startswith("error: ")
    assert message in said
    assert len(said.splitlines()) == 1
