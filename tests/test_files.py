"""Files that appear whole or not at all, where there is room."""

import errno
import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from smslib import files


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("flush", [True, False])
def test_a_file_appears_when_it_is_whole(tmp_path, flush):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with files.whole(path, flush=flush) as draft:
        assert draft.parent == tmp_path
        assert not draft.exists()
        draft.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["a.txt"]


def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), files.whole(path) as draft:
        draft.write_text("half"), 1 / 0
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_file_that_cannot_be_flushed_does_not_appear(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), files.whole(tmp_path / "a") as draft:
        draft.write_text("new")
    assert names(tmp_path) == []
    with files.whole(tmp_path / "a", flush=False) as draft:
        draft.write_text("new")
    assert names(tmp_path) == ["a"]


def test_drafts_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "a.txt"
    with files.whole(path) as first:
        first.write_text("first")
        with files.whole(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert names(tmp_path) == ["a.txt"]


def test_a_draft_may_lie_in_another_folder(tmp_path):
    (tmp_path / "parts").mkdir()
    with files.whole(tmp_path / "a.txt", folder=tmp_path / "parts") as draft:
        draft.write_text("new")
        assert names(tmp_path) == ["parts"]
    assert names(tmp_path) == ["a.txt", "parts"]
    assert names(tmp_path / "parts") == []


def test_a_draft_is_found_by_no_pattern_of_the_file(tmp_path):
    with files.whole(tmp_path / "a.json") as draft:
        draft.write_text("{}")
        assert list(tmp_path.glob("*.json")) == []


def test_what_a_killed_process_left_is_removed_a_day_later(tmp_path):
    old, recent, other = (tmp_path / name for name in (".a.x.tmp", ".a.y.tmp", ".b.x.tmp"))
    for path in (old, recent, other):
        path.write_text("half")
    for path in (old, other):
        os.utime(path, (time.time() - 90_000,) * 2)
    with files.whole(tmp_path / "a") as draft:
        draft.write_text("new")
    assert names(tmp_path) == [".a.y.tmp", ".b.x.tmp", "a"]


def test_room_is_checked_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=12_000))
    files.check_room(tmp_path, 12_000, what="a.txt", advice="Free some")
    message = rf"room for a\.txt: 12\.0 kB needed, 12\.0 kB free in {tmp_path}\. Free some$"
    with pytest.raises(OSError, match=message) as caught:
        files.check_room(tmp_path, 12_001, what="a.txt", advice="Free some")
    assert caught.value.errno == errno.ENOSPC
    error = files.no_room(tmp_path, 5, what="a.txt", advice="Free some", kept=2_000_000)
    assert f"5 bytes needed, 12.0 kB free in {tmp_path}; the 2.0 MB that arrived are" in str(error)


# ------------------------------------------------------------------------ several processes


def test_files_that_belong_together_appear_together_or_not_at_all(tmp_path):
    paths = [tmp_path / name for name in ("a", "b")]
    with files.together(*paths) as drafts:
        for draft in drafts:
            draft.write_text("old")
    with pytest.raises(ZeroDivisionError), files.together(*paths) as drafts:
        drafts[0].write_text("new"), 1 / 0
    assert [path.read_text() for path in paths] == ["old", "old"]
    assert names(tmp_path) == ["a", "b"]


ADD_ONE = """
import sys, time
from pathlib import Path
from smslib import files
path = Path(sys.argv[1])
for _ in range(20):
    with files.alone(path, path.touch):
        count = int(path.read_text() or 0)
        time.sleep(0.001)
        path.write_text(str(count + 1))
"""


def test_no_step_of_several_processes_is_lost(tmp_path):
    command = [sys.executable, "-c", ADD_ONE, str(tmp_path / "count")]
    for process in [subprocess.Popen(command) for _ in range(4)]:
        assert process.wait() == 0
    assert (tmp_path / "count").read_text() == "80"


def test_who_waited_for_a_file_that_was_moved_away_asks_for_its_successor(tmp_path, monkeypatch):
    """Else it would work on the file that the one before has finished and moved."""
    path, is_same, asked = tmp_path / "part", files._is, []

    def moved_once(handle, where):
        asked.append(os.fstat(handle).st_ino)
        if len(asked) == 1:
            os.replace(path, tmp_path / "done")
        return is_same(handle, where)

    monkeypatch.setattr(files, "_is", moved_once)
    with files.alone(path, path.touch):
        assert path.stat().st_ino == asked[1] != asked[0]
