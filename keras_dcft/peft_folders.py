"""Folders of Hugging Face PEFT's LoRA: an adapter for stacks that know no DCFT, and back.

DCFT of rank r and kernel size d is a LoRA of rank r·d, and a LoRA is DCFT of kernel size 1: both
ways nothing is approximated. (See `docs/serving.md` for what loads such a folder.)
"""

import dataclasses
import json
import math
import re
import warnings
from pathlib import Path

import keras
import numpy as np
import safetensors
import safetensors.numpy

from keras_dcft import named, selection, shares
from keras_dcft.adapter import ADAPTER_VARIABLES
from keras_dcft.files import Place, architecture_of, load_content, write_atomically
from keras_dcft.hub import is_task, task_backbone
from keras_dcft.lora import lora_factors
from keras_dcft.models import adapter_names, the_name
from keras_dcft.paths import checked_model, joined, required_dcft_layers
from keras_dcft.planning import check_built
from keras_dcft.reclassing import matrix_shape_of
from keras_dcft.settings import AdapterSettings, shortened
from keras_dcft.transformers_names import (
    OUTPUT_MODULE,
    family_of,
    has_tied_output,
    head_of,
    is_embedding,
    modules_of,
)

CONFIG, WEIGHTS, HEAD = "adapter_config.json", "adapter_model.safetensors", "head.safetensors"
PREFIX = "base_model.model."  # of all names in PEFT's files
VLLM_RANK = 16

# PEFT's parts of a layer, and how adapter files call them.
WEIGHT_NAMES = {"weight": "0.kernel", "bias": "1.bias"}
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


def export_to_peft(
    model: keras.Model, folder, name: str | None = None, *, head=None, base: str | None = None
):
    """Writes an adapter as a LoRA folder of Hugging Face PEFT, for the model in Transformers.

    A LoRA of rank `rank * kernel_size` per layer, exactly the same increment, with a scaling of 1.
    Where Transformers has several layers in one module (GPT-2's and Phi-3's attention, Phi-3's
    gated layer) their factors stand in blocks, and the ranks add up.

    A classifier's head goes into the folder as PEFT's `modules_to_save`. Language models have no
    head of their own.

    Args:
        model: an adapted KerasHub task or backbone: BERT, RoBERTa, DistilBERT, DeBERTaV3, ALBERT,
            ViT, GPT-2, Llama, Mistral, Qwen 2, 2.5 and 3, Gemma 1 to 3 (text) or Phi-3.
        folder: str or path; made if it is not there, its folder must be.
        name: str, the adapter to write, active or not, where the model has several.
        head: "separate" to write the head to `head.safetensors` beside it instead, under its names
            in Transformers: vLLM refuses adapters with full weights.

    Raises:
        ValueError: if the model is not adapted, has several adapters and none of this name, is of
            another family, or if something is trained that has no place in a LoRA folder. Nothing
            is written then.
        OSError: if the folder cannot be written.

    Example:
        >>> import keras_hub, tempfile
        >>> backbone = keras_hub.models.BertBackbone(
        ...     vocabulary_size=9, num_layers=1, num_heads=2, hidden_dim=16, intermediate_dim=16)
        >>> folder = tempfile.mkdtemp()
        >>> export_to_peft(enable_dcft(backbone, kernel_size=4), folder)
        >>> sorted(path.name for path in Path(folder).iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    if head not in (None, "separate"):
        raise ValueError(f'`head` must be None or "separate". Received: head={head!r}')
    folder = Path(folder)
    if not folder.parent.is_dir():
        raise FileNotFoundError(f"Make the parent folder first. Received: folder={str(folder)!r}")
    required_dcft_layers(model)
    with selection.calls.changing(also_inside=True):
        name = the_name(model, name)
        named.check_finite(model, [name])
        place = Place(model, name)
        if task_backbone(model) is not place.part:
            raise ValueError(
                "`model` must be a KerasHub task or backbone that was adapted as a whole; pass the "
                f"backbone of one around it. Received: model '{model.name}' of type "
                f"{type(model).__name__}"
            )
        family = family_of(place.part)
        modules = modules_of(place.part, family, place.layers)
        heads = head_of(model, family)
        trained = _head_tensors(place, heads)
        tensors = _lora_tensors(place, family, modules)
    known = [_prefix(model, family) + module for module in modules] + [*heads]
    config = _config(place, family, tensors, [*known, OUTPUT_MODULE], heads, head)
    config["base_model_name_or_path"] = base
    files = {WEIGHTS: {PREFIX + key: tensor for key, tensor in tensors.items()}}
    if trained and head == "separate":
        files[HEAD] = trained
    else:
        files[WEIGHTS] |= {PREFIX + key: tensor for key, tensor in trained.items()}
    contents = {
        file: safetensors.numpy.save(of_file, {"format": "pt"}) for file, of_file in files.items()
    }
    contents[CONFIG] = json.dumps(config, indent=2).encode()
    folder.mkdir(exist_ok=True)
    for file, content in contents.items():
        write_atomically(folder / file, content)
    if HEAD not in contents:  # an earlier export's
        (folder / HEAD).unlink(missing_ok=True)
    _warn_of_ranks(config)


def _prefix(model, family):
    return family.prefix if is_task(model) else ""


def _head_tensors(place, heads) -> dict:
    """What is trained in full, by its names in Transformers; ValueError for what has none there."""
    of_path = {path: module for module, path in heads.items()}
    tensors, homeless = {}, []
    for key, variable in place.variables().items():
        kind, _, rest = key.partition("/")
        path, _, variable_name = rest.rpartition("/")
        if kind == "adapter":
            continue
        if path not in of_path or variable_name not in WEIGHT_NAMES.values():
            homeless.append(rest)
            continue
        weight = next(peft for peft, ours in WEIGHT_NAMES.items() if ours == variable_name)
        value = selection.as_array(variable).astype("float32")
        tensors[f"{of_path[path]}.{weight}"] = np.ascontiguousarray(value.T)
    if homeless:
        raise ValueError(
            "A LoRA folder has no place for what is trained in full beside the adapters and a "
            "classifier's head: call `merge_dcft(model)`, and export the whole model. Received: "
            f"model '{place.model.name}' with {joined(map(repr, homeless))} trained."
        )
    return tensors


def _lora_tensors(place, family, modules) -> dict:
    """PEFT's tensors by their names in the model, without PEFT's prefix."""
    adapted = {path: place.layers[path] for path in place.config["layers"]}
    homeless = set(adapted).difference(*modules.values()) if modules else set(adapted)
    if homeless:
        raise ValueError(
            "Leave out layers that Transformers does not have as a layer of their own, with "
            f"`exclude_layers`, or merge. Received: {joined(map(repr, sorted(homeless)))} adapted."
        )
    factors = lora_factors(adapted, place.name)
    prefix, tensors = _prefix(place.model, family), {}
    for module, paths in modules.items():
        if not any(path in factors for path in paths):
            continue
        if is_embedding(place.layers[paths[0]]):
            left, right = factors[paths[0]]
            tensors[f"{prefix}{module}.lora_embedding_A"] = left.T
            tensors[f"{prefix}{module}.lora_embedding_B"] = right.T
            if has_tied_output(place.model, family):
                # Its weight is the embeddings', transposed, and PEFT adapts the two one by one.
                tensors[f"{OUTPUT_MODULE}.lora_A.weight"] = right
                tensors[f"{OUTPUT_MODULE}.lora_B.weight"] = left
            continue
        columns = [matrix_shape_of(place.layers[path])[1] for path in paths]
        down = np.concatenate([factors[path][0].T for path in paths if path in factors])
        up = np.zeros((sum(columns), len(down)), "float32")
        row = rank = 0
        for path, width in zip(paths, columns):
            if path in factors:
                block = factors[path][1].T
                up[row : row + width, rank : rank + block.shape[1]] = block
                rank += block.shape[1]
            row += width
        tensors[f"{prefix}{module}.lora_A.weight"] = down
        tensors[f"{prefix}{module}.lora_B.weight"] = up
    return {key: np.ascontiguousarray(tensor, "float32") for key, tensor in tensors.items()}


def _config(place, family, tensors, known, heads, head) -> dict:
    """PEFT's configuration."""
    ranks = {}
    for key, tensor in tensors.items():
        module, _, factor = key.removesuffix(".weight").rpartition(".")
        if factor.endswith("_A"):
            ranks[module] = tensor.shape[0]
    rank = max(ranks.values())  # which is what vLLM looks at
    pattern = {}
    for other in sorted({*ranks.values()} - {rank}):
        of_rank = [module for module, of_module in ranks.items() if of_module == other]
        pattern.update(dict.fromkeys(_tails(of_rank, ranks), other))
    is_with_head = heads and head is None
    tops = dict.fromkeys(module.partition(".")[0] for module in heads)
    return {
        "peft_type": "LORA",
        # PEFT has a head saved by itself where it knows the task.
        "task_type": family.task_type if is_task(place.model) and head is None else None,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "lora_dropout": place.config["dropout"],
        "bias": "none",
        "fan_in_fan_out": family.has_transposed_weights,
        "target_modules": _tails(ranks, known),
        "modules_to_save": list(tops) if is_with_head else None,
        "inference_mode": True,
    }


def _tails(modules, others) -> list:
    """The shortest ends of these modules' names that no other of the known names has."""
    modules = list(modules)
    others = [name for name in others if name not in set(modules)]
    tails = {}
    for module in modules:
        parts = module.split(".")
        for start in reversed(range(len(parts))):
            tail = ".".join(parts[start:])
            if not any(name == tail or name.endswith(f".{tail}") for name in others):
                break
        tails[tail] = None
    return list(tails)


def _warn_of_ranks(config):
    rank, others = config["r"], sorted({*config["rank_pattern"].values()})
    if rank > VLLM_RANK:
        warnings.warn(
            f"The LoRA's rank, rank * kernel_size in each module of Transformers, is up to {rank}. "
            f"vLLM loads {VLLM_RANK} unless it is started with `--max-lora-rank {rank}` or more.",
            stacklevel=3,
        )
    if others:
        warnings.warn(
            f"The LoRA's modules have several ranks, {joined(map(str, [*others, rank]))}. PEFT and "
            "vLLM compute it rightly, llama.cpp scales all but the largest wrongly: merge there.",
            stacklevel=3,
        )


def import_from_peft(model: keras.Model, folder, name: str | None = None) -> keras.Model:
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
        modules = modules_of(part, family, place.layers)
        by_path = _by_path(folder, loras, modules, place, family)
        _check_targets(folder, config, loras, modules, family)
        content = _content(place, by_path, config)
        head = _head_values(folder, others, head_of(model, family), place)
        load_content(model, name, folder, {**content[0], **head}, content[1])
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
    try:
        tensors = safetensors.numpy.load((folder / WEIGHTS).read_bytes())
    except safetensors.SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS}: damaged ({error}).") from error
    loras, others = {}, {}
    for key, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise ValueError(
                f"{folder}: load an adapter that did not diverge. The folder has NaN or infinity "
                f"in '{key}'."
            )
        found = re.fullmatch(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?", key)
        if found is None:
            others[key.removeprefix(PREFIX)] = tensor
            continue
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


def _content(place, by_path, config) -> tuple[dict, dict]:
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
