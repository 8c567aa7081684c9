"""The page on the integrator lists the constants as they are, with what each was chosen on."""

import dataclasses
import re
from pathlib import Path

from dvi.solvers.constants import CONSTANTS, Constants

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "integrator.md").read_text()
ROW = re.compile(r"^\| `(\w+)` \| ([^|]+) \| [^|]+ \| ([^|]*) \|$", re.MULTILINE)


def as_listed(page):
    """Names, values and provenances of a page's table."""
    return [
        (name, tuple(float(x) for x in values.split(",")), chosen.strip()) for name, values, chosen in ROW.findall(page)
    ]


def as_they_are():
    """The same of the record: its fields, and what their docstring says."""
    told = {}
    entries = re.findall(
        r"^        ([\w, ]+): (.*?)(?=^        [\w, ]+: |\Z)", Constants.__doc__, re.MULTILINE | re.DOTALL
    )
    for names, text in entries:
        chosen = re.search(r"\(chosen on (.*?)\)", " ".join(text.split()))
        told |= dict.fromkeys(names.split(", "), chosen[1] if chosen else "")
    values = {name: value if isinstance(value, tuple) else (value,) for name, value in vars(CONSTANTS).items()}
    return [(field.name, values[field.name], told[field.name]) for field in dataclasses.fields(Constants)]


def test_the_page_lists_every_constant_as_it_is():
    assert as_listed(PAGE) == as_they_are()
    assert len(as_they_are()) <= 24  # twenty of the macro step, and four of the eigen tracker


def test_the_check_can_fail():
    assert as_listed(PAGE.replace("| `band` | 0.05 |", "| `band` | 0.06 |")) != as_they_are()
    assert as_listed(PAGE.replace("| `window` |", "| `width` |")) != as_they_are()
