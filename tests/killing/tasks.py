"""Tasks for workers to import, in processes that start in a moment."""

import contextlib
import os
import signal
import time

from smslib import store


@contextlib.contextmanager
def _unmeasured(**_):
    yield {}


def lightly():
    """Make this process quick: no torch to import, no waiting for the disk.

    What a killed process has written is the kernel's and survives it; only a power cut needs
    fsync.
    """
    store.measure = _unmeasured
    os.fsync = lambda _: None


def double(config):
    return {"double": 2 * config["x"]}


def fragile(config):
    """Crash on odd numbers."""
    if config["x"] % 2:
        raise ArithmeticError(f"{config['x']} is odd")
    return {"half": config["x"] // 2}


def suicide(config):
    """Kill the worker, as the kernel does when memory is short, after some honest work."""
    if config["x"] == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return double(config)


def square(config):
    """Take a moment, return enough for the writing to take another, and log the run."""
    time.sleep(0.005)
    log(config)
    return {"square": config["x"] ** 2, "padding": [0.5] * 2000}


def middle(config):
    """Crash on the second of three runs, and log the others."""
    if config["x"] == 1:
        raise ArithmeticError("one")
    log(config)
    return {"y": 1}


def log(config):
    """Append to a file that all processes share, in one write."""
    with open(os.environ["LOG"], "a") as file:
        file.write(f"{config['x']}\n")


def device_of_worker(folder, n_workers):
    """Return the GPU that this process sees, once all workers are at work."""
    (folder / str(os.getpid())).touch()
    until = time.monotonic() + 60
    while len(list(folder.iterdir())) < n_workers and time.monotonic() < until:
        time.sleep(0.02)
    return os.environ["CUDA_VISIBLE_DEVICES"]
