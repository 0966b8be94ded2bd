"""Published screens as the sVAE+ paper cut them, and how good their conditions are.

`replogle` and `norman` take the authors' files, of any size, to what `smslib.data.from_anndata`
reads (Lopez et al., CLeaR 2023); each says what every rule dropped. `quality` tells a good
condition from a bad one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import operator
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, SupportsIndex, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float

from smslib import streaming
from smslib.data import refuse_missing, summed
from smslib.names import from_extra, unknown_names
from smslib.perturbseq import CONTROL, counted, summarise
from smslib.sources import TABLE_9

if TYPE_CHECKING:
    import h5py
    import pandas as pd
    from anndata import AnnData
    from scipy import sparse

__all__ = [
    "Lists",
    "cramers_v",
    "distance_to_control",
    "ledger",
    "most_different",
    "norman",
    "pathways",
    "quality",
    "replogle",
    "variable_genes",
]

_CONTROLS = (CONTROL, "control")  # the authors' word, scPerturb's word
_PUBLISHED = {"targets": 681, "genes": 1187, "cells": 116_641}
_PUBLISHED_NORMAN = {"interventions": 212, "cells": 96_221, "controls": 8_907}
_REPLOGLE_LABELS = ("gene", "perturbation")
_NORMAN_LABELS = ("perturbation", "guide_identity", "guide_ids", "condition")
_NORMAN_GUIDES = ("guide_identity", "guide_id", "guide_ids", "guide_merged")
_HELD_OUT = 30  # interventions that the paper holds out of this screen
_NORMAN_DROPPED = {"NegCtrl1_NegCtrl0_NegCtrl1_NegCtrl0", "NegCtrl1_NegCtrl0"}
_NO_TARGET = re.compile(r"|control|ctrl|non-targeting|NegCtrl\d+")
_SYMBOLS = ("gene_name", "gene_symbol", "symbol")
_BATCHES = ("gem_group", "gemgroup", "batch", "replicate", "bio_rep")
_MITOCHONDRIAL = ("mitopercent", "percent_mito", "pct_counts_mt")
_PERCENT = "pct_counts_mt"  # always; the other names are used for shares, too


@runtime_checkable
class Lists(Protocol):
    """What `replogle` asks of the paper's lists; `smslib.sources.gene_lists` returns them."""

    @property
    def targets(self) -> Sequence[str]:
        """Perturbations to keep."""

    @property
    def genes(self) -> Sequence[str]:
        """Symbols of the genes to keep."""

    @property
    def pathways(self) -> Mapping[str, Sequence[str]]:
        """Groups of targets to hold out, by name."""


def _index(group: h5py.Group) -> np.ndarray:
    return np.asarray(streaming.column(group, streaming.index_name(group)))


def _labels(
    file: h5py.File, key: str | None, candidates: Sequence[str]
) -> tuple[str, pd.Categorical]:
    """Return name and values of the label column: ``key``, or the first candidate there is."""
    import pandas as pd

    known = streaming.columns(file["obs"])
    found = next((name for name in ([key] if key else candidates) if name in known), None)
    if found is None:
        wanted = [key] if key else candidates
        raise KeyError(
            f"{unknown_names('column of obs', wanted, known)}; pass key= (--key COLUMN)"
        )
    values = pd.Series(streaming.column(file["obs"], found), dtype="category")
    return found, pd.Categorical(values.cat.rename_categories(values.cat.categories.astype(str)))


# -------------------------------------------------------------------------------------- ledger


def ledger(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Return what each rule of a preparation dropped.

    Parameters
    ----------
    path : path
        A file that `replogle` or `norman` wrote.

    Returns
    -------
    DataFrame
        One row per rule: cells, genes and conditions (the control counts as one) before and after,
        and a note.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such file, or it holds no ledger.
    """
    from anndata.io import read_elem

    with streaming.opened(Path(path)) as file:
        if "ledger" not in file.get("uns", ()):
            raise ValueError(
                f"{path} holds no ledger; expected a file written by prepare.replogle or "
                "prepare.norman"
            )
        return read_elem(file["uns"]["ledger"])


@dataclass(frozen=True)
class _Step:
    """What is left after a rule."""

    rule: str
    cells: int
    genes: int
    conditions: int
    note: str = ""


def _table(start: _Step, *steps: _Step) -> pd.DataFrame:
    """Lay out steps as rows of before and after."""
    import pandas as pd

    rows = []
    for before, after in zip((start, *steps), steps, strict=False):
        row = {"rule": after.rule}
        for what in ("cells", "genes", "conditions"):
            row |= {f"{what}_before": getattr(before, what), f"{what}_after": getattr(after, what)}
        rows.append({**row, "note": after.note})
    return pd.DataFrame(rows).set_index("rule")


def _comparison(found: Mapping[str, int], published: Mapping[str, int]) -> str:
    """Say whether the sizes are the paper's."""
    other = [
        f"{found[name]:,} {name} instead of {size:,}"
        for name, size in published.items()
        if found[name] != size
    ]
    return f"differs from the paper: {', '.join(other)}" if other else "sizes as in the paper"


def _warn_of_difference(note: str, mark: Mapping[str, Any]) -> None:
    """Warn where a real file gives other sizes than the paper's; a simulated one may."""
    if "differs" in note and not mark:
        warnings.warn(note, UserWarning, stacklevel=3)


# ------------------------------------------------------------------------------------ Replogle


def pathways(lists: Lists) -> dict[str, tuple[str, ...]]:
    """Return the groups of targets that the paper holds out in turn, each target once.

    The names are those of the authors' code. The paper's Table 9 gives its three ribosomal groups
    other names than the code (the sizes are rotated among them): `smslib.sources.TABLE_9` and
    ``uns["pathway_names"]`` of a prepared file have both.

    Parameters
    ----------
    lists : Lists
        The spliceosome lists LSM5 twice in the original.

    Returns
    -------
    dict of str to tuple of str
    """
    return {name: tuple(dict.fromkeys(group)) for name, group in lists.pathways.items()}


def replogle(
    path: str | os.PathLike[str],
    *,
    lists: Lists,
    out: str | os.PathLike[str] | None = None,
    controls: SupportsIndex | str = 0,
    key: str | None = None,
    seed: int = 0,
) -> Path:
    """Cut the genome-wide screen as the sVAE+ paper did: its targets, its gene programs.

    Departures from the paper: none with ``controls=0``. It keeps no controls; a model with a
    reference condition wants some.

    Parameters
    ----------
    path : path
        ``K562_gwps_raw_singlecell_01.h5ad`` of the authors, scPerturb's copy of it, or a
        look-alike (`smslib.simulate.screen_like`).
    lists : Lists
        Targets, gene symbols and pathways, as `smslib.sources.gene_lists` returns them.
    out : path, optional
        By default ``<name>-prepared.h5ad`` beside the source.
    controls : int or "all"
        How many control cells to keep; drawn at random, without replacement.
    key : str, optional
        Column of ``obs`` with the perturbed gene; by default ``gene`` or ``perturbation``.
    seed : int
        Of the draw of controls.

    Returns
    -------
    Path
        An .h5ad with ``obs["target"]`` (controls are ``"non-targeting"``), ``var["symbol"]``,
        ``uns["source"]``, ``uns["ledger"]``, ``uns["pathways"]`` and ``uns["pathway_names"]``. A
        symbol that names two columns keeps both, under unique names.

    Raises
    ------
    KeyError
        If the label column is missing, or targets or genes are (up to a hundred are listed, with
        the nearest names).
    ValueError
        If controls are asked for and there are not as many; otherwise as in `cut`.
    FileNotFoundError, FileExistsError, OSError
        As in `cut`.

    Warns
    -----
    UserWarning
        If the result has other sizes than the paper's and the file is not marked as simulated.
    """
    import pandas as pd

    path = Path(path)
    out = streaming.absent(out or path.with_name(f"{path.stem}-prepared.h5ad"))
    with streaming.opened(path) as file:
        key, labels = _labels(file, key, _REPLOGLE_LABELS)
        symbols, mark = _symbols(file), streaming.simulated(file)
    _refuse_unknown("perturbation", lists.targets, labels.categories)
    _refuse_unknown("gene", lists.genes, symbols)
    wanted = np.asarray(labels.isin(list(lists.targets)))
    control = next((word for word in _CONTROLS if word in labels.categories), None)
    kept = wanted | _drawn(labels, control, controls, seed)
    genes = pd.Index(symbols).isin(list(lists.genes))
    table = _replogle_ledger(labels, wanted, kept, symbols, genes)
    _warn_of_difference(table["note"].iloc[-1], mark)
    with streaming.opened(path) as file:
        obs = streaming.annotations(file["obs"], np.flatnonzero(kept))
        var = _named(streaming.annotations(file["var"], np.flatnonzero(genes)), symbols[genes])
    obs["target"] = _targets(labels[kept], control)
    groups = pathways(lists)
    uns = {
        "source": _origin(path, key, seed),
        "ledger": table,
        "pathways": {name: np.array(group, dtype=object) for name, group in groups.items()},
        "pathway_names": {name: TABLE_9[name] for name in groups if name in TABLE_9},
    }
    return streaming.cut(path, cells=kept, genes=genes, out=out, obs=obs, var=var, uns=uns)


def _symbols(file: h5py.File) -> Any:  # noqa: ANN401 (array of str)
    """Return each column's gene symbol; scPerturb marks repeated ones by their Ensembl id."""
    var = file["var"]
    known = streaming.columns(var)
    name = next((name for name in _SYMBOLS if name in known), streaming.index_name(var))
    return np.array(
        [re.sub(r"_ENSG\d+$", "", str(s)) for s in streaming.column(var, name)], dtype=object
    )


def _refuse_unknown(what: str, wanted: Iterable[str], known: Iterable[str]) -> None:
    if unknown := unknown_names(what, wanted, map(str, known)):
        raise KeyError(unknown)


def _drawn(
    labels: pd.Categorical, control: str | None, number: SupportsIndex | str, seed: int
) -> Bool[np.ndarray, " cell"]:
    """Draw some or all controls."""
    number = _number(number)
    there = np.flatnonzero(np.asarray(labels == control)) if control else np.array([], dtype=int)
    if number != 0 and control is None:
        raise ValueError(
            f"controls={number!r}, but no cell is labelled {' or '.join(map(repr, _CONTROLS))}; "
            "the labels are other ones (pass key=, or --key), or the file has no controls (pass 0)"
        )
    number = len(there) if number == "all" else number
    if not 0 <= number <= len(there):
        raise ValueError(
            f"{number:,} controls are asked for, but there are {len(there):,}; pass at most that "
            "many, or 'all'"
        )
    drawn = np.zeros(len(labels), dtype=bool)
    drawn[np.random.default_rng(seed).choice(there, number, replace=False)] = True
    return drawn


def _number(controls: SupportsIndex | str) -> int | str:
    """Return how many controls to keep, as a plain integer unless it is all."""
    if controls == "all":
        return "all"
    with contextlib.suppress(TypeError):
        if not isinstance(controls, bool):
            return operator.index(controls)
    raise ValueError(f"controls is {controls!r}; expected a number or 'all'")


def _replogle_ledger(
    labels: pd.Categorical,
    wanted: np.ndarray,
    kept: np.ndarray,
    symbols: np.ndarray,
    genes: np.ndarray,
) -> pd.DataFrame:
    """Count what targets, controls and genes leave."""
    names, times = np.unique(symbols[genes].astype(str), return_counts=True)
    twice = names[times > 1].tolist()
    n_targets = len(np.unique(labels.codes[wanted]))
    n_kept = len(np.unique(labels.codes[kept]))
    sizes = {"targets": n_targets, "genes": int(genes.sum()), "cells": int(wanted.sum())}
    start = _Step("", len(labels), len(symbols), len(labels.categories))
    return _table(
        start,
        _Step("target is in the paper's list", sizes["cells"], start.genes, n_targets),
        _Step("controls drawn", int(kept.sum()), start.genes, n_kept),
        _Step(
            "gene is in a program of the paper",
            int(kept.sum()),
            sizes["genes"],
            n_kept,
            f"symbols of several columns, all kept: {twice or 'none'}",
        ),
        _Step(
            "compared with the paper",
            int(kept.sum()),
            sizes["genes"],
            n_kept,
            _comparison(sizes, _PUBLISHED),
        ),
    )


def _named(var: pd.DataFrame, symbols: np.ndarray) -> pd.DataFrame:
    """Name genes by unique symbols, and keep the names that the source gave them."""
    import pandas as pd

    named = var.assign(symbol=symbols.astype(str), source_name=var.index.astype(str))
    return named.set_index(pd.Index(symbols.astype(str)))


def _targets(labels: pd.Categorical, control: str | None) -> pd.Categorical:
    """Return the labels of the cells kept, controls under the package's name."""
    used = labels.remove_unused_categories()
    names = {control: CONTROL} if control in used.categories else {}
    return used.rename_categories(names)


def _origin(path: Path, key: str, seed: int) -> dict[str, Any]:
    size = path.stat().st_size
    return {"file": path.name, "bytes": size, "label": key, "seed": seed}


# -------------------------------------------------------------------------------------- Norman


def norman(
    path: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    combinations: str = "labels",
    n_genes: int = 3000,
    key: str | None = None,
    seed: int = 0,
) -> Path:
    """Cut the CRISPRa screen of Norman et al. (2019) as the sVAE+ paper did.

    All control constructs become one condition, without the cells of one construct that the
    screen's authors set aside; genes are scanpy's most variable (see `variable_genes`: the paper
    does not name a flavour); and the interventions farthest from the controls are named for
    holding out (`most_different`).

    Parameters
    ----------
    path : path
        scPerturb's ``NormanWeissman2019_filtered.h5ad``, or another file of raw UMIs whose labels
        are gene symbols or constructs joined by ``_`` or ``+``.
    out : path, optional
        By default ``<name>-prepared.h5ad`` beside the source.
    combinations : "labels" or "sum"
        A cell with two targets is of condition ``A_B``, one more target of its own (as published),
        or ``A+B``, which `smslib.data.from_anndata` reads as the sum of A and B.
    n_genes : int
        How many variable genes to keep.
    key : str, optional
        Column of ``obs`` with the label; by default the first of ``perturbation``,
        ``guide_identity``, ``guide_ids`` and ``condition``.
    seed : int
        Of the cells that `most_different` compares.

    Returns
    -------
    Path
        An .h5ad with ``obs["target"]`` (controls are ``"non-targeting"``), ``uns["source"]``,
        ``uns["ledger"]`` and ``uns["held_out"]`` (the 30 interventions to hold out, or all if
        there are fewer).

    Raises
    ------
    KeyError
        If there is no label column; the nearest names are listed.
    ValueError
        If ``combinations`` is neither, no cell is a control, or there are fewer genes that vary;
        otherwise as in `cut`.
    FileNotFoundError, FileExistsError, OSError
        As in `cut`.

    Warns
    -----
    UserWarning
        If the result has other sizes than the paper's and the file is not marked as simulated.
    """
    if combinations not in ("labels", "sum"):
        raise ValueError(f"combinations is {combinations!r}; expected 'labels' or 'sum'")
    path = Path(path)
    out = streaming.absent(out or path.with_name(f"{path.stem}-prepared.h5ad"))
    with streaming.opened(path) as file:
        key, labels = _labels(file, key, _NORMAN_LABELS)
        kept, mark = ~_set_aside(file) & (labels.codes >= 0), streaming.simulated(file)
    target = _conditions(labels, combinations)
    _check_has_control(target[kept], labels, key)
    steps = out.with_name(f"{out.name}.steps")
    whole = _all_genes(path, kept, steps)
    genes = variable_genes(whole, n_genes)
    table = _norman_ledger(labels, target, kept, genes)
    uns = {"source": {**_origin(path, key, seed), "combinations": combinations}, "ledger": table}
    draft = _with_targets(whole, steps / "prepared.h5ad", target[kept], genes, uns)
    _name_held_out(draft, seed)
    os.replace(draft, out)
    shutil.rmtree(steps)
    _warn_of_difference(table["note"].iloc[-1], mark)
    return out


def _set_aside(file: h5py.File) -> Bool[np.ndarray, " cell"]:
    """Say which cells carry the control construct that the screen's authors set aside."""
    known = streaming.columns(file["obs"])
    aside = np.zeros(len(_index(file["obs"])), dtype=bool)
    for name in set(_NORMAN_GUIDES) & set(known):
        guides = _labels(file, name, ())[1]
        named = [re.sub("_+", "_", guide) in _NORMAN_DROPPED for guide in guides.categories]
        aside |= np.append(named, False)[guides.codes]  # a missing guide has code -1
    return aside


def _conditions(labels: pd.Categorical, combinations: str) -> np.ndarray:
    """Return each cell's condition; a missing label gives an empty one."""
    sep = "+" if combinations == "sum" else "_"
    names = [sep.join(_targets_of(label)) or CONTROL for label in labels.categories]
    return np.array([*names, ""], dtype=object)[labels.codes]


def _targets_of(label: str) -> list[str]:
    """Return the genes in a label such as ``KLF1_NegCtrl0__KLF1_NegCtrl0`` or ``CEBPE+KLF1``."""
    parts = re.split(r"[_+]", label.split("__")[0])
    return sorted({part for part in parts if not _NO_TARGET.fullmatch(part)})


def _check_has_control(target: np.ndarray, labels: pd.Categorical, key: str) -> None:
    if CONTROL not in target:
        raise ValueError(
            f"no cell of obs[{key!r}] is a control; its labels begin with "
            f"{labels.categories[:5].tolist()}, expected some 'control' or 'NegCtrl...'; pass "
            "key= (--key COLUMN)"
        )


def _all_genes(path: Path, kept: np.ndarray, folder: Path) -> Path:
    """Cut the cells out with all genes, or return what a killed call has cut already."""
    with streaming.opened(path) as file:
        genes = np.arange(len(_index(file["var"])))
    told = json.dumps(streaming.fingerprint(path, np.flatnonzero(kept), genes, streaming.BLOCK))
    whole = folder / f"{hashlib.sha256(told.encode()).hexdigest()[:16]}.h5ad"
    return whole if whole.exists() else streaming.cut(path, cells=kept, genes=genes, out=whole)


def _with_targets(
    whole: Path, out: Path, target: np.ndarray, genes: np.ndarray, uns: Mapping[str, Any]
) -> Path:
    """Cut the variable genes out and label the cells."""
    import pandas as pd

    out.unlink(missing_ok=True)  # of a killed call
    every = np.arange(len(target))
    with streaming.opened(whole) as file:
        obs = streaming.annotations(file["obs"], every).assign(target=pd.Categorical(target))
    return streaming.cut(whole, cells=every, genes=genes, out=out, obs=obs, uns=uns)


def _name_held_out(path: Path, seed: int) -> None:
    """Store the interventions to hold out in the file."""
    import anndata
    import h5py

    screen = anndata.read_h5ad(path)
    number = min(_HELD_OUT, screen.obs["target"].nunique() - 1)
    names = most_different(screen, number, seed=seed)
    with h5py.File(path, "r+") as file:
        anndata.io.write_elem(file["uns"], "held_out", np.array(names, dtype=object))


def _norman_ledger(
    labels: pd.Categorical, target: np.ndarray, kept: np.ndarray, genes: np.ndarray
) -> pd.DataFrame:
    """Count what guides, merging and variability leave."""
    n_cells, n_conditions = int(kept.sum()), len(set(target[kept]))
    n_controls = int((target[kept] == CONTROL).sum())
    sizes = {
        "interventions": n_conditions - 1,
        "cells": n_cells - n_controls,
        "controls": n_controls,
    }
    labelled, before = labels.codes >= 0, len(labels.categories)
    left = len(np.unique(labels.codes[kept]))
    chosen, flavour = int(genes.sum()), "scanpy's flavour 'seurat' on counts per 10,000"
    return _table(
        _Step("", len(labels), len(genes), before),
        _Step("cell is labelled", int(labelled.sum()), len(genes), before),
        _Step("control construct not set aside by the authors", n_cells, len(genes), left),
        _Step("controls merged, order of targets ignored", n_cells, len(genes), n_conditions),
        _Step("gene is among the most variable", n_cells, chosen, n_conditions, flavour),
        _Step(
            "compared with the paper",
            n_cells,
            chosen,
            n_conditions,
            _comparison(sizes, _PUBLISHED_NORMAN),
        ),
    )


def variable_genes(
    path: str | os.PathLike[str], n_genes: int = 3000, *, block: int = streaming.BLOCK
) -> Bool[np.ndarray, " gene"]:
    """Choose the most variable genes as scanpy does, without holding the screen in memory.

    The choice is that of ``scanpy.pp.highly_variable_genes(flavor="seurat")`` on log1p of counts
    per 10,000: a gene's log dispersion (variance over mean, of counts per 10,000) against those of
    the genes of similar mean, in 20 bins (Satija et al. 2015).

    Parameters
    ----------
    path : path
        An .h5ad of raw UMIs that `cut` wrote.
    n_genes : int
        How many; more if the last are tied.
    block : int
        Bytes of the file read at a time.

    Returns
    -------
    array of bool, (n_genes_in_file,)

    Raises
    ------
    ValueError
        If fewer genes vary, or the file is not CSR.
    FileNotFoundError
        If there is no such file.
    """
    score = _dispersion(*_moments(Path(path), block))
    varying = np.sort(score[np.isfinite(score)])
    if not 0 < n_genes <= len(varying):
        raise ValueError(
            f"n_genes is {n_genes:,}, but {len(varying):,} of {len(score):,} genes vary; ask for "
            "1 to that many"
        )
    return np.nan_to_num(score, nan=-np.inf) >= varying[-n_genes]


def _moments(path: Path, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and variance of each gene's UMIs per 10,000 of its cell."""
    n_cells, sums = 0, 0.0
    for rows in streaming.row_blocks(path, block=block):
        total = np.asarray(rows.sum(axis=1), dtype=float).ravel()
        share = rows.data * np.repeat(1e4 / np.maximum(total, 1), np.diff(rows.indptr))
        powers = [np.bincount(rows.indices, share**k, rows.shape[1]) for k in (1, 2)]
        n_cells, sums = n_cells + rows.shape[0], sums + np.stack(powers)
    mean, square = sums / n_cells
    return mean, (square - mean**2) * n_cells / max(n_cells - 1, 1)


def _dispersion(mean: np.ndarray, variance: np.ndarray) -> Float[np.ndarray, " gene"]:
    """Return log dispersions, standardised among genes of similar mean; NaN for none."""
    import pandas as pd

    with np.errstate(divide="ignore", invalid="ignore"):
        log = np.log(variance / mean)
    log[~np.isfinite(log)] = np.nan
    frame = pd.DataFrame({"log": log, "bin": pd.cut(np.log1p(mean), bins=20)})
    groups = frame.groupby("bin", observed=True)["log"]
    centre, spread = groups.transform("mean"), groups.transform("std")
    alone = spread.isna()  # scanpy gives a gene that is alone in its bin a score of 1
    return ((log - centre.mask(alone, 0.0)) / spread.mask(alone, centre)).to_numpy()


def most_different(
    adata: AnnData,
    n: int = _HELD_OUT,
    *,
    key: str = "target",
    control: str | int = CONTROL,
    seed: int = 0,
    layer: str | None = None,
) -> tuple[str, ...]:
    """Return the interventions farthest from the controls: those that the paper holds out.

    Parameters
    ----------
    adata : AnnData, (n_cells, n_genes)
        Raw UMIs.
    n : int
        How many.
    key, control, seed, layer
        As in `distance_to_control`.

    Returns
    -------
    tuple of str
        From the farthest on.

    Raises
    ------
    ValueError
        If there are not as many interventions; otherwise as in `distance_to_control`.
    KeyError
        As in `distance_to_control`.
    """
    distance = distance_to_control(adata, key=key, control=control, seed=seed, layer=layer)
    if not 0 < n <= len(distance):
        raise ValueError(f"n is {n}, but there are {len(distance)} interventions; lower n")
    return tuple(distance.index[:n])


def distance_to_control(
    adata: AnnData,
    *,
    key: str = "target",
    control: str | int = CONTROL,
    seed: int = 0,
    components: int = 50,
    most_cells: int = 1000,
    layer: str | None = None,
) -> pd.Series:
    """Return each condition's squared MMD to the controls, linear kernel, on principal components.

    With a linear kernel that is the squared distance between two means. It is the paper's biased
    estimate: conditions of few cells come out too far (by the trace of the cells' covariance over
    their number).

    Parameters
    ----------
    adata : AnnData, (n_cells, n_genes)
        Raw UMIs, in memory; log1p of counts per 10,000 is decomposed.
    key : str
        Column of ``obs`` with each cell's condition.
    control : str or int
        The value of that column that marks the controls.
    seed : int
        Of the draw of cells.
    components : int
        Principal components; fewer if there are not as many cells or genes.
    most_cells : int
        Cells of a condition, and controls, that enter at most.
    layer : str, optional
        The layer that holds the UMIs; by default ``X``.

    Returns
    -------
    Series
        By condition, the farthest first.

    Raises
    ------
    KeyError
        If ``key`` is not a column of ``obs``, or ``layer`` does not exist.
    ValueError
        If the control is absent, labels are missing, the values are no counts, or ``adata`` is in
        a file.
    """
    import pandas as pd

    control = str(control)
    labels = _checked_labels(adata, key, control)
    scores = _principal_components(counted(adata, layer), components)
    rng = np.random.default_rng(seed)
    means = {}
    for name in sorted(set(labels)):
        cells = np.flatnonzero(labels == name)
        drawn = rng.choice(cells, min(len(cells), most_cells), replace=False)
        means[name] = scores[drawn].mean(axis=0)
    centre = means.pop(control)
    distance = pd.Series({name: ((mean - centre) ** 2).sum() for name, mean in means.items()})
    return distance.sort_values(ascending=False, kind="stable")


def _checked_labels(adata: AnnData, key: str, control: str) -> np.ndarray:
    if unknown := unknown_names("column of obs", [key], adata.obs):
        raise KeyError(unknown)
    refuse_missing(adata, key)
    labels = adata.obs[key].astype(str).to_numpy()
    if control not in labels:
        raise ValueError(
            f"no control: {unknown_names('condition', [control], np.unique(labels))}; pass "
            "control=, or prepare the screen with controls"
        )
    return labels


def _principal_components(
    counts: np.ndarray | sparse.csr_matrix, number: int
) -> Float[np.ndarray, "cell component"]:
    from anndata import AnnData

    with from_extra("data"):
        import scanpy

    work = AnnData(counts.astype(np.float32))
    scanpy.pp.normalize_total(work, target_sum=1e4)
    scanpy.pp.log1p(work)
    scanpy.pp.pca(work, n_comps=min(number, min(work.shape) - 1), svd_solver="arpack")
    return work.obsm["X_pca"]


# ------------------------------------------------------------------------------------- quality


def quality(
    adata: AnnData,
    *,
    key: str = "target",
    control: str | int = CONTROL,
    batch: str | None = None,
    layer: str | None = None,
) -> pd.DataFrame:
    """Return what tells a good condition from a bad one, condition by condition.

    `smslib.perturbseq.summarise` and, beside it, genes detected, mitochondrial share, an interval
    of the knock-down, clarity of the guides, and how the cells spread over batches.

    Parameters
    ----------
    adata : AnnData, (n_cells, n_genes)
        Raw UMIs, sparse or dense, in memory.
    key : str
        Column of ``obs`` with the target or condition of each cell.
    control : str or int
        The value of that column that marks the controls.
    batch : str, optional
        Column of ``obs`` with the batch; by default the first of ``gem_group``, ``gemgroup``,
        ``batch``, ``replicate`` and ``bio_rep``.
    layer : str, optional
        The layer that holds the UMIs; by default ``X``.

    Returns
    -------
    DataFrame
        The control first, then conditions from most cells to fewest. The columns of `summarise`;
        ``median_genes`` detected; ``mitochondrial``, the median share of UMIs (NaN if neither
        ``obs`` nor genes named ``MT-`` tell; a column of ``obs`` is taken for percentages if it is
        scanpy's ``pct_counts_mt`` or exceeds 1); ``own_gene_low`` and ``own_gene_high``, a 95 %
        interval of ``own_gene_ratio`` (cells as the units, but never narrower than of as many
        Poisson counts, as few cells hardly differ; the exact Poisson limit where no UMI is left);
        ``ambiguous``, the share of cells whose top guide holds under 80 % of the guide
        UMIs (NaN without guides); ``batches`` and ``batch_v``, how many batches have its cells and
        Cramer's V of being of the condition and batch. ``attrs["cramers_v"]`` is V of all
        conditions and batch.

    Raises
    ------
    KeyError
        If a column is missing, or ``layer`` does not exist.
    ValueError
        If the control is absent, labels are missing, the values are no counts, or ``adata`` is in
        a file.
    """
    from anndata import AnnData
    from scipy import sparse

    control = str(control)
    labels = _checked_labels(adata, key, control)
    frame = summarise(adata, key=key, control=control, layer=layer)
    # Genes are looked up one by one, which takes CSC.
    counts = sparse.csc_matrix(counted(adata, layer))
    light = AnnData(X=counts, obs=adata.obs, var=adata.var[[]])
    groups = adata.obs.assign(
        median_genes=np.asarray((light.X > 0).sum(axis=1)).ravel(),
        mitochondrial=_mitochondrial(light),
        ambiguous=_ambiguous(adata),
    ).groupby(labels)
    frame["median_genes"] = groups["median_genes"].median()
    frame["mitochondrial"] = groups["mitochondrial"].median()
    frame["ambiguous"] = groups["ambiguous"].mean()
    frame = frame.join(_knock_down_interval(light, labels, control))
    return _with_batches(frame, adata, labels, batch)


def _mitochondrial(adata: AnnData) -> np.ndarray | float:
    """Return each cell's share of mitochondrial UMIs: as annotated, else as counted."""
    annotated = next((name for name in _MITOCHONDRIAL if name in adata.obs), None)
    if annotated:
        share = adata.obs[annotated].to_numpy(dtype=float)
        return share / 100 if annotated == _PERCENT or np.nanmax(share) > 1 else share
    genes = np.asarray(adata.var_names.str.upper().str.startswith("MT-"))
    if not genes.any():
        return np.nan
    umis, total = adata.X[:, genes].sum(axis=1), adata.X.sum(axis=1)
    return np.asarray(umis, dtype=float).ravel() / np.maximum(np.asarray(total).ravel(), 1)


def _ambiguous(adata: AnnData, threshold: float = 0.8) -> np.ndarray | float:
    """Say in which cells no guide holds ``threshold`` of the guide UMIs."""
    from scipy import sparse

    if "guide_share" in adata.obs:
        return (adata.obs["guide_share"] < threshold).to_numpy(dtype=float)
    if "guides" not in adata.obsm:
        return np.nan
    guides = summed(sparse.csr_matrix(adata.obsm["guides"]))
    most, total = guides.max(axis=1).toarray().ravel(), np.asarray(guides.sum(axis=1)).ravel()
    return (most < threshold * np.maximum(total, 1)).astype(float)


def _knock_down_interval(adata: AnnData, labels: np.ndarray, control: str) -> pd.DataFrame:
    """Return a 95 % interval of each target's own-gene ratio, by the delta method on its log."""
    import pandas as pd

    library = np.asarray(adata.X.sum(axis=1), dtype=float).ravel()
    base, limits = labels == control, {}
    for name in set(adata.var_names) & set(labels):
        umis = np.asarray(adata[:, name].X.sum(axis=1), dtype=float).ravel()
        own = labels == name
        limits[name] = _ratio_limits(umis[own], library[own], umis[base], library[base])
    return pd.DataFrame.from_dict(
        limits, orient="index", columns=["own_gene_low", "own_gene_high"], dtype=float
    )


def _ratio_limits(
    umis: np.ndarray, library: np.ndarray, base_umis: np.ndarray, base_library: np.ndarray
) -> tuple[float, float]:
    """Return 95 % limits of the ratio of two shares of UMIs, each a sum over cells."""
    if not base_umis.any():
        return np.nan, np.nan
    base = base_umis.sum() / base_library.sum()
    if not umis.any():
        return 0.0, -np.log(0.025) / (base * library.sum())
    error = np.hypot(_relative_error(umis, library), _relative_error(base_umis, base_library))
    ratio = umis.sum() / library.sum() / base
    return ratio * np.exp(-1.96 * error), ratio * np.exp(1.96 * error)


def _relative_error(umis: np.ndarray, library: np.ndarray) -> float:
    """Return the relative standard error of ``sum(umis) / sum(library)``, cells as units.

    It is at least that of a Poisson count: one cell, or two alike, would have none.
    """
    rest = umis - library * umis.sum() / library.sum()
    square = (rest**2).sum() * len(rest) / max(len(rest) - 1, 1)
    return float(np.sqrt(max(square, umis.sum())) / umis.sum())


def _with_batches(
    frame: pd.DataFrame, adata: AnnData, labels: np.ndarray, batch: str | None
) -> pd.DataFrame:
    """Add how conditions and batches go together."""
    import pandas as pd

    if batch is not None and (unknown := unknown_names("column of obs", [batch], adata.obs)):
        raise KeyError(unknown)
    batch = batch or next((name for name in _BATCHES if name in adata.obs), None)
    if batch is None:
        frame.attrs["cramers_v"] = np.nan
        return frame.assign(batches=np.nan, batch_v=np.nan)
    table = pd.crosstab(labels, adata.obs[batch].astype(str).to_numpy())
    rest = table.sum() - table
    v = {name: cramers_v(np.stack([table.loc[name], rest.loc[name]])) for name in table.index}
    frame = frame.assign(batches=(table > 0).sum(axis=1), batch_v=pd.Series(v))
    frame.attrs["cramers_v"] = cramers_v(table.to_numpy())
    return frame


def cramers_v(table: np.ndarray) -> float:
    """Return how closely two labellings go together: 0 not at all, 1 one tells the other.

    Corrected for the value that chance gives to many small groups (Bergsma 2013, Journal of the
    Korean Statistical Society 42:323-328).

    Parameters
    ----------
    table : array, (n_rows, n_columns)
        How many cells have each pair of labels.

    Returns
    -------
    float
        NaN if one of the labellings has one label only.

    Raises
    ------
    ValueError
        If the table is not two-dimensional, or holds no cells or negative numbers.
    """
    table = np.asarray(table, dtype=float)
    if table.ndim != 2 or (table < 0).any() or not table.sum() > 0:
        raise ValueError(
            f"a table of shape {table.shape} with sum {table.sum():g}; expected counts of cells "
            "by two labels"
        )
    table = table[table.sum(axis=1) > 0][:, table.sum(axis=0) > 0]
    n, (rows, columns) = table.sum(), table.shape
    if min(rows, columns) < 2 or n < 2:
        return float("nan")
    expected = np.outer(table.sum(axis=1), table.sum(axis=0)) / n
    chance = (rows - 1) * (columns - 1) / (n - 1)
    excess = max(0.0, ((table - expected) ** 2 / expected).sum() / n - chance)
    smaller = min(size - (size - 1) ** 2 / (n - 1) for size in (rows, columns))
    return float(np.sqrt(excess / (smaller - 1)))
