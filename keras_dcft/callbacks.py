"""`DCFTCheckpoint`: adapter files while training."""

import glob
import math
import re
import string
import warnings
from pathlib import Path

import keras

from keras_dcft import keras_internals
from keras_dcft.files import SUFFIX, read_dcft_notes, save_dcft_weights
from keras_dcft.models import the_name
from keras_dcft.paths import required_dcft_layers
from keras_dcft.settings import shortened
from keras_dcft.signatures import FilePath


class DCFTCheckpoint(keras.callbacks.Callback):
    """Writes adapter files while training: after each epoch or so many batches, or only the best.

    The counterpart of `keras.callbacks.ModelCheckpoint` for `save_dcft_weights`. Files are replaced
    atomically, and each remembers the value that it was saved for: a training that goes on after
    an interruption knows from the files that are there which value it has to beat. A file among
    them that cannot be read is passed over with a warning.

    Args:
        filepath: str or path, ending with `.dcft.safetensors`; may have fields such as `{epoch}`
            (counted from 1), `{batch}` (likewise, where `save_freq` is an int) and
            `{val_accuracy:.3f}` for the logged values. Its folder is made.
        monitor: str, the logged value that tells how good an epoch is.
        save_best_only: bool, whether to write only for an epoch that is better than all before.
        mode: `"min"`, `"max"`, or `"auto"`: as the metric of that name in the model has it, or
            else by the name, min for losses, max for accuracies and the like.
        verbose: int, 1 to print a line for each file.
        save_freq: `"epoch"`, or an int to write after so many batches instead, counted across
            epochs. What is logged then is about the epoch so far, and nothing of validation.
        initial_value_threshold: float, with `save_best_only` the value that the first file has to
            beat already, or None.
        name: str, the adapter to write, where the model has several.

    Raises:
        ValueError: if `filepath` ends otherwise, or `mode` or `save_freq` is none of the above;
            when training begins, if the model is not adapted, `name` is not one of its adapters,
            or nothing tells the mode.
        KeyError: while training, if `filepath` has a field that is not logged.

    Example:
        >>> callback = DCFTCheckpoint("{epoch:02d}-{val_accuracy:.3f}.dcft.safetensors",
        ...                           monitor="val_accuracy", save_best_only=True)
        >>> callback.mode
        'max'
    """

    def __init__(
        self,
        filepath: FilePath,
        monitor: str = "val_loss",
        save_best_only: bool = False,
        mode: str = "auto",
        verbose: int = 0,
        save_freq: int | str = "epoch",
        initial_value_threshold: float | None = None,
        name: str | None = None,
    ):
        super().__init__()
        if not str(filepath).endswith(SUFFIX):
            raise ValueError(
                f"`filepath` must end with `{SUFFIX}`. "
                f"Received: filepath={shortened(repr(str(filepath)))}"
            )
        if mode not in ("auto", "min", "max"):
            raise ValueError(
                f'`mode` must be "auto", "min" or "max". Received: mode={shortened(repr(mode))}'
            )
        if save_freq != "epoch" and (type(save_freq) is not int or save_freq < 1):
            raise ValueError(
                '`save_freq` must be "epoch" or a positive int. '
                f"Received: save_freq={shortened(repr(save_freq))}"
            )
        self._is_mode_given = mode != "auto"
        self.filepath = str(filepath)
        self.monitor = monitor
        self.save_best_only = save_best_only
        self.mode = mode if self._is_mode_given else _mode_by_name(monitor)
        self.verbose = verbose
        self.save_freq = save_freq
        self.best = initial_value_threshold
        self.name = name
        # Otherwise Keras waits for the results of every batch, for `on_train_batch_end` to see.
        self.async_safe = save_freq == "epoch"
        self._epoch = 0
        self._batches_of_epoch = 0
        self._batches_since_saving = 0

    def on_train_begin(self, logs=None):
        required_dcft_layers(self.model)
        the_name(self.model, self.name)
        if not self._is_mode_given:
            name = self.monitor.removeprefix("val_")
            direction = keras_internals.metric_direction(self.model, name)
            self.mode = {"up": "max", "down": "min", None: self.mode}[direction]
        if self.mode == "auto":
            raise ValueError(
                '`mode` must be "max" or "min" where neither a metric of the model nor the name '
                "tells which value is better. "
                f"Received: mode='auto', monitor={shortened(repr(self.monitor))}"
            )
        for file in sorted(glob.glob(_glob_pattern(self.filepath))):
            try:
                notes = read_dcft_notes(file)["notes"]
            except (OSError, ValueError) as error:
                warnings.warn(f"DCFTCheckpoint passes over a file: {error}", stacklevel=2)
                continue
            if notes.get("monitor") == self.monitor and self._is_better(notes["value"]):
                self.best = notes["value"]

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch
        self._batches_of_epoch = 0

    def on_train_batch_end(self, batch, logs=None):
        if self.save_freq == "epoch":
            return
        # With `steps_per_execution` only the last of several batches is told.
        self._batches_since_saving += batch + 1 - self._batches_of_epoch
        self._batches_of_epoch = batch + 1
        if self._batches_since_saving >= self.save_freq:
            self._batches_since_saving = 0
            self._save({"epoch": self._epoch + 1, "batch": batch + 1}, logs or {})

    def on_epoch_end(self, epoch, logs=None):
        if self.save_freq == "epoch":
            self._save({"epoch": epoch + 1}, logs or {})

    def _save(self, place, logs):
        value = logs.get(self.monitor)
        if value is None:
            if self.save_best_only:
                warnings.warn(
                    f"DCFTCheckpoint needs '{self.monitor}' to tell the best epoch, and it was not "
                    f"logged. Nothing is saved. Logged were: {shortened(repr(sorted(logs)), 400)}",
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
        path = self._path({**logs, **place})
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_dcft_weights(self.model, path, notes={**place, **notes}, name=self.name)
        if self.verbose:
            print(f"Epoch {place['epoch']}: wrote {path}")

    def _path(self, fields):
        try:
            return self.filepath.format(**fields)
        except KeyError as error:
            raise KeyError(
                f"`filepath` has the field {shortened(str(error))}, and there is no such value. "
                f"There are: {shortened(repr(sorted(fields)), 400)}. "
                f"Received: filepath={shortened(repr(self.filepath))}"
            ) from error

    def _is_better(self, value):
        if math.isnan(value):
            return False
        if self.best is None:
            return True
        return value > self.best if self.mode == "max" else value < self.best


def _mode_by_name(monitor: str) -> str:
    """The mode where the name of what is logged says it, or "auto"."""
    name = monitor.lower()
    if name.endswith("loss"):
        return "min"
    scores = r"(acc|accuracy|auc|precision|recall|f1|f_?beta|r2|iou)"
    return "max" if re.search(rf"(^|_){scores}(_score)?$", name) else "auto"


def _glob_pattern(name: str) -> str:
    """The names that a file name with fields in braces can become."""
    pieces = string.Formatter().parse(name)
    return "".join(glob.escape(text) + ("" if f is None else "*") for text, f, _, _ in pieces)
