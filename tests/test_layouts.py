"""Photos called by ids, titles in a folder of their own, JSON within JSON, exports of shops: read, and told how."""

import json

import pytest
from drawing import COUNT, NAMES, TITLES, draw, lines, open_at, opened, pairs, read, records, refused, told, whole

from aliblip.data.products import product_id_of
from aliblip.data.values import photos_of
from aliblip.runtime.mistakes import UsageError

IDS = [15970 + 7 * i for i in range(COUNT)]

# -------------------------------------------------------------------------------------------- photos called by ids


def with_ids(header=("id", "productDisplayName")):
    return lines(zip(IDS, TITLES, strict=True), header)


def by_id(folder, endings=".png", below="images/"):
    return draw(folder, [f"{below}{number}{endings}" for number in IDS])


def test_an_id_may_name_the_file_and_stays_a_column(tmp_path):
    source = opened(by_id(tmp_path), with_ids(), "styles.csv")
    whole(source)
    assert "'id' is how the photos are called (--image_column names another column)" in told(source)
    assert "photos are taken from" in told(source) and "'.png' is added to their names" in told(source)
    assert "no row names" not in told(source) and "not in the folder" not in told(source)
    for others in ("all", ["id"]):
        row = next(open_at(tmp_path, other_columns=others).read_range(3, 4))
        assert row.others["id"] == str(IDS[3])


def test_a_gallery_has_the_columns_of_the_table_that_names_its_photos_by_id(tmp_path):
    """As a gallery reads a folder: the table if it tells of these photos, else all of them."""
    by_id(tmp_path)
    draw(tmp_path, ["banners/other.png"])
    (tmp_path / "styles.csv").write_text(with_ids())
    source = open_at(tmp_path, sides="images", other_columns="all")
    assert source.num_rows == COUNT and {"id", "productDisplayName"} <= set(source.columns)
    (tmp_path / "prices.csv").write_text(lines([("A1", "x", 3)], ("sku", "name", "price")))
    (tmp_path / "styles.csv").unlink()
    source = open_at(tmp_path, sides="images", any_split=True)
    assert source.num_rows == COUNT + 1 and "left: tables without photos and titles" in told(source)
    draw(tmp_path, [f"again/{number}.png" for number in IDS])  # which are meant is a guess
    (tmp_path / "styles.csv").write_text(with_ids())
    assert open_at(tmp_path, sides="images", any_split=True).num_rows == 2 * COUNT + 1


def test_ids_of_json_are_numbers(tmp_path):
    rows = [{"id": number, "title": title} for number, title in zip(IDS, TITLES, strict=True)]
    source = opened(draw(by_id(tmp_path), ["images/extra.png"]), json.dumps(rows), "products.json")
    whole(source)
    assert "left: photos that no row names: 1 (images/extra.png)" in told(source)


def test_an_id_as_product_is_one_all_the_same(tmp_path):
    by_id(tmp_path)
    rows = [(number, title) for number, title in zip(IDS, TITLES, strict=True) for _ in range(2)]
    (tmp_path / "styles.csv").write_text(lines(rows, ("id", "title")))
    source = open_at(tmp_path, product_id_column="id")
    ids = [row.product_id for row in source.read_range(0, source.num_rows)]
    assert len(ids) == 2 * COUNT and ids[::2] == ids[1::2] and len(set(ids)) == COUNT


@pytest.mark.parametrize("missing", [1, 2])
def test_nearly_all_ids_must_name_photos(tmp_path, missing):
    by_id(tmp_path)
    for number in IDS[:missing]:
        (tmp_path / f"images/{number}.png").unlink()
    if missing == 1:
        source = opened(tmp_path, with_ids(), "styles.csv")
        found, reasons = read(source)
        assert len(found) == COUNT - 1 and "the image file is missing" in reasons[0]
    else:
        assert "has no column 'product' or 'image' or 'file_name'" in refused(tmp_path, with_ids(), "styles.csv")


def test_ids_are_not_taken_where_a_column_is_called_as_photos_are_or_another_is_named(tmp_path):
    by_id(tmp_path)
    draw(tmp_path, NAMES)
    rows = [(number, name, title) for number, (name, title) in zip(IDS, pairs(reversed(NAMES)), strict=True)]
    source = opened(tmp_path, lines(rows, ("id", "photo", "title")), "styles.csv")
    assert read(source)[0] == list(zip(reversed(range(COUNT)), TITLES, strict=True)) and "is how" not in told(source)
    (tmp_path / "styles.csv").write_text(lines(rows, ("id", "look", "title")))
    assert read(open_at(tmp_path, image_column="look"))[0][0][0] == COUNT - 1
    assert read(open_at(tmp_path))[0][0][0] == 0


def test_two_columns_of_ids_that_name_photos_are_no_guess(tmp_path):
    draw(by_id(tmp_path), [f"images/S{number}.png" for number in IDS])
    rows = [(number, f"S{number}", title) for number, title in zip(IDS, TITLES, strict=True)]
    assert "name one with --image_column" in refused(tmp_path, lines(rows, ("id", "sku", "title")), "styles.csv")


def test_a_table_without_photos_says_so_as_before(tmp_path):
    assert "name one with --image_column" in refused(tmp_path, with_ids(), "styles.csv")


# ------------------------------------------------------------------------------- titles in a folder of their own


def labels(folder, names, texts=TITLES, ending=".txt"):
    for name, text in zip(names, texts, strict=True):
        file = folder / name.replace("images", "labels").replace(".png", ending)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


@pytest.mark.parametrize("ending", [".txt", ".json", ".caption"])
def test_titles_in_a_folder_of_their_own(tmp_path, ending):
    names = [f"images/{name}" for name in NAMES]
    texts = [json.dumps({"caption": title}) for title in TITLES] if ending == ".json" else TITLES
    labels(draw(tmp_path, names), names, texts, ending)
    (tmp_path / f"labels/classes{ending}").write_text("{}")
    source = open_at(tmp_path)
    whole(source)
    assert "the files of the photos of images lie in labels" in told(source)
    assert f"left: files without a photo of their name in images: 1 (labels/classes{ending})" in told(source)


def test_each_split_has_its_own_titles(tmp_path):
    names = [f"images/{'train' if i < 8 else 'val'}/{i % 8:02d}.png" for i in range(COUNT)]
    labels(draw(tmp_path, names), names)
    assert read(open_at(tmp_path))[0] == list(enumerate(TITLES))[:8]
    assert read(open_at(tmp_path, "validation"))[0] == list(enumerate(TITLES))[8:]


def test_one_file_that_is_called_as_a_photo_may_be_a_table(tmp_path):
    draw(tmp_path, ["images/catalogue.png"])
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables/catalogue.json").write_text(json.dumps([{"image": "catalogue.png", "title": TITLES[0]}]))
    assert read(open_at(tmp_path))[0] == [(0, TITLES[0])]


def test_many_folders_each_with_titles_beside_it(tmp_path):
    names = [f"{i}/images/00.png" for i in range(COUNT)]
    labels(draw(tmp_path, names), names)
    source = open_at(tmp_path)
    assert sorted(read(source)[0]) == list(enumerate(TITLES))
    assert "the files of the photos of 0/images lie in 0/labels, and those of 11 further folders likewise" in told(
        source
    )


@pytest.mark.parametrize("why", ["boxes", "two folders", "of two folders", "few", "other depth"])
def test_what_may_be_no_titles_is_none(tmp_path, why):
    names = [f"images/{name}" for name in NAMES]
    labels(draw(tmp_path, names), names, ["0 0.5 0.5 0.25 0.1"] * COUNT if why == "boxes" else TITLES)
    if why == "two folders":
        labels(tmp_path, [name.replace("images", "texts") for name in names])
    elif why == "of two folders":
        draw(tmp_path, [name.replace("images", "small") for name in names])
    elif why == "few":
        for name in names[:6]:
            (tmp_path / name.replace("images", "labels").replace(".png", ".txt")).unlink()
    elif why == "other depth":
        (tmp_path / "labels").rename(tmp_path / "deeper")
        (tmp_path / "labels").mkdir()
        (tmp_path / "deeper").rename(tmp_path / "labels/deeper")
    with pytest.raises(UsageError, match="has photos but no metadata.jsonl .*text files without columns"):
        open_at(tmp_path)


# ------------------------------------------------------------------------------------------------ JSON within JSON

BY_ID = {f"S{i}": record for i, record in enumerate(records())}


@pytest.mark.parametrize(
    ("document", "way"),
    [
        ({"data": {"products": records()}}, "data.products"),
        ({"status": "ok", "data": {"total": COUNT, "next": None, "products": records()}}, "data.products"),
        ({"products": BY_ID}, "products"),
        ({"page": 1, "result": {"products": BY_ID}}, "result.products"),
        ({"title": "My shop", "url": "https://shop.example", "products": records()}, "products"),
        ({"name": "My shop", "data": {"products": records()}}, "data.products"),
    ],
)
def test_a_table_within_objects(tmp_path, document, way):
    source = opened(draw(tmp_path), json.dumps(document), "products.json")
    whole(source)
    assert f"the records are under the key '{way}'" in told(source)


@pytest.mark.parametrize(
    "record",
    [
        {"image": "00.png", "caption": "mug no 0", "boxes": [{"x": 1}, {"x": 2}]},
        {"image": "00.png", "caption": "mug no 0", "parts": {"handle": [{"caption": "a"}]}},
        {"S1": {"image": "00.png", "caption": "mug no 0", "variants": [{"caption": "b"}]}},
    ],
)
def test_a_record_alone_stays_one(tmp_path, record):
    assert read(opened(draw(tmp_path), json.dumps(record), "products.json"))[0] == [(0, "mug no 0")]


def test_lists_called_as_splits_are(tmp_path):
    document = {"train": records()[:8], "val": records()[8:]}
    (draw(tmp_path) / "products.json").write_text(json.dumps(document))
    for split, expected in (("train", slice(8)), ("validation", slice(8, None))):
        for source in (open_at(tmp_path, split), open_at(data_files=str(tmp_path / "products.json"), split=split)):
            assert read(source)[0] == list(enumerate(TITLES))[expected] and source.split == split
            assert "of 'train' (8), 'val' (4)" in told(source)
    for any_split in (True, False):
        with pytest.raises(UsageError, match=r"has no list of the split 'test': there are 'train' \(8\), 'val' \(4\)"):
            open_at(tmp_path, "test", any_split=any_split)
    (tmp_path / "products.json").write_text(json.dumps(document | {"validation": records()[10:]}))
    with pytest.raises(UsageError, match=r"has 2 lists of the split 'validation' \('val', 'validation'\): join them"):
        open_at(tmp_path, "validation")
    with pytest.raises(UsageError, match="holds several lists of records"):
        opened(tmp_path, json.dumps({"train": records()[:8], "mugs": records()[8:]}), "products.json")


def test_a_split_that_the_file_tells_is_not_another_one(tmp_path):
    """Of a folder with one file "any split" is that file, and its rows are those of the split that was asked for."""
    photos = [
        {"filename": name, "split": "test" if i > 8 else "train", "sentences": [{"raw": title}]}
        for i, (name, title) in enumerate(pairs())
    ]
    (draw(tmp_path) / "dataset.json").write_text(json.dumps({"images": photos}))
    source = open_at(tmp_path, "test", any_split=True)
    assert (source.num_rows, source.split) == (3, "test")
    (tmp_path / "dataset.json").write_text(json.dumps(records()))
    assert open_at(tmp_path, "test", any_split=True).split == "train"
    with pytest.raises(UsageError, match="has no split 'test'"):
        open_at(tmp_path, "test")


# -------------------------------------------------------------------------------------------------- exports of shops


def test_woocommerce_variations_and_further_photos_are_of_their_product(tmp_path):
    draw(tmp_path)
    header = ("ID", "Type", "SKU", "Name", "Images", "Parent")
    rows = [
        (1, "variable", "A", TITLES[0], "00.png, 01.png", ""),
        (2, "variation", "A-1", TITLES[2], "02.png", "A"),
        (3, "variation", "A-2", TITLES[2], "", "A"),
        (4, "variation", "A-3", TITLES[3], "03.png", "id:1"),
        (5, "simple", "B", TITLES[4], "04.png", ""),
    ]
    source = opened(tmp_path, lines(rows, header), "wc-product-export.csv")
    shown = [(0, TITLES[0]), (1, TITLES[0]), (2, TITLES[2]), (3, TITLES[3]), (4, TITLES[4])]
    assert read(source) == (shown, [])
    ids = [row.product_id for row in source.read_range(0, 5)]
    assert ids == [1, 1, 1, 1, 5]
    assert "WooCommerce's export; 2 variations with photos are of the product that 'Parent' names; 1 rows" in told(
        source
    )


def test_further_columns_that_hold_photos_are_told(tmp_path):
    draw(tmp_path)
    rows = [(name, name, "x", title) for name, title in pairs()]
    header = ("IMAGE1", "IMAGE2", "image_phash", "TITLE")
    assert told(opened(tmp_path, lines(rows, header), "etsy.csv")).count("further columns are not read: 'IMAGE2'") == 1
    header = ("file_name", "image_link", "size", "title")
    source = opened(tmp_path, lines(rows, header), "etsy.csv")
    assert "the photos of further columns are not read: 'image_link'" in told(source)
    source = open_at(tmp_path, sides="titles")
    assert "further columns" not in told(source)


def test_what_variants_alone_show_is_told(tmp_path):
    draw(tmp_path)
    header = ("Handle", "Title", "Image Src", "Variant Image")
    rows = [("a", TITLES[0], "00.png", "00.png"), ("a", "", "01.png", "02.png"), ("b", TITLES[3], "03.png", "")]
    source = opened(tmp_path, lines(rows, header), "products_export.csv")
    assert read(source) == ([(0, TITLES[0]), (1, TITLES[0]), (3, TITLES[3])], [])
    assert "1 photos of 'Variant Image' alone are not read" in told(source)
    assert [row.product_id for row in source.read_range(0, 3)] == [*[product_id_of("a")] * 2, product_id_of("b")]


@pytest.mark.parametrize(
    ("cell", "photos"),
    [
        ("a.jpg, b.jpg", ["a.jpg", "b.jpg"]),
        ("x/a b.PNG|c.webp ;d.jpeg", ["x/a b.PNG", "c.webp", "d.jpeg"]),
        ("red, large.jpg", ["red, large.jpg"]),
        ("a.jpg, the mug", ["a.jpg, the mug"]),
        ("a.jpg", ["a.jpg"]),
    ],
)
def test_several_names_in_one_cell(cell, photos):
    assert photos_of(cell) == photos


def test_names_that_begin_with_a_slash_are_looked_for_in_the_folder(tmp_path):
    draw(tmp_path / "media", [f"m/u/{name}" for name in NAMES])
    rows = [(f"/m/u/{name}", title) for name, title in pairs()]
    source = opened(tmp_path, lines(rows, ("base_image", "name")), "catalog.csv")
    whole(source)
    assert "their names are taken without the '/' at the beginning" in told(source)
    (tmp_path / "catalog.csv").write_text(lines([*rows, ("/../../secret.png", "x")], ("base_image", "name")))
    found, reasons = read(open_at(tmp_path))
    assert len(found) == COUNT and "leads outside" in reasons[0]


@pytest.mark.parametrize(
    ("written", "how"),
    [("  {} ", "taken without the blanks around them"), ("{}?v=12&w=1", "written as in addresses (%20, ?v=1)")],
)
def test_names_with_what_is_none_of_them(tmp_path, written, how):
    rows = [(written.format(name), title) for name, title in pairs()]
    source = opened(draw(tmp_path), lines(rows, ("image", "title")), "products.csv")
    whole(source)
    assert how in told(source) and "no row names" not in told(source)
    draw(tmp_path, [written.format(NAMES[0])])  # where that is a file's name
    (tmp_path / "products.csv").write_text(lines(rows[:1], ("image", "title")))
    assert how not in told(open_at(tmp_path))


def test_objects_with_several_sizes_of_a_photo(tmp_path):
    rows = [
        {"title": title, "images": [{"thumb": "no.png", "large": name, "hi_res": None, "variant": "MAIN"}]}
        for name, title in pairs()
    ]
    whole(opened(draw(tmp_path), json.dumps(rows), "meta.json"))
    rows[0]["images"][0] = {"variant": "MAIN", "size": 3}
    (tmp_path / "meta.json").write_text(json.dumps(rows))
    assert read(open_at(tmp_path))[1] == [
        "the image is an object, and none of its keys ('variant', 'size') names a photo"
    ]


def test_the_names_of_amazons_flat_files(tmp_path):
    rows = [(f"S{i}", title, name) for i, (name, title) in enumerate(pairs())]
    table = lines(rows, ("item_sku", "item_name", "main_image_url"), delimiter="\t")
    whole(opened(draw(tmp_path), table, "flatfile.txt"))
    above = "TemplateType=x\tVersion=1\tThe top 3 rows are for Amazon\nSKU\tProduct Name\tMain Image URL\n"
    assert "the columns are named on line 2" in refused(tmp_path, above + table, "flatfile.txt")
