"""The one place where this package reaches into Keras beyond its public API.

Each function says why the public API does not do; `tests/keras_internals_test.py` breaks when
Keras changes what they rely on (Keras 3.13 to 3.16).
"""

import contextlib
import functools
import gc
import itertools

import keras
import numpy as np
from keras import ops
from keras.src.backend import distribution_lib
from keras.src.backend.common import global_state, masking, stateless_scope
from keras.src.trainers import compile_utils
from keras.src.utils import naming, tracking

# Where a layer keeps the variables that are its own and not its sublayers'.
VARIABLE_LISTS = ("_trainable_variables", "_non_trainable_variables")


@contextlib.contextmanager
def unlocked(layer):
    """Lets variables be added to a built layer, whose tracker Keras has locked.

    `Dense.enable_lora` does the same; there is no public way to add a weight after `build`.
    """
    was_locked = layer._tracker.locked
    layer._tracker.unlock()
    try:
        yield
    finally:
        if was_locked:
            layer._lock_state()


def sublayers(layer) -> list:
    """The layers directly below a layer: those of a functional model's graph, then the others.

    `Layer` has no public list of sublayers; `Model.layers` exists for models only and leaves out
    what a task or a composite layer holds. On torch a KerasHub backbone tracks its graph alone, so
    that comes first, and a layer in it has the same place below it on every backend.
    """
    graph = [op for op in getattr(layer, "operations", []) if isinstance(op, keras.layers.Layer)]
    in_graph = {id(op) for op in graph}
    return [*graph, *(below for below in layer._layers if id(below) not in in_graph)]


def automatic_name(cls) -> str:
    """The name that Keras gives to an unnamed layer of a class, before it numbers it.

    Numbers depend on what else was made in the process, so a path that is to be the same in the
    next process must be able to tell a numbered automatic name from a chosen one.
    """
    return _snake_case(cls.__name__)


_snake_case = functools.cache(naming.to_snake_case)


def own_trainable_variables(layer) -> list:
    """The variables of this layer alone that `layer.trainable = ...` reaches."""
    return list(layer._trainable_variables)


def own_weights(layer) -> list:
    """The weights of this layer alone; `layer.weights` has those of its sublayers too."""
    return [*layer._trainable_variables, *layer._non_trainable_variables]


def freeze_variables(layer) -> list:
    """Freezes a layer's own variables so that no later `trainable = True` thaws them.

    Setting `trainable` on a layer or on any of its parents sets it on every variable that the
    layer tracks as trainable. A variable tracked as non-trainable is out of its reach, so these are
    moved from the one list to the front of the other: that keeps their order, by which Keras
    saves and loads them.

    Returns:
        The variables.
    """
    # A float8 layer's scales are no weights: Keras writes them through the gradients' place, and
    # a layer that is used must go on measuring them.
    variables = [v for v in own_trainable_variables(layer) if not v.overwrite_with_gradient]
    _move_variables(layer, variables, "trainable_variables", "non_trainable_variables")
    for variable in variables:
        variable.trainable = False
    return variables


def thaw_variables(layer, variables, flags):
    """Undoes `freeze_variables`: the variables are trainable ones again, each with its own flag."""
    _move_variables(layer, variables, "non_trainable_variables", "trainable_variables")
    for variable, flag in zip(variables, flags):
        variable.trainable = flag


def _move_variables(layer, variables, source, target):
    tracker = layer._tracker
    _, source_list = tracker.config[source]
    _, target_list = tracker.config[target]
    moved = [v for v in variables if id(v) in tracker.stored_ids[source]]
    ids = {id(v) for v in moved}
    source_list[:] = [v for v in source_list if id(v) not in ids]
    target_list[:0] = moved
    tracker.stored_ids[source] -= ids
    tracker.stored_ids[target] |= ids


def view_as(layer, cls, without=()):
    """An object of another class with a layer's state, but for this package's, and some variables.

    Keras counts and writes a layer's variables by two lists of its own, from which what is left out
    has to go. The layer itself is not touched, so that another thread may use it meanwhile.

    Args:
        layer: a Keras layer.
        cls: the class of the view; no constructor is run.
        without: variables.
    """
    view = object.__new__(cls)
    ours = ("call", "quantized_call") if "_dcft_diverted" in vars(layer) else ()
    state = {n: value for n, value in vars(layer).items() if "dcft" not in n and n not in ours}
    hidden = {id(variable) for variable in without}
    for name in VARIABLE_LISTS:
        state[name] = [v for v in state[name] if id(v) not in hidden]
    vars(view).update(state, dcft_is_view=True)
    return view


def serialized_view(view) -> dict:
    """The serialisation of a view, of which Keras keeps no record.

    Keras tells by the `id` what it has serialized before, to have it once when it is loaded; of an
    object that is gone by then the next one may have the same.
    """
    config = keras.saving.serialize_keras_object(view)
    recorded = global_state.get_global_attribute("shared_objects/id_to_config_map")
    if recorded is not None:
        recorded.pop(id(view), None)
    return config


def keep_state(layer, view):
    """Takes over what was set on a view, but for the lists that are the layer's own."""
    of_the_view = (*VARIABLE_LISTS, "dcft_is_view", "_trainable")
    vars(layer).update({k: v for k, v in vars(view).items() if k not in of_the_view})


def track_variable(layer, variable):
    """Makes another layer's variable one of a layer's own too, which assigning it would do."""
    layer._track_variable(variable)


def untrack_variable(layer, variable):
    """Undoes it.

    `del layer.attribute` does that and then runs a full garbage collection, hundreds of which a
    large model would have to wait for.
    """
    layer._untrack_variable(variable)


def track_seed(layer, seed):
    """Lets Keras carry a seed generator's state through compiled functions."""
    layer._tracker.track(seed)


def untrack_seed(layer, seed):
    """Undoes it."""
    layer._tracker.untrack(seed)


def set_trainable_flag(layer, value: bool):
    """Sets one layer's own flag; the public setter would set it on everything below as well."""
    layer._trainable = value


def layout_of(variable):
    """The `TensorLayout` of a variable that was made under `keras.distribution`, or None.

    Keras keeps it with the variable and asks nobody again, but has no public name for it. Up to
    Keras 3.13 it keeps JAX's form of it there.
    """
    layout = getattr(variable, "_layout", None)
    if not hasattr(layout, "spec"):
        return layout
    shape, devices = layout.mesh.devices.shape, layout.mesh.devices.flat
    names = [f"{device.platform}:{device.id}" for device in devices]
    mesh = keras.distribution.DeviceMesh(shape, layout.mesh.axis_names, names)
    axes = (*layout.spec, *[None] * (len(variable.shape) - len(layout.spec)))
    return keras.distribution.TensorLayout(axes, mesh)


def set_layout(variable, layout):
    """Has a variable lie on devices in another way from now on; Keras decides it once for all."""
    is_jaxs = hasattr(variable._layout, "spec")
    variable._layout = layout.backend_layout if is_jaxs else layout
    variable.assign(variable.value)


def layouts_by_pattern(distribution) -> dict:
    """The layouts of a `ModelParallel` distribution by their patterns; none of any other.

    It has its map to itself, and tells in public only what a path gets, be it by an entry for this
    very path or by a pattern, or an error where two match.
    """
    layout_map = getattr(distribution, "_layout_map", None)
    return {} if layout_map is None else {key: layout_map[key] for key in layout_map}


def as_array(value):
    """A variable or tensor as a NumPy array, wherever it lies, for this process to keep.

    What lies in parts on several devices is read part by part and is never whole on one. Of what
    other processes have parts of, JAX alone has such, `ops.convert_to_numpy` is an error; that is
    made whole on all devices first, so each process has to call this.
    """
    tensor = ops.convert_to_tensor(value)
    if not getattr(tensor, "is_fully_addressable", True) and not tensor.is_fully_replicated:
        sharding = tensor.sharding
        whole = type(sharding)(sharding.mesh, type(sharding.spec)())
        tensor = keras.distribution.distribute_tensor(tensor, whole)
    return ops.convert_to_numpy(tensor).copy()


def array_in_place(variable):
    """A variable as a NumPy array for a look, or None where it lies on another device than a CPU.

    Where the backend can, it is not copied. Keras does not tell where a tensor lies.
    """
    tensor = ops.convert_to_tensor(variable.value)
    devices = tensor.devices() if keras.config.backend() == "jax" else {str(tensor.device)}
    is_distributed = hasattr(tensor, "placements")  # a `DTensor` of PyTorch's
    if is_distributed or len(devices) != 1 or "cpu" not in str(*devices).lower():
        return None
    if keras.config.backend() == "torch":
        # Not as `tensor.numpy()`, after which its storage cannot be resized: FSDP does that.
        return np.from_dlpack(tensor.detach())
    return np.asarray(tensor)


def is_first_process() -> bool:
    """Whether this is the process, of those that JAX may have made one cluster, to write files.

    A `keras.distribution` object knows it, but keeps it to itself; the backend tells without one.
    """
    process_id = getattr(distribution_lib, "process_id", None)
    return process_id is None or process_id() == 0


def is_traced(variable) -> bool:
    """Whether a function is being traced right now, in which `assign` would mean something else."""
    if keras.config.backend() == "torch":
        return False
    if stateless_scope.in_stateless_scope():
        return True
    try:
        ops.convert_to_numpy(variable)
    except NotImplementedError:  # of TensorFlow's symbolic tensors
        return True
    return False


@contextlib.contextmanager
def traced_with(values):
    """In what is traced inside this context, variables have other values.

    In a `StatelessScope`, JAX's way, that is what `assign` does. TensorFlow's functions assign to
    the variables when they run, which other threads would see, and the variables would get the
    gradients of what is computed with the other values; so there a scope is opened, whose other
    updates, such as those of seeds, are made when it ends.
    """
    values = [(variable, ops.convert_to_tensor(value)) for variable, value in values]
    scope = stateless_scope.get_stateless_scope()
    if scope is None:
        with _Overlay(values) as overlay:
            yield
        for variable, value in overlay.updates.values():
            variable.assign(value)
        return
    # Not as updates, which a block around this one would make when it ends.
    before = [(variable, scope.get_current_value(variable)) for variable, _ in values]
    scope.state_mapping.update((id(variable), value) for variable, value in values)
    try:
        yield
    finally:
        for variable, value in before:
            scope.state_mapping.pop(id(variable))
            if value is not None:
                scope.state_mapping[id(variable)] = value


class _Overlay(keras.StatelessScope):
    """A scope that knows the variables that it has updates of, and not their ids alone."""

    def __init__(self, values):
        super().__init__(values)
        self.updates = {}

    def add_update(self, update):
        super().add_update(update)
        self.updates[id(update[0])] = update


def exchange_value(variable, value):
    """Gives a variable another value, and returns what `put_value_back` needs.

    On PyTorch the tensor itself is exchanged: a value that was written into it would change what
    autograd keeps of an earlier forward pass, whose backward pass then fails.
    """
    if keras.config.backend() == "torch":
        kept = variable._value
        variable._value = ops.convert_to_tensor(value, dtype=variable.dtype)
        return kept
    kept = as_array(variable)
    variable.assign(value)
    return kept


def kept_value(kept, value):
    """What `exchange_value` returned, with another value in it."""
    if keras.config.backend() == "torch":
        kept.data.copy_(ops.convert_to_tensor(value, dtype=kept.dtype))
        return kept
    return ops.convert_to_numpy(value).copy()


def put_value_back(variable, kept):
    """Undoes `exchange_value`."""
    if keras.config.backend() == "torch":
        variable._value = kept
    else:
        variable.assign(kept)


def strategy_scope(model):
    """The scope of the TensorFlow strategy that a model was made in; elsewhere one of no effect.

    Variables and optimizers of a mirrored model must be made in it. A Keras model knows its
    strategy, and outside of any the present one, by a property that is not documented.

    Raises:
        ValueError: inside the scope of a strategy that the model was not made in.
    """
    if keras.config.backend() != "tensorflow" or not isinstance(model, keras.Model):
        return contextlib.nullcontext()
    own, present = model._distribute_strategy, model.distribute_strategy
    if own is None and not type(present).__name__.startswith("_Default"):
        raise ValueError(
            "Leave the scope of the strategy, or make the model in it: its variables do not "
            f"belong to it. Received: model '{model.name}' in the scope of {present!r}"
        )
    return contextlib.nullcontext() if own is None else own.scope()


def build_optimizer(model):
    """Makes the optimizer's variables before TensorFlow traces the first step.

    Else they are made in it, and TensorFlow traces a function that makes variables twice. The other
    backends' trainers do so, and TensorFlow's for models made in a strategy, which it knows by this
    attribute. A model that has layers to be built would get more variables in the step.
    """
    if keras.config.backend() != "tensorflow" or model._distribute_strategy is not None:
        return
    optimizer = getattr(model, "optimizer", None)  # none before it is compiled
    if optimizer is None or optimizer.built or not all(x.built for x in model._flatten_layers()):
        return
    optimizer.build(model.trainable_variables)


def track_torch_parameters(layers):
    """Makes PyTorch see the present variables of these layers; does nothing on other backends.

    `parameters()` and `state_dict()` of a layer, and of a PyTorch module around it, go by a
    `ParameterDict` of all variables in it that was made when it was built. Keras keeps up to date
    only that of the layer to which a variable is added, not those of the layers around it, and
    offers no public way to make it anew.
    """
    for layer in layers:
        if hasattr(layer, "_torch_params"):
            layer._track_variables()


def check_config_is_for_keras_file():
    """Raises ValueError while Keras writes a whole model as HDF5, which nothing public tells.

    Such a file has the weights without their names, in an order that adapting changes.
    """
    if global_state.get_global_attribute("use_legacy_config"):
        raise ValueError(
            "Save models with adapted layers as `.keras`: an HDF5 file of a whole model cannot "
            "hold them."
        )


def set_mask(tensor, mask):
    """Attaches a mask to a tensor, or does nothing for None.

    `ReversibleEmbedding` does so in its `call`, since only one of its two directions has a mask;
    the public way, `compute_mask`, cannot tell them apart.
    """
    if mask is not None:
        masking.set_keras_mask(tensor, mask)


def wrap_quantize(layer, check, **arguments):
    """Puts a check of the mode before a layer's or model's `quantize`, and arguments into it.

    Before Keras 3.16 every layer object has a `quantize` of its own, bound to the class that it was
    made with, so neither another class nor a method of it has any say.
    """
    original = layer.quantize

    @functools.wraps(original)
    def quantize(mode=None, config=None, **kwargs):
        check(layer, mode or getattr(config, "mode", None))
        return original(mode=mode, config=config, **{**kwargs, **arguments})

    quantize.bound = vars(layer).get("quantize")
    layer.quantize = quantize


def unwrap_quantize(layer):
    """Undoes `wrap_quantize`, if it was done."""
    quantize = vars(layer).get("quantize")
    if hasattr(quantize, "bound"):
        del layer.quantize
        if quantize.bound is not None:
            layer.quantize = quantize.bound


def metric_direction(model, name: str) -> str | None:
    """Whether a metric is to go "up" or "down"; None if no metric of the model tells.

    `mode="auto"` of Keras's callbacks reads the same `_direction`, but of compiled metrics alone,
    when they are built, which on TensorFlow they are not before the first batch.

    Args:
        model: a Keras model.
        name: str, the name under which the metric is logged, without `val_`.
    """
    compiled = getattr(model, "_compile_metrics", None)
    given = []
    if compiled is not None:
        given = keras.tree.flatten([compiled._user_metrics, compiled._user_weighted_metrics])
    target = keras.KerasTensor((1, 1))  # its shape decides which accuracy "accuracy" is
    metrics = [compile_utils.get_metric(m, target, target) for m in given if m is not None]
    names = [name, *(name.removeprefix(f"{o}_") for o in getattr(model, "output_names", []))]
    directions = {
        getattr(metric, "_direction", None)
        for metric in [*model.metrics, *metrics]
        if metric.name in names
    }
    return directions.pop() if len(directions) == 1 else None


def models_holding(layers) -> list:
    """Every live Keras model of which one of these layers is a part.

    A model knows the layers below it, but no layer knows its parents, and a task or functional
    model that was compiled around a backbone before the backbone was adapted would go on running
    the function that it had traced then.

    The models are found as what refers to their class, which is slow for many classes, so first it
    is seen which classes have instances at all. Neither step keeps a reference to anything but
    models: a reference to a tuple that another thread is about to fill makes it fail there
    (TensorFlow: "Error while creating shape"), which rules out going through `gc.get_objects()`.
    Models that the caller has put out of the collector's sight with `gc.freeze` are not found.
    """
    classes = {id(cls): cls for cls in with_subclasses(keras.Model)}
    # Only lazy C functions, so that no other thread runs while the list of all objects is there.
    everything = itertools.chain.from_iterable(map(gc.get_objects, [None]))
    present = set(filter(classes.__contains__, map(id, map(type, everything))))
    wanted = {id(layer) for layer in layers}
    return [
        candidate
        for candidate in gc.get_referrers(*(classes[key] for key in present))
        if id(type(candidate)) in present
        and hasattr(candidate, "_layers")
        and "dcft_is_view" not in vars(candidate)
        and any(id(layer) in wanted for layer in candidate._flatten_layers())
    ]


def with_subclasses(cls) -> set:
    """A class and all that derive from it."""
    classes, found = {cls}, [cls]
    while found:
        found = [below for cls in found for below in cls.__subclasses__()]
        classes.update(found)
    return classes


# What Keras and KerasHub compile for a model.
FUNCTIONS = ("train_function", "test_function", "predict_function", "generate_function")


def reset_compiled_state(model, functions=FUNCTIONS):
    """Makes a model's next `fit`, `predict` and `generate` see its present variables.

    Dropped are the functions traced for the old variables (`predict` makes one in a model that was
    never compiled as well) and the optimizer's slots for them; the optimizer is made anew from its
    own configuration. `model.compile()` would do it, but what a model was compiled with cannot be
    asked back from it in public.

    Args:
        model: a Keras model.
        functions: names of those to drop.
    """
    for function in functions:
        if hasattr(model, function):
            setattr(model, function, None)
    if not model.compiled:
        return
    # As in `compile`, nothing of this is to be tracked as a part of the model.
    with tracking.DotNotTrackScope():
        if hasattr(model, "_compiled_trainable_state"):  # since Keras 3.14
            flags = {layer: layer.trainable for layer in model._flatten_layers()}
            model._compiled_trainable_state = flags
        optimizer = model.optimizer
        if optimizer is None or not optimizer.built:
            return
        model.optimizer = type(optimizer).from_config(optimizer.get_config())
        inner = getattr(model.optimizer, "inner_optimizer", model.optimizer)
        # What `exclude_from_weight_decay` was told, if it was, is in no configuration.
        told = vars(getattr(optimizer, "inner_optimizer", optimizer))
        for name in ("_exclude_from_weight_decay", "_exclude_from_weight_decay_pattern"):
            if name in told:
                setattr(inner, name, told[name])
        passed = model._compile_config.config["optimizer"]
        is_wrapped = type(passed) is not type(optimizer)
        model._compile_config.config["optimizer"] = inner if is_wrapped else model.optimizer


def restart_optimizer(model):
    """Gives the state of a model's optimizer the values that it begins with.

    Compiled functions use the optimizer's variables, so there a new one is of no use.
    """
    optimizer = model.optimizer if model.compiled else None
    if optimizer is None or not optimizer.built:
        return
    beginning = type(optimizer).from_config(optimizer.get_config())
    beginning.build(model.trainable_variables)
    for variable, value in zip(optimizer.variables, beginning.variables):
        variable.assign(value)


def divert(layer, diversion_of):
    """Lets something else compute a layer now and then; `undivert` undoes it.

    A method of the object itself, beside which the class stays what it is, so that a file that is
    written meanwhile says nothing of it. Keras calls one of two methods, as the layer's weights are
    quantized or not.

    Args:
        layer: a Keras layer.
        diversion_of: function of the layer that returns another one, of the call's arguments, or
            None for the layer's own.
    """
    count = vars(layer).get("_dcft_diverted", 0)
    vars(layer)["_dcft_diverted"] = count + 1
    if count:
        return

    def method(name):
        def call(*args, **kwargs):
            diversion = diversion_of(layer) or functools.partial(getattr(type(layer), name), layer)
            return diversion(*args, **kwargs)

        return call

    for name in ("call", "quantized_call"):
        vars(layer)[name] = method(name)


def undivert(layer):
    """Undoes `divert`, when it was called as often."""
    vars(layer)["_dcft_diverted"] -= 1
    if vars(layer)["_dcft_diverted"]:
        return
    for name in ("_dcft_diverted", "call", "quantized_call"):
        del vars(layer)[name]
