"""A look-alike of the paper's Replogle screen, with its truth.

Lopez et al. (CLeaR 2023) cut 116,641 cells, 681 targets and 1,187 genes out of a file of 66 GB.
`screen_like` draws a screen of that shape: depth, gene means and dispersions are those of a small
real screen, targets act in clusters, and what nobody knows of a real screen (latents, shifts, gene
programs, escaped cells, batch effects) is known. `smslib.lookalike_file` writes it in the schema
of the real one.

Every ingredient has a random stream of its own: another number of cells, batches or escaped cells
leaves clusters, shifts and programs as they are.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from smslib import __version__, perturbseq
from smslib.data import Cells, Design, single, streams

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = [
    "PATHWAYS",
    "Effects",
    "Lists",
    "LookAlike",
    "ProgramDecoder",
    "Template",
    "draw_nonempty",
    "invented_names",
    "negative_binomial",
    "screen_like",
    "template_of",
]

STREAMS = (
    *("size", "cluster", "target", "gene", "program", "reference", "batch", "batch-effect"),
    *("library", "latent", "escape", "count", "order", "surplus"),
)

# The groups that the paper holds out, by how many targets of the screen are in them.
PATHWAYS: Mapping[str, int] = {
    "exosome-like": 20,
    "spliceosome-like": 34,
    "mediator-like": 26,
    "excision-repair-like": 23,
    "40s-ribosome-like": 97,
    "39s-ribosome-like": 43,
    "60s-ribosome-like": 53,
    "translocation-like": 40,
}
# Sizes of the other 52 of the 60 clusters that the paper's targets were taken from.
_REST = (
    *(5, 6, 10, 15, 8, 5, 4, 4, 5, 8, 6, 6, 4, 7, 7, 4, 4, 4, 5, 5, 5, 4, 4, 6, 4, 7),
    *(5, 4, 10, 5, 7, 6, 15, 4, 4, 6, 5, 6, 10, 10, 9, 4, 4, 9, 5, 19, 4, 5, 4, 11, 9, 13),
)
# Cells and targets of the real screen; cells of its smallest and of its largest target.
_CELLS, _TARGETS, _FEWEST, _MOST = 116_641, 681, 25, 791
_FEWEST_PER_TARGET = 7  # on average, so that the smallest target has a cell
# Mean and standard deviation of logs, in the controls of papalexi2021 (see `_papalexi`).
_LOG_MEAN = (-0.023, 1.049)
_LOG_DISPERSION = (-0.941, 0.975)
_LOG_LIBRARY = 0.556  # its mean follows from the genes'
_SIZE_SPREAD = 0.56  # sd of log cells per target
_LEAK = 0.5
_LARGEST_LOADING = 0.7  # sd of a gene's log rate due to the latents
_DISPERSION = (0.02, 4.0)  # a few template genes lie outside, by noise or by doublets
_SMALLEST_RESIDUAL = 0.01
BLOCK = 2048  # cells drawn or written at a time; part of what a seed means
_N_REFERENCE = 4000


@runtime_checkable
class Lists(Protocol):
    """Symbols by which a source file is cut."""

    targets: Collection[str]
    genes: Collection[str]
    pathways: Mapping[str, Collection[str]]


@dataclass(frozen=True)
class _Symbols:
    targets: tuple[str, ...]
    genes: tuple[str, ...]
    pathways: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Effects:
    """How targets move latents; shifts in prior standard deviations.

    A cluster moves one, two or three latents, drawn alike from all: clusters share latents, and a
    few latents are moved by none. Its targets move the same latents, each by a little more or
    less.

    Parameters
    ----------
    size : float
        Median shift of a cluster along a latent that it moves, either sign.
    spread : float
        Standard deviation of the log of that shift.
    smallest, largest : float
        Bounds of that shift.
    deviation : float
        Standard deviation of the log of a target's shift about its cluster's.
    private : float
        Share of targets that move one latent more, of their own.
    weak : float
        Share of targets with a tenth to three tenths of the effect; the others have seven to
        twelve tenths, as knock-down varies.
    null : float
        Share of targets without effect, in every cluster.

    Raises
    ------
    ValueError
        If a value is outside its range.
    """

    size: float = 1.2
    spread: float = 0.4
    smallest: float = 0.5
    largest: float = 3.0
    deviation: float = 0.15
    private: float = 0.1
    weak: float = 0.2
    null: float = 0.15

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        if not 0 < self.smallest <= self.size <= self.largest < np.inf:
            raise ValueError(
                f"smallest={self.smallest}, size={self.size}, largest={self.largest}; expected "
                "0 < smallest <= size <= largest (signs are drawn: both occur)"
            )
        if not (0 <= self.spread < np.inf and 0 <= self.deviation < np.inf):
            raise ValueError(
                f"spread={self.spread}, deviation={self.deviation}; expected standard deviations "
                "of at least 0"
            )
        shares = (self.private, self.weak, self.null, self.weak + self.null)
        if not all(0 <= share <= 1 for share in shares):
            raise ValueError(
                f"private={self.private}, weak={self.weak}, null={self.null}; expected shares of "
                "the targets, weak + null at most 1"
            )


@dataclass(frozen=True, eq=False)
class Template:
    """What a look-alike takes from a real screen.

    Parameters
    ----------
    name : str
        Where it is from.
    mean : array, (n_genes,)
        UMIs per cell, positive.
    dispersion : array, (n_genes,)
        Variance beyond Poisson's over the squared mean, positive.
    library : array, (n_cells,)
        UMIs of each cell over these genes, positive.

    Raises
    ------
    ValueError
        If shapes disagree, a value is not positive, or libraries and means are not of the same
        genes.
    """

    name: str
    mean: Float[np.ndarray, " gene"]
    dispersion: Float[np.ndarray, " _"]
    library: Float[np.ndarray, " cell"]

    def __post_init__(self) -> None:
        """Check shapes and ranges."""
        if self.mean.ndim != 1 or self.mean.shape != self.dispersion.shape:
            raise ValueError(
                f"means have shape {self.mean.shape}, dispersions {self.dispersion.shape}; "
                "expected one of each per gene"
            )
        for what in ("mean", "dispersion", "library"):
            values = getattr(self, what)
            if values.size == 0 or not (np.isfinite(values) & (values > 0)).all():
                raise ValueError(
                    f"the template {self.name!r} has a {what} that is not positive, or none; drop "
                    "genes and cells without UMIs first"
                )
        if not np.isclose(self.library.mean(), self.mean.sum(), rtol=0.05):
            raise ValueError(
                f"the template {self.name!r} has {self.library.mean():.5g} UMIs per cell, but its "
                f"gene means sum to {self.mean.sum():.5g}; expected both over the same genes"
            )

    def resized(self, n_genes: int, rng: np.random.Generator) -> Template:
        """Return the template for another number of genes: its own at evenly spaced ranks."""
        n = len(self.mean)
        if n == n_genes:
            return self
        rank = (np.arange(n_genes) + 0.5) / n_genes * n
        chosen = rng.permutation(np.argsort(self.mean, kind="stable")[rank.astype(int)])
        mean = self.mean[chosen]
        library = self.library * (mean.sum() / self.mean.sum())
        return Template(self.name, mean, self.dispersion[chosen], library)


@dataclass(frozen=True, eq=False)
class ProgramDecoder:
    """The true p(x | z, exposure): gene programs, a softmax, negative binomial counts.

    Parameters
    ----------
    programs : Tensor, (n_latent, n_genes)
        Change of a gene's log rate per unit of the latent, where it is positive; half of that
        where it is negative (genes rise further than they fall). Most entries are zero.
    offset : Tensor, (n_genes,)
        Log rate at z = 0, up to a constant.
    theta : Tensor, (n_genes,)
        Inverse dispersion.
    """

    programs: Float[Tensor, "latent gene"]
    offset: Float[Tensor, " gene"]
    theta: Float[Tensor, " gene"]

    def logits(self, z: Float[Tensor, "*cell latent"]) -> Float[Tensor, "*cell gene"]:
        """Return the log rates before they are made to sum to one."""
        return self.offset + _response(z.to(self.programs)) @ self.programs

    def log_share(self, z: Float[Tensor, "*cell latent"]) -> Float[Tensor, "*cell gene"]:
        """Return the log of each gene's expected share of a cell's UMIs, in float64."""
        return self.logits(z).log_softmax(-1)

    def jacobian(self, z: Float[Tensor, "*cell latent"]) -> Float[Tensor, "*cell latent gene"]:
        """Return the derivative of the log share of every gene by every latent."""
        slope = torch.where(z > 0, 1.0, _LEAK).to(self.programs)
        tangent = slope[..., None] * self.programs
        return tangent - tangent @ self.log_share(z).exp()[..., None]


@dataclass(frozen=True, eq=False)
class LookAlike:
    """A simulated screen in the shape of a real one, and its truth.

    Parameters
    ----------
    cells : Cells
        In random order.
    design : Design
        Single targets; the control is `smslib.perturbseq.CONTROL`, with or without cells.
    z : Tensor, (n_cells, n_latent)
        True latents, prior standard deviations.
    shift : Tensor, (n_conditions, n_latent)
        True prior mean of each condition's cells that did not escape; row 0 is zero.
    graph : Tensor, (n_targets, n_latent)
        Whether the target moves the latent, however little.
    decoder : ProgramDecoder
        True p(x | z), without batch effects.
    pathways : dict of tuple of str
        Targets of the groups to hold out.
    clusters : dict of tuple of str
        Targets of every cluster, the pathways among them; a partition of the targets.
    strength : Tensor, (n_targets,)
        Share of its effect that a target exerts: 0 for nulls, below .5 for weak ones.
    escaped : Tensor, (n_cells,)
        Whether a perturbed cell was left untouched: its latents are those of a control.
    batch : Tensor, (n_cells,)
        Row of ``batch_effect``.
    batch_effect : Tensor, (n_batches, n_genes)
        Added to the decoder's logits.
    genes : tuple of str, length n_genes
        Symbols; one may occur twice, as in the real file.
    template : Template
        Means, dispersions and libraries that its controls have, gene by gene.
    origin : dict
        Marks the screen as simulated: seed, version, template and every option.
    """

    cells: Cells
    design: Design
    z: Float[Tensor, "cell latent"]
    shift: Float[Tensor, "condition latent"]
    graph: Bool[Tensor, "target latent"]
    decoder: ProgramDecoder
    pathways: Mapping[str, tuple[str, ...]]
    clusters: Mapping[str, tuple[str, ...]]
    strength: Float[Tensor, " target"]
    escaped: Bool[Tensor, " cell"]
    batch: Int[Tensor, " cell"]
    batch_effect: Float[Tensor, "batch gene"]
    genes: tuple[str, ...]
    template: Template
    origin: Mapping[str, Any]

    @property
    def nulls(self) -> tuple[str, ...]:
        """Targets without effect."""
        without = (self.strength == 0).tolist()
        return tuple(t for t, null in zip(self.design.targets, without, strict=True) if null)

    @property
    def lists(self) -> Lists:
        """Targets, genes and pathways by which its file is cut, as of the real one."""
        return _Symbols(self.design.targets, tuple(dict.fromkeys(self.genes)), self.pathways)


def screen_like(
    *,
    n_targets: int = _TARGETS,
    n_cells: int = _CELLS,
    n_genes: int = 1_187,
    n_latent: int = 50,
    pathways: Mapping[str, int] | None = None,
    seed: int = 0,
    template: Template | AnnData | None = None,
    lists: Lists | None = None,
    effects: Effects | None = None,
    explained: float = 0.5,
    escape: float = 0.0,
    batches: int = 1,
    batch_sd: float = 0.1,
    confounding: float = 0.0,
    controls: int = 0,
) -> LookAlike:
    r"""Draw a screen like the Replogle subset of Lopez et al. (2023), and keep its truth.

    ``z | c ~ N(shift_c, I)``; ``x | z ~ NB(exposure * softmax(logits(z) + batch), theta)`` with
    the logits of `ProgramDecoder`.

    Parameters
    ----------
    n_targets, n_cells, n_genes, n_latent : int
        The defaults are the paper's. ``n_cells`` are perturbed cells, controls not among them.
    pathways : dict of int, optional
        Sizes of the groups to hold out; `PATHWAYS`, scaled to ``n_targets``, by default. The other
        targets fall into clusters with the sizes of the real ones, 4 to 19 at full size.
    seed : int
    template : Template or AnnData, optional
        Where depth, gene means and dispersions come from; AnnData goes through `template_of`. By
        default the controls of ``papalexi2021`` if its file is in the data directory (nothing is
        downloaded), else log-normal quantiles with its moments; ``origin["template"]`` says which.
    lists : optional
        Object with ``targets``, ``genes`` and ``pathways``, whose symbols are then used; one more
        gene than symbols repeats the first symbol (the real screen has one symbol twice). If it
        has ``clusters``, targets act by them. By default names are invented: ``T001``, ``G0001``.
    effects : Effects, optional
    explained : float
        Share of each gene's dispersion that the latents explain, so far as their effect on its
        log rate stays below a standard deviation of 0.7.
    escape : float
        Probability that a perturbed cell is untouched.
    batches : int
        Gem groups.
    batch_sd : float
        Standard deviation of their effects on a gene's log rate; zero where there is one group.
    confounding : float
        Probability that a cell comes from the one group in which its target is at home, and not
        from any: 0 is a balanced design, 1 one group per target.
    controls : int
        Control cells; the paper kept none.

    Returns
    -------
    LookAlike
        Counts, latents and shifts float32. At full size about 1 GB and half a minute on one core.

    Raises
    ------
    ValueError
        If a size or share is out of range, or the lists do not fit the sizes.

    Notes
    -----
    Cells per target are quantiles of a log-normal with log standard deviation 0.56, scaled to
    ``n_cells`` and cut at the real screen's extremes (at full size 25 and 791, mean 171), in
    random order, whatever the effect: in the real screen, strong knock-downs cost cells.

    Gene means and dispersions are the template's at evenly spaced ranks of the mean, in random
    order; as they are if the numbers agree. A cell's exposure is the library of a template cell,
    drawn with replacement, times the ratio of total means. The offsets are such that the mean
    profile of controls, averaged over 4,000 draws of their latents, is the template's; theta
    covers the dispersion that the latents leave. Cells without UMIs are drawn again.

    Every gene has one main program, every latent is the main one of some genes, and four fifths
    of these loadings are positive. Up to two more programs move a gene at less than half the
    weight. A target's own gene is not knocked down.
    """
    effects = effects or Effects()
    options = {
        **{"n_targets": n_targets, "n_cells": n_cells, "n_genes": n_genes, "n_latent": n_latent},
        **{"pathways": dict(pathways) if pathways else None, "lists": lists is not None},
        **{"effects": asdict(effects), "explained": explained, "escape": escape},
        **{"batches": batches, "batch_sd": batch_sd, "confounding": confounding},
        "controls": controls,
    }
    _check_sizes(n_targets, n_cells, n_genes, n_latent, batches, controls)
    _check_shares(explained=explained, escape=escape, confounding=confounding)
    _check_batch_effects(batches, batch_sd, confounding)
    symbols, clusters = _symbols(lists, pathways, n_targets, n_genes)
    rngs = streams(seed, STREAMS)
    moments = _template(template).resized(n_genes, rngs["gene"])
    decoder = _decoder(moments, n_latent, explained, rngs)
    member = _membership(symbols.targets, clusters)
    shift, strength = _draw_shifts(rngs, member, n_latent, effects)
    condition = _draw_conditions(rngs, n_targets, n_cells, controls)
    batch_effect = _draw_batch_effects(rngs["batch-effect"], batches, batch_sd, n_genes)
    drawn = _draw_cells(
        rngs, condition, shift, decoder, batch_effect, moments.library, escape, confounding
    )
    return LookAlike(
        **drawn,
        design=Design.single_target(symbols.targets, control=perturbseq.CONTROL),
        shift=single(shift),
        graph=torch.from_numpy(shift[1:] != 0),
        decoder=decoder,
        pathways=symbols.pathways,
        clusters=clusters,
        strength=single(strength),
        batch_effect=single(batch_effect),
        genes=symbols.genes,
        template=moments,
        origin=_origin(seed, moments.name, options),
    )


def template_of(
    adata: AnnData,
    *,
    key: str = "target",
    control: str = perturbseq.CONTROL,
    min_mean: float = 0.25,
    name: str = "the AnnData given",
) -> Template:
    """Estimate gene means, dispersions and library sizes from a screen's control cells.

    Parameters
    ----------
    adata : AnnData, (n_cells, n_genes)
        Raw UMIs.
    key : str
        Column of ``obs`` with the target of each cell; without that column all cells are used.
    control : str
        Its value in the cells to use.
    min_mean : float
        Genes with fewer UMIs per cell are left out. The released Replogle matrix has 8,248 of the
        genome's genes, the well expressed ones; a random sample of genes is far thinner.
    name : str
        Kept in the template.

    Returns
    -------
    Template
        Dispersions by moments, given each cell's library: ``sum((x - m)² - m) / sum(m²)``, kept
        within 0.02 and 4.

    Raises
    ------
    ValueError
        If fewer than two cells or no genes are left.
    """
    cells = adata[(adata.obs[key] == control).to_numpy()] if key in adata.obs else adata
    counts = np.asarray(cells.X.toarray() if hasattr(cells.X, "toarray") else cells.X, float)
    kept = counts[:, counts.mean(0) >= max(min_mean, 1e-12)] if len(counts) else counts[:, :0]
    kept = kept[kept.sum(1) > 0]
    if len(kept) < 2 or kept.shape[1] == 0:
        raise ValueError(
            f"a template from {counts.shape[0]} cells with obs[{key!r}] == {control!r}, of which "
            f"{kept.shape[0]} have UMIs in the {kept.shape[1]} genes with a mean of {min_mean} or "
            "more; expected two cells and a gene at least: check key and control, lower min_mean"
        )
    library = kept.sum(1)
    expected = library[:, None] * (kept.sum(0) / kept.sum())
    excess = (kept - expected) ** 2 - expected
    dispersion = (excess.sum(0) / (expected**2).sum(0)).clip(*_DISPERSION)
    return Template(name, kept.mean(0), dispersion, library)


# -------------------------------------------------------------------------------- the checks


def _check_sizes(
    n_targets: int, n_cells: int, n_genes: int, n_latent: int, batches: int, controls: int
) -> None:
    if min(n_targets, n_genes, n_latent, batches) < 1 or controls < 0:
        raise ValueError(
            f"n_targets={n_targets}, n_genes={n_genes}, n_latent={n_latent}, batches={batches}, "
            f"controls={controls}; expected at least 1 of each, and 0 controls or more"
        )
    if n_latent > n_genes:
        raise ValueError(
            f"n_latent={n_latent}, n_genes={n_genes}; every latent needs a gene of its own: lower "
            "n_latent or raise n_genes"
        )
    if n_cells < _FEWEST_PER_TARGET * n_targets:
        raise ValueError(
            f"n_cells={n_cells} for n_targets={n_targets}; cells per target differ by a factor of "
            f"30, so expected at least {_FEWEST_PER_TARGET} times as many cells as targets"
        )


def _check_shares(**shares: float) -> None:
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{name} is {share}; expected a share or probability, 0 to 1")


def _check_batch_effects(batches: int, batch_sd: float, confounding: float) -> None:
    if not 0 <= batch_sd < np.inf:
        raise ValueError(f"batch_sd is {batch_sd}; expected a standard deviation of at least 0")
    if confounding > 0 and batches == 1:
        raise ValueError(
            f"confounding={confounding} with one batch; there is nothing to be confounded with: "
            "raise batches or leave confounding out"
        )


# ----------------------------------------------------------------------- names and clusters


def _symbols(
    lists: Lists | None, pathways: Mapping[str, int] | None, n_targets: int, n_genes: int
) -> tuple[_Symbols, dict[str, tuple[str, ...]]]:
    """Return all names and the clusters."""
    if lists is None:
        symbols = _invented(pathways, n_targets, n_genes)
    else:
        symbols = _given(lists, pathways, n_targets, n_genes)
    return symbols, _clusters(symbols, getattr(lists, "clusters", {}))


def _clusters(
    symbols: _Symbols, given: Mapping[str, Collection[str]]
) -> dict[str, tuple[str, ...]]:
    """Partition the targets: pathways, then clusters given, then groups of what is left."""
    clusters, left = dict(symbols.pathways), dict.fromkeys(symbols.targets)
    for group in clusters.values():
        left = {target: None for target in left if target not in group}
    for name, members in given.items():
        group = tuple(target for target in dict.fromkeys(members) if target in left)
        # A cluster may be called like a pathway that some of it belongs to.
        clusters |= {f"{name} (rest)" if name in clusters else name: group} if group else {}
        left = {target: None for target in left if target not in group}
    n_groups = max(1, round(len(_REST) * len(left) / sum(_REST)))
    numbered = (f"cluster-{number:02d}" for number in count(len(clusters) + 1))
    free = (name for name in numbered if name not in clusters)
    return clusters | dict(zip(free, _split(tuple(left), _REST[:n_groups]), strict=False))


def _invented(pathways: Mapping[str, int] | None, n_targets: int, n_genes: int) -> _Symbols:
    """Name targets and genes so that nobody takes them for real ones."""
    sizes = _scaled(n_targets) if pathways is None else dict(pathways)
    if min(sizes.values(), default=1) < 1 or sum(sizes.values()) > n_targets:
        raise ValueError(
            f"pathways of sizes {sizes} for n_targets={n_targets}; expected sizes of at least 1 "
            "that sum to n_targets at most"
        )
    targets = invented_names("T", n_targets)
    edges = np.cumsum([0, *sizes.values()])
    groups = {
        name: targets[start:stop]
        for name, start, stop in zip(sizes, edges[:-1], edges[1:], strict=True)
    }
    return _Symbols(targets, invented_names("G", n_genes), groups)


def _scaled(n_targets: int) -> dict[str, int]:
    """Scale the sizes of the paper's pathways; those that vanish are left out."""
    sizes = {name: n_targets * size // _TARGETS for name, size in PATHWAYS.items()}
    return {name: size for name, size in sizes.items() if size}


def invented_names(letter: str, n: int) -> tuple[str, ...]:
    """Return numbered names of one length: ``("T01", "T02", ...)``."""
    width = len(str(n))
    return tuple(f"{letter}{number:0{width}d}" for number in range(1, n + 1))


def _given(
    lists: Lists, pathways: Mapping[str, int] | None, n_targets: int, n_genes: int
) -> _Symbols:
    """Take the lists' symbols, each once, and check that they fit the sizes."""
    if pathways is not None:
        raise ValueError("both lists and pathways are given; the lists name the pathways already")
    targets, genes = tuple(dict.fromkeys(lists.targets)), tuple(dict.fromkeys(lists.genes))
    if len(targets) != n_targets or not len(genes) <= n_genes <= len(genes) + 1:
        raise ValueError(
            f"the lists have {len(targets)} targets and {len(genes)} genes; pass "
            f"n_targets={len(targets)}, n_genes={len(genes)} or one more (got {n_targets} and "
            f"{n_genes})"
        )
    groups = {name: tuple(dict.fromkeys(group)) for name, group in lists.pathways.items()}
    members = [target for group in groups.values() for target in group]
    unknown = sorted(set(members) - set(targets))
    if unknown or len(set(members)) < len(members):
        raise ValueError(
            f"the pathways of the lists name targets that are in none of their targets "
            f"({unknown}), or overlap; expected disjoint groups of the targets"
        )
    return _Symbols(targets, genes + genes[: n_genes - len(genes)], groups)


def _split(members: Sequence[str], sizes: Sequence[int]) -> list[tuple[str, ...]]:
    """Cut members into consecutive groups with sizes in these proportions."""
    edges = np.rint(np.cumsum([0, *sizes]) * len(members) / sum(sizes)).astype(int)
    groups = (tuple(members[a:b]) for a, b in zip(edges[:-1], edges[1:], strict=True))
    return [group for group in groups if group]


def _membership(
    targets: Sequence[str], clusters: Mapping[str, tuple[str, ...]]
) -> Int[np.ndarray, " target"]:
    """Return the number of each target's cluster."""
    number = {target: n for n, group in enumerate(clusters.values()) for target in group}
    return np.array([number[target] for target in targets])


# ----------------------------------------------------------------------------- the template


def _template(given: Template | AnnData | None) -> Template:
    if isinstance(given, Template):
        return given
    if given is not None:
        return template_of(given)
    source = perturbseq.SOURCES["papalexi2021"]
    if (perturbseq.data_dir() / source.filename).exists():
        return _papalexi()
    return _log_normal()


def _papalexi() -> Template:
    """Measure the controls of the two replicates that resemble each other."""
    called, _ = perturbseq.assign_guides(perturbseq.read("papalexi2021"), threshold=0.8)
    alike = called[called.obs["replicate"].isin(["rep_2", "rep_3"])]
    kept, _ = perturbseq.filter_screen(alike.copy(), min_umis=50)
    return template_of(kept, name="papalexi2021, controls of two replicates")


def _log_normal(n: int = 500) -> Template:
    """Return quantiles of log-normals with the moments of `_papalexi`.

    Mean and standard deviation of logs; low means are cut at the same 0.25 UMIs per cell.
    """
    from scipy.stats import norm

    z = norm.ppf((np.arange(n) + 0.5) / n)
    shuffled = np.random.default_rng(0).permutation(z)  # dispersion hardly depends on the mean
    mean = np.exp(_LOG_MEAN[0] + _LOG_MEAN[1] * z).clip(0.25)
    dispersion = np.exp(_LOG_DISPERSION[0] + _LOG_DISPERSION[1] * shuffled).clip(*_DISPERSION)
    library = np.exp(_LOG_LIBRARY * z)
    library *= mean.sum() / library.mean()
    return Template("log-normal, moments of papalexi2021", mean, dispersion, library)


# ------------------------------------------------------------------------------ the drawing


def _draw_shifts(
    rngs: Mapping[str, np.random.Generator],
    member: Int[np.ndarray, " target"],
    n_latent: int,
    effects: Effects,
) -> tuple[Float[np.ndarray, "condition latent"], Float[np.ndarray, " target"]]:
    """Return the shift of every condition, the control's zeros first, and every target's share."""
    of_cluster = _draw_cluster_shifts(rngs["cluster"], len(set(member)), n_latent, effects)
    rng = rngs["target"]
    strength = _draw_strength(rng, len(member), effects)
    shape = (len(member), n_latent)
    shift = of_cluster[member] * np.exp(effects.deviation * rng.standard_normal(shape))
    owns = np.flatnonzero(rng.random(len(member)) < effects.private)
    own = _draw_sizes(rng, (len(member),), effects)
    latent = rng.integers(n_latent, size=len(member))
    shift[owns, latent[owns]] += own[owns]
    return np.vstack([np.zeros(n_latent), shift * strength[:, None]]), strength


def _draw_cluster_shifts(
    rng: np.random.Generator, n_clusters: int, n_latent: int, effects: Effects
) -> Float[np.ndarray, "cluster latent"]:
    """Shift one, two or three latents of every cluster."""
    shape = (n_clusters, n_latent)
    n_moved = rng.integers(1, 4, size=n_clusters)
    moved = rng.random(shape).argsort(1).argsort(1) < n_moved[:, None]
    return moved * _draw_sizes(rng, shape, effects)


def _draw_sizes(
    rng: np.random.Generator, shape: tuple[int, ...], effects: Effects
) -> Float[np.ndarray, ...]:
    sizes = effects.size * np.exp(effects.spread * rng.standard_normal(shape))
    return rng.choice([-1.0, 1.0], size=shape) * sizes.clip(effects.smallest, effects.largest)


def _draw_strength(
    rng: np.random.Generator, n_targets: int, effects: Effects
) -> Float[np.ndarray, " target"]:
    """Return the share of its effect that each target exerts: none, a little, or most of it."""
    kind, strong, weak = rng.random((3, n_targets))
    strength = np.where(kind < effects.null + effects.weak, 0.1 + 0.2 * weak, 0.7 + 0.5 * strong)
    return np.where(kind < effects.null, 0.0, strength)


def _cells_per_target(
    n_targets: int, n_cells: int, rng: np.random.Generator
) -> Int[np.ndarray, " target"]:
    """Return how many cells each target has: quantiles of a log-normal, cut at both ends."""
    from scipy.optimize import brentq
    from scipy.stats import norm

    relative = np.exp(_SIZE_SPREAD * norm.ppf((np.arange(n_targets) + 0.5) / n_targets))
    ends = [end * n_cells * _TARGETS / (n_targets * _CELLS) for end in (_FEWEST, _MOST)]
    low, high = ends[0] / relative.max(), ends[1] / relative.min()
    scale = brentq(lambda s: (s * relative).clip(*ends).sum() - n_cells, low, high)
    total = np.rint(np.cumsum((scale * relative).clip(*ends))).astype(int)
    return rng.permutation(np.diff(total, prepend=0))


def _draw_conditions(
    rngs: Mapping[str, np.random.Generator], n_targets: int, n_cells: int, controls: int
) -> Int[np.ndarray, " cell"]:
    """Return every cell's row of the design, in random order."""
    sizes = _cells_per_target(n_targets, n_cells, rngs["size"])
    return rngs["order"].permutation(np.repeat(np.arange(n_targets + 1), [controls, *sizes]))


def _draw_batches(
    rng: np.random.Generator,
    condition: Int[np.ndarray, " cell"],
    confounding: float,
    sizes: tuple[int, int],
) -> Int[np.ndarray, " cell"]:
    """Return every cell's batch: its target's own with probability ``confounding``, else any.

    ``sizes`` are the numbers of batches and of conditions.
    """
    n_batches, n_conditions = sizes
    home = rng.integers(n_batches, size=n_conditions)
    at_home = rng.random(len(condition)) < confounding
    return np.where(at_home, home[condition], rng.integers(n_batches, size=len(condition)))


def _draw_batch_effects(
    rng: np.random.Generator, batches: int, batch_sd: float, n_genes: int
) -> Float[np.ndarray, "batch gene"]:
    if batches == 1:
        return np.zeros((1, n_genes))
    return batch_sd * rng.standard_normal((batches, n_genes))


def _draw_cells(
    rngs: Mapping[str, np.random.Generator],
    condition: Int[np.ndarray, " cell"],
    shift: Float[np.ndarray, "condition latent"],
    decoder: ProgramDecoder,
    batch_effect: Float[np.ndarray, "batch gene"],
    library: Float[np.ndarray, " donor"],
    escape: float,
    confounding: float,
) -> dict[str, Any]:
    """Return what a `LookAlike` holds of each cell."""
    escaped = (rngs["escape"].random(len(condition)) < escape) & (condition > 0)
    z = shift[condition] * ~escaped[:, None]
    z += rngs["latent"].standard_normal(z.shape)
    sizes = (len(batch_effect), len(shift))
    batch = _draw_batches(rngs["batch"], condition, confounding, sizes)
    exposure = rngs["library"].choice(library, size=len(condition))
    counts = _draw_counts(rngs["count"], decoder, z, exposure, batch, batch_effect)
    return {
        "cells": Cells(counts, torch.from_numpy(condition)),
        "z": single(z),
        "escaped": torch.from_numpy(escaped),
        "batch": torch.from_numpy(batch),
    }


def _response(z: Tensor) -> Tensor:
    return torch.nn.functional.leaky_relu(z, _LEAK)


def _decoder(
    template: Template,
    n_latent: int,
    explained: float,
    rngs: Mapping[str, np.random.Generator],
) -> ProgramDecoder:
    """Draw programs; choose offsets and theta so that controls have the template's moments."""
    raw = _draw_programs(rngs["program"], n_latent, len(template.mean))
    reference = rngs["reference"].standard_normal((_N_REFERENCE, n_latent))
    response = _response(torch.from_numpy(reference)).numpy()
    wanted = np.sqrt(np.log1p(explained * template.dispersion)).clip(max=_LARGEST_LOADING)
    programs = raw * wanted / (response @ raw).std(0)
    moved = response @ programs
    share = template.mean / template.mean.sum()
    offset, drawn = _level(moved, share)
    latent = drawn.var(0) / share**2
    residual = ((template.dispersion - latent) / (1 + latent)).clip(_SMALLEST_RESIDUAL)
    parts = (programs, offset, 1 / residual)
    return ProgramDecoder(*(torch.from_numpy(part) for part in parts))


def _draw_programs(
    rng: np.random.Generator, n_latent: int, n_genes: int
) -> Float[np.ndarray, "latent gene"]:
    """Give each gene a main program and up to two more, at half the weight or less."""
    gene = np.arange(n_genes)
    programs = np.zeros((n_latent, n_genes))
    for _ in range(2):
        joins = rng.random(n_genes) < 0.5
        weight = rng.choice([-1.0, 1.0], size=n_genes) * rng.uniform(0.25, 0.5, size=n_genes)
        programs[rng.integers(n_latent, size=n_genes), gene] = joins * weight
    sign = np.where(rng.random(n_genes) < 0.8, 1.0, -1.0)
    main = rng.permutation(gene % n_latent)
    programs[main, gene] = sign * rng.uniform(0.7, 1.3, size=n_genes)
    return programs


def _level(
    moved: Float[np.ndarray, "draw gene"], share: Float[np.ndarray, " gene"], rounds: int = 8
) -> tuple[Float[np.ndarray, " gene"], Float[np.ndarray, "draw gene"]]:
    """Return offsets under which the mean share over the draws is ``share``, and those shares."""
    from scipy.special import softmax

    offset = np.log(share)
    for _ in range(rounds):
        offset = offset + np.log(share) - np.log(softmax(offset + moved, axis=1).mean(0))
    return offset, softmax(offset + moved, axis=1)


def _draw_counts(
    rng: np.random.Generator,
    decoder: ProgramDecoder,
    z: Float[np.ndarray, "cell latent"],
    exposure: Float[np.ndarray, " cell"],
    batch: Int[np.ndarray, " cell"],
    batch_effect: Float[np.ndarray, "batch gene"],
) -> Float[Tensor, "cell gene"]:
    """Draw the counts block by block."""
    counts = torch.empty(len(z), len(decoder.offset))
    for start in range(0, len(z), BLOCK):
        rows = slice(start, start + BLOCK)
        logits = decoder.logits(torch.from_numpy(z[rows])).numpy() + batch_effect[batch[rows]]
        drawn = draw_nonempty(rng, logits, exposure[rows], decoder.theta.numpy())
        counts[rows] = torch.from_numpy(drawn)
    return counts


def draw_nonempty(
    rng: np.random.Generator,
    logits: Float[np.ndarray, "cell gene"],
    exposure: Float[np.ndarray, " cell"],
    theta: Float[np.ndarray, " gene"],
) -> Int[np.ndarray, "cell gene"]:
    """Draw negative binomial counts, again where a cell gets no UMIs at all."""
    from scipy.special import softmax

    rate = exposure[:, None] * softmax(logits, axis=1)
    counts = negative_binomial(rng, rate, theta)
    while (empty := counts.sum(1) == 0).any():
        counts[empty] = negative_binomial(rng, rate[empty], theta)
    return counts


def negative_binomial(
    rng: np.random.Generator,
    mean: Float[np.ndarray, "cell gene"],
    theta: Float[np.ndarray, " gene"],
) -> Int[np.ndarray, "cell gene"]:
    """Draw counts of these means; their variance is ``mean + mean**2 / theta``."""
    return rng.poisson(mean * rng.standard_gamma(theta, size=mean.shape) / theta)


def _origin(seed: int, template: str, options: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "warning": "SIMULATED, NOT MEASURED: a look-alike of the Replogle screen",
        "function": "smslib.simulate.screen_like",
        "version": __version__,
        "seed": seed,
        "template": template,
        "options": json.dumps(options),
    }
