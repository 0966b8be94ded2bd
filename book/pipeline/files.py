"""Write files whole or not at all, and only when their content changed."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path


def write_atomic(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content`` in one step, so that a crash leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_if_changed(path: Path, content: bytes) -> bool:
    """Write ``content`` unless ``path`` holds it already; return whether it was written."""
    if path.is_file() and path.read_bytes() == content:
        return False
    write_atomic(path, content)
    return True


def mirror(contents: Mapping[str, bytes], folder: Path) -> list[str]:
    """Make ``folder`` hold exactly ``contents`` (relative path to bytes), touching what differs.

    Unchanged files keep their modification time, which is what Sphinx decides by.
    Returns the relative paths written or deleted.
    """
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    stale = sorted(present - contents.keys())
    for name in stale:
        (folder / name).unlink()
    written = [
        name for name in sorted(contents) if write_if_changed(folder / name, contents[name])
    ]
    return stale + written
