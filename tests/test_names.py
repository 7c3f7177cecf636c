"""Names of photos as addresses write them, and file: URLs: right, or refused with the cause."""

from __future__ import annotations

import os
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from drawing import COUNT, TITLES, all_rows, draw, lines, open_at, read, told

from aliblip.data.sources import open_source
from aliblip.data.values import local_path

PLAIN = [f"a b{i:02d} 100% größe.png" for i in range(COUNT)]
LITERAL = [f"a%20b{i:02d}.png" for i in range(COUNT)]  # as some programs save what they fetch


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("file:///data/a%20b.jpg", "/data/a b.jpg"),
        ("FILE://localhost/data/a%25.jpg", "/data/a%.jpg"),
        ("file:/data/a.jpg", "/data/a.jpg"),
        ("file://photos/a%20b.jpg", "photos/a b.jpg"),
        ("file:///C:/photos/a.jpg", "C:/photos/a.jpg"),
        ("file:///data/%E9.jpg", "/data/\udce9.jpg"),
        ("/data/a%20b.jpg", "/data/a%20b.jpg"),
        ("file:a.jpg", "file:a.jpg"),
        ("https://host/a%20b.jpg", "https://host/a%20b.jpg"),
    ],
)
def test_a_file_url_is_a_path(text, path):
    assert local_path(text) == path


def written(tmp_path, names, form="csv"):
    rows = list(zip(names, TITLES, strict=True))
    if form == "csv":
        (tmp_path / "list.csv").write_text(lines(rows, ("image", "caption")))
    else:
        table = pa.table({"image": names, "caption": TITLES})
        pq.write_table(table, tmp_path / "list.parquet")
    return tmp_path / f"list.{form}"


@pytest.mark.parametrize("form", ["csv", "parquet"])
@pytest.mark.parametrize("files", [PLAIN, LITERAL], ids=["plain", "literal"])
def test_names_as_the_files_have_them(tmp_path, files, form):
    folder = draw(tmp_path / "photos", files)
    source = open_source(data_files=str(written(tmp_path, files, form)), split="train", image_dir=str(folder))
    assert read(source) == (all_rows(), []) and "as in addresses" not in told(source)


@pytest.mark.parametrize("form", ["csv", "parquet"])
@pytest.mark.parametrize("files", [PLAIN, LITERAL], ids=["plain", "literal"])
def test_names_as_addresses_write_them(tmp_path, files, form):
    folder = draw(tmp_path / "photos", files)
    file = written(tmp_path, list(map(quote, files)), form)
    source = open_source(data_files=str(file), split="train", image_dir=str(folder))
    assert read(source) == (all_rows(), [])
    assert "their names are written as in addresses (%20, ?v=1)" in told(source)


def test_one_name_that_is_written_otherwise_is_read_or_refused_with_the_cause(tmp_path):
    folder = draw(tmp_path / "photos", [*PLAIN, *LITERAL])
    file = written(tmp_path, [*PLAIN[:-1], quote(PLAIN[-1])])
    assert read(open_source(data_files=str(file), split="train", image_dir=str(folder))) == (all_rows(), [])
    file = written(tmp_path, [*LITERAL[:-1], quote(LITERAL[-1])])
    _, reasons = read(open_source(data_files=str(file), split="train", image_dir=str(folder)))
    assert len(reasons) == 1 and f"there is '{LITERAL[-1]}': write names as the files have them" in reasons[0]


@pytest.mark.parametrize("files", [PLAIN, LITERAL], ids=["plain", "literal"])
def test_file_urls(tmp_path, files):
    folder = os.path.realpath(draw(tmp_path / "photos", files))
    written(tmp_path, [f"file://{quote(f'{folder}/{name}')}" for name in files])
    source = open_at(tmp_path)
    assert read(source) == (all_rows(), []) and "no row names" not in told(source)
    by_urls = {"data_files": f"file://{quote(str(tmp_path / 'list.csv'))}", "image_dir": f"file://{quote(folder)}"}
    assert read(open_source(split="train", **by_urls)) == (all_rows(), [])


def test_a_file_url_that_is_none_is_refused_with_the_cause(tmp_path):
    folder = os.path.realpath(draw(tmp_path / "photos", LITERAL))
    written(tmp_path, [f"file://{folder}/{name}" for name in LITERAL])  # its % are no %25
    _, reasons = read(open_at(tmp_path))
    assert len(reasons) == COUNT
    assert "there is 'a%20b00.png': in a file: address write its % as %25" in reasons[0]
    written(tmp_path, [f"file:///etc/{name}" for name in LITERAL])
    _, reasons = read(open_at(tmp_path))
    assert len(reasons) == COUNT and "leads outside the image folder" in reasons[0]
    _, reasons = read(open_source(data_files=str(written(tmp_path, ["file:///a%00.png"] * COUNT)), split="train"))
    assert len(reasons) == COUNT and "leads outside the image folder" in reasons[0]
