import ast
import doctest
import importlib
import pkgutil
import re
import sys
import tomllib

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


def test_what_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    of_package = {re.match(r"[\w-]+", text)[0].lower() for text in project["dependencies"]}
    # A backbone is given by the user, a backend is there, a picture asks for matplotlib by name.
    of_extras = {"keras-hub", "tensorflow", "jax", "torch", "matplotlib"}
    for path in (ROOT / "keras_dcft").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module]
            for name in names:
                top = name.partition(".")[0]
                if top not in sys.stdlib_module_names and top != "keras_dcft":
                    assert top.replace("_", "-") in of_package | of_extras, (path, name)


def test_changelog_and_citation_have_the_version_and_its_day():
    version = keras_dcft.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text()
    section = rf"^## {re.escape(version)} \((\d{{4}}-\d\d-\d\d)\)$"
    day = re.search(section, changelog, re.MULTILINE)[1]
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {version}\n" in citation
    assert f'\ndate-released: "{day}"\n' in citation


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
