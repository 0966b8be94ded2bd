"""The closed forms, against scipy, mpmath, enumeration and sampling."""

import itertools
from types import SimpleNamespace

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.distributions import Normal, kl_divergence

from smslib import distributions
from smslib.distributions import (
    Moments,
    NegativeBinomial,
    gaussian_log_prob,
    kl_to_shifted_normal,
    stirling_error,
    straight_through_bernoulli,
)

probability = st.floats(0.0, 1.0)


def columns(*values, dtype=torch.float64):
    """Every combination of the values, one a column: (1, n) each."""
    grid = np.array(list(itertools.product(*values)))
    return tuple(torch.tensor(column, dtype=dtype)[None] for column in grid.T)


def log_prob(x, mean, theta):
    return NegativeBinomial(mean.log(), theta.log()[0]).log_prob(x)


def among_zeros(x, log_mean, log_theta):
    """Return the log-pmf of one cell's counts when nearly all other counts are zero.

    Then each entry is read from a table, or is one of a few large ones.
    """
    n = x.shape[-1]
    zeros, more = torch.zeros(1, 20 * n), torch.zeros(20 * n).to(log_theta)
    x, log_mean = torch.cat([x, zeros.to(x)], -1), torch.cat([log_mean, zeros.to(x)], -1)
    nb = NegativeBinomial(log_mean, torch.cat([log_theta, more]))
    return nb.log_prob(x)[..., :n]


def among_others(x, log_mean, log_theta):
    """Return the log-pmf of one cell's counts; where many are large, in saddle-point form."""
    return NegativeBinomial(log_mean, log_theta).log_prob(x)


def within_four_errors(draws, truth):
    """Whether the mean over the first axis is within four standard errors of the truth."""
    draws = np.asarray(draws, dtype=float)
    return np.all(np.abs(draws.mean(0) - truth) < 4 * draws.std(0) / np.sqrt(len(draws)))


# -------------------------------------------------------------------------- negative binomial

SCIPY_GRID = [
    (x, mean, theta)
    for mean in (0.01, 0.3, 1.0, 12.0, 1000.0)
    for x in sorted({0, 1, round(mean), round(3 * mean)})
    for theta in (1e-3, 0.1, 1.0, 7.0, 100.0, 1e4)
]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_log_pmf_is_scipys(dtype, tolerance):
    x, mean, theta = np.array(SCIPY_GRID, dtype=float).T
    expected = stats.nbinom.logpmf(x, theta, theta / (theta + mean))
    actual = log_prob(*(torch.tensor(v, dtype=dtype)[None] for v in (x, mean, theta)))
    np.testing.assert_allclose(actual[0].double(), expected, rtol=tolerance, atol=tolerance)


def exact_log_pmf(x, log_mean, log_theta):
    x, mean, theta = mpmath.mpf(x), mpmath.exp(log_mean), mpmath.exp(log_theta)
    binomial = mpmath.loggamma(x + theta) - mpmath.loggamma(theta) - mpmath.loggamma(x + 1)
    return float(
        binomial + x * mpmath.log(mean / (mean + theta)) - theta * mpmath.log1p(mean / theta)
    )


@pytest.mark.parametrize(
    ("form", "dtype", "tolerance"),
    [
        (among_others, torch.float64, 1e-9),
        (among_others, torch.float32, 1e-5),
        (among_zeros, torch.float64, 2e-7),  # of 17 counts or more at theta = 1e8
        (among_zeros, torch.float32, 1e-5),
    ],
)
def test_log_pmf_in_forty_digits(form, dtype, tolerance):
    """Where the textbook formula fails: huge theta, huge counts, means far from the counts."""
    counts = (0, 1, 2, 9, 16, 17, 1000, 3_000_000)
    x, mean, theta = columns(
        counts, (0.01, 1.0, 30.0, 1e6), (1e-6, 0.5, 9.9, 10.1, 1e4, 1e6, 1e8), dtype=dtype
    )
    log_mean, log_theta = mean.log(), theta.log()[0]
    with mpmath.workdps(40):
        expected = [
            exact_log_pmf(*entry)
            for entry in zip(x[0].tolist(), log_mean[0].tolist(), log_theta.tolist(), strict=True)
        ]
    actual = form(x, log_mean, log_theta)[0]
    np.testing.assert_allclose(actual.double(), expected, rtol=tolerance, atol=1e-11)


@pytest.mark.parametrize(
    ("counts", "shape", "table"),
    [
        ([[1.0, 0.0], [16.0, 2.0]], (2, 2), True),
        ([[1.0, 0.0], [16.0, 2.0]], (5, 2, 2), True),
        ([[1.0, 0.0], [17.0, 2.0]], (2, 2), False),  # a quarter is large
        ([[1.0] * 19 + [17.0]], (1, 20), True),
        ([[1.0] * 19 + [17.0]], (3, 1, 20), True),
    ],
)
def test_counts_are_read_from_the_table_where_few_are_large(monkeypatch, counts, shape, table):
    seen = []
    for name in ("_SmallCounts", "_NegativeBinomialKernel"):
        kind = getattr(distributions, name)
        spy = SimpleNamespace(apply=lambda *a, k=kind: seen.append(k.__name__) or k.apply(*a))
        monkeypatch.setattr(distributions, name, spy)
    p = NegativeBinomial(torch.zeros(shape), torch.zeros(shape[-1]))
    p.log_prob(torch.tensor(counts))
    assert seen == ["_SmallCounts" if table else "_NegativeBinomialKernel"]


def test_counts_in_single_precision_take_a_mean_in_double():
    x = torch.tensor([[1.0] * 19 + [40.0]])
    log_mean = torch.zeros(1, 20, dtype=torch.float64, requires_grad=True)
    found = NegativeBinomial(log_mean, torch.zeros(20, dtype=torch.float64)).log_prob(x)
    np.testing.assert_allclose(found.detach(), stats.nbinom.logpmf(x, 1, 0.5), rtol=1e-12)
    (slope,) = torch.autograd.grad(found.sum(), log_mean)
    torch.testing.assert_close(slope, (x.double() - 1) / 2)  # (x - mu) / (1 + mu)


def test_textbook_formula_does_fail_there():
    """The reason for the saddle-point form, so that nobody simplifies it away."""
    x, mean, theta = columns((3,), (2.0,), (1e6,), dtype=torch.float32)
    textbook = torch.distributions.NegativeBinomial(theta, logits=(mean / theta).log())
    exact = stats.poisson.logpmf(3, 2.0)
    assert abs(float(textbook.log_prob(x)) - exact) > 0.05
    assert float(log_prob(x, mean, theta)) == pytest.approx(exact, abs=1e-4)


@pytest.mark.parametrize(("mean", "theta"), [(0.2, 0.3), (5.0, 1.0), (20.0, 50.0)])
def test_pmf_sums_to_one(mean, theta):
    x = torch.arange(2000, dtype=torch.float64)[:, None]
    shape = torch.full_like(x, mean)
    pmf = log_prob(x, shape, torch.tensor([[theta]], dtype=torch.float64)).exp()
    assert float(pmf.sum()) == pytest.approx(1.0, abs=1e-10)


def test_samples_have_the_moments_of_the_definition():
    mean, theta = torch.tensor([0.5, 3.0, 40.0]), torch.tensor([0.4, 2.0, 1000.0])
    nb = NegativeBinomial(mean.log().expand(100_000, 3), theta.log())
    draws = nb.sample(torch.Generator().manual_seed(0)).double().numpy()
    assert within_four_errors(draws, mean.numpy())
    variance = (mean + mean.square() / theta).numpy()
    assert within_four_errors((draws - mean.numpy()) ** 2, variance)


def test_samples_follow_their_generator_alone():
    nb = NegativeBinomial(torch.zeros(20, 3), torch.zeros(3))
    before = torch.random.get_rng_state()
    first, again = (nb.sample(torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(before, torch.random.get_rng_state())
    assert not torch.equal(first, nb.sample(torch.Generator().manual_seed(6)))


@pytest.mark.parametrize("zeros", [0, 17])
def test_gradients_are_those_of_finite_differences(zeros):
    """Of several draws; with further cells of nothing, one of 51 counts is large."""
    x = torch.tensor([[0.0, 1.0, 7.0], [30.0, 2.0, 11.0]], dtype=torch.float64)
    x = torch.cat([x, torch.zeros(zeros, 3).to(x)])
    generator = torch.Generator().manual_seed(0)
    log_mean = torch.randn(4, len(x), 3, dtype=torch.float64, generator=generator).requires_grad_()
    log_theta = torch.tensor([-3.0, 0.5, 4.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *parameters: NegativeBinomial(*parameters).log_prob(x), (log_mean, log_theta)
    )


@pytest.mark.parametrize("form", [among_others, among_zeros])
def test_gradients_in_single_precision(form):
    from scipy.special import digamma

    x, mean, theta = columns((0, 1, 16, 500), (0.1, 5.0, 400.0), (0.01, 1.0, 30.0, 1e4))
    log_mean, log_theta = (v.log().float().requires_grad_() for v in (mean, theta))
    form(x.float(), log_mean, log_theta[0]).sum().backward()
    slope = torch.from_numpy(digamma((x + theta).numpy()) - digamma(theta.numpy()))
    slope = slope - torch.log1p(mean / theta)
    by_theta = theta * (slope + (mean - x) / (mean + theta))
    torch.testing.assert_close(
        log_mean.grad.double(), theta * (x - mean) / (mean + theta), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(log_theta.grad.double(), by_theta, rtol=1e-4, atol=2e-3)


def test_gradients_refuse_to_be_differentiated_again():
    log_mean = torch.zeros(1, 1, requires_grad=True)
    value = NegativeBinomial(log_mean, torch.zeros(1)).log_prob(torch.ones(1, 1)).square().sum()
    (gradient,) = torch.autograd.grad(value, log_mean, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-6)])
def test_stirling_error(dtype, tolerance):
    y = torch.logspace(-4, 9, 60, dtype=dtype)
    with mpmath.workdps(40):
        expected = [
            float(
                mpmath.loggamma(v) - (v - 0.5) * mpmath.log(v) + v - mpmath.log(2 * mpmath.pi) / 2
            )
            for v in map(mpmath.mpf, y.tolist())
        ]
    np.testing.assert_allclose(
        stirling_error(y).double(), expected, rtol=tolerance, atol=tolerance
    )


# ------------------------------------------------------------------------------- divergences


@settings(max_examples=50)
@given(st.floats(-5, 5), st.floats(0.01, 9), st.floats(-5, 5))
def test_kl_to_a_fixed_shift_is_torchs(mean, variance, shift):
    mean, variance, shift = (
        torch.full((1, 1), v, dtype=torch.float64) for v in (mean, variance, shift)
    )
    expected = kl_divergence(Normal(mean, variance.sqrt()), Normal(shift, 1.0))
    actual = kl_to_shifted_normal(mean, variance, Moments(shift, torch.zeros_like(shift)))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=50)
@given(probability, st.floats(-5, 5), st.floats(-3, 3))
def test_kl_to_a_gated_shift_is_the_sum_over_the_gate(pi, slab, mean):
    mean, slab = (torch.full((1, 1), v, dtype=torch.float64) for v in (mean, slab))
    variance = torch.full((1, 1), 0.3, dtype=torch.float64)
    fixed = [
        kl_divergence(Normal(mean, variance.sqrt()), Normal(gate * slab, 1.0)) for gate in (0, 1)
    ]
    moments = Moments(pi * slab, slab.square() * (pi - pi**2))
    expected = (1 - pi) * fixed[0] + pi * fixed[1]
    actual = kl_to_shifted_normal(mean, variance, moments)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_gaussian_log_prob_is_scipys():
    rng = np.random.default_rng(0)
    z, mean, variance = rng.normal(size=(5, 4, 3)), rng.normal(size=(4, 3)), rng.random((4, 3))
    expected = stats.norm.logpdf(z, mean, np.sqrt(variance)).sum(-1)
    actual = gaussian_log_prob(*map(torch.from_numpy, (z, mean, variance)))
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_moments_at_rows():
    moments = Moments(torch.arange(6.0).reshape(3, 2), torch.ones(3, 2))
    assert moments.at(torch.tensor([2, 0, 2])).mean.tolist() == [[4, 5], [0, 1], [4, 5]]
    assert moments.at(1).mean.tolist() == [2, 3]


# -------------------------------------------------------------------------- straight through


def straight_through(logit, *, n_draws=200_000, temperature=1.0):
    """Draws and their gradients by the logit."""
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        logits = torch.full((n_draws,), float(logit), requires_grad=True)
        draws = straight_through_bernoulli(logits, temperature=temperature)
    draws.sum().backward()
    return draws.detach(), logits.grad


@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize("logit", [-2.0, 0.0, 3.0])
def test_draws_are_hard_and_as_frequent_as_they_should_be(logit, temperature):
    draws, _ = straight_through(logit, temperature=temperature)
    assert set(draws.tolist()) <= {0.0, 1.0}
    assert within_four_errors(draws, 1 / (1 + np.exp(-logit)))


def difference_of_two_logistics(x):
    """Density of the difference of two standard logistic variables."""
    return 1 / 6 if x == 0 else np.exp(x) * ((x - 2) * np.exp(x) + x + 2) / np.expm1(x) ** 3


@pytest.mark.parametrize("logit", [-3.0, 0.0, 1.0, 5.0])
def test_the_bias_of_the_gradient_is_known(logit):
    """This documents the bias of the released estimator; the exact gradient is sigma'."""
    _, gradients = straight_through(logit)
    assert within_four_errors(gradients, difference_of_two_logistics(logit))
    exact = np.exp(-logit) / (1 + np.exp(-logit)) ** 2
    assert not within_four_errors(gradients, exact)


def test_the_gradient_at_zero_is_a_sixth_where_a_quarter_is_exact():
    _, gradients = straight_through(0.0)
    assert float(gradients.mean()) == pytest.approx(1 / 6, abs=2e-3)


@pytest.mark.parametrize("logit", [0.0, 2.0])
def test_the_bias_vanishes_with_the_temperature(logit):
    _, gradients = straight_through(logit, temperature=0.02)
    exact = np.exp(-logit) / (1 + np.exp(-logit)) ** 2
    assert within_four_errors(gradients, exact)
