"""What else a few thousand numbers buy: other forms of increments, for `long_training.py` alone.

Each is an object in the place of an adapted layer's adapter: variables of its own on the layer, and
two factors whose product is the increment of the kernel as a matrix (in, out). What is fixed at
random is drawn from a seed of its own, the same in all trainings.
"""

import math

import numpy as np
from keras import initializers, ops

from keras_dcft import keras_internals
from keras_dcft.increments import expand_output_factor
from keras_dcft.paths import dcft_layers

FIXED_SEED = 777
LARGEST = 1536  # of the sides of MiniLM's kernels


class Rival:
    """An increment of another form.

    Args:
        layer: an adapted layer; what its adapter has is trained no longer.
        shared: dict, what the increments of one model have together.
    """

    def __init__(self, layer, shared):
        self.layer, self.shared = layer, shared
        self.replaced = layer.dcft_adapter
        self.matrix_shape = self.replaced.matrix_shape
        for variable in self.replaced.variables.values():
            variable.trainable = False
        with keras_internals.unlocked(layer):
            self.add_variables(*self.matrix_shape)
        layer.dcft_adapter = self

    def variable(self, name, shape, start, trainable=True, dtype="float32"):
        start = initializers.Constant(start) if isinstance(start, (int, float)) else start
        return self.layer.add_weight(
            name=name, shape=shape, initializer=start, trainable=trainable, dtype=dtype
        )

    def fixed(self, name, value):
        """A variable that is not trained, so that it is no constant of the compiled program."""
        value = np.asarray(value)
        variable = self.variable(name, value.shape, "zeros", False, value.dtype.name)
        variable.assign(value)
        return variable

    def shared_variable(self, name, make):
        """The model's one variable of this name, on this layer too."""
        if name in self.shared:
            keras_internals.track_variable(self.layer, self.shared[name])
        else:
            self.shared[name] = make()
        return self.shared[name]

    def dropped_out(self, inputs, training):
        return inputs


class FilterPerRank(Rival):
    """DCFT with a filter for each of the ranks: a deconvolution with as many channels."""

    def add_variables(self, rows, columns):
        self.settings = settings = self.replaced.settings
        rank, d = settings.rank, settings.kernel_size
        self.a = self.variable("a", self.replaced.a.shape, settings.factor_initializer)
        self.b = self.variable("b", self.replaced.b.shape, settings.factor_initializer)
        self.filters = self.variable("filters", (rank, d, d), "zeros")
        self.filters.assign(
            ops.stack([initializers.get(settings.filter_initializer)((d, d)) for _ in range(rank)])
        )

    def thin_factors(self, dtype):
        (rows, columns), d = self.matrix_shape, self.settings.kernel_size
        left = self.settings.scale * ops.einsum("ip,puv->iupv", self.a, self.filters)
        left = ops.reshape(left, (-1, left.shape[2] * d))[:rows]
        return left, expand_output_factor(ops.convert_to_tensor(self.b), d, columns)


class LoRAXS(Rival):
    """A square matrix between the kernel's first singular vectors (arXiv 2405.17604)."""

    def __init__(self, layer, shared, rank):
        self.rank = rank
        super().__init__(layer, shared)

    def add_variables(self, rows, columns):
        kernel = np.reshape(ops.convert_to_numpy(self.layer.dcft_frozen_weight()), (rows, columns))
        left, values, right = np.linalg.svd(kernel, full_matrices=False)
        self.left = self.fixed("left", (left * values)[:, : self.rank])
        self.right = self.fixed("right", right[: self.rank])
        self.core = self.variable(
            "core", (self.rank, self.rank), initializers.RandomNormal(stddev=1e-5)
        )

    def thin_factors(self, dtype):
        return ops.matmul(self.left, self.core), ops.convert_to_tensor(self.right)


class VeRA(Rival):
    """Factors that all layers share, fixed at random; two vectors are trained (2310.11454)."""

    def __init__(self, layer, shared, rank):
        self.rank = rank
        super().__init__(layer, shared)

    def add_variables(self, rows, columns):
        rank = self.rank
        self.left = self.shared_variable("left", lambda: self._factor("left", (LARGEST, rank)))
        self.right = self.shared_variable("right", lambda: self._factor("right", (rank, LARGEST)))
        self.of_ranks = self.variable("of_ranks", (rank,), 0.1)
        self.of_outputs = self.variable("of_outputs", (columns,), "zeros")

    def _factor(self, name, shape):
        bound = math.sqrt(6 / shape[0])  # He's uniform start
        values = np.random.default_rng(FIXED_SEED).uniform(-bound, bound, shape)
        return self.fixed(name, values.astype("float32"))

    def thin_factors(self, dtype):
        rows, columns = self.matrix_shape
        return self.left[:rows] * self.of_ranks, self.right[:, :columns] * self.of_outputs


class UniLoRA(Rival):
    """The factors of all LoRAs are looked up in one vector, by a fixed hash (2506.00799)."""

    def __init__(self, layer, shared, numbers, rank):
        self.numbers, self.rank = numbers, rank
        super().__init__(layer, shared)

    def add_variables(self, rows, columns):
        uniform, numbers = initializers.RandomUniform(-0.02, 0.02), (self.numbers,)
        self.vector = self.shared_variable(
            "vector", lambda: self.variable("vector", numbers, uniform)
        )
        self.uses = self.shared_variable(
            "uses", lambda: self.fixed("uses", np.zeros(numbers, "float32"))
        )
        generator = self.shared.setdefault("hash", np.random.default_rng(FIXED_SEED))
        places = generator.integers(*numbers, size=self.rank * (rows + columns), dtype="int32")
        self.places = self.fixed("places", places)
        self.uses.assign_add(np.bincount(places, minlength=self.numbers))

    def thin_factors(self, dtype):
        rows, columns = self.matrix_shape
        # Of length 1, as the hash's matrix has orthonormal columns.
        values = ops.take(self.vector / ops.sqrt(ops.maximum(self.uses, 1.0)), self.places)
        left, right = ops.split(values, [self.rank * rows])
        return ops.reshape(left, (rows, self.rank)), ops.reshape(right, (self.rank, columns))


class FourierFT(Rival):
    """A few entries of the increment's spectrum, at fixed random places (2405.03003).

    Args:
        scale: float, the increment's, for a kernel of 768 x 768 (RoBERTa base). The inverse
            transform divides by the kernel's size: smaller kernels have less, so that an entry
            is a wave of the same height.
    """

    def __init__(self, layer, shared, numbers, scale):
        self.numbers, self.scale = numbers, scale
        super().__init__(layer, shared)

    def add_variables(self, rows, columns):
        generator = np.random.default_rng(FIXED_SEED)
        places = generator.permutation(rows * columns)[: self.numbers]
        self.places = self.fixed("places", np.stack(np.divmod(places, columns), 1).astype("int32"))
        self.entries = self.variable(
            "entries", (self.numbers,), initializers.RandomNormal(stddev=1)
        )

    def thin_factors(self, dtype):
        rows, columns = self.matrix_shape
        spectrum = ops.scatter(self.places, self.entries, self.matrix_shape)
        scale = self.scale * rows * columns / 768**2
        increment = scale * ops.ifft2((spectrum, ops.zeros_like(spectrum)))[0]
        # No factors: beside an identity of the smaller side.
        if rows <= columns:
            return ops.eye(rows), increment
        return increment, ops.eye(columns)


def replace_adapters(backbone, form, **arguments):
    """Puts an increment of another form in the place of each adapter of a backbone."""
    shared = {}
    for layer in dcft_layers(backbone).values():
        form(layer, shared, **arguments)
