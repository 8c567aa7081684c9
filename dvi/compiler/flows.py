"""Flows: a method and a problem, compiled to what integrators can drive.

The central flow is the DVI in (w, ν, Σ) of the paper's C.7.  The stable flow is the same without oscillations.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dvi.compiler.calculus import Covariance, EdgeHessian, LeftDomainError, LossLeftDomainError, SpecCalculus
from dvi.compiler.exact_rates import Accuracy
from dvi.compiler.linearised import Linearisation, LinearisedFlow
from dvi.compiler.spec_check import SpecCheck
from dvi.compiler.staggered import ImplicitStep, restagger, stagger
from dvi.interop.binding import MethodLike, bind
from dvi.methods import Nu, Preconditioner, Timetable, validate
from dvi.problems import NotFiniteError, Problem
from dvi.solvers.eigen.tracker import EigenTracker
from dvi.solvers.errors import MemoryLimitError
from dvi.solvers.protocol import Frame, Staggered, State, host

logger = logging.getLogger("dvi")

#: Which derivatives are compared with finite differences when a flow is compiled: all, the gradient alone, or none.
Check = bool | Literal["gradient"]


@cache
def _tell(text: str) -> None:
    """Log a warning once, even if several flows of one comparison would give it."""
    logger.warning("%s", text)


class CompiledFlow:
    """A compiled method and problem: the base class of all flows.

    Attributes:
        problem, method: what was compiled.
        initial: the state at time 0: (w0, ν after one update of the optimizer at w0, t = 0) (errata to C.7).
        notes: sentences that the user should know about the flow; runs add notes of their own to their results.
    """

    #: The name of the flow in results and legends.
    name: str = "flow"
    constrained: bool = True
    quasistatic: bool = False
    stepwise: bool = False
    pushed: bool = True
    #: Does the flow differentiate f and P?  The optimizer itself only calls them.
    differentiated: bool = True

    def __init__(
        self,
        problem: Problem,
        method: MethodLike,
        *,
        check: Check = True,
        covariance: Covariance = "gradient-covariance",
        accuracy: Accuracy | None = None,
        edge_hessian: EdgeHessian = "integrator",
        max_gib: float = 4.0,
    ) -> None:
        if edge_hessian not in ("integrator", "computed", "edge"):
            raise ValueError(f'edge_hessian is "integrator", "computed" or "edge", not {edge_hessian!r}.')
        self.edge_hessian = edge_hessian
        problem, self.method = bind(problem, method)
        self.problem = problem
        self.covariance = covariance
        self.max_gib = max_gib
        self.notes: list[str] = []
        if check:
            problem.check(gradient_only=check == "gradient")
        if check is True:
            self._note_differences(problem.uncertainty())
        w = problem.w0
        _, g = problem.value_and_grad(w)
        nu = validate(self.method, w, g)
        Q = self.method.at(0.0).Q()
        self.initial = State(w, nu, 0.0, None if Q.trivial else self.method.remembered(w, g))
        self.accuracy = self._chosen(accuracy, momentum=not Q.trivial)
        self.calculus = self._compiled(nu, g)
        self._note_dead_weights(self.calculus.P(nu, 0.0))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.problem!r}, {self.method!r})"

    def _compiled(self, nu: Nu, g: Tensor) -> SpecCalculus:
        """The derivatives of f and P, after a check that they are right."""
        check = SpecCheck(self.method, nu, g)
        if self.differentiated:
            check.forward()
        try:
            calculus = SpecCalculus(self.method, nu, g, self.covariance, self.accuracy)
            if self.differentiated:
                calculus.find_structure()
        except (RuntimeError, TypeError, NotImplementedError) as error:
            raise check.unable("f", "in ν and g", error) from error
        if self.differentiated and not calculus.stateless:
            check.reverse(calculus.elementwise, calculus.local)
        return calculus

    def _chosen(self, accuracy: Accuracy | None, momentum: bool) -> Accuracy:
        """The accuracy asked for; by default the paper's, or second order with momentum (not in the paper)."""
        if accuracy is None:
            return "second-order" if momentum else "paper"
        if accuracy not in ("paper", "second-order"):
            raise ValueError(f'accuracy is "paper" or "second-order", not {accuracy!r}.')
        return accuracy

    @property
    def timetable(self) -> Timetable:
        """The schedules of the method."""
        return self.calculus.metric.timetable

    def settle(self, y: State) -> State:
        """The admissible state that belongs to y, at the start of a run and after a jump of a schedule."""
        return y

    @property
    def inertial(self) -> bool:
        """Is momentum part of the state (second order)?"""
        return self.accuracy == "second-order"

    def _note_differences(self, errors: dict[str, float]) -> None:
        names = {"hvps": "products with H", "third_derivatives": "third derivatives"}
        if errors:
            parts = " and ".join(f"{names[kind]} to {error:.0e}" for kind, error in errors.items())
            note = f"Relative errors at the start of the derivatives that are computed by differences: {parts}."
            self.notes.append(note)

    def _note_dead_weights(self, P: Preconditioner) -> None:
        dead = P.dead()
        if dead is not None and bool(dead.any()):
            note = (
                f"{int(dead.sum())} of {len(dead)} weights have zero gradient and P = 0 (constant inputs, or a layer "
                "without effect on the loss). While their gradient is zero they do not move, and the P-metric leaves "
                "them out. An eps > 0 would include them."
            )
            self.notes.append(note)
            _tell(note)

    # ---- what an integrator asks (dvi.solvers.protocol.Flow) -------------------------------------------

    def value_and_grad(self, y: State) -> tuple[Tensor, Tensor]:
        """L(w) [] and ∇L(w) [d].

        Raises:
            LossLeftDomainError: if either is not finite.
        """
        try:
            return self.problem.value_and_grad(y.w)
        except NotFiniteError as error:
            raise LossLeftDomainError(f"At t = {y.t:g}: {error}") from None

    def gradient(self, y: State) -> Tensor:
        """∇L(w) [d], NaN where the loss is not finite; :meth:`linearised` raises if it is not finite."""
        loss, g = self.problem.value_and_grad(y.w, checked=False)
        return torch.where(torch.isfinite(loss), g, torch.nan)

    def effective_hessian(self, y: State) -> Callable[[Tensor], Tensor]:
        """The map V [d, m] ↦ P^{−1/2} H P^{−1/2} V.

        Raises:
            LeftDomainError: if P(ν) is not positive definite.
        """
        P = self.calculus.checked_P(y.nu, y.t)

        def product(V: Tensor) -> Tensor:
            try:
                return P.inv_sqrt(self.problem.hvp(y.w, P.inv_sqrt(V)))
            except NotFiniteError as error:
                raise LossLeftDomainError(f"At t = {y.t:g}: {error}") from None

        return product

    def basis(self, y: State, V: Tensor) -> Tensor:
        """U = P^{−1/2}V [d, k] for orthonormal vectors V [d, k]."""
        return self.calculus.P(y.nu, y.t).inv_sqrt(V)

    def frame(self, y: State, V: Tensor, AV: Tensor, third: bool = True) -> Frame:
        """The frame U = P^{−1/2}V of orthonormal eigenvectors V [d, k], given AV [d, k]; T only if ``third``.

        Weights that do not affect the loss have rows of HU that are exactly zero.  Their rows of U are set to zero,
        since V = AV/λ.  Remains of the random start of the eigensolver there would move ν where it is zero and P
        infinitely steep.
        """
        P = self.calculus.P(y.nu, y.t)
        U, HU = P.inv_sqrt(V), P.sqrt(AV)
        U = torch.where((HU != 0).any(dim=1, keepdim=True), U, torch.zeros_like(U))
        return self._frame(y, U, HU, third)

    def _frame(self, y: State, U: Tensor, HU: Tensor, third: bool = True) -> Frame:
        T = self.third_derivatives(y, U) if third else U.new_zeros(0, len(y.w))
        (M,) = host(U.T @ HU)
        return Frame(y.w, U, HU, 0.5 * (M + M.T), T)

    def third_derivatives(self, y: State, U: Tensor, squares: bool = False) -> Tensor:
        """Rows ∇_w uᵢᵀH(w)uⱼ for the columns of U [d, k], see :meth:`dvi.Problem.hessian_gradient`.

        Raises:
            MemoryLimitError: if they would take more than ``max_gib``.
        """
        if not squares:
            self._check_memory(U.shape[1], U)
        return self.problem.hessian_gradient(y.w, U, squares)

    def _check_memory(self, k: int, U: Tensor) -> None:
        pairs = k * (k + 1) // 2
        gib = pairs * len(U) * U.element_size() / 2**30
        if gib > self.max_gib:
            raise MemoryLimitError(
                f"{k} directions are critical. Their third derivatives are {pairs} vectors of {len(U)} weights and "
                f"need {gib:.1f} GiB, but max_gib={self.max_gib:g}."
            )

    def linearised(self, y: State, g: Tensor, frame: Frame) -> LinearisedFlow:
        """α, β, the gap and the drift at y in a frame anchored at or near y."""
        return LinearisedFlow(self.calculus, y, g, self._read(frame))

    def _read(self, frame: Frame) -> Frame:
        """The frame with the user's choice of HU (``edge_hessian``)."""
        return frame if self.edge_hessian == "integrator" else replace(frame, on_edge=self.edge_hessian == "edge")

    def stagger(self, y: State, g: Tensor, h: float) -> Staggered:
        """The state with momentum and ν half a step h (unit times) behind y."""
        return stagger(self.calculus, y, g, h)

    def restagger(self, s: Staggered, g: Tensor, before: float, h: float) -> Staggered:
        """Move momentum and ν of s from half a step ``before`` behind w to half a step h behind it."""
        return restagger(self.calculus, s, g, before, h)

    def longest_step(self, y: State, sharpness: float) -> float:
        """The longest stable semi-implicit step, unit times: dt² ≤ 4τ′/(κλ), where a root of the step passes −1.

        Args:
            y: the state.
            sharpness: λ, the effective sharpness there.
        """
        calculus = self.calculus
        return float((4 * calculus.lag(y.t) / (calculus.speed(y.t) * max(sharpness, 1e-3))) ** 0.5)

    def implicit_step(self, s: Staggered, g: Tensor, frame: Frame, h: float) -> ImplicitStep:
        """The semi-implicit step of length h (unit times) from s, with gradient g [d]."""
        return ImplicitStep(self.calculus, s, g, self._read(frame), h)

    def velocity(self, y: State, g: Tensor) -> Tensor:
        """Q₁P(ν)⁻¹ g + γw [d], per unit time: minus the velocity of w for the gradient g [d]."""
        solved = self.calculus.speed(y.t) * self.calculus.checked_P(y.nu, y.t).solve(g)
        decay = self.calculus.decay(y.t)
        return solved if decay is None else decay.share * solved + decay.gamma * y.w

    def precondition(self, y: State, V: Tensor) -> Tensor:
        """P(ν) V [d, k]."""
        return self.calculus.P(y.nu, y.t).apply(V)

    def nu_decay(self, y: State, g: Tensor) -> float:
        """The rate at which ν forgets, per unit time: the spectral radius of ∂ν̇/∂ν."""
        return self.calculus.nu_decay(y.nu, y.t, g)

    def in_domain(self, y: State) -> bool:
        """Is P(ν) positive definite at y?"""
        try:
            self.calculus.checked_P(y.nu, y.t)
        except LeftDomainError:
            return False
        return True

    def sound(self, y: State) -> Tensor | None:
        """The same as a bool tensor [] on the device; None if P has no such test."""
        return self.calculus.P(y.nu, y.t).sound()

    def count_ccp(self) -> None:
        """Count one CCP solve in the ledger."""
        self.problem.ledger.ccp_solves += 1

    def spent(self) -> float:
        """Gradient equivalents spent on the loss so far."""
        return self.problem.ledger.gradient_equivalents

    # ---- what a user asks -----------------------------------------------------------------------------

    def linearise(
        self, w: Tensor, nu: Nu, U: Tensor | None = None, *, t: float = 0.0, watch: EigenTracker | None = None
    ) -> Linearisation:
        """What the compiler makes of this flow at (w, ν): α, β, the gap, the eigenvalues (C.7).

        Args:
            w: weights [d].
            nu: the optimizer's state there, of the structure that ``method.init`` gives.
            U: basis [d, k] in which α and β are expressed; the formulas hold in any basis.  By default, U consists of
                the critical eigenvectors of P⁻¹H, scaled so that UᵀPU = I.  These have an effective eigenvalue within
                0.05 of 2, or above.
            t: the clock, for methods with schedules (unit times).
            watch: computes the eigenvectors if U is not given.

        Returns:
            alpha [k, k], beta [n, n] in svec with n = k(k+1)/2, gap [k, k], eigenvalues [k]: host float64; U [d, k],
            T [n, d]: like w.

        Raises:
            NotPositiveDefiniteError: if P(ν) is not positive definite.
            ConvergenceError: if the eigenvectors do not converge.
            ProblemError: if w or U has the wrong shape, dtype or device.
        """
        y = State(w, nu, t)
        _, g = self.problem.value_and_grad(w)
        if U is None:
            watch = watch or EigenTracker()
            seen = watch.update(self, y, None, 0.0)
            frame = watch.frame(self, y, seen, 0.0)
        else:
            frame = self._frame(y, U, self.problem.hvp(w, U))
        lin = self.linearised(y, g, frame)
        (UPU,) = host(frame.U.T @ lin.preconditioner.apply(frame.U))
        eigenvalues = np.sort(np.linalg.eigvals(np.linalg.solve(UPU, frame.M)).real)[::-1].copy()
        return Linearisation(
            alpha=torch.from_numpy(lin.alpha.copy()),
            beta=torch.from_numpy(lin.beta.copy()),
            gap=torch.from_numpy(lin.gap.copy()),
            eigenvalues=torch.from_numpy(eigenvalues),
            U=frame.U,
            T=frame.T,
            flow=lin,
        )


class CentralFlow(CompiledFlow):
    """The central flow: the time average of the optimizer at the edge of stability (C.7, with its errata)

    dw/dt = −P(ν)⁻¹ [∇L(w) + ½∇³L(w)[Σ]]
    dν/dt = (I + ∂f/∂ν)⁻¹ ( f(ν, g) + ½∇²_g f[HΣH] )
    0 ⪯ Σ  ⟂  2P(ν) − H(w) ⪰ 0.
    """

    name = "central"
    constrained = True


class CentralMap(CentralFlow):
    """The central map: the optimizer's own step plus the force of Σ, w⁺ = w − Q₁P⁻¹m⁺ with m⁺ made of g + ½∇³L[Σ].

    It is the semi-implicit step of :mod:`dvi.compiler.staggered` with h = 1 and Σ from the gap at t + 1: a model of its
    own, without a limit of small steps.  While nothing oscillates, the map equals the optimizer by construction (for
    filters with one buffer and no direct part, and without a filter), so agreement there is no evidence.  At the edge
    of stability it is a prediction that costs one gradient a step.  Results show ¼(w_{t−1} + 2w_t + w_{t+1}), because
    its own steps may contain a decaying component of period two.
    """

    name = "map"
    stepwise = True


class StableFlow(CompiledFlow):
    """The stable flow: the optimizer's differential equation without oscillations (eq. 8 for RMSProp-Norm)."""

    name = "stable"
    constrained = False


def central_flow(
    problem: Problem,
    method: MethodLike,
    *,
    check: bool = True,
    covariance: Covariance = "gradient-covariance",
    accuracy: Accuracy | None = None,
    edge_hessian: EdgeHessian = "integrator",
    max_gib: float = 4.0,
) -> CentralFlow:
    """Compile the central flow of a method on a problem: derive α, β and the CCP from the declaration and the loss.

    Args:
        problem: a :class:`dvi.Problem`.
        method: a :class:`dvi.Method`, a triple of functions ``(init, f, P)``, or a ``torch.optim.Optimizer``, which is
            read by :func:`dvi.from_torch`.
        check: compare the loss's second and third derivatives with finite differences once (``problem.check()``).
        covariance: the meaning of the paper's ½∇²_w f[Σ].  ``"gradient-covariance"`` (C.4, C.5) takes only the
            curvature of f in g; ``"full"`` adds the curvature of g itself.
        accuracy: ``"paper"``, the definition in C.3–C.7, whose distance from a stable optimizer is O(η); or
            ``"second-order"``, with momentum as a state (:mod:`dvi.compiler.staggered`) and a distance of O(η²).
            The default is "paper", and "second-order" for a method with momentum.  With momentum, "paper" is the
            leading-order drift −Q₁P⁻¹(g + ½∇³L[Σ]).
        edge_hessian: the HU in the gradient covariance HΣH = HU X UᵀH that acts on ν.  ``"computed"`` is H times U.
            ``"edge"`` is 2P(ν)U: the same on the exact flow wherever Σ ≠ 0; C.5 is written so, and makes β symmetric
            for RMSProp.  ``"integrator"`` leaves the choice to the integrator: :class:`dvi.MacroStep` takes 2P(ν)U
            inside its steps, where its HU is old, and the others take H times U.
        max_gib: memory (GiB) for the third derivatives of k critical directions, k(k+1)/2 vectors like w; if they need
            more, the run ends with :class:`dvi.MemoryLimitError`.

    Raises:
        SpecError: if the declaration is wrong, if a derivative of f or P disagrees with finite differences (this is
            always checked), or if ν has no memory (β₂ = 0).
        NotPositiveDefiniteError: if P(ν) after the first update is not positive definite.
        DerivativeError: if autodiff gets a derivative of this loss wrong.
    """
    return CentralFlow(
        problem,
        method,
        check=check,
        covariance=covariance,
        accuracy=accuracy,
        edge_hessian=edge_hessian,
        max_gib=max_gib,
    )


def central_map(
    problem: Problem,
    method: MethodLike,
    *,
    check: bool = True,
    covariance: Covariance = "gradient-covariance",
    max_gib: float = 4.0,
) -> CentralMap:
    """Compile the central map of a method on a problem.

    The arguments and the exceptions are those of :func:`central_flow`; the accuracy is always "second-order".
    """
    return CentralMap(problem, method, check=check, covariance=covariance, accuracy="second-order", max_gib=max_gib)


def stable_flow(
    problem: Problem, method: MethodLike, *, check: Check = "gradient", accuracy: Accuracy | None = None
) -> StableFlow:
    """Compile the stable flow of a method on a problem.

    The arguments and the exceptions are those of :func:`central_flow`.  The flow needs first derivatives only, so the
    default ``check="gradient"`` compares only the gradient with finite differences.
    """
    return StableFlow(problem, method, check=check, accuracy=accuracy)
