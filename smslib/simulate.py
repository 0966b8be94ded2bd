"""Screens whose truth is known.

`sparse_shift` draws the simulation of Lopez et al. (CLeaR 2023): interventions move the mean of a
few latents, a random network turns latents into counts. `linear_gaussian` draws the one screen
whose evidence and posterior have closed forms. The oracle integrates the true generator.

Every part of a screen (graph, shifts, decoder, latents, counts, order) has a random stream of its
own, so that changing the number of cells leaves the mechanisms unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal, Poisson
from torch.nn.functional import leaky_relu

from smslib.data import Cells, Design, seeded

__all__ = [
    "CountDecoder",
    "LinearDecoder",
    "Oracle",
    "Screen",
    "exact_log_prob",
    "exact_posterior",
    "linear_gaussian",
    "oracle",
    "oracle_log_prob",
    "restrict",
    "sparse_shift",
]

STREAMS = ("graph", "shift", "decoder", "latent", "count", "order", "reference")
N_HIDDEN = 40
LEAK = 0.2


@dataclass(frozen=True, eq=False)
class CountDecoder:
    """Log Poisson rate of every gene, given the latents: the true p(x | z) of `sparse_shift`.

    Parameters
    ----------
    weights : tuple of Tensor
        Four matrices without biases: (latent, 40), (40, 40), (40, 40), (40, gene).
    temperature : float
        Divides the last layer; the standard deviation of its raw output.
    log_total : float
        Log of the UMIs that the softmax shares out.
    log_normaliser : Tensor, (n_genes,), optional
        Fixed log denominator of each gene (the released softmax over cells). None is a softmax
        over genes.
    """

    weights: tuple[Tensor, ...]
    temperature: float
    log_total: float
    log_normaliser: Float[Tensor, " gene"] | None = None

    def logits(self, z: Float[Tensor, "*cell latent"]) -> Float[Tensor, "*cell gene"]:
        """Return the network's output at unit temperature."""
        hidden = z.to(self.weights[0].dtype)
        for weight in self.weights[:-1]:
            hidden = leaky_relu(hidden @ weight, LEAK)
        return hidden @ self.weights[-1]

    def log_rate(self, z: Float[Tensor, "*cell latent"]) -> Float[Tensor, "*cell gene"]:
        """Return the log expected count (log UMIs) of every gene, in float64."""
        scaled = self.logits(z) / self.temperature
        if self.log_normaliser is None:
            return self.log_total + torch.log_softmax(scaled, -1)
        return self.log_total + scaled - self.log_normaliser

    def jacobian(self, z: Float[Tensor, "*cell latent"]) -> Float[Tensor, "*cell latent gene"]:
        """Return the derivative of the log rate of every gene by every latent."""
        hidden = z.to(self.weights[0].dtype)
        tangent = torch.eye(z.shape[-1]).to(hidden)
        for weight in self.weights[:-1]:
            hidden = hidden @ weight
            slope = LEAK + (1 - LEAK) * (hidden > 0).to(hidden)
            tangent = (tangent @ weight) * slope[..., None, :]
            hidden = leaky_relu(hidden, LEAK)
        tangent = tangent @ self.weights[-1] / self.temperature
        if self.log_normaliser is None:
            share = (self.log_rate(z) - self.log_total).exp()
            tangent = tangent - (tangent @ share[..., None])
        return tangent


@dataclass(frozen=True, eq=False)
class LinearDecoder:
    """The true p(x | z) of `linear_gaussian`.

    Parameters
    ----------
    loadings : Tensor, (n_latent, n_genes)
    noise : float
        Standard deviation of every gene given the latents.
    """

    loadings: Float[Tensor, "latent gene"]
    noise: float


class Oracle(NamedTuple):
    """What the true generator says about cells.

    Parameters
    ----------
    log_prob : Tensor, (n_cells,)
        log p(x | c), nats.
    mean : Tensor, (n_cells, n_latent)
        Posterior mean of the latents: the best estimate there is.
    n_effective : Tensor, (n_cells,)
        Effective number of importance samples; below about 5 the cell's estimate is poor.
    """

    log_prob: Float[Tensor, " cell"]
    mean: Float[Tensor, "cell latent"]
    n_effective: Float[Tensor, " cell"]


@dataclass(frozen=True, eq=False)
class Screen:
    """A simulated screen and its truth.

    Parameters
    ----------
    cells : Cells
    design : Design
        ``conditions[0]`` is the control. It has no cells in `sparse_shift`, as in the paper.
    z : Tensor, (n_cells, n_latent)
        True latents, prior standard deviations.
    shift : Tensor, (n_conditions, n_latent)
        True prior mean of each condition, prior standard deviations; row 0 is zero.
    graph : Tensor, (n_targets, n_latent)
        Whether the target moves the latent.
    decoder : CountDecoder or LinearDecoder
        True p(x | z).
    """

    cells: Cells
    design: Design
    z: Float[Tensor, "cell latent"]
    shift: Float[Tensor, "condition latent"]
    graph: Bool[Tensor, "target latent"]
    decoder: object


def sparse_shift(
    *,
    n_cells_per_condition: int = 500,
    n_targets: int = 100,
    n_latent: int = 15,
    n_genes: int = 100,
    seed: int = 0,
    as_released: bool = False,
) -> Screen:
    """Simulate a screen whose interventions shift one to three latents each.

    ``z | c ~ N(graph_c * shift_c, I)`` with shifts ``±N(5, 0.5)``, and Poisson counts through a
    random network with three hidden layers of 40 units (Lopez et al. 2023, section 4.2 and
    appendix C).

    Parameters
    ----------
    n_cells_per_condition : int
        Cells of each intervention; the control has none.
    n_targets : int
        Interventions, one target each, named ``"0"``, ``"1"``, ...
    n_latent : int
        At most 40.
    n_genes : int
        At least 40.
    seed : int
        Starts seven independent streams; the sizes of one part do not change the others.
    as_released : bool
        True follows the released code: targets drawn with replacement, and 1e6 UMIs per gene
        shared among *all cells of the screen* (the softmax runs over cells, so more cells are
        shallower cells). False follows the text: targets without replacement, and 1e5 UMIs per
        cell shared among genes.

    Returns
    -------
    Screen
        Latents and counts float32, cells in random order.

    Raises
    ------
    ValueError
        If ``n_latent`` or ``n_genes`` does not fit the network, or a size is not positive.

    Notes
    -----
    The released code divides the logits by their standard deviation over the simulated cells. As
    written, we take it over cells of a stream of its own: the decoder then does not depend on how
    many cells are drawn. The random numbers are not those of the released code.
    """
    _check_sizes(n_cells_per_condition, n_targets, n_latent, n_genes)
    streams = _streams(seed)
    graph = _draw_graph(streams["graph"], n_targets, n_latent, replace=as_released)
    shift = _with_control(graph * _draw_shifts(streams["shift"], graph.shape))
    condition = np.repeat(np.arange(1, n_targets + 1), n_cells_per_condition)
    z = shift[condition] + streams["latent"].standard_normal((len(condition), n_latent))
    weights = _draw_weights(streams["decoder"], (n_latent, *[N_HIDDEN] * 3, n_genes))
    if as_released:
        decoder = _released_decoder(weights, z)
    else:
        decoder = _written_decoder(weights, shift[1:], streams["reference"])
    counts = streams["count"].poisson(decoder.log_rate(torch.from_numpy(z)).exp().numpy())
    order = streams["order"].permutation(len(condition))
    return Screen(
        cells=Cells(_float32(counts[order]), torch.from_numpy(condition[order])),
        design=Design.single_target([str(target) for target in range(n_targets)]),
        z=_float32(z[order]),
        shift=_float32(shift),
        graph=torch.from_numpy(graph),
        decoder=decoder,
    )


def restrict(screen: Screen, conditions: Sequence[str]) -> Screen:
    """Return the screen of the control and the named conditions only.

    Parameters
    ----------
    screen : Screen
    conditions : sequence of str
        Conditions to keep, in the order of the new design. The control is always kept, first.

    Returns
    -------
    Screen
        Cells keep their order; design, shifts and graph lose the other rows; the decoder is
        unchanged.

    Raises
    ------
    KeyError
        If a condition is unknown.
    """
    control = screen.design.conditions[0]
    names = (control, *(name for name in conditions if name != control))
    rows = screen.design.index(names)
    touched = screen.design.matrix[rows].ne(0).any(0)
    new_row = torch.full((screen.design.n_conditions,), -1)
    new_row[rows] = torch.arange(len(rows))
    condition = new_row[screen.cells.condition]
    kept = condition >= 0
    return replace(
        screen,
        cells=Cells(screen.cells.counts[kept], condition[kept]),
        design=Design(
            names,
            tuple(t for t, keep in zip(screen.design.targets, touched, strict=True) if keep),
            screen.design.matrix[rows][:, touched],
        ),
        z=screen.z[kept],
        shift=screen.shift[rows],
        graph=screen.graph[touched],
    )


def linear_gaussian(
    *,
    n_cells: int = 200,
    n_latent: int = 3,
    n_genes: int = 8,
    noise: float = 0.5,
    n_targets: int = 4,
    seed: int = 0,
) -> Screen:
    """Simulate the screen whose evidence and posterior are known exactly.

    ``z | c ~ N(shift_c, I)``, ``x | z ~ N(z loadings, noise² I)``: real values in place of counts.

    Parameters
    ----------
    n_cells : int
        Spread evenly over the control and the targets.
    n_latent, n_genes, n_targets : int
    noise : float
        Standard deviation of every gene given the latents.
    seed : int

    Returns
    -------
    Screen
        Everything in float64; see `exact_log_prob` and `exact_posterior`.
    """
    streams = _streams(seed)
    graph = _draw_graph(streams["graph"], n_targets, n_latent, replace=False)
    shift = _with_control(graph * _draw_shifts(streams["shift"], graph.shape))
    loadings = torch.from_numpy(streams["decoder"].standard_normal((n_latent, n_genes)))
    condition = np.arange(n_cells) % (n_targets + 1)
    z = torch.from_numpy(shift[condition] + streams["latent"].standard_normal((n_cells, n_latent)))
    error = torch.from_numpy(noise * streams["count"].standard_normal((n_cells, n_genes)))
    return Screen(
        cells=Cells(z @ loadings + error, torch.from_numpy(condition)),
        design=Design.single_target([str(target) for target in range(n_targets)]),
        z=z,
        shift=torch.from_numpy(shift),
        graph=torch.from_numpy(graph),
        decoder=LinearDecoder(loadings, noise),
    )


def exact_log_prob(screen: Screen, cells: Cells) -> Float[Tensor, " cell"]:
    """Compute ``log N(x; shift_c loadings, loadingsᵀ loadings + noise² I)``.

    Parameters
    ----------
    screen : Screen
        From `linear_gaussian`.
    cells : Cells
        Cells of this screen's conditions.

    Returns
    -------
    Tensor, (n_cells,)
        log p(x | c), nats.
    """
    loadings, noise = screen.decoder.loadings, screen.decoder.noise
    covariance = loadings.T @ loadings + noise**2 * torch.eye(loadings.shape[1]).to(loadings)
    mean = screen.shift[cells.condition] @ loadings
    return MultivariateNormal(mean, covariance).log_prob(cells.counts)


def exact_posterior(
    screen: Screen, cells: Cells
) -> tuple[Float[Tensor, "cell latent"], Float[Tensor, "latent latent"]]:
    """Compute mean and covariance of the Gaussian p(z | x, c).

    Parameters
    ----------
    screen : Screen
        From `linear_gaussian`.
    cells : Cells
        Cells of this screen's conditions.

    Returns
    -------
    mean : Tensor, (n_cells, n_latent)
        Prior standard deviations.
    covariance : Tensor, (n_latent, n_latent)
        The same for every cell.
    """
    loadings, variance = screen.decoder.loadings, screen.decoder.noise**2
    precision = torch.eye(len(loadings)).to(loadings) + loadings @ loadings.T / variance
    covariance = torch.linalg.inv(precision)
    evidence = cells.counts @ loadings.T / variance + screen.shift[cells.condition]
    return evidence @ covariance, covariance


def oracle(
    screen: Screen, cells: Cells, *, n_draws: int = 500, n_starts: int = 8, seed: int = 0
) -> Oracle:
    """Integrate the true generator over the latents of each cell, by importance sampling.

    The proposal is a mixture of Gaussian approximations at modes of the posterior, found by
    Gauss-Newton steps from several draws of the prior. (The rectifiers fold the latent space: one
    mode is not enough.)

    Parameters
    ----------
    screen : Screen
        From `sparse_shift`.
    cells : Cells
        Cells of this screen's conditions; some hundreds: one cell takes about 10 ms.
    n_draws : int
        Importance samples per cell.
    n_starts : int
        Components of the proposal.
    seed : int

    Returns
    -------
    Oracle
        All float64.
    """
    with seeded(seed):
        parts = [
            _oracle_of(screen, cells[start : start + 64], n_draws, n_starts)
            for start in range(0, len(cells), 64)
        ]
    return Oracle(*(torch.cat(part) for part in zip(*parts, strict=True)))


def oracle_log_prob(
    screen: Screen,
    cells: Cells,
    *,
    observed_library: bool = False,
    n_draws: int = 500,
    seed: int = 0,
) -> Float[Tensor, " cell"]:
    """Estimate the log probability that no model can beat on average.

    Parameters
    ----------
    screen : Screen
        From `sparse_shift`.
    cells : Cells
        Cells of this screen's conditions.
    observed_library : bool
        False is log p(x | c), for models that generate the library. True is for models that are
        given it: ``log p(x | library, c) + log Poisson(library; library)``, since a count
        likelihood around the observed library still pays for not knowing it exactly.
    n_draws : int
        Importance samples per cell.
    seed : int

    Returns
    -------
    Tensor, (n_cells,)
        Nats. On average an underestimate, by less than 0.1 nats with the default ``n_draws``.
    """
    log_prob = oracle(screen, cells, n_draws=n_draws, seed=seed).log_prob
    if not observed_library:
        return log_prob
    library = cells.library.double().squeeze(-1)
    with seeded(seed):
        known = _log_prob_of_library(screen, library, cells.condition)
    return log_prob - known + Poisson(library).log_prob(library)


def _check_sizes(n_cells: int, n_targets: int, n_latent: int, n_genes: int) -> None:
    if min(n_cells, n_targets, n_latent) < 1:
        raise ValueError(
            f"n_cells_per_condition={n_cells}, n_targets={n_targets}, n_latent={n_latent}; "
            "expected at least 1 of each"
        )
    if n_latent > N_HIDDEN or n_genes < N_HIDDEN:
        raise ValueError(
            f"n_latent={n_latent}, n_genes={n_genes}; the simulator's network has {N_HIDDEN} "
            f"hidden units with orthonormal rows, which needs n_latent <= {N_HIDDEN} <= n_genes"
        )


def _streams(seed: int) -> dict[str, np.random.Generator]:
    children = np.random.SeedSequence(seed).spawn(len(STREAMS))
    generators = (np.random.default_rng(child) for child in children)
    return dict(zip(STREAMS, generators, strict=True))


def _draw_graph(
    rng: np.random.Generator, n_targets: int, n_latent: int, *, replace: bool
) -> Bool[np.ndarray, "target latent"]:
    """Give each target one, two or three latents, uniformly (fewer if drawn twice)."""
    graph = np.zeros((n_targets, n_latent), dtype=bool)
    for row, n_draws in zip(graph, rng.integers(1, 4, size=n_targets), strict=True):
        size = n_draws if replace else min(n_draws, n_latent)
        row[rng.choice(n_latent, size=size, replace=replace)] = True
    return graph


def _draw_shifts(
    rng: np.random.Generator, shape: tuple[int, int]
) -> Float[np.ndarray, "target latent"]:
    """Draw fair signs times N(5, standard deviation 0.5)."""
    return rng.choice([-1.0, 1.0], size=shape) * rng.normal(5.0, 0.5, size=shape)


def _with_control(
    shift: Float[np.ndarray, "target latent"],
) -> Float[np.ndarray, "condition latent"]:
    """Put the control's row of zeros first."""
    return np.vstack([np.zeros(shift.shape[1]), shift])


def _draw_weights(rng: np.random.Generator, widths: Sequence[int]) -> tuple[Tensor, ...]:
    """Draw matrices with orthonormal rows, scaled by the Glorot gain of a leaky rectifier."""
    gain = np.sqrt(2 / (1 + LEAK**2))
    weights = []
    for fan_in, fan_out in zip(widths[:-1], widths[1:], strict=True):
        rows = np.linalg.qr(rng.standard_normal((fan_in, fan_out)).T)[0].T
        weights.append(torch.from_numpy(gain * np.sqrt(2 / (fan_in + fan_out)) * rows))
    return tuple(weights)


def _released_decoder(
    weights: tuple[Tensor, ...], z: Float[np.ndarray, "cell latent"]
) -> CountDecoder:
    """Share 1e6 UMIs of every gene among the cells given (the released code's softmax axis)."""
    raw = CountDecoder(weights, 1.0, 0.0).logits(torch.from_numpy(z))
    temperature = float(raw.std(correction=0))
    normaliser = torch.logsumexp(raw / temperature, 0)
    return CountDecoder(weights, temperature, float(np.log(1e6)), normaliser)


def _written_decoder(
    weights: tuple[Tensor, ...],
    shift: Float[np.ndarray, "target latent"],
    rng: np.random.Generator,
    n_reference: int = 100,
) -> CountDecoder:
    """Share 1e5 UMIs of every cell among its genes."""
    centre = np.repeat(shift, n_reference, axis=0)
    reference = torch.from_numpy(centre + rng.standard_normal(centre.shape))
    raw = CountDecoder(weights, 1.0, 0.0).logits(reference)
    return CountDecoder(weights, float(raw.std(correction=0)), float(np.log(1e5)))


def _float32(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.float32))


def _oracle_of(screen: Screen, cells: Cells, n_draws: int, n_starts: int) -> Oracle:
    """Importance-sample a few cells at once."""
    posterior = _Posterior(
        screen.decoder, cells.counts.double(), screen.shift[cells.condition].double()
    )
    proposal = _laplace_mixture(posterior, _modes(posterior, n_starts))
    z = proposal.sample((n_draws,))
    log_weight = posterior.log_joint(z) - proposal.log_prob(z)
    weight = torch.softmax(log_weight, 0)
    return Oracle(
        torch.logsumexp(log_weight, 0) - np.log(n_draws),
        torch.einsum("dc,dcl->cl", weight, z),
        1 / weight.square().sum(0),
    )


@dataclass(frozen=True, eq=False)
class _Posterior:
    """The unnormalised posterior of cells, with what Gauss-Newton needs of it."""

    decoder: CountDecoder
    counts: Float[Tensor, "cell gene"]
    shift: Float[Tensor, "cell latent"]

    def log_joint(self, z: Float[Tensor, "*draw cell latent"]) -> Float[Tensor, "*draw cell"]:
        """Return log p(x, z | c)."""
        counts = Poisson(self.decoder.log_rate(z).exp(), validate_args=False)
        prior = Normal(self.shift, 1.0)
        return counts.log_prob(self.counts).sum(-1) + prior.log_prob(z).sum(-1)

    def slope(
        self, z: Float[Tensor, "draw cell latent"]
    ) -> tuple[Float[Tensor, "draw cell latent"], Float[Tensor, "draw cell latent latent"]]:
        """Return gradient and expected negative Hessian of the log joint."""
        jacobian = self.decoder.jacobian(z)
        rate = self.decoder.log_rate(z).exp()
        gradient = torch.einsum("dclg,dcg->dcl", jacobian, self.counts - rate) - (z - self.shift)
        information = (jacobian * rate[..., None, :]) @ jacobian.mT
        return gradient, information + torch.eye(z.shape[-1]).to(z)


def _modes(
    posterior: _Posterior, n_starts: int, n_steps: int = 15
) -> Float[Tensor, "start cell latent"]:
    """Climb the log joint from draws of the prior, by Gauss-Newton with a step-size search."""
    z = Normal(posterior.shift, 1.0).sample((n_starts,))
    sizes = torch.tensor([1, 0.5, 0.25, 0.1, 0.02, 0]).to(z)[:, None, None, None]
    for _ in range(n_steps):
        gradient, information = posterior.slope(z)
        candidates = z + sizes * torch.linalg.solve(information, gradient)
        best = posterior.log_joint(candidates).argmax(0)
        z = candidates.take_along_dim(best[None, ..., None], 0)[0]
    return z


def _laplace_mixture(
    posterior: _Posterior, modes: Float[Tensor, "start cell latent"], breadth: float = 1.25
) -> MixtureSameFamily:
    """Mix Gaussian approximations at the modes, each weighted by its share of the evidence.

    A tenth of the weight is spread evenly, and every Gaussian is a little too broad, so that no
    importance weight is huge.
    """
    information = posterior.slope(modes)[1]
    evidence = posterior.log_joint(modes) - torch.logdet(information) / 2
    share = 0.9 * torch.softmax(evidence, 0) + 0.1 / len(modes)
    parts = MultivariateNormal(
        modes.movedim(0, 1), precision_matrix=(information / breadth).movedim(0, 1)
    )
    return MixtureSameFamily(Categorical(probs=share.T), parts)


def _log_prob_of_library(
    screen: Screen,
    library: Float[Tensor, " cell"],
    condition: Tensor,
    n_draws: int = 5000,
) -> Float[Tensor, " cell"]:
    """Average Poisson(library; total rate) over draws of each condition's prior."""
    result = torch.empty_like(library)
    for row in condition.unique():
        z = Normal(screen.shift[row].double(), 1.0).sample((n_draws,))
        total = screen.decoder.log_rate(z).exp().sum(-1, keepdim=True)
        mine = condition == row
        terms = Poisson(total, validate_args=False).log_prob(library[mine])
        result[mine] = torch.logsumexp(terms, 0) - np.log(n_draws)
    return result
