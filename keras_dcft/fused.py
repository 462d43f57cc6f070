"""The whole product of an adapted layer on PyTorch, base and increment in one.

The one exception to `keras.ops` alone, only imported on PyTorch: run eagerly, each operation of
`keras.ops` costs some 20 microseconds, and an increment has dozens with its gradients; and autograd
adds the gradients of the two products with a temporary of the inputs' size. Here there are seven
operations forward and some ten backward, and sums are made in place. What a call of `predict` or
`generate` needs for every batch or token, the thin factors, it works out once.
"""

import weakref

import torch
from keras import ops
from torch.nn import functional

from keras_dcft import selection

# Keras itself works out products of float64 in float32.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# By the call: by the id of an adapter, what its thin factors were made of, and they.
_factors_of_calls = weakref.WeakKeyDictionary()


class _Product(torch.autograd.Function):
    """`inputs · kernel + bias + (inputs · D) · U`, of frozen kernel and bias."""

    generate_vmap_rule = True

    @staticmethod
    def forward(inputs, kernel, bias, a, b, kernel_filter, multiply, shape, scale, width):
        left, right = _thin_factors(a, b, kernel_filter, scale, width, shape, inputs.dtype)
        outputs, hidden = _forward(inputs, kernel, bias, left, right, multiply, shape)
        # No view for autograd, which would forbid callers to change the outputs in place.
        outputs = torch.ops.aten._unsafe_view(outputs, outputs.shape)
        return outputs, hidden, left, right

    @staticmethod
    def setup_context(ctx, inputs, output):
        features, kernel, _, a, b, kernel_filter, _, ctx.shape, ctx.scale, ctx.width = inputs
        _, hidden, left, right = output
        ctx.mark_non_differentiable(hidden, left, right)
        ctx.save_for_backward(features, kernel, a, b, kernel_filter, hidden, left, right)

    @staticmethod
    def backward(ctx, gradient, *_):
        inputs, kernel, a, b, kernel_filter, hidden, left, right = ctx.saved_tensors
        rows, gradient = inputs.reshape(-1, ctx.shape[0]), gradient.reshape(-1, ctx.shape[1])
        is_differentiated = torch.is_grad_enabled()
        if is_differentiated:  # for second derivatives from what they depend on
            left, right = _thin_factors(
                a, b, kernel_filter, ctx.scale, ctx.width, ctx.shape, rows.dtype
            )
            hidden = rows @ left
        of_hidden = gradient @ right.T
        of_rows = of_a = of_b = of_filter = None
        if ctx.needs_input_grad[0]:
            of_rows = gradient @ kernel.reshape(ctx.shape).T
            if is_differentiated:
                of_rows = of_rows + of_hidden @ left.T
            else:
                of_rows.addmm_(of_hidden, left.T)
            of_rows = of_rows.reshape(inputs.shape)
        (blocks, rank), d = a.shape, len(kernel_filter)
        if ctx.needs_input_grad[3] or ctx.needs_input_grad[5]:
            of_left = (rows.T @ of_hidden).float() * ctx.scale
            of_left = functional.pad(of_left, (0, 0, 0, blocks * d - len(of_left)))
            of_left = of_left.reshape(blocks, d, rank, ctx.width)[..., :d]
            of_a = torch.einsum("iupv,uv->ip", of_left, kernel_filter)
            of_filter = torch.einsum("iupv,ip->uv", of_left, a)
        if ctx.needs_input_grad[4]:
            of_right = (hidden.T @ gradient).float()
            of_right = functional.pad(of_right, (0, b.shape[1] * d - of_right.shape[1]))
            of_right = of_right.reshape(rank, ctx.width, -1, d)
            of_b = of_right.diagonal(dim1=1, dim2=3).sum(dim=-1)
        return of_rows, None, None, of_a, of_b, of_filter, None, None, None, None


def _forward(inputs, kernel, bias, left, right, multiply, shape):
    """The outputs, and the product of the inputs with the first thin factor."""
    hidden = inputs.reshape(-1, shape[0]) @ left
    # As the base layer does it, so that the start is equal to it to the last bit.
    outputs = multiply(inputs, kernel)
    if bias is not None:
        outputs += bias
    rows = outputs.reshape(-1, shape[1]).addmm_(hidden, right)
    return rows.reshape(outputs.shape), hidden


def _thin_factors(a, b, kernel_filter, scale, width, shape, dtype):
    """The increment's thin factors, (in, rank * width) and (rank * width, out)."""
    (blocks, rank), d = a.shape, len(kernel_filter)
    kernel_filter = functional.pad(scale * kernel_filter, (0, width - d))
    left = a[:, None, :, None] * kernel_filter[None, :, None, :]
    left = left.reshape(blocks * d, rank * width)[: shape[0]]
    identity = torch.eye(width, d, dtype=b.dtype, device=b.device)
    right = b[:, None, :, None] * identity[None, :, None, :]
    right = right.reshape(rank * width, -1)[:, : shape[1]]
    return left.to(dtype), right.to(dtype)


def can_multiply(inputs, kernel, bias) -> bool:
    """Whether these tensors may be multiplied so; otherwise the plain path is right.

    Compilers fuse by themselves, exporters know no functions of ours, and autocast chooses another
    dtype for each operation.
    """
    dtypes = {kernel.dtype, inputs.dtype} | ({bias.dtype} if bias is not None else set())
    return (
        len(dtypes) == 1
        and inputs.dtype in DTYPES
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled(inputs.device.type)
    )


def product(inputs, kernel, bias, adapter, multiply):
    """`inputs · (kernel + increment) + bias`.

    Args:
        inputs: tensor whose last axes are contracted.
        kernel: tensor that is a matrix but for reshaping, which gets no gradient.
        bias: tensor of the shape of the kernel's other axes, which gets none, or None.
        adapter: the `Adapter`.
        multiply: function of inputs and kernel, the base layer's product.

    Returns:
        Tensor of the shape that `multiply` gives.
    """
    factors = [ops.convert_to_tensor(variable) for variable in adapter.variables.values()]
    shape, scale, width = adapter.matrix_shape, adapter.settings.scale, adapter.width
    call = selection.calls.present()
    if call is None or torch.is_grad_enabled():
        settings = multiply, shape, scale, width
        return _Product.apply(inputs, kernel, bias, *factors, *settings)[0]
    kept = _factors_of_calls.setdefault(call, {})
    made_of, left, right = kept.get(id(adapter), ((), None, None))
    # Whoever assigns a value counts the tensor's version up; who makes another tensor, another.
    now = [(tensor, tensor._version, inputs.dtype) for tensor in factors]
    if not _are_same(now, made_of):
        left, right = _thin_factors(*factors, scale, width, shape, inputs.dtype)
        kept[id(adapter)] = now, left, right
    return _forward(inputs, kernel, bias, left, right, multiply, shape)[0]


def _are_same(now, before) -> bool:
    return len(now) == len(before) and all(
        ours is theirs and rest == others for (ours, *rest), (theirs, *others) in zip(now, before)
    )
