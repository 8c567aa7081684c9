"""Conformance checks for what users add: an integrator, a method, a preconditioner, a problem.

Each is a plain function to be called in a test.  It raises AssertionError, in words that name what is violated.  The
library's own tests use them.

>>> import dvi, dvi.testing
>>> dvi.testing.check_method(dvi.methods.RMSProp(lr=0.01, beta2=0.9))
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from itertools import permutations
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dvi.compiler.flows import CentralFlow, CompiledFlow, StableFlow
from dvi.compiler.optimizer import Discrete
from dvi.interop.binding import MethodLike, read
from dvi.methods import GradientDescent, NotPositiveDefiniteError, Preconditioner, SpecError
from dvi.problems import Cubic, DerivativeError, MatrixSweep, Problem, ProblemError
from dvi.results.run_error import RunError
from dvi.runs.solving import solve
from dvi.solvers import ccp
from dvi.solvers.errors import SolverError
from dvi.solvers.integrator import Driver
from dvi.solvers.protocol import Integrator, State
from dvi.solvers.svec import smat, svec, triu
from dvi.storage.checkpoint import from_bytes, to_bytes

_REFUSALS = (SpecError, NotPositiveDefiniteError, ProblemError, DerivativeError)


def _require(holds: Any, words: str) -> None:
    if not bool(holds):
        raise AssertionError(words)


# ---- an integrator ------------------------------------------------------------------------------------------


def check_integrator(integrator: Integrator, tolerance: float = 1e-2) -> None:
    """Check an integrator on :class:`dvi.problems.MatrixSweep`, whose eigenvalues reach 2 one after the other.

    The check compares weights and entries with the exact ones.  For each step it checks the length and the node, and
    that the step depends only on its arguments.  It also checks that the memory survives a checkpoint, that the step
    interpolates between both its ends, and that every CCP is counted.  If the integrator accepts the stable flow, k
    must be 0 there.

    Args:
        integrator: an integrator that accepts a central flow, of either accuracy.
        tolerance: the largest allowed distance from the exact weights at the whole times up to 36.  Weights move at a
            speed of 0.16.

    Raises:
        AssertionError: if the integrator fails; the message names what is violated.
    """
    driver = Driver(integrator)
    steady, slowing = (MatrixSweep([0.6, 0.5], [0.3, 0.2], lr=0.2, decay=decay, seed=1) for decay in (0.0, 0.04))
    flow = CentralFlow(steady.problem, GradientDescent(0.2), accuracy="paper")
    recorded, sweep = CentralFlow(slowing.problem, GradientDescent(slowing.learning_rate), accuracy="paper"), slowing
    if driver.accepts(flow):  # at second order, the sweep is exact only with a constant learning rate
        recorded = flow = CentralFlow(steady.problem, GradientDescent(0.2), accuracy="second-order")
        sweep = steady
    if refusal := driver.accepts(flow):
        raise AssertionError(f"{driver} accepts no central flow, the only flow that is checked here: {refusal}")
    _check_steps(driver, flow, "central")
    stable = StableFlow(steady.problem, GradientDescent(0.2), accuracy=flow.accuracy)
    if not driver.accepts(stable):
        _check_steps(driver, stable, "stable")
    _check_sweep(integrator, recorded, sweep, tolerance)


def _check_sweep(integrator: Integrator, flow: CompiledFlow, sweep: MatrixSweep, tolerance: float) -> None:
    try:
        solution = solve(flow, 36, integrator=integrator, save=("w",), progress=False)
    except RunError as error:
        raise AssertionError(f"the run on the matrix sweep ends early: {error}") from error
    entries = np.array(sweep.entry_times)
    for t, w in zip(solution.t, solution.series["w"], strict=True):
        off = float(np.linalg.norm(w - sweep.weights(float(t)).numpy()))
        _require(off <= tolerance, f"at t = {t:g} the weights are {off:.2g} from the exact ones, {tolerance:g} allowed")
        if np.abs(entries - t).min() > 1 and t < entries.max() + 5:
            k = next((k for when, _, k in reversed(solution.breakpoints) if when <= t), 0)
            exact = int((entries < t).sum())
            _require(k == exact, f"at t = {t:g} there are {k} directions at 2, but {exact} on the exact flow")


def _check_steps(driver: Driver, flow: CompiledFlow, name: str, h: float = 3.0) -> None:
    """Take steps up to t = 4, each of them twice; on the central flow, directions enter at 2 and 2.5."""
    y, ledger = flow.initial, flow.problem.ledger
    memory = driver.init(flow, y)
    solved: list[Any] = []

    def counting(*args: Any, **kwargs: Any) -> Any:
        solved.append(original(*args, **kwargs))
        return solved[-1]

    original = ccp.solve
    while y.t < 4:
        where = f"{name} flow, step from t = {y.t:g}"
        with flow.timetable.stretch(y.t), mock.patch.object(ccp, "solve", counting):
            before, solved[:] = ledger.ccp_solves, []
            result = driver.step(flow, memory, y, h)
            counted = ledger.ccp_solves - before
            missing = len(solved) - counted
            _require(missing <= 0, f"{where}: of {len(solved)} CCPs {missing} were not counted (flow.count_ccp)")
            reached = result.y.t
            _require(y.t < reached <= y.t + h + 1e-9, f"{where}: it ends at {reached:g}, with h = {h:g} allowed")
            _require(result.node.t == y.t, f"{where}: its node is that of t = {result.node.t:g}, not of the beginning")
            if not flow.constrained:
                _require(result.node.k == 0 and not counted, f"{where}: k = 0 and no CCP where nothing is constrained")
            _check_same(driver.step(flow, memory, y, h).y, result.y, f"{where}: taken again it ends elsewhere")
            if driver.horizon(memory) <= h:
                longer = driver.step(flow, memory, y, 2 * h)
                _check_same(longer.y, result.y, f"{where}: beyond its horizon, a longer h changes it")
            try:
                stored, at = from_bytes(to_bytes((memory, y)))
            except TypeError as error:
                raise AssertionError(f"{where}: {error}") from error
            again = driver.step(flow, stored, at, h).y
            _check_same(again, result.y, f"{where}: with a memory from a file it ends elsewhere")
            for t, end in ((y.t, y), (result.y.t, result.y)):
                off = float((result.interpolate(t).w - end.w).abs().max())
                # dense output is exact at both ends up to the rounding of its coefficients
                _require(off <= 1e-11, f"{where}: interpolated at its end t = {t:g} it is {off:.2g} off")
        memory, y = result.memory, result.y
    with flow.timetable.stretch(y.t):
        seen = driver.observe(flow, memory, y)
    _require(seen.t == y.t, f"{name} flow: observe at t = {y.t:g} gives the node of t = {seen.t:g}")
    _require(flow.constrained or seen.k == 0, f"{name} flow: observe gives k = {seen.k} where nothing is constrained")


def _check_same(one: State, other: State, words: str) -> None:
    same = one.t == other.t and torch.equal(one.w, other.w)
    _require(same, f"{words}, {float((one.w - other.w).abs().max()):.2g} away at t = {one.t:g} and {other.t:g}")


# ---- a method -----------------------------------------------------------------------------------------------


def check_method(method: MethodLike, problem: Problem | None = None) -> None:
    """Check a method: its declaration, its derivatives, α and β, five steps of the optimizer, and that it pickles.

    The derivatives of f and P are compared with finite differences, and α and β with differences of the gap along the
    flow.

    Args:
        method: a method as for :func:`dvi.central_flow`.
        problem: a problem in float64 on which the optimizer does not diverge (default: a cubic in six weights).

    Raises:
        AssertionError: if the method fails; the message names what is violated.
    """
    problem = problem or Cubic(6, seed=3, scale=0.1).problem
    try:
        method = read(method)
        flow = CentralFlow(problem, method, check=False, accuracy="paper")
    except _REFUSALS as error:
        raise AssertionError(f"it does not compile: {error}") from error
    optimizer = Discrete(problem, method, check=False)
    y, (_, g) = optimizer.initial, optimizer.value_and_grad(optimizer.initial)
    try:
        for _ in range(5):
            y, _, g = optimizer.step(y, g)
    except (SolverError, *_REFUSALS) as error:
        raise AssertionError(f"the optimizer does not run: {error}") from error
    moved = torch.isfinite(y.w).all() and not torch.equal(y.w, optimizer.initial.w)
    _require(moved, f"five steps of the optimizer do not move the weights, or are not finite: {y.w.tolist()[:6]} …")
    _check_rates(flow, y)
    try:
        copy = pickle.loads(pickle.dumps(method))
    except Exception as error:
        words = f"it cannot be pickled: {error}. Define it and its schedules by name, in a module."
        raise AssertionError(words) from error
    pairs = zip(*(pytree.tree_leaves(m.update(y.nu, g, y.t)) for m in (method, copy)), strict=True)
    _require(all(torch.equal(a, b) for a, b in pairs), "its pickled copy gives another ν")


def _check_rates(flow: CentralFlow, y: State) -> None:
    """Check that the gap changes at the rate β[X] − α along the drift: five points, truncation s⁴, rounding ε/s."""
    rng, d, t = np.random.default_rng(0), len(y.w), y.t + 0.3  # not at a whole time, where schedules may have kinks
    k = min(2, d)
    U = torch.from_numpy(rng.normal(size=(d, k)) / d**0.5).to(y.w)
    X = rng.normal(size=(k, k))
    X = X @ X.T
    lin = flow.linearise(y.w, y.nu, U, t=t)
    rate = lin.drift(X)

    def gap(s: float) -> Any:
        moved = State(y.w, y.nu, t).moved(rate, s)
        return flow.linearise(moved.w, moved.nu, U, t=moved.t).gap.numpy()

    eps = float(torch.finfo(y.w.dtype).eps)
    still = [(x / v).abs()[(x != 0) & (v != 0)] for x, v in zip(*map(pytree.tree_leaves, (y.nu, rate.nu)), strict=True)]
    fastest = min([1 / float(rate.w.norm()), *(float(x.min()) for x in still if x.numel())])  # the shortest time scale
    s = 2 * eps**0.2 * fastest
    slope = (8 * (gap(s) - gap(-s)) - (gap(2 * s) - gap(-2 * s))) / (12 * s)
    predicted = smat(lin.beta.numpy() @ svec(X)) - lin.alpha.numpy()
    size = np.abs(lin.gap.numpy()).max() + np.abs((U.T @ flow.problem.hvp(y.w, U)).numpy()).max()
    allowed = 1e-5 * (np.abs(slope).max() + np.abs(lin.alpha.numpy()).max()) + 100 * eps * size / s
    off = np.abs(slope - predicted).max()
    _require(
        off <= allowed,
        f"along the flow the gap changes at a rate that is {off:.2g} from β[X] − α; {allowed:.1g} is allowed. "
        f"Differences give {slope.tolist()}, α and β {predicted.tolist()}",
    )


# ---- a preconditioner ---------------------------------------------------------------------------------------


def check_preconditioner(P: Preconditioner, d: int, like: Tensor | None = None) -> None:
    """Check a preconditioner against its own matrix [d, d]: symmetry, positive definiteness, inverse and square roots.

    Args:
        P: the preconditioner.
        d: its number of weights.
        like: a tensor with the dtype and device of the check (default: float64 on the CPU).

    Raises:
        AssertionError: if the preconditioner fails; the message names what is violated.
    """
    eye = torch.eye(d, dtype=torch.float64) if like is None else torch.eye(d).to(like)
    eps = float(torch.finfo(eye.dtype).eps)
    dead = P.dead()
    live = np.ones(d, dtype=bool) if dead is None else ~dead.cpu().numpy()
    _check_shapes(P, eye)
    M = P.apply(eye).double().cpu().numpy()
    _require(np.isfinite(M).all(), "apply: P has entries that are not finite")
    asymmetry = np.abs(M - M.T).max()
    _require(asymmetry <= 100 * d * eps * np.abs(M).max(), f"apply: P is not symmetric, by {asymmetry:.2g}")
    _require(not M[~live].any(), "dead: P is not zero where it says that coordinates are dead")
    values, Q = np.linalg.eigh(0.5 * (M + M.T)[np.ix_(live, live)])
    _require((values > 0).all(), f"P is not positive definite: its smallest eigenvalue is {values.min(initial=0):.3g}")
    condition = values.max(initial=1) / values.min(initial=values.max(initial=1))
    for name, power in (("solve", -1.0), ("sqrt", 0.5), ("inv_sqrt", -0.5)):
        expected = np.zeros((d, d))
        expected[np.ix_(live, live)] = (Q * values**power) @ Q.T
        off = np.abs(getattr(P, name)(eye).double().cpu().numpy() - expected).max()
        # an eigenvalue has an error of eps times the largest
        allowed = 100 * d * eps * condition * np.abs(expected).max()
        _require(off <= allowed, f"{name} is {off:.2g} from P^({power:g}) of the dense matrix, {allowed:.1g} allowed")
    mean, rate = live.sum() / np.trace(M), float(P.effective_lr())
    _require(abs(rate / mean - 1) <= 100 * d * eps, f"effective_lr is {rate:g}; the rates' harmonic mean is {mean:g}")
    try:
        P.check()
    except NotPositiveDefiniteError as error:
        raise AssertionError(f"check refuses P, which is positive definite: {error}") from error


def _check_shapes(P: Preconditioner, eye: Tensor) -> None:
    for name in ("apply", "solve", "sqrt", "inv_sqrt"):
        operation: Callable[[Tensor], Tensor] = getattr(P, name)
        together, V = operation(eye), eye.clone()
        operation(V)
        _require(torch.equal(V, eye), f"{name}: it changes its argument")
        for part in (eye[:, 0], eye[:, :0], eye):
            out = operation(part)
            _require(
                out.shape == part.shape and out.dtype == eye.dtype and out.device == eye.device,
                f"{name}: V {list(part.shape)} of {part.dtype} on {part.device} gives {list(out.shape)} of {out.dtype} "
                f"on {out.device}",
            )
        off = float((operation(eye[:, 0]) - together[:, 0]).abs().max())
        allowed = 100 * len(eye) * float(torch.finfo(eye.dtype).eps) * float(together.abs().max())
        _require(off <= allowed, f"{name}: a column alone gives another result than among others, by {off:.2g}")


# ---- a problem ----------------------------------------------------------------------------------------------


def check_problem(problem: Problem, w: Tensor | None = None) -> None:
    """Check a problem's derivatives: against differences, for symmetry of H and T, and for columns alone and together.

    Args:
        problem: the problem.
        w: the weights [d] at which to check (default: w0).

    Raises:
        AssertionError: if the problem fails; the message names what is violated.
    """
    w = problem.w0 if w is None else w
    before, rng = w.clone(), torch.get_rng_state()
    try:
        problem.check(w)
        errors = problem.uncertainty(w)
        U = torch.from_numpy(np.random.default_rng(0).normal(size=(len(w), 3)) / len(w) ** 0.5).to(w)
        with problem.ledger.paused():
            HU, T = problem.hvp(w, U), problem.hessian_gradient(w, U)
            one = (problem.hvp(w, U[:, 1]), problem.hessian_gradient(w, U[:, 1:2])[0])
        problem.check_unchanged()
    except (ProblemError, DerivativeError) as error:
        raise AssertionError(str(error)) from error
    _require(torch.equal(w, before), "a derivative has changed w in place")
    _require(torch.equal(torch.get_rng_state(), rng), "the loss draws from torch's global random numbers")
    eps = float(torch.finfo(w.dtype).eps)
    room = {name: eps**0.5 + 10 * errors.get(name, 0.0) for name in ("hvps", "third_derivatives")}
    # the pairs of columns in svec order, off-diagonal ones times √2
    cube = np.stack([smat(column) for column in (T @ U).double().cpu().numpy().T], axis=2)
    _close(HU.T @ U, (HU.T @ U).T, room["hvps"], "H is not symmetric: uᵀHv and vᵀHu")
    for order in permutations(range(3)):
        words = f"the third derivative is not symmetric: T[u, v, w] with its arguments as {order} and as (0, 1, 2)"
        _close(cube.transpose(order), cube, room["third_derivatives"], words)
    _close(one[0], HU[:, 1], room["hvps"], "hvp: a column alone and among others")
    diagonal = T[int(triu(3).diagonal[1])]
    _close(one[1], diagonal, room["third_derivatives"], "hessian_gradient: a column alone and among others")


def _close(one: Any, other: Any, room: float, words: str) -> None:
    one, other = (x.double().cpu().numpy() if isinstance(x, Tensor) else x for x in (one, other))
    off, size = np.abs(one - other).max(), np.abs(other).max()
    _require(off <= room * size, f"{words} differ by {off:.2g}, of {size:.2g}, {room:.1g} of that allowed")


__all__ = ["check_integrator", "check_method", "check_preconditioner", "check_problem"]
