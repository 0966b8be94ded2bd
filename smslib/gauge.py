r"""Origin and axes of the latents: what a fit leaves open, closed by the sparsity of the shifts.

In ``z | c ~ N(s(c), I)`` a decoder undoes any translation and rotation of z, so likelihood alone
tells neither where a screen without control cells has its origin nor which way the axes point.
Sparsity does: in the right coordinates most targets do not move most latents. A fit whose gates
have not got there can be read in better coordinates. Nothing here knows a truth.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["Frame", "centred", "cost", "evidence", "sparsest", "target_means"]

_STEPS, _RATE = 500, 0.02
_NO_TURN = 15
# Up to half a right angle to either side: further is one of these with the latents exchanged.
_ANGLES = (torch.arange(32, dtype=torch.float64) - _NO_TURN) * (math.pi / 64)
_LEAST_GAIN = 1e-4  # by medians along new axes, as a share of the cost
_LEAST_SAVED = 1e-3  # by a turn of two latents, in units of alpha - 1 over the whole graph
_AT_ONCE = 4_000_000  # numbers in a table of costs


class Frame(NamedTuple):
    """Coordinates of the latents."""

    origin: Float[np.ndarray, " latent"]
    axes: Float[np.ndarray, "latent latent"]
    """Orthogonal; a column is a new latent."""

    def of(self, z: Float[np.ndarray, "*row latent"]) -> Float[np.ndarray, "*row latent"]:
        """Return codes or shifts in these coordinates."""
        return (z - self.origin) @ self.axes


def target_means(
    codes: Float[np.ndarray, "cell latent"],
    condition: Int[np.ndarray, " cell"],
    single: Int[np.ndarray, " target"],
) -> tuple[Float[np.ndarray, "target latent"], Int[np.ndarray, " target"]]:
    """Average codes over the cells in which a target is perturbed alone.

    Parameters
    ----------
    codes : array, (n_cells, n_latent)
    condition : array of int, (n_cells,)
    single : array of int, (n_targets,)
        The condition that perturbs each target and no other.

    Returns
    -------
    mean : array, (n_targets, n_latent)
        Zero for a target without cells.
    n_cells : array of int, (n_targets,)
    """
    n_conditions = int(single.max(initial=-1)) + 1
    n_cells = np.bincount(condition, minlength=n_conditions)
    sums = [np.bincount(condition, weights=code, minlength=n_conditions) for code in codes.T]
    means = np.stack(sums, axis=1) / n_cells.clip(min=1)[:, None]
    return means[single], n_cells[single]


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
    thorough: bool = True,
) -> Frame:
    """Turn the axes about the median of the targets until the graph costs least.

    Downhill from the axes as they are, which from a random rotation often ends in an optimum
    nearby; and once more after turning two latents at a time, always those two and by that angle
    that save most. Of the two the cheaper counts. Then the medians are taken along the new axes,
    which most targets share better, and the axes turned about these, until nothing is gained.

    Parameters
    ----------
    mean : array, (n_targets, n_latent)
        Mean code of each target's cells.
    n_cells : array of int, (n_targets,)
    alpha : float
        Sparsity of the gates, above 1.
    thorough : bool
        Whether to do more than go downhill once.

    Returns
    -------
    Frame
        A local optimum of the summed `cost`; the axes as they are, if nothing near them costs
        less.

    Raises
    ------
    ValueError
        If a mean is not finite, there is no target, or ``n_cells`` has not one number for each;
        or as `cost`.
    """
    _check(alpha)
    _check_means(mean, n_cells)
    scale = np.sqrt(n_cells[:, None] / (2 * (alpha - 1)))
    best, price = _about_median(mean, scale, np.eye(mean.shape[1]), pairs=thorough)
    while thorough:
        again, lower = _about_median(mean, scale, best.axes, pairs=True)
        if lower >= (1 - _LEAST_GAIN) * price:
            break
        best, price = again, lower
    return best


def _about_median(
    mean: Float[np.ndarray, "target latent"],
    scale: Float[np.ndarray, "target 1"],
    axes: Float[np.ndarray, "latent latent"],
    *,
    pairs: bool,
) -> tuple[Frame, float]:
    """Turn these axes about the medians along them; return what the graph then costs, too."""
    start = centred(mean @ axes)
    scaled = torch.from_numpy((start.of(mean @ axes) * scale).astype(np.float64))
    turns = [torch.eye(scaled.shape[1], dtype=scaled.dtype)]
    turns += [_turned_by_pairs(scaled)] if pairs else []
    ends = [turn @ _turned(scaled @ turn) for turn in turns]
    prices = [_total(scaled @ turn) for turn in ends]
    turn = ends[int(np.argmin(prices))].numpy()
    return Frame(axes @ start.origin, axes @ turn), min(prices)


def _check(alpha: float) -> None:
    if not alpha > 1:
        raise ValueError(
            f"alpha is {alpha}; expected more than 1, for with a flat prior no coordinates are "
            "sparser than others"
        )


def _check_means(mean: np.ndarray, n_cells: np.ndarray) -> None:
    if len(mean) == 0 or n_cells.shape != (len(mean),):
        raise ValueError(
            f"mean has {len(mean)} rows and n_cells shape {n_cells.shape}; expected a row and a "
            "number for each target, of one target at least"
        )
    if wrong := int((~np.isfinite(mean)).any(1).sum()):
        raise ValueError(
            f"the means of {wrong} of {len(mean)} targets are not finite; expected numbers, and "
            "zeros for a target without cells, as from gauge.target_means"
        )


def _cost(ratio: Tensor) -> Tensor:
    """Return the cost in units of alpha - 1, given the evidence in the same."""
    return torch.where(ratio < 1, ratio, 1 + ratio.clamp(min=1).log())


def _total(scaled: Float[Tensor, "target latent"]) -> float:
    return _cost(scaled.square()).sum().item()


def _turned_by_pairs(scaled: Float[Tensor, "target latent"]) -> Float[Tensor, "latent latent"]:
    """Turn the two latents that save most by the angle that does, until no two save anything."""
    scaled, axes = scaled.clone(), torch.eye(scaled.shape[1], dtype=scaled.dtype)
    pairs = torch.combinations(torch.arange(len(axes)))
    saved, angle = _savings(scaled, pairs)
    while len(pairs) and saved.max() > _LEAST_SAVED:
        best = saved.argmax()
        two, cos, sin = pairs[best], angle[best].cos(), angle[best].sin()
        turn = torch.stack([torch.stack([cos, -sin]), torch.stack([sin, cos])])
        for each in (scaled, axes):
            each[:, two] = each[:, two] @ turn
        touched = torch.isin(pairs, two).any(1)
        saved[touched], angle[touched] = _savings(scaled, pairs[touched])
    return axes


def _savings(
    scaled: Float[Tensor, "target latent"], pairs: Int[Tensor, "pair 2"]
) -> tuple[Float[Tensor, " pair"], Float[Tensor, " pair"]]:
    """Return what the best turn of each two latents saves, and its angle."""
    angles, (n_targets, _) = _ANGLES.to(scaled), scaled.shape
    costs = []
    for some in pairs.split(max(1, _AT_ONCE // (max(1, n_targets) * len(angles)))):
        first, second = (scaled[:, latent, None] for latent in some.T)
        turned = first * angles.cos() + second * angles.sin()
        other = second * angles.cos() - first * angles.sin()
        costs.append((_cost(turned.square()) + _cost(other.square())).sum(0))
    cost = torch.cat(costs)
    least = cost.min(1)
    return cost[:, _NO_TURN] - least.values, angles[least.indices]


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
