"""How a data set, or a loader of it, tells a person where it stands."""

from saev_torch.config import BatchConfig
from saev_torch.errors import ConfigError
from saev_torch.resume.cursor import Cursor


class Standing:
    """Something with a cursor, and with as many batches as `len` says."""

    cfg: BatchConfig
    cursor: Cursor

    def __len__(self) -> int:
        """Batches that this rank yields in a whole epoch, also where a state was loaded; see `n_batches_left`."""
        return self.cursor.end() // self.cursor.world.world_size

    @property
    def n_batches_left(self) -> int:
        """Batches that this rank has still to yield of the epoch that it is in, or that a loaded state is in.

        Behind the last batch it is the number of batches of the next epoch, as in `state_dict`.

        Raises:
            StateError: Workers of a plain `DataLoader` make the batches, so only the consumer knows.
        """
        return self.cursor.n_left()

    def __repr__(self) -> str:
        cfg = self.cfg
        try:
            world = f"{len(self)} of them for {self.cursor.world}"
        except ConfigError as err:
            world = str(err)
        return (
            f"<{type(self).__name__} of {cfg.shards}: tokens={cfg.tokens!r}, layer={cfg.layer!r}, "
            f"{self.cursor.n_batches} batches of {cfg.batch_size}, {world}>"
        )
