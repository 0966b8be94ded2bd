"""The benchmark: what a run returns, how runs are summarised, and what the command line does."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch

from smslib import benchmark, ceilings, recipes, simulate, store, sweep

TINY = {"arm": "smslib", "method": "svae+", "seed": 0, "n_cells": 8, "n_latent": 3}
SHORT = TINY | {"max_epochs": 2}
LATENTS = {"mcc", "mcc_spearman", "mcc_within", "r2", "r2_cv"} | {
    f"dci_{part}" for part in ("disentanglement", "completeness")
}
GRAPH = {"precision", "recall", "f1", "average_precision", "shd", "n_edges"}
TRANSFER = {"i_nll", "floor", "i_nll_gap", "mcc_new"}
FIT = {"epochs", "fit_cpu_seconds", "validation_elbo"}
GATES = {"calibration", "brier"}
RELEASED = {"released_precision", "released_recall", "released_f1"}


@pytest.fixture(autouse=True, scope="module")
def few_draws():
    """Bounds of few draws: the tests look at what is there, not at how tight it is."""
    with pytest.MonkeyPatch.context() as patch:
        bound = benchmark.iwelbo
        patch.setattr(benchmark, "iwelbo", lambda *args, **_: bound(*args, n_draws=5))
        patch.setattr(benchmark, "_ORACLE_CELLS", 2)
        yield


@pytest.fixture(scope="module")
def result():
    return benchmark.recover(SHORT)


# ---------------------------------------------------------------- runs


def test_a_run_returns_finite_scores_of_every_kind(result):
    signed = {f"signed_{name}" for name in GRAPH}
    assert set(result) == LATENTS | GRAPH | signed | RELEASED | GATES | TRANSFER | FIT
    assert all(math.isfinite(value) for value in result.values())


def test_new_cells_are_scored_against_their_own_latents(monkeypatch):
    """Their true latents, given out as the model's, must match themselves and nothing else."""
    plan = {**benchmark.ARMS["smslib"], **SHORT}
    screen = benchmark._screen(plan)
    names = screen.design.conditions[-20:]
    rows = torch.isin(screen.cells.condition, screen.design.index(names))
    monkeypatch.setattr(benchmark, "latents", lambda *_: screen.z[rows].numpy())
    trained = benchmark._trained(screen)
    model, _ = recipes.build(trained.cells, trained.design, n_latent=screen.z.shape[1])
    assert benchmark._transfer_scores(model, screen)["mcc_new"] == pytest.approx(1.0)


def test_bounds_have_their_signs(result):
    assert result["i_nll"] > 0 > result["validation_elbo"]
    assert 0 <= result["mcc"] <= 1


def test_a_run_is_a_function_of_its_configuration(result):
    again = benchmark.recover(SHORT)
    del again["fit_cpu_seconds"]
    assert again == {name: result[name] for name in again}


def test_the_weights_have_a_seed_of_their_own(result):
    other = benchmark.recover(SHORT | {"init_seed": 1})
    assert other["floor"] == result["floor"]
    assert other["mcc"] != result["mcc"]


@pytest.mark.parametrize("method", ["vae", "beta-vae"])
def test_methods_without_shifts_have_no_graph(method):
    assert set(benchmark.recover(SHORT | {"method": method})) == LATENTS | TRANSFER | FIT


def test_ivae_is_given_two_edges_per_target():
    found = benchmark.recover(SHORT | {"method": "ivae"})
    assert found["n_edges"] == 2 * 80
    assert not GATES & set(found)


def test_the_released_arm_is_scored_by_both_transfer_steps(monkeypatch):
    seen = {}
    protocol = benchmark.transfer.protocol

    def spy(*args, **options):
        seen.update(options)
        return protocol(*args, **options, n_draws=5)

    monkeypatch.setattr(benchmark.transfer, "protocol", spy)
    found = benchmark.recover(SHORT | {"arm": "released", "method": "ivae", "max_epochs": 1})
    steps = ("i_nll", "i_nll_unrefitted", "i_nll_frozen", "i_nll_same_cells", "i_nll_corrected")
    assert len({found[name] for name in steps}) == len(steps)
    assert found["i_nll_refitted"] > found["i_nll"]
    assert seen["how"] == "gradient"
    assert seen["drift"]
    assert seen["adaptation"] is seen["scoring"]


def test_shuffled_labels_leave_the_counts_of_each_condition(monkeypatch):
    fitted = {}

    def spy(model, cells, config, *, validation):
        fitted.update(condition=torch.cat([cells.condition, validation.condition]))
        return fit(model, cells, config, validation=validation)

    fit = benchmark.fit
    monkeypatch.setattr(benchmark, "fit", spy)
    benchmark.recover(SHORT | {"method": "shuffled"})
    assert torch.bincount(fitted["condition"], minlength=81)[1:].tolist() == 80 * [8]


def test_a_fit_on_shuffled_labels_is_scored_within_the_true_conditions(monkeypatch):
    told = {}

    def spy(true, estimated, condition):
        told.update(true=true, condition=condition)
        return {}

    monkeypatch.setattr(benchmark, "latent_scores", spy)
    plan = {**benchmark.ARMS["smslib"], **SHORT, "method": "shuffled"}
    screen = benchmark._screen(plan)
    trained = benchmark._trained(screen)
    done = benchmark._fit(plan, trained)
    benchmark._recovery(done, screen, trained)
    np.testing.assert_array_equal(told["condition"], trained.cells.condition)
    assert (told["condition"] != done.cells.condition.numpy()).any()


@pytest.fixture(scope="module")
def deep():
    """The trained interventions of a screen with 60 cells each and four latents."""
    plan = {**benchmark.ARMS["smslib"], "seed": 0, "n_cells": 60, "n_latent": 4}
    return benchmark._trained(benchmark._screen(plan))


def test_true_latents_that_were_moved_and_turned_are_read_as_they_were(deep):
    true = deep.z.numpy()
    angle = np.eye(4)
    angle[:2, :2] = np.array([[1, -1], [1, 1]]) / np.sqrt(2)
    codes = true @ angle + [0.0, 1.5, -0.7, 0.2]
    condition = deep.cells.condition.numpy()
    found, as_it_was = (benchmark.turned_scores(each, deep) for each in (codes, true))
    assert benchmark.latent_scores(true, codes, condition)["mcc"] < 0.9
    assert found["mcc_turned"] > 0.99
    assert found["f1_turned"] == pytest.approx(as_it_was["f1_turned"], abs=0.02)
    assert found["nats_saved"] > as_it_was["nats_saved"] + 100


def test_the_price_of_the_turned_graph_by_enumeration(deep, monkeypatch):
    """With the descent replaced by a known turn, the scores follow from means and cost alone."""
    codes, quarter = deep.z.numpy(), np.eye(4)[:, [1, 0, 2, 3]]
    frame = benchmark.gauge.Frame(np.zeros(4), quarter)
    monkeypatch.setattr(benchmark.gauge, "sparsest", lambda *_, **__: frame)
    monkeypatch.setattr(benchmark.gauge, "centred", lambda _: frame)
    found = benchmark.turned_scores(codes, deep)
    assert found["nats_saved"] == 0
    assert found["mcc_turned"] == pytest.approx(1.0)
    means = np.stack([codes[deep.cells.condition == row].mean(0) for row in range(1, 81)])
    edges = 60 * means**2 / 2 > 2 * (0.45 * 60 - 1)
    agree = (edges & deep.graph.numpy()).sum() / [edges.sum(), deep.graph.sum()]
    assert [found["precision_turned"], found["recall_turned"]] == pytest.approx(list(agree))


@pytest.mark.parametrize("method", ["oracle", "pca", "lda", "svae+", "vae"])
def test_on_request_every_method_is_read_in_its_sparsest_axes(method):
    found = benchmark.recover(SHORT | {"method": method, "axes": "sparsest"})
    graph = {f"{name}_turned" for name in ("precision", "recall", "f1")}
    assert {"mcc_turned", "mcc_within_turned", "nats_saved"} | graph <= set(found)
    assert found["nats_saved"] >= 0
    assert all(math.isfinite(value) for value in found.values())


@pytest.mark.parametrize("method", ["pca", "lda", "regression"])
def test_controls_need_no_model(method):
    found = benchmark.recover(TINY | {"method": method})
    assert LATENTS <= set(found)
    assert FIT.isdisjoint(found)
    assert (GRAPH <= set(found)) == (method == "lda")


def test_the_oracle_is_nearly_perfect_where_counts_are_deep():
    found = benchmark.recover(TINY | {"method": "oracle"})
    assert min(found["mcc"], found["r2"]) > 0.99
    assert set(found) == LATENTS | {"i_nll"}


def test_data_settings_reach_the_simulator(monkeypatch):
    seen = {}

    def stop(**options):
        seen.update(options)
        raise LookupError("far enough")

    monkeypatch.setattr(benchmark.simulate, "sparse_shift", stop)
    data = {
        "mechanism": {"density": 0.2, "effect": 2.0},
        "held_out": {"density": 0.9},
        "violation": {"escape": 0.2},
        "normaliser": "genes",
        "with_replacement": False,
        "n_targets": 40,
    }
    with pytest.raises(LookupError):
        benchmark.recover(TINY | data)
    assert seen["mechanism"] == simulate.Mechanism(density=0.2, effect=2.0)
    assert seen["held_out"] == (20, simulate.Mechanism(density=0.9))
    assert seen["violation"] == simulate.Violation(escape=0.2)
    assert (seen["normaliser"], seen["with_replacement"]) == ("genes", False)
    assert (seen["n_targets"], seen["n_cells_per_condition"], seen["n_latent"]) == (40, 8, 3)
    assert seen["as_released"]


@pytest.mark.parametrize("arm", sorted(benchmark.ARMS))
def test_arms_name_known_recipes(arm):
    assert benchmark.ARMS[arm]["recipe"] in recipes.RECIPES
    assert benchmark.ARMS[arm]["transfer"] in ("released", "corrected")


def test_the_released_graph_score_of_a_perfect_model():
    """Five targets trained, five not: half of the edges are out of reach, and half the signs."""
    rng = np.random.default_rng(0)
    screen = simulate.sparse_shift(n_cells_per_condition=30, n_targets=10, n_latent=4, seed=1)
    trained = simulate.restrict(screen, screen.design.conditions[1:6])
    model = recipes.build(trained.cells, trained.design, n_latent=4, epochs=1)[0]
    model.prior.gate.logit.data = torch.where(trained.graph, 9.0, -9.0)
    estimated = trained.z.numpy() + 1e-6 * rng.standard_normal(trained.z.shape)
    score = benchmark._released_graph_scores(model, "svae+", screen, trained, estimated)
    assert score["released_precision"] == 1.0
    share = float(trained.graph.sum() / screen.graph.sum())
    assert score["released_recall"] == pytest.approx(share)


# ---------------------------------------------------------------- agreement


def test_agreement_of_one_start_with_itself(monkeypatch):
    """The same start twice gives the same fit: agreement is then complete."""
    fit = benchmark._fit
    monkeypatch.setattr(
        benchmark, "_fit", lambda plan, trained: fit(plan | {"init_seed": 0}, trained)
    )
    found = benchmark.agree(SHORT | {"n_inits": 2})
    assert found["pairwise_mcc"] == pytest.approx(1.0)
    assert found["udr"] <= 1.0


def test_agreement_averages_the_fits():
    found = benchmark.agree(SHORT | {"n_inits": 2})
    each = [benchmark.recover(SHORT | {"init_seed": k}) for k in range(2)]
    for score in ("mcc", "r2", "f1", "validation_elbo"):
        assert found[score] == pytest.approx(np.mean([run[score] for run in each]))
    assert found["pairwise_mcc"] < 1.0


# ---------------------------------------------------------------- told the truth


def test_told_the_truth_the_networks_learn_it():
    screen = simulate.sparse_shift(
        n_cells_per_condition=200, n_targets=6, n_latent=2, seed=0, as_released=True
    )
    model, _ = recipes.build(screen.cells, screen.design, n_latent=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    short, long = (ceilings.told(model, screen, epochs=n) for n in (1, 8))
    assert long["encoder_r2"] > max(0.95, short["encoder_r2"])
    assert 0 < long["decoder_gap"] < short["decoder_gap"]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# ---------------------------------------------------------------- summaries


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


def entry(method, seed, mcc, **data):
    config = {"arm": "smslib", "method": method, "seed": seed, **data}
    result = {"mcc": mcc, "epochs": 3 + seed}
    return {"config": config, "result": result, "provenance": provenance(10.0)}


ENTRIES = [
    entry("svae+", 1, 0.5),
    entry("svae+", 0, 0.9),
    entry("vae", 0, 0.1),
    entry("svae+", 0, 0.3, n_latent=20),
]
STUDY = {
    "": [ENTRIES[0]["config"], ENTRIES[1]["config"], ENTRIES[2]["config"]],
    "p20": [ENTRIES[3]["config"], ENTRIES[3]["config"] | {"seed": 7}],
}


def write(entries, folder):
    for run in entries:
        store.write_json(folder / f"{sweep.run_id(run['config'])}.json", run)
    return folder


def test_summary_by_hand(tmp_path):
    values = benchmark.summarise(sweep.collect(write(ENTRIES, tmp_path)), STUDY)
    assert values["smslib.svae+.seeds"] == [0, 1]
    assert values["smslib.svae+.mcc"] == [0.9, 0.5]
    assert values["smslib.svae+.mcc.mean"] == pytest.approx(0.7)
    assert values["smslib.svae+.mcc.sd"] == pytest.approx(0.4 / math.sqrt(2))
    half = 12.706204736 * 0.2  # Student's t at 1 degree of freedom times the standard error
    assert values["smslib.svae+.mcc.low"] == pytest.approx(0.7 - half)
    assert values["smslib.svae+.mcc.high"] == pytest.approx(0.7 + half)
    assert values["smslib.vae.epochs"] == [3]
    assert values["smslib.vae.mcc.n"] == 1
    assert "smslib.vae.mcc.low" not in values
    assert values["smslib.p20.svae+.mcc"] == [0.3]


def test_summary_holds_scores_of_the_study_only(tmp_path):
    values = benchmark.summarise(sweep.collect(write(ENTRIES, tmp_path)), {"": STUDY[""]})
    assert {key.split(".")[2] for key in values} == {"seeds", "mcc", "epochs"}
    assert not any(key.startswith("smslib.p20") for key in values)


def test_a_score_that_one_run_lacks_is_left_out_there(tmp_path):
    more = entry("vae", 1, 0.2)
    more["result"]["f1"] = 0.5
    study = {"": [*STUDY[""], more["config"]]}
    values = benchmark.summarise(sweep.collect(write([*ENTRIES, more], tmp_path)), study)
    assert values["smslib.vae.f1"] == [0.5]
    assert values["smslib.vae.f1.seeds"] == [1]
    assert "smslib.vae.mcc.seeds" not in values
    assert values["smslib.vae.mcc"] == [0.1, 0.2]
    assert "smslib.svae+.f1" not in values


def test_of_several_starts_the_best_by_validation_elbo_counts(tmp_path):
    """The MCC has no say, a seed without all of its starts is left out, and so is a control."""
    runs = []
    for start, elbos, mccs in (
        ({}, (-3.0, -1.0, -1.0), (0.9, 0.5, 0.5)),
        ({"init_seed": 1001}, (-2.0, -2.0), (0.4, 0.9)),
    ):
        for seed, (elbo, mcc) in enumerate(zip(elbos, mccs, strict=True)):
            run = entry("svae+", seed, mcc, n_latent=20, **start)
            run["result"]["validation_elbo"] = elbo
            runs.append(run)
    runs.append(entry("oracle", 0, 1.0, n_latent=20))
    first = [run["config"] for run in runs if "init_seed" not in run["config"]]
    second = [run["config"] for run in runs if "init_seed" in run["config"]]
    study = {"p20": first, "p20-start1": second}
    values = benchmark.summarise(sweep.collect(write(runs, tmp_path)), study)
    assert values["smslib.p20-best.svae+.seeds"] == [0, 1]
    assert values["smslib.p20-best.svae+.mcc"] == [0.4, 0.5]
    assert values["smslib.p20.svae+.mcc"] == [0.9, 0.5, 0.5]
    assert "smslib.p20-best.oracle.seeds" not in values


# ---------------------------------------------------------------- command line


def test_scores_by_setting_leave_out_what_was_not_run():
    values = {"smslib.s0.2.ivae.mcc": [0.5], "smslib.s0.5.ivae.mcc": [], "smslib.s0.5.vae.r2": [1]}
    found = benchmark.by_setting(
        values, arm="smslib", score="mcc", settings=("s0.2", "s0.5"), methods=iter(("ivae", "vae"))
    )
    assert found == {"ivae": {"s0.2": [0.5]}}


def test_the_command_line_summarises_what_is_there(tmp_path):
    run = entry("svae+", 3, 0.7, n_cells=250)
    write([run, *ENTRIES], tmp_path / "runs" / "simulation")
    assert benchmark.main(["headline", "--results", str(tmp_path), "--workers", "0"]) == 0
    stored = store.get("headline", root=tmp_path)
    assert stored["smslib.svae+.mcc.mean"] == pytest.approx(0.7)
    assert (stored.provenance["n_runs"], stored.provenance["n_missing"]) == (1, 4)
    assert stored.provenance["command"] == "make bench EXPERIMENT=headline"


def instant(config):
    return {"mcc": 1.0 if config["seed"] else 0.0}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(benchmark, "recover", instant)
    monkeypatch.setattr(sweep, "ProcessPoolExecutor", lambda n, *_, **__: ThreadPoolExecutor(n))


@pytest.mark.usefixtures("quick")
def test_the_command_line_runs_what_is_missing(tmp_path):
    study = benchmark.STUDIES["headline"]()[""]
    sweep.run(instant, study[:2], tmp_path / "runs" / "simulation")
    assert benchmark.main(["headline", "--results", str(tmp_path), "--workers", "1"]) == 0
    stored = store.get("headline", root=tmp_path)
    assert stored["smslib.svae+.seeds"] == [0, 1, 2, 3, 4]
    assert stored["smslib.svae+.mcc.mean"] == pytest.approx(0.8)


@pytest.mark.usefixtures("quick")
def test_an_integer_names_a_run_and_an_arm_its_runs(tmp_path):
    options = ["--results", str(tmp_path), "--workers", "1"]
    benchmark.main(["headline", *options, "--index", "3"])
    assert store.get("headline", root=tmp_path)["smslib.svae+.seeds"] == [3]
    benchmark.main(["table10", *options, "--arm", "released"])
    assert {key.split(".")[0] for key in store.get("table10", root=tmp_path)} == {"released"}


def test_rules_choose_from_a_grid():
    study = benchmark.STUDIES["selection"]()
    grid = [
        c for c in sweep.chain(*study.values()) if (c["arm"], c["method"]) == ("smslib", "svae+")
    ][:3]
    scores = [(0.2, -300.0, 0.9), (0.8, -310.0, 0.7), (0.5, -299.0, 0.6)]
    names = ("udr", "validation_elbo", "mcc")
    runs = [{**c, **dict(zip(names, s, strict=True))} for c, s in zip(grid, scores, strict=True)]
    frame = pd.DataFrame(runs).assign(run_id=[sweep.run_id(config) for config in grid])
    found = benchmark.chosen(frame, study)
    for rule, mcc in {"udr": 0.7, "validation_elbo": 0.6, "mcc": 0.9}.items():
        assert found[f"smslib.svae+.by_{rule}.mcc"] == mcc
    assert found["smslib.svae+.by_mcc.setting"] == "alpha10-epochs30"
    assert found["smslib.svae+.by_udr.setting"] == "alpha20-epochs30"
    assert found["smslib.svae+.by_validation_elbo.setting"] == "alpha40-epochs30"
    assert not benchmark.chosen(frame[:1], study)


def test_an_unknown_experiment_is_refused(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["tabel1"])
    assert "invalid choice: 'tabel1'" in capsys.readouterr().err
