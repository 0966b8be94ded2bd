"""The variational autoencoder whose prior shifts sparsely with the perturbation.

``encode`` and ``decode`` never see the condition: what was done to a cell enters through the
prior alone, so that a perturbation can act on the genes only through the latents it shifts.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from smslib import files, tensors
from smslib.data import Batches, Cells, Design, minibatches, seeded
from smslib.distributions import Moments, NegativeBinomial, kl_to_shifted_normal
from smslib.newton import log_rate_and_jacobian, newton_step
from smslib.priors import GATES, METHODS, SLABS, Estimator, ShiftPrior

__all__ = ["SMSVAE", "Likelihood", "Terms"]

Norm = Literal["batch", "layer", "none"]
Activation = Literal["relu", "leaky_relu"]
_SLOPES = {"leaky_relu": 0.2, "relu": 0.0}  # below zero
_SMALLEST_SPREAD = 1e-2  # of log counts: a constant gene must not become noise
_STEPS_IN_EVALUATION = 4  # further ones move nothing
_DEEP = 1e6  # UMIs of a cell, more than any real one has
SMALLEST_VARIANCE = 1e-4  # of q(z | x), as released


class Terms(NamedTuple):
    """The three terms of the ELBO."""

    reconstruction: Float[Tensor, " cell"]
    """E_q log p(x | z), nats."""
    kl: Float[Tensor, " cell"]
    """KL(q(z | x) || p(z | c)), gates integrated out or drawn, nats."""
    penalty: Float[Tensor, ""]
    """Sparsity, nats over the whole screen."""


@dataclass(frozen=True, eq=False)
class Likelihood:
    r"""log p(x | z) of given cells, prepared for many draws of z: ``decode(z).log_prob`` fast.

    .. math::
        \sum_g x_g \log\tfrac{\mu_g}{\theta_g}
        - (x_g + \theta_g) \log(1 + \tfrac{\mu_g}{\theta_g})
        + \log\tfrac{\Gamma(x_g + \theta_g)}{\Gamma(\theta_g) x_g!}

    The last term depends on no draw, and the first needs no logarithm, because the decoder works
    in logs. What remains per draw and gene is a softmax, an exponential and a log1p. Made by
    `SMSVAE.likelihood`.

    Parameters
    ----------
    logits : callable
        From draws of z to the decoder's output before the softmax.
    counts : Tensor, (n_cells, n_genes)
        UMIs.
    theta : Tensor, (n_genes,)
        Inverse dispersion.
    log_exposure : Tensor, (n_cells, n_genes)
        Log of the cell's UMIs over theta.
    constant : Tensor, (n_cells,)
        What depends on no draw, nats.
    """

    logits: Callable[[Tensor], Tensor]
    counts: Float[Tensor, "cell gene"]
    theta: Float[Tensor, " gene"]
    log_exposure: Float[Tensor, "cell gene"]
    constant: Float[Tensor, " cell"]

    @torch.no_grad()
    def at(self, cell: int, z: Float[Tensor, "draw latent"]) -> Float[Tensor, " draw"]:
        """Return log p(x | z) of one cell at every draw, nats; without gradients, in place."""
        log_odds = self.logits(z).log_softmax(-1).add_(self.log_exposure[cell])
        spread = log_odds.exp().log1p_()
        # Subtracted gene by gene: the two sums all but cancel when a cell has many UMIs.
        linear = log_odds.sub_(spread) @ self.counts[cell]
        return self.constant[cell] + linear - spread @ self.theta


class SMSVAE(nn.Module):
    r"""A VAE of counts with ``z | c ~ N(s(c), I)`` and ``x | z ~ NB(library * softmax f(z))``.

    Parameters
    ----------
    prior : ShiftPrior
    n_genes : int
    n_latent : int
    n_hidden, n_layers : int
        Width and depth of encoder and decoder (paper, App. D.1: 128 and 2).
    norm : {"none", "layer", "batch"}
        After each hidden linear map. ``"batch"`` is what was released; it couples the cells of a
        batch and makes "frozen" ambiguous.
    dropout : float
        In the encoder's hidden layers; the released code uses 0.1.
    activation : {"leaky_relu", "relu"}
    estimator : {"expected", "sampled"}
        Gates integrated out in closed form, or drawn straight-through (as released).
    n_hidden_encoder, n_layers_decoder : int, optional
        Where they differ from ``n_hidden`` and ``n_layers``.
    newton : bool
        Whether Gauss-Newton steps (`smslib.newton`) move the encoder's mean towards the mode of
        p(z | x, c): one in training, four in evaluation. The encoder alone misses it by more than
        the posterior is wide, and the decoder then learns a compressed map of the latents that is
        easier to encode. Needs ``norm="none"``.

    Raises
    ------
    ValueError
        If norm, activation or estimator is unknown, a size is below one, or ``newton`` meets a
        normalisation layer.
    """

    def __init__(
        self,
        prior: ShiftPrior,
        n_genes: int,
        *,
        n_latent: int,
        n_hidden: int = 128,
        n_layers: int = 2,
        norm: Norm = "none",
        dropout: float = 0.0,
        activation: Activation = "leaky_relu",
        estimator: Estimator = "expected",
        n_hidden_encoder: int | None = None,
        n_layers_decoder: int | None = None,
        newton: bool = False,
    ) -> None:
        super().__init__()
        if newton and norm != "none":
            raise ValueError(
                f"newton=True with norm={norm!r}; the step needs a decoder without normalisation, "
                "norm='none'"
            )
        if estimator not in get_args(Estimator):
            raise ValueError(f"estimator is {estimator!r}; expected one of {get_args(Estimator)}")
        options = {
            "n_genes": n_genes,
            "n_latent": n_latent,
            "n_hidden": n_hidden,
            "n_layers": n_layers,
            "norm": norm,
            "dropout": dropout,
            "activation": activation,
            "n_hidden_encoder": n_hidden_encoder,
            "n_layers_decoder": n_layers_decoder,
        }
        self.options = {
            name: _size(name, value) if name.startswith("n_") else value
            for name, value in options.items()
        }
        self.prior = prior
        self.estimator = estimator
        self.newton = newton
        width = n_hidden_encoder or n_hidden
        hidden = [n_hidden] * (n_layers_decoder or n_layers)
        self.encoder = _mlp([n_genes, *[width] * n_layers], norm, dropout, activation)
        self.posterior = nn.Linear(width, 2 * n_latent)
        self.decoder = _mlp([n_latent, *hidden], norm, 0.0, activation)
        self.genes = nn.Linear(n_hidden, n_genes)
        self.log_theta = nn.Parameter(torch.randn(n_genes))
        self.register_buffer("centre", torch.zeros(n_genes))
        self.register_buffer("spread", torch.ones(n_genes))

    @classmethod
    def preset(
        cls,
        method: str,
        design: Design,
        n_genes: int,
        *,
        n_latent: int = 15,
        sparsity: float | None = None,
        seed: int = 0,
        **options: object,
    ) -> SMSVAE:
        """Build a published method by name.

        Parameters
        ----------
        method : str
            A key of `smslib.priors.METHODS`.
        design : Design
        n_genes : int
        n_latent : int
        sparsity : float, optional
            alpha of sVAE+ (the number of targets by default), or the L1 strength of sVAE in nats.
        seed : int
            Of the initial weights.
        **options
            Passed to `SMSVAE`.

        Raises
        ------
        ValueError
            If the method is unknown, or has no gates to be sparse.
        """
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}; expected one of {sorted(METHODS)}")
        strength = None if sparsity is None else float(sparsity)
        with seeded(seed):
            slab, gate = METHODS[method](design.n_targets, n_latent, strength)
            prior = ShiftPrior(design, slab, gate)
            return cls(prior, n_genes, n_latent=n_latent, **options)

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self.log_theta.device

    @property
    def n_genes(self) -> int:
        """Number of genes."""
        return self.options["n_genes"]

    @property
    def n_latent(self) -> int:
        """Number of latents."""
        return self.options["n_latent"]

    def standardise(self, cells: Cells | Batches) -> None:
        """Give the encoder log counts with mean 0 and variance 1 over these cells.

        Parameters
        ----------
        cells : Cells or Batches
            Those that the model is going to be fitted on.

        Raises
        ------
        ValueError
            If there are no cells, or they have other genes in number than the model.
        """
        if isinstance(cells, Cells):
            logs = self._logs(cells)
            centre, spread = logs.mean(0), logs.std(0, correction=0)
        else:
            # Sums in double precision, from which a variance can be had in one pass.
            logs = (self._logs(batch).double() for batch in minibatches(cells, cells.n_cells))
            sums = [torch.stack([part.sum(0), part.square().sum(0)]) for part in logs]
            centre, square = sum(sums) / cells.n_cells
            spread = (square - centre.square()).clamp(min=0.0).sqrt()
        self.centre.copy_(centre)
        self.spread.copy_(spread.clamp(min=_SMALLEST_SPREAD))

    def _logs(self, cells: Cells) -> Float[Tensor, "cell gene"]:
        """Return the log counts of cells to standardise by, checked."""
        if len(cells) == 0 or cells.n_genes != self.n_genes:
            raise ValueError(
                f"got {len(cells)} cells of {cells.n_genes} genes to standardise by; expected the "
                f"training cells, at least one, of the model's {self.n_genes} genes"
            )
        return cells.counts.log1p()

    def encode(self, counts: Float[Tensor, "cell gene"]) -> Moments:
        """Return the encoder's mean and variance of z, from the counts alone."""
        hidden = self.encoder((counts.log1p() - self.centre) / self.spread)
        mean, log_variance = self.posterior(hidden).chunk(2, dim=-1)
        return Moments(mean, log_variance.exp() + SMALLEST_VARIANCE)

    def infer(self, cells: Cells) -> Moments:
        """Return mean and variance of q(z | x), or of q(z | x, c) if ``newton``.

        The steps count as constants: their gradient would need the decoder's second derivatives.
        """
        q = self.encode(cells.counts)
        if not self.newton:
            return q
        with torch.no_grad():
            shift = self.prior().mean[cells.condition]
            mode = q.mean
            for _ in range(1 if self.training else _STEPS_IN_EVALUATION):
                mode = mode + self._newton_step(mode, cells.counts, shift)
        return Moments(q.mean + (mode - q.mean).detach(), q.variance)

    def decode(
        self, z: Float[Tensor, "*draw cell latent"], library: Float[Tensor, "cell 1"]
    ) -> NegativeBinomial:
        """Return p(x | z, library); it takes no condition, by design."""
        hidden = self.decoder(z.flatten(end_dim=-2))  # batch normalisation takes a matrix only
        log_rate = self.genes(hidden).log_softmax(-1).unflatten(0, z.shape[:-1])
        return NegativeBinomial(log_rate + library.log(), self.log_theta)

    @torch.no_grad()
    def likelihood(self, cells: Cells) -> Likelihood:
        """Return log p(x | z) of the cells, prepared for many draws of z; without gradients."""
        theta = self.log_theta.exp()
        return Likelihood(
            logits=lambda z: self.genes(self.decoder(z)),
            counts=cells.counts.to(theta),
            theta=theta,
            log_exposure=cells.library.log() - self.log_theta,
            constant=_log_binomial(cells.counts, theta),
        )

    def forward(self, cells: Cells, *, n_draws: int = 1) -> Terms:
        """Return the terms of the ELBO (paper, eq. 12) at one draw of z per cell.

        With more draws it is the importance-weighted bound (Burda et al. 2016), whose gain over
        -KL stands in the place of the reconstruction.
        """
        q = self.infer(cells)
        if n_draws == 1:
            noise = torch.randn_like(q.mean)
        else:
            noise = torch.randn(n_draws, *q.mean.shape, device=q.mean.device).to(q.mean)
        z = q.mean + q.variance.sqrt() * noise
        shift = self.prior.of(cells.condition, self.estimator)
        reconstruction = self.decode(z, cells.library).log_prob(cells.counts).sum(-1)
        kl = kl_to_shifted_normal(q.mean, q.variance, shift).sum(-1)
        if n_draws > 1:
            # log p(z | c) / q(z | x), gates integrated out; the constants cancel.
            distance = (z - shift.mean).square() + shift.variance
            log_ratio = 0.5 * (noise.square() + q.variance.log() - distance).sum(-1)
            bound = (reconstruction + log_ratio).logsumexp(0) - math.log(n_draws)
            reconstruction = bound + kl
        return Terms(reconstruction, kl, self.prior.penalty())

    def _newton_step(self, z: Tensor, counts: Tensor, shift: Tensor) -> Tensor:
        layers = [part for part in (*self.decoder, self.genes) if isinstance(part, nn.Linear)]
        theta, kind = self.log_theta.exp(), z.dtype
        if _is_deep(counts):
            layers = [copy.deepcopy(part).double() for part in layers]
            z, counts, shift, theta = (part.double() for part in (z, counts, shift, theta))
        log_rate, jacobian = log_rate_and_jacobian(layers, _SLOPES[self.options["activation"]], z)
        step = newton_step(z, counts, shift, log_rate=log_rate, jacobian=jacobian, theta=theta)
        return step.to(kind)

    def save(
        self,
        path: str | os.PathLike,
        *,
        notes: Mapping[str, Mapping[str, object]] | None = None,
    ) -> None:
        """Write ``config.json`` and ``weights.pt`` into the folder ``path``; nothing is pickled.

        The files are written under names of their own and then moved into place, one process at
        a time. All but the weights hold the checksum of the weights, so that `load` takes no two
        halves for a model.

        Parameters
        ----------
        path : path
        notes : mapping of str to mapping, optional
            Further files, by name: what is to be said in them, as JSON.

        Raises
        ------
        OSError
            If they cannot be written: the disk is full, the folder is read-only.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        said = {"config.json": self.settings(), **(notes or {})}
        names = [folder / name for name in ("weights.pt", *said)]
        with files.together(*names) as (weights, *drafts):
            tensors.write(self.tensors(), weights)
            checksum = {"weights_sha256": _digest(weights)}
            for draft, words in zip(drafts, said.values(), strict=True):
                draft.write_text(json.dumps({**words, **checksum}, indent=1))

    @classmethod
    def load(cls, path: str | os.PathLike, *, device: str | torch.device = "cpu") -> SMSVAE:
        """Read a model back.

        Raises
        ------
        FileNotFoundError
            If ``path`` holds no saved model.
        ValueError
            If its files are damaged, do not belong together, or do not hold what they declare.
            Nothing in them is run, and they take no more memory than their size lets expect.
        """
        folder = Path(path)
        for name in ("config.json", "weights.pt"):
            if not (folder / name).exists():
                raise FileNotFoundError(f"{folder} holds no saved model ({name} is missing)")
        try:
            model = cls._rebuilt(*_saved(folder))
        except OSError:
            raise
        except Exception as error:  # bad files lead to errors of all kinds
            raise ValueError(
                f"{folder} does not hold a whole model ({type(error).__name__}: {error}); save it "
                "or copy it again"
            ) from error
        return model.to(device).eval()

    @classmethod
    def _rebuilt(cls, config: dict, state: dict[str, Tensor]) -> SMSVAE:
        """Build the model of a configuration, after a look at what its weights would be."""
        design = Design(tuple(config["conditions"]), tuple(config["targets"]), state.pop("design"))
        depths = (config["model"].get(name) or 1 for name in ("n_layers", "n_layers_decoder"))
        if max(depths) > len(state):
            raise ValueError("more layers than weights")
        with torch.device("meta"):  # shapes without memory
            planned = cls(_prior(config, design), **config["model"]).state_dict()
        shapes = ({name: part.shape for name, part in each.items()} for each in (planned, state))
        if next(shapes) != next(shapes):
            raise ValueError("the weights are not those of the configuration")
        with seeded(0):  # what is drawn is not used, and must not move the caller's draws
            model = cls(_prior(config, design), **config["model"])
        model.to(state["log_theta"].dtype).load_state_dict(state)
        return model

    def tensors(self) -> dict[str, Tensor]:
        """Return all that is saved of it as numbers: weights, statistics and the design."""
        return {**self.state_dict(), "design": self.prior.dose}

    def settings(self) -> dict[str, object]:
        """Return all that is saved of it as words: options, names, and the kind of prior."""
        slab, gate = self.prior.slab, self.prior.gate
        return {
            "model": {**self.options, "estimator": self.estimator, "newton": self.newton},
            "conditions": self.prior.conditions,
            "targets": self.prior.targets,
            "slab": [type(slab).__name__, slab.options()],
            "gate": [type(gate).__name__, gate.options()],
        }


def _saved(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """Read configuration and weights, without running or unpacking anything in them."""
    path = folder / "weights.pt"
    config = json.loads((folder / "config.json").read_text())
    if config.get("weights_sha256") not in (None, _digest(path)):  # None: of before there was one
        raise ValueError("configuration and weights are of two savings")
    state = tensors.read(path)
    if any(part.nbytes > part.untyped_storage().nbytes() for part in state.values()):
        raise ValueError("a weight declares more numbers than it has")
    return config, state


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _prior(config: dict, design: Design) -> ShiftPrior:
    """Build the prior that a configuration describes; only this package's classes are known."""
    sizes = (design.n_targets, config["model"]["n_latent"])
    (slab, slab_options), (gate, gate_options) = config["slab"], config["gate"]
    return ShiftPrior(
        design, SLABS[slab](*sizes, **slab_options), GATES[gate](*sizes, **gate_options)
    )


def _size(name: str, value: int | None) -> int | None:
    """Return a size as a plain number, which a file can hold; None where it is another's."""
    if value is None:
        return None
    if value < 1:
        raise ValueError(f"{name} is {value}; expected at least 1")
    return int(value)


def _mlp(widths: list[int], norm: Norm, dropout: float, activation: Activation) -> nn.Sequential:
    layers = []
    for n_in, n_out in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(n_in, n_out), *_normalisation(norm, n_out)]
        layers += [_rectifier(activation)]
        layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers)


def _normalisation(norm: Norm, width: int) -> list[nn.Module]:
    kinds = {
        "batch": lambda: [nn.BatchNorm1d(width, momentum=0.01, eps=1e-3)],
        "layer": lambda: [nn.LayerNorm(width)],
        "none": list,
    }
    if norm not in kinds:
        raise ValueError(f"norm is {norm!r}; expected one of {sorted(kinds)}")
    return kinds[norm]()


def _rectifier(activation: Activation) -> nn.Module:
    """Return the activation; in place, because a linear map does not need its output."""
    if activation == "leaky_relu":
        return nn.LeakyReLU(_SLOPES[activation], inplace=True)
    if activation == "relu":
        return nn.ReLU(inplace=True)
    raise ValueError(f"activation is {activation!r}; expected 'leaky_relu' or 'relu'")


def _is_deep(counts: Float[Tensor, "cell gene"]) -> bool:
    """Say whether a likelihood may be so sharp that single precision steps past its mode.

    A GPU is not asked, because the answer would keep it waiting.
    """
    return counts.device.type == "cpu" and bool((counts.sum(-1) > _DEEP).any())


def _log_binomial(
    x: Float[Tensor, "cell gene"], theta: Float[Tensor, " gene"]
) -> Float[Tensor, " cell"]:
    """Return the sum over genes of log Gamma(x + theta) / (Gamma(theta) x!).

    In double precision, because the two Gammas all but cancel when theta is large.
    """
    wide = x.double(), theta.double()
    terms = torch.lgamma(sum(wide)) - torch.lgamma(wide[1]) - torch.lgamma(wide[0] + 1)
    return terms.sum(-1).to(theta)
