"""The book's style guide: each function lists what breaks one rule in a notebook or a page."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from urllib.parse import unquote, urlsplit

from bs4 import BeautifulSoup, Tag
from nbformat import NotebookNode

MAX_CELL_LINES = 25
MAX_MEDIAN_LINES = 8
MAX_DEF_LINES = 8
MIN_WORDS_PER_LINE = 8
MIN_ALT, MAX_ALT = 20, 250
MAX_NOTEBOOK_BYTES = 400_000
TAGS = {
    "hide-input",
    "hide-output",
    "nbval-ignore-output",
    "nbval-skip",
    "parameters",
    "raises-exception",
    "remove-cell",
    "remove-input",
    "remove-output",
}
# What makes a notebook run where it was opened alone; elsewhere it does nothing. A clone whose
# package is not installed is found, too, but has no origin; a session begun again is in /content.
INSTALL = """from importlib.util import find_spec
from pathlib import Path

if not getattr(find_spec("smslib"), "origin", None):  # on Colab: fetch book and library
    !git clone -q --depth 1 https://github.com/smslib/smslib
    %pip install -q "./smslib[data,plot]"
if not Path("../book/results").exists():
    %cd smslib/notebooks"""
_URL = re.compile(r"https?://")
_SHOWN_CODE = re.compile(r"^(`{3,})(\{code|python|bash|text|\n).*?^\1", re.MULTILINE | re.DOTALL)
_FORMULA = re.compile(r"\$\$.*?\$\$|\$[^$]*\$", re.DOTALL)
_WORD = re.compile(r"[^\W\d_][\w'’-]*")
_HOME = re.compile(r"(?:/(?:home|root|Users|tmp|work|mnt|opt|usr)/|[A-Z]:\\\\?)[\w.-]+")
_DECIMAL = re.compile(r"(?<![\w.])[-−]?\d*\.\d+(?![\w]|\.\d)|\d+(?:\.\d+)?\s?%|\d[eE][-−]\d")
_NOT_PROSE = (
    "pre, code, script, style, table, .math, .cell_input, .cell_output, .headerlink, "
    ".result-value, .paper-value, .provenance, .profile-badge, .citation, .citation-list, "
    ".api-list, "
    ".caption-number, .section-number, .std-numref, .proof-title, "
    ".solution > .admonition-title > a"
)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """Return the code cells that the author wrote."""
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source != INSTALL]


def installation(notebook: NotebookNode) -> list[str]:
    """Find notebooks that do not begin by fetching what they need."""
    first = next(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return [] if first == INSTALL else ["the first code cell does not install what is needed"]


def cell_lengths(notebook: NotebookNode) -> list[str]:
    """Find long cells: none has over 25 lines, the median has at most 8."""
    lengths = [len(cell.source.strip().splitlines()) for cell in code_cells(notebook)]
    found = [
        f"code cell {number} has {length} lines; at most {MAX_CELL_LINES}"
        for number, length in enumerate(lengths, start=1)
        if length > MAX_CELL_LINES
    ]
    if lengths and median(lengths) > MAX_MEDIAN_LINES:
        found.append(f"median cell has {median(lengths):g} lines; at most {MAX_MEDIAN_LINES}")
    return found


def prose(notebook: NotebookNode) -> list[str]:
    """Find notebooks with fewer than eight words of prose for every line of code."""
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    words = sum(len(_WORD.findall(_FORMULA.sub("", _SHOWN_CODE.sub("", text)))) for text in texts)
    written = [line.strip() for cell in code_cells(notebook) for line in cell.source.splitlines()]
    lines = sum(bool(line) and not line.startswith("#") for line in written)
    if words >= MIN_WORDS_PER_LINE * lines:
        return []
    return [f"{words} words for {lines} lines of code; at least {MIN_WORDS_PER_LINE} for each"]


def cell_content(notebook: NotebookNode) -> list[str]:
    """Find what belongs into the library: classes, long functions, addresses."""
    found = []
    for number, cell in enumerate(code_cells(notebook), start=1):
        if _URL.search(cell.source):
            found.append(f"code cell {number} holds a URL")
        for node in ast.walk(ast.parse(_plain_python(cell.source))):
            if isinstance(node, ast.ClassDef):
                found.append(f"code cell {number} defines the class {node.name}")
            if isinstance(node, ast.FunctionDef) and _height(node) > MAX_DEF_LINES:
                found.append(f"code cell {number}: {node.name} has {_height(node)} lines")
    return found


def tags(notebook: NotebookNode) -> list[str]:
    """Find tags that are not on the closed list."""
    used = {tag for cell in notebook.cells for tag in cell.metadata.get("tags", [])}
    return [f"unknown tag {tag!r}" for tag in sorted(used - TAGS)]


def execution(notebook: NotebookNode) -> list[str]:
    """Find cells not run, or not once and in order, and notebooks that show nothing."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    counts = [cell.execution_count for cell in cells]
    found = []
    if counts != list(range(1, len(cells) + 1)):
        found.append(f"execution counts are {counts}")
    if not any(cell.outputs for cell in cells):
        found.append("no cell has an output")
    return found


def private_paths(notebook: NotebookNode) -> list[str]:
    """Find outputs that name a folder of the machine that made them."""
    found = []
    for number, cell in enumerate(code_cells(notebook), start=1):
        for output in cell.outputs:
            texts = {
                key: value for key, value in output.get("data", {}).items() if "image" not in key
            }
            hit = _HOME.search(json.dumps([texts, output.get("text", "")], ensure_ascii=False))
            if hit:
                found.append(f"output of code cell {number} names {hit.group()!r}")
    return found


def one_image_per_cell(notebook: NotebookNode) -> list[str]:
    """Find cells with several images; the renderer gives a cell one alternative text."""
    found = []
    for number, cell in enumerate(code_cells(notebook), start=1):
        images = [out for out in cell.outputs if "image/png" in out.get("data", {})]
        if len(images) > 1:
            found.append(f"code cell {number} shows {len(images)} images")
    return found


def article(page: BeautifulSoup) -> Tag:
    """Return the part of a page that its author wrote."""
    return page.select_one("article.bd-article") or page


def headings(page: BeautifulSoup) -> list[str]:
    """Find missing or second titles and levels skipped on the way down."""
    levels = [int(tag.name[1]) for tag in article(page).select("h1, h2, h3, h4, h5, h6")]
    found = [] if levels.count(1) == 1 else [f"{levels.count(1)} headings of level 1"]
    steps = zip(levels, levels[1:], strict=False)
    return found + [f"heading level {a} is followed by level {b}" for a, b in steps if b > a + 1]


def alternative_texts(page: BeautifulSoup) -> list[str]:
    """Find images without a description, or described by their file name."""
    found = []
    for image in article(page).select("img"):
        alt = (image.get("alt") or "").strip()
        if not MIN_ALT <= len(alt) <= MAX_ALT or re.search(r"\.(png|svg|jpe?g)$|^\.*/", alt):
            found.append(f"image {image.get('src')} has the alternative text {alt!r}")
    return found


def bare_numbers(page: BeautifulSoup) -> list[str]:
    """Find decimals and percentages typed by hand in prose, each with its surroundings."""
    prose = BeautifulSoup(str(article(page)), "html.parser")
    for tag in prose.select(_NOT_PROSE):
        tag.replace_with(" ")
    found = []
    for block in prose.select("p, li, dd, dt, figcaption, h1, h2, h3, h4"):
        text = " ".join(block.get_text(" ").split())
        found += [_around(text, hit) for hit in _DECIMAL.finditer(text)]
    return list(dict.fromkeys(found))


def broken_links(folder: Path) -> list[str]:
    """Find internal links and anchors of the pages under ``folder`` that lead nowhere."""
    written = [path for path in sorted(folder.rglob("*.html")) if "_static" not in path.parts]
    pages = {path: read_page(path) for path in written}
    anchors = {path: _anchors(page) for path, page in pages.items()}
    found = []
    for path, page in pages.items():
        for target in _internal_targets(page):
            place, anchor = _resolve(path, target)
            name = path.relative_to(folder)
            if not place.exists():
                found.append(f"{name}: {target} does not exist")
            elif anchor and place in anchors and anchor not in anchors[place]:
                found.append(f"{name}: {target} has no such anchor")
    return found


def external_resources(page: BeautifulSoup) -> list[str]:
    """Find scripts, styles and images that a page does not load from the book itself."""
    loaded = [tag.get("src") for tag in page.select("script[src], img[src], iframe[src]")]
    loaded += [tag.get("href") for tag in page.select("link[rel~=stylesheet], link[rel~=preload]")]
    return [f"loads {address}" for address in loaded if urlsplit(address).netloc]


def read_page(path: Path) -> BeautifulSoup:
    """Parse a rendered page."""
    return BeautifulSoup(path.read_bytes(), "html.parser")


def _plain_python(source: str) -> str:
    return "\n".join("" if line.startswith(("%", "!")) else line for line in source.splitlines())


def _height(node: ast.FunctionDef) -> int:
    return node.end_lineno - node.lineno + 1


def _around(text: str, hit: re.Match) -> str:
    return text[max(0, hit.start() - 30) : hit.end() + 20]


def _anchors(page: BeautifulSoup) -> set[str]:
    return {tag["id"] for tag in page.select("[id]")} | {
        tag["name"] for tag in page.select("a[name]")
    }


def _internal_targets(page: BeautifulSoup) -> Iterator[str]:
    for tag in page.select("a[href], img[src], link[href], script[src]"):
        target = tag.get("href") or tag.get("src")
        parts = urlsplit(target)
        if not parts.scheme and not parts.netloc and target != "#":
            yield target


def _resolve(path: Path, target: str) -> tuple[Path, str]:
    parts = urlsplit(target)
    place = (path.parent / unquote(parts.path)).resolve() if parts.path else path.resolve()
    return (place / "index.html" if place.is_dir() else place), unquote(parts.fragment)
