"""Which adapter computes: what is switched off at the moment, and for whom.

Switched off, a filter is zero and what is trained in full has the values of the base model. That is
true of the whole model and of all threads, functions that were compiled before included, as long as
any block is open: blocks are counted, so they may overlap. In a function that is being traced it is
true of what is traced inside the block, and of nothing else.
"""

import contextlib
import threading

import keras
import numpy as np

from keras_dcft import freezing, keras_internals, shares
from keras_dcft.adapter import made_beforehand

_lock = threading.RLock()
# By the variable's id: the variable, the value to put back, and how many blocks are open.
_switched_off = {}


def is_off(variable) -> bool:
    """Whether a variable has its base model's value for the moment."""
    return id(variable) in _switched_off


def trained_value(variable):
    """What a variable is outside of all blocks: itself, or the value that it then gets back."""
    with _lock:
        return _switched_off[id(variable)][1] if is_off(variable) else variable


def as_array(variable) -> np.ndarray:
    """A variable's value as it was trained, or what waits for it."""
    is_waiting = isinstance(variable, shares.Waiting)
    variable = variable.value if is_waiting else trained_value(variable)
    # NumPy has no bfloat16; float32 holds each of its values exactly.
    is_low = "bfloat16" in str(variable.dtype)
    return np.ascontiguousarray(
        keras_internals.as_array(keras.ops.cast(variable, "float32") if is_low else variable)
    )


def assign(variable, value):
    """Gives a variable a value, which it has outside of all blocks."""
    with _lock:
        if is_off(variable):
            entry = _switched_off[id(variable)]
            entry[1] = keras_internals.kept_value(entry[1], value)
        else:
            variable.assign(value)


def write(layer, values: dict, store):
    """Writes variables into a file's store, with their values outside of all blocks."""
    values = {**values, **freezing.base_values(layer), **shares.written(layer)}
    with _lock:
        for name, value in values.items():
            store[name] = trained_value(value)


@contextlib.contextmanager
def switched_off(base_values: list):
    """Inside this context variables have other values.

    Args:
        base_values: list of pairs of a variable and a NumPy array.
    """
    if base_values and keras_internals.is_traced(base_values[0][0]):
        with keras_internals.traced_with(base_values), made_beforehand([]):
            yield
        return
    entered = []
    try:
        with calls.changing(also_inside=True), _lock:
            for variable, value in base_values:
                if not is_off(variable):
                    kept = keras_internals.exchange_value(variable, value)
                    _switched_off[id(variable)] = [variable, kept, 0]
                _switched_off[id(variable)][2] += 1
                entered.append(variable)
        with made_beforehand([]):
            yield
    finally:
        with calls.changing(also_inside=True), _lock:
            for variable in entered:
                _switched_off[id(variable)][2] -= 1
                if not _switched_off[id(variable)][2]:
                    _, kept, _ = _switched_off.pop(id(variable))
                    keras_internals.put_value_back(variable, kept)


_own = threading.local()


@contextlib.contextmanager
def diverted(calls_of: dict):
    """Inside this context, and in what is traced inside, some layers are computed by functions.

    Args:
        calls_of: dict of the `id` of a layer, for which `keras_internals.divert` was called, to a
            function of its inputs and the other arguments of its call.
    """
    outside = getattr(_own, "calls_of", {})
    _own.calls_of = calls_of
    try:
        yield
    finally:
        _own.calls_of = outside


def diversion_of(layer):
    """The function that computes a layer in this thread at the moment, or None."""
    return getattr(_own, "calls_of", {}).get(id(layer))


class Call:
    """One call of `predict`, `generate` or the like, to which can be tied what is good for one."""


class _Calls:
    """Many calls at a time, or one change of the model, for which new calls wait."""

    def __init__(self):
        self._free = threading.Condition(threading.RLock())
        self._running = {}
        self._waiting = 0
        self._own = threading.local()

    def present(self) -> Call | None:
        """The outermost call that this thread is in."""
        return getattr(self._own, "call", None)

    @contextlib.contextmanager
    def _present(self):
        outside = self.present()
        self._own.call = outside or Call()
        try:
            yield
        finally:
            self._own.call = outside

    @contextlib.contextmanager
    def running(self):
        """While a model computes."""
        own = threading.get_ident()
        # On JAX Keras empties the variables of a model that predicts, so there one call at a time.
        is_alone = keras.config.backend() == "jax"
        with self._free if is_alone else contextlib.nullcontext():
            with self._free:
                self._free.wait_for(lambda: not self._waiting or own in self._running)
                self._running[own] = self._running.get(own, 0) + 1
            try:
                with self._present():
                    yield
            finally:
                with self._free:
                    self._running[own] -= 1
                    if not self._running[own]:
                        del self._running[own]
                    self._free.notify_all()

    @contextlib.contextmanager
    def changing(self, also_inside=False):
        """While a model is changed.

        Args:
            also_inside: bool, whether it may be done inside a call, and then waits for no other.

        Raises:
            RuntimeError: inside a call, for which it would wait, if it may not.
        """
        with self._free:
            if threading.get_ident() in self._running:
                if also_inside:
                    yield
                    return
                raise RuntimeError("A model cannot be changed while this thread predicts with one.")
            self._waiting += 1
            try:
                self._free.wait_for(lambda: not self._running)
                yield
            finally:
                self._waiting -= 1
                self._free.notify_all()


calls = _Calls()
