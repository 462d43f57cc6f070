"""Model cards beside adapter files and in presets."""

import re

import keras_hub
import numpy as np
import pytest
from one_backend import only_on
from tools import (
    TEXTS,
    backbone_inputs,
    bert_backbone,
    bert_classifier,
    predict,
    randomize_adapters,
    sequential,
)

from keras_dcft import (
    enable_dcft,
    merge_dcft,
    remove_dcft,
    save_dcft_weights,
    write_model_card,
)

pytestmark = only_on("torch")  # text, in which no backend has a part


def adapted_classifier(**arguments):
    model = enable_dcft(bert_classifier(), **{"kernel_size": 4, **arguments})
    randomize_adapters(model)
    return model


def saved(folder, name="mine.dcft.safetensors", model=None):
    model = model or enable_dcft(sequential(), kernel_size=4)
    save_dcft_weights(model, folder / name)
    return folder / name, model


def rows(text) -> dict:
    """The cells of a card's tables by what stands in front of them."""
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {first: rest for first, *rest in cells}


def code(text) -> str:
    return re.search(r"```python\n(.*?)```", text, re.S)[1]


def test_a_card_says_what_an_adapter_is(tmp_path):
    model = adapted_classifier(kernel_size={"query|value": 2, ".*": 4}, rank=2, dropout=0.1)
    path, _ = saved(tmp_path, model=model)
    metrics = {"accuracy": np.float64(0.9123456789), "a|b": "two\nlines", "sentences": 872}
    card = write_model_card(
        model, path, base="keras/bert_tiny_en_uncased", metrics=metrics, data="SST-2, 8,000 of it."
    )
    assert card == tmp_path / "README.md"
    text = card.read_text()
    assert "[DCFT](https://arxiv.org/abs/2503.01419)" in text
    sizes = [(v.name, int(np.prod(v.shape))) for v in model.trainable_variables]
    trained, total = sum(size for _, size in sizes), model.count_params()
    adapters = sum(size for name, size in sizes if name.startswith("dcft_"))
    share = 100 * trained / (total - adapters)
    expected = {
        "rank": ["2"],
        "alpha": ["16.0"],
        "dropout": ["0.1"],
        "kernel size": ["2 (4 layers), 4 (9 layers)"],
        "trained in full": ["logits"],
        "numbers in adapters": [f"{adapters:,}"],
        "numbers trained in full": ["34"],
        "trainable in all": [f"{trained:,}, {share:.3g} % of the model's {total - adapters:,}"],
        "accuracy": ["0.912346"],
        r"a\|b": ["two lines"],
        "sentences": ["872"],
    }
    found = rows(text)
    assert {name: found[name] for name in expected} == expected
    assert "\n\nSST-2, 8,000 of it.\n\n" in text
    assert "https://huggingface.co/keras/bert_tiny_en_uncased" in text


def test_the_code_in_a_card_loads_the_file(tmp_path, monkeypatch):
    path, model = saved(tmp_path, model=adapted_classifier())
    program = code(write_model_card(model, path).read_text())
    assert "BertTextClassifier as it was" in program
    expected = predict(model, TEXTS)
    monkeypatch.chdir(tmp_path)
    scope = {"plain": remove_dcft(model)}
    assert np.abs(predict(model, TEXTS) - expected).max() > 0
    exec(program.replace("model = ...", "model = plain"), scope)
    np.testing.assert_array_equal(predict(scope["model"], TEXTS), expected)


def test_the_hub_reads_the_front_matter(tmp_path):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    path, model = saved(tmp_path)

    def front(**arguments):
        data = huggingface_hub.ModelCard.load(write_model_card(model, path, **arguments)).data
        return data.to_dict()

    usual = {"library_name": "keras_dcft", "tags": ["dcft", "keras"]}
    assert front() == usual
    assert front(base="bert_base_en") == usual  # no name on the hub
    on_the_hub = {**usual, "base_model": "google-bert/bert-base-uncased"}
    on_the_hub["base_model_relation"] = "adapter"
    assert front(base="hf://google-bert/bert-base-uncased") == on_the_hub
    assert front() == on_the_hub
    card = tmp_path / "README.md"
    theirs = "---\nlicense: mit\ntags:\n- mine\nbase_model:\n- a/b\n- c/d\n---\n\n# Mine\n"
    card.write_text(theirs)
    assert front() == {
        "license": "mit",
        "tags": ["mine"],
        "base_model": ["a/b", "c/d"],
        "library_name": "keras_dcft",
    }
    found = front(base="e/f")
    assert (found["base_model"], found["license"], found["tags"]) == ("e/f", "mit", ["mine"])


def test_a_second_call_replaces_the_section_alone(tmp_path):
    path, model = saved(tmp_path)
    card = tmp_path / "README.md"
    card.write_bytes(b"---\r\nlicense: mit\r\n---\r\n# Mine\r\n\r\nBefore.\r\n")
    write_model_card(model, path, metrics="first")
    content = card.read_bytes()
    assert content.count(b"# Mine\r\n\r\nBefore.") == 1
    card.write_bytes(content + "After, ä.\r\n".encode())
    before = card.read_bytes().decode()
    assert "first" in before
    write_model_card(model, path, metrics="second")
    assert card.read_bytes().decode() == before.replace("first", "second")
    write_model_card(model, path, metrics="first")
    assert card.read_bytes().decode() == before


def test_each_file_of_a_folder_has_its_section(tmp_path):
    first, model = saved(tmp_path, "first.dcft.safetensors")
    second, _ = saved(tmp_path, "with space--> .dcft.safetensors", model)
    for path in (first, second, first):
        card = write_model_card(model, path, metrics={"file": path.name})
    text = card.read_text()
    assert text.count("## Adapter") == 2
    assert text.count("| file | first.dcft.safetensors |") == 1
    assert text.count("library_name") == 1
    # What is passed in cannot end a section.
    (comment,) = re.findall("<!-- end keras_dcft: first.*-->", text)
    write_model_card(model, first, data=comment)
    write_model_card(model, first)
    assert card.read_text().count("## Adapter") == 2
    assert card.read_text().count("end keras_dcft") == 2


def test_one_of_several_adapters_is_named(tmp_path):
    model = adapted_classifier()
    enable_dcft(model, kernel_size=2, rank=3, name="legal")
    save_dcft_weights(model, tmp_path / "legal.dcft.safetensors", name="legal")
    with pytest.raises(ValueError, match=r"one of the adapters .* 'default', 'legal'.*name=None"):
        write_model_card(model, tmp_path / "legal.dcft.safetensors")
    card = write_model_card(model, tmp_path / "legal.dcft.safetensors", name="legal")
    assert rows(card.read_text())["rank"] == ["3"]
    model.save_to_preset(str(tmp_path / "preset"))
    text = (tmp_path / "preset" / "README.md").read_text()
    assert "|  | `default` | `legal` |" in text
    assert rows(text)["rank"] == ["1", "3"]
    # Nine weights of 16 x 16, and four of 16 x 36.
    of_legal = 9 * (3 * (8 + 8) + 4) + 4 * (3 * (8 + 18) + 4)
    assert rows(text)["numbers in adapters"] == ["332", str(of_legal)]


def test_a_card_tells_of_the_file_whatever_the_model_is_now(tmp_path):
    path, model = saved(tmp_path, model=adapted_classifier())
    before = write_model_card(model, path).read_text()
    model.trainable = False
    assert write_model_card(model, path).read_text() == before
    model.save_to_preset(str(tmp_path / "preset"))
    of_preset = rows((tmp_path / "preset" / "README.md").read_text())
    assert of_preset["trainable in all"] == rows(before)["trainable in all"]

    enable_dcft(model, kernel_size=2, name="legal")
    with pytest.raises(ValueError, match="other settings"):
        write_model_card(model, path, name="legal")
    with pytest.raises(ValueError, match="must end with"):
        write_model_card(model, tmp_path / "README.md", name="default")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="damaged"):
        write_model_card(model, path, name="default")
    assert (tmp_path / "README.md").read_text() == before


def test_a_folder_is_no_model_of_the_hub(tmp_path, monkeypatch):
    path, model = saved(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "bert").mkdir(parents=True)
    text = write_model_card(model, path, base="models/bert").read_text()
    assert "Base: models/bert\n" in text
    assert "base_model" not in text


def test_a_byte_order_mark_does_not_hide_the_front_matter(tmp_path):
    path, model = saved(tmp_path)
    (tmp_path / "README.md").write_bytes(b"\xef\xbb\xbf---\nlicense: mit\n---\n\n# Mine\n")
    text = write_model_card(model, path).read_text()
    assert text.startswith("---\nlicense: mit\n")
    assert text.count("---\n") == 2


def test_a_preset_in_the_present_folder_has_its_name(tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    folder.mkdir()
    monkeypatch.chdir(folder)
    adapted_classifier().save_to_preset(".")
    assert '.from_preset("mine")' in (folder / "README.md").read_text()


def test_what_cannot_be_a_card_is_refused_and_changes_nothing(tmp_path):
    path, model = saved(tmp_path)
    with pytest.raises(FileNotFoundError, match="save_dcft_weights"):
        write_model_card(model, tmp_path / "none.dcft.safetensors")
    with pytest.raises(ValueError, match="Call `enable_dcft"):
        write_model_card(sequential(), path)
    for argument, value in (("metrics", 0.9), ("data", ["sst2"]), ("base", 3)):
        with pytest.raises(TypeError, match=f"`{argument}` must be .* Received: {argument}="):
            write_model_card(model, path, **{argument: value})
    card = tmp_path / "README.md"
    assert not card.exists()
    write_model_card(model, path)
    whole = card.read_text()
    for comment in re.findall(r"<!-- .* -->", whole):
        card.write_text(whole.replace(comment, ""))
        with pytest.raises(ValueError, match=r"README\.md: take the rest"):
            write_model_card(model, path, metrics="more")
        assert card.read_text() == whole.replace(comment, "")


# --- presets ---


@pytest.mark.parametrize("kind", ["task", "backbone", "task of an adapted backbone"])
def test_a_preset_has_a_card_and_is_loaded_by_its_code(kind, tmp_path, monkeypatch):
    folder = tmp_path / "preset"
    model = bert_backbone() if kind == "backbone" else bert_classifier()
    enable_dcft(model if kind != "task of an adapted backbone" else model.backbone, kernel_size=4)
    randomize_adapters(model)
    inputs = backbone_inputs() if kind == "backbone" else TEXTS
    options = {"base": "keras/bert_base_en", "metrics": {"accuracy": 0.75}, "data": {"texts": 16}}
    model.save_to_preset(str(folder), max_shard_size=5, **options)
    text = (folder / "README.md").read_text()
    assert text.count("## Adapter") == 1
    assert rows(text)["accuracy"] == ["0.75"]
    assert rows(text)["texts"] == ["16"]
    assert text.startswith("---\nlibrary_name: keras-hub\n")
    scope = {}
    monkeypatch.chdir(tmp_path)
    exec(code(text), scope)
    assert type(scope["model"]) is type(model)
    np.testing.assert_array_equal(predict(scope["model"], inputs), predict(model, inputs))


def test_a_task_put_around_an_adapted_backbone_has_a_card(tmp_path):
    backbone = enable_dcft(bert_backbone(), kernel_size=4)
    randomize_adapters(backbone)
    preprocessor = bert_classifier().preprocessor
    task = keras_hub.models.BertTextClassifier(
        backbone=backbone, num_classes=2, preprocessor=preprocessor, dropout=0.0
    )
    task.save_to_preset(str(tmp_path / "preset"))
    card = tmp_path / "preset" / "README.md"
    assert card.read_text().count("## Adapter") == 1
    task.save_to_preset(str(tmp_path / "preset"), metrics="good")
    assert "BertTextClassifier" in card.read_text()
    assert "good" in card.read_text()
    restored = keras_hub.models.TextClassifier.from_preset(str(tmp_path / "preset"))
    np.testing.assert_array_equal(predict(restored, TEXTS), predict(task, TEXTS))


@pytest.mark.parametrize("there", [None, "# Mine\n"])
def test_a_save_that_fails_leaves_no_card(there, tmp_path):
    model = adapted_classifier()
    card = tmp_path / "README.md"
    if there:
        card.write_text(there)
    (tmp_path / "assets").write_text("where KerasHub makes a folder")
    with pytest.raises(NotADirectoryError):
        model.save_to_preset(str(tmp_path))
    assert (tmp_path / "model.weights.h5").exists()  # the backbone was saved by then
    with pytest.raises(TypeError, match="`metrics` must be"):
        model.save_to_preset(str(tmp_path), metrics=3)
    assert (card.read_text() if card.exists() else None) == there


def test_plain_models_write_none(tmp_path):
    for number, change in enumerate((merge_dcft, remove_dcft)):
        folder = tmp_path / str(number)
        change(adapted_classifier()).save_to_preset(str(folder))
        assert (folder / "config.json").exists()
        assert not (folder / "README.md").exists()


def test_what_stands_around_a_presets_section_stays(tmp_path):
    model = adapted_classifier()
    model.save_to_preset(str(tmp_path), metrics="first")
    card = tmp_path / "README.md"
    before = card.read_text().replace("# ", "# By me: ", 1) + "\n## Limits\n\nMany.\n"
    card.write_text(before)
    model.save_to_preset(str(tmp_path), metrics="second")
    assert card.read_text() == before.replace("first", "second")
    # An adapter file in the same folder has a section beside it.
    path, _ = saved(tmp_path, model=model)
    write_model_card(model, path)
    assert card.read_text().count("## Adapter") == 2
