"""Mend what a screen reader stumbles over, and mark figures that a phone would shrink too far."""

import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

# pandas leaves the corner of a table empty, and an empty heading is announced as one.
_EMPTY_HEADING = re.compile(r"<th(?P<attributes>(?:\s[^>]*)?)>\s*(?:<p>\s*</p>\s*)?</th>")
# docutils writes a list whose items have a role that is no longer one of list items.
_ENTRY = 'role="doc-biblioentry"'
# An output that a phone scrolls sideways has to be reachable by keys: one with a wide figure.
_SCROLLS = re.compile(r'<div class="[^"]*\bscrolls\b[^"]*"')
# And a drawing, which keeps a width at which its words can be read.
_DRAWING = re.compile(r'<figure(?P<attributes>[^>]*)>(?=\s*<img [^>]*src="[^"]*\.svg")')
_WIDE = 800  # pixels


def mended(html: str) -> str:
    """Return ``html`` with plain cells for empty headings, lists of items for bibliographies.

    Outputs and drawings that scroll can be reached by keys.
    """
    html = _EMPTY_HEADING.sub(r"<td\g<attributes>></td>", html)
    html = _SCROLLS.sub(r'\g<0> tabindex="0"', html)
    html = _DRAWING.sub(r'<figure\g<attributes> tabindex="0">', html)
    return html.replace(_ENTRY, 'role="listitem"')


def png_width(path: Path) -> int:
    """Return the width of a PNG in pixels; of any other file, 0."""
    with path.open("rb") as file:
        head = file.read(20)
    return int.from_bytes(head[16:20], "big") if head.startswith(b"\x89PNG") else 0


def _mark_wide(app: Sphinx, doctree: nodes.document, page: str) -> None:
    for image in doctree.findall(nodes.image):
        path = Path(app.srcdir, image["uri"])
        if path.is_file() and png_width(path) > _WIDE:
            image["classes"].append("wide")
            if output := _output_of(image):
                output["classes"].append("scrolls")


def _output_of(node: nodes.Node) -> nodes.Element | None:
    """Return the output of a cell that a node stands in, if it stands in one."""
    while node := node.parent:
        if "cell_output" in node["classes"]:
            return node
    return None


def _mend(app: Sphinx, page: str, template: str, context: dict, doctree: nodes.document) -> None:
    if "body" in context:
        context["body"] = mended(context["body"])


def setup(app: Sphinx) -> dict[str, Any]:
    """Mark figures when a page is complete, mend it just before it is written."""
    app.connect("doctree-resolved", _mark_wide)
    app.connect("html-page-context", _mend)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
