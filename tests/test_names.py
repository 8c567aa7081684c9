"""Every dotted name and every file that a page or a docstring mentions is there."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
LINKS = [ROOT / "dvi" / floor for floor in ("methods", "problems", "solvers")]
SOURCES = [
    path
    for folder in ("dvi", "methods", "problems", "solvers")
    for path in (ROOT / folder).rglob("*.py")
    if not any(path.is_relative_to(link) for link in LINKS)
]
DOTTED = re.compile(r"\bdvi(?:\.[A-Za-z_]\w*)+")
FILE = re.compile(r"\b(?:dvi|methods|problems|solvers|tests|benchmarks|docs)/[\w/]+\.(?:py|md|json|png)\b")


def resolves(name):
    """Is this a module, or something in one?"""
    parts = name.split(".")
    for i in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:i]))
        except ImportError:
            continue
        for part in parts[i:]:
            if not hasattr(found, part):
                return part in getattr(found, "__annotations__", {}) and part == parts[-1]
            found = getattr(found, part)
        return True
    return False


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=lambda path: str(path.relative_to(ROOT)))
def test_names_resolve(path):
    text = path.read_text()
    if path.suffix == ".py":  # code is checked by running it; names in words are in docstrings and comments
        text = "\n".join(part for pair in re.findall(r'"""(.*?)"""|#([^\n]*)', text, re.DOTALL) for part in pair)
    names = {name for name in DOTTED.findall(text) if not name.endswith((".md", ".py", ".h5"))}
    assert not [name for name in sorted(names) if not resolves(name)]


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_there(path):
    mentioned = set(FILE.findall(path.read_text()))
    assert not [name for name in sorted(mentioned) if not (ROOT / name).exists()]


def test_the_check_can_fail():
    assert resolves("dvi.compare")
    assert resolves("dvi.problems.Problem.check")
    assert not resolves("dvi.compile.alpha")
    assert not resolves("dvi.Problem.chekc")
