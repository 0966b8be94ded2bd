"""The committed notebooks and the rendered book against the style guide, and each rule against
something that breaks it.
"""

import base64
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from bs4 import BeautifulSoup
from nbformat import v4
from pipeline import links, pages, rules

ROOT = Path(__file__).resolve().parents[1]
NAMES = [source.stem for source in pages.sources(ROOT)]
BUDGETS = {"notebooks": 6_000_000, "book/results": 3_000_000, "book/_static": 3_000_000}


def committed(name):
    return pages.read_executed(ROOT / "notebooks" / f"{name}.ipynb")


# ------------------------------------------------------------------ the sources


def test_the_table_of_contents_lists_every_notebook():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    listed = [entry["file"] for part in toc["parts"] for entry in part["chapters"]]
    assert sorted(name for name in listed if name.startswith("notebooks/")) == [
        f"notebooks/{name}" for name in NAMES
    ]


SOURCE_RULES = [
    rules.cell_lengths,
    rules.prose,
    rules.cell_content,
    rules.tags,
    rules.execution,
    rules.installation,
    rules.private_paths,
    rules.one_image_per_cell,
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rule", SOURCE_RULES, ids=lambda rule: rule.__name__)
def test_notebook_follows(rule, name):
    assert rule(committed(name)) == []


def test_what_a_notebook_installs_is_this_repository_with_extras_that_it_has():
    address = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"]
    assert f"git clone -q --depth 1 {address}\n" in rules.INSTALL
    name = address.rpartition("/")[2]
    assert rules.INSTALL.endswith(f"%cd {name}/notebooks")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = re.search(rf'install -q "\./{name}\[(.*)\]"', rules.INSTALL)[1].split(",")
    assert set(named) <= set(extras["optional-dependencies"])


@pytest.mark.parametrize(
    ("folder", "clone", "installed", "done"),
    [
        ("book/notebooks", False, True, []),
        (".", False, False, ["!git", "%pip", "%cd"]),
        (".", True, False, ["!git", "%pip", "%cd"]),  # a namespace package, to look at
        (".", True, True, ["%cd"]),  # a session begun again
    ],
)
def test_the_first_cell_does_what_is_missing(tmp_path, folder, clone, installed, done):
    (tmp_path / "book" / "notebooks").mkdir(parents=True)
    (tmp_path / "book" / "book" / "results").mkdir(parents=True)
    if clone:
        (tmp_path / "smslib" / "smslib").mkdir(parents=True)
    if installed:
        (tmp_path / "installed" / "smslib").mkdir(parents=True)
        (tmp_path / "installed" / "smslib" / "__init__.py").touch()
    program = re.sub(r"^( +)([%!]\w+).*$", r'\1print("\2")', rules.INSTALL, flags=re.MULTILINE)
    path = f"import sys; sys.path[:0] = ['', {str(tmp_path / 'installed')!r}]\n"
    # Without the packages of this environment, smslib among them.
    command = [sys.executable, "-S", "-c", path + program]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    said = subprocess.run(
        command, cwd=tmp_path / folder, env=environment, capture_output=True, text=True, check=True
    )
    assert said.stdout.split() == done


@pytest.mark.parametrize("name", NAMES)
def test_both_halves_of_a_pair_say_the_same(name):
    text = pages.read_source(ROOT / "notebooks" / f"{name}.md")
    assert [(c.cell_type, c.source) for c in text.cells] == [
        (c.cell_type, c.source) for c in committed(name).cells
    ]


@pytest.mark.parametrize("name", NAMES)
def test_syncing_a_pair_changes_nothing(name, tmp_path):
    source = ROOT / "notebooks"
    copied = ("jupytext.toml", f"{name}.md", f"{name}.ipynb")
    for file in copied:
        (tmp_path / file).write_bytes((source / file).read_bytes())
    command = [sys.executable, "-m", "jupytext", "--sync", str(tmp_path / f"{name}.md")]
    subprocess.run(command, check=True, capture_output=True)
    for file in copied:
        assert (tmp_path / file).read_bytes() == (source / file).read_bytes(), file


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_with_the_quick_profile_by_default(name):
    parameters = pages.parameter_cell(committed(name))
    assert parameters == pages.profile_parameters(ROOT, "quick")


def test_both_profiles_set_the_same_parameters():
    quick, full = (pages.profile_parameters(ROOT, name) for name in ("quick", "full"))
    assert quick.keys() == full.keys()
    assert (quick["profile"], full["profile"]) == ("quick", "full")


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_small(name):
    assert (ROOT / "notebooks" / f"{name}.ipynb").stat().st_size <= rules.MAX_NOTEBOOK_BYTES


@pytest.mark.parametrize("folder", BUDGETS)
def test_a_folder_keeps_its_budget(folder):
    files = [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= BUDGETS[folder]


def test_bibliography_keys_are_unique():
    text = (ROOT / "book" / "references.bib").read_text()
    keys = re.findall(r"^@\w+\{([^,]+),", text, re.MULTILINE)
    assert keys == sorted(set(keys))
    entries = text.split("\n@")
    assert [entry for entry in entries if "doi " not in entry and "url " not in entry] == []


# ------------------------------------------------------------------ the rendered book


def broken(written, rule):
    found = {path.name: rule(rules.read_page(path)) for path in written}
    return {name: problems for name, problems in found.items() if problems}


@pytest.mark.parametrize(
    "rule",
    [rules.headings, rules.alternative_texts, rules.external_resources],
    ids=lambda rule: rule.__name__,
)
def test_pages_follow(rule, written):
    assert broken(written, rule) == {}


def test_links_lead_somewhere(html):
    assert rules.broken_links(html) == []


def test_prose_holds_no_number_typed_by_hand(written):
    """Except those of the allow-list, which gives a reason for each and holds no unused one."""
    allowed = yaml.safe_load((ROOT / "book" / "allowed_numbers.yml").read_text()) or []
    assert all(entry["reason"] for entry in allowed)
    used, typed = set(), []
    for path in written:
        for hit in rules.bare_numbers(rules.read_page(path)):
            fits = [e["text"] for e in allowed if e["page"] == path.stem and e["text"] in hit]
            used |= {(path.stem, text) for text in fits}
            typed += [] if fits else [f"{path.stem}: {hit}"]
    assert typed == []
    assert {(entry["page"], entry["text"]) for entry in allowed} == used


def test_every_page_tells_its_provenance(written):
    for path in written:
        footers = rules.read_page(path).select("footer.provenance")
        assert len(footers) == 1, path
        assert "commit" in footers[0].get_text()


def test_every_numbered_figure_is_spoken_of(written):
    for path in written:
        page = rules.read_page(path)
        labelled = {tag["id"] for tag in page.select("article figure[id^=fig-]")}
        linked = {tag["href"].lstrip("#") for tag in page.select("article a.reference[href^='#']")}
        assert labelled - linked == set(), path


def test_every_page_is_in_english_and_has_a_title(written):
    for path in written:
        page = rules.read_page(path)
        assert page.html["lang"] == "en"
        assert page.title.get_text().strip()


# ------------------------------------------------------------------ the rules themselves


def notebook(*sources, count=1, outputs=(), **metadata):
    cells = [
        v4.new_code_cell(
            source, execution_count=count + i, outputs=list(outputs), metadata=metadata
        )
        for i, source in enumerate(sources)
    ]
    return v4.new_notebook(cells=cells)


def told(text, code):
    return v4.new_notebook(cells=[v4.new_markdown_cell(text), v4.new_code_cell(code)])


def page(body):
    return BeautifulSoup(f"<article class='bd-article'>{body}</article>", "html.parser")


LONG_DEF = "def f():\n" + "    x = 1\n" * 8
IMAGE = v4.new_output("display_data", data={"image/png": "aGk="})


def stream(text):
    return v4.new_output("stream", name="stdout", text=text)


@pytest.mark.parametrize(
    ("rule", "bad", "says"),
    [
        (rules.cell_lengths, notebook("x = 1\n" * 26), "26 lines"),
        (rules.cell_lengths, notebook("x = 1\n" * 9, "x = 1\n" * 9), "median"),
        (rules.prose, notebook("x = 1\n# y\n\nz = 2"), "0 words for 2 lines"),
        (rules.prose, told("one two $a$ three four five six seven", "x"), "7 words for 1 lines"),
        (rules.cell_content, notebook("class A: pass"), "class A"),
        (rules.cell_content, notebook(LONG_DEF), "f has 9 lines"),
        (rules.cell_content, notebook("%time\nx = 'https://a.b'"), "URL"),
        (rules.tags, notebook("x", tags=["hide-me"]), "'hide-me'"),
        (rules.execution, notebook("1", "2", count=2, outputs=[stream("1")]), r"\[2, 3\]"),
        (rules.execution, notebook("x = 1"), "no cell has an output"),
        (rules.installation, notebook("x = 1", rules.INSTALL), "does not install"),
        (rules.private_paths, notebook("x", outputs=[stream("in /home/me/data")]), "/home/me"),
        (rules.one_image_per_cell, notebook("x", outputs=[IMAGE, IMAGE]), "2 images"),
        (rules.headings, page("<h1>a</h1><h3>b</h3>"), "level 1 is followed by level 3"),
        (rules.headings, page("<h1>a</h1><h1>b</h1>"), "2 headings of level 1"),
        (rules.alternative_texts, page("<img src=a.png>"), "''"),
        (rules.alternative_texts, page("<img alt='../_images/a/long/file/name.png'>"), "name.png"),
        (rules.bare_numbers, page("<p>MCC is 0.88 here</p>"), "0.88"),
        (rules.bare_numbers, page("<ul><li>gains 5 % of it</li></ul>"), "5 %"),
        (rules.bare_numbers, page("<p>drops to 1e-3</p>"), "1e-3"),
        (rules.external_resources, page("<script src='https://cdn/x.js'></script>"), "cdn"),
    ],
)
def test_a_rule_catches(rule, bad, says):
    assert re.search(says, "; ".join(rule(bad)))


@pytest.mark.parametrize(
    ("rule", "good"),
    [
        (rules.cell_content, notebook("%matplotlib inline\ndef f():\n    return 1")),
        (rules.prose, told("```python\nf(x)\n```\n" + "word " * 8, "x = 1")),
        (rules.private_paths, notebook("x", outputs=[stream("5 / 7 and a/b")])),
        (rules.alternative_texts, page("<img alt='Bars of five methods, the last one highest.'>")),
        (
            rules.bare_numbers,
            page("<p>100 cells, <code>0.1</code>, <span class=math>0.2</span></p>"),
        ),
        (rules.bare_numbers, page("<p>See section 2.1.3 and version 1.2.3</p>")),
        (rules.bare_numbers, page("<p><abbr class='result-value'>0.91</abbr></p>")),
        (
            rules.bare_numbers,
            page(
                "<div class=solution><p class=admonition-title>Solution to "
                "<a>Exercise 4.1 (The seed)</a></p></div>"
            ),
        ),
    ],
)
def test_a_rule_lets_pass(rule, good):
    assert rule(good) == []


def test_broken_links_and_anchors_are_found(tmp_path):
    (tmp_path / "a.html").write_text("<a href='b.html#no'>x</a><a href='c.html'>y</a><i id=z></i>")
    (tmp_path / "b.html").write_text("<a href='a.html#z'>x</a><a href='https://a.b/c'>y</a>")
    assert rules.broken_links(tmp_path) == [
        "a.html: b.html#no has no such anchor",
        "a.html: c.html does not exist",
    ]


def answer(status, info=""):
    uri = f"https://a.b/{status}"
    return json.dumps({"filename": "book/x.md", "uri": uri, "status": status, "info": info})


def test_a_dead_external_link_is_told_and_a_closed_door_is_not():
    answers = [
        answer("working"),
        answer("redirected", "https://a.b/c"),
        answer("broken", "404 Client Error: Not Found"),
        answer("broken", "403 Client Error: Forbidden"),
        answer("timeout", "no answer"),
    ]
    assert links.broken(answers) == [
        "book/x.md: https://a.b/broken (404 Client Error: Not Found)",
        "book/x.md: https://a.b/timeout (no answer)",
    ]


def test_links_that_cannot_be_collected_are_a_failure(tmp_path):
    with pytest.raises(links.BrokenLinks, match="could not be collected"):
        links.check_links(tmp_path, tmp_path)


def test_the_readme_shows_a_figure_of_the_book(root):
    figure = base64.b64encode((root / "book/_static/headline.png").read_bytes()).decode()
    page = json.loads((root / "notebooks/disentanglement.ipynb").read_text())
    shown = [
        output.get("data", {}).get("image/png", "").replace("\n", "")
        for cell in page["cells"]
        for output in cell.get("outputs", [])
    ]
    assert figure in shown, "copy the page's figure to book/_static/headline.png again"
