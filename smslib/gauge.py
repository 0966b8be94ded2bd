r"""Origin and axes of the latents: what a fit leaves open, closed by the sparsity of the shifts.

In ``z | c ~ N(s(c), I)`` a decoder undoes any translation and rotation of z, so likelihood alone
tells neither where a screen without control cells has its origin nor which way the axes point.
Sparsity does: in the right coordinates most targets do not move most latents. A fit whose gates
have not got there can be read in better coordinates. Nothing here knows a truth.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["Frame", "centred", "cost", "evidence", "sparsest"]

_STEPS, _RATE = 500, 0.02


class Frame(NamedTuple):
    """Coordinates of the latents."""

    origin: Float[np.ndarray, " latent"]
    axes: Float[np.ndarray, "latent latent"]
    """Orthogonal; a column is a new latent."""

    def of(self, z: Float[np.ndarray, "*row latent"]) -> Float[np.ndarray, "*row latent"]:
        """Return codes or shifts in these coordinates."""
        return (z - self.origin) @ self.axes


def evidence(
    mean: Float[np.ndarray, "target latent"], n_cells: Int[np.ndarray, " target"]
) -> Float[np.ndarray, "target latent"]:
    """Return what n cells with that mean code say for a shift, nats: ``n mean**2 / 2``.

    With networks as they are, sVAE+ holds a gate open where this exceeds ``2 (alpha - 1)``
    (derived in `smslib.transfer.adapt`).
    """
    return n_cells[:, None] * mean**2 / 2


def cost(evidence: Float[np.ndarray, "*entry"], *, alpha: float) -> Float[np.ndarray, "*entry"]:
    r"""Return what an entry of the graph costs at its best gate: evidence lost plus penalty, nats.

    .. math::
        \min_\pi\, (1 - \pi) L - (\alpha - 1) \log(1 - \pi)

    which is L up to :math:`\alpha - 1`, and :math:`(\alpha - 1)(1 + \log\frac{L}{\alpha - 1})`
    beyond: the sparsity of sVAE+ as a function of the shifts alone.

    Raises
    ------
    ValueError
        If alpha is not above 1: a flat prior prefers no coordinates.
    """
    _check(alpha)
    return (alpha - 1) * _cost(torch.as_tensor(evidence / (alpha - 1))).numpy()


def centred(mean: Float[np.ndarray, "target latent"]) -> Frame:
    """Put the origin where most targets are: at the median over the targets, axis by axis.

    Parameters
    ----------
    mean : array, (n_targets, n_latent)
        Mean code of each target's cells.
    """
    return Frame(np.median(mean, axis=0), np.eye(mean.shape[1]))


def sparsest(
    mean: Float[np.ndarray, "target latent"],
    n_cells: Int[np.ndarray, " target"],
    *,
    alpha: float,
) -> Frame:
    """Turn the axes about the median of the targets until the graph costs least.

    Parameters
    ----------
    mean : array, (n_targets, n_latent)
        Mean code of each target's cells.
    n_cells : array of int, (n_targets,)
    alpha : float
        Sparsity of the gates, above 1.

    Returns
    -------
    Frame
        A local optimum of the summed `cost`, downhill from the axes as they are; those, if
        nothing near them costs less.

    Raises
    ------
    ValueError
        As `cost`.
    """
    _check(alpha)
    start = centred(mean)
    scaled = start.of(mean) * np.sqrt(n_cells[:, None] / (2 * (alpha - 1)))
    return Frame(start.origin, _turned(torch.from_numpy(scaled.astype(np.float64))).numpy())


def _check(alpha: float) -> None:
    if not alpha > 1:
        raise ValueError(
            f"alpha is {alpha}; expected more than 1, for with a flat prior no coordinates are "
            "sparser than others"
        )


def _cost(ratio: Tensor) -> Tensor:
    """Return the cost in units of alpha - 1, given the evidence in the same."""
    return torch.where(ratio < 1, ratio, 1 + ratio.clamp(min=1).log())


def _turned(scaled: Float[Tensor, "target latent"]) -> Float[Tensor, "latent latent"]:
    """Descend over rotations; return the cheapest seen."""
    n = scaled.shape[1]
    turn = torch.zeros(n, n, dtype=scaled.dtype, requires_grad=True)
    optimizer = torch.optim.Adam([turn], lr=_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    best, lowest = torch.eye(n, dtype=scaled.dtype), float("inf")
    for _ in range(_STEPS):
        axes = torch.linalg.matrix_exp(turn - turn.T)
        total = _cost((scaled @ axes).square()).sum()
        if total.item() < lowest:
            best, lowest = axes.detach(), total.item()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        schedule.step()
    return best
