"""Names for the types in public signatures."""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import keras

# What is given a model gives back the same, of the class that it is to a type checker.
Model = TypeVar("Model", bound=keras.Model)

FilePath = str | os.PathLike[str]

KernelSize = int | str | dict[str, Any]

Layers = str | list[str] | tuple[str, ...] | Callable[[keras.Layer], bool] | None

Initializer = str | dict[str, Any] | Callable[..., Any] | None
