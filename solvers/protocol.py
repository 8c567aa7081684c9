"""What an integrator asks of a flow, and what it gives back.

The integrators in this folder know no loss and no optimizer.  They solve any differential variational inequality of
the form (paper, C.7)

    dy/dt = F(y) + G(y)[X],    X ⪰ 0,    gap(y) = Uᵀ(2P − H)U ⪰ 0,    ⟨X, gap⟩ = 0,

whose constraint lives on a small, moving subspace U (the critical subspace) and whose gap changes along the flow as

    d gap/dt = β[X] − α.

Time is counted in unit times: one unit is one step of the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import _pytree as pytree

Array = NDArray[np.float64]
PyTree = Any


@dataclass(frozen=True)
class State:
    """Where a flow or an optimizer is.

    Attributes:
        w: weights [d].
        nu: the optimizer's state ν, a pytree of tensors.
        t: the clock, unit times.
        m: momentum, for those that have it: a flow's m [d]; of an optimizer, its filter's memory (a tuple of [d]).
    """

    w: Tensor
    nu: PyTree
    t: float
    m: PyTree = None

    @property
    def parts(self) -> tuple[Tensor, PyTree]:
        """(w, ν), what :func:`combine` takes."""
        return self.w, self.nu

    def moved(self, rate: Rate, h: float) -> State:
        """This state after h unit times at a constant rate."""
        nu = pytree.tree_map(lambda x, dx: x + h * dx, self.nu, rate.nu)
        return State(self.w + h * rate.w, nu, self.t + h)


@dataclass(frozen=True)
class Staggered:
    """Where a flow with momentum is: m [d] and ν half a step before w [d], as a leapfrog has them.

    Attributes:
        w, t: weights and clock.
        m, nu: momentum and ν at t − h/2, h the last step.
        nu_now: ν at t.
    """

    w: Tensor
    m: Tensor
    nu: PyTree
    nu_now: PyTree
    t: float

    @property
    def state(self) -> State:
        """All of it at t, the momentum as it is."""
        return State(self.w, self.nu_now, self.t, self.m)


@dataclass(frozen=True)
class Rate:
    """dw/dt [d] and dν/dt (a pytree like ν); the clock's own rate is 1."""

    w: Tensor
    nu: PyTree

    @property
    def parts(self) -> tuple[Tensor, PyTree]:
        """(dw/dt, dν/dt), what :func:`combine` takes."""
        return self.w, self.nu


def combine(terms: list[tuple[float, Any]]) -> Any:
    """The linear combination Σ cᵢ·xᵢ of pytrees of tensors, one pass over each."""
    coefficients, trees = zip(*terms, strict=True)
    return pytree.tree_map(lambda *leaves: _weighted_sum(coefficients, leaves), *trees)


def _weighted_sum(coefficients: Sequence[float], leaves: Sequence[Any]) -> Any:
    total = coefficients[0] * leaves[0]
    for c, x in zip(coefficients[1:], leaves[1:], strict=True):
        if not isinstance(total, Tensor):
            total = total + c * x
        else:  # no product of its own for each term, and where it fits no new sum
            total = total.add_(x, alpha=c) if x.dtype == total.dtype else torch.add(total, x, alpha=c)
    return total


@dataclass(frozen=True)
class Frame:
    """The critical subspace at an anchor point, with all that the constraint needs of the loss there.

    Attributes:
        w: the anchor [d].
        U: basis [d, k] with UᵀPU = I at the anchor.
        HU: H(w) U, [d, k].
        M: UᵀHU, [k, k], host float64.
        T: ∇_w of uᵢᵀH(w)uⱼ for all pairs, [k(k+1)/2, d], svec order.
        on_edge: put in HU = 2P(ν)U wherever oscillations act on ν, which is what holds on the constraint (C.5); for a
            frame that is used away from its anchor.
    """

    w: Tensor
    U: Tensor
    HU: Tensor
    M: Array
    T: Tensor
    on_edge: bool = False

    @property
    def k(self) -> int:
        """Dimension of the critical subspace."""
        return int(self.U.shape[1])


class Linearised(Protocol):
    """The constraint and the drift at a state, linear in X.  α, β and the gap are host float64 (svec where flat)."""

    @property
    def alpha(self) -> Array:
        """[k, k]: how fast the gap closes without oscillation."""
        ...

    @property
    def beta(self) -> Array:
        """[n, n] acting on svec, n = k(k+1)/2: how fast oscillation X opens the gap."""
        ...

    @property
    def gap(self) -> Array:
        """[k, k]: Uᵀ(2P − H)U."""
        ...

    def drift(self, X: Array | None) -> Rate:
        """dy/dt with oscillation covariance Σ = UXUᵀ (X = None: without)."""
        ...

    def kick(self, Z: Array) -> Rate:
        """The part of the drift that is due to oscillations, for X = Z: the displacement by an impulse Z = ∫X dt."""
        ...


class ImplicitStep(Protocol):
    """A semi-implicit step whose end is linear in X: gap + β[X] there (host float64)."""

    @property
    def decay(self) -> float:
        """What is left of the momentum after the step."""
        ...

    @property
    def gap(self) -> Array:
        """[k, k]: Uᵀ(2P − H)U at the end of the step without oscillation."""
        ...

    @property
    def beta(self) -> Array:
        """[n, n] acting on svec: what X adds to it."""
        ...

    def end(self, X: Array | None) -> Staggered:
        """Where the step ends with X (None: without)."""
        ...


class SmoothFlow(Protocol):
    """What every flow offers: its kind, the loss, and how it goes where nothing oscillates."""

    @property
    def name(self) -> str:
        """Which flow it is, in words."""
        ...

    @property
    def constrained(self) -> bool:
        """False for a flow without oscillations (the stable flow): k is 0 throughout."""
        ...

    @property
    def inertial(self) -> bool:
        """Is momentum part of the state?  Then dw/dt does not depend on X, and only a semi-implicit step will do."""
        ...

    @property
    def quasistatic(self) -> bool:
        """Is ν kept at its stationary value?  Then the flow is one in w alone, and ν is settled at every stage."""
        ...

    @property
    def pushed(self) -> bool:
        """Do oscillations act on w?  If not (an ablated flow), they are no measure of how exactly w is followed."""
        ...

    @property
    def stepwise(self) -> bool:
        """Is it a map, which goes one whole step of the optimizer at a time?"""
        ...

    def value_and_grad(self, y: State) -> tuple[Tensor, Tensor]:
        """L(w) [] and ∇L(w) [d]."""
        ...

    def gradient(self, y: State) -> Tensor:
        """∇L(w) [d], NaN where the loss is not finite; :meth:`linearised` raises if it is not finite."""
        ...

    def linearised(self, y: State, g: Tensor, frame: Frame) -> Linearised:
        """α, β, the gap and the drift at y in a frame anchored at or near y."""
        ...

    def velocity(self, y: State, g: Tensor) -> Tensor:
        """−dw/dt [d] where X = 0 and m = g: κP(ν)⁻¹ g, and what weight decay adds."""
        ...

    def nu_decay(self, y: State, g: Tensor) -> float:
        """How fast ν forgets, per unit time: the spectral radius of ∂ν̇/∂ν (0 without memory loss)."""
        ...

    def in_domain(self, y: State) -> bool:
        """Is P(ν) positive definite at y?"""
        ...

    def sound(self, y: State) -> Tensor | None:
        """The same as a bool [] on the device; None where the device cannot tell."""
        ...

    def spent(self) -> float:
        """Gradient equivalents spent on the loss so far."""
        ...


class ConstrainedFlow(SmoothFlow, Protocol):
    """What a flow offers beside that to one who keeps its constraint: eigenvectors, frames, third derivatives."""

    def effective_hessian(self, y: State) -> Callable[[Tensor], Tensor]:
        """V [d, m] ↦ P^{−1/2} H P^{−1/2} V: symmetric, with the eigenvalues of P⁻¹H."""
        ...

    def basis(self, y: State, V: Tensor) -> Tensor:
        """Vectors V [d, k] in the metric of P: U [d, k] with UᵀPU = VᵀV."""
        ...

    def frame(self, y: State, V: Tensor, AV: Tensor, third: bool = True) -> Frame:
        """The frame of orthonormal eigenvectors V [d, k] of the effective Hessian A, given AV; T only if asked for."""
        ...

    def third_derivatives(self, y: State, U: Tensor, squares: bool = False) -> Tensor:
        """∇_w of uᵢᵀHuⱼ for all pairs of columns of U [d, k], [k(k+1)/2, d], svec order; or for i = j only, [k, d]."""
        ...

    def precondition(self, y: State, V: Tensor) -> Tensor:
        """P(ν) V [d, k]."""
        ...

    def count_ccp(self) -> None:
        """Enter one CCP solve into the ledger."""
        ...


class InertialFlow(ConstrainedFlow, Protocol):
    """What a flow with momentum as a state offers beside that: semi-implicit steps."""

    def stagger(self, y: State, g: Tensor, h: float) -> Staggered:
        """Momentum and ν half a step h behind y."""
        ...

    def restagger(self, s: Staggered, g: Tensor, before: float, h: float) -> Staggered:
        """Momentum and ν of s, half a step ``before`` behind w, half a step h behind it."""
        ...

    def longest_step(self, y: State, sharpness: float) -> float:
        """The longest semi-implicit step that is stable at this effective sharpness."""
        ...

    def implicit_step(self, s: Staggered, g: Tensor, frame: Frame, h: float) -> ImplicitStep:
        """The semi-implicit step of h from s."""
        ...


class Flow(InertialFlow, Protocol):
    """A flow as a run hands it to an integrator, with all of that.  Signatures name the least that they need."""


@dataclass(frozen=True)
class Node:
    """What was seen at one moment of a run.

    Attributes:
        t: unit times.
        loss: L(w).
        grad_sq: ‖∇L(w)‖².
        eigenvalues: of P⁻¹H, descending; the leading ones that were followed (none where there was no need to look).
        U, HU: the frame's basis and H times it, [d, k].
        X: oscillation covariance in that basis, [k, k].
        X_time: the moment for which X speaks (the middle of a step for integrators that average over it).
        g: the gradient [d].
        rate: dy/dt there, if known.
        foreseen: where there was no look, the eigenvalues in the frame as the gap's model has them, descending.
    """

    t: float
    loss: float
    grad_sq: float
    eigenvalues: Array
    U: Tensor
    HU: Tensor
    X: Array
    X_time: float
    g: Tensor
    rate: Rate | None = None
    foreseen: Array = field(default_factory=lambda: np.empty(0))

    @property
    def k(self) -> int:
        """Number of critical directions with the constraint watched."""
        return len(self.X)


@dataclass(frozen=True)
class StepResult:
    """One step of an integrator.

    Attributes:
        y: the state at the end.
        memory: what the integrator wants to be given back at the next step.
        node: what was seen at the beginning, with the X of this step.
        interpolate: t ↦ state inside the step, to the integrator's order.
        strain: the error estimate over the tolerance, where the step was taken though that is more than is allowed (no
            shorter one may be tried, or earlier ones had to be taken back, too); else 0.
        missed: an effective sharpness far above 2 that was found at the end, not having been seen coming; else 0.
        unit: it was one step of one unit, because what shorter ones resolve is not worth their cost.
    """

    y: State
    memory: Any
    node: Node
    interpolate: Callable[[float], State]
    strain: float = 0.0
    missed: float = 0.0
    unit: bool = False


class Integrator(Protocol):
    """An integrator: a frozen configuration.  The state of a run goes in and comes out, so a run can stop anywhere.

    1. It keeps nothing between calls: what it wants to remember is its memory, made of frozen dataclasses of this
       package, tensors, arrays, numbers, and tuples, lists and dicts of these, so that a run can be stored and taken
       up bit for bit.
    2. ``step`` advances by at most ``h``; recorded moments come from ``interpolate``, never from shortened steps.
    3. A node is seen at the beginning of a step and carries the X of that step; ``X_time`` says for when it speaks.
    4. A flow that is not constrained has k = 0: no frame, no CCP.
    5. Every CCP is entered with ``flow.count_ccp()``; evaluations of the loss count themselves.
    6. A state that raises ``DomainError`` is to be avoided by a shorter step; what cannot be done raises ``StepError``.

    Beside these three methods an integrator may have four more; :class:`dvi.solvers.IntegratorBase` has the defaults.

    - ``accepts(flow) -> str``: "" if it can drive this flow, else why not, in words with a remedy.  Default: it drives
      flows that are neither inertial nor quasistatic nor stepwise.
    - ``horizon(memory) -> float``: the h from which on a longer one would not change the step.  With it, a finished run
      can be made longer from near its end.  Default: infinity, and it is made longer from its beginning.
    - ``restart(flow, memory, y)``: the memory behind a jump of the flow, where the step before ends.  Default:
      ``init(flow, y)``.
    - ``fixed_steps`` (a bool): the user has chosen the steps, so that a run is not ended for what they cost at kinks.
      Default: False.
    """

    def init(self, flow: Flow, y: State) -> Any:
        """The memory before the first step: pytree of tensors and numbers."""
        ...

    def step(self, flow: Flow, memory: Any, y: State, h: float) -> StepResult:
        """Advance by at most h unit times."""
        ...

    def observe(self, flow: Flow, memory: Any, y: State) -> Node:
        """What would be seen at y, without a step (the last moment of a run)."""
        ...


def like(array: NDArray[Any], example: Tensor) -> Tensor:
    """A host array as a tensor of the dtype and on the device of an example (whatever torch's default device is)."""
    return torch.from_numpy(np.array(array, dtype=np.float64)).to(example)


def host(*tensors: Tensor) -> list[Array]:
    """Small tensors as host float64 arrays, in one transfer."""
    flat = torch.cat([x.detach().reshape(-1).double() for x in tensors]).cpu().numpy()
    out, start = [], 0
    for x in tensors:
        out.append(flat[start : start + x.numel()].reshape(tuple(x.shape)))
        start += x.numel()
    return out
