"""The notebook of the examples runs, and what is stored in it is what comes out."""

import shutil

import nbformat
import pytest
from conftest import EXAMPLES
from nbclient import NotebookClient


pytestmark = pytest.mark.slow


NOTEBOOK = EXAMPLES / "llava_openvino.ipynb"


def outputs(cell):
    """What a cell shows: text, and the types of what is not text."""
    for output in cell.outputs:
        if output.output_type == "stream" and output.name == "stdout":
            yield output.text
        elif output.output_type in ("display_data", "execute_result"):
            yield sorted(output.data)
        elif output.output_type == "error":
            yield output.evalue


def kinds(shown):
    """Kinds of outputs of a cell. A text may come in pieces."""
    return {"text" if isinstance(item, str) else tuple(item) for item in shown}


def test_it_gives_what_it_shows(quick_path, tmp_path, monkeypatch):
    (tmp_path / "shapes").symlink_to(EXAMPLES / "shapes")
    monkeypatch.setenv("PATH", quick_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shutil.copyfile(NOTEBOOK, tmp_path / NOTEBOOK.name)
    stored = nbformat.read(NOTEBOOK, 4)
    notebook = nbformat.read(tmp_path / NOTEBOOK.name, 4)
    NotebookClient(
        notebook, timeout=240, coalesce_streams=True, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    found = [list(outputs(cell)) for cell in notebook.cells if cell.cell_type == "code"]
    expected = [list(outputs(cell)) for cell in stored.cells if cell.cell_type == "code"]
    assert len(found) == len(expected) == 11
    assert list(map(kinds, found)) == list(map(kinds, expected))
    text = "".join(item for cell in found for item in cell if isinstance(item, str))
    for line in ("The circle is red.", "The star is at the top right.", "A green triangle is at the bottom."):
        assert line in text
        assert line in str(expected)
    assert "Nothing was published (--dry-run)." in text
    assert any("image/png" in item for cell in expected for item in cell if isinstance(item, list))
