"""One place for versions: the lock pins what pyproject.toml asks for, conda goes through both."""

import importlib.util
import os
import re
import shutil
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


PLATFORMS = {
    "Linux": {"sys_platform": "linux", "platform_machine": "x86_64"},
    "Darwin": {"sys_platform": "darwin", "platform_machine": "arm64"},
}
# What torch's CUDA build asks for, in versions of its own choice.
CUDA = re.compile(r"nvidia-.*|cuda-.*|triton")


def needed(environment):
    """Return all that the project's requirements ask for, however deep, by the metadata here."""
    todo, seen = [(r.name, r.extras) for r in OTHERS], set()
    while todo:
        name, extras = todo.pop()
        key = (canonicalize_name(name), frozenset(extras))
        if key in seen or CUDA.fullmatch(key[0]):
            continue
        seen.add(key)
        for requirement in map(Requirement, required(name)):
            places = [{**environment, "extra": extra} for extra in extras or {""}]
            if requirement.marker is None or any(map(requirement.marker.evaluate, places)):
                todo.append((requirement.name, requirement.extras))
    return {name for name, _ in seen}


def required(name):
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []  # a package that only other platforms or Pythons need


@pytest.mark.parametrize("system", PLATFORMS)
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_the_lock_is_complete(python, system):
    """Nothing that is needed there escapes the lock."""
    version = {"python_version": python, "python_full_version": f"{python}.4"}
    place = {"platform_system": system, "os_name": "posix", **PLATFORMS[system]}
    assert needed({**version, **place}) - locked().keys() == set()


def test_what_torch_asks_for_on_cuda_is_not_locked(monkeypatch):
    asked = ["nvidia-nccl-cu13; platform_system == 'Linux'", "triton", "cuda-toolkit[nvrtc]", "x"]
    monkeypatch.setattr(metadata, "requires", {"torch": asked}.get)
    assert needed({}) - locked().keys() == {"x"}


def make(*arguments, folder=ROOT, **environment):
    # What a make that runs the tests tells the makes below it, such as its flags.
    above = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "TORCH_INDEX"}
    return subprocess.run(
        ["make", *arguments],
        cwd=folder,
        env={k: v for k, v in os.environ.items() if k not in above} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def ready(tmp_path):
    """A tree whose environment is ready, as far as make can see."""
    folder = tmp_path / "a tree"
    (folder / ".venv" / "bin").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copyfile(ROOT / name, folder / name)
    python = folder / ".venv" / "bin" / "python"
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    (folder / ".venv" / ".ready").write_text(f"{folder}\n")
    return folder


def installs(done):
    """Whether a dry run would make the environment ready, and whether it drops torch before."""
    return "install --quiet -c requirements.lock" in done.stdout, "uninstall" in done.stdout


def test_an_environment_that_is_ready_is_left_alone(ready):
    assert installs(make("-n", "html", folder=ready)) == (False, False)


def test_a_moved_tree_is_installed_again(ready):
    moved = ready.rename(ready.with_name("moved"))
    assert installs(make("-n", "html", folder=moved)) == (True, False)


def test_an_environment_whose_python_is_gone_is_made_anew(ready):
    (ready / ".venv" / "bin" / "python").unlink()
    (ready / ".venv" / "bin" / "python").symlink_to("no-such-python")
    done = make("-n", "html", folder=ready)
    assert installs(done) == (True, False)
    assert "-m venv --clear .venv" in done.stdout
    assert make("help", folder=ready).stderr == ""


def test_another_build_of_torch_takes_the_place_of_the_old_one(ready):
    stamp = ready / ".venv" / ".torch"
    assert installs(make("-n", "html", "TORCH_INDEX=", folder=ready)) == (True, True)
    stamp.write_text("\n")  # what is left by TORCH_INDEX=
    assert installs(make("-n", "html", "TORCH_INDEX=", folder=ready)) == (False, False)
    assert installs(make("-n", "html", folder=ready)) == (False, False)
    assert installs(make("-n", "html", folder=ready, TORCH_INDEX="x")) == (True, True)


def targets():
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return phony[1].split()


def runs(name):
    """Whether ``python -m name`` finds something to run."""
    spec = importlib.util.find_spec(name)
    package = spec is not None and spec.submodule_search_locations is not None
    return spec is not None and (not package or runs(f"{name}.__main__"))


@pytest.mark.parametrize("target", targets())
def test_what_a_target_runs_is_there(target):
    done = make("-n", "--always-make", target)
    assert done.returncode == 0
    called = re.findall(r"python3?(?: -m ([\w.]+)| ([\w/]+\.py))(?: (\w+))?", done.stdout)
    assert [name for name, _, _ in called if name and not runs(name)] == []
    assert [path for _, path, _ in called if path and not (ROOT / path).is_file()] == []
    actions = {action for name, _, action in called if name == "pipeline"}
    assert actions <= {"execute", "refresh", "html", "links"}
    assert called or target in {"help", "clean", "distclean"}


def test_make_alone_lists_every_target_with_one_line():
    listed = make().stdout
    assert make("help").stdout == listed
    documented = re.findall(r"^  make (\w+) +\S.*$", listed, re.MULTILINE)
    assert documented == targets()


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
    assert workflow["env"]["SMS_REQUIRE_DATA"] == "1"
    assert "SMS_REQUIRE_DATA" not in script


def test_the_data_of_hosted_runs_lie_where_the_cache_and_git_expect_them():
    text = (ROOT / ".github" / "workflows" / "book.yml").read_text()
    assert "github.workspace" not in text  # in a container, a folder of the host
    assert "/.data/" in (ROOT / ".gitignore").read_text().splitlines()
    for name in ("test", "book"):
        steps = yaml.safe_load(text)["jobs"][name]["steps"]
        cached = " ".join(step.get("with", {}).get("path", "") for step in steps)
        assert ".data" in cached.split()
        said = [step.get("run", "") for step in steps]
        assert 'echo "SMS_DATA_DIR=$GITHUB_WORKSPACE/.data" >> "$GITHUB_ENV"' in said


def test_the_project_needs_this_python():
    assert sys.version_info >= (3, 11)
    assert PROJECT["requires-python"] == ">=3.11"


def test_citation_and_licence_agree_with_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["license"] == PROJECT["license"] == "BSD-3-Clause"
    assert citation["repository-code"] == PROJECT["urls"]["Repository"]
    assert "BSD 3-Clause" in (ROOT / "LICENSE").read_text()
