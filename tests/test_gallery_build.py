"""Building a stored gallery: what it holds, what is refused before the work, and what a stopped build leaves."""

import json
import os
import shutil
import tarfile
from pathlib import Path

import data_stub
import gallery_case as case
import hostile
import numpy as np
import pyarrow as pa
import pytest
import tiny
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from gallery_case import BROKEN, COUNT, build
from helpers import spawn
from PIL import Image

import retrieval_aliblip as engine
from aliblip import Gallery
from aliblip.data.rows import Row, decode
from aliblip.data.sources import ALL, open_source
from aliblip.retrieval import building, table_columns
from aliblip.runtime import parts
from aliblip.runtime.mistakes import UsageError
from encoder_aliblip import Encoder

GOOD = [number for number in range(COUNT) if number != BROKEN]


@pytest.fixture(scope="module")
def model():
    return case.model_and_processor()[0]


@pytest.fixture(scope="module")
def processor():
    return case.model_and_processor()[1]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return case.photos(tmp_path_factory.mktemp("gallery") / "photos")


@pytest.fixture(scope="module")
def built(paths, tmp_path_factory):
    return build(case.rows_of(paths), tmp_path_factory.mktemp("gallery") / "built", store_tokens=True, thumbnails=24)


def table_of(gallery):
    """Everything that a gallery holds, in order."""
    return gallery._now().dataset.to_table()


def same(one, other):
    assert one.equals(other) and one.schema.equals(other.schema)


# --- what it holds ----------------------------------------------------------------------------------------------------


def test_build_equals_embedding_by_hand(model, processor, paths, built):
    pixels = processor(images=[Image.open(paths[number]) for number in GOOD], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        vectors, tokens = engine.embed_images(model, pixels)
    stored = case.all_vectors(built)
    assert list(stored) == [f"sku-{number}" for number in GOOD]
    torch.testing.assert_close(torch.tensor(np.stack(list(stored.values()))), vectors, atol=1e-5, rtol=0)
    rows = built.get(list(stored))
    torch.testing.assert_close(built.image_tokens(rows, None).float(), tokens, atol=0.05, rtol=0.01)  # bf16
    assert built.skipped == [
        {"row": BROKEN, "name": paths[BROKEN], "reason": "the file is not an image of a known format"}
    ]
    assert len(built) == COUNT - 1 and built.has_tokens and built.kind == "image" and built.width == 16
    assert f"Gallery of 20 photos, 16 wide, with image tokens: {built.uri}" == repr(built)
    built.check_model(Encoder(model, processor).fingerprint)


def test_every_column_of_the_data_is_kept(paths, built):
    assert built.columns == ["price", "category", "stock", "tags", "size"]
    for number, row in zip(GOOD, built.get([f"sku-{number}" for number in GOOD]), strict=True):
        expected = {name: value for name, value in case.rows_of(paths)[number].items() if name != "image"}
        assert row == expected | {"position": row["position"], "path": paths[number]}
    types = {name: built.schema.field(name).type for name in built.columns}
    assert types["price"] == pa.float64() and types["stock"] == pa.int64() and types["tags"] == pa.list_(pa.string())
    assert types["size"] == pa.struct([("width", pa.int64()), ("unit", pa.string())])


def test_thumbnails_are_small_copies_of_the_whole_photo(paths, built):
    hit = built.search(case.unit_vectors(1), 1, columns=["thumbnail", "path"])[0][0]
    small = built.photo(hit)
    assert hit["thumbnail"][:2] == b"\xff\xd8" and small.size == (24, 18)
    original = Image.open(hit["path"]).convert("RGB").resize((24, 18), Image.Resampling.LANCZOS)
    difference = np.asarray(small).astype(int) - np.asarray(original)
    assert np.abs(difference).mean() < 12
    assert built.photo(built.get([hit["id"]])[0]).tobytes() == small.tobytes()  # read from the table
    assert "thumbnail" not in built.search(case.unit_vectors(1), 1)[0][0]


def test_columns_can_be_chosen(paths, tmp_path):
    gallery = build(case.rows_of(paths), tmp_path / "g", columns=["category"])
    assert gallery.columns == ["category"] and set(gallery.get(["sku-1"])[0]) == {"id", "position", "category", "path"}
    assert build(case.rows_of(paths), tmp_path / "none", columns=[]).columns == []
    table = Dataset.from_list([{**row, "image": None} for row in case.rows_of(paths)]).remove_columns("image")
    table = table.add_column("image", paths).cast_column("image", ImageFeature())
    gallery = build(table, tmp_path / "table", columns=["category", "size"])
    assert gallery.columns == ["category", "size"] and gallery.get(["sku-1"])[0]["size"] == {"width": 1, "unit": "cm"}


def test_columns_that_a_gallery_needs_for_itself_get_another_name(paths, tmp_path, caplog):
    rows = [
        {"image": path, "sku": n, "id": f"x{n}", "vector": n, "a.b": n, "itc": n, "path": "p", "text": "t"}
        for n, path in enumerate(paths[:4])
    ]
    gallery = build(rows, tmp_path / "g", id_column="sku")
    assert gallery.columns == ["sku", "data_id", "data_vector", "a_b", "data_itc", "data_path", "text"]
    assert gallery.get([2])[0] == {
        "id": 2,
        "position": 2,
        "path": paths[2],
        "text": "t",
        "data_path": "p",
        "sku": 2,
    } | {"data_id": "x2", "data_vector": 2, "a_b": 2, "data_itc": 2}
    assert "the column 'id' is called 'data_id' in the gallery" in caplog.text
    gallery.upsert(
        [{**rows[1], "id": "new"}], model=case.model_and_processor()[0], processor=case.model_and_processor()[1]
    )
    assert gallery.get([1])[0]["data_id"] == "new"


def test_values_of_several_types(paths, tmp_path, caplog):
    rows = [
        {
            "image": path,
            "id": n,
            "mixed": [1, "two", 3.5, {"four": 4}][n],
            "number": [1, 2.5, None, True][n],
            "none": None,
        }
        for n, path in enumerate(paths[:4])
    ]
    gallery = build(rows, tmp_path / "g")
    assert [row["mixed"] for row in gallery.get([0, 1, 2, 3])] == ["1", "two", "3.5", '{"four": 4}']
    assert "the column 'mixed' holds values of several types" in caplog.text
    assert gallery.schema.field("none").type == pa.string()


def test_titles(model, processor, tmp_path):
    titles = [*tiny.titles(9), " ", None, 7]
    gallery = build(titles, tmp_path / "g", kind="text")
    batch = processor(text=titles[:9], return_tensors="pt")
    with torch.no_grad():
        expected = engine.embed_texts(model, **batch)
    torch.testing.assert_close(
        torch.tensor(np.stack(list(case.all_vectors(gallery).values()))), expected, atol=1e-5, rtol=0
    )
    assert gallery.kind == "text" and gallery.get([2]) == [{"id": 2, "position": 2, "text": titles[2]}]
    assert [entry["reason"] for entry in gallery.skipped] == [
        "the title has no visible character",
        "the title is null",
        "the title is not text but int",
    ]


def test_every_source_gives_the_same(paths, tmp_path):
    data = [Path(path).read_bytes() for path in paths]
    skus = [f"sku-{number}" for number in range(COUNT)]
    rows = [{"image": value, "sku": sku} for value, sku in zip(data, skus, strict=True)]
    table = [{"image": {"bytes": row["image"], "path": None}, "sku": row["sku"]} for row in rows]
    table = Dataset.from_list(table, Features({"image": ImageFeature(), "sku": Value("string")}))
    table.to_parquet(tmp_path / "rows.parquet")
    parquet = open_source(data_files=str(tmp_path / "rows.parquet"), split="train", sides="images", other_columns=ALL)
    sources = {"rows": rows, "generator": (row for row in rows), "data set": table, "parquet": parquet}
    expected = list(case.all_vectors(build(paths, tmp_path / "paths")).values())
    for name, source in sources.items():
        gallery = build(source, tmp_path / name, id_column="sku")
        vectors = case.all_vectors(gallery)
        assert np.array_equal(list(vectors.values()), expected), name
        assert list(vectors) == [skus[number] for number in GOOD] and gallery.columns == ["sku"]
        assert [entry["row"] for entry in gallery.skipped] == [BROKEN]
        assert gallery.get(["sku-0"])[0]["path"] is None


def test_tars_whose_later_samples_bring_other_columns(paths, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(table_columns, "SURVEYED_ROWS", 4)
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for number, path in enumerate(paths[:8]):
            fields = {"sku": f"sku-{number}", "price": number if number < 6 else "dear"}
            fields |= {"late": 1} if number > 5 else {}
            data_stub.add_member(tar, f"{number:03}.png", Path(path).read_bytes())
            data_stub.add_member(tar, f"{number:03}.json", json.dumps(fields).encode())
    source = open_source(data_files=str(tmp_path / "train-0.tar"), split="train", sides="images", other_columns=ALL)
    gallery = build(source, tmp_path / "g", id_column="sku")
    assert gallery.columns == ["sku", "price", "late"]
    assert [(row["price"], row["late"]) for row in gallery.get(["sku-4", "sku-6"])] == [(4, None), (None, "1")]
    assert "values of another type than their column, which are left out: price (2)" in caplog.text
    shutil.copy(tmp_path / "train-0.tar", tmp_path / "train-1.tar")
    with tarfile.open(tmp_path / "train-1.tar", "a") as tar:  # no copy, which would be refused as such
        data_stub.add_member(tar, "README.md", b"the same samples")
    files = [str(tmp_path / f"train-{number}.tar") for number in range(2)]
    twice = open_source(data_files=files, split="train", sides="images", other_columns=ALL)
    with pytest.raises(UsageError, match="some ids come twice .the column 'sku'.: .*sku-0.* and 2 more"):
        build(twice, tmp_path / "h", id_column="sku")


def test_ids_come_from_the_column_the_names_or_the_rows(paths, tmp_path):
    assert case.ids_of(build(paths, tmp_path / "paths")) == [paths[number] for number in GOOD]
    assert case.ids_of(build([{"image": path, "price": 1} for path in paths], tmp_path / "rows")) == GOOD
    folder = open_source(data_dir=str(Path(paths[0]).parent), split="train", sides="images", other_columns=ALL)
    gallery = build(folder, tmp_path / "folder")
    assert case.ids_of(gallery) == [Path(paths[number]).name for number in GOOD]
    assert gallery.get(["000.png"])[0]["path"] == "000.png" and gallery.photo(gallery.get(["000.png"])[0]).size == (
        40,
        30,
    )
    images = [Image.open(paths[number]) for number in GOOD]
    assert case.ids_of(build(images, tmp_path / "images")) == list(range(COUNT - 1))


def test_photos_are_seen_as_in_training(model, processor, tmp_path):
    """Orientation, transparency, colour profiles and 16 bits: where the gallery saw others, its scores would lie."""
    photos, exif = tmp_path / "photos", Image.Exif()
    noise = Image.merge("RGB", [Image.effect_noise((30, 20), 60) for _ in range(3)])
    photos.mkdir()
    exif[0x0112] = 6
    noise.save(photos / "turned.png", exif=exif)
    noise.save(photos / "wide.png", icc_profile=hostile.rgb_profile(hostile.DISPLAY_P3, None))
    Image.new("RGBA", (4, 4), (9, 9, 9, 0)).save(photos / "clear.png")
    Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100).save(photos / "deep.png")
    paths = sorted(str(path) for path in photos.iterdir())
    seen = [decode(Row(0, path, None, 0, path), "images").image for path in paths]
    encoder = Encoder(model, processor)
    for path, photo in zip(paths, seen, strict=True):
        assert torch.equal(encoder.pixels(path), processor(images=[photo], return_tensors="pt")["pixel_values"][0])
    assert seen[3].tobytes() != noise.tobytes() and seen[2].size == (20, 30)
    one, other = build(paths, tmp_path / "one"), build(seen, tmp_path / "other")
    assert np.array_equal(list(case.all_vectors(one).values()), list(case.all_vectors(other).values()))


# --- mistakes, before anything is embedded ----------------------------------------------------------------------------


@pytest.fixture
def nothing_is_embedded(monkeypatch):
    def never(*_):
        raise AssertionError("embedded")

    monkeypatch.setattr(building, "embedded_units", never)


def test_mistakes_come_before_the_work(nothing_is_embedded, model, paths, tmp_path):
    rows = case.rows_of(paths)
    for given, options, message in (
        (
            [*paths, *paths[:2]],
            {},
            "some ids come twice .the names of the photos.: .*000.png', .*001.png'. Make them",
        ),
        (
            [{"image": path, "id": 4} for path in paths[:2]],
            {},
            "some ids come twice .the column 'id'.: 4. Make.*duplicates='first'",
        ),
        (
            [{"image": path, "id": 0.5} for path in paths],
            {},
            "the column 'id' of the data holds double: an id is text or",
        ),
        ([{"image": path, "id": None} for path in paths], {}, "the column 'id' of the data is null in every row"),
        (rows, {"id_column": "sku"}, "the data has no column 'sku'"),
        (rows, {"columns": ["colour"]}, "the data has no column 'colour'"),
        (rows, {"image_column": "photo"}, "the data has no column 'photo' .image_column."),
        (paths[0], {}, "the data is one str: give a list"),
        ([], {}, "has no rows"),
        (paths, {"kind": "photo"}, "kind is 'photo': choose one of image, text"),
        (paths, {"unit_size": 0}, "unit_size is 0: give a whole number of at least 1"),
        (paths, {"batch_size": 1.5}, "batch_size is 1.5"),
        (paths, {"num_workers": -1}, "num_workers is -1"),
        (paths, {"thumbnails": 3}, "thumbnails is 3: give the longest side"),
        (paths, {"duplicates": "last"}, "duplicates is 'last': choose one of error, first"),
        (tiny.titles(3), {"kind": "text", "store_tokens": True}, "store_tokens: titles have no image tokens"),
        (tiny.titles(3), {"kind": "text", "thumbnails": True}, "thumbnails: titles have no thumbnails"),
    ):
        with pytest.raises(UsageError, match=message) as raised:
            build(given, tmp_path / "g", **options)
        assert "\n" not in str(raised.value) and "--" not in str(raised.value)
    assert not (tmp_path / "g").exists()


def test_places_that_hold_something_else(nothing_is_embedded, paths, built, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("years of work")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "gallery.json").write_text("{}")
    for place, message in (
        (paths[0], "is a file: give a folder"),
        (tmp_path / "thesis", "holds something else than a gallery: give a new or an empty folder"),
        (tmp_path / "old", "holds a gallery of version 0.1, in another format: give a new folder"),
        ("", "the gallery's place is ''"),
    ):
        for overwrite in (False, True):
            with pytest.raises(UsageError, match=message):
                build(paths, place, overwrite=overwrite)
    with pytest.raises(
        UsageError, match="give a new place .uri., put rows into it .upsert., or overwrite=True to replace it"
    ):
        build(paths, built.uri)
    assert (tmp_path / "thesis" / "thesis.txt").read_text() == "years of work"


def test_what_is_no_gallery(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "gallery.json").write_text("{}")
    for place, message in (
        (tmp_path, "is no gallery: give what python -m aliblip.gallery or Gallery.build made"),
        (tmp_path / "nowhere", "nowhere does not exist"),
        (tmp_path / "old", "holds a gallery of version 0.1, whose format is no longer read: build it again"),
    ):
        with pytest.raises(UsageError, match=message):
            Gallery.open(place)
    import lance

    lance.write_dataset(pa.table({"id": [1]}), str(tmp_path / "other" / "items.lance"))
    with pytest.raises(UsageError, match="was not made by Gallery.build"):
        Gallery.open(tmp_path / "other")


def test_a_gallery_needs_one_usable_row(paths, tmp_path):
    with pytest.raises(UsageError, match="none of 1 rows can be used, the first because the file is not an image"):
        build([paths[BROKEN]], tmp_path / "none")
    with pytest.raises(UsageError, match="was not built to its end: call the build again"):
        Gallery.open(tmp_path / "none")


def test_duplicates(paths, tmp_path):
    rows = [{"image": path, "id": number % 7} for number, path in enumerate(paths)]
    gallery = build(rows, tmp_path / "g", duplicates="first", store_tokens=True)
    # number 5, which is broken, makes room for number 12
    assert case.ids_of(gallery) == [0, 1, 2, 3, 4, 6, 5]
    assert [row["path"] for row in gallery.get([6, 5])] == [paths[6], paths[12]]
    twice = [entry for entry in gallery.skipped if entry["reason"] == "the id comes twice"]
    assert [entry["row"] for entry in twice] == [n for n in range(7, COUNT) if n != 12]
    expected = build(paths, tmp_path / "h", store_tokens=True)
    tokens = [one.image_tokens(one.get([key]), None) for one, key in ((gallery, 5), (expected, paths[12]))]
    assert torch.equal(*tokens)


def test_duplicates_that_only_the_end_can_tell(paths, tmp_path, monkeypatch):
    """As in tars, whose ids are read with the photos: what was embedded is kept for another rule."""
    monkeypatch.setattr(building, "ids_told_ahead", lambda *_: None)
    rows = [{"image": path, "id": number % 10} for number, path in enumerate(paths[:13])]
    with pytest.raises(UsageError, match="some ids come twice .the column 'id'.: 0, 1, 2. Make"):
        build(rows, tmp_path / "g")
    monkeypatch.setattr(building, "embedded_units", lambda model, loader, units, **_: iter([]) if not units else 1 / 0)
    gallery = build(rows, tmp_path / "g", duplicates="first")
    assert case.ids_of(gallery) == [0, 1, 2, 3, 4, 6, 7, 8, 9]


def test_names_of_photos_that_are_no_text(paths, tmp_path, caplog):
    name = os.fsdecode(bytes(tmp_path) + b"/caf\xe9.png")
    shutil.copy(paths[0], name)
    gallery = build([name, paths[1]], tmp_path / "g")
    ids = case.ids_of(gallery)
    assert ids == [f"{tmp_path}/caf\\udce9.png", paths[1]]
    assert [row["path"] for row in gallery.get(ids)] == [None, paths[1]]
    assert "values of another type than their column, which are left out: path (1)" in caplog.text


def test_rows_without_id_are_left_out_and_told(paths, tmp_path, caplog):
    rows = [{"image": paths[0], "id": None}, {"image": paths[1], "id": "a"}]
    gallery = build(rows, tmp_path / "g")
    assert case.ids_of(gallery) == ["a"]
    assert gallery.skipped == [{"row": 0, "name": paths[0], "reason": "the id is null"}]
    assert "1 of 2 rows are left out for lack of an id, the first is row 0" in caplog.text


# --- builds that were stopped -----------------------------------------------------------------------------------------


class Dying(list):
    """A list of rows; reading the one at `fatal` ends the build."""

    fatal = None

    def __getitem__(self, position):
        if position == self.fatal:
            raise KeyboardInterrupt
        return super().__getitem__(position)


@pytest.fixture
def every_block_is_noted(monkeypatch):
    monkeypatch.setattr(parts, "SECONDS", -1.0)


def stopped(rows, place, fatal, **options):
    """A build that ends at a row, after everything was looked at."""
    dying, real = Dying(rows), building.Build._embed

    def embed(self, *args):
        dying.fatal = fatal
        try:
            return real(self, *args)
        finally:
            dying.fatal = None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building.Build, "_embed", embed)
        with pytest.raises(KeyboardInterrupt):
            build(dying, place, **options)


@pytest.mark.parametrize("fatal", [2, 9, 20])
def test_a_stopped_build_goes_on_and_is_equal(fatal, paths, built, tmp_path, monkeypatch, every_block_is_noted):
    rows, place = case.rows_of(paths), tmp_path / "stopped"
    options = {"store_tokens": True, "thumbnails": 24}
    stopped(rows, place, fatal, **options)
    with pytest.raises(UsageError, match="was not built to its end: call the build again"):
        Gallery.open(place)
    seen, real = [], building.EvalLoader.units
    monkeypatch.setattr(building.EvalLoader, "units", lambda loader, units: seen.extend(units) or real(loader, units))
    gallery = build(rows, place, **options)
    assert seen == list(range(fatal // 4 * 2, 11))  # passes of two rows, blocks of two passes
    same(table_of(gallery), table_of(built))
    assert gallery.skipped == built.skipped
    assert sorted(os.listdir(place)) == sorted(os.listdir(built.uri))
    used = {file.path for one in gallery._now().dataset.get_fragments() for file in one.metadata.files}
    assert used <= set(os.listdir(place / "items.lance" / "data"))


def test_a_build_that_was_stopped_after_its_commit_goes_on(paths, built, tmp_path, monkeypatch):
    monkeypatch.setattr(building, "compact", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build(case.rows_of(paths), tmp_path / "g", store_tokens=True, thumbnails=24)
    monkeypatch.undo()
    monkeypatch.setattr(building, "embedded_units", None)  # nothing is embedded again
    gallery = build(case.rows_of(paths), tmp_path / "g", store_tokens=True, thumbnails=24)
    same(table_of(gallery), table_of(built))
    assert len(gallery._now().dataset.get_fragments()) == 1 and not (tmp_path / "g" / "build").exists()


def test_a_build_refuses_to_go_on_with_something_else(paths, tmp_path, every_block_is_noted):
    rows, place = case.rows_of(paths), tmp_path / "g"
    stopped(rows, place, 9)
    for given, options, message in (
        (rows, {"batch_size": 1}, "batch_size was 2, is 1"),
        (rows, {"seed": 1}, "model was"),
        (rows, {"columns": ["price"]}, "columns was"),
        (rows[1:], {}, "data was"),
        ([{**row, "price": row["price"] + 1} for row in rows], {}, "data was"),
    ):
        with pytest.raises(UsageError, match=message) as raised:
            build(given, place, **options)
        assert "give another place (uri), or overwrite=True to drop it" in str(raised.value)
    gallery = build(rows, place, batch_size=1, overwrite=True)
    assert len(gallery) == COUNT - 1


def test_files_that_dead_builds_left_are_removed(paths, built, tmp_path, monkeypatch):
    monkeypatch.setattr(building.Parts, "SECONDS", 1e9, raising=False)  # nothing is noted
    stopped(case.rows_of(paths), tmp_path / "g", 13)
    folder = tmp_path / "g" / "items.lance" / "data"
    assert len(os.listdir(folder)) == 3
    monkeypatch.setattr(building, "compact", lambda *_: None)
    gallery = build(case.rows_of(paths), tmp_path / "g")
    used = {str(file.path) for one in gallery._now().dataset.get_fragments() for file in one.metadata.files}
    assert set(os.listdir(folder)) == used and len(used) == 6


def test_an_overwrite_leaves_the_gallery_before_until_the_commit(paths, tmp_path, every_block_is_noted):
    place = tmp_path / "g"
    old = build(paths[:4], place)
    before = table_of(old)
    follower, query = Gallery.open(place), case.unit_vectors(1)
    stopped(case.rows_of(paths), place, 9, overwrite=True)
    same(table_of(Gallery.open(place)), before)
    assert len(follower) == 4
    snapshot = follower.snapshot()
    new = build(case.rows_of(paths), place, overwrite=True)
    assert len(new) == len(follower) == COUNT - 1 and follower.columns == new.columns
    assert follower.search(query, 3) == new.search(query, 3) and len(snapshot.search(query, 9)[0]) == 4
    assert new.skipped != [] and Gallery.open(place, version=old.versions()[0]["version"]).columns == []
    # the numbers of rows go on where the old ones ended, in the order of the data
    positions = [row["position"] for row in new.get(case.ids_of(new))]
    assert positions == sorted(positions)


def test_two_builds_at_once_in_one_place_are_refused(paths, tmp_path, monkeypatch):
    """The second would take the files of the first for those of a dead one."""
    real = building.Build._embed

    def embed(self, *args):
        with pytest.raises(
            UsageError, match="is in use by a build of the gallery .process .*: wait until that has ended"
        ):
            build(paths, tmp_path / "g")
        return real(self, *args)

    monkeypatch.setattr(building.Build, "_embed", embed)
    assert len(build(paths, tmp_path / "g")) == COUNT - 1


def test_a_folder_that_holds_another_gallery_by_now(paths, tmp_path):
    gallery = build(paths[:3], tmp_path / "g")
    assert len(gallery.search(case.unit_vectors(1), 9)[0]) == 3
    shutil.rmtree(tmp_path / "g")
    with pytest.raises(UsageError, match="does not exist"):
        gallery.search(case.unit_vectors(1), 9)
    build(paths[:5], tmp_path / "g")
    assert len(gallery.search(case.unit_vectors(1), 9)[0]) == 5


# --- processes --------------------------------------------------------------------------------------------------------


def in_two_processes(rows, place):
    """What both ranks see of a build, and of one that fails on rank 1 alone."""
    gallery = build(rows, place, store_tokens=True, thumbnails=24)
    found = case.ids_of(gallery), gallery.skipped
    real = building.Build._write

    def write(self, units, *args):
        if units[0].number == 2:
            raise OSError("the disk is gone")
        return real(self, units, *args)

    building.Build._write = write
    try:
        build(rows, f"{place}-failing")
    except Exception as error:
        return *found, f"{type(error).__name__}: {error}"
    finally:
        building.Build._write = real


def test_two_processes_build_the_same_gallery(paths, built, tmp_path):
    results = spawn(in_two_processes, 2, case.rows_of(paths), str(tmp_path / "two"))
    assert [result[:2] for result in results] == [(case.ids_of(built), built.skipped)] * 2
    same(table_of(Gallery.open(tmp_path / "two")), table_of(built))
    assert [error for *_, error in results] == [
        "RuntimeError: rank 1 could not build its part of the gallery: OSError: the disk is gone",
        "OSError: the disk is gone",
    ]


def test_what_one_process_began_two_bring_to_an_end(paths, built, tmp_path, every_block_is_noted):
    options = {"store_tokens": True, "thumbnails": 24}
    stopped(case.rows_of(paths), tmp_path / "g", 9, **options)
    spawn(go_on, 2, case.rows_of(paths), str(tmp_path / "g"), options)
    same(table_of(Gallery.open(tmp_path / "g")), table_of(built))


def go_on(rows, place, options):
    return len(build(rows, place, **options))


@pytest.mark.filterwarnings("ignore:lance is not fork-safe")  # they never touch a table
def test_readers_in_processes_of_their_own_give_the_same(paths, built, tmp_path):
    gallery = build(case.rows_of(paths), tmp_path / "g", store_tokens=True, thumbnails=24, num_workers=2)
    same(table_of(gallery), table_of(built))
