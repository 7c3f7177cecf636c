"""Feeds of Google Merchant as XML, and listings of ABO with their table of photos: read, or refused with the cause."""

from __future__ import annotations

import csv
import gzip
import io
import json

import pytest
from data_stub import encoded, photo

from aliblip.data import feeds
from aliblip.data.feeds import feed_items
from aliblip.data.products import product_id_of, tell_sources
from aliblip.data.rows import decode
from aliblip.data.sources import open_source
from aliblip.runtime.mistakes import UsageError

ITEM = """<item><g:id>S{n}</g:id><title>not {n}</title><g:title>{title}</g:title><link>https://shop.example/{n}</link>
<g:image_link>https://shop.example/{n}.jpg?w=1&amp;h=2</g:image_link>
<g:additional_image_link>https://shop.example/{n}b.jpg</g:additional_image_link>
<g:additional_image_link>https://shop.example/{n}c.jpg</g:additional_image_link>
<g:item_group_id>G{group}</g:item_group_id><g:price>{n}.00 EUR</g:price>
<g:shipping><g:country>DE</g:country><g:price>4 EUR</g:price></g:shipping></item>"""
TITLES = ["Mug &amp; saucer", "<![CDATA[Lamp <large>]]>", "чашка 杯子", "  Café  "]
READ = ["Mug & saucer", "Lamp <large>", "чашка 杯子", "Café"]


def rss(items: str, head: str = '<?xml version="1.0"?>', encoding: str = "utf-8") -> bytes:
    name = f'{head}<rss version="2.0" xmlns:g="http://base.google.com/ns/1.0"><channel><title>My shop</title>'
    return f"{name}{items}</channel></rss>".encode(encoding)


ITEMS = "".join(ITEM.format(n=n, title=title, group=n // 2) for n, title in enumerate(TITLES))


def opened(file, **named):
    source = open_source(data_files=str(file), split="train", fetch_photos=True, **named)
    lines: list[str] = []
    tell_sources(source, tell=lines.append)
    return source, list(source.read_range(0, source.num_rows)), "\n".join(lines)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("feed.xml", rss(ITEMS)),
        ("feed.xml.gz", gzip.compress(rss(ITEMS))),
        ("feed.xml", rss(ITEMS, head="", encoding="utf-8-sig")),
        ("feed.xml", rss(ITEMS, '<?xml version="1.0" encoding="utf-16"?>', "utf-16")),
        ("products.txt", rss(ITEMS)),  # whatever it is called
    ],
)
def test_the_items_of_a_feed_are_rows(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    source, rows, told = opened(tmp_path / name, other_columns="all")
    assert [row.text for row in rows] == READ
    assert [row.image for row in rows] == [f"https://shop.example/{n}.jpg?w=1&h=2" for n in range(4)]
    assert [row.product_id for row in rows] == [product_id_of(f"G{n // 2}") for n in range(4)]
    assert rows[1].others["price"] == "1.00 EUR" and rows[1].others["shipping_price"] == "4 EUR"
    assert "a feed of Google Merchant (XML), 4 items" in told and "items of one 'item_group_id' are one product" in told
    assert "further photos ('additional_image_link') are not read" in told and "2 products" in told


def test_atom_and_a_declared_encoding(tmp_path):
    entry = "<entry><g:id>1</g:id><title>Größe</title><link href='https://shop.example'/>"
    entry += "<g:image_link>https://shop.example/1.jpg</g:image_link></entry>"
    head = '<?xml version="1.0" encoding="iso-8859-1"?><feed xmlns="http://www.w3.org/2005/Atom" '
    (tmp_path / "f.xml").write_bytes(f'{head}xmlns:g="http://base.google.com/ns/1.0">{entry}</feed>'.encode("latin-1"))
    _, (row,), told = opened(tmp_path / "f.xml", other_columns=["link"])
    assert (row.text, row.image) == ("Größe", "https://shop.example/1.jpg") and "1 items" in told
    assert row.others["link"] == "https://shop.example"


@pytest.mark.parametrize("size", [1, 7, 64])
def test_a_feed_is_read_in_pieces_of_any_size(monkeypatch, size):
    whole = list(feed_items(io.BytesIO(rss(ITEMS)), "feed.xml"))
    monkeypatch.setattr(feeds, "READ_BYTES", size)
    assert list(feed_items(io.BytesIO(rss(ITEMS)), "feed.xml")) == whole and len(whole) == 4
    assert whole[0]["additional_image_link"] == ["https://shop.example/0b.jpg", "https://shop.example/0c.jpg"]


LAUGHS = '<?xml version="1.0"?><!DOCTYPE rss [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;">]>'
OUTSIDE = '<?xml version="1.0"?><!DOCTYPE rss [<!ENTITY a SYSTEM "file:///etc/passwd">]>'
DEEP = "<item>" + "<g:a>" * 40 + "</g:a>" * 40 + "</item>"


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (rss(ITEM.format(n=1, title="&b;", group=1), LAUGHS), "has a document type"),
        (rss(ITEM.format(n=1, title="&a;", group=1), OUTSIDE), "has a document type"),
        (rss(ITEMS, "<?xml version='1.0'?><!DOCTYPE rss>"), "has a document type"),
        (rss(ITEMS)[:-40], "is no whole XML"),
        (rss(ITEMS)[:900], "is no whole XML"),
        (rss(ITEMS + "<item>&nbsp;</item>"), "is no whole XML .*undefined entity"),
        (rss(ITEMS, '<?xml version="1.0" encoding="no-such"?>'), "is no whole XML"),
        (rss(DEEP), "elements lie more than 32 deep"),
        (rss(f"<item><g:title>{'x' * 2**22}y</g:title></item>"), "an item has more than 4,194,304 characters"),
        (rss(""), "is a feed without items"),
        (b"<?xml version='1.0'?><annotation><object/></annotation>", "is of no known kind|is XML, but no feed"),
        (rss("<item><g:id>1</g:id><g:title>a</g:title></item>"), "image"),
    ],
)
def test_what_is_no_feed_is_refused_in_one_line(tmp_path, data, told):
    shop = tmp_path / "shop"  # its neighbours are looked into for photos
    shop.mkdir()
    (shop / "feed.xml").write_bytes(data)
    with pytest.raises(UsageError, match=told) as caught:
        opened(shop / "feed.xml")
    assert "\n" not in str(caught.value) and "root:" not in str(caught.value)


def test_of_a_folder_the_feed_is_read_and_other_xml_is_left(tmp_path):
    (tmp_path / "feed.xml").write_bytes(rss(ITEMS))
    (tmp_path / "0.xml").write_text("<?xml version='1.0'?><annotation><filename>0.jpg</filename></annotation>")
    source = open_source(data_dir=str(tmp_path), split="train", fetch_photos=True)
    assert source.num_rows == 4 and any(
        line.startswith("left: files of other kinds of data (") and line.endswith(": 1 (0.xml)") for line in source.told
    )


# --- listings of ABO --------------------------------------------------------------------------------------------------


def names(*titles):
    return [{"language_tag": language, "value": title} for language, title in titles]


LISTINGS = [
    {
        "item_id": "B0",
        "item_name": names(("en_US", "Mug"), ("en_GB", "Mug"), ("de_DE", "Becher")),
        "main_image_id": "m0",
    },
    {"item_id": "B1", "item_name": names(("zh_CN", "台灯")), "main_image_id": "m1", "other_image_id": ["m2", "m3"]},
    {"item_id": "B2", "item_name": names(("en_US", "No photo"))},
    {"item_id": "B3", "item_name": names(("en_US", "Gone")), "main_image_id": "m9"},
]


def draw_abo(folder, sizes=("small",)):
    """As its archives unpack."""
    for part in ("listings/metadata", "images/metadata", *(f"images/{size}/ab" for size in sizes)):
        (folder / part).mkdir(parents=True)
    data = "".join(json.dumps(record) + "\n" for record in LISTINGS).encode()
    (folder / "listings/metadata/listings_0.json.gz").write_bytes(gzip.compress(data))
    with gzip.open(folder / "images/metadata/images.csv.gz", "wt", newline="") as file:
        csv.writer(file).writerows(
            [("image_id", "height", "width", "path"), *((f"m{n}", 9, 7, f"ab/{n}x.jpg") for n in range(4))]
        )
    for size in sizes:
        for n in range(4):
            (folder / f"images/{size}/ab/{n}x.jpg").write_bytes(encoded(photo(n), "JPEG"))


@pytest.mark.parametrize("how", ["folder", "file", "file and photos"])
def test_listings_are_joined_with_their_photos(tmp_path, how):
    draw_abo(tmp_path)
    listing, small = str(tmp_path / "listings/metadata/listings_0.json.gz"), str(tmp_path / "images/small")
    named = {
        "folder": {"data_dir": str(tmp_path)},
        "file": {"data_files": listing},
        "file and photos": {"data_files": listing, "image_dir": small},
    }[how]
    source = open_source(split="train", **named)
    rows = list(source.read_range(0, source.num_rows))
    assert [row.text for row in rows] == ["Mug", "Becher", "台灯", "No photo", "Gone"]
    for row, number in zip(rows[:3], (0, 0, 1), strict=True):
        assert row.image == f"{small}/ab/{number}x.jpg" and decode(row).image.size == photo(number).size
    assert [row.product_id for row in rows] == [product_id_of(f"B{n}") for n in (0, 0, 1, 2, 3)]
    told = "\n".join(source.told)
    assert "where 4 photos of listings lie" in told and "1 listings have no photo (main_image_id)" in told
    assert "1 listings name a photo that the table of photos does not have" in told
    assert "2 further photos (other_image_id) are not read" in told
    assert "listings of ABO; each title is a row, in each language once (en_US 3, de_DE 1, zh_CN 1)" in told


def test_photos_of_two_sizes_are_asked_for(tmp_path):
    draw_abo(tmp_path, ("small", "original"))
    source = open_source(data_dir=str(tmp_path), split="train")
    assert any("give one as --image_dir" in line for line in source.told)
    source = open_source(data_dir=str(tmp_path), split="train", image_dir=str(tmp_path / "images/original"))
    assert next(source.read_range(0, 1)).image == str(tmp_path / "images/original/ab/0x.jpg")


def test_other_paths_of_photos_are_other_data(tmp_path):
    draw_abo(tmp_path)
    file = tmp_path / "listings/metadata/listings_0.json.gz"
    before = open_source(data_files=str(file), split="train").manifest()
    table = tmp_path / "images/metadata/images.csv.gz"
    table.write_bytes(gzip.compress(gzip.decompress(table.read_bytes()).replace(b"0x.jpg", b"3x.jpg")))
    assert open_source(data_files=str(file), split="train").manifest() != before
