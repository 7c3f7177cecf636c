"""A fork is what a fresh process would be: there once it is started, on its own, ending as Python ends."""

import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from forks import FORK_RANKS
from helpers import environment, launch, run_forked, start_forked

SCRIPT = """
import os, sys, time
print(__name__, sys.argv[1:], os.environ["GIVEN"], os.getcwd(), flush=True)
if sys.argv[1] == "raise":
    raise ValueError("on purpose")
if sys.argv[1] == "wait":
    time.sleep(60)
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    return [sys.executable, tmp_path / "script.py"]


@pytest.mark.parametrize("argument, code", [("0", 0), ("3", 3), ("raise", 1)])
def test_a_script_ends_with_its_own_code(script, tmp_path, argument, code):
    result = run_forked([*script, argument], env={"GIVEN": "value"}, cwd=tmp_path)
    assert result.returncode == code
    assert result.stdout == f"__main__ ['{argument}'] value {tmp_path}\n"
    assert ("ValueError: on purpose" in result.stderr) is (argument == "raise")


def test_once_started_it_has_its_files_and_hears_signals(script, tmp_path):
    for attempt, number in enumerate([signal.SIGKILL, signal.SIGTERM] * 5):
        files = [tmp_path / f"{name}{attempt}" for name in ("stdout", "stderr")]
        process = start_forked([*script, "wait"], environment(GIVEN="value"), *files)
        assert all(file.exists() for file in files) and os.getsid(process.pid) == process.pid
        assert process.poll() is None
        os.kill(process.pid, number)
        assert process.wait(30) == -number


def test_threads_get_the_answers_to_their_own_questions(script, tmp_path):
    def code_of(number):
        return run_forked([*script, str(number)], env={"GIVEN": "value"}, cwd=tmp_path).returncode

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(code_of, range(24))) == list(range(24))


RANK = """
import atexit, os, sys, threading, time
rank, launcher = os.environ["RANK"], os.getppid()
atexit.register(lambda: print(f"rank {rank} at its end", flush=True))
threading.Thread(target=lambda: (time.sleep(0.5), print(f"rank {rank} in a thread", flush=True))).start()
print(f"rank {rank}", __name__, sys.argv[1:], launcher, os.getsid(0) == os.getpid(), flush=True)
if rank == "1" and sys.argv[1] == "raise":
    raise ValueError("on purpose")
sys.exit(int(rank) * int(sys.argv[1]) if sys.argv[1] != "raise" else 0)
"""


@pytest.mark.parametrize("argument, told", [("0", ""), ("7", "exitcode  : 7"), ("raise", "ValueError: on purpose")])
def test_ranks_that_a_launcher_forks_end_as_scripts_do(tmp_path, argument, told):
    (tmp_path / "script.py").write_text(RANK)
    result = launch("cpu_2_processes.yaml", tmp_path / "script.py", [argument], env={FORK_RANKS: "1"})
    assert (result.returncode == 0) is (argument == "0"), result.stderr
    assert told in result.stderr
    begun = [line.split(maxsplit=2)[2] for line in result.stdout.splitlines() if "__main__" in line]
    (same,) = set(begun)  # children of one launcher, in sessions of their own
    assert len(begun) == 2 and same.startswith(f"__main__ ['{argument}'] ") and same.endswith(" True")
    if argument == "0":
        for rank in (0, 1):
            lines = [line for line in result.stdout.splitlines() if line.startswith(f"rank {rank}")]
            assert lines[1:] == [f"rank {rank} in a thread", f"rank {rank} at its end"]
