"""A small study on a real SLURM: a task killed half-way, one out of time, and what is run again.

    tests/slurm/one_node.sh python tests/slurm/study.py --results book/results

Every step is checked; what was counted is stored, for the page on scaling out. It takes about
four minutes, most of them spent on waiting for a time limit, which SLURM counts in minutes.
"""

import argparse
import os
import signal
import subprocess
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import submitit
from tasks import slow_square

from smslib import store, sweep

PACK, KILLED_AT, LONG_PACK = 6, 9, 120


def submit(study, folder, *, pack, **limits):
    executor = submitit.AutoExecutor(folder=folder / "logs", cluster="slurm")
    executor.update_parameters(cpus_per_task=1, mem_gb=0.5, **limits)
    with executor.batch():
        return sweep.run(
            slow_square, study, folder / "runs", executor=executor, pack=pack, wait=False
        )


def begun(folder):
    """Return the runs that began, in order; one that was lost and repeated is there twice."""
    return [int(line.split()[0]) for line in _lines(folder)]


def process_of(run, folder):
    return next(int(line.split()[1]) for line in _lines(folder) if int(line.split()[0]) == run)


def _lines(folder):
    log = folder / "log"
    return log.read_text().splitlines() if log.exists() else []


def stored(folder):
    runs = sweep.collect(folder / "runs")
    return set() if runs.empty else set(runs["x"])


def wait_until(done, seconds=400):
    until = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < until, slurm("squeue")
        time.sleep(0.2)


def slurm(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def wait_for_the_queue():
    wait_until(lambda: not slurm("squeue", "--noheader"))


def killed(folder):
    """Kill the second of two tasks in its fourth run, as a lack of memory does; run it again."""
    study = sweep.axis("x", range(2 * PACK))
    submit(study, folder, pack=PACK, timeout_min=10)
    wait_until(lambda: KILLED_AT in begun(folder))
    os.kill(process_of(KILLED_AT, folder), signal.SIGKILL)
    print(f"the second task killed while it did run {KILLED_AT}")
    wait_for_the_queue()
    kept, before = stored(folder), begun(folder)
    assert kept == set(range(KILLED_AT)), kept
    print(f"stored: {sorted(kept)}")
    assert len(submit(study, folder, pack=PACK, timeout_min=10)) == 2 * PACK - KILLED_AT
    wait_for_the_queue()
    again = begun(folder)[len(before) :]
    assert again == list(range(KILLED_AT, 2 * PACK)), again
    assert stored(folder) == set(range(2 * PACK))
    print(f"run again: {again}; nothing is missing")
    jobs = sweep.collect(folder / "runs")["slurm_job"].nunique()
    assert jobs == 3, jobs
    return {
        **{"killed.runs": 2 * PACK, "killed.pack": PACK, "killed.jobs": jobs},
        **{"killed.stored_before": len(kept), "killed.run_again": len(again)},
    }


def out_of_time(folder):
    """Give a task half of the time that it needs; SLURM and submitit put it back in the queue."""
    study = sweep.axis("x", range(LONG_PACK))
    submit(study, folder, pack=LONG_PACK, timeout_min=3, slurm_signal_delay_s=90)
    wait_for_the_queue()
    runs = sweep.collect(folder / "runs")
    lives = runs["restart"].value_counts().sort_index()
    repeated = len(begun(folder)) - LONG_PACK
    assert set(runs["x"]) == set(range(LONG_PACK))
    assert len(lives) > 1, "the task was never put back in the queue"
    assert repeated <= len(lives) - 1, repeated
    print(f"runs stored by each life of the task: {lives.tolist()}; begun twice: {repeated}")
    return {
        **{"out_of_time.runs": LONG_PACK, "out_of_time.lives": len(lives)},
        **{"out_of_time.stored_by_each": lives.tolist(), "out_of_time.run_again": repeated},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, help="folder of the summary; none by default")
    given = parser.parse_args()
    # Workers run elsewhere than this script: what they need is in the environment.
    path = (str(Path(__file__).parent), os.environ.get("PYTHONPATH", ""))
    os.environ["PYTHONPATH"] = os.pathsep.join(path)
    values = {
        "slurm": slurm("sinfo", "--version").removeprefix("slurm-wlm "),
        "submitit": version("submitit"),
    }
    with store.measure(command="tests/slurm/one_node.sh python tests/slurm/study.py") as cost:
        for step in (killed, out_of_time):
            with tempfile.TemporaryDirectory() as folder:
                os.environ["LOG"] = f"{folder}/log"
                values |= step(Path(folder))
    if given.results:
        store.put("slurm", values, root=given.results, provenance=cost)


if __name__ == "__main__":
    main()
