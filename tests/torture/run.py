"""Everything that tries to break the software, and its figures stored for the book.

``make torture``, or ``python tests/torture/run.py --out book/results --parts fuzz --share 0.1``.
Parts that are not run keep the figures of their last run. The exit code is not zero if anything
was found.
"""

import argparse
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "book"))

import torch
from torture import (
    ends,
    faults,
    fuzz,
    interruptions,
    mutants,
    numerics,
    repeats,
    resources,
    supply,
)

from smslib import store

NAME = "reliability"


def _interruptions(share):
    kills = max(1, round(50 * share))
    rounds = max(1, round(5 * share))
    return interruptions.kill_all(kills) | interruptions.eight_at_once(rounds), []


def _fuzz(share):
    values, found = fuzz.fuzz(share)
    return values, [
        f"{name} {n}: {words}" for name, all_ in found.items() for n, words in all_.items()
    ]


def _resources(_share):
    values, said = resources.deny_all()
    for name, words in said.items():
        sys.stdout.write(f"{name}: {words}\n")
    return values, []


PARTS = {
    "numerics": lambda share: numerics.judge_all(round(2000 * share)),
    "resources": _resources,
    "fuzz": _fuzz,
    "interruptions": _interruptions,
    "supply": lambda _share: supply.build_and_try(),
    "ends": lambda _share: ends.judge_ends(),
    "threads": lambda _share: repeats.on_threads(),
    "processor": lambda _share: repeats.on_this_processor(),
    "faults": lambda _share: faults.plant_all(pages=True),
    "mutants": lambda share: mutants.kill_some(round(150 * share)),
}


def keep(part, values, provenance, root):
    """Put the figures of a part beside those of the others."""
    old = store.get(NAME, root=root) if (Path(root) / f"{NAME}.json").exists() else {}
    others = {
        key: value for key, value in old.items() if key.split(".")[0] not in (part, "together")
    }
    if part != "interruptions":
        others |= {key: value for key, value in old.items() if key.startswith("together.")}
    when_and_where = {
        f"{part}.date": provenance["date"][:10],
        f"{part}.device": provenance["device"],
    }
    store.put(NAME, others | values | when_and_where, root=root, provenance=provenance)


def main():
    """Run the chosen parts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--out", type=Path, help="folder of the results; without it none is stored"
    )
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--share", type=float, default=1.0, help="of kills, inputs and cases")
    given = parser.parse_args()
    torch.set_num_threads(1)
    bad = 0
    for part in given.parts:
        with store.measure(command="make torture") as provenance:
            values, found = PARTS[part](given.share)
        bad += len(found)
        for line in found:
            sys.stdout.write(f"{part}: {line}\n")
        shown = ", ".join(f"{key} {value}" for key, value in values.items())
        sys.stdout.write(f"{part} ({provenance['cpu_seconds']:.0f} s of CPU): {shown}\n")
        sys.stdout.flush()
        if given.out:
            keep(part, values, provenance, given.out)
    return bool(bad)


if __name__ == "__main__":
    raise SystemExit(main())
