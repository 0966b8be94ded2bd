"""Compare a cell's stored outputs with fresh ones: numbers within a tolerance, the rest exactly.

A text is split into numbers and what lies between them. What lies between must agree after
runs of blanks and rules are collapsed, since the columns of a printed table move with the
digits. Numbers written as integers must be identical; others may differ by ``rtol`` of the
larger one or by ``atol``. A digit that belongs to a name (``IFNGR1``, ``x2``) is text.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

NUMBER = re.compile(
    r"(?<![\w.])[-+−]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?(?![\w])"
)
_PLACE = "\0"  # of a number; no text holds it
IMAGES = ("image/png", "image/jpeg", "image/svg+xml", "application/pdf")
# Object addresses and the random ids of styled tables: different in every process.
_NOISE = re.compile(r"(?<=0x)[0-9a-f]{6,}|(?<=\bT_)[0-9a-f]{5}(?=_|\b)")
_LAYOUT = re.compile(r"[ \t]+|[-─═]{2,}")


@dataclass(frozen=True)
class Tolerance:
    """How far a printed real number may move: ``|a - b| <= max(rtol * max(|a|, |b|), atol)``."""

    rtol: float = 1e-3
    atol: float = 1e-8

    def same(self, first: str, second: str) -> bool:
        """Whether two written numbers agree."""
        if first == second:
            return True
        if _is_integer(first) and _is_integer(second):
            return int(_plain(first)) == int(_plain(second))
        a, b = float(_plain(first)), float(_plain(second))
        # .8 - .7 is a little more than .1, in binary
        rtol, atol = (bound * (1 + 1e-9) for bound in (self.rtol, self.atol))
        return math.isclose(a, b, rel_tol=rtol, abs_tol=atol)


def difference(stored: str, fresh: str, tolerance: Tolerance) -> str | None:
    """Say where two texts disagree, or return None.

    Parameters
    ----------
    stored, fresh : str
        What the notebook holds, what the code prints now.
    tolerance : Tolerance
        For numbers written with a point or an exponent.
    """
    stored, fresh = _NOISE.sub("", stored), _NOISE.sub("", fresh)
    if _text(stored) != _text(fresh):
        return _text_difference(stored, fresh)
    pairs = zip(NUMBER.findall(stored), NUMBER.findall(fresh), strict=True)
    moved = [f"{a} became {b}" for a, b in pairs if not tolerance.same(a, b)]
    return "; ".join(moved) or None


def output_differences(
    stored: Sequence[Mapping[str, Any]],
    fresh: Sequence[Mapping[str, Any]],
    tolerance: Tolerance,
) -> list[str]:
    """List the disagreements between two cells' outputs; images count, their bytes do not."""
    before, after = _flatten(stored), _flatten(fresh)
    if [kind for kind, _ in before] != [kind for kind, _ in after]:
        kinds = [", ".join(kind for kind, _ in side) or "nothing" for side in (before, after)]
        return [f"stored outputs are {kinds[0]}; the code now gives {kinds[1]}"]
    found = []
    for (kind, old), (_, new) in zip(before, after, strict=True):
        where = None if kind in IMAGES else difference(old, new, tolerance)
        if where:
            found.append(f"{kind}: {where}")
    return found


def _is_integer(written: str) -> bool:
    return not any(mark in written for mark in ".eE")


def _plain(written: str) -> str:
    return written.replace("−", "-").replace(",", "")


def _text(text: str) -> str:
    """Return what lies between the numbers, freed of layout."""
    skeleton = _LAYOUT.sub(" ", NUMBER.sub(f" {_PLACE} ", text))
    return "\n".join(" ".join(line.split()) for line in skeleton.strip().splitlines())


def _text_difference(stored: str, fresh: str) -> str:
    for old, new in zip_longest(stored.splitlines(), fresh.splitlines(), fillvalue=""):
        if _text(old) != _text(new):
            return f"stored {old.strip()!r}, now {new.strip()!r}"
    return f"stored {stored!r}, now {fresh!r}"


def _flatten(outputs: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """One (kind, text) per stream and representation; consecutive stream pieces joined."""
    flat: list[tuple[str, str]] = []
    for output in outputs:
        kind = output["output_type"]
        if kind == "stream":
            name = f"stream {output['name']}"
            joined = flat.pop()[1] if flat and flat[-1][0] == name else ""
            flat.append((name, joined + "".join(output["text"])))
        elif kind == "error":
            flat.append(("error", f"{output['ename']}: {output['evalue']}"))
        else:
            flat += [(mime, _as_text(data)) for mime, data in sorted(output["data"].items())]
    return flat


def _as_text(data: object) -> str:
    return "".join(data) if isinstance(data, list) else str(data)
