"""Put an interactive figure of ``book/_static`` into a page, with numbers from the store.

``{interactive} phase`` writes ``book/_static/phase.html`` into the page. Where the file has
``{{experiment.key:format}}`` the page has the stored value, as the role ``result`` shows it. An
unknown figure or value is a warning, which the build treats as an error.
"""

import re
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.nodes import Node
from smslib_results import RESULTS, Unknown, result, split_format, uses
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

FIGURES = "book/_static"
_STORED = re.compile(r"\{\{([^{}]+)\}\}")

logger = logging.getLogger(__name__)


def fill(figure: str, folder: Path) -> tuple[str, set[Path]]:
    """Return a figure with its stored values in place, and the files that they come from.

    Raises
    ------
    Unknown, ValueError
        As `smslib_results.result`, if a value is not in the store or has no fitting format.
    """
    read = set()

    def stored(place: re.Match) -> str:
        text, _, path = result(folder, *split_format(place[1]))
        read.add(path)
        return text

    return _STORED.sub(stored, figure), read


class Interactive(SphinxDirective):
    """A figure that the reader moves; its name is the name of the file."""

    required_arguments = 1

    def run(self) -> list[Node]:
        """Return the figure as HTML, and note what the page depends on."""
        path = Path(self.env.srcdir, FIGURES, f"{self.arguments[0]}.html")
        try:
            html, read = fill(path.read_text(), Path(self.env.srcdir, RESULTS))
        except (OSError, Unknown, ValueError) as problem:
            message = f"interactive figure {path.stem!r}: {problem}"
            place = self.get_location()
            logger.warning(message, location=place, type="smslib", subtype="interactive")
            return []
        for file in (path, *read):
            self.env.note_dependency(str(file))
        uses(self.env).setdefault(self.env.docname, set()).update(file.stem for file in read)
        return [nodes.raw("", html, format="html")]


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("interactive", Interactive)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
