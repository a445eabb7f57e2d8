"""What a side of the benchmark did once, and what its processes used for it."""

import contextlib
import dataclasses
from typing import NamedTuple

import psutil

__all__ = ["Measured", "Usage", "family"]


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one side did once.

    Attributes:
        n_samples: Samples that came.
        nbytes: Their activations in bytes.
        seconds: Time that they took.
        user_s: Processor time of all processes, outside the kernel.
        system_s: Processor time of all processes, in the kernel.
        is_cut: Whether a cold epoch, or a pass of statistics, was stopped before its end.
    """

    n_samples: int
    nbytes: int
    seconds: float
    user_s: float = 0.0
    system_s: float = 0.0
    is_cut: bool = False

    @property
    def gb_per_s(self) -> float:
        """1e9 bytes of activations per second."""
        return self.nbytes / self.seconds / 1e9

    @property
    def samples_per_s(self) -> float:
        """Samples per second."""
        return self.n_samples / self.seconds

    @property
    def cores_busy(self) -> float:
        """Processor time per second."""
        return (self.user_s + self.system_s) / self.seconds

    @property
    def cores_busy_in_kernel(self) -> float:
        """The part of it that was spent in the kernel."""
        return self.system_s / self.seconds

    def since(self, start: "Measured") -> "Measured":
        """What was done after `start`, which was measured on the way."""
        user_s, system_s = Usage(self.user_s, self.system_s).since(Usage(start.user_s, start.system_s))
        n_samples, nbytes = self.n_samples - start.n_samples, self.nbytes - start.nbytes
        return Measured(n_samples, nbytes, self.seconds - start.seconds, user_s, system_s, self.is_cut)


def family() -> list[psutil.Process]:
    """This process and all processes below it."""
    own = psutil.Process()
    return [own, *own.children(recursive=True)]


class Usage(NamedTuple):
    """Processor time of this process and all below it, in seconds, since each began."""

    user_s: float
    system_s: float

    @classmethod
    def now(cls) -> "Usage":
        """What has been used so far."""
        user_s = system_s = 0.0
        for process in family():
            # One that has ended in the meantime takes its time with it.
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                user_s, system_s = user_s + times.user, system_s + times.system
        return cls(user_s, system_s)

    def since(self, before: "Usage") -> "Usage":
        """The difference; never negative, though a process that ended takes its time with it."""
        return Usage(max(0.0, self.user_s - before.user_s), max(0.0, self.system_s - before.system_s))
