"""Adapters that become Keras's own LoRA."""

import keras
import numpy as np
import pytest
from tools import array, bert_classifier, randomize_adapters, vectors

from keras_dcft import activate_dcft, convert_to_lora, enable_dcft
from keras_dcft.paths import with_itself


def with_every_kind():
    """Embeddings, tied ones, dense layers, einsum layers with one axis out, and a norm."""
    tokens = keras.Input((5,), dtype="int32")
    table = keras.layers.ReversibleEmbedding(30, 12, name="table")
    x = keras.layers.Embedding(30, 12, name="words")(tokens) + table(tokens)
    x = keras.layers.LayerNormalization(name="norm")(x)
    x = keras.layers.Dense(20, activation="relu", name="wide")(x)
    x = keras.layers.EinsumDense("abc,cd->abd", (None, 12), bias_axes="d", name="narrow")(x)
    x = keras.layers.Reshape((5, 4, 3))(x)
    x = keras.layers.EinsumDense("abcd,cde->abe", (None, 12), name="joined")(x)
    return keras.Model(tokens, table(x, reverse=True))


def tokens():
    return np.random.default_rng(0).integers(0, 30, (4, 5))


EVERY = "table|words|wide|narrow|joined"


@pytest.mark.parametrize("mode", [None, "int8", "int4"])
def test_the_model_computes_the_same_and_is_keras_own(mode, tmp_path):
    model = with_every_kind()
    plain = [type(layer) for layer in with_itself(model).values()]
    if mode:
        model.quantize(mode)
    # Quantized, Keras's LoRA of tied embeddings is missing from the output.
    targets = EVERY.removeprefix("table|") if mode else EVERY
    enable_dcft(model, kernel_size=3, rank=2, target_layers=targets, trainable_layers="norm")
    randomize_adapters(model)
    expected = array(model(tokens()))
    assert convert_to_lora(model) is model
    assert [type(layer) for layer in with_itself(model).values()] == plain
    np.testing.assert_allclose(array(model(tokens())), expected, atol=1e-5)
    ranks = [layer.lora_rank for layer in model.layers if getattr(layer, "lora_enabled", False)]
    assert ranks == [6] * (4 if mode else 5)
    trained = {v.path.rpartition("/")[2] for v in model.trainable_variables}
    assert trained == {
        *("lora_kernel_a", "lora_kernel_b", "lora_embeddings_a", "lora_embeddings_b"),
        *("gamma", "beta"),
    }
    if mode is None:  # Keras itself rounds base plus LoRA to integers anew when it saves
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        np.testing.assert_allclose(array(loaded(tokens())), expected, atol=1e-5)


def test_it_trains_on():
    model = enable_dcft(with_every_kind(), kernel_size=3, target_layers=EVERY)
    randomize_adapters(model)
    model.compile(keras.optimizers.SGD(1e-3), "mse")
    targets = np.ones((4, 5, 30))
    before = model.evaluate(tokens(), targets, verbose=0)
    convert_to_lora(model)
    frozen = [array(v) for v in model.non_trainable_variables]
    np.testing.assert_allclose(model.evaluate(tokens(), targets, verbose=0), before, rtol=1e-4)
    model.fit(tokens(), targets, verbose=0)
    assert model.evaluate(tokens(), targets, verbose=0) < before
    for old, variable in zip(frozen, model.non_trainable_variables):
        np.testing.assert_array_equal(old, array(variable))


def test_what_was_frozen_by_hand_stays_frozen():
    model = enable_dcft(with_every_kind(), kernel_size=3, target_layers=EVERY)
    randomize_adapters(model)
    model.get_layer("wide").trainable = False
    for variable in model.get_layer("words").dcft_adapter.variables.values():
        variable.trainable = False
    convert_to_lora(model)
    trained = {v.path.split("/")[0] for v in model.trainable_variables}
    assert trained == {"table", "narrow", "joined"}


def test_a_model_that_is_not_to_be_trained_is_refused():
    model = enable_dcft(with_every_kind(), kernel_size=3, target_layers=EVERY)
    model.trainable = False
    with pytest.raises(ValueError, match=r"Set `model\.trainable = True` first"):
        convert_to_lora(model)
    model.trainable = True
    convert_to_lora(model)


def test_one_of_several_adapters():
    model = enable_dcft(with_every_kind(), kernel_size=3)
    randomize_adapters(model)
    enable_dcft(model, kernel_size=2, name="legal", target_layers="wide", trainable_layers="norm")
    activate_dcft(model, "legal")
    randomize_adapters(model, seed=1)
    model.get_layer("norm").beta.assign(np.full(12, 0.5))
    expected = array(model(tokens()))
    activate_dcft(model, "default")
    with pytest.raises(ValueError, match="'default', 'legal'"):
        convert_to_lora(model)
    convert_to_lora(model, "legal")
    np.testing.assert_allclose(array(model(tokens())), expected, atol=1e-5)
    assert model.get_layer("wide").lora_rank == 2
    assert not model.get_layer("narrow").lora_enabled
    assert len(model.trainable_variables) == 2 + 2


def test_other_layers_are_named_and_nothing_changes():
    task = enable_dcft(bert_classifier(), kernel_size=2)
    randomize_adapters(task)
    inputs = task.preprocessor(["a good film"])
    before, kind = array(task(inputs)), type(task)
    message = "`merge_dcft.*`export_to_peft.*/transformer_layer_0/self_attention_layer/query'"
    with pytest.raises(ValueError, match=message):
        convert_to_lora(task)
    assert type(task) is kind
    np.testing.assert_array_equal(array(task(inputs)), before)


def test_quantized_tied_embeddings_are_refused():
    model = with_every_kind()
    model.quantize("int8")
    enable_dcft(model, kernel_size=3, target_layers="table")
    with pytest.raises(ValueError, match=r"'table' as it is quantized.*quantization_mode='int8'"):
        convert_to_lora(model)


def test_what_is_no_adapted_model():
    model = keras.Sequential([keras.Input((12,)), keras.layers.Dense(8)])
    with pytest.raises(ValueError, match="Call `enable_dcft"):
        convert_to_lora(model)
    enable_dcft(model, kernel_size=4).layers[0].dcft_a.assign(np.full((3, 1), np.nan))
    with pytest.raises(ValueError, match="NaN or infinity in 'dense/dcft_a'"):
        convert_to_lora(model)
    assert np.isnan(array(model(vectors()))).any()
