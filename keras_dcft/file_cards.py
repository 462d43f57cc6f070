"""Model cards beside adapter files."""

import json
from pathlib import Path
from typing import Any

import keras

from keras_dcft import shares
from keras_dcft.cards import README, facts_of, updated
from keras_dcft.files import Place, check_settings, checked_path, read
from keras_dcft.models import the_name
from keras_dcft.paths import required_dcft_layers
from keras_dcft.signatures import FilePath
from keras_dcft.writing import write_atomically

CODE_FOR_A_FILE = """\
from keras_dcft import load_dcft_weights

model = ...  # the base: a {cls} as it was before it was adapted
load_dcft_weights(model, "{file}")"""


def write_model_card(
    model: keras.Model,
    path: FilePath,
    *,
    name: str | None = None,
    base: str | None = None,
    metrics: dict[str, Any] | str | None = None,
    data: dict[str, Any] | str | None = None,
) -> Path:
    """Writes what there is to say of an adapter into the `README.md` beside its file.

    That is the method, the settings, how many numbers it trains, how to load it, and what is
    passed in. It is a section between two comments, for each adapter file of the folder one. An
    existing `README.md` keeps everything else, and a second call for the file replaces the section.
    Above stands front matter for Hugging Face's hub; keys that are there already are left alone,
    but for `base_model` where `base` is given.

    `task.save_to_preset(folder)` writes such a card itself and takes the same three keywords.

    Args:
        model: the model that the file was saved from, adapted.
        path: str or path of an adapter file that is there.
        name: str, the adapter, where the model has several.
        base: str, what was adapted. A model of Hugging Face's hub, such as
            `"keras/bert_base_en"`, is linked and becomes the card's `base_model`.
        metrics: dict, shown as a table, or str.
        data: dict or str, what it was trained and measured on, likewise.

    Returns:
        The path of the card.

    Raises:
        FileNotFoundError: if there is no file at `path`.
        TypeError: if an argument is of another type.
        ValueError: if the model is not adapted or has several adapters and none of this name, if
            the file is damaged or has other settings than the adapter, or if one of the section's
            two comments is missing in the `README.md`.

    Example:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/my.dcft.safetensors"
        >>> model = keras.Sequential([keras.Input((32,)), keras.layers.Dense(64)])
        >>> save_dcft_weights(enable_dcft(model), path)
        >>> card = write_model_card(model, path, metrics={"accuracy": 0.9})
        >>> "| accuracy | 0.9 |" in card.read_text()
        True
    """
    required_dcft_layers(model)
    path = checked_path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"Write the adapter first, with `save_dcft_weights`. Received: path={str(path)!r}"
        )
    name = the_name(model, name)
    tensors, metadata = read(path)
    config = json.loads(metadata["dcft_config"])
    check_settings(path, config, Place(model, name).config)
    sizes = {key: tensor.size for key, tensor in tensors.items()}
    adapters = sum(size for key, size in sizes.items() if key.startswith("adapter/"))
    trained = (key.split("/", 1)[1].rpartition("/")[0] for key in sizes if key[0] == "t")
    total = shares.size(shares.base_weights(model).values())
    facts = facts_of(
        config, dict.fromkeys(trained), adapters, sum(sizes.values()) - adapters, total
    )
    cls = getattr(model, "dcft_base_class", type(model)).__name__
    code = CODE_FOR_A_FILE.format(cls=cls, file=path.name)
    readme = path.parent / README
    content = updated(readme, path.name, {name: facts}, code, "keras_dcft", base, metrics, data)
    write_atomically(readme, content)
    return readme
