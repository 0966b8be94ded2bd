"""Render staged sources with Jupyter Book; every warning is an error, every time."""

import hashlib
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from pipeline import files, pages

# The console script may be unusable where the checkout's path has spaces or has moved.
_JUPYTER_BOOK = "import sys; from jupyter_book.cli.main import main; sys.exit(main())"
_FLAGS = ("--warningiserror", "--nitpick", "--keep-going", "--quiet")
_PROBLEM = re.compile(r"\b(WARNING|ERROR|CRITICAL|Error)\b")
# Titles, labels, and directives with their options.
_REFERABLE = re.compile(r"^(?:#|\(.*\)=|\s*(?:`{3,}|:{3,})\{|\s*:\w+:).*$", re.MULTILINE)
_FOLLOWED = ("book/results/", "build.json")
_TERMINAL_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class RenderFailed(RuntimeError):
    """The book has warnings or errors; the message lists them and names the log."""


def render(source: Path, output: Path) -> Path:
    """Render ``source`` into ``output/_build/html`` and return the path of the first page.

    Nothing is done when the very same sources were rendered without a problem before.

    Raises
    ------
    RenderFailed
        On any warning.
    """
    build = output.resolve() / "_build"
    index, stamp, print_ = build / "html" / "index.html", build / "rendered", fingerprint(source)
    if index.is_file() and stamp.is_file() and stamp.read_text() == print_:
        return index
    build.mkdir(parents=True, exist_ok=True)
    shared, names = build / "shared", shared_fingerprint(source)
    if not stamp.is_file() or not shared.is_file() or shared.read_text() != names:
        # The last rendering was killed or had warnings. Sphinx would not repeat these, and would
        # leave out what it writes last, the index of the search among it. Or something changed
        # that pages use without Sphinx knowing: it would leave them as they were.
        shutil.rmtree(build / ".doctrees", ignore_errors=True)
    stamp.unlink(missing_ok=True)
    call = command(output, *_FLAGS)
    done = subprocess.run(call, cwd=source, capture_output=True, text=True, check=False)
    log = build / "render.log"
    log.write_text(done.stdout + done.stderr)
    if done.returncode != 0:
        message = f"the book does not render cleanly:\n{problems(done.stderr)}\nlog in {log}"
        raise RenderFailed(message)
    files.write_atomic(shared, names.encode())
    files.write_atomic(stamp, print_.encode())
    return index


def command(output: Path, *options: str) -> list[str]:
    """Return the call of Jupyter Book that builds the working folder into ``output``."""
    where = ["--path-output", str(output.resolve())]
    return [sys.executable, "-c", _JUPYTER_BOOK, "build", ".", *options, *where]


def fingerprint(folder: Path) -> str:
    """Hash the names and contents of all files under ``folder``."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def shared_fingerprint(folder: Path) -> str:
    """Hash all that one page may show of another, and what every page is made with.

    Sphinx, and every file but pages, results and the build's facts, whose use it follows; of a
    page its name and the lines that others can refer to; the glossary as a whole.
    """
    digest = hashlib.sha256(metadata.version("sphinx").encode())
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if not name.startswith(_FOLLOWED):
            content = _referable(path) if path.suffix in (".md", ".ipynb") else path.read_bytes()
            digest.update(f"{name} {hashlib.sha256(content).hexdigest()}\n".encode())
    return digest.hexdigest()


def _referable(page: Path) -> bytes:
    """Return the titles, labels and directives of a page; the whole of one with a glossary."""
    text = page.read_text()
    if page.suffix == ".ipynb":
        cells = pages.read_executed(page).cells
        text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return (text if "{glossary}" in text else "\n".join(_REFERABLE.findall(text))).encode()


def problems(log: str) -> str:
    """Return the lines of a renderer's log that report a problem, without its traceback."""
    reported = _TERMINAL_COLOUR.sub("", log).partition("Traceback (most recent call last)")[0]
    found = [line for line in reported.splitlines() if _PROBLEM.search(line)]
    return "\n".join(found) or _TERMINAL_COLOUR.sub("", log).strip()[-2000:]
