"""The steps of preparing as a pipeline of datatrove, which runs on this machine, on Slurm or on Ray alike.

    pipeline = [ReadRows(inputs, rows_per_task), DecodePhotos(max_side=512), WriteParts(folder, ...)]
    LocalPipelineExecutor(pipeline, tasks=40, workers=2, logging_dir=...).run()

A document is a row: its text the title, its one medium the photo, and in its metadata what else is known of it. A row
that can't be used goes on with the reason, to be counted at the end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document, Media, MediaType
from datatrove.pipeline.base import PipelineStep

from aliblip.data.clean_titles import clean_markup
from aliblip.data.collate import printable
from aliblip.data.duplicates import Index
from aliblip.data.prepare_parts import PartWriter, written_to
from aliblip.data.prepare_photos import prepare_photo
from aliblip.data.prepare_shards import write_shard
from aliblip.data.prepare_tasks import Inputs
from aliblip.data.products import product_id_of
from aliblip.data.remote import is_remote
from aliblip.data.rows import Row, stored_photo
from aliblip.runtime.files import new_file
from reading_aliblip import UnusableItem, clean_title

__all__ = [
    "BLOCK",
    "ComparePhotos",
    "DecodePhotos",
    "FetchPhotos",
    "ReadRows",
    "WriteParts",
    "WriteShards",
    "pairs_file",
]

# Photos that one task compares with all.
BLOCK = 2048
# Photos that are fetched at once, and those that wait for their turn to be decoded.
FETCHERS, AHEAD = 16, 64


class Step(PipelineStep):
    """A step of ours."""

    type = "AliBLIP"


class ReadRows(Step):
    """The rows of a task, undecoded.

    Args:
        inputs: the data.
        rows_per_task: that cut it into tasks.
    """

    name = "read rows"

    def __init__(self, inputs: Inputs, rows_per_task: int):
        super().__init__()
        self.inputs, self.rows_per_task = inputs, rows_per_task

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        task = self.inputs.tasks(self.rows_per_task)[rank]
        split = self.inputs.names()[task.source]
        for number, row in enumerate(self.inputs.read(task), start=task.first_row):
            self.stat_update("rows")
            yield document_of(row, number, split)


def document_of(row: Row, number: int, split: str) -> Document:
    """A row as a document."""
    is_named = row.name != f"row {row.row}"
    name = printable(row.name) if is_named else None
    title = row.text if isinstance(row.text, str) else ""
    address = row.image if isinstance(row.image, str) else ""
    media = [Media(id=name or str(number), type=MediaType.IMAGE, url=address)]
    return Document(title, str(number), media, {"row": row, "number": number, "split": split, "name": name})


class FetchPhotos(Step):
    """Photos that are named by address, fetched ahead, several at once; their order stays.

    Args:
        fetch: reads an address, at most so many bytes of it, or raises `UnusableItem`.
    """

    name = "fetch photos"

    def __init__(self, fetch: Callable[[str, int], bytes]):
        super().__init__()
        self.fetch = fetch

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        waiting: deque[tuple[Document, Future | None]] = deque()
        with ThreadPoolExecutor(FETCHERS) as pool:
            for document in data:
                row = document.metadata["row"]
                future = pool.submit(stored_photo, row, self.fetch) if is_address(row) else None
                waiting.append((document, future))
                if len(waiting) >= AHEAD:
                    yield self._fetched(*waiting.popleft())
            while waiting:
                yield self._fetched(*waiting.popleft())

    def _fetched(self, document: Document, future: Future | None) -> Document:
        row = document.metadata["row"]
        try:
            if future is not None:
                document.metadata["row"] = replace(row, image=future.result())
                self.stat_update("fetched")
        except UnusableItem as error:
            document.metadata["row"] = replace(row, problem=str(error))
        return document


def is_address(row: Row) -> bool:
    """Whether the photo of a row lies elsewhere."""
    return row.problem is None and isinstance(row.image, str) and is_remote(row.image)


class DecodePhotos(Step):
    """Photos decoded, checked and made smaller; titles checked, and cleaned where that is asked for.

    Args:
        max_side, quality: as for `prepare_photo`.
        clean_titles: whether titles lose markup and broken characters.
    """

    name = "decode photos"

    def __init__(self, max_side: int | None, quality: int, clean_titles: bool):
        super().__init__()
        self.max_side, self.quality, self.clean_titles = max_side, quality, clean_titles

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        for document in data:
            with self.track_time():
                self._prepare(document)
            yield document

    def _prepare(self, document: Document) -> None:
        row = document.metadata["row"]
        try:
            if row.problem is not None:
                raise UnusableItem(row.problem)
            given = clean_title(row.text)
            document.text = clean_title(clean_markup(given)) if self.clean_titles else given
            document.metadata["given"] = given if document.text != given else None
            photo = prepare_photo(stored_photo(row), self.max_side, self.quality)
        except UnusableItem as error:
            document.metadata["reason"] = str(error)
            self.stat_update("rejected")
        else:
            document.metadata["photo"] = photo
            self.stat_update("photos")


class WriteParts(Step):
    """The rows of a task to its part."""

    name = "write parts"

    def __init__(self, folder: Path, inputs: Inputs, rows_per_task: int):
        super().__init__()
        self.folder, self.inputs, self.rows_per_task = folder, inputs, rows_per_task

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        source = self.inputs.sources()[self.inputs.tasks(self.rows_per_task)[rank].source]
        with PartWriter(self.folder, rank, source.schema_of_others(), source.has_texts_alone) as writer:
            for document in data:
                self._write(writer, document)
                yield document

    def _write(self, writer: PartWriter, document: Document) -> None:
        known, row = document.metadata, document.metadata["row"]
        fact = {"row": known["number"], "split": known["split"], "name": known["name"]}
        if "reason" in known:
            writer.reject(fact | {"name": fact["name"] or printable(row.name)}, known["reason"], row.others)
            return
        stated = row.stored_id if product_id_of(row.stored_id) is not None else None
        fact |= {"caption": document.text, "caption_given": known["given"], "product_id": row.product_id}
        fact["product_given"] = None if stated is None else printable(str(stated))
        fact["path"] = known["name"]
        writer.add(fact, known["photo"], row.others)


class ComparePhotos(Step):
    """Near duplicates of a block of photos among all.

    Args:
        folder: of the index, see `aliblip.data.duplicates`.
        similarity: from which two photos are duplicates.
    """

    name = "compare photos"

    def __init__(self, folder: Path, similarity: float):
        super().__init__()
        self.folder, self.similarity = folder, similarity

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        index = Index.load(self.folder)
        pairs = index.pairs(rank * BLOCK, min((rank + 1) * BLOCK, len(index)), self.similarity)
        columns = [("first", "<i8"), ("second", "<i8"), ("similarity", "<f4")]
        table = np.empty(len(pairs), columns)
        for name, _ in columns:
            table[name] = getattr(pairs, name)
        with written_to(self.folder), new_file(pairs_file(self.folder, rank)) as file:
            np.save(file, table)
        self.stat_update("pairs", value=len(pairs))
        yield from ()


def pairs_file(folder: Path, block: int) -> Path:
    return folder / f"pairs-{block:06d}.npy"


class WriteShards(Step):
    """The shards of the prepared catalogue, one a task, out of the parts."""

    name = "write shards"

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        self.stat_update("rows", value=write_shard(self.folder, rank))
        yield from ()
