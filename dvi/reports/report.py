"""The report of a run: the numbers that a reader needs first, and sentences with them."""

from __future__ import annotations

import html
import textwrap
from dataclasses import dataclass
from typing import Literal

import numpy as np

Verdict = Literal["good", "fair", "poor", "unknown"]

#: Where the central flow is this part of the stable flow's distance from the optimizer, it is "good"; or "fair".
NEAR, NOT_FAR = 1 / 3, 3 / 4
#: A next Taylor term up to this part of the oscillation's force is "good"; or "fair".
SMALL, NOT_LARGE = 0.03, 0.1
#: An effective sharpness this far below 2 is at the edge, where only the optimizer itself was watched.
AT_EDGE = 1.95


@dataclass(frozen=True)
class Report:
    """The results of a run for its optimizer.  ``print(report)`` gives them in words, and a notebook displays them.

    None stands for what is unknown; ``missing`` then says how to get it.  "At the end" means the average over the last
    ``window`` unit times.  Times are unit times (optimizer steps) from the end of the warm start.

    Attributes:
        title: method and problem.
        start, end: the first and the last recorded time.
        window: length of the averages at the end, unit times.
        flow: the flow that the report describes: "central", "map", …; None if there is none among the runs.
        at_edge: is the run at the edge of stability at its end?
        since: the time since which it has been at the edge; None if it is not there.
        edge_share: fraction of the recorded times at the edge.
        directions, most_directions: numbers of directions that oscillate at the end, and at most.
        sharpness: largest effective eigenvalue at the end; 2 is the edge.
        effective_lr: harmonic mean of the effective learning rates at the end.
        largest_stable_lr: ``effective_lr`` × 2 / ``sharpness``: the largest stable value, all else being equal.
        loss: the loss L(w) of the flow itself at the end.
        oscillation_loss: the flow's prediction of what the oscillation adds to the average loss, ½⟨H, Σ⟩ (eq. 7).
        optimizer_loss: average of the optimizer's loss.
        stable_loss: loss of the stable flow.
        curvature: of the central flow at the end, 2 / (largest stable learning rate); for gradient descent this is the
            largest eigenvalue of the Hessian.
        curvature_ablated: the same for the flow without the push of the oscillation on the weights.  This is the
            ablated flow; for a method without state, it is the stable flow.
        curvature_stable: the same for the stable flow.
        distance, distance_stable: distances of the central and the stable flow from the optimizer at the end, in weight
            space.
        strain: the largest error estimate, relative to the tolerance, among steps that were accepted although they
            exceeded it; 0 if there was no such step.
        next_terms: (t, size) of the measured next Taylor terms, relative to the force of the oscillation; see
            :meth:`dvi.runs.observables.Observer.next_term`.
        missing: what is unknown, and how to get it.
        notes: the notes of the run.
    """

    title: str
    start: float
    end: float
    window: float
    flow: str | None = None
    at_edge: bool | None = None
    since: float | None = None
    edge_share: float | None = None
    directions: int | None = None
    most_directions: int | None = None
    sharpness: float | None = None
    effective_lr: float | None = None
    largest_stable_lr: float | None = None
    loss: float | None = None
    oscillation_loss: float | None = None
    optimizer_loss: float | None = None
    stable_loss: float | None = None
    curvature: float | None = None
    curvature_ablated: float | None = None
    curvature_stable: float | None = None
    distance: float | None = None
    distance_stable: float | None = None
    strain: float | None = None
    next_terms: tuple[tuple[float, float], ...] = ()
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def next_term(self) -> float | None:
        """The median of the sizes of the next Taylor term."""
        return float(np.median([size for _, size in self.next_terms])) if self.next_terms else None

    @property
    def distance_ratio(self) -> float | None:
        """The central flow's distance from the optimizer divided by that of the stable flow."""
        if self.distance is None or not self.distance_stable:
            return None
        return self.distance / self.distance_stable

    @property
    def curvature_explained(self) -> float | None:
        """The fraction of the curvature that the push of the oscillation removes: 1 − central / ablated."""
        if self.curvature is None or not self.curvature_ablated:
            return None
        return 1 - self.curvature / self.curvature_ablated

    @property
    def verdict(self) -> Verdict:
        """Does the central flow describe this run?  The worse of the grades by distance and by next Taylor term.

        - "good": its distance from the optimizer is at most a third of the stable flow's, and the next term is at most
          3 %.
        - "fair": at most three quarters, and at most 10 %.
        - "poor": more than that.
        - "unknown": nothing has oscillated, or the distances are unknown and the next term alone is not "poor".

        These rules of thumb come from runs for which the answer was known.
        """
        distance, term = self._grades
        if not self.most_directions or (distance is None and term != 2):
            return "unknown"
        scale: tuple[Verdict, ...] = ("good", "fair", "poor")
        return scale[max(distance or 0, term or 0)]

    @property
    def _grades(self) -> tuple[int | None, int | None]:
        """The grades by distance and by next term: 0, 1 or 2, None if unknown."""
        return _grade(self.distance_ratio, NEAR, NOT_FAR), _grade(self.next_term, SMALL, NOT_LARGE)

    # ---- in words -------------------------------------------------------------------------------------

    def sections(self) -> list[tuple[str, list[str]]]:
        """Questions with the sentences of their answers; questions without an answer are left out."""
        found = [
            ("At the edge of stability?", self._edge()),
            ("How large are the steps?", self._learning_rate()),
            ("How much loss does the oscillation add?", self._loss()),
            ("How much curvature does it take away?", self._curvature()),
            ("Can the flow be trusted?", self._trust()),
            ("Not known:", list(self.missing)),
        ]
        return [(question, answer) for question, answer in found if answer]

    def __str__(self) -> str:
        """The report in plain words, in lines of at most 100 characters."""
        lines = [self._headline()]
        for question, answer in self.sections():
            text = f"{question} {' '.join(answer)}".replace(" %", "\xa0%")  # a number and its unit share a line
            lines += textwrap.wrap(text, 100, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
        return "\n".join(lines).replace("\xa0", " ")

    def _repr_html_(self) -> str:
        answers = (
            f"<li><b>{html.escape(question)}</b> {html.escape(' '.join(answer))}</li>"
            for question, answer in self.sections()
        )
        return f"<p><b>{html.escape(self._headline())}</b></p><ul>{''.join(answers)}</ul>"

    def _headline(self) -> str:
        return f"{self.title}, steps {self.start:g} to {self.end:g}"

    @property
    def _called(self) -> str:
        """The flow, in words."""
        return "the central map" if self.flow == "map" else f"the {self.flow} flow"

    def _edge(self) -> list[str]:
        if self.at_edge is None:
            return []
        if self.at_edge:
            told = [f"Yes, since step {self.since:.3g}."]
        elif self.edge_share:
            told = [f"Not at the end. The optimizer was there for {_percent(self.edge_share)} of the time."]
        else:
            told = ["No, so nothing oscillates."]
        if self.most_directions and self.directions is not None:
            noun = "direction oscillates" if self.directions == 1 else "directions oscillate"
            most = "" if self.directions == self.most_directions else f", and at most {self.most_directions} did before"
            told.append(f"{self.directions or 'No'} {noun} at the end{most}.")
        if self.sharpness is not None and self.at_edge:
            told.append(f"The largest effective eigenvalue stays at {self.sharpness:.3g}; above 2, steps are unstable.")
        elif self.sharpness is not None:
            told.append(f"The largest effective eigenvalue is {self.sharpness:.3g}; the edge is at 2.")
        return told

    def _learning_rate(self) -> list[str]:
        if self.effective_lr is None:
            return []
        told = f"The effective learning rate is {self.effective_lr:.3g} at the end"
        if self.largest_stable_lr is None:
            return [f"{told}."]
        part = _percent(self.effective_lr / self.largest_stable_lr)
        return [f"{told}, which is {part} of the largest stable one ({self.largest_stable_lr:.3g})."]

    def _loss(self) -> list[str]:
        told, name = [], self._called.capitalize()
        if self.optimizer_loss is not None:
            told.append(
                f"Over the last {self.window:g} steps, the optimizer's loss averages {self.optimizer_loss:.4g}."
            )
        if self.loss is not None and self.oscillation_loss is not None:
            total = self.loss + self.oscillation_loss
            if self.oscillation_loss and total > 0:
                told.append(
                    f"{name} predicts {total:.4g}: it has {self.loss:.4g} itself, and the oscillation adds "
                    f"{self.oscillation_loss:.2g} ({_percent(self.oscillation_loss / total)})."
                )
            else:
                told.append(f"{name} has {self.loss:.4g}, and no oscillation adds to it.")
        if self.stable_loss is not None and self.most_directions:
            told.append(f"The stable flow, which ignores oscillations, has {self.stable_loss:.4g}.")
        return told

    def _curvature(self) -> list[str]:
        if self.curvature is None or not self.most_directions:
            return []
        told = [f"The largest curvature is {self.curvature:.3g} at the end."]
        explained = self.curvature_explained
        if explained is not None and self.curvature_ablated is not None:
            flow = "ablated" if self.curvature_ablated != self.curvature_stable else "stable"
            change = f"{_percent(explained)} less" if explained >= 0 else f"{_percent(-explained)} more"
            told.append(
                f"Without the push of the oscillation on the weights (the {flow} flow) it is "
                f"{self.curvature_ablated:.3g}: the push makes it {change}."
            )
        return told

    def _trust(self) -> list[str]:
        by_distance, by_term = self._grades
        short = {"good": "Yes.", "fair": "As a rough picture.", "poor": "No.", "unknown": ""}[self.verdict]
        told = [short] if short else []
        if self.distance is not None:
            stable = self.distance_stable if self.most_directions else None
            beside = "" if stable is None else f", and the stable flow {stable:.3g}"
            hardly = " That is hardly nearer." if stable is not None and by_distance == 2 else ""
            told.append(f"At the end, {self._called} is {self.distance:.3g} away from the optimizer{beside}.{hardly}")
        if self.next_term is not None:
            times, sizes = zip(*self.next_terms, strict=True)
            worst = int(np.argmax(sizes))
            most = f"at most {_percent(sizes[worst])}, at step {times[worst]:.3g}"
            spread = f" (median of {len(sizes)} measurements; {most})" if len(sizes) > 1 else ""
            large = " That is too much: the oscillation is too large for this flow." if by_term == 2 else ""
            told.append(
                "The first term that the flow leaves out is "
                f"{_percent(self.next_term)} of the force of the oscillation{spread}.{large}"
            )
        if self.strain:
            told.append(
                f"Some steps had an error estimate above the tolerance, up to {self.strain:.2g} times as large."
            )
        return told


def _grade(value: float | None, good: float, fair: float) -> int | None:
    return None if value is None else 0 if value <= good else 1 if value <= fair else 2


def _percent(part: float) -> str:
    """A part as a percentage of two digits, or three."""
    if not np.isfinite(part):
        return "not a finite part (the loss is not finite as far away as the oscillation goes)"
    return f"{100 * part:.0f} %" if abs(part) >= 0.095 else f"{100 * part:.2g} %"


__all__ = ["Report", "Verdict"]
