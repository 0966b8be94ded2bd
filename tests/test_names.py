"""What messages say about unknown names and packages."""

import sys

import pytest

from smslib.names import from_extra, nearest_known, unknown_names


@pytest.mark.parametrize(
    ("name", "known", "text"),
    [
        ("STAT", ["JAK2", "STAT1"], "; nearest known: ['STAT1']"),
        (
            "STAT",
            ["STAT1", "STAT2", "STAT3", "STAT"],
            "; nearest known: ['STAT', 'STAT3', 'STAT2']",
        ),
        ("x", ["JAK2", "STAT1"], "; known: ['JAK2', 'STAT1']"),
        ("x", list("abcdefghijkl"), "; known: ['a', 'b', 'c', 'd', 'e', 'f', 'g', 'h', 'i', 'j']"),
        ("x", [], "; known: []"),
    ],
)
def test_the_three_nearest_or_the_first_ten(name, known, text):
    assert nearest_known(name, known) == text


def test_every_unknown_name_is_said_once():
    text = unknown_names("gene", ["STAT", "AB", "x", "STAT"], ["AB", "STAT1"])
    first, second = "'STAT'; nearest known: ['STAT1']", "'x'; known: ['AB', 'STAT1']"
    assert text == f"unknown gene {first}, unknown gene {second}"
    assert unknown_names("gene", ["A"], {"A": 1}) == ""


@pytest.mark.parametrize(("n_names", "n_compared"), [(100, 100), (103, 20), (3000, 20)])
def test_a_list_is_said_in_full_and_a_wrong_column_in_part(n_names, n_compared):
    """Which would take a minute else, and most of a megabyte."""
    cells = [f"{n:016d}-1" for n in range(n_names)]
    text = unknown_names("condition", cells, [f"GENE{n}" for n in range(680)])
    assert text.count("unknown condition") == 100
    assert text.count("known: [") == n_compared
    assert text.endswith(f"and {n_names - 100:,} more") == (n_names > 100)


def test_known_names_may_come_from_an_iterator():
    assert unknown_names("gene", ["B", "C"], iter("AB")) == "unknown gene 'C'; known: ['A', 'B']"


def test_a_package_that_is_not_installed_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "json", None)
    message = r"this needs json, which is not installed: pip install 'smslib\[plot\]'"
    with pytest.raises(ImportError, match=message), from_extra("plot"):
        import json  # noqa: F401


def test_what_is_wrong_with_an_installed_package_is_not_hidden():
    with pytest.raises(ImportError, match="cannot import name 'nothing'"), from_extra("data"):
        from math import nothing  # noqa: F401
