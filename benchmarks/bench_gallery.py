"""A gallery of millions: build, index, search, filters, changes; and beside it the store of version 0.1.0.

    python benchmarks/bench_gallery.py --json benchmarks/results/gallery.json         # 1,000,000 and 10,000,000 rows
    python benchmarks/bench_gallery.py --rows 1000000 --before ../aliblip-0.1.0       # a checkout of that version
    python benchmarks/bench_gallery.py --rows 3000 --queries 8 --rounds 1             # seconds, to try it

The vectors lie in clusters of 50, as the embeddings of a catalogue do (variants of a product): a random centre and, for
each row, as much noise as `--spread` says, all of length 1. (Uniform noise has no near neighbours: it is the worst case
of every index, and nobody's data.) Queries are further members of random clusters. Recall@10 is the share of the ten
best of exact search that is found; times are of one query after another, medians.

Exact search is measured three ways, in turn: by codes in memory and the true scores of the best (what it does where
there is room), by vectors in memory, and by reading all of them from the table; and beside them FAISS's flat and SQ8
indices where FAISS is installed, in as many threads, up to 2,000,000 rows.

Filters leave 10 %, 1 % and 0.1 % of the rows: queries that all have the same one, as those of a visitor do, and queries
that each have another, whose rows are looked up first. An upsert embeds nothing here: it is the table's share. The last
line is the time of an exact query over one by the index, at the largest size.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pyarrow as pa
import torch

from aliblip.retrieval import exact
from aliblip.retrieval.galleries import Gallery
from aliblip.retrieval.indexing import IndexSettings, index_settings
from benchmarks.common import finish, parser

ROOT = Path(__file__).resolve().parent.parent
K = 10
CLUSTER = 50
BATCH = 50_000
FAISS_ROWS = 2_000_000
SELECTIVITIES = {"10 %": 10, "1 %": 1, "0.1 %": 0.1}
CATEGORIES = 10

OPEN = """
import sys, time
import numpy, torch
from aliblip.retrieval.galleries import Gallery
query = torch.from_numpy(numpy.load(sys.argv[2]))
start = time.perf_counter()
Gallery.open(sys.argv[1]).search(query, 10, columns=[])
print(time.perf_counter() - start)
"""


class Clusters:
    """Rows that can be made again from their numbers, a batch at a time; (n, E) fp32 of length 1."""

    def __init__(self, rows: int, width: int, spread: float):
        self.rows, self.width, self.spread = rows, width, spread
        self.count = max(rows // CLUSTER, 1)
        self.centres = self._unit(np.random.default_rng(0).standard_normal((self.count, width), dtype=np.float32))

    @staticmethod
    def _unit(vectors: np.ndarray) -> np.ndarray:
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def members(self, clusters: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        noise = self._unit(rng.standard_normal((len(clusters), self.width), dtype=np.float32))
        return self._unit(self.centres[clusters] + self.spread * noise)

    def batch(self, start: int) -> np.ndarray:
        numbers = np.arange(start, min(start + BATCH, self.rows), dtype=np.int64)
        # Neighbours do not lie side by side: the numbers are spread over the clusters.
        return self.members((numbers * 7919) % self.count, np.random.default_rng((1, start)))

    def batches(self) -> Iterator[tuple[int, np.ndarray]]:
        for start in range(0, self.rows, BATCH):
            yield start, self.batch(start)

    def queries(self, count: int) -> torch.Tensor:
        rng = np.random.default_rng(2)
        return torch.from_numpy(self.members(rng.integers(0, self.count, count), rng))


def numbered(first: int, vectors: np.ndarray) -> pa.RecordBatch:
    return table_of(np.arange(first, first + len(vectors)), vectors)


def table_of(ids: np.ndarray, vectors: np.ndarray) -> pa.RecordBatch:
    numbers = ids.astype(np.int64)
    mixed = (numbers * 2654435761) % 100_000  # 0 to 99,999, evenly
    return pa.record_batch(
        {
            "id": numbers,
            "price": mixed / 1000.0,  # 0 to 100: `price < 10` leaves 10 %
            "category": pa.array([f"c{number}" for number in (mixed % CATEGORIES)]),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1]),
        }
    )


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def median_of(call: Callable[[int], object], rounds: int) -> float:
    return statistics.median(seconds(lambda number=number: call(number)) for number in range(rounds))


def ids_of(found: list[list[dict]]) -> list[set[int]]:
    return [{hit["id"] for hit in hits} for hits in found]


def recall(found: list[set], wanted: list[set]) -> float:
    return float(np.mean([len(one & other) / len(other) for one, other in zip(found, wanted, strict=True)]))


def one_by_one(search: Callable, queries: torch.Tensor) -> tuple[list[set], list[float]]:
    found, taken = [], []
    for query in queries:
        start = time.perf_counter()
        hits = search(query[None])
        taken.append(time.perf_counter() - start)
        found += ids_of(hits)
    return found, taken


def measure(rows: int, folder: Path, args) -> dict:
    """Everything about one size."""
    data = Clusters(rows, args.width, args.spread)
    schema = numbered(0, data.batch(0)[:1]).schema
    reader = pa.RecordBatchReader.from_batches(schema, (numbered(first, one) for first, one in data.batches()))
    row: dict = {"rows": rows, "write_seconds": seconds(lambda: Gallery.from_vectors(reader, folder))}
    gallery = Gallery.open(folder)
    queries = data.queries(args.queries)
    gallery.search(queries[:1], K, approximate=False, columns=[])  # what is kept is read
    some = queries[: args.exact_queries]
    wanted, taken = one_by_one(lambda q: gallery.search(q, K, approximate=False, columns=[]), some)
    row["exact"] = {"milliseconds": 1000 * statistics.median(taken), "queries": len(some)}
    print(
        f"{rows:,} rows: written in {row['write_seconds']:.0f} s; exact {row['exact']['milliseconds']:.1f} ms a query",
        flush=True,
    )
    row["exact_ways"] = exact_ways(folder, data, queries[: args.exact_rounds])
    row["settings"] = []
    default = index_settings(rows, args.width, "IVF_PQ" if rows >= args.index_rows else None)
    tried = [IndexSettings(**{**default.as_json(), **change}) for change in variants(default)] if default else []
    if tried:
        report = gallery.create_index(columns=["price", "category"], measure_recall=0, settings=default, quiet=True)
        row["index_seconds"] = report.seconds
    for settings in tried:
        row["settings"].append(by_index(gallery, settings, queries, wanted, args, settings == default))
    row["bytes"] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    row["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    np.save(folder.parent / "query.npy", queries[:1].numpy())
    command = [sys.executable, "-c", OPEN, str(folder), str(folder.parent / "query.npy")]
    opened = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    row["open_and_first_query_seconds"] = float(opened.stdout)
    row["filters"] = filtered(gallery, queries, args)
    row["changes"] = changes(gallery, data, args)
    return row


def exact_ways(folder: Path, data: Clusters, queries: torch.Tensor) -> dict:
    """Milliseconds of an exact query in each way, medians; the ways take turns, and find the same scores."""
    ways: dict[str, Callable[[torch.Tensor], list[float]]] = {}
    for name, share, codes in (("codes", exact.MEMORY_SHARE, True), ("vectors", 0.75, False), ("table", 0.0, False)):
        gallery = Gallery.open(folder)
        if codes and not exact.codes_pay():
            continue

        def search(query, gallery=gallery, share=share, codes=codes) -> list[float]:
            before = exact.MEMORY_SHARE, exact.codes_pay
            exact.MEMORY_SHARE, exact.codes_pay = share, lambda: codes
            try:
                return [hit["itc"] for hit in gallery.search(query[None], K, approximate=False, columns=[])[0]]
            finally:
                exact.MEMORY_SHARE, exact.codes_pay = before

        ways[name] = search
    if importlib.util.find_spec("faiss") and data.rows <= FAISS_ROWS:
        ways |= faiss_ways(data)
    first = {name: seconds(lambda way=way: way(queries[0])) for name, way in ways.items()}  # what is kept is read
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for query in queries:
        scores = {}
        for name, way in ways.items():
            start = time.perf_counter()
            scores[name] = way(query)
            taken[name].append(time.perf_counter() - start)
        for name in scores.keys() - {"faiss SQ8"}:  # whose scores are not the true ones
            if not np.allclose(scores[name], scores["table"], atol=1e-5):
                raise RuntimeError(f"exact search by {name} found other scores than by the table")
    found = {
        name: {
            "milliseconds": 1000 * statistics.median(times),
            "first_seconds": first[name],
            "table_over_it": statistics.median(taken["table"]) / statistics.median(times),
        }
        for name, times in taken.items()
    }
    told = (f"{name} {one['milliseconds']:.1f} ms ({one['table_over_it']:.1f})" for name, one in found.items())
    print(f"  exact search, and times as fast as reading the table: {', '.join(told)}", flush=True)
    return found


def faiss_ways(data: Clusters) -> dict[str, Callable[[torch.Tensor], list[float]]]:
    """FAISS's own exact search, and its search by codes alone."""
    faiss = importlib.import_module("faiss")
    faiss.omp_set_num_threads(torch.get_num_threads())
    inner = faiss.METRIC_INNER_PRODUCT
    flat = faiss.IndexFlatIP(data.width)
    coded = faiss.IndexScalarQuantizer(data.width, faiss.ScalarQuantizer.QT_8bit, inner)
    coded.train(data.batch(0))
    for _, one in data.batches():
        flat.add(one)
        coded.add(one)
    return {
        name: lambda query, index=index: index.search(query[None].numpy(), K)[0][0].tolist()
        for name, index in (("faiss flat", flat), ("faiss SQ8", coded))
    }


def variants(default: IndexSettings) -> list[dict]:
    """The default and, of the same index, other ways to ask it: they cost no second build."""
    probes = default.nprobes
    asked = [{"nprobes": max(probes // 4, 1)}, {"nprobes": max(probes // 2, 1)}, {}, {"nprobes": probes * 2}]
    if default.refine_factor is not None:
        asked += [{"refine_factor": max(default.refine_factor // 2, 1)}, {"refine_factor": default.refine_factor * 3}]
    return asked


def by_index(gallery: Gallery, settings: IndexSettings, queries, wanted, args, is_default: bool) -> dict:
    gallery._keep_index_settings(settings)
    gallery.refresh()
    gallery.search(queries[:1], K, approximate=True, columns=[])  # what is opened at the first query
    found, taken = one_by_one(lambda q: gallery.search(q, K, approximate=True, columns=[]), queries)
    result = {
        **settings.as_json(),
        "default": is_default,
        "milliseconds": 1000 * statistics.median(taken),
        "milliseconds_95": 1000 * float(np.quantile(taken, 0.95)),
        "queries_per_second": 1 / statistics.mean(taken),
        "recall_at_10": recall(found[: len(wanted)], wanted),
    }
    print(f"  {settings}: {result['milliseconds']:.1f} ms, recall@10 {result['recall_at_10']:.3f}", flush=True)
    return result


def filtered(gallery: Gallery, queries, args) -> dict:
    """Queries with filters of several selectivities, beside the same without one, in turn."""
    if gallery.has_index:  # as `create_index` leaves it
        gallery._keep_index_settings(index_settings(len(gallery), args.width, "IVF_PQ"))
        gallery.refresh()
    some = queries[: args.filtered_queries]
    found = {}
    _, plain = one_by_one(lambda q: gallery.search(q, K, columns=[]), some)
    for name, percent in SELECTIVITIES.items():
        where = {"where": "price < :most", "values": {"most": percent}}
        others = iter([percent * (1 - number / 10_000) for number in range(1, len(some) + 1)])
        _, first = one_by_one(
            lambda q, others=others: gallery.search(
                q, K, columns=[], where="price < :most", values={"most": next(others)}
            ),
            some,
        )
        approximate, taken = one_by_one(lambda q, where=where: gallery.search(q, K, columns=[], **where), some)
        wanted, _ = one_by_one(
            lambda q, where=where: gallery.search(q, K, columns=[], approximate=False, **where),
            some[: args.exact_queries],
        )
        found[name] = {
            "milliseconds": 1000 * statistics.median(taken),
            "times_unfiltered": statistics.median(taken) / statistics.median(plain),
            "first_milliseconds": 1000 * statistics.median(first),
            "first_times_unfiltered": statistics.median(first) / statistics.median(plain),
            "recall_at_10": recall(approximate[: len(wanted)], wanted),
        }
        print(
            f"  filter that leaves {name}: {found[name]['milliseconds']:.1f} ms, {found[name]['times_unfiltered']:.1f} "
            f"times as long; a filter's first query {found[name]['first_milliseconds']:.1f} ms, "
            f"{found[name]['first_times_unfiltered']:.1f} times; recall@10 {found[name]['recall_at_10']:.3f}",
            flush=True,
        )
    return found


def changes(gallery: Gallery, data: Clusters, args) -> dict:
    """Upserts of 1 and of 1,000 rows, half of them new, and deletes: seconds each."""
    rng = np.random.default_rng(3)

    def upsert(count: int) -> Callable[[int], object]:
        def call(number: int) -> object:
            vectors = data.members(rng.integers(0, data.count, count), rng)
            ids = rng.choice(2 * data.rows, count, replace=False)
            return gallery.upsert_vectors(pa.Table.from_batches([table_of(ids, vectors)]))

        return call

    found = {
        "upsert_1_seconds": median_of(upsert(1), args.rounds),
        "upsert_1000_seconds": median_of(upsert(1000), args.rounds),
        "remove_1_seconds": median_of(lambda number: gallery.remove([int(rng.integers(0, data.rows))]), args.rounds),
        "remove_1000_seconds": median_of(
            lambda number: gallery.remove([int(one) for one in rng.integers(0, data.rows, 1000)]), args.rounds
        ),
    }
    print("  " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()), flush=True)
    return found


# --- the store of version 0.1.0 ---------------------------------------------------------------------------------------


def store_of_before(checkout: Path):
    """The class `Gallery` of a checkout of version 0.1.0, under a package's name of its own."""
    package = types.ModuleType("aliblip_before")
    package.__path__ = [str(checkout)]  # its root files import each other as siblings in a package, as on the Hub
    sys.modules["aliblip_before"] = package
    return importlib.import_module("aliblip_before.gallery_aliblip").Gallery


def measure_before(checkout: Path, rows: int, folder: Path, args) -> dict:
    """The same of the store of before, as far as it has it: exact search, adding and removing."""
    data = Clusters(rows, args.width, args.spread)
    before = store_of_before(checkout)
    vectors = torch.empty(rows, args.width)
    for first, one in data.batches():
        vectors[first : first + len(one)] = torch.from_numpy(one)

    def build() -> None:
        before.from_vectors(vectors).save(folder)

    row = {"rows": rows, "write_seconds": seconds(build)}
    gallery = before.load(folder)
    queries = data.queries(args.exact_queries)
    taken = [seconds(lambda q=q: gallery.search(q[None], K)) for q in queries]
    row["exact"] = {"milliseconds": 1000 * statistics.median(taken)}
    row["bytes"] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    # `add` embeds; what it costs beside that is to look at all ids, as `remove` does, and to write everything again.
    row["remove_1_seconds"] = seconds(lambda: gallery.remove([17]))
    row["save_again_seconds"] = seconds(lambda: gallery.save(folder))
    print(
        f"version 0.1.0, {rows:,} rows: written in {row['write_seconds']:.0f} s, exact "
        f"{row['exact']['milliseconds']:.0f} ms, one row removed in "
        f"{row['remove_1_seconds']:.2f} s and saved in {row['save_again_seconds']:.1f} s",
        flush=True,
    )
    return row


def main(command_line: list[str] | None = None) -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000])
    arguments.add_argument("--width", type=int, default=256)
    arguments.add_argument("--spread", type=float, default=0.6, help="noise of a row, as a multiple of its centre")
    arguments.add_argument("--queries", type=int, default=200)
    arguments.add_argument("--exact_queries", type=int, default=50, help="of these, searched exactly too")
    arguments.add_argument("--exact_rounds", type=int, default=7, help="queries of each way of exact search")
    arguments.add_argument("--filtered_queries", type=int, default=50)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--index_rows", type=int, default=50_000, help="from how many rows on there is an index")
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--before", type=Path, help="a checkout of version 0.1.0: its store at the first size too")
    arguments.add_argument("--folder", type=Path, help="where the tables lie meanwhile (default: a temporary folder)")
    args = arguments.parse_args(command_line)
    torch.set_num_threads(args.threads)
    table: dict = {"sizes": []}
    if args.folder is not None:
        args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        if args.before is not None:
            table["before"] = measure_before(args.before, args.rows[0], Path(place) / "before", args)
            shutil.rmtree(Path(place) / "before")
            gc.collect()
        for rows in args.rows:
            table["sizes"].append(measure(rows, Path(place) / f"rows-{rows}", args))
            shutil.rmtree(Path(place) / f"rows-{rows}")
    last = table["sizes"][-1]
    chosen = next((one for one in last["settings"] if one["default"]), last["exact"])
    ratio = last["exact"]["milliseconds"] / chosen["milliseconds"]
    settings = {name: value for name, value in vars(args).items() if name not in ("json", "before", "folder")}
    finish("gallery", ratio, {**table, "settings": settings}, args.json)


if __name__ == "__main__":
    main()
