"""Cuts of .h5ad files against what anndata reads; killed runs, damaged files, full disks."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from smslib import perturbseq, streaming

LAYOUTS = ("contiguous", "gzip", "columns", "csr", "csr-gzip", "csc", "csc-gzip")


def counts(n_cells: int, n_genes: int, *, mean: float = 0.6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).poisson(mean, (n_cells, n_genes)).astype(np.float32)


def write(path, x, layout="contiguous", *, obs=None, var=None, uns=None):
    """Write counts as anndata does, in one of the layouts that are about."""
    n_cells, n_genes = x.shape
    obs = pd.DataFrame(index=[f"c{n}" for n in range(n_cells)]) if obs is None else obs
    var = pd.DataFrame(index=[f"g{n}" for n in range(n_genes)]) if var is None else var
    kind, _, compression = layout.partition("-")
    form = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix}.get(kind, np.asarray)
    screen = anndata.AnnData(X=form(x), obs=obs, var=var, uns=uns or {})
    screen.write_h5ad(path, compression=compression or None)
    if layout in ("gzip", "columns"):
        chunks = (7, 5) if layout == "gzip" else (n_cells, 2)
        with h5py.File(path, "r+") as file:
            attributes = dict(file["X"].attrs)
            del file["X"]
            dense = file.create_dataset("X", data=x, chunks=chunks, compression="gzip")
            dense.attrs.update(attributes)
    return path


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "source.h5ad", counts(50, 12))


def read(path):
    return anndata.read_h5ad(path)


# ------------------------------------------------------------------------------ the same counts


@pytest.mark.parametrize("block", [1, 200, 1 << 26])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_cut_is_what_anndata_reads_in_every_layout_and_block_size(tmp_path, layout, block):
    x = counts(60, 23)
    path = write(tmp_path / "source.h5ad", x, layout)
    cells, genes = np.array([0, 1, 2, 17, 18, 40, 59]), np.array([1, 2, 9, 22])
    out = streaming.cut(path, cells=cells, genes=genes, out=tmp_path / "out.h5ad", block=block)
    kept = read(out)
    np.testing.assert_array_equal(kept.X.toarray(), x[np.ix_(cells, genes)])
    assert kept.obs_names.tolist() == [f"c{n}" for n in cells]
    assert kept.var_names.tolist() == [f"g{n}" for n in genes]
    assert kept.X.has_canonical_format
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.h5ad", "source.h5ad"]


@settings(max_examples=25)
@given(st.data())
def test_any_choice_of_any_matrix(tmp_path_factory, data):
    n_cells, n_genes = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 12))
    x = counts(n_cells, n_genes, mean=data.draw(st.sampled_from([0.05, 1.0, 200.0])))
    cells = data.draw(st.lists(st.booleans(), min_size=n_cells, max_size=n_cells).filter(any))
    genes = data.draw(st.lists(st.booleans(), min_size=n_genes, max_size=n_genes).filter(any))
    folder = tmp_path_factory.mktemp("any")
    path = write(folder / "source.h5ad", x, data.draw(st.sampled_from(LAYOUTS[:1] + LAYOUTS[3:])))
    block = data.draw(st.sampled_from([1, 64, 1000, 1 << 20]))
    chosen = {"cells": np.array(cells), "genes": np.array(genes)}
    out = streaming.cut(path, **chosen, out=folder / "out.h5ad", block=block)
    np.testing.assert_array_equal(read(out).X.toarray(), x[cells][:, genes])


@pytest.mark.parametrize("bridge", [0, 1 << 16])
@pytest.mark.parametrize("layout", ["contiguous", "csr", "csc"])
def test_gaps_are_read_or_skipped_to_the_same_effect(tmp_path, monkeypatch, layout, bridge):
    monkeypatch.setattr(streaming, "_BRIDGE", bridge)
    x = counts(200, 40)
    path = write(tmp_path / "source.h5ad", x, layout)
    cells, genes = np.arange(200) % 3 == 1, np.arange(40) % 5 < 2
    out = streaming.cut(path, cells=cells, genes=genes, out=tmp_path / "out.h5ad", block=3000)
    np.testing.assert_array_equal(read(out).X.toarray(), x[cells][:, genes])


@pytest.mark.parametrize(
    ("largest", "dtype"), [(0, np.uint8), (255, np.uint8), (256, np.uint16), (70_000, np.uint32)]
)
def test_the_counts_get_the_smallest_type_that_holds_them(tmp_path, largest, dtype):
    x = np.zeros((4, 3), dtype=np.float32)
    x[2, 1] = largest
    path = write(tmp_path / "source.h5ad", x)
    out = streaming.cut(path, cells=np.arange(4), genes=np.arange(3), out=tmp_path / "out.h5ad")
    assert read(out).X.dtype == dtype
    np.testing.assert_array_equal(read(out).X.toarray(), x)


def put(path, group, **arrays):
    """Put arrays of one's own into a file."""
    with h5py.File(path, "r+") as file:
        for name, array in arrays.items():
            del file[group][name]
            file[group][name] = array


@pytest.mark.parametrize("layout", ["contiguous", "csr", "csc"])
@pytest.mark.parametrize("dtype", [">f8", "<f4", "i8", "u2", "f2", ">f4", "?"])
def test_any_numeric_type_is_read(tmp_path, layout, dtype):
    x = counts(20, 6, mean=0.1).clip(0, 1) if dtype == "?" else counts(20, 6)
    path = write(tmp_path / "source.h5ad", x, layout)
    if layout == "contiguous":
        put(path, "/", X=x.astype(dtype))
    else:
        put(path, "X", data=read(path).X.data.astype(dtype))
    out = streaming.cut(path, cells=np.arange(20), genes=np.arange(1, 5), out=tmp_path / "o.h5ad")
    np.testing.assert_array_equal(read(out).X.toarray(), x[:, 1:5])


@pytest.mark.parametrize("layout", ["csr", "csc"])
def test_unsorted_and_repeated_entries_are_put_right(tmp_path, layout):
    """Even where their own type does not hold the sum."""
    path = write(tmp_path / "source.h5ad", np.zeros((3, 3)), layout)
    data = np.array([100, 2, 200, 0], dtype=np.uint8)
    put(path, "X", data=data, indices=np.array([2, 0, 2, 1]), indptr=np.array([0, 3, 4, 4]))
    cells, genes = (np.arange(2), np.arange(3))[:: 1 if layout == "csr" else -1]
    out = streaming.cut(path, cells=cells, genes=genes, out=tmp_path / "out.h5ad")
    x = np.array([[2, 0, 300], [0, 0, 0]])
    np.testing.assert_array_equal(read(out).X.toarray(), x if layout == "csr" else x.T)
    assert read(out).X.nnz == 2
    chosen = {"cells": np.array([0]), "genes": np.array([0, 2])}
    part = streaming.cut(path, **chosen, out=tmp_path / "part.h5ad")
    expected = [[2, 300]] if layout == "csr" else [[2, 0]]
    np.testing.assert_array_equal(read(part).X.toarray(), expected)


def test_runs_are_found_beyond_32_bits(tmp_path):
    """In a matrix of 2**30 entries, never written, whose offsets are int32."""
    n, shape = 2**28, (4, 2**30)
    with h5py.File(tmp_path / "large.h5", "w") as file:
        x = file.create_group("X")
        x.attrs.update({"encoding-type": "csr_matrix", "shape": shape})
        for name in ("data", "indices"):
            x.create_dataset(name, 4 * n, np.int32, chunks=(1024,))
        x["indptr"] = np.arange(5, dtype=np.int32) * np.int32(n)
        layout = streaming._layout(x, streaming.BLOCK)
        assert layout._runs(np.array([0, 1, 3])) == [slice(0, 1), slice(1, 2), slice(2, 3)]
        assert len(layout.tiles(np.arange(4), np.arange(2))) == 4


def test_every_part_is_listed_a_few_times_whatever_the_number_of_bands(tmp_path, monkeypatch):
    path = write(tmp_path / "source.h5ad", counts(300, 40), "csc")
    begin, listed = zipfile.ZipFile.__init__, []

    def note(self, file, mode="r", *rest, **options):
        listed.extend([file] if mode == "r" else [])
        begin(self, file, mode, *rest, **options)

    monkeypatch.setattr(zipfile.ZipFile, "__init__", note)
    chosen = {"cells": np.arange(300), "genes": np.arange(40)}
    out = streaming.cut(path, **chosen, out=tmp_path / "out.h5ad", block=3000)
    np.testing.assert_array_equal(read(out).X.toarray(), counts(300, 40))
    n_parts = 40 * 300 * 0.45 * 8 / 3000  # and a band of nine cells each
    assert n_parts < len(listed) < 4 * n_parts


def test_a_matrix_of_before_anndata_0_7_is_read(tmp_path):
    x = counts(9, 4)
    path = write(tmp_path / "source.h5ad", x, "csr")
    with h5py.File(path, "r+") as file:
        attributes = file["X"].attrs
        attributes["h5sparse_format"], attributes["h5sparse_shape"] = "csr", attributes["shape"]
        for name in ("encoding-type", "encoding-version", "shape"):
            del attributes[name]
    out = streaming.cut(path, cells=np.arange(3), genes=np.arange(4), out=tmp_path / "out.h5ad")
    np.testing.assert_array_equal(read(out).X.toarray(), x[:3])


# --------------------------------------------------------------------------------- annotations


def test_annotations_follow_their_cells_and_genes(tmp_path):
    obs = pd.DataFrame(
        {
            "gene": pd.Categorical(["A", "B", "A", "C"]),
            "umis": [1, 2, 3, 4],
            "twice": list("wxyz"),
        },
        index=["a", "b", "c", "c"],
    )
    var = pd.DataFrame({"length": [1.5, 2.5]}, index=["g", "g"])
    with pytest.warns(UserWarning, match="not unique"):
        path = write(tmp_path / "source.h5ad", counts(4, 2), obs=obs, var=var)
    out = streaming.cut(path, cells=np.array([0, 2, 3]), genes=np.arange(2), out=tmp_path / "o")
    kept = read(out)
    assert kept.obs["gene"].tolist() == ["A", "A", "C"]
    assert kept.obs["gene"].cat.categories.tolist() == ["A", "C"]
    assert kept.obs["umis"].tolist() == [1, 3, 4]
    assert kept.obs["twice"].tolist() == ["w", "y", "z"]
    assert kept.obs_names.tolist() == ["a", "c", "c-1"]
    assert kept.var_names.tolist() == ["g", "g-1"]
    assert kept.var["length"].tolist() == [1.5, 2.5]


def test_the_names_of_the_indices_are_kept(tmp_path):
    """But for one that a column has, too: repeated names are numbered in the index alone."""
    obs = pd.DataFrame(index=pd.Index(["a", "b", "b"], name="barcode"))
    var = pd.DataFrame(index=pd.Index(["g", "h"], name="gene_id"))
    chosen = {"cells": np.arange(3), "genes": np.arange(2)}
    with pytest.warns(UserWarning, match="not unique"):
        path = write(tmp_path / "source.h5ad", counts(3, 2), obs=obs, var=var)
    with h5py.File(path, "r+") as file:
        file["obs"].attrs["column-order"] = ["barcode"]
    kept = read(streaming.cut(path, **chosen, out=tmp_path / "out.h5ad"))
    assert (kept.var.index.name, kept.var_names.tolist()) == ("gene_id", ["g", "h"])
    assert (kept.obs.index.name, kept.obs_names.tolist()) == (None, ["a", "b", "b-1"])
    assert kept.obs["barcode"].tolist() == ["a", "b", "b"]


def test_attributes_of_a_fixed_length_are_text_too(tmp_path):
    obs = pd.DataFrame({"gene": ["A", "B"]}, index=pd.Index(["a", "b"], name="cell"))
    path = write(tmp_path / "source.h5ad", np.ones((2, 3)), "csr", obs=obs)
    with h5py.File(path, "r+") as file:
        file["X"].attrs["encoding-type"] = np.bytes_("csr_matrix")
        file["obs"].attrs["column-order"] = np.array([b"gene"])
        file["obs"].attrs["_index"] = np.bytes_("cell")
    chosen = {"cells": np.arange(2), "genes": np.arange(1)}
    kept = read(streaming.cut(path, **chosen, out=tmp_path / "out.h5ad"))
    assert kept.obs["gene"].tolist() == ["A", "B"]
    assert (kept.obs.index.name, kept.obs_names.tolist()) == ("cell", ["a", "b"])


def test_categories_of_before_anndata_0_8_are_read(tmp_path):
    path = write(
        tmp_path / "source.h5ad",
        counts(3, 2),
        obs=pd.DataFrame({"gene": ["x"] * 3}, index=list("abc")),
    )
    with h5py.File(path, "r+") as file:
        obs = file["obs"]
        del obs["gene"]
        obs["gene"] = np.array([1, 0, -1], dtype=np.int8)
        obs["__categories/gene"] = np.array([b"A", b"B"])
        obs["gene"].attrs["categories"] = obs["__categories/gene"].ref
        del obs["_index"]
        obs["_index"] = np.array([b"a", b"b", b"c"])
    out = streaming.cut(path, cells=np.arange(3), genes=np.arange(2), out=tmp_path / "out.h5ad")
    kept = read(out).obs
    assert kept["gene"].tolist()[:2] == ["B", "A"]
    assert kept["gene"].isna().tolist() == [False, False, True]
    assert kept.index.tolist() == ["a", "b", "c"]


def test_given_annotations_take_the_place_of_the_sources(tmp_path, source):
    obs = pd.DataFrame({"target": ["A", "B"]}, index=["p", "q"])
    var = pd.DataFrame(index=["g5"])
    out = streaming.cut(
        source,
        cells=np.array([4, 5]),
        genes=np.array([5]),
        out=tmp_path / "out.h5ad",
        obs=obs,
        var=var,
        uns={"note": "mine"},
    )
    kept = read(out)
    assert kept.obs["target"].tolist() == ["A", "B"]
    assert kept.uns == {"note": "mine"}
    assert obs.index.tolist() == ["p", "q"]


def test_the_mark_of_a_simulation_is_passed_on(tmp_path):
    path = write(tmp_path / "source.h5ad", counts(5, 3), uns={"simulated": {"seed": 7}})
    out = streaming.cut(path, cells=np.arange(5), genes=np.arange(3), out=tmp_path / "out.h5ad")
    assert read(out).uns["simulated"]["seed"] == 7


@pytest.mark.parametrize("layout", ["csr", "csr-gzip"])
def test_blocks_of_rows_make_up_the_matrix(tmp_path, layout):
    x = counts(40, 9)
    path = write(tmp_path / "source.h5ad", x, layout)
    blocks = list(streaming.row_blocks(path, block=100))
    assert len(blocks) > 3
    np.testing.assert_array_equal(sparse.vstack(blocks).toarray(), x)


# -------------------------------------------------------------------------------- interruption


def slowed(path, out, block, pause):
    """A process that makes a cut and waits a little after every part."""
    code = f"""
import time, numpy as np
from smslib import streaming
write_part = streaming._write_part
def slowly(*arguments):
    write_part(*arguments)
    time.sleep({pause})
streaming._write_part = slowly
chosen = {{"cells": np.arange(50), "genes": np.arange(12)}}
streaming.cut({str(path)!r}, **chosen, out={str(out)!r}, block={block})
"""
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)


def test_a_killed_cut_goes_on_where_it_stopped(tmp_path, source, monkeypatch):
    out, folder = tmp_path / "out.h5ad", tmp_path / "out.h5ad.part"
    process = slowed(source, out, block=100, pause=0.2)
    deadline = time.monotonic() + 60
    while len(list(folder.glob("*.npz"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = {part.name: part.stat().st_mtime_ns for part in folder.glob("*.npz")}
    assert 3 <= len(done) < 25
    assert not out.exists()

    written = []
    write_part = streaming._write_part
    monkeypatch.setattr(
        streaming,
        "_write_part",
        lambda part, *rest: written.append(part) or write_part(part, *rest),
    )
    streaming.cut(source, cells=np.arange(50), genes=np.arange(12), out=out, block=100)
    assert not {part.name for part in written} & done.keys()
    np.testing.assert_array_equal(read(out).X.toarray(), counts(50, 12))
    assert not folder.exists()


def interrupted(source, out, monkeypatch, after, error=KeyboardInterrupt):
    """Stop a cut after some parts."""
    write_part, written = streaming._write_part, []

    def stop(part, *rest):
        if len(written) == after:
            raise error
        write_part(part, *rest)
        written.append(part)

    with monkeypatch.context() as patch:
        patch.setattr(streaming, "_write_part", stop)
        with pytest.raises(type(error) if isinstance(error, Exception) else error):
            streaming.cut(source, cells=np.arange(50), genes=np.arange(12), out=out, block=100)
    return written


def test_a_spoiled_part_is_made_again(tmp_path, source, monkeypatch):
    out = tmp_path / "out.h5ad"
    first, second, *_ = interrupted(source, out, monkeypatch, after=4)
    content = bytearray(first.read_bytes())
    content[len(content) // 3] ^= 0xFF
    first.write_bytes(content)
    second.write_bytes(second.read_bytes()[:40])
    streaming.cut(source, cells=np.arange(50), genes=np.arange(12), out=out, block=100)
    np.testing.assert_array_equal(read(out).X.toarray(), counts(50, 12))


def test_a_part_spoiled_before_it_is_used_is_noticed_and_made_again(tmp_path, source, monkeypatch):
    out, write_csr = tmp_path / "out.h5ad", streaming._write_csr

    def spoil(file, folder, *rest):
        part = folder / "000000.npz"
        content = bytearray(part.read_bytes())
        content[content.index(b"lengths-0.npy") - 31] ^= 0xFF  # the last byte of the array before
        part.write_bytes(content)
        write_csr(file, folder, *rest)

    chosen = {"cells": np.arange(50), "genes": np.arange(12), "out": out, "block": 100}
    with monkeypatch.context() as patch:
        patch.setattr(streaming, "_write_csr", spoil)
        with pytest.raises(OSError, match=r"000000\.npz is not what was written; .* call again"):
            streaming.cut(source, **chosen)
    streaming.cut(source, **chosen)
    np.testing.assert_array_equal(read(out).X.toarray(), counts(50, 12))


def test_what_killed_calls_left_of_their_results_does_not_pile_up(tmp_path, source, monkeypatch):
    out, folder = tmp_path / "out.h5ad", tmp_path / "out.h5ad.part"
    first, *_ = interrupted(source, out, monkeypatch, after=4)
    drafts = [folder / ".out.h5ad.0.tmp", folder / ".000004.npz.1.tmp"]
    for draft in drafts:
        draft.write_bytes(b"half")
    interrupted(source, out, monkeypatch, after=0)
    assert first.exists()
    assert not any(draft.exists() for draft in drafts)


@pytest.mark.parametrize("other", ["cells", "genes", "source"])
def test_parts_of_another_cut_are_not_used(tmp_path, source, monkeypatch, other):
    out, x = tmp_path / "out.h5ad", counts(50, 12)
    interrupted(source, out, monkeypatch, after=4)
    cells, genes = np.arange(50), np.arange(12)
    if other == "source":
        x = counts(50, 12, seed=1)
        write(source, x)
    cells, genes = (
        (cells[::-1][::-1] if other != "cells" else cells[1:]),
        genes[other == "genes" :],
    )
    streaming.cut(source, cells=cells, genes=genes, out=out, block=100)
    np.testing.assert_array_equal(read(out).X.toarray(), x[cells][:, genes])


def test_a_full_disk_is_explained_and_the_cut_goes_on_afterwards(tmp_path, source, monkeypatch):
    out = tmp_path / "out.h5ad"
    write_part, written = streaming._write_part, []

    def full(part, *rest):
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_part(part, *rest)
        written.append(part)

    with monkeypatch.context() as patch:
        patch.setattr(streaming, "_write_part", full)
        with pytest.raises(OSError, match=r"is full; .* kept in out.h5ad.part.*goes on") as caught:
            streaming.cut(source, cells=np.arange(50), genes=np.arange(12), out=out, block=100)
    assert caught.value.errno == errno.ENOSPC
    assert all(part.exists() for part in written)
    streaming.cut(source, cells=np.arange(50), genes=np.arange(12), out=out, block=100)
    np.testing.assert_array_equal(read(out).X.toarray(), counts(50, 12))


def test_other_errors_of_the_disk_are_passed_on(tmp_path, source, monkeypatch):
    error = PermissionError(errno.EACCES, "not yours")
    interrupted(source, tmp_path / "out.h5ad", monkeypatch, after=0, error=error)


def test_too_little_space_is_noticed_before_anything_is_read(tmp_path, source, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(
        OSError, match=r"room for 50 cells x 12 genes and .* 2\.4 kB needed, 1\.0 kB free in"
    ):
        streaming.cut(source, cells=np.arange(50), genes=np.arange(12), out=tmp_path / "out.h5ad")
    assert [path.name for path in tmp_path.iterdir()] == ["source.h5ad"]


def test_a_cut_that_goes_on_needs_room_for_the_rest_only(tmp_path, source, monkeypatch):
    out, usage = tmp_path / "out.h5ad", shutil.disk_usage(tmp_path)
    monkeypatch.setattr(streaming, "_ON_DISK", 80)
    interrupted(source, out, monkeypatch, after=4)
    left = 80 * 300 - sum(file.stat().st_size for file in (tmp_path / "out.h5ad.part").iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=left - 1))
    with pytest.raises(OSError, match="room for 50 cells x 12 genes"):
        streaming.cut(source, cells=np.arange(50), genes=np.arange(12), out=out, block=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=left))
    streaming.cut(source, cells=np.arange(50), genes=np.arange(12), out=out, block=100)
    np.testing.assert_array_equal(read(out).X.toarray(), counts(50, 12))


def test_what_is_written_is_compared_with_what_was_read(tmp_path, source, monkeypatch):
    band = streaming._band

    def spoiled(*arguments):
        rows = band(*arguments)
        rows.data[0] += 1
        return rows

    monkeypatch.setattr(streaming, "_band", spoiled)
    with pytest.raises(ValueError, match="does not hold what was read"):
        streaming.cut(source, cells=np.arange(50), genes=np.arange(12), out=tmp_path / "out.h5ad")
    assert [path.name for path in tmp_path.iterdir()] == ["source.h5ad"]


# ----------------------------------------------------------------------------------- bad input


def refused(path, error, match, *, cells=None, genes=None, **options):
    chosen = {
        "cells": np.arange(50) if cells is None else cells,
        "genes": np.arange(12) if genes is None else genes,
    }
    with pytest.raises(error, match=match):
        streaming.cut(path, **chosen, out=path.with_name("out.h5ad"), **options)
    assert not path.with_name("out.h5ad.part").exists()


def test_a_missing_file_is_named(tmp_path):
    refused(tmp_path / "none.h5ad", FileNotFoundError, r"none.h5ad does not exist; fetch it")


def test_a_truncated_file_is_refused(tmp_path, source):
    source.write_bytes(source.read_bytes()[:-500])
    refused(source, ValueError, r"bytes\) cannot be read as HDF5 .*cut short.*fetch it again")


def test_a_foreign_file_is_refused(tmp_path):
    path = tmp_path / "table.h5ad"
    path.write_text("cell,gene\n")
    refused(path, ValueError, "another kind of file")
    with h5py.File(path, "w") as file:
        file["matrix"] = np.zeros(3)
    refused(path, ValueError, r"no \['X', 'obs', 'var'\], but \['matrix'\]")


def test_an_ancient_file_is_refused(tmp_path, source):
    with h5py.File(source, "r+") as file:
        del file["obs"]
        file["obs"] = np.zeros(50, dtype=[("index", "S3")])
    refused(source, ValueError, r"before 0.7; write it again: .*read_h5ad\(path\)\.write_h5ad\(")


@pytest.mark.filterwarnings("ignore:.*was written with")
def test_an_ancient_file_can_be_written_again_and_cut(tmp_path):
    with h5py.File(tmp_path / "old.h5ad", "w") as file:
        file["X"] = counts(5, 2)
        file["obs"] = np.array([(b"c%d" % n,) for n in range(5)], dtype=[("index", "S3")])
        file["var"] = np.array([(b"g0",), (b"g1",)], dtype=[("index", "S3")])
    perturbseq.read_h5ad(tmp_path / "old.h5ad").write_h5ad(tmp_path / "new.h5ad")
    chosen = {"cells": np.array([1, 3]), "genes": np.arange(2), "out": tmp_path / "out.h5ad"}
    kept = read(streaming.cut(tmp_path / "new.h5ad", **chosen))
    np.testing.assert_array_equal(kept.X.toarray(), counts(5, 2)[[1, 3]])
    assert kept.obs_names.tolist() == ["c1", "c3"]


@pytest.mark.parametrize("wrong", ["text", "vector", "coo"])
def test_a_matrix_of_an_unknown_kind_is_refused(source, wrong):
    with h5py.File(source, "r+") as file:
        del file["X"]
        if wrong == "coo":
            file.create_group("X").attrs["encoding-type"] = "coo_matrix"
        else:
            file["X"] = np.full((50, 12), b"a") if wrong == "text" else np.zeros(50)
    refused(source, ValueError, "X is stored as .*; expected numbers, dense with two axes, CSR")


def test_a_file_damaged_inside_is_refused(tmp_path):
    path = write(tmp_path / "source.h5ad", counts(50, 12), "gzip")
    with h5py.File(path) as file:
        where = file["X"].id.get_chunk_info(10)
    with path.open("r+b") as file:
        file.seek(where.byte_offset)
        file.write(os.urandom(where.size))
    refused(path, ValueError, "cannot be read between cells .* damaged: fetch it again", block=300)


def test_an_existing_file_is_not_overwritten(tmp_path, source):
    (tmp_path / "out.h5ad").write_text("precious")
    refused(source, FileExistsError, "out.h5ad exists; delete it or write to another")
    assert (tmp_path / "out.h5ad").read_text() == "precious"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"cells": np.ones(49, dtype=bool)}, "cells is a mask of 49, but the file has 50"),
        ({"cells": np.zeros(50, dtype=bool)}, "no cells are chosen of the 50"),
        ({"genes": np.array([], dtype=int)}, "no genes are chosen of the 12"),
        ({"genes": np.array([3, 2])}, "genes from 2 to 3 are not ascending positions below 12"),
        ({"genes": np.array([3, 3])}, "not ascending"),
        ({"cells": np.array([-1, 4])}, "not ascending positions below 50"),
        ({"cells": np.array([4, 50])}, "not ascending positions below 50"),
        ({"cells": np.array([0.0, 1.5, 3.0])}, "cells has .* type float64; expected a boolean m"),
        ({"cells": np.ones(50, dtype=object)}, r"type object; .*np.asarray\(mask, dtype=bool\)"),
        ({"genes": np.array(["g0", "g3"])}, "type <U2; .* or positions .*np.isin"),
        ({"genes": np.ones((1, 12), dtype=bool)}, r"genes has shape \(1, 12\)"),
        ({"genes": np.array([])}, "no genes are chosen of the 12"),
        ({"obs": pd.DataFrame(index=["a"])}, "obs has 1 rows for 50 chosen"),
        ({"var": pd.DataFrame(index=["a"])}, "var has 1 rows for 12 chosen"),
    ],
)
def test_choices_that_do_not_fit_the_file_are_refused(source, options, match):
    refused(source, ValueError, match, **options)


def normalised(x):
    return 1e4 * x / np.maximum(x.sum(1, keepdims=True), 1)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda x: np.log1p(normalised(x)), "all are small fractions, as after log1p"),
        (normalised, "some are large fractions, as after normalising"),
        (lambda x: x - x.mean(0), "some are negative, as after centring or scaling"),
        (lambda x: np.where(x == 2, np.nan, x), "some are missing or infinite"),
        (lambda x: np.where(x == 2, np.inf, x), "some are missing or infinite"),
        (lambda x: np.where(x == 2, -2, x), "some are negative"),
        (lambda x: np.where(x == 2, 2.0**63, x), "X holds 9.223372"),
    ],
)
@pytest.mark.parametrize("layout", ["contiguous", "csr", "csc"])
def test_values_that_are_no_counts_are_refused_and_it_is_said_how_that_shows(
    tmp_path, change, match, layout
):
    path = write(tmp_path / "source.h5ad", change(counts(50, 12)).astype(np.float32), layout)
    refused(path, ValueError, match)


def test_the_first_value_that_is_no_count_is_placed(tmp_path):
    x = counts(50, 12)
    x[31, 7] = 0.5
    path = write(tmp_path / "source.h5ad", x)
    refused(
        path, ValueError, r"X holds 0\.5 for cell 31, gene 7 \(positions in the file\)", block=99
    )
    chosen = {"cells": np.arange(20, 50), "genes": np.array([2, 7])}
    refused(path, ValueError, "X holds 0.5 for cell 31, gene 7 ", **chosen)


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix, sparse.csc_matrix])
@pytest.mark.parametrize("with_x", [True, False])
def test_counts_in_a_layer_are_cut(tmp_path, form, with_x):
    x = counts(50, 12)
    screen = anndata.AnnData(np.log1p(x) if with_x else None, layers={"counts": form(x)})
    path = tmp_path / "source.h5ad"
    screen.write_h5ad(path)
    chosen = {"cells": np.array([0, 3, 44]), "genes": np.array([2, 3]), "block": 99}
    missing = r"X holds [01]\.\d+ .* take the raw file" if with_x else r"has no \['X'\]"
    refused(path, ValueError, rf"{missing}.*It has layers \['counts'\]: .*layer=", block=99)
    refused(path, KeyError, "layer 'count' is not in .*; nearest known: .'counts'", layer="count")
    out = streaming.cut(path, **chosen, layer="counts", out=tmp_path / "out.h5ad")
    np.testing.assert_array_equal(read(out).X.toarray(), x[[0, 3, 44]][:, [2, 3]])
    assert not read(out).layers


def test_a_layer_without_counts_is_named(tmp_path):
    x = counts(50, 12)
    path = tmp_path / "source.h5ad"
    anndata.AnnData(x, layers={"log": np.log1p(x), "raw": x}).write_h5ad(path)
    refused(path, ValueError, r"source.h5ad: layers/log holds .*layers \['raw'\]", layer="log")


def test_parts_of_another_layer_are_not_used(tmp_path, monkeypatch):
    x = counts(50, 12)
    path, out = tmp_path / "source.h5ad", tmp_path / "out.h5ad"
    anndata.AnnData(x, layers={"twice": 2 * x}).write_h5ad(path)
    interrupted(path, out, monkeypatch, 2)
    chosen = {"cells": np.arange(50), "genes": np.arange(12), "block": 100}
    streaming.cut(path, **chosen, layer="twice", out=out)
    np.testing.assert_array_equal(read(out).X.toarray(), 2 * x)


def test_row_blocks_want_csr(source):
    with pytest.raises(ValueError, match="X is not CSR; pass a file that streaming.cut wrote"):
        next(streaming.row_blocks(source))
