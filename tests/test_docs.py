"""The pages say what happens: their code runs, prints what they show, and their links lead somewhere.

A block fenced with ```python is run, in the order of the page, in one namespace, in an empty folder.  A block fenced
with ```text right after it is what it prints: words must agree, numbers to a tenth and up to their sign (eigenvectors
have none).  In a block fenced with ```console, lines that start with ``$ dvi`` are run, too.  ``<!-- check: … -->``
holds an expression that must be true, which readers do not see.
"""

import contextlib
import doctest
import importlib
import io
import pkgutil
import re
import shlex
from pathlib import Path

import pytest

import dvi

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
LINKING = [*PAGES, *(path for name in ("README.md", "CONTRIBUTING.md") if (path := ROOT / name).exists())]

PARTS = re.compile(
    r"^```(?P<kind>python|text|console)\n(?P<body>.*?)^```$|^<!-- check: (?P<check>.*?) -->$", re.MULTILINE | re.DOTALL
)
NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?![\w])")
TOLERANCE = 0.1

page_by_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)


def difference(shown, printed):
    """In which word or number two outputs differ, or None."""
    words = [" ".join(NUMBER.sub("#", text).split()) for text in (shown, printed)]
    if re.sub(r"\s", "", words[0]) != re.sub(r"\s", "", words[1]):
        return f"shown:\n{shown}\nprinted:\n{printed}"
    numbers = [[abs(float(x)) for x in NUMBER.findall(text)] for text in (shown, printed)]
    for a, b in zip(*numbers, strict=True):
        if abs(a - b) > TOLERANCE * max(a, b) and max(a, b) > 1e-12:
            return f"{a} is shown, {b} was printed, in:\n{printed}"
    return None


def gap(text, start, end):
    """Whether nothing but white space stands between two parts of a page."""
    return not text[start:end].strip()


def with_examples():
    """Modules of all floors whose text has examples: they are under ``dvi.``, whatever folder they come from."""
    paths = {"dvi": dvi.__file__}
    for found in pkgutil.walk_packages(dvi.__path__, "dvi."):
        paths[found.name] = found.module_finder.find_spec(found.name).origin
    return [name for name, path in paths.items() if ">>>" in Path(path).read_text()]


@pytest.mark.parametrize("name", with_examples())
def test_examples_in_docstrings(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.slow
@page_by_page
def test_code_runs_and_prints_what_is_shown(page, tmp_path, monkeypatch):
    text = page.read_text()
    parts = list(PARTS.finditer(text))
    if not any(part["kind"] in ("python", "console") for part in parts):
        pytest.skip("no code")
    for extra in ("h5py", "matplotlib", "sklearn", "tyro"):
        pytest.importorskip(extra)
    from dvi.cli import main

    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "page"}
    printed, end = "", -1
    for part in parts:
        line = text.count("\n", 0, part.start()) + 1
        where = f"{page.name}, line {line}"
        if part["kind"] == "python":
            stream = io.StringIO()
            with contextlib.redirect_stdout(stream):
                exec(compile("\n" * line + part["body"], str(page), "exec"), namespace)
            printed, end = stream.getvalue(), part.end()
        elif part["kind"] == "console":
            for command in re.findall(r"^\$ dvi (.*)$", part["body"], re.MULTILINE):
                with contextlib.redirect_stdout(io.StringIO()):
                    assert main(shlex.split(command)) == 0, f"{where}: dvi {command}"
        elif part["kind"] == "text" and end >= 0 and gap(text, end, part.start()):
            found = difference(part["body"], printed)
            assert found is None, f"{where}: {found}"
        elif part["check"]:
            assert eval(part["check"], namespace), f"{where}: {part['check']}"


def test_the_comparison_of_outputs_can_fail():
    assert difference("X 1.00 [2]", "X   1.05\n[-2.0]") is None
    assert difference("X 1.0", "X 1.2") is not None
    assert difference("X 1.0", "Y 1.0") is not None
    assert difference("X 1.0", "X 1.0 2.0") is not None
    assert difference("k2 = 0.5", "k3 = 0.5") is not None  # a name, not a number


def anchors(path):
    """The anchors of a page's headings, as MyST and GitHub make them."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKING, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path) if path else page
        if found.parent.name == "gallery":  # made by the build of the pages
            continue
        assert found.exists(), f"{page.name}: {target}"
        if anchor and found.suffix == ".md":
            assert anchor in anchors(found), f"{page.name}: {target}"


MODULES = {"dvi": dvi, "dvi.methods": dvi.methods, "dvi.problems": dvi.problems, "dvi.solvers": dvi.solvers}


@pytest.mark.parametrize("module", MODULES)
def test_the_reference_lists_everything_public(module):
    """Each public name stands in docs/api.md, under some module."""
    reference = (ROOT / "docs" / "api.md").read_text()
    listed = set()
    for line in reference.splitlines():
        if match := re.match(r"\s*(?:\.\. auto\w+::|:members:) (.+)$", line):
            listed |= {name.strip().split(".")[-1] for name in match[1].split(",")}
    missing = [name for name in MODULES[module].__all__ if name not in listed]
    assert not missing, f"add to docs/api.md: {', '.join(missing)}"
