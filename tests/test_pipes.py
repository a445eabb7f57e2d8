"""Data pipes: a chain on a data set yields the sequence, whoever runs it, and its state continues it."""

from typing import Any

import contracts
import factory
import pytest
from torch.utils.data import DataLoader
from torch.utils.data.datapipes.iter import IterableWrapper
from torch.utils.data.graph_settings import apply_sharding
from torchdata.stateful_dataloader import StatefulDataLoader

from saev_torch import ConfigError, OrderedActivations, OrderedConfig, ShuffledActivations, ShuffledConfig
from saev_torch.pipes import ActivationsPipe, StatefulPipe

pytestmark = pytest.mark.filterwarnings(contracts.MANY_WORKERS)


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> ShuffledConfig:
    """13 batches, the last not full."""
    shards = factory.make_shards(tmp_path_factory.mktemp("pipes") / "shards", n_examples=25)
    return ShuffledConfig(shards=shards, layer=7, batch_size=12, buffer_size=4)


@pytest.fixture(scope="module")
def epochs(cfg: ShuffledConfig) -> list[list[int]]:
    """Digests of the batches of four epochs."""
    ds = ShuffledActivations(cfg)
    return [[batch.digest for batch in ds] for _ in range(4)]


# Functions of the module, because spawned workers import them.


def get_digest(batch: Any) -> int:
    return batch.digest


def is_even(digest: int) -> bool:
    return digest % 2 == 0


def digests_of(ds: Any) -> Any:
    return ActivationsPipe(ds).map(get_digest)


def take(source: Any, n: int) -> list[Any]:
    iterator = iter(source)
    return [next(iterator) for _ in range(n)]


@pytest.mark.parametrize(
    ("n_workers", "persistent", "context"),
    [(0, False, None), (1, False, None), (2, False, None), (2, True, None), (3, False, None), (2, True, "spawn")],
)
@pytest.mark.parametrize("end", [lambda pipe: pipe, StatefulPipe], ids=["pipe", "stateful pipe"])
def test_epochs(
    end: Any, n_workers: int, persistent: bool, context: str | None, cfg: ShuffledConfig, epochs: list[list[int]]
) -> None:
    """Each batch once, and in order, from whichever worker."""
    options = {"num_workers": n_workers, "persistent_workers": persistent, "multiprocessing_context": context}
    loader = DataLoader(end(digests_of(ShuffledActivations(cfg))), batch_size=None, **options)
    assert len(loader) == 13
    assert [list(loader) for _ in range(3)] == epochs[:3]


def test_without_a_loader(cfg: ShuffledConfig, epochs: list[list[int]]) -> None:
    pipe = digests_of(ShuffledActivations(cfg))
    assert [list(pipe), list(pipe)] == epochs[:2]
    assert take(pipe, 4) == epochs[2][:4]
    assert take(pipe, 1) == epochs[3][:1]
    pipe.datapipe.dataset.set_epoch(1)
    assert list(pipe) == epochs[1]


def test_the_batches_themselves(cfg: ShuffledConfig) -> None:
    for ds in (ShuffledActivations(cfg), OrderedActivations(OrderedConfig(cfg.shards, layer=7, batch_size=12))):
        whole = list(ds)
        ds.set_epoch(0)
        contracts.assert_same(list(DataLoader(ActivationsPipe(ds), num_workers=2)), whole)


def test_ranks(cfg: ShuffledConfig, epochs: list[list[int]]) -> None:
    per_rank = [
        list(DataLoader(digests_of(ShuffledActivations(cfg, rank=rank, world_size=3)), batch_size=None, num_workers=2))
        for rank in range(3)
    ]
    whole = epochs[0] + epochs[0][:2]
    assert per_rank == [whole[rank::3] for rank in range(3)]


def test_torch_refuses_to_shard_again(cfg: ShuffledConfig) -> None:
    pipe = ActivationsPipe(ShuffledActivations(cfg)).map(get_digest).sharding_filter()
    with pytest.raises(RuntimeError, match="Sharding twice on a single pipeline"):
        apply_sharding(pipe, 2, 0)


# State


CHAINS: dict[str, Any] = {
    "map": digests_of,
    "filter": lambda ds: digests_of(ds).filter(is_even),
    "batch": lambda ds: digests_of(ds).batch(2),
    "filter, batch": lambda ds: digests_of(ds).filter(is_even).batch(2),
}


@pytest.mark.slow
@pytest.mark.parametrize("chain", CHAINS)
def test_every_cut_in_one_process(chain: str, cfg: ShuffledConfig) -> None:
    make = CHAINS[chain]
    pipe = make(ShuffledActivations(cfg))
    epochs = [list(pipe) for _ in range(3)]
    for k in range(len(epochs[0]) + 1):
        source = StatefulPipe(make(ShuffledActivations(cfg)))
        assert take(source, k) == epochs[0][:k]
        other = StatefulPipe(make(ShuffledActivations(cfg)))
        state = source.state_dict()
        other.load_state_dict(state)
        # The source is behind its last batch with the last item, if no filter has left that batch out.
        is_next = state["epoch"] == 1
        assert is_next == (k == len(epochs[0])) or "filter" in chain
        assert [list(other), list(other)] == (epochs[1:] if is_next else [epochs[0][k:], epochs[1]])


@pytest.mark.slow
# All chains in this process and in two; one that leaves batches out with all numbers of workers.
@pytest.mark.parametrize(
    ("chain", "n_workers", "persistent"),
    [
        *((chain, n, False) for chain in CHAINS for n in (0, 2)),
        (list(CHAINS)[-1], 1, False),
        (list(CHAINS)[-1], 2, True),
    ],
)
def test_stateful_data_loader(chain: str, n_workers: int, persistent: bool, cfg: ShuffledConfig) -> None:
    """Its own snapshots, twice in a row, to the end and into the next epoch."""

    def make(state: Any = None) -> Any:
        pipe = StatefulPipe(CHAINS[chain](ShuffledActivations(cfg)))
        loader = StatefulDataLoader(pipe, batch_size=None, num_workers=n_workers, persistent_workers=persistent)
        if state is not None:
            loader.load_state_dict(state)
        return loader

    loader = make()
    epochs = [list(loader) for _ in range(4)]
    # Where in an epoch matters in one process, too, which takes a tenth of the time.
    for k in (1, len(epochs[0])) if n_workers else (0, 1, len(epochs[0]) // 2, len(epochs[0])):
        loader = make()
        got = take(loader, k)
        loader = make(loader.state_dict())
        got += take(loader, min(2, len(epochs[0]) - k))
        state = loader.state_dict()
        loader = make(state)
        # Workers do not know of each other, so that with them the rest of an epoch may be empty.
        is_next = not n_workers and state["dataset_state"]["epoch"] == 1
        assert is_next == (not n_workers and len(got) == len(epochs[0])) or "filter" in chain
        assert got + list(loader) == (epochs[0] + epochs[1] if is_next else epochs[0])
        assert list(loader) == epochs[1 + is_next]
        loader = make(loader.state_dict())
        assert list(loader) == epochs[2 + is_next]
    del loader


def test_a_plain_loader_with_the_count_of_batches(cfg: ShuffledConfig, epochs: list[list[int]]) -> None:
    for k in (0, 1, 6, 13):
        pipe = StatefulPipe(digests_of(ShuffledActivations(cfg)))
        take(DataLoader(pipe, batch_size=None, num_workers=2), k)
        state = pipe.state_dict(n_batches=k)
        pipe = StatefulPipe(digests_of(ShuffledActivations(cfg)))
        pipe.load_state_dict(state)
        loader = DataLoader(pipe, batch_size=None, num_workers=1)
        assert [list(loader), list(loader)] == ([epochs[0][k:], epochs[1]] if k < 13 else epochs[1:3])


def test_an_epoch_is_chosen(cfg: ShuffledConfig, epochs: list[list[int]]) -> None:
    pipe = StatefulPipe(digests_of(ShuffledActivations(cfg)))
    pipe.set_epoch(2)
    assert list(DataLoader(pipe, batch_size=None, num_workers=2)) == epochs[2]


@pytest.mark.parametrize("n_sources", [0, 2])
def test_a_chain_without_its_one_source_is_refused(n_sources: int, cfg: ShuffledConfig) -> None:
    pipes = [ActivationsPipe(ShuffledActivations(cfg)) for _ in range(n_sources)]
    with pytest.raises(ConfigError, match=f"expected a chain with one ActivationsPipe, got {n_sources}"):
        StatefulPipe(IterableWrapper([1]).zip(*pipes) if pipes else IterableWrapper([1]))
