"""Every page under axe-core, in both color schemes; the style sheet's colors by computation."""

import re
from pathlib import Path

import pytest

from smslib import plotting

ROOT = Path(__file__).resolve().parents[1]
STYLE = (ROOT / "book" / "_static" / "custom.css").read_text()
VIEWS = {
    "light, desktop": {"color_scheme": "light", "viewport": {"width": 1280, "height": 900}},
    "dark, phone": {"color_scheme": "dark", "viewport": {"width": 390, "height": 844}},
}
GROUNDS = {"light": "#ffffff", "dark": "#121212"}  # of the theme
BARRIERS = {"serious", "critical"}
RUN = """() => axe.run(document, {resultTypes: ['violations']}).then(found =>
  found.violations.map(v => [v.impact, v.id, v.nodes[0].target.join(' '), v.nodes.length]))"""


@pytest.fixture(scope="module")
def axe():
    """The script of axe-core, as its package carries it."""
    import axe_playwright_python

    return (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text()


@pytest.fixture(scope="module", params=VIEWS)
def context(request, chromium, axe):
    context = chromium.new_context(**VIEWS[request.param])
    context.set_default_timeout(120_000)
    context.add_init_script(axe)
    yield context
    context.close()


def barriers(page):
    page.evaluate("window.MathJax ? MathJax.startup.promise.then(() => true) : true")
    return [violation for violation in page.evaluate(RUN) if violation[0] in BARRIERS]


def test_no_page_has_a_barrier(written, context):
    found = {}
    for path in written:
        page = context.new_page()
        page.goto(path.as_uri(), wait_until="load")
        found[path.stem] = barriers(page)
        page.close()
    assert len(found) > 20
    assert {name: each for name, each in found.items() if each} == {}


@pytest.mark.parametrize(
    ("body", "rule"),
    [
        ("<img src='data:image/gif;base64,R0lGODlhAQABAAAAACw='>", "image-alt"),
        ("<p style='color: #999; background: #fff'>pale</p>", "color-contrast"),
        ("<label></label><input type='range'>", "label"),
    ],
)
def test_a_barrier_is_found(context, body, rule):
    page = context.new_page()
    page.goto("about:blank")
    page.set_content(f"<html lang='en'><title>x</title><body><main>{body}</main>")
    assert rule in [violation[1] for violation in barriers(page)]
    page.close()


# ------------------------------------------------------------------ colors by computation


def luminance(colour):
    """Relative luminance by WCAG 2.2."""
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def scheme(name):
    """Colors that the style sheet sets for one scheme; dark ones replace light ones."""
    blocks = {"light": [":root"], "dark": [":root", 'html[data-theme="dark"]']}[name]
    found = {}
    for block in blocks:
        inside = re.search(re.escape(block) + r" \{(.*?)\}", STYLE, re.DOTALL)[1]
        found |= dict(re.findall(r"--(sms-\w+): (#\w{6});", inside))
    return found


def test_contrast_is_that_of_the_standard():
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)


@pytest.mark.parametrize("name", GROUNDS)
def test_text_colors_can_be_read_on_both_grounds(name):
    colours = scheme(name)
    for text in ("sms-accent", "sms-quiet"):
        for ground in (GROUNDS[name], colours["sms-soft"]):
            assert contrast(colours[text], ground) >= 4.5, (text, ground)


# Colors as people see them who lack the cones for long or for middle wavelengths (Viénot, Brettel
# and Mollon 1999): linear light is multiplied by one of these.
SIGHT = {
    "full": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": ((0.11238, 0.88762, 0), (0.11238, 0.88762, 0), (0.00401, -0.00401, 1)),
    "deuteranopia": ((0.29275, 0.70725, 0), (0.29275, 0.70725, 0), (-0.02234, 0.02234, 1)),
}


def lab(colour, sight):
    """CIE L*a*b* of a color as seen, D65."""
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    seen = [sum(a * c for a, c in zip(row, linear, strict=True)) for row in SIGHT[sight]]
    to_xyz = (
        (0.4124 / 0.9505, 0.3576 / 0.9505, 0.1805 / 0.9505),
        (0.2126, 0.7152, 0.0722),
        (0.0193 / 1.089, 0.1192 / 1.089, 0.9505 / 1.089),
    )
    x, y, z = (sum(a * c for a, c in zip(row, seen, strict=True)) for row in to_xyz)
    x, y, z = (t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in (x, y, z))
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


@pytest.mark.parametrize("sight", SIGHT)
def test_the_ladders_colors_differ_for_every_eye(sight):
    """By ten just noticeable differences, for the methods that most figures show together."""
    methods = ("vae", "beta-vae", "ivae", "svae", "svae+", "oracle")
    seen = {name: lab(plotting.look(name).colour, sight) for name in methods}
    for one in methods:
        for other in methods[methods.index(one) + 1 :]:
            distance = sum((a - b) ** 2 for a, b in zip(seen[one], seen[other], strict=True))
            assert distance**0.5 > 10, (one, other)
