"""The notebooks are thin clients: short cells, nothing defined, no outputs stored, and they run from top to bottom."""

import ast
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient

import factlens as fl

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
LINES_A_CELL = 15

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path):
    notebook = nbformat.read(path, as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def parsed(cell):
    return ast.parse(TransformerManager().transform_cell(cell.source))


def test_there_are_notebooks():
    assert NOTEBOOKS


@every_notebook
def test_cells_are_short_and_define_nothing(path):
    unwelcome = (
        ast.FunctionDef,
        ast.AsyncFunctionDef,
        ast.ClassDef,
        ast.Lambda,
        ast.For,
        ast.While,
    )
    for cell in code_cells(path):
        assert len(cell.source.splitlines()) <= LINES_A_CELL, cell.source
        assert not [each for each in ast.walk(parsed(cell)) if isinstance(each, unwelcome)], (
            cell.source
        )


@every_notebook
def test_the_first_cell_holds_parameters_and_the_bundled_model_is_the_default(path):
    statements = parsed(code_cells(path)[0]).body
    assert all(isinstance(each, ast.Assign) for each in statements)
    values = {each.targets[0].id: ast.literal_eval(each.value) for each in statements}
    assert values["MODEL"] is None
    assert all(name.isupper() for name in values)


@every_notebook
def test_no_output_is_stored(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert "widgets" not in notebook.metadata
    for cell in code_cells(path):
        assert cell.outputs == []
        assert cell.execution_count is None


@pytest.mark.notebooks
@every_notebook
def test_it_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(fl.__file__).parents[1]))
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=600,
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()
    complaints = [
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream" and output.name == "stderr"
    ]
    assert complaints == []
    assert list(tmp_path.iterdir()) == []  # nothing is left in the folder it ran in
