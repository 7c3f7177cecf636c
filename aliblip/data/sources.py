"""Where photos and titles come from: Parquet, WebDataset, ImageFolder, Hub names, JSON lists.

    source = open_source(data_dir="catalogue", split="train")
    for row in source.read(shard_index=0, start=10, stop=20):
        example = decode(row)

To add a kind of data:

1. write one file here with a subclass of `Source`, whose `_read` yields rows, and its opener `open_x(request)`;
2. enter the opener in `OPENERS`, under the name of its builder in `datasets`, and the files' extension in `KINDS`;
3. add a catalogue of it to the layouts of tests/test_sources.py, which then holds it to what all kinds do.

Which files belong to which split is always decided by `datasets`. Parquet is read by `datasets` streaming as well. Tars
and folders are read here, because a single bad record (a metadata line without its file, JSON that does not parse, a
sample without a title) makes `datasets` raise inside its generator, which ends the stream; here it is one unusable row.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from urllib.parse import urlsplit

from aliblip.data.columns import ALL, Asked, Request, listed, one_line
from aliblip.data.parquet import open_parquet
from aliblip.data.photos import is_folder_of_photos, open_photos
from aliblip.data.records import extension_of, open_image_folder, open_list
from aliblip.data.remote import RemoteReadError, is_remote, read_patiently
from aliblip.data.rows import Source, decode
from aliblip.data.webdataset import open_tars
from aliblip.runtime.mistakes import UsageError
from reading_aliblip import UnusableItem

__all__ = ["ALL", "open_source", "require_usable_row"]

OPENERS: dict[str, Callable[[Request], Source]] = {
    "parquet": open_parquet,
    "webdataset": open_tars,
    "imagefolder": open_image_folder,
    "json": open_list,
    "csv": open_list,
    "text": open_list,
}
KINDS = {
    ".parquet": "parquet",
    ".tar": "webdataset",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".txt": "text",
}


def open_source(
    *,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    data_dir: str | None = None,
    data_files: str | Sequence[str] | dict | None = None,
    image_dir: str | None = None,
    split: str,
    image_column: str | None = None,
    caption_column: str | None = None,
    product_id_column: str | None = None,
    sides: str = "both",
    other_columns: Sequence[str] | str = (),
    any_split: bool = False,
    cache_dir: str | None = None,
    index_dir: str | None = None,
) -> Source:
    """Open one split of a data set; no photo is read.

    Everything may lie on another machine (`http://`, `https://`, `hf://`, `s3://` and what else fsspec knows); opening
    and reading then survive a bad connection, see `aliblip.data.remote`.

    Args:
        dataset_name: a Hub name, or a local folder.
        dataset_config_name: configuration of that data set, if it has several.
        data_dir: a local folder of Parquet files, WebDataset tars, or photos with `metadata.jsonl`; or, together with
            `dataset_name`, a folder inside that data set.
        data_files: paths, globs or addresses of Parquet files, tars, metadata files or JSON lists of
            `{"product": file name, "caption": text}`; or a dict of them by split. An HTTP server has no globs: name
            every file. Of a folder of millions of photos name its `metadata.jsonl` here: `datasets` looks at every file
            of a `data_dir`.
        image_dir: the folder that file names in a JSON list, or in a Parquet column, are relative to (default: where
            the JSON list lies).
        split: e.g. "train" or "validation".
        image_column: default "image" ("product", "image" or "file_name" in a JSON list).
        caption_column: default "caption", then "text".
        product_id_column: default "product_id" if there is such a column; rows without an id are products by their
            photos, see `aliblip.data.products`.
        sides: what a row must have, "both", or only the "images" (a plain folder of photos will do then, in the order
            of their names) or only the "titles" (a text file with a title a line, or a JSON list of strings will do).
        other_columns: further columns to read, for `Row.others`; or `ALL`, every one but the photo's. Of JSON, whose
            columns only reading it all would tell, a row then also gives keys that are not in `Source.columns`.
        any_split: where `split` does not exist and there is only one, take that.
        cache_dir: cache of `datasets`.
        index_dir: folder to keep where the samples of tars lie, so that no later run or other process of this machine
            has to scan them; default: they are scanned each time.

    Raises:
        UsageError: in one line, what was given, what is there, and what to do.
    """
    asked = Asked(image_column, caption_column, product_id_column, other_columns, sides)
    if sides == "images" and data_dir is not None and dataset_name is None and is_folder_of_photos(data_dir):
        return open_photos(data_dir, asked)
    name, kind, files, split = _find_files(
        dataset_name, dataset_config_name, data_dir, data_files, split, any_split, cache_dir
    )
    if image_dir is not None and "://" not in image_dir and not os.path.isdir(image_dir):
        raise UsageError(f"the image folder '{image_dir}' does not exist: give an existing folder as --image_dir")
    if kind == "text" and sides != "titles":
        raise UsageError(f"{name} holds titles only: a text file can be searched for, but has no photos")
    if kind not in OPENERS:
        raise UsageError(
            f"{name} holds data of the kind '{kind}': accepted are Parquet, WebDataset tars, photos with "
            "metadata.jsonl, and JSON lists; convert it to Parquet with datasets' to_parquet()"
        )
    opened = dataset_name or data_dir
    folder = opened if opened is not None and os.path.isdir(opened) else None
    try:
        return OPENERS[kind](Request(name, split, files, asked, folder, image_dir, cache_dir, index_dir))
    except RemoteReadError as error:  # which names the file
        raise UsageError(one_line(error)) from error
    except OSError as error:
        raise UsageError(f"{name} can't be read: {one_line(error)}") from error


def require_usable_row(source: Source, tries: int = 1000) -> None:
    """Check before a long run that the data holds something: decode rows from the start until one is usable.

    Raises:
        UsageError: none of the first `tries` rows is usable; the first reasons are in the message.
    """
    reasons, tried = [], 0
    for row in source.read_range(0, min(tries, source.num_rows)):
        try:
            decode(row, source.sides)
            return
        except UnusableItem as error:
            tried += 1
            if len(reasons) < 3:
                reasons.append(f"{row.name}: {error}")
    raise UsageError(
        f"none of the first {tried} rows of {source.name} (split '{source.split}') is usable ({'; '.join(reasons)}): "
        "check the image and caption columns and the files"
    )


# --------------------------------------------------------------------------------------------------- finding the files


def _find_files(
    dataset_name: str | None,
    config: str | None,
    data_dir: str | None,
    data_files: Any,
    split: str,
    any_split: bool,
    cache_dir: str | None,
) -> tuple[str, str, list[str], str]:
    """Name for messages, kind, files of the split as `datasets` resolves them, and the split."""
    if dataset_name is None and data_dir is None and data_files is None:
        raise UsageError("no data given: set --dataset_name, --data_dir or --data_files")
    if data_dir is not None and dataset_name is None and "://" not in data_dir and not os.path.isdir(data_dir):
        raise UsageError(f"the data folder '{data_dir}' does not exist: give an existing folder as --data_dir")
    if data_files is None:
        name, given = dataset_name or data_dir, [data_dir or ""]
    else:
        name = _name_of_files(data_files)
        if not isinstance(data_files, dict):
            data_files = {split: data_files}  # files given without split names are the split that is asked for
        if split not in data_files:
            raise UsageError(f"{name} has no split '{split}': there are {listed(data_files)}")
        given = _as_list(data_files[split])
    options: dict[str, Any] = {"data_dir": data_dir, "data_files": data_files, "cache_dir": cache_dir}
    if dataset_name is not None:
        loader, options["name"] = dataset_name, config
    elif data_files is None:
        loader, options["data_dir"], options["name"] = data_dir, None, config
    else:
        loader = _kind_of_files(given, name)
        if all(map(_is_plain_address, given)):
            # Nothing to resolve; and fsspec, asked whether a file is there, says no to any failure over HTTP.
            return name, loader, given, split
    is_on_the_hub = dataset_name is not None and not os.path.exists(dataset_name)
    address = f"hf://datasets/{dataset_name}" if is_on_the_hub else next(filter(is_remote, given), "")
    builder = _builder(name, loader, options, address)
    files, split = _files_of_split(builder, name, split, any_split)
    return name, _kind_of_builder(builder), files, split


def _builder(name: str, loader: str, options: dict[str, Any], address: str) -> Any:
    """The `datasets` builder of what the user named, which knows the files; `address` is where it may have to ask."""
    from datasets import load_dataset_builder

    try:
        return read_patiently(lambda: load_dataset_builder(loader, **options), address)
    except Exception as error:  # datasets and the Hub client have some dozens of classes for "not there"
        raise UsageError(f"{name} can't be opened: {one_line(error)}") from error


def _files_of_split(builder: Any, name: str, split: str, any_split: bool) -> tuple[list[str], str]:
    splits = {str(key): files for key, files in (builder.config.data_files or {}).items()}
    if any_split and split not in splits and len(splits) == 1:
        (split,) = splits
    if split not in splits:
        raise UsageError(f"{name} has no split '{split}': there are {listed(splits)}")
    files = [str(file) for file in splits[split]]
    if not files:
        raise UsageError(f"{name} matches no files for split '{split}': check the path or the glob")
    return files, split


def _kind_of_builder(builder: Any) -> str:
    """The module of a builder's class in `datasets`."""
    # A configured builder of a Hub data set is a subclass made in another module.
    modules = [cls.__module__.rsplit(".", 1)[-1] for cls in type(builder).__mro__]
    return next((module for module in modules if module in OPENERS), modules[0])


def _name_of_files(data_files: Any) -> str:
    if isinstance(data_files, (str, os.PathLike)):
        return str(data_files)
    values = list(data_files.values() if isinstance(data_files, dict) else data_files)
    first = values[0] if values else "no files"
    first = first if isinstance(first, (str, os.PathLike)) else next(iter(first), "no files")
    return str(first) if len(values) < 2 else f"{first} and {len(values) - 1} more"


def _as_list(files: Any) -> list[str]:
    return [str(files)] if isinstance(files, (str, os.PathLike)) else [str(file) for file in files]


def _is_plain_address(file: str) -> bool:
    return file.startswith(("http://", "https://")) and not re.search(r"[*\[]", urlsplit(file).path)


def _kind_of_files(files: Iterable[str], name: str) -> str:
    kinds = {KINDS.get(extension_of(file)) for file in files}
    if len(kinds) != 1 or None in kinds:
        raise UsageError(
            f"{name} is of no known kind: accepted are .parquet, .tar, .json, .jsonl or .csv files of one kind, and "
            "for titles alone .txt"
        )
    return kinds.pop()
