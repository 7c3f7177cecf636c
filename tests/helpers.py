"""Real processes for the tests: `run`, `launch` and `run_ranks` for scripts, `spawn` for functions."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import forks
import psutil
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "accelerate_configs"
PATIENCE = 600  # seconds until what a test has started is taken for hung; a machine may be busy with other things

# Of a launcher that may be around the test run: what it says is not about the processes started here.
_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def instead_of_sleep(monkeypatch, call: Callable[[float], Any]) -> None:
    """`time.sleep` in this thread, and in processes forked from it, is `call`. Threads that other tests have left go on
    as before."""
    thread, sleep = threading.get_ident(), time.sleep
    monkeypatch.setattr(
        time, "sleep", lambda seconds: call(seconds) if threading.get_ident() == thread else sleep(seconds)
    )


def free_port() -> int:
    """A TCP port that nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(**extra: str) -> dict[str, str]:
    """The environment of a test process: one thread, no network, no GPU, nothing of a surrounding launcher."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in _LAUNCHER_VARIABLES and not key.startswith(("ACCELERATE_", "TORCHELASTIC_"))
    }
    kept |= {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p),
        # Two environments that build DeepSpeed's operators in one folder build them again in turn.
        "TORCH_EXTENSIONS_DIR": str(Path(sys.prefix, "torch_extensions")),
    }
    return kept | extra


def _kill(process: subprocess.Popen | forks.Forked) -> None:
    """End a process and everything it started, each by its id: torchrun's workers are not in the group of torchrun."""
    try:
        started = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        started = []
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for child in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def run(
    command: Sequence[str | os.PathLike],
    *,
    env: dict[str, str] | None = None,
    cwd: str | os.PathLike = ROOT,
    timeout: float = PATIENCE,
) -> subprocess.CompletedProcess:
    """Run a command in its own process group and return its output as text.

    Raises:
        subprocess.TimeoutExpired: after `timeout` seconds, with the output so far; every process that the command
            started has been ended then.
    """
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=cwd,
        env=environment(**(env or {})),
        stdin=subprocess.DEVNULL,  # nobody is there to be asked
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except BaseException as error:
        _kill(process)
        stdout, stderr = process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            error.stdout, error.stderr = stdout, stderr
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def _run_forked(
    commands: Sequence[Sequence[str | os.PathLike]],
    envs: Sequence[dict[str, str]],
    cwd: str | os.PathLike = ROOT,
    timeout: float = PATIENCE,
) -> subprocess.CompletedProcess:
    """Run commands side by side, by fork, until all have ended or one has failed: then the others have 30 s to end.

    Returns:
        the output of all of them together, and the first exit code that is not 0.

    Raises:
        subprocess.TimeoutExpired: as `run`.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        processes = [start_forked(command, env, *files, cwd=cwd) for command, env in zip(commands, envs, strict=True)]
        end, failed = time.monotonic() + timeout, False
        try:
            while any(process.poll() is None for process in processes):
                if time.monotonic() > end:
                    raise subprocess.TimeoutExpired(processes[0].args, timeout)
                if not failed and any(process.poll() for process in processes):
                    failed, end = True, min(end, time.monotonic() + 30)
                time.sleep(0.01)
        except BaseException as error:
            for process in processes:
                _kill(process)
            if isinstance(error, subprocess.TimeoutExpired):
                error.stdout, error.stderr = (file.read_text(errors="replace") for file in files)
            raise
        code = next((process.returncode for process in processes if process.returncode), 0)
        return subprocess.CompletedProcess(
            processes[0].args, code, *(file.read_text(errors="replace") for file in files)
        )


def start_forked(
    command: Sequence[str | os.PathLike],
    env: dict[str, str],
    stdout: Path,
    stderr: Path,
    cwd: str | os.PathLike = ROOT,
) -> forks.Forked:
    """`forks.start` in the environment of the tests."""
    return forks.start(command, env=env, base=environment(), cwd=cwd, stdout=stdout, stderr=stderr)


def run_forked(command: Sequence[str | os.PathLike], **options: Any) -> subprocess.CompletedProcess:
    """`run` for `[sys.executable, SCRIPT, ...]` without the time that its imports take, see `forks`."""
    env = environment(**(options.pop("env", None) or {}))
    return _run_forked([command], [env], **options)


def launch_command(config_yaml: str | os.PathLike, launcher_args: Sequence[str] = ()) -> list[str | os.PathLike]:
    """`accelerate launch` on a free port; a script and its arguments follow."""
    return [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", CONFIGS / config_yaml, "--main_process_port", str(free_port())),
        *launcher_args,
    ]


def launch(
    config_yaml: str | os.PathLike,
    script: str | os.PathLike,
    args: Sequence[str | os.PathLike] = (),
    env: dict[str, str] | None = None,
    timeout: float = PATIENCE,
    launcher_args: Sequence[str] = (),
) -> subprocess.CompletedProcess:
    """Run `accelerate launch --config_file CONFIG SCRIPT ARGS` from the repository root.

    The launcher begins as a fork, as it would import torch for nothing; the processes that it starts begin as always.

    Args:
        config_yaml: a path, or the name of a file in `accelerate_configs/`.
        script: the script to start.
        args: its arguments.
        env: environment variables on top of `environment()`.
        timeout: seconds.
        launcher_args: flags for the launcher itself.
    """
    command = [*launch_command(config_yaml, launcher_args), script, *args]
    return run_forked(command, env=env, timeout=timeout)


_WRITE_ENVIRONMENT = """import json, os, sys
json.dump(dict(os.environ), open(f"{sys.argv[1]}/{os.environ.get('RANK', '0')}.json", "w"))
"""


@functools.cache
def _told_by_the_launcher(config_yaml: str) -> list[dict[str, str]]:
    """The environment in which `accelerate launch` starts a script, rank by rank."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "script.py")
        script.write_text(_WRITE_ENVIRONMENT)
        assert_succeeded(launch(config_yaml, script, [folder]))
        files = sorted(Path(folder).glob("*.json"), key=lambda file: int(file.stem))
        return [json.loads(file.read_text()) for file in files]


def environments_of_ranks(config_yaml: str, **extra: str) -> list[dict[str, str]]:
    """The environments of the processes of a run that no launcher watches over: as the launcher would set them, but on
    a port of their own, where rank 0 opens the store that otherwise is the launcher's."""
    own = {"MASTER_PORT": str(free_port()), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    return [env | (own if "MASTER_PORT" in env else {}) | extra for env in _told_by_the_launcher(config_yaml)]


def run_ranks(
    config_yaml: str,
    script: str | os.PathLike,
    args: Sequence[str | os.PathLike] = (),
    env: dict[str, str] | None = None,
    timeout: float = PATIENCE,
) -> subprocess.CompletedProcess:
    """The processes that `launch` would start, without a launcher and by fork: for what runs compute, not for how they
    start and end."""
    envs = environments_of_ranks(config_yaml, **(env or {}))
    return _run_forked([[sys.executable, script, *args]] * len(envs), envs, timeout=timeout)


def assert_succeeded(result: subprocess.CompletedProcess) -> None:
    """Show the output of a failed command in the test report."""
    assert result.returncode == 0, f"exit code {result.returncode}\n{result.stdout[-6000:]}\n{result.stderr[-6000:]}"


def spawn(fn: Callable, world_size: int, *args: Any) -> list[Any]:
    """Run `fn(*args)` in `world_size` gloo processes, by fork, and return what each rank returned, in rank order.

    `fn` has to be a function of a module (it is pickled). An exception on any rank fails the test with its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "call.pickle").write_bytes(pickle.dumps((fn, args)))
        commands = [[sys.executable, __file__, folder, world_size, rank] for rank in range(world_size)]
        assert_succeeded(_run_forked(commands, [environment()] * world_size, cwd=Path.cwd()))
        return [torch.load(Path(folder, f"result{rank}.pt"), weights_only=False) for rank in range(world_size)]


def _spawned(folder: str, world_size: int, rank: int) -> None:
    """What each process of `spawn` does."""
    fn, args = pickle.loads(Path(folder, "call.pickle").read_bytes())
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    try:
        torch.save(fn(*args), Path(folder, f"result{rank}.pt"))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    _spawned(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
