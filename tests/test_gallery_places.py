"""A stored gallery in other places: copies, the Hub, an object store; what is believed of it; and damaged files."""

import json
import os
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import gallery_case as case
import hub_stub
import lance
import pytest
import s3_stub
import torch
from gallery_case import build, unit_vectors, vector_table
from helpers import ROOT, assert_succeeded, run
from huggingface_hub import constants
from huggingface_hub.utils import _http, enable_progress_bars

from aliblip import Gallery
from aliblip.retrieval import sharing
from aliblip.runtime.mistakes import UsageError
from encoder_aliblip import Encoder
from reading_aliblip import UnusableItem


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return case.photos(tmp_path_factory.mktemp("gallery") / "photos")


@pytest.fixture(scope="module")
def built(paths, tmp_path_factory):
    place = tmp_path_factory.mktemp("gallery") / "built"
    gallery = build(case.rows_of(paths), place, store_tokens=True, thumbnails=24)
    gallery.remove(["sku-2"])
    gallery.create_index("IVF_FLAT", columns=["price"], quiet=True)
    return gallery


def same_rows(one, other):
    assert one._now().dataset.to_table().equals(other._now().dataset.to_table())


# --- the Hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """This process takes a hub on loopback for the Hub, with a token that may write, and never waits."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a protocol of its own, in native code
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent")
    monkeypatch.setenv("HF_TOKEN", hub_stub.TOKEN)
    monkeypatch.setattr(sharing, "retried", lambda call, what: hub_retried(call, what))
    monkeypatch.setattr(_http, "time", SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None}))
    with hub_stub.Hub() as made:
        monkeypatch.setattr(constants, "ENDPOINT", made.url)
        yield made
    enable_progress_bars()


def hub_retried(call, what):
    from aliblip.runtime.retries import retried

    return retried(call, (0.0, 0.0, 0.0), what=what)


OPENED = """
import sys
import torch
from aliblip import Gallery
from aliblip.runtime.mistakes import UsageError

gallery = Gallery.open("me/gallery", photo_root=sys.argv[2])
table = gallery._now().dataset.to_table()
told = []
for change in (lambda: gallery.remove(["sku-1"]), gallery.optimize, lambda: gallery.create_index("IVF_FLAT")):
    try:
        change()
    except UsageError as error:
        told.append(str(error))
copy = gallery.save(sys.argv[3])
copy.remove(["sku-1"])
found = {
    "table": table.to_pylist(), "foreign": gallery.is_foreign, "index": gallery.has_index, "told": told,
    "skipped": gallery.skipped, "size": gallery.photo(gallery.get(["sku-0"])[0]).size, "rows": len(copy),
}
torch.save(found, sys.argv[1])
"""


def test_a_gallery_goes_up_and_comes_back_distrusted(hub, built, paths, tmp_path):
    hub.faults.append(("/commit/", 503))
    for _ in range(2):
        address = built.push_to_hub("me/gallery", private=True)
        assert address.startswith(f"{hub.url}/") and hub.private["me/gallery"]
        stored = hub.commits["me/gallery"][-1]
        folders = {name.split("/")[0] for name in stored}
        assert folders == {"items.lance", "skipped.lance", "README.md", ".gitattributes"}
        card = stored["README.md"].decode()
        assert "19 photos" in card and 'Gallery.open("me/gallery")' in card and "`price` (double)" in card
        assert len([name for name in stored if name.startswith("items.lance/_versions/") and "manifest" in name]) == 1
        assert built._now().photo_root == os.getcwd()
        assert not any(os.getcwd().encode() in data for data in stored.values())  # a folder of this machine
    env = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    env |= {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    arguments = [tmp_path / "found.pt", Path(paths[0]).parent, tmp_path / "copy"]
    assert_succeeded(run([sys.executable, "-c", OPENED, *arguments], env=env, cwd=tmp_path))
    found = torch.load(tmp_path / "found.pt", weights_only=False)
    assert found["table"] == built._now().dataset.to_table().to_pylist()
    assert found["foreign"] and found["index"] and found["skipped"] == built.skipped and found["rows"] == 18
    assert len(found["told"]) == 3 and all(
        "a gallery from the Hub can't be changed: save it" in t for t in found["told"]
    )
    assert found["size"] == (24, 18)  # a thumbnail, which is in the table
    # and the copy, in a folder of this machine, is no more trusted than the gallery from the Hub
    copy = Gallery.open(tmp_path / "copy")
    assert copy.is_foreign and pickle_again(copy).is_foreign and copy.save(tmp_path / "copy of it").is_foreign
    with pytest.raises(UnusableItem, match="reads photos only from its photo_root"):
        copy.photo_path({"path": paths[0]})
    upserted = {**case.rows_of(paths)[3], "price": 7.0}
    copy.upsert([upserted], model=case.model_and_processor()[0], processor=case.model_and_processor()[1])
    assert Gallery.open(tmp_path / "copy").is_foreign


def pickle_again(gallery):
    import pickle

    return pickle.loads(pickle.dumps(gallery))


def test_names_that_the_hub_does_not_have(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="me/other is neither a folder nor a data set that the Hub gives"):
        Gallery.open("me/other")  # conftest forbids the Hub
    with pytest.raises(UsageError, match="'my gallery' is no name of the Hub"):
        Gallery.from_hub("my gallery")
    Path("me").mkdir()
    Gallery.from_vectors(vector_table(unit_vectors(2)), "me/here")
    assert not Gallery.open("me/here").is_foreign  # a folder wins


def test_a_table_that_names_files_elsewhere_is_not_opened(built, tmp_path, monkeypatch):
    copy = built.save(tmp_path / "copy")
    base = lance.DatasetBasePath(str(tmp_path / "elsewhere"), name="elsewhere")
    copy._now().dataset.add_bases([base])
    monkeypatch.setattr(sharing, "snapshot_download", lambda name, **options: str(tmp_path / "copy"))
    with pytest.raises(UsageError, match="names files outside of its own folder: it is not opened"):
        Gallery.open("me/gallery")


def test_facts_that_do_not_fit_the_table_are_refused(built, tmp_path):
    facts = built._now().facts
    changes = (
        ({"kind": "video"}, "is damaged .kind 'video'"),
        ({"width": 8}, "is damaged .kind 'image', width 8"),
        ({"token_shape": [1, 2]}, "is damaged .image tokens of the type"),
        ({"columns": ["colour"]}, "the columns colour are not those of the table"),
        ({"columns": ["vector"]}, "the columns of the data are not those"),
        ({"columns": [["price"]]}, "columns is "),
        ({"token_shape": [-1, -544]}, "is damaged .image tokens of the type"),
        ({"model": {"a": 1}}, "model is {'a': 1}"),
        ({"thumbnail_side": "x"}, "thumbnail_side is 'x'"),
        ({"thumbnail_side": 10**9}, "thumbnail_side is 1000000000"),
        ({"renamed": {"price": 5}}, "renamed is "),
        ({"ids": "x"}, "ids is 'x'"),
        ({"index": 7}, "is damaged"),
        ({"format": 9}, "has the format 9, this code reads 2"),
    )
    for number, (change, message) in enumerate(changes):
        copy = built.save(tmp_path / str(number))
        copy._now().dataset.update_schema_metadata({"aliblip": json.dumps({**facts.as_json(), **change})})
        with pytest.raises(UsageError, match=message):
            Gallery.open(copy.uri)
    lance.dataset(f"{copy.uri}/items.lance").update_schema_metadata({"aliblip": "no JSON"})
    with pytest.raises(UsageError, match="is damaged"):
        Gallery.open(copy.uri)


def test_photos_are_read_from_where_they_may_be(paths, tmp_path, monkeypatch):
    """A gallery from the Hub names what its maker likes: no file or address of this machine is opened for it."""
    gallery = Gallery.from_vectors(vector_table(unit_vectors(1)), tmp_path / "g")
    for foreign, root, path, wanted in (
        (False, None, "a.png", "a.png"),
        (False, None, "/x/a.png", "/x/a.png"),
        (False, "root", "sub/a.png", "root/sub/a.png"),
        (False, "root", "http://x/a.png", "http://x/a.png"),
        (False, "root", "../a.png", None),
        (False, "root", "sub/../../a.png", None),
        (True, "root", "sub/../a.png", "root/sub/../a.png"),
        (True, "root", "../a.png", None),
        (True, "root", "/x/a.png", None),
        (True, "root", "http://x/a.png", None),
        (True, None, "a.png", None),
    ):
        gallery._from_hub, gallery.photo_root = foreign, root
        for one in (gallery, gallery.snapshot(), pickle_again(gallery)):
            if wanted is None:
                with pytest.raises(UnusableItem, match="photo_root"):
                    one.photo_path({"path": path})
            else:
                assert one.photo_path({"path": path}) == wanted
    assert gallery.photo_path({"id": 3}) is None
    build(paths[:3], tmp_path / "hub")
    monkeypatch.setattr(sharing, "snapshot_download", lambda name, **options: str(tmp_path / "hub"))
    foreign = Gallery.open("me/mine")
    with pytest.raises(UsageError, match="000.png: a gallery from the Hub reads photos only from its photo_root"):
        foreign.image_tokens(foreign.get([paths[0]]), Encoder(*case.model_and_processor()))


SNAPSHOT = f"datasets--me--mine/snapshots/{'1a' * 20}"


@pytest.mark.parametrize(
    ("place", "mark"),
    [
        (SNAPSHOT, None),
        (f"{SNAPSHOT}/in/it", None),
        ("by hand", "by hand/.cache/huggingface"),
        ("by hand/in/it", "by hand/.cache/huggingface/download/in/it"),
    ],
)
def test_what_was_downloaded_is_distrusted_by_its_place_whatever_it_says_of_itself(built, paths, tmp_path, place, mark):
    assert not built.is_foreign
    folder = Path(shutil.copytree(built.uri, tmp_path / place))
    if mark is not None:
        (tmp_path / mark).mkdir(parents=True)
    gallery = Gallery.open(folder)
    for one in (gallery, gallery.snapshot(), pickle_again(gallery), gallery.save(tmp_path / "copy")):
        assert one.is_foreign
        with pytest.raises(UnusableItem, match="reads photos only from its photo_root"):
            one.photo_path({"path": paths[0]})
    assert Gallery.open(tmp_path / "copy").is_foreign and not Gallery.open(built.uri).is_foreign


@pytest.mark.parametrize("place", ["hub", "download/photos"])
def test_what_is_made_beside_a_download_or_below_a_home_folder_is_ones_own(built, tmp_path, place):
    (tmp_path / ".cache" / "huggingface" / place).mkdir(parents=True)
    assert not Gallery.open(shutil.copytree(built.uri, tmp_path / "galleries" / "mine")).is_foreign


# --- copies -----------------------------------------------------------------------------------------------------------


def test_a_copy_is_equal_and_goes_its_own_way(built, tmp_path):
    copy = built.save(tmp_path / "new" / "copy")
    same_rows(copy, built)
    assert copy.has_index and copy.skipped == built.skipped and not copy.is_foreign
    assert len(copy.versions()) == 1 and copy._now().facts == built._now().facts
    copy.remove(["sku-3"])
    assert len(copy) == len(built) - 1
    assert sorted(os.listdir(tmp_path / "new")) == ["copy"]
    old = Gallery.open(built.uri, version=built.versions()[0]["version"]).save(tmp_path / "old")
    assert len(old) == len(built) + 1
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    for place, message in (
        (tmp_path / "full", "holds something else"),
        (copy.uri, "holds a gallery: give a new place"),
    ):
        with pytest.raises(UsageError, match=message):
            built.save(place)


def test_a_copy_that_fails_leaves_nothing(built, tmp_path, monkeypatch):
    monkeypatch.setattr(sharing, "read_skipped", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        built.save(tmp_path / "copy")
    assert os.listdir(tmp_path) == []


def test_lancedb_opens_the_same_table(built):
    lancedb = pytest.importorskip("lancedb", reason="lancedb is not installed")
    assert lancedb.connect(built.uri).open_table("items").count_rows() == len(built)
    table = built.table
    assert table.count_rows() == len(built) and table.schema.names == built.schema.names
    query = unit_vectors(1)[0].numpy()
    found = table.search(query).distance_type("dot").bypass_vector_index().where("price < 9", prefilter=True).limit(3)
    wanted = built.search(torch.from_numpy(query), 3, where="price < 9", approximate=False)[0]
    assert [row["id"] for row in found.to_list()] == [hit["id"] for hit in wanted]


# --- files that are damaged -------------------------------------------------------------------------------------------


def test_damaged_files_are_told_and_never_answer_wrongly(paths, tmp_path):
    gallery = build(case.rows_of(paths), tmp_path / "g")
    query = unit_vectors(1)
    expected = gallery.search(query, 9)
    folder = tmp_path / "g" / "items.lance"
    files = [path for path in (*folder.glob("data/*"), *folder.glob("_versions/*.manifest"))]
    for path in files:
        data = path.read_bytes()
        for broken in (data[: len(data) // 2], b"", data[:-40]):
            path.write_bytes(broken)
            try:
                found = Gallery.open(tmp_path / "g").search(query, 9)
            except UsageError as error:  # a line, not a traceback of the library
                assert "\n" not in str(error) and ".rs:" not in str(error)
                continue
            assert found == expected  # an older manifest than the newest one
        path.write_bytes(data)
    assert Gallery.open(tmp_path / "g").search(query, 9) == expected


# --- an object store --------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket():
    with s3_stub.ObjectStore() as store:
        yield store


def test_the_same_at_an_address(bucket, paths, built, tmp_path):
    uri, options = "s3://bucket/galleries/mine", bucket.storage_options
    settings = {"storage_options": options, "parts_dir": tmp_path / "parts", "store_tokens": True, "thumbnails": 24}
    gallery = build(case.rows_of(paths), uri, **settings)
    expected = build(case.rows_of(paths), tmp_path / "expected", store_tokens=True, thumbnails=24)
    same_rows(gallery, expected)
    assert gallery.skipped == expected.skipped and not (tmp_path / "parts").exists()
    query = unit_vectors(1)
    assert gallery.search(query, 5, where="price < 9") == expected.search(query, 5, where="price < 9")
    for one in (gallery, expected):
        one.remove(["sku-0"])
        one.upsert_vectors(vector_table(unit_vectors(2, seed=3), ["sku-1", "new"]))
        one.create_index("IVF_FLAT", columns=["price"], quiet=True)
        one.optimize()
    follower = Gallery.open(uri, storage_options=options)
    assert follower.search(query, 5) == expected.search(query, 5) == pickle_again(gallery).search(query, 5)
    assert len(follower) == len(expected)
    with pytest.raises(UsageError, match="holds a gallery: give a new place"):
        build(case.rows_of(paths), uri, **settings)
    with pytest.raises(UsageError, match="s3://bucket/nothing is no gallery"):
        Gallery.open("s3://bucket/nothing", storage_options=options)
    same_rows(built.save("s3://bucket/copy", storage_options=options), built)
    same_rows(gallery.save(tmp_path / "copy"), gallery)


def test_a_place_that_can_not_be_reached(bucket):
    options = {**bucket.storage_options, "endpoint": "http://127.0.0.1:9", "client_max_retries": "0"}
    with pytest.raises(UsageError, match="the gallery s3://bucket/g can't be opened: ") as raised:
        Gallery.open("s3://bucket/g", storage_options=options)
    assert "\n" not in str(raised.value) and "/rust/" not in str(raised.value)
