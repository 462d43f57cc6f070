"""Every KerasHub backbone: adapted, trained, saved, merged, removed."""

import backbones
import pytest
from backbones.checks import WITHOUT_FILES, measure


def test_every_exported_backbone_is_here():
    assert list(backbones.BACKBONES) == backbones.exported()


@pytest.mark.parametrize("name", backbones.exported())
def test_backbone(name, tmp_path):
    seen = measure(name, tmp_path)
    if not seen["dense_layers"]:
        assert "at least one built Dense or EinsumDense" in seen["error"]
        return
    assert len(seen["adapted"]) == seen["dense_layers"] - len(seen["narrow"])
    assert seen["start_difference"] == 0
    assert seen["changed_base_weights"] == []
    assert seen["untrained"] == []
    assert seen["adapter_effect"] > 1e-4
    if name not in WITHOUT_FILES:
        assert seen["file_difference"] == 0
        assert seen["same_config"]
        assert seen["removed_difference"] == 0
    assert seen["merged_difference"] < 1e-4
    assert seen["merged_class"] == name
