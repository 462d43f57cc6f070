"""What is adapted in a model, as a table."""

import math

import keras
from rich.console import Console
from rich.table import Table

from keras_dcft.hub import task_backbone
from keras_dcft.paths import dcft_layers, other_name, required_dcft_layers


def dcft_summary(model: keras.Model, print_fn=None):
    """Prints a table of a model's adapted layers: kernel, kernel size, rank, trainable numbers.

    Below it stand the totals: what the adapters train, what else is trained, the share of the base
    model, and what LoRA of rank 1 on the same kernels would train. In a notebook the table is
    rendered as HTML.

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
    layers = required_dcft_layers(model)
    layers = dcft_layers(task_backbone(model)) or layers
    shared = {id(layer.dcft_adapter): layer.dcft_adapter for layer in layers.values()}
    table = Table(title=f'DCFT layers of "{model.name}"', title_justify="left", show_footer=True)
    adapters = sum(adapter.parameter_count for adapter in shared.values())
    table.add_column("Layer", footer=f"{len(layers)} layers", overflow="fold")
    table.add_column("Kernel", justify="right")
    table.add_column("Kernel size", justify="right")
    table.add_column("Rank", justify="right")
    table.add_column("Trainable", justify="right", footer=f"{adapters:,}")
    table.add_column("Share", justify="right")
    for path, layer in layers.items():
        adapter = layer.dcft_adapter
        name = other_name(path, layer)
        table.add_row(
            f"{path} (Keras: {name})" if name else path,
            " x ".join(map(str, layer.dcft_weight_shape_of(layer))),
            str(adapter.settings.kernel_size),
            str(adapter.settings.rank),
            f"{adapter.parameter_count:,}",
            f"{100 * adapter.parameter_count / math.prod(adapter.matrix_shape):.3f} %",
        )
    lora = sum(sum(adapter.matrix_shape) for adapter in shared.values())
    total = model.count_params()
    trained = sum(math.prod(v.shape) for v in model.trainable_variables)
    adapter_ids = {id(v) for a in shared.values() for v in a.variables.values()}
    other = sum(math.prod(v.shape) for v in model.trainable_variables if id(v) not in adapter_ids)
    lines = (
        f"Adapters: {adapters:,} trainable numbers, {100 * adapters / (total - adapters):.3f} % of "
        f"the base model's {total - adapters:,}.\n"
        f"LoRA of rank 1 on the same kernels: {lora:,}, {lora / adapters:.1f} times as many.\n"
        f"Trained in full beside them: {other:,}. Trainable in all: {trained:,}."
    )
    # Names stay as they are: rich would take `[a]` in one for a style, `:car:` for an emoji.
    options = {"highlight": False, "markup": False, "emoji": False}
    console = Console(**options)
    if print_fn is None and (console.is_terminal or console.is_jupyter):
        console.print(table, lines)
        return
    console = Console(**options, width=110, color_system=None, force_jupyter=False)
    with console.capture() as capture:
        console.print(table, lines)
    (print_fn or print)(capture.get().rstrip("\n"))
