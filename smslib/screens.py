"""A case study on a real screen (Papalexi et al. 2021): which gates open, and what transfers.

The counterpart of `smslib.benchmark` where no truth is attached. What should be found is known
from biology (the interferon-gamma pathway), what should not from null targets and from shuffled
labels. One configuration in, one flat row out; `study` runs what is missing and stores a summary.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Shaped

from smslib import metrics, perturbseq, recipes, store, sweep
from smslib.data import Cells, Design, from_anndata, split_cells
from smslib.evaluate import iwelbo, latents
from smslib.model import SMSVAE
from smslib.sweep import Config
from smslib.train import History, TrainConfig, fit
from smslib.transfer import adapt, extend

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

    from smslib.sweep import SupportsSubmit

__all__ = [
    "CUT",
    "PATHWAY",
    "REPLICATES",
    "Fitted",
    "build",
    "fit_labels",
    "fit_screen",
    "gates",
    "leave_out",
    "nulls",
    "prepare",
    "replicate_correlation",
    "shifts",
    "shuffle_labels",
    "study",
    "summarise",
    "transfer",
    "transfer_scores",
    "without",
]

PATHWAY = perturbseq.pathways()["ifn-gamma"].genes
REPLICATES = ("rep_2", "rep_3")  # rep_1 differs from both in depth and expression
# Training where genes have hundreds of UMIs per cell: they make the learning rate too large if
# the gradient is not cut. What it is cut at is meant for a loss per cell.
CUT = {"max_grad_norm": 10.0, "loss_scale": "cell"}
_N_LATENT = 10
_ALIKE = PATHWAY[:4]  # IRF1, the fifth, acts downstream and shares only part of the response
_DONOR = "CD86"  # the null target with most cells
_N_DRAWS = 200
_EPOCHS = 24
_BATCH = 128  # cells


def prepare(
    *, replicates: Sequence[str] = REPLICATES
) -> tuple[AnnData, Mapping[str, pd.DataFrame]]:
    """Read the screen, call its guides, filter it and keep the named replicates.

    Parameters
    ----------
    replicates : sequence of str

    Returns
    -------
    adata : AnnData
        Raw UMIs with ``obs["target"]`` and ``obs["replicate"]``.
    ledgers : dict of DataFrame
        What guide assignment (``"guides"``) and filter (``"filter"``) dropped.
    """
    called, guides = perturbseq.assign_guides(perturbseq.read("papalexi2021"), threshold=0.8)
    kept, dropped = perturbseq.filter_screen(called, min_umis=50, min_cells=100, min_detected=50)
    chosen = kept[kept.obs["replicate"].isin(list(replicates))].copy()
    chosen.obs["replicate"] = chosen.obs["replicate"].cat.remove_unused_categories()
    return chosen, {"guides": guides, "filter": dropped}


def fit_screen(
    cells: Cells,
    design: Design,
    *,
    epochs: int,
    seed: int = 0,
    method: str = "svae+",
    training: Mapping[str, object] | None = None,
) -> tuple[SMSVAE, History]:
    """Fit a method to a real screen by our recipe, with the paper's advice for the sparsity.

    Parameters
    ----------
    cells : Cells
        A tenth of them validate.
    design : Design
    epochs : int
    seed : int
        Of the split, the initial weights, the batches and the draws.
    method : str
        As in `smslib.recipes.build`.
    training : dict, optional
        As in `build`.

    Returns
    -------
    model : SMSVAE
    history : History
    """
    train, validation = split_cells(cells, (0.9, 0.1), seed=seed)
    options = {"epochs": epochs, "method": method, "training": training}
    model, config = build(train, design, seed=seed, **options)
    return model, fit(model, train, config, validation=validation, progress=False)


def build(
    cells: Cells,
    design: Design,
    *,
    epochs: int,
    seed: int = 0,
    method: str = "svae+",
    n_latent: int = _N_LATENT,
    sparsity: float | None = None,
    training: Mapping[str, object] | None = None,
) -> tuple[SMSVAE, TrainConfig]:
    """Return an untrained model for a real screen, and how to train it.

    Parameters
    ----------
    cells : Cells
        The training cells.
    design : Design
    epochs : int
    seed : int
        Of the initial weights, the batches and the draws.
    method : str
        As in `smslib.recipes.build`.
    n_latent : int
    sparsity : float, optional
        alpha; the number of targets by default, as the paper advises.
    training : dict, optional
        Other fields of `smslib.train.TrainConfig` than those of the small screens.

    Returns
    -------
    model : SMSVAE
    config : TrainConfig

    Notes
    -----
    The recipe is "screen" of `smslib.recipes`: the one of the simulations would shut most real
    edges. sVAE is given the strength with the same threshold as sVAE+.
    """
    strength = None if sparsity is None else recipes.strength_at(sparsity, method)
    options = {"n_latent": n_latent, "sparsity": strength, "seed": seed, "epochs": epochs}
    model, config = recipes.build(cells, design, method=method, recipe="screen", **options)
    return model, replace(config, **{"batch_size": _BATCH, **(training or {})})


def nulls() -> tuple[str, ...]:
    """Return the targets whose cells nothing tells from controls: their gates must stay shut."""
    return perturbseq.pathways()["papalexi2021-null"].genes


def shuffle_labels(cells: Cells, *, seed: int) -> Cells:
    """Return the cells with their conditions permuted, so that no condition has an effect."""
    order = torch.randperm(len(cells), generator=torch.Generator().manual_seed(seed))
    return Cells(cells.counts, cells.condition[order.to(cells.device)])


def shifts(model: SMSVAE) -> Float[np.ndarray, "target latent"]:
    """Return each target's shift through its open gates, prior standard deviations."""
    with torch.no_grad():
        return (model.prior.graph() * model.prior.slab()).cpu().numpy()


def replicate_correlation(
    codes: Float[np.ndarray, "cell latent"], replicate: Shaped[np.ndarray, " cell"]
) -> Float[np.ndarray, " latent"]:
    """Return each latent's largest absolute correlation with membership in a replicate.

    Parameters
    ----------
    codes : array, (n_cells, n_latent)
        Of control cells, so that no perturbation is mistaken for a replicate.
    replicate : array of str, (n_cells,)

    Raises
    ------
    ValueError
        If cells have no replicate, or there are fewer than two.
    """
    import pandas as pd

    replicate = np.asarray(replicate)
    missing = pd.isna(replicate)
    if missing.any() or len(set(replicate.tolist())) < 2:
        raise ValueError(
            f"{int(missing.sum())} of {len(replicate)} cells have no replicate, the others are of "
            f"{np.unique(replicate[~missing]).tolist()[:5]}; expected two or more, one for each "
            "cell: of a single one nothing can be told"
        )
    member = np.stack([replicate == name for name in np.unique(replicate)], 1)
    return np.abs(metrics.correlations(codes, member.astype(float))).max(1)


def leave_out(
    cells: Cells, design: Design, held: str | Sequence[str]
) -> tuple[Cells, Cells, Design]:
    """Split off the cells of some conditions, and move those to the end of the design.

    Parameters
    ----------
    cells : Cells
    design : Design
    held : str or sequence of str
        Conditions, each of which becomes a target of its own: a held-out combination is to be
        told from the sum of its parts.

    Returns
    -------
    known, held : Cells
        Labelled by the new design.
    larger : Design
        ``larger.conditions[: -len(held)]`` are those to train on.

    Raises
    ------
    KeyError
        If a condition is unknown.
    ValueError
        If nothing is held out, the control is, or no perturbation is left to train on; if a
        condition repeats; if a combination that is kept perturbs a target held out; or if a
        condition that is kept has the same targets and doses as one held out.
    """
    names = [held] if isinstance(held, str) else list(held)
    rows = design.index(names)
    known = without(design, names)
    larger = known.extend(names)
    place = torch.full((design.n_conditions,), -1)
    kept = [name for name in design.conditions if name not in set(names)]
    place[design.index(kept)] = torch.arange(len(kept))
    place[rows] = torch.arange(len(kept), larger.n_conditions)
    moved = Cells(cells.counts, place.to(cells.device)[cells.condition])
    is_held = moved.condition >= known.n_conditions
    return moved[~is_held], moved[is_held], larger


def without(design: Design, held: Sequence[str]) -> Design:
    """Return the design of the other conditions, and of the targets that these perturb.

    Parameters
    ----------
    design : Design
    held : sequence of str
        Conditions to leave out.

    Raises
    ------
    KeyError, ValueError
        As `leave_out`.
    """
    rows = design.index(held).tolist()
    kept = [row for row in range(design.n_conditions) if row not in set(rows)]
    if not rows or 0 in rows or len(kept) == 1 or len(set(rows)) < len(rows):
        raise ValueError(
            f"holding out {list(held)} leaves {len(kept) - (0 not in rows)} perturbations of "
            f"{design.n_conditions - 1} to train on; expected some of them, each once, and not "
            f"the control {design.conditions[0]!r}"
        )
    _check_other_names(design, rows, kept)
    matrix = design.matrix[kept]
    touched = matrix.ne(0).any(0).tolist()
    targets = [name for name, keep in zip(design.targets, touched, strict=True) if keep]
    again = sorted(set(targets) & set(held))
    if again:
        raise ValueError(
            f"{again} are held out, but combinations that are kept perturb them; hold those out "
            "as well"
        )
    names = tuple(design.conditions[row] for row in kept)
    return Design(names, tuple(targets), matrix[:, torch.tensor(touched)])


def _check_other_names(design: Design, held: Sequence[int], kept: Sequence[int]) -> None:
    """Refuse to train on what is held out under another name, such as B+A for A+B."""
    twins = [
        f"{design.conditions[out]!r} as {design.conditions[row]!r}"
        for out in held
        for row in kept
        if torch.equal(design.matrix[out], design.matrix[row])
    ]
    if twins:
        raise ValueError(
            f"held out, and yet trained on under another name: {', '.join(twins)}; hold both out, "
            "or give these cells one label"
        )


def transfer_scores(
    model: SMSVAE,
    scoring: Cells,
    *,
    design: Design,
    donors: Mapping[str, Cells],
    n_draws: int = _N_DRAWS,
    seed: int = 0,
) -> dict[str, Float[np.ndarray, " cell"]]:
    """Score the cells of a held-out target under shifts learned from several sets of cells.

    Parameters
    ----------
    model : SMSVAE
        Trained without the last condition of ``design``.
    scoring : Cells
        Cells of that condition.
    design : Design
    donors : dict of Cells
        Cells to learn the shift from, whatever their label: the target's own, those of another
        target, ...
    n_draws : int
        Of the IWELBO.
    seed : int
        Of its draws, the same for all, so that differences are paired.

    Returns
    -------
    dict of array, (n_cells,)
        IWELBO in nats: ``"none"`` without a shift, and one entry per donor.
    """
    row = design.n_conditions - 1
    models = {"none": extend(model, design)}
    for name, cells in donors.items():
        relabelled = Cells(cells.counts, torch.full_like(cells.condition, row))
        models[name] = adapt(model, relabelled, design=design)
    return {
        name: iwelbo(adapted, scoring, n_draws=n_draws, seed=seed)
        for name, adapted in models.items()
    }


# -------------------------------------------------------------------------------- the study


@dataclass(frozen=True, eq=False)
class Fitted:
    """A model of the real screen, and what it was fitted to.

    Parameters
    ----------
    model : SMSVAE
    cells : Cells
        With the labels of the fit, shuffled ones perhaps.
    design : Design
    genes : tuple of str, length n_genes
    replicate_r : array, (n_latent,)
        `replicate_correlation` among the controls.
    validation_elbo : float
        Nats per cell, of the weights that were kept.
    """

    model: SMSVAE
    cells: Cells
    design: Design
    genes: tuple[str, ...]
    replicate_r: Float[np.ndarray, " latent"]
    validation_elbo: float


def fit_labels(config: Config) -> Fitted:
    """Fit the real screen with its true labels or with shuffled ones.

    Parameters
    ----------
    config : dict
        ``labels`` ("true" or "shuffled"), ``replicates``, ``seed``, ``epochs``.
    """
    adata, _ = prepare(replicates=config["replicates"])
    cells, design = from_anndata(adata, perturbation_key="target", control=perturbseq.CONTROL)
    if config["labels"] == "shuffled":
        cells = shuffle_labels(cells, seed=config["seed"])
    model, history = fit_screen(cells, design, seed=config["seed"], epochs=config["epochs"])
    control = cells.condition.numpy() == 0
    replicate = adata.obs["replicate"].to_numpy()[control]
    return Fitted(
        model=model,
        cells=cells,
        design=design,
        genes=tuple(adata.var_names),
        replicate_r=replicate_correlation(latents(model, cells)[control], replicate),
        validation_elbo=history.rows[history.best_epoch]["validation_elbo"],
    )


def gates(config: Config) -> dict[str, Any]:
    """Fit the screen and return its gates.

    Parameters
    ----------
    config : dict
        As of `fit_labels`.

    Returns
    -------
    dict
        ``targets`` and their ``cells``; ``probability`` and ``shift`` (prior standard deviations,
        zero where the gate is shut), row by row; ``replicate_r`` of each latent among controls;
        ``validation_elbo`` (nats per cell).
    """
    fitted = fit_labels(config)
    return {
        "targets": fitted.design.targets,
        "cells": torch.bincount(fitted.cells.condition)[1:].numpy(),
        "probability": fitted.model.prior.probabilities().ravel(),
        "shift": shifts(fitted.model).ravel(),
        "replicate_r": fitted.replicate_r,
        "validation_elbo": fitted.validation_elbo,
    }


def transfer(config: Config) -> dict[str, Any]:
    """Fit the screen without one target, learn its shift from half of its cells, score the rest.

    Parameters
    ----------
    config : dict
        ``target``, ``method``, ``replicates``, ``seed``, ``epochs``.

    Returns
    -------
    dict
        ``iwelbo`` without a shift (nats per cell); what a shift adds to it, paired over cells,
        when learned from the target's own cells (``gain_own``), from a pathway mate's
        (``gain_mate``) or from a null target's (``gain_null``), each with its standard error
        ``.._sem``; ``cosine`` of own shift and the mate's; ``n_scored`` cells.
    """
    adata, _ = prepare(replicates=config["replicates"])
    cells, design = from_anndata(adata, perturbation_key="target", control=perturbseq.CONTROL)
    known, held, larger = leave_out(cells, design, config["target"])
    small = Design.single_target(larger.targets[:-1], control=larger.conditions[0])
    model, _ = fit_screen(
        known, small, seed=config["seed"], epochs=config["epochs"], method=config["method"]
    )
    own, scoring = split_cells(held, (0.5, 0.5), seed=config["seed"])
    mate = next(name for name in PATHWAY if name != config["target"])
    donors = {
        "own": own,
        "mate": known.of(larger.index([mate])),
        "null": known.of(larger.index([_DONOR])),
    }
    scores = transfer_scores(model, scoring, design=larger, donors=donors, seed=config["seed"])
    adapted = shifts(adapt(model, own, design=larger))
    return {
        "iwelbo": float(scores["none"].mean()),
        **_gains(scores),
        "cosine": metrics.cosine(adapted[-1], shifts(model)[small.targets.index(mate)]),
        "n_scored": len(scoring),
    }


def study(root: str | os.PathLike[str], *, executor: SupportsSubmit | None = None) -> Path:
    """Run what is missing of the study and store its summary as ``papalexi``.

    Parameters
    ----------
    root : path
        The results folder; the runs go to ``runs/papalexi-gates`` and ``runs/papalexi-transfer``.
    executor : optional
        As in `smslib.sweep.run`.

    Returns
    -------
    Path
        The summary's file.
    """
    folder = Path(root) / "runs"
    sweep.run(gates, _gate_runs(), folder / "papalexi-gates", executor=executor)
    sweep.run(transfer, _transfer_runs(), folder / "papalexi-transfer", executor=executor)
    fitted, moved = (sweep.collect(folder / f"papalexi-{part}") for part in ("gates", "transfer"))
    import pandas as pd

    cost = sweep.cost(pd.concat([fitted, moved]), "smslib.screens.study")
    return store.put("papalexi", summarise(fitted, moved), root=root, provenance=cost)


def summarise(fitted: pd.DataFrame, moved: pd.DataFrame) -> dict[str, Any]:
    """Return the study's numbers under flat keys.

    Parameters
    ----------
    fitted, moved : DataFrame
        The runs of `gates` and of `transfer`, from `smslib.sweep.collect`.

    Returns
    -------
    dict
        ``targets`` and ``cells``. Per kind of gate runs (``true``, ``shuffled``,
        ``all-replicates``): ``<kind>.seeds`` and, by seed, ``.open_pathway`` and ``.open_null``
        (targets with an open gate), ``.open_edges``, ``.cosine`` (mean over pairs of the shifts
        of IFNGR1, IFNGR2, JAK2, STAT1), ``.replicate_r`` (of the worst latent),
        ``.validation_elbo``; ``<kind>.largest.<target>`` (its most open gate).
        Per target and method of transfer runs: ``transfer.<method>.<target>.<score>``.
    """
    kinds = fitted["labels"].where(fitted["replicates"].str.len() < 3, "all-replicates")
    first = fitted.iloc[int(np.argmax(kinds == "true"))]
    values = {"targets": first["targets"], "cells": first["cells"]}
    for kind, runs in fitted.sort_values("seed").groupby(kinds):
        values |= {f"{kind}.{key}": value for key, value in _gate_summary(runs).items()}
    for (method, target), runs in moved.sort_values("seed").groupby(["method", "target"]):
        scores = [name for name in runs if name.startswith(("iwelbo", "gain", "cosine", "seed"))]
        values |= {f"transfer.{method}.{target}.{name}": runs[name].tolist() for name in scores}
    return values


def _gate_runs() -> list[dict[str, Any]]:
    common = [{"epochs": _EPOCHS}]
    labels = sweep.axis("labels", ["true", "shuffled"])
    study = sweep.product(
        common, [{"replicates": list(REPLICATES)}], sweep.axis("seed", range(5)), labels
    )
    every = [{"replicates": ["rep_1", *REPLICATES], "seed": 0, "labels": "true"}]
    return sweep.chain(study, sweep.product(common, every))


def _transfer_runs() -> list[dict[str, Any]]:
    common = [{"replicates": list(REPLICATES), "epochs": _EPOCHS}]
    targets = sweep.axis("target", PATHWAY)
    ours = sweep.product(common, sweep.axis("seed", range(2)), targets, [{"method": "svae+"}])
    baseline = sweep.product(common, [{"seed": 0, "method": "vae"}], targets)
    return sweep.chain(ours, baseline)


def _gate_summary(runs: pd.DataFrame) -> dict[str, Any]:
    """Return the numbers of one kind of gate runs, lists over seeds."""
    targets = runs.iloc[0]["targets"]
    shape = (len(runs), len(targets), -1)
    probability = np.array(runs["probability"].tolist()).reshape(shape)
    moved = np.array(runs["shift"].tolist()).reshape(shape)
    largest = probability.max(-1)
    alike = [targets.index(name) for name in _ALIKE]
    return {
        "seeds": runs["seed"].tolist(),
        "open_pathway": _n_open(largest, targets, PATHWAY),
        "open_null": _n_open(largest, targets, nulls()),
        "open_edges": (probability > 0.5).sum((1, 2)),
        "cosine": [_mean_cosine(run[alike]) for run in moved],
        "replicate_r": [max(values) for values in runs["replicate_r"]],
        "validation_elbo": runs["validation_elbo"].tolist(),
        **{f"largest.{name}": column for name, column in zip(targets, largest.T, strict=True)},
    }


def _n_open(
    largest: Float[np.ndarray, "run target"], targets: Sequence[str], chosen: Sequence[str]
) -> list[int]:
    columns = [targets.index(name) for name in chosen]
    return (largest[:, columns] > 0.5).sum(1).tolist()


def _gains(scores: Mapping[str, Float[np.ndarray, " cell"]]) -> dict[str, float]:
    """Return mean and standard error of what each donor's shift adds, paired over cells."""
    gains = {}
    for name in list(scores)[1:]:
        difference = scores[name].astype(float) - scores["none"]
        gains[f"gain_{name}"] = float(difference.mean())
        gains[f"gain_{name}_sem"] = float(difference.std(ddof=1) / len(difference) ** 0.5)
    return gains


def _mean_cosine(rows: Float[np.ndarray, "target latent"]) -> float:
    return float(np.mean([metrics.cosine(a, b) for a, b in itertools.combinations(rows, 2)]))
