"""Which latents fire where, and what some of them mean: the strongest token of each word, with its context."""

import dataclasses

import numpy as np
import numpy.typing as npt

from saev_torch.tools.demo.corpus import Corpus

N_LATENTS_SHOWN = 8
N_HITS_SHOWN = 4
# Characters before the token, and from its first one on.
N_LEFT, N_RIGHT = 52, 60
_N_STRONGEST = 40
_MIN_LETTERS = 4
_N_STEM = 3
_RARE, _COMMON = 2e-4, 1e-2


@dataclasses.dataclass(frozen=True)
class Firings:
    """Every active latent of every token, sorted by latent and then by value, the strongest first: [n_firings] each."""

    latents: npt.NDArray[np.int64]
    values: npt.NDArray[np.float32]
    positions: npt.NDArray[np.int64]  # Window x content tokens + token.
    n_tokens: int  # Also those on which nothing fires.
    n_latents: int  # Also those that never fire.

    @property
    def frequencies(self) -> npt.NDArray[np.float64]:
        """[n_latents] float64, the share of tokens on which each latent fires; 0 for a dead one."""
        return np.bincount(self.latents, minlength=self.n_latents) / self.n_tokens


@dataclasses.dataclass(frozen=True)
class Hit:
    """One token on which a latent fires, in context."""

    left: str
    token: str
    right: str
    value: float


def find_meanings(firings: Firings, corpus: Corpus) -> list[tuple[int, float, list[Hit]]]:
    """Choose latents that stand for one idea in many words, by a rule and not by eye.

    A latent qualifies if it is neither rare nor common and its strongest firings are on whole words with at least
    `N_HITS_SHOWN` different beginnings, so that it is more than the embedding of one word. The strongest go first, and
    of equally strong ones those that react to their words alike. Returns (latent, its frequency, a hit for each word).
    """
    frequencies = firings.frequencies
    starts = np.searchsorted(firings.latents, np.arange(firings.n_latents))
    found = []
    for latent in np.flatnonzero((frequencies >= _RARE) & (frequencies <= _COMMON)):
        n_firings = round(frequencies[latent] * firings.n_tokens)
        strongest = slice(starts[latent], starts[latent] + min(n_firings, _N_STRONGEST))
        hits: dict[str, Hit] = {}
        for position, value in zip(firings.positions[strongest], firings.values[strongest], strict=True):
            word = _whole_word(corpus, int(position))
            if word is not None:
                hits.setdefault(word[:_N_STEM].lower(), _make_hit(corpus, int(position), float(value)))
        shown = list(hits.values())[:N_HITS_SHOWN]
        if len(shown) == N_HITS_SHOWN:
            found.append((int(latent), float(frequencies[latent]), shown))
    found.sort(key=lambda meaning: -(meaning[2][-1].value ** 2) / meaning[2][0].value)
    return found[:N_LATENTS_SHOWN]


def _whole_word(corpus: Corpus, position: int) -> str | None:
    start, stop = corpus.spans.reshape(-1, 2)[position]
    word = corpus.text[start:stop]
    around = corpus.text[max(0, start - 1) : start] + corpus.text[stop : stop + 1]
    is_whole = word.isalpha() and not any(char.isalnum() or char == "_" for char in around)
    return word if is_whole and len(word) >= _MIN_LETTERS else None


def _make_hit(corpus: Corpus, position: int, value: float) -> Hit:
    window, token = divmod(position, corpus.spans.shape[1])
    start, stop = corpus.spans[window, token]
    # What stands outside the window was not seen by the model.
    first, last = corpus.spans[window, 0, 0], corpus.spans[window, -1, 1]
    left = corpus.text[max(first, start - N_LEFT) : start].replace("\n", " ")
    right = corpus.text[stop : min(last, start + N_RIGHT)].replace("\n", " ")
    # Words that the edge cuts tell nothing. A short context has none: it ends where the window does.
    left = left.partition(" ")[2] if len(left) == N_LEFT else left
    right = right.rpartition(" ")[0] if stop + len(right) == start + N_RIGHT else right
    return Hit(left, corpus.text[start:stop], right, value)
