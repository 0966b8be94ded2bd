"""The benchmark's runs: one configuration in, one flat row of scores out.

``python -m smslib.benchmark EXPERIMENT`` runs what is missing of an experiment; every run is a
file of its own, so an interrupted study resumes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import torch

from smslib import metrics, recipes, simulate, store, sweep
from smslib.data import split_cells
from smslib.evaluate import by_condition, elbo, iwelbo, latents
from smslib.model import SMSVAE
from smslib.simulate import Screen
from smslib.sweep import Config
from smslib.train import fit
from smslib.transfer import adapt

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["STUDIES", "cost", "recover", "recovery_scores", "summarise"]

N_TRAINED = 80  # interventions 0-79 are trained on, 80-99 held out, as released


def recover(config: Config) -> dict[str, float]:
    """Simulate a screen, fit a method on interventions 0-79 and score what it recovered.

    Parameters
    ----------
    config : dict
        ``method``, ``recipe``, ``seed`` (of data and weights alike, as released), ``n_cells`` per
        intervention, ``as_released`` (which simulator); optionally ``n_latent`` (15), ``sparsity``
        and ``max_epochs``.

    Returns
    -------
    dict
        `recovery_scores`, ``i_nll`` (nats per cell of held-out interventions: shifts in closed
        form from half of their cells, scored on the other half), ``validation_elbo`` (nats per
        cell), ``epochs`` and ``fit_cpu_seconds``.
    """
    screen = simulate.sparse_shift(
        n_cells_per_condition=config["n_cells"],
        n_latent=config.get("n_latent", 15),
        seed=config["seed"],
        as_released=config["as_released"],
    )
    trained = simulate.restrict(screen, screen.design.conditions[1 : N_TRAINED + 1])
    train, validation = split_cells(trained.cells, (0.9, 0.1), seed=config["seed"])
    model, schedule = recipes.build(
        train,
        trained.design,
        method=config["method"],
        recipe=config["recipe"],
        n_latent=config.get("n_latent", 15),
        sparsity=config.get("sparsity"),
        epochs=config.get("max_epochs"),
        seed=config["seed"],
    )
    start = time.process_time()
    history = fit(model, train, schedule, validation=validation)
    seconds = time.process_time() - start
    return {
        **recovery_scores(model, trained, has_gates=config["method"] in ("svae", "svae+")),
        "i_nll": _held_out_nll(model, screen),
        "validation_elbo": float(elbo(model, validation).mean()),
        "epochs": len(history.rows),
        "fit_cpu_seconds": seconds,
    }


def recovery_scores(model: SMSVAE, screen: Screen, *, has_gates: bool) -> dict[str, float]:
    """Return how well latents and graph of a simulated screen were recovered.

    Parameters
    ----------
    model : SMSVAE
    screen : Screen
        With the cells and the targets that the model was trained on.
    has_gates : bool
        Whether the model's own graph is scored, or the two largest shifts per target (the
        released rule for VAE and iVAE).

    Returns
    -------
    dict
        ``mcc``, ``mcc_spearman``, ``mcc_within`` (after removing each condition's mean), ``r2``
        (in-sample, as published), ``r2_cv`` (5-fold), the graph's ``precision``, ``recall``,
        ``f1``, ``average_precision``, ``shd``, ``n_edges``, and the same with the prefix
        ``signed_``: latents matched by signed correlation, as released.
    """
    true, estimated = screen.z.numpy(), latents(model, screen.cells)
    slab = model.prior.slab().detach().cpu().numpy()
    graph = model.prior.probabilities() if has_gates else metrics.top_k_graph(slab, 2)
    scores = {
        "mcc": metrics.mcc(true, estimated),
        "mcc_spearman": metrics.mcc(true, estimated, method="spearman"),
        "mcc_within": metrics.within_condition_mcc(true, estimated, screen.cells.condition),
        "r2": metrics.linear_r2(true, estimated),
        "r2_cv": metrics.linear_r2(true, estimated, folds=5),
    }
    for prefix, signed in (("", False), ("signed_", True)):
        matching = metrics.match_latents(true, estimated, signed=signed)
        found = metrics.graph_scores(screen.graph.numpy(), graph, matching)
        scores |= {prefix + name: value for name, value in found.items()}
    return scores


def _held_out_nll(model: SMSVAE, screen: Screen) -> float:
    """Return -IWELBO of held-out interventions, averaged over interventions, nats per cell."""
    held_out = screen.design.conditions[N_TRAINED + 1 :]
    cells = screen.cells.of(screen.design.index(held_out))
    fitted, scored = split_cells(cells, (0.5, 0.5), seed=0)
    design = model.prior.design.extend(held_out)
    adapted = adapt(model, fitted, design=design)
    table = by_condition(iwelbo(adapted, scored, n_draws=1000), scored, design)
    return -float(np.nanmean(table["mean"]))


def _headline() -> list[dict]:
    """sVAE+ by our recipe, 250 cells per intervention: the numbers the project promises."""
    return sweep.product(
        sweep.axis("as_released", [True]),
        sweep.axis("n_cells", [250]),
        sweep.axis("recipe", ["smslib"]),
        sweep.axis("method", ["svae+"]),
        sweep.axis("seed", range(5)),
    )


def _table1() -> list[dict]:
    """Table 1 of the paper: 500 cells per intervention, both recipes, every method."""
    common = sweep.product(sweep.axis("as_released", [True]), sweep.axis("n_cells", [500]))
    compared = sweep.product(
        common,
        sweep.axis("recipe", ["paper"]),
        sweep.axis("seed", range(5)),
        sweep.axis("method", ["svae+", "ivae"]),
    )
    every = sweep.product(
        common,
        sweep.axis("seed", [0]),
        sweep.axis("method", ["svae+", "svae", "ivae", "vae", "beta-vae"]),
        sweep.axis("recipe", ["paper", "smslib"]),
    )
    return sweep.chain(compared, every)


STUDIES: Mapping[str, Callable[[], list[dict]]] = MappingProxyType(
    {"headline": _headline, "table1": _table1}
)


def summarise(runs: pd.DataFrame) -> dict[str, object]:
    """Return, per recipe and method, every score's values by seed, mean, sd and maximum.

    Parameters
    ----------
    runs : DataFrame
        From `smslib.sweep.collect`.

    Returns
    -------
    dict
        ``<recipe>.<method>.seeds``, ``<recipe>.<method>.<score>`` (lists over seeds), and of each
        list ``.mean``, ``.sd`` (sample standard deviation; None for a single seed), ``.max``.
    """
    settings = {"recipe", "method", "seed", "as_released", "n_cells", "n_latent", "sparsity"}
    values: dict[str, object] = {}
    for (recipe, method), group in runs.sort_values("seed").groupby(["recipe", "method"]):
        key = f"{recipe}.{method}"
        values[f"{key}.seeds"] = group["seed"].tolist()
        for score in group.select_dtypes("number").columns.difference(list(settings)):
            if not score.startswith("provenance."):
                column = group[score]
                values[f"{key}.{score}"] = column.tolist()
                values[f"{key}.{score}.mean"] = column.mean()
                values[f"{key}.{score}.sd"] = column.std() if len(column) > 1 else None
                values[f"{key}.{score}.max"] = column.max()
    return values


def cost(runs: pd.DataFrame, command: str) -> dict[str, object]:
    """Return the provenance of a study from that of its runs: costs added up, the rest listed."""
    part = {
        name.removeprefix("provenance."): runs[name]
        for name in runs.columns
        if name.startswith("provenance.")
    }
    total = {name: float(part[name].sum()) for name in ("wall_seconds", "cpu_seconds")}
    constant = ("python", "torch", "numpy", "smslib", "device", "n_cpu", "threads", "commit")
    listed = {name: ", ".join(sorted(set(part[name].astype(str)))) for name in constant}
    return {
        **listed,
        **total,
        "command": command,
        "date": part["date"].max(),
        "dirty": bool(part["dirty"].any()),
        "n_runs": len(runs),
        "peak_memory_mb": float(part["peak_memory_mb"].max()),
        "seeds": sorted(set(runs["seed"].tolist())),
    }


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing of an experiment, one single-threaded process per worker."""
    parser = argparse.ArgumentParser(prog="python -m smslib.benchmark", description=__doc__)
    parser.add_argument("experiment", choices=sorted(STUDIES))
    parser.add_argument("--results", type=Path, default=Path("book/results"))
    parser.add_argument("--workers", type=int, default=2, help="0 only summarises what there is")
    given = parser.parse_args(arguments)
    root = given.results / "runs" / given.experiment
    if given.workers:
        with ProcessPoolExecutor(
            given.workers,
            get_context("spawn"),
            initializer=torch.set_num_threads,
            initargs=(1,),
        ) as executor:
            sweep.run(recover, STUDIES[given.experiment](), root, executor=executor)
    runs = sweep.collect(root)
    command = f"make bench EXPERIMENT={given.experiment}"
    store.put(
        given.experiment,
        summarise(runs),
        root=given.results,
        provenance=cost(runs, command),
    )
    return 0


if __name__ == "__main__":
    # Under its importable name, so that worker processes and records find the task there.
    from smslib import benchmark

    sys.exit(benchmark.main())
