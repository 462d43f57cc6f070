"""The adapter: its settings, its three variables, and what they make of inputs."""

import contextlib
import threading

import keras
from keras import ops

from keras_dcft import increments, layouts
from keras_dcft.regularizers import Orthonormality
from keras_dcft.settings import AdapterSettings, fresh

ADAPTER_VARIABLES = ("dcft_a", "dcft_b", "dcft_filter")

# On PyTorch thin factors are padded to this many columns at least: MKL takes up to twice as long
# for products of 2 to 15 columns as for 16.
TORCH_WIDTH = 16


_own = threading.local()


@contextlib.contextmanager
def made_beforehand(layers):
    """Inside, in this thread, thin factors of layers are those made now, not anew at each use.

    Args:
        layers: adapted layers; with none of them all are made anew again, as after a change.
    """
    outside = getattr(_own, "factors", {})
    _own.factors = {
        (id(layer.dcft_adapter), layer.compute_dtype): layer.dcft_adapter.thin_factors(
            layer.compute_dtype
        )
        for layer in layers
    }
    try:
        yield
    finally:
        _own.factors = outside


class Adapter:
    """The increment of one frozen weight, seen as a matrix (contracted axes, output axes).

    No Keras layer but a plain object that a layer holds; layers that share the weight share it.

    Attributes:
        settings: the `AdapterSettings`.
        matrix_shape: (int, int), the shape of the weight as a matrix.
        host: the layer whose variables these are.
        a: variable of shape `(ceil(in / d), r)`.
        b: variable of shape `(r, ceil(out / d))`.
        filter: variable of shape `(d, d)`.
        seed: the seed generator of the dropout, or None.

    Raises:
        ValueError: if the kernel size exceeds a side of the weight.
    """

    def __init__(self, host, settings: AdapterSettings, matrix_shape):
        if settings.kernel_size > min(matrix_shape):
            raise ValueError(
                "`kernel_size` must not be larger than the smaller side of the kernel. "
                f"Received: kernel_size={settings.kernel_size} for layer '{host.name}' with a "
                f"kernel of {matrix_shape[0]} x {matrix_shape[1]}."
            )
        self.host, self.settings, self.matrix_shape = host, settings, tuple(matrix_shape)
        a, b = increments.subspace_shape(*matrix_shape, settings.kernel_size)
        strength = settings.orthogonality / 2

        def variable(name, shape, initializer, mode=None):
            # Not autocast: the small factors are expanded in float32 and rounded to the compute
            # dtype once, instead of being rounded first and multiplied in low precision.
            return host.add_weight(
                name=name,
                shape=shape,
                initializer=fresh(initializer),
                regularizer=Orthonormality(strength, mode) if strength and mode else None,
                dtype="float32",
                autocast=False,
            )

        square = (settings.kernel_size, settings.kernel_size)
        with layouts.adapter_scope(host, host.dcft_frozen_weight(), ADAPTER_VARIABLES):
            self.a = variable("dcft_a", (a, settings.rank), settings.factor_initializer, "columns")
            self.b = variable("dcft_b", (settings.rank, b), settings.factor_initializer, "rows")
            self.filter = variable("dcft_filter", square, settings.filter_initializer)
            self.seed = keras.random.SeedGenerator() if settings.dropout else None

    @property
    def variables(self) -> dict:
        """The three variables by their names in files."""
        return dict(zip(ADAPTER_VARIABLES, (self.a, self.b, self.filter)))

    @property
    def parameter_count(self) -> int:
        """How many numbers it trains."""
        return increments.parameter_count(
            *self.matrix_shape, self.settings.kernel_size, self.settings.rank
        )

    @property
    def width(self) -> int:
        """Columns of the thin factors for each of the rank, the kernel size or more."""
        d, rank = self.settings.kernel_size, self.settings.rank
        is_padded = keras.config.backend() == "torch" and 1 < rank * d < TORCH_WIDTH
        return -(-TORCH_WIDTH // rank) if is_padded else d

    def thin_factors(self, dtype):
        """The increment's two thin factors, (in, r * width) and (r * width, out)."""
        made = getattr(_own, "factors", {}).get((id(self), keras.backend.standardize_dtype(dtype)))
        return made or self._made_factors(dtype)

    def _made_factors(self, dtype):
        (rows, columns), settings = self.matrix_shape, self.settings
        d = settings.kernel_size
        padding = self.width - d
        a, b, kernel_filter = map(ops.convert_to_tensor, (self.a, self.b, self.filter))
        left = increments.expand_input_factor(a, kernel_filter, rows, settings.scale, padding)
        right = increments.expand_output_factor(b, d, columns, padding)
        return ops.cast(left, dtype), ops.cast(right, dtype)

    def rows(self, indices, dtype):
        """Rows of the increment, a tensor of shape `(*indices.shape, out)`."""
        d, rank = self.settings.kernel_size, self.settings.rank
        # Row (i, u) of the input side is `scale · A[i, ρ] · K[u, v]`.
        from_a = ops.take(self.a, ops.floor_divide(indices, d), axis=0)
        from_filter = ops.take(self.filter, ops.mod(indices, d), axis=0)
        product = self.settings.scale * from_a[..., :, None] * from_filter[..., None, :]
        left = ops.reshape(product, (*ops.shape(indices), rank * d))
        right = increments.expand_output_factor(
            ops.convert_to_tensor(self.b), d, self.matrix_shape[1]
        )
        return ops.matmul(ops.cast(left, dtype), ops.cast(right, dtype))

    def dropped_out(self, inputs, training):
        """The increment's inputs."""
        rate = self.settings.dropout
        if rate and training:  # in this order: RematScope makes `training` a JAX tracer
            return keras.random.dropout(inputs, rate, seed=self.seed)
        return inputs
