"""A processor of ten lines, and small catalogues in every layout, for the tests of the data path."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from aliblip.data.columns import Asked, Columns, Request
from aliblip.data.rows import Row, Source

# Of `write_layouts`, those that `open_source` opens with split "train".
NAMES = (
    "parquet",
    "parquet by name",
    "parquet glob",
    "parquet sub-folders",
    "parquet of paths",
    "tars",
    "tars of text members",
    "folder",
    "folder with csv",
    "json list",
    "json lines",
)


class StubProcessor:
    """Pixels / 255 at `size`, and one token per character."""

    def __init__(self, size: int = 8, max_length: int = 35):
        self.image_processor = SimpleNamespace(size={"height": size, "width": size})
        self.max_length = max_length

    def __call__(self, images, text, return_tensors, padding, truncation, max_length=None):
        ids = [[ord(c) % 1000 + 1 for c in title][: max_length or self.max_length] for title in text]
        longest = max(map(len, ids))
        input_ids = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
        encoded = {"input_ids": input_ids, "attention_mask": (input_ids > 0).long()}
        if images is None:
            return encoded
        size = (self.image_processor.size["width"], self.image_processor.size["height"])
        pixels = [np.asarray(image.resize(size, Image.Resampling.BICUBIC), dtype=np.float32) / 255 for image in images]
        return {"pixel_values": torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), **encoded}


class MemorySource(Source):
    """A source of given shard sizes that records its reads; photos are 6 x 6 of one colour, `bad` rows are no image."""

    def __init__(self, sizes, bad=()):
        request = Request("memory", "train", [], Asked())
        selected = Columns("image", "caption", None)
        super().__init__(request, ["image", "caption"], selected, [(f"s{i}", n) for i, n in enumerate(sizes)])
        self.bad = set(bad)
        self.reads: list[tuple[int, int, int]] = []

    def _read(self, shard, start, stop):
        self.reads.append((shard.index, start, stop))
        for number in range(shard.first_row + start, shard.first_row + stop):
            image = b"no image" if number in self.bad else Image.new("RGB", (6, 6), (number % 256, number // 256, 7))
            yield Row(number, image, f"title {number}", number, f"name {number}")


def photo(index: int) -> Image.Image:
    """A photo that differs for every index."""
    rng = np.random.default_rng(index)
    return Image.fromarray(rng.integers(0, 256, (10 + index % 3, 12, 3), dtype=np.uint8))


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def records(count: int) -> list[dict]:
    return [
        {
            "file": f"p{i:03d}.png",
            "caption": f"Tasche größe {i}",
            "product_id": f"sku-{i // 2}",
            "bytes": encoded(photo(i)),
        }
        for i in range(count)
    ]


def write_parquet(folder: Path, rows: list[dict], sizes, split: str = "train", row_group_size: int = 4) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    start = 0
    for index, size in enumerate(sizes):
        part = rows[start : start + size]
        start += size
        table = pa.table(
            {
                "image": [{"bytes": row["bytes"], "path": row["file"]} for row in part],
                "caption": [row["caption"] for row in part],
                "product_id": [row["product_id"] for row in part],
                "price": [1.5] * len(part),
            }
        )
        pq.write_table(
            table, folder / f"{split}-{index:05d}-of-{len(sizes):05d}.parquet", row_group_size=row_group_size
        )
    return folder


def write_image_folder(folder: Path, rows: list[dict], split: str = "train", csv: bool = False) -> Path:
    (folder / split).mkdir(parents=True, exist_ok=True)
    for row in rows:
        (folder / split / row["file"]).write_bytes(row["bytes"])
    if csv:
        lines = ["file_name,caption,product_id", *(f'{r["file"]},"{r["caption"]}",{r["product_id"]}' for r in rows)]
        (folder / split / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        with open(folder / split / "metadata.jsonl", "w", encoding="utf-8") as file:
            for r in rows:
                entry = {"file_name": r["file"], "caption": r["caption"], "product_id": r["product_id"]}
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
    return folder


def write_tars(folder: Path, rows: list[dict], sizes, split: str = "train", as_json: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    start = 0
    for index, size in enumerate(sizes):
        with tarfile.open(folder / f"{split}-{index:05d}.tar", "w") as tar:
            for row in rows[start : start + size]:
                key = row["file"].split(".")[0]
                add_member(tar, f"{key}.png", row["bytes"])
                if as_json:
                    text = json.dumps({"caption": row["caption"], "product_id": row["product_id"]})
                    add_member(tar, f"{key}.json", text.encode())
                else:
                    add_member(tar, f"{key}.txt", row["caption"].encode())
                    add_member(tar, f"{key}.product_id", row["product_id"].encode())
        start += size
    return folder


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_json_list(folder: Path, rows: list[dict]) -> tuple[Path, Path]:
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    for row in rows:
        (images / row["file"]).write_bytes(row["bytes"])
    entries = [{"product": r["file"], "caption": r["caption"], "product_id": r["product_id"]} for r in rows]
    file = folder / "train.json"
    file.write_text(json.dumps(entries, ensure_ascii=False, indent=1), encoding="utf-8")
    return file, images


def write_layouts(root: Path, count: int) -> dict[str, dict]:
    """The same products in every layout: name -> arguments of open_source."""
    rows = records(count)
    write_parquet(root / "parquet", rows, [5, 6], row_group_size=2)
    write_parquet(root / "sub" / "train", rows, [5, 6], split="part")
    write_parquet(root / "sub" / "validation", rows[:3], [3], split="part")
    write_tars(root / "tars", rows, [4, 7])
    write_tars(root / "tars_txt", rows, [4, 7], as_json=False)
    write_image_folder(root / "folder", rows)
    write_image_folder(root / "folder_csv", rows, csv=True)
    file, images = write_json_list(root / "list", rows)
    lines = root / "lines.jsonl"
    lines.write_text("\n".join(json.dumps(entry) for entry in json.loads(file.read_text("utf-8"))))
    paths = root / "paths.parquet"
    pq.write_table(pa.table({k: [r[k] for r in rows] for k in ("file", "caption", "product_id")}), paths)
    return {
        "parquet": {"data_dir": str(root / "parquet")},
        "parquet by name": {"dataset_name": str(root / "parquet")},
        "parquet glob": {"data_files": str(root / "parquet" / "train-*.parquet")},
        "parquet dict": {"data_files": {"train": str(root / "parquet" / "*.parquet"), "validation": "nothing"}},
        "parquet sub-folders": {"data_dir": str(root / "sub")},
        "parquet of paths": {"data_files": str(paths), "image_dir": str(images), "image_column": "file"},
        "tars": {"data_dir": str(root / "tars")},
        "tars of text members": {"data_files": [str(root / "tars_txt" / "*.tar")]},
        "folder": {"data_dir": str(root / "folder")},
        "folder with csv": {"data_dir": str(root / "folder_csv")},
        "json list": {"data_files": str(file), "image_dir": str(images)},
        "json lines": {"data_files": str(lines), "image_dir": str(images)},
    }
