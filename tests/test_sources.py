"""Registry, downloads against a real server on the loopback interface, and the gene lists."""

import errno
import hashlib
import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smslib import sources

CONTENT = bytes(range(251)) * 4000  # about a megabyte, so that one download is several reads
OTHER = CONTENT[:-1] + b"?"
SHA256, MD5 = hashlib.sha256(CONTENT).hexdigest(), hashlib.md5(CONTENT).hexdigest()


def toy(url: str, **changes) -> sources.Source:
    source = sources.Source(
        "toy", url, "toy.bin", len(CONTENT), SHA256, "CC0", "nobody", "a toy", "table"
    )
    return replace(source, **changes)


def use(monkeypatch, source: sources.Source) -> None:
    monkeypatch.setattr(sources, "SOURCES", {source.name: source})


class Answers(http.server.BaseHTTPRequestHandler):
    """Serves one file well or badly, by path; keeps what it was asked for."""

    protocol_version = "HTTP/1.1"
    asked: list[tuple[str, str | None]]

    def do_GET(self):
        verb = self.path.split("/")[1]
        self.asked.append((verb, self.headers["Range"]))
        self.close_connection = True
        getattr(self, verb)()

    def send(self, body, *, status=200, announced=None, first=0, total=None):
        self.send_response(status)
        if status == 206:
            given = f"bytes {first}-{first + len(body) - 1}/{total or len(CONTENT)}"
            self.send_header("Content-Range", given)
        if announced != "nothing":
            self.send_header("Content-Length", str(announced or len(body)))
        self.end_headers()
        self.wfile.write(body)

    def first(self):
        found = re.fullmatch(r"bytes=(\d+)-\d*", self.headers["Range"] or "")
        return int(found[1]) if found else 0

    def ranged(self, body, *, upto=None, **options):
        """Answer with what is asked for, and drop the connection after ``upto`` bytes."""
        first = self.first()
        status = 206 if self.headers["Range"] else 200
        options = {"announced": len(body) - first, "first": first, "status": status, **options}
        self.send(body[first:][:upto], **options)

    def good(self):
        self.ranged(CONTENT)

    def whole(self):  # knows no ranges
        self.send(CONTENT)

    def cut(self):
        self.ranged(CONTENT, upto=300_000)

    def unannounced(self):
        self.ranged(CONTENT, upto=300_000, announced="nothing")

    def reset(self):
        linger = b"\1\0\0\0\0\0\0\0"  # on, for no time: closing sends a reset, not an end
        self.ranged(CONTENT, upto=300_000)
        self.wfile.flush()
        time.sleep(0.05)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    def dead(self):
        self.send(b"", announced=len(CONTENT))

    def slow(self):
        first = self.first()
        self.send_response(206 if self.headers["Range"] else 200)
        self.send_header("Content-Length", str(len(CONTENT) - first))
        last = len(CONTENT) - 1
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(CONTENT)}")
        self.end_headers()
        while first < len(CONTENT):
            try:
                self.wfile.write(CONTENT[first:][:50_000])
            except OSError:  # the client was killed
                return
            first += 50_000
            time.sleep(0.03)

    def wrong(self):
        self.ranged(OTHER)

    def short(self):
        self.ranged(CONTENT[:-7], total=len(CONTENT) - 7)

    def long(self):
        self.send(CONTENT + b"more", announced="nothing")

    def elsewhere(self):  # a range that was not asked for
        self.send(CONTENT[5:], status=206, first=5)

    def challenge(self):
        self.send(b"", status=202, announced="0")

    def status(self):
        self.send_error(int(self.path.split("/")[2]))

    def busy(self):
        if len(self.asked) < 3:
            self.send_error(503)
        else:
            self.good()

    def redirect(self):
        self.forward("/good/toy.bin")

    def away(self):
        self.forward("http://example.org/toy.bin")

    def local(self):
        self.forward("file:///etc/hostname")

    def forward(self, to):
        self.send_response(302)
        self.send_header("Location", to if ":" in to else f"{self.server.base}{to}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        """Stay silent."""


@pytest.fixture
def server(monkeypatch):
    """Let the toy source live at a path of a loopback server; http is allowed here only."""
    handler = type("Recording", (Answers,), {"asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.base = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    check = sources._check_address

    def loopback_too(url: str) -> None:
        if not url.startswith(server.base):
            check(url)

    monkeypatch.setattr(sources, "_check_address", loopback_too)
    monkeypatch.setattr(sources, "_PAUSE", 0.001)
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def at(path: str, **changes) -> None:
        use(monkeypatch, toy(f"{server.base}/{path}/toy.bin", **changes))

    yield SimpleNamespace(at=at, asked=handler.asked, base=server.base)
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def origin(tmp_path, monkeypatch):
    """A source whose address is a good local file; returns that file."""
    path = tmp_path / "origin.bin"
    path.write_bytes(CONTENT)
    use(monkeypatch, toy(path.as_uri()))
    return path


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------------------------- registry


def test_every_source_is_complete():
    from smslib import perturbseq

    for name, source in sources.SOURCES.items():
        kind, expected = source.checksum
        assert source.name == name
        assert len(bytes.fromhex(expected)) == hashlib.new(kind).digest_size
        assert source.reader in perturbseq._READERS
        assert source.recipe in {"", "replogle", "norman"}
        assert not source.derive or source.derive in sources._DERIVED
        assert all((source.licence, source.citation, source.description, source.bytes))
        assert source.url.startswith("https://")
    files = [source.filename for source in sources.SOURCES.values()]
    assert len(files) == len(set(files))


@pytest.mark.parametrize(
    ("name", "n_bytes", "host"),
    [
        ("replogle2022-k562-gwps", 65_830_941_948, "ndownloader.figshare.com/files/35775507"),
        ("replogle2022-k562-gwps-scperturb", 8_805_466_154, "zenodo.org/records/13350497/"),
        ("replogle2022-k562-essential", 10_661_879_995, "ndownloader.figshare.com"),
        ("replogle2022-k562-essential-scperturb", 1_546_729_675, "zenodo.org"),
        ("replogle2022-rpe1", 8_700_873_216, "ndownloader.figshare.com"),
        ("replogle2022-rpe1-scperturb", 1_236_886_900, "zenodo.org"),
        ("norman2019", 698_680_199, "NormanWeissman2019_filtered.h5ad?download=1"),
        ("papalexi2021-full", 147_215_278, "PapalexiSatija2021_eccite_RNA.h5ad?download=1"),
        ("adamson2016-pilot", 34_557_246, "AdamsonWeissman2016_GSM2406675_10X001.h5ad"),
        ("adamson2016-epistasis", 139_059_637, "AdamsonWeissman2016_GSM2406677_10X005.h5ad"),
        ("adamson2016-upr", 471_286_951, "AdamsonWeissman2016_GSM2406681_10X010.h5ad"),
    ],
)
def test_the_public_screens_are_where_their_hosts_have_them(name, n_bytes, host):
    source = sources.find(name)
    assert source.bytes == n_bytes
    assert host in source.url


def test_an_unknown_source_names_the_nearest():
    with pytest.raises(KeyError, match=r"unknown source 'papalexi'; nearest .*'papalexi2021'"):
        sources.fetch("papalexi")


def test_the_data_directory_is_the_one_named_else_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SMS_DATA_DIR", str(tmp_path))
    assert sources.data_dir() == tmp_path
    monkeypatch.setenv("SMS_DATA_DIR", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("LOCALAPPDATA", "")
    folders = {
        "linux": tmp_path / ".cache" / "smslib",
        "darwin": tmp_path / "Library" / "Caches" / "smslib",
        "win32": tmp_path / "AppData" / "Local" / "smslib",
    }
    for platform, folder in folders.items():
        monkeypatch.setattr(sys, "platform", platform)
        assert sources.data_dir() == folder


def test_the_cache_moves_with_its_variable(monkeypatch, tmp_path):
    monkeypatch.delenv("SMS_DATA_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert sources.data_dir() == tmp_path / "smslib"


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(7, "7 bytes"), (1000, "1.0 kB"), (1_358_267, "1.4 MB"), (65_830_941_948, "65.8 GB")],
)
def test_sizes_are_said_as_people_say_them(n_bytes, text):
    assert sources.size_text(n_bytes) == text


def test_the_state_of_a_file_is_seen_without_reading_it(origin, tmp_path):
    assert sources.state("toy", directory=tmp_path) == "absent"
    (tmp_path / "toy.bin.part").write_bytes(CONTENT[: len(CONTENT) // 4])
    assert sources.state("toy", directory=tmp_path) == "partial (25%)"
    (tmp_path / "toy.bin").write_bytes(CONTENT[:-1])
    assert sources.state("toy", directory=tmp_path) == "wrong size"
    (tmp_path / "toy.bin").write_bytes(OTHER)
    assert sources.state("toy", directory=tmp_path) == "present"


# -------------------------------------------------------------------------------- local files


def test_fetch_downloads_once_and_leaves_nothing_else(origin, tmp_path):
    cache = tmp_path / "new" / "cache"
    path = sources.fetch("toy", directory=cache)
    assert path.read_bytes() == CONTENT
    origin.unlink()
    assert sources.fetch("toy", directory=cache) == path
    assert names(cache) == ["toy.bin"]


def test_fetch_uses_the_data_directory(origin, tmp_path, monkeypatch):
    monkeypatch.setenv("SMS_DATA_DIR", str(tmp_path / "chosen"))
    assert sources.fetch("toy") == tmp_path / "chosen" / "toy.bin"


def test_an_md5_will_do_where_a_host_gives_no_more(origin, tmp_path, monkeypatch):
    use(monkeypatch, toy(origin.as_uri(), sha256="", md5=MD5))
    assert sources.fetch("toy", directory=tmp_path).read_bytes() == CONTENT
    (tmp_path / "toy.bin").write_bytes(OTHER)
    wrong = hashlib.md5(OTHER).hexdigest()
    with pytest.raises(ValueError, match=f"has md5 {wrong}.*expected {MD5}"):
        sources.fetch("toy", directory=tmp_path)


@given(position=st.integers(0, len(CONTENT) - 1), bit=st.integers(0, 7))
@settings(max_examples=20)
def test_one_flipped_bit_is_refused(tmp_path_factory, position, bit):
    folder = tmp_path_factory.mktemp("flipped")
    spoilt = bytearray(CONTENT)
    spoilt[position] ^= 1 << bit
    (folder / "toy.bin").write_bytes(spoilt)
    with pytest.MonkeyPatch.context() as patch:
        use(patch, toy(""))
        assert not sources.available("toy", directory=folder)
        with pytest.raises(ValueError, match=SHA256):
            sources.fetch("toy", directory=folder)
    assert (folder / "toy.bin.bad").read_bytes() == spoilt


@given(length=st.integers(0, 3 * len(CONTENT)).filter(lambda n: n != len(CONTENT)))
@settings(max_examples=10)
def test_a_file_of_another_length_is_refused_unread(tmp_path_factory, length):
    folder = tmp_path_factory.mktemp("lengths")
    (folder / "toy.bin").write_bytes((CONTENT * 3)[:length])
    with pytest.MonkeyPatch.context() as patch:
        use(patch, toy(""))
        with pytest.raises(ValueError, match=f"has {length:,} bytes.*expected {len(CONTENT):,}"):
            sources.fetch("toy", directory=folder)


def refuse(*_args, **_options):
    raise PermissionError(13, "Permission denied")


def test_a_read_only_directory_with_the_good_file_works(origin, tmp_path, monkeypatch):
    (tmp_path / "toy.bin").write_bytes(CONTENT)
    for writer in ("os.replace", "os.mkdir", "tempfile.TemporaryFile"):
        monkeypatch.setattr(writer, refuse)
    assert sources.fetch("toy", directory=tmp_path) == tmp_path / "toy.bin"


def test_a_read_only_directory_without_it_asks_for_another(origin, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    message = r"toy\.bin is not in .*cannot be written to \(Permission denied\); set SMS_DATA_DIR"
    with pytest.raises(ConnectionError, match=message):
        sources.fetch("toy", directory=tmp_path)


def test_a_bad_file_that_cannot_be_moved_is_named(origin, tmp_path, monkeypatch):
    (tmp_path / "toy.bin").write_bytes(b"bad")
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(ValueError, match=r"could not be set aside \(Permission.*remove .*toy\.bi"):
        sources.fetch("toy", directory=tmp_path)


def test_a_large_file_is_hashed_once_and_again_when_it_changes(origin, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_LARGE", 1000)
    path = sources.fetch("toy", directory=tmp_path / "cache")
    hashed = []
    digest = sources._digest
    monkeypatch.setattr(sources, "_digest", lambda *a: hashed.append(1) or digest(*a))
    sources.fetch("toy", directory=tmp_path / "cache")
    assert sources.available("toy", directory=tmp_path / "cache")
    assert hashed == []
    path.write_bytes(OTHER)
    with pytest.raises(ValueError, match=SHA256):
        sources.fetch("toy", directory=tmp_path / "cache")
    assert hashed == [1]


def test_a_large_file_in_a_read_only_folder_is_hashed_each_time(origin, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_LARGE", 1000)
    monkeypatch.setattr("pathlib.Path.write_text", refuse)
    (tmp_path / "toy.bin").write_bytes(CONTENT)
    assert sources.fetch("toy", directory=tmp_path).read_bytes() == CONTENT


def test_available_knows_disk_network_and_nonsense(origin, tmp_path):
    cache = tmp_path / "cache"
    assert sources.available("toy", directory=cache)
    assert not cache.exists()
    sources.fetch("toy", directory=cache)
    origin.unlink()
    assert sources.available("toy", directory=cache)
    assert not sources.available("toy", directory=tmp_path)
    assert not sources.available("nonsense")


# ------------------------------------------------------------------------------------ downloads


def test_a_good_server_is_asked_once(server, tmp_path):
    server.at("good")
    assert sources.fetch("toy", directory=tmp_path).read_bytes() == CONTENT
    assert server.asked == [("good", None)]
    assert names(tmp_path) == ["toy.bin"]


@pytest.mark.parametrize("fault", ["cut", "unannounced", "reset"])
def test_a_cut_connection_goes_on_where_it_was_cut(server, tmp_path, fault):
    server.at(fault)
    assert sources.fetch("toy", directory=tmp_path).read_bytes() == CONTENT
    starts = [int(asked.removeprefix("bytes=").rstrip("-")) for _, asked in server.asked[1:]]
    assert starts == sorted(set(starts))
    if fault != "reset":  # a reset may lose what was under way
        assert starts == [300_000, 600_000, 900_000]
    assert names(tmp_path) == ["toy.bin"]


def test_a_part_from_before_is_continued(server, tmp_path):
    server.at("good")
    (tmp_path / "toy.bin.part").write_bytes(CONTENT[:123_456])
    assert sources.fetch("toy", directory=tmp_path).read_bytes() == CONTENT
    assert server.asked == [("good", "bytes=123456-")]


def test_a_complete_part_is_not_downloaded_again(server, tmp_path):
    server.at("status/500")
    (tmp_path / "toy.bin.part").write_bytes(CONTENT)
    assert sources.fetch("toy", directory=tmp_path).read_bytes() == CONTENT
    assert server.asked == []


@pytest.mark.parametrize("part", [b"x" * 1000, OTHER, CONTENT + b"more"])
def test_a_part_of_something_else_is_dropped(server, tmp_path, part):
    server.at("good")
    (tmp_path / "toy.bin.part").write_bytes(part)
    assert sources.fetch("toy", directory=tmp_path).read_bytes() == CONTENT
    assert names(tmp_path) == ["toy.bin"]


def test_a_server_without_ranges_starts_over(server, tmp_path):
    server.at("whole")
    (tmp_path / "toy.bin.part").write_bytes(b"x" * 1000)
    assert sources.fetch("toy", directory=tmp_path).read_bytes() == CONTENT
    assert server.asked == [("whole", "bytes=1000-")]


def test_a_busy_server_is_asked_again_after_growing_pauses(server, tmp_path, monkeypatch):
    server.at("busy")
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    monkeypatch.setattr(sources, "_PAUSE", 1.0)
    assert sources.fetch("toy", directory=tmp_path).read_bytes() == CONTENT
    assert pauses == [1.0, 2.0]


@pytest.mark.parametrize(
    ("answer", "reason", "asked"),
    [
        ("status/403", "HTTP Error 403", 1),
        ("status/404", "HTTP Error 404", 1),
        ("status/500", "HTTP Error 500", 5),
        ("dead", "closed after 0 bytes", 5),
        ("challenge", "HTTP 202 instead of the file", 1),
        ("short", f"has {len(CONTENT) - 7:,} bytes, expected {len(CONTENT):,}", 1),
        ("long", f"sends more than {len(CONTENT):,} bytes", 1),
        ("away", r"http://example.org/toy.bin is not one of", 1),
        ("local", r"file:///etc/hostname' is not allowed", 1),
    ],
)
def test_a_failed_download_says_which_file_to_put_where(server, tmp_path, answer, reason, asked):
    server.at(answer)
    where = rf"Put the file toy\.bin \({len(CONTENT):,} bytes, sha256 {SHA256}\) into {tmp_path}"
    with pytest.raises(ConnectionError, match=f"{reason}.*{where}"):
        sources.fetch("toy", directory=tmp_path)
    assert len(server.asked) == asked
    assert names(tmp_path) == []


@pytest.mark.parametrize("answer", ["short", "elsewhere"])
def test_a_part_survives_an_answer_that_does_not_fit(server, tmp_path, answer):
    server.at(answer)
    (tmp_path / "toy.bin.part").write_bytes(CONTENT[:1000])
    reason = {"short": "another file", "elsewhere": "asked for bytes 1000-, the server answered"}
    with pytest.raises(ConnectionError, match=reason[answer]):
        sources.fetch("toy", directory=tmp_path)
    assert (tmp_path / "toy.bin.part").read_bytes() == CONTENT[:1000]


def test_what_arrived_before_the_network_died_is_kept(server, tmp_path):
    server.at("status/503")
    (tmp_path / "toy.bin.part").write_bytes(CONTENT[:1000])
    with pytest.raises(ConnectionError, match=r"503.*is kept in toy\.bin\.part: fetch again"):
        sources.fetch("toy", directory=tmp_path)
    server.at("good")
    assert sources.fetch("toy", directory=tmp_path).read_bytes() == CONTENT
    assert server.asked[-1] == ("good", "bytes=1000-")


def test_a_wrong_download_is_kept_aside_with_both_sums(server, tmp_path):
    server.at("wrong")
    both = rf"sha256 {hashlib.sha256(OTHER).hexdigest()}.*expected {SHA256}.*toy\.bin\.bad"
    with pytest.raises(ValueError, match=both):
        sources.fetch("toy", directory=tmp_path)
    assert names(tmp_path) == ["toy.bin.bad"]
    assert (tmp_path / "toy.bin.bad").read_bytes() == OTHER
    server.at("good")
    assert sources.fetch("toy", directory=tmp_path).read_bytes() == CONTENT


def test_a_redirect_is_followed_with_its_range(server, tmp_path):
    server.at("redirect")
    (tmp_path / "toy.bin.part").write_bytes(CONTENT[:1000])
    assert sources.fetch("toy", directory=tmp_path).read_bytes() == CONTENT
    assert server.asked == [("redirect", "bytes=1000-"), ("good", "bytes=1000-")]


def test_plain_http_is_refused_before_it_is_asked(monkeypatch, tmp_path):
    use(monkeypatch, toy("http://example.org/toy.bin"))
    monkeypatch.setattr(socket, "create_connection", refuse)
    with pytest.raises(ConnectionError, match=r"http://example.org/toy.bin is not one of"):
        sources.fetch("toy", directory=tmp_path)


def test_no_network_says_so_at_once(monkeypatch, tmp_path):
    tried = []

    def unreachable(*_args, **_options):
        tried.append(1)
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    monkeypatch.setenv("no_proxy", "*")
    message = rf"name resolution.*Put the file lowmoi_example_data\.rda .* into {tmp_path}; it com"
    with pytest.raises(ConnectionError, match=message):
        sources.fetch("papalexi2021", directory=tmp_path)
    assert tried == [1]
    assert not sources.available("papalexi2021", directory=tmp_path)


def test_a_source_without_public_address_says_so(monkeypatch, tmp_path):
    use(monkeypatch, toy(""))
    with pytest.raises(ConnectionError, match=r"no public address.*it comes from nobody"):
        sources.fetch("toy", directory=tmp_path)


def test_available_asks_for_one_byte(server, tmp_path):
    server.at("good")
    assert sources.available("toy", directory=tmp_path)
    assert server.asked == [("good", "bytes=0-0")]
    server.at("status/404")
    assert not sources.available("toy", directory=tmp_path)
    server.at("status/503")
    assert not sources.available("toy", directory=tmp_path)


def test_a_terminal_sees_progress_and_a_log_does_not(server, tmp_path, monkeypatch, capsys):
    server.at("good")
    sources.fetch("toy", directory=tmp_path / "log")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    sources.fetch("toy", directory=tmp_path / "terminal")
    assert "toy.bin: 100%" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ disk


def test_a_full_disk_is_noticed_before_the_first_byte(server, tmp_path, monkeypatch):
    server.at("good")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=12_000))
    message = rf"toy\.bin: 1\.0 MB needed, 12\.0 kB free in {tmp_path}\. .*SMS_DATA_DIR"
    with pytest.raises(OSError, match=message) as caught:
        sources.fetch("toy", directory=tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert server.asked == []
    assert names(tmp_path) == []


def test_only_what_is_missing_needs_room(server, tmp_path, monkeypatch):
    server.at("good")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=12_000))
    (tmp_path / "toy.bin.part").write_bytes(CONTENT[:-12_000])
    assert sources.fetch("toy", directory=tmp_path).read_bytes() == CONTENT


class Full:
    """A file on a disk that takes 100,000 more bytes."""

    def __init__(self, file):
        self.file, self.room = file, 100_000

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self.file.write(data[: self.room])
        self.room -= written
        return written


def test_a_disk_that_fills_up_keeps_what_arrived(server, tmp_path, monkeypatch):
    server.at("good")
    fill = sources._fill
    monkeypatch.setattr(sources, "_fill", lambda file, *rest: fill(Full(file), *rest))
    with pytest.raises(OSError, match="not enough room.*the 100.0 kB that arrived are kept"):
        sources.fetch("toy", directory=tmp_path)
    assert (tmp_path / "toy.bin.part").read_bytes() == CONTENT[:100_000]
    monkeypatch.setattr(sources, "_fill", fill)
    assert sources.fetch("toy", directory=tmp_path).read_bytes() == CONTENT
    assert server.asked[-1] == ("good", "bytes=100000-")


def test_another_write_error_is_not_called_a_full_disk(server, tmp_path, monkeypatch):
    class Broken(Full):
        def write(self, data):
            raise OSError(errno.EIO, "Input/output error")

    server.at("good")
    fill = sources._fill
    monkeypatch.setattr(sources, "_fill", lambda file, *rest: fill(Broken(file), *rest))
    with pytest.raises(OSError, match="Input/output error"):
        sources.fetch("toy", directory=tmp_path)


# ----------------------------------------------------------------- interruptions, two at a time


def test_an_interrupt_leaves_a_part_to_resume_from(server, tmp_path, monkeypatch):
    server.at("good")
    read, reads = sources._read, []

    def interrupted(response):
        reads.append(1)
        if len(reads) == 3:
            raise KeyboardInterrupt
        return read(response)

    monkeypatch.setattr(sources, "_read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sources.fetch("toy", directory=tmp_path)
    have = (tmp_path / "toy.bin.part").stat().st_size
    assert (tmp_path / "toy.bin.part").read_bytes() == CONTENT[:have]
    assert 0 < have < len(CONTENT)
    assert sources.fetch("toy", directory=tmp_path).read_bytes() == CONTENT
    assert server.asked[-1] == ("good", f"bytes={have}-")


CHILD = """
    import sys
    from smslib import sources
    url, folder, size, sha256 = sys.argv[1:]
    sources._SCHEMES = ("http",)
    source = sources.Source("toy", url, "toy.bin", int(size), sha256, "-", "-", "-", "table")
    sources.SOURCES = {"toy": source}
    print("begins", flush=True)
    print(sources.fetch("toy", directory=folder), flush=True)
"""


def child(server, folder, path="slow") -> subprocess.Popen:
    url = f"{server.base}/{path}/toy.bin"
    code = textwrap.dedent(CHILD)
    arguments = [sys.executable, "-c", code, url, str(folder), str(len(CONTENT)), SHA256]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)


def wait_until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_a_killed_process_leaves_a_part_to_resume_from(server, tmp_path):
    part = tmp_path / "toy.bin.part"
    with child(server, tmp_path) as process:
        wait_until(lambda: part.exists() and part.stat().st_size > 100_000)
        process.send_signal(signal.SIGKILL)
    have = part.stat().st_size
    assert part.read_bytes() == CONTENT[:have]
    assert have < len(CONTENT)
    server.at("good")
    assert sources.fetch("toy", directory=tmp_path).read_bytes() == CONTENT
    assert server.asked[-1] == ("good", f"bytes={have}-")


def test_two_processes_take_turns_and_one_downloads(server, tmp_path):
    server.at("good")
    part = tmp_path / "toy.bin.part"
    with child(server, tmp_path) as process:
        wait_until(lambda: part.exists() and part.stat().st_size > 0)
        assert sources.fetch("toy", directory=tmp_path).read_bytes() == CONTENT
        assert process.wait(30) == 0
    assert [verb for verb, _ in server.asked] == ["slow"]
    assert names(tmp_path) == ["toy.bin"]


def test_a_waiting_process_takes_over_from_a_killed_one(server, tmp_path, monkeypatch):
    server.at("good")
    part, killed, asked_after = tmp_path / "toy.bin.part", threading.Event(), []
    attempt = sources._attempt

    def watched(*arguments):
        asked_after.append(killed.is_set())
        return attempt(*arguments)

    def kill():
        killed.set()
        process.kill()

    monkeypatch.setattr(sources, "_attempt", watched)
    with child(server, tmp_path) as process:
        wait_until(lambda: part.exists() and part.stat().st_size > 0)
        threading.Timer(0.2, kill).start()
        assert sources.fetch("toy", directory=tmp_path).read_bytes() == CONTENT
    assert asked_after == [True]


def test_without_locks_a_download_still_works(server, tmp_path, monkeypatch):
    server.at("good")
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    assert sources.fetch("toy", directory=tmp_path).read_bytes() == CONTENT
    assert names(tmp_path) == ["toy.bin"]


# ------------------------------------------------------------------------------------ gene lists

PATHWAYS = {name: [f"{name[:3]}{i}" for i in range(3)] for name in sources.TABLE_9}


def notebook(**changes) -> bytes:
    """A small notebook in the manner of the authors', with magics, prose and computed names."""
    values = {
        "string": "AAA,BBB\nBBB,CCC",
        "string_genes": "G1,G2\nG3",
        **{name.upper(): genes for name, genes in PATHWAYS.items()},
        **changes,
    }
    cells = [
        {"cell_type": "markdown", "source": ["string = 'no code'"]},
        {"cell_type": "code", "source": ["%load_ext autoreload\n", "%autoreload 2"]},
        {"cell_type": "code", "source": ["open('run.txt', 'w')\n", "x, y = 1, 2"]},
        *(
            {"cell_type": "code", "source": f"# a note\n{name} = {value!r}".splitlines(True)}
            for name, value in values.items()
            if value is not None
        ),
        {"cell_type": "code", "source": ["both = string.split(',')\n", "string_genes[0]"]},
        {"cell_type": "code", "source": ["unhashable = {[1]: 2}"]},
    ]
    return json.dumps({"cells": cells, "nbformat": 4}).encode()


TABLE = "list\tname\tsymbol\n" + "".join(
    "\t".join(row) + "\n"
    for row in [
        ("perturbation_cluster", "cluster_01", "AAA"),
        ("perturbation_cluster", "cluster_01", "BBB"),
        ("perturbation_cluster", "cluster_02", "BBB"),
        ("perturbation_cluster", "cluster_02", "CCC"),
        ("gene_program", "program_01", "G1"),
        ("gene_program", "program_01", "G2"),
        ("gene_program", "program_02", "G3"),
        *(("pathway", name, gene) for name, genes in PATHWAYS.items() for gene in genes),
    ]
)


@pytest.fixture
def lists(monkeypatch, tmp_path):
    """The lists' source, in small: made from a notebook at a local address."""
    path = tmp_path / "origin" / "lists.ipynb"
    path.parent.mkdir()
    path.write_bytes(notebook())
    real = sources.SOURCES["replogle2022-gene-lists"]
    sha256 = hashlib.sha256(TABLE.encode()).hexdigest()
    small = replace(real, url=path.as_uri(), bytes=len(TABLE), sha256=sha256)
    use(monkeypatch, small)
    return path


def test_the_lists_are_read_out_of_a_notebook_that_is_not_run(lists, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = sources.gene_lists(directory=tmp_path / "cache")
    assert found.targets == ("AAA", "BBB", "CCC")
    assert found.repeated == ("BBB",)
    assert found.genes == ("G1", "G2", "G3")
    assert found.clusters == {"cluster_01": ("AAA", "BBB"), "cluster_02": ("BBB", "CCC")}
    assert found.programs == {"program_01": ("G1", "G2"), "program_02": ("G3",)}
    assert found.pathways == {name: tuple(genes) for name, genes in PATHWAYS.items()}
    assert not (tmp_path / "run.txt").exists()
    assert names(tmp_path / "cache") == ["replogle2022_gene_lists.tsv"]
    assert next((tmp_path / "cache").iterdir()).read_text() == TABLE


def test_a_table_that_is_there_needs_no_network(lists, tmp_path):
    lists.unlink()
    (tmp_path / "replogle2022_gene_lists.tsv").write_text(TABLE)
    assert sources.gene_lists(directory=tmp_path).genes == ("G1", "G2", "G3")


def test_a_notebook_that_is_there_needs_no_network(lists, tmp_path):
    shutil.move(lists, tmp_path / "lists.ipynb")
    assert sources.gene_lists(directory=tmp_path).genes == ("G1", "G2", "G3")


def test_lists_out_of_reach_say_what_may_be_put_there(lists, tmp_path):
    lists.unlink()
    with pytest.raises(ConnectionError, match=r"is made from .*lists\.ipynb, which may be put"):
        sources.gene_lists(directory=tmp_path)


def test_other_lists_than_the_published_are_refused(lists, tmp_path):
    lists.write_bytes(notebook(string="AAA,BBB\nBBB,CCX"))
    with pytest.raises(ValueError, match=r"made from .*lists\.ipynb, .*has sha256"):
        sources.gene_lists(directory=tmp_path)
    assert names(tmp_path) == ["origin", "replogle2022_gene_lists.tsv.bad"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (notebook(string=None, EXOSOME=None), r"no literal to \['EXOSOME', 'string'\]"),
        (b"<html>a login page", r"expected a Jupyter notebook, found b'<html>a login page'"),
        (b"[]", r"expected a Jupyter notebook"),
    ],
)
def test_a_notebook_without_the_lists_is_refused(lists, tmp_path, content, message):
    lists.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        sources.gene_lists(directory=tmp_path)


def test_a_small_file_is_asked_for_until_it_comes(lists, server, tmp_path, monkeypatch):
    monkeypatch.setattr(Answers, "good", lambda self: self.send(notebook()))
    source = next(iter(sources.SOURCES.values()))
    for path in ("busy", "status/500"):
        use(monkeypatch, replace(source, url=f"{server.base}/{path}/lists.ipynb"))
        server.asked.clear()
        if path == "busy":
            assert sources.gene_lists(directory=tmp_path / path).genes == ("G1", "G2", "G3")
            assert len(server.asked) == 3
        else:
            with pytest.raises(ConnectionError, match="500"):
                sources.gene_lists(directory=tmp_path / path)
            assert len(server.asked) == 5


REAL = sources.data_dir() / "replogle2022_gene_lists.tsv"


@pytest.mark.skipif(not REAL.exists(), reason=f"{REAL.name} is not in {REAL.parent}")
def test_the_lists_have_the_published_sizes():
    found = sources.gene_lists()
    clusters, programs = found.clusters, found.programs
    assert len(found.targets) == len(set(found.targets)) == 681
    assert set(found.repeated) == {"CCNK", "LSM5"}  # 683 entries
    assert (len(clusters), len(programs), len(found.genes)) == (60, 38, 1186)
    assert {name: len(genes) for name, genes in found.pathways.items()} == {
        "exosome": 20,
        "spliceosome": 34,  # 35 entries, LSM5 twice
        "mediator_complex": 26,
        "nucleotide_excision_repair": 23,
        "s40_ribosomal_unit": 97,
        "s39_ribosomal_unit": 43,
        "s60_ribosomal_unit": 53,
        "mt_protein_translocation": 40,
    }
    union = {gene for genes in found.pathways.values() for gene in genes}
    assert union < set(found.targets)
    assert len(union) == 336
    assert found.pathways.keys() == sources.TABLE_9.keys()
    assert "RPS3" in found.pathways["s40_ribosomal_unit"]
    assert "39S" in sources.TABLE_9["s40_ribosomal_unit"]


@pytest.mark.skipif(not REAL.exists(), reason=f"{REAL.name} is not in {REAL.parent}")
def test_a_notebook_of_the_real_lists_gives_the_real_table(monkeypatch, tmp_path):
    rows = [line.split("\t") for line in REAL.read_text().splitlines()[1:]]

    def text(kind):
        groups = {}
        for what, name, symbol in rows:
            if what == kind:
                groups.setdefault(name, []).append(symbol)
        return groups

    lines = {
        name: "\n".join(map(",".join, text(kind).values()))
        for name, kind in [("string", "perturbation_cluster"), ("string_genes", "gene_program")]
    }
    capitals = {name.upper(): genes for name, genes in text("pathway").items()}
    made = sources._gene_list_table(notebook(**lines, **capitals))
    assert hashlib.sha256(made).hexdigest() == (sources.SOURCES["replogle2022-gene-lists"].sha256)
