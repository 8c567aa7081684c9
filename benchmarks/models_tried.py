"""Tries real models of public packages without changes: are they accepted, and are their derivatives right?

    pip install 'dvi-flows[models]'
    python benchmarks/models_tried.py [--only WORD ...]

Every model is made twice from one seed.  One goes to ``Problem.from_module``.  The other is used by hand, as any torch
user would use it: weights are written into its parameters, and ``loss.backward()`` computes gradients.  H and T are
compared with differences of these gradients.  The reference shares no code with this library.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import math
import os
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import machine
import torch
from model_entries import ENTRIES, Entry, Given
from torch import Tensor, nn

import dvi

# Steps of the differences, as lengths in w; the step at which the result changes least is taken.
STEPS = {
    torch.float64: [0.1 * 0.5**i for i in range(20)],
    torch.float32: [0.5 * 0.5**i for i in range(9)],
}
# A derivative is wrong if its error exceeds this and the uncertainty of the differences.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 2e-2}


@dataclass
class Row:
    """The result for one model."""

    package: str
    name: str
    dim: int = 0
    dtype: str = ""
    verdict: str = ""
    words: str = ""
    off: tuple[float, ...] = ()  # gradient, H, T
    uncertain: tuple[float, ...] = ()
    cost: tuple[float, ...] = ()  # H, T in gradients
    seconds: float = 0.0


class Plain:
    """The loss and its gradient by torch alone, with weights set by hand and ``loss.backward()``."""

    def __init__(self, given: Given, names: list[str]) -> None:
        self.given = given
        parameters = dict(given.model.named_parameters())
        self.parameters = [parameters[name] for name in names]

    def loss(self) -> Tensor:
        given = self.given
        if isinstance(given.inputs, Mapping):
            outputs = given.model(**given.inputs)
        else:
            outputs = given.model(*given.inputs if isinstance(given.inputs, tuple) else (given.inputs,))
        wanted = given.options.get("output")
        if wanted is not None:
            outputs = getattr(outputs, wanted) if isinstance(wanted, str) else outputs[wanted]
        if given.criterion is None:
            return outputs if isinstance(outputs, Tensor) else outputs.loss
        return given.criterion(outputs) if given.targets is None else given.criterion(outputs, given.targets)

    def gradient(self, w: Tensor) -> Tensor:
        real = [as_real(p.detach()) for p in self.parameters]
        with torch.no_grad():
            for p, piece in zip(real, torch.split(w, [p.numel() for p in real]), strict=True):
                p.copy_(piece.view_as(p))
        self.given.model.zero_grad(set_to_none=True)
        self.loss().backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        return torch.cat([as_real(g).reshape(-1) for g in gradients])


def as_real(x: Tensor) -> Tensor:
    """A view of complex numbers as pairs of real ones."""
    return torch.view_as_real(x) if x.is_complex() else x


def differences(
    gradient: Callable[[Tensor], Tensor], w: Tensor, u: Tensor
) -> tuple[tuple[Tensor, float], tuple[Tensor, float]]:
    """H u [d] and T[u, u] [d] by central differences of fourth order, each with its relative uncertainty."""
    here = gradient(w)
    best: list[tuple[Tensor, float]] = [(here, math.inf), (here, math.inf)]
    before: list[Tensor] | None = None
    for h in STEPS[w.dtype]:
        far_below, below, above, far_above = (gradient(w + i * h * u) for i in (-2, -1, 1, 2))
        now = [
            (8 * (above - below) - (far_above - far_below)) / (12 * h),
            (16 * (above - here + (below - here)) - (far_above - here + (far_below - here))) / (12 * h**2),
        ]
        if before is not None:
            changes = [relative(new, old) for new, old in zip(now, before, strict=True)]
            triples = zip(now, changes, best, strict=True)
            best = [(new, change) if change < kept[1] else kept for new, change, kept in triples]
            if all(change > 30 * least for change, (_, least) in zip(changes, best, strict=True)):
                break  # rounding dominates
        before = now
    return best[0], best[1]


def relative(found: Tensor, reference: Tensor) -> float:
    size = float(reference.norm())
    return float((found - reference).norm()) / size if size else float(found.norm())


def directions(problem: dvi.problems.ModuleProblem, model: nn.Module, gradient: Tensor) -> Tensor:
    """A random direction and the gradient's [d, 2], both zero on rows of padding, which torch never moves."""
    generator = torch.Generator().manual_seed(4)
    U = torch.stack([torch.randn(problem.dim, generator=generator, dtype=torch.float64).to(problem.w0), gradient], 1)
    for path, module in model.named_modules():
        where = problem.parameter_slices.get(f"{path}.weight" if path else "weight")
        if isinstance(module, nn.Embedding) and module.padding_idx is not None and where is not None:
            start = where.start + module.padding_idx * module.embedding_dim
            U[start : start + module.embedding_dim] = 0
    return U / U.norm(dim=0)


def compare(problem: dvi.problems.ModuleProblem, plain: Plain) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The errors of gradient, H u and T[u, u], and the uncertainty of the differences: the worst of two directions.

    The weights are near those that the problem was made with, but not equal to them, so that cached values show.
    """
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(problem.dim, generator=generator, dtype=torch.float64).to(problem.w0)
    w = problem.w0 + 0.01 * noise
    gradient = plain.gradient(w)
    U = directions(problem, plain.given.model, gradient)
    off, uncertain = [relative(problem.value_and_grad(w)[1], gradient), 0.0, 0.0], [0.0, 0.0, 0.0]
    H, T = problem.hvp(w, U), problem.hessian_gradient(w, U, squares=True)
    for j in range(U.shape[1]):
        for order, (reference, doubt) in enumerate(differences(plain.gradient, w, U[:, j]), start=1):
            exact = H[:, j] if order == 1 else T[j]
            off[order] = max(off[order], relative(exact, reference))
            uncertain[order] = max(uncertain[order], doubt)
    return tuple(off), tuple(uncertain)


def attempt(entry: Entry) -> Row:
    row = Row(entry.package, entry.name)
    torch.manual_seed(0)
    given = entry.make()
    torch.manual_seed(0)
    plain_given = entry.reference()
    before = {name: x.clone() for name, x in given.model.state_dict().items() if isinstance(x, Tensor)}
    row.dim = sum(p.numel() for p in given.model.parameters() if p.requires_grad)
    row.dtype = str(next(given.model.parameters()).dtype).removeprefix("torch.")
    try:
        problem = dvi.Problem.from_module(given.model, given.criterion, given.inputs, given.targets, **given.options)
    except dvi.ProblemError as error:
        row.verdict, row.words = "refused", str(error)
        return row
    row.dim = problem.dim
    try:
        row.off, row.uncertain = compare(problem, Plain(plain_given, list(problem.parameter_slices)))
        weights = problem.measure_weights(3)
        row.cost = weights["hvps"], weights["third_derivatives"]
        row.verdict = judgement(problem, row)
    except dvi.ProblemError as error:
        row.verdict, row.words = "refused when asked", str(error)
    try:
        problem.check()
    except dvi.ProblemError as error:
        row.verdict, row.words = "refused by check()", str(error)
    except Exception as error:
        row.verdict, row.words = "check() FAILED", f"{type(error).__name__}: {error}"
    after = given.model.state_dict()
    written = [name for name, x in before.items() if not torch.equal(x, after[name])]
    if written:
        row.verdict += f", but WROTE to {', '.join(written)}"
    return row


def judgement(problem: dvi.problems.ModuleProblem, row: Row) -> str:
    bound = TOLERANCE[problem.dtype]
    if all(off <= max(bound, 10 * doubt) for off, doubt in zip(row.off, row.uncertain, strict=True)):
        return "accepted"
    # Differences in float32 are inaccurate along directions with small derivatives; solutions have a note on it.
    rough = problem.derivatives == "finite-difference" and problem.dtype == torch.float32
    return "accepted, rough" if rough else "WRONG"


def table(rows: list[Row]) -> str:
    lines = [
        "| package | model | weights | dtype | | gradient off | H off | T off | H costs | T costs |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        numbers = [shown(*pair) for pair in zip(row.off, row.uncertain, strict=True)] or [""] * 3
        costs = [f"{cost:.1f}" for cost in row.cost] or [""] * 2
        cells = [row.package, row.name, f"{row.dim:,}", row.dtype, row.verdict, *numbers, *costs]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shown(off: float, doubt: float) -> str:
    """An error, or a bound on it if it is smaller than the uncertainty of the differences."""
    if off == 0:
        return "0"
    return f"{off:.0e}" if off > doubt else f"< {doubt:.0e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="models whose package or name has one of these words")
    words = parser.parse_args().only
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded: every model is made from its configuration
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # warnings of the packages about optional kernels and token ids
    logging.disable(logging.WARNING)
    chosen = [e for e in ENTRIES if not words or any(word.lower() in f"{e.package} {e.name}".lower() for word in words)]
    rows = []
    for entry in chosen:
        start = time.perf_counter()
        try:
            row = attempt(entry)
        except Exception as error:
            row = Row(entry.package, entry.name, verdict="FAILED", words=f"{type(error).__name__}: {error}")
        row.seconds = time.perf_counter() - start
        rows.append(row)
        print(f"{row.seconds:6.1f} s  {row.package}, {row.name}: {row.verdict}", file=sys.stderr, flush=True)
    print(machine.describe()["words"])
    packages = sorted({entry.package for entry in chosen} - {"torch"})
    print(", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages) + ".\n")
    print(table(rows) + "\n")
    for row in rows:
        if row.words:
            print(f"- {row.package}, {row.name}: {textwrap.shorten(row.words, 500, placeholder=' …')}")


if __name__ == "__main__":
    main()
