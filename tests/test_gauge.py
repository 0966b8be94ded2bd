"""Origin and axes of the latents, against hand-made cases in which both are known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ortho_group

from smslib import gauge


def turn(degrees):
    a = np.deg2rad(degrees)
    return np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])


def total(frame, mean, n_cells):
    """Return the price of the graph in a frame, for alpha = 10."""
    return gauge.cost(gauge.evidence(frame.of(mean), n_cells), alpha=10.0).sum()


SPARSE = np.array([[2.0, 0], [0, 1.5], [-1, 0], [0, 0], [0, -2], [0, 0], [0, 0], [0.5, 0], [0, 0]])
CELLS = np.full(len(SPARSE), 100)


def test_the_origin_is_where_most_targets_are():
    """A constant in nearly all shifts is no effect; the targets without it have one."""
    shift = np.zeros((9, 3))
    shift[:, 1] = 0.8
    shift[2, 1] = 0.0
    shift[4, 0] = 1.0
    frame = gauge.centred(shift)
    np.testing.assert_array_equal(frame.origin, [0, 0.8, 0])
    expected = np.zeros((9, 3))
    expected[2, 1], expected[4, 0] = -0.8, 1.0
    np.testing.assert_allclose(frame.of(shift), expected)


def test_mean_codes_by_hand():
    """Condition 2 perturbs both targets and counts for neither; the third target has no cells."""
    codes = np.array([[1.0, 0.0], [3.0, 1.0], [5.0, 5.0], [-2.0, 4.0]])
    condition, single = np.array([1, 1, 2, 3]), np.array([3, 1, 4])
    mean, n_cells = gauge.target_means(codes, condition, single)
    np.testing.assert_array_equal(mean, [[-2, 4], [2, 0.5], [0, 0]])
    assert n_cells.tolist() == [1, 2, 0]


def test_evidence_by_hand():
    found = gauge.evidence(np.array([[0.5, -2.0], [0.0, 1.0]]), np.array([40, 10]))
    np.testing.assert_allclose(found, [[5.0, 80.0], [0.0, 5.0]])


@given(st.floats(0, 1e3), st.floats(1.01, 100))
def test_the_cost_is_that_of_the_best_gate(nats, alpha):
    shut = np.logspace(-6, 0, 8001)  # its steps are of the same share everywhere
    by_trial = (shut * nats - (alpha - 1) * np.log(shut)).min()
    found = gauge.cost(np.array([nats]), alpha=alpha)
    assert found == pytest.approx([by_trial], rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("degrees", [-35, 0, 20, 40])
def test_axes_that_were_turned_are_turned_back(degrees):
    shift = SPARSE @ turn(degrees) + np.array([0.3, -0.7])
    frame = gauge.sparsest(shift, CELLS, alpha=5.0)
    np.testing.assert_allclose(frame.of(shift), SPARSE, atol=2e-2)
    np.testing.assert_allclose(frame.axes.T @ frame.axes, np.eye(2), atol=1e-9)


def test_further_than_half_a_right_angle_the_latents_come_out_exchanged():
    frame = gauge.sparsest(SPARSE @ turn(70), CELLS, alpha=5.0)
    found = np.abs(frame.of(SPARSE @ turn(70)))
    np.testing.assert_allclose(found, np.abs(SPARSE[:, ::-1]), atol=2e-2)


def test_in_two_dimensions_the_cheapest_angle_by_enumeration():
    rng = np.random.default_rng(3)
    for _ in range(5):
        mean, n_cells = rng.standard_normal((12, 2)), rng.integers(5, 200, 12)
        found = total(gauge.sparsest(mean, n_cells, alpha=10.0), mean, n_cells)
        origin = gauge.centred(mean).origin
        every = [gauge.Frame(origin, turn(degrees)) for degrees in np.arange(0, 90, 0.1)]
        assert found <= min(total(frame, mean, n_cells) for frame in every) + 0.1


def test_many_latents_turned_at_random_are_turned_back():
    """Downhill alone ends in other optima for some of these rotations."""
    rng = np.random.default_rng(0)
    shift = rng.choice([0, 2.0, -1.5], (60, 10), p=[0.8, 0.1, 0.1])
    n_cells, missed = np.full(60, 100), 0
    least = total(gauge.centred(shift), shift, n_cells)
    for turned in ortho_group.rvs(10, size=4, random_state=1):
        mean = shift @ turned
        frame = gauge.sparsest(mean, n_cells, alpha=10.0)
        found = np.abs(frame.axes.T @ turned.T)
        np.testing.assert_allclose(np.sort(found, axis=0)[-1], 1, atol=5e-3)
        downhill = gauge.sparsest(mean, n_cells, alpha=10.0, thorough=False)
        assert total(frame, mean, n_cells) <= total(downhill, mean, n_cells) + 1e-9
        missed += total(downhill, mean, n_cells) > 1.01 * least
    assert missed


def test_targets_with_more_cells_have_more_say():
    """Two families of targets agree on no axes: those with a hundred times the cells decide."""
    both = np.concatenate([SPARSE, SPARSE @ turn(30)])
    n_cells = np.repeat([100, 2], len(SPARSE))
    for order, wanted in ((n_cells, 0), (n_cells[::-1].copy(), 30)):
        axes = gauge.sparsest(both, order, alpha=5.0).axes
        np.testing.assert_allclose(axes, turn(wanted).T, atol=0.06)


def test_no_axes_are_cheaper_than_those_given_back():
    rng = np.random.default_rng(0)
    mean, n_cells = rng.standard_normal((30, 4)), rng.integers(5, 200, 30)
    frame = gauge.sparsest(mean, n_cells, alpha=10.0)
    found = total(frame, mean, n_cells)
    assert found <= total(gauge.centred(mean), mean, n_cells)
    near = [np.linalg.qr(frame.axes + 0.02 * rng.standard_normal((4, 4)))[0] for _ in range(50)]
    assert found <= min(total(gauge.Frame(frame.origin, a), mean, n_cells) for a in near) + 1e-6


def test_of_a_single_latent_only_the_origin_moves():
    frame = gauge.sparsest(SPARSE[:, :1] + 0.4, CELLS, alpha=5.0)
    assert (frame.origin.item(), frame.axes.item()) == pytest.approx((0.4, 1.0))


@pytest.mark.parametrize(
    ("mean", "n_cells", "message"),
    [
        (
            np.where(SPARSE == 1.5, np.nan, SPARSE),
            CELLS,
            "the means of 1 of 9 targets are not fin",
        ),
        (SPARSE[:0], CELLS[:0], "mean has 0 rows and n_cells shape"),
    ],
)
def test_means_that_cannot_be_turned_are_refused(mean, n_cells, message):
    with pytest.raises(ValueError, match=message):
        gauge.sparsest(mean, n_cells, alpha=5.0)


@pytest.mark.parametrize("alpha", [1.0, 0.5, float("nan")])
def test_a_flat_prior_prefers_no_axes(alpha):
    with pytest.raises(ValueError, match="expected more than 1"):
        gauge.sparsest(SPARSE, CELLS, alpha=alpha)
    with pytest.raises(ValueError, match="expected more than 1"):
        gauge.cost(np.ones(3), alpha=alpha)
