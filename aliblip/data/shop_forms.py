"""Exports of shops: Shopify's and WooCommerce's, whose rows lean on each other, and the feed of Google Merchant."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

__all__ = [
    "WOOCOMMERCE_PRODUCT",
    "feed_notes",
    "is_shopify",
    "is_woocommerce",
    "merchant_product",
    "shopify_rows",
    "woocommerce_rows",
]

SHOPIFY = {"Handle", "Title", "Image Src"}
WOOCOMMERCE = {"ID", "Type", "Name", "Images", "Parent"}
# The column that is added to an export of WooCommerce: of a variation the product that it is one of.
WOOCOMMERCE_PRODUCT = "product_id"


def is_shopify(columns: Sequence[str]) -> bool:
    """Whether a table is an export of products as Shopify writes it."""
    return set(columns) >= SHOPIFY


def is_woocommerce(columns: Sequence[str]) -> bool:
    """Whether a table is an export of products as WooCommerce writes it."""
    return set(columns) >= WOOCOMMERCE and WOOCOMMERCE_PRODUCT not in columns


def _plain(column: str) -> str:
    return re.sub(r"[\W_]", "", column).lower()


def merchant_product(columns: Sequence[str]) -> str | None:
    """The column of the products of a feed for Google Merchant: of its variants, which are items of one group."""
    plain = {_plain(column): column for column in columns}
    return plain.get("itemgroupid") if {"id", "title", "imagelink"} <= set(plain) else None


def feed_notes(columns: Sequence[str]) -> Iterator[str]:
    """What is to be said of a feed for Google Merchant with these columns."""
    if (group := merchant_product(columns)) is not None:
        yield f"items of one '{group}' are one product"
    further = [column for column in columns if _plain(column) == "additionalimagelink"]
    if further:
        yield f"further photos ('{further[0]}') are not read"


def shopify_rows(records: Iterable[Any]) -> tuple[list[Any], str]:
    """The rows with a photo, each with its product's title, and a sentence on what was done.

    The title of a product stands in its first row. The others of the same handle are further photos and variants; a
    variant without a photo of its own is no row for us. What is no record stays where it is, for the report.
    """
    rows: list[Any] = []
    titles: dict[str, str] = {}
    inherited, without = 0, 0
    own: set[str] = set()
    of_variants: set[str] = set()
    for record in records:
        if not isinstance(record, dict):
            rows.append(record)
            continue
        own.add(record.get("Image Src"))
        of_variants.add(record.get("Variant Image"))
        handle = record.get("Handle")
        title = record.get("Title") or titles.get(handle)
        if title is not None:
            titles.setdefault(handle, title)
        if not record.get("Image Src"):
            without += 1
            continue
        if not record.get("Title") and title is not None:
            inherited += 1
            record = {**record, "Title": title}
        rows.append(record)
    told = f"Shopify's export: {inherited:,} further photos have the title of their product (by 'Handle')"
    told += f"; {without:,} rows without a photo are no rows" if without else ""
    further = len(of_variants - own - {None})
    return rows, told + (f"; {further:,} photos of 'Variant Image' alone are not read" if further else "")


def woocommerce_rows(records: Sequence[Any]) -> tuple[list[Any], str]:
    """The rows with photos, each with its product as a column "product_id", and a sentence on what was done.

    A variation names the product that it belongs to as "id:12" or by that one's SKU. A row without a photo is no row
    for us. What is no record stays where it is, for the report.
    """
    ids = {record["SKU"]: record["ID"] for record in records if isinstance(record, dict) and record.get("SKU")}
    rows: list[Any] = []
    variations, without = 0, 0
    for record in records:
        if not isinstance(record, dict):
            rows.append(record)
        elif not record.get("Images"):
            without += 1
        else:
            parent = record.get("Parent")
            variations += parent is not None
            product = record["ID"] if parent is None else ids.get(parent, parent.removeprefix("id:"))
            rows.append({**record, WOOCOMMERCE_PRODUCT: product})
    told = ["WooCommerce's export"]
    told += [f"{variations:,} variations with photos are of the product that 'Parent' names"] if variations else []
    told += [f"{without:,} rows without a photo are no rows"] if without else []
    return rows, "; ".join(told)
