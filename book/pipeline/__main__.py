"""Command line of the pipeline: ``python -m pipeline execute|refresh|html|links``."""

import argparse
import signal
import sys
from pathlib import Path
from typing import NoReturn

from pipeline.execute import NotebookFailed, execute_all
from pipeline.links import BrokenLinks, check_links
from pipeline.refresh import refresh
from pipeline.render import RenderFailed, render
from pipeline.stage import stage

ROOT = Path(__file__).resolve().parents[2]


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _execute(arguments: argparse.Namespace) -> None:
    execute_all(ROOT, arguments.profile or "quick", report=_say, force=arguments.force)


def _refresh(arguments: argparse.Namespace) -> None:
    execute_all(ROOT, "quick", report=_say, require_data=True, force=arguments.force)
    changed = refresh(ROOT, report=_say)
    _say(f"refreshed: {', '.join(changed) or 'nothing'}")


def _html(arguments: argparse.Namespace) -> None:
    source = ROOT / "_build" / "src"
    stage(ROOT, source, arguments.profile)
    _say(f"open {render(source, ROOT)}")


def _links(arguments: argparse.Namespace) -> None:
    folder = ROOT / "_build" / "links"
    stage(ROOT, folder / "src", None)
    _say(f"{check_links(folder / 'src', folder)} external addresses answered")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pipeline", description=__doc__)
    commands = parser.add_subparsers(required=True)
    actions = {"execute": _execute, "refresh": _refresh, "html": _html, "links": _links}
    for name, action in actions.items():
        command = commands.add_parser(name)
        command.set_defaults(action=action)
        if name in ("execute", "html"):
            command.add_argument("--profile", choices=("quick", "full"), default=None)
        if name in ("execute", "refresh"):
            command.add_argument("--force", action="store_true", help="run what is up to date too")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return 1 with the reason on stderr when a page fails."""
    chosen = _parser().parse_args(arguments)
    try:
        chosen.action(chosen)
    except (NotebookFailed, RenderFailed, BrokenLinks) as failure:
        sys.stderr.write(f"{failure}\n")
        return 1
    return 0


def _terminated(*_: object) -> NoReturn:
    sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    # Left alone, the signal would end this process and leave those that it started.
    signal.signal(signal.SIGTERM, _terminated)
    sys.exit(main())
