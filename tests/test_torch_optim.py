"""Optimizers of torch.optim read as methods: their steps are torch's own, whatever the options; what does not fit is
refused by name; and methods of this library used as optimizers of torch."""

import copy
import pickle

import numpy as np
import pytest
import torch
from conftest import examples
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

import dvi
import dvi.testing
from dvi.methods import AsOptimizer, Grouped, SpecError
from dvi.methods.interop.rising import RectifiedAdam, RisingNAdam, ScheduledNesterov
from dvi.methods.per_weight import PerWeight

X = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randn(20, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
mse = nn.MSELoss()

# Ours and torch's formulas differ in the order of a few products: by an eps or two a step, relative to weights of size
# 1.  200 steps of a stable iteration add that up to 1e-13.  A step done wrongly shows at 1e-4 and above.
ROUNDING = 1e-12
# Where a gradient passes through zero, a small √v enlarges rounding, and centred RMSprop cancels.  How much is seen in
# torch's own run from weights that are 1e-15 elsewhere; what is added at each of 200 steps may add up.
GROWN, LOST = 1e3, 1e-6


def network(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def train(model, optimizer, steps, scheduler=None):
    """A user's loop; the weights [steps, d] after each step."""
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        mse(model(X), Y).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        seen.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    return torch.stack(seen) if seen else None


def steps_of(problem, method, steps):
    """The weights [steps, d] after each step of the library's own optimizer."""
    optimizer = dvi.discrete(problem, method)
    y, seen = optimizer.initial, []
    _, g = optimizer.value_and_grad(y)
    for _ in range(steps):
        y, _, g = optimizer.step(y, g)
        seen.append(y.w)
    return torch.stack(seen)


def agree(make, schedule=None, before=0, steps=200, seed=0):
    """Compare the steps of an optimizer, from where ``before`` steps have brought it, with the library's."""

    def begun():
        model = network(seed)
        optimizer = make(model)
        scheduler = schedule and schedule(optimizer)
        train(model, optimizer, before, scheduler)
        return model, optimizer, scheduler

    model, optimizer, scheduler = begun()
    problem = dvi.Problem.from_module(model, mse, X, Y)
    ours = steps_of(problem, dvi.from_torch(optimizer, scheduler), steps)
    theirs = train(model, optimizer, steps, scheduler)
    beside = begun()
    with torch.no_grad():
        for p in beside[0].parameters():
            p += 1e-15 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0), dtype=p.dtype)
    grown = (train(*beside[:2], steps, beside[2]) - theirs).abs().amax(1).cummax(0).values
    assert (theirs[1:] - theirs[:-1]).abs().amax(1).max() > 1e-7  # it moves
    allowed = ROUNDING + GROWN * grown
    assert (allowed[:30] < LOST).all()  # before rounding has taken over
    known = allowed < LOST
    assert ((ours - theirs).abs().amax(1) <= allowed)[known].all()


# ---- every supported option, at random ------------------------------------------------------------------------------

numbers = st.floats
lrs = numbers(1e-3, 0.02)
L2 = st.sampled_from([0.0, 1e-3, 0.1])
flags = st.booleans()

OPTIONS = {
    "SGD": dict(
        lr=numbers(1e-3, 0.05), momentum=st.sampled_from([0.0, 0.5, 0.9]), dampening=st.sampled_from([0.0, 0.3])
    ),
    "RMSprop": dict(lr=lrs, alpha=numbers(0.8, 0.999), eps=st.sampled_from([1e-8, 1e-3]), centered=flags),
    "Adagrad": dict(lr=lrs, lr_decay=st.sampled_from([0, 0.01]), initial_accumulator_value=st.sampled_from([0, 0.1])),
    "Adam": dict(lr=lrs, eps=st.sampled_from([1e-8, 1e-2]), decoupled_weight_decay=flags),
    "AdamW": dict(lr=lrs, eps=st.sampled_from([1e-8, 1e-2])),
    "NAdam": dict(lr=lrs, momentum_decay=st.sampled_from([4e-3, 0.1]), decoupled_weight_decay=flags),
    "RAdam": dict(lr=lrs, decoupled_weight_decay=flags),
}
OF_A_GROUP = ("lr", "eps", "weight_decay", "alpha", "lr_decay")  # what groups may have for themselves


@st.composite
def optimizers(draw, kind):
    """How to make an optimizer of a model, with one or two groups."""
    options = {name: draw(values) for name, values in OPTIONS[kind].items()} | {"weight_decay": draw(L2)}
    if "Ada" in kind or kind == "RAdam":
        options.pop("alpha", None)
        if kind != "Adagrad":
            options["betas"] = (draw(st.sampled_from([0.0, 0.5, 0.9])), draw(st.sampled_from([0.9, 0.99, 0.999])))
    if kind == "SGD" and options["momentum"] and draw(flags):
        options |= {"nesterov": True, "dampening": 0.0}
    if not options.get("decoupled_weight_decay") and kind not in ("AdamW",) and draw(st.integers(0, 4)) == 0:
        options |= {"maximize": True, "lr": 1e-3}
    second = {name: draw(OPTIONS[kind].get(name, L2)) for name in OF_A_GROUP if name in options}
    if options.get("maximize"):
        second["lr"] = 2e-3
    grouped, foreach, named = draw(flags), draw(flags), draw(flags)

    def make(model):
        parameters = [(n, p) if named else p for n, p in model.named_parameters()]
        groups = [{"params": parameters[::2]}, {"params": parameters[1::2], **second}]
        return getattr(torch.optim, kind)(groups if grouped else parameters, foreach=foreach, **options)

    return make


schedules = st.sampled_from(
    [
        None,
        None,
        lambda o: lr_scheduler.CosineAnnealingLR(o, 300),
        lambda o: lr_scheduler.StepLR(o, 60, 0.5),
        lambda o: lr_scheduler.LambdaLR(o, lambda t: min(1.0, t / 20)),
    ]
)


@pytest.mark.parametrize("kind", OPTIONS)
@given(data=st.data(), before=st.sampled_from([0, 1, 7]), seed=st.integers(0, 1000))
@examples(3)
def test_200_steps_are_torchs_own(kind, data, before, seed):
    agree(data.draw(optimizers(kind)), data.draw(schedules), before, seed=seed)


def test_the_comparison_can_fail():
    model = network()
    ours = steps_of(dvi.Problem.from_module(model, mse, X, Y), dvi.methods.HeavyBall(0.05, 0.9), 20)
    theirs = train(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, dampening=0.01), 20)
    assert (ours - theirs).abs().max() > 1e-3


# ---- schedulers -----------------------------------------------------------------------------------------------------

SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + 0.1 * t)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.98),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 15, 0.1),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [12, 20], 0.3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 12),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1, 20),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.97),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 60, 2),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 40),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 12),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.05, total_steps=60),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.002, anneal_epochs=20),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.05, step_size_up=7, cycle_momentum=True),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.01, 1, 10), lr_scheduler.CosineAnnealingLR(o, 50)], [10]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 5), lr_scheduler.ExponentialLR(o, 0.98)]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_are_read_by_stepping_a_copy(name):
    model = network()
    optimizer = torch.optim.Adam(
        [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.02}], lr=0.01
    )
    scheduler = SCHEDULERS[name](optimizer)
    train(model, optimizer, 5, scheduler)
    before = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
    method = dvi.from_torch(optimizer, scheduler)
    read = [[float(part.at(float(t)).lr) for part in method.methods] for t in range(40)]
    betas = [method.at(float(t)).Q().denominator[1] for t in range(40)]
    now = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    assert now == before  # the user's own has not been stepped
    for t in range(40):
        assert read[t] == [max(g["lr"], 1e-16 * g["initial_lr"]) for g in optimizer.param_groups], t
        assert betas[t] == -optimizer.param_groups[0]["betas"][0]
        train(model, optimizer, 1, scheduler)


@pytest.mark.parametrize("kind", ["SGD", "Nesterov", "Adam", "AdamW", "NAdam", "RAdam"])
def test_cycled_momentum(kind):
    nesterov = {"SGD": {"momentum": 0.9, "dampening": 0.1}, "Nesterov": {"momentum": 0.9, "nesterov": True}}
    make = getattr(torch.optim, "SGD" if kind in nesterov else kind)
    agree(
        lambda model: make(model.parameters(), lr=0.01, **nesterov.get(kind, {})),
        lambda o: lr_scheduler.OneCycleLR(o, 0.02, total_steps=80),
        before=9,
        steps=60,
    )


def test_two_schedulers_stepped_together():
    def both(optimizer):
        pair = [lr_scheduler.ExponentialLR(optimizer, 0.97), lr_scheduler.StepLR(optimizer, 10, 0.5)]

        class Both(list):
            def step(self):
                for scheduler in self:
                    scheduler.step()

        return Both(pair)

    agree(lambda model: torch.optim.SGD(model.parameters(), lr=0.1), both, before=3, steps=40)


def test_jumps_are_breakpoints_and_trends_are_not():
    def jumps(schedule):
        optimizer = torch.optim.SGD(network().parameters(), lr=0.1)
        method = dvi.from_torch(optimizer, schedule(optimizer))
        read = method.schedule("lr", 50.0)
        return [t for t in range(1, 50) if read.jumps(t)]

    assert jumps(SCHEDULERS["StepLR"]) == [15, 30, 45]
    assert jumps(SCHEDULERS["MultiStepLR"]) == [12, 20]
    assert jumps(SCHEDULERS["CosineAnnealingWarmRestarts"]) == [12, 24, 36, 48]
    for smooth in ("LambdaLR", "LinearLR", "CosineAnnealingLR", "ExponentialLR", "PolynomialLR"):
        assert jumps(SCHEDULERS[smooth]) == [], smooth


def test_a_warm_up_from_zero_runs_in_a_flow():
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.5, 0.9))
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, t / 10))
    problem = dvi.Problem.from_module(model, mse, X, Y)
    race = dvi.compare(problem, optimizer, 20, scheduler=scheduler, progress=False)
    # measured: 5e-5 where the path is 0.3 long; without the schedule the flow ends 0.1 away
    assert race.distance["discrete", "central"][-1] < 5e-3


def test_a_scheduler_that_was_not_handed_over_is_asked_for():
    optimizer = torch.optim.SGD(network().parameters(), lr=0.1)
    scheduler = lr_scheduler.StepLR(optimizer, 5)
    with pytest.raises(SpecError, match="scheduler=scheduler"):
        dvi.from_torch(optimizer)
    assert dvi.from_torch(optimizer, scheduler=False).methods[0].lr == 0.1
    assert callable(dvi.from_torch(optimizer, scheduler).methods[0].lr)


def test_what_is_no_schedule_of_the_step_is_refused():
    optimizer, other = (torch.optim.SGD(network().parameters(), lr=0.1, momentum=0.5) for _ in range(2))
    with pytest.raises(SpecError, match="ReduceLROnPlateau sets the learning rate by a measured quantity"):
        dvi.from_torch(optimizer, lr_scheduler.ReduceLROnPlateau(optimizer))
    with pytest.raises(SpecError, match="belongs to another optimizer"):
        dvi.from_torch(optimizer, lr_scheduler.StepLR(other, 3))
    with pytest.raises(SpecError, match="not a function"):
        dvi.from_torch(optimizer, lambda t: 0.1)

    class Sly(lr_scheduler.StepLR):
        def step(self):
            super().step()
            self.optimizer.param_groups[0]["momentum"] = 0.9 if self.last_epoch > 5 else 0.5

    method = dvi.from_torch(optimizer, Sly(optimizer, 10))
    with pytest.raises(SpecError, match=r"changes momentum of group 0 from 0\.5 to 0\.9"):
        method.at(7.0)


# ---- the state -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["SGD", "RMSprop", "Adagrad", "AdamW", "NAdam", "RAdam"])
def test_a_checkpoint_is_a_start(kind):
    """Saved, loaded into new objects, and gone on from: the next steps are those of the user's own loop."""
    extra = {"momentum": 0.9} if kind == "SGD" else {}

    def make(model):
        optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.01, **extra)
        return optimizer, lr_scheduler.CosineAnnealingLR(optimizer, 50)

    model = network()
    optimizer, scheduler = make(model)
    train(model, optimizer, 20, scheduler)
    saved = copy.deepcopy([x.state_dict() for x in (model, optimizer, scheduler)])
    theirs = train(model, optimizer, 20, scheduler)

    model = network(seed=5)
    optimizer, scheduler = make(model)
    for thing, state in zip((model, optimizer, scheduler), saved, strict=True):
        thing.load_state_dict(state)
    problem = dvi.Problem.from_module(model, mse, X, Y)
    method = dvi.from_torch(optimizer, scheduler, start="state")
    train(model, optimizer, 3, scheduler)  # what was read stays what it was
    ours = steps_of(problem, method, 20)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=0, atol=4 * np.finfo(float).eps)  # two roundings or so
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=ROUNDING)


def test_fresh_begins_anew_and_state_needs_one():
    model = network()
    problem = dvi.Problem.from_module(model, mse, X, Y)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with pytest.raises(SpecError, match="has made no step yet"):
        dvi.from_torch(optimizer, start="state")
    first = train(model, optimizer, 10)
    fresh = steps_of(problem, dvi.from_torch(optimizer, start="fresh"), 10)
    np.testing.assert_allclose(fresh, first, rtol=0, atol=ROUNDING)
    gone_on = steps_of(problem, optimizer, 10)  # the problem was made earlier: it starts where the parameters are now
    np.testing.assert_allclose(gone_on, train(model, optimizer, 10), rtol=0, atol=ROUNDING)
    with pytest.raises(SpecError, match="start is"):
        dvi.from_torch(optimizer, start="new")


def test_compare_takes_the_optimizer_and_goes_on_from_its_state():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    train(model, optimizer, 100)
    problem = dvi.Problem.from_module(model, mse, X, Y)
    race = dvi.compare(problem, optimizer, 20, start="state", progress=False)
    assert not race.notes  # the buffer is full: no warm start
    assert race.about["warm_start"] == 0
    assert race.about["method"] == "HeavyBall(lr=0.05, momentum=0.9, L2 penalty=0.01)"
    assert race.discrete.loss[0] > float(problem.value(problem.w0))  # with the penalty
    theirs = train(model, optimizer, 20)
    np.testing.assert_allclose(race.discrete.w, theirs[19], rtol=0, atol=1e-12)
    assert race.distance["discrete", "central"][-1] < 1e-3
    fresh = dvi.compare(problem, optimizer, 5, start="fresh", progress=False, warm_start=0)
    assert fresh.distance["discrete", "central"][0] == 0
    with pytest.raises(ValueError, match=r"for a torch\.optim\.Optimizer"):
        dvi.compare(problem, dvi.methods.GradientDescent(0.1), 5, start="state")
    y = dvi.discrete(problem, dvi.methods.GradientDescent(0.1)).initial
    moved = dvi.State(y.w + 1, y.nu, 0.0)
    race = dvi.compare(problem, dvi.methods.GradientDescent(0.01), 3, start=moved, progress=False)
    assert race.discrete.loss[0] == float(problem.value(moved.w))


def test_parameters_with_different_numbers_of_steps():
    def make(model):
        optimizer = torch.optim.Adam(model[0].parameters(), lr=0.01)
        train(model, optimizer, 6)
        optimizer.add_param_group({"params": list(model[2].parameters())})
        return optimizer

    agree(make, before=4, steps=40)


def test_single_precision_training_is_gone_on_from_in_double():
    model = network(dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        mse(model(X.float()), Y.float()).backward()
        optimizer.step()
    problem = dvi.Problem.from_module(copy.deepcopy(model).double(), mse, X, Y)
    flow = dvi.central_flow(problem, optimizer)
    assert flow.initial.w.dtype == torch.float64
    exact = optimizer.state[model[0].weight]["exp_avg_sq"].double().reshape(-1)
    torch.testing.assert_close(flow.method.init(flow.initial.w)["v"][:15], exact, rtol=0, atol=0)


# ---- whose parameters are which weights -----------------------------------------------------------------------------


def test_groups_need_not_follow_the_order_of_w():
    def make(model):
        last, weight, bias = [*model[2].parameters()], model[0].weight, model[0].bias
        return torch.optim.AdamW([{"params": [*last[::-1], bias], "lr": 0.02}, {"params": [weight]}], lr=0.01)

    agree(make, before=3, steps=50)


def test_frozen_parameters_are_no_weights():
    def make(model):
        model[0].bias.requires_grad_(False)
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    model = network()
    optimizer = make(model)
    problem = dvi.Problem.from_module(model, mse, X, Y)
    assert problem.dim == 27
    ours = steps_of(problem, optimizer, 20)
    theirs = train(model, optimizer, 20)
    np.testing.assert_allclose(ours[:, 15:], theirs[:, 20:], rtol=0, atol=ROUNDING)


def test_what_does_not_match_is_named():
    model = network()
    problem = dvi.Problem.from_module(model, mse, X, Y)
    with pytest.raises(SpecError, match=r"does not move 2\.weight, 2\.bias"):
        dvi.central_flow(problem, torch.optim.SGD(model[0].parameters(), lr=0.1))
    with pytest.raises(SpecError, match=r"parameter 0 of group 0 .* is no parameter of the model"):
        dvi.central_flow(problem, torch.optim.SGD(network(1).parameters(), lr=0.1))
    scale = nn.Parameter(torch.ones(1, dtype=torch.float64))
    with pytest.raises(SpecError, match="parameter 4 of group 0"):
        dvi.central_flow(problem, torch.optim.SGD([*model.parameters(), scale], lr=0.1))
    with pytest.raises(SpecError, match=r"2\.extra, and the problem has no such weights"):
        dvi.central_flow(problem, torch.optim.SGD([*network(1).named_parameters(), ("2.extra", scale)], lr=0.1))
    wide = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    with pytest.raises(SpecError, match=r"0\.weight has shape \[6, 3\] in the optimizer, \[5, 3\] in w"):
        dvi.central_flow(problem, torch.optim.SGD(wide.named_parameters(), lr=0.1))
    with pytest.raises(SpecError, match="their order in the vector is unknown"):
        dvi.central_flow(dvi.Problem(lambda w: w.square().sum(), problem.w0), torch.optim.SGD(model.parameters(), 0.1))


def test_a_padding_row_may_not_decay():
    model = nn.Sequential(nn.Embedding(4, 2, padding_idx=0), nn.Flatten(), nn.Linear(6, 1)).double()
    problem = dvi.Problem.from_module(model, mse, torch.tensor([[0, 1, 2], [3, 1, 0]]), Y[:2, :1])
    for kind in (torch.optim.Adam, torch.optim.AdamW):
        with pytest.raises(SpecError, match=r"0\.weight has a padding row"):
            dvi.central_flow(problem, kind(model.parameters(), lr=0.01, weight_decay=0.1))
    groups = [{"params": model[0].parameters(), "weight_decay": 0.0}, {"params": model[2].parameters()}]
    dvi.central_flow(problem, torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1))


def test_one_flat_tensor_needs_no_names():
    w = torch.ones(4, dtype=torch.float64, requires_grad=True)
    problem = dvi.Problem(lambda w: (w**4).sum(), w)
    optimizer = torch.optim.SGD([w], lr=0.01, momentum=0.5)
    ours = steps_of(problem, optimizer, 5)
    for _ in range(5):
        optimizer.zero_grad()
        (w**4).sum().backward()
        optimizer.step()
    np.testing.assert_allclose(ours[-1], w.detach(), rtol=0, atol=ROUNDING)


# ---- the loss that the optimizer minimises --------------------------------------------------------------------------


def test_a_penalty_is_part_of_the_problem_of_every_flow():
    model = network()
    problem = dvi.Problem.from_module(model, mse, X, Y)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": [p for p in model.parameters() if p.ndim == 1]}]
    flow = dvi.central_flow(problem, torch.optim.Adam(groups, lr=0.01))
    L, g = problem.value_and_grad(problem.w0)
    penalised, h = flow.problem.value_and_grad(problem.w0)
    expected = 0.05 * sum(float(p.detach().square().sum()) for p in decayed)
    assert float(penalised - L) == pytest.approx(expected, rel=1e-12)
    named = problem.penalised({"0.weight": 0.1, "2.weight": 0.1})
    torch.testing.assert_close(named.value_and_grad(problem.w0)[1], h)
    assert not torch.allclose(g, h)
    doubled = dvi.Problem.from_module(model, mse, X, Y, weight_decay=0.1)
    for twice in (doubled, named):
        with pytest.raises(SpecError, match="Both the optimizer"):
            dvi.central_flow(twice, torch.optim.Adam(groups, lr=0.01))
    dvi.central_flow(doubled, torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1))  # no penalty


def test_changed_problems():
    quartic = dvi.Problem(lambda w: (w**4).sum(), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    w = torch.tensor([0.3, 1.0, -1.0], dtype=torch.float64)
    strength = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
    V = torch.eye(3, dtype=torch.float64)
    for derivatives in ("autodiff", "mixed", "finite-difference"):
        problem = dvi.Problem(lambda w: (w**4).sum(), quartic.w0, derivatives=derivatives)
        penalised = problem.penalised(strength)
        rough = 1e-6 if derivatives == "finite-difference" else 1e-12
        torch.testing.assert_close(penalised.value_and_grad(w)[1], 4 * w**3 + strength * w)
        torch.testing.assert_close(penalised.hvp(w, V), torch.diag(12 * w**2 + strength), rtol=rough, atol=rough)
        up = problem.negated()
        torch.testing.assert_close(up.hvp(w, V), -torch.diag(12 * w**2), rtol=rough, atol=rough)
        penalised.check()
    assert quartic.starting_at(w).w0.equal(w)
    for wrong in (-1.0, float("nan"), torch.ones(2)):
        with pytest.raises(dvi.ProblemError):
            quartic.penalised(wrong)
    with pytest.raises(dvi.ProblemError, match="no model"):
        quartic.penalised({"a": 1.0})
    with pytest.raises(dvi.ProblemError, match="no trainable parameter is called w"):
        dvi.Problem.from_module(network(), mse, X, Y).penalised({"w": 1.0})


# ---- the flows ------------------------------------------------------------------------------------------------------


def falling(t):
    return 0.02 / (1 + t / 30)


def halves(first, second, joint):
    where = (torch.tensor([4, 0, 2]), torch.tensor([1, 3, 5]))
    return Grouped((first, second), where, (None, None), "", joint)


DECLARED = {
    "joint": halves(dvi.methods.Adam(0.02, 0.5, 0.9), dvi.methods.Adam(0.01, 0.5, 0.8), True),
    "joint, decay": halves(
        dvi.methods.AdamW(0.02, 0.5, 0.9, weight_decay=0.1), dvi.methods.AdamW(0.01, 0.5, 0.9, weight_decay=0.0), True
    ),
    "joint, scheduled": halves(dvi.methods.RMSProp(falling, 0.9), dvi.methods.RMSProp(0.01, 0.9), True),
    "apart": halves(dvi.methods.RMSPropNorm(0.02, 0.9), dvi.methods.AdaGrad(0.05), False),
    "no state": halves(dvi.methods.HeavyBall(0.02, 0.5), dvi.methods.HeavyBall(0.01, 0.5), False),
    "nesterov": ScheduledNesterov(0.01, 0.5, 0.5),
    "nadam": RisingNAdam(0.01, 0.5, 0.9, 1e-8, 0.5, 0.5, 0.5, 0.5),
    "radam": RectifiedAdam(0.01, 0.5, 0.9, 1e-8, 1.0, 0.7),
}


@pytest.mark.parametrize("name", DECLARED)
def test_declarations_conform(name):
    """Derivatives, α and β against finite differences of the gap along the flow."""
    dvi.testing.check_method(DECLARED[name])


def test_scattered_blocks_know_what_is_dead_and_what_decays():
    P = dvi.Blocks(
        [dvi.Diagonal(torch.tensor([0.0, 2.0])), dvi.Scalar(3.0)], [2, 2], torch.tensor([3, 0, 1, 2])
    )  # p is 2, 3, 3, 0 in the order of w
    assert P.dead().tolist() == [False, False, False, True]
    P.check(torch.tensor([1.0, 1.0, 1.0, 0.0]))
    with pytest.raises(dvi.NotPositiveDefiniteError, match="Block 1 of 2"):
        P.check(torch.tensor([1.0, 1.0, 1.0, 1.0]))
    share = PerWeight.of(torch.tensor([0.5, 1.0, 2.0, 1.0]), torch.ones(4))
    assert P.weighted(share).apply(torch.ones(4)).tolist() == [1.0, 3.0, 6.0, 0.0]


def test_joint_groups_have_the_flow_of_groups_apart():
    model = network()
    problem = dvi.Problem.from_module(model, mse, X, Y)
    biases = [p for p in model.parameters() if p.ndim == 1]
    weights = [p for p in model.parameters() if p.ndim > 1]
    method = dvi.from_torch(torch.optim.AdamW([{"params": weights}, {"params": biases, "lr": 2e-2}], lr=1e-2))
    assert method.joint
    flow = dvi.central_flow(problem, method)
    apart = Grouped(flow.method.methods, flow.method.where, flow.method.starts, "", False)
    other = dvi.central_flow(problem, apart, check=False)
    U = torch.randn(problem.dim, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one, two = flow.linearise(problem.w0, flow.initial.nu, U), other.linearise(problem.w0, other.initial.nu, U)
    for name in ("alpha", "beta", "gap"):
        torch.testing.assert_close(getattr(one, name), getattr(two, name))
    uniform = dvi.central_flow(problem, dvi.methods.AdamW(1e-2), check=False)  # it is not the same as without groups
    assert not torch.allclose(one.alpha, uniform.linearise(problem.w0, uniform.initial.nu, U).alpha)


STABLE = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.8, dampening=0.2),
    "Nesterov": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.8, nesterov=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=2e-3, alpha=0.9),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.02, lr_decay=0.05),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=2e-3, betas=(0.8, 0.95), weight_decay=1.0),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=2e-3, betas=(0.8, 0.95)),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=2e-3, betas=(0.8, 0.95)),
}


@pytest.mark.parametrize("name", STABLE)
def test_where_nothing_oscillates_a_flow_from_the_state_is_the_optimizer(name):
    """The momentum that a flow starts with, and its schedules, are right: it stays close from the first step on.

    A flow of second order is off by O(η²); that of a filter with a direct part (Nesterov) by more.  A start with an
    empty buffer is off by a tenth of the path or more.
    """
    model = network()
    optimizer = STABLE[name](model.parameters())
    train(model, optimizer, 12)
    problem = dvi.Problem.from_module(model, mse, X, Y)
    race = dvi.compare(problem, optimizer, 30, accuracy="second-order", warm_start=0, progress=False)
    path = (race.discrete.w - problem.w0).norm()
    assert race.central.eigenvalues[:, 0].max() < 2
    assert path > 0.02
    # measured: 2e-4 to 3e-3, and 9e-3 for Nesterov
    assert race.distance["discrete", "central"].max() < 0.02 * path


def test_a_run_from_a_state_is_resumed(tmp_path):
    model = network()
    optimizer = torch.optim.AdamW(
        [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 2e-2}], lr=1e-2, betas=(0.5, 0.9)
    )
    scheduler = lr_scheduler.StepLR(optimizer, 8, 0.5)
    train(model, optimizer, 5, scheduler)
    problem = dvi.Problem.from_module(model, mse, X, Y)
    arguments = dict(scheduler=scheduler, progress=False, path=tmp_path / "race.h5")
    dvi.compare(problem, optimizer, 3, **arguments)
    longer = dvi.compare(problem, optimizer, 6, resume=True, **arguments)
    whole = dvi.compare(problem, optimizer, 6, scheduler=scheduler, progress=False)
    np.testing.assert_array_equal(longer.distance["discrete", "central"], whole.distance["discrete", "central"])
    optimizer.state[model[0].weight]["exp_avg"].mul_(2.0)
    with pytest.raises(dvi.StoreError, match="momentum at the start"):
        dvi.compare(problem, optimizer, 6, resume=True, **arguments)


def test_complex_parameters_are_pairs():
    w = nn.Parameter(torch.tensor([1 + 2j, -0.5 + 0.3j], dtype=torch.complex128))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = w

        def forward(self, x):
            return (self.w * x).abs().square().sum() + self.w.real.sum()

    model, x = Model(), torch.tensor([1.0, 2.0], dtype=torch.float64)
    optimizer = torch.optim.Adam([w], lr=0.01, weight_decay=0.1)

    def go(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            model(x).backward()
            optimizer.step()

    go(3)
    ours = steps_of(dvi.Problem.from_module(model, None, x), optimizer, 5)
    go(5)
    np.testing.assert_allclose(ours[-1], torch.view_as_real(w.detach()).reshape(-1), rtol=0, atol=ROUNDING)


def test_formulas_are_derived_of_an_optimizer():
    model = network()
    optimizer = torch.optim.Adam([{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.1}])
    assert dvi.derive(optimizer).latex() == dvi.derive(dvi.methods.Adam(1e-3)).latex()
    with pytest.raises(SpecError, match="each group has its own formulas"):
        dvi.derive(optimizer, numeric=True)


def test_it_travels():
    model = network()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.01)
    train(model, optimizer, 3)
    problem = dvi.Problem.from_module(model, mse, X, Y)
    method, other = pickle.loads(pickle.dumps((dvi.from_torch(optimizer), problem)))
    np.testing.assert_array_equal(steps_of(other, method, 5), steps_of(problem, optimizer, 5))
    assert repr(method) == repr(dvi.from_torch(optimizer))
    assert repr(method).startswith("AdamW(lr=0.01, ")
    assert "steps_before=3" in repr(method)


# ---- what does not fit ---------------------------------------------------------------------------------------------

REFUSED = {
    "Adadelta": (lambda p: torch.optim.Adadelta(p), "Adadelta has no central flow: .* nearest that fits: RMSprop"),
    "Adafactor": (lambda p: torch.optim.Adafactor(p), "clips the update"),
    "Adamax": (lambda p: torch.optim.Adamax(p), "maximum"),
    "ASGD": (lambda p: torch.optim.ASGD(p), "average of w"),
    "LBFGS": (lambda p: torch.optim.LBFGS(p), "line search"),
    "Rprop": (lambda p: torch.optim.Rprop(p), "sign of the gradient"),
    "SparseAdam": (lambda p: torch.optim.SparseAdam(p), "dense gradients"),
    "amsgrad": (lambda p: torch.optim.Adam(p, amsgrad=True), "amsgrad=True keeps the largest v"),
    "RMSprop, momentum": (lambda p: torch.optim.RMSprop(p, momentum=0.9), r"Adam\(betas=\(0\.9, 0\.99\)\)"),
    "dampening 1": (lambda p: torch.optim.SGD(p, momentum=0.9, dampening=1.0), "must be below 1"),
    "no rate": (lambda p: torch.optim.SGD(p, lr=0.0), "Freeze them instead"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_by_name(name):
    make, words = REFUSED[name]
    with pytest.raises(SpecError, match=words):
        dvi.from_torch(make(list(network().parameters())))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch is older than Muon")
def test_muon_is_refused_by_name():
    with pytest.raises(SpecError, match="one_sided=True"):
        dvi.from_torch(torch.optim.Muon([network()[0].weight]))


def test_what_is_not_known_is_refused_by_name():
    model = network()
    parameters = list(model.parameters())

    class Mine(torch.optim.SGD):
        pass

    with pytest.raises(SpecError, match="Mine is not one of torch's optimizers"):
        dvi.from_torch(Mine(parameters, lr=0.1))
    with pytest.raises(SpecError, match=r"takes a torch\.optim\.Optimizer, not a list"):
        dvi.from_torch(parameters)
    optimizer = torch.optim.SGD([{"params": parameters, "trust": 0.1, "name": "all"}], lr=0.1)
    with pytest.raises(SpecError, match="the option trust is not known"):
        dvi.from_torch(optimizer)
    optimizer = torch.optim.Adam(parameters)
    train(model, optimizer, 1)
    optimizer.state[parameters[0]]["exp_avg_cubed"] = torch.zeros(5, 3)
    with pytest.raises(SpecError, match="the state holds exp_avg_cubed"):
        dvi.from_torch(optimizer)
    optimizer = torch.optim.Adam(parameters)
    optimizer.register_step_pre_hook(lambda *args: None)
    with pytest.raises(SpecError, match="has a hook on its step"):
        dvi.from_torch(optimizer)
    with pytest.raises(SpecError, match="All parameters of this SGD are frozen"):
        dvi.from_torch(torch.optim.SGD([torch.zeros(2)], lr=0.1))
    both = [{"params": parameters[:2], "maximize": True}, {"params": parameters[2:]}]
    with pytest.raises(SpecError, match="Some groups have maximize=True"):
        dvi.from_torch(torch.optim.SGD(both, lr=0.1))
    both = [{"params": parameters[:2], "betas": (0.5, 0.9)}, {"params": parameters[2:]}]
    with pytest.raises(SpecError, match="different momentum filters"):
        dvi.from_torch(torch.optim.Adam(both, lr=0.1))


def test_a_weight_that_torch_never_moves_does_not_decay_in_silence():
    model = network()
    unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = torch.optim.AdamW([*model.parameters(), unused], lr=0.01)
    train(model, optimizer, 2)
    with pytest.raises(SpecError, match="Parameter 4 of group 0 has never had a gradient"):
        dvi.from_torch(optimizer)


# ---- back to torch --------------------------------------------------------------------------------------------------

SHAPES = ((5, 3), (5,), (2, 5), (2,))
METHODS = {
    "rmsprop-norm": dvi.methods.RMSPropNorm(0.05, 0.9),
    "heavy ball": dvi.methods.HeavyBall(0.05, 0.9),
    "nadam": dvi.methods.NAdam(0.01),
    "adamw": dvi.methods.AdamW(0.01, weight_decay=0.3),
    "scheduled": dvi.methods.AdaGrad(lr=lambda t: 0.1 / (1 + t)),
    "shampoo": dvi.methods.Shampoo(0.1, shapes=SHAPES, eps=1e-3),
    "corrected": dvi.methods.RMSProp(0.01, 0.9, bias_correction=True),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_a_network_in_the_users_loop(name):
    """The same operations in the same order: bit by bit; and a state that is saved and loaded is gone on from."""
    method, model = METHODS[name], network()
    problem = dvi.Problem.from_module(model, mse, X, Y)
    optimizer = AsOptimizer(method, model.parameters())
    assert dvi.from_torch(optimizer) is method
    theirs = train(model, optimizer, 100)
    loaded = AsOptimizer(method, model.parameters())
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    half = steps_of(problem, loaded, 100)
    theirs = torch.cat([theirs, train(model, loaded, 100)])
    np.testing.assert_array_equal(theirs, steps_of(problem, method, 200))
    np.testing.assert_array_equal(half, theirs[100:])


def test_groups_schedulers_and_closures_of_methods():
    model = network()
    groups = [{"params": [model[0].weight, model[2].bias]}, {"params": [model[0].bias, model[2].weight], "lr": 0.02}]
    optimizer = AsOptimizer(dvi.methods.RMSPropNorm(0.05, 0.9), groups)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.95)
    train(model, optimizer, 5, scheduler)
    assert optimizer.declared(optimizer.param_groups[1]).lr == pytest.approx(0.02 * 0.95**5)
    problem = dvi.Problem.from_module(model, mse, X, Y)
    ours = steps_of(problem, dvi.from_torch(optimizer, scheduler), 30)
    np.testing.assert_array_equal(ours, train(model, optimizer, 30, scheduler))

    def closure():
        optimizer.zero_grad()
        loss = mse(model(X), Y)
        loss.backward()
        return loss

    before = mse(model(X), Y).item()
    assert optimizer.step(closure).item() == before
    assert mse(model(X), Y).item() < before


def test_methods_may_differ_between_groups_and_options_are_checked():
    model = network()
    mixed = AsOptimizer(
        dvi.methods.GradientDescent(0.05),
        [{"params": model[0].parameters()}, {"params": model[2].parameters(), "method": dvi.methods.AdaGrad(0.1)}],
    )
    problem = dvi.Problem.from_module(model, mse, X, Y)
    np.testing.assert_array_equal(steps_of(problem, mixed, 10), train(model, mixed, 10))
    with pytest.raises(SpecError, match="has no hyperparameter beta that is a number"):
        AsOptimizer(dvi.methods.GradientDescent(0.1), [{"params": model.parameters(), "beta": 1}])
    with pytest.raises(SpecError, match="lr must be positive"):
        AsOptimizer(dvi.methods.GradientDescent(0.1), [{"params": model.parameters(), "lr": -1.0}])
    with pytest.raises(SpecError, match="Complex parameters"):
        AsOptimizer(dvi.methods.GradientDescent(0.1), [torch.zeros(2, dtype=torch.complex64, requires_grad=True)])
    with pytest.raises(SpecError, match="not a str"):
        AsOptimizer("sgd", model.parameters())


def test_a_warm_up_from_zero_of_a_method():
    model = network()
    optimizer = AsOptimizer(dvi.methods.HeavyBall(0.05, 0.9), model.parameters())
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, t / 5))
    problem = dvi.Problem.from_module(model, mse, X, Y)
    ours = steps_of(problem, dvi.from_torch(optimizer, scheduler), 10)
    np.testing.assert_array_equal(ours, train(model, optimizer, 10, scheduler))
