"""A look at data before a run: a sample of it decoded, and what stands on both sides of a split.

sample = decoded_sample(source)
leak = leakage(train_source, validation_source)
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aliblip.data.products import ProductReport, report
from aliblip.data.remote import is_remote
from aliblip.data.rows import Example, Row, Source, decode
from reading_aliblip import UnusableItem

__all__ = ["Leakage", "Sample", "decoded_sample", "leakage", "sample_rows"]

SAMPLED_ROWS = 200
SAMPLED_REMOTE_ROWS = 64  # the first ones, which a run reads anyway at its start
PLACES = 8  # in the data, from which a sample comes
COMPARED_ROWS = 20_000
PLACES_COMPARED = 64
REASONS = 3


def sample_rows(source: Source, count: int, places: int = PLACES) -> Iterator[Row]:
    """Undecoded rows from places spread evenly over a source, in its order; all of them if they are not more.

    Raises:
        OSError: they can't be read.
    """
    count = min(count, source.num_rows)
    places = 1 if count == source.num_rows else min(places, count)
    stop = 0
    for place in range(places):
        start = max(source.num_rows * place // places, stop)  # rounding may bring two places together
        stop = start + count * (place + 1) // places - count * place // places
        yield from source.read_range(start, stop)


@dataclass
class Sample:
    """Rows that were decoded.

    Attributes:
        rows: tried.
        examples: the usable ones.
        undecoded: rows of these, for a loader to work on.
        reasons: why the others are not, and how often.
        names: of the first of each reason.
        is_all: whether these are all rows there are.
    """

    rows: int = 0
    examples: list[Example] = field(default_factory=list)
    undecoded: list[Row] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    names: dict[str, str] = field(default_factory=dict)
    is_all: bool = False

    @property
    def unusable(self) -> int:
        return self.rows - len(self.examples)

    def sizes(self) -> str:
        """Sides of the photos in pixels, for people."""
        sides = np.array([example.image.size for example in self.examples if example.image is not None])
        if not len(sides):
            return "no photo"
        low, middle, high = (np.quantile(sides.max(axis=1), q, method="nearest") for q in (0, 0.5, 1))
        return (
            f"longest side {low:,} to {high:,} pixels, half of them below {middle:,}" if low < high else f"{low:,} px"
        )

    def told_reasons(self) -> str:
        told = [
            f"{reason} ({count}, such as {self.names[reason]})" for reason, count in self.reasons.most_common(REASONS)
        ]
        more = len(self.reasons) - REASONS
        return "; ".join(told) + (f"; {more} other reasons" if more > 0 else "")


def decoded_sample(source: Source, count: int = SAMPLED_ROWS) -> Sample:
    """Decode `sample_rows`.

    Raises:
        OSError: they can't be read.
    """
    is_remote_source = _is_remote(source)
    count = min(count, SAMPLED_REMOTE_ROWS) if is_remote_source else count
    sample = Sample(is_all=source.num_rows <= count)
    for row in sample_rows(source, count, 1 if is_remote_source else PLACES):
        sample.rows += 1
        try:
            example = decode(row, source.sides)
        except UnusableItem as error:
            reason = str(error)
            sample.reasons[reason] += 1
            sample.names.setdefault(reason, row.name)
            continue
        sample.examples.append(example)
        sample.undecoded.append(row)
    return sample


@dataclass(frozen=True)
class Leakage:
    """What is in the training data and in the validation data too.

    Attributes:
        products: number of products on both sides; None: their ids were not read.
        all_products: of the validation data.
        product_names: some of them.
        photos: photos of the validation data, of those compared, whose bytes are in the training data.
        compared: photos of the validation data that were compared.
        compared_with: photos of the training data that they were compared with.
        photo_names: some of them.
        is_all: whether all photos of both sides were compared.
    """

    products: int | None
    all_products: int
    product_names: tuple[str, ...]
    photos: int
    compared: int
    compared_with: int
    photo_names: tuple[str, ...]
    is_all: bool


def leakage(
    train: Source,
    validation: Source,
    rows: int = COMPARED_ROWS,
    reports: tuple[ProductReport | None, ProductReport | None] = (None, None),
) -> Leakage:
    """Look for products and photos that are on both sides.

    Products are compared wherever ids can be read without the photos. Photos are compared by their bytes, of at most
    `rows` rows of each side, from places all over it; nothing is fetched from other machines.

    Args:
        reports: on the products of both sides, if they were made already.

    Raises:
        OSError: a source can't be read.
    """
    products, all_products, names = _shared_products(train, validation, *reports)
    if _is_remote(train) or _is_remote(validation):
        rows = 0
    places, compared = _validation_photos(validation, rows)
    shared: dict[str, None] = {}
    compared_with = 0
    for row in sample_rows(train, rows, PLACES_COMPARED):
        size = _size(row.image)
        compared_with += size is not None
        if size is not None and size in places and (found := places[size].get(_digest(row.image))) is not None:
            shared.update(dict.fromkeys(found))
    return Leakage(
        products=products,
        all_products=all_products,
        product_names=names,
        photos=len(shared),
        compared=compared,
        compared_with=compared_with,
        photo_names=tuple(shared)[:REASONS],
        is_all=max(train.num_rows, validation.num_rows) <= rows,
    )


def _validation_photos(source: Source, rows: int) -> tuple[dict[int, dict[bytes, list[str]]], int]:
    """{size: {digest: names of the rows}} of photos, and how many there are."""
    places: dict[int, dict[bytes, list[str]]] = {}
    compared = 0
    for row in sample_rows(source, rows, PLACES_COMPARED):
        size = _size(row.image)
        if size is None or (digest := _digest(row.image)) is None:
            continue
        compared += 1
        places.setdefault(size, {}).setdefault(digest, []).append(row.name)
    return places, compared


def _shared_products(
    train: Source, validation: Source, of_train: ProductReport | None, of_validation: ProductReport | None
) -> tuple[int | None, int, tuple[str, ...]]:
    of_train, of_validation = of_train or report(train), of_validation or report(validation)
    if of_train.ids is None or of_validation.ids is None:
        return None, 0, ()
    shared = np.intersect1d(of_train.ids, of_validation.ids, assume_unique=True)
    rows = of_validation.first[np.searchsorted(of_validation.ids, shared[:REASONS])]
    return len(shared), len(of_validation.ids), tuple(validation.product_name(int(row)) for row in rows)


def _is_remote(source: Source) -> bool:
    return any(is_remote(file.file) for file in source.files)


def _size(image: Any) -> int | None:
    """Bytes of a stored photo, or None if it does not lie here."""
    if isinstance(image, (bytes, bytearray, memoryview)):
        return len(image)
    if not isinstance(image, str) or is_remote(image) or image.startswith("data:"):
        return None
    try:
        status = os.stat(image)
        return status.st_size if stat.S_ISREG(status.st_mode) else None  # a named pipe would be read for ever
    except (OSError, ValueError):
        return None


def _digest(image: Any) -> bytes | None:
    if isinstance(image, str):
        try:
            with open(image, "rb") as file:
                image = file.read()
        except OSError:
            return None
    return hashlib.blake2b(image, digest_size=16).digest()
