"""Folding a scale and a centre into the weights of a sparse autoencoder, so that it takes raw activations."""

import dataclasses

import torch

from saev_torch.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class FoldedWeights:
    """Weights for raw activations; dtypes, devices and shapes as they were given to `fold`."""

    w_enc: torch.Tensor
    b_enc: torch.Tensor
    w_dec: torch.Tensor
    b_dec: torch.Tensor


def fold(
    w_enc: torch.Tensor,
    b_enc: torch.Tensor,
    w_dec: torch.Tensor,
    b_dec: torch.Tensor,
    *,
    scale: float | None,
    mean: torch.Tensor | None = None,
    subtracts_b_dec: bool = False,
) -> FoldedWeights:
    """Turn an autoencoder of `z = scale * (x - mean)` into one of `x` itself.

    The autoencoder is `h = f(z @ w_enc + b_enc)`, `z_hat = h @ w_dec + b_dec`, as in Bricken et al. (2023), "Towards
    Monosemanticity". With the folded weights `h` is the same for `x`, and the reconstruction is
    `z_hat / scale + mean`. As what `f` sees does not change, it may be anything that has no other input: ReLU, TopK, or
    JumpReLU, whose thresholds stay as they are.

    Args:
        w_enc: `[d_model, d_sae]`; the transpose of an `nn.Linear` weight.
        b_enc: `[d_sae]`.
        w_dec: `[d_sae, d_model]`.
        b_dec: `[d_model]`.
        scale: The number that activations were multiplied with, as `loader.scale`; None for none.
        mean: `[d_model]`, what was subtracted from the raw activations before they were scaled; None for nothing. Of
            activations that were centred after scaling, give that mean divided by `scale`.
        subtracts_b_dec: The encoder is `f((z - b_dec) @ w_enc + b_enc)`, and the folded one does the same.

    Returns:
        The folded weights, computed in float64.

    Raises:
        ConfigError: `scale` is no finite number above 0, or shapes do not fit.
    """
    scale = 1.0 if scale is None else scale
    if not 0 < scale < float("inf"):
        raise ConfigError(f"scale: expected a finite number above 0, got {scale!r}.")
    d_model, d_sae = w_enc.shape
    centre = torch.zeros(d_model, dtype=torch.float64, device=w_enc.device) if mean is None else mean
    given = {"b_enc": b_enc, "w_dec": w_dec, "b_dec": b_dec, "mean": centre}
    wanted = {"b_enc": (d_sae,), "w_dec": (d_sae, d_model), "b_dec": (d_model,), "mean": (d_model,)}
    for name, shape in wanted.items():
        if given[name].shape != shape:
            raise ConfigError(f"{name}: expected shape {shape} with w_enc {(d_model, d_sae)}, got {given[name].shape}.")
    centre = centre.to(w_enc.device, torch.float64)
    bias = b_enc.double()
    if not subtracts_b_dec:
        # Else the centre is in the folded b_dec, which that encoder subtracts.
        bias = bias - (scale * centre) @ w_enc.double()
    return FoldedWeights(
        w_enc=(w_enc.double() * scale).to(w_enc.dtype),
        b_enc=bias.to(b_enc.dtype),
        w_dec=(w_dec.double() / scale).to(w_dec.dtype),
        b_dec=(b_dec.double() / scale + centre).to(b_dec.dtype),
    )
