"""What the examples on text classification share: the model and its batches."""

import keras_hub
import numpy as np
import tensorflow as tf

LONGEST_SEQUENCE = 128


def make_classifier(preset, data, sequence_length=None, **arguments):
    """A KerasHub text classifier for the data, or a regression with one output.

    Args:
        preset: a KerasHub preset, or a folder with one.
        data: `TextData`.
        sequence_length: int, or None for one just long enough for the data.
        arguments: further ones of the task.
    """
    classifier = keras_hub.models.TextClassifier.from_preset(
        str(preset), num_classes=len(data.classes) or 1, **arguments
    )
    # Keras says a page about positions that an encoder does not have.
    longest = getattr(classifier.backbone, "max_sequence_length", None)
    if sequence_length and longest and sequence_length > longest:
        raise ValueError(
            f"--sequence-length must be at most the preset's {longest}. Received: {sequence_length}"
        )
    classifier.preprocessor.sequence_length = sequence_length or _length_of(data, classifier)
    return classifier


def _length_of(data, classifier) -> int:
    texts = [t if isinstance(t, str) else " ".join(t) for t in data.train_texts[:2000]]
    lengths = [len(tokens) for tokens in classifier.preprocessor.tokenizer(texts)]
    length = int(np.percentile(lengths, 98)) + 3
    longest = min(LONGEST_SEQUENCE, classifier.preprocessor.sequence_length)
    return min(-(-length // 16) * 16, longest)


def batches(texts, labels, batch_size, shuffle_seed=None):
    """A `tf.data.Dataset` of the texts (or tuples of texts) and labels."""
    texts = tuple(map(list, zip(*texts))) if isinstance(texts[0], tuple) else texts
    dataset = tf.data.Dataset.from_tensor_slices((texts, labels))
    if shuffle_seed is not None:
        dataset = dataset.shuffle(len(labels), seed=shuffle_seed)
    return dataset.batch(batch_size)
