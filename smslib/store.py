"""Results on disk, each with its provenance.

An experiment is one file, ``<root>/<experiment>.json``, of three parts: ``by_seed`` (key to the
values of a score, seed by seed), ``values`` (flat as well: key to number, string or list) and
``provenance`` (commit, versions, device, seconds, ...). What follows from the values by seed,
their mean and its interval, is not written but computed when the file is read: see `over_seeds`.
Pages of the book read numbers from there and from nowhere else.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from jaxtyping import Real

from smslib import __version__, files, metrics
from smslib.names import nearest_known

__all__ = [
    "Stored",
    "get",
    "measure",
    "over_seeds",
    "plain",
    "put",
    "read_json",
    "write_bytes",
    "write_json",
    "write_text",
]

# A bracket before a line break is no part of a string, which has none.
_INNERMOST_LIST = re.compile(r"\[\n([^\[\]{}]*)\n *\]")
DIGITS = 6
_LONGEST_NAME = 200  # of an experiment; file systems take 255 bytes


class Stored(dict[str, Any]):
    """The values of an experiment, by key.

    Parameters
    ----------
    experiment : str
    values : dict
        Key to number, string, bool, None or a list of them.
    provenance : dict
        What `measure` recorded.
    """

    def __init__(
        self, experiment: str, values: Mapping[str, Any], provenance: Mapping[str, Any]
    ) -> None:
        super().__init__(values)
        self.experiment = experiment
        self.provenance = provenance

    def __missing__(self, key: str) -> NoReturn:
        """Raise a KeyError that lists the nearest keys."""
        raise KeyError(f"no {key!r} in {self.experiment!r}{nearest_known(key, self)}")


def put(
    experiment: str,
    values: Mapping[str, Any],
    *,
    root: str | Path,
    provenance: Mapping[str, Any],
) -> Path:
    """Store the values of an experiment, replacing older ones in one step.

    Parameters
    ----------
    experiment : str
        File name without suffix.
    values : dict
        Flat: numbers (numpy's included), strings, bools, None, lists and arrays of them. Floats
        keep six significant digits; NaN and infinities become null, which JSON can hold. What
        `over_seeds` returns is kept as its values by seed; keys that only look like it
        (``"cells.n"`` beside ``"cells"``) are kept as they are.
    root : path
        The folder; made if absent.
    provenance : dict
        From `measure`.

    Returns
    -------
    Path
        The file written.

    Raises
    ------
    TypeError
        If a value is not of these kinds.
    ValueError
        If the provenance is empty or a value is nested.
    """
    if not provenance:
        raise ValueError(
            f"experiment {experiment!r} comes without provenance; compute it inside "
            "`with store.measure() as provenance:` and pass it on after the block"
        )
    nested = [key for key, value in values.items() if isinstance(value, Mapping)]
    if nested:
        raise ValueError(
            f"values of {experiment!r} are nested under {nested[:3]}; expected a flat dict, with "
            "keys such as 'svae+.mcc'"
        )
    found = {key: _statistics(key, values) for key in values if f"{key}.n" in values}
    by_seed = {key: values[key] for key, statistics in found.items() if statistics}
    derived = by_seed.keys() | set().union(*found.values())
    parts = {
        "by_seed": by_seed,
        "values": {key: value for key, value in values.items() if key not in derived},
        "provenance": provenance,
    }
    return write_json(_file(root, experiment), plain(parts))


def _statistics(key: str, values: Mapping[str, Any]) -> set[str]:
    """Return what `over_seeds` adds to a key, if that is what stands beside it."""
    try:
        added = over_seeds(key, values[key]) if np.ndim(values[key]) == 1 else {}
    except (TypeError, ValueError):  # no numbers, or not all of them
        return set()
    added.pop(key, None)
    same = all(np.array_equal(values.get(name), value) for name, value in added.items())
    return set(added) if same else set()


def get(experiment: str, *, root: str | Path) -> Stored:
    """Read the values of an experiment.

    Parameters
    ----------
    experiment : str
    root : path

    Returns
    -------
    Stored
        The values, with ``.provenance``.

    Raises
    ------
    KeyError
        If the experiment is not stored; the nearest names are listed.
    ValueError
        If the file is not JSON, or not an experiment, or the name is one of another folder.
    """
    path = _file(root, experiment)
    if not path.exists():
        known = sorted(file.stem for file in path.parent.glob("*.json"))
        raise KeyError(f"no experiment {experiment!r} in {root}{nearest_known(experiment, known)}")
    found = read_json(path)
    parts = {name: found.get(name, {}) for name in ("values", "by_seed", "provenance")}
    unfit = [name for name, part in parts.items() if not isinstance(part, dict)]
    if unfit or not {"values", "provenance"} <= found.keys():
        raise ValueError(
            f"{path} is not an experiment; expected values and provenance in it, each by key"
        )
    values = parts["values"]
    for key, by_seed in parts["by_seed"].items():
        values |= over_seeds(key, by_seed)
    return Stored(experiment, values, parts["provenance"])


def _file(root: str | Path, experiment: str) -> Path:
    """Return the file of an experiment, which no name can put into another folder."""
    if Path(experiment).name != experiment or len(experiment) > _LONGEST_NAME:
        raise ValueError(
            f"experiment {experiment[:99]!r} is not the name of a file; expected one without "
            f"folders, of at most {_LONGEST_NAME} characters"
        )
    return Path(root) / f"{experiment}.json"


def over_seeds(key: str, by_seed: Sequence[float | int] | Real[Any, " seed"]) -> dict[str, Any]:
    """Return the values of a score and what follows from them, as flat keys.

    Parameters
    ----------
    key : str
    by_seed : sequence of float, or array
        One value per seed, finite.

    Returns
    -------
    dict
        ``key`` itself, ``.mean`` and ``.n``; from two seeds on also ``.sd``, ``.low`` and
        ``.high`` (95 % t interval of the mean).

    Raises
    ------
    ValueError
        If there are no values, or not all are finite.
    """
    mean, low, high, n = metrics.interval(np.asarray(by_seed, dtype=float))
    found = {"mean": mean, "n": n}
    if n > 1:
        found |= {"sd": float(np.std(by_seed, ddof=1)), "low": low, "high": high}
    return {key: by_seed} | {f"{key}.{name}": value for name, value in found.items()}


@contextlib.contextmanager
def measure(
    *, seeds: Sequence[int] = (), command: str = "", device: str = "cpu"
) -> Iterator[dict[str, Any]]:
    """Record where, when and at what cost a block runs.

    Parameters
    ----------
    seeds : sequence of int
        Seeds that the block uses, for the record.
    command : str
        How to repeat the block, for the record.
    device : str
        torch's name of the device that computes.

    Yields
    ------
    dict
        ``commit`` (None outside git), ``dirty`` (a Python file differs from the commit),
        ``python``, ``torch``, ``numpy``, ``smslib`` (versions), ``device`` (the model's name),
        ``n_cpu``, ``threads`` (torch's), ``date`` (UTC, to the second), ``seeds``, ``command``. On
        exit also ``wall_seconds``, ``cpu_seconds`` (all threads of this process) and
        ``peak_memory_mb`` (MB, the largest resident size of this process so far; on a GPU, of its
        allocations).
    """
    provenance = {"seeds": list(seeds), "command": command, **_surroundings(device)}
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        yield provenance
    finally:
        provenance["wall_seconds"] = time.perf_counter() - wall
        provenance["cpu_seconds"] = time.process_time() - cpu
        provenance["peak_memory_mb"] = _peak_memory_mb(device)


def plain(value: Any) -> Any:  # noqa: ANN401 - whatever JSON can hold
    """Return a value as JSON holds it: no numpy, six significant digits, null for non-finite.

    Parameters
    ----------
    value : dict, list, tuple, array, number, str, bool or None

    Returns
    -------
    dict, list, int, float, str, bool or None

    Raises
    ------
    TypeError
        If the value, or one inside it, is of another kind.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    raise TypeError(
        f"cannot store {value!r} ({type(value).__name__}); expected numbers, strings, None, "
        "lists, dicts or arrays"
    )


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Raises
    ------
    ValueError
        If the file is not JSON, or holds something else; it is named.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # bad bytes, numbers and nesting, too
        raise ValueError(
            f"{path} is not JSON ({error}); delete it and compute it again"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}; expected a JSON object")
    return found


def write_json(path: str | Path, payload: Mapping[str, Any]) -> Path:
    """Write JSON with sorted keys, a line per list, whole or not at all; return the path."""
    text = json.dumps(payload, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False)
    text = _INNERMOST_LIST.sub(_on_one_line, text)

    return write_text(path, text + "\n")


def _on_one_line(found: re.Match[str]) -> str:
    return "[" + "".join(line.strip(" ") for line in found[1].split("\n")) + "]"


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file, whole or not at all; return the path."""
    return write_bytes(path, text.encode())


def write_bytes(path: str | Path, content: bytes) -> Path:
    """Write a file, whole or not at all; return the path.

    A reader sees the old file or the new one, and a crash leaves the old one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.whole(path) as draft:
        draft.write_bytes(content)
    return path


def _surroundings(device: str) -> dict[str, Any]:
    """Describe code, software and machine."""
    import torch

    # That a folder above is a repository is not enough: it may be someone else's.
    tracked = _git("ls-files", "--error-unmatch", Path(__file__).name) is not None
    return {
        "commit": _git("rev-parse", "HEAD") if tracked else None,
        "dirty": tracked and bool(_git("status", "--porcelain", "--", ":(top,glob)**/*.py")),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "numpy")},
        "smslib": __version__,  # the installed one may be another
        "device": _device_name(device),
        "n_cpu": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    """Return the version of an installed package; None for one imported from a bare folder."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """Ask git about the repository that this package lies in; None where it has no answer."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def _device_name(device: str) -> str:
    """Name the model of a CPU or GPU."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return _linux("cpuinfo", "model name") or platform.processor() or platform.machine()


def _peak_memory_mb(device: str) -> float:
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    # Where Linux tells, believe it: a child's ru_maxrss starts at the size of its parent.
    kibibytes = _linux("self/status", "VmHWM")
    if kibibytes:
        return float(kibibytes.split()[0]) * 1.024e-3
    import resource  # not on Windows

    per_unit = 1e-6 if platform.system() == "Darwin" else 1.024e-3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * per_unit


def _linux(file: str, key: str) -> str | None:
    """Return the first entry of a name in a file of /proc; None where there is none."""
    path = Path("/proc") / file
    if not path.exists():
        return None
    for line in path.read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None
