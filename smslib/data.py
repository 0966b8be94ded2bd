"""Cells and designs: what a screen measured and what was done to each cell.

Everything downstream of this module trusts its input; `from_anndata` is the only door.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Real, Shaped
from torch import Tensor

from smslib.names import nearest_known, unknown_names

if TYPE_CHECKING:
    import anndata
    import scipy.sparse

__all__ = [
    "LARGEST_COUNT",
    "Batches",
    "Cells",
    "Design",
    "chosen_device",
    "first_of_each",
    "from_anndata",
    "labels",
    "minibatches",
    "no_count",
    "on_design",
    "read_design",
    "seeded",
    "single",
    "split_cells",
    "split_rows",
    "streams",
    "why_not_counts",
]


LARGEST_COUNT = 2**24  # the largest up to which float32 holds every integer
_MISSING_AS_TEXT = ("nan", "NaN", "None", "<NA>")


@dataclass(frozen=True, eq=False)
class Design:
    """Which targets each experimental condition perturbs.

    Parameters
    ----------
    conditions : tuple of str, length n_conditions
        Names; ``conditions[0]`` is the control.
    targets : tuple of str, length n_targets
        What can be perturbed (genes, for a Perturb-seq screen).
    matrix : Tensor, (n_conditions, n_targets)
        Dose of each target, dimensionless; row 0 is zero.

    Raises
    ------
    ValueError
        If the shapes disagree, a name repeats, or the control has a dose.
    """

    conditions: tuple[str, ...]
    targets: tuple[str, ...]
    matrix: Float[Tensor, "condition target"]

    def __post_init__(self) -> None:
        """Check the shapes and the control row."""
        expected = (len(self.conditions), len(self.targets))
        if tuple(self.matrix.shape) != expected:
            raise ValueError(
                f"design matrix has shape {tuple(self.matrix.shape)}, but there are "
                f"{expected[0]} conditions and {expected[1]} targets"
            )
        _refuse_repeats("conditions", self.conditions)
        _refuse_repeats("targets", self.targets)
        if bool(self.matrix[0].any()):
            raise ValueError(
                f"the control {self.conditions[0]!r} (row 0 of the design) has a non-zero dose; "
                "put the unperturbed condition first"
            )

    @classmethod
    def single_target(cls, targets: Sequence[str], *, control: str = "control") -> Design:
        """Return the design in which every condition perturbs the target of its own name."""
        matrix = torch.cat([torch.zeros(1, len(targets)), torch.eye(len(targets))])
        return cls((control, *targets), tuple(targets), matrix)

    @property
    def n_conditions(self) -> int:
        """Number of conditions, the control included."""
        return len(self.conditions)

    @property
    def n_targets(self) -> int:
        """Number of targets."""
        return len(self.targets)

    def extend(self, conditions: Sequence[str]) -> Design:
        """Return a design with new single-target conditions appended; old rows are unchanged."""
        n_new = len(conditions)
        old = torch.nn.functional.pad(self.matrix, (0, n_new))
        new = torch.nn.functional.pad(torch.eye(n_new), (self.n_targets, 0))
        return Design(
            (*self.conditions, *conditions),
            (*self.targets, *conditions),
            torch.cat([old, new.to(old)]),
        )

    def cells_per_target(self, condition: Int[Tensor, " cell"]) -> Float[Tensor, " target"]:
        """Return in how many of the cells with these conditions each target is perturbed."""
        per_condition = torch.bincount(condition.cpu(), minlength=self.n_conditions).float()
        return (self.matrix.cpu() != 0).float().T @ per_condition

    def index(self, conditions: Sequence[str]) -> Int[Tensor, " chosen"]:
        """Return the rows of the named conditions.

        Raises
        ------
        KeyError
            If names are unknown; up to a hundred are listed, with the nearest known ones.
        """
        position = {name: row for row, name in enumerate(self.conditions)}
        if unknown := unknown_names("condition", conditions, position):
            raise KeyError(unknown)
        return torch.tensor([position[name] for name in conditions], dtype=torch.long)

    def to(self, device: str | torch.device) -> Design:
        """Return the design with its matrix on ``device``."""
        return replace(self, matrix=self.matrix.to(device))


@dataclass(frozen=True, eq=False)
class Cells:
    """Counts and condition of a set of cells, all on one device.

    Parameters
    ----------
    counts : Tensor, (n_cells, n_genes)
        UMIs: non-negative integers held as floating point.
    condition : Tensor, (n_cells,)
        Row of ``Design.matrix`` of each cell.
    """

    counts: Float[Tensor, "cell gene"]
    condition: Int[Tensor, " cell"]

    @property
    def library(self) -> Float[Tensor, "cell 1"]:
        """Total UMIs per cell."""
        return self.counts.sum(-1, keepdim=True)

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return self.counts.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the counts live."""
        return self.counts.device

    @property
    def n_genes(self) -> int:
        """Number of genes."""
        return self.counts.shape[1]

    def __len__(self) -> int:
        """Return the number of cells."""
        return self.n_cells

    def __getitem__(self, index: Tensor | slice | np.ndarray) -> Cells:
        """Return the chosen cells, in the order of ``index``."""
        return Cells(self.counts[index], self.condition[index])

    def of(self, conditions: Int[Tensor, " chosen"]) -> Cells:
        """Return the cells of the given condition rows, labels unchanged."""
        return self[torch.isin(self.condition, conditions.to(self.device))]

    def to(self, device: str | torch.device) -> Cells:
        """Return the cells on ``device``."""
        return Cells(self.counts.to(device), self.condition.to(device))


@runtime_checkable
class Batches(Protocol):
    """Cells that come batch by batch, for screens that are too large to be one tensor.

    Every iteration is one pass: it starts anew and gives each cell once, ``n_cells`` in all, on
    the device of the model. The order is the loader's own affair; what is computed per cell comes
    out in it. `smslib.batches` has two loaders.
    """

    n_cells: int

    def __iter__(self) -> Iterator[Cells]:
        """Start a pass."""
        ...


def from_anndata(
    adata: anndata.AnnData,
    *,
    perturbation_key: str,
    control: str | int,
    layer: str | None = None,
    sep: str = "+",
) -> tuple[Cells, Design]:
    """Read counts and conditions from AnnData; the one place where input is validated.

    Parameters
    ----------
    adata : AnnData, (n_cells, n_genes)
        Raw counts (UMIs) in ``X`` or in ``layers[layer]``: dense, CSR, CSC, or backed by a file.
    perturbation_key : str
        Column of ``obs`` that names each cell's condition.
    control : str or int
        The unperturbed condition; it becomes row 0 of the design. Labels that are numbers are
        compared as text.
    layer : str, optional
        Layer that holds the counts; ``X`` by default.
    sep : str
        Separates the targets of a combination (``"KLF1+MAP2K6"``). A part that equals ``control``
        adds no target.

    Returns
    -------
    cells : Cells
        float32 counts, in the order of ``adata``.
    design : Design
        The control first, then the other conditions in alphabetical order.

    Raises
    ------
    KeyError
        If ``perturbation_key`` or ``layer`` does not exist; the nearest names are listed.
    ValueError
        If the control is absent; a label, or a target in it, is missing; cell or gene names, or
        the column of labels, repeat; a condition has no cells; a count is NaN, negative or not an
        integer (the first such cell and gene are named), or above 2**24, where single precision
        ends to hold integers; the matrix holds no real numbers; or a cell has no UMIs.
    """
    counts, condition, design = checked(
        adata, perturbation_key=perturbation_key, control=control, layer=layer, sep=sep
    )
    return Cells(torch.from_numpy(_dense(counts)), condition), design


def checked(
    adata: anndata.AnnData,
    *,
    perturbation_key: str,
    control: str | int,
    layer: str | None,
    sep: str,
) -> tuple[np.ndarray | scipy.sparse.csr_matrix, Int[Tensor, " cell"], Design]:
    """Return counts, dense or CSR, conditions and design, checked: the door of `from_anndata`.

    Parameters
    ----------
    adata : AnnData
    perturbation_key : str
    control : str or int
    layer : str, optional
    sep : str

    Raises
    ------
    KeyError, ValueError
        As in `from_anndata`.
    """
    condition, design = read_design(
        adata, perturbation_key=perturbation_key, control=control, sep=sep
    )
    return _checked_counts(adata, layer), condition, design


def read_design(
    adata: anndata.AnnData, *, perturbation_key: str, control: str | int, sep: str = "+"
) -> tuple[Int[Tensor, " cell"], Design]:
    """Read conditions like `from_anndata`, without a look at the counts.

    Parameters
    ----------
    adata : AnnData
        Its counts may stay in a file.
    perturbation_key : str
    control : str or int
    sep : str

    Returns
    -------
    condition : Tensor, (n_cells,)
        Row of ``design.matrix`` of each cell.
    design : Design

    Raises
    ------
    KeyError, ValueError
        As in `from_anndata`, for names and labels.
    """
    names, control = labels(adata, perturbation_key), str(control)
    if control not in names:
        twin = f"{control}.0"  # of labels that were read as real numbers
        known = np.unique(names)
        hint = f"; there is {twin!r}" if twin in known else nearest_known(control, known)
        raise ValueError(
            f"control {control!r} is not among the conditions of adata.obs[{perturbation_key!r}]"
            f"{hint}"
        )
    _refuse_repeated_names(adata)
    design = _design(names, control, sep)
    row = {name: index for index, name in enumerate(design.conditions)}
    condition = np.fromiter((row[name] for name in names), dtype=np.int64, count=len(names))
    return torch.from_numpy(condition), design


def on_design(
    adata: anndata.AnnData, design: Design, *, perturbation_key: str, layer: str | None = None
) -> Cells:
    """Read cells whose conditions are rows of a design that exists; controls may be absent.

    Parameters
    ----------
    adata : AnnData, (n_cells, n_genes)
    design : Design
    perturbation_key : str
    layer : str, optional
        As in `from_anndata`.

    Returns
    -------
    Cells
        In the order of ``adata``.

    Raises
    ------
    KeyError
        If conditions are not in the design; up to a hundred are listed, with the nearest that
        are. Also if ``perturbation_key`` or ``layer`` does not exist.
    ValueError
        If labels or counts are refused by `from_anndata`.
    """
    names, places = np.unique(labels(adata, perturbation_key), return_inverse=True)
    condition = design.index(names.tolist())[torch.from_numpy(places)]
    _refuse_repeated_names(adata)
    counts = _checked_counts(adata, layer)
    return Cells(torch.from_numpy(_dense(counts)), condition)


def minibatches(
    cells: Cells | Batches,
    batch_size: int,
    *,
    generator: torch.Generator | None = None,
    smallest: int = 1,
) -> Iterator[Cells]:
    """Yield batches by slicing tensors; shuffled when a generator is given, in order otherwise.

    Parameters
    ----------
    cells : Cells or Batches
        Batches are passed on as they come: their size and order are the loader's.
    batch_size : int
    generator : torch.Generator, optional
        A CPU generator, so that the order does not depend on the device.
    smallest : int
        A trailing batch of fewer cells is left out (batch normalisation needs a few cells).

    Raises
    ------
    ValueError
        If a pass over Batches has not given the ``n_cells`` cells that it promised.
    """
    if not isinstance(cells, Cells):
        yield from (batch for batch in _whole_pass(cells) if len(batch) >= smallest)
        return
    n_cells = len(cells)
    order = None
    if generator is not None:
        order = torch.randperm(n_cells, generator=generator).to(cells.device)
    for start in range(0, n_cells, batch_size):
        stop = min(start + batch_size, n_cells)
        if stop - start >= smallest:
            yield cells[slice(start, stop) if order is None else order[start:stop]]


def split_cells(cells: Cells, fractions: Sequence[float], *, seed: int) -> tuple[Cells, ...]:
    """Partition cells, stratified by condition; the parts are disjoint and exhaustive.

    Parameters
    ----------
    cells : Cells
    fractions : sequence of float
        Positive shares that sum to one. Within a condition each part gets its share, to within
        one cell.
    seed : int

    Returns
    -------
    tuple of Cells
        One per fraction, each in the order of ``cells``.

    Raises
    ------
    ValueError
        If the fractions are not positive or do not sum to one.
    """
    parts = split_rows(cells.condition, fractions, seed=seed)
    return tuple(cells[rows.to(cells.device)] for rows in parts)


def split_rows(
    condition: Int[Tensor, " cell"], fractions: Sequence[float], *, seed: int
) -> tuple[Int[Tensor, " chosen"], ...]:
    """Return the positions that `split_cells` gives to each part.

    Parameters
    ----------
    condition : Tensor, (n_cells,)
    fractions : sequence of float
    seed : int

    Raises
    ------
    ValueError
        As in `split_cells`.
    """
    shares = np.asarray(fractions, dtype=float)
    if (shares <= 0).any() or not np.isclose(shares.sum(), 1.0):
        raise ValueError(
            f"fractions are {list(fractions)}; expected positive shares that sum to 1"
        )
    rng = np.random.default_rng(seed)
    names = condition.cpu().numpy()
    part = np.empty(len(names), dtype=np.int64)
    for value in np.unique(names):
        members = rng.permutation(np.flatnonzero(names == value))
        cuts = np.round(np.cumsum(shares)[:-1] * len(members)).astype(int)
        for index, piece in enumerate(np.split(members, cuts)):
            part[piece] = index
    return tuple(torch.from_numpy(np.flatnonzero(part == index)) for index in range(len(shares)))


def chosen_device(name: str) -> torch.device:
    """Return a device by its name.

    Parameters
    ----------
    name : str
        ``"auto"``, the first GPU or, where there is none, the processor; or a name of torch's,
        such as ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.

    Raises
    ------
    ValueError
        If torch finds no GPU to go by that name.
    """
    there = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if there else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not there:
        raise ValueError(
            f"device is {name!r}, but torch {torch.__version__} finds no GPU; pass 'auto' or "
            "'cpu', or install torch for CUDA"
        )
    return device


@contextlib.contextmanager
def seeded(seed: int, device: str | torch.device = "cpu") -> Iterator[None]:
    """Run a block under its own torch seed and restore the global random state on exit.

    Parameters
    ----------
    seed : int
    device : str or torch.device
        Of the block's draws, besides the CPU. No other GPU is touched.
    """
    gpus = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(gpus, device_type="cuda"):
        torch.default_generator.manual_seed(int(seed))  # torch.manual_seed reaches every GPU
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(int(seed))
        yield


def first_of_each(cells: Cells, n: int) -> Int[Tensor, " chosen"]:
    """Return the positions of the first n cells of every condition, condition by condition."""
    rows = cells.condition.unique()
    return torch.cat([(cells.condition == row).nonzero()[:n, 0] for row in rows])


def streams(seed: int, names: Sequence[str]) -> dict[str, np.random.Generator]:
    """Return independent random streams, one for each ingredient of what is drawn.

    Parameters
    ----------
    seed : int
    names : sequence of str
        A stream depends on its place among them: new ones go to the end.

    Returns
    -------
    dict of Generator
        By name.
    """
    children = np.random.SeedSequence(seed).spawn(len(names))
    return {
        name: np.random.default_rng(child) for name, child in zip(names, children, strict=True)
    }


def single(array: np.ndarray) -> Tensor:
    """Return an array as a tensor of single precision."""
    return torch.from_numpy(array.astype(np.float32))


def why_not_counts(counts: np.ndarray | scipy.sparse.csr_matrix) -> str:
    """Say by what a matrix that is not raw counts was noticed, and what it may be instead.

    Parameters
    ----------
    counts : array or CSR, (n_cells, n_genes)

    Returns
    -------
    str
        How many stored values are no counts and the largest value; and, if the first hundred
        cells all add up to the same, as they are or after ``expm1``, that they were normalised.
    """
    values = counts.ravel() if isinstance(counts, np.ndarray) else counts.data
    largest = f"{np.nanmax(values, initial=0):.4g}"
    noticed = (
        f"{int(no_count(values).sum()):,} of {values.size:,} stored values are no counts, and "
        f"the largest value is {largest}"
    )
    first = counts[:100]
    first = np.asarray(first if isinstance(first, np.ndarray) else first.toarray(), dtype=float)
    with np.errstate(over="ignore", invalid="ignore"):
        for sums, kind in ((first.sum(1), "scaled"), (np.expm1(first).sum(1), "log1p-normalised")):
            if len(sums) > 1 and np.isfinite(sums).all() and np.ptp(sums) < 1e-3 * abs(sums[0]):
                return f"{noticed}; every cell adds up to {sums[0]:.6g}: these are {kind} counts"
    return noticed


def _whole_pass(batches: Batches) -> Iterator[Cells]:
    """Yield the batches of one pass, and refuse one that lost or repeated cells."""
    seen = 0
    for batch in batches:
        seen += len(batch)
        yield batch
    if seen != batches.n_cells or not seen:
        raise ValueError(
            f"a pass over the batches gave {seen} cells, their n_cells is {batches.n_cells}; "
            "every iteration has to start anew (a generator does not) and give each cell once"
        )


def no_count(values: Real[np.ndarray, "*shape"]) -> Bool[np.ndarray, "*shape"]:
    """Say which values are no counts: not finite, negative, or not integers.

    Parameters
    ----------
    values : array
    """
    return ~np.isfinite(values) | (values < 0) | (values != np.floor(values))


def _refuse_repeats(what: str, names: Iterable[str]) -> None:
    unique, times = np.unique(np.array(list(names), dtype=str), return_counts=True)
    if (times > 1).any():
        raise ValueError(
            f"{what} are not unique: {unique[times > 1][:3].tolist()} repeat; "
            "make them unique first (AnnData: .obs_names_make_unique(), .var_names_make_unique())"
        )


def _refuse_repeated_names(adata: anndata.AnnData) -> None:
    _refuse_repeats("adata.obs_names", adata.obs_names)
    _refuse_repeats("adata.var_names", adata.var_names)


def labels(adata: anndata.AnnData, key: str) -> Shaped[np.ndarray, " cell"]:
    """Return each cell's condition name, checked.

    Parameters
    ----------
    adata : AnnData
    key : str
        Column of ``obs``.

    Raises
    ------
    KeyError
        If there is no such column; the nearest names are listed.
    ValueError
        If it is there twice, labels are missing, or a category has no cells.
    """
    if key not in adata.obs:
        raise KeyError(
            f"perturbation_key {key!r} is not in adata.obs{nearest_known(key, adata.obs)}"
        )
    column = adata.obs[key]
    if column.ndim > 1:
        raise ValueError(f"adata.obs has {column.shape[1]} columns {key!r}; keep one of them")
    refuse_missing(adata, key)
    if hasattr(column, "cat"):
        empty = sorted(set(column.cat.categories) - set(column.unique()), key=str)
        if empty:
            raise ValueError(
                f"conditions without cells: {empty[:5]}; call "
                f"adata.obs[{key!r}].cat.remove_unused_categories()"
            )
    return column.astype(str).to_numpy()


def refuse_missing(adata: anndata.AnnData, key: str) -> None:
    """Raise a ValueError if cells have no label, which would be read as a condition ``nan``."""
    missing = adata.obs[key].isna()
    if missing.any():
        first = adata.obs_names[int(np.argmax(missing))]
        raise ValueError(
            f"adata.obs[{key!r}] has {int(missing.sum())} missing labels, first in cell "
            f"{first!r}; drop these cells or label them"
        )


def _checked_counts(
    adata: anndata.AnnData, layer: str | None
) -> np.ndarray | scipy.sparse.csr_matrix:
    counts = raw_counts(adata, layer)
    _check_sizes(counts, adata, layer)
    return counts


def raw_counts(adata: anndata.AnnData, layer: str | None) -> np.ndarray | scipy.sparse.csr_matrix:
    """Return the counts in memory, checked; cells without a UMI may be among them.

    Parameters
    ----------
    adata : AnnData, (n_cells, n_genes)
    layer : str or None
        Where they are; ``X`` if None.

    Returns
    -------
    array or CSR, (n_cells, n_genes)
        Repeated entries are added up.

    Raises
    ------
    KeyError
        If there is no such layer.
    ValueError
        If `from_anndata` refuses the values.
    """
    counts = summed(_counts(adata, layer))
    _check_counts(counts, adata, layer)
    return counts


def summed(matrix: np.ndarray | scipy.sparse.spmatrix) -> np.ndarray | scipy.sparse.spmatrix:
    """Return a matrix with repeated entries added up, in a type that holds their sum.

    SciPy adds them up in their own type, which may be too narrow, and in the matrix it is given.

    Parameters
    ----------
    matrix : array, CSR or CSC

    Returns
    -------
    array, CSR or CSC
        ``matrix`` itself, if no entry is repeated or out of order.
    """
    if isinstance(matrix, np.ndarray) or matrix.has_canonical_format:
        return matrix
    widest = {"b": np.uint64, "u": np.uint64, "i": np.int64}.get(matrix.dtype.kind, np.float64)
    wide = matrix.astype(np.promote_types(matrix.dtype, widest))
    wide.sum_duplicates()
    return wide


def _counts(adata: anndata.AnnData, layer: str | None) -> np.ndarray | scipy.sparse.csr_matrix:
    """Return the counts in memory, dense or CSR."""
    from scipy import sparse

    if layer is not None and layer not in adata.layers:
        raise KeyError(
            f"layer {layer!r} is not in adata.layers{nearest_known(layer, adata.layers)}"
        )
    counts = adata.X if layer is None else adata.layers[layer]
    if counts is None:
        raise ValueError(f"adata.X is empty; pass layer=, one of {list(adata.layers)}")
    if hasattr(counts, "to_memory"):  # sparse in a file; AnnData.to_memory would close the file
        counts = counts.to_memory()
    if not sparse.issparse(counts):
        return np.asarray(counts)
    if hasattr(counts, "check_format"):
        counts.check_format()  # scipy trusts the positions, of a damaged file, too
    return sparse.csr_matrix(counts)


def _check_counts(
    counts: np.ndarray | scipy.sparse.csr_matrix, adata: anndata.AnnData, layer: str | None
) -> None:
    """Raise a ValueError that names the first entry which is not a count."""
    values = counts if isinstance(counts, np.ndarray) else counts.data
    where = _place(layer)
    if values.dtype.kind not in "biuf":
        raise ValueError(f"{where} holds values of type {values.dtype}; expected real numbers")
    bad = no_count(values)
    if bad.any():
        cell, gene = _first(bad, counts)
        others = [name for name in (None, *adata.layers) if name != layer]
        raise ValueError(
            f"{where} holds {counts[cell, gene]} for cell {adata.obs_names[cell]!r}, gene "
            f"{adata.var_names[gene]!r}; expected raw counts (non-negative integers). Noticed: "
            f"{why_not_counts(counts)}. {_elsewhere(adata, others)}"
        )


def _place(layer: str | None) -> str:
    return "adata.X" if layer is None else f"adata.layers[{layer!r}]"


def _check_sizes(
    counts: np.ndarray | scipy.sparse.csr_matrix, adata: anndata.AnnData, layer: str | None
) -> None:
    """Raise a ValueError for a count too large for single precision, or a cell without any."""
    largest = (counts if isinstance(counts, np.ndarray) else counts.data).max(initial=0)
    if largest > LARGEST_COUNT:
        raise ValueError(
            f"{_place(layer)} holds {largest:.8g}; expected counts up to {LARGEST_COUNT:,}, which "
            "single precision holds exactly"
        )
    empty = np.asarray(counts.sum(1)).ravel() == 0
    if empty.any():
        first = adata.obs_names[int(empty.argmax())]
        raise ValueError(
            f"{int(empty.sum())} cells have no UMIs, first {first!r}; remove them "
            "(scanpy.pp.filter_cells(adata, min_counts=1))"
        )


def _elsewhere(adata: anndata.AnnData, layers: Sequence[str | None]) -> str:
    """Say where counts may be, if not where they were looked for."""
    hint = f"Pass layer= if they are elsewhere (available: {layers})"
    raw = "; adata.raw is there as well: adata.raw.to_adata()"
    return hint if adata.raw is None else hint + raw


def _first(bad: np.ndarray, counts: np.ndarray | scipy.sparse.csr_matrix) -> tuple[int, int]:
    """Return cell and gene of the first offending entry."""
    if isinstance(counts, np.ndarray):
        cell, gene = np.argwhere(bad)[0]
        return int(cell), int(gene)
    position = int(bad.argmax())
    cell = int(np.searchsorted(counts.indptr, position, side="right")) - 1
    return cell, int(counts.indices[position])


def _dense(counts: np.ndarray | scipy.sparse.csr_matrix) -> Float[np.ndarray, "cell gene"]:
    if isinstance(counts, np.ndarray):
        return np.array(counts, dtype=np.float32, order="C")
    return counts.astype(np.float32).toarray()


def _check_spelling(targets: Sequence[str]) -> None:
    """Refuse targets that are others with blanks around them, or missing labels made text."""
    odd = [name for name in targets if name != name.strip() or name in _MISSING_AS_TEXT]
    if odd:
        raise ValueError(
            f"targets {odd[:5]} have blanks around their names or are missing labels turned into "
            "text; strip the labels (adata.obs[key].str.strip()), give separators without blanks, "
            "and drop cells without a label"
        )


def _design(labels: np.ndarray, control: str, sep: str) -> Design:
    """Build the design of the conditions found, control first, targets in alphabetical order."""
    conditions = [control, *sorted(set(labels) - {control})]
    parts = [
        [] if name == control else [part for part in name.split(sep) if part != control]
        for name in conditions
    ]
    targets = sorted({part for names in parts for part in names})
    _check_spelling(targets)
    if "" in targets:
        nameless = [name for name, found in zip(conditions, parts, strict=True) if "" in found]
        raise ValueError(
            f"conditions {nameless[:5]} have a target without a name; correct the labels, or pass "
            f"another sep= than {sep!r}"
        )
    matrix = torch.zeros(len(conditions), len(targets))
    column = {name: index for index, name in enumerate(targets)}
    for row, names in enumerate(parts):
        for name in names:
            matrix[row, column[name]] = 1.0
    return Design(tuple(conditions), tuple(targets), matrix)
