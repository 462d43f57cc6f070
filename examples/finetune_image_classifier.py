"""Fine-tunes a KerasHub image classifier with DCFT, and shows what that gives.

    python examples/finetune_image_classifier.py                     # a small ViT, no download
    python examples/finetune_image_classifier.py --preset vit_base_patch16_224_imagenet
    python examples/finetune_image_classifier.py --preset PRESET --image-folder flowers

The images are scikit-learn's digits, real handwriting in 8 x 8 pixels, or those of a folder that
has a folder of images for each class.
Without a preset a small ViT is first trained on the digits 0 to 4, and kept as the preset `base` in
`--output-dir`; what is fine-tuned for are the digits 5 to 9, which it has never seen. The head
alone is trained as well, to compare with. It trains through `model.fit`, saves a `.keras` file,
loads that again and compares predictions.
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
    parser = OneLineParser("Fine-tunes a KerasHub image classifier with DCFT.")
    add = parser.add_argument
    add("--preset", help="KerasHub preset or folder; without it a small ViT is pre-trained here")
    add("--image-folder", help="folder with a folder of images for each class; needs --preset")
    add_training_options(parser, epochs=20, batch_size=32)
    text = "without --preset: how often the small ViT goes through the digits 0 to 4"
    add("--pretraining-epochs", type=positive_int, default=30, help=text)
    add("--output-dir", default="finetuned/images", help="where everything is written")
    options = with_learning_rate(parser.parse_args(arguments))
    if options.image_folder and not options.preset:
        parser.error("argument --image-folder: needs a --preset that was trained on images")
    return options


if __name__ == "__main__":
    parse_options()  # so that --help and mistakes need not wait for the imports

import_quietly("keras_hub")

import keras
import keras_hub
import numpy as np
from sklearn.datasets import load_digits
from support.new_task import Task, adapt, train
from support.text_classifier import batches

from keras_dcft.settings import counted

HELD_OUT_SHARE = 0.25
PRETRAINING_RATE = 1e-3
SMALL_VIT = {
    "image_shape": (8, 8, 3),
    "patch_size": 2,
    "num_layers": 4,
    "num_heads": 4,
    "hidden_dim": 64,
    "mlp_dim": 128,
}


def main(arguments=None):
    run_or_exit(run, parse_options(arguments))


def run(options):
    keras.utils.set_random_seed(options.seed)
    preset = options.preset or pretrained_preset(Path(options.output_dir, "base"), options)
    if options.image_folder:
        task = folder_task(preset, options)
    else:
        task = digits_task(range(10) if options.preset else range(5, 10), options)

    def make():
        keras.utils.set_random_seed(options.seed)
        model = keras_hub.models.ImageClassifier.from_preset(
            str(preset), num_classes=len(task.classes)
        )
        return model, model

    adapt(make, task, options)


def pretrained_preset(folder: Path, options) -> Path:
    """Trains a small ViT from scratch on the digits 0 to 4 and saves it as a preset."""
    task = digits_task(range(5), options)
    print(f"Pre-training a small ViT on {task.name}:", flush=True)
    converter = keras_hub.layers.ViTImageConverter(
        image_size=SMALL_VIT["image_shape"][:2], scale=1 / 127.5, offset=-1.0
    )
    preprocessor = keras_hub.models.ViTImageClassifierPreprocessor(converter)
    backbone = keras_hub.models.ViTBackbone(**SMALL_VIT)
    model = keras_hub.models.ViTImageClassifier(backbone, len(task.classes), preprocessor)
    train(model, task, options.pretraining_epochs, PRETRAINING_RATE)
    # The two alone: the next task has a head of its own.
    backbone.save_to_preset(folder)
    preprocessor.save_to_preset(folder)
    return folder


def digits_task(digits: range, options) -> Task:
    """Some of scikit-learn's 1,797 digits, as RGB images."""
    images, labels = load_digits(return_X_y=True)
    chosen = np.flatnonzero(np.isin(labels, digits))
    chosen = np.random.default_rng(options.seed).permutation(chosen)
    images = np.repeat(images[chosen].reshape(-1, 8, 8, 1) * (255 / 16), 3, axis=-1)
    images, labels = images.astype("uint8"), labels[chosen] - digits[0]
    cut = round(HELD_OUT_SHARE * len(chosen))
    return Task(
        f"the digits {digits[0]} to {digits[-1]}, {counted(len(chosen) - cut, 'image')}",
        batches(images[cut:], labels[cut:], options.batch_size, shuffle_seed=options.seed),
        batches(images[:cut], labels[:cut], options.batch_size),
        [str(digit) for digit in digits],
    )


def folder_task(preset, options) -> Task:
    """The images of a folder, in the size that the preset takes."""
    preprocessor = keras_hub.models.ImageClassifierPreprocessor.from_preset(str(preset))
    found, held_out = keras.utils.image_dataset_from_directory(
        options.image_folder,
        image_size=preprocessor.image_converter.image_size,
        batch_size=options.batch_size,
        validation_split=HELD_OUT_SHARE,
        subset="both",
        seed=options.seed,
        verbose=False,
    )
    return Task(options.image_folder, found, held_out, found.class_names)


if __name__ == "__main__":
    main()
