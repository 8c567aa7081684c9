"""The table of the paper's experiments, and its runs: from a row to a file and back."""

import inspect
import json

import numpy as np
import pytest

import dvi
from dvi.paper import making, report, stored
from dvi.paper.table import SIZES, Experiment, read, table
from dvi.problems import ProblemError
from dvi.sweeps.records import Record, records, write_record
from dvi.sweeps.work import work

pytest.importorskip("h5py")
ROWS = list(table().experiments.values())


def test_all_experiments_and_all_figures_are_there():
    assert len(ROWS) == 115
    assert table().figures == [str(figure) for figure in range(1, 39)]


#: What the paper's captions say: learning rates by figure.
CAPTIONS = {
    "14": [0.01, 0.02, 0.04], "16": [0.005, 0.01, 0.02], "19": [0.01, 0.02], "20": [0.005, 0.01],
    **{str(figure): [0.005, 0.01, 0.02] for figure in range(22, 28)},
    **{figure: [1e-5, 2e-5, 4e-5] for figure in ("28", "30", "32", "34", "35")},
    **{figure: [5e-6, 1e-5, 2e-5] for figure in ("29", "31", "33")},
    "36": [2e-5] * 3,
}  # fmt: skip


@pytest.mark.parametrize("figure", CAPTIONS)
def test_learning_rates_are_those_of_the_captions(figure):
    rows = table().of_figure(figure)
    assert [row.options["full"]["lr"] for row in rows] == CAPTIONS[figure]
    small = np.array([row.options["small"]["lr"] for row in rows])
    np.testing.assert_allclose(small / small[0], np.array(CAPTIONS[figure]) / CAPTIONS[figure][0])


def test_beta2_of_figure_36():
    assert [row.options["full"]["beta2"] for row in table().of_figure(36)] == [0.95, 0.99, 0.995]


@pytest.mark.parametrize("figure", ["12", "13", "15", "17", "18", "21", "38"])
def test_what_is_lost_from_the_text_is_said(figure):
    assert all("lost" in row.note for row in table().of_figure(figure))


@pytest.mark.parametrize("size", SIZES)
def test_every_row_can_be_built(size):
    """All but the pictures: the methods are made, and the problems' arguments are arguments."""
    for row in ROWS:
        spec = making.spec_of(row, size)
        assert making.make_method(spec).lr == row.options[size]["lr"]
        task = getattr(dvi.problems, spec["problem"]["task"])
        inspect.signature(task).bind_partial(**{key: value for key, value in spec["problem"].items() if key != "task"})
        assert json.loads(json.dumps(spec)) == spec  # as a record keeps it


@pytest.mark.parametrize("problem", table().problems)
def test_the_small_problems_are_small(problem):
    row = next(row for row in ROWS if row.problem == problem)
    spec = making.spec_of(row, "small")
    made = making.make_problem(spec)
    assert len(made.w0) < 10_000
    outputs = made.outputs(made.w0, making.example_of(spec))
    assert outputs.shape[0] == 1
    assert bool(outputs.isfinite().all())


def test_names_stand_for_rows():
    assert [row.name for row in table().chosen(["fig14b", "fig14"])] == ["fig14b", "fig14a", "fig14c"]
    assert [row.name for row in table().chosen(["5"])] == [row.name for row in table().of_figure(5)]
    for word in ("fig14d", "fig", "99", "all"):
        with pytest.raises(ValueError, match="is not an experiment"):
            table().chosen([word])


def test_a_table_with_mistakes_is_refused(tmp_path):
    path = tmp_path / "table.toml"
    head = (
        '[defaults]\nruns = ["central"]\nrecord = []\nwarm_start = "auto"\nnote = ""\n'
        "[problem.p]\nsmall = {}\nfull = {}\n[method.m]\nsmall = {}\nfull = {}\n"
    )
    row = (
        '[[experiment]]\nname = "a"\nfigures = ["1"]\npanel = "a"\nproblem = "p"\nmethod = "m"\n'
        "full = { lr = 1.0, steps = 1 }\nsmall = { lr = 1.0, steps = 1 }\n"
    )
    path.write_text(head + row)
    assert list(read(path).experiments) == ["a"]
    for wrong, words in ((row + row, "twice"), (row.replace('"p"', '"q"'), "problem 'q'")):
        path.write_text(head + wrong)
        with pytest.raises(ValueError, match=words):
            read(path)
    odd = Experiment("a", ("1",), "a", "cnn-mse-4", "gd", {"small": {"lr": 1.0, "speed": 2}}, ("central",))
    with pytest.raises(ValueError, match="a sets speed; a row may set"):
        making.spec_of(odd, "small")


def test_a_row_that_cannot_be_run_says_why(tmp_path):
    odd = Experiment(
        "a",
        ("1",),
        "a",
        "cnn-mse-4",
        "gd",
        {"small": {"lr": 1.0, "steps": 1}},
        ("central",),
        infeasible={"small": "too dear"},
    )
    with pytest.raises(ProblemError, match="a cannot be run at size small: too dear"):
        making.task_of(odd, "small")
    assert odd.why_not("full") == ""
    told = "\n".join(report.markdown([odd], "small", records(tmp_path, ["a"])))
    assert "too dear" in told


@pytest.fixture
def short(monkeypatch):
    """A row of the table, cut to a few steps, with everything recorded."""
    row = table().experiments["fig34a"]
    options = {"small": row.options["small"] | {"steps": 6}, "full": row.options["full"]}
    cut = Experiment(**{**vars(row), "options": options})
    monkeypatch.setitem(table().experiments, row.name, cut)
    return cut


def test_a_run_from_the_table_to_the_figure(tmp_path, short):
    with pytest.raises(dvi.StoreError, match="dvi paper run fig34 --size small"):
        stored.runs_of(34, folder=tmp_path)
    record = work(making.task_of(short, "small"), tmp_path)
    assert record.state == "done", record.message
    found = stored.runs_of("34", folder=tmp_path)
    assert list(found) == ["fig34a"]
    one = found["fig34a"]
    assert list(one.race.runs) == ["discrete", "central", "stable"]
    assert one.race.t[-1] == 6
    assert one.race.discrete.series["outputs"].shape[:2] == (7, 1)
    assert one.race.central.series["coordinate_grad_sq"].shape == (7, making.COORDINATES)
    assert repr(one.method()) == one.race.about["method"]
    assert stored.missing(34, folder=tmp_path) == ["fig34b", "fig34c"]
    told = "\n".join(report.markdown([short], "small", records(tmp_path, ["fig34a"])))
    assert f"| fig34a | rnn-mse, rmsprop {short.options['small']['lr']:g}, 6 steps |" in told
    lines = list(report.overview([short], "small", records(tmp_path, ["fig34a"])))
    assert " done" in lines[0]


def test_a_run_of_numbers_that_the_table_has_changed_since_is_missing(tmp_path, short, monkeypatch):
    task = making.task_of(short, "small")
    write_record(tmp_path, Record(short.name, task.spec, "done"))
    assert short.name not in stored.missing(34, folder=tmp_path)
    longer = {"small": short.options["small"] | {"steps": 7}, "full": short.options["full"]}
    monkeypatch.setitem(table().experiments, short.name, Experiment(**{**vars(short), "options": longer}))
    assert short.name in stored.missing(34, folder=tmp_path)


def test_the_weights_that_are_watched_are_the_middles_of_equal_parts(tmp_path, short, monkeypatch):
    given, spec = {}, making.spec_of(short, "small")
    monkeypatch.setattr(dvi, "compare", lambda *_, **named: given.update(named))
    making.run(spec, tmp_path / "a.h5")
    d = making.make_problem(spec).dim
    assert given["coordinates"] == [int((i + 0.5) * d / 12) for i in range(12)]


def test_the_full_size_asks_for_its_data(tmp_path):
    record = work(making.task_of(table().experiments["fig14b"], "full", cifar10=tmp_path / "none"), tmp_path)
    assert record.state == "error"
    assert "cifar" in record.message.lower()
