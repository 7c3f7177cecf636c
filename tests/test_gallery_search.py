"""Search in a stored gallery: equal to the slow, obvious version, with ties, filters and after every kind of change."""

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
import torch
from gallery_case import WIDTH, all_vectors, by_hand, unit_vectors, vector_table

from aliblip import Gallery
from aliblip.retrieval import exact, views
from aliblip.retrieval.indexing import FEWEST_ROWS, INDEX_KINDS, IndexSettings, index_settings, nearest
from aliblip.runtime.mistakes import UsageError


def stored(tmp_path, vectors, ids=None, name="g", **columns):
    return Gallery.from_vectors(vector_table(vectors, ids, **columns), tmp_path / name)


def found_ids(gallery, queries, k, **options):
    return [[hit["id"] for hit in hits] for hits in gallery.search(queries, k, **options)]


def expected_ids(gallery, queries, k, keep=lambda row: True):
    rows = {row["id"]: row for row in gallery.get(list(all_vectors(gallery)))}
    vectors = {key: vector for key, vector in all_vectors(gallery).items() if keep(rows[key])}
    positions = {key: row["position"] for key, row in rows.items()}
    return [by_hand(vectors, positions, query.double().numpy(), k) for query in queries]


@pytest.fixture(params=["vectors in memory", "codes in memory", "both in memory", "from the table"])
def way(request, monkeypatch):
    """All ways of exact search: what is kept of the vectors, and vectors that are read in batches."""
    monkeypatch.setattr(exact, "codes_pay", lambda: True)
    if request.param == "from the table":
        monkeypatch.setattr(exact, "MEMORY_SHARE", 0)
    elif request.param != "vectors in memory":
        monkeypatch.setattr(exact, "SMALL_BYTES", 0)
        monkeypatch.setattr(exact, "_FEWEST_CANDIDATES", 2)
        monkeypatch.setattr(exact, "_CODES_CHUNK", 16)
        monkeypatch.setattr(exact, "is_address", lambda uri: request.param == "both in memory")


@pytest.mark.parametrize("chunk", [1, 7, 46, 100])
def test_exact_search_equals_the_obvious_one_with_ties(chunk, way, tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    # small whole numbers: products are exact in every chunk, and most scores are tied
    queries = torch.randint(-2, 3, (17, 3), generator=generator).float()
    vectors = torch.randint(-2, 3, (46, 3), generator=generator).float()
    gallery = stored(tmp_path, vectors, price=list(range(46)))
    monkeypatch.setattr(exact, "GALLERY_CHUNK", chunk)
    monkeypatch.setattr(exact, "QUERY_BLOCK", 5)
    for k in (1, 9, 46, 99):
        assert found_ids(gallery, queries, k) == expected_ids(gallery, queries, k)
        cheap = found_ids(gallery, queries, k, where="price < 20 OR price = 40")
        assert cheap == expected_ids(gallery, queries, k, lambda row: row["price"] < 20 or row["price"] == 40)
    # rows that were replaced keep their places among equals, new ones come last, also after the pieces were joined
    gallery.remove(["item 3", "item 20"])
    gallery.upsert_vectors(vector_table(vectors[5:9], [f"item {n}" for n in (30, 2, 7, 1)], price=[0, 1, 2, 3]))
    gallery.upsert_vectors(vector_table(vectors[:2], ["new 1", "new 0"], price=[1, 1]))
    for _ in range(2):
        assert found_ids(gallery, queries, 44) == expected_ids(gallery, queries, 44)
        assert found_ids(gallery, queries, 5, where={"price": ("<", 4)}) == expected_ids(
            gallery, queries, 5, lambda row: row["price"] < 4
        )
        gallery.optimize()
    positions = {row["id"]: row["position"] for row in gallery.get(["item 2", "item 30", "new 1", "new 0"])}
    assert positions == {"item 2": 2, "item 30": 30, "new 1": 46, "new 0": 47}


def test_equal_vectors_have_equal_scores_wherever_they_stand(way, tmp_path, monkeypatch):
    """The last bits of a product depend on the place in a remainder: then a copy further down would come first."""
    monkeypatch.setattr(exact, "GALLERY_CHUNK", 37)
    one = unit_vectors(1, 256)
    gallery = stored(tmp_path, torch.cat([unit_vectors(5, 256, seed=3), one.expand(113, 256)]))
    for query in unit_vectors(20, 256, seed=1):
        hits = [hit for hit in gallery.search(query, 118)[0] if hit["position"] >= 5]
        assert [hit["position"] for hit in hits] == list(range(5, 118))
        assert len({hit["itc"] for hit in hits}) == 1


def test_scores_and_fields_of_hits(tmp_path):
    vectors = unit_vectors(50)
    gallery = stored(tmp_path, vectors, list(range(100, 150)), price=[n / 2 for n in range(50)], name_=["x"] * 50)
    query = unit_vectors(1, seed=1)
    hits = gallery.search(query, 3)[0]
    for hit in hits:
        assert hit["itc"] == pytest.approx(float(query[0] @ vectors[hit["position"]]), abs=1e-6)
        assert hit == {"id": 100 + hit["position"], "position": hit["position"], "itc": hit["itc"], "name_": "x"} | {
            "price": hit["position"] / 2
        }
    assert list(hits[0]) == ["id", "itc", "position", "price", "name_"]
    assert [set(hit) for hit in gallery.search(query, 1, columns=["price"])[0]] == [{"id", "itc", "position", "price"}]
    assert [set(hit) for hit in gallery.search(query, 1, columns=[])[0]] == [{"id", "itc", "position"}]
    assert gallery.search(query[0], 3) == [hits]  # one vector
    assert gallery.search(query, 10**12)[0][:3] == hits
    assert gallery.search(query.double().numpy(), 3) == [hits]
    assert gallery.search(torch.empty(0, WIDTH), 3) == []


def test_what_search_refuses(tmp_path):
    gallery = stored(tmp_path, unit_vectors(5), price=[1.0] * 5)
    query = unit_vectors(1)
    for call, message in (
        ({"k": 0}, "k is 0: give a whole number of at least 1"),
        ({"k": 1.5}, "k is 1.5"),
        ({"k": True}, "k is True"),
        ({"columns": ["vector"]}, "the column 'vector' is not given with results"),
        ({"columns": ["colour"]}, "the gallery has no column 'colour': the columns are id .string., price .double."),
        ({"columns": "price"}, "columns is 'price': give a list"),
        ({"approximate": True}, r"the gallery has no index: call create_index\(\)"),
        (
            {"where": "colour = 3"},
            "the filter 'colour = 3' can't be used .*the columns are id .string., price .double.",
        ),
        ({"where": "price <"}, "the filter 'price <' can't be used"),
        ({"where": "price = 'x'"}, "can't be used"),
        ({"where": {"price": "x"}}, "can't be used"),
        ({"where": "vector IS NULL) OR (true"}, None),
    ):
        if message is not None:
            with pytest.raises(UsageError, match=message) as raised:
                gallery.search(query, **{"k": 1, **call})
            assert "\n" not in str(raised.value) and "/rust/" not in str(raised.value)
    for vectors, message in (
        (unit_vectors(1, 31), r"\(1, 31\) given, the gallery takes \(Q, 16\)"),
        (torch.full((1, WIDTH), torch.nan), "the queries are not all finite"),
        (torch.ones(1, 1, WIDTH), "takes"),
    ):
        with pytest.raises(UsageError, match=message):
            gallery.search(vectors, 1)


def test_an_empty_gallery_finds_nothing(tmp_path):
    gallery = stored(tmp_path, unit_vectors(5))
    assert gallery.remove([f"item {number}" for number in range(5)]) == 5 and len(gallery) == 0
    assert gallery.search(unit_vectors(2), 3) == [[], []]
    assert gallery.sample(3) == [] and gallery.get(["item 0"]) == []


def test_types_of_columns_come_back(tmp_path):
    columns = {
        "tags": pa.array([["a", None], [], None]),
        "size": pa.array([{"w": 1, "of": {"unit": "cm"}}, None, {"w": None, "of": None}]),
        "when": pa.array([1, 2, None], pa.timestamp("ms")),
        "flag": pa.array([True, None, False]),
        "blob": pa.array([b"\x00", b"", None]),
        "kind": pa.array(["x", "y", "x"]).dictionary_encode(),
        "small": pa.array([1, 2, 3], pa.uint8()),
        "nothing": pa.nulls(3),
    }
    gallery = stored(tmp_path, unit_vectors(3), [0, 1, 2], **columns)
    for position, row in enumerate(gallery.get([0, 1, 2])):
        for name, column in columns.items():
            assert row[name] == column[position].as_py(), name
    types = {name: gallery.schema.field(name).type for name in gallery.columns}
    assert types["tags"] == pa.list_(pa.string()) and types["kind"] == pa.string() and types["small"] == pa.uint8()
    assert [hit["id"] for hit in gallery.search(unit_vectors(1), 9, where="size.of.unit = 'cm'")[0]] == [0]
    assert [hit["id"] for hit in gallery.search(unit_vectors(1), 9, where="array_has(tags, 'a')")[0]] == [0]


def test_values_sample_get_and_count(tmp_path):
    gallery = stored(
        tmp_path, unit_vectors(300), word=[f"w{n % 60}" for n in range(300)], few=[n % 3 or None for n in range(300)]
    )
    assert gallery.values("few") == [1, 2] and gallery.values("word") is None
    assert gallery.values("word", limit=60) == sorted({f"w{n}" for n in range(60)})
    assert gallery.values("id") is None
    with pytest.raises(UsageError, match="no column 'colour'"):
        gallery.values("colour")
    some = gallery.sample(7, columns=["word"])
    assert len(some) == 7 and some == gallery.sample(7, columns=["word"]) != gallery.sample(7, seed=1, columns=["word"])
    assert all(row["word"] == f"w{row['position'] % 60}" and set(row) == {"id", "position", "word"} for row in some)
    assert len(gallery.sample(999)) == 300
    assert [row["id"] for row in gallery.get(["item 7", "nowhere", "item 2"])] == ["item 7", "item 2"]
    assert len(gallery.get([f"item {n}" for n in range(300)] * 5)) == 1500
    assert gallery.count() == 300 and gallery.count({"few": None}) == 100 == gallery.count("few IS NULL")
    with pytest.raises(UsageError, match="3 is no id of this gallery: its ids are text"):
        gallery.get([3])


# --- the index --------------------------------------------------------------------------------------------------------


def clustered(count, seed=0):
    centres = unit_vectors(count // 20, seed=seed)
    noise = unit_vectors(count, seed=seed + 1) * 0.2
    return torch.nn.functional.normalize(centres.repeat_interleave(20, dim=0) + noise, dim=1)


@pytest.mark.parametrize("kind", INDEX_KINDS)
def test_indices_find_what_exact_search_finds(kind, tmp_path, capsys):
    gallery = stored(tmp_path, clustered(2000), price=[n % 100 for n in range(2000)])
    report = gallery.create_index(kind, columns=["price"], measure_recall=50)
    assert gallery.has_index and report.settings.kind == kind and report.columns == ("id", "price")
    printed = capsys.readouterr().out
    assert f"2,000 rows: {kind}, num_partitions" in printed and f"recall@10 {report.recall_at_10:.4f}" in printed
    queries = torch.stack([gallery._now()._vectors([row["position"]])[0] for row in gallery.sample(50)])
    found, wanted = found_ids(gallery, queries, 10), found_ids(gallery, queries, 10, approximate=False)
    shares = [len(set(one) & set(other)) / 10 for one, other in zip(found, wanted, strict=True)]
    assert report.recall_at_10 == pytest.approx(np.mean(shares)) and report.recall_at_10 > 0.9
    # scores are the true ones where the found are compared again
    tolerance = 1e-5 if report.settings.refine_factor or kind == "IVF_FLAT" else 0.05
    exact_scores = {hit["id"]: hit["itc"] for hit in gallery.search(queries[0], 2000, approximate=False)[0]}
    for hit in gallery.search(queries[0], 10)[0]:
        assert hit["itc"] == pytest.approx(exact_scores[hit["id"]], abs=tolerance)
    # a filter is applied before the search: as many as there are, whatever the lists hold
    for where, count in (("price < 2", 40), ("price = 3 AND id = 'item 3'", 1), ("price < 0", 0)):
        assert [len(found) for found in found_ids(gallery, queries[:3], 60, where=where)] == [count] * 3
    assert all(hit["price"] < 50 for hit in gallery.search(queries[0], 60, where="price < 50")[0])


def test_new_rows_are_found_at_once_and_old_vectors_are_gone(tmp_path):
    gallery = stored(tmp_path, clustered(2000), price=[n % 100 for n in range(2000)])
    gallery.create_index("IVF_PQ", columns=["price"], quiet=True)
    other = Gallery.open(gallery.uri)
    new = unit_vectors(3, seed=9)
    before = gallery._now()._vectors([7])
    gallery.upsert_vectors(vector_table(new, ["item 7", "new 0", "new 1"], price=[-1, -1, -1]))
    for one in (gallery, other):
        for _ in range(2):
            assert found_ids(one, new, 1) == [["item 7"], ["new 0"], ["new 1"]]
            assert one.search(before, 1)[0][0]["id"] != "item 7"
            assert found_ids(one, new[:1], 5, where="price = -1")[0][0] == "item 7"
            assert one.count("price = 7") == 19
            one.optimize()
    assert gallery.remove(["new 0"]) == 1
    assert "new 0" not in found_ids(other, new[1:2], 2000)[0]


def test_settings_follow_from_the_size():
    assert index_settings(FEWEST_ROWS - 1, 256) is None
    for rows in (FEWEST_ROWS, 10**6, 10**7):
        settings = index_settings(rows, 256)
        assert settings.kind in INDEX_KINDS and 1 <= settings.nprobes <= settings.num_partitions
        assert settings == IndexSettings.from_json(settings.as_json())
        if settings.num_sub_vectors is not None:
            assert 256 % settings.num_sub_vectors == 0
    assert index_settings(10**6, 250, "IVF_PQ").num_sub_vectors == 50
    with pytest.raises(UsageError, match="the kind of the index is 'HNSW': choose one of IVF_FLAT"):
        index_settings(10**6, 256, "HNSW")
    with pytest.raises(UsageError, match="takes 256 rows, the gallery has 20"):
        index_settings(20, 256, "IVF_PQ")


def test_an_index_is_only_made_where_it_helps_and_stays_what_it_was(tmp_path, capsys):
    gallery = stored(tmp_path, clustered(600), price=[1] * 600, tags=[["a"]] * 600)
    report = gallery.create_index(columns=["price"])
    assert report.settings is None and not gallery.has_index and report.columns == ("id", "price")
    assert "600 rows: no index of the vectors, exact search is fast enough; indexed for filters: id, price" in (
        capsys.readouterr().out
    )
    settings = IndexSettings("IVF_FLAT", 7, nprobes=3)
    gallery.create_index(settings=settings, measure_recall=0, quiet=True)
    assert capsys.readouterr().out == ""
    assert Gallery.open(gallery.uri)._now().index == settings
    for call, message in (
        ({"columns": ["colour"]}, "no column 'colour'"),
        ({"columns": ["tags"]}, "the column 'tags' holds list.*which has no index"),
        ({"kind": "FAISS"}, "the kind of the index is 'FAISS'"),
    ):
        with pytest.raises(UsageError, match=message):
            gallery.create_index(**call)


def test_what_the_index_does_not_find_is_searched_exactly(tmp_path, monkeypatch):
    gallery = stored(tmp_path, clustered(2000))
    gallery.create_index("IVF_FLAT", measure_recall=0, quiet=True)

    def four(*args):
        return [(positions[:4], scores[:4]) for positions, scores in nearest(*args)]

    monkeypatch.setattr(views, "nearest", four)
    queries = unit_vectors(3, seed=4)
    assert found_ids(gallery, queries, 10) == found_ids(gallery, queries, 10, approximate=False)


def test_a_filter_that_leaves_few_rows_is_searched_exactly_and_one_that_leaves_more_in_more_lists(
    tmp_path, monkeypatch
):
    gallery = stored(tmp_path, clustered(2000), price=[n % 100 for n in range(2000)])
    # One list of 40 for a query: what lies in the others is not found.
    gallery.create_index(settings=IndexSettings("IVF_FLAT", 40, nprobes=1), measure_recall=0, quiet=True)
    queries = unit_vectors(20, seed=6)
    wanted = found_ids(gallery, queries, 10, approximate=False, where="price < 5")
    read = []
    with monkeypatch.context() as patch:
        patch.setattr(views.VectorCache, "of", lambda *args: read.append(args))
        assert found_ids(gallery, queries, 10, where="price < 5") == wanted
    assert not read  # of the rows that the filter leaves out nothing is read

    monkeypatch.setattr(views, "FEW_MATCHES", 0)
    asked = []
    monkeypatch.setattr(views, "nearest", lambda *args: asked.append(args[5]) or nearest(*args))
    assert found_ids(gallery, queries, 10, where="price < 5") == wanted and not asked  # the vectors fit the memory
    monkeypatch.setattr(exact, "QUICKLY_READ_BYTES", 0)
    gallery = Gallery.open(gallery.uri)
    in_more = found_ids(gallery, queries, 10, where="price < 5")
    assert asked == [0.05]
    shared = [len(set(one) & set(other)) for one, other in zip(in_more, wanted, strict=True)]
    plain = nearest(
        gallery._now().dataset, queries, 10, gallery._now().index, "price < 5"
    )  # as if nothing was left out
    ids = [{row["id"] for row in gallery._now().take(positions, ["id"]).values()} for positions, _ in plain]
    assert sum(shared) > sum(len(one & set(other)) for one, other in zip(ids, wanted, strict=True))


# --- threads and processes --------------------------------------------------------------------------------------------


def test_many_threads_get_what_one_gets(tmp_path):
    gallery = stored(tmp_path, clustered(2000), price=[n % 100 for n in range(2000)])
    gallery.create_index("IVF_PQ", measure_recall=0, quiet=True)
    calls = [
        (query, approximate, where)
        for query in unit_vectors(8, seed=2)
        for approximate in (None, False)
        for where in (None, "price < 10")
    ]

    def search(call):
        query, approximate, where = call
        return gallery.search(query, 5, approximate=approximate, where=where)

    expected = [search(call) for call in calls]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(search, calls * 3)) == expected * 3


def test_every_answer_while_rows_are_changed_is_one_of_some_version(tmp_path):
    """Two rows change places in every version: an answer between two versions would have none of them, or one twice."""
    vectors = unit_vectors(400)
    gallery = stored(tmp_path, vectors)
    one, other = vectors[7:8], vectors[8:9]
    failures, done = [], threading.Event()

    def search():
        mine = Gallery.open(gallery.uri)
        while not done.is_set():
            hits = mine.search(torch.cat([one, other]), 1)
            if {hits[0][0]["id"], hits[1][0]["id"]} != {"item 7", "item 8"} or hits[0][0]["itc"] < 0.999:
                failures.append(hits)

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(30):
        pair = [one, other] if number % 2 else [other, one]
        gallery.upsert_vectors(vector_table(torch.cat(pair), ["item 7", "item 8"]))
    done.set()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_gallery_travels_by_pickle(tmp_path):
    gallery = stored(tmp_path, unit_vectors(20))
    snapshot = gallery.snapshot()
    gallery.remove(["item 0"])
    query = unit_vectors(1)
    for one in (gallery, snapshot):
        again = pickle.loads(pickle.dumps(one))
        assert again.search(query, 20) == one.search(query, 20) and again.version == one.version
        assert len(again) == len(one)
