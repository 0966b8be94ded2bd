"""One place for versions: the lock pins what pyproject.toml asks for, conda goes through both."""

import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
UNLOCKED = {"dask", "loader", "ray"}  # engines, which neither book nor tests install
ASKED = [
    Requirement(text)
    for part in (PROJECT["dependencies"], *(EXTRAS[name] for name in EXTRAS.keys() - UNLOCKED))
    for text in part
]
OTHERS = [requirement for requirement in ASKED if requirement.name != PROJECT["name"]]


def locked():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pins}


def test_the_lock_pins_every_package_once_and_exactly():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [
        pin for pin in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", pin)
    ] == []
    assert len(locked()) == len(pins)


@pytest.mark.parametrize("requirement", OTHERS, ids=str)
def test_the_lock_satisfies(requirement):
    version = locked()[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(version)


def test_torch_and_jupyter_book_are_the_versions_the_book_was_written_for():
    assert locked()["torch"] == "2.13.0"
    assert Version(locked()["jupyter-book"]) < Version("2")


def test_no_exact_version_stands_outside_the_lock():
    exact = re.compile(r"==")
    for name in ("pyproject.toml", "environment.yml", "Makefile", ".ci/run"):
        assert exact.findall((ROOT / name).read_text()) == [], name


def test_conda_installs_the_same_through_the_lock():
    packages = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    through_pip = next(entry["pip"] for entry in packages if isinstance(entry, dict))
    assert through_pip == ["-c requirements.lock", "-e .[book,test]"]
    assert f"python{PROJECT['requires-python']}" in packages


def test_the_installed_environment_is_the_lock():
    differing = {}
    for name, version in locked().items():
        try:
            installed = Version(metadata.version(name)).public
        except metadata.PackageNotFoundError:
            continue  # a package that only other platforms or Pythons need
        if installed != version:
            differing[name] = (installed, version)
    assert differing == {}


def test_the_lock_is_complete():
    """Nothing that an installed requirement needs here, however deep, escapes the lock."""
    todo, seen = [(r.name, r.extras) for r in OTHERS], set()
    while todo:
        name, extras = todo.pop()
        if (key := (canonicalize_name(name), frozenset(extras))) in seen:
            continue
        seen.add(key)
        for text in metadata.requires(name) or []:
            requirement = Requirement(text)
            environments = [{"extra": extra} for extra in extras or {""}]
            if requirement.marker is None or any(map(requirement.marker.evaluate, environments)):
                todo.append((requirement.name, requirement.extras))
    assert {name for name, _ in seen} - locked().keys() == set()


def make(*arguments, **environment):
    return subprocess.run(
        ["make", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_make_alone_lists_every_target_with_one_line():
    listed = make().stdout
    assert make("help").stdout == listed
    documented = re.findall(r"^  make (\w+) +\S.*$", listed, re.MULTILINE)
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert documented == phony.split()


def test_an_old_python_is_refused_with_a_way_out(tmp_path):
    old = tmp_path / "old-python"
    old.write_text("#!/bin/sh\ncase $1 in --version) echo Python 3.9.1;; *) exit 1;; esac\n")
    old.chmod(0o755)
    command = ["--always-make", "html", f"PYTHON={old}", "PIPELINE=true"]
    done = make(*command)
    assert done.returncode != 0
    assert "needs Python 3.11 or newer" in done.stderr
    assert "Python 3.9.1" in done.stderr
    assert "make PYTHON=" in done.stderr


def test_ci_runs_the_tests_and_nothing_else_decides():
    script = (ROOT / ".ci" / "run").read_text()
    assert "set -euo pipefail" in script
    assert script.rstrip().endswith("make test")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "book.yml").read_text())
    steps = [step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]]
    assert ".ci/run" in steps
    assert "make book" in steps


def test_the_project_needs_this_python():
    assert sys.version_info >= (3, 11)
    assert PROJECT["requires-python"] == ">=3.11"


def test_citation_and_licence_agree_with_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["license"] == PROJECT["license"] == "BSD-3-Clause"
    assert citation["repository-code"] == PROJECT["urls"]["Repository"]
    assert "BSD 3-Clause" in (ROOT / "LICENSE").read_text()
