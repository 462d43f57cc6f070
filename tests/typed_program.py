"""A program that uses the whole public interface: mypy and pyright check it, a test runs it.

`assert_type` says what a type checker knows at a place; when the program runs it does nothing.
"""

from pathlib import Path
from typing import Any, assert_type

import keras
import keras_hub
import numpy as np

from keras_dcft import (
    PAPER_RECIPES,
    AdapterBank,
    DCFTCheckpoint,
    DCFTDense,
    DCFTEinsumDense,
    DCFTEmbedding,
    DCFTReversibleEmbedding,
    LinearWarmupDecay,
    Orthonormality,
    activate_dcft,
    convert_to_lora,
    dcft_disabled,
    dcft_parameter_table,
    dcft_summary,
    enable_dcft,
    export_to_peft,
    import_from_peft,
    kernel_size_for_budget,
    load_dcft_weights,
    merge_dcft,
    read_dcft_notes,
    remove_dcft,
    save_dcft_weights,
    shard_adapters,
    write_model_card,
)

# Keras itself has no types. Pyright guesses at them from defaults: Adam's rate is a float to it,
# and `verbose="auto"` a str. So what is given to Keras alone is `Any` here.
QUIET: Any = {"verbose": 0}


def small() -> keras.Sequential:
    """A plain model, the same each time."""
    keras.utils.set_random_seed(0)
    dense = [keras.layers.Dense(16, name="inner"), keras.layers.Dense(4, name="last")]
    return keras.Sequential([keras.Input((8,)), *dense])


def bert() -> keras_hub.models.BertBackbone:
    """A small BERT."""
    return keras_hub.models.BertBackbone(
        vocabulary_size=9, num_layers=1, num_heads=2, hidden_dim=16, intermediate_dim=16
    )


def train(folder: Path) -> Path:
    """Adapts a model, trains it, and returns the file of its adapter."""
    model = small()
    assert_type(kernel_size_for_budget(model, 200, target_layers="inner"), int)
    table = dcft_parameter_table(model, (2, {"inner": 4, ".*": 2}), rank=1)
    assert_type(table.base_parameters, int)
    table.plot(folder / "table.png")

    # A type checker knows that it is the Sequential that it was.
    model = assert_type(enable_dcft(small(), {"inner": 4, ".*": "auto"}), keras.Sequential)
    model = enable_dcft(
        small(),
        kernel_size={"inner": 4},
        rank=2,
        alpha=8,
        dropout=0.1,
        orthogonality=0.1,
        factor_initializer=keras.initializers.RandomNormal(stddev=0.02),
        filter_initializer="zeros",
        target_layers=lambda layer: layer.name == "inner",
        exclude_layers=None,
        trainable_layers=["last"],
    )
    schedule: Any = LinearWarmupDecay(5e-3, steps=10, warmup_share=0.2)
    model.compile(keras.optimizers.Adam(schedule), "mse")
    path = folder / "first.dcft.safetensors"
    callback = DCFTCheckpoint(path, monitor="loss", save_best_only=True, mode="min")
    model.fit(np.ones((4, 8)), np.ones((4, 4)), callbacks=[callback], **QUIET)
    dcft_summary(model, print_fn=lambda text: None, expand=True)
    assert_type(write_model_card(model, path, metrics={"loss": 0.1}, data="ones"), Path)
    assert_type(read_dcft_notes(str(path)), dict[str, Any])
    save_dcft_weights(model, path, {"made": "here"}, name="default")
    return path


def use(path: Path) -> None:
    """Loads an adapter and does to it all that there is to do."""
    model = load_dcft_weights(small(), path)
    model = assert_type(enable_dcft(model, 2, name="other"), keras.Sequential)
    activate_dcft(model, "other")
    activate_dcft(model, None)
    with dcft_disabled(model) as base:
        base.predict(np.ones((1, 8)), **QUIET)
    merge_dcft(model, weights={"default": 0.5, "other": 1})
    merge_dcft(load_dcft_weights(small(), path), "default")
    remove_dcft(load_dcft_weights(small(), path), name="default")
    convert_to_lora(load_dcft_weights(small(), path))
    with AdapterBank(small(), {"one": path}, capacity=4) as bank:
        bank.add("two", str(path))
        bank.predict(np.ones((2, 8)), ["one", None], batch_size=2)
        bank(np.ones((1, 8)), adapters=["two"])
        assert_type(sorted(bank), list[str])
        assert_type(len(bank), int)
        bank.remove("one")


def exchange(folder: Path) -> None:
    """To Hugging Face PEFT and back."""
    arguments = PAPER_RECIPES["rte"]["arguments"]
    export_to_peft(enable_dcft(bert(), 4, **arguments), folder, base="mine")
    import_from_peft(bert(), folder, name="theirs")


def shard(layout_map: keras.distribution.LayoutMap, model: keras.Model) -> None:
    """Cuts adapters into parts, on JAX with several devices."""
    shard_adapters(layout_map, enable_dcft(model))


def layers() -> list[keras.Layer]:
    """Layers for models of one's own."""
    penalty = Orthonormality(0.1, mode="rows")
    assert_type(penalty.get_config(), dict[str, Any])
    return [
        DCFTEmbedding(20, 16, kernel_size=4),
        DCFTReversibleEmbedding(20, 16, tie_weights=True),
        DCFTDense(16, kernel_size=4, activation="relu", bias_regularizer=penalty),
        DCFTEinsumDense("abcd,de->abce", output_shape=(None, 16, 16), rank=2, bias_axes="e"),
    ]


def main(folder: Path) -> None:
    """Everything, with files in a folder that is there."""
    use(train(folder))
    exchange(folder / "lora")
    model = keras.Sequential(layers())
    model.predict(np.ones((2, 3), "int32"), **QUIET)


if __name__ == "__main__":
    main(Path())
