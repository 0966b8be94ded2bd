"""What a fitted model says about cells: bounds on their likelihood, and their latents.

Every function runs in eval mode without gradients, leaves the model and the global random state as
they were, and returns plain arrays with one value per cell.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from smslib.data import Cells, Design, minibatches, seeded
from smslib.distributions import Moments
from smslib.model import SMSVAE

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["by_condition", "elbo", "iwelbo", "latents"]

# Draws times cells per chunk: the activations of one chunk fit a core's cache.
_ROWS_PER_CHUNK = 4096


def elbo(
    model: SMSVAE, cells: Cells, *, batch_size: int = 1024, seed: int = 0
) -> Float[np.ndarray, " cell"]:
    """Return the evidence lower bound of each cell at one draw of z, nats, without the penalty.

    Parameters
    ----------
    model : SMSVAE
    cells : Cells
    batch_size : int
    seed : int
        Of the draws.
    """
    with _evaluating(model), seeded(seed):
        parts = [model(batch) for batch in minibatches(cells, batch_size)]
        return _numpy(torch.cat([terms.reconstruction - terms.kl for terms in parts]))


def latents(
    model: SMSVAE, cells: Cells, *, batch_size: int = 4096
) -> Float[np.ndarray, "cell latent"]:
    """Return the posterior means E[z | x], in prior standard deviations."""
    with _evaluating(model):
        parts = [model.encode(batch.counts).mean for batch in minibatches(cells, batch_size)]
        return _numpy(torch.cat(parts))


def iwelbo(
    model: SMSVAE,
    cells: Cells,
    *,
    n_draws: int = 1000,
    batch_size: int = 128,
    seed: int = 0,
) -> Float[np.ndarray, " cell"]:
    r"""Return the importance-weighted bound of each cell, nats (Burda et al. 2016).

    .. math:: \log \frac1T \sum_t \frac{p(x, z_t | c)}{q(z_t | x)}, \quad z_t \sim q(z | x)

    at the modal graph (gates open or shut). A cell is encoded once; draws are decoded in chunks
    and their weights folded into a running logsumexp. The released code encodes and decodes anew
    for every draw.

    Parameters
    ----------
    model : SMSVAE
    cells : Cells
    n_draws : int
        T. The paper says 5,000; the released code uses 1,000.
    batch_size : int
        Cells encoded together.
    seed : int
        Of the draws.

    Raises
    ------
    ValueError
        If ``n_draws`` is not positive.
    """
    if n_draws < 1:
        raise ValueError(f"n_draws is {n_draws}; expected at least one draw")
    with _evaluating(model), seeded(seed):
        shifts = model.prior.mode()
        parts = [
            _bound(model, batch, shifts, n_draws) for batch in minibatches(cells, batch_size)
        ]
    return _numpy(torch.cat(parts))


def by_condition(
    values: Float[np.ndarray, " cell"], cells: Cells, design: Design
) -> pd.DataFrame:
    """Return mean, standard error and number of cells of every condition.

    No condition is dropped: one without cells has n = 0 and a mean of NaN, one with a single cell
    a standard error of NaN. The released code drops conditions of 10 cells or fewer in silence.
    """
    import pandas as pd

    names = pd.Categorical.from_codes(cells.condition.cpu().numpy(), categories=design.conditions)
    groups = pd.Series(values).groupby(names, observed=False)
    table = groups.agg(["mean", "sem", "count"])
    return table.set_axis(["mean", "standard_error", "n"], axis=1).rename_axis("condition")


def _bound(model: SMSVAE, batch: Cells, shifts: Tensor, n_draws: int) -> Float[Tensor, " cell"]:
    """Return the bound of one batch, chunk by chunk of draws."""
    q = model.encode(batch.counts)
    shift = shifts[batch.condition]
    step = max(1, _ROWS_PER_CHUNK // len(batch))
    total = q.mean.new_full((len(batch),), -torch.inf)
    for start in range(0, n_draws, step):
        weights = _log_weights(model, batch, q, shift, min(step, n_draws - start))
        total = torch.logaddexp(total, weights.logsumexp(0))
    return total - np.log(n_draws)


def _log_weights(
    model: SMSVAE, batch: Cells, q: Moments, shift: Tensor, n_draws: int
) -> Float[Tensor, "draw cell"]:
    """Return log p(x, z | c) - log q(z | x) for fresh draws of z."""
    noise = torch.randn(n_draws, *q.mean.shape, device=q.mean.device, dtype=q.mean.dtype)
    z = q.mean + q.variance.sqrt() * noise
    log_ratio = 0.5 * (noise.square() - (z - shift).square() + q.variance.log()).sum(-1)
    return log_ratio + model.log_likelihood(z, batch)


@contextlib.contextmanager
def _evaluating(model: SMSVAE) -> Iterator[None]:
    """Switch to eval mode without gradients, and back."""
    training = model.training
    model.eval()
    with torch.inference_mode():
        yield
    model.train(training)


def _numpy(values: Tensor) -> np.ndarray:
    return values.cpu().numpy()
