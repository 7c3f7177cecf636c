"""BLIP's training augmentation in Pillow and torch: random resized crop, flip, RandAugment 2 x 5 of ten operations.

These alone, so that the pixels do not depend on whether torchvision or OpenCV happen to be installed. The operations
follow BLIP's `transform/randaugment.py`, which runs on OpenCV: same maps, same fill, same draws; only its interpolation
along the border of a rotated photo differs by a pixel.
"""

from __future__ import annotations

import math
import random

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps

__all__ = ["OPERATIONS", "TrainAugmentation"]

MAX_LEVEL = 10
TRANSLATE_PIXELS = 10.0  # at MAX_LEVEL
SHEAR = 0.3  # at MAX_LEVEL
ROTATE_DEGREES = 30.0  # at MAX_LEVEL
FILL = (128, 128, 128)
PROBABILITY = 0.5  # that a drawn operation is applied
CROP_RATIO = (3 / 4, 4 / 3)  # of width to height


def _affine(image: Image.Image, a: float, b: float, c: float, d: float, e: float, f: float) -> Image.Image:
    """Output pixel (x, y) from input (a x + b y + c, d x + e y + f), in pixel indices as OpenCV counts them."""
    # Pillow maps pixel centres, which lie half a pixel off the indices.
    c += 0.5 - 0.5 * (a + b)
    f += 0.5 - 0.5 * (d + e)
    return image.transform(
        image.size, Image.Transform.AFFINE, (a, b, c, d, e, f), resample=Image.Resampling.BILINEAR, fillcolor=FILL
    )


def _signed(value: float, rng: random.Random) -> float:
    return -value if rng.random() > 0.5 else value


def _enhancement(level: float) -> float:
    return level / MAX_LEVEL * 1.8 + 0.1  # level 5 gives exactly 1, no change, as in BLIP


def _identity(image, level, rng):
    return image


def _auto_contrast(image, level, rng):
    return ImageOps.autocontrast(image)


def _equalize(image, level, rng):
    return ImageOps.equalize(image)


def _brightness(image, level, rng):
    return _enhanced(ImageEnhance.Brightness, image, _enhancement(level))


def _sharpness(image, level, rng):
    return _enhanced(ImageEnhance.Sharpness, image, _enhancement(level))


def _enhanced(enhancer, image: Image.Image, factor: float) -> Image.Image:
    return image if factor == 1.0 else enhancer(image).enhance(factor)


def _shear_x(image, level, rng):
    return _affine(image, 1, -_signed(level / MAX_LEVEL * SHEAR, rng), 0, 0, 1, 0)


def _shear_y(image, level, rng):
    return _affine(image, 1, 0, 0, -_signed(level / MAX_LEVEL * SHEAR, rng), 1, 0)


def _translate_x(image, level, rng):
    return _translated(image, _signed(level / MAX_LEVEL * TRANSLATE_PIXELS, rng), 0.0)


def _translate_y(image, level, rng):
    return _translated(image, 0.0, _signed(level / MAX_LEVEL * TRANSLATE_PIXELS, rng))


def _translated(image: Image.Image, x: float, y: float) -> Image.Image:
    if not (x.is_integer() and y.is_integer()):
        return _affine(image, 1, 0, x, 0, 1, y)
    moved = Image.new(image.mode, image.size, FILL)  # whole pixels: a copy gives the same, in a hundredth of the time
    moved.paste(image, (round(-x), round(-y)))
    return moved


def _rotate(image, level, rng):
    degrees = _signed(level / MAX_LEVEL * ROTATE_DEGREES, rng)
    # OpenCV turns about pixel index (W/2, H/2); Pillow counts from the pixel's corner.
    center = (image.width / 2 + 0.5, image.height / 2 + 0.5)
    return image.rotate(degrees, resample=Image.Resampling.BILINEAR, center=center, fillcolor=FILL)


OPERATIONS = {
    "Identity": _identity,
    "AutoContrast": _auto_contrast,
    "Brightness": _brightness,
    "Sharpness": _sharpness,
    "Equalize": _equalize,
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateX": _translate_x,
    "TranslateY": _translate_y,
    "Rotate": _rotate,
}


class TrainAugmentation:
    """A training view of one photo.

    Args:
        image_size: side of the result in pixels.
        scale: range of the crop's share of the area, or None to resize the whole photo.
        flip: whether half of the photos are mirrored.
        randaugment: (operations per photo, level 0 to 10), or None for no RandAugment.

    Raises:
        ValueError: a setting is out of its range.

    RandAugment: https://arxiv.org/abs/1909.13719; the recipe: BLIP, https://arxiv.org/abs/2201.12086.
    """

    def __init__(
        self,
        image_size: int,
        scale: tuple[float, float] | None = (0.5, 1.0),
        flip: bool = True,
        randaugment: tuple[int, float] | None = (2, 5),
    ):
        if image_size < 1:
            raise ValueError(f"image_size is {image_size}: it must be at least 1 pixel")
        if scale is not None and not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale is {scale}: it must be two shares of the area with 0 < low <= high <= 1")
        if randaugment is not None and not (randaugment[0] >= 0 and 0 <= randaugment[1] <= MAX_LEVEL):
            raise ValueError(f"randaugment is {randaugment}: it must be (operations >= 0, level 0 to {MAX_LEVEL})")
        self.image_size = image_size
        self.scale = scale
        self.flip = flip
        self.randaugment = randaugment

    def suffices(self, width: int, height: int) -> bool:
        """Whether a view of a photo of (width, height) pixels is never enlarged, whatever crop is drawn."""
        least = min(width, height)
        if self.scale is not None:
            least = min(least, math.sqrt(width * height * self.scale[0] * CROP_RATIO[0]))
        return least >= self.image_size

    def __call__(self, image: Image.Image, rng: random.Random) -> Image.Image:
        """An RGB photo of any size to a view of (image_size, image_size); every draw comes from `rng`."""
        if self.scale is not None:
            image = image.crop(crop_box(image.width, image.height, self.scale, rng))
        image = resized(image, self.image_size)
        if self.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.randaugment is not None:
            count, level = self.randaugment
            for name in rng.choices(list(OPERATIONS), k=count):
                if rng.random() <= PROBABILITY:
                    image = OPERATIONS[name](image, level, rng)
        return image


def resized(image: Image.Image, side: int) -> Image.Image:
    """An RGB photo to a square of `side` pixels, bicubic: Pillow's filter in torch, in a fifth of the time. Where both
    round differently, a value differs by 1."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]  # (1, 3, H, W)
    square = F.interpolate(pixels, size=(side, side), mode="bicubic", antialias=True)
    return Image.merge("RGB", [Image.fromarray(band) for band in square[0].numpy()])


def crop_box(
    width: int, height: int, scale: tuple[float, float], rng: random.Random, ratio: tuple[float, float] = CROP_RATIO
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a random crop, as torchvision's RandomResizedCrop draws it.

    Ten tries at a share of the area within `scale` and a log-uniform ratio of sides; a photo too narrow for all of them
    gives its largest central part within `ratio`.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        sides = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * sides)), round(math.sqrt(area / sides))
        if 0 < w <= width and 0 < h <= height:
            top, left = rng.randint(0, height - h), rng.randint(0, width - w)
            return left, top, left + w, top + h
    if width / height < ratio[0]:
        w, h = width, max(1, min(height, round(width / ratio[0])))
    elif width / height > ratio[1]:
        w, h = max(1, min(width, round(height * ratio[1]))), height
    else:
        w, h = width, height
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
