import keras
import keras_hub
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tools import bert_classifier, sequential, tied

from keras_dcft import dcft_parameter_table, enable_dcft, kernel_size_for_budget
from keras_dcft.budgets import counts_by_kernel_size

PAPER_LAYERS = ["query", "key", "value", "attention_output", "feedforward"]


def adapter_numbers(model):
    return sum(int(np.prod(v.shape)) for v in model.trainable_variables if "dcft" in v.name)


def small_model():
    return keras.Sequential([keras.Input((30,)), keras.layers.Dense(50), keras.layers.Dense(20)])


def test_the_published_counts_of_deberta_v3_base():
    # Shapes without values: its 184 million numbers are not looked at.
    with keras.StatelessScope(initialize_variables=False):
        backbone = keras_hub.models.DebertaV3Backbone(
            vocabulary_size=128100,
            num_layers=12,
            num_heads=12,
            hidden_dim=768,
            intermediate_dim=3072,
            max_sequence_length=512,
            bucket_size=256,
        )
    keras.utils.clear_session()  # which forgets what would be given values at the next chance
    table = dcft_parameter_table(backbone, (8, 12), target_layers=PAPER_LAYERS)
    assert table.dcft_parameters == [(8, 25344), (12, 24192)]
    assert table.lora_parameters == {1: 165888, 8: 8 * 165888}
    assert len(table.shapes) == 72
    assert kernel_size_for_budget(backbone, 25344, target_layers=PAPER_LAYERS) == 8
    assert kernel_size_for_budget(backbone, 25343, target_layers=PAPER_LAYERS) == 9


@pytest.mark.parametrize("kernel_size", [1, 2, 5, {"query": 2, ".*": 4}])
@pytest.mark.parametrize("rank", [1, 3])
def test_the_table_says_what_enabling_trains(kernel_size, rank):
    task = bert_classifier()
    table = dcft_parameter_table(task, [kernel_size], rank)
    assert table.base_parameters == task.count_params()
    assert table.dcft_parameters == [
        (kernel_size, adapter_numbers(enable_dcft(task, kernel_size, rank=rank)))
    ]


def test_the_model_stays_as_it_was():
    task = bert_classifier()
    before = [(v.path, v.trainable) for v in task.variables]
    dcft_parameter_table(task)
    kernel_size_for_budget(task, 2000)
    assert [(v.path, v.trainable) for v in task.variables] == before
    assert type(task) is keras_hub.models.BertTextClassifier


def test_a_shared_kernel_counts_once():
    table = dcft_parameter_table(tied(), (2,))
    assert table.dcft_parameters == [(2, 2 * (6 + 6 + 4))]
    assert table.lora_parameters[1] == 2 * 24


def test_too_large_a_kernel_size_is_a_row_without_a_count():
    table = dcft_parameter_table(sequential(), (4, 32))
    assert table.dcft_parameters[1] == (32, None)
    assert "too large for a kernel" in str(table)


def test_it_prints_counts_and_shares():
    table = dcft_parameter_table(small_model(), (4, {"dense$": 2, ".*": 4}))
    text = str(table)
    first = 8 + 13 + 16 + 13 + 5 + 16
    for count in (first, 15 + 25 + 4 + 13 + 5 + 16, 80 + 70, 8 * 150):
        assert f"{count:,}" in text
    assert f"{100 * first / (31 * 50 + 51 * 20):.4f} %" in text
    assert "\x1b" not in text


def test_it_draws_a_picture(tmp_path):
    file = tmp_path / "table.png"
    dcft_parameter_table(small_model(), (2, 8)).plot(file)
    assert file.read_bytes().startswith(b"\x89PNG")


@settings(max_examples=50)
@given(st.integers(1, 4000), st.integers(1, 4))
def test_a_budget_is_kept_by_the_smallest_kernel_size_that_can(budget, rank):
    model = small_model()
    counts = counts_by_kernel_size([(30, 50), (50, 20)], rank)
    fitting = [size for size, count in counts.items() if count <= budget]
    if fitting:
        assert kernel_size_for_budget(model, budget, rank=rank) == min(fitting)
    else:
        with pytest.raises(ValueError, match=f"at least {min(counts.values()):,}"):
            kernel_size_for_budget(model, budget, rank=rank)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kernel_sizes": (0,)}, ValueError, "kernel_sizes=0"),
        ({"kernel_sizes": (True,)}, TypeError, "kernel_sizes=True"),
        ({"kernel_sizes": ({"nothing": 2},)}, ValueError, "matches nothing"),
        ({"rank": 0}, ValueError, "rank=0"),
        ({"target_layers": "nothing"}, ValueError, "matches nothing"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        dcft_parameter_table(small_model(), **arguments)


@pytest.mark.parametrize(("budget", "error"), [(0, ValueError), (10.0, TypeError)])
def test_bad_budgets(budget, error):
    with pytest.raises(error, match="`parameters` must be"):
        kernel_size_for_budget(small_model(), budget)


def test_the_table_of_an_adapted_model_is_that_of_its_base():
    model = small_model()
    plain = dcft_parameter_table(model)
    assert dcft_parameter_table(enable_dcft(model)) == plain
