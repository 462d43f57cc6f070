"""The paper's orthogonality penalty as a Keras regularizer."""

from typing import Any

import keras
from keras import ops


@keras.saving.register_keras_serializable("keras_dcft")
class Orthonormality(keras.regularizers.Regularizer):
    """Frobenius distance of a matrix's rows or columns from an orthonormal set.

    `strength · ‖MᵀM − I‖_F` for `mode="columns"`, `strength · ‖M·Mᵀ − I‖_F` for `mode="rows"`.
    With strength `γ / 2n` on `dcft_a` (columns) and `dcft_b` (rows) of n adapted layers the sum is
    the paper's regulariser R; `enable_dcft(model, orthogonality=γ)` arranges that.

    Args:
        strength: non-negative float.
        mode: `"columns"` or `"rows"`.

    Raises:
        ValueError: if `strength` is negative or `mode` is neither of the two.

    Example:
        >>> penalty = Orthonormality(strength=0.1, mode="columns")
        >>> float(penalty(keras.ops.eye(4)))
        0.0
    """

    def __init__(self, strength: float, mode: str = "columns"):
        if not isinstance(strength, (int, float)) or strength < 0:
            raise ValueError(
                f"`strength` must be a non-negative number. Received: strength={strength!r}"
            )
        if mode not in ("columns", "rows"):
            raise ValueError(f'`mode` must be "columns" or "rows". Received: mode={mode!r}')
        self.strength = float(strength)
        self.mode = mode

    def __call__(self, matrix: Any) -> Any:
        """The penalty, a scalar, of a tensor of shape `(rows, columns)`."""
        transposed = ops.transpose(matrix)
        if self.mode == "columns":
            gram = ops.matmul(transposed, matrix)
        else:
            gram = ops.matmul(matrix, transposed)
        squares = ops.sum(ops.square(gram - ops.eye(gram.shape[0], dtype=gram.dtype)))
        # The square root has no gradient at zero, where an orthonormal start would begin.
        is_zero = squares == 0
        return self.strength * ops.where(
            is_zero, 0.0, ops.sqrt(ops.where(is_zero, ops.ones_like(squares), squares))
        )

    def get_config(self) -> dict[str, Any]:
        return {"strength": self.strength, "mode": self.mode}
