"""Small catalogues as people have them: photos of one colour each, titles, and tables written by hand."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_stub import add_member
from PIL import Image

from aliblip.data.rows import decode
from aliblip.data.sources import Reading, open_source
from aliblip.runtime.mistakes import UsageError
from reading_aliblip import UnusableItem

COUNT = 12
TITLES = [f"mug no {i}" for i in range(COUNT)]
NAMES = [f"{i:02d}.png" for i in range(COUNT)]


def picture(i: int) -> bytes:
    """A PNG whose colour tells its number."""
    stream = io.BytesIO()
    Image.new("RGB", (5, 4), (i, 100, 200)).save(stream, "PNG")
    return stream.getvalue()


def draw(folder: Path, names=NAMES) -> Path:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(i))
    return folder


def lines(rows, header=("file_name", "caption"), **options) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n", **options)
    writer.writerow(header)
    writer.writerows(rows)
    return stream.getvalue()


def json_lines(records: list[Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def pairs(names=NAMES, titles=TITLES) -> list[tuple[str, str]]:
    return list(zip(names, titles, strict=True))


def records(first: str = "image", second: str = "caption", names=NAMES, titles=TITLES) -> list[dict]:
    return [{first: name, second: title} for name, title in pairs(names, titles)]


def parquet(path: Path, rows, **columns) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    photos = pa.array([picture(i) for i in rows], pa.binary())
    pq.write_table(pa.table({"image": photos, "caption": [TITLES[i] for i in rows], **columns}), path)
    return path


def tar(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for i in rows:
            add_member(archive, f"{i:03d}.png", picture(i))
            add_member(archive, f"{i:03d}.txt", TITLES[i].encode())
    return path


def open_at(folder: Path | str | None = None, split: str = "train", **options):
    return open_source(data_dir=None if folder is None else str(folder), split=split, **options)


def read(source) -> tuple[list[tuple[int | None, str | None]], list[str]]:
    """[(number of the photo, title)] of the usable rows, and the reasons of the others."""
    found, reasons = [], []
    for row in source.read_range(0, source.num_rows):
        try:
            example = decode(row, source.sides)
        except UnusableItem as error:
            reasons.append(str(error))
            continue
        number = None if example.image is None else example.image.getpixel((0, 0))[0]
        found.append((number, example.text))
    return found, reasons


def all_rows() -> list[tuple[int, str]]:
    return list(enumerate(TITLES))


def whole(source) -> None:
    """Assert that a source gives all of `TITLES`, each with its photo."""
    assert read(source) == (all_rows(), [])
    assert source.num_rows == COUNT


def opened(folder: Path, data: str | bytes, name="metadata.csv", **reading):
    """A folder with such a table, opened."""
    (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return open_at(folder, reading=Reading(**reading))


def refused(folder: Path, data: str | bytes, name="metadata.csv", **reading) -> str:
    """The one line in which a folder with such a table is refused."""
    with pytest.raises(UsageError) as caught:
        opened(folder, data, name, **reading)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def titles(source) -> list[str]:
    found, reasons = read(source)
    assert not reasons
    return [title for _, title in found]


def told(source) -> str:
    return "\n".join(source.report())
