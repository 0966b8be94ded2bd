"""Ask every external address of the book whether it is still there."""

import json
import subprocess
from collections.abc import Iterable
from pathlib import Path

from pipeline.render import command

# Publishers turn programs away (401, 403, 429) where a reader would be let in.
_TURNED_AWAY = ("401", "403", "429")


class BrokenLinks(RuntimeError):
    """Addresses that lead nowhere; the message lists each with its page."""


def check_links(source: Path, output: Path) -> int:
    """Return how many external addresses answered, of the pages staged under ``source``.

    Raises
    ------
    BrokenLinks
        If any is broken.
    """
    log = output.resolve() / "_build" / "html" / "output.json"  # where Jupyter Book puts it
    log.unlink(missing_ok=True)
    call = command(output, "--builder", "linkcheck")
    done = subprocess.run(call, cwd=source, capture_output=True, text=True, check=False)
    if not log.is_file():
        raise BrokenLinks(f"the addresses could not be collected:\n{done.stderr[-2000:]}")
    lines = log.read_text().splitlines()
    found = broken(lines)
    if found:
        raise BrokenLinks("\n".join(found))
    return len(lines)


def broken(lines: Iterable[str]) -> list[str]:
    """Return page, address and reason of what is broken in Sphinx's log, one object a line."""
    found = []
    for entry in map(json.loads, lines):
        reason = entry["info"]
        gone = entry["status"] in ("broken", "timeout")
        if gone and not reason.startswith(_TURNED_AWAY):
            found.append(f"{entry['filename']}: {entry['uri']} ({reason})")
    return found
