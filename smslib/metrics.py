"""How well latents and graphs are recovered: arrays in, numbers out.

Every score takes ``(true, estimated, *, options)`` and needs no model. Latents are identified up
to permutation, sign and scale, so scores first match each true latent with an estimated one.
Agreement between models (`udr`, `pairwise_mcc`) needs no truth and is what a model can be selected
by; `interval` and `paired` say what repeated runs amount to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Real

__all__ = [
    "DCI",
    "Calibration",
    "Interval",
    "Matching",
    "Paired",
    "PairedSigns",
    "aligned_edges",
    "average_precision",
    "calibration",
    "chance_mcc",
    "correlations",
    "cosine",
    "dci",
    "graph_scores",
    "holm",
    "interval",
    "linear_r2",
    "match_latents",
    "mcc",
    "out_of_fold",
    "paired",
    "paired_signs",
    "pairwise_mcc",
    "top_k_graph",
    "udr",
    "within_condition_mcc",
]

Method = Literal["pearson", "spearman"]
NIL = 1e-12  # length of a vector that is nothing but rounding
INFORMATIVE = 0.01  # nats: a latent closer to its prior on average carries nothing


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
    return np.clip(_scaled(true, method).T @ _scaled(estimated, method), -1.0, 1.0)


def cosine(first: Real[Any, " item"], second: Real[Any, " item"]) -> float:
    """Return the cosine of two vectors, 0 if one of them is nil.

    Parameters
    ----------
    first, second : array, (n_items,)
    """
    lengths = np.linalg.norm(first), np.linalg.norm(second)
    if min(lengths) <= NIL:
        return 0.0
    return float(np.dot(first, second) / lengths[0] / lengths[1])


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
        As `correlations` and `out_of_fold`.
    """
    true, estimated = _checked_pair(true, estimated)
    if folds is None:
        return _r2(true, _predict(estimated, true, estimated))
    return _r2(true, out_of_fold(true, estimated, folds=folds, seed=seed))


def out_of_fold(
    true: Real[Any, "cell latent"],
    estimated: Real[Any, "cell code"],
    *,
    folds: int = 5,
    seed: int = 0,
) -> Float[np.ndarray, "cell latent"]:
    """Predict every cell's true latents by a linear map fitted without the cell's fold.

    Parameters
    ----------
    true : array, (n_cells, n_latent)
    estimated : array, (n_cells, n_code)
        Any regressors: estimated latents, or log counts.
    folds : int
    seed : int
        Assigns cells to folds.

    Returns
    -------
    array, (n_cells, n_latent)
        In the units of ``true``. Least squares with intercept; of many solutions, the shortest.

    Raises
    ------
    ValueError
        As `correlations`, or if ``folds`` is not between 2 and the number of cells.
    """
    true, estimated = _checked_pair(true, estimated)
    n_cells = len(true)
    if not 2 <= folds <= n_cells:
        raise ValueError(f"folds={folds}; expected a number from 2 to {n_cells} (cells)")
    predicted = np.empty_like(true)
    for held in np.array_split(np.random.default_rng(seed).permutation(n_cells), folds):
        rest = np.delete(np.arange(n_cells), held)
        predicted[held] = _predict(estimated[rest], true[rest], estimated[held])
    return predicted


class DCI(NamedTuple):
    """Disentanglement, completeness and informativeness, each at most 1 (see `dci`)."""

    disentanglement: float
    completeness: float
    informativeness: float


def dci(
    true: Real[Any, "cell latent"], estimated: Real[Any, "cell code"], *, alpha: float = 0.01
) -> DCI:
    """Ask how few true latents a code holds, and how few codes a true latent needs.

    A lasso predicts each true latent from all estimated ones, both standardised. The absolute
    coefficients are importances: a row per code, a column per true latent.

    Parameters
    ----------
    true : array, (n_cells, n_latent)
    estimated : array, (n_cells, n_code)
    alpha : float
        Penalty of the lasso, in correlations: a code that correlates less with a latent is left
        out of its prediction.

    Returns
    -------
    DCI
        ``disentanglement``: mean over codes, weighted by their total importance, of one minus the
        entropy of the row (base: the number of true latents). ``completeness``: likewise over
        columns. Both in [0, 1] and 0 if nothing is predicted. ``informativeness``: R² of the
        lasso, in-sample, mean over true latents. All are invariant to the order, sign, scale and
        offset of the latents. The first two mean little where the third is small: chance decides
        which coefficients survive the penalty.

    Raises
    ------
    ValueError
        As `correlations`, or if ``alpha`` is not positive.

    Notes
    -----
    Eastwood and Williams, ICLR 2018, section 2. They average completeness over the true latents
    without weights, and measure informativeness by prediction error.
    """
    from sklearn.linear_model import Lasso

    true, estimated = _checked_pair(true, estimated)
    if not alpha > 0:
        raise ValueError(f"alpha={alpha}; expected a positive penalty, for example 0.01")
    factors, codes = (_standardised(z) * np.sqrt(len(z)) for z in (true, estimated))
    lasso = Lasso(alpha, fit_intercept=False, precompute=True, tol=1e-6, max_iter=100_000)
    weights = lasso.fit(codes, factors).coef_.reshape(factors.shape[1], -1).T
    importance = np.abs(weights)
    informativeness = _r2(factors, codes @ weights)
    return DCI(_concentration(importance), _concentration(importance.T), informativeness)


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
    if as_released and not (matching.signed and matching.shape[0] == matching.shape[1]):
        raise ValueError(
            f"as_released=True with a matching of signed={matching.signed}, shape "
            f"{matching.shape}; the released code scores equal widths matched by "
            "match_latents(..., signed=True)"
        )
    truth, score = aligned_edges(true, estimated, matching)
    declared = score > threshold
    hits = int((declared & truth).sum())
    n_edges, n_true = int(declared.sum()), int(truth.sum())
    return {
        "precision": hits / max(n_edges, 1),
        "recall": hits / max(n_true, 1),
        "f1": 2 * hits / max(n_edges + n_true, 1),
        "average_precision": _average_precision(truth, score),
        "shd": float(n_edges + n_true - 2 * hits),
        "n_edges": float(n_edges),
    }


def aligned_edges(
    true: Real[Any, "target latent"] | Bool[Any, "target latent"],
    estimated: Real[Any, "target code"] | Bool[Any, "target code"],
    matching: Matching,
) -> tuple[Bool[np.ndarray, " edge"], Float[np.ndarray, " edge"]]:
    """Pair every possible edge of the true graph with its estimated probability.

    Parameters
    ----------
    true : array, (n_targets, n_latent)
        Non-zero where the target moves the latent.
    estimated : array, (n_targets, n_code)
        Edge probabilities, or a boolean graph.
    matching : Matching
        From `match_latents` on the latents of the same model.

    Returns
    -------
    truth : array of bool, (n_edges,)
    probability : array, (n_edges,)
        Row by row. A true latent without partner is estimated at 0; an estimated latent without
        partner adds edges that are false.

    Raises
    ------
    ValueError
        If a graph does not fit the matching or the other graph, or holds NaN.
    """
    true, estimated = _checked_graphs(true, estimated, matching)
    truth, score = _aligned(true, estimated, matching)
    return truth.ravel(), score.ravel()


class Calibration(NamedTuple):
    """Errors of probabilities, and the bins behind the first (see `calibration`)."""

    error: float
    brier: float
    mean: Float[np.ndarray, " bin"]
    observed: Float[np.ndarray, " bin"]
    count: Int[np.ndarray, " bin"]


def calibration(
    truth: Bool[Any, " edge"] | Real[Any, " edge"],
    probabilities: Real[Any, " edge"],
    *,
    n_bins: int = 10,
) -> Calibration:
    """Compare edge probabilities with how often the edges are there.

    Parameters
    ----------
    truth : array, (n_edges,)
        1, or True, where the edge is there, else 0.
    probabilities : array, (n_edges,)
        In [0, 1]; both from `aligned_edges`.
    n_bins : int
        Bins of equal width; a probability on an inner border belongs to the lower bin.

    Returns
    -------
    Calibration
        ``error``: expected calibration error, the mean over edges of the distance between
        ``mean`` (probability) and ``observed`` (frequency of true edges) of the edge's bin.
        ``brier``: mean squared error of the probabilities. Of an empty bin (``count`` 0) ``mean``
        and ``observed`` are NaN.

    Raises
    ------
    ValueError
        If the arrays are not flat and of equal length, ``truth`` holds anything but 0 and 1, a
        probability leaves [0, 1], or ``n_bins`` is not positive.

    Notes
    -----
    Expected calibration error: Naeini, Cooper and Hauskrecht, AAAI 2015.
    """
    truth, probabilities = _checked_probabilities(truth, probabilities)
    if n_bins < 1:
        raise ValueError(f"n_bins={n_bins}; expected at least 1")
    borders = np.linspace(0.0, 1.0, n_bins + 1)[1:-1]
    place = np.searchsorted(borders, probabilities)
    count = np.bincount(place, minlength=n_bins)
    size = np.where(count == 0, np.nan, count)
    mean = np.bincount(place, probabilities, minlength=n_bins) / size
    observed = np.bincount(place, truth, minlength=n_bins) / size
    error = np.nansum(count * np.abs(mean - observed)) / len(truth)
    brier = np.square(probabilities - truth).mean()
    return Calibration(float(error), float(brier), mean, observed, count)


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


def udr(
    codes: Sequence[Real[Any, "cell _code"]],
    *,
    kl: Sequence[Real[Any, " _code"]] | None = None,
    method: Method = "spearman",
) -> Float[np.ndarray, " model"]:
    """Rank models without truth: those that agree with their sister runs are disentangled.

    Unsupervised disentanglement ranking. Of two models, R holds the |rank correlation| of every
    latent of one with every latent of the other. A latent agrees as far as it has one partner
    only: its largest R, squared, over the sum of its R. The score of the pair is the mean over
    the latents of both.

    Parameters
    ----------
    codes : sequence of arrays, (n_cells, n_latent)
        Latents of the same cells under models that differ in their seed; widths may differ.
    kl : sequence of arrays, (n_latent,), optional
        Mean divergence of each latent from its prior, nats. Latents of at most 0.01 nats are
        left out. Without it, constant latents are.
    method : {"pearson", "spearman"}

    Returns
    -------
    array, (n_models,)
        In [0, 1], larger is better: the median over the other models. 1 takes a relabelling
        between all runs and uncorrelated latents; a pair without informative latents scores 0.

    Raises
    ------
    ValueError
        If there are fewer than two models, their cells differ, or ``kl`` does not fit.

    Notes
    -----
    Duan et al., ICLR 2020: every informative latent of a pair has the same weight. The
    implementation in disentanglement_lib gives the two models the same weight, which differs where
    their numbers of informative latents do.
    """
    codes = [_scaled(code, method) for code in _checked_codes(codes)]
    masks = [code.any(0) for code in codes] if kl is None else _informative(codes, kl)
    alive = [code[:, mask] for code, mask in zip(codes, masks, strict=True)]
    return _partner_median(_pairwise(alive, _relative_strength))


def pairwise_mcc(
    codes: Sequence[Real[Any, "cell _code"]], *, method: Method = "pearson"
) -> Float[np.ndarray, "model model"]:
    """Compute the MCC of every model's latents with every other's.

    The code of Lachapelle et al. (CLeaR 2022) selects the setting with the largest median over
    all pairs of its seeds, that is over the entries off the diagonal, and calls this UDR too.

    Parameters
    ----------
    codes : sequence of arrays, (n_cells, n_latent)
        Latents of the same cells under each model; widths may differ.
    method : {"pearson", "spearman"}

    Returns
    -------
    array, (n_models, n_models)
        Entry (i, j) is ``mcc(codes[i], codes[j])``.

    Raises
    ------
    ValueError
        If there are fewer than two models, or their cells differ.
    """
    codes = [_scaled(code, method) for code in _checked_codes(codes)]
    return _pairwise(codes, _mean_matched)


def chance_mcc(
    n_latent: int, *, n_draws: int = 10_000, seed: int = 0
) -> Float[np.ndarray, " draw"]:
    """Compute the MCC of independent latents with random rotations of them.

    Their correlations are the entries of the rotation. A method that finds the space of the
    latents and not their axes scores as if it had drawn one of these: .90 on average at two
    latents, and still about one half at twenty.

    Parameters
    ----------
    n_latent : int
    n_draws : int
        Number of rotations, uniform over all of them.
    seed : int

    Returns
    -------
    array, (n_draws,)

    Raises
    ------
    ValueError
        If there is no latent, or no draw is asked for.
    """
    if min(n_latent, n_draws) < 1:
        raise ValueError(
            f"n_latent is {n_latent} and n_draws {n_draws}; expected at least one of each"
        )
    normal = np.random.default_rng(seed).normal(size=(n_draws, n_latent, n_latent))
    return np.array([_mean_matched(turn) for turn in np.abs(np.linalg.qr(normal)[0])])


class Interval(NamedTuple):
    """A mean over seeds, its confidence interval, and the number of seeds."""

    mean: float
    low: float
    high: float
    n: int


class Paired(NamedTuple):
    """An `Interval` of differences, with the two-sided p-value of no difference."""

    mean: float
    low: float
    high: float
    n: int
    p_value: float


def interval(values: Sequence[float] | Real[Any, " seed"], *, level: float = 0.95) -> Interval:
    """Give the mean over seeds with its t interval.

    Parameters
    ----------
    values : array, (n_seeds,)
    level : float
        Coverage, between 0 and 1.

    Returns
    -------
    Interval
        In the units of ``values``. One seed has no spread: its bounds are NaN.

    Raises
    ------
    ValueError
        If the values are empty, not flat or not finite, or the level is not between 0 and 1.
    """
    from scipy.stats import t

    values = _checked_values("values", values)
    if not 0 < level < 1:
        raise ValueError(f"level={level}; expected a coverage between 0 and 1, for example 0.95")
    mean, n = float(values.mean()), len(values)
    half = float(t.ppf((1 + level) / 2, n - 1)) * _standard_error(values)
    return Interval(mean, mean - half, mean + half, n)


def paired(
    a: Sequence[float] | Real[Any, " seed"],
    b: Sequence[float] | Real[Any, " seed"],
    *,
    level: float = 0.95,
) -> Paired:
    """Compare two methods seed by seed: the interval of ``a - b``, and a t-test of no difference.

    Parameters
    ----------
    a, b : array, (n_seeds,)
        Scores of two methods on the same data, in the same order of seeds.
    level : float
        Coverage, between 0 and 1.

    Returns
    -------
    Paired
        ``p_value`` is two-sided; NaN for one pair, and 1 or 0 where all differences are equal,
        to zero or to another number.

    Raises
    ------
    ValueError
        As `interval`, or if the two have different lengths.
    """
    from scipy.stats import t

    a, b = _checked_values("a", a), _checked_values("b", b)
    if len(a) != len(b):
        raise ValueError(
            f"a has {len(a)} values and b {len(b)}; expected the same seeds in the same order"
        )
    centre, error = interval(a - b, level=level), _standard_error(a - b)
    if error == 0:
        return Paired(*centre, float(centre.mean == 0))
    return Paired(*centre, float(2 * t.sf(abs(centre.mean) / error, centre.n - 1)))


def _checked_matrix(name: str, given: object) -> Float[np.ndarray, "cell latent"]:
    """Return a finite float64 matrix with one row per cell."""
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
    return array


def _checked_pair(true: object, estimated: object) -> tuple[np.ndarray, np.ndarray]:
    """Return both as matrices of the same cells."""
    true, estimated = _checked_matrix("true", true), _checked_matrix("estimated", estimated)
    if len(true) != len(estimated):
        raise ValueError(
            f"true has {len(true)} rows and estimated {len(estimated)}; expected the same "
            "cells in the same order"
        )
    return true, estimated


def _checked_codes(codes: Sequence[object]) -> list[np.ndarray]:
    """Return matrices of the same cells, at least two."""
    codes = [_checked_matrix(f"codes[{model}]", code) for model, code in enumerate(codes)]
    if len(codes) < 2:
        raise ValueError(f"codes holds {len(codes)} models; expected at least 2 to compare")
    if len({len(code) for code in codes}) > 1:
        raise ValueError(
            f"codes have {[len(code) for code in codes]} rows; expected the same cells in the "
            "same order for every model"
        )
    return codes


def _checked_values(name: str, given: object) -> Float[np.ndarray, " seed"]:
    values = np.asarray(given, dtype=float)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"{name} has shape {values.shape}; expected one number per seed")
    if not np.isfinite(values).all():
        raise ValueError(
            f"{name} is {values.tolist()}; expected finite numbers (leave failed runs out)"
        )
    return values


def _checked_probabilities(
    truth: object, probabilities: object
) -> tuple[Bool[np.ndarray, " edge"], Float[np.ndarray, " edge"]]:
    truth, probabilities = np.asarray(truth), np.asarray(probabilities, dtype=float)
    if probabilities.ndim != 1 or truth.shape != probabilities.shape or not truth.size:
        raise ValueError(
            f"truth has shape {truth.shape}, probabilities {probabilities.shape}; expected two "
            "flat arrays of the same edges, as aligned_edges returns"
        )
    neither = (truth != 0) & (truth != 1)
    if neither.any():
        raise ValueError(
            f"truth holds {truth[neither][0]}; expected 0 and 1 (or booleans), and the "
            "probabilities after it"
        )
    outside = ~((probabilities >= 0) & (probabilities <= 1))
    if outside.any():
        raise ValueError(
            f"probabilities hold {probabilities[outside][0]}; expected numbers from 0 to 1 (are "
            "these logits or shifts?)"
        )
    return truth != 0, probabilities


def _informative(
    codes: Sequence[Float[np.ndarray, "cell _code"]], kl: Sequence[object]
) -> list[Bool[np.ndarray, " _code"]]:
    """Tell the latents that depart from their prior."""
    kl = [np.asarray(nats, dtype=float) for nats in kl]
    shapes, expected = [nats.shape for nats in kl], [code.shape[1:] for code in codes]
    if shapes != expected:
        raise ValueError(f"kl has shapes {shapes}; expected {expected}, one per latent and model")
    if any(np.isnan(nats).any() for nats in kl):
        raise ValueError("kl holds NaN; expected mean divergences in nats (did a fit diverge?)")
    return [nats > INFORMATIVE for nats in kl]


def _scaled(
    values: Float[np.ndarray, "cell latent"], method: str
) -> Float[np.ndarray, "cell latent"]:
    """Standardise the values or their ranks, so that products of columns are correlations."""
    if method not in ("pearson", "spearman"):
        raise ValueError(f"method is {method!r}; expected 'pearson' or 'spearman'")
    if method == "spearman":
        from scipy.stats import rankdata

        values = rankdata(values, axis=0)
    return _standardised(values)


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


def _concentration(importance: Float[np.ndarray, "row column"]) -> float:
    """Average one minus the normalised entropy of the rows, weighted by their sums."""
    from scipy.special import entr

    weight = importance.sum(1)
    if not weight.any():
        return 0.0
    share = importance / np.where(weight == 0, 1.0, weight)[:, None]
    # In a single column there is no choice to be uncertain about: the entropy is zero.
    entropy = entr(share).sum(1) / np.log(max(importance.shape[1], 2))
    return float((weight * (1 - entropy)).sum() / weight.sum())


def _pairwise(
    codes: Sequence[Float[np.ndarray, "cell _code"]],
    compare: Callable[[Float[np.ndarray, "code other"]], float],
) -> Float[np.ndarray, "model model"]:
    """Score the |correlations| of every model with every model."""
    tables = [[np.minimum(np.abs(a.T @ b), 1.0) for b in codes] for a in codes]
    return np.array([[compare(table) for table in row] for row in tables])


def _partner_median(agreement: Float[np.ndarray, "model model"]) -> Float[np.ndarray, " model"]:
    """Take the median over the others; what a model has with itself is left out."""
    n_models = len(agreement)
    others = agreement[~np.eye(n_models, dtype=bool)].reshape(n_models, n_models - 1)
    return np.median(others, axis=1)


def _relative_strength(table: Float[np.ndarray, "code other"]) -> float:
    """Average max² / sum over the rows and the columns, each with equal weight."""
    if not table.size:
        return 0.0
    total = [np.where((sums := table.sum(axis)) == 0, 1.0, sums) for axis in (0, 1)]
    strength = [table.max(axis) ** 2 / total[axis] for axis in (0, 1)]
    return float(np.concatenate(strength).mean())


def _mean_matched(table: Float[np.ndarray, "code other"]) -> float:
    from scipy.optimize import linear_sum_assignment

    return float(table[linear_sum_assignment(table, maximize=True)].sum() / len(table))


def _standard_error(values: Float[np.ndarray, " seed"]) -> float:
    """Of the mean; exactly zero for equal values, NaN for a single one."""
    if len(values) == 1:
        return float("nan")
    return 0.0 if np.ptp(values) == 0 else float(values.std(ddof=1) / np.sqrt(len(values)))


def _checked_graphs(
    true: object, estimated: object, matching: Matching
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


class PairedSigns(NamedTuple):
    """An `Interval` of differences, with two p-values that assume no normal distribution."""

    mean: float
    low: float
    high: float
    n: int
    p_sign_flip: float
    p_wilcoxon: float


def paired_signs(
    a: Sequence[float] | Real[Any, " unit"],
    b: Sequence[float] | Real[Any, " unit"],
    *,
    level: float = 0.95,
    n_flips: int = 9999,
    seed: int = 0,
) -> PairedSigns:
    """Compare two methods pair by pair, without assuming normal differences.

    Parameters
    ----------
    a, b : array, (n_units,)
        Scores of two methods on the same units (perturbations, seeds), in the same order.
    level : float
        Coverage of the t interval of the mean difference, between 0 and 1.
    n_flips : int
        Random flips of signs, where there are more patterns of signs than these; otherwise all
        patterns are visited and the p-value is exact.
    seed : int
        Of the flips.

    Returns
    -------
    PairedSigns
        Of ``a - b``. The p-values are two-sided: of the mean under random signs, and of
        Wilcoxon's signed ranks. n units cannot reach below ``2 / 2**n``.

    Raises
    ------
    ValueError
        As `paired`.
    """
    from scipy.stats import permutation_test, wilcoxon

    result = paired(a, b, level=level)
    differences = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    if result.n == 1 or not differences.any():
        return PairedSigns(*result[:4], 1.0, 1.0)
    flipped = permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=n_flips,
        rng=np.random.default_rng(seed),
    )
    ranked = wilcoxon(differences, zero_method="pratt")
    return PairedSigns(*result[:4], float(flipped.pvalue), float(ranked.pvalue))


def holm(p_values: Sequence[float] | Real[Any, " test"]) -> Float[np.ndarray, " test"]:
    """Correct p-values for the number of tests (Holm 1979): the chance of any false finding.

    Parameters
    ----------
    p_values : array, (n_tests,)

    Returns
    -------
    array, (n_tests,)
        In the order given; to be compared with the level that all tests share.

    Raises
    ------
    ValueError
        If a value is not between 0 and 1.
    """
    p = np.asarray(p_values, dtype=float)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p_values are {p.tolist()}; expected numbers from 0 to 1, one per test")
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order])
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(stepped, 1.0)
    return corrected


def average_precision(truth: Bool[Any, " item"], score: Real[Any, " item"]) -> float:
    """Return how well a score ranks the true items first; tied scores count as one step.

    Parameters
    ----------
    truth : array of bool, (n_items,)
    score : array, (n_items,)

    Returns
    -------
    float
        Mean precision at the ranks of the true items. 1 if they come first; the share of true
        items is what a constant score gets.

    Raises
    ------
    ValueError
        If the shapes differ, no item is true, or a score is not finite.
    """
    truth, score = np.asarray(truth, dtype=bool), np.asarray(score, dtype=float)
    if truth.ndim != 1 or truth.shape != score.shape or not truth.any():
        raise ValueError(
            f"truth has shape {truth.shape} with {int(truth.sum())} true, score has shape "
            f"{score.shape}; expected one score per item, and at least one true item"
        )
    if not np.isfinite(score).all():
        raise ValueError(
            f"score holds {score[~np.isfinite(score)][0]}; expected finite numbers (did the fit "
            "diverge?)"
        )
    return _average_precision(truth, score)
