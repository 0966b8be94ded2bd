"""Readers, quality control and command line, on made-up screens and (where they are) real ones."""

import gzip
import hashlib
import math
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from smslib import perturbseq, sources
from smslib.data import Design, from_anndata


def on_disk(name: str) -> pytest.MarkDecorator:
    path = sources.data_dir() / sources.SOURCES[name].filename
    return pytest.mark.skipif(not path.exists(), reason=f"{path.name} is not in {path.parent}")


def toy(path: Path, reader: str = "table", **changes) -> sources.Source:
    """A source whose address is a local file."""
    content = path.read_bytes()
    source = sources.Source(
        name="toy",
        url=path.as_uri(),
        filename="toy.bin",
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        licence="CC0 (all of it)",
        citation="nobody",
        description="a toy",
        reader=reader,
    )
    return replace(source, **changes)


def use(monkeypatch, *chosen: sources.Source) -> None:
    monkeypatch.setattr(sources, "SOURCES", {source.name: source for source in chosen})


@pytest.fixture
def origin(tmp_path, monkeypatch):
    """A source whose address is a good local file; returns that file."""
    path = tmp_path / "origin.bin"
    path.write_bytes(b"counts\n" * 1000)
    use(monkeypatch, toy(path))
    return path


# -------------------------------------------------------------------- counts_from_log1p


@st.composite
def screens(draw, least: int = 1):
    """Counts of a few cells, each with ``least`` non-zero genes, and larger totals."""
    n_genes = draw(st.integers(max(2, least), 8))
    row = st.lists(st.integers(0, 60), min_size=n_genes, max_size=n_genes)
    counts = draw(
        st.lists(row.filter(lambda r: np.count_nonzero(r) >= least), min_size=1, max_size=5)
    )
    total = [sum(row) + draw(st.integers(0, 40_000)) for row in counts]
    return np.array(counts), np.array(total)


def log1p_of(counts, total) -> sparse.csr_matrix:
    return sparse.csr_matrix(np.log1p(1e4 * counts / total[:, None]))


@given(screens())
@settings(max_examples=100)
def test_counts_come_back_exactly_or_not_at_all(screen):
    counts, total = screen
    shared = np.array([math.gcd(*row, int(t)) for row, t in zip(counts, total, strict=True)])
    lowest = np.array([row[row > 0].min() for row in counts]) // shared
    if (lowest > 16).any():
        with pytest.raises(ValueError, match="is not log1p"):
            perturbseq.counts_from_log1p(log1p_of(counts, total))
        return
    found, found_total = perturbseq.counts_from_log1p(log1p_of(counts, total))
    np.testing.assert_array_equal(found.toarray(), counts // shared[:, None])
    np.testing.assert_array_equal(found_total, total // shared)


@given(screens(least=2), st.floats(1e-6, 1e-2), st.data())
@settings(max_examples=50, derandomize=True)
def test_one_altered_value_is_refused(screen, by, data):
    counts, total = screen
    counts[:, :2] = 1  # two ones fix the unit of a cell, so that no other reading fits
    stored = log1p_of(counts, total + 2)
    cell = data.draw(st.integers(0, len(counts) - 1))
    stored.data[stored.indptr[cell]] += by
    with pytest.raises(ValueError, match=rf"cell {cell} \(1 cells in all\) is not log1p\(10000"):
        perturbseq.counts_from_log1p(stored)


def test_the_matrix_of_logarithms_is_left_alone():
    """An explicit zero is no count, but it is the caller's."""
    given = log1p_of(np.array([[3, 1, 2]]), np.array([6]))
    given.data = np.append(given.data[:2], 0.0)
    values = given.data.copy()
    found, _ = perturbseq.counts_from_log1p(given)
    assert found.toarray().tolist() == [[3, 1, 0]]
    assert np.array_equal(given.data, values)
    assert (given.nnz, given.indptr.tolist()) == (3, [0, 3])


def test_rounded_values_and_empty_cells_are_refused():
    counts, total = np.array([[1, 2], [3, 1]]), np.array([9001, 7013])
    with pytest.raises(ValueError, match="expected float64 values that were neither rounded"):
        perturbseq.counts_from_log1p(log1p_of(counts, total).astype(np.float32))
    with pytest.raises(ValueError, match="cell 1 has no non-zero value"):
        perturbseq.counts_from_log1p(log1p_of(np.array([[1, 2], [0, 0]]), total))


def test_the_norman_reader_returns_counts_and_totals(tmp_path, monkeypatch):
    counts, total = np.array([[1, 0, 2], [3, 1, 0]]), np.array([9001, 7013])
    path = tmp_path / "origin.h5ad"
    obs = pd.DataFrame({"condition": ["control", "KLF1"]}, index=["a", "b"])
    anndata.AnnData(log1p_of(counts, total), obs=obs, uns={"log1p": {}}).write_h5ad(path)
    use(monkeypatch, toy(path, "norman"))
    adata = perturbseq.read("toy", directory=tmp_path / "cache")
    np.testing.assert_array_equal(adata.X.toarray(), counts)
    assert adata.X.dtype == np.int32
    assert adata.obs["total"].tolist() == total.tolist()
    assert adata.obs["condition"].tolist() == ["control", "KLF1"]
    assert not adata.uns


# ------------------------------------------------------------------------------------- h5ad


def stored(path: Path, counts, **columns) -> Path:
    """Write a screen as others publish it."""
    frame = pd.DataFrame(columns, index=[f"c{i}" for i in range(counts.shape[0])])
    genes = pd.DataFrame(index=[f"g{j}" for j in range(counts.shape[1])])
    anndata.AnnData(counts, obs=frame, var=genes).write_h5ad(path)
    return path


COUNTS = np.array([[1, 0, 2], [0, 3, 0], [5, 0, 0], [0, 1, 1]], dtype=np.float32)


def test_a_whole_file_is_read_as_integer_csr(tmp_path, monkeypatch):
    path = stored(tmp_path / "screen.h5ad", sparse.csc_matrix(COUNTS), perturbation=list("abab"))
    use(monkeypatch, toy(path, "h5ad"))
    adata = perturbseq.read("toy", directory=tmp_path / "cache")
    np.testing.assert_array_equal(adata.X.toarray(), COUNTS)
    assert (adata.X.format, adata.X.dtype) == ("csr", np.int32)
    assert adata.obs["perturbation"].tolist() == list("abab")


def test_a_large_file_stays_on_disk(tmp_path, monkeypatch):
    use(
        monkeypatch,
        toy(stored(tmp_path / "screen.h5ad", COUNTS, gene=list("abab")), "backed"),
    )
    adata = perturbseq.read("toy", directory=tmp_path / "cache")
    assert adata.isbacked
    np.testing.assert_array_equal(adata.X[1:3], COUNTS[1:3])
    adata.file.close()


def test_guides_of_the_full_papalexi_screen_become_targets(tmp_path, monkeypatch):
    labels = ["STAT1g2", "control", "MARCH8g10", "IFNGR1g1"]  # the g of a gene's name stays
    path = stored(tmp_path / "screen.h5ad", COUNTS, perturbation=pd.Categorical(labels))
    use(monkeypatch, toy(path, "papalexi-full"))
    adata = perturbseq.read("toy", directory=tmp_path / "cache")
    assert adata.obs["target"].tolist() == ["STAT1", "non-targeting", "MARCH8", "IFNGR1"]
    assert adata.obs["guide"].tolist() == labels
    _, design = from_anndata(adata, perturbation_key="target", control=perturbseq.CONTROL)
    assert design.targets == ("IFNGR1", "MARCH8", "STAT1")


def test_a_missing_label_column_names_the_nearest(tmp_path):
    path = stored(tmp_path / "screen.h5ad", COUNTS, perturbations=list("abab"))
    with pytest.raises(
        KeyError, match=r"unknown column 'perturbation'; nearest .*'perturbations'"
    ):
        perturbseq._read_papalexi_full(path)


@pytest.mark.parametrize(
    ("values", "noticed"),
    [
        (1e4 * COUNTS / COUNTS.sum(1, keepdims=True), "cell adds up to 10000: these are scaled c"),
        (
            np.log1p(1e4 * COUNTS / COUNTS.sum(1, keepdims=True)),
            "cell adds up to 10000: these are log1p-normalised counts",
        ),
        (COUNTS + 0.25, "12 of 12 stored values are no counts, and the largest value is 5.25$"),
        (COUNTS - 2 * (COUNTS == 1), "3 of 6 stored values are no counts, and the largest .* 5$"),
    ],
)
def test_normalised_values_are_refused_and_said_how_noticed(tmp_path, values, noticed):
    path = stored(tmp_path / "screen.h5ad", sparse.csr_matrix(values), perturbation=list("abab"))
    with pytest.raises(ValueError, match=rf"screen.h5ad: X holds values.*raw UMIs.*{noticed}"):
        perturbseq._read_whole(path)
    adata = perturbseq.read_h5ad(path)
    with pytest.raises(ValueError, match=noticed.rstrip("$")):
        from_anndata(adata, perturbation_key="perturbation", control="a")


def test_a_file_that_is_no_whole_h5ad_says_why(tmp_path):
    path = stored(tmp_path / "screen.h5ad", np.eye(200), gene=list("ab" * 100))
    assert perturbseq.read_h5ad(path).shape == (200, 200)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size // 2])
    with pytest.raises(ValueError, match=rf"screen.h5ad \({size // 2:,} bytes\) is cut short"):
        perturbseq.read_h5ad(path)
    path.write_bytes(b"<html>a login page</html>")
    with pytest.raises(ValueError, match=r"begins with b'<html>a login pa', which is not HDF5"):
        perturbseq.read_h5ad(path)
    with h5py.File(path, "w") as file:
        file["matrix"] = [1, 2]
    with pytest.raises(ValueError, match=r"has no \['obs', 'var'\] but \['matrix'\]; expected"):
        perturbseq.read_h5ad(path)
    with pytest.raises(FileNotFoundError, match=r"expected an \.h5ad file: '.*nothing'"):
        perturbseq.read_h5ad(tmp_path / "nothing")


@pytest.mark.parametrize("backed", [False, True])
def test_counts_may_be_in_layers_alone(tmp_path, backed):
    adata = labelled([[5, 1], [2, 3]], ["non-targeting", "A"])
    adata.layers["counts"], adata.X = adata.X.copy(), None
    adata.write_h5ad(tmp_path / "screen.h5ad")
    read = perturbseq.read_h5ad(tmp_path / "screen.h5ad", backed=backed)
    options = {"perturbation_key": "target", "control": "non-targeting"}
    assert from_anndata(read, layer="counts", **options)[0].counts.tolist() == [[5, 1], [2, 3]]
    with pytest.raises(ValueError, match=r"adata\.X is empty; pass layer=, one of \['counts'\]"):
        from_anndata(read, **options)


def test_too_little_memory_is_no_fault_of_the_file(tmp_path, monkeypatch):
    path = stored(tmp_path / "screen.h5ad", np.eye(2), gene=list("ab"))

    def full(*_, **__):
        raise MemoryError("Unable to allocate 62 GiB")

    monkeypatch.setattr(anndata, "read_h5ad", full)
    with pytest.raises(MemoryError, match="62 GiB"):
        perturbseq.read_h5ad(path)


BEGINNINGS = [b"", b"\x89HDF\r\n\x1a\n", b"RDX", b"RDX2\n", b"RDX3\nX\n", b"RDA3\nA\n", b"BZh9"]


@given(st.binary(max_size=200), st.sampled_from(BEGINNINGS), st.booleans())
@settings(max_examples=60)
def test_no_rubbish_is_read_as_a_screen(tmp_path_factory, content, beginning, zipped):
    path = tmp_path_factory.mktemp("rubbish") / "screen.h5ad"
    content = beginning + content
    path.write_bytes(gzip.compress(content) if zipped else content)
    for reader in (perturbseq.read_h5ad, perturbseq._read_papalexi):
        with pytest.raises(ValueError, match=r"screen\.h5ad"):
            reader(path)


# ------------------------------------------------------------------------------------- rda


@on_disk("papalexi2021")
@pytest.mark.parametrize("share", [0.001, 0.5])
def test_a_truncated_rda_is_refused(tmp_path, share):
    whole = (sources.data_dir() / "lowmoi_example_data.rda").read_bytes()
    path = tmp_path / "lowmoi_example_data.rda"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"example_data\.rda \([\d,]+ bytes\) is cut short"):
        perturbseq._read_papalexi(path)


def test_a_foreign_rda_says_what_it_holds(monkeypatch, tmp_path):
    monkeypatch.setattr("rdata.read_rda", lambda *_args, **_options: {"other": 1})
    path = tmp_path / "x.rda"
    path.write_bytes(b"RDX3\n")
    with pytest.raises(ValueError, match=r"holds \['other'\]; expected 'lowmoi_example_data'"):
        perturbseq._read_papalexi(path)


def test_without_rdata_the_way_out_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "rdata", None)
    with pytest.raises(ImportError, match=r"needs rdata, .*pip install 'smslib\[data\]'"):
        perturbseq._read_papalexi(tmp_path / "x.rda")


def r_matrix(dense, rows, kind: str = "dgTMatrix") -> SimpleNamespace:
    """The slots of an R sparse matrix, as an R parser hands them over."""
    dense = np.asarray(dense)
    slots = {"Dim": np.array(dense.shape, dtype=np.int32), "Dimnames": [rows, None]}
    if kind == "dgTMatrix":
        triplets = sparse.coo_matrix(dense)
        order = np.argsort(triplets.data)  # R promises no order
        slots |= {"i": triplets.row[order], "j": triplets.col[order], "x": triplets.data[order]}
    else:
        columns = sparse.csc_matrix(dense)
        slots |= {"i": columns.indices, "p": columns.indptr, "x": columns.data}
    return SimpleNamespace(**slots)


@pytest.mark.parametrize("kind", ["dgTMatrix", "dgCMatrix"])
def test_both_r_sparse_forms_become_the_same_matrix(kind):
    dense = np.array([[0.0, 2.0, 0.0, 1.0], [5.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    matrix, rows = perturbseq._r_sparse(r_matrix(dense, ["a", "b", "c"], kind))
    np.testing.assert_array_equal(matrix.toarray(), dense)
    assert rows == ["a", "b", "c"]


GENE_BY_CELL = [[1.0, 0.0, 2.0, 3.0], [0.0, 4.0, 0.0, 1.0]]
GUIDE_BY_CELL = [[9.0, 0.0, 5.0, 2.0], [1.0, 8.0, 5.0, 0.0], [0.0, 1.0, 0.0, 8.0]]


@pytest.fixture
def fake_rda(monkeypatch):
    """Replace the parser by one that returns a small list built with the constructors given."""
    values = {"genes": GENE_BY_CELL}

    def read_rda(_path, constructor_dict):
        screen = {
            "response_matrix": constructor_dict["dgTMatrix"](
                r_matrix(values["genes"], np.array(["STAT1", "ACTB"])), {}
            ),
            "grna_matrix": constructor_dict["dgCMatrix"](
                r_matrix(GUIDE_BY_CELL, np.array(["NTg1", "STAT1g1", "JAK2g1"]), "dgCMatrix"), {}
            ),
            "grna_target_data_frame": pd.DataFrame(
                {
                    "grna_id": ["JAK2g1", "NTg1", "STAT1g1"],
                    "grna_target": pd.Categorical(["JAK2", "non-targeting", "STAT1"]),
                }
            ),
            "extra_covariates": pd.DataFrame(
                {"bio_rep": pd.Categorical(["rep_1", "rep_1", "rep_2", "rep_2"])}
            ),
        }
        return {"lowmoi_example_data": screen}

    monkeypatch.setattr("rdata.read_rda", read_rda)
    monkeypatch.setattr(perturbseq, "_beginning", lambda _path: b"RDX3")
    monkeypatch.setattr("smslib.untrusted.check_packed", lambda _path: None)
    return values


def test_the_papalexi_reader_lays_out_cells_genes_and_guides(fake_rda, tmp_path):
    adata = perturbseq._read_papalexi(tmp_path)
    np.testing.assert_array_equal(adata.X.toarray(), np.transpose(GENE_BY_CELL))
    np.testing.assert_array_equal(adata.obsm["guides"].toarray(), np.transpose(GUIDE_BY_CELL))
    assert adata.X.dtype == adata.obsm["guides"].dtype == np.int32
    assert adata.X.format == adata.obsm["guides"].format == "csr"
    assert list(adata.var_names) == ["STAT1", "ACTB"]
    assert adata.obs["replicate"].tolist() == ["rep_1", "rep_1", "rep_2", "rep_2"]
    targets = {"NTg1": "non-targeting", "STAT1g1": "STAT1", "JAK2g1": "JAK2"}
    assert list(adata.uns["guide_target"]["target"].items()) == list(targets.items())


def test_the_papalexi_screen_survives_a_round_trip(fake_rda, tmp_path):
    adata = perturbseq._read_papalexi(tmp_path)
    adata.write_h5ad(tmp_path / "screen.h5ad")
    again, _ = perturbseq.assign_guides(anndata.read_h5ad(tmp_path / "screen.h5ad"))
    first, _ = perturbseq.assign_guides(adata)
    assert again.obs["guide"].tolist() == first.obs["guide"].tolist()


@pytest.mark.parametrize("value", [0.5, -1.0])
def test_a_matrix_that_is_not_counts_is_refused(fake_rda, tmp_path, value):
    fake_rda["genes"] = [[value, 0.0, 2.0, 3.0], [0.0, 4.0, 0.0, 1.0]]
    with pytest.raises(ValueError, match="response_matrix holds values that are not counts"):
        perturbseq._read_papalexi(tmp_path)


# -------------------------------------------------------------------------- quality control


def guided(guides, genes=None) -> anndata.AnnData:
    """A screen with the given cells x guides UMIs; guides NT, A, B."""
    guides = np.asarray(guides)
    genes = np.ones((len(guides), 2), dtype=int) if genes is None else np.asarray(genes)
    return anndata.AnnData(
        X=sparse.csr_matrix(genes),
        obs=pd.DataFrame(index=[f"cell{i}" for i in range(len(guides))]),
        var=pd.DataFrame(index=["A", "ACTB"]),
        obsm={"guides": sparse.csr_matrix(guides)},
        uns={
            "guide_target": pd.DataFrame(
                {"target": ["non-targeting", "A", "B"]}, index=["NTg1", "Ag1", "Bg1"]
            )
        },
    )


CALLS = [[9, 1, 0], [0, 8, 2], [0, 7, 3], [0, 0, 0], [5, 5, 0], [0, 0, 3], [0, 4, 0]]


def test_guides_are_assigned_and_the_ledger_adds_up():
    adata = guided(CALLS)
    kept, ledger = perturbseq.assign_guides(adata, threshold=0.8, min_umis=4)
    assert list(kept.obs_names) == ["cell0", "cell1", "cell6"]
    assert kept.obs["target"].tolist() == ["non-targeting", "A", "A"]
    assert kept.obs["guide"].tolist() == ["NTg1", "Ag1", "Ag1"]
    assert kept.obs["guide_umis"].tolist() == [10, 10, 4]
    assert kept.obs["guide_share"].tolist() == [0.9, 0.8, 1.0]
    for kind in (np.array, pd.DataFrame):
        adata.obsm["guides"] = kind(pd.DataFrame(CALLS, index=adata.obs_names))
        again, same = perturbseq.assign_guides(adata, threshold=0.8, min_umis=4)
        pd.testing.assert_frame_equal(again.obs, kept.obs)
        pd.testing.assert_frame_equal(same, ledger)
    assert ledger["cells_before"].tolist() == [7, 5, 3]
    assert ledger["cells_after"].tolist() == [5, 3, 3]
    assert ledger["targets_dropped"].tolist() == ["B", "", ""]
    assert ledger["targets_after"].tolist() == [2, 2, 2]
    assert list(ledger.index) == [
        "at least 4 guide UMIs",
        "top guide holds 80% of the guide UMIs",
        "no second guide with as many UMIs",
    ]
    assert "target" not in adata.obs


def test_guides_with_names_are_found_by_name():
    adata = guided(CALLS)
    expected, _ = perturbseq.assign_guides(adata, min_umis=4)
    table = pd.DataFrame(CALLS, index=adata.obs_names, columns=["NTg1", "Ag1", "Bg1"])
    adata.obsm["guides"] = table[["Bg1", "NTg1", "Ag1"]]
    found, _ = perturbseq.assign_guides(adata, min_umis=4)
    pd.testing.assert_frame_equal(found.obs, expected.obs)
    adata.obsm["guides"] = table.rename(columns={"Bg1": "Bg2"})
    with pytest.raises(KeyError, match="unknown guide 'Bg2'; nearest known: .'Bg1'"):
        perturbseq.assign_guides(adata)
    adata.obsm["guides"] = np.array(CALLS)[:, :2]
    with pytest.raises(ValueError, match="holds 2 guides, .* 3; expected a target for each"):
        perturbseq.assign_guides(adata)


def test_repeated_entries_of_guides_and_genes_are_added_up_and_left_alone():
    """Each count of 256 is two entries of a type that wraps their sum to 0."""
    adata = labelled([[1, 1]] * 3, ["non-targeting", "A", "A"])
    entries, twice = np.full(6, 128, dtype=np.uint8), np.repeat([0, 1, 1], 2)
    counts = sparse.csr_matrix((entries, twice, [0, 2, 4, 6]), shape=(3, 3))
    adata.obsm["guides"], adata.X = counts, counts[:, :2].copy()
    called, _ = perturbseq.assign_guides(adata)
    assert called.obs["guide_umis"].tolist() == [256, 256, 256]
    assert called.obs["target"].tolist() == ["non-targeting", "A", "A"]
    kept, _ = perturbseq.filter_screen(adata, min_detected=2)
    assert kept.var_names.tolist() == ["ACTB"]
    assert (entries == 128).all()
    assert (adata.X.data == 128).all()


def test_a_tie_has_no_top_guide():
    kept, ledger = perturbseq.assign_guides(guided(CALLS), threshold=0.5)
    assert "cell4" not in kept.obs_names
    assert (ledger["cells_before"] - ledger["cells_after"]).tolist() == [1, 0, 1]


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=1, max_size=12),
    st.floats(0.01, 1.0),
    st.integers(0, 9),
)
@settings(max_examples=50)
def test_assignment_equals_a_loop_over_cells(guides, threshold, min_umis):
    expected = [
        f"cell{i}"
        for i, row in enumerate(guides)
        if sum(row) >= max(min_umis, 1)
        and max(row) / sum(row) >= threshold
        and sorted(row)[-2] < max(row)
    ]
    kept, ledger = perturbseq.assign_guides(guided(guides), threshold=threshold, min_umis=min_umis)
    assert list(kept.obs_names) == expected
    assert ledger["cells_after"].iloc[-1] == len(expected)
    assert ledger["cells_before"].tolist()[1:] == ledger["cells_after"].tolist()[:-1]


def test_assignment_refuses_what_it_cannot_use():
    bare = guided(CALLS)
    del bare.obsm["guides"]
    with pytest.raises(KeyError, match=r"no obsm\['guides'\] or no uns\['guide_target'\]"):
        perturbseq.assign_guides(bare)
    with pytest.raises(ValueError, match=r"threshold is 80\.0; expected a share in \(0, 1\]"):
        perturbseq.assign_guides(guided(CALLS), threshold=80.0)


@pytest.mark.parametrize("value", [np.log1p(3), -1, np.nan])
def test_guides_that_are_no_umis_are_refused(value):
    with pytest.raises(
        ValueError, match=r"obsm\['guides'\] holds .*expected UMIs.* Noticed: 1 of"
    ):
        perturbseq.assign_guides(guided([[9, 1, 0], [value, 8, 2]]))


def test_a_guide_without_a_target_is_named():
    adata = guided(CALLS)
    adata.uns["guide_target"].loc["Ag1", "target"] = np.nan
    with pytest.raises(KeyError, match=r"guides \['Ag1'\] have no target"):
        perturbseq.assign_guides(adata)


def test_targets_of_guides_may_be_a_series_or_by_name_a_dict():
    adata = guided(CALLS)
    expected, _ = perturbseq.assign_guides(adata, min_umis=4)
    series = adata.uns["guide_target"]["target"]
    adata.uns["guide_target"] = series
    pd.testing.assert_frame_equal(perturbseq.assign_guides(adata, min_umis=4)[0].obs, expected.obs)
    adata.uns["guide_target"] = dict(sorted(series.items()))  # the order in which a file keeps it
    with pytest.raises(ValueError, match="is a dict; expected a table .* 'target'.*names"):
        perturbseq.assign_guides(adata)
    table = pd.DataFrame(CALLS, index=adata.obs_names, columns=series.index)
    adata.obsm["guides"] = table
    pd.testing.assert_frame_equal(perturbseq.assign_guides(adata, min_umis=4)[0].obs, expected.obs)
    del adata.uns["guide_target"]["Bg1"]
    with pytest.raises(KeyError, match=r"guides \['Bg1'\] have no target"):
        perturbseq.assign_guides(adata)
    adata.uns["guide_target"] = series.to_frame("gene")
    with pytest.raises(
        ValueError, match="is a DataFrame; expected a table with a column 'target'"
    ):
        perturbseq.assign_guides(adata)


def labelled(genes, targets) -> anndata.AnnData:
    adata = guided(np.eye(3, dtype=int)[[0] * len(targets)], genes)
    adata.obs["target"] = pd.Categorical(targets)
    return adata


def test_filters_apply_in_order_and_the_ledger_says_what_they_drop():
    genes = [[5, 1], [5, 0], [9, 0], [2, 0], [7, 0], [6, 0], [0, 3]]
    adata = labelled(genes, ["non-targeting", "A", "A", "A", "B", "non-targeting", "B"])
    kept, ledger = perturbseq.filter_screen(adata, min_detected=3, min_umis=3, min_cells=2)
    assert list(kept.var_names) == ["A"]  # ACTB is seen in two cells
    assert list(kept.obs_names) == ["cell0", "cell1", "cell2", "cell5"]
    assert ledger["genes_after"].tolist() == [1, 1, 1]
    assert ledger["cells_after"].tolist() == [7, 5, 4]
    assert ledger["targets_dropped"].tolist() == ["", "", "B"]
    assert adata.shape == (7, 2)
    cells, design = from_anndata(kept, perturbation_key="target", control="non-targeting")
    assert design.conditions == ("non-targeting", "A")
    assert len(cells) == 4


def test_cells_without_a_label_are_dropped_by_a_rule_of_their_own():
    adata = labelled([[5, 1], [5, 0], [9, 0], [2, 0]], ["non-targeting", "A", None, "A"])
    kept, ledger = perturbseq.filter_screen(adata, min_cells=2)
    assert list(kept.obs_names) == ["cell0", "cell1", "cell3"]
    assert ledger.index[0] == "cell is labelled"
    assert ledger["cells_before"].tolist() == [4, 3, 3, 3]
    assert ledger["targets_before"].tolist() == [2, 2, 2, 2]
    assert ledger["targets_dropped"].tolist() == ["", "", "", ""]
    with pytest.raises(ValueError, match="has 1 missing labels, first in cell 'cell2'; drop"):
        perturbseq.summarise(adata)


def test_the_control_is_kept_however_small():
    adata = labelled([[1, 1]] * 4, ["A", "A", "A", "non-targeting"])
    kept, _ = perturbseq.filter_screen(adata, min_cells=3)
    assert kept.n_obs == 4


def test_filters_refuse_bad_labels_and_empty_results():
    adata = labelled([[1, 1]] * 3, ["A", "A", "non-targeting"])
    with pytest.raises(KeyError, match=r"'gene' is not in adata\.obs.*columns: \['target'\]"):
        perturbseq.filter_screen(adata, key="gene")
    with pytest.raises(ValueError, match=r"control 'NT' is not in .*known: \['A', 'non-targ"):
        perturbseq.filter_screen(adata, control="NT")
    with pytest.raises(ValueError, match=r"(?s)no perturbed cell passes.*at least 3 cells"):
        perturbseq.filter_screen(adata, min_cells=3)
    adata.obs["target"] = [1, 1, 0]
    with pytest.raises(ValueError, match="no perturbed cell passes"):
        perturbseq.filter_screen(adata, min_cells=3, control="0")


def test_the_summary_is_what_one_computes_by_hand():
    genes = [[4, 4], [2, 6], [1, 9], [1, 9], [1, 3]]
    adata = labelled(genes, ["non-targeting", "non-targeting", "A", "A", "B"])
    adata.obs["guide"] = ["NTg1", "NTg2", "Ag1", "Ag1", "Bg1"]
    adata.obs["guide_share"] = [1.0, 0.8, 0.9, 1.0, 0.7]
    table = perturbseq.summarise(adata)
    assert table.index.tolist() == ["non-targeting", "A", "B"]
    assert table["cells"].tolist() == [2, 2, 1]
    assert table["median_umis"].tolist() == [8, 10, 4]
    assert table["guides"].tolist() == [2, 1, 1]
    np.testing.assert_allclose(table["median_guide_share"], [0.9, 0.95, 0.7])
    np.testing.assert_allclose(table["own_gene_ratio"], [np.nan, (2 / 20) / (6 / 16), np.nan])
    bare = perturbseq.summarise(labelled(genes, ["c", "c", "A", "A", "B"]), control="c")
    assert bare[["guides", "median_guide_share"]].isna().all(axis=None)


def test_guides_called_without_their_umis_have_no_share():
    """As the labels of papalexi2021-full, which name a guide and count none."""
    adata = labelled([[4, 4], [2, 6], [1, 9]], ["non-targeting", "A", "A"])
    adata.obs["guide"] = ["NTg1", "Ag1", "Ag2"]
    table = perturbseq.summarise(adata)
    assert table["guides"].tolist() == [1, 2]
    assert table["median_guide_share"].isna().all()


def test_a_gene_that_controls_lack_has_no_ratio():
    adata = labelled([[0, 4], [3, 1]], ["non-targeting", "A"])
    assert perturbseq.summarise(adata)["own_gene_ratio"].isna().all()


@pytest.fixture
def normalised():
    """Logarithms in X, counts in a layer; the last cell is empty."""
    genes = [[4, 4], [2, 6], [1, 9], [1, 9], [1, 3], [0, 0]]
    adata = labelled(genes, ["non-targeting", "non-targeting", "A", "A", "B", "B"])
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X.log1p()
    return adata


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix, sparse.csc_matrix])
def test_counts_in_a_layer_are_filtered_and_summarised(normalised, form):
    normalised.layers["counts"] = form(normalised.layers["counts"].toarray())
    raw = normalised.copy()
    raw.X = raw.layers["counts"]
    kept, ledger = perturbseq.filter_screen(normalised, min_umis=5, layer="counts")
    expected, same = perturbseq.filter_screen(raw, min_umis=5)
    pd.testing.assert_frame_equal(kept.obs, expected.obs)
    assert kept.obs_names.tolist() == ["cell0", "cell1", "cell2", "cell3"]
    pd.testing.assert_frame_equal(ledger, same)
    np.testing.assert_array_equal(kept.X.toarray(), normalised.X[:4].toarray())
    table = perturbseq.summarise(normalised, layer="counts")
    pd.testing.assert_frame_equal(table, perturbseq.summarise(raw))
    np.testing.assert_allclose(table.loc["A", "own_gene_ratio"], (2 / 20) / (6 / 16))


@pytest.mark.parametrize("function", [perturbseq.filter_screen, perturbseq.summarise])
def test_what_is_no_counts_is_neither_filtered_nor_summarised(normalised, function, tmp_path):
    with pytest.raises(ValueError, match=r"adata\.X holds .*raw counts.*\['counts'\]"):
        function(normalised)
    with pytest.raises(KeyError, match="layer 'count' is not in .*nearest known: .'counts'"):
        function(normalised, layer="count")
    normalised.X = None
    with pytest.raises(ValueError, match=r"adata\.X is empty; pass layer=, one of \['counts'\]"):
        function(normalised)
    normalised.X = normalised.layers["counts"].astype(float)
    normalised.X[2, 1] = np.nan
    with pytest.raises(ValueError, match="X holds nan for cell 'cell2', gene 'ACTB'"):
        function(normalised)


@pytest.mark.parametrize(
    "function", [perturbseq.filter_screen, perturbseq.summarise, perturbseq.assign_guides]
)
def test_a_screen_in_a_file_is_to_be_read_first(function, tmp_path):
    adata = labelled([[4, 4], [2, 6]], ["non-targeting", "A"])
    adata.write_h5ad(tmp_path / "screen.h5ad")
    backed = anndata.read_h5ad(tmp_path / "screen.h5ad", backed="r")
    with pytest.raises(
        ValueError, match=r"X is in the file .*screen.h5ad; .*adata\.to_memory\(\)"
    ):
        function(backed)
    function(backed.to_memory())


def test_the_control_may_be_a_number_and_the_index_named_as_the_labels():
    adata = labelled([[4, 4], [2, 6], [1, 9]], [0, 1, 1])
    named = adata.copy()
    named.obs.index.name = "target"
    table = perturbseq.summarise(adata, control=0)
    assert table.index.tolist() == ["0", "1"]
    pd.testing.assert_frame_equal(perturbseq.summarise(named, control="0"), table)
    assert perturbseq.filter_screen(named, control=0)[0].n_obs == 3


# ------------------------------------------------------------------ gene sets and hold-outs


def test_gene_sets_are_disjoint_and_say_their_source():
    sets = perturbseq.pathways()
    assert sets["ifn-gamma"].genes == ("IFNGR1", "IFNGR2", "JAK2", "STAT1", "IRF1")
    assert not set(sets["ifn-gamma"].genes) & set(sets["papalexi2021-null"].genes)
    assert all(gene_set.source and gene_set.name == name for name, gene_set in sets.items())


def test_hold_out_takes_combinations_and_leaves_the_control():
    design = Design(
        ("control", "A", "A+B", "B", "C"),
        ("A", "B", "C"),
        torch.tensor([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 1]]).float(),
    )
    train, held = perturbseq.hold_out(design, ["A"])
    assert train.tolist() == [0, 3, 4]
    assert held.tolist() == [1, 2]
    with pytest.raises(KeyError, match="unknown target 'AB'; nearest .*, unknown target 'Z'; kn"):
        perturbseq.hold_out(design, ["A", "AB", "Z"])
    with pytest.raises(ValueError, match="4 conditions held out and 0 perturbations to train"):
        perturbseq.hold_out(design, ["A", "B", "C"])
    with pytest.raises(ValueError, match=r"holding out \[\] leaves 0 conditions held out"):
        perturbseq.hold_out(design, [])


# ----------------------------------------------------------------------------- command line


def test_the_list_says_what_is_where(origin, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SMS_DATA_DIR", str(tmp_path / "new" / "cache"))
    assert perturbseq.main(["list"]) == 0
    folder, row, about = capsys.readouterr().out.splitlines()
    assert folder.startswith(f"files in {tmp_path / 'new' / 'cache'} (")
    assert folder.endswith(" free)")
    assert row.split() == ["toy", "7.0", "kB", "absent", "CC0"]
    assert about.strip() == "a toy"
    perturbseq.fetch("toy")
    perturbseq.main(["list"])
    assert "present" in capsys.readouterr().out


def test_the_command_line_fetches(origin, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SMS_DATA_DIR", str(tmp_path / "cache"))
    assert perturbseq.main(["fetch", "toy"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'cache' / 'toy.bin'}\n"


def test_errors_are_one_line_and_a_status(origin, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SMS_DATA_DIR", str(tmp_path / "cache"))
    assert perturbseq.main(["fetch", "toi"]) == 1
    assert capsys.readouterr().err == "error: unknown source 'toi'; nearest known: ['toy']\n"
    origin.unlink()
    assert perturbseq.main(["fetch", "toy"]) == 1
    output = capsys.readouterr()
    assert output.err.startswith("error: cannot download toy: ")
    assert output.err.count("\n") == 1
    assert not output.out


def test_an_interrupt_says_how_to_go_on(origin, monkeypatch, capsys):
    def interrupted(_name):
        raise KeyboardInterrupt

    monkeypatch.setattr(perturbseq, "fetch", interrupted)
    assert perturbseq.main(["fetch", "toy"]) == 130
    assert "goes on where this one stopped" in capsys.readouterr().err


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    """Two sources with recipes and one without; returns the calls that the recipes get."""
    calls = []

    def recipe(name):
        return lambda path, **options: calls.append((name, path, options)) or Path("cut.h5ad")

    module = SimpleNamespace(replogle=recipe("replogle"), norman=recipe("norman"))
    monkeypatch.setitem(sys.modules, "smslib.prepare", module)
    monkeypatch.setattr("smslib.prepare", module, raising=False)
    monkeypatch.setattr(perturbseq, "gene_lists", lambda: "the lists")
    monkeypatch.setenv("SMS_DATA_DIR", str(tmp_path / "cache"))
    (tmp_path / "screen.h5ad").write_bytes(b"large")
    screen = toy(tmp_path / "screen.h5ad")
    recipes = {"big": "replogle", "pairs": "norman", "toy": ""}
    use(monkeypatch, *(replace(screen, name=n, recipe=r) for n, r in recipes.items()))
    return calls


@pytest.mark.parametrize(
    ("arguments", "called", "options"),
    [
        (["big"], "replogle", {"lists": "the lists", "out": None}),
        (
            ["big", "--controls", "20", "--out", "x"],
            "replogle",
            {"lists": "the lists", "out": Path("x"), "controls": 20},
        ),
        (
            ["big", "--controls", "all"],
            "replogle",
            {"lists": "the lists", "out": None, "controls": "all"},
        ),
        (["pairs"], "norman", {"out": None}),
        (["pairs", "--key", "label"], "norman", {"out": None, "key": "label"}),
    ],
)
def test_prepare_fetches_and_cuts(recipes, tmp_path, capsys, arguments, called, options):
    assert perturbseq.main(["prepare", *arguments]) == 0
    assert recipes == [(called, tmp_path / "cache" / "toy.bin", options)]
    assert capsys.readouterr().out == "cut.h5ad\n"


def test_prepare_takes_a_file_of_the_same_schema(recipes, tmp_path):
    assert perturbseq.main(["prepare", "big", "--file", "like.h5ad"]) == 0
    assert recipes[0][1] == Path("like.h5ad")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["toy"], "no recipe prepares toy; it does big, pairs"),
        (["bag"], "unknown source 'bag'; nearest known: ['big']"),
        (["pairs", "--controls", "9"], "--controls does not apply to pairs, which keeps them all"),
    ],
)
def test_prepare_refuses_before_it_downloads(recipes, tmp_path, capsys, arguments, message):
    assert perturbseq.main(["prepare", *arguments]) == 1
    assert capsys.readouterr().err == f"error: {message}\n"
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("text", ["many", "-1", "1.5"])
def test_a_number_of_controls_is_a_number(recipes, capsys, text):
    with pytest.raises(SystemExit) as caught:
        perturbseq.main(["prepare", "big", f"--controls={text}"])
    assert caught.value.code == 2
    assert f"'{text}' is neither a number of cells nor 'all'" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["list"], ["fetch"], ["prepare"]])
def test_help_shows_examples(capsys, command):
    with pytest.raises(SystemExit) as caught:
        perturbseq.main([*command, "--help"])
    assert caught.value.code == 0
    help_text = capsys.readouterr().out
    assert "python -m smslib.perturbseq fetch papalexi2021" in help_text
    assert "SMS_DATA_DIR" in help_text


def test_the_examples_in_the_help_can_be_parsed():
    lines = [line.split() for line in perturbseq._EXAMPLES.splitlines() if "python -m" in line]
    assert len(lines) == 4
    for words in lines:
        options = perturbseq._parser().parse_args(words[3:])
        assert not hasattr(options, "name") or options.name in sources.SOURCES


@pytest.mark.filterwarnings("ignore:.*found in sys.modules after import of package:RuntimeWarning")
def test_the_module_runs_as_a_program(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["perturbseq", "list"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("smslib.perturbseq", run_name="__main__")
    assert caught.value.code == 0
    assert "replogle2022-k562-gwps" in capsys.readouterr().out


# ---------------------------------------------------------------------------- the real files


@on_disk("papalexi2021")
def test_papalexi_is_what_the_book_says():
    adata = perturbseq.read("papalexi2021")
    assert adata.shape == (20_729, 299)
    assert adata.obsm["guides"].shape == (20_729, 110)
    assert adata.obs["replicate"].value_counts().to_dict() == {
        "rep_1": 9428,
        "rep_2": 6001,
        "rep_3": 5300,
    }
    targets = adata.uns["guide_target"]["target"]
    assert (targets == perturbseq.CONTROL).sum() == 9
    kept, ledger = perturbseq.assign_guides(adata, threshold=0.8)
    assert ledger["cells_after"].tolist() == [20_729, 16_192, 16_192]
    assert 1 - kept.n_obs / adata.n_obs == pytest.approx(0.22, abs=0.005)
    # CD274 has three guides, but no cell has one of them on top: 25 knock-outs and the controls.
    assert set(targets) - set(kept.obs["target"]) == {"CD274"}
    table = perturbseq.summarise(kept)
    assert table.loc[perturbseq.CONTROL, "cells"] == 1923
    assert table.loc["STAT1", "own_gene_ratio"] < 0.3
    named = {gene for gene_set in perturbseq.pathways().values() for gene in gene_set.genes}
    assert named <= set(table.index)


@on_disk("norman2019-mini")
def test_norman_is_what_the_book_says():
    adata = perturbseq.read("norman2019-mini")
    assert adata.shape == (5961, 500)
    assert (adata.obs["total"] <= adata.obs["ncounts"]).all()
    assert (np.asarray(adata.X.sum(axis=1)).ravel() <= adata.obs["total"]).all()
    k562 = adata[adata.obs["cell_type"] == "k562"]
    # Twice a K562 cell's total would exceed its depth: no common factor was lost there.
    assert (2 * k562.obs["total"] > k562.obs["ncounts"]).all()
    _, design = from_anndata(k562, perturbation_key="condition", control="control")
    perturbed = design.matrix[1:].sum(1)
    assert (perturbed == 1).sum() == 18
    assert (perturbed == 2).sum() == 15
