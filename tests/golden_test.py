"""Files that earlier versions wrote go on loading, with the predictions that they gave then."""

from pathlib import Path

import keras
import keras_hub
import numpy as np
import pytest
from golden.write import ADAPTERS, MODELS, predict, task

from keras_dcft import load_dcft_weights, read_dcft_notes, remove_dcft
from keras_dcft.paths import dcft_layers

V1 = Path(__file__).parent / "golden" / "v1"


@pytest.fixture(scope="module")
def predictions():
    return np.load(V1 / "predictions.npz")


def assert_predicts(model, inputs, expected):
    found = predict(model, inputs)
    assert np.abs(found - expected).max() <= 1e-5 * max(1, np.abs(expected).max())


@pytest.mark.parametrize("name", MODELS)
def test_keras_files(name, predictions):
    _, inputs, _ = MODELS[name]
    model = keras.saving.load_model(V1 / f"{name}.keras")
    assert len(dcft_layers(model)) == len(model.dcft_config["layers"]) > 0
    assert_predicts(model, inputs(), predictions[name])


def test_presets(predictions):
    _, inputs, _ = MODELS["task"]
    model = keras_hub.models.TextClassifier.from_preset(str(V1 / "preset"))
    assert type(model).__name__ == "DCFTBertTextClassifier"
    assert_predicts(model, inputs(), predictions["task"])


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_files(name, predictions):
    make, inputs, _ = ADAPTERS[name]
    path, model = V1 / f"{name}.dcft.safetensors", make()
    if make is task:
        model.load_weights(V1 / "base.weights.h5")
    base = predict(model, inputs())
    load_dcft_weights(model, path)
    expected = predictions[f"{name} adapter"]
    assert np.abs(base - expected).max() > 1e-2
    assert_predicts(model, inputs(), expected)
    assert read_dcft_notes(path)["notes"] == {"name": name}
    assert not dcft_layers(remove_dcft(model))
