"""Listings of ABO (Amazon Berkeley Objects): products that name their photos by ids, and a table of where these lie.

    tables = with_photos(request, tables, roles)

    listings/metadata/listings_0.json.gz   {"item_id": ..., "item_name": [{"language_tag": "en_US", "value": ...}, ...],
                                            "main_image_id": "81iZlv3bjpL", "other_image_id": [...]}
    images/metadata/images.csv.gz          image_id,height,width,path
    images/small/14/14fe8812.jpg           where the path leads

The table of photos is one of the folder's, or looked for near the listings. Where there is none, the ids are taken for
names of files.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from aliblip.data.columns import Request, Roles
from aliblip.data.places import folders_below
from aliblip.data.remote import is_remote
from aliblip.data.tables import Table, open_table

__all__ = ["with_photos"]

LISTING = {"item_id", "item_name", "main_image_id"}
PHOTOS = {"image_id", "path"}
NAMES = ("images.csv", "images.csv.gz")
SHOWN_LANGUAGES = 5


def with_photos(request: Request, tables: Sequence[Table], roles: Roles) -> list[Table]:
    """The tables, in which listings have the paths of their photos as the column "image"; without that of the photos.

    Raises:
        UsageError: the table of photos can't be read.
    """
    listings = [table for table in tables if set(table.columns) >= LISTING]
    if not listings or request.asked.image not in (None, "image"):
        return list(tables)
    photos = [table for table in tables if table not in listings and set(table.columns) >= PHOTOS]
    others = [table for table in tables if table not in photos]
    if not photos and (file := _near(request, listings[0].file)) is not None:
        photos = [open_table(file, request.reading, roles, request.split)]
    if not photos:
        return others
    paths: dict[Any, str] = {}
    for table in photos:
        records = table.read(0, len(table))
        paths |= {record["image_id"]: record["path"] for record in records if isinstance(record, dict)}
        request.told.append(f"{table.name}: where {len(paths):,} photos of listings lie")
    for table in listings:
        _join(table, paths, roles)
        digest = hashlib.blake2b("".join((table.digest, *(each.digest for each in photos))).encode(), digest_size=16)
        table.digest = digest.hexdigest()  # other photos are other rows
        table.photo_folders = [folder for each in photos for folder in _around(each.file)]
    return others


def _near(request: Request, listing: str) -> str | None:
    """The table of photos that lies near a local file of listings, or near the photos."""
    if is_remote(listing):
        return None
    own = os.path.dirname(os.path.abspath(listing))
    folders = [own, os.path.dirname(own), os.path.join(own, "..", "..", "images", "metadata")]
    if request.image_dir is not None and not is_remote(request.image_dir):
        above = os.path.join(request.image_dir, "..")
        folders += [request.image_dir, above, os.path.join(above, "metadata")]
    places = (os.path.normpath(os.path.join(folder, name)) for folder in folders for name in NAMES)
    return next(filter(os.path.isfile, places), None)


def _around(photos: str) -> list[str]:
    """Folders that the paths of a table of photos may be relative to."""
    if is_remote(photos):
        return []
    own = os.path.dirname(os.path.abspath(photos))
    return [own, *folders_below(own), os.path.dirname(own), *folders_below(os.path.dirname(own))]


def _join(table: Table, paths: dict[Any, str], roles: Roles) -> None:
    count: Counter[str] = Counter()
    languages: Counter[str] = Counter()

    def records() -> Iterator[Any]:
        for record in table.read(0, len(table)):
            yield _joined(record, paths, count, languages) if isinstance(record, dict) else record

    table.rewrite(records(), roles)
    table.product_column = "item_id"
    told = ", ".join(f"{language} {titles:,}" for language, titles in languages.most_common(SHOWN_LANGUAGES))
    more = ", ..." if len(languages) > SHOWN_LANGUAGES else ""
    table.told.append(f"{table.name}: listings of ABO; each title is a row, in each language once ({told}{more})")
    for what, number in count.items():
        table.told.append(f"{table.name}: {number:,} {what}")


def _joined(record: dict[str, Any], paths: dict[Any, str], count: Counter, languages: Counter) -> dict[str, Any]:
    main = record.get("main_image_id")
    if main is None:
        count["listings have no photo (main_image_id)"] += 1
    elif main not in paths:
        count["listings name a photo that the table of photos does not have"] += 1
    if others := record.get("other_image_id"):
        count["further photos (other_image_id) are not read"] += len(others)
    titles: dict[str, None] = {}
    for name in record.get("item_name") or ():
        if isinstance(name, dict) and isinstance(name.get("value"), str):
            if name["value"] not in titles:
                languages[str(name.get("language_tag"))] += 1
            titles[name["value"]] = None
    return {**record, "image": paths.get(main, main), "item_name": list(titles)}
