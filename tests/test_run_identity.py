"""A file is gone on from by the run that it belongs to, and by no other; what differs is named with both values."""

import numpy as np
import pytest
import torch
from torch import nn

import dvi
from dvi.identity import difference, identity
from dvi.methods import GradientDescent, HeavyBall, Preconditioned, RMSProp

D = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def plain(shift=3.0):
    """L = ½(ab − 1)² + 0.02(a − shift)²."""
    return dvi.Problem(
        lambda w: 0.5 * (w[0] * w[1] - 1) ** 2 + 0.02 * (w[0] - shift) ** 2,
        torch.tensor([1.1, 0.6], dtype=D),
        name="valley",
    )


def network(inputs=None, targets=None, chunk_size=None, derivatives="autodiff", bias=0.0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 2)).to(D)
    model.register_buffer("unused", torch.full((2,), bias, dtype=D))
    inputs = normal(10, 6, seed=1) if inputs is None else inputs
    targets = normal(10, 2, seed=2) if targets is None else targets
    return dvi.Problem.from_module(model, nn.MSELoss(), inputs, targets, chunk_size, derivatives=derivatives)


def step_at(milestone):
    return lambda t: 0.2 if t < milestone else 0.05


class Own(dvi.Method):
    lr: float = 0.1

    def P(self, nu):
        return dvi.Scalar(1 / self.lr)


def same_name():
    class Own(dvi.Method):
        lr: float = 0.1

        def P(self, nu):
            return dvi.Scalar(2 / self.lr)

    return Own()


def triple(beta, floor):
    """Two that make the same first step from ν = 0: the floor is only felt by small gradients, later."""
    return (
        lambda w: torch.zeros_like(w),
        lambda nu, g: (1 - beta) * (g**2 - nu),
        lambda nu: dvi.Diagonal((nu + 1e-6).clamp(min=floor).sqrt() / 0.01),
    )


#: how the file was written and who asks for it, with the words; without words: the same run.
USUAL = {"problem": plain, "method": lambda: GradientDescent(0.2)}
OTHERS = {
    "milestone": (
        {"method": lambda: GradientDescent(step_at(4))},
        {"method": lambda: GradientDescent(step_at(5))},
        r"the schedule of lr differs at t = 4: 0\.05 in the file, 0\.2 now",
    ),
    "milestone between two steps": (
        {"method": lambda: GradientDescent(step_at(3.2))},
        {"method": lambda: GradientDescent(step_at(3.6))},
        r"the schedule of lr differs at t = 3\.25: 0\.05 in the file, 0\.2 now",
    ),
    "schedule for a number": (
        {},
        {"method": lambda: GradientDescent(step_at(4))},
        r"the schedule of lr differs at t = 4: 0\.2 in the file, 0\.05 now",
    ),
    "number": ({}, {"method": lambda: GradientDescent(0.25)}, r"lr differs: 0\.2 in the file, 0\.25 now"),
    "beta": (
        {"method": lambda: RMSProp(0.01, 0.9)},
        {"method": lambda: RMSProp(0.01, 0.99)},
        r"beta2 differs: 0\.9 in the file, 0\.99 now",
    ),
    "momentum": (
        {"method": lambda: GradientDescent(0.01)},
        {"method": lambda: HeavyBall(0.01)},
        "method differs: 'GradientDescent' in the file, 'HeavyBall' now",
    ),
    "class of the same name": ({"method": Own}, {"method": same_name}, "differs"),
    "triple": (
        {"method": lambda: triple(0.9, 0.0)},
        {"method": lambda: triple(0.8, 0.0)},
        "what the method makes of a gradient differs",
    ),
    "triple, later": (
        {"method": lambda: triple(0.9, 1e-5)},
        {"method": lambda: triple(0.9, 2e-5)},
        "what the method makes of a gradient differs",
    ),
    "preconditioner": (
        {"method": lambda: Preconditioned(dvi.Diagonal(torch.tensor([1.0, 2.0], dtype=D)), 0.1)},
        {"method": lambda: Preconditioned(dvi.Diagonal(torch.tensor([1.0, 2.1], dtype=D)), 0.1)},
        "preconditioner of the method differs",
    ),
    "loss": ({}, {"problem": lambda: plain(3.001)}, "the loss near the start differs"),
    "inputs": ({"problem": network}, {"problem": lambda: network(inputs=normal(10, 6, seed=3))}, "inputs differs"),
    "order of examples": (
        {"problem": network},
        {"problem": lambda: network(normal(10, 6, seed=1).flip(0), normal(10, 2, seed=2).flip(0))},
        "inputs differs.*targets differs",
    ),
    "targets": ({"problem": network}, {"problem": lambda: network(targets=normal(10, 2, seed=3))}, "targets differs"),
    "buffers": ({"problem": network}, {"problem": lambda: network(bias=1.0)}, "fixed tensors differs"),
    "derivatives": (
        {"problem": network},
        {"problem": lambda: network(derivatives="mixed")},
        "derivatives differs: 'autodiff' in the file, 'mixed' now",
    ),
    "test inputs": (
        {"problem": network, "test_inputs": normal(2, 6, seed=4)},
        {"problem": network, "test_inputs": normal(2, 6, seed=5)},
        "test_inputs differs",
    ),
    "no test inputs": (
        {"problem": network, "test_inputs": normal(2, 6, seed=4)},
        {"problem": network},
        "test_inputs differs: .* in the file, None now",
    ),
    "coordinates": (
        {"coordinates": (0, 1)},
        {"coordinates": (1, 0)},
        r"coordinates differs: \[0, 1\] in the file, \[1, 0\] now",
    ),
    "integrator": (
        {"integrator": dvi.Euler(0.25)},
        {"integrator": dvi.Euler(0.5)},
        r"integrator differs: .*0\.25.* in the file, .*0\.5.* now",
    ),
    "save_every": ({"save_every": 1}, {"save_every": 2}, r"save_every differs: 1\.0 in the file, 2\.0 now"),
    "eigen_every": ({"eigen_every": 0}, {"eigen_every": 2}, r"eigen_every differs: 0\.0 in the file, 2\.0 now"),
    "warm start": ({"warm_start": 0}, {"warm_start": 2}, "warm_start differs: 0 in the file, 2 now"),
    "accuracy": (
        {"accuracy": "paper"},
        {"accuracy": "second-order"},
        "accuracy differs: 'paper' in the file, 'second-order' now",
    ),
    "runs": ({}, {"runs": ("discrete",)}, r"runs differs: \['discrete', 'stable'\] in the file, \['discrete'\] now"),
    "the same": ({}, {}, ""),
    "the same schedule": (
        {"method": lambda: GradientDescent(step_at(4))},
        {"method": lambda: GradientDescent(step_at(4))},
        "",
    ),
    "the same data": (
        {"problem": network, "test_inputs": normal(2, 6, seed=4)},
        {"problem": network, "test_inputs": normal(2, 6, seed=4)},
        "",
    ),
    "a number as a schedule": ({}, {"method": lambda: GradientDescent(lambda t: 0.2)}, ""),
    "chunks": ({"problem": network}, {"problem": lambda: network(chunk_size=3)}, ""),
}


def run(path, steps=6, **options):
    options = USUAL | {"runs": ("discrete", "stable"), "eigen_every": 0, "warm_start": 0} | options
    problem, method = options.pop("problem"), options.pop("method")
    return dvi.compare(problem(), method(), steps, path=path, check=False, progress=False, resume=True, **options)


@pytest.mark.parametrize("longer", [False, True], ids=["as long", "longer"])
@pytest.mark.parametrize("what", OTHERS)
def test_the_file_of_another_run_is_refused_by_name(what, longer, tmp_path):
    path = tmp_path / "race.h5"
    before, now, words = OTHERS[what]
    run(path, **before)
    data = path.read_bytes()
    steps = 8 if longer else 6
    if words:
        with pytest.raises(dvi.StoreError, match=f"(?s)belongs to another run: .*{words}"):
            run(path, steps, **now)
        assert path.read_bytes() == data
    else:
        assert len(run(path, steps, **now).t) == steps + 1


def test_a_longer_run_may_have_another_schedule_where_the_file_has_none(tmp_path):
    """Milestone 7 or 9 are the same until the file's end at 6; what comes after is the new one's."""
    path = tmp_path / "race.h5"
    run(path, 6, method=lambda: GradientDescent(step_at(9)))
    longer = run(path, 10, method=lambda: GradientDescent(step_at(7)))
    whole = run(tmp_path / "whole.h5", 10, method=lambda: GradientDescent(step_at(7)))
    assert np.array_equal(longer.discrete.loss, whole.discrete.loss)


def test_a_schedule_that_ends_with_the_run_is_read_within_it(tmp_path):
    def schedule(t):
        if not -0.01 <= t <= 6:
            raise IndexError(t)
        return 0.2 - 0.01 * t

    flow = dvi.discrete(plain(), GradientDescent(schedule))
    known = identity(flow, {"steps": 6.0, "dtype": "torch.float64"}, {}, 0.0, np.arange(7.0))
    assert np.allclose(known["numbers"]["lr"], 0.2 - 0.01 * known["times"])
    assert known["times"][-1] == 6
    assert difference(known, known) == ""


def test_a_warm_start_does_not_set_the_schedule_back(tmp_path):
    """The clock at time 0 is 3; at the end of the run it is 9, beyond the milestone at 8."""
    path = tmp_path / "race.h5"
    run(path, 6, warm_start=3, method=lambda: GradientDescent(step_at(8)))
    with pytest.raises(dvi.StoreError, match=r"the schedule of lr differs at t = 8: 0\.05 in the file, 0\.2 now"):
        run(path, 6, warm_start=3, method=lambda: GradientDescent(step_at(8.5)))


def test_a_file_of_an_earlier_version_is_refused_in_words(tmp_path):
    import h5py

    from dvi.freeze import from_bytes, to_bytes

    path = tmp_path / "race.h5"
    run(path)
    with h5py.File(path, "r+") as file:
        state = from_bytes(bytes(file["checkpoint"][()]))
        old = np.frombuffer(to_bytes(state | {"identity": '{"steps": 6.0}'}), dtype=np.uint8)
        del file["checkpoint"]
        file["checkpoint"] = old
    with pytest.raises(dvi.StoreError, match=r"earlier development version.*can still be loaded"):
        run(path)
    assert dvi.load(path).status is dvi.Status.SUCCESS
