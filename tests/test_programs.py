"""Programs of latents, and what they are held against: derivatives, urns, planted blocks."""

import contextlib
import gzip
import itertools
import math
import os
import socket
import sys
import threading
import time
from types import SimpleNamespace

import jaxtyping
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from smslib import metrics, plotting, programs
from smslib.data import Cells, Design
from smslib.evaluate import latents
from smslib.model import SMSVAE
from smslib.programs import Programs
from smslib.train import TrainConfig, fit

GENES = [f"G{number}" for number in range(7)]


def make_model(**options):
    options = {"n_latent": 3, "n_hidden": 9} | options
    model = SMSVAE.preset("ivae", Design.single_target(["a", "b"]), len(GENES), **options)
    return model.double()


def make_cells(n=11, *, seed=0):
    counts = np.random.default_rng(seed).poisson(5.0, (n, len(GENES))) + 1.0
    return Cells(torch.from_numpy(counts), torch.arange(n) % 3)


def log_rate(model, z):
    return model.decode(z, torch.ones(len(z), 1).double()).log_mean


def make_programs(weights, genes=None):
    weights = np.asarray(weights, dtype=float)
    names = genes or [f"G{number}" for number in range(weights.shape[1])]
    return Programs(weights, tuple(names), np.zeros_like(weights))


# ---------------------------------------------------------------- Jacobians


@pytest.mark.parametrize("options", [{}, {"activation": "relu"}, {"n_layers_decoder": 3}])
def test_closed_form_and_double_backward_are_the_jacobian(options):
    model, z = make_model(**options), torch.randn(5, 3).double()
    closed = programs._slopes_of(model)(z)
    general = programs._by_autograd(programs._log_rates(model), z)
    one_by_one = torch.stack(
        [
            torch.autograd.functional.jacobian(lambda x: log_rate(model, x[None])[0], row)
            for row in z
        ]
    ).transpose(1, 2)
    torch.testing.assert_close(closed, one_by_one)
    torch.testing.assert_close(general, one_by_one)


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_normalised_decoders_are_read_in_evaluation_mode_and_left_alone(norm):
    model, cells = make_model(norm=norm), make_cells()
    with torch.no_grad():
        for _ in range(20):
            model.decode(torch.randn(40, 3).double(), torch.ones(40, 1).double())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = programs.jacobian(model, cells, genes=GENES)
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model.eval()
    z, step = torch.from_numpy(latents(model, cells)), 1e-6
    for latent in range(3):
        up, down = z.clone(), z.clone()
        up[:, latent] += step
        down[:, latent] -= step
        with torch.no_grad():
            slope = ((log_rate(model, up) - log_rate(model, down)) / (2 * step)).numpy()
        np.testing.assert_allclose(found.weights[latent], slope.mean(0), atol=1e-7)
        np.testing.assert_allclose(found.spread[latent], slope.std(0), atol=1e-7)


def make_linear_model():
    """No unit ever reaches its kink: logits are z W1' W2' + constants."""
    model = make_model(n_layers_decoder=1)
    with torch.no_grad():
        model.decoder[0].bias.fill_(100.0)
        model.genes.weight.mul_(0.1)
    return model, (model.genes.weight @ model.decoder[0].weight).detach().T.numpy()


def test_programs_of_a_linear_decoder_are_its_weights_centred_by_the_softmax():
    model, weights = make_linear_model()
    cells = make_cells()
    found = programs.jacobian(model, cells, genes=GENES)
    with torch.no_grad():
        share = log_rate(model, torch.from_numpy(latents(model, cells))).exp().numpy()
    centred = weights[None] - (share @ weights.T)[:, :, None]
    np.testing.assert_allclose(found.weights, centred.mean(0), rtol=1e-9)
    np.testing.assert_allclose(found.spread, centred.std(0), atol=1e-9)
    np.testing.assert_allclose(  # between genes, nothing but the weights
        found.weights - found.weights[:, :1], weights - weights[:, :1], rtol=1e-9
    )


@pytest.mark.parametrize("read", [programs.jacobian, programs.integrated_gradients])
def test_blocks_do_not_matter(read):
    model, cells = make_model(), make_cells()
    whole = read(model, cells, genes=GENES, batch_size=100)
    blocks = read(model, cells, genes=GENES, batch_size=4)
    np.testing.assert_allclose(blocks.weights, whole.weights)
    np.testing.assert_allclose(blocks.spread, whole.spread, atol=1e-12)


# ---------------------------------------------------------------- integrated gradients


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_attributions_add_up_to_the_difference_of_log_rates(norm):
    model = make_model(norm=norm).eval()
    z, start = torch.randn(6, 3).double(), torch.randn(3).double()
    parts = programs.attributions(model, z, baseline=start, n_steps=500)
    assert parts.shape == (6, 3, len(GENES))
    with torch.no_grad():
        difference = log_rate(model, z) - log_rate(model, start[None])
    # At a kink the rule of integration is off by about the width of a step.
    assert (parts.sum(1) - difference).abs().max() < 0.01 * difference.abs().max()


def test_attributions_are_captums_own_gene_by_gene():
    from captum.attr import IntegratedGradients

    model, z = make_model(), torch.randn(6, 3).double()
    start = torch.randn(3).double()
    ours = programs.attributions(model, z, baseline=start, n_steps=16)
    method = IntegratedGradients(lambda x: log_rate(model, x))
    for gene in range(len(GENES)):
        theirs = method.attribute(z, start[None], target=gene, n_steps=16)
        torch.testing.assert_close(ours[..., gene], theirs)


def test_both_sides_of_the_baseline_say_the_same():
    """Slopes are constant, so a contribution is slope times distance, whatever the side."""
    model, weights = make_linear_model()
    with torch.no_grad():
        model.genes.weight.sub_(model.genes.weight.mean(0))
        model.genes.weight.mul_(1e-4)  # shares of genes hardly move, neither do the slopes
    cells = make_cells()
    z = latents(model, cells)
    start = torch.from_numpy(z).mean(0)
    found = programs.integrated_gradients(model, cells, genes=GENES, baseline=start)
    distance = np.abs(z - start.numpy())
    slope = programs.jacobian(model, cells, genes=GENES).weights
    np.testing.assert_allclose(found.weights, distance.mean(0)[:, None] * slope, rtol=1e-2)
    assert np.abs(found.weights).max() > 0


def test_the_baseline_is_the_mean_control():
    model, cells = make_model(), make_cells()
    control = torch.from_numpy(latents(model, cells)[cells.condition.numpy() == 0]).mean(0)
    ours = programs.integrated_gradients(model, cells, genes=GENES)
    told = programs.integrated_gradients(model, cells, genes=GENES, baseline=control)
    np.testing.assert_array_equal(ours.weights, told.weights)


def test_without_its_packages_the_way_out_is_named(monkeypatch):
    for name in ("captum.attr", "gseapy"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"needs captum.attr, .*pip install 'smslib\[data\]'"):
        programs.integrated_gradients(make_model(), make_cells(), genes=GENES)
    with pytest.raises(ImportError, match=r"needs gseapy, .*pip install 'smslib\[data\]'"):
        programs._prerank({"A": 1.0}, {}, {})


def test_no_control_no_baseline():
    cells = make_cells()
    with pytest.raises(ValueError, match="none of the 7 cells is a control"):
        programs.integrated_gradients(make_model(), cells[cells.condition > 0], genes=GENES)


def test_a_baseline_is_one_cell():
    told = {"genes": GENES, "baseline": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"baseline has shape \(2,\); expected \(3,\)"):
        programs.integrated_gradients(make_model(), make_cells(), **told)


@pytest.mark.parametrize("read", [programs.jacobian, programs.integrated_gradients])
@pytest.mark.parametrize("odd", ["names", "counts", "cells"])
def test_genes_have_to_be_the_models(read, odd):
    cells = make_cells()
    if odd == "counts":
        cells = Cells(cells.counts[:, :-1], cells.condition)
    cells = cells[:0] if odd == "cells" else cells
    genes = GENES[:-1] if odd == "names" else GENES
    with pytest.raises(ValueError, match="expected at least one cell, .* model's 7 genes"):
        read(make_model(), cells, genes=genes)


def test_gene_names_differ():
    with pytest.raises(ValueError, match=r"genes repeat: \['G0'\]; .*var_names_make_unique"):
        programs.jacobian(make_model(), make_cells(), genes=[*GENES[:-1], "G0"])


def test_genes_have_an_order(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside the tests
    with pytest.raises(ValueError, match="genes is a set, .* no order; expected a seq"):
        programs.jacobian(make_model(), make_cells(), genes=set(GENES))


# ---------------------------------------------------------------- Programs


def test_top_genes_by_hand():
    found = make_programs([[0.5, -3.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]], list("abcd"))
    assert found.top(0) == ("b", "d", "a")
    assert found.top(0, n=2, sign=0) == ("b", "d")
    assert found.top(0, sign=1) == ("d", "a")
    assert found.top(0, sign=-1) == ("b",)
    assert found.top(1) == ()
    assert len(found) == 2


def test_rare_genes_lose_their_place_to_common_ones():
    raw = Programs(np.array([[4.0, 1.0]]), ("rare", "common"), np.ones((1, 2)))
    scaled = raw.scaled([0.01, 4.0])
    assert scaled.weights.tolist() == [[pytest.approx(0.4), 2.0]]
    assert scaled.spread.tolist() == [[pytest.approx(0.1), 2.0]]
    assert (raw.top(0), scaled.top(0)) == (("rare", "common"), ("common", "rare"))


def test_scaled_slopes_are_the_noise_that_counts_have():
    """The root of the Fisher information of n cells is one over the error of a log mean."""
    mean, n_cells, rng = 9.0, 400, np.random.default_rng(0)
    estimates = np.log(rng.poisson(mean, (2000, n_cells)).mean(1))
    one = make_programs(np.ones((1, 1))).scaled([mean])
    assert 1 / (estimates.std() * n_cells**0.5) == pytest.approx(one.weights.item(), rel=0.05)


def test_moved_genes_by_hand():
    found = Programs(np.array([[1.0, 2.0], [0.0, -1.0]]), ("a", "b"), np.array([[3.0, 0], [4, 1]]))
    moved = found.moved(np.array([[1.0, 1.0], [0.0, 0.0], [2.0, 0.0]]))
    assert moved.weights.tolist() == [[1, 1], [0, 0], [2, 4]]
    assert moved.spread.tolist() == [[5, 1], [0, 0], [6, 0]]
    assert moved.genes == ("a", "b")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: p.scaled([1.0]), ValueError, r"mean_counts have shape \(1,\)"),
        (lambda p: p.scaled([1.0, -1.0]), ValueError, r"start \[1.0, -1.0\]; expected 2 non-neg"),
        (
            lambda p: p.moved(np.ones((2, 3))),
            ValueError,
            r"shape \(2, 3\); expected \(n_targets, 2\)",
        ),
        (lambda p: p.top(2), IndexError, "no latent 2; expected 0 to 1"),
        (lambda p: p.top(-1), IndexError, "no latent -1"),
        (lambda p: p.top(0, sign=2), ValueError, r"sign=2; expected -1 \(down\)"),
        (lambda p: Programs(p.weights, ("a",), p.spread), ValueError, r"expected \(n_latent, 1\)"),
        (lambda p: Programs(p.weights, ("a", "a"), p.spread), ValueError, "genes repeat"),
        (lambda p: Programs(p.weights * np.nan, p.genes, p.spread), ValueError, "not finite"),
    ],
)
def test_programs_refuse(call, error, message):
    with pytest.raises(error, match=message):
        call(make_programs(np.ones((2, 2))))


# ---------------------------------------------------------------- GMT files


def write(tmp_path, content):
    path = tmp_path / "sets.gmt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_gmt_file_by_hand(tmp_path):
    text = "\ufeffONE\thttp://x\tA\tB\tA\r\n\nTWO WORDS, ONE COMMA\t\tHLA-A\tC1orf1\t\t\n"
    found = programs.read_gmt(write(tmp_path, text))
    assert found == {"ONE": ("A", "B"), "TWO WORDS, ONE COMMA": ("HLA-A", "C1orf1")}
    assert list(found) == ["ONE", "TWO WORDS, ONE COMMA"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("A\tx\tG1\nB\tx\n", r"line 2: 2 fields between tabs; expected at least three.*'B\\tx'"),
        ("A x G1 G2\n", "line 1: 1 fields"),
        ("A\tx\tG1\n\tx\tG1\n", "line 2: field 1 is empty"),
        ("A\tx\tG1\t\tG2\n", "line 1: field 4 is empty"),
        ("A\tx\tG1\nB\tx\tG1\n\nA\tx\tG2\n", "line 4: set 'A' stands in line 1 already"),
        ("A\tx\tSTAT1,1.0\n", "line 1: 'STAT1,1.0' is no gene symbol"),
        ("A, or B\tx\tSTAT1,1.0\n", "line 1: 'STAT1,1.0' is no gene symbol"),
        ("A\tx\tG1\nB\tx\tG\x001\n", r"line 2: 'G\\x001' is no gene symbol"),
        ("A\x07\tx\tG1\n", r"line 1: 'A\\x07' is no gene symbol"),
        (b"A\tx\tG1\nB\tx\t\xff\xfe\n", "line 2: byte 0xff is not UTF-8"),
        (gzip.compress(b"A\tx\tG1\n", mtime=0), "compressed by gzip; decompress it first"),
        ("", "holds no gene sets"),
        ("\n \n", "holds no gene sets"),
    ],
)
def test_odd_lines_are_refused_by_number(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        programs.read_gmt(write(tmp_path, content))


SYMBOLS = st.text("ABCXYZ0189-._/", min_size=1, max_size=8)


@given(st.dictionaries(SYMBOLS, st.lists(SYMBOLS, min_size=1, max_size=5), min_size=1))
def test_gmt_files_are_read_as_they_were_written(tmp_path_factory, sets):
    lines = ["\t".join([name, "from nowhere", *genes]) for name, genes in sets.items()]
    path = write(tmp_path_factory.mktemp("gmt"), "\n".join(lines))
    assert programs.read_gmt(path) == {k: tuple(dict.fromkeys(v)) for k, v in sets.items()}


@given(st.binary(max_size=60) | st.text("\t\nAB,\x00 ", max_size=30).map(str.encode))
def test_any_file_is_read_or_refused(tmp_path_factory, content):
    path = write(tmp_path_factory.mktemp("gmt"), content)
    with contextlib.suppress(ValueError):  # but no other error
        found = programs.read_gmt(path)
        assert found
        assert all(name and genes and all(genes) for name, genes in found.items())


# ---------------------------------------------------------------- enrichment of lists

MEASURED = [f"M{number}" for number in range(20)]


def test_lists_are_drawn_from_an_urn():
    sets = {
        "half": [*MEASURED[:5], "unmeasured"],
        "none": MEASURED[15:],
        "small": MEASURED[:2],
        "everything": MEASURED,
    }
    lists = {"x": MEASURED[:3] + MEASURED[8:10], 7: MEASURED[4:12]}
    found = programs.enrich(lists, sets, background=MEASURED).set_index(["query", "set"])
    assert set(found.index) == set(itertools.product(["x", 7], ["half", "none"]))
    first = found.loc[("x", "half")]
    # At least 3 of the set's 5 among 5 drawn out of 20.
    ways = sum(math.comb(5, k) * math.comb(15, 5 - k) for k in (3, 4, 5))
    assert first["p_value"] == pytest.approx(ways / math.comb(20, 5))
    assert first["p_value"] == pytest.approx(stats.hypergeom.sf(2, 20, 5, 5))
    assert (first["set_size"], first["query_size"], first["genes"]) == (5, 5, ("M0", "M1", "M2"))
    assert first["score"] > 1
    second = found.loc[(7, "half")]
    assert second["p_value"] == pytest.approx(stats.hypergeom.sf(0, 20, 5, 8))
    assert found.loc[("x", "none"), ["p_value", "score"]].tolist() == [1, 0]
    adjusted = stats.false_discovery_control(found["p_value"])  # over both lists together
    np.testing.assert_allclose(found["q_value"], adjusted)
    assert first["q_value"] == pytest.approx(4 * first["p_value"])
    assert found["p_value"].is_monotonic_increasing


def test_the_background_counts():
    """What is enriched in the genome need not be among the genes that were measured."""
    sets, lists = {"s": MEASURED[:10]}, {"x": MEASURED[:5]}
    genome = [*MEASURED, *(f"unmeasured{number}" for number in range(1000))]
    narrow = programs.enrich(lists, sets, background=MEASURED[:12])
    wide = programs.enrich(lists, sets, background=genome)
    assert narrow["p_value"].item() > 0.3
    assert wide["p_value"].item() < 1e-6


@pytest.mark.parametrize(
    ("lists", "options", "message"),
    [
        ({"x": ["M1"]}, {}, "lists of genes come without background"),
        ({"x": ["M1", "m2", "ZZZ"]}, {"background": MEASURED}, "'ZZZ'; known: .*'m2'; nearest"),
        (
            {"x": ["M1"]},
            {"background": MEASURED, "min_size": 9},
            r"none of 1 gene sets has 9 to 19",
        ),
        ({"x": ["M1"]}, {"background": MEASURED, "max_size": 2}, r"largest have \[4\]"),
        ({}, {"background": MEASURED}, "nothing to test"),
    ],
)
def test_enrichment_refuses(lists, options, message):
    with pytest.raises(ValueError, match=message):
        programs.enrich(lists, {"s": MEASURED[:4]}, **options)


def test_the_papers_lists_are_gene_sets():
    lists = SimpleNamespace(programs={"P": ("M0", "M1", "M2", "unmeasured")}, pathways={})
    found = programs.enrich({0: MEASURED[:3]}, lists.programs, background=MEASURED)
    assert found["p_value"].item() == pytest.approx(1 / math.comb(20, 3))


# ---------------------------------------------------------------- enrichment of rankings


@pytest.fixture(scope="module")
def ranking():
    """Latent 0 moves the first ten genes up, latent 1 the next ten down, latent 2 nothing."""
    weights = np.random.default_rng(0).normal(size=(3, 200))
    weights[0, :10] += 3
    weights[1, 10:20] -= 3
    weights[2] = 0.0
    names = [f"G{number}" for number in range(200)]
    sets = {"up": names[:10], "down": names[10:20], "other": names[50:60], "tiny": names[:2]}
    return make_programs(weights), sets


def test_rankings_find_their_ends(ranking):
    found = programs.enrich(*ranking).set_index(["query", "set"])
    assert len(found) == 9
    significant = found.index[found["q_value"] < 0.01]
    assert set(significant) == {(0, "up"), (1, "down")}
    assert found.loc[(0, "up"), "score"] > 1.5
    assert found.loc[(1, "down"), "score"] < -1.5
    assert set(found.loc[(0, "up"), "genes"]) <= set(ranking[1]["up"])
    assert (found.loc[2, "p_value"] == 1).all()
    np.testing.assert_allclose(found["q_value"], stats.false_discovery_control(found["p_value"]))
    assert (found["query_size"] == 200).all()
    assert found.loc[(0, "up"), "set_size"] == 10


def test_rankings_are_tested_alike_every_time(ranking):
    pd.testing.assert_frame_equal(programs.enrich(*ranking), programs.enrich(*ranking))


def test_random_sets_get_uniform_p_values():
    rng = np.random.default_rng(0)
    weights = make_programs(rng.normal(size=(1, 150)))
    sets = {f"s{number}": rng.choice(weights.genes, 12, replace=False) for number in range(150)}
    p_value = programs.enrich(weights, sets, n_permutations=1000)["p_value"]
    assert stats.kstest(p_value, "uniform").pvalue > 0.01
    assert (p_value < 0.1).mean() < 0.2


def test_ties_are_no_news(ranking, capfd):
    tied = make_programs(np.round(ranking[0].weights[:1], 0))
    turned = Programs(tied.weights[:, ::-1], tied.genes[::-1], tied.spread)
    pd.testing.assert_frame_equal(
        programs.enrich(tied, ranking[1]), programs.enrich(turned, ranking[1])
    )
    assert capfd.readouterr() == ("", "")


def test_genes_that_a_latent_does_not_move_are_no_finding_whatever_their_names():
    """Names decide the order of the genes before the lot is drawn, and nothing else."""
    weights = make_programs(np.r_[np.random.default_rng(0).normal(size=60), np.zeros(60)][None])
    silent = sorted(weights.genes[60:])
    families = {f"family {n}": silent[6 * n : 6 * n + 6] for n in range(10)}
    p_value = programs.enrich(weights, families, n_permutations=1000)["p_value"]
    assert p_value.min() > 0.1  # by name the outermost family had the smallest one possible


def test_a_set_further_out_than_every_permutation_has_the_smallest_p_value():
    """Where all weights are positive no permutation enriches the lower end."""
    weights = make_programs(np.sort(np.random.default_rng(0).exponential(size=300) + 0.05)[None])
    lowest = {"lowest": weights.genes[:100]}
    found = programs.enrich(weights, lowest, n_permutations=1000).loc[0]
    assert found["p_value"] == pytest.approx(1 / 501)
    assert np.isnan(found["score"])


def test_gseapy_stays_offline_quiet_and_tidy(ranking, monkeypatch, tmp_path, capfd):
    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    programs.enrich(*ranking)  # loads what is loaded once
    threads = threading.active_count(), n_system_threads()
    programs.enrich(*ranking)
    nothing_shared = {"x": ["G100"]}
    programs.enrich(nothing_shared, ranking[1], background=ranking[0].genes)
    assert threading.active_count() == threads[0]
    waited = time.monotonic()
    while n_system_threads() > threads[1] and time.monotonic() < waited + 10:
        time.sleep(0.01)  # gseapy does not wait for its own to end
    assert n_system_threads() <= threads[1]  # one of somebody else's may have ended
    assert list(tmp_path.rglob("*")) == []
    assert capfd.readouterr() == ("", "")


def n_system_threads():
    tasks = "/proc/self/task"
    return len(os.listdir(tasks)) if os.path.isdir(tasks) else 0


# ---------------------------------------------------------------- enrichment of targets


def test_groups_of_targets_by_hand():
    targets = list("abcdefgh")
    gates = np.zeros((8, 2))
    gates[[0, 1, 2], 0] = 0.9
    gates[[2, 5], 1] = 0.6
    groups = {"abc": ["a", "b", "c", "unperturbed"], "gh": ["g", "h"], "elsewhere": ["z"]}
    found = programs.enrich_targets(gates, targets, groups).set_index(["latent", "group"])
    assert len(found) == 4
    first = found.loc[(0, "abc")]
    assert first["p_value"] == pytest.approx(1 / math.comb(8, 3))
    assert (first["group_size"], first["n_open"], first["n_shared"]) == (3, 3, 3)
    assert first["odds_ratio"] == np.inf
    # One or two of the two open among three of eight.
    ways = 3 * 5 + 3
    assert found.loc[(1, "abc"), "p_value"] == pytest.approx(ways / math.comb(8, 2))
    assert found.loc[(0, "gh"), "p_value"] == 1
    np.testing.assert_allclose(found["q_value"], stats.false_discovery_control(found["p_value"]))


def test_what_is_open_is_a_matter_of_the_threshold():
    gates = np.array([[0.4], [0.4], [0.0], [0.0]])
    tell = {"targets": list("abcd"), "groups": {"ab": ["a", "b"]}}
    assert programs.enrich_targets(gates, **tell)["n_open"].item() == 0
    assert programs.enrich_targets(gates, **tell, threshold=0.3)["n_shared"].item() == 2


def test_gates_may_be_a_table():
    gates = pd.DataFrame([[0.9, 0.1], [0.2, 0.8], [0.7, 0.6]], index=list("abc"))
    groups = {"ab": ["a", "b"]}
    found = programs.enrich_targets(gates, list(gates.index), groups)
    expected = programs.enrich_targets(gates.to_numpy(), list("abc"), groups)
    pd.testing.assert_frame_equal(found, expected)


def test_targets_and_groups_have_to_fit():
    with pytest.raises(ValueError, match=r"gates have shape \(2, 1\); expected \(3, n_latent\)"):
        programs.enrich_targets(np.zeros((2, 1)), list("abc"), {"g": ["a"]})
    with pytest.raises(ValueError, match=r"none of the 1 groups has one of the 2 targets \(a, b"):
        programs.enrich_targets(np.zeros((2, 1)), list("ab"), {"g": ["A"]})


# ---------------------------------------------------------------- clusters


def planted(rng, n=6):
    gates = np.kron(np.eye(3), np.ones((n, 2))) + rng.normal(0, 0.05, (3 * n, 6))
    return gates, ["x"] * n + ["y"] * n + ["z"] * n


def test_planted_blocks_are_clusters():
    rng = np.random.default_rng(0)
    gates, groups = planted(rng)
    mixed = rng.permutation(len(gates))
    found = programs.cluster(gates[mixed], [groups[row] for row in mixed])
    assert (found.purity, found.ari, found.p_value) == (1, 1, 1 / 1000)
    drawn = np.array(groups)[mixed[found.targets]]
    assert (drawn[1:] != drawn[:-1]).sum() == 2  # each block in one piece
    assert sorted(found.latents // 2) == [0, 0, 1, 1, 2, 2]
    assert all(abs(a - b) == 1 for a, b in found.latents.reshape(3, 2))
    assert len(set(zip(found.labels, np.array(groups)[mixed], strict=True))) == 3


def test_scores_of_clusters_by_hand():
    gates = np.array([[0.0, 0], [0, 0.1], [0, 0.2], [9, 9], [9, 9.1], [9, 9.2]])
    found = programs.cluster(gates, ["x", "x", "y", "y", "y", None])
    assert found.purity == pytest.approx(4 / 5)
    # Pairs of five: together in both 2, in clusters 3 + 1, in groups 1 + 3, of 10.
    assert found.ari == pytest.approx((2 - 4 * 4 / 10) / (4 - 4 * 4 / 10))


def test_the_p_value_of_clusters_is_that_of_all_relabellings():
    gates = np.array([[0.0, 0], [0, 0.1], [0, 0.2], [9, 9], [9, 9.1]])
    groups = ["x", "x", "y", "y", "y"]
    cluster_of = np.array([0, 0, 0, 1, 1])

    def together(labels):
        pairs = itertools.combinations(range(5), 2)
        return sum(cluster_of[i] == cluster_of[j] and labels[i] == labels[j] for i, j in pairs)

    relabelled = [together(labels) for labels in itertools.permutations(groups)]
    exact = np.mean(np.array(relabelled) >= together(groups))
    found = programs.cluster(gates, groups, n_permutations=4000)
    assert 0 < exact < 1
    assert found.p_value == pytest.approx(exact, abs=4 * (exact * (1 - exact) / 4000) ** 0.5)


def test_clusters_of_noise_mean_nothing():
    rng = np.random.default_rng(1)
    found = [
        programs.cluster(rng.random((18, 6)), planted(rng)[1], n_permutations=99, seed=seed)
        for seed in range(30)
    ]
    assert np.mean([one.p_value <= 0.1 for one in found]) < 0.3
    assert abs(np.mean([one.ari for one in found])) < 0.1


@pytest.mark.parametrize(
    ("shape", "groups", "message"),
    [
        ((3, 2), ["x", "x", None], "1 known groups; expected two or more"),
        ((3, 1), ["x", "y", "y"], r"shape \(3, 1\)"),
        ((3, 2), ["x", "y"], r"expected \(2, n_latent\)"),
    ],
)
def test_too_little_to_cluster(shape, groups, message):
    with pytest.raises(ValueError, match=message):
        programs.cluster(np.zeros(shape), groups)


# ---------------------------------------------------------------- recurrence


def disguised(weights, rng):
    """Return the same programs in another order, with other signs and scales, a bit off."""
    order = rng.permutation(len(weights))
    scale = rng.choice([-1, 1], len(weights)) * rng.uniform(0.5, 2, len(weights))
    noise = rng.normal(0, 0.1, weights.shape)
    return (scale[:, None] * (weights + noise))[order], order


def test_programs_recur_in_any_disguise_and_noise_does_not():
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(4, 100))
    runs, gates = [weights], [np.array([[1, 0, 0, 1], [0, 1, 0, 1]]) * 0.9]
    for number in range(4):
        other, order = disguised(weights, rng)
        other[list(order).index(3)] = rng.normal(size=100)  # the last one is of this run alone
        if number < 2:
            other[list(order).index(2)] = rng.normal(size=100)
        opened = gates[0][:, order].copy()
        opened[1, list(order).index(1)] = 0.9 * (number < 1)  # the second target's gate is a fluke
        runs.append(other)
        gates.append(opened)
    found = programs.recurrence(
        [make_programs(run) for run in runs], gates=gates, targets=["a", "b"]
    )
    assert found["share"].tolist() == [1, 1, 0.5, 0]
    assert found["recurs"].tolist() == [True, True, False, False]
    assert found["targets"].tolist()[:3] == [("a",), (), ()]
    assert found["finding"].tolist() == [True, False, False, False]
    assert (found["median_r"][:2] > 0.98).all()
    assert (found["null_r"] < 0.4).all()


def test_the_null_is_that_of_matched_noise():
    """99th percentile of one correlation of 400 normal pairs: 2.33 (two-sided 2.58) / 20."""
    rng = np.random.default_rng(0)
    runs = [make_programs(rng.normal(size=(1, 400))) for _ in range(2)]
    found = programs.recurrence(runs, n_permutations=2000)
    assert found["null_r"][0] == pytest.approx(2.576 / 20, rel=0.08)


def test_gate_matrices_recur_too_unless_chance_is_as_good():
    rng = np.random.default_rng(0)
    gates = (rng.random((40, 3)) < 0.2).astype(float)
    found = programs.recurrence([gates, gates[:, [2, 0, 1]]])
    assert found["share"].tolist() == [1, 1, 1]
    assert "finding" not in found
    few = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])  # three rows match by chance perfectly
    by_chance = programs.recurrence([few, few])
    assert by_chance["null_r"][0] == pytest.approx(1)
    moved = programs.recurrence([few, few + [[0.1, 0], [0.3, 0], [0, 0.2]]])
    assert not moved["recurs"].any()


def test_latents_without_partner_do_not_recur():
    rng = np.random.default_rng(0)
    wide = rng.normal(size=(3, 50))
    gates = [np.full((1, 3), 0.9), np.full((1, 1), 0.9)]
    runs = [make_programs(wide), make_programs(wide[1:2])]
    found = programs.recurrence(runs, gates=gates, targets=["a"])
    assert found["share"].tolist() == [0, 1, 0]
    assert found["targets"].tolist() == [(), ("a",), ()]


def test_what_targets_do_recurs_although_latents_turn():
    """Two targets move the same two latents; each seed has turned them by another angle."""
    rng = np.random.default_rng(0)
    weights, shifts = rng.normal(size=(2, 80)), np.array([[3.0, 1.0], [1.0, 3.0], [0.0, 0.0]])
    runs, effects = [], []
    for angle in (0.0, np.pi / 4, np.pi / 4):
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        runs.append(make_programs(turn @ weights))
        effects.append(runs[-1].moved(shifts @ turn.T))
    assert not programs.recurrence(runs)["recurs"].any()
    found = programs.recurrence(effects, matched=True)
    assert found["recurs"].tolist() == [True, True, False]  # the third does nothing
    np.testing.assert_allclose(found["median_r"], [1, 1, 0])
    swapped = [effects[0], *(make_programs(each.weights[[1, 0, 2]]) for each in effects[1:])]
    assert not programs.recurrence(swapped, matched=True)["recurs"].any()


@pytest.mark.parametrize(
    ("runs", "options", "message"),
    [
        ([np.ones((3, 2))], {}, r"got 1 run\(s\); expected two or more seeds"),
        ([np.ones((3, 2)), np.ones((4, 2))], {}, r"runs have \[3, 4\] genes or targets"),
        (
            [np.ones((3, 2)), np.ones((3, 2))],
            {"gates": [np.ones((3, 2))], "targets": "abc"},
            r"gates have shapes \[\(3, 2\)\]; expected \[\(3, 2\), \(3, 2\)\]",
        ),
    ],
)
def test_runs_have_to_be_comparable(runs, options, message):
    with pytest.raises(ValueError, match=message):
        programs.recurrence(runs, **options)


def test_programs_over_other_genes_are_not_compared():
    runs = [make_programs(np.eye(3)), make_programs(np.eye(3), list("abc"))]
    with pytest.raises(ValueError, match="differ in their names or order"):
        programs.recurrence(runs)


# ---------------------------------------------------------------- a screen with known programs


PLANTED, BLOCK = 3, 8  # latents, and genes that each of them moves


@pytest.fixture(scope="module")
def planted_screen():
    """Each latent moves eight genes of 32 up, and is moved by four targets of twelve.

    The models are told which targets move the same latent, the second one in another order:
    whether a short fit finds out is not the question here.
    """
    rng = np.random.default_rng(0)
    condition = np.repeat(np.arange(13), 60)
    shift = np.vstack([np.zeros(PLANTED), np.kron(np.eye(PLANTED), np.full((4, 1), 4.0))])
    z = shift[condition] + rng.normal(size=(len(condition), PLANTED))
    weights = np.kron(np.eye(PLANTED), np.full((1, BLOCK), 0.4))
    logits = np.hstack([z @ weights, np.zeros((len(z), BLOCK))])
    rate = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    cells = Cells(torch.from_numpy(rng.poisson(1000 * rate)).float(), torch.from_numpy(condition))
    design = Design.single_target([f"target{number}" for number in range(12)])
    models = []
    for seed in range(2):
        size = {"n_latent": PLANTED, "n_hidden": 16, "newton": True}
        model = SMSVAE.preset("svae+", design, 32, seed=seed, **size)
        model.standardise(cells)
        told = torch.from_numpy(np.roll(shift[1:], seed, axis=1)).float()
        with torch.no_grad():
            model.prior.gate.logit.copy_(2.5 * told - 5.0)
            model.prior.slab.mean.copy_(told)
        config = TrainConfig(
            epochs=15, batch_size=60, learning_rate=1e-2, warmup_epochs=1, seed=seed
        )
        fit(model, cells, config, progress=False)
        models.append(model)
    return cells, models


PLANTED_GENES = [f"G{number}" for number in range(32)]


def test_planted_programs_are_recovered(planted_screen):
    cells, models = planted_screen
    found = [programs.jacobian(model, cells, genes=PLANTED_GENES) for model in models]
    blocks = [set(PLANTED_GENES[BLOCK * k : BLOCK * (k + 1)]) for k in range(PLANTED)]
    for each in found:
        ends = [set(each.top(k, n=BLOCK, sign=sign)) for k in range(PLANTED) for sign in (1, -1)]
        assert all(block in ends for block in blocks)
    gates = [model.prior.probabilities() for model in models]
    targets = models[0].prior.targets
    table = programs.recurrence(found, gates=gates, targets=targets)
    assert table["finding"].all()
    told = {targets[4 * k : 4 * (k + 1)] for k in range(PLANTED)}
    assert set(table["targets"]) == told
    assert (
        programs.enrich(found[0], {str(k): block for k, block in enumerate(blocks)})["q_value"]
        < 0.05
    ).sum() >= PLANTED


def test_both_kinds_of_programs_tell_the_same(planted_screen):
    cells, (model, _) = planted_screen
    slopes = programs.jacobian(model, cells, genes=PLANTED_GENES)
    parts = programs.integrated_gradients(model, cells[::4], genes=PLANTED_GENES)
    assert np.diag(metrics.correlations(slopes.weights.T, parts.weights.T)).min() > 0.95


# ---------------------------------------------------------------- figures


def test_programs_are_white_at_zero():
    weights = np.array([[0.0, -2.0, 1.0], [0.5, 0.0, 0.0]])
    ax = plotting.programs(weights, genes=["A", "B", "C"], latents=["first", 7])
    (image,) = ax.get_images()
    assert np.asarray(image.get_array()).tolist() == weights.T.tolist()
    assert image.get_clim() == (-2, 2)
    assert min(image.cmap(image.norm(0.0))[:3]) > 0.95
    assert [text.get_text() for text in ax.get_yticklabels()] == ["A", "B", "C"]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["first", "7"]
    nothing = plotting.programs(np.zeros((1, 2)), genes=["A", "B"])
    assert nothing.get_images()[0].get_clim() == (-1, 1)
