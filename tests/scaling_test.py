"""What is counted on paper is what real models have."""

import json
import sys

import keras
import keras_hub
import numpy as np
import pytest
from conftest import ROOT
from one_backend import only_on

from keras_dcft import enable_dcft

sys.path.insert(0, str(ROOT / "benchmarks"))

import scaling

TINY = {
    "Gemma 2B": {"vocabulary_size": 64, "num_layers": 2, "num_query_heads": 2, "hidden_dim": 16,
                 "intermediate_dim": 32, "head_dim": 8},
    "Llama 3 8B": {"vocabulary_size": 64, "num_layers": 3, "num_query_heads": 4,
                   "num_key_value_heads": 2, "hidden_dim": 32, "intermediate_dim": 48},
    "Gemma 2 27B": {"vocabulary_size": 64, "num_layers": 2, "num_query_heads": 4,
                    "num_key_value_heads": 2, "hidden_dim": 16, "intermediate_dim": 32,
                    "head_dim": 8},
    "Qwen3 MoE 235B": {"vocabulary_size": 64, "num_layers": 2, "num_query_heads": 4,
                       "num_key_value_heads": 2, "hidden_dim": 16, "intermediate_dim": 32,
                       "moe_intermediate_dim": 8, "num_experts": 4, "top_k": 2, "head_dim": 8},
}  # fmt: skip


def class_and_arguments(name):
    cls, arguments, _ = scaling.MODELS[name]
    return getattr(keras_hub.models, cls), {**arguments, **TINY[name]}


@pytest.mark.parametrize("name", TINY)
def test_a_model_without_memory_has_the_real_ones_weights(name):
    cls, arguments = class_and_arguments(name)
    abstract, real = scaling.without_memory(cls, **arguments), cls(**arguments)
    assert [weight._value for weight in abstract.weights] == [None] * len(real.weights)
    assert [(w.path, w.shape) for w in abstract.weights] == [
        (w.path, w.shape) for w in real.weights
    ]
    counted = scaling.trainable_numbers(abstract)
    assert counted[scaling.FULL] == sum(np.prod(weight.shape) for weight in real.weights)
    enable_dcft(real, kernel_size=2)
    trained = sum(np.prod(variable.shape) for variable in real.trainable_variables)
    assert counted["DCFT, kernel size 2"] == trained


def test_nothing_is_given_values_later():
    cls, arguments = class_and_arguments("Gemma 2B")
    abstract = scaling.without_memory(cls, **arguments)
    with keras.StatelessScope():
        pass
    assert all(weight._value is None for weight in abstract.weights)


def test_a_wrong_size_is_found(monkeypatch):
    cls, arguments, published = scaling.MODELS["Gemma 2B"]
    wrong = {**arguments, "num_layers": 17}
    monkeypatch.setitem(scaling.MODELS, "Gemma 2B", (cls, wrong, published))
    with pytest.raises(ValueError, match=r"2,506,172,416\. Received: 2,396,"):
        scaling.abstract_backbone("Gemma 2B")


def test_experts_that_a_token_does_not_choose_are_not_computed():
    cls, arguments = class_and_arguments("Qwen3 MoE 235B")
    experts = 2 * 4 * (16 * 2 * 8 + 8 * 16)  # layers, experts, gate and up in one, down
    all_but_lookup = cls(**arguments).count_params() - 64 * 16
    abstract = scaling.without_memory(cls, **arguments)
    assert scaling.used_parameters(abstract) == all_but_lookup - experts / 2


@pytest.mark.parametrize("devices", [2, 3, 8])
def test_a_ring_sends_as_much_as_is_counted(devices):
    """Each device hands on a piece at a time: sums on the first round, results on the second."""
    pieces = np.random.default_rng(0).normal(size=(devices, devices, 5))  # device, piece, numbers
    total, handed_on = pieces.sum(axis=0), np.zeros(devices)
    for turn in range(2 * (devices - 1)):
        going = [pieces[d, (d - turn) % devices].copy() for d in range(devices)]
        for device, piece in enumerate(going):
            place = (device + 1) % devices, (device - turn) % devices
            pieces[place] = pieces[place] + piece if turn < devices - 1 else piece
            handed_on[device] += piece.size
    np.testing.assert_allclose(pieces, np.broadcast_to(total, pieces.shape))
    assert handed_on == pytest.approx(scaling.sent(devices * 5, devices))


SHARDED = """
import json, sys
import keras, keras_hub
mesh = keras.distribution.DeviceMesh((1, 8), ("batch", "model"))
counted = []
for name, arguments in json.loads(sys.argv[1]):
    cls = getattr(keras_hub.models, name)
    layout_map = cls.get_layout_map(mesh)
    with keras.distribution.ModelParallel(layout_map=layout_map, batch_dim_name="batch").scope():
        model = cls(**arguments, dtype="bfloat16")
    counted.append(sum(w.value.addressable_shards[0].data.nbytes for w in model.weights))
print(json.dumps(counted))
"""


@only_on("jax")
def test_a_devices_share_of_the_base_is_what_jax_puts_there(run_python):
    models, counted = [], []
    for name in ("Llama 3 8B", "Gemma 2 27B", "Qwen3 MoE 235B"):
        cls, arguments = class_and_arguments(name)
        arguments |= {"num_query_heads": 8, "num_key_value_heads": 8}
        arguments |= {"num_experts": 8} if "num_experts" in arguments else {}
        layout = scaling.layout_on_a_group(scaling.without_memory(cls, **arguments))
        assert not layout["uneven"]
        models.append((cls.__name__, arguments))
        counted.append(layout["sharded_bytes"])
    printed = run_python(SHARDED, "jax", json.dumps(models), devices=8)
    assert json.loads(printed.splitlines()[-1]) == counted
