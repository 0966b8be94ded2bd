"""A full disk, a read-only folder, no network, a wrong clock, no GPU: words, and nothing lost.

``python tests/torture/resources.py``; the disk is a small one in memory, mounted for the purpose,
and the network is taken from a process of its own. Both need rights that only root has: without
them these parts are left out, and the figures say so.
"""

import argparse
import contextlib
import ctypes
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torture import interruptions, seeds

from smslib import perturbseq, sources, store, streaming, sweep
from smslib.model import SMSVAE

PROVENANCE = {"commit": "-"}
ROOM = "2m"
CLONE_NEWNET = 0x40000000


@contextlib.contextmanager
def disk(folder, size):
    """Mount a small disk; yields whether that was possible."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = not subprocess.run(["mount", *options], capture_output=True, check=False).returncode
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder, options):
    """Change a mounted disk: its size, or whether it may be written to."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def _task(config):
    return {"numbers": [config["x"] + 0.5] * 40_000}


def _store(folder):
    store.put("x", {"numbers": list(range(400_000))}, root=folder, provenance=PROVENANCE)


def _save(folder):
    SMSVAE.preset("svae+", interruptions._model(0).prior.design, 6000, n_latent=8).save(folder)


def _study(folder):
    sweep.run(_task, sweep.axis("x", range(12)), folder)


def _cut(folder):
    cells, genes = np.arange(20_000), np.arange(60)
    streaming.cut(folder.parent / "source.h5ad", cells=cells, genes=genes, out=folder / "o.h5ad")


def _fetch(folder):
    sources.fetch("toy", directory=folder)


WORK = {"store": _store, "model": _save, "sweep": _study, "prepare": _cut, "download": _fetch}


def _prepare(place):
    """Make what the work reads: a file to cut, and one to fetch."""
    import anndata
    import pandas as pd
    from scipy import sparse

    counts = np.random.default_rng(0).poisson(0.7, (20_000, 60)).astype(np.float32)
    obs = pd.DataFrame({"target": ["a", "b"] * 10_000}, index=[f"c{n}" for n in range(20_000)])
    anndata.AnnData(sparse.csr_matrix(counts), obs=obs).write_h5ad(place / "source.h5ad")
    content = bytes(4 << 20)
    (place / "toy.bin").write_bytes(content)
    sums = (len(content), __import__("hashlib").sha256(content).hexdigest())
    address = (place / "toy.bin").as_uri()
    toy = sources.Source("toy", address, "toy.bin", *sums, "-", "-", "-", "table")
    sources.SOURCES = {"toy": toy}


def denied(work, folder, words):
    """Try, expect an error that says what is the matter; return its words."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    try:
        work(folder)
    except OSError as error:
        said = str(error)
    else:
        raise AssertionError("no error")
    assert any(word in said.lower() for word in words), f"unclear: {said}"
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert before.items() <= after.items(), "something was lost"
    assert not [path for path in after if path.name.endswith(".tmp")], "a draft was left"
    return said


def disks(place):
    """Fill a disk, forbid it, enlarge it: return flat values and the messages."""
    values, said = {"full_disk.tried": 0, "read_only.tried": 0}, {}
    for name, work in WORK.items():
        with disk(place / name, ROOM) as mounted:
            if not mounted:
                break
            folder = place / name
            seeds.model(folder)  # an old model, to be kept
            store.put("x", {"a": 1}, root=folder, provenance=PROVENANCE)  # an old result
            said[f"full disk, {name}"] = denied(work, folder, ("space", "room", "full", "free"))
            remount(folder, "ro,size=64m")
            words = ("read-only", "written", "permission")
            said[f"read-only, {name}"] = denied(work, folder, words)
            remount(folder, "rw")
            work(folder)
            values["full_disk.tried"] += 1
            values["read_only.tried"] += 1
    return values, said


def without_network(place):
    """Fetch over https where there is no network; the error must come soon and say what to do."""
    answer = place / "answer"
    child = os.fork()
    if not child:
        try:
            if ctypes.CDLL(None).unshare(CLONE_NEWNET):
                os._exit(2)
            sources.SOURCES = {source.name: source for source in sources._ALL}
            sources.fetch("papalexi2021", directory=place / "cache")
        except ConnectionError as error:
            answer.write_text(str(error))
            os._exit(1)  # as the interpreter does for an error that nobody catches
        finally:
            os._exit(3)
    start = time.monotonic()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 2:
        return {"no_network.tried": 0}, {}
    assert status == 1, f"ended with {status}"
    assert "Put the file" in answer.read_text()
    seconds = time.monotonic() - start
    return {"no_network.tried": 1, "no_network.seconds": seconds}, {
        "no network": answer.read_text()
    }


class _Clock(datetime.datetime):
    """A clock that is wrong by decades, and goes backwards."""

    years = iter(())

    @classmethod
    def now(cls, tz=None):
        return cls(next(cls.years), 1, 1, tzinfo=tz)


def wrong_clock(place):
    """Run a study, save, cut and read while the date is 1970, 9999 and then 1980."""
    tried, clock, kept = 0, time.time, store.datetime
    for first in (0.0, 2.5e11):
        folder = place / f"clock-{first:.0f}"
        folder.mkdir()
        _Clock.years = iter([9999, 1970, *[1980] * 100])
        try:
            time.time, store.datetime = lambda first=first: first, _Clock
            _study(folder)
            seeds.model(folder)
            os.utime(place / "source.h5ad", (first, first))
            _cut(folder)
        finally:
            time.time, store.datetime = clock, kept
        # Beside them, so that these are no runs.
        (folder / "config.json").rename(folder / "config")
        assert len(sweep.collect(folder)) == 12
        assert perturbseq.read_h5ad(folder / "o.h5ad").shape == (20_000, 60)
        tried += 1
    return {"wrong_clock.tried": tried}, {}


def without_gpu(place):
    """Ask for a GPU where there is none: as a device of a model and of a run, for workers."""
    assert not torch.cuda.is_available(), "this machine has a GPU"
    seeds.model(place / "model")
    study = [{"x": 0, "device": "cuda"}, {"x": 1}]
    said = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sweep.run(_task, study, place / "gpu")
    failed = list((place / "gpu").glob("*.error"))
    assert len(failed) == 1, "the run without a GPU was to fail alone"
    assert len(list((place / "gpu").glob("*.json"))) == 1
    said["no GPU, a run"] = store.read_json(failed[0])["error"]
    for name, work in (
        ("a model", lambda: SMSVAE.load(place / "model", device="cuda")),
        ("workers", sweep.gpu_workers),
    ):
        try:
            work()
        except (AssertionError, RuntimeError, ValueError) as error:
            said[f"no GPU, {name}"] = str(error)
    assert len(said) == 3
    unclear = [words for words in said.values() if "CUDA" not in words and "GPU" not in words]
    assert not unclear, unclear
    return {"no_gpu.tried": len(said)}, said


def _hungry(config):
    if config["x"] == 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80.00 GiB")
    return {"y": 1}


def out_of_gpu_memory(place):
    """Let a run end as it does when a GPU is full: the others go on, and it can be tried again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sweep.run(_hungry, sweep.axis("x", range(3)), place / "hungry")
    assert len(list((place / "hungry").glob("*.json"))) == 2
    (failed,) = (place / "hungry").glob("*.error")
    words = store.read_json(failed)["error"]
    assert "out of memory" in words
    return {"gpu_memory.tried": 1}, {"GPU memory (simulated)": words}


PARTS = (disks, without_network, wrong_clock, without_gpu, out_of_gpu_memory)


def deny_all():
    """Return flat values, and the words of every error."""
    values, said = {}, {}
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        _prepare(place)
        for part in PARTS:
            more, words = part(place)
            values |= {f"resources.{key}": value for key, value in more.items()}
            said |= words
    return values, said


def main():
    """Deny, and print what was said."""
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    values, said = deny_all()
    print(json.dumps(values, indent=1))
    for name, words in said.items():
        print(f"{name}: {words}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
