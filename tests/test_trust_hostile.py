"""Files and names of strangers: what is refused, in words, before it does harm.

The long part, thousands of spoilt inputs for every reader, is `tests/torture/fuzz.py`.
"""

import gzip
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torture import fuzz, seeds

from smslib import perturbseq, sources, store, streaming, sweep, untrusted
from smslib.data import Cells, from_anndata
from smslib.model import SMSVAE

PROVENANCE = {"commit": "abc"}


# ---------------------------------------------------------------------------- .h5ad files


@pytest.fixture
def screen(tmp_path):
    seeds.h5ad(tmp_path / "screen.h5ad", "csr")
    return tmp_path / "screen.h5ad"


def spoil(path, change):
    with h5py.File(path, "r+") as file:
        del file["uns/note"]
        change(file)
    return path


def external_link(file):
    file["uns/note"] = h5py.ExternalLink("/etc/passwd", "/")


def soft_link(file):
    file["uns/note"] = h5py.SoftLink("/uns")


def external_bytes(file):
    file.create_dataset("uns/note", (8,), "u1", external=[("/etc/hostname", 0, 8)])


def virtual_data(file):
    layout = h5py.VirtualLayout((8,), "u1")
    layout[:] = h5py.VirtualSource("other.h5", "x", (8,))
    file.create_virtual_dataset("uns/note", layout)


def cycle(file):
    file["uns/note"] = file["uns"]


def abyss(file):
    file.create_group("uns/note" + "/a" * 40)


def promise(file):
    file.create_dataset("uns/note", (1 << 20, 1 << 20), "f4", chunks=(64, 64))


HARM = {
    external_link: "uns/note is a link to elsewhere",
    soft_link: "uns/note is a link to elsewhere",
    external_bytes: "uns/note keeps its data in other files",
    virtual_data: "uns/note keeps its data in other files",
    cycle: "is another part of the same file again",
    abyss: "groups are nested more than 32 deep",
    promise: "declares 4,398,0.* bytes; expected at most 200 times its size",
}


@pytest.mark.parametrize("change", HARM, ids=lambda change: change.__name__)
def test_a_file_that_reaches_out_or_promises_too_much_is_refused(screen, change):
    spoil(screen, change)
    with pytest.raises(ValueError, match=HARM[change]):
        perturbseq.read_h5ad(screen)
    with pytest.raises(ValueError, match=HARM[change]), streaming.opened(screen):
        pass


def test_parts_without_number_are_refused(screen, monkeypatch):
    monkeypatch.setattr(untrusted, "_MOST_PARTS", 5)
    with pytest.raises(ValueError, match="more than 5 parts"):
        perturbseq.read_h5ad(screen)


def test_a_pickle_in_a_file_is_bytes(screen, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    spoil(screen, lambda file: fuzz._pickled(None, file, "uns/note"))
    with pytest.raises(ValueError, match=r"screen\.h5ad is not an \.h5ad file as"):
        perturbseq.read_h5ad(screen)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(("part", "wrong"), [("indices", 99), ("indices", -1), ("indptr", 99)])
def test_positions_that_lead_out_of_the_matrix_are_refused(screen, part, wrong, tmp_path):
    with h5py.File(screen, "r+") as file:
        file[f"X/{part}"][1] = wrong
    with pytest.raises(ValueError, match=r"screen\.h5ad is not an \.h5ad file as"):
        perturbseq.read_h5ad(screen)
    with pytest.raises(ValueError, match=r"screen\.h5ad cannot be read between cells"):
        streaming.cut(screen, cells=np.arange(8), genes=np.arange(5), out=tmp_path / "out.h5ad")


def test_positions_that_lead_out_of_a_matrix_in_memory_are_refused():
    adata = seeds.screen("csr")
    adata.X.indices[1] = 99
    with pytest.raises(ValueError, match="indices"):
        let_in(adata)


@pytest.mark.parametrize("name", ["X/indptr", "obs/_index", "var/_index", "obs/target"])
@pytest.mark.parametrize("shape", [(), (2, 3)], ids=str)
def test_a_part_of_another_shape_is_damage(screen, name, shape, tmp_path):
    with h5py.File(screen, "r+") as file:
        attributes = dict(file[name].attrs)
        del file[name]
        file.create_dataset(name, data=np.zeros(shape))
        file[name].attrs.update(attributes)
    with pytest.raises(ValueError, match=r"screen\.h5ad"):
        perturbseq.read_h5ad(screen)
    with pytest.raises(ValueError, match=r"damaged|file has|of 0"):
        streaming.cut(screen, cells=np.arange(8), genes=np.arange(5), out=tmp_path / "out.h5ad")
    assert not (tmp_path / "out.h5ad").exists()


def test_a_number_in_the_place_of_the_unstructured_part_is_damage(screen, tmp_path):
    with h5py.File(screen, "r+") as file:
        del file["uns"]
        file["uns"] = 1.0
    with pytest.raises(ValueError, match=r"screen\.h5ad is damaged"):
        streaming.cut(screen, cells=np.arange(8), genes=np.arange(5), out=tmp_path / "out.h5ad")
    assert not (tmp_path / "out.h5ad").exists()


# ------------------------------------------------------------------------------ .rda files


def read_rda(folder, content):
    path = folder / "screen.rda"
    path.write_bytes(content)
    return perturbseq._read_papalexi(path)


def test_the_seed_of_the_spoilt_files_is_a_good_one(tmp_path):
    for content in (seeds.rda(), seeds.compressed_rda()):
        screen = read_rda(tmp_path, content)
        assert screen.X.toarray().tolist() == [[3, 0], [0, 2], [0, 5]]
        assert screen.obsm["guides"].toarray().tolist() == [[4, 0], [0, 6], [1, 0]]
        assert screen.uns["guide_target"]["target"].tolist() == ["STAT1", "non-targeting"]


def test_what_unpacks_to_far_more_than_it_is_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(untrusted, "LARGE", 1 << 20)
    with pytest.raises(ValueError, match=r"unpacks to more than 1,635,000 bytes.*200 times"):
        read_rda(tmp_path, gzip.compress(bytes(1 << 23)))


def test_what_is_packed_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is packed twice"):
        read_rda(tmp_path, gzip.compress(gzip.compress(b"RDX2\nX\n")))


def test_a_list_in_a_list_in_a_list_is_refused(tmp_path):
    nested = seeds.rda()[:19] + np.array([19, 1], ">i4").tobytes() * 20_000
    with pytest.raises(ValueError, match="is cut short or damaged"):
        read_rda(tmp_path, nested)


def test_another_screen_than_the_published_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"does not hold a screen as the published file does"):
        read_rda(tmp_path, seeds.rda().replace(b"bio_rep", b"bio_rap"))


def test_parts_of_a_screen_that_differ_in_cells_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(seeds, "frame", lambda items, n: FRAME(items, n))
    huge = seeds.rda().replace(seeds.integers((2, 3)), seeds.integers((2, 2**31 - 1)))
    with pytest.raises(ValueError, match=r"parts of the screen have \[3, 2147483647\] cells"):
        read_rda(tmp_path, huge)


FRAME = seeds.frame


# ---------------------------------------------------------------------------- gene lists


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("string = 3\n", r"assigns to \['string'\] what is no list of gene symbols"),
        ("EXOSOME = 'AB'\n", r"\['EXOSOME'\] what is no list"),
        ("EXOSOME = ['A', 1]\n", r"\['EXOSOME'\] what is no list"),
    ],
)
def test_lists_of_something_else_are_refused(line, message):
    book = json.loads(seeds.notebook())
    book["cells"][0]["source"].append(line)
    with pytest.raises(ValueError, match=message):
        sources._gene_list_table(json.dumps(book).encode())


@pytest.mark.parametrize("code", ["x = " + "[" * 10_000, "x = " + "-" * 99_999 + "1", "x = '\0'"])
def test_a_cell_that_nobody_typed_is_passed_over(code):
    book = json.loads(seeds.notebook())
    book["cells"].append({"cell_type": "code", "source": [code]})
    assert sources._gene_list_table(json.dumps(book).encode()).startswith(b"list\tname\tsymbol\n")


def test_a_notebook_nested_without_end_is_refused():
    with pytest.raises(ValueError, match="expected a Jupyter notebook"):
        sources._gene_list_table(b"[" * 100_000)


# ------------------------------------------------------------------------- results and runs


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/tmp/x", ".", "", "x" * 201])
def test_no_name_leads_out_of_the_folder_of_results(tmp_path, name):
    root = tmp_path / "results"
    if name:
        with pytest.raises(ValueError, match="is not the name of a file; expected one without"):
            store.put(name, {"a": 1}, root=root, provenance=PROVENANCE)
    (tmp_path / "x.json").write_bytes(seeds.stored())
    with pytest.raises((ValueError, KeyError)):
        store.get(name, root=root)
    assert not list(tmp_path.rglob("results/*"))


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff", b"1" * 10_000, b"[1]", b"null"])
def test_what_is_no_json_object_is_named(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    for read in (
        lambda: store.read_json(tmp_path / "x.json"),
        lambda: store.get("x", root=tmp_path),
        lambda: sweep.collect(tmp_path),
    ):
        with pytest.raises(ValueError, match=r"x\.json (is not JSON|holds a)"):
            read()


@pytest.mark.parametrize("content", ['{"values": 1, "provenance": {}}', '{"values": {}}', "{}"])
def test_what_is_no_experiment_is_named(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=r"x\.json is not an experiment"):
        store.get("x", root=tmp_path)


def test_a_run_whose_parts_are_no_dicts_is_named(tmp_path):
    (tmp_path / "x.json").write_text('{"config": [], "result": {}, "provenance": {}}')
    with pytest.raises(ValueError, match=r"x\.json is not a run"):
        sweep.collect(tmp_path)


# -------------------------------------------------------------------------------- models


@pytest.fixture
def saved(tmp_path):
    seeds.model(tmp_path)
    return tmp_path


def reconfigure(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config["model"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "changes", [{"n_genes": 1 << 40}, {"n_hidden": 1 << 40}, {"n_layers": 1 << 40}], ids=str
)
def test_a_model_that_declares_more_than_its_weights_is_refused(saved, changes):
    reconfigure(saved, **changes)
    with pytest.raises(ValueError, match="does not hold a whole model"):
        SMSVAE.load(saved)


def write_weights(folder, write):
    """Replace the weights, and leave out the checksum that would tell."""
    config = json.loads((folder / "config.json").read_text())
    del config["weights_sha256"]
    (folder / "config.json").write_text(json.dumps(config))
    write(folder / "weights.pt")


def test_weights_are_never_unpickled(saved, monkeypatch):
    monkeypatch.chdir(saved)
    write_weights(saved, lambda path: path.write_bytes(fuzz.pickle_of_a_command()))
    with pytest.raises(ValueError, match="is no ZIP archive"):
        SMSVAE.load(saved)
    write_weights_of = {"archive/data.pkl": fuzz.pickle_of_a_command(), "archive/version": b"3"}

    def archive(path):
        with zipfile.ZipFile(path, "w") as file:
            for name, content in write_weights_of.items():
                file.writestr(name, content)

    archive(saved / "weights.pt")
    with pytest.raises(ValueError, match=r"does not hold a whole model \(UnpicklingError"):
        SMSVAE.load(saved)
    assert not (saved / "executed").exists()


def test_weights_that_unpack_to_more_than_the_file_are_refused(saved):
    def bomb(path):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("archive/data/0", bytes(1 << 20))

    write_weights(saved, bomb)
    with pytest.raises(ValueError, match=r"declares 1,048,576 bytes in a file of fewer"):
        SMSVAE.load(saved)


def test_a_weight_larger_than_its_numbers_is_refused(saved):
    state = torch.load(saved / "weights.pt", weights_only=True)
    state["design"] = torch.zeros(1).expand(1 << 20, 1 << 20)
    write_weights(saved, lambda path: torch.save(state, path))
    with pytest.raises(ValueError, match="declares more numbers than it has"):
        SMSVAE.load(saved)


def test_two_halves_of_two_models_are_no_model(saved, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    SMSVAE.load(saved).save(other)
    model = SMSVAE.load(other)
    with torch.no_grad():
        model.log_theta.add_(1.0)
    model.save(other)
    (saved / "weights.pt").write_bytes((other / "weights.pt").read_bytes())  # killed here
    with pytest.raises(ValueError, match="configuration and weights are of two savings"):
        SMSVAE.load(saved)


def test_a_model_without_its_weights_says_so(saved):
    (saved / "weights.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"no saved model \(weights\.pt is missing\)"):
        SMSVAE.load(saved)


# ------------------------------------------------------------------------------- AnnData


@pytest.fixture
def adata():
    return seeds.screen("dense")


def let_in(adata, **options):
    return from_anndata(adata, perturbation_key="target", control="control", **options)


@pytest.mark.parametrize("count", [2.0**24 + 2, 1e300])
def test_counts_that_single_precision_would_change_are_refused(adata, count):
    adata.X = adata.X.astype(float)
    adata.X[2, 1] = count
    with pytest.raises(ValueError, match="expected counts up to 16,777,216, which single prec"):
        let_in(adata)


@pytest.mark.parametrize("kind", ["c8", "U3"])
def test_a_matrix_of_no_real_numbers_is_refused(adata, kind):
    adata.layers["raw"] = adata.X.astype(kind)
    with pytest.raises(ValueError, match=r"layers\['raw'\] holds values of type .*real numbers"):
        let_in(adata, layer="raw")


@pytest.mark.parametrize("label", ["KLF1+", "+", ""])
def test_a_target_without_a_name_is_refused(adata, label):
    adata.obs["target"] = ["control"] * 7 + [label]
    with pytest.raises(ValueError, match=r"conditions \['.*'\] have a target without a name"):
        let_in(adata)


def test_empty_categories_of_any_type_are_named(adata):
    labels = adata.obs["target"].cat.add_categories([7])
    adata.obs["target"] = labels.cat.add_categories(["unused"])
    with pytest.raises(ValueError, match=r"conditions without cells: \[7, 'unused'\]"):
        let_in(adata)


def test_two_columns_of_labels_are_refused(adata):
    import pandas as pd

    adata.obs = pd.concat([adata.obs, adata.obs], axis=1)
    with pytest.raises(ValueError, match="has 2 columns 'target'; keep one"):
        let_in(adata)


# --------------------------------------------------------------------------- a few of many


def test_an_input_that_goes_on_for_ever_in_c_is_a_fault_and_the_others_are_read(tmp_path):
    """In a process of its own, as it forks."""
    program = """
import itertools, os, sys
from torture import fuzz

def feed(rng, good, folder):
    os.write(log, b"x")
    return sum(itertools.repeat(0)) if os.stat(log).st_size == 3 else 0

log, fuzz.SECONDS = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1
fuzz.READERS = {"x": fuzz.Reader(lambda _: None, feed, (), 4)}
values, faults = fuzz.fuzz()
assert values["fuzz.x.faults"] == 1, values
assert values["fuzz.x.read"] == 3, values  # of four
assert "went on for ever" in faults["x"][1], faults
"""
    command = [sys.executable, "-c", program, str(tmp_path / "log")]
    paths = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=paths)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", [name for name in fuzz.READERS if name != "names"])
def test_a_few_spoilt_inputs_lead_to_documented_errors_alone(name, tmp_path):
    """In this process, so without the limits of the long part."""
    reader, answered = fuzz.READERS[name], 0
    good = reader.prepare(tmp_path)
    for number in range(12):
        try:
            reader.feed(np.random.default_rng([9, number]), good, tmp_path)
        except reader.may_raise as error:
            answered += bool(str(error))
        else:
            answered += 1
    assert answered == 12
    assert not (tmp_path / "executed").exists()


def test_the_cells_of_a_good_screen_are_let_in(adata):
    cells, design = let_in(adata)
    assert isinstance(cells, Cells)
    assert design.conditions == ("control", "KLF1", "KLF1+MYC")
