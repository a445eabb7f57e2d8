"""Activations that others wrote: from every kind of file to shards and back, bit by bit; and what is refused."""

import itertools
import json
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from saev_torch import Examples, Metadata, verify
from saev_torch.__main__ import main
from saev_torch.errors import ConfigError, FormatError, ShardsNotFoundError, WriteError
from saev_torch.tools.export import export_array
from saev_torch.tools.importing import arrays, chunks
from saev_torch.tools.importing.arrays import import_arrays
from saev_torch.tools.importing.rows import Joined
from saev_torch.writing import checkpoints

N, T, D = 11, 6, 8
ACTS = np.random.default_rng(0).standard_normal((N, T, D)).astype(np.float32)
HALF = torch.from_numpy(ACTS).half()
BRAIN = torch.from_numpy(ACTS).bfloat16()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same activations by the real writer of each format."""
    root = tmp_path_factory.mktemp("sources")
    np.save(root / "whole.npy", ACTS)
    np.save(root / "turned.npy", ACTS.astype(">f4"))
    np.savez(root / "named.npz", ids=np.arange(N), acts=HALF.numpy())
    np.savez_compressed(root / "packed.npz", ACTS)
    save_file({"acts": BRAIN, "ids": torch.arange(N)}, root / "tensors.safetensors", {"format": "pt"})
    for name, parts in {"chunks": (0, 4, 9, N), "rows": (0, 5, 37, 38, N * T)}.items():
        (root / name).mkdir()
        rows = BRAIN if name == "chunks" else torch.from_numpy(ACTS).flatten(0, 1)
        for i, (low, high) in enumerate(itertools.pairwise(parts)):
            # Nine comes before ten, as people count.
            if name == "chunks":
                torch.save({"acts": rows[low:high].clone(), "step": 3}, root / name / f"chunk_{8 + i}.pt")
            else:
                np.save(root / name / f"part{8 + i}.npy", rows[low:high].numpy())
    return root


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of activations as SAELens has them, in two files, by the real `datasets`."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    features = datasets.Features(
        {
            "blocks.3.hook_resid_post": datasets.Array2D(shape=(T, D), dtype="float16"),
            "token_ids": datasets.Sequence(datasets.Value("int32")),
        }
    )
    rows = {"blocks.3.hook_resid_post": list(HALF.numpy()), "token_ids": [list(range(T))] * N}
    folder = tmp_path_factory.mktemp("datasets") / "cached"
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(folder, num_shards=2)
    return folder


@pytest.fixture(scope="module")
def zarrs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Arrays of both formats, by the real `zarr`."""
    zarr = pytest.importorskip("zarr", reason="zarr is not installed")
    root = tmp_path_factory.mktemp("zarrs")
    zarr.create_array(str(root / "three"), shape=ACTS.shape, dtype="f4", chunks=(4, T, D))[:] = ACTS
    zarr.create_array(str(root / "two"), shape=ACTS.shape, dtype=">f4", chunks=(3, 2, D), zarr_format=2)[:] = ACTS
    group = zarr.open_group(str(root / "group"), mode="w")
    group.create_array("acts", shape=ACTS.shape, dtype="f2", chunks=(2, T, D), shards=(4, T, D))[:] = HALF.numpy()
    # Its loop is one thread for the life of the process: let it be there before a test looks.
    assert any("zarr" in thread.name for thread in threading.enumerate())
    return root


def stored(shards: Path) -> torch.Tensor:
    """All values of a directory, `[n, T, D]`, read without the package."""
    md = Metadata.load(shards)
    raw = b"".join(path.read_bytes() for path in sorted(shards.glob("acts*.bin")))
    ints = {"float32": torch.int32, "float16": torch.int16, "bfloat16": torch.int16}[md.dtype]
    return torch.frombuffer(bytearray(raw), dtype=ints).view(getattr(torch, md.dtype)).reshape(-1, T, D)


def check(source: Path, tmp_path: Path, expected: torch.Tensor, **options: object) -> Path:
    shards = import_arrays(source, tmp_path / "root", max_tokens_per_shard=4 * T, **options)
    md = Metadata.load(shards)
    assert (md.n_examples, md.tokens_per_example, md.d_model) == (N, T, D)
    found = stored(shards)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    assert verify(shards).ok
    back = np.load(export_array(shards, tmp_path / "back.npy"), mmap_mode="r")
    assert torch.equal(torch.from_numpy(np.array(back)), expected.float() if md.dtype == "bfloat16" else expected)
    return shards


@pytest.mark.parametrize(
    ("name", "expected", "options"),
    [
        ("whole.npy", torch.from_numpy(ACTS), {}),
        ("turned.npy", torch.from_numpy(ACTS), {}),
        ("named.npz", HALF, {}),
        ("packed.npz", torch.from_numpy(ACTS), {}),
        ("tensors.safetensors", BRAIN, {}),
        ("chunks", BRAIN, {"array": "acts"}),
        ("rows", torch.from_numpy(ACTS), {"tokens_per_example": T}),
    ],
)
def test_round_trip(sources, tmp_path, name, expected, options, monkeypatch):
    monkeypatch.setattr(arrays, "_BATCH_NBYTES", 2 * T * D * 4)
    shards = check(sources / name, tmp_path, expected, **options)
    md = Metadata.load(shards)
    assert (md.layers, md.ckpt, md.dataset, md.cls_token) == ((0,), name, sources / name, False)


def test_round_trip_of_a_data_set(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "_BATCH_NBYTES", 4 * T * D * 2)
    check(dataset, tmp_path, HALF)
    with pytest.raises(FormatError, match=r"token_ids'.*expected numbers of a float type, got int32"):
        import_arrays(dataset, tmp_path / "other", array="token_ids")


_LOADED = """
import sys
from saev_torch import import_arrays
import_arrays(sys.argv[1], sys.argv[2])
print(*sys.modules)
"""


@pytest.mark.slow
def test_a_data_set_needs_pyarrow_alone(dataset, tmp_path):
    """pandas, which pyarrow loads where it can, is 30 MB of memory."""
    command = [sys.executable, "-c", _LOADED, dataset, tmp_path]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240).stdout.split()
    assert "pyarrow" in loaded
    assert not {"pandas", "datasets"} & {*loaded}


@pytest.mark.slow
@pytest.mark.parametrize("is_turned", [False, True])
def test_a_mapped_file_does_not_stay_in_memory(tmp_path, monkeypatch, is_turned):
    """What a process maps and has read counts as its memory."""
    tensor = torch.arange(1 << 22, dtype=torch.float32).view(64, 64, 1024)
    torch.save(tensor.transpose(0, 1) if is_turned else tensor, tmp_path / "large.pt")
    monkeypatch.setattr(chunks, "_MAX_MAPPED_NBYTES", 1 << 20)
    monkeypatch.setattr(arrays, "_BATCH_NBYTES", 1 << 18)
    mapped, read, n_loaded, load = [], Joined.read, [], torch.load

    def read_and_look(joined: Joined, start: int, stop: int) -> torch.Tensor:
        rows = read(joined, start, stop)
        _, _, found = Path("/proc/self/smaps").read_text().partition(f"{tmp_path}/large.pt\n")
        mapped.append(sum(map(int, re.findall(r"^Rss: *(\d+) kB", found, re.MULTILINE)[:1])))
        return rows

    monkeypatch.setattr(Joined, "read", read_and_look)
    monkeypatch.setattr(torch, "load", lambda *args, **options: (n_loaded.append(1), load(*args, **options))[1])
    import_arrays(tmp_path / "large.pt", tmp_path)
    assert len(mapped) >= 64
    if is_turned:
        # Copied as a whole, and so but once.
        assert len(n_loaded) == 2
    else:
        assert 0 < max(mapped) < 6 << 10


def test_a_mapped_file_that_is_replaced_is_not_read_on(tmp_path, monkeypatch):
    """It is mapped anew now and then, and another file of the same shape would be mixed into it."""
    tensor = torch.zeros(64, 64, 1024)
    torch.save(tensor, tmp_path / "large.pt")
    torch.save(tensor + 1, tmp_path / "other")
    monkeypatch.setattr(chunks, "_MAX_MAPPED_NBYTES", 1 << 20)
    monkeypatch.setattr(arrays, "_BATCH_NBYTES", 1 << 18)
    read, n_read = Joined.read, []

    def read_and_replace(joined: Joined, start: int, stop: int) -> torch.Tensor:
        n_read.append(1)
        if len(n_read) == 3:
            (tmp_path / "other").replace(tmp_path / "large.pt")
        return read(joined, start, stop)

    monkeypatch.setattr(Joined, "read", read_and_replace)
    with pytest.raises(FormatError, match=r"large\.pt: expected \[64, 64, 1024\] as before, got another file"):
        import_arrays(tmp_path / "large.pt", tmp_path)


@pytest.mark.parametrize("name", ["two", "three", "group"])
def test_round_trip_of_zarr(zarrs, tmp_path, name, monkeypatch):
    monkeypatch.setattr(arrays, "_BATCH_NBYTES", 1)
    check(zarrs / name, tmp_path, HALF if name == "group" else torch.from_numpy(ACTS))


def test_rows_are_examples_of_one_token(tmp_path):
    np.save(tmp_path / "rows.npy", ACTS.reshape(-1, D))
    md = Metadata.load(import_arrays(tmp_path / "rows.npy", tmp_path / "root"))
    assert (md.n_examples, md.content_tokens_per_example, md.cls_token) == (N * T, 1, False)


def test_options_reach_the_metadata(sources, tmp_path):
    options = {"layer": 7, "family": "gpt", "ckpt": "small", "dataset": "pile", "data": "d", "cls_token": True}
    md = Metadata.load(import_arrays(str(sources / "whole.npy"), str(tmp_path), dtype="bfloat16", **options))
    assert (md.layers, md.family, md.ckpt, md.dataset, md.data) == ((7,), "gpt", "small", Path("pile"), "d")
    assert (md.cls_token, md.content_tokens_per_example, md.dtype) == (True, T - 1, "bfloat16")
    assert torch.equal(stored(tmp_path / md.hash), BRAIN)


def _import_and_die(source: Path, root: Path) -> None:
    """Import, and be killed in the fourth batch, where three are on disk."""
    read, n_read = Joined.read, 0

    def read_or_die(self: Joined, start: int, stop: int) -> torch.Tensor:
        nonlocal n_read
        n_read += 1
        if n_read == 4:
            while not list(root.glob("*/.journal-*")) or not any(p.stat().st_size for p in root.glob("*/.journal-*")):
                pass
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, start, stop)

    Joined.read = read_or_die  # type: ignore[method-assign]
    import_arrays(source, root)


def test_a_killed_import_goes_on(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "_BATCH_NBYTES", 2 * T * D * 4)
    monkeypatch.setattr(checkpoints, "_SYNC_NBYTES", 1)
    process = multiprocessing.get_context("fork").Process(
        target=_import_and_die, args=(sources / "whole.npy", tmp_path)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    process.close()
    asked = []
    read = Joined.read
    monkeypatch.setattr(Joined, "read", lambda self, a, b: (asked.append((a, b)), read(self, a, b))[1])
    shards = import_arrays(sources / "whole.npy", tmp_path)
    assert torch.equal(stored(shards), torch.from_numpy(ACTS))
    # The first again, to see that they are the same; then what is missing.
    assert asked[0] == (0, 2)
    assert 0 < len(asked) - 1 <= 4
    assert asked[-1] == (10, 11)
    # Once more, where nothing is missing.
    asked.clear()
    assert import_arrays(sources / "whole.npy", tmp_path) == shards
    assert asked == [(0, 2)]


def test_another_source_of_the_same_name_is_noticed(tmp_path):
    np.save(tmp_path / "a.npy", ACTS)
    import_arrays(tmp_path / "a.npy", tmp_path / "root")
    np.save(tmp_path / "a.npy", ACTS[::-1])
    with pytest.raises(WriteError, match="expected the values on disk to be given again"):
        import_arrays(tmp_path / "a.npy", tmp_path / "root")


# What is refused


class Evil:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def _write(root: Path, name: str) -> tuple[Path, dict[str, object]]:
    """Write a source that is no good; return it, and the options to import it with."""
    path = root / name
    options: dict[str, object] = {}
    if name.startswith("evil") and path.suffix == ".npy":
        np.save(path, np.array([Evil(root / "ran")] * 2, dtype=object), allow_pickle=True)
    elif name.startswith("evil") and path.suffix == ".npz":
        np.savez(path, x=np.array([Evil(root / "ran")] * 2, dtype=object), allow_pickle=True)
    elif name.startswith("evil"):
        torch.save({"acts": Evil(root / "ran")}, path)
    elif name == "plain.pt":
        path.write_bytes(pickle.dumps(Evil(root / "ran")))
    elif name == "short.npy":
        np.save(path, ACTS)
        os.truncate(path, path.stat().st_size - 1)
    elif name == "turned.npy":
        np.save(path, np.asfortranarray(ACTS))
    elif name == "flat.npy":
        np.save(path, ACTS[0, 0])
    elif name == "ints.npy":
        np.save(path, np.arange(6).reshape(2, 3))
    elif name == "lies.safetensors":
        header = json.dumps({"x": {"dtype": "F32", "shape": [1 << 40, 8], "data_offsets": [0, 1 << 45]}}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + b"0" * 64)
    elif name == "head.safetensors":
        path.write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    elif name == "torn.npz":
        np.savez_compressed(path, ACTS)
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 255
        path.write_bytes(raw)
    elif name == "link.npy":
        np.save(root / "there.npy", ACTS)
        path.symlink_to(root / "there.npy")
    elif name == "two.npz":
        np.savez(path, a=ACTS, b=ACTS)
    elif name == "named.npz":
        np.savez(path, a=ACTS)
        options = {"array": "c"}
    elif name == "odd":
        path.mkdir()
        np.save(path / "a1.npy", ACTS)
        np.save(path / "a2.npy", ACTS[:, :5])
    elif name == "types":
        path.mkdir()
        np.save(path / "a1.npy", ACTS)
        np.save(path / "a2.npy", HALF.numpy())
    elif name == "mixed":
        path.mkdir()
        np.save(path / "a.npy", ACTS)
        torch.save(BRAIN, path / "a.pt")
    elif name == "rows.npy":
        np.save(path, ACTS.reshape(-1, D))
        options = {"tokens_per_example": 7}
    elif name == "tokens.npy":
        np.save(path, ACTS)
        options = {"tokens_per_example": 7}
    elif name == "notes.txt":
        path.write_text("hello")
    elif name == "pickled.zarr":
        path.mkdir()
        meta = {"zarr_format": 2, "shape": [2, 8], "chunks": [2, 8], "dtype": "<f4", "compressor": None, "order": "C"}
        meta |= {"fill_value": 0, "filters": [{"id": "pickle", "protocol": 5}]}
        (path / ".zarray").write_text(json.dumps(meta))
        (path / "0.0").write_bytes(pickle.dumps(Evil(root / "ran")))
    elif name == "linked.zarr":
        path.mkdir()
        meta = {"zarr_format": 2, "shape": [2, 8], "chunks": [2, 8], "dtype": "<f4", "compressor": None, "order": "C"}
        (path / ".zarray").write_text(json.dumps(meta | {"fill_value": 0, "filters": None}))
        (path / "0.0").symlink_to("/etc/hostname")
    elif name == "outside":
        path.mkdir()
        (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../../secret.arrow"}]}))
    return path, options


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("gone.npy", ShardsNotFoundError, r"gone\.npy: expected activations in a file or a folder"),
        ("evil.npy", FormatError, r"evil\.npy: expected an array of float16, .* got \[2\] of object"),
        ("evil.npz", FormatError, r"evil\.npz: expected an array of floats, .* got none"),
        ("evil.pt", FormatError, r"evil\.pt: expected tensors and nothing that runs code"),
        ("plain.pt", FormatError, r"plain\.pt: expected "),
        (
            "short.npy",
            FormatError,
            r"short\.npy: expected 2240 bytes for \[11, 6, 8\] values of torch.float32, got 2239",
        ),
        ("turned.npy", FormatError, r"turned\.npy: expected values in the order of C"),
        ("flat.npy", FormatError, r"flat\.npy: expected an array \[examples, tokens, d_model\] or .*, got \[8\]"),
        ("ints.npy", FormatError, r"ints\.npy: expected an array of float16, .* got \[2, 3\] of int64"),
        ("lies.safetensors", FormatError, r"lies\.safetensors: 'x': expected \d+ bytes of file, got "),
        ("head.safetensors", FormatError, r"head\.safetensors: expected a safetensors file, got a header of 1152"),
        ("torn.npz", FormatError, r"torn\.npz: .*expected "),
        ("link.npy", FormatError, r"link\.npy: expected a regular file, got a symbolic link"),
        ("two.npz", ConfigError, r"array: expected one array of activations in .*two\.npz, got \['a', 'b'\]; name one"),
        ("named.npz", ConfigError, r"array: expected one of \['a'\] in .*named\.npz, got 'c'"),
        ("odd", FormatError, r"a2\.npy: expected \[any, 6, 8\], as in .*a1\.npy, got \[11, 5, 8\]"),
        ("types", ConfigError, r"dtype: expected files of one type"),
        ("mixed", FormatError, r"mixed: expected files of one kind among .*, got \['\.npy', '\.pt'\]"),
        ("rows.npy", FormatError, r"rows\.npy: expected one or more examples of 7 rows in all files, got 66 rows"),
        ("tokens.npy", ConfigError, r"tokens_per_example: expected 6, as .*tokens\.npy has \[11, 6, 8\], got 7"),
        ("notes.txt", FormatError, r"notes\.txt: expected one of \.npy, .* got \.txt"),
        ("pickled.zarr", FormatError, r"pickled\.zarr: expected codecs among .* got 'pickle', which might run code"),
        ("linked.zarr", FormatError, r"linked\.zarr/0\.0: expected a file, got a link"),
        ("outside", FormatError, r"name: expected a plain file name without '/'"),
    ],
)
def test_refused(tmp_path, name, error, message):
    path, options = _write(tmp_path, name)
    with pytest.raises(error, match=message):
        import_arrays(path, tmp_path / "root", **options)
    assert not (tmp_path / "ran").exists()
    assert not list((tmp_path / "root").rglob("metadata.json"))


# The commands, and the way back


def test_the_commands(sources, tmp_path, capsys):
    args = ["import", str(sources / "rows"), str(tmp_path), "--tokens-per-example", str(T), "--cls-token", "--quiet"]
    assert main([*args, "--layer", "-3"]) == 0
    shards = Path(capsys.readouterr().out.strip())
    assert Metadata.load(shards).layers == (-3,)
    out = tmp_path / "out.npy"
    assert main(["export", str(shards), str(out), "--tokens", "all", "--examples", "2:9:3", "--quiet"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert np.array_equal(np.load(out), ACTS[2:9:3])
    assert main(["import", str(sources / "rows"), str(tmp_path), "--array", "x"]) == 2
    assert capsys.readouterr().err.startswith("saev_torch: array: expected one of ['None']")


def test_what_is_exported(make_shards, tmp_path):
    import factory

    shards = make_shards(layers=(3, 7), n_examples=9)
    acts = factory.oracle(Metadata.load(shards))
    whole = np.load(export_array(shards, tmp_path / "a.npy", layer=3, tokens="all"))
    assert np.array_equal(whole, acts[:, 0])
    some = Examples.only([8, 2])
    assert np.array_equal(
        np.load(export_array(shards, tmp_path / "a.npy", layer=7, examples=some)), acts[[2, 8], 1, 1:]
    )
    special = np.load(export_array(shards, tmp_path / "b.npy", layer=7, tokens="special", examples=[4]))
    assert np.array_equal(special, acts[4:5, 1, :1])
    assert sorted(path.name for path in tmp_path.glob("*.npy")) == ["a.npy", "b.npy"]
    with pytest.raises(ConfigError, match=r"layer: expected one of \[3, 7\]"):
        export_array(shards, tmp_path / "c.npy")
    with pytest.raises(ConfigError, match=r"expected a name that ends in \.npy, got c\.bin"):
        export_array(shards, tmp_path / "c.bin", layer=3)
    with pytest.raises(WriteError, match=r"no/folder/c\.npy: could not be written"):
        export_array(shards, tmp_path / "no" / "folder" / "c.npy", layer=3)
    assert not list(tmp_path.glob(".*.tmp"))
