"""The house as it was planned: who imports whom, what is packaged, and that every door has a name on it."""

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import os
import tomllib
from pathlib import Path

import pytest

import dvi

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("methods", "problems", "solvers")
FOLDERS = ("dvi", *FLOORS)
FILES = [
    path
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
    if folder != "dvi" or path.relative_to(ROOT / "dvi").parts[0] not in FLOORS  # a link to a floor
]
PACKAGES = ("dvi", *(f"dvi.{floor}" for floor in FLOORS))


def name(path):
    return str(path.relative_to(ROOT))


def floor_of(path):
    return path.relative_to(ROOT).parts[0]


def imported(path):
    """The dotted names that a file imports, wherever in it; ``from a import b`` counts as a.b, too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_there_are_files():
    assert len(FILES) > 30
    assert {floor_of(path) for path in FILES} == set(FOLDERS)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_run_one_way(path):
    floor = floor_of(path)
    ours = [module for module in imported(path) if module.split(".")[0] == "dvi"]
    assert not [module for module in imported(path) if module.split(".")[0] in FLOORS], (
        "import dvi.methods, not methods"
    )
    if floor in FLOORS:
        foreign = [module for module in ours if module != f"dvi.{floor}" and not module.startswith(f"dvi.{floor}.")]
        assert not foreign, f"{name(path)} knows of {foreign}"


def test_the_check_of_imports_can_fail(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text("def f():\n    from dvi.methods import GradientDescent\n    import dvi.compile as c\n")
    assert {"dvi.methods", "dvi.methods.GradientDescent", "dvi.compile"} <= set(imported(wrong))


def test_the_package_list_is_the_folders():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {"dvi"}
    for folder in FOLDERS:
        prefix = "dvi" if folder == "dvi" else f"dvi.{folder}"
        for init in (ROOT / folder).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT / folder).parts
            if not (folder == "dvi" and parts and parts[0] in FLOORS):  # a link to a floor
                found.add(".".join([prefix, *parts]))
    assert set(setuptools["packages"]) == found
    assert len(setuptools["packages"]) == len(found)
    expected = {package: package.replace("dvi.", "", 1).replace(".", "/") for package in found}
    assert setuptools["package-dir"] == expected
    assert (ROOT / "dvi" / "py.typed").exists()


@pytest.mark.parametrize("floor", FLOORS)
def test_links_lead_to_the_floors(floor):
    link = ROOT / "dvi" / floor
    assert link.is_symlink()
    assert os.readlink(link) == f"../{floor}"  # relative, so that a checkout may lie anywhere
    assert link.resolve() == ROOT / floor


@pytest.mark.parametrize("floor", FLOORS)
def test_a_floor_under_another_name_is_refused(floor):
    spec = importlib.util.spec_from_file_location(floor, ROOT / floor / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.raises(ImportError, match=f"import dvi.{floor}, not {floor}"):
        spec.loader.exec_module(module)
    assert importlib.import_module(f"dvi.{floor}").__name__ == f"dvi.{floor}"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_files_are_short(path):
    lines = len(path.read_text().splitlines())
    assert lines < 400


@pytest.mark.parametrize("path", FILES, ids=name)
def test_files_say_what_they_hold(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("package", PACKAGES)
def test_everything_public_is_there_and_documented(package):
    module = importlib.import_module(package)
    assert sorted(module.__all__) == sorted(set(module.__all__))
    for symbol in module.__all__:
        thing = getattr(module, symbol)
        if not (inspect.isclass(thing) or inspect.isroutine(thing) or inspect.ismodule(thing)):
            continue  # a constant or a type alias has no docstring of its own
        text = inspect.getdoc(thing)
        assert text, f"{package}.{symbol}"
        # a dataclass without a docstring is given its signature for one
        generated = dataclasses.is_dataclass(thing) and text.startswith(f"{symbol}(") and "\n" not in text
        assert not generated, f"{package}.{symbol}"
        if inspect.isclass(thing) and thing.__module__.startswith("dvi"):
            for member, value in vars(thing).items():
                if not member.startswith("_") and inspect.isfunction(value):
                    assert inspect.getdoc(getattr(thing, member)), f"{package}.{symbol}.{member}"


PROMISED = """
Problem Method Diagonal Scalar Euler MacroStep RungeKutta TorchDiffEq Solution Status
central_flow stable_flow discrete solve compare derive load methods problems solvers
"""


@pytest.mark.parametrize("symbol", PROMISED.split())
def test_what_the_design_promises_is_exported(symbol):
    assert symbol in dvi.__all__
    assert hasattr(dvi, symbol)
