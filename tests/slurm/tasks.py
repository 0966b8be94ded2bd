"""A task for SLURM's workers to import: it takes a moment, and tells when it begins."""

import os
import time
from pathlib import Path


def slow_square(config):
    """Log the run, then square a number in a second."""
    with Path(os.environ["LOG"]).open("a") as log:
        log.write(f"{config['x']} {os.getpid()}\n")
    time.sleep(1.0)
    return {
        "square": config["x"] ** 2,
        "slurm_job": os.environ["SLURM_JOB_ID"],
        "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
    }
