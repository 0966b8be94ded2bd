"""The scverse verbs on a small AnnData."""

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from smslib import estimator
from smslib.estimator import SMS
from smslib.train import History

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


def test_fewer_epochs_have_a_shorter_warm_up(monkeypatch):
    used = []
    monkeypatch.setattr(estimator, "fit", lambda *args, **_: used.append(args[2]) or History())
    for epochs in (None, 20):
        make_model().train(epochs=epochs)
    shares = [config.warmup_epochs / config.epochs for config in used]
    assert used[0].epochs > used[1].epochs == 20
    np.testing.assert_allclose(shares, 0.3, atol=0.01)


def test_the_split_is_stratified_and_keeps_every_cell():
    model = make_model()
    assert len(model._train) + len(model._validation) == 60
    assert np.bincount(model._validation.condition).tolist() == [2, 2, 2]


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
    loaded = SMS.load(tmp_path, fitted.adata)
    np.testing.assert_array_equal(
        loaded.get_latent_representation(), fitted.get_latent_representation()
    )
    pd.testing.assert_frame_equal(loaded.get_graph(), fitted.get_graph())


def test_setup_survives_a_file(tmp_path):
    adata = make_adata()
    SMS.setup_anndata(adata, **SETUP)
    adata.write_h5ad(tmp_path / "screen.h5ad")
    again = SMS(anndata.read_h5ad(tmp_path / "screen.h5ad"), n_latent=2)
    assert repr(again) == (
        "SMS(60 cells, 12 genes, 3 conditions, 2 latents; not fitted: call .train())"
    )


# ---------------------------------------------------------------- errors


def test_adata_must_be_set_up():
    with pytest.raises(ValueError, match=r"not set up; call SMS\.setup_anndata"):
        SMS(make_adata())


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
    fewer = make_adata(n_genes=5)
    SMS.setup_anndata(fewer, **SETUP)
    with pytest.raises(ValueError, match="adata has 5 genes, the saved model 12"):
        SMS.load(tmp_path, fewer)
    renamed = make_adata(("none", "a", "z"))
    SMS.setup_anndata(renamed, **SETUP)
    with pytest.raises(ValueError, match="other conditions than the saved model"):
        SMS.load(tmp_path, renamed)
