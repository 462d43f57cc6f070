import keras
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from keras import ops
from tools import array, outputs_and_gradients, values

from keras_dcft import DCFTDense, DCFTEinsumDense
from keras_dcft.adapter import ADAPTER_VARIABLES
from keras_dcft.einsum import einsum_axes
from keras_dcft.increments import parameter_count

BACKEND = keras.backend.backend()

# For layers whose values NumPy draws: JAX compiles a random generator anew for each shape.
NOT_DRAWN = {"kernel_initializer": "zeros", "factor_initializer": "zeros"}

# Every way in which kernel axes are placed in KerasHub's EinsumDense layers, and a few more.
EQUATIONS = [
    "ab,bc->ac",
    "abc,cd->abd",
    "abc,cde->abde",
    "btd,ndh->btnh",
    "btnh,nhd->btd",
    "abcd,cde->abe",
    "ibnd,hnd->ibh",
    "abc,bd->adc",
    "abc,cdef->abdef",
    "...x,xy->...y",
    "ab...,bc->ac...",
    "abc,cd->ad",
]


def reference(base, adapter, scale, equation, inputs, cotangent):
    """A dense layer with a DCFT increment in float64 PyTorch, sharing no code with the package.

    Returns the effective kernel, the outputs, and the gradients of `sum(outputs * cotangent)`.
    """
    base, inputs, cotangent, a, b, k = (
        torch.tensor(x, dtype=torch.float64) for x in (base, inputs, cotangent, *adapter)
    )
    adapter = [x.requires_grad_() for x in (a, b, k)]
    image = torch.nn.functional.conv_transpose2d((a @ b)[None, None], k[None, None], stride=len(k))
    input_axes, rest = equation.split(",")
    kernel_axes, output_axes = rest.split("->")
    rows = [axis for axis in kernel_axes if axis in input_axes]
    columns = [axis for axis in kernel_axes if axis in output_axes]
    size = dict(zip(kernel_axes, base.shape))
    shape = [size[axis] for axis in rows + columns]
    height = int(np.prod(shape[: len(rows)]))
    width = int(np.prod(shape[len(rows) :]))
    increment = image[0, 0, :height, :width].reshape(shape)
    order = [(rows + columns).index(axis) for axis in kernel_axes]
    kernel = base + scale * increment.permute(order)
    outputs = torch.einsum(equation, inputs, kernel)
    gradients = torch.autograd.grad((outputs * cotangent).sum(), adapter)
    return [x.detach().numpy() for x in (kernel, outputs, *gradients)]


def assert_equals_reference(layer, equation, inputs, output_shape, seed):
    rng = np.random.default_rng(seed)
    adapter = [getattr(layer, name) for name in ADAPTER_VARIABLES]
    for variable in (layer._kernel, *adapter):
        variable.assign(rng.normal(size=variable.shape))
    cotangent = rng.normal(size=output_shape).astype("float32")
    outputs, gradients = outputs_and_gradients(layer, inputs, cotangent, ADAPTER_VARIABLES)
    arguments = [
        array(layer._kernel),
        values(adapter),
        layer.dcft_settings.scale,
        equation,
        inputs,
        cotangent,
    ]
    expected = reference(*arguments)
    # A sum whose terms cancel is only as exact as its terms are large: the same computation on
    # absolute values tells how large.
    arguments = [np.abs(x) if isinstance(x, np.ndarray) else x for x in arguments]
    arguments[1] = [np.abs(x) for x in arguments[1]]
    magnitudes = reference(*arguments)

    assert layer.compute_output_shape(inputs.shape) == tuple(output_shape)
    found = [array(layer.kernel), outputs, *gradients]
    for actual, wanted, magnitude in zip(found, expected, magnitudes):
        assert actual.shape == wanted.shape
        assert np.all(np.abs(actual - wanted) <= 1e-5 * np.abs(magnitude).max())


@given(st.integers(1, 24), st.integers(1, 24), st.integers(1, 3), st.data())
def test_dense_equals_the_reference(input_dim, units, rank, data):
    kernel_size = data.draw(st.integers(1, min(input_dim, units)))
    seed = data.draw(st.integers(0, 10**6))
    layer = DCFTDense(units, kernel_size=kernel_size, rank=rank, use_bias=False, **NOT_DRAWN)
    layer.build((None, input_dim))
    inputs = np.random.default_rng(seed).normal(size=(3, input_dim)).astype("float32")
    assert_equals_reference(layer, "ab,bc->ac", inputs, (3, units), seed)


@st.composite
def valid_equations(draw):
    """Any equation without ellipsis whose kernel is a matrix: axes in any number and order.

    Keras wants the batch axis first on both sides. Ellipses stay with the fixed equations: the
    gradient of `tf.einsum` by itself (TensorFlow 2.21, CPU) writes over memory for some of them,
    such as `...dgecb,fed->...bcf` with two leading axes.
    """
    letters = iter("bcdefghij")
    kept, contracted, produced, summed = (
        [next(letters) for _ in range(draw(st.integers(least, most)))]
        for least, most in ((0, 2), (0, 2), (1, 2), (0, 1))
    )
    inputs, kernel, outputs = (
        "".join(draw(st.permutations(axes)))
        for axes in (kept + contracted + summed, contracted + produced, kept + produced)
    )
    return f"a{inputs},{kernel}->a{outputs}"


@given(st.sampled_from(EQUATIONS), st.integers(1, 3), st.data())
def test_einsum_dense_equals_the_reference(equation, rank, data):
    assert_equation_equals_reference(equation, rank, data)


@given(valid_equations(), st.integers(1, 3), st.data())
def test_random_equations_equal_the_reference(equation, rank, data):
    assert_equation_equals_reference(equation, rank, data)


def assert_equation_equals_reference(equation, rank, data):
    plain = equation.replace("...", "ZY" if equation.startswith("...") else "Z")
    inputs, rest = plain.split(",")
    kernel, outputs = rest.split("->")
    axes = sorted(set(plain) - set(",->"))
    size = {axis: data.draw(st.integers(1, 5), label=axis) for axis in axes}
    rows = int(np.prod([size[axis] for axis in kernel if axis in inputs]))
    columns = int(np.prod([size[axis] for axis in kernel if axis in outputs]))
    kernel_size = data.draw(st.integers(1, min(rows, columns)))
    seed = data.draw(st.integers(0, 10**6))
    given_shape = [size[c] for c in equation.split("->")[1].replace("...", "")]
    given_shape = given_shape if equation.startswith("...") else given_shape[1:]
    arguments = {"kernel_size": kernel_size, "rank": rank, **NOT_DRAWN}
    layer = DCFTEinsumDense(equation, tuple(given_shape), **arguments)
    x = np.random.default_rng(seed).normal(size=[size[c] for c in inputs]).astype("float32")
    layer.build(x.shape)
    assert layer.dcft_adapter.matrix_shape == (rows, columns)
    assert_equals_reference(layer, plain, x, [size[c] for c in outputs], seed)


def test_shared_axis_is_refused():
    with pytest.raises(ValueError, match=r"shared axes \['n'\]"):
        DCFTEinsumDense("bnd,ndh->bnh", (4, 5))


def test_keras_agrees_on_which_axes_are_contracted():
    axes = einsum_axes("ibnd,hnd->ibh")
    assert (axes.contracted, axes.outputs) == ("nd", "h")


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_start_is_the_base_layer_bit_for_bit(rng, activation):
    layer = DCFTDense(24, activation=activation, bias_initializer="normal")
    inputs = rng.normal(size=(5, 32)).astype("float32")
    outputs = array(layer(inputs))
    base = keras.layers.Dense(24, activation=activation)
    base.build((None, 32))
    base.set_weights([array(layer._kernel), array(layer.bias)])
    np.testing.assert_array_equal(outputs, array(base(inputs)))
    np.testing.assert_array_equal(array(layer.kernel), array(base.kernel))


def test_after_one_step_every_adapter_variable_has_a_gradient(rng):
    layer = DCFTDense(24)
    model = keras.Sequential([keras.Input((32,)), layer])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    x, y = rng.normal(size=(8, 32)), rng.normal(size=(8, 24))
    model.fit(x, y, verbose=0)
    cotangent = rng.normal(size=(8, 24)).astype("float32")
    _, gradients = outputs_and_gradients(layer, x.astype("float32"), cotangent, ADAPTER_VARIABLES)
    for gradient in gradients:
        assert np.abs(gradient).max() > 0


def test_variables_are_few_float32_and_the_only_trained_ones():
    layer = DCFTDense(20, kernel_size=8, rank=2, dtype="bfloat16")
    layer.build((None, 30))
    assert [v.name for v in layer.trainable_variables] == list(ADAPTER_VARIABLES)
    assert [tuple(v.shape) for v in layer.trainable_variables] == [(4, 2), (2, 3), (8, 8)]
    assert {v.dtype for v in layer.trainable_variables} == {"float32"}
    assert [v.name for v in layer.non_trainable_variables] == ["kernel", "bias"]
    assert {v.dtype for v in layer.non_trainable_variables} == {"bfloat16"}
    count = sum(int(np.prod(v.shape)) for v in layer.trainable_variables)
    assert count == parameter_count(30, 20, 8, rank=2)


def test_base_stays_frozen_however_trainable_is_toggled():
    inner = keras.Sequential([DCFTDense(16)])
    model = keras.Sequential([keras.Input((16,)), inner])
    layer = inner.layers[0]
    for target in (model, inner, layer):
        target.trainable = False
        assert layer.trainable_variables == []
        target.trainable = True
        assert [v.name for v in model.trainable_variables] == list(ADAPTER_VARIABLES)
    assert not layer._kernel.trainable
    assert not layer.bias.trainable


def test_factors_of_equal_shape_start_differently():
    first, second = DCFTDense(32), DCFTDense(32)
    first.build((None, 32))
    second.build((None, 32))
    starts = values([first.dcft_a, second.dcft_a])
    starts += [array(first.dcft_b).T, array(second.dcft_b).T]
    for i in range(4):
        for j in range(i):
            assert np.abs(starts[i] - starts[j]).max() > 0


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "bfloat16"])
def test_low_precision_computes_in_the_compute_dtype(rng, policy):
    layer = DCFTDense(24, dtype=policy, filter_initializer="random_normal")
    outputs = layer(rng.normal(size=(4, 32)).astype("float32"))
    compute_dtype = keras.DTypePolicy(policy).compute_dtype
    assert keras.backend.standardize_dtype(outputs.dtype) == compute_dtype
    assert np.isfinite(array(ops.cast(outputs, "float32"))).all()
    assert layer.dcft_a.dtype == "float32"
    variable_dtype = keras.DTypePolicy(policy).variable_dtype
    assert keras.backend.standardize_dtype(layer.kernel.dtype) == variable_dtype


def test_mask_is_passed_on():
    inputs = keras.Input((6,), dtype="int32")
    embedded = keras.layers.Embedding(10, 8, mask_zero=True)(inputs)
    outputs = DCFTDense(8)(embedded)
    assert outputs._keras_mask is not None


def test_dropout_acts_on_the_increment_in_training_only(rng):
    layer = DCFTDense(32, dropout=0.5, filter_initializer="random_normal")
    inputs = rng.normal(size=(4, 32)).astype("float32")
    np.testing.assert_array_equal(array(layer(inputs)), array(layer(inputs)))
    assert np.abs(array(layer(inputs, training=True)) - array(layer(inputs))).max() > 0
    layer.dcft_filter.assign(np.zeros((8, 8)))
    np.testing.assert_array_equal(array(layer(inputs, training=True)), array(layer(inputs)))


@pytest.mark.parametrize("training", [False, True])
def test_regularizer_reaches_the_loss_only_if_asked_for(rng, training):
    plain, penalized = DCFTDense(16), DCFTDense(16, orthogonality=0.1)
    for layer in (plain, penalized):
        layer(rng.normal(size=(2, 16)).astype("float32"), training=training)
    assert plain.losses == []
    a, b = array(penalized.dcft_a), array(penalized.dcft_b)
    expected = 0.05 * (np.linalg.norm(a.T @ a - 1) + np.linalg.norm(b @ b.T - 1))
    assert float(sum(penalized.losses)) == pytest.approx(expected, rel=1e-5)


def test_effective_kernel_is_differentiable():
    class ReadsKernel(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.dense = DCFTDense(16, use_bias=False)

        def build(self, shape):
            self.dense.build(shape)

        def call(self, inputs):
            return ops.matmul(inputs, self.dense.kernel)

    layer = ReadsKernel()
    model = keras.Sequential([keras.Input((16,)), layer])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    before = values(layer.trainable_variables)
    model.fit(np.ones((4, 16)), np.ones((4, 16)), epochs=2, verbose=0)
    for old, variable in zip(before, layer.trainable_variables):
        assert np.abs(old - array(variable)).max() > 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: DCFTDense(
            12, kernel_size=3, rank=2, alpha=2, dropout=0.1, orthogonality=0.2, activation="relu"
        ),
        lambda: DCFTEinsumDense("abc,cde->abde", (None, 3, 4), kernel_size=2, bias_axes="de"),
    ],
)
def test_config_round_trip(make):
    layer = make()
    restored = keras.layers.deserialize(keras.layers.serialize(layer))
    assert type(restored) is type(layer)
    config = restored.get_config()
    assert config == layer.get_config()
    for key in ("kernel_size", "rank", "alpha", "dropout", "orthogonality"):
        assert key in config


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kernel_size": 0}, ValueError, "Received: kernel_size=0"),
        ({"kernel_size": True}, TypeError, "Received: kernel_size=True"),
        ({"kernel_size": 2.0}, TypeError, "Received: kernel_size=2.0"),
        ({"rank": 0}, ValueError, "Received: rank=0"),
        ({"rank": 1.5}, TypeError, "Received: rank=1.5"),
        ({"alpha": 0}, ValueError, "Received: alpha=0"),
        ({"alpha": float("nan")}, ValueError, "Received: alpha=nan"),
        ({"dropout": 1.0}, ValueError, "Received: dropout=1.0"),
        ({"orthogonality": -1}, ValueError, "Received: orthogonality=-1"),
        ({"orthogonality": "much"}, TypeError, "Received: orthogonality='much'"),
        ({"kernel_constraint": "non_neg"}, ValueError, "Received: kernel_constraint='non_neg'"),
        ({"lora_rank": 2}, ValueError, "Received: lora_rank=2"),
        ({"units": 0}, ValueError, "Received: units=0"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message.replace(".", r"\.")):
        DCFTDense(**{"units": 16, **arguments})


def test_kernel_size_larger_than_the_kernel_is_refused_when_building():
    with pytest.raises(ValueError, match=r"kernel_size=8 for layer 'small' .* 16 x 4"):
        DCFTDense(4, name="small").build((None, 16))


def test_lora_on_top_is_refused():
    layer = DCFTDense(16)
    layer.build((None, 16))
    with pytest.raises(ValueError, match="cannot have LoRA as well"):
        layer.enable_lora(1)


def test_repr_tells_what_is_adapted():
    layer = DCFTDense(16, name="query")
    assert "name=query, kernel_size=8, rank=1" in repr(layer)
    layer.build((None, 24))
    assert "kernel=24x16" in repr(layer)


# --- no tensor of the kernel's size is formed in a training step ---

# What frozen weights go through as well, and what computes nothing anew.
LAYOUT = {
    "jax": {"stop_gradient", "transpose"},
    "tensorflow": {"ReadVariableOp", "Cast", "Identity", "StopGradient", "Transpose", "Reshape"},
    "torch": {"t", "transpose", "detach", "view", "permute", "unsqueeze"},
}[BACKEND]


def assert_forms_no_full_matrix(layer, inputs, **arguments):
    """Asserts that all in a training step is smaller than the frozen weight, but for itself."""
    shapes = training_shapes(layer, inputs, **arguments)
    assert any(shape[-1:] == layer.dcft_adapter.matrix_shape[-1:] for shape in shapes)
    for shape in shapes:
        sizes = [size or len(inputs) for size in shape]
        assert np.prod(sizes, dtype=int) < np.prod(layer.dcft_adapter.matrix_shape), shape


def training_shapes(layer, inputs, **arguments):
    """Shapes of all that a training step computes, as far as this backend can tell.

    The frozen weight itself has the shape looked for, so what only moves it is left out. The loss
    is derived with respect to the inputs too, where it can be: a layer inside a network has to
    pass a gradient on.
    """
    find = {"jax": _jax_shapes, "tensorflow": _tensorflow_shapes, "torch": _torch_shapes}[BACKEND]
    return find(layer, inputs, inputs.dtype.kind == "f", arguments)


def _jax_shapes(layer, inputs, is_derivable, arguments):
    import jax

    fixed = [v.value for v in layer.non_trainable_variables]

    def loss(trainable, x):
        outputs, _ = layer.stateless_call(trainable, fixed, x, **arguments)
        return ops.sum(outputs**2)

    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1) if is_derivable else 0))(
        [v.value for v in layer.trainable_variables], inputs
    )

    def equations(jaxpr):
        for equation in jaxpr.eqns:
            yield equation
            for inner in jax.core.jaxprs_in_params(equation.params):
                yield from equations(inner)

    return [
        tuple(variable.aval.shape)
        for equation in equations(jaxpr.jaxpr)
        if equation.primitive.name not in LAYOUT
        for variable in equation.outvars
    ]


def _tensorflow_shapes(layer, inputs, is_derivable, arguments):
    import tensorflow as tf

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            sources = [v.value for v in layer.trainable_variables]
            if is_derivable:
                tape.watch(x)
                sources.append(x)
            loss = ops.sum(layer(x, **arguments) ** 2)
        return tape.gradient(loss, sources)

    # Only what the results need is run: einsums leave the frozen kernel's gradient in the graph.
    needed, left = set(), list(step.get_concrete_function(tf.constant(inputs)).graph.outputs)
    while left:
        operation = left.pop().op
        if operation not in needed:
            needed.add(operation)
            left.extend(operation.inputs)
    return [
        tuple(tensor.shape)
        for operation in needed
        if operation.type not in LAYOUT
        for tensor in operation.outputs
        if tensor.shape.rank is not None
    ]


def _torch_shapes(layer, inputs, is_derivable, arguments):
    from torch.utils._python_dispatch import TorchDispatchMode

    shapes = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            outputs = function(*args, **(kwargs or {}))
            if function.overloadpacket.__name__ not in LAYOUT:
                found = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
                shapes.extend(tuple(x.shape) for x in found if isinstance(x, torch.Tensor))
            return outputs

    x = torch.tensor(inputs, requires_grad=is_derivable)
    with Recorder():
        ops.sum(layer(x, **arguments) ** 2).backward()
    assert (x.grad is not None) == is_derivable
    return shapes


# The second equation is a product of rows with matrices, the third is not.
LAYERS = {
    "dense": (lambda: DCFTDense(72), (5, 56)),
    "abc,cde->abde": (lambda: DCFTEinsumDense("abc,cde->abde", (None, 8, 9)), (5, 2, 56)),
    "abc,bd->adc": (lambda: DCFTEinsumDense("abc,bd->adc", (72, 2)), (5, 56, 2)),
}


@pytest.fixture(params=LAYERS)
def layer_and_inputs(request):
    make, shape = LAYERS[request.param]
    layer = make()
    layer.build(shape)
    assert layer.dcft_adapter.matrix_shape == (56, 72)
    return layer, np.ones(shape, "float32")


def test_training_step_forms_no_tensor_of_the_kernels_size(layer_and_inputs):
    assert_forms_no_full_matrix(*layer_and_inputs)


def test_the_search_for_such_tensors_finds_them(layer_and_inputs, monkeypatch):
    layer, inputs = layer_and_inputs
    monkeypatch.setattr(type(layer), "call", lambda self, x: self._dcft_product(x, self.kernel))
    with pytest.raises(AssertionError, match="56, 72"):
        assert_forms_no_full_matrix(layer, inputs)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="other backends see what is trainable")
def test_the_tape_does_not_follow_the_frozen_kernel(layer_and_inputs):
    import tensorflow as tf

    layer, inputs = layer_and_inputs
    with tf.GradientTape() as tape:
        loss = ops.sum(layer(inputs))
    assert tape.gradient(loss, layer._kernel.value) is None


@pytest.mark.compiled
@pytest.mark.skipif(BACKEND != "tensorflow", reason="other backends compute in graphs as eagerly")
@pytest.mark.parametrize("knows_the_batch", [True, False])
@pytest.mark.parametrize("equation", EQUATIONS)
def test_graphs_compute_what_eager_execution_does(rng, equation, knows_the_batch):
    import tensorflow as tf

    plain = equation.replace("...", "Z")
    inputs, rest = plain.split(",")
    outputs = rest.split("->")[1]
    size = {axis: 3 + number for number, axis in enumerate(sorted(set(plain) - set(",->")))}
    given_shape = [size[c] for c in equation.split("->")[1].replace("...", "")]
    given_shape = given_shape if equation.startswith("...") else given_shape[1:]
    layer = DCFTEinsumDense(equation, tuple(given_shape), kernel_size=2, rank=2, **NOT_DRAWN)
    x = rng.normal(size=[size[c] for c in inputs]).astype("float32")
    layer.build(x.shape)
    for variable in layer.variables:
        variable.assign(rng.normal(size=variable.shape))
    cotangent = rng.normal(size=[size[c] for c in outputs]).astype("float32")

    def step(x):
        sources = [x, *(v.value for v in layer.trainable_variables)]
        with tf.GradientTape() as tape:
            tape.watch(x)
            outputs = layer(x)
            loss = ops.sum(outputs * cotangent)
        return [outputs, *tape.gradient(loss, sources)]

    batch = len(x) if knows_the_batch else None
    in_graph = tf.function(step, input_signature=[tf.TensorSpec([batch, *x.shape[1:]])])
    for found, expected in zip(in_graph(tf.constant(x)), step(tf.constant(x))):
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
