"""The examples on images and sound, each on one backend at tiny settings."""

import json

import finetune_audio_classifier
import finetune_image_classifier
import finetune_image_segmenter
import keras
import keras_hub
import numpy as np
import pytest
from one_backend import only_on
from support.methods import load_task

from keras_dcft import load_dcft_weights
from keras_dcft.settings import counted

LINES = ("head only", "before training", "Training time", "Reloaded", "Adapters: ")


def check(folder, printed, metric, classes):
    """What every run says and leaves; returns its results."""
    results = json.loads((folder / "results.json").read_text())
    assert results["backend"] == keras.backend.backend()
    assert results["reload_difference"] == 0
    assert results["classes"] == classes
    for line in (*LINES, f"Held-out {metric}", f"for {counted(results['epochs'], 'epoch')}\n"):
        assert line in printed
    assert results["trainable_parameters"] < 3000
    assert {"model.keras", "adapter.dcft.safetensors"} < {path.name for path in folder.iterdir()}
    return results


@only_on("torch")
def test_digits_that_the_base_has_not_seen_are_learned(tmp_path, capsys):
    finetune_image_classifier.main([
        "--pretraining-epochs", "3", "--epochs", "4", "--output-dir", str(tmp_path),
    ])  # fmt: skip
    results = check(tmp_path, capsys.readouterr().out, "accuracy", ["5", "6", "7", "8", "9"])
    assert results["after"] > max(0.4, results["head_only"] + 0.05)
    assert results["before"] < 0.4
    model = load_task(tmp_path / "model.keras")
    base = keras_hub.models.ImageClassifier.from_preset(str(tmp_path / "base"), num_classes=5)
    load_dcft_weights(base, tmp_path / "adapter.dcft.safetensors")
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3)).astype("uint8")
    np.testing.assert_array_equal(*(m.predict(images, verbose=0) for m in (base, model)))


def write_images(folder):
    """Red and blue pictures of other sizes than the preset takes, as real PNG files."""
    for name, channel in (("red", 0), ("blue", 2)):
        (folder / name).mkdir(parents=True)
        for number in range(12):
            image = np.zeros((20, 20, 3), "uint8")
            image[..., channel] = 200 + number
            keras.utils.save_img(folder / name / f"{number}.png", image)


@only_on("tensorflow")
def test_a_folder_of_images_is_learned_from_any_preset(tmp_path, capsys):
    write_images(tmp_path / "colours")
    converter = keras_hub.layers.DeiTImageConverter(image_size=(16, 16), scale=1 / 255)
    backbone = keras_hub.models.DeiTBackbone(
        image_shape=(16, 16, 3), patch_size=8, num_layers=1, num_heads=2, hidden_dim=16,
        intermediate_dim=32,
    )  # fmt: skip
    backbone.save_to_preset(tmp_path / "deit")
    keras_hub.models.DeiTImageClassifierPreprocessor(converter).save_to_preset(tmp_path / "deit")
    finetune_image_classifier.main([
        "--preset", str(tmp_path / "deit"), "--image-folder", str(tmp_path / "colours"),
        "--kernel-size", "4", "--epochs", "4", "--batch-size", "4", "--learning-rate", "0.05",
        "--output-dir", str(tmp_path / "out"),
    ])  # fmt: skip
    results = check(tmp_path / "out", capsys.readouterr().out, "accuracy", ["blue", "red"])
    assert results["after"] == 1


@only_on("torch")
def test_drawn_shapes_are_found(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(finetune_image_segmenter, "HELD_OUT_IMAGES", 32)
    run = ["--train-size", "64", "--epochs", "1", "--output-dir", str(tmp_path)]
    finetune_image_segmenter.main([*run, "--pretraining-epochs", "1"])
    classes = ["background", "triangle", "cross", "ring"]
    results = check(tmp_path, capsys.readouterr().out, "mean iou", classes)
    assert results["after"] > results["before"]
    finetune_image_segmenter.main([*run, "--preset", str(tmp_path / "base"), "--method", "head"])
    assert "head only" not in capsys.readouterr().out


def test_shapes_are_drawn_where_their_labels_are():
    kinds = tuple(finetune_image_segmenter.SHAPES)
    images, labels = finetune_image_segmenter.draw(kinds, 40, 32, np.random.default_rng(0))
    assert set(np.unique(labels)) == set(range(6))
    for image, label in zip(images, labels):
        inside, outside = image[label > 0], image[label == 0]
        assert len(np.unique(label)) == 2
        assert (abs(inside.mean(0) - outside.mean(0)) > 0.8).all()


@only_on("torch")
def test_melodies_are_told_apart(tmp_path, capsys):
    finetune_audio_classifier.main([
        "--train-size", "160", "--pretraining-epochs", "2", "--epochs", "2",
        "--output-dir", str(tmp_path),
    ])  # fmt: skip
    printed = capsys.readouterr().out
    results = check(tmp_path, printed, "accuracy", list(finetune_audio_classifier.MELODIES))
    assert results["before"] < 0.4
    assert "transformer_encoder_layer_{0..1}" in printed or "transformer_encoder_layer_0" in printed
    assert "decoder_layer" not in printed


@only_on("torch")
def test_a_whisper_hears_its_own_number_of_mels(tmp_path, capsys):
    sizes = {**finetune_audio_classifier.SMALL_WHISPER, "num_mels": 40}
    keras_hub.models.WhisperBackbone(**sizes).save_to_preset(tmp_path / "whisper")
    finetune_audio_classifier.main([
        "--preset", str(tmp_path / "whisper"), "--train-size", "16", "--epochs", "1",
        "--method", "head", "--output-dir", str(tmp_path),
    ])  # fmt: skip
    assert "predictions differ by 0" in capsys.readouterr().out


def test_a_rising_tone_ends_an_octave_higher():
    rng = np.random.default_rng(0)

    signal = finetune_audio_classifier.tone("rising", rng)
    assert signal.shape == (16000,)
    spectra = [np.abs(np.fft.rfft(part)) for part in (signal[:1600], signal[-1600:])]
    first, last = (spectrum.argmax() for spectrum in spectra)
    assert last / first == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (finetune_image_classifier, ["--image-folder", "x"], "--image-folder: needs a --preset"),
        (finetune_image_classifier, ["--preset", "/nowhere"], "Unknown preset identifier"),
        (finetune_image_segmenter, ["--preset", "/nowhere"], "Unknown preset identifier"),
        (finetune_audio_classifier, ["--train-size", "0"], "must be at least 1. Received: 0"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(program, arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        program.main(["--output-dir", str(tmp_path), *arguments])
    said = capsys.readouterr().err.strip() if stop.value.code == 2 else stop.value.code
    assert said.startswith("error: ")
    assert message in said
    assert len(said.splitlines()) == 1
