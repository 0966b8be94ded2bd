"""Extreme screens and weights, some of them: the long part is `tests/torture/numerics.py`."""

import math

import pytest
import torch
from torture import numerics

from smslib import recipes


def test_losses_and_gradients_are_finite_and_single_precision_agrees_with_double():
    values, bad = numerics.judge_grid(150, seed=1)
    assert bad == []
    assert values["grid.worst_difference"] < numerics.TOLERANCE


def test_a_difference_of_precisions_would_be_seen(monkeypatch):
    """With a textbook log-pmf, which cancels where theta is large."""
    from smslib.distributions import NegativeBinomial

    def textbook(self, x):
        theta, mean = self.log_theta.exp(), self.mean
        binomial = torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
        odds = x * (self.log_mean - (theta + mean).log())
        return binomial + theta * (self.log_theta - (theta + mean).log()) + odds

    monkeypatch.setattr(NegativeBinomial, "log_prob", textbook)
    case = {name: values[0] for name, values in numerics.GRID.items()}
    assert numerics.judge(case | {"umis": 10, "n_genes": 30, "theta": 1e8}) > numerics.TOLERANCE


def test_a_mode_sharper_than_single_precision_is_met():
    """Steps clipped in some latents and solved in single precision missed it by many nats."""
    case = {"umis": 10_000_000, "theta": 1e8, "n_genes": 2, "n_latent": 4, "n_targets": 1}
    case |= {"method": "svae+", "estimator": "sampled", "newton": True, "n_draws": 3}
    assert numerics.judge(case | {"cells": "duplicated"}) < numerics.TOLERANCE


SCREENS = {name: (cells, design) for name, cells, design in numerics.screens()}
REFUSED = {"a cell without UMIs": FloatingPointError}


@pytest.mark.parametrize("name", SCREENS)
def test_rare_screens_are_fitted_or_refused(name):
    for method in ("vae", "svae+", "sams-vae"):
        if name in REFUSED:
            with pytest.raises(REFUSED[name], match="the reconstruction term became nan"):
                numerics._fitted(*SCREENS[name], method, "smslib", 2)
        else:
            assert numerics._fitted(*SCREENS[name], method, "smslib", 2)


@pytest.mark.parametrize("recipe", recipes.RECIPES)
@pytest.mark.parametrize("method", ["svae", "svae+"])
def test_a_screen_of_controls_alone_has_a_model(method, recipe):
    cells, design = SCREENS["control only"]
    model, _ = recipes.build(cells, design, method=method, recipe=recipe, sparsity=2.0)
    assert model.prior.probabilities().shape == (0, 15)


def test_ten_thousand_conditions_are_no_matter():
    told = numerics.judge_many_conditions(10_000)
    assert told == {"many.conditions": 10_000, "many.finite": True}


def test_the_draws_are_the_same_in_both_precisions():
    like = [torch.zeros(3, dtype=kind) for kind in (torch.float32, torch.float64)]
    drawn = []
    for each in like:
        with numerics.same_draws(0):
            drawn.append(torch.randn_like(each))
    assert drawn[0].dtype == torch.float32
    assert math.isclose(float(drawn[0][0]), float(drawn[1][0]), rel_tol=1e-6)
