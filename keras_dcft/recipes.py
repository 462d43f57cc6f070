"""The authors' settings for DeBERTaV3-base on GLUE, from their scripts (arXiv 2503.01419)."""

from typing import Any

_START = {"class_name": "RandomNormal", "config": {"stddev": 0.02}}


def _recipe(scale, learning_rate, epochs, warmup, orthogonality, head_dropout, decay, length):
    # A share of the steps, or their number.
    key = "warmup_share" if warmup < 1 else "warmup_steps"
    return {
        "arguments": {
            "rank": 1,
            "alpha": scale,
            "orthogonality": orthogonality,
            "factor_initializer": _START,
            "filter_initializer": _START,
        },
        "learning_rate": learning_rate,
        "epochs": epochs,
        key: warmup,
        "weight_decay": decay,
        "head_dropout": head_dropout,
        "sequence_length": length,
        "batch_size": 32,
    }


# By GLUE's task. `arguments` are those of `enable_dcft`, whose increment has the scale
# `alpha / rank`; the rest is for AdamW with a `LinearWarmupDecay`, the head and the tokenizer.
PAPER_RECIPES: dict[str, dict[str, Any]] = {
    "cola": _recipe(32 / 3, 8e-4, 25, 100, 0.1, 0.1, 0.0, 64),
    "mnli": _recipe(16 / 3, 5e-4, 7, 1000, 0.1, 0.15, 0.0, 256),
    "mrpc": _recipe(16.0, 1e-3, 30, 0.1, 0.1, 0.0, 0.01, 320),
    "qnli": _recipe(16.0, 5e-4, 5, 500, 0.1, 0.1, 0.01, 512),
    "qqp": _recipe(8.0, 8e-4, 5, 2000, 0.1, 0.15, 0.01, 320),
    "rte": _recipe(16.0, 1.2e-3, 50, 200, 0.3, 0.2, 0.01, 320),
    "sst2": _recipe(8.0, 8e-4, 24, 1000, 0.1, 0.0, 0.01, 128),
    "stsb": _recipe(16.0, 2.2e-3, 25, 100, 0.3, 0.2, 0.1, 128),
}
