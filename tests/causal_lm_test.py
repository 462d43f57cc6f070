"""Language models: what is generated follows every change, in functions compiled before too."""

import keras
import keras_hub
import numpy as np
import pytest
from one_backend import only_on
from tools import array, randomize_adapters

from keras_dcft import (
    activate_dcft,
    dcft_disabled,
    enable_dcft,
    load_dcft_weights,
    merge_dcft,
    remove_dcft,
    save_dcft_weights,
)

pytestmark = pytest.mark.compiled

VOCABULARY, LENGTH = 40, 10
PROMPTS = np.array([[3, 7, 9, 4, 0, 0, 0, 0, 0, 0], [5, 2, 0, 0, 0, 0, 0, 0, 0, 0]])


def decoder(seed=0):
    keras.utils.set_random_seed(seed)
    backbone = keras_hub.models.Llama3Backbone(
        vocabulary_size=VOCABULARY,
        num_layers=1,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=32,
        intermediate_dim=48,
    )
    task = keras_hub.models.Llama3CausalLM(backbone=backbone, preprocessor=None)
    rng = np.random.default_rng(seed)
    for variable in backbone.weights:  # so that what is said depends on all of it
        if "norm" not in variable.path:
            variable.assign(rng.normal(size=variable.shape, scale=0.3))
    task.compile(sampler="greedy")
    return task


def prompts():
    return {"token_ids": PROMPTS.copy(), "padding_mask": (PROMPTS > 0).astype("int32")}


def generated(task):
    return array(task.generate(prompts(), stop_token_ids=None)["token_ids"])


def said_by_the_logits(task):
    """The same without a cache or a compiled function, word by word."""
    tokens, given = PROMPTS.copy(), PROMPTS > 0
    for position in range(given.sum(axis=1).min(), LENGTH):
        inputs = {"token_ids": tokens, "padding_mask": np.arange(LENGTH)[None] < position}
        inputs["padding_mask"] = np.repeat(inputs["padding_mask"], len(tokens), 0).astype("int32")
        logits = array(task(inputs))[:, position - 1]
        tokens[:, position] = np.where(
            given[:, position], tokens[:, position], logits.argmax(axis=-1)
        )
    return tokens


@pytest.mark.parametrize(
    "mode",
    [
        None,
        pytest.param("int8", marks=only_on("torch", "tensorflow")),
        pytest.param("int4", marks=only_on("torch", "jax")),
    ],
)
def test_what_is_generated_follows_every_change(mode):
    task = decoder()
    if mode:
        task.quantize(mode)
    seen = {}

    def look(state):
        seen[state] = generated(task)
        np.testing.assert_array_equal(seen[state], said_by_the_logits(task), state)

    look("base")
    enable_dcft(task, kernel_size=4)
    look("enabled")
    randomize_adapters(task)
    look("trained")
    with dcft_disabled(task):
        look("disabled")
    look("no longer disabled")
    enable_dcft(task, kernel_size=4, name="alike")
    enable_dcft(task, kernel_size=2, name="other", target_layers="query|value")
    for number, name in enumerate(("alike", "other"), 1):
        activate_dcft(task, name)
        randomize_adapters(task, seed=number)
        look(name)
    activate_dcft(task, None)
    look("none")
    activate_dcft(task, "default")
    look("default again")
    if mode is None:
        merge_dcft(task, "default")
        look("merged")
        np.testing.assert_array_equal(seen["merged"], seen["trained"])
    else:
        remove_dcft(task)
        look("removed")
        np.testing.assert_array_equal(seen["removed"], seen["base"])
    for state in ("enabled", "disabled", "none"):
        np.testing.assert_array_equal(seen[state], seen["base"])
    for state in ("no longer disabled", "default again"):
        np.testing.assert_array_equal(seen[state], seen["trained"])
    different = {seen[state].tobytes() for state in ("base", "trained", "alike", "other")}
    assert len(different) == 4


def test_training_is_seen_by_what_was_compiled_before():
    task = decoder()
    before = generated(enable_dcft(task, kernel_size=4))
    task.compile(
        optimizer=keras.optimizers.Adam(0.2),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        sampler="greedy",
    )
    np.testing.assert_array_equal(generated(task), before)
    inputs = {"token_ids": np.full((8, LENGTH), 11), "padding_mask": np.ones((8, LENGTH))}
    task.fit(inputs, np.full((8, LENGTH), 11), epochs=12, verbose=0)
    after = generated(task)
    assert (after != before).any()
    np.testing.assert_array_equal(after, said_by_the_logits(task))


def test_what_is_switched_off_while_generating_is_off(monkeypatch):
    """Although the factors of the adapters are made before the first token."""
    task = decoder()
    base = generated(task)
    randomize_adapters(enable_dcft(task, kernel_size=4))
    adapted = generated(task)
    cls = keras_hub.models.Llama3CausalLM
    generate_step = cls.generate_step

    def with_the_base(task, *inputs, **arguments):
        with dcft_disabled(task):
            return generate_step(task, *inputs, **arguments)

    monkeypatch.setattr(cls, "generate_step", with_the_base)
    task.compile(sampler="greedy")
    np.testing.assert_array_equal(generated(task), base)
    assert (adapted != base).any()


SAMPLERS = {
    "top_k": lambda: keras_hub.samplers.TopKSampler(5, seed=3),
    "top_p": lambda: keras_hub.samplers.TopPSampler(0.8, seed=3),
    "beam": lambda: keras_hub.samplers.BeamSampler(num_beams=3),
    "contrastive": lambda: keras_hub.samplers.ContrastiveSampler(k=3, alpha=0.4),
}


@pytest.mark.parametrize(
    "sampler",
    [
        pytest.param("top_k", marks=only_on("torch", "jax")),
        pytest.param("top_p", marks=only_on("torch", "tensorflow")),
        pytest.param("beam", marks=only_on("torch", "tensorflow")),
        pytest.param("contrastive", marks=only_on("torch", "jax")),
    ],
)
def test_samplers_say_what_the_merged_model_says(sampler, tmp_path):
    task = enable_dcft(decoder(), kernel_size=4)
    randomize_adapters(task)
    save_dcft_weights(task, tmp_path / "a.dcft.safetensors")
    merged = merge_dcft(load_dcft_weights(decoder(), tmp_path / "a.dcft.safetensors"))
    said = []
    for model in (task, merged, decoder()):
        model.compile(sampler=SAMPLERS[sampler]())
        said.append(generated(model))
    np.testing.assert_array_equal(said[0], said[1])
    assert (said[0] != said[2]).any()
