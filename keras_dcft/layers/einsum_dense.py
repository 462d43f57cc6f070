"""`DCFTEinsumDense`: a `keras.layers.EinsumDense` with a frozen kernel plus a DCFT increment."""

import math
from typing import Any

import keras
from keras import ops

from keras_dcft.einsum import einsum_axes, einsum_kernel_shape
from keras_dcft.layers.base import DCFTKernel, check_base_arguments, holds_integers
from keras_dcft.settings import DEFAULT_ALPHA, DEFAULT_KERNEL_SIZE, AdapterSettings
from keras_dcft.signatures import Initializer


@keras.saving.register_keras_serializable("keras_dcft")
class DCFTEinsumDense(DCFTKernel, keras.layers.EinsumDense):
    """A `keras.layers.EinsumDense` whose kernel is frozen and fine-tuned by DCFT.

    The kernel is viewed as a matrix: the axes that the equation contracts, in the kernel's order,
    by the axes that it puts into the output, in the kernel's order. Everything else is as in
    `DCFTDense`.

    Args:
        equation: str, as for `keras.layers.EinsumDense`, with no axis shared by input, kernel and
            output: such a kernel is no matrix but a stack of them.
        output_shape: int or tuple, as for `keras.layers.EinsumDense`.
        kernel_size, rank, alpha, dropout, orthogonality, factor_initializer, filter_initializer:
            as for `DCFTDense`.
        **kwargs: every other argument of `keras.layers.EinsumDense`.

    Raises:
        TypeError, ValueError: as `DCFTDense`, and ValueError for an equation with a shared axis.

    Example:
        >>> layer = DCFTEinsumDense("btd,dnh->btnh", (None, 4, 16), kernel_size=8)
        >>> tuple(layer(keras.ops.ones((2, 5, 32))).shape)
        (2, 5, 4, 16)
        >>> [tuple(v.shape) for v in layer.trainable_variables]
        [(4, 1), (1, 8), (8, 8)]
    """

    dcft_base_class = keras.layers.EinsumDense

    def __init__(
        self,
        equation: str,
        output_shape: int | tuple[int | None, ...],
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
        einsum_axes(equation)
        super().__init__(equation, output_shape, **kwargs)
        self.dcft_settings = AdapterSettings(
            kernel_size, rank, alpha, dropout, orthogonality, factor_initializer, filter_initializer
        )

    @staticmethod
    def dcft_weight_shape_of(layer, input_shape=None) -> tuple:
        if not holds_integers(layer):
            return tuple(layer._kernel.shape)
        # Packed int4 kernels and calibrated ones are stored in other shapes.
        # By Keras's own method: what is carried has its build config in the wrapped serialisation.
        build_config = keras.layers.EinsumDense.get_build_config(layer)
        input_shape = input_shape or build_config["input_shape"]
        output_shape = layer.compute_output_shape(input_shape)
        return einsum_kernel_shape(layer.equation, input_shape, output_shape)

    @staticmethod
    def dcft_matrix_shape_of(layer, input_shape=None) -> tuple[int, int]:
        shape = DCFTEinsumDense.dcft_weight_shape_of(layer, input_shape)
        contracted, outputs = einsum_axes(layer.equation).sizes(shape)
        return math.prod(contracted), math.prod(outputs)

    @staticmethod
    def dcft_axes_of(layer) -> tuple[str, str, str]:
        axes = einsum_axes(layer.equation)
        return axes.contracted, axes.outputs, axes.kernel

    @staticmethod
    def dcft_from_matrix(layer, matrix):
        axes = einsum_axes(layer.equation)
        contracted, outputs = axes.sizes(DCFTEinsumDense.dcft_weight_shape_of(layer))
        tensor = ops.reshape(matrix, (*contracted, *outputs))
        order = axes.contracted + axes.outputs
        return ops.transpose(tensor, [order.index(c) for c in axes.kernel])

    @property
    def _dcft_is_matrix(self):
        return einsum_axes(self.equation).is_matrix_product

    def _dcft_product(self, inputs, kernel):
        is_in_graph = keras.config.backend() == "tensorflow" and not hasattr(inputs, "numpy")
        if not is_in_graph or not self._dcft_is_matrix:
            return ops.einsum(self.equation, inputs, kernel)
        # Keras's einsum on TensorFlow is a product for each row of the batch, which with its
        # gradient takes two to three times as long as one for all. It rounds otherwise in the last
        # bit, so eagerly, where nothing else does, the start stays equal to the base layer.
        contracted, outputs = einsum_axes(self.equation).sizes(kernel.shape)
        matrix = ops.reshape(kernel, (math.prod(contracted), math.prod(outputs)))
        rows = ops.reshape(inputs, (-1, matrix.shape[0]))
        leading = ops.shape(inputs)[: len(inputs.shape) - len(contracted)]
        return ops.reshape(ops.matmul(rows, matrix), (*leading, *outputs))

    def _dcft_increment_product(self, inputs):
        axes = einsum_axes(self.equation)
        contracted, outputs = axes.sizes(self.dcft_weight_shape_of(self))
        if axes.is_rows_product:
            return self._dcft_rows_product(inputs, len(contracted), outputs)
        input_factor, output_factor = self.dcft_adapter.thin_factors(self.compute_dtype)
        width = input_factor.shape[1]
        hidden = ops.einsum(
            axes.input_equation, inputs, ops.reshape(input_factor, (*contracted, width))
        )
        return ops.einsum(
            axes.output_equation, hidden, ops.reshape(output_factor, (width, *outputs))
        )
