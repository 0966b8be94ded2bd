"""Lay out what the renderer reads under ``_build/src``, so that the tree itself stays clean."""

import json
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from nbformat import NotebookNode, v4

from pipeline import files, pages
from pipeline.execute import Page
from pipeline.normalise import bridge_alt_text

BUILD_INFO = "build.json"
PACKAGES = ("torch", "numpy", "scipy", "anndata", "jupyter-book")
_COPIED = (
    "_config.yml",
    "_toc.yml",
    "LICENSE",
    "CITATION.cff",
    "book/**/*",
    "smslib/**/*.py",
    "notebooks/profiles/*.yml",
    "notebooks/*.png",
    "notebooks/*.svg",
)


def stage(root: Path, folder: Path, profile: str | None) -> list[str]:
    """Bring ``folder`` up to date with the sources and notebooks.

    Parameters
    ----------
    root : Path
        The repository.
    folder : Path
        Where the renderer will read, usually ``_build/src``.
    profile : {"quick", "full"} or None
        Which executed copies to show; None shows the committed outputs.

    Returns
    -------
    list of str
        Relative paths that changed.
    """
    contents = {path.relative_to(root).as_posix(): path.read_bytes() for path in _copied(root)}
    records = {}
    for source in pages.sources(root):
        page = Page(root, source, profile or "quick")
        name = f"notebooks/{source.stem}"
        records[name] = _record(page, executed=profile is not None)
        notebook = pages.read_executed(page.executed if profile else page.committed)
        contents[f"{name}.ipynb"] = pages.dump(_prepared(notebook, records[name]))
    contents[BUILD_INFO] = _build_info(root, folder / BUILD_INFO, records)
    return files.mirror(contents, folder)


def git_state(root: Path) -> dict[str, Any]:
    """Return the commit checked out at ``root`` and whether the tree differs from it.

    Git answers for the repository of any folder above, which may know nothing of this tree.
    """
    if not _git(root, "ls-files", "--error-unmatch", "smslib/__init__.py"):
        return {"commit": "unknown", "dirty": False}
    commit = _git(root, "rev-parse", "--short=10", "HEAD") or "unknown"
    return {"commit": commit, "dirty": bool(_git(root, "status", "--porcelain"))}


def _git(root: Path, *arguments: str) -> str:
    """Return a git command's output, or nothing outside a repository or without git."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _copied(root: Path) -> list[Path]:
    found = [path for pattern in _COPIED for path in root.glob(pattern) if path.is_file()]
    return sorted(path for path in found if "__pycache__" not in path.parts)


def _record(page: Page, *, executed: bool) -> dict[str, Any]:
    if executed:
        return json.loads(page.record.read_text())
    return {"profile": "quick", "origin": "stored", "missing": []}


def _prepared(notebook: NotebookNode, record: Mapping[str, Any]) -> NotebookNode:
    """Return what the renderer needs, with a note under the title if the page lacks its data."""
    notebook = bridge_alt_text(notebook)
    if record["missing"]:
        note = f":::{{warning}}\n{pages.missing_data_note(record['missing'])}\n:::"
        cell = v4.new_markdown_cell(note, id="missing-data")
        notebook.cells = [*notebook.cells[:1], cell, *notebook.cells[1:]]
    return notebook


def _build_info(root: Path, path: Path, records: Mapping[str, Any]) -> bytes:
    """Return the build's facts; the date stays the old one while all others do.

    Otherwise every page would differ every day and nothing could be reused.
    """
    versions = {name: metadata.version(name) for name in PACKAGES}
    versions["python"] = platform.python_version()
    info = {**git_state(root), "versions": versions, "pages": records}
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    if path.is_file():
        old = json.loads(path.read_text())
        old_date = old.pop("date")
        date = old_date if old == info else date
    return json.dumps({**info, "date": date}, indent=1, sort_keys=True).encode()
