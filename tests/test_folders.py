"""Every file of a folder is read, or it is named and counted with the reason; splits are what the folder says."""

import json
import os
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset_builder
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
from PIL import Image, PngImagePlugin

import reading_aliblip
from aliblip.data import folders
from aliblip.data.columns import ALL, Reading
from aliblip.data.folders import Survey
from aliblip.data.local import expanded
from aliblip.data.rows import decode
from aliblip.data.splits import splits_of
from aliblip.runtime.mistakes import UsageError


def refused(folder=None, **options) -> str:
    with pytest.raises(UsageError) as caught:
        open_at(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -------------------------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        # folders
        (["train/a.parquet", "validation/b.parquet"], {"train": 1, "validation": 1}),
        (["Train/a.csv", "VAL/b.csv", "testing/c.csv"], {"train": 1, "validation": 1, "test": 1}),
        (["shop/train/a.parquet", "toys/train/b.parquet", "shop/test/c.parquet"], {"train": 2, "test": 1}),
        (["train/test-tubes.parquet", "train/b.parquet"], {"train": 2}),
        # names
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"], {"train": 2}),
        (["TEST-00000-of-00001.parquet"], {"test": 1}),
        (["train.csv", "dev.csv", "test.csv"], {"train": 1, "validation": 1, "test": 1}),
        (["captions_train2014.json", "captions_val2014.json"], {"train": 1, "validation": 1}),
        (["toy_train_1.tar", "toy_train_2.tar", "toy_val_1.tar"], {"train": 2, "validation": 1}),
        (["a-train.csv", "a-test.csv", "b-train.csv", "b-test.csv"], {"train": 2, "test": 2}),
        (["toy-train.parquet", "doll-train.parquet"], {"train": 2}),
        # none
        (["a.parquet", "b.parquet"], {"train": 2}),
        (["dolls.parquet", "toy-train.parquet"], {"train": 2}),
        (["train sets/metadata.csv", "test tubes/metadata.csv"], {"train": 2}),
        (["latest.parquet", "contest.parquet", "trainers.parquet"], {"train": 3}),
        (["trains/a.csv", "a train.csv", "b.csv"], {"train": 3}),
        (["toys/train/metadata.csv", "toys/doll/metadata.csv"], {"train": 2}),
    ],
)
def test_splits_are_what_names_say_together(files, expected):
    found = splits_of(files, "train", "x")
    assert {split: len(members) for split, members in found.files.items()} == expected
    assert sorted(sum(found.files.values(), [])) == sorted(files) and not found.left


@pytest.mark.parametrize(
    "files",
    [
        ["toy-train.parquet", "test-tubes.parquet"],
        ["train.parquet", "test.parquet", "extra.parquet"],
        ["dolls.parquet", "crash-test.parquet"],
        ["a.csv", "test/b.csv"],
        ["train/a.parquet", "test/b.parquet", "c.parquet"],
    ],
)
def test_what_may_be_a_split_or_not_is_refused_by_name(files):
    with pytest.raises(UsageError, match="called as splits are .* a guess what to read: put the files into folders"):
        splits_of(files, "train", "x")


def test_a_split_of_any_name_that_is_asked_for():
    files = ["season1/a.csv", "season2/a.csv"]
    assert splits_of(files, "season1", "x").files == {"season1": files[:1]}
    assert splits_of(files, "season1", "x").left == ("season2/a.csv",)
    files = ["data/old-00000-of-00002.parquet", "data/old-00001-of-00002.parquet", "data/new-00000-of-00001.parquet"]
    assert splits_of(files, "old", "x").files == {"old": files[:2]}
    found = splits_of(["val.csv", "train.csv"], "val", "x")
    assert found.find("val") == found.find("validation") == "validation" and found.find("dev") is None


def test_no_split_of_that_name(tmp_path):
    parquet(tmp_path / "a.parquet", range(COUNT))
    assert "no split 'validation': there are 'train'; name the files of each split by flags" in refused(
        tmp_path, split="validation"
    )
    whole(open_at(tmp_path, split="validation", any_split=True))
    parquet(tmp_path / "two" / "train.parquet", range(6))
    parquet(tmp_path / "two" / "test.parquet", range(6, 12))
    assert "there are 'test', 'train'" in refused(tmp_path / "two", split="validation", any_split=True)
    source = open_at(tmp_path / "two", split="test")
    assert read(source)[0] == all_rows()[6:]
    assert "splits by file name: test (1), train (1)" in told(source)
    assert "left: files of the split 'train': 1 (train.parquet)" in told(source)


def test_tables_beside_data_with_splits_are_left(tmp_path):
    """As in a folder of one's own data: a tokenizer, settings, prices."""
    for split, rows in (("train", range(8)), ("validation", range(8, 12))):
        parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet", rows)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"image": 1, "text": 2}}}))
    (tmp_path / "tokenizer" / "vocab.txt").write_text("image\ntext\n")
    (tmp_path / "prices.csv").write_text("sku,price\n1,2\n")
    (tmp_path / "all.csv").write_text(lines(pairs()))
    source = open_at(tmp_path)
    assert read(source)[0] == all_rows()[:8]
    assert "left: files of no split: 1 (all.csv)" in told(source)
    left = "left: tables without photos and titles (name one by flags to read it): 2 "
    assert left + "(prices.csv, tokenizer/tokenizer.json)" in told(source)
    assert "left: text files without columns (" in told(source) and "): 1 (tokenizer/vocab.txt)" in told(source)


def test_configurations_of_a_read_me_are_followed(tmp_path):
    parquet(tmp_path / "b.parquet", range(6, 12))
    parquet(tmp_path / "a.parquet", range(6))
    front = "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: b.parquet\n"
    (tmp_path / "README.md").write_text(f"---\n{front}---\n")
    assert read(open_at(tmp_path))[0] == all_rows()[6:]


def test_files_come_in_the_order_that_they_always_had(tmp_path):
    """A checkpoint goes on only if the rows are the same in the same order."""
    sharded = [f"data/train-{i:05d}-of-00011.parquet" for i in (10, 2, 0)]
    for place, name in enumerate([*sharded, "data/validation-00000-of-00001.parquet"]):
        parquet(tmp_path / "sharded" / name, [place])
    names = ["train-00001.parquet", "more/train-1.parquet", "data-old/train-2.parquet", "data/train-2.parquet"]
    for place, name in enumerate([*names, "validation-0.parquet"]):
        parquet(tmp_path / "names" / name, [place])
    for place, name in enumerate(["train/b.parquet", "train/a/z.parquet", "train/B.parquet", "validation/a.parquet"]):
        parquet(tmp_path / "folders" / name, [place])
    for place, name in enumerate(["b.parquet", "a/z.parquet", "a-b.parquet", "B.parquet"]):
        parquet(tmp_path / "none" / name, [place])
    for folder in ("sharded", "names", "folders", "none"):
        expected = load_dataset_builder(str(tmp_path / folder)).config.data_files["train"]
        source = open_at(tmp_path / folder)
        assert [file.file for file in source.files] == [str(file) for file in expected], folder
    pattern = str(tmp_path / "names" / "**" / "*.parquet")
    expected = load_dataset_builder("parquet", data_files=pattern).config.data_files["train"]
    assert [file.file for file in open_at(data_files=pattern).files] == [str(file) for file in expected]


# ------------------------------------------------------------------------------------------------------ kinds of files


def test_data_of_several_kinds_is_refused_by_name(tmp_path):
    tar(tmp_path / "new.tar", range(6))
    parquet(tmp_path / "old.parquet", range(6, 12))
    message = refused(tmp_path)
    assert "1 Parquet file (old.parquet) and 1 tar (new.tar)" in message and "by flags" in message
    os.remove(tmp_path / "new.tar")
    (tmp_path / "more.csv").write_text(lines(pairs()))
    assert "1 Parquet file (old.parquet) and 1 table (more.csv)" in refused(tmp_path)


def test_tables_of_several_forms_are_one(tmp_path):
    draw(tmp_path)
    (tmp_path / "old.csv").write_text(lines(pairs()[:5], ("image", "caption")))
    (tmp_path / "new.jsonl").write_text(json_lines(records()[5:]))
    assert sorted(read(open_at(tmp_path))[0]) == all_rows()


def test_the_same_rows_in_two_tables_are_refused(tmp_path):
    draw(tmp_path)
    (tmp_path / "metadata.csv").write_text(lines(pairs()))
    (tmp_path / "metadata.jsonl").write_text(json_lines(records("file_name")))
    message = refused(tmp_path)
    assert (
        f"metadata.jsonl holds rows that are in metadata.csv too ({COUNT} of {COUNT}" in message and "keep" in message
    )
    # further titles of the same photos are other rows
    (tmp_path / "metadata.jsonl").write_text(json_lines(records("file_name", titles=[f"{t} again" for t in TITLES])))
    assert open_at(tmp_path).num_rows == 2 * COUNT
    # and so are equal names in other folders
    for place in ("a", "b"):
        draw(tmp_path / "two" / place)
        (tmp_path / "two" / place / "metadata.csv").write_text(lines(pairs()))
    assert open_at(tmp_path / "two").num_rows == 2 * COUNT


def test_tables_of_the_same_name_are_told_by_their_paths(tmp_path):
    draw(tmp_path / "a")
    (tmp_path / "a" / "metadata.csv").write_text(lines(pairs()))
    (tmp_path / "metadata.csv").write_text(lines((f"a/{name}", title) for name, title in pairs()))
    assert f"{tmp_path}/metadata.csv holds rows that are in {tmp_path}/a/metadata.csv too (12 of 12" in refused(
        tmp_path
    )


def test_copies_of_data_files_are_refused(tmp_path):
    parquet(tmp_path / "a.parquet", range(COUNT))
    shutil.copy(tmp_path / "a.parquet", tmp_path / "a (1).parquet")
    assert "a.parquet is a copy of" in refused(tmp_path)
    os.remove(tmp_path / "a (1).parquet")
    (tmp_path / "b.parquet").symlink_to(tmp_path / "a.parquet")
    assert "is a copy of" in refused(tmp_path)
    source = open_at(data_files=[str(tmp_path / "a.parquet"), str(tmp_path / "[a].parquet")])
    whole(source)
    assert "1 files are named more than once" in told(source)


@pytest.mark.parametrize(("name", "cause"), [("a.parquet", "empty"), ("a.tar", "empty"), ("a.csv", "empty")])
def test_empty_data_files_are_refused(tmp_path, name, cause):
    (tmp_path / name).write_bytes(b"")
    assert cause in refused(tmp_path) and name in refused(tmp_path)
    assert cause in refused(data_files=str(tmp_path / name))
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    assert "git lfs pull" in refused(tmp_path)


def test_archives_and_spreadsheets_say_what_to_do(tmp_path):
    for name, remedy in (
        ("a.zip", "unpack"),
        ("a.xlsx", "save"),
        ("a.tar.zst", "unpack"),
        ("a.arrow", "load_from_disk"),
    ):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_bytes(b"x" * 99)
        assert remedy in refused(folder) and name in refused(folder)
        draw(folder, NAMES[:1])  # beside photos, too
        assert remedy in refused(folder) and name in refused(folder)
        os.remove(folder / NAMES[0])
    assert "unpack" in refused(data_files=str(tmp_path / "a-zip" / "a.zip"))
    assert "CSV" in refused(data_files=str(tmp_path / "a-xlsx" / "a.xlsx"))
    assert "packed by zstd" in refused(data_files=str(tmp_path / "a-tar-zst" / "a.tar.zst"))
    (tmp_path / "tar").mkdir()
    (tmp_path / "tar" / "b.tar").write_bytes(b"\x1f\x8b" + b"x" * 99)
    assert "b.tar is not a readable tar (Unknown compression method): repair" in refused(tmp_path / "tar")
    tar(tmp_path / "a-tar-zst" / "b.tar", range(3))
    assert "a.tar.zst is a tar packed by zstd" in refused(tmp_path / "a-tar-zst")
    assert "is a file: give a folder" in refused(tmp_path / "a-zip" / "a.zip")


def test_side_files_of_img2dataset_are_told_from_data(tmp_path):
    for number in range(2):
        tar(tmp_path / "tars" / f"{number:05d}.tar", range(number * 6, number * 6 + 6))
        table = pa.table({"caption": TITLES, "url": ["http://x"] * COUNT, "key": TITLES, "status": ["success"] * COUNT})
        pq.write_table(table, tmp_path / "tars" / f"{number:05d}.parquet")
        (tmp_path / "tars" / f"{number:05d}_stats.json").write_text("{}")
    source = open_at(tmp_path / "tars")
    whole(source)
    assert "left: side files of img2dataset: 4 (00000.parquet" in told(source)
    # its format "files"
    folder = draw(tmp_path / "files" / "00000")
    for name, title in pairs():
        (folder / name.replace("png", "txt")).write_text(title)
        (folder / name.replace("png", "json")).write_text(json.dumps({"key": name, "width": 5}))
    pq.write_table(pa.table({"caption": TITLES, "key": TITLES}), tmp_path / "files" / "00000.parquet")
    source = open_at(tmp_path / "files", other_columns=["width"])
    whole(source)
    assert next(source.read(0)).others == {"width": 5}
    assert "12 photos with a text or JSON file of the same name" in told(source)
    assert "left: side files of img2dataset: 1 (00000.parquet)" in told(source)


def test_photos_with_texts_and_some_without(tmp_path):
    draw(tmp_path)
    for name, title in pairs()[:9]:
        (tmp_path / name.replace("png", "txt")).write_bytes(b"\xef\xbb\xbf" + title.encode() + b"\r\n")
    (tmp_path / "03.txt").write_bytes("größe".encode("cp1252"))
    source = open_at(tmp_path)
    found, reasons = read(source)
    assert found == [row for row in all_rows()[:9] if row[0] != 3]
    assert reasons == ["03.txt is not in utf-8 (--encoding tells another encoding)"]
    assert "3 photos without one are no rows" in told(source)
    assert (3, "größe") in read(open_at(tmp_path, reading=Reading(encoding="cp1252")))[0]
    # a single text that happens to have a photo's name is none of these
    os.makedirs(tmp_path / "plain")
    draw(tmp_path / "plain")
    (tmp_path / "plain" / "00.txt").write_text("a note")
    assert "no metadata.jsonl" in refused(tmp_path / "plain")


def test_captions_and_texts_beside_a_photo_are_two_columns(tmp_path):
    draw(tmp_path)
    for name, title in pairs():
        (tmp_path / name.replace("png", "caption")).write_text(title)
        (tmp_path / name.replace("png", "txt")).write_text(f"tags of {title}")
    source = open_at(tmp_path)
    whole(source)
    assert "the title is caption; txt as well" in told(source)
    assert next(open_at(tmp_path, caption_column="txt").read(0)).text == "tags of mug no 0"


def test_a_folder_that_is_named_as_a_file_gives_the_split_that_is_asked_for(tmp_path):
    parquet(tmp_path / "train.parquet", range(4))
    parquet(tmp_path / "validation.parquet", range(4, 7))
    source = open_at(data_files=str(tmp_path), split="validation")
    assert [number for number, _ in read(source)[0]] == [4, 5, 6]


# -------------------------------------------------------------------------------------------- photos, links, leftovers


@pytest.fixture
def without_heic(monkeypatch):
    """As where pillow-heif is not installed."""
    Image.init()
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)


def test_all_that_lies_in_a_folder_of_photos(tmp_path, without_heic):
    folder = draw(tmp_path / "photos", ["a.png", "b.JPG", "c", "d.jpg_640x640", "sub/e.png"])
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(400)
    for name in ("f.HEIC", "g.heif", "h"):
        (folder / name).write_bytes(heic)
    leftovers = {"i.jxl": b"\xff\x0a" + bytes(50), "j.svg": b"<svg/>", "k": b"nothing", "l.mp4": b"x", "m.part": b"x"}
    leftovers |= {"._a.png": b"\0\5", ".DS_Store": b"x", "Thumbs.db": b"x", ".hidden.png": picture(0), "n": b""}
    for name, data in leftovers.items():
        (folder / name).write_bytes(data)
    for name in ("@eaDir/a.png/SYNOPHOTO_THUMB_XL.jpg", ".thumbnails/a.png", "__MACOSX/a.png", ".git/b.png"):
        draw(folder, [name])
    other = draw(tmp_path / "nas", ["x.png"])
    (folder / "linked").symlink_to(other)
    (folder / "sub" / "round").symlink_to(folder)
    (folder / "gone").symlink_to(tmp_path / "nowhere")
    (folder / "itself").symlink_to("itself")
    (folder / "file.png").symlink_to(other / "x.png")
    os.mkfifo(folder / "pipe.jpg")
    source = open_at(folder, sides="images")
    names = [row.name for row in source.read_range(0, source.num_rows)]
    assert names == ["a.png", "b.JPG", "c", "d.jpg_640x640", "file.png", "linked/x.png", "sub/e.png"]
    assert read(source)[1] == []
    text = told(source)
    assert "found: 7 photos, " in text
    for line in (
        "makes them readable): 3 (f.HEIC, g.heif, h)",
        "drawings and raw photos (save them as JPEG or PNG to use them): 2 (i.jxl, j.svg)",
        "files of no known kind: 1 (k)",
        "videos and sound: 1 (l.mp4)",
        "unfinished downloads: 1 (m.part)",
        "files of the system, and thumbnails: 3 (.DS_Store, ._a.png, Thumbs.db)",
        "hidden files: 1 (.hidden.png)",
        "empty files: 1 (n)",
        "thumbnails and system folders: 3 (.thumbnails, @eaDir, __MACOSX)",
        "hidden folders: 1 (.git)",
        "links to folders that are read already: 1 (sub/round)",
        "broken links: 2 (gone, itself)",
        "devices and pipes: 1 (pipe.jpg)",
    ):
        assert line in text, text


def test_a_table_of_photos_and_titles_is_read_for_photos_alone_too(tmp_path):
    """A gallery of the folder that a model was trained on: the rows of its table, with their columns."""
    draw(tmp_path / "photos")
    lines = [f"photos/{name};a {name};{number}" for number, name in enumerate(NAMES)]
    (tmp_path / "products.csv").write_text("\n".join(["photo;title;sku", *lines]))
    (tmp_path / "visits.csv").write_text("day,visits\n1,2\n")
    source = open_at(tmp_path, sides="images", other_columns=ALL)
    assert [row.others for row in source.read_range(0, 2)] == [
        {"title": f"a {NAMES[n]}", "sku": str(n)} for n in range(2)
    ]
    assert "left: tables without photos and titles (name one by flags to read it): 1 (visits.csv)" in told(source)
    (tmp_path / "products.csv").unlink()
    assert open_at(tmp_path, sides="images").split == "all photos"


def test_a_linked_folder_counts_under_its_own_name(tmp_path):
    draw(tmp_path / "z")
    (tmp_path / "a").symlink_to(tmp_path / "z")
    source = open_at(tmp_path, sides="images")
    assert [row.name for row in source.read_range(0, COUNT)] == [f"z/{name}" for name in NAMES]
    assert "left: links to folders that are read already: 1 (a)" in told(source)


def test_heic_is_read_where_a_reader_is_registered(tmp_path, without_heic, monkeypatch):
    """With a stand-in for the reader that pillow-heif registers."""
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    draw(tmp_path, ["a.png"])
    (tmp_path / "b.heic").write_bytes(heic + picture(1))
    assert "b.heic" in told(open_at(tmp_path, sides="images"))
    with pytest.raises(reading_aliblip.UnusableItem, match="HEIC, which is read where pillow-heif is installed"):
        reading_aliblip.read_photo(str(tmp_path / "b.heic"))

    class Heic(PngImagePlugin.PngImageFile):
        format = "HEIF"

        def _open(self):
            self.fp.seek(len(heic))
            super()._open()

    monkeypatch.setitem(Image.OPEN, "HEIF", (Heic, lambda prefix: prefix[4:12] == b"ftypheic"))
    monkeypatch.setattr(Image, "ID", [*Image.ID, "HEIF"])
    assert read(open_at(tmp_path, sides="images")) == ([(0, None), (1, None)], [])


def test_photos_of_phones_are_upright(tmp_path):
    """With pillow-heif itself."""
    pytest.importorskip("pillow_heif", reason="pillow-heif is not installed (the extra heic)")
    image = Image.new("RGB", (64, 40), (200, 30, 30))
    image.paste((20, 20, 200), (0, 0, 64, 10))
    turned = Image.Exif()
    turned[274] = 6  # to be turned by a quarter, clockwise
    image.save(tmp_path / "a.heic", "HEIF", quality=95)
    image.save(tmp_path / "b.HEIF", "HEIF", quality=95, exif=turned.tobytes())
    (tmp_path / "c.heic").write_bytes((tmp_path / "a.heic").read_bytes()[:300])
    source = open_at(tmp_path, sides="images")
    assert source.num_rows == 3
    first, second, third = source.read_range(0, 3)
    first, second = decode(first, "images").image, decode(second, "images").image
    assert first.size == (64, 40) and first.getpixel((30, 3))[2] > 150 and first.getpixel((30, 30))[0] > 150
    assert second.size == (40, 64) and second.getpixel((37, 30))[2] > 150 and second.getpixel((5, 30))[0] > 150
    with pytest.raises(reading_aliblip.UnusableItem, match="HEIC and damaged"):
        decode(third, "images")


def test_photos_that_no_row_names_are_counted(tmp_path):
    draw(tmp_path)
    (tmp_path / "metadata.csv").write_text(lines(pairs()[:8]))
    source = open_at(tmp_path)
    assert source.num_rows == 8
    assert "left: photos that no row names: 4 (08.png, 09.png, 10.png, ...)" in told(source)
    assert "found: 1 table, 12 photos\n" in told(source)  # each file once
    for spelling in ("./{}", "sub/../{}", ".//{}", ".\\{}"):
        (tmp_path / "metadata.csv").write_text(lines((spelling.format(name), title) for name, title in pairs()))
        source = open_at(tmp_path)
        whole(source)
        assert "no row names" not in told(source), spelling
    (tmp_path / "metadata.csv").write_text(lines([*pairs(), ("99.png", "x"), ("98.png", "y")]))
    assert "2 photos that rows name are not in the folder" in told(open_at(tmp_path))


def test_only_photos_of_the_split_count(tmp_path):
    for split in ("train", "validation"):
        draw(tmp_path / split)
        (tmp_path / split / "metadata.csv").write_text(lines(pairs()))
    draw(tmp_path / "train", ["more.png"])
    assert "no row names: 1 (train/more.png)" in told(open_at(tmp_path))
    assert "found: 2 tables, 25 photos\n" in told(open_at(tmp_path))
    assert "no row names" not in told(open_at(tmp_path, split="validation"))


def test_photos_beside_parquet_and_tars_are_counted(tmp_path):
    parquet(tmp_path / "a.parquet", range(COUNT))
    draw(tmp_path / "photos")
    source = open_at(tmp_path)
    whole(source)
    assert f"left: photos beside rows that hold theirs: {COUNT} (photos/00.png" in told(source)


def test_other_tables_beside_metadata_are_left_by_name(tmp_path):
    draw(tmp_path)
    (tmp_path / "metadata.csv").write_text(lines(pairs()))
    (tmp_path / "prices.csv").write_text("sku,price\n1,2\n")
    source = open_at(tmp_path)
    whole(source)
    assert "left: files beside metadata.csv (name one by flags to read it instead): 1 (prices.csv)" in told(source)


def test_a_survey_of_many_photos_keeps_no_list_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "EXAMPLES", 2)
    draw(tmp_path, [f"{i % 7}/{i:04d}.png" for i in range(200)])
    survey = Survey.of(str(tmp_path))
    assert survey.num_photos == 200 == len(set(survey.photo_names()))
    assert len(set(survey.photo_names("3"))) == len(range(3, 200, 7))
    assert not [value for value in vars(survey).values() if isinstance(value, list) and len(value) > 7]


# ------------------------------------------------------------------------------------------------ names that are given


def test_braces_and_brackets(tmp_path):
    assert expanded("s-{000..002}.tar") == ["s-000.tar", "s-001.tar", "s-002.tar"]
    assert expanded("{a,b}/{9..11}") == ["a/9", "a/10", "a/11", "b/9", "b/10", "b/11"]
    assert expanded("{3..1}") == ["3", "2", "1"] and expanded("{x}.tar") == ["{x}.tar"] and expanded("a") == ["a"]
    for number in range(3):
        tar(tmp_path / f"shard-{number:03d}.tar", range(number * 4, number * 4 + 4))
    whole(open_at(data_files=str(tmp_path / "shard-{000..002}.tar")))
    assert "shard-003.tar, which does not exist" in refused(data_files=str(tmp_path / "shard-{000..003}.tar"))
    folder = draw(tmp_path / "shop [2024] *new? {1,2}")
    (folder / "metadata.csv").write_text(lines(pairs()))
    whole(open_at(folder))
    whole(open_at(data_files=str(folder / "metadata.csv")))
    parquet(folder / "p [1]" / "all.parquet", range(COUNT))
    whole(open_at(folder / "p [1]"))
    whole(open_at(data_files=str(folder / "p [1]" / "all.parquet")))
    whole(open_at(data_files=str(folder / "p [1]")))
    assert "matches no files" in refused(data_files=str(tmp_path / "none-*.tar"))


def test_files_without_an_ending_are_known_by_their_bytes(tmp_path):
    parquet(tmp_path / "part-00000", range(COUNT))
    (tmp_path / "_SUCCESS").write_bytes(b"")
    source = open_at(tmp_path)
    whole(source)
    assert "left: empty files: 1 (_SUCCESS)" in told(source)
    draw(tmp_path / "photos")
    (tmp_path / "photos" / "list").write_text(json.dumps(records()))
    whole(open_at(data_files=str(tmp_path / "photos" / "list")))
