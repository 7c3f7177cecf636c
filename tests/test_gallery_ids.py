"""What rows of any kind become in a gallery: numbers of files that have texts alone, ids of all sorts."""

import errno
import shutil
from pathlib import Path

import gallery_case as case
import lance
import numpy as np
import pytest
import torch
from gallery_case import build, unit_vectors, vector_table

from aliblip import Gallery
from aliblip.data.columns import ALL
from aliblip.data.sources import open_source
from aliblip.retrieval import building, galleries, upserting
from aliblip.retrieval.views import photo_at
from aliblip.runtime.mistakes import UsageError
from reading_aliblip import UnusableItem


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return case.photos(tmp_path_factory.mktemp("gallery") / "photos")


def test_numbers_of_a_csv_file_are_numbers(paths, tmp_path, caplog):
    """A CSV file has texts alone, and a filter by price needs a number."""
    lines = [
        "image;id;price;stock;code;note",
        f"{paths[0]};7;12.50;3;0100;",
        f"{paths[1]};8;9;;200;1",
        f"{paths[2]};9;-1.5; ;300;x",
    ]
    (tmp_path / "rows.csv").write_text("\n".join(lines))

    def opened(name: str):
        folder = str(Path(paths[0]).parent)
        return open_source(
            data_files=str(tmp_path / name), image_dir=folder, split="train", sides="images", other_columns=ALL
        )

    gallery = build(opened("rows.csv"), tmp_path / "g")
    kinds = {name: str(gallery.schema.field(name).type) for name in ("id", "price", "stock", "code", "note")}
    assert kinds == {"id": "string", "price": "double", "stock": "int64", "code": "string", "note": "string"}
    told = [gallery.get(["7", "8", "9"])[n][name] for name in ("price", "stock", "code") for n in range(3)]
    assert told == [12.5, 9.0, -1.5, 3, None, None, "0100", "200", "300"]
    assert "numbers, since all of their texts are: price, stock" in caplog.text
    assert gallery.count("price < :most AND stock = 3", {"most": 20}) == 1
    # Rows of another file are put in with numbers too, and what is none is told; a gallery of numbered ids takes them.
    (tmp_path / "more.csv").write_text(f"image,id,price,stock,code\n{paths[3]},0010,7,1.5,1\n")
    model, processor = case.model_and_processor()
    report = gallery.upsert(opened("more.csv"), model=model, processor=processor)
    assert str(report) == (
        "rows inserted: 1; replaced: 0; values of another type than their column, which are left out: stock (1)"
    )
    assert gallery.get(["0010"])[0] | {"position": 0} == {
        **{"id": "0010", "position": 0, "price": 7.0, "stock": None, "code": "1", "note": None, "path": paths[3]}
    }
    numbered = build([{"image": paths[0], "id": 10, "price": 1}], tmp_path / "numbered")
    (tmp_path / "more.csv").write_text(f"image,id,price\n{paths[3]},10,7\n")
    assert numbered.upsert(opened("more.csv"), model=model, processor=processor).updated == 1
    assert numbered.get([10])[0]["price"] == 7


@pytest.fixture
def stored(tmp_path):
    ids = ["a", "b'", "\N{SNOWMAN}", "d" * 10_000, "", "f\0"]
    return Gallery.from_vectors(vector_table(unit_vectors(6), ids), tmp_path / "g")


def test_ids_of_all_sorts(stored, tmp_path):
    ids = case.ids_of(stored)
    assert [row["id"] for row in stored.get(ids)] == ids and stored.get(["x' OR '1'='1", "\udcff"]) == []
    for wrong in ([1], [None], [True], [1.5], [b"a"], [["a"]]):
        for asked in (stored.get, stored.remove):
            with pytest.raises(UsageError, match="is no id of this gallery: its ids are text"):
                asked(wrong)
    for wrong in ("a", 5, {"a": 1}):
        with pytest.raises(UsageError, match="give a list"):
            stored.get(wrong)
    assert stored.remove(["b'", "x' OR '1'='1", "d" * 10_000]) == 2 and len(stored) == 4
    whole = [-(2**63), -5, 0, 2**63 - 1]
    numbers = Gallery.from_vectors(vector_table(unit_vectors(4), whole), tmp_path / "numbers")
    assert [row["id"] for row in numbers.get([np.int64(-5), *whole])] == [-5, *whole]
    for wrong in ("0", True, 2**63, 1.0):
        with pytest.raises(UsageError, match="its ids are whole numbers of 64 bits"):
            numbers.remove([wrong])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda gallery: gallery.create_index(columns="id"), "columns is 'id': give a list"),
        (lambda gallery: gallery.create_index("IVF_FLAT", measure_recall=-1), "measure_recall is -1"),
        (lambda gallery: gallery.optimize(keep=7), "keep is 7: give a timedelta"),
        (lambda gallery: Gallery.open(gallery.uri, version=-1), "version is -1: give the number of one"),
        (lambda gallery: Gallery.open(None), "the gallery's place is None"),
        (lambda gallery: Gallery.open(__file__), "is a file: give the folder of a gallery"),
        (lambda gallery: gallery.search("abc", 1), "the queries are no vectors"),
        (lambda gallery: gallery.upsert_vectors([1]), "the rows are a list: give an Arrow table"),
        (lambda gallery: gallery.count("x" * 10_000), "^the filter 'x{200,300}.{,900}$"),
        (lambda gallery: gallery.save(f"{__file__}/g"), "can't be made"),
        (lambda gallery: Gallery.from_vectors(vector_table(unit_vectors(2)), f"{__file__}/g"), "is a file: give a"),
        (lambda gallery: build(None, f"{gallery.uri}-new"), "the data is None: give a list"),
        (lambda gallery: build(["a.png"], "/proc/gallery"), "the folder /proc/gallery can't be made"),
        (lambda gallery: gallery.push_to_hub("not a name"), "the upload to not a name failed"),
    ],
)
def test_mistakes_are_told_in_one_line(call, message, stored):
    with pytest.raises(UsageError, match=message) as caught:
        call(stored)
    assert "\n" not in str(caught.value) and ".rs:" not in str(caught.value)


def test_vectors_that_are_not_finite_or_come_twice_leave_no_gallery(tmp_path):
    broken = vector_table(torch.full((2, 16), float("nan")))
    with pytest.raises(UsageError, match="^the vectors are not all finite$"):
        Gallery.from_vectors(broken, tmp_path / "g")
    with pytest.raises(UsageError, match="some ids come twice"):
        Gallery.from_vectors(vector_table(unit_vectors(2), ["a", "a"]), tmp_path / "g")
    with pytest.raises(UsageError, match="is no gallery"):
        Gallery.open(tmp_path / "g")
    assert len(Gallery.from_vectors(vector_table(unit_vectors(2)), tmp_path / "g")) == 2


def test_a_gallery_that_goes_while_it_is_open(stored):
    snapshot = stored.snapshot()
    snapshot.search(unit_vectors(1), 1)
    shutil.rmtree(stored.uri)
    for call in (lambda: stored.search(unit_vectors(1), 1), lambda: len(stored), stored.optimize, stored.versions):
        with pytest.raises(UsageError, match="does not exist: give the folder of a gallery"):
            call()
    with pytest.raises(UsageError, match="is no longer there"):
        snapshot.get(["a"])


def test_rows_without_image_tokens_are_told(paths, tmp_path):
    """They come of `upsert_vectors`, and of LanceDB's own client, as columns do that no build knows."""
    gallery = build(case.rows_of(paths[:4]), tmp_path / "g", store_tokens=True)
    gallery.upsert_vectors(vector_table(unit_vectors(1), ["bare"]))
    with pytest.raises(UsageError, match="the item 'bare' is no longer in the gallery, or has no image tokens"):
        gallery.image_tokens(gallery.get(["sku-1", "bare"]), None)
    lance.dataset(f"{gallery.uri}/items.lance").add_columns({"colour": "'red'"})
    model, processor = case.model_and_processor()
    gallery.upsert([{**case.rows_of(paths)[1], "colour": "blue"}], model=model, processor=processor)
    assert [row["colour"] for row in gallery.get(["sku-0", "sku-1"])] == ["red", "blue"]


def test_a_photo_by_its_name_alone_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UnusableItem, match="the image file is missing: A.png; there is 'a.png', with other capitals"):
        photo_at("A.png")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError("LanceError(IO): No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_line_and_changes_nothing(error, paths, stored, tmp_path, monkeypatch):
    def full(*args, **options):
        raise error

    model, processor = case.model_and_processor()
    photos = [{"id": "a", "image": paths[0]}]
    made = build(photos, tmp_path / "made")
    monkeypatch.setattr(galleries, "create_index", full)
    monkeypatch.setattr(lance.LanceDataset, "deep_clone", full)
    monkeypatch.setattr(lance.LanceDataset, "delete", full)
    monkeypatch.setattr(building.Build, "_write", full)
    monkeypatch.setattr(upserting, "merged", full)
    for call in (
        lambda: stored.create_index("IVF_FLAT", quiet=True),
        lambda: stored.save(tmp_path / "copy"),
        lambda: stored.remove(["a"]),
        lambda: build(paths, tmp_path / "new"),
        lambda: made.upsert(photos, model=model, processor=processor),
    ):
        with pytest.raises(UsageError, match="^the disk is full, and the gallery is as it was: make room"):
            call()
    monkeypatch.undo()
    assert len(stored) == 6 and len(made) == 1 and not (tmp_path / "copy").exists()
    assert len(build(paths, tmp_path / "new")) == len(paths) - 1
