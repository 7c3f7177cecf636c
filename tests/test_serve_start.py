"""Starting the search page: from photos, galleries of several kinds, flags, variables, and mistakes."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shutil
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from helpers import run
from PIL import Image
from served import jpeg_size, make_model, needs_gradio

from aliblip import serve
from aliblip.data.sources import open_source
from aliblip.retrieval import building
from aliblip.retrieval.galleries import Gallery
from aliblip.retrieval.page_gallery import ChosenRows, is_gallery
from aliblip.retrieval.page_search import Searcher
from aliblip.runtime.mistakes import UsageError
from aliblip.serve import ServeArguments

pytestmark = needs_gradio
TITLES = tiny.titles(6, seed=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("start") / "model")


@pytest.fixture
def photos(model, tmp_path) -> SimpleNamespace:
    """Nine photos and a torn one, and the options that search them."""
    paths = [Path(path) for path in tiny.photos(tmp_path / "photos", 9)]
    (tmp_path / "photos" / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 torn")
    options = ServeArguments(
        model_name_or_path=str(model), gallery=str(tmp_path / "photos"), gallery_dir=str(tmp_path / "kept")
    )
    return SimpleNamespace(paths=paths, folder=tmp_path / "photos", kept=tmp_path / "kept", options=options)


def ids(searcher: Searcher) -> list:
    return searcher.gallery.values("id", limit=1000)


def files(folder: Path) -> dict:
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file() and file.suffix == ".lance"}


# --- photos -----------------------------------------------------------------------------------------------------------


def test_a_second_start_takes_the_kept_gallery_and_notices_other_photos(photos, model, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("ALIBLIP_MODEL_NAME_OR_PATH", str(model))
    monkeypatch.setenv("ALIBLIP_TOP_K", "7")
    options = serve.from_environment(dataclasses.replace(photos.options, model_name_or_path=None))
    assert (options.model_name_or_path, options.top_k, options.rerank) == (str(model), 7, 64)
    first = serve.open_searcher(options)
    told = capsys.readouterr().out
    assert "9 photos" in told and "unusable photos, left out: 1" in told
    assert "below the photos: the id; filters: none" in told and "can't be shown" not in told
    before, wanted = files(photos.kept), first.by_title(TITLES[3], 3, 6).results
    assert before
    second = serve.open_searcher(options)
    assert files(photos.kept) == before
    found = second.by_title(TITLES[3], 3, 6)
    assert [one["id"] for one in found.results] == [one["id"] for one in wanted]
    # The tiles have the photos' thumbnails.
    tiles = second.tiles(found)
    assert [jpeg_size(tile.photo) for tile in tiles] == [Image.open(photos.folder / one["id"]).size for one in wanted]
    assert [tile.lines for tile in tiles] == [[one["id"]] for one in wanted]
    tiny.photos(tmp_path / "others", 3)
    told = r"other photos than .*(new photos: 0, gone: 7).*--update_gallery embeds the new ones"
    with pytest.raises(UsageError, match=told.replace("(", r"\(").replace(")", r"\)")):
        serve.open_searcher(dataclasses.replace(options, gallery=str(tmp_path / "others")))


def test_a_kept_gallery_is_brought_up_to_date(photos, tmp_path, capsys, monkeypatch):
    aside = [path.rename(tmp_path / path.name) for path in photos.paths[6:]]
    assert len(serve.open_searcher(photos.options).gallery) == 6
    for path in aside[:2]:
        path.rename(photos.folder / path.name)
    (photos.folder / "torn.jpg").unlink()
    (photos.folder / "broken.jpg").write_bytes(b"torn")
    photos.paths[1].unlink()
    with pytest.raises(UsageError, match="new photos: 3, gone: 2"):
        serve.open_searcher(photos.options)
    capsys.readouterr()
    photos.options.update_gallery = True
    for told in (["updating", "new photos: 3, gone: 2", "rows inserted: 2", "broken.jpg"], []):  # then nothing is left
        searcher = serve.open_searcher(photos.options)
        printed = capsys.readouterr().out
        assert all(part in printed for part in told) and ("updating" in printed) == bool(told)
        assert ids(searcher) == [f"00{number}.png" for number in (0, 2, 3, 4, 5, 6, 7)]
        assert [entry["name"] for entry in searcher.gallery.skipped] == ["broken.jpg"]
    pipe, given = searcher.pipe, []
    monkeypatch.setattr(searcher, "pipe", lambda query, **options: given.append(query) or pipe(query, **options))
    found = searcher.by_photo(str(photos.folder / "006.png"), 1)
    assert given == [str(photos.folder / "006.png")]  # the file, and no decoded picture for each of many visitors
    assert found.results[0]["id"] == "006.png" and found.results[0]["itc"] == pytest.approx(1, abs=1e-5)
    assert searcher.gallery.photo(found.results[0]).size == (40, 30)
    photos.options.update_gallery = False
    assert len(serve.open_searcher(photos.options).by_title(TITLES[0], 7, 7).results) == 7


def test_a_start_that_was_interrupted_goes_on(photos, tmp_path, monkeypatch):
    """Twice; the third start embeds only what was not written."""
    tiny.photos(tmp_path / "many", 700)  # 22 units of 32 photos, eight to a block
    options = dataclasses.replace(photos.options, gallery=str(tmp_path / "many"))
    embedded, given = building.embedded_units, []

    def interrupted(model, loader, units, **options):
        given.append(list(units))
        for number, unit in enumerate(embedded(model, loader, units, **options)):
            if number == 9 and len(given) < 3:
                raise KeyboardInterrupt
            yield unit

    monkeypatch.setattr(building, "embedded_units", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            serve.open_searcher(options)
        assert is_gallery(str(photos.kept))
        with pytest.raises(UsageError, match="not built to its end"):
            Gallery.open(photos.kept)
    assert len(serve.open_searcher(options).gallery) == 700
    assert given == [list(range(22)), list(range(8, 22)), list(range(16, 22))]


def parquet(folder: Path, rows: int, **columns: list) -> Path:
    made = [Path(path).read_bytes() for path in tiny.photos(folder.with_name(f"{folder.name}-photos"), rows)]
    folder.mkdir()
    table = {"image": [{"bytes": data} for data in made], **columns}
    pq.write_table(pa.table(table), folder / "train.parquet")
    return folder


def test_photos_of_parquet_are_shown_with_their_columns(model, tmp_path, capsys):
    """Without a folder to keep the gallery in, it is there for this start only."""
    data = parquet(tmp_path / "data", 8, caption=tiny.titles(8), kind=["a", "b"] * 4, price=[1.5] * 8)
    searcher = serve.open_searcher(ServeArguments(model_name_or_path=str(model), gallery=str(data)))
    told = capsys.readouterr().out
    assert "below the photos: caption; filters: kind (2 values)" in told
    assert not Path(searcher.gallery.uri).is_relative_to(tmp_path)
    found = searcher.by_title(TITLES[0], 4, 8, {"kind": "a"})
    tiles = searcher.tiles(found)
    assert len(tiles) == 4 and all(tile.photo and tile.problem is None for tile in tiles)
    assert searcher.heading(found) == "4 of 8 photos with kind a, ordered by match logit + ITC similarity"
    assert [tile.lines for tile in tiles] == [[one["caption"]] for one in found.results]
    assert set(searcher.examples()) <= set(tiny.titles(8)) and len(searcher.examples()) == 5


def test_rows_of_parquet_are_compared_by_their_ids_or_counted(model, tmp_path, capsys):
    skus = [f"sku-{number}" for number in range(6)]
    data = parquet(tmp_path / "data", 6, sku=skus)
    options = ServeArguments(model_name_or_path=str(model), gallery=str(data), update_gallery=True)
    options.gallery_dir, options.id_column = str(tmp_path / "by-id"), "sku"
    assert ids(serve.open_searcher(options)) == skus
    numbered = dataclasses.replace(options, gallery_dir=str(tmp_path / "by-number"), id_column=None)
    assert ids(serve.open_searcher(numbered)) == list(range(6))
    shutil.rmtree(data)
    parquet(tmp_path / "more", 8, sku=["sku-x", *skus, "sku-y"]).rename(data)
    assert ids(serve.open_searcher(options)) == sorted([*skus, "sku-x", "sku-y"])
    assert "new photos: 2, gone: 0" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"was built of 6 rows, .* has 8 now.*--id_column"):
        serve.open_searcher(numbered)


def test_chosen_rows_are_those_of_the_source(tmp_path):
    tiny.photos(tmp_path / "photos", 9)
    source = open_source(data_dir=str(tmp_path / "photos"), split="train", any_split=True, sides="images")
    chosen = ChosenRows(source, [1, 2, 5, 8])
    rows = list(chosen.read_range(0, 4))
    assert [row.name for row in rows] == ["001.png", "002.png", "005.png", "008.png"]
    assert [row.row for row in rows] == [0, 1, 2, 3] and [chosen.row_of(row) for row in range(4)] == [1, 2, 5, 8]
    assert [row.name for row in chosen.read(0, 2, 3)] == ["005.png"] and chosen.num_rows == 4


# --- galleries --------------------------------------------------------------------------------------------------------


def built(model: Path, rows, folder: Path, **options) -> Gallery:
    loaded, processor, _ = serve.load_pretrained(str(model))
    return Gallery.build(rows, folder, model=loaded, processor=processor, **options)


def test_a_gallery_whose_photos_cannot_be_shown_says_so_at_the_start(model, tmp_path, capsys):
    paths = [Path(path) for path in tiny.photos(tmp_path / "photos", 4)]
    built(model, list(map(str, paths)), tmp_path / "gallery")
    for path in paths:
        path.rename(tmp_path / path.name)
    options = ServeArguments(model_name_or_path=str(model), gallery=str(tmp_path / "gallery"))
    searcher = serve.open_searcher(options)
    (told,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
    assert f"can't be shown: the image file is missing: {tmp_path / 'photos'}/" in told
    assert ".png. Build it with thumbnails (python -m aliblip.gallery --thumbnails" in told
    assert "--photo_root. Nor can titles be re-ranked without them." in told
    # The page answers all the same, by what needs no photo, and says so.
    found = searcher.by_title(TITLES[0], 3, 4)
    assert len(found.results) == 3 and not found.is_reranked
    assert searcher.heading(found).endswith("ordered by ITC similarity; not re-ranked, since a photo can't be read")
    assert [(tile.photo, tile.problem) for tile in searcher.tiles(found)] == [(None, "no photo: missing")] * 3
    assert searcher.examples() == []


def test_moved_photos_are_found_below_photo_root(model, tmp_path, capsys):
    tiny.photos(tmp_path / "photos", 4)
    source = open_source(data_dir=str(tmp_path / "photos"), split="train", any_split=True, sides="images")
    built(model, source, tmp_path / "gallery")
    (tmp_path / "photos").rename(tmp_path / "moved")
    options = ServeArguments(model_name_or_path=str(model), gallery=str(tmp_path / "gallery"))
    options.photo_root = str(tmp_path / "moved")
    searcher = serve.open_searcher(options)
    assert "note" not in capsys.readouterr().out
    assert all(tile.photo for tile in searcher.tiles(searcher.by_title(TITLES[0], 4, 4)))
    assert all(isinstance(example, bytes) for example in searcher.examples()) and len(searcher.examples()) == 4


def test_an_example_is_searched_for_and_no_other_number_is(photos):
    import gradio as gr

    from aliblip.retrieval.page_layout import _Page

    searcher = serve.open_searcher(photos.options)
    drawn = _Page(gr, searcher, 12, 64)
    assert len(drawn._examples) == 5  # photos, since their names are numbers

    def clicked(data) -> list:
        return drawn._show_example(SimpleNamespace(_data=data), 3, 8)

    tabs, title, photo, tiles, *_, asked = clicked({"example": 2})
    assert (tabs.selected, photo.size, asked) == ("photo", (40, 30), "photo")
    assert "1. 002.png" in tiles and "ordered by ITC similarity" in tiles
    drawn._examples = ["red cup", "blue shoe"]
    tabs, title, photo, tiles, *_, asked = clicked({"example": 1})
    assert (tabs.selected, title, asked) == ("title", "blue shoe", "title") and "match logit" in tiles
    for data in ({"example": 2}, {"example": -1}, {"example": "1"}, {"example": None}, {}, None, [1], "1"):
        assert clicked(data) == [gr.skip()] * 7


def test_galleries_that_the_page_cannot_search_are_refused(model, tmp_path):
    options = ServeArguments(model_name_or_path=str(model), gallery=str(tmp_path / "titles"))
    built(model, TITLES, tmp_path / "titles", kind="text")
    with pytest.raises(UsageError, match="holds titles, this page shows photos"):
        serve.open_searcher(options)
    vectors = torch.nn.functional.normalize(torch.randn(3, 16), dim=1).tolist()
    rows = pa.table({"id": ["a", "b", "c"], "vector": pa.array(vectors, pa.list_(pa.float32(), 16))})
    Gallery.from_vectors(rows, tmp_path / "other", model="f" * 32)
    with pytest.raises(UsageError, match="built with another model"):
        serve.open_searcher(dataclasses.replace(options, gallery=str(tmp_path / "other")))
    Gallery.from_vectors(rows, tmp_path / "own")
    for flag, told in (("show_columns", "--show_columns: the gallery has no column 'x'"), ("filter_columns", "'x'")):
        given = {flag: "x", "gallery": str(tmp_path / "own")}
        with pytest.raises(UsageError, match=told):
            serve.open_searcher(dataclasses.replace(options, **given))


def test_galleries_are_told_from_photos(tmp_path):
    (tmp_path / "photos" / "build").mkdir(parents=True)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "gallery.json").write_text("{}")
    assert not is_gallery(str(tmp_path / "photos"))
    assert all(map(is_gallery, ("s3://bucket/gallery", "me/gallery", str(tmp_path / "old"))))
    with pytest.raises(UsageError, match="version 0.1.*build it again"):
        Gallery.open(tmp_path / "old")


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model_name_or_path": None}, "--model_name_or_path is missing"),
        ({"gallery": None}, "--gallery is missing (or the variable ALIBLIP_GALLERY)"),
        ({"gallery": "/none/here"}, "--gallery: /none/here does not exist"),
        ({"gallery": __file__}, "is a file"),
        ({"top_k": 0}, "--top_k is 0: it must be from 1 to 100"),
        ({"rerank": 10_000}, "--rerank is 10000"),
        ({"server_port": 99_999}, "--server_port is 99999"),
        ({"max_upload_mb": 0}, "--max_upload_mb is 0"),
        ({"photo_root": "/none/here"}, "--photo_root"),
        ({"gallery": "me/gallery", "gallery_dir": "x"}, "--gallery_dir: me/gallery is a gallery already"),
        ({"gallery": "s3://b/g", "update_gallery": True}, "--update_gallery: s3://b/g is a gallery already"),
        ({"update_gallery": True}, "--update_gallery updates the gallery in --gallery_dir"),
        ({"photo_root": "."}, "--photo_root is for a gallery"),
        ({"gallery_dir": "s3://b/g"}, "--gallery_dir is the address s3://b/g: give a folder"),
        ({"storage_options": "{}"}, "--storage_options belong to a gallery at an address"),
        ({"gallery": "s3://b/g", "storage_options": "x"}, "--storage_options is not valid JSON"),
    ],
)
def test_bad_flags_are_told_before_anything_is_loaded(given, message, tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "load_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    fine = {"model_name_or_path": str(tmp_path), "gallery": str(tmp_path)}
    with pytest.raises(UsageError, match=re.escape(message)):
        serve.open_searcher(ServeArguments(**(fine | given)))


def test_a_place_where_the_page_can_not_listen_is_told_before_anything_is_loaded():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for options in ({"server_port": port}, {"server_name": "198.51.100.7"}):
            with pytest.raises(
                UsageError, match="can't start the server on .*: give another --server_port or --server_n"
            ):
                serve.check_address(ServeArguments(**options))
    serve.check_address(ServeArguments(server_port=port))


def test_without_gradio_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"needs Gradio: .*pip install.*\[serve\]"):
        serve.check(ServeArguments())


def test_a_mistake_is_one_line_and_a_fault_of_ours_keeps_its_traceback(photos, tmp_path):
    flags = ["--model_name_or_path", photos.options.model_name_or_path, "--gallery", tmp_path / "none"]
    mistake = run([sys.executable, "-m", "aliblip.serve", *flags])
    assert mistake.returncode == 2 and len(mistake.stderr.splitlines()) == 1
    assert mistake.stderr.startswith("aliblip.serve: error: --gallery: ")
    planted = "import sys; from aliblip import serve\n"
    planted += "def check(options): raise ValueError('planted')\n"
    planted += "serve.check = check; serve.main_with_usage_errors('aliblip.serve', serve.main)"
    fault = run([sys.executable, "-c", planted, *flags])
    assert fault.returncode == 1 and "Traceback" in fault.stderr and "planted" in fault.stderr


def test_what_goes_wrong_in_a_search_is_logged_and_not_told(photos, caplog):
    """A visitor reads that it failed, not why: the reason may name places of the server."""
    from aliblip.retrieval.page_layout import FAILED, _Page

    searcher = serve.open_searcher(photos.options)
    import gradio as gr

    drawn = _Page(gr, searcher, 12, 64)

    def broken(*_, **__):
        raise OSError("/srv/secret/gallery is gone")

    searcher.pipe = broken
    shown, *_ = drawn._show_by_title("red cup", 5, 8)
    assert FAILED.replace("'", "&#x27;") in shown and "secret" not in shown
    with pytest.raises(gr.Error) as error:
        drawn.search_by_title("red cup", 5, 8)
    assert error.value.message == FAILED
    assert caplog.text.count("a search failed\nTraceback") == 2 and "gallery is gone" in caplog.text
