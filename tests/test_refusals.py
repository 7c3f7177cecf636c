"""Paths that are no files, or that the system refuses: one line with what to do, and neither a wait nor a traceback."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path

import pytest
from helpers import run_forked

from aliblip import prepare
from aliblip.data import prepare_run
from aliblip.retrieval.setup import _check_place
from aliblip.runtime import owners, refusals
from aliblip.runtime.arguments import parse
from aliblip.runtime.files import new_file, read_bytes, read_json, read_json_lines
from aliblip.runtime.mistakes import UsageError, main_with_usage_errors
from aliblip.runtime.owners import OWNER, Owner
from aliblip.runtime.parts import Parts
from aliblip.training.arguments import ModelArguments
from aliblip.training.progress import RunStatus, _log_entries

# A pipe nobody writes to is waited for by whoever opens it plainly, and /dev/zero has no end.
NO_FILES = {"a pipe": os.mkfifo, "a device": lambda path: os.symlink("/dev/zero", path), "a folder": os.mkdir}


@pytest.fixture(params=NO_FILES)
def no_file(request, tmp_path) -> Path:
    NO_FILES[request.param](tmp_path / "it.json")
    return tmp_path / "it.json"


def test_what_is_no_file_is_not_read(no_file):
    for read in (read_bytes, read_json):
        with pytest.raises((ValueError, IsADirectoryError), match="pipe or a device|directory"):
            read(no_file)
    with pytest.raises(UsageError, match=r"recipe .*it.json"):
        parse([ModelArguments], ["--config", str(no_file)])


def test_what_is_no_file_is_not_replaced_either(no_file):
    """As root, `--report /dev/null` would replace it for everybody."""
    before = os.lstat(no_file)
    with pytest.raises(OSError, match="no file"), new_file(no_file):
        pass
    with pytest.raises(UsageError, match="--report: can't write .*it.json"):
        _check_place("report", str(no_file))
    assert os.lstat(no_file).st_ino == before.st_ino and list(no_file.parent.iterdir()) == [no_file]


def test_a_file_of_any_size_is_read_up_to_its_bound(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert read_bytes(tmp_path / "a", 5) == b"12345"
    with pytest.raises(ValueError, match="it has 5 bytes"):
        read_bytes(tmp_path / "a", 4)
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(2**42)
    with pytest.raises(ValueError, match="it has 4,398,046,511,104 bytes"):
        read_json(tmp_path / "sparse")


# --- recipes ----------------------------------------------------------------------------------------------------------

LAUGHS = "a0: &a0 [1, 1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
MERGED = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 40))
RECIPES = {
    "aliases that explode": (LAUGHS, "stand for more than 10,000 values"),
    "merges that explode": (MERGED, "stand for more than 10,000 values"),
    "an alias of itself": ("a: &a [*a]\n", "stand for more than 10,000 values"),
    "nested without end": ("[" * 50_000, "nested too deeply"),
    "no text": (b"\xff\xfe\xfa", "can't be read"),
    "very large": (b"#" * (2**20 + 1), "it has 1,048,577 bytes"),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_made_up_recipe_is_told_in_one_line(tmp_path, case):
    content, message = RECIPES[case]
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=message) as told:
        parse([ModelArguments], ["--config", str(file)])
    assert "\n" not in str(told.value) and str(file) in str(told.value)


def test_a_recipe_may_have_aliases(tmp_path):
    (tmp_path / "recipe.yaml").write_text("vision_config: &small {hidden_size: 32}\ntext_config: *small\n")
    (args,) = parse([ModelArguments], ["--config", str(tmp_path / "recipe.yaml")])
    assert args.vision_config == args.text_config == '{"hidden_size": 32}'


# --- what the system refuses ------------------------------------------------------------------------------------------


@pytest.fixture
def ended(monkeypatch, capsys):
    def code_and_line(error: Exception, given: str) -> tuple[int, str]:
        monkeypatch.setattr(refusals, "_given", set())
        refusals.remember_given([given])

        def main():
            raise error

        with pytest.raises(SystemExit) as ended:
            main_with_usage_errors("it", main)
        return ended.value.code, capsys.readouterr().err

    return code_and_line


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_one_line_wherever_it_is_met(ended, number):
    code, line = ended(OSError(number, os.strerror(number), "/somewhere/x"), "unrelated")
    assert code == 2 and line.count("\n") == 1
    assert line.startswith(f"it: error: /somewhere/x can't be written ({os.strerror(number)}): make room there")


def test_a_refusal_of_a_path_that_was_named_is_one_line_and_of_another_a_bug(ended, monkeypatch):
    denied = PermissionError(errno.EACCES, "Permission denied", "/named/below/x")
    assert ended(denied, "/named")[1] == (
        "it: error: /named/below/x can't be used (Permission denied): give another path, or see to this one\n"
    )
    too_long = "/named/" + "x" * 5000
    code, line = ended(OSError(errno.ENAMETOOLONG, "File name too long", too_long), too_long)
    assert code == 2 and len(line) < 400
    for given in ("/nam", "/named/below/x/y", ""):
        with pytest.raises(PermissionError):
            ended(denied, given)
    with pytest.raises(FileNotFoundError):  # which a bug of ours raises too
        ended(FileNotFoundError(errno.ENOENT, "No such file", "/named/x"), "/named")
    with pytest.raises(RuntimeError, match="a bug"):
        ended(RuntimeError("a bug"), "/named")


def test_a_link_to_itself_is_one_line(tmp_path):
    os.symlink("loop", tmp_path / "loop")
    told = run_forked([sys.executable, "-m", "aliblip.publish", "--model_name_or_path", tmp_path / "loop" / "x"])
    assert told.returncode == 2 and told.stderr.count("\n") == 1, told.stderr


# --- our own small files, cut off or made up --------------------------------------------------------------------------

CUT = b'{"a": 1, "b": "'
DEEP = b"[" * 100_000


@pytest.mark.parametrize("content", [CUT, DEEP, b"", b"\xff"])
def test_a_choice_of_an_earlier_start_that_is_cut_off_is_told(tmp_path, caplog, content):
    (tmp_path / "unit.json").write_bytes(content)
    assert Parts(tmp_path, {}).settle("unit", 7) == 7
    assert "unit.json can't be read" in caplog.text and "is chosen anew" in caplog.text
    caplog.clear()
    assert Parts(tmp_path, {}).settle("unit", 8) == 7 and not caplog.text


@pytest.mark.parametrize("content", [CUT, DEEP, b"[1]"])
def test_the_reason_of_a_failure_is_written_over_a_damaged_status(tmp_path, content):
    (tmp_path / "status.json").write_bytes(content)
    RunStatus(tmp_path / "status.json").failed(RuntimeError("the reason"))
    assert "the reason" in json.loads((tmp_path / "status.json").read_text())["reason"]


def test_lines_of_a_log_that_are_none_are_counted(tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_bytes(b'{"step": 1}\n[1]\n{"step": "x"}\n' + DEEP + b'\n{"step": 2}\n{"st')
    assert _log_entries(file) == ([{"step": 1}, {"step": 2}], 4)
    assert read_json_lines(file)[0] == {"step": 1}


@pytest.mark.parametrize("content", [CUT, DEEP, b"[1]", b'{"machine": 1, "pid": 1e400}'])
def test_an_owner_whose_entry_is_made_up_is_told_and_followed(tmp_path, monkeypatch, content):
    monkeypatch.setattr(owners, "DEAD_AFTER", 0.2)
    (tmp_path / OWNER).write_bytes(content)
    lines = []
    with Owner.of(tmp_path, "a test", tell=lines.append):
        assert json.loads((tmp_path / OWNER).read_text())["what"] == "a test"
    assert "is taken over" in lines[-1]


@pytest.mark.parametrize("number", [10**30, -1, "x", None, [1]])
def test_an_owner_of_this_machine_with_a_number_that_is_none_is_dead(tmp_path, number):
    entry = {"machine": owners._machine(), "pid": number, "began": 0.0, "token": "t"}
    (tmp_path / OWNER).write_text(json.dumps(entry))
    with Owner.of(tmp_path, "a test", tell=lambda line: None):
        pass


@pytest.mark.parametrize("name", ["../kept", "/kept", "..", ".", "", "a/../../kept"])
def test_a_list_of_prepared_files_removes_nothing_elsewhere(tmp_path, name):
    """`prepared.json` says what an earlier catalogue consists of, which is removed for a new one."""
    (tmp_path / "prepared.json").write_text(json.dumps({"files": ["data", name]}))
    with pytest.raises(UsageError, match="prepared.json is not what prepare writes .*'files' names"):
        prepare_run._names_in(tmp_path / "prepared.json", "files")
    (tmp_path / "prepared.json").write_text(json.dumps({"files": ["data", "card.md"]}))
    assert prepare_run._names_in(tmp_path / "prepared.json", "files") == ["data", "card.md"]
    for content in (CUT, DEEP, b"{}", b'{"files": 3}', b'{"files": [3]}'):
        (tmp_path / "prepared.json").write_bytes(content)
        with pytest.raises(UsageError, match=r"prepared.json is not what prepare writes"):
            prepare_run._names_in(tmp_path / "prepared.json", "files")


def test_counts_of_a_prepared_catalogue_that_are_made_up_are_told(tmp_path):
    file = tmp_path / "prepared.json"
    names = ("rejected", "exact_duplicates", "near_duplicates", "bytes_before", "bytes_after")
    counts = {"rows": {"train": 3}, "products": {"train": 2}, **dict.fromkeys(names, 1)}
    file.write_text(json.dumps({"counts": counts}))
    assert prepare.summary(prepare.counts_of(file))[0] == "train: 3 rows, 2 products"
    for change in ({"rows": ["train"]}, {"rows": {"train": "3"}}, {"products": None}, {"rejected": 1.5}):
        file.write_text(json.dumps({"counts": counts | change}))
        with pytest.raises(
            UsageError, match=rf"prepared.json is not what prepare writes \(counts.{next(iter(change))}"
        ):
            prepare.counts_of(file)
    for content in ("{}", "[]", '{"counts": 3}', "{", '{"counts": ' * 3000):
        file.write_text(content)
        with pytest.raises(UsageError, match="prepared.json is not what prepare writes"):
            prepare.counts_of(file)
