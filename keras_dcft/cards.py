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

from keras_dcft import shares
from keras_dcft.models import adapter_names, config_of
from keras_dcft.paths import joined, with_itself
from keras_dcft.settings import AdapterSettings, counted, shortened
from keras_dcft.writing import write_atomically

README = "README.md"
PAPER = "https://arxiv.org/abs/2503.01419"
HUB_MODEL = re.compile(r"(?:hf://)?([\w.-]+/[\w.-]+)")


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
    facts = {name: _facts_of(model, name) for name in adapter_names(model)}
    content = updated(readme, "preset", facts, code, "keras-hub", base, metrics, data)
    before = readme.read_bytes() if readme.exists() else None
    try:
        yield
        write_atomically(readme, content)
    except BaseException:
        # A task's backbone may have written its own by now.
        if before is None:
            readme.unlink(missing_ok=True)
        else:
            write_atomically(readme, before)
        raise


def updated(readme, key, facts, code, library, base=None, metrics=None, data=None) -> bytes:
    """What a card is to be with a section about adapters, instead of the one of the same key.

    Args:
        readme: the card's path; there may be none yet.
        key: str, what the section is about.
        facts: dict of adapters by name to dicts of what there is to say of each.
        code: str, Python that loads it.
        library: str, which loads it.
        base, metrics, data: as for `write_model_card`.
    """
    section = _section(facts, code, base, metrics, data)
    model_id = _hub_model(base)
    front = {"library_name": library, "tags": "\n- dcft\n- keras"}
    if model_id:
        front["base_model"] = model_id
        if library == "keras_dcft":
            front["base_model_relation"] = "adapter"
    # In bytes: a file that came with other line ends keeps them.
    text = readme.read_bytes().decode("utf-8-sig") if readme.exists() else ""
    text = text or f"# {readme.resolve().parent.name}\n"
    return _with_front(_with_section(readme, text, key, section), front).encode()


def _section(facts, code, base, metrics, data) -> str:
    first = next(iter(facts.values()))
    rows = [(fact, *(column[fact] for column in facts.values())) for fact in first]
    parts = [
        "## Adapter",
        f"Fine-tuned with [DCFT]({PAPER}), deconvolution in a subspace, by `keras_dcft`: the "
        "base's weights are frozen, and each adapted weight has an increment that is learned in a "
        "subspace and brought to full size by a transposed convolution.",
        _table(["", *(f"`{name}`" if len(facts) > 1 else "" for name in facts)], rows),
    ]
    if base is not None:
        model_id = _hub_model(base)
        link = model_id and f"[{model_id}](https://huggingface.co/{model_id})"
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


def _facts_of(model, name) -> dict:
    """What there is to say of a model's adapter."""
    layers = with_itself(model)
    base = shares.base_weights(model)
    trained = {path: _trained_beside(layer, name) for path, layer in layers.items()}
    trained = {path: found for path, found in trained.items() if found}
    values = (shares.adapter_values(layer, name).values() for layer in layers.values())
    beside = shares.size(base[weight] for weight in set(itertools.chain(*trained.values())))
    adapters = sum(map(shares.size, values))
    return facts_of(config_of(model, name), trained, adapters, beside, shares.size(base.values()))


def _trained_beside(layer, name) -> list:
    """The ids of what is trained of a layer in full, also while `trainable` is off for a model."""
    is_known = name in shares.names_of(layer)
    if is_known and shares.is_trained(layer, name) and not layer.trainable:
        return [id(variable) for variable in shares.own_weights(layer)]
    return shares.trained_beside(layer, name)


def facts_of(config, trained, adapters, beside, total) -> dict:
    """What there is to say of an adapter, by how it is called in a card.

    Args:
        config: its `dcft_config`.
        trained: paths of layers that are trained in full.
        adapters, beside, total: int, how many numbers there are in adapters, trained in full, and
            in the base model.
    """
    sizes = Counter(config["layers"].values())
    own = config.get("adapters", {"": config}).values()
    trainable = adapters + beside
    return {
        **{
            key: ", ".join(map(str, dict.fromkeys(numbers[key] for numbers in own)))
            for key in AdapterSettings().common()
        },
        "kernel size": ", ".join(f"{d} ({counted(n, 'layer')})" for d, n in sorted(sizes.items())),
        "trained in full": joined(trained),
        "numbers in adapters": f"{adapters:,}",
        "numbers trained in full": f"{beside:,}",
        "trainable in all": f"{trainable:,}, {100 * trainable / total:.3g} % of the model's "
        f"{total:,}",
    }


def _table(head, rows) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", r"\|").split())


def _hub_model(base) -> str | None:
    """The model of Hugging Face's hub that a base is called by, if it is no folder's path."""
    if base is not None and not isinstance(base, str):
        raise TypeError(f"`base` must be a str. Received: base={shortened(repr(base))}")
    found = HUB_MODEL.fullmatch(base or "")
    return found[1] if found and not Path(base).exists() else None


def _with_section(readme, text, key, section) -> str:
    begin, end = (
        f"<!-- {word} keras_dcft: {urllib.parse.quote(key)} -->" for word in ("begin", "end")
    )
    section = f"{begin}\n{section}\n{end}"
    before, has_begin, rest = text.partition(begin)
    _, has_end, after = rest.partition(end)
    if has_begin and has_end:
        return before + section + after
    if has_begin or end in text:
        raise ValueError(
            f"{readme}: take the rest of the section out, or put both of its comments back. The "
            f"file must have '{begin}' and after it '{end}'. It has one of them."
        )
    return f"{text.rstrip()}\n\n{section}\n"


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
