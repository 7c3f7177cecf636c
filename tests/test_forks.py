"""A fork is what a fresh process would be: there once it is started, on its own, ending as Python ends."""

import os
import signal
import sys

import pytest
from helpers import environment, run_forked, start_forked

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
