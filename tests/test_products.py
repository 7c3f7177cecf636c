"""A product is what the data says, where it says nothing the photo; and a run tells what it understood."""

import csv
import datetime
import hashlib
import json
import os
import struct
import uuid
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_stub import encoded, photo

from aliblip.data import products
from aliblip.data.products import photo_id_of, product_id_of, report, tell_sources
from aliblip.data.python_rows import open_rows
from aliblip.data.sources import open_source
from aliblip.runtime.mistakes import UsageError

COUNT = 40


def hashed(data):
    return struct.unpack("<q", hashlib.blake2b(data, digest_size=8).digest())[0]


def draw_photos(folder, names):
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(photo(index)))


def write_jsonl(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_table(file, first, count, **columns):
    images = pa.array([encoded(photo(i)) for i in range(first, first + count)], pa.binary())
    titles = [f"title {i}" for i in range(first, first + count)]
    pq.write_table(pa.table({"image": images, "caption": titles, **columns}), file, row_group_size=7)


def opened(folder, **options):
    return open_source(data_dir=str(folder), split="train", **options)


def ids_of(source):
    return [row.product_id for row in source.read_range(0, source.num_rows)]


def told(source):
    """What is told of products, after what was found and read."""
    lines = []
    tell_sources(source, tell=lines.append)
    assert all("\n" not in line for line in lines)
    head = source.report()
    assert lines[: len(head)] == head
    return [line.strip() for line in lines[len(head) :]]


# ----------------------------------------------------------------------------------------------------- what is equal


@pytest.mark.parametrize(
    "value", [100, 100.0, np.int32(100), np.float32(100), Decimal("100"), Decimal("100.00"), "100"]
)
def test_a_whole_number_is_itself_whatever_its_type(value):
    assert product_id_of(value) == 100
    assert product_id_of(f" {value} ".replace("100.00", "100")) == 100


def test_numbers_as_data_frames_write_them_are_whole_too():
    assert [
        product_id_of(text) for text in ("100.0", "-3", "-3.0", "0", "0.0", b"100", "\ufeff 7".strip("\ufeff"))
    ] == [*(100, -3, -3, 0, 0, 100, 7)]
    for number in (2**63 - 1, -(2**63), 2**63, 10**18, 10**19, 10**30, 10**5000):
        text = hex(number) if number > 10**4000 else str(number)  # Python writes no more than 4,300 digits
        if number < 10**4000:
            assert product_id_of(text) == product_id_of(number) == product_id_of(f"{text}.0")
    assert product_id_of(2**63 - 1) == 2**63 - 1 and product_id_of(2**63) == hashed(str(2**63).encode())
    assert product_id_of("9" * 5000) == hashed(b"9" * 5000)


def test_what_a_text_adds_is_information():
    values = [100, "0100", "00100", "+100", "100.00", "100.5", "1e2", "100,0", "1 00", "0x64", "１００", "P100", "p100"]
    values += ["-0", "--100", "100-", True, "True", "1.0.0", "100.0.0", ["a", 1], {"a": 1}, [100], ["100"], "\ud800"]
    ids = [product_id_of(value) for value in values]
    assert None not in ids and len(set(ids)) == len(ids)
    assert all(-(2**63) <= i < 2**63 for i in ids)
    assert product_id_of("sku") == product_id_of(" sku\n") == product_id_of(b"sku") == hashed(b"sku")
    assert product_id_of(1.5) == product_id_of("1.5") == product_id_of(Decimal("1.5"))
    assert product_id_of(b"\xff\xfe\x00") == hashed(b"\xff\xfe\x00")
    key, day = uuid.UUID(int=7), datetime.date(2024, 2, 29)
    assert product_id_of(key) == product_id_of(str(key)) and product_id_of(day) == product_id_of("2024-02-29")


@pytest.mark.parametrize(
    "value",
    [None, float("nan"), float("inf"), Decimal("NaN"), np.float64("nan"), "", "  ", "\t\n", "\u200b\ufeff", [], {}]
    + ["nan", "NaN", "NAN", "-nan", "N/A", "n/a", "NA", "#N/A", "<NA>", "null", "NULL", "None", "none", "nil", "\\N"]
    + [" nan ", "-", "--", "—", "–", "?", "...", "''", '""', "/", "_", "#REF!", "#VALUE!", "undefined", b"NaN", b""],
)
def test_what_says_that_there_is_no_id_is_none(value):
    assert product_id_of(value) is None


@pytest.mark.parametrize(
    "value", ["0", "no", "x", "nano", "nan-12", "NA-7", "none-such", "👟", "é", "鞋", "N", "1", 0, -1, False]
)
def test_what_only_looks_like_none_is_an_id(value):
    assert product_id_of(value) is not None


# ------------------------------------------------------------------------------------------------- rows without an id


def test_titles_of_one_photo_are_one_product_without_being_told(tmp_path):
    names = ["a.png", "sub/b.png"]
    draw_photos(tmp_path, names)
    write_jsonl(
        tmp_path / "metadata.jsonl",
        [{"file_name": name, "caption": f"{name} {word}"} for name in names for word in ("new", "used", "cheap")]
        + [{"file_name": "./sub/../a.png", "caption": "the first again"}, {"file_name": "gone.png", "caption": "x"}],
    )
    ids = ids_of(opened(tmp_path))
    assert ids[:3] == [ids[0]] * 3 and ids[3:6] == [ids[3]] * 3 and ids[6] == ids[0] and len(set(ids)) == 3
    for column in ("image", "file_name"):
        source = opened(tmp_path, product_id_column=column)
        assert ids_of(source) == ids
        assert report(source).products == 3 and report(source).largest[:2] == (("'a.png'", 4), ("'sub/b.png'", 3))
    # The same catalogue at another place, through a linked folder, and as a list with a folder of photos.
    moved = tmp_path / "moved"
    (moved / "elsewhere").mkdir(parents=True)
    for name in ("metadata.jsonl", "a.png", "sub"):
        os.rename(tmp_path / name, moved / "elsewhere" / name)
    (moved / "linked").symlink_to(moved / "elsewhere")
    assert ids_of(opened(moved / "linked")) == ids_of(opened(moved / "elsewhere")) == ids
    files = {"data_files": str(moved / "elsewhere" / "metadata.jsonl"), "image_dir": str(moved / "elsewhere")}
    assert ids_of(open_source(split="train", **files)) == ids
    assert ids_of(open_source(split="train", **files, product_id_column="file_name")) == ids


def test_titles_alone_know_the_photo_that_they_name(tmp_path):
    """So that photos and titles that are opened apart find each other."""
    draw_photos(tmp_path, ["train/a.png", "train/b.png"])
    rows = [{"file_name": f"{name}.png", "caption": f"{name} {i}"} for name in "ab" for i in range(2)]
    write_jsonl(tmp_path / "train" / "metadata.jsonl", rows)
    for column in ("image", "file_name"):
        photos, titles = (opened(tmp_path, product_id_column=column, sides=sides) for sides in ("images", "titles"))
        assert ids_of(photos) == ids_of(titles) and len(set(ids_of(titles))) == 2
        assert all(row.image is None for row in titles.read_range(0, 4))


def test_rows_of_the_same_bytes_are_one_product(tmp_path, monkeypatch):
    images = [encoded(photo(i // 5)) for i in range(COUNT)]
    paths = [{"bytes": image, "path": f"{i}.png"} for i, image in enumerate(images)]  # of other names
    for number, column in enumerate((pa.array(images, pa.binary()), pa.array(paths))):
        (tmp_path / str(number)).mkdir()
        table = pa.table({"image": column, "caption": [f"t {i}" for i in range(COUNT)]})
        pq.write_table(table, tmp_path / str(number) / "train.parquet")
        source = opened(tmp_path / str(number))
        ids = ids_of(source)
        assert ids == [ids[i // 5 * 5] for i in range(COUNT)] and len(set(ids)) == 8
        assert ids_of(opened(tmp_path / str(number), product_id_column="image")) == ids
        assert report(source).products == 8 and report(source).largest[0][1] == 5  # little data: it is read
        monkeypatch.setattr(products, "READ_FOR_COUNTING", 10)
        assert report(source).products is None
        assert "not counted, since that would read every photo" in told(source)[0]
        monkeypatch.undo()
    source = open_rows([{"image": image, "caption": "t"} for image in images], sides="both")
    assert ids_of(source) == ids


def test_rows_without_an_id_belong_to_their_photo(tmp_path):
    draw_photos(tmp_path, [f"{i}.png" for i in range(4)])
    rows = [
        {"file_name": f"{i % 4}.png", "caption": f"t{i}", "product_id": i % 4 if i >= 20 else None} for i in range(40)
    ]
    write_jsonl(tmp_path / "metadata.jsonl", rows)
    ids = ids_of(opened(tmp_path))
    assert ids[20:] == [i % 4 for i in range(20, 40)] and ids[:20] == ids[:4] * 5 and len(set(ids)) == 8
    # Without a photo they are products of their own.
    write_jsonl(tmp_path / "metadata.jsonl", [{"file_name": None, "caption": "t"}] * 3)
    assert len(set(ids_of(opened(tmp_path)))) == 3


def test_photos_of_one_record_are_one_product(tmp_path):
    draw_photos(tmp_path, [f"{i}.png" for i in range(6)])
    records = [{"image": [f"{i}.png", f"{i + 3}.png"], "caption": f"t{i}"} for i in range(3)]
    write_jsonl(tmp_path / "rows.jsonl", [*records, {"image": ["0.png"], "caption": "the first, again"}])
    images = [[encoded(photo(i)), encoded(photo(i + 3))] for i in range(3)] + [[encoded(photo(0))]]
    table = {"image": pa.array(images, pa.list_(pa.binary())), "caption": ["a", "b", "c", "d"], "sku": [1, 2, 2, None]}
    pq.write_table(pa.table(table), tmp_path / "rows.parquet")
    for name in ("rows.jsonl", "rows.parquet"):
        source = open_source(data_files=str(tmp_path / name), split="train")
        ids = ids_of(source)
        assert ids == [ids[0], ids[0], ids[2], ids[2], ids[4], ids[4], ids[0]] and len(set(ids)) == 3
        assert (report(source).products, report(source).largest[0][1]) == (3, 3)
    source = open_source(data_files=str(tmp_path / "rows.parquet"), split="train", product_id_column="sku")
    assert ids_of(source)[:6] == [1, 1, 2, 2, 2, 2]
    found = report(source)
    assert (found.products, found.without, found.largest) == (2, 1, (("2", 4), ("1", 2)))


def test_a_photo_is_told_by_its_address_or_its_place_below_the_root():
    root = "/shop/photos"
    same = ["/shop/photos/a/b.jpg", "/shop/photos//a/./b.jpg", "/shop/photos/c/../a/b.jpg"]
    assert {photo_id_of(path, root) for path in same} == {hashed(b"a/b.jpg")}
    assert photo_id_of("/other/b.jpg", root) == hashed(b"/other/b.jpg")
    assert photo_id_of("/shop/photos2/b.jpg", root) == hashed(b"/shop/photos2/b.jpg")
    assert photo_id_of("https://host/x/a.jpg?v=1#top", "https://host/x/") == hashed(b"a.jpg?v=1")
    assert photo_id_of("https://host/x/a.jpg?v=1") != photo_id_of("https://host/x/a.jpg?v=2")
    assert photo_id_of("s3://shop/x/a#1.jpg") != photo_id_of("s3://shop/x/a#2.jpg")
    assert photo_id_of(b"x") == hashed(b"x") and photo_id_of(None) is photo_id_of("") is photo_id_of(7) is None


# -------------------------------------------------------------------------------------------------- where columns are


@pytest.mark.parametrize("layout", ["lines", "list"])
@pytest.mark.parametrize("column", [None, "product_id", "größe"])
def test_a_column_that_comes_late_is_used(tmp_path, layout, column):
    draw_photos(tmp_path, [f"{i}.png" for i in range(4)])
    key = column or "product_id"
    rows = [
        {"image": f"{i % 4}.png", "caption": f"title {i}"} | ({key: f"P{i % 3}"} if i >= 1100 else {})
        for i in range(1200)
    ]
    file = tmp_path / f"{layout}.json{'l' if layout == 'lines' else ''}"
    if layout == "lines":
        file.write_text("".join(json.dumps(row).replace("\\u00f6", "\\u00F6") + "\n" for row in rows))
    else:
        file.write_text(json.dumps(rows, indent=1, ensure_ascii=False))
    source = open_source(data_files=str(file), split="train", product_id_column=column)
    assert source.selected.product_id == key
    found = report(source)
    assert (found.products, found.without, found.photos) == (3, 1100, 4)
    assert ids_of(source)[1100:] == [product_id_of(f"P{i % 3}") for i in range(1100, 1200)]
    with pytest.raises(UsageError, match=r"no column 'sku' \(--product_id_column\): there are .*'caption', '" + key):
        open_source(data_files=str(file), split="train", product_id_column="sku")


def test_a_title_that_speaks_of_the_column_does_not_make_one(tmp_path):
    rows = [{"image": "a.png", "caption": 'the "product_id" of it'}] * 1200
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert open_source(data_files=str(tmp_path / "rows.jsonl"), split="train").selected.product_id is None


def test_a_column_of_one_of_several_tables_is_used(tmp_path):
    draw_photos(tmp_path, [f"{i}.png" for i in range(COUNT)])
    for name, first, more in (("a", 0, []), ("b", 20, ["product_id"])):
        with open(tmp_path / f"{name}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "caption", *more])
            writer.writerows([f"{i}.png", f"t{i}", *(f"P{i // 2}" for _ in more)] for i in range(first, first + 20))
    source = open_source(data_files=[str(tmp_path / "a.csv"), str(tmp_path / "b.csv")], split="train")
    assert (report(source).products, report(source).without, report(source).photos) == (10, 20, 20)


def test_a_column_that_the_first_parquet_file_lacks_is_used(tmp_path):
    write_table(tmp_path / "train-0.parquet", 0, 20)
    write_table(tmp_path / "train-1.parquet", 20, 20, product_id=[f"P{i // 2}" for i in range(20, 40)])
    write_table(tmp_path / "train-2.parquet", 40, 4, sku=[1, 1, None, 2])
    source = opened(tmp_path)
    ids = ids_of(source)
    assert ids[20:40] == [product_id_of(f"P{i // 2}") for i in range(20, 40)] and len(set(ids)) == 20 + 10 + 4
    assert opened(tmp_path, product_id_column="product_id").selected == source.selected
    largest = "'P10' (2 rows), 'P11' (2 rows), 'P12' (2 rows)"
    assert told(source)[0] == f"10 products by the column 'product_id'; the largest: {largest}"
    assert "24 rows without an id (null 24): each photo is a product" in told(source)[1]
    assert report(opened(tmp_path, product_id_column="sku")).largest == (("1", 2),)
    with pytest.raises(UsageError, match="no column 'brand' .*'product_id', 'sku'"):
        opened(tmp_path, product_id_column="brand")


def test_types_of_parquet_files_do_not_matter(tmp_path):
    write_table(tmp_path / "train-0.parquet", 0, 20, product_id=pa.array(range(100, 120), pa.int64()))
    write_table(tmp_path / "train-1.parquet", 20, 20, product_id=[*map(str, range(100, 119)), "A119"])
    write_table(tmp_path / "train-2.parquet", 40, 20, product_id=pa.array([*map(float, range(100, 119)), None]))
    write_table(
        tmp_path / "train-3.parquet", 60, 20, product_id=pa.array(map(str, range(100, 120))).dictionary_encode()
    )
    write_table(tmp_path / "train-4.parquet", 80, 1, product_id=pa.array([Decimal("100.00")], pa.decimal128(9, 2)))
    write_table(tmp_path / "train-5.parquet", 81, 2, product_id=["0100", "nan"])
    source = opened(tmp_path)
    ids = ids_of(source)
    assert ids[:20] == ids[60:80] == list(range(100, 120)) and ids[20:39] == ids[40:59] == list(range(100, 119))
    assert ids[80] == 100 and ids[81] == hashed(b"0100") and len(set(ids)) == 20 + 1 + 1 + 1 + 1
    found = report(source)
    assert (found.products, found.without, dict(found.absent)) == (22, 2, {"null": 1, "'nan'": 1})
    assert found.largest == (("100", 5), ("101", 4), ("102", 4))


def test_paths_in_a_parquet_column_are_photos_too(tmp_path):
    draw_photos(tmp_path / "photos", ["a.png", "b.png"])
    table = {"image": ["a.png", "./a.png", "b.png", None], "caption": list("wxyz"), "sku": ["1", None, "-", None]}
    pq.write_table(pa.table(table), tmp_path / "train.parquet")
    options = {"data_files": str(tmp_path / "train.parquet"), "image_dir": str(tmp_path / "photos"), "split": "train"}
    source = open_source(**options)
    ids = ids_of(source)
    assert ids[0] == ids[1] != ids[2] != ids[3]
    assert (report(source).products, report(source).without) == (2, 1)
    found = report(open_source(**options, product_id_column="sku"))
    assert (found.products, found.without, found.photos) == (1, 3, None)


def test_late_keys_of_dictionaries_are_columns():
    rows = [{"image": b"x", "caption": "t"}] * 1100 + [{"image": b"y", "caption": "u", "product_id": "P"}] * 2
    source = open_rows(rows, sides="both")
    assert source.selected.product_id == "product_id"
    assert (report(source).products, report(source).without) == (1, 1100)
    with pytest.raises(UsageError, match="no column 'sku' .*'product_id'"):
        open_rows(rows, sides="both", product_id_column="sku")


# --------------------------------------------------------------------------------------------------- what is told


def write_ids(folder, ids):
    draw_photos(folder, [f"{i}.png" for i in range(len(ids))])
    rows = [{"file_name": f"{i}.png", "caption": f"t{i}", "product_id": value} for i, value in enumerate(ids)]
    write_jsonl(folder / "metadata.jsonl", rows)
    return opened(folder)


def test_texts_that_are_no_id_are_counted(tmp_path):
    absent = ["nan", "N/A", "-", "None", "null"]
    source = write_ids(
        tmp_path, [f"P{i // 2}" for i in range(10)] + [absent[i % 5] for i in range(25)] + [None, "", " "]
    )
    assert len(set(ids_of(source))) == 5 + 28
    lines = told(source)
    assert lines[0] == (
        "5 products by the column 'product_id'; the largest: 'P0' (2 rows), 'P1' (2 rows), 'P2' (2 rows)"
    )
    assert "28 rows without an id ('nan' 5, 'N/A' 5, '-' 5, 'None' 5, 'null' 5, 2 other texts), 28 photos" in lines[1]
    assert len(lines) == 2  # no warning


@pytest.mark.parametrize(
    ("ids", "warned"),
    [
        (["0"] * 30 + list(range(1, 11)), "0 (75% of the rows)"),  # another word for none
        (["unknown"] * 101 + [f"P{i}" for i in range(900)], "'unknown' (10% of the rows)"),
        (["one"] * 40, "'one' (100% of the rows)"),
        (["0"] * 4 + list(range(1, 37)), None),
        ([i % 4 for i in range(40)], None),  # few products, of equal size
        ([0] * 101 + [i // 2 for i in range(4000)], None),  # 2 %
    ],
)
def test_a_product_of_an_unlikely_share_is_told(tmp_path, ids, warned):
    write_jsonl(
        tmp_path / "rows.jsonl", [{"image": f"{i}.png", "caption": "t", "product_id": p} for i, p in enumerate(ids)]
    )
    lines = told(open_source(data_files=str(tmp_path / "rows.jsonl"), split="train"))
    warnings = [line for line in lines if line.startswith("warning: ")]
    assert len(warnings) == (warned is not None)
    if warned:
        assert warned in warnings[0].replace("'0'", "0") and "--product_id_column" in warnings[0]


def test_ids_that_a_spreadsheet_has_shortened_are_told(tmp_path):
    draw_photos(tmp_path, [f"{i}.png" for i in range(6)])
    for ids, warned in ((["8.90E+12"] * 3 + ["1", "2", "3"], True), (["8.90", "8E12", "A", "B", "C", "D"], False)):
        rows = [{"image": f"{i}.png", "caption": f"t{i}", "product_id": ids[i]} for i in range(6)]
        write_jsonl(tmp_path / "rows.jsonl", rows)
        warnings = report(open_source(data_files=str(tmp_path / "rows.jsonl"), split="train")).warnings()
        assert ["a spreadsheet has shortened" in warning for warning in warnings] == [True] * warned


def test_a_photo_of_an_unlikely_share_is_told(tmp_path):
    """A stand-in for photos that are not there, for instance."""
    rows = [
        {"image": "none.png" if i < 20 else f"{i}.png", "caption": "t", "price": 1, "Item ID": i} for i in range(40)
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    lines = told(open_source(data_files=str(tmp_path / "rows.jsonl"), split="train"))
    assert (
        "no product column (--product_id_column names one of: Item ID): each photo is a product, 21 photos" in lines[0]
    )
    assert lines[1].startswith("warning: ") and "'none.png' (50% of the rows)" in lines[1]


def test_ids_are_counted_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("aliblip.data.rows.CHUNK_ROWS", 3)
    monkeypatch.setattr("aliblip.data.parquet.CHUNK_ROWS", 3)
    ids = [f"P{i % 7}" if i % 3 else "nan" for i in range(COUNT)]
    (tmp_path / "folder").mkdir()
    (tmp_path / "table").mkdir()
    write_table(tmp_path / "table" / "train.parquet", 0, COUNT, product_id=ids)
    for source in (write_ids(tmp_path / "folder", ids), opened(tmp_path / "table")):
        pieces = list(source.product_ids())
        assert len(pieces) >= COUNT // 3 and np.concatenate([piece.known for piece in pieces]).sum() == 26
        known = [i for piece in pieces for i, there in zip(piece.ids.tolist(), piece.known, strict=True) if there]
        assert known == [product_id_of(i) for i in ids if i != "nan"]
        assert report(source).products == 7 and report(source).largest[0] == ("'P1'", 4)


def test_only_the_first_process_tells_and_nothing_there_ends_a_run(tmp_path, monkeypatch):
    source = write_ids(tmp_path, [1, 2])
    source.told.append("3 files were left")
    lines = []
    tell_sources(source, source, None, tell=lines.append)
    assert lines[-2:] == ["  3 files were left", "  2 products by the column 'product_id', each of one row"]
    assert lines.count("  3 files were left") == 1

    def fails():
        raise OSError("the disk\nis gone")

    monkeypatch.setattr(source, "product_ids", fails)
    assert told(source) == [f"warning: {source.name} (train): the products were not counted (the disk is gone)"]
    lines.clear()
    monkeypatch.setenv("RANK", "1")
    tell_sources(source, tell=lines.append)
    assert not lines


def test_names_are_shown_on_one_line():
    assert products.shown("a\nb") == "'a b'" and products.shown(None) == "null" and products.shown(7) == "7"
    assert products.shown("x" * 100) == f"'{'x' * 60}…'" and products.shown(b"\xff") == "'\ufffd'"
    assert products.shown("\ud800").encode()
