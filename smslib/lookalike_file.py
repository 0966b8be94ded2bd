"""The look-alike of the Replogle screen as AnnData, and as a file in its source's own schema.

Both carry a mark in ``uns["simulated"]``. A surplus of cells and genes of no interest can be
strewn among those of the screen, for the cut of the real file to drop.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped

from smslib import files
from smslib.data import streams
from smslib.lookalike import (
    BLOCK,
    STREAMS,
    LookAlike,
    Template,
    draw_nonempty,
    invented_names,
    negative_binomial,
)

if TYPE_CHECKING:
    import h5py
    import pandas as pd
    from anndata import AnnData

__all__ = ["to_anndata", "write"]


def to_anndata(screen: LookAlike) -> AnnData:
    """Return the screen as AnnData: what `smslib.data.from_anndata` reads, marked as simulated.

    Parameters
    ----------
    screen : LookAlike

    Returns
    -------
    AnnData, (n_cells, n_genes)
        ``X`` CSR, uint16, or uint32 if a count needs it; ``obs["target"]`` and
        ``obs["gem_group"]``; ``var["gene_name"]``; ``uns["simulated"]`` and ``uns["pathways"]``.
    """
    import anndata
    import pandas as pd
    from scipy import sparse

    largest = int(screen.cells.counts.max())
    kind = np.uint16 if largest < 2**16 else np.uint32
    starts = range(0, len(screen.cells), BLOCK)
    blocks = (screen.cells.counts[start : start + BLOCK].numpy() for start in starts)
    counts = sparse.vstack([sparse.csr_matrix(block.astype(kind)) for block in blocks], "csr")
    obs = pd.DataFrame(
        {
            "target": pd.Categorical(_labels(screen)),
            "gem_group": screen.batch.numpy() + 1,
        },
        index=_cell_names(np.arange(len(screen.cells))),
    )
    pathways = {name: list(members) for name, members in screen.pathways.items()}
    uns = {"simulated": dict(screen.origin), "pathways": pathways}
    return anndata.AnnData(X=counts, obs=obs, var=_gene_frame(screen.genes), uns=uns)


def write(
    screen: LookAlike,
    path: str | os.PathLike[str],
    *,
    surplus_genes: int = 0,
    surplus_cells: int = 0,
) -> Path:
    """Write the screen in the schema of ``K562_gwps_raw_singlecell_01.h5ad``.

    Contiguous dense float32 ``X``; ``obs``: ``gene`` (the target), ``gem_group``, ``sgID_AB``,
    ``mitopercent``, ``UMI_count``; ``var``: ids like Ensembl's as index and ``gene_name``.
    ``uns["simulated"]`` marks the file.

    Parameters
    ----------
    screen : LookAlike
    path : path
        An existing file is replaced.
    surplus_genes, surplus_cells : int
        Genes and cells of no interest, strewn among the others, for a cut to drop: genes with the
        template's means and dispersions that no latent moves; cells of targets in no list, without
        effect. 7,061 genes make the real file's 8,248.

    Returns
    -------
    Path
        The file. Cells and genes of the screen keep their order.

    Raises
    ------
    ValueError
        If a surplus is negative.
    OSError
        If the disk has no room for the file, or it does not read back as written.

    Notes
    -----
    Guides, ``mitopercent`` and the surplus are drawn from the screen's seed, in a stream of their
    own. Written and read back in blocks: memory does not grow with the surplus.
    """
    if surplus_genes < 0 or surplus_cells < 0:
        raise ValueError(
            f"surplus_genes={surplus_genes}, surplus_cells={surplus_cells}; expected none or more"
        )
    path = Path(path)
    rng = streams(screen.origin["seed"], STREAMS)["surplus"]
    layout = _Layout.of(screen, surplus_genes, surplus_cells, rng)
    needed = 4 * len(layout.row) * len(layout.column)
    advice = "Write elsewhere, or with fewer surplus genes and cells"
    files.check_room(path.parent, needed, what=path.name, advice=advice)
    with files.whole(path) as draft:
        _write_file(draft, screen, layout, rng)
    return path


@dataclass(frozen=True, eq=False)
class _Layout:
    """Where cells and genes of a screen stand in its file, among the surplus.

    ``row`` and ``column`` hold the number of the cell or gene, -1 for a surplus one.
    """

    row: Int[np.ndarray, " row"]
    column: Int[np.ndarray, " column"]
    surplus: Template | None
    batch: Int[np.ndarray, " row"]
    target: Shaped[np.ndarray, " row"]

    @classmethod
    def of(cls, screen: LookAlike, genes: int, cells: int, rng: np.random.Generator) -> _Layout:
        """Strew the surplus at random; what is kept stays in order."""
        row = _strewn(rng, len(screen.cells), cells)
        others = invented_names("X", 1 + cells * screen.design.n_targets // len(screen.cells))
        surplus = screen.template.resized(genes, rng) if genes else None
        batch = rng.integers(len(screen.batch_effect), size=len(row))
        return cls(
            row=row,
            column=_strewn(rng, len(screen.genes), genes),
            surplus=surplus,
            batch=np.where(row >= 0, screen.batch.numpy()[row], batch),
            target=np.where(row >= 0, _labels(screen)[row], rng.choice(others, size=len(row))),
        )


def _strewn(rng: np.random.Generator, n_kept: int, n_surplus: int) -> Int[np.ndarray, " place"]:
    """Return 0, 1, 2, ... in order with as many -1 as there is surplus, at random places."""
    surplus = rng.permutation(n_kept + n_surplus) >= n_kept
    return np.where(surplus, -1, np.cumsum(~surplus) - 1)


def _write_file(path: Path, screen: LookAlike, layout: _Layout, rng: np.random.Generator) -> None:
    """Write every part of the file and read the counts back."""
    import h5py
    from anndata.io import write_elem

    shape = (len(layout.row), len(layout.column))
    with h5py.File(path, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        counts = file.create_dataset("X", shape, np.float32)
        counts.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        umis = np.empty(shape[0])
        for rows in _row_blocks(shape[0]):
            block = _file_block(screen, layout, rows, rng)
            counts[rows] = block
            umis[rows] = block.sum(1)
        write_elem(file, "obs", _cell_frame(layout, umis, rng))
        write_elem(file, "var", _gene_frame(screen.genes, layout.column))
        write_elem(file, "uns", {"simulated": dict(screen.origin)})
    with h5py.File(path, "r") as file:
        _check_written(file["X"], umis)


def _row_blocks(n_rows: int) -> Iterator[slice]:
    return (slice(start, min(start + BLOCK, n_rows)) for start in range(0, n_rows, BLOCK))


def _check_written(counts: h5py.Dataset, umis: Float[np.ndarray, " row"]) -> None:
    for rows in _row_blocks(len(umis)):
        if not np.array_equal(counts[rows].sum(1, dtype=float), umis[rows]):
            raise OSError("the file does not read back as written; is the disk sound?")


def _file_block(
    screen: LookAlike, layout: _Layout, rows: slice, rng: np.random.Generator
) -> Float[np.ndarray, "row column"]:
    """Return some rows of the file: the screen's counts, and draws for the surplus."""
    row, ours = layout.row[rows], layout.column >= 0
    counts = np.empty((len(row), len(layout.column)), np.float32)
    own = screen.cells.counts.numpy()[row]
    strangers = row < 0
    own[strangers] = _draw_strangers(screen, layout.batch[rows][strangers], rng)
    counts[:, ours] = own
    if layout.surplus is not None:
        share = layout.surplus.mean / screen.template.mean.sum()
        mean = own.sum(1, keepdims=True) * share
        counts[:, ~ours] = negative_binomial(rng, mean, 1 / layout.surplus.dispersion)
    return counts


def _draw_strangers(
    screen: LookAlike, batch: Int[np.ndarray, " cell"], rng: np.random.Generator
) -> Int[np.ndarray, "cell gene"]:
    """Draw the screen's genes in cells whose targets have no effect."""
    z = torch.from_numpy(rng.standard_normal((len(batch), screen.z.shape[1])))
    logits = screen.decoder.logits(z).numpy() + screen.batch_effect.numpy()[batch]
    exposure = rng.choice(screen.template.library, size=len(batch))
    return draw_nonempty(rng, logits, exposure, screen.decoder.theta.numpy())


def _labels(screen: LookAlike) -> Shaped[np.ndarray, " cell"]:
    return np.array(screen.design.conditions)[screen.cells.condition.numpy()]


def _cell_names(row: Int[np.ndarray, " row"]) -> pd.Index:
    """Name cells by their number in the screen; surplus ones by their place in the file."""
    import pandas as pd

    names = [f"cell-{n:07d}" if n >= 0 else f"surplus-{at:07d}" for at, n in enumerate(row)]
    return pd.Index(names, name="cell_barcode")


def _cell_frame(
    layout: _Layout, umis: Float[np.ndarray, " row"], rng: np.random.Generator
) -> pd.DataFrame:
    import pandas as pd

    guides = [f"{target}_A|{target}_B" for target in layout.target]
    columns = {
        "gem_group": layout.batch + 1,
        "gene": pd.Categorical(layout.target),
        "sgID_AB": pd.Categorical(guides),
        "mitopercent": rng.beta(5.0, 45.0, size=len(umis)),  # about a tenth, and no more to it
        "UMI_count": umis,
    }
    return pd.DataFrame(columns, index=_cell_names(layout.row))


def _gene_frame(
    genes: Sequence[str], column: Int[np.ndarray, " column"] | None = None
) -> pd.DataFrame:
    """Name genes by id, with the symbol beside it; surplus ones by their place in the file."""
    import pandas as pd

    column = np.arange(len(genes)) if column is None else column
    ids = pd.Index([f"SIMG{place:011d}" for place in range(len(column))], name="gene_id")
    names = [genes[n] if n >= 0 else f"U{place:05d}" for place, n in enumerate(column)]
    return pd.DataFrame({"gene_name": names}, index=ids)
