"""PyTorch's product of base and increment in one equals the plain path, gradients too."""

import contextlib
import threading

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tools import array, randomize_adapters, sequential, vectors

from keras_dcft import DCFTDense, DCFTEinsumDense, dcft_disabled, enable_dcft
from keras_dcft.layers import base

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="the fused product is PyTorch's"
)


@contextlib.contextmanager
def plain():
    """The path that other backends take."""
    fused, base.fused = base.fused, None
    try:
        yield
    finally:
        base.fused = fused


def dense(rows=13, columns=9, **arguments):
    layer = DCFTDense(columns, **{"kernel_size": 4, **arguments})
    layer.build((None, rows))
    return randomized(layer)


def einsum(equation, output_shape, input_shape, **arguments):
    layer = DCFTEinsumDense(equation, output_shape, kernel_size=3, **arguments)
    layer.build(input_shape)
    return randomized(layer)


def randomized(layer):
    rng = np.random.default_rng(0)
    for variable in layer.weights:
        variable.assign(rng.normal(size=variable.shape))
    return layer


def inputs_of(*shape, seed=1):
    return torch.tensor(np.random.default_rng(seed).normal(size=shape), dtype=torch.float32)


def adapter_of(layer):
    return [variable.value for variable in layer.dcft_adapter.variables.values()]


def seen(layer, inputs, **arguments):
    """Outputs, and the gradients by the adapter and, where they ask for one, the inputs."""
    for tensor in (inputs, *adapter_of(layer)):
        tensor.grad = None
    outputs = layer(inputs, **arguments)
    cotangent = inputs_of(*outputs.shape, seed=2)
    (outputs * cotangent.to(outputs.dtype)).sum().backward()
    gradients = [tensor.grad for tensor in (*adapter_of(layer), inputs)]
    return [outputs.detach(), *(g for g in gradients if g is not None)]


def assert_same(layer, inputs, rtol=1e-4, **arguments):
    found = seen(layer, inputs, **arguments)
    with plain():
        expected = seen(layer, inputs, **arguments)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected):
        assert ours.dtype == theirs.dtype
        scale = float(theirs.abs().max()) if theirs.numel() else 1.0
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol * (scale + 1e-6))


@given(
    rows=st.integers(1, 24),
    columns=st.integers(1, 24),
    kernel_size=st.integers(1, 24),
    rank=st.integers(1, 3),
    leading=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    use_bias=st.booleans(),
    asks=st.booleans(),
)
def test_any_shape(rows, columns, kernel_size, rank, leading, use_bias, asks):
    kernel_size = min(kernel_size, rows, columns)
    layer = dense(rows, columns, kernel_size=kernel_size, rank=rank, use_bias=use_bias)
    assert_same(layer, inputs_of(*leading, rows).requires_grad_(asks))


EINSUMS = {
    "heads": ("abc,cde->abde", (None, 3, 4), (None, 5, 7), {"bias_axes": "de"}),
    "joined": ("abcd,cde->abe", (None, 6), (None, 5, 3, 4), {"bias_axes": "e"}),
    "no bias": ("abc,cd->abd", (None, 6), (None, 5, 7), {}),
    "a part of a bias": ("abc,cde->abde", (None, 3, 4), (None, 5, 7), {"bias_axes": "e"}),
    # A kernel that is no matrix in its order takes the plain path.
    "another order": ("btd,ndh->btnh", (None, 3, 4), (None, 5, 7), {}),
}


@pytest.mark.parametrize("name", EINSUMS)
def test_einsum_layers(name):
    equation, output_shape, input_shape, arguments = EINSUMS[name]
    layer = einsum(equation, output_shape, input_shape, **arguments)
    assert layer._dcft_is_matrix == (name != "another order")
    assert_same(layer, inputs_of(2, *input_shape[1:]).requires_grad_())


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed_bfloat16", "float64"])
def test_dtypes(dtype):
    layer = dense(dtype=dtype)
    rtol = 1e-4 if dtype == "float64" else 3e-2
    assert_same(layer, inputs_of(5, 13).to(getattr(torch, layer.compute_dtype)), rtol=rtol)


@pytest.mark.parametrize("name", ["dense", "heads"])
def test_outputs_may_be_changed_in_place(name):
    layer = dense() if name == "dense" else einsum(*EINSUMS["heads"][:3], bias_axes="de")
    inputs = inputs_of(2, 5, 13 if name == "dense" else 7)
    outputs = layer(inputs)
    outputs += 1
    outputs.sum().backward()
    assert layer.dcft_a.value.grad is not None


def test_inputs_that_are_not_contiguous():
    inputs = inputs_of(13, 6, 2).T.requires_grad_()
    inputs.retain_grad()
    assert not inputs.is_contiguous()
    assert_same(dense(), inputs)


def test_dropout_takes_the_plain_path():
    layer = dense(dropout=0.5)
    inputs = inputs_of(200, 13)
    assert_same(layer, inputs)
    assert not torch.equal(layer(inputs, training=True), layer(inputs))


def test_second_derivatives():
    layer, inputs = dense(), inputs_of(5, 13).requires_grad_()

    def penalty():
        outputs = (layer(inputs) ** 2).sum()
        (gradient,) = torch.autograd.grad(outputs, inputs, create_graph=True)
        return torch.autograd.grad((gradient**2).sum(), [inputs, *adapter_of(layer)])

    found = penalty()
    with plain():
        expected = penalty()
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_transforms_of_functions():
    layer, inputs = dense(), inputs_of(5, 13)

    def loss(row):
        return (layer(row[None]) ** 2).sum()

    found = torch.func.vmap(torch.func.grad(loss))(inputs)
    with plain():
        expected = torch.func.vmap(torch.func.grad(loss))(inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_compiled():
    layer, inputs = dense(), inputs_of(5, 13)
    compiled = torch.compile(lambda x: layer(x), backend="aot_eager")
    torch.testing.assert_close(compiled(inputs), layer(inputs), rtol=1e-4, atol=1e-4)


def test_autocast_takes_the_plain_path():
    layer, inputs = dense(), inputs_of(5, 13)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(layer, inputs)


def test_a_kernel_that_was_thawed_gets_its_gradient():
    layer, inputs = dense(), inputs_of(5, 13)
    layer._kernel.trainable = True
    layer(inputs).sum().backward()
    expected = inputs.sum(dim=0)[:, None].expand(-1, 9)
    torch.testing.assert_close(layer._kernel.value.grad, expected)


def test_checkpointing_computes_it_again():
    layer, inputs = dense(), inputs_of(5, 13).requires_grad_()
    found = torch.utils.checkpoint.checkpoint(layer, inputs, use_reentrant=False)
    torch.testing.assert_close(found, layer(inputs))
    found.sum().backward()
    gradient, inputs.grad = inputs.grad, None
    layer(inputs).sum().backward()
    torch.testing.assert_close(gradient, inputs.grad)


@contextlib.contextmanager
def counted(monkeypatch):
    """How often thin factors are made."""
    calls, make = [], base.fused._thin_factors

    def counting(*arguments):
        calls.append(arguments)
        return make(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(base.fused, "_thin_factors", counting)
        yield calls


def adapted_model(**arguments):
    model = enable_dcft(sequential(), kernel_size=4, **arguments)
    randomize_adapters(model)
    return model


def test_a_call_of_predict_makes_thin_factors_once(monkeypatch):
    model, inputs = adapted_model(), vectors(12)
    expected = array(model(inputs))
    with counted(monkeypatch) as calls:
        outputs = model.predict(inputs, batch_size=2, verbose=0)
        assert len(calls) == 2  # layers
        model.predict(inputs, batch_size=2, verbose=0)
        assert len(calls) == 4
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-6)
    assert not base.fused._factors_of_calls


def test_what_is_assigned_in_between_is_seen_at_once():
    model, inputs = adapted_model(), vectors(12)
    layers = [model.layers[0], model.layers[2]]

    def change():
        for layer in layers:
            layer.dcft_b.assign(2 * layer.dcft_b)

    expected = []
    for start in range(0, 12, 4):
        expected.append(array(model(inputs[start : start + 4])))
        change()
    for layer in layers:
        layer.dcft_b.assign(layer.dcft_b / 8)

    class Changes(keras.callbacks.Callback):
        def on_predict_batch_end(self, batch, logs=None):
            thread = threading.Thread(target=change)
            thread.start()
            thread.join()

    outputs = model.predict(inputs, batch_size=4, callbacks=[Changes()], verbose=0)
    np.testing.assert_allclose(outputs, np.concatenate(expected), rtol=1e-5, atol=1e-6)


def test_what_is_written_behind_pytorchs_back_is_seen_by_the_next_call():
    model, inputs = adapted_model(), vectors(4)
    model.predict(inputs, verbose=0)
    model.layers[0].dcft_b.value.data *= 2  # which counts no version up
    np.testing.assert_allclose(
        model.predict(inputs, verbose=0), array(model(inputs)), rtol=1e-5, atol=1e-6
    )


def test_switching_off_and_activating_are_seen_inside_of_a_call():
    model, inputs = adapted_model(), vectors(8)
    expected = array(model(inputs[:4]))
    with dcft_disabled(model):
        base_outputs = array(model(inputs[4:]))

    class SwitchesOff(keras.callbacks.Callback):
        def on_predict_batch_end(self, batch, logs=None):
            self.block = dcft_disabled(model)
            self.block.__enter__()

        def on_predict_end(self, logs=None):
            self.block.__exit__(None, None, None)

    outputs = model.predict(inputs, batch_size=4, callbacks=[SwitchesOff()], verbose=0)
    np.testing.assert_allclose(outputs, np.concatenate([expected, base_outputs]), atol=1e-6)
