"""Sweeps: counting, naming, resuming, surviving crashes, on any executor."""

import hashlib
import itertools
import multiprocessing
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smslib import store, sweep


def double(config):
    """A task that a process pool can import."""
    return {"double": 2 * config["x"]}


def fragile(config):
    """Crash on odd numbers."""
    if config["x"] % 2:
        raise ArithmeticError(f"{config['x']} is odd")
    return {"half": config["x"] // 2}


def never(config):
    raise AssertionError("ran a finished run again")


def mutate(config):
    config["nested"]["list"].append(1)
    return {"y": 0}


def repeat(config):
    return {"x": 1}


STUDY = sweep.axis("x", range(4))

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
    assert entry["provenance"]["command"].endswith("test_sweep.double)")
    assert entry["provenance"]["wall_seconds"] >= 0
    assert list(tmp_path.iterdir()) == [job.result()]


def test_finished_runs_are_not_run_again(tmp_path):
    assert len(sweep.run(double, STUDY[:2], tmp_path)) == 2
    assert len(sweep.run(double, [*STUDY, *STUDY], tmp_path)) == 2
    assert sweep.run(never, STUDY, tmp_path) == []


def test_a_crash_does_not_stop_the_others(tmp_path):
    with pytest.warns(RuntimeWarning, match=r"2 of 4 runs crashed; first .*\.error \(Arithmetic"):
        jobs = sweep.run(fragile, STUDY, tmp_path)
    assert [job.result() is None for job in jobs] == [False, True, False, True]
    assert sorted(sweep.collect(tmp_path)["half"]) == [0, 1]
    traceback = (tmp_path / f"{sweep.run_id({'x': 1})}.error").read_text()
    assert "ArithmeticError: 1 is odd" in traceback
    assert "in fragile" in traceback


def test_a_crashed_run_is_retried_and_its_traceback_removed(tmp_path):
    with pytest.warns(RuntimeWarning, match="2 of 4 runs crashed"):
        sweep.run(fragile, STUDY, tmp_path)
    assert len(sweep.run(double, STUDY, tmp_path)) == 2
    assert not list(tmp_path.glob("*.error"))


def test_a_task_cannot_change_its_configuration(tmp_path):
    config = {"nested": {"list": []}}
    (job,) = sweep.run(mutate, [config], tmp_path)
    assert store.read_json(job.result())["config"] == config == {"nested": {"list": []}}


def test_a_result_may_not_shadow_the_configuration(tmp_path):
    with pytest.warns(RuntimeWarning, match=r"the result repeats \['x'\] of the configuration"):
        sweep.run(repeat, STUDY[:1], tmp_path)


def test_processes_give_the_same_files(tmp_path):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        sweep.run(double, STUDY, tmp_path / "pool", executor=executor)
    sweep.run(double, STUDY, tmp_path / "here")
    pool, here = (sweep.collect(tmp_path / name)[["x", "double"]] for name in ("pool", "here"))
    pd.testing.assert_frame_equal(pool, here)


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
    class Lost:
        """An executor whose jobs never start."""

        def submit(self, function, /, *arguments):
            return self

        def result(self):
            return None

    with pytest.warns(RuntimeWarning, match="1 of 1 runs crashed; .*no traceback was written"):
        sweep.run(double, STUDY[:1], tmp_path, executor=Lost())


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


def test_collect_names_a_broken_file(tmp_path):
    (tmp_path / "abc.json").write_text("")
    with pytest.raises(ValueError, match=r"abc\.json is not JSON .*; delete it and compute it ag"):
        sweep.collect(tmp_path)
