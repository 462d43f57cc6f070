"""`DCFTEmbedding` and `DCFTReversibleEmbedding`: a frozen table plus a learned DCFT increment.

A lookup is a product of one-hot rows with the table, so the increment of the looked-up rows is a
few rows of the factored form's input side times its output side; the projection back onto the
vocabulary is a product with the transposed table. Neither forms the (vocabulary, dim) increment.
"""

import dataclasses
from typing import Any

import keras
from keras import ops

from keras_dcft import freezing, keras_internals
from keras_dcft.layers.base import DCFTLayer, check_base_arguments
from keras_dcft.settings import DEFAULT_ALPHA, DEFAULT_KERNEL_SIZE, AdapterSettings
from keras_dcft.signatures import Initializer


class DCFTTable(DCFTLayer):
    """What the two embedding layers share."""

    dcft_weight_name = "_embeddings"

    @staticmethod
    def dcft_weight_shape_of(layer, input_shape=None) -> tuple:
        return (layer.input_dim, layer.output_dim)

    @staticmethod
    def dcft_own_settings(settings):
        # A lookup has no input to drop parts of.
        return dataclasses.replace(settings, dropout=0.0)

    def get_config(self):
        config = super().get_config()
        del config["dropout"]
        return config

    def build(self, input_shape=None):
        if not self.built:  # Keras's own returns as well when it is called again
            super().build(input_shape)

    @property
    def embeddings(self):
        """The effective table, see `dcft_effective_weight`."""
        return self.dcft_effective_weight()

    def _dcft_looked_up(self, inputs):
        rows = ops.take(self._dcft_constant(self._embeddings), inputs, axis=0)
        return self._dcft_with_increment(ops.cast(rows, self.compute_dtype), inputs)

    def _dcft_with_increment(self, rows, inputs):
        return ops.add(rows, self.dcft_adapter.rows(_integers(inputs), self.compute_dtype))


def _integers(inputs):
    is_integer = "int" in keras.backend.standardize_dtype(inputs.dtype)
    return inputs if is_integer else ops.cast(inputs, "int32")


@keras.saving.register_keras_serializable("keras_dcft")
class DCFTEmbedding(DCFTTable, keras.layers.Embedding):
    """A `keras.layers.Embedding` whose table is frozen and fine-tuned by DCFT.

    `enable_dcft` makes one of an `Embedding` only where `target_layers` names it. The increment of
    the rows that are looked up is worked out for them alone.

    Args:
        input_dim: int, size of the vocabulary.
        output_dim: int, size of the embedding.
        kernel_size, rank, alpha, orthogonality, factor_initializer, filter_initializer: as for
            `DCFTDense`, with the table as the kernel. There is no dropout: a lookup has no input
            to drop parts of.
        **kwargs: every other argument of `keras.layers.Embedding`.

    Input shape:
        `(batch, ...)`, integers.

    Output shape:
        `(batch, ..., output_dim)`.

    Raises:
        TypeError, ValueError: as `DCFTDense`, with `embeddings_constraint` for the constraint.

    Example:
        >>> layer = DCFTEmbedding(100, 16, kernel_size=8)
        >>> tuple(layer(keras.ops.ones((2, 5), "int32")).shape)
        (2, 5, 16)
        >>> [tuple(v.shape) for v in layer.trainable_variables]
        [(13, 1), (1, 2), (8, 8)]
    """

    dcft_base_class = keras.layers.Embedding

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        kernel_size: int = DEFAULT_KERNEL_SIZE,
        rank: int = 1,
        alpha: float = DEFAULT_ALPHA,
        orthogonality: float = 0.0,
        factor_initializer: Initializer = None,
        filter_initializer: Initializer = None,
        **kwargs: Any,
    ):
        check_base_arguments(kwargs)
        weights = kwargs.pop("weights", None)
        super().__init__(input_dim, output_dim, **kwargs)
        self.dcft_settings = AdapterSettings(
            kernel_size, rank, alpha, 0.0, orthogonality, factor_initializer, filter_initializer
        )
        if weights is not None:
            self.build()
            self._embeddings.assign(weights[0] if isinstance(weights, list) else weights)

    def call(self, inputs):
        return self._dcft_looked_up(_integers(inputs))

    def quantized_call(self, inputs):
        return self._dcft_with_increment(super().quantized_call(inputs), inputs)


@keras.saving.register_keras_serializable("keras_dcft")
class DCFTReversibleEmbedding(DCFTTable, keras.layers.ReversibleEmbedding):
    """A `keras.layers.ReversibleEmbedding` whose table is frozen and fine-tuned by DCFT.

    With tied weights the projection back onto the vocabulary, `layer(x, reverse=True)`, has the
    increment too, in factored form. With `tie_weights=False` it has a matrix of its own, which
    stays frozen without an increment.

    Args:
        input_dim, output_dim: as for `DCFTEmbedding`.
        tie_weights: bool, as for `keras.layers.ReversibleEmbedding`.
        kernel_size, rank, alpha, orthogonality, factor_initializer, filter_initializer: as for
            `DCFTEmbedding`.
        **kwargs: every other argument of `keras.layers.ReversibleEmbedding`.

    Raises:
        TypeError, ValueError: as `DCFTEmbedding`.

    Example:
        >>> layer = DCFTReversibleEmbedding(100, 16, kernel_size=8)
        >>> hidden = layer(keras.ops.ones((2, 5), "int32"))
        >>> tuple(layer(hidden, reverse=True).shape)
        (2, 5, 100)
    """

    dcft_base_class = keras.layers.ReversibleEmbedding

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        tie_weights: bool = True,
        kernel_size: int = DEFAULT_KERNEL_SIZE,
        rank: int = 1,
        alpha: float = DEFAULT_ALPHA,
        orthogonality: float = 0.0,
        factor_initializer: Initializer = None,
        filter_initializer: Initializer = None,
        **kwargs: Any,
    ):
        check_base_arguments(kwargs)
        super().__init__(input_dim, output_dim, tie_weights, **kwargs)
        self.dcft_settings = AdapterSettings(
            kernel_size, rank, alpha, 0.0, orthogonality, factor_initializer, filter_initializer
        )

    def call(self, inputs, reverse=False):
        if not reverse:
            outputs = self._dcft_looked_up(_integers(inputs))
            keras_internals.set_mask(outputs, keras.layers.Embedding.compute_mask(self, inputs))
            return outputs
        table = self._embeddings if self.tie_weights else self.reverse_embeddings
        kernel = self._dcft_constant(table)
        kernel = ops.transpose(kernel) if self.tie_weights else kernel
        dtype = self.reverse_dtype
        if dtype is not None:
            inputs, kernel = ops.cast(inputs, dtype), ops.cast(kernel, dtype)
        return self._dcft_capped(self._dcft_reversed(ops.matmul(inputs, kernel), inputs))

    def quantized_call(self, inputs, reverse=False):
        if not reverse:
            return self._dcft_with_increment(super().quantized_call(inputs), inputs)
        # Keras's quantized calls end with the cap, and the increment goes in before it.
        view = freezing.plain_view(self)
        view.__dict__["logit_soft_cap"] = None
        logits = self.dcft_base_class.quantized_call(view, inputs, reverse=True)
        return self._dcft_capped(self._dcft_reversed(logits, inputs))

    def _dcft_reversed(self, logits, inputs):
        if not self.tie_weights:
            return logits
        input_factor, output_factor = self.dcft_adapter.thin_factors(logits.dtype)
        hidden = ops.matmul(ops.cast(inputs, logits.dtype), ops.transpose(output_factor))
        return ops.add(logits, ops.matmul(hidden, ops.transpose(input_factor)))

    def _dcft_capped(self, logits):
        cap = self.logit_soft_cap
        return logits if cap is None else ops.multiply(ops.tanh(ops.divide(logits, cap)), cap)
