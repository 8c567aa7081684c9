"""The house as it was planned: who imports whom, what is packaged, and that every door has a name on it."""

import ast
import dataclasses
import graphlib
import importlib
import importlib.util
import inspect
import os
import re
import tomllib
from pathlib import Path

import pytest

import dvi

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("methods", "problems", "solvers")
FOLDERS = ("dvi", *FLOORS)
LINKS = [ROOT / "dvi" / floor for floor in FLOORS]
FILES = [
    path
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not any(path.is_relative_to(link) for link in LINKS)
]
ROOMS = sorted({path.parent.relative_to(ROOT).as_posix() for path in FILES} - set(FOLDERS))


def dotted(folder):
    """The name under which a folder is imported."""
    return ".".join(folder.split("/") if folder.split("/")[0] == "dvi" else ("dvi", *folder.split("/")))


PACKAGES = [dotted(folder) for folder in (*FOLDERS, *ROOMS)]


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
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(FOLDERS)
    assert {"dvi/cli", "dvi/plotting", "dvi/symbolic"} <= set(ROOMS)


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
    wrong.write_text("def f():\n    from dvi.methods import GradientDescent\n    import dvi.compiler.calculus as c\n")
    assert {"dvi.methods", "dvi.methods.GradientDescent", "dvi.compiler.calculus"} <= set(imported(wrong))


#: Which rooms a room may import from, beside its own floor's top level and the floors below.
ABOVE = {
    "methods/preconditioners": [],
    "methods/optimizers": ["methods/preconditioners"],
    "methods/interop": ["methods/preconditioners", "methods/optimizers"],
    "problems/derivatives": [],
    "problems/distributed": [],
    "problems/modules": ["problems/derivatives", "problems/distributed"],
    "problems/exact": ["problems/derivatives"],
    "problems/networks": [],
    "problems/catalogue": ["problems/derivatives", "problems/networks", "problems/modules"],
    "solvers/ccp": [],
    "solvers/eigen": [],
    "solvers/macro": ["solvers/ccp", "solvers/eigen"],
    "solvers/reference": ["solvers/ccp", "solvers/eigen"],
    "solvers/second_order": ["solvers/ccp", "solvers/eigen", "solvers/macro"],
    "dvi/interop": [],
    "dvi/compiler": ["dvi/interop"],
    "dvi/noise": ["dvi/compiler", "dvi/interop"],
    "dvi/stationarity": ["dvi/compiler", "dvi/interop"],
    "dvi/symbolic": ["dvi/compiler", "dvi/interop"],
    "dvi/results": [],
    "dvi/reports": ["dvi/results"],
    "dvi/storage": ["dvi/results"],
    "dvi/plotting": ["dvi/results", "dvi/storage"],
    "dvi/runs": ["dvi/interop", "dvi/compiler", "dvi/noise", "dvi/stationarity", "dvi/results", "dvi/storage"],
    "dvi/sweeps": ["dvi/results", "dvi/storage"],
    "dvi/paper": ["dvi/results", "dvi/storage", "dvi/plotting", "dvi/sweeps"],
    "dvi/cli": [
        *("dvi/compiler", "dvi/noise", "dvi/stationarity", "dvi/results", "dvi/storage", "dvi/plotting", "dvi/runs"),
        *("dvi/sweeps", "dvi/paper"),
    ],
}
#: The one door upwards: a result draws, saves and reports itself when it is asked to.
DOORS = {("dvi/results", "dvi/plotting"), ("dvi/results", "dvi/storage"), ("dvi/results", "dvi/reports")}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts if parts[0] == "dvi" else ("dvi", *parts))


MODULES = {module_name(path): path for path in FILES}


def room_of(module):
    return MODULES[module].parent.relative_to(ROOT).as_posix()


def imports_of_ours(path):
    """The modules of this project that a file imports; of ``from package import name``, the module if it is one."""
    return {module for module in imported(path) if module in MODULES}


@pytest.mark.parametrize("path", [path for path in FILES if path.name != "__init__.py"], ids=name)
def test_rooms_import_from_rooms_above_only(path):
    room = path.parent.relative_to(ROOT).as_posix()
    if room not in ABOVE:
        return
    floor = room.split("/")[0]
    for module in imports_of_ours(path):
        other = room_of(module)
        own = other in (room, floor)
        below = floor == "dvi" and other.split("/")[0] in FLOORS
        assert own or below or other in ABOVE[room] or (room, other) in DOORS, f"{name(path)} imports {module}"


def test_every_room_has_its_place():
    assert set(ROOMS) == set(ABOVE)


def graph(doors=False):
    """Who imports whom, packages left out: a package imports what it offers, and files import from files."""
    files = {module: path for module, path in MODULES.items() if path.name != "__init__.py"}
    return {
        module: {
            other
            for other in imports_of_ours(path)
            if other in files and (doors or (room_of(module), room_of(other)) not in DOORS)
        }
        for module, path in files.items()
    }


def test_no_file_imports_itself_by_a_detour():
    """Also not under TYPE_CHECKING; and the door is a cycle, so that this test can fail."""
    assert list(graphlib.TopologicalSorter(graph()).static_order())
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(graph(doors=True)).prepare()


@pytest.mark.parametrize("folder", [*FOLDERS, *ROOMS])
def test_a_folder_can_be_taken_in_at_a_glance(folder):
    assert len([path for path in FILES if path.parent == ROOT / folder]) <= 17


def test_the_package_list_is_the_folders():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = [path.parent.relative_to(ROOT).parts for path in FILES if path.name == "__init__.py"]
    found = {".".join(parts if parts[0] == "dvi" else ("dvi", *parts)) for parts in folders}
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


#: Rooms that offer names of their own; what the others hold is imported from their files.
PUBLIC = ["dvi", "dvi.methods", "dvi.problems", "dvi.solvers", "dvi.plotting", "dvi.cli", "dvi.symbolic", "dvi.testing"]


@pytest.mark.parametrize("package", PUBLIC)
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


def test_no_module_is_hidden_by_a_function_of_its_name():
    for package in PACKAGES:
        module = importlib.import_module(package)
        for below in [other for other in MODULES if other.rpartition(".")[0] == package]:
            found = getattr(module, below.rpartition(".")[2], None)
            assert found is None or inspect.ismodule(found), f"{below} is hidden by {found!r}"


def test_the_version_is_one():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert dvi.__version__ == version
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()


PROMISED = """
Problem Method Diagonal Scalar Euler MacroStep RungeKutta TorchDiffEq Solution Status
central_flow stable_flow discrete solve compare derive load methods problems solvers
"""


@pytest.mark.parametrize("symbol", PROMISED.split())
def test_what_the_design_promises_is_exported(symbol):
    assert symbol in dvi.__all__
    assert hasattr(dvi, symbol)


# Names with an underscore that are torch's, or of the figures: the library's own are not for tests.
FOREIGN = {
    "_pytree", "_python_dispatch", "_local_scalar_dense", "_has_same_storage_numel", "_set_pg_timeout",
    "_forward_pre_hooks", "_parameters", "_buffers", "_threshold",
}  # fmt: skip


def private(source):
    """Private names that a test reads, imports or replaces by name, beside those of its own classes."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            names = [] if own else [node.attr]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value.rsplit(".", 1)[-1]]  # of monkeypatch.setattr
        else:
            names = []
        yield from (name for name in names if re.fullmatch(r"_[a-z]\w{2,}(?<!_)", name) and name not in FOREIGN)


def test_tests_speak_of_what_is_public():
    found = {path.name: list(private(path.read_text())) for path in sorted((ROOT / "tests").glob("*.py"))}
    assert {name: names for name, names in found.items() if names and name != "test_layout.py"} == {}
    for source in ("problem._parts", "from dvi.compiler.flows import _tell", 'patch.setattr("dvi.runs.a._b_c", 1)'):
        assert list(private(source))  # it can fail
