r"""Sparsest axes of a table of shifts, by trying all of them.

Known up to a linear map of the latents, the shifts of K conditions are a matrix M with K rows. An
axis is a vector a, its column of the new table is M a, and the sparsest axes are those that shift
the fewest conditions. One that cannot be made sparser without being another axis is orthogonal to
p - 1 independent rows of M, so that there are finitely many to try: the argument by which sparse
dictionaries are unique (Spielman et al. 2012). It needs no variability of a target's shift.
"""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped

__all__ = ["Axes", "candidates", "pinned"]

_ZERO = 1e-8  # of unit vectors and shifts in prior standard deviations
_MOST = 200_000


class Axes(NamedTuple):
    """Candidates for an axis, those that shift the fewest conditions first."""

    direction: Float[np.ndarray, "candidate latent"]
    """Unit vectors, in the coordinates of the shifts."""
    n_shifted: Int[np.ndarray, " candidate"]
    """Conditions whose shift along the axis is not zero."""


def candidates(shift: Shaped[np.ndarray, ...]) -> Axes:
    """List every axis that is orthogonal to one condition less than there are latents.

    Parameters
    ----------
    shift : array, (n_conditions, n_latent)
        Prior standard deviations, without the control; in any linear coordinates.

    Returns
    -------
    Axes
        With repetitions: an axis comes once for every choice of conditions that it leaves alone.
        Where those do not fix it, one of the axes that they allow.

    Raises
    ------
    ValueError
        If there are fewer than two latents, fewer conditions than latents, or too many choices.
    """
    shift = _checked(shift)
    n_conditions, n_latent = shift.shape
    chosen = np.array(list(combinations(range(n_conditions), n_latent - 1)))
    direction = np.linalg.svd(shift[chosen])[2][:, -1]
    n_shifted = (np.abs(direction @ shift.T) > _ZERO * np.abs(shift).max()).sum(1)
    order = np.argsort(n_shifted, kind="stable")
    return Axes(direction[order], n_shifted[order])


def pinned(shift: Shaped[np.ndarray, ...]) -> bool:
    """Say whether the coordinate axes are the only sparsest basis.

    They are if whatever mixes some of them shifts more conditions than each of those it mixes:
    the sparsest basis is found greedily, as in any matroid.

    Parameters
    ----------
    shift : array, (n_conditions, n_latent)
        Prior standard deviations, in the true coordinates, without the control.

    Returns
    -------
    bool

    Raises
    ------
    ValueError
        As `candidates`.
    """
    shift = _checked(shift)
    direction, n_shifted = candidates(shift)
    mixes = np.abs(direction) > _ZERO
    shifted = np.abs(shift) > _ZERO * np.abs(shift).max()  # zero means the same everywhere
    rival = np.where(mixes, shifted.sum(0), 0).max(1)
    mixed = mixes.sum(1) > 1
    spans = np.linalg.matrix_rank(shift) == shift.shape[1]
    return bool(spans and (n_shifted > rival)[mixed].all())


def _checked(shift: Shaped[np.ndarray, ...]) -> Float[np.ndarray, "condition latent"]:
    from math import comb

    shift = np.asarray(shift, dtype=float)
    if shift.ndim != 2 or not 2 <= shift.shape[1] <= len(shift):
        raise ValueError(
            f"shift has shape {shift.shape}; expected (n_conditions, n_latent) with at least two "
            "latents and as many conditions"
        )
    n_choices = comb(len(shift), shift.shape[1] - 1)
    if n_choices > _MOST:
        raise ValueError(
            f"{n_choices:,} choices of conditions to try; expected at most {_MOST:,}: take fewer "
            "conditions or latents"
        )
    return shift
