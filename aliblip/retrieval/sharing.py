"""A gallery in another place: a copy of one version, a data set of the Hub, and what is believed of one from there."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download

from aliblip.retrieval.building import read_skipped, write_skipped
from aliblip.retrieval.tables import (
    ITEMS,
    PHOTO_ROOT,
    SKIPPED,
    Facts,
    enough_room,
    is_address,
    lance_options,
    open_dataset,
    table_exists,
    table_uri,
)
from aliblip.runtime.mistakes import UsageError, one_line, usage_errors
from aliblip.runtime.retries import retried

__all__ = ["check_foreign", "downloaded", "is_download", "is_hub_name", "push", "save_copy"]

_FILES = (f"{ITEMS}.lance/**", f"{SKIPPED}.lance/**")
_CARD = """---
tags:
- aliblip
- image-text-retrieval
---

# A gallery for AliBLIP

{count} {what} with their embeddings, a table of [LanceDB](https://lancedb.github.io/lance/). Columns: {columns}.
{model}

```python
from aliblip import Gallery

gallery = Gallery.open("{name}")
```

Photos are read only from `photo_root`, a folder of yours: `Gallery.open("{name}", photo_root="photos")`. {thumbnails}
"""


def is_hub_name(uri: str | os.PathLike) -> bool:
    """Whether it can only be the name of a data set on the Hub: `me/gallery`, and no such folder is here."""
    return isinstance(uri, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", uri) is not None and not os.path.exists(uri)


def downloaded(name: str, revision: str | None, token: str | bool | None) -> str:
    """The local folder of a gallery on the Hub.

    Raises:
        UsageError: the Hub gives no such data set.
    """
    try:
        return snapshot_download(
            name,
            repo_type="dataset",
            revision=revision,
            token=token,
            allow_patterns=[*_FILES, "gallery.json"],  # the latter tells a gallery of version 0.1
        )
    except Exception as error:  # of many kinds, from the connection to the name
        raise UsageError(f"{name} is neither a folder nor a data set that the Hub gives: {one_line(error)}") from error


def is_download(uri: str) -> bool:
    """Whether a folder is what a download from the Hub has left, or a part of it, whatever it says of itself: of the
    Hub's cache, or of what `hf download --local-dir` has written. What was made beside such a part is no download."""
    if is_address(uri):
        return False
    place = Path(uri).resolve()
    folders = (place, *place.parents)
    of_cache = any(one.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", one.name) for one in folders)
    by_hand = Path(".cache", "huggingface")
    # There it notes each file, in folders of the same names.
    noted = any((one / by_hand / "download" / place.relative_to(one)).is_dir() for one in folders)
    return of_cache or noted or (place / by_hand).is_dir()


def check_foreign(uri: str) -> None:
    """Refuse tables from somebody else that name files elsewhere.

    Raises:
        UsageError: they do.
    """
    for name in (ITEMS, SKIPPED):
        if not table_exists(uri, name):
            continue
        dataset = open_dataset(uri, name)
        files = [file for one in dataset.get_fragments() for file in one.metadata.files]
        elsewhere = dataset.base_paths() or any(getattr(file, "base_id", None) is not None for file in files)
        if elsewhere or not all(re.fullmatch(r"[\w-]+\.lance", str(file.path)) for file in files):
            raise UsageError(f"the gallery {uri} names files outside of its own folder: it is not opened")


def save_copy(
    dataset, facts: Facts, uri: str, storage_options: Mapping[str, Any] | None, of_source: Mapping[str, Any] | None
) -> None:
    """Copy one version of a gallery, its index included, to a place that holds none. Whole or not at all.

    Args:
        dataset: the version of `items`.
        facts: those of the copy.
        uri: the place.
        storage_options: for it, if it is an address.
        of_source: the same of the place that is copied.
    """
    if table_exists(uri, storage_options=storage_options):
        raise UsageError(f"{uri} holds a gallery: give a new place")
    if is_address(uri):
        with tempfile.TemporaryDirectory() as folder:
            copied = _clone(dataset, facts, folder, of_source)
            copied.deep_clone(table_uri(uri, ITEMS), copied.version, lance_options(storage_options) or {})
            write_skipped(uri, facts.build, read_skipped(folder, facts.build, None), storage_options)
        return
    place = Path(uri)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise UsageError(f"{uri} holds something else: give a new or an empty folder")
    with usage_errors(OSError, told=f"the folder {uri} can't be made ({{}}): give another place"):
        place.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent)
    try:
        with enough_room():
            _clone(dataset, facts, folder, of_source)
        os.chmod(folder, 0o755)
        os.replace(folder, place)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _clone(dataset, facts: Facts, folder: str, of_source: Mapping[str, Any] | None):
    """One version in a new folder, with other facts and no history."""
    uri = os.path.dirname(dataset.uri)
    copied = dataset.deep_clone(table_uri(folder, ITEMS), dataset.version, {})
    copied.update_schema_metadata(facts.as_lance_metadata())
    if facts.is_foreign and PHOTO_ROOT in copied.config():  # a folder of this machine is nobody else's affair
        copied.delete_config_keys([PHOTO_ROOT])
    copied.cleanup_old_versions(timedelta(0))
    skipped = read_skipped(uri, facts.build, of_source)
    if skipped:
        write_skipped(folder, facts.build, skipped, None)
    return copied


def push(
    dataset,
    facts: Facts,
    name: str,
    *,
    private: bool | None,
    token: str | bool | None,
    message: str,
    of_source: Mapping[str, Any] | None,
) -> str:
    """Upload one version as a data set of the Hub; the address of the commit."""
    api = HfApi(token=token)
    what = f"the upload to {name}"
    # Each version of the library brings its HTTP client with errors of its own.
    refused = (
        f"{what} failed ({{}}): look at the name, at HF_TOKEN, which has to be one that writes, and at the network"
    )
    with usage_errors(Exception, told=refused):
        retried(lambda: api.create_repo(name, repo_type="dataset", private=private, exist_ok=True), what=what)
    facts = replace(facts, is_foreign=True)  # for whoever opens it
    with tempfile.TemporaryDirectory() as folder:
        copied = _clone(dataset, facts, folder, of_source)
        card = _CARD.format(
            name=name,
            count=f"{copied.count_rows():,}",
            what=facts.items,
            columns=", ".join(f"`{field.name}` ({field.type})" for field in copied.schema),
            model=f"Fingerprint of the model: `{facts.model}`." if facts.model else "",
            thumbnails="" if facts.thumbnail_side is None else "Thumbnails are in the table.",
        )
        Path(folder, "README.md").write_text(card, encoding="utf-8")
        with usage_errors(Exception, told=refused):
            commit = retried(
                lambda: api.upload_folder(
                    repo_id=name,
                    repo_type="dataset",
                    folder_path=folder,
                    commit_message=message,
                    delete_patterns=[*_FILES, "*.npy", "*.jsonl", "*.safetensors", "*.index", "gallery.json"],
                ),
                what=what,
            )
    return str(commit)
