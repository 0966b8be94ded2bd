"""Controls on data whose answer is known, and what all of them promise."""

import inspect

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ortho_group
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from smslib import controls, metrics

N_LATENT, N_CONDITIONS, PER_CONDITION = 3, 12, 100


def counts_of(logs):
    """Counts whose log(1 + count) is exactly a shifted copy of the logs."""
    return np.expm1(logs - logs.min() + 0.5)


@pytest.fixture(scope="module")
def screen():
    """A linear screen: each condition shifts one latent by 6, genes mix the latents."""
    rng = np.random.default_rng(0)
    condition = rng.permutation(np.repeat(np.arange(N_CONDITIONS), PER_CONDITION))
    shift = np.zeros((N_CONDITIONS, N_LATENT))
    sign = np.where(np.arange(N_CONDITIONS) // N_LATENT % 2, -6, 6)
    shift[np.arange(N_CONDITIONS), np.arange(N_CONDITIONS) % N_LATENT] = sign
    z = shift[condition] + rng.standard_normal((len(condition), N_LATENT))
    logs = z @ rng.standard_normal((N_LATENT, 8)) + 0.05 * rng.standard_normal((len(z), 8))
    return counts_of(logs), condition, z, shift


# ---------------------------------------------------------------- scale


@pytest.mark.parametrize("n_latent", [1, 3])
def test_whitened_codes_have_the_identity_as_covariance_within_conditions(n_latent):
    rng = np.random.default_rng(0)
    condition = np.repeat([2, 3, 5], 200)
    mixing = rng.standard_normal((n_latent, n_latent))
    mixed = rng.standard_normal((600, n_latent)) @ mixing + condition[:, None]
    white = controls.whiten(mixed, condition)
    centred = np.vstack([part - part.mean(0) for part in np.split(white, 3)])
    np.testing.assert_allclose(np.atleast_2d(np.cov(centred.T)), np.eye(n_latent), atol=1e-9)
    np.testing.assert_allclose(metrics.linear_r2(mixed, white), 1.0)


# ---------------------------------------------------------------- PCA


def test_pca_finds_blocks_of_genes():
    rng = np.random.default_rng(0)
    z = rng.standard_normal((500, 3))
    blocks = np.kron(np.diag([3.0, 2, 1]), np.ones((1, 4)))
    found = controls.pca(counts_of(z @ blocks), 3)
    assert metrics.mcc(z, found) > 0.99
    assert metrics.linear_r2(z, found) == pytest.approx(1)
    assert metrics.match_latents(z, found).cols.tolist() == [0, 1, 2]


def test_pca_scores_are_those_of_the_singular_value_decomposition(screen):
    logs = np.log1p(screen[0])
    left, size, _ = np.linalg.svd(logs - logs.mean(0), full_matrices=False)
    found = controls.pca(screen[0], 4)
    np.testing.assert_allclose(np.abs(found), np.abs(left * size)[:, :4], atol=1e-6)


# ---------------------------------------------------------------- LDA


def test_lda_recovers_sparse_shifts_where_pca_does_not(screen):
    counts, condition, z, shift = screen
    found = controls.lda(counts, condition, N_LATENT)
    assert metrics.mcc(z, found.latents) > 0.99
    assert metrics.mcc(z, controls.pca(counts, N_LATENT)) < 0.9
    graph = metrics.top_k_graph(found.shift, 1)
    matching = metrics.match_latents(z, found.latents)
    assert metrics.graph_scores(shift, graph, matching)["f1"] == 1
    # Within a condition the axes have unit variance, so shifts keep their size.
    np.testing.assert_allclose(np.abs(found.shift).max(1), 6, atol=0.6)


def test_lda_is_a_rotation_of_sklearns_with_the_class_means_beside_it(screen):
    counts, condition, *_ = screen
    found = controls.lda(counts, condition, N_LATENT)
    plain = LinearDiscriminantAnalysis(n_components=N_LATENT)
    scores = plain.fit_transform(np.log1p(counts), condition)
    np.testing.assert_allclose(found.latents @ found.latents.T, scores @ scores.T, atol=1e-6)
    means = [found.latents[condition == label].mean(0) for label in range(N_CONDITIONS)]
    np.testing.assert_allclose(found.shift, means, atol=1e-9)


def test_lda_takes_labels_with_gaps_and_genes_without_counts(screen):
    counts, condition, *_ = screen
    expected = controls.lda(counts, condition, N_LATENT)
    silent = np.hstack([counts, np.zeros((len(counts), 2))])
    found = controls.lda(silent, 5 * condition + 3, N_LATENT)
    np.testing.assert_allclose(found.latents, expected.latents)
    np.testing.assert_allclose(found.shift, expected.shift)


# ---------------------------------------------------------------- quartimax


@given(seed=st.integers(0, 1000))
@settings(max_examples=15)
def test_quartimax_undoes_a_rotation_of_simple_loadings(seed):
    rng = np.random.default_rng(seed)
    simple = np.eye(4)[np.arange(20) % 4] * rng.uniform(1, 3, (20, 1))
    turn = ortho_group.rvs(4, random_state=seed)
    rotated, rotation = controls.quartimax(simple @ turn)
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(4), atol=1e-9)
    np.testing.assert_allclose(rotated, simple @ turn @ rotation, atol=1e-12)
    assert (rotated**4).sum() == pytest.approx((simple**4).sum(), rel=1e-6)
    assert metrics.mcc(simple, rotated) == pytest.approx(1, abs=1e-3)


def test_quartimax_in_the_plane_finds_the_best_of_all_angles():
    loadings = np.random.default_rng(1).standard_normal((10, 2))
    angles = np.linspace(0, np.pi / 2, 10_001)
    cos, sin = np.cos(angles), np.sin(angles)
    first, second = np.outer(loadings[:, 0], cos), np.outer(loadings[:, 1], sin)
    third, fourth = np.outer(loadings[:, 0], sin), np.outer(loadings[:, 1], cos)
    criterion = ((first + second) ** 4 + (fourth - third) ** 4).sum(0)
    rotated, _ = controls.quartimax(loadings)
    assert (rotated**4).sum() == pytest.approx(criterion.max(), rel=1e-6)


def test_quartimax_is_statsmodels():
    rotations = pytest.importorskip("statsmodels.multivariate.factor_rotation")
    rng = np.random.default_rng(0)
    loadings = 5 * (rng.uniform(size=(40, 4)) < 0.3) + 0.3 * rng.standard_normal((40, 4))
    expected, _ = rotations.rotate_factors(loadings, "quartimax")
    rotated, _ = controls.quartimax(loadings)
    assert (rotated**4).sum() == pytest.approx((expected**4).sum(), rel=1e-6)
    assert metrics.mcc(expected, rotated) == pytest.approx(1, abs=1e-4)


# ---------------------------------------------------------------- regression, shuffled labels


def test_regression_is_exact_where_the_world_is_linear(screen):
    counts, _, z, _ = screen
    rng = np.random.default_rng(0)
    found = controls.regression(counts, z)
    assert metrics.linear_r2(z, found) > 0.98
    # Out of fold: nothing can be learnt about noise.
    noise = rng.standard_normal(z.shape)
    assert metrics.mcc(noise, controls.regression(counts, noise)) < 0.1


@given(seed=st.integers(0, 1000), counts=st.lists(st.integers(1, 6), min_size=2, max_size=5))
def test_shuffled_labels_keep_the_cells_per_condition(seed, counts):
    condition = np.repeat(np.arange(len(counts)), counts)
    shuffled = controls.shuffle_labels(condition, seed=seed)
    assert np.bincount(shuffled).tolist() == counts


def test_shuffled_labels_say_nothing(screen):
    counts, condition, z, _ = screen
    shuffled = controls.shuffle_labels(condition, seed=0)
    agree = np.mean(shuffled == condition)
    assert agree == pytest.approx(1 / N_CONDITIONS, abs=0.03)
    assert not np.array_equal(shuffled, controls.shuffle_labels(condition, seed=1))
    assert np.abs(controls.lda(counts, shuffled, N_LATENT).shift).max() < 1


# ---------------------------------------------------------------- what all controls promise

CONTROLS = {
    "pca": lambda counts, condition, z: controls.pca(counts, N_LATENT),
    "lda": lambda counts, condition, z: controls.lda(counts, condition, N_LATENT).latents,
    "regression": lambda counts, condition, z: controls.regression(counts, z),
}


def test_every_control_is_under_contract():
    helpers = {"Discriminant", "whiten", "quartimax", "shuffle_labels"}
    assert CONTROLS.keys() == set(controls.__all__) - helpers


@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_gives_finite_latents_the_same_every_time(name, screen):
    counts, condition, z, _ = screen
    found = CONTROLS[name](counts, condition, z)
    assert found.shape == (len(counts), N_LATENT)
    assert found.dtype == np.float64
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found, CONTROLS[name](counts, condition, z))
    tensors = [torch.from_numpy(array) for array in (counts, condition, z)]
    np.testing.assert_array_equal(found, CONTROLS[name](*tensors))


@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_leaves_its_input_alone(name, screen):
    given_arrays = [array.copy() for array in screen[:3]]
    CONTROLS[name](*given_arrays)
    for array, original in zip(given_arrays, screen[:3], strict=True):
        np.testing.assert_array_equal(array, original)


# ---------------------------------------------------------------- errors


def unchecked(function):
    """Strip the shape checks of the test run: here the function's own message is on trial."""
    return inspect.unwrap(function)


COUNTS = np.random.default_rng(0).poisson(5, (12, 4))
LABELS = np.arange(12) % 3


@pytest.mark.parametrize("name", CONTROLS)
@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (COUNTS - 99.0, "counts are -.* for cell 0, gene 0; expected finite, non-negative"),
        (COUNTS + np.nan, "counts are nan for cell 0, gene 0; expected finite, non-negative"),
    ],
)
def test_every_control_wants_counts(name, counts, message):
    with pytest.raises(ValueError, match=message):
        CONTROLS[name](counts, LABELS, COUNTS[:, :2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: unchecked(controls.pca)(COUNTS[0], 1),
            r"counts have shape \(4,\); expected \(cells, genes\)",
        ),
        (lambda: controls.pca(COUNTS, 5), r"n_latent=5; expected 1 to 4 \(the smaller side"),
        (lambda: controls.pca(COUNTS, 0), r"n_latent=0; expected 1 to 4 \(the smaller side"),
        (lambda: controls.lda(COUNTS, LABELS, 3), r"n_latent=3; expected 1 to 2 \(conditions - 1"),
        (
            lambda: controls.lda(np.eye(3)[LABELS][:, [0, 0]] + COUNTS[:, :1], LABELS, 2),
            r"n_latent=2; expected 1 to 1 \(what the class means span\)",
        ),
        (
            lambda: unchecked(controls.lda)(COUNTS, LABELS[:5], 2),
            r"condition has shape \(5,\); expected \(12,\), one per cell",
        ),
        (
            lambda: controls.lda(COUNTS, np.zeros(12, dtype=int), 1),
            r"condition holds 1 label\(s\); expected at least 2 to tell apart",
        ),
        (
            lambda: controls.shuffle_labels(np.zeros(12, dtype=int), seed=0),
            r"condition holds 1 label\(s\); expected at least 2",
        ),
        (
            lambda: unchecked(controls.shuffle_labels)(COUNTS, seed=0),
            r"condition has shape \(12, 4\); expected \(48,\), one per cell",
        ),
        (
            lambda: controls.quartimax(np.array([[1.0, np.nan]])),
            r"loadings have shape \(1, 2\); expected a matrix of finite numbers",
        ),
        (
            lambda: controls.whiten(COUNTS[:, [0, 0]], LABELS),
            "within conditions 2 codes vary in 1 directions; expected as many",
        ),
        (
            lambda: unchecked(controls.whiten)(COUNTS, LABELS[:5]),
            r"condition has shape \(5,\); expected \(12,\), one per cell",
        ),
        (
            lambda: controls.regression(COUNTS, COUNTS[:, :2], folds=13),
            r"folds=13; expected a number from 2 to 12 \(cells\)",
        ),
    ],
)
def test_errors_say_what_arrived_and_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
