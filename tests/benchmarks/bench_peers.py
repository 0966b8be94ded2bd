"""How fast a training step is: against scvi-tools, a plain loop, and the step's own floors.

``python tests/benchmarks/bench_peers.py --make-scvi FOLDER`` makes the peer's environment, once;
``... --scvi FOLDER/bin/python [--out book/results]`` measures; ``--memory`` measures a tenth of
two million genome-wide cells instead.

Every contestant is a process of its own, with its own peak of memory, and holds its data; they
train in turns, an epoch of a slice of the screen at a time, after one of warm-up. Same counts, 128
cells to a batch, 15 latents, two hidden layers of 128 and one gradient step per batch for all but
the recipe ``smslib``, whose network is its own and whose phases are timed one by one.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from scipy import sparse
from torch import nn

# What this file imports of smslib it imports late: the peer's environment has none.
BATCH, N_LATENT, N_HIDDEN, N_TARGETS = 128, 15, 128, 100
MOST_LOAD = 1.0
# Cells and genes of a screen, batches of the slice that is timed, mean count.
SIZES = {
    "20000x100": (20_000, 100, 157, 5.0),
    "116641x1187": (116_641, 1_187, 100, 5.0),
    "300000x8248": (300_000, 8_248, 25, 0.45),  # about 36 % of its counts are not zero
    "tiny": (640, 40, 5, 5.0),
}
SPARSE_FROM = 5_000  # genes; below, counts are dense
SCVI = "scvi-tools==1.4.2"


def slice_of(size: str) -> tuple[np.ndarray | sparse.csr_matrix, np.ndarray]:
    """Return counts and conditions of the cells that are trained on, gene means spread."""
    _, n_genes, n_batches, mean = SIZES[size]
    rng = np.random.default_rng(0)
    means = mean * rng.gamma(2.0, 0.5, n_genes)
    blocks = (rng.poisson(means, (BATCH, n_genes)).astype(np.float32) for _ in range(n_batches))
    if n_genes >= SPARSE_FROM:
        counts = sparse.vstack([sparse.csr_matrix(block) for block in blocks], format="csr")
    else:
        counts = np.concatenate(list(blocks))
    return counts, rng.integers(N_TARGETS + 1, size=counts.shape[0])


# ------------------------------------------------------------------------------- contestants


def ours(size: str, recipe: str | None, **phase: object) -> Callable[[], float]:
    """Return an epoch of `smslib.train.fit`: a recipe's, or the network that all have."""
    from smslib import recipes
    from smslib.batches import Packed, Rows, Shuffled
    from smslib.data import Cells, Design
    from smslib.model import SMSVAE
    from smslib.train import TrainConfig, fit

    counts, condition = slice_of(size)
    condition = torch.from_numpy(condition)
    design = Design.single_target([f"target {n}" for n in range(N_TARGETS)])
    # The recipes look at numbers of cells and genes, and at the genes' spread in some cells.
    some = counts[: 5 * BATCH]
    some = some if isinstance(some, np.ndarray) else some.toarray()
    sample = Cells(torch.from_numpy(some), condition[: len(some)])
    if recipe is None:
        model = SMSVAE.preset(
            "svae+", design, counts.shape[1], n_latent=N_LATENT, n_hidden=N_HIDDEN
        )
        config = TrainConfig()
    else:
        model, config = recipes.build(sample, design, recipe=recipe, n_latent=N_LATENT)
    model.newton = bool(phase.pop("newton", False))
    whole = {"encoder_share": 0.0, "weighted_share": 1.0, "patience": None, "keep": "last"}
    config = replace(config, epochs=1, batch_size=BATCH, **whole, **phase)
    if isinstance(counts, np.ndarray):
        cells = Cells(torch.from_numpy(counts), condition)
    else:
        cells = Shuffled(Rows(Packed.of(counts), condition), BATCH, seed=0)
    return lambda: fit(model, cells, config, progress=False).rows[0]["seconds"]


class PlainVAE(nn.Module):
    """The same network as one first writes it, with a standard normal prior."""

    def __init__(self, n_genes: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(*mlp(n_genes, N_HIDDEN, N_HIDDEN))
        self.moments = nn.Linear(N_HIDDEN, 2 * N_LATENT)
        self.decoder = nn.Sequential(*mlp(N_LATENT, N_HIDDEN, N_HIDDEN))
        self.genes = nn.Linear(N_HIDDEN, n_genes)
        self.log_theta = nn.Parameter(torch.zeros(n_genes))

    def forward(self, counts: torch.Tensor) -> torch.Tensor:
        """Return the negative ELBO per cell."""
        mean, log_variance = self.moments(self.encoder(counts.log1p())).chunk(2, -1)
        q = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
        rate = counts.sum(-1, keepdim=True) * self.genes(self.decoder(q.rsample())).softmax(-1)
        log_prob = textbook_log_prob(counts, rate, self.log_theta.exp()).sum(-1)
        kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(-1)
        return (kl - log_prob).mean()


def mlp(*widths: int) -> Iterator[nn.Module]:
    """Yield linear maps with a rectifier after each."""
    for n_in, n_out in zip(widths[:-1], widths[1:], strict=True):
        yield nn.Linear(n_in, n_out)
        yield nn.ReLU()


def textbook_log_prob(x: torch.Tensor, mean: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """Return the log-pmf of the negative binomial with lgamma, for autograd."""
    log_total = (theta + mean + 1e-8).log()
    binomial = torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
    stops = theta * ((theta + 1e-8).log() - log_total)
    return binomial + stops + x * ((mean + 1e-8).log() - log_total)


class DenseRows(torch.utils.data.Dataset):
    """CSR rows that become dense a batch at a time."""

    def __init__(self, counts: sparse.csr_matrix) -> None:
        self.counts = counts

    def __len__(self) -> int:
        """Return the number of cells."""
        return self.counts.shape[0]

    def __getitems__(self, index: list[int]) -> torch.Tensor:
        """Return the rows of a batch."""
        return torch.from_numpy(self.counts[index].toarray())


def loop(size: str) -> Callable[[], float]:
    """Return an epoch of a plain loop with a DataLoader."""
    counts, _ = slice_of(size)
    if isinstance(counts, np.ndarray):
        data, collate = torch.utils.data.TensorDataset(torch.from_numpy(counts)), None
    else:
        data, collate = DenseRows(counts), lambda batch: (batch,)
    loader = torch.utils.data.DataLoader(data, BATCH, shuffle=True, collate_fn=collate)
    model = PlainVAE(counts.shape[1])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def epoch() -> float:
        start = time.perf_counter()
        for (batch,) in loader:
            optimizer.zero_grad()
            model(batch).backward()
            optimizer.step()
        return time.perf_counter() - start

    return epoch


def scvi(size: str, **network: object) -> Callable[[], float]:
    """Return an epoch of scvi-tools' SCVI, from its trainer's first batch to its last."""
    import logging
    import warnings

    import anndata
    from lightning.pytorch.callbacks import Callback
    from scvi.model import SCVI as Model

    class Clock(Callback):
        def on_train_epoch_start(self, *_: object) -> None:
            self.start = time.perf_counter()

        def on_train_epoch_end(self, *_: object) -> None:
            self.seconds = time.perf_counter() - self.start

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    counts, _ = slice_of(size)
    adata = anndata.AnnData(counts)
    Model.setup_anndata(adata)
    widths = {"n_hidden": N_HIDDEN, "n_latent": N_LATENT, "n_layers": 2}
    model = Model(adata, gene_likelihood="nb", **widths, **network)

    def epoch() -> float:
        clock = Clock()
        model.train(
            max_epochs=1,
            train_size=1.0,
            batch_size=BATCH,
            accelerator="cpu",
            enable_progress_bar=False,
            callbacks=[clock],
        )
        return clock.seconds

    return epoch


BARE = {"dropout_rate": 0.0, "use_batch_norm": "none", "use_layer_norm": "none"}
CONTESTANTS = {
    "step": partial(ours, recipe=None),
    "loop": loop,
    "scvi": partial(scvi, **BARE),
    "scvi_default": scvi,  # batch normalisation and dropout
    "paper": partial(ours, recipe="paper"),
    "smslib_encoder": partial(ours, recipe="smslib", n_draws=1),
    "smslib_newton": partial(ours, recipe="smslib", n_draws=1, newton=True),
    "smslib_weighted": partial(ours, recipe="smslib", newton=True),
}


def compete(name: str, size: str, threads: int) -> None:
    """Be a contestant: train an epoch for every line that is read, and say what it took."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    # What libraries say must not pass for an answer.
    answers, sys.stdout = sys.stdout, sys.stderr
    epoch = CONTESTANTS[name](size)
    for _ in sys.stdin:
        answer = {"seconds": epoch(), "peak_mb": peak_mb()}
        print(json.dumps(answer), file=answers, flush=True)


def peak_mb() -> float:
    """Return the largest size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# ------------------------------------------------------------------------------------- floors


def operations(weights: list[tuple[int, int]], n_cells: int) -> int:
    """Return the floating-point operations of a step's matrix products.

    Each weight takes part in three, forward and for both gradients; the first needs none for the
    gradient of the data.
    """
    sizes = [n_out * n_in for n_out, n_in in weights]
    return 2 * n_cells * (3 * sum(sizes) - sizes[0])


def bytes_moved(
    weights: list[tuple[int, int]], n_cells: int, n_genes: int, n_parameters: int
) -> int:
    """Return the least traffic of a step: every array that has to exist, once per use.

    Of the arrays as wide as the genes: counts read by encoder and likelihood, their logs written
    and read by two products, logits written and read, their gradient written and read by two
    products. Hidden arrays and their gradients: written once, read twice. A parameter is read
    forward and backward, its gradient is written, and Adam reads four arrays and writes three.
    """
    by_gene = 10 * n_cells * n_genes
    hidden = 6 * n_cells * sum(n_out for n_out, _ in weights[:-1])
    return 4 * (by_gene + hidden + 10 * n_parameters)


def fastest(work: Callable[[], object], rounds: int = 12) -> float:
    """Return the seconds of the fastest of a few rounds."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def peaks() -> dict[str, float]:
    """Return what this machine reaches: operations and bytes per second, float32."""
    square = torch.randn(2048, 2048)
    product = torch.empty_like(square)
    long = torch.randn(2**26)
    copy = torch.empty_like(long)
    return {
        "flops": 2 * 2048**3 / fastest(lambda: torch.mm(square, square, out=product)),
        "bytes_per_second": 2 * long.nbytes / fastest(lambda: copy.copy_(long)),
    }


def floors(size: str, machine: dict[str, float]) -> dict[str, float]:
    """Return a step's operations and bytes, and the milliseconds below which it cannot be."""
    from smslib.data import Design
    from smslib.model import SMSVAE

    n_genes = SIZES[size][1]
    design = Design.single_target([f"target {n}" for n in range(N_TARGETS)])
    model = SMSVAE.preset("svae+", design, n_genes, n_latent=N_LATENT, n_hidden=N_HIDDEN)
    weights = [tuple(part.weight.shape) for part in model.modules() if isinstance(part, nn.Linear)]
    n_parameters = sum(part.numel() for part in model.parameters())
    work = {
        "operations": operations(weights, BATCH),
        "bytes": bytes_moved(weights, BATCH, n_genes, n_parameters),
    }
    return {
        **work,
        "compute_floor_ms": 1e3 * work["operations"] / machine["flops"],
        "memory_floor_ms": 1e3 * work["bytes"] / machine["bytes_per_second"],
    }


# ------------------------------------------------------------------------------------ measure


def in_turns(size: str, names: list[str], python: dict, rounds: int, threads: int) -> dict:
    """Let contestants train in turns; their answers, by name, without those of the warm-up."""
    command = ["--size", size, "--threads", str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    running = {
        name: subprocess.Popen(
            [python[name.startswith("scvi")], __file__, "--contestant", name, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for name in names
    }
    answers = {name: [] for name in names}
    for number in range(rounds + 1):
        for name, process in running.items():
            process.stdin.write("epoch\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            if number:
                answers[name].append(answer)
    for process in running.values():
        process.stdin.close()
        process.wait()
    return answers


def measure(size: str, answers: dict, machine: dict[str, float]) -> Iterator[tuple[str, float]]:
    """Yield what is stored of a size."""
    n_cells, n_genes, n_batches, _ = SIZES[size]
    yield from {"cells": n_cells, "genes": n_genes, "batches_timed": n_batches}.items()
    seconds = {name: np.array([row["seconds"] for row in rows]) for name, rows in answers.items()}
    for name, times in seconds.items():
        step = float(np.median(times)) / n_batches
        yield f"{name}.milliseconds", 1e3 * step
        yield f"{name}.epoch_seconds", step * n_cells / BATCH
        yield f"{name}.of_step", float(np.median(times / seconds["step"]))
        yield f"{name}.peak_mb", max(row["peak_mb"] for row in answers[name])
    limits = floors(size, machine)
    yield from limits.items()
    floor = max(limits["compute_floor_ms"], limits["memory_floor_ms"])
    yield "achieved", floor * n_batches / (1e3 * float(np.median(seconds["step"])))


def make_scvi(folder: Path) -> None:
    """Make the peer's environment; no file of this project names it."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    version = torch.__version__
    for package in (f"torch=={version}", SCVI):
        subprocess.run([folder / "bin" / "python", "-m", "pip", "install", package], check=True)


# ------------------------------------------------------------------------------------- memory


def memory(n_cells: int, n_batches: int, whole: int = 2_000_000) -> Iterator[tuple[str, float]]:
    """Train on genome-wide cells that lie packed in memory; the peak, and that of the whole.

    The cells repeat the same thousand. Beyond what is packed, memory does not depend on how many
    there are, so the whole is that with its own packed counts.
    """
    from smslib.batches import Packed, Rows, Shuffled
    from smslib.data import Design
    from smslib.model import SMSVAE
    from smslib.train import objective

    n_genes, mean = SIZES["300000x8248"][1], SIZES["300000x8248"][3]
    rng = np.random.default_rng(0)
    means = mean * rng.gamma(2.0, 0.5, n_genes)
    block = sparse.csr_matrix(rng.poisson(means, (1000, n_genes)).astype(np.uint16))
    times = n_cells // 1000
    offsets = np.append(0, np.tile(np.diff(block.indptr), times)).cumsum()
    counts = Packed(np.tile(block.data, times), np.tile(block.indices, times), offsets, n_genes)
    packed = sum(part.nbytes for part in (counts.values, counts.columns, counts.offsets)) / 2**20
    condition = torch.from_numpy(rng.integers(N_TARGETS + 1, size=counts.shape[0]))
    design = Design.single_target([f"target {n}" for n in range(N_TARGETS)])
    model = SMSVAE.preset("svae+", design, n_genes, n_latent=N_LATENT)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    for batch in islice(Shuffled(Rows(counts, condition), BATCH, seed=0), n_batches):
        optimizer.zero_grad()
        objective(model(batch), n_cells=counts.shape[0]).backward()
        optimizer.step()
    peak = peak_mb()
    yield from {"cells": counts.shape[0], "packed_mb": packed, "peak_mb": peak}.items()
    yield "whole.cells", whole
    yield "whole.packed_mb", packed * whole / counts.shape[0]
    yield "whole.extrapolated_peak_mb", peak + packed * (whole / counts.shape[0] - 1)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options; refuse to store what a busy machine would say."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="folder of stored results, such as book/results")
    parser.add_argument("--scvi", help="Python of an environment with " + SCVI)
    parser.add_argument("--make-scvi", type=Path, metavar="FOLDER", help="make that environment")
    parser.add_argument("--memory", action="store_true", help="measure memory instead")
    parser.add_argument("--cells", type=int, default=200_000, help="of --memory")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sizes", choices=SIZES, nargs="*", default=list(SIZES)[:3])
    parser.add_argument("--only", choices=CONTESTANTS, nargs="*", default=list(CONTESTANTS))
    parser.add_argument("--busy", action="store_true", help="store even if the machine is busy")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--size", choices=SIZES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    load = os.getloadavg()[0]
    if options.out and load > MOST_LOAD and not options.busy and not options.contestant:
        parser.error(
            f"the load average is {load:.1f}: contestants that wait for a core say nothing; "
            "repeat when the machine is idle, drop --out, or insist with --busy"
        )
    return options


def results(options: argparse.Namespace) -> Iterator[tuple[str, float]]:
    """Yield everything that was asked for."""
    if options.memory:
        yield from memory(options.cells, n_batches=50)
        return
    torch.set_num_threads(options.threads)
    machine = peaks()
    yield from machine.items()
    names = [name for name in options.only if options.scvi or not name.startswith("scvi")]
    python = {False: sys.executable, True: options.scvi}
    for size in options.sizes:
        answers = in_turns(size, names, python, options.rounds, options.threads)
        for key, value in measure(size, answers, machine):
            yield f"{size}.{key}", value


def main(arguments: list[str] | None = None) -> int:
    """Measure, print what was found and store it on request."""
    options = parsed(arguments)
    if options.make_scvi:
        make_scvi(options.make_scvi)
        return 0
    if options.contestant:
        compete(options.contestant, options.size, options.threads)
        return 0
    from smslib import store

    values = {"load_average": os.getloadavg()[0], "threads": options.threads}
    with store.measure(seeds=[0], command="python tests/benchmarks/bench_peers.py") as provenance:
        for key, value in results(options):
            values[key] = value
            print(f"{key}: {value:.4g}", flush=True)
    if options.out:
        name = "peers_memory" if options.memory else "peers"
        store.put(name, values, root=options.out, provenance=provenance)
    return 0


if __name__ == "__main__":
    sys.exit(main())
