"""What a file is: by the end of its name, or, where that says nothing, by its first bytes."""

from __future__ import annotations

import functools
import os
import re

from PIL import Image

from aliblip.data.feeds import FEED_NAMESPACE, is_xml
from aliblip.data.tables import PACKINGS, TABLES
from reading_aliblip import HEIC_BRANDS, IMAGE_FORMATS

__all__ = ["HEAD_BYTES", "HEIC", "PACKED_TARS", "kind_by_content", "kind_by_name", "kind_of_head", "skipped_folder"]

# By which a file is known.
HEAD_BYTES = 4096

PARQUET = (".parquet", ".parq", ".pq")
HEIC = (".heic", ".heif", ".hif")
ARCHIVES = (".zip", ".rar", ".7z")
PACKED_TARS = (".tgz", ".tbz2", ".txz")
SHEETS = (".xlsx", ".xls", ".xlsm", ".ods", ".numbers")
ARROW = (".arrow",)  # as `datasets` saves a data set to the disk
OTHER_DATA = (
    *(".feather", ".npy", ".npz", ".pkl", ".pickle", ".h5", ".hdf5", ".db", ".sqlite", ".mdb", ".lmdb"),
    *(".tfrecord", ".bin", ".pt", ".pth", ".safetensors", ".sql", ".orc", ".avro", ".msgpack"),
)
DOCUMENTS = (
    *(".md", ".pdf", ".html", ".htm", ".yaml", ".yml", ".py", ".ipynb", ".sh", ".log", ".rst", ".doc", ".docx"),
    *(".toml", ".cfg", ".ini", ".css", ".js", ".bib", ".lock", ".crc", ".md5", ".sha256", ".lnk", ".url", ".nfo"),
)
DRAWINGS = (".svg", ".eps", ".ai", ".psd", ".cdr", ".dng", ".cr2", ".nef", ".arw", ".raw", ".jxl")
VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".mp3", ".wav", ".m4a", ".gifv")
UNFINISHED = (".part", ".crdownload", ".tmp", ".download", ".incomplete", ".aria2", ".partial")
SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "picasa.ini", ".picasa.ini", "folder.jpg.lnk"}
# What `datasets` and the Hub write beside data.
DESCRIPTIONS = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
DESCRIPTIONS |= {"dummy_data.zip", "preprocessor_config.json", "package.json"}
# Small copies that NAS devices, cameras and programs make, and bins.
SKIPPED_FOLDERS = {"@eadir", "__macosx", "@recycle", "#recycle", "$recycle.bin", "system volume information"}
SKIPPED_FOLDERS |= {"lost+found", "#snapshot", "@recently-snapshot"}
_BMP_HEADERS = tuple(bytes((size, 0, 0, 0)) for size in (12, 40, 108, 124))
_MAGIC = (
    (b"PAR1", "parquet"),
    (b"\xff\xd8\xff", "photo"),
    (b"\x89PNG\r\n\x1a\n", "photo"),
    (b"GIF8", "photo"),
    (b"II*\0", "photo"),
    (b"MM\0*", "photo"),
    (b"\0\0\0\x0cjP  ", "photo"),
    (b"\0\0\0\x0cJXL ", "drawing"),
    (b"\xff\x0a", "drawing"),
    (b"PK\x03\x04", "archive"),
    (b"\x1f\x8b", "archive"),
    (b"%PDF", "document"),
    (b"<svg", "drawing"),
    (b"\xd0\xcf\x11\xe0", "sheet"),
)


@functools.cache
def photo_extensions() -> frozenset[str]:
    """Ends of the names of photos that are read here, beside HEIC."""
    extensions = Image.registered_extensions()
    return frozenset({extension for extension, kind in extensions.items() if kind in IMAGE_FORMATS} - set(HEIC))


def skipped_folder(name: str) -> str | None:
    """Why nothing is looked for in a folder of this name, if so."""
    if name.lower() in SKIPPED_FOLDERS or name.startswith("@__thumb") or name.startswith(".@__thumb"):
        return "thumbnails and system folders"
    if name.startswith(".thumb"):
        return "thumbnails and system folders"
    if name.startswith("."):
        return "hidden folders"
    return "folders whose name begins with two underscores" if name.startswith("__") else None


def kind_by_name(name: str) -> str | None:
    """The kind that a name tells: "photo", "heic", "parquet", "tar", "table", "text", and kinds that are not read:
    "packed tar", "archive", "sheet", "arrow", "data", "document", "drawing", "video", "unfinished", "system",
    "description", "hidden"; None if the name says nothing."""
    lower = name.lower()
    if lower in SYSTEM_FILES or lower.startswith(("._", "~$")) or lower.startswith(".ds_store"):
        return "system"
    if name.startswith("."):
        return "hidden"
    if lower in DESCRIPTIONS:
        return "description"
    if re.fullmatch(r"(?:readme|license|licence|copying|notice|changelog|authors|citation)(?:\.\w+)?", lower):
        return "document"
    stem, extension = os.path.splitext(lower)
    if extension in PACKINGS:
        inner = os.path.splitext(stem)[1]
        if inner == ".tar":
            return "packed tar" if extension == ".zst" else "tar"  # which Python has no reader for
        return _TABLES.get(inner, "archive")
    return _BY_EXTENSION.get(extension) or ("photo" if extension in photo_extensions() else None)


_TABLES = {extension: "text" if kind == "text" else "table" for extension, kind in TABLES.items()}
_BY_EXTENSION = {
    **{extension: kind for extension, kind in _TABLES.items() if extension != ".xml"},  # few are feeds
    **dict.fromkeys(HEIC, "heic"),
    **dict.fromkeys(PARQUET, "parquet"),
    ".tar": "tar",
    **dict.fromkeys(PACKED_TARS, "tar"),
    **dict.fromkeys(ARCHIVES, "archive"),
    **dict.fromkeys(SHEETS, "sheet"),
    **dict.fromkeys(ARROW, "arrow"),
    **dict.fromkeys(OTHER_DATA, "data"),
    **dict.fromkeys(DOCUMENTS, "document"),
    **dict.fromkeys(DRAWINGS, "drawing"),
    **dict.fromkeys(VIDEOS, "video"),
    **dict.fromkeys(UNFINISHED, "unfinished"),
}


def kind_by_content(path: str) -> str:
    """The kind that the first bytes of a file tell: as `kind_by_name`, or "other"."""
    try:
        with open(path, "rb") as stream:
            return kind_of_head(stream.read(HEAD_BYTES))
    except OSError:
        return "unreadable"


def kind_of_head(head: bytes) -> str:
    """The same of the first `HEAD_BYTES` bytes of a file."""
    if not head:
        return "empty"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "photo"
    if head[4:8] == b"ftyp":
        brand = head[8:12]
        if brand in (b"avif", b"avis"):
            return "photo"
        return "heic" if brand in HEIC_BRANDS else "video"
    if head[:2] == b"BM" and head[14:18] in _BMP_HEADERS:
        return "photo"
    if head[257:262] == b"ustar":
        return "tar"
    if is_xml(head):
        feed = FEED_NAMESPACE.encode() in head.replace(b"\0", b"")  # of UTF-16
        return "table" if feed else "drawing" if b"<svg" in head else "data"
    return next((kind for magic, kind in _MAGIC if head.startswith(magic)), "other")
