"""What README and CONTRIBUTING say exists, and the README's snippets run."""

from __future__ import annotations

import dataclasses
import re
import shutil
import sys

import datasets
import pytest
import tiny
from helpers import ROOT
from PIL import Image

sys.path.insert(0, str(ROOT / "demo"))

from make_catalogue import make_catalogue  # noqa: E402

import evaluate_retrieval  # noqa: F401  (its flags are checked below, so that it has to import)
from aliblip.convert import ConvertArguments
from aliblip.gallery import GalleryArguments, GalleryDataArguments
from aliblip.models.upload import HubArguments
from aliblip.publish import PublishArguments
from aliblip.retrieval.arguments import EvaluationArguments, EvaluationDataArguments
from aliblip.serve import ServeArguments
from aliblip.training.arguments import ModelArguments, TrainDataArguments, TrainingArguments

README = (ROOT / "README.md").read_text()
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "train.py", ROOT / "evaluate_retrieval.py")
}
GROUPS = (
    *(ModelArguments, TrainDataArguments, TrainingArguments),
    *(EvaluationArguments, EvaluationDataArguments, ConvertArguments),
    *(HubArguments, PublishArguments, ServeArguments, GalleryArguments, GalleryDataArguments),
)
FLAGS = {field.name for group in GROUPS for field in dataclasses.fields(group)} | {
    "config",
    "help",
    "config_file",
    "num_processes",  # of the launcher
    "check",  # of ruff
}


@pytest.mark.parametrize("page", PAGES)
def test_files_and_flags_that_are_named_exist(page):
    text = PAGES[page]
    for path in re.findall(r"\b(?:recipes|accelerate_configs|demo|aliblip|tests)/[\w/]+\.(?:yaml|py)\b", text):
        assert (ROOT / path).is_file(), path
    for flag in re.findall(r"(?<![\w-])--([a-z]\w+)\b(?!-)", text):
        assert flag in FLAGS, flag


def test_launcher_files_of_the_table_exist():
    for name in re.findall(r"`(\w+\.yaml)`", README):
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
