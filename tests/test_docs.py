"""README and docs/: every example runs in an empty folder, every link leads somewhere, the tables are true."""

import ast
import dataclasses
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning_runs
import pytest

import saev_torch
from saev_torch import IndexedConfig, OrderedConfig, ShuffledConfig
from saev_torch.bench.compare import table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]}
EXAMPLES = {page: re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE) for page, text in PAGES.items()}


def test_readme_says_what_it_is_and_then_the_two_commands() -> None:
    assert re.match(r"# saev_torch\n\n[^`#]{60,250}\n\n```sh\nmake demo .*\nmake test .*\n```\n", README)


def test_readme_is_short() -> None:
    assert README.count("\n") < 200


def test_no_page_names_a_version_that_is_not_pinned() -> None:
    pins = (ROOT / "constraints.txt").read_text()
    for pin in re.findall(r"[\w-]+==[\d.]+", "".join(PAGES.values())):
        assert pin in pins


# Examples


def run_page(page: str) -> dict[str, Any]:
    """Run the examples of a page, one after the other, here; return the names that they made."""
    names: dict[str, Any] = {}
    for block in EXAMPLES[page]:
        exec(compile(block, page, "exec"), names)
    return names


@pytest.mark.parametrize("page", sorted(page for page, blocks in EXAMPLES.items() if blocks and "trainers" not in page))
def test_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], page: str
) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_page(page)
    assert capfd.readouterr().err == ""
    if page == "README.md":
        assert names["x"].shape[1] == 64
        assert len(names["loader"]) == -(-400 * 49 // 1024)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed")
def test_examples_of_trainers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand, and then Lightning again as the page says, from the last checkpoint."""
    for message in lightning_runs.WARNINGS:
        pytest.importorskip("warnings").filterwarnings("ignore", message)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    monkeypatch.chdir(tmp_path)
    names = run_page("docs/guide/trainers.md")
    assert names["trainer"].global_step == 10
    (block,) = [block for block in EXAMPLES["docs/guide/trainers.md"] if "lightning " in block]
    longer = block[block.index("saving =") :].replace("max_epochs=2", "max_epochs=3")
    exec(longer.replace("num_workers=2)", 'num_workers=2), ckpt_path="last"'), names)
    assert names["trainer"].global_step == 15


def test_each_page_of_the_guide_starts_with_code() -> None:
    guide = {page: text for page, text in PAGES.items() if page.startswith("docs/guide/")}
    assert len(guide) >= 7
    for page, text in guide.items():
        if not page.endswith("trainers.md"):
            assert re.match(r"# \w+\n\n[^`#]+\n\n```python\n", text), page


# Links


def _anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", sorted(PAGES))
def test_no_link_is_broken(page: str) -> None:
    text = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\(([^)]+)\)", text)
    for link in links:
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.is_file(), link
        assert not anchor or anchor in _anchors(target.read_text()), link


@pytest.mark.parametrize("page", sorted(PAGES))
def test_files_that_are_named_are_there(page: str) -> None:
    for name in re.findall(r"`((?:docs|examples|tests|notebooks|saev_torch)/[\w/.]*)`", PAGES[page]):
        assert (ROOT / name).exists(), name


# The site


@pytest.mark.slow
def test_the_site(tmp_path: Path) -> None:
    """It builds without a warning, and has every public name."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings_handlers.python")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "reference.html").read_text()
    missing = [name for name in saev_torch.__all__ if f'id="saev_torch.{name}"' not in reference]
    assert missing == ["__version__"]
    pages = {str(path.relative_to(ROOT / "docs").with_suffix(".html")) for path in ROOT.glob("docs/**/*.md")}
    assert all((tmp_path / page).exists() for page in pages)


# Tables


@pytest.mark.parametrize(("column", "config"), [(1, IndexedConfig), (2, OrderedConfig), (3, ShuffledConfig)])
def test_the_table_of_options_is_complete(column: int, config: type[Any]) -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \| (\S+) \| (\S+) \| \S", PAGES["docs/options.md"], re.MULTILINE)
    said = {row[0]: row[column].strip("`") for row in rows if row[column] != "-"}
    default = {field.name: getattr(config(), field.name) for field in dataclasses.fields(config)}
    del said["shards"], default["shards"]
    assert {name: ast.literal_eval(value) for name, value in said.items()} == default


@pytest.mark.parametrize("page", ["README.md", "docs/benchmarks.md"])
def test_the_figures_are_those_of_the_run(page: str) -> None:
    report = json.loads((ROOT / "docs" / "figures.json").read_text())
    assert f"<!-- figures -->\n{table(report)}\n<!-- /figures -->" in PAGES[page]


def test_every_command_has_a_line() -> None:
    from saev_torch.__main__ import COMMANDS

    assert {*COMMANDS} == {*re.findall(r"^python -m saev_torch (\w+)", PAGES["docs/commands.md"], re.MULTILINE)}


def test_moving_names_every_name_of_saev() -> None:
    import test_compat

    page = PAGES["docs/moving.md"]
    for module, names in test_compat.PAGE.items():
        for name in names:
            full = f"{module}.{name}" if module else name
            assert re.search(rf"`{full}`|`{name}`", page), full
