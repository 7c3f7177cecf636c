"""Draw the demo's product catalogue: photos and titles of products that do not exist, from a seed, with Pillow alone.

    python demo/make_catalogue.py --output_dir demo/catalogue

About forty seconds on one core. Same settings, same bytes; a finished folder of the same settings is left as it is.

    --output_dir      folder to make; it must not hold anything else
    --seed            42
    --num_train       10000 photos to train on (one to three of each product)
    --num_validation  400 products to validate and as many to test, one photo each; an even number

A product is one choice of each attribute:

    product_type  mug t-shirt dress lamp chair backpack shoe bottle cushion clock umbrella hat
    colour        red orange yellow green turquoise blue purple pink
    pattern       plain striped dotted checked zigzag
    material      leather steel rubber (of the trim: handle, legs, sole, collar, ...)
    logo          star heart leaf moon
    quantity      1 2 3 4 (pieces in the photo)

23,040 products are possible. A quarter of the combinations of type, colour and pattern is kept for validation and
test: no photo to train on shows any of them, so both ask to put together what was learnt apart. Validation chooses the
epoch, test is measured. Each of their products has a twin in its split, which differs in exactly
one attribute. Titles are written as sellers write them, in several word orders,
with synonyms and advertising; only those to train on have typing errors or leave something out, so that each
validation title describes one photo of its split and no other.

What is written:

    data/train-0000x-of-0000y.parquet, data/validation-....parquet, data/test-....parquet
        columns image {bytes, path}, caption, product_id and the attributes; for `datasets` and `train.py --data_dir`
    tokenizer/       a lower-case WordPiece trained on the titles to train on, for `--tokenizer_name`
    catalogue.json   the settings
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
import os
import random
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFilter

from aliblip.data.wordpiece import train_wordpiece

# Raise it with every change of what is drawn or written: an older catalogue is then refused instead of silently kept.
VERSION = 3


class Mistake(ValueError):
    """Of whoever gave the settings; the message is the one line to show."""


# --- the attributes ---------------------------------------------------------------------------------------------------

COLOURS = {
    "red": (214, 26, 34),
    "orange": (246, 122, 8),
    "yellow": (250, 208, 0),
    "green": (24, 140, 44),
    "turquoise": (24, 190, 196),
    "blue": (24, 66, 206),
    "purple": (122, 36, 160),
    "pink": (250, 120, 184),
}
PATTERNS = ("plain", "striped", "dotted", "checked", "zigzag")
MATERIALS = {"leather": (132, 78, 34), "steel": (158, 168, 180), "rubber": (34, 34, 38)}
# The colour of the badge: of a logo eight pixels wide, the colour is seen before the shape.
LOGOS = {"star": (236, 150, 0), "heart": (214, 16, 44), "leaf": (18, 140, 46), "moon": (28, 58, 190)}
QUANTITIES = (1, 2, 3, 4)

# Shapes in a box of 100 x 100, y downwards. `back` and `front` are the trim, behind and before the body; `lines` are
# dark details; `logo` is (x, y, radius). Primitives: polygon points; (x0, y0, x1, y1) of an ellipse; a box with corner
# radius; an arc's box, start, end in degrees, width; a line's points with width.
# fmt: off
SHAPES = {
    "mug": {
        "back": [("arc", (48, 30, 96, 78), 0, 360, 12)],
        "body": [("box", (8, 16, 72, 92), 10)],
        "front": [("box", (5, 10, 75, 24), 6)],
        "logo": (40, 58, 18),
    },
    "t-shirt": {
        "body": [
            ("polygon", [(30, 8), (70, 8), (98, 30), (86, 52), (75, 44), (75, 94)]),
            ("polygon", [(25, 94), (25, 44), (14, 52), (2, 30), (30, 8), (75, 94)]),
        ],
        "front": [
            ("arc", (33, -10, 67, 24), 0, 180, 8), ("polygon", [(2, 30), (14, 52), (22, 47), (10, 24)]),
            ("polygon", [(98, 30), (86, 52), (78, 47), (90, 24)]), ("box", (25, 86, 75, 95), 0),
        ],
        "logo": (50, 52, 17),
    },
    "dress": {
        "back": [("line", [(36, 2), (36, 14)], 7), ("line", [(64, 2), (64, 14)], 7)],
        "body": [("polygon", [(32, 10), (50, 18), (68, 10), (63, 40), (96, 96), (4, 96), (37, 40)])],
        "front": [
            ("polygon", [(36, 35), (64, 35), (67, 47), (33, 47)]),
            ("polygon", [(7, 89), (93, 89), (98, 98), (2, 98)]),
        ],
        "logo": (50, 68, 16),
    },
    "lamp": {
        "back": [("box", (45, 50, 55, 92), 0), ("box", (24, 84, 76, 97), 6)],
        "body": [("polygon", [(28, 3), (72, 3), (97, 62), (3, 62)])],
        "logo": (50, 36, 17),
    },
    "chair": {
        "back": [
            ("polygon", [(20, 60), (31, 60), (27, 98), (16, 98)]),
            ("polygon", [(80, 60), (69, 60), (73, 98), (84, 98)]), ("box", (22, 76, 78, 83), 0),
        ],
        "body": [("box", (20, 2, 80, 52), 10), ("box", (8, 50, 92, 68), 6)],
        "lines": [("line", [(20, 51), (80, 51)], 2.5)],
        "logo": (50, 27, 17),
    },
    "backpack": {
        "back": [("arc", (34, 1, 66, 33), 180, 360, 8), ("box", (4, 42, 20, 84), 8), ("box", (80, 42, 96, 84), 8)],
        "body": [("box", (12, 12, 88, 97), 24)],
        "front": [("box", (12, 60, 88, 70), 0)],
        "lines": [("arc", (26, 62, 74, 92), 0, 180, 2.5)],
        "logo": (50, 37, 17),
    },
    "shoe": {
        "body": [("polygon", [(4, 20), (36, 16), (50, 38), (72, 46), (94, 56), (98, 76), (4, 76)])],
        "front": [("box", (2, 72, 98, 88), 6), ("line", [(40, 28), (52, 22)], 5), ("line", [(50, 39), (62, 32)], 5)],
        "logo": (26, 48, 16),
    },
    "bottle": {
        "body": [
            ("box", (24, 34, 76, 98), 10), ("polygon", [(41, 12), (59, 12), (59, 22), (75, 44), (25, 44), (41, 22)]),
        ],
        "front": [("box", (37, 1, 63, 16), 4), ("box", (24, 86, 76, 95), 0)],
        "logo": (50, 62, 17),
    },
    "cushion": {
        "back": [
            ("ellipse", (0, 0, 20, 20)), ("ellipse", (80, 0, 100, 20)), ("ellipse", (0, 80, 20, 100)),
            ("ellipse", (80, 80, 100, 100)),
        ],
        "body": [("polygon", [(8, 8), (50, 15), (92, 8), (85, 50), (92, 92), (50, 85), (8, 92), (15, 50)])],
        "logo": (50, 50, 18),
    },
    "clock": {
        "back": [
            ("ellipse", (6, 0, 40, 30)), ("ellipse", (60, 0, 94, 30)), ("line", [(26, 84), (16, 98)], 9),
            ("line", [(74, 84), (84, 98)], 9), ("ellipse", (6, 10, 94, 98)),
        ],
        "body": [("ellipse", (14, 18, 86, 90))],
        "lines": [("line", [(50, 54), (50, 26)], 5), ("line", [(50, 54), (74, 44)], 5)],
        "logo": (50, 69, 15),
    },
    "umbrella": {
        "back": [("box", (45, 0, 55, 84), 0), ("arc", (25, 68, 55, 98), 0, 180, 10)],
        "body": [("polygon", "canopy")],
        "logo": (50, 36, 16),
    },
    "hat": {
        "body": [("ellipse", (1, 58, 99, 90)), ("box", (22, 8, 78, 74), 20)],
        "front": [("box", (20, 58, 80, 70), 0)],
        "logo": (50, 35, 16),
    },
}
# fmt: on


class Product(NamedTuple):
    """One choice of each attribute; the fields are columns of the table."""

    product_type: str
    colour: str
    pattern: str
    material: str
    logo: str
    quantity: int

    @property
    def product_id(self) -> str:
        return "-".join(map(str, self))

    @property
    def held_out_by(self) -> tuple[str, str, str]:
        """What decides whether a product belongs to train or to validation."""
        return self.product_type, self.colour, self.pattern


CHOICES = Product(tuple(SHAPES), tuple(COLOURS), PATTERNS, tuple(MATERIALS), tuple(LOGOS), QUANTITIES)


def all_products() -> list[Product]:
    """Every possible product."""
    return [Product(*values) for values in itertools.product(*CHOICES)]


# --- which products ---------------------------------------------------------------------------------------------------


def choose_products(seed: int, num_train: int, num_validation: int) -> tuple[list[Product], ...]:
    """The products of the train photos (with repetition, `num_train` long), of the validation and of the test (each
    once, `num_validation` of both).

    Raises:
        Mistake: more than can be drawn.
    """
    rng = random.Random(f"products {seed}")
    triples = list(itertools.product(*CHOICES[:3]))
    held_out = set(rng.sample(triples, len(triples) // 4))

    products = all_products()
    candidates = [product for product in products if product.held_out_by in held_out]
    rng.shuffle(candidates)
    validation = _draw_with_twins(candidates, held_out, {}, num_validation, rng)

    pool = [product for product in products if product.held_out_by not in held_out]
    if num_train > len(pool):
        raise Mistake(f"--num_train is {num_train}: at most {len(pool)} photos can be drawn; give a lower number")
    rng.shuffle(pool)
    train = [product for product in pool for _ in range(rng.choice((1, 2, 2, 3)))][:num_train]
    rng.shuffle(train)
    validation_products = list(validation)
    rng.shuffle(validation_products)
    test_products = list(_draw_with_twins(candidates, held_out, validation, num_validation, rng))
    rng.shuffle(test_products)
    return train, validation_products, test_products


def _draw_with_twins(
    candidates: Sequence[Product], held_out: set, taken: dict[Product, None], count: int, rng: random.Random
) -> dict[Product, None]:
    """`count` products of the held-out combinations that are not taken, each with its twin, as a set with an order."""
    drawn: dict[Product, None] = {}
    attributes = itertools.cycle(range(len(Product._fields)))
    for product in candidates:
        if len(drawn) >= count:
            break
        # The attribute by which twins differ takes turns, as far as the held-out combinations allow it.
        attribute = next(attributes)
        twins = [product._replace(**{Product._fields[attribute]: value}) for value in CHOICES[attribute]]
        free = [t for t in twins if t.held_out_by in held_out and t not in taken and t not in drawn and t != product]
        if product not in taken and product not in drawn and free:
            drawn[product] = drawn[rng.choice(free)] = None
    if len(drawn) < count:
        most = len(drawn) + len(taken)
        raise Mistake(
            f"--num_validation is {count}, and as many to test: at most {most} products have a twin; give a lower one"
        )
    return drawn


# --- photos -----------------------------------------------------------------------------------------------------------

PHOTO = 96  # pixels of a side
_CANVAS = 2 * PHOTO  # drawn at twice the size: smooth edges
_SPRITE = 200
_UNIT = _SPRITE / 112  # pixels of a shape unit; the shape has a margin of 6 units
_INK = (26, 24, 30)
_WHITE = (252, 252, 250)

# Centres and size of the pieces, as shares of the photo.
_LAYOUTS = {
    1: (0.90, [(0.5, 0.5)]),
    2: (0.53, [(0.26, 0.5), (0.74, 0.5)]),
    3: (0.51, [(0.5, 0.26), (0.26, 0.74), (0.74, 0.74)]),
    4: (0.50, [(0.26, 0.26), (0.74, 0.26), (0.26, 0.74), (0.74, 0.74)]),
}


def _at(*values: float) -> list[float]:
    return [(value + 6) * _UNIT for value in values]


def _canopy() -> list[tuple[float, float]]:
    """Outline of an umbrella: half an ellipse above, three scallops below."""
    dome = [(50 - 48 * math.cos(a), 60 - 56 * math.sin(a)) for a in (math.pi * i / 24 for i in range(25))]
    hem = [(98 - 32 * i / 8, 60 - 7 * math.sin(math.pi * (i % 8) / 8)) for i in range(25)]
    return dome + hem


def _draw(image: Image.Image, primitives: Iterable[tuple], fill) -> None:
    draw = ImageDraw.Draw(image)
    for kind, geometry, *rest in primitives:
        if kind == "polygon":
            points = _canopy() if geometry == "canopy" else geometry
            draw.polygon([tuple(_at(*point)) for point in points], fill=fill)
        elif kind == "ellipse":
            draw.ellipse(_at(*geometry), fill=fill)
        elif kind == "box":
            draw.rounded_rectangle(_at(*geometry), radius=rest[0] * _UNIT, fill=fill)
        elif kind == "arc":
            draw.arc(_at(*geometry), rest[0], rest[1], fill=fill, width=round(rest[2] * _UNIT))
        else:
            draw.line([tuple(_at(*point)) for point in geometry], fill=fill, width=round(rest[0] * _UNIT))


@cache
def _masks(product_type: str, part: str) -> tuple[Image.Image, Image.Image]:
    """(the part with its dark outline, the part without)."""
    mask = Image.new("L", (_SPRITE, _SPRITE))
    _draw(mask, SHAPES[product_type].get(part, ()), 255)
    return mask.filter(ImageFilter.MaxFilter(5)), mask


@cache
def _texture(colour: tuple[int, int, int], pattern: str) -> Image.Image:
    """A sheet of the colour with the pattern in white; coarse, so that it still shows at 64 pixels."""
    image = Image.new("RGB", (_SPRITE, _SPRITE), colour)
    if pattern == "striped":
        _draw(image, [("box", (x, -6, x + 9, 106), 0) for x in range(-4, 106, 18)], _WHITE)
    elif pattern == "dotted":
        rows = enumerate(range(-4, 110, 14))
        centres = [(x + 11 * (row % 2), y) for row, y in rows for x in range(-5, 106, 22)]
        _draw(image, [("ellipse", (x - 5.5, y - 5.5, x + 5.5, y + 5.5)) for x, y in centres], _WHITE)
    elif pattern == "checked":
        squares = [(x, y) for x in range(-6, 106, 15) for y in range(-6, 106, 15) if (x + y) // 15 % 2]
        _draw(image, [("box", (x, y, x + 15, y + 15), 0) for x, y in squares], _WHITE)
    elif pattern == "zigzag":
        zigzags = [[(x, y + 14 * (i % 2)) for i, x in enumerate(range(-8, 110, 12))] for y in range(-14, 106, 20)]
        _draw(image, [("line", points, 8) for points in zigzags], _WHITE)
    return image


def _logo(image: Image.Image, logo: str, x: float, y: float, radius: float) -> None:
    """The logo in white on a badge of its colour, with a white and a dark rim: it stands out from any body."""
    for r, colour in ((radius + 2, _INK), (radius + 0.5, _WHITE), (radius - 1.5, LOGOS[logo])):
        _draw(image, [("ellipse", (x - r, y - r, x + r, y + r))], colour)
    r = 0.85 * (radius - 1.5)
    if logo == "star":
        spikes = [(r * (1, 0.42)[i % 2], math.pi * (i / 5 - 0.5)) for i in range(10)]
        shape = [("polygon", [(x + s * math.cos(a), y + s * math.sin(a)) for s, a in spikes])]
    elif logo == "heart":
        shape = [
            ("ellipse", (x - 0.86 * r, y - 0.75 * r, x + 0.04 * r, y + 0.15 * r)),
            ("ellipse", (x - 0.04 * r, y - 0.75 * r, x + 0.86 * r, y + 0.15 * r)),
            ("polygon", [(x - 0.8 * r, y), (x, y - 0.35 * r), (x + 0.8 * r, y), (x, y + 0.9 * r)]),
        ]
    elif logo == "leaf":
        half = [(i / 8 * 2 - 1, math.sin(math.pi * i / 8)) for i in range(9)]
        rim = [(t, 0.52 * s) for t, s in half] + [(t, -0.52 * s) for t, s in reversed(half)]
        shape = [("polygon", [(x + r * 0.75 * (t - s), y - r * 0.75 * (t + s)) for t, s in rim])]
    else:
        shape = [("ellipse", (x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r))]
    _draw(image, shape, _WHITE)
    if logo == "moon":
        _draw(image, [("ellipse", (x - 0.2 * r, y - 0.85 * r, x + 1.1 * r, y + 0.45 * r))], LOGOS[logo])


@cache
def _piece(product: Product) -> Image.Image:
    """One piece of a product, upright on a transparent ground, RGBA."""
    shape = SHAPES[product.product_type]
    image = Image.new("RGB", (_SPRITE, _SPRITE), _INK)
    alpha = Image.new("L", image.size)
    trim = MATERIALS[product.material]
    for part, texture in (
        ("back", _texture(trim, "plain")),
        ("body", _texture(COLOURS[product.colour], product.pattern)),
        ("front", _texture(trim, "plain")),
    ):
        if part in shape:
            outlined, inner = _masks(product.product_type, part)
            image.paste(_INK, mask=outlined)
            image.paste(texture, mask=inner)
            alpha.paste(255, mask=outlined)
    _draw(image, shape.get("lines", ()), _INK)
    _logo(image, product.logo, *shape["logo"])
    image.putalpha(alpha)
    return image


def draw_photo(product: Product, rng: random.Random) -> bytes:
    """A JPEG of 96 x 96 pixels; every draw comes from `rng`."""
    shade = rng.randint(228, 250)
    ground = tuple(min(255, shade + rng.randint(-5, 5)) for _ in range(3))
    canvas = Image.new("RGB", (_CANVAS, _CANVAS), ground)
    if rng.random() < 0.5:  # on a table
        table = tuple(value - rng.randint(10, 24) for value in ground)
        canvas.paste(table, (0, rng.randint(_CANVAS // 2, _CANVAS * 7 // 8), _CANVAS, _CANVAS))

    size, centres = _LAYOUTS[product.quantity]
    size *= rng.uniform(0.9, 1.0)
    side = round(_CANVAS * size)
    piece = _piece(product).resize((side, side), Image.Resampling.BILINEAR, reducing_gap=1.5)
    jitter = 0.04 if product.quantity == 1 else 0.015
    shadow = tuple(round(value * 0.8) for value in ground)
    for x, y in centres:
        turned = piece.rotate(rng.uniform(-6, 6), Image.Resampling.BILINEAR)
        left = round(_CANVAS * (x + rng.uniform(-jitter, jitter)) - side / 2)
        top = round(_CANVAS * (y + rng.uniform(-jitter, jitter)) - side / 2)
        canvas.paste(shadow, (left + 4, top + 4), turned.getchannel("A"))
        canvas.paste(turned, (left, top), turned)

    photo = canvas.reduce(2)
    noise = Image.frombytes("RGB", photo.size, rng.randbytes(3 * PHOTO * PHOTO))
    photo = Image.blend(photo, noise, rng.uniform(0.0, 0.05))
    photo = photo.point([round(level) for level in _levels(rng.uniform(0.9, 1.06))] * 3)
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG", quality=rng.randint(78, 95))
    return buffer.getvalue()


def _levels(brightness: float) -> list[float]:
    return [min(255.0, value * brightness) for value in range(256)]


# --- titles -----------------------------------------------------------------------------------------------------------

# The first of each is the most frequent.
TYPE_WORDS = {
    "mug": ("mug", "coffee cup"),
    "t-shirt": ("t-shirt", "tee"),
    "dress": ("dress", "gown"),
    "lamp": ("lamp", "table light"),
    "chair": ("chair", "seat"),
    "backpack": ("backpack", "rucksack"),
    "shoe": ("shoe", "sneaker"),
    "bottle": ("bottle", "flask"),
    "cushion": ("cushion", "pillow"),
    "clock": ("clock", "alarm clock"),
    "umbrella": ("umbrella", "parasol"),
    "hat": ("hat", "fedora"),
}
COLOUR_WORDS = {
    "red": ("red", "scarlet"),
    "orange": ("orange",),
    "yellow": ("yellow", "lemon"),
    "green": ("green", "emerald"),
    "turquoise": ("turquoise", "aqua"),
    "blue": ("blue", "cobalt"),
    "purple": ("purple", "violet"),
    "pink": ("pink",),
}
PATTERN_WORDS = {
    "plain": ("plain", "solid colour"),
    "striped": ("striped", "stripes"),
    "dotted": ("dotted", "polka dot"),
    "checked": ("checked", "chequered"),
    "zigzag": ("zigzag", "chevron"),
}
MATERIAL_WORDS = {
    "leather": ("leather trim", "leather details"),
    "steel": ("steel trim", "metal details"),
    "rubber": ("rubber trim", "rubber details"),
}
LOGO_WORDS = {logo: (f"{logo} logo", f"{logo} badge") for logo in LOGOS}
QUANTITY_WORDS = {
    1: ("1 pc", "single"),
    2: ("2 pcs", "set of 2", "double pack"),
    3: ("3 pcs", "set of 3", "triple pack"),
    4: ("4 pcs", "set of 4", "pack of 4"),
}
WORDS = Product(TYPE_WORDS, COLOUR_WORDS, PATTERN_WORDS, MATERIAL_WORDS, LOGO_WORDS, QUANTITY_WORDS)

# Every order names all attributes; a part that is left out takes its joining words with it.
ORDERS = (
    ("{quantity}", "{colour}", "{pattern}", "{product_type}", "with {logo}", "and {material}"),
    ("{product_type}", "{colour}", "{pattern}", "{material}", "{logo}", "{quantity}"),
    ("{colour}", "{product_type}", "{pattern}", "- {logo}", "- {material}", "- {quantity}"),
    ("{pattern}", "{product_type}", "in {colour}", "{quantity}", "{logo}", "{material}"),
    ("{logo}", "{product_type}", "{pattern}", "{colour}", ", {material}", ", {quantity}"),
    ("{material}", "{colour}", "{pattern}", "{product_type}", "{quantity}", "with {logo}"),
)
BEFORE = ("new", "hot sale", "best price", "original", "top quality", "sale")
AFTER = ("free shipping", "gift idea", "in stock", "wholesale", "best seller", "for home & office")


def write_title(product: Product, rng: random.Random, clean: bool) -> str:
    """A seller's title. `clean` ones name every attribute and have no typing error; every draw comes from `rng`."""
    words = {
        field: options[value][0] if rng.random() < 0.6 else rng.choice(options[value])
        for field, value, options in zip(Product._fields, product, WORDS, strict=True)
    }
    order = list(rng.choice(ORDERS))
    if not clean and rng.random() < 0.08:
        left_out = rng.choice([part for part in order if "{product_type}" not in part])
        order.remove(left_out)
    title = " ".join(order).format(**words).replace(" ,", ",")
    if rng.random() < 0.3:
        title = f"{rng.choice(BEFORE)} {title}"
    if rng.random() < 0.3:
        title = f"{title} {rng.choice(AFTER)}"
    if not clean and rng.random() < 0.1:
        title = _mistype(title, rng)
    return _shout(title, rng)


def _mistype(title: str, rng: random.Random) -> str:
    """Drop, double or swap a letter inside one of the longer words."""
    parts = title.split(" ")
    index = rng.choice([i for i, part in enumerate(parts) if len(part) > 3])
    word = parts[index]
    at = rng.randrange(1, len(word) - 1)
    parts[index] = rng.choice(
        (
            word[:at] + word[at + 1 :],
            word[:at] + word[at] + word[at:],
            word[: at - 1] + word[at] + word[at - 1] + word[at + 1 :],
        )
    )
    return " ".join(parts)


def _shout(title: str, rng: random.Random) -> str:
    """Some sellers capitalise, some shout a word or everything."""
    style = rng.random()
    if style < 0.2:
        return title.title().replace("T-Shirt", "T-shirt")
    if style < 0.3:
        parts = title.split(" ")
        parts[0] = parts[0].upper()
        return " ".join(parts)
    return title.upper() if style < 0.36 else title


# --- files ------------------------------------------------------------------------------------------------------------

_ROWS_PER_SHARD = 1250
_FEATURES = {
    "image": {"_type": "Image"},
    "caption": {"dtype": "string", "_type": "Value"},
    "product_id": {"dtype": "string", "_type": "Value"},
    **{name: {"dtype": "string", "_type": "Value"} for name in Product._fields[:-1]},
    "quantity": {"dtype": "int64", "_type": "Value"},
}
_SCHEMA = pa.schema(
    [
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        *[(name, pa.int64() if name == "quantity" else pa.string()) for name in _FEATURES if name != "image"],
    ],
    metadata={"huggingface": json.dumps({"info": {"features": _FEATURES}})},  # lets `datasets` decode the photos
)


def make_rows(products: Sequence[Product], split: str, seed: int) -> Iterator[dict]:
    """The rows of a split. Each has its own random numbers: row i does not depend on how many there are."""
    for index, product in enumerate(products):
        rng = random.Random(f"{split} {index} {seed}")
        yield {
            "image": {"bytes": draw_photo(product, rng), "path": f"{split}-{index:05d}.jpg"},
            "caption": write_title(product, rng, clean=split != "train"),
            "product_id": product.product_id,
            **product._asdict(),
        }


def write_split(folder: Path, split: str, rows: Sequence[dict]) -> None:
    """Parquet shards of about equal size."""
    shards = math.ceil(len(rows) / _ROWS_PER_SHARD)
    for shard in range(shards):
        part = rows[len(rows) * shard // shards : len(rows) * (shard + 1) // shards]
        # Photos are compressed already.
        pq.write_table(
            pa.Table.from_pylist(part, schema=_SCHEMA),
            folder / f"{split}-{shard:05d}-of-{shards:05d}.parquet",
            row_group_size=256,
            compression="NONE",
        )


def write_tokenizer(folder: Path, titles: Sequence[str]) -> int:
    """Learn a WordPiece from the titles and save it so that `AutoTokenizer` loads it; returns its size."""
    tokenizer = train_wordpiece(titles, vocab_size=800, min_frequency=3)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def make_catalogue(output_dir: str | Path, seed: int = 42, num_train: int = 10000, num_validation: int = 400) -> str:
    """Make the catalogue, whole or not at all; returns one line that says what there is now.

    Raises:
        Mistake: a number out of range, or a folder that holds something else.
    """
    if num_train < 1:
        raise Mistake(f"--num_train is {num_train}: it must be at least 1")
    if num_validation < 2 or num_validation % 2:
        raise Mistake(
            f"--num_validation is {num_validation}: it must be an even number of at least 2 (products have twins)"
        )
    output = Path(output_dir)
    settings = {"version": VERSION, "seed": seed, "num_train": num_train, "num_validation": num_validation}
    if _finished(output, settings):
        return (
            f"{output} is up to date (seed {seed}, {num_train} photos to train on, {num_validation} to validate, "
            f"{num_validation} to test)"
        )

    train, validation, test = choose_products(seed, num_train, num_validation)
    # In the same folder, so that the last step is a rename and nobody ever sees half a catalogue.
    partial = output.resolve().with_name(f".{output.resolve().name}.partial-{os.getpid()}")
    try:
        (partial / "data").mkdir(parents=True)
        rows = {
            name: list(make_rows(products, name, seed))
            for name, products in (("train", train), ("validation", validation), ("test", test))
        }
        for name in rows:
            write_split(partial / "data", name, rows[name])
        tokens = write_tokenizer(partial / "tokenizer", [row["caption"] for row in rows["train"]])
        _write_json(partial / "catalogue.json", settings)
        partial.replace(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return (
        f"{output}: {num_train} photos of {len(set(train))} products to train on, "
        f"{num_validation} products to validate and {num_validation} to test, {tokens} word pieces (seed {seed})"
    )


def _finished(output: Path, settings: dict) -> bool:
    """Whether the folder holds the catalogue of these settings; one that holds anything else is an error."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    advice = "delete it or give another --output_dir"
    try:
        found = json.loads((output / "catalogue.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise Mistake(f"'{output}' exists and is not a catalogue: {advice}") from None
    if found != settings:
        raise Mistake(f"'{output}' holds a catalogue of other settings, {json.dumps(found)}: {advice}")
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="demo/catalogue")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--num_train", type=int, default=10000)
    parser.add_argument("--num_validation", type=int, default=400)
    args = parser.parse_args()
    try:
        print(make_catalogue(args.output_dir, args.seed, args.num_train, args.num_validation))
    except Mistake as error:
        print(f"make_catalogue.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
