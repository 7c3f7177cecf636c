"""Small training runs for the tests: flags, data, what a run wrote, and runs that go on in the background."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from accelerate.state import AcceleratorState
from forks import FORK_RANKS
from helpers import PATIENCE, ROOT, environment, environments_of_ranks, launch_command, start_forked
from PIL import Image

import train

TINY = [
    *("--config_name", "base"),
    *("--vision_config", '{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8}'),
    *(
        "--text_config",
        '{"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}',
    ),
    *("--image_size", "32", "--image_text_hidden_size", "16", "--queue_size", "20"),
    *("--per_device_train_batch_size", "8", "--per_device_eval_batch_size", "8", "--learning_rate", "1e-3"),
    *("--dataloader_num_workers", "0", "--logging_steps", "1", "--k_rerank", "4"),
]


def photo(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    pixels = np.full((40, 40, 3), rng.integers(0, 256, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_split(folder: Path, split: str, rows: int, broken: dict[int, dict] | None = None) -> None:
    table = [
        {
            "image": {"bytes": photo(i), "path": f"{split}{i}.png"},
            "caption": " ".join(tiny.WORDS[(i * 7 + j) % len(tiny.WORDS)] for j in range(2 + i % 4)),
            "product_id": f"p{i}",
            **(broken or {}).get(i, {}),
        }
        for i in range(rows)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(table), folder / f"{split}-00000-of-00001.parquet")


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def steps_of(folder: Path) -> dict[int, tuple]:
    names = ("loss_itc", "loss_itm", "grad_norm", "learning_rate", "temperature")
    return {e["step"]: tuple(e[name] for name in names) for e in log_of(folder) if "loss_itc" in e}


def rows_of(folder: Path) -> dict[tuple[int, int, int], list[int]]:
    """(rank, epoch, batch) -> its rows, of runs of `recorded_train.py`. A batch that a resumed run read again has to be
    the same batch."""
    seen: dict[tuple[int, int, int], list[int]] = {}
    for file in folder.glob("rows-rank*.jsonl"):
        for line in file.read_text().splitlines(keepends=True):
            if line.endswith("\n"):  # else a kill cut it off
                entry = json.loads(line)
                place = (entry["rank"], entry["epoch"], entry["batch"])
                assert seen.setdefault(place, entry["rows"]) == entry["rows"], place
    return seen


def trained_in_process(flags: list[str], folder: Path, common: Sequence[str] = TINY) -> None:
    """`train.py` in this process, by default as a tiny model from scratch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *common, *map(str, flags), "--output_dir", str(folder)])
        patch.setattr(sys, "stdout", sys.stdout)
        patch.setattr(sys, "stderr", sys.stderr)
        try:
            assert train.main() == 0
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)


class BackgroundRun:
    """A recorded training run that a test can signal or kill: under `accelerate launch`, which forks its ranks (see
    `forks`), or, for less time, its processes alone (`launched=False`, see `helpers.run_ranks`)."""

    def __init__(self, config: str, folder: Path, args: Sequence, launched: bool = True, **env: str):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        script = [ROOT / "tests" / "recorded_train.py", *args, "--output_dir", folder]
        env["ALIBLIP_ROWS"] = str(folder)
        if launched:
            starts = [([*launch_command(config), *script], environment(**env, **{FORK_RANKS: "1"}))]
        else:
            starts = [([sys.executable, *script], ranks_env) for ranks_env in environments_of_ranks(config, **env)]
        file = folder / "printed.txt"
        self.processes = [start_forked(command, env, file, file) for command, env in starts]
        if launched:
            self.launcher = psutil.Process(self.processes[0].pid)

    @property
    def printed(self) -> str:
        return (self.folder / "printed.txt").read_text(errors="replace")

    def step(self) -> int:
        """The last step that stands in the log."""
        file = self.folder / "log.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)

    def wait_until(self, condition: Callable[[], bool], timeout: float = PATIENCE) -> None:
        end = time.monotonic() + timeout
        while not condition():
            assert all(process.poll() is None for process in self.processes), f"the run is over\n{self.printed[-4000:]}"
            assert time.monotonic() < end, f"nothing happened in {timeout} s\n{self.printed[-4000:]}"
            time.sleep(0.005)

    def ranks(self) -> list[psutil.Process]:
        """The training processes, in rank order: the launcher's children, in the order in which it started them."""
        return sorted(self.launcher.children(), key=lambda child: (child.create_time(), child.pid))

    def _started(self) -> list[psutil.Process]:
        """All processes of the run that are still there, those we started last."""
        found = []
        for process in self.processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                own = psutil.Process(process.pid)
                found = [*own.children(recursive=True), *found, own]
        return found

    def kill(self) -> None:
        """kill -9 of the launcher and of everything it started, at once."""
        for process in self._started():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for process in self.processes:
            process.wait()

    def wait(self, timeout: float = PATIENCE) -> int:
        """The exit code, once all that was started is gone."""
        started = self._started()
        try:
            codes = [process.wait(timeout) for process in self.processes]
            _, alive = psutil.wait_procs(started, timeout=timeout)
            assert not alive, f"still there: {alive}\n{self.printed[-4000:]}"
        except BaseException:
            for process in started:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            raise
        return next((code for code in codes if code), 0)

    def status(self) -> dict:
        return json.loads((self.folder / "status.json").read_text())
