"""Photos a second and core of `python -m aliblip.prepare`, its memory, and what three kills cost.

    python benchmarks/bench_prepare.py --json benchmarks/results/prepare.json
    python benchmarks/bench_prepare.py --rows 400000 --width 64 --memory --json benchmarks/results/prepare_memory.json
    python benchmarks/bench_prepare.py --rows 2000 --folder /tmp           # in small; what it writes is removed again

Draws the competition's layout, a train.json beside a folder of photos, of which one in a hundred is no photo and one
in fifty a smaller copy of another. It is prepared by one worker three times, by real processes: a quarter of it; the
whole; and, but for --no_kills, the whole once more, killed (SIGKILL) while it reads, compares and writes, and started
again by the same command each time. Both whole catalogues must be equal to the last byte. Time is that of the
processor, of all processes together; memory is what they hold at most, shared pages counted once (Linux), and what of
it is their own: pages of files that are mapped, such as the index, the system takes back when it needs them. The
numbers for more rows are a line through the quarter and the whole, phase by phase; those of the index and of comparing
bend upwards as they do between both. The last line is the time with three kills by that without (1 with --no_kills).
With --memory a quarter and the whole are each ended when some photos are compared, since what is held until then is
most, and comparing many takes long; the last line is what the whole held of its own by what the quarter held.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import psutil
from PIL import Image

from benchmarks.common import finish, parser

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 320
MAX_SIDE = 224
BROKEN, COPIES = 100, 50  # one in so many
PROJECTED = 4_000_000
SECONDS = 0.5  # between two looks at the processes
# The phases of the work, by the folder of their logs, and what comes when their tasks are done.
PHASES = {"read": "index", "compare": "decide", "write": "card"}
# Of these the time bends upwards with the number of photos.
BENT = ("index", "compare")
# How many tasks of a phase are done when it is killed.
KILLED_AT = {"read": 0.4, "compare": 0.5, "write": 0.3}
ENDED_AT = ("compare", 0.02)


def main(command_line: list[str] | None = None) -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rows", type=int, default=100_000)
    arguments.add_argument("--width", type=int, default=WIDTH, help="of the photos; what is held does not depend on it")
    arguments.add_argument("--folder", type=Path, help="where it lies meanwhile (default: a temporary folder)")
    arguments.add_argument("--no_kills", action="store_true", help="leave out the third run")
    arguments.add_argument("--memory", action="store_true", help="only what is held, until some photos are compared")
    args = arguments.parse_args(command_line)
    folder = Path(tempfile.mkdtemp(dir=args.folder, prefix="prepare-"))
    try:
        if args.memory:
            table = held(folder, args.rows, args.width)
            finish(
                "prepare_memory", table["whole"]["own_gigabytes"] / table["quarter"]["own_gigabytes"], table, args.json
            )
            return
        table = measured(folder, args.rows, args.width, kills=not args.no_kills)
    finally:
        shutil.rmtree(folder)
    last = table.get("with_three_kills", table["whole"])
    finish("prepare", last["seconds"] / table["whole"]["seconds"], table, args.json)


def measured(folder: Path, rows: int, width: int = WIDTH, kills: bool = True) -> dict:
    start = time.process_time()
    size = draw(folder / "data", rows, width)
    print(f"{rows:,} rows drawn, {size / 1e6:,.0f} MB, {time.process_time() - start:.0f} s", flush=True)
    quarter = shortened(folder / "data", rows // 4)
    runs = {
        "quarter": prepare(quarter, folder / "data/photos", folder / "quarter"),
        "whole": prepare(folder / "data/train.json", folder / "data/photos", folder / "whole"),
    }
    told = json.loads((folder / "whole/prepared.json").read_text())["counts"]
    killed = disturbed(folder) if kills else None
    for name, run in (runs | ({"with three kills": killed} if kills else {})).items():
        print(f"{name}: {run.seconds:.0f} s ({run.told()}), {run.held()}", flush=True)
    whole = runs["whole"]
    print(f"{rows / whole.seconds:.0f} photos a second and core", flush=True)
    projection = projected(runs["quarter"], whole, rows // 4, rows)
    hours, gigabytes = projection["hours"], projection["own_gigabytes"]
    print(f"{PROJECTED:,} rows: {hours:.1f} hours of a core, {gigabytes:.1f} GB of their own")
    table = {
        "rows": rows,
        "photos": f"{width} x {width * 4 // 5} JPEG, --max_side {MAX_SIDE}, one worker",
        "bytes": size,
        "counts": told,
        "quarter": runs["quarter"].table(),
        "whole": whole.table(),
        "photos_per_second_and_core": rows / whole.seconds,
        "projection": {"rows": PROJECTED, **projection},
    }
    if kills:
        table["with_three_kills"] = {**killed.table(), "kills": killed.kills, "equal_to_the_last_byte": True}
    return table


def held(folder: Path, rows: int, width: int = WIDTH) -> dict:
    """What a quarter and the whole hold at most in each phase until some photos are compared."""
    draw(folder / "data", rows, width)
    tables = {"quarter": shortened(folder / "data", rows // 4), "whole": folder / "data/train.json"}
    runs = {}
    for name, table in tables.items():
        runs[name] = prepare(table, folder / "data/photos", folder / name, kill=ENDED_AT)
        shutil.rmtree(folder / name)
        phases = ", ".join(f"{phase} {own / 1e9:.3f}" for phase, own in runs[name].own_of_phases.items())
        print(f"{name}: {runs[name].held()} ({phases}), {runs[name].seconds:.0f} s", flush=True)
    owns = [runs[name].own_of_phases for name in ("quarter", "whole")]
    projection = {phase: line(rows // 4, owns[0][phase], rows, own) / 1e9 for phase, own in owns[1].items()}
    print(f"{PROJECTED:,} rows: " + ", ".join(f"{phase} {own:.2f} GB" for phase, own in projection.items()))
    return {
        "rows": rows,
        "photos": f"{width} x {width * 4 // 5} JPEG, one worker, ended when {ENDED_AT[1]:.0%} of them are compared",
        **{name: run.table() for name, run in runs.items()},
        "projection": {"rows": PROJECTED, "own_gigabytes_of_phases": projection},
    }


def disturbed(folder: Path) -> Run:
    """The whole once more, killed in each phase.

    Raises:
        RuntimeError: another catalogue comes of it.
    """
    before = files_of(folder / "whole")
    shutil.rmtree(folder / "whole")
    # The folder is called the same, since the card says how it is called.
    killed = Run()
    for phase, share in KILLED_AT.items():
        killed += prepare(folder / "data/train.json", folder / "data/photos", folder / "whole", kill=(phase, share))
    killed += prepare(folder / "data/train.json", folder / "data/photos", folder / "whole")
    if files_of(folder / "whole") != before:
        raise RuntimeError("the catalogue of the run that was killed is another one")
    return killed


# --- the catalogue ----------------------------------------------------------------------------------------------------


def draw(folder: Path, rows: int, width: int) -> int:
    """Photos of large shapes, which differ for every number. Returns their bytes."""
    photos = folder / "photos"
    photos.mkdir(parents=True)
    records, size, shape = [], 0, (width, width * 4 // 5)
    for number in range(rows):
        copy = number % COPIES == COPIES - 1
        generator = np.random.default_rng(number - 7 if copy else number)
        cells = Image.fromarray(generator.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        image = cells.resize((shape[0] // 2, shape[1] // 2) if copy else shape, Image.Resampling.BICUBIC)
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=85)
        data = b"no photo" if number % BROKEN == 0 else stream.getvalue()
        (photos / f"{number:07d}.jpg").write_bytes(data)
        size += len(data)
        records.append({"product": f"{number:07d}.jpg", "caption": f"thing {number % 1000} of kind {number // 1000}"})
    (folder / "train.json").write_text(json.dumps(records))
    return size


def shortened(folder: Path, rows: int) -> Path:
    records = json.loads((folder / "train.json").read_text())[:rows]
    (folder / "quarter.json").write_text(json.dumps(records))
    return folder / "quarter.json"


def files_of(folder: Path) -> dict[str, str]:
    """Digests of all files, by their paths."""
    return {
        str(path.relative_to(folder)): hashlib.blake2b(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- the command ------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What a command took, or several that went on with one work.

    Attributes:
        seconds: of the processor.
        phases: the same by phases; "open" is what lies before them.
        memory, own: bytes at most, with pages of mapped files and without.
        own_of_phases: the latter by phases.
        kills: by phase, the share of its tasks that was done.
    """

    seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    memory: int = 0
    own: int = 0
    own_of_phases: dict[str, int] = field(default_factory=dict)
    kills: dict[str, float] = field(default_factory=dict)

    def __add__(self, other: Run) -> Run:
        names = dict.fromkeys([*self.phases, *other.phases])
        phases = {name: self.phases.get(name, 0.0) + other.phases.get(name, 0.0) for name in names}
        kills = self.kills | other.kills
        memory, own = max(self.memory, other.memory), max(self.own, other.own)
        owns = {name: max(self.own_of_phases.get(name, 0), other.own_of_phases.get(name, 0)) for name in phases}
        return Run(self.seconds + other.seconds, phases, memory, own, owns, kills)

    def table(self) -> dict:
        return {
            "seconds": self.seconds,
            "phases": self.phases,
            "gigabytes": self.memory / 1e9,
            "own_gigabytes": self.own / 1e9,
            "own_gigabytes_of_phases": {name: own / 1e9 for name, own in self.own_of_phases.items()},
        }

    def told(self) -> str:
        return ", ".join(f"{name} {seconds:.0f}" for name, seconds in self.phases.items())

    def held(self) -> str:
        return f"{self.memory / 1e9:.2f} GB, {self.own / 1e9:.2f} GB of their own"


def prepare(table: Path, photos: Path, output_dir: Path, kill: tuple[str, float] | None = None) -> Run:
    """Run the command, and kill it when so many tasks of a phase are done.

    Raises:
        RuntimeError: it failed, or ended before it was killed.
    """
    command = [sys.executable, "-m", "aliblip.prepare", "--train_file", table, "--image_dir", photos]
    command += ["--output_dir", output_dir, "--max_side", MAX_SIDE, "--workers", "1", "--rows_per_task", "500"]
    command += ["--split_by", "product"]
    log = output_dir.with_suffix(".log")
    with open(log, "w") as file:
        process = subprocess.Popen([*map(str, command)], cwd=ROOT, stdout=file, stderr=file)
    watched = _Watched(process, output_dir / "work")
    run = Run()
    while process.poll() is None:
        watched.look()
        if kill is not None and watched.done(kill[0]) >= kill[1]:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            run.kills[kill[0]] = watched.done(kill[0])
            break
        time.sleep(SECONDS)
    if kill is not None and not run.kills:
        raise RuntimeError(f"the command ended before it could be killed in the phase {kill[0]}")
    if process.returncode and kill is None:
        raise RuntimeError(f"the command failed: {log.read_text()}")
    run.phases, run.seconds = watched.phases, sum(watched.phases.values())
    run.memory, run.own, run.own_of_phases = watched.memory, watched.own, watched.own_of_phases
    return run


class _Watched:
    """A process and those that it starts, looked at from time to time."""

    def __init__(self, process: subprocess.Popen, work: Path):
        self._process, self._work = psutil.Process(process.pid), work
        self._seconds: dict[int, float] = {}  # of each process, the last that was seen
        self.phases: dict[str, float] = {}
        self.memory = self.own = 0
        self.own_of_phases: dict[str, int] = {}

    def look(self) -> None:
        processes, memory, own = [], 0, 0
        try:
            processes = [self._process, *self._process.children(recursive=True)]
        except psutil.Error:
            return
        for process in processes:
            try:
                times = process.cpu_times()
                held = _held(process.pid)
            except (psutil.Error, OSError):
                continue
            memory, own = memory + held.get("Pss", 0), own + held.get("Pss_Anon", 0)
            spent = times.user + times.system
            phase = self._phase()
            self.phases[phase] = self.phases.get(phase, 0.0) + spent - self._seconds.get(process.pid, 0.0)
            self._seconds[process.pid] = spent
        self.memory, self.own = max(self.memory, memory), max(self.own, own)
        phase = self._phase()
        self.own_of_phases[phase] = max(self.own_of_phases.get(phase, 0), own)

    def _phase(self) -> str:
        begun = [phase for phase in PHASES if (self._work / "logs" / phase).is_dir()]
        if not begun:
            return "card" if "write" in self.phases else "open"
        return begun[-1] if self.done(begun[-1]) < 1 else PHASES[begun[-1]]

    def done(self, phase: str) -> float:
        """The share of the tasks of a phase that are done."""
        notes = self._work / "logs" / phase / "completions"
        if not notes.is_dir():
            return 0.0
        try:
            tasks = json.loads((notes.parent / "executor.json").read_text())["world_size"]
        except (OSError, ValueError):  # it is being written
            return 0.0
        return len(list(notes.iterdir())) / tasks


def _held(pid: int) -> dict[str, int]:
    """Bytes of memory that a process holds, by the names of Linux."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {name: int(size.split()[0]) * 1024 for name, size in (line.split(":") for line in lines)}


# --- more rows --------------------------------------------------------------------------------------------------------


def projected(quarter: Run, whole: Run, few: int, many: int) -> dict[str, float]:
    """Hours of a core and gigabytes for `PROJECTED` rows."""
    seconds = {}
    for phase in whole.phases:
        one, other = quarter.phases.get(phase, 0.0), whole.phases[phase]
        if phase in BENT:
            power = max(math.log(max(other, 1e-3) / max(one, 1e-3)) / math.log(many / few), 1.0)
            seconds[phase] = other * (PROJECTED / many) ** power
        else:
            seconds[phase] = line(few, one, many, other)
    phases = {name: value / 3600 for name, value in seconds.items()}
    own = line(few, quarter.own, many, whole.own) / 1e9
    return {"hours": sum(phases.values()), "hours_of_phases": phases, "own_gigabytes": own}


def line(few: int, one: float, many: int, other: float) -> float:
    """The value at `PROJECTED` of the line through two points that does not fall."""
    return other + max(other - one, 0.0) / (many - few) * (PROJECTED - many)


if __name__ == "__main__":
    main()
