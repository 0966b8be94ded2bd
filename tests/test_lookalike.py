"""The look-alike of the Replogle screen: its template's moments, and truth that hangs together."""

import hashlib
import inspect
from dataclasses import replace
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse, stats
from sklearn.linear_model import Ridge

from smslib import lookalike, perturbseq, simulate
from smslib.data import streams
from smslib.lookalike import Effects, Template, screen_like, template_of

SMALL = {"n_targets": 60, "n_cells": 3_000, "n_genes": 120, "n_latent": 8}


def even_template(n_genes=120, dispersion=0.3):
    """Means over two decades, one dispersion, two depths."""
    mean = np.geomspace(0.3, 30, n_genes)
    depth = np.repeat([0.5, 1.5], 50)
    return Template("even", mean, np.full(n_genes, dispersion), depth * mean.sum())


TEMPLATE = even_template()
STRONG = Effects(weak=0.0, null=0.3)


@pytest.fixture(scope="module")
def small():
    return screen_like(**SMALL, template=TEMPLATE, effects=STRONG, controls=2_000, seed=3)


@pytest.fixture(scope="module")
def controls():
    """Many controls of few perturbed cells: what the template says is to be seen in them."""
    sizes = {"n_targets": 10, "n_cells": 100, "n_genes": 120, "n_latent": 8}
    return screen_like(**sizes, template=TEMPLATE, controls=20_000, seed=5)


def of_controls(screen):
    return screen.cells.counts[screen.cells.condition == 0].double().numpy()


def digest(*tensors):
    parts = (np.ascontiguousarray(tensor).tobytes() for tensor in tensors)
    return hashlib.sha256(b"".join(parts)).hexdigest()


# ------------------------------------------------------------------------- the paper's sizes


def test_cells_per_target_are_those_of_the_paper():
    sizes = lookalike._cells_per_target(681, 116_641, np.random.default_rng(0))
    assert (sizes.sum(), sizes.min(), sizes.max()) == (116_641, 25, 791)
    assert sizes.mean() == pytest.approx(171, abs=0.5)
    inner = np.log(sizes[(sizes > 25) & (sizes < 791)])
    assert inner.std() == pytest.approx(0.56, abs=0.02)
    assert abs(stats.skew(inner)) < 0.1


@settings(max_examples=30)
@given(st.integers(1, 300), st.integers(7, 400), st.integers(0, 99))
def test_cells_per_target_add_up_and_nobody_goes_without(n_targets, per_target, seed):
    n_cells = n_targets * per_target + seed % n_targets
    sizes = lookalike._cells_per_target(n_targets, n_cells, np.random.default_rng(seed))
    assert sizes.sum() == n_cells
    assert sizes.min() >= 1
    assert sizes.max() <= np.ceil(791 / 171.2 * (per_target + 1))


def test_the_eight_pathways_and_sixty_clusters_of_the_paper():
    symbols, clusters = lookalike._symbols(None, None, 681, 1_187)
    assert sorted(map(len, symbols.pathways.values())) == [20, 23, 26, 34, 40, 43, 53, 97]
    assert len(clusters) == 60
    members = [target for group in clusters.values() for target in group]
    assert sorted(members) == sorted(symbols.targets)
    rest = list(map(len, list(clusters.values())[8:]))
    assert (sum(rest), min(rest), max(rest)) == (345, 4, 19)


def test_the_defaults_are_the_papers():
    parameters = inspect.signature(screen_like).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    wanted = {"n_targets": 681, "n_cells": 116_641, "n_genes": 1_187, "n_latent": 50}
    assert wanted.items() <= defaults.items()
    assert defaults["controls"] == 0


def test_smaller_screens_keep_the_proportions(small):
    assert list(map(len, small.pathways.values())) == [1, 2, 2, 2, 8, 3, 4, 3]
    assert len(small.cells) == 5_000
    assert int((small.cells.condition == 0).sum()) == 2_000
    assert simulate.screen_like is screen_like


# ---------------------------------------------------------------------- what the template says


def test_controls_have_the_gene_means_of_the_template(controls):
    counts = of_controls(controls)
    error = counts.std(0) / np.sqrt(len(counts))
    z = (counts.mean(0) - TEMPLATE.mean) / np.hypot(error, 0.01 * TEMPLATE.mean)
    assert np.abs(z).max() < 4.5
    assert z.std() < 1.5


def test_controls_have_the_dispersion_of_the_template_whatever_the_latents_explain():
    sizes = {"n_targets": 10, "n_cells": 100, "n_genes": 120, "n_latent": 8}
    share = {}
    for explained in (0.0, 0.5):
        screen = screen_like(**sizes, template=TEMPLATE, controls=8_000, explained=explained)
        counts = of_controls(screen)
        exposure = counts.sum(1, keepdims=True)
        mean = exposure * counts.sum(0) / counts.sum()
        excess = ((counts - mean) ** 2 - mean).sum(0) / (mean**2).sum(0)
        assert np.median(excess) == pytest.approx(0.3, abs=0.04)
        share[explained] = (1 / screen.decoder.theta).median()
    assert share[0.0] == pytest.approx(0.3, abs=1e-6)
    assert share[0.5] == pytest.approx(0.13, abs=0.03)  # (.3 - .15) / 1.15


def test_libraries_are_those_of_the_template(controls):
    library = of_controls(controls).sum(1) / TEMPLATE.mean.sum()
    deep = library > 1
    assert deep.mean() == pytest.approx(0.5, abs=0.02)
    assert library[deep].mean() == pytest.approx(1.5, abs=0.02)
    assert library[~deep].mean() == pytest.approx(0.5, abs=0.02)


def test_counts_are_negative_binomial_given_latents_and_exposure():
    """Poisson at a fixed rate is excluded, NB with the decoder's theta is not."""
    rng = np.random.default_rng(0)
    theta, mean = np.array([0.7, 5.0]), np.array([[3.0, 40.0]])
    drawn = lookalike.negative_binomial(rng, np.repeat(mean, 20_000, 0), theta)
    for gene in range(2):
        law = stats.nbinom(theta[gene], theta[gene] / (theta[gene] + mean[0, gene]))
        edges = np.unique(law.ppf(np.linspace(0, 1, 12)[1:-1]))
        seen = np.histogram(drawn[:, gene], [-1, *(edges + 0.5), np.inf])[0]
        expected = np.diff([0, *law.cdf(edges), 1]) * len(drawn)
        assert stats.chisquare(seen, expected).pvalue > 1e-3


def test_another_number_of_genes_takes_the_templates_by_rank():
    many = TEMPLATE.resized(1_200, np.random.default_rng(0))
    assert np.sort(many.mean) == pytest.approx(np.repeat(np.sort(TEMPLATE.mean), 10))
    assert many.library.mean() / many.mean.sum() == pytest.approx(1.0)
    few = TEMPLATE.resized(12, np.random.default_rng(0))
    assert set(few.mean) < set(TEMPLATE.mean)
    assert np.median(few.mean) == pytest.approx(np.median(TEMPLATE.mean), rel=0.1)
    assert TEMPLATE.resized(120, np.random.default_rng(0)) is TEMPLATE


def test_a_template_is_measured_in_the_controls_only():
    rng = np.random.default_rng(0)
    mean, theta = np.array([0.1, 1.0, 5.0, 20.0]), 4.0
    library = rng.choice([0.5, 2.0], size=6_000)
    rate = library[:, None] * mean * rng.gamma(theta, 1 / theta, (6_000, 4))
    counts = rng.poisson(rate)
    target = np.where(np.arange(6_000) < 3_000, "non-targeting", "STAT1")
    counts[3_000:] *= 3
    obs = pd.DataFrame({"target": target}, index=[f"c{n}" for n in range(6_000)])
    adata = anndata.AnnData(sparse.csr_matrix(counts), obs=obs)
    found = template_of(adata)
    assert found.mean == pytest.approx(1.25 * mean[1:], rel=0.1)  # the first gene is too thin
    everything = template_of(adata[:3_000], key="nothing")
    assert np.array_equal(everything.mean, found.mean)
    assert len(template_of(adata, min_mean=0.0).mean) == 4
    assert np.array_equal(
        screen_like(**SMALL, template=adata).template.library.shape, found.library.shape
    )


def test_dispersion_is_recovered_when_no_gene_dominates(controls):
    adata = anndata.AnnData(of_controls(controls).astype(np.float32))
    found = template_of(adata, key="none")
    assert np.median(found.dispersion) == pytest.approx(0.3, abs=0.03)


@pytest.mark.skipif(
    not (perturbseq.data_dir() / "lowmoi_example_data.rda").exists(),
    reason="the Papalexi file is not in the data directory",
)
def test_the_default_template_is_the_real_screen_and_the_fallback_resembles_it():
    real, made = lookalike._template(None), lookalike._log_normal()
    assert real.name.startswith("papalexi2021")
    assert len(real.mean) == 115
    for template in (real, made):
        assert template.library.mean() == pytest.approx(template.mean.sum())
    assert np.log(made.mean).mean() == pytest.approx(np.log(real.mean).mean(), abs=0.1)
    for what in ("mean", "library"):
        logs, fallback = np.log(getattr(real, what)), np.log(getattr(made, what))
        assert fallback.std() == pytest.approx(logs.std(), abs=0.15)
    assert np.median(made.dispersion) == pytest.approx(np.median(real.dispersion), abs=0.1)


def test_without_the_file_the_template_is_log_normal(tmp_path, monkeypatch):
    monkeypatch.setenv("SMS_DATA_DIR", str(tmp_path))
    screen = screen_like(**SMALL)
    assert screen.origin["template"] == "log-normal, moments of papalexi2021"


# -------------------------------------------------------------------------------- the truth


def test_latents_sit_at_the_shift_of_their_condition(small):
    residual = small.z - small.shift[small.cells.condition]
    assert stats.kstest(residual.ravel().numpy(), "norm").pvalue > 1e-3
    assert np.allclose(np.cov(residual.T.numpy()), np.eye(8), atol=0.07)
    assert not small.shift[0].any()
    assert torch.equal(small.shift[1:] != 0, small.graph)


def test_latents_are_recoverable_from_log_counts():
    """A ridge regression, fitted on half of the cells and scored on the others."""
    template = even_template(400)
    sizes = {"n_targets": 20, "n_cells": 3_000, "n_genes": 400, "n_latent": 8}
    screen = screen_like(**sizes, template=template)
    counts = screen.cells.counts.numpy()
    logs = np.log1p(1e4 * counts / counts.sum(1, keepdims=True))
    z = screen.z.numpy()
    fitted = Ridge(alpha=100.0).fit(logs[:1_500], z[:1_500])
    assert fitted.score(logs[1_500:], z[1_500:]) > 0.7


def test_clusters_share_latents_and_targets_deviate_a_little():
    screen = screen_like(
        **SMALL, template=TEMPLATE, effects=Effects(null=0.0, weak=0.0, private=0.0)
    )
    shift = dict(zip(screen.design.targets, screen.shift[1:].numpy(), strict=True))
    for members in screen.clusters.values():
        rows = np.stack([shift[name] for name in members])
        assert (rows != 0).all(0).sum() == (rows != 0).any(0).sum() in (1, 2, 3)
        for one in rows:
            assert stats.pearsonr(one, rows.mean(0)).statistic > 0.8
    assert 0.8 < screen.shift[screen.shift != 0].abs().median() < 1.6


def test_kinds_of_targets_occur_in_their_shares():
    effects = Effects(null=0.2, weak=0.3, private=0.1)
    rng = np.random.default_rng(0)
    strength = lookalike._draw_strength(rng, 20_000, effects)
    assert (strength == 0).mean() == pytest.approx(0.2, abs=0.01)
    weak = (strength > 0) & (strength < 0.5)
    assert weak.mean() == pytest.approx(0.3, abs=0.01)
    assert (strength[weak].min(), strength[weak].max()) == pytest.approx((0.1, 0.3), abs=0.01)
    member = np.zeros(2_000, int)
    rngs = streams(0, lookalike.STREAMS)
    shift, _ = lookalike._draw_shifts(rngs, member, 50, replace(effects, null=0.0, weak=0.0))
    edges = (shift[1:] != 0).sum(1)
    assert (edges > np.median(edges)).mean() == pytest.approx(0.1, abs=0.02)


def test_null_targets_are_controls_in_all_but_name(small):
    """Gene by gene, their mean differs from the controls' by its standard error, no more."""
    counts, condition = small.cells.counts.numpy(), small.cells.condition
    share = counts / counts.sum(1, keepdims=True)
    control = share[condition == 0]

    def z_scores(names):
        own = share[torch.isin(condition, small.design.index(names))]
        error = np.hypot(own.std(0) / np.sqrt(len(own)), control.std(0) / np.sqrt(len(control)))
        return (own.mean(0) - control.mean(0)) / error

    assert len(small.nulls) > 10
    null = z_scores(small.nulls)
    assert np.abs(null).max() < 4.5
    assert null.std() < 1.3
    moved = small.clusters[max(small.pathways, key=lambda name: len(small.pathways[name]))]
    assert z_scores([name for name in moved if name not in small.nulls]).std() > 2


def test_programs_are_sparse_and_every_latent_has_genes(small):
    per_gene = (small.decoder.programs != 0).sum(0)
    assert (per_gene.min(), per_gene.max()) == (1, 3)
    largest = small.decoder.programs.abs().argmax(0)
    assert set(largest.tolist()) == set(range(8))


def test_the_jacobian_is_the_derivative(small):
    z = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.autograd.functional.jacobian(
        lambda one: small.decoder.log_share(one).sum(0), z
    )
    assert torch.allclose(small.decoder.jacobian(z), expected.permute(1, 2, 0), atol=1e-10)
    assert torch.allclose(small.decoder.log_share(z).exp().sum(-1), torch.ones(5).double())


# ------------------------------------------------------------------------- escape and batches


def test_escaped_cells_are_untouched():
    screen = screen_like(**SMALL, template=TEMPLATE, effects=STRONG, escape=0.4, controls=500)
    perturbed = screen.cells.condition > 0
    assert screen.escaped[perturbed].double().mean() == pytest.approx(0.4, abs=0.03)
    assert not screen.escaped[~perturbed].any()
    z = screen.z.numpy()
    assert stats.kstest(z[screen.escaped].ravel(), "norm").pvalue > 1e-3
    touched = (perturbed & ~screen.escaped).numpy()
    residual = z[touched] - screen.shift[screen.cells.condition[touched]].numpy()
    assert stats.kstest(residual.ravel(), "norm").pvalue > 1e-3


def test_batches_multiply_genes_and_the_effect_is_recovered():
    options = {"template": TEMPLATE, "batches": 3, "batch_sd": 0.3, "controls": 12_000}
    screen = screen_like(**SMALL, **options)
    effect = screen.batch_effect.numpy()
    assert effect.std() == pytest.approx(0.3, abs=0.05)
    counts, batch = of_controls(screen), screen.batch[screen.cells.condition == 0].numpy()
    profile = np.stack([counts[batch == b].sum(0) / counts[batch == b].sum() for b in range(3)])
    seen = np.log(profile[1] / profile[0])
    assert stats.pearsonr(seen, effect[1] - effect[0]).statistic > 0.98
    assert not screen_like(**SMALL, template=TEMPLATE).batch_effect.any()


@pytest.mark.parametrize(("confounding", "low", "high"), [(0.0, 0.2, 0.4), (1.0, 1.0, 1.0)])
def test_batches_are_balanced_or_confounded_with_targets(confounding, low, high):
    screen = screen_like(**SMALL, template=TEMPLATE, batches=4, confounding=confounding)
    table = pd.crosstab(screen.cells.condition.numpy(), screen.batch.numpy())
    largest = (table.max(1) / table.sum(1)).mean()
    assert low <= largest <= high + 0.05
    assert len(table.columns) == 4


# --------------------------------------------------------------------------------- determinism


def test_same_seed_same_screen():
    first, again = (screen_like(**SMALL, template=TEMPLATE, seed=1) for _ in range(2))
    other = screen_like(**SMALL, template=TEMPLATE, seed=2)
    parts = [(s.cells.counts, s.cells.condition, s.z, s.shift) for s in (first, again, other)]
    assert digest(*parts[0]) == digest(*parts[1]) != digest(*parts[2])


@pytest.mark.parametrize(
    "change", [{"n_cells": 900}, {"escape": 0.3}, {"batches": 3}, {"controls": 200}]
)
def test_mechanisms_do_not_depend_on_how_they_are_sampled(change):
    base = screen_like(**SMALL, template=TEMPLATE, seed=1)
    other = screen_like(**{**SMALL, **change}, template=TEMPLATE, seed=1)
    assert torch.equal(base.shift, other.shift)
    assert torch.equal(base.decoder.programs, other.decoder.programs)
    assert torch.equal(base.strength, other.strength)


def test_escape_leaves_the_noise_of_the_latents():
    base = screen_like(**SMALL, template=TEMPLATE, seed=1)
    other = screen_like(**SMALL, template=TEMPLATE, seed=1, escape=0.5)
    assert torch.equal(base.cells.condition, other.cells.condition)
    assert torch.equal(base.z[~other.escaped], other.z[~other.escaped])


def test_cells_without_umis_are_drawn_again():
    thin = Template("thin", np.full(5, 0.3), np.full(5, 0.5), np.array([1.0, 2.0]))
    sizes = {"n_targets": 5, "n_cells": 400, "n_genes": 5, "n_latent": 2}
    assert screen_like(**sizes, template=thin).cells.library.min() >= 1


# -------------------------------------------------------------------------------- names, lists


def lists(**changes):
    targets = [f"A{n}" for n in range(60)]
    parts = {
        "targets": [*targets, "A3"],
        "genes": [f"B{n}" for n in range(119)],
        "pathways": {"one": ["A0", "A1", "A1"], "two": targets[10:20]},
    }
    return SimpleNamespace(**{**parts, **changes})


def test_given_symbols_are_used():
    screen = screen_like(**SMALL, template=TEMPLATE, lists=lists())
    assert screen.design.targets == tuple(f"A{n}" for n in range(60))
    assert screen.genes == (*[f"B{n}" for n in range(119)], "B0")
    assert screen.lists.genes == tuple(f"B{n}" for n in range(119))
    assert screen.pathways == {"one": ("A0", "A1"), "two": tuple(f"A{n}" for n in range(10, 20))}
    assert sum(map(len, screen.clusters.values())) == 60


def test_given_clusters_are_used_for_what_no_pathway_has():
    given = {"a": ["A0", "A2", "A2", "A3"], "b": ["A0", "A1"], "c": ["A3", "A4"]}
    _, clusters = lookalike._symbols(lists(clusters=given), None, 60, 120)
    assert clusters["one"] == ("A0", "A1")
    assert (clusters["a"], clusters["c"]) == (("A2", "A3"), ("A4",))
    assert "b" not in clusters
    members = [target for group in clusters.values() for target in group]
    assert sorted(members) == sorted(f"A{n}" for n in range(60))


def test_clusters_of_the_same_name_are_told_apart():
    given = {"one": ["A0", "A1", "A2"], "cluster-04": ["A3"]}
    _, clusters = lookalike._symbols(lists(clusters=given), None, 60, 120)
    assert (clusters["one"], clusters["one (rest)"]) == (("A0", "A1"), ("A2",))
    assert clusters["cluster-04"] == ("A3",)
    members = [target for group in clusters.values() for target in group]
    assert sorted(members) == sorted(f"A{n}" for n in range(60))


def test_invented_names_are_told_from_real_ones(small):
    assert small.design.targets[:2] == ("T01", "T02")
    assert small.genes[-1] == "G120"
    assert all(name.endswith("-like") for name in small.pathways)


def test_pathways_may_be_chosen():
    screen = screen_like(**SMALL, template=TEMPLATE, pathways={"left": 5, "right": 7})
    assert {name: len(group) for name, group in screen.pathways.items()} == {"left": 5, "right": 7}


# ---------------------------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_targets": 0}, "n_targets=0, .* at least 1 of each"),
        ({"controls": -1}, "controls=-1; .* 0 controls or more"),
        ({"n_latent": 121}, "n_latent=121, n_genes=120; every latent needs a gene"),
        ({"n_cells": 100}, "n_cells=100 for n_targets=60; .* at least 7 times"),
        ({"escape": 1.5}, "escape is 1.5; expected a share"),
        ({"explained": -0.1}, "explained is -0.1; expected a share"),
        ({"batch_sd": -1.0}, "batch_sd is -1.0; expected a standard deviation"),
        ({"confounding": 0.5}, "confounding=0.5 with one batch"),
        ({"pathways": {"one": 61}}, "pathways of sizes .* for n_targets=60"),
        ({"pathways": {"one": 0}}, "pathways of sizes .* at least 1"),
        ({"lists": lists(), "pathways": {"one": 3}}, "both lists and pathways"),
        ({"lists": lists(), "n_targets": 59}, "have 60 targets and 119 genes; pass n_targets=60"),
        ({"lists": lists(), "n_genes": 121}, r"n_genes=119 or one more \(got 60 and 121\)"),
        ({"lists": lists(pathways={"one": ["C1"]})}, r"none of their targets \(\['C1'\]\)"),
        ({"lists": lists(pathways={"a": ["A1"], "b": ["A1"]})}, "or overlap"),
    ],
)
def test_bad_requests_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        screen_like(**{**SMALL, **change}, template=TEMPLATE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"smallest": 2.0, "size": 1.0}, "smallest=2.0, size=1.0"),
        ({"spread": -1.0}, "spread=-1.0, deviation=0.15; expected standard deviations"),
        ({"weak": 0.6, "null": 0.6}, "weak=0.6, null=0.6; expected shares"),
    ],
)
def test_bad_effects_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Effects(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dispersion": np.ones(3)}, r"means have shape \(2,\), dispersions \(3,\)"),
        ({"mean": np.array([1.0, 0.0])}, "'bad' has a mean that is not positive"),
        ({"library": np.empty(0)}, "'bad' has a library that is not positive, or none"),
        ({"library": np.ones(4)}, "'bad' has 1 UMIs per cell, but its gene means sum to 2"),
    ],
)
def test_bad_templates_are_refused(change, message):
    good = {"mean": np.ones(2), "dispersion": np.ones(2), "library": np.full(4, 2.0)}
    with pytest.raises(ValueError, match=message):
        Template("bad", **{**good, **change})


def test_a_template_needs_controls_with_umis():
    obs = pd.DataFrame({"target": ["a", "b", "b"]}, index=list("xyz"))
    adata = anndata.AnnData(np.ones((3, 2), np.float32), obs=obs)
    with pytest.raises(ValueError, match=r"from 0 cells with obs\['target'\] == 'non-targeting'"):
        template_of(adata)
    with pytest.raises(ValueError, match="the 0 genes with a mean of 5.0 or more"):
        template_of(adata, control="b", min_mean=5.0)
