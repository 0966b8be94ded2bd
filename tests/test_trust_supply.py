"""What the project carries along: no secret, no path of the machine it was made on, no licence
that forbids what ours allows.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torture import supply

ROOT = Path(__file__).resolve().parents[1]
LARGEST = 6_000_000
# Homes of people, and folders of machines that build; paths of the system are the same everywhere.
PLACES = r"/(?:home|Users|root|work|workspace|mnt|builds)/[\w.-]+|[A-Z]:\\\\Users\\\\\w+"
SECRETS = {
    "private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "AWS key": r"\bAKIA[0-9A-Z]{16}\b",
    "GitHub token": r"\bgh[pousr]_[A-Za-z0-9]{36,}\b",
    "Slack token": r"\bxox[abprs]-[A-Za-z0-9-]{10,}",
    "API key": r"\bsk-[A-Za-z0-9_-]{20,}",
    "web token": r"\beyJ[A-Za-z0-9_-]{15,}\.eyJ[A-Za-z0-9_-]{15,}\.",
    "password in an address": r"[a-z]+://[^/\s:@'\"]+:[^/\s:@'\"{}$]+@[\w.-]+",
}
# Such paths where they are what a test or a text is about.
MEANT = {
    "tests/test_trust_supply.py",
    "tests/test_book.py",
    "book/pipeline/rules.py",
    "tests/test_pipeline.py",
}


def committed():
    """Return the text files that git knows."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z"]
    known = shutil.which("git") and subprocess.run(command, capture_output=True, check=False)
    if not known or known.returncode:
        pytest.skip("no git, or no repository: what is committed is not known")
    for name in filter(None, known.stdout.decode().split("\0")):
        path = ROOT / name
        if path.is_file() and path.stat().st_size <= LARGEST and name not in MEANT:
            content = path.read_bytes()
            if b"\0" not in content[:1024]:
                yield name, content.decode(errors="replace")


def hits(pattern, text):
    # Letters of an image in base64 would look like anything.
    plain = re.sub(r"[A-Za-z0-9+/=]{200,}", "", text)
    return [hit[0] for hit in re.finditer(pattern, plain)]


def test_no_file_holds_a_secret_or_a_path_of_the_machine_it_was_made_on():
    patterns, found = {"place": PLACES, **SECRETS}, {}
    for name, text in committed():
        for what, pattern in patterns.items():
            if seen := hits(pattern, text):
                found[f"{name}: {what}"] = seen[:3]
    assert found == {}


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("place", "/home/ada/data"),
        ("place", "/root/.cache"),
        ("private key", "-----BEGIN RSA PRIVATE KEY-----"),
        ("AWS key", "AKIA" + "A1" * 8),
        ("GitHub token", "ghp_" + "a1" * 18),
        ("password in an address", "https://ada:lovelace@example.org"),
    ],
)
def test_a_secret_would_be_seen(what, text):
    assert hits({"place": PLACES, **SECRETS}[what], f"x = {text!r}")


def test_results_name_the_processor_and_not_the_machine():
    host = os.uname().nodename
    for path in (ROOT / "book" / "results").glob("*.json"):
        provenance = json.loads(path.read_text())["provenance"]
        assert not {"host", "hostname", "user", "cwd"} & provenance.keys(), path.name
        assert len(host) < 6 or host not in json.dumps(provenance), path.name


def test_every_locked_package_has_a_licence_that_agrees_with_ours():
    found = supply.families()
    assert len(found) > 100
    assert {name: supply.licence(name) for name, known in found.items() if not known} == {}


@pytest.mark.parametrize("said", ["GPL-3.0-only", "GNU Affero General Public License v3", ""])
def test_a_licence_that_does_not_agree_would_be_seen(monkeypatch, said):
    monkeypatch.setattr(supply, "licence", lambda _: said)
    assert supply.family("numpy") == ""


def test_the_changelog_says_how_versions_work():
    text = (ROOT / "book" / "changelog.md").read_text()
    assert "## How versions work" in text
    assert re.search(r"\*deprecated\*.*DeprecationWarning", text)
