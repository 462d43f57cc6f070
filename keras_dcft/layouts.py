"""How adapters lie on the devices of a `keras.distribution` mesh.

A model that was made under a distribution has each weight whole on every device, or in parts. An
adapter is small: its variables are whole on every device, unless `shard_adapters` says otherwise.
"""

import contextlib
import math

import keras
from keras import ops

from keras_dcft import increments, keras_internals


@contextlib.contextmanager
def adapter_scope(host, weight, names):
    """Variables that a layer gets inside are whole on every device of the mesh, if there is one.

    A layout map's patterns are about the base, and one that also matches a variable of an adapter
    would have it cut where the weight is. So only an entry for its very path counts here.

    Args:
        host: the layer.
        weight: its frozen weight, whose mesh is taken if it has one, so that a model can be adapted
            after the scope as well.
        names: names of variables.
    """
    present, layout = keras.distribution.distribution(), layout_of(weight)
    mesh = layout.device_mesh if layout else present and present.device_mesh
    if mesh is None:
        yield
        return
    layout_map = keras.distribution.LayoutMap(mesh)
    given = keras_internals.layouts_by_pattern(present)
    for path in (f"{host.path}/{name}" for name in names):
        if path in given and is_same_mesh(given[path].device_mesh, mesh):
            layout_map[path] = given[path]
    is_own = present is not None and is_same_mesh(present.device_mesh, mesh)
    batch_axis = present.batch_dim_name if is_own else None
    distribution = keras.distribution.ModelParallel(
        layout_map=layout_map, batch_dim_name=batch_axis
    )
    with distribution.scope():
        yield


def is_same_mesh(mesh, other) -> bool:
    """Whether two meshes are of the same devices in the same places, under the same names."""
    return mesh is other or mesh.backend_mesh == other.backend_mesh


def layout_of(variable):
    """The `TensorLayout` that a variable was made with, or None."""
    layout = keras_internals.layout_of(variable)
    return layout if isinstance(layout, keras.distribution.TensorLayout) else None


def sharded_layout_of(variable, ndim):
    """The layout of a variable that lies in parts, each on other devices; None for all others.

    Args:
        variable: the variable.
        ndim: int, how many axes it had before it was quantized, when some are packed into others.
    """
    layout = layout_of(variable)
    is_sharded = layout is not None and any(layout.axes) and len(layout.axes) == ndim
    return layout if is_sharded else None


def sharded_increment(factors, scale, shape, axes, layout):
    """An increment of which each device works out the part that it has of the weight.

    The definition, a transposed convolution, comes out whole on every device. The thin factors are
    cut like the weight instead, and their product is.

    Args:
        factors: A, B and the filter.
        scale: float.
        shape: the weight's shape.
        axes: (str, str, str), a letter for each axis: the contracted ones, the others, all in the
            weight's order.
        layout: the weight's `TensorLayout`.

    Returns:
        Tensor of the weight's shape and layout.
    """
    contracted, outputs, kernel = axes
    size, cut = dict(zip(kernel, shape)), dict(zip(kernel, layout.axes))
    factor_a, factor_b, kernel_filter = map(ops.convert_to_tensor, factors)
    rows, columns = ([size[axis] for axis in side] for side in (contracted, outputs))
    left = increments.expand_input_factor(factor_a, kernel_filter, math.prod(rows), scale)
    right = increments.expand_output_factor(factor_b, kernel_filter.shape[0], math.prod(columns))
    width = left.shape[1]
    left = _cut(ops.reshape(left, (*rows, width)), [*map(cut.get, contracted), None], layout)
    right = _cut(ops.reshape(right, (width, *columns)), [None, *map(cut.get, outputs)], layout)
    z = next(letter for letter in "zyxwvuts" if letter not in kernel)
    product = ops.einsum(f"{contracted}{z},{z}{outputs}->{kernel}", left, right)
    return keras.distribution.distribute_tensor(product, layout)


def _cut(tensor, axes, layout):
    layout = keras.distribution.TensorLayout(axes, layout.device_mesh)
    return keras.distribution.distribute_tensor(tensor, layout)


def factor_layouts(adapter, axes, weight_layout) -> dict:
    """Layouts for an adapter's A and B: the rows of A lie as the weight's input axis, the columns
    of B as its output axis, where their number can be divided so; else they are whole everywhere.

    Args:
        adapter: the adapter.
        axes: as for `sharded_increment`.
        weight_layout: the weight's `TensorLayout`.

    Returns:
        dict of layouts by variable names.
    """
    contracted, outputs, kernel = axes
    mesh, cut = weight_layout.device_mesh, dict(zip(kernel, weight_layout.axes))
    sizes = dict(zip(mesh.axis_names, mesh.shape))

    def axis_for(side, count):
        axis = next(filter(None, map(cut.get, side)), None)
        return axis if axis and count % sizes[axis] == 0 else None

    rows = axis_for(contracted, adapter.a.shape[0]), None
    columns = None, axis_for(outputs, adapter.b.shape[1])
    layouts = {"dcft_a": rows, "dcft_b": columns}
    return {n: keras.distribution.TensorLayout(cuts, mesh) for n, cuts in layouts.items()}
