"""Scripts of ours as processes that begin as a fork of one that has imported everything: 0.1 s instead of 7 s a start.

    process = start([sys.executable, "train.py", ...], env=..., stdout=file, stderr=file)
    process.wait(60)                       # like subprocess.Popen: pid, poll, wait, returncode, args

What runs is a process of its own: own id, session and environment, signals as Python begins with; it runs the script as
`__main__` and ends as Python ends. Only the libraries are imported already. That they can be imported in a fresh
process, and what reading the environment at import does, is for the tests that start scripts plainly.

A launcher begins like that too, and starts its ranks as always: seven seconds of imports for each. With `FORK_RANKS` in
its environment it forks them, for tests of what happens to ranks and launcher, and not of how they begin. They are the
launcher's own children, in sessions of their own.

The server (this file as a script) has imported the libraries but never computed with them, so that no pool of threads
is lost in the fork. It is the parent of all that it started, and ends with the process that uses it.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_LAUNCHER = "accelerate.commands.launch"
_LIBRARIES = ("evaluate_retrieval", "train", _LAUNCHER, "torch.distributed.run", "deepspeed")
FORK_RANKS = "ALIBLIP_TESTS_FORK_RANKS"
_STANDARD_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD)


class Forked:
    """A process that the server has started, with what the tests use of `subprocess.Popen`."""

    def __init__(self, server: _Server, args: Sequence[str], pid: int):
        self._server, self.args, self.pid = server, args, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._server.ask(poll=self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.01)
        return self.returncode


class _Server:
    """The server, and the line to it: a JSON object for a JSON value. Safe from many threads."""

    def __init__(self, env: Mapping[str, str]):
        self._lock = threading.Lock()  # one question at a time: an answer does not say whose it is
        ours, theirs = socket.socketpair()
        self._line, self._file = ours, ours.makefile("r")
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            env=env,
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        atexit.register(self.close)

    def ask(self, **request):
        with self._lock:
            self._line.sendall((json.dumps(request) + "\n").encode())
            answer = self._file.readline()
        assert answer, f"the server of forks is gone: {self._process.poll()}"
        return json.loads(answer)

    def close(self) -> None:
        self._file.close()
        self._line.close()
        self._process.wait()


_servers: dict[int, _Server] = {}  # by the process that uses it: one that pytest forked has none yet
_starting = threading.Lock()


def start(
    command: Sequence[str], *, env: Mapping[str, str], base: Mapping[str, str], cwd: Path, stdout: Path, stderr: Path
) -> Forked:
    """Start `[sys.executable, SCRIPT, ...]` or `[sys.executable, "-m", MODULE, ...]`.

    Args:
        command: as for `subprocess.Popen`.
        env: the whole environment.
        base: the environment in which the libraries are imported, at the first call.
        cwd: folder to run in.
        stdout: file to append to.
        stderr: the same.
    """
    command = [str(part) for part in command]
    assert command[0] == sys.executable and (command[1] == "-m" or not command[1].startswith("-")), command
    with _starting:
        if os.getpid() not in _servers:
            _servers[os.getpid()] = _Server(base)
        server = _servers[os.getpid()]
    where = {"cwd": str(cwd), "stdout": str(stdout), "stderr": str(stderr)}
    return Forked(server, command, server.ask(start=command[1:], env=dict(env), **where))


# --- the server -------------------------------------------------------------------------------------------------------


def _forget_signals() -> None:
    """Meet signals as Python does at its begin."""
    for number in _STANDARD_SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def _become(request: dict) -> None:
    """What lies between fork and the script: session, signals, streams, folder, environment."""
    os.setsid()
    _forget_signals()
    for stream, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(file, stream)
        os.close(file)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])


def serve(line: socket.socket) -> list[str]:
    """Answer requests; in each child that this starts, return the command to run."""
    codes: dict[int, int] = {}

    def reap(*_) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            codes[pid] = os.waitstatus_to_exitcode(status)

    signal.signal(signal.SIGCHLD, reap)
    with line, line.makefile("r") as requests:
        for text in requests:
            request = json.loads(text)
            if "poll" in request:
                answer = codes.get(request["poll"])
            else:
                ready, tell = os.pipe()
                if (answer := os.fork()) == 0:
                    break
                os.close(tell)
                os.read(ready, 1)  # until the child is what was asked for: its files exist, and signals find it
                os.close(ready)
            line.sendall((json.dumps(answer) + "\n").encode())
        else:
            sys.exit()
    _become(request)
    os.close(ready)
    os.close(tell)
    return request["start"]


def _run(command: list[str]) -> None:
    if command[0] == "-m":
        sys.argv = command[1:]
        sys.modules.pop(command[1], None)  # it runs anew, as `__main__`
        if command[1] == _LAUNCHER and FORK_RANKS in os.environ:
            _fork_ranks()
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        sys.path[0] = str(Path(command[0]).resolve().parent)
        sys.path[1:1] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path not in sys.path]
        runpy.run_path(command[0], run_name="__main__")


# --- ranks that a launcher forks --------------------------------------------------------------------------------------


class _Rank:
    """What launchers use of `subprocess.Popen`, for a script that begins as a fork of the launcher."""

    def __init__(self, args: Sequence[str], env: Mapping[str, str], stdout=None, stderr=None, start_new_session=False):
        self.args, self.returncode = args, None
        command = [part for part in args[1:] if part != "-u"]
        sys.stdout.flush()
        sys.stderr.flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, _STANDARD_SIGNALS)  # none may meet the launcher's handlers in the rank
        self.pid = os.fork()
        if self.pid == 0:
            _forget_signals()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _STANDARD_SIGNALS)
            if start_new_session:
                os.setsid()
            for stream, file in ((1, stdout), (2, stderr)):
                if file is not None:
                    os.dup2(file.fileno(), stream)
            os.environ.clear()
            os.environ.update(env)
            _run_and_exit(command)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STANDARD_SIGNALS)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def _run_and_exit(command: list[str]) -> None:
    """Run a script, deep in the launcher that was forked, and end as Python ends."""
    code = 0
    try:
        _run(command)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if code and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
    except KeyboardInterrupt:
        code = -signal.SIGINT
        sys.excepthook(*sys.exc_info())
    except BaseException:
        code = 1
        sys.excepthook(*sys.exc_info())
    try:
        threading._shutdown()  # waits for threads
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        if code < 0:
            signal.signal(-code, signal.SIG_DFL)
            os.kill(os.getpid(), -code)
        os._exit(code)


def _fork_ranks() -> None:
    """Let the launcher that runs in this process fork our scripts."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    plain = subprocess.Popen

    def popen(args, **options):
        if args[0] != sys.executable:
            return plain(args, **options)
        return _Rank(args, **options)

    subprocess.Popen = subprocess_handler.Popen = popen
    os.register_at_fork(after_in_child=lambda: setattr(subprocess, "Popen", plain))


if __name__ == "__main__":
    import gc
    import importlib

    for library in _LIBRARIES:
        importlib.import_module(library)
    assert threading.active_count() == 1, threading.enumerate()
    gc.freeze()  # else the first collection in each child would copy all of it
    _run(serve(socket.socket(fileno=int(sys.argv[1]))))
