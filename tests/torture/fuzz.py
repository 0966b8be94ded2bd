"""Broken and hostile inputs for everything that reads what others wrote.

``python tests/torture/fuzz.py`` feeds all readers; ``--only READER --count N`` feeds one. Inputs
are numbered: reader, seed and number make the same input again. Each reader runs in a process with
bounded memory and bounded time per input, which may start no program, open no connection, load no
pickled name and write nowhere but in its folder; all of that counts as a fault, as does any error
that the reader's documentation does not name.
"""

import argparse
import collections
import contextlib
import importlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

MEMORY = 1 << 30  # bytes that reading one small input may take beyond the imports
SECONDS = 20  # of CPU for one input
# What none of the readers has a reason to do (names of Python's audit events).
FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "subprocess.Popen",
    "socket.connect",
    "pickle.find_class",
)
NUMBERS = (0, 1, -1, 127, 128, 255, 1 << 15, (1 << 31) - 1, -(1 << 31), 1 << 32, (1 << 63) - 1)
WORDS = (
    "",
    "+",
    "control",
    "KLF1",
    "KLF1+KLF1",
    "a\0b",
    "../../etc/passwd",
    "/etc/passwd",
    "\u202e",
    "x" * 10_000,
    "__class__",
)


# ------------------------------------------------------------------------------- mutations


def spoilt(rng, data):
    """Return bytes with one to eight faults."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 9)):
        _FAULTS[rng.integers(len(_FAULTS))](rng, data)
    return bytes(data)


def _place(rng, data):
    return int(rng.integers(len(data) + 1))


def _flip(rng, data):
    if data:
        data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))


def _overwrite(rng, data):
    value, width = NUMBERS[rng.integers(len(NUMBERS))], int(2 ** rng.integers(4))
    order, at = ("little", "big")[rng.integers(2)], _place(rng, data)
    data[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, order)


def _cut_out(rng, data):
    at = _place(rng, data)
    del data[at : at + int(rng.integers(1, 64))]


def _cut_off(rng, data):
    del data[_place(rng, data) :]


def _repeat(rng, data):
    at = _place(rng, data)
    data[at:at] = data[at : at + int(rng.integers(1, 64))] * int(rng.integers(1, 20))


def _insert(rng, data):
    at = _place(rng, data)
    data[at:at] = rng.bytes(int(rng.integers(1, 64)))


def _swap(rng, data):
    a, b, size = _place(rng, data), _place(rng, data), int(rng.integers(1, 32))
    data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]


_FAULTS = (_flip, _flip, _overwrite, _overwrite, _cut_out, _cut_off, _repeat, _insert, _swap)


def any_value(rng, depth=0):
    """Return something that JSON can hold, mostly not what is expected."""
    kind = rng.integers(9 if depth < 4 else 6)
    if kind == 0:
        return WORDS[rng.integers(len(WORDS))]
    if kind == 1:
        return int(NUMBERS[rng.integers(len(NUMBERS))])
    if kind == 2:
        return float(rng.choice([0.5, -1.0, 1e300, np.nan, np.inf]))
    if kind in (3, 4):
        return (None, True, False)[rng.integers(3)]
    if kind == 5:
        return 10 ** int(rng.integers(1, 300))
    some = range(int(rng.integers(4)))
    if kind == 6:
        return {WORDS[rng.integers(len(WORDS))]: any_value(rng, depth + 1) for _ in some}
    return [any_value(rng, depth + 1) for _ in some]


def misshapen(rng, value):
    """Return parsed JSON with one to three values, somewhere in it, replaced or left out."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.integers(1, 4)):
        inner = value
        while isinstance(inner, dict | list) and inner:
            key = list(inner)[rng.integers(len(inner))] if isinstance(inner, dict) else 0
            if not isinstance(inner[key], dict | list) or rng.random() < 0.4:
                if rng.random() < 0.2:
                    del inner[key]
                else:
                    inner[key] = any_value(rng)
                break
            inner = inner[key]
    return value


HOSTILE_JSON = (
    b"",
    b"\0",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"1" * 10_000,
    b'"\\ud800"',
    b"1e999",
    b"[1, 2]",
    b"null",
    b'{"values": 1}',
    b'{"values": {}, "provenance": {}, "experiment": 1}',
)


def json_bytes(rng, good):
    """Return a spoilt, a misshapen or a hostile JSON text."""
    kind = rng.integers(3)
    if kind == 0:
        return spoilt(rng, good)
    if kind == 1:
        return json.dumps(misshapen(rng, json.loads(good))).encode()
    return HOSTILE_JSON[rng.integers(len(HOSTILE_JSON))]


# --------------------------------------------------------------------------------- readers


@dataclass(frozen=True)
class Reader:
    """What makes input number n (from a generator, in a folder), what reads it, what it may say.

    ``prepare`` makes what all inputs start from.
    """

    prepare: object
    feed: object
    may_raise: tuple[type[Exception], ...]
    count: int


def _no_seed(_folder):
    return None


def _counts(rng, shape):
    """Return a matrix of some type with some bad values, dense or sparse."""
    from scipy import sparse

    kinds = ("f4", "f8", "i4", "i8", "u1", "?", "c8", "O", "U3", "f2")
    counts = rng.poisson(2.0, shape)
    with np.errstate(all="ignore"):
        counts = counts.astype(rng.choice(kinds[:5] if rng.random() < 0.7 else kinds))
    if counts.dtype.kind == "f" and counts.size:
        values = (np.nan, np.inf, -1.0, 0.5, 1e300, 2.0**24 + 2, 1e38, -0.0)
        for _ in range(rng.integers(3)):
            with np.errstate(over="ignore"):
                counts.flat[rng.integers(counts.size)] = values[rng.integers(len(values))]
    form = rng.integers(4)
    if form and counts.dtype.kind not in "OU" and counts.dtype != np.float16:
        return (sparse.csr_matrix, sparse.csc_matrix, sparse.csr_array)[form - 1](counts)
    return counts


def _labels(rng, n_cells):
    import pandas as pd

    words = [*WORDS[:7], "MYC", "control+MYC"]
    values = [words[rng.integers(len(words))] for _ in range(n_cells)]
    if n_cells:
        values[0] = "control"
    if n_cells and rng.random() < 0.3:
        values[-1] = (None, np.nan, 3, 2.5, b"x", ("a",), ["a"])[rng.integers(7)]
    if rng.random() < 0.4:
        with contextlib.suppress(TypeError):
            values = pd.Categorical(values)
            if rng.random() < 0.5:
                values = values.add_categories([7, "unused"][: rng.integers(1, 3)])
    return values


def feed_anndata(rng, _seed, _folder):
    """Make AnnData of doubtful content and let it in; what comes in must be sound."""
    import anndata
    import pandas as pd
    import torch

    from smslib.data import from_anndata

    shape = tuple(
        int(size) for size in rng.choice([0, 1, 2, 5, 40], 2, p=[0.1, 0.2, 0.2, 0.4, 0.1])
    )
    with contextlib.suppress(Exception):  # what AnnData itself refuses is no input
        counts = _counts(rng, shape)
        obs = pd.DataFrame({"target": _labels(rng, shape[0])}, index=_names(rng, shape[0]))
        if rng.random() < 0.05:
            obs = pd.concat([obs, obs], axis=1)
        var = pd.DataFrame(index=_names(rng, shape[1]))
        adata = anndata.AnnData(counts, obs=obs, var=var)
        if rng.random() < 0.2:
            adata.layers["raw"] = counts.copy()
        if rng.random() < 0.05:
            adata.X = None
    if "adata" not in locals():
        return "no input"
    options = {"layer": ("raw", "row")[rng.integers(2)]} if rng.random() < 0.2 else {}
    options |= {"sep": ("", "_", "+++", "\0")[rng.integers(4)]} if rng.random() < 0.1 else {}
    key = "target" if rng.random() < 0.95 else WORDS[rng.integers(len(WORDS))]
    control = "control" if rng.random() < 0.95 else WORDS[rng.integers(len(WORDS))]
    cells, design = from_anndata(adata, perturbation_key=key, control=control, **options)
    given = adata.layers["raw"] if options.get("layer") else adata.X
    given = np.asarray(given.toarray() if hasattr(given, "toarray") else given, dtype=float)
    assert np.array_equal(cells.counts.numpy().astype(float), given), "counts were changed"
    assert bool(torch.isfinite(cells.counts).all()), "counts are not finite"
    assert bool((cells.library > 0).all()), "an empty cell was let in"
    assert not bool(design.matrix[0].any()), "the control has a dose"
    assert int(cells.condition.max()) < design.n_conditions, "a condition is out of range"
    assert all(design.targets), "a target has no name"


def _names(rng, n):
    names = [f"n{k}" for k in range(n)]
    if n > 1 and rng.random() < 0.05:
        names[1] = names[0]
    return names


def rda_seeds(_folder):
    from torture import seeds

    return seeds.rda(), seeds.compressed_rda()


def feed_rda(rng, good, folder):
    """Spoil an .rda, before or after it is compressed, or make a bomb of one."""
    import gzip

    from smslib import perturbseq

    path, (plain, compressed) = folder / "input.rda", good
    kind = rng.integers(20)
    if kind == 0:
        content = bomb(compressed)
    elif kind < 3:
        content = plain + plain[19:] * int(rng.integers(2, 40))
    elif kind < 6:
        content = spoilt(rng, compressed)
    elif kind < 8:  # lists in lists
        content = plain[:19] + np.array([19, 1], ">i4").tobytes() * int(rng.integers(1, 20_000))
    elif kind < 12:
        content = gzip.compress(spoilt(rng, plain), 1)
    else:
        content = spoilt(rng, plain)
    path.write_bytes(content)
    perturbseq._read_papalexi(path)


def bomb(_good, size=1 << 32):
    """Return a few MB of gzip that become 4 GB of zeros (and would then fail their checksum)."""
    if "bomb" not in _KEPT:
        packer, zeros = zlib.compressobj(9, wbits=31), bytes(1 << 24)
        first, again = (packer.compress(zeros) + packer.flush(zlib.Z_FULL_FLUSH) for _ in "ab")
        _KEPT["bomb"] = first + again * ((size >> 24) - 1) + packer.flush()
    return _KEPT["bomb"]


_KEPT: dict[str, bytes] = {}


def h5ad_seeds(folder):
    from torture import seeds

    return [seeds.h5ad(folder / "seed.h5ad", kind) for kind in ("csr", "csc", "dense")]


def feed_h5ad(rng, good, folder):
    """Spoil the bytes or the structure of an .h5ad, read it, and go through the door with it."""
    from smslib import data, perturbseq

    path = _bad_h5ad(rng, good, folder)
    adata = perturbseq.read_h5ad(path)
    with contextlib.suppress(KeyError):  # of a label column that is gone: from_anndata's to say
        data.from_anndata(adata, perturbation_key="target", control="control")


def feed_cut(rng, good, folder):
    """Spoil an .h5ad and cut it."""
    from smslib import streaming

    path = _bad_h5ad(rng, good, folder)
    out = folder / "out.h5ad"
    out.unlink(missing_ok=True)
    streaming.cut(path, cells=np.arange(4), genes=np.arange(3), out=out)


def _bad_h5ad(rng, good, folder):
    path = folder / "input.h5ad"
    content = good[rng.integers(len(good))]
    if rng.random() < 0.4:
        path.write_bytes(spoilt(rng, content))
        return path
    path.write_bytes(content)
    import h5py

    with h5py.File(path, "r+") as file:
        for _ in range(rng.integers(1, 4)):
            names = []
            file.visit(names.append)
            _STRUCTURE[rng.integers(len(_STRUCTURE))](rng, file, names[rng.integers(len(names))])
            if not len(file):
                break
    return path


def _remove(_rng, file, name):
    if name in file:
        del file[name]


def _retype(rng, file, name):
    kinds = ("f8", "i8", "S3", "c16", "?", [("a", "i4"), ("b", "f4")])
    kind = kinds[rng.integers(len(kinds))]
    shape = ((), (8,), (0,), (8, 5), (2, 2, 2))[rng.integers(5)]
    _remove(rng, file, name)
    file.create_dataset(name, data=np.zeros(shape, np.dtype(kind)))


def _huge(rng, file, name):
    shape = ((1 << 40,), (1 << 20, 1 << 20), (1 << 62,))[rng.integers(3)]
    _remove(rng, file, name)
    chunks = (1 << 10,) * len(shape) if len(shape) == 1 else (1 << 6, 1 << 6)
    file.create_dataset(name, shape, "f4", chunks=chunks)


def _bomb(rng, file, name):
    _remove(rng, file, name)
    big = file.create_dataset(name, (1 << 29,), "u1", chunks=(1 << 22,), compression="gzip")
    packed = zlib.compress(bytes(1 << 22), 9)
    for at in range(0, 1 << 29, 1 << 22):
        big.id.write_direct_chunk((at,), packed)


def _elsewhere(rng, file, name):
    import h5py

    _remove(rng, file, name)
    kind = rng.integers(4)
    if kind == 0:
        file[name] = h5py.ExternalLink("/etc/passwd", "/")
    elif kind == 1:
        file[name] = h5py.ExternalLink("seed.h5ad", "/X")
    elif kind == 2:
        file.create_dataset(name, (64,), "u1", external=[("/etc/hostname", 0, 64)])
    else:
        layout = h5py.VirtualLayout((8, 5), "f4")
        layout[:] = h5py.VirtualSource("seed.h5ad", "X", (8, 5))
        file.create_virtual_dataset(name, layout)


def _cycle(rng, file, name):
    import h5py

    _remove(rng, file, name)
    file[name] = h5py.SoftLink(("/", "/uns", "/nowhere")[rng.integers(3)])


def _reattribute(rng, file, name):
    attributes = file[name].attrs if name in file else file.attrs
    keys = list(attributes) or ["encoding-type"]
    key = keys[rng.integers(len(keys))]
    values = ("dataframe", "csr_matrix", "nonsense", np.array([1 << 40, 1 << 40]), 3, b"\xff")
    attributes[key] = values[rng.integers(len(values))]
    if rng.random() < 0.3:
        del attributes[key]


def _deep(rng, file, name):
    _remove(rng, file, name)
    group = file.create_group(name)
    group.attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
    for _ in range(rng.integers(10, 1500)):
        group = group.create_group("a")
        group.attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})


def _pickled(rng, file, name):
    _remove(rng, file, name)
    file.create_dataset(name, data=np.void(pickle_of_a_command()))


def pickle_of_a_command():
    """Return a pickle that runs a command when loaded."""
    return b"cos\nsystem\n(S'touch executed'\ntR."


_STRUCTURE = (
    _remove,
    _retype,
    _huge,
    _elsewhere,
    _cycle,
    _reattribute,
    _reattribute,
    _deep,
    _pickled,
)


def notebook_seed(_folder):
    from torture import seeds

    return seeds.notebook()


def feed_lists(rng, good, _folder):
    """Spoil the notebook that the gene lists are read from, or the code in it."""
    from smslib import sources

    if rng.random() < 0.4:
        return sources._gene_list_table(json_bytes(rng, good))
    book = json.loads(good)
    source = book["cells"][0]["source"]
    deep = int(rng.integers(10, 100_000))
    code = (
        "string = 3\n",
        "STRING = string = ['a']\n",
        "EXOSOME = [1, None]\n",
        "EXOSOME = 5\n",
        "string_genes = b'a'\n",
        "string = __import__('os').system('touch executed')\n",
        "x = " + "[" * deep + "]" * deep + "\n",
        "x = " + "-" * deep + "1\n",
        "x = " + "9" * 10_000 + "\n",
        "x = '\0'\n",
        "%%bash\ntouch executed\n",
        "def f(:\n",
        "x = (" + "a," * deep + ")\n",
        "x = 'a' 'b' * 10**10\n",
        "string = 'a\\tb\\nc,d'\n",
    )
    source.insert(int(rng.integers(len(source) + 1)), code[rng.integers(len(code))])
    return sources._gene_list_table(json.dumps(book).encode())


def store_seeds(_folder):
    from torture import seeds

    return seeds.stored(), seeds.run()


def feed_store(rng, good, folder):
    """Spoil a stored experiment or a run, or ask for one by a name that leads elsewhere."""
    from smslib import store, sweep

    stored, run = good
    root = folder / "results"
    root.mkdir(exist_ok=True)
    (folder / "secret.json").write_bytes(stored)
    kind = rng.integers(5)
    if kind == 0:
        name = ("../secret", str(folder / "secret"), "a/../../secret", *WORDS)[rng.integers(14)]
        found = store.get(name, root=root)
        raise AssertionError(f"{name!r} left the folder and found {dict(found)}")
    if kind == 1:
        name = ("../written", str(folder / "written"), "a/../../written")[rng.integers(3)]
        store.put(name, {"a": 1}, root=root, provenance={"commit": "x"})
        raise AssertionError(f"{name!r} was written outside of the folder")
    (root / "x.json").write_bytes(json_bytes(rng, stored if kind < 4 else run))
    if kind == 2:
        return store.read_json(root / "x.json")
    return store.get("x", root=root) if kind == 3 else sweep.collect(root)


def model_seed(folder):
    from torture import seeds

    return seeds.model(folder / "good")


def feed_model(rng, good, folder):
    """Spoil one of the two files of a model, or put something hostile in its place."""
    import io

    import torch

    from smslib.model import SMSVAE

    config, weights = good
    kind, made = rng.integers(10), io.BytesIO()
    if rng.random() < 0.8:  # else the checksum tells
        config = json.dumps({**json.loads(config), "weights_sha256": None}).encode()
    state = torch.load(io.BytesIO(weights), weights_only=True)
    if kind < 3:
        config = json_bytes(rng, config)
    elif kind < 5:
        sizes = json.loads(config)
        key = list(sizes["model"])[rng.integers(len(sizes["model"]))]
        sizes["model"][key] = NUMBERS[rng.integers(len(NUMBERS))]
        config = json.dumps(sizes).encode()
    elif kind < 8:
        weights = spoilt(rng, weights)
    elif kind == 8:
        weights = (pickle_of_a_command(), b"", b"PK\3\4" * 9, bomb(weights))[rng.integers(4)]
    else:
        state["design"] = torch.zeros(1).expand(1 << 20, 1 << 20)
        torch.save(state, made)
        weights = made.getvalue()
    target = folder / "model"
    target.mkdir(exist_ok=True)
    (target / "config.json").write_bytes(config)
    (target / "weights.pt").write_bytes(weights)
    SMSVAE.load(target)


def feed_names(rng, _seed, folder):
    """Ask for sources by names that lead out of the data directory."""
    from smslib import sources

    word = WORDS[rng.integers(len(WORDS))]
    name = ("../" * int(rng.integers(9)) + word, word, f"file://{word}")[rng.integers(3)]
    sources.fetch(name, directory=folder)
    raise AssertionError(f"{name!r} names a file")


READERS = {
    "anndata": Reader(_no_seed, feed_anndata, (KeyError, ValueError), 3000),
    "rda": Reader(rda_seeds, feed_rda, (ValueError,), 1500),
    "h5ad": Reader(h5ad_seeds, feed_h5ad, (ValueError, FileNotFoundError), 1500),
    "cut": Reader(h5ad_seeds, feed_cut, (ValueError, OSError), 800),
    "gene lists": Reader(notebook_seed, feed_lists, (ValueError,), 1000),
    "store": Reader(store_seeds, feed_store, (ValueError, KeyError), 1200),
    "model": Reader(model_seed, feed_model, (ValueError, FileNotFoundError), 900),
    "names": Reader(_no_seed, feed_names, (KeyError,), 100),
}


# ------------------------------------------------------------------------ the child's side


class TooLong(BaseException):
    """An input took longer than it may."""


def bound(folder):
    """Limit this process: memory, time, and what it may do besides reading."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def watch(event, arguments):
        if event in FORBIDDEN:
            seen.append(f"{event} {arguments!r:.200}")
        elif event == "open" and _writes(arguments):
            place = Path(arguments[0]).absolute()
            if not place.is_relative_to(folder) and place.parts[1] not in ("dev", "proc"):
                seen.append(f"open {place} for writing")

    def stop(*_):
        raise TooLong

    seen: list[str] = []
    sys.addaudithook(watch)
    signal.signal(signal.SIGPROF, stop)
    return seen


def _writes(arguments):
    flags = arguments[2] if len(arguments) > 2 and isinstance(arguments[2], int) else 0
    named = isinstance(arguments[0], str | os.PathLike)
    return named and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def outcome(reader, rng, seed, folder, seen):
    """Feed one input; return how it ended and, if that is a fault, what happened."""
    seen.clear()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    # A loop in C hears no alarm: there the kernel ends the process.
    last = int(time.process_time()) + 2 * SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (last, resource.RLIM_INFINITY))
    try:
        result = READERS[reader].feed(rng, seed, folder)
        ended, fault = ("no input" if result == "no input" else "read"), ""
    except READERS[reader].may_raise as error:
        ended, fault = "refused", "" if str(error) else f"{type(error).__name__} says nothing"
    except TooLong:
        ended, fault = "fault", f"took more than {SECONDS} s"
    except BaseException as error:  # noqa: BLE001 - the finding
        ended, fault = "fault", f"{type(error).__name__}: {error!s:.200}\n{_where(error)}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if seen:
        ended, fault = "fault", f"did what it may not: {seen[:3]}"
    if (folder / "executed").exists() or Path("executed").exists():
        ended, fault = "fault", "ran code of its input"
    return ended, fault


def _where(error):
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/smslib/" in frame.filename] or frames
    return "; ".join(
        f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in (ours[-1], frames[-1])
    )


def feed(reader, good, numbers, seed, folder, tell):
    """Feed some numbers of inputs; tell of each how it ended."""
    with contextlib.suppress(Exception):  # imports of the first reading
        READERS[reader].feed(np.random.default_rng([seed, 1 << 20]), good, folder)
    (folder / "executed").unlink(missing_ok=True)
    seen, code = bound(folder), zlib.crc32(reader.encode())
    for number in numbers:
        rng = np.random.default_rng([seed, code, number])
        ended, fault = outcome(reader, rng, good, folder, seen)
        tell({"number": number, "ended": ended, "fault": fault})


# ----------------------------------------------------------------------- the parent's side


def _in_a_child(reader, numbers, seed):
    """Feed numbers in a process of its own; return what it told, its end and its peak in MB."""
    with tempfile.TemporaryDirectory() as folder:
        told, good = Path(folder) / "told", READERS[reader].prepare(Path(folder))
        child = os.fork()
        if not child:
            try:
                os.chdir(folder)
                warnings.simplefilter("ignore")
                with told.open("w", buffering=1) as file:

                    def tell(what):
                        file.write(json.dumps(what) + "\n")

                    feed(reader, good, numbers, seed, Path(folder), tell)
                os._exit(0)
            finally:
                os._exit(1)
        _, status, used = os.wait4(child, 0)
        lines = [json.loads(line) for line in told.read_text().splitlines()]
        return lines, status, used.ru_maxrss / 1024


def batches(reader, count, seed):
    """Feed a reader in processes; return ends, faults (number to words) and peak memory in MB.

    A process that dies counts as a fault of the input it was at, and another one goes on.
    """
    ends, faults, peak, first = collections.Counter(), {}, 0.0, 0
    while first < count:
        told, status, used = _in_a_child(reader, range(first, count), seed)
        peak = max(peak, used)
        ends.update(line["ended"] for line in told)
        faults |= {line["number"]: line["fault"] for line in told if line["fault"]}
        if not status:
            return ends, faults, peak
        at = first + len(told)
        words = "went on for ever" if os.WTERMSIG(status) == signal.SIGXCPU else "died"
        faults[at] = f"the process {words} (status {status})"
        ends["fault"] += 1
        first = at + 1
    return ends, faults, peak


def fuzz(share=1.0, seed=0, only=None):
    """Feed all readers a share of their inputs; return flat values to store, and all faults."""
    for module in ("anndata", "h5py", "pandas", "rdata", "smslib.model", "smslib.sweep"):
        importlib.import_module(module)  # once, for all the children
    values, all_faults = {}, {}
    for name, reader in READERS.items():
        if only not in (None, name):
            continue
        count = max(1, round(reader.count * share))
        ends, faults, peak = batches(name, count, seed)
        key = f"fuzz.{name.replace(' ', '_')}"
        values |= {f"{key}.inputs": count, f"{key}.faults": len(faults), f"{key}.peak_mb": peak}
        values |= {f"{key}.{end}": ends[end] for end in ("read", "refused")}
        all_faults[name] = faults
    values["fuzz.inputs"] = sum(v for k, v in values.items() if k.endswith(".inputs"))
    values["fuzz.faults"] = sum(v for k, v in values.items() if k.endswith(".faults"))
    return values, all_faults


def main():
    """Feed, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--share", type=float, default=1.0, help="of the inputs")
    parser.add_argument("--only", choices=list(READERS))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    values, faults = fuzz(given.share, given.seed, given.only)
    print(json.dumps(values, indent=1))
    for name, found in faults.items():
        kinds = collections.Counter(fault for fault in found.values())
        for fault, times in kinds.most_common():
            first = next(number for number, words in found.items() if words == fault)
            print(f"{name} x{times} (first {first}): {fault}")
    return bool(values["fuzz.faults"])


if __name__ == "__main__":
    raise SystemExit(main())
