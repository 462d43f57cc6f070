"""What all DCFT layers share: the adapter that they hold, and Keras's ways of writing a layer."""

import keras
from keras import ops

from keras_dcft import freezing, increments, keras_internals, layouts, selection, shares
from keras_dcft.adapter import ADAPTER_VARIABLES, Adapter
from keras_dcft.settings import AdapterSettings

if keras.config.backend() == "torch":
    from keras_dcft import fused
else:
    fused = None

# Keras's quantization modes that look at data, one layer after the other.
CALIBRATED_MODES = ("gptq", "awq")


class DCFTLayer:
    """Mixin of a layer with a frozen weight and an adapter.

    A class that uses it comes before the Keras layer in the bases, names that layer in
    `dcft_base_class` and the attribute of its frozen weight in `dcft_weight_name`, and gives the
    matrix view of that weight: `dcft_weight_shape_of`, and where the weight is none itself
    `dcft_matrix_shape_of` and `dcft_from_matrix`. They also take a layer of the base class and the
    first two, while it is being built, the shape of its inputs. A user's layer may have any
    attributes, so all of ours, and all methods that are not Keras's, have `dcft` in their names.
    """

    dcft_base_class: type
    dcft_weight_name: str
    dcft_adapter = None
    _dcft_loaded = None

    @classmethod
    def dcft_matrix_shape_of(cls, layer, input_shape=None) -> tuple[int, int]:
        """The shape of a layer's weight as a matrix."""
        return cls.dcft_weight_shape_of(layer, input_shape)

    @staticmethod
    def dcft_from_matrix(layer, matrix):
        """What is given as a matrix in the shape of a layer's weight."""
        return matrix

    @staticmethod
    def dcft_axes_of(layer) -> tuple[str, str, str]:
        """A letter for each axis of a layer's weight: the contracted ones, the others, all."""
        return "i", "o", "io"

    @classmethod
    def dcft_increment_of(cls, layer, factors, scale):
        """An increment of a layer's weight, a float32 tensor of its shape.

        Computed by the definition, `keras.ops.conv_transpose`, or where the weight lies in parts on
        several devices as the product of the thin factors, which gives each device its part.

        Args:
            layer: an adapted layer or one of the base class.
            factors: A, B and the filter.
            scale: float, `alpha / r`.
        """
        shape = cls.dcft_weight_shape_of(layer)
        layout = layouts.sharded_layout_of(cls.dcft_weight_of(layer), len(shape))
        if layout is not None:
            axes = cls.dcft_axes_of(layer)
            return layouts.sharded_increment(factors, scale, shape, axes, layout)
        matrix_shape = cls.dcft_matrix_shape_of(layer)
        matrix = increments.dcft_increment(*factors, *matrix_shape, scale)
        return cls.dcft_from_matrix(layer, matrix)

    @staticmethod
    def dcft_own_settings(settings: AdapterSettings) -> AdapterSettings:
        """The settings without what makes no sense for this kind of layer."""
        return settings

    def dcft_adapt(self, settings: AdapterSettings, shared=None, input_shape=None):
        """Freezes what the layer has and gives it an adapter.

        Args:
            settings: the adapter's.
            shared: the `Adapter` of another layer with the same frozen weight, or None.
            input_shape: shape of the inputs for a layer that is being built.
        """
        if not freezing.is_touched(self):
            self._dcft_before = freezing.Before(self)
        freezing.freeze_variables(self)
        # By default Keras refuses subclasses, which might hold other weights than their base class.
        keras_internals.wrap_quantize(self, check_quantization, type_check=False)
        self.dcft_settings = settings = self.dcft_own_settings(settings)
        if shared is None:
            adapter = Adapter(self, settings, self.dcft_matrix_shape_of(self, input_shape))
        else:
            adapter = shared
            for variable in adapter.variables.values():
                keras_internals.track_variable(self, variable)
        self.dcft_adapter = adapter
        if adapter.seed is not None:
            keras_internals.track_seed(self, adapter.seed)
        if self._dcft_loaded is not None:
            shares.set_state(self, self._dcft_loaded, self.dcft_adapter.matrix_shape)

    def dcft_release(self):
        """Undoes `dcft_adapt` but for the freezing."""
        keras_internals.unwrap_quantize(self)
        if self.dcft_adapter is not None:
            for variable in self.dcft_adapter.variables.values():
                keras_internals.untrack_variable(self, variable)
            if self.dcft_adapter.seed is not None:
                keras_internals.untrack_seed(self, self.dcft_adapter.seed)
        for name in ("dcft_adapter", "dcft_settings", "_dcft_loaded"):
            vars(self).pop(name, None)

    def build(self, input_shape):
        super().build(input_shape)
        self.dcft_adapt(self.dcft_settings, input_shape=input_shape)

    @property
    def dcft_a(self):
        """The input factor A, a variable of shape `(ceil(in / d), rank)`."""
        return self.dcft_adapter.a

    @property
    def dcft_b(self):
        """The output factor B, a variable of shape `(rank, ceil(out / d))`."""
        return self.dcft_adapter.b

    @property
    def dcft_filter(self):
        """The filter, a variable of shape `(d, d)`."""
        return self.dcft_adapter.filter

    def dcft_increment(self):
        """The weight increment, a float32 tensor of the kernel's shape (paper, equation 5).

        Computed by the definition, `keras.ops.conv_transpose`. Where `keras.distribution` has the
        kernel in parts on several devices, each works out its own part, by the thin factors.
        """
        factors = self.dcft_adapter.variables.values()
        return self.dcft_increment_of(self, factors, self.dcft_adapter.settings.scale)

    def dcft_frozen_weight(self):
        """The base layer's own weight, the variable."""
        return self.dcft_weight_of(self)

    @classmethod
    def dcft_weight_of(cls, layer):
        """That weight of an adapted layer or of one of the base class."""
        # Keras deletes the kernel when it has calibrated a quantized one.
        is_there = hasattr(layer, cls.dcft_weight_name)
        return getattr(layer, cls.dcft_weight_name) if is_there else layer.quantized_kernel

    def dcft_effective_weight(self):
        """Base plus increment, of the base weight's dtype; differentiable in the adapter.

        Code that reads a layer's `kernel` or `embeddings` instead of calling the layer gets what
        the layer computes with.

        Raises:
            ValueError: if the frozen weight is quantized.
        """
        if holds_integers(self):
            raise ValueError(
                f"Use `dcft_increment()`, the increment alone: layer '{self.name}' holds a "
                "quantized weight, to which no increment can be added. Received: "
                f"quantization_mode={self.quantization_mode!r}"
            )
        base = ops.convert_to_tensor(self.dcft_frozen_weight())
        increment = self.dcft_increment()
        return ops.cast(ops.add(ops.cast(base, increment.dtype), increment), base.dtype)

    def _dcft_constant(self, variable):
        # Without the stop, TensorFlow's tape works out the full-size gradient of the base kernel,
        # which nobody asks for: it watches every variable, whatever Keras's `trainable` says.
        return variable if variable.trainable else ops.stop_gradient(variable)

    def enable_lora(self, *args, **kwargs):
        raise ValueError(
            f"Call `merge_dcft(model)` or `remove_dcft(model)` first: layer '{self.name}' is "
            "adapted with DCFT and cannot have LoRA as well."
        )

    def save_own_variables(self, store):
        written = {}
        self.dcft_base_class.save_own_variables(freezing.plain_view(self), written)
        self._dcft_check_written(written)
        adapter = self.dcft_adapter
        if adapter and adapter.host is self:
            written.update(adapter.variables)
        selection.write(self, written, store)

    def _dcft_check_written(self, written):
        """Raises RuntimeError if Keras's own saving gives anything but the base's variables.

        Weights worked out for the file, such as a kernel with the increment in it, would be loaded
        as the base. A class that saves in a way of its own is as free as it is in Keras.
        """
        saves = self.dcft_base_class.save_own_variables
        if not self.built or not saves.__module__.startswith("keras."):
            return
        own = {id(v) for v in keras_internals.own_weights(freezing.plain_view(self))}
        values = {id(value) for value in written.values()}
        if id(self.dcft_frozen_weight()) not in values or not values <= own:
            raise RuntimeError(
                f"Layer '{self.name}' cannot be saved: Keras {keras.__version__} does not write "
                f"the frozen weight of a {self.dcft_base_class.__name__} itself. Nothing was "
                "written for it. This version of Keras needs a newer keras_dcft."
            )

    def load_own_variables(self, store):
        # A store of the base layer alone has no adapter; then the adapter keeps its values. Any
        # other difference in number is an error.
        stored = freezing.without_ours(store)
        adapter = {name: stored.pop(name) for name in ADAPTER_VARIABLES if name in stored}
        if self.built and adapter and len(adapter) < len(ADAPTER_VARIABLES):
            raise ValueError(
                f"Layer '{self.name}' cannot be loaded: of the adapter's variables "
                f"{list(ADAPTER_VARIABLES)} the file has only {list(adapter)}."
            )
        view = freezing.plain_view(self)
        self.dcft_base_class.load_own_variables(view, stored)
        keras_internals.keep_state(self, view)
        for name, value in adapter.items():
            selection.assign(self.dcft_adapter.variables[name], value)
        freezing.take_base_values(self, store)
        shares.read(self, store)

    def get_config(self):
        keras_internals.check_config_is_for_keras_file()
        config = self.dcft_base_class.get_config(freezing.plain_view(self))
        state = shares.special_state(self)
        return {**config, **self.dcft_settings.config(), **({"dcft": state} if state else {})}

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        state = config.pop("dcft", None)
        layer = super().from_config(config)
        layer._dcft_loaded = state
        return layer

    def __repr__(self):
        size, settings = "", self.dcft_settings
        if self.built:
            size = f", kernel={'x'.join(map(str, self.dcft_adapter.matrix_shape))}"
            if self.quantization_mode is not None:
                size += f", {self.quantization_mode}"
        return (
            f"<{type(self).__name__} name={self.name}{size}, kernel_size={settings.kernel_size}, "
            f"rank={settings.rank}, alpha={settings.alpha:g}, built={self.built}>"
        )


class DCFTKernel(DCFTLayer):
    """What `DCFTDense` and `DCFTEinsumDense` share: `activation(base + increment + bias)`."""

    dcft_weight_name = "_kernel"

    @property
    def kernel(self):
        """The effective kernel, see `dcft_effective_weight`."""
        return self.dcft_effective_weight()

    def call(self, inputs, training=None):
        if fused and self._dcft_is_matrix and not (self.dcft_settings.dropout and training):
            outputs = self._dcft_fused_product(inputs)
            if outputs is not None:
                return outputs if self.activation is None else self.activation(outputs)
        outputs = self._dcft_product(inputs, self._dcft_constant(self._kernel))
        # The bias goes first: compilers fuse it with the base product as they do in the base model,
        # which keeps the start equal to it to the last bit. On PyTorch `+=` works in place, which
        # saves tensors of the outputs' size.
        if self.bias is not None:
            outputs += self._dcft_constant(self.bias)
        outputs += self._dcft_increment_product(self.dcft_adapter.dropped_out(inputs, training))
        return outputs if self.activation is None else self.activation(outputs)

    def quantized_call(self, inputs, training=None):
        # Keras's quantized calls end with the activation, and the increment goes in before it.
        view = freezing.plain_view(self)
        view.__dict__["activation"] = None
        base = self.dcft_base_class.quantized_call(view, inputs, training=training)
        inputs = self.dcft_adapter.dropped_out(inputs, training)
        # Not in place, which PyTorch forbids for what custom gradients return.
        outputs = ops.add(base, self._dcft_increment_product(inputs))
        return outputs if self.activation is None else self.activation(outputs)

    def _dcft_fused_product(self, inputs):
        """Base, increment and bias in one product on PyTorch; None where that is not right."""
        if self._kernel.trainable or (self.bias is not None and self.bias.trainable):
            return None
        kernel = ops.convert_to_tensor(self._kernel)
        bias = None if self.bias is None else ops.convert_to_tensor(self.bias)
        if not fused.can_multiply(inputs, kernel, bias):
            return None
        return fused.product(inputs, kernel, bias, self.dcft_adapter, self._dcft_product)

    def _dcft_rows_product(self, inputs, contracted_axes, output_sizes):
        """The product with D and U as one of matrices, for inputs that end with what is contracted.

        With the leading axes flattened, the gradients of D and U contract one axis instead of
        several, which XLA's CPU backend turns into code that takes half the time.
        """
        input_factor, output_factor = self.dcft_adapter.thin_factors(self.compute_dtype)
        rows = ops.reshape(inputs, (-1, self.dcft_adapter.matrix_shape[0]))
        outputs = ops.matmul(ops.matmul(rows, input_factor), output_factor)
        leading = ops.shape(inputs)[: len(inputs.shape) - contracted_axes]
        return ops.reshape(outputs, (*leading, *output_sizes))


def holds_integers(layer) -> bool:
    """Whether a layer's weight is quantized; a float8 layer holds it in floating point."""
    return layer.quantization_mode not in (None, "float8")


def check_quantization(layer, mode):
    """Raises ValueError for what Keras cannot quantize under an adapter.

    Args:
        layer: the layer or model that is to be quantized.
        mode: Keras's quantization mode.
    """
    if any(shares.waits_to_be_trained(below) for below in layer._flatten_layers()):
        raise ValueError(
            "Remove the adapters that are not active first, or quantize a part that none of them "
            "trains in full, such as a task's backbone: quantized weights cannot take the trained "
            f"values. Received: '{layer.name}' with such an adapter."
        )
    if mode in CALIBRATED_MODES:
        raise ValueError(
            "Quantize the model first, then call `enable_dcft`: `mode` must not be one of "
            f"{CALIBRATED_MODES} for what is adapted with DCFT, since calibrating would take base "
            f"plus increment for the base. Received: mode={mode!r}"
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
