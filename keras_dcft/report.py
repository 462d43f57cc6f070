"""What is adapted in a model, as a table."""

import math

import keras
from rich.console import Console
from rich.table import Table

from keras_dcft import shares
from keras_dcft.hub import task_backbone
from keras_dcft.increments import parameter_count
from keras_dcft.models import adapter_names
from keras_dcft.named import is_active
from keras_dcft.paths import other_name, required_dcft_layers, with_itself
from keras_dcft.reclassing import matrix_shape_of, weight_owners, weight_shape_of


def dcft_summary(model: keras.Model, print_fn=None):
    """Prints a table of a model's adapted layers: kernel, kernel size, rank, trainable numbers.

    A model with several adapters has a table for each. Below it stand the totals: what the adapter
    trains, what else is trained, the share of the base model, and what LoRA of rank 1 on the same
    kernels would train. In a notebook the table is rendered as HTML.

    Args:
        model: a model with DCFT layers.
        print_fn: function of a str to print with instead, or None. The str is plain text, in a
            terminal and a notebook too.

    Raises:
        TypeError, ValueError: if `model` is no Keras model or has no DCFT layers.

    Example:
        >>> model = keras.Sequential([keras.Input((32,)), keras.layers.Dense(64)])
        >>> dcft_summary(enable_dcft(model), print_fn=lambda text: None)
    """
    required_dcft_layers(model)
    names = adapter_names(model)
    content = []
    for name in names:
        place = f'"{model.name}"' if len(names) == 1 else f'"{model.name}", adapter "{name}"'
        if len(names) > 1 and not is_active(model, name):
            place += ", not active"
        content += _described(model, name, place)
    # Names stay as they are: rich would take `[a]` in one for a style, `:car:` for an emoji.
    options = {"highlight": False, "markup": False, "emoji": False}
    console = Console(**options)
    if print_fn is None and (console.is_terminal or console.is_jupyter):
        console.print(*content, sep="\n")
        return
    console = Console(**options, width=110, color_system=None, force_jupyter=False)
    with console.capture() as capture:
        console.print(*content, sep="\n")
    (print_fn or print)(capture.get().rstrip("\n"))


def _described(model, name, place) -> list:
    """The table of one adapter and the lines below it."""
    layers = _adapted_by(task_backbone(model), name) or _adapted_by(model, name)
    owners = set(weight_owners(layers).values())
    settings = {path: shares.settings_of(layer, name) for path, layer in layers.items()}
    counts = {
        path: parameter_count(*matrix_shape_of(layers[path]), of_layer.kernel_size, of_layer.rank)
        for path, of_layer in settings.items()
    }
    adapters = sum(counts[path] for path in owners)
    table = Table(title=f"DCFT layers of {place}", title_justify="left", show_footer=True)
    table.add_column("Layer", footer=f"{len(layers)} layers", overflow="fold")
    table.add_column("Kernel", justify="right")
    table.add_column("Kernel size", justify="right")
    table.add_column("Rank", justify="right")
    table.add_column("Trainable", justify="right", footer=f"{adapters:,}")
    table.add_column("Share", justify="right")
    for path, layer in layers.items():
        keras_name = other_name(path, layer)
        table.add_row(
            f"{path} (Keras: {keras_name})" if keras_name else path,
            " x ".join(map(str, weight_shape_of(layer))),
            str(settings[path].kernel_size),
            str(settings[path].rank),
            f"{counts[path]:,}",
            f"{100 * counts[path] / math.prod(matrix_shape_of(layer)):.3f} %",
        )
    lora = sum(sum(matrix_shape_of(layers[path])) for path in owners)
    base = shares.base_weights(model)
    total = shares.size(base.values())
    trained = {v for x in model._flatten_layers() for v in shares.trained_beside(x, name)}
    other = shares.size(base[variable] for variable in trained)
    return [
        table,
        f"Adapters: {adapters:,} trainable numbers, {100 * adapters / total:.3f} % of the base "
        f"model's {total:,}.\n"
        f"LoRA of rank 1 on the same kernels: {lora:,}, {lora / adapters:.1f} times as many.\n"
        f"Trained in full beside them: {other:,}. Trainable in all: {adapters + other:,}.",
    ]


def _adapted_by(model, name) -> dict:
    return {
        path: layer
        for path, layer in with_itself(model).items()
        if name in shares.names_of(layer) and shares.settings_of(layer, name) is not None
    }
