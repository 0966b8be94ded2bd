r"""The distributions of the model, in closed form and in nats.

Symbols: x counts, :math:`\mu` mean, :math:`\theta` inverse dispersion, (m, v) mean and variance of
q(z | x), s shift of the prior, :math:`\pi` probability that a gate is open.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = [
    "Moments",
    "NegativeBinomial",
    "gaussian_log_prob",
    "kl_bernoulli",
    "kl_to_shifted_normal",
    "stirling_error",
    "straight_through_bernoulli",
]

_LOG_2 = math.log(2.0)
_LOG_2PI = math.log(2.0 * math.pi)
# From this argument on, five terms of Stirling's series are exact to 1e-13.
_STIRLING_FROM = 10.0
_STIRLING_OFFSET = 0.9272690966380356  # log Gamma(10) - 9.5 log 10 + 10
_SLOPE_OFFSET = -0.000832503927324576  # its derivative, digamma(10) - log 10 + 1/20


class Moments(NamedTuple):
    """Mean and variance of independent variables, here of shifts (prior standard deviations)."""

    mean: Float[Tensor, "*batch latent"]
    variance: Float[Tensor, "*batch latent"]

    def at(self, index: Tensor) -> Moments:
        """Return the rows ``index``."""
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
    0.4 nats per entry in float32 at :math:`\theta = 10^6`.

    Parameters
    ----------
    log_mean : Tensor, (..., n_cells, n_genes)
        Log of the mean in UMIs.
    log_theta : Tensor, (n_genes,)
        Log of the inverse dispersion.
    """

    def __init__(
        self,
        log_mean: Float[Tensor, "*draw cell gene"],
        log_theta: Float[Tensor, " gene"],
    ) -> None:
        self.log_mean = log_mean
        self.log_theta = log_theta

    @property
    def mean(self) -> Float[Tensor, "*draw cell gene"]:
        """Mean, UMIs."""
        return self.log_mean.exp()

    def log_prob(self, x: Float[Tensor, "cell gene"]) -> Float[Tensor, "*draw cell gene"]:
        """Return the log-pmf of the counts ``x``, nats."""
        kernel = _NegativeBinomialKernel.apply(x, self.log_mean, self.log_theta)
        return kernel - _count_constant(x)

    def sample(
        self, generator: torch.Generator | None = None
    ) -> Float[Tensor, "*draw cell gene"]:
        """Return a Gamma-Poisson draw, UMIs."""
        shape = self.log_theta.exp().expand_as(self.log_mean)
        gamma = torch._standard_gamma(shape, generator=generator)
        return torch.poisson(gamma * self.mean / shape, generator=generator)


class _NegativeBinomialKernel(torch.autograd.Function):
    """The log-pmf without the terms that depend on the counts alone, with exact gradients.

    Written by hand because the two gradients are short and stable, and autograd through the
    piecewise formulas is neither.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, log_mean: Tensor, log_theta: Tensor) -> Tensor:
        mean, theta = log_mean.exp(), log_theta.exp()
        y, total, positive = x + theta, mean + theta, x.clamp(min=1.0)
        excess, log_scale = mean - x, (total / y).log()
        far = log_mean - positive.log() - log_scale
        log_odds = _log_ratio(theta * excess / (positive * total), far)
        kernel = x * log_odds - theta * _log_ratio(excess / y, log_scale)
        return kernel + (stirling_error(y) - stirling_error(theta)) - 0.5 * (x / theta).log1p()

    @staticmethod
    def setup_context(ctx: object, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[None, Tensor, Tensor]:
        x, log_mean, log_theta = ctx.saved_tensors
        mean, theta = log_mean.exp(), log_theta.exp()
        y, total, excess = x + theta, mean + theta, mean - x
        by_theta = excess / total - _log_ratio(excess / y, (total / y).log())
        by_theta = by_theta + _stirling_slope(y) - _stirling_slope(theta)
        by_log_mean = -theta * excess / total
        by_log_theta = theta * by_theta + 0.5 * x / y
        return (
            None,
            gradient * by_log_mean,
            (gradient * by_log_theta).sum_to_size(log_theta.shape),
        )


def stirling_error(y: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    r"""Return :math:`\delta(y) = \log\Gamma(y) - (y-\frac12)\log y + y - \frac12\log 2\pi`."""
    small = y.clamp(max=_STIRLING_FROM)
    direct = torch.lgamma(small) - (small - 0.5) * small.log() + small
    # One of the two is a constant everywhere, so that no branch is needed.
    return direct + _stirling_series(y.clamp(min=_STIRLING_FROM)) - _STIRLING_OFFSET


def kl_to_shifted_normal(
    mean: Float[Tensor, "cell latent"],
    variance: Float[Tensor, "cell latent"],
    shift: Moments,
) -> Float[Tensor, "cell latent"]:
    r"""Return :math:`E_s\, KL(N(m, v) \| N(s, 1))` in nats.

    The divergence is quadratic in s, so its expectation needs the first two moments of s and
    nothing else: :math:`\frac12 (v + (m - \bar s)^2 + Var[s] - 1 - \log v)`. This is what lets
    gates and slabs be integrated out exactly where the paper samples them (eq. 12).
    """
    distance = variance + (mean - shift.mean).square() + shift.variance
    return 0.5 * (distance - 1.0 - variance.log())


def kl_bernoulli(
    pi: Float[Tensor, "*shape"], p: Float[Tensor, "*shape"] | float
) -> Float[Tensor, "*shape"]:
    """Return KL(Bernoulli(pi) || Bernoulli(p)) in nats, finite at pi in {0, 1}."""
    p = torch.as_tensor(p, dtype=pi.dtype, device=pi.device)
    on = torch.special.xlogy(pi, pi) - pi * p.log()
    off = torch.special.xlogy(1 - pi, 1 - pi) - (1 - pi) * (-p).log1p()
    return on + off


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
    return hard + soft - soft.detach()


def gaussian_log_prob(
    z: Float[Tensor, "*draw cell latent"],
    mean: Float[Tensor, "cell latent"],
    variance: Float[Tensor, "cell latent"] | float,
) -> Float[Tensor, "*draw cell"]:
    """Return log N(z; mean, variance), summed over latents, nats."""
    variance = torch.as_tensor(variance, dtype=z.dtype, device=z.device)
    terms = (z - mean).square() / variance + variance.log() + _LOG_2PI
    return -0.5 * terms.sum(-1)


def _stirling_series(y: Tensor) -> Tensor:
    """Return Stirling's series for the error, for arguments of at least 10."""
    inverse = 1.0 / y
    square = inverse * inverse
    if y.dtype == torch.float32:  # two terms are exact to 1e-8
        return inverse * (1 / 12 - square / 360)
    tail = 1 / 1260 - square * (1 / 1680 - square / 1188)
    return inverse * (1 / 12 - square * (1 / 360 - square * tail))


def _stirling_slope(y: Tensor) -> Tensor:
    """Return the derivative of the Stirling error."""
    small, inverse = y.clamp(max=_STIRLING_FROM), 1.0 / y.clamp(min=_STIRLING_FROM)
    square = inverse * inverse
    direct = torch.digamma(small) - small.log() + 0.5 / small
    tail = 1 / 252 - square * (1 / 240 - square / 132)
    return direct - square * (1 / 12 - square * (1 / 120 - square * tail)) - _SLOPE_OFFSET


def _log_ratio(relative: Tensor, far: Tensor) -> Tensor:
    """Return log(a / b) from (a - b) / b down to a = b / 2, and from ``far`` below.

    Each of the two terms is constant where the other one is in charge.
    """
    near = relative.clamp(min=-0.5).log1p()
    return near + (far.clamp(max=-_LOG_2) + _LOG_2)


def _count_constant(x: Tensor) -> Tensor:
    """Return log(x!) - x log x + x, the part of the log-pmf that no parameter reaches."""
    positive = x.clamp(min=1.0)
    constant = stirling_error(positive) + 0.5 * positive.log() + 0.5 * _LOG_2PI
    return constant - (1.0 - x.clamp(max=1.0))  # which is 1 at x = 1 and must be 0 at x = 0
