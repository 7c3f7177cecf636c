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
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch

from aliblip.data.arguments import DataArguments
from aliblip.data.sources import open_source, require_usable_row, tell_data
from aliblip.models.loading import load_pretrained
from aliblip.retrieval.galleries import SourceItems, build_gallery
from aliblip.runtime.accelerator import build_accelerator, end, launched_precision
from aliblip.runtime.arguments import check_range, option, parse
from aliblip.runtime.distributed import is_main, launched_rank
from aliblip.runtime.mistakes import UsageError, first_line, main_with_usage_errors
from encoder_aliblip import TOKEN_TYPE
from gallery_aliblip import Gallery
from retrieval_aliblip import size_text, tokens_per_image
from storage_aliblip import VECTOR_TYPES

SHOWN_SKIPPED = 5


@dataclass
class GalleryDataArguments(DataArguments):
    split_name: str = option("train", "Split to embed; if there is only one, that one.")
    data_files: str | None = option(None, "Instead of a data set: a file or glob, a JSON list too.")
    id_column: str | None = option(
        None,
        "Column of the ids, text or whole numbers (default: the names of the files of a folder, else numbers of rows).",
    )
    dataloader_num_workers: int = option(2, "Threads of each process that read and decode photos ahead.")


@dataclass
class GalleryArguments:
    """How to build a gallery."""

    model_name_or_path: str | None = option(None, "Folder or Hub name of the model, or an original file (required).")
    tokenizer_name: str | None = option(
        None, "Folder, vocab.txt or Hub name (default: the model's own; for original files bert-base-uncased)."
    )
    output_dir: str | None = option(None, "Folder for the gallery (required).")
    overwrite_output_dir: bool = option(False, "Replace a gallery, or the beginning of another one, that is there.")
    kind: str = option("image", "What to embed: photos (image) or titles (text).", choices=["image", "text"])
    dtype: str = option(
        "float32",
        "How vectors are stored: float32, float16 (half the space) or int8 (a quarter).",
        choices=["float32", "float16", "int8"],
    )
    store_tokens: bool = option(
        False, "Keep image tokens, so that re-ranking needs no photo: 0.9 MB a photo with base at 384 px."
    )
    duplicates: str = option(
        "error", "Where an id comes twice: error, or first (the others are skipped).", choices=["error", "first"]
    )
    faiss: bool = option(False, "Add an approximate index (FAISS), for millions of photos.")
    measure_recall: int = option(
        1000, "Search so many of the items to tell what smaller types and FAISS lose against exact fp32; 0: don't."
    )
    per_device_eval_batch_size: int = option(32, "Photos or titles embedded at a time.")
    unit_size: int = option(256, "Items that one process embeds together, and that a kill loses at most.")
    mixed_precision: str | None = option(None, "no or bf16 (default: as the launcher says).", choices=["no", "bf16"])


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
        reading=data.reading,
    )
    tell_data(source)
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
    if launched_rank() == 0:
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
