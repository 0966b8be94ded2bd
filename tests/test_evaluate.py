"""Bounds against exact evidence; draws that depend on the seed and the cell alone."""

import copy
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from torch.distributions import Independent, Normal

from smslib import evaluate
from smslib.data import Cells, Design
from smslib.distributions import Moments
from smslib.evaluate import by_condition, elbo, iwelbo, latents
from smslib.model import SMSVAE
from smslib.priors import OpenGate, PointSlab, ShiftPrior
from smslib.simulate import exact_log_prob, exact_posterior, linear_gaussian, sparse_shift

CONDITION = 2


class Toy(SMSVAE):
    """The generator of a linear-Gaussian screen, and the best diagonal q(z | x) for it.

    An encoder does not see the condition, so that this one serves the cells of one condition.
    """

    def __init__(self, screen):
        n_targets, n_latent = screen.graph.shape
        prior = ShiftPrior(
            screen.design, PointSlab(n_targets, n_latent), OpenGate(n_targets, n_latent)
        )
        super().__init__(prior, screen.cells.n_genes, n_latent=n_latent, n_hidden=2)
        self.double()
        self.screen = screen
        with torch.no_grad():
            prior.slab.mean.copy_(screen.shift[1:])

    def encode(self, counts):
        condition = torch.full((len(counts),), CONDITION)
        mean, covariance = exact_posterior(self.screen, Cells(counts, condition))
        variance = 1 / torch.linalg.inv(covariance).diagonal()
        return Moments(mean, variance.expand_as(mean))

    def decode(self, z, library):
        decoder = self.screen.decoder
        return Independent(Normal(z @ decoder.loadings, decoder.noise), 0)

    def likelihood(self, cells):
        return ToyLikelihood(self, cells)


class ToyLikelihood:
    def __init__(self, model, cells):
        self.model, self.cells = model, cells

    def at(self, cell, z):
        x = self.cells.counts[cell]
        return self.model.decode(z, None).log_prob(x).sum(-1)


def toy(n_latent):
    """A toy model, cells of one condition, and their exact log-evidence."""
    screen = linear_gaussian(n_cells=120, n_latent=n_latent, seed=4)
    cells = screen.cells[screen.cells.condition == CONDITION]
    return Toy(screen), cells, exact_log_prob(screen, cells).numpy()


def small(n_cells_per_condition=2, **options):
    screen = sparse_shift(
        n_cells_per_condition=n_cells_per_condition, n_targets=6, n_latent=3, n_genes=40, seed=0
    )
    options = {"n_latent": 3, "n_hidden": 16, **options}
    model = SMSVAE.preset("svae+", screen.design, 40, **options)
    return model.double(), replace(screen, cells=double(screen.cells))


def double(cells):
    return Cells(cells.counts.double(), cells.condition)


# -------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("n_draws", [1, 7])
def test_with_the_true_posterior_the_bound_is_the_evidence_without_variance(n_draws):
    model, cells, evidence = toy(n_latent=1)
    assert len(cells) >= 20
    bounds = [iwelbo(model, cells, n_draws=n_draws, seed=seed) for seed in (0, 1)]
    np.testing.assert_allclose(bounds[0], evidence, rtol=0, atol=1e-11)
    np.testing.assert_allclose(bounds[0], bounds[1], rtol=0, atol=1e-11)


def test_with_a_diagonal_posterior_the_gap_closes_from_below():
    model, cells, evidence = toy(n_latent=3)
    gaps = []
    for n_draws, n_seeds in ((1, 60), (10, 150), (100, 40)):
        bounds = [iwelbo(model, cells, n_draws=n_draws, seed=seed) for seed in range(n_seeds)]
        gap = evidence - np.concatenate(bounds).reshape(n_seeds, -1)
        gaps.append((gap.mean(), gap.std() / math.sqrt(gap.size)))
    (one, e1), (ten, e10), (hundred, e100) = gaps
    assert one > ten + 4 * math.hypot(e1, e10)
    assert ten > hundred + 4 * math.hypot(e10, e100)
    assert hundred > -4 * e100
    assert hundred < 0.2 * one


def test_the_elbo_is_below_the_evidence_and_is_the_bound_of_one_draw_on_average():
    model, cells, evidence = toy(n_latent=3)
    once = np.stack([elbo(model, cells, seed=seed) for seed in range(100)])
    bound = np.stack([iwelbo(model, cells, n_draws=1, seed=seed) for seed in range(100)])
    error = math.hypot(once.mean(1).std(), bound.mean(1).std()) / math.sqrt(100)
    assert abs(once.mean() - bound.mean()) < 4 * error
    assert once.mean() < evidence.mean() - 4 * error


def draw_by_draw(model, cells, n_draws):
    """The released way: encode, draw and decode anew for every draw."""
    weights = []
    for _ in range(n_draws):
        q = model.encode(cells.counts)
        posterior = Normal(q.mean, q.variance.sqrt())
        z = posterior.sample()
        log_x = model.decode(z, cells.library).log_prob(cells.counts).sum(-1)
        log_ratio = model.prior.log_prob(z, cells.condition) - posterior.log_prob(z).sum(-1)
        weights.append(log_x + log_ratio)
    return torch.stack(weights).logsumexp(0) - math.log(n_draws)


def test_equal_to_draw_by_draw_within_monte_carlo_error():
    model, screen = small()
    # A posterior close to the prior, so that the error of the average is a normal one.
    with torch.no_grad():
        model.posterior.weight.mul_(0.1)
        model.genes.weight.mul_(0.1)
        cells = screen.cells
        with torch.random.fork_rng():
            torch.random.manual_seed(0)
            slow = torch.stack([draw_by_draw(model.eval(), cells, 100) for _ in range(8)]).numpy()
    fast = np.stack([iwelbo(model, cells, n_draws=100, seed=seed) for seed in range(8)])
    difference = fast.mean(1) - slow.mean(1)
    error = math.hypot(fast.mean(1).std(ddof=1), slow.mean(1).std(ddof=1)) / math.sqrt(8)
    assert abs(difference.mean()) < 4 * error
    assert error < 0.5


# ------------------------------------------------------------------- what must not matter


def test_chunks_do_not_matter(monkeypatch):
    model, screen = small()
    whole = iwelbo(model, screen.cells, n_draws=50)
    monkeypatch.setattr(evaluate, "_FLOATS_PER_CHUNK", 1)
    monkeypatch.setattr(evaluate, "_SMALLEST_CHUNK", 7)
    np.testing.assert_allclose(iwelbo(model, screen.cells, n_draws=50), whole, rtol=1e-10)


def test_batches_and_threads_do_not_matter():
    model, screen = small()
    whole = iwelbo(model, screen.cells, n_draws=20)
    np.testing.assert_allclose(
        iwelbo(model, screen.cells, n_draws=20, batch_size=5), whole, rtol=1e-10
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        shared = iwelbo(model, screen.cells, n_draws=20, batch_size=5)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_allclose(shared, whole, rtol=1e-10)


def test_a_prefix_of_the_cells_gets_the_same_bounds():
    model, screen = small()
    whole = iwelbo(model, screen.cells, n_draws=20)
    np.testing.assert_allclose(iwelbo(model, screen.cells[:5], n_draws=20), whole[:5], rtol=1e-10)


@pytest.mark.parametrize("score", [elbo, iwelbo])
def test_a_seed_decides_the_draws(score):
    model, screen = small()
    options = {} if score is elbo else {"n_draws": 5}
    first, again, other = (score(model, screen.cells, seed=s, **options) for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other, rtol=1e-10)


@pytest.mark.parametrize("score", [elbo, iwelbo, latents])
@pytest.mark.parametrize("options", [{"norm": "batch"}, {"newton": True}], ids=str)
def test_model_cells_and_random_state_are_left_as_they_were(score, options):
    model, screen = small(**options)
    model.encoder.eval()  # a mixed state, as in a model that is partly frozen
    before = copy.deepcopy(model.state_dict())
    modes = [part.training for part in model.modules()]
    rng = torch.random.get_rng_state()
    score(model, screen.cells)
    assert torch.equal(rng, torch.random.get_rng_state())
    assert modes == [part.training for part in model.modules()]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_model_is_back_in_training_after_an_error():
    model, screen = small()
    wrong = Cells(screen.cells.counts[:, 1:], screen.cells.condition)
    with pytest.raises(RuntimeError, match="must match the size"):
        latents(model, wrong)
    assert model.training


# ------------------------------------------------------------------------ steps of inference


def test_with_steps_the_latents_are_the_inferred_means_of_evaluation():
    model, screen = small(newton=True)
    stepped = latents(model, screen.cells, batch_size=5)
    assert model.training
    model.eval()
    expected = model.infer(screen.cells).mean.detach().numpy()
    np.testing.assert_allclose(stepped, expected, atol=1e-10)
    encoded = model.encode(screen.cells.counts).mean.detach().numpy()
    assert np.abs(stepped - encoded).max() > 0.1


def test_steps_bring_the_proposal_closer_to_the_posterior():
    """Both bounds rise, and that of many draws by less: it was closer to the evidence."""
    model, screen = small(newton=True)
    with torch.no_grad():  # as wide as a posterior of these cells, rather than as the prior
        model.posterior.bias[3:] = -2.0
    gains = []
    for score in (partial(elbo), partial(iwelbo, n_draws=500)):
        model.newton = True
        stepped = score(model, screen.cells).mean()
        model.newton = False
        gains.append(stepped - score(model, screen.cells).mean())
    assert gains[0] > 1.0
    assert gains[0] > gains[1] + 0.5
    assert gains[1] > -0.1


def test_steps_are_the_same_in_any_batch_on_any_thread():
    model, screen = small(newton=True)
    whole = iwelbo(model, screen.cells, n_draws=20)
    parts = iwelbo(model, screen.cells, n_draws=20, batch_size=5)
    np.testing.assert_allclose(parts, whole, rtol=1e-9)


# -------------------------------------------------------------------------- what is returned


def test_latents_are_posterior_means_whatever_the_batch():
    model, screen = small()
    expected = model.eval().encode(screen.cells.counts).mean.detach().numpy()
    np.testing.assert_allclose(latents(model, screen.cells, batch_size=5), expected, atol=1e-10)


def test_results_keep_the_precision_of_the_model():
    model, screen = small()
    assert iwelbo(model, screen.cells, n_draws=2).dtype == np.float64
    narrow = Cells(screen.cells.counts.float(), screen.cells.condition)
    assert iwelbo(model.float(), narrow, n_draws=2).dtype == np.float32
    assert latents(model, narrow).dtype == np.float32


def test_better_knowledge_of_the_condition_scores_higher():
    model, cells, _ = toy(n_latent=1)
    shuffled = Cells(cells.counts, torch.ones_like(cells.condition))
    assert iwelbo(model, cells, n_draws=50).mean() > iwelbo(model, shuffled, n_draws=50).mean()


def test_no_draws_are_refused():
    model, screen = small()
    with pytest.raises(ValueError, match="n_draws is 0; expected at least one draw"):
        iwelbo(model, screen.cells, n_draws=0)


# ----------------------------------------------------------------------------- by condition


def test_no_condition_is_dropped():
    design = Design.single_target(["few", "none", "one"])
    cells = Cells(torch.ones(6, 2), torch.tensor([0, 1, 0, 1, 3, 1]))
    values = np.array([1.0, 4.0, 3.0, 8.0, 5.0, 9.0])
    table = by_condition(values, cells, design)
    expected = pd.DataFrame(
        {
            "mean": [2.0, 7.0, math.nan, 5.0],
            "standard_error": [1.0, np.std([4, 8, 9], ddof=1) / math.sqrt(3), math.nan, math.nan],
            "n": [2, 3, 0, 1],
        },
        index=pd.CategoricalIndex(design.conditions, categories=design.conditions),
    ).rename_axis("condition")
    pd.testing.assert_frame_equal(table, expected)
    assert table["n"].sum() == len(cells)
