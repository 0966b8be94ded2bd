"""Slabs, gates and the prior: against scipy, enumeration over gates, grids and integrals."""

import itertools
import math

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, optimize, stats
from torch.distributions import Normal, kl_divergence

from smslib.data import Design, seeded
from smslib.distributions import kl_to_shifted_normal
from smslib.priors import (
    GATES,
    METHODS,
    SLABS,
    BernoulliGate,
    BetaGate,
    FixedGate,
    GaussianSlab,
    L1Gate,
    LogitGate,
    NoSlab,
    OpenGate,
    PointSlab,
    ShiftPrior,
)

logits = st.floats(-6.0, 6.0)
alphas = st.floats(1.5, 300.0)

# The second combination has three targets and a double dose; the control has none.
COMBINED = Design(
    ("control", "a", "a+b", "a+b+c"),
    ("a", "b", "c"),
    torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [2, 1, 1]], dtype=torch.float64),
)
LOGIT = torch.tensor([[0.3, -1.0], [1.5, 0.0], [-0.4, 2.0]], dtype=torch.float64)
SLAB = torch.tensor([[2.0, -1.0], [0.5, 3.0], [-1.5, 1.0]], dtype=torch.float64)


def combined(gate=None):
    """A prior on the combined design with the gates and shifts above."""
    slab, gate = PointSlab(3, 2), gate or LogitGate(3, 2)
    prior = ShiftPrior(COMBINED, slab, gate).double()
    with torch.no_grad():
        slab.mean.copy_(SLAB)
        if hasattr(gate, "logit"):
            gate.logit.copy_(LOGIT)
    return prior


def worlds(logit=LOGIT):
    """Every state of the gates: its probability and the shift of every condition."""
    pi = logit.sigmoid()
    for state in itertools.product((0.0, 1.0), repeat=logit.numel()):
        gates = torch.tensor(state, dtype=torch.float64).reshape(logit.shape)
        probability = torch.where(gates == 1, pi, 1 - pi).prod()
        yield probability, COMBINED.matrix @ (gates * SLAB)


def beta_gate(logit, alpha, weight):
    gate = BetaGate(1, 1, alpha=alpha, weight=weight, logit=logit).double()
    with torch.no_grad():
        gate.logit.fill_(logit)
    return gate


def penalty(logit, alpha, weight):
    return beta_gate(logit, alpha, weight).penalty().item()


def sigmoid(logit):
    return 1 / (1 + np.exp(-logit))


# ------------------------------------------------------------------------------------ gates


@given(logits, st.floats(0.1, 300.0))
@settings(max_examples=50)
def test_tied_weight_is_charged_the_density_of_beta(logit, alpha):
    expected = -stats.beta.logpdf(sigmoid(logit), 1, alpha)
    assert penalty(logit, alpha, "tied") == pytest.approx(expected, rel=1e-9, abs=1e-9)


def cost_of(w, pi, alpha):
    """KL(Bernoulli(pi) || Bernoulli(w)) - log Beta(w; 1, alpha)."""
    kl = pi * np.log(pi / w) + (1 - pi) * np.log((1 - pi) / (1 - w))
    return kl - stats.beta.logpdf(w, 1, alpha)


@given(logits, alphas)
@settings(max_examples=50)
def test_profiled_weight_is_the_best_of_a_grid(logit, alpha):
    pi = sigmoid(logit)
    grid = np.linspace(1e-6, 1 - 1e-6, 2001)
    nearest = grid[np.argmin(cost_of(grid, pi, alpha))]
    step = grid[1] - grid[0]
    best = optimize.minimize_scalar(
        cost_of,
        args=(pi, alpha),
        bounds=(max(nearest - step, 1e-9), min(nearest + step, 1 - 1e-9)),
        method="bounded",
        options={"xatol": 1e-12},
    )
    assert penalty(logit, alpha, "profile") == pytest.approx(best.fun, rel=1e-6, abs=1e-6)
    assert cost_of(pi / alpha, pi, alpha) == pytest.approx(best.fun, rel=1e-6, abs=1e-6)


@given(logits, alphas)
@settings(max_examples=50)
def test_collapsed_weight_is_integrated_out(logit, alpha):
    pi = sigmoid(logit)
    p, _ = integrate.quad(lambda w: w * stats.beta.pdf(w, 1, alpha), 0, 1, epsabs=1e-12)
    expected = pi * np.log(pi / p) + (1 - pi) * np.log((1 - pi) / (1 - p))
    assert penalty(logit, alpha, "collapsed") == pytest.approx(expected, rel=1e-6, abs=1e-9)


@given(logits, alphas)
@settings(max_examples=50)
def test_profiling_never_costs_more_than_tying(logit, alpha):
    assert penalty(logit, alpha, "profile") <= penalty(logit, alpha, "tied") + 1e-12


def test_a_flat_prior_charges_nothing():
    assert penalty(1.3, 1.0, "tied") == 0.0
    assert penalty(1.3, 1.0, "profile") == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("weight", ["tied", "profile", "collapsed"])
@pytest.mark.parametrize("alpha", [1.0, 100.0])
def test_saturated_gates_keep_finite_penalties_and_gradients(weight, alpha):
    gate = BetaGate(1, 2, alpha=alpha, weight=weight)
    with torch.no_grad():
        gate.logit.copy_(torch.tensor([[-60.0, 60.0]]))
    value = gate.penalty()
    value.backward()
    assert value.isfinite()
    assert gate.logit.grad.isfinite().all()


@pytest.mark.parametrize(
    "gate",
    [
        L1Gate(1, 1, strength=12.0),
        *(BetaGate(1, 1, alpha=20.0, weight=w) for w in ("tied", "profile", "collapsed")),
    ],
    ids=["l1", "tied", "profile", "collapsed"],
)
def test_what_a_gate_asks_parts_the_evidence_that_opens_it_from_that_which_does_not(gate):
    """The best pi of ``pi * evidence - penalty(pi)`` on a grid crosses one half there."""
    pi = torch.linspace(1e-6, 1 - 1e-6, 4001, dtype=torch.float64)
    gate.double()
    charges = []
    for logit in torch.logit(pi):
        gate.logit.data.fill_(logit)
        charges.append(float(gate.penalty().detach()))
    for factor, is_open in ((0.95, False), (1.05, True)):
        gain = factor * gate.asked() * pi.numpy() - np.array(charges)
        assert (pi[int(gain.argmax())] > 0.5) == is_open


def test_open_gates_ask_for_nothing():
    assert LogitGate(1, 1).asked() == BetaGate(1, 1, alpha=1.0).asked() == 0.0
    assert OpenGate(1, 1).asked() == BetaGate(1, 1, alpha=0.5).asked() == -math.inf
    # A prior that expects an edge asks for less than nothing.
    assert BernoulliGate(1, 1, p=0.9).asked() == pytest.approx(-math.log(9.0))


def test_the_penalty_is_summed_over_the_screen():
    one, many = (BetaGate(n, 3, alpha=20.0).penalty() for n in (1, 7))
    torch.testing.assert_close(many, 7 * one)


def test_beta_gate_refuses_an_unknown_weight(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside the tests
    with pytest.raises(ValueError, match="weight is 'paper'; expected 'tied', 'profile'"):
        BetaGate(1, 1, alpha=2.0, weight="paper")


@pytest.mark.parametrize(("alpha", "weight"), [(0.0, "tied"), (-1.0, "tied"), (0.5, "profile")])
def test_beta_gate_refuses_an_alpha_without_an_optimum(alpha, weight):
    with pytest.raises(ValueError, match=f"alpha is {alpha}; expected a positive number"):
        BetaGate(1, 1, alpha=alpha, weight=weight)


def test_l1_charges_the_expected_number_of_open_gates():
    gate = L1Gate(2, 3, strength=2.5, logit=0.0)
    assert gate.penalty().item() == pytest.approx(2.5 * 6 * 0.5)


def test_l1_strength_in_the_released_unit():
    """lambda * mean(pi), added to a loss per cell, is strength * sum(pi) / n_cells."""
    n_cells, lam, size = 400, 20.0, 6
    gate = L1Gate(2, 3, strength=lam * n_cells / size, logit=1.0)
    released = lam * gate().mean()
    torch.testing.assert_close(gate.penalty() / n_cells, released)


def test_gates_without_sparsity_charge_nothing():
    for gate in (OpenGate(2, 3), LogitGate(2, 3), FixedGate(2, 3)):
        assert gate.penalty().item() == 0.0


def test_gates_start_open():
    assert OpenGate(2, 3)().eq(1).all()
    assert BetaGate(2, 3, alpha=100.0)().min() > 0.99


def test_drawn_gates_are_hard_and_independent_between_cells():
    gate = LogitGate(1, 2, logit=0.0)
    with seeded(0), torch.no_grad():
        drawn = gate.draw(torch.zeros(20_000, dtype=torch.long))
    assert set(drawn.flatten().tolist()) == {0.0, 1.0}
    assert float(drawn.mean()) == pytest.approx(0.5, abs=4 * 0.5 / 200)
    assert abs(np.corrcoef(drawn.T.numpy())[0, 1]) < 4 / np.sqrt(20_000)


def test_fixed_gates_are_a_copy():
    probability = torch.tensor([[0.0, 1.0]])
    gate = FixedGate.at(probability)
    probability.fill_(0.5)
    assert gate().tolist() == [[0.0, 1.0]]
    assert gate.draw(torch.tensor([0, 0])).tolist() == [[0.0, 1.0], [0.0, 1.0]]
    assert not list(gate.parameters())


@pytest.mark.parametrize(
    "part",
    [
        NoSlab(3, 2),
        PointSlab(3, 2),
        GaussianSlab(3, 2, scale=2.5),
        OpenGate(3, 2),
        FixedGate(3, 2),
        LogitGate(3, 2),
        L1Gate(3, 2, strength=4.0),
        BetaGate(3, 2, alpha=7.0, weight="collapsed"),
        BernoulliGate(3, 2, p=0.03),
    ],
    ids=lambda part: type(part).__name__,
)
def test_parts_are_rebuilt_from_their_name_and_options(part):
    kind = {**SLABS, **GATES}[type(part).__name__]
    again = kind(3, 2, **part.options())
    again.load_state_dict(part.state_dict())
    torch.testing.assert_close(again(), part())
    assert again.options() == part.options()
    if type(part).__name__ in GATES:
        torch.testing.assert_close(again.penalty(), part.penalty())


@given(logits, st.floats(0.001, 0.9))
@settings(max_examples=50)
def test_a_bernoulli_gate_is_charged_its_divergence_from_the_prior(logit, p):
    gate = BernoulliGate(1, 1, p=p, logit=logit).double()
    pi = sigmoid(gate.logit.item())
    expected = stats.entropy([pi, 1 - pi], [p, 1 - p])
    assert gate.penalty().item() == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("p", [0.0, 1.0, -0.5])
def test_a_bernoulli_gate_refuses_a_prior_that_decides(p):
    with pytest.raises(ValueError, match=f"p is {p}; expected a probability between 0 and 1"):
        BernoulliGate(1, 1, p=p)


# ------------------------------------------------------------------------------------ slabs


def gaussian(*, scale=1.0):
    slab = GaussianSlab(3, 2, scale=scale).double()
    with torch.no_grad():
        slab.mean.copy_(SLAB)
        slab.log_variance.copy_(torch.tensor([[0.1, -2.0], [-0.5, 0.4], [-1.0, -3.0]]))
    return slab


def test_draws_of_a_shift_are_gaussian():
    slab, n_draws = gaussian(), 4_000
    with torch.no_grad(), seeded(0):
        drawn = slab.draw(torch.arange(3).repeat(n_draws)).reshape(n_draws, 3, 2)
        mean, sd = slab.mean.detach(), slab.variance().sqrt()
    for row, column in itertools.product(range(3), range(2)):
        known = stats.norm(mean[row, column].item(), sd[row, column].item())
        assert stats.kstest(drawn[:, row, column], known.cdf).pvalue > 1e-4


def test_a_gaussian_slab_starts_near_a_point():
    assert GaussianSlab(3, 2).variance().sqrt().unique().item() == pytest.approx(0.1)


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_a_gaussian_slab_is_charged_its_divergence_behind_open_gates(scale):
    slab, opened = gaussian(scale=scale), LOGIT.sigmoid()
    kl = kl_divergence(Normal(slab(), slab.variance().sqrt()), Normal(0.0, scale))
    torch.testing.assert_close(slab.penalty(opened), (opened * kl).sum(), rtol=1e-6, atol=0)
    assert slab.penalty(torch.zeros_like(opened)) == 0


def test_points_are_charged_nothing():
    for slab in (NoSlab(3, 2), PointSlab(3, 2)):
        assert slab.penalty(torch.ones(3, 2)) == 0
        assert slab.variance().eq(0).all()


def test_moments_of_gaussian_shifts_are_those_of_draws():
    gate = LogitGate(3, 2).double()
    prior = ShiftPrior(COMBINED, gaussian(), gate)
    n_draws = 40_000
    with torch.no_grad(), seeded(0):
        gate.logit.copy_(LOGIT)
        drawn = prior.of(torch.arange(4).repeat(n_draws), "sampled").mean.reshape(n_draws, 4, 2)
        expected = prior()
    error = drawn.std(0) / n_draws**0.5
    assert ((drawn.mean(0) - expected.mean).abs() <= 4 * error + 1e-12).all()
    squares = (drawn - expected.mean).square()
    error = squares.std(0) / n_draws**0.5
    assert ((squares.mean(0) - expected.variance).abs() <= 4 * error + 1e-12).all()
    assert expected.variance[1:].gt(0).all()


def test_the_penalty_of_a_prior_is_that_of_slab_and_gate():
    gate = BernoulliGate(3, 2, p=0.1).double()
    prior = ShiftPrior(COMBINED, gaussian(), gate)
    expected = gate.penalty() + prior.slab.penalty(gate())
    torch.testing.assert_close(prior.penalty(), expected)
    assert expected > gate.penalty()


def test_a_point_slab_starts_where_it_is_told_and_is_a_copy():
    mean = torch.tensor([[1.0, 2.0]])
    slab = PointSlab.at(mean)
    mean.fill_(9.0)
    assert slab().tolist() == [[1.0, 2.0]]
    assert slab.mean.requires_grad


def test_a_point_slab_leaves_the_global_random_state_alone():
    before = torch.random.get_rng_state()
    PointSlab.at(torch.zeros(2, 3))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_the_evidence_for_a_gaussian_shift_is_a_log_bayes_factor(scale):
    """The mean of n cells is N(0, 1/n) without a shift, and N(0, scale^2 + 1/n) with one."""
    n, mean = 40, np.array([0.0, 0.2, -0.7])
    with_shift, without = stats.norm(0, np.hypot(scale, n**-0.5)), stats.norm(0, n**-0.5)
    slab, given_mean = GaussianSlab(1, 3, scale=scale), torch.from_numpy(mean)
    found = slab.evidence(torch.tensor(float(n)), given_mean)
    np.testing.assert_allclose(found, with_shift.logpdf(mean) - without.logpdf(mean))
    shrunk = n * mean / (n + scale**-2)
    np.testing.assert_allclose(slab.best(torch.tensor(float(n)), given_mean), shrunk)


def at_its_best(gate, mean, n):
    """Minimise n cells' divergence plus the penalty over gate and slab; return the gate."""
    design, best = Design.single_target(["t"]), {}
    for start in (4.0, -4.0):
        prior = ShiftPrior(design, GaussianSlab(1, 1), gate).double()
        with torch.no_grad():
            prior.slab.mean.fill_(mean)
            gate.logit.fill_(start)
        optimizer = torch.optim.LBFGS(
            prior.parameters(), max_iter=500, line_search_fn="strong_wolfe"
        )

        def loss(prior=prior, optimizer=optimizer):
            optimizer.zero_grad()
            shift = prior().at(1)
            gap = (0.5 * ((mean - shift.mean) ** 2 + shift.variance)).sum()
            value = n * gap + prior.penalty()
            value.backward()
            return value

        optimizer.step(loss)
        best[loss().item()] = gate().item()
    return best[min(best)]


@pytest.mark.parametrize(
    ("p", "n", "by_hand"), [(0.01, 50, 0.517), (0.1, 50, 0.412), (0.1, 300, 0.184)]
)
def test_thresholds_of_sams_vae_are_where_the_bound_opens_a_gate(p, n, by_hand):
    """n^2 m^2 / 2 (n + 1) - log(n + 1) / 2 = log((1 - p) / p)."""
    gate = BernoulliGate(1, 1, p=p)
    prior = ShiftPrior(Design.single_target(["t"]), GaussianSlab(1, 1), gate)
    threshold = prior.thresholds(torch.tensor([float(n)])).item()
    assert threshold == pytest.approx(by_hand, abs=1e-3)
    assert at_its_best(gate, 0.97 * threshold, n) < 0.5 < at_its_best(gate, 1.03 * threshold, n)


def test_always_open_gates_have_no_threshold_whatever_the_slab():
    for slab in (PointSlab(2, 1), GaussianSlab(2, 1)):
        prior = ShiftPrior(Design.single_target(["a", "b"]), slab, OpenGate(2, 1))
        assert prior.thresholds(torch.tensor([5.0, 50.0])).tolist() == [0.0, 0.0]


def test_a_gaussian_slab_refuses_a_scale_that_is_none():
    with pytest.raises(ValueError, match="scale is 0.0; expected a positive standard deviation"):
        GaussianSlab(1, 1, scale=0.0)


# ------------------------------------------------------------------------------------ prior


def test_moments_of_combinations_are_sums_over_all_gates():
    prior = combined()
    mean = sum(p * shift for p, shift in worlds())
    variance = sum(p * (shift - mean).square() for p, shift in worlds())
    moments = prior()
    torch.testing.assert_close(moments.mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moments.variance, variance, rtol=1e-12, atol=1e-12)


def test_sampled_shifts_have_the_expected_moments():
    prior, n_draws = combined(), 40_000
    with seeded(0), torch.no_grad():
        condition = torch.arange(4).repeat(n_draws)
        draws = prior.of(condition, "sampled")
    expected = prior()
    assert draws.variance.eq(0).all()
    by_condition = draws.mean.reshape(n_draws, 4, 2)
    error = by_condition.std(0) / n_draws**0.5
    assert ((by_condition.mean(0) - expected.mean).abs() <= 4 * error + 1e-12).all()
    spread = (by_condition - expected.mean).square()
    error = spread.std(0) / n_draws**0.5
    assert ((spread.mean(0) - expected.variance).abs() <= 4 * error + 1e-12).all()


def test_certain_gates_leave_nothing_to_the_draw():
    """More targets than any condition has: each cell must draw those of its own condition."""
    matrix = torch.tensor([[0.0, 0, 0, 0], [0, 0, 0, 2], [0, 1, 1, 0], [1, 0, 0, 0]])
    prior = ShiftPrior(
        Design(("control", "d", "b+c", "a"), ("a", "b", "c", "d"), matrix),
        PointSlab(4, 3),
        LogitGate(4, 3),
    )
    with torch.no_grad():
        certain = torch.tensor([[1.0, -1, 1], [1, 1, -1], [-1, 1, 1], [1, -1, -1]])
        prior.gate.logit.copy_(60 * certain)
        condition = torch.tensor([3, 1, 0, 2, 1, 2])
        drawn = prior.of(condition, "sampled").mean
        expected = matrix @ ((certain > 0) * prior.slab())
    torch.testing.assert_close(drawn, expected[condition])


def test_expected_shifts_are_the_rows_of_the_conditions():
    prior, condition = combined(), torch.tensor([3, 0, 3])
    moments = prior.of(condition, "expected")
    assert torch.equal(moments.mean, prior().mean[condition])
    assert torch.equal(moments.variance, prior().variance[condition])


@pytest.mark.parametrize("estimator", ["expected", "sampled"])
def test_the_control_is_never_shifted(estimator):
    moments = combined().of(torch.zeros(50, dtype=torch.long), estimator)
    assert moments.mean.eq(0).all()
    assert moments.variance.eq(0).all()


def expected_kl(logit):
    """E over all gates of KL(q || p(z | c)), exactly, summed over conditions and latents."""
    mean, variance = torch.tensor([0.7, -0.2], dtype=torch.float64), 0.4
    posterior = Normal(mean, variance**0.5)
    return sum(
        p * kl_divergence(posterior, Normal(shift, 1.0)).sum() for p, shift in worlds(logit)
    )


def test_expected_gradient_is_that_of_the_enumeration():
    prior, step = combined(), 1e-5
    mean = torch.tensor([[0.7, -0.2]], dtype=torch.float64).expand(4, 2)
    kl = kl_to_shifted_normal(mean, torch.full_like(mean, 0.4), prior())
    kl.sum().backward()
    differences = torch.empty_like(LOGIT)
    for index in itertools.product(range(3), range(2)):
        shifted = [LOGIT.clone(), LOGIT.clone()]
        shifted[0][index] -= step
        shifted[1][index] += step
        low, high = map(expected_kl, shifted)
        differences[index] = (high - low) / (2 * step)
    torch.testing.assert_close(kl.sum(), expected_kl(LOGIT), rtol=1e-12, atol=0)
    torch.testing.assert_close(prior.gate.logit.grad, differences, rtol=1e-6, atol=1e-6)


def test_log_prob_is_scipys_at_the_modal_graph():
    prior = combined()
    mode = COMBINED.matrix.numpy() @ (SLAB.numpy() * (LOGIT.numpy() > 0))
    np.testing.assert_allclose(prior.mode().detach(), mode)
    rng, condition = np.random.default_rng(0), torch.tensor([2, 0, 3])
    z = rng.normal(size=(5, 3, 2))
    expected = stats.norm.logpdf(z, mode[condition], 1.0).sum(-1)
    actual = prior.log_prob(torch.from_numpy(z), condition).detach()
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_the_graph_moves_with_its_threshold():
    prior = combined()
    assert prior.graph().tolist() == (LOGIT > 0).tolist()
    assert prior.graph(threshold=0.0).all()
    assert not prior.graph(threshold=1.0).any()
    assert prior.mode(threshold=1.0).eq(0).all()
    np.testing.assert_allclose(prior.probabilities(), LOGIT.sigmoid())


def test_the_design_comes_back_and_is_no_alias():
    matrix = COMBINED.matrix.clone()
    prior = ShiftPrior(
        Design(COMBINED.conditions, COMBINED.targets, matrix), NoSlab(3, 2), OpenGate(3, 2)
    )
    matrix[3] = 9.0
    assert prior.design.conditions == COMBINED.conditions
    assert prior.design.targets == COMBINED.targets
    assert torch.equal(prior.design.matrix, COMBINED.matrix)


# ---------------------------------------------------------------------------------- methods


@pytest.mark.parametrize(
    ("method", "slab", "gate"),
    [
        ("vae", NoSlab, OpenGate),
        ("beta-vae", NoSlab, OpenGate),
        ("ivae", PointSlab, OpenGate),
        ("svae", PointSlab, L1Gate),
        ("svae+", PointSlab, BetaGate),
        ("cpa-vae", GaussianSlab, OpenGate),
        ("sams-vae", GaussianSlab, BernoulliGate),
    ],
)
def test_every_method_is_its_cell_of_the_table(method, slab, gate):
    built = METHODS[method](4, 2, None)
    assert tuple(map(type, built)) == (slab, gate)


def test_svae_plus_takes_the_number_of_targets_for_alpha():
    assert METHODS["svae+"](37, 2, None)[1].alpha == 37.0
    assert METHODS["svae+"](37, 2, 5.0)[1].alpha == 5.0
    assert METHODS["svae"](37, 2, 5.0)[1].strength == 5.0
    assert METHODS["sams-vae"](37, 2, 0.2)[1].p == 0.2


@pytest.mark.parametrize("method", ["vae", "beta-vae", "ivae", "cpa-vae"])
def test_methods_without_gates_refuse_a_sparsity(method):
    with pytest.raises(ValueError, match=r"sparsity is 3.0, but this method has no sparse gates"):
        METHODS[method](4, 2, 3.0)
