"""Shared by all tests: the repository's root, one thread, and the book rendered once."""

import os
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parents[1]

os.environ.setdefault("OMP_NUM_THREADS", "1")

# A busy machine is no fault of a test.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def html(root, worker_id):
    """Render the committed outputs from nothing, with warnings as errors.

    Each worker that needs the book renders its own: two in one folder would race.
    """
    import shutil

    from pipeline.render import render
    from pipeline.stage import stage

    output = root / "_build" / "test" / worker_id
    shutil.rmtree(output, ignore_errors=True)
    stage(root, output / "src", None)
    return render(output / "src", output).parent


@pytest.fixture(scope="session")
def written(html):
    """The pages of the book, without those that Sphinx makes by itself."""
    return sorted([*html.glob("book/*.html"), *html.glob("notebooks/*.html")])


@pytest.fixture(scope="module")
def chromium():
    """A browser for the tests of one module; one that CI must have."""
    import shutil

    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        assert not os.environ.get("CI"), "chromium must be installed where CI=true"
        pytest.skip("no chromium on this machine: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
