"""Runs as jobs of a Slurm cluster, through submitit."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dvi.sweeps.records import Record, Task, read_record, write_record
from dvi.sweeps.work import work

#: Seconds between checks of the jobs.
_PAUSE = 2.0

#: How often a job that exceeds its time is put into the queue again.
_QUEUED = 100


@dataclass(frozen=True)
class Slurm:
    """The resources that a job requests from Slurm.

    Args:
        partition: the partition for the jobs (default: the cluster's default).
        hours: time limit of a job; a run that takes longer is put into the queue again and continues.
        cards: GPUs of each job.
        cpus: cores of each job.
        mem_gb: memory of each job in GB (default: the cluster's default).
        at_once: largest number of jobs at a time.
        more: further parameters, by submitit's names, as in {"slurm_account": "physics"}.
        cluster: "slurm"; or "local" to run the jobs on this machine, all at once, as a trial.
    """

    partition: str | None = None
    hours: float = 24.0
    cards: int = 0
    cpus: int = 1
    mem_gb: float | None = None
    at_once: int = 64
    more: Mapping[str, Any] = field(default_factory=dict)
    cluster: str = "slurm"

    def executor(self, folder: Path) -> Any:
        """The submitit executor with these parameters.

        Raises:
            ImportError: if submitit is missing.
            ValueError: if this machine has no Slurm, or if submitit does not know a parameter.
        """
        try:
            import submitit
        except ImportError as error:
            raise ImportError("Jobs on a cluster need submitit: pip install 'dvi-flows[cluster]'.") from error
        try:
            executor = submitit.AutoExecutor(
                folder=folder / "jobs",
                cluster=self.cluster,
                slurm_max_num_timeout=_QUEUED,
                local_max_num_timeout=_QUEUED,
            )
        except RuntimeError as error:
            raise ValueError(f'{error}: run this on a machine with "sbatch", or leave --engine out.') from error
        given = {
            "name": "dvi",
            "timeout_min": max(1, round(60 * self.hours)),
            "gpus_per_node": self.cards,
            "cpus_per_task": self.cpus,
            "mem_gb": self.mem_gb,
            "slurm_partition": self.partition,
            "slurm_array_parallelism": self.at_once,
            **self.more,
        }
        try:
            executor.update_parameters(**{name: value for name, value in given.items() if value is not None})
        except (NameError, TypeError) as error:
            raise ValueError(f"submitit does not take these parameters: {error}") from error
        return executor


class Job:
    """A run as a job of the cluster.  If the cluster stops the job with a warning, it is queued again and continues."""

    def __call__(self, task: Task, folder: Path, threads: int) -> bool:
        """Make the run; False if another process is working on it."""
        torch.set_num_threads(threads)
        return work(task, folder) is not None

    def checkpoint(self, task: Task, folder: Path, threads: int) -> Any:
        """The job to put into the queue when the time of this one is over, or when this one is preempted."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, task, folder, threads)


def run_on_cluster(
    tasks: Sequence[Task],
    folder: Path,
    slurm: Slurm,
    *,
    told: Callable[[Record], None] = lambda record: None,
    watched: Callable[[list[str]], None] = lambda names: None,
    stay: bool = True,
) -> list[str]:
    """Submit runs as jobs, one job for each run.

    Args:
        tasks, folder, told, watched: see :func:`dvi.sweeps.processes.run_here`; all nodes must see the folder.
        slurm: the resources of the jobs.
        stay: wait until all jobs have ended; otherwise they are only submitted.

    Returns:
        the ids of the jobs, in the order of the tasks.

    Raises:
        ImportError, ValueError: see :meth:`Slurm.executor`.
    """
    folder = folder.resolve()
    executor = slurm.executor(folder)
    with executor.batch():
        jobs = [executor.submit(Job(), task, folder, slurm.cpus) for task in tasks]
    going = dict(zip((task.name for task in tasks), jobs, strict=True))
    watched(list(going))
    by_name = {task.name: task for task in tasks}
    while stay and going:
        for name in [name for name, job in going.items() if job.done()]:
            told(_seen(by_name[name], folder, going.pop(name)))
            watched(list(going))
        if going:
            time.sleep(_PAUSE)
    return [job.job_id for job in jobs]


def _seen(task: Task, folder: Path, job: Any) -> Record:
    """The record of a run whose job has ended, for whatever reason."""
    record = read_record(folder, task.name) or Record(task.name, task.spec)
    trouble = job.exception()
    if trouble is not None and record.spec == task.spec and not record.complete:
        record.state = "error" if record.state == "error" else "unfinished"
        record.message = f"Job {job.job_id} ended: {str(trouble).strip()[-2000:]}"
        write_record(folder, record)
    return record


__all__ = ["Job", "Slurm", "run_on_cluster"]
