"""Which layers are adapted, and with which kernel size: decided here, done elsewhere.

The decision is a plain dict, `dcft_config`, that can be printed and compared, and that is what a
saved model carries:

    {"rank": 1, "alpha": 16.0, "dropout": 0.0, "orthogonality": 0.0,
     "layers": {path: kernel size}, "trainable_layers": [path]}
"""

import re
import warnings

import keras

from keras_dcft import keras_internals
from keras_dcft.conversion import (
    DCFT_CLASSES,
    DENSE_CLASSES,
    dcft_class,
    matrix_shape_of,
    overridden,
    weight_of,
)
from keras_dcft.layers import DCFTLayer, check_settings, einsum_axes, holds_integers
from keras_dcft.paths import exact_patterns, listed, matching, select, walk, with_sublayers


def plan_adaptation(
    model,
    kernel_size,
    rank,
    alpha,
    dropout,
    orthogonality,
    target_layers=None,
    exclude_layers=None,
    trainable_layers=None,
) -> dict:
    """Decides what `enable_dcft` does to a model, or says why it cannot; changes nothing.

    The arguments are those of `enable_dcft`, but the model is the one to adapt (a task's backbone).

    Returns:
        A `dcft_config` as described at the top of this file.
    """
    sizes = kernel_size if isinstance(kernel_size, dict) else {"": kernel_size}
    if not sizes:
        raise ValueError("`kernel_size` must name at least one pattern. Received: kernel_size={}")
    for size in sizes.values():
        check_settings(size, rank, alpha, dropout, orthogonality)
    check_built(model)
    layers = walk(model)
    adapted = [path for path, layer in layers.items() if isinstance(layer, DCFTLayer)]
    if adapted:
        raise ValueError(
            "`model` already has DCFT layers; call `merge_dcft(model)` or `remove_dcft(model)` "
            f"before enabling DCFT anew. Received: model '{model.name}' with {listed(adapted)}."
        )
    candidates = {
        path: layer
        for path, layer in layers.items()
        if isinstance(layer, tuple(DCFT_CLASSES)) and layer.built
    }
    targets = [path for path, layer in candidates.items() if isinstance(layer, DENSE_CLASSES)]
    unbuilt = [
        path
        for path, layer in layers.items()
        if isinstance(layer, DENSE_CLASSES) and not layer.built
    ]
    experts = {path: layer for path, layer in layers.items() if _holds_experts(layer)}
    if target_layers is not None and candidates:
        candidates.update(experts)
        targets = select("target_layers", target_layers, candidates)
    if not targets:
        hint = f" Call the model on data first: {listed(unbuilt)} not built." if unbuilt else ""
        raise ValueError(
            "`model` must have at least one built Dense or EinsumDense layer to adapt. "
            f"Received: model '{model.name}' of type {type(model).__name__} with none.{hint}"
        )
    excluded = select("exclude_layers", exclude_layers, candidates)
    weighted = {path: layer for path, layer in layers.items() if layer.weights}
    trained = with_sublayers(select("trainable_layers", trainable_layers, weighted), layers)
    integers = [path for path in trained if holds_integers(layers[path])]
    if integers:
        raise ValueError(
            "`trainable_layers` must not name layers with quantized weights, which nothing can "
            f"train. Received: {listed(integers)}."
        )
    available = targets
    targets = [path for path in targets if path not in set(excluded) | set(trained)]
    if not targets:
        raise ValueError(
            "`exclude_layers` and `trainable_layers` leave no layer to adapt. Received: "
            f"exclude_layers={exclude_layers!r}, trainable_layers={trainable_layers!r} for "
            f"{listed(available)}."
        )
    targeted = {path: candidates[path] for path in targets}
    check_adaptable(targeted, layers)
    kernel_sizes = choose_kernel_sizes(sizes, targeted)
    _check_widths(sizes, kernel_sizes, targeted)
    _check_shared_sizes(kernel_sizes, targeted)
    if unbuilt:
        warnings.warn(
            f"Not built, and so left frozen instead of adapted: {listed(unbuilt)}. If the model "
            "uses them, call it on data in that way before it is adapted.",
            stacklevel=3,
        )
    return {
        "rank": rank,
        "alpha": float(alpha),
        "dropout": float(dropout),
        "orthogonality": float(orthogonality),
        "layers": kernel_sizes,
        "trainable_layers": trained,
    }


def checked_model(model):
    """The model; raises TypeError if it is none."""
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"`model` must be a keras.Model. Received: model={model!r} of type "
            f"{type(model).__name__}"
        )
    return model


def check_built(model):
    """Raises ValueError for a model whose layers have no kernels yet."""
    if not model.built:
        raise ValueError(
            "`model` must be built, its layers need their kernels. Call it on data or build it "
            f"with `model.build(input_shape)` first. Received: model '{model.name}', not built."
        )


def choose_kernel_sizes(sizes, targets) -> dict:
    """The kernel size of each targeted layer by its path, from patterns of which the first counts.

    Raises:
        ValueError: if a pattern matches nothing or a layer is left out.
    """
    for pattern in sizes:
        if not matching("kernel_size", pattern, targets):
            raise ValueError(
                f"`kernel_size` has a pattern that matches nothing. Received: {pattern!r}. It "
                f"could have matched {listed(targets)}."
            )
    chosen = {}
    for path in targets:
        size = next((size for pattern, size in sizes.items() if re.search(pattern, path)), None)
        if size is None:
            raise ValueError(
                "`kernel_size` must have a pattern for every targeted layer; the first that "
                f'matches counts, and a last ".*" matches the rest. Received: {sizes!r}, which '
                f"leaves out '{path}'."
            )
        chosen[path] = size
    return chosen


def narrower_than(kernel_sizes: dict, targets: dict) -> dict:
    """Matrix shapes, by path, of the targeted layers with a side below their kernel size."""
    shapes = {path: matrix_shape_of(layer) for path, layer in targets.items()}
    return {path: shape for path, shape in shapes.items() if kernel_sizes[path] > min(shape)}


def _check_widths(sizes, kernel_sizes, targets):
    too_small = narrower_than(kernel_sizes, targets)
    if too_small:
        names = exact_patterns(*too_small)
        shapes = ", ".join(f"'{path}' ({m} x {n})" for path, (m, n) in too_small.items())
        raise ValueError(
            "`kernel_size` must not be larger than the smaller side of a targeted layer's kernel. "
            f"Received: kernel_size={sizes.get('', sizes)} for {shapes}. Leave such layers frozen "
            f"with `exclude_layers={names}` or train them in full with "
            f"`trainable_layers={names}`."
        )


def check_adaptable(targets: dict, layers: dict):
    """Raises ValueError, with the reason, for layers that cannot be adapted.

    Args:
        targets: dict of the layers to adapt, by path.
        layers: dict of all layers of the model, by path.
    """
    for path, layer in targets.items():
        _check_class(path, layer)
        _check_weight(path, layer)
    _check_wrappers(targets, layers)
    _check_ties(targets, layers)


def _check_class(path, layer):
    cls, leave_out = type(layer), f"Leave it out with `exclude_layers={exact_patterns(path)}`."
    if _holds_experts(layer):
        raise ValueError(
            f"Layer '{path}' of type {cls.__name__} holds one matrix per expert, which DCFT does "
            f"not adapt: its code computes with these weights itself. {leave_out}"
        )
    if not isinstance(layer, tuple(DCFT_CLASSES)):
        raise ValueError(f"Layer '{path}' is no dense or embedding layer: {layer!r}")
    if dcft_class(cls) is None:
        base = next(base for base in DCFT_CLASSES if issubclass(cls, base))
        names = " and ".join(f"`{name}`" for name in overridden(cls, base))
        raise ValueError(
            f"Layer '{path}' is of type {cls.__name__}, a subclass of {base.__name__} with its own "
            f"{names}, which an adapted layer would not use. {leave_out}"
        )


def _check_weight(path, layer):
    if not layer.built:
        raise ValueError(f"Layer '{path}' cannot be adapted before it is built.")
    if layer.lora_enabled:
        raise ValueError(
            f"Layer '{path}' has Keras LoRA enabled; a layer is adapted either with LoRA or with "
            "DCFT. Load the model without LoRA first."
        )
    for name in ("kernel_constraint", "embeddings_constraint"):
        if getattr(layer, name, None) is not None:
            raise ValueError(
                f"Layer '{path}' has a {name.split('_')[0]} constraint, which a frozen weight plus "
                f"increment would not obey. Received: {name}={getattr(layer, name)!r}"
            )
    if isinstance(layer, keras.layers.EinsumDense):
        try:
            einsum_axes(layer.equation)
        except ValueError as error:
            raise ValueError(f"Layer '{path}' cannot be adapted: {error}") from error


def _check_wrappers(targets, layers):
    target_ids = {id(layer): path for path, layer in targets.items()}
    for wrapper in layers.values():
        if isinstance(wrapper, keras.layers.SpectralNormalization):
            path = target_ids.get(id(wrapper.layer))
            if path is not None:
                raise ValueError(
                    f"Layer '{path}' is inside SpectralNormalization, which rewrites the kernel "
                    "that DCFT keeps frozen. Leave it out with "
                    f"`exclude_layers={exact_patterns(path)}`."
                )


def _check_ties(targets, layers):
    """Layers that share a weight must share the increment too, or merging would change the rest."""
    shared = {}
    for path, layer in layers.items():
        for variable in keras_internals.own_weights(layer):
            shared.setdefault(id(variable), []).append(path)
    for path, layer in targets.items():
        for other in shared.get(id(weight_of(layer)), []):
            if other not in targets or _view(layers[other]) != _view(layer):
                raise ValueError(
                    f"Layers '{path}' and '{other}' share one weight, so they can only be adapted "
                    "together, and only if they use it in the same way. Leave them out with "
                    f"`exclude_layers={exact_patterns(path, other)}` or name both in `target_layers`."
                )


def _check_shared_sizes(kernel_sizes, targeted):
    owners = {}
    for path, layer in targeted.items():
        owner = owners.setdefault(id(weight_of(layer)), path)
        if kernel_sizes[path] != kernel_sizes[owner]:
            raise ValueError(
                f"`kernel_size` must be the same for '{owner}' and '{path}', which share one "
                f"weight. Received: {kernel_sizes[owner]} and {kernel_sizes[path]}."
            )


def _view(layer):
    return type(layer), getattr(layer, "equation", None)


def _holds_experts(layer) -> bool:
    """Whether a layer has 3-D weights of its own and is not one of Keras's, such as a Conv1D."""
    return not type(layer).__module__.startswith("keras.") and any(
        len(variable.shape) == 3 and min(variable.shape) > 1
        for variable in keras_internals.own_weights(layer)
    )
