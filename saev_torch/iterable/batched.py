"""What a data set of batches and a loader of it have in common."""

from typing import Any

from saev_torch.format.metadata import Described
from saev_torch.processes.counters import Counters
from saev_torch.resume.standing import Standing
from saev_torch.resume.state import Recording, StreamDigest, load_state


class Batched(Standing, Described):
    """What a data set of batches, of `n_samples` in all, and a loader of it have in common."""

    n_samples: int
    recording: Recording
    counters: Counters

    @property
    def batch_size(self) -> int:
        """Samples in a batch."""
        return self.cfg.batch_size

    @property
    def drop_last(self) -> bool:
        """Whether a last batch that is not full is left out."""
        return self.cfg.drop_last

    @property
    def n_batches(self) -> int:
        """Batches in an epoch, over all ranks, before padding."""
        return self.n_samples // self.batch_size if self.drop_last else -(-self.n_samples // self.batch_size)

    @property
    def scale(self) -> float | None:
        """What activations are multiplied with; None for nothing."""
        return self.cursor.scale

    @property
    def digest(self) -> StreamDigest:
        """Digest of the batches that were yielded in this process, or taken from this loader, and of those before."""
        return self.cursor.digest

    def metrics(self) -> dict[str, float]:
        """What the readers of this rank, here or in workers, did since the last call; see `Counters.rates`."""
        return self.counters.rates(self.cursor.world.rank)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration continue where a state was taken, with any number of workers and ranks.

        Args:
            state: What `state_dict` of a data set or a loader returned.

        Raises:
            StateError: It is no state, of a newer version, or of other data or another config.
        """
        self.cursor.load(load_state(self.metadata, self.recording, self.cfg, state))
