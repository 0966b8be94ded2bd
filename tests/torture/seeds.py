"""Good inputs of every reader, small, for mutations to spoil."""

import gzip
import json
import struct
import warnings

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from smslib.data import Design
from smslib.model import SMSVAE
from smslib.sources import TABLE_9

# Types and flags of R's serialisation (R Internals, 1.8).
SYMBOL, PAIRS, CHARACTERS, INTEGER, REAL, STRINGS, LIST, S4, NIL = 1, 2, 9, 13, 14, 16, 19, 25, 254
OBJECT, ATTRIBUTES, TAG, UTF8 = 1 << 8, 1 << 9, 1 << 10, 8 << 12


def number(value):
    return struct.pack(">i", value)


def text(word):
    return number(CHARACTERS | UTF8) + number(len(word)) + word.encode()


def integers(values):
    return number(INTEGER) + number(len(values)) + np.asarray(values, ">i4").tobytes()


def reals(values):
    return number(REAL) + number(len(values)) + np.asarray(values, ">f8").tobytes()


def strings(words):
    return number(STRINGS) + number(len(words)) + b"".join(map(text, words))


def pairs(items):
    head = number(PAIRS | TAG) + number(SYMBOL)
    return b"".join(head + text(name) + value for name, value in items.items()) + number(NIL)


def vector(items, **attributes):
    """Return a list with names, or a data frame if it has a class."""
    flags = LIST | ATTRIBUTES | (OBJECT if "class" in attributes else 0)
    names = {"names": strings(list(items)), **attributes}
    return number(flags) + number(len(items)) + b"".join(items.values()) + pairs(names)


def frame(items, n_rows):
    return vector(
        items, **{"class": strings(["data.frame"]), "row.names": integers(range(1, n_rows + 1))}
    )


def matrix(rows, columns, values, names):
    """Return a dgTMatrix: genes or guides in rows, cells in columns."""
    shape = (len(names), int(max(columns)) + 1)
    dimnames = number(LIST) + number(2) + strings(names) + number(NIL)
    slots = {"i": integers(rows), "j": integers(columns), "Dim": integers(shape)}
    slots |= {"Dimnames": dimnames, "x": reals(values), "class": strings(["dgTMatrix"])}
    return number(S4 | OBJECT | ATTRIBUTES) + pairs(slots)


def rda():
    """Return a screen of three cells in the form of the published .rda, not compressed."""
    guides = ["STAT1g1", "NTg1"]
    targets = {"grna_id": strings(guides), "grna_target": strings(["STAT1", "non-targeting"])}
    screen = {
        "response_matrix": matrix([0, 1, 1], [0, 1, 2], [3, 2, 5], ["ACTB", "MYC"]),
        "grna_matrix": matrix([0, 1, 0], [0, 1, 2], [4, 6, 1], guides),
        "extra_covariates": frame({"bio_rep": strings(["r1", "r2", "r1"])}, 3),
        "grna_target_data_frame": frame(targets, 2),
    }
    versions = number(2) + number(0x30602) + number(0x20300)
    return b"RDX2\nX\n" + versions + pairs({"lowmoi_example_data": vector(screen)})


def compressed_rda():
    return gzip.compress(rda(), 1, mtime=0)


def screen(kind="csr"):
    """Return eight cells of three conditions and five genes, with notes of all sorts."""
    counts = np.random.default_rng(0).poisson(2.0, (8, 5)).astype(np.float32) + 1
    labels = np.array(["control", "KLF1", "KLF1+MYC"])[np.arange(8) % 3]
    obs = pd.DataFrame({"target": pd.Categorical(labels)}, index=[f"c{n}" for n in range(8)])
    var = pd.DataFrame({"symbol": list("ABCDE")}, index=[f"g{n}" for n in range(5)])
    x = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": np.asarray}[kind](counts)
    uns = {"note": "text", "nested": {"a": {"b": np.arange(3)}}, "table": obs.copy()}
    return anndata.AnnData(x, obs=obs, var=var, uns=uns, obsm={"scores": counts[:, :2]})


def h5ad(path, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        screen(kind).write_h5ad(path)
    return path.read_bytes()


def notebook():
    """Return a notebook that types in lists as the published one does."""
    code = ["string = 'A,B\\nC'\n", "string_genes = 'ACTB,MYC\\nGAPDH'\n"]
    code += [f"{name.upper()} = ['A', 'B']\n" for name in TABLE_9]
    cells = [{"cell_type": "code", "source": code}, {"cell_type": "markdown", "source": ["x"]}]
    return json.dumps({"cells": cells, "nbformat": 4}).encode()


def model(folder):
    """Save a small model; return its two files."""
    design = Design.single_target(("KLF1", "MYC"))
    SMSVAE.preset("svae+", design, 5, n_latent=2, n_hidden=4, seed=0).save(folder)
    return tuple((folder / name).read_bytes() for name in ("config.json", "weights.pt"))


def stored():
    values = {"svae+.mcc": 0.9, "seeds": [0, 1], "name": "x", "flag": True, "none": None}
    return json.dumps({"values": values, "provenance": {"commit": "abc"}}).encode()


def run():
    parts = {"config": {"seed": 0}, "result": {"mcc": 0.5}, "provenance": {"commit": "abc"}}
    return json.dumps(parts).encode()
