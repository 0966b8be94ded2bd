"""What the package is made of and what is made of it: licences, and builds that work elsewhere.

``python tests/torture/supply.py`` builds sdist and wheel from a copy of the committed files,
installs each into an empty environment and tries the package there.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Families whose licences allow what ours (BSD) does; of the Mozilla licence, files stay under it.
FAMILIES = {
    "Mozilla": r"\bMPL\b|Mozilla",
    "Apache": r"Apache",
    "BSD": r"\bBSD\b|BSD-",
    "MIT": r"\bMIT\b|\bISC\b|HPND",
    "Python": r"\bPSF\b|Python Software Foundation",
    "Public domain": r"Public Domain|CC0|Unlicense",
    "Tool": r"(?!)",  # by judgement alone
}
# Said in a way that no pattern reads, or for parts that are not used; each looked at.
JUDGED = {
    "docutils": "Public domain",  # its GPL part is an editor's mode, which is not installed
    "umap-learn": "BSD",  # its metadata say "OSI Approved" alone, its LICENSE.txt is BSD 3-Clause
    "axe-playwright-python": "MIT",  # its LICENSE; the axe-core within is under Mozilla's
    "codespell": "Tool",  # GPL, but run as a program by the tests: neither imported nor passed on
}
COPYLEFT = r"(?<!L)GPL|General Public"
SMOKE = """
import sys, warnings
import smslib
from smslib import recipes, simulate, store
from smslib.data import split_cells
from smslib.evaluate import iwelbo
from smslib.model import SMSVAE
from smslib.train import fit

assert "site-packages" in smslib.__file__, smslib.__file__
screen = simulate.sparse_shift(n_cells_per_condition=20, seed=0, as_released=True)
train, rest = split_cells(screen.cells, (0.9, 0.1), seed=0)
model, config = recipes.build(train, screen.design, epochs=1)
fit(model, train, config, validation=rest, progress=False)
model.save("model")
again = SMSVAE.load("model")
assert (iwelbo(model, rest, n_draws=4) == iwelbo(again, rest, n_draws=4)).all()
with store.measure() as provenance:
    store.put("x", {"version": smslib.__version__}, root="results", provenance=provenance)
assert store.get("x", root="results")["version"] == provenance["smslib"]
"""


def locked():
    """Return the names in the lock."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return [line.partition("==")[0] for line in lines if line and not line.startswith("#")]


def licence(name):
    """Return what an installed package says about its licence, by the best field that it has."""
    told = metadata.metadata(name)
    classes = [text for text in told.get_all("Classifier") or [] if text.startswith("License")]
    first = (told.get("License") or "").strip().partition("\n")[0][:80]
    return told.get("License-Expression") or "; ".join(classes) or first


def family(name):
    """Return the family of a package's licence; empty if it has none that is known."""
    said = licence(name)
    if name in JUDGED:
        return JUDGED[name]
    if re.search(COPYLEFT, said):
        return ""
    return next((known for known, words in FAMILIES.items() if re.search(words, said)), "")


def families():
    """Return the family of every locked package that is installed here."""
    found = {}
    for name in locked():
        try:
            found[name] = family(name)
        except metadata.PackageNotFoundError:  # of another platform
            continue
    return found


def _run(command, **options):
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def committed(folder):
    """Copy the committed files."""
    folder.mkdir()
    archive = folder.with_suffix(".tar")
    _run(["git", "-C", str(ROOT), "archive", "-o", str(archive), "HEAD"])
    _run(["tar", "-xf", str(archive), "-C", str(folder)])


def build(folder):
    """Build an sdist, and a wheel from that sdist and one from the tree; return the three."""
    tree, out = folder / "tree", folder / "dist"
    committed(tree)
    backend = "from setuptools import build_meta as b; import sys; b.build_{}(sys.argv[1])"
    for kind in ("sdist", "wheel"):
        _run([sys.executable, "-c", backend.format(kind), str(out)], cwd=tree)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    _run(["tar", "-xf", str(sdist), "-C", str(folder)])
    again = folder / "again"
    unpacked = folder / sdist.name.removesuffix(".tar.gz")
    _run([sys.executable, "-c", backend.format("wheel"), str(again)], cwd=unpacked)
    return sdist, wheel, next(again.glob("*.whl"))


def contents(wheel):
    """Return the files of a wheel and their checksums, without those that it lists itself by."""
    with zipfile.ZipFile(wheel) as archive:
        parts = archive.infolist()
    return {part.filename: part.CRC for part in parts if not part.filename.endswith("RECORD")}


def try_out(wheel, folder):
    """Install a wheel alone into an empty environment and use it from an empty folder."""
    environment, elsewhere = folder / "environment", folder / "elsewhere"
    venv.create(environment, with_pip=False, clear=True)
    elsewhere.mkdir(exist_ok=True)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    _run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)])
    # Dependencies are those of this environment; a path of this kind does not bring its .pth
    # files, hence not the checkout.
    site = Path(metadata.distribution("numpy").locate_file(""))
    clean = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "HOME": str(folder)}
    clean["PYTHONPATH"] = str(site)
    _run([str(python), "-c", SMOKE], cwd=elsewhere, env=clean)
    listed = _run([str(python), "-m", "smslib.perturbseq", "list"], cwd=elsewhere, env=clean)
    assert "replogle2022-gene-lists" in listed


def build_and_try():
    """Return flat values, and what is wrong."""
    found = families()
    bad = [f"{name}: {licence(name)!r}" for name, known in found.items() if not known]
    with tempfile.TemporaryDirectory() as folder:
        _, wheel, again = build(Path(folder))
        if contents(wheel) != contents(again):
            bad.append("the wheel of the sdist differs from the wheel of the tree")
        try_out(again, Path(folder))
        size = wheel.stat().st_size
    values = {"packages": len(found), "without_known_licence": sum(not f for f in found.values())}
    for name in FAMILIES:
        key = f"licence.{name.lower().replace(' ', '_')}"
        values[key] = sum(each == name for each in found.values())
    values |= {"wheel_bytes": size, "smoke_tests": 1}
    return {f"supply.{key}": value for key, value in values.items()}, bad


def main():
    """Build, try, and print the figures."""
    values, bad = build_and_try()
    sys.stdout.write(json.dumps(values, indent=1) + "\n" + "\n".join(bad) + "\n")
    return bool(bad)


if __name__ == "__main__":
    raise SystemExit(main())
