"""The rules of CONTRIBUTING: who imports whom, and what the files that load from the Hub may do."""

from __future__ import annotations

import ast
import re

import pytest
from helpers import ROOT

HUB_FILES = sorted(path.name for path in ROOT.glob("*_aliblip.py"))
HUB = {name.removesuffix(".py") for name in HUB_FILES}

# As in CONTRIBUTING, "Who imports whom".
ALLOWED = {
    "train": {
        *(
            "accelerator",
            "arguments",
            "backbones",
            "checkpoint",
            "convert",
            "evaluation",
            "momentum",
            "objective",
            "optim",
            "distributed",
            "files",
            "interrupts",
            "progress",
        ),
        *("data.augment", "data.collate", "data.loader", "data.manifest", "data.sources"),
        *("modeling_aliblip", "configuration_aliblip", "processing_aliblip"),
    },
    "evaluate_retrieval": {
        *("accelerator", "arguments", "evaluation", "report", "data.collate", "data.loader", "data.sources"),
        *("modeling_aliblip", "processing_aliblip"),
    },
    "aliblip.__init__": {"configuration_aliblip", "modeling_aliblip", "processing_aliblip"},
    "aliblip.accelerator": set(),
    "aliblip.arguments": set(),
    "aliblip.checkpoint": {"accelerator", "arguments", "distributed", "files"},
    "aliblip.backbones": {
        *("arguments", "convert", "configuration_aliblip", "modeling_aliblip", "processing_aliblip"),
    },
    "aliblip.convert": {
        *("arguments", "checkpoint", "files", "momentum"),
        *("configuration_aliblip", "modeling_aliblip", "processing_aliblip"),
    },
    "aliblip.distributed": set(),
    "aliblip.evaluation": {"distributed", "files", "metrics", "retrieval_aliblip"},
    "aliblip.files": set(),
    "aliblip.interrupts": {"distributed"},
    "aliblip.metrics": set(),
    "aliblip.momentum": {"distributed"},
    "aliblip.objective": {"distributed", "losses_aliblip"},
    "aliblip.optim": set(),
    "aliblip.progress": {"arguments", "distributed", "evaluation", "files"},
    "aliblip.report": set(),
    "aliblip.data.__init__": set(),
    "aliblip.data.augment": set(),
    "aliblip.data.collate": {"data.sources"},
    "aliblip.data.loader": {"data.collate", "data.sources", "interrupts"},
    "aliblip.data.manifest": {"data.remote"},
    "aliblip.data.remote": set(),
    "aliblip.data.sources": {"data.manifest", "data.remote", "data.tar_index"},
    "aliblip.data.tar_index": {"data.remote", "files"},
    "configuration_aliblip": set(),
    "losses_aliblip": set(),
    "modeling_aliblip": {"configuration_aliblip", "losses_aliblip"},
    "processing_aliblip": set(),
    "retrieval_aliblip": set(),
}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in (*ROOT.glob("*.py"), *(ROOT / "aliblip").rglob("*.py"))
}


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    return names


def own(names: set[str]) -> set[str]:
    found = {name.lstrip(".").removeprefix("aliblip.") for name in names if name.lstrip(".").startswith("aliblip.")}
    return found | {name.lstrip(".") for name in names if name.lstrip(".") in HUB}


def test_the_table_names_every_module():
    assert set(MODULES) == set(ALLOWED)


@pytest.mark.parametrize("module", sorted(ALLOWED))
def test_imports_go_downwards(module):
    assert own(imported(ast.parse(MODULES[module].read_text()))) <= ALLOWED[module]


@pytest.mark.parametrize("name", HUB_FILES)
def test_hub_files_keep_the_rules_of_the_loader(name):
    source = (ROOT / name).read_text()
    tree = ast.parse(source)
    relative = {found for found in imported(tree) if found.startswith(".")}
    assert all(re.fullmatch(r"\.\w+_aliblip", found) for found in relative), "siblings by `from .x import y` only"
    third_party = {found.split(".")[0] for found in imported(tree) if not found.startswith(".")} - HUB
    standard = {"collections", "contextlib", "copy", "dataclasses", "functools", "math", "typing", "__future__"}
    assert third_party <= standard | {"torch", "transformers"}
    for found in imported(tree):
        if found.startswith("transformers."):
            public = ("utils", "activations", "modeling_outputs", "modeling_layers", "processing_utils")
            assert found.split(".")[1] in public, found
    # The loader's own pattern: a line of a docstring that looks like a relative import counts as one.
    lines = [line for line in re.findall(r"^\s*from\s+\.\S+\s+import", source, flags=re.MULTILINE)]
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    assert len(lines) == len(statements)
    assert re.search(r"except ImportError:\n    if __package__:.*\n        raise\n", source) or not relative, (
        "the guard"
    )
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
            classes = {leaf.id for leaf in ast.walk(node.args[1]) if isinstance(leaf, ast.Name)}
            assert not classes & {"AliBlipConfig", "AliBlipProcessor"}, "no isinstance on a class of another Hub file"


def test_hub_classes_are_registered():
    for name, call in (
        ("configuration_aliblip.py", "AliBlipConfig.register_for_auto_class()"),
        ("modeling_aliblip.py", 'AliBlipForImageTextRetrieval.register_for_auto_class("AutoModel")'),
        ("processing_aliblip.py", "AliBlipProcessor.register_for_auto_class()"),
    ):
        assert call in (ROOT / name).read_text()


def test_no_module_hides_a_library():
    assert not {"datasets", "evaluate", "types", "logging"} & {path.stem for path in ROOT.glob("*.py")}
