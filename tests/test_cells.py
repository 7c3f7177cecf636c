"""Cells that hold more than a file name and a title: lists, addresses, embedded photos; photos that are not there."""

import base64
import json
import os
import unicodedata
from itertools import product

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_stub import StubProcessor
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
    picture,
    read,
    records,
    told,
    whole,
)
from http_stub import FileServer

from aliblip.data import parquet, parquet_cells
from aliblip.data.collate import Collator
from aliblip.data.loader import TrainLoader
from aliblip.data.missing import why_missing
from aliblip.data.places import Place, find_place
from aliblip.data.sources import open_source, require_usable_row
from aliblip.data.values import Facts, embedded_photo, listed_text, photos_of, titles_of
from aliblip.runtime.mistakes import UsageError

BASE64 = [base64.b64encode(picture(i) + bytes(60)).decode() for i in range(COUNT)]


@pytest.fixture
def server(tmp_path, monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    with FileServer(draw(tmp_path / "www")) as server:
        yield server


def table_of(folder, rows, form: str, **options):
    """The same records as a file of a form, opened."""
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), folder / "list.parquet")
        return open_at(data_files=str(folder / "list.parquet"), **options)
    if form == "csv":
        cells = [[v if isinstance(v, str) else json.dumps(v) for v in row.values()] for row in rows]
        (folder / "list.csv").write_text(lines(cells, rows[0]))
    else:
        (folder / "list.jsonl").write_text(json_lines(rows))
    return open_at(data_files=str(folder / f"list.{form}"), **options)


FORMS = ("csv", "jsonl", "parquet")


# --------------------------------------------------------------------------------------------------------------- lists


@pytest.mark.parametrize("form", FORMS)
def test_each_title_of_a_list_is_a_row_and_all_are_of_the_photo(tmp_path, form):
    draw(tmp_path)
    counts = [1 + i % 3 for i in range(COUNT)]
    rows = [
        {"image": name, "caption": [f"{title} {k}" for k in range(count)], "price": i}
        for i, ((name, title), count) in enumerate(zip(pairs(), counts, strict=True))
    ]
    source = table_of(tmp_path, rows, form)
    expected = [(i, f"{TITLES[i]} {k}") for i in range(COUNT) for k in range(counts[i])]
    assert read(source) == (expected, [])
    assert source.num_rows == sum(counts) == sum(shard.num_rows for shard in source.shards)
    assert f"12 records with lists give {sum(counts)} rows" in told(source)
    every = list(source.read_range(0, source.num_rows))
    assert [row.row for row in every] == list(range(sum(counts)))
    ids = [row.product_id for row in every]
    assert len(set(ids)) == COUNT and all(len(set(ids[a:b])) == 1 for a, b in _runs(counts))
    # any part of any shard is a slice of the whole
    for start, stop in product(range(0, 25, 3), range(0, 25, 4)):
        part = [(row.row, row.text, row.product_id) for row in source.read_range(start, stop)]
        assert part == [(row.row, row.text, row.product_id) for row in every[start:stop]]
    assert source.manifest()["files"][0]["rows"] == sum(counts)


def _runs(counts):
    ends = np.cumsum(counts).tolist()
    return zip([0, *ends], ends, strict=False)


def test_lists_of_parquet_over_row_groups_and_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "SHARD_ROWS", 5)
    draw(tmp_path)
    rows = [{"image": {"bytes": picture(i), "path": NAMES[i]}, "caption": [TITLES[i]] * (i % 4)} for i in range(COUNT)]
    for part in (0, 1):
        table = pa.Table.from_pylist(rows[part * 7 : part * 7 + 7])
        pq.write_table(table, tmp_path / f"{part}.parquet", row_group_size=2)
    source = open_at(data_files=str(tmp_path / "*.parquet"))
    found, reasons = read(source)
    assert found == [(i, TITLES[i]) for i in range(COUNT) for _ in range(i % 4)]
    assert reasons == ["the title is null"] * 3  # of empty lists: no row is lost
    every = [(row.row, row.text) for row in source.read_range(0, source.num_rows)]
    for size in (1, 2, 3, 7):  # as an evaluation reads, in units
        units = [[(r.row, r.text) for r in source.read_range(a, a + size)] for a in range(0, source.num_rows, size)]
        assert sum(units, []) == every
    loader = TrainLoader(source, Collator(StubProcessor()), batch_size=4, seed=1, rank=0, world_size=1, window=8)
    batches = list(loader.epoch(0))
    assert len(batches) == source.num_rows // 4
    resumed = list(loader.epoch(0, start_step=2))
    assert [batch["row"].tolist() for batch in resumed] == [batch["row"].tolist() for batch in batches[2:]]


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        (["a", "b"], ["a", "b"]),
        ([{"raw": "a", "tokens": ["a"]}, {"raw": "b"}], ["a", "b"]),
        ([{"language_tag": "de_DE", "value": "a"}], ["a"]),
        ({"caption": "a"}, ["a"]),
        ("a", ["a"]),
        ([], [None]),
        (None, [None]),
        ('["a", "b"]', ["a", "b"]),
        ("['a', \"b\"]", ["a", "b"]),
        ('[{"raw": "a"}]', ["a"]),
        ("[]", [None]),
        ("[2024]", ["[2024]"]),
        ("[NEW] mug", ["[NEW] mug"]),
        ('["a"] mug', ['["a"] mug']),
    ],
)
def test_titles_of_a_cell(cell, expected):
    assert titles_of(cell, as_lists=True) == expected
    if isinstance(cell, str):
        assert titles_of(cell) == [cell]


def test_texts_are_lists_only_if_all_of_a_column_are(tmp_path):
    draw(tmp_path)
    rows = [(name, json.dumps([title])) for name, title in pairs()]
    rows[3] = (NAMES[3], "[NEW] mug")
    (tmp_path / "list.csv").write_text(lines(rows, ("image", "caption")))
    source = open_at(tmp_path)
    assert [title for _, title in read(source)[0]] == [title for _, title in rows]
    assert "11 texts of 'caption' are written as lists and the others are not: they stay text" in told(source)
    assert listed_text("[" * 100_000) is None and listed_text("[1, 2]") is None and listed_text('["a", 1]') is None


def test_counts_of_lists():
    facts = Facts(photos=False)
    facts.skip(2)
    for value in ("a", ["a"], ["a", "b"], None, [], "b"):
        facts.add(value)
    assert facts.counts().tolist() == facts.counts().tolist() == [1, 1, 1, 1, 2, 1, 1, 1]
    assert facts.rows == 8 and facts.empty == 3 and not facts.as_lists
    facts = Facts(photos=True)
    for value in ("a.png", '["b.png", "c.png"]'):
        facts.add(value)
    assert facts.counts() is None and facts.doubtful == 1


# ---------------------------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("wrap", ["text", "nested", "list", "nested list"])
def test_addresses_are_photos(tmp_path, server, form, wrap):
    address = f"{server.url}/{{}}?v=1&w=2"
    cells = {
        "text": lambda i: address.format(NAMES[i]),
        "nested": lambda i: {"url": address.format(NAMES[i]), "width": 5},
        "list": lambda i: [address.format(NAMES[i])],
        "nested list": lambda i: [{"src": address.format(NAMES[i])}],
    }
    if form == "csv" and wrap == "nested":
        return  # a cell of CSV is text
    rows = [{"image": cells[wrap](i), "caption": title} for i, title in enumerate(TITLES)]
    with pytest.raises(UsageError, match="--fetch_photos") as refused:
        require_usable_row(table_of(tmp_path, rows, form))
    titles = table_of(tmp_path, rows, form, sides="titles")  # for which no photo is fetched
    assert read(titles) == ([(None, title) for title in TITLES], [])
    source = table_of(tmp_path, rows, form, fetch_photos=True)
    whole(source)
    if (form, wrap) != ("parquet", "nested"):
        assert f"photos of the column 'image' are addresses (127.0.0.1:{server.server_port})" in str(refused.value)
        assert f"{COUNT} photos come from the network (127.0.0.1:{server.server_port})" in told(source)


def test_several_addresses_of_a_cell_are_photos_of_one_product(tmp_path, server):
    urls = [f"{server.url}/{name}" for name in NAMES]
    for glue in (", ", ",", "|", ";", " ", "\n"):
        (tmp_path / "list.csv").write_text(lines([(glue.join(urls[:3]), "a"), (urls[3], "b")], ("image_link", "title")))
        source = open_at(data_files=str(tmp_path / "list.csv"), fetch_photos=True)
        assert read(source) == ([(0, "a"), (1, "a"), (2, "a"), (3, "b")], []), glue
        ids = [row.product_id for row in source.read_range(0, 4)]
        assert ids[0] == ids[1] == ids[2] != ids[3]
    assert photos_of("https://host/a,b.jpg?c=d, e") == ["https://host/a,b.jpg?c=d, e"]
    # photos and titles in lists: each of both is in a row
    rows = [{"image": urls[:2], "caption": ["x", "y", "z"]}, {"image": urls[2:5], "caption": "w"}]
    source = table_of(tmp_path, rows, "jsonl", fetch_photos=True)
    assert read(source)[0] == [(0, "x"), (1, "y"), (0, "z"), (2, "w"), (3, "w"), (4, "w")]


def test_single_addresses_among_files_are_told(tmp_path, server):
    draw(tmp_path)
    rows = [*pairs(), (f"{server.url}/00.png", "x")]
    (tmp_path / "list.csv").write_text(lines(rows, ("image", "caption")))
    source = open_at(tmp_path)
    assert read(source) == (
        all_rows(),
        ["the image is an address, and addresses are fetched only with --fetch_photos"],
    )
    assert f"1 photos are addresses (127.0.0.1:{server.server_port}), which are not fetched" in told(source)
    assert read(open_at(tmp_path, fetch_photos=True)) == ([*all_rows(), (0, "x")], [])
    stored = [{"bytes": picture(i), "path": f"http://127.0.0.1:1/{i}"} for i in range(COUNT)]
    pq.write_table(pa.table({"image": stored, "caption": TITLES}), tmp_path / "stored.parquet")
    whole(open_at(data_files=str(tmp_path / "stored.parquet")))  # where the address only tells where it came from


def test_anothers_table_names_nothing_of_a_private_network(tmp_path):
    place = Place("https://shop.example/photos", is_own=False, host="shop.example", fetch=True)
    for address in (
        "http://127.0.0.1/a",
        "http://10.0.0.7/a",
        "http://[::1]/a",
        "http://router/a",
        "http://nas.local/a",
    ):
        assert place.find(address)[0] is None and "private network" in place.find(address)[2]
    for address in ("https://cdn.example/a.jpg", "http://1.1.1.1/a"):
        assert place.find(address) == (address, address, None)
    assert place.find("s3://bucket/a.jpg")[0] is None
    own = Place("x", fetch=True)
    assert own.find("http://127.0.0.1/a")[0] and own.find("s3://bucket/a.jpg")[0]
    for address in ("https://cdn.example/a.jpg", "s3://bucket/a.jpg"):
        assert Place("x").find(address)[0] is None and "--fetch_photos" in Place("x").find(address)[2]
    own = Place("http://127.0.0.1:80/photos", is_own=False, host="127.0.0.1:80", fetch=True)
    assert own.find("http://127.0.0.1:80/a.jpg")[0] == "http://127.0.0.1:80/a.jpg"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("wrap", ["base64", "data URI", "nested"])
def test_photos_in_text(tmp_path, form, wrap):
    cells = {
        "base64": lambda i: BASE64[i],
        "data URI": lambda i: f"data:image/png;base64,{BASE64[i]}",
        "nested": lambda i: {"bytes": picture(i), "path": NAMES[i]} if form == "parquet" else BASE64[i],
    }
    source = table_of(tmp_path, [{"image": cells[wrap](i), "caption": t} for i, t in enumerate(TITLES)], form)
    whole(source)
    assert "not in the folder" not in told(open_at(tmp_path))  # they are no names


def test_what_looks_like_base64_and_is_a_path():
    assert embedded_photo("/9j/photos/of/mugs.jpg") is None and embedded_photo("iVBORw0KGgo") is None
    assert embedded_photo("a" * 200) is None
    assert embedded_photo(BASE64[0])[:4] == b"\x89PNG"
    assert embedded_photo("\n".join(BASE64[0][i : i + 76] for i in range(0, len(BASE64[0]), 76)))[:4] == b"\x89PNG"
    for broken in ("data:image/png;base64,%%%", "data:image/svg+xml,<svg/>"):
        assert Place("x").find(broken)[2] == "the image is a data URI that can't be decoded"


# ------------------------------------------------------------------------------------------------- Shopify and Parquet


def test_shopify_exports(tmp_path, server):
    header = ("Handle", "Title", "Body (HTML)", "Variant SKU", "Image Src", "Image Position")
    rows = []
    for i in range(0, COUNT, 3):
        rows.append((f"h{i}", TITLES[i], "<p>a</p>\n<ul>, </ul>", i, f"{server.url}/{NAMES[i]}?v=1", 1))
        rows.append((f"h{i}", "", "", "", f"{server.url}/{NAMES[i + 1]}?v=1", 2))
        rows.append((f"h{i}", "", "", "blue", "", ""))  # a variant
        rows.append((f"h{i}", "", "", "", f"{server.url}/{NAMES[i + 2]}?v=1", 3))
    rows.append(("alone", "without a photo", "", "", "", ""))
    (tmp_path / "products_export.csv").write_text(lines(rows, header))
    source = open_at(data_files=str(tmp_path / "products_export.csv"), fetch_photos=True)
    assert read(source) == ([(i, TITLES[i // 3 * 3]) for i in range(COUNT)], [])
    ids = [row.product_id for row in source.read_range(0, COUNT)]
    assert len(set(ids)) == COUNT // 3 and ids[0] == ids[2] != ids[3]
    assert source.selected.product_id == "Handle"
    assert "8 further photos have the title of their product (by 'Handle'); 5 rows without a photo are no rows" in told(
        source
    )


def test_parquet_of_names_beside_photos(tmp_path):
    draw(tmp_path / "photos")
    for column, folder in (("file_name", tmp_path / "photos"), ("image", tmp_path), ("path", tmp_path / "tables")):
        folder.mkdir(exist_ok=True)
        file = folder / "metadata.parquet"
        pq.write_table(pa.table({column: NAMES, "caption": TITLES}), file)
        whole(open_at(data_files=str(file)))
        os.remove(file)
    pq.write_table(pa.table({"image": NAMES[:9], "caption": TITLES[:9]}), tmp_path / "list.parquet")
    source = open_at(tmp_path)
    assert read(source)[0] == all_rows()[:9]
    assert "left: photos that no row names: 3 (photos/09.png, photos/10.png, photos/11.png)" in told(source)
    stored = [{"bytes": None, "path": name} for name in NAMES]
    pq.write_table(pa.table({"image": stored, "caption": TITLES}), tmp_path / "photos" / "stored.parquet")
    whole(open_at(data_files=str(tmp_path / "photos" / "stored.parquet")))
    away = [{"bytes": None, "path": f"/elsewhere/{name}"} for name in NAMES]
    pq.write_table(pa.table({"image": away, "caption": TITLES}), tmp_path / "photos" / "stored.parquet")
    _, reasons = read(open_at(data_files=str(tmp_path / "photos" / "stored.parquet")))
    assert reasons == ["the image is a path, and no image folder was given (--image_dir)"] * COUNT


def test_a_parquet_column_that_comes_twice_is_refused(tmp_path):
    columns = [pa.array([picture(0)]), pa.array(["a"]), pa.array(["b"]), pa.array([1])]
    pq.write_table(pa.Table.from_arrays(columns, names=["image", "caption", "caption", "x"]), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match="a.parquet has the column 'caption' more than once: rename one of them"):
        open_at(tmp_path)
    pq.write_table(pa.Table.from_arrays(columns, names=["image", "caption", "x", "x"]), tmp_path / "a.parquet")
    assert read(open_at(tmp_path)) == ([(0, "a")], [])


def test_parquet_files_whose_cells_differ(tmp_path):
    draw(tmp_path)
    photos = pa.array([picture(i) for i in range(6)], pa.binary())
    pq.write_table(pa.table({"image": photos, "caption": TITLES[:6]}), tmp_path / "a.parquet")
    pq.write_table(
        pa.table({"image": NAMES[6:], "caption": [[title, "x"] for title in TITLES[6:]], "product_id": range(6)}),
        tmp_path / "b.parquet",
    )
    source = open_at(data_files=str(tmp_path / "*.parquet"))
    found, reasons = read(source)
    assert not reasons
    assert found == [*all_rows()[:6], *((i, text) for i in range(6, 12) for text in (TITLES[i], "x"))]
    assert source.selected.product_id == "product_id"


def test_lists_of_photos_in_bytes_are_counted_and_not_looked_at(tmp_path, monkeypatch):
    photos = [[picture(i), picture(i + 1)] for i in range(0, COUNT, 2)]
    pq.write_table(pa.table({"image": photos, "caption": TITLES[::2]}), tmp_path / "a.parquet")
    monkeypatch.setattr(parquet_cells, "_add_values", lambda *_: pytest.fail("photos were looked at"))
    source = open_at(data_files=str(tmp_path / "a.parquet"))
    assert read(source)[0] == [(i, TITLES[i // 2 * 2]) for i in range(COUNT)]


def test_columns_of_bytes_and_plain_titles_are_not_read_when_opened(tmp_path, monkeypatch):
    table = pa.table({"image": pa.array([picture(i) for i in range(COUNT)], pa.binary()), "caption": TITLES})
    pq.write_table(table, tmp_path / "a.parquet")
    monkeypatch.setattr(parquet_cells, "_facts", lambda *_, **__: pytest.fail("a column was read"))
    whole(open_at(data_files=str(tmp_path / "a.parquet")))


# ------------------------------------------------------------------------------------------------------------- places


def test_absolute_paths(tmp_path):
    folder = draw(tmp_path / "photos")
    outside = draw(tmp_path / "outside")
    for root in (folder, f"file://{folder}"):
        (tmp_path / "list.csv").write_text(lines([(f"{root}/{n}", t) for n, t in pairs()], ("filepath", "title")))
        for arguments in ({"data_dir": str(tmp_path)}, {"data_files": str(tmp_path / "list.csv")}):
            whole(open_source(split="train", **arguments))
            whole(open_source(split="train", **arguments, image_dir=str(folder)))
    assert "no row names" in told(open_at(tmp_path)) and "outside/00.png" in told(open_at(tmp_path))
    (folder / "list.csv").write_text(lines([(f"{outside}/{n}", t) for n, t in pairs()], ("filepath", "title")))
    _, reasons = read(open_at(data_files=str(folder / "list.csv")))
    assert len(reasons) == COUNT and reasons[0] == (
        f"the image file name leads outside the image folder ({folder}): give --image_dir the folder that holds "
        f"{outside}/00.png"
    )
    whole(open_at(data_files=str(folder / "list.csv"), image_dir=str(outside)))
    # neither a neighbour whose name begins alike, nor a way round
    for name in (f"{folder}-2/00.png", f"{folder}/../outside/00.png"):
        assert Place(str(folder), (str(folder),)).find(name)[0] is None


def test_photos_are_found_near_the_table(tmp_path):
    draw(tmp_path / "shop" / "images")
    tables = {
        "shop/list.csv": [],
        "shop/tables/list.csv": [],
        "shop/images/list.csv": [],
        "list.csv": ["shop/images"],
    }
    for name, folders in tables.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(lines(pairs(), ("image", "caption")))
        if not folders:
            whole(open_at(data_files=str(tmp_path / name)))
        else:  # too far to be looked for, but not in a folder that is given
            assert not read(open_at(data_files=str(tmp_path / name)))[0]
            whole(open_at(data_files=str(tmp_path / name), image_dir=str(tmp_path / folders[0])))
        os.remove(tmp_path / name)
    (tmp_path / "list.csv").write_text(lines(pairs(), ("image", "caption")))
    source = open_at(tmp_path)
    whole(source)
    assert f"list.csv: photos are taken from {tmp_path}/shop/images" in told(source)


def test_each_table_finds_the_photos_nearest_to_it(tmp_path):
    for brand in ("acme", "brandx"):
        draw(tmp_path / brand / "img")
        draw(tmp_path / "photos")  # of the same names
        (tmp_path / brand / "list.csv").write_text(lines(pairs(), ("image", "title")))
    source = open_at(tmp_path)
    assert read(source) == (all_rows() * 2, [])
    brands = {os.path.relpath(row.image, tmp_path).split("/")[0] for row in source.read_range(0, 24)}
    assert brands == {"acme", "brandx"}


def test_a_link_to_a_table_finds_the_photos_of_the_table(tmp_path):
    draw(tmp_path / "shop")
    (tmp_path / "shop" / "list.csv").write_text(lines(pairs(), ("image", "title")))
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "list.csv").symlink_to(tmp_path / "shop" / "list.csv")
    source = open_at(data_files=str(tmp_path / "linked" / "list.csv"))
    whole(source)
    assert f"photos are taken from {os.path.realpath(tmp_path)}/shop" in told(source)


@pytest.mark.parametrize(("in_table", "in_files"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_letters_with_marks_are_one_letter_however_they_are_stored(tmp_path, in_table, in_files):
    names = [f"größe {i:02d} 머그.png" for i in range(COUNT)]
    folder = draw(tmp_path / "photos", [unicodedata.normalize(in_files, name) for name in names])
    rows = [(unicodedata.normalize(in_table, name), title) for name, title in zip(names, TITLES, strict=True)]
    (tmp_path / "list.csv").write_text(lines(rows[:-1], ("image", "caption")))
    source = open_at(tmp_path)
    assert read(source) == (all_rows()[:-1], [])
    assert "letters with marks are stored otherwise in their names" in told(source)
    assert "left: photos that no row names: 1 (photos/gr" in told(source)
    assert "are not in the folder" not in told(source)
    reason = why_missing(str(folder / rows[0][0]))
    assert reason.endswith("whose letters are stored otherwise: write the name as the file has it")


@pytest.mark.parametrize("beside", ["photos", "Images", "product-images", "img_2024", "JPEGs", "pngs (new)", "media"])
def test_photos_may_lie_in_a_folder_beside_that_of_the_table(tmp_path, beside):
    draw(tmp_path / beside)
    draw(tmp_path / "summer catalogue", NAMES)
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "list.csv").write_text(lines(pairs(), ("image", "caption")))
    pq.write_table(pa.table({"image": NAMES, "caption": TITLES}), tmp_path / "tables" / "list.parquet")
    for name in ("list.csv", "list.parquet"):
        source = open_at(data_files=str(tmp_path / "tables" / name))
        whole(source)
        assert f"photos are taken from {tmp_path}/tables/../{beside}" in told(source).replace(
            f"{tmp_path}/{beside}", f"{tmp_path}/tables/../{beside}"
        )


@pytest.mark.parametrize("beside", ["summer catalogue", "imagination", "photosynthesis", "multimedia", "www"])
def test_a_folder_beside_that_of_the_table_is_not_any_folder(tmp_path, beside):
    """It may be another catalogue, whose photos have the same names."""
    draw(tmp_path / beside)
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "list.csv").write_text(lines(pairs(), ("image", "caption")))
    pq.write_table(pa.table({"image": NAMES, "caption": TITLES}), tmp_path / "tables" / "list.parquet")
    for name in ("list.csv", "list.parquet"):
        found, reasons = read(open_at(data_files=str(tmp_path / "tables" / name)))
        assert not found and len(reasons) == COUNT


def test_names_without_an_ending(tmp_path):
    draw(tmp_path / "images", [f"{i}.png" for i in range(COUNT)])
    (tmp_path / "styles.csv").write_text(lines(enumerate(TITLES), ("image", "name")))
    (tmp_path / "styles.jsonl").write_text(json_lines([{"image": i, "name": t} for i, t in enumerate(TITLES)]))
    for name in ("styles.csv", "styles.jsonl"):
        source = open_at(data_files=str(tmp_path / name), image_dir=str(tmp_path / "images"))
        whole(source)
        assert "'.png' is added to their names" in told(source)
    os.remove(tmp_path / "styles.jsonl")
    draw(tmp_path / "images", ["more.png"])
    assert "no row names: 1 (images/more.png)" in told(open_at(tmp_path, image_dir=str(tmp_path / "images")))


def test_another_folder_is_taken_only_if_there_is_no_doubt(tmp_path):
    draw(tmp_path / "few", NAMES[:5])
    draw(tmp_path / "many", NAMES[:9])
    here, others = Place(str(tmp_path)), [str(tmp_path / name) for name in ("few", "many", "nowhere")]
    place, words = find_place(NAMES, here, others)
    assert place.folder == others[1] and words == f"photos are taken from {others[1]}"
    assert find_place(NAMES, here, others[:1]) == (here, None)  # fewer than half
    draw(tmp_path / "other shop", NAMES[:9])
    (tmp_path / "link").symlink_to(tmp_path / "many")
    others.append(str(tmp_path / "link"))
    assert find_place(NAMES, here, others)[0].folder == others[1]
    place, words = find_place(NAMES, here, [*others, str(tmp_path / "other shop")])
    assert place == here and words.startswith(f"photos of these names lie in several folders ({others[1]} and ")
    draw(tmp_path, NAMES[:1])  # where the table says, if anything is there
    assert find_place(NAMES, here, others) == (here, None)


def test_a_missing_photo_says_where_it_was_looked_for_and_what_is_there(tmp_path):
    folder = draw(tmp_path / "photos", ["A.PNG", "b.jpeg", "c.jpg.png"])
    for name, words in (
        ("a.png", "there is 'A.PNG', with other capitals"),
        ("b.jpg", "there is 'b.jpeg', with another ending"),
        ("c.jpg", "there is 'c.jpg.png', with another ending"),
        (" b.jpeg ", "there is 'b.jpeg', without the blanks around its name"),
        ("b%2ejpeg", "there is 'b.jpeg': write names as the files have them, and not as in addresses"),
        ("sub/d.jpg", f"there is no folder {folder}/sub"),
    ):
        reason = why_missing(str(folder / name))
        assert reason.startswith(f"the image file is missing: {folder}/{name}; ") and words in reason
    assert why_missing(str(folder / "d.jpg")) == f"the image file is missing: {folder}/d.jpg"
    (folder / "e.jpg").symlink_to("gone.jpg")
    broken_link = f"the image file is missing: {folder}/e.jpg is a link to gone.jpg, which is not there"
    assert why_missing(str(folder / "e.jpg")) == broken_link
    (tmp_path / "photos.zip").write_bytes(b"PK")
    for path in (folder / "d.jpg", tmp_path / "images" / "d.jpg"):
        assert f"photos.zip lies in {tmp_path}: unpack it there" in why_missing(str(path))
    shop = tmp_path / "shop"
    shop.mkdir()
    (shop / "metadata.csv").write_text(lines(pairs()))
    (tmp_path / "photos.zip").rename(shop / "photos.zip")
    _, reasons = read(open_at(shop))
    assert len(reasons) == COUNT and "photos.zip" in reasons[0]
    assert f"{COUNT} photos that rows name are not in the folder" in told(open_at(shop))


def test_columns_are_named_in_messages(tmp_path):
    (tmp_path / "a.csv").write_text(lines(pairs(), ("image", "caption")))
    (tmp_path / "b.csv").write_text(lines(pairs(), ("image", "name")))
    with pytest.raises(UsageError, match="b.csv has no column 'caption' .--caption_column. that the other tables have"):
        open_at(tmp_path)
    (tmp_path / "b.csv").write_text("shop,city\n1,2\n")
    assert "left: tables without photos and titles (name one by flags to read it): 1 (b.csv)" in told(open_at(tmp_path))
    assert records()[0] == {"image": NAMES[0], "caption": TITLES[0]}
