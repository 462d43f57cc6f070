"""What type checkers see of the package: `make lint` has them look at `typed_program.py`."""

import ast

import typed_program
from conftest import ROOT

import keras_dcft


def test_the_program_for_type_checkers_runs(tmp_path):
    typed_program.main(tmp_path)


def test_the_program_for_type_checkers_uses_everything_public():
    tree = ast.parse((ROOT / "tests" / "typed_program.py").read_text())
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert set(keras_dcft.__all__) <= used


def test_users_type_checkers_are_told_that_there_are_types():
    assert (ROOT / "keras_dcft" / "py.typed").is_file()
