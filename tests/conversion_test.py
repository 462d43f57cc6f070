import backbones
import keras
import keras_hub
import numpy as np
import pytest
import safetensors.numpy
from tools import array, randomize_adapters, tied, vectors

from keras_dcft import (
    DCFTDense,
    dcft_disabled,
    enable_dcft,
    load_dcft_weights,
    merge_dcft,
    remove_dcft,
    save_dcft_weights,
)
from keras_dcft.reclassing import dcft_class


@keras.saving.register_keras_serializable("keras_dcft_tests")
class Named(keras.layers.Dense):
    """A subclass that computes what Dense does."""

    def __init__(self, units, note="", **kwargs):
        super().__init__(units, **kwargs)
        self.note = note

    def get_config(self):
        return {**super().get_config(), "note": self.note}


class Scaled(keras.layers.Dense):
    def call(self, inputs, training=None):
        return 2 * super().call(inputs)


def test_a_subclass_that_computes_the_same_is_adapted(tmp_path):
    model = keras.Sequential([keras.Input((12,)), Named(8, note="kept")])
    layer, base = model.layers[0], array(model(vectors()))
    enable_dcft(model, kernel_size=4)
    assert isinstance(layer, Named)
    assert isinstance(layer, DCFTDense)
    np.testing.assert_array_equal(array(model(vectors())), base)
    randomize_adapters(model)
    expected = array(model(vectors()))
    model.save(tmp_path / "m.keras")
    restored = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(array(restored(vectors())), expected)
    assert restored.layers[0].note == "kept"
    remove_dcft(restored)
    assert type(restored.layers[0]) is Named
    merge_dcft(model)
    assert type(layer) is Named
    np.testing.assert_allclose(array(model(vectors())), expected, rtol=1e-4, atol=1e-5)


def test_classes_without_an_adapted_one():
    assert dcft_class(Scaled) is None
    assert dcft_class(keras.layers.LayerNormalization) is None
    assert dcft_class(DCFTDense) is DCFTDense


def test_tied_kernels_have_one_adapter(tmp_path):
    model = tied()
    assert len(model.trainable_variables) == 3  # the shared kernel, another one, its bias
    base = array(model(vectors()))
    enable_dcft(model, kernel_size=4)
    assert len(model.trainable_variables) == 6
    assert model.second.dcft_a is model.first.dcft_a
    np.testing.assert_array_equal(array(model(vectors())), base)
    randomize_adapters(model)
    expected = array(model(vectors()))

    path = tmp_path / "a.dcft.safetensors"
    with dcft_disabled(model):
        save_dcft_weights(model, path)
    assert len(safetensors.numpy.load_file(path)) == 6
    other = tied()
    enable_dcft(other, kernel_size=4)
    other.set_weights(model.get_weights())
    remove_dcft(other)
    load_dcft_weights(other, path)
    np.testing.assert_array_equal(array(other(vectors())), expected)

    model.save(tmp_path / "m.keras")
    restored = keras.saving.load_model(tmp_path / "m.keras")
    assert restored.second.dcft_a is restored.first.dcft_a
    np.testing.assert_array_equal(array(restored(vectors())), expected)
    remove_dcft(restored)
    np.testing.assert_array_equal(array(restored(vectors())), base)

    merge_dcft(model)
    assert model.second._kernel is model.first._kernel
    np.testing.assert_allclose(array(model(vectors())), expected, rtol=1e-4, atol=1e-4)


def test_tied_layers_count_once_in_the_regulariser():
    model = enable_dcft(tied(), kernel_size=4, orthogonality=0.1)
    strengths = [layer.dcft_a.regularizer.strength for layer in (model.first, model.last)]
    assert strengths == pytest.approx([0.1 / (2 * 2)] * 2)


@pytest.mark.parametrize(
    "arguments", [{"target_layers": "^einsum_dense$"}, {"exclude_layers": "dense_1"}]
)
def test_one_of_two_tied_layers_is_refused(arguments):
    with pytest.raises(ValueError, match="share one weight"):
        enable_dcft(tied(), kernel_size=4, **arguments)


def test_tied_layers_of_two_kernel_sizes_are_refused():
    with pytest.raises(ValueError, match="must be the same for"):
        enable_dcft(tied(), kernel_size={"einsum_dense_1": 2, ".*": 4})


def test_a_file_of_a_model_with_a_layer_that_cannot_be_adapted(tmp_path):
    path = tmp_path / "a.dcft.safetensors"
    layers = [keras.layers.Dense(8), Scaled(8, name="scaled")]
    model = keras.Sequential([keras.Input((12,)), *layers])
    enable_dcft(model, kernel_size=4, exclude_layers="scaled")
    randomize_adapters(model)
    expected = array(model(vectors()))
    save_dcft_weights(model, path)
    remove_dcft(model)
    np.testing.assert_array_equal(array(load_dcft_weights(model, path)(vectors())), expected)


def test_a_tied_kernel_used_in_another_way_is_refused():
    with pytest.raises(ValueError, match="only if they use it in the same way"):
        enable_dcft(tied(equations=("bi,ij->bj", "bj,ij->bi")), kernel_size=4)


@pytest.mark.parametrize("kind", ["QwenMoe", "Qwen3Moe", "Qwen3_5Moe", "GptOss", "Gemma4"])
def test_expert_weights_of_every_kind_are_no_target(kind):
    if not hasattr(keras_hub.models, f"{kind}Backbone"):
        pytest.skip(f"this KerasHub has no {kind}Backbone")
    model, _ = backbones.make(f"{kind}Backbone")
    names = ("Experts", "MoEBlock")
    experts = [x for x in model._flatten_layers() if type(x).__name__.endswith(names)]
    assert experts
    with pytest.raises(ValueError, match="one matrix per expert"):
        enable_dcft(model, kernel_size=2, target_layers=lambda layer: layer in experts)


def test_expert_weights_are_no_target():
    model, _ = backbones.make("MixtralBackbone")
    before = [type(layer) for layer in model._flatten_layers()]
    for target in ("experts", "transformer_layer_0", lambda layer: "expert" in layer.name):
        with pytest.raises(ValueError, match=r"MixtralMoeExperts.*one matrix per expert"):
            enable_dcft(model, kernel_size=2, target_layers=target)
    assert [type(layer) for layer in model._flatten_layers()] == before
    enable_dcft(model, kernel_size=2, target_layers="transformer_layer_0", exclude_layers="experts")
    assert not any("expert" in path for path in model.dcft_config["layers"])
