"""Screens whose truth is known.

`sparse_shift` draws the simulation of Lopez et al. (CLeaR 2023): interventions move the mean of a
few latents, a random network turns latents into counts. `linear_gaussian` draws the one screen
whose evidence and posterior have closed forms. The oracle integrates the true generator.

Every part of a screen (graph, shifts, decoder, latents, counts, order) has a random stream of its
own, so that changing the number of cells leaves the mechanisms unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Poisson
from torch.nn.functional import leaky_relu

from smslib.data import Cells, Design, seeded, single, streams
from smslib.lookalike import screen_like

__all__ = [
    "CountDecoder",
    "LinearDecoder",
    "Mechanism",
    "Noise",
    "Oracle",
    "Screen",
    "Violation",
    "exact_log_prob",
    "exact_posterior",
    "linear_gaussian",
    "oracle",
    "oracle_log_prob",
    "restrict",
    "screen_like",
    "sparse_shift",
    "twist",
]

STREAMS = ("graph", "shift", "decoder", "latent", "count", "order", "reference")
# Of the violations; at the end, so that a screen without any is drawn as ever.
STREAMS += ("common", "side effect", "variance", "escape", "batch")
N_HIDDEN = 40
LEAK = 0.2
N_BATCHES = 4
WIDE = 3.0  # standard deviation of a latent that an intervention spreads


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """Which latents an intervention moves, and how far.

    The default is section 4.2 of Lopez et al. (2023): one, two or three latents per target, each
    moved by ``±N(5, 0.5)``. The other settings are those of the tables in their appendix, whose
    code was not released.

    Parameters
    ----------
    effect : float
        Mean size of a shift, prior standard deviations: ``e`` of the paper.
    effect_sd : float
        Standard deviation of that size, as the released code has it. The ``.5`` in the paper's
        ``N(e, .5)`` may also be read as a variance, which is ``effect_sd=0.5**0.5``.
    density : float, optional
        Fraction of edges, ``s`` of the paper, which does not say how it replaces "one to three".
        We take every edge to be present with this probability, independently. A target may then
        have no edge (a third of them at ``density=0.2`` and five latents); it is kept, since to
        draw again would raise the density. None is one, two or three latents, alike.
    exact : bool
        The second reading of ``density``: every target moves the same number of latents,
        ``round(density * n)`` of the ``n`` that are ever moved, but at least one.
    n_affected : int, optional
        Only the first so many latents are ever moved (the paper's "number of latents targeted");
        no target then has more edges than that. ``density`` is relative to these latents. None is
        all of them. Which ones does not matter: the decoder treats all alike.

    Raises
    ------
    ValueError
        If a value is outside its range, or ``exact`` is asked for without a density.
    """

    effect: float = 5.0
    effect_sd: float = 0.5
    density: float | None = None
    exact: bool = False
    n_affected: int | None = None

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        if not (0 < self.effect < np.inf and 0 <= self.effect_sd < np.inf):
            raise ValueError(
                f"effect={self.effect}, effect_sd={self.effect_sd}; expected a positive effect "
                "and a standard deviation of at least 0 (signs are drawn: both occur)"
            )
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(
                f"density={self.density}; expected a fraction of edges in (0, 1], or None for one "
                "to three latents per target"
            )
        if self.exact and self.density is None:
            raise ValueError(
                "exact=True without a density; expected the fraction of latents that every "
                "target moves, such as density=0.2"
            )
        if self.n_affected is not None and self.n_affected < 1:
            raise ValueError(
                f"n_affected={self.n_affected}; expected at least 1 latent, or None for all"
            )


@dataclass(frozen=True, kw_only=True)
class Violation:
    """Ways in which a screen breaks what the model assumes; each alone, or together.

    The default breaks nothing. Lopez et al. (2023) have no such experiment.

    Parameters
    ----------
    correlation : float
        Of any two latents, given the intervention: the latents of a cell share a common factor.
        The model has them independent.
    side_effect : float
        Standard deviation of a small shift that every intervention adds to every latent. The
        model expects few latents to move.
    variance : float
        Share of the edges that leave the mean of their latent alone and make its standard
        deviation three. The model's interventions move means only.
    escape : float
        Share of the cells of every intervention that carry its label and are not moved (guides
        that do not cut). The model takes all cells of a label as alike.
    batch : float
        Standard deviation of the log fold change of every gene in each of four batches, which
        cells join whatever their intervention. The model knows no batches.

    Raises
    ------
    ValueError
        If a value is outside its range.
    """

    correlation: float = 0.0
    side_effect: float = 0.0
    variance: float = 0.0
    escape: float = 0.0
    batch: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        for name in ("correlation", "escape"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value}; expected a share in [0, 1)")
        if not 0 <= self.variance <= 1:
            raise ValueError(f"variance={self.variance}; expected a share of edges in [0, 1]")
        for name in ("side_effect", "batch"):
            if not 0 <= (value := getattr(self, name)) < np.inf:
                raise ValueError(f"{name}={value}; expected a standard deviation of at least 0")


@dataclass(frozen=True, eq=False)
class Noise:
    """How the cells of a condition scatter, where not as ``N(shift, I)``.

    Parameters
    ----------
    spread : Tensor, (n_conditions, n_latent)
        Standard deviation of every latent.
    correlation : float
        Of any two latents, given the condition.
    escape : float
        Share of the cells that are as the control.
    fold : Tensor, (n_batches, n_genes)
        Log fold change of every gene in each batch; the batches are equally frequent.
    """

    spread: Float[Tensor, "condition latent"]
    correlation: float
    escape: float
    fold: Float[Tensor, "batch gene"]


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
    fold : Tensor, (..., n_genes), optional
        Log fold change of every gene, before the softmax: that of a batch.
    """

    weights: tuple[Tensor, ...]
    temperature: float
    log_total: float
    log_normaliser: Float[Tensor, " gene"] | None = None
    fold: Float[Tensor, "*cell gene"] | float = 0.0

    def logits(self, z: Float[Tensor, "*cell latent"]) -> Float[Tensor, "*cell gene"]:
        """Return the network's output at unit temperature."""
        hidden = z.to(self.weights[0].dtype)
        for weight in self.weights[:-1]:
            hidden = leaky_relu(hidden @ weight, LEAK)
        return hidden @ self.weights[-1]

    def log_rate(self, z: Float[Tensor, "*cell latent"]) -> Float[Tensor, "*cell gene"]:
        """Return the log expected count (log UMIs) of every gene, in float64."""
        scaled = self.logits(z) / self.temperature + self.fold
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
        True p(x | z); that of a cell in no batch, where there are batches.
    noise : Noise, optional
        How cells scatter around ``shift``; None is independently, with variance one.
    """

    cells: Cells
    design: Design
    z: Float[Tensor, "cell latent"]
    shift: Float[Tensor, "condition latent"]
    graph: Bool[Tensor, "target latent"]
    decoder: object
    noise: Noise | None = None


def sparse_shift(
    *,
    n_cells_per_condition: int = 500,
    n_targets: int = 100,
    n_latent: int = 15,
    n_genes: int = 100,
    seed: int = 0,
    as_released: bool = False,
    normaliser: str | None = None,
    with_replacement: bool | None = None,
    mechanism: Mechanism | None = None,
    held_out: tuple[int, Mechanism] | None = None,
    violation: Violation | None = None,
) -> Screen:
    """Simulate a screen whose interventions shift a few latents each.

    ``z | c ~ N(graph_c * shift_c, I)``, and Poisson counts through a random network with three
    hidden layers of 40 units (Lopez et al. 2023, section 4.2 and appendix C).

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
        Starts independent streams; the sizes of one part do not change the others.
    as_released : bool
        True follows the released code, False the text: short for both of the next two.
    normaliser : {"cells", "genes"}, optional
        What the softmax runs over. ``"cells"``, as released: 1e6 UMIs *per gene* shared among all
        cells of the screen, so more cells are shallower cells. ``"genes"``, as written: 1e5 UMIs
        *per cell* shared among genes. The totals belong to the two and do not vary apart. None is
        what ``as_released`` says.
    with_replacement : bool, optional
        Whether a target's one, two or three latents are drawn with replacement (as released; 1.91
        distinct ones on average at 15 latents) or without (as written; 2). None is what
        ``as_released`` says. Without effect where the mechanism sets a density.
    mechanism : Mechanism, optional
        Which latents are moved and how far; None is the default ``Mechanism()``.
    held_out : (int, Mechanism), optional
        So many targets, the last ones, follow a mechanism of their own (the paper's out-of-domain
        tables: fitted on one density or effect, transferred to another). Each group is drawn as
        if all targets followed its mechanism: the first targets do not depend on ``held_out``, and
        two densities of held-out targets under one seed give nested graphs.
    violation : Violation, optional
        What is broken of the model's assumptions; None is nothing. The graph then still names the
        intended targets: side effects are in ``shift`` and not in ``graph``, targets whose
        variance alone changes are in ``graph`` and not in ``shift``.

    Returns
    -------
    Screen
        Latents and counts float32, cells in random order.

    Raises
    ------
    ValueError
        If ``n_latent`` or ``n_genes`` does not fit the network; a size is not positive;
        ``normaliser`` is unknown; ``held_out`` leaves no target before or after it; or a mechanism
        affects more latents than there are.

    Notes
    -----
    The released code divides the logits by their standard deviation over the simulated cells,
    those of held-out targets among them; so do we, hence ``held_out`` does change the decoder's
    temperature and normaliser, though not its weights. With ``normaliser="genes"`` we take the
    standard deviation over cells of a stream of its own: the decoder then does not depend on how
    many cells are drawn. The random numbers are not those of the released code.
    """
    _check_sizes(n_cells_per_condition, n_targets, n_latent, n_genes)
    normaliser = _check_normaliser(normaliser, as_released)
    groups = _check_groups(mechanism or Mechanism(), held_out, n_targets, n_latent)
    repeats = as_released if with_replacement is None else with_replacement
    graph, shift = _draw_groups(seed, groups, (n_targets, n_latent), replace=repeats)
    rngs = streams(seed, STREAMS)
    shift, noise = _break(shift, graph, violation or Violation(), rngs, n_genes)
    condition = np.repeat(np.arange(1, n_targets + 1), n_cells_per_condition)
    z = _draw_latents(shift, noise, condition, rngs)
    weights = _draw_weights(rngs["decoder"], (n_latent, *[N_HIDDEN] * 3, n_genes))
    if normaliser == "cells":
        decoder = _released_decoder(weights, z)
    else:
        decoder = _written_decoder(weights, shift[1:], rngs["reference"])
    batch = rngs["batch"].integers(len(noise.fold), size=len(z))
    rate = replace(decoder, fold=noise.fold[batch]).log_rate(torch.from_numpy(z)).exp()
    counts = rngs["count"].poisson(rate.numpy())
    order = rngs["order"].permutation(len(condition))
    return Screen(
        cells=Cells(single(counts[order]), torch.from_numpy(condition[order])),
        design=Design.single_target([str(target) for target in range(n_targets)]),
        z=single(z[order]),
        shift=single(shift),
        graph=torch.from_numpy(graph),
        decoder=decoder,
        noise=None if violation is None else noise,
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
        noise=screen.noise and replace(screen.noise, spread=screen.noise.spread[rows]),
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
    rngs = streams(seed, STREAMS)
    everything = [(slice(None), Mechanism())]
    graph, shift = _draw_groups(seed, everything, (n_targets, n_latent), replace=False)
    loadings = torch.from_numpy(rngs["decoder"].standard_normal((n_latent, n_genes)))
    condition = np.arange(n_cells) % (n_targets + 1)
    z = torch.from_numpy(shift[condition] + rngs["latent"].standard_normal((n_cells, n_latent)))
    error = torch.from_numpy(noise * rngs["count"].standard_normal((n_cells, n_genes)))
    return Screen(
        cells=Cells(z @ loadings + error, torch.from_numpy(condition)),
        design=Design.single_target([str(target) for target in range(n_targets)]),
        z=z,
        shift=torch.from_numpy(shift),
        graph=torch.from_numpy(graph),
        decoder=LinearDecoder(loadings, noise),
    )


def twist(
    z: Float[Tensor, "*cell latent"], angle: float, *, plane: tuple[int, int] = (0, 1)
) -> Float[Tensor, "*cell latent"]:
    """Rotate a plane of the latents, the more the farther a cell lies from its middle.

    A standard normal distribution is mapped to itself although the map is not linear, so data
    without labels cannot tell whether it happened (Hyvarinen and Pajunen 1999).

    Parameters
    ----------
    z : Tensor, (..., n_latent)
        Prior standard deviations.
    angle : float
        Radians per prior standard deviation of distance; the negative angle undoes it.
    plane : (int, int)
        The two latents that are rotated into each other.

    Returns
    -------
    Tensor, (..., n_latent)

    Raises
    ------
    ValueError
        If the plane does not name two different latents.
    """
    first, second = plane
    if first == second or not {first, second} <= set(range(z.shape[-1])):
        raise ValueError(f"plane={plane}; expected two different latents of {z.shape[-1]}")
    u, v = z[..., first], z[..., second]
    turn = angle * torch.hypot(u, v)
    moved = z.clone()
    moved[..., first] = u * turn.cos() - v * turn.sin()
    moved[..., second] = u * turn.sin() + v * turn.cos()
    return moved


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
    screen: Screen, cells: Cells, *, n_draws: int = 500, n_starts: int = 4, seed: int = 0
) -> Oracle:
    """Integrate the true generator over the latents of each cell, by importance sampling.

    The proposal is a mixture of Gaussians near modes of the posterior, found by Gauss-Newton steps
    from several draws of the condition's prior. (The rectifiers fold the latent space: one mode is
    not enough, and the curvature at a mode says little about its surroundings, so each Gaussian is
    fitted to the slopes averaged over itself.)

    Parameters
    ----------
    screen : Screen
        From `sparse_shift`.
    cells : Cells
        Cells of this screen's conditions; some hundreds: one cell takes 4 ms (5 latents) to 13 ms
        (20 latents).
    n_draws : int
        Importance samples per cell.
    n_starts : int
        Components of the proposal.
    seed : int

    Returns
    -------
    Oracle
        All float64.

    Raises
    ------
    ValueError
        If ``n_draws`` or ``n_starts`` is not positive.
    """
    if min(n_draws, n_starts) < 1:
        raise ValueError(
            f"n_draws={n_draws}, n_starts={n_starts}; expected at least 1 of each "
            "(500 draws from 4 starts suffice up to 20 latents)"
        )
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
    n_starts: int = 4,
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
    n_draws, n_starts : int
        Importance samples per cell and components of their proposal; see `oracle`.
    seed : int

    Returns
    -------
    Tensor, (n_cells,)
        Nats. On average an underestimate: by about 0.1 nats at 15 to 20 latents with the defaults,
        by less with fewer latents or more draws.
    """
    log_prob = oracle(screen, cells, n_draws=n_draws, n_starts=n_starts, seed=seed).log_prob
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


def _check_normaliser(normaliser: str | None, as_released: bool) -> str:
    """Return what the softmax runs over."""
    if normaliser is None:
        return "cells" if as_released else "genes"
    if normaliser not in ("cells", "genes"):
        raise ValueError(
            f"normaliser={normaliser!r}; expected 'cells' (as released: UMIs of a gene shared "
            "among cells), 'genes' (as written) or None (what as_released says)"
        )
    return normaliser


def _check_groups(
    mechanism: Mechanism, held_out: tuple[int, Mechanism] | None, n_targets: int, n_latent: int
) -> list[tuple[slice, Mechanism]]:
    """Return which targets follow which mechanism."""
    n_held_out, other = held_out or (0, mechanism)
    if held_out and not 0 < n_held_out < n_targets:
        raise ValueError(
            f"held_out=({n_held_out}, ...) of n_targets={n_targets}; expected at least 1 target "
            "held out and 1 left, or None"
        )
    for given in (mechanism, other):
        if given.n_affected is not None and given.n_affected > n_latent:
            raise ValueError(
                f"n_affected={given.n_affected}, n_latent={n_latent}; a mechanism cannot affect "
                "more latents than there are: lower n_affected or raise n_latent"
            )
    first = n_targets - n_held_out
    return [(slice(first), mechanism), (slice(first, None), other)]


def _draw_groups(
    seed: int,
    groups: Sequence[tuple[slice, Mechanism]],
    shape: tuple[int, int],
    *,
    replace: bool,
) -> tuple[Bool[np.ndarray, "target latent"], Float[np.ndarray, "condition latent"]]:
    """Draw graph and shifts of every group of targets, each as if all were of that group."""
    graphs, shifts = [], []
    for rows, mechanism in groups:
        rngs = streams(seed, STREAMS)
        graph = _draw_graph(rngs["graph"], shape, mechanism, replace=replace)
        graphs.append(graph[rows])
        shifts.append((graph * _draw_sizes(rngs["shift"], shape, mechanism))[rows])
    return np.vstack(graphs), np.vstack([np.zeros(shape[1]), *shifts])


def _draw_graph(
    rng: np.random.Generator, shape: tuple[int, int], mechanism: Mechanism, *, replace: bool
) -> Bool[np.ndarray, "target latent"]:
    """Say which target moves which latent."""
    n_targets, n_latent = shape
    n_affected = mechanism.n_affected or n_latent
    if mechanism.density is None:
        graph = _one_to_three(rng, n_targets, n_affected, replace=replace)
    elif mechanism.exact:
        n_edges = max(1, round(mechanism.density * n_affected))
        graph = rng.random((n_targets, n_affected)).argsort(1) < n_edges
    else:
        graph = rng.random((n_targets, n_affected)) < mechanism.density
    return np.pad(graph, ((0, 0), (0, n_latent - n_affected)))


def _one_to_three(
    rng: np.random.Generator, n_targets: int, n_latent: int, *, replace: bool
) -> Bool[np.ndarray, "target latent"]:
    """Give each target one, two or three latents, uniformly (fewer if drawn twice)."""
    graph = np.zeros((n_targets, n_latent), dtype=bool)
    for row, n_draws in zip(graph, rng.integers(1, 4, size=n_targets), strict=True):
        size = n_draws if replace else min(n_draws, n_latent)
        row[rng.choice(n_latent, size=size, replace=replace)] = True
    return graph


def _draw_sizes(
    rng: np.random.Generator, shape: tuple[int, int], mechanism: Mechanism
) -> Float[np.ndarray, "target latent"]:
    """Draw fair signs times normal sizes, for every edge that there could be."""
    signs = rng.choice([-1.0, 1.0], size=shape)
    return signs * rng.normal(mechanism.effect, mechanism.effect_sd, size=shape)


def _break(
    shift: Float[np.ndarray, "condition latent"],
    graph: Bool[np.ndarray, "target latent"],
    violation: Violation,
    rngs: Mapping[str, np.random.Generator],
    n_genes: int,
) -> tuple[Float[np.ndarray, "condition latent"], Noise]:
    """Return the shifts as the violation leaves them, and the scatter around them."""
    widened = graph & (rngs["variance"].random(graph.shape) < violation.variance)
    shift, spread = shift.copy(), np.ones_like(shift)
    shift[1:][widened], spread[1:][widened] = 0.0, WIDE
    if violation.side_effect > 0:  # adding zeros would turn those that are negative
        shift[1:] += violation.side_effect * rngs["side effect"].standard_normal(graph.shape)
    n_batches = N_BATCHES if violation.batch > 0 else 1
    fold = violation.batch * rngs["batch"].standard_normal((n_batches, n_genes))
    return shift, Noise(
        torch.from_numpy(spread), violation.correlation, violation.escape, torch.from_numpy(fold)
    )


def _draw_latents(
    shift: Float[np.ndarray, "condition latent"],
    noise: Noise,
    condition: np.ndarray,
    rngs: Mapping[str, np.random.Generator],
) -> Float[np.ndarray, "cell latent"]:
    """Draw the latents of cells; those that escaped are as the control."""
    own = rngs["latent"].standard_normal((len(condition), shift.shape[1]))
    common = rngs["common"].standard_normal((len(condition), 1))
    mixed = (1 - noise.correlation) ** 0.5 * own + noise.correlation**0.5 * common
    fate = np.where(rngs["escape"].random(len(condition)) < noise.escape, 0, condition)
    return shift[fate] + noise.spread.numpy()[fate] * mixed


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


def _oracle_of(screen: Screen, cells: Cells, n_draws: int, n_starts: int) -> Oracle:
    """Sum a few cells over the kinds that each of them may be of."""
    shares, kinds = zip(*_kinds(screen), strict=True)
    parts = [_sampled(kind, cells, n_draws, n_starts) for kind in kinds]
    log_prob, mean, n_effective = (torch.stack(part) for part in zip(*parts, strict=True))
    log_joint = log_prob + torch.tensor(shares).log()[:, None]
    weight = torch.softmax(log_joint, 0)
    return Oracle(
        torch.logsumexp(log_joint, 0),
        (weight[..., None] * mean).sum(0),
        1 / (weight.square() / n_effective).sum(0),
    )


def _kinds(screen: Screen) -> list[tuple[float, Screen]]:
    """Return the kinds of cells that a screen mixes unseen, each with its share.

    A kind is a screen of its own: cells that escaped have the shifts and the scatter of the
    control, those of a batch its decoder.
    """
    noise = screen.noise
    if noise is None:
        return [(1.0, screen)]
    control = replace(noise, spread=noise.spread[:1].expand_as(noise.spread))
    escaped = replace(screen, shift=screen.shift[:1].expand_as(screen.shift), noise=control)
    fates = [(1 - noise.escape, screen), (noise.escape, escaped)]
    return [
        (share / len(noise.fold), replace(fate, decoder=replace(fate.decoder, fold=fold)))
        for share, fate in fates
        if share > 0
        for fold in noise.fold
    ]


def _prior(screen: Screen, condition: Tensor) -> MultivariateNormal:
    """Return the distribution of the latents of cells of one kind, in float64."""
    shift = screen.shift[condition].double()
    factor = torch.eye(shift.shape[-1]).to(shift)
    if screen.noise is not None:
        r = screen.noise.correlation
        factor = torch.linalg.cholesky((1 - r) * factor + r)
        factor = screen.noise.spread[condition][..., None] * factor
    return MultivariateNormal(shift, scale_tril=factor, validate_args=False)


def _sampled(screen: Screen, cells: Cells, n_draws: int, n_starts: int) -> Oracle:
    """Importance-sample a few cells of one kind at once."""
    posterior = _Posterior(screen.decoder, cells.counts.double(), _prior(screen, cells.condition))
    proposal = _mixture(posterior, *_gaussians(posterior, _modes(posterior, n_starts)))
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
    prior: MultivariateNormal

    def log_joint(self, z: Float[Tensor, "*draw cell latent"]) -> Float[Tensor, "*draw cell"]:
        """Return log p(x, z | c)."""
        log_rate = self.decoder.log_rate(z)
        # torch's Poisson would compute the factorials again for every draw: three times slower.
        factorials = torch.lgamma(self.counts + 1).sum(-1)
        seen = torch.einsum("...g,...g->...", log_rate, self.counts)
        return self.prior.log_prob(z) + seen - log_rate.exp().sum(-1) - factorials

    def slope(
        self, z: Float[Tensor, "*draw cell latent"]
    ) -> tuple[Float[Tensor, "*draw cell latent"], Float[Tensor, "*draw cell latent latent"]]:
        """Return gradient and expected negative Hessian of the log joint."""
        jacobian = self.decoder.jacobian(z)
        rate = self.decoder.log_rate(z).exp()
        gradient = torch.einsum("...lg,...g->...l", jacobian, self.counts - rate)
        information = (jacobian * rate[..., None, :]) @ jacobian.mT
        precision = self.prior.precision_matrix
        pull = torch.einsum("...lm,...m->...l", precision, z - self.prior.loc)
        return gradient - pull, information + precision


def _modes(
    posterior: _Posterior, n_starts: int, n_steps: int = 10
) -> Float[Tensor, "start cell latent"]:
    """Climb the log joint from draws of the prior, by Gauss-Newton with a step-size search."""
    z = posterior.prior.sample((n_starts,))
    sizes = torch.tensor([1, 0.5, 0.25, 0.1, 0.02, 0]).to(z)[:, None, None, None]
    for _ in range(n_steps):
        gradient, information = posterior.slope(z)
        candidates = z + sizes * torch.linalg.solve(information, gradient)
        best = posterior.log_joint(candidates).argmax(0)
        z = candidates.take_along_dim(best[None, ..., None], 0)[0]
    return z


def _gaussians(
    posterior: _Posterior,
    modes: Float[Tensor, "start cell latent"],
    n_rounds: int = 8,
    step: float = 0.7,
) -> tuple[Float[Tensor, "start cell latent"], Float[Tensor, "start cell latent latent"]]:
    """Fit a Gaussian near each mode; return means and precisions.

    Natural-gradient steps on the Gaussian's divergence from the posterior (Khan & Lin 2017), each
    with two draws and their mirror images.
    """
    mean, precision = modes, posterior.slope(modes)[1]
    for _ in range(n_rounds):
        draws = MultivariateNormal(mean, precision_matrix=precision).sample((2,))
        gradient, information = posterior.slope(torch.cat([draws, 2 * mean - draws]))
        precision = (precision + information.mean(0)) / 2
        mean = mean + step * torch.linalg.solve(precision, gradient.mean(0))
    return mean, precision


def _mixture(
    posterior: _Posterior,
    mean: Float[Tensor, "start cell latent"],
    precision: Float[Tensor, "start cell latent latent"],
    breadth: float = 1.25,
) -> MixtureSameFamily:
    """Mix Gaussians, each weighted by its share of the evidence by Laplace's rule.

    A tenth of the weight is spread evenly, and every Gaussian is a little too broad, so that no
    importance weight is huge.
    """
    evidence = posterior.log_joint(mean) - torch.logdet(precision) / 2
    share = 0.9 * torch.softmax(evidence, 0) + 0.1 / len(mean)
    parts = MultivariateNormal(
        mean.movedim(0, 1), precision_matrix=(precision / breadth).movedim(0, 1)
    )
    return MixtureSameFamily(Categorical(probs=share.T), parts)


def _log_prob_of_library(
    screen: Screen,
    library: Float[Tensor, " cell"],
    condition: Tensor,
    n_draws: int = 5000,
) -> Float[Tensor, " cell"]:
    """Average Poisson(library; total rate) over draws of each condition's prior."""
    terms = []
    for share, kind in _kinds(screen):
        result = torch.empty_like(library)
        for row in condition.unique():
            mine = condition == row
            totals = _totals(kind, row, n_draws)
            seen = Poisson(totals[:, None], validate_args=False).log_prob(library[mine])
            result[mine] = torch.logsumexp(seen, 0) - np.log(n_draws)
        terms.append(result + np.log(share))
    return torch.logsumexp(torch.stack(terms), 0)


def _totals(screen: Screen, row: Tensor, n_draws: int) -> Float[Tensor, " draw"]:
    """Return the expected library of draws of a condition's prior."""
    z = _prior(screen, row).sample((n_draws,))
    return screen.decoder.log_rate(z).exp().sum(-1)
