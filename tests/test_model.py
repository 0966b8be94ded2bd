"""The model: its terms against torch.distributions, its fast path against its plain one."""

import inspect
import json
import math

import jaxtyping
import pytest
import torch
from torch.distributions import NegativeBinomial, Normal, kl_divergence
from torch.func import functional_call

from smslib.data import Cells, Design, seeded
from smslib.model import SMSVAE
from smslib.priors import BetaGate, FixedGate, LogitGate, PointSlab, ShiftPrior

N_GENES, N_LATENT = 6, 3
DESIGN = Design(
    ("control", "a", "b", "a+b"),
    ("a", "b"),
    torch.tensor([[0.0, 0.0], [1, 0], [0, 1], [1, 1]]),
)


def make_model(method="svae+", *, dtype=torch.float32, **options):
    options = {"n_latent": N_LATENT, "n_hidden": 8, **options}
    return SMSVAE.preset(method, DESIGN, N_GENES, **options).to(dtype)


def make_cells(n_cells=12, *, dtype=torch.float32, depth=9.0, n_genes=N_GENES):
    generator = torch.Generator().manual_seed(1)
    counts = torch.poisson(torch.full((n_cells, n_genes), depth), generator=generator)
    return Cells(counts.to(dtype), torch.arange(n_cells) % 4)


# ------------------------------------------------------------------------------------ parts


def test_nothing_but_the_prior_sees_the_condition():
    assert list(inspect.signature(SMSVAE.decode).parameters) == ["self", "z", "library"]
    assert list(inspect.signature(SMSVAE.encode).parameters) == ["self", "counts"]


def test_encoder_gives_a_mean_and_a_variance_that_stays_away_from_zero():
    model = make_model()
    with torch.no_grad():
        model.posterior.bias[N_LATENT:] = -60.0
    q = model.encode(make_cells().counts)
    assert q.mean.shape == q.variance.shape == (12, N_LATENT)
    torch.testing.assert_close(q.variance, torch.full_like(q.variance, 1e-4))


def test_decoder_shares_the_library_among_the_genes():
    cells, z = make_cells(), torch.randn(5, 12, N_LATENT, generator=torch.Generator())
    mean = make_model().decode(z, cells.library).mean
    torch.testing.assert_close(mean.sum(-1), cells.library.squeeze(-1).expand(5, 12))


def test_terms_are_those_of_torchs_distributions():
    model, cells = make_model(dtype=torch.float64), make_cells(dtype=torch.float64)
    with seeded(3):
        terms = model(cells)
    with seeded(3):
        q = model.encode(cells.counts)
        z = q.mean + q.variance.sqrt() * torch.randn_like(q.mean)
    rate = cells.library * model.genes(model.decoder(z)).softmax(-1)
    nb = NegativeBinomial(model.log_theta.exp(), logits=rate.log() - model.log_theta)
    torch.testing.assert_close(terms.reconstruction, nb.log_prob(cells.counts).sum(-1))
    # Enumerate the gates of the one or two targets of each condition.
    pi, slab = model.prior.gate(), model.prior.slab()
    expected = torch.zeros(len(cells), N_LATENT, dtype=torch.float64)
    for a, b in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        weight = (pi[0] if a else 1 - pi[0]) * (pi[1] if b else 1 - pi[1])
        shift = DESIGN.matrix.double() @ (torch.tensor([[a], [b]]) * slab)
        kl = kl_divergence(Normal(q.mean, q.variance.sqrt()), Normal(shift[cells.condition], 1.0))
        expected += weight * kl
    torch.testing.assert_close(terms.kl, expected.sum(-1))
    torch.testing.assert_close(terms.penalty, model.prior.gate.penalty())


def test_gradient_of_every_parameter_is_that_of_finite_differences():
    model = make_model(dtype=torch.float64, n_hidden=3, n_layers=1, n_latent=2)
    cells = make_cells(4, dtype=torch.float64)
    names, values = zip(*model.named_parameters(), strict=True)

    def elbo(*values):
        with seeded(0):
            terms = functional_call(model, dict(zip(names, values, strict=True)), (cells,))
        return terms.reconstruction.sum() - terms.kl.sum() - terms.penalty

    assert torch.autograd.gradcheck(elbo, [v.detach().requires_grad_() for v in values])


def test_the_sampled_estimator_charges_the_exact_kl_on_average():
    model, cells = make_model(estimator="sampled"), make_cells(4)
    with torch.no_grad():
        model.prior.gate.logit.copy_(torch.tensor([[0.5, -1.0, 0.0], [2.0, 0.3, -0.7]]))
        many = Cells(cells.counts.repeat(5000, 1), cells.condition.repeat(5000))
        with seeded(0):
            drawn = model(many).kl.reshape(5000, 4)
        model.estimator = "expected"
        exact = model(cells).kl
    error = drawn.std(0) / 5000**0.5
    assert ((drawn.mean(0) - exact).abs() <= 4 * error + 1e-4).all()


# -------------------------------------------------------------------------------- fast path


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": "batch", "dropout": 0.3, "activation": "relu"},
        {"norm": "layer", "n_layers": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_prepared_likelihood_is_that_of_decode(options, dtype, tolerance):
    model = make_model(dtype=dtype, **options).eval()
    cells = make_cells(dtype=dtype, depth=300.0)
    z = 2 * torch.randn(7, 12, N_LATENT, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = model.decode(z, cells.library).log_prob(cells.counts).sum(-1)
    with torch.no_grad():
        likelihood = model.likelihood(cells)
        actual = torch.stack([likelihood.at(cell, z[:, cell]) for cell in range(12)], 1)
    torch.testing.assert_close(actual, expected.detach(), rtol=0, atol=tolerance)


def test_prepared_likelihood_survives_extreme_dispersions_and_sharp_rates():
    model, cells = make_model().eval(), make_cells()
    with torch.no_grad():
        model.log_theta.copy_(torch.tensor([18.0, -4, 0, 12, 3, 7]))
        model.genes.weight.mul_(100.0)
        z = 3 * torch.randn(50, 12, N_LATENT, generator=torch.Generator().manual_seed(0))
        likelihood = model.likelihood(cells)
        actual = torch.stack([likelihood.at(cell, z[:, cell]) for cell in range(12)], 1)
        expected = model.double().decode(z.double(), cells.library.double())
        expected = expected.log_prob(cells.counts.double()).sum(-1)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-2)


# ---------------------------------------------------------------------------------- options


def test_batch_norm_couples_the_cells_of_a_batch_in_training_only():
    model, cells = make_model(norm="batch"), make_cells()
    with torch.no_grad():
        assert not torch.allclose(
            model.encode(cells.counts).mean[:4], model.encode(cells.counts[:4]).mean
        )
        model.eval()
        torch.testing.assert_close(
            model.encode(cells.counts).mean[:4], model.encode(cells.counts[:4]).mean
        )


def test_dropout_is_in_the_encoder_alone():
    model, cells = make_model(dropout=0.5), make_cells()
    z = torch.zeros(12, N_LATENT)
    with seeded(0), torch.no_grad():
        assert not torch.equal(model.encode(cells.counts).mean, model.encode(cells.counts).mean)
        first, second = (model.decode(z, cells.library).mean for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("activation", "slope"), [("relu", 0.0), ("leaky_relu", 0.2)], ids=["relu", "leaky_relu"]
)
def test_activations(activation, slope):
    layer = make_model(activation=activation, n_layers=1).decoder[1]
    assert layer(torch.tensor([-10.0, 3.0])).tolist() == pytest.approx([-10.0 * slope, 3.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "group"}, r"norm is 'group'; expected one of \['batch', 'layer', 'none'\]"),
        ({"activation": "tanh"}, "activation is 'tanh'; expected 'leaky_relu' or 'relu'"),
    ],
)
def test_unknown_options_are_refused(options, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside the tests
    with pytest.raises(ValueError, match=message):
        make_model(**options)


def test_unknown_methods_are_refused_with_the_list():
    with pytest.raises(ValueError, match=r"unknown method 'gan'; expected one of \['beta-vae'"):
        make_model("gan")


def test_a_preset_is_its_seed_and_leaves_the_global_state():
    before = torch.random.get_rng_state()
    first, again, other = (make_model(seed=seed) for seed in (4, 4, 5))
    assert torch.equal(before, torch.random.get_rng_state())
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert not torch.equal(first.log_theta, other.log_theta)


# ------------------------------------------------------------------------------ save, load


@pytest.mark.parametrize(
    "gate",
    [
        BetaGate(2, N_LATENT, alpha=9.0, weight="profile"),
        LogitGate(2, N_LATENT),
        FixedGate.at(torch.eye(2, N_LATENT)),
    ],
    ids=lambda gate: type(gate).__name__,
)
def test_a_loaded_model_is_the_saved_one(tmp_path, gate):
    prior = ShiftPrior(DESIGN, PointSlab(2, N_LATENT), gate)
    options = {"n_latent": N_LATENT, "n_hidden": 8, "norm": "batch", "estimator": "sampled"}
    model = SMSVAE(prior, N_GENES, **options).eval()
    model.save(tmp_path / "deep" / "model")
    loaded = SMSVAE.load(tmp_path / "deep" / "model")
    assert not loaded.training
    assert loaded.options == model.options
    assert loaded.prior.design.conditions == DESIGN.conditions
    assert torch.equal(loaded.prior.design.matrix, DESIGN.matrix)
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])
    with torch.no_grad():
        for seed in (0, 1):
            with seeded(seed):
                ours = model(make_cells())
            with seeded(seed):
                theirs = loaded(make_cells())
            assert all(map(torch.equal, ours, theirs))


def test_saved_files_hold_numbers_and_names_only(tmp_path):
    make_model().save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "weights.pt"]
    state = torch.load(tmp_path / "weights.pt", weights_only=True)  # refuses pickled classes
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["gate"] == ["BetaGate", {"alpha": 2.0, "weight": "tied"}]


def test_saving_again_replaces_the_model(tmp_path):
    make_model(seed=0).save(tmp_path)
    second = make_model(seed=1)
    second.save(tmp_path)
    assert torch.equal(SMSVAE.load(tmp_path).log_theta, second.log_theta)


def test_loading_from_an_empty_folder_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no saved model \(config.json is missing"):
        SMSVAE.load(tmp_path)


def test_sizes_are_readable():
    model = make_model()
    assert (model.n_genes, model.n_latent) == (N_GENES, N_LATENT)
    assert model.device == torch.device("cpu")
    assert math.prod(model.prior.slab().shape) == 2 * N_LATENT
