"""Say on every page which code and which runs its numbers come from.

A badge under the title tells the profile; a footer gives the commit, the versions and, for pages
that quote stored experiments, each experiment's own provenance. The facts of the build come from
``build.json`` (written by :mod:`pipeline.stage`), those of the experiments from ``book/results``.
A page names the experiments that its cells read in its header, ``smslib: {results: [...]}``; those
that its prose quotes are found by themselves. An experiment without provenance fails the build.
"""

import json
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from docutils import nodes
from smslib_results import RESULTS, uses
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

BUILD_INFO = "build.json"
REQUIRED = ("commit", "dirty", "date", "wall_seconds", "python", "torch", "command")
LABELS = {
    "commit": "commit",
    "date": "date",
    "command": "command",
    "device": "device",
    "threads": "threads",
    "wall_seconds": "wall time",
    "cpu_seconds": "processor time",
    "peak_memory_mb": "peak memory",
    "seeds": "seeds",
    "versions": "versions",
}
UNITS = {"wall_seconds": " s", "cpu_seconds": " s", "peak_memory_mb": " MB"}
SOFTWARE = ("python", "torch", "numpy", "smslib")

logger = logging.getLogger(__name__)


def describe(key: str, value: Any) -> str:  # noqa: ANN401
    """Return a provenance value as a reader wants it, with its unit."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {version}" for name, version in sorted(value.items()))
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    if isinstance(value, float):
        return (
            f"{value:,.0f}{UNITS.get(key, '')}"
            if value >= 10
            else f"{value:.2g}{UNITS.get(key, '')}"
        )
    return f"{value}{UNITS.get(key, '')}"


def commit_text(facts: Mapping[str, Any]) -> str:
    """Return the commit, and say so if the tree had changes that it does not hold."""
    changed = " with uncommitted changes" if facts.get("dirty") else ""
    return f"{(facts.get('commit') or 'unknown')[:10]}{changed}"


def badge(record: Mapping[str, Any]) -> str:
    """Return the line under a notebook's title: profile, and whether it was run for this build."""
    profile = record["profile"]
    if record["origin"] == "stored":
        how = "stored outputs"
    else:
        how = f"run in {record['seconds']:.0f} s"
    if record["missing"]:
        how += f", {', '.join(record['missing'])} not available"
    text = escape(f"{profile} profile · {how}")
    return f'<p class="profile-badge profile-{escape(profile)}">{text}</p>'


def footer(build: Mapping[str, Any], page: str, experiments: Mapping[str, Mapping]) -> str:
    """Return the provenance footer of ``page`` as HTML.

    Parameters
    ----------
    build : mapping
        ``build.json``.
    page : str
        The page's name without suffix.
    experiments : mapping
        Name of each stored experiment that the page reads, to its provenance.
    """
    record = build.get("pages", {}).get(page)
    facts = {"commit": commit_text(build), "date": build.get("date", "unknown")}
    facts["command"] = (
        "make html" if record is None or record["origin"] == "stored" else "make book"
    )
    if record and record["profile"] == "full":
        facts["command"] = "make full"
    facts["versions"] = describe("versions", build.get("versions", {}))
    parts = [_table("This page", facts)]
    for name, provenance in sorted(experiments.items()):
        parts.append(_table(f"Stored experiment {name}", _readable(provenance)))
    summary = f"Provenance: commit {facts['commit']}, {facts['date']}"
    if experiments:
        summary += f", {len(experiments)} stored experiment{'s' * (len(experiments) > 1)}"
    inner = "".join(parts)
    return (
        '<footer class="provenance" aria-label="Provenance of this page"><details>'
        f"<summary>{escape(summary)}</summary>{inner}</details></footer>"
    )


def _readable(provenance: Mapping[str, Any]) -> dict[str, str]:
    known = {key: describe(key, provenance[key]) for key in LABELS if key in provenance}
    versions = {name: provenance[name] for name in SOFTWARE if name in provenance}
    return {**known, "commit": commit_text(provenance), "versions": describe("versions", versions)}


def _table(title: str, facts: Mapping[str, str]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(LABELS[key])}</th><td>{escape(facts[key])}</td></tr>'
        for key in LABELS
        if facts.get(key)
    )
    return f'<table class="provenance-table"><caption>{escape(title)}</caption>{rows}</table>'


def _load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _declared(source: Path) -> list[str]:
    """Return the experiments that a staged notebook's header names."""
    if not source.is_file():
        return []
    names = _load(source)["metadata"].get("smslib", {}).get("results", [])
    return [names] if isinstance(names, str) else names


def provenances(folder: Path, names: Iterable[str], page: str) -> dict[str, dict[str, Any]]:
    """Read the provenance of the named experiments, warning where it is missing or incomplete."""
    found = {}
    for name in sorted(names):
        provenance = _load(folder / f"{name}.json").get("provenance", {})
        absent = [key for key in REQUIRED if key not in provenance]
        if absent:
            message = f"stored experiment {name!r} lacks provenance: {', '.join(absent)}"
            logger.warning(message, location=page, type="smslib", subtype="provenance")
        found[name] = provenance
    return found


def _outdated(app: Sphinx, env: BuildEnvironment, *_: set[str]) -> list[str]:
    """Have every page written again when the facts that all footers show have changed."""
    build = app.config.smslib_build
    shown = json.dumps(build, sort_keys=True)
    changed = getattr(env, "smslib_shown", None) != shown
    env.smslib_shown = shown
    return sorted(env.found_docs) if changed else []


def _note_declared(app: Sphinx, doctree: nodes.document) -> None:
    """Make a notebook depend on the results that its header names, and check them."""
    env = app.env
    folder = Path(env.srcdir, RESULTS)
    names = _declared(Path(env.srcdir, f"{env.docname}.ipynb"))
    uses(env).setdefault(env.docname, set()).update(names)
    for name in names:
        env.note_dependency(str(folder / f"{name}.json"))
    provenances(folder, uses(env)[env.docname], env.docname)


def _add(app: Sphinx, page: str, template: str, context: dict, doctree: nodes.document) -> None:
    if doctree is None:
        return
    build = app.config.smslib_build
    names = uses(app.env).get(page, set())
    stored = {
        name: _load(Path(app.srcdir, RESULTS, f"{name}.json")).get("provenance", {})
        for name in names
    }
    record = build.get("pages", {}).get(page)
    body = context["body"]
    if record:
        body = body.replace("</h1>", f"</h1>\n{badge(record)}", 1)
    context["body"] = body + footer(build, page, stored)


def _read_build(app: Sphinx, config: Any) -> None:  # noqa: ANN401
    config.smslib_build = _load(Path(app.srcdir, BUILD_INFO))


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the badge and the footer."""
    app.add_config_value("smslib_build", {}, "")
    app.connect("config-inited", _read_build)
    app.connect("env-get-outdated", _outdated)
    app.connect("doctree-read", _note_declared)
    app.connect("html-page-context", _add)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
