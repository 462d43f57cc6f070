"""Every KerasHub backbone: adapted, trained, saved, merged, removed."""

import zlib

import backbones
import keras
import keras_hub
import pytest
from backbones.checks import WITHOUT_BANK, WITHOUT_FILES, glance, measure


def test_every_exported_backbone_is_here():
    assert set(backbones.exported()) <= set(backbones.BACKBONES)


# JAX compiles every single operation of a model that is called outside of a compiled function.
SHARES = ("torch", "torch", "torch", "tensorflow", "tensorflow", "jax")
MANY_OPERATIONS = (
    "DFineBackbone",
    "FluxBackbone",
    "Gemma4Backbone",
    "GptOssBackbone",
    "SAMBackbone",
    "StableDiffusion3Backbone",
    "SwinTransformerBackbone",
    "T5Backbone",
    "T5Gemma2Backbone",
)


def is_walked_here(name) -> bool:
    """Whether this backend is the one of three that does everything to a backbone."""
    if name in MANY_OPERATIONS:
        return keras.backend.backend() == "torch"
    return SHARES[zlib.crc32(name.encode()) % len(SHARES)] == keras.backend.backend()


@pytest.mark.parametrize("name", backbones.BACKBONES)
def test_backbone(name, tmp_path, request):
    if not hasattr(keras_hub.models, name):
        pytest.skip(f"this KerasHub has no {name}")
    whole = request.config.getoption("--all-walks") or is_walked_here(name)
    seen = measure(name, tmp_path) if whole else glance(name)
    if not seen["dense_layers"]:
        assert "at least one built Dense or EinsumDense" in seen["error"]
        return
    assert len(seen["adapted"]) == seen["dense_layers"] - len(seen["narrow"])
    assert seen["adapter_effect"] > 1e-4
    if not whole:
        return
    assert seen["start_difference"] == 0
    assert seen["changed_base_weights"] == []
    assert seen["untrained"] == []
    if name not in WITHOUT_FILES:
        assert seen["file_difference"] == 0
        assert seen["same_config"]
        assert seen["removed_difference"] == 0
    if name in WITHOUT_BANK:
        assert WITHOUT_BANK[name] in seen["bank"]
    else:
        assert seen["bank"] < 1e-4, seen["bank"]
    assert seen["merged_difference"] < 1e-4
    assert seen["merged_class"] == name
