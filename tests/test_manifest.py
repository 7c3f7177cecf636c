"""What a data set consists of, what has changed, and the kept scans of tars."""

import hashlib
import io
import json
import os
import shutil
import tarfile
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch.distributed as dist
from data_stub import (
    StubProcessor,
    add_member,
    encoded,
    photo,
    records,
    write_image_folder,
    write_json_list,
    write_parquet,
    write_tars,
)
from helpers import spawn
from http_stub import FileServer

from aliblip.data import parquet, remote, tar_index, tar_members
from aliblip.data.collate import Collator
from aliblip.data.loader import TrainLoader
from aliblip.data.manifest import file_names, manifest_changes
from aliblip.data.sources import open_source
from aliblip.runtime.mistakes import UsageError

COUNT = 11


def blake2(data):
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def rows_of(source):
    return [(row.row, row.image, row.text, row.product_id, row.name) for row in source.read_range(0, source.num_rows)]


# ----------------------------------------------------------------------------------------------------------- manifests


@pytest.fixture
def layouts(tmp_path):
    """The same products in every layout: name -> (arguments of open_source below a folder, files, rows of each)."""
    rows = records(COUNT)
    write_parquet(tmp_path / "parquet", rows, [5, 6], row_group_size=2)
    write_tars(tmp_path / "tars", rows, [4, 7])
    write_image_folder(tmp_path / "folder", rows)
    write_image_folder(tmp_path / "csv", rows, csv=True)
    write_json_list(tmp_path / "list", rows)
    parquet = [f"train-0000{i}-of-00002.parquet" for i in range(2)]
    return {
        "parquet": (lambda root: {"data_dir": f"{root}/parquet"}, parquet, [5, 6]),
        "glob": (lambda root: {"data_files": f"{root}/parquet/*.parquet"}, parquet, [5, 6]),
        "tars": (lambda root: {"data_dir": f"{root}/tars"}, ["train-00000.tar", "train-00001.tar"], [4, 7]),
        "folder": (lambda root: {"data_dir": f"{root}/folder"}, ["train/metadata.jsonl"], [COUNT]),
        "csv": (lambda root: {"dataset_name": f"{root}/csv"}, ["train/metadata.csv"], [COUNT]),
        "list": (
            lambda root: {"data_files": f"{root}/list/train.json", "image_dir": f"{root}/list/images"},
            ["train.json"],
            [COUNT],
        ),
    }


NAMES = ("parquet", "glob", "tars", "folder", "csv", "list")


@pytest.mark.parametrize("name", NAMES)
def test_the_manifest_of_every_layout(layouts, tmp_path, name):
    arguments, files, rows = layouts[name]
    source = open_source(split="train", **arguments(tmp_path))
    manifest = source.manifest()
    assert json.loads(json.dumps(manifest)) == manifest
    assert manifest["name"] == source.name and manifest["split"] == "train" and manifest["rows"] == COUNT
    assert manifest["columns"]["caption"] == "caption" and manifest["columns"]["product_id"] == "product_id"
    assert [entry["file"] for entry in manifest["files"]] == files
    assert [entry["rows"] for entry in manifest["files"]] == rows
    for entry, file in zip(manifest["files"], source.files, strict=True):
        data = Path(file.file).read_bytes()
        assert entry["size"] == len(data)
        if name in ("parquet", "glob"):
            assert entry["digest"] == blake2(data[-8 - int.from_bytes(data[-8:-4], "little") :])
        elif name != "tars":
            assert entry["digest"] == blake2(data)
    # A folder that moves, and files that are copied, are no change.
    assert manifest_changes(manifest, open_source(split="train", **arguments(tmp_path)).manifest()) == []
    moved = tmp_path.with_name(tmp_path.name + "-moved")
    shutil.copytree(tmp_path, moved)
    assert manifest_changes(manifest, open_source(split="train", **arguments(moved)).manifest()) == []
    (moved / "link").symlink_to(moved)
    assert manifest_changes(manifest, open_source(split="train", **arguments(moved / "link")).manifest()) == []


def test_a_relative_path_is_the_same_as_an_absolute_one(layouts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        relative = open_source(split="train", **layouts[name][0](".")).manifest()
        assert manifest_changes(relative, open_source(split="train", **layouts[name][0](tmp_path)).manifest()) == []


def test_a_footer_longer_than_the_first_look(layouts, tmp_path, monkeypatch):
    manifest = open_source(split="train", **layouts["parquet"][0](tmp_path)).manifest()
    for size in (8, 9, 100):
        monkeypatch.setattr(parquet, "TAIL_BYTES", size)
        assert open_source(split="train", **layouts["parquet"][0](tmp_path)).manifest() == manifest


def test_changes_of_real_files_are_named(layouts, tmp_path):
    def changes(name):
        return manifest_changes(before[name], open_source(split="train", **layouts[name][0](tmp_path)).manifest())

    before = {name: open_source(split="train", **layouts[name][0](tmp_path)).manifest() for name in NAMES}
    first = tmp_path / "parquet" / "train-00000-of-00002.parquet"
    table = pq.read_table(first)
    pq.write_table(table.slice(0, 3), first)
    assert changes("parquet") == [f"{first.name} has 3 rows, it had 5"]
    pq.write_table(table.set_column(1, "caption", [[text + "!" for text in table["caption"].to_pylist()]]), first)
    assert changes("parquet")[0].startswith(f"{first.name} has other content (")
    first.unlink()
    write_parquet(tmp_path / "parquet", records(2), [2], split="train-extra")
    assert changes("parquet") == [f"{first.name} is gone", "train-extra-00000-of-00001.parquet is new"]

    # A tar with other names of the same length, and the same tar written again.
    tar = tmp_path / "tars" / "train-00000.tar"
    data = tar.read_bytes()
    tar.write_bytes(data)
    assert changes("tars") == []
    with tarfile.open(tar) as old:
        members = [(member.name, old.extractfile(member).read()) for member in old]
    with tarfile.open(tar, "w") as new:
        for name, content in members:
            add_member(new, name.replace("p000", "q000"), content)
    assert changes("tars") == ["train-00000.tar has other content (same size)"]

    lines = tmp_path / "folder" / "train" / "metadata.jsonl"
    text = lines.read_text("utf-8")
    lines.write_text(text.replace("Tasche", "Gurtel"), "utf-8")
    assert changes("folder") == ["train/metadata.jsonl has other content (same size)"]
    lines.write_text(text.split("\n", 1)[1], "utf-8")
    assert changes("folder") == ["train/metadata.jsonl has 10 rows, it had 11"]
    for name in ("csv", "list"):
        file = open_source(split="train", **layouts[name][0](tmp_path)).files[0].file
        content = Path(file).read_text("utf-8")
        Path(file).write_text(content.replace("Tasche", "Sack"), "utf-8")
        (change,) = changes(name)
        size = os.path.getsize(file)
        assert change.endswith(f"has other content ({size:,} bytes, it had {size + 2 * COUNT:,})")
    # The photos themselves are not looked at, as the docstring says.
    before["list"] = open_source(split="train", **layouts["list"][0](tmp_path)).manifest()
    (tmp_path / "list" / "images" / "p000.png").unlink()
    assert changes("list") == []


def manifest_of(*files, split="train", **columns):
    entries = [{"file": name, "rows": rows, "size": size, "digest": digest} for name, rows, size, digest in files]
    chosen = {"image": "image", "caption": "title", "product_id": None, **columns}
    rows = sum(entry["rows"] for entry in entries)
    return {"name": "x", "split": split, "columns": chosen, "rows": rows, "files": entries}


def test_every_kind_of_change_is_a_plain_sentence():
    a, b, c = ("a.parquet", 1000, 5000, "aa"), ("b.parquet", 20, 700, "bb"), ("c.parquet", 30, 800, "cc")
    before = manifest_of(a, b)
    assert manifest_changes(before, before) == []
    assert manifest_changes(before, {**before, "name": "elsewhere"}) == []
    for now, expected in (
        (manifest_of(("a.parquet", 980, 4900, "dd"), b), ["a.parquet has 980 rows, it had 1,000"]),
        (manifest_of(a, ("b.parquet", 20, 1699, "bb")), ["b.parquet has other content (1,699 bytes, it had 700)"]),
        (manifest_of(a, ("b.parquet", 20, 700, "ee")), ["b.parquet has other content (same size)"]),
        (manifest_of(a), ["b.parquet is gone"]),
        (manifest_of(a, b, c), ["c.parquet is new"]),
        (manifest_of(a, c), ["b.parquet is gone", "c.parquet is new"]),
        (manifest_of(b, a), ["the files come in another order"]),
        (manifest_of(a, b, b), ["b.parquet is new"]),
        (manifest_of(a, b, caption="name"), ["the caption column was 'title', it is 'name'"]),
        (manifest_of(a, b, product_id="sku"), ["the product_id column was none, it is 'sku'"]),
        (manifest_of(a, b, split="test"), ["the split was 'train', it is 'test'"]),
    ):
        assert manifest_changes(before, now) == expected
    many = manifest_of(*((f"{i:02d}.tar", 1, 1, "x") for i in range(1200)))
    changes = manifest_changes(many, manifest_of(a))
    assert changes == [*(f"{i:02d}.tar is gone" for i in range(10)), "and 1,191 more"]


def test_names_of_files():
    assert file_names(["/a/b/c.tar", "/a/b/d/e.tar"], None) == ["c.tar", "d/e.tar"]
    assert file_names(["/a/b/c.tar"], None) == ["c.tar"]
    assert file_names(["/a/b/c.tar", "/a/d.tar"], "/a/b") == ["b/c.tar", "d.tar"]  # not all of them in the folder
    assert file_names(["/a/b/c.tar"], "/a") == ["b/c.tar"]
    remote = ["hf://datasets/shop/photos@0123abc/data/train.parquet", "https://host/a/b.tar", "s3://bucket/c.tar"]
    assert file_names(remote, None) == ["data/train.parquet", "https://host/a/b.tar", "s3://bucket/c.tar"]


# ---------------------------------------------------------------------------------------------------------- tar indexes


@pytest.fixture
def scans(monkeypatch):
    """The tars that were scanned."""
    seen, real = [], tar_index._scan

    def scan(file, size, wanted):
        seen.append(os.path.basename(file))
        return real(file, size, wanted)

    monkeypatch.setattr(tar_index, "_scan", scan)
    return seen


def open_tars(folder, **options):
    return open_source(data_dir=str(folder / "tars"), split="train", index_dir=str(folder / "index"), **options)


def test_a_tar_is_scanned_once(tmp_path, scans, monkeypatch):
    write_tars(tmp_path / "tars", records(COUNT), [4, 7])
    plain = open_source(data_dir=str(tmp_path / "tars"), split="train")
    assert sorted(scans) == ["train-00000.tar", "train-00001.tar"]
    scans.clear()
    first = open_tars(tmp_path)
    assert sorted(scans) == ["train-00000.tar", "train-00001.tar"]
    assert rows_of(first) == rows_of(plain) and first.manifest() == plain.manifest()
    assert first.columns == plain.columns
    # No header is read again, by whatever name the folder is called.
    monkeypatch.setattr(tar_members.tarfile, "TarFile", lambda *args, **kwargs: pytest.fail("a tar was scanned"))
    monkeypatch.chdir(tmp_path)
    for source in (open_tars(tmp_path), open_source(data_dir="tars", split="train", index_dir="index")):
        assert rows_of(source) == rows_of(plain) and manifest_changes(plain.manifest(), source.manifest()) == []
        assert source.columns == plain.columns


def test_a_changed_tar_is_scanned_again(tmp_path, scans):
    write_tars(tmp_path / "tars", records(COUNT), [4, 7])
    open_tars(tmp_path)
    scans.clear()
    tar = tmp_path / "tars" / "train-00001.tar"
    status = tar.stat()
    renamed = [{**record, "file": record["file"].replace("p", "q", 1)} for record in records(COUNT)]
    write_tars(tmp_path / "tars", renamed, [4, 7])
    assert tar.stat().st_size == status.st_size
    os.utime(tar.with_name("train-00000.tar"), ns=(0, 0))
    os.utime(tar, ns=(0, status.st_mtime_ns + 1_000_000))
    source = open_tars(tmp_path)
    assert sorted(scans) == ["train-00000.tar", "train-00001.tar"]
    assert [row[4] for row in rows_of(source)] == [f"q{i:03d}" for i in range(COUNT)]
    scans.clear()
    open_tars(tmp_path)
    assert not scans


def test_a_damaged_index_is_ignored_and_written_anew(tmp_path, scans):
    write_tars(tmp_path / "tars", records(COUNT), [COUNT])
    expected = rows_of(open_tars(tmp_path))
    (file,) = (tmp_path / "index").glob("*.safetensors")
    good = file.read_bytes()
    damaged = [good[:cut] for cut in range(0, len(good), 97)]
    for place in range(3, len(good), 61):
        damaged.append(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
    damaged += [b"", b"\xff" * 64, good + b"x", b"\x80\x04cos\nsystem\n(S'false'\ntR."]
    for data in damaged:
        file.write_bytes(data)
        scans.clear()
        assert rows_of(open_tars(tmp_path)) == expected
        assert rows_of(open_tars(tmp_path)) == expected
        assert scans == ["train-00000.tar"]  # the first time, and not the second


def test_odd_tars_have_an_index_too(tmp_path, scans):
    folder = tmp_path / "tars"
    folder.mkdir()
    with tarfile.open(folder / "train-0.tar", "w", encoding="latin-1") as tar:
        add_member(tar, "größe.png", encoded(photo(0)))  # names that are not UTF-8
        add_member(tar, "größe.txt", b"one")
        add_member(tar, "a\nb.png", encoded(photo(1)))
        add_member(tar, "a\nb.TXT", b"two")
        add_member(tar, "a\nb.txt", b"a second member of that name")
        add_member(tar, "README", b"no sample")
        tar.addfile(tarfile.TarInfo("folder.d/"))
        add_member(tar, "x" * 300 + ".png", encoded(photo(2)))  # a name with a header of its own
        add_member(tar, "x" * 300 + ".seg.txt", b"three")
    with tarfile.open(folder / "train-1.tar", "w"):
        pass  # no member at all
    plain = open_source(data_dir=str(folder), split="train")
    assert [len(index) for index in plain._indexes] == [3, 0]
    assert [row[2] for row in rows_of(plain)] == ["one", "two", None]
    for _ in range(2):
        assert rows_of(open_tars(tmp_path)) == rows_of(plain)
    assert len(scans) == 4


def test_a_scan_goes_on_where_the_connection_broke(tmp_path, monkeypatch):
    write_tars(tmp_path / "tars", records(COUNT), [COUNT])
    tar = tmp_path / "tars" / "train-00000.tar"
    wanted = tar_index._scan(str(tar), tar.stat().st_size, tar_members.Wanted())
    begins, reads = [], 0

    class Stream(io.FileIO):
        def __enter__(self):
            self.fresh = True
            return self

        def read(self, size=-1):
            nonlocal reads
            if self.fresh:
                begins.append(self.tell())
                self.fresh = False
            reads += 1
            if reads % 7 == 0 and reads < 40:
                raise ConnectionResetError("gone")
            return super().read(size)

    monkeypatch.setattr(remote, "WAITS", (0.001, 0.002, *[0.004] * 5))
    monkeypatch.setattr(tar_members, "open_file", lambda address: Stream(tar))
    index = tar_index._scan("http://localhost/train-00000.tar", tar.stat().st_size, tar_members.Wanted())
    assert index.digest == wanted.digest and len(index) == COUNT
    assert begins.pop(0) == 0  # is it compressed?
    assert len(begins) == 6 and begins == sorted(set(begins))  # each time further on


def _open_in_two_processes(folder):
    seen, real = [], tar_index._scan

    def slow(file, size, wanted):
        seen.append(os.path.basename(file))
        time.sleep(0.5)  # long enough for the other process to come by
        return real(file, size, wanted)

    tar_index._scan = slow
    dist.barrier()
    source = open_source(data_dir=f"{folder}/tars", split="train", index_dir=f"{folder}/index")
    return seen, source.manifest()


def test_two_processes_scan_each_tar_once(tmp_path):
    write_tars(tmp_path / "tars", records(COUNT), [4, 2, 5])
    (seen, manifest), (seen_too, manifest_too) = spawn(_open_in_two_processes, 2, str(tmp_path))
    assert sorted(seen + seen_too) == [f"train-0000{i}.tar" for i in range(3)]
    assert manifest == manifest_too == open_source(data_dir=str(tmp_path / "tars"), split="train").manifest()


def test_the_index_of_a_remote_tar_holds_as_long_as_its_etag(tmp_path, scans, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    write_tars(tmp_path / "tars", records(COUNT), [COUNT])
    tar = tmp_path / "tars" / "train-00000.tar"
    with FileServer(tmp_path) as server:
        options = {"data_files": f"{server.url}/tars/{tar.name}", "split": "train", "index_dir": str(tmp_path / "i")}
        expected = rows_of(open_source(**options))
        assert expected == rows_of(open_source(**options)) and len(scans) == 1
        tar.write_bytes(tar.read_bytes())  # another ETag of the same size
        os.utime(tar, ns=(0, 0))
        assert expected == rows_of(open_source(**options)) and len(scans) == 2


def test_an_index_folder_that_cant_be_written_is_one_line(tmp_path):
    write_tars(tmp_path / "tars", records(2), [2])
    (tmp_path / "index").write_text("a file")
    with pytest.raises(ValueError, match="index"):
        open_tars(tmp_path)


# --- files that change meanwhile --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["parquet", "tars", "folder", "csv", "list"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_is_replaced_after_it_was_opened_is_noticed(name, workers, layouts, tmp_path):
    arguments, files, _ = layouts[name]
    source = open_source(split="train", **arguments(tmp_path))
    loader = TrainLoader(
        source, Collator(StubProcessor()), batch_size=2, seed=0, rank=0, world_size=1, num_workers=workers
    )
    assert len(list(loader.epoch(0))) == 5
    (file,) = (path for path in (tmp_path / name).rglob(Path(files[-1]).name))
    changed = file.with_name("beside")
    changed.write_bytes(file.read_bytes())  # even of the same bytes: nobody has looked at them
    os.replace(changed, file)
    with pytest.raises(UsageError, match=f"{file.name} was replaced or changed after it was opened"):
        list(loader.epoch(1))
    assert len(list(open_source(split="train", **arguments(tmp_path)).read_range(0, COUNT))) == COUNT
