"""Estimates that need no neural network: what a model of the screen has to beat.

Every control maps counts to estimated latents, ``(n_cells, n_latent)``, to be scored by `metrics`
as those of a model. All start from log(1 + count). `pca` sees no labels, `lda` sees them,
`regression` sees the truth; `shuffle_labels` leaves a model everything but the labels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Real

from smslib import metrics

__all__ = ["Discriminant", "lda", "pca", "quartimax", "regression", "shuffle_labels", "whiten"]


class Discriminant(NamedTuple):
    """Latents and class means of `lda`."""

    latents: Float[np.ndarray, "cell latent"]
    shift: Float[np.ndarray, "condition latent"]


def pca(counts: Real[Any, "cell gene"], n_latent: int) -> Float[np.ndarray, "cell {n_latent}"]:
    """Project log counts on their first principal components.

    Parameters
    ----------
    counts : array, (n_cells, n_genes)
        UMIs.
    n_latent : int

    Returns
    -------
    array, (n_cells, n_latent)
        Centred scores, by decreasing variance.

    Raises
    ------
    ValueError
        If the counts are not a finite non-negative matrix, or ``n_latent`` is not between 1 and
        the smaller of its sides.
    """
    from sklearn.decomposition import PCA

    logs = _log_counts(counts)
    _check_width(n_latent, min(logs.shape), f"the smaller side of {logs.shape}")
    return PCA(n_latent, svd_solver="covariance_eigh").fit_transform(logs)


def lda(
    counts: Real[Any, "cell gene"], condition: Int[Any, " cell"], n_latent: int
) -> Discriminant:
    """Project log counts on the axes that tell conditions apart, turned for sparse class means.

    Linear discriminant axes are identified up to a rotation. `quartimax` picks the one in which
    the class means have few large entries, which is what sparse shifts look like.

    Parameters
    ----------
    counts : array, (n_cells, n_genes)
        UMIs.
    condition : array of int, (n_cells,)
    n_latent : int

    Returns
    -------
    Discriminant
        ``latents``: scores with unit variance within conditions, centred over all cells.
        ``shift``: their mean in each condition, conditions in increasing order of their label;
        the control's estimate of the shifts, for `metrics.top_k_graph`.

    Raises
    ------
    ValueError
        If the counts are not a finite non-negative matrix, ``condition`` does not have one entry
        per cell, or ``n_latent`` exceeds what the class means span.
    """
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    logs = _log_counts(counts)
    labels, group = _checked_condition(condition, len(logs))
    _check_width(n_latent, min(len(labels) - 1, logs.shape[1]), "conditions - 1 and genes")
    varying = logs[:, np.ptp(logs, axis=0) > 0]  # sklearn warns of constant genes
    scores = LinearDiscriminantAnalysis(n_components=n_latent).fit_transform(varying, group)
    _check_width(n_latent, scores.shape[1], "what the class means span")
    means = np.stack([scores[group == label].mean(0) for label in range(len(labels))])
    shift, rotation = quartimax(means)
    return Discriminant(scores @ rotation, shift)


def quartimax(
    loadings: Real[Any, "row axis"], *, tolerance: float = 1e-10, max_steps: int = 10_000
) -> tuple[Float[np.ndarray, "row axis"], Float[np.ndarray, "axis axis"]]:
    """Rotate loadings so that each row has few large entries: the largest sum of fourth powers.

    Parameters
    ----------
    loadings : array, (n_rows, n_axes)
    tolerance : float
        Stop when a step gains less than this fraction of the criterion.
    max_steps : int

    Returns
    -------
    rotated : array, (n_rows, n_axes)
        ``loadings @ rotation``.
    rotation : array, (n_axes, n_axes)
        Orthogonal. A local optimum: the one reached from the given axes.

    Raises
    ------
    ValueError
        If the loadings are not a finite matrix.

    Notes
    -----
    The criterion is convex in the rotation, so the orthogonal matrix closest to its gradient never
    lowers it.
    """
    loadings = np.asarray(loadings, dtype=float)
    if loadings.ndim != 2 or not np.isfinite(loadings).all():
        raise ValueError(
            f"loadings have shape {loadings.shape}; expected a matrix of finite numbers"
        )
    rotation, last = np.eye(loadings.shape[1]), -1.0
    for _ in range(max_steps):
        rotated = loadings @ rotation
        criterion = (rotated**4).sum()
        if criterion - last <= tolerance * criterion:
            break
        left, _, right = np.linalg.svd(loadings.T @ rotated**3)
        rotation, last = left @ right, criterion
    return loadings @ rotation, rotation


def whiten(
    codes: Real[Any, "cell latent"], condition: Int[Any, " cell"]
) -> Float[np.ndarray, "cell latent"]:
    """Give codes of any origin the scale of a prior: within conditions, the identity covariance.

    Parameters
    ----------
    codes : array, (n_cells, n_latent)
    condition : array of int, (n_cells,)

    Returns
    -------
    array, (n_cells, n_latent)
        A linear map of the codes, known up to a rotation.

    Raises
    ------
    ValueError
        If ``condition`` does not have one entry per cell or holds a single label, or some
        combination of the codes does not vary within conditions.
    """
    codes = np.asarray(codes, dtype=float)
    labels, group = _checked_condition(condition, len(codes))
    means = np.stack([codes[group == label].mean(0) for label in range(len(labels))])
    within = np.atleast_2d(np.cov(codes - means[group], rowvar=False))
    if (rank := np.linalg.matrix_rank(within)) < len(within):
        raise ValueError(
            f"within conditions {len(within)} codes vary in {rank} directions; expected as many, "
            "so drop constant codes and those that repeat others"
        )
    return codes @ np.linalg.inv(np.linalg.cholesky(within)).T


def regression(
    counts: Real[Any, "cell gene"],
    true: Real[Any, "cell latent"],
    *,
    folds: int = 5,
    seed: int = 0,
) -> Float[np.ndarray, "cell latent"]:
    """Predict true latents from log counts by a line: what a linear map does, truth in hand.

    Parameters
    ----------
    counts : array, (n_cells, n_genes)
        UMIs.
    true : array, (n_cells, n_latent)
    folds : int
        Every cell is predicted by a fit without its fold.
    seed : int
        Assigns cells to folds.

    Returns
    -------
    array, (n_cells, n_latent)
        In the units of ``true``.

    Raises
    ------
    ValueError
        If the counts are not a finite non-negative matrix, or as `metrics.out_of_fold`.
    """
    return metrics.out_of_fold(true, _log_counts(counts), folds=folds, seed=seed)


def shuffle_labels(condition: Int[Any, " cell"], *, seed: int) -> Int[np.ndarray, " cell"]:
    """Deal the labels anew over the cells, as many of each condition as before.

    Parameters
    ----------
    condition : array of int, (n_cells,)
    seed : int

    Returns
    -------
    array of int, (n_cells,)

    Raises
    ------
    ValueError
        If there are fewer than two conditions: nothing would be shuffled.
    """
    condition = np.asarray(condition)
    _checked_condition(condition, condition.size)
    return np.random.default_rng(seed).permutation(condition)


def _log_counts(counts: object) -> Float[np.ndarray, "cell gene"]:
    array = np.asarray(counts, dtype=float)
    if array.ndim != 2 or array.size == 0:
        raise ValueError(
            f"counts have shape {array.shape}; expected (cells, genes), both at least 1"
        )
    wrong = ~((array >= 0) & np.isfinite(array))
    if wrong.any():
        cell, gene = np.argwhere(wrong)[0]
        raise ValueError(
            f"counts are {array[cell, gene]} for cell {cell}, gene {gene}; expected finite, "
            "non-negative numbers (pass raw counts: the logarithm is taken here)"
        )
    return np.log1p(array)


def _checked_condition(
    condition: object, n_cells: int
) -> tuple[Int[np.ndarray, " condition"], Int[np.ndarray, " cell"]]:
    """Return the labels in use, and the place of each cell's label among them."""
    condition = np.asarray(condition)
    if condition.shape != (n_cells,):
        raise ValueError(
            f"condition has shape {condition.shape}; expected ({n_cells},), one per cell"
        )
    labels, group = np.unique(condition, return_inverse=True)
    if len(labels) < 2:
        raise ValueError(
            f"condition holds {len(labels)} label(s); expected at least 2 to tell apart"
        )
    return labels, group


def _check_width(n_latent: int, limit: int, meaning: str) -> None:
    if not 1 <= n_latent <= limit:
        raise ValueError(f"n_latent={n_latent}; expected 1 to {limit} ({meaning})")
