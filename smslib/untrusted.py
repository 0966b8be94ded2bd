"""Files from elsewhere: what is refused before any of it is read.

A file may hold less than it promises, point at other files, or unpack to far more than its size.
Readers of files ask here first.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import h5py

__all__ = ["LARGE", "RATIO", "check_hdf5", "check_packed", "check_stored_zip"]

# Bytes below which nothing is called too large.
LARGE = 1 << 28
# How many times the size of a file its content may be; counts are compressed up to 50 times.
RATIO = 200
_DEEPEST, _MOST_PARTS = 32, 100_000  # of groups within groups; of links in an HDF5 file
_PACKERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
_UNPACKING = (EOFError, OSError, zlib.error, lzma.LZMAError)
_CHUNK = 1 << 20


def check_packed(path: Path) -> None:
    """Refuse a packed file (gzip, bzip2, xz) that unpacks to far more than it is, or is one twice.

    Damage is left to the reader to find; a file that is not packed passes.

    Raises
    ------
    ValueError
        If so.
    """
    with path.open("rb") as file:
        opener = _packer(file.read(8))
    if opener is None:
        return
    most, total = _most(path), 0
    with contextlib.suppress(*_UNPACKING), opener(path) as unpacked:
        while chunk := unpacked.read(_CHUNK):
            if not total and _packer(chunk):
                raise ValueError(f"{path} is packed twice; expected a file packed once")
            total += len(chunk)
            if total > most:
                raise ValueError(_too_large(path, "unpacks to more than", most))


def check_stored_zip(path: Path) -> None:
    """Refuse what is no ZIP archive, or one that declares more bytes than the file has.

    Raises
    ------
    ValueError
        If so.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            declared = sum(part.file_size for part in archive.infolist())
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is no ZIP archive ({error})") from error
    if declared > path.stat().st_size:
        raise ValueError(f"{path} declares {declared:,} bytes in a file of fewer")


def check_hdf5(file: h5py.File) -> None:
    """Refuse an HDF5 file that points elsewhere, is nested too deep, or declares far too much.

    Parameters
    ----------
    file : h5py.File
        Open for reading.

    Raises
    ------
    ValueError
        If a link is no hard link; an object is found twice; the data of a dataset lie in other
        files; groups are nested more than 32 deep; or the datasets together declare more than 200
        times the bytes of the file (and more than 256 MiB).
    """
    import h5py

    path, declared, seen = Path(file.filename), 0, set()
    todo = [("", file)]
    while todo:
        place, group = todo.pop()
        for name in group:
            where = f"{path}: {place}/{name}"
            found = _hard(group, name, where)
            _refuse_repeated(found, seen, where)
            if isinstance(found, h5py.Group):
                _refuse_depth(place, where)
                todo.append((f"{place}/{name}", found))
            elif isinstance(found, h5py.Dataset):
                declared += _declared(found, where)
    if declared > _most(path):
        raise ValueError(_too_large(path, "declares", declared))


def _hard(group: h5py.Group, name: str, where: str) -> h5py.Group | h5py.Dataset:
    """Return what a name leads to, if it leads there directly."""
    import h5py

    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        raise ValueError(
            f"{where} is a link to elsewhere; expected a file that holds its data itself: open it "
            "with h5py and copy what the link leads to"
        )
    return group[name]


def _refuse_repeated(found: h5py.Group | h5py.Dataset, seen: set[int], where: str) -> None:
    import h5py

    address = h5py.h5o.get_info(found.id).addr
    if address in seen:
        raise ValueError(f"{where} is another part of the same file again; expected a tree")
    seen.add(address)
    if len(seen) > _MOST_PARTS:
        raise ValueError(f"{where}: the file has more than {_MOST_PARTS:,} parts")


def _refuse_depth(place: str, where: str) -> None:
    if place.count("/") >= _DEEPEST:
        raise ValueError(f"{where[:200]}: groups are nested more than {_DEEPEST} deep")


def _declared(dataset: h5py.Dataset, where: str) -> int:
    """Return the bytes that reading a dataset would take."""
    if dataset.is_virtual or dataset.external:
        raise ValueError(
            f"{where} keeps its data in other files; expected a file that holds its data itself"
        )
    return dataset.nbytes


def _packer(beginning: bytes) -> object | None:
    return next(
        (opener for magic, opener in _PACKERS.items() if beginning[:6].startswith(magic)), None
    )


def _most(path: Path) -> int:
    return max(LARGE, RATIO * path.stat().st_size)


def _too_large(path: Path, does: str, size: int) -> str:
    return (
        f"{path} ({path.stat().st_size:,} bytes) {does} {size:,} bytes; expected at most {RATIO} "
        "times its size. It is damaged, or made to fill the memory"
    )
