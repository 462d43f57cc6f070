"""`DCFTDense` and `DCFTEinsumDense`: a frozen dense kernel plus a learned DCFT increment.

Both classes are the same idea for two ways of writing a dense layer, and `embeddings.py` has two
more, so what they share, the adapter itself, is one mixin. It sees the frozen weight as a matrix
(contracted axes, output axes).
"""

import contextlib
import dataclasses
import functools
import math
import string

import keras
from keras import initializers, ops

from keras_dcft import increments, keras_internals
from keras_dcft.regularizers import Orthonormality

ADAPTER_VARIABLES = ("dcft_a", "dcft_b", "dcft_filter")

ADAPTER_SETTINGS = (
    "kernel_size",
    "rank",
    "alpha",
    "dropout",
    "orthogonality",
    "factor_initializer",
    "filter_initializer",
    "dropout_seed",
    "disabled_filter",
    "shares_adapter",
)

# Keras's quantization modes that look at data, one layer after the other.
CALIBRATED_MODES = ("gptq", "awq")

# On PyTorch thin factors are padded to this many columns at least: MKL takes up to twice as long
# for products of 2 to 15 columns as for 16.
TORCH_WIDTH = 16

DEFAULT_KERNEL_SIZE = 8
# By the measurements in docs/choices.md; the paper has 4 and N(0, 0.02²).
DEFAULT_ALPHA = 16.0


def default_factor_initializer():
    """N(0, 0.01²) for A and B."""
    return initializers.RandomNormal(stddev=0.01)


class DCFTLayer:
    """What all DCFT layers share: the adapter's settings, variables and state.

    A class that uses it comes before the Keras layer in the bases, names that layer in
    `base_class` and the attribute of its frozen weight in `weight_name`, and gives the matrix view
    of that weight: `weight_shape_of` and `matrix_shape_of`, which also take a layer of the base
    class and, while it is being built, the shape of its inputs, and `_weight_from_matrix`.
    """

    base_class: type
    weight_name: str

    def configure_dcft(
        self,
        kernel_size=DEFAULT_KERNEL_SIZE,
        rank=1,
        alpha=DEFAULT_ALPHA,
        dropout=0.0,
        orthogonality=0.0,
        factor_initializer=None,
        filter_initializer=None,
    ):
        """Checks and stores the adapter's settings."""
        check_settings(kernel_size, rank, alpha, dropout, orthogonality)
        self.kernel_size = kernel_size
        self.rank = rank
        self.alpha = float(alpha)
        self.dropout = float(dropout)
        self.orthogonality = float(orthogonality)
        self.factor_initializer = (
            fresh_initializer(factor_initializer) or default_factor_initializer()
        )
        self.filter_initializer = fresh_initializer(filter_initializer) or initializers.Zeros()
        self.dropout_seed = keras.random.SeedGenerator() if dropout else None
        self.disabled_filter = None
        self.shares_adapter = False

    def add_adapter(self, owner=None, input_shape=None):
        """Freezes what the layer has and adds the three adapter variables to it.

        Args:
            owner: a DCFT layer of the same frozen weight, whose adapter this layer is to share.
            input_shape: shape of the inputs for a layer that is being built.
        """
        keras_internals.freeze_variables(self)
        # By default Keras refuses subclasses, which might hold other weights than their base class.
        keras_internals.wrap_quantize(self, check_quantization, type_check=False)
        if owner is not None:
            self.shares_adapter = True
            for name in ADAPTER_VARIABLES:
                setattr(self, name, getattr(owner, name))
            return
        input_dim, output_dim = self.matrix_shape_of(self, input_shape)
        if self.kernel_size > min(input_dim, output_dim):
            raise ValueError(
                "`kernel_size` must not be larger than the smaller side of the kernel. "
                f"Received: kernel_size={self.kernel_size} for layer '{self.name}' with a kernel "
                f"of {input_dim} x {output_dim}."
            )
        a, b = increments.subspace_shape(input_dim, output_dim, self.kernel_size)
        strength = self.orthogonality / 2
        # Not autocast: the small factors are expanded in float32 and rounded to the compute dtype
        # once, instead of being rounded first and multiplied in low precision.
        self.dcft_a = self.add_weight(
            name="dcft_a",
            shape=(a, self.rank),
            initializer=self.factor_initializer,
            regularizer=Orthonormality(strength, "columns") if strength else None,
            dtype="float32",
            autocast=False,
        )
        self.dcft_b = self.add_weight(
            name="dcft_b",
            shape=(self.rank, b),
            initializer=fresh_initializer(self.factor_initializer),
            regularizer=Orthonormality(strength, "rows") if strength else None,
            dtype="float32",
            autocast=False,
        )
        self.dcft_filter = self.add_weight(
            name="dcft_filter",
            shape=(self.kernel_size, self.kernel_size),
            initializer=self.filter_initializer,
            dtype="float32",
            autocast=False,
        )

    def build(self, input_shape):
        super().build(input_shape)
        self.add_adapter(input_shape=input_shape)

    @property
    def scale(self) -> float:
        """`alpha / rank`, what the increment is multiplied by."""
        return self.alpha / self.rank

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """The frozen weight's shape as a matrix, (contracted axes, output axes)."""
        return self.matrix_shape_of(self)

    def dcft_increment(self):
        """The weight increment, a float32 tensor of the kernel's shape (paper, equation 5).

        Computed by the definition, `keras.ops.conv_transpose`.
        """
        return self._weight_from_matrix(
            increments.dcft_increment(
                self.dcft_a, self.dcft_b, self.dcft_filter, *self.matrix_shape, self.scale
            )
        )

    @property
    def frozen_weight(self):
        """The base layer's own weight, the variable."""
        return self.weight_of(self)

    @classmethod
    def weight_of(cls, layer):
        """That weight of an adapted layer or of one of the base class."""
        # Keras deletes the kernel when it has calibrated a quantized one.
        is_there = hasattr(layer, cls.weight_name)
        return getattr(layer, cls.weight_name) if is_there else layer.quantized_kernel

    def effective_weight(self):
        """Base plus increment, of the base weight's dtype; differentiable in the adapter.

        Code that reads a layer's `kernel` or `embeddings` instead of calling the layer gets what
        the layer computes with.

        Raises:
            ValueError: if the frozen weight is quantized.
        """
        if holds_integers(self):
            raise ValueError(
                f"Layer '{self.name}' holds a quantized weight, to which no increment can be "
                "added; `dcft_increment()` gives the increment. Received: "
                f"quantization_mode={self.quantization_mode!r}"
            )
        base = ops.convert_to_tensor(self.frozen_weight)
        increment = self.dcft_increment()
        return ops.cast(ops.add(ops.cast(base, increment.dtype), increment), base.dtype)

    def merge(self):
        """Moves the increment into the frozen weight; the layer computes the same all the while."""
        merged = ops.add(ops.cast(self.frozen_weight, "float32"), self.dcft_increment())
        self.frozen_weight.assign(ops.cast(merged, self.frozen_weight.dtype))
        self.dcft_filter.assign(ops.zeros(self.dcft_filter.shape))

    @property
    def is_disabled(self) -> bool:
        """Whether the layer is inside `dcft_disabled`."""
        return self.disabled_filter is not None

    @contextlib.contextmanager
    def disabled(self):
        """Inside this context the increment is zero; what is saved is the adapter all the same."""
        if self.is_disabled:
            yield
            return
        self.disabled_filter = ops.convert_to_numpy(self.dcft_filter)
        self.dcft_filter.assign(ops.zeros(self.dcft_filter.shape))
        try:
            yield
        finally:
            self.dcft_filter.assign(self.disabled_filter)
            self.disabled_filter = None

    def _expanded_factors(self, dtype):
        """The increment's two thin factors, (in, width) and (width, out); width is r·d or more."""
        input_dim, output_dim = self.matrix_shape
        padding = 0
        if keras.config.backend() == "torch" and 1 < self.rank * self.kernel_size < TORCH_WIDTH:
            padding = -(-TORCH_WIDTH // self.rank) - self.kernel_size
        input_factor = increments.expand_input_factor(
            ops.convert_to_tensor(self.dcft_a),
            ops.convert_to_tensor(self.dcft_filter),
            input_dim,
            self.scale,
            padding,
        )
        output_factor = increments.expand_output_factor(
            ops.convert_to_tensor(self.dcft_b), self.kernel_size, output_dim, padding
        )
        return ops.cast(input_factor, dtype), ops.cast(output_factor, dtype)

    def _frozen(self, variable):
        # Without the stop, TensorFlow's tape works out the full-size gradient of the base kernel,
        # which nobody asks for: it watches every variable, whatever Keras's `trainable` says.
        return ops.stop_gradient(variable)

    def enable_lora(self, *args, **kwargs):
        raise ValueError(
            f"Layer '{self.name}' is adapted with DCFT and cannot have LoRA as well. Call "
            "`merge_dcft(model)` or `remove_dcft(model)` first."
        )

    def plain_view(self):
        """The layer as its base class: the same state, without the adapter and its variables.

        What Keras does with a layer's own state, it does to this view, by the base class's public
        methods. So what is written and told of the base is what the base layer would write and
        tell, whichever way this version of Keras goes about it.
        """
        return keras_internals.view_as(self, self.base_class, without=self.adapter_variables())

    def adapter_variables(self) -> dict:
        """The adapter's variables by their names; empty before the layer is built."""
        return {name: getattr(self, name) for name in ADAPTER_VARIABLES if hasattr(self, name)}

    def save_own_variables(self, store):
        written = {}
        self.base_class.save_own_variables(self.plain_view(), written)
        self._check_written(written)
        if self.built and not self.shares_adapter:
            written.update(self.adapter_variables())
            if self.is_disabled:
                written["dcft_filter"] = self.disabled_filter
        for name, value in written.items():
            store[name] = value

    def _check_written(self, written):
        """Raises RuntimeError if Keras's own saving gives anything but the base's variables.

        Weights worked out for the file, such as a kernel with the increment in it, would be loaded
        as the base. A class that saves in a way of its own is as free as it is in Keras.
        """
        if not self.built or not self.base_class.save_own_variables.__module__.startswith("keras."):
            return
        own = {id(variable) for variable in keras_internals.own_weights(self.plain_view())}
        values = {id(value) for value in written.values()}
        if id(self.frozen_weight) not in values or not values <= own:
            raise RuntimeError(
                f"Layer '{self.name}' cannot be saved: Keras {keras.__version__} does not write "
                f"the frozen weight of a {self.base_class.__name__} itself. Nothing was written "
                "for it. This version of Keras needs a newer keras_dcft."
            )

    def load_own_variables(self, store):
        # A store of the base layer alone has no adapter; then the adapter keeps its values. Any
        # other difference in number is an error.
        stored = {name: store[name] for name in store.keys()}  # noqa: SIM118 (no dict)
        adapter = {name: stored.pop(name) for name in ADAPTER_VARIABLES if name in stored}
        if self.built and adapter and len(adapter) < len(ADAPTER_VARIABLES):
            raise ValueError(
                f"Layer '{self.name}' cannot be loaded: of the adapter's variables "
                f"{list(ADAPTER_VARIABLES)} the file has only {list(adapter)}."
            )
        view = self.plain_view()
        self.base_class.load_own_variables(view, stored)
        keras_internals.keep_state(self, view)
        for name, value in adapter.items():
            getattr(self, name).assign(value)
        if self.is_disabled and adapter:
            self.disabled_filter = ops.convert_to_numpy(self.dcft_filter)
            self.dcft_filter.assign(ops.zeros(self.dcft_filter.shape))

    def get_config(self):
        config = self.base_class.get_config(self.plain_view())
        config.update(
            kernel_size=self.kernel_size,
            rank=self.rank,
            alpha=self.alpha,
            dropout=self.dropout,
            orthogonality=self.orthogonality,
            factor_initializer=initializers.serialize(self.factor_initializer),
            filter_initializer=initializers.serialize(self.filter_initializer),
        )
        return config

    def __repr__(self):
        size = ""
        if self.built:
            size = f", kernel={'x'.join(map(str, self.matrix_shape))}"
            if self.quantization_mode is not None:
                size += f", {self.quantization_mode}"
        return (
            f"<{type(self).__name__} name={self.name}{size}, kernel_size={self.kernel_size}, "
            f"rank={self.rank}, alpha={self.alpha:g}, built={self.built}>"
        )


class DCFTKernel(DCFTLayer):
    """What `DCFTDense` and `DCFTEinsumDense` share: `activation(base + increment + bias)`."""

    weight_name = "_kernel"

    @property
    def kernel(self):
        """The effective kernel, see `effective_weight`."""
        return self.effective_weight()

    def call(self, inputs, training=None):
        outputs = self._product(inputs, self._frozen(self._kernel))
        # The bias goes first: compilers fuse it with the base product as they do in the base model,
        # which keeps the start equal to it to the last bit. On PyTorch `+=` works in place, which
        # saves tensors of the outputs' size.
        if self.bias is not None:
            outputs += self._frozen(self.bias)
        outputs += self._increment_outputs(inputs, training)
        return outputs if self.activation is None else self.activation(outputs)

    def quantized_call(self, inputs, training=None):
        # Keras's quantized calls end with the activation, and the increment goes in before it.
        view = self.plain_view()
        view.__dict__["activation"] = None
        base = self.base_class.quantized_call(view, inputs, training=training)
        # Not in place, which PyTorch forbids for what custom gradients return.
        outputs = ops.add(base, self._increment_outputs(inputs, training))
        return outputs if self.activation is None else self.activation(outputs)

    def _increment_outputs(self, inputs, training):
        if self.dropout and training:  # in this order: RematScope makes `training` a JAX tracer
            inputs = keras.random.dropout(inputs, self.dropout, seed=self.dropout_seed)
        return self._increment_product(inputs)

    def _rows_product(self, inputs, contracted_axes, output_sizes):
        """The product with D and U as one of matrices, for inputs that end with what is contracted.

        With the leading axes flattened, the gradients of D and U contract one axis instead of
        several, which XLA's CPU backend turns into code that takes half the time.
        """
        input_factor, output_factor = self._expanded_factors(self.compute_dtype)
        rows = ops.reshape(inputs, (-1, self.matrix_shape[0]))
        outputs = ops.matmul(ops.matmul(rows, input_factor), output_factor)
        leading = ops.shape(inputs)[: len(inputs.shape) - contracted_axes]
        return ops.reshape(outputs, (*leading, *output_sizes))


@keras.saving.register_keras_serializable("keras_dcft")
class DCFTDense(DCFTKernel, keras.layers.Dense):
    """A `keras.layers.Dense` whose kernel is frozen and fine-tuned by DCFT.

    `outputs = activation(inputs · W + dropout(inputs) · ΔW + bias)` with the increment
    `ΔW = (alpha / rank) · crop(conv_transpose(A · B, filter, strides=kernel_size))` of
    arXiv 2503.01419, section 3. Trained are `dcft_a` of shape `(ceil(in / d), rank)`, `dcft_b`
    of shape `(rank, ceil(units / d))` and `dcft_filter` of shape `(d, d)`, d the kernel size, all
    float32; kernel and bias are frozen whatever `trainable` is set to. The forward pass never forms
    the increment; `kernel` and `dcft_increment()` do.

    Args:
        units: int, size of the output's last axis.
        kernel_size: int from 1 to the smaller side of the kernel. Larger means fewer trainable
            numbers, `rank * (ceil(in / d) + ceil(units / d)) + d**2`.
        rank: int, rank of `A · B` inside the subspace; the increment has rank up to `rank * d`.
        alpha: float, the increment's scale is `alpha / rank`.
        dropout: float in [0, 1), dropout on the increment's input while training.
        orthogonality: float, the paper's γ for this layer alone: adds
            `γ/2 · (‖AᵀA − I‖ + ‖BBᵀ − I‖)` to the loss.
        factor_initializer: initializer of `dcft_a` and `dcft_b`. Defaults to N(0, 0.01²).
        filter_initializer: initializer of `dcft_filter`. Defaults to zeros, which makes the layer
            start as exactly the base layer.
        **kwargs: every other argument of `keras.layers.Dense`.

    Input shape:
        `(batch, ..., in)`.

    Output shape:
        `(batch, ..., units)`.

    Raises:
        TypeError: if `kernel_size` or `rank` is not an int, or `alpha`, `dropout` or
            `orthogonality` not a number.
        ValueError: if one of them is out of range, if `kernel_size` exceeds a side of the kernel
            (when the layer is built), or for `kernel_constraint` or `lora_rank`.

    Example:
        >>> layer = DCFTDense(64, kernel_size=8)
        >>> tuple(layer(keras.ops.ones((2, 32))).shape)
        (2, 64)
        >>> [tuple(v.shape) for v in layer.trainable_variables]
        [(4, 1), (1, 8), (8, 8)]
    """

    base_class = keras.layers.Dense

    def __init__(
        self,
        units,
        kernel_size=DEFAULT_KERNEL_SIZE,
        rank=1,
        alpha=DEFAULT_ALPHA,
        dropout=0.0,
        orthogonality=0.0,
        factor_initializer=None,
        filter_initializer=None,
        **kwargs,
    ):
        check_base_arguments(kwargs)
        super().__init__(units, **kwargs)
        self.configure_dcft(
            kernel_size, rank, alpha, dropout, orthogonality, factor_initializer, filter_initializer
        )

    @staticmethod
    def weight_shape_of(layer, input_shape=None) -> tuple:
        # Not the kernel's: int4 kernels are packed, calibrated ones transposed.
        return (layer.input_spec.axes[-1], layer.units)

    matrix_shape_of = weight_shape_of

    def _weight_from_matrix(self, matrix):
        return matrix

    def _product(self, inputs, kernel):
        return ops.matmul(inputs, kernel)

    def _increment_product(self, inputs):
        return self._rows_product(inputs, 1, (self.units,))


@keras.saving.register_keras_serializable("keras_dcft")
class DCFTEinsumDense(DCFTKernel, keras.layers.EinsumDense):
    """A `keras.layers.EinsumDense` whose kernel is frozen and fine-tuned by DCFT.

    The kernel is viewed as a matrix: the axes that the equation contracts, in the kernel's order,
    by the axes that it puts into the output, in the kernel's order. Everything else is as in
    `DCFTDense`.

    Args:
        equation: str, as for `keras.layers.EinsumDense`, with no axis shared by input, kernel and
            output: such a kernel is no matrix but a stack of them.
        output_shape: int or tuple, as for `keras.layers.EinsumDense`.
        kernel_size, rank, alpha, dropout, orthogonality, factor_initializer, filter_initializer:
            as for `DCFTDense`.
        **kwargs: every other argument of `keras.layers.EinsumDense`.

    Raises:
        TypeError, ValueError: as `DCFTDense`, and ValueError for an equation with a shared axis.

    Example:
        >>> layer = DCFTEinsumDense("btd,dnh->btnh", (None, 4, 16), kernel_size=8)
        >>> tuple(layer(keras.ops.ones((2, 5, 32))).shape)
        (2, 5, 4, 16)
        >>> layer.matrix_shape
        (32, 64)
    """

    base_class = keras.layers.EinsumDense

    def __init__(
        self,
        equation,
        output_shape,
        kernel_size=DEFAULT_KERNEL_SIZE,
        rank=1,
        alpha=DEFAULT_ALPHA,
        dropout=0.0,
        orthogonality=0.0,
        factor_initializer=None,
        filter_initializer=None,
        **kwargs,
    ):
        check_base_arguments(kwargs)
        einsum_axes(equation)
        super().__init__(equation, output_shape, **kwargs)
        self.configure_dcft(
            kernel_size, rank, alpha, dropout, orthogonality, factor_initializer, filter_initializer
        )

    @staticmethod
    def weight_shape_of(layer, input_shape=None) -> tuple:
        if not holds_integers(layer):
            return tuple(layer._kernel.shape)
        # Packed int4 kernels and calibrated ones are stored in other shapes.
        input_shape = input_shape or layer.get_build_config()["input_shape"]
        output_shape = layer.compute_output_shape(input_shape)
        return einsum_kernel_shape(layer.equation, input_shape, output_shape)

    @staticmethod
    def matrix_shape_of(layer, input_shape=None) -> tuple[int, int]:
        shape = DCFTEinsumDense.weight_shape_of(layer, input_shape)
        contracted, outputs = einsum_axes(layer.equation).sizes(shape)
        return math.prod(contracted), math.prod(outputs)

    def _weight_from_matrix(self, matrix):
        axes = einsum_axes(self.equation)
        contracted, outputs = axes.sizes(self.weight_shape_of(self))
        tensor = ops.reshape(matrix, (*contracted, *outputs))
        order = axes.contracted + axes.outputs
        return ops.transpose(tensor, [order.index(c) for c in axes.kernel])

    def _product(self, inputs, kernel):
        return ops.einsum(self.equation, inputs, kernel)

    def _increment_product(self, inputs):
        axes = einsum_axes(self.equation)
        contracted, outputs = axes.sizes(self.weight_shape_of(self))
        if axes.is_rows_product:
            return self._rows_product(inputs, len(contracted), outputs)
        input_factor, output_factor = self._expanded_factors(self.compute_dtype)
        width = input_factor.shape[1]
        hidden = ops.einsum(
            axes.input_equation, inputs, ops.reshape(input_factor, (*contracted, width))
        )
        return ops.einsum(
            axes.output_equation, hidden, ops.reshape(output_factor, (width, *outputs))
        )


@dataclasses.dataclass(frozen=True)
class EinsumAxes:
    """The axes of an `EinsumDense` equation, by what happens to them.

    Attributes:
        kernel: the kernel's axes in order.
        contracted: kernel axes that the equation sums over, in the kernel's order.
        outputs: kernel axes that appear in the output, in the kernel's order.
        input_equation: the einsum of the inputs with D reshaped to (contracted..., r·d).
        output_equation: the einsum of its result with U reshaped to (r·d, outputs...).
        is_rows_product: whether the equation is a product of matrices but for reshaping: inputs end
            with the contracted axes and outputs with the kernel's others, in the kernel's order.
    """

    kernel: str
    contracted: str
    outputs: str
    input_equation: str
    output_equation: str
    is_rows_product: bool

    def sizes(self, kernel_shape) -> tuple[list, list]:
        """Sizes of the contracted and of the output axes of a kernel of this shape."""
        size = dict(zip(self.kernel, kernel_shape))
        return [size[c] for c in self.contracted], [size[c] for c in self.outputs]


@functools.cache
def einsum_axes(equation: str) -> EinsumAxes:
    """Sorts the axes of an equation such as `"btd,dnh->btnh"`.

    Raises:
        ValueError: if an axis is shared by input, kernel and output.
    """
    inputs, rest = equation.split(",")
    kernel, outputs = rest.split("->")
    shared = [c for c in kernel if c in inputs and c in outputs]
    if shared:
        raise ValueError(
            "`equation` must not have an axis that is shared by input, kernel and output: the "
            "kernel is then a stack of matrices, for which there is no DCFT increment. "
            f"Received: equation={equation!r} with the shared axes {shared}."
        )
    contracted = "".join(c for c in kernel if c in inputs)
    produced = "".join(c for c in kernel if c in outputs)
    kept = "".join(c for c in outputs if c not in produced)
    z = next(c for c in string.ascii_letters if c not in equation)
    return EinsumAxes(
        kernel=kernel,
        contracted=contracted,
        outputs=produced,
        input_equation=f"{inputs},{contracted}{z}->{kept}{z}",
        output_equation=f"{kept}{z},{z}{produced}->{outputs}",
        is_rows_product=inputs == kept + contracted and outputs == kept + produced,
    )


def einsum_kernel_shape(equation: str, input_shape, output_shape) -> tuple:
    """The shape of the kernel by which an equation takes one shape to the other."""
    inputs, rest = equation.split(",")
    kernel, outputs = rest.split("->")
    size = {}
    for axes, shape in ((inputs, input_shape), (outputs, output_shape)):
        before, _, behind = axes.partition("...")
        size.update(zip(before, shape))
        size.update(zip(reversed(behind), reversed(shape)))
    return tuple(size[c] for c in kernel)


def holds_integers(layer) -> bool:
    """Whether a layer's weight is quantized; a float8 layer holds it in floating point."""
    return layer.quantization_mode not in (None, "float8")


def check_quantization(mode):
    """Raises ValueError for a mode in which Keras cannot quantize the base under an adapter."""
    if mode in CALIBRATED_MODES:
        raise ValueError(
            f"`mode` must not be one of {CALIBRATED_MODES} for what is adapted with DCFT: "
            "calibrating would take base plus increment for the base. Quantize the model first, "
            f"then call `enable_dcft`. Received: mode={mode!r}"
        )


def check_positive_int(name, value):
    """Raises TypeError for what is no int (or a bool), ValueError for an int below 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an int. Received: {name}={value!r}")
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1. Received: {name}={value}")


def check_number(name, value):
    """Raises TypeError for what is neither int nor float (or is a bool)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be a number. Received: {name}={value!r}")


def check_settings(kernel_size, rank, alpha, dropout, orthogonality):
    """Raises TypeError or ValueError for settings that no layer can have."""
    check_positive_int("kernel_size", kernel_size)
    check_positive_int("rank", rank)
    for name, value in (("alpha", alpha), ("dropout", dropout), ("orthogonality", orthogonality)):
        check_number(name, value)
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"`alpha` must be positive and finite. Received: alpha={alpha}")
    if not 0 <= dropout < 1:
        raise ValueError(f"`dropout` must be in [0, 1). Received: dropout={dropout}")
    if not (math.isfinite(orthogonality) and orthogonality >= 0):
        raise ValueError(
            "`orthogonality` must be finite and not negative. "
            f"Received: orthogonality={orthogonality}"
        )


def check_base_arguments(kwargs):
    """Raises ValueError for arguments of the Keras layer that make no sense with an adapter."""
    for name, reason in (
        ("kernel_constraint", "the kernel is frozen"),
        ("embeddings_constraint", "the table is frozen"),
        ("lora_rank", "a layer is adapted either with DCFT or with LoRA"),
    ):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"`{name}` cannot be given here: {reason}. Received: {name}={kwargs[name]!r}"
            )


def fresh_initializer(initializer):
    """An initializer that draws anew: one instance gives all tensors of a shape the same values."""
    initializer = initializers.get(initializer)
    if isinstance(initializer, initializers.Initializer):
        return initializer.clone()
    return initializer
