"""Extreme screens and weights: losses and gradients stay finite, single precision agrees.

``python tests/torture/numerics.py --cases N`` draws N cases from the grid; the fits and the
special cases are always all made.
"""

import argparse
import contextlib
import copy
import itertools
import json
import math
import sys
import warnings
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from smslib import evaluate, recipes
from smslib.data import Cells, Design
from smslib.model import SMSVAE
from smslib.train import TrainConfig, fit, objective

GRID = {
    "umis": (1, 10, 1_000, 100_000, 10_000_000),  # of a cell
    "theta": (1e-6, 1e-3, 1.0, 1e3, 1e6, 1e8),
    "n_genes": (1, 2, 30),
    "n_latent": (1, 4),
    "n_targets": (0, 1, 12),
    "method": ("vae", "ivae", "svae", "svae+", "sams-vae"),
    "estimator": ("expected", "sampled"),
    "newton": (False, True),
    "n_draws": (1, 3),
    "cells": ("different", "duplicated", "a gene of zeros"),
}
TOLERANCE = 1e-4  # relative difference of the ELBO in single and double precision
REFUSALS = (ValueError, FloatingPointError)


def grid(n_cases, seed=0):
    """Draw cases of the grid, each as a dict."""
    rng = np.random.default_rng(seed)
    for _ in range(n_cases):
        yield {name: values[rng.integers(len(values))] for name, values in GRID.items()}


def make(case, n_cells=12):
    """Return the cells, in double precision, and the design of a case."""
    rng = np.random.default_rng(1)
    n_genes, n_targets = case["n_genes"], case["n_targets"]
    share = rng.dirichlet(np.full(n_genes, 0.5), n_cells)
    if case["cells"] == "a gene of zeros" and n_genes > 1:
        share[:, 0] = 0.0
        share[share.sum(1) == 0, 1] = 1.0
        share /= share.sum(1, keepdims=True)
    counts = rng.multinomial(case["umis"], share)
    if case["cells"] == "duplicated":
        counts[:] = counts[0]
    design = Design.single_target([f"t{n}" for n in range(n_targets)])
    condition = torch.from_numpy(np.minimum(np.arange(n_cells), n_targets))
    return Cells(torch.from_numpy(counts).double(), condition), design


@contextlib.contextmanager
def same_draws(seed):
    """Have torch draw the same numbers in every precision."""
    generator = torch.Generator().manual_seed(seed)
    kept = {name: getattr(torch, name) for name in ("randn_like", "rand_like", "randn")}

    def drawn(name):
        def draw(*shape, **_):
            size = shape[0].shape if isinstance(shape[0], torch.Tensor) else shape
            kind = shape[0].dtype if isinstance(shape[0], torch.Tensor) else torch.float64
            plain = kept["randn"] if "randn" in name else torch.rand
            return plain(*size, generator=generator, dtype=torch.float64).to(kind)

        return draw

    try:
        for name in kept:
            setattr(torch, name, drawn(name))
        yield
    finally:
        for name, function in kept.items():
            setattr(torch, name, function)


def bound(model, cells, n_draws):
    """Return the ELBO of the cells, nats per cell, and the largest gradient."""
    model.zero_grad()
    with same_draws(3):
        loss = objective(model(cells, n_draws=n_draws), n_cells=len(cells))
    loss.backward()
    gradients = [part.grad for part in model.parameters() if part.grad is not None]
    largest = max(float(part.abs().max()) for part in gradients if part.numel())
    return -float(loss.detach()), largest


def judge(case):
    """Return the relative difference of the two precisions; raise if something is not finite."""
    cells, design = make(case)
    sparsity = 2.0 if case["method"] == "svae+" else None
    double = SMSVAE.preset(
        case["method"],
        design,
        case["n_genes"],
        n_latent=case["n_latent"],
        n_hidden=8,
        sparsity=sparsity,
        seed=0,
        estimator=case["estimator"],
        newton=case["newton"],
    )
    with torch.no_grad():
        double.log_theta.fill_(math.log(case["theta"]))
    single, double = copy.deepcopy(double), double.double()
    few = Cells(cells.counts.float(), cells.condition)
    (elbo, gradient), (reference, _) = (
        bound(model, part, case["n_draws"]) for model, part in ((single, few), (double, cells))
    )
    if not all(map(math.isfinite, (elbo, gradient, reference))):
        raise FloatingPointError(f"ELBO {elbo} ({reference} in double), gradient {gradient}")
    return abs(elbo - reference) / max(abs(reference), 1.0)


def judge_grid(n_cases, seed=0):
    """Judge cases of the grid; return flat values and what went wrong."""
    worst, bad = 0.0, []
    for case in grid(n_cases, seed):
        try:
            difference = judge(case)
        except Exception as error:  # noqa: BLE001 - the finding
            bad.append(f"{case}: {type(error).__name__}: {error}")
            continue
        worst = max(worst, difference)
        if difference > TOLERANCE:
            bad.append(f"{case}: differs by {difference:.2g}")
    return {"grid.cases": n_cases, "grid.bad": len(bad), "grid.worst_difference": worst}, bad


# ------------------------------------------------------------------------------ whole fits


def screens():
    """Yield names and screens that a fit meets rarely."""
    usual = {"umis": 300, "n_genes": 20, "n_targets": 3, "cells": "different"}
    changes = {
        "usual": {},
        "one gene": {"n_genes": 1},
        "control only": {"n_targets": 0},
        "one target": {"n_targets": 1},
        "duplicated cells": {"cells": "duplicated"},
        "a gene of zeros": {"cells": "a gene of zeros"},
        "one UMI per cell": {"umis": 1},
        "ten million UMIs per cell": {"umis": 10_000_000},
    }
    for name, change in changes.items():
        cells, design = make({**usual, **change}, n_cells=40)
        yield name, Cells(cells.counts.float(), cells.condition), design
    cells, design = make(usual, n_cells=40)
    condition = torch.zeros(40, dtype=torch.long)
    condition[:3] = torch.arange(1, 4)
    yield "one cell per perturbation", Cells(cells.counts.float(), condition), design
    yield "one cell", Cells(cells.counts[:1].float(), condition[:1]), design
    empty = cells.counts.float().clone()
    empty[0] = 0
    yield "a cell without UMIs", Cells(empty, condition), design


def judge_fits():
    """Fit every method by every recipe to every rare screen; a refusal must say why."""
    values, bad = {"fits.cases": 0, "fits.finished": 0, "fits.refused": 0}, []
    for (name, cells, design), recipe, method, n_latent in itertools.product(
        screens(), recipes.RECIPES, ("vae", "ivae", "svae", "svae+", "sams-vae"), (1, 3)
    ):
        if n_latent == 1 and (recipe != "smslib" or name not in ("usual", "one gene")):
            continue
        values["fits.cases"] += 1
        try:
            finite = _fitted(cells, design, method, recipe, n_latent)
            values["fits.finished"] += 1
        except REFUSALS as error:
            values["fits.refused"] += 1
            finite = len(str(error)) > 30
        except Exception as error:  # noqa: BLE001 - the finding
            bad.append(f"{method}, {recipe}, {name}: {type(error).__name__}: {error}")
            continue
        if not finite:
            bad.append(f"{method}, {recipe}, {name}: not finite, or no reason given")
    return values | {"fits.bad": len(bad)}, bad


def _fitted(cells, design, method, recipe, n_latent):
    model, config = recipes.build(
        cells, design, method=method, recipe=recipe, n_latent=n_latent, epochs=2
    )
    history = fit(model, cells, config, validation=cells, progress=False)
    bounds = evaluate.iwelbo(model, cells, n_draws=4)
    means = evaluate.latents(model, cells)
    parts = [history.frame()["elbo"].to_numpy(), bounds, means]
    return all(np.isfinite(part).all() for part in parts)


def judge_many_conditions(n_conditions=10_000):
    """Fit an epoch to a screen of as many conditions, each a combination of 14 targets."""
    bits = (np.arange(n_conditions)[:, None] >> np.arange(14)) & 1
    names = tuple(f"c{n}" for n in range(n_conditions))
    design = Design(names, tuple(f"t{n}" for n in range(14)), torch.from_numpy(bits).float())
    counts = torch.poisson(
        torch.full((n_conditions, 5), 3.0), generator=torch.Generator().manual_seed(0)
    )
    cells = Cells(counts + 1, torch.arange(n_conditions))
    model = SMSVAE.preset("svae+", design, 5, n_latent=3, n_hidden=8)
    history = fit(model, cells, TrainConfig(epochs=1, batch_size=2048), progress=False)
    return {"many.conditions": n_conditions, "many.finite": math.isfinite(history.rows[0]["elbo"])}


def judge_all(n_cases):
    """Return flat values and what went wrong."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values, bad = judge_grid(n_cases)
        fits, worse = judge_fits()
        values |= fits | judge_many_conditions()
    return {f"numerics.{key}": value for key, value in values.items()}, bad + worse


def main():
    """Judge, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=2000)
    values, bad = judge_all(parser.parse_args().cases)
    print(json.dumps(values, indent=1), *bad, sep="\n")
    return bool(bad)


if __name__ == "__main__":
    raise SystemExit(main())
