"""The house as it was planned: who imports whom, what is packaged, and that every door has a name on it."""

import ast
import dataclasses
import graphlib
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
ROOMS = ("dvi/symbolic",)
FILES = [path for folder in (*FOLDERS, *ROOMS) for path in sorted((ROOT / folder).glob("*.py"))]
PACKAGES = ("dvi", *(f"dvi.{floor}" for floor in FLOORS), *(room.replace("/", ".") for room in ROOMS))


def name(path):
    return str(path.relative_to(ROOT))


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
    assert {path.parent for path in FILES} == {ROOT / folder for folder in (*FOLDERS, *ROOMS)}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_run_one_way(path):
    floor = path.relative_to(ROOT).parts[0]
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


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_has_no_import_cycle(room):
    """Its files can be put in an order in which each imports earlier ones only, also for type checkers."""
    package = room.replace("/", ".")
    graph = {
        f"{package}.{path.stem}": {module for module in imported(path) if module.startswith(f"{package}.")}
        for path in (ROOT / room).glob("*.py")
        if path.stem != "__init__"
    }
    within = {module: {other for other in graph if other in imports} for module, imports in graph.items()}
    assert list(graphlib.TopologicalSorter(within).static_order())
    # what is imported from the room itself goes through its __init__, which imports everything
    assert not [path for path in (ROOT / room).glob("*.py") if package in imported(path) and path.stem != "__init__"]


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
    paths = [package.replace(".", "/") for package in found]
    beside = {f"dvi/{floor}" for floor in FLOORS}
    folders = [p.removeprefix("dvi/") if any(p == b or p.startswith(f"{b}/") for b in beside) else p for p in paths]
    assert setuptools["package-dir"] == dict(zip(found, folders, strict=True))
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
