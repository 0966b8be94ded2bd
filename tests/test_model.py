"""The model: its terms against torch.distributions, its fast path against its plain one."""

import inspect
import json
import math

import jaxtyping
import numpy as np
import pytest
import torch
from scipy import optimize
from torch.distributions import NegativeBinomial, Normal, kl_divergence
from torch.func import functional_call

from smslib import model as module
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


# ------------------------------------------------------------------------- the weighted bound


def log_weights(model, cells, z, q):
    """log p(x, z | c) / q(z | x) by torch.distributions; the gates are certain."""
    rate = cells.library * model.genes(model.decoder(z.flatten(end_dim=1))).softmax(-1).reshape(
        *z.shape[:2], -1
    )
    nb = NegativeBinomial(model.log_theta.exp(), logits=rate.log() - model.log_theta)
    shift = (DESIGN.matrix.to(z) @ (model.prior.gate() * model.prior.slab()))[cells.condition]
    posterior = Normal(q.mean, q.variance.sqrt())
    ratio = Normal(shift, 1.0).log_prob(z) - posterior.log_prob(z)
    return nb.log_prob(cells.counts).sum(-1) + ratio.sum(-1)


@pytest.mark.parametrize("n_draws", [2, 7])
@pytest.mark.parametrize("method", ["vae", "ivae"])
def test_with_more_draws_the_terms_add_up_to_the_weighted_bound(method, n_draws):
    model, cells = make_model(method, dtype=torch.float64), make_cells(dtype=torch.float64)
    with seeded(3):
        terms = model(cells, n_draws=n_draws)
    with seeded(3):
        q = model.encode(cells.counts)
        z = q.mean + q.variance.sqrt() * torch.randn(n_draws, *q.mean.shape).double()
    weights = log_weights(model, cells, z, q)
    expected = weights.exp().mean(0).log()
    torch.testing.assert_close(terms.reconstruction - terms.kl, expected)
    torch.testing.assert_close(terms.kl, model(cells).kl)


def test_on_average_more_draws_come_closer_to_the_evidence_from_below():
    model, cells = make_model("vae"), make_cells(4)
    many = Cells(cells.counts.repeat(2000, 1), cells.condition.repeat(2000))
    with torch.no_grad(), seeded(0):
        bounds = []
        for n_draws in (1, 2, 10):
            terms = model(many, n_draws=n_draws)
            bounds.append((terms.reconstruction - terms.kl).reshape(2000, 4).mean(0))
        q = Normal(torch.zeros(2000, 4, N_LATENT), 1.0)  # the prior, and so exact on average
        likelihood = model.decode(q.sample(), cells.library).log_prob(cells.counts).sum(-1)
    evidence = likelihood.logsumexp(0) - math.log(2000)
    assert (bounds[0] < bounds[1]).all()
    assert (bounds[1] < bounds[2]).all()
    assert (bounds[2] < evidence + 0.1).all()


def test_gradient_of_the_weighted_bound_is_that_of_finite_differences():
    model = make_model(dtype=torch.float64, n_hidden=3, n_layers=1, n_latent=2)
    cells = make_cells(4, dtype=torch.float64)
    names, values = zip(*model.named_parameters(), strict=True)

    def bound(*values):
        with seeded(0):
            parameters = dict(zip(names, values, strict=True))
            terms = functional_call(model, parameters, (cells,), {"n_draws": 3})
        return terms.reconstruction.sum() - terms.kl.sum() - terms.penalty

    assert torch.autograd.gradcheck(bound, [v.detach().requires_grad_() for v in values])


def test_uncertain_gates_are_charged_in_the_weighted_bound_too():
    """By the same amount as in the ELBO: half the variance of each cell's shift."""
    model, cells = make_model(dtype=torch.float64), make_cells(dtype=torch.float64)
    with torch.no_grad():
        model.prior.gate.logit.copy_(torch.tensor([[0.5, -1.0, 0.0], [2.0, 0.3, -0.7]]))
        pi, slab = model.prior.gate(), model.prior.slab()
        certain = make_model("vae", dtype=torch.float64)
        certain.load_state_dict(model.state_dict(), strict=False)
        certain.prior = ShiftPrior(DESIGN, PointSlab(2, N_LATENT), FixedGate.at(torch.ones(2, 3)))
        certain.prior.slab.mean = torch.nn.Parameter(pi * slab)
        with seeded(0):
            uncertain = model(cells, n_draws=3)
        with seeded(0):
            bound = certain.double()(cells, n_draws=3)
    variance = DESIGN.matrix.double().square() @ (pi * (1 - pi) * slab.square())
    lost = (bound.reconstruction - bound.kl) - (uncertain.reconstruction - uncertain.kl)
    torch.testing.assert_close(lost, 0.5 * variance[cells.condition].sum(-1))


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


# ---------------------------------------------------------------------- what the encoder sees


def seen_by_encoder(model, cells):
    """Return what enters the encoder's first layer."""
    seen = []
    hook = model.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.encode(cells.counts)
    hook.remove()
    return seen[0]


def test_the_encoder_sees_log_counts():
    cells = make_cells()
    torch.testing.assert_close(seen_by_encoder(make_model(), cells), (1 + cells.counts).log())


def test_standardised_it_sees_mean_zero_and_variance_one_of_those_cells():
    model, cells = make_model(dtype=torch.float64), make_cells(dtype=torch.float64)
    model.standardise(cells)
    seen = seen_by_encoder(model, cells)
    torch.testing.assert_close(seen.mean(0), torch.zeros(N_GENES, dtype=torch.float64))
    torch.testing.assert_close(seen.square().mean(0), torch.ones(N_GENES, dtype=torch.float64))
    # Other cells are measured by the same rule, each gene by a line in its log counts.
    other = make_cells(5, dtype=torch.float64, depth=30.0)
    logs = cells.counts.log1p().numpy()
    expected = (other.counts.log1p().numpy() - logs.mean(0)) / logs.std(0)
    torch.testing.assert_close(seen_by_encoder(model, other), torch.from_numpy(expected))


def test_a_constant_gene_becomes_zero_and_stays_finite_in_other_cells():
    model, cells = make_model(), make_cells()
    cells.counts[:, 2] = 4.0
    model.standardise(cells)
    assert torch.equal(seen_by_encoder(model, cells)[:, 2], torch.zeros(12))
    assert seen_by_encoder(model, make_cells()).abs().max() <= 100 * math.log(40)


def test_standardising_leaves_the_decoder_alone():
    model, cells, z = make_model(), make_cells(), torch.ones(12, N_LATENT)
    before = model.decode(z, cells.library).mean
    model.standardise(cells)
    assert torch.equal(model.decode(z, cells.library).mean, before)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (make_cells()[:0], "got 0 cells of 6 genes to standardise by; expected the training"),
        (make_cells(n_genes=1), "got 12 cells of 1 genes .* of the model's 6 genes"),
    ],
    ids=["no cells", "other genes"],
)
def test_cells_that_cannot_be_standardised_by_are_refused(cells, message):
    with pytest.raises(ValueError, match=message):
        make_model().standardise(cells)


# ------------------------------------------------------------------------------- inference


def make_stepping(**options):
    """A model in double precision whose posterior means take Gauss-Newton steps."""
    return make_model(dtype=torch.float64, newton=True, **options)


def mode_by_scipy(model, cells, cell):
    """Maximise log NB(x | z) + log N(z; E[s], 1) of one cell, as torch.distributions has it."""
    pi, slab = model.prior.gate().detach(), model.prior.slab().detach()
    shift = (DESIGN.matrix.double() @ (pi * slab))[cells.condition[cell]]
    theta = model.log_theta.detach().exp()

    def loss(values):
        z = torch.tensor(values, requires_grad=True)
        rate = cells.library[cell] * model.genes(model.decoder(z)).softmax(-1)
        nb = NegativeBinomial(theta, logits=rate.log() - theta.log())
        joint = nb.log_prob(cells.counts[cell]).sum() + Normal(shift, 1.0).log_prob(z).sum()
        return -joint.item(), -torch.autograd.grad(joint, z)[0].numpy()

    found = optimize.minimize(loss, shift.numpy(), jac=True, method="BFGS")
    return torch.from_numpy(found.x)


@pytest.mark.parametrize("training", [True, False])
def test_without_newton_inference_is_the_encoder(training):
    model, cells = make_model().train(training), make_cells()
    assert all(map(torch.equal, model.infer(cells), model.encode(cells.counts)))


@pytest.mark.parametrize(("training", "n_steps"), [(True, 1), (False, 4)])
def test_one_step_in_training_and_four_in_evaluation(training, n_steps, monkeypatch):
    monkeypatch.setattr(module, "newton_step", lambda z, *_, **__: torch.ones_like(z))
    model, cells = make_stepping().train(training), make_cells(dtype=torch.float64)
    inferred, encoded = model.infer(cells), model.encode(cells.counts)
    torch.testing.assert_close(inferred.mean, encoded.mean + n_steps)
    assert torch.equal(inferred.variance, encoded.variance)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
@pytest.mark.parametrize("n_layers_decoder", [1, 3])
def test_steps_lead_from_the_encoders_mean_to_the_mode(activation, n_layers_decoder):
    model = make_stepping(activation=activation, n_layers_decoder=n_layers_decoder)
    cells = make_cells(dtype=torch.float64, depth=200.0)
    with torch.no_grad():
        model.prior.gate.logit.copy_(torch.tensor([[0.5, -1.0, 0.0], [2.0, 0.3, -0.7]]))
        codes = [model.encode(cells.counts).mean, model.infer(cells).mean]
        codes.append(model.eval().infer(cells).mean)
    modes = torch.stack([mode_by_scipy(model, cells, cell) for cell in range(len(cells))])
    encoder, one, four = ((code - modes).norm(dim=1).mean() for code in codes)
    assert one < 0.7 * encoder
    assert four < 0.1 * encoder


def test_the_prior_of_the_condition_enters_by_the_steps_alone():
    model, cells = make_stepping().eval(), make_cells(dtype=torch.float64)
    moved = Cells(cells.counts, (cells.condition + 1) % 4)
    assert not torch.allclose(model.infer(cells).mean, model.infer(moved).mean)
    model.newton = False
    assert all(map(torch.equal, model.infer(cells), model.infer(moved)))


@pytest.mark.parametrize("training", [True, False])
def test_the_steps_are_constants_to_the_gradient(training):
    """The derivative of the inferred mean by the encoder's mean is the identity."""
    model, cells = make_stepping().train(training), make_cells(dtype=torch.float64)
    mean = model.infer(cells).mean
    for latent in range(N_LATENT):
        (slope,) = torch.autograd.grad(mean[0, latent], model.posterior.bias, retain_graph=True)
        assert torch.equal(slope, torch.eye(2 * N_LATENT, dtype=torch.float64)[latent])
    mean.square().sum().backward()
    parts = (model.decoder, model.genes, model.prior)
    assert all(p.grad is None for part in parts for p in part.parameters())
    assert model.log_theta.grad is None
    assert all(p.grad is not None for p in model.encoder.parameters())


def test_a_draw_is_taken_and_charged_around_the_inferred_mean():
    model, cells = make_stepping(), make_cells(dtype=torch.float64)
    with seeded(3):
        terms = model(cells)
    q, shift = model.infer(cells), model.prior()
    with seeded(3):
        z = Normal(q.mean, q.variance.sqrt()).rsample()
    rate = cells.library * model.genes(model.decoder(z)).softmax(-1)
    nb = NegativeBinomial(model.log_theta.exp(), logits=rate.log() - model.log_theta)
    torch.testing.assert_close(terms.reconstruction, nb.log_prob(cells.counts).sum(-1))
    prior = Normal(shift.mean[cells.condition], 1.0)
    kl = kl_divergence(Normal(q.mean, q.variance.sqrt()), prior)
    kl = kl + 0.5 * shift.variance[cells.condition]  # the shift is as uncertain as its gates
    torch.testing.assert_close(terms.kl, kl.sum(-1))


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_newton_with_a_normalisation_is_refused(norm):
    with pytest.raises(ValueError, match=f"newton=True with norm='{norm}'.*norm='none'"):
        make_model(newton=True, norm=norm)


# ---------------------------------------------------------------------------------- options


def test_encoder_and_decoder_can_differ_in_size():
    model = make_model(n_hidden_encoder=5, n_layers_decoder=3, n_layers=1)
    widths = {
        part: [m.out_features for m in getattr(model, part) if hasattr(m, "out_features")]
        for part in ("encoder", "decoder")
    }
    assert widths == {"encoder": [5], "decoder": [8, 8, 8]}
    assert model.posterior.in_features == 5


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
        ({"estimator": "exact"}, r"estimator is 'exact'; expected one of \('expected', 'sampled'"),
        ({"n_layers": 0}, "n_layers is 0; expected at least 1"),
        ({"n_layers_decoder": 0}, "n_layers_decoder is 0; expected at least 1"),
        ({"n_hidden_encoder": 0}, "n_hidden_encoder is 0; expected at least 1"),
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


def test_a_loaded_model_infers_as_the_saved_one(tmp_path):
    sizes = {"n_hidden_encoder": 5, "n_layers_decoder": 3, "n_layers": 1}
    model, cells = make_model(newton=True, **sizes).eval(), make_cells()
    model.standardise(cells)
    model.save(tmp_path)
    loaded = SMSVAE.load(tmp_path)
    assert loaded.newton
    assert {name: loaded.options[name] for name in sizes} == sizes
    assert torch.equal(loaded.centre, cells.counts.log1p().mean(0))
    assert all(map(torch.equal, loaded.infer(cells), model.infer(cells)))


def test_a_model_saved_without_its_steps_is_loaded_without(tmp_path):
    model = make_model(newton=True)
    model.newton = False
    model.save(tmp_path)
    assert not SMSVAE.load(tmp_path).newton


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


def test_two_processes_may_save_into_one_folder(tmp_path, monkeypatch):
    """The second begins and ends before the file of the first is in its place."""
    first, second, save = make_model(seed=0), make_model(seed=1), torch.save

    def overtaken(state, path):
        save(state, path)
        monkeypatch.setattr(torch, "save", save)
        second.save(tmp_path)

    monkeypatch.setattr(torch, "save", overtaken)
    first.save(tmp_path)
    assert torch.equal(SMSVAE.load(tmp_path).log_theta, first.log_theta)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "weights.pt"]


def test_a_failed_save_leaves_the_old_model(tmp_path, monkeypatch):
    model = make_model()
    model.save(tmp_path)
    monkeypatch.setattr(torch, "save", lambda state, path: path.write_bytes(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_model(seed=1).save(tmp_path)
    assert torch.equal(SMSVAE.load(tmp_path).log_theta, model.log_theta)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "weights.pt"]


def test_numbers_of_numpy_are_saved_as_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside the tests
    sizes = {"n_latent": np.int64(2), "n_hidden": np.int64(8), "sparsity": np.float32(5)}
    model = make_model(**sizes)
    model.save(tmp_path)
    loaded = SMSVAE.load(tmp_path)
    assert loaded.options == model.options == make_model(n_latent=2, n_hidden=8).options
    assert loaded.prior.gate.alpha == 5.0


def test_notes_are_saved_with_the_model_or_not_at_all(tmp_path):
    first = make_model()
    first.save(tmp_path, notes={"note.json": {"kept": 1}})
    note, config = (
        json.loads((tmp_path / name).read_text()) for name in ("note.json", "config.json")
    )
    assert note == {"kept": 1, "weights_sha256": config["weights_sha256"]}
    with pytest.raises(TypeError, match="not JSON serializable"):
        make_model(seed=1).save(tmp_path, notes={"note.json": {"kept": {2}}})
    assert torch.equal(SMSVAE.load(tmp_path).log_theta, first.log_theta)
    assert json.loads((tmp_path / "note.json").read_text()) == note


def test_loading_leaves_the_global_random_state_alone(tmp_path):
    make_model("sams-vae").save(tmp_path)
    before = torch.random.get_rng_state()
    SMSVAE.load(tmp_path)
    assert torch.equal(before, torch.random.get_rng_state())


def test_loading_from_an_empty_folder_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no saved model \(config.json is missing"):
        SMSVAE.load(tmp_path)


def test_sizes_are_readable():
    model = make_model()
    assert (model.n_genes, model.n_latent) == (N_GENES, N_LATENT)
    assert model.device == torch.device("cpu")
    assert math.prod(model.prior.slab().shape) == 2 * N_LATENT
