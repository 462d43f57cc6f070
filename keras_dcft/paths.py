"""Walking a model: the path of each layer, and which paths a pattern selects."""

import re

from keras_dcft import keras_internals
from keras_dcft.layers import DCFTLayer


def walk(model) -> dict:
    """Every layer below a model by its path, parents before children, each layer once.

    A path joins layer names with `/` from the model down, and is the same in every process and on
    every backend. So names that Keras made up (`dense_7`) are counted anew among their siblings
    (`dense`, `dense_1`), and a backbone's name in front of a layer's is left out: many backbones of
    KerasHub put it there when they are given a name, as they are when they are loaded.
    """
    layers = {}
    seen = {id(model)}
    backbones = _names_of_backbones()

    def visit(parent, prefix, ancestors):
        if _is_keras_hub(parent):
            ancestors = (*ancestors, parent.name)
        for child in keras_internals.sublayers(parent):
            if id(child) in seen:
                continue
            seen.add(id(child))
            name = path = f"{prefix}{_chosen_name(child, (*ancestors, *backbones))}"
            number = 0
            while path in layers:
                number += 1
                path = f"{name}_{number}"
            layers[path] = child
            visit(child, f"{path}/", ancestors)

    visit(model, "", ())
    return layers


def _is_keras_hub(layer) -> bool:
    return any(cls.__module__.startswith("keras_hub.") for cls in type(layer).__mro__)


def _chosen_name(layer, prefixes):
    for cls in (type(layer), getattr(layer, "base_class", type(layer))):
        automatic = keras_internals.automatic_name(cls)
        if re.fullmatch(rf"{automatic}(_\d+)?", layer.name):
            return automatic
    for prefix in prefixes:
        if layer.name.startswith(f"{prefix}_"):
            return layer.name.removeprefix(f"{prefix}_")
    return layer.name


def _names_of_backbones() -> list:
    # A backbone need not be above its layers: DepthAnything takes them into a model of its own.
    names = {
        keras_internals.automatic_name(cls)
        for cls in keras_internals.classes_of_models()
        if any(base.__module__ == "keras_hub.src.models.backbone" for base in cls.__mro__)
    }
    return sorted(names, key=len, reverse=True)


def dcft_layers(model) -> list:
    """The DCFT layers of a model, each once."""
    return [layer for layer in walk(model).values() if isinstance(layer, DCFTLayer)]


def select(argument: str, selector, layers: dict) -> list:
    """The paths that a regular expression, a list of them or a predicate on layers selects.

    Args:
        argument: str, the argument's name for error messages.
        selector: None, str, list of str, or a function of a layer that returns a bool.
        layers: dict of the layers to choose from, by path.

    Raises:
        TypeError: if the selector is none of these.
        ValueError: if a pattern is malformed, or it or the predicate selects nothing.
    """
    if selector is None:
        return []
    if callable(selector):
        selected = [path for path, layer in layers.items() if selector(layer)]
        if not selected:
            raise ValueError(
                f"`{argument}` selects nothing: the function is false for every layer. It could "
                f"have selected {listed(layers)}."
            )
        return selected
    patterns = [selector] if isinstance(selector, str) else selector
    if not isinstance(patterns, (list, tuple)) or not all(isinstance(p, str) for p in patterns):
        raise TypeError(
            f"`{argument}` must be a regular expression, a list of them or a function of a layer. "
            f"Received: {argument}={selector!r}"
        )
    selected = set()
    for pattern in patterns:
        matches = matching(argument, pattern, layers)
        if not matches:
            raise ValueError(
                f"`{argument}` has a pattern that matches nothing. Received: {pattern!r}. It could "
                f"have matched {listed(layers)}."
            )
        selected.update(matches)
    return [path for path in layers if path in selected]


def with_sublayers(paths: list, layers: dict) -> list:
    """The given paths and those of everything below them, in the order of the walk."""
    roots = tuple(f"{path}/" for path in paths)
    chosen = set(paths)
    return [path for path in layers if path in chosen or path.startswith(roots)]


def matching(argument, pattern, layers):
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"`{argument}` must hold valid regular expressions: {error}. Received: {pattern!r}"
        ) from error
    return [path for path in layers if expression.search(path)]


def exact_patterns(*paths):
    return [f"^{re.escape(path)}$" for path in paths]


def listed(paths, most=20):
    paths = list(paths)
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    return ", ".join(f"'{path}'" for path in paths[:most]) + more
