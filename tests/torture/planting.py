"""A copy of the project to spoil, and tests run on it in a forked process.

What all tests import, torch above all, is imported once; the package is imported anew from the
copy in every child.
"""

import contextlib
import importlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 120  # of CPU for the tests of one fault
SHARED = (
    "torch",
    "numpy",
    "scipy.stats",
    "scipy.optimize",
    "scipy.sparse",
    "pandas",
    "sklearn.linear_model",
    "sklearn.ensemble",
    "hypothesis",
    "beartype",
    "jaxtyping",
    "pytest",
    "nbval.plugin",
    "jupytext",
    "anndata",
)


def say(line):
    """Show a line at once, also where the output is a file."""
    sys.stdout.write(line)
    sys.stdout.flush()


@contextlib.contextmanager
def copied():
    """Lend a copy of the files that git knows, or would."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "-co", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    wanted = ("smslib/", "tests/", "book/pipeline/", "book/_ext/", "pyproject.toml", "conftest.py")
    with tempfile.TemporaryDirectory() as place:
        for name in filter(None, listed.split("\0")):
            if name.startswith(wanted) and (ROOT / name).is_file():
                target = Path(place) / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, target)
        yield Path(place)


@contextlib.contextmanager
def planted(copy, name, text):
    """Give a file of the copy another text for a while."""
    path = copy / name
    kept = path.read_text()
    path.write_text(text)
    try:
        yield
    finally:
        path.write_text(kept)


def prepare():
    """Import what the tests share."""
    for name in SHARED:
        importlib.import_module(name)
    for name in [name for name in sys.modules if name.partition(".")[0] == "smslib"]:
        del sys.modules[name]


def noticed_by(copy, arguments):
    """Run tests on the copy until the first that fails; return its name, "" if none does.

    Tests that use too much time have noticed, too.
    """
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        try:
            signal.signal(signal.SIGPROF, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            os.write(write, _first_failure(copy, arguments).encode()[:4000])
        except BaseException as error:  # noqa: BLE001 - told to the parent
            os.write(write, f"ERROR: {type(error).__name__}: {error}".encode()[:4000])
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as told:
        words = told.read()
    _, status = os.waitpid(child, 0)
    return "too much time" if os.WIFSIGNALED(status) else words


class _Failures:
    """Remembers the first test that failed."""

    first = ""

    def pytest_runtest_logreport(self, report):
        if report.failed and not self.first:
            self.first = report.nodeid

    def pytest_collectreport(self, report):
        if report.failed and not self.first:
            self.first = f"{report.nodeid} (import)"


def _first_failure(copy, arguments):
    import pytest

    for name in [name for name in sys.modules if name.partition(".")[0] in ("smslib", "conftest")]:
        del sys.modules[name]
    os.chdir(copy)
    sys.path[:] = [str(copy), *(path for path in sys.path if path not in ("", str(ROOT)))]
    failures = _Failures()
    options = ["-q", "-x", "-n0", "-p", "no:cacheprovider", "-W", "ignore:Module already imported"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = pytest.main([*options, *arguments], plugins=[failures])
    import smslib

    if Path(smslib.__file__).parent != copy / "smslib":
        return "ERROR: tested another copy"
    return failures.first or ("" if code == 0 else f"ERROR: pytest ended with {int(code)}")
