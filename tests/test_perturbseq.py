"""Sources, readers and quality control, on made-up screens and (where they are) the real files."""

import hashlib
import http.server
import io
import math
import os
import threading
import urllib.error
from dataclasses import replace
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from smslib import perturbseq
from smslib.data import Design, from_anndata

CONTENT = b"counts\n" * 1000
GOOD = hashlib.sha256(CONTENT).hexdigest()


def on_disk(name: str) -> pytest.MarkDecorator:
    path = perturbseq.data_dir() / perturbseq.SOURCES[name].filename
    return pytest.mark.skipif(not path.exists(), reason=f"{path.name} is not in {path.parent}")


def toy(url: str, reader: str = "table") -> perturbseq.Source:
    return perturbseq.Source(
        "toy", url, "toy.bin", len(CONTENT), GOOD, "CC0", "nobody", "a toy", reader
    )


@pytest.fixture
def origin(tmp_path, monkeypatch):
    """A source whose address is a good local file; returns that file."""
    path = tmp_path / "origin.bin"
    path.write_bytes(CONTENT)
    monkeypatch.setattr(perturbseq, "SOURCES", {"toy": toy(path.as_uri())})
    return path


class Answers(http.server.BaseHTTPRequestHandler):
    """Serves the good file, a short one, a wrong one or an error, by path."""

    def do_GET(self):
        body = {"/good": CONTENT, "/short": CONTENT[:-7], "/wrong": CONTENT[:-1] + b"?"}
        if self.path not in body:
            self.send_error(503)
            return
        self.send_response(200)
        if self.path != "/short":  # a dropped connection announces no honest length
            self.send_header("Content-Length", str(len(body[self.path])))
        self.end_headers()
        self.wfile.write(body[self.path])

    def log_message(self, *_):
        """Stay silent."""


@pytest.fixture
def served(monkeypatch):
    """Let the toy source live at a path of a loopback server; http is allowed here only."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setattr(perturbseq, "_SCHEMES", ("http",))
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def at(path: str) -> None:
        url = f"http://127.0.0.1:{server.server_port}/{path}"
        monkeypatch.setattr(perturbseq, "SOURCES", {"toy": toy(url)})

    yield at
    server.shutdown()
    server.server_close()
    thread.join()


# --------------------------------------------------------------------------------- data_dir


def test_the_data_directory_is_the_one_named_else_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SMS_DATA_DIR", str(tmp_path))
    assert perturbseq.data_dir() == tmp_path
    monkeypatch.setenv("SMS_DATA_DIR", "")
    assert perturbseq.data_dir().name == "smslib"


def test_every_source_is_complete():
    for name, source in perturbseq.SOURCES.items():
        assert source.name == name
        assert len(bytes.fromhex(source.sha256)) == 32
        assert source.reader in perturbseq._READERS
        assert all((source.licence, source.citation, source.description, source.bytes))
        assert not source.url or source.url.startswith("https://")
        assert not source.url or source.url.endswith("/" + source.filename)


# ------------------------------------------------------------------------------------ fetch


def test_fetch_downloads_once_and_leaves_nothing_else(origin, tmp_path):
    cache = tmp_path / "new" / "cache"
    path = perturbseq.fetch("toy", directory=cache)
    assert path.read_bytes() == CONTENT
    origin.unlink()
    assert perturbseq.fetch("toy", directory=cache) == path
    assert list(cache.iterdir()) == [path]


def test_fetch_uses_the_data_directory(origin, tmp_path, monkeypatch):
    monkeypatch.setenv("SMS_DATA_DIR", str(tmp_path / "chosen"))
    assert perturbseq.fetch("toy") == tmp_path / "chosen" / "toy.bin"


def test_fetch_over_http(served, tmp_path):
    served("good")
    assert perturbseq.fetch("toy", directory=tmp_path).read_bytes() == CONTENT


def test_a_wrong_download_is_kept_aside_with_both_sums(served, tmp_path):
    served("wrong")
    wrong = CONTENT[:-1] + b"?"
    both = rf"sha256 {hashlib.sha256(wrong).hexdigest()}.*expected {GOOD}.*toy\.bin\.bad"
    with pytest.raises(ValueError, match=both):
        perturbseq.fetch("toy", directory=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["toy.bin.bad"]
    assert (tmp_path / "toy.bin.bad").read_bytes() == wrong
    served("good")
    assert perturbseq.fetch("toy", directory=tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("answer", "reason"), [("short", "closed after 6,993 bytes"), ("gone", "HTTP Error 503")]
)
def test_a_failed_download_says_which_file_to_put_where(served, tmp_path, answer, reason):
    served(answer)
    message = rf"{reason}.*Put the file toy\.bin \(7,000 bytes, sha256 {GOOD}\) into {tmp_path}"
    with pytest.raises(ConnectionError, match=message):
        perturbseq.fetch("toy", directory=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_network_says_which_file_to_put_where(monkeypatch, tmp_path):
    def unreachable(*_args, **_options):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    message = rf"Name or service.*Put the file lowmoi_example_data\.rda .* into {tmp_path}; it com"
    with pytest.raises(ConnectionError, match=message):
        perturbseq.fetch("papalexi2021", directory=tmp_path)
    assert not perturbseq.available("papalexi2021", directory=tmp_path)


def test_a_source_without_public_address_says_so(tmp_path):
    with pytest.raises(ConnectionError, match=r"no public address.*it comes from Replogle"):
        perturbseq.fetch("replogle2022-gene-lists", directory=tmp_path)


def test_plain_http_is_refused_also_as_a_redirect(monkeypatch, tmp_path):
    monkeypatch.setattr(perturbseq, "SOURCES", {"toy": toy("http://example.org/toy.bin")})
    with pytest.raises(ConnectionError, match=r"http://example.org/toy.bin is not one of"):
        perturbseq.fetch("toy", directory=tmp_path)
    answer = io.BytesIO(CONTENT)
    answer.url = "http://example.org/elsewhere"
    monkeypatch.setattr("urllib.request.urlopen", lambda *_args, **_options: answer)
    monkeypatch.setattr(perturbseq, "SOURCES", {"toy": toy("https://example.org/toy.bin")})
    with pytest.raises(ConnectionError, match="elsewhere is not one of"):
        perturbseq.fetch("toy", directory=tmp_path)
    assert answer.closed


def test_an_unknown_source_lists_the_known():
    with pytest.raises(KeyError, match=r"unknown source 'papalexi'; known: .*'papalexi2021'"):
        perturbseq.fetch("papalexi")


@given(position=st.integers(0, len(CONTENT) - 1), bit=st.integers(0, 7))
@settings(max_examples=30, deadline=None)
def test_one_flipped_bit_is_refused(tmp_path_factory, position, bit):
    folder = tmp_path_factory.mktemp("flipped")
    spoilt = bytearray(CONTENT)
    spoilt[position] ^= 1 << bit
    (folder / "toy.bin").write_bytes(spoilt)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(perturbseq, "SOURCES", {"toy": toy("")})
        assert not perturbseq.available("toy", directory=folder)
        with pytest.raises(ValueError, match=GOOD):
            perturbseq.fetch("toy", directory=folder)
    assert (folder / "toy.bin.bad").read_bytes() == spoilt


def refuse(*_args, **_options):
    raise PermissionError(13, "Permission denied")


def test_a_read_only_directory_with_the_good_file_works(origin, tmp_path, monkeypatch):
    (tmp_path / "toy.bin").write_bytes(CONTENT)
    for writer in ("os.replace", "os.mkdir", "tempfile.TemporaryDirectory"):
        monkeypatch.setattr(writer, refuse)
    assert perturbseq.fetch("toy", directory=tmp_path) == tmp_path / "toy.bin"


def test_a_read_only_directory_without_it_asks_for_another(origin, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.TemporaryDirectory", refuse)
    message = r"toy\.bin is not in .*cannot be written to \(Permission denied\); set SMS_DATA_DIR"
    with pytest.raises(ConnectionError, match=message):
        perturbseq.fetch("toy", directory=tmp_path)


def test_a_bad_file_that_cannot_be_moved_is_named(origin, tmp_path, monkeypatch):
    (tmp_path / "toy.bin").write_bytes(b"bad")
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(ValueError, match=r"could not be set aside \(Permission.*remove .*toy\.bi"):
        perturbseq.fetch("toy", directory=tmp_path)


def test_available_knows_disk_network_and_nonsense(origin, tmp_path):
    cache = tmp_path / "cache"
    assert perturbseq.available("toy", directory=cache)
    assert not cache.exists()
    perturbseq.fetch("toy", directory=cache)
    origin.unlink()
    assert perturbseq.available("toy", directory=cache)
    assert not perturbseq.available("toy", directory=tmp_path)
    assert not perturbseq.available("nonsense")


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
@settings(max_examples=100, deadline=None)
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
@settings(max_examples=50, deadline=None, derandomize=True)
def test_one_altered_value_is_refused(screen, by, data):
    counts, total = screen
    counts[:, :2] = 1  # two ones fix the unit of a cell, so that no other reading fits
    stored = log1p_of(counts, total + 2)
    cell = data.draw(st.integers(0, len(counts) - 1))
    stored.data[stored.indptr[cell]] += by
    with pytest.raises(ValueError, match=rf"cell {cell} \(1 cells in all\) is not log1p\(10000"):
        perturbseq.counts_from_log1p(stored)


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
    source = replace(
        toy(path.as_uri(), "norman"),
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        bytes=path.stat().st_size,
    )
    monkeypatch.setattr(perturbseq, "SOURCES", {"toy": source})
    adata = perturbseq.read("toy", directory=tmp_path / "cache")
    np.testing.assert_array_equal(adata.X.toarray(), counts)
    assert adata.X.dtype == np.int32
    assert adata.obs["total"].tolist() == total.tolist()
    assert adata.obs["condition"].tolist() == ["control", "KLF1"]
    assert not adata.uns


# ------------------------------------------------------------------------------------- rda


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


def test_a_tie_has_no_top_guide():
    kept, ledger = perturbseq.assign_guides(guided(CALLS), threshold=0.5)
    assert "cell4" not in kept.obs_names
    assert (ledger["cells_before"] - ledger["cells_after"]).tolist() == [1, 0, 1]


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=1, max_size=12),
    st.floats(0.01, 1.0),
    st.integers(0, 9),
)
@settings(max_examples=50, deadline=None)
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


def test_the_control_is_kept_however_small():
    adata = labelled([[1, 1]] * 4, ["A", "A", "A", "non-targeting"])
    kept, _ = perturbseq.filter_screen(adata, min_cells=3)
    assert kept.n_obs == 4


def test_filters_refuse_bad_labels_and_empty_results():
    adata = labelled([[1, 1]] * 3, ["A", "A", "non-targeting"])
    with pytest.raises(KeyError, match=r"'gene' is not in adata\.obs; columns: \['target'\]"):
        perturbseq.filter_screen(adata, key="gene")
    with pytest.raises(ValueError, match=r"control 'NT' is not in .*begin with \['A', 'non-targ"):
        perturbseq.filter_screen(adata, control="NT")
    with pytest.raises(ValueError, match=r"(?s)no perturbed cell passes.*at least 3 cells"):
        perturbseq.filter_screen(adata, min_cells=3)


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


def test_a_gene_that_controls_lack_has_no_ratio():
    adata = labelled([[0, 4], [3, 1]], ["non-targeting", "A"])
    assert perturbseq.summarise(adata)["own_gene_ratio"].isna().all()


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
    with pytest.raises(KeyError, match=r"\['Z'\] are not targets of the design"):
        perturbseq.hold_out(design, ["A", "Z"])
    with pytest.raises(ValueError, match="4 conditions held out and 0 perturbations to train"):
        perturbseq.hold_out(design, ["A", "B", "C"])
    with pytest.raises(ValueError, match=r"holding out \[\] leaves 0 conditions held out"):
        perturbseq.hold_out(design, [])


# ----------------------------------------------------------------------------- command line


def test_the_command_line_lists_and_fetches(origin, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SMS_DATA_DIR", str(tmp_path / "cache"))
    assert perturbseq.main(["list"]) == 0
    assert capsys.readouterr().out == "toy\t7,000 bytes\tnot here\n"
    assert perturbseq.main(["fetch", "toy"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'cache' / 'toy.bin'}\n"
    perturbseq.main(["list"])
    assert capsys.readouterr().out.endswith("\there\n")


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


@on_disk("replogle2022-gene-lists")
def test_the_replogle_lists_have_the_published_sizes():
    lists = perturbseq.read("replogle2022-gene-lists").groupby("list")["symbol"]
    assert lists.size().to_dict() == {
        "gene_program": 1186,
        "pathway": 337,
        "perturbation_cluster": 683,
    }
    assert lists.nunique()["perturbation_cluster"] == 681
