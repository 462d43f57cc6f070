"""What was written is read in a new process: on this backend, on another, without the package."""

import json

import keras
import numpy as np
import pytest
from conftest import BACKENDS
from tools import (
    LABELS,
    MODELS,
    TEXTS,
    array,
    bert_classifier,
    compile_task,
    predict,
    randomize_adapters,
    step_losses,
    task_losses,
    vectors,
)
from workers import run_program

from keras_dcft import enable_dcft, merge_dcft, remove_dcft, save_dcft_weights

BACKEND = keras.backend.backend()
WITH_PRESETS = ("task", "backbone")
RESUMED = ("sequential", "subclassed", "functional_around_backbone")

# Loaded after keras_hub or before it, keras_dcft makes its classes, and nothing else.
READ = """
import json, sys
import keras
folder, first = sys.argv[1:]
made, init = [], keras.Variable.__init__
keras.Variable.__init__ = lambda *args, **kwargs: made.append(1) or init(*args, **kwargs)
__import__(first)
import keras_dcft, keras_hub
assert made == []
keras.Variable.__init__ = init
import numpy as np, tools
tools.run_eagerly()
seen = {}

def look(name, model, kind):
    if keras.backend.backend() == "torch":
        model.jit_compile = False  # which TensorFlow and JAX write, and PyTorch would follow
    np.save(f"{folder}/{name}.npy", tools.predict(model, tools.MODELS[kind][1]()))
    seen[name] = [type(model).__name__, len(model.trainable_variables)]

for kind, (make, inputs) in tools.MODELS.items():
    for state in ("adapted", "merged", "removed") if kind == "task" else ("adapted",):
        look(f"{kind}-{state}", keras.saving.load_model(f"{folder}/{kind}-{state}.keras"), kind)
    model = make()
    model.load_weights(f"{folder}/{kind}.weights.h5")
    keras_dcft.load_dcft_weights(model, f"{folder}/{kind}.dcft.safetensors")
    look(f"{kind}-file", model, kind)
bases = {"task": keras_hub.models.TextClassifier, "backbone": keras_hub.models.Backbone}
for kind, base in bases.items():
    for state in ("adapted", "merged"):
        look(f"{kind}-{state}-preset", base.from_preset(f"{folder}/{kind}-{state}-preset"), kind)
print(json.dumps(seen))
"""


def with_values(kind):
    model = MODELS[kind][0]()
    enable_dcft(model, kernel_size=4, rank=2)
    randomize_adapters(model)
    return model


def write(folder, kind):
    """Writes a model in every form; returns by form what reading it must show.

    Merged or removed it is a plain model, whose reading is Keras's: one kind is enough.
    """
    model, inputs = with_values(kind), MODELS[kind][1]()
    cls, outputs = type(model), predict(model, inputs)
    adapted = cls.__name__, len(model.trainable_variables), outputs
    model.save(folder / f"{kind}-adapted.keras")
    save_dcft_weights(model, folder / f"{kind}.dcft.safetensors")
    expected = {f"{kind}-adapted": adapted, f"{kind}-file": adapted}
    if kind in WITH_PRESETS:
        model.save_to_preset(str(folder / f"{kind}-adapted-preset"))
        expected[f"{kind}-adapted-preset"] = adapted
    removed = remove_dcft(keras.saving.load_model(folder / f"{kind}-adapted.keras"))
    removed.save_weights(folder / f"{kind}.weights.h5")
    plain = type(removed).__name__, len(removed.trainable_variables)
    merge_dcft(model)
    if kind == "task":
        removed.save(folder / f"{kind}-removed.keras")
        model.save(folder / f"{kind}-merged.keras")
        expected[f"{kind}-removed"] = *plain, predict(removed, inputs)
        expected[f"{kind}-merged"] = *plain, outputs
    if kind in WITH_PRESETS:
        model.save_to_preset(str(folder / f"{kind}-merged-preset"))
        expected[f"{kind}-merged-preset"] = *plain, outputs
    return expected


def test_everything_is_read_in_a_new_process(tmp_path, run_python):
    """On this backend, and on another: every backend reads what one other wrote.

    The other process begins with nothing imported, and imports KerasHub first or this package.
    """
    expected = {}
    for kind in MODELS:
        expected.update(write(tmp_path, kind))
    another = BACKENDS[(BACKENDS.index(BACKEND) + 1) % len(BACKENDS)]
    first = "keras_hub" if another == "torch" else "keras_dcft"
    for reader in (BACKEND, another):
        if reader == BACKEND:
            printed = run_program(READ, tmp_path / "log", tmp_path, first)
        else:
            printed = run_python(READ, reader, tmp_path, first)
        seen = json.loads(printed.splitlines()[-1])
        assert set(seen) == set(expected)
        for name, (cls, trained, outputs) in expected.items():
            assert seen[name] == [cls, trained], name
            difference = np.abs(np.load(tmp_path / f"{name}.npy") - outputs).max()
            if reader == BACKEND and "merged" not in name:
                assert difference == 0, name
            else:
                assert difference <= 1e-5 * max(1, np.abs(outputs).max()), name


RESUME = """
import json, sys
import keras_dcft, keras, numpy as np, tools
folder = sys.argv[1]
tools.run_eagerly()
losses = {}
for kind in sys.argv[2:]:
    model = keras.saving.load_model(f"{folder}/{kind}.keras")
    inputs = tools.MODELS[kind][1]()
    targets = np.load(f"{folder}/{kind}.npy")
    losses[kind] = tools.step_losses(model, inputs, targets)
# The lines that docs/models.md gives: KerasHub's tasks are not compiled when they are loaded.
task = keras.saving.load_model(f"{folder}/task.keras")
tools.compile_task(task)
task.optimizer.build(task.trainable_variables)
task.load_weights(f"{folder}/task.keras")
losses["task"] = [*tools.task_losses(task), int(task.optimizer.iterations)]
print(json.dumps(losses))
"""


def test_trainings_go_on_in_a_new_process_as_if_not_interrupted(tmp_path):
    models = {}
    for kind in RESUMED:
        model, inputs = MODELS[kind][0](), MODELS[kind][1]()
        targets = np.ones(predict(model, inputs).shape)
        np.save(tmp_path / f"{kind}.npy", targets)
        enable_dcft(model, kernel_size=4)
        model.compile(keras.optimizers.Adam(0.01), "mse")
        step_losses(model, inputs, targets)
        model.save(tmp_path / f"{kind}.keras")
        models[kind] = model, inputs, targets
    task = enable_dcft(bert_classifier(), kernel_size=4)
    compile_task(task)
    for _ in range(3):
        task.train_on_batch(TEXTS, LABELS)
    task.save(tmp_path / "task.keras")
    printed = run_program(RESUME, tmp_path / "log", tmp_path, *RESUMED)
    losses = json.loads(printed.splitlines()[-1])
    for kind, (model, inputs, targets) in models.items():
        expected = step_losses(model, inputs, targets)
        assert losses[kind] == pytest.approx(expected, rel=1e-5)
    *of_the_task, steps = losses["task"]
    expected = task_losses(task)
    assert steps == 6
    assert len(set(expected)) == 3
    assert of_the_task == pytest.approx(expected, rel=1e-5)


WITHOUT_THE_PACKAGE = """
import sys
class Refuses:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "keras_dcft":
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Refuses())
import keras, keras_hub, numpy as np, tools
folder = sys.argv[1]
tools.run_eagerly()
for kind in ("task", "sequential"):
    model = keras.saving.load_model(f"{folder}/{kind}.keras")
    np.save(f"{folder}/{kind}.npy", tools.predict(model, tools.MODELS[kind][1]()))
task = keras_hub.models.TextClassifier.from_preset(f"{folder}/preset")
np.save(f"{folder}/preset.npy", tools.predict(task, tools.TEXTS[:4]))
try:
    keras.saving.load_model(f"{folder}/adapted.keras")
except Exception as error:
    print(type(error).__name__, str(error)[:60])
"""


def test_without_this_package_merged_models_load_and_adapted_ones_are_kerass_own_error(
    tmp_path, run_python
):
    with_values("task").save(tmp_path / "adapted.keras")
    expected = {}
    for kind in ("task", "sequential"):
        model = merge_dcft(with_values(kind))
        model.save(tmp_path / f"{kind}.keras")
        expected[kind] = predict(model, MODELS[kind][1]())
        if kind == "task":
            model.save_to_preset(str(tmp_path / "preset"))
            expected["preset"] = expected[kind]
    printed = run_python(WITHOUT_THE_PACKAGE, BACKEND, tmp_path)
    assert printed.startswith("TypeError Could not locate class 'DCFTBertTextClassifier'")
    for name, outputs in expected.items():
        np.testing.assert_array_equal(np.load(tmp_path / f"{name}.npy"), outputs)


EXPORTED = """
import sys
sys.modules["keras_dcft"] = sys.modules["keras"] = None
import numpy as np
folder, kind = sys.argv[1:]
inputs = np.load(f"{folder}/inputs.npy")
if kind == "torch":
    import torch
    model = torch.export.load(f"{folder}/m.pt2").module()
    rows = torch.from_numpy(inputs).split(1)  # Keras exports to torch for batches of one
    outputs = torch.cat([model(row) for row in rows]).detach().numpy()
else:
    import tensorflow as tf
    model = tf.saved_model.load(f"{folder}/m")
    outputs = model.serve(inputs).numpy()
np.save(f"{folder}/outputs.npy", outputs)
"""


@pytest.mark.compiled
def test_merged_models_are_exported(tmp_path, run_python):
    model = with_values("sequential")
    expected = predict(model, vectors())
    merge_dcft(model)
    is_torch = BACKEND == "torch"
    export_format = "torch" if is_torch else "tf_saved_model"
    try:
        model.export(str(tmp_path / ("m.pt2" if is_torch else "m")), format=export_format)
    except ValueError as error:
        if "Unrecognized format" in str(error):
            pytest.skip(f"this Keras does not export to {export_format}")
        raise
    np.save(tmp_path / "inputs.npy", vectors())
    run_python(EXPORTED, BACKEND, tmp_path, export_format)
    np.testing.assert_allclose(np.load(tmp_path / "outputs.npy"), expected, rtol=1e-4, atol=1e-5)


def test_adapters_of_all_kinds_differ_from_their_base():
    """Without which the files above would show little."""
    for kind, (_, inputs) in MODELS.items():
        model = with_values(kind)
        outputs = predict(model, inputs())
        assert np.abs(outputs - predict(remove_dcft(model), inputs())).max() > 1e-3
        assert np.all(np.isfinite(array(outputs)))
