"""Keep pages whole without a network, and light.

Ship MathJax, drop what would run cells on a server and the icons that no page shows.
"""

import filecmp
import re
import shutil
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

PACKAGE = "sphinx-mathjax-offline"
# The parts that the TeX-to-HTML bundle loads; the package's other 20 MB are other formats.
PARTS = ("tex-chtml.js", "input/tex/extensions", "output/chtml/fonts")
THEME = "pydata-sphinx-theme"
ICONS = "scripts/fontawesome.js"
# A drawing of the theme's collection: name:[width,height,[other names],"code",path or paths]
_DRAWING = re.compile(
    r"""(?P<name>"[a-z0-9-]+"|[\w$]+):\[\d+,\d+,\[(?P<others>[^\]]*)\],"[0-9a-f]+","""
    r"""(?:"[^"]*"|\["[^"]*","[^"]*"\])\],?"""
)
_SHOWN = re.compile(r"\bfa-([a-z0-9-]+)")


def copy_mathjax(source: Path, target: Path) -> None:
    """Copy the parts of MathJax that the book uses, file by file, unless they are the same there.

    A file that is there is whole, also where an earlier copying was killed.
    """
    parts = [path for part in PARTS for path in (source / part, *(source / part).rglob("*"))]
    names = [path.relative_to(source) for path in parts if path.is_file()]
    _, other, absent = filecmp.cmpfiles(source, target, names, shallow=False)
    for name in other + absent:
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        draft = copy.with_name(f"{copy.name}.tmp")
        shutil.copyfile(source / name, draft)
        draft.replace(copy)


def mathjax_folder() -> Path:
    """Return where the installed package keeps MathJax."""
    distribution = metadata.distribution(PACKAGE)
    return Path(str(distribution.locate_file(f"{PACKAGE}/static/mathjax")))


def only_icons(script: str, wanted: set[str]) -> str:
    """Return the theme's script of icons with the drawings of the wanted names alone.

    The theme ships two thousand, more bytes than all else on a page; the book shows twenty.
    """

    def kept(drawing: re.Match[str]) -> str:
        names = {drawing["name"], *drawing["others"].split(",")}
        return drawing[0] if wanted.intersection(n.strip('"') for n in names) else ""

    return _DRAWING.sub(kept, script)


def icons_shown(texts: Iterable[str]) -> set[str]:
    """Return the names of the icons in pages and scripts, by their classes."""
    return {name for text in texts for name in _SHOWN.findall(text)}


def _trim_icons(output: Path) -> None:
    copy = output / "_static" / ICONS
    if not copy.is_file():
        return
    # From the theme, not from the copy: a later build may show an icon dropped before.
    origin = metadata.distribution(THEME).locate_file(
        f"pydata_sphinx_theme/theme/pydata_sphinx_theme/static/{ICONS}"
    )
    scripts = [path for path in copy.parent.glob("*.js") if path != copy]
    texts = (path.read_text() for path in [*output.rglob("*.html"), *scripts])
    copy.write_text(only_icons(Path(str(origin)).read_text(), icons_shown(texts)))


def _copy(app: Sphinx, problem: Exception | None) -> None:
    if problem is None and app.builder.format == "html":
        copy_mathjax(mathjax_folder(), Path(app.outdir, "_static", "mathjax"))
        _trim_icons(Path(app.outdir))


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
    """Point Sphinx at the local copy of MathJax; make it and trim icons after the pages."""
    app.connect("config-inited", _configure)
    app.connect("build-finished", _copy)
    app.connect("html-page-context", _drop_thebe, priority=900)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
