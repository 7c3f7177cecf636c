"""Every layout gives the same rows, bad input is one plain line, hostile rows are used correctly or refused."""

import json
import os
import re
import struct
import tarfile
import zlib
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_stub import (
    NAMES,
    add_member,
    encoded,
    photo,
    records,
    write_layouts,
    write_parquet,
)
from PIL import Image
from real_products import PRODUCTS, needs_products

from aliblip.data import parquet
from aliblip.data.products import product_id_of
from aliblip.data.rows import Row, decode
from aliblip.data.sources import OPENERS, open_source, require_usable_row
from aliblip.runtime.mistakes import UsageError
from reading_aliblip import MAX_TITLE_CHARACTERS, UnusableItem

COUNT = 11


def rows_of(source):
    return [row for shard in source.shards for row in source.read(shard.index)]


def reason(image=None, text="a title", problem=None):
    with pytest.raises(UnusableItem) as caught:
        decode(Row(0, image, text, 0, "row 0", problem))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pixels(data):
    return np.asarray(decode(Row(0, data, "a title", 0, "row 0")).image)


# ----------------------------------------------------------------------------------------------------------- layouts


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    return write_layouts(tmp_path_factory.mktemp("layouts"), COUNT)


@pytest.mark.parametrize("name", NAMES)
def test_every_layout_gives_the_same_rows(layouts, name):
    source = open_source(split="train", **layouts[name])
    assert source.num_rows == COUNT == sum(shard.num_rows for shard in source.shards)
    rows = rows_of(source)
    assert [row.row for row in rows] == list(range(COUNT))
    for index, (row, record) in enumerate(zip(rows, records(COUNT), strict=True)):
        example = decode(row)
        assert example.text == record["caption"] and example.row == index
        assert example.product_id == product_id_of(record["product_id"])
        assert np.array_equal(np.asarray(example.image), np.asarray(photo(index)))
        assert Path(row.name).stem == Path(record["file"]).stem


@pytest.mark.parametrize("name", NAMES)
def test_titles_are_read_without_photos(layouts, name):
    source = open_source(split="train", **layouts[name])
    titles = source.titles_only()
    rows = list(titles.read_range(0, COUNT))
    assert [row.text for row in rows] == [record["caption"] for record in records(COUNT)]
    assert not any(isinstance(row.image, bytes) for row in rows) and titles.sides == "titles"
    assert [decode(row).row for row in rows_of(source)] == list(range(COUNT)), "the source is what it was"


@pytest.mark.parametrize("name", NAMES)
def test_reading_a_part_is_a_slice_of_reading_all(layouts, name):
    source = open_source(split="train", **layouts[name])
    for shard in source.shards:
        whole = [(row.row, row.text) for row in source.read(shard.index)]
        for start in range(shard.num_rows + 1):
            for stop in (start, start + 1, start + 3, None):
                part = [(row.row, row.text) for row in source.read(shard.index, start, stop)]
                assert part == whole[start:stop]
    every = [row.row for row in rows_of(source)]
    for start, stop in ((0, COUNT), (3, 9), (10, 11), (5, 5)):
        assert [row.row for row in source.read_range(start, stop)] == every[start:stop]


def test_parquet_skips_row_groups_without_reading_them(layouts, monkeypatch):
    monkeypatch.setattr(parquet, "SHARD_ROWS", 4)
    source = open_source(split="train", **layouts["parquet"])
    assert [shard.num_rows for shard in source.shards] == [4, 1, 4, 2]  # groups of 2, joined within a file
    assert source.shards[1].name == "train-00000-of-00002.parquet#2-2"
    assert [decode(row).text for row in rows_of(source)] == [record["caption"] for record in records(COUNT)]
    seen = []
    real = parquet._stream_row_groups

    def counting(*args):
        groups = real(*args)
        shard = groups.shard
        groups.shard = lambda num_shards, index, contiguous: (
            seen.append(index) or shard(num_shards=num_shards, index=index, contiguous=contiguous)
        )
        return groups

    monkeypatch.setattr(parquet, "_stream_row_groups", counting)
    assert [row.row for row in source.read(2, 2, 3)] == [7]
    assert seen == [1]
    # A datasets without reshard(), or one whose reshard() leaves Parquet whole, gives the same rows.
    monkeypatch.setattr(parquet, "_stream_row_groups", real)
    monkeypatch.setattr(datasets.IterableDataset, "reshard", lambda self: self)
    for shard in source.shards:
        for start in range(shard.num_rows):
            for stop in range(start, shard.num_rows + 1):
                rows = [row.row for row in source.read(shard.index, start, stop)]
                assert rows == list(range(shard.first_row + start, shard.first_row + stop))


# --------------------------------------------------------------------------------------------------- errors at start


def test_bad_requests_are_one_line(layouts, tmp_path):
    def message(**arguments):
        with pytest.raises(UsageError) as caught:
            open_source(**{"split": "train", **arguments})
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "does not exist" in message(data_dir=str(tmp_path / "nowhere"))
    assert "set --dataset_name" in message()
    assert "'train', 'validation'" in message(**layouts["parquet sub-folders"], split="test")
    assert "'train', 'validation'" in message(**layouts["parquet dict"], split="test")
    for name in ("parquet", "tars", "folder", "json list"):
        for flag in ("image_column", "caption_column", "product_id_column"):
            text = message(**{**layouts[name], flag: "wrong"})
            assert (
                "no column 'wrong'" in text and f"--{flag}" in text and "'caption'" in text and "'product_id'" in text
            )
    (tmp_path / "empty").mkdir()
    assert "can't be opened" in message(data_dir=str(tmp_path / "empty"))
    assert "does not exist" in message(**{**layouts["json list"], "image_dir": str(tmp_path / "none")})
    (tmp_path / "photos" / "train").mkdir(parents=True)
    (tmp_path / "photos" / "train" / "a.png").write_bytes(encoded(photo(0)))
    assert "no metadata.jsonl" in message(data_dir=str(tmp_path / "photos"))
    (tmp_path / "none.json").write_text("[]")
    assert "no rows" in message(data_files=str(tmp_path / "none.json"))
    (tmp_path / "broken.json").write_text('[{"product": "a"},\n{"product" "b"}]')
    assert "line 2" in message(data_files=str(tmp_path / "broken.json"))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nonsense PAR1")
    assert "broken.parquet" in message(data_files=str(tmp_path / "broken.parquet"))
    (tmp_path / "broken.tar").write_bytes(b"nonsense" * 200)
    assert "broken.tar" in message(data_files=str(tmp_path / "broken.tar"))
    (tmp_path / "table.xlsx").write_bytes(b"x")
    assert "no known kind" in message(data_files=str(tmp_path / "table.xlsx"))
    assert "matches no files" in message(data_files=str(tmp_path / "no-*.parquet"))
    pq.write_table(
        pa.table({"image": pa.array([], pa.binary()), "caption": pa.array([], pa.string())}), tmp_path / "0.parquet"
    )
    assert "no rows" in message(data_files=str(tmp_path / "0.parquet"))


def test_a_bug_in_an_opener_is_not_told_as_a_mistake(layouts, monkeypatch):
    monkeypatch.setitem(OPENERS, "parquet", lambda request: int("a bug"))
    with pytest.raises(ValueError, match="a bug") as raised:
        open_source(split="train", **layouts["parquet"])
    assert not isinstance(raised.value, UsageError)


def test_no_usable_row_is_an_error_with_reasons(tmp_path):
    folder = tmp_path / "shop"  # beside which no other test keeps photos
    folder.mkdir()
    entries = [{"product": f"{i}.png", "caption": "x"} for i in range(5)]
    (folder / "list.json").write_text(json.dumps(entries))
    source = open_source(data_files=str(folder / "list.json"), split="train")
    with pytest.raises(UsageError, match="none of the first 5 rows .*0.png: the image file is missing.*--image_dir"):
        require_usable_row(source)
    (folder / "4.png").write_bytes(encoded(photo(0)))
    require_usable_row(source)


# ------------------------------------------------------------------------------------------------------ hostile data


def test_damaged_images_are_refused_with_a_plain_reason(tmp_path):
    jpeg = encoded(photo(1).resize((200, 200)), "JPEG")
    png = encoded(photo(1))
    assert "can't be decoded" in reason(jpeg[: len(jpeg) // 2])
    assert "can't be decoded" in reason(png[: len(png) // 2])
    assert "empty" in reason(b"")
    assert "not an image" in reason(b"<html><body>404</body></html>")
    assert "not an image" in reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    assert "missing" in reason(str(tmp_path / "gone.jpg"))
    assert "folder or a device" in reason(str(tmp_path))
    os.mkfifo(tmp_path / "pipe.jpg")
    assert "folder or a device" in reason(str(tmp_path / "pipe.jpg"))  # and does not hang
    assert "null" in reason(None)
    assert "neither bytes nor a path" in reason({"width": 3})
    assert reason(png, problem="the reason") == "the reason"
    (tmp_path / "wrong.jpg").write_bytes(png)  # a wrong extension does no harm
    assert np.array_equal(pixels(str(tmp_path / "wrong.jpg")), np.asarray(photo(1)))


def test_every_truncation_and_many_flipped_bytes_end_in_a_reason_or_a_photo():
    rng = np.random.default_rng(0)
    for format in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"):
        data = encoded(photo(2), format)
        for cut in range(0, len(data), max(len(data) // 40, 1)):
            _decodes_or_refuses(data[:cut])
        for _ in range(60):
            damaged = bytearray(data)
            damaged[rng.integers(len(data))] ^= 1 << rng.integers(8)
            _decodes_or_refuses(bytes(damaged))


def _decodes_or_refuses(data):
    try:
        example = decode(Row(0, data, "a title", 0, "row 0"))
    except UnusableItem as error:
        assert str(error)
    else:
        assert example.image.mode == "RGB"


def test_decompression_bombs_are_refused_before_they_are_unpacked():
    def png_of(width, height):
        def chunk(kind, data):
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")

    assert "pixels" in reason(png_of(10_000, 10_000))  # Pillow warns
    assert "pixels" in reason(png_of(100_000, 100_000))  # Pillow refuses


def test_what_a_person_sees_is_what_the_model_gets():
    base = photo(3)
    array = np.asarray(base)
    # EXIF: stored on its side, seen upright.
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = base.transpose(Image.Transpose.ROTATE_90)
    assert np.array_equal(pixels(encoded(stored, exif=exif)), array)
    exif_damaged = encoded(base, exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert np.array_equal(pixels(exif_damaged), array)
    # Alpha over white, whatever colour hides below it.
    alpha = np.full((*array.shape[:2], 1), 255, np.uint8)
    alpha[:4] = 0
    rgba = Image.fromarray(np.concatenate([array, alpha], axis=-1))
    expected = array.copy()
    expected[:4] = 255
    assert np.array_equal(pixels(encoded(rgba)), expected)
    assert np.array_equal(pixels(rgba), expected)  # a PIL image straight from a source
    la = Image.merge("LA", (base.convert("L"), rgba.getchannel("A")))
    grey = np.repeat(np.asarray(base.convert("L"))[..., None], 3, axis=-1)
    assert np.array_equal(pixels(encoded(la))[4:], grey[4:]) and (pixels(encoded(la))[:4] == 255).all()
    # Palette, with one transparent entry.
    palette = Image.new("P", (4, 2), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((0, 0), 0)
    for format in ("PNG", "GIF"):
        seen = pixels(encoded(palette, format, transparency=0))
        assert seen[0, 0].tolist() == [255, 255, 255] and seen[1, 1].tolist() == [0, 0, 255]
        assert pixels(encoded(palette, format))[0, 0].tolist() == [255, 0, 0]
    transparent = encoded(Image.new("RGB", (2, 2), (1, 2, 3)), transparency=(1, 2, 3))
    assert (pixels(transparent) == 255).all()
    # One bit, 16 bits, 32 bits and floats.
    assert pixels(encoded(Image.new("1", (3, 3), 1))).tolist() == np.full((3, 3, 3), 255).tolist()
    ramp = np.linspace(0, 65535, 12).astype(np.uint16).reshape(3, 4)
    for format in ("PNG", "TIFF"):
        seen = pixels(encoded(Image.fromarray(ramp), format))
        assert np.abs(seen[..., 0].astype(int) - ramp // 257).max() <= 1 and seen.max() == 255
    floats = Image.fromarray(np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4))
    assert pixels(encoded(floats, "TIFF")).max() == 255
    # CMYK as JPEG (which Adobe stores inverted) and as TIFF.
    ink = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    for format in ("JPEG", "TIFF"):
        assert np.abs(pixels(encoded(ink, format)).astype(int) - (255, 0, 0)).max() < 12
    # An animation is its first picture.
    frames = [Image.new("RGB", (5, 5), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    for format in ("GIF", "WEBP"):
        seen = pixels(encoded(frames[0], format, save_all=True, append_images=frames[1:]))
        assert np.abs(seen.astype(int) - (255, 0, 0)).max() < 6
    # The smallest and the narrowest.
    assert pixels(encoded(Image.new("RGB", (1, 1), (5, 6, 7)))).tolist() == [[[5, 6, 7]]]
    assert pixels(encoded(Image.new("L", (20_000, 1), 9))).shape == (1, 20_000, 3)


@pytest.mark.parametrize(
    ("title", "why"),
    [
        (None, "null"),
        ("", "empty"),
        (" \t\n\u00a0\u3000", "no visible"),
        ("\u200b\u200f\u0000\u0007", "no visible"),
        (17, "not text but int"),
        (3.5, "not text but float"),
        (["a"], "not text but list"),
        (b"bytes", "not text but bytes"),
    ],
)
def test_titles_without_text_are_refused(title, why):
    assert why in reason(encoded(photo(0)), text=title)


@pytest.mark.parametrize(
    "title", ["鞋子", "👟 shoe", "حذاء", "e\u0301", "a\u0000b", "5", "-", "half \ud83d emoji", "x " * 500_000]
)
def test_unusual_titles_are_used(title):
    text = decode(Row(0, encoded(photo(0)), title, 0, "row 0")).text
    assert text.encode("utf-8") and len(text) <= MAX_TITLE_CHARACTERS
    assert text[:2] == title[:2]


def test_bad_records_are_holes_with_a_name(tmp_path):
    (tmp_path / "train").mkdir()
    for name in ("a.png", "z.png"):
        (tmp_path / "train" / name).write_bytes(encoded(photo(0)))
    (tmp_path / "secret.png").write_bytes(encoded(photo(1)))
    lines = [
        b'{"file_name": "a.png", "caption": "good"}',
        b'{"file_name": "gone.png", "caption": "missing"}',
        b'{"file_name": "a.png", "caption": ',
        b'{"file_name": "a.png", "caption": "\xff\xfe"}',
        b"[1, 2]",
        b'{"file_name": "../secret.png", "caption": "outside"}',
        b'{"file_name": "sub/../../secret.png", "caption": "outside"}',
        b'{"file_name": "/etc/hostname", "caption": "outside"}',
        b'{"file_name": "..\\\\secret.png", "caption": "outside"}',
        b'{"file_name": "C:\\\\secret.png", "caption": "outside"}',
        b'{"file_name": "http://localhost/x.png", "caption": "outside"}',
        b'{"file_name": "a\\u0000.png", "caption": "NUL"}',
        b'{"file_name": null, "caption": "null"}',
        b'{"file_name": 5, "caption": "number"}',
        b'{"file_name": "", "caption": "empty"}',
        b'{"caption": "no file"}',
        b'{"file_name": "a.png"}',
        b'{"file_name": "a.png", "caption": [["list"]]}',
        b"[" * 100_000,
        b"   ",
        b'{"file_name": "z.png", "caption": "good too"}',
    ]
    (tmp_path / "train" / "metadata.jsonl").write_bytes(b"\n".join(lines))
    source = open_source(data_dir=str(tmp_path), split="train")
    assert source.num_rows == len(lines) - 1  # only the blank line is none
    reasons = {}
    for row in rows_of(source):
        try:
            decode(row)
        except UnusableItem as error:
            reasons[row.row] = str(error)
    assert sorted(reasons) == list(range(1, 19))
    for number, why in {
        1: "missing",
        2: "not a JSON object",
        3: "not a JSON object",
        4: "not a JSON object",
        **dict.fromkeys(range(5, 10), "outside"),
        10: "fetched only with --fetch_photos",
        11: "NUL",
        12: "null",
        13: "not text",
        14: "empty",
        15: "null",
        16: "title is null",
        17: "list",
        18: "not a JSON object",
    }.items():
        assert why in reasons[number], (number, reasons[number])


def test_bad_samples_of_a_tar_are_holes(tmp_path):
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        add_member(tar, "a.png", encoded(photo(0)))
        add_member(tar, "a.json", b'{"caption": "good", "product_id": 12}')
        add_member(tar, "b.png", encoded(photo(1)))
        add_member(tar, "b.json", b'{"caption": ')
        add_member(tar, "c.json", b'{"caption": "no photo"}')
        add_member(tar, "d.png", encoded(photo(3)))
        add_member(tar, "folder/e.f.JPG", encoded(photo(4), "JPEG"))
        add_member(tar, "README", b"no sample")
        add_member(tar, "g.jpg", encoded(photo(5), "JPEG"))
        add_member(tar, "g.json", b'{"caption": "good too", "product_id": "12"}')
    source = open_source(data_dir=str(tmp_path), split="train")
    outcomes = []
    for row in rows_of(source):
        try:
            outcomes.append((row.name, decode(row).text))
        except UnusableItem as error:
            outcomes.append((row.name, str(error)))
    assert outcomes == [
        ("a", "good"),
        ("b", "field 'json' can't be read as text or JSON"),
        ("c", "the image is null"),
        ("d", "the title is null"),
        ("folder/e.f", "the title is null"),
        ("g", "good too"),
    ]


def test_bad_cells_of_a_parquet_file_are_holes(tmp_path):
    titles = pa.Array.from_buffers(
        pa.string(), 4, [None, pa.py_buffer(struct.pack("<5i", 0, 1, 3, 4, 5)), pa.py_buffer(b"a\xff\xfebc")]
    )
    images = pa.array([encoded(photo(0)), encoded(photo(1)), None, b"nonsense"])
    pq.write_table(pa.table({"image": images, "caption": titles}), tmp_path / "train.parquet")
    rows = rows_of(open_source(data_dir=str(tmp_path), split="train"))
    assert decode(rows[0]).text == "a"
    assert [row.row for row in rows] == [0, 1, 2, 3]
    for row, why in zip(rows[1:], ("'caption' can't be read", "the image is null", "not an image"), strict=True):
        with pytest.raises(UnusableItem, match=re.escape(why)):
            decode(row)
    pq.write_table(pa.table({"image": ["x.png"], "caption": ["t"]}), tmp_path / "train.parquet")
    with pytest.raises(UnusableItem, match="--image_dir"):
        decode(rows_of(open_source(data_dir=str(tmp_path), split="train"))[0])


def test_a_list_with_a_byte_order_mark_and_non_ascii_text(tmp_path):
    for index, indent in enumerate((None, 2)):
        entries = [{"product": "a.png", "caption": 'größe 鞋 ] , [ " \\ 👟'}] * 3
        data = b"\xef\xbb\xbf" + json.dumps(entries, ensure_ascii=False, indent=indent).encode() + b"\n\n"
        (tmp_path / f"{index}.json").write_bytes(data)
        source = open_source(data_files=str(tmp_path / f"{index}.json"), split="train")
        assert [row.text for row in rows_of(source)] == [entries[0]["caption"]] * 3


# -------------------------------------------------------------------------------------------------------- real photos


@needs_products
def test_the_product_photos():
    source = open_source(data_dir=str(PRODUCTS), split="validation")
    assert "caption" in source.columns and "product_id" in source.columns
    files = [p for p in os.listdir(PRODUCTS / "validation") if not p.startswith("metadata")]
    assert source.num_rows == len(files)
    ids = set()
    for row in source.read_range(0, source.num_rows):
        example = decode(row)
        ids.add(example.product_id)
        assert example.image.mode == "RGB" and example.text.strip()
    assert len(ids) == source.num_rows


def test_small_units_in_rising_order_read_a_row_group_once(tmp_path, monkeypatch):
    """What an evaluation does: were each unit read from the start of its group, one large group would cost N^2 rows."""
    write_parquet(tmp_path, records(COUNT), [COUNT], row_group_size=COUNT)
    source = open_source(data_dir=str(tmp_path), split="train")
    whole = [(row.row, row.image, row.text) for row in source.read_range(0, COUNT)]
    opened, plain = [], parquet._cells

    def counting(streams):
        for cell in plain(streams):
            opened.append(cell)
            yield cell

    monkeypatch.setattr(parquet, "_cells", counting)
    source = open_source(data_dir=str(tmp_path), split="train")
    for begin, end in ((0, 2), (2, 4), (6, 8), (8, 9), (9, 11)):  # (4, 6) belongs to another process
        part = [(row.row, row.image, row.text) for row in source.read_range(begin, end)]
        assert part == whole[begin:end]
    assert len(opened) == COUNT
    # backwards, half-read and repeated reads start again, and are right all the same
    next(iter(source.read_range(3, 5)))
    for begin, end in ((3, 5), (1, 4), (1, 4), (10, 11), (0, 11)):
        assert [(row.row, row.image, row.text) for row in source.read_range(begin, end)] == whole[begin:end]
