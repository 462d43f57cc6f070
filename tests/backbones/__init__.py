"""Every backbone that KerasHub exports, in a tiny configuration with random weights."""

import dataclasses
from collections.abc import Callable

import keras
import keras_hub
import numpy as np

BATCH = 2
LENGTH = 6  # of every axis that a backbone leaves open
TOKENS = 17  # the vocabulary of every tiny text model


def random_inputs(model):
    """Inputs for a functional backbone, as its input tensors describe them."""
    rng = np.random.default_rng(3)

    def values(tensor):
        shape = (BATCH, *(LENGTH if size is None else size for size in tensor.shape[1:]))
        if "mask" in tensor.name:
            return np.ones(shape, tensor.dtype)
        if "int" in tensor.dtype:
            high = 2 if "segment" in tensor.name else TOKENS
            return rng.integers(0, high, shape).astype(tensor.dtype)
        return rng.uniform(size=shape).astype(tensor.dtype)

    return keras.tree.map_structure(values, model.input)


@dataclasses.dataclass(frozen=True)
class Tiny:
    """How to make one tiny backbone, and what to call it on.

    Attributes:
        arguments: gives the constructor's arguments; a function, since some are layers.
        inputs: gives inputs for the model.
    """

    arguments: Callable[[], dict]
    inputs: Callable = random_inputs


def make(name: str):
    """The tiny backbone of this class name, built, and inputs for it."""
    tiny = BACKBONES[name]
    model = getattr(keras_hub.models, name)(**tiny.arguments())
    return model, tiny.inputs(model)


def exported() -> list:
    """The class names of all backbones that KerasHub exports, some under two names."""
    return sorted(
        {
            value.__name__
            for value in vars(keras_hub.models).values()
            if isinstance(value, type) and issubclass(value, keras_hub.models.Backbone)
        }
        - {"Backbone"}
    )


from backbones.multimodal import MULTIMODAL  # noqa: E402
from backbones.text import TEXT  # noqa: E402
from backbones.vision import VISION  # noqa: E402

BACKBONES = dict(sorted({**TEXT, **VISION, **MULTIMODAL}.items()))
