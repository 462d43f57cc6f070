"""Several adapters of one model: which there are, which is meant, activating and merging them.

A model's layers have variables for the active adapter, and a `Share` of each of the others.
"""

import numpy as np
from keras import ops

from keras_dcft import keras_internals, shares
from keras_dcft.freezing import is_touched
from keras_dcft.hub import head_config, is_task
from keras_dcft.models import (
    adapt,
    add_adapter,
    carry,
    config_of,
    release,
    release_all,
)
from keras_dcft.paths import listed, with_itself
from keras_dcft.reclassing import increment_of, weight_of
from keras_dcft.settings import shortened


def checked_name(name) -> str:
    """A name for an adapter; raises TypeError or ValueError for what cannot be one."""
    if not isinstance(name, str):
        raise TypeError(f"`name` must be a str. Received: name={shortened(repr(name))}")
    if not name:
        raise ValueError("`name` must not be empty. Received: name=''")
    return name


def is_active(model, name) -> bool:
    """Whether an adapter is the active one in all layers that know it."""
    layers = [layer for layer in model._flatten_layers() if name in shares.names_of(layer)]
    return all(shares.active_name(layer) == name for layer in layers)


def activate(model, name, holders):
    """Makes an adapter the active one, or with None the base model.

    Args:
        model: a model that holds adapted layers.
        name: str, one of its adapters, or None.
        holders: function that returns every model that holds one of these layers, called where
            they have to be told.
    """
    layers = {path: layer for path, layer in with_itself(model).items() if is_touched(layer)}
    if name is not None:
        layers = {p: layer for p, layer in layers.items() if name in shares.names_of(layer)}
    layers = {p: layer for p, layer in layers.items() if shares.active_name(layer) != name}
    if not layers:
        return
    trained = {id(variable) for variable in model.trainable_variables}
    for layer in layers.values():
        shares.put_aside(layer)
    if name is None:
        for layer in layers.values():
            shares.rest(layer)
    elif all(shares.shares_of(layer)[name].fits(layer) for layer in layers.values()):
        # In all layers first: two of them may have one variable.
        for layer in layers.values():
            shares.put_base_back(layer, shares.active_name(layer))
        for layer in layers.values():
            shares.take_up(layer, name)
    else:
        present = holders()
        _adapt_anew(model, layers, name)
        carry(present)
        for holder in present:
            keras_internals.reset_compiled_state(holder)
            keras_internals.track_torch_parameters(with_itself(holder).values())
        return
    # Other numbers are trained now, or none, so that what the optimizers know is of no use.
    if trained != {id(variable) for variable in model.trainable_variables}:
        _reset_training(holders())
    else:
        keras_internals.restart_optimizer(model)


def _reset_training(holders):
    for holder in holders:
        keras_internals.reset_compiled_state(holder, functions=("train_function",))


def _adapt_anew(model, layers, name):
    """Adapts these layers of a model as an adapter says that other variables are needed for."""
    before, config = config_of(model), config_of(model, name)
    kept = {path: shares.shares_of(layer) for path, layer in layers.items()}
    active = {path: shares.active_name(layer) for path, layer in layers.items()}
    release(layers.values(), put_back=True)
    try:
        adapt(model, {**config, "active": name})
        taken = dict.fromkeys(layers, name)
    except BaseException:  # an interrupt from the keyboard as well
        release(layers.values())
        adapt(model, before)
        taken = active
        raise
    finally:
        for path, layer in layers.items():
            layer._dcft_shares = kept[path]
            if taken[path] is None:
                shares.rest(layer)
            else:
                shares.take_up(layer, taken[path])


def add(model, part, config, settings, name):
    """Gives an adapted model one more adapter, which is not active.

    Args:
        model: the model.
        part: what of it is adapted, for which `config` is a `dcft_config`.
        config: the adapter's `dcft_config`.
        settings: `AdapterSettings` with the initializers.
        name: str, its name.
    """
    layers = with_itself(part)
    paths = [*config["layers"], *config["trainable_layers"]]
    strange = [path for path in paths if not is_touched(layers[path])]
    if strange:
        raise ValueError(
            "Enable another adapter on what the first was enabled on, or with `target_layers` that "
            f"are inside of it. Received: model '{model.name}', of which "
            f"{listed(strange, layers)} belong to no adapted model."
        )
    try:
        add_adapter(layers, name, config, settings)
        if is_task(model) and part is model.backbone:
            add_adapter(with_itself(model), name, head_config(model))
    except BaseException:  # an interrupt from the keyboard as well
        drop(model, name, list)
        raise


def drop(model, name, holders):
    """Forgets an adapter; where it is the active one, the base model computes afterwards.

    Args:
        model, holders: as for `activate`.
        name: str, the adapter's name.
    """
    layers = [layer for layer in model._flatten_layers() if name in shares.names_of(layer)]
    active = [layer for layer in layers if shares.active_name(layer) == name]
    for layer in active:
        shares.rest(layer)
    for layer in layers:
        shares.shares_of(layer).pop(name, None)
    if active:
        _reset_training(holders())


def check_finite(model, names):
    """Raises ValueError if one of these adapters of a model has values that are not finite."""
    for path, layer in with_itself(model).items():
        for name in set(names).intersection(shares.names_of(layer)):
            own = enumerate(shares.own_variables(layer, name))
            trained = {str(n): v for n, v in own if shares.is_changed_by(v)}
            for key, value in {**shares.adapter_values(layer, name), **trained}.items():
                if not np.isfinite(keras_internals.as_array(value.value)).all():
                    raise ValueError(
                        "Load an adapter that did not diverge, or remove this one: its values must "
                        f"be finite. Received: NaN or infinity in '{path}/{key}'."
                    )


def merge(model, weights: dict, holders):
    """Moves into the base the sum of what its adapters changed, each times its weight.

    Args:
        model: a model that holds adapted layers.
        weights: dict of adapters' names to floats.
        holders: every model that holds one of these layers.
    """
    kept = []
    for layer in model._flatten_layers():
        if is_touched(layer):
            shares.put_aside(layer)
            of_layer = shares.shares_of(layer).items()
            weighted = [(weights[n], share) for n, share in of_layer if weights.get(n)]
            kept.append((layer, weighted))
    release_all(model, holders, put_back=True)
    done = set()  # two layers may have one variable
    for layer, weighted in kept:
        # In full first: what that changed is counted from the base.
        for number, variable in enumerate(keras_internals.own_weights(layer)):
            if id(variable) in done:
                continue
            done.add(id(variable))
            key = str(number)
            changes = [(w, s.values[key]) for w, s in weighted if key in s.values]
            if [weight for weight, _ in changes] == [1]:
                variable.assign(changes[0][1])
            elif changes and "float" in variable.dtype:
                base = ops.cast(variable, "float32")
                _add(variable, sum(w * (ops.cast(value, "float32") - base) for w, value in changes))
        adapting = [(w, share) for w, share in weighted if shares.has_values(share)]
        if adapting:
            found = (w * increment_of(layer, s.factors, s.settings.scale) for w, s in adapting)
            _add(weight_of(layer), sum(found))


def _add(variable, change):
    changed = ops.add(ops.cast(variable, "float32"), change)
    variable.assign(ops.cast(changed, variable.dtype))
