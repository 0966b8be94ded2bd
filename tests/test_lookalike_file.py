"""The look-alike's file: the schema of the real one, marked, whole, and cut like the real one."""

import json
import shutil
from types import SimpleNamespace

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import torch

from smslib import lookalike_file, perturbseq, prepare
from smslib.data import from_anndata
from smslib.lookalike import Effects, Template, screen_like
from smslib.lookalike_file import to_anndata, write

MEAN = np.geomspace(0.3, 30, 120)
TEMPLATE = Template("even", MEAN, np.full(120, 0.3), np.repeat([0.5, 1.5], 50) * MEAN.sum())


@pytest.fixture(scope="module")
def small():
    sizes = {"n_targets": 60, "n_cells": 3_000, "n_genes": 120, "n_latent": 8}
    effects = Effects(weak=0.0, null=0.3)
    return screen_like(**sizes, template=TEMPLATE, effects=effects, controls=2_000, seed=3)


def test_anndata_goes_through_the_one_door(small):
    adata = to_anndata(small)
    cells, design = from_anndata(adata, perturbation_key="target", control=perturbseq.CONTROL)
    assert torch.equal(cells.counts, small.cells.counts)
    assert torch.equal(cells.condition, small.cells.condition)
    assert design.targets == small.design.targets
    assert adata.X.dtype == np.uint16
    assert "SIMULATED" in adata.uns["simulated"]["warning"]
    assert tuple(adata.uns["pathways"]["exosome-like"]) == small.pathways["exosome-like"]


def test_the_file_has_the_schema_of_the_real_one(small, tmp_path):
    path = write(small, tmp_path / "like.h5ad")
    with h5py.File(path) as file:
        counts = file["X"]
        assert (counts.dtype, counts.chunks, counts.compression) == (np.float32, None, None)
    read = anndata.read_h5ad(path)
    assert np.array_equal(read.X, small.cells.counts.numpy())
    wanted = {"gene", "gem_group", "sgID_AB", "mitopercent", "UMI_count"}
    assert wanted == set(read.obs)
    assert list(read.var["gene_name"]) == list(small.genes)
    assert read.var_names.is_unique
    labels = np.array(small.design.conditions)[small.cells.condition.numpy()]
    assert (read.obs["gene"].astype(str) == labels).all()
    assert np.array_equal(read.obs["UMI_count"], read.X.sum(1))
    assert read.obs["mitopercent"].between(0, 1).all()
    assert list(tmp_path.iterdir()) == [path]


def test_the_mark_says_how_to_draw_the_screen_again(small, tmp_path):
    mark = anndata.read_h5ad(write(small, tmp_path / "like.h5ad")).uns["simulated"]
    assert mark["warning"].startswith("SIMULATED")
    assert mark["version"] == small.origin["version"]
    options = json.loads(mark["options"])
    options.pop("lists")
    options["effects"] = Effects(**options["effects"])
    again = screen_like(**options, template=TEMPLATE, seed=int(mark["seed"]))
    assert torch.equal(again.cells.counts, small.cells.counts)


def test_surplus_is_strewn_among_what_the_cut_finds_again(small, tmp_path):
    path = write(small, tmp_path / "like.h5ad", surplus_genes=300, surplus_cells=1_000)
    read = anndata.read_h5ad(path)
    assert read.shape == (6_000, 420)
    wanted = small.lists
    genes = read.var["gene_name"].isin(wanted.genes).to_numpy()
    cells = read.obs["gene"].isin([*wanted.targets, perturbseq.CONTROL]).to_numpy()
    assert np.array_equal(read.X[cells][:, genes], small.cells.counts.numpy())
    assert 0.3 < np.flatnonzero(~genes).mean() / 420 < 0.7
    assert 0.3 < np.flatnonzero(~cells).mean() / 6_000 < 0.7
    ratio = read.X[:, ~genes].mean() / TEMPLATE.mean.mean()
    assert ratio == pytest.approx(1.0, abs=0.15)
    own = read.X[~cells][:, genes]
    z = (own.mean(0) - TEMPLATE.mean) / (own.std(0) / np.sqrt(len(own)))
    assert np.abs(z).max() < 5


def test_the_cut_of_the_real_file_runs_on_it_unchanged(small, tmp_path):
    path = write(small, tmp_path / "like.h5ad", surplus_genes=50, surplus_cells=200)
    cut = prepare.replogle(path, lists=small.lists, out=tmp_path / "cut.h5ad", controls="all")
    read = anndata.read_h5ad(cut)
    assert np.array_equal(read.X.toarray(), small.cells.counts.numpy())
    assert read.uns["simulated"]["warning"] == small.origin["warning"]


def test_writing_twice_gives_the_same_file(small, tmp_path):
    paths = [tmp_path / name for name in ("a.h5ad", "b.h5ad")]
    for path in paths:
        write(small, path, surplus_genes=10, surplus_cells=20)
    a, b = map(anndata.read_h5ad, paths)
    assert np.array_equal(a.X, b.X)
    pd.testing.assert_frame_equal(a.obs, b.obs)
    pd.testing.assert_frame_equal(a.var, b.var)


def test_a_failed_write_leaves_what_was_there(small, tmp_path, monkeypatch):
    path = tmp_path / "like.h5ad"
    path.write_bytes(b"precious")
    monkeypatch.setattr(lookalike_file, "_file_block", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(small, path)
    assert path.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_reads_back_otherwise_is_refused(small, tmp_path):
    path = write(small, tmp_path / "like.h5ad")
    with h5py.File(path, "r+") as file:
        umis = file["obs/UMI_count"][:]
        file["X"][4_000, 7] += 1
        with pytest.raises(OSError, match="does not read back as written"):
            lookalike_file._check_written(file["X"], umis)


def test_a_full_disk_is_noticed_before(small, tmp_path, monkeypatch):
    usage = SimpleNamespace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"room for like\.h5ad: 2\.4 MB needed, 1\.0 MB free"):
        write(small, tmp_path / "like.h5ad")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("surplus", [{"surplus_genes": -1}, {"surplus_cells": -1}])
def test_a_negative_surplus_is_refused(small, tmp_path, surplus):
    with pytest.raises(ValueError, match="expected none or more"):
        write(small, tmp_path / "like.h5ad", **surplus)
