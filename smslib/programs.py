"""What a latent means: its genes, its targets, and whether another seed finds it again.

A program is how every gene's log rate answers to a latent. Programs are read from the decoder
(`jacobian`, `integrated_gradients`), compared with sets of genes (`enrich`) and of targets
(`enrich_targets`), and with those of other seeds (`recurrence`): a program that no other seed
finds is no finding. `smslib.programs_study` does all of it for the real screen, true and shuffled
labels alike; ``python -m smslib.programs`` runs it.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Real
from numpy.typing import ArrayLike
from torch import Tensor, nn

from smslib import metrics
from smslib.data import Cells
from smslib.evaluate import latents
from smslib.model import SMSVAE
from smslib.names import from_extra, unknown_names
from smslib.newton import log_rate_and_jacobian

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Clusters",
    "Programs",
    "attributions",
    "cluster",
    "enrich",
    "enrich_targets",
    "integrated_gradients",
    "jacobian",
    "read_gmt",
    "recurrence",
]

Matrix = Real[np.ndarray, "_ _"]
Sets = Mapping[str, Collection[str]]
Lists = Mapping[str | int, Collection[str]]
_ALIKE = 0.8  # a convention, no gap in the data: two thirds of the variance (see `recurrence`)
_OFTEN = 0.75  # share of the other seeds: three of four


@dataclass(frozen=True, eq=False)
class Programs:
    """How the log rate of every gene answers to every latent.

    Parameters
    ----------
    weights : array, (n_latent, n_genes)
        Mean over cells. From `jacobian`: nats of log rate per prior standard deviation; from
        `integrated_gradients`: nats of log rate. The sign of a latent is arbitrary.
    genes : tuple of str, length n_genes
    spread : array, (n_latent, n_genes)
        Standard deviation over cells, same unit.

    Raises
    ------
    ValueError
        If the shapes disagree, a gene repeats, or a weight is not finite.
    """

    weights: Float[np.ndarray, "latent gene"]
    genes: tuple[str, ...]
    spread: Float[np.ndarray, "latent gene"]

    def __post_init__(self) -> None:
        """Check the shapes."""
        _refuse_repeated_genes(self.genes)
        shapes = {self.weights.shape, self.spread.shape}
        if len(shapes) > 1 or self.weights.shape[1:] != (len(self.genes),):
            raise ValueError(
                f"weights have shape {self.weights.shape}, spread {self.spread.shape}; expected "
                f"(n_latent, {len(self.genes)}) for both, one column per gene"
            )
        if not np.isfinite(self.weights).all():
            raise ValueError(
                "weights are not finite; expected programs of a model whose fit did not diverge"
            )

    def __len__(self) -> int:
        """Return the number of latents."""
        return len(self.weights)

    def scaled(self, mean_counts: ArrayLike) -> Programs:
        """Return the programs in standard deviations of each gene's noise.

        The log rate of a rare gene can do anything at little cost, so that slopes alone put the
        rarest genes on top. The counts of a gene of mean m UMIs tell a change of its log rate
        from Poisson noise by ``sqrt(m)`` standard deviations per nat (square root of the Fisher
        information).

        Parameters
        ----------
        mean_counts : array, (n_genes,)
            UMIs per cell.

        Raises
        ------
        ValueError
            If there is not one non-negative mean per gene.
        """
        means = np.asarray(mean_counts, dtype=float)
        if means.shape != (len(self.genes),) or not (means >= 0).all():
            raise ValueError(
                f"mean_counts have shape {means.shape} and start {means.ravel()[:3].tolist()}; "
                f"expected {len(self.genes)} non-negative means, UMIs per cell of each gene"
            )
        return Programs(self.weights * means**0.5, self.genes, self.spread * means**0.5)

    def moved(self, shifts: Real[np.ndarray, "target latent"]) -> Programs:
        """Return how each target moves the genes: its shifts times the programs, to first order.

        Where several targets move the same two latents, a model may turn these in their plane,
        and another seed turns them differently. What the targets do to the genes stays.

        Parameters
        ----------
        shifts : array, (n_targets, n_latent)
            Prior standard deviations, zero where a gate is shut (`smslib.screens.shifts`).

        Returns
        -------
        Programs
            A row per target in the place of latents; its spread is that of independent latents.

        Raises
        ------
        ValueError
            If the shifts do not have a column per latent.
        """
        shifts = np.asarray(shifts, dtype=float)
        if shifts.ndim != 2 or shifts.shape[1] != len(self):
            raise ValueError(
                f"shifts have shape {shifts.shape}; expected (n_targets, {len(self)}), a column "
                "for each latent"
            )
        spread = np.sqrt(shifts**2 @ self.spread**2)
        return Programs(shifts @ self.weights, self.genes, spread)

    def top(self, latent: int, *, n: int = 10, sign: int = 0) -> tuple[str, ...]:
        """Return the genes that a latent moves most, the strongest first.

        Parameters
        ----------
        latent : int
        n : int
            How many at most. (The paper takes 50.)
        sign : {-1, 0, 1}
            Those that go down with the latent, in either direction, or up with it; genes that go
            the other way, or not at all, are left out.

        Raises
        ------
        IndexError
            If there is no such latent.
        ValueError
            If ``sign`` is none of the three.
        """
        if not 0 <= latent < len(self):
            raise IndexError(f"no latent {latent}; expected 0 to {len(self) - 1}")
        if sign not in (-1, 0, 1):
            raise ValueError(f"sign={sign!r}; expected -1 (down), 0 (either) or 1 (up)")
        weights = self.weights[latent]
        strength = sign * weights if sign else np.abs(weights)
        order = np.argsort(-strength, kind="stable")[:n]
        return tuple(self.genes[gene] for gene in order if strength[gene] > 0)


# ----------------------------------------------------------------------- from model to programs


def jacobian(
    model: SMSVAE, cells: Cells, *, genes: Sequence[str], batch_size: int = 256
) -> Programs:
    r"""Average :math:`\partial \log \rho_g / \partial z_k` over cells, at their latents.

    Parameters
    ----------
    model : SMSVAE
    cells : Cells
        Those to average over.
    genes : sequence of str, length n_genes
        Names of the columns of ``cells.counts``.
    batch_size : int
        Cells at a time; their Jacobians hold batch_size x n_latent x n_genes numbers.

    Returns
    -------
    Programs
        Nats per prior standard deviation, centred by the softmax: weighted by the rates, the
        slopes of a cell's genes add up to nothing.

    Raises
    ------
    ValueError
        If there are no cells, or the genes are not as many different names as the model has.
    """
    names = _checked_genes(model, cells, genes)
    slopes = _slopes_of(model)
    codes = torch.from_numpy(latents(model, cells)).to(model.device)
    return _averaged((slopes(z) for z in codes.split(batch_size)), names)


def integrated_gradients(
    model: SMSVAE,
    cells: Cells,
    *,
    genes: Sequence[str],
    baseline: Float[Tensor, " latent"] | None = None,
    n_steps: int = 32,
    batch_size: int = 64,
) -> Programs:
    """Average over cells what each latent contributes to each gene's log rate (captum).

    Parameters
    ----------
    model : SMSVAE
    cells : Cells
        Those to average over.
    genes : sequence of str, length n_genes
        Names of the columns of ``cells.counts``.
    baseline : Tensor, (n_latent,), optional
        Where the paths to the cells' latents start; by default the mean latent of the controls
        among ``cells``.
    n_steps : int
        As in `attributions`.
    batch_size : int
        Cells at a time; batch_size x n_steps x n_latent x n_genes numbers are held.

    Returns
    -------
    Programs
        Nats of log rate. A cell on the far side of the baseline counts with the opposite sign, or
        the two sides would cancel: weights say what *more* of the latent does, and grow with how
        far the cells lie from the baseline.

    Raises
    ------
    ValueError
        As `jacobian`, or if there is neither a baseline nor a control cell.

    Notes
    -----
    Sundararajan et al. (2017). The paper takes the 50 strongest genes of each latent to EnrichR;
    its code for this is not public, and with it neither baseline nor path. Ours run in latent
    space, through the decoder alone.
    """
    names = _checked_genes(model, cells, genes)
    codes = torch.from_numpy(latents(model, cells)).to(model.device)
    start = _control_mean(codes, cells) if baseline is None else baseline.to(codes)
    contributions = _integrator(model, start, n_steps)
    blocks = (contributions(z) * (z - start).sign().unsqueeze(-1) for z in codes.split(batch_size))
    return _averaged(blocks, names)


def attributions(
    model: SMSVAE,
    z: Float[Tensor, "cell latent"],
    *,
    baseline: Float[Tensor, " latent"],
    n_steps: int = 32,
) -> Float[Tensor, "cell latent gene"]:
    """Split the difference of log rates between latents and a baseline into the latents' shares.

    Parameters
    ----------
    model : SMSVAE
    z : Tensor, (n_cells, n_latent)
        Where the paths end.
    baseline : Tensor, (n_latent,)
        Where they all start.
    n_steps : int
        Nodes of the Gauss-Legendre rule along the straight path.

    Returns
    -------
    Tensor, (n_cells, n_latent, n_genes)
        Nats. Added up over latents they give ``log_rate(z) - log_rate(baseline)``, up to the error
        of the integral.

    Raises
    ------
    ValueError
        If the baseline is not one vector of latents.
    """
    return _integrator(model, baseline, n_steps)(z)


def _slopes_of(model: SMSVAE) -> Callable[[Tensor], Float[Tensor, "cell latent gene"]]:
    """Return the function from latents to the Jacobian of the log rates there."""
    if model.options["norm"] != "none":
        return partial(_by_autograd, _log_rates(model))
    layers = [part for part in (*model.decoder, model.genes) if isinstance(part, nn.Linear)]
    slopes = [part.negative_slope for part in model.decoder if isinstance(part, nn.LeakyReLU)]
    return partial(_closed_form, layers, slopes[0] if slopes else 0.0)


@torch.no_grad()
def _closed_form(
    layers: Sequence[nn.Linear], slope: float, z: Float[Tensor, "cell latent"]
) -> Float[Tensor, "cell latent gene"]:
    return log_rate_and_jacobian(layers, slope, z)[1]


def _by_autograd(
    network: nn.Module, z: Float[Tensor, "cell latent"]
) -> Float[Tensor, "cell latent gene"]:
    """Return the Jacobian of any decoder: a pass per latent, where backward takes one per gene.

    A backward pass is linear in the weights of the genes it starts from. Its own derivative by
    those weights is a column of the Jacobian. Right where cells do not mix, so not for batch
    normalisation in training mode.
    """
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        log_rates = network(z)
        weights = torch.zeros_like(log_rates, requires_grad=True)
        (pulled,) = torch.autograd.grad(log_rates, z, weights, create_graph=True)
        columns = [
            torch.autograd.grad(column.sum(), weights, retain_graph=True)[0]
            for column in pulled.unbind(1)
        ]
    return torch.stack(columns, dim=1)


def _log_rates(model: SMSVAE) -> nn.Module:
    """Return the decoder up to the log rates, as a frozen copy in evaluation mode."""
    network = nn.Sequential(*model.decoder, model.genes, nn.LogSoftmax(-1))
    return copy.deepcopy(network).eval().requires_grad_(False)


def _integrator(
    model: SMSVAE, baseline: Float[Tensor, " latent"], n_steps: int
) -> Callable[[Tensor], Float[Tensor, "cell latent gene"]]:
    """Return the function from latents to their attributions.

    captum differentiates one gene at a time, backwards. The Jacobian has all of them at once, and
    its rule of integration takes gradients of any shape that multiplies the inputs'.
    """
    with warnings.catch_warnings():  # tqdm's, of notebooks without widgets
        warnings.filterwarnings("ignore", message="IProgress not found")
        with from_extra("data"):
            from captum.attr import IntegratedGradients

    if baseline.shape != (model.n_latent,):
        raise ValueError(
            f"baseline has shape {tuple(baseline.shape)}; expected ({model.n_latent},), the "
            "latents of one cell or their mean"
        )
    slopes = _slopes_of(model)
    method = IntegratedGradients(_log_rates(model))
    method.gradient_func = lambda forward_fn, inputs, **_: (slopes(inputs[0].detach()[..., 0]),)
    start = baseline.detach().reshape(1, -1, 1)
    return lambda z: method.attribute(z.detach()[..., None], start, n_steps=n_steps).detach()


def _control_mean(codes: Float[Tensor, "cell latent"], cells: Cells) -> Float[Tensor, " latent"]:
    control = cells.condition == 0
    if not bool(control.any()):
        raise ValueError(
            f"none of the {len(cells)} cells is a control (condition 0), whose mean latent would "
            "be the baseline; pass cells with controls among them, or baseline=..."
        )
    return codes[control.to(codes.device)].mean(0)


def _averaged(
    blocks: Iterable[Float[Tensor, "cell latent gene"]], genes: tuple[str, ...]
) -> Programs:
    """Return mean and standard deviation over the cells of all blocks."""
    n_cells, total, squares = 0, 0.0, 0.0
    for block in blocks:
        values = block.double()
        n_cells += len(values)
        total = total + values.sum(0)
        squares = squares + values.square().sum(0)
    mean = total / n_cells
    spread = (squares / n_cells - mean.square()).clamp(min=0.0).sqrt()
    return Programs(mean.cpu().numpy(), genes, spread.cpu().numpy())


def _checked_genes(model: SMSVAE, cells: Cells, genes: Sequence[str]) -> tuple[str, ...]:
    if isinstance(genes, Set):
        raise ValueError(
            f"genes is a {type(genes).__name__}, which has no order; expected a sequence in the "
            "order of the columns, such as adata.var_names"
        )
    if len(cells) == 0 or len(genes) != model.n_genes or cells.n_genes != model.n_genes:
        raise ValueError(
            f"got {len(cells)} cells of {cells.n_genes} genes and {len(genes)} names; expected at "
            f"least one cell, and counts and a name for each of the model's {model.n_genes} genes"
        )
    _refuse_repeated_genes(genes)
    return tuple(genes)


def _refuse_repeated_genes(genes: Sequence[str]) -> None:
    if len(set(genes)) < len(genes):
        repeated = sorted({gene for gene in genes if list(genes).count(gene) > 1})
        raise ValueError(
            f"genes repeat: {repeated[:5]}; expected different names "
            "(adata.var_names_make_unique() makes them so)"
        )


# ------------------------------------------------------------------------------- sets of genes


def read_gmt(path: str | os.PathLike[str]) -> dict[str, tuple[str, ...]]:
    """Read gene sets from a GMT file: name, description and genes, a set per line, between tabs.

    Parameters
    ----------
    path : path
        UTF-8 text. Blank lines and tabs at the end of a line are passed over.

    Returns
    -------
    dict of tuple of str
        Name to genes, in the file's order; a gene that repeats within a set counts once. The
        descriptions are dropped.

    Raises
    ------
    ValueError
        If the file is compressed, not text or without sets, or a line has no genes, an empty name
        or gene, a weight, a control character, or the name of an earlier set; with its number.
    """
    sets: dict[str, tuple[str, ...]] = {}
    lines: dict[str, int] = {}
    for number, line in enumerate(_text(Path(path)).split("\n"), start=1):
        if not line.strip():
            continue
        name, genes = _gene_set(line.rstrip(), f"{path}, line {number}")
        if name in sets:
            raise ValueError(
                f"{path}, line {number}: set {name!r} stands in line {lines[name]} already; "
                "expected a name of its own for every set"
            )
        sets[name], lines[name] = genes, number
    if not sets:
        raise ValueError(
            f"{path} holds no gene sets; expected one per line. Is it the right file?"
        )
    return sets


def _text(path: Path) -> str:
    content = path.read_bytes()
    if content.startswith(b"\x1f\x8b"):
        raise ValueError(f"{path} is compressed by gzip; decompress it first (gunzip)")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}, line {number}: byte {content[error.start]:#04x} is not UTF-8; expected a "
            "text file of gene sets (.gmt)"
        ) from error


def _gene_set(line: str, where: str) -> tuple[str, tuple[str, ...]]:
    """Return name and genes of a line of a GMT file."""
    name, *rest = (field.strip() for field in line.split("\t"))
    genes = rest[1:]
    if not genes:
        raise ValueError(
            f"{where}: {len(rest) + 1} fields between tabs; expected at least three: name, "
            f"description, genes. It starts {line[:40]!r}"
        )
    if not name or "" in genes:
        raise ValueError(
            f"{where}: field {[name, None, *genes].index('') + 1} is empty; expected a name and "
            "genes without gaps (two tabs in a row, perhaps)"
        )
    odd = [field for field in (name, *genes) if not field.isprintable()]
    odd += [gene for gene in genes if "," in gene]
    if odd:
        raise ValueError(
            f"{where}: {odd[0]!r} is no gene symbol; expected printable names without commas "
            "(weights such as 'STAT1,1.0' have to go)"
        )
    return name, tuple(dict.fromkeys(genes))


# ---------------------------------------------------------------------------------- enrichment


def enrich(
    query: Programs | Lists,
    sets: Sets,
    *,
    background: Collection[str] | None = None,
    min_size: int = 3,
    max_size: int = 500,
    n_permutations: int = 10_000,
    seed: int = 0,
) -> pd.DataFrame:
    """Test latents for gene sets, through gseapy, offline.

    Parameters
    ----------
    query : Programs or dict of str to genes
        Programs are tested as rankings of all genes, whose ends gather the set's genes or not
        (pre-ranked GSEA). Lists of genes, such as ``{latent:
        programs.top(latent, n=50)}``, are tested for too many genes of the set (hypergeometric).
    sets : dict of str to genes
        From `read_gmt`, or the paper's own (``smslib.sources.gene_lists().programs``).
    background : collection of str, optional
        The genes that were measured; needed for lists. Genes of a set outside it could not have
        been found, and do not count.
    min_size, max_size : int
        Sets with fewer or more measured genes are left out before anything is tested.
    n_permutations : int
        Of rankings. Half of them or so enrich the same end as the set, so that no p-value is
        smaller than ``2 / (n_permutations + 2)``.
    seed : int
        Of the permutations, and of the order of genes with the same weight.

    Returns
    -------
    DataFrame
        A row per query and set, most significant first: ``query`` (latent or name), ``set``,
        ``set_size`` and ``query_size`` (measured genes), ``score`` (normalised enrichment score,
        negative at the bottom of the ranking, NaN if no permutation enriches that end; odds ratio
        for lists), ``p_value``, ``q_value``
        (Benjamini-Hochberg over all rows) and ``genes`` (leading edge; those shared).

    Raises
    ------
    ValueError
        If there is nothing to test; if lists come without background or hold genes outside of it;
        or if no set is of the sizes.

    Notes
    -----
    Subramanian et al. (2005) for rankings. gseapy's own p-values can be 0, which no permutation
    test says; here the ranking itself counts as a permutation. The paper's EnrichR
    tests against the whole genome, which calls a program enriched for whatever was measured.
    """
    import pandas as pd

    if not len(query):
        raise ValueError(
            "there is nothing to test: the query is empty; expected programs or lists"
        )
    is_ranking = isinstance(query, Programs)
    measured = _checked_background(query, background)
    tested = _tested(sets, measured, min_size, max_size)
    if is_ranking:
        options = {"min_size": 1, "max_size": len(measured), "seed": seed}
        options["permutation_num"] = n_permutations
        parts = [_ranked(query, latent, tested, options) for latent in range(len(query))]
    else:
        parts = [_overlaps(name, genes, tested, measured) for name, genes in query.items()]
    return _corrected(pd.DataFrame([row for part in parts for row in part]))


def enrich_targets(
    gates: ArrayLike,
    targets: Sequence[str],
    groups: Sets,
    *,
    threshold: float = 0.5,
) -> pd.DataFrame:
    """Test which groups of targets open the gates of which latents (Fisher's exact test).

    Parameters
    ----------
    gates : array or DataFrame, (n_targets, n_latent)
        Probabilities that a gate is open.
    targets : sequence of str, length n_targets
    groups : dict of str to targets
        Known pathways; members that were not perturbed do not count.
    threshold : float
        A gate is open above it.

    Returns
    -------
    DataFrame
        A row per latent and group, most significant first: ``latent``, ``group``, ``group_size``
        (perturbed members), ``n_open`` (targets that open the latent), ``n_shared``,
        ``odds_ratio``, ``p_value`` (one-sided: too many) and ``q_value`` (Benjamini-Hochberg over
        all rows).

    Raises
    ------
    ValueError
        If the gates do not have a row per target, or no group has a perturbed member.
    """
    import pandas as pd

    gates = np.asarray(gates)
    _check_rows(gates, targets)
    member = {name: np.isin(targets, list(genes)) for name, genes in groups.items()}
    member = {name: rows for name, rows in member.items() if rows.any()}
    if not member:
        raise ValueError(
            f"none of the {len(groups)} groups has one of the {len(targets)} targets "
            f"({', '.join(map(str, targets[:3]))}, ...); expected groups of the same names"
        )
    is_open = gates > threshold
    rows = [
        {"latent": latent, "group": name, **_fisher(is_open[:, latent], inside)}
        for latent in range(gates.shape[1])
        for name, inside in member.items()
    ]
    return _corrected(pd.DataFrame(rows))


def _fisher(is_open: np.ndarray, inside: np.ndarray) -> dict[str, float | int]:
    from scipy.stats import fisher_exact

    table = [
        [int((is_open & inside).sum()), int((is_open & ~inside).sum())],
        [int((~is_open & inside).sum()), int((~is_open & ~inside).sum())],
    ]
    test = fisher_exact(table, alternative="greater")
    counts = {"group_size": int(inside.sum()), "n_open": int(is_open.sum())}
    counts["n_shared"] = table[0][0]
    return {**counts, "odds_ratio": float(test.statistic), "p_value": float(test.pvalue)}


def _checked_background(
    query: Programs | Lists, background: Collection[str] | None
) -> frozenset[str]:
    if isinstance(query, Programs):
        return frozenset(query.genes)
    if background is None:
        raise ValueError(
            "lists of genes come without background; pass background=..., the genes that were "
            "measured (adata.var_names)"
        )
    measured = frozenset(background)
    listed = (gene for genes in query.values() for gene in sorted(genes))
    if unknown := unknown_names("gene", listed, sorted(measured)):
        raise ValueError(
            f"lists hold genes outside the background: {unknown}; expected lists drawn from the "
            "measured genes"
        )
    return measured


def _tested(
    sets: Sets, measured: frozenset[str], min_size: int, max_size: int
) -> dict[str, list[str]]:
    """Return the measured genes of the sets of a size to be tested."""
    inside = {name: sorted(measured.intersection(genes)) for name, genes in sets.items()}
    largest = min(max_size, len(measured) - 1)
    kept = {name: genes for name, genes in inside.items() if min_size <= len(genes) <= largest}
    if not kept:
        sizes = sorted(map(len, inside.values()))[-3:]
        raise ValueError(
            f"none of {len(sets)} gene sets has {min_size} to {largest} of the {len(measured)} "
            f"measured genes (the largest have {sizes}); expected symbols of the same kind, such "
            f"as {sorted(measured)[:3]}, or pass a smaller min_size"
        )
    return kept


def _overlaps(
    name: str | int, genes: Collection[str], sets: Mapping[str, list[str]], measured: frozenset
) -> list[dict[str, Any]]:
    """Return a row per set, those without a shared gene included: they were tested too."""
    from gseapy.stats import calc_pvalues

    columns = list(calc_pvalues(set(genes), dict(sets), background=set(measured)))
    found = dict(zip(columns[0], zip(*columns[1:], strict=True), strict=True)) if columns else {}
    rows = []
    for key, members in sets.items():
        p_value, odds, _, _, shared = found.get(key, (1.0, 0.0, 0, 0, ()))
        row = {"query": name, "set": key, "set_size": len(members), "query_size": len(set(genes))}
        row |= {"score": float(odds), "p_value": float(p_value)}
        rows.append({**row, "genes": tuple(sorted(shared))})
    return rows


def _ranked(
    programs: Programs, latent: int, sets: Mapping[str, list[str]], options: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Return a row per set of the ranking of one latent; p is 1 if the latent moves nothing."""
    common = {"query": latent, "query_size": len(programs.genes)}
    sizes = {key: {**common, "set": key, "set_size": len(sets[key])} for key in sets}
    weights = programs.weights[latent]
    if np.ptp(weights) == 0:
        nothing = {"score": 0.0, "p_value": 1.0, "genes": ()}
        return [{**size, **nothing} for size in sizes.values()]
    table = _prerank(dict(zip(programs.genes, weights.tolist(), strict=True)), sets, options)
    rows = []
    for key, score, share, lead in zip(*table, strict=True):
        found = _against_its_end(float(score), float(share), options["permutation_num"])
        rows.append({**sizes[key], **found, "genes": tuple(lead.split(";"))})
    return rows


def _against_its_end(score: float, share: float, n_permutations: int) -> dict[str, float]:
    """Return score and p-value, the ranking itself counted among the permutations of its end.

    gseapy says p = 1 with a score of one if no permutation enriches that end, as in rankings
    that are skewed; then the set is further out than all of them.
    """
    if share == 1.0 and abs(score) == 1.0:
        score, share = math.nan, 0.0
    half = n_permutations / 2  # those that enrich the same end, more or less
    return {"score": score, "p_value": (share * half + 1) / (half + 1)}


def _prerank(
    weights: Mapping[str, float], sets: Mapping[str, list[str]], options: Mapping[str, int]
) -> list[list[Any]]:
    """Return the columns set, score, share of permutations and leading edge, from gseapy.

    Its ``method="multilevel"`` would resolve smaller p-values, but panics on tied weights (1.3.1).
    """
    import pandas as pd

    with from_extra("data"):
        import gseapy

    # Ties by lot, as in gseapy, but in silence; by name, families of genes would stand together.
    genes = sorted(weights)
    place = np.random.default_rng(options["seed"]).permutation(len(genes))
    lot = dict(zip(genes, place.tolist(), strict=True))
    order = sorted(genes, key=lambda gene: (-weights[gene], lot[gene]))
    ranking = pd.Series({gene: weights[gene] for gene in order}, name="weight")
    quiet = {"outdir": None, "no_plot": True, "threads": 1, "ascending": None}
    with contextlib.redirect_stderr(io.StringIO()):
        test = gseapy.prerank(ranking, dict(sets), **quiet, **options)
    return [test.res2d[name].tolist() for name in ("Term", "NES", "NOM p-val", "Lead_genes")]


def _corrected(rows: pd.DataFrame) -> pd.DataFrame:
    """Add q-values over all rows, and sort."""
    from scipy.stats import false_discovery_control

    q_value = false_discovery_control(rows["p_value"].to_numpy(dtype=float))
    rows.insert(rows.columns.get_loc("p_value") + 1, "q_value", q_value)
    return rows.sort_values("p_value", kind="stable", ignore_index=True)


# ------------------------------------------------------------------------------------- clusters


@dataclass(frozen=True, eq=False)
class Clusters:
    """A gate matrix in the order of its clusters, and what they have to do with known groups.

    Parameters
    ----------
    targets, latents : array of int
        Rows and columns in the order in which to draw them.
    labels : array of int, (n_targets,)
        Cluster of each row, from 1, in the rows' own order.
    purity : float
        Share of targets of known group whose cluster is mostly of their group.
    ari : float
        Adjusted Rand index of clusters and known groups: 1 if equal, 0 on average by chance.
    p_value : float
        Share of permutations of the known groups with an index as large.
    """

    targets: Int[np.ndarray, " target"]
    latents: Int[np.ndarray, " latent"]
    labels: Int[np.ndarray, " target"]
    purity: float
    ari: float
    p_value: float


def cluster(
    gates: Real[np.ndarray, "target latent"],
    groups: Sequence[str | None],
    *,
    n_clusters: int | None = None,
    n_permutations: int = 999,
    seed: int = 0,
) -> Clusters:
    """Cluster the targets by their gates and compare with known groups.

    Parameters
    ----------
    gates : array, (n_targets, n_latent)
        Probabilities of open gates, or shifts.
    groups : sequence of str or None, length n_targets
        Known pathway of each target; None is clustered but not scored.
    n_clusters : int, optional
        As many as there are known groups by default.
    n_permutations : int
    seed : int
        Of the permutations.

    Returns
    -------
    Clusters

    Raises
    ------
    ValueError
        If there are fewer than two targets, latents or known groups, or the gates do not have a
        row per group.

    Notes
    -----
    Ward's hierarchical clustering of rows, and of columns for their order.
    """
    gates = np.asarray(gates, dtype=float)
    _check_rows(gates, groups)
    names = sorted({group for group in groups if group is not None})
    if min(*gates.shape, len(names)) < 2:
        raise ValueError(
            f"gates have shape {gates.shape} and {len(names)} known groups; expected two or more "
            "targets, latents and groups: one alone has nothing to be told from"
        )
    rows, labels = _ward(gates, n_clusters or len(names))
    columns, _ = _ward(gates.T, 1)
    known = np.array([group is not None for group in groups])
    truth = np.array([names.index(group) for group in groups if group is not None])
    return Clusters(rows, columns, labels, *_agreement(labels[known], truth, n_permutations, seed))


def _ward(points: Matrix, n_clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the order of the tree's leaves, and the cluster of each."""
    from scipy.cluster import hierarchy

    tree = hierarchy.linkage(points, "ward", optimal_ordering=True)
    return hierarchy.leaves_list(tree), hierarchy.fcluster(tree, n_clusters, "maxclust")


def _agreement(
    labels: Int[np.ndarray, " target"],
    truth: Int[np.ndarray, " target"],
    n_permutations: int,
    seed: int,
) -> tuple[float, float, float]:
    """Return purity, adjusted Rand index and its p-value."""
    from sklearn.metrics import adjusted_rand_score

    in_cluster = np.equal.outer(np.unique(labels), labels).astype(float)
    in_group = np.equal.outer(truth, np.unique(truth)).astype(float)
    shared = in_cluster @ in_group
    rng = np.random.default_rng(seed)
    orders = (rng.permutation(len(truth)) for _ in range(n_permutations))
    # With the sizes of clusters and groups fixed, the index grows with the sum of squares.
    at_least = sum(((in_cluster @ in_group[o]) ** 2).sum() >= (shared**2).sum() for o in orders)
    purity = float(shared.max(1).sum() / len(truth))
    p_value = float((1 + at_least) / (1 + n_permutations))
    return purity, float(adjusted_rand_score(truth, labels)), p_value


def _check_rows(gates: Real[np.ndarray, "target latent"], rows: Sequence[object]) -> None:
    if np.ndim(gates) != 2 or len(gates) != len(rows):
        raise ValueError(
            f"gates have shape {np.shape(gates)}; expected ({len(rows)}, n_latent), a row per "
            "target"
        )


# ----------------------------------------------------------------------------------- recurrence


class _Partners(NamedTuple):
    """Which latents of another run the latents of the reference are matched with."""

    latent: Int[np.ndarray, " latent"]
    correlation: Float[np.ndarray, " latent"]


def recurrence(
    runs: Sequence[Programs] | Sequence[Matrix],
    *,
    gates: Sequence[Matrix] = (),
    targets: Sequence[str] = (),
    matched: bool = False,
    threshold: float = _ALIKE,
    often: float = _OFTEN,
    n_permutations: int = 50,
    seed: int = 0,
) -> pd.DataFrame:
    """Say for each latent of the first run in how many of the others it comes back.

    Parameters
    ----------
    runs : sequence of Programs, or of arrays, (n_targets, n_latent)
        Of models that differ by their seed; the first is the reference. Arrays are gates or
        shifts.
    gates : sequence of array, (n_targets, n_latent), optional
        Of the same runs: probabilities that gates are open.
    targets : sequence of str, optional
        Rows of ``gates``.
    matched : bool
        True takes the rows of all programs as they come, the first with the first and so on: those
        of `Programs.moved`.
    threshold : float
        The absolute correlation with its match from which on a latent counts as found again.
    often : float
        The share of the other runs in which something comes back to recur.
    n_permutations : int
        Of the genes (targets), per pair of runs, for ``null_r``.
    seed : int
        Of the permutations.

    Returns
    -------
    DataFrame
        A row per latent of the reference: ``latent``; ``share`` of the other runs that find it;
        ``median_r`` (absolute correlation with its matches); ``null_r``, the 99th percentile of
        matched correlations with permuted runs, the same in all rows; ``recurs``; and, with
        gates, ``targets``: those whose gate is open in the reference and, on the matched latent,
        in ``often`` of the other runs; ``finding``: whether the program recurs and moves with
        such a target.

    Raises
    ------
    ValueError
        If there is a single run, the runs differ in genes or targets, or the gates do not belong
        to them.

    Notes
    -----
    Latents are matched one to one by the largest sum of absolute correlations
    (`smslib.metrics.match_latents`).

    The threshold of .8 is a convention: matched programs then share two thirds of their variance.
    Nothing in the data puts it there, and another one gives other shares: between five seeds of
    the real screen matched correlations run from .35 to .89 (first to ninth decile) without a gap
    at any height, and from .33 to .91 with shuffled labels. Chance (``null_r``, .27 on that
    screen's 299 genes) is far below whatever two fits of the same cells have in common. So that a
    program recurs says nothing about perturbations by itself; its gates have to recur as well.
    Where few rows make chance as large as the threshold, nothing recurs unless it exceeds chance.
    """
    import pandas as pd

    columns = _columns(runs)
    _check_gates(columns, gates, targets)
    match = _same if matched else _best
    partners = [match(columns[0], other) for other in columns[1:]]
    null_r = _null_r(match, columns, n_permutations, seed)
    correlation = np.abs([matched.correlation for matched in partners])
    beyond_chance = correlation > null_r * (1 + 1e-9)
    share = ((correlation >= threshold) & beyond_chance).mean(0)
    table = pd.DataFrame(
        {
            "latent": range(columns[0].shape[1]),
            "share": share,
            "median_r": np.median(correlation, axis=0),
            "null_r": null_r,
            "recurs": share >= often,
        }
    )
    if not len(gates):
        return table
    return _with_targets(table, gates, targets, partners=partners, often=often)


def _with_targets(
    table: pd.DataFrame,
    gates: Sequence[Matrix],
    targets: Sequence[str],
    *,
    partners: Sequence[_Partners],
    often: float,
) -> pd.DataFrame:
    is_open = np.asarray(gates[0]) > 0.5
    elsewhere = [_aligned(other, to) > 0.5 for other, to in zip(gates[1:], partners, strict=True)]
    recurs = is_open & (np.mean(elsewhere, axis=0) >= often)
    named = [tuple(np.asarray(targets)[rows].tolist()) for rows in recurs.T]
    return table.assign(targets=named, finding=table["recurs"] & recurs.any(0))


def _aligned(gates: Real[np.ndarray, "target latent"], to: _Partners) -> np.ndarray:
    """Return the columns matched with the reference's latents; shut where there is no match."""
    return np.where(to.latent >= 0, np.asarray(gates)[:, to.latent], 0.0)


def _columns(runs: Sequence[Programs] | Sequence[Matrix]) -> list[Matrix]:
    """Return a matrix per run, latents in its columns."""
    if len(runs) < 2:
        raise ValueError(f"got {len(runs)} run(s); expected two or more seeds of the same model")
    columns = [
        run.weights.T if isinstance(run, Programs) else np.asarray(run, dtype=float)
        for run in runs
    ]
    names = {run.genes if isinstance(run, Programs) else len(run) for run in runs}
    if len(names) > 1:
        raise ValueError(
            f"runs have {sorted({len(matrix) for matrix in columns})} genes or targets, or differ "
            "in their names or order; expected the same ones in all runs"
        )
    return columns


def _check_gates(
    columns: Sequence[Matrix], gates: Sequence[Matrix], targets: Sequence[str]
) -> None:
    if not len(gates):
        return
    expected = [(len(targets), matrix.shape[1]) for matrix in columns]
    shapes = [np.shape(each) for each in gates]
    if shapes != expected:
        raise ValueError(
            f"gates have shapes {shapes}; expected {expected}: those of the same runs, a row for "
            "each of the targets"
        )


def _same(reference: Matrix, other: Matrix) -> _Partners:
    """Match the columns that stand in the same place."""
    correlation = np.diag(metrics.correlations(reference, other))
    return _Partners(np.arange(len(correlation)), correlation)


def _best(reference: Matrix, other: Matrix) -> _Partners:
    """Match one to one, by the largest sum of absolute correlations."""
    matching = metrics.match_latents(reference, other)
    latent = np.full(reference.shape[1], -1)
    correlation = np.zeros(reference.shape[1])
    latent[matching.rows], correlation[matching.rows] = matching.cols, matching.correlation
    return _Partners(latent, correlation)


def _null_r(
    match: Callable[[Matrix, Matrix], _Partners],
    columns: Sequence[Matrix],
    n_permutations: int,
    seed: int,
) -> float:
    """Return the 99th percentile of matched |correlation| when the rows of a run are permuted."""
    reference, *others = columns
    rng = np.random.default_rng(seed)
    found = [
        np.abs(match(reference, rng.permutation(other)).correlation)
        for _ in range(n_permutations)
        for other in others
    ]
    return float(np.quantile(found, 0.99))


if __name__ == "__main__":
    from smslib import programs_study  # here, as it builds on this module

    raise SystemExit(programs_study.main())
