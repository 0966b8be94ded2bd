"""Execute the notebooks with papermill, two at a time, and only those whose inputs changed."""

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pipeline import files, pages
from pipeline.normalise import INJECTED, normalise

WORKERS = 2
TIMEOUT = {"quick": 900, "full": 24 * 3600}  # seconds per notebook
_CACHED = (
    "smslib/**/*.py",
    "book/results/**/*",
    "book/pipeline/execute.py",
    "book/pipeline/normalise.py",
    "book/pipeline/pages.py",
)
_RUNNING: set[subprocess.Popen] = set()  # papermill's processes, to be ended with this one


class NotebookFailed(RuntimeError):
    """A notebook stopped with an error; the message names the notebook, the cell and the log."""


@dataclass(frozen=True)
class Page:
    """One notebook under one profile, and where its executed copy lives."""

    root: Path
    source: Path
    profile: str

    @property
    def executed(self) -> Path:
        """Path of the executed copy; log, stamp and record lie beside it."""
        folder = self.root / "_build" / "executed" / self.profile
        return folder / f"{self.source.stem}.ipynb"

    @property
    def committed(self) -> Path:
        """Path of the committed pair."""
        return self.source.with_suffix(".ipynb")

    @property
    def stamp(self) -> Path:
        """Path of the fingerprint of the inputs that gave the executed copy."""
        return self.executed.with_suffix(".sha256")

    @property
    def record(self) -> Path:
        """Path of the facts about the run that the page's footer shows."""
        return self.executed.with_suffix(".json")

    @property
    def log(self) -> Path:
        """Path of the run's log."""
        return self.executed.with_suffix(".log")


def kernel_environment(root: Path, base: dict[str, str]) -> dict[str, str]:
    """Return the environment notebooks run in: one thread, absolute data path, fixed hashing.

    The package is found at ``root``, whichever tree the environment was installed from.
    """
    others = filter(None, base.get("PYTHONPATH", "").split(os.pathsep))
    path = os.pathsep.join(dict.fromkeys([str(root), *others]))
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    data = {"SMS_DATA_DIR": str(root / base["SMS_DATA_DIR"])} if base.get("SMS_DATA_DIR") else {}
    return {**base, **threads, **data, "PYTHONPATH": path, "PYTHONHASHSEED": "0"}


def fingerprint(page: Page, missing: Iterable[str] = ()) -> str:
    """Hash everything an executed notebook depends on.

    Its text, the profile, the package, the stored results, the interpreter and which data are
    missing; other notebooks do not enter, so editing one reruns one.
    """
    profile = page.root / "notebooks" / "profiles" / f"{page.profile}.yml"
    inputs = [page.source, profile, page.root / "requirements.lock"]
    for pattern in _CACHED:
        inputs += sorted(path for path in page.root.glob(pattern) if _counts(path, page.root))
    digest = hashlib.sha256(f"{platform.python_version()} {sorted(missing)}".encode())
    for path in filter(Path.is_file, inputs):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"\n{path.relative_to(page.root).as_posix()} {content}".encode())
    return digest.hexdigest()


def _counts(path: Path, root: Path) -> bool:
    """Whether a path is a file that a notebook can read, no editor's copy nor a draft."""
    hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    return path.is_file() and not hidden


def is_fresh(page: Page, print_: str) -> bool:
    """Whether the executed copy came from inputs with this fingerprint."""
    made = page.executed.is_file() and page.record.is_file() and page.stamp.is_file()
    return made and page.stamp.read_text() == print_


def execute_page(page: Page, *, missing: Iterable[str] = (), timeout: float | None = None) -> None:
    """Run one notebook and keep its normalised copy, or take the stored outputs without its data.

    Raises
    ------
    NotebookFailed
        If a cell raises or the time is up, or if data and stored outputs are both missing.
    """
    missing = list(missing)
    print_ = fingerprint(page, missing)
    start = time.monotonic()
    if missing:
        notebook, origin = _stored(page, missing), "stored"
    else:
        limit = TIMEOUT[page.profile] if timeout is None else timeout
        notebook, origin = normalise(_papermill(page, limit)), "executed"
    record = {
        "profile": "quick" if missing else page.profile,
        "origin": origin,
        "missing": missing,
        "seconds": round(time.monotonic() - start, 1),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
    files.write_atomic(page.executed, pages.dump(notebook))
    files.write_atomic(page.record, json.dumps(record, indent=1, sort_keys=True).encode())
    files.write_atomic(page.stamp, print_.encode())


def execute_all(
    root: Path,
    profile: str,
    *,
    report: Callable[[str], None],
    require_data: bool = False,
    force: bool = False,
) -> list[Page]:
    """Bring every executed notebook up to date, two at a time.

    Parameters
    ----------
    root : Path
        The repository.
    profile : {"quick", "full"}
        ``quick`` runs the defaults of the parameter cell, without injecting anything.
    report : callable
        Gets one line per notebook.
    require_data : bool
        Fail where a data set is missing instead of showing the stored outputs.
    force : bool
        Run even what is up to date.

    Raises
    ------
    NotebookFailed
        After all others have finished, with one paragraph per failed notebook.
    """
    todo = [Page(root, source, profile) for source in pages.sources(root)]
    missing = {page: pages.missing_data(pages.read_source(page.source)) for page in todo}
    if require_data and any(missing.values()):
        names = sorted({name for absent in missing.values() for name in absent})
        message = f"data sets {names} are needed to refresh the stored outputs; see SMS_DATA_DIR"
        raise NotebookFailed(message)

    def work(page: Page) -> str | None:
        return _attempt(page, missing[page], report=report, force=force)

    with ThreadPoolExecutor(WORKERS) as pool:
        started = [pool.submit(work, page) for page in todo]
        try:
            failures = [failure for run in started if (failure := run.result())]
        except BaseException:  # told to stop: what was started stops, too
            _stop(started)
            raise
    if failures:
        raise NotebookFailed("\n\n".join(failures))
    return todo


def _stop(started: Iterable[Future]) -> None:
    """Begin nothing more, and end what runs; a process may be about to appear, so ask again."""
    for run in started:
        run.cancel()
    while not all(run.done() for run in started):
        for process in tuple(_RUNNING):
            process.terminate()
        time.sleep(0.1)


def _attempt(
    page: Page, missing: list[str], *, report: Callable[[str], None], force: bool
) -> str | None:
    if not force and is_fresh(page, fingerprint(page, missing)):
        report(f"{page.source.stem}: up to date")
        return None
    try:
        execute_page(page, missing=missing)
    except NotebookFailed as failure:
        report(f"{page.source.stem}: FAILED")
        return str(failure)
    seconds = json.loads(page.record.read_text())["seconds"]
    note = pages.missing_data_note(missing) if missing else f"{page.profile}, {seconds} s"
    report(f"{page.source.stem}: {note}")
    return None


def _stored(page: Page, missing: list[str]) -> pages.NotebookNode:
    if not page.committed.is_file():
        message = f"{page.source.name}: {missing} not available and no stored outputs to show"
        raise NotebookFailed(message)
    return pages.read_executed(page.committed)


def _papermill(page: Page, timeout: float) -> pages.NotebookNode:
    """Run papermill in its own process and return what it made."""
    page.executed.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=page.executed.parent) as scratch:
        given, made = Path(scratch, "in.ipynb"), Path(scratch, "out.ipynb")
        given.write_bytes(pages.dump(pages.read_source(page.source)))
        code = _run_logged(_command(page, given, made), page, timeout)
        if code != 0:
            raise NotebookFailed(
                f"{page.source.name}{_explain(made, code, timeout)}; {_log(page)}"
            )
        return pages.read_executed(made)


def _command(page: Page, given: Path, made: Path) -> list[str]:
    command = [sys.executable, "-m", "papermill", str(given), str(made), "--kernel", "python3"]
    command += ["--cwd", str(page.root / "notebooks"), "--no-progress-bar", "--log-output"]
    if page.profile != "quick":
        profile = page.root / "notebooks" / "profiles" / f"{page.profile}.yml"
        command += ["--parameters_file", str(profile)]
    return command


def _run_logged(command: list[str], page: Page, timeout: float) -> int | None:
    """Return the exit status, or None when the time was up."""
    environment = kernel_environment(page.root, dict(os.environ))
    with (
        page.log.open("wb") as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=log) as process,
    ):
        _RUNNING.add(process)
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        finally:
            process.kill()  # nothing, where it has ended
            _RUNNING.discard(process)


def _log(page: Page) -> str:
    return f"log in {page.log.relative_to(page.root)}"


def _explain(made: Path, code: int | None, timeout: float) -> str:
    """Say which cell failed and how, from what papermill left behind."""
    if code is None:
        return f": time is up after {timeout:g} s"
    cells = pages.read_executed(made).cells if made.is_file() else []
    for number, cell in enumerate(filter(_is_own_code, cells), start=1):
        for output in cell.outputs:
            if output.output_type == "error":
                first = cell.source.strip().splitlines()[0]
                return f", code cell {number} ({first!r}): {output.ename}: {output.evalue}"
    return ": papermill failed outside the cells"


def _is_own_code(cell: pages.NotebookNode) -> bool:
    return cell.cell_type == "code" and INJECTED not in cell.metadata.get("tags", [])
