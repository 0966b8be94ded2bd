"""What the tables of the paper cost, from stored runs: ``python book/scaling/costs.py``.

Most runs of most tables were never made. One that was not is taken to cost what others of its
arm and method did, on the average over all tables; arms of which there is none stand below.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from smslib import store, sweep
from smslib.studies import STUDIES

if TYPE_CHECKING:
    import pandas as pd

TABLES = ("table1", "table4", "table5", "table6", "table7", "table8", "table10", "figure4")
# The same networks and, but for early stopping, the same number of steps.
ARM_LIKE = {"smslib-written": "smslib", "corrected-written": "corrected", "corrected": "released"}
METHOD_LIKE = {"shuffled": "svae+"}  # on other labels


def costs(runs: pd.DataFrame, studies: Mapping[str, Sequence[sweep.Config]]) -> dict[str, object]:
    """Return runs, CPU seconds and packs of an hour of every study, measured and expected.

    Parameters
    ----------
    runs : DataFrame
        From `smslib.sweep.collect`.
    studies : dict
        Name to configurations.
    """
    of_kind = runs.groupby(["arm", "method"])["provenance.cpu_seconds"].mean().to_dict()
    measured = dict(zip(runs["run_id"], runs["provenance.cpu_seconds"], strict=True))
    every: dict[str, float] = {}
    values: dict[str, object] = {}
    for name, configs in studies.items():
        by_id = {sweep.run_id(config): config for config in configs}
        seconds = {each: measured.get(each, _expected(by_id[each], of_kind)) for each in by_id}
        mean = sum(seconds.values()) / len(seconds)
        values |= {
            f"{name}.runs": len(seconds),
            f"{name}.stored": len(seconds.keys() & measured.keys()),
            f"{name}.cpu_hours": sum(seconds.values()) / 3600,
            f"{name}.cpu_seconds_per_run": mean,
            f"{name}.runs_per_hour": max(1, round(3600 / mean)),
        }
        every |= seconds
    kinds = {f"{arm}.{method}.cpu_seconds": mean for (arm, method), mean in of_kind.items()}
    # A run that two studies ask for is made once.
    return values | kinds | {"runs": len(every), "cpu_hours": sum(every.values()) / 3600}


def _expected(config: sweep.Config, of_kind: Mapping[tuple[str, str], float]) -> float:
    arm, method = config["arm"], METHOD_LIKE.get(config["method"], config["method"])
    while (arm, method) not in of_kind and arm in ARM_LIKE:
        arm = ARM_LIKE[arm]
    return of_kind[arm, method]


def main() -> None:
    """Write ``costs.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("book/results"))
    given = parser.parse_args()
    studies = {name: sweep.chain(*STUDIES[name]().values()) for name in TABLES}
    with store.measure(command="python book/scaling/costs.py") as provenance:
        values = costs(sweep.collect(given.results / "runs" / "simulation"), studies)
    store.put("costs", values, root=given.results, provenance=provenance)


if __name__ == "__main__":
    main()
