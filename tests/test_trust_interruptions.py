"""Killed, eight at once, and without room: a little of `tests/torture/`."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from smslib import store, sweep

TORTURE = Path(__file__).resolve().parent / "torture"


def test_jobs_that_are_killed_or_started_eight_times_at_once_end_as_if_alone():
    """In a process of its own, as it forks."""
    jobs = ["sweep", "checkpoint", "download", "prepare", "model"]
    command = [sys.executable, str(TORTURE / "interruptions.py"), "--kills", "2", "--rounds", "1"]
    done = subprocess.run(
        [*command, "--only", *jobs],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert told["interruptions.kills"] == 2 * 2 * len(jobs)
    assert told["together.prepare.ended_well"] >= 1
    assert [told[f"together.{name}.ended_well"] for name in ("sweep", "download", "model")] == [
        8
    ] * 3


def one(config):
    return {"y": 1}


def test_a_full_disk_ends_a_study_and_is_no_crash_of_a_run(tmp_path, monkeypatch):
    write = store.write_json

    def full(path, payload):
        if len(list(tmp_path.glob("*.json"))) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, payload)

    study = sweep.axis("x", range(4))
    with monkeypatch.context() as patch:
        patch.setattr(store, "write_json", full)
        with pytest.raises(OSError, match="No space left"):
            sweep.run(one, study, tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == 2
    assert not list(tmp_path.glob("*.error"))
    assert len(sweep.run(one, study, tmp_path)) == 2  # without retry=True


def test_a_model_that_does_not_fit_on_the_disk_is_told_of_and_the_old_one_kept(
    tmp_path, monkeypatch
):
    import torch
    from torture import seeds

    from smslib.model import SMSVAE

    seeds.model(tmp_path)
    model = SMSVAE.load(tmp_path)

    def full(_state, _path):
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"weights cannot be written into .* are free; what was sav"):
        model.save(tmp_path)
    assert torch.equal(SMSVAE.load(tmp_path).log_theta, model.log_theta)


def test_a_model_on_a_gpu_that_is_not_there_says_so(tmp_path):
    import torch
    from torture import seeds

    from smslib.model import SMSVAE

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    seeds.model(tmp_path)
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
        SMSVAE.load(tmp_path, device="cuda")
