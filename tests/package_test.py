import re
import subprocess
import sys

from conftest import ROOT

import keras_dcft


def test_public_names_are_documented_with_an_example():
    verbs = [name for name in keras_dcft.__all__ if callable(getattr(keras_dcft, name))]
    assert set(keras_dcft.__all__) - set(verbs) == {"PAPER_RECIPE"}  # docs/choices.md has it
    for name in verbs:
        docstring = getattr(keras_dcft, name).__doc__
        assert "Args:" in docstring
        assert "Raises:" in docstring
        assert ">>> " in docstring


def test_docstring_examples_are_true(run_python):
    program = (
        "import doctest, keras, keras_dcft\n"
        "from keras_dcft import *\n"
        "import keras_dcft.increments, keras_dcft.layers, keras_dcft.adaptation\n"
        "names = {**vars(keras_dcft), 'keras': keras}\n"
        "modules = [keras_dcft.increments, keras_dcft.layers, keras_dcft.adaptation,\n"
        "           keras_dcft.regularizers, keras_dcft.adapters, keras_dcft.callbacks,\n"
        "           keras_dcft.report, keras_dcft.budgets, keras_dcft.schedules]\n"
        "results = [doctest.testmod(m, extraglobs=names) for m in modules]\n"
        "print(sum(r.failed for r in results), sum(r.attempted for r in results))"
    )
    failed, attempted = run_python(program).splitlines()[-1].split()
    assert int(failed) == 0
    assert int(attempted) >= 8


def test_only_public_keras_outside_of_the_one_place():
    for path in (ROOT / "keras_dcft").glob("*.py"):
        source = path.read_text()
        if path.name != "keras_internals.py":
            assert "keras.src" not in source, path
            assert "_tracker" not in source, path
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
        assert [name for name in names if hasattr(cls.base_class, name)] == []


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


def test_making_the_classes_at_import_makes_no_variable():
    # Making them must not build or call anything.
    program = (
        "import keras\n"
        "made = []\n"
        "original = keras.Variable.__init__\n"
        "keras.Variable.__init__ = lambda *a, **k: made.append(1) or original(*a, **k)\n"
        "import keras_dcft\n"
        "print(len(made))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert result.stdout.strip() == "0", result.stderr
