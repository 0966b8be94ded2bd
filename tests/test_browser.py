"""The rendered book as a reader sees it: in a browser, wide and narrow, without a network."""

import functools
import gzip
import json
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest

WIDTHS = {"desktop": 1280, "phone": 390}
MAX_WEIGHT = 1_500_000  # bytes of a page with all that it loads
PACKED = {".html", ".css", ".js", ".svg"}  # what web servers compress


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 128  # a page asks for many files at once


@pytest.fixture(scope="module")
def address(html):
    handler = functools.partial(Quiet, directory=str(html))
    server = Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def visits(root, html, written, address, chromium):
    """Every page at every width: what it measured, loaded and complained of, and its picture."""
    pictures = root / "_build" / "screenshots"
    pictures.mkdir(parents=True, exist_ok=True)
    found = {}
    for width_name, width in WIDTHS.items():
        context = chromium.new_context(viewport={"width": width, "height": 900})
        for path in written:
            seen = visit(context, f"{address}/{path.relative_to(html).as_posix()}")
            seen["page"].screenshot(
                path=pictures / f"{path.stem}-{width_name}.png", full_page=True
            )
            seen.pop("page").close()
            found[path.stem, width_name] = seen
        context.close()
    record(pictures / "pages.json", found, html)
    return found


def record(path, visits, html):
    """Note bytes and milliseconds to the first paint, which depend on the machine: no test."""
    facts = {
        f"{name}, {width}": {"bytes": weight(html, seen["requests"]), "paint_ms": seen["paint"]}
        for (name, width), seen in visits.items()
    }
    path.write_text(json.dumps(facts, indent=1))


def weight(html, requests):
    """Bytes that a page and all that it loads are over a wire."""
    paths = {unquote(urlsplit(url).path).lstrip("/") for url in requests if "data:" not in url}
    return sum(size(html / path) for path in paths)


@functools.cache
def size(path):
    content = path.read_bytes()
    return len(gzip.compress(content)) if path.suffix in PACKED else len(content)


def visit(context, url):
    page = context.new_page()
    errors, requests = [], []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: message.type == "error" and errors.append(message.text))
    page.on("requestfailed", lambda request: errors.append(f"failed {request.url}"))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(url, wait_until="load")
    page.wait_for_function("!window.MathJax || MathJax.startup?.promise !== undefined")
    page.evaluate("window.MathJax ? MathJax.startup.promise.then(() => true) : true")
    return {"page": page, "errors": errors, "requests": requests, **page.evaluate(MEASURE)}


MEASURE = """() => {
  const article = document.querySelector('article.bd-article');
  const shown = [...article.querySelectorAll('img')];
  return {
    overflow: document.documentElement.scrollWidth - window.innerWidth,
    article: article.getBoundingClientRect().width,
    unloaded: shown.filter(i => !(i.complete && i.naturalWidth)).map(i => i.src),
    wide: shown.filter(i => !i.matches('.cell_output .wide, figure[tabindex] > img'))
      .filter(i => i.getBoundingClientRect().right > window.innerWidth + 1).length,
    small: shown.filter(i => i.naturalWidth > 800)
      .filter(i => i.src.endsWith('.png') && i.getBoundingClientRect().width < 600)
      .map(i => i.src),
    unset: [...article.querySelectorAll('.math')].filter(m => !m.querySelector('mjx-container'))
      .map(m => m.textContent),
    mathErrors: [...article.querySelectorAll('mjx-merror')].map(e => e.textContent),
    title: article.querySelector('h1').getBoundingClientRect().height,
    paint: performance.getEntriesByName('first-contentful-paint')[0]?.startTime,
  };
}"""


def collected(visits, key):
    return {place: seen[key] for place, seen in visits.items() if seen[key]}


def test_every_page_was_visited_at_both_widths(visits, written):
    assert len(visits) == 2 * len(written) > 0


def test_nothing_is_loaded_from_elsewhere(visits, address):
    elsewhere = {
        place: [url for url in seen["requests"] if not url.startswith((address, "data:"))]
        for place, seen in visits.items()
    }
    assert {place: urls for place, urls in elsewhere.items() if urls} == {}


def test_no_page_complains(visits):
    assert collected(visits, "errors") == {}


def test_no_page_scrolls_sideways(visits):
    assert {
        place: seen["overflow"] for place, seen in visits.items() if seen["overflow"] > 0
    } == {}


def test_no_page_is_heavy(visits, html):
    heavy = {name: weight(html, seen["requests"]) for (name, _), seen in visits.items()}
    assert {name: size for name, size in heavy.items() if size > MAX_WEIGHT} == {}
    assert min(heavy.values()) > 100_000, "the scripts were not counted"


def test_images_are_shown_and_fit(visits):
    assert collected(visits, "unloaded") == {}
    assert collected(visits, "wide") == {}


def test_rows_of_panels_are_not_shrunk(visits):
    assert collected(visits, "small") == {}


def test_formulas_are_typeset(visits):
    assert collected(visits, "unset") == {}
    assert collected(visits, "mathErrors") == {}


def test_text_uses_the_width_it_has(visits):
    phone = [seen["article"] for (_, width), seen in visits.items() if width == "phone"]
    assert min(phone) > 0.85 * WIDTHS["phone"]
    assert all(seen["title"] > 0 for seen in visits.values())


def test_the_provenance_opens_with_the_keyboard(html, address, chromium):
    first = sorted(html.glob("book/*.html"))[0]
    page = chromium.new_page()
    page.goto(f"{address}/book/{first.name}")
    summary = page.locator("footer.provenance summary")
    assert not page.locator("footer.provenance table").first.is_visible()
    summary.focus()
    page.keyboard.press("Enter")
    assert page.locator("footer.provenance table").first.is_visible()
    page.close()


def test_the_search_finds_a_page(address, chromium):
    page = chromium.new_page()
    page.goto(f"{address}/search.html?q=references")
    page.wait_for_selector("#search-results li a", timeout=20_000)
    assert "references" in page.locator("#search-results").inner_text().lower()
    page.close()
