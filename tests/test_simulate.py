"""Simulated screens: the published generator's numbers, and truth that hangs together."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax

from smslib import simulate

SMALL = {"n_cells_per_condition": 20, "n_targets": 30, "n_latent": 6, "n_genes": 45}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def released():
    """The demo's screen: 250 cells of each of 100 interventions."""
    return simulate.sparse_shift(n_cells_per_condition=250, as_released=True)


def network(screen, z):
    """Write the decoder's network a second time, in numpy."""
    hidden = z
    for weight in screen.decoder.weights[:-1]:
        hidden = hidden @ weight.numpy()
        hidden = np.maximum(hidden, 0.2 * hidden)
    return hidden @ screen.decoder.weights[-1].numpy()


# ---------------------------------------------------------------- the released generator


def test_released_depth_is_a_million_per_gene(released):
    counts = released.cells.counts.double()
    assert counts.shape == (25_000, 100)
    np.testing.assert_allclose(counts.sum(0), 1e6, rtol=5e-3)  # 5 Poisson sd
    library = released.cells.library
    assert library.mean() == pytest.approx(4000, rel=0.002)
    assert 500 < library.std() < 1000
    assert (counts == 0).double().mean() < 0.005


def test_released_rates_share_each_gene_among_all_cells(released):
    z = released.z.double().numpy()
    logits = network(released, z)
    expected = 1e6 * softmax(logits / logits.std(), axis=0)
    np.testing.assert_allclose(released.decoder.log_rate(released.z).exp(), expected, rtol=1e-4)


def test_released_targets_are_drawn_with_replacement():
    sizes = np.concatenate(
        [
            simulate.sparse_shift(
                n_cells_per_condition=1, n_targets=300, seed=seed, as_released=True
            ).graph.sum(1)
            for seed in range(10)
        ]
    )
    # Mean targets 1.914, share of single targets .356 at 15 latents.
    assert sizes.mean() == pytest.approx(1.914, abs=0.06)
    assert (sizes == 1).mean() == pytest.approx(0.356, abs=0.035)


# ---------------------------------------------------------------- the generator as written


def test_written_depth_is_a_hundred_thousand_per_cell():
    screen = simulate.sparse_shift(n_cells_per_condition=100)
    np.testing.assert_allclose(screen.decoder.log_rate(screen.z).exp().sum(1), 1e5, rtol=1e-9)
    np.testing.assert_allclose(screen.cells.library, 1e5, rtol=0.02)
    logits = network(screen, screen.z.double().numpy())
    assert screen.decoder.temperature == pytest.approx(logits.std(), rel=0.02)
    expected = 1e5 * softmax(logits / screen.decoder.temperature, axis=1)
    np.testing.assert_allclose(screen.decoder.log_rate(screen.z).exp(), expected, rtol=1e-4)


def test_written_targets_are_one_two_or_three_alike():
    screen = simulate.sparse_shift(n_cells_per_condition=1, n_targets=3000)
    shares = np.bincount(screen.graph.sum(1), minlength=4) / 3000
    np.testing.assert_allclose(shares, [0, 1 / 3, 1 / 3, 1 / 3], atol=0.035)


def test_one_latent_is_enough():
    screen = simulate.sparse_shift(n_cells_per_condition=2, n_targets=5, n_latent=1)
    assert screen.graph.all()


# ---------------------------------------------------------------- truth


@pytest.mark.parametrize("as_released", [False, True])
def test_the_truth_hangs_together(as_released):
    screen = simulate.sparse_shift(**SMALL, as_released=as_released)
    assert screen.design.conditions == ("control", *map(str, range(30)))
    assert (screen.cells.condition.bincount(minlength=31) == torch.tensor([0] + [20] * 30)).all()
    assert (screen.shift[0] == 0).all()
    assert ((screen.shift[1:] != 0) == screen.graph).all()
    size = screen.shift[screen.shift != 0].abs()
    assert size.mean() == pytest.approx(5, abs=0.3)
    assert size.std() == pytest.approx(0.5, abs=0.15)
    residual = screen.z - screen.shift[screen.cells.condition]
    assert residual.mean() == pytest.approx(0, abs=0.07)
    assert residual.std() == pytest.approx(1, abs=0.05)
    ratio = screen.cells.counts / screen.decoder.log_rate(screen.z).exp()
    assert ratio.mean() == pytest.approx(1, abs=0.02)


def test_counts_are_poisson_around_the_decoder(released):
    rate = released.decoder.log_rate(released.z).exp()
    standardised = (released.cells.counts - rate) / rate.sqrt()
    assert standardised.mean() == pytest.approx(0, abs=0.004)
    assert standardised.var() == pytest.approx(1, abs=0.005)


def test_decoder_weights_have_orthonormal_rows():
    weights = simulate.sparse_shift(**SMALL).decoder.weights
    assert [tuple(weight.shape) for weight in weights] == [(6, 40), (40, 40), (40, 40), (40, 45)]
    for weight in weights:
        gain = 2 / 1.04 * 2 / sum(weight.shape)
        np.testing.assert_allclose(weight @ weight.T, gain * np.eye(len(weight)), atol=1e-12)


@pytest.mark.parametrize("as_released", [False, True])
def test_more_cells_leave_the_mechanisms_unchanged(as_released):
    few = simulate.sparse_shift(**SMALL, as_released=as_released)
    many = simulate.sparse_shift(**{**SMALL, "n_cells_per_condition": 31}, as_released=as_released)
    assert torch.equal(few.graph, many.graph)
    assert torch.equal(few.shift, many.shift)
    assert all(map(torch.equal, few.decoder.weights, many.decoder.weights))
    # The released softmax over cells is the exception that makes depth depend on cells.
    assert (few.decoder.temperature == many.decoder.temperature) is not as_released


def test_more_genes_leave_graph_shifts_and_latents_unchanged():
    narrow = simulate.sparse_shift(**SMALL)
    wide = simulate.sparse_shift(**{**SMALL, "n_genes": 50})
    assert torch.equal(narrow.graph, wide.graph)
    assert torch.equal(narrow.shift, wide.shift)
    assert torch.equal(narrow.z, wide.z)


def test_seeds_decide_everything_and_nothing_else_does():
    before = (torch.get_rng_state(), np.random.get_state()[1].copy())  # noqa: NPY002
    screens = [simulate.sparse_shift(**SMALL, seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(screens[0].cells.counts, screens[1].cells.counts)
    assert not torch.equal(screens[0].cells.counts, screens[2].cells.counts)
    assert not torch.equal(screens[0].graph, screens[2].graph)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002


# ---------------------------------------------------------------- restrict


@settings(max_examples=20, deadline=None)
@given(chosen=st.lists(st.sampled_from([str(i) for i in range(30)]), unique=True, max_size=30))
def test_restriction_keeps_names_and_truth_together(chosen):
    screen = simulate.sparse_shift(**{**SMALL, "n_cells_per_condition": 2})
    part = simulate.restrict(screen, chosen)
    assert part.design.conditions == ("control", *chosen)
    assert set(part.design.targets) == set(chosen)
    assert len(part.cells) == 2 * len(chosen) == len(part.z)
    for row, name in enumerate(part.design.conditions):
        whole = screen.design.conditions.index(name)
        assert torch.equal(part.shift[row], screen.shift[whole])
        mine, theirs = part.cells.condition == row, screen.cells.condition == whole
        assert torch.equal(part.cells.counts[mine], screen.cells.counts[theirs])
        assert torch.equal(part.z[mine], screen.z[theirs])
    # The shift of a condition is still the one its targets' edges allow.
    reached = part.design.matrix @ part.graph.float()
    assert torch.equal(reached != 0, part.shift != 0)


def test_a_restricted_design_extends_back_to_the_whole():
    screen = simulate.sparse_shift(**SMALL)
    names = screen.design.conditions
    part = simulate.restrict(screen, names[1:21])
    whole = part.design.extend(names[21:])
    assert whole.conditions == names
    assert whole.targets == screen.design.targets
    assert torch.equal(whole.matrix, screen.design.matrix)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"n_latent": 41}, "n_latent=41, n_genes=100; the simulator's network has 40 hidden"),
        ({"n_genes": 39}, "n_latent=15, n_genes=39; .* needs n_latent <= 40 <= n_genes"),
        ({"n_targets": 0}, "n_targets=0, n_latent=15; expected at least 1 of each"),
    ],
)
def test_impossible_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        simulate.sparse_shift(**sizes)


def test_unknown_condition():
    with pytest.raises(KeyError, match="unknown condition 'JAK2'"):
        simulate.restrict(simulate.sparse_shift(**SMALL), ["JAK2"])
