import builtins
import html
import itertools
import re
import sys
import types

import keras
import keras_hub
import pytest
from tools import bert_classifier, sequential

from keras_dcft import dcft_summary, enable_dcft, remove_dcft


def summary(model, **arguments):
    printed = []
    dcft_summary(model, print_fn=printed.append, **arguments)
    (text,) = printed
    return text


def cells(text):
    """The columns of each line within a table."""
    lines = [line for line in text.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_the_table_tells_what_is_adapted_and_what_it_costs():
    model = bert_classifier()
    base = model.count_params()
    enable_dcft(model, kernel_size={"query": 2, ".*": 4})
    text = summary(model)
    query = next(row for row in cells(text) if "layer_0/self_attention_layer/query" in row[0])
    assert query[1:] == ["16 x 2 x 8", "2", "1", "20", "7.812 %"]
    adapters = 2 * (20 + 24 * 3 + 29 * 2) + 24
    assert f"Adapters: {adapters:,} trainable numbers" in text
    assert f"of the base model's {base:,}" in text
    lora = 2 * (4 * 32 + 2 * 52) + 32
    assert f"LoRA of rank 1 on the same kernels: {lora:,}" in text
    assert f"Trained in full beside them: 34. Trainable in all: {adapters + 34:,}." in text


def deep(kernel_size=4):
    """25 dense layers in four blocks and a pooler."""
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=11,
        num_layers=4,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=36,
        max_sequence_length=12,
    )
    return enable_dcft(backbone, kernel_size=kernel_size)


def test_layers_that_differ_in_their_blocks_numbers_alone_share_a_row():
    model = deep()
    text = summary(model)
    rows = cells(text)
    query = next(row for row in rows if "query" in row[0])
    assert query == [
        "transformer_layer_{0..3}/self_attention_layer/query",
        "16 x 2 x 8", "4", "1", "96", "9.375 %",
    ]  # fmt: skip
    assert len([row for row in rows if row[1]]) == 7
    assert rows[-1][0] == "25 layers"
    assert "`expand=True` shows every layer" in text
    counts = [int(row[4].replace(",", "")) for row in rows if row[4]]
    assert sum(counts[:-1]) == counts[-1]


def test_every_layer_has_its_row_when_asked_for():
    text = summary(deep(), expand=True)
    assert len([row for row in cells(text) if row[1]]) == 25
    assert "transformer_layer_3/self_attention_layer/query" in text
    assert "{" not in text
    assert "expand" not in text


def test_a_block_with_other_settings_has_rows_of_its_own():
    text = summary(deep({"layer_1/.*query": 2, ".*": 4}))
    assert "transformer_layer_{0,2..3}/self_attention_layer/query" in text
    assert "transformer_layer_1/self_attention_layer/query" in text


def test_a_row_stands_for_all_combinations_of_its_numbers():
    stages = [
        keras.Sequential(
            [keras.layers.Dense(8, name=f"block_{n}") for n in range(length)], name=f"stage_{stage}"
        )
        for stage, length in enumerate((9, 9, 4))
    ]
    text = summary(enable_dcft(keras.Sequential([keras.Input((8,)), *stages]), kernel_size=4))
    assert [row[0] for row in cells(text)[:-1]] == [
        "stage_0/block_{0..8}", "stage_1/block_{0..8}", "stage_2/block_{0..3}",
    ]  # fmt: skip


def test_names_of_keras_stand_beside_paths_at_any_depth():
    keras.layers.Dense(1)  # so that the next have a number
    keras.Sequential()
    inner = keras.Sequential([keras.layers.Dense(8), keras.layers.Dense(8, name="last")])
    model = enable_dcft(keras.Sequential([keras.Input((8,)), inner]), kernel_size=4)
    dense = inner.layers[0].name
    assert [row[0] for row in cells(summary(model))[:-1]] == [
        f"sequential/dense (Keras: {inner.name}/{dense})",
        f"sequential/last (Keras: {inner.name})",
    ]


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_paths_are_not_broken_inside_a_word(columns, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    monkeypatch.setenv("COLUMNS", str(columns))
    dcft_summary(deep())
    printed = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    rows = cells(printed)[:-1]
    paths = "".join((" " if kernel else "") + path for path, kernel, *_ in rows).split()
    assert len(paths) == 7
    assert "transformer_layer_{0..3}/feedforward_intermediate_dense" in paths
    for (path, *_), (_, kernel, *_) in itertools.pairwise(rows):
        assert kernel or path.endswith(("/", "_"))
    assert "…" not in printed


def test_the_share_of_the_model_that_is_covered():
    in_kernels, others = 12 * 20 + 20 * 9, 20 + 2 * 20 + 9
    share = f"{100 * in_kernels / (in_kernels + others):.1f} %"
    model = sequential()
    assert f"The adapted kernels hold {share}" in summary(enable_dcft(model, kernel_size=4))
    quantized = sequential()
    quantized.quantize("int4")  # two numbers in one
    text = summary(enable_dcft(quantized, kernel_size=4))
    share = float(re.search(r"kernels hold ([\d.]+) %", text)[1])
    assert 65 < share < 100  # scales and zero points count beside


def test_one_layer_is_a_layer():
    model = keras.Sequential([keras.Input((12,)), keras.layers.Dense(9)])
    enable_dcft(model, kernel_size=4)
    assert cells(summary(model))[-1][0] == "1 layer"
    assert "1 DCFT layer of rank 1" in repr(model)


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


def test_a_kernel_size_that_is_far_from_the_best_is_told():
    model = keras.Sequential(
        [keras.Input((32,)), keras.layers.Dense(32), keras.layers.Dense(32), keras.layers.Dense(8)]
    )
    printed = summary(enable_dcft(model, kernel_size=8))
    # 2 * 4 + 64 against 2 * 11 + 9; 4 + 1 + 64 against 11 + 3 + 9.
    assert "trains 72 numbers in 2 kernels of 32 x 32, kernel size 3 would train 31." in printed
    assert "trains 69 numbers in 1 kernel of 32 x 8, kernel size 3 would train 23." in printed
    assert "would train" not in summary(enable_dcft(remove_dcft(model), kernel_size="auto"))
