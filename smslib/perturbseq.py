"""Real Perturb-seq screens: where the files are, how to read them, and what quality control drops.

A `Source` is an address, a size, a checksum, a licence and the name of a reader. `fetch` looks for
its file in the data directory, verifies it, and only then asks the network. Everything returned is
AnnData, cells x genes, raw UMIs; `smslib.data.from_anndata` takes it from there.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import http.client
import os
import sys
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from smslib.data import Design

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from scipy import sparse

__all__ = [
    "CONTROL",
    "SOURCES",
    "GeneSet",
    "Source",
    "assign_guides",
    "available",
    "counts_from_log1p",
    "data_dir",
    "fetch",
    "filter_screen",
    "hold_out",
    "pathways",
    "read",
    "summarise",
]

CONTROL = "non-targeting"  # how guide-level screens name their controls

_SCHEMES = ("https", "file")
_CHUNK = 1 << 18  # bytes per read
_PATIENCE = 30.0  # seconds without a byte before a download counts as failed
_LARGEST_UNIT = 16  # most UMIs that the smallest non-zero value of a cell may stand for


@dataclass(frozen=True)
class Source:
    """One public file: where it is, what it must hash to, and what reads it.

    Parameters
    ----------
    name : str
        What `fetch` and `read` call it.
    url : str
        An https (or file) address that always serves the same bytes; empty if the file in this
        form has no public address.
    filename : str
        Its name in the data directory.
    bytes : int
        Its size.
    sha256 : str
        Its checksum, in hexadecimal.
    licence, citation : str
        Of the file, and of the experiment in it.
    description : str
        Cells, genes and perturbations in one sentence.
    reader : str
        Key of the function that `read` applies.
    """

    name: str
    url: str
    filename: str
    bytes: int
    sha256: str
    licence: str
    citation: str
    description: str
    reader: str


_ALL = (
    Source(
        name="papalexi2021",
        url="https://raw.githubusercontent.com/Katsevich-Lab/sceptredata/"
        "ec722d5df90dfd34ace6cc9a5745ab6a5c2a6731/data/lowmoi_example_data.rda",
        filename="lowmoi_example_data.rda",
        bytes=1_358_267,
        sha256="e3f8ad09bb4b1d0deeeec2850a2d96f8f5062fef31a9ab1cc080e60560421b6a",
        licence="MIT (the file, as part of sceptredata)",
        citation="Papalexi et al. (2021), Nature Genetics 53:322-331, "
        "doi:10.1038/s41588-021-00778-2; GEO GSE153056",
        description="ECCITE-seq knock-outs in THP-1: 20,729 cells x 299 genes (a random 2 % of "
        "the transcriptome and some targets), 110 guides, three replicates",
        reader="papalexi",
    ),
    Source(
        name="norman2019-mini",
        url="https://raw.githubusercontent.com/altoslabs/perturbench/"
        "d357dfae3b50968e800e9f5f273ff145080ae67c/src/perturbench/data/resources/devel.h5ad",
        filename="devel.h5ad",
        bytes=1_142_678,
        sha256="220998f5630c813228c8661c86dd52244b9ac87127511289af90e0d900d8429b",
        licence="BSD-3-Clause (the file, as part of perturbench)",
        citation="Norman et al. (2019), Science 365:786-793, doi:10.1126/science.aax4438, GEO "
        "GSE133344; McFaline-Figueroa et al. (2023), GEO GSM7056149",
        description="CRISPRa in K562 (18 singles, 15 doubles) and CRISPRi of nine of the same "
        "genes in three glioma lines: 5,961 cells x 500 variable genes",
        reader="norman",
    ),
    Source(
        name="replogle2022-gene-lists",
        url="",
        filename="replogle2022_gene_lists.tsv",
        bytes=73_070,
        sha256="16f73bee10e152a7cbb744ec9a5652c8bbc0a82fd444d0a6d1eabc28bbf0a65f",
        licence="facts from a published table",
        citation="Replogle et al. (2022), Cell 185:2559-2575, doi:10.1016/j.cell.2022.05.013, "
        "Supplementary Table 3, as typed into entry_points/replogle-preprocessing.ipynb of "
        "github.com/Genentech/sVAE at commit 48685f6",
        description="the perturbation clusters, gene programs and held-out pathways by which "
        "the sVAE+ paper cut the genome-wide screen",
        reader="table",
    ),
)

SOURCES: Mapping[str, Source] = {source.name: source for source in _ALL}


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


# ------------------------------------------------------------------------------------- files


def data_dir() -> Path:
    """Return where data files are kept: ``SMS_DATA_DIR`` if set, else the user's cache.

    Returns
    -------
    Path
        A folder, which need not exist.
    """
    chosen = os.environ.get("SMS_DATA_DIR")
    if chosen:
        return Path(chosen).expanduser()
    import pooch

    return Path(pooch.os_cache("smslib"))


def fetch(name: str, *, directory: str | os.PathLike[str] | None = None) -> Path:
    """Return the verified local file of a source, downloading it only if it is not there.

    Parameters
    ----------
    name : str
        A key of ``SOURCES``.
    directory : path, optional
        Where to look and to store; `data_dir` by default. It may be read-only if it holds the
        file.

    Returns
    -------
    Path
        The file, whose SHA-256 is the source's.

    Raises
    ------
    KeyError
        If the source is unknown.
    ValueError
        If the file, found or downloaded, has another SHA-256 than the source. The bad file is
        kept beside under the name ``<filename>.bad``.
    ConnectionError
        If the file is not there and cannot be downloaded; the message says which file to put
        where.
    """
    source = _source(name)
    path = (data_dir() if directory is None else Path(directory)) / source.filename
    if path.exists():
        _verify(path, source, kept=path)
    else:
        _download(source, path)
    return path


def available(name: str, *, directory: str | os.PathLike[str] | None = None) -> bool:
    """Say whether a source is on disk or can be downloaded, without doing so or raising.

    True if a file with the right checksum is there; a file with another one is not looked
    beyond. Without a file the source's address is asked, with five seconds to answer.

    Parameters
    ----------
    name : str
        A key of ``SOURCES``; False for any other.
    directory : path, optional
        As in `fetch`.

    Returns
    -------
    bool
        Whether `read` has something to read.
    """
    try:
        source = _source(name)
        path = (data_dir() if directory is None else Path(directory)) / source.filename
        if path.exists():
            return _sha256(path) == source.sha256
        with _open_url(source.url, patience=5.0):
            return True
    except (KeyError, ValueError, OSError, http.client.HTTPException):
        return False


def _source(name: str) -> Source:
    if name not in SOURCES:
        raise KeyError(f"unknown source {name!r}; known: {sorted(SOURCES)}")
    return SOURCES[name]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify(path: Path, source: Source, *, kept: Path) -> None:
    """Raise unless ``path`` is the source's file; then set it aside as ``<kept>.bad``."""
    found = _sha256(path)
    if found == source.sha256:
        return
    aside = kept.with_name(kept.name + ".bad")
    try:
        os.replace(path, aside)
        where = f"it is kept as {aside}; fetch again to download a fresh copy"
    except OSError as error:
        where = f"it could not be set aside ({error.strerror}); remove {path} yourself"
    raise ValueError(
        f"{source.filename} has sha256 {found} ({source.name}), expected {source.sha256}; {where}"
    )


def _download(source: Source, path: Path) -> None:
    """Download beside ``path``, verify, and only then move into place."""
    with _scratch(source, path) as temporary:
        try:
            with _open_url(source.url, patience=_PATIENCE) as response:
                received = _copy(response, temporary, source)
        except (ValueError, OSError, http.client.HTTPException) as error:
            raise ConnectionError(_put_it_there(source, path, str(error))) from error
        if received < source.bytes:
            short = f"the connection closed after {received:,} bytes"
            raise ConnectionError(_put_it_there(source, path, short))
        _verify(temporary, source, kept=path)
        os.replace(temporary, path)


@contextlib.contextmanager
def _scratch(source: Source, path: Path) -> Iterator[Path]:
    """Lend a path on the same file system as ``path``; what is left there is deleted."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-")
    except OSError as error:
        raise ConnectionError(
            f"{source.filename} is not in {path.parent}, which cannot be written to "
            f"({error.strerror}); set SMS_DATA_DIR to a folder of yours"
        ) from error
    with folder:
        yield Path(folder.name) / path.name


def _open_url(url: str, *, patience: float) -> Any:  # noqa: ANN401 (http and file answers differ)
    """Open an address, refusing whatever is not (or is redirected away from) ``_SCHEMES``."""
    _check_scheme(url)
    request = urllib.request.Request(url, headers={"User-Agent": "smslib"})
    response = urllib.request.urlopen(request, timeout=patience)
    try:
        _check_scheme(response.url)
    except ValueError:
        response.close()
        raise
    return response


def _check_scheme(url: str) -> None:
    if not url:
        raise ValueError("it has no public address in this form")
    if urllib.parse.urlsplit(url).scheme not in _SCHEMES:
        raise ValueError(f"{url} is not one of {_SCHEMES}")


def _copy(
    response: Any,  # noqa: ANN401 (http and file answers differ)
    path: Path,
    source: Source,
) -> int:
    """Write an answer to disk with a progress bar (on a terminal only); return its bytes."""
    from tqdm import tqdm

    bar = tqdm(total=source.bytes, desc=source.filename, unit="B", unit_scale=True, disable=None)
    with path.open("wb") as file, bar:
        while chunk := response.read(_CHUNK):
            bar.update(file.write(chunk))
        file.flush()
        os.fsync(file.fileno())
    return path.stat().st_size


def _put_it_there(source: Source, path: Path, reason: str) -> str:
    origin = source.url or source.citation
    return (
        f"cannot download {source.name}: {reason}. Put the file {source.filename} "
        f"({source.bytes:,} bytes, sha256 {source.sha256}) into {path.parent}; it comes from "
        f"{origin}. Or point SMS_DATA_DIR at a folder that holds it"
    )


# ----------------------------------------------------------------------------------- readers


def read(name: str, *, directory: str | os.PathLike[str] | None = None) -> AnnData | pd.DataFrame:
    """Fetch a source and read it: a screen as AnnData of raw UMIs, a list as a table.

    Parameters
    ----------
    name : str
        A key of ``SOURCES``.
    directory : path, optional
        As in `fetch`.

    Returns
    -------
    AnnData, (n_cells, n_genes)
        ``X`` is CSR int32, UMIs. ``papalexi2021``: ``obs["replicate"]``, ``obsm["guides"]``
        (cells x guides, UMIs) and ``uns["guide_target"]`` (one row per guide, in the order of
        those columns); it has no labels yet, see `assign_guides`. ``norman2019-mini``:
        ``obs["condition"]`` (``control``, ``KLF1``, ``KLF1+MAP2K6``), ``obs["cell_type"]``,
        ``obs["perturbation_type"]``, and ``obs["total"]``, the UMIs of the cell over all genes
        before the file was cut to its 500.
    DataFrame
        ``replogle2022-gene-lists``: columns ``list``, ``name``, ``symbol``.

    Raises
    ------
    KeyError, ValueError, ConnectionError
        As in `fetch`; ValueError also if the file does not hold counts.
    """
    return _READERS[_source(name).reader](fetch(name, directory=directory))


def _read_table(path: Path) -> pd.DataFrame:
    import pandas as pd

    # Gene symbols such as "NA" or "NAN" are names, not missing values.
    return pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)


def _read_papalexi(path: Path) -> AnnData:
    from anndata import AnnData

    screen = _parse_rda(path)["lowmoi_example_data"]
    counts, genes = screen["response_matrix"]
    guide_counts, guides = screen["grna_matrix"]
    return AnnData(
        X=_umis(counts.T.tocsr(), "response_matrix"),
        obs=_numbered_cells(screen["extra_covariates"]["bio_rep"]),
        var=_named(genes, "gene"),
        obsm={"guides": _umis(guide_counts.T.tocsr(), "grna_matrix")},
        uns={"guide_target": _guide_targets(screen["grna_target_data_frame"], guides)},
    )


def _parse_rda(path: Path) -> Mapping[str, Any]:
    import rdata

    classes = {"dgTMatrix": _r_sparse, "dgCMatrix": _r_sparse}
    return rdata.read_rda(path, constructor_dict={**rdata.conversion.DEFAULT_CLASS_MAP, **classes})


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
        raise ValueError(f"{what} holds values that are not counts; expected raw UMIs")
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


def _read_norman(path: Path) -> AnnData:
    import anndata

    stored = anndata.read_h5ad(path)
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

    matrix = sparse.csr_matrix(matrix)
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
    "norman": _read_norman,
    "table": _read_table,
}


# --------------------------------------------------------------------------- quality control


def assign_guides(
    adata: AnnData, *, threshold: float = 0.8, min_umis: int = 1
) -> tuple[AnnData, pd.DataFrame]:
    """Label each cell with its most abundant guide, and drop the cells where that is unclear.

    Parameters
    ----------
    adata : AnnData
        With ``obsm["guides"]`` (cells x guides, UMIs) and ``uns["guide_target"]``.
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
        If the guide counts or their targets are missing.
    ValueError
        If the threshold is not in (0, 1].
    """
    if "guides" not in adata.obsm or "guide_target" not in adata.uns:
        raise KeyError(
            "adata has no obsm['guides'] or no uns['guide_target']; expected guide UMIs "
            "(cells x guides) and a table of each guide's target, as read('papalexi2021') gives"
        )
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}; expected a share in (0, 1]")
    labelled = adata.copy()
    labelled.obs = labelled.obs.assign(**_top_guides(adata))
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


def _top_guides(adata: AnnData) -> dict[str, np.ndarray | pd.Categorical]:
    """Return each cell's top guide, its target, its guide UMIs and the top guide's share."""
    import pandas as pd

    counts, table = adata.obsm["guides"].tocsr(), adata.uns["guide_target"]
    top = np.asarray(counts.argmax(axis=1)).ravel()
    umis = np.asarray(counts.sum(axis=1)).ravel()
    most = counts.max(axis=1).toarray().ravel()
    return {
        "guide": pd.Categorical(table.index.to_numpy()[top]),
        "target": pd.Categorical(table["target"].to_numpy()[top]),
        "guide_umis": umis,
        "guide_share": most / np.maximum(umis, 1),
    }


def _unique_top(guides: sparse.csr_matrix) -> Bool[np.ndarray, " cell"]:
    """Say in which cells exactly one guide has the most UMIs."""
    counts = guides.tocsr()
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
    control: str = CONTROL,
) -> tuple[AnnData, pd.DataFrame]:
    """Drop genes seen too rarely, cells with too few UMIs, and targets with too few cells.

    The rules apply in that order, once each, so that no later one undoes an earlier one but for
    the detection of genes in the cells that remain.

    Parameters
    ----------
    adata : AnnData, (n_cells, n_genes)
        Raw UMIs.
    min_umis : int
        Fewest UMIs of a cell over the genes kept; at least 1, as an empty cell tells nothing.
    min_cells : int
        Fewest cells of a target. The control is kept whatever its size.
    min_detected : int
        Fewest cells in which a gene has a UMI.
    key : str
        Column of ``obs`` with the target or condition of each cell.
    control : str
        The value of that column that marks the controls.

    Returns
    -------
    AnnData
        What is kept.
    ledger : DataFrame
        One row per rule: cells, genes and targets (the control counts as one) before and after.

    Raises
    ------
    KeyError
        If ``key`` is not a column of ``obs``.
    ValueError
        If the control is absent, or nothing but controls is left.
    """
    _check_labels(adata, key, control)
    fewest = max(min_umis, 1)
    rules = (
        (
            f"gene detected in at least {min_detected} cells",
            lambda a: a[:, np.asarray((a.X > 0).sum(axis=0)).ravel() >= min_detected],
        ),
        (f"at least {fewest} UMIs", lambda a: a[_library(a) >= fewest]),
        (
            f"target has at least {min_cells} cells",
            lambda a: a[_often_enough(a.obs[key].astype(str), min_cells, control)],
        ),
    )
    kept, ledger = _filtered(adata, rules, key=key)
    if set(kept.obs[key]) <= {control}:
        raise ValueError(
            f"no perturbed cell passes the filter; relax one of its rules:\n{ledger.to_string()}"
        )
    return kept, ledger


def summarise(adata: AnnData, *, key: str = "target", control: str = CONTROL) -> pd.DataFrame:
    """Return per-target quality: cells, depth, clarity of the guide call, effect on the target.

    Parameters
    ----------
    adata : AnnData, (n_cells, n_genes)
        Raw UMIs, labelled in ``obs[key]``.
    key : str
        Column of ``obs`` with the target or condition of each cell.
    control : str
        The value of that column that marks the controls.

    Returns
    -------
    DataFrame
        The control first, then targets from most cells to fewest. ``cells``; ``median_umis``;
        ``guides``, how many distinct guides they carry, and ``median_guide_share`` (both NaN
        without guide calls); ``own_gene_ratio``, the target gene's share of all UMIs in its own
        cells over its share in the controls (1 = no effect on its RNA, below 1 = knocked down;
        NaN where the gene is not measured). A knock-out need not lower the RNA.

    Raises
    ------
    KeyError
        If ``key`` is not a column of ``obs``.
    ValueError
        If the control is absent.
    """
    import pandas as pd

    _check_labels(adata, key, control)
    obs = adata.obs.assign(_umis=_library(adata), **{key: adata.obs[key].astype(str)})
    groups = obs.groupby(key)
    frame = pd.DataFrame(
        {
            "cells": groups.size(),
            "median_umis": groups["_umis"].median(),
            "guides": groups["guide"].nunique() if "guide" in obs else np.nan,
            "median_guide_share": groups["guide_share"].median() if "guide" in obs else np.nan,
            "own_gene_ratio": _own_gene_ratio(adata, obs[key], control),
        }
    ).sort_values(["cells"], ascending=False, kind="stable")
    return frame.loc[[control, *frame.index.drop(control)]]


def _check_labels(adata: AnnData, key: str, control: str) -> None:
    if key not in adata.obs:
        raise KeyError(f"{key!r} is not in adata.obs; columns: {list(adata.obs)}")
    if control not in set(adata.obs[key]):
        raise ValueError(
            f"control {control!r} is not in adata.obs[{key!r}]; "
            f"its values begin with {sorted(set(adata.obs[key].astype(str)))[:5]}"
        )


def _library(adata: AnnData) -> Float[np.ndarray, " cell"]:
    """Return each cell's UMIs over the genes present."""
    return np.asarray(adata.X.sum(axis=1), dtype=float).ravel()


def _often_enough(labels: pd.Series, fewest: int, control: str) -> Bool[np.ndarray, " cell"]:
    cells = labels.map(labels.value_counts())
    return ((cells >= fewest) | (labels == control)).to_numpy()


def _own_gene_ratio(adata: AnnData, labels: pd.Series, control: str) -> dict[str, float]:
    """Return, for each label, its own gene's share of UMIs relative to the controls'."""
    measured = set(adata.var_names)
    library, is_control = _library(adata), (labels == control).to_numpy()
    ratio = dict.fromkeys(labels.unique(), np.nan)
    for target in measured.intersection(ratio):
        umis = np.asarray(adata[:, target].X.sum(axis=1)).ravel()
        own = (labels == target).to_numpy()
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
    old, new = set(before.obs[key].astype(str)), set(after.obs[key].astype(str))
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
        If a gene is not a target of the design.
    ValueError
        If ``genes`` is empty, or no perturbation is left to train on.
    """
    unknown = sorted(set(genes) - set(design.targets))
    if unknown:
        raise KeyError(f"{unknown} are not targets of the design, which are {design.targets}")
    chosen = torch.tensor([target in set(genes) for target in design.targets])
    held = design.matrix[:, chosen.to(design.matrix.device)].ne(0).any(dim=1).cpu()
    if not held.any() or held[1:].all():
        raise ValueError(
            f"holding out {sorted(genes)} leaves {int(held.sum())} conditions held out and "
            f"{int((~held[1:]).sum())} perturbations to train on; both must be at least one"
        )
    return torch.nonzero(~held).ravel(), torch.nonzero(held).ravel()


# ------------------------------------------------------------------------------ command line


def main(arguments: Sequence[str] | None = None) -> int:
    """List the sources or fetch one: ``python -m smslib.perturbseq {list, fetch NAME}``."""
    parser = argparse.ArgumentParser(prog="python -m smslib.perturbseq", description=main.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="name, size and whether the file is here")
    commands.add_parser("fetch", help="download and verify").add_argument("name", choices=SOURCES)
    options = parser.parse_args(arguments)
    if options.command == "fetch":
        sys.stdout.write(f"{fetch(options.name)}\n")
        return 0
    for source in SOURCES.values():
        here = "here" if (data_dir() / source.filename).exists() else "not here"
        sys.stdout.write(f"{source.name}\t{source.bytes:,} bytes\t{here}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
