"""Keras's own tests of Dense and EinsumDense on our classes."""

import functools
import re

import keras
import pytest
from harness import Harness
from keras.src import layers

from keras_dcft import DCFTDense, DCFTEinsumDense

dense_test, einsum_dense_test = (
    pytest.importorskip(
        f"keras.src.layers.core.{name}", reason="this Keras comes without its own tests"
    )
    for name in ("dense_test", "einsum_dense_test")
)

# Keras's float8 does not train in TensorFlow's eager mode.
pytestmark = pytest.mark.compiled


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
