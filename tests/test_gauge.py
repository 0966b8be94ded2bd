"""Origin and axes of the latents, against hand-made cases in which both are known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smslib import gauge


def turn(degrees):
    a = np.deg2rad(degrees)
    return np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])


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

    def total(frame):
        nats = gauge.evidence(frame.of(mean), n_cells)
        return gauge.cost(nats, alpha=10.0).sum()

    frame = gauge.sparsest(mean, n_cells, alpha=10.0)
    assert total(frame) <= total(gauge.centred(mean))
    near = [np.linalg.qr(frame.axes + 0.02 * rng.standard_normal((4, 4)))[0] for _ in range(50)]
    assert total(frame) <= min(total(gauge.Frame(frame.origin, axes)) for axes in near) + 1e-6


@pytest.mark.parametrize("alpha", [1.0, 0.5, float("nan")])
def test_a_flat_prior_prefers_no_axes(alpha):
    with pytest.raises(ValueError, match="expected more than 1"):
        gauge.sparsest(SPARSE, CELLS, alpha=alpha)
    with pytest.raises(ValueError, match="expected more than 1"):
        gauge.cost(np.ones(3), alpha=alpha)
