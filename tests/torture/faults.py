"""Ten deliberate faults, each planted in a copy: which test, and which page, notices?

``python tests/torture/faults.py`` runs the tests of the spoilt module; with ``--pages`` also the
page of the book that is nearest, compared with its stored outputs.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torture import planting


@dataclass(frozen=True)
class Fault:
    """A piece of a module, what it becomes, the tests to ask and the page to ask."""

    module: str
    was: str
    becomes: str
    tests: tuple[str, ...]
    page: str


FAULTS = {
    "swapped axes": Fault(
        "metrics",
        "_scaled(true, method).T @ _scaled(estimated, method)",
        "_scaled(estimated, method).T @ _scaled(true, method)",
        ("metrics",),
        "targets",
    ),
    "missing half of the KL": Fault(
        "distributions",
        "return 0.5 * (distance - 1.0 - variance.log())",
        "return distance - 1.0 - variance.log()",
        ("distributions",),
        "inference",
    ),
    "signed matching": Fault(
        "metrics",
        "linear_sum_assignment(table if signed else np.abs(table), maximize=True)",
        "linear_sum_assignment(table, maximize=True)",
        ("metrics",),
        "disentanglement",
    ),
    "warm-up one epoch early": Fault(
        "train",
        "min(1.0, epoch / config.warmup_epochs)",
        "min(1.0, (epoch + 1) / config.warmup_epochs)",
        ("train",),
        "training_practice",
    ),
    "leaked held-out cells": Fault(
        "screens",
        "return moved[~is_held], moved[is_held], larger",
        "return moved, moved[is_held], larger",
        ("screens",),
        "real_screen",
    ),
    "forgotten library": Fault(
        "model",
        "NegativeBinomial(log_rate + library.log(), self.log_theta)",
        "NegativeBinomial(log_rate + 0 * library, self.log_theta)",
        ("model",),
        "generative_model",
    ),
    "gates without variance": Fault(
        "priors",
        "slab.square() * (gate - gate.square()) + gate",
        "slab.square() * (gate - gate) + gate",
        ("priors",),
        "inference",
    ),
    "wrong sign in the log-pmf": Fault(
        "distributions",
        "return x * log_odds - theta * log_scale",
        "return x * log_odds + theta * log_scale",
        ("distributions",),
        "generative_model",
    ),
    "mean of logs for log of means": Fault(
        "evaluate",
        "torch.stack(weights).logsumexp(-1)",
        "torch.stack(weights).mean(-1)",
        ("evaluate",),
        "inference",
    ),
    "seed of the split ignored": Fault(
        "data",
        "rng = np.random.default_rng(seed)\n    condition",
        "rng = np.random.default_rng(0)\n    condition",
        ("data",),
        "training_practice",
    ),
}


def spoilt(fault):
    """Return the text of a module with its fault."""
    text = (planting.ROOT / "smslib" / f"{fault.module}.py").read_text()
    if text.count(fault.was) != 1:
        raise RuntimeError(f"{fault.module}.py does not hold {fault.was!r} once; mend the fault")
    return text.replace(fault.was, fault.becomes)


def page_notices(copy, page):
    """Say whether a page of the book differs from its stored outputs."""
    shutil.copytree(planting.ROOT / "notebooks", copy / "notebooks", dirs_exist_ok=True)
    results = copy / "book" / "results"
    if not results.exists():
        shutil.copytree(planting.ROOT / "book" / "results", results)
    path = os.pathsep.join([str(copy), str(copy / "book")])
    options = ["-q", "-x", "-n0", "-p", "no:cacheprovider", "-W", "default"]
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-cell-timeout", "1800"]
    done = subprocess.run(
        [*command, *options, f"notebooks/{page}.ipynb"],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in (0, 1):
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    return bool(done.returncode)


def plant_all(pages=False, only=None, log=None):
    """Plant every fault; return flat values, and the faults that nothing noticed."""
    values, missed = {"faults.planted": 0, "faults.noticed": 0}, []
    planting.prepare()
    with planting.copied() as copy:
        for name, fault in FAULTS.items():
            if only not in (None, name):
                continue
            tests = [f"tests/test_{test}.py" for test in fault.tests]
            with planting.planted(copy, f"smslib/{fault.module}.py", spoilt(fault)):
                noticed = planting.noticed_by(copy, tests)
                page = page_notices(copy, fault.page) if pages else None
            if noticed.startswith("ERROR"):
                raise RuntimeError(noticed)
            key = f"faults.{name.replace(' ', '_')}"
            values |= {f"{key}.test": noticed.partition("/")[2].partition("[")[0] or "none"}
            if page is not None:
                values |= {f"{key}.page": fault.page if page else f"not by {fault.page}"}
            values["faults.planted"] += 1
            values["faults.noticed"] += bool(noticed or page)
            if not (noticed or page):
                missed.append(f"nothing noticed: {name}")
            if log:
                log(f"{name}: {noticed or 'no test'}; page {page}\n")
    return values, missed


def main():
    """Plant, and print who noticed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pages", action="store_true", help="ask the pages, too")
    parser.add_argument("--only", choices=list(FAULTS))
    given = parser.parse_args()

    values, missed = plant_all(given.pages, given.only, planting.say)
    sys.stdout.write(json.dumps(values, indent=1) + "\n")
    return bool(missed)


if __name__ == "__main__":
    raise SystemExit(main())
