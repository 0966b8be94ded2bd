"""Do the pages print the same numbers on more threads, elsewhere, and with the newest libraries?

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
OPTIONS = ("-W", "default", "-n1", "--dist", "loadscope", "--nbval")
OPTIONS += ("--nbval-cell-timeout=1800",)  # seconds


def judge(tree, python, *options, threads=1):
    """Run tests of a tree; return how many passed and were skipped, and who did neither."""
    counts = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(counts, str(threads)), "PYTHONHASHSEED": "0"}
    with tempfile.TemporaryDirectory() as place:
        report = Path(place, "report.xml")
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command = [str(word) for word in (*command, *options)]
        subprocess.run(command, cwd=tree, env=environment, check=False, stdout=subprocess.DEVNULL)
        cases = list(ElementTree.parse(report).iter("testcase"))
    ends = [{part.tag for part in case} for case in cases]
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case, tags in zip(cases, ends, strict=True)
        if tags & {"failure", "error"}
    ]
    skipped = sum("skipped" in tags for tags in ends)
    return {"passed": len(cases) - len(failed) - skipped, "skipped": skipped}, failed


def compare(tree, python=sys.executable, *, threads=1):
    """Run the notebooks of a tree; return how many cells were compared, and which differ."""
    counts, differ = judge(tree, python, *OPTIONS, "notebooks", threads=threads)
    return {"cells": counts["passed"] + len(differ), "differ": len(differ)}, differ


def on_threads(some=THREADS):
    """Compare on each number of threads; return flat values, and the cells that differ."""
    values, bad = {}, []
    for threads in some:
        counts, differ = compare(ROOT, threads=threads)
        values |= {f"threads.{threads}.{key}": value for key, value in counts.items()}
        bad += [f"{threads} threads: {name}" for name in differ]
    return values, bad


def on_this_processor():
    """Compare what this machine gives with what is stored."""
    counts, differ = compare(ROOT)
    return {f"processor.{key}": value for key, value in counts.items()}, differ


def main():
    """Compare, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=THREADS)
    values, bad = on_threads(parser.parse_args().threads)
    sys.stdout.write(json.dumps(values, indent=1) + "\n" + "\n".join(bad) + "\n")
    return bool(bad)


if __name__ == "__main__":
    raise SystemExit(main())
