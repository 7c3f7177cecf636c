"""Rows of tars: titles and product ids wherever they stand, kept indexes, compressed archives."""

import gzip
import hashlib
import json
import pickle
import re
import tarfile

import numpy as np
import pytest
from filelock import FileLock
from tars import (
    COUNT,
    LAYOUTS,
    PACKERS,
    PHOTOS,
    assert_pairs,
    json_of,
    opened,
    pairs,
    refusal,
    rows_of,
    tar_of,
    title,
    told,
)

from aliblip.data import tar_index
from aliblip.data.products import product_id_of, report
from aliblip.data.rows import decode
from aliblip.data.sources import Reading, open_source
from aliblip.data.tar_members import open_tar
from aliblip.runtime.mistakes import UsageError
from reading_aliblip import UnusableItem

# --------------------------------------------------------------------------------------------------- titles and columns


def test_titles_may_stand_in_several_places(tmp_path):
    members = []
    for i in range(COUNT):
        members.append((f"{i:03d}.jpg", PHOTOS[i]))
        if i % 4 != 3:
            members.append((f"{i:03d}.txt", title(i).encode() if i % 4 < 2 else b" "))
        members.append((f"{i:03d}.json", json_of(caption=title(i) if i % 4 > 1 else [None, ""][i % 2], width=64)))
    source = opened(tmp_path, tar_of(members))
    assert_pairs(source)
    assert "of a sample the first of 'caption', 'txt' that has a text is the title" in told(source)
    source = opened(tmp_path, tar_of(members), caption_column="txt")  # one that was named is the only one
    assert sum(row.text is not None and bool(row.text.strip()) for row in rows_of(source)) == 20
    for ending in ("title", "transcript", "text", "caption"):
        assert_pairs(opened(tmp_path, tar_of(pairs(LAYOUTS["versions"], title_ending=ending))))
    named = [("AB.1.jpg", PHOTOS[0]), ("AB.1.json", json_of(product_name=title(0))), ("AB.2.jpg", PHOTOS[1])]
    named += [("AB.2.json", json_of(product_name=title(1)))]
    assert_pairs(opened(tmp_path, tar_of(named), caption_column="product_name"), 2, ["AB.1", "AB.2"])


def test_a_column_that_is_called_like_a_title_will_do(tmp_path):
    members = []
    for i in range(COUNT):
        members += [(f"AB.{i}.jpg", PHOTOS[i]), (f"AB.{i}.json", json_of(id=i, productName=title(i)))]
    source = opened(tmp_path, tar_of(members))
    assert_pairs(source, names=[f"AB.{i}" for i in range(COUNT)])
    assert source.selected.caption == "productName"
    source = opened(tmp_path, tar_of(pairs(LAYOUTS["plain"], title_ending="en.txt")))
    assert_pairs(source)
    assert source.selected.caption == "en.txt"
    members = [(name.replace("productName", "alt"), data.replace(b"productName", b"alt")) for name, data in members]
    assert "there are 'jpg', 'json', 'id', 'alt'; name one with --caption_column" in refusal(tmp_path, tar_of(members))
    assert_pairs(opened(tmp_path, tar_of(members), caption_column="alt"))


@pytest.mark.parametrize("key", ["caption", "captions", "sentences"])
@pytest.mark.parametrize("packing", ["none", "gzip"])
def test_each_title_of_a_list_is_a_row(tmp_path, key, packing):
    members, expected = [], []
    for i in range(COUNT):
        titles = [f"{title(i)} {word}" for word in ("new", "used", "cheap")[: i % 4]] or [title(i)]
        stored = titles if i % 4 else titles[0]
        if key == "sentences":
            stored = [{"raw": text, "tokens": text.split()} for text in titles]
        members += [(f"{i:03d}.jpg", PHOTOS[i]), (f"{i:03d}.json", json_of(**{key: stored}, product_id=i // 2))]
        expected += [(f"{i:03d}", text, PHOTOS[i], i // 2) for text in titles]
    data = tar_of(members) if packing == "none" else PACKERS[packing](tar_of(members))
    source = opened(tmp_path, data)
    rows = rows_of(source)
    assert [(row.name, row.text, row.image, row.product_id) for row in rows] == expected
    assert [row.row for row in rows] == list(range(len(expected))) and source.files[0].rows == len(expected)
    for begin, end in ((0, 1), (2, 3), (3, 9), (10, 11), (25, len(expected))):
        assert list(source.read_range(begin, end)) == rows[begin:end]
    assert "each title is a row, 70 in all" in told(source)
    assert report(source).products == 20 and report(source).largest[0] == ("1", 5)
    assert opened(tmp_path, data, sides="images").num_rows == COUNT


def test_titles_in_other_encodings(tmp_path):
    titles = ["größe 3", "\ufeffgröße 3", "größe 3"]
    encodings = ["utf-8", "utf-8", "utf-16"]
    members = []
    for i, (text, encoding) in enumerate(zip(titles, encodings, strict=True)):
        members += [(f"{i}.jpg", PHOTOS[i]), (f"{i}.txt", text.encode(encoding))]
    data = tar_of([*members, ("3.jpg", PHOTOS[3]), ("3.txt", "größe 3".encode("cp1252"))])
    *good, bad = rows_of(opened(tmp_path, data))
    assert [row.text for row in good] == ["größe 3"] * 3
    with pytest.raises(UnusableItem, match="'txt' is not in utf-8"):
        decode(bad)
    rows = rows_of(opened(tmp_path, data, reading=Reading(encoding="cp1252")))
    assert rows[3].text == "größe 3"


def test_tars_of_img2dataset(tmp_path):
    for shard in range(3):
        members = []
        for i in range(shard * 10, shard * 10 + 10):
            key = f"{shard:05d}{i:04d}"
            about = json_of(caption=title(i), url="http://x", key=key, status="success", error_message=None, width=64)
            members += [(f"{key}.jpg", PHOTOS[i]), (f"{key}.json", about), (f"{key}.txt", title(i).encode())]
        (tmp_path / f"{shard:05d}.tar").write_bytes(tar_of(members))
    source = open_source(data_files=str(tmp_path / "*.tar"), split="train")
    assert_pairs(source, 30)
    assert {"url", "key", "status", "width"} <= set(source.columns)
    keys = open_source(data_files=str(tmp_path / "*.tar"), split="train", product_id_column="__key__")
    assert [row.product_id for row in rows_of(keys)] == [product_id_of(row.name) for row in rows_of(source)]
    assert (report(keys).products, report(keys).without) == (30, 0)


@pytest.mark.parametrize("as_json", [True, False])
def test_ids_that_come_late_in_any_tar(tmp_path, as_json):
    ids = [None] * 25 + [f"P{i // 2}" if i % 5 else "nan" for i in range(25, COUNT)]
    for shard in range(2):
        members = []
        for i in range(shard * 20, shard * 20 + 20):
            members += list(pairs([f"{i:03d}"], "png"))[1:] + [(f"{i:03d}.jpg", PHOTOS[i])]
            members[-2] = (f"{i:03d}.txt", title(i).encode())
            if as_json:
                members.append((f"{i:03d}.json", json_of(w=1) if ids[i] is None else json_of(product_id=ids[i])))
            elif ids[i] is not None:
                members.append((f"{i:03d}.product_id", ids[i].encode()))
        (tmp_path / f"{shard}.tar").write_bytes(tar_of(members))
    for options in ({}, {"product_id_column": "product_id"}, {"index_dir": str(tmp_path / "index")}):
        source = open_source(data_files=str(tmp_path / "*.tar"), split="train", **options)
        assert_pairs(source)
        rows, known = rows_of(source), [product_id_of(value) for value in ids]
        assert [row.product_id for row, value in zip(rows, known, strict=True) if value is not None] == [
            value for value in known if value is not None
        ]
        assert len({row.product_id for row in rows}) == len(set(known) - {None}) + known.count(None)
        found = report(source)
        assert (found.products, found.without) == (len(set(known) - {None}), known.count(None))
        assert dict(found.absent) == {"null": 25, "'nan'": 3} and found.largest[0] == ("'P13'", 2)
    with pytest.raises(UsageError, match="no column 'sku' .*'product_id'"):
        open_source(data_files=str(tmp_path / "*.tar"), split="train", product_id_column="sku")


def test_each_question_has_a_kept_index_of_its_own(tmp_path, monkeypatch):
    scans, real = [], tar_index._scan
    monkeypatch.setattr(tar_index, "_scan", lambda *args: scans.append(args) or real(*args))
    members = []
    for i in range(COUNT):
        about = json_of(caption=f"c{i}", name=title(i), product_id=i, sku=i // 2)
        members += [(f"A.{i}.jpg", PHOTOS[i]), (f"A.{i}.json", about)]
    (tmp_path / "shop.tar").write_bytes(tar_of(members))
    options = {"data_files": str(tmp_path / "shop.tar"), "split": "train", "index_dir": str(tmp_path / "index")}
    for _ in range(2):
        assert report(open_source(**options)).products == COUNT
        source = open_source(**options, caption_column="name", product_id_column="sku")
        assert_pairs(source)
        assert report(source).products == COUNT // 2
    assert len(scans) == 2


def test_who_looks_through_a_tar_already_is_waited_for_and_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tar_index, "TELL_AFTER_SECONDS", 0.05)
    monkeypatch.setattr(tar_index, "LONGEST_LOOK_SECONDS", 0.1)
    lock = str(tmp_path / "index.lock")
    with FileLock(lock), pytest.raises(UsageError, match=r"another process has held .*index.lock for"):  # noqa: SIM117
        with tar_index._alone(lock, "a.tar"):
            raise AssertionError("two at once")
    assert "waiting for another process that looks through a.tar" in capsys.readouterr().out
    with tar_index._alone(lock, "a.tar"):
        pass


def test_the_digest_of_a_tar_as_it_should_be_has_not_changed(tmp_path):
    """Or a run of an earlier version would not go on: by its rule a field begins at the first dot."""
    members = []
    for i in range(20):
        members += [(f"a/{i:03d}.jpg", PHOTOS[i]), (f"a/{i:03d}.seg.png", b"mask"), (f"a/{i:03d}.JSON", json_of(w=i))]
        members += [(f"a/{i:03d}.txt", title(i).encode())] + [(f"a/{i:03d}.cls", b"7")] * (i % 2)
    source = opened(tmp_path, tar_of(members))
    places = {name: [] for name in ("field", "key_ends", "keys", "length", "member_ends", "offset")}
    fields, keys = {}, {}
    with tarfile.open(tmp_path / "shop.tar") as tar:
        for number, member in enumerate(tar):
            key, field = re.match(r"(.*/[^.]+)[.](.*)", member.name).groups()
            keys[key] = number + 1
            places["field"].append(fields.setdefault(field.lower(), len(fields)))
            places["offset"].append(member.offset_data)
            places["length"].append(member.size)
    places["keys"], places["member_ends"] = list("".join(keys).encode()), list(keys.values())
    places["key_ends"] = np.cumsum([len(key) for key in keys])
    digest = hashlib.blake2b(json.dumps(list(fields)).encode(), digest_size=16)
    for name, values in places.items():
        values = np.array(values, dtype={"keys": np.uint8, "field": np.int32}.get(name, np.int64))
        digest.update(f"{name} {values.dtype}".encode())
        digest.update(values)
    assert source.manifest()["files"][0]["digest"] == digest.hexdigest()


# ------------------------------------------------------------------------------------------------------ compressed tars


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("order", ["sorted", "photos first"])
def test_compressed_tars_give_the_same_rows_in_any_part(tmp_path, packing, order, monkeypatch):
    monkeypatch.setattr("aliblip.data.webdataset.BLOCK_ROWS", 7)
    members = list(pairs(LAYOUTS["versions"]))
    if order == "photos first":
        members.sort(key=lambda member: member[0].endswith("txt"))
    plain = rows_of(opened(tmp_path, tar_of(members)))
    source = opened(tmp_path, PACKERS[packing](tar_of(members)))
    assert rows_of(source) == plain
    for begin, end in ((0, 3), (3, 9), (9, 40), (20, 30), (5, 6), (5, 6), (0, 40)):
        assert list(source.read_range(begin, end)) == plain[begin:end]
    next(iter(source.read_range(8, 20)))  # left half-read
    again = pickle.loads(pickle.dumps(source))
    assert rows_of(again) == rows_of(source) == plain
    assert "1 tar compressed" in told(source)


def test_compressed_tars_are_found_by_name_and_not_read_beside_their_unpacked_ones(tmp_path):
    members = list(pairs(LAYOUTS["plain"]))
    for name, packing, part in (("a.tar.gz", "gzip", members[:40]), ("b.tbz2", "bzip2", members[40:])):
        (tmp_path / name).write_bytes(PACKERS[packing](tar_of(part)))
    assert_pairs(open_source(data_dir=str(tmp_path), split="train"))
    (tmp_path / "b.tar").write_bytes(tar_of(members[40:]))
    source = open_source(data_dir=str(tmp_path), split="train")
    assert_pairs(source)
    assert "left: tars that lie unpacked beside them" in told(source) and "b.tbz2" in told(source)
    (tmp_path / "b.tar").rename(tmp_path / "b.tar.zst")
    with pytest.raises(UsageError, match="b.tar.zst is a tar packed by zstd, which is not read: unpack it"):
        open_source(data_files=str(tmp_path / "b.tar.zst"), split="train")


def test_reading_on_in_a_compressed_tar_does_not_start_again(tmp_path, monkeypatch):
    source = opened(tmp_path, gzip.compress(tar_of(pairs(LAYOUTS["plain"]))))
    opens = []
    monkeypatch.setattr("aliblip.data.webdataset.open_tar", lambda *args: opens.append(args) or open_tar(*args))
    for begin in range(0, COUNT, 4):
        assert len(list(source.read_range(begin, begin + 4))) == 4
    assert len(opens) == 1
    list(pickle.loads(pickle.dumps(source)).read_range(0, 4))  # another process has a stream of its own
    assert len(opens) == 2


def test_members_that_are_too_large_to_read_are_rows_with_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr("aliblip.data.webdataset.MAX_FILE_BYTES", 2**20)
    monkeypatch.setattr("aliblip.data.webdataset.MOST_TEXT_BYTES", 2**20)
    members = [*pairs(["000"]), ("001.jpg", bytes(2**20 + 1)), ("001.txt", b"t"), ("002.jpg", PHOTOS[0])]
    rows = rows_of(opened(tmp_path, tar_of([*members, ("002.txt", b"x" * (2**20 + 1))])))
    assert decode(rows[0]).text == title(0)
    for row in rows[1:]:
        with pytest.raises(UnusableItem, match="a member of 1,048,577 bytes is larger than 1 MiB"):
            decode(row)
