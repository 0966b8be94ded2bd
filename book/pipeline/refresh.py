"""Write the committed half of each pair from freshly executed copies."""

from collections.abc import Callable
from pathlib import Path

import jupytext
from jupytext.config import load_jupytext_config
from nbformat import NotebookNode

from pipeline import files, pages
from pipeline.execute import Page, fingerprint, is_fresh


def refresh(root: Path, *, report: Callable[[str], None]) -> list[str]:
    """Copy the quick profile's executed notebooks over the committed ones, where they differ.

    The texts are brought to the form that `jupytext --sync` gives them, so that a later sync
    changes neither half. A page that was edited after it was run is left alone: the executed copy
    holds the text before the edit.

    Parameters
    ----------
    root : Path
        The repository.
    report : callable
        Gets one line per page left alone.

    Returns
    -------
    list of str
        Names of the files that changed.
    """
    changed = []
    for source in pages.sources(root):
        page = Page(root, source, "quick")
        if not is_fresh(page, fingerprint(page)):
            report(
                f"{source.stem}: changed since it was run, left alone; run `make notebooks` again"
            )
            continue
        executed = page.executed.read_bytes()
        text = canonical_text(pages.read_executed(page.executed), source)
        # The notebook last: a sync takes the newer half as the source.
        for path, content in ((source, text.encode()), (page.committed, executed)):
            if files.write_if_changed(path, content):
                changed.append(path.name)
    return changed


def canonical_text(notebook: NotebookNode, source: Path) -> str:
    """Return the text that jupytext makes of ``notebook`` under the folder's configuration."""
    config = load_jupytext_config(str(source))
    return jupytext.writes(notebook, fmt=pages.FORMAT, config=config)
