"""What a fitted model says about cells: bounds on their likelihood, and their latents.

Every function runs in eval mode without gradients, leaves the model and the global random state as
they were, and returns plain arrays with one value per cell.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from smslib.data import Batches, Cells, Design, minibatches, seeded
from smslib.distributions import Moments
from smslib.model import SMSVAE

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["by_condition", "elbo", "iwelbo", "latents"]

# A chunk's activations (draws x genes) fit a core's cache, and are enough for a matrix product.
_FLOATS_PER_CHUNK, _SMALLEST_CHUNK = 2**17, 128
_BATCHES_AHEAD = 32  # read before their turn, so that no thread waits


def elbo(
    model: SMSVAE, cells: Cells | Batches, *, batch_size: int = 1024, seed: int = 0
) -> Float[np.ndarray, " cell"]:
    """Return the evidence lower bound of each cell at one draw of z, nats, without the penalty.

    Parameters
    ----------
    model : SMSVAE
    cells : Cells or Batches
    batch_size : int
    seed : int
        Of the draws.
    """
    with _evaluating(model), seeded(seed, model.device):
        parts = [model(batch) for batch in minibatches(cells, batch_size)]
        return _numpy(torch.cat([terms.reconstruction - terms.kl for terms in parts]))


def latents(
    model: SMSVAE, cells: Cells | Batches, *, batch_size: int = 4096
) -> Float[np.ndarray, "cell latent"]:
    """Return the posterior means of z, in prior standard deviations.

    The encoder sees the counts alone; a model with Gauss-Newton inference also uses the prior of
    the cell's condition (``q(z | x, a)`` in the paper, eq. 12).

    Parameters
    ----------
    model : SMSVAE
    cells : Cells or Batches
    batch_size : int
    """
    with _evaluating(model):
        parts = [model.infer(batch).mean for batch in minibatches(cells, batch_size)]
        return _numpy(torch.cat(parts))


def iwelbo(
    model: SMSVAE,
    cells: Cells | Batches,
    *,
    n_draws: int = 1000,
    batch_size: int = 128,
    seed: int = 0,
) -> Float[np.ndarray, " cell"]:
    r"""Return the importance-weighted bound of each cell, nats (Burda et al. 2016).

    .. math:: \log \frac1T \sum_t \frac{p(x, z_t | c)}{q(z_t | x)}, \quad z_t \sim q(z | x)

    at the modal graph (gates open or shut). A cell is encoded once and its draws are decoded in
    chunks; of a draw, one number is kept. The released code encodes and decodes anew for every
    draw.

    Parameters
    ----------
    model : SMSVAE
    cells : Cells or Batches
    n_draws : int
        T. The paper says 5,000; the released code uses 1,000.
    batch_size : int
        Cells encoded together, by one of torch's threads.
    seed : int
        Of the draws. Those of a cell depend on the seed and its position alone, not on the size
        of batches or the number of threads.

    Raises
    ------
    ValueError
        If ``n_draws`` is not positive.
    """
    if n_draws < 1:
        raise ValueError(f"n_draws is {n_draws}; expected at least one draw")
    seeds = iter(np.random.SeedSequence(seed).generate_state(cells.n_cells).tolist())
    with _evaluating(model), _workers(model.device) as pool:
        jobs = (
            pool.submit(_bounds, model, batch, list(islice(seeds, len(batch))), n_draws)
            for batch in minibatches(cells, batch_size)
        )
        return _numpy(torch.cat(list(_results(jobs))))


def by_condition(
    values: Float[np.ndarray, " cell"], cells: Cells | Batches, design: Design
) -> pd.DataFrame:
    """Return mean, standard error and number of cells of every condition.

    No condition is dropped: one without cells has n = 0 and a mean of NaN, one with a single cell
    a standard error of NaN. The released code drops conditions of 10 cells or fewer in silence.

    Parameters
    ----------
    values : array, (n_cells,)
    cells : Cells or Batches
        Whose values they are, in the same order.
    design : Design
        That labels the cells.

    Returns
    -------
    DataFrame
        ``mean`` and ``standard_error`` (units of ``values``) and ``n``, a row per condition.
    """
    import pandas as pd

    if isinstance(cells, Cells):
        condition = cells.condition
    else:
        condition = torch.cat([batch.condition for batch in minibatches(cells, cells.n_cells)])
    names = pd.Categorical.from_codes(condition.cpu().numpy(), categories=design.conditions)
    groups = pd.Series(values).groupby(names, observed=False)
    table = groups.agg(["mean", "sem", "count"])
    return table.set_axis(["mean", "standard_error", "n"], axis=1).rename_axis("condition")


class _Proposal(NamedTuple):
    """Draws z = mean + scale * noise from q(z | x), and log p(z | c) / q(z | x), nats.

    The ratio is a parabola: (square * noise**2 + linear * noise) summed over latents + constant.
    """

    mean: Float[Tensor, "*cell latent"]
    scale: Float[Tensor, "*cell latent"]
    square: Float[Tensor, "*cell latent"]
    linear: Float[Tensor, "*cell latent"]
    constant: Float[Tensor, "*cell"]

    @classmethod
    def of(cls, q: Moments, shift: Float[Tensor, "cell latent"]) -> _Proposal:
        """Return the proposal q for a target N(shift, I)."""
        scale, gap = q.variance.sqrt(), q.mean - shift
        constant = 0.5 * (q.variance.log() - gap.square()).sum(-1)
        return cls(q.mean, scale, 0.5 * (1.0 - q.variance), -scale * gap, constant)

    def at(self, cell: int) -> _Proposal:
        """Return the proposal of one cell."""
        return _Proposal(*(part[cell] for part in self))


@torch.inference_mode()  # which each thread has to enter for itself
def _bounds(
    model: SMSVAE, batch: Cells, seeds: Sequence[int], n_draws: int
) -> Float[Tensor, " cell"]:
    """Return the bound of every cell of a batch."""
    q = model.infer(batch)
    proposal = _Proposal.of(q, model.prior.mode()[batch.condition])
    likelihood, generator = model.likelihood(batch), torch.Generator(batch.device)
    step = max(_SMALLEST_CHUNK, _FLOATS_PER_CHUNK // model.n_genes)
    weights = []
    for cell, seed in enumerate(seeds):
        generator.manual_seed(seed)
        noise = torch.randn(n_draws, q.mean.shape[1], generator=generator, device=batch.device)
        log_likelihood, here = partial(likelihood.at, cell), proposal.at(cell)
        chunks = noise.to(q.mean).split(step)
        weights.append(torch.cat([_log_weights(log_likelihood, here, e) for e in chunks]))
    return torch.stack(weights).logsumexp(-1) + proposal.constant - math.log(n_draws)


def _log_weights(
    log_likelihood: Callable[[Tensor], Tensor],
    proposal: _Proposal,
    noise: Float[Tensor, "draw latent"],
) -> Float[Tensor, " draw"]:
    """Return log p(x, z | c) / q(z | x) of draws for one cell, without the constant."""
    weights = log_likelihood(torch.addcmul(proposal.mean, proposal.scale, noise))
    return weights.addmv_(noise.square(), proposal.square).addmv_(noise, proposal.linear)


def _results(jobs: Iterable[Future]) -> Iterator[Tensor]:
    """Yield results in order; a few jobs are made before they are asked for, not all at once."""
    waiting: deque[Future] = deque()
    for job in jobs:
        waiting.append(job)
        if len(waiting) > _BATCHES_AHEAD:
            yield waiting.popleft().result()
    yield from (job.result() for job in waiting)


@contextlib.contextmanager
def _workers(device: torch.device) -> Iterator[Executor]:
    """Yield as many threads as torch may use, and one core to each while they work.

    Cells are independent of each other, so that whole cells are shared out rather than the rows
    of one small matrix product: no thread waits for another.
    """
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(n_threads if device.type == "cpu" else 1) as pool:
            yield pool
    finally:
        torch.set_num_threads(n_threads)


@contextlib.contextmanager
def _evaluating(model: SMSVAE) -> Iterator[None]:
    """Switch to eval mode without gradients, and back."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for part, training in modes:
            part.training = training


def _numpy(values: Tensor) -> np.ndarray:
    return values.cpu().numpy()
