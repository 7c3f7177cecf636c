"""Which columns of a table are read: by default, by name, or all of them."""

import datetime
import json
import tarfile
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_stub import NAMES, add_member, encoded, photo, records, write_layouts

from aliblip.data.products import photo_id_of
from aliblip.data.rows import decode
from aliblip.data.sources import ALL, open_source
from aliblip.runtime.mistakes import UsageError

COUNT = 11


def rows_of(source):
    return [row for shard in source.shards for row in source.read(shard.index)]


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    return write_layouts(tmp_path_factory.mktemp("layouts"), COUNT)


def test_only_the_needed_columns_are_read(layouts):
    source = open_source(split="train", **layouts["parquet"])
    assert source.columns == ["image", "caption", "product_id", "price"]
    assert open_source(split="validation", **layouts["parquet sub-folders"]).num_rows == 3


def test_columns_by_name(tmp_path):
    entries = [{"file_name": "a.png", "title": "t", "caption": "c", "sku": 7}]
    (tmp_path / "a.png").write_bytes(encoded(photo(0)))
    (tmp_path / "list.json").write_text(json.dumps(entries))
    source = open_source(
        data_files=str(tmp_path / "list.json"), split="train", caption_column="title", product_id_column="sku"
    )
    assert decode(rows_of(source)[0]).text == "t" and rows_of(source)[0].product_id == 7
    source = open_source(data_files=str(tmp_path / "list.json"), split="train")
    row = rows_of(source)[0]
    assert decode(row).text == "c" and row.product_id == photo_id_of("a.png")  # no such column: the photo


def test_every_other_column(layouts):
    """`ALL` gives what the data has beside the photo, as Python values, whatever the layout."""
    for name in NAMES:
        source = open_source(split="train", **layouts[name], other_columns=ALL)
        title = source.selected.caption
        assert {title, "product_id"} <= set(source.selected.others), name
        for row, record in zip(rows_of(source), records(COUNT), strict=True):
            assert row.others[title] == record["caption"] and row.others["product_id"] == record["product_id"]
            if "paths" not in name:  # whose photo is another column
                assert not {"image", "png", "json", "product", "file_name"} & set(row.others), name
            if name in ("parquet", "parquet by name", "parquet glob"):
                assert row.others["price"] == 1.5
            assert decode(row).text == record["caption"]
        schema = source.schema_of_others()
        assert (schema is None) != name.startswith("parquet"), name
        if schema is not None:
            assert schema.names == list(source.selected.others) and schema.field("caption").type == pa.string()
    assert open_source(split="train", **layouts["parquet"]).schema_of_others() == pa.schema([])


def test_every_other_column_of_titles_leaves_the_photos_where_they_are(layouts):
    for name in ("parquet", "tars", "folder", "json list"):
        source = open_source(split="train", **layouts[name], sides="titles", other_columns=ALL)
        assert set(rows_of(source)[0].others) <= {"caption", "product_id", "price"}, name


def test_nested_and_typed_columns(tmp_path, caplog):
    day, stamp = datetime.date(2024, 2, 29), datetime.datetime(2024, 2, 29, 12, tzinfo=datetime.timezone.utc)
    columns = {
        "image": [encoded(photo(0)), encoded(photo(1))],
        "caption": ["a", "b"],
        "sizes": [[1, 2], []],
        "seller": [{"name": "x", "tags": ["p"]}, None],
        "category": pa.array(["mug", None]).dictionary_encode(),
        "price": pa.array([Decimal("9.50"), None], pa.decimal128(8, 2)),
        "day": [day, None],
        "stamp": pa.array([stamp, None], pa.timestamp("us", "UTC")),
        "map": pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int64())),
    }
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    source = open_source(data_dir=str(tmp_path), split="train", other_columns=ALL)
    first, second = rows_of(source)
    expected = {"caption": "a", "sizes": [1, 2], "seller": {"name": "x", "tags": ["p"]}, "category": "mug"}
    assert first.others == {**expected, "price": Decimal("9.50"), "day": day, "stamp": stamp}
    assert second.others == {**dict.fromkeys(first.others), "caption": "b", "sizes": []}
    schema = source.schema_of_others()
    assert schema.field("price").type == pa.decimal128(8, 2) and schema.field("category").type == pa.string()
    assert pa.Table.from_pylist([first.others, second.others], schema).to_pylist() == [first.others, second.others]
    # `datasets` can't read maps: told, or refused where it was named
    assert "left out are columns of a type that can't be read: 'map' (map<string, int64" in caplog.text
    with pytest.raises(UsageError, match="column 'map' is of type map"):
        open_source(data_dir=str(tmp_path), split="train", other_columns=["map"])


def test_files_that_do_not_have_the_same_columns(tmp_path):
    for number, more in enumerate(({"price": [1, 2]}, {"price": [1.5], "new": ["x"]}, {})):
        rows = len(more.get("price", [0]))
        table = {"image": [encoded(photo(0))] * rows, "caption": ["a"] * rows, **more}
        pq.write_table(pa.table(table), tmp_path / f"train-{number}.parquet")
    source = open_source(data_dir=str(tmp_path), split="train", other_columns=ALL)
    others = [(row.others["price"], row.others["new"]) for row in rows_of(source)]
    assert others == [(1, None), (2, None), (1.5, "x"), (None, None)]
    assert source.schema_of_others() == pa.schema({"caption": pa.string(), "price": pa.float64(), "new": pa.string()})
    with pytest.raises(UsageError, match="train-2.parquet has no column 'price' that the first file has"):
        open_source(data_dir=str(tmp_path), split="train", other_columns=["price"])
    pq.write_table(pa.table({"image": [b""], "title": ["a"]}), tmp_path / "train-3.parquet")
    with pytest.raises(UsageError, match="train-3.parquet has no column 'caption' that the first file has"):
        open_source(data_dir=str(tmp_path), split="train", other_columns=ALL)


def test_keys_of_records_that_come_late(tmp_path):
    rows = [{"product": "a.png", "caption": "t"}] * 3000 + [{"product": "b.png", "caption": "u", "late": 1}]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    source = open_source(data_files=str(tmp_path / "list.json"), split="train", other_columns=ALL)
    assert source.columns == ["product", "caption", "late"]
    assert [row.others for row in rows_of(source)][2999:] == [
        {"caption": "t", "late": None},
        {"caption": "u", "late": 1},
    ]


def test_every_field_of_a_tar(tmp_path):
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        add_member(tar, "a.jpg", encoded(photo(0), "JPEG"))
        add_member(tar, "a.json", b'{"caption": "t", "price": {"eur": 9}}')
        add_member(tar, "a.npy", b"\x93NUMPY")
        add_member(tar, "a.cls", b"7")
        add_member(tar, "b.png", encoded(photo(1)))
        add_member(tar, "b.json", b'{"caption": "u", "late": 1}')
    source = open_source(data_dir=str(tmp_path), split="train", other_columns=ALL)
    assert [row.others for row in rows_of(source)] == [
        {"caption": "t", "price": {"eur": 9}, "npy": b"\x93NUMPY", "cls": 7, "late": None},
        {"caption": "u", "price": None, "npy": None, "cls": None, "late": 1},
    ]
