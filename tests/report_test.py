import builtins
import html
import re
import sys
import types

import keras
import pytest
from tools import bert_classifier, sequential

from keras_dcft import dcft_summary, enable_dcft


def summary(model):
    printed = []
    dcft_summary(model, print_fn=printed.append)
    (text,) = printed
    return text


def test_the_table_tells_what_is_adapted_and_what_it_costs():
    model = bert_classifier()
    base = model.count_params()
    enable_dcft(model, kernel_size={"query": 2, ".*": 4})
    text = summary(model)
    rows = [line for line in text.splitlines() if line.startswith("│")]
    query = next(row for row in rows if "layer_0/self_attention_layer/query" in row)
    assert [cell.strip() for cell in query.strip("│").split("│")][1:] == [
        "16 x 2 x 8", "2", "1", "20", "7.812 %",
    ]  # fmt: skip
    adapters = 2 * (20 + 24 * 3 + 29 * 2) + 24
    assert f"Adapters: {adapters:,} trainable numbers" in text
    assert f"of the base model's {base:,}" in text
    lora = 2 * (4 * 32 + 2 * 52) + 32
    assert f"LoRA of rank 1 on the same kernels: {lora:,}" in text
    assert f"Trained in full beside them: 34. Trainable in all: {adapters + 34:,}." in text


@pytest.fixture
def notebook(monkeypatch):
    """What a notebook would display: all that rich looks at to tell one is in place."""
    displayed = []
    display = types.ModuleType("IPython.display")
    display.display = lambda shown: displayed.append(shown._repr_mimebundle_(None, None))
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    shell = type("ZMQInteractiveShell", (), {})
    monkeypatch.setattr(builtins, "get_ipython", shell, raising=False)
    return displayed


def test_a_notebook_displays_the_table_as_html(notebook, capsys):
    model = enable_dcft(sequential(), kernel_size=4)
    dcft_summary(model)
    (bundle,) = notebook
    assert bundle["text/html"].startswith('<pre style="white-space:pre')
    assert '<span style="font-weight: bold"> Layer ' in bundle["text/html"]
    shown = html.unescape(re.sub("<[^>]*>", "", bundle["text/html"]))
    assert shown.strip() == summary(model)
    assert capsys.readouterr().out == ""


def test_what_print_fn_gets_is_plain_text_everywhere(monkeypatch, request):
    model = enable_dcft(sequential(), kernel_size=4)
    plain = summary(model)
    assert "\x1b" not in plain
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert summary(model) == plain
    displayed = request.getfixturevalue("notebook")
    assert summary(model) == plain
    assert displayed == []


def test_names_are_no_markup():
    model = keras.Sequential([keras.Input((12,)), keras.layers.Dense(9, name="q[a]:car:")])
    text = summary(enable_dcft(model, kernel_size=4))
    assert "│ q[a]:car: │" in text


def test_it_prints_by_itself_without_colour_codes(monkeypatch, capsys):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    dcft_summary(enable_dcft(sequential(), kernel_size=4))
    printed = capsys.readouterr().out
    assert "12 x 20" in printed
    assert "\x1b" not in printed


def test_a_plain_model_is_refused():
    with pytest.raises(ValueError, match="must have DCFT layers"):
        dcft_summary(sequential())


def test_repr_of_a_model_tells_what_is_adapted():
    model = enable_dcft(sequential(), kernel_size=4)
    assert repr(model) == (
        "<DCFTSequential name=sequential, built=True, 2 DCFT layers of rank 1, kernel size 4>"
    )
    task = enable_dcft(bert_classifier(), kernel_size={"query": 2, ".*": 4})
    assert "13 DCFT layers of rank 1, kernel size 2, 4>" in repr(task)
