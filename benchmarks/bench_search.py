"""Search: the chunked exact top-k against `torch.topk` of the whole score matrix; memory, and cost at three sizes.

    python benchmarks/bench_search.py --threads 1 --json benchmarks/results/search.json    # a few minutes
    python benchmarks/bench_search.py --gallery 3000 --queries 20                          # seconds, to try it

Random unit embeddings of width 256, fp32 on the CPU; the largest gallery is 1,000,000 items by default. First the
gallery grows at a fixed number of queries, then the queries grow at a fixed gallery: the seconds per query and item say
whether the cost is linear. The whole matrix runs beside it at every size where it fits into `--full_matrix_gb`, in
turn, and has to give the same scores. Peak memory is that of the process above what it held before the call, as the
kernel counts it (Linux only). The last line is the time of the whole matrix over that of the search, at the largest
size where both ran.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

import retrieval_aliblip as engine
from benchmarks.common import finish, parser


def main(command_line: list[str] | None = None) -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--gallery", type=int, default=1_000_000, help="items; also measured with 1/4 and 1/2 of it")
    arguments.add_argument("--queries", type=int, default=512, help="also measured with twice and four times as many")
    arguments.add_argument("--width", type=int, default=256)
    arguments.add_argument("--k", type=int, default=128)
    arguments.add_argument("--full_matrix_gb", type=float, default=1.1, help="largest score matrix to compare with")
    args = arguments.parse_args(command_line)
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(0)
    gallery = unit_vectors(args.gallery, args.width, generator)
    queries = unit_vectors(4 * args.queries, args.width, generator)
    by_gallery = [(args.queries, args.gallery // part) for part in (4, 2, 1)]
    by_queries = [(args.queries * times, args.gallery // 4) for times in (1, 2, 4)]
    sizes = list(dict.fromkeys([*by_gallery, *by_queries]))
    with torch.inference_mode():
        engine.search(queries[:8], gallery[: 2 * args.k], args.k)  # what is set up at the first call is not measured
        rows = [measure(queries[:q], gallery[:n], args) for q, n in sizes]
    for row in rows:
        whole = "does not fit"
        if row["whole"] is not None:
            whole = f"{row['whole']['median_seconds']:7.2f} s, {row['whole']['peak_bytes'] / 1e9:5.3f} GB"
        print(
            f"{row['queries']:6,} queries x {row['items']:9,} items  {row['search']['median_seconds']:7.2f} s, "
            f"{row['search']['peak_bytes'] / 1e9:5.3f} GB, {row['nanoseconds_per_score']:.2f} ns a score   "
            f"whole matrix: {whole}"
        )
    costs = {
        name: [row["nanoseconds_per_score"] for row in rows if (row["queries"], row["items"]) in group]
        for name, group in (("gallery", by_gallery), ("queries", by_queries))
    }
    for name, values in costs.items():
        print(f"cost of a score as the {name} grows: {max(values) / min(values):.3f} from least to most (1 = linear)")
    both = [row for row in rows if row["whole"] is not None]
    if not both:
        arguments.error(f"no score matrix fits into --full_matrix_gb {args.full_matrix_gb}: give more")
    largest = max(both, key=lambda row: row["queries"] * row["items"])
    ratio = largest["whole"]["median_seconds"] / largest["search"]["median_seconds"]
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    peak = max(row["search"]["peak_bytes"] for row in rows)
    print(f"largest peak of the search: {peak / 1e9:.3f} GB above the embeddings")
    finish("search", ratio, {"sizes": rows, "peak_bytes": peak, "settings": settings}, args.json)


def unit_vectors(count: int, width: int, generator: torch.Generator) -> Tensor:
    vectors = torch.randn(count, width, generator=generator)
    return vectors.div_(vectors.norm(dim=1, keepdim=True))


def measure(queries: Tensor, gallery: Tensor, args) -> dict:
    sides: dict[str, Callable] = {"search": lambda: engine.search(queries, gallery, args.k)}
    if len(queries) * len(gallery) * 4 <= args.full_matrix_gb * 1e9:
        sides["whole"] = lambda: (queries @ gallery.t()).topk(args.k, dim=1)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    peaks: dict[str, list[int]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        outputs = {}
        for name, side in sides.items():
            before = start_peak()
            start = time.perf_counter()
            outputs[name] = side()
            seconds[name].append(time.perf_counter() - start)
            peaks[name].append(memory("VmHWM") - before)
        if "whole" in outputs:
            torch.testing.assert_close(outputs["search"][0], outputs["whole"][0], atol=1e-5, rtol=0)
    found = {
        name: {
            "median_seconds": statistics.median(seconds[name]),
            "seconds": [round(value, 3) for value in seconds[name]],
            "peak_bytes": max(peaks[name]),
        }
        for name in sides
    }
    return {
        "queries": len(queries),
        "items": len(gallery),
        "nanoseconds_per_score": found["search"]["median_seconds"] / (len(queries) * len(gallery)) * 1e9,
        "search": found["search"],
        "whole": found.get("whole"),
    }


def start_peak() -> int:
    """Set the peak of this process back to what it holds now, and return that, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    main()
