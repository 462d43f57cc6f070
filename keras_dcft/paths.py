"""Walking a model: the path of each layer, and which paths a pattern selects."""

import re
import sys

import keras

from keras_dcft import keras_internals
from keras_dcft.layers.base import DCFTLayer
from keras_dcft.settings import shortened


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
            name = path = f"{prefix}{_chosen_name(child, ancestors, backbones)}"
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


def _chosen_name(layer, ancestors, backbones):
    name = layer.name
    for cls in (type(layer), getattr(layer, "dcft_base_class", type(layer))):
        automatic = keras_internals.automatic_name(cls)
        stem, _, number = name.rpartition("_")
        if name == automatic or (stem == automatic and number.isdecimal()):
            return automatic
    for prefix in ancestors:
        if name.startswith(f"{prefix}_"):
            return name.removeprefix(f"{prefix}_")
    end = name.rfind("_")
    while end > 0:  # the longest first
        if name[:end] in backbones:
            return name[end + 1 :]
        end = name.rfind("_", 0, end)
    return name


def _names_of_backbones() -> set:
    # A backbone need not be above its layers: DepthAnything takes them into a model of its own.
    keras_hub = sys.modules.get("keras_hub")  # without it there are none
    classes = keras_internals.with_subclasses(keras_hub.models.Backbone) if keras_hub else ()
    return {keras_internals.automatic_name(cls) for cls in classes}


def with_itself(model) -> dict:
    """A model, under the path "", and every layer below it."""
    return {"": model, **walk(model)}


def dcft_layers(model) -> dict:
    """The adapted layers of a model by path, the model itself included."""
    layers = with_itself(model)
    return {path: layer for path, layer in layers.items() if isinstance(layer, DCFTLayer)}


def checked_model(model):
    """The model; raises TypeError if it is none."""
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"`model` must be a keras.Model. Received: model={shortened(repr(model))} of type "
            f"{type(model).__name__}"
        )
    return model


def required_dcft_layers(model) -> dict:
    """The adapted layers of a model by path; raises TypeError or ValueError if it has none."""
    layers = dcft_layers(checked_model(model))
    if not layers:
        raise ValueError(
            "Call `enable_dcft(model)` first: `model` must have DCFT layers. Received: model "
            f"'{model.name}' of type {type(model).__name__} with none."
        )
    return layers


def keras_paths(layers: dict) -> dict:
    """The walk's paths, each with the path of the names that Keras has for the same layers."""
    names = {}
    for path, layer in layers.items():
        parent = path.rpartition("/")[0]
        names[path] = f"{names[parent]}/{layer.name}" if parent else layer.name
    return names


def other_name(path: str, layer) -> str:
    """What Keras calls a layer, as in `model.summary()`; "" where its path ends with that."""
    return "" if path.rpartition("/")[2] == layer.name else layer.name


def named(path: str, layer) -> str:
    """A layer's path in quotes, for messages, and its name in Keras where that differs."""
    name = other_name(path, layer)
    return f"'{shortened(path)}'" + (f" (Keras calls it '{shortened(name)}')" if name else "")


def listed(paths, layers: dict) -> str:
    """Paths for a message, the first of them where they are many."""
    return joined(named(path, layers[path]) for path in paths) or "no layer"


def joined(texts, most: int = 300) -> str:
    """Texts with commas between them, as many as the first `most` characters take."""
    texts = [shortened(text, most) for text in texts]
    length, count = 0, 0
    while count < len(texts) and (not count or length + len(texts[count]) <= most):
        length += len(texts[count])
        count += 1
    more = f" and {len(texts) - count:,} more" if count < len(texts) else ""
    return ", ".join(texts[:count]) + more


def naming(paths, layers: dict) -> str:
    """Code for messages that selects these layers and no others, but for a gap where it must."""
    paths = list(paths)
    others = {name for path, name in keras_paths(layers).items() if path != name}
    if others.isdisjoint(paths):
        return f"[{joined(repr(f'^{re.escape(path)}$') for path in paths)}]"
    names = [layers[path].name for path in paths]
    if sum(layer.name in names for layer in layers.values()) > len(paths):
        return "lambda layer: layer in [...]"
    return f"lambda layer: layer.name in [{joined(map(repr, names))}]"


# Why a layer that there is cannot be selected, by argument.
REASONS = {
    "kernel_size": "is not adapted here",
    "trainable_layers": "has no weights",
}


def select(argument: str, selector, choices: dict, layers: dict) -> list:
    """The paths that a regular expression, a list of them or a predicate on layers selects.

    Args:
        argument: str, the argument's name for error messages.
        selector: None, str, list of str, or a function of a layer that returns a bool.
        choices: dict of the layers to choose from, by path.
        layers: dict of all layers of the model, by path.

    Raises:
        TypeError: if the selector is none of these.
        ValueError: if a pattern is malformed, selects nothing or is doubtful as in `matching`, or
            the predicate selects nothing.
    """
    if selector is None:
        return []
    if callable(selector):
        selected = [path for path, layer in choices.items() if selector(layer)]
        if not selected:
            raise ValueError(
                f"`{argument}` selects nothing: the function must be true for some layer of "
                f"{listed(choices, layers)}. Received: {argument}={shortened(repr(selector))}"
            )
        return selected
    patterns = [selector] if isinstance(selector, str) else selector
    if not isinstance(patterns, (list, tuple)) or not all(isinstance(p, str) for p in patterns):
        raise TypeError(
            f"`{argument}` must be a regular expression, a list of them or a function of a layer. "
            f"Received: {argument}={shortened(repr(selector))}"
        )
    selected = {path for p in patterns for path in matching(argument, p, choices, layers)}
    return [path for path in choices if path in selected]


def matching(argument: str, pattern: str, choices: dict, layers: dict, taken=()) -> list:
    """The paths in which a regular expression is found.

    Args:
        argument, choices, layers: as for `select`.
        pattern: str, the regular expression.
        taken: collection of the paths that this pattern does not decide about.

    Raises:
        ValueError: if the pattern is malformed, matches no path, or matches a layer by the name
            that Keras gave it and not by its path: copied from `model.summary()`, it would
            otherwise select another layer than the one meant.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"`{argument}` must hold valid regular expressions: {shortened(str(error))}. "
            f"Received: {shortened(repr(pattern))}"
        ) from error
    received = f"Received: {shortened(repr(pattern))}"
    names = keras_paths(layers)
    matches = [path for path in choices if expression.search(path)]
    by_name = [p for p in choices if expression.search(names[p]) and p not in {*matches, *taken}]
    if by_name:
        remedy = "for what Keras calls so write its path, or before this a pattern that takes it"
        if argument != "kernel_size":  # which takes no function, as the code may be
            remedy = f"for what Keras calls so write `{argument}={naming(by_name, layers)}`"
            if matches:
                remedy += f", for what has such a path `{argument}={naming(matches, layers)}`"
        raise ValueError(
            f"`{argument}` takes layers' paths, not names that Keras gives: {remedy}. {received}, "
            f"by path {listed(matches, layers)}, by Keras's name {listed(by_name, layers)}."
        )
    if matches:
        return matches
    could = f"It could have matched {listed(choices, layers)}."
    others = [p for p in layers if expression.search(p) or expression.search(names[p])]
    if not others:
        raise ValueError(f"`{argument}` has a pattern that matches nothing. {could} {received}")
    types = joined(
        f"{named(path, layers[path])} of type {type(layers[path]).__name__}"
        + ("" if layers[path].built else ", not built")
        for path in others
    )
    reason = REASONS.get(argument, "is not adaptable: DCFT adapts built dense and embedding layers")
    raise ValueError(
        f"`{argument}` has a pattern that matches no layer that it can choose. {could} {received}, "
        f"which matches {types}, which exists but {reason}."
    )


def with_sublayers(paths: list, layers: dict) -> list:
    """The given paths and those of everything below them, in the order of the walk."""
    roots = tuple(f"{path}/" if path else "" for path in paths)
    chosen = set(paths)
    return [path for path in layers if path in chosen or path.startswith(roots)]
