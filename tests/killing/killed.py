"""Studies to be killed: ``python -m killing.killed MODE ROOT [WORKERS]``, its log in ``$LOG``."""

import itertools
import json
import os
import signal
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from killing import tasks

from smslib import files, store, sweep

CODE = {sweep.__file__, store.__file__, files.__file__}


def to_the_end(root, workers):
    """Run 100 squares, here (0 workers) or in a pool."""
    study = sweep.axis("x", range(100))
    if not workers:
        sweep.run(tasks.square, study, root)
        return
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=tasks.lightly) as executor:
        sweep.run(tasks.square, study, root, executor=executor)


def at_every_line(root):
    """Kill a study of three runs at every line it executes, one after the other; resume each.

    Print the number of lines and how many kills fell between opening a file and renaming it.
    """
    log = Path(os.environ["LOG"])
    drafts = 0
    for line in itertools.count(1):
        folder = root / str(line)
        ended_by_itself = _killed_at(line, folder)
        drafts += len(list(folder.glob(".*.tmp")))
        kept = _whole_runs(folder)
        log.write_text("")
        _run(folder)
        assert {int(x) for x in log.read_text().split()} == {0, 2} - kept, (line, kept)
        assert _whole_runs(folder) == {0, 2}, line
        assert len(list(folder.glob("*.error"))) == 1, line
        if ended_by_itself:
            break
    print(json.dumps({"lines": line - 1, "drafts": drafts}))


def _run(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sweep.run(tasks.middle, sweep.axis("x", range(3)), folder)


def _whole_runs(folder):
    """Return the runs on disk, every file of which must be whole."""
    entries = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    assert all(entry["result"] == {"y": 1} for entry in entries)
    errors = [json.loads(path.read_text()) for path in folder.glob("*.error")]
    assert all(entry["error"] == "ArithmeticError: one" for entry in errors)
    return {entry["config"]["x"] for entry in entries}


def _killed_at(line, folder):
    """Fork, run the study in the child and kill it there; tell whether it ended before that."""
    child = os.fork()
    if not child:
        sys.settrace(_killer(line))
        _run(folder)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def _killer(line):
    def trace(frame, event, _):
        nonlocal line
        if frame.f_code.co_filename not in CODE:
            return None
        line -= event == "line"
        if line == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    return trace


if __name__ == "__main__":
    tasks.lightly()
    mode, folder, *workers = sys.argv[1:]
    {"to_the_end": to_the_end, "at_every_line": at_every_line}[mode](
        Path(folder), *map(int, workers)
    )
