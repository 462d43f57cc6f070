"""What is adapted in a model, as a table."""

import itertools
import math
import re
from collections.abc import Callable

import keras
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from keras_dcft import shares
from keras_dcft.hub import task_backbone
from keras_dcft.increments import parameter_count, smallest_size
from keras_dcft.models import adapter_names
from keras_dcft.named import is_active
from keras_dcft.paths import keras_paths, required_dcft_layers, walk, with_itself
from keras_dcft.reclassing import matrix_shape_of, weight_of, weight_owners, weight_shape_of
from keras_dcft.settings import counted

# With more layers than this, those of many blocks share a row.
MOST_ROWS = 20


def dcft_summary(
    model: keras.Model,
    print_fn: Callable[[str], object] | None = None,
    expand: bool = False,
) -> None:
    """Prints a table of a model's adapted layers: kernel, kernel size, rank, trainable numbers.

    A model with several adapters has a table for each. Of more than 20 layers, those that differ
    in their blocks' numbers alone share a row, `transformer_layer_{0..31}/query`, with what they
    train together. Below stand the totals: what the adapter trains, the share of the model that is
    in the adapted kernels, what LoRA of rank 1 on them would train, and what else is trained. In a
    notebook the table is rendered as HTML.

    Args:
        model: a model with DCFT layers.
        print_fn: function of a str to print with instead, or None. The str is plain text, in a
            terminal and a notebook too.
        expand: bool, whether every layer has a row of its own, however many there are.

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
        content += _described(model, name, place, expand)
    # Names stay as they are: rich would take `[a]` in one for a style, `:car:` for an emoji.
    options = {"highlight": False, "markup": False, "emoji": False}
    console = Console(**options)
    is_plain = print_fn is not None or not (console.is_terminal or console.is_jupyter)
    if is_plain:
        console = Console(**options, width=110, color_system=None, force_jupyter=False)
    # Narrower than this, rich would cut cells off and break words.
    wide = console.options.update_width(1000)
    console.width = max(
        console.width, *(Measurement.get(console, wide, c).minimum for c in content)
    )
    if not is_plain:
        console.print(*content, sep="\n")
        return
    with console.capture() as capture:
        console.print(*content, sep="\n")
    (print_fn or print)(capture.get().rstrip("\n"))


def _described(model, name, place, expand) -> list:
    """The table of one adapter and the lines below it."""
    part = task_backbone(model)
    layers = _adapted_by(part, name)
    if not layers:
        part, layers = model, _adapted_by(model, name)
    owners = set(weight_owners(layers).values())
    settings = {path: shares.settings_of(layer, name) for path, layer in layers.items()}
    counts = {
        path: parameter_count(*matrix_shape_of(layers[path]), of_layer.kernel_size, of_layer.rank)
        for path, of_layer in settings.items()
    }
    adapters = sum(counts[path] for path in owners)
    # Of each layer what its row says beside names and count.
    kinds = {
        path: (
            " x ".join(map(str, weight_shape_of(layer))),
            settings[path].kernel_size,
            settings[path].rank,
            f"{100 * counts[path] / math.prod(matrix_shape_of(layer)):.3f} %",
        )
        for path, layer in layers.items()
    }
    names = _keras_names(part, layers)
    rows = [[path] for path in layers]
    if len(layers) > MOST_ROWS and not expand:
        rows = _by_block(names, kinds)
    kernel_width, share_width = (max(len(kind[n]) for kind in kinds.values()) for n in (0, 3))
    table = Table(title=f"DCFT layers of {place}", title_justify="left", show_footer=True)
    table.add_column("Layer", footer=counted(len(layers), "layer"))
    table.add_column("Kernel", justify="right", no_wrap=True, min_width=kernel_width)
    table.add_column("Kernel\nsize", justify="right", no_wrap=True)
    table.add_column("Rank", justify="right", no_wrap=True)
    table.add_column("Trainable", justify="right", no_wrap=True, footer=f"{adapters:,}")
    table.add_column("Share", justify="right", no_wrap=True, min_width=share_width)
    for paths in rows:
        kernel, kernel_size, rank, share = kinds[paths[0]]
        keras_name = _spanned([names[path] for path in paths])
        table.add_row(
            _Path(_spanned(paths) + (f" (Keras: {keras_name})" if keras_name else "")),
            kernel,
            str(kernel_size),
            str(rank),
            f"{sum(counts[path] for path in paths):,}",
            share,
        )
    lora = sum(sum(matrix_shape_of(layers[path])) for path in owners)
    base = shares.base_weights(model)
    total = shares.size(base.values())
    trained = {v for x in model._flatten_layers() for v in shares.trained_beside(x, name)}
    other = shares.size(base[variable] for variable in trained)
    lines = [
        f"Adapters: {adapters:,} trainable numbers, {100 * adapters / total:.3f} % of the base "
        f"model's {total:,}.",
        f"The adapted kernels hold {_covered(base, layers, owners):.1f} % of the model's "
        "parameters.",
        f"LoRA of rank 1 on the same kernels: {lora:,}, {lora / adapters:.1f} times as many.",
        f"Trained in full beside them: {other:,}. Trainable in all: {adapters + other:,}.",
    ]
    lines += _better_sizes({path: layers[path] for path in owners}, settings, counts)
    if len(rows) < len(layers):
        lines.append("Rows are for all blocks together; `expand=True` shows every layer.")
    return [table, "\n".join(lines)]


def _better_sizes(layers, settings, counts) -> list:
    """A line for each kind of kernel that has over half more numbers than at its best size."""
    found = {}
    for path, layer in layers.items():
        shape, rank = matrix_shape_of(layer), settings[path].rank
        best = smallest_size(*shape, rank)
        least = parameter_count(*shape, best, rank)
        if counts[path] > 1.5 * least:
            kind = shape, settings[path].kernel_size, counts[path], best, least
            found[kind] = found.get(kind, 0) + 1
    return [
        f"Kernel size {size} trains {count:,} numbers in {counted(number, 'kernel')} of "
        f"{' x '.join(map(str, shape))}, kernel size {best} would train {least:,}."
        for (shape, size, count, best, least), number in found.items()
    ]


def _adapted_by(model, name) -> dict:
    return {
        path: layer
        for path, layer in with_itself(model).items()
        if name in shares.names_of(layer) and shares.settings_of(layer, name) is not None
    }


def _covered(base, layers, owners) -> float:
    """How many of a model's parameters are in the adapted weights, in per cent."""
    # An adapted weight may be packed, several of its numbers in one integer.
    covered = sum(math.prod(matrix_shape_of(layers[path])) for path in owners)
    packed = {id(weight_of(layers[path])) for path in owners}
    others = shares.size(variable for key, variable in base.items() if key not in packed)
    return 100 * covered / (covered + others)


def _keras_names(model, layers) -> dict:
    """By path what Keras calls a layer where that differs, without what is in both."""
    by_keras = {"": model.name, **keras_paths(walk(model))}
    names = {}
    for path in layers:
        ours, theirs = path.split("/"), by_keras[path].split("/")
        differ = [n for n, (our, their) in enumerate(zip(ours, theirs)) if our != their]
        names[path] = "/".join(theirs[differ[0] : differ[-1] + 1]) if differ else ""
    return names


def _by_block(names, kinds) -> list:
    """Lists of the paths that share a row: alike but for numbers, which form a grid."""
    alike = {}
    for path, kind in kinds.items():
        stems = _without_numbers(path), _without_numbers(names[path])
        alike.setdefault((stems, kind), []).append(path)
    return [row for paths in alike.values() for row in _grids(paths)]


def _grids(paths) -> list:
    """Paths that are alike but for numbers, divided until each part has all its combinations."""
    axes = list(zip(*map(_numbers, paths)))
    if len(paths) == math.prod(len(set(axis)) for axis in axes):
        return [paths]
    divided = next(n for n, axis in enumerate(axes) if len(set(axis)) > 1)
    parts = {}
    for path in paths:
        parts.setdefault(_numbers(path)[divided], []).append(path)
    return [row for part in parts.values() for row in _grids(part)]


# The number at the end of a name within a path.
NUMBER = re.compile(r"(?<=_)\d+(?=/|$)")


def _numbers(path) -> list:
    return list(map(int, NUMBER.findall(path)))


def _without_numbers(path) -> str:
    return NUMBER.sub("*", path)


def _spanned(paths) -> str:
    """Paths that are alike but for numbers as one: `block_{0..3,6}/query`."""
    axes = iter(zip(*map(_numbers, paths)))
    return NUMBER.sub(lambda found: _span(sorted(set(next(axes)))), paths[0])


def _span(numbers) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    # Consecutive numbers have the same distance from their places.
    runs = [
        [number for _, number in run]
        for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    ]
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs]
    return "{" + ",".join(texts) + "}"


class _Path:
    """A path for rich that goes to the next line behind a `/` or else a `_`, never in a word."""

    def __init__(self, text):
        self.text = text

    def __rich_measure__(self, console, options):
        words = re.findall(r"[^/_ ]+[/_ ]*|[/_ ]+", self.text)
        return Measurement(max(map(len, words), default=0), len(self.text))

    def __rich_console__(self, console, options):
        lines = [""]
        for name in re.findall(r"[^/ ]*[/ ]*", self.text):
            is_long = len(name.rstrip()) > options.max_width
            for word in re.findall("[^_]*_*", name) if is_long else [name]:
                if len(lines[-1] + word.rstrip()) > options.max_width:
                    lines.append("")
                lines[-1] += word
        yield Text("\n".join(line.rstrip() for line in lines if line), overflow="fold")
