"""Scores against sklearn, scipy, cases solved by hand, and the invariances they promise."""

import inspect

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr
from sklearn.linear_model import LinearRegression
from sklearn.metrics import average_precision_score, precision_recall_fscore_support

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
}
CASES = [(name, change) for name, (_, changes) in INVARIANT.items() for change in changes]


def test_every_public_metric_is_in_the_registry():
    registered = {name.split(",")[0] for name in INVARIANT}
    assert registered == set(metrics.__all__) - {"Matching"}


@pytest.mark.parametrize(("name", "change"), CASES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_change_of_coordinates_keeps_the_score(name, change, seed):
    score = INVARIANT[name][0]
    z = latents(seed)
    estimated = noisy(z, seed + 1)
    changed = change(np.random.default_rng(seed + 2), estimated)
    assert score(z, changed) == pytest.approx(score(z, estimated), abs=1e-9)


@pytest.mark.parametrize("name", ["mcc", "mcc, spearman", "linear_r2", "within_condition_mcc"])
@settings(max_examples=15, deadline=None)
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


@settings(max_examples=40, deadline=None)
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
        (lambda: metrics.linear_r2(Z, Z, folds=1), r"folds=1; expected None .* from 2 to 4"),
        (lambda: metrics.linear_r2(Z, Z, folds=5), r"folds=5; expected None .* from 2 to 4"),
        (
            lambda: unchecked(metrics.within_condition_mcc)(Z, Z, np.arange(3)),
            r"condition has shape \(3,\); expected \(4,\), one per cell",
        ),
        (lambda: metrics.top_k_graph(Z, 3), "k=3; expected 1 to 2, the number of latents"),
        (
            lambda: unchecked(metrics.graph_scores)(Z, Z[:3], identity(2)),
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
            lambda: metrics.graph_scores(Z, Z, identity(2), as_released=True),
            r"signed=False, shape \(2, 2\); the released code scores equal widths matched by",
        ),
    ],
)
def test_errors_say_what_arrived_and_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
