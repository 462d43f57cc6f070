"""Fine-tunes the encoder of a KerasHub Whisper with DCFT to classify sounds that are made here.

    python examples/finetune_audio_classifier.py                     # a small Whisper, no download
    python examples/finetune_audio_classifier.py --preset whisper_tiny_en

No recordings: they are tones of one second in noise, which two CPU cores can learn. Without a
preset a small Whisper encoder is first trained to tell waveforms, and kept as the preset `base` in
`--output-dir`. What is fine-tuned for is how the pitch moves: up, down, both or not at all. The
head alone is trained as well, to compare with. It trains through `model.fit`, saves a `.keras`
file, loads that again and compares predictions.
"""

from pathlib import Path

from support.command_line import (
    OneLineParser,
    add_training_options,
    import_quietly,
    positive_int,
    run_or_exit,
    with_learning_rate,
)


def parse_options(arguments=None):
    parser = OneLineParser("Fine-tunes the encoder of a KerasHub Whisper with DCFT on made tones.")
    add = parser.add_argument
    add("--preset", help="of a Whisper, or a folder; without it a small one is pre-trained here")
    add_training_options(parser, epochs=20, batch_size=16)
    text = "without --preset: how often the small Whisper goes through the waveforms"
    add("--pretraining-epochs", type=positive_int, default=10, help=text)
    add("--train-size", type=positive_int, default=1000, help="tones to make for training")
    add("--output-dir", default="finetuned/sounds", help="where everything is written")
    return with_learning_rate(parser.parse_args(arguments))


if __name__ == "__main__":
    parse_options()  # so that --help and mistakes need not wait for the imports

import_quietly("keras_hub")

import keras
import keras_hub
import numpy as np
from support.new_task import Task, adapt, train
from support.text_classifier import batches

from keras_dcft.settings import counted

HELD_OUT_TONES = 250
PRETRAINING_RATE = 1e-3
SAMPLES = 16000  # of the one second that each takes
SMALL_WHISPER = {
    "vocabulary_size": 2,  # of the decoder, which has no part in this
    "num_layers": 2,
    "num_heads": 4,
    "hidden_dim": 64,
    "intermediate_dim": 128,
    "max_encoder_sequence_length": 100,
    "max_decoder_sequence_length": 2,
}
WAVEFORMS = {
    "sine": lambda phase: np.sin(2 * np.pi * phase),
    "square": lambda phase: np.sign(np.sin(2 * np.pi * phase)),
    "sawtooth": lambda phase: 2 * (phase % 1) - 1,
    "noise": lambda phase: (
        np.sin(2 * np.pi * phase) * np.random.default_rng(0).normal(size=SAMPLES)
    ),
}
# How many octaves above its start a tone is, after each share of the second.
MELODIES = {
    "steady": lambda time: 0 * time,
    "rising": lambda time: time,
    "falling": lambda time: -time,
    "up and down": lambda time: 1 - abs(2 * time - 1),
    "down and up": lambda time: abs(2 * time - 1) - 1,
}


def main(arguments=None):
    run_or_exit(run, parse_options(arguments))


def run(options):
    keras.utils.set_random_seed(options.seed)
    preset = options.preset or pretrained_preset(Path(options.output_dir, "base"), options)
    backbone = keras_hub.models.Backbone.from_preset(str(preset), load_weights=False)
    task = tones_task("the melodies", MELODIES, options, backbone.num_mels)

    def make():
        keras.utils.set_random_seed(options.seed)
        encoder = encoder_of(keras_hub.models.WhisperBackbone.from_preset(str(preset)))
        return classifier_around(encoder, len(task.classes)), encoder

    adapt(make, task, options)


def encoder_of(whisper):
    """The part of a Whisper that listens, as a model of its own."""
    features, heard = whisper.input["encoder_features"], whisper.output["encoder_sequence_output"]
    return keras.Model(features, heard, name="encoder")


def classifier_around(encoder, classes: int):
    """The encoder, the mean of what it heard over time, and a dense layer as the head."""
    inputs = keras.Input(encoder.input_shape[1:])
    pooled = keras.layers.GlobalAveragePooling1D()(encoder(inputs))
    return keras.Model(inputs, keras.layers.Dense(classes, name="head")(pooled))


def pretrained_preset(folder: Path, options) -> Path:
    """Trains a small Whisper's encoder from scratch to tell waveforms; saves it as a preset."""
    task = tones_task("waveforms", WAVEFORMS, options)
    print(f"Pre-training a small Whisper on {task.name}:", flush=True)
    whisper = keras_hub.models.WhisperBackbone(**SMALL_WHISPER)
    model = classifier_around(encoder_of(whisper), len(task.classes))
    train(model, task, options.pretraining_epochs, PRETRAINING_RATE)
    whisper.save_to_preset(folder)
    return folder


def tones_task(name: str, kinds: dict, options, mels: int = 80) -> Task:
    """Tones as a Whisper hears them, of so many mel frequencies; the label is the kind."""
    count = options.train_size + HELD_OUT_TONES
    rng = np.random.default_rng(options.seed)
    labels = rng.integers(len(kinds), size=count)
    audio = np.stack([tone(list(kinds)[label], rng) for label in labels])
    converter = keras_hub.layers.WhisperAudioConverter(num_mels=mels, max_audio_length=1)
    features = keras.ops.convert_to_numpy(converter(audio))
    cut = options.train_size
    return Task(
        f"{name}, {counted(cut, 'tone')}",
        batches(features[:cut], labels[:cut], options.batch_size, shuffle_seed=options.seed),
        batches(features[cut:], labels[cut:], options.batch_size),
        list(kinds),
    )


def tone(kind: str, rng):
    """One second in noise: a waveform that keeps its pitch, or a melody in any of them."""
    waveform = WAVEFORMS[kind if kind in WAVEFORMS else rng.choice(["sine", "square", "sawtooth"])]
    octaves = MELODIES.get(kind, MELODIES["steady"])(np.linspace(0, 1, SAMPLES))
    frequencies = rng.uniform(200, 800) * 2.0**octaves
    signal = rng.uniform(0.3, 1) * waveform(rng.uniform() + np.cumsum(frequencies) / SAMPLES)
    return (signal + rng.normal(0, 0.1, SAMPLES)).astype("float32")


if __name__ == "__main__":
    main()
