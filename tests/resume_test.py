"""Training that is interrupted by saving and loading goes on as if it had not been."""

import json

import keras
import numpy as np
import pytest
from tools import (
    LABELS,
    MODELS,
    TEXTS,
    bert_classifier,
    compile_task,
    predict,
    task_losses,
    vectors,
)

from keras_dcft import enable_dcft, merge_dcft

RESUME = """
import json, keras_dcft, keras, numpy as np, tools
model = keras.saving.load_model("{path}")
inputs = tools.MODELS["{kind}"][1]()
losses = [float(model.train_on_batch(inputs, np.ones({shape}))) for _ in range(3)]
print(json.dumps(losses))
"""


@pytest.mark.parametrize("kind", ["sequential", "subclassed", "functional_around_backbone"])
@pytest.mark.parametrize("where", ["here", "in a new process"])
def test_losses_go_on_as_in_an_uninterrupted_run(kind, where, tmp_path, run_python):
    model, inputs = MODELS[kind][0](), MODELS[kind][1]()
    targets = np.ones(predict(model, inputs).shape)
    enable_dcft(model, kernel_size=4)
    model.compile(keras.optimizers.Adam(0.01), "mse")
    for _ in range(3):
        model.train_on_batch(inputs, targets)
    path = str(tmp_path / "m.keras")
    model.save(path)
    if where == "here":
        restored = keras.saving.load_model(path)
        losses = [float(restored.train_on_batch(inputs, targets)) for _ in range(3)]
    else:
        losses = json.loads(run_python(RESUME.format(path=path, kind=kind, shape=targets.shape)))
    expected = [float(model.train_on_batch(inputs, targets)) for _ in range(3)]
    assert losses == pytest.approx(expected, rel=1e-5)


RESUME_TASK = """
import json, keras_dcft, keras, tools
task = keras.saving.load_model("{path}")
tools.compile_task(task)
task.optimizer.build(task.trainable_variables)
task.load_weights("{path}")
print(json.dumps([*tools.task_losses(task), int(task.optimizer.iterations)]))
"""


def test_a_task_goes_on_with_the_lines_that_the_docs_give(tmp_path, run_python):
    task = enable_dcft(bert_classifier(), kernel_size=4)
    compile_task(task)
    for _ in range(3):
        task.train_on_batch(TEXTS, LABELS)
    path = str(tmp_path / "m.keras")
    task.save(path)
    *losses, steps = json.loads(run_python(RESUME_TASK.format(path=path)))
    expected = task_losses(task)
    assert steps == 6
    assert len(set(expected)) == 3
    assert losses == pytest.approx(expected, rel=1e-5)


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
