"""What the pipeline knows about a notebook from its text: pair, parameters, data, profile."""

import ast
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import yaml
from nbformat import NotebookNode

FORMAT = "md:myst"


def sources(root: Path) -> list[Path]:
    """Return the notebooks' texts, ``notebooks/*.md``, by name."""
    return sorted((root / "notebooks").glob("*.md"))


def read_source(source: Path) -> NotebookNode:
    """Read a MyST text as a notebook without outputs."""
    return jupytext.read(source, fmt=FORMAT)


def read_executed(path: Path) -> NotebookNode:
    """Read an ``.ipynb``."""
    return nbformat.read(path, as_version=4)


def dump(notebook: NotebookNode) -> bytes:
    """Return the bytes of an ``.ipynb``, always in the same key order."""
    return (nbformat.writes(notebook, version=nbformat.NO_CONVERT).rstrip("\n") + "\n").encode()


def profile_parameters(root: Path, profile: str) -> dict[str, Any]:
    """Read ``notebooks/profiles/<profile>.yml``."""
    return yaml.safe_load((root / "notebooks" / "profiles" / f"{profile}.yml").read_text())


def parameter_cell(notebook: NotebookNode) -> dict[str, Any]:
    """Return the literal assignments of the cell tagged ``parameters``.

    Raises
    ------
    ValueError
        If there is not exactly one such cell.
    """
    cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(cells) != 1:
        message = f"expected one cell tagged 'parameters', found {len(cells)}"
        raise ValueError(message)
    assignments = [
        line for line in ast.parse(cells[0].source).body if isinstance(line, ast.Assign)
    ]
    return {line.targets[0].id: ast.literal_eval(line.value) for line in assignments}


def declared(notebook: NotebookNode, key: str) -> list[str]:
    """Return ``smslib: {<key>: ...}`` of a notebook's header as a list of names."""
    value = notebook.metadata.get("smslib", {}).get(key, [])
    return [value] if isinstance(value, str) else list(value)


def _on_hand(name: str) -> bool:
    return importlib.import_module("smslib.perturbseq").available(name)


def missing_data(
    notebook: NotebookNode, *, available: Callable[[str], bool] = _on_hand
) -> list[str]:
    """Return the declared data sets that are neither on disk nor downloadable."""
    return [name for name in declared(notebook, "data") if not available(name)]


def missing_data_note(missing: list[str]) -> str:
    """Return the sentence that a reader of a page without its data is shown."""
    return (
        f"Data not found here: {', '.join(missing)} (neither on disk nor downloadable); "
        "showing the stored outputs."
    )
