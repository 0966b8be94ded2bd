"""The page on scaling out: what it counts, and the files that it shows."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from scaling import costs

from smslib import sweep

ROOT = Path(__file__).resolve().parents[1]
RUNS = [
    ({"arm": "smslib", "method": "svae+", "seed": 0}, 100.0),
    ({"arm": "smslib", "method": "svae+", "seed": 1}, 200.0),
    ({"arm": "released", "method": "vae", "seed": 0}, 30.0),
    ({"arm": "another", "method": "vae", "seed": 0}, 1e9),
]


def table():
    rows = [
        {"run_id": sweep.run_id(config), **config, "provenance.cpu_seconds": seconds}
        for config, seconds in RUNS
    ]
    return pd.DataFrame(rows)


def test_what_was_measured_counts_as_measured():
    values = costs.costs(table(), {"one": [config for config, _ in RUNS[:3]]})
    assert (values["one.runs"], values["one.stored"]) == (3, 3)
    assert values["one.cpu_hours"] == pytest.approx(330 / 3600)
    assert values["one.cpu_seconds_per_run"] == pytest.approx(110)
    assert values["one.runs_per_hour"] == 33
    assert values["smslib.svae+.cpu_seconds"] == 150


@pytest.mark.parametrize(
    ("arm", "method", "seconds"),
    [
        ("smslib", "svae+", 150),
        ("smslib", "shuffled", 150),
        ("smslib-written", "svae+", 150),
        ("corrected", "vae", 30),
        ("corrected-written", "vae", 30),
    ],
)
def test_what_was_not_made_counts_as_others_of_its_kind(arm, method, seconds):
    study = [{"arm": arm, "method": method, "seed": 7}]
    values = costs.costs(table(), {"one": study, "two": study})
    assert values["one.cpu_seconds_per_run"] == seconds
    assert (values["one.stored"], values["one.runs"], values["runs"]) == (0, 1, 1)
    assert values["cpu_hours"] == pytest.approx(seconds / 3600)


def test_a_kind_of_which_nothing_is_known_is_no_guess():
    with pytest.raises(KeyError):
        costs.costs(table(), {"one": [{"arm": "released", "method": "svae", "seed": 0}]})


@pytest.mark.skipif(not importlib.util.find_spec("snakemake"), reason="not installed")
def test_snakemake_reads_the_workflow(tmp_path):
    command = ["-m", "snakemake", "--snakefile", ROOT / "book" / "scaling" / "Snakefile"]
    options = ("--dry-run", "--printshellcmds", "--config", "experiment=table6", "parts=3")
    planned = subprocess.run(
        [sys.executable, *map(str, command), *options],
        **{"cwd": tmp_path, "check": True, "capture_output": True, "text": True},
    )
    for part in range(3):
        assert f"table6 --results parts/{part} --workers 1 --part {part}/3" in planned.stdout
    assert "table6 --results . --workers 0" in planned.stdout
