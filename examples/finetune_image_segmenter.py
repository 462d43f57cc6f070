"""Fine-tunes a KerasHub image segmenter with DCFT on shapes that are drawn here.

    python examples/finetune_image_segmenter.py                  # a small SegFormer, no download
    python examples/finetune_image_segmenter.py --preset finetuned/segments/base --kernel-size 4

No photographs: they are plain shapes in noise, of a size that two CPU cores can learn. Without a
preset a small SegFormer is first trained to find discs and squares, and kept as the preset `base`
in `--output-dir`. What is fine-tuned for are triangles, crosses and rings, which it has never seen.
The head alone is trained as well, to compare with. It trains through `model.fit`, saves a `.keras`
file, loads that again and compares predictions.
"""

import functools
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
    parser = OneLineParser("Fine-tunes a KerasHub image segmenter with DCFT on drawn shapes.")
    add = parser.add_argument
    text = "KerasHub preset or folder; without it a small SegFormer is pre-trained here"
    add("--preset", help=text)
    add_training_options(parser, epochs=10, batch_size=16)
    text = "without --preset: how often the small SegFormer goes through discs and squares"
    add("--pretraining-epochs", type=positive_int, default=15, help=text)
    add("--train-size", type=positive_int, default=600, help="images to draw for training")
    add("--output-dir", default="finetuned/segments", help="where everything is written")
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

HELD_OUT_IMAGES = 200
PRETRAINING_RATE = 2e-3
SMALL_SIZE = 32
OLD_SHAPES, NEW_SHAPES = ("disc", "square"), ("triangle", "cross", "ring")
# Each says of how far right and down of its middle a pixel is, in shares of its size, if it is in.
SHAPES = {
    "disc": lambda x, y: x**2 + y**2 < 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) < 0.85,
    "triangle": lambda x, y: (abs(x) < (y + 1) / 2) & (y < 1),
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) < 0.3) & (np.maximum(abs(x), abs(y)) < 1),
    "ring": lambda x, y: (x**2 + y**2 < 1) & (x**2 + y**2 > 0.3),
}


def main(arguments=None):
    run_or_exit(run, parse_options(arguments))


def run(options):
    keras.utils.set_random_seed(options.seed)
    preset = options.preset or pretrained_preset(Path(options.output_dir, "base"), options)
    backbone = keras_hub.models.Backbone.from_preset(str(preset), load_weights=False)
    if isinstance(backbone.input, dict):
        raise ValueError(
            f"--preset must take images alone, as a SegFormer does. Received: {preset}"
        )
    size = backbone.input.shape[1] or SMALL_SIZE
    task = shapes_task(NEW_SHAPES, size, options)

    def make():
        keras.utils.set_random_seed(options.seed)
        model = keras_hub.models.ImageSegmenter.from_preset(
            str(preset), num_classes=len(task.classes), preprocessor=None
        )
        return model, model

    adapt(make, task, options)


def pretrained_preset(folder: Path, options) -> Path:
    """Trains a small SegFormer from scratch to find the old shapes and saves it as a preset."""
    task = shapes_task(OLD_SHAPES, SMALL_SIZE, options)
    print(f"Pre-training a small SegFormer on {task.name}:", flush=True)
    encoder = keras_hub.models.MiTBackbone(
        image_shape=(SMALL_SIZE, SMALL_SIZE, 3),
        num_layers=2,
        hidden_dims=[32, 64],
        layerwise_depths=[1, 2],
        layerwise_num_heads=[2, 4],
        layerwise_sr_ratios=[1, 1],
        layerwise_patch_sizes=[7, 3],
        layerwise_strides=[4, 2],
        max_drop_path_rate=0.0,
    )
    backbone = keras_hub.models.SegFormerBackbone(encoder, projection_filters=64)
    model = keras_hub.models.SegFormerImageSegmenter(backbone, num_classes=len(task.classes))
    train(model, task, options.pretraining_epochs, PRETRAINING_RATE)
    backbone.save_to_preset(folder)
    return folder


def shapes_task(shapes, size: int, options) -> Task:
    """Drawn images of a shape each; a pixel's label is the shape it is a part of."""
    count = options.train_size + HELD_OUT_IMAGES
    images, labels = draw(shapes, count, size, np.random.default_rng(options.seed))
    cut = options.train_size
    classes = ["background", *shapes]
    return Task(
        f"{', '.join(shapes)}: {counted(cut, 'drawn image')}",
        batches(images[:cut], labels[:cut], options.batch_size, shuffle_seed=options.seed),
        batches(images[cut:], labels[cut:], options.batch_size),
        classes,
        functools.partial(
            keras.metrics.MeanIoU, len(classes), sparse_y_pred=False, name="mean_iou"
        ),
    )


def draw(shapes, count: int, size: int, rng):
    """Noisy images (count, size, size, 3) of a shape each, and the labels of their pixels."""
    images = rng.uniform(0, 1, (count, 1, 1, 3)).round() + np.zeros((count, size, size, 3))
    labels = np.zeros((count, size, size), "int32")
    rows, columns = np.mgrid[:size, :size]
    for image, label in zip(images, labels):
        middle, radius = rng.uniform(0.35, 0.65, 2) * size, rng.uniform(0.25, 0.4) * size
        kind = rng.integers(len(shapes))
        inside = SHAPES[shapes[kind]]((columns - middle[0]) / radius, (rows - middle[1]) / radius)
        image[inside], label[inside] = 1 - image[0, 0], 1 + kind
    images += rng.normal(0, 0.1, images.shape)
    return images.astype("float32"), labels


if __name__ == "__main__":
    main()
