"""The comparison with other loaders: what it measures, what it writes, and that pages say it."""

import json
from pathlib import Path

import pytest

from saev_torch.__main__ import main
from saev_torch.bench.compare import table

pytest.importorskip("matplotlib")
pytest.importorskip("psutil")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the figures, the chart, and a page, of a run that is as small as can be."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "page.md").write_text("before\n<!-- figures -->\nold\n<!-- /figures -->\nafter\n")
    run(folder, "--make-gb=0.03", "--batch-size=512", "--rounds=1", "--seconds=0.01")
    return folder


def run(folder: Path, *options: str) -> None:
    json, plot, page = (folder / name for name in ("figures.json", "figures.svg", "page.md"))
    assert main(["compare", f"--json={json}", f"--plot={plot}", "--pages", str(page), *options]) == 0


def test_nothing_to_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--draw-only", f"--json={tmp_path / 'none.json'}"]) == 2
    assert "--draw-only: expected the figures of a run" in capsys.readouterr().err


def test_what_is_measured(made: Path) -> None:
    report = json.loads((made / "figures.json").read_text())
    assert {"shuffled", "uniform", "memmap", "torchdata"} <= {*report["sides"]}
    expected = report["data"]["distinct_in_a_uniform_draw"]
    for name, side in report["sides"].items():
        assert side["warm"]["median"] > 0
        assert side["cold"]["median"] > 0
        if name in ("uniform", "memmap", "torchdata"):
            assert side["distinct_examples"] == pytest.approx(expected, rel=0.1)
    assert report["limits"]["warm"] > 0


def test_what_is_written(made: Path) -> None:
    report = json.loads((made / "figures.json").read_text())
    page = (made / "page.md").read_text()
    assert page == f"before\n<!-- figures -->\n{table(report)}\n<!-- /figures -->\nafter\n"
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
    for side in report["sides"].values():
        (row,) = [row for row in rows if row[0] == f"| {side['label']}"]
        assert row[1] == f"{side['warm']['median'] / 1e3:,.0f}"
    chart = (made / "figures.svg").read_bytes()
    assert b"<svg" in chart
    run(made, "--draw-only")
    assert (made / "figures.svg").read_bytes() == chart
