"""Do the pages print the same numbers on more threads, and with the newest libraries?

``python tests/torture/repeats.py --threads 2`` runs all notebooks against their stored outputs,
within the tolerances of the book, as ``make test`` does on one thread.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
THREADS = (2, 4)
OPTIONS = ("-q", "-p", "no:cacheprovider", "-W", "default", "--nbval")
LIMIT = 1800  # seconds for a cell


def compare(tree, python=sys.executable, *, threads=1):
    """Run the notebooks of a tree; return how many cells were compared, and which differ."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(names, str(threads)), "PYTHONHASHSEED": "0"}
    with tempfile.TemporaryDirectory() as place:
        report = Path(place, "report.xml")
        options = [*OPTIONS, f"--nbval-cell-timeout={LIMIT}", f"--junitxml={report}"]
        command = [
            str(python),
            "-m",
            "pytest",
            *options,
            "-n1",
            "--dist",
            "loadscope",
            "notebooks",
        ]
        subprocess.run(command, cwd=tree, env=environment, check=False, stdout=subprocess.DEVNULL)
        cases = list(ElementTree.parse(report).iter("testcase"))
    skipped = [case for case in cases if case.find("skipped") is not None]
    differ = [case for case in cases if {part.tag for part in case} & {"failure", "error"}]
    names = [f"{case.get('classname')} {case.get('name')}" for case in differ]
    return {"cells": len(cases) - len(skipped), "differ": len(differ)}, names


def on_threads(some=THREADS):
    """Compare on each number of threads; return flat values, and the cells that differ."""
    values, bad = {}, []
    for threads in some:
        counts, differ = compare(ROOT, threads=threads)
        values |= {f"threads.{threads}.{key}": value for key, value in counts.items()}
        bad += [f"{threads} threads: {name}" for name in differ]
    return values, bad


def main():
    """Compare, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=THREADS)
    values, bad = on_threads(parser.parse_args().threads)
    sys.stdout.write(json.dumps(values, indent=1) + "\n" + "\n".join(bad) + "\n")
    return bool(bad)


if __name__ == "__main__":
    raise SystemExit(main())
