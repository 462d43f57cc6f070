"""What KerasHub's backbones and tasks do when they are adapted, and how they are written.

Keras must know a class before a file or preset is loaded, and it may be KerasHub or this package
that is imported first; so the made classes of all of KerasHub's are made when this is imported.
"""

import importlib.util
from pathlib import Path

import keras

from keras_dcft import freezing, keras_internals, rates, selection
from keras_dcft.adapter import made_beforehand
from keras_dcft.cards import preset_card
from keras_dcft.models import (
    AdaptedModel,
    adapt,
    adapter_names,
    carry,
    carrying_class,
    config_of,
    keep_their_class,
    special_classes,
)
from keras_dcft.paths import dcft_layers, joined, walk
from keras_dcft.settings import AdapterSettings

CODE_FOR_A_PRESET = """\
import keras_dcft  # which knows the classes of the preset
import keras_hub

model = keras_hub.models.{cls}.from_preset("{folder}")"""

keras_hub = importlib.import_module("keras_hub") if importlib.util.find_spec("keras_hub") else None


class AdaptedBackbone(AdaptedModel):
    """Mixin of adapted backbones: the constructor's arguments stay at the top of the config.

    `from_preset` puts arguments such as `dtype` there.
    """

    def get_config(self):
        # By the class of the backbone in a preset KerasHub finds the made class of the task, and
        # reads the task's own file only if it is of that: also of a task that is there only since
        # the backbone was adapted.
        carry(model for model in keras_internals.models_holding([self]) if is_task(model))
        plain = self.dcft_base_class.get_config(freezing.plain_view(self))
        return {**plain, "dcft": config_of(self)}

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        dcft_config = config.pop("dcft", None)
        model = cls.dcft_base_class.from_config(config)
        if dcft_config is not None:
            adapt(model, dcft_config)
        carry([model])
        return model

    def get_build_config(self):
        return self.dcft_base_class.get_build_config(self)

    def save_to_preset(self, preset_dir, *args, base=None, metrics=None, data=None, **kwargs):
        """As KerasHub's, and a model card with what `write_model_card` takes as well."""
        known = (cls for cls in type(self).__mro__ if _is_public(cls))
        code = CODE_FOR_A_PRESET.format(
            cls=next(known).__name__, folder=Path(preset_dir).resolve().name
        )
        with preset_card(self, preset_dir, code, base=base, metrics=metrics, data=data):
            super().save_to_preset(preset_dir, *args, **kwargs)

    def export_to_transformers(self, path):
        """Refused: Transformers has plain weights, or a LoRA folder beside them."""
        names = joined(map(repr, adapter_names(self)))
        raise ValueError(
            "Call `merge_dcft(model)` first, or `export_to_peft(model, folder)` for the adapter "
            f"alone. Received: model '{self.name}' with adapters {names}."
        )


class AdaptedTask(AdaptedBackbone):
    """Mixin of adapted tasks, whose config holds that of their adapted backbone."""

    dcft_is_always_part = True

    @property
    def dcft_config(self) -> dict:
        """The backbone's `dcft_config`."""
        return self.backbone.dcft_config

    @property
    def dcft_adapters(self) -> dict:
        """The backbone's `dcft_adapters`."""
        return self.backbone.dcft_adapters

    @classmethod
    def from_config(cls, config):
        task = super().from_config(config)
        rates.choose(task)
        return task

    def compile(self, optimizer="auto", *args, **kwargs):
        super().compile(optimizer, *args, **kwargs)
        if isinstance(optimizer, str) and optimizer == "auto":
            rates.choose(self)


class AdaptedGenerator(AdaptedTask):
    """Mixin of adapted tasks that generate; others have no `generate` to be asked for."""

    def generate(self, *args, **kwargs):
        with selection.calls.running():
            return super().generate(*args, **kwargs)

    def generate_step(self, *args, **kwargs):
        # Compilers leave most of what makes the factors in the loop over tokens. On PyTorch
        # fused.py keeps them.
        is_kept = keras.config.backend() == "torch"
        with made_beforehand([] if is_kept else dcft_layers(self).values()):
            return super().generate_step(*args, **kwargs)


def _is_public(cls) -> bool:
    return getattr(keras_hub.models, cls.__name__, None) is cls


def is_task(model) -> bool:
    """Whether a model is a KerasHub task with a backbone of its own."""
    is_one = keras_hub is not None and isinstance(model, keras_hub.models.Task)
    return is_one and model.backbone is not None


def task_backbone(model):
    """What of a model is adapted: a task's backbone, of any other model all of it."""
    return model.backbone if is_task(model) else model


def head_config(task) -> dict:
    """The `dcft_config` by which what lies outside of a task's adapted backbone is trained."""
    inside = {id(layer) for layer in task.backbone._flatten_layers()}
    outside = [p for p, layer in walk(task).items() if layer.weights and id(layer) not in inside]
    return {**AdapterSettings().common(), "layers": {}, "trainable_layers": outside}


def _subclasses(cls):
    found = {}
    for subclass in cls.__subclasses__():
        if subclass.__module__.split(".")[0] == "keras_hub":
            found[subclass] = None
            found.update(_subclasses(subclass))
    return found


def _make_classes():
    backbones = _subclasses(keras_hub.models.Backbone)
    special_classes.update({cls: (AdaptedBackbone, {}) for cls in backbones})
    for cls in backbones:
        carrying_class(cls, is_part=True)
    for cls in _subclasses(keras_hub.models.Task):
        if cls.backbone_cls in backbones:
            made = carrying_class(cls.backbone_cls, is_part=True)
            mixin = AdaptedGenerator if hasattr(cls, "generate") else AdaptedTask
            special_classes[cls] = (mixin, {"backbone_cls": made})
            carrying_class(cls, is_part=True)
    keep_their_class.extend(keras_hub.models.Preprocessor.__bases__)


if keras_hub:
    _make_classes()
