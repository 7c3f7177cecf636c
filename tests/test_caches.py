"""A cache that is read-only, full or without locks: one line that names the variable to set."""

from __future__ import annotations

import errno
import os
import sys

import pytest
from helpers import ROOT, run
from huggingface_hub import constants
from runs import write_split

from aliblip.runtime import mistakes
from aliblip.runtime.caches import cache_hint
from aliblip.runtime.mistakes import UsageError, main_with_usage_errors, usage_errors


@pytest.fixture(autouse=True)
def places(monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", "/caches/hf")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/caches/hf/hub")
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/caches/extensions")
    monkeypatch.setattr(mistakes, "SECONDS_FOR_THE_FIRST_PROCESS", 0)


def failed(number: int, file: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), file)


@pytest.mark.parametrize(
    ("error", "variable", "words"),
    [
        (failed(errno.EROFS, "/caches/hf/hub/models--a/blobs/1"), "HF_HOME", "Read-only file system"),
        (failed(errno.EACCES, "/caches/hf/datasets/x.lock"), "HF_HOME", "Permission denied"),
        (failed(errno.ENOSPC, "/caches/hf/hub/x"), "HF_HOME", "No space left"),
        (failed(errno.EACCES, "/caches"), "HF_HOME", "Permission denied"),  # the folder that it would lie in
        (failed(errno.EROFS, "/caches/extensions/lock"), "TORCH_EXTENSIONS_DIR", "Read-only"),
        (failed(errno.ENOLCK), "HF_HOME", "no file locks"),
        (
            NotImplementedError("FileSystem does not appear to support flock; use SoftFileLock"),
            "HF_HOME",
            "no file locks",
        ),
    ],
)
def test_the_variable_to_set_is_named_however_deep_the_error_lies(error, variable, words):
    for given in (error, wrapped(error)):
        hint = cache_hint(given)
        assert f"set {variable} to a folder" in hint and words in hint and "\n" not in hint


def wrapped(error: BaseException) -> Exception:
    try:
        try:
            raise error
        except Exception as inner:
            raise ValueError("can't load this") from inner
    except ValueError as outer:
        return outer


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HF_HOME"])
def test_what_was_set_is_what_is_named(monkeypatch, variable):
    monkeypatch.setenv(variable, "/caches/hf/hub")
    assert f"set {variable} to" in cache_hint(failed(errno.EROFS, "/caches/hf/hub/x"))


def test_other_errors_stay_as_they_are(capsys):
    for error in (failed(errno.EACCES, "/data/photos"), failed(errno.EIO, "/caches/hf/x"), ValueError("flock")):
        assert cache_hint(error) == ""
    told = pytest.raises(UsageError, match="can't load a: the cache /caches/hf .*: set HF_HOME")
    with told, usage_errors(OSError, told="can't load a: {}"):
        raise failed(errno.EROFS, "/caches/hf/x")

    def main():
        raise failed(errno.EROFS, "/caches/hf/x")

    with pytest.raises(SystemExit) as ended:
        main_with_usage_errors("it", main)
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1

    def bug():
        raise failed(errno.EROFS, "/data/x")

    with pytest.raises(OSError, match="Read-only"):  # Python shows it with its traceback
        main_with_usage_errors("it", bug)


OPENS = """
import sys
from aliblip.data.sources import open_source
from aliblip.runtime.mistakes import main_with_usage_errors
main_with_usage_errors("it", lambda: list(open_source(data_dir=sys.argv[1], split="train").read_range(0, 2)))
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder in which nobody can write")
def test_a_cache_that_can_not_be_made_is_told_where_the_data_is_opened(tmp_path):
    write_split(tmp_path / "data", "train", 4)
    env = {"HF_HOME": "/proc/self/cache", "PYTHONPATH": str(ROOT)}
    result = run([sys.executable, "-c", OPENS, tmp_path / "data"], env=env)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("it: error: the cache /proc/self/cache can't be written")
    assert "set HF_HOME to a folder" in result.stderr
