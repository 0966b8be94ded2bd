"""The transfer experiment: who sees which cells, what is scored, and what the studies ask for."""

import json

import anndata
import numpy as np
import pandas as pd
import pytest
import torch

from smslib import holdouts, lookalike, metrics, perturbseq, screens, store, sweep
from smslib.data import Cells, Design
from smslib.holdouts import Group, Screen, Truth
from smslib.priors import METHODS

READERS = dict(holdouts.DATASETS)
N_EACH, N_GENES = 24, 8
TARGETS = ("a", "b", "c", "d", "e", "f")
FIT = {"epochs": 2, "n_latent": 3, "training": {"batch_size": 32}}
CONFIG = {"dataset": "toy", "group": "pair", "arm": "corrected", "method": "svae+", "seed": 0}
CONFIG |= {"fit": FIT}


def make_screen(n_each=N_EACH):
    """``c`` acts like ``a``, ``e`` like ``b`` and ``d`` together, ``f`` not at all."""
    rng = np.random.default_rng(0)
    single = Design.single_target(TARGETS)
    double = torch.tensor([[1.0, 1.0, 0, 0, 0, 0]])
    design = Design((*single.conditions, "a+b"), TARGETS, torch.cat([single.matrix, double]))
    condition = torch.arange(8).repeat_interleave(n_each)
    effect = torch.zeros(6, N_GENES)
    effect[[0, 1, 2, 3, 4, 4], [0, 1, 0, 2, 1, 2]] = 1.5
    rate = 6 * (design.matrix @ effect)[condition].exp()
    cells = Cells(torch.from_numpy(rng.poisson(rate)).float() + 1, condition)
    sums = {"sum": {"a+b": {"a": 1.0, "b": 1.0}}}
    groups = {
        "pair": Group(("c", "e"), ("a+b",)),
        "double": Group(("a+b",), (), sums),
        "contrast": Group(("c", "e"), (), {"minus c": {"e": {"c": -1.0}}}),
    }
    z = torch.from_numpy(rng.standard_normal((len(cells), 3))).float()
    truth = Truth(z + condition[:, None], torch.eye(6)[:, :3] > 0)
    return Screen(cells, design, groups, truth)


@pytest.fixture(scope="module")
def toy():
    return make_screen()


@pytest.fixture(autouse=True)
def _toy(monkeypatch):
    monkeypatch.setattr(holdouts, "DATASETS", {"toy": make_screen})
    monkeypatch.setattr(holdouts, "_N_DRAWS", 8)


def positions(cells):
    return cells.counts[:, 0].int().tolist()


# ---------------------------------------------------------------- the split


def test_a_split_gives_every_cell_one_part(toy):
    parts = holdouts.split(CONFIG, toy)
    assert parts.held == ("c", "e")
    assert parts.design.conditions == ("control", "a", "b", "d", "f")
    seen = [positions(part) for part in parts[2:]]
    together = sum(seen, [])
    assert sorted(together) == list(range(7 * N_EACH))  # the dropped double comes last
    held = {row for row in range(7 * N_EACH) if row // N_EACH in (3, 5)}
    assert set(seen[2]) | set(seen[3]) == held
    assert len(seen[2]) == len(seen[3]) == N_EACH
    for part in parts[2:]:
        names = np.array(parts.larger.conditions)[part.condition]
        true = np.array(toy.design.conditions)[toy.cells.condition[positions(part)]]
        assert (names == true).all()


def test_the_published_arm_scores_what_it_learns_from(toy):
    parts = holdouts.split(CONFIG | {"arm": "published"}, toy)
    assert sorted(positions(parts.adaptation)) == sorted(positions(parts.scoring))
    assert len(parts.scoring) == 2 * N_EACH


def test_fewer_cells_to_learn_from_are_nested_and_leave_the_scored_ones(toy):
    whole = holdouts.split(CONFIG, toy)
    few, fewer = (holdouts.split(CONFIG | {"n_adapt": n}, toy) for n in (5, 2))
    assert torch.bincount(few.adaptation.condition)[-2:].tolist() == [5, 5]
    parts = [set(positions(part.adaptation)) for part in (fewer, few, whole)]
    assert parts[0] < parts[1] < parts[2]
    assert positions(few.scoring) == positions(whole.scoring)


def test_a_split_does_not_look_at_counts_and_the_seed_decides(toy):
    other = Screen(
        Cells(torch.ones_like(toy.cells.counts), toy.cells.condition), toy.design, toy.groups
    )
    first, second = (holdouts.split(CONFIG, screen) for screen in (toy, other))
    assert [positions(part) for part in first[2:]] == [positions(part) for part in second[2:]]
    reseeded = holdouts.split(CONFIG | {"seed": 1}, toy)
    assert positions(first.scoring) != positions(reseeded.scoring)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": "toys"}, r"unknown data set 'toys'; expected one of \['toy'\]"),
        ({"group": "pears"}, r"unknown group 'pears'; expected one of \['pair', 'double'"),
        ({"arm": "right"}, r"unknown arm 'right'; expected one of \('corrected', 'published'\)"),
        ({"method": "tvae"}, "unknown method 'tvae'"),
    ],
)
def test_unknown_names_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        holdouts.experiment(CONFIG | change)


# ---------------------------------------------------------------- leakage


@pytest.mark.parametrize("method", ["svae+", "vae"])
def test_the_corrected_arm_leaks_nothing(toy, method):
    found = holdouts.leakage(CONFIG | {"method": method}, screen=toy)
    assert found == {"training": False, "adaptation": False}


def test_the_published_arm_scores_cells_it_adapted_to(toy):
    config = CONFIG | {"arm": "published", "adapt_epochs": 2}
    assert holdouts.leakage(config, screen=toy) == {"training": False, "adaptation": True}


def test_a_leak_into_the_training_would_be_noticed(toy, monkeypatch):
    """Standardise by all cells of the screen, the mistake that the check is for."""
    build = screens.build

    def leaky(cells, design, **options):
        model, config = build(cells, design, **options)
        model.standardise(current["screen"].cells)
        return model, config

    current = {}
    read = holdouts._read

    def spy(screen, part, device):
        current["screen"] = screen
        return read(screen, part, device)

    monkeypatch.setattr(holdouts, "_read", spy)
    monkeypatch.setattr(screens, "build", leaky)
    assert holdouts.leakage(CONFIG, screen=toy)["training"]


# ---------------------------------------------------------------- one run


@pytest.fixture(scope="module")
def result():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(holdouts, "DATASETS", {"toy": make_screen})
        patch.setattr(holdouts, "_N_DRAWS", 8)
        fit = FIT | {"epochs": 60, "sparsity": 2.0}
        return holdouts.experiment(CONFIG | {"fit": fit, "sizes": [3, 6, 20]})


def test_a_run_has_a_value_for_every_perturbation(result):
    assert result["perturbations"] == ["c", "e"]
    assert result["n_adapted"] == result["n_scored"] == [N_EACH // 2] * 2
    for stage in ("after", "learned", "at_3", "at_6"):
        assert all(np.isfinite(result[f"gain_{stage}"]))
        assert all(value > 0 for value in result[f"gain_{stage}_sem"])
        by_hand = -np.mean(np.add(result["iwelbo_before"], result[f"gain_{stage}"]))
        assert stage.startswith("at") or result[f"i_nll_{stage}"] == pytest.approx(by_hand)
    # Of 12 cells none has 20: no value, and no mean over the perturbations that have enough.
    assert result["gain_at_20"] == [None, None]
    assert np.isnan(result["i_nll_at_3"])


def test_a_gain_is_paired_by_cell(result):
    before, after = (np.array(result[f"iwelbo_{stage}"]) for stage in ("before", "after"))
    np.testing.assert_allclose(result["gain_after"], after - before, atol=1e-4)
    assert result["mean_gain_after"] == pytest.approx(np.mean(after - before), abs=1e-4)
    assert min(result["gain_after_sem"]) > 0


def test_the_held_out_targets_are_explained_by_shifts_of_their_own(result):
    assert result["mean_gain_after"] > 0.5
    assert result["i_nelbo_before"] > result["i_nelbo_after"]


def test_learned_gates_and_the_truth_are_scored(result):
    assert all(0 <= n <= 3 for n in result["n_open_learned"])
    assert {"f1_new", "recall_known", "precision_new", "mcc"} <= set(result)
    assert {"f1_new_rotated", "average_precision_known_centred", "f1_known_oracle"} <= set(result)
    assert 0 <= result["mcc"] <= 1


def test_a_run_is_a_function_of_its_configuration():
    first, second = (holdouts.experiment(CONFIG) for _ in range(2))
    changing = {f"{part}_cpu_seconds" for part in ("fit", "adapt", "score", "transfer")}
    assert {k: v for k, v in first.items() if k not in changing} == {
        k: v for k, v in second.items() if k not in changing
    }
    assert changing < first.keys()
    parts = first["adapt_cpu_seconds"] + first["score_cpu_seconds"]
    assert 0 < parts < first["transfer_cpu_seconds"]
    assert not first.keys() & CONFIG.keys()
    assert "NaN" not in json.dumps(first)


def test_scores_are_those_of_the_cells_of_each_condition(toy):
    parts = holdouts.split(CONFIG, toy)
    values = parts.scoring.counts[:, 0].numpy()
    groups = holdouts._by_perturbation(values, parts, ("c",))
    mine = values[(parts.scoring.condition == parts.larger.index(["c"])).numpy()]
    assert holdouts._averages(groups) == [pytest.approx(mine.mean()), None]
    assert holdouts._standard_errors(groups) == [pytest.approx(pd.Series(mine).sem()), None]


@pytest.mark.parametrize("method", ["vae", "beta-vae"])
def test_without_shifts_nothing_is_gained(method):
    found = holdouts.experiment(CONFIG | {"method": method})
    assert found["gain_after"] == [0.0, 0.0]
    assert not {"gain_learned", "n_open_learned"} & set(found)


@pytest.mark.parametrize("method", ["ivae", "svae"])
def test_the_published_arm_runs_by_gradients(method):
    found = holdouts.experiment(
        CONFIG | {"arm": "published", "method": method, "adapt_epochs": 3, "group": "double"}
    )
    assert found["n_adapted"] == found["n_scored"] == [N_EACH]
    assert found["gain_after"][0] != 0
    assert not any("learned" in name or name.endswith("sum") for name in found)


def test_latents_of_the_published_arm_are_read_by_the_encoder_it_refitted(toy):
    """Its recall of the true latents is that of the model that is adapted, for all cells alike."""
    config = CONFIG | {"arm": "published", "adapt_epochs": 1}
    parts = holdouts.split(config, toy)
    done = holdouts._fit(config, toy, parts)
    refitted = holdouts._stages(config, toy, parts, done)["after"].model
    true = toy.truth.z[positions(parts.train)].numpy()
    by_hand = metrics.mcc(true, holdouts.latents(refitted, done.train))
    assert holdouts.experiment(config)["mcc"] == pytest.approx(by_hand, abs=1e-5)
    assert metrics.mcc(true, holdouts.latents(done.model, done.train)) != pytest.approx(by_hand)


def test_single_targets_are_tested_together_where_they_have_the_same_seeds():
    lead = {"a": {0: 1.0, 1: 11.0, 2: 21.0}, "b": {2: -19.0, 0: 3.0, 1: -9.0}}
    rows = [
        {"method": method, "group": group, "seed": seed, "iwelbo_after": [value * other]}
        for method, other in (("svae+", 1), ("vae", 0))
        for group, by_seed in lead.items()
        for seed, value in by_seed.items()
    ]
    together = holdouts._tests(pd.DataFrame(rows), "vae", "seeds")["singles"]
    assert together.mean == pytest.approx(4 / 3)  # of 2, 1 and 1, seed by seed
    assert together.p_sign_flip == pytest.approx(2 / 8)
    for row in rows:
        row["seed"] += row["group"] == "b"  # three seeds each, but not the same three
    assert "singles" not in holdouts._tests(pd.DataFrame(rows), "vae", "seeds")


# ---------------------------------------------------------------- sums


def test_a_double_is_predicted_by_the_sum_of_its_parts(toy):
    """The stage's prior for the double is the sum of the singles' shifts, and no other's."""
    config = CONFIG | {"group": "double", "method": "ivae"}
    parts = holdouts.split(config, toy)
    done = holdouts._fit(config, toy, parts)
    stage = holdouts._stages(config, toy, parts, done)["sum"]
    assert stage.applies == ("a+b",)
    mode = stage.model.prior.mode()
    row = int(stage.condition.unique())
    assert stage.model.prior.conditions[row] == "a+b (predicted)"
    expected = mode[1] + mode[2]
    torch.testing.assert_close(mode[row], expected)
    own = parts.larger.n_conditions - 1
    assert not torch.allclose(mode[own], expected, atol=1e-3)


def test_a_prediction_may_apply_to_some_and_use_what_was_adapted(toy):
    config = CONFIG | {"group": "contrast", "method": "ivae"}
    found = holdouts.experiment(config)
    assert found["gain_minus c"][0] is None
    assert np.isfinite(found["gain_minus c"][1])
    assert found["mean_gain_minus c"] == found["gain_minus c"][1]
    short = found["gain_after"][1] - found["gain_minus c"][1]
    assert found["mean_short_minus c"] == pytest.approx(short)
    parts = holdouts.split(config, toy)
    done = holdouts._fit(config, toy, parts)
    stages = holdouts._stages(config, toy, parts, done)
    mode = stages["minus c"].model.prior.mode()
    torch.testing.assert_close(mode[-1], -stages["after"].model.prior.mode()[-2])


def test_the_sum_explains_a_double_that_is_one():
    fit = FIT | {"epochs": 80}
    found = holdouts.experiment(CONFIG | {"group": "double", "method": "ivae", "fit": fit})
    assert found["mean_gain_after"] > found["mean_gain_sum"] > 0.3


# ---------------------------------------------------------------- screens


def test_the_look_alike_is_held_out_by_its_pathways():
    screen = holdouts._look_alike(n_targets=40, n_cells=600, n_genes=30, n_latent=4, seed=3)
    assert set(screen.groups) == set(lookalike.PATHWAYS)
    assert screen.truth.graph.shape == (40, 4)
    assert len(screen.truth.z) == len(screen.cells) == 600
    name = next(iter(screen.groups))
    config = CONFIG | {"group": name, "method": "svae+"}
    parts = holdouts.split(config, screen)
    assert parts.held == screen.groups[name].held
    done = holdouts._fit(config, screen, parts)
    stages = holdouts._stages(config, screen, parts, done)
    found = holdouts._edges(stages, screen, parts, done, alpha=4.0)
    rows = screen.design.index(parts.held) - 1
    matching = metrics.match_latents(
        screen.truth.z[positions(parts.train)].numpy(),
        holdouts.latents(done.model, done.train),
    )
    graph = stages["learned"].model.prior.probabilities()[-len(rows) :]
    by_hand = metrics.graph_scores(screen.truth.graph[rows].numpy(), graph, matching)
    assert found["f1_new"] == by_hand["f1"]


def test_the_look_alike_has_controls_if_asked():
    options = {"n_targets": 40, "n_cells": 600, "n_genes": 30, "n_latent": 4}
    screen = READERS["look-alike-small-controls"](**options)
    cells = torch.bincount(screen.cells.condition)
    assert (int(cells[0]), int(cells[1:].sum())) == (2000, 600)
    without = READERS["look-alike-small"](**options)
    assert not (without.cells.condition == 0).any()
    assert torch.equal(screen.truth.graph, without.truth.graph)


def known_codes(shift, n_each, rng):
    """Cells whose codes have exactly these means, target by target; row 0 is the control."""
    condition = torch.arange(1, len(shift) + 1).repeat_interleave(n_each)
    noise = rng.standard_normal((len(shift), n_each, shift.shape[1]))
    noise -= noise.mean(1, keepdims=True)
    return (shift[:, None] + noise).reshape(-1, shift.shape[1]), condition


def test_edges_are_read_from_the_origin_and_axes_that_are_sparsest(monkeypatch):
    """Codes that are the true latents, moved by a constant and turned, have all their edges in
    the sparsest reading, in the centred one only if they were moved alone.
    """
    rng = np.random.default_rng(0)
    graph = np.zeros((24, 3), dtype=bool)
    graph[np.arange(12), np.arange(12) % 3] = True
    shift = 2.0 * graph
    true, condition = known_codes(shift, 40, rng)
    design = Design.single_target([f"t{i:02d}" for i in range(24)])
    positions = Cells(torch.arange(len(true))[:, None].double(), condition)
    screen = Screen(positions, design, {}, Truth(torch.from_numpy(true), torch.from_numpy(graph)))
    parts = holdouts.Split(design, design, *[positions] * 4)
    done = holdouts._Fitted(None, None, positions, positions, 0.0, "cpu")
    angle = 0.5
    turn = np.eye(3)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    scores = {}
    for name, axes in (("moved", np.eye(3)), ("turned", turn)):
        codes = true @ axes + [0.0, 1.5, -0.7]
        monkeypatch.setattr(holdouts, "latents", lambda *_, codes=codes, **__: codes)
        means = holdouts._means(codes, condition, design)
        monkeypatch.setattr(holdouts, "_mean_codes", lambda *_, means=means: means)
        scores[name] = holdouts._edges({}, screen, parts, done, alpha=4.0)
    assert scores["moved"]["f1_known_centred"] == scores["turned"]["f1_known_rotated"] == 1.0
    assert scores["moved"]["f1_known_rotated"] == scores["moved"]["f1_known_oracle"] == 1.0
    assert scores["turned"]["precision_known_centred"] < 0.8
    assert scores["moved"]["mcc"] == pytest.approx(1.0)
    assert scores["turned"]["mcc_rotated"] > 0.99 > scores["turned"]["mcc"]
    assert not any(name.endswith("_new") for name in scores["moved"])


def test_the_mean_code_of_a_target_is_over_the_cells_in_which_it_is_alone(toy):
    codes = np.arange(len(toy.cells), dtype=float)[:, None]
    means, n_cells = holdouts._means(codes, toy.cells.condition, toy.design)
    by_hand = [codes[toy.cells.condition == row].mean() for row in range(1, 7)]
    assert means[:, 0].tolist() == by_hand
    assert n_cells.tolist() == [N_EACH] * 6


def test_a_double_held_out_has_no_edges_to_score(toy):
    found = holdouts.experiment(CONFIG | {"group": "double"})
    assert not {"mcc", "f1_known", "f1_known_centred"} & set(found)


def prepared(path, *, controls, **uns):
    """Write a file as `smslib.prepare` does."""
    names = ["A", "B", "A+B", *([perturbseq.CONTROL] if controls else [])]
    target = np.repeat(names, 5)
    obs = pd.DataFrame(
        {"target": pd.Categorical(target)}, index=[f"c{i}" for i in range(len(target))]
    )
    counts = np.random.default_rng(0).poisson(3.0, (len(obs), 4)) + 1
    file = anndata.AnnData(X=counts.astype("float32"), obs=obs, uns=uns)
    file.write_h5ad(path)
    return target, counts


@pytest.mark.parametrize("controls", [True, False])
def test_a_prepared_screen_is_read_with_or_without_controls(monkeypatch, tmp_path, controls):
    monkeypatch.setenv("SMS_DATA_DIR", str(tmp_path))
    path = tmp_path / "ReplogleWeissman2022_K562_gwps-prepared.h5ad"
    target, counts = prepared(path, controls=controls, pathways={"one": np.array(["B"], object)})
    screen = holdouts._replogle()
    assert screen.design.conditions == (perturbseq.CONTROL, "A", "A+B", "B")
    assert screen.design.targets == ("A", "A+B", "B")  # every label a target of its own
    names = np.array(screen.design.conditions)[screen.cells.condition]
    assert names.tolist() == target.tolist()
    np.testing.assert_array_equal(screen.cells.counts.numpy(), counts)
    assert screen.groups == {"one": Group(("B",))}


def test_norman_in_full_holds_out_what_differs_most(monkeypatch, tmp_path):
    monkeypatch.setenv("SMS_DATA_DIR", str(tmp_path))
    path = tmp_path / "NormanWeissman2019_filtered-prepared.h5ad"
    prepared(path, controls=True, held_out=np.array(["A+B"], object))
    assert holdouts._norman().groups == {"mmd30": Group(("A+B",))}


@pytest.mark.parametrize("name", ["replogle", "norman"])
def test_a_screen_that_is_not_prepared_names_the_command(monkeypatch, tmp_path, name):
    monkeypatch.setenv("SMS_DATA_DIR", str(tmp_path))
    message = rf"make it with: python -m smslib.perturbseq prepare {name}20.*SMS_DATA_DIR"
    with pytest.raises(FileNotFoundError, match=message):
        READERS[name]()
    assert holdouts._SOURCES[name][0] in perturbseq.SOURCES


@pytest.mark.skipif(not perturbseq.available("papalexi2021"), reason="papalexi2021 not available")
def test_the_papalexi_study_holds_out_what_is_there():
    screen = holdouts._papalexi()
    asked = {c["group"] for c in holdouts.STUDIES["papalexi"]() if c["arm"] != "gates"}
    assert asked == set(screen.groups)
    cells = torch.bincount(screen.cells.condition)
    sizes = {name: int(cells[screen.design.index([name])]) for name in screen.design.targets}
    assert min(sizes.values()) >= 100
    smallest = min(sizes[name] for name in screen.groups["null"].held)
    others = set(screens.nulls()) - set(screen.groups["null"].held)
    assert all(sizes[name] <= smallest for name in others)


@pytest.mark.skipif(
    not perturbseq.available("norman2019-mini"), reason="norman2019-mini not available"
)
def test_the_norman_study_holds_out_what_is_there():
    screen = holdouts._norman_mini()
    assert set(screen.groups) == {c["group"] for c in holdouts.STUDIES["norman-mini"]()}
    doubles, glioma, known = screen.groups.values()
    assert set(doubles.held) == {
        *("KLF1+MAP2K6", "KLF1+TGFBR2", "MAP2K3+MAP2K6", "MAP2K3+SLC38A2", "MAPK1+TGFBR2")
    }
    assert doubles.dropped == glioma.held
    assert len(glioma.held) == 30  # nine targets and the controls, in three lines
    assert len(known.held) == 27
    for group in (glioma, known):
        assert set(group.sums["context"]) == set(group.sums["reversed"]) == set(known.held)
        assert group.sums["reversed"]["A172/PLK4"] == {"A172/control": 1.0, "PLK4": -1.0}
    trained = screens.without(screen.design, glioma.held)
    assert "PLK4" in trained.targets
    assert not [name for name in trained.targets if "/" in name]


# ---------------------------------------------------------------- gates of a fit to all


def test_ranking_by_hand(monkeypatch):
    targets = [*screens.PATHWAY, *screens.nulls(), "BRD4"]
    probability = np.full((len(targets), 2), 0.1)
    probability[:5] = 0.9
    probability[-1] = 1.0  # neither pathway nor null: not ranked
    shift = np.where(probability > 0.5, 1.0, 0.0)
    shift[5] = [3.0, 4.0]  # a null target with the longest shift
    probability[5, 0] = 0.7
    found = {"targets": targets, "probability": probability.ravel(), "shift": shift.ravel()}
    monkeypatch.setattr(screens, "gates", lambda config: found)
    result = holdouts.ranking({"labels": "true"})
    assert result["average_precision_gate"] == 1.0
    # The null target comes first, then the five of the pathway in one step.
    assert result["average_precision_shift"] == pytest.approx(5 / 6)
    assert result["open_share"] == pytest.approx((10 + 2 + 1) / (2 * len(targets)))
    assert result["null_targets_open"] == pytest.approx(1 / len(screens.nulls()))
    assert result["prior_share"] == 1 / (1 + len(targets))
    assert result["shift_norm"][5] == 5.0


# ---------------------------------------------------------------- the studies


@pytest.mark.parametrize("name", sorted(holdouts.STUDIES))
def test_every_configuration_is_one_that_a_run_understands(name):
    study = holdouts.STUDIES[name]()
    ids = [sweep.run_id(config) for config in study]
    assert len(set(ids)) == len(ids)
    assert {config["dataset"] for config in study} <= set(READERS)
    for config in study:
        assert config["method"] in METHODS
        assert config["arm"] in (*holdouts.ARMS, "gates")
        assert config["arm"] == "gates" or dict(holdouts.FITS[config["dataset"]]) == config["fit"]
    # Seed by seed, and the three that the paper is about first.
    first = [c for c in study if c["arm"] == "corrected" and c["group"] == study[0]["group"]]
    assert [c["method"] for c in first[:3]] == ["svae+", "ivae", "vae"]
    assert [c["seed"] for c in first] == sorted(c["seed"] for c in first)


@pytest.mark.parametrize(
    ("name", "arm", "n_groups", "n_seeds"),
    [
        ("papalexi", "corrected", 25, 10),
        ("papalexi", "published", 1, 5),
        ("norman-mini", "corrected", 3, 5),
        ("look-alike", "corrected", 8, 5),
        ("look-alike-small", "corrected", 8, 5),
        ("look-alike-small-controls", "corrected", 8, 5),
        ("replogle", "corrected", 8, 5),
        ("replogle", "published", 8, 5),
        ("norman", "corrected", 1, 5),
    ],
)
def test_a_study_has_every_group_by_every_method_and_seed(name, arm, n_groups, n_seeds):
    study = [config for config in holdouts.STUDIES[name]() if config["arm"] == arm]
    found = {(c["group"], c["method"], c["seed"]) for c in study}
    assert len(found) == len(study) == n_groups * 5 * n_seeds


def test_replogles_pathways_are_the_papers():
    from smslib.sources import TABLE_9

    assert {c["group"] for c in holdouts.STUDIES["replogle"]()} == set(TABLE_9)


# ---------------------------------------------------------------- the summary


def fake_runs(gaps, n_seeds=6):
    """Runs of svae+ and vae whose difference per perturbation is known."""
    rng, rows, study = np.random.default_rng(0), [], []
    for group, gap in gaps.items():
        for seed in range(n_seeds):
            base = -100 + rng.standard_normal(len(gap))
            for method in ("svae+", "vae"):
                config = {"dataset": "toy", "arm": "corrected", "group": group}
                config |= {"method": method, "seed": seed}
                better = np.array(gap) * (method == "svae+") + 0.01 * rng.standard_normal(len(gap))
                values = base + better
                row = {"run_id": sweep.run_id(config), **config, "fit.epochs": 3}
                row |= {"gain_after_sem": [0.1] * len(gap)}
                row |= {"perturbations": [f"{group}{i}" for i in range(len(gap))]}
                row |= {"iwelbo_after": values.tolist(), "i_nll_after": -values.mean()}
                row |= {"gain_at_5": [None] * len(gap), "n_scored": [4] * len(gap)}
                rows.append(row)
                study.append(config)
    return pd.DataFrame(rows), study


def test_summary_compares_methods_over_seeds_and_perturbations():
    runs, study = fake_runs({"many": [1.0, 2.0, 3.0, 0.5, 0.7, 0.4], "x": [1.0], "y": [-1.0]})
    values = holdouts.summarise(runs, study)
    key = "toy.corrected.many.svae+-vae"
    assert values[f"{key}.seeds.mean"] == pytest.approx(7.6 / 6, abs=0.02)
    assert values[f"{key}.perturbations.mean"] == pytest.approx(7.6 / 6, abs=0.02)
    assert values[f"{key}.seeds.n"] == values[f"{key}.perturbations.n"] == 6
    assert values[f"{key}.seeds.p_sign_flip"] == pytest.approx(2 / 64)
    assert values[f"{key}.seeds.p_holm"] == pytest.approx(4 * 2 / 64)  # four tests over seeds
    # A target held out by itself is one unit; all such targets together are a group.
    assert "toy.corrected.x.svae+-vae.perturbations.mean" not in values
    assert values["toy.corrected.singles.svae+-vae.perturbations.n"] == 2
    assert values["toy.corrected.singles.svae+-vae.perturbations.mean"] == pytest.approx(
        0, abs=0.02
    )


def test_summary_keeps_every_perturbation_and_seed():
    runs, study = fake_runs({"many": [1.0, 2.0]})
    values = holdouts.summarise(runs.sample(frac=1, random_state=0), study)
    key = "toy.corrected.many.svae+"
    assert values[f"{key}.perturbations"] == ["many0", "many1"]
    assert values[f"{key}.seeds"] == list(range(6))
    assert len(values[f"{key}.i_nll_after"]) == values[f"{key}.i_nll_after.n"] == 6
    mine = runs[runs["method"] == "svae+"]
    by_hand = np.mean(mine["iwelbo_after"].tolist(), axis=0)
    assert values[f"{key}.iwelbo_after.each"] == pytest.approx(by_hand.tolist())
    assert values[f"{key}.gain_at_5.each"] == [None, None]
    assert not [name for name in values if name.endswith("_sem.each")]


def test_of_the_edges_f1_is_summarised():
    runs, study = fake_runs({"many": [1.0, 2.0]})
    for name in ("f1_known", "precision_known", "average_precision_new_rotated"):
        runs[name] = 0.5
    runs["average_precision_gate"] = 0.9
    found = {key.split(".")[4] for key in holdouts.summarise(runs, study) if ".vae." in key}
    assert {"f1_known", "average_precision_gate", "i_nll_after"} <= found
    assert not {"precision_known", "average_precision_new_rotated"} & found


def test_a_study_resumes_and_is_stored(monkeypatch, tmp_path):
    study = [CONFIG | {"method": method} for method in ("svae+", "vae")]
    gates = {"dataset": "toy", "arm": "gates", "group": "true", "method": "svae+", "seed": 0}
    monkeypatch.setattr(holdouts, "STUDIES", {"toys": lambda: [*study, gates]})
    monkeypatch.setattr(holdouts, "ranking", lambda config: {"average_precision_gate": 0.9})
    sweep.run(holdouts.run, [*study, gates], tmp_path / "runs" / "holdouts-toys")
    assert holdouts.main(["toys", "--results", str(tmp_path), "--workers", "0"]) == 0
    stored = store.get("holdouts-toys", root=tmp_path)
    assert stored["toy.gates.true.svae+.average_precision_gate"] == [0.9]
    assert stored["toy.corrected.pair.vae.gain_after.each"] == [0.0, 0.0]
    assert stored["toy.corrected.pair.svae+-vae.perturbations.n"] == 2
    assert (stored.provenance["n_runs"], stored.provenance["n_missing"]) == (3, 0)


def test_the_command_line_runs_what_is_asked_for(monkeypatch, tmp_path):
    asked = {}

    def spy(task, wanted, root, **options):
        asked.update(task=task, groups={c["group"] for c in wanted}, root=root, **options)

    monkeypatch.setattr(sweep, "run", spy)
    monkeypatch.setattr(sweep, "conclude", lambda *_, **__: None)
    options = ["--results", str(tmp_path), "--workers", "1", "--index", "3", "--retry"]
    assert holdouts.main(["norman-mini", "--group", "doubles", *options]) == 0
    assert asked["groups"] == {"doubles"}
    assert (asked["index"], asked["retry"]) == (3, True)
    assert asked["root"] == tmp_path / "runs" / "holdouts-norman-mini"
    assert asked["task"] is holdouts.run


def test_an_unknown_group_is_refused_before_anything_runs(capsys, tmp_path):
    with pytest.raises(SystemExit):
        holdouts.main(["norman-mini", "--group", "triples", "--results", str(tmp_path)])
    assert "no group 'triples'" in capsys.readouterr().err


def test_nothing_to_summarise_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no finished run of holdouts-norman in"):
        holdouts.main(["norman", "--results", str(tmp_path), "--workers", "0"])
