"""An adapter as the LoRA that it is: of rank r·d, exactly (form 3 of the increment)."""

import keras
from keras import ops

from keras_dcft import increments, keras_internals, selection, shares
from keras_dcft.adapter import ADAPTER_VARIABLES
from keras_dcft.einsum import einsum_axes
from keras_dcft.layers.embeddings import DCFTReversibleEmbedding
from keras_dcft.models import release_all
from keras_dcft.paths import listed, with_itself
from keras_dcft.reclassing import matrix_shape_of, weight_owners, weight_shape_of

# Keras's modes of a layer that it gives LoRA.
QUANTIZATIONS = (None, "int8", "int4")


def lora_factors(layers: dict, name) -> dict:
    """The two factors of each layer's increment, whose product it is.

    Args:
        layers: dict of layers by path, all adapted by the adapter of this name.
        name: str, the adapter, active or not.

    Returns:
        dict of the same paths to pairs of float32 arrays, `(in, rank * d)` and `(rank * d, out)`.
    """
    factors = {}
    for path, owner in weight_owners(layers).items():
        if owner not in factors:
            factors[owner] = _factors(layers[owner], name)
        factors[path] = factors[owner]
    return {path: factors[path] for path in layers}


def _factors(layer, name):
    values = shares.adapter_values(layer, name)
    arrays = (selection.as_array(values[key]) for key in ADAPTER_VARIABLES)
    a, b, kernel_filter = map(ops.convert_to_tensor, arrays)
    settings, (rows, columns) = shares.settings_of(layer, name), matrix_shape_of(layer)
    left = increments.expand_input_factor(a, kernel_filter, rows, settings.scale)
    right = increments.expand_output_factor(b, settings.kernel_size, columns)
    return ops.convert_to_numpy(left), ops.convert_to_numpy(right)


def check_convertible(layers: dict, all_layers: dict):
    """Raises ValueError if Keras's own LoRA cannot have the increment of one of these layers.

    Args:
        layers: dict of adapted layers by path.
        all_layers: dict of all of the model's, for messages.
    """
    others = [path for path, layer in layers.items() if not _has_the_shape_of_lora(layer)]
    if others:
        raise ValueError(
            "Call `merge_dcft(model)`, or `export_to_peft(model, folder)` for a LoRA: Keras's has "
            "one matrix of the kernel's last axis alone, which cannot hold the increments of "
            f"{listed(others, all_layers)}."
        )
    for path, layer in layers.items():
        # Keras's quantized product with the table transposed leaves its LoRA out.
        is_tied = isinstance(layer, DCFTReversibleEmbedding) and layer.tie_weights
        modes = (None,) if is_tied else QUANTIZATIONS
        if layer.quantization_mode not in modes:
            raise ValueError(
                f"Keras has no LoRA for layer {listed([path], all_layers)} as it is quantized: it "
                f"must have a quantization mode of {modes}. Received: "
                f"quantization_mode={layer.quantization_mode!r}"
            )


def _has_the_shape_of_lora(layer) -> bool:
    if not isinstance(layer, keras.layers.EinsumDense):
        return True
    axes = einsum_axes(layer.equation)
    return len(axes.outputs) == 1 and axes.kernel == axes.contracted + axes.outputs


def convert(model, factors: dict, holders):
    """Gives a model's layers Keras's LoRA instead of the adapter that is active.

    Args:
        model: a model that holds adapted layers.
        factors: dict of their paths to pairs of arrays as of `lora_factors`.
        holders: every model that holds one of these layers.
    """
    trained = {id(variable) for variable in model.trainable_variables}
    layers = {path: layer for path, layer in with_itself(model).items() if path in factors}
    owners = weight_owners(layers)
    is_trained = {
        path: any(v.trainable for v in layers[owner].dcft_adapter.variables.values())
        for path, owner in owners.items()
    }
    shapes = {path: weight_shape_of(layer) for path, layer in layers.items()}
    release_all(model, holders)
    for path, layer in with_itself(model).items():
        own = keras_internals.own_weights(layer)
        if own and not any(id(variable) in trained for variable in own):
            layer.trainable = path in factors
        for variable in own:
            variable.trainable = id(variable) in trained
        if path in factors:
            left, right = factors[path]
            layer.enable_lora(left.shape[1])
            a, b = _lora_variables(layer)
            a.assign(left.reshape((*shapes[path][:-1], -1)))
            b.assign(right)
            a.trainable = b.trainable = is_trained[path]


def _lora_variables(layer):
    if isinstance(layer, keras.layers.Embedding):
        return layer.lora_embeddings_a, layer.lora_embeddings_b
    return layer.lora_kernel_a, layer.lora_kernel_b
