"""One folder, one writer: a second one is refused with the owner's name, and a dead owner's folder is taken over."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import tiny
from helpers import ROOT, assert_succeeded, run_forked, start_forked
from runs import TINY, write_split

import evaluate_retrieval
import train
from aliblip.runtime import owners
from aliblip.runtime.mistakes import UsageError
from aliblip.runtime.owners import OWNER, Owner, check_copies

HOLD = """import sys, time
from pathlib import Path
from aliblip.runtime.owners import Owner
Owner.of(Path(sys.argv[1]), "train.py")
print("held", flush=True)
time.sleep(600)
"""


@contextlib.contextmanager
def another_process(folder: Path, scratch: Path):
    """A process that owns a folder; its psutil.Process."""
    (scratch / "hold.py").write_text(HOLD)
    held = start_forked([sys.executable, scratch / "hold.py", folder], {}, scratch / "o", scratch / "e")
    process = psutil.Process(held.pid)
    try:
        while not (scratch / "o").exists() or "held" not in (scratch / "o").read_text():
            assert held.poll() is None
            time.sleep(0.01)
        yield process
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
        held.wait(30)


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(owners, "SECONDS_BETWEEN_SIGNS", 0.05)
    monkeypatch.setattr(owners, "DEAD_AFTER", 1.0)


def of_another_machine(folder: Path) -> dict:
    entry = {"what": "train.py", "host": "node7", "pid": 1, "began": 0.0, "machine": "node7 other", "token": "t"}
    (folder / OWNER).write_text(json.dumps({**entry, "since": "2026-01-01T00:00:00+00:00", "signs": 0}))
    return entry


def test_a_second_writer_is_refused_with_the_name_of_the_first(tmp_path, told):
    with Owner.of(tmp_path, "train.py", tell=told.append):
        with pytest.raises(UsageError) as refused:
            Owner.look(tmp_path, told.append)
        with pytest.raises(UsageError, match=re.escape(str(refused.value))):
            Owner.of(tmp_path, "evaluate_retrieval.py", tell=told.append)
        assert f"{tmp_path} is in use by train.py (process {os.getpid()} on " in str(refused.value)
        assert str(refused.value).endswith("wait until that has ended, or end it, or give another folder")
    with Owner.of(tmp_path, "evaluate_retrieval.py", tell=told.append) as owner:
        assert [path.name for path in tmp_path.iterdir()] == [OWNER]
        owner.release()
        owner.release()
    Owner.look(tmp_path, told.append)
    assert told == [] and not list(tmp_path.iterdir())


def test_a_dead_process_of_this_machine_is_known_at_once(tmp_path, told):
    folder = tmp_path / "run"
    folder.mkdir()
    with another_process(folder, tmp_path) as process:
        with pytest.raises(UsageError, match=rf"in use by train.py \(process {process.pid} on "):
            Owner.of(folder, "train.py", tell=told.append)
        process.suspend()  # it lives: nobody may write beside it
        with pytest.raises(UsageError, match="in use by train.py"):
            Owner.of(folder, "train.py", tell=told.append)
        process.kill()
    Owner.of(folder, "train.py", tell=told.append).release()
    assert told == [told[0]] and told[0].startswith(f"{folder}: its owner, train.py (process {process.pid} on ")
    assert told[0].endswith("is dead, and the folder is taken over")


def test_another_process_of_the_same_number_is_not_the_owner(tmp_path, told):
    with Owner.of(tmp_path, "train.py"):
        entry = json.loads((tmp_path / OWNER).read_text())
    (tmp_path / OWNER).write_text(json.dumps({**entry, "began": entry["began"] - 1000}))
    Owner.of(tmp_path, "train.py", tell=told.append).release()
    assert "is dead" in told[0]


def test_an_owner_of_another_machine_is_alive_as_long_as_it_gives_signs(tmp_path, told, fast):
    entry = of_another_machine(tmp_path)
    with ThreadPoolExecutor(1) as pool:
        refused = pool.submit(Owner.of, tmp_path, "train.py", tell=told.append)
        while not refused.done():
            (tmp_path / OWNER).write_text(json.dumps({**entry, "signs": time.monotonic()}))
            time.sleep(0.02)
        with pytest.raises(UsageError, match=r"in use by train.py \(process 1 on node7, since"):
            refused.result()
    assert "looking for up to 1 seconds whether it lives" in told[0]
    told.clear()
    with Owner.of(tmp_path, "train.py", tell=told.append):
        assert told[-1].endswith("is dead, and the folder is taken over")


def test_an_owner_gives_signs_of_life(tmp_path, fast):
    with Owner.of(tmp_path, "train.py"):
        before, end = owners._look(tmp_path / OWNER), time.monotonic() + 60
        while owners._look(tmp_path / OWNER) == before:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_a_sign_that_is_being_given_does_not_outlive_its_owner(tmp_path, fast, monkeypatch):
    write, is_writing, goes_on = owners._write, threading.Event(), threading.Event()

    def slow(file, entry):
        if entry["signs"]:  # not the first entry
            is_writing.set()
            assert goes_on.wait(60)
        write(file, entry)

    monkeypatch.setattr(owners, "_write", slow)
    owner = Owner.of(tmp_path, "train.py")
    signs = next(thread for thread in threading.enumerate() if thread.name == f"owner of {tmp_path}")
    assert is_writing.wait(60)
    release = threading.Thread(target=owner.release)
    release.start()
    release.join(0.2)  # it waits for the sign
    goes_on.set()
    release.join(60)
    assert not release.is_alive()
    signs.join(60)
    assert not list(tmp_path.iterdir())


def test_the_end_of_a_run_does_not_wait_for_a_sign_that_never_ends(tmp_path, fast, monkeypatch):
    write, is_writing, goes_on = owners._write, threading.Event(), threading.Event()

    def stuck(file, entry):
        if entry["signs"]:
            is_writing.set()
            goes_on.wait()
        write(file, entry)

    monkeypatch.setattr(owners, "_write", stuck)
    monkeypatch.setattr(owners, "SECONDS_FOR_A_SIGN", 0.1)
    owner = Owner.of(tmp_path, "train.py")
    assert is_writing.wait(60)
    owner.release()
    assert (tmp_path / OWNER).exists()
    goes_on.set()


def test_of_many_that_try_at_once_one_becomes_the_owner(tmp_path, fast):
    of_another_machine(tmp_path)  # dead: all of them want to take over

    def try_it(number: int) -> Owner | None:
        try:
            return Owner.of(tmp_path, f"number {number}", tell=lambda line: None)
        except UsageError:
            return None

    with ThreadPoolExecutor(8) as pool:
        found = [owner for owner in pool.map(try_it, range(8)) if owner is not None]
    assert len(found) == 1 and f'"{found[0].entry["what"]}"' in (tmp_path / OWNER).read_text()
    found[0].release()


def test_an_owner_whose_folder_was_taken_ends(tmp_path, fast, monkeypatch, capsys):
    lost = []
    monkeypatch.setattr(owners.os, "_exit", lambda code: lost.append(code))
    with Owner.of(tmp_path, "train.py") as owner:
        of_another_machine(tmp_path)
        end = time.monotonic() + 60
        while not lost and time.monotonic() < end:
            time.sleep(0.01)
        owner._ended.set()
    assert lost[0] == 1 and "was taken over by train.py (process 1 on node7" in capsys.readouterr().err


def test_a_folder_that_takes_no_file_has_no_owner(tmp_path, monkeypatch):
    """What can't be written is told by those who write."""

    def refuse(*args):
        raise PermissionError

    monkeypatch.setattr(owners, "_write", refuse)
    with Owner.of(tmp_path, "train.py") as owner:
        assert owner.file is None


@pytest.mark.parametrize("links", [True, False])
def test_file_systems_without_hard_links_will_do(tmp_path, monkeypatch, links):
    def refuse(*args):
        raise OSError(95, "not supported")

    if not links:
        monkeypatch.setattr(owners.os, "link", refuse)
    with Owner.of(tmp_path, "train.py"), pytest.raises(UsageError, match="in use by train.py"):
        Owner.of(tmp_path, "train.py")


def test_copies_without_a_launcher_are_refused(monkeypatch):
    for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)
    check_copies()
    monkeypatch.setenv("SLURM_NTASKS", "4")
    with pytest.raises(
        UsageError, match=r"SLURM starts 4 copies of this command \(SLURM_NTASKS\), .* unset SLURM_NTASKS"
    ):
        check_copies()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")  # of a batch script that starts one
    check_copies()
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="MPI starts 2 copies"):
        check_copies()
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_copies()


# --- the commands -----------------------------------------------------------------------------------------------------


def test_the_commands_refuse_a_folder_in_use_and_leave_it_free(tmp_path, monkeypatch):
    write_split(tmp_path / "data", "train", 20)
    write_split(tmp_path / "data", "validation", 8)
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    folder = tmp_path / "run"
    data = ["--data_dir", tmp_path / "data"]
    flags = [*TINY, *data, "--tokenizer_name", tmp_path / "tokenizer", "--output_dir", folder]
    flags += ["--max_train_steps", 2, "--checkpointing_steps", 1]
    assert_succeeded(run_forked([sys.executable, ROOT / "train.py", *flags]))
    assert not (folder / OWNER).exists()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    (folder / ".checkpoint-3.tmp").mkdir()  # the other one is writing it

    def refused(main, *command) -> str:
        monkeypatch.setattr(sys, "argv", [str(part) for part in command])
        with pytest.raises(UsageError) as raised:
            main()
        return str(raised.value)

    evaluation = ["evaluate_retrieval.py", "--model_name_or_path", folder / "last", *data, "--output_dir", folder]
    with another_process(folder, tmp_path):
        for more in (["--resume_from_checkpoint", "last"], ["--overwrite_output_dir", "true"]):
            assert "is in use by train.py" in refused(train.main, "train.py", *flags, *more)
        assert "is in use by train.py" in refused(evaluate_retrieval.main, *evaluation)
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != OWNER}
    assert after == before and (folder / ".checkpoint-3.tmp").exists()
    # A start that is refused for another reason leaves the folder free, and so does the dead one.
    assert "holds an earlier run" in refused(train.main, "train.py", *flags)
    assert not (folder / OWNER).exists()
    resume = ["--resume_from_checkpoint", "last", "--max_train_steps", 3, "--num_train_epochs", 3]
    result = run_forked([sys.executable, ROOT / "train.py", *flags, *resume])
    assert_succeeded(result)
    assert not (folder / ".checkpoint-3.tmp").exists() and not list(folder.glob(f"{OWNER}*"))
