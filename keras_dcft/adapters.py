"""Adapter files: what was trained, and nothing else, in one safetensors file.

Layout, format version 1. Tensors:

    adapter/<path>/dcft_a, .../dcft_b, .../dcft_filter    paths from the adapted model down
    trained/<path>/<number>.<name>                        paths from the saved model down

Metadata: `format` ("keras_dcft"), `format_version`, `dcft_config` (JSON), `model_class`, `part`
(the path of the adapted model in the model that was saved, empty if it is that), `architecture`
(JSON, the weight shape of every dense and embedding layer of the adapted model by path), `notes`
(JSON, the caller's) and `checksum` (SHA-256 over all of this and the tensors).
"""

import hashlib
import json
import os
import struct
import tempfile
from pathlib import Path

import keras
import numpy as np
import safetensors
import safetensors.numpy
from keras import ops

from keras_dcft import keras_internals
from keras_dcft.conversion import DCFT_CLASSES, weight_shape_of
from keras_dcft.layers import ADAPTER_VARIABLES
from keras_dcft.models import adapt, adapted_part, release, reset_compiled_models, task_backbone
from keras_dcft.paths import dcft_layers, walk
from keras_dcft.planning import check_built, checked_model

SUFFIX = ".dcft.safetensors"
FORMAT = "keras_dcft"
FORMAT_VERSION = 1


def save_dcft_weights(model: keras.Model, path, notes: dict | None = None):
    """Writes what was trained in an adapted model to a `*.dcft.safetensors` file.

    That is the adapters, the layers trained in full beside them, a task's head, and whatever else
    is trainable at the time, such as layers around an adapted backbone; no base weights. (Where
    `model.trainable` is False as a whole, that says nothing about the layers around the adapted
    model: all of them are written.) The file is written beside its place and renamed, so that
    whatever happens the old file or the new one is there.

    Args:
        model: a model adapted with `enable_dcft`.
        path: str or path that ends with `.dcft.safetensors`; its folder must exist.
        notes: dict of plain data to keep in the file, or None.

    Raises:
        ValueError: if the model is not adapted or the name ends otherwise.
        OSError: if the file cannot be written.

    Example:
        >>> import tempfile
        >>> model = keras.Sequential([keras.Input((32,)), keras.layers.Dense(64)])
        >>> path = tempfile.mkdtemp() + "/my.dcft.safetensors"
        >>> save_dcft_weights(enable_dcft(model), path)
        >>> load_dcft_weights(model, path) is model
        True
    """
    path = _checked_path(path)
    part = adapted_part(checked_model(model))
    tensors = {name: _array(variable) for name, variable in _variables(model, part).items()}
    for layer_path, layer in part._dcft_adaptation.layers.items():
        if layer.is_disabled and not layer.shares_adapter:
            tensors[f"adapter/{layer_path}/dcft_filter"] = layer.disabled_filter
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "dcft_config": json.dumps(part.dcft_config),
        "model_class": part.base_class.__name__,
        "part": next((path for path, layer in walk(model).items() if layer is part), ""),
        "architecture": json.dumps(_architecture(part)),
        "notes": json.dumps(notes or {}),
    }
    metadata["checksum"] = _checksum(tensors, metadata)
    _write_atomically(path, safetensors.numpy.save(tensors, metadata))


def load_dcft_weights(model: keras.Model, path) -> keras.Model:
    """Loads an adapter file into a model, all of it or, with an error, nothing.

    A plain model is adapted first, with the file's settings. In a model that is adapted already
    with the same settings only values are replaced: nothing is compiled or traced anew. Weights
    that were trained when the file was written are trainable afterwards.

    Args:
        model: a built model of the architecture that the file was saved from.
        path: str or path of a file that `save_dcft_weights` wrote.

    Returns:
        The model.

    Raises:
        ValueError: if the file is damaged, of a newer format or of another architecture, or if its
            settings, layers or shapes are not the model's. The message names the file, the layer,
            what was expected and what was found. The model is unchanged.
        OSError: if the file cannot be read.

    Example:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/my.dcft.safetensors"
        >>> model = keras.Sequential([keras.Input((32,)), keras.layers.Dense(64)])
        >>> save_dcft_weights(enable_dcft(model), path)
        >>> type(load_dcft_weights(remove_dcft(model), path)).__name__
        'DCFTSequential'
    """
    path = _checked_path(path)
    check_built(checked_model(model))
    tensors, metadata = _read(path)
    config = json.loads(metadata["dcft_config"])
    layers = walk(model)
    if any(layer.is_disabled for layer in dcft_layers(model)):
        raise ValueError("`model` cannot be loaded into inside `dcft_disabled`.")
    was_adapted = bool(dcft_layers(model))
    part = (
        adapted_part(model) if was_adapted else layers.get(metadata["part"], task_backbone(model))
    )
    _check_architecture(path, json.loads(metadata["architecture"]), _architecture(part))
    if was_adapted:
        _check_settings(path, config, part.dcft_config)
    else:
        adapt(model, config, part)
    try:
        variables = _variables(model, part, also=tensors)
        _check_tensors(path, tensors, variables)
    except ValueError:
        if not was_adapted:
            release(part)
        raise
    if not was_adapted:
        reset_compiled_models(part._dcft_adaptation.layers.values())
    unexpected = set(variables) - set(_variables(model, part))
    for name, variable in variables.items():
        variable.assign(tensors[name])
        if name in unexpected:
            variable.trainable = True
    return model


def read_notes(path) -> dict:
    """The notes that `save_dcft_weights` was given for a file."""
    return json.loads(_read(_checked_path(path))[1]["notes"])


def _checked_path(path) -> Path:
    if not str(path).endswith(SUFFIX):
        raise ValueError(f"`path` must end with `{SUFFIX}`. Received: path={str(path)!r}")
    return Path(path)


def _variables(model, part, also=()) -> dict:
    """All that a file holds of a model, by the names that it has there.

    Args:
        model: the model.
        part: the adapted model at or below it.
        also: names of weights to have in any case, if the model has them.
    """
    variables = {}
    for path, layer in part._dcft_adaptation.layers.items():
        for name in ADAPTER_VARIABLES if not layer.shares_adapter else ():
            variables[f"adapter/{path}/{name}"] = getattr(layer, name)
    adapters = {id(variable) for variable in variables.values()}
    told = _told_to_be_trained(part)
    inside = {id(layer) for layer in [part, *walk(part).values()]}
    for path, layer in {"": model, **walk(model)}.items():
        weights = keras_internals.own_weights(layer)
        # Flags may be off for the moment, so what is known to be trained does not need them.
        whole = id(layer) in told or (id(layer) not in inside and not model.trainable)
        # State such as moving statistics belongs to what is trained beside it.
        whole = whole or (id(layer) not in inside and any(v.trainable for v in weights))
        for number, variable in enumerate(weights):
            name = f"trained/{path}/{number}.{variable.name}"
            # Keras writes a float8 layer's scales, no weights, through the gradients' place.
            trained = variable.trainable and not variable.overwrite_with_gradient
            if id(variable) not in adapters and (whole or trained or name in also):
                variables[name] = variable
    return variables


def _told_to_be_trained(part) -> set:
    """The layers, by identity, that adapting made trainable in full: named ones, a task's head."""
    adaptation = part._dcft_adaptation
    paths = walk(part)
    inside = {id(layer) for layer in [part, *paths.values()]}
    named = [paths[path] for path in adaptation.config["trainable_layers"]]
    head = [t.layer for t in adaptation.trainability if id(t.layer) not in inside]
    return {id(layer) for layer in (*named, *head)}


def _array(variable) -> np.ndarray:
    # NumPy has no bfloat16; float32 holds each of its values exactly.
    low = variable.dtype == "bfloat16"
    array = ops.convert_to_numpy(ops.cast(variable, "float32") if low else variable)
    return np.ascontiguousarray(array)


def _architecture(part) -> dict:
    return {
        path: list(weight_shape_of(layer))
        for path, layer in walk(part).items()
        if isinstance(layer, tuple(DCFT_CLASSES)) and layer.built
    }


def _checksum(tensors, metadata) -> str:
    digest = hashlib.sha256()
    described = {key: value for key, value in metadata.items() if key != "checksum"}
    digest.update(json.dumps(described, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        digest.update(tensor.tobytes())
    return digest.hexdigest()


def _write_atomically(path: Path, content: bytes):
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(beside, 0o666 & ~_umask())
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _read(path: Path):
    # Read once: the file may be replaced by a newer one at any moment.
    content = path.read_bytes()
    try:
        tensors = safetensors.numpy.load(content)
        (size,) = struct.unpack("<Q", content[:8])
        metadata = json.loads(content[8 : 8 + size]).get("__metadata__", {})
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged, or not a safetensors file ({error}).") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path}: not an adapter file of keras_dcft. Expected: format={FORMAT!r}. "
            f"Found: format={metadata.get('format')!r}"
        )
    version = metadata.get("format_version", "")
    if version.isdecimal() and int(version) > FORMAT_VERSION:
        raise ValueError(
            f"{path}: written by a newer keras_dcft. Expected: format version {FORMAT_VERSION} or "
            f"older. Found: {version}"
        )
    if metadata.get("checksum") != _checksum(tensors, metadata):
        raise ValueError(f"{path}: damaged, its checksum does not fit its content.")
    return tensors, metadata


def _check_architecture(path, expected, found):
    for layer in expected:
        if layer not in found:
            raise ValueError(
                f"{path}: made for another architecture. Expected: layer '{layer}' with a weight "
                f"of shape {tuple(expected[layer])}. Found: no such layer in the model."
            )
        if expected[layer] != found[layer]:
            raise ValueError(
                f"{path}: made for another architecture. Expected: layer '{layer}' with a weight "
                f"of shape {tuple(expected[layer])}. Found: {tuple(found[layer])}."
            )
    extra = [layer for layer in found if layer not in expected]
    if extra:
        raise ValueError(
            f"{path}: made for another architecture. Expected: no layer '{extra[0]}'. Found: one "
            f"with a weight of shape {tuple(found[extra[0]])}."
        )


def _check_settings(path, expected, found):
    for key in ("rank", "alpha", "layers", "trainable_layers"):
        if expected[key] != found[key]:
            raise ValueError(
                f"{path}: the model is adapted with other settings; load into the plain model, or "
                f"call `remove_dcft(model)` first. Expected: {key}={expected[key]}. "
                f"Found: {key}={found[key]}"
            )


def _check_tensors(path, tensors, variables):
    missing = [name for name in variables if name not in tensors]
    extra = [name for name in tensors if name not in variables]
    if missing or extra:
        raise ValueError(
            f"{path}: holds other layers than the model trains. Expected, but not in the file: "
            f"{missing}. Found in the file, but not in the model: {extra}."
        )
    for name, variable in variables.items():
        if tensors[name].shape != tuple(variable.shape):
            raise ValueError(
                f"{path}: '{name}' has another shape. Expected: {tuple(variable.shape)}. "
                f"Found: {tensors[name].shape}"
            )
