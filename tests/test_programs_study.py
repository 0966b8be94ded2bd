"""The study of gene programs, on a small stand-in with the real names."""

import itertools
import math
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from hypothesis import given
from hypothesis import strategies as st

from smslib import perturbseq, programs_study, screens, store, sweep

TARGETS = sorted([*screens.PATHWAY, *screens.nulls()])
CONFIG = {"labels": "true", "replicates": ["rep_2", "rep_3"], "seed": 0, "epochs": 1}
MEASURED_RESPONSE = [*programs_study.SETS["interferon-gamma response"], *"ABCDEF"]


@pytest.fixture
def stand_in(monkeypatch):
    rng = np.random.default_rng(0)
    target = np.repeat([perturbseq.CONTROL, *TARGETS], 10)
    obs = pd.DataFrame({"target": target, "replicate": np.tile(["rep_2", "rep_3"], 100)})
    obs.index = [f"cell{number}" for number in range(len(obs))]
    counts = rng.poisson(8.0, (len(obs), len(MEASURED_RESPONSE)))
    adata = AnnData(X=counts, obs=obs, var=pd.DataFrame(index=MEASURED_RESPONSE))
    monkeypatch.setattr(screens, "prepare", lambda *, replicates: (adata, {}))


@pytest.mark.usefixtures("stand_in")
def test_a_run_packs_programs_and_gates():
    result = programs_study.read(CONFIG)
    found, gates = programs_study._programs(result), programs_study._gates(result)
    assert found.genes == tuple(MEASURED_RESPONSE)
    assert found.weights.shape == (10, 16)
    assert gates.shape == (len(TARGETS), 10)
    assert programs_study._gates(result, "shift").shape == gates.shape
    means = programs_study._unpacked(result["mean_counts"], (-1,))
    np.testing.assert_allclose(means, 8.0, rtol=0.1)
    raw = programs_study._unpacked(result["weights"], (10, 16))
    np.testing.assert_allclose(found.weights, raw * means**0.5)
    assert np.asarray((gates > 0) & (gates < 1)).all()
    assert len(result["agreement"]) == len(result["replicate_r"]) == 10
    assert result["targets"] == tuple(TARGETS)
    assert set(result) & set(CONFIG) == set()


def test_a_run_is_unpacked_as_it_was_packed():
    weights = np.arange(32.0).reshape(2, 16)
    gates = np.zeros((len(TARGETS), 2))
    gates[3, 1] = 0.75
    found, probability, shift = programs_study.unpack(make_run("true", 0, weights, gates))
    assert found.genes == tuple(MEASURED_RESPONSE)
    np.testing.assert_array_equal(found.weights, 2 * weights)  # mean counts of 4
    np.testing.assert_array_equal(probability, gates)
    np.testing.assert_array_equal(shift, np.where(gates > 0.5, 2.0, 0.0))


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=2))
def test_packing_keeps_three_digits(values):
    unpacked = programs_study._unpacked(programs_study._packed(values), (1, 2))
    np.testing.assert_allclose(unpacked[0], values, rtol=1e-3, atol=1e-7)


def make_run(labels, seed, weights, gates):
    numbers = {"weights": weights, "probability": gates, "mean_counts": np.full(16, 4.0)}
    numbers |= {"shift": np.where(gates > 0.5, 2.0, 0.0)}
    packed = {name: programs_study._packed(values) for name, values in numbers.items()}
    told = {"genes": " ".join(MEASURED_RESPONSE), "targets": TARGETS, "n_latent": 2}
    kept = {"agreement": [1.0, 0.9], "replicate_r": [0.1, 0.2], "validation_elbo": -9.0}
    return CONFIG | {"labels": labels, "seed": seed} | packed | told | kept


def test_summary_by_hand():
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(2, 16))
    gates = np.zeros((len(TARGETS), 2))
    gates[np.isin(TARGETS, screens.PATHWAY), 0] = 0.9
    shut = np.zeros_like(gates)
    shut[TARGETS.index("CAV1"), 1] = 0.7  # one false positive, in one seed
    rows = [make_run("true", seed, weights, gates) for seed in (2, 0, 1)]
    rows += [make_run("shuffled", 0, weights, shut), make_run("shuffled", 1, weights, 0 * gates)]
    values = programs_study.summarise(pd.DataFrame(rows))
    assert values["true.seeds"] == [0, 1, 2]
    assert values["true.finding"] == [True, False]
    assert values["true.targets"] == [" ".join(sorted(screens.PATHWAY)), ""]
    assert values["shuffled.recurs"] == [True, True]
    assert values["shuffled.finding"] == [False, False]
    assert values["shuffled.open_null"] == [1, 0]
    strongest = MEASURED_RESPONSE[int(np.argmax(weights[0]))]
    assert values["true.up"][0].split()[0] == strongest
    assert values["true.up_weights"][0].split()[0] == f"{2 * weights[0].max():.2f}"
    assert values["true.down_weights"][1].split()[0] == f"{2 * weights[1].min():.2f}"
    for way in ("up", "down"):
        lengths = [
            [len(row.split()) for row in values[f"true.{key}"]] for key in (way, way + "_weights")
        ]
        assert lengths[0] == lengths[1]
    assert values["true.opened"] == values["true.targets"]
    assert values["true.opened_shifts"] == [" ".join(["2.00"] * len(screens.PATHWAY)), ""]
    assert values["shuffled.opened"] == ["", "CAV1"], "of the first seed, whatever recurs"
    p_value = 1 / math.comb(len(TARGETS), len(screens.PATHWAY))
    assert values["true.pathway_q"] == [pytest.approx(2 * p_value), 1]
    assert values["true.ari"] == [1, 1, 1]
    assert len(values["true.q.interferon-gamma response"]) == 2
    assert values["true.agreement"] == [1.0, 0.9]
    recurring = [name in screens.PATHWAY for name in TARGETS]
    assert values["true.effect_recurs"] == recurring
    assert values["true.effect_up"][recurring.index(True)] == values["true.up"][0]
    assert values["true.effect_down"][recurring.index(False)] == ""
    assert not any(values["shuffled.effect_recurs"])


@pytest.mark.usefixtures("stand_in")
def test_the_command_runs_what_is_missing_and_stores_a_summary(monkeypatch, tmp_path, capsys):
    runs = [CONFIG | {"seed": seed} for seed in (0, 1)] + [CONFIG | {"labels": "shuffled"}]
    monkeypatch.setattr(programs_study, "_runs", lambda: runs)
    gmt = tmp_path / "mine.gmt"
    gmt.write_text("MINE\tx\tSTAT1\tJAK2\tA\tB\n")
    assert programs_study.main(["--results", str(tmp_path), "--gmt", str(gmt)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'programs.json'}\n"
    stored = store.get("programs", root=tmp_path)
    assert {key.split(".")[0] for key in stored} == {"true", "shuffled"}
    assert len(stored["true.q.MINE"]) == 10
    assert stored.provenance["n_runs"] == 3
    monkeypatch.setattr(programs_study, "read", dict)  # nothing is missing any more
    programs_study.main(["--results", str(tmp_path)])
    assert "true.q.interferon-gamma response" in store.get("programs", root=tmp_path)


def test_the_command_says_what_is_wrong_in_a_line(tmp_path, capsys):
    gmt = tmp_path / "odd.gmt"
    gmt.write_text("A\n")
    with pytest.raises(SystemExit, match="1"):
        programs_study.main(["--results", str(tmp_path), "--gmt", str(gmt)])
    assert capsys.readouterr().err.count("\n") == 1


def test_the_study_is_five_seeds_of_both_labels():
    runs = programs_study._runs()
    assert len({sweep.run_id(run) for run in runs}) == 10
    assert {(run["labels"], run["seed"]) for run in runs} == set(
        itertools.product(["true", "shuffled"], range(5))
    )


@pytest.mark.skipif(not perturbseq.available("papalexi2021"), reason="papalexi2021 not available")
def test_the_real_screen_measures_the_response():
    adata, _ = screens.prepare()
    whole, untouched = programs_study.SETS.values()
    assert set(whole) <= set(adata.var_names)
    assert set(whole) - set(untouched) == set(whole) & set(adata.obs["target"])


def test_the_command_is_called_as_the_stored_runs_say():
    command = [sys.executable, "-m", "smslib.programs", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: python -m smslib.programs ")
