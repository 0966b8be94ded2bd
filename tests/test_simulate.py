"""Simulated screens: the published generator's numbers, and truth that hangs together."""

import hashlib
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import gammaln, logsumexp, softmax
from scipy.stats import (
    binom,
    binomtest,
    chisquare,
    kstest,
    multivariate_normal,
    norm,
    poisson,
)

from smslib import metrics, simulate
from smslib.simulate import Mechanism, Violation

SMALL = {"n_cells_per_condition": 20, "n_targets": 30, "n_latent": 6, "n_genes": 45}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def released():
    """The demo's screen: 250 cells of each of 100 interventions."""
    return simulate.sparse_shift(n_cells_per_condition=250, as_released=True)


def network(screen, z):
    """Write the decoder's network a second time, in numpy."""
    hidden = z
    for weight in screen.decoder.weights[:-1]:
        hidden = hidden @ weight.numpy()
        hidden = np.maximum(hidden, 0.2 * hidden)
    return hidden @ screen.decoder.weights[-1].numpy()


def fingerprint(screen):
    """Hash what stored results depend on; counts are whole numbers, so rounding cannot show."""
    digest = hashlib.sha256()
    parts = (screen.cells.counts.int(), screen.cells.condition.int(), screen.graph)
    for part in (*parts, screen.z, screen.shift):
        digest.update(part.numpy().tobytes())
    return digest.hexdigest()[:16]


@pytest.mark.parametrize(
    ("as_released", "seed", "expected"),
    [
        (False, 0, "9e09117b3f77e193"),
        (False, 1024, "89b3a1b46c392a9e"),
        (True, 0, "e45a732577cac30d"),
        (True, 1024, "a19bc61be350ab32"),
    ],
)
def test_the_screens_of_the_stored_results_are_drawn_again(as_released, seed, expected):
    """Recorded before mechanisms could be chosen."""
    screen = simulate.sparse_shift(**SMALL, as_released=as_released, seed=seed)
    assert fingerprint(screen) == expected


# ---------------------------------------------------------------- the released generator


def test_released_depth_is_a_million_per_gene(released):
    counts = released.cells.counts.double()
    assert counts.shape == (25_000, 100)
    np.testing.assert_allclose(counts.sum(0), 1e6, rtol=5e-3)  # 5 Poisson sd
    library = released.cells.library
    assert library.mean() == pytest.approx(4000, rel=0.002)
    assert 500 < library.std() < 1000
    assert (counts == 0).double().mean() < 0.005


def test_released_rates_share_each_gene_among_all_cells(released):
    z = released.z.double().numpy()
    logits = network(released, z)
    expected = 1e6 * softmax(logits / logits.std(), axis=0)
    np.testing.assert_allclose(released.decoder.log_rate(released.z).exp(), expected, rtol=1e-4)


def test_released_targets_are_drawn_with_replacement():
    sizes = np.concatenate(
        [
            simulate.sparse_shift(
                n_cells_per_condition=1, n_targets=300, seed=seed, as_released=True
            ).graph.sum(1)
            for seed in range(10)
        ]
    )
    # Mean targets 1.914, share of single targets .356 at 15 latents.
    assert sizes.mean() == pytest.approx(1.914, abs=0.06)
    assert (sizes == 1).mean() == pytest.approx(0.356, abs=0.035)


# ---------------------------------------------------------------- the generator as written


def test_written_depth_is_a_hundred_thousand_per_cell():
    screen = simulate.sparse_shift(n_cells_per_condition=100)
    np.testing.assert_allclose(screen.decoder.log_rate(screen.z).exp().sum(1), 1e5, rtol=1e-9)
    np.testing.assert_allclose(screen.cells.library, 1e5, rtol=0.02)
    logits = network(screen, screen.z.double().numpy())
    assert screen.decoder.temperature == pytest.approx(logits.std(), rel=0.02)
    expected = 1e5 * softmax(logits / screen.decoder.temperature, axis=1)
    np.testing.assert_allclose(screen.decoder.log_rate(screen.z).exp(), expected, rtol=1e-4)


def test_written_targets_are_one_two_or_three_alike():
    screen = simulate.sparse_shift(n_cells_per_condition=1, n_targets=3000)
    shares = np.bincount(screen.graph.sum(1), minlength=4) / 3000
    np.testing.assert_allclose(shares, [0, 1 / 3, 1 / 3, 1 / 3], atol=0.035)


def test_one_latent_is_enough():
    screen = simulate.sparse_shift(n_cells_per_condition=2, n_targets=5, n_latent=1)
    assert screen.graph.all()


# ---------------------------------------------------------------- one slip at a time


def test_as_released_is_short_for_both_switches():
    for as_released, normaliser in ((True, "cells"), (False, "genes")):
        short = simulate.sparse_shift(**SMALL, as_released=as_released)
        spelled = simulate.sparse_shift(
            **SMALL,
            as_released=not as_released,
            normaliser=normaliser,
            with_replacement=as_released,
        )
        assert fingerprint(short) == fingerprint(spelled)


def test_the_normaliser_alone_changes_counts_only():
    released = simulate.sparse_shift(**SMALL, as_released=True)
    mended = simulate.sparse_shift(**SMALL, as_released=True, normaliser="genes")
    assert torch.equal(released.graph, mended.graph)
    assert torch.equal(released.z, mended.z)
    np.testing.assert_allclose(mended.decoder.log_rate(mended.z).exp().sum(1), 1e5, rtol=1e-9)
    np.testing.assert_allclose(released.decoder.log_rate(released.z).exp().sum(0), 1e6, rtol=1e-4)


def test_replacement_alone_changes_the_graph_only():
    released = simulate.sparse_shift(**SMALL, as_released=True)
    mended = simulate.sparse_shift(**SMALL, as_released=True, with_replacement=False)
    written = simulate.sparse_shift(**SMALL, as_released=False)
    assert not torch.equal(released.graph, mended.graph)
    assert torch.equal(mended.graph, written.graph)
    assert all(map(torch.equal, released.decoder.weights, mended.decoder.weights))
    np.testing.assert_allclose(mended.decoder.log_rate(mended.z).exp().sum(0), 1e6, rtol=1e-4)


# ---------------------------------------------------------------- mechanisms

ONE_CELL = {"n_cells_per_condition": 1, "n_genes": 40}


def truth(mechanism, *, n_targets=2000, n_latent=5, seed=0, **rest):
    """Graph and shifts of a screen with one cell per target, as numpy."""
    screen = simulate.sparse_shift(
        **ONE_CELL, n_targets=n_targets, n_latent=n_latent, seed=seed, mechanism=mechanism, **rest
    )
    return screen.graph.numpy(), screen.shift[1:].double().numpy()


mechanisms = st.builds(
    Mechanism,
    effect=st.floats(0.5, 8),
    effect_sd=st.floats(0.01, 0.1),
    density=st.none() | st.floats(0.01, 1),
    n_affected=st.none() | st.integers(1, 6),
)


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9, 0.99])
def test_edges_are_fair_coins_of_the_density(density):
    """Edges per target and per latent, and empty targets, against the binomial."""
    graph, _ = truth(Mechanism(density=density))
    assert binomtest(int(graph.sum()), graph.size, density).pvalue > 0.01
    for column in graph.T:
        assert binomtest(int(column.sum()), len(column), density).pvalue > 0.001
    expected = 2000 * binom(5, density).pmf(range(6))
    seen = np.bincount(graph.sum(1), minlength=6)
    common = expected > 5
    if not common.all():
        seen, expected = ([*v[common], v[~common].sum()] for v in (seen, expected))
    assert chisquare(seen, expected).pvalue > 0.01


def test_a_fifth_of_five_latents_leaves_a_third_of_the_targets_idle():
    """0.8 ** 5 = 0.328: kept, their cells are those of the control."""
    graph, shift = truth(Mechanism(density=0.2))
    idle = ~graph.any(1)
    assert binomtest(int(idle.sum()), 2000, 0.8**5).pvalue > 0.01
    assert (shift[idle] == 0).all()


def test_exact_densities_choose_every_subset_alike():
    """Half of four latents: six pairs."""
    graph, _ = truth(Mechanism(density=0.5, exact=True), n_latent=4)
    pairs = [tuple(np.flatnonzero(row)) for row in graph]
    seen = [pairs.count(pair) for pair in combinations(range(4), 2)]
    assert sum(seen) == 2000
    assert chisquare(seen).pvalue > 0.01


@pytest.mark.parametrize(
    ("density", "n_latent", "n_affected", "expected"),
    [(0.2, 10, None, 2), (0.9, 10, None, 9), (0.99, 10, None, 10), (0.2, 5, None, 1)]
    + [(0.01, 5, None, 1), (0.5, 10, 4, 2)],
)
def test_exact_densities_give_every_target_as_many_edges(density, n_latent, n_affected, expected):
    mechanism = Mechanism(density=density, exact=True, n_affected=n_affected)
    graph, _ = truth(mechanism, n_targets=50, n_latent=n_latent)
    assert (graph.sum(1) == expected).all()


def test_one_affected_latent_is_every_targets():
    graph, _ = truth(Mechanism(n_affected=1), n_targets=50)
    assert graph[:, 0].all()
    assert not graph[:, 1:].any()


@pytest.mark.parametrize("n_affected", [2, 4, 7])
def test_one_to_three_of_the_affected_latents(n_affected):
    """Without replacement min(t, n) edges, t = 1, 2, 3 alike; every affected latent alike."""
    graph, _ = truth(Mechanism(n_affected=n_affected), n_latent=8, n_targets=1500)
    assert not graph[:, n_affected:].any()
    sizes = np.minimum([1, 2, 3], n_affected)
    expected = 500 * np.bincount(sizes, minlength=4)[1:]
    possible = expected > 0
    seen = np.bincount(graph.sum(1), minlength=4)[1:]
    assert (seen[~possible] == 0).all()
    assert chisquare(seen[possible], expected[possible]).pvalue > 0.01
    for column in graph.T[:n_affected]:
        assert binomtest(int(column.sum()), 1500, sizes.mean() / n_affected).pvalue > 0.001


def test_replacement_repeats_among_the_affected_latents():
    """t draws of n leave n (1 - (1 - 1/n) ** t) distinct ones; the released density at n = 5."""
    graph, _ = truth(Mechanism(n_affected=5), n_latent=8, as_released=True)
    expected = np.mean([1 - 0.8**t for t in (1, 2, 3)])
    assert expected == pytest.approx(0.350, abs=0.001)
    assert graph[:, :5].mean() == pytest.approx(expected, abs=0.015)


@settings(max_examples=30)
@given(mechanism=mechanisms, seed=st.integers(0, 1000), as_released=st.booleans())
def test_any_mechanism_keeps_to_its_latents_and_effect(mechanism, seed, as_released):
    graph, shift = truth(
        mechanism, n_targets=20, n_latent=6, seed=seed, with_replacement=as_released
    )
    assert not graph[:, mechanism.n_affected or 6 :].any()
    assert ((shift != 0) == graph).all()
    far = np.abs(np.abs(shift[graph]) - mechanism.effect)
    assert (far < 6 * mechanism.effect_sd).all()
    if mechanism.density is None:
        assert (graph.sum(1) >= 1).all()
        assert (graph.sum(1) <= min(3, mechanism.n_affected or 6)).all()


@settings(max_examples=20)
@given(
    densities=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted),
    exact=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_denser_graphs_contain_sparser_ones(densities, exact, seed):
    sparse, dense = (
        truth(Mechanism(density=s, exact=exact), n_targets=20, seed=seed)[0] for s in densities
    )
    assert (dense | ~sparse).all()


@pytest.mark.parametrize(
    ("effect", "effect_sd"), [(1.0, 0.5), (2.0, 0.5), (5.0, 0.5), (5.0, 0.5**0.5)]
)
def test_shifts_are_the_mixture_of_equation_14(effect, effect_sd):
    """Half N(-e, sd), half N(e, sd), against its distribution function."""
    _, shift = truth(Mechanism(effect=effect, effect_sd=effect_sd, density=1.0))
    low, high = norm(-effect, effect_sd), norm(effect, effect_sd)
    assert kstest(shift.ravel(), lambda x: (low.cdf(x) + high.cdf(x)) / 2).pvalue > 0.01
    assert shift.var() == pytest.approx(effect**2 + effect_sd**2, rel=0.03)


def test_the_default_mechanism_is_the_papers():
    assert fingerprint(simulate.sparse_shift(**SMALL)) == fingerprint(
        simulate.sparse_shift(**SMALL, mechanism=Mechanism(effect=5.0, effect_sd=0.5))
    )


def test_effects_leave_everything_else_unchanged():
    """A larger effect moves the same latents the same way."""
    graph, shift = truth(Mechanism(effect=2.0))
    other, further = truth(Mechanism(effect=5.0))
    assert (graph == other).all()
    np.testing.assert_allclose(further - shift, 3 * np.sign(further), atol=1e-5)


# ---------------------------------------------------------------- held-out mechanisms


@settings(max_examples=25)
@given(
    n=st.integers(1, 29),
    mechanism=mechanisms,
    other=mechanisms,
    as_released=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_held_out_targets_change_nothing_before_them(n, mechanism, other, as_released, seed):
    small = {**SMALL, "n_cells_per_condition": 2, "seed": seed, "as_released": as_released}
    plain = simulate.sparse_shift(**small, mechanism=mechanism)
    split = simulate.sparse_shift(**small, mechanism=mechanism, held_out=(n, other))
    late = simulate.sparse_shift(**small, mechanism=other)
    first = 30 - n
    assert torch.equal(split.graph[:first], plain.graph[:first])
    assert torch.equal(split.shift[: first + 1], plain.shift[: first + 1])
    assert torch.equal(split.graph[first:], late.graph[first:])
    assert torch.equal(split.shift[first + 1 :], late.shift[first + 1 :])
    assert all(map(torch.equal, split.decoder.weights, plain.decoder.weights))
    mine = split.cells.condition <= first
    assert torch.equal(split.z[mine], plain.z[mine])


def test_holding_out_with_the_same_mechanism_changes_nothing():
    mechanism = Mechanism(density=0.4, effect=2.0)
    assert fingerprint(simulate.sparse_shift(**SMALL, mechanism=mechanism)) == fingerprint(
        simulate.sparse_shift(**SMALL, mechanism=mechanism, held_out=(7, mechanism))
    )


def test_held_out_cells_share_the_released_normaliser():
    """As released: a gene's million is shared with the cells that are held out."""
    screen = simulate.sparse_shift(
        **SMALL, as_released=True, held_out=(10, Mechanism(density=0.9, effect=7.0))
    )
    rate = screen.decoder.log_rate(screen.z).exp()
    np.testing.assert_allclose(rate.sum(0), 1e6, rtol=1e-4)
    assert (screen.graph[20:].double().mean() - 0.9).abs() < 0.1
    assert screen.graph[:20].sum(1).max() <= 3


# ---------------------------------------------------------------- violations

MANY = {"n_cells_per_condition": 300, "n_targets": 20, "n_latent": 5, "n_genes": 40}


def broken(**violation):
    return simulate.sparse_shift(**MANY, as_released=True, violation=Violation(**violation))


def residuals(screen):
    return screen.z - screen.shift[screen.cells.condition]


@pytest.mark.parametrize("as_released", [False, True])
def test_a_violation_of_nothing_draws_the_same_screen(as_released):
    plain = simulate.sparse_shift(**SMALL, as_released=as_released)
    same = simulate.sparse_shift(**SMALL, as_released=as_released, violation=Violation())
    assert fingerprint(same) == fingerprint(plain)
    np.testing.assert_allclose(
        simulate.oracle_log_prob(same, same.cells[:3], observed_library=True),
        simulate.oracle_log_prob(plain, plain.cells[:3], observed_library=True),
        rtol=1e-9,
    )


@pytest.mark.parametrize("name", ["correlation", "side_effect", "variance", "escape", "batch"])
def test_a_violation_leaves_the_intended_targets_and_their_order_alone(name):
    plain, other = broken(), broken(**{name: 0.4})
    assert torch.equal(other.graph, plain.graph)
    assert torch.equal(other.cells.condition, plain.cells.condition)
    assert not torch.equal(other.cells.counts, plain.cells.counts)


def test_correlated_latents_have_the_correlation_and_variance_one():
    found = np.cov(residuals(broken(correlation=0.7)).T)
    np.testing.assert_allclose(found, 0.3 * np.eye(5) + 0.7, atol=0.06)


def test_side_effects_reach_every_latent_and_no_edge():
    screen, plain = broken(side_effect=0.5), broken()
    side = (screen.shift - plain.shift)[1:].numpy().ravel()
    assert kstest(side, norm(0, 0.5).cdf).pvalue > 0.01
    assert (screen.shift[0] == 0).all()
    assert residuals(screen).std() == pytest.approx(1, abs=0.02)


def test_edges_in_the_variance_leave_the_mean():
    screen = broken(variance=0.5)
    only_wide = screen.graph & (screen.shift[1:] == 0)
    assert 0.25 < only_wide.sum() / screen.graph.sum() < 0.75
    for target in range(20):
        scatter = residuals(screen)[screen.cells.condition == target + 1].std(0)
        expected = 1 + 2 * only_wide[target].double()
        np.testing.assert_allclose(scatter, expected, rtol=0.2)
    assert (broken(variance=1.0).shift == 0).all()


def test_escaped_cells_are_as_the_control():
    screen = broken(escape=0.3)
    far = screen.shift.abs().max(1).values[screen.cells.condition] > 4
    nearer = screen.z[far].norm(dim=1) < residuals(screen)[far].norm(dim=1)
    assert binomtest(int(nearer.sum()), len(nearer), 0.3).pvalue > 0.01
    assert screen.z[far][nearer].std() == pytest.approx(1, abs=0.03)


def test_every_cell_is_of_one_of_four_batches():
    screen = broken(batch=0.5)
    assert screen.noise.fold.std() == pytest.approx(0.5, abs=0.1)
    rates = [
        replace(screen.decoder, fold=fold).log_rate(screen.z).exp() for fold in screen.noise.fold
    ]
    misfit = torch.stack([(screen.cells.counts - rate).square() / rate for rate in rates])
    batch = misfit.mean(-1).argmin(0)
    assert chisquare(batch.bincount()).pvalue > 0.01
    assert misfit.mean(-1).min(0).values.mean() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("as_released", [False, True])
def test_the_jacobian_is_autograds_in_a_batch(as_released):
    screen = simulate.sparse_shift(
        **SMALL, as_released=as_released, violation=Violation(batch=0.5)
    )
    decoder, z = replace(screen.decoder, fold=screen.noise.fold[1]), screen.z[0].double()
    expected = torch.autograd.functional.jacobian(decoder.log_rate, z).T
    np.testing.assert_allclose(decoder.jacobian(z), expected, atol=1e-12)


@pytest.mark.parametrize(
    "violation",
    [
        {"correlation": 0.8, "side_effect": 0.5},
        {"variance": 1.0},
        {"escape": 0.4},
        {"batch": 0.3},
        {"correlation": 0.5, "variance": 0.5, "escape": 0.3, "batch": 0.2},
    ],
)
def test_the_oracle_knows_what_is_broken(violation):
    """Two latents, against a grid; the density of the latents is written a second time."""
    screen = simulate.sparse_shift(
        n_cells_per_condition=500,
        n_targets=5,
        n_latent=2,
        n_genes=40,
        as_released=True,
        violation=Violation(**violation),
    )
    cells = screen.cells.of(torch.tensor([2]))[:12]
    axis = np.linspace(-10, 10, 501)
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    r, escape = violation.get("correlation", 0), violation.get("escape", 0)
    covariance = [
        np.outer(sd, sd) * np.array([[1, r], [r, 1]]) for sd in screen.noise.spread.numpy()
    ]
    fates = ((1 - escape, screen.shift[2], covariance[2]), (escape, [0, 0], covariance[0]))
    prior = sum(share * multivariate_normal(mean, cov).pdf(grid) for share, mean, cov in fates)
    counts, expected = cells.counts.double().numpy(), []
    for fold in screen.noise.fold:
        raw = network(screen, grid) / screen.decoder.temperature + fold.numpy()
        log_rate = screen.decoder.log_total + raw - screen.decoder.log_normaliser.numpy()
        expected.append(
            counts @ log_rate.T
            - np.exp(log_rate).sum(1)
            - gammaln(counts + 1).sum(1, keepdims=True)
            + np.log(prior / len(screen.noise.fold))
        )
    log_joint = logsumexp(expected, axis=0)
    evidence = logsumexp(log_joint, axis=1) + 2 * np.log(axis[1] - axis[0])
    found = simulate.oracle(screen, cells)
    np.testing.assert_allclose(found.log_prob, evidence, atol=0.3)
    assert (found.log_prob.numpy() - evidence).mean() == pytest.approx(0, abs=0.05)
    np.testing.assert_allclose(found.mean, softmax(log_joint, 1) @ grid, atol=0.08)


def test_the_floor_of_a_library_sums_over_the_kinds_of_cells():
    """Kinds that do not differ leave the floor as it is, up to its own draws."""
    screen = simulate.sparse_shift(
        **MANY,
        as_released=True,
        mechanism=Mechanism(effect=1e-6, effect_sd=0.0),
        violation=Violation(escape=0.4),
    )
    alike = replace(screen.noise, fold=torch.zeros(4, 40, dtype=torch.float64))
    floors = [
        simulate.oracle_log_prob(
            replace(screen, noise=noise), screen.cells[:8], observed_library=True, n_draws=2000
        )
        for noise in (None, alike)
    ]
    np.testing.assert_allclose(*floors, atol=0.5)


def test_restriction_keeps_the_scatter_of_each_condition():
    screen = broken(variance=0.5)
    part = simulate.restrict(screen, ["7", "3"])
    assert torch.equal(part.noise.spread, screen.noise.spread[[0, 8, 4]])
    assert part.noise.escape == screen.noise.escape


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"correlation": 1.0}, r"correlation=1.0; expected a share in \[0, 1\)"),
        ({"escape": -0.1}, r"escape=-0.1; expected a share in \[0, 1\)"),
        ({"variance": 1.1}, r"variance=1.1; expected a share of edges in \[0, 1\]"),
        ({"side_effect": -1.0}, "side_effect=-1.0; expected a standard deviation of at least 0"),
        ({"batch": float("nan")}, "batch=nan; expected a standard deviation"),
    ],
)
def test_impossible_violations(given_, message):
    with pytest.raises(ValueError, match=message):
        Violation(**given_)


# ---------------------------------------------------------------- truth


@pytest.mark.parametrize("as_released", [False, True])
def test_the_truth_hangs_together(as_released):
    screen = simulate.sparse_shift(**SMALL, as_released=as_released)
    assert screen.design.conditions == ("control", *map(str, range(30)))
    assert (screen.cells.condition.bincount(minlength=31) == torch.tensor([0] + [20] * 30)).all()
    assert (screen.shift[0] == 0).all()
    assert ((screen.shift[1:] != 0) == screen.graph).all()
    size = screen.shift[screen.shift != 0].abs()
    assert size.mean() == pytest.approx(5, abs=0.3)
    assert size.std() == pytest.approx(0.5, abs=0.15)
    residual = screen.z - screen.shift[screen.cells.condition]
    assert residual.mean() == pytest.approx(0, abs=0.07)
    assert residual.std() == pytest.approx(1, abs=0.05)
    ratio = screen.cells.counts / screen.decoder.log_rate(screen.z).exp()
    assert ratio.mean() == pytest.approx(1, abs=0.02)


def test_counts_are_poisson_around_the_decoder(released):
    rate = released.decoder.log_rate(released.z).exp()
    standardised = (released.cells.counts - rate) / rate.sqrt()
    assert standardised.mean() == pytest.approx(0, abs=0.004)
    assert standardised.var() == pytest.approx(1, abs=0.005)


@pytest.mark.parametrize("as_released", [False, True])
def test_the_jacobian_is_autograds(as_released):
    screen = simulate.sparse_shift(**SMALL, as_released=as_released)
    z = screen.z[:3].double()
    expected = [torch.autograd.functional.jacobian(screen.decoder.log_rate, row).T for row in z]
    np.testing.assert_allclose(screen.decoder.jacobian(z), torch.stack(expected), atol=1e-12)


def test_decoder_weights_have_orthonormal_rows():
    weights = simulate.sparse_shift(**SMALL).decoder.weights
    assert [tuple(weight.shape) for weight in weights] == [(6, 40), (40, 40), (40, 40), (40, 45)]
    for weight in weights:
        gain = 2 / 1.04 * 2 / sum(weight.shape)
        np.testing.assert_allclose(weight @ weight.T, gain * np.eye(len(weight)), atol=1e-12)


@pytest.mark.parametrize("as_released", [False, True])
def test_more_cells_leave_the_mechanisms_unchanged(as_released):
    few = simulate.sparse_shift(**SMALL, as_released=as_released)
    many = simulate.sparse_shift(**{**SMALL, "n_cells_per_condition": 31}, as_released=as_released)
    assert torch.equal(few.graph, many.graph)
    assert torch.equal(few.shift, many.shift)
    assert all(map(torch.equal, few.decoder.weights, many.decoder.weights))
    # The released softmax over cells is the exception that makes depth depend on cells.
    assert (few.decoder.temperature == many.decoder.temperature) is not as_released


def test_more_genes_leave_graph_shifts_and_latents_unchanged():
    narrow = simulate.sparse_shift(**SMALL)
    wide = simulate.sparse_shift(**{**SMALL, "n_genes": 50})
    assert torch.equal(narrow.graph, wide.graph)
    assert torch.equal(narrow.shift, wide.shift)
    assert torch.equal(narrow.z, wide.z)


def test_seeds_decide_everything_and_nothing_else_does():
    before = (torch.get_rng_state(), np.random.get_state()[1].copy())  # noqa: NPY002
    screens = [simulate.sparse_shift(**SMALL, seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(screens[0].cells.counts, screens[1].cells.counts)
    assert not torch.equal(screens[0].cells.counts, screens[2].cells.counts)
    assert not torch.equal(screens[0].graph, screens[2].graph)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002


# ---------------------------------------------------------------- restrict


@settings(max_examples=20)
@given(chosen=st.lists(st.sampled_from([str(i) for i in range(30)]), unique=True, max_size=30))
def test_restriction_keeps_names_and_truth_together(chosen):
    screen = simulate.sparse_shift(**{**SMALL, "n_cells_per_condition": 2})
    part = simulate.restrict(screen, chosen)
    assert part.design.conditions == ("control", *chosen)
    assert set(part.design.targets) == set(chosen)
    assert len(part.cells) == 2 * len(chosen) == len(part.z)
    for row, name in enumerate(part.design.conditions):
        whole = screen.design.conditions.index(name)
        assert torch.equal(part.shift[row], screen.shift[whole])
        mine, theirs = part.cells.condition == row, screen.cells.condition == whole
        assert torch.equal(part.cells.counts[mine], screen.cells.counts[theirs])
        assert torch.equal(part.z[mine], screen.z[theirs])
    # The shift of a condition is still the one its targets' edges allow.
    reached = part.design.matrix @ part.graph.float()
    assert torch.equal(reached != 0, part.shift != 0)


def test_a_restricted_design_extends_back_to_the_whole():
    screen = simulate.sparse_shift(**SMALL)
    names = screen.design.conditions
    part = simulate.restrict(screen, names[1:21])
    whole = part.design.extend(names[21:])
    assert whole.conditions == names
    assert whole.targets == screen.design.targets
    assert torch.equal(whole.matrix, screen.design.matrix)


# ---------------------------------------------------------------- linear-Gaussian toy


@pytest.fixture(scope="module")
def toy():
    return simulate.linear_gaussian(n_cells=50, n_latent=2, n_genes=5, noise=0.7, seed=1)


def test_the_toy_is_linear_and_gaussian():
    screen = simulate.linear_gaussian(n_cells=20_000, n_latent=2, n_genes=3, noise=0.5)
    residual = screen.cells.counts - screen.z @ screen.decoder.loadings
    np.testing.assert_allclose(np.cov(residual.T), 0.25 * np.eye(3), atol=0.01)
    latent = screen.z - screen.shift[screen.cells.condition]
    np.testing.assert_allclose(np.cov(latent.T), np.eye(2), atol=0.04)
    assert (screen.cells.condition.bincount() == 4000).all()
    assert ((screen.shift[1:] != 0) == screen.graph).all()


def test_exact_evidence_is_bayes_rule_and_scipys(toy):
    """At any z, evidence = prior * likelihood / posterior."""
    loadings, noise = toy.decoder.loadings.numpy(), toy.decoder.noise
    mean, covariance = simulate.exact_posterior(toy, toy.cells)
    expected = [
        multivariate_normal(shift, np.eye(2)).logpdf(z)
        + norm(z @ loadings, noise).logpdf(x).sum()
        - multivariate_normal(m, covariance).logpdf(z)
        for shift, z, x, m in zip(
            toy.shift[toy.cells.condition].numpy(),
            np.random.default_rng(0).normal(size=(50, 2)),
            toy.cells.counts.numpy(),
            mean.numpy(),
            strict=True,
        )
    ]
    evidence = simulate.exact_log_prob(toy, toy.cells)
    np.testing.assert_allclose(evidence, expected, rtol=1e-9)
    marginal = multivariate_normal(cov=loadings.T @ loadings + noise**2 * np.eye(5))
    centred = toy.cells.counts - toy.shift[toy.cells.condition] @ toy.decoder.loadings
    np.testing.assert_allclose(evidence, marginal.logpdf(centred), rtol=1e-9)


# ---------------------------------------------------------------- oracle


def grid_oracle(screen, cells, log_likelihood):
    """Integrate over one latent on a fine grid: log evidence and posterior mean."""
    grid = torch.linspace(-14, 14, 4001, dtype=torch.float64)
    shift = screen.shift[cells.condition, 0].double()
    log_joint = log_likelihood(screen.decoder.log_rate(grid[:, None])) + torch.from_numpy(
        norm(shift, 1).logpdf(grid[:, None])
    )
    log_evidence = torch.logsumexp(log_joint, 0)
    mean = (torch.softmax(log_joint, 0) * grid[:, None]).sum(0)
    return log_evidence + np.log(28 / 4000), mean


@pytest.fixture(scope="module")
def one_latent():
    """Forty cells of a screen as deep as the demo's."""
    screen = simulate.sparse_shift(
        n_cells_per_condition=2000, n_targets=5, n_latent=1, n_genes=40, as_released=True
    )
    return replace(screen, cells=screen.cells[:40], z=screen.z[:40])


def test_the_oracle_integrates(one_latent):
    counts = one_latent.cells.counts.numpy()
    expected, mean = grid_oracle(
        one_latent,
        one_latent.cells,
        lambda log_rate: torch.from_numpy(
            poisson(log_rate.exp().numpy()[:, None]).logpmf(counts).sum(-1)
        ),
    )
    found = simulate.oracle(one_latent, one_latent.cells, n_draws=2000)
    np.testing.assert_allclose(found.log_prob, expected, atol=0.1)
    assert (found.log_prob - expected).mean() == pytest.approx(0, abs=0.01)
    np.testing.assert_allclose(found.mean[:, 0], mean, atol=0.02)
    assert (found.n_effective > 100).all()
    assert (found.n_effective <= 2000).all()


def test_the_oracle_integrates_two_latents_far_from_the_origin():
    """Dense and strong shifts, against a grid of 361 x 361 points."""
    screen = simulate.sparse_shift(
        n_cells_per_condition=1000,
        n_targets=5,
        n_latent=2,
        n_genes=40,
        as_released=True,
        mechanism=Mechanism(density=1.0, effect=7.0),
    )
    cells = screen.cells.of(torch.tensor([3]))[:24]
    centre = screen.shift[3].double()
    step = 12 / 360
    axis = torch.linspace(-6, 6, 361, dtype=torch.float64)
    grid = centre + torch.cartesian_prod(axis, axis)
    log_rate = screen.decoder.log_rate(grid)
    counts = cells.counts.double()
    log_joint = (
        counts @ log_rate.T
        - log_rate.exp().sum(1)
        - torch.lgamma(counts + 1).sum(1, keepdim=True)
        + torch.from_numpy(norm(centre, 1).logpdf(grid)).sum(1)
    )
    expected = torch.logsumexp(log_joint, 1) + 2 * np.log(step)
    found = simulate.oracle(screen, cells)
    np.testing.assert_allclose(found.log_prob, expected, atol=0.25)
    assert (found.log_prob - expected).mean() == pytest.approx(0, abs=0.03)
    np.testing.assert_allclose(found.mean, torch.softmax(log_joint, 1) @ grid, atol=0.05)


def test_the_floor_with_an_observed_library(one_latent):
    """log p(x | library, c) + log Poisson(library; library), by integration."""
    library = one_latent.cells.library.double().squeeze(-1)
    of_library, _ = grid_oracle(
        one_latent,
        one_latent.cells,
        lambda log_rate: torch.from_numpy(
            poisson(log_rate.exp().sum(-1).numpy()[:, None]).logpmf(library.numpy())
        ),
    )
    arguments = {"n_draws": 300, "seed": 2}
    evidence = simulate.oracle_log_prob(one_latent, one_latent.cells, **arguments)
    floor = simulate.oracle_log_prob(
        one_latent, one_latent.cells, observed_library=True, **arguments
    )
    at_itself = torch.from_numpy(poisson(library.numpy()).logpmf(library.numpy()))
    expected = evidence - of_library + at_itself
    np.testing.assert_allclose(floor, expected, atol=0.2)
    assert (floor - expected).mean() == pytest.approx(0, abs=0.03)


def test_the_released_screen_has_the_known_floors_and_ceilings(released):
    """250 cells: evidence -336.9, floor -334.6, MCC about .99, R2 about .98."""
    cells, z = released.cells[:192], released.z[:192]
    found = simulate.oracle(released, cells, n_draws=150, n_starts=4)
    error = found.log_prob.std() / np.sqrt(192)
    assert found.log_prob.mean() == pytest.approx(-336.9, abs=float(3 * error))
    assert 0.985 < metrics.mcc(z, found.mean) < 0.995
    assert 0.97 < metrics.linear_r2(z, found.mean) < 0.99


def test_the_proposal_covers_fifteen_latents(released):
    """Gaussians at the modes alone reach about 70 effective draws of 500, these 120."""
    cells = released.cells[:64]
    runs = [simulate.oracle(released, cells, seed=seed) for seed in (0, 1)]
    assert runs[0].n_effective.median() > 90
    difference = runs[0].log_prob - runs[1].log_prob
    assert difference.mean() == pytest.approx(0, abs=0.1)
    assert difference.std() < 0.5


def test_the_observed_library_is_worth_two_nats(released):
    cells = released.cells[:32]
    arguments = {"n_draws": 20, "seed": 0}
    evidence = simulate.oracle_log_prob(released, cells, **arguments)
    floor = simulate.oracle_log_prob(released, cells, observed_library=True, **arguments)
    assert (floor - evidence).mean() == pytest.approx(2.3, abs=0.5)


def test_the_oracle_depends_on_its_seed_only(one_latent):
    state = torch.get_rng_state()
    draws = [
        simulate.oracle_log_prob(one_latent, one_latent.cells[:3], n_draws=20, seed=seed)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(state, torch.get_rng_state())


def test_the_oracle_answers_for_every_cell(one_latent):
    many = one_latent.cells[torch.arange(40).repeat(2)]  # more than one chunk
    found = simulate.oracle(one_latent, many, n_draws=500)
    assert found.mean.shape == (80, 1)
    np.testing.assert_allclose(found.log_prob[:40], found.log_prob[40:], atol=0.3)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"n_latent": 41}, "n_latent=41, n_genes=100; the simulator's network has 40 hidden"),
        ({"n_genes": 39}, "n_latent=15, n_genes=39; .* needs n_latent <= 40 <= n_genes"),
        ({"n_targets": 0}, "n_targets=0, n_latent=15; expected at least 1 of each"),
    ],
)
def test_impossible_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        simulate.sparse_shift(**sizes)


def test_unknown_condition():
    with pytest.raises(KeyError, match="unknown condition 'JAK2'"):
        simulate.restrict(simulate.sparse_shift(**SMALL), ["JAK2"])


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"effect": 0.0}, "effect=0.0, effect_sd=0.5; expected a positive effect"),
        ({"effect": -5.0}, "effect=-5.0, .* .signs are drawn: both occur."),
        ({"effect": float("nan")}, "effect=nan"),
        ({"effect_sd": -1.0}, "effect_sd=-1.0; .* standard deviation of at least 0"),
        ({"density": 0.0}, r"density=0.0; expected a fraction of edges in \(0, 1\]"),
        ({"density": 20.0}, "density=20.0; .* or None for one to three"),
        ({"exact": True}, "exact=True without a density; .* such as density=0.2"),
        ({"n_affected": 0}, "n_affected=0; expected at least 1 latent, or None for all"),
    ],
)
def test_impossible_mechanisms(given_, message):
    with pytest.raises(ValueError, match=message):
        Mechanism(**given_)


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"normaliser": "gene"}, "normaliser='gene'; expected 'cells' .* 'genes' .* or None"),
        ({"held_out": (30, Mechanism())}, r"held_out=\(30, ...\) of n_targets=30; .* 1 left"),
        ({"held_out": (0, Mechanism())}, r"held_out=\(0, ...\) .* at least 1 target held out"),
        ({"mechanism": Mechanism(n_affected=7)}, "n_affected=7, n_latent=6; .* lower n_affected"),
        ({"held_out": (5, Mechanism(n_affected=9))}, "n_affected=9, n_latent=6"),
    ],
)
def test_impossible_screens(given_, message):
    with pytest.raises(ValueError, match=message):
        simulate.sparse_shift(**SMALL, **given_)


@pytest.mark.parametrize("sizes", [{"n_draws": 0}, {"n_starts": 0}])
def test_an_oracle_of_no_draws(one_latent, sizes):
    with pytest.raises(ValueError, match="=0.*expected at least 1 of each .500 draws from 4"):
        simulate.oracle(one_latent, one_latent.cells[:2], **sizes)


# ---------------------------------------------------------------- twists


def test_a_twisted_normal_is_normal_and_no_rotation():
    z = torch.from_numpy(np.random.default_rng(0).standard_normal((4000, 3)))
    moved = simulate.twist(z, 2.0, plane=(0, 2)).numpy()
    for axis in range(3):
        assert kstest(moved[:, axis], norm.cdf).pvalue > 0.01
    np.testing.assert_allclose(np.cov(moved.T), np.eye(3), atol=0.06)
    assert metrics.linear_r2(z.numpy(), moved) < 0.6
    np.testing.assert_array_equal(moved[:, 1], z[:, 1])


def test_a_twist_keeps_volume_and_is_undone_by_its_negative():
    z = torch.tensor([[0.3, -1.2], [2.0, 0.5]], dtype=torch.float64)
    for row in z:
        slopes = torch.autograd.functional.jacobian(lambda v: simulate.twist(v, 1.3), row)
        assert torch.linalg.det(slopes).item() == pytest.approx(1.0)
    np.testing.assert_allclose(simulate.twist(simulate.twist(z, 1.3), -1.3), z)


def test_a_point_at_distance_pi_is_turned_round_by_a_unit_twist():
    moved = simulate.twist(torch.tensor([np.pi, 0.0, 5.0]), 1.0)
    np.testing.assert_allclose(moved, [-np.pi, 0.0, 5.0], atol=1e-5)


@pytest.mark.parametrize("plane", [(0, 0), (1, 2), (-1, 0)])
def test_a_twist_needs_two_latents(plane):
    with pytest.raises(ValueError, match="expected two different latents of 2"):
        simulate.twist(torch.zeros(1, 2), 1.0, plane=plane)
