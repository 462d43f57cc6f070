"""An adapter as a LoRA folder of Hugging Face PEFT, for stacks that know no DCFT.

DCFT of rank r and kernel size d is a LoRA of rank r·d: nothing is approximated. (See
`docs/serving.md` for what loads such a folder.)
"""

import json
import warnings
from pathlib import Path

import keras
import numpy as np
import safetensors
import safetensors.numpy

from keras_dcft import named, selection
from keras_dcft.files import Place
from keras_dcft.hub import is_task, task_backbone
from keras_dcft.lora import lora_factors
from keras_dcft.models import the_name
from keras_dcft.paths import joined, required_dcft_layers
from keras_dcft.reclassing import matrix_shape_of
from keras_dcft.signatures import FilePath
from keras_dcft.transformers_names import (
    OUTPUT_MODULE,
    family_of,
    has_tied_output,
    head_of,
    is_embedding,
    modules_of,
)
from keras_dcft.writing import write_together

CONFIG, WEIGHTS, HEAD = "adapter_config.json", "adapter_model.safetensors", "head.safetensors"
PREFIX = "base_model.model."  # of all names in PEFT's files
VLLM_RANK = 16

# PEFT's parts of a layer, and how adapter files call them.
WEIGHT_NAMES = {"weight": "0.kernel", "bias": "1.bias"}
# In the head's file, so that only what was written here is ever deleted.
OURS = {"written_by": "keras_dcft"}


def export_to_peft(
    model: keras.Model,
    folder: FilePath,
    name: str | None = None,
    *,
    head: str | None = None,
    base: str | None = None,
) -> None:
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
        base: str, what is to stand in the folder as the base's name or path in Transformers.

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
        modules = modules_of(family.modules, place.layers)
        heads = head_of(model, family)
        trained = _head_tensors(place, heads)
        tensors = _lora_tensors(place, family, modules)
        _warn_of_activation(model, heads)
        if has_tied_output(model, family) and any(OUTPUT_MODULE in key for key in tensors):
            warnings.warn(
                "The embeddings are adapted, and are the output's weight as well: PEFT computes "
                "both rightly, but its `merge_and_unload` adds the increment to the one weight "
                "twice. Call `merge_dcft(model)` for a merged model.",
                stacklevel=2,
            )
    known = [_prefix(model, family) + module for module in modules] + [*heads]
    in_folder = {} if head == "separate" else trained
    config = _config(place, family, tensors, [*known, OUTPUT_MODULE], in_folder)
    config["base_model_name_or_path"] = base
    weights = {PREFIX + key: tensor for key, tensor in {**tensors, **in_folder}.items()}
    contents = {WEIGHTS: safetensors.numpy.save(weights, {"format": "pt"})}
    if trained and head == "separate":
        contents[HEAD] = safetensors.numpy.save(trained, {"format": "pt", **OURS})
    contents[CONFIG] = json.dumps(config, indent=2).encode()
    folder.mkdir(exist_ok=True)
    write_together({folder / file: content for file, content in contents.items()})
    if HEAD not in contents and _is_ours(folder / HEAD):  # an earlier export's
        (folder / HEAD).unlink()
    _warn_of_ranks(config)


def _is_ours(path) -> bool:
    """Whether a file of weights says that it was written here."""
    if not path.is_file():
        return False
    try:
        with safetensors.safe_open(path, "np") as file:
            return OURS.items() <= (file.metadata() or {}).items()
    except safetensors.SafetensorError:  # then it is somebody's something
        return False


def _warn_of_activation(model, heads):
    """Transformers' models give logits, whatever a task's last layer does with them."""
    for path in list(heads.values())[-1:]:
        activation = keras.activations.serialize(model.get_layer(path).activation)
        if activation != "linear":
            warnings.warn(
                f"The model in Transformers gives logits, without the {activation!r} of '{path}'.",
                stacklevel=3,
            )


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


def _config(place, family, loras, known, head) -> dict:
    """PEFT's configuration.

    Args:
        place: what is exported.
        family: its `Family`.
        loras: dict of PEFT's tensors by name.
        known: all modules that Transformers has and that may be meant by a name's end.
        head: dict of the head's tensors that are in the folder, by name.
    """
    ranks = {}
    for key, tensor in loras.items():
        module, _, factor = key.removesuffix(".weight").rpartition(".")
        if factor.endswith("_A"):
            ranks[module] = tensor.shape[0]
    rank = max(ranks.values())  # which is what vLLM looks at
    pattern = {}
    for other in sorted({*ranks.values()} - {rank}):
        of_rank = [module for module, of_module in ranks.items() if of_module == other]
        pattern.update(dict.fromkeys(_tails(of_rank, ranks), other))
    tops = list(dict.fromkeys(key.partition(".")[0] for key in head))
    is_classifier = family.task_type != "CAUSAL_LM"
    return {
        "peft_type": "LORA",
        # Where PEFT knows of a classifier, it expects its head.
        "task_type": family.task_type
        if is_task(place.model) and (tops or not is_classifier)
        else None,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "lora_dropout": place.config["dropout"],
        "bias": "none",
        "fan_in_fan_out": family.has_transposed_weights,
        "target_modules": _tails(ranks, known),
        "modules_to_save": tops or None,
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
