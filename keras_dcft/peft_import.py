"""A LoRA folder of Hugging Face PEFT as an adapter: a LoRA is DCFT of kernel size 1, exactly."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import safetensors

from keras_dcft import named, selection, shares
from keras_dcft.adapter import ADAPTER_VARIABLES
from keras_dcft.files import Place, architecture_of, load_content
from keras_dcft.hub import task_backbone
from keras_dcft.models import adapter_names
from keras_dcft.paths import checked_model, joined
from keras_dcft.peft_export import CONFIG, PREFIX, WEIGHT_NAMES, WEIGHTS
from keras_dcft.planning import check_built
from keras_dcft.reclassing import matrix_shape_of, weight_of
from keras_dcft.settings import AdapterSettings, shortened
from keras_dcft.signatures import FilePath, Model
from keras_dcft.transformers_names import (
    OUTPUT_MODULE,
    family_of,
    has_tied_output,
    head_of,
    is_embedding,
    modules_of,
)

DTYPES = {"F32": "float32", "BF16": "uint16", "F16": "float16", "F64": "float64"}
BFLOAT16_STEP = 2**-8  # relative
# A `dcft_config` that adapts nothing yet.
NOTHING = {**AdapterSettings().common(), "layers": {}, "trainable_layers": []}

# What a PEFT configuration may say without the increment being another than B·A times a number.
UNDERSTOOD = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
    "use_rslora",
}
# Starts that change the base, so that the folder's LoRA belongs to another.
STARTS_WITH_ANOTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def import_from_peft(model: Model, folder: FilePath, name: str | None = None) -> Model:
    """Loads a LoRA folder of Hugging Face PEFT into a KerasHub model, as DCFT of kernel size 1.

    Exactly: what the model computes is what PEFT's would. It can be trained on, saved, merged, put
    into a bank. A classifier's head is loaded with it.

    Args:
        model: a KerasHub task or backbone of the families of `export_to_peft`, with the base
            weights that the LoRA was trained on; plain, or adapted if a new `name` is given.
        folder: str or path of a folder with `adapter_config.json` and `adapter_model.safetensors`.
        name: str, the new adapter's name, "default" if None.

    Returns:
        The model.

    Raises:
        ValueError: if the folder is damaged or incomplete, is for another architecture, or has
            anything but plain LoRA: another kind of adapter, DoRA, biases, other trained layers
            than the head. The model is unchanged then.
        OSError: if the folder cannot be read.

    Example:
        >>> import keras_hub, tempfile
        >>> folder = tempfile.mkdtemp()
        >>> backbone = keras_hub.models.BertBackbone(
        ...     vocabulary_size=9, num_layers=1, num_heads=2, hidden_dim=16, intermediate_dim=16)
        >>> export_to_peft(enable_dcft(backbone, kernel_size=4), folder)
        >>> model = import_from_peft(remove_dcft(backbone), folder)
        >>> model.dcft_config["layers"]["pooled_dense"], model.dcft_config["rank"]
        (1, 4)
    """
    folder = Path(folder)
    check_built(checked_model(model))
    if name is None:
        name = shares.DEFAULT_NAME
    if named.checked_name(name) in adapter_names(model):
        raise ValueError(
            "`name` must be a new one: model "
            f"'{model.name}' already has an adapter {name!r}. Received: name={name!r}"
        )
    part = task_backbone(model)
    family = family_of(part)
    config = _read_config(folder)
    loras, others = _read_weights(folder, config)
    with selection.calls.changing():
        place = Place(model, None, NOTHING, part)
        modules = modules_of(family.modules, place.layers)
        if not any(module.removeprefix(family.prefix) in modules for module in loras):
            older = modules_of(family.older_modules, place.layers)
            modules = older or modules
        others = _without_embeddings(folder, others, modules, place, family)
        by_path = _by_path(folder, loras, modules, place, family)
        _check_targets(folder, config, loras, modules, family)
        heads = head_of(model, family)
        head = _head_values(folder, others, heads, place)
        _check_head_is_there(folder, config, others, heads)
        adapter, metadata = _adapter_content(place, by_path, config)
        load_content(model, name, folder, {**adapter, **head}, metadata)
    return model


def _read_config(folder) -> dict:
    """PEFT's configuration; ValueError for what is no plain LoRA."""
    try:
        config = json.loads((folder / CONFIG).read_text())
        kind = config.get("peft_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{folder / CONFIG}: damaged, it must be a JSON object.") from error
    if kind != "LORA":
        raise ValueError(
            f"{folder}: load a LoRA, or convert this to one with PEFT. The folder has "
            f"peft_type={kind!r}."
        )
    if config.get("bias", "none") != "none":
        raise ValueError(
            f"{folder}: load a LoRA without trained biases, or merge it with PEFT. The folder has "
            f"bias={config['bias']!r}."
        )
    for key, value in config.items():
        if value and key not in UNDERSTOOD and key != "bias":
            raise ValueError(
                f"{folder}: load a plain LoRA, or merge this with PEFT. The folder has "
                f"{key}={shortened(repr(value))}."
            )
    for key in ("r", "lora_alpha"):
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ValueError(
                f"{folder / CONFIG}: damaged, `{key}` must be a number above 0. The file has "
                f"{key}={shortened(repr(value))}."
            )
    modules = (config.get("target_modules"), config.get("exclude_modules"))
    patterns = [*(config.get("rank_pattern") or ()), *(config.get("alpha_pattern") or ())]
    for pattern in [*patterns, *(names for names in modules if isinstance(names, str))]:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"{folder / CONFIG}: damaged, {pattern!r} is no regular expression ({error})."
            ) from error
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(STARTS_WITH_ANOTHER_BASE):
        raise ValueError(
            f"{folder}: have PEFT convert it to a LoRA of the original base "
            "(`path_initial_model_for_weight_conversion`). The folder has "
            f"init_lora_weights={config['init_lora_weights']!r}, which changes the base."
        )
    return config


@dataclasses.dataclass
class _Lora:
    """What a folder has for one module: `scale * up @ down`, (out, rank) and (rank, in)."""

    down: np.ndarray | None = None
    up: np.ndarray | None = None
    scale: float = 1.0


def _read_weights(folder, config) -> tuple[dict, dict]:
    """The LoRAs by module, and all other tensors by name, both without PEFT's prefix."""
    loras, others = {}, {}
    for key, tensor in _read_tensors(folder).items():
        if not np.isfinite(tensor).all():
            raise ValueError(
                f"{folder}: load an adapter that did not diverge. The folder has NaN or infinity "
                f"in '{key}'."
            )
        found = re.fullmatch(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?", key)
        if found is None:
            others[key.removeprefix(PREFIX)] = tensor
            continue
        if tensor.ndim != 2:
            raise ValueError(
                f"{folder}: load a LoRA of dense layers and embeddings, or merge it with PEFT. The "
                f"folder has '{key}' of shape {tensor.shape}, as of a convolution."
            )
        lora = loras.setdefault(found[1].removeprefix(PREFIX), _Lora())
        setattr(lora, {"A": "down", "B": "up"}[found[2]], tensor.astype("float32"))
    for module, lora in loras.items():
        if lora.down is None or lora.up is None:
            raise ValueError(
                f"{folder}: incomplete. The folder has "
                f"{'B' if lora.down is None else 'A'} alone of the LoRA of '{module}'."
            )
        rank = _by_pattern(config.get("rank_pattern"), module, config["r"])
        ranks = lora.down.shape[0], lora.up.shape[-1]
        if ranks != (rank, rank):
            raise ValueError(
                f"{folder}: damaged. The configuration has rank {rank} for '{module}'; the "
                f"weights have {ranks[0]} and {ranks[1]}."
            )
        alpha = _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
        lora.scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return loras, others


def _read_tensors(folder) -> dict:
    """A folder's tensors by name; those in bfloat16, which NumPy has not, in float32."""
    path = folder / WEIGHTS
    if not path.exists() and path.with_suffix(".bin").exists():
        raise ValueError(
            f"{folder}: load it with PEFT and save it anew, which writes safetensors. The folder "
            f"has weights in {path.with_suffix('.bin').name} alone."
        )
    try:
        found = safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: damaged ({error}).") from error
    tensors = {}
    for key, tensor in found:
        if tensor["dtype"] not in DTYPES:
            raise ValueError(
                f"{path}: convert it to one of {', '.join(DTYPES)}. The file has '{key}' in "
                f"{tensor['dtype']}."
            )
        value = np.frombuffer(tensor["data"], DTYPES[tensor["dtype"]])
        if tensor["dtype"] == "BF16":
            value = (value.astype("uint32") << 16).view("float32")
        tensors[key] = value.reshape(tensor["shape"])
    return tensors


def _by_pattern(pattern, module, default):
    """What PEFT takes for a module: the value of the first pattern that its name ends with."""
    found = (key for key in pattern or {} if re.match(rf"(.*\.)?({key})$", module))
    key = next(found, None)
    return default if key is None else pattern[key]


def _check_targets(folder, config, loras, modules, family):
    """Raises ValueError if a module that the configuration names has no weights."""
    targets = config.get("target_modules")
    named_there = {module.removeprefix(family.prefix) for module in loras}
    for module in modules:
        if module in named_there or not _is_meant(targets, family.prefix + module):
            continue
        if _is_meant(config.get("exclude_modules") or [], family.prefix + module):
            continue
        number = re.search(r"\.(\d+)\.", module)
        wanted = config.get("layers_to_transform")
        wanted = [wanted] if isinstance(wanted, int) else wanted
        if wanted is not None and number and int(number[1]) not in wanted:
            continue
        raise ValueError(
            f"{folder}: incomplete, or for another base. The configuration has '{module}' among "
            "its target modules; the weights have nothing of it."
        )


def _is_meant(targets, module) -> bool:
    if isinstance(targets, str):
        # "all-linear" is PEFT's word for what it finds in the model.
        return targets != "all-linear" and bool(re.fullmatch(targets, module))
    return any(module == name or module.endswith(f".{name}") for name in targets or ())


def _by_path(folder, loras, modules, place, family) -> dict:
    """The factors (in, rank) and (rank, out) and the scale of each layer, by path."""
    loras = {module.removeprefix(family.prefix): lora for module, lora in loras.items()}
    if has_tied_output(place.model, family):
        _take_tied_output(folder, loras, modules, place)
    strange = [module for module in loras if module not in modules]
    if strange or not loras:
        raise ValueError(
            f"{folder}: load it into a model of the architecture that it was made for. The folder "
            f"has LoRA for {joined(map(repr, strange)) or 'no module'}; the model has no such "
            "layer."
        )
    by_path = {}
    for module, lora in loras.items():
        paths = modules[module]
        shapes = [matrix_shape_of(place.layers[path]) for path in paths]
        expected = shapes[0][0], sum(columns for _, columns in shapes)
        found = lora.down.shape[1], lora.up.shape[0]
        if found != expected:
            raise ValueError(
                f"{folder}: load it into a model of the size that it was made for. The folder has "
                f"'{module}' with {found[0]} inputs and {found[1]} outputs; the model has "
                f"{expected[0]} and {expected[1]}."
            )
        row = 0
        for path, (_, columns) in zip(paths, shapes):
            up = lora.up[row : row + columns]
            row += columns
            # Zeros are the place of another layer's factors, unless all has yet to be trained.
            used = up.any(axis=0) if len(paths) > 1 and lora.up.any() else slice(None)
            if up[:, used].size:
                by_path[path] = lora.down[used].T, up[:, used].T, lora.scale
    return by_path


def _take_tied_output(folder, loras, modules, place):
    """Drops an output's LoRA that is the input embeddings'; ValueError if it is another."""
    output = loras.pop(OUTPUT_MODULE, None)
    embeddings = [m for m, paths in modules.items() if is_embedding(place.layers[paths[0]])]
    lora = next((loras[module] for module in embeddings if module in loras), None)
    if output is None and lora is None:
        return
    is_same = (
        output is not None
        and lora is not None
        and np.array_equal(output.up, lora.down.T)
        and np.array_equal(output.down, lora.up.T)
        and output.scale == lora.scale
    )
    if not is_same:
        raise ValueError(
            f"{folder}: load a LoRA that leaves the embeddings alone, or has the same for "
            f"'{OUTPUT_MODULE}': model '{place.model.name}' has one weight for its input and its "
            f"output. The folder has {'LoRA' if lora else 'none'} for the input embeddings and "
            f"{'another' if output else 'none'} for '{OUTPUT_MODULE}'."
        )


def _without_embeddings(folder, others, modules, place, family) -> dict:
    """Drops what PEFT writes of the base beside adapted embeddings, if it is this model's base."""
    kept = {}
    for name, tensor in others.items():
        module = name.removesuffix(".weight").removesuffix(".base_layer")
        weight = _table(module.removeprefix(family.prefix), modules, place, family)
        if weight is None:
            kept[name] = tensor
        elif tensor.shape != weight.shape or not np.allclose(
            tensor, weight, rtol=2 * BFLOAT16_STEP, atol=1e-6
        ):
            raise ValueError(
                f"{folder}: load it into the base that it was trained on, with the same "
                f"vocabulary. The folder has '{name}' of shape {tensor.shape}; the model has other "
                f"values, of shape {weight.shape}."
            )
    return kept


def _table(module, modules, place, family):
    """An embedding's or a language model's output's table as Transformers has it, or None."""
    if module in modules:
        layer = place.layers[modules[module][0]]
        if not is_embedding(layer):
            return None
        is_output = False
    elif module == OUTPUT_MODULE and family.task_type == "CAUSAL_LM":
        layer = place.part.token_embedding
        is_output = not has_tied_output(place.model, family)
    else:
        return None
    if layer.quantization_mode is not None:
        raise ValueError(
            "Load the folder before the model is quantized: it has embeddings to compare. "
            f"Received: '{layer.name}' with quantization_mode={layer.quantization_mode!r}"
        )
    variable = layer.reverse_embeddings if is_output else weight_of(layer)
    values = selection.as_array(variable).astype("float32")
    return values.T if is_output else values


def _check_head_is_there(folder, config, others, heads):
    """Raises ValueError if a folder says that it has a head of which it has nothing."""
    there = {name.rpartition(".")[0] for name in others}
    for module in heads:
        meant = [module, module.partition(".")[0]]
        named_there = config.get("modules_to_save") or []
        if module not in there and any(name in named_there for name in meant):
            raise ValueError(
                f"{folder}: incomplete. The configuration has '{module}' among `modules_to_save`; "
                "the weights have nothing of it."
            )


def _head_values(folder, others, heads, place) -> dict:
    """The head's values by their names in an adapter file; the model's own if it brings none."""
    values = {}
    for name, tensor in others.items():
        module, _, weight = name.rpartition(".")
        if module not in heads or weight not in WEIGHT_NAMES:
            raise ValueError(
                f"{folder}: load it into a task with such a head, or merge it with PEFT. The "
                f"folder has '{name}' trained in full, for which model '{place.model.name}' of "
                f"type {type(place.model).__name__} has no place."
            )
        values[f"trained/{heads[module]}/{WEIGHT_NAMES[weight]}"] = np.ascontiguousarray(tensor.T)
    own = {
        f"trained/{path}/{number}.{variable.name}": variable
        for path in heads.values()
        for number, variable in enumerate(place.outer[path].weights)
    }
    if not values:
        return {key: shares.base_copy(variable) for key, variable in own.items()}
    if set(values) != set(own):
        raise ValueError(
            f"{folder}: incomplete. Of the head the folder has only {joined(map(repr, others))}."
        )
    return values


def _adapter_content(place, by_path, config) -> tuple[dict, dict]:
    """The adapter as the content of an adapter file."""
    numbers = {
        path: {
            "rank": left.shape[1],
            "alpha": float(scale * left.shape[1]),
            "dropout": float(config.get("lora_dropout") or 0.0),
            "orthogonality": 0.0,
        }
        for path, (left, _, scale) in by_path.items()
    }
    common = next(iter(numbers.values()))
    dcft_config = {**common, "layers": dict.fromkeys(by_path, 1), "trainable_layers": []}
    if any(of_layer != common for of_layer in numbers.values()):
        dcft_config["adapters"] = numbers
    tensors = {}
    for path, (left, right, _) in by_path.items():
        values = left, right, np.ones((1, 1), "float32")
        for key, value in zip(ADAPTER_VARIABLES, values):
            tensors[f"adapter/{path}/{key}"] = np.ascontiguousarray(value)
    part = next(path for path, layer in place.outer.items() if layer is place.part)
    metadata = {
        "dcft_config": json.dumps(dcft_config),
        "part": part,
        "architecture": json.dumps(architecture_of(place.layers)),
    }
    return tensors, metadata
