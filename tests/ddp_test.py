"""PyTorch's DistributedDataParallel and FSDP on adapted models: two processes on loopback."""

import json

import keras
import numpy as np
import pytest
from tools import array, differences, values
from workers import free_ports, run_workers

from keras_dcft import load_dcft_weights, merge_dcft, remove_dcft

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="about the PyTorch backend"
)


def run(what, folder, *arguments, killed=None):
    (port,) = free_ports(1)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    environments = [{**shared, "RANK": str(rank)} for rank in range(2)]
    run_workers("ddp_worker", environments, folder, what, *arguments, killed=killed)
    if killed is None:
        return [json.loads((folder / f"{what}{rank}.json").read_text()) for rank in range(2)]


def one_process(what):
    """The same batches, whole, with Keras's own step; the model and the losses of the steps."""
    from ddp_worker import BATCH_SIZE, EPOCHS, adapted_classifier, data

    model = adapted_classifier(what)
    inputs, labels = data(model)
    model.preprocessor = None  # a task's steps would do again what `data` has done
    losses = []
    for epoch in range(EPOCHS):
        order = np.random.default_rng(epoch).permutation(len(labels))
        for rows in np.split(order, len(labels) // BATCH_SIZE):
            batch = {name: value[rows] for name, value in inputs.items()}
            model.reset_metrics()
            step = model.train_on_batch(batch, labels[rows], return_dict=True)
            losses.append(float(step["loss"]))
    return model, inputs, losses


# Keras, on loading a KerasHub task, which is not compiled then.
@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer")
def test_two_processes_train_as_one_and_send_only_what_is_trained(tmp_path):
    first, second = run("undisturbed", tmp_path)
    model, inputs, losses = one_process("undisturbed")
    trained = values(model.trainable_variables)
    # One bucket for each step, with the adapters' gradients and the head's.
    assert first["sent"] == second["sent"] == [sum(value.nbytes for value in trained)] * len(losses)
    assert 10 * first["sent"][0] < sum(v.nbytes for v in values(model.variables))
    assert first["losses"] == second["losses"] == pytest.approx(losses, rel=1e-5)
    assert first["losses"][-1] < first["losses"][0] - 0.01
    outputs, *of_first = np.load(tmp_path / "0.npz").values()
    _, *of_second = np.load(tmp_path / "1.npz").values()
    assert max(differences(of_first, of_second)) == 0
    assert max(differences(of_first, trained)) < 1e-5

    # Whatever is done to the model, on every process: DistributedDataParallel is made anew.
    for seen in (first, second):
        assert seen["disabled"] == seen["activated"] == seen["removed"] == seen["loaded"] == 0
        assert 0 <= seen["merged"] < 1e-6
    assert first["losses of the other"] == second["losses of the other"]
    assert first["others"] == second["others"]

    # What the first process wrote, in a process of its own.
    restored = keras.saving.load_model(tmp_path / "m.keras")
    loaded = load_dcft_weights(remove_dcft(model), tmp_path / "a.dcft.safetensors")
    for one in (restored, loaded):
        np.testing.assert_array_equal(array(one(inputs).detach()), outputs)
        assert np.abs(array(merge_dcft(one)(inputs).detach()) - outputs).max() < 1e-6


def test_a_base_in_parts_trains_as_a_whole_one(tmp_path):
    first, second = run("sharded", tmp_path)
    model, inputs, losses = one_process("sharded")
    assert first["losses"] == second["losses"] == pytest.approx(losses, rel=1e-5)
    outputs, *of_first = np.load(tmp_path / "0.npz").values()
    _, *of_second = np.load(tmp_path / "1.npz").values()
    assert max(differences(of_first, of_second)) == 0
    assert max(differences(of_first, values(model.trainable_variables))) < 1e-5
    for seen in (first, second):
        before, cut, trained, written = seen["held"]
        assert before - cut == pytest.approx(seen["base"] / 2, rel=0.01)
        assert max(trained, written) <= cut
    loaded = load_dcft_weights(remove_dcft(model), tmp_path / "0.dcft.safetensors")
    np.testing.assert_array_equal(array(loaded(inputs).detach()), outputs)


@pytest.mark.parametrize("what", ["backup", "checkpoint"])
def test_after_a_worker_was_killed_the_losses_go_on_as_if_it_had_not(what, tmp_path):
    run(what, tmp_path, "killed", killed=1)
    first, second = run(what, tmp_path, "restarted")
    _, _, losses = one_process(what)
    assert len(first) == 4  # it was killed in the third of four epochs of two steps
    assert first == second == pytest.approx(losses[4:], rel=1e-5)
