"""A plain folder of photos, without any table."""

from __future__ import annotations

import functools
import hashlib
import os
from dataclasses import replace

from PIL import Image

from aliblip.data.columns import Asked, Request, choose_columns
from aliblip.data.records import METADATA_FILES, Records, RecordSource, extension_of, spans_of_values
from reading_aliblip import IMAGE_FORMATS

__all__ = ["is_folder_of_photos", "open_photos"]


def is_folder_of_photos(folder: str) -> bool:
    """Whether a local folder holds photos and nothing else that rows could come from."""
    found = False
    for _, _, files in os.walk(folder):
        for file in files:
            if file in METADATA_FILES or extension_of(file) in (".parquet", ".tar"):
                return False
            found = found or extension_of(file) in _photo_extensions()
    return found


def open_photos(folder: str, asked: Asked) -> RecordSource:
    """All photos of a folder and its subfolders, sorted by name: the order a directory is listed in is chance."""
    names = sorted(
        os.path.relpath(os.path.join(parent, file), folder).replace(os.sep, "/")
        for parent, _, files in os.walk(folder)
        for file in files
        if extension_of(file) in _photo_extensions()
    )
    spans, data = spans_of_values({"file_name": name} for name in names)
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    table = Records(os.path.join(folder, "photos"), folder, spans, len(data), digest, data)
    request = Request(folder, "all photos", [], replace(asked, image=None), folder=folder)
    selected = choose_columns(request, ["file_name"], ("file_name",))
    return RecordSource(request, ["file_name"], selected, [table], ("file_name",))


@functools.cache
def _photo_extensions() -> frozenset[str]:
    extensions = Image.registered_extensions()
    return frozenset(extension for extension, kind in extensions.items() if kind in IMAGE_FORMATS)
