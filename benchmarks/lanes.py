"""Trainings of one small model beside each other, as lanes of one compiled JAX program.

A step of a small model is too little for a GPU. Here a program takes many steps of several
trainings at once: lanes have learning rates, seeds, batches, dropout and optimizer states of their
own, and share the frozen base. A program ends with the logits of the examples to be scored.

Steps are what `model.fit` with Adam or AdamW does; `tests/lanes_test.py` compares the two.
"""

import dataclasses
import functools
import re

import jax
import keras
import numpy as np
from jax import numpy as jnp
from jax.flatten_util import ravel_pytree

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-7  # Keras's defaults
SCORED_BATCH = 128


@dataclasses.dataclass
class Examples:
    """Packed examples.

    Attributes:
        token_ids, segment_ids: arrays (examples, length) of small ints.
        lengths: array (examples,), how many tokens are no padding.
        labels: array (examples,) or (examples, 2).
    """

    token_ids: np.ndarray
    segment_ids: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray

    def arrays(self) -> dict:
        return dataclasses.asdict(self)


@dataclasses.dataclass
class Plan:
    """Which examples are in which step of a training.

    Attributes:
        lengths: tuple of ints, to which batches are cut.
        kinds: array (steps,), which of the lengths a step has; the same with every seed.
        order: array (steps, batch size) of the examples' indices, -1 where a batch is not full.
    """

    lengths: tuple
    kinds: np.ndarray
    order: np.ndarray


def plan(token_counts, lengths, epochs: int, batch_size: int, seed: int) -> Plan:
    """Batches of examples of like length, in random order.

    What does not fill a batch of one length goes to the next longer one, so that an epoch has one
    batch that is not full at most.
    """
    of_examples, of_steps = np.random.default_rng(seed), np.random.default_rng(0)
    kinds, order = [], []
    for _ in range(epochs):
        rest = np.zeros(0, int)
        batches = []
        for kind, longest in enumerate(lengths):
            shortest = lengths[kind - 1] if kind else 0
            mine = np.flatnonzero((token_counts > shortest) & (token_counts <= longest))
            mine = of_examples.permutation(np.concatenate([mine, rest]))
            if longest == lengths[-1]:
                mine = np.pad(mine, (0, -len(mine) % batch_size), constant_values=-1)
            full = len(mine) // batch_size * batch_size
            batches += [(kind, batch) for batch in mine[:full].reshape(-1, batch_size)]
            rest = mine[full:]
        for i in of_steps.permutation(len(batches)):
            kinds.append(batches[i][0])
            order.append(batches[i][1])
    return Plan(tuple(lengths), np.array(kinds, "int32"), np.array(order, "int32"))


@dataclasses.dataclass
class Settings:
    """What lanes share of their training.

    Attributes:
        schedule: a Keras schedule with a peak of 1, the lanes' rates are multiplied with.
        weight_decay: float, AdamW's.
        rate_factors: dict of regular expressions over variable paths to factors of the rate.
    """

    schedule: keras.optimizers.schedules.LearningRateSchedule
    weight_decay: float = 0.0
    rate_factors: dict = dataclasses.field(default_factory=dict)


class Lanes:
    """A model's trainings beside each other.

    Args:
        model: a built Keras model on JAX, its trainable variables as they are to be trained.
        train, scored: `Examples`.
        settings: `Settings`.
    """

    def __init__(self, model, train: Examples, scored: Examples, settings: Settings):
        self.model, self.settings = model, settings
        self.train = jax.device_put(train.arrays())
        self.scored_count = len(scored.lengths)
        self.scored = jax.device_put(_in_batches(scored))
        others = model.non_trainable_variables
        self.is_seed = ["seed_generator_state" in v.path for v in others]
        self.base = [v.value for v, seed in zip(others, self.is_seed) if not seed]
        self.unravel = ravel_pytree([v.value for v in model.trainable_variables])[1]
        self.rate_factors = np.concatenate(
            [
                np.full(int(np.prod(v.shape)), self._rate_factor(v))
                for v in model.trainable_variables
            ]
        ).astype("float32")
        self.program = jax.jit(self._run, static_argnames="lengths", donate_argnames="state")

    def _rate_factor(self, variable) -> float:
        factors = self.settings.rate_factors.items()
        return next((f for pattern, f in factors if re.search(pattern, variable.path)), 1.0)

    def start(self, values, seeds, steps: int) -> dict:
        """The state of lanes before their first step.

        Args:
            values: list of flat arrays, `flat_values` of a model for each lane.
            seeds: list of ints, of each lane's dropout.
            steps: int, how many losses are kept.
        """
        values = jnp.stack([jnp.asarray(v) for v in values])
        draw = [np.random.default_rng(s).integers(1 << 31, size=sum(self.is_seed)) for s in seeds]
        generators = np.stack([np.array(draw), np.zeros_like(draw)], axis=-1).astype("uint32")
        return {
            "values": values,
            "mean": jnp.zeros_like(values),
            "square": jnp.zeros_like(values),
            "generators": jnp.asarray(generators),
            "losses": jnp.zeros((len(seeds), steps)),
        }

    def run(self, state, rates, plans, first, last):
        """Takes the lanes' steps from `first` to `last`.

        Args:
            state: of `start`, or from the steps before; it is used up.
            rates: sequence of floats, the lanes' peak learning rates.
            plans: list of the lanes' `Plan`, which differ in their orders only.
            first, last: ints.

        Returns:
            The state, and the scored examples' logits, an array (lanes, examples, ...).
        """
        arguments = {
            "base": self.base,
            "rates": jnp.asarray(rates, "float32"),
            "rate_factors": jnp.asarray(self.rate_factors),
            "kinds": jnp.asarray(plans[0].kinds),
            "order": jnp.asarray(np.stack([plan.order for plan in plans])),
            "train": self.train,
            "scored": self.scored,
        }
        state, logits = self.program(state, arguments, first, last, lengths=plans[0].lengths)
        logits = np.moveaxis(np.array(logits), 0, 1)
        logits = logits.reshape(logits.shape[0], -1, *logits.shape[3:])
        return state, logits[:, : self.scored_count]

    def _run(self, state, fixed, first, last, lengths):
        def step(number, state):
            picked = fixed["order"][:, number]
            batch = {name: values[picked] for name, values in fixed["train"].items()}
            batch["weights"] = (picked >= 0).astype("float32")
            branches = [functools.partial(self._gradients, length) for length in lengths]
            losses, gradients, generators = jax.lax.switch(
                fixed["kinds"][number],
                branches,
                state["values"],
                state["generators"],
                batch,
                fixed["base"],
            )
            return {
                **self._adam(state, gradients, number, fixed),
                "generators": generators,
                "losses": state["losses"].at[:, number].set(losses),
            }

        state = jax.lax.fori_loop(first, last, step, state)
        trainables = self._trainables(state["values"])
        score = jax.vmap(self._logits, in_axes=(0, None, None))
        logits = jax.lax.map(lambda batch: score(trainables, batch, fixed["base"]), fixed["scored"])
        return state, logits

    def _trainables(self, values):
        return jax.vmap(self.unravel)(values)

    def _gradients(self, length, values, generators, batch, base):
        """Losses (lanes,), flat gradients (lanes, numbers), and the seeds' next states."""
        batch = {
            name: v[:, :, :length] if name in ("token_ids", "segment_ids") else v
            for name, v in batch.items()
        }
        gradients = jax.vmap(jax.value_and_grad(self._loss, has_aux=True), (0, 0, 0, None))
        (losses, generators), gradients = gradients(
            self._trainables(values), generators, batch, base
        )
        return losses, jax.vmap(lambda g: ravel_pytree(g)[0])(gradients), generators

    def _loss(self, trainables, generators, batch, base):
        logits, others, penalties = self.model.stateless_call(
            trainables,
            self._others(base, generators),
            inputs_of(batch),
            training=True,
            return_losses=True,
        )
        drawn = [v for v, seed in zip(others, self.is_seed) if seed]
        generators = jnp.stack(drawn) if drawn else generators
        labels = batch["labels"].astype("int32")[..., None]
        entropy = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels, axis=-1)[..., 0]
        if entropy.ndim > 1:  # where an answer starts, and where it ends
            entropy = entropy.mean(axis=-1)
        weights = batch["weights"]
        loss = jnp.sum(weights * entropy) / jnp.sum(weights)
        return loss + sum(penalties), generators

    def _logits(self, trainables, batch, base):
        generators = jnp.zeros((sum(self.is_seed), 2), "uint32")  # not looked at
        others = self._others(base, generators)
        return self.model.stateless_call(trainables, others, inputs_of(batch), training=False)[0]

    def _others(self, base, generators) -> list:
        base, generators = iter(base), iter(generators)
        return [next(generators if seed else base) for seed in self.is_seed]

    def _adam(self, state, gradients, number, fixed) -> dict:
        share = self.settings.schedule(number)
        rates = share * fixed["rates"][:, None] * fixed["rate_factors"]
        taken = number + 1.0
        values = state["values"] * (1 - self.settings.weight_decay * rates)
        mean = state["mean"] + (gradients - state["mean"]) * (1 - BETA_1)
        square = state["square"] + (jnp.square(gradients) - state["square"]) * (1 - BETA_2)
        rates = rates * jnp.sqrt(1 - BETA_2**taken) / (1 - BETA_1**taken)
        values = values - rates * mean / (jnp.sqrt(square) + EPSILON)
        return {"values": values, "mean": mean, "square": square}


def flat_values(model) -> np.ndarray:
    """All that a model trains, as one array."""
    return np.concatenate([np.array(v).ravel() for v in model.trainable_variables])


def inputs_of(batch) -> dict:
    """What KerasHub's BERT takes."""
    token_ids = batch["token_ids"].astype("int32")
    positions = jnp.arange(token_ids.shape[-1])
    return {
        "token_ids": token_ids,
        "segment_ids": batch["segment_ids"].astype("int32"),
        "padding_mask": positions < batch["lengths"].astype("int32")[:, None],
    }


def _in_batches(examples: Examples) -> dict:
    """The examples' arrays as (batches, examples, ...), the last batch filled with zeros."""
    count = len(examples.lengths)
    batch = min(SCORED_BATCH, count)
    arrays = {k: v for k, v in examples.arrays().items() if k != "labels"}
    # An example without a token would have no attention to give.
    arrays["lengths"] = np.pad(arrays["lengths"], (0, -count % batch), constant_values=1)
    for name in ("token_ids", "segment_ids"):
        arrays[name] = np.pad(arrays[name], ((0, -count % batch), (0, 0)))
    return {name: v.reshape(-1, batch, *v.shape[1:]) for name, v in arrays.items()}
