"""A fit on two processes is the fit on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from together import curves
from torch import nn

from smslib import parallel
from smslib.model import SMSVAE

TESTS = Path(__file__).parent
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    cells = curves.cells(61, seed=0)
    names = [curves.DESIGN.conditions[row] for row in cells.condition]
    obs = pd.DataFrame({"target": names}, index=[f"cell{row}" for row in range(61)])
    path = tmp_path_factory.mktemp("screen") / "screen.h5ad"
    anndata.AnnData(cells.counts.numpy(), obs=obs).write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def together(tmp_path_factory, screen):
    """Run both scripts on two processes; return what the first told, and the second's model."""
    folder = tmp_path_factory.mktemp("together")
    example = TESTS.parent / "book" / "scaling" / "fit_together.py"
    scripts = (
        ["2", TESTS / "together" / "curves.py", folder],
        ["2", example, screen, folder / "model", "--control", "control", "--epochs", "2"],
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    running = [
        subprocess.Popen(
            [sys.executable, *TORCHRUN, *map(str, script)],
            **{"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT},
        )
        for script in scripts
    ]
    for child in running:
        output, _ = child.communicate(timeout=120)
        assert child.returncode == 0, output.decode()
    told = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    return told, folder / "model"


@pytest.fixture(scope="module")
def alone():
    return curves.curves(None)


@pytest.mark.parametrize("name", curves.FITS)
def test_two_processes_follow_the_curve_of_one(together, alone, name):
    for rank in range(2):
        shared = together[0][rank]["curves"][name]
        assert shared["best"] == alone[name]["best"]
        assert len(shared["rows"]) == len(alone[name]["rows"])
        for mine, reference in zip(shared["rows"], alone[name]["rows"], strict=True):
            assert mine == pytest.approx(reference, rel=1e-4)


@pytest.mark.parametrize("name", curves.FITS)
def test_two_processes_end_with_the_weights_of_one(together, alone, name):
    first, second = (np.array(told["curves"][name]["weights"]) for told in together[0])
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, alone[name]["weights"], rtol=1e-3, atol=1e-4)


def test_what_is_compared_moves_or_stops(alone):
    """The curves go up by at least 20 tolerances; the one that stands still ends the fit."""
    assert len(alone["stands still"]["rows"]) == 3
    for name in alone.keys() - {"stands still"}:
        elbo = [row["elbo"] for row in alone[name]["rows"]]
        assert max(elbo) - min(elbo) > 20 * 1e-4 * abs(elbo[0])


def test_every_process_draws_for_itself_and_validates_alike(together):
    assert [told["seeds"] for told in together[0]] == [[0, 0], [1, 0]]


def test_processes_that_were_given_different_cells_are_refused(together):
    refused = [told["refused"]["cells"] for told in together[0]]
    assert refused[0].startswith("process 0 was given (61, 0, TrainConfig(")
    assert "process 1 (62, 0, TrainConfig(" in refused[0]
    assert "give all the same model, cells and configuration" in refused[1]


def test_batch_normalisation_is_refused(together):
    assert "norm='batch' needs whole batches" in together[0][0]["refused"]["norm"]


def test_the_script_in_the_book_saves_a_model(together):
    model = SMSVAE.load(together[1])
    assert model.prior.conditions == curves.DESIGN.conditions
    assert model.n_genes == 6


# -------------------------------------------------------------------------------- one part


class Recorder(nn.Module):
    """Stand in for the model of another process: it remembers its cells."""

    def forward(self, cells, *, n_draws):
        self.cells, self.n_draws = cells, n_draws
        ones = torch.ones(len(cells))
        return parallel.Terms(ones, 2 * ones, torch.tensor(8.0))


def part(rank, size, n_cells):
    shared = parallel.SharedOut.__new__(parallel.SharedOut)
    nn.Module.__init__(shared)
    shared.rank, shared.size, shared.model = rank, size, Recorder()
    cells = curves.cells(n_cells, seed=0)
    return shared(cells, n_draws=3), shared.model, cells


@pytest.mark.parametrize(("size", "n_cells"), [(1, 4), (2, 8), (3, 7), (4, 3), (5, 1)])
def test_the_parts_of_a_batch_are_the_batch(size, n_cells):
    parts = [part(rank, size, n_cells) for rank in range(size)]
    weighted = [(terms.kl.mean().item(), len(model.cells)) for terms, model, _ in parts]
    assert sum(mean for mean, _ in weighted) / size == pytest.approx(2.0)
    seen = torch.cat([m.cells.counts for t, m, _ in parts if t.kl.mean() > 0])
    assert sorted(seen.tolist()) == sorted(parts[0][2].counts.tolist())
    assert all(terms.penalty == 8.0 for terms, _, _ in parts)
    assert all(model.n_draws == 3 for _, model, _ in parts)


def test_without_a_group_a_mean_is_the_value_itself():
    values = torch.ones(2)
    assert parallel.average(values, None) is values
