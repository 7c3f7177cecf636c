"""Changes of a stored gallery: rows put in and taken out by id, versions, copies, and several writers at once."""

import decimal
import multiprocessing
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import gallery_case as case
import numpy as np
import pyarrow as pa
import pytest
import tiny
import torch
from gallery_case import BROKEN, COUNT, build, unit_vectors, vector_table
from helpers import ROOT, assert_succeeded, run, spawn

from aliblip import Gallery
from aliblip.retrieval import galleries, tables
from aliblip.runtime.mistakes import UsageError
from encoder_aliblip import Encoder, fingerprint
from modeling_aliblip import AliBlipForImageTextRetrieval
from processing_aliblip import AliBlipProcessor
from reading_aliblip import UnusableItem


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return case.photos(tmp_path_factory.mktemp("gallery") / "photos")


@pytest.fixture
def built(paths, tmp_path):
    return build(case.rows_of(paths), tmp_path / "built", store_tokens=True, thumbnails=24)


def upsert(gallery, rows, seed=0, **options):
    model, processor = case.model_and_processor(seed)
    return gallery.upsert(rows, model=model, processor=processor, **{"batch_size": 2, **options})


def stored(tmp_path, count=50, **columns):
    return Gallery.from_vectors(vector_table(unit_vectors(count), **columns), tmp_path / "g")


# --- rows -------------------------------------------------------------------------------------------------------------


def test_changes_equal_a_new_gallery(paths, built, tmp_path):
    more = tiny.photos(tmp_path / "more", 5, seed=1)
    rows = case.rows_of(paths)
    new = [{**rows[0], "id": f"new-{number}", "image": path} for number, path in enumerate(more)]
    replaced = {**rows[7], "image": more[2], "price": None, "category": "hat"}
    report = upsert(built, [*new, replaced, {**rows[0], "id": "gone", "image": str(tmp_path / "gone.png")}])
    assert (report.inserted, report.updated) == (5, 1)
    missing = f"the image file is missing: {tmp_path / 'gone.png'}"
    assert [(entry["row"], entry["reason"]) for entry in report.skipped] == [(6, missing)]
    assert str(report) == (
        f"rows inserted: 5; replaced: 1; could not be used: 1, the first '{tmp_path / 'gone.png'}' ({missing})"
    )
    assert built.remove(["sku-0", "new-1", "nowhere"]) == 2
    wanted = [row for row in [*rows, *new] if row["id"] not in ("sku-0", "new-1", f"sku-{BROKEN}")]
    wanted[wanted.index(rows[7])] = replaced
    expected = build(wanted, tmp_path / "expected", store_tokens=True, thumbnails=24)
    for gallery in (built, Gallery.open(built.uri)):
        assert len(gallery) == len(wanted)
        for one, other in zip(gallery.get(case.ids_of(expected)), expected.get(case.ids_of(expected)), strict=True):
            assert {**one, "position": 0} == {**other, "position": 0}
        found, vectors = case.all_vectors(gallery), case.all_vectors(expected)
        assert all(np.allclose(found[key], vectors[key], atol=1e-5) for key in vectors)
        hits = [one.get(["new-3", "sku-7"]) for one in (gallery, expected)]
        tokens = [one.image_tokens(hit, None).float() for one, hit in zip((gallery, expected), hits, strict=True)]
        torch.testing.assert_close(*tokens, atol=0.05, rtol=0.01)
        assert gallery.photo(hits[0][0]).tobytes() == expected.photo(hits[1][0]).tobytes()
        gallery.optimize()


def test_rows_lose_no_values_in_silence(paths, built, caplog):
    row = {**case.rows_of(paths)[1], "price": "dear", "colour": "red"}
    report = upsert(built, [row, {**row, "id": "x", "colour": None}])
    assert str(report) == (
        "rows inserted: 1; replaced: 1; values of another type than their column, which are left out: price (2); "
        "columns that the gallery does not have, which are left out: colour (1)"
    )
    assert str(report) in caplog.text and built.get(["x"])[0]["price"] is None


def test_rows_whose_columns_have_other_names(paths, tmp_path):
    rows = [{"image": path, "sku": n, "id": f"x{n}"} for n, path in enumerate(paths[:4])]
    gallery = build(rows, tmp_path / "g", id_column="sku")
    upsert(gallery, [{**rows[1], "id": "changed"}])
    assert gallery.get([1])[0] == {"id": 1, "position": 1, "sku": 1, "data_id": "changed", "path": paths[1]}
    upsert(gallery, [{"photo": paths[2], "number": 7, "sku": 9}], image_column="photo", id_column="number")
    assert gallery.get([7])[0]["sku"] == 9


def test_an_encoder_stands_for_model_and_processor(paths, built, monkeypatch):
    encoder = Encoder(*case.model_and_processor())
    assert encoder.fingerprint == built.model
    monkeypatch.setattr(galleries, "fingerprint", None)  # it takes seconds, and is known
    assert built.upsert(case.rows_of(paths)[:1], encoder=encoder).updated == 1
    with pytest.raises(UsageError, match="upsert needs model and processor, or encoder"):
        built.upsert(case.rows_of(paths)[:1], model=encoder.model)


def test_values_of_a_mapped_file_are_put_in(tmp_path):
    """Lance takes decimals only from where 16 bytes begin, and in a file they lie where 8 do."""
    prices = pa.array([decimal.Decimal(n) / 100 for n in range(50)], pa.decimal128(9, 2))
    gallery = stored(tmp_path, price=prices, exact=prices.cast(pa.decimal256(50, 2)))
    for shift in range(3):
        table = vector_table(
            unit_vectors(5), ["a" * (n + shift) for n in range(5)], price=prices[5:10], exact=prices[:5]
        )
        with pa.OSFile(str(tmp_path / f"{shift}.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        mapped = pa.ipc.open_file(pa.memory_map(str(tmp_path / f"{shift}.arrow"))).read_all()
        gallery.upsert_vectors(mapped)
        assert gallery.get(["aaa"])[0]["price"] == prices[5 + 3 - shift].as_py()
    model, processor = case.model_and_processor()
    made = build(
        [
            {"image": path, "id": n, "price": decimal.Decimal("1.25")}
            for n, path in enumerate(tiny.photos(tmp_path / "photos", 3))
        ],
        tmp_path / "built",
    )
    made.upsert(
        [{"image": str(tmp_path / "photos" / "000.png"), "id": 1, "price": decimal.Decimal("3.50")}],
        model=model,
        processor=processor,
    )
    assert made.get([1])[0]["price"] == decimal.Decimal("3.50") and made.count({"price": ("<", 2)}) == 2


def test_titles_are_put_in(tmp_path):
    gallery = build(
        [{"caption": title, "id": n} for n, title in enumerate(tiny.titles(5))], tmp_path / "g", kind="text"
    )
    assert upsert(gallery, [{"caption": "red cup", "id": 3}, {"caption": "blue lamp", "id": 9}]).inserted == 1
    assert [row["text"] for row in gallery.get([3, 9])] == ["red cup", "blue lamp"]


def test_changes_that_are_refused_change_nothing(paths, built, tmp_path):
    version, rows = built.version, case.rows_of(paths)
    by_rows = build([{"image": path, "price": 1} for path in paths[:3]], tmp_path / "rows")
    for gallery, given, options, message in (
        (built, [rows[3], rows[3]], {}, "some ids come twice among these rows: 'sku-3'. Make.*duplicates='first'"),
        (built, [{"image": paths[0]}], {}, "the data has no column 'id' with the gallery's ids: there are 'image'"),
        (built, rows, {"id_column": "sku"}, "no column 'sku' with the gallery's ids"),
        (built, [{**rows[3], "id": 3}], {}, "the id of row 0 is 3, and ids of this gallery are text"),
        (built, rows, {"seed": 1}, "the gallery was built with another model or processor"),
        (
            by_rows,
            paths,
            {},
            "the ids of this gallery are the numbers of the rows.*name the column of ids with id_column",
        ),
    ):
        with pytest.raises(UsageError, match=message) as raised:
            upsert(gallery, given, **options)
        assert "\n" not in str(raised.value) and "--" not in str(raised.value)
    for call, message in (
        ({}, "remove takes either ids or where"),
        ({"ids": ["a"], "where": "price < 3"}, "remove takes either ids or where"),
        ({"ids": "sku-1"}, "ids is 'sku-1': give a list"),
        ({"ids": [3]}, "3 is no id of this gallery: its ids are text"),
        ({"where": "colour = 3"}, "the filter 'colour = 3' can't be used"),
        ({"where": {}}, "the filter is empty"),
        ({"where": " "}, "the filter is empty"),
        ({"where": "price < :m"}, "names the value :m"),
    ):
        with pytest.raises(UsageError, match=message):
            built.remove(**call)
    with pytest.raises(UsageError, match="column 'vector'"):
        built.upsert_vectors(vector_table(unit_vectors(2)).drop_columns("vector"))
    with pytest.raises(UsageError, match="not all finite"):
        built.upsert_vectors(vector_table(torch.full((2, 16), torch.nan)))
    with pytest.raises(UsageError, match="the column 'vector' does not fit"):
        built.upsert_vectors(vector_table(unit_vectors(2, 8)))
    with pytest.raises(UsageError, match="some ids come twice among these rows: .*new.*Give each of them once"):
        built.upsert_vectors(vector_table(unit_vectors(2), ["new", "new"]))
    assert built.version == version
    report = upsert(built, [rows[3], rows[3], rows[3]], duplicates="first")
    assert report.updated == 1 and [entry["reason"] for entry in report.skipped] == ["the id comes twice"] * 2


def test_waiting_for_another_writer_is_told_and_ends(tmp_path, monkeypatch, caplog):
    gallery = stored(tmp_path)
    monkeypatch.setattr(tables, "TELL_AFTER_SECONDS", 0.05)
    monkeypatch.setattr(tables, "LONGEST_CHANGE_SECONDS", 0.1)
    with tables.one_writer(gallery.uri), ThreadPoolExecutor(1) as pool:
        with pytest.raises(UsageError, match="has been changed by another process for"):
            pool.submit(gallery.upsert_vectors, vector_table(unit_vectors(1), ["new"])).result()
        assert f"another process or thread changes {gallery.uri}: waiting for it" in caplog.text
    assert gallery.upsert_vectors(vector_table(unit_vectors(1), ["new"])).inserted == 1


def test_remove_counts_by_id_and_by_filter(tmp_path):
    gallery = stored(tmp_path, 3000, price=[n % 10 for n in range(3000)])
    assert gallery.remove([f"item {n}" for n in range(0, 3000, 2)]) == 1500 == len(gallery)  # more than fit a condition
    assert gallery.remove([f"item {n}" for n in range(10)]) == 5
    assert gallery.remove(where="price = :p", values={"p": 3}) == 299
    assert gallery.remove(where={"price": 99}) == 0 == gallery.remove([])
    assert len(gallery) == 1196 and gallery.values("price") == [1, 5, 7, 9]


def test_two_processes_put_rows_in_together(paths, built, tmp_path):
    rows = [{**row, "price": -1.0} for row in case.rows_of(paths)] + [{**case.rows_of(paths)[0], "id": "new"}]
    reports = spawn(put_in, 2, built.uri, rows)
    assert reports[0] == reports[1] and (reports[0].inserted, reports[0].updated) == (1, COUNT - 1)
    assert [entry["row"] for entry in reports[0].skipped] == [BROKEN]
    assert built.count("price = -1") == COUNT - 1 and built.get(["new"])[0]["position"] == COUNT - 1


def put_in(uri, rows):
    return upsert(Gallery.open(uri), rows)


# --- versions ---------------------------------------------------------------------------------------------------------


def test_versions_and_snapshots_stay_what_they_are(tmp_path):
    gallery = stored(tmp_path)
    query, first = unit_vectors(1), gallery.version
    expected = gallery.search(query, 50)
    snapshot = gallery.snapshot()
    gallery.remove(["item 3"])
    gallery.upsert_vectors(vector_table(unit_vectors(1, seed=5), ["item 4"]))
    gallery.optimize()
    for old in (snapshot, Gallery.open(gallery.uri, version=first)):
        assert old.search(query, 50) == expected and len(old) == 50 and old.version == first
        for change in (
            lambda old=old: old.remove(["item 1"]),
            lambda old=old: old.optimize(),
            lambda old=old: old.create_index("IVF_FLAT"),
        ):
            with pytest.raises(UsageError, match=f"this is version {first} of the gallery"):
                change()
    versions = gallery.versions()
    assert [one["version"] for one in versions] == sorted(one["version"] for one in versions)
    assert versions[-1]["version"] == gallery.version and versions[-1]["rows"] == 49
    with pytest.raises(UsageError, match="has no version 99: see Gallery.versions"):
        Gallery.open(gallery.uri, version=99)


def test_optimize_joins_pieces_and_removes_old_versions(tmp_path):
    gallery = stored(tmp_path)
    follower, snapshot = Gallery.open(gallery.uri), gallery.snapshot()
    for number in range(6):
        gallery.upsert_vectors(vector_table(unit_vectors(1, seed=number), [f"item {number}"]))
    before = case.all_vectors(gallery)
    pieces = len(gallery._now().dataset.get_fragments())
    gallery.optimize(keep=timedelta(0))
    assert len(gallery._now().dataset.get_fragments()) < pieces
    assert len(gallery.versions()) == 1
    assert {key: list(value) for key, value in case.all_vectors(gallery).items()} == {
        key: list(value) for key, value in before.items()
    }
    assert len(follower.search(unit_vectors(1), 99)[0]) == 50
    snapshot._cache._kept = None
    with pytest.raises(UsageError, match="is no longer there, optimize.. removes old ones"):
        snapshot.search(unit_vectors(1), 3)
    gallery.optimize()  # nothing to do


def test_many_pieces_are_told(paths, built, monkeypatch, caplog):
    monkeypatch.setattr(galleries, "_MANY_FRAGMENTS", 1)
    upsert(built, case.rows_of(paths)[:1])
    assert r"the gallery lies in 2 pieces: optimize() joins them" in caplog.text


# --- models -----------------------------------------------------------------------------------------------------------


def test_fingerprints(built, tmp_path):
    model, processor = case.model_and_processor()
    built.check_model(fingerprint(model, processor))
    model.save_pretrained(tmp_path / "m")
    processor.save_pretrained(tmp_path / "m")
    again = (
        AliBlipForImageTextRetrieval.from_pretrained(tmp_path / "m"),
        AliBlipProcessor.from_pretrained(tmp_path / "m"),
    )
    built.check_model(fingerprint(*again))
    again[1](text=["a red cup", "a cup"])  # leaves padding and truncation in the tokenizer's state
    built.check_model(fingerprint(*again))
    # The temperature is fp32 in any copy, and rounded like the others.
    assert fingerprint(tiny.spread_model().to(torch.bfloat16), processor) == fingerprint(model, processor)
    stepped = tiny.spread_model()
    with torch.no_grad():
        for parameter in stepped.text_encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 1e-3)
    other_heads = tiny.spread_model(vision_config={"num_attention_heads": 8})
    assert torch.equal(other_heads.vision_proj.weight, model.vision_proj.weight)
    other_pixels, other_words = tiny.processor(), tiny.processor()
    other_pixels.image_processor.image_mean = [0.5, 0.5, 0.5]
    other_words.tokenizer.add_tokens(["mug"])
    for other in ((stepped, processor), (other_heads, processor), (model, other_pixels), (model, other_words)):
        with pytest.raises(UsageError, match=f"built with another model or processor .{built.model[:8]}, not "):
            built.check_model(fingerprint(*other))


def test_a_gallery_of_vectors_takes_every_query(tmp_path):
    stored(tmp_path).check_model("whatever")


def test_a_model_whose_weights_lie_on_disk(paths, tmp_path):
    processor, plain = tiny.processor(), tiny.spread_model(vocab_size=20)
    plain.save_pretrained(tmp_path / "m")
    options = {"device_map": "auto", "max_memory": {"cpu": 60_000}, "offload_folder": tmp_path / "offload"}
    offloaded = AliBlipForImageTextRetrieval.from_pretrained(tmp_path / "m", **options).eval()
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    made = [
        Gallery.build(paths[:4], tmp_path / name, model=model, processor=processor, num_workers=0)
        for name, model in (("one", offloaded), ("other", plain))
    ]
    assert made[0].model == made[1].model
    one, other = (np.stack(list(case.all_vectors(gallery).values())) for gallery in made)
    assert np.allclose(one, other, atol=1e-5)


def test_the_tokenizer_is_asked_by_one_thread_at_a_time():
    """A fast tokenizer that is set up differently by two threads at once raises "Already borrowed"."""

    class Borrowed:
        def __init__(self):
            self.free = threading.Lock()

        def __call__(self, text, return_tensors):
            assert self.free.acquire(blocking=False), "Already borrowed"
            time.sleep(0.005)
            self.free.release()
            return {"input_ids": torch.ones(1, 3), "attention_mask": torch.ones(1, 3)}

    encoder = Encoder(case.model_and_processor()[0], Borrowed())
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(encoder.tokenize, [["a title"]] * 12))


def test_a_model_in_training_mode_is_used_in_evaluation_mode(paths, tmp_path):
    model = tiny.spread_model(text_config={"hidden_dropout_prob": 0.5})
    expected = Gallery.build(paths, tmp_path / "e", model=model, processor=tiny.processor(), num_workers=0)
    torch.manual_seed(7)
    model.train()
    gallery = Gallery.build(paths, tmp_path / "g", model=model, processor=tiny.processor(), num_workers=0)
    assert model.training and torch.initial_seed() == 7
    assert np.array_equal(list(case.all_vectors(gallery).values()), list(case.all_vectors(expected).values()))


# --- photos -----------------------------------------------------------------------------------------------------------


def test_photos_that_are_gone(paths, tmp_path):
    made = tiny.photos(tmp_path / "photos", 3)
    gallery = build(made, tmp_path / "g")
    hits = gallery.search(unit_vectors(1), 3)[0]
    assert gallery.photo(hits[0]).size == (40, 30)
    Path(hits[0]["path"]).unlink()
    gallery.remove([hits[1]["id"]])
    for hit, message in ((hits[0], "the image file is missing"), (dict(hits[1]), None)):
        if message is not None:
            with pytest.raises(UnusableItem, match=message):
                gallery.photo(hit)
    del hits[1]["path"]
    with pytest.raises(UnusableItem, match="it is no longer in the gallery"):
        gallery.photo(hits[1])
    encoder = Encoder(*case.model_and_processor())
    with pytest.raises(
        UsageError, match=f"needs the photo of item {hits[0]['id']!r}, .*: the image file is missing: .*/00\\d.png. Set"
    ):
        gallery.image_tokens(hits[:1], encoder)
    without = build([Path(path).read_bytes() for path in paths[:2]], tmp_path / "without")
    with pytest.raises(UnusableItem, match="the gallery has neither its path nor a thumbnail"):
        without.photo(without.sample(1)[0])


# --- several at once --------------------------------------------------------------------------------------------------


def writer(uri, number, barrier, rounds):
    """Puts the same new ids in as the others do, all at once, and changes and removes others."""
    gallery = Gallery.open(uri)
    for turn in range(rounds):
        barrier.wait()
        ids = [f"new {turn} {n}" for n in range(3)] + [f"item {n}" for n in range(turn, turn + 4)]
        gallery.upsert_vectors(vector_table(unit_vectors(7, seed=number * 100 + turn), ids))
        gallery.remove([f"item {30 + turn * 3 + number}"])


def test_several_processes_write_at_once_and_lose_nothing(tmp_path):
    gallery, rounds = stored(tmp_path, 60), 8
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(3)
    processes = [context.Process(target=writer, args=(gallery.uri, n, barrier, rounds)) for n in range(3)]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):  # reading goes on, and sees every id once
        ids = gallery._now().dataset.to_table(columns=["id"])["id"].to_pylist()
        assert len(set(ids)) == len(ids)
        gallery.search(unit_vectors(1), 5)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    expected = {f"item {n}" for n in range(60)} - {f"item {n}" for n in range(30, 54)}
    expected |= {f"new {turn} {n}" for turn in range(rounds) for n in range(3)}
    assert set(case.ids_of(gallery)) == expected and len(gallery) == len(expected)
    assert len(gallery.versions()) >= 6 * rounds


def test_without_a_lock_equal_new_ids_are_still_inserted_once(tmp_path, monkeypatch):
    """As at an address: Lance compares what it inserts with what others have, if no index is asked."""
    gallery = stored(tmp_path, 60)
    monkeypatch.setattr(tables, "is_address", lambda uri: True)
    barrier = threading.Barrier(4)

    def put(number):
        mine = Gallery.open(gallery.uri)
        for turn in range(6):
            barrier.wait()
            mine.upsert_vectors(vector_table(unit_vectors(2, seed=number), [f"new {turn}", f"own {turn} {number}"]))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(put, range(4)))
    monkeypatch.undo()
    assert len(gallery.refresh()) == len(set(case.ids_of(gallery))) == 60 + 6 + 24


def test_changes_go_on_while_an_index_is_made_and_pieces_are_joined(tmp_path):
    gallery = Gallery.from_vectors(vector_table(unit_vectors(3000), price=[1] * 3000), tmp_path / "g")
    done = threading.Event()
    count = [0, 0]

    def change(which):
        mine = Gallery.open(gallery.uri)
        while not done.is_set() or count[which] < 3:
            mine.upsert_vectors(
                vector_table(unit_vectors(2), [f"{which} {count[which]}", f"item {which}"], price=[2, 2])
            )
            count[which] += 1

    threads = [threading.Thread(target=change, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for kind in ("IVF_FLAT", "IVF_PQ"):
        gallery.create_index(kind, columns=["price"], measure_recall=0, quiet=True)
        gallery.optimize()
    done.set()
    for thread in threads:
        thread.join()
    assert len(gallery) == 3000 + sum(count) == len(set(case.ids_of(gallery)))
    assert gallery.count("price = 2") == sum(count) + 2 and gallery.has_index
    assert gallery.search(unit_vectors(1), 3, where="price = 2")[0][0]["itc"] == pytest.approx(1, abs=1e-5)


FORKED = """
import multiprocessing, sys, warnings
from aliblip import Gallery

def use(gallery, queue):
    try:
        queue.put(len(gallery))
    except Exception as error:
        queue.put(f"{type(error).__name__}: {error}")

if __name__ == "__main__":
    gallery = Gallery.open(sys.argv[1])
    for method in ("fork", "spawn"):
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        process = context.Process(target=use, args=(gallery, queue))
        process.start()
        print(queue.get(timeout=120))
        process.join()
"""


def test_a_forked_process_is_refused_and_a_spawned_one_opens_again(tmp_path):
    stored(tmp_path)
    (tmp_path / "script.py").write_text(FORKED)
    command = [case.sys_executable(), tmp_path / "script.py", tmp_path / "g"]
    ended = run(command, env={"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}, cwd=tmp_path)
    assert_succeeded(ended)
    forked, spawned = ended.stdout.splitlines()
    assert (
        forked.startswith("RuntimeError: this process was forked from one that had used a gallery") and spawned == "50"
    )
    assert "fork-safe" not in ended.stderr


def test_without_lancedb_the_package_works_and_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "lance", None)
    for call in (
        lambda: Gallery.open(tmp_path),
        lambda: build(["x.png"], tmp_path / "g"),
        lambda: Gallery.from_vectors(vector_table(unit_vectors(2)), tmp_path / "g"),
    ):
        with pytest.raises(ImportError, match=r"a stored gallery needs LanceDB: .*install .*\[gallery\]"):
            call()
        with pytest.raises(UsageError):
            call()


def test_searches_find_a_version_while_every_older_one_is_removed(tmp_path, monkeypatch):
    """Each time that a version was opened, somebody else has already made the next one and removed it."""
    gallery = Gallery.from_vectors(vector_table(unit_vectors(30), price=[1] * 30), tmp_path / "g")
    writer, now, opened = Gallery.open(gallery.uri), Gallery._now, []

    def slow(self):
        view = now(self)
        if self is gallery:
            opened.append(view.dataset.version)
            if len(opened) < 6:
                writer.upsert_vectors(vector_table(unit_vectors(30), price=[len(opened)] * 30))
                writer.optimize(keep=timedelta(0))
        return view

    monkeypatch.setattr(Gallery, "_now", slow)
    assert [hit["price"] for hit in gallery.search(unit_vectors(1), 2, where="price > 0")[0]] == [5, 5]
    assert len(opened) == len(set(opened)) == 6
    del opened[:]
    (file, *_) = (tmp_path / "g" / "items.lance" / "data").iterdir()
    file.unlink()
    opened += range(10)
    with pytest.raises(UsageError, match="are gone or damaged"):  # the same version again
        gallery.search(unit_vectors(1), 2, where="price > 0")
    assert len(opened) == 10 + 3  # the width, and two tries
