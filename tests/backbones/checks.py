"""What is done to every backbone: adapted, trained a step, saved, loaded, removed, merged."""

import collections
import contextlib
import functools
import re

import keras
import numpy as np
from keras import ops
from tools import array, randomize_adapters, values

import backbones
from keras_dcft import (
    AdapterBank,
    enable_dcft,
    keras_internals,
    merge_dcft,
    remove_dcft,
    save_dcft_weights,
)
from keras_dcft.adapter import ADAPTER_VARIABLES
from keras_dcft.paths import dcft_layers, walk
from keras_dcft.reclassing import DENSE_CLASSES, matrix_shape_of

# Layers of these tiny backbones to which no gradient comes.
WITHOUT_GRADIENT = {
    "DiffusionGemmaBackbone": (
        r"^(gate|up|down)_proj$",
        "for self-conditioning, which the backbone's own call multiplies with zero",
    ),
    "Gemma3nBackbone": (
        r"decoder_block_1/attention/(k|v)_proj$",
        "the last layer takes keys and values from an earlier one, its own are never called",
    ),
}
if keras.backend.backend() == "torch":
    WITHOUT_GRADIENT["SAM3PromptableConceptBackbone"] = (
        r"/boxes_|geometry_encoder/.*/[qk]_proj$",
        "on torch boxes need torchvision; without them there is a single token to attend to",
    )

WITHOUT_FILES = {
    "FeaturePyramidBackbone": "its own configuration lacks its inputs and outputs",
}

WITHOUT_COMPILING = {  # on JAX, the plain ones neither
    "StableDiffusion3Backbone": "it loops as often as one of its inputs says",
}

# Backbones whose layers or outputs are not made of whole rows of the batch, and the reason.
WITHOUT_BANK = {
    "CLIPBackbone": "its outputs",  # compare every picture with every text
    "DiffusionGemmaBackbone": "weights of layers that it does not call",
    "EmbeddingGemma2Backbone": "weights of layers that it does not call",
    "Gemma3nBackbone": "the inputs of its layer 'multimodal_embedding_processor/vision_embedder",
    "Gemma4Backbone": "weights of layers that it does not call",
    "MetaCLIP2Backbone": "its outputs",
    "SigLIPBackbone": "its outputs",
    "StableDiffusion3Backbone": "the inputs of its layer 'diffuser/vector_embedding/dense1'",
    "XLNetBackbone": "the inputs of its layer 'xlnet_encoder_0/rel_attn/",
}
if keras.backend.backend() == "jax":
    WITHOUT_BANK["SAM3PromptableConceptBackbone"] = "inside of a traced control flow"


class Step(keras.Model):
    """A model around a backbone whose loss is a polynomial of all its outputs."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def call(self, inputs):
        outputs = self.backbone(inputs, training=True)
        floats = [o for o in keras.tree.flatten(outputs) if "float" in str(o.dtype)]
        # Not squares alone, whose mean is the same for any outputs that are normalized.
        self.add_loss(sum(ops.mean(ops.square(o) * (1 + o)) for o in floats))
        return ops.zeros((backbones.BATCH, 1))


def flat_outputs(model, inputs):
    # As in `predict`: torch multiplies in another order where gradients are wanted.
    without_gradients = contextlib.nullcontext()
    if keras.backend.backend() == "torch":
        import torch

        without_gradients = torch.no_grad()
    with without_gradients:
        return _as_floats(model(inputs))


def _as_floats(outputs):
    return [array(ops.cast(o, "float32")) for o in keras.tree.flatten(outputs)]


def frozen_outputs(model, inputs):
    """The outputs of a model with frozen weights.

    SegFormer always calls its BatchNormalization as in training, so what it computes depends on
    whether that is frozen; and torch multiplies in another order by what is trained.
    """
    model.trainable = False
    outputs = flat_outputs(model, inputs)
    model.trainable = True
    return outputs


def difference(before, after) -> float:
    """The largest difference, relative to an output's largest value where that is above 1."""
    pairs = [(a, b) for a, b in zip(after, before) if b.size]
    return max(float(np.abs(a - b).max() / max(1, np.abs(b).max())) for a, b in pairs)


def measure(name: str, folder) -> dict:
    """Does all of it to one tiny backbone and returns what was seen."""
    model, inputs, built, seen = _make(name)
    if not built:
        return _refused(model, seen)
    base, frozen_base = flat_outputs(model, inputs), frozen_outputs(model, inputs)
    _enable(model, built, seen)
    seen["trainable"] = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    seen["start_difference"] = difference(frozen_base, flat_outputs(model, inputs))

    seen.update(_train(name, model, inputs))

    randomize_adapters(model, scale=0.15)  # more would make some of the deep models chaotic
    adapted = flat_outputs(model, inputs)
    seen["adapter_effect"] = difference(base, adapted)
    if name not in WITHOUT_FILES:
        model.save(f"{folder}/m.keras")
        restored = keras.saving.load_model(f"{folder}/m.keras")
        seen["file_difference"] = difference(adapted, flat_outputs(restored, inputs))
        seen["same_config"] = restored.dcft_config == model.dcft_config
        remove_dcft(restored)
        seen["removed_difference"] = difference(base, flat_outputs(restored, inputs))
    seen["bank"] = _bank(model, inputs, folder)
    merge_dcft(model)
    seen["merged_difference"] = difference(adapted, frozen_outputs(model, inputs))
    seen["merged_class"] = type(model).__name__
    return seen


def _bank(model, inputs, folder):
    """How far two rows with two adapters of their own are from each alone, or why it is refused."""
    expected, paths = {}, {}
    for seed, name in enumerate(("other", "own")):
        before = values(model.trainable_variables)
        if name == "other":
            randomize_adapters(model, seed=seed, scale=0.15)
        expected[name] = _as_floats(model(inputs, training=False))
        paths[name] = f"{folder}/{name}.dcft.safetensors"
        save_dcft_weights(model, paths[name])
        for variable, value in zip(model.trainable_variables, before):
            variable.assign(value)
    with AdapterBank(model, paths) as bank:
        try:
            names = ["other", "own"][: max(map(len, keras.tree.flatten(inputs)))]
            found = _as_floats(bank(inputs, names))
        except ValueError as error:
            return str(error)
    by_row = []
    for position, outputs in enumerate(found):
        of_row = len(outputs) // len(names)
        for row, name in enumerate(names):
            part = slice(row * of_row, (row + 1) * of_row)
            by_row.append((expected[name][position][part], outputs[part]))
    return difference(*zip(*by_row))


def glance(name: str) -> dict:
    """Adapts one tiny backbone and lets it predict: the part of `measure` that costs least."""
    model, inputs, built, seen = _make(name)
    if not built:
        return _refused(model, seen)
    _enable(model, built, seen)
    predict = model.predict_on_batch
    if keras.backend.backend() == "jax":
        predict = model if name in WITHOUT_COMPILING else _compiled(model)
    start = _as_floats(predict(inputs))
    randomize_adapters(model, scale=0.15)
    seen["adapter_effect"] = difference(start, _as_floats(predict(inputs)))
    return seen


def _compiled(model):
    """What a model predicts, compiled.

    Keras calls a model that has layers which are not built operation by operation before it
    compiles it, and JAX compiles each, which takes ten times as long.
    """
    import jax

    call = jax.jit(functools.partial(model.stateless_call, training=False))

    def predict(inputs):
        trained, others = model.trainable_variables, model.non_trainable_variables
        outputs, _ = call([v.value for v in trained], [v.value for v in others], inputs)
        return outputs

    return predict


def _make(name):
    """The backbone, inputs for it, its dense layers that are built, and what is seen of them."""
    model, inputs = backbones.make(name)
    layers = walk(model)
    dense = {path: layer for path, layer in layers.items() if isinstance(layer, DENSE_CLASSES)}
    built = {path: layer for path, layer in dense.items() if layer.built}
    seen = {
        "parameters": model.count_params(),
        "dense_layers": len(built),
        "dense_parameters": sum(layer.count_params() for layer in built.values()),
        "other_parameters": _parameters_by_class(model, layers, built),
        "unbuilt": sorted(set(dense) - set(built)),
        "narrow": sorted(path for path, x in built.items() if min(matrix_shape_of(x)) < 2),
    }
    for variable in model.weights:  # zeros would hide the layers before them
        if len(variable.shape) > 1 and not np.any(array(variable)):
            variable.assign(0.3 * keras.random.normal(variable.shape, seed=7))
    return model, inputs, built, seen


def _refused(model, seen):
    try:
        enable_dcft(model)
    except ValueError as error:
        seen["error"] = str(error)
    return seen


def _enable(model, built, seen):
    narrow = [built[path] for path in seen["narrow"]]
    exclude = (lambda layer: any(layer is x for x in narrow)) if narrow else None
    enable_dcft(model, kernel_size=2, exclude_layers=exclude)
    seen["adapted"] = sorted(model.dcft_config["layers"])


def _train(name, model, inputs) -> dict:
    """Trains for a step; returns what changed but should not have, and the other way round."""
    randomize_adapters(model, scale=0.15)  # no gradient passes a filter of zeros to A and B
    adapters = {
        (path, variable): getattr(layer, variable)
        for path, layer in dcft_layers(model).items()
        for variable in ADAPTER_VARIABLES
    }
    adapted = {id(v) for v in adapters.values()}
    frozen = [v for v in model.weights if id(v) not in adapted]
    before, adapters_before = values(frozen), values(adapters.values())
    step = Step(model)
    # Its first step has one size for all gradients; some are so small that rounding takes others.
    step.compile(keras.optimizers.Adam(0.01, epsilon=1e-20))
    step.optimizer.build(step.trainable_variables)  # else TensorFlow traces the step twice
    step.train_on_batch(inputs)
    after, adapters_after = values(frozen), values(adapters.values())
    without, _ = WITHOUT_GRADIENT.get(name, ("^$", ""))
    return {
        "changed_base_weights": [
            v.path for v, old, new in zip(frozen, before, after) if not np.array_equal(old, new)
        ],
        "untrained": [
            f"{path}/{variable}"
            for (path, variable), old, new in zip(adapters, adapters_before, adapters_after)
            if (np.array_equal(old, new) or not np.all(np.isfinite(new)))
            and not re.search(without, path)
        ],
    }


def _parameters_by_class(model, layers, but) -> dict:
    """How many parameters are in layers' own weights, by class, most first, but for some layers."""
    counted = {id(v) for layer in but.values() for v in layer.weights}
    numbers = collections.Counter()
    for layer in (model, *layers.values()):
        for variable in keras_internals.own_weights(layer):
            if id(variable) not in counted:
                counted.add(id(variable))
                numbers[type(layer).__name__] += int(np.prod(variable.shape))
    return dict(numbers.most_common())
