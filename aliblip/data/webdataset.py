"""WebDataset tars: a shard is one tar, and one indexed scan of its headers finds every sample."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice

from aliblip.data.columns import Columns, Request, choose_columns
from aliblip.data.manifest import DataFile
from aliblip.data.remote import open_file, read_patiently
from aliblip.data.rows import Row, Shard, Source
from aliblip.data.tar_index import TarIndex, indexed_tar

__all__ = ["TarSource", "open_tars"]

IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2")
TEXT_FIELDS = ("txt", "text", "transcript", "caption", "title")
JSON_FIELDS = ("json", "jsn")
# The keys of the JSON members of the first samples are columns.
PROBED_SAMPLES = 20


class TarSource(Source):
    """Samples of tars."""

    def __init__(
        self, request: Request, columns: Sequence[str], selected: Columns, tars: Sequence[tuple[str, TarIndex]]
    ):
        sizes = [(os.path.basename(file), len(index)) for file, index in tars]
        files = [DataFile(file, len(index), index.size, index.digest) for file, index in tars]
        super().__init__(request, columns, selected, sizes, files)
        self._indexes: list[TarIndex] = [index for _, index in tars]

    def _file_of(self, shard: Shard) -> str:
        return self.files[shard.index].file

    def _read(self, shard: Shard, start: int, stop: int) -> Iterator[Row]:
        index = self._indexes[shard.index]
        with open_file(self._file_of(shard)) as stream:
            for position in range(start, stop):
                fields, problem = {}, None
                for field, (offset, size) in index.members(position).items():
                    if not self._is_wanted(field):
                        continue
                    stream.seek(offset)
                    data = stream.read(size)
                    if len(data) < size:
                        problem = problem or "the tar ends within this sample"
                    try:
                        _add_tar_field(fields, field, data)
                    except ValueError:
                        fields.setdefault(field, None)
                        problem = problem or f"field '{field}' can't be read as text or JSON"
                yield self._row(
                    shard.first_row + position,
                    next((fields[key] for key in self._image_keys() if fields.get(key) is not None), None),
                    fields.get(self.selected.caption),
                    fields,
                    index.key(position),
                    problem,
                )

    def _image_keys(self) -> Sequence[str]:
        # A sample is a photo of any usual extension, unless the user named one.
        return IMAGE_FIELDS if self.selected.image == "image" else (self.selected.image,)

    def _is_wanted(self, field: str) -> bool:
        selected = self.selected
        if selected.takes_all and field not in selected.photos:
            return True
        wanted = (*self._image_keys(), selected.caption, selected.product_id, *selected.others)
        return field in wanted or field == "json"


def _add_tar_field(fields: dict, field: str, data: bytes) -> None:
    """Decode one member; the keys of a `json` member count as columns of their own."""
    extension = field.rsplit(".", 1)[-1]
    if extension in JSON_FIELDS:
        value = json.loads(data)
        fields[field] = value
        if isinstance(value, dict):
            for key, item in value.items():
                fields.setdefault(key, item)
    elif extension in TEXT_FIELDS:
        fields[field] = data.decode("utf-8")
    elif extension in ("cls", "cls2", "id", "index", "product_id"):
        text = data.decode("utf-8").strip()
        fields[field] = int(text) if re.fullmatch(r"[+-]?\d{1,400}", text) else (text or None)
    else:
        fields[field] = data


def open_tars(request: Request) -> TarSource:
    """Open tars by their indexes. A column is a field (the end of a member's name), or a key of the JSON members.

    Raises:
        UsageError: a file is not a tar, or a column that was named is not there.
    """
    with ThreadPoolExecutor(max_workers=8) as pool:
        indexes = list(pool.map(lambda file: indexed_tar(file, request.index_dir), request.files))
    tars = list(zip(request.files, indexes, strict=True))
    fields = dict.fromkeys(field for index in indexes for field in index.fields)
    # The keys inside JSON members are known only by reading some.
    fields.update(dict.fromkeys(read_patiently(lambda: _json_keys(*tars[0]), request.files[0])))
    columns, there = list(fields), list(fields)
    if any(field in IMAGE_FIELDS for field in columns) and request.asked.image in (None, "image"):
        request = replace(request, asked=replace(request.asked, image="image"))
        there.append("image")
    photos = ("image", *IMAGE_FIELDS, *JSON_FIELDS)  # and the JSON as a whole, whose keys are columns
    selected = choose_columns(request, there, ("image",), ("caption", "text", "txt"), photos)
    return TarSource(request, columns, selected, tars)


def _json_keys(file: str, index: TarIndex) -> list[str]:
    keys: dict[str, None] = {}
    samples = (index.members(sample) for sample in range(len(index)))
    with open_file(file) as stream:
        for offset, size in islice((members["json"] for members in samples if "json" in members), PROBED_SAMPLES):
            stream.seek(offset)
            with contextlib.suppress(ValueError):
                value = json.loads(stream.read(size))
                keys.update(dict.fromkeys(value if isinstance(value, dict) else ()))
    return list(keys)
