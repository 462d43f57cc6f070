import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from keras import ops
from tools import array

from keras_dcft.increments import (
    dcft_increment,
    expand_input_factor,
    expand_output_factor,
    parameter_count,
    subspace_shape,
)


@st.composite
def shapes(draw):
    input_dim = draw(st.integers(1, 40))
    output_dim = draw(st.integers(1, 40))
    kernel_size = draw(st.integers(1, min(input_dim, output_dim)))
    return input_dim, output_dim, kernel_size, draw(st.integers(1, 4)), draw(st.integers(0, 10**6))


def draw_adapter(input_dim, output_dim, kernel_size, rank, seed):
    rng = np.random.default_rng(seed)
    a, b = subspace_shape(input_dim, output_dim, kernel_size)
    sizes = ((a, rank), (rank, b), (kernel_size, kernel_size))
    return [rng.normal(size=size).astype("float32") for size in sizes]


def torch_increment(factor_a, factor_b, kernel_filter, input_dim, output_dim, scale):
    """An independent reference: the transposed convolution of PyTorch itself, in float64."""
    a, b, k = (torch.tensor(x, dtype=torch.float64) for x in (factor_a, factor_b, kernel_filter))
    image = torch.nn.functional.conv_transpose2d((a @ b)[None, None], k[None, None], stride=len(k))
    return scale * image[0, 0, :input_dim, :output_dim].numpy()


def assert_close(actual, expected):
    expected = np.asarray(expected)
    assert np.abs(array(actual) - expected).max() <= 1e-5 * max(np.abs(expected).max(), 1e-30)


@given(shapes(), st.integers(0, 20))
def test_all_three_forms_equal_the_reference(shape, padding):
    input_dim, output_dim, kernel_size, rank, _ = shape
    factor_a, factor_b, kernel_filter = draw_adapter(*shape)
    tensors = [ops.convert_to_tensor(x) for x in (factor_a, factor_b, kernel_filter)]
    expected = torch_increment(factor_a, factor_b, kernel_filter, input_dim, output_dim, 4.0)

    assert_close(dcft_increment(*tensors, input_dim, output_dim, 4.0), expected)
    kronecker = 4.0 * np.kron(factor_a @ factor_b, kernel_filter)[:input_dim, :output_dim]
    assert_close(kronecker, expected)
    input_factor = expand_input_factor(tensors[0], tensors[2], input_dim, 4.0, padding)
    output_factor = expand_output_factor(tensors[1], kernel_size, output_dim, padding)
    width = rank * (kernel_size + padding)
    assert tuple(input_factor.shape) == (input_dim, width)
    assert tuple(output_factor.shape) == (width, output_dim)
    assert_close(ops.matmul(input_factor, output_factor), expected)


@given(shapes())
def test_parameter_count_counts_the_three_variables(shape):
    input_dim, output_dim, kernel_size, rank, _ = shape
    adapter = draw_adapter(*shape)
    assert parameter_count(input_dim, output_dim, kernel_size, rank) == sum(x.size for x in adapter)


@pytest.mark.parametrize(
    ("input_dim", "output_dim", "kernel_size", "shape"),
    [(768, 3072, 8, (96, 384)), (10, 7, 4, (3, 2)), (5, 5, 5, (1, 1)), (5, 6, 1, (5, 6))],
)
def test_subspace_is_rounded_up(input_dim, output_dim, kernel_size, shape):
    assert subspace_shape(input_dim, output_dim, kernel_size) == shape


def test_increment_has_rank_of_rank_times_kernel_size():
    adapter = draw_adapter(40, 48, 8, 1, seed=0)
    increment = array(dcft_increment(*map(ops.convert_to_tensor, adapter), 40, 48))
    assert np.linalg.matrix_rank(increment) == 8
