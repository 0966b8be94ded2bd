"""The peers' benchmark: its arithmetic by hand, and that the contestants do the same work."""

import numpy as np
import pytest
import torch
from benchmarks import bench_peers

from smslib.distributions import NegativeBinomial


def test_operations_are_those_of_the_products_that_are_needed():
    """4 genes to 3 hidden to 2: forward 2 * (12 + 6), for the weights the same, for h 2 * 6."""
    weights = [(3, 4), (2, 3)]
    assert bench_peers.operations(weights, n_cells=10) == 10 * (36 + 36 + 12)


def test_bytes_count_every_array_once_per_use():
    """Per cell 10 arrays of 4 genes and 6 of 3 hidden units; 10 uses of 20 parameters."""
    weights = [(3, 4), (4, 3)]
    moved = bench_peers.bytes_moved(weights, n_cells=5, n_genes=4, n_parameters=20)
    assert moved == 4 * (5 * (40 + 18) + 200)


def test_the_slice_is_dense_or_sparse_and_as_full_as_a_real_screen(monkeypatch):
    monkeypatch.setitem(bench_peers.SIZES, "wide", (1000, 5000, 1, 0.45))
    counts, condition = bench_peers.slice_of("wide")
    assert counts.shape == (128, 5000)
    assert counts.nnz / 128 / 5000 == pytest.approx(0.36, abs=0.03)
    again, _ = bench_peers.slice_of("wide")
    assert (counts != again).nnz == 0
    assert len(condition) == 128
    dense, _ = bench_peers.slice_of("tiny")
    assert isinstance(dense, np.ndarray)
    assert dense.shape == (640, 40)


def test_the_plain_loop_has_the_same_likelihood():
    generator = torch.Generator().manual_seed(0)
    x = torch.poisson(torch.full((6, 5), 4.0), generator=generator).double()
    mean, theta = (1 + 9 * torch.rand(2, 6, 5, generator=generator)).double()
    expected = NegativeBinomial(mean.log(), theta[0].log()).log_prob(x)
    found = bench_peers.textbook_log_prob(x, mean, theta[0])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["step", "loop", "paper", "smslib_weighted"])
def test_a_contestant_trains_an_epoch(name):
    epoch = bench_peers.CONTESTANTS[name]("tiny")
    assert 0.0 < epoch() < 60.0


def test_what_is_stored_of_a_size():
    answers = {
        "step": [{"seconds": 0.1, "peak_mb": 3.0}, {"seconds": 0.3, "peak_mb": 4.0}],
        "loop": [{"seconds": 0.2, "peak_mb": 5.0}, {"seconds": 0.3, "peak_mb": 5.0}],
    }
    machine = {"flops": 1e9, "bytes_per_second": 1e9}
    found = dict(bench_peers.measure("tiny", answers, machine))
    assert found["step.milliseconds"] == pytest.approx(1e3 * 0.2 / 5)
    assert found["loop.of_step"] == pytest.approx((2.0 + 1.0) / 2)
    assert found["step.peak_mb"] == 4.0
    assert found["step.epoch_seconds"] == pytest.approx(0.2)
    floor = max(found["compute_floor_ms"], found["memory_floor_ms"])
    assert found["achieved"] == pytest.approx(floor / found["step.milliseconds"])


def test_memory_beyond_the_packed_counts_is_not_multiplied():
    found = dict(bench_peers.memory(2000, n_batches=1))
    assert found["whole.packed_mb"] == pytest.approx(found["packed_mb"] * 1000)
    beyond = found["peak_mb"] - found["packed_mb"]
    total = found["whole.packed_mb"] + beyond
    assert found["whole.extrapolated_peak_mb"] == pytest.approx(total)


def test_a_busy_machine_is_refused_unless_one_insists(monkeypatch):
    monkeypatch.setattr(bench_peers.os, "getloadavg", lambda: (5.0, 5.0, 5.0))
    with pytest.raises(SystemExit):
        bench_peers.parsed(["--out", "somewhere"])
    assert bench_peers.parsed(["--out", "somewhere", "--busy"]).busy
    assert bench_peers.parsed([]).out is None
