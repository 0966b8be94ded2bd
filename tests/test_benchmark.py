"""The benchmark: which runs it asks for, what a run returns, and how runs are summarised."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest

from smslib import benchmark, store, sweep

TINY = {
    "as_released": True,
    "n_cells": 10,
    "n_latent": 3,
    "recipe": "smslib",
    "method": "svae+",
    "seed": 0,
    "max_epochs": 2,
}


def provenance(seconds, **other):
    return {
        "python": "3.11",
        "torch": "2",
        "numpy": "2",
        "smslib": "0",
        "device": "cpu",
        "n_cpu": 2,
        "threads": 1,
        "commit": "abc",
        "dirty": False,
        "date": "2026-01-01",
        "wall_seconds": seconds,
        "cpu_seconds": seconds / 2,
        "peak_memory_mb": 100 * seconds,
    } | other


def entry(method, seed, mcc, seconds, **other):
    config = {"method": method, "recipe": "paper", "seed": seed, "n_cells": 5}
    result = {"mcc": mcc, "epochs": 3 + seed}
    return {"config": config, "result": result, "provenance": provenance(seconds, **other)}


ENTRIES = [
    entry("svae+", 1, 0.5, 10.0),
    entry("svae+", 0, 0.9, 20.0, date="2026-02-01", commit="def", dirty=True),
    entry("vae", 0, 0.1, 30.0),
]


@pytest.fixture
def folder(tmp_path):
    for number, run in enumerate(ENTRIES):
        store.write_json(tmp_path / f"{number}.json", run)
    return tmp_path


# ---------------------------------------------------------------- studies


def test_headline_is_five_seeds_of_one_setting():
    study = benchmark.STUDIES["headline"]()
    assert [config.pop("seed") for config in study] == list(range(5))
    assert study == 5 * [
        {"as_released": True, "n_cells": 250, "recipe": "smslib", "method": "svae+"}
    ]


def test_table1_has_every_method_in_both_recipes():
    study = benchmark.STUDIES["table1"]()
    found = {(config["recipe"], config["method"]) for config in study}
    methods = ("vae", "beta-vae", "ivae", "svae", "svae+")
    assert found == {(recipe, m) for recipe in ("paper", "smslib") for m in methods}
    assert {config["n_cells"] for config in study} == {500}


@pytest.mark.parametrize("method", ["svae+", "ivae"])
def test_compared_methods_have_five_seeds(method):
    study = benchmark.STUDIES["table1"]()
    seeds = {c["seed"] for c in study if (c["recipe"], c["method"]) == ("paper", method)}
    assert seeds == set(range(5))


# ---------------------------------------------------------------- one run


@pytest.fixture(scope="module")
def result():
    return benchmark.recover(TINY)


def test_a_run_returns_every_score_it_promises(result):
    graph = {"precision", "recall", "f1", "average_precision", "shd", "n_edges"}
    promised = {"mcc", "mcc_spearman", "mcc_within", "r2", "r2_cv", *graph}
    promised |= {f"signed_{name}" for name in graph}
    promised |= {"i_nll", "validation_elbo", "epochs", "fit_cpu_seconds"}
    assert set(result) == promised
    assert result["epochs"] == 2
    assert all(math.isfinite(value) for value in result.values())


def test_bounds_have_their_signs(result):
    assert result["i_nll"] > 0 > result["validation_elbo"]
    assert 0 <= result["mcc"] <= 1


def test_a_run_is_a_function_of_its_configuration(result):
    again = benchmark.recover(TINY)
    del again["fit_cpu_seconds"]
    assert again == {name: result[name] for name in again}


def test_shift_free_methods_are_given_a_graph_of_two_edges_per_target():
    found = benchmark.recover(TINY | {"method": "vae", "max_epochs": 1})
    assert found["n_edges"] == 2 * benchmark.N_TRAINED


# ---------------------------------------------------------------- summaries


def test_summary_by_hand(folder):
    values = benchmark.summarise(sweep.collect(folder))
    assert values["paper.svae+.seeds"] == [0, 1]
    assert values["paper.svae+.mcc"] == [0.9, 0.5]
    assert values["paper.svae+.mcc.mean"] == pytest.approx(0.7)
    assert values["paper.svae+.mcc.sd"] == pytest.approx(0.4 / math.sqrt(2))
    assert values["paper.vae.epochs"] == [3]
    assert values["paper.vae.mcc.sd"] is None


def test_summary_holds_scores_only(folder):
    values = benchmark.summarise(sweep.collect(folder))
    scores = {key.split(".")[2] for key in values}
    assert scores == {"seeds", "mcc", "epochs"}


def test_cost_adds_time_and_keeps_the_worst(folder):
    total = benchmark.cost(sweep.collect(folder), "make bench")
    assert (total["wall_seconds"], total["cpu_seconds"], total["n_runs"]) == (60.0, 30.0, 3)
    assert (total["peak_memory_mb"], total["date"]) == (3000.0, "2026-02-01")
    assert (total["dirty"], total["commit"], total["seeds"]) == (True, "abc, def", [0, 1])
    assert total["command"] == "make bench"


def test_the_command_line_summarises_what_is_there(tmp_path):
    for number, run in enumerate(ENTRIES):
        store.write_json(tmp_path / "runs" / "headline" / f"{number}.json", run)
    assert benchmark.main(["headline", "--results", str(tmp_path), "--workers", "0"]) == 0
    stored = store.get("headline", root=tmp_path)
    assert stored["paper.svae+.mcc.mean"] == pytest.approx(0.7)
    assert stored.provenance["n_runs"] == 3


def instant(config):
    return {"mcc": 1.0 if config["seed"] else 0.0}


def test_the_command_line_runs_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "recover", instant)
    monkeypatch.setattr(
        benchmark, "ProcessPoolExecutor", lambda n, *_, **__: ThreadPoolExecutor(n)
    )
    root = tmp_path / "runs" / "headline"
    sweep.run(instant, benchmark.STUDIES["headline"]()[:2], root)
    assert benchmark.main(["headline", "--results", str(tmp_path), "--workers", "1"]) == 0
    stored = store.get("headline", root=tmp_path)
    assert stored["smslib.svae+.seeds"] == [0, 1, 2, 3, 4]
    assert stored["smslib.svae+.mcc.mean"] == pytest.approx(0.8)


def test_an_unknown_experiment_is_refused(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["tabel1"])
    assert "invalid choice: 'tabel1'" in capsys.readouterr().err
