"""How far the networks themselves reach: each half of the model, trained with the truth in hand.

The decoder is shown the true latents and learns the counts, the encoder is shown the counts and
learns the true latents. What is missing then is the networks' own (width, number of cells, number
of steps); what a fit misses beyond that is inference's.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from smslib import metrics
from smslib.data import Cells, minibatches, seeded
from smslib.model import SMSVAE
from smslib.simulate import Screen

__all__ = ["told"]

_RATE = 8e-3  # of Adam, cosine to zero
_BATCH = 256


def told(model: SMSVAE, screen: Screen, *, epochs: int = 30, seed: int = 0) -> dict[str, float]:
    """Train copies of both networks on true latents and score them on other cells.

    Parameters
    ----------
    model : SMSVAE
        Untrained; it is left as it is.
    screen : Screen
    epochs : int
    seed : int
        Of the split. The order of the batches is the same for all.

    Returns
    -------
    dict
        ``decoder_gap`` (nats per cell by which the decoder's log p(x | z) falls short of the
        truth's, both given the library), ``encoder_mcc`` and ``encoder_r2`` (out of sample).
    """
    order = torch.randperm(len(screen.z), generator=torch.Generator().manual_seed(seed))
    n_test, cells, z = len(order) // 10, _with_position(screen.cells), screen.z
    train, test = cells[order[n_test:]], cells[order[:n_test]]
    pupil = copy.deepcopy(model)
    with seeded(seed):
        _train(pupil, train, lambda batch: _decoder_loss(pupil, batch, z), epochs)
        _train(pupil, train, lambda batch: _encoder_loss(pupil, batch, z), epochs)
    return _scores(pupil.eval(), screen, test)


def _with_position(cells: Cells) -> Cells:
    """Label every cell by its position, so that batches find their latents."""
    return Cells(cells.counts, torch.arange(len(cells)))


def _decoder_loss(model: SMSVAE, batch: Cells, z: Float[Tensor, "cell latent"]) -> Tensor:
    likelihood = model.decode(z[batch.condition], batch.library)
    return -likelihood.log_prob(batch.counts).sum(-1).mean()


def _encoder_loss(model: SMSVAE, batch: Cells, z: Float[Tensor, "cell latent"]) -> Tensor:
    return (model.encode(batch.counts).mean - z[batch.condition]).square().mean()


def _train(model: SMSVAE, cells: Cells, loss: Callable[[Cells], Tensor], epochs: int) -> None:
    """Minimise a loss by Adam on a cosine schedule."""
    optimizer = torch.optim.Adam(model.parameters(), lr=_RATE, fused=True)
    steps = epochs * math.ceil(len(cells) / _BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for batch in minibatches(cells, _BATCH, generator=order):
            optimizer.zero_grad()
            loss(batch).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def _scores(model: SMSVAE, screen: Screen, test: Cells) -> dict[str, float]:
    true = screen.z[test.condition]
    guessed = model.encode(test.counts).mean.numpy()
    given = model.decode(true, test.library).log_prob(test.counts).sum(-1).mean()
    share = screen.decoder.log_rate(true).log_softmax(-1)
    exact = torch.distributions.Poisson((share + test.library.log()).exp())
    return {
        "decoder_gap": float(exact.log_prob(test.counts).sum(-1).mean() - given),
        "encoder_mcc": metrics.mcc(true.numpy(), guessed),
        "encoder_r2": metrics.linear_r2(true.numpy(), guessed),
    }
