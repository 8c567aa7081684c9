"""The shell commands, called as functions: what they write, print and return."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import dvi
from dvi import cli
from dvi.runs import comparing

pytest.importorskip("tyro")
from dvi.cli.names import KINDS

pytest.importorskip("h5py")
pytest.importorskip("matplotlib")

SMALL = ["--n", "20", "--width", "4"]
TINY = ["--problem", "digits-mlp", "--n", "20", "--classes", "3", "--width", "4", "--method", "gd", "--lr", "0.05"]


def compare(folder, *flags, steps=4):
    return cli.main(["compare", *TINY, "--steps", str(steps), "--out", str(folder), "--quiet", *flags])


def rejected(capsys, *flags):
    """The exit code and what is on stderr: one message in words, from us or from the reader of flags."""
    try:
        code = cli.main([*flags])
    except SystemExit as stopped:
        code = stopped.code
    told = capsys.readouterr().err
    assert told.startswith(("dvi: ", "╭─", " "))
    assert "Traceback" not in told
    return code, " ".join(told.replace("│", " ").split())


def contents(path):
    """Everything in a file, by name; the checkpoint, which says when it was taken, aside."""
    import h5py

    found = {}
    with h5py.File(path) as file:

        def visit(name, item):
            found.update({f"{name}@{key}": value for key, value in item.attrs.items()})
            if isinstance(item, h5py.Dataset) and name != "checkpoint":
                found[name] = item[()]

        visit("", file)
        file.visititems(visit)
    return found


def test_compare_plot_info(tmp_path, capsys):
    folder = tmp_path / "a"
    assert compare(folder) == 0
    assert capsys.readouterr().out == ""
    race = dvi.load(folder / "race.h5")
    assert race.status is dvi.Status.SUCCESS
    assert list(race.runs) == ["discrete", "central", "stable"]
    assert race.about["method"] == "GradientDescent(lr=0.05)"
    assert (folder / "race.png").exists()

    assert cli.main(["info", str(folder / "race.h5")]) == 0
    told = capsys.readouterr().out
    assert "a comparison, SUCCESS" in told
    assert "method: GradientDescent(lr=0.05)" in told
    assert "distance discrete–central" in told

    (folder / "race.png").unlink()
    assert cli.main(["plot", str(folder / "race.h5")]) == 0
    assert (folder / "race.png").exists()
    assert cli.main(["plot", str(folder / "race.h5"), "--out", str(tmp_path / "figure.svg"), "--sigma", "2"]) == 0
    assert (tmp_path / "figure.svg").exists()


def test_summary_and_default_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--runs", "discrete", "stable", "--steps", "3", "--no-plot"]
    assert cli.main(["compare", *TINY, *flags]) == 0
    told = capsys.readouterr().out
    assert "train loss" in told
    assert "written: runs/digits-mlp-gd/race.h5" in told
    assert not (tmp_path / "runs/digits-mlp-gd/race.png").exists()


def test_several_pictures_into_a_folder(tmp_path):
    for name in ("a", "b"):
        assert compare(tmp_path / name, "--runs", "discrete", "--no-plot") == 0
    files = [str(tmp_path / name / "race.h5") for name in ("a", "b")]
    assert cli.main(["plot", *files, "--out", str(tmp_path / "figures")]) == 0
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == ["a-race.png", "b-race.png"]


def test_solution_files(tmp_path, capsys):
    problem = dvi.problems.digits(n=20, classes=3, width=4)
    solution = dvi.solve(dvi.discrete(problem, dvi.methods.GradientDescent(lr=0.05)), steps=3, progress=False)
    solution.save(tmp_path / "one.h5")
    assert cli.main(["plot", str(tmp_path / "one.h5")]) == 0
    assert cli.main(["info", str(tmp_path / "one.h5")]) == 0
    assert "a solution, SUCCESS" in capsys.readouterr().out


def ran(folder, *flags):
    """What a short run of the optimizer alone says about itself."""
    flags = ["--runs", "discrete", "--eigen-every", "0", "--no-plot", "--warm-start", "0", *flags]
    assert cli.main(["compare", *SMALL, "--steps", "1", "--out", str(folder), "--quiet", "--overwrite", *flags]) == 0
    return dvi.load(folder / "race.h5").about


@pytest.mark.parametrize(
    ("flags", "method"),
    [
        (["--method", "gd", "--lr", "0.5"], "GradientDescent(lr=0.5)"),
        ([], "RMSProp(lr=0.001, beta2=0.99, eps=0.0, bias_correction=False)"),
        (
            ["--lr", "2e-3", "--eps", "1e-7", "--bias-correction"],
            "RMSProp(lr=0.002, beta2=0.99, eps=1e-07, bias_correction=True)",
        ),
        (
            ["--method.lr=2e-3", "--method.beta2", "0.9", "--no-bias-correction"],
            "RMSProp(lr=0.002, beta2=0.9, eps=0.0, bias_correction=False)",
        ),
        (["--method", "heavy-ball", "--momentum", "0.5"], "HeavyBall(lr=0.001, momentum=0.5)"),
        (
            ["--method=adam", "--method.lr", "1e-3", "--method.no-bias-correction"],
            "Adam(lr=0.001, beta1=0.9, beta2=0.999, eps=1e-08, bias_correction=False)",
        ),
    ],
)
def test_hyperparameters_reach_the_method(tmp_path, flags, method):
    assert ran(tmp_path, *flags)["method"] == method


def test_every_method_runs_with_its_defaults(tmp_path):
    for name in KINDS["method"].table:
        assert ran(tmp_path, "--method", name)["method"].split("(")[0] == KINDS["method"].table[name].__name__


@pytest.mark.parametrize(
    ("flags", "integrator"),
    [
        ([], "MacroStep(tol=None"),
        (["--tol", "1e-4"], "MacroStep(tol=0.0001"),
        (["--method", "adam", "--tol", "1e-4"], "SemiImplicit(dt=0.5, tol=0.0001"),
        (["--method", "adam", "--accuracy", "paper", "--tol", "1e-4"], "MacroStep(tol=0.0001"),
        (["--accuracy", "second-order", "--integrator", "semi-implicit", "--dt", "0.25"], "SemiImplicit(dt=0.25"),
        (["--integrator", "euler", "--dt", "0.5"], "Euler(dt=0.5"),
        (["--integrator", "macro-step", "--h-max", "4"], "MacroStep(tol=None, h_min=0.00390625, h_max=4.0"),
        (["--integrator", "rk", "--integrator.order", "2", "--tol", "1e-4"], "RungeKutta(order=2, tol=0.0001"),
        (["--integrator", "torchdiffeq", "--integrator.method", "midpoint"], "TorchDiffEq(method='midpoint'"),
    ],
)
def test_integrators_reach_the_central_flow(tmp_path, flags, integrator):
    assert compare(tmp_path, "--runs", "central", "--no-plot", *flags, steps=1) == 0
    assert dvi.load(tmp_path / "race.h5").central.about["integrator"].startswith(integrator)


# Those with pictures, which have no --width, are in tests/test_pictures.py.
@pytest.mark.parametrize("name", [name for name in KINDS["problem"].table if name not in ("fashion", "cifar10")])
def test_every_problem_can_be_made(tmp_path, name):
    flags = ["--n", "4", "--width", "6", "--dtype", "float32", "--lr", "1e-4"]
    flags += ["--eps", "1e-8"]  # in float32 the squares of Mamba's smallest gradients are zero
    about = ran(tmp_path, "--problem", name, *flags)
    assert f"'{name}" in about["problem"]
    assert "torch.float32" in about["problem"]


def test_derivatives_and_device_reach_the_problem(tmp_path, capsys):
    ran(tmp_path, "--derivatives", "finite-difference", "--device", "cpu")
    told = rejected(capsys, "compare", *SMALL, "--out", str(tmp_path / "b"), "--problem.device", "abacus")[1]
    assert "no device 'abacus'" in told


# ---- the user's own -------------------------------------------------------------------------------------

OWN = """
from __future__ import annotations

import torch

import beside
import dvi

problem = dvi.Problem(lambda w: 0.5 * (w**2 * torch.tensor([1.0, 3.0])).sum() + (w**4).sum(), torch.tensor([0.4, 0.3]))
triple = (lambda w: {}, lambda nu, g: {}, lambda nu: dvi.Scalar(10.0 * torch.ones(())))
ready = dvi.methods.GradientDescent(lr=0.07)
steps = dvi.Euler(0.5)
number = 3


def make():
    return problem


def sized(n: int, slope=0.5, deep: bool = False, places: tuple[int, ...] = (), loss=None):
    \"\"\"A problem of n weights.

    Args:
        n: how many weights.
    \"\"\"
    return dvi.Problem(lambda w: 0.5 * slope * (w**2).sum(), torch.ones(n), name=f"sized-{n}-{slope}-{deep}-{places}")


class Adagrad(dvi.Method):
    \"\"\"AdaGrad as I understand it.

    Args:
        lr: my learning rate.
    \"\"\"

    lr: float
    eps: float = 1e-8
    memory_of: torch.Tensor | None = None

    def init(self, w):
        return {"s": torch.zeros_like(w)}

    def f(self, nu, g):
        return {"s": g**2}

    def P(self, nu):
        return dvi.Diagonal((nu["s"].sqrt() + self.eps) / self.lr)


class MyAdam(dvi.methods.Adam):
    pass


class Wants(dvi.Method):
    lr: float
    table: torch.Tensor

    def P(self, nu):
        return dvi.Scalar(1 / self.lr)


def decay(t):
    return 0.1 * 0.5 ** (t / 100)


def fails():
    return 1 / 0


def awkward(help=1, out=2.0, no_plot: bool = False, method: int = 0, device: torch.device | str = "cpu"):
    return dvi.Problem(lambda w: (w**2).sum(), torch.ones(2), name=f"awkward-{help}-{out}-{no_plot}-{method}-{device}")


class Scheduled(dvi.Method):
    lr: dvi.methods.Hyperparameter = lambda t: 0.05 / (1 + t)
    table: dvi.methods.Hyperparameter = torch.eye(2)

    def P(self, nu):
        return dvi.Scalar(1 / self.lr)


class Slips(dvi.Method):
    lr: float = 0.01

    def P(self, nu):
        return dvi.Scalar(1 / self.rate)  # there is none


def no_problem():
    return 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with files of the user's, which is the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "own.py").write_text(OWN)
    (tmp_path / "files" / "beside.py").write_text("")
    (tmp_path / "files" / "raises.py").write_text("x = 1\nraise KeyError('beta')\n")
    (tmp_path / "files" / "leaves.py").write_text("import sys\nsys.exit(3)\n")
    (tmp_path / "files" / "wrong.py").write_text("x = 1\nx = = 2\n")
    (tmp_path / "files" / "json.py").write_text("from own import ready\n")
    (tmp_path / f"mine_{tmp_path.name}").mkdir()
    (tmp_path / f"mine_{tmp_path.name}" / "problems.py").write_text(OWN.replace("import beside\n", ""))
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "problem", "method"),
    [
        (["--problem", "files/own.py:problem"], "Problem('<lambda>', dim=2", "GradientDescent(lr=0.05)"),
        (["--problem", "files/own.py:make", "--method", "files/own.py:ready"], "dim=2", "GradientDescent(lr=0.07)"),
        (
            ["--problem", "files/own.py:sized", "--problem.n", "7", "--problem.slope", "0.25"],
            "sized-7-0.25-False-()",
            "GradientDescent(lr=0.05)",
        ),
        (
            ["--problem", "files/own.py:sized", "--n", "2", "--deep", "--places", "1", "2"],
            "sized-2-0.5-True-(1, 2)",
            "GradientDescent(lr=0.05)",
        ),
        (["--method", "files/own.py:Adagrad", "--method.lr", "0.01"], "digits-mlp", "Adagrad(lr=0.01, eps=1e-08"),
        (["--method", "files/own.py:MyAdam", "--lr", "1e-4", "--beta1", "0.5"], "", "MyAdam(lr=0.0001, beta1=0.5"),
        (
            ["--problem=files/own.py:awkward", "--problem.help=3", "--problem.out=4", "--problem.no-plot"],
            "awkward-3-4.0-True-0-cpu",
            "GradientDescent",
        ),
        (["--method", "files/own.py:Scheduled"], "digits-mlp", "Scheduled(lr=<function"),
        (["--method", "files/own.py:Scheduled", "--lr", "0.04"], "digits-mlp", "Scheduled(lr=0.04"),
        (["--method", "files/own.py:triple"], "digits-mlp", "FunctionMethod("),
        (["--method", "files/json.py:ready"], "digits-mlp", "GradientDescent(lr=0.07)"),
        (["--method", "gd", "--lr", "files/own.py:decay"], "digits-mlp", "GradientDescent(lr=<function decay"),
    ],
)
def test_the_users_own(own, flags, problem, method):
    before = sys.path[:]
    if not any(flag.startswith("--problem") for flag in flags):
        flags = [*SMALL, *flags]
    if "--method" not in flags:
        flags = ["--method", "gd", "--lr", "0.05", *flags]
    assert cli.main(["compare", *flags, "--steps", "2", "--quiet", "--no-plot", "--out", "x"]) == 0
    about = dvi.load("x/race.h5").about
    assert problem in about["problem"]
    assert about["method"].startswith(method)
    assert sys.path == before


def test_the_users_own_module_and_integrator(own):
    module = f"mine_{own.name}.problems"
    flags = ["--problem", f"{module}:problem", "--method", f"{module}:Adagrad", "--lr", "0.1", "--steps", "2"]
    assert cli.main(["compare", *flags, "--integrator", f"{module}:steps", "--runs", "central", "--quiet"]) == 0
    race = dvi.load("runs/problem-Adagrad/race.h5")
    assert race.central.about["integrator"].startswith("Euler(dt=0.5")


def test_the_users_own_is_resumed(own):
    flags = ["compare", "--problem", "files/own.py:problem", "--method", "files/own.py:Adagrad", "--method.lr", "0.1"]
    flags += ["--quiet", "--no-plot"]
    assert cli.main([*flags, "--steps", "6", "--out", "whole"]) == 0
    assert cli.main([*flags, "--steps", "3", "--out", "parts"]) == 0
    assert cli.main([*flags, "--steps", "6", "--out", "parts", "--resume"]) == 0
    np.testing.assert_array_equal(dvi.load("parts/race.h5").central.loss, dvi.load("whole/race.h5").central.loss)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--problem", "files/nothing.py:problem"], ["there is no file files/nothing.py"]),
        (["--problem", "nowhere.to_be:found"], ["ModuleNotFoundError", "nowhere"]),
        (["--problem", "files/own.py:lost"], ["has no 'lost'", "make", "Adagrad"]),
        (["--problem", "files/own.py"], ["files/own.py:NAME"]),
        (["--problem", "mine"], ["choose from digits-mlp", "my.py:NAME"]),
        (["--problem", "files/raises.py:x"], ["raised KeyError: 'beta'", "raises.py, line 2"]),
        (["--problem", "files/leaves.py:x"], ["raised SystemExit", "leaves.py, line 2"]),
        (["--problem", "files/wrong.py:x"], ["raised SyntaxError", "line 2"]),
        (["--problem", "files/own.py:number"], ["is a int, not a dvi.Problem"]),
        (["--problem", "files/own.py:fails"], ["raised ZeroDivisionError", "own.py, line "]),
        (["--problem", "files/own.py:no_problem"], ["makes a int, not a dvi.Problem"]),
        (["--problem", "files/own.py:ready"], ["is a GradientDescent, not a dvi.Problem"]),
        (["--method", "files/own.py:problem"], ["is a Problem, not a dvi.Method"]),
        (["--method", "files/own.py:make"], ["makes a Problem, not a dvi.Method"]),
        (["--method", "files/own.py:ready", "--method.lr", "1"], ["--method.lr does not apply"]),
        (["--method", "files/own.py:Wants"], ["The method needs table", "FILE.py:NAME"]),
        (["--method", "files/own.py:Adagrad", "--lr", "-1"], ["lr must be positive"]),
        (["--method", "files/own.py:Slips", *SMALL], ["raised AttributeError", "rate", "own.py, line "]),
        (["--problem.lr", "1"], ["--problem.lr is not known to dvi compare"]),
        (["--integrator", "files/own.py:ready"], ["is a GradientDescent, not an integrator"]),
    ],
)
def test_the_users_own_refused(own, capsys, flags, words):
    code, told = rejected(capsys, "compare", *flags, "--quiet", "--out", "x")
    assert code == 2
    assert not [word for word in words if word not in told], told
    assert not (own / "x" / "race.h5").exists()


@pytest.mark.parametrize("value", ["fast", "files/own.py:number", "files/own.py:lost", "files/nothing.py:decay"])
def test_a_schedule_that_is_none(own, capsys, value):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["compare", "--lr", value])
    assert stopped.value.code == 2
    assert value.split(":")[-1] in capsys.readouterr().err


def test_help_teaches_the_users_own(own, capsys):
    with pytest.raises(SystemExit):
        cli.main(["compare", "--problem", "files/own.py:sized", "--method", "files/own.py:Adagrad", "--help"])
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for words in ("how many weights. (required)", "my learning rate. (required)", "AdaGrad as I understand it."):
        assert words in told
    assert "memory" not in told.split("method options")[1].split("integrator options")[0]


# ---- wrong input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--problem", "digits"], "choose from digits-mlp"),
        (["--method", "lion"], "choose from gd"),
        (["--dtype", "float16"], "one of ('float64', 'float32')"),
        (["--device", "abacus"], "there is no device 'abacus'"),
        (["--beta2", "0.9"], "--beta2 does not apply to --method gd; it is for --method rmsprop-norm, rmsprop, adam"),
        (["--method.beta2=0.9"], "--method.beta2=0.9 does not apply to --method gd"),
        (
            ["--problem", "sorting-rnn"],
            "--classes does not apply to --problem sorting-rnn; it is for --problem digits-mlp",
        ),
        (["--lr", "-1"], "lr must be positive"),
        (["--loss", "hinge"], 'loss is "mse" or "ce"'),
        (["--activation", "step"], "no activation 'step'"),
        (["--n", "0"], "got n=0"),
        (["--width", "0"], "width=0 must be 1 or more"),
        (["--depth", "-1"], "depth=-1 not negative"),
        (["--classes", "11"], "11"),
        (["--steps", "0"], "must be positive"),
        (["--runs", "adam"], "choose from 'discrete'"),
        (["--warm-start", "soon"], "'soon'"),
        (["--warm-start", "-1"], "warm_start=-1"),
        (["--integrator", "leapfrog"], "choose from auto, macro-step, euler"),
        (
            ["--integrator", "euler", "--tol", "1"],
            "--tol does not apply to --integrator euler; it is for --integrator auto",
        ),
        (["--dt", "1"], "--dt does not apply to --integrator auto; it is for --integrator euler, semi-implicit."),
        (["--integrator", "euler", "--dt", "-1"], "dt must be positive"),
        (["--integrator", "rk", "--order", "3"], "choose from 2, 4"),
        (["--integrator", "torchdiffeq", "--integrator.method", "leapfrog"], 'Invalid method "leapfrog"'),
        (["--tol", "-1"], "tol"),
        (["--no-plot", "True"], "True is not understood here. A switch"),
        (["--threads", "0"], "--threads 0"),
    ],
)
def test_wrong_input(tmp_path, capsys, flags, words):
    code, told = rejected(capsys, "compare", *TINY, "--quiet", "--out", str(tmp_path), *flags)
    assert code == 2
    assert words in told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["info", "nothing.h5"], "nothing.h5 does not exist"),
        (["plot", "nothing.h5"], "nothing.h5 does not exist"),
        (["plot"], "No result is given"),
        (["info"], "No result is given"),
        (["plot", "a.h5", "b.h5", "--out", "x.png"], "give a folder"),
    ],
)
def test_wrong_files(capsys, arguments, words):
    code, told = rejected(capsys, *arguments)
    assert code == 2
    assert words in told


def test_not_a_result(tmp_path, capsys):
    (tmp_path / "notes.h5").write_text("not HDF5")
    assert rejected(capsys, "info", str(tmp_path / "notes.h5"))[0] == 2


def test_unreadable_flags(capsys):
    for flags in (["compare", "--steps", "many"], ["dance"], [], ["compare", "--problem"]):
        assert rejected(capsys, *flags)[0] == 2
    for command in ("compare", "plot", "info"):
        code, told = rejected(capsys, command, *["x.h5"] * (command != "compare"), "--colour", "red")
        assert code == 2
        assert f"--colour is not known to dvi {command}" in told


def test_earlier_results_are_not_overwritten_by_accident(tmp_path, capsys):
    assert compare(tmp_path, "--runs", "discrete", "--no-plot") == 0
    before = (tmp_path / "race.h5").read_bytes()
    code, told = rejected(capsys, "compare", *TINY, "--out", str(tmp_path))
    assert (code, "--resume" in told, "--overwrite" in told) == (2, True, True)
    assert (tmp_path / "race.h5").read_bytes() == before
    assert compare(tmp_path, "--runs", "discrete", "--no-plot", "--overwrite", steps=5) == 0
    assert len(dvi.load(tmp_path / "race.h5").t) == 6


def test_a_run_that_fails_leaves_what_it_had(tmp_path, capsys):
    flags = ["--lr", "300", "--warm-start", "0", "--runs", "discrete", "--eigen-every", "0"]
    code, told = rejected(capsys, "compare", *TINY, "--steps", "2000", "--quiet", "--out", str(tmp_path), *flags)
    assert code == 1
    assert str(tmp_path / "race.h5") in told
    race = dvi.load(tmp_path / "race.h5")
    assert race.status not in (dvi.Status.SUCCESS, dvi.Status.RUNNING)
    assert str(race.status) in told
    assert 0 < len(race.discrete.t) < 2000
    assert (tmp_path / "race.png").exists()


def interrupt_after(monkeypatch, calls):
    """Let the user press Ctrl-C after that many recorded moments, with a checkpoint at each."""
    clock = iter(range(0, 10**9, 1000))
    monkeypatch.setattr("dvi.storage.hdf5.time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    distance_between, count = comparing.distance_between, iter(range(calls))

    def distance(a, b):
        if next(count, None) is None:
            raise KeyboardInterrupt
        return distance_between(a, b)

    monkeypatch.setattr(comparing, "distance_between", distance)


def test_resume_gives_the_same_file(tmp_path, capsys, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert compare(whole, "--no-plot", steps=8) == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, calls=3 * 4)
        assert compare(parts, "--no-plot", "--checkpoint-every", "0", steps=8) == 130
    assert "--resume" in capsys.readouterr().err
    assert dvi.load(parts / "race.h5").status is dvi.Status.INTERRUPTED
    assert compare(parts, "--no-plot", "--resume", steps=8) == 0
    expected, found = contents(whole / "race.h5"), contents(parts / "race.h5")
    assert expected.keys() == found.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def test_resume_of_another_run(tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, calls=3 * 2)
        assert compare(tmp_path, "--no-plot", "--checkpoint-every", "0") == 130
    capsys.readouterr()
    code, told = rejected(
        capsys, "compare", *TINY, "--steps", "4", "--quiet", "--out", str(tmp_path), "--resume", "--lr", "0.06"
    )
    assert code == 2
    assert "belongs to another run" in told


def test_missing_tyro_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tyro", None)
    code, told = rejected(capsys, "info", "x.h5")
    assert code == 2
    assert "pip install 'dvi-flows[cli]'" in told


def test_missing_matplotlib_says_what_to_install(tmp_path, monkeypatch, capsys):
    compare(tmp_path, "--runs", "discrete", "--no-plot")
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib" or name.startswith("dvi.plot")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, told = rejected(capsys, "plot", str(tmp_path / "race.h5"))
    assert code == 2
    assert "pip install 'dvi-flows[plot]'" in told


def test_help_from_the_shell():
    """The entry point of the package; the help of each command names every flag with a sentence."""
    done = subprocess.run([sys.executable, "-m", "dvi", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("compare", "plot", "info"))


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["compare", "--help"])
    assert stopped.value.code == 0
    told = capsys.readouterr().out
    assert "dvi compare --problem digits-mlp --method rmsprop --lr 2e-3 --steps 1000 --out runs/x" in told
    assert all(name in told for kind in KINDS.values() for name in kind.table)
    assert "--plot, --no-plot" in told
    assert "None" not in told
