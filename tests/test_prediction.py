"""Predicted effects against quadrature, simulation and truth; baselines and scores by hand."""

from concurrent.futures import ThreadPoolExecutor

import jaxtyping
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse, stats
from scipy.spatial import distance
from sklearn.decomposition import PCA
from sklearn.metrics import r2_score

from smslib import perturbseq, prediction, screens, simulate, store, sweep
from smslib.data import Cells, Design
from smslib.model import SMSVAE
from smslib.prediction import (
    Known,
    additive,
    additive_shrunk,
    effects,
    embed,
    nearest,
    no_effect,
    predict,
    predicted_effects,
    ridge,
    score,
    training_mean,
)

DESIGN = Design.single_target(["a", "b", "c"])
PAIRS = Design(
    ("control", "a", "a+b", "b", "c"),
    ("a", "b", "c"),
    torch.tensor([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 1.0]]),
)


def make_model(design=DESIGN, *, method="ivae", n_genes=6, n_latent=2, **options):
    return SMSVAE.preset(method, design, n_genes, n_latent=n_latent, n_hidden=8, **options)


def set_shift(model, shift):
    with torch.no_grad():
        model.prior.slab.mean.copy_(torch.as_tensor(shift))


# ---------------------------------------------------------------- what a model predicts


def test_expression_adds_up_to_the_library():
    found = predict(make_model(), ["control", "a", "b+c"], library=321.0, n_draws=50)
    assert found.shape == (3, 6)
    np.testing.assert_allclose(found.sum(1), 321.0, rtol=1e-5)


def test_one_latent_against_quadrature():
    model = make_model(n_latent=1)
    set_shift(model, [[1.5], [-1.0], [0.0]])
    z = torch.linspace(-9, 9, 4001)[:, None]
    with torch.no_grad():
        rate = model.decode(z, torch.full_like(z, 100.0)).mean.double().numpy()
    level = {
        name: np.trapezoid(rate.T * stats.norm.pdf(z[:, 0].numpy(), mean), z[:, 0].numpy())
        for name, mean in {"control": 0.0, "a": 1.5, "b": -1.0, "a+b": 0.5}.items()
    }
    names = ["a", "b", "a+b"]
    found = predict(model, names, library=100.0, n_draws=200_000)
    np.testing.assert_allclose(found, [level[name] for name in names], rtol=5e-3)
    shown = predicted_effects(model, names, library=100.0, n_draws=20_000)
    truth = [np.log1p(level[name]) - np.log1p(level["control"]) for name in names]
    assert np.abs((shown.value - truth) / shown.standard_error).max() < 4


def test_no_shift_is_no_effect_to_the_last_bit():
    model = make_model()
    set_shift(model, [[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    found = predicted_effects(model, ["control", "a", "a+b", "c"], n_draws=20)
    assert not found.value[:3].any()
    assert not found.standard_error[:3].any()
    assert found.value[3].all()
    assert found.standard_error[3].all()


@pytest.mark.parametrize("method", ["vae", "beta-vae"])
def test_models_without_shifts_predict_the_control(method):
    found = predicted_effects(make_model(method=method), ["a", "b+c"], n_draws=20)
    assert not found.value.any()


def test_shut_gates_move_nothing():
    model = make_model(method="svae+")
    with torch.no_grad():
        model.prior.gate.logit.copy_(torch.tensor([[-0.1, -9.0], [0.1, -9.0], [9.0, 9.0]]))
    found = predicted_effects(model, ["a", "b"], n_draws=20).value
    assert not found[0].any()
    assert found[1].any()


def test_an_unseen_combination_has_the_sum_of_the_shifts():
    model = make_model()
    shift = model.prior.slab.mean.detach()
    single = make_model(Design.single_target(["sum"]))
    single.load_state_dict(
        model.state_dict()
        | {"prior.slab.mean": shift[:2].sum(0)[None], "prior.gate.probability": torch.ones(1, 2)}
    )
    expected = predict(single, ["sum"], n_draws=30)
    np.testing.assert_allclose(predict(model, ["a+b"], n_draws=30), expected, rtol=1e-5)
    np.testing.assert_allclose(predict(model, ["b+control+a"], n_draws=30), expected, rtol=1e-5)


def test_the_targets_of_a_sum_are_separated_as_in_the_labels():
    model = make_model(Design.single_target(["HLA+A", "b"]))
    expected = predict(make_model(Design.single_target(["a", "b"])), ["a+b"], n_draws=30)
    np.testing.assert_array_equal(predict(model, ["HLA+A_b"], sep="_", n_draws=30), expected)
    value = predicted_effects(model, ["HLA+A_b"], sep="_", n_draws=30).value
    assert value.any()
    with pytest.raises(KeyError, match="'HLA\\+A_b' perturbs 'HLA'"):
        predict(model, ["HLA+A_b"], n_draws=30)


def test_a_combination_with_a_label_of_its_own_has_its_own_shift():
    own = Design.single_target(["a", "b", "a+b"])
    model = make_model(own)
    set_shift(model, [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    assert not predicted_effects(model, ["a+b"], n_draws=20).value.any()


def test_a_design_names_conditions_by_their_doses():
    model = make_model()
    further = Design(
        ("none", "half", "both"), ("b", "a"), torch.tensor([[0, 0], [0, 0.5], [1, 1]])
    )
    found = predict(model, ["both", "half"], design=further, n_draws=30)
    np.testing.assert_array_equal(found[:1], predict(model, ["a+b"], n_draws=30))
    set_shift(model, 0.5 * model.prior.slab.mean.detach())
    np.testing.assert_allclose(found[1:], predict(model, ["a"], n_draws=30), rtol=1e-6)


def test_the_model_and_the_random_state_are_left_alone():
    model = make_model(norm="batch").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    first = predict(model, ["a"], n_draws=20, seed=3)
    np.testing.assert_array_equal(first, predict(model, ["a"], n_draws=20, seed=3))
    assert (first != predict(model, ["a"], n_draws=20, seed=4)).any()
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_standard_error_is_the_spread_over_seeds_and_pairing_shrinks_it():
    model = make_model()
    set_shift(model, [[0.3, 0.0], [0.0, 0.0], [0.0, 0.0]])
    runs = [predicted_effects(model, ["a"], n_draws=100, seed=seed) for seed in range(120)]
    spread = np.std([run.value[0] for run in runs], axis=0, ddof=1)
    reported = np.mean([run.standard_error[0] for run in runs], axis=0)
    np.testing.assert_allclose(reported, spread, rtol=0.25)
    levels = [np.log1p(predict(model, ["a"], n_draws=100, seed=seed)[0]) for seed in range(120)]
    assert (spread < 0.7 * np.std(levels, axis=0)).all()


@pytest.mark.parametrize(
    ("conditions", "options", "error", "message"),
    [
        (["aa+b"], {}, KeyError, "'aa\\+b' perturbs 'aa', of which .* nearest known: \\['a'\\]"),
        (["zzz"], {}, KeyError, "known: \\['a', 'b', 'c', 'control'\\]"),
        (["d"], {"design": Design.single_target(["d"])}, KeyError, "'d' perturbs 'd'"),
        ([], {}, ValueError, "no conditions were given"),
        (["a"], {"n_draws": 1}, ValueError, "n_draws is 1 .* at least two draws"),
        (["a"], {"library": 0.0}, ValueError, "library 0.0; expected .* positive"),
    ],
)
def test_what_cannot_be_predicted_is_refused(conditions, options, error, message):
    with pytest.raises(error, match=message):
        predict(make_model(), conditions, **options)


def true_model(screen):
    """Return the model that has the simulator's own decoder and shifts."""
    decoder, n_genes = screen.decoder, screen.cells.n_genes
    model = SMSVAE.preset(
        "ivae",
        screen.design,
        n_genes,
        n_latent=screen.z.shape[1],
        n_hidden=simulate.N_HIDDEN,
        n_layers=3,
    )
    layers = [part for part in (*model.decoder, model.genes) if hasattr(part, "weight")]
    with torch.no_grad():
        for layer, weight in zip(layers, decoder.weights, strict=True):
            layer.weight.copy_(weight.T)
            layer.bias.zero_()
        model.genes.weight.div_(decoder.temperature)
    set_shift(model, screen.shift[1:])
    return model


@pytest.fixture(scope="module")
def simulated():
    return simulate.sparse_shift(n_targets=4, n_cells_per_condition=300, n_latent=3, n_genes=50)


def test_the_true_model_predicts_the_true_decoders_effects(simulated):
    rng = np.random.default_rng(7)
    noise = rng.standard_normal((40_000, 3))
    shift = simulated.shift.double().numpy()

    def truth(moved):
        rate = simulated.decoder.log_rate(torch.from_numpy(moved + noise)).exp().numpy()
        return np.log1p(1e3 * (rate / rate.sum(1, keepdims=True)).mean(0))

    expected = [truth(row) - truth(shift[0]) for row in (shift[1], shift[2] + shift[4])]
    found = predicted_effects(true_model(simulated), ["0", "1+3"], library=1e3, n_draws=20_000)
    # The other estimate has an error of its own, of about the same size over sqrt(2).
    assert np.abs((found.value - expected) / found.standard_error).max() < 5
    assert np.corrcoef(np.ravel(found.value), np.ravel(expected))[0, 1] > 0.999


def test_simulated_cells_show_the_effects_that_the_true_model_predicts(simulated):
    cells = simulated.cells
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(3000, 3, generator=generator)
    control = torch.poisson(simulated.decoder.log_rate(z).exp(), generator=generator).float()
    counts = torch.cat([control, cells.counts]).numpy()
    condition = torch.cat([torch.zeros(3000, dtype=torch.long), cells.condition]).numpy()
    shown = effects(counts, condition, library=1e3)
    model = true_model(simulated)
    said = predicted_effects(model, ["0", "1", "2", "3"], library=1e3, n_draws=20_000)
    error = np.hypot(shown.standard_error[1:], said.standard_error)
    scaled = (shown.value[1:] - said.value) / error
    assert np.abs(scaled).max() < 4.5
    assert 0.5 < (scaled**2).mean() < 1.6


# ---------------------------------------------------------------- what the data show


def test_effects_by_hand():
    counts = np.array([[1.0, 1.0], [3.0, 1.0], [2.0, 0.0], [1.0, 3.0]])
    found = effects(counts, np.array([0, 0, 1, 3]), library=4.0)
    control = np.log1p([2.5, 1.5])
    np.testing.assert_allclose(found.value[0], 0.0)
    np.testing.assert_allclose(found.value[1], np.log1p([4.0, 0.0]) - control)
    np.testing.assert_allclose(found.value[3], np.log1p([1.0, 3.0]) - control)
    assert np.isnan(found.value[2]).all()  # no cells
    assert np.isnan(found.standard_error[1:]).all()  # one cell, or none
    # The controls have 2 and 3, 2 and 1 normalised UMIs: a standard error of .5.
    np.testing.assert_allclose(found.standard_error[0], np.sqrt(2) * 0.5 / np.array([3.5, 2.5]))
    assert effects(counts, np.array([0, 0, 1, 1]), n_conditions=5).value.shape == (5, 2)


def test_the_standard_error_of_effects_is_that_of_new_cells():
    rng = np.random.default_rng(0)
    condition = np.repeat([0, 1], [80, 60])
    rate = np.where(condition[:, None] == 1, [4.0, 9.0, 2.0], [4.0, 3.0, 6.0])
    runs = [
        effects(rng.poisson(rate).astype(float) + [[1, 0, 0]], condition, library=10.0)
        for _ in range(300)
    ]
    spread = np.std([run.value[1] for run in runs], axis=0, ddof=1)
    reported = np.mean([run.standard_error[1] for run in runs], axis=0)
    np.testing.assert_allclose(reported, spread, rtol=0.15)


@pytest.mark.parametrize(
    ("counts", "condition", "n_conditions", "message"),
    [
        (np.ones((2, 3)), np.zeros(3, dtype=int), None, "shape \\(2, 3\\) and condition \\(3,\\)"),
        (np.ones((2, 3)), np.array([1, 2]), None, "no cell has condition 0"),
        (np.ones((2, 3)), np.array([0, 2]), 2, "from 0 to 2; expected 0 to 1"),
        (np.eye(3)[:, :2], np.zeros(3, dtype=int), None, "1 cells have no UMIs, first cell 2"),
    ],
)
def test_cells_without_effects_are_refused(counts, condition, n_conditions, message):
    with pytest.raises(ValueError, match=message):
        effects(counts, condition, n_conditions=n_conditions)


def test_effects_of_tensors_are_those_of_arrays():
    counts, condition = np.array([[1.0, 1.0], [3.0, 1.0], [2.0, 0.0]]), np.array([0, 0, 1])
    found = effects(torch.from_numpy(counts), torch.from_numpy(condition), n_conditions=2)
    for one, other in zip(found, effects(counts, condition), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (np.log1p([[1.0, 2.0], [3.0, 1.0]]), "4 of 4 stored values are no counts"),
        (np.array([[1.0, np.nan], [3.0, 1.0]]), "1 of 4 stored values are no counts"),
        (sparse.csr_matrix(np.eye(2)), r"expected a dense array: counts\.toarray\(\)"),
        (np.array([["1", "2"]] * 2), "values of type <U1; expected UMIs"),
    ],
)
def test_effects_are_those_of_counts(monkeypatch, counts, message):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside the tests
    with pytest.raises(ValueError, match=message):
        effects(counts, np.array([0, 1]))


# ---------------------------------------------------------------- baselines

# Three genes; targets a, b, c seen alone, a+b seen together; d never.
DOSE = np.array([[1.0, 0, 0, 0], [0, 2.0, 0, 0], [0, 0, 1.0, 0], [1.0, 1.0, 0, 0]])
SHOWN = np.array([[1.0, 0, 0], [0, 4.0, 0], [0, 0, -3.0], [7.0, 7.0, 7.0]])
NEW = np.array([[1.0, 1.0, 0, 0], [1.0, 0, 1.0, 0], [0, 1.0, 0, 0], [0, 0, 0, 1.0]])
ERROR = np.array([[0.5, 0.5, 0.5], [0.0, 0.0, 0.0], [3.0, 3.0, 3.0], [7.0, 7.0, 0.0]])
KNOWN = Known(
    SHOWN, ERROR, DOSE, np.array([[1.0, 0], [0, 1.0], [0.6, 0.8], [0.8, 0.6]]), np.eye(3)
)


def test_no_effect_and_training_mean_by_hand():
    np.testing.assert_array_equal(no_effect(KNOWN, NEW), np.zeros((4, 3)))
    np.testing.assert_allclose(training_mean(KNOWN, NEW), [[2.0, 2.75, 1.0]] * 4)


def test_additive_by_hand():
    seen, unseen, half_dose, never = additive(KNOWN, NEW)
    np.testing.assert_array_equal(seen, [7.0, 7.0, 7.0])  # its own effect, not 1 + 2
    np.testing.assert_array_equal(unseen, [1.0, 0.0, -3.0])
    np.testing.assert_array_equal(half_dose, [0.0, 2.0, 0.0])
    np.testing.assert_array_equal(never, [0.0, 0.0, 0.0])


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]])
def test_doses_of_a_target_tell_its_effect_together_and_may_be_negative(order):
    """Effects 1 at dose .5 and 3 at 1: (.5 + 3) / 1.25 a unit; of the other one -2 at -1."""
    dose, shown = np.array([[0.5, 0], [1, 0], [0, -1.0]]), np.array([[1.0], [3.0], [-2.0]])
    known = KNOWN._replace(dose=dose[order], effects=shown[order])
    found = additive(known, np.array([[2.0, 0], [2.0, 1.0]]))
    np.testing.assert_allclose(found, [[5.6], [7.6]])


def test_shrunk_additive_by_hand():
    seen, unseen, exact, never = additive_shrunk(KNOWN, NEW)
    np.testing.assert_allclose(seen, 7.0 / 3.0)  # squared errors 98 of 147: a third is signal
    np.testing.assert_allclose(unseen, [0.25, 0.0, 0.0])  # a: .75 of 1; c is all noise
    np.testing.assert_array_equal(exact, [0.0, 2.0, 0.0])
    np.testing.assert_array_equal(never, [0.0, 0.0, 0.0])
    single_cell = KNOWN._replace(standard_error=np.full((4, 3), np.nan))
    assert not additive_shrunk(single_cell, NEW).any()


def test_shrinking_noisy_effects_brings_them_closer_to_the_truth():
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((30, 600))
    shown = truth + 2.0 * rng.standard_normal(truth.shape)
    known = Known(shown, np.full(truth.shape, 2.0), np.eye(30), np.eye(30), np.eye(600))
    error = ((additive_shrunk(known, np.eye(30)) - truth) ** 2).mean()
    # The best linear factor leaves 4 / 5 of the variance; not shrinking leaves 4.
    assert error == pytest.approx(0.8, rel=0.05)


def test_nearest_by_hand():
    # a+b lies between both; c is (.6, .8), d is (.8, .6).
    found = nearest(KNOWN, np.array([[0, 0, 0, 1.0], [0, 0, 1.0, 0], [1.0, 0, 0, 0]]))
    np.testing.assert_array_equal(found[0], SHOWN[3])  # cosine .99 with a+b
    np.testing.assert_array_equal(found[1], SHOWN[3])  # itself left out
    np.testing.assert_array_equal(found[2], SHOWN[3])  # .71 with a+b, .6 with c
    apart = KNOWN._replace(embedding=np.eye(4))
    np.testing.assert_allclose(nearest(apart, NEW[1:2]), [SHOWN[[0, 2]].mean(0)])  # as near
    np.testing.assert_allclose(nearest(apart, NEW[3:]), [SHOWN.mean(0)])  # nothing in common


def test_ridge_minimises_its_objective():
    rng = np.random.default_rng(3)
    axes = np.linalg.qr(rng.standard_normal((5, 2)))[0]
    shown, dose, embedding = rng.standard_normal((6, 5)), np.eye(6), rng.standard_normal((6, 3))
    known = Known(shown, shown, dose, embedding, axes)
    # vec(P W G') = (P kron G) vec(W), rows first; the penalty is more rows of data.
    map_ = np.vstack([np.kron(embedding, axes), np.sqrt(0.7) * np.eye(6)])
    target = np.concatenate([(shown - shown.mean(0)).ravel(), np.zeros(6)])
    weight = np.linalg.lstsq(map_, target, rcond=None)[0].reshape(3, 2)
    new = np.array([[1.0, 1.0, 0, 0, 0, 0]])
    expected = shown.mean(0) + new @ embedding @ weight @ axes.T
    np.testing.assert_allclose(ridge(known, new, penalty=0.7), expected)


def test_ridge_on_separate_targets_shrinks_each_effect_to_the_mean():
    known = Known(SHOWN[:3], ERROR[:3], np.eye(3), np.eye(3), np.eye(3))
    mean = SHOWN[:3].mean(0)
    expected = mean + (SHOWN[:3] - mean) / 1.1
    np.testing.assert_allclose(ridge(known, np.eye(3)), expected)


def test_embedding_is_the_loadings_of_a_principal_component_analysis():
    rng = np.random.default_rng(1)
    counts = rng.poisson(rng.gamma(2.0, 5.0, size=(200, 1)) * [1, 2, 3, 4, 5]) + 1.0
    names = ["g0", "g1", "g2", "g3", "g4"]
    options = {"library": 50.0, "n_components": 2}
    embedding, axes = embed(counts, names, ["g3", "other", "g0"], **options)
    found = PCA(2).fit(np.log1p(50.0 * counts / counts.sum(1, keepdims=True)))
    np.testing.assert_allclose(np.abs(axes), np.abs(found.components_.T), atol=1e-8)
    loadings = (found.components_.T * np.sqrt(found.explained_variance_))[[3, 0]]
    loadings /= np.sqrt((loadings**2).sum() / 2)
    np.testing.assert_allclose(np.abs(embedding[[0, 2], :2]), np.abs(loadings), atol=1e-8)
    np.testing.assert_array_equal(embedding[:, 2], [0, 1, 0])
    np.testing.assert_array_equal(embedding[1, :2], [0, 0])


def test_unmeasured_targets_have_nothing_in_common():
    counts = np.random.default_rng(0).poisson(5.0, (30, 4)) + 1.0
    embedding, _ = embed(counts, list("wxyz"), ["a", "b"], n_components=3)
    np.testing.assert_array_equal(embedding, np.hstack([np.zeros((2, 3)), np.eye(2)]))


def test_too_many_components_are_refused():
    with pytest.raises(ValueError, match="n_components is 5 for 2 genes; expected 1 to 2"):
        embed(np.ones((3, 2)), ["a", "b"], ["a"], n_components=5)


def test_a_single_gene_is_its_own_axis():
    assert abs(embed(np.array([[1.0], [3.0]]), ["a"], ["a"], n_components=1)[1]) == 1


# ---------------------------------------------------------------- scores

numbers = st.lists(st.integers(-50, 50), min_size=25, max_size=25).map(
    lambda values: np.array(values, dtype=float)
)


@given(numbers, numbers, st.floats(0.1, 10))
def test_scores_are_those_of_scipy_and_sklearn(predicted, noise, scale):
    observed = noise + np.arange(25) / 100
    found = score(scale * predicted, observed, ranked_by=noise, n_top=25)
    if np.ptp(predicted):
        assert found["pearson"] == pytest.approx(stats.pearsonr(predicted, observed)[0], abs=1e-9)
        near = 1 - distance.cosine(predicted, observed)
        assert found["cosine"] == pytest.approx(near, abs=1e-9)
    else:
        assert found["pearson"] == 0.0
    assert found["r2"] == pytest.approx(r2_score(observed, scale * predicted))
    ratio = np.linalg.norm(scale * predicted - observed) / np.linalg.norm(observed)
    assert found["rmse_ratio"] == pytest.approx(ratio)
    # All genes are the top ones here, in another order.
    assert all(found[f"{name}_top"] == pytest.approx(found[name]) for name in list(found)[:4])


def test_no_effect_scores_zero_and_one_and_the_truth_one_and_zero():
    observed = np.arange(30.0) - 7
    nothing = score(np.zeros(30), observed, ranked_by=observed)
    assert (nothing["pearson"], nothing["cosine"], nothing["rmse_ratio"]) == (0.0, 0.0, 1.0)
    perfect = score(observed, observed, ranked_by=observed)
    assert [perfect[name] for name in ("pearson", "cosine", "r2")] == pytest.approx([1.0] * 3)
    assert perfect["rmse_ratio"] == 0.0


def test_top_genes_are_those_of_the_ranking_not_of_the_scored_cells():
    ranked_by = np.array([0.0, -9.0, 1.0, 8.0, 0.5])
    observed = np.array([100.0, 1.0, -100.0, 2.0, 50.0])
    predicted = np.array([-100.0, 1.0, 100.0, 2.0, -50.0])
    found = score(predicted, observed, ranked_by=ranked_by, n_top=2)  # genes 1 and 3
    assert found["pearson_top"] == pytest.approx(1.0)
    assert found["rmse_ratio_top"] == 0.0
    assert found["pearson"] < -0.9


@pytest.mark.parametrize(
    ("given_", "n_top", "message"),
    [
        (
            (np.ones(3), np.ones(4), np.ones(4)),
            2,
            "'predicted': \\(3,\\).*expected \\(n_genes,\\)",
        ),
        (
            (np.ones(3), np.array([1, np.nan, 2]), np.ones(3)),
            2,
            "observed is not finite at gene 1",
        ),
        ((np.ones(3), np.arange(3.0), np.ones(3)), 1, "n_top is 1"),
        ((np.ones(3), np.ones(3), np.ones(3)), 2, "3 observed effects are all 1"),
    ],
)
def test_effects_that_cannot_be_compared_are_refused(given_, n_top, message):
    predicted, observed, ranked_by = given_
    with pytest.raises(ValueError, match=message):
        score(predicted, observed, ranked_by=ranked_by, n_top=n_top)


# ---------------------------------------------------------------- the study

N_EACH = 40


def make_screen():
    """Return cells whose last gene tells them apart: a and b act on one gene each."""
    rng = np.random.default_rng(0)
    condition = np.repeat(np.arange(5), N_EACH)
    rate = np.full((len(condition), 25), 20.0)
    matrix = PAIRS.matrix.numpy()[condition]
    rate[:, 0] *= 1 + 3 * matrix[:, 0]
    rate[:, 1] *= 1 + 2 * matrix[:, 1]
    counts = rng.poisson(rate).astype(np.float32)
    counts[:, -1] = 1000 + np.arange(len(condition))
    cells = Cells(torch.from_numpy(counts), torch.from_numpy(condition))
    return prediction._Screen(cells, PAIRS, tuple(f"g{n}" for n in range(23)) + ("a", "last"))


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(prediction, "_READERS", {"toy": make_screen})


def names_of(cells):
    return set(cells.counts[:, -1].tolist())


@pytest.mark.parametrize("task", ["cells", "doubles", "targets"])
def test_no_cell_is_in_two_parts(task):
    for fold in prediction._TASKS[task](make_screen(), 0):
        parts = [names_of(cells) for cells in (fold.train, *fold.halves)]
        assert sum(map(len, parts)) == len(set.union(*parts))
        for half in fold.halves:
            assert set(half.condition.tolist()) == {0, *fold.rows}


def test_doubles_are_predicted_from_singles_alone():
    (fold,) = prediction._doubles(make_screen(), 0)
    assert fold.rows == (2,)
    assert set(fold.train.condition.tolist()) == {0, 1, 3, 4}
    assert [int((half.condition == 2).sum()) for half in fold.halves] == [N_EACH / 2] * 2


def test_every_target_is_held_out_once_with_its_combinations():
    folds = prediction._targets(make_screen(), 0)
    assert sorted(row for fold in folds for row in fold.rows) == [1, 2, 2, 3, 4]
    for fold in folds:
        held = PAIRS.matrix[list(fold.rows)].any(0)
        seen = PAIRS.matrix[fold.train.condition.unique()].any(0)
        assert not (held & seen).all()
        assert not set(fold.rows) & set(fold.train.condition.tolist())


def test_a_screen_without_doubles_has_none_to_predict():
    screen = make_screen()
    singles = screen._replace(
        cells=screen.cells.of(torch.tensor([0, 1])), design=Design.single_target(["a"])
    )
    with pytest.raises(ValueError, match="no combination of targets that were perturbed alone"):
        prediction._doubles(singles, 0)


def test_a_smaller_design_keeps_what_was_done_to_each_cell():
    screen = make_screen()
    cells = screen.cells.of(torch.tensor([0, 1, 4]))
    same, small = prediction._restricted(cells, PAIRS)
    assert (small.conditions, small.targets) == (("control", "a", "c"), ("a", "c"))
    assert torch.equal(small.matrix, torch.tensor([[0, 0], [1, 0], [0, 1.0]]))
    old = [PAIRS.conditions[row] for row in cells.condition]
    assert [small.conditions[row] for row in same.condition] == old


CONFIG = {"dataset": "toy", "task": "doubles", "method": "additive", "seed": 0}


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("method", [*prediction.BASELINES, "vae", "other-half", "svae+"])
def test_every_method_is_scored_on_the_same_cells(method):
    found = prediction.evaluate(CONFIG | {"method": method, "epochs": 1})
    assert found["conditions"] == ["a+b"]
    assert found["n_scored"] == [N_EACH]
    assert set(found) == {"conditions", "n_scored", *prediction._SCORES}
    assert np.isfinite([found[name] for name in prediction._SCORES]).all()


@pytest.mark.usefixtures("stand_in")
def test_sums_of_effects_predict_a_double_and_means_do_not():
    found = {m: prediction.evaluate(CONFIG | {"method": m}) for m in ("additive", "no-effect")}
    assert found["additive"]["pearson"][0] > 0.8
    assert found["additive"]["rmse_ratio"][0] < 0.6
    assert found["no-effect"]["rmse_ratio"] == [1.0]


@pytest.mark.usefixtures("stand_in")
def test_a_model_of_singles_predicts_the_double_by_a_sum(monkeypatch):
    def fitted(cells, design, *, epochs, seed, method, training):
        assert design.conditions == ("control", "a", "b", "c")
        assert (epochs, seed, method, training) == (7, 0, "ivae", {"batch_size": 9})
        assert len(cells) == 3 * N_EACH + N_EACH // 2
        model = make_model(design, n_genes=25)
        set_shift(model, [[1.0, 0.0], [-1.0, 0.0], [5.0, 5.0]])  # a and b cancel
        return model, None

    monkeypatch.setattr(screens, "fit_screen", fitted)
    options = {"method": "ivae", "epochs": 7, "training": {"batch_size": 9}}
    assert prediction.evaluate(CONFIG | options)["rmse_ratio"] == [1.0]


@pytest.mark.usefixtures("stand_in")
def test_both_halves_are_scored_each_by_the_genes_of_the_other(monkeypatch):
    seen = []

    def record(predicted, observed, *, ranked_by):
        seen.append((predicted, observed, ranked_by))
        return {"pearson": float(len(seen))}

    monkeypatch.setattr(prediction, "score", record)
    found = prediction.evaluate(CONFIG)
    (forecast, first, by_second), (same, second, by_first) = seen
    np.testing.assert_array_equal(forecast, same)
    np.testing.assert_array_equal(first, by_first)
    np.testing.assert_array_equal(second, by_second)
    assert (first != second).any()
    assert found["pearson"] == [1.5]


@pytest.mark.parametrize("method", [*prediction.BASELINES, "svae+"])
def test_held_out_cells_reach_no_prediction(method):
    screen = make_screen()
    (fold,) = prediction._doubles(screen, 0)
    unlike = Cells(torch.full_like(screen.cells.counts, 77.0), screen.cells.condition)
    scored = names_of(fold.halves[0]) | names_of(fold.halves[1])
    kept = torch.tensor([name not in scored for name in screen.cells.counts[:, -1].tolist()])
    counts = torch.where(kept[:, None], screen.cells.counts, unlike.counts)
    garbled = screen._replace(cells=Cells(counts, screen.cells.condition))
    (other,) = prediction._doubles(garbled, 0)
    assert (other.halves[0].counts == 77.0).all()
    config = CONFIG | {"method": method, "epochs": 1}
    library = 100.0
    np.testing.assert_array_equal(
        prediction._prediction(fold, screen, config, library),
        prediction._prediction(other, garbled, config, library),
    )


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dataset": "tox"}, ValueError, "unknown dataset 'tox'; expected one of \\['toy'\\]"),
        ({"task": "triples"}, ValueError, "unknown task 'triples'; expected .*'doubles'"),
        ({"method": "oracle"}, ValueError, "unknown method 'oracle'; expected one of .*'ridge'"),
        (
            {"task": "targets", "method": "ivae", "epochs": 1},
            KeyError,
            "of which the model knows no shift",
        ),
    ],
)
def test_unknown_settings_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        prediction.evaluate(CONFIG | change)


def test_the_study_has_every_method_once_per_seed_and_task():
    names = [sweep.run_id(config) for config in prediction.STUDY]
    assert len(set(names)) == len(names)
    for config in prediction.STUDY:
        assert ("epochs" in config) == (config["method"] in ("svae", "svae+", "ivae"))
        assert config["dataset"] in prediction._READERS
        assert config["task"] in prediction._TASKS
    tasks = {(config["dataset"], config["task"]) for config in prediction.STUDY}
    for task in tasks:
        mine = [c for c in prediction.STUDY if (c["dataset"], c["task"]) == task]
        assert {c["seed"] for c in mine} == set(range(5))
        assert {c["method"] for c in mine} >= {*prediction.BASELINES, "vae", "other-half"}


@pytest.mark.usefixtures("stand_in")
def test_the_command_runs_what_is_missing_and_stores_a_summary(monkeypatch, tmp_path):
    methods = sweep.axis("method", ["additive", "other-half", "training-mean"])
    base = {"dataset": "toy", "task": "cells"}
    study = sweep.product([base], sweep.axis("seed", range(2)), methods)
    monkeypatch.setattr(prediction, "STUDY", tuple(study))
    with pytest.raises(FileNotFoundError, match="no finished run of prediction"):
        prediction.main(["--results", str(tmp_path), "--workers", "0"])
    monkeypatch.setattr(sweep, "ProcessPoolExecutor", lambda n, *_, **__: ThreadPoolExecutor(n))
    sweep.run(prediction.evaluate, [CONFIG], tmp_path / "runs" / "prediction")  # of no study
    prediction.main(["--results", str(tmp_path), "--workers", "1", "--index", "5"])
    assert store.get("prediction", root=tmp_path).provenance["n_missing"] == 5
    prediction.main(["--results", str(tmp_path), "--workers", "1"])
    stored = store.get("prediction", root=tmp_path)
    assert stored.provenance["n_missing"] == 0
    runs = [prediction.evaluate(c)["pearson"] for c in study if c["method"] == "additive"]
    assert stored["toy.cells.conditions"] == list(PAIRS.conditions[1:])
    assert stored["toy.cells.additive.seeds"] == [0, 1]
    assert stored["toy.cells.additive.pearson"] == pytest.approx(np.mean(runs, 1), rel=1e-5)
    by_condition = stored["toy.cells.additive.pearson.by_condition"]
    assert by_condition == pytest.approx(np.mean(runs, 0), rel=1e-5)
    low, high = stats.t.interval(0.95, 1, np.mean(runs), stats.sem(np.mean(runs, 1)))
    assert stored["toy.cells.additive.pearson.low"] == pytest.approx(low, rel=1e-4)
    assert stored["toy.cells.additive.pearson.high"] == pytest.approx(high, rel=1e-4)
    assert stored["toy.cells.additive.pearson.n"] == 2
    other = stored["toy.cells.training-mean.pearson.by_condition"]
    difference = stats.ttest_rel(by_condition, other)
    key = "toy.cells.additive.pearson.minus_training-mean"
    assert stored[key] == pytest.approx(np.mean(by_condition) - np.mean(other), rel=1e-3)
    assert stored[f"{key}.p_value"] == pytest.approx(difference.pvalue, rel=1e-2)
    assert 0 < stored["toy.cells.attainable.pearson"] < 1
    assert "toy.cells.attainable.r2" not in stored


def rows_of(method, by_seed):
    """Runs of one method whose scores are all the same two numbers."""
    common = {"dataset": "toy", "task": "cells", "conditions": ["a", "b"], "n_scored": [5, 6]}
    return [
        common | {"method": method, "seed": seed} | dict.fromkeys(prediction._SCORES, values)
        for seed, values in by_seed.items()
    ]


def test_methods_are_compared_over_the_seeds_that_both_have():
    runs = [
        *rows_of("additive", {2: [0.5, 0.9], 0: [0.1, 0.2], 1: [0.3, 0.7]}),
        *rows_of("svae", {1: [0.4, 0.6], 3: [9.0, -9.0], 2: [0.6, 1.4]}),
        *rows_of("training-mean", {7: [0.0, 0.0]}),
    ]
    found = prediction.summarise(pd.DataFrame(runs))
    key = "toy.cells.svae.rmse_ratio"
    assert found["toy.cells.svae.seeds"] == [1, 2, 3]
    assert found[f"{key}.minus_additive"] == pytest.approx(np.mean([0.1, 0.1, -0.1, 0.5]))
    by_condition = stats.ttest_rel([0.5, 1.0], [0.4, 0.8])  # means over seeds 1 and 2
    assert found[f"{key}.minus_additive.p_value"] == pytest.approx(by_condition.pvalue)
    assert found[f"{key}.minus_additive.n_seeds"] == 2
    assert f"{key}.minus_training-mean" not in found
    assert "toy.cells.svae.r2.minus_additive" not in found
    assert found[f"{key}.by_condition"] == pytest.approx([10.0 / 3, -7.0 / 3])


def test_what_is_attainable_is_a_mean_of_roots_over_conditions():
    runs = rows_of("other-half", {0: [0.5, 0.02], 1: [0.78, -0.04]})  # means 0.64 and -0.01
    found = prediction.summarise(pd.DataFrame(runs))
    assert found["toy.cells.attainable.pearson"] == pytest.approx((0.8 - 0.1) / 2)


def test_a_prediction_without_error_reaches_what_is_attainable():
    rng = np.random.default_rng(0)
    size = np.array([0.0, 0.0, 0.3, 1.0, 3.0])  # of the effects, in units of the noise of a half
    truth = size[:, None] * rng.standard_normal((5, 4000))
    runs, reached = [], []
    for seed in range(20):
        one, other = truth + rng.standard_normal((2, 5, 4000))
        halves = [np.corrcoef(*both)[0, 1] for both in zip(one, other, strict=True)]
        runs += rows_of("other-half", {seed: halves})
        reached += [np.corrcoef(*both)[0, 1] for both in zip(truth[2:], one[2:], strict=True)]
    found = prediction.summarise(pd.DataFrame(runs).assign(conditions=[list("abcde")] * 20))
    expected = np.sum(reached) / 20 / 5  # a prediction of no effect scores zero
    assert found["toy.cells.attainable.pearson"] == pytest.approx(expected, abs=0.03)


def test_the_command_explains_itself(capsys):
    with pytest.raises(SystemExit, match="0"):
        prediction.main(["--help"])
    assert "--workers" in capsys.readouterr().out


# ---------------------------------------------------------------- the real screens

here = pytest.mark.skipif(
    not (perturbseq.data_dir() / "devel.h5ad").exists(), reason="devel.h5ad is not here"
)


@here
def test_the_doubles_of_the_small_norman_screen():
    screen = prediction._norman()
    assert len(screen.genes) == screen.cells.n_genes == 103
    (fold,) = prediction._doubles(screen, 0)
    assert [screen.design.conditions[row] for row in fold.rows] == [
        "KLF1+MAP2K6",
        "KLF1+TGFBR2",
        "MAP2K3+MAP2K6",
        "MAP2K3+SLC38A2",
        "MAPK1+TGFBR2",
    ]
    assert len(fold.train.condition.unique()) == 19
