"""Cuts of the published screens, on small files of their schemas, and the quality of a screen."""

import re
import sys
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import anndata
import numpy as np
import pandas as pd
import pytest
import scanpy
from scipy import sparse, stats

from smslib import perturbseq, prepare, sources, streaming
from smslib.data import from_anndata

TARGETS = ("EXOSC1", "EXOSC2", "LSM5", "SNRPD1")
GENES = ("ACTB", "TBCE", "MYC")
SYMBOLS = ("ACTB", "GAPDH", "TBCE", "KRAS", "TBCE", "MYC")
LISTS = SimpleNamespace(
    targets=TARGETS,
    genes=GENES,
    pathways={
        "exosome": ("EXOSC1", "EXOSC2"),
        "spliceosome": ("LSM5", "SNRPD1", "LSM5"),
        "s40_ribosomal_unit": (),
    },
)


def counts(n_cells: int, n_genes: int, *, mean: float = 2.0, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).poisson(mean, (n_cells, n_genes)).astype(np.float32)


def replogle_file(path, *, host="authors", uns=None, n_cells=60, seed=0):
    """A file of the authors' schema or of scPerturb's: four targets, two others, controls."""
    control = {"authors": "non-targeting", "scperturb": "control"}[host]
    labels = np.array([*TARGETS, "OTHER1", "OTHER2", control])[np.arange(n_cells) % 7]
    ids = pd.Index([f"ENSG0000000{n}" for n in range(len(SYMBOLS))])
    obs = pd.DataFrame(
        {
            "gene": pd.Categorical(labels),
            "gem_group": np.arange(n_cells) % 3,
            "mitopercent": np.linspace(0, 0.2, n_cells),
        },
        index=[f"cell{n}" for n in range(n_cells)],
    )
    var = pd.DataFrame({"gene_name": list(SYMBOLS)}, index=ids)
    if host == "scperturb":
        obs = obs.rename(columns={"gene": "perturbation"})
        marked = [s if s != "TBCE" else f"TBCE_{i}" for s, i in zip(SYMBOLS, ids, strict=True)]
        var = pd.DataFrame({"ensembl_id": list(ids)}, index=marked)
    x = counts(n_cells, len(SYMBOLS), seed=seed)
    anndata.AnnData(X=x, obs=obs, var=var, uns=uns or {}).write_h5ad(path)
    return path, x, labels


def simulated(folder, **options):
    return replogle_file(folder / "source.h5ad", uns={"simulated": {"seed": 3}}, **options)


# ------------------------------------------------------------------------------------ Replogle


@pytest.mark.parametrize("host", ["authors", "scperturb"])
def test_replogle_keeps_the_listed_targets_and_genes(tmp_path, host):
    path, x, labels = replogle_file(tmp_path / "source.h5ad", host=host)
    with pytest.warns(UserWarning, match="differs from the paper: 4 targets instead of 681, 4 ge"):
        out = prepare.replogle(path, lists=LISTS)
    assert out == tmp_path / "source-prepared.h5ad"
    screen = anndata.read_h5ad(out)
    wanted, columns = np.isin(labels, TARGETS), [0, 2, 4, 5]
    np.testing.assert_array_equal(screen.X.toarray(), x[wanted][:, columns])
    assert screen.obs["target"].tolist() == labels[wanted].tolist()
    assert screen.obs["gem_group"].tolist() == (np.flatnonzero(wanted) % 3).tolist()
    assert screen.var_names.tolist() == ["ACTB", "TBCE", "TBCE-1", "MYC"]
    assert screen.var["symbol"].tolist() == ["ACTB", "TBCE", "TBCE", "MYC"]
    assert screen.uns["source"]["file"] == "source.h5ad"
    assert screen.uns["source"]["label"] == {"authors": "gene"}.get(host, "perturbation")


def test_the_pathways_keep_both_names_and_every_target_once(tmp_path):
    assert prepare.pathways(LISTS) == {
        "exosome": ("EXOSC1", "EXOSC2"),
        "spliceosome": ("LSM5", "SNRPD1"),
        "s40_ribosomal_unit": (),
    }
    path, *_ = simulated(tmp_path)
    uns = anndata.read_h5ad(prepare.replogle(path, lists=LISTS)).uns
    assert uns["pathways"]["spliceosome"].tolist() == ["LSM5", "SNRPD1"]
    assert uns["pathway_names"]["s40_ribosomal_unit"].startswith("39S")


def test_the_ledger_says_what_each_rule_left(tmp_path):
    path, _, labels = simulated(tmp_path)
    table = prepare.ledger(prepare.replogle(path, lists=LISTS, controls=5))
    kept = int(np.isin(labels, TARGETS).sum())
    assert table["cells_before"].tolist() == [60, kept, kept + 5, kept + 5]
    assert table["cells_after"].tolist() == [kept, kept + 5, kept + 5, kept + 5]
    assert table["genes_after"].tolist() == [6, 6, 4, 4]
    assert table["conditions_before"].tolist() == [7, 4, 5, 5]
    assert table["conditions_after"].tolist() == [4, 5, 5, 5]
    assert "all kept: ['TBCE']" in table["note"].iloc[2]


def test_a_simulated_source_stays_marked_and_may_differ_from_the_paper(tmp_path):
    path, *_ = simulated(tmp_path)
    out = prepare.replogle(path, lists=LISTS)  # a warning would be an error here
    assert anndata.read_h5ad(out).uns["simulated"]["seed"] == 3
    assert prepare.ledger(out)["note"].iloc[-1].startswith("differs from the paper")


def test_the_published_sizes_are_recognised(tmp_path, monkeypatch):
    assert prepare._PUBLISHED == {"targets": 681, "genes": 1187, "cells": 116_641}
    path, _, labels = replogle_file(tmp_path / "source.h5ad")
    cells = int(np.isin(labels, TARGETS).sum())
    monkeypatch.setattr(prepare, "_PUBLISHED", {"targets": 4, "genes": 4, "cells": cells})
    out = prepare.replogle(path, lists=LISTS, controls=2)
    assert prepare.ledger(out)["note"].iloc[-1] == "sizes as in the paper"


LISTED = sources.data_dir() / "replogle2022_gene_lists.tsv"


@pytest.mark.skipif(not LISTED.exists(), reason=f"{LISTED.name} is not in {LISTED.parent}")
def test_the_papers_lists_give_681_targets_and_1187_columns(tmp_path):
    lists = sources.gene_lists()
    twice = next(symbol for symbol in ("TBCE", "HSPA14") if symbol in lists.genes)
    symbols = [*lists.genes, twice, *(f"extra{n}" for n in range(50))]
    labels = np.repeat([*lists.targets, "EXTRA", "non-targeting"], 2)
    screen = anndata.AnnData(
        X=counts(len(labels), len(symbols), mean=0.2),
        obs=pd.DataFrame({"gene": labels}, index=[f"c{n}" for n in range(len(labels))]),
        var=pd.DataFrame({"gene_name": symbols}, index=[f"E{n}" for n in range(len(symbols))]),
        uns={"simulated": "yes"},
    )
    screen.write_h5ad(tmp_path / "source.h5ad")
    kept = anndata.read_h5ad(prepare.replogle(tmp_path / "source.h5ad", lists=lists))
    assert kept.shape == (2 * 681, 1187)
    sizes = {name: len(group) for name, group in kept.uns["pathways"].items()}
    assert sorted(sizes.values()) == [20, 23, 26, 34, 40, 43, 53, 97]
    assert len(set(np.concatenate(list(kept.uns["pathways"].values())))) == 336


def test_controls_are_drawn_by_seed(tmp_path):
    path, x, labels = simulated(tmp_path, n_cells=200)

    def drawn(number, seed, name):
        out = tmp_path / name
        prepare.replogle(path, lists=LISTS, controls=number, seed=seed, out=out)
        screen = anndata.read_h5ad(out)
        return screen[screen.obs["target"] == perturbseq.CONTROL].obs_names.tolist()

    there = [f"cell{n}" for n in np.flatnonzero(labels == "non-targeting")]
    assert drawn("all", 0, "all.h5ad") == there
    some = drawn(10, 0, "some.h5ad")
    assert len(set(some)) == 10
    assert set(some) < set(there)
    assert drawn(10, 0, "again.h5ad") == some
    assert drawn(10, 1, "other.h5ad") != some


@pytest.mark.parametrize("host", ["authors", "scperturb"])
def test_a_prepared_screen_with_controls_is_read_as_cells(tmp_path, host):
    path, x, labels = simulated(tmp_path, host=host)
    screen = anndata.read_h5ad(prepare.replogle(path, lists=LISTS, controls="all"))
    cells, design = from_anndata(screen, perturbation_key="target", control=perturbseq.CONTROL)
    assert design.conditions == (perturbseq.CONTROL, *TARGETS)
    kept = ~np.isin(labels, ["OTHER1", "OTHER2"])
    np.testing.assert_array_equal(cells.counts.numpy(), x[kept][:, [0, 2, 4, 5]])


@pytest.mark.parametrize("controls", [1, "all"])
def test_controls_that_are_not_there_are_not_promised(tmp_path, controls):
    path, *_ = simulated(tmp_path)
    screen = anndata.read_h5ad(path)
    screen[screen.obs["gene"] != "non-targeting"].copy().write_h5ad(path)
    with pytest.raises(ValueError, match=r"no cell is labelled 'non-targeting' or 'control'"):
        prepare.replogle(path, lists=LISTS, controls=controls)


@pytest.mark.parametrize("controls", [9, -1])
def test_more_controls_than_there_are_cannot_be_drawn(tmp_path, controls):
    path, *_ = simulated(tmp_path)
    with pytest.raises(ValueError, match=f"{controls} controls are asked for, but there are 8;"):
        prepare.replogle(path, lists=LISTS, controls=controls)


def test_controls_are_a_number_or_all(tmp_path):
    path, *_ = simulated(tmp_path)
    for wrong in ("some", True):
        with pytest.raises(ValueError, match=f"controls is {wrong!r}; expected a number or 'all'"):
            prepare.replogle(path, lists=LISTS, controls=wrong)
    out = prepare.replogle(path, lists=LISTS, controls=np.int64(2))
    assert (anndata.read_h5ad(out).obs["target"] == "non-targeting").sum() == 2


def lists(**changes):
    return SimpleNamespace(**{**vars(LISTS), **changes})


def test_unknown_targets_and_genes_are_all_listed_with_the_nearest(tmp_path):
    path, *_ = simulated(tmp_path)
    with pytest.raises(KeyError) as caught:
        prepare.replogle(path, lists=lists(targets=("EXOSC1", "LSM55", "SNRPD")))
    assert re.search("unknown perturbation 'LSM55'; nearest known: .*LSM5", str(caught.value))
    assert re.search("unknown perturbation 'SNRPD'; nearest known: .*SNRPD1", str(caught.value))
    assert "EXOSC1'" not in str(caught.value).split("unknown perturbation 'LSM55'")[0]
    with pytest.raises(KeyError, match=r"unknown gene 'TCBE'; nearest known: \['TBCE'"):
        prepare.replogle(path, lists=lists(genes=("ACTB", "TCBE")))


def test_a_missing_label_column_is_answered_with_the_nearest(tmp_path):
    path, *_ = simulated(tmp_path)
    with pytest.raises(KeyError, match="'genes'; nearest known: .*'gene'.*pass key= .--key COL"):
        prepare.replogle(path, lists=LISTS, key="genes")
    screen = anndata.read_h5ad(path)
    screen.obs = screen.obs.rename(columns={"gene": "perturbed"})
    screen.write_h5ad(path)
    with pytest.raises(KeyError, match="'perturbation'; nearest known: .*'perturbed'"):
        prepare.replogle(path, lists=LISTS)
    assert prepare.replogle(path, lists=LISTS, key="perturbed").exists()


def test_cells_without_a_label_are_left_out(tmp_path):
    path, _, labels = simulated(tmp_path)
    screen = anndata.read_h5ad(path)
    screen.obs.loc["cell0", "gene"] = np.nan
    screen.write_h5ad(path)
    kept = anndata.read_h5ad(prepare.replogle(path, lists=LISTS))
    assert kept.n_obs == np.isin(labels, TARGETS).sum() - 1
    assert "cell0" not in kept.obs_names


def test_normalised_values_are_refused(tmp_path):
    path, *_ = simulated(tmp_path)
    screen = anndata.read_h5ad(path)
    screen.X = np.log1p(screen.X)
    screen.write_h5ad(path)
    with pytest.raises(ValueError, match="as after log1p.*Expected raw UMIs"):
        prepare.replogle(path, lists=LISTS)


def test_an_existing_result_is_not_overwritten(tmp_path):
    path, *_ = simulated(tmp_path)
    prepare.replogle(path, lists=LISTS)
    with pytest.raises(FileExistsError, match="source-prepared.h5ad exists"):
        prepare.replogle(path, lists=LISTS)


def test_a_file_without_a_ledger_is_named(tmp_path):
    path, *_ = simulated(tmp_path)
    with pytest.raises(ValueError, match="holds no ledger; expected a file written by prepare"):
        prepare.ledger(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        prepare.ledger(tmp_path / "none.h5ad")


# -------------------------------------------------------------------------------------- Norman

GUIDES = {
    "KLF1_NegCtrl0__KLF1_NegCtrl0": "KLF1",
    "NegCtrl0_KLF1__NegCtrl0_KLF1": "KLF1",
    "NegCtrl0_MAP2K6__NegCtrl0_MAP2K6": "MAP2K6",
    "MAP2K6_KLF1__MAP2K6_KLF1": "MAP2K6_KLF1",
    "KLF1_MAP2K6__KLF1_MAP2K6": "KLF1_MAP2K6",
    "NegCtrl0_NegCtrl0__NegCtrl0_NegCtrl0": "control",
    "NegCtrl10_NegCtrl0__NegCtrl10_NegCtrl0": "control",
    "NegCtrl1_NegCtrl0__NegCtrl1_NegCtrl0": "control",
}


def norman_file(path, *, form="scperturb", n_cells=160, n_genes=40, uns=None):
    """A file with two targets, their double in both orders and three control constructs."""
    rng = np.random.default_rng(1)
    guides = np.array(list(GUIDES))[np.arange(n_cells) % len(GUIDES)]
    short = np.array([GUIDES[guide] for guide in guides])
    level = rng.gamma(1.0, 1.0, n_genes) * np.where(
        (short[:, None] == "MAP2K6") & (np.arange(n_genes) < 5), 9.0, 1.0
    )
    x = rng.poisson(rng.gamma(2.0, 0.5, (n_cells, 1)) * level).astype(np.float32)
    obs = {
        "scperturb": {"perturbation": short, "guide_id": guides},
        "guides": {"guide_identity": guides},
        "plus": {"condition": [name.replace("_", "+") for name in short], "guide_id": guides},
    }[form]
    index = [f"c{n}" for n in range(n_cells)]
    screen = anndata.AnnData(
        X=sparse.csr_matrix(x),
        obs=pd.DataFrame(obs, index=index),
        var=pd.DataFrame(index=[f"g{n}" for n in range(n_genes)]),
        uns={"simulated": "yes"} if uns is None else uns,
    )
    screen.write_h5ad(path)
    return path, x, guides


@pytest.mark.parametrize("form", ["scperturb", "guides", "plus"])
@pytest.mark.parametrize(("combinations", "double"), [("labels", "_"), ("sum", "+")])
def test_norman_merges_controls_and_drops_one_construct(tmp_path, form, combinations, double):
    path, x, guides = norman_file(tmp_path / "source.h5ad", form=form)
    out = prepare.norman(path, n_genes=20, combinations=combinations)
    screen = anndata.read_h5ad(out)
    kept = np.char.find(guides, "NegCtrl1_") < 0
    names = {
        "control": perturbseq.CONTROL,
        "MAP2K6_KLF1": f"KLF1{double}MAP2K6",
        "KLF1_MAP2K6": f"KLF1{double}MAP2K6",
    }
    expected = [names.get(GUIDES[guide], GUIDES[guide]) for guide in guides[kept]]
    assert screen.obs["target"].tolist() == expected
    columns = [int(name[1:]) for name in screen.var_names]
    np.testing.assert_array_equal(screen.X.toarray(), x[kept][:, columns])
    assert sorted(tmp_path.iterdir()) == [out, path]


def test_doubles_are_labels_of_their_own_or_sums(tmp_path):
    path, *_ = norman_file(tmp_path / "source.h5ad")
    designs = {}
    for kind in ("labels", "sum"):
        out = prepare.norman(path, n_genes=20, combinations=kind, out=tmp_path / f"{kind}.h5ad")
        screen = anndata.read_h5ad(out)
        screen = screen[np.asarray(screen.X.sum(1)).ravel() > 0].copy()
        options = {"perturbation_key": "target", "control": perturbseq.CONTROL}
        designs[kind] = from_anndata(screen, **options)[1]
    assert designs["labels"].targets == ("KLF1", "KLF1_MAP2K6", "MAP2K6")
    assert designs["sum"].targets == ("KLF1", "MAP2K6")
    row = designs["sum"].index(["KLF1+MAP2K6"])
    assert designs["sum"].matrix[row].tolist() == [[1.0, 1.0]]


def test_normans_ledger_and_held_out_interventions(tmp_path):
    path, *_ = norman_file(tmp_path / "source.h5ad")
    out = prepare.norman(path, n_genes=20)
    table = prepare.ledger(out)
    assert table["cells_after"].tolist() == [160, 140, 140, 140, 140]
    assert table["conditions_after"].tolist() == [5, 5, 4, 4, 4]
    assert table["genes_after"].tolist() == [40, 40, 40, 20, 20]
    assert "flavour 'seurat'" in table["note"].iloc[3]
    assert "3 interventions instead of 212" in table["note"].iloc[4]
    screen = anndata.read_h5ad(out)
    assert screen.uns["held_out"].tolist() == list(prepare.most_different(screen, 3))
    assert screen.uns["held_out"][0] == "MAP2K6"
    assert screen.uns["source"]["combinations"] == "labels"
    assert screen.uns["simulated"] == "yes"


def test_a_real_norman_file_of_other_sizes_is_warned_of(tmp_path):
    path, *_ = norman_file(tmp_path / "source.h5ad", uns={})
    with pytest.warns(UserWarning, match="differs from the paper: 3 interventions instead of 212"):
        prepare.norman(path, n_genes=20)


def test_a_killed_norman_goes_on_with_the_cells_already_cut(tmp_path, monkeypatch):
    path, *_ = norman_file(tmp_path / "source.h5ad")
    whole = prepare.norman(path, n_genes=20, out=tmp_path / "whole.h5ad")
    out = tmp_path / "out.h5ad"
    with monkeypatch.context() as patch:
        # A signal would not do: a shell that runs tests in the background has them ignore it.
        patch.setattr(prepare, "_name_held_out", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare.norman(path, n_genes=20, out=out)
    assert not out.exists()
    cut, sources_of_cuts = streaming.cut, []
    monkeypatch.setattr(streaming, "cut", lambda p, **k: sources_of_cuts.append(p) or cut(p, **k))
    prepare.norman(path, n_genes=20, out=out)
    assert path not in sources_of_cuts
    np.testing.assert_array_equal(
        anndata.read_h5ad(out).X.toarray(), anndata.read_h5ad(whole).X.toarray()
    )
    assert not (tmp_path / "out.h5ad.steps").exists()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"combinations": "both"}, "combinations is 'both'; expected 'labels' or 'sum'"),
        ({"n_genes": 41}, "n_genes is 41, but 40 of 40 genes vary"),
        ({"n_genes": 0}, "n_genes is 0, but"),
        ({"key": "guide"}, "'guide'; nearest known: .*'guide_id'"),
        ({"key": "batch"}, "no cell of obs\\['batch'\\] is a control; its labels begin with"),
    ],
)
def test_what_norman_cannot_use_is_refused(tmp_path, options, match):
    path, *_ = norman_file(tmp_path / "source.h5ad")
    screen = anndata.read_h5ad(path)
    screen.obs["batch"] = "b1"
    screen.write_h5ad(path)
    with pytest.raises((KeyError, ValueError), match=match):
        prepare.norman(path, **options)


def test_unlabelled_cells_are_no_controls(tmp_path):
    path, *_ = norman_file(tmp_path / "source.h5ad")
    screen = anndata.read_h5ad(path)
    screen.obs["perturbation"] = screen.obs["perturbation"].astype(object)
    screen.obs.loc["c5", "perturbation"] = np.nan
    screen.write_h5ad(path)
    kept = anndata.read_h5ad(prepare.norman(path, n_genes=20))
    assert "c5" not in kept.obs_names
    assert kept.n_obs == 139


# ------------------------------------------------------------------------------ variable genes


def scanpys_choice(x, n_genes):
    screen = anndata.AnnData(x.astype(np.float32))
    scanpy.pp.normalize_total(screen, target_sum=1e4)
    scanpy.pp.log1p(screen)
    scanpy.pp.highly_variable_genes(screen, n_top_genes=n_genes)
    return screen.var["highly_variable"].to_numpy()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_variable_genes_are_scanpys(tmp_path, seed):
    rng = np.random.default_rng(seed)
    mean = rng.gamma(0.3, 4.0, 300)
    x = rng.poisson(rng.gamma(1.5, mean / 1.5, (250, 300)))
    x[:, 7] = 0
    path = tmp_path / "source.h5ad"
    anndata.AnnData(sparse.csr_matrix(x)).write_h5ad(path)
    for n_genes in (20, 100, 200):
        chosen = prepare.variable_genes(path, n_genes, block=20_000)
        np.testing.assert_array_equal(chosen, scanpys_choice(x, n_genes))


def test_a_gene_alone_in_its_bin_scores_as_in_scanpy(tmp_path):
    rng = np.random.default_rng(5)
    x = rng.poisson(np.append(np.full(60, 1.0), 500.0), (100, 61))
    path = tmp_path / "source.h5ad"
    anndata.AnnData(sparse.csr_matrix(x)).write_h5ad(path)
    for n_genes in (5, 15, 40):
        chosen = prepare.variable_genes(path, n_genes)
        np.testing.assert_array_equal(chosen, scanpys_choice(x, n_genes))


def test_variable_genes_of_a_dense_file_are_refused(tmp_path):
    path = tmp_path / "source.h5ad"
    anndata.AnnData(counts(5, 4)).write_h5ad(path)
    with pytest.raises(ValueError, match="X is not CSR; pass a file that streaming.cut wrote"):
        prepare.variable_genes(path, 2)


# --------------------------------------------------------------------------------- most different


def screen_with_effects(*, sizes=(80, 60, 50, 40), effects=(0, 0.2, 2.0, 0.8), seed=0):
    rng = np.random.default_rng(seed)
    names = ["non-targeting", "A", "B", "C"]
    labels = np.repeat(names, sizes)
    level = np.repeat(effects, sizes)[:, None] * rng.normal(size=30)
    x = rng.poisson(np.exp(level + 1.5)).astype(np.uint8)
    obs = pd.DataFrame({"target": labels}, index=[f"c{n}" for n in range(len(labels))])
    return anndata.AnnData(sparse.csr_matrix(x), obs=obs)


def test_the_distance_is_the_linear_kernel_mmd_on_principal_components():
    screen = screen_with_effects()
    x = screen.X.toarray().astype(float)
    log = np.log1p(1e4 * x / x.sum(1, keepdims=True))
    left, size, _ = np.linalg.svd(log - log.mean(0), full_matrices=False)
    score, labels = (left * size)[:, :5], screen.obs["target"].to_numpy()

    def mmd(name):
        p, q = score[labels == name], score[labels == "non-targeting"]
        return (p @ p.T).mean() + (q @ q.T).mean() - 2 * (p @ q.T).mean()

    found = prepare.distance_to_control(screen, components=5)
    assert found.index.tolist() == ["B", "C", "A"]
    np.testing.assert_allclose(found, [mmd(name) for name in found.index], rtol=1e-3)
    assert prepare.most_different(screen, 2) == ("B", "C")


def test_without_scanpy_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scanpy", None)
    with pytest.raises(ImportError, match=r"needs scanpy, .*pip install 'smslib\[data\]'"):
        prepare.distance_to_control(screen_with_effects())


def test_large_conditions_are_thinned_by_seed():
    screen = screen_with_effects()
    full = prepare.distance_to_control(screen)
    thin = prepare.distance_to_control(screen, most_cells=20, seed=1)
    pd.testing.assert_series_equal(
        thin, prepare.distance_to_control(screen, most_cells=20, seed=1)
    )
    assert not np.allclose(thin, prepare.distance_to_control(screen, most_cells=20, seed=2))
    assert not np.allclose(thin[full.index], full)


@pytest.mark.parametrize("n", [0, 4])
def test_no_more_than_all_interventions_are_held_out(n):
    with pytest.raises(ValueError, match=f"n is {n}, but there are 3 interventions"):
        prepare.most_different(screen_with_effects(), n)


@pytest.mark.parametrize("function", [prepare.distance_to_control, prepare.quality])
def test_labels_are_checked(function):
    screen = screen_with_effects()
    with pytest.raises(KeyError, match="'targets'; nearest known: .'target'"):
        function(screen, key="targets")
    with pytest.raises(ValueError, match="'control'; .*pass control=, or prepare the screen with"):
        function(screen, control="control")
    screen.obs.iloc[3, 0] = None
    with pytest.raises(ValueError, match="has 1 missing labels, first in cell 'c3'; drop these"):
        function(screen)


# ------------------------------------------------------------------------------------- quality


def labelled_screen(base=(4, 5, 6, 4, 5, 6), own=(1, 0, 1, 2)):
    """Two targets and controls, one target measured, three batches, one mitochondrial gene."""
    labels = np.repeat(["non-targeting", "GATA1", "MYC"], [6, 4, 2])
    x = np.zeros((12, 4), dtype=int)
    x[:, 0] = 10  # the background
    x[:6, 1] = base  # GATA1 in controls, in its own cells, elsewhere
    x[6:10, 1] = own
    x[10:, 1] = 5
    x[:, 2] = 1
    x[3, 3] = 7
    obs = pd.DataFrame(
        {"target": labels, "replicate": list("aabbccaaaabc")}, index=[f"c{n}" for n in range(12)]
    )
    var = pd.DataFrame(index=["BASE", "GATA1", "MT-CO1", "RARE"])
    return anndata.AnnData(sparse.csr_matrix(x), obs=obs, var=var)


def test_quality_holds_the_summary_and_more():
    screen = labelled_screen()
    table = prepare.quality(screen)
    summary = perturbseq.summarise(screen)
    pd.testing.assert_frame_equal(table[summary.columns], summary, check_names=False)
    assert table.index.tolist() == ["non-targeting", "GATA1", "MYC"]
    assert table["median_genes"].tolist() == [3, 3, 3]
    shares = 1 / np.array([15, 16, 17, 22, 16, 17])
    assert table.loc["non-targeting", "mitochondrial"] == pytest.approx(np.median(shares))
    assert table["batches"].tolist() == [3, 1, 2]
    assert table["ambiguous"].isna().all()


def test_quality_of_a_dense_screen_is_that_of_a_sparse_one():
    screen, dense = labelled_screen(), labelled_screen()
    guides = np.tile([8, 3], (12, 1))
    screen.obsm["guides"], dense.obsm["guides"] = sparse.csr_matrix(guides), guides
    dense.X = dense.X.toarray()
    table = prepare.quality(dense)
    pd.testing.assert_frame_equal(table, prepare.quality(screen))
    assert table["ambiguous"].tolist() == [1, 1, 1]
    assert isinstance(dense.X, np.ndarray)


@pytest.mark.parametrize(
    "function",
    [prepare.quality, prepare.distance_to_control, partial(prepare.most_different, n=1)],
)
def test_counts_are_wanted_and_may_lie_in_a_layer(function, tmp_path):
    screen = labelled_screen()
    expected = function(screen)
    screen.layers["counts"], screen.X = screen.X, screen.X.log1p()
    np.testing.assert_equal(np.array(function(screen, layer="counts")), np.array(expected))
    with pytest.raises(ValueError, match=r"adata\.X holds 2\.39.*raw counts.*\['counts'\]"):
        function(screen)
    screen.X = None
    with pytest.raises(ValueError, match=r"adata\.X is empty; pass layer="):
        function(screen)
    screen.X = screen.layers["counts"]
    screen.write_h5ad(tmp_path / "screen.h5ad")
    with pytest.raises(ValueError, match="in the file .*to_memory"):
        function(anndata.read_h5ad(tmp_path / "screen.h5ad", backed="r"))


def test_quality_of_labels_that_are_numbers_or_the_names_of_the_index():
    screen = labelled_screen()
    screen.obs["target"] = np.repeat([0, 1, 2], [6, 4, 2])
    screen.obs.index.name = "target"
    table = prepare.quality(screen, control=0)
    assert table["cells"].to_dict() == {"0": 6, "1": 4, "2": 2}
    assert set(prepare.most_different(screen, 2, control=0)) == {"1", "2"}


def test_quality_of_guides_called_without_their_umis():
    screen = labelled_screen()
    screen.obs["guide"] = "g"
    table = prepare.quality(screen)
    assert table["guides"].tolist() == [1, 1, 1]
    assert table[["median_guide_share", "ambiguous"]].isna().all(axis=None)


def test_the_interval_of_the_knock_down_is_the_delta_methods():
    own, own_total = np.array([6, 0, 0, 2]), np.array([17, 11, 11, 13])
    base, base_total = np.array([0, 13, 2, 0, 1, 14]), np.array([11, 24, 13, 18, 12, 25])
    table = prepare.quality(labelled_screen(base=base, own=own))

    def share_and_error(umis, total):
        share = umis.sum() / total.sum()
        return share, np.std(umis - share * total, ddof=1) / total.mean() / np.sqrt(len(umis))

    (p, dp), (q, dq) = share_and_error(own, own_total), share_and_error(base, base_total)
    error = np.sqrt((dp / p) ** 2 + (dq / q) ** 2)
    assert table.loc["GATA1", "own_gene_ratio"] == pytest.approx(p / q)
    low, high = table.loc["GATA1", ["own_gene_low", "own_gene_high"]]
    assert (low, high) == pytest.approx(
        (p / q * np.exp(-1.96 * error), p / q * np.exp(1.96 * error)), rel=1e-6
    )
    assert table.loc["MYC", ["own_gene_low", "own_gene_high"]].isna().all()


def test_the_interval_is_no_narrower_than_that_of_poisson_counts():
    """One cell does not differ from itself, and the controls' hardly differ here."""
    one_cell = labelled_screen()[[*range(7), 10, 11]].copy()
    row = prepare.quality(one_cell).loc["GATA1"]
    ratio, error = (1 / 12) / (30 / 103), np.sqrt(1 / 1 + 1 / 30)
    found = row[["cells", "own_gene_ratio", "own_gene_low", "own_gene_high"]].tolist()
    ends = ratio * np.exp(-1.96 * error), ratio * np.exp(1.96 * error)
    assert found == pytest.approx([1, ratio, *ends])


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_genes_of_one_name_count_together():
    screen, twice = labelled_screen(), labelled_screen()
    x = screen.X.toarray()
    x[:, 3] = x[:, 1] // 2
    twice.X = sparse.csr_matrix(x - np.array([0, 1, 0, 0]) * x[:, 3:])
    twice.var_names = ["BASE", "GATA1", "MT-CO1", "GATA1"]
    x[:, 3] = 0
    screen.X = sparse.csr_matrix(x)
    columns = ["own_gene_ratio", "own_gene_low", "own_gene_high", "median_umis"]
    found, expected = (prepare.quality(each)[columns] for each in (twice, screen))
    pd.testing.assert_frame_equal(found, expected)


def test_repeated_entries_are_added_up_and_the_screen_is_left_alone():
    screen, x = labelled_screen(), labelled_screen().X.tocsc()
    entries = np.full(2 * x.nnz, 128, dtype=np.uint8)  # two add up to 0 in their own type
    screen.X = sparse.csc_matrix((entries, np.repeat(x.indices, 2), 2 * x.indptr), shape=x.shape)
    table = prepare.quality(screen)
    assert table["median_genes"].tolist() == [3, 3, 3]
    assert table["median_umis"].tolist() == [3 * 256] * 3
    assert (screen.X.data == 128).all()


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        library = rng.integers(2000, 6000, 500)
        level = np.where(np.arange(500) < 100, 0.25, 1.0) * 5e-3 * library
        umis = rng.poisson(rng.gamma(2.0, level / 2.0))
        own, base = slice(0, 100), slice(100, 500)
        low, high = prepare._ratio_limits(
            umis[own].astype(float), library[own].astype(float),
            umis[base].astype(float), library[base].astype(float),
        )  # fmt: skip
        inside += low < 0.25 < high
    assert stats.binomtest(inside, 400, 0.95).pvalue > 1e-3


def test_a_target_without_a_umi_left_has_an_upper_limit():
    screen = labelled_screen()
    x = screen.X.toarray()
    x[6:10, 1] = 0
    screen.X = sparse.csr_matrix(x)
    row = prepare.quality(screen).loc["GATA1"]
    expected = 30 / (15 + 16 + 17 + 22 + 16 + 17) * 44
    assert (row["own_gene_ratio"], row["own_gene_low"]) == (0, 0)
    assert stats.poisson.cdf(0, row["own_gene_high"] * expected) == pytest.approx(0.025)
    x[:6, 1] = 0
    screen.X = sparse.csr_matrix(x)
    assert prepare.quality(screen).loc["GATA1", ["own_gene_low", "own_gene_high"]].isna().all()


def test_mitochondrial_shares_are_taken_from_the_annotation_first():
    screen = labelled_screen()
    screen.obs["mitopercent"] = 0.08
    assert prepare.quality(screen)["mitochondrial"].tolist() == pytest.approx([0.08] * 3)
    screen.obs["mitopercent"] = 8.0
    assert prepare.quality(screen)["mitochondrial"].tolist() == pytest.approx([0.08] * 3)
    screen.obs["mitopercent"] = 0.8
    assert prepare.quality(screen)["mitochondrial"].tolist() == pytest.approx([0.8] * 3)
    screen.obs = screen.obs.rename(columns={"mitopercent": "pct_counts_mt"})
    assert prepare.quality(screen)["mitochondrial"].tolist() == pytest.approx([0.008] * 3)
    del screen.obs["pct_counts_mt"]
    assert prepare.quality(screen[:, ["BASE", "GATA1"]].copy())["mitochondrial"].isna().all()


def test_ambiguous_guides_are_counted():
    screen = labelled_screen()
    guides = np.tile([8, 2], (12, 1))
    guides[[0, 6, 7]] = [7, 3]
    screen.obsm["guides"] = sparse.csr_matrix(guides)
    expected = pytest.approx([1 / 6, 2 / 4, 0])
    assert prepare.quality(screen)["ambiguous"].tolist() == expected
    screen.obs["guide_share"] = guides.max(1) / guides.sum(1)
    screen.obs["guide"] = "g"
    assert prepare.quality(screen)["ambiguous"].tolist() == expected


def test_batches_are_found_named_or_missed():
    screen = labelled_screen()
    overall = prepare.quality(screen).attrs["cramers_v"]
    table = pd.crosstab(screen.obs["target"], screen.obs["replicate"]).to_numpy()
    assert overall == pytest.approx(prepare.cramers_v(table))
    own = np.stack([table[0], table[1:].sum(0)])
    assert prepare.quality(screen).loc["GATA1", "batch_v"] == pytest.approx(prepare.cramers_v(own))
    screen.obs = screen.obs.rename(columns={"replicate": "lane"})
    assert prepare.quality(screen)["batches"].isna().all()
    assert np.isnan(prepare.quality(screen).attrs["cramers_v"])
    assert prepare.quality(screen, batch="lane").attrs["cramers_v"] == overall
    with pytest.raises(KeyError, match="'lanes'; nearest known: .'lane'"):
        prepare.quality(screen, batch="lanes")


def test_cramers_v_of_many_cells_is_scipys():
    table = np.array([[4000, 1000, 500], [800, 3000, 700]])
    expected = stats.contingency.association(table, method="cramer")
    assert prepare.cramers_v(table) == pytest.approx(expected, abs=1e-3)


def test_cramers_v_of_independent_labels_is_near_zero_and_of_equal_ones_one():
    rng = np.random.default_rng(0)
    small = [
        pd.crosstab(rng.integers(40, size=400), rng.integers(20, size=400)).to_numpy()
        for _ in range(20)
    ]
    assert np.mean([prepare.cramers_v(table) for table in small]) < 0.05
    naive = [stats.contingency.association(table, method="cramer") for table in small]
    assert np.mean(naive) > 0.2
    assert prepare.cramers_v(np.diag([30, 20, 50])) == pytest.approx(1.0)
    assert np.isnan(prepare.cramers_v(np.array([[5, 3]])))


@pytest.mark.parametrize(
    "table", [np.zeros((2, 2)), np.array([3, 4]), np.array([[1, -1], [2, 3]])]
)
def test_a_table_of_no_counts_is_refused(table):
    with pytest.raises(ValueError, match="expected counts of cells by two labels"):
        prepare.cramers_v(table)
