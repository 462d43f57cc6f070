import keras
import numpy as np
import pytest
from one_backend import only_on
from tools import predict, sequential, vectors

from keras_dcft import (
    DCFTCheckpoint,
    enable_dcft,
    load_dcft_weights,
    read_dcft_notes,
    save_dcft_weights,
)


class Logged(DCFTCheckpoint):
    """Sees values of our choice in place of the measured ones."""

    def __init__(self, *arguments, values, **options):
        super().__init__(*arguments, **options)
        self.values = values

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, {**logs, "val_accuracy": self.values[epoch]})


def fit(callback, epochs=3, model=None):
    model = model or enable_dcft(sequential(), kernel_size=4)
    model.fit(vectors(), np.ones((4, 9)), epochs=epochs, verbose=0, callbacks=[callback])
    return model


def test_each_epoch_is_written_under_its_name(tmp_path):
    fit(DCFTCheckpoint(tmp_path / "deep" / "{epoch:02d}-{loss:.2f}.dcft.safetensors"))
    names = sorted(path.name[:3] for path in (tmp_path / "deep").iterdir())
    assert names == ["01-", "02-", "03-"]


def test_only_better_epochs_are_written(tmp_path):
    path = tmp_path / "{epoch}.dcft.safetensors"
    options = {"monitor": "val_accuracy", "save_best_only": True}
    callback = Logged(path, values=[0.5, 0.4, 0.7, float("nan"), 0.7], **options)
    fit(callback, epochs=5)
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == ["1.dcft.safetensors", "3.dcft.safetensors"]
    assert callback.best == 0.7


@pytest.mark.parametrize(("mode", "expected"), [("min", ["1", "2"]), ("max", ["1", "3"])])
def test_mode_decides_what_is_better(mode, expected, tmp_path):
    path = tmp_path / "{epoch}.dcft.safetensors"
    options = {"monitor": "val_accuracy", "save_best_only": True, "mode": mode}
    fit(Logged(path, values=[0.5, 0.4, 0.7], **options))
    assert sorted(path.name[0] for path in tmp_path.iterdir()) == expected


def test_the_mode_follows_from_the_name():
    for monitor, mode in [("val_loss", "min"), ("val_accuracy", "max"), ("f1_score", "max")]:
        assert DCFTCheckpoint("a.dcft.safetensors", monitor=monitor).mode == mode


class Without(keras.metrics.Mean):
    """A user's own metric, of which nothing says whether more is better."""

    def update_state(self, y_true, y_pred, sample_weight=None):
        return super().update_state(keras.ops.mean(y_pred - y_true))


class More(Without):
    _direction = "up"


class Less(Without):
    _direction = "down"


def two_outputs():
    inputs = keras.Input((12,))
    outputs = [keras.layers.Dense(9, name=name)(inputs) for name in ("left", "right")]
    return keras.Model(inputs, outputs)


def fit_with(metrics, monitor, path, model=None, **options):
    model = enable_dcft(model or sequential(), kernel_size=4)
    model.compile("adam", "mse", metrics=metrics)
    targets = [np.ones((4, 9))] * len(model.outputs)
    data = vectors(), targets if len(targets) > 1 else targets[0]
    callback = DCFTCheckpoint(path, monitor=monitor, save_best_only=True, **options)
    model.fit(*data, validation_data=data, epochs=2, verbose=0, callbacks=[callback])
    assert path.exists()
    return callback.mode


@pytest.mark.parametrize(
    ("metrics", "monitor", "mode"),
    [
        (["accuracy"], "val_accuracy", "max"),
        (["acc"], "acc", "max"),
        (["mse"], "val_mse", "min"),
        ([keras.metrics.F1Score("macro", name="quality")], "val_quality", "max"),
        ([keras.metrics.MeanAbsoluteError(name="away")], "val_away", "min"),
        ([keras.losses.huber], "val_huber", "min"),
        ([More(name="matthews_correlation")], "val_matthews_correlation", "max"),
        ([Less(name="accuracy")], "val_accuracy", "min"),
        ([Without(name="accuracy")], "val_accuracy", "max"),
        ([Without(name="other_loss")], "val_other_loss", "min"),
    ],
)
@only_on("torch")
def test_the_mode_is_the_metrics_own(metrics, monitor, mode, tmp_path):
    assert fit_with(metrics, monitor, tmp_path / "a.dcft.safetensors") == mode


def test_the_mode_of_an_outputs_metric(tmp_path):
    metrics = {"left": [More(name="even")], "right": [Less(name="odd")]}
    path = tmp_path / "a.dcft.safetensors"
    assert fit_with(metrics, "val_left_even", path, two_outputs()) == "max"
    assert fit_with(metrics, "val_right_odd", path, two_outputs()) == "min"


def test_the_mode_of_a_metric_that_the_model_holds(tmp_path):
    model = enable_dcft(sequential(), kernel_size=4)
    model.even = More(name="even")
    callback = DCFTCheckpoint(tmp_path / "a.dcft.safetensors", monitor="even")
    fit(callback, epochs=1, model=model)
    assert callback.mode == "max"


@pytest.mark.parametrize("metrics", [[Without(name="matthews_correlation")], None])
def test_a_mode_that_nothing_tells_has_to_be_said(metrics, tmp_path):
    path, monitor = tmp_path / "a.dcft.safetensors", "val_matthews_correlation"
    with pytest.raises(ValueError, match=r"`mode` must be \"max\" or \"min\".*matthews"):
        fit_with(metrics, monitor, path)
    assert not path.exists()
    if metrics:
        assert fit_with(metrics, monitor, path, mode="max") == "max"


@pytest.mark.parametrize("name", ["best.dcft.safetensors", "[1]{epoch}.dcft.safetensors"])
def test_a_training_that_goes_on_knows_the_value_to_beat(name, tmp_path):
    options = {"monitor": "val_accuracy", "save_best_only": True}
    model = fit(Logged(tmp_path / name, values=[0.8, 0.6, 0.7], **options))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    resumed = Logged(tmp_path / name, values=[0.7, 0.79, 0.75], **options)
    fit(resumed, model=model)
    assert resumed.best == 0.8
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    fit(Logged(tmp_path / name, values=[0.9], **options), epochs=1, model=model)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} != before


def test_the_first_file_has_to_beat_the_threshold(tmp_path):
    path = tmp_path / "{epoch}.dcft.safetensors"
    options = {"monitor": "val_accuracy", "save_best_only": True, "initial_value_threshold": 0.6}
    fit(Logged(path, values=[0.5, 0.6, 0.7], **options))
    assert [path.name for path in tmp_path.iterdir()] == ["3.dcft.safetensors"]
    resumed = Logged(path, values=[0.65], **options)
    fit(resumed, epochs=1)
    assert resumed.best == 0.7


@pytest.mark.compiled
@pytest.mark.parametrize("save_freq", [1, 2, 3, 5])
@pytest.mark.parametrize("steps", [1, 2] if keras.backend.backend() != "torch" else [1])
def test_batches_are_counted_as_by_keras(save_freq, steps, tmp_path):
    names = "{epoch}-{batch}-{loss:.6f}"
    own = DCFTCheckpoint(tmp_path / f"{names}.dcft.safetensors", save_freq=save_freq)
    keras_own = keras.callbacks.ModelCheckpoint(
        tmp_path / f"{names}.weights.h5", save_weights_only=True, save_freq=save_freq
    )
    if steps > 1 and keras_own._last_batch_seen == 0:
        pytest.skip("this Keras's ModelCheckpoint takes the first two batches for one (3.13)")
    model = enable_dcft(sequential(), kernel_size=4)
    model.compile("adam", "mse", steps_per_execution=steps)
    callbacks = {"callbacks": [own, keras_own]}
    model.fit(vectors(), np.ones((4, 9)), batch_size=1, epochs=3, verbose=0, **callbacks)
    expected = [path.name.removesuffix(".weights.h5") for path in tmp_path.glob("*.h5")]
    found = [path.name.removesuffix(".dcft.safetensors") for path in tmp_path.glob("*.dcft.*")]
    assert len(found) == 12 // save_freq or steps > 1
    assert sorted(found) == sorted(expected)


def test_a_file_of_a_batch_holds_what_was_trained_until_then(tmp_path):
    path = tmp_path / "{epoch}-{batch}.dcft.safetensors"
    model = enable_dcft(sequential(), kernel_size=4)
    callback = DCFTCheckpoint(path, monitor="loss", save_freq=2)
    options = {"batch_size": 1, "shuffle": False, "verbose": 0}
    model.fit(vectors(), np.ones((4, 9)), callbacks=[callback], **options)
    after_four = predict(model, vectors())
    load_dcft_weights(model, tmp_path / "1-4.dcft.safetensors")
    np.testing.assert_array_equal(predict(model, vectors()), after_four)
    load_dcft_weights(model, tmp_path / "1-2.dcft.safetensors")
    assert np.abs(predict(model, vectors()) - after_four).max() > 0
    notes = read_dcft_notes(tmp_path / "1-4.dcft.safetensors")["notes"]
    assert (notes["epoch"], notes["batch"], notes["monitor"]) == (1, 4, "loss")


def test_only_a_callback_that_counts_batches_makes_keras_wait_for_them():
    assert DCFTCheckpoint("a.dcft.safetensors").async_safe
    assert not DCFTCheckpoint("a.dcft.safetensors", save_freq=2).async_safe


def test_files_that_cannot_be_read_are_passed_over(tmp_path, monkeypatch):
    path = tmp_path / "{epoch}.dcft.safetensors"
    options = {"monitor": "val_accuracy", "save_best_only": True}
    model = fit(Logged(path, values=[0.8], **options), epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr("keras_dcft.files.FORMAT_VERSION", 3)
        save_dcft_weights(model, tmp_path / "7.dcft.safetensors")
    (tmp_path / "8.dcft.safetensors").write_bytes(b"no adapter")
    (tmp_path / "9.dcft.safetensors").mkdir()
    resumed = Logged(path, values=[0.7], **options)
    with pytest.warns(UserWarning, match="DCFTCheckpoint passes over a file") as warned:
        fit(resumed, epochs=1)
    assert resumed.best == 0.8
    messages = [str(w.message) for w in warned if "passes over" in str(w.message)]
    expected = ["7.dcft.safetensors: written by a newer", "8.dcft.safetensors: damaged", "9.dcft"]
    assert len(messages) == len(expected)
    for message, part in zip(messages, expected):
        assert part in message


def test_a_file_is_an_adapter_file_with_notes(tmp_path):
    path = tmp_path / "a.dcft.safetensors"
    model = fit(Logged(path, monitor="val_accuracy", values=[0.25]), epochs=1)
    assert read_dcft_notes(path)["notes"] == {"epoch": 1, "monitor": "val_accuracy", "value": 0.25}
    expected = predict(model, vectors())
    fit(DCFTCheckpoint(tmp_path / "other.dcft.safetensors"), model=model)
    np.testing.assert_array_equal(predict(load_dcft_weights(model, path), vectors()), expected)


def test_a_value_that_is_not_logged_is_said(tmp_path):
    path = tmp_path / "a.dcft.safetensors"
    with pytest.warns(UserWarning, match=r"needs 'val_f1' .*Logged were: \['loss'\]"):
        fit(DCFTCheckpoint(path, monitor="val_f1", save_best_only=True), epochs=1)
    assert not path.exists()


@pytest.mark.parametrize(("name", "field"), [("{val_f1:.2f}", "val_f1"), ("{batch}", "batch")])
def test_a_field_that_has_no_value_is_named(name, field, tmp_path):
    message = rf"has the field '{field}'.* There are: \['epoch', 'loss'\]"
    with pytest.raises(KeyError, match=message):
        fit(DCFTCheckpoint(tmp_path / f"{name}.dcft.safetensors"), epochs=1)
    assert list(tmp_path.iterdir()) == []


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="must end with"):
        DCFTCheckpoint("a.h5")
    with pytest.raises(ValueError, match="Received: mode='best'"):
        DCFTCheckpoint("a.dcft.safetensors", mode="best")
    for save_freq in ("batch", 0, 2.0, True):
        with pytest.raises(ValueError, match=f"Received: save_freq={save_freq!r}"):
            DCFTCheckpoint("a.dcft.safetensors", save_freq=save_freq)


def test_folders_may_have_fields_and_a_plain_model_is_refused_at_once(tmp_path):
    path = tmp_path / "run-{epoch}" / "a.dcft.safetensors"
    fit(DCFTCheckpoint(path))
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["run-1", "run-2", "run-3"]
    with pytest.raises(ValueError, match="Call `enable_dcft"):
        fit(DCFTCheckpoint(path), model=sequential())
