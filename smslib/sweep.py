"""Many runs: a study is a list of configurations, a run is a file.

A run belongs to its configuration: its file is named by a hash of it. So resuming, collecting and
surviving a crash are the same operation (look which files exist) on a laptop and on a cluster.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import json
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from smslib import store

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["axis", "chain", "collect", "product", "run", "run_id", "zip_"]

Config = Mapping[str, Any]
Task = Callable[[dict[str, Any]], Mapping[str, Any]]


@runtime_checkable
class Job(Protocol):
    """A run under way."""

    def result(self) -> Path | None:
        """Wait; return the run's file, or None if the task crashed."""


@runtime_checkable
class SupportsSubmit(Protocol):
    """An executor: of `concurrent.futures`, submitit, dask, ..."""

    def submit(self, function: Callable[..., Path | None], /, *arguments: object) -> Job:
        """Start ``function(*arguments)``."""


def axis(name: str, values: Iterable[Any]) -> list[dict[str, Any]]:
    """Return one configuration per value: ``axis("seed", range(2))`` is seed 0, seed 1."""
    return [{name: value} for value in values]


def product(*axes: Sequence[Config]) -> list[dict[str, Any]]:
    """Combine every configuration of each axis with every one of the others.

    Raises
    ------
    ValueError
        If two axes set the same key.
    """
    return [_merge(parts) for parts in itertools.product(*axes)]


def zip_(*axes: Sequence[Config]) -> list[dict[str, Any]]:
    """Combine the first configurations of all axes, the second ones, and so on.

    Raises
    ------
    ValueError
        If the axes differ in length, or two set the same key.
    """
    lengths = [len(part) for part in axes]
    if len(set(lengths)) > 1:
        raise ValueError(f"axes have {lengths} configurations; zip_ expects equal lengths")
    return [_merge(parts) for parts in zip(*axes, strict=True)]


def chain(*studies: Sequence[Config]) -> list[dict[str, Any]]:
    """Put studies one after the other."""
    return [dict(config) for config in itertools.chain(*studies)]


def run_id(config: Config) -> str:
    """Name a configuration: 12 hexadecimal digits of the SHA-256 of its canonical JSON.

    Parameters
    ----------
    config : dict
        Plain JSON values. The order of keys does not matter, every value does.

    Raises
    ------
    TypeError
        If a value is not plain JSON.
    """
    try:
        text = json.dumps(config, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"configuration {config!r} is not plain JSON ({error}); use str, int, finite float, "
            "bool, None, lists and dicts (numpy: .item(), .tolist())"
        ) from error
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def run(
    task: Task,
    study: Sequence[Config],
    root: str | Path,
    *,
    executor: SupportsSubmit | None = None,
    wait: bool = True,
) -> list[Job]:
    """Run what is missing of a study, each configuration into ``<root>/<run_id>.json``.

    The file holds ``config``, ``result`` (what the task returned) and ``provenance``. A task that
    raises leaves its traceback in ``<run_id>.error`` and the other runs go on; run the study again
    to retry it.

    Parameters
    ----------
    task : callable, config to dict
        Must be importable (no lambda, not defined in a notebook) when a process pool runs it.
        Its result shares no key with the configuration.
    study : sequence of dict
        Repeated configurations run once.
    root : path
    executor : optional
        Anything with ``.submit(function, *arguments)``; None runs here, one after the other. For
        two single-threaded workers::

            ProcessPoolExecutor(
                2, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
            )
    wait : bool
        False returns as soon as everything is submitted.

    Returns
    -------
    list of Job
        One per run that was missing; ``.result()`` is its file, or None if it crashed.

    Warns
    -----
    RuntimeWarning
        If a run crashed (only when waiting).
    """
    root = Path(root)
    named = {run_id(config): config for config in study}
    missing = {name: config for name, config in named.items() if not _file(root, name).exists()}
    submit = _now if executor is None else executor.submit
    jobs = [
        submit(_record, task, config, root)
        for config in _progress(missing.values(), shown=executor is None)
    ]
    if wait:
        for job in _progress(jobs, shown=executor is not None):
            job.result()
        _warn_of_crashes(root, missing)
    return jobs


def collect(root: str | Path) -> pd.DataFrame:
    """Read the finished runs of a folder.

    Parameters
    ----------
    root : path

    Returns
    -------
    DataFrame
        One row per run, sorted by ``run_id``: the columns of the configuration (nested keys joined
        by dots), of the result, and of the provenance (prefixed ``provenance.``). Empty if no run
        has finished.

    Raises
    ------
    ValueError
        If a file is not JSON.
    """
    import pandas as pd

    runs = [(path.stem, store.read_json(path)) for path in sorted(Path(root).glob("*.json"))]
    rows = [
        {
            "run_id": name,
            **entry["config"],
            **entry["result"],
            "provenance": entry["provenance"],
        }
        for name, entry in runs
    ]
    return pd.json_normalize(rows)


def _merge(parts: Sequence[Config]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for part in parts:
        repeated = sorted(merged.keys() & part.keys())
        if repeated:
            raise ValueError(f"two axes set {repeated}; expected each key in one axis only")
        merged.update(part)
    return merged


def _file(root: Path, name: str) -> Path:
    return root / f"{name}.json"


def _record(task: Task, config: Config, root: Path) -> Path | None:
    """Run one configuration and write its file, or its traceback."""
    path = _file(root, run_id(config))
    if path.exists():  # another process on the same study was faster
        return path
    error_path = path.with_suffix(".error")
    try:
        entry = _measured(task, config)
    except Exception:  # noqa: BLE001 - one crashed run must not stop the others
        store.write_text(error_path, traceback.format_exc())
        return None
    error_path.unlink(missing_ok=True)
    return store.write_json(path, entry)


def _measured(task: Task, config: Config) -> dict[str, Any]:
    """Run the task on a copy of its configuration and return the entry to store."""
    with store.measure(
        seeds=[value for key, value in config.items() if key.endswith("seed")],
        command=f"sweep.run({task.__module__}.{task.__qualname__})",
        device=config.get("device", "cpu"),
    ) as provenance:
        result = store.plain(task(copy.deepcopy(dict(config))))
    repeated = sorted(result.keys() & config.keys())
    if repeated:
        raise ValueError(f"the result repeats {repeated} of the configuration; rename them")
    return {"config": dict(config), "result": result, "provenance": store.plain(provenance)}


def _now(function: Callable[..., Path | None], /, *arguments: object) -> Future:
    """Call a function at once and return its outcome as a finished job."""
    job: Future = Future()
    job.set_result(function(*arguments))
    return job


def _progress(items: Iterable[Any], *, shown: bool) -> Iterable[Any]:
    """Show a bar on a terminal, nothing in a log."""
    from tqdm import tqdm

    return tqdm(list(items), unit="run", disable=None if shown else True)


def _warn_of_crashes(root: Path, missing: Mapping[str, Config]) -> None:
    crashed = [name for name in missing if not _file(root, name).exists()]
    if not crashed:
        return
    path = root / f"{crashed[0]}.error"
    last_line = "no traceback was written"
    with contextlib.suppress(FileNotFoundError):
        last_line = path.read_text(encoding="utf-8").strip().splitlines()[-1]
    warnings.warn(
        f"{len(crashed)} of {len(missing)} runs crashed; first {path} ({last_line}). "
        "The others are stored; run the study again to retry",
        RuntimeWarning,
        stacklevel=3,
    )
