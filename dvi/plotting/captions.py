"""The title of a picture: method and problem in words, and how the run began and ended."""

from __future__ import annotations

import re

from dvi.compare import Comparison
from dvi.plotting.curves import duration
from dvi.status import Status

_LETTERS = {"lr": "η", "momentum": "β", "beta1": "β$_1$", "beta2": "β$_2$", "eps": "ε"}
_SPOKEN = {"bias_correction=True": "bias-corrected", "bias_correction=False": "", "eps=0.0": "", "eps=0": ""}
_SPOKEN |= {"one_sided=True": "one-sided", "one_sided=False": ""}
_UNTOLD = ("shapes", "memory")
_NAMES = {
    "GradientDescent": "Gradient descent",
    "RMSPropNorm": "RMSProp-Norm",
    "AdaGrad": "AdaGrad",
    "AdaGradNorm": "AdaGrad-Norm",
    "CentredRMSProp": "Centred RMSProp",
    "HeavyBall": "Heavy ball",
    "NormalizedGD": "Normalised gradient descent",
    "QuasiHyperbolic": "Quasi-hyperbolic momentum",
}
_BETWEEN = re.compile(r", (?=[A-Za-z_]\w*=)")  # between settings: a value may have commas of its own


def caption(race: Comparison) -> str:
    """Method and problem, the warm start if there was one, and how far the run got unless it reached its end."""
    about = race.about
    method, problem = str(about.get("method", "")), str(about.get("problem", ""))
    lines = [" ".join(filter(None, [method_in_words(method), f"on {problem_in_words(problem)}" if problem else ""]))]
    warm, steps = about.get("warm_start"), about.get("steps")
    if isinstance(warm, (int, float)) and warm > 0:
        lines.append(f"time 0 is after {warm:g} step{'s' if warm != 1 else ''} of warm start")
    if race.status is not Status.SUCCESS:
        of = f" of {steps:g}" if isinstance(steps, (int, float)) else ""
        ending = race.status.name.lower().replace("_", " ")
        lines.append(f"unfinished: step {duration(race.runs):g}{of} ({ending})")
    return "\n".join(filter(None, lines))


def method_in_words(method: str) -> str:
    """``RMSProp(lr=0.002, beta2=0.99, bias_correction=True)`` as RMSProp (η = 0.002, β₂ = 0.99, bias-corrected)."""
    name, _, inside = method.partition("(")
    words = _NAMES.get(name) or re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", " ", name)
    settings = [_setting(setting) for setting in _BETWEEN.split(inside.removesuffix(")"))]
    told = ", ".join(filter(None, settings))
    return f"{words} ({told})" if told else words


def _setting(setting: str) -> str:
    name, _, value = setting.partition("=")
    if name in _UNTOLD:
        return ""
    if value.startswith("<"):  # a function; its address says nothing
        return f"{_LETTERS.get(name, name)} scheduled"
    return _SPOKEN.get(setting, f"{_LETTERS[name]} = {value}" if name in _LETTERS else setting)


def problem_in_words(problem: str) -> str:
    """``ModuleProblem('digits-mlp-mse', dim=3466, …)`` as digits-mlp-mse (3466 weights)."""
    found = re.match(r"\w+\('([^']*)', dim=(\d+)", problem)
    return f"{found[1]} ({found[2]} weights)" if found else problem


__all__ = ["caption", "method_in_words", "problem_in_words"]
