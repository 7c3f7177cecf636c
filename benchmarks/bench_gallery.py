"""A gallery: building, saving, memory-mapped loading, and search in fp32, fp16, int8 and FAISS; speed, memory, recall.

    python benchmarks/bench_gallery.py --threads 1 --json benchmarks/results/gallery.json   # some minutes, 2 GB of disk
    python benchmarks/bench_gallery.py --items 3000 --queries 8                               # seconds, to try it

Random unit vectors of width 256; 1,000,000 items by default. Two kinds of queries: random ones, for which recall@10 is
hardest, since the ten best of them are hardly better than the next ones; and near ones, an item plus as much noise,
for which it counts how often that item is found first. Recall is against exact search in fp32. All galleries are saved
and loaded again; the memory is that of a fresh process (Linux only): what it adds when it loads the gallery, and when
it has searched once, apart into what only it holds (anonymous) and pages of the files, which the system can take back.

Speed is measured in turn, with one query and with `--queries` at a time. The last line is the time of the engine's
search over the fp32 vectors in memory, over that of the memory-mapped fp32 gallery, with `--queries` at a time.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

import retrieval_aliblip as engine
from benchmarks.bench_search import unit_vectors
from benchmarks.common import finish, parser
from gallery_aliblip import Gallery
from storage_aliblip import VECTOR_TYPES

ROOT = Path(__file__).resolve().parent.parent
K = 10

FRESH_PROCESS = """
import json, sys, time
import torch
from gallery_aliblip import Gallery
from pathlib import Path

def memory():
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")}

torch.set_num_threads(1)
torch.ones(64, 64) @ torch.ones(64, 64)  # what is set up at the first product is not measured
before, start = memory(), time.perf_counter()
gallery = Gallery.load(sys.argv[1])
seconds, loaded = time.perf_counter() - start, memory()
gallery.search(gallery.vectors(0, 1), 10)
searched = memory()
added = lambda after: {"anonymous": after["RssAnon"] - before["RssAnon"], "file": after["RssFile"] - before["RssFile"]}
print(json.dumps({"load_seconds": seconds, "loaded": added(loaded), "searched": added(searched)}))
"""


def main(command_line: list[str] | None = None) -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--items", type=int, default=1_000_000)
    arguments.add_argument("--queries", type=int, default=64, help="searched at a time; recall is of ten times as many")
    arguments.add_argument("--width", type=int, default=256)
    arguments.add_argument("--types", nargs="+", default=list(VECTOR_TYPES), choices=list(VECTOR_TYPES))
    arguments.add_argument("--nprobe", type=int, default=32, help="lists that FAISS searches for a query")
    args = arguments.parse_args(command_line)
    if "float32" not in args.types:
        arguments.error("--types: float32 is what the others are compared with")
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(0)
    vectors = unit_vectors(args.items, args.width, generator)
    random = unit_vectors(10 * args.queries, args.width, generator)
    own = torch.randint(args.items, (len(random),), generator=generator)
    near = vectors[own] + unit_vectors(len(own), args.width, generator)
    near /= near.norm(dim=1, keepdim=True)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        galleries, table = {}, {}
        for dtype in args.types:
            galleries[dtype], table[dtype] = make(vectors, dtype, Path(folder) / dtype)
        searches: dict[str, Callable] = {"engine, in memory": lambda q: engine.search(q, vectors, K)}
        for dtype, gallery in galleries.items():
            searches[dtype] = lambda q, gallery=gallery: gallery.search(q, K)
        faiss_row = add_faiss(galleries["float32"], args.nprobe)
        if faiss_row is not None:
            table["faiss"] = faiss_row
            searches["faiss"] = lambda q: galleries["float32"].search(q, K, approximate=True)
        wanted = searches["float32"](random)[1]
        for name, search in searches.items():
            row = table.setdefault(name, {})
            found, first = search(random)[1], search(near)[1][:, 0]
            row["recall@10_random"] = (found[:, :, None] == wanted[:, None]).any(1).float().mean().item()
            row["recall@1_near"] = (first == own).float().mean().item()
        for size, queries in (("one", random[:1]), ("many", random[: args.queries])):
            for name, seconds in in_turn(searches, queries, args.rounds).items():
                table[name][f"seconds_{size}"] = [round(value, 4) for value in seconds]
                table[name][f"queries_per_second_{size}"] = len(queries) / statistics.median(seconds)
    for name, row in table.items():
        print(describe(name, row, args.queries))
    ratio = statistics.median(table["engine, in memory"]["seconds_many"]) / statistics.median(
        table["float32"]["seconds_many"]
    )
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    finish("gallery", ratio, {"galleries": table, "settings": settings}, args.json)


def make(vectors: Tensor, dtype: str, folder: Path) -> tuple[Gallery, dict]:
    start = time.perf_counter()
    gallery = Gallery.from_vectors(vectors, dtype=dtype)
    built = time.perf_counter()
    gallery.save(folder)
    saved = time.perf_counter()
    command = [sys.executable, "-c", FRESH_PROCESS, str(folder)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return Gallery.load(folder), {
        "build_seconds": built - start,
        "save_seconds": saved - built,
        "file_bytes": sum(path.stat().st_size for path in folder.iterdir()),
        **json.loads(ended.stdout.splitlines()[-1]),
    }


def add_faiss(gallery: Gallery, nprobe: int) -> dict | None:
    start = time.perf_counter()
    try:
        gallery.add_faiss_index(nprobe=nprobe)
    except ImportError:
        return None
    return {"build_seconds": time.perf_counter() - start, "nprobe": nprobe}


def in_turn(searches: dict[str, Callable], queries: Tensor, rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in searches}
    for _ in range(rounds):
        for name, search in searches.items():
            start = time.perf_counter()
            search(queries)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def describe(name: str, row: dict, queries: int) -> str:
    lines = [
        f"{name}: recall@10 of random queries {row['recall@10_random']:.4f}, near queries' item first "
        f"{row['recall@1_near']:.4f}; {row['queries_per_second_one']:.3g} queries per second one at a time, "
        f"{row['queries_per_second_many']:.3g} by {queries}"
    ]
    if "build_seconds" in row:
        lines.append(f"  built in {row['build_seconds']:.1f} s")
    if "loaded" in row:
        loaded, searched = row["loaded"], row["searched"]
        lines.append(
            f"  saved in {row['save_seconds']:.1f} s, {row['file_bytes'] / 1e6:,.0f} MB; loaded in "
            f"{row['load_seconds'] * 1000:.0f} ms with {loaded['anonymous'] / 1e6:.0f} MB of memory, after a search "
            f"{searched['anonymous'] / 1e6:.0f} MB and {searched['file'] / 1e6:,.0f} MB of file pages"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
