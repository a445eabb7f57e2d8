"""What a side of the benchmark did once, and what its processes used for it."""

import contextlib
import dataclasses

import numpy as np
import psutil
from numpy.typing import NDArray


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
        return Measured(
            self.n_samples - start.n_samples,
            self.nbytes - start.nbytes,
            self.seconds - start.seconds,
            # A process that ended took its time with it.
            max(0.0, self.user_s - start.user_s),
            max(0.0, self.system_s - start.system_s),
            self.is_cut,
        )


def family() -> list[psutil.Process]:
    """This process and all processes below it."""
    own = psutil.Process()
    return [own, *own.children(recursive=True)]


def processor_s() -> NDArray[np.float64]:
    """Processor time of this process and all below it since each began: `[user, system]` in seconds."""
    total = np.zeros(2)
    for process in family():
        # One that has ended in the meantime takes its time with it.
        with contextlib.suppress(psutil.Error):
            total += process.cpu_times()[:2]
    return total
