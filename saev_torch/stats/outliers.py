"""Tokens with huge norms: attention sinks and the like, which rule every mean, scale and explained variance.

Sun et al. (2024), "Massive Activations in Large Language Models" (arXiv:2402.17762) describe them: a few values of a
few tokens, often the first one, are thousands of times larger than all others, whatever the text is.
"""

import shlex
from pathlib import Path

import numpy as np
import torch

from saev_torch.stats.moments import NormHistogram

MAX_IN_MEDIANS = 20
"""Norms above so many medians are told."""

_MASKED_FROM = "10x-median"
# Of each batch so many vectors are looked at, at most: a hundredth of a second.
_N_VECTORS = 1 << 14
# Bins 0.8% wide, of 256 KB a layer.
_HISTOGRAM_SHIFT = 16


class NormMeter:
    """The median and the largest norm of each layer, of batches that pass by.

    Of a batch it looks at whole examples, as many as have about 16,384 vectors, but at one at least.
    """

    def __init__(self, n_layers: int) -> None:
        self._largest = np.zeros(n_layers)
        self._histograms = [NormHistogram(_HISTOGRAM_SHIFT) for _ in range(n_layers)]

    def add(self, acts: torch.Tensor) -> None:
        """Look at some of `[n, n_layers, tokens, d_model]`, of any float type."""
        step = -(-acts.shape[0] * acts.shape[1] * acts.shape[2] // _N_VECTORS)
        norms = torch.linalg.vector_norm(acts[::step].float(), dim=3).double().numpy()
        for i, histogram in enumerate(self._histograms):
            found = norms[:, i][np.isfinite(norms[:, i])]
            histogram.add(found)
            self._largest[i] = max(self._largest[i], found.max(initial=0.0))

    def advise(self, shards_dir: Path, layers: tuple[int, ...]) -> list[str]:
        """A line for each layer with tokens of huge norms, which says how to leave them out."""
        found = zip(layers, self._histograms, self._largest.tolist(), strict=True)
        lines = (
            advise_mask(shards_dir, layer, histogram.quantile(0.5, 0.0, largest), largest)
            for layer, histogram, largest in found
        )
        return [line for line in lines if line is not None]


def advise_mask(shards_dir: Path, layer: int, median: float, largest: float) -> str | None:
    """Say which mask leaves out tokens with huge norms; None where there are none."""
    if not 0 < MAX_IN_MEDIANS * median < largest:
        return None
    return (
        f"layer {layer}: the largest norm, {largest:.4g}, is {largest / median:,.0f} medians; such tokens rule the "
        "mean norm and the explained variance. To leave them out: python -m saev_torch mask "
        f"{shlex.quote(str(shards_dir))} --layer {layer} --norm-above {_MASKED_FROM} -o keep.npy, then mask='keep.npy'"
    )
