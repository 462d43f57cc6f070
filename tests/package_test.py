import doctest
import importlib
import pkgutil
import re

import keras
import pytest
from conftest import ROOT

import keras_dcft


def test_public_names_are_documented_with_an_example():
    verbs = [name for name in keras_dcft.__all__ if callable(getattr(keras_dcft, name))]
    assert set(keras_dcft.__all__) - set(verbs) == {"PAPER_RECIPES"}  # docs/choices.md has it
    for name in verbs:
        docstring = getattr(keras_dcft, name).__doc__
        assert "Args:" in docstring
        assert "Raises:" in docstring
        assert ">>> " in docstring


@pytest.mark.parametrize("module", pkgutil.iter_modules(keras_dcft.__path__), ids=lambda m: m.name)
def test_docstring_examples_are_true(module):
    names = {**{name: getattr(keras_dcft, name) for name in keras_dcft.__all__}, "keras": keras}
    results = doctest.testmod(
        importlib.import_module(f"keras_dcft.{module.name}"), extraglobs=names
    )
    assert results.failed == 0


def test_only_public_keras_outside_of_the_one_place():
    for path in (ROOT / "keras_dcft").glob("*.py"):
        source = path.read_text()
        if path.name != "keras_internals.py":
            assert "keras.src" not in source, path
            assert "_tracker" not in source, path
        if path.name != "fused.py":
            for backend in ("tensorflow", "jax", "torch"):
                assert f"import {backend}" not in source, path


def test_no_private_hook_of_keras_is_overridden():
    for cls in (
        keras_dcft.DCFTDense,
        keras_dcft.DCFTEinsumDense,
        keras_dcft.DCFTEmbedding,
        keras_dcft.DCFTReversibleEmbedding,
    ):
        ours = [base for base in cls.__mro__ if base.__module__.startswith("keras_dcft")]
        names = {name for base in ours for name in vars(base) if re.match("_[^_]", name)}
        assert len(names) > 4
        assert [name for name in names if hasattr(cls.dcft_base_class, name)] == []


def test_imports_without_keras_hub(run_python):
    program = (
        "import sys\n"
        "class NoHub:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'keras_hub':\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "import importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name: None if name == 'keras_hub' else find(name)\n"
        "sys.meta_path.insert(0, NoHub())\n"
        "import keras, keras_dcft\n"
        "model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(16)])\n"
        "keras_dcft.enable_dcft(model)\n"
        "print(type(model).__name__, 'keras_hub' in sys.modules)"
    )
    assert run_python(program).strip() == "DCFTSequential False"
