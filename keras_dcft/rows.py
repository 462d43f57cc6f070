"""A layer that is computed with values of its own for each row of the batch."""

import math

import keras
from keras import ops

from keras_dcft import increments, keras_internals
from keras_dcft.adapter import ADAPTER_VARIABLES
from keras_dcft.einsum import einsum_axes
from keras_dcft.layers.base import DCFTLayer
from keras_dcft.reclassing import DCFT_CLASSES, dcft_class, matrix_shape_of, weight_shape_of

NORMALIZATIONS = (
    keras.layers.LayerNormalization,
    keras.layers.BatchNormalization,
    keras.layers.GroupNormalization,
    keras.layers.RMSNormalization,
)


def takes_rows(layer) -> bool:
    """Whether a layer can be computed with weights of its own for each row."""
    if isinstance(layer, NORMALIZATIONS) or type(layer).__name__.endswith("Normalization"):
        return True
    return isinstance(layer, tuple(DCFT_CLASSES)) and dcft_class(type(layer)) is not None


class RowLayer:
    """What computes a layer with values of its own for each row of the batch.

    Attributes:
        layer: the layer.
        owner: id of the layer whose adapter it has.
        own: dict of the variables that have values by row, by their keys.
    """

    def __init__(self, layer, owner=None, scale=None):
        self.layer, self.own = layer, {}
        self.owner, self._scale = owner or id(layer), scale

    def __call__(self, values, of_adapter, inputs, *args, **kwargs):
        layer = self.layer
        is_table = isinstance(layer, keras.layers.Embedding)
        is_reverse = is_table and kwargs.get("reverse", bool(args and args[0]))
        has_increment = self._scale is not None and (not is_reverse or layer.tie_weights)
        own = {key: values[key] for key in self.own}
        outputs = self._base(own, has_increment, inputs, args, kwargs)
        if not has_increment:
            return outputs
        factors = [of_adapter[key] for key in ADAPTER_VARIABLES]
        outputs = outputs + self._increment(inputs, factors, is_table, is_reverse)
        if not is_table:
            # Into its own shape: TensorFlow 2.21 on CPUs fuses such a sum with a ReLU behind it and
            # breaks the graph, says so on many lines, and runs the graph unoptimized.
            outputs = ops.reshape(outputs, ops.shape(outputs))
            return outputs if layer.activation is None else layer.activation(outputs)
        if is_reverse:
            cap = layer.logit_soft_cap
            return outputs if cap is None else ops.multiply(ops.tanh(ops.divide(outputs, cap)), cap)
        if isinstance(layer, keras.layers.ReversibleEmbedding):
            keras_internals.set_mask(outputs, keras.layers.Embedding.compute_mask(layer, inputs))
        return outputs

    def _base(self, own, is_open, inputs, args, kwargs):
        """What the base layer makes of the inputs, if it is open without the activation or cap."""
        layer = self.layer
        is_known = isinstance(layer, tuple(DCFT_CLASSES))
        cls = dcft_class(type(layer)) if is_known else type(layer)
        cls = getattr(cls, "dcft_base_class", cls)
        hidden = layer.dcft_adapter.variables.values() if isinstance(layer, DCFTLayer) else ()
        view = keras_internals.view_as(layer, cls, without=hidden)
        for name in ("activation", "logit_soft_cap"):
            if is_open and name in vars(view):
                vars(view)[name] = None
        call = cls.call if layer.quantization_mode is None else cls.quantized_call
        if not own:
            return call(view, inputs, *args, **kwargs)

        def of_row(elements):
            of_inputs, *values = elements
            values = [ops.cast(v, self.own[key].dtype) for key, v in zip(own, values)]
            with keras_internals.traced_with([(self.own[k], v) for k, v in zip(own, values)]):
                return call(view, of_inputs, *args, **kwargs)

        count = ops.shape(next(iter(own.values())))[0]
        by_row = ops.reshape(inputs, (count, -1, *ops.shape(inputs)[1:]))
        outputs = ops.vectorized_map(of_row, (by_row, *own.values()))
        return ops.reshape(outputs, (-1, *ops.shape(outputs)[2:]))

    def _increment(self, inputs, factors, is_table, is_reverse):
        shape = matrix_shape_of(self.layer)
        if is_table and not is_reverse:
            indices = ops.cast(inputs, "int32")
            by_row = ops.reshape(indices, (ops.shape(factors[0])[0], -1))
            outputs = increments.looked_up_by_row(by_row, *factors, shape[1], self._scale)
            return ops.reshape(
                ops.cast(outputs, self.layer.compute_dtype), (*ops.shape(inputs), shape[1])
            )
        if is_table:
            a, b, kernel_filter = (ops.transpose(factor, (0, 2, 1)) for factor in factors)
            return self._product(inputs, 1, (b, a, kernel_filter), shape[:1])
        if isinstance(self.layer, keras.layers.Dense):
            return self._product(inputs, 1, factors, shape[1:])
        axes = einsum_axes(self.layer.equation)
        contracted, outputs = axes.sizes(weight_shape_of(self.layer))
        if axes.is_rows_product:
            return self._product(inputs, len(contracted), factors, outputs)
        of_inputs, rest = self.layer.equation.split(",")
        of_outputs = rest.split("->")[1]
        kept = [c for c in of_outputs if c not in axes.outputs]
        inputs = ops.transpose(inputs, [of_inputs.index(c) for c in [*kept, *axes.contracted]])
        product = self._product(inputs, len(contracted), factors, outputs)
        return ops.transpose(product, [[*kept, *axes.outputs].index(c) for c in of_outputs])

    def _product(self, inputs, contracted_axes, factors, output_sizes):
        """The products of inputs that end with what is contracted."""
        leading = ops.shape(inputs)[: len(inputs.shape) - contracted_axes]
        count = ops.shape(factors[0])[0]
        sizes = (*inputs.shape[: len(leading)], factors[0].shape[0])
        samples = -1 if None in sizes else math.prod(sizes[:-1]) // sizes[-1]
        width = math.prod(inputs.shape[len(leading) :])
        by_row = ops.reshape(inputs, (count, samples, width))
        outputs = increments.products_by_row(by_row, *factors, math.prod(output_sizes), self._scale)
        return ops.reshape(outputs, (*leading, *output_sizes))
