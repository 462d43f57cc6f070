import keras
import keras_hub
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from keras import ops
from layers_test import assert_forms_no_full_matrix
from tools import array, bert_backbone, differences, outputs_and_gradients, predict, values

from keras_dcft import (
    DCFTEmbedding,
    DCFTReversibleEmbedding,
    enable_dcft,
    load_dcft_weights,
    merge_dcft,
    remove_dcft,
    save_dcft_weights,
)
from keras_dcft.adapter import ADAPTER_VARIABLES
from keras_dcft.paths import walk

IDS = np.array([[0, 3, 18], [22, 7, 7]])


def built(cls, vocabulary=23, dim=10, kernel_size=4, seed=0, rank=2, **arguments):
    layer = cls(vocabulary, dim, kernel_size=kernel_size, rank=rank, **arguments)
    layer.build()
    rng = np.random.default_rng(seed)
    for name in ("_embeddings", *ADAPTER_VARIABLES):
        variable = getattr(layer, name)
        variable.assign(rng.normal(size=variable.shape))
    return layer


def increment(layer):
    product = array(layer.dcft_a) @ array(layer.dcft_b)
    full = np.kron(product, array(layer.dcft_filter)) * layer.dcft_settings.scale
    return full[: layer.input_dim, : layer.output_dim]


class BothWays(DCFTReversibleEmbedding):
    """The rows that are looked up, and their projection back onto the vocabulary."""

    def call(self, inputs):
        rows = super().call(inputs)
        return ops.concatenate([rows, super().call(rows, reverse=True)], axis=-1)


def reference(table, adapter, scale, ids, cotangent):
    """A table with a DCFT increment in float64 PyTorch, sharing no code with the package.

    Returns the effective table, as many columns of rows and projection as the cotangent has, and
    the gradients of `sum(outputs * cotangent)`.
    """
    table, cotangent, a, b, k = (
        torch.tensor(x, dtype=torch.float64) for x in (table, cotangent, *adapter)
    )
    adapter = [x.requires_grad_() for x in (a, b, k)]
    image = torch.nn.functional.conv_transpose2d((a @ b)[None, None], k[None, None], stride=len(k))
    table = table + scale * image[0, 0, : table.shape[0], : table.shape[1]]
    rows = table[torch.tensor(ids)]
    outputs = torch.cat([rows, rows @ table.T], dim=-1)[..., : cotangent.shape[-1]]
    gradients = torch.autograd.grad((outputs * cotangent).sum(), adapter)
    return [x.detach().numpy() for x in (table, outputs, *gradients)]


def assert_equals_reference(layer, ids, width, seed):
    cotangent = np.random.default_rng(seed).normal(size=(*ids.shape, width)).astype("float32")
    inputs = ops.convert_to_tensor(ids)
    outputs, gradients = outputs_and_gradients(layer, inputs, cotangent, ADAPTER_VARIABLES)
    adapter = values(getattr(layer, name) for name in ADAPTER_VARIABLES)
    table = array(layer._embeddings)
    expected = reference(table, adapter, layer.dcft_settings.scale, ids, cotangent)
    # A sum whose terms cancel is only as exact as its terms are large, see tests/layers_test.py.
    adapter = [np.abs(x) for x in adapter]
    magnitudes = reference(
        np.abs(table), adapter, layer.dcft_settings.scale, ids, np.abs(cotangent)
    )
    for actual, wanted, magnitude in zip(
        [array(layer.embeddings), outputs, *gradients], expected, magnitudes
    ):
        assert actual.shape == wanted.shape
        assert np.all(np.abs(actual - wanted) <= 1e-5 * magnitude)


@given(st.integers(1, 24), st.integers(1, 24), st.integers(1, 3), st.data())
def test_lookup_and_projection_equal_the_reference(vocabulary, dim, rank, data):
    kernel_size = data.draw(st.integers(1, min(vocabulary, dim)))
    seed = data.draw(st.integers(0, 10**6))
    # Zeros for what NumPy draws anyway: JAX compiles a random generator anew for each shape.
    zeros = {"embeddings_initializer": "zeros", "factor_initializer": "zeros"}
    layer = built(BothWays, vocabulary, dim, kernel_size, seed, rank, **zeros)
    ids = np.random.default_rng(seed).integers(0, vocabulary, (2, 3))
    assert_equals_reference(layer, ids, dim + vocabulary, seed)


def test_the_lookup_alone_equals_the_reference():
    assert_equals_reference(built(DCFTEmbedding), IDS, width=10, seed=4)


@pytest.mark.parametrize("cls", [DCFTEmbedding, DCFTReversibleEmbedding])
def test_a_lookup_forms_no_tensor_of_the_tables_size(cls):
    assert_forms_no_full_matrix(built(cls, 56, 72, 8), np.arange(5))


def test_a_projection_forms_no_tensor_of_the_tables_size():
    layer = built(DCFTReversibleEmbedding, 56, 72, 8)
    assert_forms_no_full_matrix(layer, np.ones((5, 72), "float32"), reverse=True)


def test_the_search_for_such_tensors_finds_them(monkeypatch):
    def through_the_table(layer, inputs, reverse=False):
        if reverse:
            return ops.matmul(inputs, ops.transpose(layer.embeddings))
        return ops.take(layer.embeddings, inputs, axis=0)

    monkeypatch.setattr(DCFTReversibleEmbedding, "call", through_the_table)
    layer = built(DCFTReversibleEmbedding, 56, 72, 8)
    with pytest.raises(AssertionError, match="56, 72"):
        assert_forms_no_full_matrix(layer, np.arange(5))
    with pytest.raises(AssertionError, match="56, 72"):
        assert_forms_no_full_matrix(layer, np.ones((5, 72), "float32"), reverse=True)


@pytest.mark.parametrize("cls", [DCFTEmbedding, DCFTReversibleEmbedding])
def test_layers_start_as_their_base_and_freeze_it(cls):
    layer = cls(23, 10, kernel_size=4, mask_zero=True)
    base = cls.dcft_base_class(23, 10, mask_zero=True)
    base.build()
    layer.build()
    layer._embeddings.assign(base._embeddings)
    np.testing.assert_array_equal(array(layer(IDS)), array(base(IDS)))
    mask = keras.src.backend.common.masking.get_keras_mask
    np.testing.assert_array_equal(array(mask(layer(IDS))), IDS != 0)
    layer.trainable = True
    assert [v.name for v in layer.trainable_variables] == list(ADAPTER_VARIABLES)
    config = layer.get_config()
    assert "dropout" not in config
    assert cls.from_config(config).get_config() == config


def test_untied_projections_stay_as_they_are():
    layer = built(DCFTReversibleEmbedding, tie_weights=False)
    hidden = np.ones((2, 10), "float32")
    expected = hidden @ array(layer.reverse_embeddings)
    np.testing.assert_allclose(array(layer(hidden, reverse=True)), expected, rtol=1e-5)
    assert not layer.reverse_embeddings.trainable


def test_capped_projections_have_the_increment_inside():
    layer = built(DCFTReversibleEmbedding, logit_soft_cap=2.0)
    hidden = np.ones((2, 10), "float32")
    expected = 2 * np.tanh(hidden @ (array(layer._embeddings) + increment(layer)).T / 2)
    np.testing.assert_allclose(array(layer(hidden, reverse=True)), expected, atol=1e-4)


def test_unknown_arguments_are_refused():
    with pytest.raises(ValueError, match="`embeddings_constraint` cannot be given here"):
        DCFTEmbedding(23, 10, embeddings_constraint="non_neg")
    with pytest.raises((TypeError, ValueError), match="dropout"):
        DCFTEmbedding(23, 10, dropout=0.1)


def test_embeddings_are_adapted_only_where_named():
    model = bert_backbone()
    enable_dcft(model, kernel_size=4)
    assert not any("embedding" in path for path in model.dcft_config["layers"])


def embedding_model():
    model = keras.Sequential(
        [
            keras.Input((3,), dtype="int32"),
            keras_hub.layers.TokenAndPositionEmbedding(23, 3, 12),
            keras.layers.Flatten(),
            keras.layers.Dense(9),
        ]
    )
    model.compile("adam", "mse")
    return model


def test_every_way_in_and_out_for_embeddings(tmp_path):
    model = embedding_model()
    base = predict(model, IDS)
    enable_dcft(model, kernel_size=4, target_layers=["token_embedding$", "dense"], dropout=0.1)
    layers = {path: type(layer).__name__ for path, layer in walk(model).items()}
    assert layers["token_and_position_embedding/token_embedding"] == "DCFTReversibleEmbedding"
    assert np.abs(predict(model, IDS) - base).max() < 1e-6
    adapters = model.trainable_variables
    frozen = [v for v in model.weights if not v.trainable and "seed" not in v.path]
    before, before_frozen = values(adapters), values(frozen)
    model.fit(IDS, np.ones((2, 9)), epochs=3, verbose=0)
    assert all(d > 0 for d in differences(before, values(adapters)))
    assert all(d == 0 for d in differences(before_frozen, values(frozen)))
    expected = predict(model, IDS)

    model.save(tmp_path / "m.keras")
    restored = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(predict(restored, IDS), expected)
    path = tmp_path / "a.dcft.safetensors"
    save_dcft_weights(model, path)
    remove_dcft(restored)
    assert np.abs(predict(restored, IDS) - base).max() < 1e-6
    np.testing.assert_allclose(predict(load_dcft_weights(restored, path), IDS), expected, atol=1e-6)
    merge_dcft(model)
    assert not any(type(x).__name__.startswith("DCFT") for x in model._flatten_layers())
    np.testing.assert_allclose(predict(model, IDS), expected, atol=1e-5)


def test_the_head_of_a_language_model_uses_the_adapted_table():
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=23,
        num_layers=1,
        num_heads=2,
        hidden_dim=12,
        intermediate_dim=20,
        max_sequence_length=8,
    )
    model = keras_hub.models.GPT2CausalLM(backbone=backbone, preprocessor=None)
    inputs = {"token_ids": IDS, "padding_mask": np.ones_like(IDS)}
    base = array(model(inputs))
    enable_dcft(model, kernel_size=4, target_layers="token_embedding$")
    np.testing.assert_allclose(array(model(inputs)), base, atol=1e-6)
    layer = model.backbone.token_embedding
    for name in ADAPTER_VARIABLES:
        variable = getattr(layer, name)
        variable.assign(np.random.default_rng(1).normal(size=variable.shape, scale=0.3))
    expected = array(model(inputs))
    assert np.abs(expected - base).max() > 0.01
    merge_dcft(model)
    np.testing.assert_allclose(array(model(inputs)), expected, rtol=1e-4, atol=1e-4)
