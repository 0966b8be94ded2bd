"""Typeset formulas without a network: ship MathJax with the book instead of linking to it."""

import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

PACKAGE = "sphinx-mathjax-offline"
# The parts that the TeX-to-HTML bundle loads; the package's other 20 MB are other formats.
PARTS = ("tex-chtml.js", "input/tex/extensions", "output/chtml/fonts")


def copy_mathjax(source: Path, target: Path) -> None:
    """Copy the parts of MathJax that the book uses, unless they are there."""
    for part in PARTS:
        origin, copy = source / part, target / part
        if copy.exists():
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if origin.is_dir() else shutil.copyfile)(origin, copy)


def mathjax_folder() -> Path:
    """Return where the installed package keeps MathJax."""
    distribution = metadata.distribution(PACKAGE)
    return Path(str(distribution.locate_file(f"{PACKAGE}/static/mathjax")))


def _copy(app: Sphinx, problem: Exception | None) -> None:
    if problem is None and app.builder.format == "html":
        copy_mathjax(mathjax_folder(), Path(app.outdir, "_static", "mathjax"))


def _configure(app: Sphinx, config: Any) -> None:  # noqa: ANN401
    config.mathjax_path = "mathjax/tex-chtml.js"


def setup(app: Sphinx) -> dict[str, Any]:
    """Point Sphinx at the local copy and make it when the pages are written."""
    app.connect("config-inited", _configure)
    app.connect("build-finished", _copy)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
