"""Keras's own tests of Dense and EinsumDense, and its test harness for layers, on our classes."""

import functools
import re

import keras
import pytest
from keras.src import layers, testing
from keras.src.layers.core import dense_test, einsum_dense_test

from keras_dcft import DCFTDense, DCFTEinsumDense, DCFTEmbedding, DCFTReversibleEmbedding


@keras.saving.register_keras_serializable("keras_dcft_tests")
class Dense(DCFTDense):
    """With Keras's order of arguments, and a kernel size that fits its smallest shapes."""

    def __init__(self, units, activation=None, kernel_size=1, **kwargs):
        super().__init__(units, kernel_size=kernel_size, activation=activation, **kwargs)


@keras.saving.register_keras_serializable("keras_dcft_tests")
class EinsumDense(DCFTEinsumDense):
    def __init__(self, equation, output_shape, activation=None, kernel_size=1, **kwargs):
        super().__init__(
            equation, output_shape, kernel_size=kernel_size, activation=activation, **kwargs
        )


class Layers:
    """`keras.layers` with our classes in place of Keras's."""

    Dense = Dense
    EinsumDense = EinsumDense

    def __getattr__(self, name):
        return getattr(layers, name)


dense_test.layers = Layers()
einsum_dense_test.layers = Layers()

FROZEN_COUNT = "a frozen kernel counts as frozen, and there are three adapter variables"
# What must differ: which tests, by class and name, fail, how, and why.
DIFFERENCES = [
    (r"lora", "cannot have LoRA|cannot be given here", "either DCFT or LoRA"),
    (r"_constraints$", "cannot be given here", "the kernel is frozen"),
    (r"awq|gptq", "Quantize the model first", "the base is calibrated without an adapter"),
    (r"int4_kernel_returns_unpacked", "holds a quantized weight", "integers take no increment"),
    (r"quantize_on_subclass", "NotImplementedError not raised", "this subclass may be quantized"),
    (r"Einsum.*(elided_input_used|quantize_int_)", "axis that is shared", "a stack of matrices"),
    (r"quantize_by_setting_dtype_policy|float8_fitting", r"\d+ != \d+", FROZEN_COUNT),
    (r"dense_(correctness|no_activation|with)", "set_weights", FROZEN_COUNT),
]
if keras.backend.backend() == "tensorflow":
    DIFFERENCES.append((r"dense_sparse", "IndexedSlices", "the kernel has no gradient"))
if keras.backend.backend() == "jax":
    DIFFERENCES.append((r"quantize_float8$", "non_trainable_variables", FROZEN_COUNT))


def with_differences(cls):
    """Makes the tests that must fail on our classes pass exactly if they fail as expected."""
    for name in dir(cls):
        for pattern, message, _ in DIFFERENCES:
            if name.startswith("test_") and re.search(pattern, f"{cls.__name__}.{name}"):
                setattr(cls, name, failing(getattr(cls, name), message))
                break
    return cls


def failing(test, message):
    @functools.wraps(test)
    def must_fail(self):
        with pytest.raises((AssertionError, ValueError), match=message):
            test(self)

    return must_fail


class Harness:
    """Keras's harness for layers, told how many variables of each kind a DCFT layer has."""

    def run_layer_test(self, cls, init_kwargs, **expected):
        trainable = expected.pop("expected_num_trainable_weights")
        frozen = expected.pop("expected_num_non_trainable_weights", 0)
        if "kernel_regularizer" in init_kwargs:  # what is frozen is not penalized
            expected["expected_num_losses"] = 0
        scales = 6 if "float8" in str(init_kwargs.get("dtype")) else 0
        super().run_layer_test(
            cls,
            init_kwargs,
            expected_num_trainable_weights=3 + scales,
            expected_num_non_trainable_weights=trainable - scales + frozen,
            **expected,
        )


@with_differences
class DenseTest(Harness, dense_test.DenseTest):
    pass


@with_differences
class EinsumDenseTest(Harness, einsum_dense_test.EinsumDenseTest):
    pass


def test_every_difference_is_of_some_test():
    names = [
        f"{cls.__name__}.{name}"
        for cls in (DenseTest, EinsumDenseTest)
        for name in dir(cls)
        if name.startswith("test_")
    ]
    for pattern, _, _ in DIFFERENCES:
        assert any(re.search(pattern, name) for name in names), pattern


class EmbeddingTest(Harness, testing.TestCase):
    def test_embedding_layers(self):
        for cls in (DCFTEmbedding, DCFTReversibleEmbedding):
            self.run_layer_test(
                cls,
                {"input_dim": 14, "output_dim": 13, "kernel_size": 4, "rank": 2},
                input_shape=(2, 3),
                input_dtype="int32",
                expected_output_shape=(2, 3, 13),
                expected_num_trainable_weights=1,
                expected_num_losses=0,
                supports_masking=False,
                run_mixed_precision_check=cls is DCFTEmbedding,
                assert_built_after_instantiation=False,
            )


class AdapterTest(Harness, testing.TestCase):
    def test_dense_layers_with_every_setting(self):
        settings = {"kernel_size": 3, "rank": 2, "alpha": 2.0, "dropout": 0.1}
        self.run_layer_test(
            DCFTDense,
            {"units": 10, "activation": "relu", **settings, "orthogonality": 0.1},
            input_shape=(2, 5, 8),
            expected_output_shape=(2, 5, 10),
            expected_num_trainable_weights=2,
            expected_num_seed_generators=1,
            expected_num_losses=2,
            supports_masking=True,
        )
        self.run_layer_test(
            DCFTEinsumDense,
            {"equation": "abc,cde->abde", "output_shape": (5, 3, 4), "bias_axes": "de"} | settings,
            input_shape=(2, 5, 8),
            expected_output_shape=(2, 5, 3, 4),
            expected_num_trainable_weights=2,
            expected_num_seed_generators=1,
            expected_num_losses=0,
            supports_masking=False,  # as EinsumDense
        )
