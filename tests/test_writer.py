import errno
import hashlib
import itertools
import os
import resource
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import factory
import numpy as np
import pytest
import torch
from factory import Spec, oracle, oracle_labels
from hypothesis import given, settings
from hypothesis import strategies as st

from saev_torch import IndexedConfig, IndexedDataset, repack, verify
from saev_torch.errors import SaevTorchError, ShardsNotFoundError, WriteError
from saev_torch.format.metadata import Metadata
from saev_torch.format.shards import MAX_SHARDS, Shard, ShardInfo, shard_name
from saev_torch.writing.writer import ShardWriter

# The files that saev 0.1 wrote for the formula of factory.py, by the first 16 hex digits of their SHA-256.
REFERENCE = {
    "69ebc70f": {
        "acts000000.bin": "df0d86c19cb9874f",
        "acts000001.bin": "991629ca4e0b9f54",
        "acts000002.bin": "628040e123664a8c",
        "labels.bin": "ae2265e5e3cae737",
        "metadata.json": "3d6b07e0a631feb4",
        "shards.json": "7739c53acb85b6ea",
    },
    "5fad6d40": {
        "acts000000.bin": "620d32181926816e",
        "acts000001.bin": "94179a6e1e996a44",
        "acts000002.bin": "5d89f056865052bc",
        "metadata.json": "f11dc8181d3d646a",
        "shards.json": "49eb191c76761edb",
    },
    "e4998da4": {
        "acts000000.bin": "90393f78edf1117b",
        "labels.bin": "0f37b6d8ad5f7eb3",
        "metadata.json": "dee3b708f432e6ca",
        "shards.json": "31d7ac34a42ffb8b",
    },
}
REFERENCE_METADATA = [
    Metadata(
        family="clip",
        ckpt="ViT-B-16/openai",
        layers=(3, 7),
        content_tokens_per_example=6,
        cls_token=True,
        d_model=8,
        n_examples=11,
        max_tokens_per_shard=56,
        data="b3BhcXVl",
        dataset=Path("/data/images/two-layers-labelled"),
    ),
    Metadata(
        family="siglip",
        ckpt="hf-hub:timm/ViT-L-16-SigLIP2-256",
        layers=(0,),
        content_tokens_per_example=4,
        cls_token=False,
        d_model=4,
        n_examples=6,
        max_tokens_per_shard=15,
        data="b3BhcXVl",
        dataset=Path("/data/images/no-cls-exact-multiple"),
    ),
    Metadata(
        family="dinov3",
        ckpt="dinov3_vits16",
        layers=(-2,),
        content_tokens_per_example=5,
        cls_token=True,
        d_model=16,
        n_examples=5,
        max_tokens_per_shard=54,
        data="b3BhcXVl",
        dataset=Path("/data/images/negative-layer-one-shard"),
        pixel_agg="prefer-fg",
    ),
]


def metadata(**fields: object) -> Metadata:
    return Metadata(**Spec(**fields).metadata())


def content(directory: Path) -> dict[str, bytes]:
    """All files but the sidecar, which saev's writer does not leave."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "checksums.json"}


@pytest.mark.parametrize("batch_size", [1, 4, 100])
@pytest.mark.parametrize("md", REFERENCE_METADATA, ids=lambda md: md.hash)
def test_reference(tmp_path, md, batch_size):
    """With files of full size, as saev's readers map them, every byte is as saev's own writer leaves it."""
    acts, labels = torch.from_numpy(oracle(md)), torch.from_numpy(oracle_labels(md))
    has_labels = "labels.bin" in REFERENCE[md.hash]
    with ShardWriter(tmp_path, md, preallocate=True) as writer:
        assert writer.shards_dir == tmp_path / md.hash
        for start in range(0, md.n_examples, batch_size):
            rows = slice(start, start + batch_size)
            writer.write_batch(acts[rows], start, labels[rows] if has_labels else None)
    found = {name: hashlib.sha256(raw).hexdigest()[:16] for name, raw in content(writer.shards_dir).items()}
    assert found == REFERENCE[writer.shards_dir.name]


@settings(max_examples=50)
@given(st.data())
def test_equals_the_factory(tmp_path_factory, data):
    """Any geometry, in batches of any size, given in any order, as tensors or arrays."""
    spec = Spec(
        n_examples=data.draw(st.integers(1, 20)),
        content_tokens=data.draw(st.integers(1, 4)),
        cls=data.draw(st.booleans()),
        layers=data.draw(st.sampled_from([(0,), (-2,), (5, 1, 3)])),
        d_model=data.draw(st.integers(1, 5)),
        examples_per_shard=data.draw(st.integers(1, 7)),
        labels=data.draw(st.booleans()),
        preallocate_last=data.draw(st.booleans()),
    )
    acts, labels = oracle(spec), oracle_labels(spec)
    cuts = [0, *sorted(data.draw(st.sets(st.integers(1, spec.n_examples)))), spec.n_examples]
    batches = data.draw(st.permutations(list(itertools.pairwise(cuts))))
    wrap = torch.from_numpy if data.draw(st.booleans()) else np.asarray
    root = tmp_path_factory.mktemp("any")
    md = Metadata(**spec.metadata())
    with ShardWriter(root / "new" / "root", md, preallocate=spec.preallocate_last) as writer:
        for start, stop in batches:
            writer.write_batch(wrap(acts[start:stop]), start, wrap(labels[start:stop]) if spec.labels else None)
    expected = factory.make_shards(root / "factory", spec)
    assert writer.shards_dir.name == expected.name
    assert content(writer.shards_dir) == content(expected)
    ShardInfo.load(writer.shards_dir).validate(writer.shards_dir)


def sizes(directory: Path) -> list[int]:
    return [path.stat().st_size for path in sorted(directory.glob("acts*.bin"))]


@pytest.mark.parametrize(
    ("n_examples", "expected"), [(1, [1]), (11, [4, 4, 3]), (9, [4, 4, 1]), (12, [4, 4, 4, 0]), (4, [4, 0])]
)
def test_the_last_file_is_as_large_as_its_examples(tmp_path, n_examples, expected):
    """As are its names: what `ls`, `tar` and `scp` see is what is there. Readers and `verify` take it so."""
    md = metadata(n_examples=n_examples)
    for root, preallocate in ((tmp_path / "cut", False), (tmp_path / "full", True)):
        with ShardWriter(root, md, preallocate=preallocate) as writer:
            writer.write_batch(oracle(md), 0)
            assert set(sizes_of_parts(writer.shards_dir)) == {4 * md.example_nbytes}
        full = [4] * len(expected)
        assert sizes(writer.shards_dir) == [n * md.example_nbytes for n in (full if preallocate else expected)]
        ShardInfo.load(writer.shards_dir).validate(writer.shards_dir)
        report = verify(writer.shards_dir, finite=True)
        assert report.ok
        assert report.n_blocks == n_examples * md.n_layers
        data = IndexedDataset(IndexedConfig(shards=writer.shards_dir, layer="all", tokens="all"))
        got = data.__getitems__(range(len(data))).batch["act"].numpy()
        assert (got == oracle(md).reshape(-1, md.d_model)).all()


def sizes_of_parts(directory: Path) -> list[int]:
    return [path.stat().st_size for path in directory.glob(".acts*.part")]


def test_repack_cuts(tmp_path, make_shards):
    """Of files of full size it makes one that is cut."""
    source = make_shards()
    md = Metadata.load(source)
    assert sizes(source) == [4 * md.example_nbytes] * 3
    made = repack(source, tmp_path, layers=[7])
    assert sizes(made) == [n * Metadata.load(made).example_nbytes for n in (9, 2)]
    assert verify(made).ok
    assert verify(source).ok


@pytest.mark.parametrize("preallocate", [False, True])
def test_what_a_writer_of_either_kind_has_left_is_published(tmp_path, monkeypatch, preallocate):
    """A writer that was killed between its last two renames; the one that goes on wants the other size."""
    md = metadata()
    with monkeypatch.context() as patch:
        patch.setattr(ShardInfo, "dump", lambda *args: (_ for _ in ()).throw(KilledError))
        with pytest.raises(KilledError), ShardWriter(tmp_path, md, resume=True, preallocate=not preallocate) as writer:
            writer.write_batch(oracle(md), 0)
    assert sizes(writer.shards_dir)[-1] == (3 if preallocate else 4) * md.example_nbytes
    with ShardWriter(tmp_path, md, resume=True, preallocate=preallocate) as writer:
        assert writer.missing() == []
    assert sizes(writer.shards_dir)[-1] == (4 if preallocate else 3) * md.example_nbytes
    assert verify(writer.shards_dir).ok


def test_any_memory_layout(tmp_path, make_shards):
    md = metadata()
    acts, labels = torch.from_numpy(oracle(md)), torch.from_numpy(oracle_labels(md))
    strange = acts.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0).requires_grad_()
    assert not strange.is_contiguous()
    with ShardWriter(tmp_path, md) as writer:
        writer.write_batch(strange[:5], np.int64(0), labels.long()[:5].tolist())
        writer.write_batch(np.asfortranarray(acts[5:]), 5, labels.T.contiguous().T[5:])
    assert content(writer.shards_dir) == content(make_shards(preallocate_last=False))


def test_pieces_of_a_large_write(tmp_path, make_shards, monkeypatch):
    """The kernel may take less than all: here 1000 bytes at most, and not always that."""
    pwrite, n_calls = os.pwrite, 0

    def some(fd, view, offset):
        nonlocal n_calls
        n_calls += 1
        return pwrite(fd, view[: max(1, len(view) // 2)], offset)

    md = metadata()
    with monkeypatch.context() as patch:
        patch.setattr("saev_torch.writing.parts._MAX_PWRITE_BYTES", 1000)
        patch.setattr(os, "pwrite", some)
        with ShardWriter(tmp_path, md) as writer:
            writer.write_batch(oracle(md), 0, oracle_labels(md))
    assert n_calls > 10
    assert content(writer.shards_dir) == content(make_shards(preallocate_last=False))


def test_few_descriptors(tmp_path):
    md = metadata(n_examples=200, examples_per_shard=1)
    with ShardWriter(tmp_path, md) as writer:
        n_before = len(os.listdir("/proc/self/fd"))
        for start in range(200):
            writer.write_batch(oracle(md)[start : start + 1], start, oracle_labels(md)[start : start + 1])
            assert len(os.listdir("/proc/self/fd")) <= n_before + 2
    ShardInfo.load(writer.shards_dir).validate(writer.shards_dir)


@pytest.fixture
def _busy_threads():
    """Threads take turns after each few instructions, so that they meet."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("_busy_threads")
def test_several_threads(tmp_path, monkeypatch):
    """Batches of all shards from eight threads at once, with checkpoints and questions between them."""
    monkeypatch.setattr("saev_torch.writing.checkpoints._SYNC_NBYTES", 2000)
    md = metadata(n_examples=200, examples_per_shard=3)
    acts, labels = oracle(md), oracle_labels(md)
    expected = content(
        factory.make_shards(tmp_path / "factory", Spec(n_examples=200, examples_per_shard=3, preallocate_last=False))
    )

    def write(start):
        writer.write_batch(acts[start : start + 1], start, labels[start : start + 1])
        assert all(0 <= low < high <= 200 for low, high in writer.missing())
        if start % 50 == 0:
            writer.checkpoint()

    for i in range(5):
        with ThreadPoolExecutor(8) as pool, ShardWriter(tmp_path / str(i), md) as writer:
            list(pool.map(write, [start for first in range(10) for start in range(first, 200, 10)]))
        assert content(writer.shards_dir) == expected


@pytest.mark.usefixtures("_busy_threads")
def test_one_example_from_several_threads(tmp_path):
    """Of those who give the same example, one writes it, and the others are told."""
    md = metadata()

    def write(value):
        acts = np.full((11, md.n_layers, md.tokens_per_example, md.d_model), value, np.float32)
        try:
            writer.write_batch(acts, 0)
        except WriteError as err:
            assert "expected each example once" in str(err)  # noqa: PT017
            return False
        return True

    with ThreadPoolExecutor(8) as pool, ShardWriter(tmp_path, md) as writer:
        wrote = list(pool.map(write, range(8)))
    assert wrote.count(True) == 1
    raw = b"".join((writer.shards_dir / shard_name(i)).read_bytes() for i in range(3))
    n_values = 11 * md.n_layers * md.tokens_per_example * md.d_model
    assert set(np.frombuffer(raw, "<f4", n_values)) == {float(wrote.index(True))}


def test_checkpoint_in_a_signal_handler(tmp_path, monkeypatch):
    """It comes in the middle of a write: what is written afterwards is forced to disk, too, before it is spoken of."""
    md = metadata()
    pwrite, fsync, log = os.pwrite, os.fsync, []

    def interrupted(fd, view, offset):
        if not log:
            log.append("handler")
            signal.raise_signal(signal.SIGUSR1)
        log.append(("pwrite", os.readlink(f"/proc/self/fd/{fd}")))
        return pwrite(fd, view, offset)

    def logged_fsync(fd):
        log.append(("fsync", os.readlink(f"/proc/self/fd/{fd}")))
        fsync(fd)

    with ShardWriter(tmp_path, md) as writer:
        before = signal.signal(signal.SIGUSR1, lambda *_: writer.checkpoint())
        try:
            monkeypatch.setattr(os, "pwrite", interrupted)
            monkeypatch.setattr(os, "fsync", logged_fsync)
            writer.write_batch(oracle(md), 0)
        finally:
            signal.signal(signal.SIGUSR1, before)
    last = {path: i for i, (call, path) in enumerate(log[1:]) if call == "pwrite"}
    assert len(last) == 3
    assert all(("fsync", path) in log[i + 2 :] for path, i in last.items())


def test_forked_child_does_not_write(tmp_path, make_shards):
    """A child has the block of its parent, but not its threads: it is told, and leaving takes nothing away."""
    md = metadata()
    with ShardWriter(tmp_path, md) as writer:
        writer.write_batch(oracle(md)[:5], 0, oracle_labels(md)[:5])
        child = os.fork()
        if child == 0:
            code = 1
            try:
                with pytest.raises(WriteError, match="expected the process that opened the writer"):
                    writer.write_batch(oracle(md)[5:], 5, oracle_labels(md)[5:])
                writer.__exit__(SystemExit, SystemExit(), None)
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        writer.write_batch(oracle(md)[5:], 5, oracle_labels(md)[5:])
    assert content(writer.shards_dir) == content(make_shards(preallocate_last=False))


def good_batch(md: Metadata) -> tuple[torch.Tensor, int, torch.Tensor]:
    return torch.zeros(2, md.n_layers, md.tokens_per_example, md.d_model), 0, torch.zeros(2, 6, dtype=torch.uint8)


BAD_BATCHES = {
    "list": ({"activations": [[1.0]]}, "activations: expected a tensor or an array, got list"),
    "int": ({"activations": np.zeros((2, 2, 7, 8), np.int32)}, "expected values of a float type, got int32"),
    "uint16": ({"activations": torch.zeros(2, 2, 7, 8).to(torch.uint16)}, "of a float type, got torch.uint16"),
    "bool": ({"activations": torch.zeros(2, 2, 7, 8).bool()}, "of a float type, got torch.bool"),
    "complex": ({"activations": np.zeros((2, 2, 7, 8), np.complex64)}, "of a float type, got complex64"),
    "too large": ({"activations": np.full((2, 2, 7, 8), -1e39)}, r"got -1e\+39 in example 0, .*; scale"),
    "layers": ({"activations": torch.zeros(2, 3, 7, 8)}, r"\[batch, 2, 7, 8\], got \[2, 3, 7, 8\]"),
    "tokens": ({"activations": torch.zeros(2, 2, 6, 8)}, r"\[batch, 2, 7, 8\], got \[2, 2, 6, 8\]"),
    "d_model": ({"activations": torch.zeros(2, 2, 7, 9)}, r"\[batch, 2, 7, 8\], got \[2, 2, 7, 9\]"),
    "ndim": ({"activations": torch.zeros(2, 7, 8)}, r"\[batch, 2, 7, 8\], got \[2, 7, 8\]"),
    "scalar": ({"activations": torch.tensor(1.0)}, r"\[batch, 2, 7, 8\], got \[\]"),
    "negative": ({"start_idx": -1}, r"expected examples in 0\.\.11 .*got -1\.\.1"),
    "beyond": ({"start_idx": 10}, r"expected examples in 0\.\.11 .*got 10\.\.12"),
    "float start": ({"start_idx": 1.0}, "start_idx: expected an integer, got 1.0"),
    "no start": ({"start_idx": None}, "start_idx: expected an integer, got None"),
    "label range": ({"patch_labels": np.full((2, 6), 256)}, r"integers in 0\.\.255, got 256\.\.256"),
    "label sign": ({"patch_labels": np.full((2, 6), -1)}, r"integers in 0\.\.255, got -1\.\.-1"),
    "label dtype": ({"patch_labels": torch.zeros(2, 6)}, r"integers in 0\.\.255, got float32"),
    "label shape": ({"patch_labels": np.zeros((2, 7), np.uint8)}, r"= \[2, 6\], got \[2, 7\]"),
    "label batch": ({"patch_labels": np.zeros((3, 6), np.uint8)}, r"= \[2, 6\], got \[3, 6\]"),
    "label ragged": ({"patch_labels": [[1, 2], [3]]}, "patch_labels: expected an array of integers"),
    "label text": ({"patch_labels": "labels"}, r"= \[2, 6\], got \[\]"),
}


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_bad_batch(tmp_path, case, make_shards):
    """Each is refused with nothing published; and where it is mended in the block, nothing was spoilt."""
    md = metadata()
    bad, message = BAD_BATCHES[case]
    names = ("activations", "start_idx", "patch_labels")
    batch = dict(zip(names, good_batch(md), strict=True)) | bad
    with pytest.raises(WriteError, match=message), ShardWriter(tmp_path, md) as writer:
        writer.write_batch(**batch)
    assert list(tmp_path.iterdir()) == []
    with ShardWriter(tmp_path, md) as writer:
        with pytest.raises(WriteError, match=message):
            writer.write_batch(**batch)
        writer.write_batch(oracle(md), 0, oracle_labels(md))
    assert content(writer.shards_dir) == content(make_shards(preallocate_last=False))


@pytest.mark.parametrize(("start", "overlap"), [(0, "0..2"), (1, "1..3"), (3, "3..4"), (2, "2..4")])
def test_overlap(tmp_path, start, overlap):
    md = metadata()
    batch = oracle(md)[:2]
    message = rf"expected each example once, .* of which {overlap} "
    with pytest.raises(WriteError, match=message), ShardWriter(tmp_path, md) as writer:  # noqa: PT012
        writer.write_batch(oracle(md)[:4], 0)
        writer.write_batch(batch, start)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given_ranges", "missing"),
    [
        ([], r"11 are missing: \[\(0, 11\)\]"),
        ([(0, 10)], r"1 are missing: \[\(10, 11\)\]"),
        ([(1, 11)], r"1 are missing: \[\(0, 1\)\]"),
        ([(7, 11), (0, 3), (4, 6)], r"2 are missing: \[\(3, 4\), \(6, 7\)\]"),
    ],
)
def test_missing_examples(tmp_path, given_ranges, missing):
    md = metadata()
    message = rf"expected 11 examples, as announced, {missing}"
    with pytest.raises(WriteError, match=message), ShardWriter(tmp_path, md) as writer:  # noqa: PT012
        for start, stop in given_ranges:
            writer.write_batch(oracle(md)[start:stop], start)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("first", ["with", "without"])
def test_labels_for_all_or_none(tmp_path, first):
    md = metadata()
    labels = oracle_labels(md)
    pair = (labels[:4], None) if first == "with" else (None, labels[4:])
    other = "without" if first == "with" else "with"
    message = f"for all batches or for none, got a batch {other} them"
    with pytest.raises(WriteError, match=message), ShardWriter(tmp_path, md) as writer:  # noqa: PT012
        writer.write_batch(oracle(md)[:4], 0, pair[0])
        writer.write_batch(oracle(md)[4:], 4, pair[1])
    assert list(tmp_path.iterdir()) == []


def test_empty_batch(tmp_path, make_shards):
    md = metadata()
    with ShardWriter(tmp_path, md) as writer:
        writer.write_batch(oracle(md)[:0], 11, oracle_labels(md)[:0])
        writer.write_batch(oracle(md)[:0], 0)
        writer.write_batch(oracle(md), 0, oracle_labels(md))
        writer.write_batch(oracle(md)[:0], 3)
    assert content(writer.shards_dir) == content(make_shards(preallocate_last=False))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_exception_in_the_block(tmp_path, error):
    md = metadata()
    with pytest.raises(error), ShardWriter(tmp_path, md) as writer:  # noqa: PT012
        writer.write_batch(oracle(md), 0, oracle_labels(md))
        raise error
    assert list(tmp_path.iterdir()) == []
    with ShardWriter(tmp_path, md) as writer:
        writer.write_batch(oracle(md), 0)
    assert Metadata.load(writer.shards_dir) == md


def test_a_closed_writer_stays_closed(tmp_path):
    md = metadata()
    writer = ShardWriter(tmp_path, md)
    with pytest.raises(WriteError, match="expected an open writer, got one that is not: write a batch first"):
        writer.flush()
    assert list(tmp_path.iterdir()) == []
    with writer:
        writer.write_batch(oracle(md), 0)
    for method in (writer.flush, writer.checkpoint, lambda: writer.write_batch(oracle(md), 0)):
        with pytest.raises(WriteError, match="expected an open writer"):
            method()
    with pytest.raises(WriteError, match="got a finished one"):
        writer.__enter__()
    # As one may do in any case, to be sure.
    writer.close()


def test_without_a_block(tmp_path):
    md = metadata()
    with ShardWriter(tmp_path / "block", md) as writer:
        writer.write_batch(oracle(md), 0, oracle_labels(md))
    expected = {path.name: path.read_bytes() for path in writer.shards_dir.iterdir()}
    for end in ("close", "flush"):
        writer = ShardWriter(tmp_path / end, md)
        assert not (tmp_path / end).exists()
        writer.write_batch(oracle(md)[:5], 0, oracle_labels(md)[:5])
        if end == "flush":
            writer.flush()
            assert not writer.published
        writer.write_batch(oracle(md)[5:], 5, oracle_labels(md)[5:])
        assert not (writer.shards_dir / "metadata.json").exists()
        getattr(writer, end)()
        assert writer.published
        assert {path.name: path.read_bytes() for path in writer.shards_dir.iterdir()} == expected
        writer.close()
        writer.close()


def test_flush_inside_a_block(tmp_path):
    md = metadata()
    with ShardWriter(tmp_path, md) as writer:
        writer.write_batch(oracle(md), 0)
        writer.flush()
        assert Metadata.load(writer.shards_dir) == md
        with pytest.raises(WriteError, match="were written before"):
            writer.write_batch(oracle(md)[:1], 0)
    assert ShardInfo.load(writer.shards_dir)
    with ShardWriter(tmp_path / "closed", md) as writer:
        writer.write_batch(oracle(md), 0)
        writer.close()
    assert Metadata.load(writer.shards_dir) == md


@pytest.mark.parametrize("n_written", [0, 3])
def test_closing_too_early(tmp_path, n_written):
    md = metadata()
    writer = ShardWriter(tmp_path, md)
    if n_written:
        writer.write_batch(oracle(md)[:n_written], 0)
    with pytest.raises(WriteError, match=rf"{md.n_examples - n_written} are missing"):
        writer.close()
    assert list(tmp_path.iterdir()) == []


def test_flushing_one_of_two_ranges(tmp_path):
    md = metadata()
    writers = [ShardWriter(tmp_path, md, example_range=(start, stop)) for start, stop in ((0, 5), (5, md.n_examples))]
    for writer in writers:
        writer.write_batch(oracle(md)[slice(*writer.example_range)], writer.example_range[0])
    writers[0].flush()
    assert not writers[0].published
    writers[1].flush()
    assert writers[1].published
    for writer in writers:
        writer.close()
    assert Metadata.load(writers[0].shards_dir) == md


def test_threads_open_a_writer_once(tmp_path):
    md = metadata()
    writer = ShardWriter(tmp_path, md)
    with ThreadPoolExecutor(md.n_examples) as threads:
        list(threads.map(lambda i: writer.write_batch(oracle(md)[i : i + 1], i), range(md.n_examples)))
    writer.close()
    assert Metadata.load(writer.shards_dir) == md


def test_nested(tmp_path):
    md = metadata()
    with ShardWriter(tmp_path, md) as writer:
        with pytest.raises(WriteError, match="got another inside it"):
            writer.__enter__()
        writer.write_batch(oracle(md), 0)
    assert Metadata.load(writer.shards_dir) == md


def test_not_finished_is_not_read(tmp_path):
    md = metadata()
    with ShardWriter(tmp_path, md) as writer:
        writer.write_batch(oracle(md), 0)
        with pytest.raises(ShardsNotFoundError, match=r"metadata\.json: does not exist.*was not finished"):
            Metadata.load(writer.shards_dir)
        assert not [path for path in writer.shards_dir.iterdir() if not path.name.startswith(".")]
    assert Metadata.load(writer.shards_dir) == md


def test_finished_is_not_written_again(tmp_path, make_shards):
    shards_dir = make_shards()
    before = content(shards_dir)
    with pytest.raises(WriteError, match="got a finished one with this metadata"):
        ShardWriter(shards_dir.parent, Metadata.load(shards_dir)).__enter__()
    assert content(shards_dir) == before


@pytest.mark.parametrize(
    "name", [".unfinished", ".acts000000.bin.part", "acts000000.bin", "shards.json", "notes.txt", "labels.bin"]
)
def test_unfinished_is_not_overwritten(tmp_path, name):
    md = metadata()
    (tmp_path / md.hash).mkdir()
    (tmp_path / md.hash / name).write_bytes(b"precious")
    with pytest.raises(WriteError, match=f"expected an empty directory, got .*{name}.*delete the directory"):
        ShardWriter(tmp_path, md).__enter__()
    assert content(tmp_path / md.hash) == {name: b"precious"}


def test_announced_with_dump(tmp_path, make_shards):
    """Users of saev call Metadata.dump first; until all is written, the directory is unfinished all the same."""
    md = metadata()
    shards_dir = md.dump(tmp_path)
    with ShardWriter(tmp_path, md) as writer:
        assert set(content(shards_dir)) == {".unfinished", ".journal-0-11"}
        writer.write_batch(oracle(md), 0, oracle_labels(md))
    md.dump(tmp_path)
    assert content(shards_dir) == content(make_shards(preallocate_last=False))


def test_other_metadata_is_kept(tmp_path):
    md = metadata()
    (md.dump(tmp_path) / "metadata.json").write_bytes(b"{}")
    with pytest.raises(WriteError, match="expected an empty directory"):
        ShardWriter(tmp_path, md).__enter__()
    assert content(tmp_path / md.hash) == {"metadata.json": b"{}"}


def test_two_at_once(tmp_path):
    md = metadata()
    with ShardWriter(tmp_path, md) as writer:
        writer.write_batch(oracle(md), 0)
        with pytest.raises(WriteError, match="if no other process is writing"):
            ShardWriter(tmp_path, md).__enter__()
    ShardInfo.load(writer.shards_dir).validate(writer.shards_dir)


@pytest.mark.parametrize("finished", [False, True])
def test_two_that_started_together(tmp_path, monkeypatch, finished):
    """Both find an empty directory, then the first claims it, or even finishes: nothing is taken away from it."""
    md = metadata()
    first, second = ShardWriter(tmp_path, md), ShardWriter(tmp_path, md)
    found_vacant = second._unfinished._require_vacant

    def first_overtakes(*args):
        found_vacant(*args)
        if not first._is_open and not args:
            first.__enter__()
            first.write_batch(oracle(md), 0)
            if finished:
                first.__exit__(None, None, None)

    monkeypatch.setattr(second._unfinished, "_require_vacant", first_overtakes)
    with pytest.raises(WriteError, match="got a finished one" if finished else "expected an empty directory"):
        second.__enter__()
    if not finished:
        first.__exit__(None, None, None)
    ShardInfo.load(first.shards_dir).validate(first.shards_dir)
    assert len(os.listdir(first.shards_dir)) == 6


def test_older_protocols_are_not_written(tmp_path, make_shards):
    md = Metadata.load(make_shards(protocol="1.1"))
    with pytest.raises(WriteError, match=r"protocol: expected '2\.1'"):
        ShardWriter(tmp_path, md)


def test_too_many_files(tmp_path):
    """Their shards.json would be larger than what is read."""
    with pytest.raises(WriteError, match="max_tokens_per_shard: expected less than 40000 files, got 40000"):
        ShardWriter(tmp_path, metadata(n_examples=MAX_SHARDS, examples_per_shard=1))
    md = metadata(n_examples=10**13, examples_per_shard=10**13 // (MAX_SHARDS - 2))
    ShardWriter(tmp_path, md)
    most = ShardInfo([Shard(shard_name(i), md.examples_per_shard) for i in range(MAX_SHARDS)])
    most.dump(tmp_path)
    assert ShardInfo.load(tmp_path) == most


def test_root_cannot_be_made(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(WriteError, match="could not be written: Not a directory"):
        ShardWriter(tmp_path / "file", metadata()).__enter__()


def test_claim_fails(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(WriteError, match="could not be written: Disk quota exceeded"):
            ShardWriter(tmp_path, metadata()).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_disk_full(tmp_path):
    """By a real cause that needs no mount: a limit of the size of files."""
    md = metadata()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    message = r"acts000000\.bin: could not be written: File too large"
    try:
        with pytest.raises(WriteError, match=message), ShardWriter(tmp_path, md) as writer:  # noqa: PT012
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
            writer.write_batch(oracle(md), 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["pwrite", "ftruncate"])
def test_disk_full_for_a_moment(tmp_path, make_shards, monkeypatch, name):
    """A batch that failed on the way can be written again, here in the last file, which is longer than its data."""
    md = metadata()
    call, n_calls = getattr(os, name), 0

    def full_once(*args):
        nonlocal n_calls
        n_calls += 1
        if n_calls == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return call(*args)

    with ShardWriter(tmp_path, md) as writer:
        monkeypatch.setattr(os, name, full_once)
        with pytest.raises(WriteError, match=r"acts000002\.bin: could not be written: No space left") as info:
            writer.write_batch(oracle(md), 0, oracle_labels(md))
        writer.write_batch(oracle(md), 0, oracle_labels(md))
    assert info.value.__cause__.errno == errno.ENOSPC
    assert content(writer.shards_dir) == content(make_shards(preallocate_last=False))


CALLS = ("mkdir", "open", "ftruncate", "pwrite", "write", "fsync", "rename", "replace", "unlink", "rmdir")


class KilledError(BaseException):
    """Not an Exception, so that nothing handles it."""


def write_until(monkeypatch, root, md, n_calls, error, resume=False):
    """Write all of `md`; from system call `n_calls` on, every one raises `error`. Return how many were made."""
    n_made = 0

    def counted(call):
        def wrapper(*args, **kwargs):
            nonlocal n_made
            n_made += 1
            if n_made > n_calls:
                raise error
            return call(*args, **kwargs)

        return wrapper

    with monkeypatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, counted(getattr(os, name)))
        try:
            with ShardWriter(root, md, resume) as writer:
                writer.write_batch(oracle(md)[6:], 6, oracle_labels(md)[6:])
                writer.write_batch(oracle(md)[:6], 0, oracle_labels(md)[:6])
        except (KilledError, WriteError):
            return n_made
    return None


@pytest.mark.slow
@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("error", [KilledError(), OSError(errno.EIO, "Input/output error")], ids=["killed", "failed"])
@pytest.mark.parametrize("fields", [{}, {"n_examples": 8}], ids=["rest", "multiple"])
def test_stopped_at_every_system_call(tmp_path, monkeypatch, make_shards, error, fields, resume):
    """A writer that ends at any call leaves no directory that loads and is wrong, or that cannot be continued."""
    md = metadata(**fields)
    expected = content(make_shards(**fields, preallocate_last=False))
    sidecar = None
    for n_calls in range(300):
        root = tmp_path / str(n_calls)
        is_stopped = write_until(monkeypatch, root, md, n_calls, error, resume) is not None
        try:
            assert Metadata.load(root / md.hash) == md
        except SaevTorchError:
            assert is_stopped
            if (root / md.hash).exists() and os.listdir(root / md.hash):
                with pytest.raises(WriteError, match=r"resume=True.* delete the directory"):
                    ShardWriter(root, md).__enter__()
        else:
            # From the moment it loads, all of it is there.
            assert {name: raw for name, raw in content(root / md.hash).items() if name[0] != "."} == expected
        if not is_stopped:
            break
        assert write_until(monkeypatch, root, md, 10**9, error, resume=True) is None
        assert content(root / md.hash) == expected
        raw = (root / md.hash / "checksums.json").read_bytes()
        assert raw == (sidecar or raw)
        sidecar = raw
    assert n_calls > 20


@pytest.mark.parametrize("name", ["ftruncate", "pwrite", "fsync", "rename", "replace"])
def test_failed_once_leaves_nothing(tmp_path, monkeypatch, name):
    """Each call of one kind fails in turn, once, and removing works: nothing is left, and all is well again."""
    md = metadata()
    for n_calls in range(100):
        call, n_made = getattr(os, name), 0

        def once(*args, call=call, n_calls=n_calls):
            nonlocal n_made
            n_made += 1
            if n_made == n_calls + 1:
                raise OSError(errno.EIO, "Input/output error")
            return call(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, name, once)
            try:
                with ShardWriter(tmp_path, md) as writer:
                    writer.write_batch(oracle(md), 0, oracle_labels(md))
            except WriteError as err:
                assert "Input/output error" in str(err)  # noqa: PT017
                assert list(tmp_path.iterdir()) == []
                continue
        assert n_made <= n_calls
        break
    assert n_calls >= 2
    assert Metadata.load(writer.shards_dir) == md


def test_data_is_on_disk_before_it_is_published(tmp_path, monkeypatch):
    md = metadata()
    synced, log = set(), []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def logged_fsync(fd):
        fsync(fd)
        synced.add(os.readlink(f"/proc/self/fd/{fd}"))

    def logged_rename(source, target, call=rename):
        # Through its own descriptor, under its own name: an fsync of another file is none.
        assert str(source) in synced
        log.append(Path(target).name)
        call(source, target)
        synced.discard(str(Path(target).parent))

    def logged_replace(source, target):
        if Path(target).name == "metadata.json":
            assert str(Path(target).parent) in synced
        logged_rename(source, target, replace)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "rename", logged_rename)
    monkeypatch.setattr(os, "replace", logged_replace)
    with ShardWriter(tmp_path, md) as writer:
        writer.write_batch(oracle(md), 0, oracle_labels(md))
    acts = [shard.name for shard in ShardInfo.load(writer.shards_dir)]
    assert log == [*acts, "labels.bin", "shards.json", "checksums.json", "metadata.json"]
    assert str(writer.shards_dir) in synced
    assert str(tmp_path) in synced
