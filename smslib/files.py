"""Files that appear whole or not at all, on disks that have room for them."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

__all__ = ["check_room", "flush_to_disk", "no_room", "size_text", "whole"]


@contextlib.contextmanager
def whole(
    path: str | os.PathLike[str],
    *,
    folder: str | os.PathLike[str] | None = None,
    flush: bool = True,
) -> Iterator[Path]:
    """Lend a name of its own to write to; the file takes the place of ``path`` at the end.

    A reader sees the old file or the new one, and a block that fails leaves the old one and
    nothing else. Processes that write the same file at once do not meet.

    Parameters
    ----------
    path : path
        What the file is to be called.
    folder : path, optional
        Where it lies meanwhile, on the same disk; beside ``path`` by default.
    flush : bool
        Wait until it is on the disk, so that it survives a power cut, too.

    Yields
    ------
    Path
        A name that no file has yet.
    """
    path = Path(path)
    draft = Path(folder or path.parent) / f".{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        yield draft
        if flush:
            flush_to_disk(draft)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Wait until a file is on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def check_room(
    folder: str | os.PathLike[str], needed: int, *, what: str, advice: str, kept: int = 0
) -> None:
    """Raise unless the disk of a folder has room.

    Parameters
    ----------
    folder : path
    needed : int
        Bytes.
    what, advice : str
        What the room is for, and what to do without.
    kept : int
        Bytes of it that are there already, and stay.

    Raises
    ------
    OSError
        ENOSPC, as from `no_room`.
    """
    if needed > shutil.disk_usage(folder).free:
        raise no_room(folder, needed, what=what, advice=advice, kept=kept)


def no_room(
    folder: str | os.PathLike[str], needed: int, *, what: str, advice: str, kept: int = 0
) -> OSError:
    """Return the error that says how much is needed, how much there is, and what to do.

    Parameters
    ----------
    folder, needed, what, advice, kept
        As in `check_room`.
    """
    free = size_text(shutil.disk_usage(folder).free)
    arrived = f"; the {size_text(kept)} that arrived are kept" if kept else ""
    return OSError(
        errno.ENOSPC,
        f"not enough room for {what}: {size_text(needed)} needed, {free} free in "
        f"{folder}{arrived}. {advice}",
    )


def size_text(n_bytes: int) -> str:
    """Return a number of bytes as people say it: ``"8.8 GB"``."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.1f} {unit}"
    return f"{n_bytes} bytes"
