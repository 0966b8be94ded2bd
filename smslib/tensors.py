"""Files of tensors, written where there may be no room and read without running anything."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from smslib import files, untrusted

__all__ = ["read", "write"]


def write(values: dict[str, object], path: Path) -> None:
    """Write tensors, and dicts and lists of them and of plain values.

    Parameters
    ----------
    values : dict
    path : Path

    Raises
    ------
    OSError
        If they cannot be written: the disk is full, the folder is read-only.
    """
    try:
        torch.save(values, path)
    except RuntimeError as error:  # torch's word for a full disk, too
        free = files.size_text(shutil.disk_usage(path.parent).free)
        raise OSError(
            f"the weights cannot be written into {path.parent}, where {free} are free; what was "
            "saved there before is kept"
        ) from error


def read(path: Path) -> dict[str, object]:
    """Read them back to the CPU; nothing in the file is run, and nothing is unpacked.

    Parameters
    ----------
    path : Path

    Returns
    -------
    dict

    Raises
    ------
    ValueError
        If the file is no archive, or declares more bytes than it has. Other damage is torch's to
        find, by errors of many kinds.
    """
    untrusted.check_stored_zip(path)
    return torch.load(path, map_location="cpu", weights_only=True)
