"""Sweeps: counting, naming, resuming, surviving crashes, on any executor."""

import argparse
import gzip
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from killing.tasks import device_of_worker, double, fragile, lightly, suicide
from pyarrow import parquet

from smslib import store, sweep


def never(config):
    raise AssertionError("ran a finished run again")


def mutate(config):
    config["nested"]["list"].append(1)
    return {"y": 0}


def repeat(config):
    return {"x": 1}


STUDY = sweep.axis("x", range(4))
TESTS = Path(__file__).parent

# ---------------------------------------------------------------- studies


def test_product_zip_and_chain_by_hand():
    letters, numbers = sweep.axis("a", "xy"), sweep.axis("b", [1, 2])
    assert sweep.product(letters, numbers) == [
        {"a": "x", "b": 1},
        {"a": "x", "b": 2},
        {"a": "y", "b": 1},
        {"a": "y", "b": 2},
    ]
    assert sweep.zip_(letters, numbers) == [{"a": "x", "b": 1}, {"a": "y", "b": 2}]
    assert sweep.chain(letters, numbers) == [{"a": "x"}, {"a": "y"}, {"b": 1}, {"b": 2}]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=4))
def test_sizes_of_studies(sizes):
    axes = [sweep.axis(str(index), range(size)) for index, size in enumerate(sizes)]
    expected = len(list(itertools.product(*map(range, sizes))))
    assert len(sweep.product(*axes)) == expected
    assert len(sweep.chain(*axes)) == sum(sizes)
    assert len(sweep.zip_(*[axis[: min(sizes)] for axis in axes])) == min(sizes)


def test_axes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"two axes set \['x'\]; expected each key in one axis"):
        sweep.product(STUDY, STUDY)
    with pytest.raises(ValueError, match=r"axes have \[4, 1\] configurations; zip_ expects equal"):
        sweep.zip_(STUDY, [{"y": 0}])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.text(max_size=5), JSON, max_size=5), st.randoms())
def test_run_id_ignores_the_order_of_keys_and_nothing_else(config, random):
    keys = list(config)
    random.shuffle(keys)
    name = sweep.run_id(config)
    assert sweep.run_id({key: config[key] for key in keys}) == name
    assert len(name) == 12
    for key in keys:
        assert sweep.run_id({**config, key: "another value"}) != name


def test_run_id_is_the_hash_of_compact_json():
    expected = hashlib.sha256(b'{"a":[1,2.5],"b":null}').hexdigest()[:12]
    assert sweep.run_id({"b": None, "a": [1, 2.5]}) == expected


@pytest.mark.parametrize("value", [object(), float("nan"), {1, 2}])
def test_run_id_refuses_what_is_not_json(value):
    with pytest.raises(TypeError, match=r"configuration .* is not plain JSON .*; use str, int"):
        sweep.run_id({"x": value})


# ---------------------------------------------------------------- runs


def test_a_run_is_a_file_with_config_result_and_provenance(tmp_path):
    config = {"x": 0.1234567890123, "seed": 4, "data_seed": 5}
    (job,) = sweep.run(double, [config], tmp_path)
    entry = store.read_json(job.result())
    assert job.result() == tmp_path / f"{sweep.run_id(config)}.json"
    # The configuration is exact, results have six digits.
    assert entry["config"] == config
    assert entry["result"] == {"double": 0.246914}
    assert entry["provenance"]["seeds"] == [4, 5]
    assert entry["provenance"]["command"].endswith("(killing.tasks.double)")
    assert entry["provenance"]["wall_seconds"] >= 0
    assert list(tmp_path.iterdir()) == [job.result()]


def test_finished_runs_are_not_run_again(tmp_path):
    assert len(sweep.run(double, STUDY[:2], tmp_path)) == 2
    assert len(sweep.run(double, [*STUDY, *STUDY], tmp_path)) == 2
    assert sweep.run(never, STUDY, tmp_path) == []


def test_an_integer_names_a_run(tmp_path):
    (job,) = sweep.run(double, STUDY, tmp_path, index=2)
    assert store.read_json(job.result())["config"] == STUDY[2]
    assert len(sweep.run(double, STUDY, tmp_path, index=range(1, 4))) == 2
    assert sorted(sweep.collect(tmp_path)["x"]) == [1, 2, 3]
    assert sweep.run(double, STUDY, tmp_path, index=[]) == []


@pytest.mark.parametrize("index", [4, -1, [0, 4]])
def test_an_index_outside_the_study_is_refused(tmp_path, index):
    with pytest.raises(
        IndexError, match=r"index (4|-1) is outside this study of 4 runs; expe.* 3"
    ):
        sweep.run(double, STUDY, tmp_path, index=index)
    assert list(tmp_path.iterdir()) == []


def test_an_index_is_an_integer(tmp_path):
    with pytest.raises(TypeError, match=r"index '1' names no run; expected an integer or intege"):
        sweep.run(double, STUDY, tmp_path, index=iter("17"))


@pytest.mark.parametrize("name", ["run_id", "provenance"])
def test_columns_of_the_record_are_reserved(tmp_path, name):
    with pytest.raises(ValueError, match=rf"the study sets \['{name}'\], columns of the record"):
        sweep.run(double, [{name: 1}], tmp_path)
    with pytest.warns(RuntimeWarning, match=rf"the result repeats \['{name}'\]"):
        sweep.run(lambda _: {name: 1}, STUDY[:1], tmp_path)


# ---------------------------------------------------------------- crashes


def test_a_crash_does_not_stop_the_others(tmp_path):
    with pytest.warns(
        RuntimeWarning, match=r"^2 runs crashed; first .*\.error \(ArithmeticError: "
    ):
        jobs = sweep.run(fragile, STUDY, tmp_path)
    assert [job.result() is None for job in jobs] == [False, True, False, True]
    assert sorted(sweep.collect(tmp_path)["half"]) == [0, 1]


def test_a_crash_is_recorded_with_its_configuration_and_traceback(tmp_path):
    with pytest.warns(RuntimeWarning, match="1 runs crashed"):
        sweep.run(fragile, STUDY, tmp_path, index=1)
    record = store.read_json(tmp_path / f"{sweep.run_id({'x': 1})}.error")
    assert record["config"] == {"x": 1}
    assert record["error"] == "ArithmeticError: 1 is odd"
    assert record["traceback"][0] == "Traceback (most recent call last):"
    assert record["traceback"][-1] == record["error"]
    assert any(line.endswith("in fragile") for line in record["traceback"])


def test_a_crashed_run_is_skipped_until_a_retry_is_asked_for(tmp_path):
    with pytest.warns(RuntimeWarning, match="2 runs crashed"):
        sweep.run(fragile, STUDY, tmp_path)
    told = r"^2 that crashed earlier were skipped; first .*\(ArithmeticError.*retry=True\) runs"
    with pytest.warns(RuntimeWarning, match=told):
        assert sweep.run(never, STUDY, tmp_path) == []
    assert len(sweep.run(double, STUDY, tmp_path, retry=True)) == 2
    assert not list(tmp_path.glob("*.error"))
    assert len(sweep.collect(tmp_path)) == 4


def test_new_crashes_and_old_ones_are_counted_apart(tmp_path):
    with pytest.warns(RuntimeWarning, match="^1 runs crashed"):
        sweep.run(fragile, STUDY[:2], tmp_path)
    with pytest.warns(
        RuntimeWarning, match="^1 runs crashed, 1 that crashed earlier were skipped"
    ):
        jobs = sweep.run(fragile, STUDY, tmp_path)
    assert len(jobs) == 2


def test_a_task_cannot_change_its_configuration(tmp_path):
    config = {"nested": {"list": []}}
    (job,) = sweep.run(mutate, [config], tmp_path)
    assert store.read_json(job.result())["config"] == config == {"nested": {"list": []}}


def test_a_result_may_not_shadow_the_configuration(tmp_path):
    with pytest.warns(RuntimeWarning, match=r"the result repeats \['x'\] of the configuration"):
        sweep.run(repeat, STUDY[:1], tmp_path)


@pytest.mark.parametrize(
    ("config", "result", "name"),
    [
        ({"a": {"b": 1}}, {"a.b": 2}, "a.b"),
        ({"a.b": 1}, {"a": {"b": 2}}, "a.b"),
        ({"a": {"b": 1}}, {"a": {"c": 2}}, "a"),
        ({}, {"a": {"b": 1}, "a.b": 2}, "a.b"),
        ({}, {"provenance.date": "today"}, "provenance.date"),
    ],
)
def test_a_result_may_not_share_a_column_either(tmp_path, config, result, name):
    with pytest.warns(RuntimeWarning, match=rf"the result repeats \['{name}'\] of the"):
        sweep.run(lambda _: result, [config], tmp_path)


def test_a_result_is_a_dict(tmp_path):
    with pytest.warns(RuntimeWarning, match="the task returned 1; expected a dict of results"):
        sweep.run(lambda _: 1, STUDY[:1], tmp_path)


# ---------------------------------------------------------------- executors


class Promise:
    """A job that is no future, as those of clusters: it runs when it is waited for."""

    def __init__(self, *call):
        self.call = call

    def result(self):
        function, *arguments = self.call
        return function(*arguments)


class Promising:
    """The least executor."""

    def submit(self, function, /, *arguments):
        return Promise(function, *arguments)


class Breaking:
    """An executor that breaks before the third run is submitted."""

    def __init__(self):
        self.left = 2

    def submit(self, function, /, *arguments):
        if not self.left:
            raise BrokenExecutor("a worker died")
        self.left -= 1
        return Promise(function, *arguments)


class Lost:
    """An executor whose jobs never start."""

    def submit(self, function, /, *arguments):
        return self

    def result(self):
        return None


def processes():
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(2, context, initializer=lightly)


@pytest.fixture(scope="module")
def pool():
    with processes() as executor:
        yield executor


@pytest.fixture
def threads():
    with ThreadPoolExecutor(2) as executor:
        yield executor


@pytest.fixture
def promising():
    return Promising()


@pytest.mark.parametrize("kind", ["pool", "threads", "promising"])
def test_whatever_submits_gives_the_same_files(tmp_path, kind, request):
    executor = request.getfixturevalue(kind)
    sweep.run(double, STUDY, tmp_path / "here")
    jobs = sweep.run(double, STUDY, tmp_path / "there", executor=executor)
    names = [tmp_path / "there" / f"{sweep.run_id(config)}.json" for config in STUDY]
    assert [job.result() for job in jobs] == names
    here, there = (sweep.collect(tmp_path / name)[["x", "double"]] for name in ("here", "there"))
    pd.testing.assert_frame_equal(here, there)


@pytest.mark.parametrize("kind", ["pool", "threads", "promising"])
def test_whatever_submits_records_crashes(tmp_path, kind, request):
    executor = request.getfixturevalue(kind)
    with pytest.warns(RuntimeWarning, match=r"2 runs crashed; .*\(ArithmeticError: . is odd\)"):
        jobs = sweep.run(fragile, STUDY, tmp_path, executor=executor)
    assert [job.result() is None for job in jobs] == [False, True, False, True]


def test_a_killed_worker_is_reported_and_the_rest_kept(tmp_path):
    with (
        processes() as executor,
        pytest.raises(RuntimeError, match=r"the executor lost \d of 4 runs, the first \w{12} "),
    ):
        sweep.run(suicide, STUDY[::-1], tmp_path, executor=executor)
    assert not (tmp_path / f"{sweep.run_id({'x': 3})}.json").exists()
    sweep.run(double, STUDY, tmp_path)
    assert sorted(sweep.collect(tmp_path)["double"]) == [0, 2, 4, 6]


def test_a_pool_that_breaks_while_runs_are_submitted_keeps_what_finished(tmp_path):
    told = (
        r"the executor lost 2 of 4 runs, the first \w{12} \(BrokenExecutor: a worker died\)\. A wo"
    )
    with pytest.raises(RuntimeError, match=told) as caught:
        sweep.run(double, STUDY, tmp_path, executor=Breaking())
    assert isinstance(caught.value.__cause__, BrokenExecutor)
    assert sorted(sweep.collect(tmp_path)["x"]) == [0, 1]


def test_a_task_that_cannot_travel_is_reported(tmp_path, pool):
    with pytest.raises(RuntimeError, match=r"lost 4 of 4 runs, .*Can't (get|pickle) .*lambda"):
        sweep.run(lambda _: {"y": 1}, STUDY, tmp_path, executor=pool)


def test_crashes_are_told_of_even_when_runs_are_lost(tmp_path):
    with (
        pytest.warns(RuntimeWarning, match="1 runs crashed"),
        pytest.raises(RuntimeError, match="lost 2 of 4 runs"),
    ):
        sweep.run(fragile, STUDY, tmp_path, executor=Breaking())


def test_without_waiting_jobs_are_handles(tmp_path):
    go = threading.Event()

    def held(config):
        assert go.wait(timeout=60)
        return {"y": 1}

    with ThreadPoolExecutor(1) as executor:
        (job,) = sweep.run(held, STUDY[:1], tmp_path, executor=executor, wait=False)
        assert sweep.collect(tmp_path).empty
        go.set()
        assert job.result().exists()


def test_a_crash_without_traceback_is_still_reported(tmp_path):
    with pytest.warns(RuntimeWarning, match="1 runs crashed; .*no traceback was written"):
        sweep.run(double, STUDY[:1], tmp_path, executor=Lost())


# ---------------------------------------------------------------- packs


class Counting(Promising):
    """An executor that remembers how many runs each of its jobs was given."""

    def __init__(self):
        self.sizes = []

    def submit(self, function, task, configs, root, /):
        self.sizes.append(len(configs) if isinstance(configs, list) else 1)
        return super().submit(function, task, configs, root)


@pytest.mark.parametrize(
    ("pack", "sizes"), [(1, [1] * 4), (3, [3, 1]), (2, [2, 2]), (4, [4]), (9, [4])]
)
def test_a_job_does_a_pack_of_runs(tmp_path, pack, sizes):
    executor = Counting()
    jobs = sweep.run(double, STUDY, tmp_path, executor=executor, pack=pack)
    assert executor.sizes == sizes
    names = [tmp_path / f"{sweep.run_id(config)}.json" for config in STUDY]
    assert [job.result() for job in jobs] == names
    assert sorted(sweep.collect(tmp_path)["double"]) == [0, 2, 4, 6]


def test_packs_are_cut_from_what_is_missing(tmp_path):
    sweep.run(double, STUDY, tmp_path, index=[0, 2])
    executor = Counting()
    sweep.run(double, STUDY, tmp_path, executor=executor, pack=2)
    assert executor.sizes == [2]


def test_a_crash_in_a_pack_does_not_stop_it(tmp_path):
    with pytest.warns(RuntimeWarning, match="2 runs crashed"):
        jobs = sweep.run(fragile, STUDY, tmp_path, executor=Promising(), pack=4)
    assert [job.result() is None for job in jobs] == [False, True, False, True]


def test_a_killed_pack_keeps_what_it_had_finished(tmp_path):
    told = r"the executor lost 1 of 4 runs, the first "
    with (
        processes() as executor,
        pytest.raises(RuntimeError, match=told + sweep.run_id({"x": 3})),
    ):
        sweep.run(suicide, STUDY, tmp_path, executor=executor, pack=4)
    assert sorted(sweep.collect(tmp_path)["x"]) == [0, 1, 2]
    executor = Counting()
    sweep.run(double, STUDY, tmp_path, executor=executor, pack=4)
    assert executor.sizes == [1]


def test_without_an_executor_packs_make_no_difference(tmp_path):
    jobs = sweep.run(double, STUDY, tmp_path, pack=3)
    assert [job.result().stem for job in jobs] == [sweep.run_id(config) for config in STUDY]


def test_a_pack_holds_something(tmp_path):
    with pytest.raises(ValueError, match="pack is 0; expected at least one run per job"):
        sweep.run(double, STUDY, tmp_path, pack=0)


# ---------------------------------------------------------------- one worker per GPU


def test_every_worker_sees_one_device_of_its_own(tmp_path):
    with sweep.gpu_workers(["3", "GPU-7f"]) as executor:
        jobs = [executor.submit(device_of_worker, tmp_path, 2) for _ in range(2)]
        assert {job.result() for job in jobs} == {"3", "GPU-7f"}


def test_the_devices_are_those_that_the_scheduler_left_visible(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, 2")
    with sweep.gpu_workers() as executor:
        assert executor._max_workers == 2
        assert executor.submit(os.getenv, "CUDA_VISIBLE_DEVICES").result() == "5"


def test_without_a_scheduler_the_devices_are_all_that_torch_counts(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with sweep.gpu_workers() as executor:
        assert executor._max_workers == 3


def test_a_device_named_twice_has_two_workers():
    with sweep.gpu_workers(["0", "0", "1"]) as executor:
        assert executor._max_workers == 3


def test_without_a_gpu_there_are_no_workers(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ValueError, match=r"no GPU is visible; expected at least one .*On CPUs"):
        sweep.gpu_workers()


# ---------------------------------------------------------------- the bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def draw_on_terminal(monkeypatch):
    """Called by tests themselves: pytest puts its own streams in place after fixtures."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def test_the_bar_starts_at_what_is_done_and_counts_crashes(tmp_path, monkeypatch):
    with pytest.warns(RuntimeWarning, match="1 runs crashed"):
        sweep.run(fragile, STUDY, tmp_path, index=[0, 1])
    terminal = draw_on_terminal(monkeypatch)
    with pytest.warns(RuntimeWarning, match="1 runs crashed, 1 that"):
        sweep.run(fragile, STUDY, tmp_path)
    drawn = terminal.getvalue().strip().split("\r")
    assert drawn[0].startswith("1 crashed:  50%")
    assert " 2/4 " in drawn[0]
    assert drawn[-1].startswith("2 crashed: 100%")
    assert " 4/4 " in drawn[-1]


def test_the_bar_advances_in_the_order_of_completion(tmp_path, monkeypatch, threads):
    terminal = draw_on_terminal(monkeypatch)

    def patient(config):
        """Let the first run wait until the second one shows."""
        until = time.monotonic() + (20 if config["x"] == 0 else 0.2)
        while "1/2" not in terminal.getvalue() and time.monotonic() < until:
            time.sleep(0.01)
        return {"shown": "1/2" in terminal.getvalue()}

    jobs = sweep.run(patient, STUDY[:2], tmp_path, executor=threads)
    shown = [store.read_json(job.result())["result"]["shown"] for job in jobs]
    assert shown == [True, False]


def test_a_log_gets_no_bar(tmp_path, capsys):
    sweep.run(double, STUDY, tmp_path)
    assert capsys.readouterr() == ("", "")


def test_without_waiting_there_is_no_bar(tmp_path, monkeypatch, threads):
    terminal = draw_on_terminal(monkeypatch)
    sweep.run(double, STUDY, tmp_path, executor=threads, wait=False)
    assert terminal.getvalue() == ""


# ---------------------------------------------------------------- kills


@pytest.fixture
def launch(tmp_path):
    """Start `killing.killed` in a session of its own; nothing of it outlives the test."""
    children = []
    environment = {**os.environ, "LOG": str(tmp_path / "log"), "PYTHONPATH": str(TESTS)}
    (tmp_path / "log").touch()

    def start(*arguments):
        command = [sys.executable, "-m", "killing.killed", *map(str, arguments)]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        children.append(
            subprocess.Popen(command, env=environment, start_new_session=True, **streams)
        )
        return children[-1]

    yield start
    for child in children:
        kill(child)


def kill(child):
    """Kill a child with all its workers, as a scheduler or a power cut does."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    child.communicate()


def succeed(child):
    _, errors = child.communicate(timeout=60)
    assert (child.returncode, errors) == (0, "")


def finished(root):
    """Return the runs on disk; raises if one is half written."""
    runs = sweep.collect(root)
    return set() if runs.empty else set(runs["x"])


def assert_whole(root):
    runs = sweep.collect(root)
    assert runs["run_id"].tolist() == sorted(sweep.run_id({"x": x}) for x in range(100))
    assert sorted(zip(runs["x"], runs["square"], strict=True)) == [(x, x * x) for x in range(100)]
    assert all(padding == [0.5] * 2000 for padding in runs["padding"])
    assert not list(root.glob("*.error"))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_study_killed_at_random_moments_resumes(tmp_path, launch, workers):
    root, log = tmp_path / "runs", tmp_path / "log"
    draw = random.Random(workers)
    for _ in range(8):
        before, seen = finished(root), len(log.read_text())
        child = launch("to_the_end", root, workers)
        n_runs = draw.randint(2, 8)
        while child.poll() is None and log.read_text()[seen:].count("\n") < n_runs:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.02))
        kill(child)
        assert before <= finished(root)
        assert before & {int(x) for x in log.read_text()[seen:].split()} == set()
    before, seen = finished(root), len(log.read_text())
    assert 8 <= len(before) < 100  # the kills fell into the study
    succeed(launch("to_the_end", root, workers))
    assert sorted(int(x) for x in log.read_text()[seen:].split()) == sorted(
        set(range(100)) - before
    )
    assert_whole(root)


def test_a_study_killed_at_any_line_resumes(tmp_path, launch):
    """Every line of sweep, store and files, those between opening and renaming a file too."""
    child = launch("at_every_line", tmp_path / "runs")
    output, errors = child.communicate(timeout=120)
    assert (child.returncode, errors) == (0, "")
    told = json.loads(output)
    assert told["lines"] > 100
    assert told["drafts"] > 5


def test_two_processes_may_work_in_one_folder(tmp_path, launch):
    root = tmp_path / "runs"
    children = [launch("to_the_end", root, workers) for workers in (0, 2)]
    while any(child.poll() is None for child in children):
        finished(root)
        time.sleep(0.02)
    for child in children:
        succeed(child)
    assert_whole(root)
    assert not list(root.glob(".*"))


def test_workers_that_outlive_their_parent_do_no_harm(tmp_path, launch):
    root, log = tmp_path / "runs", tmp_path / "log"
    orphaned = launch("to_the_end", root, 2)
    while not log.read_text():
        time.sleep(0.002)
    orphaned.kill()
    succeed(launch("to_the_end", root, 0))
    assert_whole(root)


# ---------------------------------------------------------------- collect


def test_collect_is_tidy(tmp_path):
    study = sweep.product([{"train": {"epochs": 2}}], STUDY)
    sweep.run(double, study, tmp_path)
    frame = sweep.collect(tmp_path)
    assert len(frame) == 4
    assert frame["run_id"].is_monotonic_increasing
    assert (frame["double"] == 2 * frame["x"]).all()
    assert (frame["train.epochs"] == 2).all()
    assert (frame["provenance.cpu_seconds"] >= 0).all()


def test_dicts_without_keys_are_collected_and_gathered(tmp_path):
    """Which parquet cannot hold."""
    result = {"found": {}, "parts": [{}], "n": {"x": 1, "y": {}}}
    sweep.run(lambda _: result, [{"seed": 0, "options": {}}], tmp_path / "runs")
    collected = sweep.collect(tmp_path / "runs")
    gathered = sweep.read(sweep.gather(tmp_path / "runs", tmp_path / "all.parquet"))
    values = {"seed": 0, "options": {}, "found": {}, "parts": [{}], "n.x": 1, "n.y": {}}
    for frame in (collected, gathered):
        assert {name: frame[name][0] for name in frame if name in values} == values


def test_collect_names_a_broken_file(tmp_path):
    (tmp_path / "abc.json").write_text("")
    with pytest.raises(ValueError, match=r"abc\.json is not JSON .*; delete it and compute it ag"):
        sweep.collect(tmp_path)


def test_collect_names_a_file_that_is_no_run(tmp_path):
    store.put("abc", {"x": 1}, root=tmp_path, provenance={"commit": "def"})
    with pytest.raises(ValueError, match=r"abc\.json is not a run; expected config, result and"):
        sweep.collect(tmp_path)


# ---------------------------------------------------------------- one file for all


def test_a_bundle_stands_for_the_runs_it_holds(tmp_path):
    sweep.run(double, STUDY[:3], tmp_path)
    before, files = sweep.collect(tmp_path), sorted(tmp_path.glob("*.json"))
    path = sweep.bundle(tmp_path)
    assert list(tmp_path.iterdir()) == [path]
    pd.testing.assert_frame_equal(sweep.collect(tmp_path), before)
    assert sweep.run(never, STUDY[:3], tmp_path) == []  # nothing is missing
    lines = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    assert [line["run_id"] for line in lines] == [file.stem for file in files]
    read = pd.read_json(path, lines=True)
    assert [result["double"] for result in read["result"]] == before["double"].tolist()


def test_a_bundle_takes_later_runs_in(tmp_path):
    sweep.run(double, STUDY[:2], tmp_path / "grown")
    sweep.bundle(tmp_path / "grown")
    sweep.run(double, STUDY, tmp_path / "grown")
    assert len(list((tmp_path / "grown").glob("*.json"))) == len(STUDY) - 2
    grown = sweep.collect(tmp_path / "grown")
    assert sorted(grown["x"]) == sorted(config["x"] for config in STUDY)
    sweep.bundle(tmp_path / "grown")
    pd.testing.assert_frame_equal(sweep.collect(tmp_path / "grown"), grown)


def test_the_same_runs_give_the_same_bundle(tmp_path):
    sweep.run(double, STUDY, tmp_path)
    shutil.copytree(tmp_path, tmp_path / "again")
    first, second = sweep.bundle(tmp_path), sweep.bundle(tmp_path / "again")
    assert first.read_bytes() == second.read_bytes() == sweep.bundle(tmp_path).read_bytes()


def test_a_run_of_its_own_counts_before_that_of_the_bundle(tmp_path):
    sweep.run(double, STUDY[:1], tmp_path)
    (file,) = tmp_path.glob("*.json")
    entry = store.read_json(file)
    sweep.bundle(tmp_path)
    store.write_json(file, entry | {"result": {"double": -1}})
    assert sweep.collect(tmp_path)["double"].tolist() == [-1]
    sweep.bundle(tmp_path)
    assert sweep.collect(tmp_path)["double"].tolist() == [-1]


def test_a_failed_bundle_leaves_the_runs(tmp_path, monkeypatch):
    sweep.run(double, STUDY, tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.setattr(store, "write_bytes", mock.Mock(side_effect=OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        sweep.bundle(tmp_path)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_only_runs_are_bundled(tmp_path):
    with pytest.raises(ValueError, match="no finished run"):
        sweep.bundle(tmp_path)
    path = store.put("abc", {"x": 1}, root=tmp_path, provenance={"commit": "def"})
    with pytest.raises(ValueError, match=r"abc\.json is not a run"):
        sweep.bundle(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", gzip.compress(b"{"), gzip.compress(b"[1]\n"), gzip.compress(b"{}\n")],
    ids=["empty", "plain", "no JSON", "no object", "no name"],
)
def test_a_spoiled_bundle_is_named(tmp_path, content):
    (tmp_path / "runs.jsonl.gz").write_bytes(content)
    for call in (sweep.collect, sweep.bundle, lambda root: sweep.run(double, STUDY, root)):
        with pytest.raises(ValueError, match=r"runs\.jsonl\.gz is not a bundle of runs"):
            call(tmp_path)


def test_a_bundle_cut_short_is_named(tmp_path):
    sweep.run(double, STUDY, tmp_path)
    path = sweep.bundle(tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"runs\.jsonl\.gz is not a bundle of runs"):
        sweep.collect(tmp_path)


def same(left, right):
    """Compare cells of two tables: missing is missing, True is not 1, 1 is 1.0."""
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    if left is None or left != left:
        return right is None or right != right
    is_bool = [isinstance(value, bool | np.bool_) for value in (left, right)]
    return is_bool[0] == is_bool[1] and left == right


def assert_same(left, right):
    assert list(left) == list(right)
    assert len(left) == len(right)
    for name in left:
        assert all(map(same, left[name], right[name])), (left[name].tolist(), right[name].tolist())


CELLS = JSON | st.text(max_size=3) | st.integers(-3, 3) | st.floats(0, 1)
ENTRIES = st.fixed_dictionaries(
    {
        "config": st.dictionaries(st.sampled_from("abc"), CELLS),
        "result": st.dictionaries(st.sampled_from("de"), CELLS)
        | st.fixed_dictionaries({"f": st.dictionaries(st.sampled_from("gh"), CELLS)}),
        "provenance": st.just({"seeds": [0, 1], "commit": "abc", "wall_seconds": 0.5}),
    }
)


@settings(max_examples=60)
@given(st.lists(ENTRIES, min_size=1, max_size=4))
def test_a_gathered_table_is_the_collected_one(entries):
    with tempfile.TemporaryDirectory() as folder:
        for number, entry in enumerate(entries):
            store.write_json(f"{folder}/runs/{number}.json", entry)
        path = sweep.gather(f"{folder}/runs", f"{folder}/all.parquet")
        collected, gathered = sweep.collect(f"{folder}/runs"), sweep.read(path)
    assert_same(gathered, collected)
    for number, entry in enumerate(entries):  # and the table holds what was put
        for key, value in entry["config"].items():
            assert same(gathered[key][number], value)


def test_a_study_goes_through_parquet(tmp_path):
    study = sweep.chain(
        [{"alpha": 40, "replicates": ["a", "b"]}, {"alpha": "auto", "replicates": []}],
        [{"alpha": 2.5, "replicates": ["c"], "x": 1}],
    )
    sweep.run(lambda config: {"gates": [0.5, 1.0], "n": 3}, study, tmp_path / "runs")
    path = sweep.gather(tmp_path / "runs", tmp_path / "deep" / "all.parquet")
    assert path == tmp_path / "deep" / "all.parquet"
    runs = sweep.read(path)
    assert_same(runs, sweep.collect(tmp_path / "runs"))
    assert sorted(map(str, runs["alpha"])) == ["2.5", "40", "auto"]
    assert list(path.parent.iterdir()) == [path]


def test_any_reader_of_parquet_sees_native_columns_and_json_text(tmp_path):
    study = sweep.axis("alpha", [40, "auto"])
    sweep.run(lambda _: {"gates": [0.5, 1.0], "n": 3, "ok": True}, study, tmp_path)
    table = parquet.read_table(sweep.gather(tmp_path, tmp_path / "all.parquet"))
    kinds = {field.name: str(field.type) for field in table.schema}
    names = ("run_id", "n", "ok", "provenance.cpu_seconds", "alpha")
    assert [kinds[name] for name in names] == ["string", "int64", "bool", "double", "string"]
    assert kinds["gates"].startswith("list<")
    assert sorted(table["alpha"].to_pylist()) == ['"auto"', "40"]


def test_a_failed_gathering_leaves_the_old_file(tmp_path, monkeypatch):
    sweep.run(double, STUDY, tmp_path / "runs")
    path = sweep.gather(tmp_path / "runs", tmp_path / "all.parquet")
    before = path.read_bytes()

    def full_disk(_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        sweep.gather(tmp_path / "runs", path)
    assert path.read_bytes() == before


def test_there_must_be_something_to_gather(tmp_path):
    with pytest.raises(ValueError, match=r"no finished run in .*; expected <run_id>\.json files"):
        sweep.gather(tmp_path, tmp_path / "all.parquet")


def test_without_pyarrow_the_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for function in (lambda: sweep.gather(tmp_path, "a.parquet"), lambda: sweep.read("a.parquet")):
        with pytest.raises(ImportError, match=r"needs pyarrow, .*pip install 'smslib\[data\]'"):
            function()


# ---------------------------------------------------------------- cost


def test_cost_adds_time_and_keeps_the_worst(tmp_path):
    measured = {"python": "3", "torch": "2", "numpy": "2", "smslib": "0", "device": "a"}
    measured |= {"n_cpu": 2, "threads": 1, "wall_seconds": 20.0, "cpu_seconds": 10.0}
    for seed, (commit, dirty, megabytes) in enumerate(
        [("abc", False, 1000.0), ("def", True, 3000.0), ("abc", False, 2000.0)]
    ):
        changing = {"commit": commit, "dirty": dirty, "peak_memory_mb": megabytes}
        entry = {"config": {"seed": seed % 2, "x": seed}, "result": {}}
        provenance = measured | changing | {"date": f"2026-01-0{seed + 1}"}
        store.write_json(tmp_path / f"{seed}.json", entry | {"provenance": provenance})
    total = sweep.cost(sweep.collect(tmp_path), "make bench")
    assert (total["wall_seconds"], total["cpu_seconds"], total["n_runs"]) == (60.0, 30.0, 3)
    assert (total["peak_memory_mb"], total["date"]) == (3000.0, "2026-01-03")
    assert (total["dirty"], total["commit"], total["seeds"]) == (True, "abc, def", [0, 1])
    assert (total["device"], total["n_cpu"], total["command"]) == ("a", "2", "make bench")


# ------------------------------------------------------------------------------- command lines


def options_of(*options):
    parser = argparse.ArgumentParser()
    sweep.add_arguments(parser)
    return parser.parse_args(options)


def threads_used(config):
    return {"threads": torch.get_num_threads()}


def test_the_options_of_a_command():
    assert vars(options_of()) == {
        **{"results": Path("book/results"), "workers": 2, "retry": False},
        **{"index": None, "part": None, "bundle": False},
    }
    assert options_of("--index", "3", "--retry").index == 3


def test_workers_are_single_threaded_processes(tmp_path):
    sweep.run_in_processes(threads_used, STUDY[:2], tmp_path, options_of("--workers", "1"))
    assert sweep.collect(tmp_path)["threads"].tolist() == [1, 1]


@pytest.mark.parametrize("n_parts", [1, 3, 9])
def test_the_parts_of_a_study_are_all_of_it(tmp_path, monkeypatch, n_parts):
    parts = []
    monkeypatch.setattr(sweep, "run", lambda *_, index, **__: parts.append(list(index)))
    for i in range(n_parts):
        given = options_of("--part", f"{i}/{n_parts}")
        sweep.run_in_processes(threads_used, sweep.axis("x", range(7)), tmp_path, given)
    assert sorted(itertools.chain(*parts)) == list(range(7))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("text", ["3/3", "1/-3", "2", "a/b", "/"])
def test_a_part_is_one_of_some(text, capsys):
    with pytest.raises(SystemExit):
        options_of("--part", text)
    assert "is no part of a study; expected I/N with I from 0 to N - 1" in capsys.readouterr().err


def test_without_workers_nothing_runs(tmp_path):
    sweep.run_in_processes(threads_used, STUDY, tmp_path, options_of("--workers", "0"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_command_may_end_in_a_bundle(tmp_path, workers):
    sweep.run(threads_used, STUDY[:1], tmp_path)
    given = options_of("--workers", workers, "--bundle")
    sweep.run_in_processes(threads_used, STUDY[:2], tmp_path, given)
    assert [file.name for file in tmp_path.iterdir()] == ["runs.jsonl.gz"]
    assert len(sweep.collect(tmp_path)) == 1 + int(workers)


def test_a_study_is_concluded_from_its_own_runs(tmp_path):
    study = [{"seed": 0, "x": x} for x in range(3)]
    sweep.run(double, [*study[:2], {"seed": 0, "x": 99}], tmp_path / "runs")
    options = {"root": tmp_path / "runs", "results": tmp_path, "command": "make it"}
    sweep.conclude("doubles", study, lambda runs: {"sum": int(runs["double"].sum())}, **options)
    stored = store.get("doubles", root=tmp_path)
    assert stored["sum"] == 2
    assert (stored.provenance["n_runs"], stored.provenance["n_missing"]) == (2, 1)
    assert stored.provenance["command"] == "make it"


def test_a_study_without_runs_has_no_conclusion(tmp_path):
    options = {"root": tmp_path, "results": tmp_path, "command": "make it"}
    with pytest.raises(FileNotFoundError, match="no finished run of doubles in .*--workers 1"):
        sweep.conclude("doubles", [{"seed": 0}], dict, **options)
