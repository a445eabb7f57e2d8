"""The package as it is given away: what is in it, that it installs and runs, and that a user's types pass."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from test_docs import EXAMPLES

import saev_torch

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "tests" / "user_script.py"
SITE = sysconfig.get_paths()["purelib"]
_BUILD = (
    "from setuptools import build_meta as b; b.build_sdist('out'); b.build_wheel('out'); b.build_editable('editable')"
)


def run(*command: str | Path, cwd: Path) -> str:
    # What is found must be what was installed.
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=240, cwd=cwd, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository in which the archives are built, by the build system that pyproject.toml names."""
    pytest.importorskip("setuptools", "77", reason="building needs setuptools 77 or later")
    root = tmp_path_factory.mktemp("built")
    for name in ("saev_torch", "tests", "notebooks", "docs"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, root)
    run(sys.executable, "-c", _BUILD, cwd=root)
    return root


def make_environment(root: Path, wheel: Path) -> Path:
    """A new environment with the wheel, and by a path what it requires; return its folder of programs."""
    pytest.importorskip("pip", reason="installing needs pip")
    run(sys.executable, "-m", "venv", "--without-pip", root, cwd=root.parent)
    python = root / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--disable-pip-version-check"]
    run(*pip, "--no-deps", "--no-index", "--no-compile", wheel, cwd=root.parent)
    (site,) = root.glob("lib/python*/site-packages")
    (site / "required.pth").write_text(f"{SITE}\n")
    return root / "bin"


@pytest.fixture(scope="module")
def programs(built: Path) -> Path:
    (wheel,) = (built / "out").glob("*.whl")
    return make_environment(built / "regular", wheel)


def test_what_is_given_away(built: Path) -> None:
    (wheel,), (sdist,) = (built / "out").glob("*.whl"), (built / "out").glob("*.tar.gz")
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "saev_torch").rglob("*.py")} | {"saev_torch/py.typed"}
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == modules
    about = zipfile.ZipFile(wheel).read(next(name for name in names if name.endswith("METADATA"))).decode()
    assert "\nLicense-Expression: MIT\n" in about
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    # All that it needs to be built, and no part of the tests, which need the whole repository.
    assert modules | {"LICENSE", "README.md", "pyproject.toml", "setup.cfg"} <= held
    assert not [name for name in held if name.startswith(("tests", "notebooks"))]


def test_the_index_would_take_it(built: Path) -> None:
    pytest.importorskip("twine", reason="twine is not installed")
    found = run(sys.executable, "-m", "twine", "--no-color", "check", "--strict", *(built / "out").iterdir(), cwd=built)
    assert found.count("PASSED") == 2


_RUN = """
import sys, saev_torch
print(saev_torch.__file__, saev_torch.__version__, flush=True)
with open(sys.argv[1]) as program:
    sys.argv = ["saev-torch", "inspect", "--help"]
    exec(compile(program.read(), "saev-torch", "exec"))
"""


def test_it_runs_where_it_is_installed(built: Path, programs: Path) -> None:
    # The program in this same process, as torch takes seconds to come.
    found = run(programs / "python", "-c", _RUN, programs / "saev-torch", cwd=built / "out")
    path, version, *shown = found.split(maxsplit=2)
    assert Path(path).is_relative_to(built / "regular")
    assert version == saev_torch.__version__
    assert shown[0].startswith("usage: saev-torch inspect ")


@pytest.fixture(scope="module")
def environments(built: Path, programs: Path) -> list[Path]:
    """One with a regular install, and one with an editable install."""
    (wheel,) = (built / "editable").glob("*.whl")
    return [programs.parent, make_environment(built / "environment", wheel).parent]


@pytest.fixture
def scripts(tmp_path: Path) -> list[str]:
    """What a user would write, here: a script of ours, and all that each page of the documentation shows."""
    shutil.copy(SCRIPT, tmp_path)
    names = [SCRIPT.name]
    for page, blocks in EXAMPLES.items():
        if blocks:
            names.append("page_" + page.removesuffix(".md").replace("/", "_") + ".py")
            # torch takes a list as a data set, and does not declare it.
            text = re.sub(r"(.*DataLoader\(examples,.*)", r"\1  # pyright: ignore[reportArgumentType]", "".join(blocks))
            (tmp_path / names[-1]).write_text(text)
    assert len(names) > 10
    return names


_MYPY = """[mypy]
strict = True
# A user's own functions, which pages leave bare, and classes of modules that are skipped below, or have no types.
disallow_untyped_defs = False
disallow_untyped_calls = False
disallow_subclassing_any = False
# Their own annotations take a minute to read, and pyright reads them; the last three come with lightning.
[mypy-torch.*,torchmetrics.*,transformers.*,IPython.*]
follow_imports = skip
[mypy-torchdata.*]
ignore_missing_imports = True
"""


def test_types_pass_with_mypy(environments: list[Path], scripts: list[str], tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="mypy is not installed")
    (tmp_path / "mypy.ini").write_text(_MYPY)
    for environment in environments:
        mypy = [sys.executable, "-m", "mypy", "--cache-dir", tmp_path / "cache"]
        assert "Success" in run(*mypy, "--python-executable", environment / "bin" / "python", *scripts, cwd=tmp_path)


def test_types_pass_with_pyright(environments: list[Path], scripts: list[str], tmp_path: Path) -> None:
    """By basedpyright, which is pyright with a node of its own; `standard` is what pyright checks unless told."""
    pytest.importorskip("basedpyright", reason="basedpyright is not installed")
    for environment in environments:
        config = {"typeCheckingMode": "standard", "venvPath": str(environment.parent), "venv": environment.name}
        # To pyright it is a warning.
        config["reportPossiblyUnboundVariable"] = "warning"
        (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
        assert "0 errors" in run(sys.executable, "-m", "basedpyright", *scripts, cwd=tmp_path).splitlines()[-1]
