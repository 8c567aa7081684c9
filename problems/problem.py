"""A loss of flat weights with all the derivatives that a central flow needs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from dvi.problems.changed import Change, Changed, Negation, Penalty
from dvi.problems.derivatives.autodiff import Autodiff
from dvi.problems.derivatives.check import Verdict, examine, examine_gradient
from dvi.problems.derivatives.finite_difference import FiniteDifference
from dvi.problems.derivatives.kinks import kinks_between, tell_of_kinks
from dvi.problems.derivatives.mixed import Mixed
from dvi.problems.derivatives.protocol import Derivatives, Part, value_and_gradient
from dvi.problems.derivatives.refusal import refusal
from dvi.problems.distributed.ranks import ALONE, Ranks
from dvi.problems.errors import DerivativeError, LossChangedError, NotFiniteError, ProblemError
from dvi.problems.inspection import Watcher, attentive, other_leaves, past_w, unwritten
from dvi.problems.ledger import Ledger
from dvi.problems.timing import measure

NO_EXAMPLES = (
    "this problem is one loss of flat weights, without examples for mini-batches: make it with "
    "dvi.Problem.from_module(model, criterion, inputs, targets) or dvi.Problem.from_examples(losses, data, w0)"
)

NO_MODULE = "this problem was not made from a module: it has no model, only a loss of flat weights"

Backend = Literal["autodiff", "mixed", "finite-difference"]


class Problem:
    """A loss L(w) of flat weights w [d], its derivatives, and a ledger of evaluations.

    Public methods validate their arguments and count; the backend computes.  All computations use the dtype and the
    device of ``w0``.

    Args:
        loss: the function w [d] -> L []; or a sequence of such functions, whose sum is the loss.  The parts of a sum
            are differentiated one at a time, so the memory is that of the largest part.
        w0: initial weights [d], float32 or float64.  They are copied.
        derivatives: "autodiff": exact.  "finite-difference": differences of gradients, which are cheaper and demand
            less of the loss; on small networks H and T are accurate to about 1e-7, in float32 to 1e-4 and 1e-3.
            "mixed": H exact, and T, which costs most, by differences.
        max_directions: number of directions that automatic differentiation takes at once.  1 needs the least memory
            and is fastest on a CPU.  More are faster on a GPU with small kernels, if every operation has a batching
            rule.
        name: the problem's name in results.

    Attributes:
        w0: the initial weights [d].
        ledger: counts of evaluations so far.

    Raises:
        ProblemError: if the loss at ``w0`` is not a finite scalar that depends on w, or differs between two calls; if
            it depends on other tensors that require a gradient, or computes in a lower precision than w's.

    """

    #: ``from_module(model, criterion, inputs, targets, …)``: the loss of a module as a function of its parameters.
    #: It is set to :class:`~dvi.problems.ModuleProblem` when that class is defined.  That file imports this one, so
    #: this annotation cannot name the class; with ``Problem`` for the result, a type checker would not see its methods.
    from_module: ClassVar[Callable[..., Any]]

    #: The largest λ of a penalty ½λw² that was added to the loss by ``weight_decay`` or :meth:`penalised`.
    weight_decay: float = 0.0
    #: The changes by :meth:`penalised` and :meth:`negated`, in their order; they apply to mini-batches, too.
    changes: tuple[Change, ...] = ()
    #: ``from_examples(losses, data, w0, …)``: the mean of a loss over examples, for mini-batches.
    #: It is set to :class:`~dvi.problems.ExampleProblem` when that class is defined.
    from_examples: ClassVar[Callable[..., Any]]

    def __init__(
        self,
        loss: Part | Sequence[Part],
        w0: Tensor,
        *,
        derivatives: Backend = "autodiff",
        max_directions: int = 1,
        name: str | None = None,
    ) -> None:
        _refuse_inference_mode()
        self._parts: tuple[Part, ...] = (loss,) if callable(loss) else tuple(loss)
        if not self._parts:
            raise ProblemError("the list of the loss's parts is empty")
        if not isinstance(max_directions, int) or max_directions < 1:
            raise ProblemError(f"max_directions counts directions, at least 1; got {max_directions!r}")
        self.w0 = _flat_weights(w0)
        self.name = name or getattr(loss, "__name__", None) or type(self).__name__
        self.derivatives: Backend = derivatives
        self._max_directions = max_directions
        self._ranks: Ranks = ALONE
        self._begin()
        self._kinks_told = False
        self._try_loss()

    def _begin(self) -> None:
        """Make the ledger and the backend of the parts."""
        self.ledger = Ledger()
        self._derivatives: Derivatives = self._backend()
        self.ledger.weights = {**self.ledger.weights, **self._derivatives.weights}
        self._measured = False

    @property
    def ranks(self) -> Ranks:
        """The processes that compute this loss together (:func:`dvi.distribute`); by default this one alone."""
        return self._ranks

    def _backend(self) -> Derivatives:
        if self.derivatives == "autodiff":
            return Autodiff(self._parts, self.ledger, self._max_directions)
        if self.derivatives == "mixed":
            return Mixed(self._parts, self.ledger, self._max_directions)
        if self.derivatives == "finite-difference":
            return FiniteDifference(self._parts, self.ledger, central=self.dtype != torch.float64)
        raise ProblemError(f'derivatives is "autodiff", "mixed" or "finite-difference", not {self.derivatives!r}')

    def penalised(self, weight_decay: float | Tensor | Mapping[str, float]) -> Self:
        """This problem with ½ Σᵢ λᵢwᵢ² added to its loss (L2 regularisation), and with a new ledger.

        ``weight_decay`` has this meaning in ``torch.optim.SGD``, ``Adam``, ``RMSprop`` and ``Adagrad``.  The decay of
        ``AdamW`` does not change the loss (:class:`dvi.methods.AdamW`).

        Args:
            weight_decay: λ ≥ 0: a number, or a tensor [d] with one number for each weight.  For a problem made from a
                module, also a mapping from names of parameters to λ; parameters without an entry have λ = 0.

        Raises:
            ProblemError: if λ has another shape, is negative or not finite, or if a name is not that of a parameter.

        """
        if isinstance(weight_decay, Mapping):
            weight_decay = self._by_name(weight_decay)
        given = torch.as_tensor(weight_decay, dtype=self.dtype, device=self.device)
        if given.shape not in ((), (self.dim,)):
            raise ProblemError(f"weight_decay is a number or a tensor [{self.dim}]; got shape {list(given.shape)}")
        if not bool(((given >= 0) & torch.isfinite(given)).all()):
            raise ProblemError(f"weight_decay is zero or positive, and finite; got {weight_decay!r}")
        penalty, parts = Penalty(given.detach().clone()), self._parts
        if self._ranks.first:  # the ranks' parts are summed, and the penalty counts once
            parts = (Changed(parts[0], penalty), *parts[1:])
        new = self._changed(parts, self.w0, f"{self.name} + L2", penalty)
        new.weight_decay = max(self.weight_decay, float(given.max()))
        return new

    def negated(self) -> Self:
        """This problem with −L in place of L, as for ``maximize=True`` in torch, and with a new ledger."""
        parts = tuple(Changed(part, Negation()) for part in self._parts)
        return self._changed(parts, self.w0, f"−{self.name}", Negation())

    def starting_at(self, w: Tensor) -> Self:
        """This problem with the weights ``w`` [d] in place of w0, and with a new ledger.

        Raises:
            ProblemError: if w is not of the shape, dtype and device of w0, or the loss is not finite there.

        """
        self._check_weights(w)
        return self._changed(self._parts, w.detach().clone(), self.name)

    def _changed(self, parts: tuple[Part, ...], w0: Tensor, name: str, *changes: Change) -> Self:
        new = copy.copy(self)
        new._parts, new.w0, new.name = parts, w0, name
        new.changes = (*self.changes, *changes)
        new._begin()
        new._try_loss()
        return new

    def _shard(self, ranks: Ranks, whole: bool) -> Sequence[Part]:
        """Keep this rank's share of the loss, and return its parts; ``whole``: every rank has the whole loss."""
        if not whole:
            return self._parts
        parts = self._parts
        with ranks.together():
            if len(parts) < ranks.size:
                raise ProblemError(
                    f"a loss of {len(parts)} parts cannot be shared among {ranks.size} ranks. Make the problem of as "
                    "many parts or more, dvi.Problem([loss, loss, …], w0); or let each rank make a problem of its own "
                    "term of the loss, and say shards=True"
                )
        start, stop = (len(parts) * rank // ranks.size for rank in (ranks.rank, ranks.rank + 1))
        return parts[start:stop]

    def _by_name(self, values: Mapping[str, float]) -> Tensor:
        """A vector [d] from numbers by the names of parameters."""
        raise ProblemError(NO_MODULE)

    def fingerprints(self) -> dict[str, str]:
        """Hashes of the data of the loss, by name; {} if the data are not known.

        They distinguish two problems of the same name, also between sessions.
        """
        return {}

    @property
    def dim(self) -> int:
        """Number d of weights."""
        return self.w0.numel()

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the parameter tensors, in their order in w; for a plain loss, one vector [d]."""
        return ((self.dim,),)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights and derivatives."""
        return self.w0.dtype

    @property
    def device(self) -> torch.device:
        """Device of weights and derivatives."""
        return self.w0.device

    def __repr__(self) -> str:
        kind = type(self).__name__
        return f"{kind}({self.name!r}, dim={self.dim}, dtype={self.dtype}, device={str(self.device)!r})"

    def value(self, w: Tensor) -> Tensor:
        """Return the loss L(w) [], forward only.

        Raises:
            ProblemError: if ``w`` is not of the shape, dtype and device of ``w0``, or the loss is not finite.

        """
        self._check_weights(w)
        self.ledger.values += 1

        def own() -> Tensor:
            total = w.new_zeros(())
            with torch.enable_grad():  # w asks for none, but a loss may differentiate by its inputs
                for part in self._parts:
                    total += part(w.detach().clone()).detach()
            return total

        return self._finite_loss(self._ranks.total(own, (), w))

    def value_and_grad(self, w: Tensor, *, checked: bool = True) -> tuple[Tensor, Tensor]:
        """Return the loss L(w) [] and its gradient [d].

        With ``checked=False`` they are not tested for finite numbers, since that test waits for the device.

        Raises:
            ProblemError: if ``w`` is not of the shape, dtype and device of ``w0``, or the loss is not finite.
            DerivativeError: if the gradient is not finite.

        """
        self._check_weights(w)
        self.ledger.gradients += 1

        def own() -> tuple[Tensor, Tensor]:
            value, gradient = value_and_gradient(self._parts, w)
            self._derivatives.remember(w, gradient)
            return value, gradient

        value, gradient = self._ranks.value_and_gradient(own, w)
        if checked and not bool(torch.isfinite(value) & torch.isfinite(gradient).all()):
            self._finite_loss(value)
            _finite(gradient, "gradient")
        return value, gradient

    def hvp(self, w: Tensor, V: Tensor) -> Tensor:
        """Hessian-vector products H(w) V [d, k] for a block V [d, k]; a vector V [d] gives a vector [d].

        Raises:
            ProblemError: if an argument is not of the right shape, dtype and device.
            DerivativeError: if the products are not available or not finite.

        """
        self._check_weights(w)
        if isinstance(V, Tensor) and V.ndim == 1:
            return self.hvp(w, V[:, None])[:, 0]
        self._check_block(V, "V")
        if V.shape[1] == 0:
            return V.clone()
        rows = self._ranks.total(lambda: self._derivatives.hvp(w, _rows(V)), (V.shape[1], self.dim), w, w, V)
        return _finite(rows.T, "Hessian-vector product")

    def hessian_gradient(self, w: Tensor, U: Tensor, squares: bool = False) -> Tensor:
        """Rows ∇_w uᵢᵀH(w)uⱼ [k(k+1)/2, d] for the columns of U [d, k], in svec order; ``squares``: i = j only, [k, d].

        Off-diagonal rows are multiplied by √2, so svec(X) @ rows is ∇³L[UXUᵀ].  The order is that of
        ``torch.triu_indices``.

        Raises:
            ProblemError: if an argument is not of the right shape, dtype and device.
            DerivativeError: if the derivatives are not available or not finite.

        """
        self._check_weights(w)
        self._check_block(U, "U")
        k = U.shape[1]
        if k == 0:
            return U.new_zeros(0, self.dim)
        if squares:
            rows = self._ranks.total(lambda: self._derivatives.squares(w, _rows(U)), (k, self.dim), w)
            return _finite(rows, "third derivative")
        rows = self._ranks.total(lambda: self._derivatives.pairs(w, _rows(U)), (k * (k + 1) // 2, self.dim), w)
        i, j = torch.triu_indices(k, k, device=self.device)
        rows[i != j] *= math.sqrt(2)
        return _finite(rows, "third derivative")

    def hessian_gradient_of(self, w: Tensor, U: Tensor, X: Tensor) -> Tensor:
        """Return the vector ∇³L(w)[U X Uᵀ] [d] for U [d, k] and X [k, k]; the number of contractions is the rank of X.

        Only the symmetric part of X counts, since ∇³L is symmetric; it may have any signature.

        Raises:
            ProblemError: if an argument is not of the right shape, dtype and device.
            DerivativeError: if the derivative is not available or not finite.

        """
        self._check_weights(w)
        self._check_block(U, "U")
        weights, directions = self._principal_directions(U, X)
        if len(weights) == 0:
            return torch.zeros_like(w)
        row = self._ranks.total(lambda: weights @ self._derivatives.squares(w, directions), (self.dim,), w)
        return _finite(row, "third derivative")

    def hessian_derivative(self, w: Tensor, U: Tensor, V: Tensor) -> Tensor:
        """Return the matrices Uᵀ (d/dε H(w+εv)) U [m, k, k] for U [d, k] and each column v of V [d, m].

        Raises:
            ProblemError: if an argument is not of the right shape, dtype and device.
            DerivativeError: if the derivative is not available or not finite.

        """
        self._check_weights(w)
        self._check_block(U, "U")
        self._check_block(V, "V")
        k, m = U.shape[1], V.shape[1]
        if k == 0 or m == 0:
            return U.new_zeros(m, k, k)
        matrices = self._ranks.total(lambda: self._derivatives.along(w, _rows(U), _rows(V)), (m, k, k), w)
        return _finite(matrices, "third derivative")

    def check(self, w: Tensor | None = None, *, gradient_only: bool = False) -> None:
        """Compare first, second and third derivatives with differences, at ``w`` (default: w0) and at a point nearby.

        This costs 50 to 100 gradients, which the ledger does not count.  A loss with kinks (ReLU, max, abs) is compared
        piece by piece, and a warning about its kinks is logged once.  With ``gradient_only``, only the gradient is
        compared with the change of the loss between the two points, to ten per cent.  That costs 10 gradients and is
        all that an optimizer needs.

        Raises:
            DerivativeError: if a derivative is wrong, not finite or not available; the message names the module at
                fault.

        """
        w = self.w0 if w is None else w
        self._check_weights(w)
        kinks = False
        with self._ranks.together(), self.ledger.paused():  # each rank checks its own part of the loss
            at, finding, cause = w.detach(), None, None
            try:
                if gradient_only:
                    verdict = Verdict(examine_gradient(self._parts, at), at, False)
                else:
                    verdict = examine(self._parts, self._derivatives, at)
                at, finding, kinks = verdict.at, verdict.finding, verdict.kinks
            except DerivativeError as error:
                cause = error
            if wrong := finding or cause:
                raise refusal(self, wrong, lambda: self._blame(at)) from cause
        if any(self._ranks.gather(kinks)) and not self._kinks_told:
            self._kinks_told = True
            if self._ranks.first:
                tell_of_kinks(self.name)

    def kinks_between(self, w: Tensor, x: Tensor) -> bool:
        """True if the loss has a kink between the weights ``w`` and ``x`` [d]; the few gradients are not counted."""
        self._check_weights(w)
        self._check_weights(x)
        found = False
        with self._ranks.together():
            found = kinks_between(self._parts, w.detach(), x.detach())
        return any(self._ranks.gather(found))

    def uncertainty(self, w: Tensor | None = None) -> dict[str, float]:
        """Relative errors of derivatives by differences, along the gradient at ``w`` (default: w0); {} if all are
        exact.

        The keys are "hvps" and "third_derivatives".  The estimate comes from doubling the steps; its few gradients are
        not counted.
        """
        w = self.w0 if w is None else w
        self._check_weights(w)
        own: dict[str, float] = {}
        with self._ranks.together(), self.ledger.paused():
            own = self._derivatives.uncertainty(w.detach())
        return {kind: max(found[kind] for found in self._ranks.gather(own)) for kind in own}

    def measure_weights(self, repeats: int = 5) -> dict[str, float]:
        """Time each kind of evaluation relative to ``value_and_grad``, and use the median ratios as the ledger's
        weights.

        They are measured once.  Only ``ledger.gradient_equivalents`` depends on them.
        """
        if not self._measured:
            with self.ledger.paused():
                own = measure(self, repeats)
            measured = self._ranks.share(lambda: own)  # costs decide steps, so they are the same on all ranks
            self.ledger.weights = {**self.ledger.weights, **measured}
            self._measured = True
        return dict(self.ledger.weights)

    def mini_batches(self, max_gib: float = 0.5) -> Any:
        """The examples of the loss, one by one and in batches; only for problems made from examples.

        See :class:`~dvi.problems.MiniBatches`.
        """
        raise ProblemError(NO_EXAMPLES)

    def outputs(self, w: Tensor, inputs: Any) -> Any:
        """Return the model's outputs for ``inputs``; only for problems made from a module.

        See :meth:`ModuleProblem.outputs`.
        """
        raise ProblemError(NO_MODULE)

    def output_curvature(self, w: Tensor, inputs: Any, U: Tensor, X: Tensor) -> Tensor:
        """Return ½⟨∇²h, U X Uᵀ⟩ for the model's outputs h; only for problems made from a module.

        See :meth:`ModuleProblem.output_curvature`.
        """
        raise ProblemError(NO_MODULE)

    def load_into(self, model: torch.nn.Module, w: Tensor) -> None:
        """Write ``w`` into a model's parameters; only for problems made from a module.

        See :meth:`ModuleProblem.load_into`.
        """
        raise ProblemError(NO_MODULE)

    def _blame(self, w: Tensor) -> str:
        """The cause of a wrong derivative, in words."""
        return "the loss function (a detach, a custom backward, or numbers too large for the dtype?)"

    def _principal_directions(self, U: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
        """Weights x [r] and rows v [r, d] with Σ xᵢ vᵢvᵢᵀ = U sym(X) Uᵀ, without zero terms."""
        k = U.shape[1]
        if not isinstance(X, Tensor) or X.shape != (k, k):
            raise ProblemError(f"X is [k, k] with k = {k}, the number of columns of U; got {_describe(X)}")
        # Tiny, and needed on the host to know the rank.
        host = X.detach().to("cpu", torch.float64)
        if not bool(torch.isfinite(host).all()):
            raise ProblemError("X has entries that are not finite")
        weights, Q = torch.linalg.eigh((host + host.T) / 2)
        used = weights.abs() > 1e-15 * weights.abs().sum()
        Q = Q[:, used].to(self.device, self.dtype)
        return weights[used].to(self.device, self.dtype), _rows(U.detach() @ Q)

    def _check_weights(self, w: Tensor) -> None:
        _refuse_inference_mode()
        if not isinstance(w, Tensor) or w.shape != self.w0.shape or w.dtype != self.dtype or w.device != self.device:
            raise ProblemError(f"w is {_describe(self.w0)}, as w0; got {_describe(w)}")

    def _check_block(self, V: Tensor, name: str) -> None:
        if not isinstance(V, Tensor) or V.ndim != 2 or V.shape[0] != self.dim:
            raise ProblemError(f"{name} is [d, k] with d = {self.dim}, one direction a column; got {_describe(V)}")
        if V.dtype != self.dtype or V.device != self.device:
            raise ProblemError(f"{name} is {self.dtype} on {self.device}, as w0; got {_describe(V)}")

    def _finite_loss(self, value: Tensor) -> Tensor:
        if not math.isfinite(value.item()):
            raise NotFiniteError(f"the loss of {self.name} is {value.item()} at these weights")
        return value

    def _try_loss(self) -> None:
        """Refuse a loss that is not a function of w alone, or not a finite, differentiable scalar at w0."""
        values, leaves, used = [], [], []
        for _ in range(2):
            total, others, depends = 0.0, [], False
            for part in self._parts:
                x = self.w0.clone().requires_grad_()
                with torch.enable_grad(), self._watched(), unwritten(x):
                    value = part(x)
                used.append(x)
                if not isinstance(value, Tensor) or value.shape != ():
                    raise ProblemError(f"a loss is a scalar tensor of shape (); this one gives {_describe(value)}")
                if value.dtype != self.dtype or value.device != self.device:
                    raise ProblemError(f"w0 is {self.dtype} on {self.device}, but the loss is {_describe(value)}")
                depends |= value.requires_grad
                total += value.item()
                others += other_leaves(value, x)
            values.append(total)
            leaves.append(others)
        if not math.isfinite(values[0]):
            raise ProblemError(
                f"the loss is {values[0]} at w0: look for NaN or infinity in the data or in w0, or for an overflow"
            )
        if not depends:
            raise ProblemError("the loss does not depend on w (or was detached from it): nothing to differentiate")
        if any(leaf is x for leaf in leaves[1] for x in used):
            raise ProblemError(
                "the loss uses a value that it computed from its weights in an earlier evaluation, so it has a cache. "
                "Switch the cache off, or empty it at the beginning of forward"
            )
        # A leaf that every evaluation makes anew is allowed (the loss differentiates with respect to its inputs).
        for leaf in leaves[1]:
            if any(leaf is other for other in leaves[0]):
                self._refuse_leaf(leaf)
        if not self._agrees(*values):
            raise ProblemError(
                f"the loss is {values[0]} and then {values[1]} at the same w0{self._name_random()}; a flow needs a "
                "deterministic loss: dropout and noise off (model.eval()), data fixed, no counters"
            )
        self._value_at_w0 = values[0]

    def check_unchanged(self) -> None:
        """Evaluate the loss at w0 once more, without counting, and compare it with its value when the problem was made.

        Raises:
            LossChangedError: if it has changed, since then the loss is not a function of w alone.

        """
        with self.ledger.paused():
            now = float(self.value(self.w0))
        if not self._agrees(self._value_at_w0, now):
            raise LossChangedError(
                f"the loss of {self.name} at w0 was {self._value_at_w0} when the problem was made, and is {now} now: "
                "data or parameters that it reads have changed since, or it draws random numbers or counts its calls. "
                "Its results cannot be trusted; copy what a loss reads (tensor.clone()) before you use it"
            )

    def _near(self) -> Tensor:
        """Weights [d] near w0 in general position: at w0 examples may have equal losses, which hides their weights.

        If the loss is not finite there, w0 itself.
        """
        generator = torch.Generator("cpu").manual_seed(0)
        noise = torch.randn(self.dim, generator=generator, dtype=torch.float64, device="cpu").to(self.w0)
        at = self.w0 + 0.05 * max(0.1, float(self.w0.square().mean().sqrt())) * noise
        try:
            with self.ledger.paused():
                self.value(at)
        except NotFiniteError:
            return self.w0
        return at

    def _agrees(self, one: float, other: float) -> bool:
        """True if these values of the loss are the same up to the order in which a device adds."""
        return abs(one - other) <= 1e3 * torch.finfo(self.dtype).eps * max(abs(one), abs(other))

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """In this context, the operations of a loss are inspected."""
        with attentive(), Watcher(self.w0):
            yield

    def _refuse_leaf(self, leaf: Tensor) -> None:
        """Refuse a tensor that requires a gradient, is not w, and existed before the loss was evaluated."""
        raise ProblemError(past_w(f"a tensor of shape {list(leaf.shape)} that requires a gradient"))

    def _name_random(self) -> str:
        """The cause of two values of the loss at one w, in words."""
        return ""


def _refuse_inference_mode() -> None:
    if torch.is_inference_mode_enabled():
        raise ProblemError(
            "derivatives cannot be taken inside torch.inference_mode(): leave it, or enter torch.inference_mode(False) "
            "(torch.no_grad() does no harm)"
        )


def _flat_weights(w0: Tensor) -> Tensor:
    if not isinstance(w0, Tensor) or w0.ndim != 1:
        raise ProblemError(f"w0 is a flat tensor [d]; got {_describe(w0)}")
    if w0.dtype not in (torch.float32, torch.float64):
        raise ProblemError(
            f"third derivatives need float32 or float64, and w0 is {w0.dtype}: convert the weights and the data, "
            "for a module by model.double() and inputs.double()"
        )
    if w0.numel() == 0:
        raise ProblemError("w0 is empty: there is nothing to minimise over")
    return w0.detach().clone(memory_format=torch.contiguous_format)


def _rows(V: Tensor) -> Tensor:
    return V.detach().T.contiguous()


def _finite(result: Tensor, what: str) -> Tensor:
    if not bool(torch.isfinite(result).all()):
        raise NotFiniteError(f"the {what} of the loss has entries that are not finite at these weights")
    return result


def _describe(x: object) -> str:
    if not isinstance(x, Tensor):
        return f"a {type(x).__name__}"
    return f"a tensor {list(x.shape)} of {x.dtype} on {x.device}"
