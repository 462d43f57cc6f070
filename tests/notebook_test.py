"""The notebook runs from its first cell to its last, and is committed with what a run gave."""

import nbclient
import nbformat
import pytest
from conftest import ROOT
from one_backend import only_on

NOTEBOOK = nbformat.read(ROOT / "examples" / "finetune_in_ten_minutes.ipynb", as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook) -> str:
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def test_it_has_the_outputs_of_one_run():
    counts = [cell.execution_count for cell in code_cells(NOTEBOOK)]
    assert counts == list(range(1, len(counts) + 1))
    pictures = [o for cell in code_cells(NOTEBOOK) for o in cell.outputs if "image/png" in str(o)]
    assert len(pictures) == 1
    assert "The reloaded model differs by 0.0" in printed(NOTEBOOK)


@pytest.mark.real
@only_on("torch")
def test_it_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("NOTEBOOK_TRAIN_SIZE", "48")
    monkeypatch.setenv("NOTEBOOK_EPOCHS", "1")
    notebook = nbformat.from_dict(NOTEBOOK)
    for cell in code_cells(notebook):
        cell.outputs = []
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
    assert "Keras" in printed(notebook)
    assert "on torch" in printed(notebook)
    assert "The reloaded model differs by 0.0" in printed(notebook)
    assert len(code_cells(notebook)[-1].outputs[-1].text.splitlines()) == 3  # served answers
