"""docs/data.md: what it shows is what is printed, and the messages and flags that it names are there."""

import dataclasses
import re
from pathlib import Path

import pytest
import tiny
from drawing import draw, lines, open_at

from aliblip.data.arguments import DataArguments
from aliblip.data.prepare_arguments import PrepareArguments
from aliblip.data.products import tell_sources
from aliblip.data.titles import look_at_titles
from aliblip.training.arguments import TrainDataArguments, TrainingArguments

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "data.md").read_text()


def test_what_is_told_at_the_start_is_what_the_page_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("my_catalogue")
    draw(folder / "photos", [f"{i:02d}.png" for i in range(14)])
    titles = [f"{tiny.WORDS[i]} {'red blue ' * 20 if i < 4 else 'cup'}" for i in range(12)]
    rows = [(f"{i:02d}.png", titles[i], ("M-1", "M-2", "M-3", "nan")[i // 3]) for i in range(12)]
    (folder / "products.csv").write_text(lines(rows, ("photo", "title", "sku"), delimiter=";"))
    (folder / "photos" / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    (folder / "photos" / "logo.svg").write_text("<svg/>")
    (folder / "old.zip").write_bytes(b"PK\3\4")
    source = open_at("my_catalogue", product_id_column="sku")
    printed = []
    tell_sources(source, tell=printed.append)
    printed += look_at_titles(source, tiny.tokenizer(), 35).cut_lines()
    shown = re.search(r"```\n(my_catalogue .*?)\n```", PAGE, re.DOTALL)[1]
    assert shown == "\n".join(printed).replace(f"{tmp_path}/", "")


def test_messages_of_the_page_are_messages():
    code = "".join(path.read_text() for path in (ROOT / "aliblip" / "data").glob("*.py"))
    table = PAGE.split("| it says | do |")[1]
    first = "".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))
    named = re.findall(r"`([^`]+)`", first)
    assert len(named) > 14
    for message in named:
        for part in re.split(r"line 7: |\.\.\.|'\w+'|\b\d( fields)?", message):
            assert (part or "").strip() in code, part


def test_flags_of_the_page_are_flags():
    groups = (TrainDataArguments, TrainingArguments, DataArguments, PrepareArguments)
    flags = {field.name for group in groups for field in dataclasses.fields(group)}
    named = set(re.findall(r"--(\w+)", PAGE)) - {"data_files"}
    assert named <= flags and "fetch_photos" in named


@pytest.mark.parametrize("page", ["README.md", "docs/training.md"])
def test_the_page_is_linked(page):
    assert "data.md)" in (ROOT / page).read_text()
