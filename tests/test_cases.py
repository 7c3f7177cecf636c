"""Folders as people have them: each gives all of its rows, or is refused with the cause and the way out.

The kinds of fault behind them are tested in test_folders.py, test_tables.py and test_cells.py.
"""

import gzip
import json
import re
import zipfile

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
    parquet,
    picture,
    read,
    records,
    tar,
    told,
    whole,
)

from aliblip.data.collate import Collator
from aliblip.data.loader import TrainLoader
from aliblip.data.manifest import manifest_changes
from aliblip.data.sources import Reading, require_usable_row
from aliblip.runtime.mistakes import UsageError

WHOLE = {}
REFUSED = {}


def gives_all(**options):
    def enter(drawing):
        WHOLE[drawing.__name__] = drawing, options
        return drawing

    return enter


def is_refused(words, **options):
    def enter(drawing):
        REFUSED[drawing.__name__] = drawing, options, words
        return drawing

    return enter


@gives_all()
def split_keyword_folder(folder):
    names = [*NAMES[:3], "wooden toy-train.png", *NAMES[4:7], "test tube rack.png", *NAMES[8:]]
    draw(folder, names)
    (folder / "metadata.csv").write_text(lines(pairs(names)))


@gives_all()
def train_sets(folder):
    draw(folder / "train sets")
    (folder / "train sets" / "metadata.csv").write_text(lines(pairs()))


@gives_all()
def split_keyword_parquet(folder):
    parquet(folder / "dolls.parquet", range(6))
    parquet(folder / "toy-train.parquet", range(6, 12))


@is_refused("metadata.jsonl holds rows that are in metadata.csv too")
def two_metadata(folder):
    draw(folder)
    (folder / "metadata.csv").write_text(lines(pairs()))
    (folder / "metadata.jsonl").write_text(json_lines(records("file_name")))


@is_refused("several kinds: 1 Parquet file .old.parquet. and 1 tar .new.tar.")
def mixed_shards(folder):
    tar(folder / "new.tar", range(6))
    parquet(folder / "old.parquet", range(6, 12))


@gives_all(image_dir="photos")
def csv_and_jsonl(folder):
    draw(folder / "photos")
    (folder / "a.csv").write_text(lines(pairs()[:6], ("image", "caption")))
    (folder / "b.jsonl").write_text(json_lines(records()[6:]))


@is_refused("line 7: text follows the quote that closes a field; 2 of 12 rows can't be read whole .lines 7, 9.")
def inch_quote(folder):
    draw(folder)
    text = ["file_name,caption", *(f"{name},{title}" for name, title in pairs())]
    text[6] = '05.png,"Pro" 12 inch pan, steel'
    text[8] = '07.png,"12 inch pan'
    text[11] = '10.png,lid" for pan'
    (folder / "metadata.csv").write_text("\n".join(text) + "\n")


@is_refused("line 2: it has 4 fields, the header has 2; 12 of 12 rows .* double quotes")
def unquoted_commas(folder):
    draw(folder)
    text = "".join(f"{name},Set of 2, {title}, dishwasher safe\n" for name, title in pairs())
    (folder / "metadata.csv").write_text(f"file_name,caption\n{text}")


@is_refused("styles.csv, line 2: it has 5 fields, the header has 4; 3 of 12 rows can't be read whole .lines 2, 7, 12.")
def kaggle_styles(folder):
    draw(folder / "images")
    rows = [f"{i},{n},{t}{', steel' if i % 5 == 0 else ''},Fall" for i, (n, t) in enumerate(pairs())]
    (folder / "styles.csv").write_text("\n".join(["id,file,productDisplayName,season", *rows]))


@is_refused("not in UTF-8 .line 2 is the first that is not.: --encoding cp1252 reads it as '.*café crème")
def cp1252(folder):
    draw(folder)
    (folder / "metadata.csv").write_bytes(lines((n, f"café crème {t} Größe 5") for n, t in pairs()).encode("cp1252"))


@gives_all()
def utf16(folder):
    draw(folder)
    (folder / "metadata.csv").write_bytes(lines(pairs()).encode("utf-16"))


@gives_all()
def semicolons(folder):
    draw(folder)
    (folder / "metadata.csv").write_text(lines(pairs(), delimiter=";"))


@gives_all()
def tab_csv(folder):
    draw(folder / "photos")
    rows = [(f"SKU{i}", title, name) for i, (name, title) in enumerate(pairs())]
    (folder / "feed.csv").write_text(lines(rows, ("id", "title", "image_link"), delimiter="\t"))


@gives_all()
def tsv(folder):
    tab_csv(folder)
    (folder / "feed.csv").rename(folder / "feed.tsv")


@gives_all()
def txt(folder):
    tab_csv(folder)
    (folder / "feed.csv").rename(folder / "feed.txt")


@gives_all()
def ndjson(folder):
    draw(folder / "photos")
    (folder / "all.ndjson").write_text(json_lines(records()))


@gives_all()
def gz(folder):
    draw(folder / "photos")
    (folder / "all.jsonl.gz").write_bytes(gzip.compress(json_lines(records()).encode()))


@gives_all()
def csv_gz(folder):
    draw(folder / "photos")
    (folder / "all.csv.gz").write_bytes(gzip.compress(lines(pairs(), ("image", "caption")).encode()))


@gives_all()
def disguised_tar(folder):
    (folder / "all.tar").write_bytes(gzip.compress(tar(folder.parent / "plain.tar", range(COUNT)).read_bytes()))


@gives_all(data_files="{part}.json")
def coco(folder):
    draw(folder / "val2017")
    photos = [{"id": i, "file_name": name} for i, name in enumerate(NAMES)]
    captions = [{"image_id": i, "id": i, "caption": title} for i, title in enumerate(TITLES)]
    (folder / "{part}.json").write_text(json.dumps({"info": {}, "images": photos, "annotations": captions}))


@gives_all()
def pretty(folder):
    draw(folder / "val2017")
    (folder / "pretty.json").write_text(json.dumps({"data": records()}, indent=1))


@gives_all(split="test")
def caption_lists(folder):
    photos = [{"bytes": picture(i), "path": name} for i, name in enumerate(NAMES)]
    table = pa.table({"image": photos, "caption": [[title] for title in TITLES], "sentids": [[1]] * COUNT})
    (folder / "data").mkdir()
    pq.write_table(table, folder / "data" / "TEST-00000-of-00001.parquet")


@gives_all()
def caption_json_text(folder):
    draw(folder)
    (folder / "captions.csv").write_text(lines(((n, json.dumps([t])) for n, t in pairs()), ("image", "raw")))


@gives_all()
def abo(folder):
    draw(folder / "images")
    listing = [
        {"item_id": n, "item_name": [{"language_tag": "en_US", "value": t}], "main_image_id": n} for n, t in pairs()
    ]
    (folder / "listings_0.json").write_text(json_lines(listing))


@gives_all()
def products_csv(folder):
    draw(folder / "photos")
    (folder / "products.csv").write_text(lines(pairs(), ("photo", "title")))


@gives_all()
def metadata_parquet(folder):
    draw(folder)
    pq.write_table(pa.table({"file_name": NAMES, "caption": TITLES}), folder / "metadata.parquet")


@gives_all(image_dir="photos")
def absolute_paths(folder):
    draw(folder / "photos")
    rows = [(str(folder / "photos" / name), title) for name, title in pairs()]
    (folder / "all.csv").write_text(lines(rows, ("filepath", "title")))


@gives_all(data_files="shard-{000..002}.tar")
def brace(folder):
    for number in range(3):
        tar(folder / f"shard-{number:03d}.tar", range(number * 4, number * 4 + 4))


@gives_all(below="shop [2024] *new")
def brackets(folder):
    draw(folder / "shop [2024] *new")
    (folder / "shop [2024] *new" / "metadata.csv").write_text(lines(pairs()))


@gives_all(below="shop [2024]")
def brackets_parquet(folder):
    parquet(folder / "shop [2024]" / "all.parquet", range(COUNT))


@gives_all()
def train_in_file_name(folder):
    for split in ("train", "validation"):
        draw(folder / split)
        rows = [{"file_name": f"{split}/{name}", "text": title} for name, title in pairs()]
        (folder / split / "metadata.jsonl").write_text(json_lines(rows))


@is_refused("none of the first 12 rows .* .00.png: the image file is missing: .*images.zip lies in .*: unpack it there")
def zip_photos(folder):
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for i, name in enumerate(NAMES):
            archive.writestr(name, picture(i))
    (folder / "metadata.jsonl").write_text(json_lines(records("file_name")))


@is_refused("b.parquet is empty .0 bytes.")
def zero_bytes(folder):
    parquet(folder / "a.parquet", range(6))
    (folder / "b.parquet").write_bytes(b"")


@gives_all()
def parquet_first_lacks_id(folder):
    parquet(folder / "a.parquet", range(6))
    parquet(folder / "b.parquet", range(6, 12), product_id=[f"P{i // 2}" for i in range(6)])


def open_case(folder, data_files=None, below=".", image_dir=None, **options):
    if data_files is not None:
        return open_at(data_files=str(folder / data_files), **options)
    return open_at(folder / below, image_dir=image_dir and str(folder / image_dir), **options)


@pytest.mark.parametrize("name", WHOLE)
def test_all_rows_are_read(tmp_path, name):
    drawing, options = WHOLE[name]
    (tmp_path / name).mkdir()
    drawing(tmp_path / name)
    source = open_case(tmp_path / name, **options)
    assert sorted(read(source)[0]) == all_rows() and not read(source)[1]
    assert source.num_rows == COUNT
    # what a run keeps of it says whether anything has changed, and an epoch can go on anywhere
    assert manifest_changes(source.manifest(), open_case(tmp_path / name, **options).manifest()) == []
    loader = TrainLoader(source, Collator(StubProcessor()), batch_size=4, seed=1, rank=0, world_size=1)
    batches = [batch["row"].tolist() for batch in loader.epoch(0)]
    assert sorted(np.concatenate(batches)) == list(range(COUNT))
    assert [batch["row"].tolist() for batch in loader.epoch(0, start_step=1)] == batches[1:]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_whole_is_refused_with_the_cause(tmp_path, name):
    drawing, options, words = REFUSED[name]
    (tmp_path / name).mkdir()
    drawing(tmp_path / name)
    with pytest.raises(UsageError, match=words) as caught:
        require_usable_row(open_case(tmp_path / name, **options))
    assert "\n" not in str(caught.value)
    for flag, value in re.findall(r"--(csv_quotes|encoding) (\w+)", str(caught.value)):  # whatever is advised works
        reading = Reading(**{flag.removeprefix("csv_"): value})
        assert open_case(tmp_path / name, **options, reading=reading).num_rows == COUNT


def test_thousands_of_lines_behind_a_quote(tmp_path):
    """Where the field was once too long to be read."""
    draw(tmp_path)
    names = [f"{i:05d}.png" for i in range(6000)]
    text = ["file_name,caption", *(f"{name},mug {i}" for i, name in enumerate(names))]
    text[2], text[6] = '00001.png,"a, b"', '00005.png,"12 inch pan'
    (tmp_path / "metadata.csv").write_text("\n".join(text))
    with pytest.raises(UsageError, match="line 7: a quote opens a field and is never closed"):
        open_at(tmp_path)
    text[2] = "00001.png,a"
    (tmp_path / "metadata.csv").write_text("\n".join(text))
    source = open_at(tmp_path)
    assert source.num_rows == 6000 and "quotes are text" in told(source)
    assert [row.text for row in source.read_range(5, 7)] == ['"12 inch pan', "mug 6"]


def test_columns_that_come_late(tmp_path):
    draw(tmp_path)
    rows = [{"file_name": NAMES[i % COUNT], "caption": f"mug {i}"} for i in range(1200)]
    for i in range(1000, 1200):
        rows[i]["product_id"] = i % 4
    (tmp_path / "metadata.jsonl").write_text(json_lines(rows))
    source = open_at(tmp_path)
    assert source.selected.product_id == "product_id"
    assert {row.product_id for row in source.read_range(1000, 1200)} == {0, 1, 2, 3}


def test_a_case_opened_whole_says_so(tmp_path):
    for name in ("semicolons", "utf16"):
        (tmp_path / name).mkdir()
        WHOLE[name][0](tmp_path / name)
        whole(open_at(tmp_path / name))
    assert "metadata.csv: commas, utf-16" in told(open_at(tmp_path / "utf16"))
    assert "metadata.csv: semicolons" in told(open_at(tmp_path / "semicolons"))
