"""Transfer: what is frozen stays frozen, and the closed form is where the gradient vanishes."""

import copy
import itertools
from dataclasses import replace

import jaxtyping
import numpy as np
import pytest
import torch
from scipy import optimize

from smslib import metrics, simulate, transfer
from smslib.data import Cells, Design, split_cells
from smslib.distributions import kl_to_shifted_normal
from smslib.evaluate import elbo, iwelbo, latents
from smslib.model import SMSVAE
from smslib.priors import BernoulliGate, BetaGate, GaussianSlab, L1Gate, PointSlab
from smslib.train import TrainConfig, fit
from smslib.transfer import adapt, binarise, extend, protocol

N_GENES, N_LATENT = 7, 3
DESIGN = Design.single_target(["a", "b"])
LARGER = DESIGN.extend(["c", "d"])


def make_model(method="svae+", *, dtype=torch.float64, **options):
    model = SMSVAE.preset(method, DESIGN, N_GENES, n_latent=N_LATENT, n_hidden=8, **options)
    if method == "svae+":
        with torch.no_grad():
            model.prior.gate.logit.copy_(torch.tensor([[4.0, -4.0, 0.3], [-0.3, 2.0, -2.0]]))
    return model.to(dtype).eval()


def make_cells(conditions, *, n_each=20, dtype=torch.float64):
    rng = np.random.default_rng(0)
    condition = torch.tensor(conditions).repeat_interleave(n_each)
    counts = rng.poisson(5.0, (len(condition), N_GENES)) + 1
    return Cells(torch.from_numpy(counts).to(dtype), condition)


NEW = make_cells([3, 4])


def same(first, second):
    return all(torch.equal(a, second[name]) for name, a in first.items())


def networks(model):
    """Everything but the prior; the counter of batches that batch norm keeps has no effect."""
    state = model.state_dict().items()
    return {k: v for k, v in state if not k.startswith("prior.") and "num_batches" not in k}


# ---------------------------------------------------------------- binarise


def test_binarised_gates_are_the_graph_and_the_original_is_untouched():
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    fixed = binarise(model)
    by_hand = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    assert torch.equal(fixed.prior.gate(), by_hand)
    assert same(before, model.state_dict())
    assert same(networks(model), networks(fixed))


def test_a_binarised_slab_is_a_point_at_its_mean():
    model = make_model("sams-vae")
    fixed = binarise(model)
    assert type(fixed.prior.slab) is PointSlab
    torch.testing.assert_close(fixed.prior.mode(), model.prior.mode())
    assert fixed.prior().variance.eq(0).all()


def test_binarised_model_charges_nothing_and_has_certain_shifts():
    fixed = binarise(make_model())
    assert float(fixed.prior.penalty()) == 0.0
    assert torch.equal(fixed.prior().variance, torch.zeros(3, N_LATENT, dtype=torch.float64))
    assert fixed.estimator == "expected"


def test_threshold_moves_the_cut():
    model = make_model()
    assert int(binarise(model, threshold=0.6).prior.gate().sum()) == 2
    assert int(binarise(model, threshold=0.4).prior.gate().sum()) == 4


# ---------------------------------------------------------------- extend


def test_extended_model_knows_the_old_and_expects_nothing_of_the_new():
    model = make_model()
    larger = extend(model, LARGER)
    old, new = larger.prior.mode()[:3], larger.prior.mode()[3:]
    assert torch.equal(old, model.prior.mode())
    assert torch.equal(new, torch.zeros(2, N_LATENT, dtype=torch.float64))
    assert torch.equal(larger.prior.gate()[2:], torch.ones(2, N_LATENT, dtype=torch.float64))


def test_a_design_that_does_not_begin_with_the_known_one_is_refused():
    other_dose, known_in_new = LARGER.matrix.clone(), LARGER.matrix.clone()
    other_dose[1, 0], known_in_new[2, 2] = 5.0, 1.0
    doses = (other_dose, known_in_new)
    wrong = [Design(LARGER.conditions, LARGER.targets, matrix) for matrix in doses]
    for design in (Design.single_target(["b", "a", "c"]), *wrong):
        with pytest.raises(ValueError, match=r"make it with model\.prior\.design\.extend"):
            extend(make_model(), design)


@pytest.mark.parametrize("method", ["svae+", "sams-vae"])
def test_extending_leaves_the_global_random_state_alone(method):
    model, before = make_model(method), torch.random.get_rng_state()
    extend(model, LARGER)
    assert torch.equal(before, torch.random.get_rng_state())


# ---------------------------------------------------------------- adapt: the closed form


def kl_of(model, cells):
    q = model.encode(cells.counts)
    shift = model.prior.of(cells.condition, "expected")
    return kl_to_shifted_normal(q.mean, q.variance, shift).sum()


def slab_gradient(model, cells):
    mean = model.prior.slab.mean
    return torch.autograd.grad(kl_of(model, cells), mean)[0]


def test_closed_form_is_where_autograd_finds_no_gradient():
    model = make_model()
    adapted = adapt(model, NEW, design=LARGER)
    before = slab_gradient(extend(model, LARGER), NEW)
    assert before[2:].abs().max() > 0.1
    assert slab_gradient(adapted, NEW).abs().max() < 1e-10


def test_a_dose_divides_the_shift():
    doubled = Design(LARGER.conditions, LARGER.targets, LARGER.matrix.clone())
    doubled.matrix[3, 2] = 2.0
    single = adapt(make_model(), NEW, design=LARGER).prior.slab()
    double = adapt(make_model(), NEW, design=doubled).prior.slab()
    torch.testing.assert_close(2.0 * double[2], single[2])
    torch.testing.assert_close(double[3], single[3])


@pytest.mark.parametrize("doses", [(1.0, 2.0), (2.0, 1.0), (-1.0, 0.5)])
def test_conditions_of_one_new_target_share_its_shift(doses):
    """At several doses, of either sign: where autograd finds no gradient."""
    pooled = DESIGN.extend(["c"])
    matrix = torch.cat([pooled.matrix, torch.zeros(1, 3)])
    matrix[3:, 2] = torch.tensor(doses)
    design = Design((*pooled.conditions, "c again"), pooled.targets, matrix)
    adapted = adapt(make_model(), NEW, design=design)
    assert adapted.prior.slab()[2].abs().max() > 0.01
    assert slab_gradient(adapted, NEW).abs().max() < 1e-10


def test_gradient_descent_arrives_at_the_closed_form():
    cells = make_cells([3, 4], dtype=torch.float32)
    model = make_model(dtype=torch.float32)
    config = TrainConfig(epochs=100, learning_rate=0.1, batch_size=len(cells), warmup_epochs=0)
    closed = adapt(model, cells, design=LARGER)
    descended = adapt(model, cells, design=LARGER, how="gradient", config=config)
    torch.testing.assert_close(
        descended.prior.slab()[2:], closed.prior.slab()[2:], rtol=0.02, atol=5e-3
    )


def test_dropout_and_batch_norm_bias_the_released_way():
    cells = make_cells([3, 4], n_each=40, dtype=torch.float32)
    model = make_model(dtype=torch.float32, norm="batch", dropout=0.5)
    fit(model, make_cells([0, 1, 2], dtype=torch.float32), TrainConfig(epochs=3))
    config = TrainConfig(epochs=30, learning_rate=0.1, batch_size=40, warmup_epochs=0)
    closed = adapt(model, cells, design=LARGER)
    descended = adapt(model, cells, design=LARGER, how="gradient", config=config)
    assert kl_of(closed, cells) < kl_of(descended, cells)


# ---------------------------------------------------------------- adapt: with steps of inference


def split_screen(n_latent):
    """Cells and design of six targets, and cells of two held-out ones labelled by DESIGN_8."""
    screen = simulate.sparse_shift(
        n_cells_per_condition=40, n_targets=8, n_latent=n_latent, n_genes=40, seed=0
    )
    trained = simulate.restrict(screen, screen.design.conditions[1:7])
    held = screen.cells.of(torch.tensor([7, 8]))
    return trained, held, trained.design.extend(["7", "8"])


@pytest.fixture(scope="module", params=[1, 3], ids=["1 latent", "3 latents"])
def stepping(request):
    """A fitted model whose posterior means take Gauss-Newton steps, and its held-out cells."""
    n_latent = request.param
    screen, held, design = split_screen(n_latent)
    model = SMSVAE.preset(
        "svae+", screen.design, 40, n_latent=n_latent, n_hidden=16, sparsity=3.0, newton=True
    )
    fit(model, screen.cells, TrainConfig(epochs=60, batch_size=60, learning_rate=1e-2))
    return model.double(), Cells(held.counts.double(), held.condition), design


def by_target(values, held):
    """Mean over the cells of each held-out condition."""
    return np.stack([values[(held.condition == row).numpy()].mean(0) for row in (7, 8)])


def test_with_steps_a_shift_is_the_mean_of_the_codes_it_implies(stepping):
    model, held, design = stepping
    adapted = adapt(model, held, design=design)
    shifts = adapted.prior.slab().detach().numpy()[6:]
    np.testing.assert_allclose(by_target(latents(adapted, held), held), shifts, atol=1e-2)
    # One pass would not do: the codes of an unknown target are drawn towards zero.
    once = by_target(latents(extend(model, design), held), held)
    assert np.abs(once - shifts).max() > 0.1


def without_kinks(model):
    """Put every rectifier of the decoder on its upper side, and make q all but certain."""
    with torch.no_grad():
        for layer in model.decoder[::2]:
            layer.bias.fill_(30.0)
        model.genes.weight.mul_(4.0)
        model.log_theta.fill_(1.0)
        model.posterior.weight[N_LATENT:] = 0.0
        model.posterior.bias[N_LATENT:] = -20.0
        rate = model.genes(model.decoder(torch.zeros(1, N_LATENT, dtype=torch.float64)))
        model.genes.bias.sub_(rate[0])
    return model


def test_with_steps_a_shift_is_where_scipy_finds_the_largest_elbo():
    """Latent by latent, of a decoder for which a mode is where the gradient vanishes."""
    cells = Cells(50 * NEW.counts, NEW.condition)
    adapted = adapt(without_kinks(make_model(newton=True)), cells, design=LARGER)
    target, mine = 2, cells.of(torch.tensor([3]))
    shift = adapted.prior.slab().detach()[target].clone()
    assert shift.abs().max() > 0.1

    def loss(value, latent):
        with torch.no_grad():
            adapted.prior.slab.mean[target] = shift
            adapted.prior.slab.mean[target, latent] = value
        return -float(elbo(adapted, mine).mean())

    for latent, here in enumerate(shift.tolist()):
        bounds = (here - 1, here + 1)
        best = optimize.minimize_scalar(loss, args=(latent,), bounds=bounds, method="bounded")
        assert best.x == pytest.approx(here, abs=0.02)
        assert loss(here + 0.5, latent) > best.fun + 0.01


def test_with_steps_adapting_changes_nothing_that_was_known(stepping):
    model, held, design = stepping
    before = copy.deepcopy(model.state_dict())
    adapted = adapt(model, held, design=design)
    assert adapted.newton
    assert same(before, model.state_dict())
    assert same(networks(model), networks(adapted))
    assert torch.equal(adapted.prior.mode()[:7], model.prior.mode())
    known = Cells(held.counts, held.condition - 3)
    np.testing.assert_allclose(
        latents(adapted, known), latents(binarise(model), known), atol=1e-12
    )


def test_with_steps_a_vae_still_has_nothing_to_learn():
    model = make_model("vae", newton=True)
    adapted = adapt(model, NEW, design=LARGER)
    assert torch.equal(adapted.prior.mode(), torch.zeros(5, N_LATENT, dtype=torch.float64))
    assert same(networks(model), networks(adapted))
    old = Cells(NEW.counts, NEW.condition - 2)
    np.testing.assert_array_equal(latents(adapted, NEW), latents(model, old))


# ---------------------------------------------------------------- adapt: learned gates

WEIGHTS = {"tied": 2.0, "profile": 3.0, "collapsed": 4.0}


def gated(weight="tied", alpha=3.0, dtype=torch.float64):
    model = make_model(dtype=dtype)
    model.prior.gate = BetaGate(2, N_LATENT, alpha=alpha, weight=weight).to(dtype)
    return model


@pytest.mark.parametrize("weight", sorted(WEIGHTS))
@pytest.mark.parametrize("evidence", [0.0, 0.3, 1.2, 2.5, 4.5, 9.0, 60.0])
def test_a_learned_gate_is_where_scipy_finds_the_least_loss(weight, evidence):
    gate = BetaGate(1, 1, alpha=WEIGHTS[weight], weight=weight).double()

    def loss(logit):
        with torch.no_grad():
            gate.logit.fill_(logit)
            return float(gate.penalty() - evidence * gate().sum())

    best = optimize.minimize_scalar(loss, bounds=(-30, 30), method="bounded")
    found = transfer._best_gate(gate, torch.tensor([evidence], dtype=torch.float64))
    assert float(found) == pytest.approx(1 / (1 + np.exp(-best.x)), abs=1e-4)


def test_an_l1_gate_opens_where_the_evidence_exceeds_its_strength():
    evidence = torch.tensor([0.0, 1.9, 2.1])
    found = transfer._best_gate(L1Gate(1, 3, strength=2.0), evidence)
    assert found.tolist() == [0.0, 0.0, 1.0]


def test_learned_gates_are_the_marginals_over_all_patterns_of_gates():
    """Of the collapsed prior: every pattern of a target's gates, weighted by its evidence."""
    model = gated("collapsed", alpha=4.0)
    cells = make_cells([3, 4], n_each=5)
    adapted = adapt(model, cells, design=LARGER, gates="learned")
    learned = adapted.prior.probabilities()[2:].copy()
    assert ((learned > 0.01) & (learned < 0.99)).any()
    for target, row in ((2, 3), (3, 4)):
        mine, weights = cells.of(torch.tensor([row])), {}
        for pattern in itertools.product([0.0, 1.0], repeat=N_LATENT):
            with torch.no_grad():
                adapted.prior.gate.probability[target] = torch.tensor(pattern)
                log_prior = -np.log(4.0) * sum(pattern)  # odds of 1 / alpha per open gate
                weights[pattern] = np.exp(log_prior - float(kl_of(adapted, mine)))
        total = sum(weights.values())
        by_hand = sum(np.array(pattern) * w for pattern, w in weights.items()) / total
        np.testing.assert_allclose(learned[target - 2], by_hand, rtol=1e-6)


@pytest.mark.parametrize("p", [0.05, 0.4])
def test_shifts_with_a_prior_and_their_gates_leave_the_objective_no_gradient(p):
    model, cells = make_model("sams-vae", sparsity=p), make_cells([3, 4], n_each=6)
    adapted = adapt(model, cells, design=LARGER, gates="learned")
    slab, gate = GaussianSlab(4, N_LATENT).double(), BernoulliGate(4, N_LATENT, p=p).double()
    with torch.no_grad():
        slab.mean.copy_(adapted.prior.slab())
        slab.log_variance.fill_(-np.log(6 + 1))
        gate.logit.copy_(torch.logit(adapted.prior.gate().clamp(1e-9, 1 - 1e-9)))
    adapted.prior.slab, adapted.prior.gate = slab, gate
    loss = kl_of(adapted, cells) + adapted.prior.penalty()
    parts = [slab.mean, slab.log_variance, gate.logit]
    for gradient in torch.autograd.grad(loss, parts):
        assert gradient[2:].abs().max() < 1e-9


def test_a_weight_of_the_kl_counts_cells_as_often():
    twice = Cells(NEW.counts.repeat(2, 1), NEW.condition.repeat(2))
    for model in (gated(alpha=3.0), make_model("sams-vae")):
        weighted = adapt(model, NEW, design=LARGER, gates="learned", beta=2.0)
        repeated = adapt(model, twice, design=LARGER, gates="learned")
        torch.testing.assert_close(weighted.prior.gate(), repeated.prior.gate())
        torch.testing.assert_close(weighted.prior.slab(), repeated.prior.slab())


@pytest.mark.parametrize("weight", ["tied", "profile", "collapsed"])
def test_learned_gates_and_shifts_leave_the_training_objective_no_gradient(weight):
    model = gated(weight, alpha=1.5)
    cells = make_cells([3, 4], n_each=6)
    adapted = adapt(model, cells, design=LARGER, gates="learned")
    found = adapted.prior.gate.probability.clone()
    gate = BetaGate(4, N_LATENT, alpha=1.5, weight=weight).double()
    inside = (found > 1e-9) & (found < 1 - 1e-9)
    inside[:2] = False
    assert inside.any()
    with torch.no_grad():
        gate.logit.copy_(torch.logit(found.clamp(1e-12, 1 - 1e-12)))
    adapted.prior.gate = gate
    loss = kl_of(adapted, cells) + gate.penalty()
    slab, logit = torch.autograd.grad(loss, [adapted.prior.slab.mean, gate.logit])
    assert slab[2:][inside[2:]].abs().max() < 1e-9
    assert logit[inside].abs().max() < 1e-9
    shut = (found == 0) & ~inside
    assert (logit[2:][shut[2:]] >= 0).all()  # a shut gate is pushed further shut


def test_more_sparsity_shuts_more_gates_and_scores_at_the_modal_graph():
    cells = make_cells([3, 4], n_each=30)
    opened = []
    for alpha in (1.0, 2.0, 5.0, 1e6):
        adapted = adapt(gated(alpha=alpha), cells, design=LARGER, gates="learned")
        opened.append(int(adapted.prior.graph()[2:].sum()))
    assert opened[0] == 2 * N_LATENT
    assert opened == sorted(opened, reverse=True)
    assert opened[-1] == 0
    assert torch.equal(adapted.prior.mode()[3:], torch.zeros(2, N_LATENT, dtype=torch.float64))


def test_open_gates_are_what_learned_ones_become_without_sparsity():
    cells = make_cells([3, 4])
    for method in ("ivae", "vae"):
        both = [
            adapt(make_model(method), cells, design=LARGER, gates=gates)
            for gates in ("open", "learned")
        ]
        assert same(*(model.state_dict() for model in both))


def bounds_by_pattern(model, mine, design, target):
    """Bound on the likelihood under every pattern of a target's gates, its shifts adapted anew."""
    bounds = {}
    for pattern in itertools.product([0.0, 1.0], repeat=model.n_latent):
        tried = extend(model, design)
        for _ in range(10):
            codes = torch.from_numpy(latents(tried, mine)).mean(0)
            with torch.no_grad():
                tried.prior.gate.probability[target] = torch.tensor(pattern).double()
                tried.prior.slab.mean[target] = codes
        bounds[pattern] = float(iwelbo(tried, mine, n_draws=100).sum())
    return bounds


def test_with_steps_learned_gates_are_those_of_the_best_pattern(stepping):
    """Where an open gate costs as much evidence as opens it in training, 2 (alpha - 1) nats."""
    model, held, design = stepping
    cost = 2 * (model.prior.gate.alpha - 1)
    found = adapt(model, held, design=design, gates="learned").prior
    for row in (7, 8):
        bounds = bounds_by_pattern(model, held.of(torch.tensor([row])), design, row - 1)
        best = max(bounds, key=lambda pattern: bounds[pattern] - cost * sum(pattern))
        assert tuple(found.graph()[row - 1].double().tolist()) == best
        # The evidence that decides is the difference that the bound makes.
        mean, shut = found.slab()[row - 1].detach(), dict.fromkeys(range(len(best)), 0.0)
        for latent in np.flatnonzero(best):
            without = tuple(shut.get(k, 0.0) if k == latent else best[k] for k in range(len(best)))
            gained = bounds[best] - bounds[without]
            assert float(20 * mean[latent] ** 2) == pytest.approx(gained, rel=0.35)


def new_target_scores(screen, n_known, model, codes=None):
    """Edges of the targets after the first n_known ones, learned from their cells, and truth."""
    names = screen.design.conditions[n_known + 1 :]
    trained = simulate.restrict(screen, screen.design.conditions[1 : n_known + 1])
    if codes is None:
        codes = latents(model, trained.cells)
    matching = metrics.match_latents(trained.z.numpy(), codes)
    held = screen.cells.of(screen.design.index(names))
    adapted = adapt(model, held, design=trained.design.extend(names), gates="learned")
    graphs = {"known": slice(n_known), "new": slice(n_known, None)}
    truth, found = screen.graph.numpy(), adapted.prior.probabilities()
    scores = {k: metrics.graph_scores(truth[s], found[s], matching) for k, s in graphs.items()}
    opened = np.ones_like(found[n_known:])
    return scores | {"open": metrics.graph_scores(truth[n_known:], opened, matching)}


N_KNOWN = 22


@pytest.fixture(scope="module")
def fitted_screen():
    screen = simulate.sparse_shift(
        n_cells_per_condition=100, n_targets=30, n_latent=4, n_genes=50, seed=0
    )
    trained = simulate.restrict(screen, screen.design.conditions[1 : N_KNOWN + 1])
    model = SMSVAE.preset(
        "svae+", trained.design, 50, n_latent=4, n_hidden=32, sparsity=45.0, newton=True
    )
    model.standardise(trained.cells)
    config = TrainConfig(epochs=40, batch_size=100, learning_rate=1e-2, warmup_epochs=12)
    fit(model, trained.cells, replace(config, encoder_share=0.8), progress=False)
    return screen, model


def test_edges_of_new_targets_are_found_as_well_as_those_of_known_ones(fitted_screen):
    scores = new_target_scores(fitted_screen[0], N_KNOWN, fitted_screen[1])
    assert scores["new"]["f1"] > scores["open"]["f1"] + 0.05
    assert scores["new"]["f1"] > scores["known"]["f1"] - 0.1
    assert scores["new"]["recall"] > 0.5


def test_edges_of_new_targets_are_exact_where_the_latents_are(fitted_screen, monkeypatch):
    """The true latents stand in the place of the encoder's: the gates' own error is left."""
    screen, _ = fitted_screen
    known = simulate.restrict(screen, screen.design.conditions[1 : N_KNOWN + 1])
    model = SMSVAE.preset("svae+", known.design, 50, n_latent=4, n_hidden=4, sparsity=45.0)
    held = screen.cells.condition > N_KNOWN
    monkeypatch.setattr(transfer, "latents", lambda *_: screen.z[held].numpy())
    scores = new_target_scores(screen, N_KNOWN, model, codes=known.z.numpy())
    assert scores["new"]["f1"] == 1.0
    assert scores["open"]["precision"] < 0.7


# ---------------------------------------------------------------- adapt: drift


def statistics(network):
    return {name: v for name, v in network.state_dict().items() if "running" in name}


@pytest.mark.parametrize("drift", [True, False])
def test_drift_moves_the_running_statistics_of_the_encoder_alone(drift):
    model = make_model(dtype=torch.float32, norm="batch")
    cells = make_cells([3, 4], dtype=torch.float32)
    short = TrainConfig(epochs=3, warmup_epochs=0, batch_size=20)
    adapted = adapt(model, cells, design=LARGER, how="gradient", config=short, drift=drift)
    assert same(statistics(model.decoder), statistics(adapted.decoder))
    assert same(dict(model.encoder.named_parameters()), dict(adapted.encoder.named_parameters()))
    before, after = statistics(model.encoder), statistics(adapted.encoder)
    assert len(before) == 4
    if not drift:
        assert same(before, after)
        return
    # Two batches an epoch, and each moves the mean by .01 of its own (torch's momentum).
    hidden = model.encoder[0](cells.counts.log1p()).detach()
    expected = (1 - 0.99**6) * hidden.mean(0)
    torch.testing.assert_close(after["1.running_mean"], expected, rtol=0.05, atol=2e-3)


# ---------------------------------------------------------------- leakage


@pytest.mark.parametrize("how", ["closed-form", "gradient"])
@pytest.mark.parametrize("norm", ["none", "batch"])
def test_adapting_changes_nothing_that_was_known(how, norm):
    model = make_model(dtype=torch.float32, norm=norm)
    cells = make_cells([3, 4], dtype=torch.float32)
    before = copy.deepcopy(model.state_dict())
    known = make_cells([0, 1, 2], dtype=torch.float32)
    short = TrainConfig(epochs=3, warmup_epochs=0)
    adapted = adapt(model, cells, design=LARGER, how=how, config=short)
    assert same(before, model.state_dict())
    assert same(networks(model), networks(adapted))
    assert torch.equal(adapted.prior.mode()[:3], model.prior.mode())
    assert adapted.prior.mode()[3:].abs().sum() > 0
    np.testing.assert_array_equal(latents(adapted, known), latents(model, known))


def test_gradients_move_no_known_shift_by_weight_decay_or_by_known_cells():
    model, cells = make_model(dtype=torch.float32), make_cells([1, 3, 4], dtype=torch.float32)
    config = TrainConfig(epochs=3, warmup_epochs=0, weight_decay=1e-3)
    adapted = adapt(model, cells, design=LARGER, how="gradient", config=config)
    assert torch.equal(adapted.prior.slab()[:2], model.prior.slab())
    assert adapted.prior.slab()[2:].abs().min() > 0


def test_each_shift_comes_from_its_own_cells_only():
    both = adapt(make_model(), NEW, design=LARGER).prior.slab()
    other = Cells(NEW.counts.clone(), NEW.condition)
    other.counts[NEW.condition == 4] += 9
    changed = adapt(make_model(), other, design=LARGER).prior.slab()
    assert torch.equal(both[2], changed[2])
    assert not torch.equal(both[3], changed[3])


def test_a_model_without_shifts_has_nothing_to_learn():
    adapted = adapt(make_model("vae"), NEW, design=LARGER)
    assert torch.equal(adapted.prior.mode(), torch.zeros(5, N_LATENT, dtype=torch.float64))


# ---------------------------------------------------------------- errors


def refused(call, monkeypatch, **options):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside the tests
    if call is adapt:
        return adapt(make_model(), NEW, design=LARGER, **options)
    cells = {"validation": None, "adaptation": NEW, "scoring": NEW}
    # No training cells and no configuration: refused before anything is fitted.
    return protocol(make_model(), None, config=None, design=LARGER, **cells, **options)


@pytest.mark.parametrize("call", [adapt, protocol])
def test_an_unknown_way_is_refused(call, monkeypatch):
    with pytest.raises(ValueError, match="how is 'newton'; expected 'closed-form' or 'gradient'"):
        refused(call, monkeypatch, how="newton")


@pytest.mark.parametrize("call", [adapt, protocol])
def test_drift_of_the_closed_form_is_refused(call, monkeypatch):
    with pytest.raises(ValueError, match="drift=True with how='closed-form'.*or use how='grad"):
        refused(call, monkeypatch, drift=True)


def test_unknown_gates_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="gates is 'shut'; expected 'open' or 'learned'"):
        refused(adapt, monkeypatch, gates="shut")


def test_gates_are_not_learned_by_gradients():
    with pytest.raises(ValueError, match="gates='learned' with how='gradient'.*how='closed-form'"):
        adapt(make_model(), NEW, design=LARGER, how="gradient", gates="learned")


def test_gates_are_not_learned_from_a_binarised_model():
    with pytest.raises(ValueError, match=r"fixed \(FixedGate\).*before binarise or refit"):
        adapt(binarise(make_model()), NEW, design=LARGER, gates="learned")


def test_a_new_condition_without_cells_is_named():
    with pytest.raises(ValueError, match="'d' has no cells to learn its shift from"):
        adapt(make_model(), NEW.of(torch.tensor([3])), design=LARGER)


def test_a_new_combination_is_refused():
    combined = Design(LARGER.conditions, LARGER.targets, LARGER.matrix.clone())
    combined.matrix[4, 0] = 1.0
    with pytest.raises(ValueError, match="'d' is not a single target.*one by one"):
        adapt(make_model(), NEW, design=combined)


def test_a_new_condition_of_known_targets_has_their_shifts():
    rows = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 0, 1]])
    larger = DESIGN.extend(["c"])
    names = (*DESIGN.conditions, "a, again", "a+b", "c")
    design = Design(names, larger.targets, torch.cat([larger.matrix[:3], rows]))
    adapted = adapt(make_model(), make_cells([3, 5]), design=design, gates="learned")
    mode = adapted.prior.mode()
    torch.testing.assert_close(mode[:3], make_model().prior.mode())
    torch.testing.assert_close(mode[3:5], torch.stack([mode[1], mode[1] + mode[2]]))


def test_passes_end_when_the_shifts_stand_still(monkeypatch):
    moves, move = [], transfer._move_shifts
    monkeypatch.setattr(transfer, "_move_shifts", lambda *a: moves.append(move(*a)) or moves[-1])
    monkeypatch.setattr(transfer, "_CLOSE_ENOUGH", 0.0272)  # between the fourth move and the fifth
    adapt(make_model(newton=True), make_cells([3, 4]), design=LARGER)
    assert moves[-1] < 0.0272 <= min(moves[:-1])
    assert len(moves) == 5


# ---------------------------------------------------------------- the protocol


@pytest.fixture(scope="module")
def stages():
    screen = simulate.sparse_shift(
        n_cells_per_condition=30, n_targets=8, n_latent=3, n_genes=40, seed=0
    )
    trained = simulate.restrict(screen, screen.design.conditions[1:7])
    model = SMSVAE.preset("svae+", trained.design, 40, n_latent=3, sparsity=3.0)
    config = TrainConfig(epochs=20, batch_size=60)
    fit(model, trained.cells, config)
    design = trained.design.extend(["6", "7"])
    held = screen.cells.of(torch.tensor([7, 8]))
    adaptation, scoring = split_cells(held, (0.5, 0.5), seed=0)
    adapted, table = protocol(
        model,
        trained.cells,
        config=config,
        validation=None,
        adaptation=adaptation,
        scoring=scoring,
        design=design,
        n_draws=50,
    )
    return model, adapted, table, scoring


def test_protocol_scores_every_stage_on_every_held_out_condition(stages):
    _, _, table, _ = stages
    assert table["stage"].unique().tolist() == ["trained", "refitted", "adapted"]
    assert table.groupby("stage")["condition"].apply(list).tolist() == [["6", "7"]] * 3
    assert table.index.tolist() == list(range(6))
    assert (table["n"] == 15).all()
    assert {"elbo", "iwelbo", "standard_error"} <= set(table)


def test_protocol_scores_with_the_model_it_returns(stages):
    _, adapted, table, scoring = stages
    last = table[table["stage"] == "adapted"].set_index("condition")["iwelbo"]
    per_cell = iwelbo(adapted, scoring, n_draws=50)
    by_hand = [per_cell[scoring.condition == row].mean() for row in (7, 8)]
    np.testing.assert_allclose(last.to_numpy(), by_hand, rtol=1e-6)


def test_binarising_is_no_stage_since_gates_without_a_shift_do_not_score(stages):
    model, _, table, scoring = stages
    probabilities = model.prior.probabilities()
    assert ((probabilities > 0.5) & (probabilities < 1)).all()  # binarising does change them
    networks_alone = SMSVAE.preset("vae", model.prior.design.extend(["6", "7"]), 40, n_latent=3)
    networks_alone.load_state_dict(networks(model), strict=False)
    per_cell = iwelbo(networks_alone, scoring, n_draws=50)
    by_hand = [per_cell[scoring.condition == row].mean() for row in (7, 8)]
    first = table[table["stage"] == "trained"].set_index("condition")["iwelbo"]
    np.testing.assert_allclose(first.to_numpy(), by_hand, rtol=1e-6)


def test_adapting_helps_cells_it_has_not_seen(stages):
    _, _, table, _ = stages
    score = table.pivot_table(index="condition", columns="stage", values="iwelbo", observed=True)
    assert (score["adapted"] > score["refitted"]).all()


def test_a_refit_is_the_protocols(stages):
    """The stage table of the protocol is that of `refit` on the same cells."""
    model, adapted, _, scoring = stages
    screen, _, design = split_screen(3)
    again = transfer.refit(model, screen.cells.of(torch.arange(7)), TrainConfig(epochs=2))
    assert torch.equal(again.prior.gate(), binarise(model).prior.gate())
    assert not again.training
    assert not same(networks(model), networks(again))


def test_refitting_moves_the_networks_but_not_the_graph(stages):
    model, adapted, _, _ = stages
    assert torch.equal(adapted.prior.graph()[:6], model.prior.graph())
    assert not same(networks(model), networks(adapted))


def test_the_protocol_adapts_as_it_is_told(monkeypatch):
    told = {}

    def spy(model, cells, **options):
        told.update(options, cells=cells)
        return extend(model, options["design"])

    monkeypatch.setattr(transfer, "adapt", spy)
    screen, held, design = split_screen(3)
    model = SMSVAE.preset("svae+", screen.design, 40, n_latent=3, n_hidden=8)
    protocol(
        model,
        screen.cells,
        config=TrainConfig(epochs=1),
        validation=None,
        adaptation=held,
        scoring=held,
        design=design,
        n_draws=2,
        how="gradient",
        drift=True,
    )
    assert told == {"design": design, "cells": held, "how": "gradient", "drift": True}
