"""Which layers are adapted, and with which kernel size: decided here, done elsewhere.

The decision is a plain dict, `dcft_config`, that can be printed and compared, and that is what a
saved model carries:

    {"rank": 1, "alpha": 16.0, "dropout": 0.0, "orthogonality": 0.0,
     "layers": {path: kernel size}, "trainable_layers": [path]}
"""

import warnings
from numbers import Integral

import keras

from keras_dcft import keras_internals
from keras_dcft.einsum import einsum_axes
from keras_dcft.increments import smallest_size
from keras_dcft.layers.base import holds_integers
from keras_dcft.paths import (
    joined,
    listed,
    matching,
    named,
    naming,
    select,
    shortened,
    walk,
    with_sublayers,
)
from keras_dcft.reclassing import (
    DCFT_CLASSES,
    DENSE_CLASSES,
    dcft_class,
    matrix_shape_of,
    overridden,
    weight_of,
    weight_owners,
)
from keras_dcft.settings import checked_positive_int

AUTO = "auto"


def plan_adaptation(
    model,
    kernel_size,
    settings,
    target_layers=None,
    exclude_layers=None,
    trainable_layers=None,
) -> dict:
    """Decides what `enable_dcft` does to a model, or says why it cannot; changes nothing.

    Args:
        model: the model to adapt (a task's backbone).
        settings: `AdapterSettings` of all adapters but for the kernel size.
        kernel_size, target_layers, exclude_layers, trainable_layers: as for `enable_dcft`.

    Returns:
        A `dcft_config` as described at the top of this file.
    """
    sizes = sizes_by_pattern("kernel_size", kernel_size)
    check_built(model)
    layers = walk(model)
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
    if target_layers is not None:
        candidates.update(experts)
        targets = select("target_layers", target_layers, candidates, layers)
        if not targets:
            raise ValueError(
                "`target_layers` must name a layer; leave it out to adapt every dense layer. "
                f"Received: target_layers={target_layers!r}"
            )
    if not targets:
        remedy = f"call the model on data first, {listed(unbuilt, layers)} not built. "
        raise ValueError(
            "`model` must have at least one built Dense or EinsumDense layer to adapt"
            f"{': ' + remedy if unbuilt else '. '}"
            f"Received: model '{model.name}' of type {type(model).__name__} with none."
        )
    excluded = select("exclude_layers", exclude_layers, candidates, layers)
    weighted = {path: layer for path, layer in layers.items() if layer.weights}
    trained = select("trainable_layers", trainable_layers, weighted, layers)
    trained = with_sublayers(trained, layers)
    integers = [path for path in trained if holds_integers(layers[path])]
    if integers:
        raise ValueError(
            "`trainable_layers` must not name layers with quantized weights, which nothing can "
            f"train. Received: {listed(integers, layers)}."
        )
    available = targets
    targets = [path for path in targets if path not in set(excluded) | set(trained)]
    if not targets:
        raise ValueError(
            "`exclude_layers` and `trainable_layers` must not name every targeted layer, they "
            "leave no layer to adapt. Received: "
            f"exclude_layers={shortened(repr(exclude_layers))}, "
            f"trainable_layers={shortened(repr(trainable_layers))} for "
            f"{listed(available, layers)}."
        )
    targeted = {path: candidates[path] for path in targets}
    check_adaptable(targeted, layers)
    kernel_sizes = choose_kernel_sizes(sizes, targeted, layers, settings.rank)
    _check_widths(sizes, kernel_sizes, targeted, layers)
    _check_shared_sizes(kernel_sizes, targeted)
    if unbuilt:
        warnings.warn(
            "If the model uses these layers, call it on data in that way before it is adapted. Not "
            f"built, and so left frozen instead of adapted: {listed(unbuilt, layers)}.",
            stacklevel=3,
        )
    return {**settings.common(), "layers": kernel_sizes, "trainable_layers": trained}


def sizes_by_pattern(argument: str, kernel_size) -> dict:
    """What is given as kernel size, as a dict of patterns to Python ints or "auto".

    Raises:
        TypeError: if it is neither an int or "auto" nor a dict of str to such.
        ValueError: if it is an empty dict or an int is below 1.
    """
    sizes = kernel_size if isinstance(kernel_size, dict) else {"": kernel_size}
    if not sizes:
        raise ValueError(f"`{argument}` must have at least one pattern. Received: {argument}={{}}")
    for pattern, size in sizes.items():
        is_size = type(size) is not bool and (isinstance(size, Integral) or size == AUTO)
        if not isinstance(pattern, str) or not is_size:
            place = f" at {shortened(repr(pattern))}" if isinstance(kernel_size, dict) else ""
            raise TypeError(
                f'`{argument}` must be an int, "auto", or a dict of regular expressions over layer '
                'paths to such, for example {"query": 4, ".*": 8}. '
                f"Received: {argument}={shortened(repr(size))}{place} of type "
                f"{type(size).__name__}"
            )
    return {
        pattern: size if size == AUTO else checked_positive_int(argument, size)
        for pattern, size in sizes.items()
    }


def check_built(model):
    """Raises ValueError for a model whose layers have no kernels yet."""
    if not model.built:
        raise ValueError(
            "`model` must be built: call it on data or `model.build(input_shape)` first, its "
            f"layers need their kernels. Received: model '{model.name}', not built."
        )


def choose_kernel_sizes(sizes: dict, targets: dict, layers: dict, rank: int) -> dict:
    """The kernel size of each targeted layer by its path, from patterns of which the first counts.

    Args:
        sizes: dict of regular expressions to ints or "auto".
        targets: dict of the targeted layers, by path.
        layers: dict of all layers of the model, by path.
        rank: int, for "auto".

    Raises:
        ValueError: if a pattern selects nothing, also because others come first, or a layer is
            left out.
    """
    first = {}  # the pattern that counts, by path
    for pattern in sizes:
        matches = matching("kernel_size", pattern, targets, layers, taken=first)
        earlier = {first[path]: None for path in matches if path in first}
        if all(path in first for path in matches):
            raise ValueError(
                f"`kernel_size` must have the pattern {shortened(repr(pattern))} before "
                f"{joined(shortened(repr(p)) for p in earlier)}, or not at all: the first that "
                f"matches a layer counts, and of {listed(matches, layers)} none is left. "
                f"Received: kernel_size={shortened(repr(sizes))}"
            )
        first.update((path, pattern) for path in matches if path not in first)
    missing = [path for path in targets if path not in first]
    if missing:
        raise ValueError(
            '`kernel_size` must have a pattern for every targeted layer; a last ".*" matches the '
            f"rest. Received: kernel_size={shortened(repr(sizes))}, which leaves out "
            f"{listed(missing, layers)}."
        )
    chosen = {path: sizes[first[path]] for path in targets}
    return {
        path: smallest_size(*matrix_shape_of(targets[path]), rank) if size == AUTO else size
        for path, size in chosen.items()
    }


def narrower_than(kernel_sizes: dict, targets: dict) -> dict:
    """Matrix shapes, by path, of the targeted layers with a side below their kernel size."""
    shapes = {path: matrix_shape_of(layer) for path, layer in targets.items()}
    return {path: shape for path, shape in shapes.items() if kernel_sizes[path] > min(shape)}


def _check_widths(sizes, kernel_sizes, targets, layers):
    too_small = narrower_than(kernel_sizes, targets)
    if too_small:
        names = naming(too_small, layers)
        shapes = joined(f"{named(p, layers[p])} ({m} x {n})" for p, (m, n) in too_small.items())
        raise ValueError(
            "`kernel_size` must not be larger than the smaller side of a targeted layer's kernel: "
            f"train such layers in full with `trainable_layers={names}`, as new ones have to be, "
            f"leave them frozen with `exclude_layers={names}`, or take "
            f"{min(map(min, too_small.values()))} at most. "
            f"Received: kernel_size={shortened(repr(sizes.get('', sizes)))} for {shapes}."
        )


def check_adaptable(targets: dict, layers: dict):
    """Raises ValueError, with the reason, for layers that cannot be adapted.

    Args:
        targets: dict of the layers to adapt, by path.
        layers: dict of all layers of the model, by path.
    """
    for path, layer in targets.items():
        leave_out = f"Leave it out with `exclude_layers={naming([path], layers)}`."
        _check_class(named(path, layer), layer, leave_out)
        _check_weight(named(path, layer), layer, leave_out)
    _check_wrappers(targets, layers)
    _check_ties(targets, layers)


def _check_class(name, layer, leave_out):
    cls = type(layer)
    if _holds_experts(layer):
        raise ValueError(
            f"{leave_out} Layer {name} of type {cls.__name__} holds one matrix per expert, which "
            "DCFT does not adapt: its code computes with these weights itself."
        )
    if not isinstance(layer, tuple(DCFT_CLASSES)):
        raise ValueError(f"Layer {name} is no dense or embedding layer. Received: {cls.__name__}")
    if dcft_class(cls) is None:
        base = next(base for base in DCFT_CLASSES if issubclass(cls, base))
        names = " and ".join(f"`{name}`" for name in overridden(cls, base))
        raise ValueError(
            f"{leave_out} Layer {name} is of type {cls.__name__}, a subclass of {base.__name__} "
            f"with its own {names}, which an adapted layer would not use."
        )


def _check_weight(name, layer, leave_out):
    if not layer.built:
        raise ValueError(f"Call the model on data first. Layer {name} is not built.")
    if layer.lora_enabled:
        raise ValueError(
            f"Load the model without LoRA first. Layer {name} has Keras LoRA enabled; a layer is "
            "adapted either with LoRA or with DCFT."
        )
    for argument in ("kernel_constraint", "embeddings_constraint"):
        constraint = getattr(layer, argument, None)
        if constraint is not None:
            raise ValueError(
                f"{leave_out} Layer {name} has a {argument.split('_')[0]} constraint, which a "
                "frozen weight plus increment would not obey. "
                f"Received: {argument}={shortened(repr(constraint))}"
            )
    if isinstance(layer, keras.layers.EinsumDense):
        try:
            einsum_axes(layer.equation)
        except ValueError as error:
            raise ValueError(f"{leave_out} Layer {name} cannot be adapted: {error}") from error


def _check_wrappers(targets, layers):
    target_ids = {id(layer): path for path, layer in targets.items()}
    for wrapper in layers.values():
        if isinstance(wrapper, keras.layers.SpectralNormalization):
            path = target_ids.get(id(wrapper.layer))
            if path is not None:
                raise ValueError(
                    f"Leave it out with `exclude_layers={naming([path], layers)}`. Layer "
                    f"{named(path, layers[path])} is inside SpectralNormalization, which rewrites "
                    "the kernel that DCFT keeps frozen."
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
                    f"Leave them out with `exclude_layers={naming([path, other], layers)}` or name "
                    f"both in `target_layers`. Layers {named(path, layer)} and "
                    f"{named(other, layers[other])} share one weight, so they can only be adapted "
                    "together, and only if they use it in the same way."
                )


def _check_shared_sizes(kernel_sizes, targeted):
    for path, owner in weight_owners(targeted).items():
        if kernel_sizes[path] != kernel_sizes[owner]:
            raise ValueError(
                f"`kernel_size` must be the same for {named(owner, targeted[owner])} and "
                f"{named(path, targeted[path])}, which share one weight. "
                f"Received: {kernel_sizes[owner]} and {kernel_sizes[path]}."
            )


def _view(layer):
    return _plain_type(layer), getattr(layer, "equation", None)


def _plain_type(layer):
    # A DCFT class is its own, and its base class that of the layer before.
    return getattr(layer, "dcft_base_class", type(layer))


def _holds_experts(layer) -> bool:
    """Whether a layer has 3-D weights of its own and is not one of Keras's, such as a Conv1D."""
    return not _plain_type(layer).__module__.startswith("keras.") and any(
        len(variable.shape) == 3 and min(variable.shape) > 1
        for variable in keras_internals.own_weights(layer)
    )
