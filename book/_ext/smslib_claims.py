"""Show the claims ledger: which claims of the paper the stored results reproduce.

``{claim}`C03` `` prints a badge with the status of a claim in every arm, linked to its row;
``{claims-table}`` prints the counts of each status, then every claim with the numbers it is judged
by. Statuses are computed when a page is read (:mod:`claims_ledger`), never stored. An unknown id
or an unreadable ledger is a warning, which the build treats as an error. A page depends on the
ledger and on the results that it is judged by, also on those that are still missing.
"""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import claims_ledger as ledger
from claims_ledger import ARMS, Claim, Figure, LedgerError, NotStored, Store
from docutils import nodes
from docutils.nodes import Element, Node, system_message
from smslib_results import PAPER, RESULTS, Unknown, pick, show, uses
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective, SphinxRole
from sphinx.util.nodes import make_refnode

CLAIMS = "claims.yml"
TARGET = "smslib-claim"
DASH = "\N{EN DASH}"

logger = logging.getLogger(__name__)


def anchor(claim: Claim) -> str:
    """Return the id of a claim's row."""
    return f"claim-{claim.id.lower()}"


def status(text: str, label: str = "") -> nodes.inline:
    """Return a status as a label that also reads without its colour."""
    classes = ["claim-status", f"claim-{text.replace(' ', '-')}"]
    return nodes.inline("", f"{text}{label}", classes=classes)


def badge(claim: Claim, store: Store) -> nodes.inline:
    """Return the id of a claim and its statuses, arms of one status together."""
    arms: dict[str, list[str]] = {}
    for arm, name in ARMS.items():
        arms.setdefault(ledger.judge(claim, arm, store).status, []).append(name)
    found = nodes.inline("", claim.id, classes=["claim-badge"])
    for text, names in arms.items():
        found += nodes.Text(" ")
        found += status(text, "" if len(names) == len(ARMS) else f": {', '.join(names)}")
    return found


def number(text: str, digits: int, store: Store, arm: str) -> list[Node]:
    """Return a number and its interval, or a dash where it is not stored."""
    try:
        found = show(float(ledger.evaluate(text, store, arm)), f".{digits}f") if text else DASH
    except NotStored:
        return [nodes.Text(DASH)]
    ends = ledger.interval(text, store, arm) if text else None
    if ends is None:
        return [nodes.Text(found)]
    inner = ", ".join(show(end, f".{digits}f") for end in ends)
    interval = nodes.inline("", f"[{inner}]", classes=["claim-interval"])
    return [nodes.Text(found), nodes.Text(" "), interval]


def depend(env: BuildEnvironment, claims: Iterable[Claim]) -> None:
    """Make the page that is being read depend on what these claims are judged by."""
    folder = Path(env.srcdir, RESULTS)
    names = {name for claim in claims for name in claim.experiments}
    for file in (CLAIMS, PAPER, *(f"{name}.json" for name in sorted(names))):
        env.note_dependency(str(folder / file))
    stored = {name for name in names if (folder / f"{name}.json").is_file()}
    uses(env).setdefault(env.docname, set()).update(stored)


# ------------------------------------------------------------------ the role


class ClaimRole(SphinxRole):
    """A role that prints the badge of a claim."""

    def run(self) -> tuple[list[Node], list[system_message]]:
        """Return the badge inside a link that is resolved once all pages are read."""
        folder = Path(self.env.srcdir, RESULTS)
        try:
            claim = pick(ledger.load(folder / CLAIMS), self.text, where=CLAIMS)
            text = badge(claim, Store(folder))
        except (Unknown, LedgerError) as problem:
            message = f"claim role: {problem.args[0]}"
            logger.warning(message, location=self.get_location(), type="smslib", subtype="claim")
            return [nodes.problematic(self.rawtext, self.rawtext)], []
        depend(self.env, [claim])
        link = pending_xref(
            "", text, reftype=TARGET, reftarget=anchor(claim), refdomain="", refwarn=True
        )
        link["refdoc"], link["title"] = self.env.docname, claim.claim
        self.set_source_info(link)
        return [link], []


def _resolve(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: Element
) -> nodes.reference | None:
    """Link a badge to its row; without a page that holds the table, Sphinx warns."""
    target = node["reftarget"]
    if node.get("reftype") != TARGET or target not in env.domains["std"].anonlabels:
        return None
    page, name = env.domains["std"].anonlabels[target]
    return make_refnode(app.builder, node["refdoc"], page, name, content, node["title"])


# ------------------------------------------------------------------ the table


class ClaimsTable(SphinxDirective):
    """A directive that prints the whole ledger."""

    def run(self) -> list[Node]:
        """Return a table of counts and the table of claims."""
        folder = Path(self.env.srcdir, RESULTS)
        store = Store(folder)
        try:
            claims = list(ledger.load(folder / CLAIMS).values())
            found = [_counts(claims, store), _claims(claims, store)]
        except LedgerError as problem:
            message = f"claims-table directive: {problem.args[0]}"
            logger.warning(message, location=self.get_location(), type="smslib", subtype="claim")
            return []
        depend(self.env, claims)
        for claim in claims:
            self.env.domains["std"].note_hyperlink_target(
                anchor(claim), self.env.docname, anchor(claim), claim.id
            )
        return found


def _counts(claims: Sequence[Claim], store: Store) -> nodes.table:
    found = {arm: [ledger.judge(claim, arm, store).status for claim in claims] for arm in ARMS}
    rows = [
        _row([status(text)], *([str(found[arm].count(text))] for arm in ARMS))
        for text in ledger.STATUSES
    ]
    return _table(["status", *ARMS.values()], rows, "claims-counts")


def _claims(claims: Sequence[Claim], store: Store) -> nodes.table:
    rows = [row for claim in claims for row in _block(claim, store)]
    header = ["claim", "published", *ARMS.values()]
    return _table(header, rows, "claims-table")


def _block(claim: Claim, store: Store) -> list[nodes.row]:
    """Return the rows of one claim: its words, its statuses, its numbers."""
    head = nodes.row(
        "",
        _entry(_words(claim), span=len(ARMS) + 2, below=_conditions(claim)),
        ids=[anchor(claim)],
    )
    head["classes"].append("claim-head")
    if claim.single:
        verdict = nodes.row(
            "", _entry(["status"]), _entry(_once(claim, store), span=len(ARMS) + 1)
        )
        return [head, verdict, *(_figure(figure, store, once=True) for figure in claim.show)]
    verdicts = _row(["status"], [DASH], *(_verdict(claim, arm, store) for arm in ARMS))
    return [head, verdicts, *(_figure(figure, store) for figure in claim.show)]


def _words(claim: Claim) -> list[Node]:
    words = [nodes.strong("", claim.id), nodes.Text(f" {claim.claim} ({claim.source})")]
    if not claim.criterion:
        return words
    criterion = nodes.inline("", f"Reproduced if {claim.criterion}.", classes=["claim-criterion"])
    return [*words, nodes.Text(" "), criterion]


def _conditions(claim: Claim) -> str:
    """Return the conditions as they are computed, folded away."""
    if not claim.reproduced:
        return ""
    conditions = {"reproduced": claim.reproduced, "partly": claim.partly}
    lines = "".join(
        f"<dt>{name}</dt><dd><code>{escape(text)}</code></dd>"
        for name, text in conditions.items()
        if text
    )
    summary = f"<summary>Condition of {claim.id}</summary>"
    return f'<details class="claim-condition">{summary}<dl>{lines}</dl></details>'


def _verdict(claim: Claim, arm: str, store: Store) -> list[Node]:
    found = ledger.judge(claim, arm, store)
    reason = nodes.inline("", found.reason, classes=["claim-reason"])
    return [status(found.status), *([nodes.Text(" "), reason] if found.reason else [])]


def _once(claim: Claim, store: Store) -> list[Node]:
    """Return the one verdict of a claim that has no arms, and the command that leads to it."""
    found = ledger.judge(claim, next(iter(ARMS)), store)
    words: list[Node] = [status(found.status)]
    if found.reason:
        words.append(nodes.Text(f": {found.reason}"))
    if claim.command:
        words += [
            nodes.Text(" Run: "),
            nodes.literal("", claim.command, classes=["claim-command"]),
        ]
    return words


def _figure(figure: Figure, store: Store, *, once: bool = False) -> nodes.row:
    published = number(figure.paper, figure.digits, store, "")
    if once:
        ours = _entry(number(figure.value, figure.digits, store, ""), span=len(ARMS))
        return nodes.row("", _entry([figure.label]), _entry(published), ours)
    return _row(
        [figure.label],
        published,
        *(number(figure.value, figure.digits, store, arm) for arm in ARMS),
    )


def _table(header: Sequence[str], rows: Sequence[nodes.row], name: str) -> nodes.table:
    """Return a table whose first column heads its rows."""
    group = nodes.tgroup("", cols=len(header))
    for place in range(len(header)):
        group += nodes.colspec("", colwidth=1, stub=int(place == 0))
    group += nodes.thead("", _row(*([text] for text in header)))
    group += nodes.tbody("", *rows)
    return nodes.table("", group, classes=[name, "colwidths-auto"])


def _row(*cells: Sequence[Node | str]) -> nodes.row:
    return nodes.row("", *(_entry(cell) for cell in cells))


def _entry(content: Sequence[Node | str], *, span: int = 1, below: str = "") -> nodes.entry:
    """Return a cell with a paragraph, and HTML below it."""
    inner = [nodes.Text(item) if isinstance(item, str) else item for item in content]
    more = {"morecols": span - 1} if span > 1 else {}
    raw = [nodes.raw("", below, format="html")] if below else []
    return nodes.entry("", nodes.paragraph("", "", *inner), *raw, **more)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the role, the directive and the resolver of their links."""
    app.add_role("claim", ClaimRole())
    app.add_directive("claims-table", ClaimsTable)
    app.connect("missing-reference", _resolve)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
