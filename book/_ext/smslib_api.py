"""List the library's public names on a page, read from its text when the book is built.

``{public-names} model`` makes a section for ``smslib/model.py``: what the module is, then every
name of its ``__all__`` with its parameters and the first line of its docstring; classes with their
public methods. ``{public-names} others`` does so for every module that the page has not listed
before it, so that a new one is never left out. Nothing is imported. A public name without a
summary is a warning, which the build treats as an error.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.nodes import Element, Node
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

PACKAGE, OTHERS = "smslib", "others"
LONGEST_VALUE = 60
_DEFINITIONS = (ast.FunctionDef, ast.ClassDef)
# Docstrings hold ``code``, `names` and :role:`text`.
_MARKED = re.compile(r":(\w+):`([^`]+)`|``([^`]+)``|`([^`]+)`")

logger = logging.getLogger(__name__)


class Unlisted(LookupError):
    """A module or a public name that the text of the package does not have."""


@dataclass(frozen=True)
class Name:
    """A public name: how it is called, and what it does in one line."""

    call: str
    kind: str
    summary: str
    members: tuple["Name", ...] = ()


def public(folder: Path, module: str) -> tuple[str, list[Name]]:
    """Return the first line of a module's docstring, and its public names in order.

    Raises
    ------
    Unlisted
        If there is no such module, or it has no ``__all__`` or not the names in it.
    """
    path = folder / f"{module}.py"
    if not path.is_file():
        message = f"{PACKAGE} has no module {module!r}"
        raise Unlisted(message)
    text = path.read_text()
    tree = ast.parse(text)
    names = [_described(folder, module, name) for name in _exported(tree, module)]
    return _first_line(tree), names


def modules(folder: Path) -> set[str]:
    """Return the modules that state what they export."""
    found = {path.stem: ast.parse(path.read_text()) for path in folder.glob("*.py")}
    return {name for name, tree in found.items() if _list_of(tree) is not None}


def _list_of(tree: ast.Module) -> list[str] | None:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return None


def _exported(tree: ast.Module, module: str) -> list[str]:
    names = _list_of(tree)
    if names is None:
        message = f"{PACKAGE}.{module} has no __all__"
        raise Unlisted(message)
    return names


def _described(folder: Path, module: str, name: str) -> Name:
    """Describe a name where it is defined, which may be a module that this one imports it from."""
    text = (folder / f"{module}.py").read_text()
    body = ast.parse(text).body
    for node in body:
        if isinstance(node, _DEFINITIONS) and node.name == name:
            return _definition(node)
        if isinstance(node, ast.Assign | ast.AnnAssign) and name in _assigned(node):
            return Name(name, "constant", _comment(text, node.lineno) or _value(node))
    for node in body:
        own = isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{PACKAGE}.")
        if own and name in {alias.name for alias in node.names}:
            return _described(folder, node.module.removeprefix(f"{PACKAGE}."), name)
    message = f"{PACKAGE}.{module} exports {name!r}, which it does not define"
    raise Unlisted(message)


def _definition(node: ast.FunctionDef | ast.ClassDef) -> Name:
    if isinstance(node, ast.FunctionDef):
        return Name(f"{node.name}({_parameters(node.args)})", "function", _first_line(node))
    inner = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name[0] != "_"]
    return Name(node.name, "class", _first_line(node), tuple(_method(n) for n in inner))


def _method(node: ast.FunctionDef) -> Name:
    marks = {ast.unparse(mark) for mark in node.decorator_list}
    if marks & {"property", "cached_property"}:
        return Name(node.name, "property", _first_line(node))
    parameters = _parameters(node.args, skip="staticmethod" not in marks)
    return Name(f"{node.name}({parameters})", "method", _first_line(node))


def _parameters(arguments: ast.arguments, *, skip: bool = False) -> str:
    """Return the names of the parameters as in a call, without ``self``."""
    shown = [a.arg for a in (*arguments.posonlyargs, *arguments.args)][skip:]
    shown += [f"*{arguments.vararg.arg}"] if arguments.vararg else []
    if arguments.kwonlyargs and not arguments.vararg:
        shown.append("*")
    shown += [a.arg for a in arguments.kwonlyargs]
    shown += [f"**{arguments.kwarg.arg}"] if arguments.kwarg else []
    return ", ".join(shown)


def _assigned(node: ast.Assign | ast.AnnAssign) -> set[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return {part.id for t in targets for part in ast.walk(t) if isinstance(part, ast.Name)}


def _comment(text: str, line: int) -> str:
    """Return the comment beside a line, or else the one that ends right above it."""
    lines = text.splitlines()
    beside = lines[line - 1].partition("  # ")[2]
    above = []
    for row in reversed(lines[: line - 1]):
        if not row.startswith("#"):
            break
        above.insert(0, row.lstrip("# "))
    found = beside or " ".join(above)
    first = found.partition(" ")[0]
    return found[:1].upper() + found[1:] if first.isalpha() else found


def _value(node: ast.Assign | ast.AnnAssign) -> str:
    """Return a constant's type, if it states one, or else its value, if that is short."""
    if isinstance(node, ast.AnnAssign):
        return f"``{ast.unparse(node.annotation)}``"
    written = ast.unparse(node.value)
    return f"``{written}``" if len(written) <= LONGEST_VALUE else ""


def _first_line(node: ast.AST) -> str:
    """Return the summary of a docstring: its first paragraph, in one line."""
    return " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())


# ------------------------------------------------------------------ on the page


def inline(text: str) -> list[Node]:
    """Return a summary as text, with its code and formulas marked."""
    found, end = [], 0
    for hit in _MARKED.finditer(text):
        role, marked, *plain = hit.groups()
        found.append(nodes.Text(text[end : hit.start()]))
        code = next((part for part in (marked, *plain) if part), "")
        found.append((nodes.math if role == "math" else nodes.literal)(code, code))
        end = hit.end()
    return [*found, nodes.Text(text[end:])]


def _listed(names: list[Name], prefix: str) -> Element:
    """Return names as a list of definitions, with the members of classes under them."""
    found = nodes.definition_list(classes=["api-list"])
    for name in names:
        anchor = f"{prefix}-{name.call.partition('(')[0]}".lower().replace("_", "-")
        term = nodes.term("", "", nodes.literal(name.call, name.call), ids=[anchor])
        if name.kind != "function":
            term += [nodes.Text(" "), nodes.emphasis(name.kind, name.kind)]
        body = nodes.definition("", nodes.paragraph("", "", *inline(name.summary)))
        if name.members:
            body += nodes.bullet_list("", *(_member(member) for member in name.members))
        found += nodes.definition_list_item("", term, body)
    return found


def _member(member: Name) -> Element:
    call = nodes.literal(member.call, member.call)
    line = nodes.paragraph("", "", call, nodes.Text(" "), *inline(member.summary))
    return nodes.list_item("", line)


def _silent(names: list[Name]) -> Iterator[str]:
    """Yield the names, and members of names, that say nothing of themselves."""
    for name in names:
        if not name.summary:
            yield name.call
        yield from (f"{name.call}.{inner}" for inner in _silent(list(name.members)))


class PublicNames(SphinxDirective):
    """A section of the public names of one module."""

    required_arguments = 1

    def run(self) -> list[Node]:
        """Return the sections, with a warning for each that there should be and is not."""
        folder = Path(self.env.srcdir, PACKAGE)
        done = listed(self.env).setdefault(self.env.docname, set())
        chosen = self.arguments
        if chosen == [OTHERS]:
            chosen = sorted(modules(folder) - done)
        for path in folder.glob("*.py"):  # names may come from another module
            self.env.note_dependency(str(path))
        return [section for module in chosen for section in self._section(folder, module)]

    def _section(self, folder: Path, module: str) -> list[Node]:
        try:
            summary, names = public(folder, module)
        except Unlisted as problem:
            self._warn(problem.args[0])
            return []
        for call in _silent(names):
            self._warn(f"{PACKAGE}.{module}: {call} has no summary")
        listed(self.env)[self.env.docname].add(module)
        title, anchor = f"{PACKAGE}.{module}", f"module-{module.replace('_', '-')}"
        section = nodes.section(ids=[anchor], names=[anchor])
        self.state.document.note_explicit_target(section, section)
        section += nodes.title("", "", nodes.literal(title, title))
        section += nodes.paragraph("", "", *inline(summary))
        section += _listed(names, f"api-{module}")
        return [section]

    def _warn(self, message: str) -> None:
        logger.warning(message, location=self.get_location(), type="smslib", subtype="api")


def listed(env: BuildEnvironment) -> dict[str, set[str]]:
    """Return which modules every page lists."""
    if not hasattr(env, "smslib_modules"):
        env.smslib_modules = {}
    return env.smslib_modules


def _outdated(app: Sphinx, env: BuildEnvironment, *_: set[str]) -> list[str]:
    """Have pages read again when there are modules that they did not list."""
    known = modules(Path(env.srcdir, PACKAGE))
    return [page for page, done in listed(env).items() if not known <= done]


def _purge(app: Sphinx, env: BuildEnvironment, docname: str) -> None:
    listed(env).pop(docname, None)


def _merge(
    app: Sphinx, env: BuildEnvironment, docnames: list[str], other: BuildEnvironment
) -> None:
    listed(env).update({name: got for name, got in listed(other).items() if name in docnames})


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("public-names", PublicNames)
    app.connect("env-purge-doc", _purge)
    app.connect("env-merge-info", _merge)
    app.connect("env-get-outdated", _outdated)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
