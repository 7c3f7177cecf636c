"""kill -9 in the middle of a build, an upsert and an index, again and again: nothing is lost, nothing is half there.

Real processes and real kills. The full minute of two writers and four searching threads: ALIBLIP_SOAK_SECONDS=60.
"""

import os
import random
import signal
import sys
import threading
import time

import gallery_case as case
import numpy as np
import pytest
import torch
from gallery_case import COUNT, build, unit_vectors, vector_table
from helpers import ROOT, environment, start_forked

from aliblip import Gallery
from aliblip.runtime.mistakes import UsageError

SECONDS = float(os.environ.get("ALIBLIP_SOAK_SECONDS", "4"))

SCRIPT = """
import sys, time
import gallery_case as case
from aliblip import Gallery
from aliblip.runtime import parts

parts.SECONDS = -1.0                                    # every block is noted at once
action, place, *given = sys.argv[1:]
print("ready", flush=True)
if action == "build":
    case.build(case.rows_of(given), place, store_tokens=True, unit_size=2, batch_size=1)
else:
    gallery = Gallery.open(place)
    for turn in range(10_000):
        if action == "upsert":
            ids = [f"item {n}" for n in range(100)] + [f"new {n}" for n in range(100)]
            gallery.upsert_vectors(case.vector_table(case.unit_vectors(200, seed=1000 + turn), ids, turn=[turn] * 200))
        elif action == "remove":
            gallery.remove(where="turn >= 0")
            gallery.upsert_vectors(case.vector_table(case.unit_vectors(200, seed=1000 + turn), turn=[turn] * 200))
        elif action == "index":
            gallery.create_index("IVF_PQ", columns=["turn"], measure_recall=0, quiet=True)
        else:
            gallery.optimize()
        print(turn, flush=True)
"""


class Changing:
    """A process that changes a gallery."""

    def __init__(self, tmp_path, *arguments):
        script = tmp_path / "script.py"
        script.write_text(SCRIPT)
        self.out, self.err = (tmp_path / f"{name}.{time.monotonic_ns()}" for name in ("out", "err"))
        env = environment(PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        self.process = start_forked([sys.executable, script, *arguments], env, self.out, self.err)
        self.wait_for("ready")  # its imports are over

    def wait_for(self, line: str, timeout: float = 120) -> None:
        end = time.monotonic() + timeout
        while line not in (self.out.read_text().splitlines() if self.out.exists() else ()):
            assert self.is_alive() and time.monotonic() < end, self.err.read_text()
            time.sleep(0.002)

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        assert self.is_alive(), self.err.read_text()
        os.kill(self.process.pid, signal.SIGKILL)
        assert self.process.wait(30) == -signal.SIGKILL


def test_a_killed_build_goes_on_and_is_equal(tmp_path):
    paths = case.photos(tmp_path / "photos")
    expected = build(case.rows_of(paths), tmp_path / "expected", store_tokens=True, unit_size=2, batch_size=1)
    expected = expected._now().dataset.to_table()
    generator, kills, folder = random.Random(0), 0, tmp_path / "g" / "build"
    for turn in range(12):
        process = Changing(tmp_path, "build", tmp_path / "g", *paths)
        # at the first block that this process has noted, and at some time between two blocks
        begun = len(list(folder.glob("blocks.*"))) if folder.exists() else 0
        while process.is_alive() and not (folder.exists() and len(list(folder.glob("blocks.*"))) > begun + turn % 3):
            time.sleep(0.002)
        time.sleep(generator.random() * 0.02)
        if not process.is_alive():
            break
        process.kill()
        kills += 1
        if (tmp_path / "g" / "items.lance" / "_versions").exists():  # killed after its commit
            assert Gallery.open(tmp_path / "g")._now().dataset.to_table().equals(expected)
            break
        with pytest.raises(UsageError, match="was not built to its end"):
            Gallery.open(tmp_path / "g")
    assert kills >= 2
    gallery = build(case.rows_of(paths), tmp_path / "g", store_tokens=True, unit_size=2, batch_size=1, overwrite=True)
    assert gallery._now().dataset.to_table().equals(expected)
    assert len(gallery) == COUNT - 1 and not (tmp_path / "g" / "build").exists()


@pytest.fixture
def gallery(tmp_path):
    made = Gallery.from_vectors(vector_table(unit_vectors(600), turn=[-1] * 600), tmp_path / "g")
    made.create_index("IVF_FLAT", columns=["turn"], measure_recall=0, quiet=True)
    return made


def check_whole(gallery) -> None:
    """Every id once, rows of one change all there or none, and the index finds what exact search finds."""
    table = gallery._now().dataset.to_table(columns=["id", "turn", "vector"])
    ids, turns = table["id"].to_pylist(), np.array(table["turn"].to_pylist())
    assert len(set(ids)) == len(ids)
    changed = turns[turns >= 0]
    assert len(set(changed.tolist())) <= 1 and len(changed) in (0, 200)
    for where, rows in ((None, turns >= -1), ("turn >= 0", turns >= 0), ("turn < 0", turns < 0)):
        for place in rows.nonzero()[0][-3:]:
            query = torch.tensor(table["vector"][int(place)].as_py())
            for approximate in (None, False):
                found = gallery.search(query, 1, where=where, approximate=approximate)[0][0]
                assert found["itc"] == pytest.approx(1, abs=1e-4) and found["id"] == ids[place]


@pytest.mark.parametrize("action", ["upsert", "remove", "index", "optimize"])
def test_kills_in_the_middle_of_changes(action, gallery, tmp_path):
    generator = random.Random(action)
    for turn in range(4):
        if action == "optimize":
            gallery.upsert_vectors(vector_table(unit_vectors(200, seed=1000 + turn), turn=[0] * 200))
        process = Changing(tmp_path, action, gallery.uri)
        process.wait_for("0")  # one change is done
        time.sleep(generator.random() * 0.05)
        process.kill()
        rows = len(gallery)
        assert rows in {"upsert": (700,), "remove": (400, 600)}.get(action, (600,))
        check_whole(gallery)
        # the next writer is not held up by what the dead one held
        gallery.upsert_vectors(vector_table(unit_vectors(1, seed=9), ["item 599"], turn=[-1]))
        assert gallery.search(unit_vectors(1, seed=9), 1)[0][0]["id"] == "item 599"
    if action == "index":
        assert gallery.has_index
    gallery.optimize()
    check_whole(gallery)


def test_every_answer_is_one_of_some_version_while_two_processes_write(tmp_path):
    """Each change writes 200 rows of one turn: an answer that mixes turns, or lacks rows, is of no version."""
    gallery = Gallery.from_vectors(vector_table(unit_vectors(600), turn=[-1] * 600), tmp_path / "g")
    gallery.create_index("IVF_FLAT", columns=["turn"], measure_recall=0, quiet=True)
    gallery.upsert_vectors(
        vector_table(
            unit_vectors(200), [f"item {n}" for n in range(100)] + [f"new {n}" for n in range(100)], turn=[0] * 200
        )
    )
    writers = [Changing(tmp_path, "upsert", gallery.uri) for _ in range(2)]
    end, failures, answers = time.monotonic() + SECONDS, [], []

    def search(number):
        mine = gallery if number % 2 else Gallery.open(gallery.uri)
        queries = unit_vectors(3, seed=number)
        while time.monotonic() < end:
            hits = mine.search(
                queries, 700, approximate=False if number > 1 else None, where="turn >= 0", columns=["turn"]
            )
            for found in hits:
                turns, ids = {hit["turn"] for hit in found}, {hit["id"] for hit in found}
                if len(turns) != 1 or len(ids) != 200 or len(found) != 200:
                    failures.append((len(turns), len(ids), len(found)))
                answers.append(turns)

    threads = [threading.Thread(target=search, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for process in writers:
        process.kill()
    assert not failures
    assert len(answers) > 20 and len(set(map(frozenset, answers))) > 3
    assert len(gallery) == 700
