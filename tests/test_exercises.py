"""The code inside the solutions of exercises runs, each block by itself."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOLUTION = re.compile(r"^(`{4,})\{solution\} (\S+)\n(.*?)^\1$", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text):
    """Return every block of Python in the solutions of a page, by its exercise."""
    return {
        f"{label}-{place}": code
        for _, label, body in SOLUTION.findall(text)
        for place, code in enumerate(BLOCK.findall(body))
    }


CODE = {
    name: code
    for page in sorted((ROOT / "notebooks").glob("*.md"))
    for name, code in blocks(page.read_text()).items()
}


@pytest.mark.parametrize("name", CODE)
def test_the_code_of_a_solution_runs(name):
    assert "assert " in CODE[name], "a solution's code says what it shows, in an assert"
    exec(compile(CODE[name], name, "exec"), {})


def test_blocks_are_found_and_false_ones_fail():
    page = "````{solution} ex-a\n:class: dropdown\n\n```python\nassert 1 == 2\n```\n````\n"
    (code,) = blocks(page).values()
    with pytest.raises(AssertionError):
        exec(code, {})
