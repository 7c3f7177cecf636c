"""Catalogues that are drawn to be prepared, and what came of them."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

needs_prepare = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("datatrove", "ftfy", "lingua", "threadpoolctl")),
    reason="the extra 'prepare' is not installed",
)


def picture(number: int, size: tuple[int, int] = (96, 80)) -> Image.Image:
    """A photo with a few large shapes, which differs for every number."""
    rng = np.random.default_rng(number)
    cells = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    return cells.resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, quality: int = 90) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def draw(folder: Path, count: int, broken: int = 7, products: int = 2) -> list[str]:
    """A JSON list and its photos, of which every `broken`th is none (0: all are good).

    Returns:
        the flags that read it.
    """
    photos = folder / "photos"
    photos.mkdir(parents=True)
    rows = []
    for i in range(count):
        name = f"{i:04d}.jpg"
        (photos / name).write_bytes(b"no photo" if broken and i % broken == 3 else encoded(picture(i)))
        rows.append({"product": name, "caption": f"thing {i}", "product_id": f"P{i // products}", "price": i / 2})
    (folder / "train.json").write_text(json.dumps(rows))
    return ["--train_file", str(folder / "train.json"), "--image_dir", str(photos)]


def files_of(folder: Path) -> dict[str, str]:
    """Digests of all files, by their paths."""
    return {
        str(path.relative_to(folder)): hashlib.blake2b(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def rows_of(folder: Path, split: str = "train") -> list[dict]:
    """All rows of a split, in order."""
    files = sorted((folder / "data").glob(f"{split}-*.parquet"))
    return pa.concat_tables([pq.read_table(file) for file in files]).to_pylist()


def rejected_of(folder: Path) -> dict[int, str]:
    """Row -> reason."""
    table = pq.read_table(folder / "rejected.parquet")
    return dict(zip(table["source_row"].to_pylist(), table["reason"].to_pylist(), strict=True))
