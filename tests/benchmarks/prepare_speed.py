"""How fast and in how much memory a large file is cut: against plain reading, in the same run.

``python tests/benchmarks/prepare_speed.py [--out book/results] [--folder /where/there/is/room]``

Writes files of the schema of the genome-wide Replogle screen (contiguous dense, compressed chunks,
CSR), cuts them with `smslib.prepare.replogle` in processes of their own and reads them plainly, in
turns, with the file dropped from the page cache before each; deletes them. Where other programs
take the cores, seconds measure the queue: rates and ratios leave out the time that a process was
ready to run and had no core (``waiting_seconds``), but for ``of_plain_reading_queue_included``.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import anndata
import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from smslib import prepare, store

N_GENES, N_WANTED, N_TARGETS = 8_248, 1_187, 40  # as in the real file, but for the targets
SHARE = 0.06  # of the cells that are wanted, in the real file
MEAN = 0.45  # UMIs; about 36 % of the counts are not zero
BUFFER = 1 << 23  # bytes per call of plain reading
LAYOUTS = ("dense", "gzip", "csr")


def block_of_counts(n_cells: int, seed: int) -> np.ndarray:
    """Return some cells' counts, gene means spread as in a real screen."""
    rng = np.random.default_rng(seed)
    means = MEAN * rng.gamma(2.0, 0.5, N_GENES)
    return rng.poisson(means, (n_cells, N_GENES)).astype(np.float32)


def annotations(n_cells: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return obs and var: `SHARE` of the cells carry one of the wanted targets."""
    rng = np.random.default_rng(1)
    wanted = rng.random(n_cells) < SHARE
    number = np.where(wanted, np.cumsum(wanted), np.cumsum(~wanted)) % N_TARGETS
    labels = np.where(wanted, "T", "O") + number.astype(str).astype(object)
    obs = pd.DataFrame(
        {"gene": pd.Categorical(labels), "gem_group": rng.integers(267, size=n_cells)},
        index=[f"cell-{n}" for n in range(n_cells)],
    )
    names = [f"G{n}" for n in range(N_GENES)]
    return obs, pd.DataFrame({"gene_name": names}, index=[f"ENSG{n:011d}" for n in range(N_GENES)])


def chosen(every_cell: bool) -> SimpleNamespace:
    """Return lists that want the wanted targets, or all, and genes strewn over the file."""
    genes = np.random.default_rng(2).choice(N_GENES, N_WANTED, replace=False)
    kinds = "TO" if every_cell else "T"
    targets = [f"{kind}{n}" for kind in kinds for n in range(N_TARGETS)]
    return SimpleNamespace(targets=targets, genes=[f"G{n}" for n in genes], pathways={})


def write(path: Path, layout: str, n_cells: int) -> None:
    """Write a file of the schema, the same thousand cells over and over."""
    obs, var = annotations(n_cells)
    anndata.AnnData(obs=obs, var=var, uns={"simulated": "for speed"}).write_h5ad(path)
    cells = block_of_counts(1000, seed=0)
    with h5py.File(path, "r+") as file:
        if "X" in file:
            del file["X"]
        (write_csr if layout == "csr" else write_dense)(file, cells, n_cells, layout)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_dense(file: h5py.File, cells: np.ndarray, n_cells: int, layout: str) -> None:
    options = {"compression": "gzip", "chunks": True} if layout == "gzip" else {}
    x = file.create_dataset("X", (n_cells, N_GENES), np.float32, **options)
    x.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    step = x.chunks[0] if x.chunks else len(cells)  # compress every chunk once
    for start in range(0, n_cells, step):
        stop = min(start + step, n_cells)
        x[start:stop] = cells[np.arange(start, stop) % len(cells)]


def write_csr(file: h5py.File, cells: np.ndarray, n_cells: int, _layout: str) -> None:
    block, times = sparse.csr_matrix(cells), n_cells // len(cells)
    x = file.create_group("X")
    x.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
    x.attrs["shape"] = np.array([n_cells, N_GENES])
    for name in ("data", "indices"):
        part = getattr(block, name)
        whole = x.create_dataset(name, len(part) * times, part.dtype)
        for n in range(times):
            whole[n * len(part) : (n + 1) * len(part)] = part
    lengths = np.tile(np.diff(block.indptr), times)
    x.create_dataset("indptr", data=np.concatenate([[0], np.cumsum(lengths)]))


def forget(path: Path) -> None:
    """Drop a file from the page cache, where the system lets us."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached(path: Path, n_samples: int = 200) -> float:
    """Return the share of a file that is in the page cache, 1 where the system does not say."""
    if not hasattr(os, "RWF_NOWAIT"):
        return 1.0
    found, size = 0, path.stat().st_size
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for offset in np.linspace(0, size - 4096, n_samples).astype(int):
            try:
                found += os.preadv(file.fileno(), [bytearray(1)], int(offset), os.RWF_NOWAIT) > 0
            except BlockingIOError:
                continue
    return found / n_samples


def queued() -> float:
    """Return the seconds that this process was ready to run and had no core; 0 if unknown."""
    path = Path("/proc/self/schedstat")
    return int(path.read_text().split()[1]) / 1e9 if path.exists() else 0.0


def timed(run: Callable[[], object]) -> dict[str, float]:
    """Run something in this process; what it took."""
    waited = queued()
    with store.measure() as spent:
        run()
    return {
        "seconds": spent["wall_seconds"],
        "waiting": queued() - waited,
        "cpu": spent["cpu_seconds"],
        "peak": spent["peak_memory_mb"],
    }


def plainly(path: Path) -> None:
    """Read a file from its first byte to its last."""
    buffer = bytearray(BUFFER)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def unpack(path: Path) -> None:
    """Read a chunked matrix by rows of chunks and do nothing with it."""
    with h5py.File(path) as file:
        x = file["X"]
        for top in range(0, x.shape[0], x.chunks[0]):
            x[top : top + x.chunks[0]]


def cut_here(path: Path, every_cell: bool) -> dict[str, float]:
    """Cut a file in this process; what it took."""
    out = path.with_name("cut.h5ad")
    found = timed(lambda: prepare.replogle(path, lists=chosen(every_cell), out=out))
    out.unlink()
    return found


def cut_apart(path: Path, every_cell: bool) -> dict[str, float]:
    """Cut a file in a process of its own, whose largest size tells the memory."""
    command = [sys.executable, __file__, "--cut", str(path)] + ["--every-cell"] * every_cell
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def compare(path: Path, every_cell: bool, rounds: int) -> dict[str, float]:
    """Read and cut a file in turns, from the disk; medians over the rounds."""
    ways = {
        "plain": lambda: timed(lambda: plainly(path)),
        "cut": lambda: cut_apart(path, every_cell),
    }
    if path.stem == "gzip":
        ways["unpacking"] = lambda: timed(lambda: unpack(path))
    found, warm = {name: [] for name in ways}, []
    for _ in range(rounds):
        for name, run in ways.items():
            forget(path)
            warm.append(cached(path))
            found[name].append(run())
    table = {name: pd.DataFrame(rows) for name, rows in found.items()}
    # The queue is counted in ticks: what a core was busy bounds the rest from below.
    net = {
        name: np.maximum(rows["seconds"] - rows["waiting"], rows["cpu"])
        for name, rows in table.items()
    }
    size, cut = path.stat().st_size / 1e6, table["cut"]
    values = {
        "megabytes": size,
        "seconds": cut["seconds"].median(),
        "waiting_seconds": cut["waiting"].median(),
        "cpu_seconds": cut["cpu"].median(),
        "megabytes_per_second": size / net["cut"].median(),
        "plain_megabytes_per_second": size / net["plain"].median(),
        "of_plain_reading_queue_included": (table["plain"]["seconds"] / cut["seconds"]).median(),
        "peak_memory_mb": cut["peak"].max(),
        "cached_before": max(warm),
    }
    values["of_plain_reading"] = (net["plain"] / net["cut"]).median()
    if "unpacking" in net:
        values["of_unpacking"] = (net["unpacking"] / net["cut"]).median()
    return {name: float(value) for name, value in values.items()}


def measure(folder: Path, layout: str, n_cells: int, rounds: int) -> dict[str, float]:
    """Write a file, compare, delete it."""
    path = folder / f"{layout}.h5ad"
    write(path, layout, n_cells)
    values = {"cells": n_cells}
    for name, every_cell in (("all_cells", True), ("wanted_cells", False)):
        found = compare(path, every_cell, rounds)
        values |= {f"{name}.{key}": value for key, value in found.items()}
    path.unlink()
    return values


def main(arguments: list[str] | None = None) -> int:
    """Measure, print what was found and store it on request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="folder of stored results, such as book/results")
    parser.add_argument("--folder", help="where the files are written for the while")
    parser.add_argument("--cells", type=int, nargs=3, default=[100_000, 10_000, 100_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cut", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--every-cell", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.cut:
        print(json.dumps(cut_here(options.cut, options.every_cell)))
        return 0
    values = {"load_average": os.getloadavg()[0]}
    command = "python tests/benchmarks/prepare_speed.py"
    with (
        store.measure(seeds=[0, 1, 2], command=command) as provenance,
        tempfile.TemporaryDirectory(dir=options.folder) as folder,
    ):
        for layout, n_cells in zip(LAYOUTS, options.cells, strict=True):
            for key, value in measure(Path(folder), layout, n_cells, options.rounds).items():
                values[f"{layout}.{key}"] = value
                print(f"{layout}.{key}: {value:.4g}", flush=True)
    if options.out:
        store.put("prepare", values, root=options.out, provenance=provenance)
    return 0


if __name__ == "__main__":
    sys.exit(main())
