"""Loaders of cells batch by batch, for screens that are too large to be one dense tensor.

`Rows` makes cells of the rows that are asked for; what decides which rows come when is either
`Shuffled`, for counts in memory, or an out-of-core loader in `Passes`, for those in a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int, Real
from torch import Tensor

from smslib.data import (
    LARGEST_COUNT,
    Cells,
    Design,
    checked,
    no_count,
    read_design,
    summed,
    why_not_counts,
)

if TYPE_CHECKING:
    import anndata
    import scipy.sparse

__all__ = ["Packed", "Passes", "Rows", "Shuffled", "from_anndata"]


@runtime_checkable
class _Matrix(Protocol):
    """What can be indexed by rows."""

    shape: tuple[int, ...]

    def __getitem__(self, rows: object) -> object: ...


class Packed:
    """A matrix of counts as compressed rows, each part in the narrowest type that it fits.

    SciPy widens the columns with the offsets where there are more than 2**31 entries, which is a
    third of a million cells of a genome-wide screen.

    Parameters
    ----------
    values : array, (n_entries,)
        Counts that are not zero, unsigned integers.
    columns : array, (n_entries,)
        int32.
    offsets : array, (n_cells + 1,)
        Where each row begins, int64.
    n_genes : int
    """

    def __init__(
        self, values: np.ndarray, columns: np.ndarray, offsets: np.ndarray, n_genes: int
    ) -> None:
        self.values, self.columns, self.offsets = values, columns, offsets
        self.shape = (len(offsets) - 1, n_genes)

    @classmethod
    def of(cls, counts: scipy.sparse.csr_matrix) -> Packed:
        """Return the packed copy of a CSR matrix of counts."""
        values = counts.data.astype(np.min_scalar_type(int(counts.data.max(initial=0))))
        return cls(
            values,
            counts.indices.astype(np.int32, copy=False),
            counts.indptr.astype(np.int64, copy=False),
            counts.shape[1],
        )

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        """Return the chosen rows, dense, in single precision."""
        from scipy import sparse

        chosen = np.arange(self.shape[0])[rows]
        # The first span holds nothing: there is something to join of no rows, too.
        spans = [slice(0), *(slice(*self.offsets[row : row + 2]) for row in chosen)]
        lengths = self.offsets[chosen + 1] - self.offsets[chosen]
        parts = (
            np.concatenate([self.values[span] for span in spans]).astype(np.float32),
            np.concatenate([self.columns[span] for span in spans]),
            np.concatenate([[0], np.cumsum(lengths)]),
        )
        return sparse.csr_matrix(parts, shape=(len(chosen), self.shape[1])).toarray()


class Rows:
    """Counts and condition of cells, dense where they are asked for and nowhere else.

    It has length and index, which is what scDataset wants of a collection.

    Parameters
    ----------
    counts : Packed, CSR, array or a backed file's matrix, (n_cells, n_genes)
        UMIs; but for Packed they are checked block by block, where they are asked for.
    condition : Tensor, (n_cells,)
        Row of ``Design.matrix`` of each cell.
    device : str or torch.device
        Where the cells are put.

    Raises
    ------
    ValueError
        If counts and conditions differ in number, or the counts are no real numbers.
    """

    def __init__(
        self,
        counts: _Matrix,
        condition: Int[Tensor, " cell"],
        *,
        device: str | torch.device = "cpu",
    ) -> None:
        if counts.shape[0] != len(condition):
            raise ValueError(
                f"there are counts of {counts.shape[0]} cells and {len(condition)} conditions; "
                "expected one condition per cell"
            )
        kind = np.dtype(getattr(counts, "dtype", np.float32))  # packed counts have been checked
        if kind.kind not in "biuf":
            raise ValueError(f"the counts are values of type {kind}; expected real numbers")
        self.counts, self.condition, self.device = counts, condition.cpu(), device

    @property
    def n_genes(self) -> int:
        """Number of genes."""
        return self.counts.shape[1]

    def __len__(self) -> int:
        """Return the number of cells."""
        return len(self.condition)

    def __getitem__(self, index: Tensor | slice | np.ndarray) -> Cells:
        """Return the chosen cells, in the order of ``index``.

        Raises
        ------
        ValueError
            If they hold values that are no counts, or a cell has no UMIs.
        """
        index = index.cpu().numpy() if isinstance(index, Tensor) else index
        counts = self._dense(index)
        if not isinstance(self.counts, Packed):
            self._check(counts, index)
        single = counts.astype(np.float32, copy=False)  # now, as rounding hides what is no count
        return Cells(torch.from_numpy(single), self.condition[index]).to(self.device)

    def _dense(self, index: slice | np.ndarray) -> np.ndarray:
        """Return the chosen rows as they are; a file gives them in order, each once."""
        if isinstance(index, slice) or _in_memory(self.counts):
            return _as_array(self.counts[index])
        order, back = np.unique(np.arange(len(self))[index], return_inverse=True)
        return _as_array(self.counts[order])[back]

    def _check(self, counts: Real[np.ndarray, "cell gene"], index: slice | np.ndarray) -> None:
        """Refuse what `smslib.data.from_anndata` refuses of counts in memory."""
        wrong = (no_count(counts) | (counts > LARGEST_COUNT)).any(1) | (counts.sum(1) == 0)
        if not wrong.any():
            return
        row = np.arange(len(self))[index][int(wrong.argmax())]
        raise ValueError(
            f"row {row} has no UMIs, or values other than raw counts (non-negative integers up to "
            f"{LARGEST_COUNT:,}). Noticed: {why_not_counts(counts)}"
        )


def _in_memory(counts: _Matrix) -> bool:
    from scipy import sparse

    return isinstance(counts, Packed | np.ndarray) or sparse.issparse(counts)


def _as_array(rows: object) -> np.ndarray:
    return summed(rows).toarray() if hasattr(rows, "toarray") else np.asarray(rows)


class Shuffled:
    """Batches of rows in memory, in a new random order at every pass.

    Parameters
    ----------
    rows : Rows
    batch_size : int
    seed : int, optional
        With the seed of the configuration, `smslib.train.fit` sees the cells in the order in
        which it shuffles cells itself. Passes run on: a second fit needs a new object; one that
        goes on from a checkpoint is put back by it. Without a seed every pass is in the order of
        ``rows``, as evaluation wants it.
    """

    def __init__(self, rows: Rows, batch_size: int, *, seed: int | None = None) -> None:
        self.rows, self.batch_size, self.n_cells = rows, batch_size, len(rows)
        self.order = None if seed is None else torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[Cells]:
        """Start a pass."""
        if self.order is None:
            order = torch.arange(self.n_cells)
        else:
            order = torch.randperm(self.n_cells, generator=self.order)
        return (self.rows[part] for part in order.split(self.batch_size))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return where the passes are, for a checkpoint."""
        return {} if self.order is None else {"order": self.order.get_state()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go on with the pass that comes next there."""
        if self.order is not None:
            self.order.set_state(state["order"])


class Passes:
    """Batches from a loader of another library.

    Parameters
    ----------
    loader : iterable
        Starts anew at every iteration: an scDataset of `Rows`, or a DataLoader.
    n_cells : int
        That one pass gives.
    convert : callable, optional
        From what the loader gives to Cells on the device of the model, where it is not Cells.
    """

    def __init__(
        self,
        loader: Iterable[object],
        n_cells: int,
        *,
        convert: Callable[[object], Cells] | None = None,
    ) -> None:
        self.loader, self.n_cells, self.convert = loader, n_cells, convert

    def __iter__(self) -> Iterator[Cells]:
        """Start a pass."""
        return iter(self.loader) if self.convert is None else map(self.convert, self.loader)


def from_anndata(
    adata: anndata.AnnData,
    *,
    perturbation_key: str,
    control: str | int,
    layer: str | None = None,
    sep: str = "+",
    device: str | torch.device = "cpu",
) -> tuple[Rows, Design]:
    """Read a screen like `smslib.data.from_anndata`, with the same checks, and keep it sparse.

    Parameters
    ----------
    adata : AnnData, (n_cells, n_genes)
        Of a backed one, ``X`` stays in its file, if that can give rows: dense or CSR. Its counts
        are then checked when they are read.
    perturbation_key : str
    control : str or int
    layer : str, optional
    sep : str
    device : str or torch.device
        Where batches are put.

    Returns
    -------
    rows : Rows
        Packed counts in host memory, the dense array that there was, or the file's matrix.
    design : Design

    Raises
    ------
    KeyError, ValueError
        As in `smslib.data.from_anndata`.
    """
    labelled = {"perturbation_key": perturbation_key, "control": control, "sep": sep}
    if layer is None and _gives_rows(adata):
        condition, design = read_design(adata, **labelled)
        return Rows(adata.X, condition, device=device), design
    counts, condition, design = checked(adata, layer=layer, **labelled)
    packed = counts if isinstance(counts, np.ndarray) else Packed.of(counts)
    return Rows(packed, condition, device=device), design


def _gives_rows(adata: anndata.AnnData) -> bool:
    """Say whether the counts lie in a file that gives some rows without reading the others."""
    if not adata.isbacked or adata.is_view:
        return False
    return adata.X is not None and getattr(adata.X, "format", "csr") == "csr"
