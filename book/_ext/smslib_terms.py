"""Link every term of the glossary where a page first uses it.

Authors may set a link themselves, with the role ``term``; the page then gets no second one. Terms
that are ordinary words as well are linked only in this way (``smslib_ordinary_words``).
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

_UNTOUCHED = (
    nodes.reference,
    nodes.literal,
    nodes.literal_block,
    nodes.Titular,
    nodes.caption,
    nodes.term,
    nodes.table,
    nodes.math,
    nodes.abbreviation,
    nodes.citation,
    nodes.raw,
)


def pattern(terms: Iterable[str]) -> re.Pattern:
    """Return what finds any of ``terms``, or several: acronyms as written, words in any case."""
    longest_first = sorted(terms, key=len, reverse=True)
    return re.compile("|".join(rf"(?<![\w-])(?:{_spelled(t)})(?![\w-])" for t in longest_first))


def _spelled(term: str) -> str:
    words = re.escape(term).replace(r"\ ", r"[\s-]")
    fixed = any(letter.isupper() for letter in term)
    return f"{words}s?" if fixed else f"(?i:{words}s?)"


def name_of(found: str, terms: Iterable[str]) -> str | None:
    """Return which of ``terms`` the text ``found`` is a spelling of, if any."""
    return next((term for term in terms if re.fullmatch(_spelled(term), found)), None)


def link_first_uses(doctree: nodes.document, links: Mapping[str, str]) -> None:
    """Replace the first use of each term in the prose of ``doctree`` by a link.

    Parameters
    ----------
    doctree : document
        Changed in place.
    links : mapping
        Term to the address of its explanation.
    """
    linked = {node.get("refuri") for node in doctree.findall(nodes.reference)}
    left = {term: address for term, address in links.items() if address not in linked}
    for text in [node for node in doctree.findall(nodes.Text) if _is_prose(node)]:
        if left:
            text.parent.replace(text, list(_with_links(str(text), left)))


def _with_links(text: str, left: dict[str, str]) -> Iterator[nodes.Node]:
    """Cut a text at the terms that are ``left``, and take those from it."""
    place = 0
    for match in pattern(left).finditer(text):
        term = name_of(match[0], left)
        if term is None:  # used before, in this very text
            continue
        yield nodes.Text(text[place : match.start()])
        link = {"refuri": left.pop(term), "internal": True, "classes": ["term-link"]}
        yield nodes.reference("", match[0], **link)
        place = match.end()
    yield nodes.Text(text[place:])


def _is_prose(text: nodes.Text) -> bool:
    node = text.parent
    inside = isinstance(node, nodes.paragraph)
    while node is not None:
        if isinstance(node, _UNTOUCHED):
            return False
        inside = inside or isinstance(node, nodes.paragraph)
        node = node.parent
    return inside


def _add(app: Sphinx, doctree: nodes.document, page: str) -> None:
    if page in app.config.smslib_pages_without_terms:
        return
    links = {}
    for (kind, term), (home, anchor) in app.env.domaindata["std"]["objects"].items():
        if kind == "term" and home != page and term not in app.config.smslib_ordinary_words:
            links[term] = f"{app.builder.get_relative_uri(page, home)}#{anchor}"
    link_first_uses(doctree, links)


def setup(app: Sphinx) -> dict[str, Any]:
    """Link terms once all cross-references of a page are known."""
    app.add_config_value("smslib_ordinary_words", [], "env", [list])
    app.add_config_value("smslib_pages_without_terms", [], "env", [list])
    app.connect("doctree-resolved", _add, priority=900)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
