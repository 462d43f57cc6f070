"""The settings of an adapter: one frozen value that checks itself."""

import dataclasses
import math
import numbers

import keras
from keras import initializers

DEFAULT_KERNEL_SIZE = 8
# By the measurements in docs/ablation.md; the paper has 4 and N(0, 0.02²).
DEFAULT_ALPHA = 16.0
FACTOR_START = {"class_name": "RandomNormal", "config": {"stddev": 0.01}}


@dataclasses.dataclass(frozen=True)
class AdapterSettings:
    """What makes an adapter, but for the weight that it adapts.

    Attributes:
        kernel_size: int, d, the size and stride of the transposed convolution.
        rank: int, rank of `A · B` inside the subspace.
        alpha: float, the increment's scale is `alpha / rank`.
        dropout: float in [0, 1), dropout on the increment's input while training.
        orthogonality: float, the paper's γ for this layer alone.
        factor_initializer: initializer of A and B; N(0, 0.01²) if None.
        filter_initializer: initializer of the filter; zeros if None.

    Raises:
        TypeError, ValueError: for a value that no layer can have.
    """

    kernel_size: int = DEFAULT_KERNEL_SIZE
    rank: int = 1
    alpha: float = DEFAULT_ALPHA
    dropout: float = 0.0
    orthogonality: float = 0.0
    factor_initializer: keras.initializers.Initializer | None = None
    filter_initializer: keras.initializers.Initializer | None = None

    def __post_init__(self):
        def keep(name, value):
            object.__setattr__(self, name, value)

        for name in ("kernel_size", "rank"):
            keep(name, checked_positive_int(name, getattr(self, name)))
        for name in ("alpha", "dropout", "orthogonality"):
            keep(name, checked_number(name, getattr(self, name)))
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"`alpha` must be positive and finite. Received: alpha={self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` must be in [0, 1). Received: dropout={self.dropout}")
        if not (math.isfinite(self.orthogonality) and self.orthogonality >= 0):
            raise ValueError(
                "`orthogonality` must be finite and not negative. "
                f"Received: orthogonality={self.orthogonality}"
            )
        keep("factor_initializer", initializers.get(self.factor_initializer or FACTOR_START))
        keep("filter_initializer", initializers.get(self.filter_initializer or "zeros"))

    @property
    def scale(self) -> float:
        """`alpha / rank`, what the increment is multiplied by."""
        return self.alpha / self.rank

    def numbers(self) -> dict:
        """All but the initializers: what an adapter with values needs."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if not field.name.endswith("initializer")
        }

    def common(self) -> dict:
        """Of these all but the kernel size: what the adapters of one model usually share."""
        return {name: value for name, value in self.numbers().items() if name != "kernel_size"}

    def config(self) -> dict:
        """Plain data, from which `from_config` makes the settings again."""
        return {
            **self.numbers(),
            "factor_initializer": initializers.serialize(self.factor_initializer),
            "filter_initializer": initializers.serialize(self.filter_initializer),
        }


def fresh(initializer):
    """An initializer that draws anew: one instance gives all tensors of a shape the same values."""
    is_keras_own = isinstance(initializer, initializers.Initializer)
    return initializer.clone() if is_keras_own else initializer


def shortened(text: str, most: int = 150) -> str:
    """A text for a message, without its middle where it is long."""
    half = most // 2
    return text if len(text) <= most else f"{text[:half]} ... {text[-half:]}"


def counted(number: int, noun: str) -> str:
    """`1 layer`, `1,000 layers`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def checked_positive_int(name, value) -> int:
    """An int, NumPy's as well; TypeError for what is none (or a bool), ValueError below 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"`{name}` must be an int. Received: {name}={shortened(repr(value))}")
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1. Received: {name}={value}")
    return int(value)


def checked_number(name, value) -> float:
    """A float; TypeError for what is no number (or a bool)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` must be a number. Received: {name}={shortened(repr(value))}")
    return float(value)
