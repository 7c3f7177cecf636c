"""A row of a table is one row of the run with its whole text, or the file is refused with the number of the line."""

import bz2
import csv
import gzip
import io
import json
import lzma
import pickle

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
    pairs,
    read,
    records,
    told,
    whole,
)

from aliblip.data import delimited, documents, storage, tables
from aliblip.data.arguments import DataArguments
from aliblip.data.columns import Asked, Reading, Roles
from aliblip.data.encodings import guess_encoding
from aliblip.data.storage import Blocks
from aliblip.data.tables import Unreadable, open_table
from aliblip.runtime.mistakes import UsageError


@pytest.fixture
def folder(tmp_path):
    return draw(tmp_path)


def opened(folder, data: str | bytes, name="metadata.csv", **reading):
    (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return open_at(folder, reading=Reading(**reading))


def refused(folder, data, name="metadata.csv", **reading) -> str:
    with pytest.raises(UsageError) as caught:
        opened(folder, data, name, **reading)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def titles(source) -> list[str]:
    found, reasons = read(source)
    assert not reasons
    return [title for _, title in found]


# ------------------------------------------------------------------------------------------------------ forms of CSV


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_delimiter_and_line_end(folder, delimiter, end):
    rows = [(name, f"{title}, or; {i}| ") for i, (name, title) in enumerate(pairs())]
    text = lines(rows, delimiter=delimiter).replace("\n", end)
    source = opened(folder, text)
    assert titles(source) == [title.strip() for _, title in rows]
    assert delimited.DELIMITER_NAMES[delimiter] in told(source)
    assert titles(opened(folder, "\ufeff" + text)) == [title.strip() for _, title in rows]


def test_what_a_cell_may_hold(folder):
    """Delimiters, quotes and line breaks within quotes; a field of a megabyte; no quotes where none are needed."""
    odd = ['a "red" mug', "two\nlines", "three\r\nlines, with a comma\n\nand a gap", '"', "'", "x" * 1_000_000]
    odd += ["6 inch", '6" pan', "tab\there", "größe 鞋 👟", "\u2028 one line\u2028", "a;b|c"]
    rows = list(zip(NAMES, odd, strict=True))
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL):
        source = opened(folder, lines(rows, quoting=quoting))
        assert [row.text for row in source.read_range(0, COUNT)] == odd
        for start, stop in ((0, 3), (2, 7), (5, 6), (11, 12)):  # in any order, any part
            assert [row.text for row in source.read_range(start, stop)] == odd[start:stop]
    # quotes within fields that are not quoted are text
    assert titles(opened(folder, 'file_name,caption\n00.png,6" pan\n01.png,a "red" mug\n')) == ['6" pan', 'a "red" mug']


def test_blank_lines_trailing_delimiters_and_what_excel_writes(folder):
    text = "sep=;\r\nfile_name;caption;\r\n\r\n00.png;a;;;\r\n   \r\n01.png;b\r\n;;\r\n02.png;c;\r\n\r\n"
    source = opened(folder, text)
    assert [row.text for row in source.read_range(0, 4)] == ["a", "b", None, "c"]  # a line of delimiters is a row
    assert titles(opened(folder, 'file_name| caption\n00.png| a, b\n01.png| "c| d"\n')) == ["a, b", "c| d"]


def test_a_column_alone_holds_whole_lines(folder):
    (folder / "titles.csv").write_text('caption\nSet of 2, red mug\n"a, b"\nc; d\n')
    source = open_at(data_files=str(folder / "titles.csv"), sides="titles")
    assert titles(source) == ["Set of 2, red mug", "a, b", "c; d"]
    assert "give what is between them as --csv_delimiter" in refused(folder, "file_name^caption\n00.png^a\n")
    assert titles(opened(folder, "file_name^caption\n00.png^a\n", delimiter="^")) == ["a"]


def test_the_delimiter_is_the_one_that_fits_all_lines(folder):
    source = opened(folder, "file_name;caption;price, net\n00.png;a, b;9,50\n01.png;c, d, e;8,50\n")
    assert source.columns == ["image", "caption", "price, net"] and titles(source) == ["a, b", "c, d, e"]
    (folder / "feed.tsv").write_text(lines(pairs(), ("image_link", "title")))  # whose name is wrong
    whole(open_at(data_files=str(folder / "feed.tsv")))


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ('05.png,"12 inch pan', "a quote opens a field"),  # never closed
        ('05.png,"Pro" 12 inch pan', "text follows the quote that closes a field"),
        ('05.png,"12" pan, "large"', "text follows the quote that closes a field"),
        ("05.png,Set of 2, red mug", "it has 3 fields, the header has 2"),
        ("05.png", "it has 1 field, the header has 2"),
        ("05.png;mug", "it has 1 field, the header has 2"),
        ("05.png,mug\0s", "it holds a NUL character"),
    ],
)
def test_a_line_that_is_no_row_is_refused_with_its_number(folder, row, problem):
    text = lines(pairs()).split("\n")
    text[6] = row
    text[2] = '01.png,"two, and more"'  # so that the file does have quotes
    text = "\n".join(text)
    message = refused(folder, text)
    assert f"metadata.csv, line 7: {problem}" in message and "--bad_lines skip" in message
    source = opened(folder, text, bad_lines="skip")
    found, reasons = read(source)
    expected = [row for row in all_rows() if row[0] != 5]
    expected[1] = (1, "two, and more")
    assert found == expected and source.num_rows == COUNT
    (reason,) = reasons
    assert reason.startswith(f"line 7 of metadata.csv: {problem}")
    assert "1 lines of metadata.csv are not rows (line 7), and are skipped" in told(source)


def test_a_quote_that_a_later_one_closes_swallows_no_row(folder):
    """Each of these is valid CSV of fewer rows."""
    text = lines(pairs()).split("\n")
    text[2] = '01.png,"two, and more"'
    text[4], text[9] = '03.png,"12 inch pan', '08.png,pan of 12"'
    message = refused(folder, "\n".join(text))
    assert "line 5: a quote opens a field that goes on to line 10, over what look like rows of their own" in message
    # next to each other, and with the photo's name behind
    text[4:6] = ['03.png,"12 inch pan', '04.png,pan of 12"']
    text[9] = "08.png,x"
    assert "line 5" in refused(folder, "\n".join(text))
    behind = ["caption,file_name", *(f"{title},{name}" for name, title in pairs())]
    behind[1] = '"a, b",00.png'
    behind[3], behind[8] = '"12 inch pan,02.png', '10",07.png'
    assert "line 4" in refused(folder, "\n".join(behind))
    # numbered rows without names of photos
    numbered = ["id,caption", *(f"{i},{title}" for i, title in enumerate(TITLES))]
    numbered[1:4] = ['0,"a, b"', "1,c", '2,"12 inch pan']
    numbered[8] = '7,10"'
    (folder / "titles.csv").write_text("\n".join(numbered))
    with pytest.raises(UsageError, match="line 4"):
        open_at(data_files=str(folder / "titles.csv"), sides="titles")
    # three columns of words
    words = ["size,caption,colour", *(f"s,{title},red" for title in TITLES)]
    words[1:4] = ['s,"a, b",red', "s,c,red", 's,"12 inch,red']
    words[8] = 's,10",red'
    (folder / "titles.csv").write_text("\n".join(words))
    with pytest.raises(UsageError, match="line 4"):
        open_at(data_files=str(folder / "titles.csv"), sides="titles")
    # who says so is believed
    source = opened(folder, "\n".join(text), quotes="doubled")
    assert source.num_rows == COUNT - 1


def test_text_of_many_lines_is_no_row_of_its_own(folder):
    text = "first line\n  a list:\n- red, blue\n- green\n\nlast line, the end"
    rows = [(name, f"{title}\n{text}") for name, title in pairs()]
    assert titles(opened(folder, lines(rows))) == [title for _, title in rows]


def test_a_file_without_quoting_has_inch_signs(folder):
    """Tab-separated files mostly have no quoting: then a quote is a quote, if the whole file can be read so."""
    text = "file_name\tcaption\n" + "".join(f'{name}\t"{title} 15" rack\n' for name, title in pairs())
    source = opened(folder, text)
    assert titles(source) == [f'"{title} 15" rack' for title in TITLES]
    assert "quotes are text" in told(source)
    source = opened(folder, 'file_name,caption\n00.png,"12 inch pan\n01.png,a\n')
    assert titles(source) == ['"12 inch pan', "a"]
    # not where quotes are more than that
    assert "line 2" in refused(folder, 'file_name,caption\n00.png,"12 inch pan\n01.png,"a"\n')
    assert titles(opened(folder, 'file_name,caption\n00.png,"12 inch pan\n01.png,"a"\n', quotes="none"))[1] == '"a"'


def test_quotes_with_backslashes(folder):
    text = 'file_name,caption\n00.png,"12\\" pan, red"\n01.png,"a \\"b\\" c"\n02.png,plain\n'
    source = opened(folder, text)
    assert titles(source) == ['12" pan, red', 'a "b" c', "plain"]
    assert "quotes are escaped by backslashes" in told(source)
    assert titles(opened(folder, text, quotes="backslash")) == ['12" pan, red', 'a "b" c', "plain"]
    assert "line 2" in refused(folder, text, quotes="doubled")
    # a backslash by itself is text
    assert titles(opened(folder, 'file_name,caption\n00.png,"C:\\mugs, red"\n')) == ["C:\\mugs, red"]


def test_headers(folder):
    source = opened(folder, " file_name ,caption,,tag,tag\n00.png,a,1,2,3\n")
    assert source.columns == ["image", "caption", "column 3", "tag", "tag (5)"]
    assert "two columns 'caption' (2 and 3): rename one" in refused(folder, "file_name,caption,caption\n00.png,a,b\n")
    without = "".join(f"{name},{title}\n" for name, title in pairs())
    message = refused(folder, without)
    assert "no header: its first line is '00.png,mug no 0'" in message and "--csv_columns" in message
    whole(opened(folder, without, names=("file_name", "caption")))
    assert "names 3 columns, metadata.csv has 2" in refused(folder, without, names=("a", "b", "c"))
    assert "has no rows" in refused(folder, "file_name,caption\n")
    assert "has no lines" in refused(folder, "\n\n")
    # a header over two lines
    assert opened(folder, 'file_name,"caption\n(English)",caption\n00.png,a,b\n').columns[1] == "caption\n(English)"


def test_very_many_lines_are_looked_at_once_each(folder):
    """A quote that is never closed must not make a file of n lines cost n squared."""
    rows = 3 * delimited.MOST_LINES
    text = "file_name,caption\n" + "".join(
        f'{i:05d}.png,"{i} inch\n' if i % 500 == 0 else f"{i:05d}.png,x, y\n" for i in range(rows)
    )
    seen, plain = 0, delimited._Feed.__next__

    def counted(feed):
        nonlocal seen
        seen += 1
        return plain(feed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delimited._Feed, "__next__", counted)
        assert f"{rows:,} of {rows:,} rows can't be read whole (lines 2, 3, 4, 5, 6 and {rows - 5:,} more)" in refused(
            folder, text
        )
    assert seen < 5 * rows


def test_columns_are_found_by_what_people_call_them(folder):
    for photo, title in (
        ("Image Path", "Product Name"),
        ("image_link", "title"),
        ("FILENAME", "Text"),
        ("img", "name"),
    ):
        source = opened(folder, lines(pairs(), (photo, title)), "list.csv")
        whole(source)
        assert f"photo in '{photo}', title in '{title}'" in told(source)
    # a default goes first, and what is named before all
    rows = [(name, "x", title, "y") for name, title in pairs()]
    whole(opened(folder, lines(rows, ("image", "title", "caption", "name")), "list.csv"))
    with pytest.raises(UsageError, match="no column 'nr' .--caption_column.: there are 'image', 'title'"):
        open_at(folder, caption_column="nr")


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
    assert "left: JSON files without records: 1 (list.json)" in told(source)
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
