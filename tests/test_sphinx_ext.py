"""The book's Sphinx extensions on a tiny project: values in prose, provenance, formulas."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import smslib_accessible as accessible
import smslib_offline as offline
import smslib_provenance as provenance
import smslib_results as results
import smslib_terms as terms
from bs4 import BeautifulSoup
from docutils import nodes
from docutils.utils import new_document

ROOT = Path(__file__).resolve().parents[1]
RECORD = {
    "commit": "0123456789abcdef",
    "dirty": False,
    "date": "2026-01-02T03:04:05Z",
    "wall_seconds": 123.4,
    "python": "3.11.7",
    "torch": "2.13.0",
    "command": "python -m somewhere",
    "device": "cpu",
    "seeds": [0, 1],
    "peak_memory_mb": 512.0,
}
VALUES = {
    "svae+.mcc": 0.91234,
    "drop": -0.5,
    "n": 5,
    "name": "sVAE-plus",
    "each": [0.1, 0.2],
    "lost": None,
}
PAPER = """
table1:
  source: "Table 1"
  columns: {mcc: {label: MCC, digits: 2}, nll: {label: NLL, digits: 1}}
  rows:
    svae+: {mcc: {mean: 0.9, sd: 0.04}, nll: {mean: 315.4}}
"""
CONF = """
import sys
sys.path.insert(0, {ext!r})
extensions = ["myst_nb", "smslib_results", "smslib_provenance", "smslib_offline"]
nb_execution_mode = "off"
html_theme = "basic"
exclude_patterns = ["out", "again", "jupyter_execute"]
"""


FACTS = {
    "commit": "feed",
    "dirty": True,
    "date": "2026-02-03",
    "versions": {"torch": "2.13.0"},
    "pages": {
        "live": {"profile": "quick", "origin": "executed", "seconds": 34.2, "missing": []},
    },
}
GOOD = {
    "values": "We reach {result}`03_full.svae+.mcc:.2f`, they {paper}`table1.svae+.mcc`.",
    "plain": "Nothing.",
    "formula": "```{math}\nx^2\n```",
    **{f"p{i}": "{result}`03_full.n`" for i in range(6)},
}
BAD = {
    "{result}`03_full.svae.mcc:.2f`": "no 'svae.mcc' in 03_full.json; nearest known: ['svae+.mcc'",
    "{result}`03_ful.n`": "no '03_ful' in book/results (experiments); nearest known: ['03_full'",
    "{result}`03_full.svae+.mcc`": "0.91234 needs a format",
    "{result}`03_full.name:.2f`": "Unknown format code 'f'",
    "{result}`03_full.lost:.2f`": "the stored value is null",
    "{paper}`table9.svae+.mcc`": "no 'table9' in paper_values.yml",
    "{paper}`table1.svae.mcc`": "no 'svae' in table1; nearest known: ['svae+'",
    "{paper}`table1.svae+.r2`": "no 'r2' in table1.svae+",
    "{paper}`table1.svae+.nll.sd`": "no 'sd' in table1.svae+.nll",
    "{result}`bare.n`": "'bare' lacks provenance: dirty, date, wall_seconds",
}


def lay_out(root, pages):
    """Write a project of these pages, the stored results they quote, and one notebook."""
    (root / "book" / "results").mkdir(parents=True)
    (root / "conf.py").write_text(CONF.format(ext=str(ROOT / "book" / "_ext")))
    (root / "book" / "results" / "paper_values.yml").write_text(PAPER)
    (root / "build.json").write_text(json.dumps(FACTS))
    store(root, "03_full", VALUES, RECORD)
    store(root, "bare", VALUES, {"commit": "x"})
    names = "\n".join([*pages, "live"])
    for name, text in {**pages, "index": f"```{{toctree}}\n{names}\n```"}.items():
        (root / f"{name}.md").write_text(f"# Title\n\n{text}\n")
    return root


def store(root, name, values, record):
    payload = {"values": values, "provenance": record}
    (root / "book" / "results" / f"{name}.json").write_text(json.dumps(payload))


def notebook(root, **header):
    cell = {"cell_type": "markdown", "id": "a", "metadata": {}, "source": "# Title"}
    content = {"cells": [cell], "metadata": {"smslib": header}, "nbformat": 4, "nbformat_minor": 5}
    (root / "live.ipynb").write_text(json.dumps(content))


def build(root, *options, output="out"):
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", *options, ".", output]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


def parse(root, name, output="out"):
    return BeautifulSoup((root / output / f"{name}.html").read_text(), "html.parser")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A clean project, built by two processes."""
    root = lay_out(tmp_path_factory.mktemp("site"), GOOD)
    notebook(root, results=["03_full"])
    done = build(root, "-j", "2")
    assert done.stderr == ""
    return root


@pytest.fixture(scope="module")
def complaints(tmp_path_factory):
    """What the build of a project says in which every page has one mistake."""
    pages = {f"bad{number}": text for number, text in enumerate(BAD)}
    root = lay_out(tmp_path_factory.mktemp("bad"), pages)
    notebook(root, results="no_such")
    done = build(root)
    assert done.returncode != 0
    return done.stderr.splitlines()


@pytest.fixture
def folder(tmp_path):
    lay_out(tmp_path, {})
    return tmp_path / "book" / "results"


# ------------------------------------------------------------------ values in prose


def test_values_are_printed_with_their_source_on_hover(site):
    ours, theirs = parse(site, "values").select("abbr")
    assert ours.get_text() == "0.91"
    assert ours["title"] == "our run, 03_full.json: svae+.mcc, commit 0123456789"
    assert theirs.get_text() == "0.90 ± 0.04"
    assert theirs["title"] == "published: Table 1"
    assert (ours["class"], theirs["class"]) == (["result-value"], ["paper-value"])


@pytest.mark.parametrize("text", BAD)
def test_an_unknown_name_or_an_unfit_format_is_a_warning_with_its_place(complaints, text):
    page = f"bad{list(BAD).index(text)}"
    about = [line for line in complaints if f"{page}.md" in line or f"{page}:" in line]
    assert len(about) == 1
    assert BAD[text] in about[0]


def test_a_notebook_that_names_an_unknown_experiment_is_a_warning(complaints):
    assert any("'no_such' lacks provenance" in line for line in complaints)


@pytest.mark.parametrize(
    ("name", "spec", "text"),
    [
        ("03_full.n", "", "5"),
        ("03_full.name", "", "sVAE-plus"),
        ("03_full.drop", ".1f", "−0.5"),
        ("03_full.drop", ".0f", "0"),
        ("03_full.each", ".1f", "0.1, 0.2"),
    ],
)
def test_a_stored_value_is_shown_as_what_it_is(folder, name, spec, text):
    assert results.result(folder, name, spec)[0] == text


@pytest.mark.parametrize(
    ("name", "spec", "text"),
    [
        ("table1.svae+.mcc.mean", "", "0.90"),
        ("table1.svae+.mcc.sd", ".1f", "0.0"),
        ("table1.svae+.nll", "", "315.4"),
    ],
)
def test_a_published_value_has_its_published_digits(folder, name, spec, text):
    assert results.published(folder, name, spec)[0] == text


def test_the_books_own_table_of_published_values_is_well_formed():
    import yaml

    tables = yaml.safe_load((ROOT / "book/results/paper_values.yml").read_text())
    for table in tables.values():
        assert table["evidence"] in {"read", "digitised", "second-hand"}
        for row in table["rows"].values():
            assert row.keys() <= table["columns"].keys()
    table = tables["table1"]["rows"]
    assert list(table) == ["vae", "beta-vae", "ivae", "svae", "svae+"]
    assert table["svae+"]["i_nll"] == {"mean": 315.43, "sd": 2.46}
    assert "f1" not in table["vae"]


# ------------------------------------------------------------------ provenance


def footer(root, name, output="out"):
    (found,) = parse(root, name, output).select("footer.provenance")
    return found.get_text(" ")


@pytest.mark.parametrize(
    "expected",
    [
        "feed with uncommitted changes",
        "2026-02-03",
        "torch 2.13.0",
        "1 stored experiment",
        "03_full",
        "0123456789",
        "123 s",
        "512 MB",
        "0, 1",
        "python -m somewhere",
    ],
)
def test_the_footer_tells_the_build_and_the_experiments_quoted(site, expected):
    assert expected in footer(site, "values")


def test_a_page_without_experiments_tells_the_build_only(site):
    assert "feed" in footer(site, "plain")
    assert "03_full" not in footer(site, "plain")


def test_a_notebook_carries_a_badge_and_the_experiments_its_header_names(site):
    badge = parse(site, "live").select_one("h1 + .profile-badge")
    assert badge.get_text() == "quick profile · run in 34 s"
    assert "03_full" in footer(site, "live")
    assert "make book" in footer(site, "live")


def test_pages_follow_results_and_build_and_do_not_depend_on_parallel_reading(site):
    assert build(site, output="again").returncode == 0
    pages = [*GOOD, "live"]
    assert [footer(site, name, "again") for name in pages] == [
        footer(site, name) for name in pages
    ]
    store(site, "03_full", {**VALUES, "n": 6}, RECORD)
    (site / "build.json").write_text(json.dumps({**FACTS, "commit": "beef"}))
    assert build(site, output="again").returncode == 0
    assert parse(site, "p0", "again").select_one("abbr").get_text() == "6"
    assert all("beef" in footer(site, name, "again") for name in pages)


@pytest.mark.parametrize(
    ("record", "text"),
    [
        (
            {"origin": "stored", "profile": "quick", "missing": []},
            "quick profile · stored outputs",
        ),
        (
            {"origin": "stored", "profile": "quick", "missing": ["a screen"]},
            "quick profile · stored outputs, a screen not available",
        ),
        (
            {"origin": "executed", "profile": "full", "missing": [], "seconds": 7.6},
            "full profile · run in 8 s",
        ),
    ],
)
def test_the_badge_says_where_outputs_come_from(record, text):
    assert BeautifulSoup(provenance.badge(record), "html.parser").get_text() == text


def test_footers_escape_what_they_quote():
    html = provenance.footer({"commit": "<b>"}, "page", {})
    assert "<b>" not in html
    assert "&lt;b&gt;" in html


# ------------------------------------------------------------------ formulas


def test_formulas_are_set_by_a_copy_that_comes_with_the_book(site):
    sources = [tag.get("src", "") for tag in parse(site, "formula").select("script")]
    assert [s.split("?")[0] for s in sources if "mathjax" in s] == ["_static/mathjax/tex-chtml.js"]
    assert (site / "out/_static/mathjax/output/chtml/fonts/woff-v2").is_dir()


@pytest.mark.parametrize(
    ("script", "thebe"),
    [
        (SimpleNamespace(filename=None, attributes={"body": 'const THEBE_JS_URL = "x"'}), True),
        (SimpleNamespace(filename="_static/sphinx-thebe.js", attributes={}), True),
        (SimpleNamespace(filename=None, attributes={"body": "window.MathJax = {}"}), False),
        (SimpleNamespace(filename="_static/doctools.js", attributes={}), False),
        ("_static/doctools.js", False),
    ],
)
def test_only_thebes_scripts_are_dropped(script, thebe):
    assert offline.is_thebe(script) == thebe


def test_mathjax_is_copied_once_and_again_where_it_is_another_or_incomplete(tmp_path):
    source = offline.mathjax_folder()
    offline.copy_mathjax(source, tmp_path)
    copies = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    for path in copies:
        os.utime(path, (1, 1))
    copies[0].unlink()
    (tmp_path / "tex-chtml.js").write_text("of another version")
    offline.copy_mathjax(source, tmp_path)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == copies
    assert (tmp_path / "tex-chtml.js").read_bytes() == (source / "tex-chtml.js").read_bytes()
    anew = {path for path in copies if path.stat().st_mtime > 1}
    assert anew == {copies[0], tmp_path / "tex-chtml.js"}
    assert sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()) < 3_000_000


def test_icons_that_no_page_shows_are_dropped():
    drawings = 'var a={sun:[5,5,[9728],"f185","M1"],"old-bell":[5,5,["bell"],"f0f3",["",'
    drawings += '"M2"]],moon:[5,5,[],"f186","M3"]};go(a)'
    pages = ['<i class="fa-solid fa-sun"></i>', "<i class='fas fa-bell'></i>"]
    kept = offline.only_icons(drawings, offline.icons_shown(pages))
    assert kept == drawings.replace('moon:[5,5,[],"f186","M3"]', "")


# ------------------------------------------------------------------ terms of the glossary


LINKS = {"VAE": "g#vae", "latent": "g#latent", "mean field": "g#field", "dead latent": "g#dead"}


def linked(text):
    """Terms that get a link in a paragraph of this text, and the text that is left."""
    paragraph = nodes.paragraph("", "", *[nodes.Text(text)])
    doctree = new_document("page")
    doctree += nodes.section("", nodes.title("", "A latent"), paragraph, nodes.literal("", "VAE"))
    terms.link_first_uses(doctree, LINKS)
    found = [(node.astext(), node["refuri"]) for node in doctree.findall(nodes.reference)]
    assert paragraph.astext() == text
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Two latents and a latent", [("latents", "g#latent")]),
        ("A dead latent, a latent", [("dead latent", "g#dead"), ("latent", "g#latent")]),
        ("Mean-field VAEs", [("Mean-field", "g#field"), ("VAEs", "g#vae")]),
        ("iVAE, β-VAE, sVAE+, vae, latently", []),
    ],
)
def test_the_first_use_of_a_term_is_linked(text, expected):
    assert linked(text) == expected


def test_a_term_that_the_author_linked_is_left_alone():
    doctree = new_document("page")
    link = nodes.reference("", "latents", refuri="g#latent")
    doctree += nodes.paragraph("", "", nodes.Text("one latent, "), link, nodes.Text(" and a VAE"))
    terms.link_first_uses(doctree, LINKS)
    assert [node.astext() for node in doctree.findall(nodes.reference)] == ["latents", "VAE"]


def test_html_is_mended_for_screen_readers():
    assert accessible.mended("<th></th><th>a</th>") == "<td></td><th>a</th>"
    assert accessible.mended('<th class="head"><p></p></th>') == '<td class="head"></td>'
    assert accessible.mended('<div role="doc-biblioentry">') == '<div role="listitem">'


def test_outputs_that_scroll_are_reached_by_keys_and_no_others():
    outputs = [nodes.container(classes=["cell_output"]) for _ in range(2)]
    wide, prose = nodes.image(uri="headline.png"), nodes.image(uri="headline.png")
    outputs[1] += nodes.figure("", wide)
    page = nodes.section("", *outputs, nodes.paragraph("", "", prose))
    document = new_document("page")
    document += page
    app = SimpleNamespace(srcdir=ROOT / "book" / "_static")
    accessible._mark_wide(app, document, "page")
    assert [image["classes"] for image in (wide, prose)] == [["wide"], ["wide"]]
    assert [output["classes"][1:] for output in outputs] == [[], ["scrolls"]]
    html = '<div class="cell_output docutils container"><div class="cell_output scrolls docutils">'
    assert accessible.mended(html) == html.replace(
        'scrolls docutils"', 'scrolls docutils" tabindex="0"'
    )


def test_the_width_of_a_figure_is_read_from_the_file():
    from PIL import Image

    figures = ROOT / "book" / "_static"
    with Image.open(figures / "headline.png") as image:
        assert accessible.png_width(figures / "headline.png") == image.width
    assert accessible.png_width(figures / "plate.svg") == 0
