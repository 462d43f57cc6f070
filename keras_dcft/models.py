"""Adapted models: their classes, what they say of themselves when saved, how they come back.

A model is adapted in place and given a made class, `DCFTBertBackbone(BertBackbone)`, whose config
carries the `dcft_config`. Keras must know such a class before a file or preset is loaded: for
KerasHub's backbones and tasks they are all made when this module is imported. Any other model,
whose class may not even be importable yet then, is saved as a `DCFTModel` that wraps the original's
own serialisation.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import warnings
import weakref

import keras

from keras_dcft import keras_internals
from keras_dcft.conversion import adapt_layer, release_layer, weight_of
from keras_dcft.layers import DCFTLayer, check_quantization, holds_integers
from keras_dcft.paths import walk, with_sublayers
from keras_dcft.planning import check_adaptable

PACKAGE = "keras_dcft"


class FrozenState:
    """Mixin of a frozen layer with state of its own, such as BatchNormalization's statistics.

    Its variables are out of reach of `trainable = True`, but the flag alone would let it update
    them; so here the flag stays False. So it does in a layer that is not built yet: Keras makes the
    variables by the flag. The class keeps its name, by which Keras saves its weights.
    """

    base_class: type

    @property
    def trainable(self):
        return self._trainable

    @trainable.setter
    def trainable(self, value):
        pass


@functools.cache
def frozen_class(cls):
    """The class of a frozen layer of this class that has state of its own."""
    return type(cls.__name__, (FrozenState, cls), {"base_class": cls, "__module__": cls.__module__})


@dataclasses.dataclass
class Trainability:
    """What could be trained in one layer before the model was adapted."""

    layer: keras.layers.Layer
    flag: bool
    # Pairs of a weak reference to a variable and its flag: a kernel that is quantized later is not
    # to stay in memory in floating point as well.
    variable_flags: list

    @classmethod
    def of(cls, layer):
        variables = keras_internals.own_trainable_variables(layer)
        return cls(layer, layer.trainable, [(weakref.ref(v), v.trainable) for v in variables])

    @property
    def variables(self) -> list:
        return [variable() for variable, _ in self.variable_flags if variable() is not None]

    def wake(self):
        """Makes the layer's own variables trainable."""
        for variable in self.variables:
            variable.trainable = True
        keras_internals.set_trainable_flag(self.layer, True)

    def freeze(self):
        """Freezes the layer for good, also the state that it updates by itself in training."""
        keras_internals.freeze_variables(self.layer)
        keras_internals.set_trainable_flag(self.layer, False)
        has_state = len(keras_internals.own_weights(self.layer)) > len(self.variables)
        if has_state or not self.layer.built:
            self.layer.__class__ = frozen_class(type(self.layer))

    def restore(self):
        if isinstance(self.layer, FrozenState):
            self.layer.__class__ = self.layer.base_class
            for built_later in keras_internals.own_trainable_variables(self.layer):
                built_later.trainable = self.flag
        flags = [flag for variable, flag in self.variable_flags if variable() is not None]
        keras_internals.thaw_variables(self.layer, self.variables, flags)
        keras_internals.set_trainable_flag(self.layer, self.flag)


@dataclasses.dataclass
class Adaptation:
    """What adapting did to a model, enough to undo it."""

    config: dict
    layers: dict
    trainability: list


class AdaptedModel:
    """Mixin of every adapted model but tasks: what its config says of the adapter."""

    base_class: type

    @property
    def dcft_config(self) -> dict:
        """The adapter's settings: rank, alpha, ..., the kernel size of each layer by path."""
        config = self._dcft_adaptation.config
        return {
            **config,
            "layers": dict(config["layers"]),
            "trainable_layers": list(config["trainable_layers"]),
        }

    def __repr__(self):
        return described(self)


class AdaptedBackbone(AdaptedModel):
    """Mixin of adapted KerasHub backbones: the constructor's arguments stay at the top.

    `from_preset` puts arguments such as `dtype` into a backbone's config, so it has to stay flat.
    """

    def get_config(self):
        with base_configuration(self):
            config = self.get_config()
        return {**config, "dcft": self.dcft_config}

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        dcft_config = config.pop("dcft")
        return adapt(cls.base_class.from_config(config), dcft_config)


class AdaptedTask:
    """Mixin of adapted KerasHub tasks, whose config holds that of their adapted backbone."""

    base_class: type

    @property
    def dcft_config(self) -> dict:
        """The backbone's `dcft_config`."""
        return self.backbone.dcft_config

    def __repr__(self):
        return described(self)


def described(model) -> str:
    """`repr` of an adapted model."""
    config = model.dcft_config
    sizes = ", ".join(map(str, sorted(set(config["layers"].values()))))
    return (
        f"<{type(model).__name__} name={model.name}, built={model.built}, "
        f"{len(config['layers'])} DCFT layers of rank {config['rank']}, kernel size {sizes}>"
    )


class WrappedModel(AdaptedModel):
    """Mixin of all other adapted models: the original's serialisation inside one of our own."""

    def __init__(self, model=None, dcft=None, **kwargs):
        # Only for its signature, the config's, by which `clone_model` sees that an adapted
        # functional model cannot be made from inputs and outputs; the clone is then a plain one
        # with DCFT layers. (Keras 3.13 would see that in no signature of keywords alone.)
        super().__init__(**kwargs)

    def get_config(self):
        with base_configuration(self):
            model = keras.saving.serialize_keras_object(self)
        model.pop("compile_config", None)
        return {"model": model, "dcft": self.dcft_config}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        model = keras.saving.deserialize_keras_object(
            config["model"], custom_objects=custom_objects
        )
        return adapt(model, config["dcft"])

    def get_build_config(self):
        # The wrapped serialisation has it, and is built by the time that it is adapted.
        return None


@keras.saving.register_keras_serializable(PACKAGE)
class DCFTModel(WrappedModel, keras.Model):
    """What an adapted model that is not KerasHub's is saved as; loading gives a made class."""


_made_classes = {}


def adapted_class(cls):
    """The class that an adapted model of this class gets, made on first use.

    A task of a user's own class keeps it: its config holds the adapted backbone in any case.
    """
    if cls not in _made_classes and keras_hub and issubclass(cls, keras_hub.models.Task):
        return cls
    if cls not in _made_classes:
        made = _make_class(cls, WrappedModel)
        # All are saved under the one name that a new process knows, and any of them can load it.
        keras.saving.register_keras_serializable(PACKAGE, DCFTModel.__name__)(made)
        _made_classes[cls] = made
    return _made_classes[cls]


def _make_class(cls, mixin, **attributes):
    attributes = {"base_class": cls, "__module__": __name__, "__doc__": cls.__doc__, **attributes}
    return type(f"DCFT{cls.__name__}", (mixin, cls), attributes)


def _make_keras_hub_classes():
    for cls in _subclasses(keras_hub.models.Backbone):
        _made_classes[cls] = _make_class(cls, AdaptedBackbone)
    for cls in _subclasses(keras_hub.models.Task):
        backbone_class = _made_classes.get(cls.backbone_cls)
        if backbone_class is not None:
            _made_classes[cls] = _make_class(cls, AdaptedTask, backbone_cls=backbone_class)
    for made in _made_classes.values():
        keras.saving.register_keras_serializable(PACKAGE)(made)


def _subclasses(cls):
    found = {}
    for subclass in cls.__subclasses__():
        if subclass.__module__.split(".")[0] == "keras_hub":
            found[subclass] = None
            found.update(_subclasses(subclass))
    return found


# Imported here although nothing needs it yet: its classes must be known when a file is loaded.
keras_hub = None
if importlib.util.find_spec("keras_hub"):
    import keras_hub

    _make_keras_hub_classes()


def is_task(model) -> bool:
    """Whether a model is a KerasHub task with a backbone of its own."""
    return (
        keras_hub is not None
        and isinstance(model, keras_hub.models.Task)
        and model.backbone is not None
    )


def task_backbone(model):
    """What of a model is adapted: a task's backbone, of any other model all of it."""
    return model.backbone if is_task(model) else model


def adapt(model, config: dict, part=None, factor_initializer=None, filter_initializer=None):
    """Adapts a built model as a `dcft_config` says, in place; on failure it is as it was.

    Args:
        model: a built model.
        config: a `dcft_config`.
        part: the model below `model`, or itself, that the configuration is about; if None, a
            task's backbone or any other model itself.
        factor_initializer, filter_initializer: as for `enable_dcft`.

    Returns:
        The model.
    """
    part = task_backbone(model) if part is None else part
    _check_paths(part, config)
    try:
        _adapt_part(part, config, factor_initializer, filter_initializer)
        holders = keras_internals.models_holding(list(part._dcft_adaptation.layers.values()))
        for holder in holders:
            if is_task(holder) and holder.backbone is part:
                holder.__class__ = adapted_class(type(holder))
                keras_internals.wrap_quantize(holder, check_quantization)
        if is_task(model) and part is model.backbone:
            _train_head(model)
    except BaseException:  # an interrupt from the keyboard as well
        release(part)
        raise
    return model


def _check_paths(model, config):
    layers = walk(model)
    missing = [
        path for path in [*config["layers"], *config["trainable_layers"]] if path not in layers
    ]
    if missing:
        raise ValueError(
            f"The DCFT configuration names layers that model '{model.name}' does not have: "
            f"{missing}. It has {list(layers)}."
        )
    check_adaptable({path: layers[path] for path in config["layers"]}, layers)


def _adapt_part(model, config, factor_initializer, filter_initializer):
    layers = walk(model)
    adapted = {path: layers[path] for path in config["layers"]}
    trained = [layers[p] for p in with_sublayers(config["trainable_layers"], layers)]
    everything = [model, *layers.values()]
    trained_ids = {id(layer) for layer in trained}
    awake = {id(layer) for layer in adapted.values()} | trained_ids
    adaptation = Adaptation(config, {}, [Trainability.of(layer) for layer in everything])
    model._dcft_adaptation = adaptation
    model.__class__ = adapted_class(type(model))
    keras_internals.wrap_quantize(model, check_quantization)
    for trainability in adaptation.trainability:
        layer = trainability.layer
        if id(layer) in trained_ids:
            trainability.wake()
        elif any(id(part) in awake for part in layer._flatten_layers()):
            keras_internals.freeze_variables(layer)
            keras_internals.set_trainable_flag(layer, True)
        else:
            trainability.freeze()
    owners = {}
    weights = {id(weight_of(layer)) for layer in adapted.values()}
    for path, layer in adapted.items():
        owner = owners.setdefault(id(weight_of(layer)), layer)
        adaptation.layers[path] = layer
        adapt_layer(
            layer,
            owner=None if owner is layer else owner,
            kernel_size=config["layers"][path],
            rank=config["rank"],
            alpha=config["alpha"],
            dropout=config["dropout"],
            orthogonality=config["orthogonality"] / len(weights),
            factor_initializer=factor_initializer,
            filter_initializer=filter_initializer,
        )


def _train_head(task):
    """Makes a task whose backbone is adapted train all that lies outside of the backbone."""
    inside = {id(layer) for layer in task.backbone._flatten_layers()}
    head = [layer for layer in task._flatten_layers() if id(layer) not in inside]
    for trainability in map(Trainability.of, head):
        task.backbone._dcft_adaptation.trainability.append(trainability)
        trainability.wake()
    integers = [layer.name for layer in head if holds_integers(layer)]
    if integers:
        warnings.warn(
            f"The quantized weights of {integers}, outside of the backbone, cannot be trained. "
            "Quantize `task.backbone` instead of the task to have its head trained in full.",
            stacklevel=4,
        )


def reset_compiled_models(layers):
    """Makes every live model that holds one of these layers forget what it compiled."""
    for holder in keras_internals.models_holding(layers):
        keras_internals.reset_compiled_state(holder)


def adapted_part(model):
    """The one adapted model at or below a model, a task's backbone for example.

    Raises:
        ValueError: if there is none, or more than one.
    """
    parts = [part for part in model._flatten_layers() if isinstance(part, AdaptedModel)]
    if len(parts) != 1:
        raise ValueError(
            "`model` must be adapted with `enable_dcft`, or hold one model that is. Received: "
            f"model '{model.name}' of type {type(model).__name__} with {len(parts)} adapted models."
        )
    return parts[0]


def release(model):
    """Undoes `adapt` for every adapted model at or below a model; weights stay as they are.

    Returns:
        The layers that were adapted.
    """
    released = []
    for part in model._flatten_layers():
        if isinstance(part, AdaptedModel):
            adaptation = part._dcft_adaptation
            released += adaptation.layers.values()
            undo(adaptation)
            del part._dcft_adaptation
            part.__class__ = part.base_class
            keras_internals.unwrap_quantize(part)
    for holder in keras_internals.models_holding(released):
        if isinstance(holder, AdaptedTask):
            holder.__class__ = holder.base_class
        keras_internals.unwrap_quantize(holder)
    return released


def undo(adaptation: Adaptation):
    """Gives every layer back its class, its variables and its trainability."""
    for layer in adaptation.layers.values():
        release_layer(layer)
    for trainability in adaptation.trainability:
        trainability.restore()


@contextlib.contextmanager
def base_configuration(model):
    """Inside it the model and its layers have the classes and flags of before adapting.

    For reading the configuration that the model had then; weights stay as they are.
    """
    adaptation = model._dcft_adaptation
    changed = [model, *(t.layer for t in adaptation.trainability)]
    made = (DCFTLayer, FrozenState, AdaptedModel)
    classes = [(instance, type(instance)) for instance in changed if isinstance(instance, made)]
    flags = [(t.layer, t.layer.trainable) for t in adaptation.trainability]
    for instance, cls in classes:
        instance.__class__ = cls.base_class
    for trainability in adaptation.trainability:
        keras_internals.set_trainable_flag(trainability.layer, trainability.flag)
    try:
        yield
    finally:
        for instance, cls in classes:
            instance.__class__ = cls
        for layer, flag in flags:
            keras_internals.set_trainable_flag(layer, flag)
