"""Tables of the experiments, of the states of their runs, and of the results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from dvi.paper.table import Experiment, Size, table
from dvi.sweeps.records import Record


def overview(rows: Sequence[Experiment], size: Size, found: Sequence[Record]) -> Iterator[str]:
    """A line for each row: its name, its figures, its setting, and the state of its run."""
    width = max(len(row.name) for row in rows)
    for row, record in zip(rows, found, strict=True):
        state = record.state if not row.why_not(size) else f"cannot be run: {row.why_not(size)}"
        cost = f", {record.cpu_seconds:.0f} s" if record.cpu_seconds else ""
        status = f" ({record.status})" if record.state == "failed" else ""
        figures = "figure " + ", ".join(row.figures)
        yield f"{row.name:{width}}  {figures:18} {setting(row, size):58} {state}{status}{cost}"
    states = [record.state for record in found]
    counts = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
    yield f"{len(rows)} experiments of size {size}: {', '.join(counts)}"


def setting(row: Experiment, size: Size) -> str:
    """The setting of a row in words: problem, method, learning rate, other options, and steps."""
    options = dict(row.options[size])
    steps, lr = options.pop("steps"), options.pop("lr")
    for name in ("measure_every", "bias_correction"):
        options.pop(name, None)
    rest = "".join(f", {name} {value:g}" for name, value in options.items())
    kind = "" if "discrete" in row.runs else f" ({', '.join(row.runs)})"
    return f"{row.problem}, {row.method} {lr:g}{rest}{kind}, {steps} steps"


HEAD = (
    "experiment",
    "setting",
    "weights",
    "edge from",
    "k ≤",
    "‖discrete − central‖",
    "‖discrete − stable‖",
    "predicted loss off by",
    "stable flow's loss off by",
    "cost",
    "CPU minutes",
    "remark",
)

#: A row above these limits gets a remark.  DEAR: gradient equivalents per step.  NEAR: the distance of optimizer and
#: central flow divided by that of optimizer and stable flow; with MSE only, and not at the largest of three learning
#: rates of a figure.
DEAR, NEAR = 60.0, 1 / 3

#: If the optimizer's largest eigenvalue exceeds the threshold by this factor, the oscillation began late.
LATE = 1.5


def markdown(rows: Sequence[Experiment], size: Size, found: Sequence[Record]) -> Iterator[str]:
    """A Markdown table of the runs that have ended: distances and errors since the edge was reached, and costs.

    The cost is that of the central flow (or the flow that is run in its place), in gradient equivalents per step.  A
    row above DEAR or NEAR gets a remark, with the cause if the run shows one.
    """
    yield "| " + " | ".join(HEAD) + " |"
    yield "|" + "---|" * len(HEAD)
    for row, record in zip(rows, found, strict=True):
        if record.complete:
            yield "| " + " | ".join(_cells(row, size, record)) + " |"
        elif row.why_not(size):
            yield f"| {row.name} | {setting(row, size)} |" + " |" * (len(HEAD) - 3) + f" {row.why_not(size)} |"
        elif record.state == "error":
            yield f"| {row.name} | {setting(row, size)} |" + " |" * (len(HEAD) - 3) + f" {_short(record)} |"


def _cells(row: Experiment, size: Size, record: Record) -> list[str]:
    seen = record.summary
    lead = "central" if "central" in row.runs else row.runs[0]
    apart = seen.get("distance", {})
    cost = seen.get("gradient_equivalents", {}).get(lead)
    return [
        row.name,
        setting(row, size),
        str(seen.get("weights", "–")),
        _number(seen.get("edge"), ".0f"),
        str(seen.get("k", "–")) if seen.get("edge") is not None else "–",
        _number(apart.get("discrete–central"), ".3g"),
        _number(apart.get("discrete–stable"), ".3g"),
        _percent(seen.get("predicted_error")),
        _percent(seen.get("stable_error")),
        _number(cost, ".3g" if (cost or 0) < 100 else ".0f"),
        f"{record.cpu_seconds / 60:.1f}",
        _remark(row, size, record, lead),
    ]


def _remark(row: Experiment, size: Size, record: Record, lead: str) -> str:
    """How a run failed, if it did, and why its cost is high or its flow is far from the optimizer."""
    seen = record.summary
    told = [] if record.state == "done" else [_short(record)]
    cost, unit = seen.get("gradient_equivalents", {}).get(lead), seen.get("unit_steps") or 0
    if cost is not None and cost > DEAR:
        if lead.startswith("stationary"):
            told.append("dear: the stationary ν is sought four times a step")
        elif unit:
            told.append(f"dear: single steps for {unit:.0f} of {seen['reached']:.0f}, where the oscillation is stiff")
        else:
            told.append("dear; the cause is not known")
    apart = seen.get("distance", {})
    near, far = apart.get("discrete–central"), apart.get("discrete–stable")
    if near is not None and far is not None and near > NEAR * far and "-mse" in row.problem and not _largest(row, size):
        after, peak = seen.get("peak") or (0, 0)
        why = f"{near / far:.2f} of the stable flow's distance"
        if peak > LATE:
            why += f": {after:.0f} steps past the edge the optimizer is at {peak:.1f} times the threshold"
        edge, end = seen.get("edge") or 0.0, seen.get("reached") or float("inf")
        if edge > end / 3:
            why += f"; the edge comes late, at step {edge:.0f} of {end:.0f}"
        told.append(why)
    return "; ".join(told)


def _largest(row: Experiment, size: Size) -> bool:
    """Whether a row has the largest learning rate of three in its figure."""
    rates = sorted({other.options[size]["lr"] for other in table().of_figure(row.figures[0])})
    return len(rates) > 2 and row.options[size]["lr"] == rates[-1]


def _short(record: Record) -> str:
    """How a run ended, in a few words that fit in a table."""
    first = record.message.strip().split("\n")[0]
    cut = first if len(first) <= 160 else first[:157] + "…"
    at = f" at {record.summary['reached']:g}" if record.summary.get("reached") else ""
    return f"{record.status or record.state}{at}: {cut}".replace("|", "\\|")


def _number(value: Any, form: str) -> str:
    return "–" if value is None else format(value, form)


def _percent(value: Any) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


__all__ = ["markdown", "overview", "setting"]
