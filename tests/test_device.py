"""Every tensor is made where the user's tensors are: runs of the paper's rows under ``two_devices``."""

import re
from dataclasses import replace

import pytest
import torch
from two_devices import TwoDevices

import dvi
from dvi.paper import making
from dvi.paper.table import table

#: Rows with all that is recorded, and sizes at which a run takes a second or so.
ROWS = {
    "fig14b": {"n": 10, "pixels": 7, "steps": 3},
    "fig28b": {"n": 4, "pixels": 7, "steps": 3, "measure_every": 3},
    "fig7-cnn-mse-ablated": {"n": 6, "pixels": 7, "steps": 3, "measure_every": 3},
    "fig11-cnn-mse": {"n": 4, "pixels": 7, "steps": 1, "measure_every": 1},
}


def arguments(name):
    """The problem of a row, and how it is run."""
    row = table().experiments[name]
    spec = making.spec_of(replace(row, options={"small": row.options["small"] | ROWS[name]}), "small")
    problem, how = making.make_problem(spec), spec["run"]
    options = {"runs": tuple(how["runs"]), "warm_start": "stationary" if how["warm_start"] == "stationary" else 2}
    if "outputs" in how["record"]:
        options["test_inputs"] = making.example_of(spec)
    if "coordinates" in how["record"]:
        options["coordinates"] = (0, len(problem.w0) // 2)
    measures = [measure for measure in how["record"] if measure not in ("outputs", "coordinates")]
    if measures:
        options |= {"measures": measures, "measure_every": how["measure_every"]}
    return (problem, making.make_method(spec), how["steps"]), options


@pytest.mark.parametrize("name", ROWS)
def test_every_tensor_is_made_where_the_users_are(name, tmp_path):
    """Also what is written at checkpoints."""
    pytest.importorskip("h5py")
    given, options = arguments(name)
    with TwoDevices() as devices:
        race = dvi.compare(*given, check=False, progress=False, path=tmp_path / "x.h5", checkpoint_every=0, **options)
    assert race.status is dvi.Status.SUCCESS
    assert devices.made["card"] > 100
    assert devices.made["host"] > 10  # numbers that were drawn or read on the host, and copies


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda w: torch.ones(3, dtype=w.dtype), "tensors of both devices; that of the host has shape [3]"),
        (lambda w: torch.ones(3, dtype=w.dtype, device="cpu"), "tensors of both devices"),
        (lambda w: w.detach().cpu(), "tensors of both devices"),
        (lambda w: torch.from_numpy(w.detach().numpy()), "numpy of a tensor on the card"),
        (lambda w: 2 * torch.arange(3.0, dtype=w.dtype), "tensors of both devices"),
    ],
)
def test_a_tensor_on_the_wrong_device_is_noticed(wrong, message):
    w = torch.linspace(0.5, 1.5, 3, dtype=torch.float64)
    with TwoDevices(), pytest.raises(RuntimeError, match=re.escape(message)):
        w @ wrong(w)


@pytest.mark.parametrize(
    "right",
    [
        lambda w: torch.ones(3, dtype=w.dtype, device=w.device),
        lambda w: torch.ones(3, dtype=w.dtype).to(w),
        lambda w: w * torch.tensor(2.0, dtype=w.dtype),
        lambda w: torch.zeros_like(w),
        lambda w: w[torch.tensor([2, 1, 0])],
    ],
)
def test_what_a_card_allows_passes(right):
    w = torch.linspace(0.5, 1.5, 3, dtype=torch.float64)
    with TwoDevices() as devices:
        product = w @ right(w)
        assert not devices.on_host(product)
        assert float(product) == product.cpu().numpy()
    assert devices.reads
