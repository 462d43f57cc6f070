"""The learning rate of adapted models, as long as nobody chose another.

KerasHub's tasks are compiled from birth, with a rate for full fine-tuning at which adapters learn
next to nothing.
"""

import inspect
import math
import warnings
import weakref

import keras

LEARNING_RATE = 5e-3
BORN_WITH = (2e-5, 5e-5)  # rates of KerasHub's tasks, with Adam or AdamW
TOO_LOW = LEARNING_RATE / 10

_rates_before = weakref.WeakKeyDictionary()  # by the model
_warned = weakref.WeakSet()  # optimizers


def choose(task):
    """Gives the optimizer that a task was born with, or another such, the rate for adapters."""
    optimizer = _inner_optimizer(task)
    if any(_is_usual(optimizer, rate) for rate in BORN_WITH):
        _rates_before.setdefault(task, _number(optimizer))
        optimizer.learning_rate = LEARNING_RATE


def put_back(model):
    """Gives an optimizer the rate that it was born with, if it still has that for adapters."""
    optimizer, before = _inner_optimizer(model), _rates_before.pop(model, None)
    if before is not None and _is_usual(optimizer, LEARNING_RATE):
        optimizer.learning_rate = before


def warn_of_low_rate(model):
    """Warns, once for an optimizer, where adapters would learn next to nothing."""
    optimizer = _inner_optimizer(model)
    # Rates of others have another meaning, and schedules may begin at zero.
    rate = _number(optimizer) if isinstance(optimizer, keras.optimizers.Adam) else None
    if rate is not None and 0 < rate < TOO_LOW and optimizer not in _warned:
        _warned.add(optimizer)
        warnings.warn(
            f"Compile with a larger learning rate: at {rate:.1g} adapters learn next to nothing in "
            f"a usual training, start at {LEARNING_RATE} with Adam.",
            stacklevel=3,
        )


def _inner_optimizer(model):
    optimizer = getattr(model, "optimizer", None)
    return getattr(optimizer, "inner_optimizer", optimizer)  # in mixed precision


def _number(optimizer) -> float | None:
    """An optimizer's learning rate, if it is a number: no schedule, no function.

    From its configuration, as a variable that lies on several replicas is no number itself.
    """
    rate = optimizer.get_config().get("learning_rate")
    return rate if isinstance(rate, float) else None


def _is_usual(optimizer, rate) -> bool:
    """Whether it is an Adam or AdamW with this rate and else nothing but defaults."""
    # On PyTorch they are of classes of their own with the same names.
    cls = getattr(keras.optimizers, type(optimizer).__name__, None)
    is_adam = cls in (keras.optimizers.Adam, keras.optimizers.AdamW)
    if not is_adam or not isinstance(optimizer, cls) or _number(optimizer) is None:
        return False
    config = optimizer.get_config()
    parameters = inspect.signature(cls).parameters
    others = config.keys() & parameters.keys() - {"learning_rate", "name"}
    is_default = all(config[name] == parameters[name].default for name in others)
    return is_default and math.isclose(config["learning_rate"], rate, rel_tol=1e-3)
