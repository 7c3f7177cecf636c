"""What README, CONTRIBUTING and docs say exists: files, links, flags and commands; and the README's snippets run."""

from __future__ import annotations

import ast
import dataclasses
import re
import shlex
import shutil
import sys

import datasets
import pytest
import tiny
from helpers import ROOT
from PIL import Image

sys.path.insert(0, str(ROOT / "demo"))

from make_catalogue import make_catalogue  # noqa: E402

import train
from aliblip import doctor
from aliblip.convert import ConvertArguments
from aliblip.data.prepare_arguments import PrepareArguments, PrepareDataArguments
from aliblip.gallery import GalleryArguments, GalleryDataArguments
from aliblip.models.upload import HubArguments
from aliblip.publish import PublishArguments
from aliblip.retrieval.arguments import EvaluationArguments, EvaluationDataArguments
from aliblip.runtime.arguments import parse
from aliblip.serve import ServeArguments

README = (ROOT / "README.md").read_text()
TEXTS = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
CODE = (ROOT / "train.py", ROOT / "evaluate_retrieval.py", *sorted((ROOT / "aliblip").glob("*.py")))
PAGES = {
    **{str(path.relative_to(ROOT)): path.read_text() for path in TEXTS},
    **{str(path.relative_to(ROOT)): ast.get_docstring(ast.parse(path.read_text())) for path in CODE},
}
PROGRAMS = {
    "train.py": train.GROUPS,
    "evaluate_retrieval.py": (EvaluationDataArguments, EvaluationArguments),
    "aliblip.convert": (ConvertArguments,),
    "aliblip.doctor": doctor.GROUPS,
    "aliblip.gallery": (GalleryDataArguments, GalleryArguments),
    "aliblip.prepare": (PrepareDataArguments, PrepareArguments),
    "aliblip.publish": (PublishArguments, HubArguments),
    "aliblip.serve": (ServeArguments,),
}
FLAGS = {field.name for groups in PROGRAMS.values() for group in groups for field in dataclasses.fields(group)} | {
    *("config", "help"),
    *("config_file", "num_processes", "multi_gpu", "no_python"),  # of the launcher
    *("check", "durations"),  # of ruff and pytest
}


def commands(text: str) -> list[list[str]]:
    """The words of each command that starts one of our programs."""
    found = re.findall(r"^ *((?:python|accelerate launch) (?:.*\\\n)*.*)$", text, flags=re.MULTILINE)
    return [shlex.split(command.replace("\\\n", " "), comments=True) for command in found]


COMMANDS = [(page, command) for page, text in PAGES.items() for command in commands(text)]


@pytest.mark.parametrize("page", PAGES)
def test_files_and_flags_that_are_named_exist(page):
    text = PAGES[page]
    for path in re.findall(r"\b(?:recipes|accelerate_configs|demo|docs|aliblip|tests)/[\w/]+\.(?:yaml|py|md)\b", text):
        assert (ROOT / path).is_file(), path
    for flag in re.findall(r"(?<![\w-])--([a-z]\w+)\b(?!-)", text):
        assert flag in FLAGS, flag
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (ROOT / page).parent.joinpath(link).is_file(), link


@pytest.mark.parametrize(
    ("page", "command"), COMMANDS, ids=[f"{page}-{number}" for number, (page, _) in enumerate(COMMANDS)]
)
def test_commands_are_those_that_the_programs_take(page, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    place = next(index for index, word in enumerate(command) if word in PROGRAMS or word.startswith("demo/"))
    program, flags = command[place], [word for word in command[place + 1 :] if word != "..."]
    assert command[0] in ("python", "accelerate"), command
    if program.startswith("demo/"):
        return
    assert (command[place - 1] == "-m") == program.startswith("aliblip."), command
    if "--config" in flags and flags[flags.index("--config") + 1] == "recipe.yaml":  # the reader's own
        del flags[flags.index("--config") : flags.index("--config") + 2]
    parse(PROGRAMS[program], flags)


def test_the_pages_have_commands_for_every_program():
    assert {word for _, command in COMMANDS for word in command} >= set(PROGRAMS)


def test_launcher_files_of_the_table_exist():
    named = re.findall(r"`(\w+\.yaml)`", "".join(PAGES.values()))
    assert {"cpu.yaml", "deepspeed_zero2.yaml"} <= set(named)
    for name in set(named) - {"recipe.yaml"}:
        assert (ROOT / "accelerate_configs" / name).is_file(), name


def test_the_snippets_run(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "outputs" / "mine" / "best"
    tiny.model(vocab_size=len(tiny.processor().tokenizer)).save_pretrained(folder)
    tiny.processor().save_pretrained(folder)
    shutil.copytree(folder, tmp_path / "demo" / "output" / "best")
    make_catalogue(tmp_path / "demo" / "catalogue", 1, 12, 40)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name, colour in (("mug", "red"), ("lamp", "blue")):
        Image.new("RGB", (40, 30), colour).save(tmp_path / f"{name}.jpg")
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(snippets) == 3
    names: dict = {}
    for snippet in snippets:
        exec(snippet, names)
    printed = capsys.readouterr().out
    mugs = names["gallery"].count({"product_type": "mug"})
    assert mugs, "else the filter shows nothing"
    assert printed.count("tensor(") == 2 and printed.count("itm_probability") == 2 + 2 + min(mugs, 3)
    assert len(names["gallery"]) == 40
