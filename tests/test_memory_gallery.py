"""A gallery in memory, the one that a downloaded model brings: a list of photos or titles, embedded and searched."""

from pathlib import Path

import gallery_case as case
import pytest
import tiny
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from gallery_case import BROKEN, COUNT, unit_vectors
from PIL import Image

import gallery_aliblip
import retrieval_aliblip as engine
from encoder_aliblip import Encoder
from gallery_aliblip import MemoryGallery

GOOD = [number for number in range(COUNT) if number != BROKEN]


@pytest.fixture(scope="module")
def encoder():
    return Encoder(*case.model_and_processor())


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return case.photos(tmp_path_factory.mktemp("gallery") / "photos")


def of_vectors(vectors, **options):
    return MemoryGallery(vectors, [{"id": number} for number in range(len(vectors))], **options)


@pytest.mark.parametrize("chunk", [1, 7, 46, 100])
def test_search_equals_the_engine_with_ties(chunk, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    # small whole numbers: products are exact in every chunk, and most scores are tied
    queries = torch.randint(-2, 3, (17, 3), generator=generator).float()
    vectors = torch.randint(-2, 3, (46, 3), generator=generator).float()
    gallery = of_vectors(vectors)
    monkeypatch.setattr(gallery_aliblip, "GALLERY_CHUNK", chunk)
    monkeypatch.setattr(gallery_aliblip, "QUERY_BLOCK", 5)
    for k in (1, 9, 46):
        scores, positions = engine.search(queries, vectors, k)
        found = gallery.search(queries, k)
        assert [[hit["position"] for hit in hits] for hits in found] == positions.tolist()
        assert [[hit["itc"] for hit in hits] for hits in found] == scores.tolist()
    assert [len(hits) for hits in gallery.search(queries, 99)] == [46] * 17


def test_equal_vectors_have_equal_scores_wherever_they_stand():
    gallery = of_vectors(unit_vectors(1, 256).expand(113, 256))
    for query in unit_vectors(20, 256, seed=1):
        hits = gallery.search(query[None], 113)[0]
        assert [hit["id"] for hit in hits] == list(range(113)) and len({hit["itc"] for hit in hits}) == 1


def test_photos_equal_embedding_by_hand(encoder, paths):
    gallery = MemoryGallery.build(encoder, paths, store_tokens=True, batch_size=3)
    pixels = torch.stack([encoder.pixels(paths[number]) for number in GOOD])
    vectors, tokens = encoder.embed_pixels(pixels)
    torch.testing.assert_close(gallery.vectors[: COUNT - 1], vectors, atol=1e-5, rtol=0)
    assert gallery.items[BROKEN] == {"id": paths[GOOD[BROKEN]], "path": paths[GOOD[BROKEN]]}
    assert gallery.skipped == [{"id": paths[BROKEN], "reason": "the file is not an image of a known format"}]
    assert len(gallery) == COUNT - 1 and repr(gallery) == "MemoryGallery of 20 photos, 16 wide"
    hits = gallery.search(vectors[:2], 3)[0]
    assert hits[0]["id"] == hits[0]["path"] == paths[0] and hits[0]["itc"] == pytest.approx(1, abs=1e-5)
    again = MemoryGallery.build(encoder, paths)
    for one in (gallery, again):  # kept, and read again
        found = one.image_tokens(hits, encoder)
        wanted = tokens[[hit["position"] for hit in hits]]
        torch.testing.assert_close(found.float(), wanted.float(), atol=0.05, rtol=0.01)
    assert gallery.snapshot() is gallery


def test_titles_rows_and_data_sets(encoder, paths):
    titles = [*tiny.titles(9), " ", None, 7]
    gallery = MemoryGallery.build(encoder, titles, kind="text")
    assert gallery.items[2] == {"id": 2, "text": titles[2]}
    assert [entry["reason"] for entry in gallery.skipped] == [
        "the title has no visible character",
        "the title is null",
        "the title is not text but int",
    ]
    rows = [{"image": path, "id": f"sku-{n}", "price": n} for n, path in enumerate(paths[:4])]
    gallery = MemoryGallery.build(encoder, rows)
    assert gallery.items[3] == {"id": "sku-3", "price": 3, "path": paths[3]}
    assert MemoryGallery.build(encoder, [{"image": paths[0], "price": 1}]).items[0]["id"] == 0
    table = Dataset.from_dict({"image": paths[:7], "caption": tiny.titles(7)}).cast_column("image", ImageFeature())
    for source in (table, table["image"]):
        gallery = MemoryGallery.build(encoder, source)
        assert [item["path"] for item in gallery.items] == [paths[n] for n in range(7) if n != BROKEN]
    for source in (table, table["caption"]):
        gallery = MemoryGallery.build(encoder, source, kind="text")
        assert [item["text"] for item in gallery.items] == tiny.titles(7)
    images = [Image.open(paths[0]), Path(paths[1]).read_bytes(), {"bytes": None, "path": paths[2]}, Path(paths[3])]
    gallery = MemoryGallery.build(encoder, images)
    assert [item["id"] for item in gallery.items] == [0, 1, paths[2], paths[3]]


def test_what_comes_twice_is_left_out(encoder, paths):
    gallery = MemoryGallery.build(encoder, [paths[0], paths[1], paths[0]])
    assert [item["id"] for item in gallery.items] == paths[:2]
    assert gallery.skipped == [{"id": paths[0], "reason": "the id comes twice"}]


def test_mistakes(encoder, paths, tmp_path):
    for items, options, message in (
        (paths[0], {}, "one str given: items are a list"),
        ([], {}, "no items given: a gallery has at least one"),
        ([paths[BROKEN]], {}, "none of 1 items can be used, the first .*: the file is not an image"),
        ([{"photo": paths[0], "price": 3}], {}, "a row has no column 'image', but 'photo', 'price'"),
        (Dataset.from_dict({"photo": paths}), {}, "the data set has no column 'image', but 'photo'"),
        (
            [{"image": paths[0], "id": None, "price": 3}],
            {},
            "none of 1 items can be used, the first None: the id is null",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            MemoryGallery.build(encoder, items, **options)
    gallery = of_vectors(unit_vectors(5), model="a" * 32)
    for call, message in (
        (lambda: gallery.search(unit_vectors(1, 31), 1), r"\(1, 31\) and k 1 given: \(Q, 16\) and at least 1"),
        (lambda: gallery.search(unit_vectors(1), 0), "k 0 given"),
        (lambda: gallery.search(unit_vectors(1), 1, where="price < 3"), "a list has no filters and no index"),
        (lambda: gallery.search(unit_vectors(1), 1, approximate=True), "a list has no filters and no index"),
        (lambda: gallery.check_model("b" * 32), "built with another model or processor .aaaaaaaa, not bbbbbbbb."),
        (lambda: of_vectors(unit_vectors(2), kind="video"), "kind is 'video': choose one of image, text"),
        (lambda: MemoryGallery(unit_vectors(2), [{"id": 1}]), r"vectors of shape \(2, 16\) and 1 items"),
        (lambda: gallery.image_tokens([{"id": 3, "position": 3}], encoder), "needs the photo of item 3: keep tokens"),
        (
            lambda: gallery.image_tokens([{"id": 3, "position": 3, "path": str(tmp_path / "gone.png")}], encoder),
            "needs the photo of item 3: the image file is missing",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    gallery.check_model("a" * 32)
    of_vectors(unit_vectors(2)).check_model("whatever")
