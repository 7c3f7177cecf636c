"""The data card of a prepared catalogue with pictures: a page of HTML, and contact sheets of duplicates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from aliblip.data.prepare_card import describe, doubtful, markdown, photo_of
from aliblip.data.prepare_run import Preparation
from aliblip.retrieval.report import Examples, Hit, SheetRow, Table, contact_sheet, html_report
from aliblip.runtime.files import write_text

__all__ = ["write_data_card"]

SHEET_PAIRS, PAGE_PAIRS, SAMPLES = 16, 8, 8
HEADINGS = {"near": "Nearly the same photos, the least certain first", "exact": "Equal photos, of two products first"}
LEGEND = "one product in the data"


def write_data_card(
    work: Preparation, folder: Path, count_tokens: Callable[[list[str]], list[list[int]]] | None = None
) -> None:
    """Write README.md, card.html, and duplicates-near.png and duplicates-exact.png where there are any.

    Args:
        count_tokens: as for `aliblip.data.prepare_card.describe`.
    """
    card = describe(work, count_tokens)
    write_text(folder / "README.md", markdown(card))
    examples = [Examples("Some rows", _samples(work))]
    for kind, heading in HEADINGS.items():
        rows = _rows(work, kind)
        if rows:
            contact_sheet(rows, folder / f"duplicates-{kind}.png", heading=heading, legend=LEGEND)
            examples.append(Examples(heading, rows[:PAGE_PAIRS], f"framed: {LEGEND}"))
    tables = [Table(section.heading, section.columns, section.rows, section.note) for section in card.sections]
    if card.cleaned:
        tables.append(Table("Titles before and after", ["before", "after"], card.cleaned))
    html_report(folder / "card.html", heading=card.name, tables=tables, examples=examples)


def _rows(work: Preparation, kind: str) -> list[SheetRow]:
    rows = []
    for first, second, similarity in doubtful(work, kind, SHEET_PAIRS):
        is_one = bool(work.facts.product[first] == work.facts.product[second])
        (photo, title), (other, its_title) = photo_of(work, first), photo_of(work, second)
        told = title if title == its_title else f"{title} / {its_title}"
        rows.append(SheetRow(told, [Hit(photo, similarity, is_one), Hit(other, similarity, is_one)]))
    return rows


def _samples(work: Preparation) -> list[SheetRow]:
    """Rows from all over the catalogue."""
    kept = np.flatnonzero(work.decided.sides.side >= 0)
    chosen = kept[np.linspace(0, len(kept) - 1, min(len(kept), SAMPLES)).astype(np.int64)]
    shown = [photo_of(work, int(place)) for place in chosen]
    return [SheetRow(title, [Hit(photo, 1.0, False)]) for photo, title in shown]
