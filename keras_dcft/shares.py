"""What a layer has of the adapters that are not active: arrays, which cost memory and nothing else.

A layer has variables for one adapter at a time. The others wait in its `Share`s, by name, and
activating one exchanges them. So each layer brings all of its adapters along, whichever model it is
saved in, and functions that were compiled before see the exchange where the variables stay.
"""

import dataclasses
import math
import urllib.parse

import numpy as np
from keras import ops

from keras_dcft import freezing, increments, keras_internals
from keras_dcft.adapter import ADAPTER_VARIABLES
from keras_dcft.settings import AdapterSettings, fresh

DEFAULT_NAME = "default"


@dataclasses.dataclass
class Share:
    """A layer's share of one adapter.

    Attributes:
        settings: the `AdapterSettings`, or None for a layer that is not adapted.
        is_trained: bool, whether the layer is trained in full.
        flags: what `freezing.flags_now` told, where a user changed something; or None.
        values: dict of arrays, of the adapter's variables by name and of the layer's own weights
            that are trained in full by their number.
    """

    settings: AdapterSettings | None = None
    is_trained: bool = False
    flags: list | None = None
    values: dict = dataclasses.field(default_factory=dict)

    def fits(self, layer) -> bool:
        """Whether the layer's variables, as they are, can take these values."""
        own = settings_of(layer)
        is_alike = (own and own.numbers()) == (self.settings and self.settings.numbers())
        return is_alike and layer._dcft_before.is_trained == self.is_trained

    @property
    def factors(self) -> list:
        """A, B and the filter."""
        return [self.values[name] for name in ADAPTER_VARIABLES]


def active_name(layer) -> str | None:
    """The name of the adapter that computes in a touched layer; None for the base."""
    return getattr(layer, "_dcft_active", DEFAULT_NAME)


def shares_of(layer) -> dict:
    """The shares of the adapters that are not active, by name."""
    return vars(layer).setdefault("_dcft_shares", {})


def names_of(layer) -> list:
    """The names of all adapters that a layer knows; none for one that is not touched."""
    if not freezing.is_touched(layer):
        return []
    active = active_name(layer)
    return [*([] if active is None else [active]), *shares_of(layer)]


def has_values(share) -> bool:
    """Whether it is this share of several with one weight that has the adapter's values."""
    return ADAPTER_VARIABLES[0] in share.values


def adapter_values(layer, name) -> dict:
    """The variables of the layer's adapter of a name, or the arrays that wait for them."""
    if name is not None and name == active_name(layer):
        adapter = getattr(layer, "dcft_adapter", None)
        return adapter.variables if adapter and adapter.host is layer else {}
    if name not in names_of(layer):
        return {}
    share = shares_of(layer)[name]
    return {key: Waiting(share, key) for key in ADAPTER_VARIABLES if key in share.values}


class Waiting:
    """A value of an adapter that is not active, to be used like the variable that it waits for."""

    # Keras's name for what is no weight but written through the gradients' place.
    overwrite_with_gradient = False

    def __init__(self, share, key, variable=None):
        self._share, self._key, self._variable = share, key, variable
        self.name = key if variable is None else variable.name

    @property
    def trainable(self):
        return self._key in self._share.values

    @trainable.setter
    def trainable(self, value):
        if not value:
            self._share.values.pop(self._key, None)

    @property
    def value(self):
        """The array; of what this adapter does not train the base's."""
        is_there = self._key in self._share.values
        return self._share.values[self._key] if is_there else base_copy(self._variable)

    @property
    def shape(self):
        return self.value.shape

    @property
    def dtype(self):
        return self.value.dtype

    def assign(self, value):
        """Replaces the array."""
        self._share.values[self._key] = np.array(value, dtype=self.dtype).reshape(self.shape)

    def put_base_back(self):
        """Gives what is trained in full the value of the base model."""
        if self.trainable:
            self.assign(base_copy(self._variable))


def base_copy(variable):
    """A copy of a variable's value in the base model."""
    base = freezing.base_value(variable)
    return _copied(variable) if base is None else base.copy()


def own_variables(layer, name) -> list:
    """A layer's own weights as an adapter has them: its variables, or what waits for them."""
    own = own_weights(layer)
    if name not in names_of(layer) or name == active_name(layer):
        return own
    share = shares_of(layer)[name]
    return [Waiting(share, str(number), variable) for number, variable in enumerate(own)]


def base_weights(model) -> dict:
    """All weights of a model but the adapters', by their ids."""
    return {id(v): v for layer in model._flatten_layers() for v in own_weights(layer)}


def size(variables) -> int:
    """How many numbers variables have."""
    return sum(math.prod(variable.shape) for variable in variables)


def trained_beside(layer, name) -> list:
    """The ids of a layer's own weights that are trained, beside an adapter of this name."""
    own = own_weights(layer)
    if name not in names_of(layer) or name == active_name(layer):
        return [id(v) for v in own if v.trainable and not v.overwrite_with_gradient]
    flags_before = layer._dcft_before.flags(layer)
    was_trainable = dict(zip(map(id, keras_internals.own_weights(layer)), flags_before))
    numbers = [number for number in shares_of(layer)[name].values if number.isdigit()]
    return [id(own[int(n)]) for n in numbers if was_trainable[id(own[int(n)])]]


def is_changed_by(variable) -> bool:
    """Whether an adapter trains this one of its `own_variables` in full."""
    is_waiting = isinstance(variable, Waiting)
    return variable.trainable if is_waiting else freezing.base_value(variable) is not None


def put_base_back(layer, name):
    """Gives what an adapter trains in full the values of the base model."""
    for variable in own_variables(layer, name):
        if isinstance(variable, Waiting):
            variable.put_base_back()
        elif freezing.base_value(variable) is not None:
            variable.assign(freezing.base_value(variable))


def settings_of(layer, name=None) -> AdapterSettings | None:
    """The settings of a layer's variables, or those of one of its adapters by name."""
    if name is None or name == active_name(layer):
        return layer.dcft_settings if getattr(layer, "dcft_adapter", None) else None
    return shares_of(layer)[name].settings


def is_trained(layer, name=None) -> bool:
    """Whether a layer is trained in full, now or by one of its adapters."""
    if name is None or name == active_name(layer):
        return layer._dcft_before.is_trained
    return shares_of(layer)[name].is_trained


def flags_of(layer, name=None) -> dict:
    """What is special about a layer's flags, see `freezing.special_flags`, by an adapter."""
    flags = freezing.special_flags(layer)
    if name is None or name == active_name(layer):
        return flags
    flags.pop("now", None)
    now = shares_of(layer)[name].flags
    return {**flags, "now": now} if now else flags


def fresh_share(layer, settings, is_trained, flags, matrix_shape) -> Share:
    """The share of a new adapter, with which the model is the base.

    Args:
        layer: the layer.
        settings, is_trained, flags: as in `Share`.
        matrix_shape: the shape of the layer's weight as a matrix; None for a layer that has no
            adapter or shares that of another with the same weight.
    """
    share = Share(settings, is_trained, flags)
    if settings is not None and matrix_shape is not None:
        a, b = increments.subspace_shape(*matrix_shape, settings.kernel_size)
        d, rank = settings.kernel_size, settings.rank
        start = [settings.factor_initializer] * 2 + [settings.filter_initializer]
        shapes = ((a, rank), (rank, b), (d, d))
        for name, shape, initializer in zip(ADAPTER_VARIABLES, shapes, start):
            share.values[name] = ops.convert_to_numpy(fresh(initializer)(shape, dtype="float32"))
    if is_trained:
        for number, variable in enumerate(own_weights(layer)):
            share.values[str(number)] = base_copy(variable)
    return share


def waits_to_be_trained(layer) -> bool:
    """Whether an adapter that is not active trains weights of this layer in full."""
    waiting = vars(layer).get("_dcft_shares", {}).values()
    return any(key.isdigit() for share in waiting for key in share.values)


def special_state(layer) -> dict:
    """What a layer's config says beside its settings: its flags, and its adapters if it has more.

    Returns:
        dict of `flags`, `active` and `stored`, those that are not the usual.
    """
    if not freezing.is_touched(layer):
        return {}
    state = {"flags": freezing.special_flags(layer)}
    if active_name(layer) != DEFAULT_NAME or shares_of(layer):
        state["active"] = active_name(layer)
        state["stored"] = {
            name: {
                "settings": share.settings and share.settings.config(),
                "is_trained": share.is_trained,
                "flags": share.flags,
            }
            for name, share in shares_of(layer).items()
        }
    return {name: value for name, value in state.items() if value or name == "active"}


def set_state(layer, state, matrix_shape):
    """Takes over what `special_state` told of another layer."""
    freezing.set_flags(layer, state.get("flags"))
    layer._dcft_active = state.get("active", DEFAULT_NAME)
    for name, told in state.get("stored", {}).items():
        settings = told["settings"] and AdapterSettings(**told["settings"])
        share = fresh_share(layer, settings, told["is_trained"], told["flags"], matrix_shape)
        shares_of(layer)[name] = share


def put_aside(layer):
    """Makes a share of what is active in a layer, its values copied."""
    name = active_name(layer)
    if name is None:
        return
    share = Share(settings_of(layer), is_trained(layer), freezing.special_flags(layer).get("now"))
    if share.settings is not None and layer.dcft_adapter.host is layer:
        share.values.update({n: _copied(v) for n, v in layer.dcft_adapter.variables.items()})
    for number, variable in enumerate(own_weights(layer)):
        base, value = freezing.base_value(variable), _copied(variable)
        # A base alone says that some adapter trains it.
        is_own = share.is_trained or variable.trainable or not np.array_equal(value, base)
        if base is not None and is_own:
            share.values[str(number)] = value
    shares_of(layer)[name] = share


def take_up(layer, name):
    """Gives a layer's variables, which fit and are as the base's, the values of a share."""
    share = shares_of(layer).pop(name)
    layer._dcft_active = name
    freezing.set_flags_now(layer, share.flags)
    adapter = getattr(layer, "dcft_adapter", None)
    own = own_weights(layer)
    for key, value in share.values.items():
        is_own = key not in ADAPTER_VARIABLES
        variable = own[int(key)] if is_own else adapter.variables[key]
        if is_own and not share.is_trained and share.flags is None:
            variable.trainable = True  # by hand, in the file that it is from
        variable.assign(value)


def rest(layer):
    """Makes a layer compute what it does in the base model, with nothing to train."""
    put_base_back(layer, active_name(layer))
    layer._dcft_active = None
    adapter = getattr(layer, "dcft_adapter", None)
    if adapter is not None:
        adapter.filter.assign(np.zeros(adapter.filter.shape, "float32"))
    for variable in keras_internals.own_weights(layer):
        if not variable.overwrite_with_gradient:
            variable.trainable = False


def own_weights(layer) -> list:
    """A layer's own weights without an adapter's, in the order in which the base layer has them."""
    adapter = getattr(layer, "dcft_adapter", None)
    hidden = {id(v) for v in adapter.variables.values()} if adapter else ()
    return [v for v in keras_internals.own_weights(layer) if id(v) not in hidden]


def _copied(variable):
    return keras_internals.as_array(variable)


def written(layer) -> dict:
    """The values of a layer's shares, by their names in a file's store."""
    return {
        _stored_name(name, key): value
        for name, share in vars(layer).get("_dcft_shares", {}).items()
        for key, value in share.values.items()
    }


def read(layer, store):
    """Takes over what a store has for a layer's shares; one without any leaves them as they are.

    Raises:
        ValueError: if the store is of a layer that other adapters wait in.
    """
    stored = [name for name in store.keys() if name.startswith(freezing.SHARE)]  # noqa: SIM118
    if not stored:
        return
    places = {}
    for name, share in vars(layer).get("_dcft_shares", {}).items():
        # What a user made trainable by hand is in the file alone.
        numbers = (str(number) for number in range(len(own_weights(layer))))
        for key in (*ADAPTER_VARIABLES, *numbers):
            places[_stored_name(name, key)] = share, key
    needed = {name for name, (share, key) in places.items() if key in share.values}
    if not needed <= set(stored) <= set(places):
        raise ValueError(
            f"Layer '{layer.name}' cannot be loaded: activate the adapter that was active when the "
            "file was written, in a model that has the same adapters. The model has waiting "
            f"{sorted(shares_of(layer))}; the file has {sorted(stored)[:6]}."
        )
    for name in stored:
        share, key = places[name]
        share.values[key] = np.array(store[name])


def _stored_name(name, key) -> str:
    # In HDF5 a slash would open a group.
    return f"{freezing.SHARE}{urllib.parse.quote(name, safe='')}_{key}"
