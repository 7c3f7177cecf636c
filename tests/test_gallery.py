"""The gallery: equal to the engine's search, whatever it was built from, however often the build was killed."""

import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hostile
import numpy as np
import pytest
import storage_aliblip
import tiny
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from helpers import ROOT, assert_succeeded, launch, run_forked, spawn
from PIL import Image

import gallery_aliblip
import retrieval_aliblip as engine
from aliblip.data.rows import Row, decode
from aliblip.gallery import main
from aliblip.retrieval.galleries import build_gallery
from aliblip.runtime.mistakes import UsageError
from encoder_aliblip import Encoder, fingerprint
from gallery_aliblip import Gallery
from modeling_aliblip import AliBlipForImageTextRetrieval
from processing_aliblip import AliBlipProcessor
from reading_aliblip import UnusableItem

COUNT, BROKEN = 21, 5
UNITS = {"unit_size": 4, "batch_size": 3, "progress": False}


@pytest.fixture(scope="module")
def model():
    return tiny.spread_model()


@pytest.fixture(scope="module")
def processor():
    return tiny.processor()


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    made = tiny.photos(tmp_path_factory.mktemp("gallery") / "photos", COUNT)
    with open(made[BROKEN], "wb") as file:
        file.write(b"not a picture")
    return made


@pytest.fixture
def built(model, processor, paths, tmp_path):
    return Gallery.build(model, processor, paths, tmp_path / "built", store_tokens=True, **UNITS)


def build(model, processor, items, folder=None, **options):
    return Gallery.build(model, processor, items, folder, **{**UNITS, **options})


def unit_vectors(count, width=32, seed=0):
    vectors = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(vectors, dim=1)


def tokens_of(gallery):
    return gallery.image_tokens(range(len(gallery)), None)


# --- search -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 46, 100])
def test_search_equals_the_engine_with_ties(chunk, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    # small whole numbers: products are exact in every chunk, and most scores are tied
    queries = torch.randint(-2, 3, (17, 3), generator=generator).float()
    vectors = torch.randint(-2, 3, (46, 3), generator=generator).float()
    gallery = Gallery.from_vectors(vectors)
    gallery.remove([3, 20])
    left = [position for position in range(46) if position not in (3, 20)]
    monkeypatch.setattr(gallery_aliblip, "GALLERY_CHUNK", chunk)
    monkeypatch.setattr(gallery_aliblip, "QUERY_BLOCK", 5)
    for dtype in ("float32", "float16"):
        for k in (1, 9, 44):
            found = gallery.astype(dtype).search(queries, k)
            for got, expected in zip(found, engine.search(queries, vectors[left], k), strict=True):
                assert torch.equal(got, expected)


def test_int8_search_equals_the_engine_on_the_stored_values_without_a_copy_of_all(tmp_path, monkeypatch):
    Gallery.from_vectors(unit_vectors(500), dtype="int8").save(tmp_path / "g")
    gallery = Gallery.load(tmp_path / "g")
    queries = unit_vectors(40, seed=1)
    scores, positions = engine.search(queries, gallery.vectors(), 10)
    monkeypatch.setattr(gallery_aliblip, "GALLERY_CHUNK", 64)
    read, sizes = storage_aliblip.State.read, []
    monkeypatch.setattr(
        storage_aliblip.State,
        "read",
        lambda state, start, stop: sizes.append(stop - start) or read(state, start, stop),
    )
    got = gallery.search(queries, 10)
    torch.testing.assert_close(got[0], scores, atol=1e-6, rtol=0)
    assert torch.equal(got[1], positions)
    assert len(sizes) == 8 and max(sizes) == 64
    assert (gallery.vectors() - unit_vectors(500)).abs().max() < 1 / 127 / 2 + 1e-6


def test_recall_of_smaller_types():
    plain = Gallery.from_vectors(unit_vectors(3000))
    queries = unit_vectors(100, seed=1)
    recalls = {dtype: plain.astype(dtype).recall(plain, queries) for dtype in ("float32", "float16", "int8")}
    assert recalls["float32"] == 1 and recalls["float16"] > 0.995 and 0.95 < recalls["int8"] < 1
    other = Gallery.from_vectors(unit_vectors(3000, seed=2))
    assert other.recall(plain, queries) < 0.05
    assert plain.recall(plain, 7) == 1
    with pytest.raises(ValueError, match="3 and 3000 items"):
        Gallery.from_vectors(unit_vectors(3)).recall(plain)


def test_search_refuses(model):
    gallery = Gallery.from_vectors(unit_vectors(5))
    for k in (0, 6):
        with pytest.raises(ValueError, match=f"k is {k}, but the gallery has 5 items"):
            gallery.search(unit_vectors(1), k)
    with pytest.raises(ValueError, match=r"\(1, 31\) given, the gallery takes \(Q, 32\)"):
        gallery.search(unit_vectors(1, 31), 1)
    with pytest.raises(ValueError, match="the queries are not all finite"):
        gallery.search(torch.full((1, 32), torch.nan), 1)
    with pytest.raises(ValueError, match="no approximate index"):
        gallery.search(unit_vectors(1), 1, approximate=True)
    with pytest.raises(ValueError, match="the vectors are not all finite"):
        Gallery.from_vectors(torch.full((2, 3), torch.inf))
    with pytest.raises(ValueError, match="2 vectors and 1 ids"):
        Gallery.from_vectors(torch.ones(2, 3), ["a"])
    with pytest.raises(ValueError, match="dtype is 'int4': choose one of float32, float16, int8"):
        gallery.astype("int4")


def test_faiss_index(tmp_path):
    faiss = pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    gallery = Gallery.from_vectors(unit_vectors(2000), dtype="float16")
    queries = unit_vectors(30, seed=1)
    assert gallery.add_faiss_index(measure_recall=50) > 0.99  # flat
    scores, positions = gallery.search(queries, 5, approximate=True)
    torch.testing.assert_close(scores, gallery.search(queries, 5)[0], atol=1e-3, rtol=0)
    recall = gallery.add_faiss_index("IVF40,Flat", nprobe=2, measure_recall=200)
    found = gallery.search(gallery._sample(200, 0), 10, approximate=True)[1]
    wanted = gallery.search(gallery._sample(200, 0), 10)[1]
    by_hand = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.tolist(), wanted.tolist(), strict=True)])
    assert recall == pytest.approx(by_hand) and 0.1 < recall < 0.9
    gallery.save(tmp_path / "g")
    loaded = Gallery.load(tmp_path / "g")
    assert "_index" not in vars(loaded._state.index)  # not read yet
    loaded.save(tmp_path / "copy")
    same_files(tmp_path / "g", tmp_path / "copy")
    expected = gallery.search(queries, 5, approximate=True)
    assert torch.equal(loaded.search(queries, 5, approximate=True)[1], expected[1])
    assert not torch.equal(expected[1], gallery.search(queries, 5)[1])
    # two lists of about 50 hold fewer than 300: such queries are searched exactly
    assert torch.equal(loaded.search(queries, 300, approximate=True)[1], gallery.search(queries, 300)[1])
    loaded.remove([7])
    with pytest.raises(ValueError, match="no approximate index"):
        loaded.search(queries, 5, approximate=True)
    assert faiss.__version__


# --- building ---------------------------------------------------------------------------------------------------------


def test_build_equals_embedding_by_hand(model, processor, paths, built):
    good = [path for number, path in enumerate(paths) if number != BROKEN]
    pixels = processor(images=[Image.open(path) for path in good], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        vectors, tokens = engine.embed_images(model, pixels)
    torch.testing.assert_close(built.vectors(), vectors, atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens_of(built).float(), tokens, atol=0.05, rtol=0.01)  # bf16
    assert built.ids == good and built.item(BROKEN) == {"id": good[BROKEN], "path": good[BROKEN]}
    assert built.skipped == [{"id": paths[BROKEN], "reason": "the file is not an image of a known format"}]
    assert len(built) == COUNT - 1 and built.has_tokens and "20 image items" in repr(built)
    in_memory = build(model, processor, paths, store_tokens=True)
    assert torch.equal(in_memory.vectors(), built.vectors()) and torch.equal(tokens_of(in_memory), tokens_of(built))


def test_titles(model, processor, capsys):
    titles = [*tiny.titles(9), " ", None, 7]
    gallery = build(model, processor, titles, kind="text", measure_recall=5)
    assert capsys.readouterr().out.splitlines() == [
        *("recall@10 of float16 vectors: 1.0000 of float32's", "recall@10 of int8 vectors: 1.0000 of float32's"),
    ]  # of nine items all are among the ten best
    batch = processor(text=titles[:9], return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(gallery.vectors(), engine.embed_texts(model, **batch), atol=1e-5, rtol=0)
    assert gallery.ids == list(range(9)) and gallery.item(2) == {"id": 2, "text": titles[2]}
    assert [entry["reason"] for entry in gallery.skipped] == [
        "the title has no visible character",
        "the title is null",
        "the title is not text but int",
    ]
    with pytest.raises(ValueError, match="titles have no image tokens"):
        build(model, processor, titles, kind="text", store_tokens=True)


def test_every_source_gives_the_same(model, processor, paths):
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    data = []
    for path in paths:
        with open(path, "rb") as file:
            data.append(file.read())
    skus = [f"sku-{number}" for number in range(COUNT)]
    rows = [{"image": value, "sku": sku} for value, sku in zip(data, skus, strict=True)]
    table = [{"image": {"bytes": row["image"], "path": None}, "sku": row["sku"]} for row in rows]
    table = Dataset.from_list(table, Features({"image": ImageFeature(), "sku": Value("string")}))
    expected = build(model, processor, paths)
    sources = {
        "rows": rows,
        "generator": (row for row in rows),
        "map-style": table,
        "iterable": table.to_iterable_dataset(),
    }
    for name, source in sources.items():
        gallery = build(model, processor, source, id_column="sku")
        assert torch.equal(gallery.vectors(), expected.vectors()), name
        assert gallery.ids == [sku for number, sku in enumerate(skus) if number != BROKEN]
        assert [entry["id"] for entry in gallery.skipped] == [f"sku-{BROKEN}"] and "path" not in gallery.item(0)
    images = [Image.open(path) for number, path in enumerate(paths) if number != BROKEN]
    gallery = build(model, processor, images)
    assert gallery.ids == list(range(COUNT - 1))
    torch.testing.assert_close(gallery.vectors(), expected.vectors(), atol=1e-5, rtol=0)  # others share a batch
    for source in (table, iter(rows)):
        with pytest.raises(ValueError, match="no column 'nr', but 'image', 'sku'"):
            build(model, processor, source, id_column="nr")
    with pytest.raises(ValueError, match="no column 'photo', but 'image', 'sku'"):
        build(model, processor, table, image_column="photo")


def test_photos_are_seen_as_in_training(model, processor, tmp_path):
    """Orientation, transparency, colour profiles and 16 bits: where the gallery saw others, its scores would lie."""
    photos, exif = tmp_path / "photos", Image.Exif()
    noise = Image.merge("RGB", [Image.effect_noise((30, 20), 60) for _ in range(3)])
    photos.mkdir()
    exif[0x0112] = 6
    noise.save(photos / "turned.png", exif=exif)
    noise.save(photos / "wide.png", icc_profile=hostile.rgb_profile(hostile.DISPLAY_P3, None))
    Image.new("RGBA", (4, 4), (9, 9, 9, 0)).save(photos / "clear.png")
    Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100).save(photos / "deep.png")
    paths = sorted(str(path) for path in photos.iterdir())
    seen = [decode(Row(0, path, None, 0, path), "images").image for path in paths]
    encoder = Encoder(model, processor)
    for path, photo in zip(paths, seen, strict=True):
        assert torch.equal(encoder.pixels(path), processor(images=[photo], return_tensors="pt")["pixel_values"][0])
    assert seen[3].tobytes() != noise.tobytes() and seen[2].size == (20, 30)
    assert torch.equal(build(model, processor, paths).vectors(), build(model, processor, seen).vectors())


def test_mistakes_come_before_the_work(model, processor, paths, tmp_path):
    def never(*_):
        raise AssertionError("worked")

    class Idle:
        tokenizer, __call__ = None, never

    idle = Idle()
    with pytest.raises(ValueError, match="2 ids come twice, such as .*000.png', .*001.png': make them unique"):
        build(model, idle, [*paths, *paths[:2]])
    with pytest.raises(ValueError, match="1 ids come twice, such as 4"):
        build(model, idle, [{"image": path, "id": 4} for path in paths[:2]])
    with pytest.raises(ValueError, match="an id is text or a whole number, not float"):
        build(model, idle, [{"image": paths[0], "id": 0.5}])
    with pytest.raises(ValueError, match="one str given"):
        build(model, idle, paths[0])
    with pytest.raises(ValueError, match="no items given"):
        build(model, idle, [])
    with pytest.raises(ValueError, match="kind is 'photo': choose one of image, text"):
        build(model, idle, paths, kind="photo")
    with pytest.raises(ValueError, match="unit_size 0: both are at least 1"):
        build(model, idle, paths, unit_size=0)
    with pytest.raises(ValueError, match="training mode"):
        build(tiny.model().train(), idle, paths)
    with pytest.raises(ValueError, match="is a file: give a folder"):
        build(model, idle, paths, paths[0])
    with pytest.raises(ValueError, match="none of 1 items can be used, the first because the file is not an image"):
        build(model, processor, [paths[BROKEN]], tmp_path / "none")


def test_duplicates(model, processor, paths, tmp_path):
    rows = [{"image": path, "id": number % 7} for number, path in enumerate(paths)]
    with pytest.raises(ValueError, match="7 ids come twice, such as 0, 1, 2, 3, 4 and 2 more"):
        build(model, processor, iter(rows), tmp_path / "g")  # known only at the end; what was embedded is kept
    gallery = build(model, processor, iter(rows), tmp_path / "h", duplicates="first", store_tokens=True)
    # number 5, which is broken, makes room for number 12
    assert gallery.ids == [0, 1, 2, 3, 4, 6, 5]
    assert [gallery.item(position)["path"] for position in (5, 6)] == [paths[6], paths[12]]
    assert [entry["reason"] for entry in gallery.skipped].count("the id comes twice") == COUNT - 1 - 7
    again = gallery.image_tokens([6], None)
    assert torch.equal(again, build(model, processor, paths, store_tokens=True).image_tokens([11], None))


def test_a_finished_build_goes_on_with_another_rule_for_duplicates(model, processor, paths, tmp_path, monkeypatch):
    twice = [*paths[:9], paths[2]]
    with pytest.raises(ValueError, match="1 ids come twice.*build with duplicates='first'"):
        build(model, processor, iter(twice), tmp_path / "g")  # a generator: found out when all is embedded
    monkeypatch.setattr(Encoder, "embed_pixels", None)  # nothing is embedded again
    gallery = build(model, processor, iter(twice), tmp_path / "g", duplicates="first", dtype="int8")
    assert (
        gallery.dtype == "int8"
        and len(gallery) == 8
        and {"id": paths[2], "reason": "the id comes twice"} in (gallery.skipped)
    )


def test_other_contents_under_the_same_ids_are_noticed(model, processor, tmp_path):
    titles = Dying(tiny.titles(12))
    titles.fatal = 9
    with pytest.raises(KeyboardInterrupt):
        build(model, processor, titles, tmp_path / "g", kind="text")
    with pytest.raises(ValueError, match="unit 0 went from 0 to 3, now it is the same with other contents"):
        build(model, processor, tiny.titles(12, seed=1), tmp_path / "g", kind="text")
    short = tiny.processor()
    short.max_length = 4
    with pytest.raises(ValueError, match="max_length was 35, is 4"):
        build(model, short, list(titles), tmp_path / "g", kind="text")


def test_columns_of_a_data_set_and_damaged_photos(model, processor, paths):
    rows = {"image": paths[:7], "caption": tiny.titles(7)}
    table = Dataset.from_dict(rows).cast_column("image", ImageFeature())
    photos = build(model, processor, table["image"])
    assert len(photos) == 6 and photos.skipped[0]["reason"] == "the file is not an image of a known format"
    for titles in (build(model, processor, table, kind="text"), build(model, processor, table["caption"], kind="text")):
        assert [titles.item(position)["text"] for position in range(7)] == rows["caption"]


def test_null_ids_are_skipped(model, processor, paths):
    gallery = build(model, processor, [{"image": paths[0], "id": None}, {"image": paths[1], "id": "a"}])
    assert gallery.ids == ["a"] and gallery.skipped == [{"id": None, "reason": "the id is null"}]


# --- builds that were stopped -----------------------------------------------------------------------------------------


class Dying(list):
    """A list of items; reading the one at `fatal` ends the build."""

    fatal = None

    def __getitem__(self, position):
        if position == self.fatal:
            raise KeyboardInterrupt
        return super().__getitem__(position)

    def __iter__(self):
        return (super(Dying, self).__getitem__(position) for position in range(len(self)))


def same_files(one, other):
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize("fatal", [2, 9, 20])
def test_a_stopped_build_goes_on_and_is_equal(fatal, model, processor, paths, built, tmp_path, monkeypatch):
    items, folder = Dying(paths), tmp_path / "stopped"
    items.fatal = fatal
    with pytest.raises(KeyboardInterrupt):
        build(model, processor, items, folder, store_tokens=True)
    with pytest.raises(ValueError, match="was not built to its end: call the build again"):
        Gallery.load(folder)
    items.fatal = None
    seen, pixels = [], Encoder.pixels
    monkeypatch.setattr(Encoder, "pixels", lambda encoder, photo: seen.append(photo) or pixels(encoder, photo))
    build(model, processor, items, folder, store_tokens=True)
    assert seen == paths[fatal // 4 * 4 :]
    same_files(folder, tmp_path / "built")


def test_a_join_that_was_stopped_goes_on(model, processor, paths, built, tmp_path, monkeypatch):
    folder, real = tmp_path / "stopped", storage_aliblip.write_json

    def write_json(path, value):
        if path.name == "gallery.json":
            raise KeyboardInterrupt
        real(path, value)

    monkeypatch.setattr(storage_aliblip, "write_json", write_json)
    with pytest.raises(KeyboardInterrupt):
        build(model, processor, paths, folder, store_tokens=True)
    monkeypatch.undo()
    monkeypatch.setattr(Encoder, "pixels", None)  # nothing is embedded again
    build(model, processor, paths, folder, store_tokens=True)
    same_files(folder, tmp_path / "built")


def test_a_build_refuses_to_go_on_with_something_else(model, processor, paths, tmp_path):
    items, folder = Dying(paths), tmp_path / "g"
    items.fatal = 9
    with pytest.raises(KeyboardInterrupt):
        build(model, processor, items, folder)
    with pytest.raises(ValueError, match="beginning of another gallery.*batch_size was 3, is 2.*overwrite=True"):
        build(model, processor, paths, folder, batch_size=2)
    with pytest.raises(ValueError, match="model was '.*', is '.*'"):
        build(tiny.spread_model(seed=1), processor, paths, folder)
    with pytest.raises(
        ValueError, match="items have changed.*unit 0 went from '.*000.png' to '.*003.png', now it is '.*001.png' to"
    ):
        build(model, processor, paths[1:] + paths[:1], folder)
    gallery = build(model, processor, paths, folder, batch_size=2, overwrite=True)
    assert len(gallery) == COUNT - 1
    with pytest.raises(ValueError, match=r"holds a gallery: open it with Gallery.load\(\)"):
        build(model, processor, paths, folder)
    assert len(build(model, processor, paths[:4], folder, overwrite=True)) == 4
    assert len(Gallery.load(folder, verify=True)) == 4


KILLED = """
import os, signal, sys, tiny
from encoder_aliblip import fingerprint
from gallery_aliblip import Gallery

class Killing(list):
    def __getitem__(self, position):
        if position == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(position)

model = tiny.spread_model()
print(fingerprint(model, tiny.processor()), flush=True)
Gallery.build(model, tiny.processor(), Killing(sys.argv[2:]), sys.argv[1],
              store_tokens=True, unit_size=4, batch_size=3, progress=False)
"""


def test_after_kill_9_the_build_goes_on_and_is_equal(model, processor, paths, built, tmp_path):
    (tmp_path / "script.py").write_text(KILLED)
    command = [sys.executable, tmp_path / "script.py", tmp_path / "killed", *paths]
    ended = run_forked(command, env={"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])})
    assert ended.returncode == -9, ended.stderr
    assert ended.stdout.strip() == fingerprint(model, processor) == built.model  # equal in every process
    assert len(list((tmp_path / "killed" / "gallery.build").glob("unit-*"))) == 3
    build(model, processor, paths, tmp_path / "killed", store_tokens=True)
    same_files(tmp_path / "killed", tmp_path / "built")


def in_two_processes(paths, folder):
    """What both ranks see of a build, and of one that fails on rank 1 alone."""
    model, processor = tiny.spread_model(), tiny.processor()
    gallery = build_gallery(model, processor, paths, folder, store_tokens=True, **UNITS)

    class Failing(list):
        def __getitem__(self, position):
            if position == 5:
                raise OSError("the disk is gone")
            return super().__getitem__(position)

        def __iter__(self):
            return iter(paths)

    try:
        build_gallery(model, processor, Failing(paths), f"{folder}-failing", **UNITS)
    except Exception as error:
        return gallery.ids, f"{type(error).__name__}: {error}"


def test_two_processes_build_the_same_gallery(paths, built, tmp_path):
    results = spawn(in_two_processes, 2, paths, str(tmp_path / "two"))
    assert [ids for ids, _ in results] == [built.ids] * 2
    same_files(tmp_path / "two", tmp_path / "built")
    assert [error for _, error in results] == [
        "RuntimeError: rank 1 could not build its part of the gallery: OSError: the disk is gone",
        "OSError: the disk is gone",
    ]


# --- files ------------------------------------------------------------------------------------------------------------


def test_damaged_galleries_are_refused(built, tmp_path):
    folder = tmp_path / "built"
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    assert {path.name.split("-")[0] for path in whole} == {
        *("gallery.json", "vectors", "items", "offsets", "skipped", "tokens"),
    }
    for path, data in whole.items():
        path.write_bytes(data[:-1] if path.name != "gallery.json" else data[: len(data) // 2])
        with pytest.raises(ValueError, match="is damaged"):
            Gallery.load(folder)
        path.unlink()
        with pytest.raises(ValueError, match="is missing|is not a gallery"):
            Gallery.load(folder)
        path.write_bytes(data)
        if path.name != "gallery.json":
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
            Gallery.load(folder)  # as long as before
            with pytest.raises(ValueError, match="was changed"):
                Gallery.load(folder, verify=True)
            path.write_bytes(data)
    assert len(Gallery.load(folder, verify=True)) == COUNT - 1
    manifest = json.loads((folder / "gallery.json").read_text())
    for change, message in (
        ({"format": 2}, "has the format 2, this code reads 1"),
        ({"items": 19}, "do not belong together"),
        ({"files": {"vectors": {"name": "../x", "size": 1, "blake2b": ""}}}, "names a file '../x', which no gallery"),
    ):
        (folder / "gallery.json").write_text(json.dumps({**manifest, **change}))
        with pytest.raises(ValueError, match=message):
            Gallery.load(folder)


def test_changes_equal_a_new_gallery(model, processor, paths, built, tmp_path):
    more = tiny.photos(tmp_path / "more", 5, seed=1)
    assert built.add(model, processor, [*more, str(tmp_path / "gone.png")], batch_size=3) == [
        {"id": str(tmp_path / "gone.png"), "reason": "the image file is missing"}
    ]
    built.remove([paths[0], paths[7], more[1]])
    built.remove([more[4]])
    kept = [path for path in [*paths, *more] if path not in (paths[0], paths[7], paths[BROKEN], more[1], more[4])]
    expected = build(model, processor, kept, store_tokens=True)
    for stage in ("changed", "saved", "loaded"):
        if stage == "saved":
            built.save(tmp_path / "built")  # over the folder that it reads from
        elif stage == "loaded":
            skipped, built = built.skipped, Gallery.load(tmp_path / "built", verify=True)
            assert built.skipped == skipped
        assert built.ids == kept and len(built) == len(kept)
        torch.testing.assert_close(built.vectors(), expected.vectors(), atol=1e-5, rtol=0)
        torch.testing.assert_close(tokens_of(built), tokens_of(expected), atol=0.05, rtol=0.01)
    named = json.loads((tmp_path / "built" / "gallery.json").read_text())
    files = {entry["name"] for entry in [*named["files"].values(), *named["tokens"]]}
    assert {path.name for path in (tmp_path / "built").iterdir()} == files | {"gallery.json"}


@pytest.mark.parametrize("unit_size", [4, 100])
def test_holes_in_files_of_tokens(unit_size, model, processor, paths, tmp_path):
    """Items that are dropped from the middle of a file, of the last one too: by id twice, and by hand."""
    kept = [path for number, path in enumerate(paths[:11]) if number not in (3, BROKEN, 9)]
    twice = [*paths[:6], paths[1], *paths[6:10], paths[0], paths[10]]
    options = {"store_tokens": True, "unit_size": unit_size, "batch_size": 3, "progress": False}
    gallery = Gallery.build(model, processor, twice, tmp_path / "g", duplicates="first", **options)
    gallery.remove([paths[3], paths[9]])
    gallery.save(tmp_path / "again")
    expected = Gallery.build(model, processor, kept, **options)
    for loaded in (gallery, Gallery.load(tmp_path / "again", verify=True)):
        assert loaded.ids == kept
        torch.testing.assert_close(tokens_of(loaded), tokens_of(expected), atol=0.05, rtol=0.01)


def test_a_gallery_that_was_saved_again_elsewhere_says_so(built, paths, tmp_path):
    other = Gallery.load(tmp_path / "built")
    other.remove([paths[0]])
    other.save(tmp_path / "built")
    with pytest.raises(ValueError, match="image tokens of the gallery .* can't be read .* load it again"):
        tokens_of(built)


def test_saves_at_the_same_time_leave_one_of_them(tmp_path):
    galleries = [Gallery.from_vectors(unit_vectors(30 + n), [f"{n} {i}" for i in range(30 + n)]) for n in range(3)]

    def save(gallery):
        for _ in range(10):
            gallery.save(tmp_path / "shared")

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(save, galleries))
    loaded = Gallery.load(tmp_path / "shared", verify=True)
    assert loaded.ids in [gallery.ids for gallery in galleries]
    assert len(list((tmp_path / "shared").iterdir())) == 5


def test_a_torn_file_is_written_again(built, tmp_path):
    file = next((tmp_path / "built").glob("tokens-*"))
    built.save(tmp_path / "copy")
    (tmp_path / "copy" / file.name).unlink()
    (tmp_path / "copy" / file.name).write_bytes(b"torn")
    with pytest.raises(ValueError, match="is damaged"):
        Gallery.load(tmp_path / "copy")
    built.save(tmp_path / "copy")
    assert torch.equal(tokens_of(Gallery.load(tmp_path / "copy", verify=True)), tokens_of(built))


def test_photos_are_read_from_where_they_may_be(model, processor, paths, tmp_path, monkeypatch):
    """A gallery from the Hub names what its maker likes: no file or address of this machine is opened for it."""
    gallery = Gallery.from_vectors(unit_vectors(1))
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
        gallery.is_foreign, gallery.photo_root = foreign, root
        for one in (gallery, gallery.snapshot()):
            if wanted is None:
                with pytest.raises(UnusableItem, match="photo_root"):
                    one.photo_path({"path": path})
            else:
                assert one.photo_path({"path": path}) == wanted
    assert gallery.photo_path({"id": 3}) is None
    build(model, processor, paths[:3], tmp_path / "hub")
    monkeypatch.setattr(gallery_aliblip, "snapshot_download", lambda name, **options: str(tmp_path / "hub"))
    with pytest.raises(ValueError, match="000.png: a gallery from the Hub reads photos only from its photo_root"):
        Gallery.load("me/mine").image_tokens([0], Encoder(model, processor))


def test_changes_that_are_refused_change_nothing(model, processor, paths, built):
    with pytest.raises(ValueError, match="1 ids come twice"):
        built.add(model, processor, [paths[3]])  # before anything is embedded
    with pytest.raises(ValueError, match="1 ids come twice"):
        built.add(model, processor, iter([paths[3]]))
    with pytest.raises(KeyError, match="not in the gallery: 'nowhere'"):
        built.remove([paths[1], "nowhere"])
    with pytest.raises(ValueError, match="all items would be removed"):
        built.remove(built.ids)
    with pytest.raises(ValueError, match="built with another model"):
        built.add(tiny.spread_model(seed=1), processor, ["x"])
    assert built.ids == [path for number, path in enumerate(paths) if number != BROKEN]


def test_a_save_that_fails_leaves_the_gallery_before(model, processor, built, tmp_path, monkeypatch):
    before = built.vectors().clone()
    real = os.replace

    def replace(source, place):
        if str(place).endswith("gallery.json"):
            raise OSError("the disk is full")
        real(source, place)

    changed = Gallery.load(tmp_path / "built").astype("int8")
    changed.remove(changed.ids[:3])
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="the disk is full"):
        changed.save(tmp_path / "built")
    monkeypatch.undo()
    assert torch.equal(Gallery.load(tmp_path / "built", verify=True).vectors(), before)
    changed.save(tmp_path / "built")
    saved = Gallery.load(tmp_path / "built", verify=True)
    assert len(saved) == COUNT - 4 and saved.dtype == "int8" and torch.equal(saved.vectors(), changed.vectors())
    assert not list((tmp_path / "built").glob("*.partial"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    for write in (changed.save, lambda folder: build(model, processor, ["x"], folder, overwrite=True)):
        with pytest.raises(ValueError, match="holds something else than a gallery"):
            write(tmp_path / "other")
    assert (tmp_path / "other" / "thesis.txt").exists()


def test_a_gallery_is_mapped_and_not_read(tmp_path):
    Gallery.from_vectors(unit_vectors(2000), dtype="int8").save(tmp_path / "g")
    segment = Gallery.load(tmp_path / "g")._state.segments[0]
    maps = Path("/proc/self/maps").read_text()
    assert all(path.name in maps for path in (tmp_path / "g").glob("vectors-*"))
    assert segment.vectors.dtype == torch.int8 and segment.vectors.shape == (2000, 32)


def test_what_is_no_gallery(tmp_path):
    with pytest.raises(ValueError, match="me/other is neither a folder nor a data set that the Hub gives"):
        Gallery.load("me/other")  # conftest forbids the Hub
    with pytest.raises(ValueError, match="is not a gallery: give a folder"):
        Gallery.load(tmp_path)


# --- models and threads -----------------------------------------------------------------------------------------------


def test_fingerprints(model, processor, built, tmp_path):
    built.check_model(fingerprint(model, processor))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AliBlipForImageTextRetrieval.from_pretrained(tmp_path), AliBlipProcessor.from_pretrained(tmp_path)
    built.check_model(fingerprint(*again))
    again[1](text=["a red cup", "a cup"])  # leaves padding and truncation in the tokenizer's state
    built.check_model(fingerprint(*again))
    # The temperature is fp32 in any copy, and rounded like the others.
    assert fingerprint(tiny.spread_model().to(torch.bfloat16), processor) == fingerprint(model, processor)
    stepped = tiny.spread_model()
    with torch.no_grad():
        for parameter in stepped.text_encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 1e-3)
    other_heads = tiny.spread_model(vision_config={"num_attention_heads": 8})
    assert torch.equal(other_heads.vision_proj.weight, model.vision_proj.weight)
    other_pixels, other_words = tiny.processor(), tiny.processor()
    other_pixels.image_processor.image_mean = [0.5, 0.5, 0.5]
    other_words.tokenizer.add_tokens(["mug"])
    for other in ((stepped, processor), (other_heads, processor), (model, other_pixels), (model, other_words)):
        with pytest.raises(ValueError, match=f"built with another model or processor .{built.model[:8]}, not "):
            built.check_model(fingerprint(*other))
    Gallery.from_vectors(unit_vectors(3)).check_model("whatever")


def test_a_model_whose_weights_lie_on_disk(saved_model, saved, processor, paths, tmp_path):
    options = {"device_map": "auto", "max_memory": {"cpu": 60_000}, "offload_folder": tmp_path / "offload"}
    model = AliBlipForImageTextRetrieval.from_pretrained(saved, **options).eval()
    assert any(parameter.is_meta for parameter in model.parameters())
    gallery, expected = build(model, processor, paths[:4]), build(saved_model, processor, paths[:4])
    assert gallery.model == expected.model
    torch.testing.assert_close(gallery.vectors(), expected.vectors(), rtol=0, atol=1e-5)


def test_the_tokenizer_is_asked_by_one_thread_at_a_time(model):
    """A fast tokenizer that is set up differently by two threads at once raises "Already borrowed"."""

    class Borrowed:
        def __init__(self):
            self.free = threading.Lock()

        def __call__(self, text, return_tensors):
            assert self.free.acquire(blocking=False), "Already borrowed"
            time.sleep(0.005)
            self.free.release()
            return {"input_ids": torch.ones(1, 3), "attention_mask": torch.ones(1, 3)}

    encoder = Encoder(model, Borrowed())
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(encoder.tokenize, [["a title"]] * 12))


def test_searches_while_the_gallery_changes():
    vectors = unit_vectors(400)
    gallery = Gallery.from_vectors(vectors, [f"item {number}" for number in range(400)])
    failures, done = [], threading.Event()

    def search():
        while not done.is_set():
            state = gallery._state
            position = int(gallery_aliblip._search_exactly(state, vectors[399:], 1)[1])
            segment, row = state.find(position)
            if segment.items[row]["id"] != "item 399":
                failures.append(position)
            if float(gallery.search(vectors[399:], 1)[0]) < 0.999:
                failures.append("score")

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(0, 100, 2):
        gallery.remove([f"item {number}"])
    done.set()
    for thread in threads:
        thread.join()
    assert not failures and len(gallery) == 350


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved_model():
    return tiny.spread_model(vocab_size=20)  # as many as the tokenizer has


@pytest.fixture(scope="module")
def saved(saved_model, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    saved_model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def command(*arguments) -> list[str]:
    return [*map(str, arguments), "--unit_size", "4", "--per_device_eval_batch_size", "3"]


def test_the_command_gives_the_same_gallery_with_any_number_of_processes(
    saved, saved_model, processor, paths, tmp_path
):
    photos = Path(paths[0]).parent
    given = ["--model_name_or_path", saved, "--data_dir", photos, "--store_tokens"]
    one = run_forked([sys.executable, "-m", "aliblip.gallery", *command(*given, "--output_dir", tmp_path / "one")])
    assert_succeeded(one)
    assert f"{COUNT} photos; vectors: 1.34 kB in float32; image tokens: 22.8 kB" in one.stdout
    assert "recall@10 of int8 vectors: " in one.stdout
    assert f"skipped '{Path(paths[BROKEN]).name}': the file is not an image of a known format" in one.stdout
    assert (
        f"Gallery of {COUNT - 1} image items, 16 wide in float32, with image tokens; 1 could not be read" in one.stdout
    )
    two = launch("cpu_2_processes.yaml", "-m", ["aliblip.gallery", *command(*given, "--output_dir", tmp_path / "two")])
    assert_succeeded(two)
    assert "2 processes" in two.stdout and two.stdout.count("written: ") == 1
    same_files(tmp_path / "one", tmp_path / "two")
    gallery = Gallery.load(tmp_path / "one")
    built = build(saved_model, processor, paths)
    assert torch.equal(gallery.vectors(), built.vectors()) and gallery.model == built.model
    assert gallery.ids == [Path(path).name for path in built.ids]
    again = run_forked([sys.executable, "-m", "aliblip.gallery", *command(*given, "--output_dir", tmp_path / "one")])
    assert again.returncode == 2 and "holds a gallery: give a new folder, or --overwrite_output_dir" in again.stderr


def test_rows_of_a_data_set_keep_their_ids(saved, saved_model, processor, tmp_path):
    table = tmp_path / "rows.parquet"
    rows = {"image": [], "caption": tiny.titles(9), "sku": [f"sku {number}" for number in range(9)]}
    for path in tiny.photos(tmp_path / "photos", 9):
        rows["image"].append({"bytes": Path(path).read_bytes(), "path": None})
    Dataset.from_dict(rows).to_parquet(table)
    given = ["--model_name_or_path", saved, "--data_files", table, "--id_column", "sku", "--dtype", "float16"]
    for kind in ("image", "text"):
        arguments = ["aliblip.gallery", *command(*given, "--kind", kind, "--output_dir", tmp_path / kind)]
        assert_succeeded(run_forked([sys.executable, "-m", *arguments]))
        gallery = Gallery.load(tmp_path / kind)
        assert gallery.ids == rows["sku"] and gallery.kind == kind and gallery.dtype == "float16"
    assert gallery.item(3) == {"id": "sku 3", "text": rows["caption"][3]}
    expected = build(saved_model, processor, rows["caption"], kind="text")
    torch.testing.assert_close(gallery.vectors(), expected.vectors(), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"output_dir": None}, "--output_dir is missing"),
        ({"model_name_or_path": "nowhere"}, "nowhere"),
        ({"data_dir": "nowhere"}, "nowhere"),
        ({"product_id_column": "sku"}, "the ids of a gallery are --id_column"),
        ({"id_column": "sku"}, "sku"),
        ({"unit_size": 0}, "--unit_size is 0"),
        ({"kind": "text", "store_tokens": True}, "titles have no image tokens"),
        ({"dtype": "int4"}, "invalid choice: 'int4'"),
    ],
)
def test_mistakes_of_the_command_are_one_line(given, message, saved, paths, tmp_path, capsys):
    fine = {"model_name_or_path": saved, "data_dir": Path(paths[0]).parent, "output_dir": tmp_path / "gallery"}
    arguments = [f"--{name}={value}" for name, value in (fine | given).items() if value is not None]
    with pytest.raises(UsageError, match=message) as raised:
        main(arguments)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "gallery").exists()
