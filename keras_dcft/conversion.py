"""Between a Keras layer and its DCFT layer: the same object, with another class."""

import functools

import keras

from keras_dcft import keras_internals
from keras_dcft.embeddings import DCFTEmbedding, DCFTReversibleEmbedding
from keras_dcft.layers import (
    ADAPTER_SETTINGS,
    ADAPTER_VARIABLES,
    DCFTDense,
    DCFTEinsumDense,
    DCFTLayer,
)

# By base class, subclasses before the classes that they come from.
DCFT_CLASSES = {
    cls.base_class: cls
    for cls in (DCFTDense, DCFTEinsumDense, DCFTReversibleEmbedding, DCFTEmbedding)
}
DENSE_CLASSES = (keras.layers.Dense, keras.layers.EinsumDense)

# What a DCFT class takes the place of. A subclass with one of its own computes something else.
REPLACED = ("__call__", "call", "quantized_call", "kernel", "embeddings", "quantize")


@functools.cache
def dcft_class(cls):
    """The DCFT class of a layer class, or None if there is none.

    A subclass of a Keras layer, KerasHub's or a user's, gets a made class, if it computes what the
    Keras layer does.
    """
    if issubclass(cls, DCFTLayer):
        return cls
    base = next((base for base in DCFT_CLASSES if issubclass(cls, base)), None)
    if base is None:
        return None
    if cls is base:
        return DCFT_CLASSES[base]
    if overridden(cls, base):
        return None
    attributes = {"base_class": cls, "__module__": __name__, "__doc__": cls.__doc__}
    return type(f"DCFT{cls.__name__}", (DCFT_CLASSES[base], cls), attributes)


def overridden(cls, base) -> list:
    """What a subclass of a Keras layer has of its own and an adapted layer would not use."""
    return [n for n in REPLACED if getattr(cls, n, None) is not getattr(base, n, None)]


def weight_of(layer):
    """The frozen weight, a variable, of a layer that is adapted or can be."""
    return dcft_class(type(layer)).weight_of(layer)


def weight_shape_of(layer) -> tuple:
    """The shape of a layer's weight before it was quantized, also if the layer is left out."""
    base = next(base for base in DCFT_CLASSES if isinstance(layer, base))
    return DCFT_CLASSES[base].weight_shape_of(layer)


def matrix_shape_of(layer) -> tuple[int, int]:
    """That shape as a matrix, (contracted axes, output axes)."""
    return dcft_class(type(layer)).matrix_shape_of(layer)


def adapt_layer(layer, owner=None, **settings):
    """Turns a built layer into its DCFT class, in place.

    Args:
        layer: a built layer whose class has a `dcft_class`.
        owner: a DCFT layer of the same frozen weight, whose adapter this one is to share, or None.
        **settings: the arguments of `DCFTLayer.configure_dcft`.
    """
    layer.__class__ = dcft_class(type(layer))
    with keras_internals.unlocked(layer):
        layer.configure_dcft(**settings)
        layer.add_adapter(owner)


def release_layer(layer):
    """Undoes `adapt_layer`: the base class again, without adapter; what was frozen stays frozen."""
    if not isinstance(layer, DCFTLayer):
        return
    keras_internals.unwrap_quantize(layer)
    for name in ADAPTER_VARIABLES:
        if hasattr(layer, name):
            keras_internals.remove_variable(layer, name)
    if getattr(layer, "dropout_seed", None) is not None:
        keras_internals.remove_seed_generator(layer, "dropout_seed")
    for name in ADAPTER_SETTINGS:
        layer.__dict__.pop(name, None)
    layer.__class__ = layer.base_class


def release_built(layer):
    """Turns a layer that was built as a DCFT layer into its base class, trainable."""
    names = (layer.weight_name, "bias", "reverse_embeddings")
    found = [getattr(layer, name, None) for name in names]
    variables = [v for v in found if v is not None and v.dtype not in ("int8", "uint8")]
    release_layer(layer)
    keras_internals.thaw_variables(layer, variables, [True] * len(variables))
