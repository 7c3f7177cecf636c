"""Rows given in Python come out like those of every other source; and what a collator tells of rows for people."""

import io
import json
import os
import pickle

import datasets
import numpy as np
import pyarrow as pa
import pytest
from data_stub import StubProcessor, encoded, photo
from PIL import Image

from aliblip.data.collate import Collator, thumbnail
from aliblip.data.loader import EvalLoader
from aliblip.data.manifest import manifest_changes
from aliblip.data.products import product_id_of
from aliblip.data.python_rows import ALL, open_rows
from aliblip.data.rows import decode
from aliblip.data.sources import require_usable_row
from aliblip.runtime.mistakes import UsageError
from reading_aliblip import UnusableItem

COUNT = 130  # more than two shards


class TitleStub(StubProcessor):
    """Also of one side alone."""

    def __call__(self, images, text, **options):
        if images is None or text is None:
            options = {"return_tensors": "pt", "padding": True, "truncation": True}
            both = super().__call__(images or [photo(0)], text or ["a"], **options)
            return {key: value for key, value in both.items() if (key == "pixel_values") == (text is None)}
        return super().__call__(images, text, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")  # folders called as those of photos are found by other tests' tables
    for i in range(5):
        (folder / f"{i}.png").write_bytes(encoded(photo(i)))
    return folder


def pixels(source):
    return [np.asarray(decode(row, "images").image) for row in source.read_range(0, source.num_rows)]


def given(folder, kind):
    """The same five photos, given in many ways."""
    paths = [str(folder / f"{i}.png") for i in range(5)]
    data = [encoded(photo(i)) for i in range(5)]
    data_set = datasets.Dataset.from_dict({"image": paths, "sku": list("abcde")}).cast_column("image", datasets.Image())
    return {
        "paths": paths,
        "path objects": [folder / f"{i}.png" for i in range(5)],
        "a tuple": tuple(paths),
        "an array": np.array(paths),
        "a generator": (path for path in paths),
        "bytes": data,
        "PIL": [photo(i) for i in range(5)],
        "stored bytes": [{"bytes": value, "path": "x.png"} for value in data],
        "stored paths": [{"bytes": None, "path": path} for path in paths],
        "dictionaries": [{"image": path} for path in paths],
        "stored in dictionaries": [{"image": {"bytes": value, "path": None}} for value in data],
        "a data set": data_set,
        "a formatted data set": data_set.with_format("numpy"),
        "a column": data_set["image"],
    }[kind]


KINDS = ("paths", "path objects", "a tuple", "an array", "a generator", "bytes", "PIL", "stored bytes", "stored paths")
KINDS += ("dictionaries", "stored in dictionaries", "a data set", "a formatted data set", "a column")


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_give_photos_gives_the_same(folder, kind):
    source = open_rows(given(folder, kind))
    assert source.num_rows == 5 and source.sides == "images" and source.random_access
    for index, found in enumerate(pixels(source)):
        assert np.array_equal(found, np.asarray(photo(index)))
    assert len({row.product_id for row in source.read_range(0, 5)}) == 5
    assert [row.row for row in source.read_range(3, 5)] == [3, 4]
    again = pickle.loads(pickle.dumps(source))  # to a reader process
    assert len(pixels(again)) == 5


def test_a_row_is_called_by_its_path(folder):
    path = str(folder / "2.png")
    for rows in (given(folder, "paths"), given(folder, "stored paths"), given(folder, "a data set")):
        assert [row.name for row in open_rows(rows).read_range(2, 3)] in ([path], ["2.png"])
    assert next(open_rows(given(folder, "bytes")).read_range(2, 3)).name == "row 2"


def test_photos_of_a_data_set_stay_undecoded(folder):
    rows = [{"bytes": encoded(photo(0)), "path": None}, {"bytes": b"no photo", "path": None}]
    data_set = datasets.Dataset.from_dict({"image": rows}).cast_column("image", datasets.Image())
    for given in (data_set, data_set["image"]):
        source = open_rows(given)
        good, bad = source.read_range(0, 2)
        assert isinstance(good.image, bytes) and decode(good, "images").image.size == photo(0).size
        with pytest.raises(UnusableItem, match="not an image"):
            decode(bad, "images")


def test_titles():
    source = open_rows([f"title {i}" for i in range(COUNT)], sides="titles")
    assert [shard.num_rows for shard in source.shards] == [64, 64, 2]
    assert [decode(row, "titles").text for row in source.read_range(0, COUNT)] == [f"title {i}" for i in range(COUNT)]
    rows = [{"title": "blue mug", "sku": 7}, {"title": "red lamp", "sku": "x"}]
    source = open_rows(rows, sides="titles", caption_column="title", product_id_column="sku")
    assert [row.text for row in source.read_range(0, 2)] == ["blue mug", "red lamp"]
    assert [row.product_id for row in source.read_range(0, 2)] == [7, product_id_of("x")]


def test_every_other_column(folder):
    nested = {"size": [1, 2], "of": {"a": None}}
    rows = [{"image": "a.png", "caption": "t", "price": 9.5, "nested": nested}, {"image": "b.png", "late": True}]
    source = open_rows(rows, other_columns=ALL)
    assert source.columns == ["image", "caption", "price", "nested", "late"] and source.schema_of_others() is None
    first, second = source.read_range(0, 2)
    assert first.others == {"caption": "t", "price": 9.5, "nested": nested, "late": None}
    assert second.others == {"caption": None, "price": None, "nested": None, "late": True}
    # a key that comes after the columns were looked at is given all the same
    rows = [{"image": "a.png"}] * 1000 + [{"image": "b.png", "new": 1}]
    source = open_rows(np.array(rows, dtype=object), other_columns=ALL)
    assert source.columns == ["image"]
    assert [row.others for row in source.read_range(999, 1001)] == [{}, {"new": 1}]
    assert open_rows(rows, other_columns=ALL).columns == ["image", "new"]  # of what is in memory all is looked at
    source = open_rows(given(folder, "a data set"), other_columns=ALL)
    assert source.schema_of_others() == pa.schema({"sku": pa.string()})
    assert [row.others["sku"] for row in source.read_range(0, 5)] == list("abcde")
    source = open_rows(given(folder, "a data set"), other_columns=["sku"], product_id_column="sku")
    assert next(source.read_range(1, 2)).others == {"sku": "b"}


def test_mistakes_are_one_line_in_the_words_of_python(folder):
    def message(*args, **options):
        with pytest.raises(UsageError) as caught:
            open_rows(*args, **options)
        assert "\n" not in str(caught.value) and "--" not in str(caught.value)
        return str(caught.value)

    assert "give at least one" in message([])
    assert "is one str" in message("a.png") and "is one dict" in message({"image": "a.png"})
    rows = [{"photo": "a.png", "caption": "t"}]
    assert message(rows) == ("the data has no column 'image': there are 'photo', 'caption'; name one with image_column")
    assert "no column 'picture' (image_column)" in message(rows, image_column="picture")
    assert "no column 'price'" in message(rows, image_column="photo", other_columns=["price"])
    assert "no column 'sku'" in message(["a.png"], product_id_column="sku")
    assert "no columns" in message(["a.png"], sides="both")
    data_set = given(folder, "a data set")
    assert "is a stream" in message(data_set.to_iterable_dataset())
    assert "is a DataFrame" in message(data_set.to_pandas())
    assert "is a Table" in message(pa.table({"image": ["a.png"]}))


def test_an_odd_row_is_a_hole_with_a_reason():
    rows = [{"image": encoded(photo(0)), "sku": 1}, 5, {"image": None}, {"image": 7}]
    reasons = []
    for row in open_rows(rows, other_columns=ALL).read_range(0, 4):
        try:
            decode(row, "images")
            reasons.append("")
        except UnusableItem as error:
            reasons.append(str(error))
    assert reasons[0] == "" and reasons[1] == "the row is not a dictionary but int"
    assert "null" in reasons[2] and "neither bytes nor a path but int" in reasons[3]
    require_usable_row(open_rows(rows, other_columns=ALL))


def test_the_manifest_tells_whether_rows_are_the_same(folder):
    base = open_rows(given(folder, "paths")).manifest()
    assert json.loads(json.dumps(base)) == base and base["rows"] == 5
    assert manifest_changes(base, open_rows(given(folder, "a tuple")).manifest()) == []
    assert manifest_changes(base, open_rows(given(folder, "paths")[::-1]).manifest())
    assert manifest_changes(base, open_rows([*given(folder, "paths"), "one more"]).manifest())
    for kind in ("bytes", "PIL", "a data set"):
        assert open_rows(given(folder, kind)).manifest() == open_rows(given(folder, kind)).manifest()
    changed = [photo(i) for i in range(5)]
    changed[3].putpixel((0, 0), (1, 2, 3))
    assert manifest_changes(open_rows(given(folder, "PIL")).manifest(), open_rows(changed).manifest())
    # values do not run into each other
    assert open_rows([{"image": "a", "b": "c"}]).manifest() != open_rows([{"image": "ab", "": "c"}]).manifest()


# --------------------------------------------------------------------------------------------- what a batch describes


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_batch_describes_its_rows(folder, workers):
    rows = [
        {"image": str(folder / "0.png"), "price": 9.5, "tags": ["a"]},
        {"image": encoded(Image.new("RGB", (900, 300), (200, 10, 10)), "JPEG"), "price": None, "tags": []},
        {"image": b"no photo", "price": 3.0, "tags": []},
        {"image": str(folder / "1.png"), "price": 1.0, "tags": ["b", "c"]},
    ]
    source = open_rows(rows, other_columns=ALL)
    options = {"sides": "images", "describe": True, "others_as_text": False, "thumbnail_side": 384}
    collator = Collator(TitleStub(), **options)
    loader = EvalLoader(source, collator, unit_size=3, rank=0, world_size=1, num_workers=workers)
    first, second = [batch for _, batch in loader]
    assert first["row"].tolist() == [0, 1] and second["row"].tolist() == [3]
    assert first["path"] == [str(folder / "0.png"), None] and second["path"] == [str(folder / "1.png")]
    assert first["others"] == [{"price": 9.5, "tags": ["a"]}, {"price": None, "tags": []}]
    assert [skipped["row"] for skipped in first["skipped"]] == [2]
    small, large = [Image.open(io.BytesIO(data)) for data in first["thumbnail"]]
    assert (small.format, small.mode) == ("JPEG", "RGB")
    assert small.size == photo(0).size and large.size == (384, 128)  # whole, and never enlarged
    assert np.abs(np.asarray(large).astype(int) - (200, 10, 10)).max() < 8
    text = Collator(TitleStub(), sides="images", describe=True)(list(source.read_range(0, 2)), fill=False)
    assert text["others"] == [{"price": "9.5", "tags": "['a']"}, {"price": "None", "tags": "[]"}]
    assert "thumbnail" not in text


def test_titles_have_no_thumbnail():
    source = open_rows(["a title"], sides="titles")
    collator = Collator(TitleStub(), sides="titles", describe=True, thumbnail_side=384)
    batch = collator(list(source.read_range(0, 1)), fill=False)
    assert "thumbnail" not in batch and batch["path"] == [None] and batch["text"] == ["a title"]


def test_a_thumbnail_leaves_the_photo_as_it_is():
    large = Image.new("RGB", (100, 50))
    assert Image.open(io.BytesIO(thumbnail(large, 10))).size == (10, 5) and large.size == (100, 50)
    assert Image.open(io.BytesIO(thumbnail(Image.new("RGB", (1000, 1)), 10))).size == (10, 1)


def test_reading_is_from_the_folder_of_the_process(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert np.array_equal(pixels(open_rows(["1.png"]))[0], np.asarray(photo(1)))
    assert os.fspath(next(open_rows(["1.png"]).read_range(0, 1)).image) == "1.png"
