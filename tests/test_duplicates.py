"""Duplicates that are planted are found, and products that only look alike are not."""

import json
from functools import partial

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw
from prepare_case import draw, encoded, needs_prepare, picture, rows_of

from aliblip.prepare import main
from aliblip.runtime.files import mapped_array

pytestmark = needs_prepare

COUNT = 160


def product(number):
    """A product as shops show them: one of four outlines on white, with a pattern and colours of its own."""
    rng = np.random.default_rng(number)
    photo = Image.new("RGB", (160, 160), "white")
    outline = Image.new("L", photo.size, 0)
    pen = ImageDraw.Draw(outline)
    shapes = [
        lambda: pen.ellipse((30, 20, 130, 140), fill=255),
        lambda: pen.rectangle((40, 25, 120, 140), fill=255),
        lambda: pen.polygon([(80, 15), (145, 140), (15, 140)], fill=255),
        lambda: pen.rounded_rectangle((15, 55, 145, 110), 20, fill=255),
    ]
    shapes[number % 4]()
    pattern = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize(photo.size, Image.Resampling.BOX)
    photo.paste(pattern, mask=outline)
    return photo


def cropped(photo, share, rng):
    width, height = photo.size
    side, down = int(width * share), int(height * share)
    left, top = int(rng.integers(0, side + 1)), int(rng.integers(0, down + 1))
    return photo.crop((left, top, width - side + left, height - down + top))


def marked(photo):
    photo = photo.copy()
    ImageDraw.Draw(photo, "RGBA").text((30, 70), "shop.example", fill=(255, 255, 255, 160), font_size=18)
    return photo


# What happens to photos on the way, and the recall that is promised of each.
CHANGES = {
    "recompressed": (lambda photo, rng: encoded(photo, 35), 1.0),
    "resized": (lambda photo, rng: encoded(photo.resize((90, 90))), 1.0),
    "mirrored": (lambda photo, rng: encoded(photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)), 1.0),
    "cropped by 5 %": (lambda photo, rng: encoded(cropped(photo, 0.05, rng)), 0.95),
    "cropped by 12 %": (lambda photo, rng: encoded(cropped(photo, 0.12, rng)), 0.8),
    "watermarked": (lambda photo, rng: encoded(marked(photo)), 0.8),
    "mirrored and cropped": (
        lambda photo, rng: encoded(cropped(photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT), 0.08, rng)),
        0.85,
    ),
}


@pytest.fixture(scope="module")
def planted():
    """Thumbs of products, and of one changed copy of most; whose copy each is, and what was changed."""
    from aliblip.data.prepare_photos import prepare_photo

    rng, names = np.random.default_rng(0), list(CHANGES)
    thumbs = [prepare_photo(encoded(product(i), 95)).thumb for i in range(COUNT)]
    owner, change = list(range(COUNT)), [None] * COUNT
    for i in range(COUNT - 20):
        name = names[i % len(names)]
        thumbs.append(prepare_photo(CHANGES[name][0](product(i), rng)).thumb)
        owner.append(i)
        change.append(name)
    return np.frombuffer(b"".join(thumbs), np.uint8).reshape(-1, 48, 48, 3), np.array(owner), np.array(change)


def test_planted_duplicates_are_found_and_nothing_else(planted, capsys):
    from aliblip.data.duplicates import Index

    thumbs, owner, change = planted
    pairs = Index.of(thumbs).pairs(0, len(thumbs))
    found = set(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))
    right = {pair for pair in found if owner[pair[0]] == owner[pair[1]]}
    precision = len(right) / len(found)
    recalls = {}
    for name in CHANGES:
        copies = np.flatnonzero(change == name)
        recalls[name] = np.mean([(owner[copy], copy) in found for copy in copies.tolist()])
    with capsys.disabled():
        told = ", ".join(f"{name} {recall:.2f}" for name, recall in recalls.items())
        print(f"\nplanted duplicates: precision {precision:.3f}; recall: {told}")
    assert precision >= 0.98
    for name, (_, promised) in CHANGES.items():
        assert recalls[name] >= promised, (name, recalls[name])


def test_a_group_larger_than_the_places_of_a_photo_is_one_group():
    """A photo and its crop, each with more copies than a photo is compared with."""
    from aliblip.data.duplicates import Index, groups_of, joined_groups
    from aliblip.data.prepare_photos import prepare_photo

    rng = np.random.default_rng(1)
    one, thumbs = product(3), []
    for photo in (one, cropped(one, 0.05, rng)):
        for _ in range(16):
            noisy = np.asarray(photo).astype(np.int16) + rng.integers(-6, 7, np.asarray(photo).shape)
            noisy = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
            thumbs.append(prepare_photo(encoded(noisy, 95)).thumb)
    thumbs = np.frombuffer(b"".join(thumbs), np.uint8).reshape(-1, 48, 48, 3)
    pairs = Index.of(thumbs).pairs(0, 32)
    assert len(set(groups_of(32, pairs))) == 2  # each photo's places are taken by its own copies
    assert len(set(groups_of(32, joined_groups(thumbs, pairs, 0.9)))) == 1


def test_the_pairs_are_the_same_however_the_photos_are_cut_into_blocks(planted, monkeypatch):
    from aliblip.data import duplicates

    thumbs, _, _ = planted
    index = duplicates.Index.of(thumbs)
    whole = index.pairs(0, len(thumbs))
    blocks = [index.pairs(start, min(start + 37, len(thumbs))) for start in range(0, len(thumbs), 37)]
    joined = duplicates.Pairs.of(
        *(np.concatenate([getattr(b, name) for b in blocks]) for name in ("first", "second", "similarity"))
    )
    assert np.array_equal(joined.first, whole.first) and np.array_equal(joined.second, whole.second)
    # In lists, few of which are searched, nearly all of them are found, too.
    monkeypatch.setattr(duplicates, "_SEVERAL", 50)
    monkeypatch.setattr(duplicates, "_LIST", 20)
    several = duplicates.Index.of(thumbs)
    assert len(several.centres) > 10
    found = several.pairs(0, len(thumbs))
    both = set(zip(found.first.tolist(), found.second.tolist(), strict=True))
    assert len(both & set(zip(whole.first.tolist(), whole.second.tolist(), strict=True))) >= 0.95 * len(whole)


def test_an_index_is_the_same_in_memory_and_on_the_disk(planted, tmp_path, monkeypatch):
    from aliblip.data import duplicates

    monkeypatch.setattr(duplicates, "_SEVERAL", 100)
    monkeypatch.setattr(duplicates, "_LIST", 32)
    thumbs = np.concatenate([planted[0], np.zeros((3, 48, 48, 3), np.uint8)])  # some are blank
    indices = [duplicates.Index.of(thumbs), duplicates.Index.of(thumbs, partial(mapped_array, tmp_path))]
    for name in duplicates.Index._ARRAYS:
        first, second = (getattr(index, name) for index in indices)
        assert first.dtype == second.dtype and np.array_equal(first, second), name
    assert isinstance(indices[1].descriptors, np.memmap) and len(indices[1].centres) > 1
    assert list(tmp_path.iterdir()) == []
    assert len(duplicates.Index.of(thumbs[:0], partial(mapped_array, tmp_path))) == 0


def test_other_colours_and_blank_photos_are_no_duplicates():
    from aliblip.data.duplicates import Index
    from aliblip.data.prepare_photos import prepare_photo

    red = product(4)
    blue = Image.merge("RGB", red.split()[::-1])
    blanks = [Image.new("RGB", (100, 100), shade) for shade in ("white", "black", (200, 200, 200))]
    thumbs = b"".join(prepare_photo(encoded(photo)).thumb for photo in (red, blue, *blanks, *blanks))
    thumbs = np.frombuffer(thumbs, np.uint8).reshape(-1, 48, 48, 3)
    assert not len(Index.of(thumbs).pairs(0, len(thumbs)))
    for few in range(3):  # one photo, or none, has no neighbours
        assert not len(Index.of(thumbs[:few]).pairs(0, few))


def test_groups_and_exact_pairs_are_those_of_the_obvious_way():
    from aliblip.data.duplicates import Pairs, exact_pairs, groups_of

    keys = np.array([5, 3, 5, 5, 9, 3])
    pairs = exact_pairs(keys)
    assert set(zip(pairs.first, pairs.second, strict=True)) == {(0, 2), (0, 3), (1, 5)}
    more = Pairs.of(np.array([4, 2]), np.array([5, 0]), np.array([0.9, 0.9], np.float32))
    assert groups_of(6, pairs, more).tolist() == [0, 1, 0, 0, 1, 1]


def test_they_are_listed_and_merged_when_asked(tmp_path, monkeypatch):
    monkeypatch.setattr("aliblip.data.prepare_card._Titles.languages", lambda titles: ())
    flags = [*draw(tmp_path, 24, broken=0, products=1), "--workers", "1"]
    rows = json.loads((tmp_path / "train.json").read_text())
    photos = tmp_path / "photos"
    (photos / "equal.jpg").write_bytes((photos / "0003.jpg").read_bytes())
    (photos / "near.jpg").write_bytes(encoded(picture(5), 50))
    rows += [
        {"product": "equal.jpg", "caption": "another title", "product_id": "X"},
        {"product": "near.jpg", "caption": "Thing  7 ", "product_id": "Y"},
        {"product": "0008.jpg", "caption": "9, thing", "product_id": "P8"},
    ]
    (tmp_path / "train.json").write_text(json.dumps(rows))

    main([*flags, "--output_dir", str(tmp_path / "listed")])
    listed = pq.read_table(tmp_path / "listed" / "duplicates.parquet").to_pylist()
    found = {(row["kind"], row["first_row"], row["second_row"]): row for row in listed}
    assert set(found) == {
        ("exact", 3, 24),
        ("exact", 8, 26),
        ("near", 5, 25),
        ("titles", 7, 25),
        ("words", 9, 26),
    }
    assert found["exact", 8, 26]["same_product"] and not found["exact", 3, 24]["same_product"]
    for kind in ("exact", "near"):
        with Image.open(tmp_path / "listed" / f"duplicates-{kind}.png") as sheet:
            assert sheet.width > 400
    products = {row["source_row"]: row["product_id"] for row in rows_of(tmp_path / "listed")}
    assert len(set(products.values())) == 26

    main([*flags, "--output_dir", str(tmp_path / "merged"), "--merge_duplicates", "exact,near"])
    merged = {row["source_row"]: row["product_id"] for row in rows_of(tmp_path / "merged")}
    assert merged == products | {24: products[3], 25: products[5]}
    main([*flags, "--output_dir", str(tmp_path / "titles"), "--merge_duplicates", "titles"])
    merged = {row["source_row"]: row["product_id"] for row in rows_of(tmp_path / "titles")}
    assert merged == products | {25: products[7]}
    assert (tmp_path / "titles" / "card.html").read_text().count("<img") > 8
