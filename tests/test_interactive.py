"""Interactive figures in a browser: moved by the keyboard, alone, and saying what they compute."""

from pathlib import Path

import pytest
from bs4 import BeautifulSoup

FIGURES = sorted((Path(__file__).resolve().parents[1] / "book" / "_static").glob("*.html"))


@pytest.fixture
def rotation(chromium):
    """The rotation slider on a page without anything else, and the complaints of the page."""
    page, errors = chromium.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: errors.append(f"loads {request.url}"))
    (figure,) = [path for path in FIGURES if path.stem == "rotation"]
    page.set_content(f"<html lang='en'><title>x</title><body>{figure.read_text()}")
    yield page
    assert errors == []
    page.close()


def readout(page):
    outputs = {name: f"[data-out={name}]" for name in ("density", "mcc", "r2")}
    texts = {name: page.locator(place).text_content() for name, place in outputs.items()}
    return {name: float(text.replace("−", "-")) for name, text in texts.items()}


def press(page, knob, key, times):
    page.locator(knob).focus()
    for _ in range(times):
        page.keyboard.press(key)
    return readout(page)


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
    turned = press(rotation, "#sms-turn", "ArrowRight", 9)  # 45 degrees
    assert rotation.locator("#sms-turn + output").text_content() == "45°"
    assert places(rotation, "latents") != latents
    assert places(rotation, "cells") == cells
    assert start["density"] == turned["density"]
    assert (start["mcc"], start["r2"]) == (1, 1)
    assert turned["mcc"] == pytest.approx(0.5**0.5, abs=0.02)
    assert turned["r2"] == 1


def test_a_twist_is_as_invisible_and_not_linear(rotation):
    cells, start = places(rotation, "cells"), readout(rotation)
    twisted = press(rotation, "#sms-twist", "End", 1)
    assert places(rotation, "cells") == cells
    assert start["density"] == twisted["density"]
    assert twisted["r2"] < 0.6
    assert press(rotation, "#sms-twist", "Home", 1) == start


@pytest.mark.parametrize("path", FIGURES, ids=lambda path: path.stem)
def test_an_interactive_figure_is_small_alone_and_labelled(path):
    figure = BeautifulSoup(path.read_text(), "html.parser")
    assert path.stat().st_size < 20_000
    assert figure.select("[src], link, iframe") == []
    labelled = {label["for"] for label in figure.select("label")}
    knobs = [knob["id"] for knob in figure.select("input, select, button")]
    assert knobs
    assert set(knobs) <= labelled
    assert all(len(image["aria-label"]) > 40 for image in figure.select("svg[role=img]"))
