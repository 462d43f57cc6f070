"""Whether a base is the one that an adapter was trained on: a few numbers of each frozen weight."""

import functools

import keras
import numpy as np
from keras import ops

from keras_dcft import keras_internals
from keras_dcft.einsum import einsum_axes
from keras_dcft.reclassing import dcft_class, matrix_shape_of, weight_of, weight_shape_of

SIZE = 8
# Of an embedding, whose vocabulary may have been resized.
MOST_ROWS = 64
# Between unrelated weights the numbers differ by 1.4 in the mean, between a weight and its int4
# version by 0.15.
TOLERANCE = 0.4


def fingerprint(layer) -> list:
    """Eight numbers of a built dense or embedding layer's weight.

    What the layer makes of an input of -1 and 1, which quantizing leaves exact, is projected on
    eight directions and divided by its length. So casting and quantizing change the numbers a
    little, another weight of the same statistics changes them as much as chance can.
    """
    base = dcft_class(type(layer)).dcft_base_class
    matrix = _matrix_in_place(layer)
    if matrix is not None:
        outputs = _signs(1, len(matrix)).astype("float32") @ matrix
    else:
        view = keras_internals.view_as(layer, base)
        for name in ("bias", "activation"):
            vars(view)[name] = None
        # By `__call__` where that casts the weights; it takes as long as the product itself.
        is_cast = layer.compute_dtype != layer.variable_dtype or layer.quantization_mode is not None
        outputs = (view if is_cast else view.call)(_inputs(layer))
        outputs = keras_internals.as_array(ops.cast(outputs, "float32"))
    outputs = outputs.astype("float64")
    if issubclass(base, keras.layers.Embedding):
        outputs = _signs(1, len(outputs)) @ outputs
    outputs = outputs.ravel()
    length = np.linalg.norm(outputs)
    projected = _signs(SIZE, outputs.size) @ outputs / (length or 1)
    return [round(float(number), 4) for number in projected]


def differs(found: list, expected: list) -> bool:
    """Whether two fingerprints are of different weights."""
    difference = np.subtract(found, expected)
    return not np.sqrt(np.mean(difference**2)) < TOLERANCE


def _matrix_in_place(layer):
    """The weight as a matrix by which the layer multiplies, if NumPy can read it where it lies.

    That takes a fraction of the time of calling the layer, by which other weights are read.
    """
    if isinstance(layer, keras.layers.Embedding) or layer.quantization_mode is not None:
        return None
    if (layer.compute_dtype, layer.variable_dtype) != ("float32", "float32"):
        return None
    equation = getattr(layer, "equation", None)
    if equation is not None and not einsum_axes(equation).is_matrix_product:
        return None
    weights = keras_internals.array_in_place(weight_of(layer))
    return None if weights is None else weights.reshape(matrix_shape_of(layer))


def _inputs(layer):
    shape = weight_shape_of(layer)
    if isinstance(layer, keras.layers.Embedding):
        return ops.arange(min(MOST_ROWS, shape[0]))
    if isinstance(layer, keras.layers.EinsumDense):
        size = dict(zip(einsum_axes(layer.equation).kernel, shape))
        axes = layer.equation.split(",")[0].replace("...", "")
        shape = [size.get(axis, 1) for axis in axes]
    else:
        shape = (1, shape[0])
    return ops.convert_to_tensor(_signs(*shape), dtype=layer.compute_dtype)


@functools.lru_cache(maxsize=16)  # blocks of a model have the same shapes
def _signs(*shape):
    # The generator whose numbers NumPy never changes.
    return np.random.RandomState(0).choice([-1.0, 1.0], size=shape).astype("int8")
