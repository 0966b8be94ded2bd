"""Real Perturb-seq screens: how to read them, and what quality control drops.

The files themselves are `smslib.sources`' work. Everything returned is AnnData, cells x genes, raw
UMIs; `smslib.data.from_anndata` takes it from there. ``python -m smslib.perturbseq`` lists,
fetches and prepares.
"""

from __future__ import annotations

import argparse
import errno
import os
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from smslib import sources, untrusted
from smslib.data import (
    Design,
    no_count,
    raw_counts,
    refuse_missing,
    summed,
    why_not_counts,
)
from smslib.names import from_extra, unknown_names
from smslib.sources import SOURCES, GeneLists, Source, available, data_dir, fetch, gene_lists

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from scipy import sparse

__all__ = [
    "CONTROL",
    "SOURCES",
    "GeneLists",
    "GeneSet",
    "Source",
    "assign_guides",
    "available",
    "counts_from_log1p",
    "data_dir",
    "fetch",
    "filter_screen",
    "gene_lists",
    "hold_out",
    "pathways",
    "read",
    "read_h5ad",
    "summarise",
]

CONTROL = "non-targeting"  # how guide-level screens name their controls

_RDA = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"RDX", b"RDA")  # gzip, bzip2, xz, not compressed
_LARGEST_UNIT = 16  # most UMIs that the smallest non-zero value of a cell may stand for


@dataclass(frozen=True)
class GeneSet:
    """Genes that belong together, and who says so.

    Parameters
    ----------
    name : str
        What `pathways` calls it.
    genes : tuple of str
        Gene symbols.
    source : str
        A reference, or how the set was measured.
    """

    name: str
    genes: tuple[str, ...]
    source: str


# ----------------------------------------------------------------------------------- readers


def read(name: str, *, directory: str | os.PathLike[str] | None = None) -> AnnData | pd.DataFrame:
    """Fetch a source and read it: a screen as AnnData of raw UMIs, a list as a table.

    Parameters
    ----------
    name : str
        A key of ``SOURCES``.
    directory : path, optional
        As in `smslib.sources.fetch`.

    Returns
    -------
    AnnData, (n_cells, n_genes)
        ``X`` is CSR int32, UMIs. ``papalexi2021``: ``obs["replicate"]``, ``obsm["guides"]``
        (cells x guides, UMIs) and ``uns["guide_target"]`` (one row per guide, in the order of
        those columns); it has no labels yet, see `assign_guides`. ``norman2019-mini``:
        ``obs["condition"]`` (``control``, ``KLF1``, ``KLF1+MAP2K6``), ``obs["cell_type"]``,
        ``obs["perturbation_type"]``, and ``obs["total"]``, the UMIs of the cell over all genes
        before the file was cut to its 500. ``papalexi2021-full``: ``obs["guide"]`` and
        ``obs["target"]``, controls ``"non-targeting"``. ``norman2019`` and ``adamson2016-*``: the
        columns of the file. ``replogle2022-*`` are too large: ``X`` stays in the file, as it is
        there; `smslib.prepare` cuts it.
    DataFrame
        ``replogle2022-gene-lists``: columns ``list``, ``name``, ``symbol``.

    Raises
    ------
    KeyError, ValueError, ConnectionError
        As in `smslib.sources.fetch`; ValueError also if the file does not hold counts.
    """
    return _READERS[sources.find(name).reader](fetch(name, directory=directory))


def read_h5ad(path: str | os.PathLike[str], *, backed: bool = False) -> AnnData:
    """Read an .h5ad file, or say what is wrong with it: cut short, no HDF5, no AnnData.

    Parameters
    ----------
    path : path
    backed : bool
        Leave ``X`` in the file, if it has one: counts may be in layers alone.

    Returns
    -------
    AnnData

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is not a whole .h5ad file; or one that points at other files, or declares far more
        than it holds (`smslib.untrusted`).
    """
    import anndata

    held = _checked_h5ad(Path(path))
    try:
        adata = anndata.read_h5ad(path, backed="r" if backed and "X" in held else None)
        if hasattr(adata.X, "check_format"):
            adata.X.check_format()  # which neither anndata nor scipy does
        return adata
    except MemoryError:
        raise
    except Exception as error:  # a bad file leads anndata to errors of all kinds
        raise ValueError(
            f"{path} is not an .h5ad file as AnnData.write_h5ad makes it "
            f"({type(error).__name__}: {error}); copy or download it again"
        ) from error


def _checked_h5ad(path: Path) -> set[str]:
    """Return what the file holds, or say why it is none."""
    import h5py

    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, "no such file; expected an .h5ad file", str(path))
    if not h5py.is_hdf5(path):
        raise ValueError(
            f"{path} begins with {_beginning(path)!r}, which is not HDF5; expected an .h5ad file"
        )
    try:
        with h5py.File(path) as file:
            held = set(file)
            untrusted.check_hdf5(file)
    except (OSError, RuntimeError, KeyError) as error:  # h5py has all of them for damage
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) is cut short or damaged ({error}); copy or "
            "download it again"
        ) from error
    if missing := {"obs", "var"} - held:
        raise ValueError(
            f"{path} has no {sorted(missing)} but {sorted(held)}; expected an .h5ad file as "
            "AnnData.write_h5ad makes it"
        )
    return held


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(16)


def _read_table(path: Path) -> pd.DataFrame:
    import pandas as pd

    # Gene symbols such as "NA" or "NAN" are names, not missing values.
    return pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)


def _read_papalexi(path: Path) -> AnnData:
    screen = _parse_rda(path)["lowmoi_example_data"]
    try:
        return _papalexi(screen)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} does not hold a screen as the published file does ({type(error).__name__}: "
            f"{error}); download it again"
        ) from error


def _papalexi(screen: Mapping[str, Any]) -> AnnData:
    from anndata import AnnData

    counts, genes = screen["response_matrix"]
    guide_counts, guides = screen["grna_matrix"]
    n_cells = {len(screen["extra_covariates"]), counts.shape[1], guide_counts.shape[1]}
    if len(n_cells) > 1:
        raise ValueError(f"the parts of the screen have {sorted(n_cells)} cells; expected as many")
    return AnnData(
        X=_umis(counts.T.tocsr(), "response_matrix"),
        obs=_numbered_cells(screen["extra_covariates"]["bio_rep"]),
        var=_named(genes, "gene"),
        obsm={"guides": _umis(guide_counts.T.tocsr(), "grna_matrix")},
        uns={"guide_target": _guide_targets(screen["grna_target_data_frame"], guides)},
    )


def _parse_rda(path: Path) -> Mapping[str, Any]:
    with from_extra("data"):
        import rdata

    if not _beginning(path).startswith(_RDA):
        raise ValueError(f"{path} begins with {_beginning(path)!r}; expected an .rda file")
    untrusted.check_packed(path)
    classes = {"dgTMatrix": _r_sparse, "dgCMatrix": _r_sparse}
    classes = {**rdata.conversion.DEFAULT_CLASS_MAP, **classes}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Unknown file type")  # and reads on regardless
            held = rdata.read_rda(path, constructor_dict=classes)
    except MemoryError:
        raise
    except Exception as error:  # bad bytes lead the parser to errors of all kinds
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) is cut short or damaged "
            f"({type(error).__name__}: {error}); copy or download it again"
        ) from error
    if "lowmoi_example_data" not in held:
        raise ValueError(f"{path} holds {sorted(held)}; expected 'lowmoi_example_data'")
    return held


def _r_sparse(
    slots: Any,  # noqa: ANN401 (an S4 object: a bag of slots)
    _attributes: Mapping[str, Any] | None = None,
) -> tuple[sparse.coo_matrix | sparse.csc_matrix, Iterable[str] | None]:
    """Turn a dgTMatrix (i, j, x) or dgCMatrix (i, p, x) of R's Matrix into scipy and row names."""
    from scipy import sparse

    shape = tuple(int(size) for size in slots.Dim)
    if hasattr(slots, "j"):
        matrix = sparse.coo_matrix((slots.x, (slots.i, slots.j)), shape=shape)
    else:
        matrix = sparse.csc_matrix((slots.x, slots.i, slots.p), shape=shape)
    return matrix, slots.Dimnames[0]


def _umis(matrix: sparse.csr_matrix, what: str) -> sparse.csr_matrix:
    """Return the matrix as int32, refusing to change a value."""
    whole = matrix.astype(np.int32)
    if (whole.data != matrix.data).any() or (whole.data < 0).any():
        raise ValueError(
            f"{what} holds values that are not counts; expected raw UMIs. Noticed: "
            f"{why_not_counts(matrix)}"
        )
    return whole


def _named(names: Iterable[str], axis: str) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(index=pd.Index([str(name) for name in names], name=axis))


def _numbered_cells(replicate: pd.Series) -> pd.DataFrame:
    """Name the cells by position, as the file gives them no barcodes."""
    frame = _named([f"cell_{number:05d}" for number in range(len(replicate))], "cell")
    return frame.assign(replicate=replicate.astype(str).astype("category").array)


def _guide_targets(table: pd.DataFrame, guides: Iterable[str]) -> pd.DataFrame:
    """Return each guide's target, in the order of the guide matrix."""
    frame = _named(guides, "guide")
    target = dict(zip(table["grna_id"].astype(str), table["grna_target"].astype(str), strict=True))
    return frame.assign(target=[target[guide] for guide in frame.index])


def _read_whole(path: Path) -> AnnData:
    """Read a file that fits into memory, as CSR int32."""
    from scipy import sparse

    stored = read_h5ad(path)
    stored.X = _umis(sparse.csr_matrix(stored.X), f"{path.name}: X")
    return stored


def _read_backed(path: Path) -> AnnData:
    return read_h5ad(path, backed=True)


def _read_papalexi_full(path: Path) -> AnnData:
    """Read scPerturb's copy, whose labels are guides (``ATF2g1``) or ``control``."""
    stored = _read_whole(path)
    guide = _column(stored, "perturbation").astype(str)
    target = guide.str.replace(r"g\d+$", "", regex=True).where(guide != "control", CONTROL)
    stored.obs = stored.obs.assign(
        guide=guide.astype("category"), target=target.astype("category")
    )
    return stored


def _read_norman(path: Path) -> AnnData:
    import anndata

    stored = read_h5ad(path)
    counts, total = counts_from_log1p(stored.X)
    obs = stored.obs.assign(total=total)
    return anndata.AnnData(X=counts, obs=obs, var=stored.var)


def counts_from_log1p(
    matrix: sparse.csr_matrix, *, scale: float = 1e4
) -> tuple[sparse.csr_matrix, Int[np.ndarray, " cell"]]:
    """Recover integer counts from ``log1p(scale * count / total)``, or refuse.

    The smallest non-zero value of a cell stands for a few UMIs, q. The right q makes every count
    and the total whole. The smallest q up to 16 that does is taken and its counts are put through
    the formula again, which must give the stored values to within 1e-9. (A factor common to all
    counts *and* the total of a cell cannot be seen, and is left out.)

    Parameters
    ----------
    matrix : CSR, (n_cells, n_genes)
        Float64; float32 has lost the digits that this needs.
    scale : float
        UMIs to which each cell was scaled.

    Returns
    -------
    counts : CSR int32, (n_cells, n_genes)
        UMIs.
    total : array, (n_cells,)
        UMIs of each cell over all genes, those that the matrix leaves out included.

    Raises
    ------
    ValueError
        If a cell is empty, or not of that form (the first such cell is named).
    """
    from scipy import sparse

    matrix = sparse.csr_matrix(matrix, copy=True)
    matrix.eliminate_zeros()
    per_cell = np.diff(matrix.indptr)
    if (per_cell == 0).any():
        raise ValueError(f"cell {int((per_cell == 0).argmax())} has no non-zero value; remove it")
    values = matrix.data.astype(np.float64)
    counts, total = _whole_numbers(values, matrix.indptr, scale)
    return sparse.csr_matrix((counts, matrix.indices, matrix.indptr), matrix.shape), total


def _whole_numbers(
    values: Float[np.ndarray, " entry"], indptr: Int[np.ndarray, " edge"], scale: float
) -> tuple[Int[np.ndarray, " entry"], Int[np.ndarray, " cell"]]:
    """Find counts and totals cell by cell, all cells at once, one candidate unit at a time."""
    cell = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    fraction = np.expm1(values) / scale
    smallest = np.minimum.reduceat(fraction, indptr[:-1])
    counts = np.zeros(len(values), dtype=np.int32)
    total = np.zeros(len(smallest), dtype=np.int64)
    for unit in range(1, _LARGEST_UNIT + 1):
        whole = np.rint(unit * fraction / smallest[cell])
        sums = np.rint(unit / smallest)
        error = np.abs(np.log1p(scale * whole / sums[cell]) - values)
        found = (np.maximum.reduceat(error, indptr[:-1]) <= 1e-9) & (total == 0)
        total[found] = sums[found]
        counts[found[cell]] = whole[found[cell]]
    if (total == 0).any():
        raise ValueError(
            f"cell {int((total == 0).argmax())} ({int((total == 0).sum())} cells in all) is not "
            f"log1p({scale:g} * count / total) of whole counts to within 1e-9; expected float64 "
            "values that were neither rounded nor altered. Start from the raw counts instead"
        )
    return counts, total


_READERS: Mapping[str, Callable[[Path], Any]] = {
    "papalexi": _read_papalexi,
    "papalexi-full": _read_papalexi_full,
    "norman": _read_norman,
    "h5ad": _read_whole,
    "backed": _read_backed,
    "table": _read_table,
}


# --------------------------------------------------------------------------- quality control


def counted(adata: AnnData, layer: str | None) -> np.ndarray | sparse.csr_matrix:
    """Return the counts of a screen, checked; cells without a UMI may be among them.

    Parameters
    ----------
    adata : AnnData, (n_cells, n_genes)
    layer : str or None
        Where they are; ``X`` if None.

    Returns
    -------
    array or CSR, (n_cells, n_genes)
        UMIs, repeated entries added up.

    Raises
    ------
    KeyError
        If there is no such layer.
    ValueError
        If ``adata`` is in a file, or `smslib.data.from_anndata` refuses the values.
    """
    _refuse_backed(adata)
    return raw_counts(adata, layer)


def _refuse_backed(adata: AnnData) -> None:
    if adata.isbacked:
        raise ValueError(
            f"X is in the file {adata.filename}; read it into memory: adata.to_memory(), or cut "
            "what you need of it with smslib.streaming.cut"
        )


def assign_guides(
    adata: AnnData, *, threshold: float = 0.8, min_umis: int = 1
) -> tuple[AnnData, pd.DataFrame]:
    """Label each cell with its most abundant guide, and drop the cells where that is unclear.

    Parameters
    ----------
    adata : AnnData
        In memory, with ``obsm["guides"]`` (cells x guides, UMIs, sparse or dense) and
        ``uns["guide_target"]``, a row for each guide: by name, if the guides are a table with
        names, else in the same order. That is a table with a column ``target``, a Series, or, if
        the guides have names, a dict of target by guide.
    threshold : float
        Smallest share of the cell's guide UMIs that its top guide must hold, in (0, 1].
    min_umis : int
        Fewest guide UMIs.

    Returns
    -------
    AnnData
        The cells kept, with ``obs["guide"]``, ``obs["target"]`` (controls stay
        ``"non-targeting"``), ``obs["guide_umis"]`` and ``obs["guide_share"]``.
    ledger : DataFrame
        One row per rule: cells, genes and targets (the control counts as one) before and after.

    Raises
    ------
    KeyError
        If the guide counts or their targets are missing; of guides without a target up to a
        hundred are listed.
    ValueError
        If the threshold is not in (0, 1], the values of the guides are no counts, there are other
        numbers of guides and targets, or targets are given in another form.
    """
    _refuse_backed(adata)
    if "guides" not in adata.obsm or "guide_target" not in adata.uns:
        raise KeyError(
            "adata has no obsm['guides'] or no uns['guide_target']; expected guide UMIs "
            "(cells x guides) and a table of each guide's target, as read('papalexi2021') gives"
        )
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}; expected a share in (0, 1]")
    target = _target_by_guide(adata.uns["guide_target"], adata.obsm["guides"])
    labelled = adata.copy()
    labelled.obsm["guides"] = _guide_umis(adata.obsm["guides"], target.index)
    labelled.obs = labelled.obs.assign(**_top_guides(labelled.obsm["guides"], target))
    fewest = max(min_umis, 1)
    rules = (
        (f"at least {fewest} guide UMIs", lambda a: a[a.obs["guide_umis"] >= fewest]),
        (
            f"top guide holds {threshold:.0%} of the guide UMIs",
            lambda a: a[a.obs["guide_share"] >= threshold],
        ),
        ("no second guide with as many UMIs", lambda a: a[_unique_top(a.obsm["guides"])]),
    )
    return _filtered(labelled, rules, key="target")


def _target_by_guide(given: Any, guides: Any) -> pd.Series:  # noqa: ANN401 (uns's, obsm's)
    """Return each guide's target; whatever has no names is in the order of the guides."""
    import pandas as pd

    if isinstance(given, Mapping) and hasattr(guides, "columns"):
        given = pd.Series({name: given.get(name) for name in guides.columns.astype(str)})
    if isinstance(given, pd.DataFrame) and "target" in given:
        given = given["target"]
    if not isinstance(given, pd.Series):
        raise ValueError(
            f"uns['guide_target'] is a {type(given).__name__}; expected a table with a column "
            "'target' and a row per guide, or a Series (a dict has no order that a file keeps: it "
            "wants obsm['guides'] as a DataFrame with the guides' names)"
        )
    if given.isna().any():
        raise KeyError(
            f"guides {given.index[given.isna()][:100].tolist()} have no target in "
            "uns['guide_target']; name one for each (controls: 'non-targeting')"
        )
    return given


def _guide_umis(counts: Any, guides: pd.Index) -> sparse.csr_matrix:  # noqa: ANN401 (obsm's)
    """Return the UMIs of the guides, in their order."""
    from scipy import sparse

    if counts.shape[1] != len(guides):
        raise ValueError(
            f"obsm['guides'] holds {counts.shape[1]} guides, uns['guide_target'] {len(guides)}; "
            "expected a target for each guide and no others"
        )
    counts = _in_order(counts, guides) if hasattr(counts, "columns") else counts
    counts = summed(sparse.csr_matrix(counts))
    if no_count(counts.data).any():
        raise ValueError(
            "obsm['guides'] holds values that are not counts; expected UMIs, of which the top "
            f"guide has to hold a share. Noticed: {why_not_counts(counts)}"
        )
    return counts


def _in_order(table: pd.DataFrame, guides: pd.Index) -> pd.DataFrame:
    """Return the guides' columns in the order of the guides; numbers for names are no names."""
    names, wanted = table.columns.astype(str), guides.astype(str)
    unknown = unknown_names("guide", names, wanted)
    if not unknown:
        return table.set_axis(names, axis=1).reindex(columns=wanted)
    if names.tolist() == [str(place) for place in range(len(wanted))]:
        return table
    raise KeyError(unknown)


def _top_guides(
    counts: sparse.csr_matrix, target: pd.Series
) -> dict[str, np.ndarray | pd.Categorical]:
    """Return each cell's top guide, its target, its guide UMIs and the top guide's share."""
    import pandas as pd

    top = np.asarray(counts.argmax(axis=1)).ravel()
    umis = np.asarray(counts.sum(axis=1)).ravel()
    most = counts.max(axis=1).toarray().ravel()
    return {
        "guide": pd.Categorical(target.index.to_numpy()[top]),
        "target": pd.Categorical(target.to_numpy()[top]),
        "guide_umis": umis,
        "guide_share": most / np.maximum(umis, 1),
    }


def _unique_top(counts: sparse.csr_matrix) -> Bool[np.ndarray, " cell"]:
    """Say in which cells exactly one guide has the most UMIs."""
    most = counts.max(axis=1).toarray().ravel()
    cell = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    return np.bincount(cell[counts.data == most[cell]], minlength=counts.shape[0]) <= 1


def filter_screen(
    adata: AnnData,
    *,
    min_umis: int = 1,
    min_cells: int = 1,
    min_detected: int = 1,
    key: str = "target",
    control: str | int = CONTROL,
    layer: str | None = None,
) -> tuple[AnnData, pd.DataFrame]:
    """Drop genes seen too rarely, cells with too few UMIs, and targets with too few cells.

    The rules apply in that order, once each, so that no later one undoes an earlier one but for
    the detection of genes in the cells that remain. Where cells have no label, a rule before all
    others drops them.

    Parameters
    ----------
    adata : AnnData, (n_cells, n_genes)
        Raw UMIs, in memory.
    min_umis : int
        Fewest UMIs of a cell over the genes kept; at least 1, as an empty cell tells nothing.
    min_cells : int
        Fewest cells of a target. The control is kept whatever its size.
    min_detected : int
        Fewest cells in which a gene has a UMI.
    key : str
        Column of ``obs`` with the target or condition of each cell.
    control : str or int
        The value of that column that marks the controls.
    layer : str, optional
        The layer that holds the UMIs; by default ``X``.

    Returns
    -------
    AnnData
        What is kept, with all its layers.
    ledger : DataFrame
        One row per rule: cells, genes and targets (the control counts as one) before and after.

    Raises
    ------
    KeyError
        If ``key`` is not a column of ``obs``, or ``layer`` does not exist.
    ValueError
        If the control is absent, nothing but controls is left, the values are no counts, or
        ``adata`` is in a file.
    """
    control = str(control)
    _check_labels(adata, key, control)
    counted(adata, layer)
    fewest = max(min_umis, 1)
    rules = (
        *_rule_of_labels(adata, key),
        (
            f"gene detected in at least {min_detected} cells",
            lambda a: a[:, _detected(_matrix(a, layer)) >= min_detected],
        ),
        (f"at least {fewest} UMIs", lambda a: a[_library(_matrix(a, layer)) >= fewest]),
        (
            f"target has at least {min_cells} cells",
            lambda a: a[_often_enough(a.obs[key].astype(str), min_cells, control)],
        ),
    )
    kept, ledger = _filtered(adata, rules, key=key)
    if set(kept.obs[key].astype(str)) <= {control}:
        raise ValueError(
            f"no perturbed cell passes the filter; relax one of its rules:\n{ledger.to_string()}"
        )
    return kept, ledger


def _rule_of_labels(
    adata: AnnData, key: str
) -> tuple[tuple[str, Callable[[AnnData], AnnData]], ...]:
    """Return the rule that drops cells without a label, where there are any."""
    if not adata.obs[key].isna().any():
        return ()
    return (("cell is labelled", lambda a: a[a.obs[key].notna().to_numpy()]),)


def summarise(
    adata: AnnData,
    *,
    key: str = "target",
    control: str | int = CONTROL,
    layer: str | None = None,
) -> pd.DataFrame:
    """Return per-target quality: cells, depth, clarity of the guide call, effect on the target.

    Parameters
    ----------
    adata : AnnData, (n_cells, n_genes)
        Raw UMIs, in memory, labelled in ``obs[key]``.
    key : str
        Column of ``obs`` with the target or condition of each cell.
    control : str or int
        The value of that column that marks the controls.
    layer : str, optional
        The layer that holds the UMIs; by default ``X``.

    Returns
    -------
    DataFrame
        The control first, then targets from most cells to fewest. ``cells``; ``median_umis``;
        ``guides``, how many distinct guides they carry (NaN without ``obs["guide"]``);
        ``median_guide_share`` (NaN without ``obs["guide_share"]``); ``own_gene_ratio``, the target
        gene's share of all UMIs in its own cells over its share in the controls (1 = no effect on
        its RNA, below 1 = knocked down; NaN where the gene is not measured; genes of one name
        count together). A knock-out need not lower the RNA.

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
    _check_labels(adata, key, control)
    refuse_missing(adata, key)
    counts, labels = counted(adata, layer), adata.obs[key].astype(str).to_numpy()
    obs = adata.obs.assign(_umis=_library(counts))
    groups = obs.groupby(labels)  # by the array, as the index may have the column's name, too
    share = groups["guide_share"] if "guide_share" in obs else None
    frame = pd.DataFrame(
        {
            "cells": groups.size(),
            "median_umis": groups["_umis"].median(),
            "guides": groups["guide"].nunique() if "guide" in obs else np.nan,
            "median_guide_share": share.median() if share is not None else np.nan,
            "own_gene_ratio": _own_gene_ratio(counts, adata.var_names, labels, control),
        }
    ).sort_values(["cells"], ascending=False, kind="stable")
    return frame.loc[[control, *frame.index.drop(control)]]


def _column(adata: AnnData, key: str) -> pd.Series:
    if key not in adata.obs:
        raise KeyError(
            f"{key!r} is not in adata.obs: {unknown_names('column', [key], adata.obs)}; columns: "
            f"{list(adata.obs)}"
        )
    return adata.obs[key]


def _check_labels(adata: AnnData, key: str, control: str) -> None:
    labels = set(_column(adata, key).dropna().astype(str))
    if control not in labels:
        raise ValueError(
            f"control {control!r} is not in adata.obs[{key!r}]: "
            f"{unknown_names('label', [control], sorted(labels))}"
        )


def _matrix(adata: AnnData, layer: str | None) -> np.ndarray | sparse.spmatrix:
    return adata.X if layer is None else adata.layers[layer]


def _detected(counts: np.ndarray | sparse.spmatrix) -> Int[np.ndarray, " gene"]:
    """Return in how many cells each gene has a UMI."""
    return np.asarray((summed(counts) > 0).sum(axis=0)).ravel()


def _library(counts: np.ndarray | sparse.spmatrix) -> Float[np.ndarray, " cell"]:
    """Return each cell's UMIs over the genes present."""
    return np.asarray(counts.sum(axis=1), dtype=float).ravel()


def _often_enough(labels: pd.Series, fewest: int, control: str) -> Bool[np.ndarray, " cell"]:
    cells = labels.map(labels.value_counts())
    return ((cells >= fewest) | (labels == control)).to_numpy()


def _own_gene_ratio(
    counts: np.ndarray | sparse.csr_matrix, genes: pd.Index, labels: np.ndarray, control: str
) -> dict[str, float]:
    """Return, for each label, its own gene's share of UMIs relative to the controls'."""
    from scipy import sparse

    library, is_control = _library(counts), labels == control
    columns = sparse.csc_matrix(counts)  # genes are looked up one by one
    ratio = dict.fromkeys(np.unique(labels), np.nan)
    for target in set(genes).intersection(ratio):
        umis = np.asarray(columns[:, np.flatnonzero(genes == target)].sum(axis=1)).ravel()
        own = labels == target
        background = umis[is_control].sum() / library[is_control].sum()
        if background > 0:
            ratio[target] = umis[own].sum() / library[own].sum() / background
    return ratio


def _filtered(
    adata: AnnData, rules: Sequence[tuple[str, Callable[[AnnData], AnnData]]], *, key: str
) -> tuple[AnnData, pd.DataFrame]:
    """Apply rules in order; return a copy of what is left and the ledger of what each dropped."""
    import pandas as pd

    rows = []
    for rule, keep in rules:
        before, adata = adata, keep(adata)
        rows.append({"rule": rule, **_change(before, adata, key)})
    return adata.copy(), pd.DataFrame(rows).set_index("rule")


def _change(before: AnnData, after: AnnData, key: str) -> dict[str, int | str]:
    """Count what a rule dropped, and name the targets it lost."""
    old, new = (set(part.obs[key].dropna().astype(str)) for part in (before, after))
    return {
        "cells_before": before.n_obs,
        "cells_after": after.n_obs,
        "genes_before": before.n_vars,
        "genes_after": after.n_vars,
        "targets_before": len(old),
        "targets_after": len(new),
        "targets_dropped": ", ".join(sorted(old - new)),
    }


# ---------------------------------------------------------------------- gene sets, hold-outs


def pathways() -> Mapping[str, GeneSet]:
    """Return the named gene sets of the small screens, with who says so.

    ``ifn-gamma`` is the pathway to recover in ``papalexi2021``; ``papalexi2021-null`` are its
    negative controls, whose gates a sparse model must leave closed.

    Returns
    -------
    mapping of str to GeneSet
        By name.
    """
    return {gene_set.name: gene_set for gene_set in _GENE_SETS}


_GENE_SETS = (
    GeneSet(
        "ifn-gamma",
        ("IFNGR1", "IFNGR2", "JAK2", "STAT1", "IRF1"),
        "interferon-gamma receptor, its kinase, its transcription factor and that factor's "
        "target: Papalexi et al. (2021), doi:10.1038/s41588-021-00778-2",
    ),
    GeneSet(
        "papalexi2021-null",
        tuple(
            "ATF2 CAV1 CD86 CMTM6 ETV7 IRF7 MARCH8 NFKBIA PDCD1LG2 POU2F2 STAT3 STAT5A TNFRSF14 "
            "UBE2L6".split()
        ),
        "cells that a cross-validated logistic regression on the 299 genes, the target's own left "
        "out, does not tell from controls of the same replicates (AUC below .54, more than 300 "
        "cells); measured on papalexi2021, guides assigned at a threshold of .8, 50 UMIs or more",
    ),
)


def hold_out(
    design: Design, genes: Collection[str]
) -> tuple[Int[Tensor, " train"], Int[Tensor, " held"]]:
    """Split the conditions of a design into those that spare the genes and those that do not.

    Parameters
    ----------
    design : Design
        Its conditions are split.
    genes : collection of str
        Targets to hold out. A combination is held out if any of its targets is.

    Returns
    -------
    train, held_out : Tensor of int
        Rows of the design, ascending; the control is in ``train``.

    Raises
    ------
    KeyError
        If genes are no targets of the design; up to a hundred are listed, with the
        nearest targets.
    ValueError
        If ``genes`` is empty, or no perturbation is left to train on.
    """
    if unknown := unknown_names("target", genes, design.targets):
        raise KeyError(unknown)
    chosen = torch.tensor([target in set(genes) for target in design.targets])
    held = design.matrix[:, chosen.to(design.matrix.device)].ne(0).any(dim=1).cpu()
    if not held.any() or held[1:].all():
        raise ValueError(
            f"holding out {sorted(genes)} leaves {int(held.sum())} conditions held out and "
            f"{int((~held[1:]).sum())} perturbations to train on; both must be at least one"
        )
    return torch.nonzero(~held).ravel(), torch.nonzero(held).ravel()


# ------------------------------------------------------------------------------ command line

_EXAMPLES = """
examples:
  python -m smslib.perturbseq list
  python -m smslib.perturbseq fetch papalexi2021
  python -m smslib.perturbseq prepare replogle2022-k562-gwps-scperturb --controls 2000
  python -m smslib.perturbseq prepare replogle2022-k562-gwps --file look_alike.h5ad --out cut.h5ad

Files are kept in the folder that SMS_DATA_DIR names, else in the user's cache. A download that was
interrupted goes on where it stopped. Sizes and licences: the command list.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """List the public screens, fetch one, or prepare one as the sVAE+ paper did.

    Parameters
    ----------
    arguments : sequence of str, optional
        What stands behind the command's name; the process's own by default.

    Returns
    -------
    int
        The exit status: 0, 1 after an error that was explained in one line, 130 if interrupted.
    """
    options = _parser().parse_args(arguments)
    try:
        sys.stdout.write(options.run(options))
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command goes on where this one stopped\n")
        return 130
    except (KeyError, ValueError, OSError, ImportError) as error:
        message = error.args[0] if isinstance(error, KeyError) else error
        sys.stderr.write(f"error: {message}\n")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    texts = {"epilog": _EXAMPLES, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(
        prog="python -m smslib.perturbseq",
        description="List the public screens, fetch one, or prepare one as the sVAE+ paper did.",
        **texts,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="names, sizes, licences, and what is here", **texts)
    listing.set_defaults(run=_list)
    fetching = commands.add_parser("fetch", help="download and verify one", **texts)
    fetching.add_argument("name", metavar="NAME", help="as the command list prints it")
    fetching.set_defaults(run=lambda options: f"{fetch(options.name)}\n")
    _add_prepare(commands.add_parser("prepare", help="fetch one and cut it", **texts))
    return parser


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help=f"one of {', '.join(_with_recipe())}")
    parser.add_argument("--out", metavar="FILE", type=Path, help="the .h5ad file to write")
    parser.add_argument(
        "--controls",
        metavar="N",
        type=_controls,
        help="control cells to keep beside the perturbed ones, a number or all (Replogle; the "
        "paper kept none, the default)",
    )
    parser.add_argument(
        "--file",
        metavar="FILE",
        type=Path,
        help="cut this file of the source's schema (a copy, a look-alike) instead of fetching",
    )
    parser.add_argument(
        "--key",
        metavar="COLUMN",
        help="column of obs with the labels, if the file has another than the source",
    )
    parser.set_defaults(run=_prepare)


def _controls(text: str) -> int | str:
    if text == "all" or text.isdecimal():
        return text if text == "all" else int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither a number of cells nor 'all'")


def _with_recipe() -> list[str]:
    return [source.name for source in sources.SOURCES.values() if source.recipe]


def _prepare(options: argparse.Namespace) -> str:
    """Fetch a source unless a file is given, cut it by its recipe, return the path written."""
    source = sources.find(options.name)
    if not source.recipe:
        raise ValueError(f"no recipe prepares {source.name}; it does {', '.join(_with_recipe())}")
    extra: dict[str, Any] = {}
    if options.controls is not None:
        if source.recipe != "replogle":
            raise ValueError(f"--controls does not apply to {source.name}, which keeps them all")
        extra["controls"] = options.controls
    if options.key is not None:
        extra["key"] = options.key
    if source.recipe == "replogle":
        extra["lists"] = gene_lists()
    from smslib import prepare  # here, as it builds on this module

    path = options.file or fetch(source.name)
    return f"{getattr(prepare, source.recipe)(path, out=options.out, **extra)}\n"


def _list(_options: argparse.Namespace) -> str:
    """Return the table of sources: name, size, licence, what is here, what it is."""
    folder = data_dir()
    rows = [
        (s.name, sources.size_text(s.bytes), sources.state(s.name), s.licence.split(" (")[0])
        for s in sources.SOURCES.values()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [f"files in {folder} ({_room(folder)})"]
    for row, source in zip(rows, sources.SOURCES.values(), strict=True):
        cells = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        about = textwrap.indent(textwrap.fill(source.description, 90), "    ")
        lines += [cells.rstrip(), about]
    return "\n".join(lines) + "\n"


def _room(folder: Path) -> str:
    """Return the free space of the disk that holds, or would hold, a folder."""
    here = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    return f"{sources.size_text(shutil.disk_usage(here).free)} free"


if __name__ == "__main__":
    raise SystemExit(main())
