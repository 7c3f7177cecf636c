"""Embed a catalogue once, with one process or many: a gallery, which pipeline and search page open.

    python -m aliblip.gallery --model_name_or_path outputs/mine/best --data_dir my_catalogue --output_dir my_gallery
    accelerate launch --config_file accelerate_configs/multi_gpu.yaml -m aliblip.gallery \\
        --model_name_or_path outputs/mine/best --data_dir my_catalogue --output_dir my_gallery --dtype int8 --faiss

The same from Python, on every process:

    gallery = build_gallery(model, processor, items, "my_gallery", store_tokens=True)

What is computed together never depends on the number of processes, and a build that was killed goes on when the same
command is typed again, with another number of them too.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from aliblip.accelerator import build_accelerator, end, launched_precision
from aliblip.arguments import (
    GalleryArguments,
    GalleryDataArguments,
    UsageError,
    check_range,
    first_line,
    main_with_usage_errors,
    parse,
)
from aliblip.convert import load_pretrained
from aliblip.data.sources import Row, Source, decode, open_source, require_usable_row
from aliblip.distributed import is_main, rank, together, world_size
from encoder_aliblip import TOKEN_TYPE
from gallery_aliblip import Gallery, begin_units, encode_units, join_units
from reading_aliblip import UnusableItem
from retrieval_aliblip import size_text, tokens_per_image
from storage_aliblip import VECTOR_TYPES

__all__ = ["SourceItems", "build_gallery"]

SHOWN_SKIPPED = 5


class SourceItems(Sequence):
    """The rows of a source as the items of a gallery, {"id", "image" or "text"}; undecoded, and read where they are
    asked for, fastest in order.

    The id is that of `id_column`; without one the file's name in a folder of photos, else the number of the row.

    Args:
        source: opened with `sides` "images" or "titles", and with the column of the ids as `other_columns`.
        id_column: its name.
    """

    def __init__(self, source: Source, id_column: str | None = None):
        self._source, self._id_column = source, id_column
        self._rows: Iterator[Row] = iter(())
        self._next = -1

    def __len__(self) -> int:
        return self._source.num_rows

    def __getitem__(self, position: int) -> dict:
        if not 0 <= position < len(self):
            raise IndexError(position)
        row = self.row(position)
        content = row.image if self._source.sides == "images" else row.text
        if row.problem is not None:
            content = UnusableItem(row.problem)
        return {"id": self._id_of(row), "image" if self._source.sides == "images" else "text": content}

    def row(self, position: int) -> Row:
        """The source's own row."""
        if position != self._next:
            self._rows = self._source.read_range(position, len(self))
        self._next = position + 1
        return next(self._rows)

    @cached_property
    def positions(self) -> dict | range:
        """Positions by id; without an `id_column`, whose values only reading all rows would tell."""
        if not self._source.random_access:
            return range(len(self))
        return {row.name: row.row for row in self._source.read_range(0, len(self))}

    def photo_of(self, item: dict) -> Image.Image:
        """The decoded photo of a gallery's item, by its id. May be called by several threads.

        Raises:
            UnusableItem: there is none, or it can't be read.
        """
        if item["id"] not in self.positions:
            raise UnusableItem("no row has this id")
        position = self.positions[item["id"]]
        return decode(next(self._source.read_range(position, position + 1)), "images").image

    def _id_of(self, row: Row) -> Any:
        if self._id_column is not None:
            return row.others.get(self._id_column)
        return row.name if self._source.random_access else row.row


def build_gallery(
    model,
    processor,
    items: Iterable,
    folder: str | Path,
    *,
    measure_recall: int = 0,
    overwrite: bool = False,
    **options,
) -> Gallery:
    """`Gallery.build` as a collective: every rank calls it with the same arguments, and gets the gallery.

    Args:
        model: the plain model (unwrapped), with the weights of every rank equal.
        items: as in `Gallery.build`; a generator is read by every rank, of a sequence each rank reads its part.
        folder: one that all processes see.

    The ranks wait for each other, and after a resume one of them may have all the work that was left: give the process
    group a timeout as long as that.

    Raises:
        ValueError, OSError: as in `Gallery.build`.
        RuntimeError: another rank has failed; the message says which and why.
    """
    options.setdefault("progress", is_main())
    part = "build its part of the gallery"
    together(is_main(), lambda: begin_units(model, processor, items, folder, overwrite=overwrite, **options), part)
    share = {"rank": rank(), "world_size": world_size()}
    together(True, lambda: encode_units(model, processor, items, folder, **share, **options), part)
    together(is_main(), lambda: join_units(folder, measure_recall=measure_recall), part)
    return Gallery.load(folder)


# --- the command ------------------------------------------------------------------------------------------------------


def check(data: GalleryDataArguments, options: GalleryArguments) -> None:
    """Raises UsageError for what can be seen without opening anything."""
    for name in ("model_name_or_path", "output_dir"):
        if getattr(options, name) is None:
            raise UsageError(f"--{name} is missing; see --help")
    if data.product_id_column is not None:
        raise UsageError("--product_id_column is for training and evaluation: the ids of a gallery are --id_column")
    check_range(
        measure_recall=(options.measure_recall, 0, None),
        per_device_eval_batch_size=(options.per_device_eval_batch_size, 1, None),
        unit_size=(options.unit_size, 1, None),
        dataloader_num_workers=(data.dataloader_num_workers, 0, None),
    )
    if options.store_tokens and options.kind == "text":
        raise UsageError("--store_tokens: titles have no image tokens, leave it out")
    if options.faiss and importlib.util.find_spec("faiss") is None:
        raise UsageError("--faiss needs FAISS: pip install aliblip[faiss]")
    folder = Path(options.output_dir)
    if (folder / "gallery.json").exists() and not options.overwrite_output_dir:
        raise UsageError(
            f"--output_dir: {folder} holds a gallery: give a new folder, or --overwrite_output_dir to replace it"
        )


def open_items(data: GalleryDataArguments, kind: str) -> SourceItems:
    """The rows that are to be embedded. Raises ValueError or OSError for data that can't be used."""
    source = open_source(
        dataset_name=data.dataset_name,
        dataset_config_name=data.dataset_config_name,
        data_dir=data.data_dir,
        data_files=data.data_files,
        image_dir=data.image_dir,
        split=data.split_name,
        any_split=True,
        image_column=data.image_column,
        caption_column=data.caption_column,
        sides="images" if kind == "image" else "titles",
        other_columns=() if data.id_column is None else (data.id_column,),
    )
    require_usable_row(source)
    return SourceItems(source, data.id_column)


def needed_bytes(model, count: int, options: GalleryArguments) -> tuple[int, int]:
    """Bytes of the vectors, and of the image tokens, of so many items."""
    config = model.config
    vectors = count * config.image_text_hidden_size * VECTOR_TYPES[options.dtype].itemsize
    if options.dtype == "int8":
        vectors += count * torch.float32.itemsize  # scales
    if not options.store_tokens:
        return vectors, 0
    return vectors, count * tokens_per_image(config) * config.vision_config.hidden_size * TOKEN_TYPE.itemsize


def tell_plan(model, items: SourceItems, options: GalleryArguments) -> None:
    """Say what is coming, in the first process (there is no group yet), and refuse what the disk can't hold."""
    what = "photos" if options.kind == "image" else "titles"
    vectors, tokens = needed_bytes(model, len(items), options)
    # While it is built, vectors lie there in fp32 too.
    wanted = vectors + tokens + len(items) * model.config.image_text_hidden_size * torch.float32.itemsize
    folder = Path(options.output_dir).absolute()
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if wanted > free:
        raise UsageError(
            f"the gallery takes {size_text(wanted)} while it is built, {size_text(free)} are free in {existing}: give "
            "another --output_dir, or leave out --store_tokens"
        )
    if int(os.environ.get("RANK", "0")) == 0:
        told = f"{len(items):,} {what}; vectors: {size_text(vectors)} in {options.dtype}"
        print(f"{told}; image tokens: {size_text(tokens) if tokens else 'not kept'}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    data, options = parse((GalleryDataArguments, GalleryArguments), argv, description=__doc__)
    check(data, options)
    try:
        items = open_items(data, options.kind)
        model, processor, _ = load_pretrained(options.model_name_or_path, tokenizer_name=options.tokenizer_name)
        precision = launched_precision(options.mixed_precision)
        tell_plan(model, items, options)
        accelerator = build_accelerator(
            mixed_precision=options.mixed_precision,
            max_grad_norm=0.0,  # nothing is trained here
            per_device_train_batch_size=options.per_device_eval_batch_size,
            timeout=timedelta(days=1),  # after a resume one process may have all the work that was left
        )
        start = time.perf_counter()
        gallery = build_gallery(
            model.eval().to(accelerator.device),
            processor,
            items,
            options.output_dir,
            kind=options.kind,
            image_column="image",
            text_column="text",
            id_column="id",
            dtype=options.dtype,
            store_tokens=options.store_tokens,
            batch_size=options.per_device_eval_batch_size,
            unit_size=options.unit_size,
            autocast=torch.bfloat16 if precision == "bf16" else None,
            duplicates=options.duplicates,
            measure_recall=options.measure_recall,
            overwrite=options.overwrite_output_dir,
            num_workers=data.dataloader_num_workers,
        )
    except UsageError:
        raise
    except (OSError, ValueError) as error:
        raise UsageError(first_line(error)) from error
    if is_main():
        if options.faiss:
            recall = gallery.add_faiss_index(measure_recall=options.measure_recall)
            gallery.save(options.output_dir)
            print("FAISS index added" + ("" if recall is None else f", recall@10 {recall:.4f} of exact search's"))
        tell_result(gallery, options.output_dir, time.perf_counter() - start, accelerator.num_processes)
    end(accelerator)
    return 0


def tell_result(gallery: Gallery, folder: str, seconds: float, processes: int) -> None:
    for entry in gallery.skipped[:SHOWN_SKIPPED]:
        print(f"  skipped {entry['id']!r}: {entry['reason']}")
    if len(gallery.skipped) > SHOWN_SKIPPED:
        print(f"  and {len(gallery.skipped) - SHOWN_SKIPPED:,} more, in skipped-*.jsonl there")
    print(f"{gallery!r}; {len(gallery.skipped):,} could not be read")
    print(f"written: {folder}   ({seconds:.1f} s, {processes} process{'es' if processes > 1 else ''})")
    asked = "title" if gallery.kind == "image" else "photo.jpg"
    print(f'next: pipe("{asked}", gallery="{folder}"), see README.md, "Search your photos"')


if __name__ == "__main__":
    main_with_usage_errors("aliblip.gallery", main)
