"""The same study on the engines of clusters, through their real submission path."""

import importlib.util
from concurrent.futures import Future
from pathlib import Path

import pytest
from killing.tasks import double, fragile, suicide
from scaling import engines

from smslib import sweep

STUDY = sweep.axis("x", range(4))
# submitit's executor for debugging leaves its log files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file .*DEBUG_:ResourceWarning")


@pytest.fixture
def importable(monkeypatch):
    """Let the processes that an engine starts import the tasks."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def needs(package):
    found = importlib.util.find_spec(package)
    return pytest.mark.skipif(not found, reason=f"{package} is not installed")


def doubles(root):
    runs = sweep.collect(root)
    return dict(sorted(zip(runs["x"].tolist(), runs["double"].tolist(), strict=True)))


def test_the_gpus_of_a_workstation(tmp_path, monkeypatch):
    """No task here touches the device, so that it need not exist."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    engines.on_one_gpu_each(double, STUDY, tmp_path)
    assert doubles(tmp_path) == {0: 0, 1: 2, 2: 4, 3: 6}


# ---------------------------------------------------------------- submitit, without a cluster


def submitted(task, folder, **options):
    return engines.on_slurm(task, STUDY, folder / "runs", logs=folder / "logs", **options)


@needs("submitit")
def test_a_task_that_is_killed_loses_the_run_under_way_alone(tmp_path, importable):
    """Two packs in processes of their own, the second killed in its second run."""
    from submitit.core.utils import UncompletedJobError

    first, second, third, killed = submitted(suicide, tmp_path, cluster="local", pack=2)
    names = [tmp_path / "runs" / f"{sweep.run_id(config)}.json" for config in STUDY]
    assert [first.result(), second.result()] == names[:2]
    for lost in (third, killed):  # of one pack; what it finished is stored
        with pytest.raises(UncompletedJobError, match="has not produced any output"):
            lost.result()
    assert doubles(tmp_path / "runs") == {0: 0, 1: 2, 2: 4}
    (again,) = submitted(double, tmp_path, cluster="debug", pack=2)
    assert again.result() == names[3]


@needs("submitit")
def test_submitit_runs_here_for_debugging(tmp_path):
    jobs = submitted(fragile, tmp_path, cluster="debug", pack=3)
    assert [job.result() is None for job in jobs] == [False, True, False, True]
    assert len(list((tmp_path / "runs").glob("*.error"))) == 2


@needs("submitit")
@pytest.mark.parametrize("pack", [1, 4])
def test_out_of_time_submitit_is_given_the_same_job_again(tmp_path, pack):
    """What a signal makes it store and put back in the queue; finished runs are not repeated."""
    executor = Recording()
    sweep.run(double, STUDY, tmp_path, executor=executor, pack=pack, wait=False)
    sweep.run(double, STUDY, tmp_path, index=[0, 1, 2])
    function, *arguments = executor.calls[-1]
    written = (tmp_path / f"{sweep.run_id(STUDY[0])}.json").stat().st_mtime_ns
    function.checkpoint(*arguments).result()
    assert doubles(tmp_path) == {0: 0, 1: 2, 2: 4, 3: 6}
    assert (tmp_path / f"{sweep.run_id(STUDY[0])}.json").stat().st_mtime_ns == written


class Recording:
    """An executor that runs nothing."""

    def __init__(self):
        self.calls = []

    def submit(self, *call):
        self.calls.append(call)
        return Future()


# ---------------------------------------------------------------- dask, ray


@pytest.fixture
def dask_scheduler(importable):
    from dask.distributed import LocalCluster

    options = {"dashboard_address": None, "threads_per_worker": 1, "silence_logs": True}
    with LocalCluster(n_workers=1, **options) as cluster:
        yield cluster.scheduler_address


@needs("distributed")
def test_dask_runs_a_study(tmp_path, dask_scheduler):
    with pytest.warns(RuntimeWarning, match="2 runs crashed"):
        engines.on_dask(fragile, STUDY, tmp_path, scheduler=dask_scheduler)
    assert dict(sweep.collect(tmp_path)[["x", "half"]].to_numpy()) == {0: 0, 2: 1}


@pytest.fixture
def ray_cluster(importable):
    import ray

    ray.init(num_cpus=1, include_dashboard=False, configure_logging=False, log_to_driver=False)
    yield
    ray.shutdown()


@needs("ray")
@pytest.mark.filterwarnings("ignore:Tip. In future versions of Ray:FutureWarning")
def test_ray_runs_a_study(tmp_path, ray_cluster):
    with pytest.warns(RuntimeWarning, match="2 runs crashed"):
        engines.on_ray(fragile, STUDY, tmp_path, num_cpus=0.5)
    assert dict(sweep.collect(tmp_path)[["x", "half"]].to_numpy()) == {0: 0, 2: 1}
