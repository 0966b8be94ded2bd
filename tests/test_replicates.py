"""Fits stacked along a replicate axis against the same fits one after the other."""

from dataclasses import replace

import pytest
import torch

from smslib.data import Cells, Design
from smslib.model import SMSVAE
from smslib.replicates import fit_replicates
from smslib.train import TrainConfig, fit
from smslib.transfer import binarise

N_GENES = 7
DESIGN = Design.single_target(["a", "b", "c"])
CONFIG = TrainConfig(epochs=4, batch_size=16, warmup_epochs=2, learning_rate=1e-2)
SEEDS = (3, 4, 5)


def make_cells(n_cells=70, seed=0):
    generator = torch.Generator().manual_seed(seed)
    condition = torch.arange(n_cells) % DESIGN.n_conditions
    profile = torch.rand(DESIGN.n_conditions, N_GENES, generator=generator)
    counts = torch.poisson(20 * profile[condition] + 1, generator=generator)
    return Cells(counts.double(), condition)


CELLS, OTHERS = make_cells(), make_cells(30, seed=1)


def make_models(method="svae+", **options):
    """In double precision, in which rounding leaves nothing to argue about."""
    sizes = {"n_latent": 2, "n_hidden": 8, **options}
    models = [
        SMSVAE.preset(method, DESIGN, N_GENES, seed=seed, **sizes).double() for seed in SEEDS
    ]
    for model in models:
        model.standardise(CELLS)
    return models


def configs(**changes):
    return [replace(CONFIG, seed=seed, **changes) for seed in SEEDS]


def weights(model):
    return torch.cat([value.flatten() for value in model.state_dict().values()])


def compare(models, plans, validation=None, **options):
    """Fit both ways; return the histories of the stacked fits."""
    alone = make_models(**options)
    expected = [
        fit(model, CELLS, plan, validation=validation, progress=False)
        for model, plan in zip(alone, plans, strict=True)
    ]
    found = fit_replicates(models, CELLS, plans, validation=validation, progress=False)
    for model, other, history, course in zip(models, alone, found, expected, strict=True):
        torch.testing.assert_close(weights(model), weights(other), rtol=1e-9, atol=1e-9)
        assert history.best_epoch == course.best_epoch
        assert len(history.rows) == len(course.rows)
        for row, then in zip(history.rows, course.rows, strict=True):
            assert row.keys() == then.keys()
            assert {**row, "seconds": 0} == pytest.approx({**then, "seconds": 0}, rel=1e-9)
    return found


@pytest.mark.parametrize("method", ["vae", "ivae", "svae", "svae+", "cpa-vae", "sams-vae"])
def test_each_fit_is_its_own_sequential_fit(method):
    compare(make_models(method), configs(), method=method)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_scale": "screen", "adam_eps": 0.01, "weight_decay": 1e-4},
        {"schedule": "constant", "warm_penalty": False, "batch_size": 34},
        {"batch_size": 2, "epochs": 1, "warmup_epochs": 0},
    ],
    ids=["as released", "short tail", "small batches"],
)
def test_other_trainings_too(changes):
    compare(make_models(n_layers_decoder=3), configs(**changes), n_layers_decoder=3)


def test_weights_of_the_kl_may_differ():
    betas = (1.0, 5.0, 30.0)
    plans = [replace(plan, beta=beta) for plan, beta in zip(configs(), betas, strict=True)]
    compare(make_models(), plans)


@pytest.mark.parametrize("keep", ["best", "last"])
def test_each_stops_where_it_would_alone(keep):
    plans = configs(patience=1, keep=keep, epochs=12, learning_rate=0.3, schedule="constant")
    histories = compare(make_models(), plans, validation=OTHERS)
    assert len({len(history.rows) for history in histories}) > 1


def test_in_single_precision_the_loss_curves_agree():
    alone, stacked = ([model.float() for model in make_models()] for _ in range(2))
    cells = Cells(CELLS.counts.float(), CELLS.condition)
    found = fit_replicates(stacked, cells, configs(), progress=False)
    for model, plan, history in zip(alone, configs(), found, strict=True):
        expected = fit(model, cells, plan, progress=False)
        for row, then in zip(history.rows, expected.rows, strict=True):
            assert row["elbo"] == pytest.approx(then["elbo"], rel=1e-4)


def test_afterwards_no_model_shares_memory_with_another():
    models = make_models()
    fit_replicates(models, CELLS, configs(), progress=False)
    places = {model.log_theta.untyped_storage().data_ptr() for model in models}
    assert len(places) == len(models)
    assert models[0].log_theta.untyped_storage().nbytes() == 8 * N_GENES
    assert not any(model.training for model in models)


def test_after_an_error_too():
    models = make_models()
    cells = Cells(CELLS.counts * float("nan"), CELLS.condition)
    with pytest.raises(ValueError, match="not finite"):
        fit_replicates(models, cells, configs(), progress=False)
    with torch.no_grad():
        models[1].genes.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="reconstruction term became nan"):
        fit_replicates(models, CELLS, configs(), progress=False)
    assert models[0].log_theta.untyped_storage().nbytes() == 8 * N_GENES


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"norm": "layer"}, {}, "norm='layer' cannot be stacked; fit the models one by one"),
        ({"dropout": 0.1}, {}, "dropout=0.1 cannot"),
        ({"estimator": "sampled"}, {}, "estimator='sampled' cannot"),
        ({"newton": True}, {"optimizer": "muon"}, "newton=True, optimizer='muon' cannot"),
        ({}, {"n_draws": 5, "weighted_share": 0.3}, "n_draws=5 cannot"),
        ({}, {"max_grad_norm": 1.0}, "max_grad_norm=1.0 cannot"),
        ({}, {"patience": 3}, "patience is set but there are no validation cells"),
    ],
)
def test_what_cannot_be_stacked_is_refused(options, changes, message):
    with pytest.raises(ValueError, match=message):
        fit_replicates(make_models(**options), CELLS, configs(**changes), progress=False)


def test_models_and_configurations_have_to_be_of_one_kind():
    models = make_models()
    with pytest.raises(ValueError, match="3 models and 2 configurations"):
        fit_replicates(models, CELLS, configs()[:2])
    with pytest.raises(ValueError, match="0 models and 0 configurations"):
        fit_replicates([], CELLS, [])
    with pytest.raises(ValueError, match="models differ in more than their weights"):
        fit_replicates([*models[:2], make_models("ivae")[0]], CELLS, configs())
    with pytest.raises(ValueError, match="differ in more than seed and beta"):
        fit_replicates(models, CELLS, [*configs()[:2], replace(CONFIG, epochs=9)])
    double = replace(DESIGN, matrix=2 * DESIGN.matrix)
    dosed = SMSVAE.preset("svae+", double, N_GENES, n_latent=2, n_hidden=8).double()
    with pytest.raises(ValueError, match="differ in their prior's dose; expected the same doses"):
        fit_replicates([*models[:2], dosed], CELLS, configs())
    fixed = [binarise(m, threshold=t) for m, t in zip(models, (0.0, 0.0, 1.0), strict=True)]
    with pytest.raises(ValueError, match=r"differ in their prior's gate\.probability"):
        fit_replicates(fixed, CELLS, configs())
    with pytest.raises(ValueError, match="cells have 6 genes, the model 7"):
        fit_replicates(models, Cells(CELLS.counts[:, 1:], CELLS.condition), configs())
