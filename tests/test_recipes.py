"""The recipes: the released one setting by setting, the others change by change.

Ours is also judged by where it puts its thresholds.
"""

import math
import re
from dataclasses import replace
from types import MappingProxyType
from unittest.mock import ANY

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


@pytest.mark.parametrize("n_each", [2, 400])
def test_released_training_is_as_long_whatever_the_screen(n_each):
    _, config = recipes.build(make_cells(n_each), DESIGN, recipe="paper", n_latent=N_LATENT)
    assert (config.batch_size, config.epochs, config.warmup_epochs) == (128, 300, 50)
    _, short = build("svae+", "paper", epochs=20)
    assert (short.epochs, short.warmup_epochs) == (20, 50)


def test_the_default_sparsity_of_the_released_recipe_is_the_largest_of_its_grid():
    plus, _ = build("svae+", "paper")
    assert plus.prior.gate.alpha == 100.0
    mine, _ = build("svae", "paper")
    chosen, _ = build("svae", "paper", sparsity=100.0)
    assert mine.prior.penalty() == chosen.prior.penalty()


# ---------------------------------------------------------------- corrected, change by change

# What each change may touch, and to what; ANY is a number that was tuned.
TOUCHED = {
    "loss-scale": {"equal_scale": True},
    "open-ivae": {"open_ivae": True},
    "best-weights": {"train.keep": "best"},
    "closed-form-gates": {"network.estimator": "expected"},
    "no-norm": {"network.norm": "none", "network.dropout": 0.0},
    "leaky": {"network.activation": "leaky_relu"},
    "standardise": {"standardise": True},
    "training": {
        "steps": ANY,
        "train.learning_rate": ANY,
        "train.schedule": "cosine",
        "train.adam_eps": 1e-8,
        "train.weight_decay": 0.0,
        "train.patience": None,
        "train.optimizer": "muon",
        "train.muon_weight_decay": ANY,
    },
    "networks": {"network.n_layers_decoder": ANY, "network.n_hidden_encoder": ANY},
    "newton": {"network.newton": True, "train.encoder_share": ANY},
    "weighted": {"train.n_draws": ANY, "train.weighted_share": ANY},
    "alpha-per-cell": {"sparsity": "cells"},
}


def flat(recipe):
    """All settings of a recipe under dotted names."""
    settings = {**vars(recipe), "network": dict(recipe.network), "train": vars(recipe.train)}
    parts = {name: settings.pop(name) for name in ("network", "train")}
    nested = {f"{part}.{key}": v for part, values in parts.items() for key, v in values.items()}
    return settings | nested


def differences(recipe, base):
    """What a recipe sets otherwise than its base."""
    ours, theirs = flat(recipe), flat(base)
    assert theirs.keys() <= ours.keys()
    return {name: v for name, v in ours.items() if name not in theirs or v != theirs[name]}


@pytest.mark.parametrize("change", recipes.CHANGES)
def test_a_change_changes_what_its_name_says_and_nothing_else(change):
    paper = recipes.RECIPES["paper"]
    before = flat(paper)
    assert differences(recipes.CHANGES[change](paper), paper) == TOUCHED[change]
    assert flat(paper) == before


def test_corrected_is_the_released_recipe_with_three_slips_mended():
    corrected, paper = recipes.RECIPES["corrected"], recipes.RECIPES["paper"]
    assert differences(corrected, paper) == {
        "equal_scale": True,
        "open_ivae": True,
        "train.keep": "best",
    }


def test_ours_is_the_released_recipe_with_every_change_made():
    everything = {}
    for touched in TOUCHED.values():
        everything |= touched
    assert differences(recipes.RECIPES["smslib"], recipes.RECIPES["paper"]) == everything


@pytest.mark.parametrize("method", METHODS)
def test_the_changes_one_by_one_arrive_at_our_recipe(method):
    ours, config = build(method, "smslib")
    changed, same = build(method, "paper", changes=tuple(recipes.CHANGES))
    assert config == same
    assert ours.options == changed.options
    assert (ours.newton, ours.estimator) == (changed.newton, changed.estimator)
    for name, value in ours.state_dict().items():
        assert torch.equal(value, changed.state_dict()[name]), name


def test_changes_are_made_in_the_order_given(monkeypatch):
    changes = {
        "five": lambda recipe: recipe.with_train(epochs=5),
        "twice": lambda recipe: recipe.with_train(epochs=2 * recipe.train.epochs),
    }
    monkeypatch.setattr(recipes, "CHANGES", MappingProxyType(changes))
    assert build("vae", "paper", changes=["five", "twice"])[1].epochs == 10
    assert build("vae", "paper", changes=["twice", "five"])[1].epochs == 5


def test_a_recipe_of_ones_own_is_taken_as_it_is():
    mine = replace(recipes.RECIPES["paper"], sparsity="cells").with_train(epochs=5)
    model, config = build("svae+", mine)
    assert config.epochs == 5
    assert model.prior.gate.alpha == pytest.approx(0.45 * 50)
    assert modules(model, nn.BatchNorm1d)
    assert recipes.RECIPES["paper"].train.epochs == 300


@pytest.mark.parametrize("method", METHODS)
def test_corrected_losses_are_all_on_one_scale(method):
    _, config = build(method, "corrected")
    assert (config.loss_scale, config.keep) == ("screen", "best")
    assert (config.adam_eps, config.warmup_epochs, config.epochs) == (0.01, 50, 300)


def test_corrected_ivae_has_every_gate_open():
    model, _ = build("ivae", "corrected")
    assert type(model.prior.gate) is OpenGate
    assert torch.equal(model.prior.gate(), torch.ones(4, N_LATENT))


# ---------------------------------------------------------------- ours


def test_the_encoder_sees_standardised_counts_in_our_recipes_only():
    counts = torch.poisson(torch.full((250, N_GENES), 5.0), torch.Generator().manual_seed(0))
    cells = Cells(counts, make_cells().condition)
    models = {r: recipes.build(cells, DESIGN, recipe=r)[0] for r in recipes.RECIPES}
    torch.testing.assert_close(models["smslib"].centre, (1 + counts).log().mean(0))
    torch.testing.assert_close(models["smslib"].spread, (1 + counts).log().std(0, correction=0))
    for recipe in ("paper", "corrected"):
        assert torch.equal(models[recipe].centre, torch.zeros(N_GENES))
        assert torch.equal(models[recipe].spread, torch.ones(N_GENES))


def test_steps_of_inference_are_taken_in_our_recipes_only():
    assert {name: build("vae", name)[0].newton for name in recipes.RECIPES} == {
        "paper": False,
        "corrected": False,
        "smslib": True,
        "screen": True,
    }


@pytest.mark.parametrize(
    ("n_each", "batch_size"),
    [(2, 128), (20, 128), (1792, 128), (2800, 200), (7168, 512), (10_000, 512)],
)
def test_our_training_takes_as_many_steps_whatever_the_screen(n_each, batch_size):
    n_cells, steps = 5 * n_each, recipes.RECIPES["smslib"].steps
    _, config = recipes.build(make_cells(n_each), DESIGN, method="vae", n_latent=N_LATENT)
    assert config.batch_size == batch_size
    per_epoch = max(1.0, n_cells / batch_size)
    assert steps <= config.epochs * per_epoch < steps + per_epoch
    assert 0 <= config.warmup_epochs - 0.3 * config.epochs < 1


@pytest.mark.parametrize(("n_each", "epochs"), [(2, 1680), (200, 216), (4000, 24), (20_000, 24)])
def test_a_real_screen_is_trained_for_steps_enough_and_for_epochs_enough(n_each, epochs):
    """Cells are 5 n_each: 10 in one batch; 1,000 in 7.8; 20,000 in 70; 100,000 in 195."""
    options = {"method": "vae", "n_latent": N_LATENT, "recipe": "screen"}
    assert recipes.build(make_cells(n_each), DESIGN, **options)[1].epochs == epochs


@pytest.mark.parametrize(("method", "nats"), [("svae+", 6.0), ("svae", 6.0)])
def test_on_a_real_screen_alpha_is_the_number_of_targets(method, nats):
    model, _ = build(method, "screen")
    assert len(model.prior.design.targets) == 4
    assert model.prior.gate.asked() == nats  # 2 (alpha - 1)


@pytest.mark.parametrize("recipe", ["smslib", "screen"])
@pytest.mark.parametrize("method", ["svae", "svae+", "cpa-vae", "sams-vae"])
def test_our_recipes_warm_every_penalty(method, recipe):
    assert build(method, recipe)[1].warm_penalty


def test_the_fields_that_a_recipe_does_not_decide_are_set_by_build():
    plan = recipes.RECIPES["screen"].with_train(beta=4.0, loss_scale="cell", warm_penalty=False)
    assert build("svae+", plan)[1] == build("svae+", "screen")[1]
    assert build("svae+", plan.with_train(learning_rate=0.5))[1].learning_rate == 0.5


@pytest.mark.parametrize(("epochs", "warmup"), [(1, 1), (10, 3), (7, 3), (100, 30)])
def test_epochs_of_ones_own_keep_the_warm_up_in_proportion(epochs, warmup):
    _, config = build("svae+", "smslib", epochs=epochs)
    assert (config.epochs, config.warmup_epochs, config.batch_size) == (epochs, warmup, 128)


@pytest.mark.parametrize("beta", [0.0, 8.0, 30.0])
def test_beta_is_that_of_beta_vae(beta):
    assert build("beta-vae", "smslib", beta=beta)[1].beta == beta


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"beta-vae"}))
def test_beta_of_another_method_is_refused(method):
    with pytest.raises(
        ValueError, match=rf"beta is 8.0, but '{re.escape(method)}' has none; leave"
    ):
        build(method, "smslib", beta=8.0)


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


def test_alpha_by_cells_by_hand():
    design = Design.single_target(["a", "b", "c"])
    condition = torch.tensor([1] * 10 + [2] * 40 + [3] * 100)
    cells = Cells(torch.ones(len(condition), 2), condition)
    assert recipes.alpha_by_cells(cells, design) == pytest.approx(0.45 * 40)
    assert recipes.alpha_by_cells(cells[:3], design) == 2.0


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
    with pytest.raises(
        ValueError, match=r"unknown change 'muon'; expected some of \['loss-scale', 'open-ivae'"
    ):
        build("svae+", "paper", changes=["leaky", "muon"])


def test_a_change_that_needs_another_says_so():
    with pytest.raises(ValueError, match="newton=True with norm='batch'.*norm='none'"):
        build("svae+", "paper", changes=["newton"])


def test_sparsity_of_a_method_without_gates_is_refused():
    with pytest.raises(ValueError, match="this method has no sparse gates"):
        build("ivae", "smslib", sparsity=3.0)
