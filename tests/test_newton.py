"""Gauss-Newton steps against autograd, numpy's linear algebra and scipy's optimiser."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from torch import nn
from torch.nn import functional

from smslib.newton import log_rate_and_jacobian, newton_step

N_CELLS, N_LATENT, N_GENES = 5, 3, 7
SLOPES = {"relu": 0.0, "leaky_relu": 0.2}


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def make_layers(n_hidden_layers, *, width=6, seed=0, scale=1.0):
    """Linear maps from latents to genes, with biases that put cells on both sides of kinks."""
    widths = [N_LATENT, *[width] * n_hidden_layers, N_GENES]
    layers = [
        nn.Linear(a, b, dtype=torch.float64) for a, b in zip(widths[:-1], widths[1:], strict=True)
    ]
    for place, layer in enumerate(layers):
        with torch.no_grad():
            layer.weight.copy_(scale * random(*layer.weight.shape, seed=seed + place))
            layer.bias.copy_(0.5 * random(*layer.bias.shape, seed=seed + place + 100))
        layer.requires_grad_(False)
    return layers


def decode(layers, slope, z):
    """The log shares again, as torch would have them written."""
    parts = []
    for layer in layers[:-1]:
        parts += [layer, nn.LeakyReLU(slope)]
    return functional.log_softmax(nn.Sequential(*parts, layers[-1])(z), -1)


def log_joint(z, counts, shift, *, log_rate, theta):
    """log NB(x | z) + log N(z; s, 1) of one cell, by torch.distributions."""
    logits = counts.sum().log() + log_rate(z) - theta.log()
    likelihood = torch.distributions.NegativeBinomial(theta, logits=logits).log_prob(counts)
    return likelihood.sum() + torch.distributions.Normal(shift, 1.0).log_prob(z).sum()


class Problem:
    """Cells of a decoder, and the step of each."""

    def __init__(self, *, n_hidden_layers=2, slope=0.2, depth=20.0, theta=4.0, seed=0, scale=0.6):
        self.layers = make_layers(n_hidden_layers, seed=seed, scale=scale)
        self.slope = slope
        self.truth = random(N_CELLS, N_LATENT, seed=seed + 7)
        rate = depth * N_GENES * decode(self.layers, slope, self.truth).exp().detach()
        rng = np.random.default_rng(seed)
        self.counts = torch.from_numpy(rng.poisson(rate) + 1.0)
        self.theta = theta * random(N_GENES, seed=seed + 8).abs() + theta
        self.shift = self.truth.sign()

    def log_rate(self, z):
        return decode(self.layers, self.slope, z)

    def terms(self, z):
        with torch.no_grad():
            return log_rate_and_jacobian(self.layers, self.slope, z)

    def step(self, z):
        log_rate, jacobian = self.terms(z)
        theta = self.theta
        return newton_step(
            z, self.counts, self.shift, log_rate=log_rate, jacobian=jacobian, theta=theta
        )

    def joint(self, z, cell):
        counts, shift = self.counts[cell], self.shift[cell]
        return log_joint(z, counts, shift, log_rate=self.log_rate, theta=self.theta)

    def mode(self, cell, start):
        """Where scipy finds the largest log p(x, z)."""

        def loss(z):
            z = torch.tensor(z, requires_grad=True)
            value = -self.joint(z, cell)
            return value.item(), torch.autograd.grad(value, z)[0].numpy()

        found = optimize.minimize(loss, start, jac=True, method="BFGS", options={"gtol": 1e-9})
        return torch.from_numpy(found.x)


# --------------------------------------------------------------------------- the derivative


@pytest.mark.parametrize("n_hidden_layers", [1, 2, 3])
@pytest.mark.parametrize("slope", SLOPES.values(), ids=SLOPES)
def test_log_rate_and_jacobian_are_those_of_autograd(n_hidden_layers, slope):
    layers, z = make_layers(n_hidden_layers), random(N_CELLS, N_LATENT, seed=3)
    log_rate, jacobian = log_rate_and_jacobian(layers, slope, z)
    torch.testing.assert_close(log_rate, decode(layers, slope, z))
    each = torch.func.vmap(torch.func.jacrev(lambda one: decode(layers, slope, one)))(z)
    torch.testing.assert_close(jacobian, each.transpose(1, 2))


def test_of_a_linear_decoder_the_derivative_is_the_centred_product_of_its_weights():
    """With a slope of one below zero nothing is rectified."""
    first, second = layers = make_layers(1)
    log_rate, jacobian = log_rate_and_jacobian(layers, 1.0, random(N_CELLS, N_LATENT))
    product = (second.weight @ first.weight).t()
    expected = product - (log_rate.exp() @ product.t()).unsqueeze(-1)
    torch.testing.assert_close(jacobian, expected)


def test_the_cells_stay_as_they_were():
    problem, z = Problem(), random(N_CELLS, N_LATENT)
    before = z.clone(), problem.counts.clone()
    problem.step(z)
    assert torch.equal(z, before[0])
    assert torch.equal(problem.counts, before[1])


# --------------------------------------------------------------------------------- the step


@pytest.mark.parametrize("slope", SLOPES.values(), ids=SLOPES)
@pytest.mark.parametrize("theta", [0.5, 4.0, 1e6])
def test_the_step_solves_the_equation_of_its_docstring(slope, theta):
    problem, z = Problem(slope=slope, theta=theta, depth=3.0), 0.1 * random(N_CELLS, N_LATENT)
    log_rate, jacobian = (part.numpy() for part in problem.terms(z))
    x, shift, theta = (part.numpy() for part in (problem.counts, problem.shift, problem.theta))
    step = problem.step(z).numpy()
    for cell in range(N_CELLS):
        mu, J = x[cell].sum() * np.exp(log_rate[cell]), jacobian[cell].T
        # The Fisher information about log mu, from the negative binomial's variance.
        fisher = mu**2 / stats.nbinom(theta, theta / (theta + mu)).var()
        W = np.diag(fisher)
        gradient = J.T @ W @ ((x[cell] - mu) / mu) - (z[cell].numpy() - shift[cell])
        expected = np.linalg.inv(J.T @ W @ J + np.eye(N_LATENT)) @ gradient
        np.testing.assert_allclose(step[cell], expected.clip(-1, 1), rtol=1e-8)


@pytest.mark.parametrize("slope", SLOPES.values(), ids=SLOPES)
@pytest.mark.parametrize("theta", [0.5, 4.0])
def test_the_step_goes_up_the_gradient_of_the_joint_density(slope, theta):
    """Curvature times step is what autograd finds for log p(x | z) + log p(z | c)."""
    problem = Problem(slope=slope, theta=theta, depth=3.0)
    z = problem.shift + 0.1 * random(N_CELLS, N_LATENT)
    (log_rate, jacobian), step = problem.terms(z), problem.step(z)
    assert step.abs().max() < 1, "clamped: the equation below would not hold"
    mu = problem.counts.sum(-1, keepdim=True) * log_rate.exp()
    fisher = mu * problem.theta / (problem.theta + mu)
    for cell in range(N_CELLS):
        J = jacobian[cell].T
        curvature = J.T @ fisher[cell].diag() @ J + torch.eye(N_LATENT)
        gradient = torch.func.grad(lambda one, cell=cell: problem.joint(one, cell))(z[cell])
        torch.testing.assert_close(curvature @ step[cell], gradient, rtol=1e-7, atol=1e-7)


def test_of_poisson_counts_and_a_linear_decoder_it_is_newtons_own_step():
    """The log share is the canonical parameter: Fisher's information is the Hessian."""
    problem = Problem(n_hidden_layers=1, slope=1.0, theta=1e9, depth=5.0, scale=0.3)
    z = problem.shift + 0.05 * random(N_CELLS, N_LATENT)
    step = problem.step(z)
    for cell in range(N_CELLS):
        gradient = torch.func.grad(lambda one, cell=cell: problem.joint(one, cell))
        hessian = torch.func.jacrev(gradient)(z[cell])
        expected = -torch.linalg.solve(hessian, gradient(z[cell]))
        torch.testing.assert_close(step[cell], expected.clamp(-1, 1), rtol=1e-5, atol=1e-6)


def test_one_step_lands_at_the_mode_where_the_model_is_all_but_gaussian():
    """Many counts, little dispersion and gentle weights: the joint density is a parabola."""
    problem = Problem(n_hidden_layers=1, slope=1.0, theta=1e9, depth=1e5, scale=0.1)
    z = problem.truth - 0.4
    landed = z + problem.step(z)
    for cell in range(N_CELLS):
        mode = problem.mode(cell, z[cell].numpy())
        moved = (mode - z[cell]).abs()
        assert moved.max() > 0.2
        assert (landed[cell] - mode).abs().max() < 0.02 * moved.max()


def settled(problem):
    """Where the steps lead from the prior mean, and where scipy goes from there."""
    z = problem.shift
    for _ in range(50):
        z = z + problem.step(z)
    modes = [problem.mode(cell, z[cell].numpy()) for cell in range(N_CELLS)]
    return z, torch.stack(modes)


@pytest.mark.parametrize("seed", range(3))
def test_repeated_steps_end_at_the_mode_that_scipy_finds(seed):
    problem = Problem(n_hidden_layers=1, slope=1.0, depth=2.0, theta=1.0, seed=seed)
    z, modes = settled(problem)
    assert (modes - problem.shift).abs().max() > 0.3
    torch.testing.assert_close(z, modes, rtol=0, atol=1e-5)


@pytest.mark.parametrize("slope", SLOPES.values(), ids=SLOPES)
def test_of_a_rectified_decoder_they_do_so_wherever_the_mode_is_not_on_a_kink(slope):
    """On a kink the gradient does not vanish; there, or close by, the steps may hop across it."""
    smooth, short = [], []
    for seed in range(3):
        problem = Problem(slope=slope, seed=seed)
        z, modes = settled(problem)
        for cell, (here, mode) in enumerate(zip(z, modes, strict=True)):
            gradient = torch.func.grad(lambda one, c=cell, p=problem: p.joint(one, c))(mode)
            short.append(float(problem.joint(mode, cell) - problem.joint(here, cell)))
            if gradient.abs().max() < 1e-4:
                smooth.append(float((here - mode).abs().max()))
    assert len(smooth) >= 10  # of 15
    assert sorted(smooth)[-2] < 1e-5
    assert np.mean(short) < 0.1  # nats


def flat_problem():
    """A decoder that no latent moves."""
    problem = Problem()
    with torch.no_grad():
        problem.layers[-1].weight.zero_()
    return problem


def test_without_information_the_step_goes_to_the_prior_mean():
    problem = flat_problem()
    z = problem.shift + 0.7
    torch.testing.assert_close(z + problem.step(z), problem.shift)


def test_a_cell_without_counts_goes_to_the_prior_mean():
    problem = Problem()
    problem.counts[0] = 0.0
    z = problem.shift - 0.4
    torch.testing.assert_close((z + problem.step(z))[0], problem.shift[0])


@settings(max_examples=30)
@given(
    seed=st.integers(0, 10_000),
    distance=st.floats(0.0, 50.0),
    theta=st.floats(0.01, 1e5),
    depth=st.floats(0.1, 1e3),
)
def test_no_latent_moves_by_more_than_one(seed, distance, theta, depth):
    problem = Problem(seed=seed, theta=theta, depth=depth)
    step = problem.step(distance * random(N_CELLS, N_LATENT, seed=seed))
    assert step.isfinite().all()
    assert step.abs().max() <= 1.0


def test_far_from_the_mode_the_step_has_length_one():
    problem = flat_problem()
    far = problem.shift + torch.tensor([9.0, -9.0, 0.25], dtype=torch.float64)
    expected = torch.tensor([-1.0, 1.0, -0.25], dtype=torch.float64).expand(N_CELLS, -1)
    torch.testing.assert_close(problem.step(far), expected)


def test_a_cell_is_moved_without_its_batch_mates():
    problem, z = Problem(), random(N_CELLS, N_LATENT, seed=5)
    together = problem.step(z)
    problem.counts, problem.shift = problem.counts[2:3], problem.shift[2:3]
    torch.testing.assert_close(problem.step(z[2:3]), together[2:3])
