"""`DCFTDense`: a `keras.layers.Dense` with a frozen kernel plus a learned DCFT increment."""

from typing import Any

import keras
from keras import ops

from keras_dcft.layers.base import DCFTKernel, check_base_arguments
from keras_dcft.settings import DEFAULT_ALPHA, DEFAULT_KERNEL_SIZE, AdapterSettings
from keras_dcft.signatures import Initializer


@keras.saving.register_keras_serializable("keras_dcft")
class DCFTDense(DCFTKernel, keras.layers.Dense):
    """A `keras.layers.Dense` whose kernel is frozen and fine-tuned by DCFT.

    `outputs = activation(inputs · W + dropout(inputs) · ΔW + bias)` with the increment
    `ΔW = (alpha / rank) · crop(conv_transpose(A · B, filter, strides=kernel_size))` of
    arXiv 2503.01419, section 3. Trained are `dcft_a` of shape `(ceil(in / d), rank)`, `dcft_b`
    of shape `(rank, ceil(units / d))` and `dcft_filter` of shape `(d, d)`, d the kernel size, all
    float32; kernel and bias are frozen whatever `trainable` is set to. The forward pass never forms
    the increment; `kernel` and `dcft_increment()` do.

    Args:
        units: int, size of the output's last axis.
        kernel_size: int from 1 to the smaller side of the kernel. Larger means fewer trainable
            numbers, `rank * (ceil(in / d) + ceil(units / d)) + d**2`.
        rank: int, rank of `A · B` inside the subspace; the increment has rank up to `rank * d`.
        alpha: float, the increment's scale is `alpha / rank`.
        dropout: float in [0, 1), dropout on the increment's input while training.
        orthogonality: float, the paper's γ for this layer alone: adds
            `γ/2 · (‖AᵀA − I‖ + ‖BBᵀ − I‖)` to the loss.
        factor_initializer: initializer of `dcft_a` and `dcft_b`. Defaults to N(0, 0.01²).
        filter_initializer: initializer of `dcft_filter`. Defaults to zeros, which makes the layer
            start as exactly the base layer.
        **kwargs: every other argument of `keras.layers.Dense`.

    Input shape:
        `(batch, ..., in)`.

    Output shape:
        `(batch, ..., units)`.

    Raises:
        TypeError: if `kernel_size` or `rank` is not an int, or `alpha`, `dropout` or
            `orthogonality` not a number.
        ValueError: if one of them is out of range, if `kernel_size` exceeds a side of the kernel
            (when the layer is built), or for `kernel_constraint` or `lora_rank`.

    Example:
        >>> layer = DCFTDense(64, kernel_size=8)
        >>> tuple(layer(keras.ops.ones((2, 32))).shape)
        (2, 64)
        >>> [tuple(v.shape) for v in layer.trainable_variables]
        [(4, 1), (1, 8), (8, 8)]
    """

    dcft_base_class = keras.layers.Dense

    def __init__(
        self,
        units: int,
        kernel_size: int = DEFAULT_KERNEL_SIZE,
        rank: int = 1,
        alpha: float = DEFAULT_ALPHA,
        dropout: float = 0.0,
        orthogonality: float = 0.0,
        factor_initializer: Initializer = None,
        filter_initializer: Initializer = None,
        **kwargs: Any,
    ):
        check_base_arguments(kwargs)
        super().__init__(units, **kwargs)
        self.dcft_settings = AdapterSettings(
            kernel_size, rank, alpha, dropout, orthogonality, factor_initializer, filter_initializer
        )

    @staticmethod
    def dcft_weight_shape_of(layer, input_shape=None) -> tuple:
        # Not the kernel's: int4 kernels are packed, calibrated ones transposed.
        return (layer.input_spec.axes[-1], layer.units)

    # Whether kernel and outputs are matrices but for reshaping.
    _dcft_is_matrix = True

    def _dcft_product(self, inputs, kernel):
        return ops.matmul(inputs, kernel)

    def _dcft_increment_product(self, inputs):
        return self._dcft_rows_product(inputs, 1, (self.units,))
