"""A book of two pages and a title, which the book's own pipeline runs and renders."""

import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
title: Small
only_build_toc_files: true
execute: {execute_notebooks: "off"}
"""
TOC = """
format: jb-book
root: index
chapters:
  - file: notebooks/one
  - file: notebooks/two
"""
HEADER = """---
jupytext:
  formats: ipynb,md:myst
  text_representation:
    extension: .md
    format_name: myst
    format_version: 0.13
kernelspec:
  display_name: Python 3 (ipykernel)
  language: python
  name: python3
---

"""
PAGE = """({name})=

# Page {name}

See {{ref}}`the other <{other}>`.

```{{code-cell}} ipython3
:tags: [parameters]

profile = "quick"
device = "cpu"
seed = 0
```

```{{code-cell}} ipython3
print(sum(range({number})))
```
"""


def begin(root):
    """Write the sources."""
    for folder in ("notebooks/profiles", "book/results", "book/pipeline", "smslib"):
        (root / folder).mkdir(parents=True)
    shutil.copy(ROOT / "notebooks" / "jupytext.toml", root / "notebooks")
    (root / "notebooks/profiles/quick.yml").write_text("profile: quick\ndevice: cpu\nseed: 0\n")
    for name, other, number in (("one", "two", 11), ("two", "one", 12)):
        text = HEADER + PAGE.format(name=name, other=other, number=number)
        (root / "notebooks" / f"{name}.md").write_text(text)
    # A small book needs no more than a title besides; staging copies what is under book/.
    (root / "_config.yml").write_text(CONFIG)
    (root / "_toc.yml").write_text(TOC.replace("index", "book/index"))
    (root / "book" / "index.md").write_text("# Small\n")


def build(root):
    """Do what `make book` does."""
    from pipeline import execute, render, stage

    execute.execute_all(root, "quick", report=lambda _line: None)
    stage.stage(root, root / "_build" / "src", "quick")
    render.render(root / "_build" / "src", root)


def check(root):
    """No executed copy is half there, and a page that is called fresh is."""
    from pipeline import execute, pages

    for source in pages.sources(root):
        page = execute.Page(root, source, "quick")
        if execute.is_fresh(page, execute.fingerprint(page)):
            assert outputs(page.executed)


def outputs(path):
    """Return what the code cells of an executed page printed."""
    from pipeline import pages

    cells = [cell for cell in pages.read_executed(path).cells if cell.cell_type == "code"]
    return [output.text for cell in cells for output in cell.outputs]


def rendered(root):
    """Return names and texts of what a reader opens; nothing if the book is not finished."""
    build = root / "_build"
    if not (build / "rendered").exists():
        return b""
    found = [build / "src" / "notebooks" / f"{name}.ipynb" for name in ("one", "two")]
    texts = [path.read_text() for path in found]
    for path in sorted((build / "html").rglob("*.html")):
        words = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", path.read_text()))
        texts.append(f"{path.relative_to(build)} {words}")
    texts.append((build / "html" / "objects.inv").read_bytes().hex())
    return "\n".join(texts).encode()
