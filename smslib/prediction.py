"""Prediction of perturbed expression, always beside the baselines that shame many deep models.

What a perturbation does to the mean expression of the genes, by a model and by the data, on one
scale: the difference from control of log1p(mean normalised UMIs). The mean is taken before the
logarithm, so that a model's expectation and an average of cells estimate the same number, however
few UMIs the cells have. (The mean over cells of log1p(normalised UMIs) depends on their depth.)

``python -m smslib.prediction`` runs what is missing of the study on the small real screens.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from torch import Tensor

from smslib import metrics, perturbseq, screens, store, sweep
from smslib.data import (
    Cells,
    Design,
    from_anndata,
    no_count,
    split_cells,
    why_not_counts,
)
from smslib.model import SMSVAE
from smslib.names import nearest_known
from smslib.priors import METHODS
from smslib.sweep import Config

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "BASELINES",
    "STUDY",
    "Effects",
    "Known",
    "additive",
    "additive_shrunk",
    "effects",
    "embed",
    "evaluate",
    "nearest",
    "no_effect",
    "predict",
    "predicted_effects",
    "ridge",
    "score",
    "summarise",
    "training_mean",
]

_N_TOP = 20  # genes with the largest observed effect
_N_COMPONENTS = 10  # of the gene embedding
_PENALTY = 0.1  # of the ridge
_N_FOLDS = 5  # of the held-out targets
_SHARES = (0.5, 0.25, 0.25)  # of the cells: to learn from, and two halves to score on
_SHIFT_FREE = ("vae", "beta-vae")  # whatever their weights, they predict the control
_OTHER_HALF = "other-half"
_REFERENCES = ("training-mean", "additive", "additive-shrunk")
_AGREEMENT = ("pearson", "cosine")
_SCORES = tuple(
    name + suffix for suffix in ("", "_top") for name in ("pearson", "cosine", "r2", "rmse_ratio")
)
_COMPARED = ("pearson", "rmse_ratio", "pearson_top", "rmse_ratio_top")  # with other methods


class Effects(NamedTuple):
    """Average treatment effects: log1p(mean normalised UMIs) minus the control's."""

    value: Float[np.ndarray, "condition gene"]
    """Natural-log units."""
    standard_error: Float[np.ndarray, "condition gene"]
    """Of the cells (data) or of the Monte-Carlo draws (model), by the delta method."""


# ------------------------------------------------------------------------- what a model predicts


def predict(
    model: SMSVAE,
    conditions: Sequence[str],
    *,
    design: Design | None = None,
    sep: str = "+",
    library: float = 1e4,
    n_draws: int = 1000,
    seed: int = 0,
) -> Float[np.ndarray, "condition gene"]:
    """Return the expected expression of every gene under given perturbations.

    The mean of p(x | z, library) over z ~ p(z | c), at the modal graph (gates open or shut). The
    shift of a combination that the model was not trained on is the sum of its targets' shifts.
    A model without shifts (VAE, beta-VAE) predicts the control, whatever the condition.

    Parameters
    ----------
    model : SMSVAE
    conditions : sequence of str
        Conditions or targets that the model knows, or sums of targets (``"KLF1+MAP2K6"``); its
        control is one, too.
    design : Design, optional
        Further conditions, by their doses of the model's targets.
    sep : str
        Separates the targets of a sum; that of `smslib.data.from_anndata`.
    library : float
        UMIs of the cell; the result is in proportion to it.
    n_draws : int
        Of z. All conditions share the same noise, so that their differences are paired; see
        `predicted_effects` for how precise they are.
    seed : int
        Of that noise.

    Returns
    -------
    array, (n_conditions, n_genes)
        UMIs of a cell that has ``library`` of them: every row adds up to it.

    Raises
    ------
    KeyError
        If the model knows neither a condition nor one of its targets; the nearest are listed.
    ValueError
        If there are fewer than two draws, the library is not positive, or no condition is given.
    """
    shift = _shifts(model, _doses(model, conditions, design, sep))
    draws = _Draws(model, library, n_draws, seed)
    return np.stack([draws.at(row).mean(0) for row in shift])


def predicted_effects(
    model: SMSVAE,
    conditions: Sequence[str],
    *,
    design: Design | None = None,
    sep: str = "+",
    library: float = 1e4,
    n_draws: int = 1000,
    seed: int = 0,
) -> Effects:
    """Return the effects that a model expects, with their Monte-Carlo standard errors.

    Condition and control are drawn with the same noise: a perturbation without a shift has an
    effect of exactly zero, and the error of a small effect is small.

    Parameters
    ----------
    model, conditions, design, sep, library, n_draws, seed
        As in `predict`. The effects depend on the library, unless it is much above the number of
        genes: use the one that the observed effects were normalised to.

    Returns
    -------
    Effects

    Raises
    ------
    KeyError, ValueError
        As in `predict`.
    """
    shift = _shifts(model, _doses(model, conditions, design, sep))
    draws = _Draws(model, library, n_draws, seed)
    base, base_part = _log_mean(draws.at(torch.zeros_like(shift[0])))
    value, error = [], []
    for row in shift:
        level, part = _log_mean(draws.at(row))
        value.append(level - base)
        error.append(_standard_error(part - base_part))
    return Effects(np.stack(value), np.stack(error))


class _Draws:
    """Expected UMIs given z, at the same draws of noise around any shift."""

    def __init__(self, model: SMSVAE, library: float, n_draws: int, seed: int) -> None:
        if n_draws < 2 or not library > 0:
            raise ValueError(
                f"n_draws is {n_draws} and library {library}; expected at least two draws and a "
                "positive number of UMIs"
            )
        self.model = copy.deepcopy(model).eval()
        generator = torch.Generator().manual_seed(seed)
        self.noise = torch.randn(n_draws, model.n_latent, generator=generator).to(model.device)
        self.library = torch.full((n_draws, 1), float(library), device=model.device)

    @torch.no_grad()
    def at(self, shift: Float[Tensor, " latent"]) -> Float[np.ndarray, "draw gene"]:
        """Return the expected UMIs at every draw."""
        return self.model.decode(shift + self.noise, self.library).mean.double().cpu().numpy()


@torch.no_grad()
def _shifts(
    model: SMSVAE, dose: Float[Tensor, "condition target"]
) -> Float[Tensor, "condition latent"]:
    return dose.to(model.prior.dose) @ (model.prior.graph() * model.prior.slab())


def _doses(
    model: SMSVAE, conditions: Sequence[str], design: Design | None, sep: str
) -> Float[Tensor, "condition target"]:
    """Return the dose of each of the model's targets, condition by condition."""
    if not conditions:
        raise ValueError("no conditions were given; expected at least one to predict")
    known = model.prior.design
    matrix = torch.zeros(len(conditions), known.n_targets)
    for row, condition in enumerate(conditions):
        for target, dose in _targets_of(condition, known, design, sep).items():
            matrix[row, _place(target, condition, known)] = dose
    return matrix


def _targets_of(
    condition: str, known: Design, design: Design | None, sep: str
) -> dict[str, float]:
    """Return what a condition perturbs: as a design says, else as its name does."""
    for given in (design, known):
        if given is not None and condition in given.conditions:
            dose = given.matrix[given.conditions.index(condition)].tolist()
            return {name: d for name, d in zip(given.targets, dose, strict=True) if d}
    return {part: 1.0 for part in condition.split(sep) if part != known.conditions[0]}


def _place(target: str, condition: str, known: Design) -> int:
    if target in known.targets:
        return known.targets.index(target)
    names = sorted({*known.targets, *known.conditions})
    raise KeyError(
        f"condition {condition!r} perturbs {target!r}, of which the model knows no shift"
        f"{nearest_known(target, names)}"
    )


# ------------------------------------------------------------------------- what the data show


def effects(
    counts: ArrayLike | Tensor,
    condition: ArrayLike | Tensor,
    *,
    n_conditions: int | None = None,
    library: float = 1e4,
) -> Effects:
    """Return the average treatment effects that cells show.

    Parameters
    ----------
    counts : array or Tensor, (n_cells, n_genes)
        UMIs, dense; a cell without any is refused.
    condition : array or Tensor of int, (n_cells,)
        0 is the control.
    n_conditions : int, optional
        The largest condition plus one by default.
    library : float
        UMIs that every cell is scaled to. Much above what the cells have, a single UMI of a rare
        gene becomes a large effect; their median UMIs is a good choice.

    Returns
    -------
    Effects
        One row per condition, the control's first: zero, with its own cells' standard error taken
        twice. NaN where a condition has no cells; the standard error also where it has one.

    Raises
    ------
    ValueError
        If the shapes disagree, values are no counts, a cell has no UMIs, a condition is out of
        range, or there is no control.
    """
    counts, condition = _dense(counts, "counts"), _dense(condition, "condition")
    _refuse_other_than_counts(counts)
    n_conditions = _checked_conditions(counts, condition, n_conditions)
    normalised = library * counts / counts.sum(1, keepdims=True, dtype=float)
    empty = np.full(counts.shape[1], np.nan)
    level, variance = [], []
    for row in range(n_conditions):
        mine = normalised[condition == row]
        mean, part = _log_mean(mine) if len(mine) else (empty, mine)
        level.append(mean)
        variance.append(_standard_error(part) ** 2 if len(mine) > 1 else empty)
    level, variance = np.stack(level), np.stack(variance)
    return Effects(level - level[0], np.sqrt(variance + variance[0]))


def _dense(values: Any, what: str) -> np.ndarray:  # noqa: ANN401 (array, tensor, ...)
    if hasattr(values, "toarray"):
        raise ValueError(
            f"{what} is a {type(values).__name__}; expected a dense array: {what}.toarray()"
        )
    return np.asarray(values.cpu() if isinstance(values, Tensor) else values)


def _refuse_other_than_counts(counts: np.ndarray) -> None:
    if counts.dtype.kind not in "biuf":
        raise ValueError(f"counts hold values of type {counts.dtype}; expected UMIs")
    if no_count(counts).any():
        raise ValueError(
            "counts hold values that are not counts; expected UMIs (non-negative integers), not "
            f"normalised: that is done here. Noticed: {why_not_counts(counts)}"
        )


def _checked_conditions(
    counts: Float[np.ndarray, ...],
    condition: Int[np.ndarray, ...],
    n_conditions: int | None,
) -> int:
    """Return the number of conditions, if the cells can be used."""
    if counts.ndim != 2 or condition.shape != counts.shape[:1]:
        raise ValueError(
            f"counts have shape {counts.shape} and condition {condition.shape}; expected "
            "(n_cells, n_genes) and (n_cells,)"
        )
    found = np.unique(condition)
    if 0 not in found:
        raise ValueError(
            "no cell has condition 0, the control that effects are relative to; add controls"
        )
    n_conditions = int(found[-1]) + 1 if n_conditions is None else n_conditions
    if found[0] < 0 or found[-1] >= n_conditions:
        raise ValueError(
            f"conditions run from {found[0]} to {found[-1]}; expected 0 to {n_conditions - 1}"
        )
    empty = counts.sum(1) == 0
    if empty.any():
        raise ValueError(
            f"{int(empty.sum())} cells have no UMIs, first cell {int(empty.argmax())}; remove them"
        )
    return n_conditions


def _log_mean(
    normalised: Float[np.ndarray, "draw gene"],
) -> tuple[Float[np.ndarray, " gene"], Float[np.ndarray, "draw gene"]]:
    """Return log1p(mean), and by how much each row moves it (to first order, times n)."""
    mean = normalised.mean(0)
    return np.log1p(mean), (normalised - mean) / (1.0 + mean)


def _standard_error(parts: Float[np.ndarray, "draw gene"]) -> Float[np.ndarray, " gene"]:
    return parts.std(0, ddof=1) / len(parts) ** 0.5


# ----------------------------------------------------------------------------------- baselines


class Known(NamedTuple):
    """What the baselines learn from: the perturbations of the training cells, without control."""

    effects: Float[np.ndarray, "condition gene"]
    standard_error: Float[np.ndarray, "condition gene"]
    dose: Float[np.ndarray, "condition target"]
    embedding: Float[np.ndarray, "target dimension"]
    """Of the targets, from `embed`."""
    axes: Float[np.ndarray, "gene component"]
    """Orthonormal principal axes of the training cells' expression, from `embed`."""


Baseline = Callable[[Known, Float[np.ndarray, "new target"]], Float[np.ndarray, "new gene"]]


def no_effect(
    known: Known, dose: Float[np.ndarray, "new target"]
) -> Float[np.ndarray, "new gene"]:
    """Predict the mean of the controls."""
    return np.zeros((len(dose), known.effects.shape[1]))


def training_mean(
    known: Known, dose: Float[np.ndarray, "new target"]
) -> Float[np.ndarray, "new gene"]:
    """Predict the mean effect of all training perturbations, whatever the perturbation."""
    return np.tile(known.effects.mean(0), (len(dose), 1))


def additive(known: Known, dose: Float[np.ndarray, "new target"]) -> Float[np.ndarray, "new gene"]:
    """Predict a condition's own training effect, or the sum of its targets' effects.

    Of a target that was perturbed alone at several doses, the effect per unit of dose is that of
    least squares; one that never was adds nothing.
    """
    alone = (known.dose != 0).sum(1) == 1
    single, effects = known.dose[alone], known.effects[alone]
    size = (single**2).sum(0)[:, None]
    predicted = dose @ (single.T @ effects / np.where(size > 0, size, 1.0))
    for place, row in enumerate(dose):
        same = (known.dose == row).all(1)
        if same.any():
            predicted[place] = known.effects[same].mean(0)
    return predicted


def additive_shrunk(
    known: Known, dose: Float[np.ndarray, "new target"]
) -> Float[np.ndarray, "new gene"]:
    """Predict as `additive`, from training effects shrunk towards zero by what is noise in them.

    By the factor of James and Stein (1961), one per training condition, never negative: one minus
    its squared standard errors over its squared effects, both added up over genes. Without it the
    additive prediction of few cells loses to no effect at all in squared error, which would
    flatter any model that shrinks.
    """
    noise, size = (known.standard_error**2).sum(1), (known.effects**2).sum(1)
    factor = np.zeros(len(size))  # also where a single cell tells no standard error
    clear = size > noise
    factor[clear] = 1.0 - noise[clear] / size[clear]
    return additive(known._replace(effects=factor[:, None] * known.effects), dose)


def ridge(
    known: Known, dose: Float[np.ndarray, "new target"], *, penalty: float = _PENALTY
) -> Float[np.ndarray, "new gene"]:
    r"""Predict by a map that is linear in embeddings of the targets and of the genes.

    .. math:: \min_W \| Y - \bar y - P W G^\top \|^2 + \lambda \| W \|^2

    with training effects Y, P the sums of the embeddings of each condition's targets, and G the
    principal axes of expression (Ahlmann-Eltze et al. 2025, who found no deep model better;
    their embeddings are not scaled, and the penalty is on the two sides apart).

    Parameters
    ----------
    known : Known
    dose : array, (n_new, n_targets)
    penalty : float
        :math:`\lambda`, where embeddings have a length of about 1; 0.1 as in that paper, and
        close to the best of 0.01 to 10 on the small real screens.
    """
    mean = known.effects.mean(0)
    old, new = known.dose @ known.embedding, dose @ known.embedding
    response = old.T @ (known.effects - mean) @ known.axes
    weight = np.linalg.solve(old.T @ old + penalty * np.eye(old.shape[1]), response)
    return mean + new @ weight @ known.axes.T


def nearest(known: Known, dose: Float[np.ndarray, "new target"]) -> Float[np.ndarray, "new gene"]:
    """Predict the effect of the most similar other training perturbation.

    By the cosine of the embeddings; equally similar ones are averaged (all of them, if none has
    anything to do with the new one).
    """
    old, new = _unit(known.dose @ known.embedding), _unit(dose @ known.embedding)
    similarity = new @ old.T
    similarity[(dose[:, None] == known.dose[None]).all(-1)] = -np.inf
    best = similarity >= similarity.max(1, keepdims=True) - 1e-9
    return best @ known.effects / best.sum(1, keepdims=True)


BASELINES: Mapping[str, Baseline] = MappingProxyType(
    {
        "no-effect": no_effect,
        "training-mean": training_mean,
        "additive": additive,
        "additive-shrunk": additive_shrunk,
        "ridge": ridge,
        "nearest": nearest,
    }
)


def embed(
    counts: Float[np.ndarray, "cell gene"],
    genes: Sequence[str],
    targets: Sequence[str],
    *,
    library: float = 1e4,
    n_components: int = _N_COMPONENTS,
) -> tuple[Float[np.ndarray, "target dimension"], Float[np.ndarray, "gene component"]]:
    """Embed targets by how their genes vary with the others among cells.

    Parameters
    ----------
    counts : array, (n_cells, n_genes)
        UMIs of the training cells.
    genes, targets : sequence of str
        Names of the columns, and of what is perturbed.
    library : float
        UMIs that every cell is scaled to, before log1p.
    n_components : int

    Returns
    -------
    embedding : array, (n_targets, n_components + n_unmeasured)
        Of a measured target its gene's loadings (axis times standard deviation), scaled to a mean
        squared length of 1 over those targets. A target that is no gene of the matrix gets a
        dimension of its own: nothing can be said about it from the others.
    axes : array, (n_genes, n_components)
        Orthonormal, by falling variance.

    Raises
    ------
    ValueError
        If there are fewer genes than components.
    """
    if not 1 <= n_components <= len(genes):
        raise ValueError(
            f"n_components is {n_components} for {len(genes)} genes; expected 1 to {len(genes)}"
        )
    logs = np.log1p(library * counts / counts.sum(1, keepdims=True, dtype=float))
    variance, axes = np.linalg.eigh(np.atleast_2d(np.cov(logs, rowvar=False)))
    variance, axes = variance[: -n_components - 1 : -1], axes[:, : -n_components - 1 : -1]
    loadings = axes * np.sqrt(np.maximum(variance, 0.0))
    row = {name: place for place, name in enumerate(genes)}
    measured = [place for place, name in enumerate(targets) if name in row]
    shared = np.zeros((len(targets), n_components))
    shared[measured] = _unit_on_average(loadings[[row[targets[place]] for place in measured]])
    own = np.delete(np.eye(len(targets)), measured, axis=1)
    return np.hstack([shared, own]), axes


def _unit(rows: Float[np.ndarray, "row dimension"]) -> Float[np.ndarray, "row dimension"]:
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(length > 0, length, 1.0)


def _unit_on_average(
    rows: Float[np.ndarray, "row dimension"],
) -> Float[np.ndarray, "row dimension"]:
    size = np.sqrt((rows**2).sum() / max(len(rows), 1))
    return rows / size if size > 0 else rows


# ------------------------------------------------------------------------------------- scores


def score(
    predicted: Float[np.ndarray, ...],
    observed: Float[np.ndarray, ...],
    *,
    ranked_by: Float[np.ndarray, ...],
    n_top: int = _N_TOP,
) -> dict[str, float]:
    """Score the predicted effects of one perturbation against the observed ones.

    Parameters
    ----------
    predicted, observed : array, (n_genes,)
    ranked_by : array, (n_genes,)
        Effects in *other* cells than those of ``observed``: the genes with the largest are the
        top ones. Chosen on the scored cells themselves, they would be those whose noise is
        largest, and no prediction could reach them.
    n_top : int
        At most as many as there are genes.

    Returns
    -------
    dict
        Over all genes, and over the top ones with suffix ``_top``: ``pearson`` and ``cosine``
        (0 for a prediction that is constant, or zero), ``r2`` (1 - squared error over that of the
        best constant), ``rmse_ratio`` (root mean squared error over that of predicting no effect;
        below 1 is better than nothing).

    Raises
    ------
    ValueError
        If the lengths differ, an effect is not finite, the observed ones do not differ, or
        ``n_top`` is below 2.
    """
    _check_effects(predicted, observed, ranked_by, n_top)
    top = np.argsort(-np.abs(ranked_by), kind="stable")[:n_top]
    every = _compare(predicted, observed)
    among_top = _compare(predicted[top], observed[top])
    return every | {f"{name}_top": value for name, value in among_top.items()}


def _check_effects(predicted: object, observed: object, ranked_by: object, n_top: int) -> None:
    given = {"predicted": predicted, "observed": observed, "ranked_by": ranked_by}
    shapes = {name: np.shape(values) for name, values in given.items()}
    if len(set(shapes.values())) > 1 or len(shapes["observed"]) != 1:
        raise ValueError(f"effects have shapes {shapes}; expected (n_genes,) for all three")
    for name, values in given.items():
        if not np.isfinite(values).all():
            first = int(np.argmin(np.isfinite(values)))
            raise ValueError(
                f"{name} is not finite at gene {first}; has the condition no cells, or a cell no "
                "UMIs?"
            )
    if n_top < 2:
        raise ValueError(f"n_top is {n_top}; expected at least 2 genes to correlate")


def _compare(
    predicted: Float[np.ndarray, " gene"], observed: Float[np.ndarray, " gene"]
) -> dict[str, float]:
    centred = observed - observed.mean()
    if np.linalg.norm(centred) <= metrics.NIL:
        raise ValueError(
            f"the {len(observed)} observed effects are all {observed[0]:g}; expected effects that "
            "differ between genes"
        )
    error = ((predicted - observed) ** 2).sum()
    return {
        "pearson": metrics.cosine(predicted - predicted.mean(), centred),
        "cosine": metrics.cosine(predicted, observed),
        "r2": float(1.0 - error / (centred**2).sum()),
        "rmse_ratio": float(np.sqrt(error / (observed**2).sum())),
    }


# ----------------------------------------------------------------------------------- the study


class _Screen(NamedTuple):
    """A screen and the names of its genes."""

    cells: Cells
    design: Design
    genes: tuple[str, ...]


class _Fold(NamedTuple):
    """Cells to learn from, two halves of cells to score on, and the conditions scored.

    Each part has controls of its own; the labels are those of the whole design.
    """

    train: Cells
    halves: tuple[Cells, Cells]
    rows: tuple[int, ...]


def evaluate(config: Config) -> dict[str, Any]:
    """Learn from some cells of a screen, predict effects, score them on the others.

    Parameters
    ----------
    config : dict
        ``dataset``: "norman2019-mini" (its K562 cells) or "papalexi2021".
        ``task``: "cells" (every condition seen, half of its cells held out), "doubles" (trained
        on controls and singles; those doubles are scored of which both singles were seen) or
        "targets" (all cells of a fifth of the targets held out, in turn).
        ``method``: of `smslib.priors.METHODS`, of `BASELINES`, or "other-half" (the effect in
        the other half of the held-out cells). ``seed``: of the split and the fit, so that all
        methods are scored on the same cells; ``epochs`` and, optionally, ``training`` (of
        `smslib.screens.fit_screen`, models only). VAE and beta-VAE have no
        shifts: they predict the control, exactly and without a fit.

    Returns
    -------
    dict
        ``conditions``, the number of held-out cells ``n_scored`` of each, and every score of
        `score` as a list over them: the mean of two directions, genes ranked by one half of the
        held-out cells and scored on the other.

    Raises
    ------
    ValueError
        If data set, task or method is unknown, or the task leaves nothing to predict.
    KeyError
        For a model on "targets": it has no shift for a target that it never saw.

    Notes
    -----
    Effects are at the median UMIs of the training cells. The gene of the target itself counts
    like any other. No cell is both learned from and scored, and the controls that effects are
    relative to are divided in the same way: shared controls would put the same error into
    prediction and observation.

    "other-half" is a noisy observation, no bound on r2 or rmse_ratio (a smoother prediction can
    beat it), and ranks genes by itself. Where two halves correlate by r, the best possible
    prediction correlates with either by about ``sqrt(r)``: "attainable" in `summarise`. Scores
    are against one half, so nothing has to be corrected for the number of cells.
    """
    read, split = _chosen(config, "dataset", _READERS), _chosen(config, "task", _TASKS)
    _chosen(config, "method", {**METHODS, **BASELINES, _OTHER_HALF: None})
    screen = read()
    folds = split(screen, config["seed"])
    return _joined([_scored(fold, screen, config) for fold in folds])


def _chosen(config: Config, key: str, known: Mapping[str, Any]) -> Any:  # noqa: ANN401
    if config[key] not in known:
        raise ValueError(f"unknown {key} {config[key]!r}; expected one of {sorted(known)}")
    return known[config[key]]


def _joined(parts: Sequence[Mapping[str, list[Any]]]) -> dict[str, list[Any]]:
    """Put the lists of several folds together, conditions in alphabetical order."""
    whole = {key: [value for part in parts for value in part[key]] for key in parts[0]}
    order = np.argsort(whole["conditions"], kind="stable")
    return {key: [values[place] for place in order] for key, values in whole.items()}


def _scored(fold: _Fold, screen: _Screen, config: Config) -> dict[str, list[Any]]:
    """Return the scores of one fold, lists over its conditions."""
    rows, library = list(fold.rows), float(fold.train.library.median())
    seen = [_effects_of(cells, screen.design, library).value[rows] for cells in fold.halves]
    if config["method"] == _OTHER_HALF:
        predicted = seen[::-1]
    else:
        predicted = [_prediction(fold, screen, config, library)] * 2
    tables = [_table(*way) for way in zip(predicted, seen, seen[::-1], strict=True)]
    held = torch.cat([cells.condition for cells in fold.halves])
    return {
        "conditions": [screen.design.conditions[row] for row in rows],
        "n_scored": torch.bincount(held, minlength=screen.design.n_conditions)[rows].tolist(),
        **{name: np.mean([table[name] for table in tables], 0).tolist() for name in tables[0]},
    }


def _table(
    predicted: Float[np.ndarray, "condition gene"],
    observed: Float[np.ndarray, "condition gene"],
    ranked_by: Float[np.ndarray, "condition gene"],
) -> dict[str, list[float]]:
    """Return the scores of predictions, lists over conditions."""
    rows = [
        score(forecast, truth, ranked_by=other)
        for forecast, truth, other in zip(predicted, observed, ranked_by, strict=True)
    ]
    return {name: [row[name] for row in rows] for name in rows[0]}


def _prediction(
    fold: _Fold, screen: _Screen, config: Config, library: float
) -> Float[np.ndarray, "condition gene"]:
    """Return what a method predicts for the conditions of a fold."""
    method, rows = config["method"], list(fold.rows)
    dose = screen.design.matrix.numpy()
    if method in BASELINES:
        return BASELINES[method](_known(fold.train, screen, library), dose[rows])
    if method in _SHIFT_FREE:
        return np.zeros((len(rows), len(screen.genes)))
    cells, small = _restricted(fold.train, screen.design)
    options = {name: config[name] for name in ("epochs", "seed")}
    training = config.get("training")
    model, _ = screens.fit_screen(cells, small, method=method, training=training, **options)
    names = [screen.design.conditions[row] for row in rows]
    return predicted_effects(model, names, design=screen.design, library=library).value


def _known(train: Cells, screen: _Screen, library: float) -> Known:
    """Return what the baselines may know."""
    rows = train.condition.unique()[1:].tolist()
    genes, targets = screen.genes, screen.design.targets
    shown = _effects_of(train, screen.design, library)
    return Known(
        shown.value[rows],
        shown.standard_error[rows],
        screen.design.matrix.numpy()[rows],
        *embed(train.counts.numpy(), genes, targets, library=library),
    )


def _restricted(cells: Cells, design: Design) -> tuple[Cells, Design]:
    """Return the cells under a design of their own conditions and targets alone."""
    rows = cells.condition.unique()
    used = design.matrix[rows].any(0)
    names = [design.conditions[row] for row in rows.tolist()]
    targets = [name for name, kept in zip(design.targets, used.tolist(), strict=True) if kept]
    small = Design(tuple(names), tuple(targets), design.matrix[rows][:, used])
    return Cells(cells.counts, torch.searchsorted(rows, cells.condition)), small


def _effects_of(cells: Cells, design: Design, library: float) -> Effects:
    counts, condition = cells.counts.numpy(), cells.condition.numpy()
    return effects(counts, condition, n_conditions=design.n_conditions, library=library)


def _seen(screen: _Screen, seed: int) -> list[_Fold]:
    """Hold out half of the cells of every condition."""
    train, *halves = split_cells(screen.cells, _SHARES, seed=seed)
    return [_Fold(train, tuple(halves), tuple(range(1, screen.design.n_conditions)))]


def _doubles(screen: _Screen, seed: int) -> list[_Fold]:
    """Hold out the combinations of targets that were seen alone; train on nothing but singles."""
    dose = screen.design.matrix != 0
    single = dose.sum(1) == 1
    held = (dose.sum(1) > 1) & ~(dose & ~dose[single].any(0)).any(1)
    if not held.any():
        raise ValueError(
            "no combination of targets that were perturbed alone, too; use a screen of singles "
            "and doubles, such as 'norman2019-mini'"
        )
    return [_unseen(screen.cells, single.nonzero()[:, 0], held.nonzero()[:, 0], seed)]


def _targets(screen: _Screen, seed: int) -> list[_Fold]:
    """Hold out a fifth of the targets at a time."""
    names = np.random.default_rng(seed).permutation(screen.design.targets)
    parts = np.array_split(names, min(_N_FOLDS, len(names)))
    splits = [perturbseq.hold_out(screen.design, part.tolist()) for part in parts]
    return [_unseen(screen.cells, train[1:], held, seed) for train, held in splits]


def _unseen(
    cells: Cells, train: Int[Tensor, " seen"], held: Int[Tensor, " held"], seed: int
) -> _Fold:
    """Hold out all cells of some conditions, and half of the controls."""
    controls = split_cells(cells.of(torch.tensor([0])), _SHARES, seed=seed)
    others = (cells.of(train), *split_cells(cells.of(held), (0.5, 0.5), seed=seed))
    known, *halves = (_together(*parts) for parts in zip(controls, others, strict=True))
    return _Fold(known, tuple(halves), tuple(held.tolist()))


def _together(first: Cells, second: Cells) -> Cells:
    return Cells(
        torch.cat([first.counts, second.counts]), torch.cat([first.condition, second.condition])
    )


def _norman() -> _Screen:
    """Read the CRISPRa screen in K562; most of the file's 500 genes are silent in these cells."""
    adata = perturbseq.read("norman2019-mini")
    adata = adata[adata.obs["cell_type"] == "k562"].copy()
    labels = {"key": "condition", "control": "control"}
    kept, _ = perturbseq.filter_screen(adata, min_umis=20, min_detected=20, **labels)
    read = from_anndata(kept, perturbation_key="condition", control="control")
    return _Screen(*read, tuple(kept.var_names))


def _papalexi() -> _Screen:
    adata, _ = screens.prepare()
    read = from_anndata(adata, perturbation_key="target", control=perturbseq.CONTROL)
    return _Screen(*read, tuple(adata.var_names))


_READERS = MappingProxyType({"norman2019-mini": _norman, "papalexi2021": _papalexi})
_TASKS = MappingProxyType({"cells": _seen, "doubles": _doubles, "targets": _targets})


_TASKS_OF_NORMAN = ("doubles", "cells")


def _study() -> tuple[dict[str, Any], ...]:
    """Return every run, seed by seed; models first, where they have something to say."""
    plain = sweep.axis("method", [*BASELINES, "vae", _OTHER_HALF])
    shifted = sweep.axis("method", ["svae+", "svae", "ivae"])
    norman = sweep.product([{"dataset": "norman2019-mini"}], sweep.axis("task", _TASKS_OF_NORMAN))
    papalexi = [{"dataset": "papalexi2021", "task": "cells"}]
    unseen = [{"dataset": "papalexi2021", "task": "targets"}]
    runs = sweep.chain(
        sweep.product(norman, shifted, [{"epochs": 200, "training": screens.CUT}]),
        sweep.product(papalexi, shifted, [{"epochs": 72, "training": screens.CUT}]),
        sweep.product(sweep.chain(norman, papalexi, unseen), plain),
    )
    return tuple(sweep.product(sweep.axis("seed", range(5)), runs))


STUDY = _study()


def summarise(runs: pd.DataFrame) -> dict[str, Any]:
    """Return the study's numbers under flat keys.

    Parameters
    ----------
    runs : DataFrame
        Of `evaluate`, from `smslib.sweep.collect`.

    Returns
    -------
    dict
        ``<dataset>.<task>.conditions`` and ``.n_scored``. Per method,
        ``<dataset>.<task>.<method>.seeds`` and, per score, ``.<score>`` (mean over conditions, by
        seed) with ``.mean``, ``.low``, ``.high`` (95 % t interval over seeds, which are other
        splits of the same cells) and ``.n``, and ``.<score>.by_condition`` (mean over seeds).
        ``.<score>.minus_<baseline>``, of pearson and rmse_ratio, is the mean difference from
        "training-mean", "additive" and "additive-shrunk", with ``.low``, ``.high`` and
        ``.p_value`` of a paired t-test over conditions (means over the ``.n_seeds`` seeds that
        both methods have: other seeds are other splits).
        ``<dataset>.<task>.attainable.pearson`` and ``.cosine``, with suffix ``_top`` too, are the
        mean over conditions of ``sqrt(r)``, where ``r`` is the agreement of two halves of the
        held-out cells (mean over seeds); a negative ``r`` counts as ``-sqrt(-r)``.
    """
    values: dict[str, Any] = {}
    for (dataset, task), group in runs.sort_values("seed").groupby(["dataset", "task"]):
        first, key = group.iloc[0], f"{dataset}.{task}"
        values |= {f"{key}.{name}": first[name] for name in ("conditions", "n_scored")}
        tables = {method: _scores(rows) for method, rows in group.groupby("method")}
        values |= _attainable(f"{key}.attainable", tables.get(_OTHER_HALF, {}))
        for method, rows in group.groupby("method"):
            values[f"{key}.{method}.seeds"] = rows["seed"].tolist()
            for name, table in tables[method].items():
                values |= _summary(f"{key}.{method}.{name}", np.array(list(table.values())))
                if name in _COMPARED:
                    values |= _differences(f"{key}.{method}.{name}", method, name, tables)
    return values


_Table = Mapping[int, list[float]]  # by seed, one value per condition


def _scores(rows: pd.DataFrame) -> dict[str, _Table]:
    """Return every score of a method's runs."""
    return {name: dict(zip(rows["seed"], rows[name], strict=True)) for name in _SCORES}


def _summary(key: str, table: Float[np.ndarray, "seed condition"]) -> dict[str, Any]:
    return store.over_seeds(key, table.mean(1)) | {f"{key}.by_condition": table.mean(0)}


def _attainable(key: str, halves: Mapping[str, _Table]) -> dict[str, float]:
    """Return the mean score, against one half, of a prediction without error.

    Scores are averaged over conditions, so the root is taken of each: the root of the mean would
    be larger. Where there is no effect, agreement scatters about zero; roots that keep its sign
    cancel there, while those of the positive part alone would add up.
    """
    agreement = {
        name: np.mean(list(table.values()), 0)
        for name, table in halves.items()
        if name.startswith(_AGREEMENT)
    }
    return {
        f"{key}.{name}": float(np.mean(np.sign(r) * np.abs(r) ** 0.5))
        for name, r in agreement.items()
    }


def _differences(
    key: str, method: str, name: str, tables: Mapping[str, Mapping[str, _Table]]
) -> dict[str, Any]:
    """Compare a method with the reference baselines, condition by condition."""
    values, mine = {}, tables[method][name]
    for other in [other for other in _REFERENCES if other != method and other in tables]:
        theirs = tables[other][name]
        shared = [seed for seed in mine if seed in theirs]
        if shared:
            found = metrics.paired(*(_over(table, shared) for table in (mine, theirs)))
            here = f"{key}.minus_{other}"
            parts = {"low": found.low, "high": found.high, "p_value": found.p_value}
            values |= {here: found.mean, f"{here}.n_seeds": len(shared)}
            values |= {f"{here}.{part}": value for part, value in parts.items()}
    return values


def _over(table: _Table, seeds: Sequence[int]) -> Float[np.ndarray, " condition"]:
    return np.mean([table[seed] for seed in seeds], 0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing of the study, one single-threaded process per worker."""
    parser = argparse.ArgumentParser(prog="python -m smslib.prediction", description=__doc__)
    sweep.add_arguments(parser)
    given = parser.parse_args(arguments)
    root = given.results / "runs" / "prediction"
    sweep.run_in_processes(evaluate, STUDY, root, given)
    options = {"results": given.results, "command": "python -m smslib.prediction"}
    sweep.conclude("prediction", STUDY, summarise, root=root, **options)
    return 0


if __name__ == "__main__":
    # Under its importable name, so that worker processes and records find the task there.
    from smslib import prediction

    sys.exit(prediction.main())
