"""`DCFTEmbedding` and `DCFTReversibleEmbedding`: a frozen table plus a learned DCFT increment.

A lookup is a product of one-hot rows with the table, so the increment of the looked-up rows is a
few rows of the factored form's input side times its output side; the projection back onto the
vocabulary is a product with the transposed table. Neither forms the (vocabulary, dim) increment.
"""

import keras
from keras import ops

from keras_dcft import increments, keras_internals
from keras_dcft.layers import (
    DEFAULT_ALPHA,
    DEFAULT_KERNEL_SIZE,
    DCFTLayer,
    check_base_arguments,
)


class DCFTTable(DCFTLayer):
    """What the two embedding layers share."""

    weight_name = "_embeddings"

    @staticmethod
    def weight_shape_of(layer, input_shape=None) -> tuple:
        return (layer.input_dim, layer.output_dim)

    matrix_shape_of = weight_shape_of

    def configure_dcft(self, **settings):
        # A lookup has no input to drop parts of.
        super().configure_dcft(**{**settings, "dropout": 0.0})

    def get_config(self):
        config = super().get_config()
        del config["dropout"]
        return config

    def build(self, input_shape=None):
        if not self.built:  # Keras's own returns as well when it is called again
            super().build(input_shape)

    def _weight_from_matrix(self, matrix):
        return matrix

    @property
    def embeddings(self):
        """The effective table, see `effective_weight`."""
        return self.effective_weight()

    def _looked_up(self, inputs):
        rows = ops.take(self._frozen(self._embeddings), inputs, axis=0)
        return self._with_increment(ops.cast(rows, self.compute_dtype), inputs)

    def _with_increment(self, rows, inputs):
        inputs = _integers(inputs)
        d = self.kernel_size
        # Row (i, u) of the input side is `scale · A[i, ρ] · K[u, v]`.
        from_a = ops.take(self.dcft_a, ops.floor_divide(inputs, d), axis=0)
        from_filter = ops.take(self.dcft_filter, ops.mod(inputs, d), axis=0)
        product = self.scale * from_a[..., :, None] * from_filter[..., None, :]
        input_rows = ops.reshape(product, (*ops.shape(inputs), self.rank * d))
        output_factor = increments.expand_output_factor(
            ops.convert_to_tensor(self.dcft_b), d, self.output_dim
        )
        increment = ops.matmul(
            ops.cast(input_rows, self.compute_dtype), ops.cast(output_factor, self.compute_dtype)
        )
        return ops.add(rows, increment)


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

    base_class = keras.layers.Embedding

    def __init__(
        self,
        input_dim,
        output_dim,
        kernel_size=DEFAULT_KERNEL_SIZE,
        rank=1,
        alpha=DEFAULT_ALPHA,
        orthogonality=0.0,
        factor_initializer=None,
        filter_initializer=None,
        **kwargs,
    ):
        check_base_arguments(kwargs)
        weights = kwargs.pop("weights", None)
        super().__init__(input_dim, output_dim, **kwargs)
        self.configure_dcft(
            kernel_size=kernel_size,
            rank=rank,
            alpha=alpha,
            orthogonality=orthogonality,
            factor_initializer=factor_initializer,
            filter_initializer=filter_initializer,
        )
        if weights is not None:
            self.build()
            self._embeddings.assign(weights[0] if isinstance(weights, list) else weights)

    def call(self, inputs):
        return self._looked_up(_integers(inputs))

    def quantized_call(self, inputs):
        return self._with_increment(super().quantized_call(inputs), inputs)


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

    base_class = keras.layers.ReversibleEmbedding

    def __init__(
        self,
        input_dim,
        output_dim,
        tie_weights=True,
        kernel_size=DEFAULT_KERNEL_SIZE,
        rank=1,
        alpha=DEFAULT_ALPHA,
        orthogonality=0.0,
        factor_initializer=None,
        filter_initializer=None,
        **kwargs,
    ):
        check_base_arguments(kwargs)
        super().__init__(input_dim, output_dim, tie_weights, **kwargs)
        self.configure_dcft(
            kernel_size=kernel_size,
            rank=rank,
            alpha=alpha,
            orthogonality=orthogonality,
            factor_initializer=factor_initializer,
            filter_initializer=filter_initializer,
        )

    def call(self, inputs, reverse=False):
        if not reverse:
            outputs = self._looked_up(_integers(inputs))
            keras_internals.set_mask(outputs, keras.layers.Embedding.compute_mask(self, inputs))
            return outputs
        table = self._embeddings if self.tie_weights else self.reverse_embeddings
        kernel = self._frozen(table)
        kernel = ops.transpose(kernel) if self.tie_weights else kernel
        dtype = self.reverse_dtype
        if dtype is not None:
            inputs, kernel = ops.cast(inputs, dtype), ops.cast(kernel, dtype)
        return self._capped(self._with_reverse_increment(ops.matmul(inputs, kernel), inputs))

    def quantized_call(self, inputs, reverse=False):
        if not reverse:
            return self._with_increment(super().quantized_call(inputs), inputs)
        # Keras's quantized calls end with the cap, and the increment goes in before it.
        view = self.plain_view()
        view.__dict__["logit_soft_cap"] = None
        logits = self.base_class.quantized_call(view, inputs, reverse=True)
        return self._capped(self._with_reverse_increment(logits, inputs))

    def _with_reverse_increment(self, logits, inputs):
        if not self.tie_weights:
            return logits
        input_factor, output_factor = self._expanded_factors(logits.dtype)
        hidden = ops.matmul(ops.cast(inputs, logits.dtype), ops.transpose(output_factor))
        return ops.add(logits, ops.matmul(hidden, ops.transpose(input_factor)))

    def _capped(self, logits):
        cap = self.logit_soft_cap
        return logits if cap is None else ops.multiply(ops.tanh(ops.divide(logits, cap)), cap)
