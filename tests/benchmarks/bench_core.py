"""How fast the core is: ratios taken in one run, medians after a warm-up.

``python tests/benchmarks/bench_core.py [--out book/results]``

A ratio compares two things on the same machine in the same minute, so that it survives a busy or
a slow machine better than seconds do. Contestants take turns, round by round.
"""

import argparse
import json
import math
import os
import pkgutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch

import smslib
from smslib import recipes, simulate, store
from smslib.data import Cells, minibatches, seeded
from smslib.distributions import NegativeBinomial, gaussian_log_prob
from smslib.evaluate import iwelbo
from smslib.model import SMSVAE
from smslib.replicates import fit_replicates
from smslib.train import TrainConfig, fit

N_DRAWS, BATCH, N_REPLICATES = 1000, 128, 8
SLOW_DRAWS = 2  # of the slow way, whose cost is proportional to its draws
MOST_LOAD = 1.0
TIMERS = {"wall": time.perf_counter, "cpu": time.process_time}


def bound_draw_by_draw(model: SMSVAE, cells: Cells, n_draws: int) -> np.ndarray:
    """Return the IWELBO as the released code does: encode and decode anew for every draw."""
    bounds = []
    with torch.inference_mode():
        for batch in minibatches(cells, BATCH):
            weights = []
            for _ in range(n_draws):
                q = model.encode(batch.counts)
                z = q.mean + q.variance.sqrt() * torch.randn_like(q.mean)
                log_x = model.decode(z, batch.library).log_prob(batch.counts).sum(-1)
                log_prior = model.prior.log_prob(z, batch.condition)
                weights.append(log_x + log_prior - gaussian_log_prob(z, *q))
            bounds.append(torch.stack(weights).logsumexp(0) - math.log(n_draws))
    return torch.cat(bounds).numpy()


def products_alone(model: SMSVAE, n_cells: int, n_draws: int) -> None:
    """Do the matrix products of a decoder's draws and nothing else: what no way can do without."""
    parts = [part for part in (*model.decoder, model.genes) if isinstance(part, torch.nn.Linear)]
    inputs = [torch.randn(n_draws, part.in_features) for part in parts]
    with torch.inference_mode():
        for _ in range(n_cells):
            for x, part in zip(inputs, parts, strict=True):
                torch.mm(x, part.weight.t())


def textbook_log_prob(x: torch.Tensor, log_mean: torch.Tensor, log_theta: torch.Tensor):
    """Return the log-pmf with lgamma, through autograd, as usual and as imprecise in float32."""
    mean, theta = log_mean.exp(), log_theta.exp()
    log_total = (theta + mean + 1e-8).log()
    binomial = torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
    return binomial + theta * (log_theta - log_total) + x * (log_mean - log_total)


def in_turns(contestants: dict[str, Callable[[], object]], rounds: int, timer: str) -> dict:
    """Time every contestant once a round, after one round of warm-up: seconds, by name."""
    clock, seconds = TIMERS[timer], {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, contestant in contestants.items():
            start = clock()
            contestant()
            if number:
                seconds[name].append(clock() - start)
    return {name: np.array(times) for name, times in seconds.items()}


def bench_iwelbo(rounds: int) -> Iterator[tuple[str, float]]:
    """Compare `iwelbo` with the slow way: 1,000 draws of 5,000 cells and 100 genes.

    Without Gauss-Newton steps: the slow way would take them for every draw, which flatters us.
    """
    screen = simulate.sparse_shift(n_cells_per_condition=50, seed=0, as_released=True)
    cells = screen.cells
    plan = recipes.RECIPES["smslib"].with_network(newton=False)
    model, config = recipes.build(cells, screen.design, recipe=plan, seed=0, epochs=10)
    fit(model, cells, config, progress=False)
    contestants = {
        "fast": lambda: iwelbo(model, cells, n_draws=N_DRAWS),
        "slow": lambda: bound_draw_by_draw(model, cells, SLOW_DRAWS),
        "products": lambda: products_alone(model, len(cells), N_DRAWS),
    }
    yield from {"cells": len(cells), "genes": cells.n_genes, "draws": N_DRAWS}.items()
    for threads, timer in ((1, "cpu"), (2, "wall")):
        torch.set_num_threads(threads)
        seconds = in_turns(contestants, rounds, timer)
        slow = seconds["slow"] * (N_DRAWS / SLOW_DRAWS)
        name = f"{threads}_threads_{timer}"
        yield f"{name}.ratio", float(np.median(slow / seconds["fast"]))
        yield f"{name}.ratio_of_products", float(np.median(slow / seconds["products"]))
        # On a busy machine the slow way loses most, and the median flatters us.
        best = seconds["slow"].min() * (N_DRAWS / SLOW_DRAWS) / seconds["fast"].min()
        yield f"{name}.ratio_of_best", float(best)
        yield f"{name}.seconds", float(np.median(seconds["fast"]))
    torch.set_num_threads(1)
    some = cells[:300]
    with seeded(1):
        slow = bound_draw_by_draw(model, some, 200)
    difference = iwelbo(model, some, n_draws=200) - slow
    yield "difference", float(difference.mean())
    yield "difference_error", float(difference.std() / math.sqrt(len(some)))


def bench_kernel(rounds: int) -> Iterator[tuple[str, float]]:
    """Compare the log-pmf and its gradients with the textbook formula, 128 cells x 100 genes."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x = torch.poisson(torch.full((128, 100), 15.0), generator=generator)
    log_mean = torch.randn(128, 100, generator=generator).requires_grad_()
    log_theta = torch.randn(100, generator=generator).requires_grad_()
    formulas = {
        "ours": lambda: NegativeBinomial(log_mean, log_theta).log_prob(x).sum().backward(),
        "textbook": lambda: textbook_log_prob(x, log_mean, log_theta).sum().backward(),
    }
    seconds = in_turns(formulas, 40 * rounds, "cpu")
    yield "milliseconds", 1e3 * float(np.median(seconds["ours"]))
    yield "over_textbook", float(np.median(seconds["ours"]) / np.median(seconds["textbook"]))


def bench_step(rounds: int) -> Iterator[tuple[str, float]]:
    """Time a training step of sVAE+ by recipe, batches of 128 cells, 100 genes, one thread."""
    torch.set_num_threads(1)
    screen = simulate.sparse_shift(n_cells_per_condition=32, seed=0, as_released=True)
    for recipe in recipes.RECIPES:
        model, config = recipes.build(
            screen.cells, screen.design, recipe=recipe, epochs=rounds + 1
        )
        config = replace(config, patience=None)
        n_steps = len(screen.cells) // config.batch_size * config.epochs
        fit(model, screen.cells, replace(config, epochs=1), progress=False)
        start = time.process_time()
        fit(model, screen.cells, config, progress=False)
        yield f"{recipe}.milliseconds", 1e3 * (time.process_time() - start) / n_steps


def bench_replicates(rounds: int) -> Iterator[tuple[str, float]]:
    """Compare fits of sVAE+ stacked and one after the other: an epoch of 128 cells x 100 genes."""
    screen = simulate.sparse_shift(n_cells_per_condition=20, seed=0, as_released=True)
    configs = [TrainConfig(epochs=1, batch_size=BATCH, seed=seed) for seed in range(N_REPLICATES)]
    models = [
        SMSVAE.preset("svae+", screen.design, screen.cells.n_genes, seed=config.seed)
        for config in configs
    ]
    contestants = {
        "stacked": lambda: fit_replicates(models, screen.cells, configs, progress=False),
        "in_sequence": lambda: [
            fit(model, screen.cells, config, progress=False)
            for model, config in zip(models, configs, strict=True)
        ],
    }
    yield "replicates", N_REPLICATES
    for threads, timer in ((1, "cpu"), (2, "wall")):
        torch.set_num_threads(threads)
        seconds = in_turns(contestants, rounds, timer)
        ratios = seconds["in_sequence"] / seconds["stacked"]
        yield f"{threads}_threads_{timer}.ratio", float(np.median(ratios))


def bench_import(rounds: int) -> Iterator[tuple[str, float]]:
    """Time imports in fresh interpreters that have imported torch already."""
    modules = [f"smslib.{module.name}" for module in pkgutil.iter_modules(smslib.__path__)]
    for name, wanted in {"package": ["smslib"], "every_module": modules}.items():
        code = (
            "import importlib, json, time, torch; start = time.process_time();"
            f"[importlib.import_module(name) for name in {wanted}];"
            "print(json.dumps(time.process_time() - start))"
        )
        runs = [
            json.loads(
                subprocess.run(
                    [sys.executable, "-c", code], capture_output=True, check=True
                ).stdout
            )
            for _ in range(rounds + 1)
        ]
        yield f"{name}.seconds_beyond_torch", float(np.median(runs[1:]))


BENCHMARKS = {
    "iwelbo": bench_iwelbo,
    "kernel": bench_kernel,
    "step": bench_step,
    "replicates": bench_replicates,
    "import": bench_import,
}


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmarks, print what they found and store it on request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="folder of stored results, such as book/results")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=BENCHMARKS, nargs="*", default=list(BENCHMARKS))
    options = parser.parse_args(arguments)
    load = os.getloadavg()[0]
    if options.out and load > MOST_LOAD:
        parser.error(
            f"the load average is {load:.1f}: where threads wait for a core, the slow way loses "
            "most and the ratios would flatter us; repeat when the machine is idle, or drop --out"
        )
    values = {"load_average": load}
    command = "python tests/benchmarks/bench_core.py"
    with store.measure(seeds=[0], command=command) as provenance:
        for name in options.only:
            for key, value in BENCHMARKS[name](options.rounds):
                values[f"{name}.{key}"] = value
                print(f"{name}.{key}: {value:.4g}", flush=True)
    if options.out:
        store.put("benchmarks", values, root=options.out, provenance=provenance)
    return 0


if __name__ == "__main__":
    sys.exit(main())
