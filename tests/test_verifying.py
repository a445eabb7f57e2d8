import os
import random
import shutil

import numpy as np
import pytest
from factory import Spec, oracle, oracle_labels

from saev_torch.errors import FormatError, ShardsNotFoundError
from saev_torch.format.checksums import Checksums
from saev_torch.format.metadata import Metadata
from saev_torch.tools.verify import verify
from saev_torch.writing.writer import ShardWriter

SPEC = Spec(n_examples=11, d_model=16)


@pytest.fixture
def shards_dir(tmp_path):
    return write(tmp_path)


def write(root, spec=SPEC, mend=lambda acts: acts):
    md = Metadata(**spec.metadata())
    with ShardWriter(root, md) as writer:
        writer.write_batch(mend(oracle(md)), 0, oracle_labels(md) if spec.labels else None)
    return writer.shards_dir


def flip(path, offset, bit=0):
    with open(path, "r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ (1 << bit)]))


@pytest.mark.parametrize("spec", [SPEC, Spec(n_examples=8, labels=False), Spec(layers=(0,), cls=False)])
def test_all_is_well(tmp_path, spec):
    report = verify(write(tmp_path, spec), finite=True)
    assert report.faults == []
    assert report.ok
    assert report.has_checksums
    assert report.n_blocks == spec.n_examples * (len(spec.layers) + spec.labels)


def test_a_flipped_bit_in_any_of_100_places(shards_dir):
    """In any file, metadata and the sidecar itself among them, and in the padding of the last shard."""
    generator = random.Random(0)
    names = sorted(os.listdir(shards_dir))
    assert len(names) == 7
    n_by_name = dict.fromkeys(names, 0)
    for i in range(100):
        name = names[i % len(names)] if i < 35 else generator.choice([name for name in names if "acts" in name])
        offset, bit = generator.randrange((shards_dir / name).stat().st_size), generator.randrange(8)
        flip(shards_dir / name, offset, bit)
        report = verify(shards_dir, n_threads=2)
        # The name of the file that was changed; a changed table may be found to disagree with others, too.
        assert name in [fault.file for fault in report.faults], (name, offset, bit)
        if name.endswith(".bin"):
            (fault,) = report.faults
            width = SPEC.content_tokens if name == "labels.bin" else SPEC.tokens_per_example * SPEC.d_model * 4
            block = offset // width
            if name == "labels.bin":
                assert (fault.example, fault.layer, fault.offset) == (block, None, block * width)
            else:
                first = 4 * int(name[4:10])
                example, layer_idx = divmod(block, 2)
                if first + example < SPEC.n_examples:
                    where = (first + example, SPEC.layers[layer_idx], block * width)
                    assert (fault.example, fault.layer, fault.offset) == where
                else:
                    assert "expected zeros behind the last example" in fault.what
        flip(shards_dir / name, offset, bit)
        n_by_name[name] += 1
    assert verify(shards_dir).ok
    assert min(n_by_name.values()) >= 5


def test_faults_are_in_the_order_of_the_files(shards_dir):
    for name, offset in (("labels.bin", 0), ("acts000001.bin", 5), ("acts000000.bin", 2800), ("acts000000.bin", 1)):
        flip(shards_dir / name, offset)
    found = [(fault.file, fault.example, fault.layer) for fault in verify(shards_dir).faults]
    # A block has 7 tokens x 16 dimensions x 4 bytes = 448.
    assert found == [
        ("acts000000.bin", 0, 3),
        ("acts000000.bin", 3, 3),
        ("acts000001.bin", 4, 3),
        ("labels.bin", 0, None),
    ]
    assert str(verify(shards_dir).faults[0]).startswith(
        "acts000000.bin, example 0, layer 3, block at byte 0: expected "
    )


@pytest.mark.parametrize(
    ("name", "what"),
    [("acts000001.bin", "truncated"), ("labels.bin", "expected 66 bytes"), ("acts000000.bin", "truncated")],
)
@pytest.mark.parametrize("sidecar", [True, False])
def test_sizes(shards_dir, name, what, sidecar):
    os.truncate(shards_dir / name, 50)
    if not sidecar:
        (shards_dir / "checksums.json").unlink()
    report = verify(shards_dir)
    assert [fault.file for fault in report.faults] == [name]
    assert what in report.faults[0].what
    assert report.has_checksums is sidecar


@pytest.mark.parametrize("name", ["acts000001.bin", "labels.bin", "shards.json"])
def test_a_missing_file(shards_dir, name):
    (shards_dir / name).unlink()
    assert [fault.file for fault in verify(shards_dir).faults] == [name]


def test_a_table_that_never_answers(shards_dir):
    """The table is a FIFO, and there are checksums to compare it with."""
    (shards_dir / "shards.json").unlink()
    os.mkfifo(shards_dir / "shards.json")
    (fault,) = verify(shards_dir).faults
    assert "got a FIFO" in fault.what


def test_the_size_of_a_file_without_examples_is_no_fault(make_shards):
    """It follows an exact multiple, and nobody reads it; what is wrong elsewhere is still found."""
    shards = make_shards(Spec(n_examples=8))
    assert verify(shards, finite=True).ok
    os.truncate(shards / "acts000002.bin", 100)
    assert verify(shards, finite=True).ok


def test_a_directory_of_saev(make_shards):
    """No sidecar: sizes only, and values on request."""
    report = verify(make_shards())
    assert (report.ok, report.has_checksums, report.n_blocks, report.nbytes) == (True, False, 0, 0)


def test_values_on_request(tmp_path):
    def mend(acts):
        acts[9, 1, 2, 3:5] = np.nan, np.inf
        return acts

    shards_dir = write(tmp_path, mend=mend)
    assert verify(shards_dir).ok
    (fault,) = verify(shards_dir, finite=True).faults
    assert (fault.file, fault.example, fault.layer) == ("acts000002.bin", 9, 7)
    assert fault.what == "expected finite values, got 2 that are not, the first nan in stored token 2, dimension 3"


def test_no_directory(tmp_path):
    with pytest.raises(ShardsNotFoundError, match="does not exist"):
        verify(tmp_path / "nothing")


def test_a_sidecar_of_another_data_set(shards_dir, tmp_path):
    other = write(tmp_path / "other", Spec(n_examples=12))
    shutil.copy(other / "checksums.json", shards_dir)
    assert any("it is of another data set" in fault.what for fault in verify(shards_dir).faults)
    with pytest.raises(FormatError):
        Checksums.load(shards_dir, Metadata.load(shards_dir))


def test_progress(shards_dir, capfd):
    verify(shards_dir, progress=True)
    assert capfd.readouterr().err.startswith("verifying: 100% (0 of 0 MB")
    verify(shards_dir, progress=None)
    assert capfd.readouterr().err == ""
