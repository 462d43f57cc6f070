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


def test_it_prints_by_itself_without_colour_codes(capsys):
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
