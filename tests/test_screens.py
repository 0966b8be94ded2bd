"""The case study on a real screen, on a small stand-in with the real names."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData

from smslib import perturbseq, recipes, screens, store, sweep
from smslib.data import Cells, Design, split_cells
from smslib.model import SMSVAE
from smslib.train import History, TrainConfig, fit

TARGETS = sorted([*screens.PATHWAY, *screens.nulls()])
N_GENES, N_EACH = 12, 20


def make_adata():
    """The pathway lowers the first three genes; replicate 3 is deeper in the last one."""
    rng = np.random.default_rng(0)
    target = np.repeat([perturbseq.CONTROL, *TARGETS], N_EACH)
    replicate = np.tile(["rep_2", "rep_3"], len(target) // 2)
    rate = np.full((len(target), N_GENES), 8.0)
    rate[np.isin(target, screens.PATHWAY), :3] = 1.0
    rate[replicate == "rep_3", -1] *= 3
    obs = pd.DataFrame({"target": target, "replicate": pd.Categorical(replicate)})
    obs.index = [f"cell{number}" for number in range(len(obs))]
    return AnnData(X=rng.poisson(rate), obs=obs)


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(screens, "prepare", lambda *, replicates: (make_adata(), {}))


# ---------------------------------------------------------------- small parts


def test_shuffled_labels_are_a_permutation_that_leaves_the_counts():
    cells = Cells(torch.arange(12.0).reshape(6, 2), torch.tensor([0, 0, 1, 1, 2, 2]))
    shuffled = screens.shuffle_labels(cells, seed=0)
    assert torch.equal(shuffled.counts, cells.counts)
    assert torch.equal(shuffled.condition.sort().values, cells.condition)
    assert not torch.equal(shuffled.condition, cells.condition)
    assert torch.equal(shuffled.condition, screens.shuffle_labels(cells, seed=0).condition)


def test_labels_are_dealt_in_the_order_of_the_stored_runs():
    cells = Cells(torch.ones(6, 1), torch.arange(6) % 3)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(screens.shuffle_labels(cells, seed=1).condition, cells.condition[order])


def test_shifts_are_zero_where_the_gate_is_shut():
    model = SMSVAE.preset("svae+", Design.single_target(["a"]), 3, n_latent=2, n_hidden=4)
    with torch.no_grad():
        model.prior.gate.logit.copy_(torch.tensor([[3.0, -3.0]]))
    expected = [[float(model.prior.slab.mean[0, 0].detach()), 0.0]]
    np.testing.assert_allclose(screens.shifts(model), expected)


def test_replicate_correlation_by_hand():
    replicate = np.array(["x", "x", "y", "z"])
    codes = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 1.0]])
    found = screens.replicate_correlation(codes, replicate)
    # The first latent is membership in x itself; the second is in y never and in z always.
    np.testing.assert_allclose(found, [1.0, np.sqrt(1 / 3)], atol=1e-12)


@pytest.mark.parametrize(
    ("replicate", "message"),
    [
        (["x", "x", "x"], r"\['x'\]; expected two or more"),
        (["x", None, "y"], "1 of 3 cells have no"),
    ],
)
def test_a_replicate_has_to_differ_from_another(replicate, message):
    with pytest.raises(ValueError, match=message):
        screens.replicate_correlation(np.eye(3), np.array(replicate))


def test_left_out_target_moves_to_the_end_and_keeps_its_cells():
    design = Design.single_target(["a", "b", "c"])
    cells = Cells(torch.arange(8.0).reshape(8, 1), torch.tensor([0, 1, 2, 3, 3, 2, 1, 0]))
    known, held, larger = screens.leave_out(cells, design, "b")
    assert larger.conditions == ("control", "a", "c", "b")
    assert known.counts.ravel().tolist() == [0, 1, 3, 4, 6, 7]
    assert known.condition.tolist() == [0, 1, 2, 2, 1, 0]
    assert (held.counts.ravel().tolist(), held.condition.tolist()) == ([2, 5], [3, 3])


def test_a_group_and_a_combination_are_left_out_as_targets_of_their_own():
    matrix = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1.0]])
    design = Design(("control", "a", "b", "a+b", "c"), ("a", "b", "c"), matrix)
    cells = Cells(torch.arange(5.0).reshape(5, 1), torch.arange(5))
    known, held, larger = screens.leave_out(cells, design, ["a+b", "c"])
    assert larger.conditions == ("control", "a", "b", "a+b", "c")
    assert larger.targets == ("a", "b", "a+b", "c")
    assert torch.equal(larger.matrix[1:], torch.eye(4))
    assert (known.condition.tolist(), held.condition.tolist()) == ([0, 1, 2], [3, 4])
    assert held.counts.ravel().tolist() == [3, 4]
    small = screens.without(design, ["a+b", "c"])
    assert (small.conditions, small.targets) == (("control", "a", "b"), ("a", "b"))


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ([], r"holding out \[\] leaves 2 perturbations of 2 to train on; expected some"),
        (["a", "b"], r"holding out \['a', 'b'\] leaves 0 perturbations of 2 to train on"),
        (["control"], "leaves 2 perturbations of 2 .* not the control 'control'"),
        (["a", "a"], "leaves 1 perturbations of 2 to train on; expected some of them, each once"),
    ],
)
def test_a_hold_out_that_makes_no_sense_is_refused(held, message):
    with pytest.raises(ValueError, match=message):
        screens.without(Design.single_target(["a", "b"]), held)


def test_a_target_is_not_held_out_while_its_combination_is_kept():
    matrix = torch.tensor([[0, 0], [1, 0], [1, 1.0]])
    design = Design(("control", "a", "a+b"), ("a", "b"), matrix)
    with pytest.raises(ValueError, match=r"\['a'\] are held out, but combinations that are kept"):
        screens.without(design, ["a"])


def test_a_perturbation_is_not_held_out_and_trained_on_under_another_name():
    matrix = torch.tensor([[0, 0], [1, 1.0], [1, 1], [1, 0], [0, 1]])
    design = Design(("control", "a+b", "b+a", "a", "b"), ("a", "b"), matrix)
    with pytest.raises(ValueError, match=r"under another name: 'a\+b' as 'b\+a'; hold both out"):
        screens.without(design, ["a+b"])
    assert screens.without(design, ["a+b", "b+a"]).conditions == ("control", "a", "b")


def test_leaving_out_an_unknown_target_names_the_known():
    cells = Cells(torch.ones(2, 1), torch.tensor([0, 1]))
    with pytest.raises(KeyError, match="unknown condition 'aa'; nearest known"):
        screens.leave_out(cells, Design.single_target(["a"]), "aa")


def test_own_cells_teach_a_better_shift_than_foreign_ones():
    rng = np.random.default_rng(1)
    design = Design.single_target(["up", "down", "up again"])
    condition = torch.arange(4).repeat_interleave(60)
    rate = np.full((240, 4), 10.0)
    rate[60:120, 0] = rate[120:180, 1] = rate[180:, 0] = 30.0
    cells = Cells(torch.from_numpy(rng.poisson(rate)).float(), condition)
    known, held, larger = screens.leave_out(cells, design, "up again")
    model = SMSVAE.preset("ivae", Design.single_target(["up", "down"]), 4, n_latent=2, n_hidden=16)
    fit(model, known, TrainConfig(epochs=40, batch_size=60))
    own, scoring = split_cells(held, (0.5, 0.5), seed=0)
    donors = {"own": own, "foreign": known.of(larger.index(["down"]))}
    scores = screens.transfer_scores(model, scoring, design=larger, donors=donors)
    assert list(scores) == ["none", "own", "foreign"]
    assert scores["own"].shape == (30,)
    assert scores["own"].mean() > scores["none"].mean() > scores["foreign"].mean()


def test_a_short_fit_keeps_the_recipe_and_shortens_its_schedule(monkeypatch):
    used = {}
    monkeypatch.setattr(
        screens, "fit", lambda *args, **data: used.update(config=args[2], **data) or History()
    )
    cells = Cells(torch.ones(200, 3), torch.arange(200) % 2)
    design = Design.single_target(["a"])
    model, _ = screens.fit_screen(cells, design, epochs=20, seed=3)
    config, (_, ours) = used["config"], recipes.build(cells, design)
    assert (config.epochs, config.warmup_epochs, config.seed) == (20, 6, 3)
    assert (config.learning_rate, config.schedule) == (ours.learning_rate, "cosine")
    assert len(used["validation"]) == 20
    assert model.newton
    assert config.encoder_share < 1
    assert model.prior.gate.alpha == 2.0  # of one target, too: at 1 gates stay open


@pytest.mark.parametrize(
    ("method", "strength"), [("svae+", {"alpha": 7.0}), ("svae", {"strength": 12.0})]
)
def test_both_sparsities_keep_the_same_edges(method, strength):
    """An edge of n cells stays if n m^2 / 2 exceeds 2 (alpha - 1), or the strength."""
    cells = Cells(torch.ones(20, 3), torch.arange(20) % 2)
    model, _ = screens.build(
        cells, Design.single_target(["a"]), epochs=2, method=method, sparsity=7.0
    )
    assert model.prior.gate.options().items() >= strength.items()


def test_the_training_of_a_short_fit_can_be_changed_field_by_field():
    cells, design = Cells(torch.ones(20, 3), torch.arange(20) % 2), Design.single_target(["a"])
    changed = {"max_grad_norm": 5.0, "batch_size": 16}
    model, config = screens.build(cells, design, epochs=2, n_latent=3, training=changed)
    assert (config.max_grad_norm, config.batch_size, model.n_latent) == (5.0, 16, 3)
    plain = screens.build(cells, design, epochs=2)[1]
    assert config == replace(plain, **changed)


# ---------------------------------------------------------------- the study

GATES = {"labels": "true", "replicates": ["rep_2", "rep_3"], "seed": 0, "epochs": 2}
MOVE = {"target": "JAK2", "method": "svae+", "replicates": ["rep_2", "rep_3"], "seed": 0}


@pytest.mark.usefixtures("stand_in")
def test_a_gate_run_describes_every_target():
    result = screens.gates(GATES)
    assert list(result["targets"]) == TARGETS
    assert result["cells"].tolist() == [N_EACH] * len(TARGETS)
    assert result["probability"].shape == result["shift"].shape == (len(TARGETS) * 10,)
    assert len(result["replicate_r"]) == 10


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("method", ["svae+", "vae"])
def test_a_transfer_run_compares_three_donors(method):
    result = screens.transfer(MOVE | {"method": method, "epochs": 1})
    gains = {f"gain_{donor}" for donor in ("own", "mate", "null")}
    assert set(result) == {"iwelbo", "cosine", "n_scored", *gains, *(f"{g}_sem" for g in gains)}
    assert result["n_scored"] == N_EACH // 2
    if method == "vae":
        assert {result[gain] for gain in gains} == {result["cosine"]} == {0.0}


@pytest.mark.usefixtures("stand_in")
def test_the_study_stores_a_summary_of_its_runs(monkeypatch, tmp_path):
    shuffled = GATES | {"labels": "shuffled"}
    every = GATES | {"replicates": ["rep_1", "rep_2", "rep_3"]}
    monkeypatch.setattr(screens, "_gate_runs", lambda: [GATES, shuffled, every])
    monkeypatch.setattr(screens, "_transfer_runs", lambda: [MOVE | {"epochs": 1}])
    screens.study(tmp_path)
    stored = store.get("papalexi", root=tmp_path)
    assert stored["targets"] == TARGETS
    assert {key.split(".")[0] for key in stored} == {
        *("targets", "cells", "true", "shuffled", "all-replicates", "transfer")
    }
    assert stored["transfer.svae+.JAK2.seed"] == [0]
    assert stored.provenance["n_runs"] == 4


def frame(config, result):
    return pd.DataFrame([config | result])


def test_summary_counts_open_gates_by_hand():
    targets = [*screens.PATHWAY, *screens.nulls()]
    probability = np.zeros((len(targets), 2))
    probability[:2] = 0.9  # both latents of IFNGR1 and IFNGR2
    probability[-1, 0] = 0.6  # one false positive
    shift = np.where(probability > 0.5, 1.0, 0.0)
    result = {"targets": targets, "cells": [5] * len(targets), "replicate_r": [0.1, 0.3]}
    result |= {"probability": list(probability.ravel()), "shift": list(shift.ravel())}
    moved = frame(MOVE, {"gain_own": 2.0, "gain_own_sem": 0.5, "cosine": 0.9, "iwelbo": -3.0})
    fitted = frame(GATES, result | {"validation_elbo": -9.0})
    values = screens.summarise(fitted, moved)
    assert values["true.open_pathway"] == [2]
    assert values["true.open_null"] == [1]
    assert list(values["true.open_edges"]) == [5]
    assert values["true.replicate_r"] == [0.3]
    # Of the six pairs of four targets one is parallel, the others have a shift of zero.
    assert values["true.cosine"] == [pytest.approx(1 / 6)]
    assert list(values["true.largest.IFNGR2"]) == [0.9]
    assert values["transfer.svae+.JAK2.gain_own"] == [2.0]


def test_the_study_is_the_one_the_page_describes():
    gate_runs, moves = screens._gate_runs(), screens._transfer_runs()
    labels = [(run["labels"], run["seed"]) for run in gate_runs if len(run["replicates"]) == 2]
    assert labels == [(kind, seed) for seed in range(5) for kind in ("true", "shuffled")]
    assert {run["target"] for run in moves} == set(screens.PATHWAY)
    assert len({sweep.run_id(run) for run in gate_runs + moves}) == 11 + 15


# ---------------------------------------------------------------- the real file


@pytest.mark.skipif(not perturbseq.available("papalexi2021"), reason="papalexi2021 not available")
def test_preparing_the_real_screen():
    adata, ledgers = screens.prepare()
    assert sorted(adata.obs["replicate"].cat.categories) == list(screens.REPLICATES)
    assert adata.n_vars == 299
    assert set(screens.PATHWAY) <= set(adata.obs["target"])
    assert ledgers["guides"]["cells_before"].iloc[0] == 20_729
