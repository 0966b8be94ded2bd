"""The path along alpha: its fits, by hand and on a screen of a few cells, and its summary."""

import numpy as np
import pandas as pd
import pytest

from smslib import alpha_path, recipes, store

TINY = {"seed": 0, "steps": 5, "n_targets": 6, "n_latent": 3, "n_genes": 40, "n_cells": 10}
TINY |= {"effect": 3.0}


def test_gates_come_in_the_order_of_the_true_latents(monkeypatch):
    screen = alpha_path._screen(TINY)
    model, _ = recipes.build(screen.cells, screen.design, n_latent=3)
    swapped = screen.z.numpy()[:, [2, 0, 1]]
    gates = np.zeros((6, 3))
    gates[:, 1] = 1  # the second code is the first latent
    monkeypatch.setattr(alpha_path, "latents", lambda *_: swapped)
    monkeypatch.setattr(model.prior, "probabilities", lambda: gates)
    found = alpha_path._found(model, screen)
    assert found["mcc"] == pytest.approx(1)
    assert found["graph"].tolist() == screen.graph.int().ravel().tolist()
    np.testing.assert_array_equal(found["gates"].reshape(6, 3), [[100, 0, 0]] * 6)


def test_a_fit_scores_its_gates_and_knows_the_threshold():
    found = alpha_path.fit_at(TINY | {"alpha": 9})
    assert found["threshold"] == pytest.approx(2)  # 8 of 10 cells are trained on: sqrt(4 * 8 / 8)
    size, graph = found["size"].reshape(6, 3), found["graph"].reshape(6, 3)
    np.testing.assert_array_equal(size > 0, graph == 1)
    np.testing.assert_array_equal(graph.sum(1) >= 1, np.ones(6))
    assert 0 <= found["gates"].min() <= found["gates"].max() <= 100
    assert abs(found["n_edges"] - (found["gates"] > 50).sum()) <= (found["gates"] == 50).sum()
    assert np.isfinite(found["nll"])
    assert not found.keys() & (TINY | {"alpha": 9}).keys()


def test_alpha_and_nothing_else_of_it_reaches_the_fit(monkeypatch):
    penalties = []

    def record(model, train, plan, **_):
        penalties.append((float(model.prior.penalty().detach()), len(train), plan))

    monkeypatch.setattr(alpha_path, "fit", record)
    for alpha in (1, 3, 5):
        alpha_path.fit_at(TINY | {"alpha": alpha})
    (none, n, plan), *others = penalties
    assert n == 48
    assert none == 0 < others[0][0] < others[1][0]
    assert [other[1:] for other in others] == 2 * [(n, plan)]


def row(alpha, threshold, gates):
    scores = dict.fromkeys(("mcc", "f1", "precision", "recall", "nll"), alpha / 10)
    told = {"graph": [1, 0, 1], "size": [2.0, 0.0, 3.0], "gates": gates, "n_edges": 1.0}
    return TINY | {"alpha": alpha, "threshold": threshold} | scores | told


def test_summary_by_hand():
    runs = pd.DataFrame([row(30, 2.5, [0, 0, 99]), row(1, 0.0, [99, 98, 97])])
    values = alpha_path.summarise(runs)
    assert values["alpha"] == [1, 30]
    assert values["mcc"] == [0.1, 3.0]
    assert values["n_above"] == [2, 1]
    assert (values["gates.alpha1"], values["gates.alpha30"]) == ([99, 98, 97], [0, 0, 99])
    assert (values["n_targets"], values["graph"]) == (6, [1, 0, 1])


def test_the_command_runs_what_is_missing_and_stores_a_summary(monkeypatch, tmp_path, capsys):
    runs = [TINY | {"alpha": alpha} for alpha in (1, 3)]
    monkeypatch.setattr(alpha_path, "_runs", lambda: runs)
    assert alpha_path.main(["--results", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'alpha_path.json'}\n"
    stored = store.get("alpha_path", root=tmp_path)
    assert stored["alpha"] == [1, 3]
    assert stored.provenance["n_runs"] == 2
    monkeypatch.setattr(alpha_path, "fit_at", dict)  # nothing is missing any more
    alpha_path.main(["--results", str(tmp_path)])
    assert store.get("alpha_path", root=tmp_path) == stored


def test_what_is_stored_is_a_path_of_one_screen(root):
    stored = store.get("alpha_path", root=root / "book" / "results")
    assert stored["alpha"] == list(alpha_path.ALPHAS)
    graph = np.array(stored["graph"])
    for n, alpha in enumerate(alpha_path.ALPHAS):
        gates = np.array(stored[f"gates.alpha{alpha}"])
        unsure = (gates == 50).sum()
        assert abs((gates > 50).sum() - stored["n_edges"][n]) <= unsure
        hits = round(stored["recall"][n] * graph.sum())
        assert abs((gates[graph == 1] > 50).sum() - hits) <= unsure
    assert (root / "book" / "results" / "alpha_path.json").stat().st_size < 30_000
