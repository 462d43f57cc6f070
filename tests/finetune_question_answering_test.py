import io
import json
import unicodedata

import keras
import keras_hub
import numpy as np
import pytest
from conftest import ROOT
from finetune_question_answering import main, make_model, model_inputs
from one_backend import only_on
from support.methods import default_preset
from support.question_answering import LONGEST_ANSWER, answers, make_windows, tokens_with_offsets
from support.squad_data import (
    Answer,
    Question,
    load_question_data,
    load_questions,
    score,
    split_by_article,
)

XQUAD = ROOT.parent / "shared" / "squad_format" / "xquad.en.json"
needs_xquad = pytest.mark.skipif(not XQUAD.is_file(), reason=f"XQuAD is not at {XQUAD}")

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "?", ".", ",", "-", "(", ")", "how"]
VOCABULARY += ["a", "film", "was", "it", "good", "bad", "very", "##s", "##ed", "大", "元", "straße"]
VOCABULARY += [f"w{i}" for i in range(10)] + [f"##{i}" for i in range(10)]


def bert_tokenizer():
    return keras_hub.models.BertTokenizer(vocabulary=VOCABULARY, lowercase=True)


def bert_preprocessor(length=24):
    return keras_hub.models.BertTextClassifierPreprocessor(bert_tokenizer(), sequence_length=length)


def bert_backbone():
    return keras_hub.models.BertBackbone(
        vocabulary_size=len(VOCABULARY),
        num_layers=1,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=32,
        max_sequence_length=24,
        dropout=0.0,
    )


def byte_pair_tokenizer():
    """RoBERTa's kind: pieces of bytes, the space before a word a part of it."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    merges = ["Ġ f", "i l", "Ġf il", "Ġfil m", "f il", "fil m", "g o", "o d", "Ġ go", ". Ċ", "Ã ©"]
    pieces = ["<s>", "<pad>", "</s>", "<mask>", *alphabet, *(m.replace(" ", "") for m in merges)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    return keras_hub.models.RobertaTokenizer(vocabulary=vocabulary, merges=merges)


def sentence_piece_tokenizer():
    sentencepiece = pytest.importorskip("sentencepiece")
    texts = ["a good film", "a bad film", "it was good", "how bad was it?", "good, very good."] * 9
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=proto,
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return keras_hub.tokenizers.SentencePieceTokenizer(proto=proto.getvalue())


def question(context, answer=None, text="how?", name="q", article=0):
    golds = [Answer(answer, context.index(answer))] if answer else []
    return Question(name, article, context, text, golds)


def perfect_logits(windows):
    """Logits by which every window that has the answer says so."""
    logits = np.zeros((*windows.labels.shape, windows.inputs["token_ids"].shape[1]))
    np.put_along_axis(logits, windows.labels[:, :, None], 1.0, axis=2)
    # What has no answer is less sure of that than the others of their answers.
    logits[:, :, 0] *= 0.9
    return logits[:, 0], logits[:, 1]


# --- the score ---


@pytest.mark.parametrize(
    ("prediction", "golds", "exact_match", "f1"),
    [
        ("cat", ["cat"], 1, 1),
        ("The Cat!", ["a  cat"], 1, 1),
        ("cat", ["dog", "the cat"], 1, 1),
        ("U.S.", ["us"], 1, 1),
        ("a-n cat", ["cat"], 1, 1),  # punctuation goes before articles
        ("theatre", ["atre"], 0, 0),
        ("cat—", ["cat"], 0, 0),  # only ASCII punctuation goes
        ("dog", ["cat"], 0, 0),
        ("", ["cat"], 0, 0),
        ("red cat", ["cat", "big red dog"], 0, 2 / 3),
        ("new new york", ["new york york"], 0, 2 / 3),
        ("the", ["The"], 1, 0),  # SQuAD 1.1 gives no F1 where no token is shared
    ],
)
def test_answers_are_scored_as_by_the_script_for_squad_1_1(prediction, golds, exact_match, f1):
    questions = [Question("q", 0, "", "", [Answer(gold, 0) for gold in golds])]
    scores = score({"q": prediction}, questions)
    assert scores == {"exact_match": 100 * exact_match, "f1": pytest.approx(100 * f1)}


@pytest.mark.parametrize(
    ("prediction", "golds", "exact_match", "f1"),
    [
        ("", [], 1, 1),
        ("cat", [], 0, 0),
        ("the", [], 1, 1),  # nothing is left of it
        ("", ["cat"], 0, 0),
        ("cat", ["The cat", "dog"], 1, 1),
        ("red cat", ["cat"], 0, 2 / 3),
        ("", ["the"], 1, 1),  # no gold answer is left
        ("the", ["an"], 1, 1),
        ("", ["the", "cat"], 0, 0),
    ],
)
def test_answers_are_scored_as_by_the_script_for_squad_2_0(prediction, golds, exact_match, f1):
    questions = [
        Question("q", 0, "", "", [Answer(gold, 0) for gold in golds]),
        Question("unanswerable", 0, "", "", []),
    ]
    scores = score({"q": prediction, "unanswerable": "wrong"}, questions)
    assert scores == {"exact_match": 50 * exact_match, "f1": pytest.approx(50 * f1)}


def test_the_score_is_the_mean_over_the_questions():
    questions = [Question(i, 0, "", "", [Answer("new york", 0)]) for i in "abcd"]
    predictions = {"a": "new york", "b": "new", "c": "boston", "d": "New York."}
    scores = score(predictions, questions)
    assert scores == {"exact_match": 50, "f1": pytest.approx(100 * (1 + 2 / 3 + 0 + 1) / 4)}


# --- tokens and where they are ---


def spans(tokenizer, text):
    ids, offsets = tokens_with_offsets(tokenizer, [text])[0]
    return [text[start:end] for start, end in offsets], [tokenizer.id_to_token(i) for i in ids]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A  Good\n\tfilm.\n", "A Good film ."),
        (" films, (goods)", "film s , ( good s )"),
        ("", ""),
        (" \n", ""),
        ("Éric, it", "Éric , it"),  # an unknown piece is the rest of the word
        ("(Éric-Éric) it", "(Éric-Éric) " * 5 + "it"),  # of two, each piece is the whole word
        ("(Éric).", "( Éric ) ."),
        ("E\u0301ric", "E\u0301ric"),
        ("大元 film", "大 元 film"),
        ("film\u00adgood a\u200b film", "film good a film"),
        ("STRASSE", "STRASSE"),
    ],
)
def test_word_pieces_know_their_characters(text, expected):
    found, _ = spans(bert_tokenizer(), text)
    assert found == expected.split()


@pytest.mark.parametrize("make_tokenizer", [byte_pair_tokenizer, sentence_piece_tokenizer])
def test_other_tokenizers_pieces_know_their_characters(make_tokenizer):
    text = "good  film.\n\na film was\t\tgood. \n very good"
    found, pieces = spans(make_tokenizer(), text)
    assert found == [piece.strip("▁ĠĊĉč") for piece in pieces]
    assert "".join(found) == "".join(text.split())
    assert max(map(len, found)) > 2


def test_a_character_of_several_byte_pieces_is_the_span_of_each():
    found, pieces = spans(byte_pair_tokenizer(), "é 大")
    assert pieces == ["Ã©", "Ġ", "å", "¤", "§"]
    assert found == ["é", "", "大", "大", "大"]


def test_a_tokenizer_that_looks_across_words_is_refused():
    class Reversed(keras_hub.models.BertTokenizer):
        def tokenize(self, inputs):
            return [ids[::-1] for ids in super().tokenize(inputs)]

    with pytest.raises(ValueError, match="Reversed tokenizes a text otherwise than its words"):
        tokens_with_offsets(Reversed(vocabulary=VOCABULARY), ["a good film"])


@pytest.fixture(scope="module")
def xquad():
    return load_questions(XQUAD)


@pytest.fixture(scope="module")
def minilm_preprocessor():
    return keras_hub.models.TextClassifierPreprocessor.from_preset(
        str(default_preset()), sequence_length=192
    )


@needs_xquad
def test_real_tokens_are_the_tokenizers_and_say_what_their_characters_say(
    xquad, minilm_preprocessor
):
    tokenizer = minilm_preprocessor.tokenizer
    contexts = list(dict.fromkeys(question.context for question in xquad))
    assert len(contexts) == 240
    count, otherwise = 0, []
    for context, (ids, offsets) in zip(contexts, tokens_with_offsets(tokenizer, contexts)):
        assert ids == np.asarray(tokenizer.tokenize(context)).tolist()
        assert (np.diff(offsets, axis=0) >= 0).all()
        for token_id, (start, end) in zip(ids, offsets):
            piece = tokenizer.id_to_token(token_id).removeprefix("##")
            span = unicodedata.normalize("NFKC", context[start:end]).casefold()
            count += 1
            if piece not in ("[UNK]", span):
                otherwise.append(context[start:end])
    assert count > 35_000
    # ½ becomes three pieces; and two characters of one word are unknown.
    assert set(otherwise) == {"½", "6½", "5½", "大元通制,", "樞密院)"}


@needs_xquad
def test_perfect_logits_give_all_real_answers_back(xquad, minilm_preprocessor):
    windows = make_windows(xquad, minilm_preprocessor, stride=64)
    predictions = answers(windows, *perfect_logits(windows))
    wrong = [q.id for q in xquad if predictions[q.id] != q.answers[0].text]
    # Its answer is "7,000,000 square kilometres (2,70", half of the number 2,700.
    assert wrong == ["5729e2316aef0514001550c5"]


# --- windows ---


def test_windows_overlap_by_the_stride_and_cover_the_context():
    context = " ".join(f"w{i % 10}" for i in range(50))
    windows = make_windows([question(context, "w0")], bert_preprocessor(24), stride=5)
    room, position = 24 - 3 - 2, 0
    ids, _ = tokens_with_offsets(bert_tokenizer(), [context])[0]
    for row in windows.rows:
        assert row.context_ids == ids[position : position + room]
        np.testing.assert_array_equal(
            row.offsets[:, 0] // 3, position + np.arange(len(row.context_ids))
        )
        position += room - 5
    assert len(windows.rows) == 4
    assert len(windows.rows[-1].context_ids) > 5  # otherwise the window before had them all
    assert windows.rows[-1].offsets[-1, 1] == len(context)


@pytest.mark.parametrize("number", range(40))
def test_an_answer_anywhere_is_found_back(number):
    words = [f"w{i % 10}" for i in range(40)]
    context = " ".join(words)
    text = " ".join(words[number : number + 3])
    asked = Question("q", 0, context, "how?", [Answer(text, 3 * number)])
    windows = make_windows([asked], bert_preprocessor(24), stride=5)
    assert windows.labels.any()
    assert answers(windows, *perfect_logits(windows)) == {"q": text}
    for row, (first, last) in zip(windows.rows, windows.labels):
        if last:
            positions = np.array([first, last]) - row.context_start
            assert tuple(row.offsets[positions, [0, 1]]) == (3 * number, 3 * number + len(text))


def test_an_answer_that_is_only_in_part_in_a_window_is_labelled_as_none():
    context = " ".join(["w0"] * 17 + ["good", "bad", "film"] + ["w1"] * 10)
    windows = make_windows([question(context, "good bad film")], bert_preprocessor(24), stride=5)
    assert windows.labels.tolist() == [[0, 0], [7, 9]]


def test_a_long_question_leaves_half_of_the_room_to_the_context():
    asked = question("it was good", "good", text="how " * 100)
    windows = make_windows([asked], bert_preprocessor(23), stride=5)
    assert len(windows.rows[0].question_ids) == 10
    assert answers(windows, *perfect_logits(windows)) == {"q": "good"}


def test_a_stride_as_long_as_the_room_is_refused():
    with pytest.raises(ValueError, match=r"--stride must be less than 10, .* of 23 tokens"):
        make_windows([question("it was good", "good")], bert_preprocessor(23), stride=10)


def test_windows_are_packed_as_the_preprocessor_packs():
    roberta = keras_hub.models.RobertaTextClassifierPreprocessor(
        byte_pair_tokenizer(), sequence_length=24
    )
    for preprocessor in (bert_preprocessor(24), roberta):
        asked = [question("a good film", "good"), question("it", "it", text="a?", name="r")]
        windows = make_windows(asked, preprocessor, stride=4)
        expected = preprocessor.call((["how?", "a?"], ["a good film", "it"]))
        assert {"token_ids", "padding_mask"} <= set(expected)
        for name, array in expected.items():
            array = keras.ops.convert_to_numpy(array)
            np.testing.assert_array_equal(windows.inputs[name], array.astype("int32"))


def test_an_empty_context_has_the_empty_answer():
    windows = make_windows([question("")], bert_preprocessor(), stride=4)
    assert answers(windows, *perfect_logits(windows)) == {"q": ""}


# --- answers ---


def one_window(context="w0 w1 w2 w3 w4"):
    """A window whose context begins at position 4, and empty logits for it."""
    windows = make_windows([question(context, "w0")], bert_preprocessor(24), stride=5)
    return windows, np.zeros((1, 24)), np.zeros((1, 24))


def test_the_best_span_does_not_end_before_it_starts():
    windows, start, end = one_window()
    start[0, 7], end[0, 5] = 5, 4
    assert answers(windows, start, end) == {"q": "w3"}
    start[0, 4] = 2
    assert answers(windows, start, end) == {"q": "w0 w1"}


def test_only_tokens_of_the_context_are_answers():
    windows, start, end = one_window()
    start[0, [0, 1, 2, 3, 9, 10]] = end[0, [0, 1, 2, 3, 9, 10]] = 100
    start[0, 5] = end[0, 6] = 1
    assert answers(windows, start, end) == {"q": "w1 w2"}


def test_an_answer_has_at_most_thirty_tokens():
    context = " ".join(f"w{i % 10}" for i in range(50))
    windows = make_windows([question(context, "w0")], bert_preprocessor(60), stride=5)
    start, end = np.zeros((2, 1, 60))
    start[0, 4] = 5
    end[0, 4 + LONGEST_ANSWER - 1] = 1
    end[0, 4 + LONGEST_ANSWER] = 2
    assert answers(windows, start, end) == {"q": context[: 3 * LONGEST_ANSWER - 1]}


def test_the_best_answer_is_taken_over_all_windows():
    context = " ".join(f"w{i % 10}" for i in range(40))
    asked = [question(context, "w0", name="a"), question("it was good", "good", name="b")]
    windows = make_windows(asked, bert_preprocessor(24), stride=5)
    start, end = np.zeros((2, len(windows.rows), 24))
    start[0, 4] = end[0, 4] = 1
    start[1, 6] = end[1, 6] = 2
    start[-1, 6] = end[-1, 6] = 1
    assert answers(windows, start, end) == {"a": "w6", "b": "good"}


def test_no_answer_competes_in_the_window_that_is_least_for_it():
    context = " ".join(f"w{i % 10}" for i in range(40))
    windows = make_windows([question(context, "w0")], bert_preprocessor(24), stride=5)
    start, end = np.zeros((2, len(windows.rows), 24))
    start[1, 4] = end[1, 4] = 1
    start[:, 0] = end[:, 0] = 2
    assert answers(windows, start, end, may_be_empty=True) == {"q": ""}
    assert answers(windows, start, end) == {"q": "w4"}
    start[0, 0] = end[0, 0] = 0.5
    assert answers(windows, start, end, may_be_empty=True) == {"q": "w4"}


# --- files ---


def squad(questions, version="v2.0"):
    """A dict in SQuAD's format, a paragraph for each question and an article for each number."""
    articles = {}
    for asked in questions:
        record = {"id": asked.id, "question": asked.text}
        record["answers"] = [{"text": a.text, "answer_start": a.start} for a in asked.answers]
        if version == "v2.0":
            record["is_impossible"] = not asked.answers
        paragraph = {"context": asked.context, "qas": [record]}
        articles.setdefault(asked.article, []).append(paragraph)
    data = [{"title": str(number), "paragraphs": p} for number, p in articles.items()]
    return {"version": version, "data": data}


def write(path, data):
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize("version", ["v1.1", "v2.0"])
def test_a_file_is_read_as_it_was_written(version, tmp_path):
    asked = [question("a good film", "good"), question("É bad film", "bad", name="r", article=1)]
    asked[0].answers.append(Answer("good film", 2))
    if version == "v2.0":
        asked.append(question("a film", name="s", article=1))
    assert load_questions(write(tmp_path / "data.json", squad(asked, version))) == asked


@needs_xquad
def test_xquad_is_split_by_article(xquad):
    assert len(xquad) == 1190
    train, held_out = split_by_article(xquad, 0.2)
    assert len({q.article for q in held_out}) == 10
    assert {q.article for q in train} | {q.article for q in held_out} == set(range(48))
    assert len(train) + len(held_out) == 1190
    assert not {q.article for q in train} & {q.article for q in held_out}
    assert split_by_article(xquad, 0.2) == (train, held_out)
    assert split_by_article(xquad, 0.2, seed=1) != (train, held_out)


def test_a_held_out_file_and_a_train_size(tmp_path):
    asked = [question("a good film", "good", name=str(i)) for i in range(9)]
    train_file = write(tmp_path / "train.json", squad(asked))
    held_out_file = write(tmp_path / "held_out.json", squad(asked[:2]))
    train, held_out = load_question_data(
        str(train_file), held_out_file=held_out_file, train_size=5, seed=1
    )
    assert held_out == asked[:2]
    assert len({q.id for q in train}) == 5
    again, _ = load_question_data(str(train_file), held_out_file=held_out_file, seed=1)
    assert again[:5] == train


def broken(**changes):
    """A file whose only question is changed."""
    data = squad([question("a good film", "good", name="q7")])
    record = data["data"][0]["paragraphs"][0]["qas"][0]
    record.update(changes)
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "not in SQuAD's format, `data` must be a list. Found: None"),
        ({"data": {}}, "not in SQuAD's format, `data` must be a list. Found: {}"),
        ({"data": [3]}, "article 0: not in SQuAD's format, `paragraphs` must be a list"),
        ({"data": [{"paragraphs": [{}]}]}, "article 0: not in SQuAD's format, `context` must"),
        ({"data": []}, "none of its 0 questions has an answer"),
        (broken(id=7), "article 0: not in SQuAD's format, `id` must be a str. Found: 7"),
        (broken(question=None), "question q7: not in SQuAD's format, `question` must be a str"),
        (broken(answers="good"), "question q7: not in SQuAD's format, `answers` must be a list"),
        (broken(answers=[{"text": "good"}]), "question q7: .* `answer_start` must be a int"),
        (
            broken(answers=[{"text": "good", "answer_start": 3}]),
            "question q7: the context does not say 'good' at `answer_start`. Received: 3",
        ),
        (broken(answers=[{"text": "film", "answer_start": -4}]), "question q7: the context does"),
        (broken(is_impossible=True), "question q7: has answers, and `is_impossible` says"),
        (broken(answers=[]), "none of its 1 questions has an answer"),
        (squad([question("a good film", "good")] * 2), "several questions have the id q"),
    ],
)
def test_badly_formed_files_are_explained_in_one_line(data, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        load_questions(write(tmp_path / "data.json", data))
    assert str(error.value).startswith(str(tmp_path / "data.json"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00", b""])
def test_what_is_not_json_is_explained_in_one_line(content, tmp_path):
    (tmp_path / "data.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"data.json: not a JSON file in UTF-8 \(.*\)\.$"):
        load_questions(tmp_path / "data.json")


def test_tensorflow_datasets_are_read(tmp_path, monkeypatch, run_python):
    import tensorflow_datasets as tfds

    asked = [question(" a good film", "good"), question("É film", name="r", article=1)]
    path = write(tmp_path / "data.json", squad(asked))
    monkeypatch.setattr(
        tfds.download.DownloadManager,
        "download_and_extract",
        lambda self, urls: dict.fromkeys(urls, path),
    )
    tfds.builder("squad/v2.0", data_dir=tmp_path).download_and_prepare()
    for side in load_question_data("squad/v2.0", tmp_path):
        assert {q.id: (q.context, q.text, q.answers) for q in side} == {
            q.id: (q.context, q.text, q.answers) for q in asked
        }


# --- the program ---


@pytest.fixture(scope="module")
def tiny_preset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preset")
    keras.utils.set_random_seed(0)
    bert_backbone().save_to_preset(folder)
    bert_preprocessor().save_to_preset(folder)
    return folder


@pytest.fixture
def films(tmp_path, rng):
    """Questions that a tiny model can learn, a third of them without an answer."""
    asked = []
    for i in range(120):
        words = [f"w{n}" for n in rng.integers(0, 10, 8)]
        answer = (None, "good", "bad")[i % 3]
        if answer:
            words[rng.integers(8)] = answer
        asked.append(question(" ".join(words), answer, name=str(i), article=i // 12))
    return write(tmp_path / "films.json", squad(asked))


@pytest.mark.compiled  # many steps: quicker
@pytest.mark.parametrize(
    "method",
    [
        "dcft",
        pytest.param("lora", marks=only_on("tensorflow")),
        pytest.param("head", marks=only_on("torch")),
        pytest.param("full", marks=only_on("torch")),
    ],
)
def test_a_tiny_model_is_trained_saved_and_reloaded(method, films, tiny_preset, tmp_path, capsys):
    main(
        f"--preset {tiny_preset} --dataset {films} --method {method} --kernel-size 4 --epochs 4 "
        f"--sequence-length 24 --stride 4 --batch-size 8 --learning-rate 0.1 "
        f"--output-dir {tmp_path}".split()
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["train_questions"] == 96
    assert results["held_out_questions"] == 24
    # Keras merges its LoRA into the kernels when it saves, which rounds.
    assert results["reload_difference"] <= (1e-4 if method == "lora" else 0)
    for measure in ("exact_match", "f1"):
        assert results[f"{measure}_after"] > results[f"{measure}_before"] + 30
    if method == "head":
        assert results["trainable_parameters"] == 2 * 16 + 2
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for line in (
        "Data: ",
        f"Method {method}",
        "exact match",
        "Training time",
        "predictions differ",
    ):
        assert line in printed
    assert printed.count("Question  ") == printed.count("  predicted  ") == 3


def test_padding_is_masked_and_a_backbone_without_segments_works():
    backbone = keras_hub.models.RobertaBackbone(
        vocabulary_size=300,
        num_layers=1,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=32,
        max_sequence_length=24,
    )
    preprocessor = keras_hub.models.RobertaTextClassifierPreprocessor(
        byte_pair_tokenizer(), sequence_length=24
    )
    windows = make_windows([question("a good film", "good")], preprocessor, stride=4)
    model = make_model(backbone)
    logits = model.predict(model_inputs(model, windows), verbose=0)
    assert logits.shape == (1, 2, 24)
    padding = windows.inputs["padding_mask"][0] == 0
    assert padding.any()
    assert (logits[0][:, padding] < -1e8).all()
    assert (np.abs(logits[0][:, ~padding]) < 1e3).all()


def test_a_backbone_of_another_kind_is_refused():
    encoder_decoder = keras_hub.models.BartBackbone(
        vocabulary_size=10, num_layers=1, num_heads=2, hidden_dim=4, intermediate_dim=4
    )
    with pytest.raises(ValueError, match=r"Received: BartBackbone with .*encoder_token_ids"):
        make_model(encoder_decoder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stride", "0"], "argument --stride: must be at least 1. Received: 0"),
        (["--dataset", "nothing.json"], "No such file or directory: 'nothing.json'"),
        (["--dataset", "squad", "--data-dir", "/nowhere"], "--data-dir has no folder squad/v1.1"),
        (["--sequence-length", "25"], "--sequence-length must be at most 24 with this preset"),
        (["--sequence-length", "24", "--stride", "20"], "--stride must be less than 11"),
        (["--held-out-file", "none.json"], "No such file or directory: 'none.json'"),
    ],
)
def test_bad_options_give_one_line_and_an_exit_code(
    arguments, message, films, tiny_preset, tmp_path, capsys
):
    defaults = ["--dataset", str(films), "--preset", str(tiny_preset), "--output-dir", tmp_path]
    with pytest.raises(SystemExit) as error:
        main([*map(str, defaults), *arguments])
    # Either a message, which Python prints, or a status after the parser has printed one.
    line = str(error.value.code) if error.value.code != 2 else capsys.readouterr().err.strip()
    assert line.startswith("error: ")
    assert message in line
    assert "\n" not in line


def test_a_file_with_one_article_needs_a_held_out_file(tmp_path):
    path = write(tmp_path / "data.json", squad([question("a good film", "good")]))
    with pytest.raises(ValueError, match="--held-out-file is needed"):
        load_question_data(str(path))


@needs_xquad
@pytest.mark.real
@only_on("torch")
def test_the_main_job_on_real_questions(tmp_path):
    data = json.loads(XQUAD.read_text())
    train = write(tmp_path / "train.json", {"data": data["data"][:2]})
    paragraphs = data["data"][2]["paragraphs"][:2]
    held_out = write(tmp_path / "held_out.json", {"data": [{"paragraphs": paragraphs}]})
    main(
        f"--dataset {train} --held-out-file {held_out} --epochs 1 --train-size 8 --batch-size 8 "
        f"--sequence-length 96 --stride 24 --output-dir {tmp_path}".split()
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["backend"] == keras.backend.backend()
    assert results["train_questions"] == 8
    assert results["trainable_parameters"] == 7648 + 770
    assert results["reload_difference"] == 0
