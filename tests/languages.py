"""A small catalogue of everyday things: each photo a shape in a colour, with titles in several scripts."""

from __future__ import annotations

import csv
import io
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageChops, ImageDraw

THINGS = {
    "cup": ("杯子", "bēizi", "чашка", "فنجان"),
    "lamp": ("台灯", "táidēng", "лампа", "مصباح"),
    "bag": ("书包", "shūbāo", "сумка", "حقيبة"),
    "clock": ("时钟", "shízhōng", "часы", "ساعة"),
    "chair": ("椅子", "yǐzi", "стул", "كرسي"),
}
COLOURS = {
    "red": ("红色", "hóngsè", "красный", "أحمر"),
    "green": ("绿色", "lǜsè", "зелёный", "أخضر"),
    "blue": ("蓝色", "lánsè", "синий", "أزرق"),
    "yellow": ("黄色", "huángsè", "жёлтый", "أصفر"),
    "black": ("黑色", "hēisè", "чёрный", "أسود"),
}
RGB = {
    "red": (215, 30, 30),
    "green": (30, 150, 50),
    "blue": (30, 60, 210),
    "yellow": (240, 210, 20),
    "black": (15, 15, 15),
}
PRODUCTS = [(thing, colour) for thing in THINGS for colour in COLOURS]
LANGUAGES = ("Chinese", "pinyin", "Russian", "Arabic", "mixed")


def title(thing: str, colour: str, language: str) -> str:
    if language == "mixed":
        return f"{COLOURS[colour][2]} {THINGS[thing][0]} {colour} {thing}"
    of = LANGUAGES.index(language)
    words = (THINGS[thing][of], COLOURS[colour][of])
    # An adjective goes behind in Arabic; Chinese has no spaces.
    return (
        "".join(reversed(words)) if language == "Chinese" else " ".join(words if language == "Arabic" else words[::-1])
    )


def draw(thing: str, colour: str, seed: int) -> bytes:
    rng = random.Random(f"{thing} {colour} {seed}")
    image = Image.new("RGB", (32, 32), tuple(rng.randrange(225, 256) for _ in range(3)))
    pen, x, y, size = ImageDraw.Draw(image), rng.randrange(1, 5), rng.randrange(1, 5), rng.randrange(24, 28)
    box, fill = (x, y, x + size, y + size), RGB[colour]
    if thing == "cup":
        pen.rectangle((x, y + size // 2, x + size, y + size), fill=fill)
    elif thing == "lamp":
        pen.polygon([(x + size // 2, y), (x, y + size), (x + size, y + size)], fill=fill)
    elif thing == "bag":
        pen.rectangle(box, fill=fill)
    elif thing == "clock":
        pen.ellipse(box, outline=fill, width=5)
    else:
        pen.line([(x + 2, y), (x + 2, y + size)], fill=fill, width=5)
        pen.line([(x, y + size - 2), (x + size, y + size - 2)], fill=fill, width=5)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def write_catalogue(folder: Path, photos: int) -> None:
    """Splits "train", of so many photos of each product and language, and "validation", of one."""
    folder.mkdir(parents=True)
    for split, count, first in (("train", photos, 0), ("validation", 1, 1000)):
        rows = [
            {
                "image": {"bytes": draw(thing, colour, first + number * 10 + at), "path": None},
                "caption": title(thing, colour, language),
                "product_id": f"{thing}-{colour}",
                "language": language,
            }
            for number in range(count)
            for thing, colour in PRODUCTS
            for at, language in enumerate(LANGUAGES)
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")


# --- a shop, with more of each ----------------------------------------------------------------------------------------

PATTERNS = {
    "plain": ("纯色", "chúnsè", "однотонный", "سادة"),
    "striped": ("条纹", "tiáowén", "полосатый", "مخطط"),
    "dotted": ("圆点", "yuándiǎn", "пятнистый", "منقط"),
    "checked": ("格子", "gézi", "клетчатый", "مربعات"),
}
GROUNDS = {
    "white": ("白底", "báidǐ", "на белом", "على أبيض"),
    "grey": ("灰底", "huīdǐ", "на сером", "على رمادي"),
    "pink": ("粉底", "fěndǐ", "на розовом", "على وردي"),
}
GROUND_RGB = {"white": (250, 250, 250), "grey": (160, 160, 160), "pink": (250, 190, 205)}
SHOP = [(*product, pattern, ground) for product in PRODUCTS for pattern in PATTERNS for ground in GROUNDS]


def shop_title(thing: str, colour: str, pattern: str, ground: str, language: str) -> str:
    if language == "mixed":
        return f"{title(thing, colour, language)} {PATTERNS[pattern][0]} {GROUNDS[ground][2]}"
    of = LANGUAGES.index(language)
    more = (PATTERNS[pattern][of], GROUNDS[ground][of])
    return ("" if language == "Chinese" else " ").join((title(thing, colour, language), *more))


def shop_photo(thing: str, colour: str, pattern: str, ground: str, seed: int) -> Image.Image:
    """The thing in its colour with a pattern over it, on its ground."""
    drawn = Image.open(io.BytesIO(draw(thing, colour, seed)))
    mask = Image.eval(
        ImageChops.difference(drawn, Image.new("RGB", drawn.size, drawn.getpixel((0, 0)))).convert("L"), bool
    )
    pen = ImageDraw.Draw(drawn)
    for at in range(0, 32, 6):
        if pattern in ("striped", "checked"):
            pen.line([(0, at), (32, at)], fill=(245, 245, 245), width=2)
        if pattern == "checked":
            pen.line([(at, 0), (at, 32)], fill=(245, 245, 245), width=2)
        for across in range(0, 32, 6) if pattern == "dotted" else ():
            pen.ellipse([(at, across), (at + 2, across + 2)], fill=(245, 245, 245))
    return Image.composite(drawn, Image.new("RGB", drawn.size, GROUND_RGB[ground]), mask.point(lambda on: 255 * on))


def write_shop(folder: Path) -> None:
    """A spreadsheet beside a folder of photos: of each product one in each language."""
    (folder / "photos").mkdir(parents=True)
    lines = [("photo", "title", "product_id", "language")]
    for number, product in enumerate(SHOP):
        for at, language in enumerate(LANGUAGES):
            name = f"{number:03d}-{at}.png"
            shop_photo(*product, seed=number * 10 + at).save(folder / "photos" / name)
            lines.append((f"photos/{name}", shop_title(*product, language), f"SKU-{number:03d}", language))
    with open(folder / "catalogue.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(lines)
