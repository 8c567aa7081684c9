"""Tries a declaration once, before anything is built on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dvi.methods.errors import ScheduleError, SpecError
from dvi.methods.filter import Filter
from dvi.methods.per_weight import PerWeight
from dvi.methods.preconditioners.base import Preconditioner
from dvi.methods.spec import Method, Nu


def validate(method: Method, w: Tensor, g: Tensor) -> Nu:
    """Run init, f and P once at (w, g) and return ν after that first update.

    Raises:
        SpecError: if ``init`` does not return a pytree of floating-point tensors on w's device; if ``f`` returns
            another structure, other shapes or dtypes than ν's, or a number that is not finite; if ``P`` does not
            return a preconditioner; if one of them changes its arguments in place, or gives another result when it is
            called again; if Q does not first oscillate with period two; if ``decay`` does not return a γ in [0, 1) for
            each weight, or returns different ones for weights that P mixes.
        NotPositiveDefiniteError: if P(ν) after the first update is not positive definite.
    """
    name = type(method).__name__
    Q = method.at(0.0).Q()
    if not isinstance(Q, Filter):
        raise SpecError(
            f"{name}.Q() is {_what(Q)}; it must be a filter: dvi.Filter([1.0], [1.0, -beta]) for momentum β."
        )
    gamma = decay_of(method.at(0.0), w)
    for value in _between(gamma):
        Q.check(value)
    w_before = w.clone()
    nu = method.init(w)
    _require_untouched(f"{name}.init(w)", "w", w_before, w, "it must make a new tensor (torch.zeros_like(w)).")
    for path, leaf in leaves(nu):
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            raise SpecError(
                f"{name}.init(w): ν{path} is {_what(leaf)}; ν is made of floating-point tensors "
                "(torch.zeros_like(w), w.new_zeros(())), hyperparameters are fields."
            )
        if leaf.device != w.device:
            raise SpecError(
                f"{name}.init(w): ν{path} is on {leaf.device}, w on {w.device}; make it with w.new_zeros(…)."
            )
    _require_same(f"{name}.init(w)", nu, method.init(w))
    before, g_before = pytree.tree_map(torch.clone, nu), g.clone()
    change = method.at(0.0).f(nu, g)
    _check_structure(name, nu, change)
    _require_untouched(f"{name}.f(nu, g)", "ν", before, nu, "it must return the difference ν_t − ν_(t−1).")
    _require_untouched(f"{name}.f(nu, g)", "g", g_before, g, "it must make a new tensor (g * s in place of g.mul_(s)).")
    for path, delta in leaves(change):
        if not bool(torch.isfinite(delta).all()):
            raise SpecError(f"{name}.f(nu, g): the change of ν{path} is not finite at the first step.")
    _require_same(f"{name}.f(nu, g)", change, method.at(0.0).f(nu, g))
    after = pytree.tree_map(torch.add, nu, change)
    kept = pytree.tree_map(torch.clone, after)
    P = method.at(0.0).P(after)
    if not isinstance(P, Preconditioner):
        raise SpecError(
            f"{name}.P(nu) is {_what(P)}; it must be a preconditioner: dvi.Scalar(p) for p·I, "
            "dvi.Diagonal(p) for diag(p)."
        )
    P.check(g)
    _require_untouched(
        f"{name}.P(nu)", "ν", kept, after, "it must make a new tensor (v + eps in place of v.add_(eps))."
    )
    _require_same(f"{name}.P(nu)", P.apply(g), method.at(0.0).P(after).apply(g))
    if P.apply(g).shape != g.shape:
        raise SpecError(f"{name}.P(nu) does not act on vectors of shape {list(g.shape)}.")
    if gamma is not None:
        P.weighted(gamma.map(lambda x: 1 - x / 2))
    return after


def decay_of(method: Method, w: Tensor, t: float | None = None) -> PerWeight | None:
    """The decoupled weight decay γ of a method whose schedules were replaced by their values (at t); or None.

    Raises:
        SpecError: if it is not a γ in [0, 1) for each of the weights w [d].
        ScheduleError: the same along a run (if t is given).
    """
    declared = method.decay()
    if declared is None:
        return None
    name = f"{type(method).__name__}.decay()"
    gamma = PerWeight.of(declared, w, name)
    low, high = gamma.range()
    if not (low >= 0 and high < 1):  # also false for NaN
        where, kind = ("", SpecError) if t is None else (f" at t = {t:g}", ScheduleError)
        raise kind(f"{name}{where} reaches from {low:g} to {high:g}; γ (lr·weight_decay) must lie in [0, 1).")
    return gamma


def _between(gamma: PerWeight | None) -> list[float]:
    """The decays for which a filter is checked: if γ differs between weights, an eigenvector sees a mean of them."""
    if gamma is None:
        return [0.0]
    low, high = gamma.range()
    return [low] if low == high else [low + (high - low) * i / 8 for i in range(9)]


def leaves(nu: Nu) -> list[tuple[str, Any]]:
    """The leaves of ν with their paths, as in ``[("['v']", tensor)]``."""
    return [(pytree.keystr(path), leaf) for path, leaf in pytree.tree_flatten_with_path(nu)[0]]


def _require_untouched(call: str, what: str, before: Nu, after: Nu, remedy: str) -> None:
    for (path, old), (_, now) in zip(leaves(before), leaves(after), strict=True):
        if not torch.equal(old, now):
            raise SpecError(f"{call} changes {what}{path} in place; {remedy}")


def _require_same(call: str, first: Nu, second: Nu) -> None:
    """Raise unless two calls with the same arguments agree up to the order of sums."""
    for (path, a), (_, b) in zip(leaves(first), leaves(second), strict=True):
        if not isinstance(a, Tensor) or not a.is_floating_point() or not a.numel():
            continue
        rounding = 1e3 * torch.finfo(a.dtype).eps * float(a.nan_to_num(0.0, 0.0, 0.0).abs().max())
        if a.shape != b.shape or not torch.allclose(a, b, rtol=0.0, atol=rounding, equal_nan=True):
            where = f" in ν{path}" if path else ""
            raise SpecError(
                f"{call} gives something else{where} when it is called again with the same arguments. It draws random "
                "numbers, or reads a variable that changes (a counter, a list, a global). Make that a part of ν, or a "
                "schedule t ↦ value."
            )


def _check_structure(name: str, nu: Nu, change: Nu) -> None:
    if pytree.tree_structure(nu) != pytree.tree_structure(change):
        raise SpecError(
            f"{name}.f(nu, g) has another structure than ν: {_sketch(change)} against {_sketch(nu)}. "
            "f returns the change of every part of the state that init(w) makes."
        )
    for (path, old), (_, delta) in zip(leaves(nu), leaves(change), strict=True):
        if not isinstance(delta, Tensor) or delta.shape != old.shape or delta.dtype != old.dtype:
            raise SpecError(f"{name}.f(nu, g): the change of ν{path} is {_what(delta)}, ν{path} itself {_what(old)}.")


def _what(x: Any) -> str:
    return f"a {x.dtype} tensor of shape {list(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"


def _sketch(nu: Nu) -> str:
    return "{" + ", ".join(f"{path}: {_what(leaf)}" for path, leaf in leaves(nu)) + "}"
