"""Fitting: one visible loop, on data that live on the device as tensors."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor, distributed
from torch.nn import Parameter
from tqdm import tqdm

from smslib import parallel
from smslib.checkpoints import Checkpoint, Stateful, identity
from smslib.data import Batches, Cells, minibatches, seeded
from smslib.model import SMSVAE, Terms

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["History", "TrainConfig", "fit", "objective"]

_CHOICES = {
    "optimizer": ("adam", "muon"),
    "schedule": ("cosine", "constant"),
    "loss_scale": ("cell", "screen"),
    "keep": ("best", "last"),
}
_LEAST = {
    "epochs": 1,
    "batch_size": 1,
    "beta": 0,
    "warmup_epochs": 0,
    "n_draws": 1,
    "patience": 1,
}


@dataclass(frozen=True)
class TrainConfig:
    """Everything that changes a fit, besides the model and the cells.

    Parameters
    ----------
    epochs : int
        At most; early stopping may end the fit before.
    batch_size : int
    learning_rate : float
        Of Adam.
    optimizer : {"adam", "muon"}
        Muon (Jordan et al. 2024) for the networks' weight matrices, Adam for everything else.
    muon_learning_rate : float
        Of Muon, whose steps have the same size whatever the gradient.
    muon_weight_decay : float
        Of Muon, decoupled: weights shrink by this share of the learning rate at every step.
    schedule : {"cosine", "constant"}
        Cosine goes from ``learning_rate`` to zero over all the steps.
    adam_eps, weight_decay : float
        Of Adam. The released code inherits 0.01 and 1e-6; with that eps Adam is not scale-free.
    beta : float
        Weight of the KL term.
    warmup_epochs : int
        Epochs over which the weight of the KL term rises from zero to ``beta``.
    warm_penalty : bool
        Whether the sparsity term is warmed up as well (as released for sVAE+).
    loss_scale : {"cell", "screen"}
        Loss per cell, or summed over the screen (as released for sVAE+, not for its baselines);
        it matters only through ``adam_eps`` and ``weight_decay``.
    encoder_share : float
        Share of the epochs in which a model with Gauss-Newton inference is trained by its encoder
        alone: first the encoder has to find the neighbourhood from which a step leads to the mode.
        Best weights and patience begin after it; the last epoch always takes the steps.
    n_draws : int
        Draws of z per cell in the last epochs, which maximise the importance-weighted bound: the
        true posterior is not Gaussian, and the ELBO would have the decoder make it so. The
        history has that bound in the place of the ELBO from there on, and best weights and
        patience begin with it.
    weighted_share : float
        Share of the epochs that those are.
    patience : int, optional
        Epochs without a better validation ELBO after which the fit stops.
    keep : {"best", "last"}
        Weights kept at the end; "best" needs validation cells. The released code keeps the last.
    max_grad_norm : float, optional
        Gradients are clipped to this norm.
    seed : int
        Of batches and draws. The initial weights have their own seed, in `SMSVAE.preset`.

    Raises
    ------
    ValueError
        If a choice is none of those listed, a share is none, or there are no epochs, cells in a
        batch, draws, or epochs of patience; if ``beta`` or ``warmup_epochs`` is negative; or if
        there are several draws and no share of the epochs takes them.
    """

    epochs: int = 300
    batch_size: int = 128
    learning_rate: float = 3e-3
    optimizer: Literal["adam", "muon"] = "adam"
    muon_learning_rate: float = 0.02
    muon_weight_decay: float = 0.0
    schedule: Literal["cosine", "constant"] = "cosine"
    adam_eps: float = 1e-8
    weight_decay: float = 0.0
    beta: float = 1.0
    warmup_epochs: int = 10
    warm_penalty: bool = True
    loss_scale: Literal["cell", "screen"] = "cell"
    encoder_share: float = 0.0
    n_draws: int = 1
    weighted_share: float = 0.0
    patience: int | None = None
    keep: Literal["best", "last"] = "best"
    max_grad_norm: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what would otherwise pass for another choice in silence."""
        for name, value in vars(self).items():
            if hasattr(value, "item"):  # of NumPy, which neither a file nor a generator takes
                object.__setattr__(self, name, value.item())
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {known}")
        for name in ("encoder_share", "weighted_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; expected a share of the epochs, 0 to 1"
                )
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"{name} is {value}; expected at least {least}")
        if self.n_draws > 1 and self.weighted_share == 0:
            raise ValueError(
                f"n_draws is {self.n_draws}, but weighted_share is 0 and no epoch takes them; "
                "give the share of the epochs that are to, or n_draws=1"
            )


@dataclass
class History:
    """What happened, epoch by epoch; ELBO and its terms in nats per cell, higher is better.

    The ``elbo`` of the training cells has the screen's penalty subtracted, shared out among them;
    ``validation_elbo`` has not, so that the two are not for comparison where there is a penalty.
    """

    rows: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int | None = None

    def state_dict(self) -> dict[str, object]:
        """Return the rows, for a checkpoint."""
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Take up the rows of a checkpoint."""
        self.rows = state["rows"]

    def frame(self) -> pd.DataFrame:
        """Return one row per epoch; none where nothing was fitted yet."""
        import pandas as pd

        if not self.rows:
            return pd.DataFrame(index=pd.RangeIndex(0, name="epoch"))
        return pd.DataFrame(self.rows).set_index("epoch")


def objective(
    terms: Terms, *, n_cells: int, kl_weight: float = 1.0, penalty_weight: float = 1.0
) -> Float[Tensor, ""]:
    """Return the negative ELBO per cell, nats: the screen's penalty is shared by ``n_cells``.

    Parameters
    ----------
    terms : Terms
        Of a batch.
    n_cells : int
        In the screen.
    kl_weight, penalty_weight : float
        Below one during warm-up.
    """
    per_cell = (kl_weight * terms.kl - terms.reconstruction).mean()
    return per_cell + penalty_weight * terms.penalty / n_cells


def fit(
    model: SMSVAE,
    cells: Cells | Batches,
    config: TrainConfig | None = None,
    *,
    validation: Cells | Batches | None = None,
    group: distributed.ProcessGroup | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> History:
    """Maximise the ELBO by stochastic gradients; this changes ``model`` in place.

    Parameters
    ----------
    model : SMSVAE
    cells : Cells or Batches
        Training cells, on the device of the model. Of Batches, every epoch is one pass, in the
        loader's order and batches, which must not be larger than ``config.batch_size``. A batch
        of one or two cells, the rest of an epoch, is left out if batches are larger than that.
    config : TrainConfig, optional
    validation : Cells or Batches, optional
        Same conditions, other cells: for early stopping and for the choice of the best weights.
    group : ProcessGroup, optional
        Processes (started by ``torchrun``) that share every batch out among them. Each calls this
        with the same model, cells and configuration, and each ends with the same weights.
    checkpoint : path, optional
        File that keeps the state after every epoch. The same call, made again after an
        interruption, goes on from there and ends with the same weights, to the last bit on one
        device and thread count; made again after its end, it does nothing but restore them. A
        loader with ``state_dict`` and ``load_state_dict``, as `smslib.batches.Shuffled` has, goes
        on as well; any other has to give every epoch the same cells in the same order. The file
        stays; remove it once the model is saved.
    progress : bool
        Show a bar when the session is interactive.

    Returns
    -------
    History

    Raises
    ------
    ValueError
        If cells and model disagree in device, genes or conditions; counts are not finite;
        batches are too large or a pass over them has not ``n_cells`` cells; ``patience`` is given
        without validation cells; processes disagree; or ``checkpoint`` is damaged, of another
        fit, or given to a group.
    FloatingPointError
        At the first loss that is not finite; the term that broke is named.
    OSError
        If the checkpoint cannot be written.
    """
    config = config or TrainConfig()
    cells = _checked(model, cells, "cells", config.batch_size)
    if validation is not None:
        validation = _checked(model, validation, "validation", validation.n_cells)
    _check_patience(config, validation)
    _check_checkpoint(checkpoint, group)
    rank = 0
    if group is not None:
        rank = group.rank()
        n_validation = validation.n_cells if validation is not None else 0
        digest = _identity(model, config, cells, validation)
        parallel.check(model, (cells.n_cells, n_validation, config, digest), group)
    newton = model.newton
    try:
        with seeded(config.seed + rank, model.device):
            course = _Course(model, config, cells, validation, checkpoint)
            history = _loop(course, cells, validation, group, progress and not rank)
    finally:
        model.newton = newton
    model.eval()
    return history


class _Course:
    """All that moves during a fit, and the file that remembers it."""

    def __init__(
        self,
        model: SMSVAE,
        config: TrainConfig,
        cells: Cells | Batches,
        validation: Cells | Batches | None,
        checkpoint: str | os.PathLike[str] | None,
    ) -> None:
        self.model, self.config = model, config
        matrices = _matrices(model) if config.optimizer == "muon" else []
        self.optimizer = _Optimizer(model.parameters(), config, matrices=matrices)
        self.order = torch.Generator().manual_seed(config.seed)
        self.history, self.best = History(), _Best(config)
        parts = {"model": model, "optimizer": self.optimizer}
        parts |= {"history": self.history, "best": self.best}
        parts |= {} if isinstance(cells, Cells) else {"cells": cells}
        path, fit = None, ""
        if checkpoint is not None:
            path = Path(checkpoint)
            fit = _identity(model, config, cells, validation)
        self.kept = Checkpoint(path, fit, parts, self.order, model.device)


def _identity(
    model: SMSVAE,
    config: TrainConfig,
    cells: Cells | Batches,
    validation: Cells | Batches | None,
) -> str:
    """Return a digest of what decides a fit."""
    return identity(model.tensors(), (config, model.settings()), cells, validation)


def _loop(
    course: _Course,
    cells: Cells | Batches,
    validation: Cells | Batches | None,
    group: distributed.ProcessGroup | None,
    progress: bool,
) -> History:
    model, config, best, history = course.model, course.config, course.best, course.history
    shared = model if group is None else parallel.SharedOut(model, group)
    newton, n_draws = model.newton, _draws(config, config.epochs - 1)
    first_with_steps = min(config.encoder_share * config.epochs, config.epochs - 1)
    epochs, hidden = range(course.kept.resume(), config.epochs), None if progress else True
    bar = tqdm(epochs, disable=hidden, leave=False, unit="epoch")
    for epoch in bar:
        start = time.perf_counter()
        model.newton = newton and epoch >= first_with_steps
        row = {"epoch": epoch, **_epoch(shared, cells, course, epoch, group)}
        if validation is not None:
            row |= _validate(model, validation, config, epoch, group)
            if model.newton == newton and _draws(config, epoch) == n_draws:
                # Other epochs were judged by another inference or another bound.
                best.update(epoch, row["validation_elbo"], model)
        history.rows.append(row | {"seconds": time.perf_counter() - start})
        bar.set_postfix(elbo=f"{row.get('validation_elbo', row['elbo']):.2f}")
        ends = best.exhausted(epoch)
        course.kept.write(config.epochs if ends else epoch + 1)
        if ends:
            break
    history.best_epoch = best.restore(model)
    return history


def _epoch(
    model: SMSVAE | parallel.SharedOut,
    cells: Cells | Batches,
    course: _Course,
    epoch: int,
    group: distributed.ProcessGroup | None,
) -> dict[str, float]:
    """Visit every training cell once; return the means of the terms."""
    model.train()
    config, optimizer = course.config, course.optimizer
    n_cells, n_steps = cells.n_cells, math.ceil(cells.n_cells / config.batch_size)
    weights = _weights(config, epoch)
    n_draws = _draws(config, epoch)
    scale = n_cells if config.loss_scale == "screen" else 1
    seen = []
    smallest = _smallest_batch(config, n_cells)
    batches = minibatches(cells, config.batch_size, generator=course.order, smallest=smallest)
    for step, batch in enumerate(batches):
        optimizer.set_rate(epoch + min(1.0, step / n_steps))
        terms = model(batch, n_draws=n_draws)
        optimizer.zero_grad()
        (scale * objective(terms, n_cells=n_cells, **weights)).backward()
        if config.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        means = (terms.reconstruction.mean(), terms.kl.mean(), terms.penalty / n_cells)
        seen.append(torch.stack([value.detach() for value in means]))
    return _summary(parallel.average(torch.stack(seen), group), epoch)


def _smallest_batch(config: TrainConfig, n_cells: int) -> int:
    """Return how many cells a batch must have to be trained on, where any batch can."""
    return min(3, n_cells, config.batch_size)


def _summary(steps: Float[Tensor, "step term"], epoch: int) -> dict[str, float]:
    """Return epoch means, or name the first term that was not finite.

    The check waits for the end of the epoch, so that a GPU is not asked for a number every step.
    """
    names = ("reconstruction", "kl", "penalty")
    broken = (~steps.isfinite()).nonzero()
    if len(broken):
        step, term = broken[0].tolist()
        raise FloatingPointError(
            f"the {names[term]} term became {steps[step, term].item()} in epoch {epoch}, step "
            f"{step}; try a smaller learning_rate or max_grad_norm"
        )
    reconstruction, kl, penalty = steps.mean(0).tolist()
    elbo = reconstruction - kl - penalty
    return {"reconstruction": reconstruction, "kl": kl, "penalty": penalty, "elbo": elbo}


@torch.no_grad()
def _validate(
    model: SMSVAE,
    validation: Cells | Batches,
    config: TrainConfig,
    epoch: int,
    group: distributed.ProcessGroup | None,
) -> dict[str, float]:
    """Return the bound of the validation cells, without the penalty, always by the same draws.

    Processes of a group do the same work; they average, so that none of them stops alone.
    """
    model.eval()
    total = torch.zeros(2, device=model.device)
    with seeded(config.seed, model.device):
        for batch in minibatches(validation, 1024):
            terms = model(batch, n_draws=_draws(config, epoch))
            total += torch.stack([terms.reconstruction.sum(), terms.kl.sum()])
    reconstruction, kl = (parallel.average(total, group) / validation.n_cells).tolist()
    return {
        "validation_reconstruction": reconstruction,
        "validation_kl": kl,
        "validation_elbo": reconstruction - kl,
    }


def _weights(config: TrainConfig, epoch: int) -> dict[str, float]:
    """Return the weights of KL and penalty in an epoch."""
    warm = min(1.0, epoch / config.warmup_epochs) if config.warmup_epochs else 1.0
    return {
        "kl_weight": config.beta * warm,
        "penalty_weight": warm if config.warm_penalty else 1.0,
    }


def _draws(config: TrainConfig, epoch: int) -> int:
    """Return the draws of z per cell in an epoch."""
    weighted = epoch >= (1.0 - config.weighted_share) * config.epochs
    return config.n_draws if weighted else 1


class _Best:
    """The best weights so far, by validation ELBO."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.epoch: int | None = None
        self.elbo = -math.inf
        self.state: dict[str, Tensor] | None = None

    def update(self, epoch: int, elbo: float, model: SMSVAE) -> None:
        if elbo > self.elbo:
            self.epoch, self.elbo = epoch, elbo
            if self.config.keep == "best":
                self.state = copy.deepcopy(model.state_dict())

    def state_dict(self) -> dict[str, object]:
        return {"epoch": self.epoch, "elbo": self.elbo, "state": self.state}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.epoch, self.elbo, self.state = state["epoch"], state["elbo"], state["state"]

    def exhausted(self, epoch: int) -> bool:
        patience = self.config.patience
        return patience is not None and self.epoch is not None and epoch - self.epoch >= patience

    def restore(self, model: SMSVAE) -> int | None:
        if self.state is not None:
            model.load_state_dict(self.state)
        return self.epoch


class _Optimizer:
    """Adam, or Muon for the networks' matrices and Adam for the rest, on one schedule."""

    def __init__(
        self,
        parameters: Iterable[Parameter],
        config: TrainConfig,
        *,
        matrices: Sequence[Parameter] = (),
    ) -> None:
        chosen = {id(parameter) for parameter in matrices}
        others = [part for part in parameters if id(part) not in chosen]
        adam = torch.optim.Adam(
            others,
            lr=config.learning_rate,
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.config, self.parts, self.rates = config, [adam], [config.learning_rate]
        if matrices:
            rate, decay = config.muon_learning_rate, config.muon_weight_decay
            self.parts.append(torch.optim.Muon(matrices, lr=rate, weight_decay=decay))
            self.rates.append(rate)

    def set_rate(self, epochs_done: float) -> None:
        """Follow the schedule."""
        if self.config.schedule == "constant":
            return
        share = 0.5 * (1 + math.cos(math.pi * epochs_done / self.config.epochs))
        for part, rate in zip(self.parts, self.rates, strict=True):
            for group in part.param_groups:
                group["lr"] = rate * share

    def state_dict(self) -> dict[str, object]:
        """Return the state of each part."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Take up the state of each part."""
        for part, known in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(known)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Take a step."""
        for part in self.parts:
            part.step()


def _matrices(model: SMSVAE) -> list[Parameter]:
    """Return the weights of every linear map that is to be trained."""
    maps = [part for part in model.modules() if isinstance(part, torch.nn.Linear)]
    return [part.weight for part in maps if part.weight.requires_grad]


class _Checked:
    """Batches that are checked in their first pass: later ones give the same cells."""

    def __init__(self, batches: Batches, check: Callable[[Cells], None]) -> None:
        self.batches, self.check, self.n_cells = batches, check, batches.n_cells
        self.done = False

    def __iter__(self) -> Iterator[Cells]:
        for batch in self.batches:
            if not self.done:
                self.check(batch)
            yield batch
        self.done = True

    def state_dict(self) -> dict[str, object]:
        return self.batches.state_dict() if isinstance(self.batches, Stateful) else {}

    def load_state_dict(self, state: dict[str, object]) -> None:
        if isinstance(self.batches, Stateful):
            self.batches.load_state_dict(state)


def _checked(model: SMSVAE, cells: Cells | Batches, name: str, largest: int) -> Cells | Batches:
    """Refuse cells that do not fit the model, now or, batch by batch, in their first pass."""
    if isinstance(cells, Cells):
        _check(model, cells, name)
        return cells

    def check(batch: Cells) -> None:
        _check(model, batch, name)
        if len(batch) > largest:
            raise ValueError(
                f"{name} come in batches of {len(batch)} cells, but config.batch_size is "
                f"{largest}; make them equal, because the schedule counts by it"
            )

    return _Checked(cells, check)


def _check_patience(config: TrainConfig, validation: Cells | Batches | None) -> None:
    if config.patience is not None and validation is None:
        raise ValueError(
            "patience is set but there are no validation cells; pass validation= or patience=None"
        )


def _check_checkpoint(
    checkpoint: str | os.PathLike[str] | None, group: distributed.ProcessGroup | None
) -> None:
    if checkpoint is None:
        return
    if group is not None:
        raise ValueError("a fit shared by processes keeps no checkpoint; pass checkpoint=None")
    folder = Path(checkpoint).absolute().parent
    if not folder.is_dir():
        raise ValueError(f"{folder}, where the checkpoint is to lie, is no folder; make it first")


def _check(model: SMSVAE, cells: Cells, name: str) -> None:
    """Refuse cells that do not fit the model."""
    if cells.device != model.device:
        raise ValueError(
            f"{name} are on {cells.device}, the model on {model.device}; move one with .to(...)"
        )
    if cells.n_genes != model.n_genes:
        raise ValueError(f"{name} have {cells.n_genes} genes, the model {model.n_genes}")
    n_conditions = len(model.prior.conditions)
    if len(cells) == 0:
        raise ValueError(f"{name} are empty; expected at least one cell")
    if int(cells.condition.max()) >= n_conditions or int(cells.condition.min()) < 0:
        raise ValueError(
            f"{name} have conditions up to row {int(cells.condition.max())}, but the model's "
            f"design has {n_conditions}; build the model with the design of these cells"
        )
    if not bool(cells.counts.isfinite().all()):
        raise ValueError(f"{name} have counts that are not finite; read them with from_anndata")
