"""The transfer experiment on every screen: hold perturbations out, learn their shifts, score them.

``python -m smslib.holdouts NAME`` runs what is missing of a study; every run is a file of its own,
so an interrupted study resumes. One configuration in, one flat row out, with a value for every
held-out perturbation, so that methods can be compared pair by pair.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from smslib import benchmark, gauge, lookalike, metrics, perturbseq, screens, sweep
from smslib.data import Cells, Design, first_of_each, from_anndata, split_cells
from smslib.evaluate import elbo, iwelbo, latents
from smslib.model import SMSVAE
from smslib.priors import NoSlab
from smslib.sweep import Config
from smslib.train import TrainConfig, fit
from smslib.transfer import adapt, extend, refit

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

__all__ = [
    "ARMS",
    "DATASETS",
    "FITS",
    "SIZES",
    "STUDIES",
    "Group",
    "Screen",
    "Split",
    "Truth",
    "experiment",
    "leakage",
    "ranking",
    "split",
    "summarise",
]

ARMS = ("corrected", "published")
SIZES = (
    5,
    10,
    20,
    50,
    100,
    200,
)  # cells of a held-out perturbation that its shift is learned from
_GATED = ("svae+", "svae")
# The most wanted first; the same five as in the simulations.
_ORDER = ("svae+", "ivae", "vae", "svae", "beta-vae")
_AT_ONCE = 512  # cells encoded together: Jacobians of thousands would be most of a run's memory
_GRAPH_SCORES = ("precision", "recall", "f1", "average_precision")
_NOT_SUMMARISED = ("precision_", "recall_", "average_precision_known", "average_precision_new")
_N_DRAWS = 200  # of the IWELBO: 1,000 add .01 nats on papalexi2021
_WHOLE = "\n"  # in no label: every label is a target of its own
_SMALL = {"epochs": 24, "n_latent": 10}
# A third as many cells want more epochs.
_SMALLEST = {"epochs": 144, "n_latent": 10, "training": screens.CUT}
# As measured on the look-alike: six minutes on one core. alpha = 10 keeps shifts above .5 of a
# target of 154 cells; the paper's alpha, the number of targets, would keep those above 4.2.
_LARGE = {
    **{"epochs": 13, "n_latent": 50, "sparsity": 10.0},
    "training": {"optimizer": "muon", "batch_size": 256, "encoder_share": 1.0},
}
# The same groups at a size of which many fits can be made. alpha = 4 keeps shifts above .3; on two
# screens drawn from other seeds, its validation ELBO is .02 and .03 nats above that of 10.
_FEWER = {"n_targets": 160, "n_cells": 27_000, "n_genes": 300, "n_latent": 15}
_FEW = {"epochs": 24, "n_latent": 15, "sparsity": 4.0, "training": screens.CUT}
_CONTROLS = 2_000  # where the look-alike has any: the paper kept none
FITS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "papalexi2021": _SMALL,
        "norman2019-mini": _SMALLEST,
        "look-alike-small": _FEW,
        "look-alike-small-controls": _FEW,
        "look-alike": _LARGE,
        "replogle": _LARGE,
        "norman": _LARGE,
    }
)
# What the prepared files may have been cut from.
_SOURCES = {
    "replogle": ("replogle2022-k562-gwps-scperturb", "replogle2022-k562-gwps"),
    "norman": ("norman2019",),
}


# ------------------------------------------------------------------------------ screens


@dataclass(frozen=True)
class Group:
    """Perturbations to hold out together.

    Parameters
    ----------
    held : tuple of str
        Conditions.
    dropped : tuple of str
        Conditions that are neither trained on nor scored.
    sums : dict of dict of dict
        Shifts to predict without a new parameter: by kind of prediction and held-out condition,
        the doses of targets that are known once the group has been adapted.
    """

    held: tuple[str, ...]
    dropped: tuple[str, ...] = ()
    sums: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)


class Truth(NamedTuple):
    """What a simulated screen knows of itself."""

    z: Float[Tensor, "cell latent"]
    graph: Bool[Tensor, "target latent"]


@dataclass(frozen=True, eq=False)
class Screen:
    """Cells, what was done to them, and the groups to hold out by name."""

    cells: Cells
    design: Design
    groups: Mapping[str, Group]
    truth: Truth | None = None


def _papalexi() -> Screen:
    """Return replicates 2 and 3: the pathway, as many nulls, and every target by itself."""
    adata, _ = screens.prepare()
    cells, design = from_anndata(adata, perturbation_key="target", control=perturbseq.CONTROL)
    largest = torch.bincount(cells.condition).argsort(descending=True, stable=True)
    names = [design.conditions[row] for row in largest.tolist()]
    nulls = [name for name in names if name in screens.nulls()][: len(screens.PATHWAY)]
    groups = {"ifn-gamma": Group(screens.PATHWAY), "null": Group(tuple(nulls))}
    return Screen(cells, design, groups | {name: Group((name,)) for name in design.targets})


def _norman_mini() -> Screen:
    """Return the CRISPRa screen in K562 and its CRISPRi neighbours in three glioma lines.

    ``doubles`` are those whose two targets are also perturbed singly; the gliomas are left out.
    ``glioma`` is every condition of the other lines, their controls among them;
    ``glioma-lines-known`` trains on those controls. There, a shift is predicted as that of the
    line's control alone (``context``), and as that minus the shift of the activated gene in K562
    (``reversed``).
    """
    adata = perturbseq.read("norman2019-mini")
    line, name = adata.obs["cell_type"].astype(str), adata.obs["condition"].astype(str)
    adata.obs["label"] = name.where(line == "k562", line + "/" + name)
    cells, design = from_anndata(adata, perturbation_key="label", control="control")
    glioma = tuple(name for name in design.conditions if "/" in name)
    singles = set(design.conditions) & set(design.targets)
    parts = {name: name.split("+") for name in design.conditions if "+" in name}
    parts = {name: targets for name, targets in parts.items() if singles >= set(targets)}
    sums = {"sum": {name: dict.fromkeys(targets, 1.0) for name, targets in parts.items()}}
    perturbed = [name for name in glioma if not name.endswith("/control")]
    groups = {
        "doubles": Group(tuple(parts), glioma, sums),
        "glioma": _glioma(glioma, singles),
        "glioma-lines-known": _glioma(perturbed, singles),
    }
    return Screen(cells, design, groups)


def _glioma(held: Sequence[str], singles: set[str]) -> Group:
    sums: dict[str, dict[str, dict[str, float]]] = {"context": {}, "reversed": {}}
    for name in held:
        line, target = name.split("/")
        if target in singles:
            context = {f"{line}/control": 1.0}
            sums["context"][name] = context
            sums["reversed"][name] = context | {target: -1.0}
    return Group(tuple(held), (), sums)


def _look_alike(**data: Any) -> Screen:  # noqa: ANN401 (options of screen_like)
    """Return the simulated counterpart of the Replogle subset."""
    found = lookalike.screen_like(**data)
    groups = {name: Group(tuple(targets)) for name, targets in found.pathways.items()}
    return Screen(found.cells, found.design, groups, Truth(found.z, found.graph))


def _small_look_alike(**data: Any) -> Screen:  # noqa: ANN401
    return _look_alike(**{**_FEWER, **data})


def _replogle() -> Screen:
    """Return the paper's subset, with or without controls, and its eight pathways."""
    adata = _prepared("replogle")
    cells, design = _labels_as_targets(adata)
    pathways = {name: tuple(map(str, held)) for name, held in adata.uns["pathways"].items()}
    return Screen(cells, design, {name: Group(held) for name, held in pathways.items()})


def _norman() -> Screen:
    """Return the whole screen, each double a label of its own, and the paper's 30 to hold out."""
    adata = _prepared("norman")
    cells, design = _labels_as_targets(adata)
    return Screen(cells, design, {"mmd30": Group(tuple(map(str, adata.uns["held_out"])))})


DATASETS: Mapping[str, Callable[..., Screen]] = MappingProxyType(
    {
        "papalexi2021": _papalexi,
        "norman2019-mini": _norman_mini,
        "look-alike-small": _small_look_alike,
        "look-alike-small-controls": functools.partial(_small_look_alike, controls=_CONTROLS),
        "look-alike": _look_alike,
        "replogle": _replogle,
        "norman": _norman,
    }
)


def _prepared(name: str) -> AnnData:
    """Read a screen that has been cut to what the paper used, from wherever that was cut from."""
    import anndata

    folder = perturbseq.data_dir()
    stems = [Path(perturbseq.SOURCES[source].filename).stem for source in _SOURCES[name]]
    paths = [folder / f"{stem}-prepared.h5ad" for stem in stems]
    for path in paths:
        if path.exists():
            return anndata.read_h5ad(path)
    raise FileNotFoundError(
        f"no {' or '.join(path.name for path in paths)} in {folder}; make it with: "
        f"python -m smslib.perturbseq prepare {_SOURCES[name][0]} (it is looked for where "
        "SMS_DATA_DIR says)"
    )


def _labels_as_targets(adata: AnnData) -> tuple[Cells, Design]:
    """Read a prepared screen; its control may have no cells, as the paper kept none."""
    labels, options = (
        adata.obs["target"].astype(str),
        {"perturbation_key": "target", "sep": _WHOLE},
    )
    if perturbseq.CONTROL in set(labels):
        return from_anndata(adata, control=perturbseq.CONTROL, **options)
    cells, found = from_anndata(adata, control=labels.iloc[0], **options)
    design = Design.single_target(sorted(found.conditions), control=perturbseq.CONTROL)
    return Cells(cells.counts, design.index(found.conditions)[cells.condition]), design


@functools.lru_cache(maxsize=1)
def _cached(read: Callable[..., Screen], data: str) -> Screen:
    """Read a screen once per process: many runs in a row ask for the same."""
    return read(**json.loads(data))


def _screen(config: Config) -> Screen:
    if config["dataset"] not in DATASETS:
        raise ValueError(
            f"unknown data set {config['dataset']!r}; expected one of {list(DATASETS)}"
        )
    return _cached(DATASETS[config["dataset"]], json.dumps(config.get("data", {})))


# ------------------------------------------------------------------------------ the split


class Split(NamedTuple):
    """Which cells do what; their ``counts`` are positions in the screen, one column."""

    design: Design
    """To train on."""
    larger: Design
    """With the held-out conditions at the end, each a target of its own."""
    train: Cells
    validation: Cells
    adaptation: Cells
    scoring: Cells

    @property
    def held(self) -> tuple[str, ...]:
        """Names of the held-out conditions."""
        return self.larger.conditions[self.design.n_conditions :]


def split(config: Config, screen: Screen) -> Split:
    """Say which cells train, validate, teach the new shifts and are scored.

    The labels and the seed decide, never the counts.

    Parameters
    ----------
    config : dict
        As of `experiment`.
    screen : Screen

    Returns
    -------
    Split
        ``adaptation`` is in random order, so that its first cells of a condition are any cells.

    Raises
    ------
    ValueError
        If the group is unknown, the arm is, or as `smslib.screens.leave_out`.
    """
    group, seed = _group(config, screen), config["seed"]
    positions = torch.arange(len(screen.cells), dtype=torch.float64).unsqueeze(1)
    cells, design = Cells(positions, screen.cells.condition.cpu()), screen.design
    if group.dropped:
        cells, _, _ = screens.leave_out(cells, design, group.dropped)
        design = screens.without(design, group.dropped)
    known, held, larger = screens.leave_out(cells, design, group.held)
    small = screens.without(design, group.held)
    train, validation = split_cells(known, (0.9, 0.1), seed=seed)
    adaptation = scoring = held
    if config["arm"] == "corrected":
        adaptation, scoring = split_cells(held, (0.5, 0.5), seed=seed)
    order = torch.randperm(len(adaptation), generator=torch.Generator().manual_seed(seed))
    adaptation = adaptation[order]
    if config.get("n_adapt") is not None:
        adaptation = adaptation[first_of_each(adaptation, config["n_adapt"])]
    return Split(small, larger, train, validation, adaptation, scoring)


def _group(config: Config, screen: Screen) -> Group:
    if config["arm"] not in ARMS:
        raise ValueError(f"unknown arm {config['arm']!r}; expected one of {ARMS}")
    if config["group"] not in screen.groups:
        raise ValueError(
            f"unknown group {config['group']!r}; expected one of {list(screen.groups)}"
        )
    return screen.groups[config["group"]]


def _read(screen: Screen, part: Cells, device: str) -> Cells:
    """Look the counts of a part up."""
    return Cells(screen.cells.counts[part.counts[:, 0].long()], part.condition).to(device)


# ------------------------------------------------------------------------------ one run


def experiment(config: Config) -> dict[str, Any]:
    """Hold a group of perturbations out, fit, learn their shifts, score their cells.

    Parameters
    ----------
    config : dict
        ``dataset`` (of `DATASETS`), ``group``, ``method``, ``seed``, ``fit`` (options of
        `smslib.screens.build`) and ``arm``: ``"corrected"`` learns the shifts of half of the
        held-out cells in closed form and scores the other half; ``"published"`` binarises the
        gates, refits, learns the shifts by gradients and scores the cells it learned from.
        Optionally ``n_adapt`` (cells per perturbation to learn from; the same ones are scored
        whatever it is), ``sizes`` (several such numbers, scored beside the rest),
        ``adapt_epochs`` (of the gradients), ``data`` (of the look-alike), ``device``.

    Returns
    -------
    dict
        ``perturbations``, and lists of one value for each: ``n_adapted`` and ``n_scored`` cells;
        ``iwelbo_before``, ``iwelbo_after``, ``elbo_before`` and ``elbo_after``; per stage
        ``gain_<stage>`` in IWELBO over ``before``, paired by cell, with its standard error
        ``.._sem`` (nats per cell, higher is better; None where a stage does not apply). Means
        over perturbations (at ``sizes`` over those with enough cells for the largest):
        ``i_nll_<stage>`` = -IWELBO, ``mean_gain_<stage>``, and ``mean_short_<stage>``, what it
        lacks of the gain of ``after`` on the same perturbations.

        Stages: ``before`` (no shift), ``after`` (adapted, gates open); in the corrected arm also
        ``learned`` (gates learned as well; with ``n_open_learned``), ``at_<n>`` (adapted to n
        cells) and the group's predictions without a new parameter (``sum``, ...).

        Where the truth is known, ``mcc`` of the training cells' latents and precision, recall, F1
        and average precision of the edges, of the targets trained on (``.._known``) and of those
        held out (``.._new``), in up to four readings: the gates (no suffix); for every method the
        evidence for a shift, where it exceeds what sVAE+ asks of it, from the median of the
        targets (``.._centred``) and in the sparsest axes about it (``.._rotated``, also of
        ``mcc``; `smslib.gauge`); and the same of the true latents of the same cells
        (``.._oracle``). Also ``validation_elbo`` and processor time: ``fit_cpu_seconds``,
        ``adapt_cpu_seconds`` (of the stage ``after`` alone), ``score_cpu_seconds`` (all stages)
        and ``transfer_cpu_seconds`` (all that comes between the fit and the truth).

    Raises
    ------
    FileNotFoundError
        If a large screen has not been prepared; the message has the command.
    ValueError
        If data set, group, arm or method is unknown.
    """
    screen = _screen(config)
    parts = split(config, screen)
    start = time.process_time()
    done = _fit(config, screen, parts)
    fitted = time.process_time()
    stages = _stages(config, screen, parts, done)
    scoring = _read(screen, parts.scoring, done.device)
    adapted = time.process_time()
    scores = _scores(stages, scoring, parts)
    scored = time.process_time()
    if config["arm"] == "published":
        # Its refit has trained the encoder once more: the latents of all cells are this one's.
        done = done._replace(model=stages["before"].model)
    return {
        "perturbations": list(parts.held),
        "n_adapted": _per_condition(parts, parts.adaptation),
        "n_scored": _per_condition(parts, parts.scoring),
        **scores,
        **_edges(stages, screen, parts, done, _alpha(config, parts)),
        "validation_elbo": done.validation_elbo,
        "fit_cpu_seconds": fitted - start,
        "adapt_cpu_seconds": stages["after"].cpu_seconds,
        "score_cpu_seconds": scored - adapted,
        "transfer_cpu_seconds": scored - fitted,
    }


class _Fitted(NamedTuple):
    """A model and the training behind it."""

    model: SMSVAE
    plan: TrainConfig
    train: Cells
    validation: Cells
    validation_elbo: float
    device: str


class _Stage(NamedTuple):
    """A model, and the label of each scored cell in its design."""

    model: SMSVAE
    condition: Tensor
    applies: tuple[str, ...]
    """Held-out conditions that it says something about."""
    averaged: tuple[str, ...]
    """Those of them that means are over."""
    cpu_seconds: float | None = None
    """That it took to make, where this was measured."""


def _fit(config: Config, screen: Screen, parts: Split) -> _Fitted:
    device = config.get("device", "cpu")
    train, validation = (_read(screen, part, device) for part in (parts.train, parts.validation))
    options = {"seed": config["seed"], "method": config["method"], **config["fit"]}
    model, plan = screens.build(train, parts.design, **options)
    model.to(device)
    history = fit(model, train, plan, validation=validation, progress=False)
    reached = history.rows[history.best_epoch]["validation_elbo"]
    return _Fitted(model, plan, train, validation, reached, device)


def _adapted(config: Config, screen: Screen, parts: Split, done: _Fitted) -> tuple[SMSVAE, SMSVAE]:
    """Return the model that is adapted, and what it becomes."""
    cells, model = _read(screen, parts.adaptation, done.device), done.model
    if config["arm"] == "corrected":
        return model, adapt(model, cells, design=parts.larger)
    model = refit(model, done.train, done.plan, validation=done.validation)
    plan = TrainConfig(
        epochs=config.get("adapt_epochs", 300),
        learning_rate=5e-3,
        schedule="constant",
        warmup_epochs=0,
        seed=config["seed"],
    )
    return model, adapt(model, cells, design=parts.larger, how="gradient", config=plan)


def _stages(config: Config, screen: Screen, parts: Split, done: _Fitted) -> dict[str, _Stage]:
    """Return every model that is to be scored."""
    labels, held = parts.scoring.condition, parts.held
    start = time.process_time()
    model, after = _adapted(config, screen, parts, done)
    seconds = time.process_time() - start
    stages = {
        "before": _Stage(extend(model, parts.larger), labels, held, held),
        "after": _Stage(after, labels, held, held, seconds),
    }
    if config["arm"] == "published" or isinstance(model.prior.slab, NoSlab):
        return stages
    for kind, doses in _group(config, screen).sums.items():
        stages[kind] = _predicted(after, parts, doses)
    cells = _read(screen, parts.adaptation, done.device)
    if config["method"] in _GATED:
        learned = adapt(model, cells, design=parts.larger, gates="learned")
        stages["learned"] = _Stage(learned, labels, held, held)
    return stages | _curve(model, cells, parts, config.get("sizes", ()))


def _curve(model: SMSVAE, cells: Cells, parts: Split, sizes: Sequence[int]) -> dict[str, _Stage]:
    """Adapt to fewer cells; means are over the same perturbations, whatever the size."""
    seen = dict(zip(parts.held, _per_condition(parts, parts.adaptation), strict=True))
    enough = {n: tuple(name for name in parts.held if seen[name] >= n) for n in sizes}
    stages = {}
    for n in sizes:
        fewer = adapt(model, cells[first_of_each(cells, n)], design=parts.larger)
        labels = parts.scoring.condition
        stages[f"at_{n}"] = _Stage(fewer, labels, enough[n], enough[max(sizes)])
    return stages


def _predicted(model: SMSVAE, parts: Split, doses: Mapping[str, Mapping[str, float]]) -> _Stage:
    """Give held-out conditions sums of known shifts in the place of shifts of their own."""
    known = model.prior.design.to("cpu")
    rows = torch.zeros(len(doses), known.n_targets)
    for row, sum_of in enumerate(doses.values()):
        for target, dose in sum_of.items():
            rows[row, known.targets.index(target)] = dose
    names = (*known.conditions, *(f"{name} (predicted)" for name in doses))
    larger = Design(names, known.targets, torch.cat([known.matrix, rows.to(known.matrix)]))
    place = torch.arange(known.n_conditions)
    place[known.index(list(doses))] = torch.arange(known.n_conditions, larger.n_conditions)
    labels, names = place[parts.scoring.condition], tuple(doses)
    return _Stage(extend(model, larger), labels, names, names)


def _scores(stages: Mapping[str, _Stage], scoring: Cells, parts: Split) -> dict[str, Any]:
    """Score every stage on the same cells with the same draws."""
    scores: dict[str, Any] = {}
    bounds = _bounds(stages, scoring)
    for name, stage in stages.items():
        level = _averages(_by_perturbation(bounds[name], parts, stage.applies))
        chosen = [held in stage.averaged for held in parts.held]
        scores[f"i_nll_{name}"] = -_mean(level, chosen)
        if name in ("before", "after"):  # elsewhere the gain tells it
            scores[f"iwelbo_{name}"] = level
        if name != "before":
            gain = bounds[name].astype(float) - bounds["before"]
            groups = _by_perturbation(gain, parts, stage.applies)
            scores[f"gain_{name}"] = _averages(groups)
            scores[f"gain_{name}_sem"] = _standard_errors(groups)
            scores[f"mean_gain_{name}"] = _mean(scores[f"gain_{name}"], chosen)
        if name not in ("before", "after"):
            own = _mean(scores["gain_after"], chosen)
            scores[f"mean_short_{name}"] = own - scores[f"mean_gain_{name}"]
    for name in ("before", "after"):
        values = elbo(stages[name].model, scoring)
        scores[f"elbo_{name}"] = _averages(_by_perturbation(values, parts, parts.held))
        scores[f"i_nelbo_{name}"] = -float(np.mean(scores[f"elbo_{name}"]))
    if "learned" in stages:
        graph = stages["learned"].model.prior.graph()[-len(parts.held) :]
        scores["n_open_learned"] = graph.sum(1).tolist()
        scores["mean_open_learned"] = float(np.mean(scores["n_open_learned"]))
    return scores


def _bounds(stages: Mapping[str, _Stage], scoring: Cells) -> dict[str, Float[np.ndarray, " cell"]]:
    bounds: dict[str, np.ndarray] = {}
    for name, stage in stages.items():
        if isinstance(stage.model.prior.slab, NoSlab) and bounds:
            bounds[name] = bounds["before"]  # without shifts all stages are one
            continue
        cells = Cells(scoring.counts, stage.condition.to(scoring.device))
        bounds[name] = iwelbo(stage.model, cells, n_draws=_N_DRAWS)
    return bounds


def _by_perturbation(
    values: Float[np.ndarray, " cell"], parts: Split, applies: Sequence[str]
) -> list[np.ndarray]:
    """Return the values of each held-out condition; none where the stage does not apply."""
    rows, condition = parts.larger.index(parts.held).tolist(), parts.scoring.condition.numpy()
    return [
        values[(condition == row) & (held in applies)].astype(float)
        for held, row in zip(parts.held, rows, strict=True)
    ]


def _averages(groups: Sequence[np.ndarray]) -> list[float | None]:
    return [float(group.mean()) if len(group) else None for group in groups]


def _standard_errors(groups: Sequence[np.ndarray]) -> list[float | None]:
    return [
        float(group.std(ddof=1) / len(group) ** 0.5) if len(group) > 1 else None
        for group in groups
    ]


def _mean(values: Sequence[float | None], chosen: Sequence[bool]) -> float:
    """Average over the chosen perturbations; NaN if there is none."""
    found = [value for value, keep in zip(values, chosen, strict=True) if keep]
    return float(np.mean(found)) if found else float("nan")


def _per_condition(parts: Split, cells: Cells) -> list[int]:
    counts = torch.bincount(cells.condition, minlength=parts.larger.n_conditions)
    return counts[parts.larger.index(parts.held)].tolist()


def _edges(
    stages: Mapping[str, _Stage], screen: Screen, parts: Split, done: _Fitted, alpha: float
) -> dict[str, float]:
    """Compare latents and edges with the truth, where there is one."""
    if screen.truth is None or not set(parts.held) <= set(screen.design.targets):
        return {}
    true = screen.truth.z[parts.train.counts[:, 0].long()].numpy()
    codes = latents(done.model, done.train, batch_size=_AT_ONCE)
    rows = screen.design.index(parts.larger.targets) - 1  # single targets: condition t + 1
    truth, n_known = screen.truth.graph[rows].numpy(), parts.design.n_targets
    means, n_cells = _mean_codes(stages, screen, parts, codes)
    known = (means[:n_known], n_cells[:n_known])
    rotated = gauge.sparsest(*known, alpha=alpha, thorough=False)  # as in the runs that are stored
    frames = {"_centred": gauge.centred(known[0]), "_rotated": rotated}
    asked, scores = 2 * (alpha - 1), {}
    for name, frame in frames.items():
        nats = gauge.evidence(frame.of(means), n_cells)
        turned = frame.of(codes)
        scores |= {f"mcc{name}": metrics.mcc(true, turned)}
        matching = metrics.match_latents(true, turned)
        scores |= _graph_scores(name, truth, nats, matching, n_known, threshold=asked)
    scores["mcc"] = scores.pop("mcc_centred")  # no origin changes it
    scores |= _oracle(true, parts, truth[:n_known], asked)
    if "learned" in stages:
        graph = stages["learned"].model.prior.probabilities()
        matching = metrics.match_latents(true, codes)
        scores |= _graph_scores("", truth, graph, matching, n_known)
    return scores


def _alpha(config: Config, parts: Split) -> float:
    """Return the sparsity of sVAE+ in this study, by which edges of every method are read."""
    return float(config["fit"].get("sparsity", parts.design.n_targets))


def _mean_codes(
    stages: Mapping[str, _Stage],
    screen: Screen,
    parts: Split,
    codes: Float[np.ndarray, "cell latent"],
) -> tuple[Float[np.ndarray, "target latent"], Int[np.ndarray, " target"]]:
    """Return every target's mean code and number of cells, under open gates if it was held out."""
    model = stages["after"].model
    new = latents(model, _read(screen, parts.adaptation, str(model.device)), batch_size=_AT_ONCE)
    condition = torch.cat([parts.train.condition, parts.adaptation.condition])
    return _means(np.concatenate([codes, new]), condition, parts.larger)


def _means(
    codes: Float[np.ndarray, "cell latent"], condition: Int[Tensor, " cell"], design: Design
) -> tuple[Float[np.ndarray, "target latent"], Int[np.ndarray, " target"]]:
    single = design.index(design.targets)
    return gauge.target_means(codes, condition.numpy(), single.numpy())


def _oracle(
    true: Float[np.ndarray, "cell latent"],
    parts: Split,
    truth: Bool[np.ndarray, "target latent"],
    asked: float,
) -> dict[str, float]:
    """Score the edges that the true latents of the same cells would show."""
    nats = gauge.evidence(*_means(true, parts.train.condition, parts.design))
    matching = metrics.match_latents(true, true)
    return _graph_scores("_oracle", truth, nats, matching, len(truth), threshold=asked)


def _graph_scores(
    reading: str,
    truth: Bool[np.ndarray, "target latent"],
    graph: Float[np.ndarray, "target code"],
    matching: metrics.Matching,
    n_known: int,
    threshold: float = 0.5,
) -> dict[str, float]:
    """Score the edges of the targets trained on and, if there are others, of those held out."""
    scores = {}
    for kind, part in (("known", slice(n_known)), ("new", slice(n_known, None))):
        if len(truth[part]):
            found = metrics.graph_scores(truth[part], graph[part], matching, threshold=threshold)
            scores |= {f"{name}_{kind}{reading}": found[name] for name in _GRAPH_SCORES}
    return scores


def leakage(config: Config, *, screen: Screen | None = None) -> dict[str, bool]:
    """Tell whether cells that a run scores have a part in what it scores them with.

    The run is repeated with nonsense in the place of all held-out cells, and of the scored ones
    alone; what they have no part in is the same to the last bit.

    Parameters
    ----------
    config : dict
        As of `experiment`.
    screen : Screen, optional
        In the place of the one that the configuration names.

    Returns
    -------
    dict
        ``training``: whether a held-out cell changes the trained model, its standardisation or
        the choice of its weights. ``adaptation``: whether a scored cell changes the adapted
        model. The published arm scores the cells it adapts to, so its ``adaptation`` is true.
    """
    screen = _screen(config) if screen is None else screen
    parts = split(config, screen)
    done = _fit(config, screen, parts)
    held = torch.cat([parts.adaptation.counts, parts.scoring.counts])
    other = _fit(config, _garbled(screen, held), parts)
    again = _garbled(screen, parts.scoring.counts)
    adapted = [_adapted(config, cells, parts, done)[1] for cells in (screen, again)]
    return {
        "training": not _same(done.model, other.model),
        "adaptation": not _same(*adapted),
    }


def _garbled(screen: Screen, positions: Float[Tensor, "cell 1"]) -> Screen:
    """Put nonsense that is still counts in the place of some cells."""
    rows, counts = positions[:, 0].long(), screen.cells.counts.clone()
    counts[rows] = counts[rows].flip(1) + 7
    return Screen(Cells(counts, screen.cells.condition), screen.design, screen.groups)


def _same(first: SMSVAE, second: SMSVAE) -> bool:
    others = second.state_dict()
    return all(torch.equal(value, others[name]) for name, value in first.state_dict().items())


def ranking(config: Config) -> dict[str, Any]:
    """Fit all of ``papalexi2021``; ask whether pathway targets come before null targets.

    Parameters
    ----------
    config : dict
        As of `smslib.screens.gates`: ``labels``, ``replicates``, ``seed``, ``epochs``.

    Returns
    -------
    dict
        ``average_precision_gate`` and ``average_precision_shift``: of the five targets of the
        pathway among those and the null targets, ranked by the sum of their gates' probabilities
        or by the length of their shift. ``open_share`` of all edges, ``prior_share`` that the
        prior expects (1 / (1 + alpha)), ``null_targets_open`` (of the null targets), and by
        target ``gate_mass`` and ``shift_norm`` (prior standard deviations).
    """
    found = screens.gates(config)
    targets = list(found["targets"])
    probability = np.reshape(found["probability"], (len(targets), -1))
    mass, norm = (
        probability.sum(1),
        np.linalg.norm(np.reshape(found["shift"], probability.shape), axis=1),
    )
    truth = np.isin(targets, screens.PATHWAY)
    asked = truth | np.isin(targets, screens.nulls())
    null_open = (probability.max(1) > 0.5) & asked & ~truth
    return {
        "average_precision_gate": metrics.average_precision(truth[asked], mass[asked]),
        "average_precision_shift": metrics.average_precision(truth[asked], norm[asked]),
        "open_share": float((probability > 0.5).mean()),
        "prior_share": 1.0 / (1.0 + len(targets)),
        "null_targets_open": float(null_open.sum() / (asked & ~truth).sum()),
        "targets": targets,
        "gate_mass": mass.tolist(),
        "shift_norm": norm.tolist(),
    }


def run(config: Config) -> dict[str, Any]:
    """Do whichever of `experiment` and `ranking` a configuration of `STUDIES` asks for."""
    return (ranking if config["arm"] == "gates" else experiment)(config)


# ------------------------------------------------------------------------------ the studies

_OTHERS = ("BRD4", "CUL3", "SMAD4", "STAT2")  # neither of the pathway nor nulls
_PATHWAYS = (
    *("exosome", "spliceosome", "mediator_complex", "nucleotide_excision_repair"),
    *("s40_ribosomal_unit", "s39_ribosomal_unit", "s60_ribosomal_unit"),
    "mt_protein_translocation",
)


def _runs(
    dataset: str,
    groups: Sequence[str],
    seeds: Sequence[int],
    arm: str = "corrected",
    **more: object,
) -> list[dict[str, Any]]:
    """Return every group by every method, seed after seed."""
    common = [{"dataset": dataset, "arm": arm, "fit": dict(FITS[dataset]), **more}]
    each = (sweep.axis("seed", seeds), sweep.axis("method", _ORDER), sweep.axis("group", groups))
    return sweep.product(common, *each)


def _papalexi_study() -> list[dict[str, Any]]:
    """Hold out the pathway, a group of nulls, every target by itself; and fit all of them."""
    dataset, singles = "papalexi2021", (*screens.PATHWAY, *_OTHERS, *screens.nulls())
    fit_all = {"dataset": dataset, "arm": "gates", "method": "svae+", "epochs": _SMALL["epochs"]}
    labels = sweep.zip_(
        sweep.axis("group", ("true", "shuffled")), sweep.axis("labels", ("true", "shuffled"))
    )
    replicates = [{"replicates": list(screens.REPLICATES)}]
    return sweep.chain(
        _runs(dataset, ("ifn-gamma",), range(10), sizes=list(SIZES)),
        sweep.product([fit_all], replicates, sweep.axis("seed", range(10)), labels),
        _runs(dataset, ("null",), range(10)),
        _runs(dataset, ("ifn-gamma",), range(5), "published"),
        _runs(dataset, singles, range(10)),
    )


def _norman_mini_study() -> list[dict[str, Any]]:
    """Hold out doubles given the singles, and another kind of perturbation in other lines."""
    sizes = [size for size in SIZES if size <= 50]
    groups = ("doubles", "glioma-lines-known", "glioma")
    return _runs("norman2019-mini", groups, range(5), sizes=sizes)


def _look_alike_study(dataset: str = "look-alike") -> list[dict[str, Any]]:
    """Hold out the eight groups that stand for the paper's pathways."""
    return _runs(dataset, tuple(lookalike.PATHWAYS), range(5))


def _replogle_study() -> list[dict[str, Any]]:
    """Hold out the paper's eight pathways, corrected and as published."""
    return sweep.chain(
        _runs("replogle", _PATHWAYS, range(5)), _runs("replogle", _PATHWAYS, range(5), "published")
    )


def _norman_study() -> list[dict[str, Any]]:
    """Hold out the interventions that differ most from controls, corrected and as published."""
    groups = ("mmd30",)
    return sweep.chain(
        _runs("norman", groups, range(5)), _runs("norman", groups, range(5), "published")
    )


STUDIES: Mapping[str, Callable[[], list[dict[str, Any]]]] = MappingProxyType(
    {
        "papalexi": _papalexi_study,
        "norman-mini": _norman_mini_study,
        "look-alike-small": functools.partial(_look_alike_study, "look-alike-small"),
        "look-alike-small-controls": functools.partial(
            _look_alike_study, "look-alike-small-controls"
        ),
        "look-alike": _look_alike_study,
        "replogle": _replogle_study,
        "norman": _norman_study,
    }
)


# ------------------------------------------------------------------------------ the summary


def summarise(runs: pd.DataFrame, study: Sequence[Config]) -> dict[str, Any]:
    """Return a study's numbers under flat keys.

    Parameters
    ----------
    runs : DataFrame
        From `smslib.sweep.collect`; runs of other studies are left out.
    study : sequence of dict
        Of one data set, as in `STUDIES`.

    Returns
    -------
    dict
        ``<dataset>.<arm>.<group>.<method>.<score>`` (lists over seeds) with ``.mean``, ``.sd``,
        ``.low``, ``.high`` (95 % t interval) and ``.n``, as `smslib.benchmark.summarise`;
        ``.perturbations`` and, of IWELBO, gains and numbers, ``.<score>.each`` (a value for each
        perturbation, mean over seeds).

        ``<dataset>.<arm>.<group>.<method>-<other>.<unit>.<statistic>``: what sVAE+ gains over
        another method in IWELBO after adaptation, nats per cell, paired over ``seeds`` (means
        over perturbations) and over ``perturbations`` (means over seeds), by
        `smslib.metrics.paired_signs`, with ``p_holm``, the sign-flip p-value corrected for the
        number of groups. The group ``singles`` has all perturbations that were held out alone.
        Of the edges only F1 is there; precision, recall and average precision are in the runs.
    """
    runs = sweep.of_study(runs, study).sort_values("seed")
    runs = runs.drop(columns=[name for name in runs if name.startswith(_NOT_SUMMARISED)])
    dataset, groups = study[0]["dataset"], dict.fromkeys(config["group"] for config in study)
    by_group = {name: [c for c in study if c["group"] == name] for name in groups}
    values = benchmark.summarise(runs, by_group)
    held_out = runs[runs["arm"].isin(ARMS)]
    for (arm, group, method), some in held_out.groupby(["arm", "group", "method"], sort=False):
        values |= _each(f"{arm}.{group}.{method}", some)
    for arm, some in held_out.groupby("arm", sort=False):
        values |= {f"{arm}.{key}": value for key, value in _comparisons(some).items()}
    return {f"{dataset}.{key}": value for key, value in values.items()}


def _each(key: str, runs: pd.DataFrame) -> dict[str, Any]:
    """Average every score with a value per perturbation over the seeds."""
    names = runs["perturbations"].iloc[0]
    scores = [
        name
        for name in runs
        if name.startswith(("iwelbo_", "gain_", "n_"))
        and not name.endswith("_sem")
        and _is_list(runs[name].iloc[0])
    ]
    tables = {name: np.array(runs[name].tolist(), dtype=float) for name in scores}
    means = {name: table.mean(0) for name, table in tables.items()}
    found = {f"{key}.{name}.each": _or_none(mean) for name, mean in means.items()}
    return {f"{key}.perturbations": list(names), **found}


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _or_none(values: Float[np.ndarray, " perturbation"]) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]


def _comparisons(runs: pd.DataFrame) -> dict[str, Any]:
    """Compare sVAE+ with every other method, group by group."""
    values: dict[str, Any] = {}
    for other in [name for name in _ORDER[1:] if (runs["method"] == name).any()]:
        for unit in ("seeds", "perturbations"):
            tests = _tests(runs, other, unit)
            corrected = metrics.holm([test.p_sign_flip for test in tests.values()])
            for (group, test), p_holm in zip(tests.items(), corrected, strict=True):
                named = test._asdict() | {"p_holm": float(p_holm)}
                key = f"{group}.svae+-{other}.{unit}"
                values |= {f"{key}.{name}": _finite(value) for name, value in named.items()}
    return values


def _finite(value: float | int) -> float | int | None:
    return None if np.isnan(value) else value


def _tests(runs: pd.DataFrame, other: str, unit: str) -> dict[str, metrics.PairedSigns]:
    """Return the test of every group in which both methods have runs.

    Held-out single targets are tested together as well, where they have the same seeds.
    """
    import pandas as pd

    tables = {group: _gap(some, other) for group, some in runs.groupby("group", sort=False)}
    tables = {group: gap for group, gap in tables.items() if gap.size}
    singles = [gap for gap in tables.values() if gap.shape[1] == 1]
    if len(singles) > 1 and all(gap.index.equals(singles[0].index) for gap in singles):
        tables["singles"] = pd.concat(singles, axis=1)
    axis = 1 if unit == "seeds" else 0
    gaps = {group: gap.to_numpy().mean(axis) for group, gap in tables.items()}
    return {
        group: metrics.paired_signs(gap, np.zeros_like(gap))
        for group, gap in gaps.items()
        if len(gap) > 1
    }


def _gap(runs: pd.DataFrame, other: str) -> pd.DataFrame:
    """Subtract another method's IWELBO from that of sVAE+, for the seeds that both have.

    A row per seed, a column per perturbation.
    """
    import pandas as pd

    ours, theirs = (
        runs[runs["method"] == name].set_index("seed")["iwelbo_after"] for name in ("svae+", other)
    )
    both = ours.index.intersection(theirs.index).sort_values()
    first, second = (np.array(part.loc[both].tolist(), dtype=float) for part in (ours, theirs))
    return pd.DataFrame(first - second, index=both)


# ------------------------------------------------------------------------------ command line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing of a study, one single-threaded process per worker."""
    parser = argparse.ArgumentParser(prog="python -m smslib.holdouts", description=__doc__)
    parser.add_argument("study", choices=list(STUDIES))
    parser.add_argument("--group", help="run this group alone")
    sweep.add_arguments(parser)
    given = parser.parse_args(arguments)
    study = STUDIES[given.study]()
    root = given.results / "runs" / f"holdouts-{given.study}"
    wanted = [config for config in study if given.group in (None, config["group"])]
    if not wanted:
        groups = list(dict.fromkeys(config["group"] for config in study))
        parser.error(f"no group {given.group!r} in this study; expected one of {groups}")
    sweep.run_in_processes(run, wanted, root, given)
    sweep.conclude(
        f"holdouts-{given.study}",
        study,
        functools.partial(summarise, study=study),
        root=root,
        results=given.results,
        command=f"python -m smslib.holdouts {given.study}",
    )
    return 0


if __name__ == "__main__":
    # Under its importable name, so that worker processes and records find the task there.
    from smslib import holdouts

    sys.exit(holdouts.main())
