r"""The distributions of the model, in closed form and in nats.

Symbols: x counts, :math:`\mu` mean, :math:`\theta` inverse dispersion, (m, v) mean and variance of
q(z | x), s shift of the prior, :math:`\pi` probability that a gate is open.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx as Context
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad, softplus

__all__ = [
    "Moments",
    "NegativeBinomial",
    "gaussian_log_prob",
    "kl_to_shifted_normal",
    "stirling_error",
    "straight_through_bernoulli",
]

_LOG_2 = math.log(2.0)
_LOG_2PI = math.log(2.0 * math.pi)
_LARGEST_SMALL = 16  # count that has a row in the table
_FEW = 0.1  # share of larger counts up to which the table pays
# delta(1 / w) / w for 0 < w <= 1, interpolated at 11 Chebyshev nodes in 50-digit arithmetic; the
# error of delta is below 4e-12.
_SHIFTED_ERROR = (
    0.08333333331313675,
    4.942677903991025e-09,
    -0.002777986624076246,
    3.5850536311209985e-06,
    0.0007608859216090255,
    0.00018031625832222505,
    -0.0012253873076370117,
    0.0013878823244933471,
    -0.0008442476995202524,
    0.00028539153986797315,
    -4.231093084914139e-05,
)
_SHIFTED_SLOPE = tuple((order + 1) * value for order, value in enumerate(_SHIFTED_ERROR))


class Moments(NamedTuple):
    """Mean and variance of independent variables, here of shifts (prior standard deviations)."""

    mean: Float[Tensor, "*batch latent"]
    variance: Float[Tensor, "*batch latent"]

    def at(self, index: Tensor | int) -> Moments:
        """Return the rows, or the one row, of ``index``."""
        return Moments(self.mean[index], self.variance[index])


class NegativeBinomial:
    r"""Negative binomial with mean :math:`\mu` and variance :math:`\mu + \mu^2/\theta`.

    The log-pmf is evaluated in saddle-point form (Loader, 2000), with
    :math:`\delta` the error of Stirling's formula,

    .. math::
        \log p(x) = x \log\frac{\mu (x+\theta)}{x (\mu+\theta)}
        - \theta \log\frac{\mu+\theta}{x+\theta} + \delta(x+\theta) - \delta(\theta)
        - \delta(x) - \tfrac12 \log\frac{2\pi x (x+\theta)}{\theta},

    because the textbook form subtracts ``lgamma(theta)`` from ``lgamma(x + theta)`` and loses
    0.4 nats per entry in float32 at :math:`\theta = 10^6`. Where nearly all counts are small, as
    in a screen of thousands of genes, the ratio of the two is a product of few factors, read
    from a table with a row per count: a third of the time.

    Parameters
    ----------
    log_mean : Tensor, (..., n_cells, n_genes)
        Log of the mean in UMIs.
    log_theta : Tensor, (n_genes,) or (n_replicates, 1, n_genes)
        Log of the inverse dispersion; of several models at once, each with its own counts.
    """

    def __init__(
        self,
        log_mean: Float[Tensor, "*draw cell gene"],
        log_theta: Float[Tensor, "*replicate gene"],
    ) -> None:
        self.log_mean = log_mean
        self.log_theta = log_theta

    @property
    def mean(self) -> Float[Tensor, "*draw cell gene"]:
        """Mean, UMIs."""
        return self.log_mean.exp()

    def log_prob(
        self, x: Float[Tensor, "*replicate cell gene"]
    ) -> Float[Tensor, "*draw cell gene"]:
        """Return the log-pmf of the counts ``x``, whole numbers, in nats."""
        large = _few_large(x)
        if large is None or self.log_mean.shape[-x.dim() :] != x.shape:
            kernel = _NegativeBinomialKernel.apply(x, self.log_mean, self.log_theta)
            return kernel - _count_constant(x)
        return _SmallCounts.apply(x, self.log_mean, self.log_theta, *large)

    def sample(self, generator: torch.Generator | None = None) -> Float[Tensor, "*draw cell gene"]:
        """Return a Gamma-Poisson draw, UMIs."""
        shape = self.log_theta.exp().expand_as(self.log_mean)
        gamma = torch._standard_gamma(shape, generator=generator)
        return torch.poisson(gamma * self.mean / shape, generator=generator)


class _NegativeBinomialKernel(torch.autograd.Function):
    """The log-pmf without the terms that depend on the counts alone, with exact gradients.

    Written by hand because the two gradients are short and stable, and autograd through the
    piecewise formulas is neither.
    """

    @staticmethod
    def forward(ctx: Context, x: Tensor, log_mean: Tensor, log_theta: Tensor) -> Tensor:
        mean, theta = log_mean.exp(), log_theta.exp()
        y, total, excess = x + theta, mean + theta, mean - x
        log_scale = _log_ratio(excess / y, (total / y).log())
        relative, positive = excess / total, x.clamp(min=1.0)
        far = log_mean - positive.log() - log_scale
        log_odds = _log_ratio(theta * relative / positive, far)
        ctx.save_for_backward(x, theta, y, relative, log_scale)
        errors = _rise(stirling_error, y, theta)
        return x * log_odds - theta * log_scale + (errors - 0.5 * (x / theta).log1p())

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, gradient: Tensor) -> tuple[None, Tensor, Tensor]:
        x, theta, y, relative, log_scale = ctx.saved_tensors
        by_theta = relative - log_scale + _rise(_stirling_slope, y, theta)
        by_log_theta = theta * by_theta + 0.5 * x / y
        return (
            None,
            gradient * relative * -theta,
            (gradient * by_log_theta).sum_to_size(theta.shape),
        )


class _SmallCounts(torch.autograd.Function):
    r"""The log-pmf where few counts are large; those are at ``large``.

    With :math:`a = \log\mu - \log\theta`, :math:`s = \log(1 + e^a)` and
    :math:`\theta' = \max(\theta, 1)`, so that nothing cancels at either end of :math:`\theta`,

    .. math::
        \log p(x) = x (a + \log\theta') - (x + \theta) s
        + \sum_{k<x} \log\frac{\theta + k}{\theta' (k + 1)}.

    The few large counts are left to the textbook, in double precision.
    """

    @staticmethod
    def forward(
        ctx: Context, x: Tensor, log_mean: Tensor, log_theta: Tensor, *large: Tensor
    ) -> Tensor:
        theta = log_theta.exp()
        binomial, curvature = _tables(theta)
        log_odds = log_mean - log_theta
        log_scale = softplus(log_odds)
        row = x.clamp(max=_LARGEST_SMALL).long()
        value = x * (log_mean - log_theta.clamp(max=0.0))
        value.addcmul_(x + theta, log_scale, value=-1.0).add_(binomial.gather(-2, row))
        few = _textbook(x, log_mean, log_theta, large)
        value[..., *large] = few.value
        ctx.save_for_backward(x, theta, curvature, log_odds, log_scale, row, *large, *few[1:])
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, theta, curvature, log_odds, log_scale, row, *rest = ctx.saved_tensors
        *large, slope_mean, slope_theta = rest
        share = log_odds.sigmoid()
        by_log_mean = torch.addcmul(x, x + theta, share, value=-1.0)
        by_log_theta = (share - log_scale).mul_(theta).addcmul_(x, share)
        by_log_theta.sub_(curvature.gather(-2, row))
        by_log_mean[..., *large], by_log_theta[..., *large] = slope_mean, slope_theta
        by_log_theta = by_log_theta.mul_(gradient).sum_to_size(theta.shape)
        return None, by_log_mean.mul_(gradient), by_log_theta, *[None] * len(large)


class _Slopes(NamedTuple):
    """Log-pmf and its derivatives."""

    value: Tensor
    by_log_mean: Tensor
    by_log_theta: Tensor


def _textbook(
    x: Tensor, log_mean: Tensor, log_theta: Tensor, where: tuple[Tensor, ...]
) -> _Slopes:
    """Return the log-pmf of a few entries, computed in double precision."""
    count, size = x[where].double(), log_theta.expand_as(x)[where].double()
    log_odds, theta = log_mean[..., *where].double() - size, size.exp()
    log_scale, total = softplus(log_odds), count + theta
    binomial = total.lgamma() - theta.lgamma() - (count + 1.0).lgamma()
    moved = total * log_odds.sigmoid()
    curved = theta * (total.digamma() - theta.digamma() - log_scale)
    parts = binomial + count * log_odds - total * log_scale, count - moved, moved - count + curved
    return _Slopes(*(part.to(log_mean) for part in parts))


def _few_large(x: Tensor) -> tuple[Tensor, ...] | None:
    """Return where counts are too large for the table; None if many are, or on a GPU.

    There it would mean to wait for the device, and what is saved here is nothing to it.
    """
    if x.is_cuda or not len(x):
        return None
    gene = (x.flatten(end_dim=-2).amax(0) > _LARGEST_SMALL).nonzero().squeeze(-1)
    *cell, place = (x[..., gene] > _LARGEST_SMALL).nonzero(as_tuple=True)
    return (*cell, gene[place]) if len(place) <= _FEW * x.numel() else None


def _tables(theta: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums over k < x of log (theta + k) / (theta' (k + 1)) and of k / (theta + k).

    A row per count x, from 0 to the largest; the second is the part of the slope by log theta
    that is not in closed form.
    """
    factor = torch.arange(_LARGEST_SMALL, dtype=theta.dtype, device=theta.device).unsqueeze(-1)
    raised = torch.atleast_2d(theta) + factor
    logs = (raised / (torch.atleast_2d(theta).clamp(min=1.0) * (factor + 1.0))).log()
    return tuple(pad(part.cumsum(-2), (0, 0, 1, 0)) for part in (logs, factor / raised))


def stirling_error(y: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    r"""Return :math:`\delta(y) = \log\Gamma(y) - (y-\frac12)\log y + y - \frac12\log 2\pi`.

    From :math:`\delta(y) = \delta(y + 1) + (y + \frac12) \log(1 + 1/y) - 1`, which cancels
    nothing that matters and leaves a function smooth enough for one polynomial.
    """
    return _shifted_error(y) + ((y + 0.5) * y.reciprocal().log1p() - 1.0)


def kl_to_shifted_normal(
    mean: Float[Tensor, "*cell latent"],
    variance: Float[Tensor, "*cell latent"],
    shift: Moments,
) -> Float[Tensor, "*cell latent"]:
    r"""Return :math:`E_s\, KL(N(m, v) \| N(s, 1))` in nats.

    The divergence is quadratic in s, so its expectation needs the first two moments of s and
    nothing else: :math:`\frac12 (v + (m - \bar s)^2 + Var[s] - 1 - \log v)`. This is what lets
    gates and slabs be integrated out exactly where the paper samples them (eq. 12).
    """
    distance = variance + (mean - shift.mean).square() + shift.variance
    return 0.5 * (distance - 1.0 - variance.log())


def straight_through_bernoulli(
    logit: Float[Tensor, "*shape"], *, temperature: float = 1.0
) -> Float[Tensor, "*shape"]:
    """Draw 0 or 1 with the gradient of the Gumbel-sigmoid relaxation (as released).

    The gradient is biased: at logit 0 its mean is 1/6 where the exact one is 1/4, and at the
    usual start of 5 it is three times too large.
    """
    uniform = torch.rand_like(logit).clamp(1e-7, 1 - 1e-7)
    soft = torch.sigmoid((logit + uniform.logit()) / temperature)
    hard = (soft > 0.5).to(soft)
    return hard + (soft - soft.detach())  # in this order the value stays exactly 0 or 1


def gaussian_log_prob(
    z: Float[Tensor, "*draw cell latent"],
    mean: Float[Tensor, "cell latent"],
    variance: Float[Tensor, "cell latent"] | float,
) -> Float[Tensor, "*draw cell"]:
    """Return log N(z; mean, variance), summed over latents, nats."""
    variance = torch.as_tensor(variance, dtype=z.dtype, device=z.device)
    terms = (z - mean).square() / variance + variance.log() + _LOG_2PI
    return -0.5 * terms.sum(-1)


def _shifted_error(y: Tensor) -> Tensor:
    """Return the Stirling error of y + 1, for y >= 0."""
    inverse = (y + 1.0).reciprocal()
    return inverse * _polynomial(inverse, _SHIFTED_ERROR)


def _stirling_slope(y: Tensor) -> Tensor:
    """Return the derivative of the Stirling error."""
    inverse, shifted = y.reciprocal(), (y + 1.0).reciprocal()
    smooth = shifted * shifted * _polynomial(shifted, _SHIFTED_SLOPE)
    return inverse.log1p() - 0.5 * (inverse + shifted) - smooth


def _rise(
    function: Callable[[Tensor], Tensor],
    y: Float[Tensor, "*replicate cell gene"],
    theta: Float[Tensor, "*one gene"],
) -> Float[Tensor, "*replicate cell gene"]:
    """Return function(y) - function(theta), in one call: a small tensor costs nearly as much."""
    values = function(torch.cat([torch.atleast_2d(theta), y], dim=-2))
    return values[..., 1:, :] - values[..., :1, :]


def _polynomial(y: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Return the polynomial with the given coefficients, lowest order first (Horner)."""
    *lower, highest = y.new_tensor(coefficients).unbind()
    value = torch.addcmul(lower.pop(), highest, y)
    for coefficient in reversed(lower):
        torch.addcmul(coefficient, value, y, out=value)  # fresh memory would cost as much again
    return value


def _log_ratio(relative: Tensor, far: Tensor) -> Tensor:
    """Return log(a / b) from (a - b) / b down to a = b / 2, and from ``far`` below.

    Each of the two terms is constant where the other one is in charge.
    """
    near = relative.clamp(min=-0.5).log1p()
    return near + (far.clamp(max=-_LOG_2) + _LOG_2)


def _count_constant(x: Tensor) -> Tensor:
    """Return log(x!) - x log x + x, the part of the log-pmf that no parameter reaches."""
    per_count = x.clamp(min=1.0).reciprocal().log1p()
    return _shifted_error(x) + x * per_count + 0.5 * x.log1p() + (0.5 * _LOG_2PI - 1.0)
