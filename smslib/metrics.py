"""How well latents and graphs are recovered: arrays in, numbers out.

Every score takes ``(true, estimated, *, options)`` and needs no model. Latents are identified up
to permutation, sign and scale, so scores first match each true latent with an estimated one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int, Real

__all__ = [
    "Matching",
    "correlations",
    "graph_scores",
    "linear_r2",
    "match_latents",
    "mcc",
    "top_k_graph",
    "within_condition_mcc",
]

Method = Literal["pearson", "spearman"]


@dataclass(frozen=True, eq=False)
class Matching:
    """A one-to-one assignment of estimated to true latents.

    Parameters
    ----------
    rows : array, (n_matched,)
        True latents, increasing.
    cols : array, (n_matched,)
        The estimated latent of each.
    correlation : array, (n_matched,)
        Signed correlation of each pair.
    shape : tuple of int
        Numbers of true and of estimated latents.
    method : {"pearson", "spearman"}
    signed : bool
        Whether the sum of signed correlations was maximised (the released code's rule) rather than
        the sum of their absolute values.
    """

    rows: Int[np.ndarray, " matched"]
    cols: Int[np.ndarray, " matched"]
    correlation: Float[np.ndarray, " matched"]
    shape: tuple[int, int]
    method: Method
    signed: bool


def correlations(
    true: Real[Any, "cell latent"],
    estimated: Real[Any, "cell code"],
    *,
    method: Method = "pearson",
) -> Float[np.ndarray, "latent code"]:
    """Correlate every true latent with every estimated latent.

    Parameters
    ----------
    true : array, (n_cells, n_latent)
    estimated : array, (n_cells, n_code)
    method : {"pearson", "spearman"}

    Returns
    -------
    array, (n_latent, n_code)
        Signed correlations; 0 where either latent is constant (never NaN).

    Raises
    ------
    ValueError
        If the arrays are not finite matrices with one row per cell, or the method is unknown.
    """
    true, estimated = _checked_pair(true, estimated)
    if method not in ("pearson", "spearman"):
        raise ValueError(f"method is {method!r}; expected 'pearson' or 'spearman'")
    if method == "spearman":
        from scipy.stats import rankdata

        true, estimated = rankdata(true, axis=0), rankdata(estimated, axis=0)
    return np.clip(_standardised(true).T @ _standardised(estimated), -1.0, 1.0)


def match_latents(
    true: Real[Any, "cell latent"],
    estimated: Real[Any, "cell code"],
    *,
    method: Method = "pearson",
    signed: bool = False,
) -> Matching:
    """Assign estimated to true latents, one to one, so that the summed |correlation| is largest.

    Parameters
    ----------
    true : array, (n_cells, n_latent)
    estimated : array, (n_cells, n_code)
        The widths may differ; the extra latents stay unmatched.
    method : {"pearson", "spearman"}
    signed : bool
        True maximises the sum of *signed* correlations, as the released code does before it scores
        graphs. The sign of a latent is not identified, so a perfect model with half of its axes
        flipped is then mismatched.

    Returns
    -------
    Matching

    Raises
    ------
    ValueError
        As `correlations`.
    """
    from scipy.optimize import linear_sum_assignment

    table = correlations(true, estimated, method=method)
    rows, cols = linear_sum_assignment(table if signed else np.abs(table), maximize=True)
    return Matching(rows, cols, table[rows, cols], table.shape, method, signed)


def mcc(
    true: Real[Any, "cell latent"],
    estimated: Real[Any, "cell code"],
    *,
    method: Method = "pearson",
) -> float:
    """Average |correlation| of the matched latents (mean correlation coefficient).

    Parameters
    ----------
    true : array, (n_cells, n_latent)
    estimated : array, (n_cells, n_code)
    method : {"pearson", "spearman"}

    Returns
    -------
    float
        In [0, 1]; invariant to the order, sign, scale and offset of the latents. Averages over the
        *true* latents: one without a partner counts as 0. A constant latent correlates 0 with
        everything (NaN in the released code).

    Raises
    ------
    ValueError
        As `correlations`.
    """
    matching = match_latents(true, estimated, method=method)
    return float(np.abs(matching.correlation).sum() / matching.shape[0])


def within_condition_mcc(
    true: Real[Any, "cell latent"],
    estimated: Real[Any, "cell code"],
    condition: Int[Any, " cell"],
    *,
    method: Method = "pearson",
) -> float:
    """Compute the MCC after removing each condition's mean.

    The pooled MCC mixes two abilities: to recover the shift of a condition, and to tell its cells
    apart. This is the second alone. The latents are matched anew, on the residuals.

    Parameters
    ----------
    true : array, (n_cells, n_latent)
    estimated : array, (n_cells, n_code)
    condition : array of int, (n_cells,)
    method : {"pearson", "spearman"}

    Returns
    -------
    float
        In [0, 1].

    Raises
    ------
    ValueError
        As `correlations`, or if ``condition`` does not have one entry per cell.
    """
    true, estimated = _checked_pair(true, estimated)
    condition = np.asarray(condition)
    if condition.shape != true.shape[:1]:
        raise ValueError(
            f"condition has shape {condition.shape}; expected {true.shape[:1]}, one per cell"
        )
    return mcc(_residual(true, condition), _residual(estimated, condition), method=method)


def linear_r2(
    true: Real[Any, "cell latent"],
    estimated: Real[Any, "cell code"],
    *,
    folds: int | None = None,
    seed: int = 0,
) -> float:
    """Explain the true latents by a linear map of the estimated ones; return the mean R².

    Parameters
    ----------
    true : array, (n_cells, n_latent)
    estimated : array, (n_cells, n_code)
    folds : int, optional
        None fits and scores on the same cells, as published. A number predicts every cell from a
        fit without its fold.
    seed : int
        Assigns cells to folds.

    Returns
    -------
    float
        Unweighted mean over true latents; a constant true latent counts as 0. At most 1; in-sample
        it is at least 0.

    Raises
    ------
    ValueError
        As `correlations`, or if ``folds`` is not between 2 and the number of cells.
    """
    true, estimated = _checked_pair(true, estimated)
    n_cells = len(true)
    if folds is not None and not 2 <= folds <= n_cells:
        raise ValueError(
            f"folds={folds}; expected None (in-sample) or a number from 2 to {n_cells} (cells)"
        )
    if folds is None:
        return _r2(true, _predict(estimated, true, estimated))
    predicted = np.empty_like(true)
    for held in np.array_split(np.random.default_rng(seed).permutation(n_cells), folds):
        rest = np.delete(np.arange(n_cells), held)
        predicted[held] = _predict(estimated[rest], true[rest], estimated[held])
    return _r2(true, predicted)


def graph_scores(
    true: Real[Any, "target latent"] | Bool[Any, "target latent"],
    estimated: Real[Any, "target code"] | Bool[Any, "target code"],
    matching: Matching,
    *,
    threshold: float = 0.5,
    as_released: bool = False,
) -> dict[str, float]:
    """Score the edges of an estimated mechanism graph, over the rows given.

    Pass the rows of trained targets only: rows that were never trained have no estimate to score.

    Parameters
    ----------
    true : array, (n_targets, n_latent)
        Non-zero where the target moves the latent.
    estimated : array, (n_targets, n_code)
        Edge probabilities, or a boolean graph (`top_k_graph`).
    matching : Matching
        From `match_latents` on the latents of the same model. Edges of an estimated latent without
        partner count as false, those of a true latent without partner as missed.
    threshold : float
        An edge is declared where ``estimated > threshold``.
    as_released : bool
        True insists on what the released code scores: a matching by signed correlation and equally
        many true and estimated latents. (It also scored the rows of held-out targets: pass them.)

    Returns
    -------
    dict
        ``precision``, ``recall``, ``f1``, ``average_precision`` in [0, 1] (0 where undefined),
        ``shd`` (structural Hamming distance: false plus missed edges) and ``n_edges`` (declared).

    Raises
    ------
    ValueError
        If a graph does not fit the matching or the other graph, holds NaN, or ``as_released`` is
        asked of a matching that the released code would not have made.
    """
    true, estimated = _checked_graphs(true, estimated, matching, as_released)
    truth, score = _aligned(true, estimated, matching)
    declared = score > threshold
    hits = int((declared & truth).sum())
    n_edges, n_true = int(declared.sum()), int(truth.sum())
    return {
        "precision": hits / max(n_edges, 1),
        "recall": hits / max(n_true, 1),
        "f1": 2 * hits / max(n_edges + n_true, 1),
        "average_precision": _average_precision(truth.ravel(), score.ravel()),
        "shd": float(n_edges + n_true - 2 * hits),
        "n_edges": float(n_edges),
    }


def top_k_graph(
    shift: Real[Any, "target latent"], k: int = 2
) -> Bool[np.ndarray, "target latent"]:
    """Declare an edge to the ``k`` latents that each target moves most.

    The released code's graph for models without gates (VAE, iVAE), with ``k=2``.

    Parameters
    ----------
    shift : array, (n_targets, n_latent)
        Estimated shifts, prior standard deviations.
    k : int

    Returns
    -------
    array of bool, (n_targets, n_latent)
        Exactly ``k`` edges per row; ties go to the lower index.

    Raises
    ------
    ValueError
        If ``k`` is not between 1 and the number of latents.
    """
    size = np.abs(np.asarray(shift, dtype=float))
    if not 1 <= k <= size.shape[1]:
        raise ValueError(f"k={k}; expected 1 to {size.shape[1]}, the number of latents")
    graph = np.zeros(size.shape, dtype=bool)
    np.put_along_axis(graph, np.argsort(-size, axis=1, kind="stable")[:, :k], True, axis=1)
    return graph


def _checked_pair(true: object, estimated: object) -> tuple[np.ndarray, np.ndarray]:
    """Return both as finite float64 matrices with one row per cell."""
    arrays = []
    for name, given in (("true", true), ("estimated", estimated)):
        array = np.asarray(given, dtype=float)
        if array.ndim != 2 or array.size == 0:
            raise ValueError(
                f"{name} has shape {array.shape}; expected (cells, latents), both at least 1"
            )
        if not np.isfinite(array).all():
            cell, latent = np.argwhere(~np.isfinite(array))[0]
            raise ValueError(
                f"{name} is {array[cell, latent]} for cell {cell}, latent {latent}; expected "
                "finite numbers (did the fit diverge?)"
            )
        arrays.append(array)
    if len(arrays[0]) != len(arrays[1]):
        raise ValueError(
            f"true has {len(arrays[0])} rows and estimated {len(arrays[1])}; expected the same "
            "cells in the same order"
        )
    return arrays[0], arrays[1]


def _standardised(values: Float[np.ndarray, "cell latent"]) -> Float[np.ndarray, "cell latent"]:
    """Centre columns and scale them to unit length; constant columns become exactly zero."""
    constant = np.ptp(values, axis=0) == 0
    largest = np.abs(values).max(0)
    scaled = values / np.where(largest == 0, 1.0, largest)  # squares of huge values overflow
    centred = scaled - scaled.mean(0)
    length = np.where(constant, 1.0, np.linalg.norm(centred, axis=0))
    return np.where(constant, 0.0, centred / length)


def _residual(
    values: Float[np.ndarray, "cell latent"], condition: Int[np.ndarray, " cell"]
) -> Float[np.ndarray, "cell latent"]:
    """Subtract the condition means; what rounding leaves of a constant becomes exactly zero."""
    _, group = np.unique(condition, return_inverse=True)
    total = np.zeros((group.max() + 1, values.shape[1]))
    np.add.at(total, group, values)
    residual = values - (total / np.bincount(group)[:, None])[group]
    return np.where(np.abs(residual) <= 1e-12 * np.abs(values).max(0), 0.0, residual)


def _predict(
    x: Float[np.ndarray, "cell code"],
    y: Float[np.ndarray, "cell latent"],
    new: Float[np.ndarray, "new code"],
) -> Float[np.ndarray, "new latent"]:
    """Predict by least squares with intercept; of many solutions, the shortest."""
    centre = x.mean(0)
    coefficients = np.linalg.lstsq(x - centre, y - y.mean(0), rcond=None)[0]
    return (new - centre) @ coefficients + y.mean(0)


def _r2(
    true: Float[np.ndarray, "cell latent"], predicted: Float[np.ndarray, "cell latent"]
) -> float:
    constant = np.ptp(true, axis=0) == 0
    total = np.where(constant, 1.0, ((true - true.mean(0)) ** 2).sum(0))
    residual = ((true - predicted) ** 2).sum(0)
    return float(np.where(constant, 0.0, 1.0 - residual / total).mean())


def _checked_graphs(
    true: object,
    estimated: object,
    matching: Matching,
    as_released: bool,
) -> tuple[Bool[np.ndarray, "target latent"], Float[np.ndarray, "target code"]]:
    true, estimated = np.asarray(true), np.asarray(estimated, dtype=float)
    if true.ndim != 2 or estimated.ndim != 2 or len(true) != len(estimated):
        raise ValueError(
            f"true graph has shape {true.shape}, estimated {estimated.shape}; expected two "
            "matrices with one row per target, the same targets in both"
        )
    if (true.shape[1], estimated.shape[1]) != matching.shape:
        raise ValueError(
            f"graphs have {true.shape[1]} true and {estimated.shape[1]} estimated latents, but "
            f"the matching was made for {matching.shape}; match the latents of the same model"
        )
    if np.isnan(estimated).any():
        raise ValueError(
            f"estimated graph holds {int(np.isnan(estimated).sum())} NaN; expected probabilities "
            "(did the fit diverge?)"
        )
    if as_released and not (matching.signed and true.shape == estimated.shape):
        raise ValueError(
            f"as_released=True with a matching of signed={matching.signed}, shape "
            f"{matching.shape}; the released code scores equal widths matched by "
            "match_latents(..., signed=True)"
        )
    return true != 0, estimated


def _aligned(
    true: Bool[np.ndarray, "target latent"],
    estimated: Float[np.ndarray, "target code"],
    matching: Matching,
) -> tuple[Bool[np.ndarray, "target column"], Float[np.ndarray, "target column"]]:
    """Put matched latents side by side; latents without partner face an empty column."""
    n_targets, n_true = true.shape
    spare = np.setdiff1d(np.arange(estimated.shape[1]), matching.cols)
    score = np.zeros((n_targets, n_true))
    score[:, matching.rows] = estimated[:, matching.cols]
    empty = np.zeros((n_targets, len(spare)), dtype=bool)
    return np.hstack([true, empty]), np.hstack([score, estimated[:, spare]])


def _average_precision(
    truth: Bool[np.ndarray, " edge"], score: Float[np.ndarray, " edge"]
) -> float:
    """Sum precision over the steps in recall; tied scores are one step."""
    order = np.argsort(-score, kind="stable")
    last_of_tie = np.append(np.diff(score[order]) != 0, True)
    hits = np.cumsum(truth[order])[last_of_tie]
    declared = np.flatnonzero(last_of_tie) + 1
    return float((np.diff(hits, prepend=0) * hits / declared).sum() / max(truth.sum(), 1))
