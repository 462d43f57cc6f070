"""What could be trained before a model was adapted, what may be trained now, and its base values.

A variable that is trained in full beside the adapters, in a head, in one of `trainable_layers` or
by hand (`bias.trainable = True`), keeps the value that it had in the base model: removing,
disabling and loading another adapter put it back.
"""

import functools
import weakref

import keras
import numpy as np

from keras_dcft import keras_internals

# What the names of these begin with in a layer's part of a file.
BASE = "dcft_base_"
SHARE = "dcft_share_"


def keep_base(variable):
    """Remembers a variable's value as the base model's, if none is remembered yet."""
    if base_value(variable) is None:
        set_base(variable, keras_internals.as_array(variable))


def set_base(variable, value):
    """Remembers a value of a variable as the base model's; None forgets it."""
    variable._dcft_base = value


def base_value(variable):
    """The value that a variable trained in full has in the base model, or None."""
    return getattr(variable, "_dcft_base", None)


class FrozenVariable:
    """Mixin of the variables that adapting froze: made trainable by hand, one keeps its base."""

    # With Keras's own getter; what `super()` gives is always true to `torch.compile`.
    @keras.Variable.trainable.setter
    def trainable(self, value):
        if value:
            keep_base(self)
        keras.Variable.trainable.fset(self, value)


@functools.cache
def _frozen_class(cls):
    return type(cls.__name__, (FrozenVariable, cls), {"__module__": cls.__module__})


def freeze_variables(layer):
    """Freezes a layer's own variables so that nobody thaws them but by hand, one by one."""
    for variable in keras_internals.freeze_variables(layer):
        if not isinstance(variable, FrozenVariable):  # a tied one is frozen with its first layer
            variable.__class__ = _frozen_class(type(variable))


class Frozen:
    """Mixin of a frozen layer.

    Its variables are out of reach of `trainable = True`, but the flag alone would let a layer with
    statistics, such as BatchNormalization, update them, and one that is not built yet make
    trainable variables; so here the flag stays False.
    """

    @property
    def trainable(self):
        return False

    @trainable.setter
    def trainable(self, value):
        pass


class Before:
    """What could be trained in a layer before it was adapted, frozen or made trainable.

    Attributes:
        flag: bool, the layer's `trainable`.
        is_part: bool, whether it is the model that was adapted as a whole.
        is_trained: bool, whether it is trained in full since.
    """

    def __init__(self, layer, is_part=False, is_trained=False):
        self.flag = layer.trainable
        self.is_part = is_part
        self.is_trained = is_trained
        # Weak references: a kernel that is quantized later is not to stay in memory in floating
        # point as well.
        self._variables = [
            (weakref.ref(v), v.trainable) for v in keras_internals.own_trainable_variables(layer)
        ]

    def flags(self, layer) -> list:
        """The flags that the layer's own weights had, in their order; True for later ones."""
        known = {id(variable()): flag for variable, flag in self._variables}
        return [known.get(id(v), True) for v in keras_internals.own_weights(layer)]

    def set_flags(self, layer, flag, flags):
        """Takes over flags that a file has."""
        self.flag = flag
        own = zip(keras_internals.own_weights(layer), flags)
        known = {id(variable()) for variable, _ in self._variables}
        self._variables = [(weakref.ref(v), f) for v, f in own if id(v) in known]

    def restore(self, layer):
        """Gives the layer its flags back; its class must be its own again."""
        for variable in keras_internals.own_weights(layer):
            if isinstance(variable, FrozenVariable):
                variable.__class__ = type(variable).__mro__[2]
            set_base(variable, None)
        known = [(variable(), flag) for variable, flag in self._variables]
        known = [(variable, flag) for variable, flag in known if variable is not None]
        ids = {id(variable) for variable, _ in known}
        for built_later in keras_internals.own_trainable_variables(layer):
            if id(built_later) not in ids:
                built_later.trainable = self.flag
        keras_internals.thaw_variables(layer, *map(list, zip(*known)) if known else ([], []))
        keras_internals.set_trainable_flag(layer, self.flag)


def is_touched(layer) -> bool:
    """Whether adapting did something to a layer."""
    return "_dcft_before" in vars(layer)


def is_part(layer) -> bool:
    """Whether it is a model that was adapted as a whole."""
    return is_touched(layer) and layer._dcft_before.is_part


def plain_view(layer):
    """A touched object as its base class, with the flag that it had before, without an adapter.

    What Keras does with a layer's own state, it does to this view, by the base class's public
    methods. So what is written and told of the base is what the base layer would write and tell,
    whichever way this version of Keras goes about it.
    """
    adapter = getattr(layer, "dcft_adapter", None)
    hidden = adapter.variables.values() if adapter else ()
    view = keras_internals.view_as(layer, layer.dcft_base_class, without=hidden)
    if is_touched(layer):
        keras_internals.set_trainable_flag(view, layer._dcft_before.flag)
    return view


def special_flags(layer) -> dict:
    """What a touched layer's flags were before and are now, where that is not the usual.

    Usually all was trainable before, and now what adapting left trainable is; a user may have
    frozen a layer before or after, or made one of its variables trainable by hand.
    """
    if not is_touched(layer):
        return {}
    own = keras_internals.own_weights(layer)
    before = [layer._dcft_before.flag, layer._dcft_before.flags(layer)]
    now = [layer.trainable, [v.trainable for v in own]]
    flags = {"before": before} if before != [True, [True] * len(own)] else {}
    return {**flags, "now": now} if now != _usual_flags(layer) else flags


def _usual_flags(layer) -> list:
    trained = {id(v) for v in keras_internals.own_trainable_variables(layer)}
    own = [id(v) in trained for v in keras_internals.own_weights(layer)]
    return [not isinstance(layer, Frozen), own]


def set_flags(layer, flags):
    """Gives a layer what `special_flags` told of another."""
    if not flags:
        return
    if "before" in flags:
        layer._dcft_before.set_flags(layer, *flags["before"])
    if "now" in flags:
        set_flags_now(layer, flags["now"])


def set_flags_now(layer, flags=None):
    """Gives a layer the flags that `special_flags` told of now, or the usual ones."""
    flag, own = flags or _usual_flags(layer)
    for variable, is_trainable in zip(keras_internals.own_weights(layer), own):
        variable.trainable = is_trainable
    keras_internals.set_trainable_flag(layer, flag)


def base_values(layer) -> dict:
    """The base values of a layer's own variables, by their names in a file."""
    numbered = enumerate(map(base_value, keras_internals.own_weights(layer)))
    return {f"{BASE}{number}": value for number, value in numbered if value is not None}


def without_ours(store) -> dict:
    """What a file has of a layer but for those and the shares of adapters that are not active."""
    ours = (BASE, SHARE)
    names = [name for name in store.keys() if not name.startswith(ours)]  # noqa: SIM118 (no dict)
    return {name: store[name] for name in names}


def take_base_values(layer, store):
    """Takes over the base values that a file has; without any, what was loaded is the base."""
    for number, variable in enumerate(keras_internals.own_weights(layer)):
        if base_value(variable) is not None:
            name = f"{BASE}{number}"
            is_stored = name in store.keys()  # noqa: SIM118 (no dict)
            set_base(
                variable, np.array(store[name]) if is_stored else keras_internals.as_array(variable)
            )
