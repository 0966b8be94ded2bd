"""Cells and genes cut out of .h5ad files of any size, in blocks of bounded memory.

`cut` reads dense, CSR and CSC matrices at about the speed of the disk, goes on where a killed call
stopped, and compares what it wrote with what it read.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int, Integer

from smslib import files, untrusted
from smslib.data import summed, why_not_counts
from smslib.names import nearest_known

if TYPE_CHECKING:
    import h5py
    import pandas as pd
    from scipy import sparse

__all__ = [
    "BLOCK",
    "absent",
    "annotations",
    "column",
    "columns",
    "cut",
    "fingerprint",
    "opened",
    "row_blocks",
    "simulated",
]

BLOCK = 1 << 26  # bytes of the source that are in memory at once

_BRIDGE = 1 << 16  # unwanted bytes between wanted ones that cost less to read than to skip
_DENSITY = 0.5  # assumed share of non-zero counts where the file does not tell
_ON_DISK = 8  # bytes per count: part (1 + 2) and result (1 + 4)
_ARRAYS = ("counts", "genes", "lengths")  # of a band, in a part
_TOO_LARGE = 1 << 63  # of a count
_FORMAT = 1  # of the parts; another number makes old parts worthless


# ------------------------------------------------------------------------------------ the cut


def cut(
    path: str | os.PathLike[str],
    *,
    cells: np.ndarray,
    genes: np.ndarray,
    out: str | os.PathLike[str],
    obs: pd.DataFrame | None = None,
    var: pd.DataFrame | None = None,
    uns: Mapping[str, Any] | None = None,
    layer: str | None = None,
    block: int = BLOCK,
) -> Path:
    """Copy the chosen cells and genes of an .h5ad file into a new one, block by block.

    Whatever the size of the file, a few blocks are in memory at once, besides one number per cell.
    Finished blocks lie in the folder ``<out>.part``; a call that was killed goes on after them
    when it is repeated. The result is read back and compared block by block, then moved to
    ``out``.

    Parameters
    ----------
    path : path
        ``X``, or a layer, holds raw UMIs: dense (contiguous or in compressed chunks), CSR or CSC,
        of any numeric type. The other matrices, ``obsm`` and the like are left behind.
    cells, genes : array
        Boolean masks, or positions in the file in ascending order.
    out : path
        The file to write; ``X`` is CSR of the smallest unsigned integer type that holds the
        counts.
    obs, var : DataFrame, optional
        Annotations of the chosen cells and genes; by default the source's.
    uns : mapping, optional
        Unstructured annotations. ``uns["simulated"]`` of the source is always passed on.
    layer : str, optional
        The layer to cut; by default ``X``. It becomes ``X`` of the result.
    block : int
        Bytes of the source read at a time. Memory is up to about ten times that.

    Returns
    -------
    Path
        ``out``.

    Raises
    ------
    FileNotFoundError
        If there is no source.
    FileExistsError
        If ``out`` exists.
    KeyError
        If there is no such layer; the nearest are listed.
    ValueError
        If the source is damaged or no .h5ad; a choice is neither mask nor positions, empty, out
        of order or out of range; an annotation has another length; or a value is not a count (it
        is said how that shows).
    OSError
        If the disk is full, or will be, or does not keep what is written.

    Notes
    -----
    Processes that write the same ``out`` take turns (not on Windows): the first one makes it, and
    the others then find that it exists.
    """
    path, out = Path(path), absent(out)
    with opened(path, needs_x=layer is None) as file:
        matrix = file["X"] if layer is None else _stored_layer(file, layer)
        with _damage_explained(path):
            layout = _layout(matrix, block)
        rows = _positions(cells, layout.shape[0], "cells")
        columns = _positions(genes, layout.shape[1], "genes")
        obs = _annotation(obs, file["obs"], rows, "obs")
        var = _annotation(var, file["var"], columns, "var")
        with _damage_explained(path):
            plan = _Plan.of(layout, rows, columns, block)
        _check_room(out, layout, plan)
        with (
            _full_disk_explained(out),
            _parts(out, fingerprint(path, rows, columns, block, layer)) as at,
        ):
            _write_parts(at, layout, plan, path=path, label=out.name)
            with files.whole(out, folder=at) as draft:
                _assemble(draft, at, plan, obs, var, {**simulated(file), **(uns or {})})
    return out


def absent(out: str | os.PathLike[str]) -> Path:
    """Return a path that nothing lies at yet, its folder made; refuse any other."""
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists; delete it or write to another file (out=)")
    out.parent.mkdir(parents=True, exist_ok=True)
    return out


@contextlib.contextmanager
def opened(path: Path, *, needs_x: bool = True) -> Iterator[h5py.File]:
    """Open an .h5ad file, refusing whatever is not one."""
    import h5py

    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; fetch it or correct the name")
    try:
        file = h5py.File(path, "r")
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) cannot be read as HDF5 ({error}); it is cut "
            "short or another kind of file. Expected an .h5ad: fetch it again"
        ) from error
    with file:
        with _damage_explained(path):
            untrusted.check_hdf5(file)
        needed = ("X", "obs", "var") if needs_x else ("obs", "var")
        missing = [name for name in needed if name not in file]
        if missing:
            raise ValueError(
                f"{path} has no {missing}, but {sorted(file)}; expected an .h5ad as anndata "
                f"writes it{_said_of(_layers(file))}"
            )
        if any(not isinstance(file[name], h5py.Group) for name in ("obs", "var")):
            raise ValueError(
                f"{path} keeps obs and var in the form of anndata before 0.7; write it again: "
                "smslib.perturbseq.read_h5ad(path).write_h5ad(another_path)"
            )
        yield file


def _layers(file: h5py.File) -> list[str]:
    layers = file.get("layers")
    return sorted(layers) if isinstance(layers, Mapping) else []


def _said_of(layers: Sequence[str]) -> str:
    return f". It has layers {layers}: streaming.cut(layer=) takes one" if layers else ""


def _stored_layer(file: h5py.File, layer: str) -> h5py.Dataset | h5py.Group:
    layers = _layers(file)
    if layer not in layers:
        raise KeyError(f"layer {layer!r} is not in {file.filename}{nearest_known(layer, layers)}")
    return file["layers"][layer]


@contextlib.contextmanager
def _damage_explained(path: str | os.PathLike[str]) -> Iterator[None]:
    """Say that a file is damaged, whatever that led its readers to."""
    try:
        yield
    except (MemoryError, OSError, ValueError):
        raise
    except Exception as error:  # a bad file leads its readers to errors of all kinds
        raise ValueError(
            f"{path} is damaged, or not as anndata writes it ({type(error).__name__}: {error}); "
            "fetch it again"
        ) from error


def _positions(chosen: np.ndarray, size: int, what: str) -> Int[np.ndarray, " chosen"]:
    """Return positions of what is chosen, checked."""
    chosen = np.asarray(chosen)
    if chosen.ndim != 1 or (chosen.size and chosen.dtype.kind not in "biu"):
        raise ValueError(
            f"{what} has shape {chosen.shape} and holds values of type {chosen.dtype}; expected a "
            "boolean mask or positions in the file (integers), such as np.isin(names, wanted) or "
            "np.asarray(mask, dtype=bool)"
        )
    if chosen.dtype == bool:
        if len(chosen) != size:
            raise ValueError(f"{what} is a mask of {len(chosen):,}, but the file has {size:,}")
        chosen = np.flatnonzero(chosen)
    chosen = chosen.astype(np.int64)
    if not len(chosen):
        raise ValueError(f"no {what} are chosen of the {size:,} in the file; relax a rule")
    if (np.diff(chosen) <= 0).any() or chosen[0] < 0 or chosen[-1] >= size:
        raise ValueError(
            f"{what} from {chosen.min():,} to {chosen.max():,} are not ascending positions below "
            f"{size:,}; pass a mask or np.unique of the positions"
        )
    return chosen


def _annotation(
    given: pd.DataFrame | None, group: h5py.Group, positions: np.ndarray, name: str
) -> pd.DataFrame:
    """Return the annotations to write, with unique names."""
    frame = annotations(group, positions) if given is None else given.copy()
    if len(frame) != len(positions):
        raise ValueError(
            f"{name} has {len(frame):,} rows for {len(positions):,} chosen; pass one row for each"
        )
    frame.index = _unique(frame.index)
    if frame.index.name in frame:  # anndata writes one of the two
        frame.index.name = None
    return frame


def _unique(names: pd.Index) -> pd.Index:
    """Return the names as strings, repeated ones numbered (``TBCE``, ``TBCE-1``)."""
    from anndata.utils import make_index_unique

    names = names.astype(str)
    return names if names.is_unique else make_index_unique(names)


# --------------------------------------------------------------------- annotations in the file


def columns(group: h5py.Group) -> list[str]:
    """Return the names of the columns of ``obs`` or ``var``."""
    return [_text(name) for name in group.attrs["column-order"]]


def index_name(group: h5py.Group) -> str:
    """Return the name of the column of ``obs`` or ``var`` that names the cells or genes."""
    return _text(group.attrs["_index"])


def _text(attribute: str | bytes) -> str:
    """Return an attribute of HDF5, which is bytes if it was written with a fixed length."""
    return attribute.decode() if isinstance(attribute, bytes) else str(attribute)


def column(group: h5py.Group, name: str) -> Any:  # noqa: ANN401 (array, categorical, ...)
    """Read one column of ``obs`` or ``var``, of anndata's present form or that of before 0.8."""
    import pandas as pd
    from anndata.io import read_elem

    item = group[name]
    if "encoding-type" in item.attrs:
        return read_elem(item)
    if "categories" not in item.attrs:
        return _plain(item)
    return pd.Categorical.from_codes(item[...], _plain(item.file[item.attrs["categories"]]))


def _plain(item: h5py.Dataset) -> np.ndarray:
    """Read an array that says nothing about itself."""
    import h5py

    return item.asstr()[...] if h5py.check_string_dtype(item.dtype) else item[...]


def annotations(group: h5py.Group, positions: np.ndarray) -> pd.DataFrame:
    """Read the chosen rows of ``obs`` or ``var``, column by column; unused categories go."""
    import pandas as pd

    def chosen(name: str) -> Any:  # noqa: ANN401 (array, categorical, ...)
        return pd.Series(column(group, name)).iloc[positions].array

    with _damage_explained(group.file.filename):
        name = index_name(group)
        index = pd.Index(np.asarray(column(group, name))[positions])
        index.name = None if name == "_index" else name  # what anndata calls one without a name
        frame = pd.DataFrame({name: chosen(name) for name in columns(group)}, index=index)
    for name in frame.select_dtypes("category"):
        frame[name] = frame[name].cat.remove_unused_categories()
    return frame


def simulated(file: h5py.File) -> dict[str, Any]:
    """Return the mark of a simulated file, to be passed on."""
    from anndata.io import read_elem

    with _damage_explained(file.filename):
        if "simulated" not in file.get("uns", ()):
            return {}
        return {"simulated": read_elem(file["uns"]["simulated"])}


# ------------------------------------------------------------------------------------- layouts


@runtime_checkable
class _Layout(Protocol):
    """How a matrix lies in the file: in which tiles to read it, and how to read one."""

    x: h5py.Dataset | h5py.Group
    shape: tuple[int, int]
    density: float

    def tiles(self, cells: np.ndarray, genes: np.ndarray) -> list[_Tile]:
        """Cut the chosen cells and genes into tiles of at most a block each."""

    def read(self, cells: np.ndarray, genes: np.ndarray) -> sparse.csr_matrix:
        """Read the chosen cells and genes of one tile."""

    def extents(self, cells: np.ndarray, genes: np.ndarray) -> list[tuple[int, int]]:
        """Return offset and length of the bytes that `read` will ask for, if known."""


@dataclass(frozen=True)
class _Tile:
    """A rectangle of the result."""

    cells: slice
    genes: slice


def _layout(x: h5py.Dataset | h5py.Group, block: int) -> _Layout:
    """Recognise how a matrix is stored."""
    import h5py

    if isinstance(x, h5py.Dataset) and x.ndim == 2 and x.dtype.kind in "fiub":
        return _Dense(x, block)
    kind = _text(x.attrs.get("encoding-type", x.attrs.get("h5sparse_format", "")))
    if kind.removesuffix("_matrix") in ("csr", "csc"):
        return _Compressed(x, block, by_cell=kind.startswith("csr"))
    raise ValueError(
        f"{_place(x)} is stored as {kind or type(x).__name__!r}; expected numbers, dense with two "
        "axes, CSR or CSC. Write it again with anndata"
    )


def _place(x: h5py.Dataset | h5py.Group) -> str:
    """Say where a matrix lies: file, and ``X`` or ``layers/counts``."""
    return f"{x.file.filename}: {x.name.removeprefix('/')}"


class _Dense:
    """A dense matrix: contiguous, or in chunks that have to be read whole."""

    def __init__(self, x: h5py.Dataset, block: int) -> None:
        self.x, self.shape, self.density = x, x.shape, _DENSITY
        self.row_bytes = x.shape[1] * x.dtype.itemsize
        rows, columns = x.chunks or (1, x.shape[1])
        self.height = rows * max(1, block // (rows * self.row_bytes))
        self.width = x.shape[1]
        if rows * self.row_bytes > block:
            self.width = columns * max(1, block // (rows * columns * x.dtype.itemsize))
        self.scratch = np.empty(
            min(self.height, x.shape[0]) * min(self.width, x.shape[1]),
            x.dtype.newbyteorder("="),
        )

    def tiles(self, cells: np.ndarray, genes: np.ndarray) -> list[_Tile]:
        # Of chunks all that is in a tile is read, of contiguous rows only what is wanted.
        row = cells if self.x.chunks else np.arange(len(cells))
        down, across = _pieces(row // self.height), _pieces(genes // self.width)
        return [_Tile(some, others) for some in down for others in across]

    def read(self, cells: np.ndarray, genes: np.ndarray) -> sparse.csr_matrix:
        first, last = (genes[0], genes[-1] + 1) if self.x.chunks else (0, self.shape[1])
        chosen = np.empty((len(cells), len(genes)), self.scratch.dtype)
        for run in self._runs(cells):
            start, stop = cells[run.start], cells[run.stop - 1] + 1
            size = (int(stop - start), int(last - first))
            tile = self.scratch[: size[0] * size[1]].reshape(size)
            self.x.read_direct(tile, np.s_[start:stop, first:last])
            _take(tile, cells[run] - start, genes - first, out=chosen[run])
        return _nonzero(chosen)

    def extents(self, cells: np.ndarray, genes: np.ndarray) -> list[tuple[int, int]]:
        offset = self.x.id.get_offset()
        if offset is None:
            return []
        ends = [(cells[run.start], cells[run.stop - 1] + 1) for run in self._runs(cells)]
        width = self.row_bytes
        return [(offset + int(a) * width, int(b - a) * width) for a, b in ends]

    def _runs(self, cells: np.ndarray) -> list[slice]:
        if self.x.chunks:
            return [slice(0, len(cells))]
        starts = cells * self.row_bytes
        return _runs(
            starts,
            starts + self.row_bytes,
            bridge=_BRIDGE,
            longest=self.height * self.row_bytes,
        )


class _Compressed:
    """A CSR matrix (rows are cells) or a CSC matrix (rows are genes)."""

    def __init__(self, x: h5py.Group, block: int, *, by_cell: bool) -> None:
        shape = x.attrs.get("shape", x.attrs.get("h5sparse_shape"))
        self.x, self.shape = x, (int(shape[0]), int(shape[1]))
        self.values, self.indices = x["data"], x["indices"]
        self.indptr = x["indptr"][...].astype(np.int64)  # entries times bytes go beyond 32 bits
        self.block, self.by_cell = block, by_cell
        self.entry = self.values.dtype.itemsize + self.indices.dtype.itemsize
        self.density = len(self.values) / max(1, self.shape[0] * self.shape[1])

    def tiles(self, cells: np.ndarray, genes: np.ndarray) -> list[_Tile]:
        wanted = cells if self.by_cell else genes
        entries = np.cumsum(self.indptr[wanted + 1] - self.indptr[wanted])
        pieces = _pieces(entries * self.entry // self.block)
        if self.by_cell:
            return [_Tile(piece, slice(0, len(genes))) for piece in pieces]
        return [_Tile(slice(0, len(cells)), piece) for piece in pieces]

    def read(self, cells: np.ndarray, genes: np.ndarray) -> sparse.csr_matrix:
        from scipy import sparse

        rows, columns = (cells, genes) if self.by_cell else (genes, cells)
        parts = [self._read_run(rows[run], columns) for run in self._runs(rows)]
        stacked = summed(sparse.vstack(parts, format="csr"))
        whole = stacked if self.by_cell else stacked.T.tocsr()
        whole.eliminate_zeros()
        return whole

    def extents(self, cells: np.ndarray, genes: np.ndarray) -> list[tuple[int, int]]:
        rows, found = (cells if self.by_cell else genes), []
        for item in (self.values, self.indices):
            offset, width = item.id.get_offset(), item.dtype.itemsize
            if offset is not None:
                ends = [self._entries(rows[run]) for run in self._runs(rows)]
                found += [(offset + a * width, (b - a) * width) for a, b in ends]
        return found

    def _runs(self, rows: np.ndarray) -> list[slice]:
        # A run that begins within a chunk has to unpack all of it.
        bridge = max(_BRIDGE, (self.values.chunks or (0,))[0] * self.entry)
        starts, stops = self.indptr[rows] * self.entry, self.indptr[rows + 1] * self.entry
        return _runs(starts, stops, bridge=bridge, longest=self.block)

    def _entries(self, rows: np.ndarray) -> tuple[int, int]:
        return int(self.indptr[rows[0]]), int(self.indptr[rows[-1] + 1])

    def _read_run(self, rows: np.ndarray, columns: np.ndarray) -> sparse.csr_matrix:
        from scipy import sparse

        (start, stop), first = self._entries(rows), rows[0]
        indptr = self.indptr[first : rows[-1] + 2] - start
        across = self.shape[1] if self.by_cell else self.shape[0]
        read = (_of_scipy(self.values[start:stop]), self.indices[start:stop], indptr)
        run = sparse.csr_matrix(read, shape=(len(indptr) - 1, across))
        run.check_format()  # else scipy trusts positions that lead out of the matrix
        run = run if len(rows) == run.shape[0] else run[rows - first]
        return run if len(columns) == across else run[:, columns]


def _of_scipy(values: np.ndarray) -> np.ndarray:
    """Return values in a type that scipy has, of the machine's byte order."""
    kind = values.dtype.newbyteorder("=")
    return values.astype(np.float32 if kind == np.float16 else kind, copy=False)


def row_blocks(path: Path, *, block: int = BLOCK) -> Iterator[sparse.csr_matrix]:
    """Yield the matrix of a file that `cut` wrote, some cells at a time.

    Raises
    ------
    ValueError
        If the file is not CSR.
    """
    with opened(path) as file:
        layout = _layout(file["X"], block)
        if not isinstance(layout, _Compressed) or not layout.by_cell:
            raise ValueError(f"{path}: X is not CSR; pass a file that streaming.cut wrote")
        cells, genes = map(np.arange, layout.shape)
        for tile in layout.tiles(cells, genes):
            yield layout.read(cells[tile.cells], genes)


def _pieces(*keys: np.ndarray) -> list[slice]:
    """Cut a sequence wherever one of its keys changes."""
    change = np.any([np.diff(key) != 0 for key in keys], axis=0)
    edges = [0, *(np.flatnonzero(change) + 1).tolist(), len(keys[0])]
    return [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]


def _runs(starts: np.ndarray, stops: np.ndarray, *, bridge: int, longest: int) -> list[slice]:
    """Join neighbours unless more than ``bridge`` bytes lie between them; cut at ``longest``."""
    new = np.concatenate([[True], starts[1:] - stops[:-1] > bridge])
    run = np.cumsum(new) - 1
    begin = starts[new][run]
    return _pieces(run, np.maximum(stops - begin - 1, 0) // longest)


def _take(tile: np.ndarray, rows: np.ndarray, columns: np.ndarray, *, out: np.ndarray) -> None:
    """Copy the chosen rows and columns of a tile."""
    some = tile if len(rows) == len(tile) else tile[rows]
    if len(columns) == tile.shape[1]:
        out[...] = some
    else:
        np.take(some, columns, axis=1, out=out, mode="clip")  # "raise" would buffer the output


def _nonzero(dense: np.ndarray) -> sparse.csr_matrix:
    """Return a dense block as CSR; five times as fast as scipy's constructor."""
    from scipy import sparse

    mask = dense != 0
    flat = np.flatnonzero(mask)
    indptr = np.concatenate([[0], np.cumsum(np.count_nonzero(mask, axis=1))])
    columns = (flat.astype(np.uint32) if dense.size < 1 << 32 else flat) % dense.shape[1]
    values = dense.ravel()[flat]
    return sparse.csr_matrix((values, columns.astype(np.int32), indptr), shape=dense.shape)


# --------------------------------------------------------------------------------------- parts


@dataclass(frozen=True)
class _Plan:
    """What to read tile by tile, and in which bands of cells to put it together."""

    cells: np.ndarray
    genes: np.ndarray
    tiles: list[_Tile]
    bands: list[slice]

    @classmethod
    def of(cls, layout: _Layout, cells: np.ndarray, genes: np.ndarray, block: int) -> _Plan:
        """Plan a cut; bands are tiles' rows, halved where a band of all genes were too large."""
        tiles = layout.tiles(cells, genes)
        step = max(1, block // (_ON_DISK * len(genes)))
        tall = dict.fromkeys((tile.cells.start, tile.cells.stop) for tile in tiles)
        edges = [
            (a, min(a + step, stop)) for start, stop in tall for a in range(start, stop, step)
        ]
        return cls(cells, genes, tiles, [slice(a, b) for a, b in edges])

    def within(self, tile: _Tile) -> dict[int, slice]:
        """Return the bands of a tile, by number."""
        top, bottom = tile.cells.start, tile.cells.stop
        return {n: b for n, b in enumerate(self.bands) if top <= b.start < bottom}

    def across(self, band: slice) -> list[int]:
        """Return the tiles that hold a band, from its first genes to its last."""
        return [
            number
            for number, tile in enumerate(self.tiles)
            if tile.cells.start <= band.start < tile.cells.stop
        ]


def fingerprint(
    path: Path, cells: np.ndarray, genes: np.ndarray, block: int, layer: str | None = None
) -> dict[str, Any]:
    """Describe a cut so that parts of another one are never taken for its own."""
    stat = path.stat()
    of_layer = {} if layer is None else {"layer": layer}
    return {
        **of_layer,
        "format": _FORMAT,
        "bytes": stat.st_size,
        "changed": stat.st_mtime_ns,
        "cells": hashlib.sha256(cells.tobytes()).hexdigest(),
        "genes": hashlib.sha256(genes.tobytes()).hexdigest(),
        "block": block,
    }


@contextlib.contextmanager
def _parts(out: Path, made_of: Mapping[str, Any]) -> Iterator[Path]:
    """Lend the folder of finished parts; it outlives only what a repetition can mend."""
    folder = _folder(out)
    with files.alone(folder, partial(folder.mkdir, parents=True, exist_ok=True)):
        _begin(folder, made_of)
        try:
            absent(out)  # another process may have been faster
            yield folder
        except (FileExistsError, ValueError):
            shutil.rmtree(folder)
            raise
        shutil.rmtree(folder)


def _folder(out: Path) -> Path:
    return out.with_name(out.name + ".part")


def _begin(folder: Path, made_of: Mapping[str, Any]) -> None:
    """Leave in the folder nothing but finished parts of this very cut."""
    manifest = folder / "manifest.json"
    ours = manifest.exists() and manifest.read_text() == json.dumps(made_of)
    for stale in folder.glob(".*.tmp" if ours else "*"):  # drafts of a killed call
        stale.unlink()
    if ours:
        return
    with files.whole(manifest) as draft:
        draft.write_text(json.dumps(made_of))


def _write_parts(folder: Path, layout: _Layout, plan: _Plan, *, path: Path, label: str) -> None:
    """Read the tiles that no sound part holds yet, each into a part of its own."""
    from tqdm import tqdm

    todo = [number for number in range(len(plan.tiles)) if not _sound(_part(folder, number))]
    done = len(plan.tiles) - len(todo)
    bar = tqdm(total=len(plan.tiles), initial=done, desc=label, unit="block", disable=None)
    with bar, path.open("rb") as ahead:
        for place, number in enumerate(todo):
            if place == 0:
                _announce(ahead, layout, plan, todo[:1])
            _announce(ahead, layout, plan, todo[place + 1 : place + 2])
            _write_part(_part(folder, number), layout, plan, plan.tiles[number], path)
            bar.update()


def _announce(file: Any, layout: _Layout, plan: _Plan, numbers: Sequence[int]) -> None:  # noqa: ANN401
    """Tell the system which bytes come next, so that the disk works while we count."""
    if not hasattr(os, "posix_fadvise"):
        return
    for number in numbers:
        tile = plan.tiles[number]
        for offset, length in layout.extents(plan.cells[tile.cells], plan.genes[tile.genes]):
            os.posix_fadvise(file.fileno(), offset, length, os.POSIX_FADV_WILLNEED)


def _part(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.npz"


def _sound(part: Path) -> bool:
    """Say whether a part is there and its checksums hold."""
    try:
        with zipfile.ZipFile(part) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def _write_part(part: Path, layout: _Layout, plan: _Plan, tile: _Tile, path: Path) -> None:
    """Read a tile, check it and store it band by band."""
    cells, genes = plan.cells[tile.cells], plan.genes[tile.genes]
    try:
        with _damage_explained(path):
            block = layout.read(cells, genes)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read between cells {cells[0]:,} and {cells[-1]:,} ({error}); the "
            "file is damaged: fetch it again"
        ) from error
    block.data = _counted(block, cells, genes, layout.x)
    arrays = {"summary": np.zeros((len(plan.bands), 3), dtype=np.int64)}
    for number, band in plan.within(tile).items():
        rows = block[band.start - tile.cells.start : band.stop - tile.cells.start]
        summary = (rows.nnz, rows.data.sum(dtype=np.int64), rows.data.max(initial=0))
        arrays["summary"][number] = summary
        arrays[f"counts-{number}"] = rows.data
        arrays[f"genes-{number}"] = rows.indices.astype(np.min_scalar_type(len(genes)))
        arrays[f"lengths-{number}"] = np.diff(rows.indptr)
    # Not flushed: a part that a power cut spoils fails its checksum.
    with files.whole(part, flush=False) as draft, draft.open("wb") as file:
        np.savez(file, **arrays)


def _counted(
    block: sparse.csr_matrix,
    cells: np.ndarray,
    genes: np.ndarray,
    x: h5py.Dataset | h5py.Group,
) -> Integer[np.ndarray, " entry"]:
    """Return the values as the smallest unsigned integers that hold them, or refuse."""
    values = block.data
    largest = values.max(initial=0).item()
    # NaN is not below anything; what int64 cannot hold does not come back from it equal.
    kind = np.min_scalar_type(int(largest)) if largest < _TOO_LARGE else np.int64
    with np.errstate(invalid="ignore"):
        counts = values.astype(kind)
    wrong = (counts != values) | (values < 0)
    if wrong.any():
        raise ValueError(_not_counts(block, wrong, cells, genes, x))
    return counts


def _not_counts(
    block: sparse.csr_matrix,
    wrong: Bool[np.ndarray, " entry"],
    cells: np.ndarray,
    genes: np.ndarray,
    x: h5py.Dataset | h5py.Group,
) -> str:
    """Say which value is no count, and what the values look like."""
    values, first = block.data, int(wrong.argmax())
    row = int(np.searchsorted(block.indptr, first, side="right")) - 1
    where = f"cell {cells[row]:,}, gene {genes[block.indices[first]]:,} (positions in the file)"
    finite = values[np.isfinite(values)]
    if len(finite) < len(values):
        guess = "some are missing or infinite"
    elif finite.min() < 0:
        guess = "some are negative, as after centring or scaling"
    elif finite.max() < 20:
        guess = "all are small fractions, as after log1p of normalised counts"
    else:
        guess = "some are large fractions, as after normalising each cell's total"
    return (
        f"{_place(x)} holds {values[first]} for {where}. Noticed: {why_not_counts(block)}; "
        f"{guess}. Expected raw UMIs (non-negative whole numbers): take the raw file"
        f"{_said_of([name for name in _layers(x.file) if name != x.name.split('/')[-1]])}"
    )


def _check_room(out: Path, layout: _Layout, plan: _Plan) -> None:
    need = int(_ON_DISK * layout.density * len(plan.cells) * len(plan.genes)) - _taken(out)
    what = f"{len(plan.cells):,} cells x {len(plan.genes):,} genes and their parts"
    advice = "Free some, or write elsewhere (out=)"
    files.check_room(out.parent, need, what=what, advice=advice)


def _taken(out: Path) -> int:
    """Return the bytes that an earlier call left: they are used or make room."""
    with contextlib.suppress(FileNotFoundError):  # another process has just finished
        return sum(left.stat().st_size for left in _folder(out).glob("*"))
    return 0


@contextlib.contextmanager
def _full_disk_explained(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC and "No space left" not in str(error):
            raise
        raise OSError(
            errno.ENOSPC,
            f"the disk of {out.parent} is full; what is done is kept in {out.name}.part. Free "
            "some space and call again: it goes on from there",
        ) from error


# ------------------------------------------------------------------------------------ assembly


def _assemble(
    draft: Path,
    folder: Path,
    plan: _Plan,
    obs: pd.DataFrame,
    var: pd.DataFrame,
    uns: Mapping[str, Any],
) -> None:
    """Put the parts together as one .h5ad and read it back."""
    import h5py
    from anndata import AnnData

    AnnData(obs=obs, var=var, uns=dict(uns)).write_h5ad(draft)
    summary, largest = 0, 0
    for found in (_summary(folder, number) for number in range(len(plan.tiles))):
        summary, largest = summary + found, max(largest, int(found[:, 2].max()))
    with h5py.File(draft, "r+") as file:
        _write_csr(file, folder, plan, int(summary[:, 0].sum()), np.min_scalar_type(largest))
    with h5py.File(draft, "r") as file:
        _verify(file["X"], plan, summary)


def _summary(folder: Path, number: int) -> Int[np.ndarray, "band 3"]:
    """Return entries, UMIs and largest count of each band of a part, as counted when read."""
    with np.load(_part(folder, number)) as part:
        return part["summary"]


def _write_csr(file: h5py.File, folder: Path, plan: _Plan, entries: int, dtype: np.dtype) -> None:
    """Write ``X`` band by band, in the form that anndata gives a CSR matrix."""
    index = np.int32 if entries < 1 << 31 else np.int64  # scipy wants both alike
    if "X" in file:
        del file["X"]
    x = file.create_group("X")
    x.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
    x.attrs["shape"] = np.array([len(plan.cells), len(plan.genes)])
    values = x.create_dataset("data", entries, dtype)
    indices = x.create_dataset("indices", entries, index)
    indptr = np.zeros(len(plan.cells) + 1, dtype=np.int64)
    parts = [_Part.of(_part(folder, n), plan.within(tile)) for n, tile in enumerate(plan.tiles)]
    at = 0
    for band in plan.bands:
        rows = _band(parts, plan, band)
        values[at : at + rows.nnz] = rows.data
        indices[at : at + rows.nnz] = rows.indices
        indptr[band.start + 1 : band.stop + 1] = at + rows.indptr[1:]
        at += rows.nnz
    x.create_dataset("indptr", data=indptr.astype(index))


@dataclass(frozen=True)
class _Part:
    """Where the arrays of a part lie: offset, size and checksum of each, band by band.

    Every gene of a CSC matrix is in another part, so that all parts are read for every band; to
    list each time what is in them would take a hundred times as long as to read it.
    """

    path: Path
    places: Iterator[Int[np.ndarray, "array 3"]]

    @classmethod
    def of(cls, path: Path, bands: Iterable[int]) -> _Part:
        """Find the arrays of some bands."""
        with zipfile.ZipFile(path) as archive:
            found = [[archive.getinfo(f"{name}-{n}.npy") for name in _ARRAYS] for n in bands]
        places = [[(m.header_offset, m.file_size, m.CRC) for m in members] for members in found]
        return cls(path, iter(np.array(places)))

    def next_band(self) -> Iterator[np.ndarray]:
        """Read the arrays of the next band, which are not packed, and check them."""
        with self.path.open("rb") as file:
            for offset, size, checksum in next(self.places).tolist():
                file.seek(offset + 26)  # of the 30 bytes before the array's name and extra field
                file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
                content = file.read(size)
                if zlib.crc32(content) != checksum:
                    raise OSError(
                        f"{self.path} is not what was written; the disk is at fault: call again, "
                        "elsewhere if it recurs (out=)"
                    )
                yield np.lib.format.read_array(io.BytesIO(content))


def _band(parts: Sequence[_Part], plan: _Plan, band: slice) -> sparse.csr_matrix:
    """Join what the parts hold of a band of cells; bands come in order."""
    from scipy import sparse

    blocks = []
    for tile in plan.across(band):
        counts, columns, lengths = parts[tile].next_band()
        genes = plan.tiles[tile].genes
        indptr = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        shape = (band.stop - band.start, genes.stop - genes.start)
        read = (counts, columns.astype(np.int32), indptr)
        blocks.append(sparse.csr_matrix(read, shape=shape))
    return blocks[0] if len(blocks) == 1 else sparse.hstack(blocks, format="csr")


def _verify(x: h5py.Group, plan: _Plan, summary: Int[np.ndarray, "band 3"]) -> None:
    """Read the result back: cells, and every band's entries and UMIs as they left the source."""
    indptr = x["indptr"][...].astype(np.int64)
    good = len(indptr) == len(plan.cells) + 1
    for band, (entries, umis, _) in zip(plan.bands, summary, strict=True):
        start, stop = indptr[band.start], indptr[band.stop]
        good &= stop - start == entries
        good &= int(x["data"][start:stop].sum(dtype=np.int64)) == umis
        good &= bool((x["indices"][start:stop] < len(plan.genes)).all())
    if not good:
        raise ValueError(
            f"{x.file.filename} does not hold what was read from the source; the disk or the "
            "memory is at fault: call again, elsewhere if it recurs (out=)"
        )
