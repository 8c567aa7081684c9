"""Results on disk and runs that stop: round trips, interruptions, full disks, failures with advice; devices, dtypes."""

import dataclasses
import errno
import itertools
import logging
import os
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
import torch

import dvi
from dvi.compiler.optimizer import Discrete
from dvi.methods import GradientDescent, RMSProp, RMSPropNorm
from dvi.problems import MatrixSweep, Quadratic
from dvi.results.run_error import RunError
from dvi.results.status import Status
from dvi.runs.observables import Observer
from dvi.runs.optimizer_process import DiscreteProcess
from dvi.runs.process import FlowProcess
from dvi.storage import hdf5 as store

compare_module = sys.modules["dvi.runs.comparing"]
STEPS = 6


def sweep(dtype=torch.float64):
    """Two eigenvalues enter at t = 0.53 and 0.90."""
    return MatrixSweep([1.0, 1.35], [0.37, 0.85], lr=0.7, seed=2, dtype=dtype).problem


def in_wells(w):
    """A small network: w = (a, b) and three scalars' worth of data; curved in every direction, nothing dead."""
    inputs = torch.tensor([[1.0, -0.5], [0.3, 0.8], [-0.6, 0.4]], dtype=w.dtype, device="cpu")
    targets = torch.tensor([0.7, -0.4, 0.5], dtype=w.dtype, device="cpu")
    return 0.5 * ((torch.tanh(inputs @ w[:2]) * w[2] + w[3] - targets) ** 2).mean()


def wells(dtype=torch.float64):
    return dvi.Problem(in_wells, torch.tensor([0.6, -0.3, 0.9, 0.1], dtype=dtype, device="cpu"))


RACES = {
    "gd": (sweep, GradientDescent(0.7)),
    "rmsprop": (wells, RMSProp(0.02, 0.9)),
    "rmsprop-norm, bias correction": (wells, RMSPropNorm(0.1, 0.9, 1e-6, True)),
}


def race(name, **options):
    make, method = RACES[name]
    options = {"integrator": dvi.Euler(0.25), "coordinates": (0, 1)} | options
    return dvi.compare(make(), method, STEPS, check=False, progress=False, **options)


def tell_apart(a, b, where=""):
    """The first difference between two results, bit for bit; '' if there is none."""
    if type(a) is not type(b):
        return f"{where}: {type(a).__name__} and {type(b).__name__}"
    if isinstance(a, torch.Tensor):
        return "" if a.dtype == b.dtype and torch.equal(a, b) else f"{where}: {a} and {b}"
    if isinstance(a, np.ndarray):
        same = a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
        return "" if same else f"{where}: {a} and {b}"
    if dataclasses.is_dataclass(a):
        a, b = ({f.name: getattr(x, f.name) for f in dataclasses.fields(x)} for x in (a, b))
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return f"{where}: {list(a)} and {list(b)}"
        return next(filter(None, (tell_apart(a[k], b[k], f"{where}.{k}") for k in a)), "")
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return f"{where}: {len(a)} and {len(b)} entries"
        return next(
            filter(None, (tell_apart(x, y, f"{where}[{i}]") for i, (x, y) in enumerate(zip(a, b, strict=True)))), ""
        )
    return "" if a == b else f"{where}: {a!r} and {b!r}"


@pytest.fixture(scope="module")
def whole():
    """Uninterrupted races, by name."""
    return {name: race(name) for name in RACES}


@pytest.fixture
def eager(monkeypatch):
    """Files are updated at every recorded moment: for the keeper no time passes, so no update is too dear."""
    monkeypatch.setattr(store.time, "monotonic", lambda: 0.0)


# ---- round trips --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RACES)
def test_a_comparison_comes_back_bit_for_bit(name, whole, tmp_path):
    path = tmp_path / "deep" / "folder" / "race.h5"
    whole[name].save(path)
    back = dvi.load(path)
    assert tell_apart(whole[name], back) == ""
    assert back.central.status is Status.SUCCESS
    assert back.distance[("discrete", "central")].shape == (STEPS + 1,)
    assert os.listdir(path.parent) == ["race.h5"]  # no temporary file is left


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_solution_comes_back_bit_for_bit(dtype, tmp_path):
    flow = dvi.central_flow(sweep(dtype), GradientDescent(0.7), check=False)
    solution = dvi.solve(flow, 3, integrator=dvi.Euler(0.25), save=("w",), coordinates=(1,), progress=False)
    assert solution.breakpoints
    solution.notes.append("a note with ν, “quotes” and\na second line")
    solution.about["seeds"] = [1, 2, None]
    solution.save(tmp_path / "s.h5")
    back = dvi.load(tmp_path / "s.h5")
    assert tell_apart(solution, back) == ""
    assert back.w.dtype == dtype
    assert back.ledger.gradient_equivalents == solution.ledger.gradient_equivalents
    assert np.array_equal(back.k, solution.k)


def test_a_state_of_any_structure_comes_back(tmp_path):
    triple = (
        lambda w: (torch.zeros_like(w), {"n": w.new_zeros(()), "m": [w.new_zeros(2, 3)]}),
        lambda nu, g: (0.1 * (g**2 - nu[0]), {"n": torch.ones_like(nu[1]["n"]), "m": [-0.1 * nu[1]["m"][0]]}),
        lambda nu: dvi.Diagonal((nu[0] ** 0.5 + 0.1) / 0.05),
    )
    solution = dvi.solve(dvi.discrete(wells(), triple), 3, progress=False)
    solution.save(tmp_path / "s.h5")
    assert tell_apart(solution.nu, dvi.load(tmp_path / "s.h5").nu) == ""


def test_a_run_that_failed_at_once_can_be_saved_too(tmp_path):
    path = tmp_path / "failed.h5"
    result = dvi.compare(
        steep(), GradientDescent(LR), 5, warm_start=0, check=False, progress=False, throw=False, path=path
    )
    assert result.status is Status.INFEASIBLE_START
    assert tell_apart(result, dvi.load(path)) == ""


# ---- interruptions ------------------------------------------------------------------------------------------------


class Stop(Exception):
    """Something that no part of the library knows."""


def stop_at(monkeypatch, owner, name, count, error=Stop):
    """Let owner.name fail when it is called for the count-th time."""
    original, calls = getattr(owner, name), itertools.count(1)

    def failing(*args, **kwargs):
        if next(calls) == count:
            raise error()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)


PLACES = {
    "before the first moment": (compare_module, "distance_between", 1),
    "between two distances": (compare_module, "distance_between", 5),
    "at the last moment": (compare_module, "distance_between", 3 * STEPS + 2),
    "in the optimizer": (DiscreteProcess, "advance", 3),
    "in a flow": (FlowProcess, "advance", 12),
    "late in a flow": (FlowProcess, "advance", 17),
    "in the loss": (dvi.Problem, "value_and_grad", 23),
    "while writing": (store, "save", 3),
    "while replacing": (os, "replace", 4),
}


# With a state ν there is more to store, wherever a run is stopped: in the optimizer, a flow, or while writing.
STOPPED = [("gd", place) for place in PLACES]
STOPPED += [("rmsprop", place) for place in ("in the optimizer", "in a flow", "in the loss", "while writing")]


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(("name", "place"), STOPPED)
def test_a_run_that_was_stopped_goes_on_to_the_same_result(name, place, whole, tmp_path):
    path = tmp_path / "race.h5"
    owner, function, count = PLACES[place]
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, owner, function, count)
        with pytest.raises(Stop):
            race(name, path=path, checkpoint_every=0)
    if path.exists():
        left = dvi.load(path)
        assert left.status is Status.RUNNING
        n = len(left.t)
        assert 1 <= n <= STEPS + 1
        for pair, values in left.distance.items():  # what is there is the beginning of the whole
            assert np.array_equal(values, whole[name].distance[pair][:n])
    result = race(name, path=path, checkpoint_every=0, resume=True)
    assert tell_apart(whole[name], result) == ""
    assert tell_apart(whole[name], dvi.load(path)) == ""
    # and a finished run goes on to nothing new
    assert tell_apart(whole[name], race(name, path=path, checkpoint_every=0, resume=True)) == ""


@pytest.mark.usefixtures("eager")
def test_a_run_may_be_stopped_again_and_again(whole, tmp_path):
    path = tmp_path / "race.h5"
    for _ in range(4):
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, compare_module, "distance_between", 5)
            with pytest.raises(Stop):
                race("gd", path=path, checkpoint_every=0, resume=path.exists())
    assert tell_apart(whole["gd"], race("gd", path=path, checkpoint_every=0, resume=True)) == ""


CTRL_C = {
    "between two distances": (compare_module, "distance_between", 8),
    "in a flow, after its step": (Observer, "observe_outputs", 5),
    "in the loss": (dvi.Problem, "value_and_grad", 23),
    "in the optimizer": (Discrete, "step", 3),
}


@pytest.mark.parametrize("every", [0, 1e6])
@pytest.mark.parametrize("place", CTRL_C)
def test_ctrl_c_leaves_a_file_to_go_on_from(place, every, whole, tmp_path):
    """Wherever it strikes, and also before the first checkpoint was due: "continue from its file with resume"."""
    path = tmp_path / "race.h5"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store.time, "monotonic", lambda: 0.0)
        stop_at(patch, *CTRL_C[place], KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            race("gd", path=path, checkpoint_every=every)
    assert dvi.load(path).status is Status.INTERRUPTED
    assert tell_apart(whole["gd"], race("gd", path=path, resume=True)) == ""


@pytest.mark.usefixtures("eager")
def test_a_warm_start_is_not_repeated_nor_forgotten(tmp_path):
    path = tmp_path / "race.h5"
    reference = race("rmsprop", warm_start=3)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, compare_module, "distance_between", 8)
        with pytest.raises(Stop):
            race("rmsprop", warm_start=3, path=path, checkpoint_every=0)
    result = race("rmsprop", warm_start=3, path=path, checkpoint_every=0, resume=True)
    assert tell_apart(reference, result) == ""


@pytest.mark.usefixtures("eager")
def test_a_run_with_a_schedule_goes_on_too(tmp_path):
    """A schedule has no other name than its address in memory, which is another in the next session."""

    def run(**options):
        method = GradientDescent(lambda t: 0.7 / (1 + 0.01 * t))
        return dvi.compare(sweep(), method, 4, check=False, progress=False, integrator=dvi.Euler(0.25), **options)

    path = tmp_path / "race.h5"
    reference = run()
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, compare_module, "distance_between", 8)
        with pytest.raises(Stop):
            run(path=path, checkpoint_every=0)
    result = run(path=path, checkpoint_every=0, resume=True)
    for pair, values in reference.distance.items():
        assert np.array_equal(values, result.distance[pair])


OTHER_RUNS = {
    "method": {"method": GradientDescent(0.69)},
    "problem": {"problem": lambda: MatrixSweep([1.0, 1.35], [0.37, 0.85], 0.7, seed=3).problem},
    "start": {"problem": lambda: sweep().starting_at(sweep().w0 + 0.01)},
    "fewer steps": {"steps": 3},
    "another method for longer": {"steps": 5, "method": GradientDescent(0.69)},
    "save_every": {"save_every": 0.5},
    "runs": {"runs": ("discrete", "central")},
    "integrator": {"integrator": dvi.Euler(0.125)},
    "coordinates": {"coordinates": (0,)},
    "warm_start": {"warm_start": 3},
}


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("what", OTHER_RUNS)
def test_a_file_of_another_run_is_not_gone_on_from(what, tmp_path):
    path = tmp_path / "race.h5"
    usual = {"steps": 4, "integrator": dvi.Euler(0.25), "coordinates": (0, 1), "save_every": 1, "warm_start": 0}

    def run(problem=sweep, method=GradientDescent(0.7), resume=False, **options):  # noqa: B008
        options = usual | options
        return dvi.compare(
            problem(), method, check=False, progress=False, path=path, checkpoint_every=0, resume=resume, **options
        )

    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, compare_module, "distance_between", 8)
        with pytest.raises(Stop):
            run()
    before = path.read_bytes()
    with pytest.raises(dvi.StoreError, match=r"another run"):
        run(resume=True, **OTHER_RUNS[what])
    assert path.read_bytes() == before


class NoHorizon(dvi.Euler):
    """An integrator that does not say how near the end decides about a step."""

    horizon = dvi.solvers.IntegratorBase.horizon


LONGER = {
    "euler": {"integrator": dvi.Euler(0.25)},
    "steps that do not divide 1": {"integrator": dvi.Euler(0.4), "save_every": 2},
    "macro": {"integrator": dvi.MacroStep(tol=1e-2, h_max=2.0)},
    "runge-kutta": {"integrator": dvi.RungeKutta(2, tol=1e-2)},
    "no horizon": {"integrator": NoHorizon(0.25)},
    "optimizer alone": {"runs": ("discrete",), "integrator": None},
}


@pytest.mark.parametrize(
    ("name", "what"), [*(("gd", what) for what in LONGER), ("rmsprop", "euler"), ("rmsprop", "macro")]
)
def test_a_finished_run_can_be_made_longer_bit_for_bit(name, what, tmp_path, monkeypatch):
    """Also twice, after an interruption, and where the end was no multiple of save_every."""
    make, method = RACES[name]
    path = tmp_path / "race.h5"

    def run(steps, **options):
        options = LONGER[what] | options
        return dvi.compare(make(), method, steps, check=False, progress=False, **options)

    whole, keep = run(9), {"path": path, "checkpoint_every": 0, "resume": True}
    assert run(3, **keep).status is Status.SUCCESS
    assert run(5, **keep).status is Status.SUCCESS
    if what == "euler":
        with monkeypatch.context() as patch:
            stop_at(patch, FlowProcess, "advance", 10)
            patch.setattr(store.time, "monotonic", lambda: 0.0)
            with pytest.raises(Stop):
                run(7, **keep)
    longer = run(9, **keep)
    assert tell_apart(whole, longer) == ""
    assert tell_apart(whole, dvi.load(path)) == ""
    with pytest.raises(dvi.StoreError, match=r"of 9 steps, but 5 are asked for.*as many steps or more"):
        run(5, **keep)


def test_little_is_computed_again(tmp_path):
    """Of a run of forty steps only what lies within the horizon of its end, and not the forty."""
    make, method = RACES["gd"]
    problem, keep = make(), {"path": tmp_path / "race.h5", "resume": True, "check": False, "progress": False}
    options = {"integrator": dvi.Euler(0.25), "eigen_every": 0, "runs": ("discrete", "central")}
    dvi.compare(problem, method, 40, **options, **keep)
    before = problem.ledger.copy()
    dvi.compare(problem, method, 41, **options, **keep)
    # a unit costs the optimizer one gradient and the flow four; at most three units are made, and a few looks at ends
    assert 5 <= (problem.ledger - before).counts["gradients"] <= 3 * 5 + 5


def test_resume_without_a_path_or_without_a_checkpoint(tmp_path, whole):
    with pytest.raises(ValueError, match="path"):
        race("gd", resume=True)
    whole["gd"].save(tmp_path / "saved.h5")
    with pytest.raises(dvi.StoreError, match="checkpoint"):
        race("gd", path=tmp_path / "saved.h5", resume=True)
    # a file that is not there is simply a beginning
    fresh = race("gd", path=tmp_path / "new.h5", resume=True)
    assert tell_apart(whole["gd"], fresh) == ""


KILLED = """
import sys, torch, dvi, time
from dvi.storage import hdf5 as store
from dvi.methods import GradientDescent
from dvi.problems import MatrixSweep
torch.set_num_threads(1)
store.time.monotonic = lambda: 0.0
problem = MatrixSweep([1.0, 1.35], [0.37, 0.85], lr=0.7, seed=2).problem
dvi.compare(problem, GradientDescent(0.7), 4000, check=False, progress=False, integrator=dvi.Euler(0.25),
            path=sys.argv[1], checkpoint_every=0, eigen_every=0)
"""


@pytest.mark.parametrize("moment", [0.03, 0.6, 1.3])
def test_a_killed_process_leaves_a_whole_file(moment, tmp_path):
    path = tmp_path / "race.h5"
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        deadline = time.time() + 60
        while not path.exists() and time.time() < deadline:
            assert child.poll() is None
            time.sleep(0.01)
        time.sleep(moment)
        assert child.poll() is None
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    left = dvi.load(path)
    assert left.status is Status.RUNNING
    n = len(left.t)
    assert n >= 1
    assert all(len(values) == n for values in left.distance.values())
    assert np.isfinite(left.central.loss).all()
    with h5py.File(path) as file:
        assert "checkpoint" in file


# ---- disks ---------------------------------------------------------------------------------------------------------


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


FULL = {
    "while opening": (h5py, "File"),
    "while writing": (h5py.Group, "create_dataset"),
    "while flushing": (os, "fsync"),
    "while replacing": (os, "replace"),
}


@pytest.mark.parametrize("when", FULL)
def test_a_full_disk_leaves_the_earlier_file(when, whole, tmp_path):
    path = tmp_path / "race.h5"
    whole["gd"].save(path)
    before = path.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*FULL[when], full)
        with pytest.raises(dvi.StoreError, match=r"No space left.*earlier is intact.*Free some space"):
            whole["rmsprop"].save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["race.h5"]


def test_a_disk_that_fills_up_during_a_run_costs_neither_the_run_nor_its_result(whole, tmp_path, caplog, eager):
    path = tmp_path / "race.h5"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", full)
        with caplog.at_level(logging.WARNING, "dvi"), pytest.raises(dvi.StoreError) as caught:
            race("gd", path=path, checkpoint_every=0)
    assert "The run goes on" in caplog.text
    assert tell_apart(whole["gd"], caught.value.result) == ""
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_made(whole, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(dvi.StoreError, match="another path"):
        whole["gd"].save(tmp_path / "file" / "race.h5")


@pytest.mark.parametrize("part", [0, 1, 7, 100, 2000, 0.3, 0.6, 0.9, 0.999])
def test_a_truncated_file_is_an_error_in_words(part, whole, tmp_path):
    path = tmp_path / "race.h5"
    whole["gd"].save(path)
    data = path.read_bytes()
    path.write_bytes(data[: part if isinstance(part, int) else int(part * len(data))])
    with pytest.raises(dvi.StoreError, match=r"truncated|damaged"):
        dvi.load(path)


@pytest.mark.parametrize(
    "dataset", ["runs/central/w", "runs/discrete/loss", "runs/central/nu", "t", "distance/discrete--central"]
)
def test_a_rotten_bit_is_found(dataset, whole, tmp_path):
    path = tmp_path / "race.h5"
    whole["rmsprop"].save(path)
    with h5py.File(path) as file:
        chunk = file[dataset].id.get_chunk_info(0)
    data = bytearray(path.read_bytes())
    data[chunk.byte_offset + chunk.size // 3] ^= 4
    path.write_bytes(data)
    with pytest.raises(dvi.StoreError, match="damaged"):
        dvi.load(path)


def test_what_is_not_ours_is_refused(tmp_path):
    with pytest.raises(dvi.StoreError, match="does not exist"):
        dvi.load(tmp_path / "none.h5")
    (tmp_path / "text.h5").write_text("loss, time\n1, 2\n")
    with pytest.raises(dvi.StoreError, match="not an HDF5 file"):
        dvi.load(tmp_path / "text.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["weights"] = np.ones(3)
    with pytest.raises(dvi.StoreError, match="not a result"):
        dvi.load(tmp_path / "other.h5")
    with h5py.File(tmp_path / "later.h5", "w") as file:
        file.attrs["dvi_format"] = store.FORMAT + 1
    with pytest.raises(dvi.StoreError, match="this version"):
        dvi.load(tmp_path / "later.h5")
    with h5py.File(tmp_path / "hollow.h5", "w") as file:
        file.attrs["dvi_format"] = store.FORMAT
    with pytest.raises(dvi.StoreError, match="damaged"):
        dvi.load(tmp_path / "hollow.h5")
    with pytest.raises(dvi.StoreError):
        dvi.load(tmp_path)  # a folder


def test_a_checkpoint_runs_no_code(tmp_path):
    from dvi.storage.checkpoint import from_bytes, thaw

    with pytest.raises(ValueError, match="not part of dvi"):
        thaw({"__class__": "subprocess:Popen", "fields": {"args": "true"}})
    import io
    import pickle

    buffer = io.BytesIO()
    torch.save({"x": os.system}, buffer)
    with pytest.raises(pickle.UnpicklingError):
        from_bytes(buffer.getvalue())


# ---- runs that cannot go on ------------------------------------------------------------------------------------------

LR = 0.45


def steep():
    """L = ½(ab − 1)² from a = 2.3, b = 0.4: effective sharpness 2.5 at LR, where gradient descent settles elsewhere."""
    return dvi.Problem(lambda w: 0.5 * (w[0] * w[1] - 1) ** 2, torch.tensor([2.3, 0.4], dtype=torch.float64))


def test_warm_start_auto_brings_the_sharpness_below_2_and_is_told(caplog):
    method = GradientDescent(LR)
    with caplog.at_level(logging.WARNING, "dvi"):
        result = dvi.compare(steep(), method, 4, check=False, progress=False, integrator=dvi.Euler(0.25))
    told = [note for note in result.notes if "Warm start" in note]
    assert len(told) == 1
    assert "steps of the real optimizer" in told[0]
    assert told[0] in caplog.text
    assert result.central.eigenvalues[0, 0] <= 2
    steps = int(told[0].split("Warm start: ")[1].split()[0])
    assert steps >= 1
    # time 0 is after those steps of the optimizer itself
    w, problem = steep().w0, steep()
    for _ in range(steps):
        w = w - LR * problem.value_and_grad(w)[1]
    assert result.discrete.loss[0] == pytest.approx(float(problem.value(w)), rel=1e-12)
    assert result.central.loss[0] == pytest.approx(float(problem.value(w)), rel=1e-12)
    # a start below 2 is left alone
    quiet = dvi.compare(wells(), GradientDescent(0.1), 2, check=False, progress=False)
    assert not quiet.notes


def test_a_flow_is_solved_twice_in_any_order_with_equal_results_and_notes():
    """What one run has to tell is not told by the next."""
    flow = dvi.central_flow(wells(), GradientDescent(0.1), check=False)
    plain = dvi.solve(flow, 3, progress=False)
    warm = dvi.solve(flow, 3, warm_start=2, progress=False)
    for again, before in (
        (dvi.solve(flow, 3, progress=False), plain),
        (dvi.solve(flow, 3, warm_start=2, progress=False), warm),
    ):
        assert again.notes == before.notes
        assert np.array_equal(again.loss, before.loss)
        assert torch.equal(again.w, before.w)
    assert not plain.notes
    assert "Warm start: 2 steps" in warm.notes[0]
    assert not flow.notes


def test_an_infeasible_start_is_an_error_with_a_remedy():
    flow = dvi.central_flow(steep(), GradientDescent(LR), check=False)
    with pytest.raises(RunError, match="warm_start") as caught:
        dvi.solve(flow, 3, progress=False)
    assert caught.value.status is Status.INFEASIBLE_START
    assert isinstance(caught.value.result, dvi.Solution)
    solution = dvi.solve(flow, 3, progress=False, throw=False)
    assert solution.status is Status.INFEASIBLE_START
    assert "warm_start" in str(solution.status)
    with pytest.raises(ValueError, match="before its first step"):
        solution.ledger.per_unit_time()
    settled = dvi.solve(flow, 3, progress=False, warm_start="auto")
    assert settled.status is Status.SUCCESS


def test_warm_start_auto_gives_up_on_what_never_settles():
    flow = dvi.central_flow(Quadratic([1.0, 3.0], seed=0).problem, GradientDescent(0.7), check=False)
    with pytest.raises(RunError) as caught:
        dvi.solve(flow, 3, warm_start="auto", progress=False)
    assert caught.value.status in (Status.INFEASIBLE_START, Status.DIVERGED)


@pytest.mark.parametrize("integrator", [dvi.Euler(0.25), None], ids=["euler", "default"])
def test_a_quadratic_whose_sharpness_reaches_2_has_no_solution(integrator):
    """A learning rate that grows brings λη to 2 at t = 5; there is no third derivative to hold it there."""
    problem = Quadratic([1.0, 0.5], seed=1).problem
    flow = dvi.central_flow(problem, GradientDescent(lambda t: 1.5 + 0.1 * t), check=False)
    solution = dvi.solve(flow, 10, integrator=integrator, progress=False, throw=False)
    assert solution.status is Status.NO_SOLUTION
    assert "quadratic" in str(solution.status)
    assert "third derivative" in str(solution.status)
    # what came before is there, up to the step that finds no solution; Euler's ends at most dt and half a unit early
    assert (4.0 if integrator else 1.0) <= solution.t[-1] <= 5.0
    assert np.isfinite(solution.loss).all()
    with pytest.raises(RunError, match="no solution"):
        dvi.solve(flow, 10, integrator=integrator, progress=False)
    # the discrete optimizer diverges in earnest soon after: also a status, with what came before
    race = dvi.compare(
        problem,
        GradientDescent(lambda t: 1.5 + 0.1 * t),
        10,
        check=False,
        throw=False,
        progress=False,
        integrator=integrator,
    )
    assert race.status is Status.NO_SOLUTION
    assert 1 <= len(race.t) <= 7


def test_a_diverging_optimizer_is_told():
    problem = dvi.Problem(lambda w: (w**4).sum(), torch.full((2,), 3.0, dtype=torch.float64))
    solution = dvi.solve(dvi.discrete(problem, GradientDescent(0.5)), 50, progress=False, throw=False)
    assert solution.status is Status.DIVERGED
    assert "Lower lr" in str(solution.status)
    assert len(solution.t) >= 1
    assert np.isfinite(solution.loss).all()


def test_every_status_is_a_sentence_with_advice():
    for status in Status:
        assert str(status).endswith(".")
        assert len(str(status)) > 20


# ---- dead weights --------------------------------------------------------------------------------------------------


def half_dead(dead=2):
    """Weights from the fifth on reach nothing: gradient, ν and Hessian rows are zero there for ever."""
    w0 = torch.cat([wells().w0, torch.linspace(0.3, -0.2, dead, dtype=torch.float64)])
    return dvi.Problem(lambda w: in_wells(w[:4]), w0)


# numbers of dead weights that no other test has: what is logged is logged once in a process
@pytest.mark.parametrize(("integrator", "dead"), [(dvi.Euler(0.25), 7), (None, 8)], ids=["euler", "default"])
def test_dead_weights_stay_and_are_told_once(integrator, dead, caplog):
    problem = half_dead(dead)
    with caplog.at_level(logging.WARNING, "dvi"):
        result = dvi.compare(
            problem, RMSProp(0.02, 0.9), 8, check=False, progress=False, coordinates=(0, 5), integrator=integrator
        )
    told = [note for note in result.notes if "zero gradient" in note]
    assert len(told) == 1
    assert f"{dead} of {4 + dead} weights" in told[0]
    assert caplog.text.count("zero gradient") == 1
    for solution in result.runs.values():
        # a step adds P⁻¹ 0 = 0; Chebyshev stages and the midpoint form sums whose weights add to 1 up to rounding
        assert torch.allclose(solution.w[4:], problem.w0[4:], rtol=1e-14, atol=0)
        assert torch.isfinite(solution.w).all()
        assert torch.equal(solution.nu["v"][4:], torch.zeros(dead, dtype=torch.float64))
        for name, values in solution.series.items():
            assert np.isfinite(values).all() or name == "next_term", name  # which is measured at few times
        assert np.isfinite(solution.loss).all()
    # the same run as without them
    alone = dvi.compare(
        wells(), RMSProp(0.02, 0.9), 8, check=False, progress=False, coordinates=(0,), integrator=integrator
    )
    for name, solution in alone.runs.items():
        # eigenvectors start from random vectors of another length: equal to what they are asked for, and its square
        np.testing.assert_allclose(result.runs[name].loss, solution.loss, rtol=1e-5)
        assert torch.allclose(result.runs[name].w[:4], solution.w, rtol=1e-4, atol=1e-5)


def test_dead_weights_at_the_edge_give_a_finite_symmetric_beta():
    flow = dvi.central_flow(half_dead(), RMSProp(0.02, 0.9), check=False)
    y = flow.initial
    U = torch.zeros(6, 2, dtype=torch.float64)
    U[0, 0] = U[1, 1] = 1
    lin = flow.linearise(y.w, y.nu, U)
    assert torch.isfinite(lin.alpha).all()
    assert torch.isfinite(lin.beta).all()
    alone = dvi.central_flow(wells(), RMSProp(0.02, 0.9), check=False)
    other = alone.linearise(alone.initial.w, alone.initial.nu, U[:4].contiguous())
    torch.testing.assert_close(lin.alpha, other.alpha, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lin.beta, other.beta, rtol=1e-12, atol=1e-12)


# ---- devices and dtypes ---------------------------------------------------------------------------------------------


class Coupled(dvi.Method):
    """A spec whose ∂f/∂ν is not diagonal."""

    lr: float = 0.05

    def init(self, w):
        return {"v": torch.zeros_like(w)}

    def f(self, nu, g):
        return {"v": 0.1 * (g**2 - nu["v"]) + 0.05 * (nu["v"].mean() - nu["v"])}

    def P(self, nu):
        return dvi.Diagonal((nu["v"].sqrt() + 0.05) / self.lr)


METHODS = {
    "gd": GradientDescent(0.7),
    "gd, scheduled": GradientDescent(lambda t: 0.7 / (1 + 0.01 * t)),
    "rmsprop": RMSProp(0.02, 0.9, bias_correction=True),
    "rmsprop-norm": RMSPropNorm(0.1, 0.9, lambda t: 0.01),
    "coupled": Coupled(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_explicit_tensors_decide_device_and_dtype(name, dtype, tmp_path):
    make = sweep if name.startswith("gd") else wells

    def run(path):
        return dvi.compare(
            make(dtype), METHODS[name], 3, check=False, progress=False, coordinates=(0,), integrator=dvi.Euler(0.25),
            path=path, checkpoint_every=0,
        )  # fmt: skip

    reference = run(tmp_path / "reference.h5")
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64 if dtype == torch.float32 else torch.float32)
    try:
        result = run(tmp_path / "race.h5")
        back = dvi.load(tmp_path / "race.h5")
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert tell_apart(reference, result) == ""
    assert tell_apart(result, back) == ""
    assert result.central.w.dtype == dtype
    assert result.central.w.device.type == "cpu"
