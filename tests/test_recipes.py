"""The two recipes: the released one setting by setting, ours by where it puts its thresholds."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from smslib import recipes
from smslib.data import Cells, Design
from smslib.priors import BetaGate, L1Gate, LogitGate, OpenGate
from smslib.train import TrainConfig

METHODS = ("vae", "beta-vae", "ivae", "svae", "svae+")
DESIGN = Design.single_target(["a", "b", "c", "d"])
N_GENES, N_LATENT = 6, 3


def make_cells(n_each=50):
    condition = torch.arange(5).repeat_interleave(n_each)
    return Cells(torch.ones(len(condition), N_GENES), condition)


def build(method, recipe, **options):
    return recipes.build(
        make_cells(), DESIGN, method=method, recipe=recipe, n_latent=N_LATENT, **options
    )


def modules(network, kind):
    return [module for module in network.modules() if isinstance(module, kind)]


# ---------------------------------------------------------------- as released


@pytest.mark.parametrize("method", METHODS)
def test_released_optimiser(method):
    _, config = build(method, "paper")
    assert config == TrainConfig(
        epochs=300,
        batch_size=128,
        learning_rate=1e-3,
        schedule="constant",
        adam_eps=0.01,
        weight_decay=1e-6,
        beta=10.0 if method == "beta-vae" else 1.0,
        warmup_epochs=50,
        warm_penalty=method == "svae+",
        loss_scale="screen" if method == "svae+" else "cell",
        patience=45,
        keep="last",
        max_grad_norm=None,
        seed=0,
    )


@pytest.mark.parametrize("method", METHODS)
def test_released_networks(method):
    model, _ = build(method, "paper")
    for network in (model.encoder, model.decoder):
        assert [norm.num_features for norm in modules(network, nn.BatchNorm1d)] == [128, 128]
        assert {(n.momentum, n.eps) for n in modules(network, nn.BatchNorm1d)} == {(0.01, 0.001)}
        assert len(modules(network, nn.ReLU)) == 2
    assert [layer.p for layer in modules(model.encoder, nn.Dropout)] == [0.1, 0.1]
    assert modules(model.decoder, nn.Dropout) == []
    assert model.estimator == "sampled"


@pytest.mark.parametrize(
    ("method", "gate"),
    [
        ("vae", OpenGate),
        ("beta-vae", OpenGate),
        ("ivae", LogitGate),
        ("svae", L1Gate),
        ("svae+", BetaGate),
    ],
)
def test_released_gates_start_open(method, gate):
    model, _ = build(method, "paper")
    assert type(model.prior.gate) is gate
    if gate is not OpenGate:
        assert torch.equal(model.prior.gate.logit, torch.full((4, N_LATENT), 5.0))


def test_released_penalty_of_svae_is_lambda_times_the_mean_gate_per_cell():
    model, _ = build("svae", "paper", sparsity=40.0)
    per_cell = model.prior.penalty() / len(make_cells())
    torch.testing.assert_close(per_cell, 40.0 * model.prior.gate().mean())


def test_released_penalty_of_svae_plus_is_the_log_beta_density():
    from scipy import stats

    model, _ = build("svae+", "paper", sparsity=7.0)
    with torch.no_grad():
        model.prior.gate.logit.normal_(generator=torch.Generator().manual_seed(0))
    density = stats.beta(1, 7.0).logpdf(model.prior.probabilities())
    assert float(model.prior.penalty().detach()) == pytest.approx(-density.sum(), rel=1e-5)


# ---------------------------------------------------------------- ours


@pytest.mark.parametrize("method", METHODS)
def test_our_networks_are_deterministic_given_z(method):
    model, config = build(method, "smslib")
    assert modules(model, nn.BatchNorm1d) == modules(model, nn.Dropout) == []
    assert model.estimator == "expected"
    assert (config.adam_eps, config.schedule, config.keep) == (1e-8, "cosine", "best")


def cheapest_gate(model, shift, n_cells):
    """Minimise data cost plus penalty over the gate of one edge, on a grid.

    ``n_cells`` cells whose posterior mean is ``shift`` cost ``n E[(shift - gate * shift)^2] / 2``.
    """
    logits = torch.linspace(-12.0, 12.0, 4001)
    costs = []
    with torch.no_grad():
        for logit in logits:
            model.prior.gate.logit.fill_(-30.0)
            model.prior.gate.logit[0, 0] = logit
            miss = 0.5 * n_cells * shift**2 * (1.0 - float(logit.sigmoid()))
            costs.append(miss + float(model.prior.penalty()))
    return float(logits[int(np.argmin(costs))].sigmoid())


@pytest.mark.parametrize("method", ["svae", "svae+"])
@pytest.mark.parametrize("n_each", [50, 400])
def test_our_threshold_is_the_same_for_any_number_of_cells(method, n_each):
    cells = make_cells(n_each)
    model, _ = recipes.build(cells, DESIGN, method=method, recipe="smslib", n_latent=1)
    assert cheapest_gate(model, 1.2, n_each) < 0.5
    assert cheapest_gate(model, 1.45, n_each) > 0.5


def test_few_cells_still_leave_a_penalty():
    model, _ = recipes.build(make_cells(1), DESIGN, recipe="smslib")
    assert model.prior.gate.alpha == 2.0


def test_cells_per_target_is_a_median_over_targets_in_combinations_too():
    matrix = torch.tensor([[0.0, 0], [1, 0], [1, 1]])
    design = Design(("control", "a", "a+b"), ("a", "b"), matrix)
    cells = Cells(torch.ones(60, N_GENES), torch.tensor([0] * 10 + [1] * 20 + [2] * 30))
    model, _ = recipes.build(cells, design, recipe="smslib")
    # Target a is seen in 50 cells, b in 30; of two values torch's median is the lower one.
    assert model.prior.gate.alpha == pytest.approx(0.45 * 30)


# ---------------------------------------------------------------- both


@pytest.mark.parametrize("recipe", sorted(recipes.RECIPES))
@pytest.mark.parametrize("method", METHODS)
def test_the_seed_fixes_the_weights_and_reaches_the_training(recipe, method):
    first, config = build(method, recipe, seed=3, epochs=7)
    again, _ = build(method, recipe, seed=3)
    other, _ = build(method, recipe, seed=4)
    assert torch.equal(first.genes.weight, again.genes.weight)
    assert not torch.equal(first.genes.weight, other.genes.weight)
    assert (config.seed, config.epochs) == (3, 7)
    assert math.isclose(config.beta, 10.0 if method == "beta-vae" else 1.0)


def test_building_leaves_the_global_random_state_alone():
    before = torch.random.get_rng_state()
    for recipe in recipes.RECIPES:
        build("svae+", recipe)
    assert torch.equal(before, torch.random.get_rng_state())


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"unknown recipe 'ours'; expected one of \['corrected', 'paper'"
    ):
        build("svae+", "ours")
    for recipe in recipes.RECIPES:
        with pytest.raises(ValueError, match="unknown method 'gan'; expected one of"):
            build("gan", recipe)


def test_sparsity_of_a_method_without_gates_is_refused():
    with pytest.raises(ValueError, match="this method has no sparse gates"):
        build("ivae", "smslib", sparsity=3.0)
