r"""The prior of every method: ``z | c ~ N(s(c), I)``, a slab times a gate per target and latent.

.. math:: s(c) = \sum_t D_{ct}\, \gamma_t \odot \mu_t

A method is a cell of a table: how large a shift is (the slab :math:`\mu`) and whether there is one
(the gate :math:`\gamma`).

=========  ==============  =====================  ============================
method     slab            gate                   source
=========  ==============  =====================  ============================
VAE        none            open                   Lopez et al. 2018
beta-VAE   none            open                   Higgins et al. 2017
iVAE       point           open                   Khemakhem et al. 2020
sVAE       point           L1 penalty             Lachapelle et al. 2022
sVAE+      point           Beta(1, alpha)         Lopez et al. 2023
CPA-VAE    Gaussian        open                   Bereket & Karaletsos 2023
SAMS-VAE   Gaussian        Bernoulli(p)           Bereket & Karaletsos 2023
=========  ==============  =====================  ============================

The last two are written ``z = z_basal + D (E * M)`` with z_basal ~ N(0, I), and x depends on z
alone: the same generative model, with a prior on the shifts and a posterior for them.

"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from smslib.data import Design, seeded
from smslib.distributions import Moments, gaussian_log_prob, straight_through_bernoulli

__all__ = [
    "METHODS",
    "BernoulliGate",
    "BetaGate",
    "FixedGate",
    "Gate",
    "GaussianSlab",
    "L1Gate",
    "LogitGate",
    "NoSlab",
    "OpenGate",
    "PointSlab",
    "ShiftPrior",
    "Slab",
]

Estimator = Literal["expected", "sampled"]
_OPEN_LOGIT = 5.0  # sigmoid(5) = .993: the graph starts full, as released
_FIRST_SD = 0.1  # of q(shift): near a point, so that a fit starts like one without it


class Slab(nn.Module):
    """How large the shift of each target is when its gate is open: (n_targets, n_latent)."""

    def options(self) -> dict[str, float | str]:
        """Return what, besides the two sizes, the constructor needs to build it again."""
        return {}

    def forward(self) -> Float[Tensor, "target latent"]:
        """Return the shift, or its posterior mean, in prior standard deviations."""
        raise NotImplementedError

    def variance(self) -> Float[Tensor, "target latent"]:
        """Return the posterior variance of the shift."""
        return torch.zeros_like(self())

    def draw(self, target: Int[Tensor, "*index"]) -> Float[Tensor, "*index latent"]:
        """Return shifts of the given targets, drawn anew for each index."""
        return self()[target]

    def penalty(self, opened: Float[Tensor, "target latent"]) -> Float[Tensor, ""]:
        """Return what shifts are charged behind gates so probably open, nats over the screen."""
        return torch.zeros(())

    def best(
        self, n_cells: Float[Tensor, ""], mean: Float[Tensor, " latent"]
    ) -> Float[Tensor, " latent"]:
        """Return the shift that a target's cells ask for, prior standard deviations.

        Parameters
        ----------
        n_cells : Tensor, ()
            Sum of the squared doses of the cells: their number, at dose one.
        mean : Tensor, (n_latent,)
            Mean of their posterior means, weighted by dose and per dose.
        """
        return mean

    def evidence(
        self, n_cells: Float[Tensor, ""], mean: Float[Tensor, " latent"]
    ) -> Float[Tensor, " latent"]:
        """Return the nats by which the bound prefers that shift to none.

        They are ``n m^2 / 2`` for n cells with mean m (derived in `smslib.transfer.adapt`).

        Parameters
        ----------
        n_cells, mean : Tensor
            As in `best`.
        """
        return n_cells * mean.square() / 2

    def threshold(
        self, nats: float, n_cells: Float[Tensor, " target"]
    ) -> Float[Tensor, " target"]:
        """Return the mean at which the evidence is so many nats; 0 where it is never less.

        Parameters
        ----------
        nats : float
        n_cells : Tensor, (n_targets,)
            As in `best`, of each target.
        """
        return (2.0 * nats / n_cells).clamp(min=0.0).sqrt()


class NoSlab(Slab):
    """No shift at all: VAE and beta-VAE."""

    def __init__(self, n_targets: int, n_latent: int) -> None:
        super().__init__()
        self.register_buffer("zero", torch.zeros(n_targets, n_latent))

    def forward(self) -> Float[Tensor, "target latent"]:
        """Return zeros."""
        return self.zero


class PointSlab(Slab):
    """A free parameter per target and latent: iVAE, sVAE, sVAE+ (paper, Sec. 3.2)."""

    def __init__(self, n_targets: int, n_latent: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.randn(n_targets, n_latent))

    @classmethod
    def at(cls, mean: Float[Tensor, "target latent"]) -> PointSlab:
        """Return shifts that start at the given values."""
        with seeded(0):  # what is drawn is not used, and must not move the caller's draws
            slab = cls(*mean.shape)
        slab.mean = nn.Parameter(mean.detach().clone())
        return slab

    def forward(self) -> Float[Tensor, "target latent"]:
        """Return the shifts."""
        return self.mean


class GaussianSlab(PointSlab):
    r"""Shifts with a prior N(0, scale²) and a posterior N(mean, v) behind open gates.

    Behind a shut gate nothing is known of a shift, and its posterior is the prior: the divergence
    counts with the probability of an open gate, and the moments of the product are those of
    :class:`ShiftPrior`. The authors' mean-field guide has one posterior for both cases, which is
    a looser bound.

    Parameters
    ----------
    scale : float
        Prior standard deviation of a shift, in prior standard deviations of a latent.

    Raises
    ------
    ValueError
        If the scale is not positive.
    """

    def __init__(self, n_targets: int, n_latent: int, *, scale: float = 1.0) -> None:
        super().__init__(n_targets, n_latent)
        if not scale > 0:
            raise ValueError(f"scale is {scale}; expected a positive standard deviation")
        self.scale = scale
        start = torch.full((n_targets, n_latent), 2.0 * math.log(_FIRST_SD))
        self.log_variance = nn.Parameter(start)

    def options(self) -> dict[str, float | str]:
        """Return the scale."""
        return {"scale": self.scale}

    def variance(self) -> Float[Tensor, "target latent"]:
        """Return the posterior variance of the shift."""
        return self.log_variance.exp()

    def draw(self, target: Int[Tensor, "*index"]) -> Float[Tensor, "*index latent"]:
        """Return reparameterised shifts, drawn anew for each index."""
        mean = self.mean[target]
        return mean + (0.5 * self.log_variance[target]).exp() * torch.randn_like(mean)

    def penalty(self, opened: Float[Tensor, "target latent"]) -> Float[Tensor, ""]:
        """Return KL(N(mean, v) || N(0, scale²)) weighted by the gates, nats over the screen."""
        relative = (self.mean.square() + self.variance()) / self.scale**2
        kl = 0.5 * (relative - 1.0 - self.log_variance) + math.log(self.scale)
        return (opened * kl).sum()

    def best(
        self, n_cells: Float[Tensor, ""], mean: Float[Tensor, " latent"]
    ) -> Float[Tensor, " latent"]:
        """Return the posterior mean, which the prior has shrunk."""
        return n_cells * mean / self._precision(n_cells)

    def evidence(
        self, n_cells: Float[Tensor, ""], mean: Float[Tensor, " latent"]
    ) -> Float[Tensor, " latent"]:
        r"""Return :math:`\frac{(n m)^2}{2 k} - \frac12 \log(k\, scale^2)`, a log Bayes factor.

        With :math:`k = n + 1 / scale^2`; the second term is the price of a shift that the prior
        did not foretell.
        """
        fit = (n_cells * mean).square() / (2.0 * self._precision(n_cells))
        return fit - self._price(n_cells)

    def threshold(
        self, nats: float, n_cells: Float[Tensor, " target"]
    ) -> Float[Tensor, " target"]:
        """Return the mean at which the evidence is so many nats; 0 where it is never less."""
        needed = (nats + self._price(n_cells)).clamp(min=0.0)
        return (2.0 * self._precision(n_cells) * needed).sqrt() / n_cells

    def _precision(self, n_cells: Float[Tensor, "*target"]) -> Float[Tensor, "*target"]:
        """Return that of the posterior of a shift."""
        return n_cells + self.scale**-2

    def _price(self, n_cells: Float[Tensor, "*target"]) -> Float[Tensor, "*target"]:
        return 0.5 * (self._precision(n_cells) * self.scale**2).log()


class Gate(nn.Module):
    """Whether each target moves each latent: (n_targets, n_latent)."""

    def options(self) -> dict[str, float | str]:
        """Return what, besides the two sizes, the constructor needs to build it again."""
        return {}

    def forward(self) -> Float[Tensor, "target latent"]:
        """Return the probability that the gate is open."""
        raise NotImplementedError

    def draw(self, target: Int[Tensor, "*index"]) -> Float[Tensor, "*index latent"]:
        """Return hard gates for the given targets, drawn anew for each index."""
        return self()[target]

    def penalty(self) -> Float[Tensor, ""]:
        """Return what sparsity charges, nats over the whole screen."""
        return torch.zeros(())

    def asked(self) -> float:
        """Return the evidence, nats, beyond which a gate ends more open than shut.

        It is that of `Slab.evidence`, which a shift that has a prior makes less. Minus infinity
        of a gate that is open whatever the cells say.
        """
        return 0.0


class FixedGate(Gate):
    """Gates that are given, not learned (after binarisation)."""

    def __init__(self, n_targets: int, n_latent: int) -> None:
        super().__init__()
        self.register_buffer("probability", torch.ones(n_targets, n_latent))

    @classmethod
    def at(cls, probability: Float[Tensor, "target latent"]) -> FixedGate:
        """Return gates fixed at the given probabilities."""
        gate = cls(*probability.shape)
        gate.probability = probability.detach().clone()
        return gate

    def forward(self) -> Float[Tensor, "target latent"]:
        """Return the given gates."""
        return self.probability

    def asked(self) -> float:
        """Return minus infinity: what is given asks for nothing."""
        return -math.inf


class OpenGate(FixedGate):
    """Gates that are always open: iVAE."""


class LogitGate(Gate):
    """Gates with a free logit each, without any pressure to close (the released iVAE)."""

    def __init__(self, n_targets: int, n_latent: int, *, logit: float = _OPEN_LOGIT) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.full((n_targets, n_latent), logit))

    def forward(self) -> Float[Tensor, "target latent"]:
        """Return sigmoid(logit)."""
        return self.logit.sigmoid()

    def draw(self, target: Int[Tensor, "*index"]) -> Float[Tensor, "*index latent"]:
        """Return straight-through draws, one per index (as released: one per cell and step)."""
        return straight_through_bernoulli(self.logit[target])


class L1Gate(LogitGate):
    """Gates charged in proportion to their probability: sVAE.

    Parameters
    ----------
    strength : float
        Nats over the screen per unit of gate probability, which makes it comparable with
        `BetaGate`. The released code adds ``lambda * mean(pi)`` to a loss per cell; the same
        pressure is ``strength = lambda * n_cells / (n_targets * n_latent)``.
    """

    def __init__(
        self, n_targets: int, n_latent: int, *, strength: float, logit: float = _OPEN_LOGIT
    ) -> None:
        super().__init__(n_targets, n_latent, logit=logit)
        self.strength = strength

    def options(self) -> dict[str, float | str]:
        """Return the strength."""
        return {"strength": self.strength}

    def penalty(self) -> Float[Tensor, ""]:
        """Return strength times the expected number of open gates."""
        return self.strength * self().sum()

    def asked(self) -> float:
        """Return the strength."""
        return self.strength


class BetaGate(LogitGate):
    r"""Gates :math:`\gamma \sim` Bernoulli(w) with w ~ Beta(1, alpha): sVAE+.

    Parameters
    ----------
    alpha : float
        Sparsity; the prior expects a share 1 / (1 + alpha) of open gates. The paper advises
        alpha = K, the number of interventions; the released default of 1 is a flat prior.
    weight : {"tied", "profile", "collapsed"}
        What becomes of w. ``"tied"`` sets it to the gate's probability, which removes the KL and
        leaves -log Beta(pi; 1, alpha) (paper, App. B, and the released code). ``"profile"``
        maximises the ELBO over a free w, at :math:`w = \pi/\alpha`. ``"collapsed"`` integrates w
        out, which leaves gamma ~ Bernoulli(1 / (1 + alpha)).

    Raises
    ------
    ValueError
        If ``weight`` is unknown, alpha is not positive, or alpha is below 1 where w is profiled
        (the best w would be 1, where the density is infinite).
    """

    def __init__(
        self,
        n_targets: int,
        n_latent: int,
        *,
        alpha: float,
        weight: Literal["tied", "profile", "collapsed"] = "tied",
        logit: float = _OPEN_LOGIT,
    ) -> None:
        super().__init__(n_targets, n_latent, logit=logit)
        if weight not in ("tied", "profile", "collapsed"):
            raise ValueError(f"weight is {weight!r}; expected 'tied', 'profile' or 'collapsed'")
        smallest = 1.0 if weight == "profile" else 0.0
        if alpha < smallest or alpha == 0:
            raise ValueError(
                f"alpha is {alpha}; expected a positive number, at least 1 with weight='profile' "
                "(1 is a flat prior, more is sparser)"
            )
        self.alpha = alpha
        self.weight = weight

    def options(self) -> dict[str, float | str]:
        """Return alpha and the treatment of w."""
        return {"alpha": self.alpha, "weight": self.weight}

    def penalty(self) -> Float[Tensor, ""]:
        """Return the sparsity term of the chosen treatment of w."""
        return {"tied": self._tied, "profile": self._profile, "collapsed": self._collapsed}[
            self.weight
        ]().sum()

    def asked(self) -> float:
        """Return what the chosen treatment of w asks of an edge; none where the prior is flat."""
        if self.weight == "tied":
            return 2.0 * (self.alpha - 1.0) if self.alpha >= 1.0 else -math.inf
        return math.log(self.alpha if self.weight == "collapsed" else 2.0 * self.alpha - 1.0)

    def _tied(self) -> Float[Tensor, "target latent"]:
        return (self.alpha - 1) * functional.softplus(self.logit) - math.log(self.alpha)

    def _profile(self) -> Float[Tensor, "target latent"]:
        log_alpha = math.log(self.alpha)
        log_on = functional.logsigmoid(self.logit) - log_alpha
        log_off = (self.alpha - 1 + (-self.logit).sigmoid()).log() - log_alpha
        return self._kl(log_on, log_off) - log_alpha - (self.alpha - 1) * log_off

    def _collapsed(self) -> Float[Tensor, "target latent"]:
        p = torch.as_tensor(1 / (1 + self.alpha), dtype=self.logit.dtype)
        return self._kl(p.log(), (-p).log1p())

    def _kl(self, log_on: Tensor, log_off: Tensor) -> Float[Tensor, "target latent"]:
        """Return KL(Bernoulli(pi) || Bernoulli(w)), from logits so that no gate saturates."""
        pi = self()
        on = pi * (functional.logsigmoid(self.logit) - log_on)
        return on + (1 - pi) * (functional.logsigmoid(-self.logit) - log_off)


class BernoulliGate(BetaGate):
    """Gates with a given prior probability p: SAMS-VAE.

    It is what `BetaGate` is with its weight integrated out, at alpha = (1 - p) / p: SAMS-VAE and
    an sVAE+ whose hyperprior is treated exactly have the same gates.

    Parameters
    ----------
    p : float
        Prior probability that a gate is open.

    Raises
    ------
    ValueError
        If p is not between 0 and 1.
    """

    def __init__(
        self, n_targets: int, n_latent: int, *, p: float, logit: float = _OPEN_LOGIT
    ) -> None:
        if not 0.0 < p < 1.0:
            raise ValueError(f"p is {p}; expected a probability between 0 and 1")
        alpha = (1.0 - p) / p
        super().__init__(n_targets, n_latent, alpha=alpha, weight="collapsed", logit=logit)
        self.p = p

    def options(self) -> dict[str, float | str]:
        """Return p."""
        return {"p": self.p}


class ShiftPrior(nn.Module):
    """p(z | c) = N(s(c), I): the only place where a model learns what was done to a cell.

    Parameters
    ----------
    design : Design
    slab : Slab
    gate : Gate
    """

    def __init__(self, design: Design, slab: Slab, gate: Gate) -> None:
        super().__init__()
        self.conditions = design.conditions
        self.targets = design.targets
        self.slab = slab
        self.gate = gate
        self.register_buffer("dose", design.matrix.clone(), persistent=False)
        slots = _slots(design.matrix)
        self.register_buffer("slot_target", slots, persistent=False)
        slot_dose = torch.gather(design.matrix, 1, slots)
        self.register_buffer("slot_dose", slot_dose, persistent=False)

    @property
    def design(self) -> Design:
        """What was done in each condition."""
        return Design(self.conditions, self.targets, self.dose)

    def forward(self) -> Moments:
        """Return mean and variance of every condition's shift, (n_conditions, n_latent) each."""
        slab, gate = self.slab(), self.gate()
        spread = slab.square() * (gate - gate.square()) + gate * self.slab.variance()
        return Moments(self.dose @ (gate * slab), self.dose.square() @ spread)

    def of(self, condition: Int[Tensor, " cell"], estimator: Estimator) -> Moments:
        """Return the moments of each cell's shift, exact or from one straight-through draw."""
        if estimator == "expected":
            return self().at(condition)
        target, dose = self.slot_target[condition], self.slot_dose[condition]
        effect = self.gate.draw(target) * self.slab.draw(target)

        drawn = (dose.unsqueeze(-1) * effect).sum(1)
        return Moments(drawn, torch.zeros_like(drawn))

    def mode(self, *, threshold: float = 0.5) -> Float[Tensor, "condition latent"]:
        """Return every condition's shift, each gate either open or shut, each slab at its mean."""
        return self.dose @ (self.graph(threshold=threshold) * self.slab())

    def log_prob(
        self, z: Float[Tensor, "*draw cell latent"], condition: Int[Tensor, " cell"]
    ) -> Float[Tensor, "*draw cell"]:
        """Return log p(z | c) at the modal graph, nats."""
        return gaussian_log_prob(z, self.mode()[condition], 1.0)

    def penalty(self) -> Float[Tensor, ""]:
        """Return everything that is charged once per screen, nats."""
        return self.gate.penalty().to(self.dose) + self.slab.penalty(self.gate()).to(self.dose)

    def graph(self, *, threshold: float = 0.5) -> Bool[Tensor, "target latent"]:
        """Return the estimated mechanism graph: edges more probable than ``threshold``."""
        return self.gate() > threshold

    def thresholds(self, n_cells: Float[Tensor, " target"]) -> Float[Tensor, " target"]:
        """Return the mean of its cells, per dose, beyond which a target moves a latent.

        Parameters
        ----------
        n_cells : Tensor, (n_targets,)
            Of each target, as in `Slab.best`.
        """
        return self.slab.threshold(self.gate.asked(), n_cells)

    def probabilities(self) -> Float[np.ndarray, "target latent"]:
        """Return the probability of every edge."""
        return self.gate().detach().cpu().numpy()


def _slots(matrix: Float[Tensor, "condition target"]) -> Int[Tensor, "condition slot"]:
    """Return the targets of each condition, padded to the longest combination.

    Padding points at targets of dose zero, so that it adds nothing.
    """
    n_slots = max(1, int((matrix != 0).sum(1).max()))
    return (matrix != 0).int().argsort(dim=1, descending=True, stable=True)[:, :n_slots]


def _always_open(kind: type[Slab]) -> Callable[[int, int, float | None], tuple[Slab, Gate]]:
    """Return the method with such shifts and no sparsity."""

    def build(n_targets: int, n_latent: int, sparsity: float | None) -> tuple[Slab, Gate]:
        _refuse_sparsity(sparsity)
        return kind(n_targets, n_latent), OpenGate(n_targets, n_latent)

    return build


def _svae(n_targets: int, n_latent: int, sparsity: float | None) -> tuple[Slab, Gate]:
    strength = 10.0 if sparsity is None else sparsity
    return PointSlab(n_targets, n_latent), L1Gate(n_targets, n_latent, strength=strength)


def _svae_plus(n_targets: int, n_latent: int, sparsity: float | None) -> tuple[Slab, Gate]:
    alpha = float(n_targets) if sparsity is None else sparsity
    return PointSlab(n_targets, n_latent), BetaGate(n_targets, n_latent, alpha=alpha)


def _sams_vae(n_targets: int, n_latent: int, sparsity: float | None) -> tuple[Slab, Gate]:
    p = 0.01 if sparsity is None else sparsity
    return GaussianSlab(n_targets, n_latent), BernoulliGate(n_targets, n_latent, p=p)


def _refuse_sparsity(sparsity: float | None) -> None:
    if sparsity is not None:
        raise ValueError(
            f"sparsity is {sparsity}, but this method has no sparse gates; leave it out or use "
            "'svae', 'svae+' or 'sams-vae'"
        )


SLABS = MappingProxyType({kind.__name__: kind for kind in (NoSlab, PointSlab, GaussianSlab)})
GATES = MappingProxyType(
    {
        kind.__name__: kind
        for kind in (OpenGate, FixedGate, LogitGate, L1Gate, BetaGate, BernoulliGate)
    }
)
# From a method's name to its slab and gate, given the number of targets and latents and the
# sparsity (None for the method's own).
METHODS: Mapping[str, Callable[[int, int, float | None], tuple[Slab, Gate]]] = MappingProxyType(
    {
        "vae": _always_open(NoSlab),
        "beta-vae": _always_open(NoSlab),
        "ivae": _always_open(PointSlab),
        "svae": _svae,
        "svae+": _svae_plus,
        "cpa-vae": _always_open(GaussianSlab),
        "sams-vae": _sams_vae,
    }
)
