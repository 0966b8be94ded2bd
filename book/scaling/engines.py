"""One study on every engine: the page on scaling out shows these functions, the tests run them."""

from __future__ import annotations

from pathlib import Path

from smslib import sweep
from smslib.sweep import Config, Job, Task


def on_one_gpu_each(task: Task, study: list[Config], root: Path) -> list[Job]:
    """Run a study on all GPUs of this machine, one process on each."""
    with sweep.gpu_workers() as executor:
        return sweep.run(task, study, root, executor=executor)


def on_slurm(
    task: Task,
    study: list[Config],
    root: Path,
    *,
    logs: Path,
    pack: int,
    cluster: str = "slurm",
    **parameters: object,
) -> list[Job]:
    """Submit a study as one array job, a pack of runs to each task."""
    import submitit

    executor = submitit.AutoExecutor(folder=logs, cluster=cluster)
    executor.update_parameters(timeout_min=120, cpus_per_task=1, **parameters)
    with executor.batch():
        how = {"executor": executor, "pack": pack, "wait": False}
        return sweep.run(task, study, root, **how)


def on_dask(
    task: Task,
    study: list[Config],
    root: Path,
    *,
    scheduler: str,
) -> list[Job]:
    """Run a study on the workers of a dask scheduler."""
    from dask.distributed import Client

    with Client(scheduler) as client:
        executor = client.get_executor(pure=False, retries=2)
        return sweep.run(task, study, root, executor=executor)


def on_ray(
    task: Task,
    study: list[Config],
    root: Path,
    **options: float,
) -> list[Job]:
    """Run a study on the Ray cluster that this process is connected to."""
    executor = sweep.OnRay(options or {"num_cpus": 1})
    return sweep.run(task, study, root, executor=executor)
