"""One study on every engine: the page on scaling out shows these functions, the tests run them."""

from __future__ import annotations

from pathlib import Path

from smslib import sweep


def on_one_gpu_each(task: sweep.Task, study: list[dict], root: Path) -> list[sweep.Job]:
    """Run a study on all GPUs of this machine, one process on each."""
    with sweep.gpu_workers() as executor:
        return sweep.run(task, study, root, executor=executor)


def on_slurm(
    task: sweep.Task, study: list[dict], root: Path, *, logs: Path, pack: int, **parameters: object
) -> list[sweep.Job]:
    """Submit a study as one array job, each of whose tasks does a pack of runs; do not wait."""
    import submitit

    executor = submitit.AutoExecutor(folder=logs, cluster=parameters.pop("cluster", None))
    executor.update_parameters(timeout_min=120, cpus_per_task=1, **parameters)
    with executor.batch():
        return sweep.run(task, study, root, executor=executor, pack=pack, wait=False)


def on_dask(task: sweep.Task, study: list[dict], root: Path, *, scheduler: str) -> list[sweep.Job]:
    """Run a study on the workers of a dask scheduler."""
    from dask.distributed import Client

    with Client(scheduler) as client:
        executor = client.get_executor(pure=False, retries=2)
        return sweep.run(task, study, root, executor=executor)


def on_ray(task: sweep.Task, study: list[dict], root: Path, **options: float) -> list[sweep.Job]:
    """Run a study on the Ray cluster that this process is connected to."""
    return sweep.run(task, study, root, executor=sweep.OnRay(options or {"num_cpus": 1}))
