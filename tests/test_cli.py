"""The shell commands, called as functions: what they write, print and return."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import dvi
from dvi import cli

pytest.importorskip("tyro")
pytest.importorskip("h5py")
pytest.importorskip("matplotlib")

TINY = ["--problem", "digits-mlp", "--n", "20", "--classes", "3", "--width", "4", "--method", "gd", "--lr", "0.05"]


def compare(folder, *flags, steps=4):
    return cli.main(["compare", *TINY, "--steps", str(steps), "--out", str(folder), "--quiet", *flags])


def rejected(capsys, *flags):
    """The one message on stderr, without a traceback."""
    code = cli.main([*flags])
    told = capsys.readouterr()
    assert told.err.startswith("dvi: ")
    assert "Traceback" not in told.err
    return code, told.err


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


def test_hyperparameters_reach_the_method():
    chosen = cli.Compare(method="rmsprop", lr=2e-3, eps=1e-7, bias_correction=True)
    assert chosen._method() == dvi.methods.RMSProp(lr=2e-3, beta2=0.99, eps=1e-7, bias_correction=True)
    assert cli.Compare(method="gd", lr=0.5)._method() == dvi.methods.GradientDescent(lr=0.5)


def test_bias_correction_can_be_left_out_where_it_is_the_default():
    assert cli.Compare(method="adam")._method().bias_correction
    assert not cli.Compare(method="adam", bias_correction=False)._method().bias_correction


def test_a_flag_alone_means_an_integrator_that_fits_the_flow():
    assert cli.Compare(method="adam", tol=1e-4)._integrator() == dvi.SemiImplicit(tol=1e-4)
    assert cli.Compare(method="gd", accuracy="second-order", dt=0.25)._integrator() == dvi.SemiImplicit(dt=0.25)
    assert cli.Compare(method="adam", accuracy="paper", dt=0.25)._integrator() == dvi.Euler(0.25)


def test_integrators():
    assert cli.Compare()._integrator() is None
    assert cli.Compare(dt=0.5)._integrator() == dvi.Euler(0.5)
    assert cli.Compare(integrator="euler")._integrator() == dvi.Euler()
    assert cli.Compare(tol=1e-4)._integrator() == dvi.MacroStep(tol=1e-4)
    assert cli.Compare(integrator="rk", tol=1e-4)._integrator() == dvi.RungeKutta(tol=1e-4)
    assert cli.Compare(order=2, tol=1e-4)._integrator() == dvi.RungeKutta(order=2, tol=1e-4)
    assert cli.Compare(integrator="torchdiffeq")._integrator() == dvi.TorchDiffEq()
    assert cli.Compare(ode_method="rk4")._integrator() == dvi.TorchDiffEq("rk4")


@pytest.mark.parametrize(
    ("flag", "value", "integrator"),
    [
        ("--dt", "0.5", "Euler(dt=0.5"),
        ("--order", "2", "RungeKutta(order=2"),
        ("--ode-method", "midpoint", "TorchDiffEq(method='midpoint'"),
    ],
)
def test_integrators_reach_the_central_flow(tmp_path, flag, value, integrator):
    assert compare(tmp_path, "--runs", "central", "--no-plot", flag, value) == 0
    assert dvi.load(tmp_path / "race.h5").central.about["integrator"].startswith(integrator)


def test_every_problem_can_be_made():
    for name in cli.PROBLEMS:
        problem = cli.Compare(problem=name, n=4, width=6, dtype="float32")._problem()
        assert problem.name.startswith(name)
        assert str(problem.dtype) == "torch.float32"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--problem", "digits"], "choose from digits-mlp"),
        (["--method", "lion"], "choose from gd"),
        (["--dtype", "float16"], "choose from float64"),
        (["--device", "abacus"], "--device abacus cannot be used here"),
        (["--beta2", "0.9"], "--beta2 does not apply to gd"),
        (["--problem", "sorting-rnn"], "--classes does not apply to sorting-rnn"),
        (["--lr", "-1"], "lr must be positive"),
        (["--loss", "hinge"], 'loss is "mse" or "ce"'),
        (["--activation", "step"], "no activation 'step'"),
        (["--n", "0"], "--n 0: must be 1 or more"),
        (["--classes", "11"], "11"),
        (["--steps", "0"], "must be positive"),
        (["--runs", "sgd"], "choose from 'discrete'"),
        (["--warm-start", "soon"], "a number of optimizer steps, or auto"),
        (["--warm-start", "-1"], "--warm-start -1"),
        (["--integrator", "leapfrog"], "choose from macro-step, euler"),
        (["--integrator", "euler", "--tol", "1"], "--tol does not apply to --integrator euler"),
        (["--dt", "1", "--order", "2"], "give one of them"),
        (["--dt", "-1"], "dt must be positive"),
        (["--integrator", "macro-step", "--order", "2"], "--order does not apply to --integrator macro-step"),
        (["--order", "3"], "choose from 2, 4"),
        (["--ode-method", "scipy_solver"], "choose from dopri8, dopri5"),
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
        (["plot"], "Which results?"),
        (["info"], "Which results?"),
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
    for flags in (["compare", "--steps", "many"], ["compare", "--colour", "red"], ["dance"], []):
        with pytest.raises(SystemExit) as stopped:
            cli.main(flags)
        assert stopped.value.code == 2
    capsys.readouterr()


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
    monkeypatch.setattr("dvi.store.time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    weights, count = dvi.compare.__globals__["_distance"], iter(range(calls))

    def distance(a, b):
        if next(count, None) is None:
            raise KeyboardInterrupt
        return weights(a, b)

    monkeypatch.setitem(dvi.compare.__globals__, "_distance", distance)


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
    monkeypatch.setattr(cli, "tyro", None)
    code, told = rejected(capsys, "info", "x.h5")
    assert code == 2
    assert "pip install 'dvi-flows[cli]'" in told


def test_missing_matplotlib_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "dvi.plot", None)
    compare(tmp_path, "--runs", "discrete", "--no-plot")
    monkeypatch.delitem(sys.modules, "dvi.plot")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, told = rejected(capsys, "plot", str(tmp_path / "race.h5"))
    assert code == 2
    assert "pip install 'dvi-flows[plot]'" in told


def test_help_from_the_shell():
    """The entry point of the package; the help of each command names every flag with a sentence."""
    done = subprocess.run([sys.executable, "-m", "dvi", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert all(command in done.stdout for command in cli.COMMANDS)


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["compare", "--help"])
    assert stopped.value.code == 0
    told = capsys.readouterr().out
    assert "dvi compare --problem digits-mlp --method rmsprop --lr 2e-3 --steps 1000 --out runs/x" in told
    assert all(name in told for table in (cli.PROBLEMS, cli.METHODS, cli.INTEGRATORS) for name in table)
    assert "None" not in told
