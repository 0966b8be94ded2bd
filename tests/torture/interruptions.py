"""Processes killed at random moments, and eight at once: nothing is lost, nothing is half there.

``python tests/torture/interruptions.py --kills N`` kills every job N times by SIGKILL and N times
by SIGTERM. A job is repeated until it has ended by itself; then its result is compared, byte for
byte, with that of a job that nobody disturbed, and the next one begins.
"""

import argparse
import contextlib
import functools
import hashlib
import http.server
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "book"))

import anndata
import numpy as np
import pandas as pd
import torch
from killing import tasks
from scipy import sparse
from torture import small_book

from smslib import sources, store, streaming, sweep, tensors
from smslib.data import Cells, Design
from smslib.model import SMSVAE
from smslib.train import TrainConfig, fit

ROOT = Path(__file__).resolve().parents[2]
CONTENT = bytes(range(251)) * 2000  # half a megabyte
AT_ONCE = 8
FSYNC = os.fsync


@dataclass(frozen=True)
class Job:
    """What is done in a folder, what must hold after a kill, and the result, as bytes.

    ``prepare`` makes what is there before; ``result`` is empty until there is one; ``share`` of
    the kills are enough where a job is slow.
    """

    prepare: object
    work: object
    check: object
    result: object
    share: float = 1.0


# ------------------------------------------------------------------------------------ jobs


def _square(config):
    time.sleep(0.001)
    with open(os.environ["LOG"], "a") as log:
        log.write(f"{config['x']}\n")
    return {"square": config["x"] ** 2, "padding": [0.5] * 3000}


def _small_fit(config):
    """Fit a tiny model; the result tells its weights to the last bit."""
    counts = torch.poisson(torch.full((60, 8), 5.0), generator=torch.Generator().manual_seed(0))
    cells = Cells(counts + 1, torch.arange(60) % 3)
    model = SMSVAE.preset("svae+", Design.single_target(("a", "b")), 8, n_latent=2, n_hidden=8)
    fit(model, cells, TrainConfig(epochs=3, seed=config["x"]), progress=False)
    with open(os.environ["LOG"], "a") as log:
        log.write(f"{config['x']}\n")
    return {"weights": hashlib.sha256(_bits(model)).hexdigest()}


def _bits(model):
    return b"".join(part.numpy().tobytes() for part in model.state_dict().values())


def _study(task, n_runs):
    study = sweep.axis("x", range(n_runs))

    def prepare(folder):
        (folder / "log").touch()

    def work(folder):
        os.environ["LOG"] = str(folder / "log")
        sweep.run(task, study, folder / "runs")

    def check(folder):
        """Every file is whole, and what was finished before the last start was not done again."""
        stored = {path.stem for path in (folder / "runs").glob("*.json")}
        for name in stored:
            assert store.read_json(folder / "runs" / f"{name}.json")["result"]
        done = (folder / "log").read_text().split()
        # A run may be done twice only if its first end came before its file.
        assert len(done) - len(set(done)) <= int((folder / "kills").read_text()), "done again"

    def result(folder):
        files = sorted((folder / "runs").glob("*.json"))
        if len(files) < n_runs:
            return b""
        return b"".join(path.name.encode() + path.read_bytes() for path in files)

    return Job(prepare, work, check, result)


def _one_fit():
    """A single fit with a checkpoint."""

    def work(folder):
        counts = torch.poisson(
            torch.full((90, 8), 5.0), generator=torch.Generator().manual_seed(0)
        )
        cells = Cells(counts + 1, torch.arange(90) % 3)
        model = SMSVAE.preset("svae+", Design.single_target(("a", "b")), 8, n_latent=2, n_hidden=8)
        config = TrainConfig(epochs=40, batch_size=30, seed=1)
        history = fit(model, cells, config, checkpoint=folder / "fit.ckpt", progress=False)
        assert [row["epoch"] for row in history.rows] == list(range(40))
        (folder / "done").write_bytes(_bits(model))

    def check(folder):
        """What is kept is a whole state of this fit."""
        if (folder / "fit.ckpt").exists():
            kept = tensors.read(folder / "fit.ckpt")
            assert len(kept["history"]["rows"]) == kept["epochs_done"]

    def result(folder):
        return (folder / "done").read_bytes() if (folder / "done").exists() else b""

    return Job(lambda _folder: None, work, check, result)


def _download():
    def source(folder):
        address = (folder.parent / "address").read_text()
        sums = (len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
        return sources.Source("toy", f"{address}/toy", "toy.bin", *sums, "-", "-", "-", "table")

    def work(folder):
        sources._SCHEMES = ("http",)
        sources.SOURCES = {"toy": source(folder)}
        sources.fetch("toy", directory=folder)

    def check(folder):
        if (folder / "toy.bin").exists():
            assert (folder / "toy.bin").read_bytes() == CONTENT
        part = folder / "toy.bin.part"
        if part.exists():
            assert CONTENT.startswith(part.read_bytes()), "the part is not the beginning"

    def result(folder):
        path = folder / "toy.bin"
        return path.read_bytes() if path.exists() else b""

    return Job(lambda _folder: None, work, check, result)


def _preparation():
    def prepare(folder):
        counts = np.random.default_rng(0).poisson(1.0, (600, 40)).astype(np.float32)
        obs = pd.DataFrame({"target": ["a", "b", "c"] * 200}, index=[f"c{n}" for n in range(600)])
        anndata.AnnData(sparse.csr_matrix(counts), obs=obs).write_h5ad(folder / "source.h5ad")
        os.utime(folder / "source.h5ad", (1e9, 1e9))

    def work(folder):
        out = folder / "out.h5ad"
        if not out.exists():
            path, genes = folder / "source.h5ad", np.arange(0, 40, 2)
            streaming.cut(path, cells=np.arange(0, 600, 3), genes=genes, out=out, block=2000)

    def check(folder):
        if (folder / "out.h5ad").exists():
            anndata.read_h5ad(folder / "out.h5ad")

    def result(folder):
        return (folder / "out.h5ad").read_bytes() if (folder / "out.h5ad").exists() else b""

    return Job(prepare, work, check, result)


def _model(seed):
    design = Design.single_target([f"t{n}" for n in range(40)])
    return SMSVAE.preset("svae+", design, 200, n_latent=8, n_hidden=32, seed=seed)


def _saving():
    def prepare(folder):
        _model(0).save(folder / "model")

    def work(folder):
        os.fsync = FSYNC  # without it the renaming takes all the time, and hence all the kills
        model = _model(1)
        for _ in range(20):
            model.save(folder / "model")
        (folder / "done").touch()

    def check(folder):
        """The old model, the new one, or two halves that are recognised as such."""
        try:
            found = SMSVAE.load(folder / "model").log_theta
        except ValueError as error:
            if "two savings" not in str(error):
                raise
            (folder / "recognised").touch()
            return
        assert any(torch.equal(found, _model(seed).log_theta) for seed in (0, 1))

    def result(folder):
        if not (folder / "done").exists():
            return b""
        # Of the weights, not of their file, which holds the name of its draft.
        return _bits(SMSVAE.load(folder / "model"))

    return Job(prepare, work, check, result)


def _storing():
    values = [{f"k{n}": n + offset for n in range(2000)} for offset in (0, 1)]

    def prepare(folder):
        store.put("x", values[0], root=folder, provenance={"commit": "-"})

    def work(folder):
        for turn in range(30):
            store.put("x", values[turn % 2], root=folder, provenance={"commit": "-"})
        (folder / "done").touch()

    def check(folder):
        assert dict(store.get("x", root=folder)) in values

    def result(folder):
        return (folder / "x.json").read_bytes() if (folder / "done").exists() else b""

    return Job(prepare, work, check, result)


@functools.cache
def _commit():
    """Return the commit that is checked out, the same one for all copies of a run."""
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _staging():
    """The step of the book that copies what is rendered, from a copy of the committed files."""

    def prepare(folder):
        (folder / "tree").mkdir()
        archive = str(folder / "tree.tar")
        subprocess.run(["git", "-C", str(ROOT), "archive", "-o", archive, _commit()], check=True)
        subprocess.run(["tar", "-xf", archive, "-C", str(folder / "tree")], check=True)

    def work(folder):
        from pipeline.stage import stage

        stage(folder / "tree", folder / "src", None)
        (folder / "done").touch()

    def check(folder):
        for path in (folder / "src").rglob("*.ipynb"):
            json.loads(path.read_text())

    def result(folder):
        if not (folder / "done").exists():
            return b""
        files = sorted(path for path in (folder / "src").rglob("*") if path.is_file())
        kept = [path for path in files if path.name != "build.json"]  # holds the date
        sums = (hashlib.sha256(path.read_bytes()).hexdigest() for path in kept)
        return "".join(
            f"{p.relative_to(folder)} {s}\n" for p, s in zip(kept, sums, strict=True)
        ).encode()

    return Job(prepare, work, check, result, share=0.2)


def _book():
    """The pipeline of `make book`, on a book of two pages."""

    def work(folder):
        small_book.build(folder / "book")
        (folder / "done").touch()

    def result(folder):
        return small_book.rendered(folder / "book") if (folder / "done").exists() else b""

    def prepare(folder):
        small_book.begin(folder / "book")

    return Job(prepare, work, lambda folder: small_book.check(folder / "book"), result)


JOBS = {
    "sweep": _study(_square, 40),
    "fits": _study(_small_fit, 6),
    "checkpoint": _one_fit(),
    "download": _download(),
    "prepare": _preparation(),
    "model": _saving(),
    "store": _storing(),
    "stage": _staging(),
    "book": _book(),
}


# ---------------------------------------------------------------------------------- killing


class Slowly(http.server.BaseHTTPRequestHandler):
    """Serves the content in pieces, from the byte that is asked for."""

    def do_GET(self):
        found = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        first = int(found[1]) if found else 0
        self.send_response(206 if found else 200)
        self.send_header("Content-Length", str(len(CONTENT) - first))
        self.send_header("Content-Range", f"bytes {first}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.end_headers()
        with contextlib.suppress(OSError):  # the client was killed
            for at in range(first, len(CONTENT), 20_000):
                self.wfile.write(CONTENT[at : at + 20_000])
                time.sleep(0.002)

    def log_message(self, *_):
        """Stay silent."""


@contextlib.contextmanager
def served(folder):
    """Serve the content from a process of its own; its address is in a file of the folder."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slowly)
    (folder / "address").write_text(f"http://127.0.0.1:{server.server_port}")
    child = _forked(server.serve_forever)
    server.socket.close()
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _forked(work, *arguments):
    child = os.fork()
    if child:
        return child
    os.setpgid(0, 0)  # what it starts is killed with it
    status = 1
    try:
        work(*arguments)
        status = 0
    except BaseException as error:  # noqa: BLE001 - told by the status
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
    finally:
        sys.stderr.flush()
        os._exit(status)


def _begin(job, folder):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "kills").write_text("0")
    job.prepare(folder)


def undisturbed(job, folder):
    """Return the result of a job that nobody kills, and its seconds."""
    _begin(job, folder)
    start = time.perf_counter()
    _, status = os.waitpid(_forked(job.work, folder), 0)
    assert status == 0, "the job fails by itself"
    seconds, result = time.perf_counter() - start, job.result(folder)
    assert result
    return result, seconds


def kill(name, by, times, folder, rng):
    """Kill a job so many times; return how often that was, and how often it began."""
    job = JOBS[name]
    expected, seconds = undisturbed(job, folder)
    hit = begun = litter = halves = 0
    _begin(job, folder)
    while hit < times or not job.result(folder):
        if job.result(folder):
            _begin(job, folder)
        begun += 1
        child = _forked(job.work, folder)
        if hit < times:
            with contextlib.suppress(PermissionError):  # it was quicker
                os.setpgid(child, child)
            time.sleep(rng.uniform(0.0, seconds))
            os.killpg(child, by)
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == by
        assert killed or status == 0, f"{name} ended with {status}"
        hit += killed
        (folder / "kills").write_text(str(int((folder / "kills").read_text()) + killed))
        job.check(folder)
        halves += (folder / "recognised").exists()
        (folder / "recognised").unlink(missing_ok=True)
        litter = max(litter, len(list(folder.rglob(".*.tmp"))))
        if job.result(folder):
            assert job.result(folder) == expected, f"{name}: another result than undisturbed"
    told = {"kills": hit, "starts": begun, "most_drafts_left": litter}
    return told | ({"halves_recognised": halves} if name == "model" else {})


def kill_all(times, only=None, seed=0):
    """Kill every job by both signals; return flat values."""
    values, rng = {}, random.Random(seed)
    tasks.lightly()  # results then have no date, and nothing waits for the disk
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        place = Path(place)
        with served(place):
            for name, by in (
                (name, by)
                for name in JOBS
                for by in (signal.SIGKILL, signal.SIGTERM)
                if name in (only or JOBS)
            ):
                number = max(1, round(times * JOBS[name].share))
                told = kill(name, by, number, place / "work", rng)
                key = f"interruptions.{name}.{by.name.lower()}"
                values |= {f"{key}.{what}": value for what, value in told.items()}
    total = sum(value for key, value in values.items() if key.endswith(".kills"))
    return values | {"interruptions.kills": total}


# ------------------------------------------------------------------------------ eight at once


def together(name, folder, may_fail=()):
    """Start a job eight times at once; return how many ended well, after checks."""
    job = JOBS[name]
    expected, _ = undisturbed(job, folder)
    _begin(job, folder)
    (folder / "kills").write_text("1000")  # work done twice is no fault of processes at once
    words = folder.parent / "words"
    words.mkdir(exist_ok=True)
    children = [_forked(_told, job.work, folder, words / str(n)) for n in range(AT_ONCE)]
    good = sum(os.waitpid(child, 0)[1] == 0 for child in children)
    said = [path.read_text() for path in words.iterdir() if path.read_text()]
    shutil.rmtree(words)
    strange = [text for text in said if not text.startswith(tuple(may_fail))]
    assert not strange, f"{name}: {strange}"
    job.check(folder)
    assert job.result(folder) == expected, f"{name}: another result than alone"
    return good


def _told(work, folder, words):
    """Do the work, and write down how it failed."""
    words.touch()
    try:
        work(folder)
    except BaseException as error:
        words.write_text(f"{type(error).__name__}: {error}")
        raise


def eight_at_once(rounds):
    """Let eight processes at once work on one study, one cache, one cut and one saved model."""
    values = {"together.processes": AT_ONCE, "together.rounds": rounds}
    tasks.lightly()
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        place = Path(place)
        with served(place):
            for name in ("sweep", "download", "prepare", "model"):
                # Those that come late find the result there, and say so.
                late = ("FileExistsError",) if name == "prepare" else ()
                good = [together(name, place / "work", late) for _ in range(rounds)]
                values[f"together.{name}.ended_well"] = sum(good)
    return values


def main():
    """Kill, and print the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="per job and signal")
    parser.add_argument("--rounds", type=int, default=5, help="of eight processes at once")
    parser.add_argument("--only", nargs="+", choices=list(JOBS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    values = kill_all(given.kills, given.only)
    if given.rounds:
        values |= eight_at_once(given.rounds)
    print(json.dumps(values, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
