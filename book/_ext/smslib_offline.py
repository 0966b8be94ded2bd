"""Keep pages whole without a network: ship MathJax, drop what would run cells on a server."""

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


def is_thebe(script: Any) -> bool:  # noqa: ANN401
    """Whether a script belongs to sphinx-thebe, which Jupyter Book loads even when it is off.

    It declares its constants twice and so puts an error on the console of every page.
    """
    if "THEBE_JS_URL" in (getattr(script, "attributes", {}).get("body") or ""):
        return True
    return "sphinx-thebe" in str(getattr(script, "filename", script) or "")


def _drop_thebe(app: Sphinx, page: str, template: str, context: dict, doctree: object) -> None:
    context["script_files"][:] = [s for s in context["script_files"] if not is_thebe(s)]


def _configure(app: Sphinx, config: Any) -> None:  # noqa: ANN401
    config.mathjax_path = "mathjax/tex-chtml.js"


def setup(app: Sphinx) -> dict[str, Any]:
    """Point Sphinx at the local copy of MathJax, made when the pages are written."""
    app.connect("config-inited", _configure)
    app.connect("build-finished", _copy)
    app.connect("html-page-context", _drop_thebe, priority=900)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
