"""What every method promises, whatever its slab and gate: one test for each row of METHODS.

With and without Gauss-Newton steps of inference, where these could make a difference.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch

from smslib.data import Cells, Design, seeded
from smslib.evaluate import elbo, iwelbo
from smslib.model import SMSVAE
from smslib.priors import GATES, METHODS, SLABS
from smslib.train import TrainConfig, fit

N_GENES, N_LATENT = 5, 2
DESIGN = Design(
    ("control", "a", "b", "c", "a+c"),
    ("a", "b", "c"),
    torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 1]]),
)
QUICK = TrainConfig(epochs=3, batch_size=16, warmup_epochs=0)
SHIFTED = sorted(set(METHODS) - {"vae", "beta-vae"})

every_method = pytest.mark.parametrize("method", sorted(METHODS))
every_estimator = pytest.mark.parametrize("estimator", ["expected", "sampled"])
either_inference = pytest.mark.parametrize("newton", [False, True], ids=["encoder", "newton"])


def make_model(method, *, design=DESIGN, seed=0, **options):
    options = {"n_latent": N_LATENT, "n_hidden": 8, "seed": seed, **options}
    return SMSVAE.preset(method, design, N_GENES, **options)


def make_cells(n_cells=40):
    counts = torch.poisson(torch.full((n_cells, N_GENES), 6.0), torch.Generator().manual_seed(0))
    return Cells(counts, torch.arange(n_cells) % DESIGN.n_conditions)


def networks(model):
    """Everything but the prior, by name."""
    return {
        name: value for name, value in model.state_dict().items() if not name.startswith("prior.")
    }


def fitted(model, cells, **changes):
    fit(model, cells, replace(QUICK, **changes), progress=False)
    return model


@every_method
@every_estimator
@either_inference
@pytest.mark.parametrize("n_draws", [1, 3])
def test_the_gradient_reaches_every_parameter(method, estimator, newton, n_draws):
    model = make_model(method, estimator=estimator, newton=newton)
    with seeded(0):
        terms = model(make_cells(), n_draws=n_draws)
    (terms.kl.sum() - terms.reconstruction.sum() + terms.penalty).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@every_method
@every_estimator
@either_inference
def test_terms_have_their_shapes_and_signs(method, estimator, newton):
    terms = make_model(method, estimator=estimator, newton=newton)(make_cells())
    assert terms.reconstruction.shape == terms.kl.shape == (40,)
    assert terms.penalty.shape == ()
    assert terms.penalty.isfinite()
    assert (terms.kl >= 0).all()
    assert (terms.reconstruction <= 0).all()


@every_method
@pytest.mark.parametrize("options", [{"norm": "batch", "dropout": 0.2}, {"newton": True}], ids=str)
def test_a_cell_is_judged_without_its_batch_mates(method, options):
    model, cells = make_model(method, **options), make_cells()
    together = iwelbo(model, cells, n_draws=20)
    alone = iwelbo(model, cells[:1], n_draws=20)
    assert alone[0] == pytest.approx(together[0], rel=1e-4)


@every_method
@every_estimator
@either_inference
def test_saving_and_loading_changes_nothing(method, estimator, newton, tmp_path):
    model = fitted(make_model(method, estimator=estimator, newton=newton), make_cells())
    model.save(tmp_path)
    loaded = SMSVAE.load(tmp_path)
    assert (elbo(loaded, make_cells()) == elbo(model, make_cells())).all()
    assert loaded.prior.penalty() == model.prior.penalty()


@every_method
@either_inference
def test_a_model_in_double_precision_takes_counts_in_single(method, newton, tmp_path):
    model, cells = make_model(method, newton=newton).double(), make_cells()
    cells.counts[0, 0] = 40.0  # few are large: both forms of the likelihood
    fitted(model, cells)
    model.save(tmp_path)
    loaded, wide = SMSVAE.load(tmp_path), Cells(cells.counts.double(), cells.condition)
    for score in (elbo, partial(iwelbo, n_draws=5)):
        assert score(model, cells) == pytest.approx(score(loaded, wide), rel=1e-6)
    assert {part.dtype for part in loaded.tensors().values()} == {torch.float64}


@every_method
def test_the_representation_names_slab_and_gate(method):
    model = make_model(method)
    for part in (model.prior.slab, model.prior.gate):
        assert type(part).__name__ in repr(model)
        assert type(part).__name__ in {**SLABS, **GATES}


@every_method
@pytest.mark.parametrize("optimizer", ["adam", "muon"])
@either_inference
def test_one_seed_one_fit(method, optimizer, newton):
    first, second = (
        fitted(make_model(method, newton=newton), make_cells(), optimizer=optimizer)
        for _ in range(2)
    )
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


@pytest.mark.parametrize("method", SHIFTED)
@either_inference
def test_without_doses_the_networks_are_those_of_the_vae(method, newton):
    """If nothing was done to any cell, methods must not differ in anything but their prior."""
    idle = Design(DESIGN.conditions, DESIGN.targets, torch.zeros_like(DESIGN.matrix))
    vae, model = (make_model(m, design=idle, newton=newton) for m in ("vae", method))
    model.load_state_dict(networks(vae), strict=False)
    expected = networks(fitted(vae, make_cells()))
    for name, value in networks(fitted(model, make_cells())).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)


@every_method
@every_estimator
def test_the_encoder_never_learns_the_condition(method, estimator):
    """What a step adds to its guess is all that a relabelled cell may change."""
    model = fitted(make_model(method, estimator=estimator, newton=True), make_cells())
    cells = make_cells()
    moved = Cells(cells.counts, (cells.condition + 1) % DESIGN.n_conditions)
    q, other = model.infer(cells), model.infer(moved)
    assert torch.equal(q.variance, other.variance)
    assert torch.equal(q.mean, other.mean) == (method not in SHIFTED)


@pytest.mark.parametrize("method", SHIFTED)
def test_with_doses_they_are_not(method):
    vae, model = make_model("vae"), make_model(method)
    model.load_state_dict(networks(vae), strict=False)
    with torch.no_grad():
        model.prior.slab.mean.fill_(3.0)
    expected = networks(fitted(vae, make_cells()))
    actual = networks(fitted(model, make_cells()))
    assert any(
        not torch.allclose(value, expected[name], atol=1e-3) for name, value in actual.items()
    )


@every_method
@either_inference
def test_names_of_conditions_and_targets_do_not_matter(method, newton):
    """Conditions and targets in another order: the same fit, in that order."""
    rows, columns = torch.tensor([0, 3, 4, 1, 2]), torch.tensor([2, 0, 1])
    design = Design(
        tuple(DESIGN.conditions[row] for row in rows),
        tuple(DESIGN.targets[column] for column in columns),
        DESIGN.matrix[rows][:, columns],
    )
    cells = make_cells()
    moved = Cells(cells.counts, torch.argsort(rows)[cells.condition])
    model, other = (make_model(method, design=d, newton=newton) for d in (DESIGN, design))
    per_target = {"prior.slab.mean", "prior.slab.zero", "prior.gate.logit"}
    per_target |= {"prior.slab.log_variance", "prior.gate.probability"}
    state = model.state_dict()
    other.load_state_dict(
        {name: value[columns] if name in per_target else value for name, value in state.items()}
    )
    fitted(model, cells)
    fitted(other, moved)
    for name, value in model.state_dict().items():
        expected = value[columns] if name in per_target else value
        torch.testing.assert_close(other.state_dict()[name], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other.prior.mode(), model.prior.mode()[rows], rtol=1e-5, atol=1e-5)
