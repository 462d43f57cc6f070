"""Adapter files: what was trained, and nothing else, in one safetensors file.

Layout, format version 2. Tensors:

    adapter/<path>/dcft_a, .../dcft_b, .../dcft_filter    paths from the adapted model down
    trained/<path>/<number>.<name>                        paths from the saved model down

Metadata: `format` ("keras_dcft"), `format_version`, `dcft_config` (JSON), `model_class`, `part`
(the path of the adapted model in the model that was saved, empty if it is that, or if several parts
are adapted), `architecture` (JSON, the weight shape of every dense and embedding layer of the
adapted model by path), `matrix_shapes` (JSON, likewise of every adapted weight as a matrix),
`fingerprints` (JSON, of every adapted weight by path), `notes` (JSON, the caller's) and `checksum`
(SHA-256 over all of this and the tensors). Version 1 had no fingerprints and no matrix shapes; the
package needs none of the latter, those who read a file without its model do (docs/format.md).
"""

import functools
import hashlib
import json
import struct
import warnings
from pathlib import Path
from typing import Any

import keras
import numpy as np
import safetensors
import safetensors.numpy

from keras_dcft import keras_internals, selection, shares
from keras_dcft.adapter import ADAPTER_VARIABLES
from keras_dcft.fingerprints import differs, fingerprint
from keras_dcft.freezing import is_part, is_touched
from keras_dcft.hub import head_config, is_task, task_backbone
from keras_dcft.increments import subspace_shape
from keras_dcft.layers.base import DCFTLayer
from keras_dcft.models import adapter_names, config_of, the_name
from keras_dcft.named import add, checked_name, drop, is_active
from keras_dcft.paths import (
    checked_model,
    dcft_layers,
    joined,
    required_dcft_layers,
    walk,
    with_itself,
    with_sublayers,
)
from keras_dcft.planning import check_built
from keras_dcft.reclassing import DCFT_CLASSES, matrix_shape_of, weight_owners, weight_shape_of
from keras_dcft.settings import AdapterSettings
from keras_dcft.shares import DEFAULT_NAME
from keras_dcft.signatures import FilePath, Model
from keras_dcft.verbs import adapt_and_reset
from keras_dcft.writing import write_atomically

SUFFIX = ".dcft.safetensors"
FORMAT = "keras_dcft"
FORMAT_VERSION = 2


def save_dcft_weights(
    model: keras.Model,
    path: FilePath,
    notes: dict[str, Any] | None = None,
    *,
    name: str | None = None,
) -> None:
    """Writes what was trained in an adapted model to a `*.dcft.safetensors` file.

    That is the adapters, the layers trained in full beside them, a task's head, and whatever else
    is trainable at the time, such as layers around an adapted backbone; no base weights. (Where
    `model.trainable` is False as a whole, that says nothing about the layers around the adapted
    model: all of them are written.) The file is written beside its place and renamed, so that
    whatever happens the old file or the new one is there. Where several processes train one model,
    on JAX, each has to make the call, and the first writes the file.

    Args:
        model: a model adapted with `enable_dcft`.
        path: str or path that ends with `.dcft.safetensors`; its folder must exist.
        notes: dict of plain data to keep in the file, or None.
        name: str, the adapter to write, active or not, where the model has several.

    Raises:
        ValueError: if the model is not adapted, has several adapters and none of this name, or if
            the path ends otherwise.
        OSError: if the file cannot be written.

    Example:
        >>> import tempfile
        >>> model = keras.Sequential([keras.Input((32,)), keras.layers.Dense(64)])
        >>> path = tempfile.mkdtemp() + "/my.dcft.safetensors"
        >>> save_dcft_weights(enable_dcft(model), path)
        >>> load_dcft_weights(model, path) is model
        True
    """
    path = checked_path(path)
    if keras_internals.is_first_process() and not path.parent.is_dir():
        raise FileNotFoundError(f"Make the folder first. Received: path={str(path)!r}")
    required_dcft_layers(model)
    with selection.calls.changing(also_inside=True):
        tensors, metadata = _content(model, the_name(model, name), notes)
    write_atomically(path, safetensors.numpy.save(tensors, metadata))


def _content(model, name, notes) -> tuple[dict, dict]:
    """The tensors and the metadata of a model's file."""
    place = Place(model, name)
    config = {k: v for k, v in place.config.items() if k != "flags"}
    tensors = {key: selection.as_array(value) for key, value in place.variables().items()}
    part = place.part
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "dcft_config": json.dumps(config),
        "model_class": getattr(part, "dcft_base_class", type(part)).__name__,
        "part": next((path for path, layer in place.outer.items() if layer is part), ""),
        "architecture": json.dumps(architecture_of(place.layers)),
        "matrix_shapes": json.dumps({p: matrix_shape_of(x) for p, x in place.owners().items()}),
        "fingerprints": json.dumps(place.fingerprints),
        "notes": json.dumps(notes or {}),
    }
    metadata["checksum"] = _checksum(tensors, metadata)
    return tensors, metadata


def load_dcft_weights(model: Model, path: FilePath, *, name: str | None = None) -> Model:
    """Loads an adapter file into a model, all of it or, with an error, nothing.

    A plain model is adapted first, with the file's settings. In a model that is adapted already
    with the same settings only values are replaced: nothing is compiled or traced anew. Weights
    that were trained when the file was written are trainable afterwards. Under a new name the file
    becomes one more adapter of an adapted model, which `activate_dcft` makes compute.

    Args:
        model: a built model of the architecture that the file was saved from.
        path: str or path of a file that `save_dcft_weights` wrote.
        name: str, the adapter to load into, or a new one. By default it is the only one, and in a
            plain model "default".

    Returns:
        The model.

    Raises:
        ValueError: if the file is damaged, of a newer format or of another architecture, if it has
            NaN or infinity, or if its settings, layers or shapes are not the model's. The message
            says what the file has and what the model has. The model is unchanged.
        OSError: if the file cannot be read.

    Example:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/my.dcft.safetensors"
        >>> model = keras.Sequential([keras.Input((32,)), keras.layers.Dense(64)])
        >>> save_dcft_weights(enable_dcft(model), path)
        >>> type(load_dcft_weights(remove_dcft(model), path)).__name__
        'DCFTSequential'
    """
    path = checked_path(path)
    check_built(checked_model(model))
    tensors, metadata = read(path)
    with selection.calls.changing():
        names = adapter_names(model)
        if name is None:
            name = the_name(model) if names else DEFAULT_NAME
        load_content(model, checked_name(name), path, tensors, metadata)
    return model


def load_content(model, name, path, tensors, metadata):
    """Loads the content of a file as `load_dcft_weights` does, inside of a change.

    Args:
        model: the model.
        name: str, the adapter to load into, or a new one.
        path: where the content is from, for messages.
        tensors, metadata: the content.
    """
    names = adapter_names(model)
    config = json.loads(metadata["dcft_config"])
    if any(selection.is_off(layer.dcft_filter) for layer in dcft_layers(model).values()):
        raise ValueError("`model` cannot be loaded into inside `dcft_disabled`.")
    if name in names:
        place = Place(model, name)
        check_settings(path, config, place.config)
    else:
        plain = walk(model).get(metadata["part"], task_backbone(model))
        place = Place(model, name, config, None if names else plain)
    variables = place.variables(also=tensors)
    # A variable that was made trainable by hand need not be in the file.
    by_hand = set(variables) - set(place.variables(by_hand=False))
    shapes = {key: variable.shape for key, variable in variables.items()}
    check_file(path, tensors, metadata, place, shapes, by_hand)
    if name not in names:
        if names:
            add(model, place.part, config, AdapterSettings(), name)
        else:
            adapt_and_reset(model, place.part, {**config, "active": name})
        variables = place.variables(also=tensors)
    if names and (name not in names or not is_active(model, name)):
        try:
            _check_common(path, tensors, variables, place, name)
        except ValueError:
            if name not in names:
                drop(model, name, list)
            raise
    # What another file had trained is the base's again.
    for layer in place.outer.values():
        if name in shares.names_of(layer):
            shares.put_base_back(layer, name)
    for key, variable in variables.items():
        if key in by_hand:
            variable.trainable = key in tensors
        if key in tensors:
            variable.assign(tensors[key])


def check_file(path, tensors, metadata, place, shapes, optional=()):
    """Raises ValueError, or warns, where a file does not fit a place.

    Args:
        path: the file's path, for messages.
        tensors, metadata: its content.
        place: the `Place`.
        shapes: dict of the shapes that its tensors beside the adapters must have, by name.
        optional: names that need not be in the file.
    """
    config = json.loads(metadata["dcft_config"])
    _check_architecture(path, json.loads(metadata["architecture"]), place.layers, config)
    _check_tensors(path, tensors, {**place.adapter_shapes(), **shapes}, optional)
    _warn_of_another_base(path, json.loads(metadata.get("fingerprints", "{}")), place.fingerprints)


def _check_common(path, tensors, variables, place, name):
    """Raises ValueError where the file of a waiting adapter would change what others compute."""
    changed = []
    for key, variable in variables.items():
        kind, _, rest = key.partition("/")
        layer = place.outer.get(rest.rpartition("/")[0])
        is_own = kind == "adapter" or name in shares.names_of(layer)
        if is_own or key not in tensors:
            continue
        if not np.array_equal(tensors[key], selection.as_array(variable)):
            changed.append(rest)
    if changed:
        raise ValueError(
            f"{path}: load it into a model that was adapted with all that the file trains, a task "
            "instead of its backbone, say. The model has one set of values for all its adapters of "
            f"{joined(map(repr, changed))}; the file has others."
        )


def place_for(model, metadata):
    """The `Place` in a model, plain or adapted, for a new adapter, by a file's metadata."""
    part = walk(model).get(metadata["part"], task_backbone(model))
    return Place(model, None, json.loads(metadata["dcft_config"]), part)


def read_dcft_notes(path: FilePath) -> dict[str, Any]:
    """What is in an adapter file, told without a model; the whole file is checked for it.

    Args:
        path: str or path of a file that `save_dcft_weights` wrote.

    Returns:
        dict of plain data:

        - `format_version`: int.
        - `settings`: the adapter's `dcft_config`: rank, alpha, ..., kernel sizes by layer path.
        - `base`: what it was trained on: `model_class`, `part` (the path of the adapted model in
          the model that was saved), `architecture` (the weight shape of each dense and embedding
          layer by path) and `fingerprints` (eight numbers of each adapted weight by path; empty in
          files of version 1).
        - `notes`: what `save_dcft_weights` was given.
        - `counts`: of numbers in `adapters` and `trained_in_full`, and of `tensors`.
        - `tensors`: the `dtype` and `shape` of each by name.

    Raises:
        ValueError: if the path ends otherwise, or the file is damaged or of a newer format.
        OSError: if the file cannot be read.

    Example:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/my.dcft.safetensors"
        >>> model = keras.Sequential([keras.Input((32,)), keras.layers.Dense(64)])
        >>> save_dcft_weights(enable_dcft(model), path, notes={"accuracy": 0.9})
        >>> found = read_dcft_notes(path)
        >>> found["notes"], found["counts"]
        ({'accuracy': 0.9}, {'adapters': 76, 'trained_in_full': 0, 'tensors': 3})
    """
    tensors, metadata = read(checked_path(path))
    sizes = {name: tensor.size for name, tensor in tensors.items()}
    in_adapters = sum(size for name, size in sizes.items() if name.startswith("adapter/"))
    return {
        "format_version": int(metadata["format_version"]),
        "settings": json.loads(metadata["dcft_config"]),
        "base": {
            "model_class": metadata["model_class"],
            "part": metadata["part"],
            "architecture": json.loads(metadata["architecture"]),
            "fingerprints": json.loads(metadata.get("fingerprints", "{}")),
        },
        "notes": json.loads(metadata["notes"]),
        "counts": {
            "adapters": in_adapters,
            "trained_in_full": sum(sizes.values()) - in_adapters,
            "tensors": len(tensors),
        },
        "tensors": {
            name: {"dtype": str(tensor.dtype), "shape": list(tensor.shape)}
            for name, tensor in sorted(tensors.items())
        },
    }


def checked_path(path) -> Path:
    """A path of an adapter file; raises ValueError for one with another suffix."""
    if not str(path).endswith(SUFFIX):
        raise ValueError(f"`path` must end with `{SUFFIX}`. Received: path={str(path)!r}")
    return Path(path)


class Place:
    """What of a model a file holds, or is to be loaded into.

    Attributes:
        model: the model, adapted or about to be.
        name: str, the name of its adapter; None for one that it does not have.
        part: the adapted model at or below it.
        config: the part's `dcft_config` for this adapter.
        outer, layers: dicts of the model and of the part, each with all layers below it, by path.
    """

    def __init__(self, model, name, config=None, part=None):
        self.model, self.name, self.outer = model, name, with_itself(model)
        self.part = part or self._adapted_part()
        self.layers = self.outer if self.part is model else with_itself(self.part)
        self.config = config or config_of(self.part, name)
        self._is_known = name in adapter_names(model)

    def _adapted_part(self):
        """The one model that was adapted as a whole, with none inside, or else the model itself."""
        paths = [path for path, layer in self.outer.items() if is_part(layer)]
        inner = [path for path in paths if with_sublayers([path], paths) == [path]]
        return self.outer[inner[0]] if len(inner) == 1 else task_backbone(self.model)

    def owners(self) -> dict:
        """The layers that are adapted or to be, by path, of those that share a weight the first."""
        adapted = {path: self.layers[path] for path in self.config["layers"]}
        return {path: adapted[path] for path in weight_owners(adapted).values()}

    @functools.cached_property
    def fingerprints(self) -> dict:
        """Of the weights that are adapted or to be, by path."""
        return {path: fingerprint(layer) for path, layer in self.owners().items()}

    def adapter_shapes(self) -> dict:
        """The shapes of the adapters' variables by their names in a file."""
        shapes = {}
        for path, layer in self.owners().items():
            d = self.config["layers"][path]
            rank = self.config.get("adapters", {}).get(path, self.config)["rank"]
            a, b = subspace_shape(*matrix_shape_of(layer), d)
            for name, shape in zip(ADAPTER_VARIABLES, ((a, rank), (rank, b), (d, d))):
                shapes[f"adapter/{path}/{name}"] = shape
        return shapes

    def variables(self, also=(), by_hand=True) -> dict:
        """All that a file holds, by the names that it has there.

        Args:
            also: names of weights to have in any case, if the model has them.
            by_hand: bool, whether to have what a user made trainable by hand.
        """
        variables = {}
        for path, layer in self.layers.items():
            for key, variable in shares.adapter_values(layer, self.name).items():
                variables[f"adapter/{path}/{key}"] = variable
        told, inside = self._told_to_be_trained
        part = {id(layer) for layer in self.layers.values()}
        for path, layer in self.outer.items():
            if self._is_known and is_touched(layer) and self.name not in shares.names_of(layer):
                continue  # it is trained by other adapters
            weights = shares.own_variables(layer, self.name)
            if isinstance(layer, DCFTLayer) and id(layer) not in part:
                weights = keras_internals.own_weights(layer)
            outside = id(layer) not in inside
            # Flags may be off for the moment, so what is known to be trained does not need them;
            # state such as moving statistics belongs to what is trained beside it.
            whole = id(layer) in told or (
                outside and (not self.model.trainable or any(v.trainable for v in weights))
            )
            for number, variable in enumerate(weights):
                name = f"trained/{path}/{number}.{variable.name}"
                # Keras writes a float8 layer's scales, no weights, through the gradients' place.
                is_trained = variable.trainable and not variable.overwrite_with_gradient
                is_trained = is_trained and is_touched(layer) and by_hand
                if whole or is_trained or name in also:
                    variables[name] = variable
        return variables

    @functools.cached_property
    def _told_to_be_trained(self) -> tuple[set, set]:
        """The ids of the layers that adapting trains in full, and of all that it touches."""
        told = [self.layers[path] for path in self.config["trainable_layers"]]
        roots = self.config.get("roots", [""])
        inside = [self.layers[path] for path in with_sublayers(roots, self.layers)]
        if is_task(self.model) and self.part is self.model.backbone:
            told += [self.outer[path] for path in head_config(self.model)["trainable_layers"]]
        return {id(layer) for layer in told}, {id(layer) for layer in [*inside, *told]}


def architecture_of(layers) -> dict:
    """The shape of the weight of every dense and embedding layer, by path."""
    return {
        path: list(weight_shape_of(layer))
        for path, layer in layers.items()
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


def read(path: Path) -> tuple[dict, dict]:
    """A file's tensors and metadata; raises ValueError if it is none, or damaged."""
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
            f"{path}: load a file that `save_dcft_weights` wrote. The file has "
            f"format={metadata.get('format')!r} instead of {FORMAT!r}."
        )
    version = metadata.get("format_version", "")
    if version.isdecimal() and int(version) > FORMAT_VERSION:
        raise ValueError(
            f"{path}: written by a newer keras_dcft, install that. The file has format version "
            f"{version}; this keras_dcft reads {FORMAT_VERSION} and older."
        )
    if metadata.get("checksum") != _checksum(tensors, metadata):
        raise ValueError(f"{path}: damaged, its checksum does not fit its content.")
    return tensors, metadata


def _check_architecture(path, saved, layers, config):
    found = architecture_of(layers)
    resized = []
    for layer in [*saved, *(layer for layer in found if layer not in saved)]:
        in_file, in_model = saved.get(layer), found.get(layer)
        if in_file == in_model:
            continue
        is_resized = in_file and in_model and in_file[1:] == in_model[1:]
        is_resized = is_resized and isinstance(layers[layer], keras.layers.Embedding)
        if is_resized and layer not in config["layers"]:
            resized.append(f"'{layer}': {in_file[0]} rows in the file, {in_model[0]} here")
            continue
        raise ValueError(
            f"{path}: load it into a model of the architecture that it was made for. The file has "
            f"{_described(layer, in_file)}; the model has {_described(layer, in_model)}."
        )
    if resized:
        warnings.warn(
            f"{path}: made with another vocabulary. Embeddings that are not adapted have other "
            f"numbers of rows: {joined(resized)}.",
            stacklevel=4,
        )


def _described(layer, shape) -> str:
    return f"layer '{layer}' with a weight of shape {tuple(shape)}" if shape else f"no '{layer}'"


def check_settings(path, saved, found):
    """Raises ValueError if a file's `dcft_config` is another than a model's."""

    def refuse(what, in_file, in_model):
        raise ValueError(
            f"{path}: load it into the plain model, or call `remove_dcft(model)` first: the model "
            f"is adapted with other settings. The file has {what}={in_file}; the model has "
            f"{what}={in_model}."
        )

    for key in ("rank", "alpha"):
        if saved[key] != found[key]:
            refuse(key, saved[key], found[key])
    for layer in {**saved["layers"], **found["layers"]}:
        sizes = [config["layers"].get(layer) for config in (saved, found)]
        if sizes[0] != sizes[1]:
            refuse(f"kernel_size of '{layer}'", *sizes)
    for layer in [*saved["trainable_layers"], *found["trainable_layers"]]:
        has = [layer in config["trainable_layers"] for config in (saved, found)]
        if has[0] != has[1]:
            refuse(f"'{layer}' in trainable_layers", *has)
    for key in ("roots", "adapters"):
        if saved.get(key) != found.get(key):
            refuse(key, *(str(config.get(key))[:200] for config in (saved, found)))


def _check_tensors(path, tensors, shapes, optional):
    for name in [*shapes, *(name for name in tensors if name not in shapes)]:
        if name not in tensors and name in optional:
            continue
        in_file = tensors[name].shape if name in tensors else None
        in_model = shapes.get(name)
        if in_file is None or in_model is None or tuple(in_file) != tuple(in_model):
            has = [
                "nothing of that name" if s is None else f"shape {tuple(s)}"
                for s in (in_file, in_model)
            ]
            raise ValueError(
                f"{path}: load it into a model that trains what it was trained with. Of '{name}' "
                f"the file has {has[0]}; the model has {has[1]}."
            )
        if not np.isfinite(tensors[name]).all():
            raise ValueError(
                f"{path}: load an adapter that did not diverge. The file has NaN or infinity in "
                f"'{name}'."
            )


def _warn_of_another_base(path, saved, found):
    layers = [layer for layer in found if layer in saved]
    others = [layer for layer in layers if differs(found[layer], saved[layer])]
    if others:
        warnings.warn(
            f"{path}: trained on another base, so expect another result. The weights of "
            f"{len(others)} of {len(layers)} adapted layers are not those of the base that the "
            f"file was made on: {joined(others)}.",
            stacklevel=5,
        )
