"""Enumerated axes against every rotation of a plane, and against designs worked by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smslib.enumeration import candidates, pinned
from smslib.identifiability import diagnose


def drawn(n_conditions, n_latent, n_targets, seed):
    rng = np.random.default_rng(seed)
    graph = rng.random((n_conditions, n_latent)).argsort(1) < n_targets
    return graph * rng.normal(4, 0.5, graph.shape) * rng.choice([-1, 1], graph.shape)


@given(st.integers(0, 999), st.integers(1, 2), st.integers(3, 9))
def test_in_a_plane_a_sweep_of_all_angles_finds_no_sparser_axis(seed, n_targets, n_conditions):
    shift = drawn(n_conditions, 2, n_targets, seed)
    found = candidates(shift)
    angles = np.concatenate([np.linspace(0, np.pi, 500), np.arctan2(-shift[:, 0], shift[:, 1])])
    sweep = shift @ np.stack([np.cos(angles), np.sin(angles)])
    assert found.n_shifted[0] == (np.abs(sweep) > 1e-6).sum(0).min()


def test_candidates_are_orthogonal_to_what_they_leave_alone():
    shift = drawn(7, 3, 2, seed=0)
    direction, n_shifted = candidates(shift)
    np.testing.assert_allclose(np.linalg.norm(direction, axis=1), 1)
    left_alone = (np.abs(direction @ shift.T) < 1e-9).sum(1)
    assert (left_alone >= 2).all()
    np.testing.assert_array_equal(left_alone + n_shifted, 7)
    assert (np.diff(n_shifted) >= 0).all()


def test_another_frame_has_the_same_sparsest_axes():
    shift = drawn(8, 3, 2, seed=1)
    frame = np.linalg.qr(np.random.default_rng(2).normal(size=(3, 3)))[0]
    np.testing.assert_array_equal(candidates(shift).n_shifted, candidates(shift @ frame).n_shifted)


@given(st.integers(0, 999), st.integers(1, 3), st.integers(4, 9))
def test_pinned_axes_satisfy_the_criterion(seed, n_targets, n_conditions):
    """A map that the criterion allows adds no edge, so the axes cannot be the only sparsest."""
    shift = drawn(n_conditions, 3, n_targets, seed)
    if pinned(shift):
        assert diagnose(shift != 0, shift=shift).criterion


@pytest.mark.parametrize(
    ("shift", "expected"),
    [
        (np.eye(3), True),
        (np.eye(3)[[0, 0, 1]], False),  # nothing moves the third
        ([[1, 2], [3, 1], [2, -1]], False),  # all axes shift all or all but one
        ([[1, 0], [2, 0], [0, 1], [0, 3], [1, 1]], True),
        ([[1, 0], [1, 2], [1, 3]], False),  # (1, 2) removed from the first: two conditions, too
    ],
)
def test_designs_by_hand(shift, expected):
    assert pinned(np.array(shift)) is expected


def test_the_criterion_is_not_enough_with_one_strength_per_target():
    """A triangle: two targets each, so an axis that cancels one of them is as sparse."""
    triangle = np.array([[1.0, 2.0, 0.0], [0.0, 1.0, 3.0], [2.0, 0.0, 1.0]])
    assert diagnose(triangle != 0).criterion
    assert not pinned(triangle)


def test_what_rounding_leaves_of_a_zero_is_one():
    shift = np.array([[1.0, 0], [2, 0], [0, 1], [0, 3], [1, 1]])
    assert pinned(np.where(shift == 0, 1e-12, shift))


@pytest.mark.parametrize(
    ("shape", "says"),
    [((3,), "expected"), ((3, 1), "two latents"), ((2, 3), "conditions"), ((90, 5), "choices")],
)
def test_what_cannot_be_enumerated_is_refused(shape, says):
    with pytest.raises(ValueError, match=says):
        candidates(np.ones(shape))
