"""The axes of an `EinsumDense` equation."""

import dataclasses
import functools
import string


@dataclasses.dataclass(frozen=True)
class EinsumAxes:
    """The axes of an `EinsumDense` equation, by what happens to them.

    Attributes:
        kernel: the kernel's axes in order.
        contracted: kernel axes that the equation sums over, in the kernel's order.
        outputs: kernel axes that appear in the output, in the kernel's order.
        input_equation: the einsum of the inputs with D reshaped to (contracted..., r·d).
        output_equation: the einsum of its result with U reshaped to (r·d, outputs...).
        is_rows_product: whether the equation is a product of matrices but for reshaping: inputs end
            with the contracted axes and outputs with the kernel's others, in the kernel's order.
    """

    kernel: str
    contracted: str
    outputs: str
    input_equation: str
    output_equation: str
    is_rows_product: bool

    @property
    def is_matrix_product(self) -> bool:
        """Whether the kernel is such a matrix too, but for reshaping."""
        return self.is_rows_product and self.kernel == self.contracted + self.outputs

    def sizes(self, kernel_shape) -> tuple[list, list]:
        """Sizes of the contracted and of the output axes of a kernel of this shape."""
        size = dict(zip(self.kernel, kernel_shape))
        return [size[c] for c in self.contracted], [size[c] for c in self.outputs]


@functools.cache
def einsum_axes(equation: str) -> EinsumAxes:
    """Sorts the axes of an equation such as `"btd,dnh->btnh"`.

    Raises:
        ValueError: if an axis is shared by input, kernel and output.
    """
    inputs, rest = equation.split(",")
    kernel, outputs = rest.split("->")
    shared = [c for c in kernel if c in inputs and c in outputs]
    if shared:
        raise ValueError(
            "`equation` must not have an axis that is shared by input, kernel and output: the "
            "kernel is then a stack of matrices, for which there is no DCFT increment. "
            f"Received: equation={equation!r} with the shared axes {shared}."
        )
    contracted = "".join(c for c in kernel if c in inputs)
    produced = "".join(c for c in kernel if c in outputs)
    kept = "".join(c for c in outputs if c not in produced)
    z = next(c for c in string.ascii_letters if c not in equation)
    return EinsumAxes(
        kernel=kernel,
        contracted=contracted,
        outputs=produced,
        input_equation=f"{inputs},{contracted}{z}->{kept}{z}",
        output_equation=f"{kept}{z},{z}{produced}->{outputs}",
        is_rows_product=inputs == kept + contracted and outputs == kept + produced,
    )


def einsum_kernel_shape(equation: str, input_shape, output_shape) -> tuple:
    """The shape of the kernel by which an equation takes one shape to the other."""
    inputs, rest = equation.split(",")
    kernel, outputs = rest.split("->")
    size = {}
    for axes, shape in ((inputs, input_shape), (outputs, output_shape)):
        before, _, behind = axes.partition("...")
        size.update(zip(before, shape))
        size.update(zip(reversed(behind), reversed(shape)))
    return tuple(size[c] for c in kernel)
