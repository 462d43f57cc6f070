import keras
import numpy as np
import pytest
import torch
from keras import ops
from tools import array

from keras_dcft import Orthonormality


@pytest.mark.parametrize("mode", ["columns", "rows"])
def test_value_and_gradient_equal_an_independent_implementation(rng, mode):
    matrix = rng.normal(size=(7, 3)).astype("float32")
    reference = torch.tensor(matrix, dtype=torch.float64, requires_grad=True)
    gram = reference.T @ reference if mode == "columns" else reference @ reference.T
    expected = 0.1 * torch.linalg.matrix_norm(gram - torch.eye(len(gram)), "fro")
    expected.backward()

    penalty = Orthonormality(0.1, mode)
    assert float(penalty(ops.convert_to_tensor(matrix))) == pytest.approx(expected.item(), rel=1e-5)
    layer = _Holder(matrix, penalty)
    before = array(layer.matrix)
    model = keras.Sequential([keras.Input((1,)), layer])
    model.compile(keras.optimizers.SGD(1.0), lambda y, p: ops.sum(p) * 0.0)
    model.fit(np.zeros((1, 1)), np.zeros((1, 1)), verbose=0)
    np.testing.assert_allclose(before - array(layer.matrix), reference.grad.numpy(), atol=1e-6)


def test_gradient_is_finite_at_an_orthonormal_start():
    layer = _Holder(np.eye(5, 2, dtype="float32"), Orthonormality(0.1))
    model = keras.Sequential([keras.Input((1,)), layer])
    model.compile(keras.optimizers.SGD(1.0), lambda y, p: ops.sum(p) * 0.0)
    history = model.fit(np.zeros((1, 1)), np.zeros((1, 1)), verbose=0).history
    assert history["loss"] == [0.0]
    np.testing.assert_array_equal(array(layer.matrix), np.eye(5, 2))


def test_config_round_trip():
    penalty = Orthonormality(0.3, "rows")
    restored = keras.regularizers.get(keras.regularizers.serialize(penalty))
    assert isinstance(restored, Orthonormality)
    assert restored.get_config() == penalty.get_config()


@pytest.mark.parametrize(
    "arguments", [{"strength": -1.0}, {"strength": "x"}, {"strength": 1.0, "mode": "diagonal"}]
)
def test_bad_arguments_are_named(arguments):
    with pytest.raises(ValueError, match=f"`{list(arguments)[-1]}` must be .* Received: "):
        Orthonormality(**arguments)


class _Holder(keras.layers.Layer):
    def __init__(self, matrix, regularizer):
        super().__init__()
        self.matrix = self.add_weight(
            shape=matrix.shape, initializer="zeros", regularizer=regularizer
        )
        self.matrix.assign(matrix)

    def call(self, inputs):
        return inputs + 0.0 * ops.sum(self.matrix)
