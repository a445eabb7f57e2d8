"""A folded autoencoder does to raw activations what the original does to scaled and centred ones."""

import pytest
import torch

from saev_torch import ConfigError
from saev_torch.stats.folding import fold

D_MODEL, D_SAE, K = 48, 192, 16


def _top_k(pre: torch.Tensor) -> torch.Tensor:
    values, indices = pre.topk(K, dim=-1)
    return torch.zeros_like(pre).scatter(-1, indices, values.relu())


ACTIVATIONS = {
    "relu": torch.relu,
    "topk": _top_k,
    "jumprelu": lambda pre: pre * (pre > torch.linspace(0.1, 0.9, D_SAE, dtype=pre.dtype)),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("is_centred", [False, True])
@pytest.mark.parametrize("subtracts_b_dec", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_folded_equals_scaled(activation: str, is_centred: bool, subtracts_b_dec: bool, dtype: torch.dtype) -> None:
    f = ACTIVATIONS[activation]
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    w_enc, b_enc, w_dec, b_dec = draw(D_MODEL, D_SAE) / 7, draw(D_SAE) / 9, draw(D_SAE, D_MODEL) / 7, draw(D_MODEL)
    scale, mean = 0.037, (3 * draw(D_MODEL) if is_centred else None)
    x = 27 * draw(500, D_MODEL) + 5

    def run(z: torch.Tensor, w: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        h = f((z - w[3] if subtracts_b_dec else z) @ w[0] + w[1])
        return h, h @ w[2] + w[3]

    z = scale * (x if mean is None else x - mean)
    h, z_hat = run(z, (w_enc, b_enc, w_dec, b_dec))
    x_hat = z_hat / scale + (0 if mean is None else mean)
    folded = fold(w_enc, b_enc, w_dec, b_dec, scale=scale, mean=mean, subtracts_b_dec=subtracts_b_dec)
    h_folded, x_hat_folded = run(x, (folded.w_enc, folded.b_enc, folded.w_dec, folded.b_dec))
    assert folded.w_enc.dtype == folded.b_dec.dtype == dtype
    # A value next to a threshold may fall on the other side by rounding, in few of the 500 samples.
    tolerance = 2e-6 if dtype == torch.float32 else 1e-14
    close = ((h_folded - h).abs().amax(dim=1) <= 8 * tolerance * h.abs().max()) & (
        (x_hat_folded - x_hat).abs().amax(dim=1) <= 8 * tolerance * x_hat.abs().max()
    )
    assert close.double().mean() > (0.98 if dtype == torch.float32 else 0.999)
    if activation == "relu":
        assert close.all()


def test_refusals() -> None:
    w_enc, b_enc, w_dec, b_dec = torch.ones(4, 6), torch.ones(6), torch.ones(6, 4), torch.ones(4)
    with pytest.raises(ConfigError, match="w_dec"):
        fold(w_enc, b_enc, w_enc, b_dec, scale=1.0)
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="scale"):
            fold(w_enc, b_enc, w_dec, b_dec, scale=scale)
    with pytest.raises(ConfigError, match="mean"):
        fold(w_enc, b_enc, w_dec, b_dec, scale=1.0, mean=torch.ones(6))


def test_without_a_scale_weights_stay() -> None:
    given = torch.randn(4, 6), torch.randn(6), torch.randn(6, 4), torch.randn(4)
    folded = fold(*given, scale=None)
    for got, wanted in zip((folded.w_enc, folded.b_enc, folded.w_dec, folded.b_dec), given, strict=True):
        assert torch.equal(got, wanted)
