"""Exact search by codes: what is near by codes is told from what is best, whatever the vectors; and what is kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gallery_case import unit_vectors, vector_table

from aliblip import Gallery
from aliblip.retrieval import exact, views

WIDTH = 24


@pytest.fixture(autouse=True)
def by_codes(monkeypatch):
    monkeypatch.setattr(exact, "codes_pay", lambda: True)
    monkeypatch.setattr(exact, "SMALL_BYTES", 0)


@pytest.fixture
def read(monkeypatch):
    """How many vectors were read from a table, by every reading."""
    counted, chunks = [], exact._chunks

    def counting(*arguments):
        counted.append(0)
        for positions, vectors in chunks(*arguments):
            counted[-1] += len(positions)
            yield positions, vectors

    monkeypatch.setattr(exact, "_chunks", counting)
    return counted


def kinds_of_vectors(rows=3000, width=WIDTH):
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(rows, width, generator=generator)
    heavy = plain**5  # in each row one number far above the others, which codes hardly tell apart
    alike = torch.ones(rows, width) + 1e-5 * plain  # closer to each other than codes can tell
    mixed = torch.where(torch.arange(rows)[:, None] % 10 == 0, heavy, plain)
    return {
        "plain": torch.nn.functional.normalize(plain, dim=1),
        "heavy": torch.nn.functional.normalize(heavy, dim=1),
        "alike": torch.nn.functional.normalize(alike, dim=1),
        "mixed": torch.nn.functional.normalize(mixed, dim=1),
        "of all lengths": plain * torch.logspace(-12, 3, rows)[:, None],
        "zeros": plain * (torch.arange(rows)[:, None] % 3 == 0),
        "few that differ": plain[torch.arange(rows) % 40],
    }


@pytest.mark.parametrize("kind", list(kinds_of_vectors(1)))
@pytest.mark.parametrize("k", [1, 30])
def test_the_best_are_found_whatever_the_vectors(kind, k, tmp_path):
    vectors = kinds_of_vectors()[kind]
    gallery = Gallery.from_vectors(vector_table(vectors), tmp_path / "g")
    queries = torch.cat([vectors[[5, 1500, 2990]], unit_vectors(9, WIDTH, seed=3), torch.zeros(1, WIDTH)])
    view = gallery._now()
    assert exact._form_of(gallery._cache.of(view.dataset, len(vectors), WIDTH)[0]) == (False, True)
    found = view.found(queries, k, None, False)
    true = queries.double() @ vectors.double().t()
    for (positions, scores), of_query, query in zip(found, true, queries, strict=True):
        rounding = 1e-6 * float(query.norm() * vectors.norm(dim=1).max()) + 1e-30
        assert len(set(positions.tolist())) == k
        np.testing.assert_allclose(scores, of_query[positions], atol=rounding, rtol=0)
        assert scores.tolist() == sorted(scores.tolist(), reverse=True)
        # nobody else is better by more than rounding
        others = of_query.clone()
        others[positions] = -torch.inf
        assert float(others.max()) <= scores[-1] + rounding
        for one, other in zip(positions[:-1], positions[1:], strict=True):
            if torch.equal(vectors[one], vectors[other]):
                assert one < other


@pytest.mark.parametrize("share", [1, 20, 60])  # of a hundred: below and above what is copied
@pytest.mark.parametrize("kind", ["plain", "alike", "few that differ"])
def test_what_a_filter_leaves_is_searched_as_if_it_were_all(kind, share, tmp_path, monkeypatch):
    monkeypatch.setattr(views, "FEW_MATCHES", 0)
    vectors = kinds_of_vectors()[kind]
    prices = np.random.default_rng(0).permutation(3000) % 100
    gallery = Gallery.from_vectors(vector_table(vectors, price=prices.tolist()), tmp_path / "g")
    gallery.remove(ids=[hit["id"] for hit in gallery.search(vectors[7], 40)[0][::2]])
    kept = [hit["position"] for hit in gallery.search(vectors[7], 3000, where={"price": ("<", share)})[0]]
    assert 0 < len(kept) <= (prices < share).sum() and (prices[kept] < share).all()
    queries = torch.cat([vectors[:3], unit_vectors(5, WIDTH, seed=3)])
    true = torch.full((8, 3000), -torch.inf, dtype=torch.double)
    true[:, kept] = queries.double() @ vectors[kept].double().t()
    for hits, of_query in zip(gallery.search(queries, 10, where={"price": ("<", share)}), true, strict=True):
        best = of_query.topk(min(10, len(kept))).values
        np.testing.assert_allclose([hit["itc"] for hit in hits], best, atol=1e-6)
        assert {hit["position"] for hit in hits} <= set(kept)


@pytest.mark.parametrize("kind", list(kinds_of_vectors(1)))
def test_scores_by_codes_are_within_their_bound(kind, tmp_path):
    vectors = kinds_of_vectors()[kind]
    view = Gallery.from_vectors(vector_table(vectors), tmp_path / "g")._now()
    search = exact._ByCodes(view.dataset, view.cache.of(view.dataset, 3000, WIDTH), [None])
    queries = torch.cat([vectors[:20], unit_vectors(20, WIDTH), 1000 * unit_vectors(5, WIDTH), torch.zeros(1, WIDTH)])
    near = torch.cat([scores for _, scores in search._scores(queries)], dim=1)
    away = (near.double() - queries.double() @ vectors.double().t()).abs()
    bound = search._bound(queries)
    assert (away <= bound[:, None].double()).all()
    # nor is it so wide that everything would be looked at again
    if kind == "plain":
        assert float(bound[20:40].max()) < 0.03 and float(away[20:40].max()) > 0.1 * float(bound[20:40].max())


def test_more_rows_are_looked_at_until_no_other_can_be_better(tmp_path, monkeypatch, read):
    monkeypatch.setattr(exact, "_FEWEST_CANDIDATES", 8)
    tried, asked = exact._ByCodes._tried, []

    def counted(self, queries, k, candidates):
        asked.append((len(queries), candidates))
        return tried(self, queries, k, candidates)

    monkeypatch.setattr(exact._ByCodes, "_tried", counted)
    vectors = kinds_of_vectors(1000)["plain"]
    vectors[100:140] = vectors[100] + 1e-4 * vectors[100:140]  # forty that codes can't tell apart
    gallery = Gallery.from_vectors(vector_table(vectors), tmp_path / "g")
    gallery.search(vectors[500], 2)
    del asked[:], read[:]
    hits = gallery.search(vectors[[100, 500]], 2)
    assert [found[0]["position"] for found in hits][1] == 500
    best = (vectors[100].double() @ vectors.double().t()).topk(2).indices
    assert [hit["position"] for hit in hits[0]] == best.tolist()
    assert asked == [(2, 8), (1, 64)]
    assert max(read) < 100  # never all of them
    # where no number of candidates will do, all vectors are compared
    alike = Gallery.from_vectors(vector_table(torch.ones(5000, WIDTH)), tmp_path / "alike")
    del asked[:], read[:]
    assert [hit["position"] for hit in alike.search(torch.ones(WIDTH), 3)[0]] == [0, 1, 2]
    assert asked == [(1, 12), (1, 96), (1, 768)] and read[-1] == 5000


def test_what_is_kept_of_another_version_is_quick_to_search(tmp_path, monkeypatch):
    gallery = Gallery.from_vectors(vector_table(unit_vectors(2000, WIDTH), price=[1] * 2000), tmp_path / "g")
    monkeypatch.setattr(exact, "QUICKLY_READ_BYTES", 10 * WIDTH * 4)

    def is_quick() -> bool:
        view = gallery.refresh()._now()
        return view.cache.is_quick(view.dataset, view.rows, WIDTH)

    assert not is_quick()
    gallery.search(unit_vectors(1, WIDTH), 5)
    gallery.create_index(columns=["price"], quiet=True)  # another version, of the same files
    assert is_quick()
    gallery.upsert_vectors(
        vector_table(unit_vectors(10, WIDTH, seed=7), [f"new {n}" for n in range(10)], price=[2] * 10)
    )
    assert is_quick()
    gallery.upsert_vectors(vector_table(unit_vectors(1, WIDTH, seed=8), ["one more"], price=[2]))
    assert not is_quick()


def test_what_a_filter_leaves_is_looked_up_once_for_each_version(tmp_path, monkeypatch):
    gallery = Gallery.from_vectors(vector_table(unit_vectors(2000, WIDTH), price=list(range(2000))), tmp_path / "g")
    monkeypatch.setattr(views, "FEW_MATCHES", 0)
    looked_up, plain = [], exact._positions
    monkeypatch.setattr(
        exact, "_positions", lambda *given, **more: (looked_up.append(given[1]), plain(*given, **more))[1]
    )
    query = unit_vectors(3, WIDTH, seed=5)

    def ids(where):
        return [[hit["id"] for hit in hits] for hits in gallery.search(query, 5, where=where)]

    found = {where: ids(where) for where in ("price < 200", "price < 1500")}  # a few, copied, and most
    del looked_up[:]
    assert {where: ids(where) for where in found} == found and not looked_up
    view = gallery._now()
    for where, best in found.items():
        by_table = exact.search_exactly(view.dataset, query, 5, rows=view.rows, where=where)
        assert [[f"item {position}" for position in positions] for positions, _ in by_table] == best
    gallery.remove([found["price < 200"][0][0]])
    assert (
        ids("price < 200")[0] == ids("price < 200 OR price < 0")[0] and ids("price < 200")[0] != found["price < 200"][0]
    )
    assert looked_up.count("(price < 200)") == 1


def test_what_is_remembered_of_filters_takes_a_part_of_the_memory_of_all_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(views, "FEW_MATCHES", 0)
    gallery = Gallery.from_vectors(vector_table(unit_vectors(2000, WIDTH), price=list(range(2000))), tmp_path / "g")
    for start in range(0, 1600, 20):
        gallery.search(unit_vectors(1, WIDTH, seed=2), 5, where=f"price >= {start} AND price < {start + 400}")
    kept = gallery._cache._left
    assert 0 < len(kept) <= 2000 * WIDTH * exact.FEW_CHOSEN / (400 * WIDTH)
    assert list(kept)[-1][1].startswith("(price >= 1580")
    for start in range(100):
        for often in (start, 0):
            gallery.search(unit_vectors(1, WIDTH, seed=2), 5, where=f"price = {often}")
    kept = [where for _, where in gallery._cache._left]
    assert len(kept) == exact._FILTERS and kept[-1] == "(price = 0)"  # the one that is asked for stays


def test_a_new_version_costs_its_new_rows(tmp_path, read):
    gallery = Gallery.from_vectors(vector_table(unit_vectors(2000, WIDTH), price=[1] * 2000), tmp_path / "g")
    query = unit_vectors(1, WIDTH, seed=5)
    gallery.search(query, 5)
    before, old = gallery.search(query, 2000), gallery.snapshot()
    assert max(read) == 2000
    del read[:]
    new = torch.cat([query, unit_vectors(9, WIDTH, seed=7)])
    ids = [hit["id"] for hit in before[0][:3]] + [f"new {n}" for n in range(7)]
    gallery.upsert_vectors(vector_table(new, ids, price=[2] * 10))
    del read[:]
    found = gallery.search(query, 5)[0]
    assert found[0]["id"] == before[0][0]["id"] and found[0]["itc"] == pytest.approx(1, abs=1e-5)
    assert before[0][1]["id"] not in [hit["id"] for hit in found[:2]]
    assert max(read) <= 64  # the new rows, and the candidates
    # what the rows were before is found nowhere, with and without a filter
    gone = old._now()._vectors([hit["position"] for hit in before[0][:3]])
    for options in ({}, {"where": "price = 2"}, {"where": "price = 1"}):
        for_gone = gallery.search(torch.cat([query, gone]), 7, **options)
        assert for_gone == Gallery.open(gallery.uri).search(torch.cat([query, gone]), 7, **options)
        assert all(len({hit["position"] for hit in hits}) == 7 for hits in for_gone)
    assert len(gallery.search(query, 3000)[0]) == 2007
    assert old.search(query, 2000) == before
    assert gallery.search(query, 5)[0] == found
    # many rows that are gone are no longer kept, and an older version still has them
    gallery.remove([f"item {n}" for n in range(0, 2000, 2)])
    assert gallery.search(query, 3000) == Gallery.open(gallery.uri).search(query, 3000)
    (piece, *_) = gallery._cache._pieces
    assert len(piece.positions) < 1100 and piece.kept is None
    assert old.search(query, 2000) == before
    gallery.optimize()
    assert gallery.search(query, 3000) == Gallery.open(gallery.uri).search(query, 3000)


@pytest.mark.parametrize(
    "room, pays, address, form",
    [
        (1000 * WIDTH * 6, True, False, (False, True)),
        (1000 * WIDTH * 6, True, True, (True, True)),
        (1000 * WIDTH * 4.5, True, True, (False, True)),
        (1000 * WIDTH * 4.5, False, True, (True, False)),
        (1000 * WIDTH * 3, False, False, None),
        (1000 * WIDTH * 0.9, True, False, None),
    ],
)
def test_what_is_kept_follows_from_the_memory(room, pays, address, form, tmp_path, monkeypatch):
    gallery = Gallery.from_vectors(vector_table(unit_vectors(1000, WIDTH)), tmp_path / "g")
    monkeypatch.setattr(exact, "available_memory", lambda: room / exact.MEMORY_SHARE)
    monkeypatch.setattr(exact, "codes_pay", lambda: pays)
    monkeypatch.setattr(exact, "is_address", lambda uri: address)
    view = gallery._now()
    for _ in range(2):
        pieces = view.cache.of(view.dataset, 1000, WIDTH)
        assert (None if pieces is None else exact._form_of(pieces[0])) == form
    hits = gallery.search(unit_vectors(1, WIDTH, seed=2), 3)[0]
    monkeypatch.setattr(exact, "available_memory", lambda: 0)
    again = Gallery.open(gallery.uri).search(unit_vectors(1, WIDTH, seed=2), 3)[0]
    assert [hit["id"] for hit in hits] == [hit["id"] for hit in again]


def test_a_processor_that_multiplies_bytes_wrong_or_slowly_compares_vectors(monkeypatch):
    monkeypatch.undo()
    plain, pays = torch._int_mm, exact.codes_pay.__wrapped__
    monkeypatch.setattr(exact, "_shortest", lambda by_codes, by_vectors: [1.0, 2.0])
    assert pays()

    def saturating(codes, query):
        return plain(codes, query).clamp(-32768, 32767)

    monkeypatch.setattr(torch, "_int_mm", saturating)
    assert not pays()
    monkeypatch.setattr(torch, "_int_mm", plain)
    monkeypatch.setattr(exact, "_shortest", lambda by_codes, by_vectors: [1.0, 1.0])
    assert not pays()
    monkeypatch.delattr(torch, "_int_mm")
    assert not pays()
