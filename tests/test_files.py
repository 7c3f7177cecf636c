"""A crash at any moment leaves the old folder or the new one, complete."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from aliblip.runtime import files
from aliblip.runtime.files import (
    NewFolder,
    append_json_line,
    mapped_array,
    read_json_lines,
    repair,
    write_json_lines,
    write_tensors,
)


def write(folder: Path, value: int, **options) -> None:
    with NewFolder(folder, **options) as beside:
        write_tensors(beside / "a.safetensors", {"x": torch.full((3,), value)})
        write_tensors(beside / "b.safetensors", {"x": torch.full((3,), value)})


def content(folder: Path) -> list[int]:
    return [int(load_file(folder / f"{name}.safetensors")["x"][0]) for name in "ab"]


class Killed(BaseException):
    pass


def calls_of_the_system(monkeypatch, die_at: int) -> list[str]:
    """Count what touches the disk, and die instead of call number `die_at`."""
    made: list[str] = []

    def counted(owner, name):
        plain = getattr(owner, name)

        def call(*args, **kwargs):
            made.append(name)
            if len(made) == die_at:
                raise Killed
            return plain(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for owner, name in ((Path, "mkdir"), (Path, "rename"), (os, "fsync"), (files, "save_file")):
        counted(owner, name)
    # A process that is gone clears nothing up.
    remove = files.shutil.rmtree

    def rmtree(*args, **kwargs):
        if len(made) < die_at:
            counted_remove = len(made) + 1
            made.append("rmtree")
            if counted_remove == die_at:
                raise Killed
            remove(*args, **kwargs)

    monkeypatch.setattr(files.shutil, "rmtree", rmtree)
    return made


def test_a_kill_at_any_call_leaves_a_whole_folder(tmp_path):
    outcomes = set()
    for die_at in range(1, 100):
        folder = tmp_path / str(die_at) / "last"
        folder.parent.mkdir()
        write(folder, 1)
        with pytest.MonkeyPatch.context() as patch:
            made = calls_of_the_system(patch, die_at)
            try:
                write(folder, 2)
            except Killed:
                pass
            else:
                assert len(made) < die_at
                break
        repair(folder.parent)
        assert content(folder) in ([1, 1], [2, 2])
        assert [path.name for path in folder.parent.iterdir()] == ["last"]
        outcomes.add(content(folder)[0])
    assert outcomes == {1, 2} and die_at > 8


def test_a_failure_leaves_the_old_folder_and_nothing_else(tmp_path):
    write(tmp_path / "last", 1)
    with pytest.raises(OSError, match="needs 10,000,000,000,000 MB and .* MB are free"):
        write(tmp_path / "last", 2, size=10**19)
    with pytest.raises(KeyError), NewFolder(tmp_path / "last") as beside:
        (beside / "half").touch()
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["last"] and content(tmp_path / "last") == [1, 1]


def test_lines_are_replaced_as_a_whole(tmp_path, monkeypatch):
    file = tmp_path / "rows.jsonl"
    write_json_lines(file, [{"a": 1}])

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        write_json_lines(file, [{"a": 2}])
    assert file.read_text() == '{"a": 1}\n' and list(tmp_path.iterdir()) == [file]


def test_a_line_is_added_whole_or_not_at_all(tmp_path):
    file = tmp_path / "log.jsonl"
    append_json_line(file, {"a": 1})
    append_json_line(file, {"a": "ä\u2028"})
    assert read_json_lines(file) == [{"a": 1}, {"a": "ä\u2028"}]
    whole = file.read_bytes()
    # A limit on the size of a file stands for a full disk: the system takes the bytes that fit, and refuses the rest.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 5, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            append_json_line(file, {"b": 12345})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert file.read_bytes() == whole


@pytest.mark.parametrize("cut", ['{"a": "ä'.encode()[:-1], b"{", b'{"a": "' + b"x" * 200_000])
def test_a_line_that_was_cut_off_is_repaired_before_the_next(cut, tmp_path):
    file = tmp_path / "log.jsonl"
    append_json_line(file, {"a": 1})
    with file.open("ab") as stream:
        stream.write(cut)
    assert read_json_lines(file) == [{"a": 1}]
    append_json_line(file, {"a": 3})
    assert file.read_bytes() == b'{"a": 1}\n{"a": 3}\n'
    file.write_bytes(cut)  # the very first
    append_json_line(file, {"a": 3})
    assert file.read_bytes() == b'{"a": 3}\n'


def test_a_line_that_lacks_its_end_alone_stays(tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_bytes(b'{"a": 1}\n{"a": 2}')
    append_json_line(file, {"a": 3})
    assert file.read_bytes() == b'{"a": 1}\n{"a": 2}\n{"a": 3}\n'


def test_a_mapped_array_has_room_from_the_start_and_leaves_nothing(tmp_path):
    array = mapped_array(tmp_path, (3, 4), np.float32)
    array[:] = 7
    assert array.sum() == 84 and isinstance(array, np.memmap) and list(tmp_path.iterdir()) == []
    assert mapped_array(tmp_path, (0, 4), np.int64).shape == (0, 4)
    with pytest.raises(OSError):
        mapped_array(tmp_path, (2**50, 1024), np.int8)
    assert list(tmp_path.iterdir()) == []
