"""Writes the golden files: what this package wrote at some time, and what it then predicted.

    python tests/golden/write.py tests/golden/v1

`v1` was written on 2026-11-25 by commit 0ef30ba (adapter files of format version 1) on TensorFlow
with Keras 3.15.1 and KerasHub 0.26.0. Every later version has to load it, so it is never written
anew: a new format gets a folder of its own. Keras 3.13 reads no Glorot initializer of Keras 3.15,
and KerasHub 0.26 no task preset of KerasHub 0.32, adapted or not; hence the initializers, and the
older KerasHub.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import keras
import keras_hub
import numpy as np
from tools import TEXTS, VOCABULARY, randomize_adapters, subclassed, vectors

from keras_dcft import enable_dcft, save_dcft_weights


def dense(units, **arguments):
    return keras.layers.Dense(units, kernel_initializer="random_normal", **arguments)


def sequential():
    layers = [dense(20, activation="relu"), keras.layers.LayerNormalization(), dense(9)]
    model = keras.Sequential([keras.Input((12,)), *layers])
    model.compile("adam", "mse")
    return model


def around_an_encoder():
    inputs = keras.Input((6, 12))
    encoder = keras_hub.layers.TransformerEncoder(
        intermediate_dim=20, num_heads=2, kernel_initializer="random_normal", name="encoder"
    )
    pooled = keras.layers.GlobalAveragePooling1D()(encoder(inputs))
    return keras.Model(inputs, dense(9, name="head")(pooled))


def sequences():
    return vectors(4, 6 * 12).reshape(4, 6, 12)


def task():
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=len(VOCABULARY),
        num_layers=1,
        num_heads=2,
        hidden_dim=12,
        intermediate_dim=20,
        max_sequence_length=8,
        dropout=0.0,
    )
    tokenizer = keras_hub.models.BertTokenizer(vocabulary=VOCABULARY)
    preprocessor = keras_hub.models.BertTextClassifierPreprocessor(tokenizer, sequence_length=8)
    return keras_hub.models.BertTextClassifier(
        backbone=backbone, num_classes=2, preprocessor=preprocessor, dropout=0.0
    )


def int8():
    """A quantized base in which nothing is rounded, so that every backend has the same integers."""
    inputs = keras.Input((12,))
    model = keras.Model(
        inputs,
        [
            keras.layers.Dense(8, activation="tanh", name="first")(inputs),
            keras.layers.EinsumDense("bi,ijk->bjk", (4, 2), bias_axes="jk", name="second")(inputs),
        ],
    )
    for number, layer in enumerate(model.layers[1:]):
        kernel = np.sin(np.arange(layer.kernel.shape[0] * 8) + number).reshape(-1, 8)
        kernel = np.round(127 * kernel / np.abs(kernel).max(axis=0)) / 1024
        layer.kernel.assign(kernel.reshape(layer.kernel.shape))
    model.quantize("int8")
    return model


def integers():
    rows = vectors(4)
    return np.round(127 * rows / np.abs(rows).max(axis=1, keepdims=True))


# name: how to make the base model, its inputs, and the arguments of `enable_dcft`
MODELS = {
    "sequential": (sequential, vectors, {"rank": 2}),
    "encoder": (around_an_encoder, sequences, {"dropout": 0.1}),
    "task": (task, lambda: TEXTS[:4], {"kernel_size": {"query|value": 2, ".*": 4}}),
    "subclassed": (subclassed, vectors, {"orthogonality": 0.1}),
}
ADAPTERS = {
    "head": (task, lambda: TEXTS[:4], {}),
    "trainable_layers": (task, lambda: TEXTS[:4], {"trainable_layers": "layer_norm"}),
    "embedding": (task, lambda: TEXTS[:4], {"target_layers": ["token_embedding$", "query"]}),
    "int8": (int8, integers, {"alpha": 8.0}),
}


def predict(model, inputs):
    outputs = keras.tree.flatten(model.predict(inputs, verbose=0))
    return np.concatenate([np.reshape(x, (len(x), -1)) for x in outputs], axis=1)


def change_all_that_is_trained(model):
    """Gives adapters, heads and named layers other values than those that they start with."""
    randomize_adapters(model)
    for number, variable in enumerate(model.trainable_variables):
        if not variable.name.startswith("dcft_"):
            change = 0.1 * np.cos(np.arange(np.prod(variable.shape)) + number)
            variable.assign_add(change.reshape(variable.shape).astype(variable.dtype))


def write(folder: Path):
    folder.mkdir(parents=True)
    predictions = {}
    for name, (make, inputs, arguments) in MODELS.items():
        keras.utils.clear_session()
        model = enable_dcft(make(), **{"kernel_size": 4, **arguments})
        change_all_that_is_trained(model)
        model.save(folder / f"{name}.keras")
        predictions[name] = predict(model, inputs())
        if name == "task":
            model.save_to_preset(str(folder / "preset"))
    task().save_weights(folder / "base.weights.h5")
    for name, (make, inputs, arguments) in ADAPTERS.items():
        keras.utils.clear_session()
        model = make()
        if make is task:
            model.load_weights(folder / "base.weights.h5")
        enable_dcft(model, **{"kernel_size": 4, **arguments})
        change_all_that_is_trained(model)
        save_dcft_weights(model, folder / f"{name}.dcft.safetensors", notes={"name": name})
        predictions[f"{name} adapter"] = predict(model, inputs())
    np.savez(folder / "predictions.npz", **predictions)


if __name__ == "__main__":
    keras.utils.set_random_seed(0)
    write(Path(sys.argv[1]))
