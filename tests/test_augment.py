"""BLIP's augmentation in Pillow, against slow versions in NumPy and against its published settings."""

import math
import random

import numpy as np
import pytest
from data_stub import photo
from PIL import Image, ImageEnhance

from aliblip.data import augment
from aliblip.data.augment import OPERATIONS, TrainAugmentation, crop_box, resized
from reading_aliblip import read_photo


def gradient(width=21, height=17):
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x * 10, y * 12, (x + y) * 5], axis=-1).astype(np.uint8))


class FixedSign(random.Random):
    """Draws that make every random sign positive (or negative)."""

    def __init__(self, positive=True):
        super().__init__(0)
        self.value = 0.0 if positive else 1.0

    def random(self):
        return self.value


def warp_slowly(image, forward):
    """OpenCV's warpAffine: `forward` (2, 3) maps input to output pixel indices; bilinear, grey outside."""
    pixels = np.asarray(image).astype(float)
    height, width = pixels.shape[:2]
    inverse = np.linalg.inv(np.vstack([forward, [0, 0, 1]]))
    result = np.full_like(pixels, 128.0)
    for y in range(height):
        for x in range(width):
            u, v, _ = inverse @ (x, y, 1)
            left, top = math.floor(u), math.floor(v)
            if 0 <= left < width - 1 and 0 <= top < height - 1:
                a, b = u - left, v - top
                upper = pixels[top, left] * (1 - a) + pixels[top, left + 1] * a
                lower = pixels[top + 1, left] * (1 - a) + pixels[top + 1, left + 1] * a
                result[y, x] = upper * (1 - b) + lower * b
    return result


def forward_of(name, sign, size):
    width, height = size
    angle = math.radians(15.0 * sign)
    c, s = math.cos(angle), math.sin(angle)
    x, y = width / 2, height / 2
    return {
        "ShearX": [[1, 0.15 * sign, 0], [0, 1, 0]],
        "ShearY": [[1, 0, 0], [0.15 * sign, 1, 0]],
        "TranslateX": [[1, 0, -5.0 * sign], [0, 1, 0]],
        "TranslateY": [[1, 0, 0], [0, 1, -5.0 * sign]],
        # cv2.getRotationMatrix2D
        "Rotate": [[c, s, (1 - c) * x - s * y], [-s, c, s * x + (1 - c) * y]],
    }[name]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", ["ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"])
def test_geometry_matches_opencv_maps(name, sign):
    image = gradient()
    result = np.asarray(OPERATIONS[name](image, 5, FixedSign(sign > 0))).astype(float)
    expected = warp_slowly(image, forward_of(name, sign, image.size))
    inside = ~(expected == 128).all(axis=-1)
    # One ring along the moved border is left out: there the two libraries mix with the fill differently.
    assert inside.sum() > 0.5 * inside.size
    assert np.abs(result - expected)[inside].max() <= 2.0
    corner_is_grey = (result == 128).all(axis=-1)
    assert corner_is_grey.any()


def test_the_ten_operations_and_level_five():
    assert list(OPERATIONS) == [
        "Identity",
        "AutoContrast",
        "Brightness",
        "Sharpness",
        "Equalize",
        "ShearX",
        "ShearY",
        "TranslateX",
        "TranslateY",
        "Rotate",
    ]
    image = photo(1)
    for name in ("Identity", "Brightness", "Sharpness"):  # factor 5 / 10 * 1.8 + 0.1 = 1
        assert np.array_equal(np.asarray(OPERATIONS[name](image, 5, random.Random(0))), np.asarray(image))
    darker = OPERATIONS["Brightness"](image, 0, random.Random(0))
    assert np.abs(np.asarray(darker).astype(float) - np.asarray(image) * 0.1).max() <= 1
    assert np.asarray(OPERATIONS["AutoContrast"](gradient(), 5, random.Random(0))).max() == 255


def test_crop_shares_and_ratios():
    rng = random.Random(0)
    shares, ratios, lefts = [], [], []
    for _ in range(2000):
        left, top, right, bottom = crop_box(200, 200, (0.5, 1.0), rng)
        assert 0 <= left < right <= 200 and 0 <= top < bottom <= 200
        shares.append((right - left) * (bottom - top) / 40000)
        ratios.append((right - left) / (bottom - top))
        lefts.append(left)
    assert 0.49 < min(shares) < 0.52 and max(shares) > 0.9
    assert 0.74 < min(ratios) < 0.80 and 1.25 < max(ratios) < 1.345
    assert min(lefts) == 0 and max(lefts) > 30


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1, 1), (0, 0, 1, 1)),
        ((20000, 1), (9999, 0, 10000, 1)),
        ((1, 20000), (0, 9999, 1, 10000)),
        ((300, 30), (130, 0, 170, 30)),
        ((30, 300), (0, 130, 30, 170)),
    ],
)
def test_extreme_photos_fall_back_to_their_centre(size, expected):
    assert crop_box(*size, (0.5, 1.0), random.Random(0)) == expected
    view = TrainAugmentation(16)(Image.new("RGB", size, (9, 8, 7)), random.Random(3))
    assert view.size == (16, 16) and view.mode == "RGB"


def test_every_draw_comes_from_the_generator():
    augment = TrainAugmentation(24)
    image = photo(5).resize((60, 50))
    random.seed(0)
    first = [np.asarray(augment(image, random.Random(i))) for i in range(20)]
    random.seed(99)
    np.random.seed(99)
    second = [np.asarray(augment(image, random.Random(i))) for i in range(20)]
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert len({a.tobytes() for a in first}) == 20


def test_parts_switched_off():
    image = photo(7).resize((30, 20))
    plain = TrainAugmentation(16, scale=None, flip=False, randaugment=None)(image, random.Random(0))
    assert np.array_equal(np.asarray(plain), np.asarray(resized(image, 16)))
    flips = TrainAugmentation(16, scale=None, flip=True, randaugment=None)
    mirrored = np.asarray(plain)[:, ::-1]
    kinds = [np.array_equal(np.asarray(flips(image, random.Random(i))), mirrored) for i in range(400)]
    assert 150 < sum(kinds) < 250


def test_randaugment_applies_half_of_what_it_draws(monkeypatch):
    applied = []
    for name in OPERATIONS:
        monkeypatch.setitem(
            OPERATIONS, name, lambda image, level, rng, name=name: applied.append((name, level)) or image
        )
    augment = TrainAugmentation(8, scale=None, flip=False)
    for i in range(2000):
        augment(photo(0), random.Random(i))
    assert 1850 < len(applied) < 2150  # 2 draws x 0.5 each
    counts = {name: sum(1 for n, _ in applied if n == name) for name in OPERATIONS}
    assert min(counts.values()) > 130 and max(counts.values()) < 270
    assert {level for _, level in applied} == {5}


@pytest.mark.parametrize(
    "options", [{"image_size": 0}, {"scale": (0.9, 0.5)}, {"scale": (0, 1)}, {"randaugment": (2, 11)}]
)
def test_settings_are_checked(options):
    with pytest.raises(ValueError, match="must be"):
        TrainAugmentation(**{"image_size": 8, **options})


@pytest.mark.parametrize("level", [4, 5, 10])
def test_what_is_left_out_of_an_operation_changes_no_pixel(level):
    """A factor of 1 changes nothing, and whole pixels are copied: as Pillow's own enhancement and interpolation."""
    image = gradient(40, 30)
    factor = level / 10 * 1.8 + 0.1
    assert np.array_equal(OPERATIONS["Sharpness"](image, level, None), ImageEnhance.Sharpness(image).enhance(factor))
    assert np.array_equal(OPERATIONS["Brightness"](image, level, None), ImageEnhance.Brightness(image).enhance(factor))
    for positive in (True, False):
        moved = OPERATIONS["TranslateX"](image, level, FixedSign(positive))
        shift = level if positive else -level
        assert np.array_equal(moved, augment._affine(image, 1, 0, shift, 0, 1, 0))
        moved = OPERATIONS["TranslateY"](image, level, FixedSign(positive))
        assert np.array_equal(moved, augment._affine(image, 1, 0, 0, 0, 1, shift))


@pytest.mark.parametrize("size", [(400, 300), (201, 77), (64, 64), (30, 50)])
def test_a_resized_photo_is_that_of_pillow(size):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*reversed(size), 3), dtype=np.uint8))
    ours, theirs = resized(photo, 64), photo.resize((64, 64), Image.Resampling.BICUBIC)
    difference = np.abs(np.asarray(ours).astype(int) - np.asarray(theirs))
    assert difference.max() <= 1 and difference.mean() < 0.02  # both round, one of them from other weights


@pytest.mark.parametrize("scale", [None, (0.3, 1.0), (0.5, 0.9)])
def test_no_crop_of_a_photo_that_suffices_is_enlarged(scale):
    view = TrainAugmentation(64, scale=scale)
    draws = random.Random(0)
    seen = {True: 0, False: 0}
    for _ in range(400):
        width, height = draws.randrange(50, 400), draws.randrange(50, 400)
        suffices = view.suffices(width, height)
        seen[suffices] += 1
        if suffices:
            boxes = (
                [(0, 0, width, height)]
                if scale is None
                else [crop_box(width, height, scale, draws) for _ in "ten drawn"]
            )
            # a side is rounded to whole pixels
            assert all(min(right - left, bottom - top) >= 63 for left, top, right, bottom in boxes)
    assert min(seen.values()) > 20


def test_a_view_of_a_smaller_decoded_photo_is_that_of_the_whole_one(tmp_path):
    """A JPEG is decoded at the smallest scale that no crop enlarges: the same view but for the finest detail."""
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    coarse.resize((801, 599), Image.Resampling.BICUBIC).save(tmp_path / "photo.jpg", quality=90)
    view = TrainAugmentation(96)
    whole, small = (read_photo(tmp_path / "photo.jpg", suffices=one) for one in (None, view.suffices))
    assert whole.size == (801, 599) and small.size == (201, 150)
    still = TrainAugmentation(96, scale=None, randaugment=None, flip=False)
    views = [np.asarray(still(photo, random.Random(0))).astype(float) for photo in (whole, small)]
    assert np.abs(views[0] - views[1]).mean() < 2.0  # of 255; without smaller scales it is 0
    Image.open(tmp_path / "photo.jpg").save(tmp_path / "photo.png")
    assert read_photo(tmp_path / "photo.png", suffices=view.suffices).size == (801, 599)  # JPEG alone has scales
