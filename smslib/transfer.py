"""Transfer: learn the shifts of new perturbations and nothing else.

The stages of the paper's protocol (Sec. 5.2): train, binarise the gates, refit, freeze encoder and
decoder, adapt the shifts of held-out perturbations, score. A stage returns a new model.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from smslib.data import Cells, Design
from smslib.evaluate import by_condition, elbo, iwelbo, latents
from smslib.model import SMSVAE
from smslib.priors import (
    BetaGate,
    FixedGate,
    Gate,
    GaussianSlab,
    L1Gate,
    LogitGate,
    NoSlab,
    OpenGate,
    PointSlab,
    ShiftPrior,
    Slab,
)
from smslib.train import TrainConfig, fit

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["adapt", "binarise", "extend", "protocol", "refit"]

# A pass shrinks the distance to the optimum by the prior's share of the posterior's precision: few
# are enough where the counts say much about a latent, and where they say little the ELBO is flat.
_MOST_PASSES, _CLOSE_ENOUGH = 20, 1e-3
_NO_NATS = 1e-12  # of evidence: too little to divide by


def binarise(model: SMSVAE, *, threshold: float = 0.5) -> SMSVAE:
    """Return a copy whose gates are fixed, open where more probable than ``threshold``.

    A slab with a posterior becomes the point at its mean.

    Parameters
    ----------
    model : SMSVAE
    threshold : float
        Probability of a gate, 0 to 1.
    """
    fixed = copy.deepcopy(model)
    if isinstance(fixed.prior.slab, GaussianSlab):
        fixed.prior.slab = PointSlab.at(fixed.prior.slab())
    fixed.prior.gate = FixedGate.at(model.prior.graph(threshold=threshold).to(model.prior.dose))
    fixed.estimator = "expected"
    return fixed


def refit(
    model: SMSVAE, cells: Cells, config: TrainConfig, *, validation: Cells | None = None
) -> SMSVAE:
    """Return a copy with binarised gates, trained again (paper, Sec. 5.2).

    Parameters
    ----------
    model : SMSVAE
        Trained on ``cells``.
    cells : Cells
    config : TrainConfig
        Its warm-up is cut to one epoch, as in the released baselines; the released refit of sVAE+
        has none.
    validation : Cells, optional
    """
    again = binarise(model)
    fit(again, cells, replace(config, warmup_epochs=1), validation=validation, progress=False)
    return again


def extend(model: SMSVAE, design: Design) -> SMSVAE:
    """Return a binarised copy that knows a larger design.

    New targets start without a shift and with open gates, as in the paper, which fixes gamma to 1
    for held-out perturbations. What was known keeps its values.

    Parameters
    ----------
    model : SMSVAE
    design : Design
        Made by ``model.prior.design.extend(...)``.

    Raises
    ------
    ValueError
        If the design does not begin with the one that the model knows, doses included.
    """
    known = model.prior.design
    if not _begins_with(design, known):
        raise ValueError(
            "the design does not begin with the conditions, targets and doses the model was "
            "trained on; make it with model.prior.design.extend(new_conditions)"
        )
    larger = binarise(model)
    slab, gate = larger.prior.slab, larger.prior.gate
    pad = (0, 0, 0, design.n_targets - known.n_targets)
    gate.probability = nn.functional.pad(gate.probability, pad, value=1.0)
    if isinstance(slab, NoSlab):
        slab.zero = nn.functional.pad(slab.zero, pad)
    else:
        slab.mean = nn.Parameter(nn.functional.pad(slab.mean.detach(), pad))
    like_the_model = replace(design, matrix=design.matrix.to(model.prior.dose))
    larger.prior = ShiftPrior(like_the_model, slab, gate)
    return larger


def _begins_with(design: Design, known: Design) -> bool:
    n_conditions, n_targets = known.n_conditions, known.n_targets
    if (
        design.conditions[:n_conditions] != known.conditions
        or design.targets[:n_targets] != known.targets
    ):
        return False
    doses = nn.functional.pad(known.matrix, (0, design.n_targets - n_targets))
    return torch.equal(design.matrix[:n_conditions].to(doses), doses)


def adapt(
    model: SMSVAE,
    cells: Cells,
    *,
    design: Design,
    how: Literal["closed-form", "gradient"] = "closed-form",
    config: TrainConfig | None = None,
    drift: bool = False,
    gates: Literal["open", "learned"] = "open",
    beta: float = 1.0,
) -> SMSVAE:
    r"""Return a copy that has learned the shifts of the new conditions of ``design``.

    Encoder and decoder stay as they are, so the ELBO depends on a new shift only through
    :math:`KL(q(z|x) \| N(\mu, I))`, and its optimum is the mean of the cells' posterior means: one
    pass, where the released code takes 300 epochs. Shifts with a prior (CPA-VAE, SAMS-VAE) are
    shrunk by it. Where the posterior mean itself uses the prior (``newton``), the pass is repeated
    until the shifts agree with the means they imply.

    Parameters
    ----------
    model : SMSVAE
    cells : Cells
        Cells of the new conditions, labelled by ``design``.
    design : Design
        The model's design extended by conditions of one new target each; several may share it,
        at doses of their own. A new condition of known targets alone has their shifts.
    how : {"closed-form", "gradient"}
        "gradient" fits by Adam in training mode, as released: with batch normalisation and
        dropout the shifts are then fitted to other codes than those they are scored with. A prior
        of the shifts has no part in it.
    config : TrainConfig, optional
        For "gradient"; 300 epochs at 0.005 without warm-up by default. The released step also
        has Adam's eps at 0.01, a weight decay of 1e-6 and, for the baselines, an epoch of
        warm-up: they hardly move the optimum (of 20 conditions by 2e-5 of a shift).
    drift : bool
        For "gradient": whether the running statistics of the encoder's batch normalisation follow
        the new cells, as in the released baselines. Those of the released sVAE+ do not.
    gates : {"open", "learned"}
        Whether the new targets move every latent (the paper fixes their gamma to 1) or those alone
        for which the cells outweigh the sparsity that the model was trained with. "learned" needs
        the closed form and a model whose gates are not binarised; a method without sparsity keeps
        its gates open.
    beta : float
        Weight of the KL term that the model was trained with: it weighs the cells against the
        sparsity and the prior of the shifts.

    Raises
    ------
    ValueError
        If a condition with a new target has no cells, or another target besides; if the design is
        no extension (`extend`); if ``how`` or ``gates`` is unknown; for ``drift`` without
        gradients; or for gates to be learned by gradients or from a binarised model.

    Notes
    -----
    Why the gates have a closed form too. The networks being frozen, a new target with n cells,
    dose d and mean posterior mean :math:`\bar m` enters the training objective, with one gate
    probability :math:`\pi` and one shift :math:`\mu` per latent, through

    .. math::
        -\tfrac12 \sum_i E_\gamma (m_i - d \gamma \mu)^2 - \mathrm{pen}(\pi)
        = \mathrm{const} + \pi n (d \mu \bar m - \tfrac12 d^2 \mu^2) - \mathrm{pen}(\pi),

    because :math:`\gamma^2 = \gamma`. The bracket is largest at :math:`\mu = \bar m / d` whatever
    :math:`\pi` is, where it makes :math:`\pi L` with the evidence
    :math:`L = n \bar m^2 / 2` nats: the logarithm of the likelihood ratio of a moved and an
    unmoved latent. What is left is one number per gate, :math:`\max_\pi \pi L - pen(\pi)`:

    ==================  =====================================  ================================
    sparsity            best :math:`\pi` (cut at 0 and 1)      open (:math:`\pi > 1/2`) if
    ==================  =====================================  ================================
    Beta, "tied"        :math:`1 - (\alpha - 1) / L`           :math:`L > 2 (\alpha - 1)`
    Beta, "profile"     :math:`(e^L - \alpha) / (e^L - 1)`     :math:`L > \log(2 \alpha - 1)`
    Beta, "collapsed"   :math:`1 / (1 + \alpha e^{-L})`        :math:`L > \log \alpha`
    L1                  1 if L exceeds the strength, else 0    :math:`L >` strength
    ==================  =====================================  ================================

    The first line is the threshold :math:`|\bar m| > \sqrt{4 (\alpha - 1) / n}` of training. Under
    a weight :math:`\beta` of the KL term, n is :math:`\beta` times the number of cells, and of
    several doses :math:`\sum_i d_i^2` stands for it and :math:`\sum_i d_i m_i / \sum_i d_i^2` for
    :math:`\bar m / d`.

    A shift with the prior :math:`N(0, s^2)` and the posterior :math:`N(\mu, v)` is charged
    :math:`\pi\, KL(N(\mu, v) \| N(0, s^2))`, too, and the bracket has :math:`\mu^2 + v` for
    :math:`\mu^2`. At dose one and with :math:`k = n + 1 / s^2` it is then largest at
    :math:`\mu = n \bar m / k` and :math:`v = 1 / k`, where
    :math:`L = n^2 \bar m^2 / 2k - \tfrac12 \log(k s^2)`: a log Bayes factor. Of its posterior the
    mean is kept.

    With ``newton`` the posterior means lean on the prior, and shifts and gates are found in turn,
    starting from open gates: an edge stays if training would have held it open.
    """
    _check_how(how, drift=drift)
    _check_gates(gates, how, model.prior.gate)
    larger = extend(model, design)
    _check_new(cells, design, model.prior.design)
    if isinstance(larger.prior.slab, NoSlab):
        return larger
    known = model.prior.design.n_targets
    if how == "gradient":
        return _adapt_by_gradient(larger, cells, config, n_known=known, drift=drift)
    rule = _Rule(model.prior.slab, OpenGate(0, 0), beta)
    _settle(larger, cells, known, rule)
    if gates == "learned":
        _settle(larger, cells, known, rule._replace(gate=model.prior.gate))
    return larger


def protocol(
    model: SMSVAE,
    train: Cells,
    *,
    config: TrainConfig,
    validation: Cells | None,
    adaptation: Cells,
    scoring: Cells,
    design: Design,
    n_draws: int = 1000,
    how: Literal["closed-form", "gradient"] = "closed-form",
    drift: bool = False,
) -> tuple[SMSVAE, pd.DataFrame]:
    """Run the stages of the paper's transfer experiment on a trained model.

    Parameters
    ----------
    model : SMSVAE
        Trained on ``train``.
    train : Cells
    config : TrainConfig
        Of the refit with binarised gates.
    validation : Cells or None
        For the refit.
    adaptation, scoring : Cells
        Cells of the held-out conditions, labelled by ``design``: those that their shifts are
        learned from, and those that are scored. The released code uses the same cells for both.
    design : Design
        The model's design extended by the held-out conditions.
    n_draws : int
        Of the IWELBO.
    how, drift
        As in `adapt`.

    Returns
    -------
    adapted : SMSVAE
    stages : DataFrame
        Per stage ("trained", "refitted", "adapted") and held-out condition: mean ELBO and IWELBO
        in nats per cell, higher is better, with standard error and cells. Binarising alone is no
        stage: a condition without a shift has the prior N(0, I), whatever the gates.

    Raises
    ------
    ValueError
        As in `adapt`.
    """
    _check_how(how, drift=drift)
    refitted = refit(model, train, config, validation=validation)
    stages = {
        "trained": extend(model, design),
        "refitted": extend(refitted, design),
        "adapted": adapt(refitted, adaptation, design=design, how=how, drift=drift),
    }
    return stages["adapted"], _stage_table(stages, scoring, design, n_draws)


def _stage_table(
    stages: dict[str, SMSVAE], scoring: Cells, design: Design, n_draws: int
) -> pd.DataFrame:
    import pandas as pd

    tables = []
    for stage, model in stages.items():
        table = by_condition(iwelbo(model, scoring, n_draws=n_draws), scoring, design)
        table = table.rename(columns={"mean": "iwelbo"})
        table.insert(0, "elbo", by_condition(elbo(model, scoring), scoring, design)["mean"])
        tables.append(table[table["n"] > 0].assign(stage=stage).reset_index())
    return pd.concat(tables, ignore_index=True)


class _Rule(NamedTuple):
    """What decides a new shift and its gate, besides the cells."""

    slab: Slab
    gate: Gate
    beta: float


def _settle(model: SMSVAE, cells: Cells, n_known: int, rule: _Rule) -> None:
    """Learn the shifts and gates of all targets after the known ones."""
    for _ in range(_MOST_PASSES if model.newton else 1):
        if _move_shifts(model, cells, n_known, rule) < _CLOSE_ENOUGH:
            break


@torch.no_grad()
def _move_shifts(model: SMSVAE, cells: Cells, n_known: int, rule: _Rule) -> float:
    """Set each new shift to the best for its cells' posterior means; return the largest move."""
    codes = torch.from_numpy(latents(model, cells)).to(model.device)
    prior = model.prior
    before = prior.gate() * prior.slab()
    for target in range(n_known, len(prior.targets)):
        n_cells, mean = _mean_code(codes, prior.dose[cells.condition, target])
        if n_cells > 0:
            prior.slab.mean[target] = rule.slab.best(rule.beta * n_cells, mean)
            evidence = rule.slab.evidence(rule.beta * n_cells, mean)
            prior.gate.probability[target] = _best_gate(rule.gate, evidence)
    return float((prior.gate() * prior.slab() - before).abs().max())


def _mean_code(
    codes: Float[Tensor, "cell latent"], dose: Float[Tensor, " cell"]
) -> tuple[Float[Tensor, ""], Float[Tensor, " latent"]]:
    """Return how many cells of dose one those of a target are worth, and their mean code there."""
    mine, n_cells = dose.nonzero()[:, 0], dose.square().sum()
    return n_cells, (dose[mine].unsqueeze(1) * codes[mine]).sum(0) / n_cells


def _best_gate(gate: Gate, evidence: Float[Tensor, " latent"]) -> Float[Tensor, " latent"]:
    """Return the pi that maximises ``pi * evidence - penalty(pi)``, as derived in `adapt`."""
    if isinstance(gate, L1Gate):
        return (evidence > gate.strength).to(evidence)
    if not isinstance(gate, BetaGate):
        return (evidence >= gate.asked()).to(evidence)
    return {"tied": _best_tied, "profile": _best_profile, "collapsed": _best_collapsed}[
        gate.weight
    ](evidence, gate.alpha).clamp(0.0, 1.0)


def _best_tied(evidence: Float[Tensor, " latent"], alpha: float) -> Float[Tensor, " latent"]:
    if alpha == 1.0:  # nothing is charged
        return (evidence >= 0).to(evidence)
    return 1.0 - (alpha - 1.0) / evidence.clamp(min=_NO_NATS)


def _best_profile(evidence: Float[Tensor, " latent"], alpha: float) -> Float[Tensor, " latent"]:
    return (1.0 - alpha * (-evidence).exp()) / -torch.expm1(-evidence.clamp(min=_NO_NATS))


def _best_collapsed(evidence: Float[Tensor, " latent"], alpha: float) -> Float[Tensor, " latent"]:
    return (evidence - math.log(alpha)).sigmoid()


def _adapt_by_gradient(
    model: SMSVAE, cells: Cells, config: TrainConfig | None, *, n_known: int, drift: bool
) -> SMSVAE:
    """Fit the new rows of the slab alone, in training mode."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in (model.decoder if drift else model).modules():
        if isinstance(module, nn.BatchNorm1d):
            module.momentum = 0.0
    mean = model.prior.slab.mean.requires_grad_(True)
    known = mean[:n_known].detach().clone()
    released = TrainConfig(learning_rate=5e-3, schedule="constant", warmup_epochs=0)
    fit(model, cells, config or released)
    with torch.no_grad():  # weight decay moves these, too, and so do cells of known conditions
        mean[:n_known] = known
    return model


def _check_how(how: str, *, drift: bool) -> None:
    if how not in ("closed-form", "gradient"):
        raise ValueError(f"how is {how!r}; expected 'closed-form' or 'gradient'")
    if drift and how == "closed-form":
        raise ValueError(
            "drift=True with how='closed-form', which moves no running statistics; leave it out "
            "or use how='gradient'"
        )


def _check_gates(gates: str, how: str, gate: Gate) -> None:
    if gates not in ("open", "learned"):
        raise ValueError(f"gates is {gates!r}; expected 'open' or 'learned'")
    if gates == "learned" and how != "closed-form":
        raise ValueError(
            f"gates='learned' with how={how!r}; gates are learned in closed form, "
            "how='closed-form'"
        )
    if gates == "learned" and not isinstance(gate, LogitGate | OpenGate):
        raise ValueError(
            f"gates='learned', but those of the model are fixed ({type(gate).__name__}) and tell "
            "no sparsity; adapt the model as trained, before binarise or refit"
        )


def _check_new(cells: Cells, design: Design, known: Design) -> None:
    """Refuse new targets without cells of their own."""
    present = set(cells.condition.unique().tolist())
    for row in range(known.n_conditions, design.n_conditions):
        name, targets = design.conditions[row], design.matrix[row].nonzero()[:, 0]
        if not bool((targets >= known.n_targets).any()):
            continue
        if len(targets) > 1:
            raise ValueError(
                f"new condition {name!r} is not a single target; adapt to its targets one by one"
            )
        if row not in present:
            raise ValueError(f"new condition {name!r} has no cells to learn its shift from")
