"""Training that is interrupted by saving and loading goes on as if it had not been."""

import keras
import numpy as np
import pytest
from tools import (
    MODELS,
    predict,
    step_losses,
    vectors,
)

from keras_dcft import enable_dcft, merge_dcft


@pytest.mark.parametrize("kind", ["sequential", "subclassed", "functional_around_backbone"])
def test_losses_go_on_as_in_an_uninterrupted_run(kind, tmp_path):
    model, inputs = MODELS[kind][0](), MODELS[kind][1]()
    targets = np.ones(predict(model, inputs).shape)
    enable_dcft(model, kernel_size=4)
    model.compile(keras.optimizers.Adam(0.01), "mse")
    step_losses(model, inputs, targets)
    path = str(tmp_path / "m.keras")
    model.save(path)
    restored = keras.saving.load_model(path)
    losses = step_losses(restored, inputs, targets)
    assert losses == pytest.approx(step_losses(model, inputs, targets), rel=1e-5)


@pytest.mark.compiled
def test_merging_between_two_predictions_and_two_fits():
    model, inputs = MODELS["sequential"][0](), vectors()
    targets = np.ones((4, 9))
    enable_dcft(model, kernel_size=4)
    model.fit(inputs, targets, epochs=3, verbose=0)
    expected = predict(model, inputs)
    merge_dcft(model)
    assert np.abs(predict(model, inputs) - expected).max() < 1e-5
    model.fit(inputs, targets, epochs=2, verbose=0)
    assert np.abs(predict(model, inputs) - expected).max() > 1e-4
