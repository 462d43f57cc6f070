"""Whoever holds an adapted layer carries it: adapting, releasing, and what is written of models.

Keras saves a model as a tree of configs, and most layers write only their constructor's arguments.
So everything that adapting touches, and every model around it, gets a made class that writes the
object's own serialisation and a `dcft_config` of the layers below it, whichever root is saved. That
is what `planning.py` decided and, only where they are needed: `adapters` (path: the numbers, if
layers differ in more than the kernel size), `roots` (the paths below which everything is adapted,
trained or frozen), `untouched` (paths below those that are none of it), `flags` (path: what the
user froze or thawed, see `freezing.special_flags`) and `parts` (the paths of what was adapted as a
whole; usually the model).
"""

import contextlib
import dataclasses
import functools

import h5py  # Keras's own files are read with it
import keras

from keras_dcft import freezing, keras_internals, rates, selection, shares
from keras_dcft.freezing import Before, is_touched
from keras_dcft.layers.base import DCFTLayer, check_quantization
from keras_dcft.paths import dcft_layers, joined, with_itself, with_sublayers
from keras_dcft.planning import check_adaptable
from keras_dcft.reclassing import (
    DCFT_CLASSES,
    dcft_class,
    made_class,
    matrix_shape_of,
    weight_of,
    weight_owners,
)
from keras_dcft.settings import AdapterSettings, counted, shortened

PACKAGE = "keras_dcft"


class Carried:
    """Mixin of all made classes: what they write is the original and what was done to it."""

    dcft_is_always_part = False

    def get_config(self):
        keras_internals.check_config_is_for_keras_file()
        plain = keras_internals.serialized_view(freezing.plain_view(self))
        plain.pop("compile_config", None)
        return {"model": plain, "dcft": config_of(self)}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        plain = keras.saving.deserialize_keras_object(
            config["model"], custom_objects=custom_objects
        )
        return adapt_when_built(plain, config["dcft"])

    def get_build_config(self):
        # The wrapped serialisation has it, and is built by the time that it is adapted.
        return None

    def __reduce__(self):
        # Made classes cannot be imported; the one that they were made of can.
        function, arguments = super().__reduce__()
        return getattr(self.dcft_base_class, function.__name__), arguments


class Touched(Carried):
    """Mixin of what adapting froze or trains in full, and of what holds such layers."""

    def save_own_variables(self, store):
        written = {}
        super().save_own_variables(written)
        selection.write(self, written, store)

    def load_own_variables(self, store):
        super().load_own_variables(freezing.without_ours(store))
        freezing.take_base_values(self, store)
        shares.read(self, store)


class AwaitsBuilding(Carried):
    """Mixin of a layer from a file that is adapted as soon as its first call has built it."""

    def get_config(self):
        return {**super().get_config(), "dcft": self._dcft_awaited}

    def __call__(self, *args, **kwargs):
        outputs = super().__call__(*args, **kwargs)
        self.__class__ = self.dcft_base_class
        adapt(self, self._dcft_awaited)
        del self._dcft_awaited
        carry([self])
        return outputs


class AdaptedModel(Touched):
    """Mixin of models that are adapted or hold adapted layers."""

    def __init__(self, model=None, dcft=None, **kwargs):
        # Only for its signature, the config's, by which `clone_model` sees that an adapted
        # functional model cannot be made from inputs and outputs; the clone is then a plain one
        # with DCFT layers. (Keras 3.13 would see that in no signature of keywords alone.)
        super().__init__(**kwargs)

    @property
    def dcft_config(self) -> dict:
        """The adapters' settings: rank, alpha, ..., the kernel size of each layer by path."""
        return without_exceptions(config_of(self))

    @property
    def dcft_adapters(self) -> dict:
        """The `dcft_config` of every adapter by its name, the active one first."""
        return {n: without_exceptions(config_of(self, n)) for n in adapter_names(self)}

    def save(self, filepath, *args, **kwargs):
        if str(filepath).endswith((".h5", ".hdf5")):
            raise ValueError(
                "Save adapted models as `.keras`: an HDF5 file of a whole model cannot hold them. "
                f"Received: filepath={str(filepath)!r}"
            )
        return super().save(filepath, *args, **kwargs)

    def load_weights(self, filepath, *args, **kwargs):
        """As Keras's; takes files of the base model too, and changes nothing when it fails.

        For that it keeps a copy of all weights in the main memory meanwhile.
        """
        if any(map(selection.is_off, trained_in_full(self))):
            raise ValueError("`model` cannot be loaded into inside `dcft_disabled`.")
        trained = [(v, selection.trained_value(v)) for v in self.variables]
        before = [
            (v, keras_internals.as_array(value), freezing.base_value(v)) for v, value in trained
        ]
        waiting = [
            (share, dict(share.values))
            for layer in self._flatten_layers()
            if is_touched(layer)
            for share in shares.shares_of(layer).values()
        ]
        is_plain = str(filepath).endswith(".weights.h5") and not _holds_adapters(filepath)
        try:
            with _named_as_base(self) if is_plain else contextlib.nullcontext():
                super().load_weights(filepath, *args, **kwargs)
        except BaseException:
            for variable, value, base in before:
                selection.assign(variable, value)
                if base is not None:
                    freezing.set_base(variable, base)
            for share, values in waiting:
                share.values = values
            raise

    def fit(self, *args, **kwargs):
        rates.warn_of_low_rate(self)
        keras_internals.build_optimizer(self)
        return super().fit(*args, **kwargs)

    def train_on_batch(self, *args, **kwargs):
        keras_internals.build_optimizer(self)
        return super().train_on_batch(*args, **kwargs)

    def predict(self, *args, **kwargs):
        with selection.calls.running():
            return super().predict(*args, **kwargs)

    def predict_on_batch(self, *args, **kwargs):
        with selection.calls.running():
            return super().predict_on_batch(*args, **kwargs)

    def enable_lora(self, *args, **kwargs):
        raise ValueError(
            f"Call `merge_dcft(model)` or `remove_dcft(model)` first: model '{self.name}' is "
            "adapted with DCFT and cannot have LoRA as well."
        )

    def __repr__(self):
        config = self.dcft_config
        sizes = ", ".join(map(str, sorted(set(config["layers"].values()))))
        return (
            f"<{type(self).__name__} name={self.name}, built={self.built}, "
            f"{counted(len(config['layers']), 'DCFT layer')} of rank {config['rank']}, "
            f"kernel size {sizes}{self._dcft_names()}>"
        )

    def _dcft_names(self) -> str:
        names = adapter_names(self)
        if names == [shares.DEFAULT_NAME]:
            return ""
        active = {shares.active_name(x) for x in self._flatten_layers() if is_touched(x)}
        return f", adapters {joined(map(repr, names))}, active {joined(map(repr, active))}"


def _holds_adapters(path) -> bool:
    with h5py.File(path) as file:
        return bool(file.visit(lambda name: name.endswith("dcft_filter") or None))


@contextlib.contextmanager
def _named_as_base(model):
    """Inside it all layers are called as the base's, which is how Keras finds them in files."""
    changed = [
        (x, type(x)) for x in with_itself(model).values() if isinstance(x, (Carried, DCFTLayer))
    ]
    for layer, cls in changed:
        base = cls.dcft_base_class
        layer.__class__ = made_class(cls, name=base.__name__, dcft_base_class=base)
    try:
        yield
    finally:
        for layer, cls in changed:
            layer.__class__ = cls


@keras.saving.register_keras_serializable(PACKAGE)
class DCFTModel(AdaptedModel, keras.Model):
    """What all made classes but KerasHub's are saved as; loading gives the made class."""


# What hub.py knows: by KerasHub's classes the mixin and attributes of the made one, and the bases
# of layers that keep their class, since they never have weights.
special_classes = {}
keep_their_class = []


@functools.cache
def carrying_class(cls, *mixins, is_part=False):
    """The class of a touched object, or of a model that holds some.

    Args:
        cls: the object's own class.
        *mixins: `freezing.Frozen`, `AwaitsBuilding`, or a DCFT class, if they apply.
        is_part: whether it is a model that was adapted as a whole, whose class has another name.
    """
    carrier = AdaptedModel if issubclass(cls, keras.Model) else Touched
    carrier, attributes = special_classes.get(cls, (carrier, {}))
    is_dcft = any(issubclass(mixin, DCFTLayer) for mixin in mixins)
    name = f"DCFT{cls.__name__}" if is_part or is_dcft or carrier.dcft_is_always_part else None
    if is_dcft:
        bases = (Carried, *mixins)
    else:
        bases = mixins if AwaitsBuilding in mixins else (*mixins, carrier)
    made = made_class(cls, *bases, name=name, **attributes)
    # All are saved under the one name that a new process knows, and any of them can load it; of
    # several classes of one name Keras finds the last.
    is_special = cls in special_classes
    saved_as = f"DCFT{cls.__name__}" if is_special else DCFTModel.__name__
    main = made_class(cls, carrier, name=saved_as, **attributes) if is_special else DCFTModel
    for registered in (made, main):
        keras.saving.register_keras_serializable(PACKAGE, saved_as)(registered)
    return made


def adapt_when_built(model, config):
    """Adapts a model or layer from a file, or has it adapted when a call has built it."""
    layers = with_itself(model)
    if model.built and all(layers[path].built for path in config["layers"] if path in layers):
        adapt(model, config)
        carry([model])
    else:
        model._dcft_awaited = config
        model.__class__ = carrying_class(type(model), AwaitsBuilding)
    return model


def adapt(model, config: dict, initializers=AdapterSettings()):  # noqa: B008 (frozen)
    """Adapts a built model as a `dcft_config` says, in place; on failure it is as it was.

    What is touched already, such as layers that brought their adapters from a file themselves,
    stays as it is.

    Args:
        model: a built model or layer.
        config: a `dcft_config`.
        initializers: `AdapterSettings`, of which only these are taken.
    """
    layers = with_itself(model)
    _check_paths(model, config, layers)
    # Tokenizers and what else makes inputs may be those of other models too.
    of_inputs = [path for path, x in layers.items() if isinstance(x, tuple(keep_their_class))]
    untouched = {*config.get("untouched", ()), *with_sublayers(of_inputs, layers)}
    touched = {
        path: layers[path]
        for path in with_sublayers(config.get("roots", [""]), layers)
        if path not in untouched and not is_touched(layers[path])
    }
    trained = set(with_sublayers(config["trainable_layers"], layers))
    parts = config.get("parts", [""])
    active = config.get("active", shares.DEFAULT_NAME)
    awake = {id(layers[path]) for path in {*trained, *config["layers"]}}
    adapted = [path for path in config["layers"] if path in touched]
    settings = _settings(config, layers, initializers)
    try:
        for path, layer in touched.items():
            layer._dcft_before = Before(layer, path in parts, path in trained)
            layer._dcft_active = active.get(path) if isinstance(active, dict) else active
        for path, layer in touched.items():
            if path not in config["layers"]:
                _freeze_or_wake(layer, awake)
        adapters = {}
        for path in adapted:
            weight = id(weight_of(layers[path]))
            adapters[weight] = _adapt_layer(layers[path], settings[path], adapters.get(weight))
        for path, flags in config.get("flags", {}).items():
            if path in touched:
                freezing.set_flags(layers[path], flags)
        for name, of_name in config.get("stored", {}).items():
            add_adapter(layers, name, of_name, initializers)
    except BaseException:  # an interrupt from the keyboard as well
        release(touched.values())
        raise
    keras_internals.track_torch_parameters(layers.values())


def add_adapter(layers, name, config, initializers=AdapterSettings()):  # noqa: B008 (frozen)
    """Gives touched layers, which are as the base's by it, an adapter that is not active.

    Args:
        layers: dict of a model and all layers below it, by path.
        name: str, the adapter's name.
        config: its `dcft_config`.
        initializers: `AdapterSettings`, of which only these are taken.
    """
    settings = _settings(config, layers, initializers)
    trained = set(with_sublayers(config["trainable_layers"], layers))
    owners = weight_owners({path: layers[path] for path in config["layers"]})
    for path in with_sublayers(config.get("roots", [""]), layers):
        layer = layers[path]
        if is_touched(layer) and name not in shares.names_of(layer):
            shape = matrix_shape_of(layer) if owners.get(path) == path else None
            flags = config.get("flags", {}).get(path, {}).get("now")
            own = settings.get(path)
            own = own and dcft_class(type(layer)).dcft_own_settings(own)
            share = shares.fresh_share(layer, own, path in trained, flags, shape)
            shares.shares_of(layer)[name] = share


def _check_paths(model, config, layers):
    named = [*config["layers"], *config["trainable_layers"], *config.get("roots", ())]
    missing = [path for path in named if path not in layers]
    if missing:
        raise ValueError(
            "Build the model as it was when it was adapted: the DCFT configuration names layers "
            f"that it does not have: {joined(missing)}. Model '{model.name}' has {joined(layers)}."
        )
    plain = {path: layers[path] for path in config["layers"] if not is_touched(layers[path])}
    check_adaptable(plain, layers)


def _settings(config, layers, initializers) -> dict:
    """The settings of each layer by path; layers that share a weight count once in the penalty."""
    count = len(set(weight_owners({p: layers[p] for p in config["layers"]}).values())) or 1
    common = {name: config[name] for name in initializers.common()}
    common["orthogonality"] /= count
    own = config.get("adapters", {})
    return {
        path: dataclasses.replace(initializers, kernel_size=d, **{**common, **own.get(path, {})})
        for path, d in config["layers"].items()
    }


def _freeze_or_wake(layer, awake):
    if layer._dcft_before.is_trained:
        for variable in keras_internals.own_weights(layer):
            freezing.keep_base(variable)
        for variable in keras_internals.own_trainable_variables(layer):
            variable.trainable = True
    else:
        freezing.freeze_variables(layer)
    below = layer._flatten_layers()
    is_awake = any(id(part) in awake or isinstance(part, DCFTLayer) for part in below)
    keras_internals.set_trainable_flag(layer, is_awake)
    if is_awake or layer.weights or not layer.built:
        _carry(layer, *(() if is_awake else (freezing.Frozen,)))


def _carry(layer, *mixins):
    """Gives an object its made class, if it has none."""
    if isinstance(layer, (Carried, DCFTLayer, *keep_their_class)):
        return
    cls = type(layer)
    layer.__class__ = carrying_class(cls, *mixins, is_part=freezing.is_part(layer))
    if isinstance(layer, keras.Model):
        keras_internals.wrap_quantize(layer, check_quantization)
    elif cls in DCFT_CLASSES:  # which Keras quantizes, but not their subclasses
        keras_internals.wrap_quantize(layer, check_quantization, type_check=False)


def _adapt_layer(layer, settings, shared):
    cls = dcft_class(type(layer))
    is_plain = type(layer) is cls.dcft_base_class
    layer.__class__ = cls if is_plain else carrying_class(type(layer), cls)
    with keras_internals.unlocked(layer):
        layer.dcft_adapt(settings, shared)
    return layer.dcft_adapter


def config_of(model, name=None) -> dict:
    """The `dcft_config` of a model that holds adapted layers, read off from them.

    Args:
        model: the model.
        name: str, the adapter to describe. By default it is what the layers have variables for,
            and the others stand in it under `stored`.
    """
    layers = with_itself(model)
    if name is not None:
        return _config(layers, name)
    config = _config(layers)
    active = {p: shares.active_name(layer) for p, layer in layers.items() if is_touched(layer)}
    is_one = len(set(active.values())) == 1
    if set(active.values()) != {shares.DEFAULT_NAME}:
        config["active"] = next(iter(active.values())) if is_one else active
    stored = {n: None for path in active for n in shares.shares_of(layers[path])}
    if stored:
        config["stored"] = {n: _config(layers, n) for n in stored}
    return config


def _config(layers, name=None) -> dict:
    touched = {
        path: layer
        for path, layer in layers.items()
        if is_touched(layer) and (name is None or name in shares.names_of(layer))
    }
    settings = {path: shares.settings_of(layer, name) for path, layer in touched.items()}
    settings = {path: of_layer for path, of_layer in settings.items() if of_layer is not None}
    numbers = {path: of_layer.common() for path, of_layer in settings.items()}
    common = next(iter(numbers.values()), AdapterSettings().common())
    config = {
        **common,
        "layers": {path: of_layer.kernel_size for path, of_layer in settings.items()},
        "trainable_layers": [p for p, layer in touched.items() if shares.is_trained(layer, name)],
    }
    # The paper's γ is divided by the number of adapters, and does not come back to the last digit.
    count = len(set(weight_owners({path: layers[path] for path in settings}).values()))
    config["orthogonality"] = float(f"{common['orthogonality'] * count:.12g}")
    if any(of_layer != common for of_layer in numbers.values()):
        config["adapters"] = numbers
    return {**config, **_exceptions(layers, touched, name)}


def _exceptions(layers, touched, name) -> dict:
    """What of a `dcft_config` is there only where it is needed."""
    roots = []
    for path in touched:
        if not any(path.startswith(f"{root}/") or not root for root in roots):
            roots.append(path)
    below = with_sublayers(roots, layers)
    flags = {path: shares.flags_of(layer, name) for path, layer in touched.items()}
    exceptions = {
        "roots": roots if roots != [""] else None,
        "untouched": [path for path in below if path not in touched and layers[path].weights],
        "flags": {path: of_layer for path, of_layer in flags.items() if of_layer},
    }
    exceptions = {name: value for name, value in exceptions.items() if value}
    parts = [path for path, layer in layers.items() if freezing.is_part(layer)]
    return exceptions if parts == [""] else {**exceptions, "parts": parts}


def without_exceptions(config) -> dict:
    """A `dcft_config` for people, the settings alone."""
    known = (*AdapterSettings().common(), "layers", "trainable_layers", "adapters")
    return {name: config[name] for name in known if name in config}


def adapter_names(model) -> list:
    """The names of all adapters in a model, the active one's first."""
    names = {}
    for position in (0, 1):
        for layer in model._flatten_layers():
            # Of another model it may have layers without weights, such as a dropout.
            if is_touched(layer) and keras_internals.own_weights(layer):
                of_layer = [shares.active_name(layer)], shares.shares_of(layer)
                names.update(dict.fromkeys(of_layer[position]))
    return [name for name in names if name is not None]


def carry(models):
    """Gives every model that holds adapted layers, and all between, the class to carry them."""
    for model in models:
        for layer in with_itself(model).values():
            if any(isinstance(below, DCFTLayer) for below in layer._flatten_layers()):
                _carry(layer)


def release(layers, put_back=False):
    """Gives layers and models their classes, variables and flags back.

    Args:
        layers: iterable of layers, touched or not.
        put_back: bool, whether what was trained in full gets its base values.
    """
    for layer in layers:
        if put_back:
            for variable in keras_internals.own_weights(layer):
                if freezing.base_value(variable) is not None:
                    variable.assign(freezing.base_value(variable))
        if isinstance(layer, DCFTLayer):
            layer.dcft_release()
        if isinstance(layer, (Carried, DCFTLayer)):
            keras_internals.unwrap_quantize(layer)
            layer.__class__ = layer.dcft_base_class
        if is_touched(layer):
            vars(layer).pop("_dcft_before").restore(layer)
            for name in ("_dcft_active", "_dcft_shares"):
                vars(layer).pop(name, None)


def release_all(model, holders, put_back=False):
    """Releases all below a model, and what else held nothing adapted but that.

    Args:
        model: a model that holds adapted layers.
        holders: every model that holds one of them.
        put_back: bool, as for `release`.
    """
    layers = with_itself(model).values()
    release(layers, put_back)
    keras_internals.track_torch_parameters(layers)
    for holder in holders:
        if not dcft_layers(holder):
            release(with_itself(holder).values(), put_back)


def trained_in_full(model) -> list:
    """The variables below a model that are trained in full and keep the values of the base."""
    own = (v for layer in model._flatten_layers() for v in keras_internals.own_weights(layer))
    return [variable for variable in own if freezing.base_value(variable) is not None]


def the_name(model, name=None) -> str:
    """The name of one adapter of a model, of the only one if none is given.

    Raises:
        ValueError: if there is none of that name, or none is given and there are several.
    """
    names = adapter_names(model)
    if name is None and len(names) == 1:
        return names[0]
    if name is None or name not in names:
        raise ValueError(
            f"`name` must be that of one of the adapters of model '{model.name}': "
            f"{joined(map(repr, names))}. Received: name={shortened(repr(name))}"
        )
    return name
