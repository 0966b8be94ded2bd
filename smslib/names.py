"""Names that nobody knows: what an error message says about what is there instead."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator

__all__ = ["from_extra", "nearest_known", "unknown_names"]

_CUTOFF = 0.4  # of difflib: below, a name is no likely slip of the other
_N_NEAREST, _N_LISTED = 3, 10
_WHOLE, _COMPARED = 100, 20  # unknown names: the longest list said in full; compared, of a longer


@contextlib.contextmanager
def from_extra(extra: str) -> Iterator[None]:
    """Import in this block what an optional dependency brings, or say how to install it.

    Parameters
    ----------
    extra : str
        Name of the group of dependencies in ``pyproject.toml``.

    Raises
    ------
    ImportError
        If a package is not installed; it and the extra are named.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(
            f"this needs {error.name}, which is not installed: pip install 'smslib[{extra}]'"
        ) from error


def nearest_known(name: str, known: Iterable[str]) -> str:
    """Say which known names a name resembles, or what there is if it resembles none.

    Parameters
    ----------
    name : str
    known : iterable of str

    Returns
    -------
    str
        To follow a message: ``"; nearest known: ['STAT1']"``, or ``"; known: [...]"`` with the
        first ten.
    """
    names = [str(each) for each in known]
    near = difflib.get_close_matches(name, names, n=_N_NEAREST, cutoff=_CUTOFF)
    return f"; nearest known: {near}" if near else f"; known: {names[:_N_LISTED]}"


def unknown_names(what: str, names: Iterable[str], known: Iterable[str]) -> str:
    """Say which names are not known, all of them up to a hundred, with the nearest that are.

    More are hardly slips but another column, whose names would take minutes to compare: the first
    hundred are said, twenty of them with the nearest known names, and the others are counted.

    Parameters
    ----------
    what : str
        What is named, in the singular: ``"condition"``.
    names, known : iterable of str

    Returns
    -------
    str
        ``"unknown gene 'STAT'; nearest known: ['STAT1'], unknown gene ..."``; empty if all are
        known.
    """
    known = dict.fromkeys(known)
    missing = [name for name in dict.fromkeys(names) if name not in known]
    compared = missing if len(missing) <= _WHOLE else missing[:_COMPARED]
    said = [f"unknown {what} {name!r}{nearest_known(name, known)}" for name in compared]
    said += [f"unknown {what} {name!r}" for name in missing[len(compared) : _WHOLE]]
    more = [f"and {len(missing) - _WHOLE:,} more"] if len(missing) > _WHOLE else []
    return ", ".join(said + more)
