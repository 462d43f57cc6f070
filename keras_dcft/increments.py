"""The mathematics of DCFT (arXiv 2503.01419): pure functions of tensors, no layers.

Symbols, the same in all of the package (`d` is the kernel size, which is also the stride):

    a = ceil(in / d), b = ceil(out / d)
    factor_a: (a, r)    factor_b: (r, b)    kernel_filter: (d, d)
    increment = scale * crop(conv_transpose(factor_a @ factor_b, kernel_filter, strides=d))

The patches of the transposed convolution do not overlap, so the increment is also the Kronecker
product `(factor_a @ factor_b) ⊗ kernel_filter`, and it splits exactly into two thin factors:

    increment = D @ U    D = expand_input_factor(...)  (in, r·d)
                         U = expand_output_factor(...) (r·d, out)

`dcft_increment` is the definition; `D` and `U` are what a training step uses.
"""

import math

import keras
import numpy as np
from keras import ops


def subspace_shape(input_dim: int, output_dim: int, kernel_size: int) -> tuple[int, int]:
    """Shape `(a, b)` of the subspace in which the increment is learned."""
    return -(-input_dim // kernel_size), -(-output_dim // kernel_size)


def parameter_count(input_dim: int, output_dim: int, kernel_size: int, rank: int = 1) -> int:
    """Trainable numbers of one adapted kernel, `r·(a + b) + d²` (paper, section 3.4).

    Example:
        >>> parameter_count(768, 768, kernel_size=8)
        256
    """
    a, b = subspace_shape(input_dim, output_dim, kernel_size)
    return rank * (a + b) + kernel_size**2


def smallest_size(input_dim: int, output_dim: int, rank: int = 1) -> int:
    """The kernel size at which an adapted kernel has the fewest trainable numbers.

    Example:
        >>> smallest_size(768, 768), smallest_size(64, 16)
        (9, 4)
    """
    # Near (r (m + n) / 2)^(1/3), where the derivative of r (m + n) / d + d² is zero.
    near = math.ceil((rank * (input_dim + output_dim) / 2) ** (1 / 3))
    sizes = range(1, min(input_dim, output_dim, 2 * near + 1) + 1)
    return min(sizes, key=lambda size: parameter_count(input_dim, output_dim, size, rank))


def dcft_increment(factor_a, factor_b, kernel_filter, input_dim: int, output_dim: int, scale=1.0):
    """The weight increment by its definition, a transposed convolution of the subspace matrix.

    Args:
        factor_a: tensor of shape `(a, r)`.
        factor_b: tensor of shape `(r, b)`.
        kernel_filter: tensor of shape `(d, d)`; its first axis runs along the input axis.
        input_dim: int, rows of the increment, at most `a * d`.
        output_dim: int, columns of the increment, at most `b * d`.
        scale: float, `alpha / r`.

    Returns:
        Tensor of shape `(input_dim, output_dim)`.
    """
    image = ops.matmul(factor_a, factor_b)[None, :, :, None]
    filters = kernel_filter[:, :, None, None]
    increment = ops.conv_transpose(
        image, filters, strides=kernel_filter.shape[0], padding="valid", data_format="channels_last"
    )
    return scale * increment[0, :input_dim, :output_dim, 0]


def expand_input_factor(factor_a, kernel_filter, input_dim: int, scale=1.0, padding=0):
    """The input side `D` of the factored increment, a 1-D deconvolution of the columns of A.

    `D[(i, u), (ρ, v)] = scale · A[i, ρ] · K[u, v]`.

    Args:
        factor_a: tensor of shape `(a, r)`.
        kernel_filter: tensor of shape `(d, d)`.
        input_dim: int, rows to keep, at most `a * d`.
        scale: float, `alpha / r`, applied here because this factor is small.
        padding: int, columns of zeros behind each d columns.

    Returns:
        Tensor of shape `(input_dim, r * (d + padding))`.
    """
    a, rank = factor_a.shape
    d = kernel_filter.shape[0]
    # Its transpose is expanded: then its gradient is one too, a matrix of few long rows, which
    # XLA's CPU backend works out in a quarter of the time of one of many short rows.
    kernel_filter = ops.transpose(scale * kernel_filter)
    if padding:
        kernel_filter = ops.pad(kernel_filter, ((0, padding), (0, 0)))
    expanded = ops.transpose(factor_a)[:, None, :, None] * kernel_filter[None, :, None, :]
    expanded = ops.reshape(expanded, (rank * (d + padding), a * d))
    # Backends do not see that nothing is cut off, and work out a gradient of the cut.
    return ops.transpose(expanded if a * d == input_dim else expanded[:, :input_dim])


def expand_output_factor(factor_b, kernel_size: int, output_dim: int, padding=0):
    """The output side `U` of the factored increment, `U[(ρ, v), (j, w)] = B[ρ, j] · [v = w]`.

    Args:
        factor_b: tensor of shape `(r, b)`.
        kernel_size: int, `d`.
        output_dim: int, columns to keep, at most `b * d`.
        padding: int, rows of zeros behind each d rows.

    Returns:
        Tensor of shape `(r * (d + padding), output_dim)`.
    """
    rank, b = factor_b.shape
    d = kernel_size
    if keras.config.backend() == "torch":  # which would copy an array to the device at each call
        identity = ops.eye(d + padding, d, dtype=factor_b.dtype)
    else:  # in graphs a constant: OpenVINO has no rule for what `ops.eye` is in TensorFlow's
        identity = ops.convert_to_tensor(np.eye(d + padding, d), dtype=factor_b.dtype)
    expanded = factor_b[:, None, :, None] * identity[None, :, None, :]
    expanded = ops.reshape(expanded, (rank * (d + padding), b * d))
    return expanded if b * d == output_dim else expanded[:, :output_dim]


def products_by_row(inputs, factors_a, factors_b, filters, output_dim: int, scale=1.0):
    """Products of inputs with increments, one increment for each row of a batch.

    No increment is formed. Where a row has few samples, as when a token is generated, no thin
    factor is either: `(Aᵀx) K` in views of blocks and positions, then an outer product with B.

    Args:
        inputs: tensor of shape `(rows, samples, in)`.
        factors_a: tensor of shape `(rows, a, r)`.
        factors_b: tensor of shape `(rows, r, b)`.
        filters: tensor of shape `(rows, d, d)`.
        output_dim: int, columns of the increments, at most `b * d`.
        scale: float, `alpha / r`.

    Returns:
        Tensor of shape `(rows, samples, output_dim)`.
    """
    (_, samples, input_dim), (_, a, rank) = inputs.shape, factors_a.shape
    b, d = factors_b.shape[2], filters.shape[1]
    filters = scale * filters
    if samples is not None and samples < d:
        blocks = ops.pad(inputs, ((0, 0), (0, 0), (0, a * d - input_dim)))
        blocks = ops.reshape(blocks, (-1, samples, a, d))
        factors_a, factors_b, filters = (
            ops.cast(factor, inputs.dtype) for factor in (factors_a, factors_b, filters)
        )
        hidden = ops.einsum("nsiu,nip->nspu", blocks, factors_a)
        hidden = ops.einsum("nspu,nuv->nspv", hidden, filters)
        outputs = ops.einsum("nspv,npj->nsjv", hidden, factors_b)
        return ops.reshape(outputs, (-1, samples, b * d))[..., :output_dim]
    left = factors_a[:, :, None, :, None] * filters[:, None, :, None, :]
    left = ops.reshape(left, (-1, a * d, rank * d))[:, :input_dim]
    identity = ops.eye(d, dtype=factors_b.dtype)[:, None, :]
    right = factors_b[:, :, None, :, None] * identity
    right = ops.reshape(right, (-1, rank * d, b * d))[..., :output_dim]
    hidden = ops.matmul(inputs, ops.cast(left, inputs.dtype))
    return ops.matmul(hidden, ops.cast(right, inputs.dtype))


def looked_up_by_row(indices, factors_a, factors_b, filters, output_dim: int, scale=1.0):
    """Rows of increments, one increment for each row of a batch of indices.

    Args:
        indices: integer tensor of shape `(rows, samples)`, not negative.
        factors_a, factors_b, filters, output_dim, scale: as for `products_by_row`.

    Returns:
        Tensor of shape `(rows, samples, output_dim)`.
    """
    b, d = factors_b.shape[2], filters.shape[1]
    from_a = ops.take_along_axis(factors_a, ops.floor_divide(indices, d)[..., None], axis=1)
    from_filter = ops.take_along_axis(filters, ops.mod(indices, d)[..., None], axis=1)
    hidden = scale * from_a[..., :, None] * from_filter[..., None, :]
    outputs = ops.einsum("nspv,npj->nsjv", hidden, factors_b)
    return ops.reshape(outputs, (*ops.shape(indices), b * d))[..., :output_dim]
