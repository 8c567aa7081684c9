"""Markdown tables from rows of numbers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cases import EULER, PAPER
from measure import CANONICAL, PHASES

Row = dict[str, Any]


def table(head: list[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def number(value: float | None, digits: int = 3) -> str:
    """A number in few digits; a dash for None."""
    if value is None or value != value:
        return "–"
    if value == 0:
        return "0"
    if abs(value) >= 1e-2:
        return f"{value:.{max(0, digits - 1 - _magnitude(value))}f}"
    return f"{value:.1e}".replace("e-0", "e-")


def _magnitude(value: float) -> int:
    return len(str(int(abs(value)))) - 1 if abs(value) >= 1 else -1


def note(row: Row) -> str:
    """The note on a run that did not reach its end."""
    return "" if row["status"] == "SUCCESS" else f" ({row['status']} at t = {row['reached']:.0f})"


def cost_table(rows: list[Row], weights: str) -> str:
    """Gradient equivalents per unit time by phase, and the evaluations that they consist of."""
    names = [name for name in PHASES if any(name in row.get(weights + "_by_phase", {}) for row in rows)]
    kinds = ("gradients", "hvps", "third_derivatives")
    head = ["integrator", *names, "all", "gradients per unit", "HVPs", "T[u, v]", "max error in w"]
    body = []
    for row in rows:
        spent = row.get(weights + "_by_phase", {})
        cells = [number(spent.get(name)) for name in names]
        used = [row["counts"][kind] / row["reached"] if row["reached"] else None for kind in kinds]
        shares = [number(value) for value in used] if weights == "canonical" else []
        body.append(
            [row["integrator"] + note(row), *cells, number(row.get(weights)), *shares, number(row.get("error_w"))]
        )
    if weights != "canonical":
        head = [*head[: len(names) + 2], head[-1]]
    return table(head, body)


def error_table(rows: list[Row]) -> str:
    """Errors in w, tr Σ and predicted loss, and time."""
    slow = {row["integrator"]: row for row in rows}.get(PAPER)
    head = ["integrator", "w, max", "w, end", "tr Σ, mean", "tr Σ, max", "loss, mean", "loss, max", "steps",
            "CPU s per 100 units", "paper's scheme / this, CPU time", "GE"]  # fmt: skip
    body = []
    for row in rows:
        if "error_w" not in row:
            body.append([row["integrator"] + note(row), *["–"] * (len(head) - 1)])
            continue
        speed = row["cpu_seconds"] / row["reached"]
        against = slow and slow["cpu_seconds"] / slow["reached"] / speed
        fewer = slow and slow["canonical"] / row["canonical"]
        names = ("error_w", "error_w_end", "error_X_mean", "error_X", "error_loss_mean", "error_loss")
        cells = [number(row[name]) for name in names]
        body.append([row["integrator"] + note(row), *cells, str(row["steps_taken"]), number(100 * speed),
                     number(against), number(fewer)])  # fmt: skip
    return table(head, body)


def ccp_table(timings: list[Row]) -> str:
    """Milliseconds, ratios, success and residuals."""
    groups: dict[tuple[str, int], dict[str, Row]] = {}
    for timing in timings:
        groups.setdefault((timing["family"], timing["k"]), {})[timing["solver"]] = timing
    head = ["instances", "k", "dvi ms", "CVXOPT ms", "CLARABEL ms", "CVXOPT / dvi", "CLARABEL / dvi",
            "solved: dvi", "CVXOPT", "CLARABEL", "worst residual: dvi", "CVXOPT", "CLARABEL"]  # fmt: skip
    body = []
    for (family, k), by in groups.items():
        ours, others = by["dvi"], [by["CVXOPT"], by["CLARABEL"]]
        all_three = [ours, *others]
        body.append([
            family, str(k), *(number(t["milliseconds"]) for t in all_three),
            *(number(t["milliseconds"] / ours["milliseconds"]) for t in others),
            *(f"{100 * t['solved']:.0f} %" for t in all_three), *(number(t["worst"]) for t in all_three),
        ])  # fmt: skip
    return table(head, body)


def summary_table(cases: dict[str, Row]) -> str:
    """One line for each case: the default compared with Euler ¼ and the paper's scheme."""
    head = ["case", "integrator", "GE per unit", "Euler ¼ / this", "paper's / this", "paper's / this, k >= 1",
            "CPU time, paper's / this", "error in w", "Euler ¼'s", "error in tr Σ, mean", "Euler ¼'s",
            "error in loss, mean", "Euler ¼'s"]  # fmt: skip
    body = []
    for name, about in cases.items():
        by = {row["integrator"]: row for row in about["rows"]}
        reference, paper = by.get(EULER), by.get(PAPER)
        for row in about["rows"]:
            if not row["family"].startswith("macro step") or "error_w" not in row or not (reference and paper):
                continue
            until = min(reference["reached"], paper["reached"])
            whole = until >= row["reached"] - 1
            ratios = [number(other["canonical"] / row["canonical"]) if whole else "–" for other in (reference, paper)]
            speed = (paper["cpu_seconds"] / paper["reached"]) / (row["cpu_seconds"] / row["reached"])
            errors = [row.get(key) for key in ("error_w", "error_X_mean", "error_loss_mean")]
            theirs = [reference.get(key) if whole else None for key in ("error_w", "error_X_mean", "error_loss_mean")]
            pairs = [number(value) for pair in zip(errors, theirs, strict=True) for value in pair]
            body.append([name, row["integrator"], number(row["canonical"]), *ratios, edge_ratio(row, paper),
                         number(speed), *pairs])  # fmt: skip
    return table(head, body)


def edge_ratio(row: Row, paper: Row) -> str:
    """The smallest and the largest ratio to the paper's scheme over the phases with k ≥ 1."""
    ours, theirs = row["canonical_by_phase"], paper["canonical_by_phase"]
    ratios = [theirs[name] / ours[name] for name in ours if name in theirs and not name.startswith("k = 0")]
    if not ratios:
        return "–"
    return f"{number(min(ratios), 2)} to {number(max(ratios), 2)}"


def case_section(name: str, about: Row, rows: list[Row]) -> str:
    """The section on one case."""
    w = about["weights"]
    lines = [
        f"### {name}",
        "",
        f"{about['dim']} weights, {about['steps']} unit times after {about['warm_start']:.0f} steps of the optimizer. "
        f"A gradient took {w['milliseconds']:.2f} ms; measured weights: HVP {w['hvps']:.2f}, T[u, v] "
        f"{w['third_derivatives']:.2f}, pair by pair {w['pairwise']:.2f}. "
        f"Breakpoints: {about['breakpoints'] or 'none'}. Two fine solutions agree to {number(about['doubt'])} in w.",
        "",
        "Gradient equivalents per unit time, weights 1 / 2.5 / 9 (differences of gradients: plain gradients):",
        "",
        cost_table(rows, "canonical"),
        "",
        "The same with the weights measured on this problem:",
        "",
        cost_table(rows, "measured"),
        "",
        "Errors against the fine solution (tr Σ relative to its maximum, loss relative), and time:",
        "",
        error_table(rows),
        "",
    ]
    return "\n".join(lines)


def render(results: Row) -> str:
    """The whole report."""
    lines = ["# Benchmarks", "", results["machine"]["words"], ""]
    if results["cases"]:
        weights = " / ".join(f"{CANONICAL[kind]:g}" for kind in ("gradients", "hvps", "third_derivatives"))
        lines += [f"Gradient equivalents (GE) at weights {weights}:", "", summary_table(results["cases"]), ""]
    for name, about in results["cases"].items():
        lines.append(case_section(name, about, about["rows"]))
    if "ccp" in results:
        lines += ["### Cone complementarity problems", "", ccp_table(results["ccp"]), ""]
    for name in ("scale", "gpu"):
        if name in results:
            lines += [f"### {name}", "", results[name]["words"], ""]
    return "\n".join(lines)
