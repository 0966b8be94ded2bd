"""Interactive figures in a browser: moved by the keyboard, alone, and saying what they compute."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bs4 import BeautifulSoup
from smslib_interactive import fill
from smslib_results import Unknown

from smslib import store
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

    def open_one(name, edit=str):
        figure, _ = fill(FIGURES[name].read_text(), RESULTS)
        page.set_content(f"<html lang='en'><title>x</title><body>{edit(figure)}")
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


@pytest.fixture
def path(opened):
    return opened("alpha_path")


@pytest.fixture
def programs(opened):
    return opened("programs")


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
        assert found["turned"] == (expected.rotations.sum(1) == 1).all()
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


# ------------------------------------------------------------------ the path along alpha


def squares(page, what):
    """Squares of the matrix by place, with the opacity of their filling."""
    return page.locator(f".sms-path .gates .{what}").evaluate_all(
        "found => found.map(r => [Math.floor((r.x.baseVal.value - 24) / 16), "
        "Math.floor(r.y.baseVal.value / 16), Number(r.getAttribute('fill-opacity'))])"
    )


def test_every_step_of_the_path_says_what_is_stored(path):
    stored = store.get("alpha_path", root=RESULTS)
    press(path, "#sms-alpha", "Home")
    for k, alpha in enumerate(stored["alpha"]):
        assert path.locator("#sms-alpha + output").text_content() == str(alpha)
        for name, digits in (("mcc", 2), ("f1", 2), ("nll", 1)):
            shown = path.locator(f"[data-out={name}]").text_content()
            assert shown == f"{stored[name][k]:.{digits}f}"
        said, n_true = path.locator(".said").text_content(), sum(stored["graph"])
        assert f"{stored['n_edges'][k]:.0f} are open" in said
        assert f"{stored['recall'][k] * n_true:.0f} of the {n_true} true edges" in said
        assert f"above {stored['threshold'][k]:.2f} prior" in said
        assert f": {stored['n_above'][k]} true ones" in said
        press(path, "#sms-alpha", "ArrowRight")
    assert path.locator("#sms-alpha").get_attribute("aria-valuetext") == "alpha 800"


def test_the_squares_are_the_stored_gates_and_the_frames_the_true_edges(path):
    stored = store.get("alpha_path", root=RESULTS)
    shape = stored["n_targets"], stored["n_latent"]
    graph = np.reshape(stored["graph"], shape)
    order = sorted(range(shape[0]), key=lambda target: (-graph[target]).tolist())
    frames = {(across, down) for across, down, _ in squares(path, "edge")}
    assert frames == set(zip(*np.nonzero(graph[order]), strict=True))
    press(path, "#sms-alpha", "End")
    shown = np.zeros(shape)
    for across, down, opacity in squares(path, "gate"):
        shown[across, down] = opacity
    last = np.reshape(stored[f"gates.alpha{stored['alpha'][-1]}"], shape)
    np.testing.assert_allclose(shown, last[order] / 100)


# ------------------------------------------------------------------ the latents, one at a time


def genes(page, way):
    rows = page.locator(f".{way} tbody tr")
    return rows.locator("th").all_text_contents(), rows.locator(".weight").all_text_contents()


@pytest.mark.parametrize("kind", ["true", "shuffled"])
def test_every_latent_is_shown_as_it_is_stored(programs, kind):
    stored = store.get("programs", root=RESULTS)
    programs.locator("#sms-labels").select_option(kind)
    press(programs, "#sms-latent", "Home")
    for k, share in enumerate(stored[f"{kind}.share"]):
        assert programs.locator("#sms-latent + output").text_content() == str(k)
        for way in ("up", "down"):
            names, weights = genes(programs, way)
            assert names == stored[f"{kind}.{way}"][k].split()
            expected = stored[f"{kind}.{way}_weights"][k].replace("-", "\N{MINUS SIGN}")
            assert weights == expected.split()
        facts = dict.fromkeys(("share", "r", "opened", "targets", "q", "pathway"))
        facts = {name: programs.locator(f"[data-out={name}]").text_content() for name in facts}
        assert facts["share"] == f"{share * 4:.0f} of 4"
        assert facts["r"].startswith(f"{stored[f'{kind}.median_r'][k]:.2f} ")
        opened = stored[f"{kind}.opened"][k].split()
        assert [part.split()[0] for part in facts["opened"].split(", ")] == (opened or ["none"])
        assert facts["targets"] == (", ".join(stored[f"{kind}.targets"][k].split()) or "none")
        assert facts["q"].startswith(f"{stored[f'{kind}.q.interferon-gamma response'][k]:.3f};")
        assert facts["pathway"] == f"{stored[f'{kind}.pathway_q'][k]:.3f}"
        press(programs, "#sms-latent", "ArrowRight")


def verdicts(page, kind):
    page.locator("#sms-labels").select_option(kind)
    press(page, "#sms-latent", "Home")
    found = []
    for _ in range(10):
        found.append(page.locator(".verdict").text_content())
        press(page, "#sms-latent", "ArrowRight")
    return found


@pytest.mark.parametrize("kind", ["true", "shuffled"])
def test_no_latent_is_called_a_finding_that_is_none(programs, kind):
    stored = store.get("programs", root=RESULTS)
    said = verdicts(programs, kind)
    assert [text.startswith("A finding") for text in said] == stored[f"{kind}.finding"]
    assert ["it comes back" in text for text in said] == stored[f"{kind}.recurs"]
    opened = [names != "" for names in stored[f"{kind}.opened"]]
    assert ["no perturbation opens it" not in text for text in said] == opened


def test_a_finding_would_be_called_one(opened):
    page = opened(
        "programs", lambda figure: figure.replace('"finding": "False', '"finding": "True')
    )
    assert verdicts(page, "true")[0] == (
        "A finding: it comes back, and so does a perturbation that opens it."
    )
    assert verdicts(page, "true")[1].startswith("No finding")


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
