"""The page of the library's names: read from the package's text, complete, with summaries."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import smslib_api as api
from bs4 import BeautifulSoup

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "smslib"
MODULE = '''
"""What ``it`` is.

More.
"""
from os import sep
from smslib.other import borrowed

__all__ = ["LIMIT", "PLAIN", "TYPED", "Kind", "borrowed", "work"]

# How many there
# may be.
LIMIT = 3
PLAIN = ("a", "b")
TYPED: dict[str, int] = {"a": 1}


def work(x, *, scale=1, **options):
    """Scale `x` by :math:`s`.

    And more.
    """


class Kind:
    """A kind."""

    @property
    def size(self):
        """Its size."""

    @classmethod
    def at(cls, place):
        """Make one."""

    def _hidden(self):
        pass
'''
OTHER = '"""Other."""\n\n__all__ = ["borrowed"]\n\ndef borrowed():\n    """Lend."""\n'
CONF = """
import sys
sys.path.insert(0, {ext!r})
extensions = ["myst_nb", "smslib_api"]
html_theme = "basic"
"""


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / "smslib"
    folder.mkdir()
    (folder / "one.py").write_text(MODULE)
    (folder / "other.py").write_text(OTHER)
    return folder


def test_names_are_described_in_their_order_with_calls_and_first_lines(package):
    summary, names = api.public(package, "one")
    assert summary == "What ``it`` is."
    assert [(n.call, n.kind, n.summary) for n in names] == [
        ("LIMIT", "constant", "How many there may be."),
        ("PLAIN", "constant", "``('a', 'b')``"),
        ("TYPED", "constant", "``dict[str, int]``"),
        ("Kind", "class", "A kind."),
        ("borrowed()", "function", "Lend."),
        ("work(x, *, scale, **options)", "function", "Scale `x` by :math:`s`."),
    ]
    assert [(m.call, m.kind) for m in names[3].members] == [
        ("size", "property"),
        ("at(place)", "method"),
    ]


@pytest.mark.parametrize(
    ("module", "text", "says"),
    [
        ("two", None, "has no module 'two'"),
        ("two", "x = 1\n", "has no __all__"),
        ("two", '__all__ = ["y"]\nx = 1\n', "exports 'y', which it does not define"),
    ],
)
def test_what_is_not_there_is_refused(package, module, text, says):
    if text is not None:
        (package / f"{module}.py").write_text(text)
    with pytest.raises(api.Unlisted, match=says):
        api.public(package, module)


@pytest.mark.parametrize("module", sorted(api.modules(FOLDER)))
def test_the_page_says_what_the_module_exports(module):
    _, names = api.public(FOLDER, module)
    listed = {name.call.partition("(")[0] for name in names}
    assert listed == set(importlib.import_module(f"smslib.{module}").__all__)


def test_every_public_name_of_the_library_says_what_it_does():
    for module in sorted(api.modules(FOLDER)):
        summary, names = api.public(FOLDER, module)
        assert summary
        assert list(api._silent(names)) == [], module


def build(folder, page):
    (folder / "conf.py").write_text(CONF.format(ext=str(ROOT / "book" / "_ext")))
    if not (folder / "index.md").exists():
        (folder / "index.md").write_text(page)
    command = [sys.executable, "-m", "sphinx", "-q", str(folder), str(folder / "out")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def sections(folder):
    html = BeautifulSoup((folder / "out" / "index.html").read_text(), "html.parser")
    return [tag["id"] for tag in html.select("section[id^=module-]")]


def test_a_module_becomes_a_section_of_the_page(package):
    page = "# Names\n\n```{public-names} one\n```\n\n```{public-names} other\n```\n"
    assert build(package.parent, page) == ""
    html = BeautifulSoup((package.parent / "out" / "index.html").read_text(), "html.parser")
    assert html.select_one("section#module-one h2 code").get_text() == "smslib.one"
    term = html.select_one("dt#api-one-work")
    assert term.code.get_text() == "work(x, *, scale, **options)"
    assert term.find_next("dd").select_one(".math") is not None
    assert [li.get_text().strip() for li in html.select("dt#api-one-kind + dd li")] == [
        "size Its size.",
        "at(place) Make one.",
    ]


def test_others_are_all_that_the_page_has_not_listed_and_a_new_one_is_not_left_out(package):
    page = "# Names\n\n```{public-names} one\n```\n\n```{public-names} others\n```\n"
    assert build(package.parent, page) == ""
    assert sections(package.parent) == ["module-one", "module-other"]
    (package / "new.py").write_text('"""New."""\n\n__all__ = []\n')
    assert build(package.parent, page) == ""
    assert sections(package.parent) == ["module-one", "module-new", "module-other"]


def test_what_is_missing_or_says_nothing_is_a_warning(package):
    (package / "other.py").write_text('__all__ = ["borrowed"]\n\ndef borrowed():\n    pass\n')
    page = "# Names\n\n```{public-names} one\n```\n\n```{public-names} no\n```\n"
    said = build(package.parent, page)
    assert "smslib.one: borrowed() has no summary" in said
    assert "smslib has no module 'no'" in said
