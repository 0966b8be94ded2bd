"""The diagnosis of a design against what linear maps do to random shifts, and cases by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from smslib.identifiability import diagnose

GRAPHS = hnp.arrays(bool, st.tuples(st.integers(1, 7), st.integers(1, 5)))


def new_edges(graph, i, j):
    """Edges that appear when latent j is added to latent i, at random shifts."""
    shift = np.random.default_rng(0).normal(size=graph.shape) * graph
    shift[:, i] += 0.7 * shift[:, j]
    return ((shift != 0) & ~graph).sum()


@given(GRAPHS)
def test_a_latent_mixes_in_where_that_adds_no_edge(graph):
    n_latent, mixes = graph.shape[1], diagnose(graph).mixes
    for i in range(n_latent):
        for j in set(range(n_latent)) - {i}:
            assert mixes[i, j] == (new_edges(graph, i, j) == 0)
    assert mixes.diagonal().all()


@given(GRAPHS)
def test_the_criterion_is_that_target_sets_intersect_in_each_latent(graph):
    found = diagnose(graph)
    n_latent = graph.shape[1]
    meet = [graph[graph[:, j]].all(0) for j in range(n_latent)]  # all true where none moves j
    single = all(meet[j].sum() == 1 for j in range(n_latent)) and graph.any(0).all()
    shift = np.random.default_rng(1).normal(size=graph.shape) * graph
    assert found.criterion == (single and np.linalg.matrix_rank(shift) == n_latent)


@given(GRAPHS)
def test_generic_shifts_have_the_rank_of_the_largest_matching(graph):
    shift = np.random.default_rng(2).normal(size=graph.shape) * graph
    assert diagnose(graph).rank == diagnose(graph, shift=shift).rank


def test_a_triangle_identifies_three_latents():
    found = diagnose(np.array([[1, 1, 0], [0, 1, 1], [1, 0, 1]]))
    assert found.criterion
    assert found.alone.all()


def test_two_latents_always_moved_together_stay_entangled():
    found = diagnose(np.array([[1, 1, 0], [0, 0, 1], [1, 1, 1]]))
    assert not found.criterion
    assert [found.partners(k) for k in range(3)] == [(1,), (0,), ()]
    assert found.rank == 3  # the axes are unknown, the space is not


@given(GRAPHS)
def test_a_rotation_mixes_latents_with_the_same_targets_alone(graph):
    same = [[bool((a == b).all()) for b in graph.T] for a in graph.T]
    assert diagnose(graph).rotations.tolist() == same


def test_a_latent_that_is_moved_with_another_alone_mixes_one_way():
    found = diagnose(np.array([[1, 0], [1, 1]]))  # latent 1 never moves without latent 0
    assert [found.partners(k) for k in range(2)] == [(1,), ()]


def test_a_latent_that_nothing_moves_can_be_anywhere():
    found = diagnose(np.array([[1, 0, 0], [0, 1, 0]]))
    assert found.reached.tolist() == [True, True, False]
    assert [found.partners(k) for k in range(3)] == [(2,), (2,), ()]
    assert found.rank == 2


def test_shifts_in_proportion_lose_rank_where_the_graph_does_not():
    graph = np.ones((2, 2))
    assert diagnose(graph).rank == 2
    assert diagnose(graph, shift=np.array([[1.0, 2.0], [2.0, 4.0]])).rank == 1


@pytest.mark.parametrize(
    ("graph", "shift", "message"),
    [
        (np.array([0.2, 1.0]), None, r"shape \(2,\).*zeros and ones"),
        (np.array([[0.2, 1.0]]), None, "threshold probabilities first"),
        (np.zeros((0, 3)), None, r"shape \(0, 3\)"),
        (np.eye(2), np.zeros((3, 2)), r"shift has shape \(3, 2\); expected the graph's \(2, 2\)"),
        (np.eye(2), np.ones((2, 2)), "not zero where the graph has no edge"),
    ],
)
def test_what_is_no_graph_is_refused(graph, shift, message):
    with pytest.raises(ValueError, match=message):
        diagnose(graph, shift=shift)


def test_an_unknown_latent_is_refused():
    with pytest.raises(IndexError, match="no latent 2; expected 0 to 1"):
        diagnose(np.eye(2)).partners(2)
