"""Scores against sklearn, scipy, cases solved by hand, and the invariances they promise."""

import inspect
import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.spatial import distance
from scipy.stats import pearsonr, spearmanr
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LassoLars, LinearRegression
from sklearn.metrics import (
    average_precision_score,
    brier_score_loss,
    precision_recall_fscore_support,
)
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.preprocessing import scale

from smslib import metrics, simulate


def latents(seed, n_cells=60, n_latent=4):
    """Correlated, unequally scaled latents."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n_cells, n_latent)) @ rng.standard_normal((n_latent, n_latent)) * 3


def noisy(z, seed, noise=0.7):
    """Return z behind a permutation, random signs, scales and noise."""
    rng = np.random.default_rng(seed)
    scrambled = z[:, rng.permutation(z.shape[1])] * rng.choice([-1, 1], z.shape[1])
    return scrambled + noise * z.std() * rng.standard_normal(z.shape)


# ---------------------------------------------------------------- invariances, metric by metric


def permuted(rng, z):
    return z[:, rng.permutation(z.shape[1])]


def flipped(rng, z):
    return z * rng.choice([-1.0, 1.0], z.shape[1])


def rescaled(rng, z):
    return z * rng.uniform(0.1, 10.0, z.shape[1]) + rng.normal(size=z.shape[1])


def monotone(rng, z):
    return np.arcsinh(z * rng.uniform(0.5, 2.0))


def mixed(rng, z):
    return z @ (np.eye(z.shape[1]) + 0.3 * rng.standard_normal((z.shape[1], z.shape[1])))


def within(true, estimated):
    return metrics.within_condition_mcc(true, estimated, np.arange(len(true)) % 3)


def matched(true, estimated):
    return np.abs(metrics.match_latents(true, estimated).correlation).sum()


def strongest(true, estimated):
    return np.abs(metrics.correlations(true, estimated)).max()


def f1(true, estimated):
    """Score the graph of the largest entries, matched by the latents themselves."""
    matching = metrics.match_latents(true, estimated)
    return metrics.graph_scores(np.abs(true) > 1, np.abs(estimated), matching)["f1"]


def edges(true, estimated):
    """Expected calibration error of edges whose probability grows with the latents' size."""
    matching = metrics.match_latents(true, estimated)
    truth, score = metrics.aligned_edges(np.abs(true) > 1, np.abs(estimated), matching)
    return metrics.calibration(truth, score / score.max()).error


def predicted(true, estimated):
    return float(np.linalg.norm(metrics.out_of_fold(true, estimated)))


def hits(true, estimated):
    """Count the agreement of top-1 graphs."""
    graphs = [metrics.top_k_graph(z, 1) for z in (true, estimated)]
    return float(np.logical_and.reduce([graph.sum(1) == 1 for graph in graphs]).mean())


LATENT = (permuted, flipped, rescaled)
INVARIANT = {
    "mcc": (lambda t, e: metrics.mcc(t, e), LATENT),
    "mcc, spearman": (lambda t, e: metrics.mcc(t, e, method="spearman"), (*LATENT, monotone)),
    "within_condition_mcc": (within, LATENT),
    "linear_r2": (lambda t, e: metrics.linear_r2(t, e), (*LATENT, mixed)),
    "match_latents": (matched, LATENT),
    "correlations": (strongest, LATENT),
    "graph_scores": (f1, (permuted, flipped)),
    "top_k_graph": (hits, (permuted, flipped)),
    "aligned_edges": (edges, (permuted, flipped)),
    "calibration": (edges, (permuted, flipped)),
    "out_of_fold": (predicted, (*LATENT, mixed)),
    "udr": (lambda t, e: metrics.udr([t, e])[0], (*LATENT, monotone)),
    "pairwise_mcc": (lambda t, e: metrics.pairwise_mcc([t, e])[0, 1], LATENT),
    "dci": (metrics.dci, LATENT),
}
VALUES = {"Matching", "DCI", "Calibration", "Interval", "Paired", "PairedSigns"}
# Of seeds, of tests, of any list of items: not of latents.
OF_SEEDS = {"interval", "paired", "paired_signs", "holm", "average_precision", "cosine"}
OF_NOTHING = {"chance_mcc"}
# The lasso is solved to a part in a million of the variance, the rest to rounding.
TOLERANCE = {"dci": 1e-3}
CASES = [(name, change) for name, (_, changes) in INVARIANT.items() for change in changes]


def test_every_public_metric_is_in_the_registry():
    registered = {name.split(",")[0] for name in INVARIANT}
    assert registered == set(metrics.__all__) - VALUES - OF_SEEDS - OF_NOTHING


@pytest.mark.parametrize(("name", "change"), CASES)
@settings(max_examples=15)
@given(seed=st.integers(0, 10_000))
def test_a_change_of_coordinates_keeps_the_score(name, change, seed):
    score = INVARIANT[name][0]
    z = latents(seed)
    estimated = noisy(z, seed + 1)
    changed = change(np.random.default_rng(seed + 2), estimated)
    near = TOLERANCE.get(name, 1e-9)
    assert score(z, changed) == pytest.approx(score(z, estimated), abs=near)


@pytest.mark.parametrize("name", ["mcc", "mcc, spearman", "linear_r2", "within_condition_mcc"])
@settings(max_examples=15)
@given(seed=st.integers(0, 10_000))
def test_the_order_of_cells_keeps_the_score_and_truth_scores_one(name, seed):
    score = INVARIANT[name][0]
    z = latents(seed)
    estimated = noisy(z, seed + 1)
    # Blocks of three keep the pattern of conditions in `within`.
    blocks = np.random.default_rng(seed).permutation(len(z) // 3)
    order = (3 * blocks[:, None] + np.arange(3)).ravel()
    assert score(z[order], estimated[order]) == pytest.approx(score(z, estimated), abs=1e-9)
    assert score(z, z) == pytest.approx(1.0)
    assert 0 <= score(z, estimated) <= 1


def test_noise_scores_near_zero():
    rng = np.random.default_rng(0)
    z, noise = rng.standard_normal((2, 5000, 5))
    assert metrics.mcc(z, noise) < 0.05
    assert metrics.linear_r2(z, noise) < 0.005
    assert metrics.linear_r2(z, noise, folds=5) < 0


# ---------------------------------------------------------------- latents


def test_correlations_are_scipys():
    z, estimated = latents(0), noisy(latents(0), 1)[:, :3]
    for method, oracle in (("pearson", pearsonr), ("spearman", spearmanr)):
        table = metrics.correlations(z, np.round(estimated), method=method)
        expected = [[oracle(t, e).statistic for e in np.round(estimated).T] for t in z.T]
        np.testing.assert_allclose(table, expected, atol=1e-12)


def test_matching_by_hand():
    e = np.eye(4)
    z = np.stack([e[0] - e[1], e[2] - e[3]], 1)
    matching = metrics.match_latents(z, np.stack([-z[:, 1], 2 * z[:, 0], np.ones(4)], 1))
    assert matching.rows.tolist() == [0, 1]
    assert matching.cols.tolist() == [1, 0]
    assert matching.correlation == pytest.approx([1, -1])
    assert matching.shape == (2, 3)
    assert not matching.signed


def test_the_signed_matching_prefers_a_poor_positive_partner():
    rng = np.random.default_rng(0)
    z = rng.standard_normal((200, 2))
    flipped_axes = -z
    assert metrics.match_latents(z, flipped_axes).cols.tolist() == [0, 1]
    table = metrics.correlations(z, flipped_axes)
    signed = metrics.match_latents(z, flipped_axes, signed=True)
    best = max(table[0, 0] + table[1, 1], table[0, 1] + table[1, 0])
    assert signed.cols.tolist() == [1, 0]
    assert signed.correlation.sum() == pytest.approx(best)


def test_the_matching_is_optimal_not_greedy():
    # Greedy takes .9 and is left with 0; the optimum is .8 + .7.
    a, b, c = np.linalg.qr(latents(3))[0].T[:3]
    true = np.stack([a, b], 1)
    first = 0.9 * a + 0.4 * b + np.sqrt(1 - 0.97) * c
    second = 0.8 * a + 0.6 * c
    true_mean_free = true - true.mean(0)
    estimated = np.stack([first, second], 1)
    table = np.abs(metrics.correlations(true_mean_free, estimated))
    best = max(table[0, 0] + table[1, 1], table[0, 1] + table[1, 0])
    assert table.argmax() == 0
    assert metrics.mcc(true, estimated) == pytest.approx(best / 2)


def test_unequal_widths_count_what_is_missing():
    z = latents(0)
    assert metrics.mcc(z, z[:, :3]) == pytest.approx(3 / 4)
    assert metrics.mcc(z[:, :3], z) == pytest.approx(1)


@pytest.mark.parametrize("method", ["pearson", "spearman"])
@pytest.mark.parametrize("constant", [0.0, 0.1, -1e-300, 1e300])
def test_a_constant_latent_counts_zero(method, constant):
    z = latents(0)
    estimated = z.copy()
    estimated[:, 1] = constant
    assert metrics.mcc(z, estimated, method=method) == pytest.approx(3 / 4)
    assert metrics.within_condition_mcc(
        z, estimated, np.arange(60) % 2, method=method
    ) == pytest.approx(3 / 4)


def test_within_condition_ignores_the_shift_between_conditions():
    rng = np.random.default_rng(0)
    condition = np.repeat(np.arange(4), 50)
    shift = 10 * rng.standard_normal((4, 3))[condition]
    z = shift + rng.standard_normal((200, 3))
    assert metrics.mcc(z, shift) > 0.95
    assert metrics.within_condition_mcc(z, shift, condition) == 0
    assert metrics.within_condition_mcc(z, z - shift, condition) == pytest.approx(1)


def test_r2_in_sample_is_sklearns():
    z = latents(0)
    estimated = noisy(z, 1)[:, :2]
    model = LinearRegression().fit(estimated, z)
    assert metrics.linear_r2(z, estimated) == pytest.approx(model.score(estimated, z))


def test_r2_out_of_fold_by_hand():
    z, estimated = np.array([[0.0], [2], [4], [6]]), np.array([[0.0], [1], [2], [3]])
    assert metrics.linear_r2(z, estimated, folds=4) == pytest.approx(1)
    # Without information each cell is predicted by the mean of the others.
    useless = metrics.linear_r2(z, np.zeros((4, 1)), folds=4)
    residual = [0 - 4, 2 - 10 / 3, 4 - 8 / 3, 6 - 2]
    assert useless == pytest.approx(1 - np.square(residual).sum() / 20)


def test_r2_out_of_fold_depends_on_the_seed_only():
    z = latents(0)
    estimated = noisy(z, 1)
    scores = [metrics.linear_r2(z, estimated, folds=5, seed=seed) for seed in (0, 0, 1)]
    assert scores[0] == scores[1] != scores[2]
    assert max(scores) < metrics.linear_r2(z, estimated)


def test_r2_of_constants():
    z = latents(0)
    z[:, 0] = 5
    assert metrics.linear_r2(z, z) == pytest.approx(3 / 4)
    assert metrics.linear_r2(z[:, 1:], np.ones((60, 2))) == pytest.approx(0)


# ---------------------------------------------------------------- graphs


def identity(n_latent, n_code=None):
    """A matching of equal names."""
    n_code = n_code or n_latent
    index = np.arange(min(n_latent, n_code))
    ones = np.ones(len(index))
    return metrics.Matching(index, index, ones, (n_latent, n_code), "pearson", False)


def test_graph_scores_by_hand():
    true = np.array([[1, 0], [1, 1], [0, 0]])
    estimated = np.array([[0.9, 0.8], [0.5, 0.6], [0.1, 0.2]])
    scores = metrics.graph_scores(true, estimated, identity(2))
    assert scores == {
        "precision": pytest.approx(2 / 3),
        "recall": pytest.approx(2 / 3),
        "f1": pytest.approx(2 / 3),
        "average_precision": pytest.approx((1 + 2 / 3 + 3 / 4) / 3),
        "shd": 2,
        "n_edges": 3,
    }
    assert metrics.graph_scores(true, estimated, identity(2), threshold=0.49)["recall"] == 1


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), levels=st.integers(1, 8))
def test_graph_scores_are_sklearns(seed, levels):
    rng = np.random.default_rng(seed)
    true = rng.random((6, 3)) < 0.4
    true[0, 0] = True
    estimated = rng.integers(0, levels + 1, (6, 3)) / levels
    estimated[0, 1] = 1.0
    scores = metrics.graph_scores(true, estimated, identity(3))
    declared = estimated.ravel() > 0.5
    expected = precision_recall_fscore_support(true.ravel(), declared, average="binary")
    values = [scores[name] for name in ("precision", "recall", "f1")]
    assert values == pytest.approx(list(expected[:3]))
    assert scores["average_precision"] == pytest.approx(
        average_precision_score(true.ravel(), estimated.ravel())
    )
    assert scores["shd"] == (true.ravel() != declared).sum()


def test_columns_follow_the_matching():
    true = np.array([[1, 0, 0], [0, 1, 1]])
    matching = metrics.Matching(
        np.arange(3), np.array([2, 0, 1]), np.ones(3), (3, 3), "pearson", False
    )
    estimated = np.empty((2, 3))
    estimated[:, matching.cols] = true
    assert metrics.graph_scores(true, estimated, matching)["shd"] == 0
    assert metrics.graph_scores(true, estimated, identity(3))["shd"] > 0


def test_latents_without_partner_cost():
    true = np.array([[1, 0], [0, 1]])
    extra = np.array([[1, 0, 1], [0, 1, 0]])
    scores = metrics.graph_scores(true, extra, identity(2, 3))
    assert (scores["precision"], scores["recall"], scores["shd"]) == (2 / 3, 1, 1)
    scores = metrics.graph_scores(true, true[:, :1], identity(2, 1))
    assert (scores["precision"], scores["recall"], scores["shd"]) == (1, 1 / 2, 1)


def test_empty_graphs_score_zero_without_warning():
    empty = np.zeros((2, 2))
    scores = metrics.graph_scores(empty, empty, identity(2))
    assert set(scores.values()) == {0.0}


def test_top_k_takes_the_largest_shifts():
    shift = np.array([[0.1, -3, 2], [1, 1, 0]])
    assert metrics.top_k_graph(shift).tolist() == [[False, True, True], [True, True, False]]
    assert metrics.top_k_graph(shift, 1).sum(1).tolist() == [1, 1]


def test_a_perfect_model_scores_half_under_the_released_matching():
    """The table of what sign luck does: perfect latents up to sign, held-out rows pruned."""
    released, ours = [], []
    for data in range(4):
        screen = simulate.sparse_shift(n_cells_per_condition=20, seed=data, as_released=True)
        graph = screen.graph.numpy()
        pruned = graph * (np.arange(100) < 80)[:, None]
        rng = np.random.default_rng(data)
        trained = (screen.cells.condition <= 80).numpy()
        z = screen.z.numpy()[trained]
        for _ in range(15):
            estimated = z * rng.choice([-1, 1], z.shape[1])
            signed = metrics.match_latents(z, estimated, signed=True)
            scores = metrics.graph_scores(graph, pruned, signed, as_released=True)
            released.append([scores[name] for name in ("precision", "recall", "f1")])
            matching = metrics.match_latents(z, estimated)
            ours.append(metrics.graph_scores(graph[:80], graph[:80], matching)["f1"])
    np.testing.assert_allclose(np.mean(released, 0), [0.54, 0.44, 0.48], atol=0.05)
    np.testing.assert_allclose(np.std(released, 0), [0.11, 0.09, 0.09], atol=0.04)
    assert ours == [1.0] * 60


# ---------------------------------------------------------------- out of fold


def test_out_of_fold_predictions_are_sklearns():
    z = latents(0, n_cells=20)
    estimated = noisy(z, 1)
    expected = cross_val_predict(LinearRegression(), estimated, z, cv=LeaveOneOut())
    np.testing.assert_allclose(metrics.out_of_fold(z, estimated, folds=20), expected)


@given(folds=st.integers(2, 30), seed=st.integers(0, 100))
@settings(max_examples=15)
def test_no_cell_sees_its_own_truth(folds, seed):
    z = latents(0, n_cells=30)
    estimated = noisy(z, 1)
    changed = z.copy()
    changed[7] += 100
    before, after = (
        metrics.out_of_fold(t, estimated, folds=folds, seed=seed) for t in (z, changed)
    )
    np.testing.assert_array_equal(before[7], after[7])
    assert not np.array_equal(before, after)


# ---------------------------------------------------------------- disentanglement, completeness


def orthogonal(n_latent, n_cells=64):
    """Uncorrelated standardised latents: columns of a Hadamard matrix."""
    from scipy.linalg import hadamard

    return hadamard(n_cells)[:, 1 : n_latent + 1].astype(float)


def test_the_truth_is_disentangled_and_complete():
    z = latents(0)
    assert metrics.dci(z, z) == pytest.approx((1, 1, 1 - 0.01**2))
    assert metrics.dci(z, z[:, [2, 0, 3, 1]] * [-3, 1, 0.1, -7]) == pytest.approx((1, 1, 0.9999))


def test_one_code_of_two_factors_is_complete_and_entangled():
    a, b, c = orthogonal(3).T
    scores = metrics.dci(np.stack([a, b], 1), np.stack([a + b, c], 1))
    assert scores.disentanglement == pytest.approx(0, abs=1e-6)
    assert scores.completeness == pytest.approx(1)
    # Each factor correlates .5**.5 with the sum; the lasso takes .01 off.
    assert scores.informativeness == pytest.approx(1 / 2 - 0.01**2)


def test_two_codes_of_one_factor_are_disentangled_and_incomplete():
    a, b = orthogonal(2).T
    scores = metrics.dci(a[:, None], np.stack([a + b, a - b], 1))
    assert (scores.disentanglement, scores.completeness) == pytest.approx((1, 0), abs=1e-6)


def test_correlated_codes_have_the_weights_of_least_angle_regression():
    z = latents(0, n_cells=200)
    codes = scale(noisy(z, 1)[:, :3])
    lasso = LassoLars(0.1, fit_intercept=False).fit(codes, scale(z))
    importance = np.abs(lasso.coef_).T
    expected = []
    for table in (importance, importance.T):
        scores = [1 - stats.entropy(row, base=table.shape[1]) for row in table]
        expected.append(np.average(scores, weights=table.sum(1)))
    expected.append(lasso.score(codes, scale(z)))
    assert metrics.dci(z, codes, alpha=0.1) == pytest.approx(expected, abs=1e-3)


def test_a_soft_threshold_by_hand():
    # Uncorrelated codes: a coefficient is the correlation less alpha, or 0.
    # Code a: .7 and 0 (of .05); code b: .5 and .5.
    a, b, c = orthogonal(3).T
    true = np.stack([0.8 * a + 0.6 * b, 0.05 * a + 0.6 * b + np.sqrt(1 - 0.3625) * c], 1)
    scores = metrics.dci(true, np.stack([a, b], 1), alpha=0.1)
    entropy = -(7 / 12 * np.log2(7 / 12) + 5 / 12 * np.log2(5 / 12))
    assert scores.disentanglement == pytest.approx((0.7 * 1 + 1.0 * 0) / 1.7, abs=1e-6)
    assert scores.completeness == pytest.approx((1.2 * (1 - entropy) + 0.5 * 1) / 1.7, abs=1e-6)
    explained = [1 - 0.1**2 - 0.1**2, 1 - (1 - 0.3625) - 0.05**2 - 0.1**2]
    assert scores.informativeness == pytest.approx(np.mean(explained), abs=1e-6)


def test_noise_predicts_nothing():
    rng = np.random.default_rng(0)
    z, noise = rng.standard_normal((2, 5000, 5))
    assert metrics.dci(z, noise).informativeness < 0.005
    assert metrics.dci(z, noise, alpha=0.1) == (0, 0, 0)
    assert metrics.dci(z, np.ones((5000, 2))) == (0, 0, 0)


def test_rotation_entangles():
    z = orthogonal(2)
    scores = []
    for angle in (0, np.pi / 16, np.pi / 8, np.pi / 4):
        turn = [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
        scores.append(metrics.dci(z, z @ turn))
    for name in ("disentanglement", "completeness"):
        course = [getattr(score, name) for score in scores]
        assert course == sorted(course, reverse=True)
        assert course[0] == pytest.approx(1)
        assert course[-1] == pytest.approx(0, abs=1e-6)
    assert scores[-1].informativeness > 0.999


def test_a_full_data_set_takes_seconds():
    rng = np.random.default_rng(0)
    z = rng.standard_normal((36_000, 15))
    start = time.process_time()
    metrics.dci(z, z @ rng.standard_normal((15, 15)))
    assert time.process_time() - start < 5


@pytest.mark.parametrize("method", ["pearson", "spearman"])
def test_rounding_does_not_lift_a_correlation_above_one(method):
    for seed in range(50):
        z = np.random.default_rng(seed).normal(size=(50, 3))
        assert np.abs(metrics.correlations(z, z, method=method)).max() <= 1


@given(seed=st.integers(0, 1000))
def test_the_cosine_is_scipys_and_of_nothing_zero(seed):
    first, second = np.random.default_rng(seed).normal(size=(2, 7))
    expected = 1 - distance.cosine(first, second)
    assert metrics.cosine(first, second) == pytest.approx(expected, abs=1e-12)
    constant = np.full(7, 0.1)
    for nil in (np.zeros(7), constant - constant.mean()):
        assert metrics.cosine(first, nil) == metrics.cosine(nil, first) == 0.0


# ---------------------------------------------------------------- calibration


@given(seed=st.integers(0, 1000), n_bins=st.integers(1, 12))
@settings(max_examples=30)
def test_calibration_is_sklearns(seed, n_bins):
    rng = np.random.default_rng(seed)
    probability = np.round(rng.uniform(size=80) ** 3, rng.integers(1, 4))
    truth = rng.uniform(size=80) < 0.4
    found = metrics.calibration(truth, probability, n_bins=n_bins)
    observed, mean = calibration_curve(truth, probability, n_bins=n_bins)
    used = found.count > 0
    np.testing.assert_allclose(found.mean[used], mean)
    np.testing.assert_allclose(found.observed[used], observed)
    assert found.count.sum() == 80
    assert np.isnan(found.mean[~used]).all()
    assert found.brier == pytest.approx(brier_score_loss(truth, probability))


def test_calibration_error_by_hand():
    probability = np.array([0.1, 0.3, 0.9, 0.9, 1.0])
    found = metrics.calibration(np.array([0, 1, 1, 1, 0]), probability, n_bins=2)
    # Lower bin: .2 said, .5 seen, two edges. Upper: 2.8 / 3 said, 2 / 3 seen, three edges.
    assert found.error == pytest.approx((2 * 0.3 + 3 * (2.8 - 2) / 3) / 5)
    assert found.count.tolist() == [2, 3]


def test_certain_and_right_is_calibrated_and_certain_and_wrong_is_not():
    truth = np.array([True, False, False])
    assert metrics.calibration(truth, truth.astype(float))[:2] == (0, 0)
    assert metrics.calibration(truth, 1.0 - truth)[:2] == (1, 1)


def test_probabilities_that_are_frequencies_are_calibrated():
    rng = np.random.default_rng(0)
    probability = rng.uniform(size=100_000)
    truth = rng.uniform(size=100_000) < probability
    assert metrics.calibration(truth, probability).error < 0.01
    assert metrics.calibration(truth, probability**3).error > 0.2


def test_aligned_edges_by_hand():
    true = np.array([[2.0, 0, 0], [0, -1, 1]])
    matching = metrics.Matching(
        np.array([0, 2]), np.array([1, 0]), np.ones(2), (3, 3), "pearson", False
    )
    estimated = np.array([[0.1, 0.9, 0.2], [0.8, 0.3, 0.4]])
    truth, probability = metrics.aligned_edges(true, estimated, matching)
    # Columns: true 0 with code 1, true 1 alone, true 2 with code 0, code 2 alone.
    assert probability.tolist() == [0.9, 0, 0.1, 0.2, 0.3, 0, 0.8, 0.4]
    assert truth.tolist() == [True, False, False, False, False, True, True, False]


# ---------------------------------------------------------------- agreement between models


def test_udr_of_two_by_two_by_hand():
    first = np.array([[1.0, 1], [2, 3], [3, 5], [4, 2], [5, 4]])
    second = np.array([[2.0, 5], [1, 2], [3, 3], [5, 1], [4, 4]])
    # Five ranks without ties correlate 1 - d / 20, d the sum of squared differences of rank:
    # 4 and 26 for the first latent of the first model, 18 and 22 for its second.
    r = np.array([[0.8, 0.3], [0.1, 0.1]])
    np.testing.assert_allclose(np.abs(metrics.correlations(first, second, method="spearman")), r)
    rows = 0.8**2 / (0.8 + 0.3) + 0.1**2 / (0.1 + 0.1)
    columns = 0.8**2 / (0.8 + 0.1) + 0.3**2 / (0.3 + 0.1)
    expected = (rows + columns) / (2 + 2)
    np.testing.assert_allclose(metrics.udr([first, second]), [expected, expected])
    # Without the second latent of the second model, three latents are left to average.
    expected = (0.8**2 / 0.8 + 0.1**2 / 0.1 + 0.8**2 / (0.8 + 0.1)) / (2 + 1)
    kl = [np.ones(2), np.array([1, 0.005])]
    np.testing.assert_allclose(metrics.udr([first, second], kl=kl), [expected, expected])


def literal_udr(codes, kl):
    """Sum by sum, as the formula is printed."""
    n_models, score = len(codes), {}
    for i, j in itertools.permutations(range(n_models), 2):
        live = [np.flatnonzero(kl[model] > 0.01) for model in (i, j)]
        r = {
            (a, b): abs(spearmanr(codes[i][:, a], codes[j][:, b]).statistic)
            for a in live[0]
            for b in live[1]
        }
        total = sum(
            max(r[a, b] for a in live[0]) ** 2 / sum(r[a, b] for a in live[0]) for b in live[1]
        ) + sum(
            max(r[a, b] for b in live[1]) ** 2 / sum(r[a, b] for b in live[1]) for a in live[0]
        )
        score[i, j] = total / (len(live[0]) + len(live[1]))
    return [np.median([score[i, j] for j in range(n_models) if j != i]) for i in range(n_models)]


@given(seed=st.integers(0, 1000))
@settings(max_examples=5)
def test_udr_is_its_formula(seed):
    rng = np.random.default_rng(seed)
    z = latents(seed)
    codes = [noisy(z, seed + model)[:, : 4 - model % 2] for model in range(4)]
    kl = [rng.choice([0.5, 0.02, 0.001], code.shape[1]) for code in codes]
    for nats in kl:
        nats[0] = 1.0
    np.testing.assert_allclose(metrics.udr(codes, kl=kl), literal_udr(codes, kl), atol=1e-12)


def test_relabelled_models_agree_and_rotated_ones_do_not():
    rng = np.random.default_rng(0)
    z = rng.standard_normal((20_000, 5))
    same = [flipped(rng, permuted(rng, z)) for _ in range(3)]
    turned = [z @ np.linalg.qr(rng.standard_normal((5, 5)))[0] for _ in range(3)]
    assert (metrics.udr(same) > 0.95).all()
    assert (metrics.udr(turned) < 0.6).all()
    mixed_company = metrics.udr([*same, turned[0]])
    assert mixed_company.argmin() == 3
    np.testing.assert_allclose(metrics.pairwise_mcc(same), 1)
    assert metrics.pairwise_mcc(turned)[0, 1] < 0.9


def test_dead_latents_are_ignored():
    rng = np.random.default_rng(0)
    z = rng.standard_normal((500, 3))
    codes = [z, permuted(rng, z), flipped(rng, z)]
    noise = [1e-3 * rng.standard_normal((500, 2)) for _ in codes]
    wide = [np.hstack([code, dead]) for code, dead in zip(codes, noise, strict=True)]
    kl = [np.array([1, 1, 1, 0.01, 0])] * 3
    np.testing.assert_allclose(metrics.udr(wide, kl=kl), metrics.udr(codes))
    assert (metrics.udr(wide) < metrics.udr(codes)).all()
    constant = [np.hstack([code, np.full((500, 2), 7.0)]) for code in codes]
    np.testing.assert_allclose(metrics.udr(constant), metrics.udr(codes))


def test_nothing_informative_agrees_with_nothing():
    z = latents(0)
    codes = [z, z, z]
    assert metrics.udr(codes, kl=[np.zeros(4)] * 3).tolist() == [0, 0, 0]
    # One model collapsed: the others still agree with each other in one of two partners.
    kl = [np.ones(4), np.ones(4), np.zeros(4)]
    assert metrics.udr(codes, kl=kl)[2] == 0
    assert metrics.udr(codes, kl=kl)[0] == pytest.approx(metrics.udr(codes)[0] / 2)
    assert metrics.udr([np.ones((5, 2)), np.ones((5, 3))]).tolist() == [0, 0]


@pytest.mark.parametrize("method", ["pearson", "spearman"])
def test_pairwise_mcc_is_the_mcc_of_every_pair(method):
    z = latents(0)
    codes = [noisy(z, 1), noisy(z, 2)[:, :3], z]
    expected = [[metrics.mcc(a, b, method=method) for b in codes] for a in codes]
    np.testing.assert_allclose(metrics.pairwise_mcc(codes, method=method), expected)


def test_chance_is_the_mcc_of_a_random_rotation():
    # Two latents: max(|cos t|, |sin t|), whose mean over t is 2 sqrt(2) / pi.
    two = metrics.chance_mcc(2, n_draws=20_000)
    assert ((two >= np.sqrt(0.5)) & (two <= 1)).all()
    np.testing.assert_allclose(two.mean(), 2 * np.sqrt(2) / np.pi, atol=0.003)
    assert (metrics.chance_mcc(1, n_draws=3) == 1).all()


def test_chance_is_the_mcc_of_rotated_cells():
    z = np.random.default_rng(0).standard_normal((4000, 5))
    turns = stats.ortho_group.rvs(5, size=60, random_state=1)
    counted = np.mean([metrics.mcc(z, z @ turn) for turn in turns])
    drawn = metrics.chance_mcc(5)
    np.testing.assert_allclose(drawn.mean(), counted, atol=4 * drawn.std() / np.sqrt(60))


# ---------------------------------------------------------------- intervals over seeds

SCORES = st.lists(st.floats(-100, 100), min_size=2, max_size=12)


@given(values=SCORES, level=st.floats(0.5, 0.999))
@settings(max_examples=40)
def test_intervals_are_scipys(values, level):
    found = metrics.interval(values, level=level)
    assert found.n == len(values)
    assert found.mean == pytest.approx(np.mean(values), abs=1e-12)
    if np.ptp(values) > 1e-6:
        expected = stats.t.interval(
            level, len(values) - 1, loc=np.mean(values), scale=stats.sem(values)
        )
        assert found[1:3] == pytest.approx(expected)


def test_an_interval_by_hand():
    # sd 1, standard error 1 / sqrt(3), t of 2 degrees of freedom 4.303 (any printed table).
    found = metrics.interval([1.0, 2.0, 3.0])
    assert found == pytest.approx((2, 2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5, 3), abs=1e-3)


def test_one_seed_has_no_interval():
    found = metrics.interval([0.9])
    assert (found.mean, found.n) == (0.9, 1)
    assert np.isnan(found[1:3]).all()
    assert np.isnan(metrics.paired([0.9], [0.8])[1:3]).all()
    assert np.isnan(metrics.paired([0.9], [0.8]).p_value)


def test_equal_values_have_an_interval_of_no_width():
    assert metrics.interval(3 * [0.5]) == (0.5, 0.5, 0.5, 3)
    assert metrics.paired(3 * [0.5], 3 * [0.5]) == (0, 0, 0, 3, 1)
    assert metrics.paired(3 * [0.75], 3 * [0.5]) == (0.25, 0.25, 0.25, 3, 0)


@given(seed=st.integers(0, 1000), n=st.integers(2, 10))
@settings(max_examples=30)
def test_paired_differences_are_scipys(seed, n):
    a, b = np.random.default_rng(seed).standard_normal((2, n))
    found, test = metrics.paired(a, b, level=0.9), stats.ttest_rel(a, b)
    assert found.p_value == pytest.approx(test.pvalue)
    assert found[:3] == pytest.approx((np.mean(a - b), *test.confidence_interval(0.9)))
    swapped = metrics.paired(b, a, level=0.9)
    assert swapped == pytest.approx((-found.mean, -found.high, -found.low, n, found.p_value))


def every_sign(differences):
    """Enumerate the null: the mean under every pattern of signs."""
    signs = itertools.product([-1, 1], repeat=len(differences))
    return np.array([np.mean(pattern * differences) for pattern in signs])


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000), n=st.integers(2, 9))
def test_few_pairs_are_tested_by_every_pattern_of_signs(seed, n):
    a, b = np.random.default_rng(seed).standard_normal((2, n))
    found, null = metrics.paired_signs(a, b, level=0.9), every_sign(a - b)
    two_sided = np.mean(np.abs(null) >= abs(np.mean(a - b)) - 1e-12)
    assert found.p_sign_flip == pytest.approx(two_sided)
    assert found.p_wilcoxon == pytest.approx(stats.wilcoxon(a, b).pvalue)
    assert found[:4] == metrics.paired(a, b, level=0.9)[:4]


def test_many_pairs_are_tested_by_seeded_flips():
    a, b = np.random.default_rng(3).standard_normal((2, 40))
    found = metrics.paired_signs(a + 0.3, b, seed=1)
    assert found == metrics.paired_signs(a + 0.3, b, seed=1)
    # Of 40 differences the mean is all but normal.
    spread = np.sqrt(np.sum((a + 0.3 - b) ** 2)) / 40
    normal = 2 * stats.norm.sf(abs(found.mean) / spread)
    assert found.p_sign_flip == pytest.approx(normal, abs=0.02)


@pytest.mark.parametrize(("a", "b"), [([2.0], [1.0]), ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])])
def test_one_pair_or_no_difference_proves_nothing(a, b):
    assert metrics.paired_signs(a, b)[4:] == (1.0, 1.0)


def test_holm_by_hand():
    # Sorted .01, .02, .03, .5 times 4, 3, 2, 1; no value falls below the one before it.
    np.testing.assert_allclose(metrics.holm([0.03, 0.01, 0.5, 0.02]), [0.06, 0.04, 0.5, 0.06])
    assert metrics.holm([0.9, 0.8]).tolist() == [1.0, 1.0]
    assert metrics.holm([]).size == 0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_lies_between_no_correction_and_bonferronis(p_values):
    p, corrected = np.array(p_values), metrics.holm(p_values)
    assert (corrected >= p).all()
    assert (corrected <= np.minimum(len(p) * p, 1)).all()
    smallest = p.argmin()
    assert corrected[smallest] == min(1, len(p) * p[smallest])
    assert (np.diff(corrected[np.argsort(p)]) >= 0).all()


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), n_levels=st.integers(1, 6))
def test_average_precision_is_sklearns(seed, n_levels):
    rng = np.random.default_rng(seed)
    truth, score = rng.random(15) < 0.4, rng.integers(0, n_levels, 15)
    truth[0] = True
    expected = average_precision_score(truth, score)
    assert metrics.average_precision(truth, score) == pytest.approx(expected)


def test_pairing_removes_what_the_seeds_share():
    rng = np.random.default_rng(0)
    data = rng.normal(scale=10, size=10)
    better, worse = data + 1 + 0.1 * rng.standard_normal(10), data
    assert metrics.paired(better, worse).p_value < 1e-6
    assert metrics.interval(better).low < metrics.interval(worse).high


# ---------------------------------------------------------------- errors


def unchecked(function):
    """Strip the shape checks of the test run: here the function's own message is on trial."""
    return inspect.unwrap(function)


Z = np.ones((4, 2)) * np.arange(4)[:, None]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: unchecked(metrics.correlations)(Z, Z[:3]), "true has 4 rows and estimated 3; "),
        (lambda: unchecked(metrics.correlations)(Z[0], Z), r"true has shape \(2,\); expected \(c"),
        (lambda: metrics.mcc(Z, Z * np.nan), "estimated is nan for cell 0, latent 0; expected"),
        (
            lambda: unchecked(metrics.correlations)(Z, Z, method="kendall"),
            "method is 'kendall'; expected 'pearson' or 'spearman'",
        ),
        (lambda: metrics.linear_r2(Z, Z, folds=1), r"folds=1; expected a number from 2 to 4"),
        (lambda: metrics.out_of_fold(Z, Z, folds=5), r"folds=5; expected a number from 2 to 4"),
        (lambda: metrics.dci(Z, Z, alpha=0.0), r"alpha=0.0; expected a positive penalty"),
        (lambda: metrics.udr([Z]), "codes holds 1 models; expected at least 2"),
        (lambda: metrics.chance_mcc(0), "n_latent is 0 and n_draws 10000; expected at least one"),
        (lambda: metrics.pairwise_mcc([Z, Z[:0]]), r"codes\[1\] has shape \(0, 2\); expected"),
        (
            lambda: unchecked(metrics.udr)([Z, Z[:3]]),
            r"codes have \[4, 3\] rows; expected the same",
        ),
        (
            lambda: metrics.udr([Z, Z], kl=[np.ones(2), np.ones(3)]),
            r"kl has shapes \[\(2,\), \(3,\)\]; expected \[\(2,\), \(2,\)\], one per latent",
        ),
        (
            lambda: metrics.udr([Z, Z], kl=[np.ones(2), np.full(2, np.nan)]),
            "kl holds NaN; expected mean divergences in nats",
        ),
        (lambda: metrics.interval([]), r"values has shape \(0,\); expected one number per seed"),
        (lambda: metrics.interval([1.0, np.inf]), r"values is \[1.0, inf\]; expected finite"),
        (
            lambda: metrics.interval([1.0], level=95.0),
            "level=95.0; expected a coverage between 0 and",
        ),
        (
            lambda: metrics.paired([1.0], [1.0, 2.0]),
            "a has 1 values and b 2; expected the same seeds",
        ),
        (
            lambda: unchecked(metrics.calibration)(Z, Z[:, 0]),
            r"truth has shape \(4, 2\), probabilities \(4,\); expected two flat arrays",
        ),
        (
            lambda: metrics.calibration(np.ones(2), np.array([0.5, -2])),
            "probabilities hold -2.0; expected numbers from 0 to 1",
        ),
        (
            lambda: metrics.calibration(np.ones(2), np.array([0.5, 1.5])),
            "probabilities hold 1.5; expected numbers from 0 to 1",
        ),
        (
            lambda: metrics.calibration(np.ones(1), np.array([np.nan])),
            "probabilities hold nan; expected numbers from 0 to 1",
        ),
        (
            lambda: metrics.calibration(np.array([0.2, 0.9]), np.array([0, 1])),
            r"truth holds 0.2; expected 0 and 1 \(or booleans\), and the probabilities after",
        ),
        (
            lambda: metrics.calibration(np.array([0, np.nan]), np.zeros(2)),
            "truth holds nan; expected 0 and 1",
        ),
        (
            lambda: metrics.calibration(np.ones(1), np.ones(1), n_bins=0),
            "n_bins=0; expected at least 1",
        ),
        (
            lambda: unchecked(metrics.within_condition_mcc)(Z, Z, np.arange(3)),
            r"condition has shape \(3,\); expected \(4,\), one per cell",
        ),
        (lambda: metrics.top_k_graph(Z, 3), "k=3; expected 1 to 2, the number of latents"),
        (
            lambda: unchecked(metrics.aligned_edges)(Z, Z[:3], identity(2)),
            r"true graph has shape \(4, 2\), estimated \(3, 2\); expected two matrices with one",
        ),
        (
            lambda: metrics.graph_scores(Z, Z, identity(2, 3)),
            r"graphs have 2 true and 2 estimated latents, but the matching was made for \(2, 3\)",
        ),
        (
            lambda: metrics.graph_scores(Z, Z * np.nan, identity(2)),
            "estimated graph holds 8 NaN; expected probabilities",
        ),
        (
            lambda: metrics.holm([0.1, 1.2]),
            r"p_values are \[0.1, 1.2\]; expected numbers from 0 to 1, one per test",
        ),
        (
            lambda: metrics.average_precision(np.zeros(3, bool), np.arange(3)),
            r"shape \(3,\) with 0 true, score has shape \(3,\); expected one score per item",
        ),
        (
            lambda: metrics.average_precision(np.ones(1, bool), np.array([np.nan])),
            "score holds nan; expected finite numbers",
        ),
        (
            lambda: metrics.graph_scores(Z, Z, identity(2), as_released=True),
            r"signed=False, shape \(2, 2\); the released code scores equal widths matched by",
        ),
    ],
)
def test_errors_say_what_arrived_and_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
