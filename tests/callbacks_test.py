import numpy as np
import pytest
from tools import predict, sequential, vectors

from keras_dcft import DCFTCheckpoint, enable_dcft, load_dcft_weights
from keras_dcft.adapters import read_notes


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


def test_a_file_is_an_adapter_file_with_notes(tmp_path):
    path = tmp_path / "a.dcft.safetensors"
    model = fit(Logged(path, monitor="val_accuracy", values=[0.25]), epochs=1)
    assert read_notes(path) == {"epoch": 1, "monitor": "val_accuracy", "value": 0.25}
    expected = predict(model, vectors())
    fit(DCFTCheckpoint(tmp_path / "other.dcft.safetensors"), model=model)
    np.testing.assert_array_equal(predict(load_dcft_weights(model, path), vectors()), expected)


def test_a_value_that_is_not_logged_is_said(tmp_path):
    path = tmp_path / "a.dcft.safetensors"
    with pytest.warns(UserWarning, match=r"needs 'val_f1' .*Logged were: \['loss'\]"):
        fit(DCFTCheckpoint(path, monitor="val_f1", save_best_only=True), epochs=1)
    assert not path.exists()


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="must end with"):
        DCFTCheckpoint("a.h5")
    with pytest.raises(ValueError, match="Received: mode='best'"):
        DCFTCheckpoint("a.dcft.safetensors", mode="best")


def test_folders_may_have_fields_and_a_plain_model_is_refused_at_once(tmp_path):
    path = tmp_path / "run-{epoch}" / "a.dcft.safetensors"
    fit(DCFTCheckpoint(path))
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["run-1", "run-2", "run-3"]
    with pytest.raises(ValueError, match="must be adapted with `enable_dcft`"):
        fit(DCFTCheckpoint(path), model=sequential())
