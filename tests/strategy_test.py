"""TensorFlow's strategies: the verbs outside of `strategy.scope()`."""

import keras
import pytest

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="about TensorFlow's strategies"
)

OUTSIDE_OF_THE_SCOPE = """
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import sys
import numpy as np
import keras
from tools import differences, sequential, subclassed, values, vectors
from keras_dcft import (
    dcft_disabled, enable_dcft, load_dcft_weights, merge_dcft, remove_dcft, save_dcft_weights
)

strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
path = sys.argv[1] + "/a.dcft.safetensors"


def check(make, inputs, targets):
    with strategy.scope():
        model = make()
    model.fit(inputs, targets, batch_size=4, verbose=0)
    for undo in (remove_dcft, merge_dcft):
        enable_dcft(model, kernel_size=4)
        trained = model.trainable_variables
        frozen = [v for v in model.weights if not v.trainable]
        before, before_frozen = values(trained), values(frozen)
        model.fit(inputs, targets, batch_size=4, epochs=3, verbose=0)
        assert max(differences(before, values(trained))) > 0
        assert max(differences(before_frozen, values(frozen))) == 0
        with dcft_disabled(model):
            model.predict(inputs, verbose=0)
        save_dcft_weights(model, path)
        load_dcft_weights(model, path)
        undo(model)
        before = values(model.trainable_variables)
        model.fit(inputs, targets, batch_size=4, verbose=0)
        assert max(differences(before, values(model.trainable_variables))) > 0
    load_dcft_weights(model, path)
    model.fit(inputs, targets, batch_size=4, verbose=0)
    print("fine")


plain = sequential()
with strategy.scope():
    try:
        enable_dcft(plain, kernel_size=4)
    except ValueError as error:
        print("fine", "Leave the scope of the strategy" in str(error))
plain.fit(vectors(8), np.ones((8, 9)), verbose=0)
check(sequential, vectors(8), np.ones((8, 9)))
check(subclassed, vectors(8), np.ones((8, 4, 5)))
"""


def test_every_verb_outside_of_the_scope(tmp_path, run_python):
    assert run_python(OUTSIDE_OF_THE_SCOPE, None, tmp_path).count("fine") == 3
