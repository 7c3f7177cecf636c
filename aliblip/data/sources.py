"""Where photos and titles come from: Parquet, WebDataset, ImageFolder, Hub names, JSON lists.

    source = open_source(data_dir="catalogue", split="train")
    for row in source.read(shard_index=0, start=10, stop=20):
        example = decode(row)

To add a kind of data:

1. write one file here with a subclass of `Source`, whose `_read` yields rows, and its opener `open_x(request)`;
2. enter the opener in `OPENERS`, and the files' extension in `aliblip.data.kinds`;
3. add a catalogue of it to the layouts of tests/test_sources.py, which then holds it to what all kinds do.

Which files of a local folder are read, and which split they are, `aliblip.data.local` decides by rules that are told;
of a data set on the Hub `datasets` knows. Parquet is read by `datasets` streaming. Tars and tables are read here,
because a single bad record (a metadata line without its file, JSON that does not parse, a sample without a title) makes
`datasets` raise inside its generator, which ends the stream; here it is one unusable row.
"""

from __future__ import annotations

import glob
import os
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from aliblip.data.columns import ALL, Asked, Reading, Request, further_photos, listed
from aliblip.data.folders import Survey
from aliblip.data.local import Found, expanded, find_files, find_in_folder, is_metadata, kind_of_files
from aliblip.data.missing import MISSING
from aliblip.data.parquet import open_parquet
from aliblip.data.photos import open_photos, open_sided
from aliblip.data.records import open_metadata, open_records
from aliblip.data.remote import RemoteReadError, is_remote, read_patiently
from aliblip.data.rows import Source, decode
from aliblip.data.values import local_path
from aliblip.data.webdataset import open_tars
from aliblip.runtime.mistakes import UsageError, one_line, usage_errors
from reading_aliblip import UnusableItem

__all__ = ["ALL", "Reading", "open_source", "require_usable_row"]

OPENERS: dict[str, Callable[[Request], Source]] = {
    "parquet": open_parquet,
    "webdataset": open_tars,
    "metadata": open_metadata,
    "records": open_records,
    "text": open_records,
    "photos": open_photos,
    "sided": open_sided,
}
# Nothing told about how tables are written.
AS_FOUND = Reading()
# Of builders of `datasets`, by the name of their module.
BUILDERS = {
    "parquet": "parquet",
    "webdataset": "webdataset",
    "imagefolder": "metadata",
    "json": "records",
    "csv": "records",
    "text": "text",
}


def open_source(
    *,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    data_dir: str | None = None,
    data_files: str | Sequence[str] | dict | None = None,
    image_dir: str | None = None,
    fetch_photos: bool = False,
    split: str,
    image_column: str | None = None,
    caption_column: str | None = None,
    product_id_column: str | None = None,
    sides: str = "both",
    other_columns: Sequence[str] | str = (),
    any_split: bool = False,
    cache_dir: str | None = None,
    index_dir: str | None = None,
    reading: Reading = AS_FOUND,
) -> Source:
    """Open one split of a data set; no photo is read.

    `source.report()` says what was found, what is read and how it was understood, and what is left and why.

    Everything may lie on another machine (`http://`, `https://`, `hf://`, `s3://` and what else fsspec knows); opening
    and reading then survive a bad connection, see `aliblip.data.remote`.

    Args:
        dataset_name: a Hub name, or a local folder.
        dataset_config_name: configuration of that data set, if it has several.
        data_dir: a local folder of Parquet files, WebDataset tars, tables, or photos with `metadata.jsonl`; or,
            together with `dataset_name`, a folder inside that data set. All of its files are looked at
            (`aliblip.data.local`).
        data_files: paths, globs, braces (`{000..012}.tar`) or addresses of Parquet files, tars or tables (CSV, JSON in
            its forms, packed or not); or a dict of them by split. An HTTP server has no globs: name every file.
        image_dir: the folder that file names in a table, or in a Parquet column, are relative to (default: where the
            table lies, or the folder near it where they are found).
        fetch_photos: fetch the photos that a table or a column names by address, each time that a row is read;
            otherwise such a table is refused, and a single such row is unusable.
        split: e.g. "train" or "validation"; `aliblip.data.splits` says how a folder's splits are told apart.
        image_column: default "image" ("product", "image" or "file_name" in a table), then what people call it.
        caption_column: default "caption", then "text", then what people call it.
        product_id_column: default "product_id" if there is such a column; rows without an id are products by their
            photos, see `aliblip.data.products`.
        sides: what a row must have, "both", or only the "images" (a plain folder of photos will do then, in the order
            of their names) or only the "titles" (a text file with a title a line, or a JSON list of strings will do).
        other_columns: further columns to read, for `Row.others`; or `ALL`, every one but the photo's.
        any_split: where `split` does not exist and there is only one, take that.
        cache_dir: cache of `datasets`.
        index_dir: folder to keep where the samples of tars lie, so that no later run or other process of this machine
            has to scan them; default: they are scanned each time.
        reading: how tables are written, where their files do not show it.

    Raises:
        UsageError: in one line, what was given, what is there, and what to do.
    """
    data_dir, image_dir, data_files = _local(data_dir), _local(image_dir), _local(data_files)
    asked = Asked(image_column, caption_column, product_id_column, other_columns, sides, fetch=fetch_photos)
    given = _given(dataset_name, dataset_config_name, data_dir, data_files, split)
    name = given.name
    with usage_errors(OSError, told=f"{name} can't be read: {{}}"):
        found = _find(given, any_split, cache_dir, asked, reading)
    if image_dir is not None and "://" not in image_dir and not os.path.isdir(image_dir):
        raise UsageError(f"the image folder '{image_dir}' does not exist: give an existing folder as --image_dir")
    if found.kind == "text" and sides != "titles":
        raise UsageError(f"{name} holds titles only: a text file can be searched for, but has no photos")
    if found.kind not in OPENERS:
        raise UsageError(
            f"{name} holds data of the kind '{found.kind}': accepted are Parquet, WebDataset tars, photos with "
            "metadata.jsonl, and tables; convert it to Parquet with datasets' to_parquet()"
        )
    opened = dataset_name or data_dir
    folder = opened if opened is not None and os.path.isdir(opened) else None
    request = Request(
        name,
        found.split,
        found.files,
        asked,
        folder,
        image_dir,
        cache_dir,
        index_dir,
        reading,
        found.survey,
        found.below,
        list(found.told),
        split,
    )
    try:
        source = OPENERS[found.kind](request)
    except RemoteReadError as error:  # which names the file
        raise UsageError(one_line(error)) from error
    except OSError as error:
        raise UsageError(f"{name} can't be read: {one_line(error)}") from error
    if found.lacks_split is not None and source.split != split:
        raise UsageError(found.lacks_split)
    if found.survey is not None:
        _tell_survey(source, found)
    _tell_split_columns(source)
    _tell_further_photos(source)
    return source


def _tell_further_photos(source: Source) -> None:
    """Say of columns that are called as those of photos are that their photos are not read."""
    known = {source.selected.image, source.selected.caption, source.selected.product_id}
    further = [
        column
        for column in further_photos(source.columns)
        if column not in known and not any(f"'{column}'" in line for line in source.told)
    ]
    if further and source.selected.image is not None:
        source.told.append(f"the photos of further columns are not read: {listed(further)}")


def _tell_split_columns(source: Source) -> None:
    """Say of a column that is called as one of splits that it divides nothing: rows to test on would be trained on."""
    for column in source.columns:
        if re.fullmatch(r"(?i)(.*[^a-z])?split", column) and not any(f"'{column}'" in line for line in source.told):
            source.told.append(
                f"the column '{column}' divides nothing: all rows are read as '{source.split}' (python -m "
                f"aliblip.prepare --split_by column --split_column {shlex.quote(column)} divides them)"
            )


def _tell_survey(source: Source, found: Found) -> None:
    """Add to what is said of the source what was found in its folder, and what is left of that and why."""
    survey = found.survey
    if found.kind in ("parquet", "webdataset") and survey.num_photos and not survey.is_compared:
        first = next(survey.photo_names())
        survey.leave("photos beside rows that hold theirs", first, survey.num_photos)
    if found.kind not in ("sided",) and survey.num_sided:
        photo, sides = next(survey.sided_photos())
        survey.leave("files beside photos of the same name", sides[0], survey.num_sided)
    source.told.insert(0, f"found: {survey.found}")
    source.told.extend(f"left: {reason}: {entry.told()}" for reason, entry in survey.left.items())


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
    remedy = "check the image and caption columns and the files"
    if any(MISSING in reason for reason in reasons):
        remedy += "; if the photos lie in another folder, give that one as --image_dir"
    raise UsageError(
        f"none of the first {tried} rows of {source.name} (split '{source.split}') is usable ({'; '.join(reasons)}): "
        f"{remedy}"
    )


# --------------------------------------------------------------------------------------------------- finding the files


@dataclass(frozen=True)
class _Given:
    """What the user named; `files` are those of the split, if files were named at all."""

    name: str
    dataset_name: str | None
    config: str | None
    data_dir: str | None
    data_files: dict[str, Any] | None
    files: list[str] | None
    split: str

    @property
    def is_on_the_hub(self) -> bool:
        return self.dataset_name is not None and not os.path.exists(self.dataset_name)

    @property
    def folder(self) -> str:
        """The folder that was named, if it was one of this machine."""
        return os.path.join(self.dataset_name or "", self.data_dir or "")


def _local(given: Any) -> Any:
    """What was given, in which file: URLs are paths."""
    if isinstance(given, dict):
        return {split: _local(files) for split, files in given.items()}
    if isinstance(given, (list, tuple)):
        return [_local(each) for each in given]
    return local_path(given) if isinstance(given, str) else given


def _given(dataset_name: str | None, config: str | None, data_dir: str | None, data_files: Any, split: str) -> _Given:
    if dataset_name is None and data_dir is None and data_files is None:
        raise UsageError("no data given: set --dataset_name, --data_dir or --data_files")
    if data_dir is not None and dataset_name is None and "://" not in data_dir and not os.path.isdir(data_dir):
        if os.path.isfile(data_dir):
            raise UsageError(f"--data_dir: {data_dir} is a file: give a folder, or name the file by flags")
        raise UsageError(f"the data folder '{data_dir}' does not exist: give an existing folder as --data_dir")
    name = str(dataset_name or data_dir) if data_files is None else _name_of_files(data_files)
    if data_files is None:
        return _Given(name, dataset_name, config, data_dir, None, None, split)
    if not isinstance(data_files, dict):
        data_files = {split: data_files}  # files given without split names are the split that is asked for
    if split not in data_files:
        raise UsageError(f"{name} has no split '{split}': there are {listed(data_files)}")
    return _Given(name, dataset_name, config, data_dir, data_files, _as_list(data_files[split]), split)


def _find(given: _Given, any_split: bool, cache_dir: str | None, asked: Asked, reading: Reading) -> Found:
    """The files of the split: of this machine by our rules, else as `datasets` resolves them."""
    is_here = not given.is_on_the_hub and not is_remote(given.data_dir or "")
    if given.files is None:
        if is_here and given.config is None and os.path.isdir(given.folder) and not _has_configurations(given.folder):
            return find_in_folder(given.folder, given.name, given.split, asked, reading, any_split)
        return _find_by_datasets(given, any_split, cache_dir, asked, reading)
    if is_here and not any(map(is_remote, given.files)):
        return find_files(given.files, given.name, given.split, asked, reading, given.folder or None)
    files = [one for file in given.files for one in (expanded(file) if is_remote(file) else [file])]
    if given.dataset_name is None and all(map(_is_plain_address, files)):
        # Nothing to resolve; and fsspec, asked whether a file is there, says no to any failure over HTTP.
        return Found(kind_of_files(files, given.name, asked, reading), files, given.split)
    given = replace(given, files=files, data_files={**given.data_files, given.split: files})
    return _find_by_datasets(given, any_split, cache_dir, asked, reading)


def _find_by_datasets(given: _Given, any_split: bool, cache_dir: str | None, asked: Asked, reading: Reading) -> Found:
    """The files that the builder of `datasets` knows, of the Hub, or matching patterns in a bucket."""
    options: dict[str, Any] = {"data_dir": given.data_dir, "data_files": given.data_files, "cache_dir": cache_dir}
    if given.dataset_name is not None:
        loader, options["name"] = given.dataset_name, given.config
    elif given.files is None:
        loader, options["data_dir"], options["name"] = given.data_dir, None, given.config
    else:
        loader = _builder_of(kind_of_files(given.files, given.name, asked, reading))
    hub = [f"hf://datasets/{given.dataset_name}"] if given.is_on_the_hub else []
    address = next(filter(is_remote, [*hub, *(given.files or []), given.data_dir or ""]), "")
    builder = _builder(given.name, loader, options, address)
    files, split = _files_of_split(builder, given.name, given.split, any_split)
    found = _of_builder(builder, given.name, files, split)
    if given.files is None and os.path.isdir(given.folder):
        found.told += _told_configuration(given.folder, builder, split)
    return found


def _told_configuration(folder: str, builder: Any, split: str) -> Iterator[str]:
    """What a local folder holds whose README.md says which files are read: those, and what is left."""
    survey = Survey.of(os.path.realpath(folder))
    yield f"found: {survey.found}"
    named = {
        str(name): {os.path.relpath(os.path.realpath(file), survey.root) for file in files}
        for name, files in builder.config.data_files.items()
    }
    yield f"read: {len(named.get(split, ())):,} of them, as README.md says"
    for name, files in named.items():
        if name != split:
            survey.leave(f"files of the split '{name}'", min(files), len(files))
    every = set().union(*named.values())
    for files in survey.data.values():
        for file in sorted(set(files) - every):
            survey.leave("files that README.md does not name", file)
    yield from (f"left: {reason}: {entry.told()}" for reason, entry in survey.left.items())


def _of_builder(builder: Any, name: str, files: list[str], split: str) -> Found:
    module = _module_of(builder)
    kind = BUILDERS.get(module, module)
    if kind != "metadata":
        return Found(kind, files, split)
    tables = [file for file in files if is_metadata(file)]
    if not tables:
        raise UsageError(
            f"{name} has photos but no metadata.jsonl or metadata.csv in split '{split}': add one with the columns "
            "file_name and caption, or give a JSON list as --data_files with --image_dir"
        )
    if any(file.endswith(".parquet") for file in tables):
        return Found("parquet", tables, split)
    return Found(kind, tables, split)


def _has_configurations(folder: str) -> bool:
    """Whether a folder's README.md says which files are which split, as those of the Hub can."""
    try:
        with open(os.path.join(folder, "README.md"), encoding="utf-8") as stream:
            text = stream.read(2**16)
    except (OSError, UnicodeDecodeError):
        return False
    front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    return front is not None and re.search(r"^configs:", front.group(1), re.MULTILINE) is not None


def _builder_of(kind: str) -> str:
    return {"records": "json", "webdataset": "webdataset", "text": "text"}.get(kind, kind)


def _builder(name: str, loader: str, options: dict[str, Any], address: str) -> Any:
    """The `datasets` builder of what the user named, which knows the files; `address` is where it may have to ask."""
    from datasets import load_dataset_builder

    if os.path.isdir(loader):
        loader = glob.escape(loader)
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


def _module_of(builder: Any) -> str:
    """The module of a builder's class in `datasets`."""
    # A configured builder of a Hub data set is a subclass made in another module.
    modules = [cls.__module__.rsplit(".", 1)[-1] for cls in type(builder).__mro__]
    return next((module for module in modules if module in BUILDERS), modules[0])


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
