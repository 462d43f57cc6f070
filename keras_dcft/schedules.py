"""The paper's learning-rate schedule, which Keras does not have."""

import math
from typing import Any

import keras
from keras import ops

from keras_dcft.settings import checked_number, checked_positive_int


@keras.saving.register_keras_serializable("keras_dcft")
class LinearWarmupDecay(keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate that rises from zero in a straight line, then falls back to zero in another.

    Args:
        peak_learning_rate: positive float, where the rate stops to rise. The authors' are in
            `PAPER_RECIPES`; measured best values are in `docs/choices.md`.
        steps: positive int, all steps of the training. After them the rate stays zero.
        warmup_share: float between 0 and 1, the part of the steps in which the rate rises; 0.1 if
            neither this nor `warmup_steps` is given.
        warmup_steps: positive int below `steps`, instead of the share.

    Raises:
        TypeError: if `steps` or `warmup_steps` is not an int, or another argument not a number.
        ValueError: if a number is out of range, or share and steps are both given.

    Example:
        >>> schedule = LinearWarmupDecay(1e-2, steps=1000)
        >>> [round(float(schedule(step)), 4) for step in (0, 50, 100, 550, 1000)]
        [0.0, 0.005, 0.01, 0.005, 0.0]
        >>> optimizer = keras.optimizers.AdamW(schedule)
    """

    def __init__(
        self,
        peak_learning_rate: float,
        steps: int,
        warmup_share: float | None = None,
        warmup_steps: int | None = None,
    ):
        checked_number("peak_learning_rate", peak_learning_rate)
        if not (math.isfinite(peak_learning_rate) and peak_learning_rate > 0):
            raise ValueError(
                "`peak_learning_rate` must be positive and finite. "
                f"Received: peak_learning_rate={peak_learning_rate}"
            )
        checked_positive_int("steps", steps)
        if warmup_share is not None and warmup_steps is not None:
            raise ValueError(
                "Give `warmup_share` or `warmup_steps`. Received: "
                f"warmup_share={warmup_share}, warmup_steps={warmup_steps}"
            )
        if warmup_steps is None:
            warmup_share = 0.1 if warmup_share is None else warmup_share
            checked_number("warmup_share", warmup_share)
            if not 0 < warmup_share < 1:
                raise ValueError(
                    f"`warmup_share` must be between 0 and 1. Received: warmup_share={warmup_share}"
                )
            warmup_share = float(warmup_share)
        else:
            checked_positive_int("warmup_steps", warmup_steps)
            if warmup_steps >= steps:
                raise ValueError(
                    "`warmup_steps` must be below all steps of the training. Received: "
                    f"warmup_steps={warmup_steps}, steps={steps}"
                )
        self.peak_learning_rate = float(peak_learning_rate)
        self.steps = steps
        self.warmup_share = warmup_share
        self.warmup_steps = warmup_steps

    def __call__(self, step: Any) -> Any:
        """The learning rate, a float32 scalar, in a step counted from zero."""
        step = ops.cast(step, "float32")
        warmup = self.warmup_steps or self.warmup_share * self.steps
        rising, falling = step / warmup, (self.steps - step) / (self.steps - warmup)
        return self.peak_learning_rate * ops.maximum(0.0, ops.minimum(rising, falling))

    def get_config(self) -> dict[str, Any]:
        return {
            "peak_learning_rate": self.peak_learning_rate,
            "steps": self.steps,
            "warmup_share": self.warmup_share,
            "warmup_steps": self.warmup_steps,
        }
