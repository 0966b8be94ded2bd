"""Roles that put stored numbers into prose, so that no result is typed by hand.

``{result}`03_full.svae+.mcc:.2f` `` prints the value ``svae+.mcc`` of the experiment
``03_full`` from ``book/results/03_full.json``; what stands after the last colon is a format.
``{paper}`table1.svae+.mcc` `` prints a published value from ``book/results/paper_values.yml``
as mean ± standard deviation; ``.mean`` or ``.sd`` at the end picks one of the two. A table with
several settings has rows such as ``s0.2.svae+``: ``{paper}`table5.s0.2.svae+.mcc` ``.

A name that is not there is a warning, which the build treats as an error. A page depends on the
files that it reads: when only a result changes, its pages are rendered again.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from docutils import nodes
from docutils.nodes import Node, system_message
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.docutils import SphinxRole

from smslib import store
from smslib.names import nearest_known

RESULTS = "book/results"
PAPER = "paper_values.yml"
PARTS = ("mean", "sd")

logger = logging.getLogger(__name__)


class Unknown(LookupError):
    """A name that the store does not have; the message offers the nearest ones."""


def pick(values: Mapping[str, Any], key: str, *, where: str) -> Any:  # noqa: ANN401
    """Return ``values[key]``.

    Raises
    ------
    Unknown
        If there is no such key.
    """
    if key not in values:
        message = f"no {key!r} in {where}{nearest_known(key, values)}"
        raise Unknown(message)
    return values[key]


def show(value: Any, spec: str) -> str:  # noqa: ANN401
    """Format a number, a text or a list of them.

    Raises
    ------
    ValueError
        If ``spec`` does not fit the value, or a float comes without one.
    """
    if isinstance(value, list):
        return ", ".join(show(item, spec) for item in value)
    if value is None:
        message = "the stored value is null (it was not finite)"
        raise ValueError(message)
    if isinstance(value, float) and not spec:
        message = f"{value!r} needs a format, such as ':.2f'"
        raise ValueError(message)
    text = format(value, spec)
    if isinstance(value, str):
        return text
    rounds_to_zero = set(text) & set("0123456789") == {"0"}  # and has no sign
    return text.replace("-", "" if rounds_to_zero else "\N{MINUS SIGN}")


def split_format(text: str) -> tuple[str, str]:
    """Split ``name:format``; the format is what stands after the last colon, if there is one."""
    name, colon, spec = text.rpartition(":")
    return (name, spec) if colon else (text, "")


def result(folder: Path, name: str, spec: str) -> tuple[str, str, Path]:
    """Return the text of a stored value, where it comes from, and its file."""
    experiment, _, key = name.partition(".")
    path = folder / f"{experiment}.json"
    if not path.is_file():
        known = {found.stem: None for found in folder.glob("*.json")}
        pick(known, experiment, where=f"{RESULTS} (experiments)")
    stored = _read(folder, experiment, path.stat().st_mtime_ns)
    value = pick(stored, key, where=path.name)
    commit = (stored.provenance.get("commit") or "unknown")[:10]
    return show(value, spec), f"our run, {path.name}: {key}, commit {commit}", path


@functools.lru_cache
def _read(folder: Path, experiment: str, changed: int) -> store.Stored:
    """Read an experiment once for all that quote it, until its file is ``changed``."""
    return store.get(experiment, root=folder)


def split_cell(name: str) -> tuple[str, str, str]:
    """Split ``row.column`` or ``row.column.part`` from the right: a row may hold dots (s0.2)."""
    rest, _, last = name.rpartition(".")
    part = last if last in PARTS else ""
    row, _, column = (rest if part else name).rpartition(".")
    return row, column, part


def published(folder: Path, name: str, spec: str) -> tuple[str, str, Path]:
    """Return the text of a published value, its source, and the file that quotes it."""
    path = folder / PAPER
    table, _, rest = name.partition(".")
    entry = pick(yaml.safe_load(path.read_text()), table, where=path.name)
    row, column, part = split_cell(rest)
    cell = pick(pick(entry["rows"], row, where=table), column, where=f"{table}.{row}")
    spec = spec or f".{entry['columns'][column]['digits']}f"
    numbers = [cell["mean"], cell.get("sd")]
    if part:
        numbers = [pick(cell, part, where=f"{table}.{row}.{column}")]
    text = " ± ".join(show(float(number), spec) for number in numbers if number is not None)
    return text, f"published: {entry['source']}", path


class StoredValue(SphinxRole):
    """A role that looks a name up and prints what it finds, with its source on hover."""

    def __init__(self, lookup: Any, css: str) -> None:  # noqa: ANN401
        super().__init__()
        self.lookup, self.css = lookup, css

    def run(self) -> tuple[list[Node], list[system_message]]:
        """Return the value as an abbreviation element whose title says where it comes from."""
        name, spec = split_format(self.text)
        try:
            text, source, path = self.lookup(Path(self.env.srcdir, RESULTS), name, spec)
        except (Unknown, ValueError) as problem:
            message = f"{self.name} role: {problem.args[0]}"
            logger.warning(message, location=self.get_location(), type="smslib", subtype="value")
            return [nodes.problematic(self.rawtext, self.rawtext)], []
        self.env.note_dependency(str(path))
        if self.css == "result-value":
            uses(self.env).setdefault(self.env.docname, set()).add(path.stem)
        node = nodes.abbreviation(self.rawtext, text, explanation=source, classes=[self.css])
        return [node], []


def uses(env: BuildEnvironment) -> dict[str, set[str]]:
    """Return which experiments every page quotes."""
    if not hasattr(env, "smslib_experiments"):
        env.smslib_experiments = {}
    return env.smslib_experiments


def _purge(app: Sphinx, env: BuildEnvironment, docname: str) -> None:
    uses(env).pop(docname, None)


def _merge(
    app: Sphinx, env: BuildEnvironment, docnames: list[str], other: BuildEnvironment
) -> None:
    uses(env).update({name: used for name, used in uses(other).items() if name in docnames})


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the roles."""
    app.add_role("result", StoredValue(result, "result-value"))
    app.add_role("paper", StoredValue(published, "paper-value"))
    app.connect("env-purge-doc", _purge)
    app.connect("env-merge-info", _merge)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
