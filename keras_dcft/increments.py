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
    kernel_filter = scale * kernel_filter
    if padding:
        kernel_filter = ops.pad(kernel_filter, ((0, 0), (0, padding)))
    expanded = factor_a[:, None, :, None] * kernel_filter[None, :, None, :]
    expanded = ops.reshape(expanded, (a * d, rank * (d + padding)))
    # Backends do not see that nothing is cut off, and work out a gradient of the cut.
    return expanded if a * d == input_dim else expanded[:input_dim]


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
    identity = ops.eye(d + padding, d, dtype=factor_b.dtype)
    expanded = factor_b[:, None, :, None] * identity[None, :, None, :]
    expanded = ops.reshape(expanded, (rank * (d + padding), b * d))
    return expanded if b * d == output_dim else expanded[:, :output_dim]
