"""How many numbers DCFT would train, before anything is enabled."""

import dataclasses
import io
from collections.abc import Sequence

import keras
from rich.console import Console
from rich.table import Table

from keras_dcft import shares
from keras_dcft.hub import task_backbone
from keras_dcft.increments import parameter_count
from keras_dcft.paths import checked_model, walk
from keras_dcft.planning import (
    choose_kernel_sizes,
    narrower_than,
    plan_adaptation,
    sizes_by_pattern,
)
from keras_dcft.reclassing import matrix_shape_of, weight_owners
from keras_dcft.settings import AdapterSettings, checked_positive_int
from keras_dcft.signatures import FilePath, KernelSize, Layers

LORA_RANKS = (1, 8)


@dataclasses.dataclass(frozen=True)
class ParameterTable:
    """What `dcft_parameter_table` returns; prints as a table.

    Attributes:
        model: str, the model's name.
        rank: int, DCFT's rank.
        base_parameters: int, numbers in the base model.
        shapes: tuple of the targeted kernels' shapes as matrices, kernels that layers share once.
        dcft_parameters: list of (kernel size, trainable numbers) in the order asked for. In place
            of a number stands None where a targeted kernel is narrower than the kernel size.
        lora_parameters: dict of LoRA rank to trainable numbers.
    """

    model: str
    rank: int
    base_parameters: int
    shapes: tuple[tuple[int, int], ...]
    dcft_parameters: list[tuple[KernelSize, int | None]]
    lora_parameters: dict[int, int]

    def _rows(self):
        for kernel_size, count in self.dcft_parameters:
            yield f"DCFT, kernel size {kernel_size}, rank {self.rank}", count
        for rank, count in self.lora_parameters.items():
            yield f"LoRA, rank {rank}", count

    def __rich__(self):
        table = Table(
            title=f'Trainable numbers for {len(self.shapes)} kernels of "{self.model}"',
            title_justify="left",
        )
        table.add_column("Method", overflow="fold")
        table.add_column("Trainable", justify="right")
        table.add_column(f"Share of {self.base_parameters:,}", justify="right")
        for method, count in self._rows():
            if count is None:
                table.add_row(method, "too large for a kernel", "")
            else:
                table.add_row(method, f"{count:,}", f"{100 * count / self.base_parameters:.4f} %")
        return table

    def __str__(self):
        console = Console(file=io.StringIO(), highlight=False, width=100)
        console.print(self)
        return console.file.getvalue().rstrip("\n")

    def plot(self, path: FilePath) -> None:
        """Draws the trainable numbers of every kernel size into a picture file.

        Beside the curve stand the LoRA ranks and, where it is least, the kernel size; in theory
        that is near `(rank · Σ(in + out) / 2n)^(1/3)` for n kernels. Needs matplotlib.

        Args:
            path: str or path, the file to write; its suffix says the format.
        """
        from matplotlib.figure import Figure

        counts = counts_by_kernel_size(self.shapes, self.rank)
        least = min(counts, key=counts.get)
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axis = figure.subplots()
        axis.plot(list(counts), list(counts.values()), color="tab:blue", label="DCFT")
        marked = [
            (size, count)
            for size, count in self.dcft_parameters
            if isinstance(size, int) and count is not None
        ]
        if marked:
            axis.plot(*zip(*marked), "o", color="tab:blue")
        axis.plot(least, counts[least], "v", color="tab:green")
        axis.annotate(
            f"least: {counts[least]:,} at {least}",
            (least, counts[least]),
            textcoords="offset points",
            xytext=(0, -16),
            ha="center",
            color="tab:green",
        )
        for rank, count in self.lora_parameters.items():
            axis.axhline(count, color="tab:orange", linestyle="--", linewidth=1)
            axis.text(1, count * 1.06, f"LoRA, rank {rank}: {count:,}", color="tab:orange")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.margins(y=0.15)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set(
            xlabel="kernel size",
            ylabel="trainable numbers",
            title=f'DCFT of rank {self.rank} on {len(self.shapes)} kernels of "{self.model}"',
        )
        axis.grid(alpha=0.3)
        figure.savefig(path, dpi=120)


def dcft_parameter_table(
    model: keras.Model,
    kernel_sizes: Sequence[KernelSize] = (2, 4, 8, 16, 32),
    rank: int = 1,
    *,
    target_layers: Layers = None,
    exclude_layers: Layers = None,
) -> ParameterTable:
    """What `enable_dcft` would train at each kernel size, beside LoRA on the same kernels.

    Counts adapters only, `Σ rank·(ceil(in / d) + ceil(out / d)) + d²` (paper, section 3.4), not a
    task's head. The model is not changed.

    Args:
        model: a built `keras.Model`, adapted or not.
        kernel_sizes: sequence of what `enable_dcft` takes as `kernel_size`: ints, "auto" and
            dicts of regular expressions to such.
        rank: int, DCFT's rank inside the subspace.
        target_layers, exclude_layers: as for `enable_dcft`.

    Returns:
        A `ParameterTable`: prints as a table, holds the counts as data, draws them with `plot`.

    Raises:
        TypeError, ValueError: as `enable_dcft`, except that a kernel size larger than a kernel's
            side is no error but a row without a count.

    Example:
        >>> model = keras.Sequential([keras.Input((32,)), keras.layers.Dense(64)])
        >>> dcft_parameter_table(model, (2, 8)).dcft_parameters
        [(2, 52), (8, 76)]
    """
    rank = checked_positive_int("rank", rank)
    targeted, layers = _targeted(model, rank, target_layers, exclude_layers)
    shapes = _matrix_shapes(targeted)
    dcft_parameters = []
    for kernel_size in kernel_sizes:
        sizes = sizes_by_pattern("kernel_sizes", kernel_size)
        chosen = choose_kernel_sizes(sizes, targeted, layers, rank)
        count = None
        if not narrower_than(chosen, targeted):
            count = sum(
                parameter_count(*shape, chosen[path], rank) for path, shape in shapes.items()
            )
        is_one = not isinstance(kernel_size, dict)
        dcft_parameters.append((sizes[""] if is_one else sizes, count))
    return ParameterTable(
        model=model.name,
        rank=rank,
        base_parameters=shares.size(shares.base_weights(model).values()),
        shapes=tuple(shapes.values()),
        dcft_parameters=dcft_parameters,
        lora_parameters={rank: rank * sum(map(sum, shapes.values())) for rank in LORA_RANKS},
    )


def kernel_size_for_budget(
    model: keras.Model,
    parameters: int,
    *,
    rank: int = 1,
    target_layers: Layers = None,
    exclude_layers: Layers = None,
) -> int:
    """The smallest kernel size, that is the finest subspace, whose adapters keep to a budget.

    Args:
        model: a built `keras.Model`, adapted or not.
        parameters: int, the most numbers that the adapters may train, without a task's head.
        rank, target_layers, exclude_layers: as for `enable_dcft`.

    Returns:
        int, for `enable_dcft(model, kernel_size=...)`.

    Raises:
        TypeError, ValueError: as `enable_dcft`, and ValueError for a budget below what any kernel
            size needs.

    Example:
        >>> model = keras.Sequential([keras.Input((32,)), keras.layers.Dense(64)])
        >>> kernel_size_for_budget(model, 60)
        2
    """
    parameters = checked_positive_int("parameters", parameters)
    rank = checked_positive_int("rank", rank)
    targeted, _ = _targeted(model, rank, target_layers, exclude_layers)
    shapes = list(_matrix_shapes(targeted).values())
    counts = counts_by_kernel_size(shapes, rank)
    for kernel_size, count in counts.items():
        if count <= parameters:
            return kernel_size
    least = min(counts, key=counts.get)
    raise ValueError(
        f"`parameters` must be at least {counts[least]:,}, what kernel size {least} at rank {rank} "
        f"trains in the {len(shapes)} targeted kernels of '{model.name}'; no kernel size trains "
        f"less. Received: parameters={parameters}"
    )


def counts_by_kernel_size(shapes, rank) -> dict:
    """Trainable numbers for every kernel size that fits all of these (in, out) kernels."""
    return {
        kernel_size: sum(parameter_count(*shape, kernel_size, rank) for shape in shapes)
        for kernel_size in range(1, min(map(min, shapes)) + 1)
    }


def _targeted(model, rank, target_layers, exclude_layers) -> tuple[dict, dict]:
    """The layers that `enable_dcft` would adapt (kernel size 1 fits each) and all, by path."""
    part = task_backbone(checked_model(model))
    config = plan_adaptation(part, 1, AdapterSettings(1, rank), target_layers, exclude_layers)
    layers = walk(part)
    return {path: layers[path] for path in config["layers"]}, layers


def _matrix_shapes(targeted) -> dict:
    """The matrix shapes of the targeted layers, of those that share a weight only the first's."""
    owners = weight_owners(targeted).values()
    return {path: matrix_shape_of(targeted[path]) for path in owners}
