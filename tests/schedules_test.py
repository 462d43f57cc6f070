import keras
import numpy as np
import pytest
from tools import array, sequential

from keras_dcft import LinearWarmupDecay, enable_dcft


def test_it_rises_and_falls_in_straight_lines():
    schedule = LinearWarmupDecay(0.8, steps=50, warmup_share=0.2)
    rates = [float(schedule(step)) for step in range(61)]
    expected = np.interp(range(61), [0, 10, 50, 60], [0.0, 0.8, 0.0, 0.0])
    np.testing.assert_allclose(rates, expected, atol=1e-6)


def test_warm_up_by_steps_is_that_by_their_share():
    by_steps = LinearWarmupDecay(0.8, steps=50, warmup_steps=10)
    by_share = LinearWarmupDecay(0.8, steps=50, warmup_share=0.2)
    again = LinearWarmupDecay.from_config(by_steps.get_config())
    for step in range(60):
        rates = [float(schedule(step)) for schedule in (by_share, by_steps, again)]
        np.testing.assert_allclose(rates[1:], rates[0], atol=1e-7)
    with pytest.raises(ValueError, match=r"Received: warmup_share=0\.1, warmup_steps=10"):
        LinearWarmupDecay(0.8, steps=50, warmup_share=0.1, warmup_steps=10)


def test_training_follows_it():
    """SGD on a constant gradient of one moves a number by the sum of the rates."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    schedule = LinearWarmupDecay(0.5, steps=20)
    model.compile(keras.optimizers.SGD(schedule), lambda y, p: keras.ops.mean(p))
    before = array(model.layers[0].kernel).item()
    model.fit(np.ones((12, 1)), np.ones((12, 1)), batch_size=1, verbose=0)
    moved = before - array(model.layers[0].kernel).item()
    assert moved == pytest.approx(sum(float(schedule(step)) for step in range(12)), rel=1e-5)


def test_a_compiled_model_comes_back_with_it(tmp_path):
    model = enable_dcft(sequential(), kernel_size=4)
    model.compile(keras.optimizers.AdamW(LinearWarmupDecay(1e-3, 30, 0.25)), "mse")
    model.optimizer.build(model.trainable_variables)
    model.save(tmp_path / "model.keras")
    reloaded = keras.saving.load_model(tmp_path / "model.keras")
    schedule = keras.saving.deserialize_keras_object(
        reloaded.optimizer.get_config()["learning_rate"]
    )
    assert isinstance(schedule, LinearWarmupDecay)
    assert schedule.get_config() == {
        "peak_learning_rate": 1e-3,
        "steps": 30,
        "warmup_share": 0.25,
        "warmup_steps": None,
    }


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"peak_learning_rate": 0.0}, ValueError),
        ({"peak_learning_rate": float("nan")}, ValueError),
        ({"peak_learning_rate": float("inf")}, ValueError),
        ({"peak_learning_rate": "x"}, TypeError),
        ({"peak_learning_rate": True}, TypeError),
        ({"steps": 0}, ValueError),
        ({"steps": 10.0}, TypeError),
        ({"warmup_share": 0}, ValueError),
        ({"warmup_share": 1.0}, ValueError),
        ({"warmup_share": "0.1"}, TypeError),
        ({"warmup_steps": 0}, ValueError),
        ({"warmup_steps": 10}, ValueError),
        ({"warmup_steps": 2.0}, TypeError),
    ],
)
def test_bad_arguments_are_named(arguments, error):
    (name,) = arguments
    with pytest.raises(error, match=f"`{name}` must be .* Received: {name}="):
        LinearWarmupDecay(**{"peak_learning_rate": 1e-3, "steps": 10, **arguments})
