"""Interactive figures in a browser: moved by the keyboard, alone, and saying what they compute."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bs4 import BeautifulSoup
from smslib_interactive import fill
from smslib_results import Unknown

from smslib.identifiability import diagnose

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "book" / "results"
FIGURES = {path.stem: path for path in sorted((ROOT / "book" / "_static").glob("*.html"))}
MOST = 4  # in the whole book


@pytest.fixture
def opened(chromium):
    """Open a figure on a page without anything else, and collect the complaints of the page."""
    page, errors = chromium.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: errors.append(f"loads {request.url}"))

    def open_one(name):
        figure, _ = fill(FIGURES[name].read_text(), RESULTS)
        page.set_content(f"<html lang='en'><title>x</title><body>{figure}")
        return page

    yield open_one
    assert errors == []
    page.close()


@pytest.fixture
def rotation(opened):
    return opened("rotation")


@pytest.fixture
def phase(opened):
    return opened("phase")


def press(page, knob, key, times=1):
    page.locator(knob).focus()
    for _ in range(times):
        page.keyboard.press(key)


# ------------------------------------------------------------------ the rotation slider


def readout(page):
    outputs = {name: f"[data-out={name}]" for name in ("density", "mcc", "r2")}
    texts = {name: page.locator(place).text_content() for name, place in outputs.items()}
    return {name: float(text.replace("−", "-")) for name, text in texts.items()}


def places(page, cloud):
    return page.locator(f"[data-cloud={cloud}] > *").evaluate_all(
        "dots => dots.map(dot => dot.getAttribute('transform'))"
    )


def test_a_rotation_moves_the_latents_and_nothing_else(rotation):
    latents, cells, start = (
        places(rotation, "latents"),
        places(rotation, "cells"),
        readout(rotation),
    )
    press(rotation, "#sms-turn", "ArrowRight", 9)  # 45 degrees
    turned = readout(rotation)
    assert rotation.locator("#sms-turn + output").text_content() == "45°"
    assert places(rotation, "latents") != latents
    assert places(rotation, "cells") == cells
    assert start["density"] == turned["density"]
    assert (start["mcc"], start["r2"]) == (1, 1)
    assert turned["mcc"] == pytest.approx(0.5**0.5, abs=0.02)
    assert turned["r2"] == 1


def test_a_twist_is_as_invisible_and_not_linear(rotation):
    cells, start = places(rotation, "cells"), readout(rotation)
    press(rotation, "#sms-twist", "End")
    twisted = readout(rotation)
    assert places(rotation, "cells") == cells
    assert start["density"] == twisted["density"]
    assert twisted["r2"] < 0.6
    press(rotation, "#sms-twist", "Home")
    assert readout(rotation) == start


# ------------------------------------------------------------------ the phase diagram


def table(page):
    """Percentages by latents per perturbation (row) and number of perturbations."""
    columns = page.locator("thead th").all_text_contents()
    rows = page.locator("tbody tr").evaluate_all(
        "rows => rows.map(r => [r.cells[0].textContent, "
        "[...r.cells].slice(1).map(c => parseInt(c.firstChild.textContent))])"
    )
    return {name: dict(zip(map(int, columns), shares, strict=True)) for name, shares in rows}


def test_the_page_diagnoses_designs_as_the_library_does(phase):
    rng, seen = np.random.default_rng(0), set()
    for _ in range(150):
        shape = rng.integers(3, 40), rng.integers(2, 7)
        graph = rng.random(shape) < rng.uniform(0.1, 0.9)
        moved = [np.flatnonzero(row).tolist() for row in graph]
        found = phase.evaluate(
            "([rows, p]) => document.querySelector('.sms-phase').diagnose(rows, p)",
            [moved, int(shape[1])],
        )
        expected = diagnose(graph)
        assert found["passes"] == expected.criterion
        assert found["share"] == pytest.approx(expected.alone.mean())
        seen.add(expected.criterion)
    assert seen == {True, False}


def test_more_latents_need_more_perturbations(phase):
    before = table(phase)
    press(phase, "#sms-latents", "End")
    after = table(phase)
    assert phase.locator("#sms-latents + output").text_content() == "30"
    assert "of 30 latents" in phase.locator("caption").text_content()
    assert after["1 to 3"][80] < before["1 to 3"][80] - 20
    press(phase, "#sms-latents", "ArrowLeft", 3)
    assert table(phase) == before, "the designs must be the same for every reader"


def test_what_the_page_says_of_the_diagram_holds(phase):
    assert table(phase)["1 to 3"][20] < 10
    phase.locator("#sms-shown").select_option("share")
    assert "latents that are identified" in phase.locator("caption").text_content()
    assert 25 < table(phase)["1 to 3"][20] < 33
    phase.locator("#sms-shown").select_option("passes")
    press(phase, "#sms-latents", "ArrowLeft")  # ten latents
    shares = table(phase)
    assert min(row[80] for row in shares.values()) > 90
    assert shares["1 in 2"][20] == max(row[20] for row in shares.values())


def test_stored_scores_stand_in_their_cells(phase):
    press(phase, "#sms-latents", "ArrowLeft")
    stored, _ = fill("{{table5.smslib.s0.5.svae+.mcc.mean:.2f}}", RESULTS)
    row = phase.locator("tbody tr", has=phase.get_by_role("rowheader", name="1 in 2"))
    assert row.locator("td").nth(4).locator(".mcc").text_content() == f"MCC {stored}"
    assert phase.locator(".mcc").count() == 4


# ------------------------------------------------------------------ all of them


def test_the_book_has_few_of_them_and_shows_each(root):
    assert len(FIGURES) <= MOST
    shown = "".join(path.read_text() for path in root.glob("notebooks/*.md"))
    assert [name for name in FIGURES if f"{{interactive}} {name}\n" not in shown] == []


@pytest.mark.parametrize("path", FIGURES.values(), ids=FIGURES)
def test_an_interactive_figure_is_small_alone_and_labelled(path):
    figure = BeautifulSoup(path.read_text(), "html.parser")
    assert path.stat().st_size < 20_000
    assert figure.select("[src], link, iframe") == []
    labelled = {label["for"] for label in figure.select("label")}
    knobs = [knob["id"] for knob in figure.select("input, select, button")]
    assert knobs
    assert set(knobs) <= labelled
    assert all(len(image["aria-label"]) > 40 for image in figure.select("svg[role=img]"))


def test_a_figure_with_an_unknown_value_is_refused():
    assert fill("a{b}{c}", RESULTS) == ("a{b}{c}", set())
    with pytest.raises(Unknown, match=r"no 'smslib\.no' in cells\.json"):
        fill("{{cells.smslib.no:.2f}}", RESULTS)


def test_a_page_with_an_unknown_figure_does_not_render(tmp_path):
    extensions = str(ROOT / "book" / "_ext")
    (tmp_path / "conf.py").write_text(
        f"import sys\nsys.path.insert(0, {extensions!r})\n"
        "extensions = ['myst_parser', 'smslib_interactive']\nhtml_theme = 'basic'\n"
    )
    (tmp_path / "index.md").write_text("# Title\n\n```{interactive} nothing\n```\n")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", ".", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "interactive figure 'nothing'" in done.stderr
