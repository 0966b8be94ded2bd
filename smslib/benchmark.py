"""The benchmark's runs: one configuration in, one flat row of scores out.

``python -m smslib.benchmark EXPERIMENT`` runs what is missing of an experiment; every run is a
file of its own, so an interrupted study resumes. The studies themselves are in `smslib.studies`.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from smslib import ceilings, controls, gauge, metrics, recipes, simulate, store, sweep, transfer
from smslib.data import Cells, Design, first_of_each, split_cells
from smslib.distributions import kl_to_shifted_normal
from smslib.evaluate import by_condition, elbo, iwelbo, latents
from smslib.model import SMSVAE
from smslib.simulate import Mechanism, Screen, Violation
from smslib.studies import AGREEMENT, STUDIES
from smslib.sweep import Config
from smslib.train import TrainConfig, fit

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "ARMS",
    "CONTROLS",
    "agree",
    "by_setting",
    "chosen",
    "graph_scores",
    "latent_scores",
    "recover",
    "summarise",
    "turned_scores",
]

# An arm is a way to do the whole experiment: simulator, recipe and transfer step.
ARMS: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        "released": {"recipe": "paper", "as_released": True, "transfer": "released"},
        "corrected": {"recipe": "corrected", "as_released": True, "transfer": "corrected"},
        "smslib": {"recipe": "smslib", "as_released": True, "transfer": "corrected"},
        "corrected-written": {
            "recipe": "corrected",
            "as_released": False,
            "transfer": "corrected",
        },
        "smslib-written": {"recipe": "smslib", "as_released": False, "transfer": "corrected"},
    }
)
_UNGATED = ("ivae", "cpa-vae")  # whose graph is read off the sizes of the shifts
CONTROLS = ("pca", "lda", "regression", "oracle", "told")
_RULES = ("udr", "validation_elbo", "mcc")  # to choose from a grid by
# Scores that stay in the runs: the store is to remain small, and signed matching changes no other
# verdict than precision, recall and F1.
_IN_RUNS_ALONE = {"signed_average_precision", "signed_shd", "signed_n_edges"}
_HELD_OUT = 20  # of the 100 interventions, the last 20 (released: 80-99)
_ORACLE_CELLS = 20  # per held-out intervention; the floor is paired with the model on these


def recover(config: Config) -> dict[str, float | int]:
    """Simulate a screen, fit a method on all but the held-out interventions, score it.

    Parameters
    ----------
    config : dict
        ``arm`` (of `ARMS`), ``method`` (of `smslib.priors.METHODS`, of `CONTROLS`, or
        ``"shuffled"``: sVAE+ on shuffled labels) and ``seed`` (of data and weights alike, as
        released). Optionally, of the data: ``n_cells`` per intervention (500), ``n_targets``
        (100), ``n_latent`` (15), ``mechanism`` and ``held_out`` (arguments of
        `smslib.simulate.Mechanism`), ``violation`` (of `smslib.simulate.Violation`),
        ``normaliser``, ``with_replacement``; of the fit:
        ``init_seed``, ``sparsity``, ``beta``, ``max_epochs``, ``changes`` (of
        `smslib.recipes.CHANGES`), ``transfer``; of the scores: ``axes``, which is ``"sparsest"``
        for `turned_scores` as well.

    Returns
    -------
    dict
        `latent_scores`; for methods with shifts `graph_scores`; for models ``i_nll`` and the rest
        of the likelihoods (nats per cell), ``epochs`` and ``fit_cpu_seconds``.
    """
    plan = {**ARMS[config["arm"]], **config}
    screen = _screen(plan)
    trained = _trained(screen)
    if plan["method"] in CONTROLS:
        return _control(plan, screen, trained)
    return _model(plan, screen, trained)


def _trained(screen: Screen) -> Screen:
    """Return the interventions to train on."""
    names = screen.design.conditions
    return simulate.restrict(screen, names[1 : len(names) - _HELD_OUT])


def _screen(plan: Mapping[str, object]) -> Screen:
    held_out, violation = plan.get("held_out"), plan.get("violation")
    return simulate.sparse_shift(
        n_cells_per_condition=plan.get("n_cells", 500),
        n_targets=plan.get("n_targets", 100),
        n_latent=plan.get("n_latent", 15),
        seed=plan["seed"],
        as_released=plan["as_released"],
        normaliser=plan.get("normaliser"),
        with_replacement=plan.get("with_replacement"),
        mechanism=Mechanism(**plan.get("mechanism", {})),
        held_out=None if held_out is None else (_HELD_OUT, Mechanism(**held_out)),
        violation=None if violation is None else Violation(**violation),
    )


class _Fit(NamedTuple):
    """A fitted model, and the cells and the training behind it."""

    model: SMSVAE
    method: str
    cells: Cells
    train: Cells
    validation: Cells
    config: TrainConfig
    n_epochs: int
    cpu_seconds: float


def _fit(plan: Mapping[str, object], trained: Screen) -> _Fit:
    """Fit a method as planned."""
    method, cells = plan["method"], trained.cells
    if method == "shuffled":
        method, labels = "svae+", controls.shuffle_labels(cells.condition, seed=plan["seed"])
        cells = replace(cells, condition=torch.from_numpy(labels))
    train, validation = split_cells(cells, (0.9, 0.1), seed=plan["seed"])
    model, config = recipes.build(
        train,
        trained.design,
        method=method,
        recipe=plan["recipe"],
        changes=plan.get("changes", ()),
        n_latent=trained.z.shape[1],
        sparsity=plan.get("sparsity"),
        beta=plan.get("beta"),
        epochs=plan.get("max_epochs"),
        seed=plan.get("init_seed", plan["seed"]),
    )
    start = time.process_time()
    history = fit(model, train, config, validation=validation)
    seconds = time.process_time() - start
    return _Fit(model, method, cells, train, validation, config, len(history.rows), seconds)


def _model(plan: Mapping[str, object], screen: Screen, trained: Screen) -> dict[str, float | int]:
    """Fit a model and score it."""
    done = _fit(plan, trained)
    scores = {"epochs": done.n_epochs, "fit_cpu_seconds": done.cpu_seconds}
    scores |= _recovery(done, screen, trained)
    if "axes" in plan:
        scores |= turned_scores(latents(done.model, done.cells), trained)
    scores["validation_elbo"] = float(elbo(done.model, done.validation).mean())
    scores |= _transfer_scores(done.model, screen)
    if plan["transfer"] == "released":
        scores["i_nll_corrected"] = scores["i_nll"]
        scores |= _released_transfer(done, screen)
    return scores


def _recovery(done: _Fit, screen: Screen, trained: Screen) -> dict[str, float | int]:
    """Score the latents, and the graph of a method that has shifts."""
    estimated = latents(done.model, done.cells)
    # The true labels, of a fit on shuffled ones, too: those move with no latent.
    scores = latent_scores(trained.z.numpy(), estimated, trained.cells.condition.numpy())
    if done.method not in ("vae", "beta-vae"):
        scores |= _model_graph_scores(done.model, done.method, trained, estimated)
        scores |= _released_graph_scores(done.model, done.method, screen, trained, estimated)
    return scores


def agree(config: Config) -> dict[str, float | int]:
    """Fit one setting from several starts on the same data; score how far the fits agree.

    Agreement needs no truth, so that settings can be chosen by it: the unsupervised score that
    the paper selects by (Duan et al. 2020).

    Parameters
    ----------
    config : dict
        As of `recover`, for a model; and ``n_inits`` (5), the number of starts.

    Returns
    -------
    dict
        ``udr`` (mean over the fits), ``pairwise_mcc`` (median over their pairs),
        ``validation_elbo`` (mean, nats per cell), the mean of every score of the latents and of
        the graph, and ``fit_cpu_seconds`` of all fits.
    """
    plan = {**ARMS[config["arm"]], **config}
    screen = _screen(plan)
    trained = _trained(screen)
    fits = [_fit({**plan, "init_seed": k}, trained) for k in range(plan.get("n_inits", 5))]
    codes = [latents(done.model, done.validation) for done in fits]
    pairs = metrics.pairwise_mcc(codes)
    scores = [_recovery(done, screen, trained) for done in fits]
    return {
        **{name: float(np.mean([score[name] for score in scores])) for name in scores[0]},
        "udr": float(np.mean(metrics.udr(codes, kl=[_divergence(done) for done in fits]))),
        "pairwise_mcc": float(np.median(pairs[~np.eye(len(pairs), dtype=bool)])),
        "validation_elbo": float(np.mean([elbo(d.model, d.validation).mean() for d in fits])),
        "fit_cpu_seconds": sum(done.cpu_seconds for done in fits),
    }


@torch.no_grad()
def _divergence(done: _Fit) -> np.ndarray:
    """Return the mean KL(q(z_i | x) || p(z_i | c)) of every latent, nats."""
    model, cells = done.model, done.validation
    q, shift = model.infer(cells), model.prior().at(cells.condition)
    return kl_to_shifted_normal(q.mean, q.variance, shift).mean(0).numpy()


def latent_scores(
    true: np.ndarray, estimated: np.ndarray, condition: np.ndarray
) -> dict[str, float | int]:
    """Return how well latents were recovered.

    Parameters
    ----------
    true, estimated : array, (n_cells, n_latent)
    condition : array, (n_cells,)

    Returns
    -------
    dict
        ``mcc``, ``mcc_spearman``, ``mcc_within`` (after removing each condition's mean), ``r2``
        (in-sample, as published), ``r2_cv`` (5-fold), ``dci_disentanglement``,
        ``dci_completeness``.
    """
    dci = metrics.dci(true, estimated)
    return {
        "mcc": metrics.mcc(true, estimated),
        "mcc_spearman": metrics.mcc(true, estimated, method="spearman"),
        "mcc_within": metrics.within_condition_mcc(true, estimated, condition),
        "r2": metrics.linear_r2(true, estimated),
        "r2_cv": metrics.linear_r2(true, estimated, folds=5),
        "dci_disentanglement": dci.disentanglement,
        "dci_completeness": dci.completeness,
    }


def turned_scores(codes: np.ndarray, screen: Screen) -> dict[str, float | int]:
    """Return how well latents and graph are recovered in the axes in which shifts are sparsest.

    Latents of any model with the scale of its prior can be read in these axes
    (`smslib.gauge.sparsest`); to find them takes labels, and no truth.

    Parameters
    ----------
    codes : array, (n_cells, n_latent)
        Estimated latents, prior standard deviations.
    screen : Screen
        Its cells, and the truth.

    Returns
    -------
    dict
        ``mcc_turned``, ``mcc_within_turned``; ``precision_turned``, ``recall_turned`` and
        ``f1_turned``, where an edge is evidence of more than 2 (alpha - 1) nats; and
        ``nats_saved``, what the turn takes off the cost of the graph.
    """
    cells, design, true = screen.cells, screen.design, screen.z.numpy()
    alpha, condition = recipes.alpha_by_cells(cells, design), cells.condition.numpy()
    means, n_cells = gauge.target_means(codes, condition, design.index(design.targets).numpy())
    frames = gauge.centred(means), gauge.sparsest(means, n_cells, alpha=alpha)
    nats = [gauge.evidence(frame.of(means), n_cells) for frame in frames]
    before, after = (gauge.cost(each, alpha=alpha).sum() for each in nats)
    turned = frames[1].of(codes)
    matching = metrics.match_latents(true, turned)
    edges = metrics.graph_scores(
        screen.graph.numpy(), nats[1], matching, threshold=2 * (alpha - 1)
    )
    return {
        "mcc_turned": metrics.mcc(true, turned),
        "mcc_within_turned": metrics.within_condition_mcc(true, turned, condition),
        **{f"{name}_turned": edges[name] for name in ("precision", "recall", "f1")},
        "nats_saved": float(before - after),
    }


def graph_scores(
    truth: np.ndarray, graph: np.ndarray, true: np.ndarray, estimated: np.ndarray
) -> dict[str, float | int]:
    """Return how well the mechanism graph was recovered.

    Parameters
    ----------
    truth, graph : array, (n_targets, n_latent)
        True edges; probabilities of the estimated ones.
    true, estimated : array, (n_cells, n_latent)
        Latents, to match the columns by.

    Returns
    -------
    dict
        ``precision``, ``recall``, ``f1``, ``average_precision``, ``shd``, ``n_edges``, and the
        same with the prefix ``signed_``: latents matched by signed correlation, as released.
    """
    scores = {}
    for prefix, signed in (("", False), ("signed_", True)):
        matching = metrics.match_latents(true, estimated, signed=signed)
        found = metrics.graph_scores(truth, graph, matching)
        scores |= {prefix + name: value for name, value in found.items()}
    return scores


def _model_graph_scores(
    model: SMSVAE, method: str, trained: Screen, estimated: np.ndarray
) -> dict[str, float | int]:
    """Score the model's own graph, over the targets that it was trained on."""
    true, truth, graph = trained.z.numpy(), trained.graph.numpy(), _graph(model, method)
    scores = graph_scores(truth, graph, true, estimated)
    if method in _UNGATED:
        return scores
    matching = metrics.match_latents(true, estimated)
    calibration = metrics.calibration(*metrics.aligned_edges(truth, graph, matching))
    return scores | {"calibration": calibration.error, "brier": calibration.brier}


def _released_graph_scores(
    model: SMSVAE, method: str, screen: Screen, trained: Screen, estimated: np.ndarray
) -> dict[str, float | int]:
    """Score as released: signed matching, over all targets, the held-out ones among them.

    Those were never trained. Their gates end shut, because the penalty alone acts on them; two of
    the ungated methods' shifts are the largest by chance.
    """
    truth, graph = screen.graph.numpy(), _graph(model, method)
    unseen = np.zeros((len(truth) - len(graph), graph.shape[1]))
    if method in _UNGATED:
        unseen = _two_largest(np.random.default_rng(0).standard_normal(unseen.shape))
    matching = metrics.match_latents(trained.z.numpy(), estimated, signed=True)
    found = metrics.graph_scores(truth, np.vstack([graph, unseen]), matching)
    return {f"released_{name}": found[name] for name in ("precision", "recall", "f1")}


def _graph(model: SMSVAE, method: str) -> np.ndarray:
    """Return the probabilities of the edges, or an ungated method's two largest shifts."""
    if method in _UNGATED:
        return _two_largest(model.prior.slab().detach().numpy())
    return model.prior.probabilities()


def _two_largest(shift: np.ndarray) -> np.ndarray:
    return metrics.top_k_graph(shift, min(2, shift.shape[1]))


def _unseen(screen: Screen) -> tuple[str, ...]:
    """Return the names of the held-out interventions."""
    return screen.design.conditions[-_HELD_OUT:]


def _held_out(screen: Screen, design: Design) -> tuple[Cells, Design]:
    """Return the held-out cells, labelled by the design extended by their interventions."""
    names = _unseen(screen)
    rows, larger = screen.design.index(names), design.extend(names)
    cells = screen.cells.of(rows)
    new_row = torch.full((screen.design.n_conditions,), -1)
    new_row[rows] = larger.index(names)
    return replace(cells, condition=new_row[cells.condition]), larger


def _transfer_scores(model: SMSVAE, screen: Screen) -> dict[str, float | int]:
    """Adapt to half of the held-out cells in closed form, score the other half.

    ``i_nll`` is -IWELBO averaged over interventions, nats per cell; ``floor`` what the true
    generator would score on some of the same cells, given their library, and ``i_nll_gap`` how
    far the model is above it on those. ``mcc_new`` is the MCC of all held-out cells.
    """
    cells, design = _held_out(screen, model.prior.design)
    fitted, scored = split_cells(cells, (0.5, 0.5), seed=0)
    adapted = transfer.adapt(model, fitted, design=design)
    bounds = iwelbo(adapted, scored, n_draws=1000)
    some = first_of_each(scored, _ORACLE_CELLS)
    floor = -_oracle_log_prob(screen, scored[some], design)
    nll = -float(np.nanmean(by_condition(bounds, scored, design)["mean"]))
    rows = screen.design.index(_unseen(screen))
    true = screen.z[torch.isin(screen.cells.condition, rows)].numpy()
    return {
        "i_nll": nll,
        "floor": float(floor.mean()),
        "i_nll_gap": float(-bounds[some].mean() - floor.mean()),
        "mcc_new": metrics.mcc(true, latents(adapted, cells)),
    }


def _oracle_log_prob(screen: Screen, cells: Cells, design: Design) -> np.ndarray:
    names = [design.conditions[row] for row in cells.condition.tolist()]
    known = replace(cells, condition=screen.design.index(names))
    return simulate.oracle_log_prob(screen, known, observed_library=True).numpy()


def _released_transfer(done: _Fit, screen: Screen) -> dict[str, float | int]:
    """Repeat the released transfer step: refit, gradients in training mode, the same cells twice.

    ``i_nll`` is then the released number, ``i_nll_refitted`` that before the shifts are learned.
    """
    cells, design = _held_out(screen, done.model.prior.design)
    drift = done.method != "svae+"
    _, stages = transfer.protocol(
        done.model,
        done.train,
        config=done.config,
        validation=done.validation,
        adaptation=cells,
        scoring=cells,
        design=design,
        how="gradient",
        drift=drift,
    )
    nll = -stages.groupby("stage")["iwelbo"].mean()
    scores = {"i_nll": float(nll["adapted"]), "i_nll_refitted": float(nll["refitted"])}
    return scores | _undone(done.model, cells, design, drift=drift)


def _undone(model: SMSVAE, cells: Cells, design: Design, *, drift: bool) -> dict[str, float | int]:
    """Take the released transfer step back, one slip after the other.

    Without the refit; then with the encoder's statistics frozen as well; then with the shifts in
    closed form, in evaluation mode. The next would be other cells to score: ``i_nll_corrected``.
    """
    ways = {
        "i_nll_unrefitted": {"how": "gradient", "drift": drift},
        "i_nll_frozen": {"how": "gradient"},
        "i_nll_same_cells": {"how": "closed-form"},
    }
    scores = {}
    for name, way in ways.items():
        bounds = iwelbo(transfer.adapt(model, cells, design=design, **way), cells, n_draws=1000)
        scores[name] = -float(np.nanmean(by_condition(bounds, cells, design)["mean"]))
    return scores


def _control(
    plan: Mapping[str, object], screen: Screen, trained: Screen
) -> dict[str, float | int]:
    """Score an estimate without a neural network; the oracle's on some of the cells."""
    method, seed, cells, true = plan["method"], plan["seed"], trained.cells, trained.z.numpy()
    counts, condition, n_latent = cells.counts.numpy(), cells.condition.numpy(), true.shape[1]
    if method == "oracle":
        return _oracle(screen, trained, seed=seed, turn="axes" in plan)
    if method == "told":
        model, _ = recipes.build(cells, trained.design, n_latent=n_latent, seed=seed)
        return ceilings.told(model, trained, seed=seed)
    if method == "regression":
        return latent_scores(true, controls.regression(counts, true, seed=seed), condition)
    if method == "pca":
        codes, edges = controls.pca(counts, n_latent), {}
    else:
        codes, shift = controls.lda(counts, condition, n_latent)
        edges = graph_scores(trained.graph.numpy(), _two_largest(shift), true, codes)
    scores = latent_scores(true, codes, condition) | edges
    if "axes" in plan:
        scores |= turned_scores(controls.whiten(codes, condition), trained)
    return scores


def _oracle(screen: Screen, trained: Screen, *, seed: int, turn: bool) -> dict[str, float | int]:
    some = first_of_each(trained.cells, _ORACLE_CELLS)
    part = replace(trained, cells=trained.cells[some], z=trained.z[some])
    mean = simulate.oracle(trained, part.cells, seed=seed).mean.numpy()
    unseen, design = _held_out(screen, trained.design)
    unseen = unseen[first_of_each(unseen, _ORACLE_CELLS)]
    floor = -_oracle_log_prob(screen, unseen, design)
    scores = latent_scores(part.z.numpy(), mean, part.cells.condition.numpy())
    return scores | {"i_nll": float(floor.mean())} | (turned_scores(mean, part) if turn else {})


def summarise(runs: pd.DataFrame, study: Mapping[str, Sequence[Config]]) -> dict[str, object]:
    """Return, per arm, setting and method, every score's values by seed with mean and interval.

    Parameters
    ----------
    runs : DataFrame
        From `smslib.sweep.collect`; may hold runs of other studies.
    study : dict
        From setting to configurations, as in `smslib.studies`. Runs that are missing are left out.

    Returns
    -------
    dict
        ``<arm>.<setting>.<method>.seeds``, ``<arm>.<setting>.<method>.<score>`` (lists over
        seeds; where some runs lack the score, its ``.seeds`` names the others), and of each list
        ``.mean`` and ``.n``, and where there are several ``.sd``, ``.low`` and ``.high`` (95 % t
        interval). An empty setting is left out. A setting with further starts, named
        ``<setting>-start<k>``, has a ``<setting>-best`` as well: of every seed that has them all,
        the start with the highest validation ELBO.
    """
    values: dict[str, object] = {}
    for setting, configs in study.items():
        values |= _by_method(setting, sweep.of_study(runs, configs), configs)
    for setting, starts in _starts(study).items():
        values |= _by_method(f"{setting}-best", _best_starts(runs, starts), sweep.chain(*starts))
    return values


def _by_method(setting: str, found: pd.DataFrame, configs: Sequence[Config]) -> dict[str, object]:
    """Summarise the runs of a setting."""
    values: dict[str, object] = {}
    for (arm, method), group in found.sort_values("seed").groupby(["arm", "method"]):
        key = ".".join(name for name in (arm, setting, method) if name)
        values[f"{key}.seeds"] = group["seed"].tolist()
        for score in _scores(group, configs):
            scored = group.dropna(subset=score)
            values |= store.over_seeds(f"{key}.{score}", scored[score].tolist())
            if len(scored) < len(group):
                values[f"{key}.{score}.seeds"] = scored["seed"].tolist()
    return values


def _starts(study: Mapping[str, Sequence[Config]]) -> dict[str, list[Sequence[Config]]]:
    """Return, of each setting that has further starts, the configurations of every start."""
    starts: dict[str, list[Sequence[Config]]] = {}
    for label, configs in study.items():
        setting, further, _ = label.partition("-start")
        if further:
            starts.setdefault(setting, [study[setting]]).append(configs)
    return starts


def _best_starts(runs: pd.DataFrame, starts: Sequence[Sequence[Config]]) -> pd.DataFrame:
    """Return the best run, by validation ELBO, of every seed that has all the starts."""
    found, same = sweep.of_study(runs, sweep.chain(*starts)), ["arm", "method", "seed"]
    if "validation_elbo" not in found:
        return found.iloc[:0]
    whole = found[found.groupby(same)["validation_elbo"].transform("count") == len(starts)]
    return whole.loc[whole.groupby(same)["validation_elbo"].idxmax()]


def chosen(runs: pd.DataFrame, study: Mapping[str, Sequence[Config]]) -> dict[str, object]:
    """Return what each rule of selection chooses from a grid, and what that is worth.

    Parameters
    ----------
    runs : DataFrame
        Of `agree`, from `smslib.sweep.collect`.
    study : dict
        From setting to configurations.

    Returns
    -------
    dict
        ``<arm>.<method>.by_<rule>.setting`` and its ``.mcc``, ``.udr`` and ``.validation_elbo``,
        for the rules ``udr`` (the paper's), ``validation_elbo`` and ``mcc`` (which needs the
        truth: the best in the grid). Methods with one setting alone are left out.
    """
    label = {sweep.run_id(c): setting for setting, configs in study.items() for c in configs}
    values: dict[str, object] = {}
    walked = sweep.of_study(runs, sweep.chain(*study.values()))
    for (arm, method), grid in walked.groupby(["arm", "method"]):
        for rule in _RULES if len(grid) > 1 else ():
            best, key = grid.loc[grid[rule].idxmax()], f"{arm}.{method}.by_{rule}"
            values[f"{key}.setting"] = label[best["run_id"]]
            values |= {f"{key}.{score}": float(best[score]) for score in _RULES}
    return values


def _scores(group: pd.DataFrame, configs: Sequence[Config]) -> list[str]:
    """Return the columns that the task returned: numbers that no configuration sets."""
    settings = {name for config in configs for name in config}
    numbers = group.select_dtypes("number").dropna(axis=1, how="all").columns
    hidden = settings | _IN_RUNS_ALONE
    return [name for name in numbers if name not in hidden and "." not in name]


def by_setting(
    values: Mapping[str, object],
    *,
    arm: str,
    score: str,
    settings: Iterable[str],
    methods: Iterable[str],
) -> dict[str, dict[str, list[float]]]:
    """Return a score of an arm by method and setting, as `smslib.plotting.trend` takes it.

    Parameters
    ----------
    values : dict
        From `summarise`.
    arm, score : str
    settings, methods : iterable of str
        Those without runs are left out.
    """
    keys = {
        method: {setting: f"{arm}.{setting}.{method}.{score}" for setting in settings}
        for method in methods
    }
    found = {
        method: {setting: values[key] for setting, key in row.items() if values.get(key)}
        for method, row in keys.items()
    }
    return {method: row for method, row in found.items() if row}


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing of an experiment, one single-threaded process per worker."""
    parser = argparse.ArgumentParser(prog="python -m smslib.benchmark", description=__doc__)
    parser.add_argument("experiment", choices=sorted(STUDIES))
    parser.add_argument("--arm", choices=sorted(ARMS), help="run this arm alone")
    sweep.add_arguments(parser)
    given = parser.parse_args(arguments)
    study, root = STUDIES[given.experiment](), given.results / "runs" / "simulation"
    # Seed by seed, so that an interrupted study knows something of every setting.
    every = sorted(sweep.chain(*study.values()), key=lambda config: config["seed"])
    wanted = [config for config in every if given.arm in (None, config["arm"])]
    is_grid = given.experiment in AGREEMENT
    sweep.run_in_processes(agree if is_grid else recover, wanted, root, given)
    sweep.conclude(
        given.experiment,
        every,
        functools.partial(_summarise_grid if is_grid else summarise, study=study),
        root=root,
        results=given.results,
        command=f"make bench EXPERIMENT={given.experiment}",
    )
    return 0


def _summarise_grid(
    runs: pd.DataFrame, study: Mapping[str, Sequence[Config]]
) -> dict[str, object]:
    return summarise(runs, study) | chosen(runs, study)


if __name__ == "__main__":
    # Under its importable name, so that worker processes and records find the task there.
    from smslib import benchmark

    sys.exit(benchmark.main())
