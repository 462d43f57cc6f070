import keras
import keras_hub
import numpy as np
import pytest
from keras import ops
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
from keras_dcft.layers import ADAPTER_VARIABLES
from keras_dcft.planning import walk

IDS = np.array([[0, 3, 18], [22, 7, 7]])


def built(cls, vocabulary=23, dim=10, kernel_size=4, seed=0, **arguments):
    layer = cls(vocabulary, dim, kernel_size=kernel_size, rank=2, **arguments)
    layer.build()
    rng = np.random.default_rng(seed)
    for name in ADAPTER_VARIABLES:
        variable = getattr(layer, name)
        variable.assign(rng.normal(size=variable.shape))
    return layer


def increment(layer):
    product = array(layer.dcft_a) @ array(layer.dcft_b)
    full = np.kron(product, array(layer.dcft_filter)) * layer.scale
    return full[: layer.input_dim, : layer.output_dim]


@pytest.mark.parametrize("seed", range(20))
def test_lookup_and_projection_equal_the_definition(seed):
    rng = np.random.default_rng(seed)
    vocabulary, dim, d = (int(rng.integers(low, 40)) for low in (9, 9, 1))
    d = min(d, vocabulary, dim)
    layer = built(DCFTReversibleEmbedding, vocabulary, dim, d, seed)
    ids = rng.integers(0, vocabulary, (3, 5))
    table = array(layer._embeddings) + increment(layer)
    np.testing.assert_allclose(array(layer.dcft_increment()), increment(layer), atol=1e-5)
    np.testing.assert_allclose(array(layer.embeddings), table, atol=1e-5)
    np.testing.assert_allclose(array(layer(ids)), table[ids], rtol=1e-4, atol=1e-4)
    hidden = rng.normal(size=(3, 5, dim)).astype("float32")
    projected = array(layer(hidden, reverse=True))
    scale = np.abs(hidden) @ np.abs(table.T)
    assert np.all(np.abs(projected - hidden @ table.T) <= 1e-5 * scale + 1e-5)


def test_gradients_of_the_lookup_equal_those_of_the_table():
    layer, rng = built(DCFTEmbedding), np.random.default_rng(4)
    cotangent = rng.normal(size=(*IDS.shape, 10)).astype("float32")
    _, gradients = outputs_and_gradients(layer, ops.convert_to_tensor(IDS), cotangent, ["dcft_b"])
    by_table = np.zeros((24, 12))
    np.add.at(by_table[:, :10], IDS, cotangent)
    # d/dB of <G, scale · (A·B) ⊗ K>: sum G over the filter, then project on A.
    blocks = np.einsum("iujw,uw->ij", by_table.reshape(6, 4, 3, 4), array(layer.dcft_filter))
    expected = layer.scale * array(layer.dcft_a).T @ blocks
    np.testing.assert_allclose(gradients[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cls", [DCFTEmbedding, DCFTReversibleEmbedding])
def test_layers_start_as_their_base_and_freeze_it(cls):
    layer = cls(23, 10, kernel_size=4, mask_zero=True)
    base = cls.base_class(23, 10, mask_zero=True)
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
