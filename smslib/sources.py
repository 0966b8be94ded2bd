"""Public files: where they are, what they must hash to, and how they get here whole.

A `Source` is an address, a size, a checksum, a licence and the name of a reader. `fetch` looks for
its file in the data directory, verifies it, and only then asks the network. A download grows in
``<file>.part``, goes on where it was cut, and gets its name only after its checksum agrees.
`gene_lists` reads the lists by which the sVAE+ paper cut the genome-wide screen.
"""

from __future__ import annotations

import ast
import contextlib
import errno
import hashlib
import http.client
import json
import os
import re
import socket
import ssl
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import urllib.response
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

from smslib import files
from smslib.files import size_text
from smslib.names import unknown_names

__all__ = [
    "SOURCES",
    "TABLE_9",
    "GeneLists",
    "Source",
    "available",
    "data_dir",
    "fetch",
    "find",
    "gene_lists",
    "size_text",
    "state",
]

_SCHEMES = ("https", "file")  # what an address or a redirect may begin with
_CHUNK = 1 << 18  # bytes per read
_PATIENCE = 30.0  # seconds without a byte before a connection counts as cut
_TRIES = 5  # connections in a row that may bring nothing new
_PAUSE = 1.0  # seconds before the second try, doubled before each later one
_LARGE = 1 << 28  # bytes from which a verification is remembered instead of repeated
_PASSING = {408, 425, 429, 500, 502, 503, 504}  # HTTP answers that may be better a moment later
_LASTING = (socket.gaierror, ssl.SSLCertVerificationError, FileNotFoundError, PermissionError)
_NOT_TYPED_IN = (ValueError, RecursionError, MemoryError)  # by the parser: too deep, too long
_NO_ROOM = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}

_Answer = http.client.HTTPResponse | urllib.response.addinfourl  # the latter from a file


@dataclass(frozen=True)
class Source:
    """One public file: where it is, what it must hash to, and what reads it.

    Parameters
    ----------
    name : str
        What `fetch` calls it.
    url : str
        An https (or file) address that always serves the same bytes; empty if there is none.
    filename : str
        Its name in the data directory.
    bytes : int
        Its size.
    sha256 : str
        Its checksum, in hexadecimal; empty if its host gives an MD5 only.
    licence, citation : str
        Of the file, and of the experiment in it.
    description : str
        Cells, genes and perturbations in one sentence.
    reader : str
        Key of the function of `smslib.perturbseq.read` that opens it.
    md5 : str
        Its checksum where no SHA-256 is known.
    recipe : str
        Name of the function of `smslib.prepare` that cuts it as the paper did; empty if none.
    derive : str
        If not empty, ``url`` serves something else (`_DERIVED` says what), from which the file is
        made; size and checksum are those of the file made.
    """

    name: str
    url: str
    filename: str
    bytes: int
    sha256: str
    licence: str
    citation: str
    description: str
    reader: str
    md5: str = ""
    recipe: str = ""
    derive: str = ""

    @property
    def checksum(self) -> tuple[str, str]:
        """Name of the hash function, and the sum in hexadecimal."""
        return ("sha256", self.sha256) if self.sha256 else ("md5", self.md5)


_REPLOGLE = "Replogle et al. (2022), Cell 185:2559-2575, doi:10.1016/j.cell.2022.05.013"
_ADAMSON = "Adamson et al. (2016), Cell 167:1867-1882, doi:10.1016/j.cell.2016.11.048"
_NORMAN = "Norman et al. (2019), Science 365:786-793, doi:10.1126/science.aax4438"
_PAPALEXI = "Papalexi et al. (2021), Nature Genetics 53:322-331, doi:10.1038/s41588-021-00778-2"


def _figshare(name: str, number: int, filename: str, size: int, md5: str, **more: str) -> Source:
    """Return a file of Replogle et al.'s own deposit."""
    return Source(
        name=name,
        # Not plus.figshare.com, whose links are behind a challenge that only a browser passes.
        url=f"https://ndownloader.figshare.com/files/{number}",
        filename=filename,
        bytes=size,
        sha256="",
        md5=md5,
        licence="CC BY 4.0",
        citation=f"{_REPLOGLE}; the authors' deposit, doi:10.25452/figshare.plus.20029387.v1",
        **{"reader": "backed", **more},
    )


def _scperturb(filename: str, size: int, md5: str, *, citation: str, **more: str) -> Source:
    """Return a file of scPerturb 1.4: raw UMIs, labels in ``obs["perturbation"]``."""
    return Source(
        url=f"https://zenodo.org/records/13350497/files/{filename}?download=1",
        filename=filename,
        bytes=size,
        sha256="",
        md5=md5,
        licence="CC BY 4.0",
        citation=f"{citation}; as harmonised by scPerturb (Peidli et al. 2024, "
        "doi:10.1038/s41592-023-02144-y), doi:10.5281/zenodo.13350497",
        **{"reader": "h5ad", **more},
    )


_ALL = (
    Source(
        name="papalexi2021",
        url="https://raw.githubusercontent.com/Katsevich-Lab/sceptredata/"
        "ec722d5df90dfd34ace6cc9a5745ab6a5c2a6731/data/lowmoi_example_data.rda",
        filename="lowmoi_example_data.rda",
        bytes=1_358_267,
        sha256="e3f8ad09bb4b1d0deeeec2850a2d96f8f5062fef31a9ab1cc080e60560421b6a",
        licence="MIT (the file, as part of sceptredata)",
        citation=f"{_PAPALEXI}; GEO GSE153056",
        description="ECCITE-seq knock-outs in THP-1: 20,729 cells x 299 genes (a random 2 % of "
        "the transcriptome and some targets), 110 guides, three replicates",
        reader="papalexi",
    ),
    Source(
        name="norman2019-mini",
        url="https://raw.githubusercontent.com/altoslabs/perturbench/"
        "d357dfae3b50968e800e9f5f273ff145080ae67c/src/perturbench/data/resources/devel.h5ad",
        filename="devel.h5ad",
        bytes=1_142_678,
        sha256="220998f5630c813228c8661c86dd52244b9ac87127511289af90e0d900d8429b",
        licence="BSD-3-Clause (the file, as part of perturbench)",
        citation=f"{_NORMAN}, GEO GSE133344; McFaline-Figueroa et al. (2023), GEO GSM7056149",
        description="CRISPRa in K562 (18 singles, 15 doubles) and CRISPRi of nine of the same "
        "genes in three glioma lines: 5,961 cells x 500 variable genes",
        reader="norman",
    ),
    Source(
        name="replogle2022-gene-lists",
        # The whole commit, as an abbreviated one is not an address for ever.
        url="https://raw.githubusercontent.com/Genentech/sVAE/"
        "ad70d8e3ecc4e39407907e7e576d7a2f16d9056e/entry_points/replogle-preprocessing.ipynb",
        filename="replogle2022_gene_lists.tsv",
        bytes=73_070,
        sha256="16f73bee10e152a7cbb744ec9a5652c8bbc0a82fd444d0a6d1eabc28bbf0a65f",
        licence="facts from a published table (the notebook they are read from: Apache-2.0)",
        citation=f"{_REPLOGLE}, Supplementary Table 3, as typed into "
        "entry_points/replogle-preprocessing.ipynb of github.com/Genentech/sVAE",
        description="the perturbation clusters, gene programs and held-out pathways by which "
        "the sVAE+ paper cut the genome-wide screen",
        reader="table",
        derive="gene_lists",
    ),
    _figshare(
        "replogle2022-k562-gwps",
        35775507,
        "K562_gwps_raw_singlecell_01.h5ad",
        65_830_941_948,
        "887e3e6a8c8df6eadf7a3030a53c9546",
        description="CRISPRi genome-wide in K562, the authors' own file: 1,989,578 cells x 8,248 "
        "genes, 9,866 targets, dense; the screen of the sVAE+ paper",
        recipe="replogle",
    ),
    _scperturb(
        "ReplogleWeissman2022_K562_gwps.h5ad",
        8_805_466_154,
        "13db594f8f1d2ccb88fec44a13e414dc",
        citation=_REPLOGLE,
        name="replogle2022-k562-gwps-scperturb",
        description="the same matrix as replogle2022-k562-gwps, compressed: the one to download",
        reader="backed",
        recipe="replogle",
    ),
    _figshare(
        "replogle2022-k562-essential",
        35773219,
        "K562_essential_raw_singlecell_01.h5ad",
        10_661_879_995,
        "4f1122ce1c7f13299a68df6459a266d3",
        description="CRISPRi of essential genes in K562, the authors' own file: 310,385 cells",
    ),
    _scperturb(
        "ReplogleWeissman2022_K562_essential.h5ad",
        1_546_729_675,
        "d8cba17576d1a8afc0f7d71b79cad0f7",
        citation=_REPLOGLE,
        name="replogle2022-k562-essential-scperturb",
        description="the same screen as replogle2022-k562-essential, compressed",
        reader="backed",
    ),
    _figshare(
        "replogle2022-rpe1",
        35775606,
        "rpe1_raw_singlecell_01.h5ad",
        8_700_873_216,
        "6a2a9d0d2bf4ec147f4d1104043b268c",
        description="CRISPRi of essential genes in RPE1, the authors' own file",
    ),
    _scperturb(
        "ReplogleWeissman2022_rpe1.h5ad",
        1_236_886_900,
        "cc7f1ec50aeb3a3e1b4a6cfa713d80fa",
        citation=_REPLOGLE,
        name="replogle2022-rpe1-scperturb",
        description="the same screen as replogle2022-rpe1, compressed",
        reader="backed",
    ),
    _scperturb(
        "NormanWeissman2019_filtered.h5ad",
        698_680_199,
        "c870e6967d91c017d9da827bab183cd6",
        citation=f"{_NORMAN}; GEO GSE133344",
        name="norman2019",
        description="CRISPRa in K562, single genes and pairs; the second screen of the paper",
        recipe="norman",
    ),
    _scperturb(
        "PapalexiSatija2021_eccite_RNA.h5ad",
        147_215_278,
        "d9e8bfe20b0e7b0919be042e8fcf6d03",
        citation=f"{_PAPALEXI}; GEO GSE153056",
        name="papalexi2021-full",
        description="the screen of papalexi2021 with its whole transcriptome",
        reader="papalexi-full",
    ),
    _scperturb(
        "AdamsonWeissman2016_GSM2406675_10X001.h5ad",
        34_557_246,
        "232f7e3756d41602bbe434b50662a76f",
        citation=f"{_ADAMSON}; GEO GSM2406675",
        name="adamson2016-pilot",
        description="CRISPRi in K562, pilot: 5,768 cells x 35,635 genes; labels are names of "
        "vectors, which ones are controls is for the reader to say",
    ),
    _scperturb(
        "AdamsonWeissman2016_GSM2406677_10X005.h5ad",
        139_059_637,
        "8657391920e7f8b3e6fd52745777002a",
        citation=f"{_ADAMSON}; GEO GSM2406677",
        name="adamson2016-epistasis",
        description="CRISPRi in K562, one to three sensors of unfolded protein at once: 15,006 "
        "cells; labels as in adamson2016-pilot",
    ),
    _scperturb(
        "AdamsonWeissman2016_GSM2406681_10X010.h5ad",
        471_286_951,
        "2fa44ea61a8dd35742af618638ec65fc",
        citation=f"{_ADAMSON}; GEO GSM2406681",
        name="adamson2016-upr",
        description="CRISPRi in K562, about 90 genes of the unfolded protein response: 65,337 "
        "cells; labels as in adamson2016-pilot, some cells have none",
    ),
)

SOURCES: Mapping[str, Source] = {source.name: source for source in _ALL}


# ------------------------------------------------------------------------------------- files


def data_dir() -> Path:
    """Return where data files are kept: ``SMS_DATA_DIR`` if set, else the user's cache.

    Returns
    -------
    Path
        A folder, which need not exist.
    """
    chosen = os.environ.get("SMS_DATA_DIR")
    return Path(chosen).expanduser() if chosen else _user_cache() / "smslib"


def _user_cache() -> Path:
    """Return the folder in which this platform's programs keep what can be fetched again."""
    home = Path.home()
    if sys.platform == "darwin":
        return home / "Library" / "Caches"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")


def find(name: str) -> Source:
    """Return a source by name.

    Raises
    ------
    KeyError
        If there is none; the nearest names are listed.
    """
    if name not in SOURCES:
        raise KeyError(unknown_names("source", [name], SOURCES))
    return SOURCES[name]


def fetch(name: str, *, directory: str | os.PathLike[str] | None = None) -> Path:
    """Return the verified local file of a source, downloading it only if it is not there.

    An interrupted download leaves ``<filename>.part`` and goes on from it next time. A cut
    connection is tried again, with growing pauses. Two processes that want the same file take
    turns (not on Windows, where only the checksum protects). A terminal is shown a progress bar.
    A file of 256 MiB or more is hashed once; a small ``.<filename>.verified`` beside it records
    size, date and sum, and as long as they agree the file is not read again.

    Parameters
    ----------
    name : str
        A key of ``SOURCES``.
    directory : path, optional
        Where to look and to store; `data_dir` by default. It may be read-only if it holds the
        file.

    Returns
    -------
    Path
        The file, of the source's size and checksum.

    Raises
    ------
    KeyError
        If the source is unknown.
    ValueError
        If the file, found or downloaded, has another checksum than the source. The bad file is
        kept beside under the name ``<filename>.bad``.
    ConnectionError
        If the file is not there and cannot be downloaded; the message says which file to put
        where.
    OSError
        If the disk has no room for it; what has arrived is kept.
    """
    source = find(name)
    path = _folder(directory) / source.filename
    if path.exists():
        _verify(path, source)
    else:
        _bring(source, path)
    return path


def available(name: str, *, directory: str | os.PathLike[str] | None = None) -> bool:
    """Say whether a source is on disk or can be downloaded, without doing so or raising.

    True if a file with the right checksum is there (of 256 MiB or more: with the right size); a
    wrong one is not looked beyond. Without a file the source's address is asked for one byte,
    with five seconds to answer.

    Parameters
    ----------
    name : str
        A key of ``SOURCES``; False for any other.
    directory : path, optional
        As in `fetch`.

    Returns
    -------
    bool
        Whether `fetch` has something to return.
    """
    try:
        source = find(name)
        path = _folder(directory) / source.filename
        if path.exists():
            large = source.bytes >= _LARGE and path.stat().st_size == source.bytes
            return large or not _mismatch(path, source)
        with _open_url(source.url, first=0, last=0, patience=5.0):
            return True
    except (KeyError, OSError, _Refused, _Cut):
        return False


def state(name: str, *, directory: str | os.PathLike[str] | None = None) -> str:
    """Say what is on disk: ``present``, ``partial (12%)``, ``wrong size`` or ``absent``."""
    source = find(name)
    path = _folder(directory) / source.filename
    if path.exists():
        return "present" if path.stat().st_size == source.bytes else "wrong size"
    part = _part(path)
    return f"partial ({part.stat().st_size / source.bytes:.0%})" if part.exists() else "absent"


def _folder(directory: str | os.PathLike[str] | None) -> Path:
    return data_dir() if directory is None else Path(directory)


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


# ---------------------------------------------------------------------------------- verifying


def _verify(path: Path, source: Source) -> None:
    """Raise unless ``path`` is the source's file; then set it aside as ``<path>.bad``."""
    if _remembered(path, source):
        return
    if problem := _mismatch(path, source):
        raise ValueError(_set_aside(path, path, problem))
    _remember(path, source)


def _mismatch(path: Path, source: Source) -> str:
    """Say how a file differs from its source; empty if it does not."""
    kind, expected = source.checksum
    found = path.stat().st_size
    if found != source.bytes:
        return (
            f"{source.filename} has {found:,} bytes ({source.name}), expected {source.bytes:,} "
            f"({kind} {expected})"
        )
    found = _digest(path, source)
    if found == expected:
        return ""
    return f"{source.filename} has {kind} {found} ({source.name}), expected {expected}"


def _digest(path: Path, source: Source) -> str:
    """Return a file's checksum, in the kind its source gives."""
    # Not a safeguard against an attacker where a host publishes an MD5 only, and said to be none.
    summing = hashlib.new(source.checksum[0], usedforsecurity=False)
    with path.open("rb") as file, _bar(source, "verifying") as bar:
        while chunk := file.read(_CHUNK):
            summing.update(chunk)
            bar.update(len(chunk))
    return summing.hexdigest()


def _set_aside(path: Path, kept: Path, problem: str) -> str:
    """Move a bad file to ``<kept>.bad``; return the problem and where the file is now."""
    aside = kept.with_name(kept.name + ".bad")
    try:
        os.replace(path, aside)
    except OSError as error:
        return f"{problem}; it could not be set aside ({error.strerror}); remove {path} yourself"
    return f"{problem}; it is kept as {aside}; fetch again to download a fresh copy"


def _stamp(path: Path) -> Path:
    return path.with_name(f".{path.name}.verified")


def _identity(path: Path, source: Source) -> str:
    status = path.stat()
    return f"{source.checksum[1]} {status.st_size} {status.st_mtime_ns}\n"


def _remembered(path: Path, source: Source) -> bool:
    """Say whether this very file was found good before."""
    stamp = _stamp(path)
    return (
        source.bytes >= _LARGE and stamp.exists() and stamp.read_text() == _identity(path, source)
    )


def _remember(path: Path, source: Source) -> None:
    """Record that a large file is good; in a read-only folder it will be hashed again."""
    if source.bytes >= _LARGE:
        with contextlib.suppress(OSError):
            _stamp(path).write_text(_identity(path, source))


# -------------------------------------------------------------------------------- downloading


class _Cut(Exception):
    """A connection that failed in a way that may pass."""


class _Refused(Exception):
    """An answer that another try would not change."""


def _bring(source: Source, path: Path) -> None:
    """Get a file that is not there, or say which file to put where."""
    try:
        _check_address(source.url)
        _make_folder(source, path)
        if source.derive:
            _make(source, path)
        else:
            _download(source, path)
    except (_Cut, _Refused) as error:
        raise ConnectionError(_put_it_there(source, path, str(error))) from error


def _make_folder(source: Source, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ConnectionError(
            f"{source.filename} is not in {path.parent}, which cannot be written to "
            f"({error.strerror}); set SMS_DATA_DIR to a folder of yours"
        ) from error


def _download(source: Source, path: Path) -> None:
    """Let ``<path>.part`` grow to the file, verify, and only then move it into place."""
    part = _part(path)
    with files.alone(part, part.touch):
        if path.exists():  # another process was faster
            part.unlink(missing_ok=True)
            _verify(path, source)
            return
        if problem := _grow(part, source, path):
            raise ValueError(_set_aside(part, path, problem))
        os.replace(part, path)
    _remember(path, source)


def _grow(part: Path, source: Source, path: Path) -> str:
    """Download what is missing of ``part``; return how it then differs from the source."""
    try:
        with part.open("ab", buffering=0) as file:
            resumed = _length(file) > 0
            _fill(file, source, path)
            problem = _mismatch(part, source)
            if problem and resumed:  # the older piece may be at fault
                file.truncate(0)
                _fill(file, source, path)
                problem = _mismatch(part, source)
            os.fsync(file.fileno())
            return problem
    finally:
        if part.exists() and not part.stat().st_size:
            part.unlink()


def _length(file: IO[bytes]) -> int:
    return os.fstat(file.fileno()).st_size


def _fill(file: BinaryIO, source: Source, path: Path) -> None:
    """Download what is missing, over as many connections as it takes.

    Raises
    ------
    _Cut
        After ``_TRIES`` connections in a row that brought nothing new.
    """
    if _length(file) > source.bytes:
        file.truncate(0)
    files.check_room(**_room_for(source, path, have=_length(file)))
    most, idle, reason = _length(file), 0, ""
    while _length(file) < source.bytes:
        if idle == _TRIES:
            kept = f"; what has arrived is kept in {_part(path).name}: fetch again to go on"
            raise _Cut(f"{reason}{kept if most else ''}")
        if idle:
            time.sleep(_PAUSE * 2 ** (idle - 1))
        reason = _attempt(file, source, path)
        idle = 0 if _length(file) > most else idle + 1
        most = max(most, _length(file))


def _attempt(file: BinaryIO, source: Source, path: Path) -> str:
    """Use one connection; return why it ended."""
    have = _length(file)
    try:
        with _open_url(source.url, first=have, patience=_PATIENCE) as response:
            _check_length(response, source, have)
            if have and not _continues(response):
                file.truncate(0)
            _copy(response, file, source, path)
    except _Cut as error:
        return str(error)
    return f"the connection closed after {_length(file):,} bytes"


def _continues(response: _Answer) -> bool:
    """Say whether an answer begins where the file ends; a server may send the whole instead."""
    return response.status == 206


def _check_length(response: _Answer, source: Source, have: int) -> None:
    """Raise unless the answer announces the source's length, or none."""
    total = response.headers["Content-Length"]
    if _continues(response):
        given = response.headers["Content-Range"] or ""
        found = re.fullmatch(rf"bytes {have}-\d+/(\d+)", given)
        if not found:
            raise _Refused(f"asked for bytes {have}-, the server answered {given!r}")
        total = found[1]
    if total is not None and int(total) != source.bytes:
        raise _Refused(
            f"the server's file has {int(total):,} bytes, expected {source.bytes:,}: it is "
            "another file"
        )


def _copy(response: _Answer, file: BinaryIO, source: Source, path: Path) -> None:
    """Append an answer to a file, with a progress bar (on a terminal only)."""
    with _bar(source, "", done=_length(file)) as bar:
        while chunk := _read(response):
            if _length(file) + len(chunk) > source.bytes:
                file.truncate(0)
                raise _Refused(f"the server sends more than {source.bytes:,} bytes")
            _append(chunk, file, source, path)
            bar.update(len(chunk))


def _read(response: _Answer) -> bytes:
    with _network():
        return response.read(_CHUNK)


def _append(chunk: bytes, file: BinaryIO, source: Source, path: Path) -> None:
    rest = memoryview(chunk)
    try:
        while rest:  # a disk that is nearly full takes a part
            rest = rest[file.write(rest) :]
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise files.no_room(**_room_for(source, path, have=_length(file))) from error
        raise


def _room_for(source: Source, path: Path, *, have: int) -> dict[str, Any]:
    """Return what `smslib.files` has to know to say that there is no room."""
    return {
        "folder": path.parent,
        "needed": source.bytes - have,
        "what": source.filename,
        "advice": "Free some, or set SMS_DATA_DIR to a folder on a larger disk",
        "kept": have,
    }


def _bar(source: Source, task: str, *, done: int = 0) -> Any:  # noqa: ANN401 (tqdm has no types)
    from tqdm import tqdm

    label = f"{task} {source.filename}".strip()
    return tqdm(
        total=source.bytes,
        initial=done,
        desc=label,
        unit="B",
        unit_scale=True,
        disable=None,  # where there is no terminal
        leave=not task,
    )


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow a redirect only to an address that might have been asked in the first place."""

    def redirect_request(self, *arguments: Any) -> urllib.request.Request | None:  # noqa: ANN401
        """Check the new address, the last argument, before it is asked."""
        try:
            _check_address(arguments[-1])
        except _Refused:
            arguments[1].close()
            raise
        return super().redirect_request(*arguments)


def _check_address(url: str) -> None:
    if not url:
        raise _Refused("it has no public address in this form")
    if urllib.parse.urlsplit(url).scheme not in _SCHEMES:
        raise _Refused(f"{url} is not one of {_SCHEMES}")


def _open_url(url: str, *, first: int = 0, last: int | None = None, patience: float) -> _Answer:
    """Ask an address for bytes ``first`` to ``last``; a server may answer with all of them."""
    _check_address(url)
    request = urllib.request.Request(url, headers={"User-Agent": "smslib"})
    if first or last is not None:
        request.add_header("Range", f"bytes={first}-{'' if last is None else last}")
    with _network():
        response = urllib.request.build_opener(_Redirects).open(request, timeout=patience)
    # A file has no status; 202 comes with a challenge that only a browser passes.
    if response.status not in (None, 200, 206):
        response.close()
        raise _Refused(f"the server answered HTTP {response.status} instead of the file")
    return response


@contextlib.contextmanager
def _network() -> Iterator[None]:
    """Sort what goes wrong on the network into what may pass and what will not."""
    try:
        yield
    except urllib.error.HTTPError as error:
        error.close()
        raise (_Cut if error.code in _PASSING else _Refused)(str(error)) from error
    except urllib.error.URLError as error:
        raise (_Refused if isinstance(error.reason, _LASTING) else _Cut)(
            str(error.reason)
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise _Cut(f"{type(error).__name__}: {error}") from error


def _put_it_there(source: Source, path: Path, reason: str) -> str:
    kind, expected = source.checksum
    origin = f"it comes from {source.url or source.citation}"
    if source.derive:
        origin = f"it is made from {source.url}, which may be put there instead"
    return (
        f"cannot download {source.name}: {reason}. Put the file {source.filename} "
        f"({source.bytes:,} bytes, {kind} {expected}) into {path.parent}; {origin}. "
        "Or point SMS_DATA_DIR at a folder that holds it"
    )


# -------------------------------------------------------------------------------- derived files


def _make(source: Source, path: Path) -> None:
    """Make a small file from what its address serves, verify, and move it into place."""
    origin = path.with_name(source.url.rpartition("/")[2])
    content = origin.read_bytes() if origin.exists() else _get(source.url)
    with files.whole(path) as made:
        made.write_bytes(_DERIVED[source.derive](content))
        if problem := _mismatch(made, source):
            raise ValueError(_set_aside(made, path, f"made from {source.url}, {problem}"))


def _get(url: str) -> bytes:
    """Return a small answer whole, trying again as `_fill` does."""
    for idle in range(_TRIES):
        if idle:
            time.sleep(_PAUSE * 2 ** (idle - 1))
        try:
            with _open_url(url, patience=_PATIENCE) as response, _network():
                return response.read()
        except _Cut as error:
            last = error
    raise last


# Row of the paper's Table 9 that has as many targets as the authors' code holds out under this
# name. The three ribosomal rows are rotated: the code's 40S subunit has the 97 targets that the
# table gives the mitochondrial one, and so on round.
TABLE_9: Mapping[str, str] = {
    "exosome": "Exosome and mRNA turnover",
    "spliceosome": "Spliceosome",
    "mediator_complex": "Mediator",
    "nucleotide_excision_repair": "TFIIH / nucleotide excision repair",
    "s40_ribosomal_unit": "39S ribosomal subunit, mitochondrial",
    "s39_ribosomal_unit": "60S ribosomal subunit, cytoplasmic",
    "s60_ribosomal_unit": "40S ribosomal subunit, cytoplasmic",
    "mt_protein_translocation": "Mitochondrial protein translocation",
}


@dataclass(frozen=True)
class GeneLists:
    """The lists by which the sVAE+ paper cut and split the genome-wide screen.

    Every list has each symbol once, in the order of the original.

    Parameters
    ----------
    targets : tuple of str
        Perturbations that are kept: 681.
    genes : tuple of str
        Symbols of the genes that are kept: 1,186. The matrix has 1,187 such columns, as one symbol
        names two.
    pathways : mapping of str to tuple of str
        The eight groups of targets that are held out in turn, under the names of the authors'
        code in small letters. ``TABLE_9`` has the paper's names of them.
    clusters, programs : mapping of str to tuple of str
        The 60 clusters that the targets, and the 38 programs that the genes, are listed in.
    repeated : tuple of str
        Targets that the original lists twice, so that its 683 entries are 681 targets.
    """

    targets: tuple[str, ...]
    genes: tuple[str, ...]
    pathways: Mapping[str, tuple[str, ...]]
    clusters: Mapping[str, tuple[str, ...]]
    programs: Mapping[str, tuple[str, ...]]
    repeated: tuple[str, ...]


def gene_lists(*, directory: str | os.PathLike[str] | None = None) -> GeneLists:
    """Return the paper's lists of perturbations, genes and held-out pathways.

    They are read from ``replogle2022_gene_lists.tsv`` in the data directory; if it is not there it
    is made from the notebook of the paper's authors, whose cells are parsed, not run.

    Parameters
    ----------
    directory : path, optional
        As in `fetch`.

    Returns
    -------
    GeneLists

    Raises
    ------
    ValueError, ConnectionError, OSError
        As in `fetch`; ValueError also if the notebook does not hold the lists.
    """
    path = fetch("replogle2022-gene-lists", directory=directory)
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    entries = [symbol for kind, _, symbol in rows if kind == "perturbation_cluster"]
    targets = tuple(dict.fromkeys(entries))
    return GeneLists(
        targets=targets,
        genes=tuple(dict.fromkeys(symbol for kind, _, symbol in rows if kind == "gene_program")),
        pathways=_grouped(rows, "pathway"),
        clusters=_grouped(rows, "perturbation_cluster"),
        programs=_grouped(rows, "gene_program"),
        repeated=tuple(target for target in targets if entries.count(target) > 1),
    )


def _grouped(rows: Iterable[list[str]], kind: str) -> dict[str, tuple[str, ...]]:
    groups: dict[str, dict[str, None]] = {}
    for what, name, symbol in rows:
        if what == kind:
            groups.setdefault(name, {})[symbol] = None
    return {name: tuple(symbols) for name, symbols in groups.items()}


def _gene_list_table(notebook: bytes) -> bytes:
    """Return the table (list, name, symbol) of the lists typed into a notebook.

    Its ``string`` and ``string_genes`` hold one group per line, symbols between commas; each
    pathway is a list of symbols under its name in capitals.

    Raises
    ------
    ValueError
        If it is no notebook, or does not assign these names.
    """
    assigned = _assigned(notebook)
    missing = {"string", "string_genes", *map(str.upper, TABLE_9)} - assigned.keys()
    if missing:
        raise ValueError(f"the notebook assigns no literal to {sorted(missing)}; expected lists")
    unfit = [name for name in ("string", "string_genes") if not isinstance(assigned[name], str)]
    unfit += [name for name in map(str.upper, TABLE_9) if not _is_symbols(assigned[name])]
    if unfit:
        raise ValueError(f"the notebook assigns to {unfit} what is no list of gene symbols")
    rows = [
        *_numbered(assigned["string"], "perturbation_cluster", "cluster"),
        *_numbered(assigned["string_genes"], "gene_program", "program"),
        *(("pathway", name, gene) for name in TABLE_9 for gene in assigned[name.upper()]),
    ]
    return "".join("\t".join(row) + "\n" for row in [("list", "name", "symbol"), *rows]).encode()


def _is_symbols(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)


def _numbered(text: str, kind: str, prefix: str) -> Iterator[tuple[str, str, str]]:
    for number, line in enumerate(text.strip().splitlines(), start=1):
        for symbol in line.split(","):
            yield kind, f"{prefix}_{number:02d}", symbol


def _assigned(notebook: bytes) -> dict[str, Any]:
    """Return the literals that the cells of a notebook assign to names; nothing is run."""
    try:
        cells = json.loads(notebook)["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"expected a Jupyter notebook, found {notebook[:40]!r}...") from error
    return {name: value for text in code for name, value in _literals(text)}


def _literals(code: str) -> Iterator[tuple[str, Any]]:
    """Yield names and values of the assignments that are plain literals."""
    try:
        statements = ast.parse(code).body
    except (SyntaxError, *_NOT_TYPED_IN):  # a cell of magics, or nothing that a person typed
        return
    for statement in statements:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            try:
                value = ast.literal_eval(statement.value)
            except (TypeError, *_NOT_TYPED_IN):  # computed
                continue
            yield statement.targets[0].id, value


_DERIVED: Mapping[str, Callable[[bytes], bytes]] = {"gene_lists": _gene_list_table}
