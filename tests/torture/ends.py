"""The oldest and the newest dependencies that the metadata allow: do the tests pass on both?

``python tests/torture/ends.py`` resolves both ends with uv, installs each into an environment of
its own, with all that PyTorch brings several gigabytes, and runs the tests of the package there;
at the newest end also all notebooks, against their stored outputs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torture import repeats, supply

ENDS = {"oldest": "lowest-direct", "newest": "highest"}
TOLD = ("anndata", "numpy", "pandas", "scikit-learn", "scipy", "torch")
TESTERS = ("beartype", "hypothesis", "pytest", "pytest-cov", "pytest-xdist")
TESTERS += ("ipykernel", "jupytext", "nbval>=0.11,<0.12", "pyyaml")  # and of the notebooks
UV = (sys.executable, "-m", "uv", "--quiet")
# Their deprecations are the next release's matter, and old libraries beside new ones have many.
OPTIONS = ("-n0", "-W", "ignore::DeprecationWarning")


def _run(command, **options):
    subprocess.run([str(word) for word in command], check=True, **options)


def install(end, tree, folder):
    """Resolve one end, and install it and the package into ``folder``; return the versions."""
    listed = folder.with_suffix(".txt")
    resolve = ["pip", "compile", "pyproject.toml", "--extra", "data", "--extra", "plot"]
    resolve += ["--resolution", ENDS[end], "-o", listed]
    _run([*UV, *resolve], cwd=tree, stdout=subprocess.DEVNULL)
    _run([*UV, "venv", "--python", sys.executable, folder])
    into = ("pip", "install", "--python", folder / "bin" / "python")  # uv would take this one
    _run([*UV, *into, "-r", listed, *TESTERS])
    _run([*UV, *into, "--no-deps", "-e", tree])
    lines = [line.split("==") for line in listed.read_text().splitlines() if "==" in line]
    return {name: version.split()[0] for name, version in lines if name in TOLD}


def tests_of(tree):
    """Return the tests that are named after a module of the package."""
    found = [f"tests/test_{path.stem}.py" for path in sorted((tree / "smslib").glob("*.py"))]
    return [name for name in found if (tree / name).exists()]


def judge_ends(only=None):
    """Judge both ends; return flat values and the tests that did not pass."""
    values, bad = {}, []
    with tempfile.TemporaryDirectory() as place:
        for end in [only] if only else ENDS:
            tree, folder = Path(place, f"{end}-tree"), Path(place, end)
            supply.committed(tree)
            versions = install(end, tree, folder)
            python = folder / "bin" / "python"
            counts, failed = repeats.judge(tree, python, *OPTIONS, *tests_of(tree))
            counts |= {"failed": len(failed)}
            if end == "newest":
                pages, differ = repeats.compare(tree, python)
                counts |= {f"pages.{key}": value for key, value in pages.items()}
                failed += differ
            values |= {f"ends.{end}.{key}": value for key, value in {**counts, **versions}.items()}
            bad += [f"{end}: {name}" for name in failed]
    return values, bad


def main():
    """Judge, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=list(ENDS))
    values, bad = judge_ends(parser.parse_args().only)
    sys.stdout.write(json.dumps(values, indent=1) + "\n" + "\n".join(bad) + "\n")
    return bool(bad)


if __name__ == "__main__":
    raise SystemExit(main())
