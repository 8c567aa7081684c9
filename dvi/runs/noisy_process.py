"""The flow with noise in progress, recorded like other flows, with its own series in addition."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch

from dvi.noise.flow import NoisyFlow
from dvi.noise.step import NoisyNode, NoisyStep
from dvi.results.solution import Solution
from dvi.results.status import Status
from dvi.runs.observables import Observation, Observer
from dvi.runs.process import FlowProcess
from dvi.solvers.protocol import Array, State, host

#: The series of a node besides a flow's observation; those in the first row keep their value until the next update.
_OWN = ("radius", "outside", "lowest", "taylor", "noise", "rest", "directions")


class NoisyProcess(FlowProcess):
    """The flow with noise, one step of the optimizer at a time.

    Raises:
        ValueError: if a recorded time is not a whole number of steps.
    """

    whole_steps, whole_times = "The flow with noise", True

    def __init__(self, flow: NoisyFlow, start: State, grid: Array, observer: Observer) -> None:
        super().__init__(flow, NoisyStep(), start, grid, observer)

    def _observe(self, y: State, node: Any) -> Observation:
        node = cast(NoisyNode, node)
        seen = super()._observe(y, node)
        seen["osc_loss"] += node.rest
        if node.D is not None and node.HD is not None:
            index = torch.as_tensor(list(self.observer.coordinates), dtype=torch.long, device=node.HD.device)
            squares = node.HD.square().mean(dim=1)
            trace, total, some = host(node.D.square().sum() / node.D.shape[1], squares.sum(), squares[index])
            seen["trace"] += float(trace)
            seen["osc_grad_sq"] += float(total)
            if len(index):
                seen["osc_coordinate_grad_sq"] = seen["osc_coordinate_grad_sq"] + some
        for name in _OWN:
            seen[name] = node.k if name == "directions" else getattr(node, name)
        return seen

    def solution(self, status: Status, about: dict[str, Any]) -> Solution:
        """The flow on the grid."""
        found = super().solution(status, about)
        at = np.array([node["t"] for node in self.nodes])
        series = dict(found.series)
        for name in _OWN:
            values = np.array([float(node[name]) for node in self.nodes])
            series[name] = np.interp(found.t, at, values) if len(at) else np.empty(0)
        series["batch_grad_sq"] = series.get("predicted_grad_sq", np.empty(0)) + series["noise"]
        flow = cast(NoisyFlow, self.flow)
        about = {**found.about, "batch_size": flow.batch_size, "batches": flow.sampling.in_words}
        about.pop("unit_steps", None)
        return replace(
            found, series=series, breakpoints=[], notes=[*found.notes, *self._told(found.t, series)], about=about
        )

    def _told(self, t: Array, series: dict[str, Array]) -> list[str]:
        """Notes on the block, and on times when the flow should not be trusted."""
        if not len(self.nodes):
            return []
        flow = cast(NoisyFlow, self.flow)
        k, cut = series["directions"], flow.cut(self.y.t)
        low = np.nanmin(series["lowest"]) if np.isfinite(series["lowest"]).any() else np.nan
        short = k.max() >= flow.sampling.max_directions and low > cut
        told = (
            f"noisy flow: a covariance is followed in {int(k.min())} to {int(k.max())} directions, those with an "
            f"effective eigenvalue above {cut:.3g}, which relax within {flow.sampling.window:g} steps"
        )
        if short:
            told += f", as far as max_directions={flow.sampling.max_directions} allows: down to {low:.3g}"
        if flow.sampling.pairs == "all":
            rest = '. pairs="all" leaves out what oscillates outside them'
        else:
            paths = "one path" if flow.sampling.pairs == 1 else f"{flow.sampling.pairs} paths"
            rest = f". What oscillates outside them is shown by {paths} of the optimizer"
        share = np.nanmax(series["outside"]) if np.isfinite(series["outside"]).any() else np.nan
        notes = [told + rest + (f"; up to {share:.0%} of the noise of a step is there." if share > 0.005 else ".")]
        radius = series["radius"]
        if np.isfinite(radius).any() and np.nanmax(radius) > 1:
            notes.append(
                f"noisy flow: at t = {t[np.nanargmax(radius)]:g} the spectral radius of the map of X was "
                f"{np.nanmax(radius):.3g}. Above 1 the oscillation grows until the sharpness gives way, and runs may "
                "have bursts."
            )
        if float(np.nanmax(series["taylor"], initial=0.0)) > 0.3:
            notes.append(
                "noisy flow: the next Taylor term of the averaged loss came to "
                f"{np.nanmax(series['taylor']):.0%} of the one that is kept; the flow is less exact there."
            )
        return notes
