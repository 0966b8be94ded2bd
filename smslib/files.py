"""Files that appear whole or not at all, on disks that have room for them."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = ["alone", "check_room", "flush_to_disk", "no_room", "size_text", "together", "whole"]

_A_DAY = 86_400  # seconds: whoever writes to a draft does so more often


@contextlib.contextmanager
def whole(
    path: str | os.PathLike[str],
    *,
    folder: str | os.PathLike[str] | None = None,
    flush: bool = True,
) -> Iterator[Path]:
    """Lend a name of its own to write to; the file takes the place of ``path`` at the end.

    A reader sees the old file or the new one, and a block that fails leaves the old one and
    nothing else. Processes that write the same file at once do not meet. What a killed process
    left is removed a day later, by the next one that writes the file.

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
    draft = _draft(path, folder)
    try:
        yield draft
        if flush:
            flush_to_disk(draft)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _draft(path: Path, folder: str | os.PathLike[str] | None = None) -> Path:
    folder = Path(folder or path.parent)
    _remove_abandoned(folder, path.name)
    return folder / f".{path.name}.{uuid.uuid4().hex}.tmp"


def _remove_abandoned(folder: Path, name: str) -> None:
    """Remove the drafts of a file that nobody has written to for a day."""
    with contextlib.suppress(OSError):  # no folder, or another process was faster
        lying = [left for left in os.scandir(folder) if left.name.startswith(f".{name}.")]
        for left in lying:
            if left.name.endswith(".tmp") and time.time() - left.stat().st_mtime > _A_DAY:
                os.unlink(left)


@contextlib.contextmanager
def together(*paths: Path) -> Iterator[list[Path]]:
    """Lend names for files of one folder that belong together; all are moved at the end.

    They are moved in the order given, and no other process that does the same comes between.
    A block that fails leaves the old files and nothing else.

    Parameters
    ----------
    *paths : Path
        What the files are to be called.

    Yields
    ------
    list of Path
        Names that no file has yet.
    """
    drafts = [_draft(path) for path in paths]
    try:
        yield drafts
        for draft in drafts:  # before the first move, so that nothing slow lies between two
            flush_to_disk(draft)
        with alone(paths[0].parent):
            for draft, path in zip(drafts, paths, strict=True):
                os.replace(draft, path)
    finally:
        for draft in drafts:
            draft.unlink(missing_ok=True)


@contextlib.contextmanager
def alone(path: Path, make: Callable[[], object] | None = None) -> Iterator[None]:
    """Wait until no other process works with a file or folder, and keep others waiting.

    A process that dies lets go. Where the system has no such locks (Windows, some network disks)
    nobody waits.

    Parameters
    ----------
    path : Path
    make : callable, optional
        Makes ``path`` where it is not there, and is repeated if the process before removed it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        fcntl = None
    while True:
        handle = _handle(path, make)
        try:
            if fcntl:
                with contextlib.suppress(OSError):  # a network disk without locks
                    fcntl.flock(handle, fcntl.LOCK_EX)
            if _is(handle, path):  # else it was moved away during the wait
                yield
                return
        finally:
            os.close(handle)


def _handle(path: Path, make: Callable[[], object] | None) -> int:
    while True:
        if make:
            make()
        try:
            return os.open(path, os.O_RDONLY)
        except FileNotFoundError:  # removed since
            if not make:
                raise


def _is(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


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
