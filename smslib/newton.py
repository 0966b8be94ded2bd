r"""Gauss-Newton steps from an encoder's guess towards the mode of p(z | x, c).

One step solves :math:`(J^\top W J + I)\,\delta = J^\top W (x - \mu)/\mu - (z - s)`, with J the
Jacobian of the log mean, W the Fisher information of the counts about their log mean, and s the
prior's shift. The curvature is that of the likelihood and of the prior N(s, I): nothing is tuned.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["log_rate_and_jacobian", "newton_step"]

# In prior standard deviations: a rectifier's kinks make longer steps overshoot.
_LONGEST_STEP = 1.0


def log_rate_and_jacobian(
    layers: Sequence[nn.Linear], slope: float, z: Float[Tensor, "cell latent"]
) -> tuple[Float[Tensor, "cell gene"], Float[Tensor, "cell latent gene"]]:
    """Return a decoder's log share of every gene and its derivative by every latent.

    Parameters
    ----------
    layers : sequence of Linear
        From latents to genes, two or more, with a leaky rectifier between each and the next, and a
        softmax at the end.
    slope : float
        Of the rectifier below zero; 0 for ReLU.
    z : Tensor, (n_cells, n_latent)
    """
    *inner, last = layers
    hidden, tangent = z, None
    for layer in inner:
        hidden = layer(hidden)
        slopes = torch.where(hidden > 0, 1.0, slope).to(hidden).unsqueeze(1)
        hidden = functional.leaky_relu(hidden, slope)
        weight = layer.weight.t().contiguous()  # or the product walks through memory askew
        # In place: the tangents are by far the largest arrays of a training step.
        tangent = weight * slopes if tangent is None else (tangent @ weight).mul_(slopes)
    log_rate = last(hidden).log_softmax(-1)
    jacobian = tangent @ last.weight.t()
    return log_rate, jacobian.sub_(jacobian @ log_rate.exp().unsqueeze(-1))


def newton_step(
    z: Float[Tensor, "cell latent"],
    counts: Float[Tensor, "cell gene"],
    shift: Float[Tensor, "cell latent"],
    *,
    log_rate: Float[Tensor, "cell gene"],
    jacobian: Float[Tensor, "cell latent gene"],
    theta: Float[Tensor, " gene"],
) -> Float[Tensor, "cell latent"]:
    """Return the step from z towards the mode of p(z | x, c), prior standard deviations.

    Parameters
    ----------
    z : Tensor, (n_cells, n_latent)
    counts : Tensor, (n_cells, n_genes)
        UMIs; their sum is the library.
    shift : Tensor, (n_cells, n_latent)
        Mean of the prior of each cell.
    log_rate, jacobian : Tensor
        From `log_rate_and_jacobian` at z.
    theta : Tensor, (n_genes,)
        Inverse dispersion.
    """
    mean = counts.sum(-1, keepdim=True) * log_rate.exp()
    weight = theta / (theta + mean)  # of a residual; the Fisher information is weight * mean
    score = jacobian @ ((counts - mean) * weight).unsqueeze(-1)
    curvature = (jacobian * (mean * weight).unsqueeze(1)) @ jacobian.transpose(1, 2)
    curvature.diagonal(dim1=1, dim2=2).add_(1.0)
    factor, _ = torch.linalg.cholesky_ex(curvature)
    step = torch.cholesky_solve(score - (z - shift).unsqueeze(-1), factor).squeeze(-1)
    return step.clamp(-_LONGEST_STEP, _LONGEST_STEP)
