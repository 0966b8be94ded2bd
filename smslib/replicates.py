"""Several fits of one model as one program: other seeds or weights of the KL, same cells.

At a hundred genes a step spends as much time on starting operations as on carrying them out.
Models stacked along a replicate axis start each operation once.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from smslib import train
from smslib.data import Cells, minibatches
from smslib.distributions import Moments, NegativeBinomial, kl_to_shifted_normal
from smslib.model import SMALLEST_VARIANCE, SMSVAE, Terms
from smslib.train import History, TrainConfig

__all__ = ["fit_replicates"]


def fit_replicates(
    models: Sequence[SMSVAE],
    cells: Cells,
    configs: Sequence[TrainConfig],
    *,
    validation: Cells | None = None,
    progress: bool = True,
) -> list[History]:
    """Fit several models of one kind at once; each as `smslib.train.fit` would, up to rounding.

    Parameters
    ----------
    models : sequence of SMSVAE
        Of the same configuration, with weights of their own; changed in place.
    cells : Cells
    configs : sequence of TrainConfig
        One per model; they may differ in ``seed`` and ``beta``.
    validation : Cells, optional
    progress : bool

    Returns
    -------
    list of History
        One per model. The seconds of an epoch are those of all models together.

    Raises
    ------
    ValueError
        If there is not one configuration per model, models (doses and fixed gates included) or
        configurations differ in more than that, they ask for what cannot be stacked
        (normalisation, dropout, sampled gates, Gauss-Newton steps, Muon, more than one draw,
        clipped gradients), or as in `fit`.
    FloatingPointError
        As in `fit`.
    """
    _check(models, configs)
    for name, part in (("cells", cells), ("validation", validation)):
        if part is not None:
            train._check(models[0], part, name)
    train._check_patience(configs[0], validation)
    runs = [_Run(model, config) for model, config in zip(models, configs, strict=True)]
    stack = _Stack(models)
    try:
        _loop(stack, runs, cells, validation, progress)
    finally:
        stack.part()
    for run in runs:
        run.finish()
    return [run.history for run in runs]


class _Run:
    """What one of the fits remembers."""

    def __init__(self, model: SMSVAE, config: TrainConfig) -> None:
        self.model, self.config, self.history = model, config, History()
        self.best, self.end = train._Best(config), None
        self.order = torch.Generator().manual_seed(config.seed)
        self.draws = torch.Generator(model.device).manual_seed(config.seed)

    def record(
        self, epoch: int, terms: dict[str, float], seconds: float, validation: Cells | None
    ) -> None:
        """Add an epoch; after the last one of this fit, note the weights."""
        if self.end is not None:
            return
        start, row = time.perf_counter(), {"epoch": epoch, **terms}
        if validation is not None:
            row |= train._validate(self.model, validation, self.config, epoch, None)
            self.best.update(epoch, row["validation_elbo"], self.model)
        self.history.rows.append(row | {"seconds": seconds + time.perf_counter() - start})
        if self.best.exhausted(epoch):
            self.end = copy.deepcopy(self.model.state_dict())

    def finish(self) -> None:
        """Leave the model with the weights that its fit ends with."""
        if self.end is not None:
            self.model.load_state_dict(self.end)
        self.history.best_epoch = self.best.restore(self.model)
        self.model.eval()


def _loop(
    stack: _Stack,
    runs: Sequence[_Run],
    cells: Cells,
    validation: Cells | None,
    progress: bool,
) -> None:
    config = runs[0].config
    optimizer = train._Optimizer(stack.parameters(), config)
    bar = tqdm(range(config.epochs), disable=None if progress else True, leave=False, unit="epoch")
    for epoch in bar:
        start = time.perf_counter()
        rows = _epoch(stack, runs, cells, optimizer, epoch)
        seconds = time.perf_counter() - start
        for run, terms in zip(runs, rows, strict=True):
            run.record(epoch, terms, seconds, validation)
        if all(run.end is not None for run in runs):
            break


def _epoch(
    stack: _Stack,
    runs: Sequence[_Run],
    cells: Cells,
    optimizer: train._Optimizer,
    epoch: int,
) -> list[dict[str, float]]:
    """Visit every cell once in every fit, each in its own order; return the means of the terms."""
    n_cells, size = len(cells), runs[0].config.batch_size
    each = [train._weights(run.config, epoch) for run in runs]
    kl_weight = torch.tensor([one["kl_weight"] for one in each], device=cells.device)
    penalty_weight = each[0]["penalty_weight"] / n_cells
    scale = n_cells if runs[0].config.loss_scale == "screen" else 1
    smallest = train._smallest_batch(runs[0].config, n_cells)
    orders = [minibatches(cells, size, generator=run.order, smallest=smallest) for run in runs]
    seen, n_steps = [], -(-n_cells // size)
    for step, batches in enumerate(zip(*orders, strict=True)):
        optimizer.set_rate(epoch + step / n_steps)
        terms = stack(batches, [run.draws for run in runs])
        optimizer.zero_grad()
        means = torch.stack([terms.reconstruction.mean(-1), terms.kl.mean(-1)])
        loss = kl_weight * means[1] - means[0] + penalty_weight * terms.penalty
        (scale * loss.sum()).backward()
        optimizer.step()
        seen.append(torch.cat([means, terms.penalty.unsqueeze(0) / n_cells]).detach())
    steps = torch.stack(seen)
    return [train._summary(steps[:, :, replicate], epoch) for replicate in range(len(runs))]


class _Stack:
    """Models whose parameters are one tensor each, of which theirs are views."""

    def __init__(self, models: Sequence[SMSVAE]) -> None:
        self.models, self.like = models, models[0]
        self.whole = {
            name: nn.Parameter(
                torch.stack([model.get_parameter(name).detach() for model in models]),
                requires_grad=part.requires_grad,
            )
            for name, part in self.like.named_parameters()
        }
        self.centre, self.spread = (
            torch.stack([getattr(model, name) for model in models]).unsqueeze(1)
            for name in ("centre", "spread")
        )
        for name, whole in self.whole.items():
            for model, part in zip(models, whole.detach(), strict=True):
                model.get_parameter(name).data = part
        self.shifts = torch.func.vmap(self._shifts)

    def part(self) -> None:
        """Give every model memory of its own again."""
        for model in self.models:
            for part in model.parameters():
                part.data = part.data.clone()

    def parameters(self) -> list[nn.Parameter]:
        """Return what is trained."""
        return list(self.whole.values())

    def __call__(self, batches: Sequence[Cells], draws: Sequence[torch.Generator]) -> Terms:
        """Return the terms of every model on its own batch; the replicates come first."""
        counts = torch.stack([batch.counts for batch in batches])
        q = self.encode(counts)
        noise = torch.stack(
            [
                torch.randn(mean.shape, generator=one, device=mean.device, dtype=mean.dtype)
                for mean, one in zip(q.mean, draws, strict=True)
            ]
        )
        hidden = self._network("decoder", q.mean + q.variance.sqrt() * noise)
        log_mean = self._linear("genes", hidden).log_softmax(-1) + counts.sum(-1, True).log()
        x = NegativeBinomial(log_mean, self.whole["log_theta"].unsqueeze(1))
        shift, penalty = self.prior(torch.stack([batch.condition for batch in batches]))
        kl = kl_to_shifted_normal(q.mean, q.variance, shift).sum(-1)
        return Terms(x.log_prob(counts).sum(-1), kl, penalty)

    def encode(self, counts: Tensor) -> Moments:
        """Return every encoder's mean and variance of z."""
        hidden = self._network("encoder", (counts.log1p() - self.centre) / self.spread)
        mean, log_variance = self._linear("posterior", hidden).chunk(2, dim=-1)
        return Moments(mean, log_variance.exp() + SMALLEST_VARIANCE)

    def prior(self, condition: Tensor) -> tuple[Moments, Tensor]:
        """Return the moments of each cell's shift, and every model's penalty."""
        parts = {name: part for name, part in self.whole.items() if name.startswith("prior.")}
        if not parts:
            return self.like.prior().at(condition), self.like.prior.penalty().expand(
                len(condition)
            )
        mean, variance, penalty = self.shifts(parts)
        replicate = torch.arange(len(condition), device=condition.device).unsqueeze(1)
        return Moments(mean[replicate, condition], variance[replicate, condition]), penalty

    def _shifts(self, parts: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return moments and penalty of one model's prior."""
        return torch.func.functional_call(_Shifts(self.like.prior), parts, ())

    def _network(self, name: str, x: Tensor) -> Tensor:
        for place, layer in self.like.get_submodule(name).named_children():
            x = self._linear(f"{name}.{place}", x) if isinstance(layer, nn.Linear) else layer(x)
        return x

    def _linear(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.whole[f"{name}.weight"], self.whole[f"{name}.bias"]
        return torch.baddbmm(bias.unsqueeze(1), x, weight.mT)


class _Shifts(nn.Module):
    """A prior as a function: moments of every condition's shift, and the penalty."""

    def __init__(self, prior: nn.Module) -> None:
        super().__init__()
        self.prior = prior

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean, variance and penalty."""
        return (*self.prior(), self.prior.penalty())


def _check(models: Sequence[SMSVAE], configs: Sequence[TrainConfig]) -> None:
    """Refuse what cannot be stacked."""
    if not models or len(models) != len(configs):
        raise ValueError(
            f"got {len(models)} models and {len(configs)} configurations; expected one "
            "configuration for each of one or more models"
        )
    model, config = models[0], configs[0]
    if any(other.settings() != model.settings() for other in models):
        raise ValueError("the models differ in more than their weights; fit them one by one")
    for name, part in model.prior.named_buffers():
        if not all(torch.equal(other.prior.get_buffer(name), part) for other in models[1:]):
            raise ValueError(
                f"the models differ in their prior's {name}; expected the same doses and fixed "
                "gates in all of them; fit them one by one"
            )
    if any(replace(other, seed=config.seed, beta=config.beta) != config for other in configs):
        raise ValueError(
            "the configurations differ in more than seed and beta; fit the models one by one"
        )
    asked = {
        f"norm={model.options['norm']!r}": model.options["norm"] != "none",
        f"dropout={model.options['dropout']}": model.options["dropout"] > 0,
        f"estimator={model.estimator!r}": model.estimator != "expected",
        "newton=True": model.newton,
        f"optimizer={config.optimizer!r}": config.optimizer != "adam",
        f"n_draws={config.n_draws}": config.n_draws > 1,
        f"max_grad_norm={config.max_grad_norm}": config.max_grad_norm is not None,
    }
    if any(asked.values()):
        names = [name for name, found in asked.items() if found]
        raise ValueError(f"{', '.join(names)} cannot be stacked; fit the models one by one")
