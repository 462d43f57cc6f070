"""The verbs: what a user does to a model."""

import contextlib
import warnings
from collections.abc import Iterator

import keras
import numpy as np

from keras_dcft import freezing, keras_internals, layouts, lora, named, rates, selection, shares
from keras_dcft.hub import head_config, is_task, task_backbone
from keras_dcft.layers.base import holds_integers
from keras_dcft.models import (
    adapt,
    adapter_names,
    carry,
    release_all,
    the_name,
    trained_in_full,
)
from keras_dcft.paths import checked_model, joined, naming, required_dcft_layers, walk, with_itself
from keras_dcft.paths import named as named_layer
from keras_dcft.planning import plan_adaptation
from keras_dcft.settings import (
    DEFAULT_ALPHA,
    DEFAULT_KERNEL_SIZE,
    AdapterSettings,
    checked_number,
    shortened,
)
from keras_dcft.shares import DEFAULT_NAME
from keras_dcft.signatures import Initializer, KernelSize, Layers, Model

SMALL_SHARE = 0.1  # of a model's parameters, below which adapting it is hardly what was meant


def enable_dcft(
    model: Model,
    kernel_size: KernelSize = DEFAULT_KERNEL_SIZE,
    *,
    rank: int = 1,
    alpha: float = DEFAULT_ALPHA,
    dropout: float = 0.0,
    orthogonality: float = 0.0,
    factor_initializer: Initializer = None,
    filter_initializer: Initializer = None,
    target_layers: Layers = None,
    exclude_layers: Layers = None,
    trainable_layers: Layers = None,
    name: str = DEFAULT_NAME,
) -> Model:
    """Freezes a model and adapts its dense layers with DCFT (arXiv 2503.01419), in place.

    Every targeted `Dense` becomes a `DCFTDense` and every `EinsumDense` a `DCFTEinsumDense`, and an
    embedding that `target_layers` names a `DCFTEmbedding` or `DCFTReversibleEmbedding`: the same
    objects at the same places, with three small trainable variables each. Everything else is
    frozen, and stays so when `trainable` is set on the model or on a layer, but for
    `trainable_layers` and, in a KerasHub task, the head: there the backbone is adapted and what
    lies outside of it trained in full. The start is exactly the base model. A model that was
    compiled, fitted or used before need not be compiled again; its optimizer starts afresh.

    DCFT wants a larger learning rate than full fine-tuning: start at 5e-3 with Adam. A KerasHub
    task that has the optimizer it was born with, or one just like it, or is compiled with
    `optimizer="auto"`, gets this rate; `fit` warns of a rate of Adam below a tenth of it.

    Warnings tell of a model of which little is adapted, and of a last layer that looks new and
    would stay as it is, outside of KerasHub's tasks: name it in `trainable_layers`.

    Args:
        model: a built `keras.Model`: a KerasHub task or backbone, a Sequential, functional,
            nested or subclassed model.
        kernel_size: int, "auto", or a dict of regular expressions over layer paths to such, of
            which the first that matches a layer counts. Larger means fewer trainable numbers,
            `rank * (ceil(in / d) + ceil(out / d)) + d**2` for a kernel of `in x out`, up to the
            size of the fewest, which "auto" takes for each layer by itself.
        rank: int, rank inside the subspace; 1 in the paper.
        alpha: float, the increment's scale is `alpha / rank`.
        dropout: float in [0, 1), dropout on the increments' inputs while training.
        orthogonality: float, the paper's γ (0.1 there). Adds
            `γ/2n · Σ (‖AᵀA − I‖_F + ‖BBᵀ − I‖_F)` over the n adapted layers to the loss.
        factor_initializer: initializer of `dcft_a` and `dcft_b`; N(0, 0.01²) if None.
        filter_initializer: initializer of `dcft_filter`; zeros if None.
        target_layers: which Dense, EinsumDense and embedding layers to adapt: a regular expression
            that is searched for in layer paths, a list of them, or a function of a layer that
            returns a bool. Defaults to every Dense and EinsumDense of the backbone, or of the model
            outside KerasHub, and no embedding.
        exclude_layers: which of them to leave frozen, given likewise.
        trainable_layers: which layers, of any kind, to train in full instead, given likewise.
        name: str, the adapter's name. A model that has adapters gets another under a new name,
            with layers and settings of its own; it computes when `activate_dcft` says so.

    Returns:
        The model. Its `dcft_config` tells what was done, `dcft_adapters` that of each adapter.

    Raises:
        TypeError: if an argument is of the wrong type (a bool or float for an int).
        ValueError: if the model is not built, has no dense layer or has an adapter of that name;
            if a pattern matches nothing; if a kernel size is below 1 or exceeds a side of a
            targeted kernel; if a targeted layer has LoRA or a constraint, computes something else
            than its Keras class, or holds one matrix per expert. The model is unchanged then.

    Example:
        >>> model = keras.Sequential([keras.Input((32,)), keras.layers.Dense(64)])
        >>> enable_dcft(model, kernel_size=8).dcft_config["layers"]
        {'dense': 8}
        >>> [tuple(v.shape) for v in model.trainable_variables]
        [(4, 1), (1, 8), (8, 8)]
    """
    part = task_backbone(checked_model(model))
    names = adapter_names(model)
    if named.checked_name(name) in names:
        raise ValueError(
            "`name` must be a new one, or call `merge_dcft(model)` or `remove_dcft(model)` first: "
            f"model '{model.name}' already has the adapters {joined(map(repr, names))}. "
            f"Received: name={shortened(repr(name))}"
        )
    settings = AdapterSettings(
        1, rank, alpha, dropout, orthogonality, factor_initializer, filter_initializer
    )
    layers = (target_layers, exclude_layers, trainable_layers)
    config = plan_adaptation(part, kernel_size, settings, *layers)
    if target_layers is None:
        all_layers = walk(part)
        _warn_of_small_share(all_layers, config)
        if not names and not is_task(model):  # the head of a task is trained in full
            _warn_of_new_head(all_layers, config)
    if names:
        with selection.calls.changing():
            named.add(model, part, config, settings, name)
    else:
        adapt_and_reset(model, part, {**config, "active": name}, settings)
    return model


def adapt_and_reset(model, part, config, settings=AdapterSettings()):  # noqa: B008 (frozen)
    """Adapts a part of a model and has every model that holds it carry it and compile anew."""
    with selection.calls.changing(), keras_internals.strategy_scope(part):
        holders = _holders(model, with_itself(part).values())
        try:
            adapt(part, config, settings)
            if is_task(model) and part is model.backbone:
                active = config.get("active", DEFAULT_NAME)
                adapt(model, {**head_config(model), "active": active})
                _warn_of_integers(model)
            carry(holders)
        except BaseException:  # an interrupt from the keyboard as well
            release_all(model, holders)
            raise
        _reset(holders)


def _reset(holders):
    """Makes models compile anew, and PyTorch see their present variables."""
    for holder in holders:
        keras_internals.reset_compiled_state(holder)
        keras_internals.track_torch_parameters(with_itself(holder).values())
        if not is_task(holder):
            continue
        if adapter_names(holder):
            rates.choose(holder)
        else:
            rates.put_back(holder)


def _holders(model, layers):
    """A model and every other that holds one of these layers."""
    found = keras_internals.models_holding(layers)
    return [model, *(holder for holder in found if holder is not model)]


def _warn_of_small_share(layers, config):
    sizes = {
        path: shares.size(keras_internals.own_weights(layer)) for path, layer in layers.items()
    }
    covered = {*config["layers"], *config["trainable_layers"]}
    share, total = sum(sizes[path] for path in covered), sum(sizes.values())
    if share < SMALL_SHARE * total:
        frozen = [path for path, size in sizes.items() if size and path not in covered]
        frozen = sorted(frozen, key=sizes.get, reverse=True)[:5]
        kinds = (f"{named_layer(p, layers[p])} ({type(layers[p]).__name__})" for p in frozen)
        warnings.warn(
            f"Little of the model is adapted: layers with {100 * share / total:.2g} % of its "
            f"{total:,} parameters. Frozen are, among others, {joined(kinds)}. DCFT adapts dense "
            "layers; train others in full with `trainable_layers`.",
            stacklevel=3,
        )


def _warn_of_new_head(layers, config):
    """Warns of a last layer that nobody has trained, which adapting would keep as it is.

    Its bias is zero as it was made, and none is of the layers before; where one is, they may be
    new as well. Of several new heads that says nothing.
    """
    *others, last = config["layers"] or [None]
    if not others or config["trainable_layers"]:
        return
    if _is_new(layers[last]) and not any(_is_new(layers[path]) for path in others):
        warnings.warn(
            f"Layer {named_layer(last, layers[last])} looks new: its bias is zero. It is frozen "
            "now, with an adapter. Train a new head in full: `remove_dcft(model)`, then "
            f"`enable_dcft(model, trainable_layers={naming([last], layers)})`.",
            stacklevel=3,
        )


def _is_new(layer) -> bool:
    bias = getattr(layer, "bias", None)
    return bias is not None and not keras_internals.as_array(bias).any()


def _warn_of_integers(task):
    head = head_config(task)["trainable_layers"]
    integers = [
        path for path, layer in walk(task).items() if path in head and holds_integers(layer)
    ]
    if integers:
        warnings.warn(
            f"The quantized weights of {joined(integers)}, outside of the backbone, cannot be "
            "trained. Quantize `task.backbone` instead to have the task's head trained in full.",
            stacklevel=4,
        )


def activate_dcft(model: Model, name: str | None) -> Model:
    """Makes one of a model's adapters compute and train, its head and named layers with it.

    The others wait, and cost their memory and nothing else. Where the adapter has the layers and
    settings of the one before, numbers are exchanged in place: functions that were compiled before
    go on and see it. Otherwise the next call traces anew. The model's optimizer starts afresh; so
    activate on the model that is fitted, not on a part of it.

    Args:
        model: a model with adapters, adapted by `enable_dcft` with names. Of a model around several
            adapted ones, those that have an adapter of this name change.
        name: str, one of `model.dcft_adapters`; None for the base model, which trains nothing.

    Returns:
        The model.

    Raises:
        TypeError, ValueError: if `model` is no Keras model, has no DCFT layers or no adapter of
            that name, or inside `dcft_disabled`. The model is unchanged then.
        RuntimeError: inside a prediction of an adapted model.

    Example:
        >>> model = keras.Sequential([keras.Input((32,)), keras.layers.Dense(64)])
        >>> model = enable_dcft(enable_dcft(model), kernel_size=4, name="legal")
        >>> activate_dcft(model, "legal").dcft_config["layers"]
        {'dense': 4}
    """
    with selection.calls.changing():
        layers = _own_dcft_layers(model)
        if name is not None:
            the_name(model, named.checked_name(name))
        with keras_internals.strategy_scope(model):
            named.activate(model, name, lambda: _holders(model, layers.values()))
    return model


def merge_dcft(
    model: Model, name: str | None = None, *, weights: dict[str, float] | None = None
) -> Model:
    """Folds the increments into the kernels: plain Keras layers again that compute the same.

    Nothing of this package is needed to load what the model then saves. In float32 its predictions
    equal the adapted model's to rounding. A bfloat16 or float16 kernel cannot hold base plus
    increment: the sum is worked out in float32 and rounded to the kernel's dtype, which drops an
    increment's part below the kernel's last bit.

    Args:
        model: any model that holds adapted layers: one adapted with `enable_dcft`, a part of it
            (the rest stays adapted), one around it, or one with directly built DCFT layers.
        name: str, the adapter to merge, where there are several; the others are dropped, as they
            were trained on another base than the model then is.
        weights: dict of adapters' names to numbers, to merge a sum instead: the base, and of each
            adapter so much of what it changed, heads and named layers included.

    Returns:
        The model, its layers and itself of their original classes, trainable as before enabling.

    Raises:
        TypeError, ValueError: if `model` is no Keras model or has no DCFT layers, if `name` or
            `weights` name no adapter, if an adapter has NaN or infinity, if a kernel is quantized
            to integers, or inside `dcft_disabled`. The model is unchanged then.
        RuntimeError: inside a prediction of an adapted model.

    Example:
        >>> model = keras.Sequential([keras.Input((32,)), keras.layers.Dense(64)])
        >>> merge_dcft(enable_dcft(model)) is model
        True
        >>> type(model.layers[0]) is keras.layers.Dense
        True
    """
    with selection.calls.changing():
        layers = _own_dcft_layers(model)
        weights = _checked_weights(model, name, weights)
        quantized = [path for path, layer in layers.items() if holds_integers(layer)]
        if quantized:
            raise ValueError(
                "Save the adapter with `save_dcft_weights`, load it into the model before it was "
                "quantized, merge there, and quantize that: base plus increment would be rounded "
                "to integers a second time. Received: `model` with quantized layers "
                f"{joined(quantized)}."
            )
        named.check_finite(model, weights)
        with keras_internals.strategy_scope(model):
            holders = _holders(model, layers.values())
            named.merge(model, weights, holders)
            _reset(holders)
    return model


def _checked_weights(model, name, weights) -> dict:
    if weights is None:
        return {the_name(model, name): 1.0}
    if name is not None:
        raise ValueError(f"`name` must not be given beside `weights`. Received: name={name!r}")
    if not isinstance(weights, dict) or not weights:
        raise TypeError(
            '`weights` must be a dict of adapters\' names to numbers, such as {"legal": 0.7, '
            f'"default": 0.3}}. Received: weights={shortened(repr(weights))}'
        )
    checked = {the_name(model, n): checked_number(f"weights[{n!r}]", w) for n, w in weights.items()}
    if not np.isfinite(list(checked.values())).all():
        raise ValueError(f"`weights` must be finite. Received: weights={shortened(repr(weights))}")
    return checked


def remove_dcft(model: Model, name: str | None = None) -> Model:
    """Drops the increments: the base model back, bit for bit, trainable as before enabling.

    Args:
        model: as for `merge_dcft`.
        name: str, the one adapter to drop; the others stay, and where it was the active one the
            base model computes until another is activated. All are dropped if None.

    Returns:
        The model. When the last adapter has gone, its layers and itself are of their original
        classes.

    Raises:
        TypeError, ValueError, RuntimeError: as `merge_dcft`, but for the adapters' values and the
            kernels' integers, which may be anything.

    Example:
        >>> model = keras.Sequential([keras.Input((32,)), keras.layers.Dense(64)])
        >>> type(remove_dcft(enable_dcft(model)).layers[0]) is keras.layers.Dense
        True
    """
    with selection.calls.changing():
        layers = _own_dcft_layers(model)
        with keras_internals.strategy_scope(model):
            if name is not None and adapter_names(model) != [the_name(model, name)]:
                named.drop(model, name, lambda: _holders(model, layers.values()))
            else:
                holders = _holders(model, layers.values())
                release_all(model, holders, put_back=True)
                _reset(holders)
    return model


def convert_to_lora(model: Model, name: str | None = None) -> Model:
    """Gives layers Keras's own LoRA, of rank `rank * kernel_size`, in place of an adapter.

    The model computes the same, is of Keras's own classes and needs nothing of this package. What
    was trained, the head and `trainable_layers` too, stays trainable, and the rest frozen. Keras's
    files know of a layer's `trainable` and not of a variable's: in a model that was saved and
    loaded, biases of layers with LoRA are trained as well.

    Args:
        model: a model adapted on `Dense` and embedding layers, and on such `EinsumDense` layers
            as have one output axis, the kernel's last.
        name: str, the adapter, where there are several; the others are dropped.

    Returns:
        The model.

    Raises:
        TypeError, ValueError: as `merge_dcft`, if `model.trainable` is False, and if an adapted
            layer's increment does not have the form of Keras's LoRA; the message names it. Integers
            are no hindrance. The model is unchanged then.
        RuntimeError: inside a prediction of an adapted model.

    Example:
        >>> model = keras.Sequential([keras.Input((32,)), keras.layers.Dense(64)])
        >>> model = convert_to_lora(enable_dcft(model, kernel_size=4))
        >>> tuple(model.layers[0].lora_kernel_a.shape)
        (32, 4)
    """
    with selection.calls.changing():
        layers = _own_dcft_layers(model)
        name = the_name(model, name)
        if not model.trainable:
            raise ValueError(
                "Set `model.trainable = True` first, which says what of it is trained. Received: "
                f"model '{model.name}' with trainable=False"
            )
        everything = with_itself(model)
        adapted = {
            path: layer
            for path, layer in everything.items()
            if name in shares.names_of(layer) and shares.settings_of(layer, name) is not None
        }
        lora.check_convertible(adapted, everything)
        named.check_finite(model, [name])
        factors = lora.lora_factors(adapted, name)
        with keras_internals.strategy_scope(model):
            holders = _holders(model, layers.values())
            named.activate(model, name, lambda: holders)
            lora.convert(model, factors, holders)
            _reset(holders)
    return model


def shard_adapters(
    layout_map: keras.distribution.LayoutMap, model: keras.Model
) -> keras.distribution.LayoutMap:
    """Has the active adapter's factors lie on the devices of a mesh as their layers' weights do.

    Without it each device has all adapters, whatever patterns the map has. With it the rows of A
    lie as the weight's input axis and the columns of B as its output axis; a factor whose rows or
    columns cannot be divided so stays whole on every device, the filter in any case. It computes
    the same. The map gets an entry for the path of each factor, so that what is loaded or activated
    later under a distribution with this map lies so, too. The optimizer starts afresh.

    Args:
        layout_map: the map that the model was made with, in the scope of a
            `keras.distribution.ModelParallel`.
        model: an adapted model.

    Returns:
        The map.

    Raises:
        TypeError, ValueError: if `layout_map` is no map or the model was not made with its mesh, if
            `model` is no Keras model or has no DCFT layers, or inside `dcft_disabled`. Map and
            model are unchanged then.
        RuntimeError: inside a prediction of an adapted model.

    Example:
        >>> with keras.distribution.ModelParallel(layout_map=layout_map).scope():  # doctest: +SKIP
        ...     model = keras_hub.models.GemmaCausalLM.from_preset("gemma2_27b_en")
        ...     shard_adapters(layout_map, enable_dcft(model))
    """
    if not isinstance(layout_map, keras.distribution.LayoutMap):
        raise TypeError(
            "`layout_map` must be a `keras.distribution.LayoutMap`. "
            f"Received: layout_map={shortened(repr(layout_map))}"
        )
    with selection.calls.changing():
        layers = _own_dcft_layers(model)
        chosen = {}
        for path, layer in layers.items():
            weight_layout = layouts.layout_of(layer.dcft_frozen_weight())
            mesh = weight_layout and weight_layout.device_mesh
            if mesh is None or not layouts.is_same_mesh(mesh, layout_map.device_mesh):
                raise ValueError(
                    "`layout_map` must have the mesh that the model was made with, in the scope of "
                    "a `keras.distribution.ModelParallel`. "
                    f"Received: model '{model.name}' with '{path}' on the mesh {mesh}."
                )
            axes = layer.dcft_axes_of(layer)
            of_layer = layouts.factor_layouts(layer.dcft_adapter, axes, weight_layout)
            for name, layout in of_layer.items():
                chosen[id(layer.dcft_adapter), name] = layer.dcft_adapter.variables[name], layout
        holders = _holders(model, layers.values())
        for variable, layout in chosen.values():
            if variable.path in list(layout_map):
                del layout_map[variable.path]
            layout_map[variable.path] = layout
            keras_internals.set_layout(variable, layout)
        _reset(holders)
    return layout_map


@contextlib.contextmanager
def dcft_disabled(model: Model) -> Iterator[Model]:
    """Inside this context the model computes what its base model does; outside as before.

    What was trained is switched off, the head and `trainable_layers` too, for all threads and in
    functions that were compiled before. Blocks are counted, so they may nest and overlap, and
    `model` may be a part of an adapted model. In a function that is being traced, such as a
    compiled `train_step` or `compute_loss`, what is traced inside the block is the base model. What
    is saved inside is what was trained. Training inside is lost, but for the factors A and B.

    Args:
        model: a model with DCFT layers.

    Raises:
        TypeError, ValueError: if `model` is no Keras model or has no DCFT layers.

    Example:
        >>> model = keras.Sequential([keras.Input((32,)), keras.layers.Dense(64)])
        >>> with dcft_disabled(enable_dcft(model)):
        ...     outputs = model(keras.ops.ones((1, 32)))
    """
    layers = required_dcft_layers(model).values()
    filters = {id(v): v for v in (layer.dcft_filter for layer in layers if layer.built)}
    zeros = [(v, np.zeros(v.shape, "float32")) for v in filters.values()]
    base = [(v, freezing.base_value(v)) for v in trained_in_full(model)]
    with selection.switched_off(zeros + base):
        yield model


def _own_dcft_layers(model):
    layers = required_dcft_layers(model)
    unbuilt = [path for path, layer in layers.items() if not layer.built]
    if unbuilt:
        raise ValueError(f"Build `model` first. Received: layers {joined(unbuilt)}, not built.")
    if any(selection.is_off(layer.dcft_filter) for layer in layers.values()):
        raise ValueError("`model` cannot be changed inside `dcft_disabled`.")
    return layers
