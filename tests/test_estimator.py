"""The scverse verbs on a small AnnData."""

import copy
import json
import re
import warnings
from dataclasses import replace
from pathlib import Path

import anndata
import jaxtyping
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from smslib import estimator, gauge, recipes, transfer
from smslib.data import Cells
from smslib.estimator import SMS, stability
from smslib.evaluate import elbo, iwelbo
from smslib.recipes import RECIPES
from smslib.train import History

pytestmark = pytest.mark.filterwarnings("ignore:every gate is open")  # short fits

README = Path(__file__).parents[1] / "README.md"
N_GENES = 12
SETUP = {"perturbation_key": "target", "control": "none"}


def make_adata(conditions=("none", "a", "b"), n_genes=N_GENES):
    rng = np.random.default_rng(0)
    target = np.repeat(conditions, 20)
    counts = rng.poisson(3.0, (len(target), n_genes)) + 1
    counts[target == "a", 0] += 20
    return anndata.AnnData(
        X=sparse.csr_matrix(counts),
        obs=pd.DataFrame({"target": target}, index=[f"cell{i}" for i in range(len(target))]),
        var=pd.DataFrame(index=[f"gene{i}" for i in range(n_genes)]),
    )


def make_model(adata=None, **options):
    adata = make_adata() if adata is None else adata
    SMS.setup_anndata(adata, **SETUP)
    return SMS(adata, n_latent=2, **options)


def trainings(monkeypatch):
    """Return a list that takes up the configuration of every fit, which is not made."""
    used = []
    monkeypatch.setattr(estimator, "fit", lambda *args, **_: used.append(args[2]) or History())
    return used


def extra_gene():
    adata = make_adata(n_genes=1)
    adata.var_names = ["another"]
    return adata


@pytest.fixture(scope="module")
def fitted():
    model = make_model()
    model.train(epochs=3, progress=False)
    return model


def test_verbs_in_order(fitted):
    assert len(fitted.history.rows) == 3
    assert fitted.get_latent_representation().shape == (60, 2)
    assert fitted.get_graph().index.tolist() == ["a", "b"]
    assert fitted.get_graph().to_numpy().min() >= 0
    assert fitted.get_shifts().shape == (2, 2)
    assert repr(fitted) == "SMS(60 cells, 12 genes, 3 conditions, 2 latents; fitted)"


def test_the_sparsest_axes_are_those_of_the_mean_codes(fitted):
    frame = fitted.get_sparsest_axes(alpha=3.0)
    codes, target = fitted.get_latent_representation(), fitted.adata.obs["target"]
    means = np.stack([codes[target == name].mean(0) for name in ("a", "b")])
    by_hand = gauge.sparsest(means, np.array([20, 20]), alpha=3.0)
    np.testing.assert_allclose(frame.axes, by_hand.axes, atol=1e-6)
    np.testing.assert_allclose(frame.of(codes), (codes - frame.origin) @ frame.axes)
    default = fitted.get_sparsest_axes()
    np.testing.assert_allclose(default.axes, fitted.get_sparsest_axes(alpha=0.45 * 20).axes)


def test_pairs_do_not_choose_axes():
    model = make_model(make_adata(("none", "a", "b", "a+b")))
    model.train(epochs=1, progress=False)
    assert model.module.prior.design.targets == ("a", "b")
    codes = model.get_latent_representation()
    means = np.stack([codes[model.adata.obs["target"] == name].mean(0) for name in ("a", "b")])
    expected = gauge.sparsest(means, np.array([20, 20]), alpha=3.0)
    np.testing.assert_allclose(model.get_sparsest_axes(alpha=3.0).axes, expected.axes, atol=1e-6)
    alone = make_model(make_adata(("none", "a+b", "c+d")))
    alone.train(epochs=1, progress=False)
    with pytest.raises(ValueError, match="no condition of this screen has one target alone"):
        alone.get_sparsest_axes()


def test_expected_shift_is_gate_times_slab(fitted):
    slab = fitted.module.prior.slab().detach().numpy()
    np.testing.assert_allclose(fitted.get_shifts(), fitted.get_graph() * slab, rtol=1e-6)


def test_more_draws_tighten_the_bound(fitted):
    assert fitted.get_elbo() < fitted.get_marginal_ll(n_draws=200) < 0


def test_training_improves_the_elbo():
    model = make_model()
    history = model.train(epochs=25, progress=False).frame()
    assert history["validation_elbo"].max() > history["validation_elbo"].iloc[0] + 1


def test_a_training_with_a_checkpoint_is_made_once(tmp_path, monkeypatch):
    first = make_model()
    first.train(epochs=3, checkpoint=tmp_path / "fit.ckpt", progress=False)
    monkeypatch.setattr("smslib.train._epoch", None)
    again = make_model()
    again.train(epochs=3, checkpoint=tmp_path / "fit.ckpt", progress=False)
    assert again.get_shifts().equals(first.get_shifts())


def test_latents_take_the_condition_into_account(fitted):
    relabelled = make_adata()
    relabelled.obs["target"] = relabelled.obs["target"].map({"none": "a", "a": "none", "b": "b"})
    SMS.setup_anndata(relabelled, **SETUP)
    other = make_model(relabelled)
    other.module, other.history = fitted.module, fitted.history
    before, after = (front.get_latent_representation() for front in (fitted, other))
    expected = fitted.module.prior().mean.detach().numpy()
    assert np.abs(expected[1] - expected[0]).max() > 1e-3
    np.testing.assert_allclose(after[40:], before[40:], atol=1e-5)
    assert np.abs(after[:40] - before[:40]).max() > 1e-4


@pytest.mark.parametrize(("recipe", "share"), [("smslib", 0.3), ("screen", 0.3), ("paper", 1 / 6)])
def test_fewer_epochs_have_a_shorter_warm_up(recipe, share, monkeypatch):
    used = trainings(monkeypatch)
    for epochs in (None, 30):
        make_model(recipe=recipe).train(epochs=epochs)
    shares = [config.warmup_epochs / config.epochs for config in used]
    assert used[0].epochs > used[1].epochs == 30
    np.testing.assert_allclose(shares, share, atol=0.01)


def test_one_epoch_is_warmed_up_if_any_are(monkeypatch):
    used = trainings(monkeypatch)
    make_model().train(epochs=1)
    assert used[0].warmup_epochs == 1


def test_other_fields_of_the_training_can_be_set(monkeypatch):
    used = trainings(monkeypatch)
    make_model().train(epochs=2, max_grad_norm=10.0, learning_rate=1e-3)
    assert (used[0].max_grad_norm, used[0].learning_rate, used[0].epochs) == (10.0, 1e-3, 2)


def test_a_recipe_of_ones_own_is_taken(monkeypatch):
    used = trainings(monkeypatch)
    make_model(recipe=RECIPES["screen"].with_train(max_grad_norm=3.0)).train()
    assert used[0].max_grad_norm == 3.0


def test_the_split_is_stratified_and_most_cells_train(monkeypatch):
    seen = []
    monkeypatch.setattr(
        estimator, "fit", lambda _, train, *_more, **kept: seen.append((train, kept)) or History()
    )
    model = make_model()
    model.train()
    (train, kept) = seen[0]
    assert np.bincount(train.condition).tolist() == [18, 18, 18]
    assert np.bincount(kept["validation"].condition).tolist() == [2, 2, 2]
    held = model.adata[model.validation_indices]
    np.testing.assert_array_equal(kept["validation"].counts, held.X.toarray())


def test_scores_of_chosen_cells_are_those_of_these_cells(fitted):
    held = fitted.adata[fitted.validation_indices]
    cells = Cells(
        torch.tensor(held.X.toarray(), dtype=torch.float32),
        torch.tensor([["none", "a", "b"].index(name) for name in held.obs["target"]]),
    )
    expected = float(elbo(fitted.module, cells).mean())
    assert fitted.get_elbo(held) == pytest.approx(expected)
    assert fitted.get_elbo(held) != pytest.approx(fitted.get_elbo(), abs=1e-3)
    assert fitted.get_marginal_ll(held, n_draws=20) == pytest.approx(
        float(iwelbo(fitted.module, cells, n_draws=20).mean())
    )


@pytest.mark.parametrize(
    ("options", "squared"),
    [
        ({"sparsity": 10.0}, 4 * 9 / 18),
        ({"method": "svae", "sparsity": 12.0}, 2 * 12 / 18),
        ({"method": "ivae"}, 0.0),
        ({}, 4 * (2 - 1) / 18),  # alpha is the number of targets
    ],
)
def test_thresholds_are_those_of_the_ladder(options, squared):
    """sqrt(4 (alpha - 1) / n) for the 18 of 20 cells of a target that are trained on."""
    thresholds = make_model(**options).get_thresholds()
    assert thresholds.index.tolist() == ["a", "b"]
    np.testing.assert_allclose(thresholds, squared**0.5)


def test_thresholds_of_sams_vae_hold_the_price_of_a_shift():
    """n^2 m^2 / 2 (n + 1) - log(n + 1) / 2 = log 9 at n = 18 and p = .1."""
    thresholds = make_model(method="sams-vae", sparsity=0.1).get_thresholds()
    expected = np.sqrt(19 * (2 * np.log(9) + np.log(19))) / 18
    np.testing.assert_allclose(thresholds, expected)


def test_thresholds_are_those_of_the_training_that_was_made(tmp_path, monkeypatch):
    """sqrt(4 (alpha - 1) / (beta n)) under a weight beta of the KL term."""
    model = make_model(sparsity=10.0)
    model.train(epochs=1, beta=4.0, learning_rate=1e-4, progress=False)
    np.testing.assert_allclose(model.get_thresholds(), np.sqrt(4 * 9 / (4 * 18)))
    model.save(tmp_path)
    loaded = SMS.load(tmp_path, model.adata)
    assert loaded.get_thresholds().equals(model.get_thresholds())
    kept = json.loads((tmp_path / "front.json").read_text())["training"]
    assert (kept["epochs"], kept["beta"], kept["learning_rate"]) == (1, 4.0, 1e-4)
    adapted = loaded.adapt(newcomers())
    np.testing.assert_allclose(adapted.get_thresholds()["new"], np.sqrt(4 * 9 / (4 * 20)))
    used = []
    monkeypatch.setattr(transfer, "adapt", lambda *_, **kept: used.append(kept) or model.module)
    loaded.adapt(newcomers())
    assert used[0]["beta"] == 4.0


def test_gates_that_never_moved_are_warned_of(monkeypatch):
    trainings(monkeypatch)
    model = make_model()
    model.train()
    with pytest.warns(UserWarning, match="every gate is open, as before the training"):
        model.get_graph()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dense = make_model(method="ivae")
        dense.train()
        dense.get_graph()


# ---------------------------------------------------------------- several fits


def turned(model, order):
    """Return a copy of a fit with its latents in another order, some with another sign."""
    other = copy.copy(model)
    other.module = copy.deepcopy(model.module)
    other.get_latent_representation = lambda: model.get_latent_representation()[:, order] * [-1, 1]
    return other


def test_stability_matches_latents_before_it_counts(fitted):
    gates = torch.tensor([[3.0, -3.0], [-3.0, -3.0]])
    first, second = turned(fitted, [0, 1]), turned(fitted, [1, 0])
    first.module.prior.gate.logit.data = gates
    second.module.prior.gate.logit.data = gates[:, [1, 0]]
    shares = stability([first, second, first])
    assert shares.index.tolist() == ["a", "b"]
    np.testing.assert_allclose(shares, [[1, 0], [0, 0]], atol=1e-12)
    second.module.prior.gate.logit.data = gates
    np.testing.assert_allclose(stability([first, second]), [[0.5, 0.5], [0, 0]], atol=1e-12)


def test_stability_wants_several_fits_of_the_same_cells(fitted):
    with pytest.raises(ValueError, match="models holds 1; expected two fits or more"):
        stability([fitted])
    other = make_model(make_adata(("none", "a", "c")))
    other.train(epochs=1, progress=False)
    with pytest.raises(ValueError, match="the models have other targets"):
        stability([fitted, other])
    fewer = make_model(fitted.adata[::2].copy())
    fewer.train(epochs=1, progress=False)
    with pytest.raises(ValueError, match=r"\(30, 2\), \(60, 2\)"):
        stability([fitted, fewer])
    order = make_model(fitted.adata[::-1].copy())
    order.train(epochs=1, progress=False)
    with pytest.raises(ValueError, match="other cells, or of the same in another order"):
        stability([fitted, order])


# ---------------------------------------------------------------- new perturbations


def newcomers():
    """Return cells of the known condition b and of a new one, without controls."""
    return make_adata(("b", "new"))


def test_adapting_learns_the_new_shift_and_nothing_else(fitted):
    adapted = fitted.adapt(newcomers(), gates="open")
    assert adapted.get_shifts().index.tolist() == ["a", "b", "new"]
    np.testing.assert_array_equal(adapted.get_graph().loc["new"], 1.0)
    before, after = fitted.module.state_dict(), adapted.module.state_dict()
    same = [name for name in before if not name.startswith("prior.")]
    assert len(same) > 5
    assert all(torch.equal(before[name], after[name]) for name in same)
    codes = adapted.get_latent_representation()[20:]
    np.testing.assert_allclose(adapted.get_shifts().loc["new"], codes.mean(0), atol=2e-3)


def test_learned_gates_of_a_new_target_ask_for_evidence():
    model = make_model(sparsity=1e6)
    model.train(epochs=3, progress=False)
    adapted = model.adapt(newcomers())
    np.testing.assert_array_equal(adapted.get_graph().loc["new"], 0.0)
    expected = np.sqrt(4 * (1e6 - 1) / np.array([18, 18, 20]))
    np.testing.assert_allclose(adapted.get_thresholds(), expected, rtol=1e-6)


def test_an_adapted_model_is_saved_like_another_and_is_not_trained(fitted, tmp_path):
    adapted = fitted.adapt(newcomers(), gates="open")
    adapted.save(tmp_path)
    loaded = SMS.load(tmp_path, newcomers())
    pd.testing.assert_frame_equal(loaded.get_shifts(), adapted.get_shifts())
    assert np.isfinite(loaded.get_elbo())
    assert loaded.get_thresholds()["new"] == 0.0
    for front in (adapted, loaded, fitted.adapt(renamed_in_place())):
        with pytest.raises(ValueError, match=r"comes from adapt, which .* make a new model, SMS"):
            front.train(epochs=1)


def renamed_in_place():
    """Return the cells that the model was trained on, some under a label that it does not know."""
    adata = make_adata()
    adata.obs["target"] = adata.obs["target"].replace({"b": "new"})
    return adata


def test_labels_made_of_known_targets_have_their_shifts_and_nothing_to_learn():
    model = make_model(make_adata(("none", "a+b", "b", "c")))
    model.train(epochs=3, progress=False)
    adapted = model.adapt(make_adata(("a", "a+c+none", "none+none", "new")), gates="open")
    shifts, prior = adapted.get_shifts(), adapted.module.prior
    assert shifts.index.tolist() == ["a", "b", "c", "new"]
    assert adapted.get_latent_representation().shape == (80, 2)
    found = dict(zip(prior.conditions, prior.mode().detach().numpy(), strict=True))
    np.testing.assert_array_equal(found["a"], shifts.loc["a"])
    np.testing.assert_allclose(found["a+c+none"], shifts.loc["a"] + shifts.loc["c"], rtol=1e-6)
    np.testing.assert_array_equal(found["none+none"], 0.0)
    np.testing.assert_array_equal(
        shifts[:3],
        transfer.binarise(model.module).prior.slab().detach() * model.module.prior.graph(),
    )


def test_new_labels_of_the_same_parts_are_one_target(fitted):
    adapted = fitted.adapt(make_adata(("e+none", "e", "none+e", "f+g", "g+f")), gates="open")
    assert adapted.module.prior.targets == ("a", "b", "e", "f+g")
    shifts, codes = adapted.get_shifts(), adapted.get_latent_representation()
    np.testing.assert_allclose(shifts.loc["e"], codes[:60].mean(0), atol=5e-3)
    np.testing.assert_allclose(shifts.loc["f+g"], codes[60:].mean(0), atol=5e-3)


def test_cells_are_given_in_the_order_of_the_models_genes(fitted, tmp_path):
    fitted.save(tmp_path)
    loaded = SMS.load(tmp_path, fitted.adata[:, ::-1].copy())
    assert loaded.genes == tuple(fitted.adata.var_names)
    assert torch.equal(loaded.cells.counts, fitted.cells.counts)


@pytest.mark.parametrize("change", ["labels", "counts"])
def test_the_same_names_are_not_the_same_cells(fitted, tmp_path, change):
    """Cells held out by other labels, or other cells by the same names, would have been seen."""
    fitted.save(tmp_path)
    other = make_adata()
    if change == "labels":
        other.obs["target"] = other.obs["target"].replace({"b": "a"})
    else:
        other.X = other.X * 2
    loaded = SMS.load(tmp_path, other)
    with pytest.raises(ValueError, match="other cells, in another order or under other labels"):
        _ = loaded.validation_indices
    with pytest.raises(ValueError, match="in front of other cells"):
        stability([fitted, loaded])


def test_a_single_target_has_a_sparsity():
    model = make_model(make_adata(("none", "a")))
    assert model.module.prior.gate.asked() > 0


def test_nothing_new_is_no_adaptation(fitted):
    with pytest.raises(ValueError, match="no condition beyond the 3 that the model knows"):
        fitted.adapt(make_adata(("a", "b")))


def test_counts_may_be_in_a_layer():
    adata = make_adata()
    adata.layers["raw"] = adata.X.copy()
    adata.X = adata.X.log1p()
    SMS.setup_anndata(adata, **SETUP, layer="raw")
    np.testing.assert_array_equal(SMS(adata)._cells.counts, adata.layers["raw"].toarray())


@pytest.mark.parametrize("method", ["vae", "ivae", "svae"])
@pytest.mark.parametrize("recipe", ["paper", "corrected"])
def test_other_methods_and_recipes(method, recipe):
    model = make_model(method=method, recipe=recipe)
    model.train(epochs=1, progress=False)
    assert np.isfinite(model.get_elbo())


def test_saved_model_answers_the_same(fitted, tmp_path):
    fitted.save(tmp_path)
    loaded = SMS.load(tmp_path, make_adata())
    for verb in ("get_latent_representation", "get_graph", "get_shifts", "get_thresholds"):
        np.testing.assert_array_equal(getattr(loaded, verb)(), getattr(fitted, verb)())
    np.testing.assert_array_equal(loaded.get_sparsest_axes().axes, fitted.get_sparsest_axes().axes)
    np.testing.assert_array_equal(loaded.validation_indices, fitted.validation_indices)
    pd.testing.assert_frame_equal(loaded.history.frame(), fitted.history.frame())


def test_a_loaded_model_is_trained_as_it_would_have_been(tmp_path, monkeypatch):
    model = make_model(recipe="paper", seed=7)
    model.train(epochs=1, progress=False)
    model.save(tmp_path)
    loaded = SMS.load(tmp_path, model.adata)
    used = trainings(monkeypatch)
    for each in (model, loaded):
        each.train()
    assert used[0] == used[1]
    assert (used[0].epochs, used[0].seed) == (300, 7)


def test_a_front_saved_before_its_thresholds_were_kept_is_read(fitted, tmp_path):
    fitted.save(tmp_path)
    note = json.loads((tmp_path / "front.json").read_text())
    del note["thresholds"], note["training"]
    old = note | {"seen": [18.0, 18.0], "asked": 2.0}
    (tmp_path / "front.json").write_text(json.dumps(old))
    loaded = SMS.load(tmp_path, fitted.adata)
    np.testing.assert_allclose(loaded.get_thresholds(), fitted.get_thresholds())


def test_numbers_of_numpy_can_be_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside the tests
    adata = make_adata(("0", "1", "2"))
    SMS.setup_anndata(adata, perturbation_key="target", control=np.int64(0))
    assert adata.uns["_smslib"]["control"] == "0"
    adata.uns["_smslib"]["control"] = np.int64(0)  # as files of before have it
    options = {"n_latent": np.int64(2), "sparsity": np.float32(4), "seed": np.int64(3)}
    model = SMS(adata, **options)
    model.train(epochs=np.int64(1), learning_rate=np.float32(1e-3), progress=False)
    model.save(tmp_path)
    assert SMS.load(tmp_path, adata).get_graph().equals(model.get_graph())


def test_a_failed_save_leaves_the_old_front(fitted, tmp_path):
    fitted.save(tmp_path)
    other = make_model(seed=1)
    other.train(epochs=1, progress=False)
    other._genes = {"no": b"json"}
    with pytest.raises(TypeError, match="not JSON serializable"):
        other.save(tmp_path)
    assert SMS.load(tmp_path, fitted.adata).get_shifts().equals(fitted.get_shifts())


def test_loading_leaves_the_global_random_state_alone(fitted, tmp_path):
    fitted.save(tmp_path)
    before = torch.random.get_rng_state()
    SMS.load(tmp_path, fitted.adata)
    assert torch.equal(before, torch.random.get_rng_state())


def test_genes_are_found_by_name(fitted, tmp_path):
    fitted.save(tmp_path)
    turned_round = make_adata()[:, ::-1].copy()
    more = anndata.concat([turned_round, extra_gene()], axis=1, merge="first")
    for adata in (turned_round, more):
        loaded = SMS.load(tmp_path, adata)
        np.testing.assert_array_equal(
            loaded.get_latent_representation(), fitted.get_latent_representation()
        )


def test_other_cells_of_known_conditions_can_stand_behind_a_model(fitted, tmp_path):
    fitted.save(tmp_path)
    some = make_adata()[30:50]
    loaded = SMS.load(tmp_path, some)
    expected = fitted.get_latent_representation()[30:50]
    np.testing.assert_allclose(loaded.get_latent_representation(), expected, atol=1e-6)
    np.testing.assert_allclose(fitted.get_latent_representation(some), expected, atol=1e-6)
    assert loaded.get_thresholds().equals(fitted.get_thresholds())
    with pytest.raises(ValueError, match="other cells, in another order"):
        _ = loaded.validation_indices


def test_setup_survives_a_file(tmp_path):
    adata = make_adata()
    SMS.setup_anndata(adata, **SETUP)
    adata.write_h5ad(tmp_path / "screen.h5ad")
    again = SMS(anndata.read_h5ad(tmp_path / "screen.h5ad"), n_latent=2)
    assert repr(again) == (
        "SMS(60 cells, 12 genes, 3 conditions, 2 latents; not fitted: call .train())"
    )


def test_the_lines_of_the_readme_work(tmp_path, monkeypatch):
    (lines,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    short = replace(RECIPES["screen"], steps=10, fewest_epochs=2)
    monkeypatch.setattr(recipes, "RECIPES", {"screen": short})
    monkeypatch.chdir(tmp_path)
    names = {"none": "non-targeting"}
    for file, conditions in {
        "my_screen": ("none", "a", "b"),
        "new_perturbations": ("new",),
    }.items():
        adata = make_adata(conditions)
        adata.obs["target"] = adata.obs["target"].replace(names)
        adata.write_h5ad(tmp_path / f"{file}.h5ad")
    made = {}
    exec(lines, made)
    assert made["adata"].obsm["X_sms"].shape == (60, 15)
    assert made["later"].get_shifts().index.tolist() == ["a", "b", "new"]


# ---------------------------------------------------------------- errors


def test_adata_must_be_set_up():
    with pytest.raises(ValueError, match=r"not set up; call SMS\.setup_anndata"):
        SMS(make_adata())


def test_a_screen_without_cells_to_validate_by_is_refused():
    with pytest.raises(ValueError, match="of 12 cells none is left to validate by"):
        make_model(make_adata()[[*range(4), *range(20, 24), *range(40, 44)]].copy())


def test_setup_refuses_what_the_door_refuses():
    with pytest.raises(ValueError, match="control 'ctrl' is not among the conditions"):
        SMS.setup_anndata(make_adata(), perturbation_key="target", control="ctrl")
    unlabelled = make_adata()
    unlabelled.obs.loc["cell3", "target"] = None
    with pytest.raises(ValueError, match=r"1 missing labels, first in cell 'cell3'; drop these"):
        SMS.setup_anndata(unlabelled, **SETUP)
    with pytest.raises(KeyError, match=r"perturbation_key 'targt' .* nearest known: \['target'\]"):
        SMS.setup_anndata(make_adata(), perturbation_key="targt", control="none")


VERBS = [
    "get_latent_representation",
    "get_elbo",
    "get_marginal_ll",
    "get_graph",
    "get_shifts",
]


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_want_a_fit(verb):
    with pytest.raises(ValueError, match=r"not fitted; call \.train\(\) first"):
        getattr(make_model(), verb)()


def test_saving_wants_a_fit(tmp_path):
    with pytest.raises(ValueError, match="not fitted"):
        make_model().save(tmp_path)


def test_loading_in_front_of_other_data_is_refused(fitted, tmp_path):
    fitted.save(tmp_path)
    with pytest.raises(ValueError, match=r"lacks 7 of the 12 genes .* unknown gene 'gene5'"):
        SMS.load(tmp_path, make_adata(n_genes=5))
    with pytest.raises(KeyError, match=r"unknown condition 'z'; known: \['none', 'a', 'b'\]"):
        SMS.load(tmp_path, make_adata(("none", "a", "z")))


def test_a_model_without_its_genes_is_refused(fitted, tmp_path):
    fitted.module.save(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"front\.json is missing.*SMSVAE\.load reads it"):
        SMS.load(tmp_path, fitted.adata)


@pytest.mark.parametrize("damage", ["{", "[]", '{"weights_sha256": "0"}', '{"genes": 3}'])
def test_a_damaged_note_is_refused(damage, fitted, tmp_path):
    fitted.save(tmp_path)
    (tmp_path / "front.json").write_text(damage)
    with pytest.raises(ValueError, match=r"front\.json is damaged"):
        SMS.load(tmp_path, fitted.adata)


def test_halves_of_two_models_are_refused(fitted, tmp_path):
    other = make_model(seed=1)
    other.train(epochs=1, progress=False)
    fitted.save(tmp_path)
    other.module.save(tmp_path)
    with pytest.raises(ValueError, match="its weights are those of another model"):
        SMS.load(tmp_path, fitted.adata)
