"""The one table of made classes: what an object's class becomes when it is adapted, and back.

Objects stay where they are and change their class, as PyTorch's `fully_shard` does it. A made class
knows the class that it was made of as `dcft_base_class`.
"""

import copyreg
import functools

import keras

from keras_dcft.layers.base import DCFTLayer
from keras_dcft.layers.dense import DCFTDense
from keras_dcft.layers.einsum_dense import DCFTEinsumDense
from keras_dcft.layers.embeddings import DCFTEmbedding, DCFTReversibleEmbedding

# By base class, subclasses before the classes that they come from.
DCFT_CLASSES = {
    cls.dcft_base_class: cls
    for cls in (DCFTDense, DCFTEinsumDense, DCFTReversibleEmbedding, DCFTEmbedding)
}

DENSE_CLASSES = (keras.layers.Dense, keras.layers.EinsumDense)

# What a DCFT class takes the place of. A subclass with one of its own computes something else.
REPLACED = ("__call__", "call", "quantized_call", "kernel", "embeddings", "quantize")


@functools.cache
def _metaclass(cls):
    """A class of classes, as `type` or `ABCMeta`, that pickle makes anew in another process."""
    made = type("Made", (cls,), {})
    copyreg.pickle(made, lambda made_class: (made_class.dcft_recipe, ()))
    return made


@functools.cache
def made_class(cls, *mixins, name=None, **attributes):
    """The class of a changed object of a class, made once.

    Args:
        cls: the object's own class.
        *mixins: classes that come before it.
        name: str, the name; that of the class if None, by which Keras names weights in files.
        **attributes: class attributes.
    """
    recipe = functools.partial(made_class, cls, *mixins, name=name, **attributes)
    attributes = {
        "dcft_base_class": cls,
        "dcft_recipe": staticmethod(recipe),
        "__module__": __name__,
        "__doc__": cls.__doc__,
        **attributes,
    }
    return _metaclass(type(cls))(name or cls.__name__, (*mixins, cls), attributes)


def dcft_class(cls):
    """The DCFT class that a layer class is adapted by, one of four; None if there is none.

    A subclass of a Keras layer, KerasHub's or a user's, is adapted as that layer, if it computes
    what that does.
    """
    base = next((base for base in DCFT_CLASSES if issubclass(cls, base)), None)
    if base is None or (not issubclass(cls, DCFTLayer) and overridden(cls, base)):
        return None
    return DCFT_CLASSES[base]


def overridden(cls, base) -> list:
    """What a subclass of a Keras layer has of its own and an adapted layer would not use."""
    return [n for n in REPLACED if getattr(cls, n, None) is not getattr(base, n, None)]


def weight_of(layer):
    """The frozen weight, a variable, of a layer that is adapted or can be."""
    return dcft_class(type(layer)).dcft_weight_of(layer)


def weight_owners(layers: dict) -> dict:
    """For each of these layers, by path, the path of the first that has the same weight."""
    first = {}
    return {path: first.setdefault(id(weight_of(layer)), path) for path, layer in layers.items()}


def weight_shape_of(layer) -> tuple:
    """The shape of a layer's weight before it was quantized, also if the layer is left out."""
    base = next(base for base in DCFT_CLASSES if isinstance(layer, base))
    return DCFT_CLASSES[base].dcft_weight_shape_of(layer)


def increment_of(layer, factors, scale):
    """An increment in the shape of a layer's weight, see `DCFTLayer.dcft_increment_of`."""
    return dcft_class(type(layer)).dcft_increment_of(layer, factors, scale)


def matrix_shape_of(layer) -> tuple[int, int]:
    """That shape as a matrix, (contracted axes, output axes)."""
    return dcft_class(type(layer)).dcft_matrix_shape_of(layer)
