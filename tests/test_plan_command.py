"""The planner at the command line, and its figures."""

import argparse
import dataclasses
import re

import pytest
from test_planner import make_metadata

from saev_torch import ShuffledConfig
from saev_torch.__main__ import main
from saev_torch.order.mixing import class_mixtures
from saev_torch.order.predict import predict
from saev_torch.tools.arguments import above_zero, at_least
from saev_torch.tools.figure import draw_mixtures, draw_plan


@pytest.fixture
def directory(tmp_path):
    make_metadata(n_examples=2000).dump(tmp_path)
    (made,) = tmp_path.iterdir()
    return made


def test_it_says_what_predict_says(directory, capsys) -> None:
    assert main(["plan", str(directory), "--batch-size", "1024", "--readers", "2"]) == 0
    out = capsys.readouterr().out
    found = predict(make_metadata(n_examples=2000), ShuffledConfig(shards="x", layer=3, batch_size=1024), 2)
    assert f"{found.distinct_examples:,.0f} in a batch" in out
    assert f"quality {found.quality:.3f}" in out
    assert f"{found.memory_nbytes / 2**30:.2f} GiB" in out


def test_memory_and_reads_follow_the_dtypes(directory, capsys) -> None:
    def figures(*options: str) -> tuple[float, float]:
        assert main(["plan", str(directory), "--batch-size", "16384", "--block-size", "16", *options]) == 0
        out = capsys.readouterr().out
        return tuple(float(out.partition(name)[2].split()[0].replace(",", "")) for name in ("memory:", "reads:"))

    memory, reads = figures()
    assert figures("--act-dtype", "stored") == (memory, reads)
    # What is read to float32 has half the bytes on disk, and as many in memory.
    # They are printed with one digit.
    half = pytest.approx(reads / 2, abs=0.06)
    assert figures("--dtype", "bfloat16") == (memory, half)
    stored = figures("--dtype", "float16", "--act-dtype", "stored")
    assert stored == (pytest.approx(memory / 2, rel=0.02), half)


@pytest.mark.parametrize("fits", [True, False])
def test_it_says_which_order_suits(directory, capsys, monkeypatch, fits) -> None:
    monkeypatch.setattr("saev_torch.tools.plan.fits_page_cache", lambda nbytes: fits)
    said = {}
    for order in ("blocks", "uniform"):
        assert main(["plan", str(directory), "--batch-size", "1024", "--order", order]) == 0
        out = capsys.readouterr().out
        said[order] = out.partition("\norder:")[2].strip()
        if order == "uniform":
            assert "quality 1.000" in out
    # 2,000 examples of 196 tokens.
    data = f"{2000 * 196 * make_metadata(n_examples=2000).row_nbytes / 2**30:.3g} GiB of data"
    if fits:
        assert said["uniform"] == f"{data}, which the memory of this machine can hold: gathered from there"
        assert said["blocks"].startswith(f"{data}, which the memory of this machine can hold: order='uniform' mixes")
    else:
        assert "cannot hold: use order='blocks'" in said["uniform"]
        assert not said["blocks"]


def test_it_finds_a_configuration(directory, capsys) -> None:
    assert main(["plan", str(directory), "--batch-size", "1024", "--quality", "0.9", "--min-read-kib", "24"]) == 0
    assert float(capsys.readouterr().out.partition("quality ")[2].split()[0]) >= 0.9
    assert main(["plan", str(directory), "--batch-size", "1024", "--memory-gib", "0.1"]) == 0
    assert float(capsys.readouterr().out.partition("memory:")[2].split()[0]) <= 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layer", "x"], "--layer"),
        (["--layer", "5"], "recorded layers"),
        (["--quality", "2"], "quality: expected one that can be reached"),
        (["--quality", "0.5", "--memory-gib", "1"], "got both"),
        (["--plot", "no/such/folder/a.png"], "--plot: expected a file in a folder that exists"),
        (["--plot", "a.nothing"], "a.nothing: could not be drawn"),
    ],
)
def test_refusals_are_one_line(directory, capsys, options: list[str], message: str) -> None:
    assert main(["plan", str(directory), *options]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("n_examples", [1, 20, 200])
@pytest.mark.parametrize("batch_size", [64, 16384])
@pytest.mark.parametrize("n_content", [16, 196])
def test_a_quality_that_is_printed_is_found(tmp_path, capsys, n_examples, batch_size, n_content) -> None:
    """With smaller reads where the usual ones do not reach it; and all of it is drawn, however small the data."""
    make_metadata(n_examples=n_examples, content_tokens_per_example=n_content).dump(tmp_path)
    (directory,) = tmp_path.iterdir()
    options = ["plan", str(directory), "--batch-size", str(batch_size)]

    def quality(*more: str) -> float:
        assert main([*options, *more]) == 0
        return float(capsys.readouterr().out.partition("quality ")[2].split()[0])

    given = quality("--plot", str(tmp_path / "a.png"))
    assert quality("--quality", "0.8") >= 0.8
    assert quality("--quality", f"{min(given, 0.999) - 0.0005}") >= min(given, 0.999) - 0.001
    code = main([*options, "--plot-classes", str(tmp_path / "b.png")])
    out, err = capsys.readouterr()
    if n_examples * n_content < batch_size:
        n = n_examples * n_content
        assert (code, out) == (2, "")
        assert f"batch_size: expected at most {n}, the samples of a layer, got {batch_size}; no batch is full" in err
    else:
        assert code == 0


def test_reads_that_are_asked_for_are_kept_to(tmp_path, capsys) -> None:
    make_metadata(n_examples=5000, content_tokens_per_example=16).dump(tmp_path)
    (directory,) = tmp_path.iterdir()
    assert main(["plan", str(directory), "--quality", "0.8", "--min-read-kib", "64"]) == 2
    message = "quality: expected one that can be reached, at most 0.407 with reads of 64 KiB, got 0.8"
    assert message in (err := capsys.readouterr().err)
    assert "allow smaller reads (--min-read-kib)" in err


def test_arguments_are_checked() -> None:
    assert (at_least(1)("1"), at_least(0)(" 1_000 "), above_zero("1e-3")) == (1, 1000, 0.001)
    for kind, texts in {at_least(1): ("0", "-1", "x", "1.5", ""), above_zero: ("0", "-1", "x", "nan", "inf")}.items():
        for text in texts:
            with pytest.raises(argparse.ArgumentTypeError, match="expected a"):
                kind(text)


def test_it_draws(directory, tmp_path) -> None:
    quality, classes = tmp_path / "quality.png", tmp_path / "classes.svg"
    plots = ["--plot", str(quality), "--plot-classes", str(classes)]
    assert main(["plan", str(directory), "--batch-size", "1024", *plots]) == 0
    assert quality.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert b"<svg" in classes.read_bytes()


def test_the_figures_show_what_they_are_given() -> None:
    md = make_metadata(n_examples=500)
    cfg = ShuffledConfig(shards="x", layer=3, batch_size=1024)
    mixtures = class_mixtures(md, cfg, n_classes=4)
    figure = draw_mixtures(mixtures)
    assert [len(axes.collections) for axes in figure.axes] == [4, 4, 4]
    for axes, mixture in zip(figure.axes, mixtures, strict=True):
        assert axes.get_title(loc="left").startswith(mixture.name)
        assert f"{mixture.distance.mean():.3f}" in axes.get_title(loc="left")
        # From the first batch to the last, without a gap at either end.
        (xs, _), (xe, _) = axes.collections[0].get_datalim(axes.transData).get_points()
        assert (xs, xe) == (0, 1)
    others = [predict(md, dataclasses.replace(cfg, block_size=b)) for b in (1, 16)]
    figure = draw_plan(others[0], others)
    assert len(figure.axes[0].lines) == 3
    figure.draw_without_rendering()
    # Names of minor ticks would stand over those of major ones.
    assert not any(label.get_text() for label in figure.axes[0].get_xticklabels(minor=True))
    names = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert 2 <= len(names) <= 9
    assert all(re.fullmatch(r"[\d.,]+", name) for name in names)


def test_buffers_that_take_the_same_memory_are_drawn() -> None:
    """Data that fit into the smaller one take no more with the larger."""
    md, cfg = make_metadata(n_examples=20), ShuffledConfig(shards="x", layer=3, batch_size=1024, block_size=4)
    others = [predict(md, dataclasses.replace(cfg, buffer_size=n)) for n in (64, 128)]
    assert others[0].memory_nbytes == others[1].memory_nbytes
    assert len(draw_plan(others[0], others).axes[0].lines) == 2
