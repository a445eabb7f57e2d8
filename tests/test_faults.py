"""Faults by real causes: what the user sees, in what time, and that nothing is left, lost or repeated."""

import dataclasses
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import contracts
import factory
import faults
import pytest
from conftest import PATIENCE_S

# What the leader of the session may take on top of the fault's own time: on a busy machine processes start slowly.
PATIENCE = 6.0 * float(os.environ.get("SAEV_TORCH_PATIENCE", "1"))
# Files of torch's queues; locks of copies stay; so do finished copies, and the notes of what they were made from.
MAY_STAY = re.compile(r"saev_torch-\d+/\w+(\.lock|\.use|/[\w.]+)")


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    here = Path(__file__).parent
    shim = tmp_path_factory.mktemp("shim") / "faults.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", shim, here / "faults.c", "-ldl"], check=True)
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    env |= {"LD_PRELOAD": str(shim)}
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", here / "faults.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env,
        bufsize=0,
    )  # fmt: skip
    yield process
    process.stdin.close()
    process.wait(PATIENCE_S)
    process.stdout.close()


@pytest.fixture(scope="session", autouse=True)
def started(server):
    """Before the first test, so that it is not taken for a leak of it."""


@pytest.fixture(scope="session")
def pristine(tmp_path_factory):
    root = tmp_path_factory.mktemp("pristine")
    specs = {(name, dtype): spec_of(name, dtype) for name in faults.SPECS for dtype in ("float32", "bfloat16")}
    return {key: factory.make_shards(root / " ".join(key), spec) for key, spec in specs.items()}


def spec_of(name, dtype):
    return dataclasses.replace(faults.SPECS[name], dtype=dtype)


@pytest.fixture(scope="session")
def references(pristine):
    """The digests of all batches in order, by kind of loader and data; nothing fails here."""
    found = {}

    def reference(fault, dtype):
        key = fault.kind, fault.spec, dtype
        if key not in found:
            shards = pristine[fault.spec, dtype]
            cfg = faults.config_of(faults.Fault("", "", "", kind=fault.kind, spec=fault.spec), shards)
            batches = list(contracts.make_data_set(cfg))
            contracts.check_epoch(batches, spec_of(fault.spec, dtype), cfg)
            found[key] = [contracts.digest([batch]) for batch in batches]
        return found[key]

    return reference


def in_session(sid):
    """Processes of a session that are not zombies, whose parents may be slow."""
    alive = []
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == sid and fields[0] not in "ZX":
            alive.append(int(entry.name))
    return alive


def wait_for_end(sid, seconds):
    deadline = time.monotonic() + seconds
    while (alive := in_session(sid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return alive


def answer(server, seconds):
    """The next line of the server, without a buffer; None if there is none in time."""
    line = b""
    while not line.endswith(b"\n"):
        if not select.select([server.stdout], [], [], seconds)[0]:
            return None
        line += os.read(server.stdout.fileno(), 1)
    return line


CASES = [pytest.param(fault, "float32", id=fault.name) for fault in faults.FAULTS]
CASES += [pytest.param(faults.BY_NAME[name], "bfloat16", id=f"{name}-bfloat16") for name in faults.ON_HALVES]


@pytest.mark.parametrize(("fault", "dtype"), CASES)
def test_fault(fault, dtype, server, pristine, references, tmp_path):
    shards = tmp_path / "shards" / pristine[fault.spec, dtype].name
    shutil.copytree(pristine[fault.spec, dtype], shards)
    out = tmp_path / "out"
    out.mkdir()
    server.stdin.write(json.dumps({"case": fault.name, "shards": str(shards), "out": str(out)}).encode() + b"\n")
    pid = int(answer(server, PATIENCE_S))
    try:
        # What hangs must fail its own test, and not the ones that follow.
        code = answer(server, PATIENCE_S + fault.within_s * PATIENCE)
        began = time.monotonic()
        alive = wait_for_end(pid, fault.within_s * PATIENCE)
        seconds = time.monotonic() - began
    finally:
        for left in in_session(pid):
            os.kill(left, signal.SIGKILL)
    if code is None:
        answer(server, PATIENCE_S)
        pytest.fail(f"the process hangs; standard error: {(out / 'stderr').read_text()}")
    code = int(code)
    stderr = (out / "stderr").read_text()
    assert not alive, f"processes are left: {alive}"
    if fault.dies_of:
        assert code == -fault.dies_of
        assert (out / "began").exists()
        assert not list((out / "tmp").rglob("*"))
        report(fault, seconds)
        return

    assert code == 0, stderr
    outcome = json.loads((out / "outcome").read_text())
    if "skip" in outcome["extra"]:
        pytest.skip(outcome["extra"]["skip"])
    report(fault, outcome["seconds"], outcome["error"], outcome["message"])
    if fault.error == "RuntimeError":  # torch notices, or we do, whoever is first
        assert outcome["error"] in ("RuntimeError", "WorkerLostError"), outcome["message"]
    else:
        assert outcome["error"] == fault.error, f"{outcome['message']}; standard error: {stderr}"
    if fault.error not in (None, "RuntimeError", "KeyboardInterrupt", "TrainingError"):
        assert "SaevTorchError" in outcome["bases"]
    assert re.search(".*".join(fault.says), outcome["message"], re.DOTALL), outcome["message"]
    assert outcome["seconds"] < fault.within_s * PATIENCE
    for pattern in fault.logs:
        assert re.search(pattern, stderr), stderr

    wanted = references(fault, dtype)
    if fault.error is None and not fault.stops_early:
        assert outcome["delivered"] == wanted
    else:
        assert len(outcome["delivered"]) < len(wanted)
        assert outcome["delivered"] == wanted[: len(outcome["delivered"])]

    assert outcome["leaks"] == []
    assert [name for name in outcome["temporary"] if not MAY_STAY.fullmatch(name)] == []
    assert outcome["extra"].get("child", 0) == 0
    assert outcome["extra"].get("copies", 1) == 1
    if fault.name == "killed-resume":
        assert "worker" in outcome["extra"]["error"]
        assert "worker" in outcome["extra"]["again"]


def report(fault, seconds, error=None, message=""):
    """With $SAEV_TORCH_FAULTS: append what was seen to that file."""
    path = os.environ.get("SAEV_TORCH_FAULTS")
    if path:
        with open(path, "a") as file:
            file.write(f"{fault.name}\t{seconds:.2f} s\t{error}\t{message[-300:]!r}\n")


def test_the_table_of_the_page_is_this_one():
    page = (Path(__file__).parents[1] / "docs" / "faults.md").read_text()
    assert faults.table() in page


def test_enough_faults():
    assert len(faults.BY_NAME) == len(faults.FAULTS) >= 25
