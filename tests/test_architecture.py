"""The rules of CONTRIBUTING: who imports whom, and what the files that load from the Hub may do."""

from __future__ import annotations

import ast
import re
import sys
from importlib.metadata import requires

import pytest
import transformers
from helpers import ROOT
from transformers.dynamic_module_utils import get_imports, get_relative_imports

from configuration_aliblip import CUSTOM_PIPELINES

HUB_FILES = sorted(path.name for path in ROOT.glob("*_aliblip.py"))
HUB = {name.removesuffix(".py") for name in HUB_FILES}

# The one list of the rooms, from the lowest to the highest. A file imports from its own room and from those below it;
# files directly in aliblip/ are commands, and like the scripts they may import from every room.
ROOMS = ("hub", "runtime", "data", "retrieval", "models", "training", "commands")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in (*ROOT.glob("*.py"), *(ROOT / "aliblip").rglob("*.py"))
}


IMPORTS = (ast.Import, ast.ImportFrom)


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    return names


def room(module: str) -> str:
    if module in HUB:
        return "hub"
    parts = module.split(".")
    return parts[1] if parts[0] == "aliblip" and len(parts) > 2 else "commands"


def own(module: str) -> set[str]:
    """The modules of ours that a module imports, `from aliblip.room import module` included."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = (node.module or "").lstrip(".")
            found |= {origin, *(f"{origin}.{alias.name}" for alias in node.names)}
    return found & set(MODULES)


def test_every_module_stands_in_a_room():
    assert {room(module) for module in MODULES} == set(ROOMS)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_downwards(module):
    height = ROOMS.index(room(module))
    assert not [other for other in own(module) if ROOMS.index(room(other)) > height]
    if height < ROOMS.index("commands"):
        return
    others = {other for other in own(module) if room(other) == "commands"}
    assert not others, "what two commands need belongs into a room"


def test_no_imports_go_in_circles():
    # Under TYPE_CHECKING the configuration names the pipeline, so that it is saved along: that one never runs.
    waiting = {module: own(module) - {module} for module in MODULES}
    waiting["configuration_aliblip"] -= {"pipeline_aliblip"}
    while free := {module for module, needed in waiting.items() if not needed}:
        waiting = {module: needed - free for module, needed in waiting.items() if module not in free}
    assert not waiting


def relative_imports(tree: ast.AST) -> list[ast.ImportFrom]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]


def guarded(tree: ast.Module) -> list[ast.ImportFrom]:
    """The relative imports that are safe in the Hub's cache and in a checkout: those of the one guard (`try` them,
    raise if in a package, else import the same names absolutely), and those under TYPE_CHECKING, which never run."""
    safe = []
    for node in tree.body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            safe += relative_imports(node)
        elif isinstance(node, ast.Try) and relative_imports(node):
            (handler,) = node.handlers
            assert ast.unparse(handler.type) == "ImportError"
            assert ast.unparse(handler.body[0]) == "if __package__:\n    raise"
            absolute = [ast.unparse(statement) for statement in handler.body[1:]]
            assert absolute == [ast.unparse(statement).replace("from .", "from ") for statement in node.body]
            safe += node.body
    return safe


@pytest.mark.parametrize("name", HUB_FILES)
def test_hub_files_import_siblings_in_the_guard_only(name):
    tree = ast.parse((ROOT / name).read_text())
    relative = relative_imports(tree)
    # Never `from . import x` (the loader does not copy x), never a package in a package.
    assert all(node.level == 1 and node.module in HUB for node in relative), "siblings by `from .x import y` only"
    assert {id(node) for node in relative} == {id(node) for node in guarded(tree)}
    absolute = {found for node in tree.body if not isinstance(node, ast.Try) for found in imported(node)}
    assert not absolute & (HUB | {"aliblip"}), "outside the guard"
    # As the loader reads it: by a pattern, also in docstrings.
    assert sorted(get_relative_imports(ROOT / name)) == sorted({node.module for node in relative})


@pytest.mark.parametrize("name", HUB_FILES)
def test_hub_files_need_nothing_but_torch_and_transformers(name):
    required = {re.match(r"[\w-]+", line)[0] for line in requires("transformers") if "extra ==" not in line}
    available = {"torch", "transformers", *(package.replace("-", "_") for package in required)}
    # As the loader reads it: imports in functions and under TYPE_CHECKING count, those in `try` do not.
    assert set(get_imports(ROOT / name)) - sys.stdlib_module_names <= available


@pytest.mark.parametrize("name", HUB_FILES)
def test_hub_files_take_public_names_of_transformers(name):
    tree = ast.parse((ROOT / name).read_text())
    public = {"utils", "activations", "modeling_outputs", "modeling_layers", "processing_utils"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("transformers.") for alias in node.names), ast.unparse(node)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transformers":
            names = [alias.name for alias in node.names]
            assert not any(found.startswith("_") for found in names), ast.unparse(node)
            if node.module != "transformers":
                assert node.module.split(".")[1] in public, ast.unparse(node)
                assert not [found for found in names if hasattr(transformers, found)], "these are at the top level"


@pytest.mark.parametrize("name", HUB_FILES)
def test_hub_files_ask_no_isinstance_of_each_other(name):
    trees = {other: ast.parse((ROOT / other).read_text()) for other in HUB_FILES}
    foreign = {
        node.name
        for other in set(HUB_FILES) - {name}
        for node in ast.walk(trees[other])
        if isinstance(node, ast.ClassDef)
    }
    assert "AliBlipConfig" in foreign or name == "configuration_aliblip.py"
    for node in ast.walk(trees[name]):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
            asked = {leaf.id for leaf in ast.walk(node.args[1]) if isinstance(leaf, ast.Name)}
            assert not asked & foreign, ast.unparse(node)


def test_hub_classes_are_registered():
    calls = {
        "configuration_aliblip.py": "AliBlipConfig.register_for_auto_class()",
        "modeling_aliblip.py": "AliBlipForImageTextRetrieval.register_for_auto_class('AutoModel')",
        "processing_aliblip.py": "AliBlipProcessor.register_for_auto_class()",
    }
    for name in HUB_FILES:
        tree = ast.parse((ROOT / name).read_text())
        if name in calls:
            # The last statement but `__all__`.
            assert ast.unparse(tree.body[-2]) == calls[name]
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = ast.unparse(node.func.value)
                assert not (node.func.attr == "register" and owner.startswith("Auto")), "in aliblip/__init__.py"
    registered = [line for line in (ROOT / "aliblip/__init__.py").read_text().splitlines() if ".register(" in line]
    tasks = ["AutoConfig", "AutoModel", "AutoModelForZeroShotImageClassification", "AutoProcessor"]
    assert [line.split(".")[0] for line in registered] == tasks


def test_the_pipeline_of_the_configuration_exists():
    (entry,) = CUSTOM_PIPELINES.values()
    module, name = entry["impl"].split(".")
    classes = [node for node in ast.parse(MODULES[module].read_text()).body if isinstance(node, ast.ClassDef)]
    assert name in [node.name for node in classes]
    assert all(hasattr(transformers, auto) for auto in entry["pt"])


def test_no_module_hides_a_library():
    assert not {"datasets", "evaluate", "types", "logging"} & {path.stem for path in ROOT.glob("*.py")}


def test_what_ships_with_a_model_stays_small():
    assert sum(len((ROOT / name).read_text().splitlines()) for name in HUB_FILES) < 3000
