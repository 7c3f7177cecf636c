"""What a folder from somewhere else may do: give numbers. No code of it runs, and nobody is asked whether it may."""

from __future__ import annotations

import ast
import json
import os
import pty
import shutil
import sys
from pathlib import Path

import pytest
import tiny
from helpers import ROOT, environment

from aliblip.models.backbones import read_text_backbone, read_vision_backbone
from aliblip.models.loading import build_processor, load_pretrained
from aliblip.runtime.mistakes import UsageError
from aliblip.training.tokenizer import load_trained_tokenizer

COMMANDS = [*(ROOT / "aliblip").rglob("*.py"), ROOT / "train.py", ROOT / "evaluate_retrieval.py"]
CODE = """
open({mark!r}, "w").close()
from transformers import BertTokenizer, BlipImageProcessor, PreTrainedConfig, PreTrainedModel
class Tokens(BertTokenizer): pass
class Pixels(BlipImageProcessor): pass
class Settings(PreTrainedConfig): model_type = "stranger"
class Model(PreTrainedModel): config_class = Settings
"""
# Settings of a folder that make transformers run its code, in a command that would let it; what is told instead.
OWN_CODE = {
    "tokenizer": ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "code.Tokens"]}}),
    "tokenizer, as older files have it": ("tokenizer_config.json", {"auto_map": ["code.Tokens", "code.Tokens"]}),
    "tokenizer, in the model's file": ("config.json", {"auto_map": {"AutoTokenizer": ["code.Tokens", None]}}),
    "image processor": ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "code.Pixels"}}),
    "image processor of the processor": (
        "processor_config.json",
        {"image_processor": {"auto_map": {"AutoImageProcessor": "code.Pixels"}, "image_processor_type": "Pixels"}},
    ),
    "audio tokenizer": (
        "processor_config.json",
        {"audio_tokenizer": {"audio_tokenizer_class": "AutoModel", "audio_tokenizer_name_or_path": "."}},
    ),
    "kernel": ("config.json", {"attn_implementation": "stranger/kernel"}),
    "kernel of a tower": ("config.json", {"vision_config": {"attn_implementation": "stranger/kernel"}}),
}


@pytest.fixture(scope="module")
def trusted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("strangers") / "trusted"
    processor = tiny.processor()
    tiny.model(vocab_size=len(processor.tokenizer)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def changed(folder: Path, file: str, settings: dict) -> None:
    before = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps(before | settings))


def stranger(trusted: Path, folder: Path, file: str, settings: dict) -> tuple[Path, Path]:
    """A folder with code, and the file that would tell that the code ran."""
    mark = folder.parent / "ran"
    shutil.copytree(trusted, folder)
    (folder / "code.py").write_text(CODE.format(mark=str(mark)))
    changed(folder, "tokenizer_config.json", {"tokenizer_class": "Unknown"})
    changed(folder, file, settings)
    return folder, mark


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    return [
        (node.func.attr, node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    ]


def trusts_nobody(call: ast.Call) -> bool:
    return any(
        word.arg == "trust_remote_code" and isinstance(word.value, ast.Constant) and word.value.value is False
        for word in call.keywords
    )


def test_every_call_that_loads_something_by_name_trusts_nobody():
    found = [
        (path.relative_to(ROOT), call)
        for path in COMMANDS
        for name, call in calls(ast.parse(path.read_text()))
        if name == "from_pretrained"
    ]
    assert len(found) >= 5  # the walk sees them
    assert not [f"{path}:{call.lineno}" for path, call in found if not trusts_nobody(call)]
    assert not trusts_nobody(calls(ast.parse("Auto.from_pretrained(name)"))[0][1])


@pytest.mark.parametrize("case", OWN_CODE)
def test_a_folder_with_code_of_its_own_is_refused_in_one_line_wherever_it_is_named(
    trusted, tmp_path, monkeypatch, case
):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers asks, and runs the code then
    folder, mark = stranger(trusted, tmp_path / "stranger", *OWN_CODE[case])
    for load in (load_pretrained, build_processor, load_trained_tokenizer, read_text_backbone, read_vision_backbone):
        with pytest.raises(UsageError, match="asks for code that does not belong to AliBLIP") as told:
            load(folder if load is load_trained_tokenizer else str(folder))
        assert "\n" not in str(told.value) and OWN_CODE[case][0] in str(told.value)
    assert not mark.exists()


def test_a_model_of_another_kind_is_refused_without_its_code(trusted, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    settings = {"model_type": "stranger", "auto_map": {"AutoConfig": "code.Settings", "AutoModel": "code.Model"}}
    folder, mark = stranger(trusted, tmp_path / "stranger", "config.json", settings)
    for load in (load_pretrained, read_text_backbone, read_vision_backbone):
        with pytest.raises(UsageError) as told:
            load(str(folder))
        assert "\n" not in str(told.value)
    assert not mark.exists()


def test_the_code_that_lies_beside_a_model_of_ours_is_not_run(trusted, tmp_path):
    # Every saved folder brings a copy; one that was tampered with is just as little looked at.
    folder, mark = stranger(
        trusted, tmp_path / "stranger", "tokenizer_config.json", {"tokenizer_class": "BertTokenizer"}
    )
    (folder / "modeling_aliblip.py").write_text(CODE.format(mark=str(mark)))
    assert load_pretrained(str(folder))[0].num_parameters() and not mark.exists()


def test_a_command_asks_nothing_even_where_somebody_would_answer(monkeypatch):
    """Whatever library asks, standard input is at its end for it."""
    child, terminal = pty.fork()
    if child == 0:
        os.execve(sys.executable, [sys.executable, "-c", ASKS], environment(PYTHONPATH=str(ROOT)))
    try:
        os.write(terminal, b"y\n")
        told = b""
        while b"answer" not in told:
            told += os.read(terminal, 4096)
        assert b"answer: none" in told, told
    finally:
        os.close(terminal)
        os.waitpid(child, 0)


ASKS = """
from aliblip.runtime.mistakes import main_with_usage_errors

def main():
    try:
        print("answer:", input("shall it run? "))
    except EOFError:
        print("answer: none")

main_with_usage_errors("test", main)
"""
