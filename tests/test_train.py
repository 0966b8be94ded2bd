"""Fitting: what it restores, when it stops, what it refuses, and that a seed decides it all."""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import jaxtyping
import numpy as np
import pytest
import torch

from smslib import train
from smslib.data import Cells, Design, seeded
from smslib.evaluate import elbo
from smslib.model import SMSVAE, Terms
from smslib.train import TrainConfig, fit, objective

N_GENES = 6
DESIGN = Design.single_target(["a", "b", "c"])
QUICK = TrainConfig(epochs=4, batch_size=16, warmup_epochs=0)


def make_cells(n_cells=64, *, seed=0, design=DESIGN):
    """Counts whose profile depends on the condition."""
    generator = torch.Generator().manual_seed(seed)
    condition = torch.arange(n_cells) % design.n_conditions
    profile = torch.rand(design.n_conditions, N_GENES, generator=torch.Generator().manual_seed(9))
    return Cells(torch.poisson(20 * profile[condition] + 1, generator=generator), condition)


CELLS, OTHERS = make_cells(), make_cells(32, seed=1)


def make_model(method="svae+", **options):
    return SMSVAE.preset(method, DESIGN, N_GENES, **{"n_latent": 2, "n_hidden": 8, **options})


def trained(config=QUICK, *, model=None, cells=CELLS, validation=None):
    model = model or make_model()
    history = fit(model, cells, config, validation=validation, progress=False)
    return model, history


def weights(model):
    return torch.cat([value.flatten() for value in model.state_dict().values()])


# -------------------------------------------------------------------------------- objective


def test_objective_is_the_negative_elbo_per_cell():
    terms = Terms(torch.tensor([-3.0, -5.0]), torch.tensor([1.0, 2.0]), torch.tensor(8.0))
    assert objective(terms, n_cells=4).item() == 4.0 + 1.5 + 2.0
    weighted = objective(terms, n_cells=4, kl_weight=2.0, penalty_weight=0.5)
    assert weighted.item() == 4.0 + 3.0 + 1.0


def test_twice_the_cells_halve_the_weight_of_the_penalty():
    terms = Terms(torch.zeros(2), torch.zeros(2), torch.tensor(8.0))
    once, twice = (objective(terms, n_cells=n) for n in (10, 20))
    assert once == 2 * twice


# -------------------------------------------------------------------------------- the seed


def test_the_same_seed_gives_the_same_bits():
    (first, one), (second, two) = (trained(validation=OTHERS) for _ in range(2))
    assert torch.equal(weights(first), weights(second))
    columns = ["elbo", "validation_elbo"]
    assert one.frame()[columns].equals(two.frame()[columns])


def test_on_a_cpu_deterministic_algorithms_change_no_bit():
    """They are on already: the option costs nothing there, and no operation lacks one."""
    config = replace(QUICK, optimizer="muon", encoder_share=0.5, n_draws=3, weighted_share=0.3)
    usual, _ = trained(config, model=make_model(newton=True))
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        forced, _ = trained(config, model=make_model(newton=True))
    finally:
        torch.use_deterministic_algorithms(before)
    assert torch.equal(weights(usual), weights(forced))


def test_another_seed_gives_other_weights():
    first, _ = trained()
    second, _ = trained(replace(QUICK, seed=1))
    assert not torch.equal(weights(first), weights(second))


def test_the_seed_is_that_of_the_draws_too():
    """Among copies of one cell, in one batch, order is no matter."""
    copies = CELLS[torch.zeros(64, dtype=torch.long)]
    whole = replace(QUICK, batch_size=64, epochs=1)
    first, second = (
        trained(replace(whole, seed=seed), cells=copies)[1].rows[0]["reconstruction"]
        for seed in (0, 1)
    )
    assert first != second


def test_validation_does_not_change_the_fit():
    alone, _ = trained(replace(QUICK, keep="last"))
    watched, _ = trained(replace(QUICK, keep="last"), validation=OTHERS)
    assert torch.equal(weights(alone), weights(watched))


def test_the_global_random_state_is_left_alone():
    before = torch.random.get_rng_state()
    trained(validation=OTHERS)
    assert torch.equal(before, torch.random.get_rng_state())


def test_cells_are_left_alone():
    cells = make_cells()
    before = copy.deepcopy(cells.counts)
    trained(cells=cells)
    assert torch.equal(cells.counts, before)


# ------------------------------------------------------------------------------- the result


@pytest.mark.parametrize(
    ("newton", "changes", "least"),  # the steps leave less to gain
    [(False, {}, 1.0), (True, {"optimizer": "muon", "encoder_share": 0.5}, 0.3)],
    ids=["adam", "newton and muon"],
)
def test_fitting_raises_the_elbo(newton, changes, least):
    model = make_model(newton=newton)
    before = elbo(model, OTHERS).mean()
    config = replace(QUICK, epochs=20, **changes)
    _, history = trained(config, model=model, validation=OTHERS)
    assert elbo(model, OTHERS).mean() > before + least
    assert not model.training
    assert history.best_epoch is not None


def test_history_has_a_row_per_epoch_and_adds_up():
    _, history = trained(validation=OTHERS)
    frame = history.frame()
    assert frame.index.tolist() == [0, 1, 2, 3]
    assert frame.index.name == "epoch"
    assert (frame["seconds"] > 0).all()
    for part in ("", "validation_"):
        terms = frame[part + "reconstruction"] - frame[part + "kl"]
        penalty = 0 if part else frame["penalty"]
        assert (frame[part + "elbo"] - (terms - penalty)).abs().max() < 1e-9


def test_a_history_without_epochs_is_an_empty_frame():
    frame = train.History().frame()
    assert frame.empty
    assert frame.index.name == "epoch"


def test_history_of_nothing_but_training():
    _, history = trained()
    assert list(history.frame()) == ["reconstruction", "kl", "penalty", "elbo", "seconds"]
    assert history.best_epoch is None


# Six cells and a learning rate that makes the validation ELBO jump up and down.
UNSTEADY = replace(QUICK, epochs=25, learning_rate=0.1, schedule="constant")


def unsteady(**changes):
    return trained(
        replace(UNSTEADY, **changes),
        model=make_model(n_hidden=32),
        cells=make_cells(6),
        validation=OTHERS,
    )


def test_the_best_weights_are_restored():
    model, history = unsteady()
    frame = history.frame()
    assert history.best_epoch == frame["validation_elbo"].idxmax() < 24
    best = frame["validation_elbo"].max()
    assert elbo(model, OTHERS, seed=UNSTEADY.seed).mean() == pytest.approx(best, rel=1e-5)


def test_the_last_weights_are_kept_on_request():
    model, history = unsteady(keep="last")
    last = history.frame()["validation_elbo"].iloc[-1]
    assert elbo(model, OTHERS, seed=UNSTEADY.seed).mean() == pytest.approx(last, rel=1e-5)
    assert last < history.frame()["validation_elbo"].max()


def test_patience_ends_the_fit():
    full = unsteady()[1].frame()["validation_elbo"]
    history = unsteady(patience=3)[1]
    stopped = history.frame()["validation_elbo"]
    assert len(stopped) == history.best_epoch + 3 + 1 < len(full)
    assert stopped.tolist() == full[: len(stopped)].tolist()
    assert stopped.idxmax() == history.best_epoch


# ----------------------------------------------------------------------- schedules, weights


def recorded(monkeypatch, name):
    """Call through to a function of smslib.train; return the list of what it was given."""
    calls, original = [], getattr(train, name)

    def spy(*args, **kwargs):
        result = original(*args, **kwargs)
        calls.append((args, kwargs))
        return result

    monkeypatch.setattr(train, name, spy)
    return calls


def test_the_kl_warms_up_and_so_does_the_penalty(monkeypatch):
    calls = recorded(monkeypatch, "objective")
    trained(replace(QUICK, epochs=6, warmup_epochs=4, beta=3.0, batch_size=64))
    assert [k["kl_weight"] for _, k in calls] == [0, 0.75, 1.5, 2.25, 3, 3]
    assert [k["penalty_weight"] for _, k in calls] == [0, 0.25, 0.5, 0.75, 1, 1]


def test_the_penalty_can_be_at_full_weight_from_the_start(monkeypatch):
    calls = recorded(monkeypatch, "objective")
    trained(replace(QUICK, warmup_epochs=4, warm_penalty=False, batch_size=64))
    assert {k["penalty_weight"] for _, k in calls} == {1.0}
    assert {k["n_cells"] for _, k in calls} == {64}


def rates(monkeypatch, schedule, *, optimizer="adam"):
    """Return the rate of every step of Adam, or of the optimizer named."""
    seen, name = [], optimizer.capitalize()

    class Spy(getattr(torch.optim, name)):
        def step(self, *args, **kwargs):
            seen.append(self.param_groups[0]["lr"])
            return super().step(*args, **kwargs)

    monkeypatch.setattr(torch.optim, name, Spy)
    trained(
        replace(
            QUICK,
            schedule=schedule,
            learning_rate=0.01,
            muon_learning_rate=0.04,
            optimizer=optimizer,
        )
    )
    return seen


def test_cosine_schedule_falls_from_the_learning_rate_to_nothing(monkeypatch):
    seen = rates(monkeypatch, "cosine")
    expected = [0.005 * (1 + math.cos(math.pi * step / 16)) for step in range(16)]
    assert seen == pytest.approx(expected)
    assert seen[0] == 0.01
    assert seen[-1] < 0.01 * 0.01


def test_muon_follows_the_same_cosine_from_its_own_rate(monkeypatch):
    seen = rates(monkeypatch, "cosine", optimizer="muon")
    expected = [0.02 * (1 + math.cos(math.pi * step / 16)) for step in range(16)]
    assert seen == pytest.approx(expected)


def test_beside_muon_adam_keeps_its_rate(monkeypatch):
    seen = []
    original = torch.optim.Adam.step

    def step(self, *args, **kwargs):
        seen.append(self.param_groups[0]["lr"])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    trained(replace(QUICK, optimizer="muon", learning_rate=0.01))
    expected = [0.005 * (1 + math.cos(math.pi * step / 16)) for step in range(16)]
    assert seen == pytest.approx(expected)


@pytest.mark.parametrize(("optimizer", "rate"), [("adam", 0.01), ("muon", 0.04)])
def test_constant_schedule_is_constant(monkeypatch, optimizer, rate):
    assert set(rates(monkeypatch, "constant", optimizer=optimizer)) == {rate}


def test_adam_does_not_see_the_scale_of_the_loss_unless_eps_is_large():
    tiny = replace(QUICK, adam_eps=1e-15)
    per_cell, screen = (trained(replace(tiny, loss_scale=s))[0] for s in ("cell", "screen"))
    torch.testing.assert_close(weights(per_cell), weights(screen), rtol=1e-3, atol=1e-4)
    released = replace(QUICK, adam_eps=0.01)
    per_cell, screen = (trained(replace(released, loss_scale=s))[0] for s in ("cell", "screen"))
    assert not torch.allclose(weights(per_cell), weights(screen), rtol=1e-3, atol=1e-4)


# --------------------------------------------------------------------------------- optimisers


def whole_batch(config):
    """One epoch of one step on all the cells."""
    return replace(config, epochs=1, batch_size=len(CELLS), keep="last")


def stepped_by_hand(model, config):
    """Return the parameters after one step of torch's optimisers, the matrices by Muon."""
    model = copy.deepcopy(model)
    order = torch.randperm(len(CELLS), generator=torch.Generator().manual_seed(config.seed))
    with seeded(config.seed):
        terms = model(CELLS[order])
    elbo = (terms.reconstruction - terms.kl).mean() - terms.penalty / len(CELLS)
    (-elbo).backward()
    matrices = [p for name, p in model.named_parameters() if name.endswith(".weight")]
    rest = [p for name, p in model.named_parameters() if not name.endswith(".weight")]
    decay = config.weight_decay
    torch.optim.Adam(rest, lr=config.learning_rate, weight_decay=decay).step()
    rate, decay = config.muon_learning_rate, config.muon_weight_decay
    torch.optim.Muon(matrices, lr=rate, weight_decay=decay).step()
    return dict(model.named_parameters())


@pytest.mark.parametrize(
    "decay",
    [{}, {"weight_decay": 0.1}, {"muon_weight_decay": 0.5}],
    ids=["no decay", "of adam", "of muon"],
)
def test_muon_moves_the_matrices_and_adam_everything_else(decay):
    config = replace(whole_batch(QUICK), optimizer="muon", **decay)
    model = make_model()
    expected = stepped_by_hand(model, config)
    before = copy.deepcopy(dict(model.named_parameters()))
    trained(config, model=model)
    for name, value in model.named_parameters():
        assert not torch.equal(value, before[name]), name
        torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-5, msg=name)


def test_a_matrix_moves_along_its_leading_singular_vectors_alike():
    """Muon brings the singular values of a gradient to about one (Jordan et al. 2024)."""
    config = replace(whole_batch(QUICK), optimizer="muon", muon_learning_rate=0.05)
    model = make_model()
    before = model.genes.weight.detach().clone()
    trained(config, model=model)
    values = torch.linalg.svdvals((model.genes.weight.detach() - before) / 0.05)
    assert values[3] > 0.5
    assert values[0] < 1.3


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_what_is_frozen_is_left_alone(optimizer, weight_decay):
    model = make_model()
    model.requires_grad_(False)
    model.prior.slab.mean.requires_grad_(True)
    model.encoder[0].weight.requires_grad_(True)
    before = copy.deepcopy(dict(model.named_parameters()))
    decay = {"weight_decay": weight_decay, "muon_weight_decay": weight_decay}
    config = replace(QUICK, optimizer=optimizer, keep="last", **decay)
    trained(config, model=model)
    moved = {name for name, value in model.named_parameters() if not value.equal(before[name])}
    assert moved == {"prior.slab.mean", "encoder.0.weight"}


def test_muon_without_a_matrix_to_move_is_adam():
    """As in the adaptation of a model to new perturbations by gradients."""
    moved = []
    for optimizer in ("adam", "muon"):
        model = make_model()
        model.requires_grad_(False)
        model.prior.slab.mean.requires_grad_(True)
        trained(replace(QUICK, optimizer=optimizer), model=model)
        moved.append(weights(model))
    assert torch.equal(*moved)


# ------------------------------------------------------------------ the encoder's share of it


def inference_by_epoch(monkeypatch, *, newton=True, **changes):
    """Return whether the model took steps, epoch by epoch, in training and in validation."""
    seen = {"_epoch": [], "_validate": []}

    def watched(name):
        original = getattr(train, name)

        def spy(model, *args):
            seen[name].append(model.newton)
            return original(model, *args)

        return spy

    for name in seen:
        monkeypatch.setattr(train, name, watched(name))
    model = make_model(newton=newton)
    trained(replace(QUICK, **changes), model=model, validation=OTHERS)
    assert model.newton == newton
    assert seen["_epoch"] == seen["_validate"]
    return seen["_epoch"]


@pytest.mark.parametrize(
    ("share", "epochs", "without"),
    [(0.0, 4, 0), (0.5, 4, 2), (0.5, 5, 3), (0.1, 4, 1), (1.0, 4, 3), (0.5, 1, 0)],
)
def test_the_steps_begin_after_the_encoders_share(monkeypatch, share, epochs, without):
    seen = inference_by_epoch(monkeypatch, encoder_share=share, epochs=epochs)
    assert seen == [False] * without + [True] * (epochs - without)


def test_a_model_without_steps_never_takes_any(monkeypatch):
    assert inference_by_epoch(monkeypatch, newton=False, encoder_share=0.5) == [False] * 4


@pytest.mark.parametrize("error", [FloatingPointError, KeyboardInterrupt])
def test_the_steps_come_back_after_a_fit_that_broke(monkeypatch, error):
    def broken(*_):
        raise error

    monkeypatch.setattr(train, "_epoch", broken)
    model = make_model(newton=True)
    with pytest.raises(error):
        trained(replace(QUICK, encoder_share=0.5), model=model)
    assert model.newton


def falling_elbo(monkeypatch):
    """Let every epoch be worse than the one before."""
    validation_elbo = iter(range(0, -100, -1))
    monkeypatch.setattr(
        train, "_validate", lambda *_: {"validation_elbo": float(next(validation_elbo))}
    )


def test_the_best_weights_are_sought_among_those_that_were_judged_with_steps(monkeypatch):
    falling_elbo(monkeypatch)
    config = replace(QUICK, epochs=6, encoder_share=0.5)
    kept, history = trained(config, model=make_model(newton=True), validation=OTHERS)
    assert history.best_epoch == 3
    last = replace(config, keep="last")
    falling_elbo(monkeypatch)
    other, history = trained(last, model=make_model(newton=True), validation=OTHERS)
    assert history.best_epoch == 3
    assert not torch.equal(weights(kept), weights(other))


def test_patience_begins_with_the_steps(monkeypatch):
    falling_elbo(monkeypatch)
    config = replace(QUICK, epochs=8, encoder_share=0.5, patience=2)
    _, history = trained(config, model=make_model(newton=True), validation=OTHERS)
    assert len(history.rows) == 4 + 1 + 2


# ------------------------------------------------------------------------- the weighted bound


def draws_by_epoch(monkeypatch, **changes):
    """Return the draws of every call of the model: an epoch is one training batch, then others."""
    seen, original = [], SMSVAE.forward

    def spy(self, cells, *, n_draws=1):
        seen.append((self.training, n_draws))
        return original(self, cells, n_draws=n_draws)

    monkeypatch.setattr(SMSVAE, "forward", spy)
    trained(replace(QUICK, batch_size=64, **changes), validation=OTHERS)
    in_training = [n for training, n in seen if training]
    assert in_training == [n for training, n in seen if not training]
    return in_training


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.1, [1] * 4), (0.25, [1, 1, 1, 3]), (0.3, [1, 1, 1, 3]), (1.0, [3] * 4)],
)
def test_the_last_epochs_take_more_draws(monkeypatch, share, expected):
    assert draws_by_epoch(monkeypatch, n_draws=3, weighted_share=share) == expected


def test_the_best_weights_are_sought_among_those_judged_by_the_last_bound(monkeypatch):
    falling_elbo(monkeypatch)
    config = replace(QUICK, epochs=10, n_draws=3, weighted_share=0.4)
    assert trained(config, validation=OTHERS)[1].best_epoch == 6
    # A share that no epoch is part of changes nothing.
    falling_elbo(monkeypatch)
    config = replace(config, weighted_share=0.05)
    assert trained(config, validation=OTHERS)[1].best_epoch == 0


def test_the_history_of_the_last_epochs_holds_the_weighted_bound():
    """It is closer to the evidence than the ELBO of the same weights."""
    config = replace(QUICK, n_draws=50, weighted_share=0.25)
    model, history = trained(config, validation=OTHERS)
    assert history.best_epoch == 3
    assert history.rows[3]["validation_elbo"] > elbo(model, OTHERS).mean() + 0.1


def test_a_gradient_clipped_to_nothing_moves_nothing():
    model = make_model()
    before = weights(model).clone()
    trained(replace(QUICK, max_grad_norm=0.0), model=model)
    assert torch.equal(weights(model), before)


def test_a_trailing_batch_too_small_for_batch_norm_is_left_out():
    _, history = trained(model=make_model(norm="batch"), cells=make_cells(33))
    assert len(history.rows) == 4


@pytest.mark.parametrize("batch_size", [1, 2])
def test_batches_may_be_smaller_than_what_is_left_out_of_larger_ones(batch_size):
    config = replace(QUICK, epochs=1, batch_size=batch_size)
    _, history = trained(config, cells=make_cells(4))
    assert math.isfinite(history.rows[0]["elbo"])


def test_numbers_of_numpy_are_plain_numbers(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside the tests
    config = replace(QUICK, seed=np.int64(3), learning_rate=np.float32(0.25))
    assert config == replace(QUICK, seed=3, learning_rate=0.25)
    assert (type(config.seed), type(config.learning_rate)) == (int, float)
    trained(replace(config, epochs=np.int64(1)))


def given_to_the_group(monkeypatch, model, cells, validation=None):
    """Return what a process of a group compares with the others before it fits."""
    told = []

    def stop(_model, given, _group):
        told.append(given)
        raise InterruptedError

    monkeypatch.setattr(train.parallel, "check", stop)
    group = SimpleNamespace(rank=lambda: 0, size=lambda: 2)
    with pytest.raises(InterruptedError):
        fit(model, cells, QUICK, validation=validation, group=group, progress=False)
    return told[0]


def test_processes_compare_weights_buffers_settings_and_cells(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # for the stand-in of a group
    moved = make_model()
    moved.centre.add_(1.0)
    kinds = {
        "the same": (make_model(), CELLS, OTHERS),
        "alpha": (make_model(sparsity=50.0), CELLS, OTHERS),
        "centre": (moved, CELLS, OTHERS),
        "cells": (make_model(), make_cells(seed=5), OTHERS),
        "validation": (make_model(), CELLS, make_cells(32, seed=5)),
    }
    given = {name: given_to_the_group(monkeypatch, *kind) for name, kind in kinds.items()}
    assert given["the same"] == given_to_the_group(monkeypatch, make_model(), CELLS, OTHERS)
    assert len(set(given.values())) == len(kinds)


def test_no_bar_where_nobody_watches(capfd):
    fit(make_model(), CELLS, replace(QUICK, epochs=1), progress=False)
    assert capfd.readouterr() == ("", "")


# ----------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"optimizer": "sgd"}, r"optimizer is 'sgd'; expected one of \('adam', 'muon'\)"),
        ({"schedule": "linear"}, r"schedule is 'linear'; expected one of \('cosine', 'constant'"),
        ({"loss_scale": "batch"}, r"loss_scale is 'batch'; expected one of \('cell', 'screen'"),
        ({"keep": "first"}, r"keep is 'first'; expected one of \('best', 'last'"),
        ({"encoder_share": 1.5}, "encoder_share is 1.5; expected a share of the epochs, 0 to 1"),
        ({"encoder_share": -0.1}, "encoder_share is -0.1; expected a share"),
        ({"weighted_share": 2.0}, "weighted_share is 2.0; expected a share of the epochs"),
        ({"n_draws": 0}, "n_draws is 0; expected at least 1"),
        ({"n_draws": 5}, "n_draws is 5, but weighted_share is 0 .* or n_draws=1"),
        ({"epochs": 0}, "epochs is 0; expected at least 1"),
        ({"epochs": -3}, "epochs is -3; expected at least 1"),
        ({"batch_size": 0}, "batch_size is 0; expected at least 1"),
        ({"warmup_epochs": -1}, "warmup_epochs is -1; expected at least 0"),
        ({"beta": -1.0}, r"beta is -1\.0; expected at least 0"),
        ({"beta": math.nan}, "beta is nan; expected at least 0"),
        ({"patience": 0}, "patience is 0; expected at least 1"),
    ],
    ids=str,
)
def test_unknown_choices_are_refused_before_any_fit(option, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside the tests
    with pytest.raises(ValueError, match=message):
        TrainConfig(**option)
    with pytest.raises(ValueError, match=message):
        replace(QUICK, **option)


def test_counts_that_are_not_finite_are_refused():
    counts = CELLS.counts.clone()
    counts[3, 2] = math.nan
    with pytest.raises(ValueError, match="cells have counts that are not finite; read them with"):
        trained(cells=Cells(counts, CELLS.condition))


def test_cells_elsewhere_are_refused():
    with pytest.raises(ValueError, match="cells are on meta, the model on cpu; move one with"):
        trained(cells=CELLS.to("meta"))


def test_cells_with_other_genes_are_refused():
    wide = Cells(torch.ones(5, N_GENES + 1), torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match="validation have 7 genes, the model 6"):
        trained(validation=wide)


def test_no_cells_are_refused():
    with pytest.raises(ValueError, match="cells are empty; expected at least one cell"):
        trained(cells=CELLS[:0])


@pytest.mark.parametrize("row", [4, -1])
def test_conditions_outside_the_design_are_refused(row):
    strange = Cells(CELLS.counts, torch.full((64,), row))
    with pytest.raises(
        ValueError, match=r"design has 4; build the model with the design of these"
    ):
        trained(cells=strange)


def test_patience_without_validation_is_refused():
    with pytest.raises(ValueError, match="patience is set but there are no validation cells"):
        trained(replace(QUICK, patience=3))


@pytest.mark.parametrize(
    ("parameter", "term"),
    [("log_theta", "reconstruction"), ("prior.slab.mean", "kl"), ("prior.gate.logit", "kl")],
)
def test_the_first_term_that_breaks_is_named(parameter, term):
    model = make_model()
    with torch.no_grad():
        model.get_parameter(parameter)[-1] = math.nan
    with pytest.raises(FloatingPointError, match=f"the {term} term became nan in epoch 0, step 0"):
        trained(model=model)


def test_a_penalty_that_breaks_is_named():
    model = make_model("svae", sparsity=math.inf)
    with pytest.raises(FloatingPointError, match="the penalty term became inf.*learning_rate"):
        trained(model=model)
