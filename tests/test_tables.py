"""A row of a table is one row of the run with its whole text, or the file is refused with the number of the line."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import re

import numpy as np
import pyarrow as pa
import pytest
from drawing import (
    COUNT,
    NAMES,
    TITLES,
    all_rows,
    draw,
    json_lines,
    lines,
    open_at,
    opened,
    pairs,
    read,
    records,
    refused,
    titles,
    told,
    whole,
)

from aliblip.data import documents, storage, tables
from aliblip.data.arguments import DataArguments
from aliblip.data.columns import Asked, Reading, Roles
from aliblip.data.encodings import guess_encoding
from aliblip.data.storage import Blocks
from aliblip.data.tables import Unreadable, open_table
from aliblip.runtime.mistakes import UsageError


@pytest.fixture
def folder(tmp_path):
    return draw(tmp_path)


# ---------------------------------------------------------------------------------------------------------- encodings


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "list.json"])
def test_unicode_is_found(folder, encoding, name):
    odd = [f"größe 鞋 👟 {title}" for title in TITLES]
    rows = records("file_name", titles=odd)
    texts = {"metadata.csv": lines(pairs(titles=odd)), "list.json": json.dumps(rows, ensure_ascii=False, indent=1)}
    texts["metadata.jsonl"] = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if encoding == "utf-16-be" and name != "metadata.csv":
        texts[name] = "\ufeff" + texts[name]
    source = opened(folder, texts[name].encode(encoding), name)
    assert titles(source) == odd
    assert encoding == "utf-8-sig" or "utf-" in told(source)


WORDS = {
    "cp1252": "café crème, Größe 5, niño, tasse à thé, œuf",
    "gb18030": "红色的杯子 蓝色台灯 白色盘子 黑色椅子 女士手提包 茶壶 勺子",
    "big5": "紅色的杯子 藍色檯燈 白色盤子 黑色椅子 女士手提包",
    "cp932": "赤いマグカップ 青いランプ 白いお皿 黒い椅子のバッグ",
    "cp949": "빨간 머그컵 파란 램프 검은 의자 주전자",
    "euc_jp": "赤いマグカップ 青いランプ 白いお皿 黒い椅子のバッグ",
    "cp1251": "красная кружка, синяя лампа, чёрный стул",
    "cp1250": "łyżka żółta, kubek różowy, źródło, ręcznik",
    "cp1253": "κόκκινη κούπα, μπλε λάμπα, καρέκλα",
    "cp1254": "kırmızı fincan, yeşil sandalye, çanta, gümüş kaşık",
    "cp1255": "כוס אדומה, מנורה כחולה, כיסא שחור",
    "cp1256": "كوب أحمر مصباح أزرق كرسي أسود",
    "cp874": "แก้วสีแดง โคมไฟ เก้าอี้ กระเป๋า",
    "koi8_r": "красная кружка, синяя лампа, чёрный стул",
    "mac_roman": "café crème, Größe 5, tasse à thé",
}


@pytest.mark.parametrize("encoding", WORDS)
def test_other_encodings_are_right_or_asked_for(folder, encoding):
    """Never wrong: where two readings are likely, the user is shown how each reads."""
    words = [f"{word} {i}" for i, word in enumerate((WORDS[encoding].split() * COUNT)[:COUNT])]
    data = lines(pairs(titles=words)).encode(encoding)
    try:
        source = opened(folder, data)
        assert titles(source) == words and "metadata.csv: commas, " in told(source)
    except UsageError as error:
        message = str(error)
        assert "metadata.csv is not in UTF-8 (line " in message and f"{encoding} " in message
        shown = message.split(f"{encoding} ")[1].split("'")[1]
        assert any(shown in line for line in data.decode(encoding).splitlines()) and not shown.isascii()
    source = opened(folder, data, encoding=encoding)
    assert titles(source) == words
    rows = [json.dumps(record, ensure_ascii=False) for record in records("file_name", titles=words)]
    (folder / "metadata.csv").unlink()
    assert titles(opened(folder, "\n".join(rows).encode(encoding), "metadata.json", encoding=encoding)) == words


def test_what_is_found_alone():
    assert guess_encoding([WORDS["gb18030"].encode("gb18030")]).encoding == "gb18030"
    assert guess_encoding([WORDS["big5"].encode("big5")]).encoding == "big5"
    assert guess_encoding([WORDS["cp932"].encode("cp932")]).encoding == "cp932"
    assert guess_encoding(["größer, schöner, süßer, öfter, über".encode("cp1252")] * 3).encoding == "cp1252"
    for encoding in ("cp949", "cp1253", "cp1254", "euc_jp"):
        assert guess_encoding([WORDS[encoding].encode(encoding)]).encoding in (None, encoding)
    assert guess_encoding([bytes(range(128, 256))]).encoding is None


def test_single_lines_in_another_encoding(folder):
    good = [f"größe {title}" for title in TITLES]
    text = lines(pairs(titles=good)).encode().split(b"\n")
    text[4] = "03.png,größe".encode("cp1252")
    data = b"\n".join(text)
    assert "line 5: it is not in the encoding of the file" in refused(folder, data)
    text[6] = text[4]
    data = b"\n".join(text)
    assert "line 5 is the first that is not" in refused(folder, data)  # 2 of 12 are no chance
    many = lines([(NAMES[i % COUNT], f"größe {i}") for i in range(100)]).encode().split(b"\n")
    many[4] = text[4]
    message = refused(folder, b"\n".join(many))
    assert "line 5: it is not in the encoding of the file: give the right --encoding" in message
    found, reasons = read(opened(folder, b"\n".join(many), bad_lines="skip"))
    assert len(found) == 99 and reasons == ["line 5 of metadata.csv: it is not in the encoding of the file"]
    # of JSON lines it is a bad row by itself, of many of them the file is refused
    rows = [json.dumps(row).encode() for row in records("file_name")]
    rows[3] = '{"file_name": "03.png", "caption": "größe"}'.encode("cp1252")
    (folder / "metadata.csv").unlink()
    found, reasons = read(opened(folder, b"\n".join(rows), "metadata.jsonl"))
    assert len(found) == COUNT - 1 and "line 4 is not a JSON object in UTF-8" in reasons[0]
    rows = ['{"file_name": "03.png", "caption": "größe"}'.encode("cp1252")] * 9
    assert "--encoding cp1252 reads it as" in refused(folder, b"\n".join(rows), "metadata.jsonl")
    assert "unknown: give utf-8" in refused(folder, "x", encoding="latin-42")
    assert "unknown: give utf-8" in refused(folder, "x", encoding="base64")  # which is none of text
    assert "not in gb18030" in refused(folder, b"\xff\xff\xff", "metadata.jsonl", encoding="gb18030")
    assert "not in the encoding of the file" in refused(folder, b"file_name,caption\n00.png,\xff\xff\n", encoding="gbk")


# ------------------------------------------------------------------------------------------------- packed and in blocks


@pytest.mark.parametrize(
    ("ending", "pack"),
    [
        ("gz", gzip.compress),
        ("bz2", bz2.compress),
        ("xz", lzma.compress),
        ("zst", lambda data: pa.compress(data, "zstd", asbytes=True)),
    ],
)
def test_packed_tables(folder, ending, pack):
    for name, data in (("metadata.csv", lines(pairs())), ("metadata.jsonl", json_lines(records("file_name")))):
        source = opened(folder, pack(data.encode()), f"{name}.{ending}")
        whole(source)
        assert [row.text for row in source.read_range(3, 5)] == TITLES[3:5]
        (folder / f"{name}.{ending}").unlink()
        whole(opened(folder, pack(data.encode()), name))  # whose name does not tell
        (folder / name).unlink()
    if ending == "gz":
        assert "can't be unpacked" in refused(folder, pack(lines(pairs() * 99).encode())[:150], "metadata.csv.gz")


def test_records_in_blocks(tmp_path):
    values = [{"n": i, "text": "x" * (i % 50)} for i in range(1000)]
    blocks = pickle.loads(pickle.dumps(Blocks.of_values(values)))
    assert len(blocks) == 1000 and not len(Blocks([]))
    for start, stop in ((0, 1000), (63, 65), (999, 1000), (5, 5)):
        assert [json.loads(record) for record in blocks.read(start, stop)] == values[start:stop]
    assert sum(map(len, blocks._pieces)) < len(json.dumps(values)) / 3


def test_records_in_place_are_read_in_pieces(folder, monkeypatch):
    monkeypatch.setattr(storage, "READ_BYTES", 50)
    whole(opened(folder, lines(pairs())))
    (folder / "metadata.csv").unlink()
    source = opened(folder, json_lines(records("file_name")), "metadata.jsonl")
    whole(source)
    whole(pickle.loads(pickle.dumps(source)))
    (table,) = (rows.table for rows in source._tables)
    assert isinstance(table._stored, storage.Spans) and table._stored._spans.dtype == np.int64
    (folder / "metadata.jsonl").write_text("\n" * 9999)
    assert all(isinstance(record, Unreadable) for record in table.read(0, COUNT))


# --------------------------------------------------------------------------------------------------------------- JSON


def document(form: str):
    """The same records as one object."""
    captions = [{"image_id": i, "id": 9 * i, "caption": title} for i, title in enumerate(TITLES)]
    return {
        "under a key": {"version": 1, "data": records()},
        "COCO": {"images": [{"id": i, "file_name": n} for i, n in enumerate(NAMES)], "annotations": captions},
        "columns": {"image": NAMES, "caption": TITLES},
        "pandas": {column: {str(i): r[column] for i, r in enumerate(records())} for column in ("image", "caption")},
        "pandas by row": {str(i): record for i, record in enumerate(records())},
        "pandas split": {"columns": ["image", "caption"], "index": [*range(COUNT)], "data": [*map(list, pairs())]},
        "pandas by photo": {"caption": dict(pairs())},
        "a map": dict(pairs()),
    }[form]


FORMS = ("under a key", "COCO", "columns", "pandas", "pandas by row", "pandas split", "pandas by photo", "a map")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("indent", [None, 2])
def test_an_object_that_is_a_table(folder, form, indent):
    (folder / "list.json").write_text(json.dumps(document(form), indent=indent))
    whole(open_at(folder))
    (folder / "list.json").write_bytes(gzip.compress(json.dumps(document(form), indent=indent).encode()))
    whole(open_at(folder))


def test_coco_tells_what_is_no_row(folder):
    data = document("COCO")
    data["images"].append({"id": 99, "file_name": "99.png"})
    data["annotations"] += [
        {"image_id": 1, "id": 0, "caption": "second"},
        {"image_id": 77, "caption": "x"},
        {"image_id": 2},
    ]
    (folder / "captions.json").write_text(json.dumps(data))
    source = open_at(data_files=str(folder / "captions.json"))
    assert read(source)[0] == [*all_rows()[:2], (1, "second"), *all_rows()[2:]]
    rows = list(source.read_range(0, 4))
    assert rows[1].product_id == rows[2].product_id != rows[3].product_id
    for line in (
        "12 photos with 13 captions",
        "1 of its photos have no caption",
        "2 of its annotations have no caption",
    ):
        assert line in told(source)
    del data["annotations"][:]
    data["annotations"].append({"image_id": 1, "bbox": [1, 2]})
    (folder / "captions.json").write_text(json.dumps(data))
    with pytest.raises(UsageError, match="COCO file without captions"):
        open_at(data_files=str(folder / "captions.json"))


def test_karpathy_files_tell_their_splits(folder):
    splits = ["train"] * 5 + ["restval"] + ["val"] * 2 + ["test"] * 4
    photos = [
        {"filepath": "val2014", "filename": name, "split": split, "sentences": [{"raw": title}, {"raw": f"{title}!"}]}
        for (name, title), split in zip(pairs(), splits, strict=True)
    ]
    draw(folder / "val2014")
    (folder / "dataset_coco.json").write_text(json.dumps({"dataset": "coco", "images": photos}))
    for split, first, last in (("train", 0, 6), ("validation", 6, 8), ("test", 8, 12)):
        source = open_at(data_files=str(folder / "dataset_coco.json"), split=split)
        assert read(source)[0] == [(i, f"{TITLES[i]}{more}") for i in range(first, last) for more in ("", "!")]
        assert f"{last - first} of '{split}', of 'train' (5), 'restval' (1), 'val' (2), 'test' (4)" in told(source)
    with pytest.raises(UsageError, match="no photos of the split 'dev': there are 'train' .5., "):
        open_at(data_files=str(folder / "dataset_coco.json"), split="dev")


def test_objects_over_several_lines(folder):
    text = "\n".join(json.dumps(record, indent=2) for record in records())
    whole(opened(folder, text, "list.json"))
    whole(opened(folder, text.replace("}\n{", "},\n{"), "list.json"))
    message = refused(folder, text.replace('"image": "05.png"', '"image" "05.png"'), "list.json")
    assert "object 6 (line 22) is damaged" in message
    whole(opened(folder, json_lines(records()).replace("\n", "\r\n\r\n"), "list.json"))


def test_one_object_that_is_no_table(folder):
    assert "holds one object with the keys 'version', 'size': expected a list of records such as {\"image\"" in refused(
        folder, '{"version": 1, "size": {"a": 1}}', "list.json"
    )
    (folder / "more.jsonl").write_text(json_lines(records()))
    source = open_at(folder)
    whole(source)
    assert "left: files of JSON or XML without records: 1 (list.json)" in told(source)
    assert "several lists of records ('a', 'b')" in refused(folder, '{"a": [{"x": 1}], "b": [{"x": 1}]}', "list.json")
    (folder / "more.jsonl").unlink()
    # one record is a table of one row
    one = {"image": "00.png", "caption": "a", "tags": [{"name": "x"}], "sizes": [{"name": "y"}]}
    assert read(opened(folder, json.dumps(one), "list.json")) == ([(0, "a")], [])
    assert read(opened(folder, json.dumps([one]), "list.json")) == ([(0, "a")], [])


def test_long_lists_are_read_in_pieces(folder, monkeypatch):
    for size in (*range(1, 40), 7):
        monkeypatch.setattr(documents, "READ_BYTES", size)
        for text in (json.dumps(records()), json.dumps(records(), indent=1), "\n\n".join(map(json.dumps, records()))):
            items = list(documents.json_records(io.BytesIO(text.encode()), "x"))
            assert [item.value for item in items] == records()
            assert [json.loads(text[item.begin : item.end]) for item in items] == records()
    whole(opened(folder, json.dumps(records(), indent=1), "list.json"))
    source = opened(
        folder, json.dumps([*records(), {"image": "00.png", "caption": "größe"}], ensure_ascii=False), "list.json"
    )
    assert titles(source) == [*TITLES, "größe"]
    text = json.dumps(records(), indent=1)
    assert "not a valid JSON list (line 11)" in refused(
        folder, text.replace('"image": "02', '"image" "02'), "list.json"
    )
    assert "not a valid JSON list" in refused(folder, text[:-40], "list.json")
    assert "not a valid JSON list (line 51)" in refused(folder, text + text[1:], "list.json")
    (folder / "list.json").unlink()
    (folder / "titles.json").write_text(json.dumps(TITLES))
    assert titles(open_at(data_files=str(folder / "titles.json"), sides="titles")) == TITLES


def test_a_bad_line_of_json_is_a_bad_row_with_its_number(folder):
    text = json_lines(records("file_name")).split("\n")
    text[3], text[5] = '{"file_name": "03.png", "caption": "x"', '{"file_name": "05.png"} {"file_name": "06.png"}'
    found, reasons = read(opened(folder, "\n".join(text), "metadata.jsonl"))
    assert [number for number, _ in found] == [0, 1, 2, 4, *range(6, 12)]
    assert reasons == [
        "line 4 is not a JSON object (Expecting ',' delimiter at character 40)",
        "line 6 is not a JSON object (Extra data at character 25)",
    ]


def test_a_key_that_stands_twice_is_told_and_no_value_is_lost(folder):
    text = json_lines(records("file_name")).split("\n")
    text[3] = '{"file_name": "03.png", "caption": "x", "caption": "y"}'
    found, reasons = read(opened(folder, "\n".join(text), "metadata.jsonl"))
    assert [number for number, _ in found] == [0, 1, 2, *range(4, 12)]
    assert reasons == ["line 4: the key 'caption' stands twice in one object"]
    (folder / "metadata.jsonl").unlink()
    twice = '{"00.png": "a", "01.png": "b", "00.png": "c"}'
    assert "the key '00.png' stands twice in one object" in refused(folder, twice, "list.json")


def test_rows_beside_their_names_are_as_long_as_these(folder):
    text = json.dumps({"columns": ["image", "caption"], "data": [["00.png", "a"], ["01.png"], ["02.png", "c"]]})
    assert "'columns' has 2 names, and row 1 of 'data' not as many values" in refused(folder, text, "list.json")


def test_rows_of_a_product_need_not_stand_together(folder):
    """Shopify's export, sorted by the user: a title serves all rows of its handle, and a line that is none is told."""
    header = ("Handle", "Title", "Image Src")
    rows = [("mug", "red mug", "00.png"), ("pan", "iron pan", "01.png"), ("mug", "", "02.png"), ("pan", "", "03.png")]
    text = lines(rows, header).split("\n")
    found, reasons = read(opened(folder, "\n".join(text), "products.csv"))
    assert (found, reasons) == ([(0, "red mug"), (1, "iron pan"), (2, "red mug"), (3, "iron pan")], [])
    text[2] += ",one,two"
    found, reasons = read(opened(folder, "\n".join(text), "products.csv", bad_lines="skip"))
    assert [number for number, _ in found] == [0, 2] and any("line 3" in reason for reason in reasons)


# --------------------------------------------------------------------------------------------------------------- text


def test_titles_a_line_and_tables_called_txt(folder):
    (folder / "titles.txt").write_bytes("a, b\r\n\r\nc\td\n größe ".encode())
    source = open_at(data_files=str(folder / "titles.txt"), sides="titles")
    assert [row.text for row in source.read_range(0, 4)] == ["a, b", "", "c\td", " größe "]
    with pytest.raises(UsageError, match="holds titles only"):
        open_at(data_files=str(folder / "titles.txt"))
    (folder / "feed.txt").write_text(lines(pairs(), ("image_link", "title"), delimiter="\t"))
    whole(open_at(data_files=str(folder / "feed.txt")))
    (folder / "captions.txt").write_text(lines(pairs(), ("image", "caption")))
    whole(open_at(data_files=str(folder / "captions.txt")))
    (folder / "token.txt").write_text("".join(f"{name}#{i % 5}\t{TITLES[i]}\n" for i, name in enumerate(NAMES)))
    with pytest.raises(UsageError, match="no header: its first line is '00.png#0"):
        open_at(data_files=str(folder / "token.txt"))
    source = open_at(data_files=str(folder / "token.txt"), reading=Reading(names=("image", "caption")))
    whole(source)
    assert "the number behind their names is left out" in told(source)
    (folder / "titles.txt").write_bytes("größer\nschöner, süßer\nüber, öfter\nTüren, Löffel".encode("cp1252"))
    source = open_at(data_files=str(folder / "titles.txt"), sides="titles")
    assert titles(source) == [
        "größer",
        "schöner, süßer",
        "über, öfter",
        "Türen, Löffel",
    ] and "titles.txt: cp1252" in told(source)


# -------------------------------------------------------------------------------------------------------------- flags


def test_flags_say_how_tables_are_written():
    reading = DataArguments(csv_delimiter="tab", csv_quotes="none", csv_columns="a, b", encoding="gbk").reading
    assert reading == Reading("\t", "none", ["a", "b"], "gbk", "refuse")
    assert DataArguments().reading == Reading()
    assert [DataArguments(csv_delimiter=name).reading.delimiter for name in ("semicolon", "|", "\\t")] == [
        ";",
        "|",
        "\t",
    ]
    for wrong in ("::", '"', ""):
        with pytest.raises(UsageError, match="--csv_delimiter is .*: give one character, or comma"):
            DataArguments(csv_delimiter=wrong).reading  # noqa: B018 (it is checked when it is asked for)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("metadata.csv", b"PK\3\4\x14\0\x06\0", "is a zip file or a spreadsheet, whatever it is called"),
        ("metadata.csv", b"\xd0\xcf\x11\xe0\xa1\xb1", "is a spreadsheet, whatever it is called"),
        ("metadata.csv", b"PAR1", "call it .parquet"),
        ("metadata.jsonl", b"\n<!DOCTYPE html>\n<html>", "is a web page"),
        ("metadata.csv", gzip.compress(b"<HTML><body>404", mtime=0), "is a web page"),
        (
            "metadata.json",
            b"file_name,caption\n00.png,a\n",
            "holds no JSON: its first line is 'file_name,caption'; .*.csv",
        ),
    ],
)
def test_what_is_only_called_a_table_is_told_as_what_it_is(folder, name, data, words):
    assert re.search(words, refused(folder, data, name))


@pytest.mark.parametrize("text", [json_lines(records("file_name")), json.dumps(records("file_name"), indent=1)])
def test_json_that_is_called_csv_is_read(folder, text):
    whole(opened(folder, text, "metadata.csv"))
    assert titles(opened(folder, lines((n, f'{{"{t}"') for n, t in pairs())))[0] == '{"mug no 0"'


def test_a_table_is_what_it_says(tmp_path):
    """Columns, facts and counts of all of its records."""
    (tmp_path / "a.jsonl").write_text(
        json_lines([{"image": "a"}, {"caption": ["x", "y"]}, [1], {"late": 1, "image": "b"}])
    )
    table = open_table(str(tmp_path / "a.jsonl"), Reading(), Roles(Asked()), "train")
    assert table.columns == ["image", "caption", "late"] and len(table) == 4
    assert table.facts["image"].rows == table.facts["caption"].rows == 4 and table.facts["image"].empty == 2
    assert table.facts["caption"].counts().tolist() == [1, 2, 1, 1] and table.facts["image"].counts() is None
    assert tables.base_name("http://host/a/b.csv?v=1") == "b.csv" and tables.plain_extension("a.CSV.gz") == ".csv"
