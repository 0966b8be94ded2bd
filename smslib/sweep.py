"""Many runs: a study is a list of configurations, a run is a file.

A run belongs to its configuration: its file is named by a hash of it. So resuming, collecting and
surviving a kill are the same operation (look which files exist) on a laptop and on a cluster.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gzip
import hashlib
import itertools
import json
import operator
import os
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from smslib import store
from smslib.names import from_extra

if TYPE_CHECKING:
    from multiprocessing.queues import SimpleQueue
    from types import ModuleType

    import pandas as pd

__all__ = [
    "Config",
    "Job",
    "OnRay",
    "SupportsSubmit",
    "Task",
    "add_arguments",
    "axis",
    "bundle",
    "chain",
    "collect",
    "conclude",
    "cost",
    "gather",
    "gpu_workers",
    "of_study",
    "pin_to_device",
    "product",
    "read",
    "run",
    "run_id",
    "run_in_processes",
    "zip_",
]

Config = Mapping[str, Any]  # One run's settings, plain JSON
Task = Callable[[dict[str, Any]], Mapping[str, Any]]  # From a configuration to its result
_RECORD = {"run_id", "provenance"}  # columns that neither configuration nor result may name
_PARTS = ("config", "result", "provenance")  # of a finished run's file
_BUNDLE = "runs.jsonl.gz"
_AS_JSON = {b"smslib": b"json"}  # marks the columns of a parquet file that hold JSON text


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
    index: int | Iterable[int] | None = None,
    executor: SupportsSubmit | None = None,
    pack: int = 1,
    wait: bool = True,
    retry: bool = False,
) -> list[Job]:
    """Run what is missing of a study, each configuration into ``<root>/<run_id>.json``.

    The file holds ``config``, ``result`` (what the task returned) and ``provenance``. This one
    small file is all that a run leaves: it appears whole or not at all, so a study killed at any
    moment resumes where it was. A task that raises leaves ``<run_id>.error`` (``config``,
    ``error``, ``traceback``) and the other runs go on. On a terminal a bar shows the study.

    Parameters
    ----------
    task : callable, config to dict
        Must be importable (no lambda, not defined in a notebook) when a process pool runs it.
        Its result shares no key with the configuration, nor a column of `collect`.
    study : sequence of dict
        Repeated configurations run once. No configuration has a key ``run_id`` or ``provenance``.
    root : path
    index : int or iterable of int, optional
        Run only these configurations of the study, counted from 0: for the array jobs of a
        scheduler, or to share a study between machines. Two processes on the same runs are safe,
        but do some of the work twice.
    executor : optional
        Anything with ``.submit(function, *arguments)``; None runs here, one after the other. For
        two single-threaded workers::

            ProcessPoolExecutor(
                2, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
            )

        (To kill such a study outright, kill its process group: workers outlive their parent.)
        One worker per GPU is `gpu_workers`. On a SLURM cluster, through submitit, as one array
        job of tasks that do twenty runs each::

            executor = submitit.AutoExecutor(folder="slurm")
            executor.update_parameters(slurm_partition="gpu", timeout_min=120)
            with executor.batch():
                sweep.run(task, study, root, executor=executor, pack=20, wait=False)

        Of dask take ``client.get_executor(pure=False)``: it would else believe that a run which
        is tried again has been done. For Ray there is `OnRay`.
    pack : int
        Runs per job of the executor, one after the other: as many as make a cluster's task last
        30 to 120 minutes. Every run still has a file of its own, so that a job which is killed
        loses the run under way alone; submitit puts one that is out of time back in the queue.
    wait : bool
        False returns as soon as everything is submitted to the executor.
    retry : bool
        Whether to run again what crashed earlier, too. Otherwise such runs are skipped.

    Returns
    -------
    list of Job
        One per run that was missing; ``.result()`` is its file, or None if it crashed.

    Raises
    ------
    IndexError
        If an index is not one of the study's.
    OSError
        If a file cannot be written: the disk is full, the folder is read-only. What had finished
        is stored; an executor reports it as a lost run.
    RuntimeError
        If the executor lost runs (a worker was killed, the task cannot be pickled, ...). What
        had finished is stored.
    TypeError
        If a configuration is not plain JSON, or an index no integer.
    ValueError
        If a configuration sets ``run_id`` or ``provenance``, or a pack has no runs.

    Warns
    -----
    RuntimeWarning
        If runs crashed (only when waiting), or were skipped because they had crashed earlier.
    """
    if pack < 1:
        raise ValueError(f"pack is {pack}; expected at least one run per job of the executor")
    root = Path(root)
    chosen, bundled = _named(study, index), _bundled(root)
    missing = {
        name: config
        for name, config in chosen.items()
        if name not in bundled and not _file(root, name).exists()
    }
    skipped = [] if retry else [name for name in missing if _error_file(root, name).exists()]
    todo = {name: missing[name] for name in missing if name not in skipped}
    wait = wait or executor is None
    with _bar(len(chosen), len(todo), crashed=len(skipped), shown=wait) as advance:
        jobs = {}
        for part in _parts(todo, pack if executor is not None else 1):
            started = _submit(executor, task, part, root)
            jobs |= started
            if executor is None:
                advance(*(job.result() for job in started.values()))
        lost = _wait(jobs, advance) if wait and executor is not None else {}
    lost = {name: error for name, error in lost.items() if not _file(root, name).exists()}
    _warn_of_crashes(root, jobs.keys() - lost if wait else (), skipped)
    _raise_if_lost(lost, len(jobs))
    return list(jobs.values())


@dataclass(frozen=True)
class OnRay:
    """An executor on the Ray cluster that this process is connected to, by ``ray.init()``.

    Parameters
    ----------
    options : dict
        What a job takes of a machine, as in ``ray.remote``: ``{"num_gpus": 0.25}`` puts four jobs
        on each GPU, ``{"num_cpus": 2}`` keeps two cores for each.
    """

    options: Mapping[str, Any] = field(default_factory=dict)

    def submit(self, function: Callable[..., Any], /, *arguments: object) -> Future:
        """Start ``function(*arguments)`` on some machine of the cluster."""
        import ray

        return ray.remote(function).options(**self.options).remote(*arguments).future()


def gpu_workers(devices: Sequence[str] | None = None) -> ProcessPoolExecutor:
    """Return an executor with a worker process for each GPU, which sees that one alone.

    Parameters
    ----------
    devices : sequence of str, optional
        As in ``CUDA_VISIBLE_DEVICES``; all those visible by default. A device named twice gets
        two workers: small models leave room.

    Returns
    -------
    ProcessPoolExecutor
        For ``sweep.run(..., executor=)``; in its tasks ``"cuda"`` is the worker's GPU.

    Raises
    ------
    ValueError
        If there is no GPU.
    """
    devices = _visible_gpus() if devices is None else list(devices)
    if not devices:
        raise ValueError(
            "no GPU is visible; expected at least one (nvidia-smi lists them, "
            "CUDA_VISIBLE_DEVICES hides them). On CPUs use a ProcessPoolExecutor"
        )
    context = get_context("spawn")
    free = context.SimpleQueue()
    for device in devices:
        free.put(device)
    return ProcessPoolExecutor(len(devices), context, initializer=pin_to_device, initargs=(free,))


def pin_to_device(free: SimpleQueue[str]) -> None:
    """Let this process see one device alone, the next one that is free.

    Parameters
    ----------
    free : queue of str
        Devices, as in ``CUDA_VISIBLE_DEVICES``, that no process has. The process must not have
        used CUDA before.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = free.get()


def _visible_gpus() -> list[str]:
    """Return the GPUs that this process may use: a scheduler hides those of others."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is not None:
        return [device.strip() for device in shown.split(",") if device.strip()]
    import torch

    return [str(place) for place in range(torch.cuda.device_count())]


def collect(root: str | Path) -> pd.DataFrame:
    """Read the finished runs of a folder.

    Parameters
    ----------
    root : path

    Returns
    -------
    DataFrame
        One row per run, sorted by ``run_id``: the columns of the configuration (nested keys joined
        by dots, an empty dict as it is), of the result, and of the provenance (prefixed
        ``provenance.``). Empty if no run has finished.

    Raises
    ------
    ValueError
        If a file is not JSON, or not a run.
    """
    import pandas as pd

    return pd.DataFrame([_row(name, entry) for name, entry in _entries(root).items()])


def bundle(root: str | Path) -> Path:
    """Move the finished runs of a folder into one compressed file in it.

    A file per run is what survives anything while a study grows. Hundreds of finished ones are
    mostly repetition: together they take a fifth of the space. `run` and `collect` see no
    difference; later runs have files of their own, which the next bundle takes in.

    Parameters
    ----------
    root : path
        In which no study runs meanwhile.

    Returns
    -------
    Path
        ``<root>/runs.jsonl.gz``: a line of JSON per run, sorted by ``run_id``. The same runs give
        the same bytes. ``pandas.read_json(path, lines=True)`` reads it, too.

    Raises
    ------
    ValueError
        If a file is not JSON, or not a run; or if no run has finished.
    """
    root = Path(root)
    files, entries = list(root.glob("*.json")), _entries(root)
    if not entries:
        raise ValueError(_no_run(root))
    lines = [
        json.dumps({"run_id": name, **entry}, sort_keys=True, separators=(",", ":")) + "\n"
        for name, entry in entries.items()
    ]
    path = store.write_bytes(root / _BUNDLE, gzip.compress("".join(lines).encode(), mtime=0))
    for file in files:
        file.unlink()
    return path


def _no_run(root: str | Path) -> str:
    return f"no finished run in {root}; expected <run_id>.json files: run the study"


def _entries(root: str | Path) -> dict[str, dict[str, Any]]:
    """Return the finished runs of a folder by name; a run's own file counts before the bundle."""
    own = {path.stem: store.read_json(path) for path in Path(root).glob("*.json")}
    entries = dict(sorted((_bundled(root) | own).items()))
    for name, entry in entries.items():
        if not all(isinstance(entry.get(part), dict) for part in _PARTS):
            raise ValueError(
                f"{_file(Path(root), name)} is not a run; expected config, result and provenance "
                "in it. Keep other files elsewhere"
            )
    return entries


def _bundled(root: str | Path) -> dict[str, dict[str, Any]]:
    """Return the runs of a folder's bundle by name."""
    path = Path(root) / _BUNDLE
    if not path.exists():
        return {}
    unfit = (OSError, EOFError, zlib.error, ValueError, RecursionError)  # no gzip, no JSON
    no_run = (AttributeError, KeyError, TypeError)
    try:
        lines = gzip.decompress(path.read_bytes()).decode().splitlines()
        if not lines:
            raise ValueError("it is empty")
        return {entry.pop("run_id"): entry for entry in map(json.loads, lines)}
    except (*unfit, *no_run) as error:
        raise ValueError(
            f"{path} is not a bundle of runs ({error!r}); take it from the repository again, or "
            "delete it and run the study"
        ) from error


def gather(root: str | Path, path: str | Path) -> Path:
    """Write the finished runs of a folder as one parquet file, whole or not at all.

    Parameters
    ----------
    root : path
    path : path
        The file to write.

    Returns
    -------
    Path
        The file: rows and columns of `collect`. A column that parquet cannot hold as it is (kinds
        mixed in one column, dicts without keys) becomes JSON text; `read` undoes that.

    Raises
    ------
    ImportError
        If pyarrow is not installed.
    ValueError
        If no run has finished.
    """
    pyarrow, _ = _pyarrow()
    runs = collect(root)
    if runs.empty:
        raise ValueError(_no_run(root))
    fields, columns = zip(
        *(_packed(pyarrow, name, runs[name].tolist()) for name in runs), strict=True
    )
    return store.write_bytes(path, _as_parquet(pyarrow, fields, columns))


def read(path: str | Path) -> pd.DataFrame:
    """Read a file of `gather`; return what `collect` returned.

    Raises
    ------
    ImportError
        If pyarrow is not installed.
    """
    import pandas as pd

    _, parquet = _pyarrow()
    with parquet.ParquetFile(path) as file:
        table = file.read()
    return pd.DataFrame(
        {field.name: _unpacked(field, table[field.name]) for field in table.schema}
    )


def cost(runs: pd.DataFrame, command: str) -> dict[str, object]:
    """Return the provenance of a study from that of its runs: costs added up, the rest listed.

    Parameters
    ----------
    runs : DataFrame
        From `collect`, with a column ``seed``.
    command : str
        How to repeat the study.

    Returns
    -------
    dict
        ``wall_seconds`` and ``cpu_seconds`` (sums over runs), ``peak_memory_mb`` (MB, largest),
        ``date`` (last), ``dirty`` (any), ``seeds``, ``n_runs``, ``command``; versions, device and
        commit, each as the different values that occur.
    """
    part = {
        name.removeprefix("provenance."): runs[name]
        for name in runs.columns
        if name.startswith("provenance.")
    }
    total = {name: float(part[name].sum()) for name in ("wall_seconds", "cpu_seconds")}
    constant = ("python", "torch", "numpy", "smslib", "device", "n_cpu", "threads", "commit")
    listed = {name: ", ".join(sorted(set(part[name].astype(str)))) for name in constant}
    return {
        **listed,
        **total,
        "command": command,
        "date": part["date"].max(),
        "dirty": bool(part["dirty"].any()),
        "n_runs": len(runs),
        "peak_memory_mb": float(part["peak_memory_mb"].max()),
        "seeds": sorted(set(runs["seed"].tolist())),
    }


def of_study(runs: pd.DataFrame, study: Iterable[Config]) -> pd.DataFrame:
    """Return the runs of a study.

    Parameters
    ----------
    runs : DataFrame
        From `collect`.
    study : iterable of dict
    """
    names = {run_id(config) for config in study}
    return runs if runs.empty else runs[runs["run_id"].isin(names)]


def conclude(
    name: str,
    study: Sequence[Config],
    summarise: Callable[[pd.DataFrame], Mapping[str, Any]],
    *,
    root: str | Path,
    results: str | Path,
    command: str,
) -> Path:
    """Summarise what there is of a study, and store it with what it cost and what is missing.

    Parameters
    ----------
    name : str
        Of the summary, as in `smslib.store.put`.
    study : sequence of dict
    summarise : callable
        From the study's finished runs, as `collect` returns them, to flat keys.
    root : path
        Of the runs; those of other studies are left out.
    results : path
        Of the summaries.
    command : str
        How to repeat the study.

    Returns
    -------
    Path
        The summary's file.

    Raises
    ------
    FileNotFoundError
        If no run of the study has finished.
    """
    runs, n_wanted = of_study(collect(root), study), len({run_id(config) for config in study})
    if runs.empty:
        raise FileNotFoundError(f"no finished run of {name} in {root}; run it with --workers 1")
    provenance = cost(runs, command) | {"n_missing": n_wanted - len(runs)}
    return store.put(name, summarise(runs), root=results, provenance=provenance)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the command of a study the options that all of them have."""
    parser.add_argument("--results", type=Path, default=Path("book/results"), help="folder")
    parser.add_argument("--workers", type=int, default=2, help="0 only summarises what there is")
    parser.add_argument("--index", type=int, help="run this one of the study alone")
    parser.add_argument("--part", type=_part, metavar="I/N", help="run part I of N, from 0")
    parser.add_argument("--retry", action="store_true", help="run crashed ones again")
    parser.add_argument("--bundle", action="store_true", help="then keep all runs in one file")


def run_in_processes(
    task: Task, study: Sequence[Config], root: str | Path, given: argparse.Namespace
) -> None:
    """Run what is missing of a study in single-threaded processes; bundle the runs if asked to.

    Parameters
    ----------
    task, study, root
        As of `run`.
    given : Namespace
        What the options of `add_arguments` were set to.
    """
    if given.workers:
        _run_in_processes(task, study, root, given)
    if given.bundle:
        bundle(root)


def _run_in_processes(
    task: Task, study: Sequence[Config], root: str | Path, given: argparse.Namespace
) -> None:
    import torch

    index = given.index if given.part is None else range(len(study))[given.part]
    one_thread = {"initializer": torch.set_num_threads, "initargs": (1,)}
    with ProcessPoolExecutor(given.workers, get_context("spawn"), **one_thread) as executor:
        run(task, study, root, executor=executor, index=index, retry=given.retry)


def _part(text: str) -> slice:
    """Read ``I/N``: of N parts of a study, dealt out like cards, number I."""
    place, _, of = text.partition("/")
    if not (place.isdigit() and of.isdigit() and int(place) < int(of)):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no part of a study; expected I/N with I from 0 to N - 1, such as 0/40"
        )
    return slice(int(place), None, int(of))


def _merge(parts: Sequence[Config]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for part in parts:
        repeated = sorted(merged.keys() & part.keys())
        if repeated:
            raise ValueError(f"two axes set {repeated}; expected each key in one axis only")
        merged.update(part)
    return merged


def _named(study: Sequence[Config], index: int | Iterable[int] | None) -> dict[str, Config]:
    """Return the chosen configurations by run, refusing what cannot be stored."""
    chosen = [study[place] for place in _places(index, len(study))]
    reserved = sorted(_RECORD & set().union(*chosen))
    if reserved:
        raise ValueError(f"the study sets {reserved}, columns of the record itself; rename them")
    return {run_id(config): config for config in chosen}


def _places(index: int | Iterable[int] | None, n_runs: int) -> list[int]:
    if index is None:
        return list(range(n_runs))
    places = [_place(each) for each in (index if isinstance(index, Iterable) else [index])]
    outside = [place for place in places if not 0 <= place < n_runs]
    if outside:
        raise IndexError(
            f"index {outside[0]} is outside this study of {n_runs} runs; expected 0 to "
            f"{n_runs - 1}. Is it the study that the index was made for?"
        )
    return places


def _place(index: object) -> int:
    try:
        return operator.index(index)
    except TypeError as error:
        raise TypeError(
            f"index {index!r} names no run; expected an integer or integers, such as range(10) "
            "or int(os.environ['SLURM_ARRAY_TASK_ID'])"
        ) from error


def _file(root: Path, name: str) -> Path:
    return root / f"{name}.json"


def _error_file(root: Path, name: str) -> Path:
    return root / f"{name}.error"


def _parts(runs: Mapping[str, Config], size: int) -> Iterator[dict[str, Config]]:
    """Cut the runs into packs of a size, the last one smaller."""
    items = iter(runs.items())
    while part := dict(itertools.islice(items, size)):
        yield part


def _submit(
    executor: SupportsSubmit | None, task: Task, part: Mapping[str, Config], root: Path
) -> dict[str, Job]:
    """Start a pack of runs; return a job for each of them."""
    configs = list(part.values())
    if len(configs) == 1:
        return dict.fromkeys(part, _start(executor, _record, task, configs[0], root))
    job = _start(executor, _record_all, task, configs, root)
    return {name: _Member(job, place) for place, name in enumerate(part)}


def _start(executor: SupportsSubmit | None, function: Callable, *arguments: object) -> Job:
    """Start a call; without an executor, finish it."""
    job: Future = Future()
    try:
        if executor is not None:
            return executor.submit(function, *arguments)
        job.set_result(function(*arguments))
    except BrokenExecutor as error:  # a worker died early; the runs submitted before it count
        job.set_exception(error)
    return job


@dataclass(frozen=True, eq=False)
class _Member:
    """One run of a job that does several."""

    job: Job
    place: int

    def result(self) -> Path | None:
        """Wait for the whole job; return the run's file."""
        return self.job.result()[self.place]


def _resumable(function: Callable) -> Callable:
    """Let submitit put a job that ran out of time back in the queue: what it stored stays."""

    def checkpoint(*arguments: object) -> object:
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(function, *arguments)

    function.checkpoint = checkpoint
    return function


@_resumable
def _record_all(task: Task, configs: Sequence[Config], root: Path) -> list[Path | None]:
    return [_record(task, config, root) for config in configs]


@_resumable
def _record(task: Task, config: Config, root: Path) -> Path | None:
    """Run one configuration and write its file, or its error."""
    name = run_id(config)
    path, error_path = _file(root, name), _error_file(root, name)
    if path.exists():  # another process on the same study was faster
        return path
    try:
        entry = _measured(task, config)
    except Exception as error:  # noqa: BLE001 - one crashed run must not stop the others
        store.write_json(error_path, _crash(config, error))
        return None
    store.write_json(path, entry)  # not in the try: a full disk is no crash of the task
    error_path.unlink(missing_ok=True)
    return path


def _measured(task: Task, config: Config) -> dict[str, Any]:
    """Run the task on a copy of its configuration and return the entry to store."""
    with store.measure(
        seeds=[value for key, value in config.items() if key.endswith("seed")],
        command=f"sweep.run({task.__module__}.{task.__qualname__})",
        device=config.get("device", "cpu"),
    ) as provenance:
        result = task(copy.deepcopy(dict(config)))
    if not isinstance(result, Mapping):
        raise TypeError(f"the task returned {result!r}; expected a dict of results")
    result = store.plain(result)
    if repeated := _repeated(result, {**config, "provenance": provenance}):
        raise ValueError(
            f"the result repeats {repeated} of the configuration, of the record or of itself; "
            "rename them (in a table the keys of nested dicts are joined by dots)"
        )
    return {
        "config": dict(config),
        "result": result,
        "provenance": store.plain(provenance),
    }


def _repeated(result: Mapping[str, Any], others: Mapping[str, Any]) -> list[str]:
    """Return the keys of a result that `collect` could not tell from others."""
    own = Counter(name for name, _ in _columns(result))
    taken = others.keys() | dict(_columns(others)).keys() | _RECORD
    twice = {name for name, times in own.items() if times > 1}
    return sorted(twice | (taken & (own.keys() | result.keys())))


def _crash(config: Config, error: Exception) -> dict[str, Any]:
    """Describe a crash, its traceback as lines to be read in the file."""
    return {
        "config": dict(config),
        "error": "".join(traceback.format_exception_only(error)).strip(),
        "traceback": "".join(traceback.format_exception(error)).splitlines(),
    }


@contextlib.contextmanager
def _bar(
    n_runs: int, n_missing: int, *, crashed: int, shown: bool
) -> Iterator[Callable[[Path | None], None]]:
    """Show the study on a terminal, nothing in a log.

    The bar starts at what was done before, so that its remaining time is that of what is missing.
    """
    from tqdm import tqdm

    with tqdm(
        desc=f"{crashed} crashed",
        total=n_runs,
        initial=n_runs - n_missing,
        unit="run",
        disable=None if shown else True,
    ) as bar:

        def advance(finished: Path | None) -> None:
            nonlocal crashed
            crashed += finished is None
            bar.set_description(f"{crashed} crashed", refresh=False)
            bar.update()

        yield advance


def _wait(jobs: Mapping[str, Job], advance: Callable[[Path | None], None]) -> dict[str, Exception]:
    """Wait for all jobs; return the errors of those that the executor lost."""
    lost = {}
    names = {id(job): name for name, job in jobs.items()}
    for job in _as_they_finish(list(jobs.values())):
        try:
            advance(job.result())
        except Exception as error:  # noqa: BLE001 - each executor has its own
            lost[names[id(job)]] = error
    return lost


def _as_they_finish(jobs: Sequence[Job]) -> Iterable[Job]:
    """Order jobs by completion where they can tell, by submission elsewhere."""
    return as_completed(jobs) if all(isinstance(job, Future) for job in jobs) else jobs


def _warn_of_crashes(root: Path, run: Iterable[str], skipped: Sequence[str]) -> None:
    """Warn of runs that were tried and have no file, and of those that were not tried."""
    crashed = [name for name in run if not _file(root, name).exists()]
    told = [f"{len(crashed)} runs crashed"] if crashed else []
    told += [f"{len(skipped)} that crashed earlier were skipped"] if skipped else []
    if told:
        first = _error_file(root, sorted([*crashed, *skipped])[0])
        warnings.warn(
            f"{', '.join(told)}; first {first} ({_reason(first)}). The others are stored; "
            "sweep.run(..., retry=True) runs these again",
            RuntimeWarning,
            stacklevel=3,
        )


def _reason(path: Path) -> str:
    with contextlib.suppress(FileNotFoundError):
        return store.read_json(path)["error"]
    return "no traceback was written"


def _raise_if_lost(lost: Mapping[str, Exception], n_runs: int) -> None:
    for name, error in lost.items():
        raise RuntimeError(
            f"the executor lost {len(lost)} of {n_runs} runs, the first {name} "
            f"({type(error).__name__}: {error}). A worker that died was often out of memory: use "
            "fewer. What has finished is stored; run the study again for the rest"
        ) from error


def _row(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of a run, those of nested keys behind the others."""
    row = {"run_id": name, **entry["config"], **entry["result"]}
    row |= {"provenance": entry["provenance"]}
    return dict(_columns(dict(sorted(row.items(), key=lambda item: isinstance(item[1], dict)))))


def _columns(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield columns: nested keys are joined by dots."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _columns(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _pyarrow() -> tuple[ModuleType, ModuleType]:
    with from_extra("data"):
        import pyarrow
        from pyarrow import parquet
    return pyarrow, parquet


def _packed(pyarrow: ModuleType, name: str, values: list[Any]) -> tuple[Any, Any]:
    """Return an Arrow field and column: native where Arrow gives the values back, else JSON."""
    # NaN is where a run lacks a key that others have.
    values = [None if value != value else value for value in values]
    text = json.dumps(values)
    with contextlib.suppress(pyarrow.ArrowException, OverflowError):
        column = pyarrow.array(values)
        native = pyarrow.field(name, column.type)
        _as_parquet(pyarrow, [native], [column[:0]])  # Arrow has types that parquet lacks
        if json.dumps(column.to_pylist()) == text:
            return native, column
    texts = pyarrow.array([json.dumps(value) for value in values])
    return pyarrow.field(name, texts.type, metadata=_AS_JSON), texts


def _as_parquet(pyarrow: ModuleType, fields: Sequence[Any], columns: Sequence[Any]) -> bytes:
    """Return columns as the bytes of a parquet file."""
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.Table.from_arrays(columns, schema=pyarrow.schema(fields))
    pyarrow.parquet.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def _unpacked(field: Any, column: Any) -> list[Any]:  # noqa: ANN401 - pyarrow has no stubs
    values = column.to_pylist()
    is_json = (field.metadata or {}).items() >= _AS_JSON.items()
    return [json.loads(text) for text in values] if is_json else values
