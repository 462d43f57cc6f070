"""`DCFTCheckpoint`: adapter files while training."""

import glob
import math
import re
import string
import warnings
from pathlib import Path

import keras

from keras_dcft.adapters import SUFFIX, read_notes, save_dcft_weights
from keras_dcft.models import adapted_part


class DCFTCheckpoint(keras.callbacks.Callback):
    """Writes an adapter file after each epoch, or after each that is the best so far.

    The counterpart of `keras.callbacks.ModelCheckpoint` for `save_dcft_weights`. Files are replaced
    atomically, and each remembers the value that it was saved for: a training that goes on after
    an interruption knows from the files that are there which value it has to beat.

    Args:
        filepath: str or path, ending with `.dcft.safetensors`; may have fields such as `{epoch}`
            (counted from 1) and `{val_accuracy:.3f}` for the logged values. Its folder is made.
        monitor: str, the logged value that tells how good an epoch is.
        save_best_only: bool, whether to write only for an epoch that is better than all before.
        mode: `"min"`, `"max"`, or `"auto"`: by the name of `monitor`, max for accuracies and the
            like, min for everything else.
        verbose: int, 1 to print a line for each file.

    Raises:
        ValueError: if `filepath` ends otherwise or `mode` is none of the three.

    Example:
        >>> callback = DCFTCheckpoint("{epoch:02d}-{val_accuracy:.3f}.dcft.safetensors",
        ...                           monitor="val_accuracy", save_best_only=True)
        >>> callback.mode
        'max'
    """

    def __init__(self, filepath, monitor="val_loss", save_best_only=False, mode="auto", verbose=0):
        super().__init__()
        if not str(filepath).endswith(SUFFIX):
            raise ValueError(
                f"`filepath` must end with `{SUFFIX}`. Received: filepath={str(filepath)!r}"
            )
        if mode not in ("auto", "min", "max"):
            raise ValueError(f'`mode` must be "auto", "min" or "max". Received: mode={mode!r}')
        if mode == "auto":
            is_score = re.search(r"acc|auc|precision|recall|f1|f_?beta|r2|iou", monitor.lower())
            mode = "max" if is_score else "min"
        self.filepath = str(filepath)
        self.monitor = monitor
        self.save_best_only = save_best_only
        self.mode = mode
        self.verbose = verbose
        self.best = None

    def on_train_begin(self, logs=None):
        adapted_part(self.model)  # says so now, and not after an epoch, if the model is not adapted
        for file in sorted(glob.glob(_glob_pattern(self.filepath))):
            notes = read_notes(file)
            if notes.get("monitor") == self.monitor and self._is_better(notes["value"]):
                self.best = notes["value"]

    def on_epoch_end(self, epoch, logs=None):
        logs = logs or {}
        value = logs.get(self.monitor)
        if value is None:
            if self.save_best_only:
                warnings.warn(
                    f"DCFTCheckpoint needs '{self.monitor}' to tell the best epoch, and it was not "
                    f"logged. Nothing is saved. Logged were: {sorted(logs)}",
                    stacklevel=2,
                )
                return
            notes = {}
        else:
            value = float(value)
            if self._is_better(value):
                self.best = value
            elif self.save_best_only:
                return
            notes = {"monitor": self.monitor, "value": value}
        path = self.filepath.format(epoch=epoch + 1, **logs)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_dcft_weights(self.model, path, notes={"epoch": epoch + 1, **notes})
        if self.verbose:
            print(f"Epoch {epoch + 1}: wrote {path}")

    def _is_better(self, value):
        if math.isnan(value):
            return False
        if self.best is None:
            return True
        return value > self.best if self.mode == "max" else value < self.best


def _glob_pattern(name: str) -> str:
    """The names that a file name with fields in braces can become."""
    pieces = string.Formatter().parse(name)
    return "".join(glob.escape(text) + ("" if f is None else "*") for text, f, _, _ in pieces)
