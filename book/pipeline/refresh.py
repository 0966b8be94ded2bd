"""Write the committed half of each pair from freshly executed copies."""

from pathlib import Path

from pipeline import files, pages
from pipeline.execute import Page


def refresh(root: Path) -> list[str]:
    """Copy the quick profile's executed notebooks over the committed ones, where they differ.

    Returns
    -------
    list of str
        Names of the notebooks that changed.
    """
    changed = []
    for source in pages.sources(root):
        page = Page(root, source, "quick")
        if files.write_if_changed(page.committed, page.executed.read_bytes()):
            changed.append(page.committed.name)
    return changed
