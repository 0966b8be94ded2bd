"""Mend what the theme and other libraries write and a screen reader stumbles over."""

import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

# pandas leaves the corner of a table empty, and an empty heading is announced as one.
_EMPTY_HEADING = re.compile(r"<th(?P<attributes>(?:\s[^>]*)?)>\s*(?:<p>\s*</p>\s*)?</th>")
# docutils writes a list whose items have a role that is no longer one of list items.
_ENTRY = 'role="doc-biblioentry"'


def mended(html: str) -> str:
    """Return ``html`` with empty headings as plain cells, and bibliographies as lists of items."""
    html = _EMPTY_HEADING.sub(r"<td\g<attributes>></td>", html)
    return html.replace(_ENTRY, 'role="listitem"')


def _mend(app: Sphinx, page: str, template: str, context: dict, doctree: nodes.document) -> None:
    if "body" in context:
        context["body"] = mended(context["body"])


def setup(app: Sphinx) -> dict[str, Any]:
    """Mend every page just before it is written."""
    app.connect("html-page-context", _mend)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
