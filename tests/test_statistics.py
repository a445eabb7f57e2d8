"""Statistics against numpy in float64 over the whole array; where they are kept; what breaks them."""

import dataclasses
import gc
import itertools
import math
import re
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import factory
import numpy as np
import pytest
import uring
from conftest import Resources
from factory import Spec, write_acts

from saev_torch import (
    ConfigError,
    FormatError,
    OrderedConfig,
    ShuffledActivations,
    ShuffledConfig,
    Statistics,
    compute_statistics,
)
from saev_torch.reading import direct as staging
from saev_torch.reading import reader as reading
from saev_torch.reading.reader import Reader
from saev_torch.reading.ring import RingReader
from saev_torch.stats import moments, statistics, streaming


@pytest.fixture(params=["numpy", "compiled"])
def summing(request, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small data are summed in numpy, large ones by compiled code: here each by both."""
    monkeypatch.setattr(streaming, "_MIN_COMPILED_NBYTES", {"numpy": 1 << 62, "compiled": 0}[request.param])
    find, found = streaming.find_sum_kernel, []
    monkeypatch.setattr(streaming, "find_sum_kernel", lambda: found.append(find()) or found[-1])
    yield
    assert bool(found) == (request.param == "compiled")
    assert None not in found


def assert_moments(found, x: np.ndarray, rtol: float = 1e-12) -> None:
    """`x` is `[n, d_model]` float32."""
    x = x.astype(np.float64)
    norms = np.sqrt((x * x).sum(axis=1))
    assert found.n_samples == len(x)
    assert found.n_nonfinite_samples == found.share_nonfinite == 0
    np.testing.assert_allclose(found.mean, x.mean(axis=0), rtol=rtol, atol=1e-300)
    np.testing.assert_allclose(found.variance, x.var(axis=0), rtol=rtol, atol=1e-300)
    assert found.mean_norm == pytest.approx(norms.mean(), rel=rtol)
    assert found.std_norm == pytest.approx(norms.std(), rel=1e-9)
    assert found.mean_squared_norm == pytest.approx((norms**2).mean(), rel=rtol)
    assert (found.min, found.max) == (x.min(), x.max())
    for q, norm in found.norm_quantiles.items():
        # Between the neighbours, which may be far apart, and a bin wide more.
        low, high = np.quantile(norms, np.clip([q - 1 / len(x), q + 1 / len(x)], 0, 1))
        assert low * 0.999 <= norm <= high * 1.001


@pytest.mark.usefixtures("summing")
@pytest.mark.parametrize("mean_over_std", [0.0, 3.0, 1e4])
@pytest.mark.parametrize("layer", [3, "all", (7, 3)])
def test_agrees_with_numpy(make_shards, mean_over_std: float, layer) -> None:
    spec = Spec(n_examples=250, content_tokens=20, d_model=24, examples_per_shard=70)
    rng = np.random.default_rng(0)
    shape = (250, 2, 21, 24)
    acts = (rng.standard_normal(shape) + mean_over_std * rng.choice([-1, 1], 24)).astype(np.float32)
    acts[:, 1] *= 3
    shards = make_shards(spec)
    write_acts(shards, acts)
    found = compute_statistics(OrderedConfig(shards=shards, tokens="all", layer=layer))
    layers = {3: [3], "all": [3, 7], (7, 3): [7, 3]}[layer]
    index = {3: 0, 7: 1}
    assert sorted(found.groups) == sorted((one, kind) for one in layers for kind in ("special", "content"))
    for (one, kind), group in found.groups.items():
        tokens = slice(0, 1) if kind == "special" else slice(1, None)
        assert_moments(group, acts[:, index[one], tokens].reshape(-1, 24))
    assert_moments(found.total, acts[:, [index[one] for one in layers]].reshape(-1, 24))
    assert found.is_full
    assert found.mean_norm_error == 0


@pytest.mark.usefixtures("summing")
def test_one_constant_and_one_offset_column(make_shards) -> None:
    """A few columns of large mean among ordinary ones, as transformers have, take another route in the code."""
    rng = np.random.default_rng(1)
    acts = rng.standard_normal((40, 2, 7, 8)).astype(np.float32)
    acts[..., 3] += 1e4
    acts[..., 5] = 2.5
    shards = make_shards(Spec(n_examples=40))
    write_acts(shards, acts)
    found = compute_statistics(OrderedConfig(shards=shards, layer=3))
    assert_moments(found.total, acts[:, 0, 1:].reshape(-1, 8))
    assert found.total.variance[5] == 0


@pytest.mark.usefixtures("summing")
@pytest.mark.parametrize("tokens", ["special", "content"])
def test_ignored_labels_and_threads(make_shards, tokens: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Many small reads and tasks, some slow, so that threads really finish out of order.
    monkeypatch.setattr(streaming, "_TASK_NBYTES", 200)
    monkeypatch.setattr(streaming, "count_cores", lambda: 4)
    monkeypatch.setattr(streaming, "reads_past_cache", lambda *args: False)
    turns, together = itertools.count(), threading.Barrier(1)

    read = Reader.read

    def read_later(*args) -> None:
        if not threading.current_thread().name.startswith("saev_torch statistics"):
            return read(*args)
        turn = next(turns)
        if turn < 4:
            together.wait(60)
        time.sleep(0.002 * (turn % 3 == 0))
        return read(*args)

    monkeypatch.setattr(Reader, "read", read_later)
    shards = make_shards(Spec(n_examples=60))
    # No numbers whose sums are exact in any order.
    acts = np.random.default_rng(0).standard_normal((60, 2, 7, 8)).astype(np.float32)
    write_acts(shards, acts)
    acts, labels = acts[:, 0], factory.oracle_labels(Spec(n_examples=60))
    if tokens == "special":
        cfg, x = ShuffledConfig(shards=shards, layer=3, tokens="special"), acts[:, 0]
    else:
        cfg = ShuffledConfig(shards=shards, layer=3, ignore_labels=[2, 5])
        x = acts[:, 1:][~np.isin(labels, [2, 5])]
    one = compute_statistics(cfg, n_threads=1, cache=False)
    turns, together = itertools.count(), threading.Barrier(4)
    four = compute_statistics(cfg, n_threads=4, cache=False)
    assert next(turns) > 4
    assert_moments(one.total, x)
    # Bit for bit: what one machine computes with other threads is no other number.
    for name in ("mean", "variance", "mean_norm", "mean_squared_norm", "norm_quantiles"):
        np.testing.assert_equal(getattr(one.total, name), getattr(four.total, name))


@pytest.mark.usefixtures("summing")
def test_values_that_are_not_finite_are_counted_and_left_out(make_shards) -> None:
    acts = factory.oracle(Spec(n_examples=30)).copy()
    acts[3, 0, 2, 1] = np.nan
    acts[4, 0, 3, 1:4] = np.inf
    acts[5, 0, 3] = -np.inf
    shards = make_shards(Spec(n_examples=30))
    write_acts(shards, acts)
    total = compute_statistics(OrderedConfig(shards=shards, layer=3)).total
    x = acts[:, 0, 1:].reshape(-1, 8)
    good = x[np.isfinite(x).all(axis=1)]
    assert (total.n_samples, total.n_nonfinite_samples) == (len(good), 3)
    assert total.share_nonfinite == (1 + 3 + 8) / x.size
    np.testing.assert_allclose(total.mean, good.astype(np.float64).mean(axis=0), rtol=1e-12)
    assert (total.min, total.max) == (good.min(), good.max())


def test_nothing_finite(make_shards) -> None:
    shards = make_shards(Spec(n_examples=3))
    write_acts(shards, np.full((3, 2, 7, 8), np.nan, np.float32))
    found = compute_statistics(OrderedConfig(shards=shards, layer=3))
    assert found.total.n_samples == 0
    assert math.isnan(found.total.mean_norm)
    with pytest.raises(FormatError, match="cannot be scaled"):
        _ = found.scale


def test_a_sample_is_within_its_standard_error(make_shards) -> None:
    rng = np.random.default_rng(0)
    acts = (rng.standard_normal((200, 2, 31, 8)) * rng.uniform(0.5, 2, (200, 1, 31, 1))).astype(np.float32)
    shards = make_shards(Spec(n_examples=200, content_tokens=30, examples_per_shard=60))
    write_acts(shards, acts)
    cfg = OrderedConfig(shards=shards, layer=7)
    full = compute_statistics(cfg)
    errors = []
    for seed in range(30):
        found = compute_statistics(cfg, n_sampled=500, seed=seed)
        assert not found.is_full
        assert found.total.n_samples == 500
        errors.append((found.total.mean_norm - full.total.mean_norm) / found.mean_norm_error)
    # Of 30 draws from a standard normal the root mean square is 0.74 to 1.27 in 95 of 100 cases.
    assert 0.6 < np.sqrt(np.mean(np.square(errors))) < 1.4
    assert compute_statistics(cfg, n_sampled=10**6).is_full


def test_kept_outside_the_shards_and_used_again(make_shards, cache_home, monkeypatch, tmp_path) -> None:
    shards = make_shards(Spec(n_examples=30))
    before = sorted((p.name, p.stat().st_mtime_ns) for p in shards.iterdir())
    cfg = OrderedConfig(shards=shards, layer=3)
    first = compute_statistics(cfg)
    assert sorted((p.name, p.stat().st_mtime_ns) for p in shards.iterdir()) == before
    (kept,) = (cache_home / "saev_torch").glob("*.npz")

    def fail(*args):
        raise AssertionError("measured again")

    with monkeypatch.context() as patched:
        patched.setattr(streaming, "measure", fail)
        again = compute_statistics(cfg)
        with pytest.raises(AssertionError, match="measured again"):
            compute_statistics(dataclasses.replace(cfg, layer=7))
        with pytest.raises(AssertionError, match="measured again"):
            compute_statistics(cfg, cache=tmp_path / "other")
        loaded = Statistics.load(kept)
    for other in (again, loaded):
        np.testing.assert_equal(dataclasses.asdict(other), dataclasses.asdict(first))

    # Changed data are another fingerprint.
    acts = factory.oracle(Spec(n_examples=30)) * 2
    write_acts(shards, acts)
    assert compute_statistics(cfg).total.mean_norm == pytest.approx(2 * first.total.mean_norm)


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 no zip", b"\x93NUMPY\x01\x00", b"\x80\x04K\x01."])
def test_a_damaged_file_is_made_again(make_shards, cache_home, caplog, damage: bytes) -> None:
    cfg = OrderedConfig(shards=make_shards(), layer=3)
    first = compute_statistics(cfg)
    (kept,) = (cache_home / "saev_torch").glob("*.npz")
    kept.write_bytes(damage)
    assert compute_statistics(cfg).total.mean_norm == first.total.mean_norm
    assert "made again" in caplog.text
    assert Statistics.load(kept).fingerprint == first.fingerprint


def test_a_pickle_is_never_loaded(make_shards, cache_home, tmp_path) -> None:
    class Trap:
        def __reduce__(self):
            return (Path(tmp_path / "trapped").touch, ())

    path = tmp_path / "trap.npz"
    np.savez(path, fingerprint=np.array("x"), mean=np.array([Trap()], dtype=object))
    with pytest.raises(FormatError, match="trap"):
        Statistics.load(path)
    assert not (tmp_path / "trapped").exists()


def test_refusals(make_shards, monkeypatch, caplog) -> None:
    shards = make_shards()
    cfg = OrderedConfig(shards=shards, layer=3)
    with pytest.raises(ConfigError, match="outside"):
        compute_statistics(cfg, cache=shards / "cache")
    with pytest.raises(ConfigError, match="n_sampled"):
        compute_statistics(cfg, n_sampled=0)
    # A folder that cannot be written costs the keeping, not the result.
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert compute_statistics(cfg).is_full
    assert "not kept" in caplog.text


def test_progress_and_errors(make_shards) -> None:
    shards = make_shards(Spec(n_examples=30))
    cfg = OrderedConfig(shards=shards, layer=3)
    seen = []
    compute_statistics(cfg, cache=False, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (180, 180)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compute_statistics(cfg, cache=False, progress=stop)


@pytest.mark.parametrize("layer", [7, (7, 3), "all"])
@pytest.mark.parametrize("tokens", ["content", "all", "special"])
@pytest.mark.parametrize("task_nbytes", [1, 1000, 1 << 20])
def test_the_first_value_that_is_not_finite_is_named(
    make_shards, monkeypatch, caplog, tmp_path, layer, tokens: str, task_nbytes: int
) -> None:
    """Of several, in the order of the samples; after it was kept, too, and where only some samples are measured."""
    monkeypatch.setattr(streaming, "_TASK_NBYTES", task_nbytes)
    shards = make_shards(Spec(n_examples=11, layers=(3, 7)))
    acts = factory.oracle(Spec(n_examples=11, layers=(3, 7)))
    token = 0 if tokens == "special" else 5
    acts[9, 1, token, 3] = -np.inf
    acts[9, 1, 6, 0] = acts[10] = np.nan
    write_acts(shards, acts)
    cfg = OrderedConfig(shards=shards, layer=layer, tokens=tokens)
    wanted = f"-inf in acts000002.bin, example_idx 9, layer 7, token_idx {token - 1}, dimension 3"
    for found in (compute_statistics(cfg, cache=tmp_path), compute_statistics(cfg, cache=tmp_path)):
        assert str(found.first_nonfinite) == wanted
    assert len(caplog.messages) == 1
    n_bad = found.total.n_nonfinite_samples
    assert f"{shards}: {n_bad} of {found.n_selected} vectors have values that are not finite" in caplog.text
    assert f"the first is {wanted}" in caplog.text
    sampled = compute_statistics(cfg, cache=False, n_sampled=found.n_selected // found.total.n_samples, seed=3)
    assert (sampled.first_nonfinite is None) == (sampled.total.n_nonfinite_samples == 0)
    assert compute_statistics(OrderedConfig(shards=make_shards(), layer=layer)).first_nonfinite is None


def test_a_scale_of_nothing_finite_says_where(make_shards) -> None:
    shards = make_shards()
    write_acts(shards, np.full_like(factory.oracle(Spec()), np.nan))
    with pytest.raises(
        FormatError, match=r"got nan \(the first value is nan in acts000000\.bin, example_idx 0, layer 3,"
    ):
        ShuffledActivations(ShuffledConfig(shards=shards, layer=3, scale_norm=True))


def test_what_takes_minutes_says_so(make_shards, monkeypatch, caplog) -> None:
    """A line a minute, where nobody asked for progress: `scale_norm` measures before the first batch."""
    clock = itertools.count(100.0, 45.0)
    monkeypatch.setattr(streaming, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(streaming, "_TASK_NBYTES", 1000)
    shards = make_shards(Spec(n_examples=60))
    ShuffledActivations(ShuffledConfig(shards=shards, layer=3, scale_norm=True))
    assert len(caplog.messages) > 1
    assert all(
        re.fullmatch(rf"{shards}: measuring activations, \d+% \(\d+ of 360 samples\)", x) for x in caplog.messages
    )
    caplog.clear()
    compute_statistics(OrderedConfig(shards=shards, layer=3), cache=False, progress=lambda done, total: None)
    assert not caplog.messages


@pytest.mark.parametrize("slow", [True, False])
def test_more_threads_than_cores_work_only_where_a_disk_is_waited_for(make_shards, monkeypatch, slow: bool) -> None:
    monkeypatch.setattr(streaming, "count_cores", lambda: 1)
    monkeypatch.setattr(streaming, "reads_past_cache", lambda *args: False)
    monkeypatch.setattr(streaming, "_TASK_NBYTES", 1000)
    monkeypatch.setattr(reading, "_HELP_AFTER_S", 1e9)
    monkeypatch.setattr(reading, "_SLOW_NBYTES_PER_S", float("inf"))
    monkeypatch.setattr(reading, "_CALL_S", 0.0 if slow else 1e9)
    names, turns, together = set(), itertools.count(), threading.Barrier(2)
    read = Reader.read

    def read_later(*args) -> None:
        names.add(threading.get_ident())
        # The first read, which tells that it is slow, is made alone.
        if next(turns) in (2, 3) and slow:
            together.wait(60)
        read(*args)

    monkeypatch.setattr(Reader, "read", read_later)
    acts = np.random.default_rng(0).standard_normal((60, 2, 7, 8)).astype(np.float32)
    shards = make_shards(Spec(n_examples=60))
    write_acts(shards, acts)
    assert_moments(compute_statistics(OrderedConfig(shards=shards, layer=3)).total, acts[:, 0, 1:].reshape(-1, 8))
    assert next(turns) > 4
    assert (len(names) > 1) == slow


@pytest.mark.parametrize("past_cache", [True, False])
def test_an_error_keeps_nothing_open(make_shards, monkeypatch, past_cache: bool) -> None:
    """Also without the garbage collector, which may not come for a long time."""
    monkeypatch.setattr(streaming, "reads_past_cache", lambda *args: past_cache)
    cfg = OrderedConfig(shards=make_shards(Spec(n_examples=60)), layer=3)

    def fail(done: int, total: int) -> None:
        raise ValueError("enough")

    before = Resources.now()
    gc.disable()
    try:
        for _ in range(2):
            with pytest.raises(ValueError, match="enough") as caught:
                compute_statistics(cfg, cache=False, progress=fail)
            # Nor does who keeps the error.
            assert caught.value.__traceback__ is not None
            assert before.since(Resources.now()) == []
    finally:
        gc.enable()


@uring.needed
def test_read_past_the_page_cache(make_shards, monkeypatch) -> None:
    monkeypatch.setattr(staging, "fits_page_cache", lambda nbytes: False)
    monkeypatch.setattr(RingReader, "_read", lambda *args: pytest.fail("through the page cache"))
    monkeypatch.setattr(streaming, "_TASK_NBYTES", 100_000)
    acts = np.random.default_rng(0).standard_normal((60, 2, 7, 700)).astype(np.float32)
    shards = make_shards(Spec(n_examples=60, d_model=700))
    write_acts(shards, acts)
    found = compute_statistics(OrderedConfig(shards=shards, layer=(7, 3), tokens="all"))
    assert_moments(found.groups[3, "content"], acts[:, 0, 1:].reshape(-1, 700))
    assert_moments(found.groups[7, "special"], acts[:, 1, 0])


def test_histogram_quantiles_are_within_a_bin() -> None:
    histogram = moments.NormHistogram()
    norms = np.exp(np.random.default_rng(0).standard_normal(100_000))
    histogram.add(norms)
    for q in (0.01, 0.3, 0.5, 0.99):
        assert histogram.quantile(q, norms.min(), norms.max()) == pytest.approx(np.quantile(norms, q), rel=1e-3)


def test_cache_dir_ignores_a_relative_path(monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert statistics._cache_dir() == Path.home() / ".cache" / "saev_torch"


def test_an_error_keeps_nothing_of_its_caller(make_shards) -> None:
    """What the caller holds, a model perhaps, is gone with it, not when the garbage collector comes."""
    seen: list[weakref.ref[np.ndarray]] = []

    def fail(cfg: OrderedConfig) -> None:
        large = np.zeros(1)
        seen.append(weakref.ref(large))
        try:
            compute_statistics(cfg, cache=False, progress=lambda done, total: 1 / 0)
        except ZeroDivisionError:
            seen.append(seen[0])

    gc.disable()
    try:
        fail(OrderedConfig(shards=make_shards(Spec(n_examples=60)), layer=3))
        assert len(seen) == 2
        assert seen[0]() is None
    finally:
        gc.enable()
