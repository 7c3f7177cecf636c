"""Embed a catalogue once, with one process or many, into a table of LanceDB that pipeline and search page open.

    python -m aliblip.gallery --model_name_or_path outputs/mine/best --data_dir my_catalogue --output_dir my_gallery
    accelerate launch --config_file accelerate_configs/multi_gpu.yaml -m aliblip.gallery \\
        --model_name_or_path outputs/mine/best --data_dir my_catalogue --output_dir my_gallery --thumbnails 384

All columns of the data are kept, for filters and for what a page shows; --columns chooses some. What is computed
together never depends on the number of processes, and a build that was killed goes on when the same command is typed
again, with another number of them too.

A gallery that is there is changed by id, in one step each:

    python -m aliblip.gallery --model_name_or_path outputs/mine/best --data_files new.jsonl --output_dir my_gallery \\
        --upsert
    python -m aliblip.gallery --output_dir my_gallery --remove_where "category = 'mug' AND price < 5"
    python -m aliblip.gallery --output_dir my_gallery --optimize

The same from Python: Gallery.build, upsert, remove, optimize; see aliblip/retrieval/galleries.py.
"""

from __future__ import annotations

import json
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from aliblip.data.arguments import DataArguments
from aliblip.data.products import tell_sources
from aliblip.data.rows import Source
from aliblip.data.sources import ALL, open_source, require_usable_row
from aliblip.data.titles import look_at_titles, tell_cut_titles
from aliblip.models.loading import load_pretrained
from aliblip.retrieval.building import THUMBNAIL_SIDE, Build, check_options
from aliblip.retrieval.galleries import Gallery
from aliblip.retrieval.indexing import INDEX_KINDS, index_settings
from aliblip.retrieval.plan import size_text
from aliblip.retrieval.tables import ID, KINDS, is_address, library
from aliblip.runtime.accelerator import build_accelerator, end, launched_precision
from aliblip.runtime.arguments import check_range, json_mapping, option, parse
from aliblip.runtime.distributed import is_main, launched_rank
from aliblip.runtime.mistakes import UsageError, main_with_usage_errors

SHOWN_SKIPPED = 5
AUTO, NONE = "auto", "none"
# Where a flag has another name than the argument in Python.
_FLAGS = {
    "batch_size": "per_device_eval_batch_size",
    "dtype": "mixed_precision",
    "num_workers": "dataloader_num_workers",
    "overwrite": "overwrite_output_dir",
    "uri": "output_dir",
}


@dataclass
class GalleryDataArguments(DataArguments):
    split_name: str = option("train", "Split to embed; if there is only one, that one.")
    data_files: str | None = option(None, "Instead of a data set: a file or glob, a JSON list too.")
    id_column: str | None = option(
        None,
        "Column of the ids, text or whole numbers, each once (default: id, else the names of the files of a folder or "
        "list of photos, else numbers of rows).",
    )


@dataclass
class GalleryArguments:
    """How to build or change a gallery."""

    model_name_or_path: str | None = option(
        None, "Folder or Hub name of the model, or an original file (required to build and to put rows in)."
    )
    tokenizer_name: str | None = option(
        None, "Folder, vocab.txt or Hub name (default: the model's own; for original files bert-base-uncased)."
    )
    output_dir: str | None = option(None, "Folder of the gallery (this or --uri is required).")
    uri: str | None = option(
        None, "Address of the gallery instead, such as s3://bucket/gallery or gs://bucket/gallery."
    )
    storage_options: str | None = option(
        None, 'For --uri, a JSON object as LanceDB takes it: {"region": "eu-central-1"} (default: the environment).'
    )
    overwrite_output_dir: bool = option(False, "Replace a gallery, or the beginning of another one, that is there.")
    kind: str = option("image", "What to embed: photos (image) or titles (text).", choices=list(KINDS))
    columns: str | None = option(None, "Columns of the data to keep, separated by commas (default: all).")
    thumbnails: int = option(
        0,
        f"Keep a JPEG of each photo with this longest side in pixels, such as {THUMBNAIL_SIDE}, so that photos inside "
        "the data or elsewhere can be shown; 0: none.",
    )
    store_tokens: bool = option(
        False, "Keep image tokens, so that re-ranking needs no photo: 0.9 MB a photo with base at 384 px."
    )
    duplicates: str = option(
        "error", "Where an id comes twice: error, or first (the others are skipped).", choices=["error", "first"]
    )
    index: str = option(
        AUTO,
        "Approximate index of the vectors: auto (by the number of rows), none, or a kind.",
        choices=[AUTO, NONE, *INDEX_KINDS],
    )
    index_columns: str | None = option(
        None, "Columns that filters will name, separated by commas: each gets an index of its own."
    )
    measure_recall: int = option(
        1000, "Search for so many of the vectors to tell the recall@10 of the index against exact search; 0: don't."
    )
    upsert: bool = option(False, "Put the rows of the data into the gallery that is there, in place of equal ids.")
    remove_where: str | None = option(None, "Take the rows out of the gallery that this SQL condition finds.")
    optimize: bool = option(
        False, "Join the pieces that changes leave, bring the indices up to date, remove versions older than 7 days."
    )
    per_device_eval_batch_size: int = option(32, "Photos or titles embedded at a time.")
    unit_size: int = option(256, "Rows that one process computes and writes together.")
    parts_dir: str | None = option(
        None, "Folder where finished rows are noted, for --uri one that all processes see (default: the user's cache)."
    )
    mixed_precision: str | None = option(None, "no or bf16 (default: as the launcher says).", choices=["no", "bf16"])

    @property
    def place(self) -> str:
        return self.uri or self.output_dir

    @property
    def storage(self) -> dict[str, Any] | None:
        return json_mapping("storage_options", self.storage_options) or None


# --- before the work --------------------------------------------------------------------------------------------------


def check(data: GalleryDataArguments, options: GalleryArguments) -> None:
    """Raises UsageError for what can be seen without opening anything."""
    library()
    if (options.output_dir is None) == (options.uri is None):
        given = "is missing" if options.uri is None else "and --uri are both given"
        raise UsageError(f"--output_dir {given}: give the folder of the gallery or its address; see --help")
    if options.uri is not None and not is_address(options.uri):
        raise UsageError(f"--uri is {options.uri}, which is no address: give a folder as --output_dir")
    if options.storage is not None and options.uri is None:
        raise UsageError("--storage_options belong to an address: give --uri, or leave them out")
    actions = [name for name in ("upsert", "optimize") if getattr(options, name)]
    actions += ["remove_where"] * (options.remove_where is not None)
    if len(actions) > 1:
        raise UsageError(f"--{actions[0]} and --{actions[1]} are both given: change a gallery in one way at a time")
    if actions in ([], ["upsert"]):
        _check_building(data, options)


def _check_building(data: GalleryDataArguments, options: GalleryArguments) -> None:
    if options.model_name_or_path is None:
        raise UsageError("--model_name_or_path is missing; see --help")
    if data.product_id_column is not None:
        raise UsageError("--product_id_column is for training and evaluation: the ids of a gallery are --id_column")
    check_range(measure_recall=(options.measure_recall, 0, None))
    check_options(
        options.kind,
        options.thumbnails or False,
        options.store_tokens,
        options.per_device_eval_batch_size,
        options.unit_size,
        options.duplicates,
        data.dataloader_num_workers,
        flag,
    )
    if options.upsert and options.overwrite_output_dir:
        raise UsageError("--upsert changes the gallery that is there: leave --overwrite_output_dir out")
    if options.upsert and (options.columns is not None or options.thumbnails or options.store_tokens):
        raise UsageError("--upsert keeps what the gallery keeps: leave --columns, --thumbnails, --store_tokens out")


def flag(name: str, value: Any = None) -> str:
    """How an argument in Python is typed here."""
    return f"--{_FLAGS.get(name, name)}" + ("" if value in (None, True) else f" {value}")


def listed(text: str | None) -> list[str]:
    """Names separated by commas."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def open_data(data: GalleryDataArguments, kind: str, columns: Sequence[str] | None) -> Source:
    """The rows that are to be embedded. Raises UsageError for data that can't be used."""

    def opened(others: Sequence[str] | str) -> Source:
        return open_source(
            dataset_name=data.dataset_name,
            dataset_config_name=data.dataset_config_name,
            data_dir=data.data_dir,
            data_files=data.data_files,
            image_dir=data.image_dir,
            fetch_photos=data.fetch_photos,
            split=data.split_name,
            any_split=True,
            image_column=data.image_column,
            caption_column=data.caption_column,
            sides="images" if kind == "image" else "titles",
            other_columns=others,
            reading=data.reading,
        )

    source = opened(ALL)
    if columns is not None:  # read no more than is needed
        ids = [data.id_column] if data.id_column is not None else [name for name in source.columns if name == ID]
        source = opened(list(dict.fromkeys([*columns, *ids])))
    tell_sources(source, products=False)
    require_usable_row(source)
    return source


def tell_plan(build: Build, config, options: GalleryArguments) -> None:
    """Say what is coming, in the first process (there is no group yet), and refuse what the disk can't hold."""
    plan = build.plan(config)
    if not is_address(build.uri):
        folder = Path(build.uri)
        existing = next(place for place in (folder, *folder.parents) if place.exists())
        free, needed = shutil.disk_usage(existing).free, plan.vectors + plan.tokens
        if needed > free:
            raise UsageError(
                f"the gallery takes {size_text(needed)}, {size_text(free)} are free in {existing}: give another "
                "--output_dir, or leave out --store_tokens"
            )
    if launched_rank() != 0:
        return
    what = "photos" if options.kind == "image" else "titles"
    tokens = size_text(plan.tokens) if plan.tokens else "not kept"
    print(f"{plan.rows:,} {what}; vectors: {size_text(plan.vectors)}; image tokens: {tokens}")
    columns = ", ".join(f"{kept} ({build.kept.types[name]})" for name, kept in build.kept.names.items())
    print(f"columns: {columns or 'none'}; ids: {_ids_told(build)}")
    for note in build.kept.notes:
        print(f"note: {note}")
    if options.kind == "image" and not options.thumbnails and _lie_inside(build.source):
        print(
            f"note: the photos lie inside the data: to show them, and to re-rank by them, add --thumbnails "
            f"{THUMBNAIL_SIDE} (or --store_tokens, to re-rank only)"
        )
    print(end="", flush=True)


def _ids_told(build: Build) -> str:
    if build.kept.ids == "column":
        return f"the column {build.kept.id_column}"
    return "names of the photos" if build.kept.ids == "name" else "numbers of the rows"


def _lie_inside(source: Source) -> bool:
    return all(not isinstance(row.image, str) for row in source.read_range(0, 10) if row.problem is None)


# --- the command ------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    data, options = parse((GalleryDataArguments, GalleryArguments), argv, description=__doc__)
    check(data, options)
    if options.remove_where is not None or options.optimize:
        change(options)
        return 0
    work = put_in if options.upsert else build
    return work(data, options)


def change(options: GalleryArguments) -> None:
    """Remove rows, or optimize."""
    if launched_rank() != 0:
        return
    gallery = Gallery.open(options.place, storage_options=options.storage)
    if options.optimize:
        gallery.optimize()
        print(f"optimized: {gallery!r}")
    else:
        count = gallery.remove(where=options.remove_where)
        print(f"rows removed: {count:,}; {gallery!r}")


def build(data: GalleryDataArguments, options: GalleryArguments) -> int:
    """Build a gallery."""
    columns = None if options.columns is None else listed(options.columns)
    source = open_data(data, options.kind, columns)
    work = Build(
        source,
        options.place,
        kind=options.kind,
        columns=columns,
        id_column=data.id_column,
        thumbnails=options.thumbnails or False,
        store_tokens=options.store_tokens,
        batch_size=options.per_device_eval_batch_size,
        unit_size=options.unit_size,
        dtype=torch.bfloat16 if launched_precision(options.mixed_precision) == "bf16" else None,
        duplicates=options.duplicates,
        overwrite=options.overwrite_output_dir,
        num_workers=data.dataloader_num_workers,
        storage_options=options.storage,
        parts_dir=options.parts_dir,
        flag=flag,
    )
    check_index(work, options)
    model, processor, _ = load_pretrained(options.model_name_or_path, tokenizer_name=options.tokenizer_name)
    if options.kind == "text":
        tell_cut_titles(source, lambda: look_at_titles(source, processor.tokenizer, processor.max_length))
    tell_plan(work, model.config, options)

    def index() -> None:
        gallery = Gallery.open(options.place, storage_options=options.storage)
        kind = None if options.index in (AUTO, NONE) else options.index
        if options.index != NONE:
            gallery.create_index(kind, columns=listed(options.index_columns), measure_recall=options.measure_recall)
        elif options.index_columns:
            gallery.create_index(columns=listed(options.index_columns), vectors=False)

    def run(accelerator) -> None:
        start = time.perf_counter()
        lost = work.run(model.eval().to(accelerator.device), processor, progress=True, before_end=index)
        if is_main():
            for line in lost.told():
                print(f"note: {line}")
            tell_result(options, time.perf_counter() - start, accelerator.num_processes)

    return _in_processes(options, run)


def check_index(work: Build, options: GalleryArguments) -> None:
    """Refuse settings of the index before the embedding."""
    names = set(work.kept.names.values())
    for name in listed(options.index_columns):
        if name not in names:
            there = ", ".join(sorted(names)) or "none"
            raise UsageError(f"--index_columns: the gallery will have no column {name!r}, but {there}")
    if options.index not in (AUTO, NONE):
        index_settings(work.source.num_rows, 1, options.index)


def put_in(data: GalleryDataArguments, options: GalleryArguments) -> int:
    """Put rows into the gallery."""
    gallery = Gallery.open(options.place, storage_options=options.storage)
    source = open_data(data, gallery.kind, None)
    model, processor, _ = load_pretrained(options.model_name_or_path, tokenizer_name=options.tokenizer_name)
    precision = launched_precision(options.mixed_precision)
    if launched_rank() == 0:
        print(f"rows of the data: {source.num_rows:,}; {gallery!r}", flush=True)

    def run(accelerator) -> None:
        report = gallery.upsert(
            source,
            model=model.eval().to(accelerator.device),
            processor=processor,
            id_column=data.id_column,
            batch_size=options.per_device_eval_batch_size,
            dtype=torch.bfloat16 if precision == "bf16" else None,
            num_workers=data.dataloader_num_workers,
            duplicates=options.duplicates,
            progress=True,
            flag=flag,
        )
        if is_main():
            print(f"{report}\n{gallery!r}")

    return _in_processes(options, run)


def _in_processes(options: GalleryArguments, run: Callable[[Any], None]) -> int:
    accelerator = build_accelerator(
        mixed_precision=options.mixed_precision,
        max_grad_norm=0.0,  # nothing is trained here
        per_device_train_batch_size=options.per_device_eval_batch_size,
        timeout=timedelta(days=1),  # after a resume one process may have all the work that was left
    )
    run(accelerator)
    end(accelerator)
    return 0


def tell_result(options: GalleryArguments, seconds: float, processes: int) -> None:
    """What came of a build, and what to do with it."""
    gallery = Gallery.open(options.place, storage_options=options.storage)
    skipped = gallery.skipped
    for entry in skipped[:SHOWN_SKIPPED]:
        print(f"  skipped row {entry['row']}, {entry['name']!r}: {entry['reason']}")
    if len(skipped) > SHOWN_SKIPPED:
        print(f"  and {len(skipped) - SHOWN_SKIPPED:,} more: Gallery.open({options.place!r}).skipped")
    print(f"{gallery!r}; rows that could not be used: {len(skipped):,}")
    print(f"written: {options.place}   ({seconds:.1f} s, {processes} process{'es' if processes > 1 else ''})")
    model, place = shlex.quote(options.model_name_or_path), shlex.quote(options.place)
    if gallery.kind == "image":
        print(f"next: python -m aliblip.serve --model_name_or_path {model} --gallery {place}")
    else:
        print(f'next: pipe("photo.jpg", gallery={json.dumps(options.place)}), see README.md')


if __name__ == "__main__":
    main_with_usage_errors("aliblip.gallery", main)
