"""The graph along alpha: one small simulated screen, fitted at one strength after the other.

``python -m smslib.alpha_path`` runs what is missing and stores a summary.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from smslib import metrics, recipes, simulate, sweep
from smslib.data import split_cells
from smslib.evaluate import iwelbo, latents
from smslib.model import SMSVAE
from smslib.recipes import Recipe
from smslib.simulate import Mechanism, Screen
from smslib.sweep import Config
from smslib.train import fit

if TYPE_CHECKING:
    import pandas as pd

    from smslib.sweep import SupportsSubmit

__all__ = ["ALPHAS", "fit_at", "main", "study", "summarise"]

ALPHAS = (1, 3, 10, 30, 100, 200, 400, 800)
_SHARES = (0.8, 0.1, 0.1)  # of the cells: to train on, to choose the weights by, to score
_SCREEN = {"n_targets": 30, "n_latent": 5, "n_genes": 100, "n_cells": 250, "effect": 3.0}
_STEPS = 3000
_SMALL = {"n_hidden": 64, "n_hidden_encoder": 64, "n_layers_decoder": 2}
_SCORES = ("mcc", "f1", "precision", "recall", "n_edges", "nll")


def fit_at(config: Config) -> dict[str, Any]:
    """Fit sVAE+ at one alpha and return its gates and its scores.

    Parameters
    ----------
    config : dict
        ``alpha``; ``seed`` of data, split and fit; ``steps`` of the fit; of the screen
        ``n_targets``, ``n_latent``, ``n_genes``, ``n_cells`` (per target) and ``effect`` (prior
        standard deviations, around which effects scatter by 1).

    Returns
    -------
    dict
        Target by latent, row by row: ``gates`` (percent, columns in the order of the true
        latents), ``graph`` (true edges, 0 or 1) and ``size`` (of the true shifts, prior standard
        deviations). ``mcc`` over all cells; ``f1``, ``precision``, ``recall`` and ``n_edges`` of
        the graph; ``nll``, the negative IWELBO of cells that the fit has not seen (nats per
        cell); ``threshold``, the smallest shift that keeps its edge in theory (prior standard
        deviations).
    """
    screen = _screen(config)
    train, validation, unseen = split_cells(screen.cells, _SHARES, seed=config["seed"])
    model, plan = recipes.build(
        train,
        screen.design,
        recipe=_recipe(config["steps"]),
        n_latent=config["n_latent"],
        sparsity=float(config["alpha"]),
        seed=config["seed"],
    )
    fit(model, train, plan, validation=validation, progress=False)
    per_target = len(train) / config["n_targets"]
    return {
        **_found(model, screen),
        "nll": -float(iwelbo(model, unseen).mean()),
        "threshold": math.sqrt(4 * (config["alpha"] - 1) / per_target),
    }


def _recipe(steps: int) -> Recipe:
    """Return what a short fit can keep of our recipe: small networks, Adam, the plain ELBO."""
    small = recipes.RECIPES["smslib"].with_network(**_SMALL)
    return replace(small.with_train(optimizer="adam", n_draws=1, learning_rate=0.016), steps=steps)


def _screen(config: Config) -> Screen:
    return simulate.sparse_shift(
        n_cells_per_condition=config["n_cells"],
        n_targets=config["n_targets"],
        n_latent=config["n_latent"],
        n_genes=config["n_genes"],
        seed=config["seed"],
        as_released=True,
        mechanism=Mechanism(effect=config["effect"], effect_sd=1.0),
    )


def _found(model: SMSVAE, screen: Screen) -> dict[str, Any]:
    """Return gates and scores, estimated latents matched to the true ones."""
    true, estimated = screen.z.numpy(), latents(model, screen.cells)
    matching = metrics.match_latents(true, estimated)
    graph, gates = screen.graph.numpy(), model.prior.probabilities()
    scores = metrics.graph_scores(graph, gates, matching)
    ordered = gates[:, matching.cols[np.argsort(matching.rows)]]
    return {
        "gates": np.rint(100 * ordered).astype(int).ravel(),
        "graph": graph.astype(int).ravel(),
        "size": np.abs(screen.shift.numpy()[1:] * graph).astype(float).round(2).ravel(),
        "mcc": metrics.mcc(true, estimated),
        **{name: scores[name] for name in ("f1", "precision", "recall", "n_edges")},
    }


def study(root: str | os.PathLike[str], *, executor: SupportsSubmit | None = None) -> Path:
    """Run what is missing of the path and store its summary as ``alpha_path``.

    Parameters
    ----------
    root : path
        The results folder; the runs go to ``runs/alpha-path``.
    executor : optional
        As in `smslib.sweep.run`.

    Returns
    -------
    Path
        The summary's file.

    Notes
    -----
    One screen and one start per alpha, all with the same seed. Every fit starts anew: neighbors
    on the path differ by their alpha alone, and no fit continues another.
    """
    folder, wanted = Path(root) / "runs" / "alpha-path", _runs()
    sweep.run(fit_at, wanted, folder, executor=executor)
    options = {"results": root, "command": "python -m smslib.alpha_path"}
    return sweep.conclude("alpha_path", wanted, summarise, root=folder, **options)


def summarise(runs: pd.DataFrame) -> dict[str, Any]:
    """Return the path under flat keys.

    Parameters
    ----------
    runs : DataFrame
        Of `fit_at`, from `smslib.sweep.collect`.

    Returns
    -------
    dict
        Of the screen: ``n_targets``, ``n_latent``, ``n_cells``, ``graph`` and ``size``. Over the
        path, with rising ``alpha``: the scores of `fit_at`, ``threshold``, and ``n_above``, how
        many true shifts exceed it. ``gates.alpha<alpha>`` of every alpha.
    """
    path = runs.sort_values("alpha")
    first, size = path.iloc[0], np.array(path["size"].iloc[0])
    over = {name: path[name].tolist() for name in ("alpha", *_SCORES, "threshold")}
    gates = zip(path["alpha"], path["gates"], strict=True)
    return {
        **{name: int(first[name]) for name in ("n_targets", "n_latent", "n_cells")},
        **{name: list(first[name]) for name in ("graph", "size")},
        **over,
        "n_above": [int((size > threshold).sum()) for threshold in over["threshold"]],
        **{f"gates.alpha{alpha}": list(values) for alpha, values in gates},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Fit one small simulated screen at every strength of the sparsity.

    Only what is missing is run: eight fits of about fifteen seconds.
    """
    parser = argparse.ArgumentParser(prog="python -m smslib.alpha_path", description=main.__doc__)
    parser.add_argument("--results", type=Path, default=Path("book/results"), help="folder")
    sys.stdout.write(f"{study(parser.parse_args(arguments).results)}\n")
    return 0


def _runs() -> list[dict[str, Any]]:
    common = [{"seed": 0, "steps": _STEPS, **_SCREEN}]
    return sweep.product(common, sweep.axis("alpha", ALPHAS))


if __name__ == "__main__":
    # Under its importable name, so that records find the task there.
    from smslib import alpha_path

    sys.exit(alpha_path.main())
