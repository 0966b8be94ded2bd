"""Stored results: exact round trips, whole files or none, provenance that tells the truth."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

import smslib
from smslib import store

PROVENANCE = {"commit": "abc"}


def test_values_come_back_with_their_provenance(tmp_path):
    values = {"svae+.mcc": 0.9, "n_cells": 25_000, "what": "sVAE+", "seeds": [0, 1], "none": None}
    path = store.put("table1", values, root=tmp_path / "results", provenance=PROVENANCE)
    stored = store.get("table1", root=tmp_path / "results")
    assert path == tmp_path / "results" / "table1.json"
    assert dict(stored) == values
    assert stored["svae+.mcc"] == 0.9
    assert len(stored) == 5
    assert stored.provenance == PROVENANCE
    content = {"by_seed": {}, "values": values, "provenance": PROVENANCE}
    assert json.loads(path.read_text()) == content


def test_the_values_by_seed_are_written_and_what_follows_from_them_is_computed(tmp_path):
    scores = [0.25, 0.75, 0.875]
    values = {"other": 1.5} | store.over_seeds("svae+.mcc", scores)
    path = store.put("a", values, root=tmp_path, provenance=PROVENANCE)
    stored = store.get("a", root=tmp_path)
    assert json.loads(path.read_text())["by_seed"] == {"svae+.mcc": scores}
    assert json.loads(path.read_text())["values"] == {"other": 1.5}
    assert set(stored) == set(values)
    assert stored["svae+.mcc"] == scores
    assert stored["svae+.mcc.n"] == 3
    assert stored["svae+.mcc.mean"] == pytest.approx(0.625)
    assert stored["svae+.mcc.sd"] == pytest.approx(0.33072, rel=1e-4)
    ends = stats.ttest_1samp(scores, 0.0).confidence_interval(0.95)
    assert (stored["svae+.mcc.low"], stored["svae+.mcc.high"]) == pytest.approx(tuple(ends))


@pytest.mark.parametrize(
    "values",
    [
        {"mcc": 0.5, "mcc.n": 10},
        {"cells": [1, 2, 3], "cells.n": 10, "cells.mean": 99.0},
        {"cells": [1, 2, 3], "cells.n": 3},
        {"names": ["a", "b"], "names.n": 2},
        {"x": [[1.0], [2.0]], "x.n": 2, "x.mean": 1.5},
        {"x": [None, 2.0], "x.n": 2},
        {"x": [2.0], "x.mean": 2.0, "x.n": 1, "x.sd": 5.0},
        {"x": [1.0, 2.0], "x.n": 2, "x.mean": 1.5, "x.sd": 0.707107, "x.low": 0.0},
        {"x": [[1.0], [2.0, 3.0]], "x.n": 2},
    ],
)
def test_keys_that_look_like_values_by_seed_lose_nothing(tmp_path, values):
    store.put("a", values, root=tmp_path, provenance=PROVENANCE)
    assert dict(store.get("a", root=tmp_path)) == values


def test_one_seed_has_no_interval():
    assert store.over_seeds("x", np.array([2.0])) == {"x": [2.0], "x.mean": 2.0, "x.n": 1}


def test_files_do_not_depend_on_the_order_of_keys(tmp_path):
    forward = store.put("a", {"x": 1, "y": 2}, root=tmp_path, provenance=PROVENANCE)
    backward = store.put("b", {"y": 2, "x": 1}, root=tmp_path, provenance=PROVENANCE)
    assert forward.read_bytes() == backward.read_bytes()


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_keep_six_digits(value):
    kept = store.plain(value)
    assert kept == pytest.approx(value, rel=5e-6, abs=0)
    assert store.plain(kept) == kept


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float32(0.1), 0.1),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.array([[1.0, np.nan]]), [[1.0, None]]),
        (torch.tensor([1, 2]), [1, 2]),
        (float("inf"), None),
        ((1, "a"), [1, "a"]),
        ({1: (2.00000049,)}, {"1": [2.0]}),
        (12_345_678_901, 12_345_678_901),
    ],
)
def test_plain_values(value, expected):
    kept = store.plain(value)
    assert kept == expected
    assert type(kept) is type(expected)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(-1e6, 1e6) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(st.text(), json_values, max_size=4))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_lists_on_a_line_hold_what_they_held(tmp_path, payload):
    path = store.write_json(tmp_path / "a.json", payload)
    assert json.loads(path.read_text()) == payload


def test_a_list_is_a_line(tmp_path):
    path = store.write_json(tmp_path / "a.json", {"a": [1, 2.5], "b": [["x", "y"], [3]], "c": []})
    text = '{\n "a": [1,2.5],\n "b": [\n  ["x","y"],\n  [3]\n ],\n "c": []\n}\n'
    assert path.read_text() == text


# ---------------------------------------------------------------- whole files or none


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = store.write_text(tmp_path / "a.json", "old")

    def full_disk(_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        store.write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_refused_value_leaves_the_old_file(tmp_path):
    store.put("a", {"x": 1}, root=tmp_path, provenance=PROVENANCE)
    with pytest.raises(TypeError, match=r"cannot store <object object.*\(object\); expected numb"):
        store.put("a", {"x": object()}, root=tmp_path, provenance=PROVENANCE)
    assert store.get("a", root=tmp_path)["x"] == 1


# ---------------------------------------------------------------- provenance


def test_measure_times_and_describes_the_block():
    with store.measure(seeds=[3], command="make full") as provenance:
        assert "wall_seconds" not in provenance
        until = time.process_time() + 0.05
        while time.process_time() < until:
            pass
        time.sleep(0.1)
    assert 0.15 <= provenance["wall_seconds"] < 60
    assert 0.05 <= provenance["cpu_seconds"] < provenance["wall_seconds"]
    assert 10 < provenance["peak_memory_mb"] < 100_000
    assert provenance["seeds"] == [3]
    assert provenance["command"] == "make full"
    assert torch.__version__.startswith(provenance["torch"])  # its build may be told or not
    assert provenance["numpy"] == np.__version__
    assert provenance["threads"] == torch.get_num_threads()
    assert provenance["n_cpu"] == os.cpu_count()
    age = datetime.now().astimezone() - datetime.fromisoformat(provenance["date"])
    assert timedelta(-1) < age < timedelta(minutes=1)
    assert provenance["date"].endswith("+00:00")
    assert provenance["device"].strip()


def test_peak_memory_sees_a_large_array():
    """In a process of its own, whose peak is not yet high."""
    lines = [
        "from smslib import store",
        "with store.measure() as before: pass",
        "with store.measure() as after: bytearray(b'x') * 400_000_000",
        "print(after['peak_memory_mb'] - before['peak_memory_mb'])",
    ]
    command = [sys.executable, "-c", "\n".join(lines)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 200 < float(answer.stdout) < 600


def test_a_crash_is_measured_too():
    with pytest.raises(ZeroDivisionError), store.measure() as provenance:
        raise ZeroDivisionError
    assert provenance["wall_seconds"] >= 0


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A clean git repository in which the package pretends to live."""
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    monkeypatch.setattr(store, "__file__", str(tmp_path / "store.py"))
    for variable in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(variable)
    (tmp_path / "store.py").touch()

    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    return tmp_path, git


def test_provenance_names_the_commit_and_sees_changed_code(repository):
    folder, git = repository
    with store.measure() as clean:
        pass
    assert clean["commit"] == git("rev-parse", "HEAD")
    assert clean["dirty"] is False
    (folder / "results.json").touch()
    with store.measure() as with_results:
        pass
    assert with_results["dirty"] is False
    (folder / "deeper").mkdir()
    (folder / "deeper" / "new.py").touch()
    with store.measure() as changed:
        pass
    assert changed["dirty"] is True


def test_in_a_repository_of_something_else_there_is_no_commit(repository, monkeypatch):
    folder, _ = repository
    (folder / "unpacked").mkdir()
    (folder / "unpacked" / "store.py").touch()
    monkeypatch.setattr(store, "__file__", str(folder / "unpacked" / "store.py"))
    with store.measure() as provenance:
        pass
    assert provenance["commit"] is None
    assert provenance["dirty"] is False


def test_outside_git_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(store, "__file__", str(tmp_path / "store.py"))
    with store.measure() as provenance:
        pass
    assert provenance["commit"] is None
    assert provenance["dirty"] is False


def test_without_git_there_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with store.measure() as provenance:
        pass
    assert provenance["commit"] is None


def test_versions_are_of_installed_packages_and_of_the_smslib_that_runs(monkeypatch):
    def absent(name):
        raise store.PackageNotFoundError(name)

    monkeypatch.setattr(store, "version", absent)
    with store.measure() as provenance:
        pass
    assert provenance["torch"] is None
    assert provenance["smslib"] == smslib.__version__


def test_a_gpu_is_named_and_its_memory_counted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"model of {device}")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 5e8)
    with store.measure(device="cuda:1") as provenance:
        pass
    assert provenance["device"] == "model of cuda:1"
    assert provenance["peak_memory_mb"] == 500


def test_without_proc_python_answers(monkeypatch):
    with store.measure() as linux:
        pass
    monkeypatch.setattr(Path, "exists", lambda _: False)
    monkeypatch.setattr(store.platform, "processor", lambda: "a processor")
    with store.measure() as provenance:
        pass
    assert provenance["device"] == "a processor"
    assert provenance["peak_memory_mb"] >= 0.5 * linux["peak_memory_mb"]


# ---------------------------------------------------------------- errors


def test_unknown_names_list_the_nearest(tmp_path):
    store.put("table1", {"svae+.mcc": 1}, root=tmp_path, provenance=PROVENANCE)
    with pytest.raises(KeyError, match=r"no experiment 'tabel1' .*; nearest known: \['table1'\]"):
        store.get("tabel1", root=tmp_path)
    with pytest.raises(KeyError, match=r"no 'svae\.mcc' in 'table1'; nearest .*'svae\+\.mcc'\]"):
        store.get("table1", root=tmp_path)["svae.mcc"]
    with pytest.raises(KeyError, match=r"no 'zzz' in 'table1'; known: \['svae\+\.mcc'\]"):
        store.get("table1", root=tmp_path)["zzz"]


def test_results_need_provenance_and_a_flat_dict(tmp_path):
    with pytest.raises(ValueError, match=r"'a' comes without provenance; compute it inside `with"):
        store.put("a", {"x": 1}, root=tmp_path, provenance={})
    with pytest.raises(ValueError, match=r"nested under \['svae\+'\]; expected a flat dict"):
        store.put("a", {"svae+": {"mcc": 1}}, root=tmp_path, provenance=PROVENANCE)


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "a.json")) + " is not JSON"):
        store.get("a", root=tmp_path)
