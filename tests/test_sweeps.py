"""Sweeps: several runs in one folder; killed, failing, resumed, and two at a time."""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest
from sweep_tasks import broken, gd, killed

import dvi
from dvi.sweeps import processes
from dvi.sweeps.api import sweep
from dvi.sweeps.cluster import Slurm
from dvi.sweeps.locks import holder, locked
from dvi.sweeps.records import (
    MANIFEST,
    Record,
    Task,
    lock_path,
    read_record,
    records,
    result_path,
    write_record,
)
from dvi.sweeps.work import work


def task(name, **options):
    return Task(name, partial(gd, **options), {"lr": options.get("lr", 0.15)})


def contents(path):
    """Everything in a result but the checkpoint, which says when it was taken."""
    found = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, item: (
                found.update({name: item[()]}) if isinstance(item, h5py.Dataset) and name != "checkpoint" else None
            )
        )
    return found


def require_equal(a, b):
    one, other = contents(a), contents(b)
    assert one.keys() == other.keys()
    assert len(one) > 20
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_a_failed_run_neither_stops_nor_hides_the_others(tmp_path):
    tasks = [
        task("a"),
        Task("broken", broken, {}),
        Task("killed", killed, {}),
        task("diverges", lr=300.0, steps=200),
        task("b", lr=0.1),
    ]
    found = {record.name: record for record in sweep(tasks, tmp_path, workers=2, progress=False)}
    assert {name: record.state for name, record in found.items()} == {
        "a": "done", "broken": "error", "killed": "unfinished", "diverges": "failed", "b": "done",
    }  # fmt: skip
    assert "nothing works" in found["broken"].message
    assert "SIGKILL" in found["killed"].message
    assert found["diverges"].status in ("DIVERGED", "INFEASIBLE_START")
    assert found["diverges"].message
    assert found["a"].summary["reached"] == 40
    assert found["a"].cpu_seconds > 0
    assert dvi.load(result_path(tmp_path, "a")).about["method"] == "GradientDescent(lr=0.15)"
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert manifest["totals"] | {"cpu_seconds": 0} == {
        "runs": 5, "done": 2, "failed": 1, "error": 1, "unfinished": 1, "running": 0, "cpu_seconds": 0,
    }  # fmt: skip


def test_complete_runs_are_skipped_and_others_made(tmp_path):
    sweep([task("a")], tmp_path, progress=False)
    before = result_path(tmp_path, "a").stat().st_mtime_ns
    found = sweep([task("a"), task("b", lr=0.1)], tmp_path, progress=False)
    assert [record.state for record in found] == ["done", "done"]
    assert result_path(tmp_path, "a").stat().st_mtime_ns == before
    assert [record.sessions for record in found] == [1, 1]
    sweep([task("a")], tmp_path, overwrite=True, progress=False)
    assert result_path(tmp_path, "a").stat().st_mtime_ns > before


def test_failed_runs_are_made_anew_when_asked(tmp_path):
    diverges = task("diverges", lr=300.0, steps=200)
    sweep([diverges], tmp_path, progress=False)
    assert sweep([diverges], tmp_path, progress=False)[0].sessions == 1
    (again,) = sweep([diverges], tmp_path, retry=True, progress=False)
    began = read_record(tmp_path, "diverges").began
    assert again.state == "failed"
    assert began == again.began
    assert again.sessions == 1  # of a record that is new


def test_another_run_of_the_same_name_is_refused(tmp_path):
    sweep([task("a")], tmp_path, progress=False)
    with pytest.raises(dvi.StoreError, match=r"another run called a: lr was 0.15 and is now 0.1.*--overwrite"):
        sweep([task("a", lr=0.1)], tmp_path, progress=False)
    with pytest.raises(ValueError, match="Several runs are called a"):
        sweep([task("a"), task("a")], tmp_path / "b", progress=False)
    with pytest.raises(ValueError, match="cannot be called"):
        task("a/b")


def test_what_a_run_has_cost_adds_up_over_its_sessions(tmp_path):
    began = "2020-01-01T00:00:00+00:00"
    before = Record("a", {"lr": 0.15}, "unfinished", cpu_seconds=1e6, wall_seconds=2e6, sessions=3, began=began)
    write_record(tmp_path, before)
    record = work(task("a"), tmp_path)
    assert (record.state, record.sessions, record.began) == ("done", 4, began)
    assert 1e6 < record.cpu_seconds < 1.1e6
    assert 2e6 < record.wall_seconds < 2.1e6
    assert read_record(tmp_path, "a") == record


def test_a_run_that_had_ended_before_its_record_was_written_is_not_made_again(tmp_path):
    ended = gd(result_path(tmp_path, "a"), lr=300.0, steps=200)
    record = work(Task("a", broken, {}), tmp_path)
    assert (record.state, record.status) == ("failed", ended.status.name)


def _hold(path, ready, go_on):
    with locked(path):
        ready.set()
        go_on.wait()


def test_a_lock_is_held_by_one_and_freed_by_death(tmp_path):
    path = tmp_path / "x.lock"
    assert holder(path) == ""
    context = multiprocessing.get_context("forkserver")
    ready, go_on = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(path, ready, go_on))
    process.start()
    ready.wait(60)
    assert f"process {process.pid} on " in holder(path)
    with locked(path) as mine:
        assert not mine
    process.kill()
    process.join()
    assert holder(path) == ""
    with locked(path) as mine:
        assert mine
        with locked(path) as twice:  # also within one process
            assert not twice


def wait_until(condition, patience=300.0):
    until = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_runs_killed_at_ten_moments_give_the_same_results(tmp_path):
    """At some gradient of a session, or in the midst of writing the file; with checkpoints, or with none."""
    draw, steps, reached, path = random.Random(0), 120, [0], result_path(tmp_path / "parts", "a")
    for turn in range(10):
        moment = {"writing": draw.randrange(2, 9)} if turn % 3 == 2 else {"gradient": draw.randrange(1, 60)}
        a = task("a", steps=steps, checkpoints=turn % 4 != 3, **moment)
        (record,) = sweep([a], tmp_path / "parts", workers=1, progress=False)
        assert (record.state, record.sessions) == ("unfinished", turn + 1)
        reached.append(len(dvi.load(path).t) if path.exists() else 0)
    assert reached == sorted(reached)  # nothing that a checkpoint held is lost
    assert len(set(reached)) > 5
    assert reached[-1] < steps + 1
    found = [sweep([task("a", steps=steps)], tmp_path / name, progress=False)[0] for name in ("whole", "parts")]
    assert [(record.state, record.sessions) for record in found] == [("done", 1), ("done", 11)]
    require_equal(result_path(tmp_path / "whole", "a"), path)


def two(folder, gate):
    """The sweep of two runs that wait for the gate half-way; its exit code is 0 if both were done."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell switches off for what runs behind it
    options = {"steps": 40, "checkpoints": True, "gradient": 25, "gate": gate}
    tasks = [task("a", **options), task("b", lr=0.1, **options)]
    sys.exit([record.state for record in sweep(tasks, folder, workers=2, progress=False)] != ["done", "done"])


@pytest.fixture
def start(tmp_path):
    """Starts ``two`` in a process of its own; whatever is left of it is ended."""
    begun, context = [], multiprocessing.get_context("forkserver")

    def begin(*args):
        begun.append(context.Process(target=two, args=args))
        begun[-1].start()
        return begun[-1]

    yield begin
    for process in begun:
        process.kill()
        process.join()


@pytest.mark.slow
def test_a_sweep_that_is_killed_leaves_no_workers_and_loses_nothing(tmp_path, start, monkeypatch):
    """Its workers write a last checkpoint and end; Ctrl-C does the same.  They wait at the gate until that comes."""
    folder, gate = tmp_path / "x", tmp_path / "gate"
    gate.touch()

    def at_work():
        return [bool(holder(lock_path(folder, name))) for name in "ab"]

    for number in (signal.SIGKILL, signal.SIGINT):
        process = start(folder, gate)
        wait_until(lambda: all(at_work()) and all(result_path(folder, name).exists() for name in "ab"))
        os.kill(process.pid, number)
        process.join(120)
        wait_until(lambda: not any(at_work()))
        assert [record.state for record in records(folder, "ab")] == ["unfinished"] * 2
        assert [dvi.load(result_path(folder, name)).status.name for name in "ab"] == ["INTERRUPTED"] * 2
    sessions = [record.sessions for record in records(folder, "ab")]
    other, met = start(folder, gate), set()
    wait_until(lambda: all(at_work()))

    def seen(path):
        """The gate opens when the sweep here has met both runs, which are the other one's until they are done."""
        found = holder(path)
        met.update([path] if found else [])
        if len(met) == 2:
            gate.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(processes, "holder", seen)
    found = sweep([task("a", steps=40), task("b", lr=0.1, steps=40)], folder, workers=2, progress=False)
    other.join(300)
    assert other.exitcode == 0
    assert [(record.state, record.sessions) for record in found] == [("done", n + 1) for n in sessions]
    sweep([task("a", steps=40), task("b", lr=0.1, steps=40)], tmp_path / "whole", progress=False)
    for name in "ab":
        require_equal(result_path(folder, name), result_path(tmp_path / "whole", name))


def test_jobs_of_a_cluster(tmp_path, monkeypatch):
    """On submitit's local executor, which calls jobs as Slurm does."""
    pytest.importorskip("submitit")
    places = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(places))
    slurm = Slurm(cluster="local", hours=0.05)
    done, died = sweep([task("a"), Task("killed", killed, {})], tmp_path, slurm=slurm, progress=False)
    assert (done.state, died.state) == ("done", "unfinished")
    assert died.message.startswith("Job ")
    assert dvi.load(result_path(tmp_path, "a")).status is dvi.Status.SUCCESS


def test_a_job_whose_run_cannot_be_made_says_so_in_its_record(tmp_path):
    from dvi.sweeps.cluster import Job

    assert Job()(Task("broken", broken, {}), tmp_path, 1) is True
    record = read_record(tmp_path, "broken")
    assert record.state == "error"
    assert "nothing works" in record.message


def test_what_a_job_asks_for(tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit")

    class Asked:
        def __init__(self, **settings):
            self.settings = settings

        def update_parameters(self, **given):
            self.given = given

    monkeypatch.setattr(submitit, "AutoExecutor", Asked)
    more = {"slurm_account": "physics"}
    slurm = Slurm(partition="gpu", hours=1.5, cards=2, cpus=3, mem_gb=8.0, at_once=7, more=more)
    assert slurm.executor(tmp_path).given == {
        "name": "dvi", "timeout_min": 90, "gpus_per_node": 2, "cpus_per_task": 3, "mem_gb": 8.0,
        "slurm_partition": "gpu", "slurm_array_parallelism": 7, "slurm_account": "physics",
    }  # fmt: skip
    assert {"mem_gb", "slurm_partition"}.isdisjoint(Slurm().executor(tmp_path).given)


def test_a_job_that_is_stopped_in_time_goes_on(tmp_path):
    """What submitit puts into the queue in its place makes the same run."""
    submitit = pytest.importorskip("submitit")
    from dvi.sweeps.cluster import Job

    again = Job().checkpoint(task("a"), tmp_path, 1)
    assert isinstance(again, submitit.helpers.DelayedSubmission)
    assert again.function(*again.args) is True
    assert read_record(tmp_path, "a").state == "done"


def test_without_slurm_or_submitit_it_is_said_what_to_do(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="sbatch"):
        sweep([task("a")], tmp_path, slurm=Slurm(), progress=False)
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ImportError, match=r"dvi-flows\[cluster\]"):
        sweep([task("a")], tmp_path, slurm=Slurm(), progress=False)
