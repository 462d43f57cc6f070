"""`AdapterBank`: many adapters over one base, each row of a batch with its own.

An adapter is one row of a table of numbers in the main memory. A call takes the rows that it needs,
and the model's compiled function takes them as an input beside the batch: so nothing is traced anew
when adapters come and go, and the device holds the base and a batch's adapters, not the bank.
"""

import functools
import json
import math
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Self

import keras
import numpy as np
from keras import ops

from keras_dcft import files, keras_internals, selection, shares
from keras_dcft.hub import is_task
from keras_dcft.layers.base import DCFTLayer
from keras_dcft.models import trained_in_full, without_exceptions
from keras_dcft.paths import checked_model, joined, named, with_itself
from keras_dcft.planning import check_built
from keras_dcft.reclassing import made_class, weight_owners
from keras_dcft.rows import RowLayer, takes_rows
from keras_dcft.settings import checked_positive_int, shortened
from keras_dcft.signatures import FilePath


class AdapterBank:
    """Many adapters of the same settings over one base; each row of a batch has its own.

    The model is only looked at: it computes and saves what it did, while the bank is open and
    after. Whatever adapter it has itself says nothing here, rows are the base plus their own.

    Args:
        model: a built `keras.Model`, plain or adapted, in floating point or quantized.
        adapters: dict of names to paths of adapter files, of the same settings and for this model.
        capacity: int, for how many adapters memory is set aside; beyond it is doubled.

    Raises:
        TypeError, ValueError: if `model` is no built model, for a file as `load_dcft_weights`, or
            if something else than dense, embedding and normalization layers is trained in full.
        OSError: if a file cannot be read.

    Example:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/my.dcft.safetensors"
        >>> model = keras.Sequential([keras.Input((32,)), keras.layers.Dense(64)])
        >>> save_dcft_weights(enable_dcft(model), path)
        >>> with AdapterBank(model, {"mine": path}) as bank:
        ...     bank.predict(np.ones((2, 32)), adapters=["mine", None]).shape
        (2, 64)
    """

    def __init__(
        self,
        model: keras.Model,
        adapters: dict[str, FilePath] | None = None,
        capacity: int = 1000,
    ):
        check_built(checked_model(model))
        self._capacity = checked_positive_int("capacity", capacity)
        self._model = model
        self._lock = threading.Lock()
        self._rows = {}  # of the table, by name; the first row is the base's
        self._is_open = True
        self._follow(_Plan(model))
        try:
            for name, path in (adapters or {}).items():
                self.add(name, path)
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._rows))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self):
        state = f"{len(self)} adapters" if self._is_open else "closed"
        return f"<AdapterBank of model '{self._model.name}', {state}>"

    def add(self, name: str, path: FilePath) -> None:
        """Takes an adapter file in; calls that have begun do not see it.

        Args:
            name: str, its name here.
            path: str or path of a file that `save_dcft_weights` wrote.

        Raises:
            TypeError, ValueError, OSError: as the constructor, and ValueError for a name that is
                taken. The bank is unchanged then.
        """
        if not isinstance(name, str) or not name:
            raise TypeError(f"`name` must be a str. Received: name={shortened(repr(name))}")
        path = files.checked_path(path)
        tensors, metadata = files.read(path)
        # The base's weights are read, which on JAX no other call may use meanwhile.
        with selection.calls.running(), self._lock:
            self._check_open()
            if name in self._rows:
                raise ValueError(
                    "`name` must be a new one, or call `remove` first. "
                    f"Received: name={shortened(repr(name))}"
                )
            is_first = self._plan.config is None
            plan = self._plan
            if is_first:
                plan = _Plan(self._model, files.place_for(self._model, metadata), tensors)
            try:
                plan.check(path, tensors, metadata)
            except BaseException:
                if is_first:
                    plan.release()
                raise
            if is_first:
                self._release()
                self._follow(plan)
            if not self._free:
                size = len(self._table)
                self._table = np.concatenate([self._table, np.zeros_like(self._table)])
                self._free = list(range(len(self._table) - 1, size - 1, -1))
            row = self._free.pop()
            self._table[row] = self._plan.row(tensors)
            self._rows[name] = row

    def _follow(self, plan):
        self._plan = plan
        # A bank that nobody closes lets go when it is gone itself; and each plan once.
        self._release = weakref.finalize(self, plan.release)
        self._table = np.zeros((self._capacity + 1, len(plan.base)), "float32")
        self._table[0] = plan.base
        self._free = list(range(self._capacity, 0, -1))

    def remove(self, name: str) -> None:
        """Forgets an adapter; calls that have begun go on with it."""
        with self._lock:
            self._check_open()
            self._check_names([name])
            self._free.append(self._rows.pop(name))

    def close(self) -> None:
        """Lets go of the model and of all adapters, when the calls that run have ended."""
        with selection.calls.changing(), self._lock:
            self._release()
            self._is_open, self._rows, self._table, self._plan = False, {}, None, None

    def __call__(self, inputs: Any, adapters: Sequence[str | None]) -> Any:
        """One call of the model, as `model(inputs, training=False)`.

        Args:
            inputs: what the model takes, tensors or arrays.
            adapters: for each row a name, or None for the base.
        """
        plan, rows = self._rows_of(adapters)
        _check_count(_count(inputs), adapters)
        with selection.calls.running():
            self._check_open()
            plan.check_rows(inputs, len(rows))
            return plan.per_row((inputs, ops.convert_to_tensor(rows)))

    def predict(
        self,
        inputs: Any,
        adapters: Sequence[str | None],
        batch_size: int = 32,
        verbose: int = 0,
    ) -> Any:
        """The model's `predict`, with an adapter for each row.

        Args:
            inputs: what the model's `predict` takes: arrays, or of a task with a preprocessor its
                raw inputs, such as a list of str.
            adapters: for each row a name, or None for the base.
            batch_size: int, how many rows are computed at a time.
            verbose: 0, or 1 for a progress bar.

        Returns:
            NumPy arrays, one row for each row of the inputs.

        Raises:
            TypeError, ValueError: for names that the bank does not have, or not one for each row;
                with the first batch, if the layers' inputs or the outputs are not made of whole
                rows, independent of each other; if the bank is closed, or its model was adapted
                in another way since.
        """
        plan, rows = self._rows_of(adapters)
        if is_task(self._model) and self._model.preprocessor is not None:
            _check_count(_count(inputs), adapters)
            inputs = self._model.preprocessor(_with_texts_listed(inputs))
            inputs = keras.utils.unpack_x_y_sample_weight(inputs)[0]
        inputs = keras.tree.map_structure(ops.convert_to_numpy, inputs)
        _check_count(_count(inputs), adapters)
        with selection.calls.running():
            plan.check_rows(inputs, len(rows))
        starts = range(0, len(rows), batch_size)
        bar = keras.utils.Progbar(len(starts), verbose=verbose)
        outputs = []
        for start in starts:
            batch = keras.tree.map_structure(lambda x: x[start : start + batch_size], inputs)  # noqa: B023
            with selection.calls.running():
                self._check_open()
                plan.check_model()
                of_batch = plan.per_row.predict_on_batch((batch, rows[start : start + batch_size]))
            outputs.append(of_batch)
            bar.add(1)
        return keras.tree.map_structure(lambda *parts: np.concatenate(parts), *outputs)

    def generate(
        self, inputs: Any, adapters: Sequence[str | None] | str | None, **arguments: Any
    ) -> Any:
        """A KerasHub task's `generate`, with an adapter for each prompt.

        Args:
            inputs: list of prompts, or one.
            adapters: for each prompt a name, or None for the base.
            **arguments: of the task's own `generate`, such as `max_length`.
        """
        if not hasattr(self._model, "generate"):
            raise TypeError(
                "`generate` is for KerasHub tasks that have it. Received: model "
                f"'{self._model.name}' of type {type(self._model).__name__}"
            )
        adapters = [adapters] if isinstance(adapters, str) or adapters is None else adapters
        plan, rows = self._rows_of(adapters)
        _check_count(1 if isinstance(inputs, str) else _count(inputs), adapters)
        with selection.calls.running():
            self._check_open()
            return plan.generate(inputs, rows, arguments)

    def _rows_of(self, adapters):
        """The plan, and a copy of the table's rows for these adapters, of one state of the bank."""
        if isinstance(adapters, str) or not hasattr(adapters, "__len__"):
            raise TypeError(
                "`adapters` must be a list with a name, or None, for each row. "
                f"Received: adapters={shortened(repr(adapters))}"
            )
        with self._lock:
            self._check_open()
            self._check_names(name for name in adapters if name is not None)
            self._plan.check_model()
            rows = [0 if name is None else self._rows[name] for name in adapters]
            return self._plan, self._table[rows]

    def _check_names(self, names):
        unknown = [name for name in names if name not in self._rows]
        if unknown:
            raise ValueError(
                f"The bank must have each adapter: `add` it first. Received: "
                f"{joined(repr(name) for name in dict.fromkeys(unknown))}; the bank has "
                f"{joined(map(repr, self._rows)) or 'none'}."
            )

    def _check_open(self):
        if not self._is_open:
            raise ValueError(f"Open another AdapterBank: this one is closed. Received: {self!r}")


def _is_texts(inputs) -> bool:
    return isinstance(inputs, (list, tuple)) and all(isinstance(x, str) for x in inputs)


def _with_texts_listed(inputs):
    """Inputs whose texts are lists of str, which every tokenizer takes.

    A tuple of texts would be one example of several parts.
    """
    return list(inputs) if _is_texts(inputs) else keras.tree.map_structure(_listed, inputs)


def _listed(array):
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "OSU":
        return array
    # TensorFlow's data sets give bytes.
    return [text.decode() if isinstance(text, bytes) else text for text in array.tolist()]


def _count(inputs) -> int:
    if isinstance(inputs, dict):
        return max(map(_count, inputs.values()))
    if isinstance(inputs, (list, tuple)) and not _is_texts(inputs):
        return max(map(_count, inputs))
    return len(inputs)


def _check_count(count, adapters):
    if count != len(adapters):
        raise ValueError(
            f"`adapters` must have a name, or None, for each of the {count} rows. "
            f"Received: {len(adapters)} adapters."
        )


class _Plan:
    """Where each number of the table's rows belongs, and what computes with it.

    Attributes:
        config: the settings that all adapters of the bank have.
        base: array, the row of the base model.
        per_row: a model of a batch and its rows, whose `predict` is compiled like any other's.
    """

    def __init__(self, model, place=None, tensors=()):
        self._model, self._place = model, place
        self.config = place and without_exceptions(place.config)
        self._places = {id(x): named(path, x) for path, x in with_itself(model).items()}
        self._parts = {}  # by name in a file: the layer, the key there, the shape
        self._layers = {}  # by id
        base = self._adapters(place) if place else []
        base += self._in_full(place.variables(tensors, by_hand=False) if place else {})
        self.base = np.concatenate([np.zeros(0, "float32"), *map(np.ravel, base)])
        for layer in model._flatten_layers():
            if isinstance(layer, DCFTLayer):  # whose own adapter says nothing here
                self._layers.setdefault(id(layer), RowLayer(layer))
        for computed in self._layers.values():
            keras_internals.divert(computed.layer, selection.diversion_of)
        self.per_row = _PerRow(model, self.calls)
        self._generating = threading.local()
        self._is_checked = False

    def release(self):
        """Lets go of the model's layers."""
        for computed in self._layers.values():
            keras_internals.undivert(computed.layer)

    def _adapters(self, place) -> list:
        adapted = {path: place.layers[path] for path in place.config["layers"]}
        common = place.config
        for path, owner in weight_owners(adapted).items():
            own, layer = common.get("adapters", {}).get(path, common), adapted[path]
            scale = own["alpha"] / own["rank"]
            self._layers[id(layer)] = RowLayer(layer, id(adapted[owner]), scale)
        shapes = place.adapter_shapes()
        for name in shapes:
            path, _, key = name.removeprefix("adapter/").rpartition("/")
            self._parts[name] = (id(adapted[path]), key, shapes[name])
        return [np.zeros(shape, "float32") for shape in shapes.values()]

    def _in_full(self, variables) -> list:
        """What a file or the model's own adapter trains in full, the values of the base."""
        known = {id(variable) for variable in variables.values()}
        beside = [v for v in trained_in_full(self._model) if id(v) not in known]
        variables.update((id(variable), variable) for variable in beside)
        owners, shared = {}, set()
        for layer in self._model._flatten_layers():
            for number, variable in enumerate(shares.own_weights(layer)):
                if id(variable) in owners:
                    shared.add(id(variable))
                owners[id(variable)] = layer, number
        base = []
        for name, variable in variables.items():
            layer, number = owners.get(id(variable), (None, None))
            if layer is None or not takes_rows(layer) or "float" not in variable.dtype:
                what = name if layer is None else self._places[id(layer)]
                raise ValueError(
                    "Only dense, embedding and normalization layers can be trained in full beside "
                    f"the adapters of a bank. Received: {what} of type {type(layer).__name__}"
                )
            if id(variable) in shared:
                raise ValueError(
                    "Weights that are trained in full beside the adapters of a bank must be of one "
                    f"layer alone. Received: {variable.path}, which others have too"
                )
            computed = self._layers.setdefault(id(layer), RowLayer(layer))
            computed.own[str(number)] = variable
            self._parts[name] = (id(layer), str(number), variable.shape)
            base.append(shares.base_copy(variable).astype("float32"))
        return base

    def check_model(self):
        """Raises ValueError if the model was adapted in another way since."""
        layers = [x for x in self._model._flatten_layers() if isinstance(x, DCFTLayer)]
        known = {id(variable) for x in self._layers.values() for variable in x.own.values()}
        if not all(id(layer) in self._layers for layer in layers) or not all(
            id(variable) in known for variable in trained_in_full(self._model)
        ):
            raise ValueError(
                "Open another AdapterBank: its model was adapted after it was opened. Received: "
                f"model '{self._model.name}'"
            )

    def check(self, path, tensors, metadata):
        """Raises ValueError if a file is not for the model, or not like the others of the bank."""
        config = without_exceptions(json.loads(metadata["dcft_config"]))
        for key in {**self.config, **config}:
            if config.get(key) != self.config.get(key):
                raise ValueError(
                    f"{path}: put it into another bank, all adapters of one have the same "
                    f"settings. The file has {key}={shortened(repr(config.get(key)))}; the bank "
                    f"has {key}={shortened(repr(self.config.get(key)))}."
                )
        shapes = {n: shape for n, (_, _, shape) in self._parts.items() if isinstance(n, str)}
        files.check_file(path, tensors, metadata, self._place, shapes)

    def row(self, tensors) -> np.ndarray:
        """A row of the table with a file's numbers; what the file does not train is the base's."""
        row, start = self.base.copy(), 0
        for name, (_, _, shape) in self._parts.items():
            stop = start + math.prod(shape)
            if name in tensors:
                row[start:stop] = tensors[name].ravel()
            start = stop
        return row

    def calls(self, rows) -> dict:
        """For `selection.diverted`: what computes each layer with these rows of the table."""
        values, start = {key: {} for key in self._layers}, 0
        for layer, key, shape in self._parts.values():
            stop = start + math.prod(shape)
            values[layer][key] = ops.reshape(rows[:, start:stop], (-1, *shape))
            start = stop
        return {
            key: functools.partial(computed, values[key], values[computed.owner])
            for key, computed in self._layers.items()
        }

    def generate(self, prompts, rows, arguments):
        """A task's `generate`, with a row of the table for each prompt."""
        self._generating.rows = rows
        task, sampler = self._task, self._model.sampler
        if task.sampler is not sampler:  # the model was compiled with another since
            vars(task).update(sampler=sampler, generate_function=None)
        return self._task.generate(prompts, **arguments)

    @functools.cached_property
    def _task(self):
        cls = getattr(self._model, "dcft_base_class", type(self._model))
        task = keras_internals.view_as(self._model, made_class(cls, _GeneratesPerRow))
        vars(task).update(
            generate_function=None,
            dcft_calls=self.calls,
            dcft_check=self.check_rows,
            dcft_own=self._generating,
        )
        return task

    def check_rows(self, inputs, count):
        """Checks, with the first batch, that each layer's inputs are made of whole rows of it.

        Raises:
            ValueError: if they are not.
        """
        if self._is_checked or count < 2:
            return
        rng = np.random.default_rng(0)
        two = keras.tree.map_structure(lambda x: ops.convert_to_numpy(x)[:2], inputs)
        if all((x[:1] == x[1:]).all() for x in keras.tree.flatten(two)):
            two = keras.tree.map_structure(lambda x: np.stack([x[0], _another(x[0], rng)]), two)
        self._check(two)

    def _check(self, two_rows):
        both, outputs = self._inputs_of(two_rows)
        first, of_one = self._inputs_of(keras.tree.map_structure(lambda x: x[:1], two_rows))
        pairs = [
            (f"the inputs of its layer {self._places[key]}", one, two, 2 * len(one))
            for key, of_first in first.items()
            for one, two in zip(of_first, both[key])
        ]
        pairs += [("its outputs", one, two, len(two)) for one, two in zip(of_one, outputs)]
        for what, one, two, count in pairs:
            is_alike = len(two) == count and two.shape[1:] == one.shape[1:]
            if not is_alike or not np.allclose(two[: len(one)], one, rtol=1e-2, atol=1e-3):
                raise ValueError(
                    "`model` cannot have a bank: rows of the batch do not come one after the "
                    f"other, independent of each other, in {what}, of shape {two.shape} for 2 "
                    f"rows and {one.shape} for 1."
                )
        uncalled = [computed.layer for key, computed in self._layers.items() if key not in first]
        if uncalled and self._uses(uncalled, two_rows, outputs):
            raise ValueError(
                "`model` cannot have a bank: it computes with the weights of layers that it does "
                f"not call, {joined(self._places[id(layer)] for layer in uncalled)}."
            )
        self._is_checked = True

    def _uses(self, layers, batch, outputs) -> bool:
        """Whether a model's outputs are others when the weights of these layers are zero."""
        own = [v for layer in layers for v in shares.own_weights(layer) if "float" in v.dtype]
        with keras_internals.traced_with([(v, np.zeros(v.shape, "float32")) for v in own]):
            without = _as_arrays(self._model(batch, training=False))
        return not all(map(np.array_equal, outputs, without))

    def _inputs_of(self, batch) -> tuple[dict, list]:
        """What goes into each layer, by its id, and comes out of the model."""
        seen = {}

        def record(layer):
            name = "call" if layer.quantization_mode is None else "quantized_call"

            def call(inputs, *args, **kwargs):
                try:
                    array = ops.convert_to_numpy(inputs)
                except Exception as error:  # each backend has its own for what has no value yet
                    raise ValueError(
                        "`model` cannot have a bank on this backend: inside of a traced control "
                        f"flow it calls its layer {self._places[id(layer)]}."
                    ) from error
                seen.setdefault(id(layer), []).append(array)
                return getattr(type(layer), name)(layer, inputs, *args, **kwargs)

            return call

        calls = {key: record(computed.layer) for key, computed in self._layers.items()}
        with selection.diverted(calls):
            outputs = self._model(batch, training=False)
        return seen, _as_arrays(outputs)


def _another(row, rng):
    is_float = "float" in str(row.dtype)
    return (row + rng.normal(size=row.shape) if is_float else rng.permuted(row)).astype(row.dtype)


def _as_arrays(outputs) -> list:
    return [ops.convert_to_numpy(ops.cast(x, "float32")) for x in keras.tree.flatten(outputs)]


class _PerRow(keras.Model):
    """A model of a batch, and for each of its rows a row of a bank's table."""

    def __init__(self, model, calls):
        super().__init__(name="per_row", autocast=False, dtype="float32")
        self.model = model
        self.dcft_calls = calls
        self.run_eagerly, self.jit_compile = model.run_eagerly, model.jit_compile
        self.built = True

    def call(self, inputs):
        batch, rows = inputs
        with selection.diverted(self.dcft_calls(rows)):
            return self.model(batch, training=False)


class _GeneratesPerRow:
    """Mixin of the view of a task: its inputs have the rows of a bank's table with them."""

    def generate_step(self, inputs, *args, **kwargs):
        inputs = dict(inputs)
        with selection.diverted(self.dcft_calls(inputs.pop("dcft_rows"))):
            return super().generate_step(inputs, *args, **kwargs)

    def make_generate_function(self):
        function = super().make_generate_function()

        def generate(inputs, **arguments):
            self.dcft_check(inputs, len(self.dcft_own.rows))
            rows = ops.convert_to_tensor(self.dcft_own.rows)
            return function({**inputs, "dcft_rows": rows}, **arguments)

        return generate
