"""``dvi sweep`` and ``dvi paper``, called as functions: what they run, print and return."""

import json

import pytest

import dvi
from dvi import cli

pytest.importorskip("tyro")
pytest.importorskip("h5py")
pytest.importorskip("sklearn")
from dvi.cli.commands import not_meant
from dvi.cli.sweep import grid

TINY = ["--problem", "digits-mlp", "--n", "20", "--classes", "3", "--width", "4", "--method", "gd", "--steps", "3"]


def names(*words):
    return [name for name, _ in grid(list(words), not_meant)]


def rejected(capsys, *words):
    try:
        code = cli.main([*words])
    except SystemExit as stopped:
        code = stopped.code
    return code, " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_flags_with_several_values_make_a_grid():
    assert names(*TINY, "--method.lr", "0.1", "0.2", "--seed", "0", "1") == [
        "method.lr=0.1,seed=0", "method.lr=0.1,seed=1", "method.lr=0.2,seed=0", "method.lr=0.2,seed=1",
    ]  # fmt: skip
    (_, row), *_ = grid([*TINY, "--lr=0.1", "--seed", "0", "1"], not_meant)
    assert row == [*TINY, "--lr", "0.1", "--seed", "0"]


def test_flags_that_take_several_values_themselves_make_none():
    assert names(*TINY, "--runs", "discrete", "central") == ["run"]
    assert names(*TINY, "--runs", "discrete", "central", "--lr", "0.1", "0.2") == ["lr=0.1", "lr=0.2"]


def test_problems_and_methods_can_be_varied_too():
    assert names("--problem", "digits-mlp", "sorting-rnn", "--method", "gd", "--n", "20") == [
        "problem=digits-mlp", "problem=sorting-rnn",
    ]  # fmt: skip


def test_negative_numbers_are_values():
    assert names(*TINY, "--coordinates", "0", "-1") == ["run"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--out-of", "1"], "--out-of is not known to dvi compare"),
        (["--resume"], "--resume is not for the runs of a sweep"),
        (["--lr", "0.1", "--lr", "0.2"], "--lr is given twice"),
        (["--lr", "0.1", "fast"], "fast"),
        (["--partition", "gpu"], "--partition and --slurm are for --engine slurm"),
        (["--engine", "slurm", "--slurm", "account"], "give NAME=VALUE"),
        (["--workers", "0"], "workers=0"),
    ],
)
def test_wrong_input(tmp_path, capsys, flags, words):
    code, told = rejected(capsys, "sweep", *TINY, "--out", str(tmp_path / "x"), *flags)
    assert code == 2
    assert words in told


def test_a_sweep_from_the_shell(tmp_path, capsys):
    """A row that cannot be made says so beside one that can."""
    flags = ["--lr", "0.05", "-1", "--runs", "discrete", "--out", str(tmp_path), "--workers", "1"]
    assert cli.main(["sweep", *TINY, *flags]) == 1
    out = capsys.readouterr().out
    assert "lr=0.05  done; loss discrete" in out
    assert "lr=-1    error: " in out
    assert "lr must be positive" in out
    assert list(dvi.load(tmp_path / "lr=0.05.h5").runs) == ["discrete"]
    totals = json.loads((tmp_path / "manifest.json").read_text())["totals"]
    assert (totals["done"], totals["error"]) == (1, 1)


def test_experiments_are_listed(tmp_path, capsys):
    assert cli.main(["paper", "list", "--folder", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 116
    assert "115 experiments of size small: 115 new" in out
    assert cli.main(["paper", "list", "fig14", "--size", "full", "--folder", str(tmp_path)]) == 0
    assert "vit-mse-10, gd 0.02, 3000 steps" in capsys.readouterr().out


def test_what_is_not_there_is_said(tmp_path, capsys):
    for words, told in (
        (["list", "fig99"], "fig99 is not an experiment"),
        (["list", "fig14z"], "fig14z is not an experiment"),
        (["run"], "No experiment is given"),
        (["figure", "6", "--folder", str(tmp_path)], "dvi paper run fig6 --size small"),
        (["figure", "99", "--folder", str(tmp_path)], "There are no experiments of figure 99"),
        (["run", "fig14b", "--size", "full", "--device", "abacus", "--folder", str(tmp_path)], "abacus"),
    ):
        code, said = rejected(capsys, "paper", *words)
        assert (code, told in said) == (2, True), said
