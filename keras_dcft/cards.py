"""Model cards: what there is to say of adapters, as a section of a `README.md`.

The section stands between two comments, and what stands around it is the user's. The front matter
is what Hugging Face's hub reads (https://huggingface.co/docs/hub/model-cards).
"""

import contextlib
import itertools
import re
import urllib.parse
from collections import Counter
from pathlib import Path

import keras

from keras_dcft import shares
from keras_dcft.models import adapter_names, config_of, the_name
from keras_dcft.paths import joined, required_dcft_layers, with_itself
from keras_dcft.settings import AdapterSettings, shortened

README = "README.md"
PAPER = "https://arxiv.org/abs/2503.01419"
HUB_MODEL = re.compile(r"(?:hf://)?([\w.-]+/[\w.-]+)")

CODE_FOR_A_FILE = """\
from keras_dcft import load_dcft_weights

model = ...  # the base: a {cls} as it was before it was adapted
load_dcft_weights(model, "{file}")"""


def write_model_card(
    model: keras.Model,
    path,
    *,
    name: str | None = None,
    base: str | None = None,
    metrics: dict | str | None = None,
    data: dict | str | None = None,
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
        ValueError: if the model is not adapted or has several adapters and none of this name, or
            if one of the section's two comments is missing in the `README.md`.

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
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"Write the adapter first, with `save_dcft_weights`. Received: path={str(path)!r}"
        )
    cls = getattr(model, "dcft_base_class", type(model)).__name__
    code = CODE_FOR_A_FILE.format(cls=cls, file=path.name)
    section = _section(model, [the_name(model, name)], code, base, metrics, data)
    front = {"library_name": "keras_dcft", **_front(base)}
    if "base_model" in front:
        front["base_model_relation"] = "adapter"
    readme = path.parent / README
    _write(readme, _updated(readme, path.name, section, front))
    return readme


@contextlib.contextmanager
def preset_card(model, folder, code, *, base=None, metrics=None, data=None):
    """Writes the card of a preset after what happens inside; if that fails, none.

    Args:
        model: the adapted model.
        folder: the preset's folder.
        code: str, Python that loads it.
        base, metrics, data: as for `write_model_card`.
    """
    readme = Path(folder) / README
    section = _section(model, adapter_names(model), code, base, metrics, data)
    content = _updated(readme, "preset", section, {"library_name": "keras-hub", **_front(base)})
    before = readme.read_bytes() if readme.exists() else None
    try:
        yield
        _write(readme, content)
    except BaseException:
        # A task's backbone may have written its own by now.
        if before is None:
            readme.unlink(missing_ok=True)
        else:
            readme.write_bytes(before)
        raise


def _section(model, names, code, base, metrics, data) -> str:
    if base is not None and not isinstance(base, str):
        raise TypeError(f"`base` must be a str. Received: base={shortened(repr(base))}")
    parts = [
        "## Adapter",
        f"Fine-tuned with [DCFT]({PAPER}), deconvolution in a subspace, by `keras_dcft`: the "
        "base's weights are frozen, and each adapted weight has an increment that is learned in a "
        "subspace and brought to full size by a transposed convolution.",
        _table(
            ["", *(f"`{name}`" if len(names) > 1 else "" for name in names)], _rows(model, names)
        ),
    ]
    if base is not None:
        model_id = HUB_MODEL.fullmatch(base)
        link = model_id and f"[{model_id[1]}](https://huggingface.co/{model_id[1]})"
        parts.append(f"Base: {link or base}")
    for title, argument, value in (("Results", "metrics", metrics), ("Data", "data", data)):
        if isinstance(value, dict):
            value = _table(["", ""], value.items())
        elif not isinstance(value, str | None):
            raise TypeError(
                f"`{argument}` must be a dict or a str. "
                f"Received: {argument}={shortened(repr(value))}"
            )
        if value:
            parts += [f"### {title}", value]
    # What was passed in must not look like the comments around the section.
    parts = [part.replace("<!--", "&lt;!--") for part in parts]
    return "\n\n".join([*parts, "### Use", f"```python\n{code}\n```"])


def _rows(model, names) -> list:
    """What there is to say of a model's adapters, a row for each thing."""
    columns = [_facts(model, name) for name in names]
    return [(fact, *(column[fact] for column in columns)) for fact in columns[0]]


def _facts(model, name) -> dict:
    layers, config = with_itself(model), config_of(model, name)
    base = shares.base_weights(model)
    trained = {path: shares.trained_beside(layer, name) for path, layer in layers.items()}
    trained = {path: found for path, found in trained.items() if found}
    values = (shares.adapter_values(layer, name).values() for layer in layers.values())
    adapters = sum(map(shares.size, values))
    beside = shares.size(base[weight] for weight in set(itertools.chain(*trained.values())))
    total, trainable = shares.size(base.values()), adapters + beside
    share = f"{100 * trainable / total:.3g} % of the model's {total:,}"
    sizes = Counter(config["layers"].values())
    own = config.get("adapters", {"": config}).values()
    return {
        **{
            key: ", ".join(map(str, dict.fromkeys(numbers[key] for numbers in own)))
            for key in AdapterSettings().common()
        },
        "kernel size": ", ".join(f"{d} ({n} layers)" for d, n in sorted(sizes.items())),
        "trained in full": joined(trained),
        "numbers in adapters": f"{adapters:,}",
        "numbers trained in full": f"{beside:,}",
        "trainable in all": f"{trainable:,}, {share}",
    }


def _table(head, rows) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", r"\|").split())


def _front(base) -> dict:
    model_id = HUB_MODEL.fullmatch(base or "")
    base_model = {"base_model": model_id[1]} if model_id else {}
    return {"tags": "\n- dcft\n- keras", **base_model}


def _updated(readme, key, section, front) -> str:
    """The text of a card with this section instead of the one with the same key, if any."""
    text = (
        readme.read_bytes().decode() if readme.exists() else f"# {readme.resolve().parent.name}\n"
    )
    begin, end = (
        f"<!-- {word} keras_dcft: {urllib.parse.quote(key)} -->" for word in ("begin", "end")
    )
    section = f"{begin}\n{section}\n{end}"
    before, has_begin, rest = text.partition(begin)
    _, has_end, after = rest.partition(end)
    if has_begin and has_end:
        text = before + section + after
    elif has_begin or end in text:
        raise ValueError(
            f"{readme}: take the rest of the section out, or put both of its comments back. The "
            f"file must have '{begin}' and after it '{end}'. It has one of them."
        )
    else:
        text = f"{text.rstrip()}\n\n{section}\n"
    return _with_front(text, front)


def _with_front(text, front) -> str:
    """A card with these keys in its front matter, of those that are there `base_model` replaced."""
    there = re.match(r"---\r?\n(.*?)^---\s*?$", text, re.DOTALL | re.MULTILINE)
    found = there[1] if there else ""
    for key, value in front.items():
        # A key, and below it what belongs to it: indented, a list's items, or nothing.
        entry = re.compile(rf"^{key}:.*\n(?:[ \t-].*\n)*", re.MULTILINE)
        line = f"{key}:{value}\n" if value.startswith("\n") else f"{key}: {value}\n"
        if not entry.search(found):
            found += line
        elif key == "base_model":
            found = entry.sub(line, found)
    body = text[there.end() :] if there else f"\n\n{text}"
    return f"---\n{found}---{body}"


def _write(readme, text):
    # In bytes: a file that came with other line ends keeps them.
    readme.write_bytes(text.encode())
