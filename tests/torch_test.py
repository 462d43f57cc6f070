"""PyTorch's own ways with an adapted model: parameters, state dicts, its loops and modules."""

import keras
import numpy as np
import pytest
from tools import MODELS, differences, predict, randomize_adapters, sequential, values, vectors

from keras_dcft import enable_dcft, load_dcft_weights, merge_dcft, remove_dcft, save_dcft_weights

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="about the PyTorch backend"
)


def assert_is_what_keras_has(module, model):
    """Every module with weights: the same tensors, the same flags, each under one name."""
    expected = {id(v.value): v.trainable for v in model.variables}
    found = {id(p): p.requires_grad for p in module.parameters()}
    assert {key: flag for key, flag in found.items() if key in expected} == found
    assert {id(v.value) for v in model.weights} <= set(found)
    assert {key: flag for key, flag in expected.items() if key in found} == found
    for variable in model.weights:
        assert any(variable.path in name for name in module.state_dict())


@pytest.mark.parametrize("kind", MODELS)
def test_parameters_are_right_after_each_verb(kind, tmp_path):
    model = MODELS[kind][0]()
    module = torch.nn.ModuleDict({"keras": model})
    keys = set(module.state_dict())
    path = tmp_path / "a.dcft.safetensors"
    for undo in (remove_dcft, merge_dcft):
        enable_dcft(model, kernel_size=4)
        for layer in [model, *model._flatten_layers()]:
            assert_is_what_keras_has(layer, layer)
        assert_is_what_keras_has(module, model)
        adapters = [name for name in module.state_dict() if "dcft_" in name]
        assert len({name.split(".")[-1] for name in adapters}) >= 3
        if undo is remove_dcft:
            save_dcft_weights(model, path)
        undo(model)
        for layer in [model, *model._flatten_layers()]:
            assert_is_what_keras_has(layer, layer)
        assert not [name for name in module.state_dict() if "dcft_" in name]
        assert {key.split(".")[-1] for key in keys} <= {
            key.split(".")[-1] for key in module.state_dict()
        }
    load_dcft_weights(model, path)
    assert_is_what_keras_has(module, model)
    model.save(tmp_path / "m.keras")
    restored = keras.saving.load_model(tmp_path / "m.keras")
    assert_is_what_keras_has(restored, restored)


def test_a_state_dict_goes_into_another_adapted_model():
    first, second = (enable_dcft(sequential(), kernel_size=4) for _ in range(2))
    randomize_adapters(first)
    state = dict(zip(second.state_dict(), first.state_dict().values()))
    assert second.load_state_dict(state).missing_keys == []
    np.testing.assert_array_equal(predict(second, vectors()), predict(first, vectors()))


class Wrapped(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs):
        return self.model(inputs)


@pytest.mark.parametrize("how", ["model", "module", "compiled"])
def test_a_torch_loop_trains_the_adapters_and_nothing_else(how):
    model = sequential()
    if how == "compiled":  # fewer layers, as following them takes PyTorch ten seconds each
        model = keras.Sequential([keras.Input((12,)), keras.layers.Dense(9)])
    enable_dcft(model, kernel_size=4)
    randomize_adapters(model)
    module = Wrapped(model) if how == "module" else model
    run = torch.compile(module, backend="aot_eager") if how == "compiled" else module
    trained = model.trainable_variables
    frozen = model.non_trainable_variables
    before, before_frozen = values(trained), values(frozen)
    parameters = [p for p in module.parameters() if p.requires_grad]
    assert len(parameters) == len(trained) == (3 if how == "compiled" else 6)
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    inputs = torch.as_tensor(vectors())
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = ((run(inputs) - 1) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(d > 0 for d in differences(before, values(trained)))
    assert all(d == 0 for d in differences(before_frozen, values(frozen)))
