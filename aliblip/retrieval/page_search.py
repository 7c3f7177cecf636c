"""What the search page finds: a gallery, the pipeline that searches it, and results as a visitor may see them.

    searcher = Searcher(pipe, gallery, show_columns=["title", "price"], filter_columns=["category"])
    found = searcher.by_title("striped blue mug", top_k=12, rerank=64, chosen={"category": ["mug"]})
    searcher.tiles(found)

Usable from many threads, and while other processes change the gallery: a search sees one version of it.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from PIL import Image

from aliblip.retrieval.page_filters import (
    VisitorMistake,
    choices_of,
    choose_filters,
    condition_of,
    kind_of,
    require_columns,
    text_of,
)
from aliblip.retrieval.page_tiles import Tile, to_jpeg
from aliblip.runtime.mistakes import UsageError
from pipeline_aliblip import AliBlipImageTextRetrievalPipeline
from reading_aliblip import UnusableItem, clean_title

MAX_TOP_K = 100
MAX_RERANK = 512
EXAMPLES = 5
EMPTY_TITLE = "Type what you are looking for, such as: striped blue mug"
SCORES = ("id", "score", "itc", "itm_logit", "itm_probability")

# The first of these that a gallery has, and that holds text, stands below its photos.
_CAPTION_COLUMNS = ("caption", "title", "name", "text")
_EXAMPLE_ROWS = 200
_MOST_EXAMPLE_CHARACTERS = 100
_READABLE_ROWS = 8
# Photos of results that are held decoded at a time for all visitors together.
_PHOTOS_AT_ONCE = 4
_KEPT_THUMBNAILS = 1000

# What a visitor reads where a photo can't be shown, by what the reading says of it: its own words name paths and
# addresses of the server.
_PROBLEMS = (
    ("fetched", "unreachable"),
    ("missing", "missing"),
    ("neither", "not kept"),
    ("no longer", "removed"),
    ("decoded", "damaged"),
    ("known format", "not a photo"),
    ("empty", "empty file"),
    ("larger than", "too large"),
    ("more than", "too large"),
    ("photo_root", "not in the photo folder"),
)

logger = logging.getLogger(__name__)


@dataclass
class Found:
    """The answer to a search.

    Attributes:
        results: of the pipeline, best first.
        view: the version of the gallery that was searched.
        order: what they are ordered by, in words.
        told: the filters that were applied, in words.
        is_reranked: whether ITM looked at them.
    """

    results: list[dict]
    view: Any
    order: str
    told: list[str]
    is_reranked: bool


class Searcher:
    """A gallery of photos and the pipeline that searches it.

    Args:
        pipe: the pipeline.
        gallery: of photos.
        show_columns: shown below each photo; None: a column of captions if there is one, else the id.
        filter_columns: to filter by; None: those with few values.
        fusion_weight: of the ITC similarity beside the match logit; None: the model's.

    Raises:
        UsageError: a gallery of titles or of another model, columns that are not there.
    """

    def __init__(
        self,
        pipe: AliBlipImageTextRetrievalPipeline,
        gallery: Any,
        *,
        show_columns: Sequence[str] | None = None,
        filter_columns: Sequence[str] | None = None,
        fusion_weight: float | None = None,
    ):
        if gallery.kind != "image":
            raise UsageError("the gallery holds titles, this page shows photos: search it with the pipeline")
        gallery.check_model(pipe.encoder.fingerprint)
        self.pipe, self.gallery = pipe, gallery
        self.fusion_weight = pipe.model.config.fusion_weight if fusion_weight is None else fusion_weight
        self.show_columns = list(_captions(gallery) if show_columns is None else show_columns)
        require_columns(gallery, "show_columns", [name for name in self.show_columns if name != "id"])
        self.filters = choose_filters(gallery, filter_columns, left_out=self.show_columns)
        self._choices = (gallery.version, [one.choices for one in self.filters if one.choices is not None])
        self._kept, self._lock = OrderedDict(), threading.Lock()  # thumbnails by version and id, the oldest first
        self._readers = ThreadPoolExecutor(_PHOTOS_AT_ONCE, thread_name_prefix="photo")

    def current(self) -> Any:
        """The gallery as it is now; it stays so while others change it."""
        return self.gallery.snapshot()

    def choices(self) -> list[tuple[str, ...]]:
        """What the gallery has now to choose from, for each filter with choices; where it has too many by now, those
        of the start."""
        view = self.current()
        version, found = self._choices
        if version != view.version:
            found = [choices_of(view, one) for one in self.filters if one.choices is not None]
            self._choices = (view.version, found)
        return found

    # searches

    def by_title(self, title: str, top_k: int, rerank: int, chosen: Mapping[str, Any] | None = None) -> Found:
        """The results for a title, re-ranked among the `rerank` best; 0: by ITC alone.

        Args:
            chosen: by column what to filter by, see `condition_of`.

        Raises:
            VisitorMistake: an empty title, a number out of its bounds, a filter that is not there.
        """
        if not isinstance(title, str):
            raise VisitorMistake(EMPTY_TITLE)
        try:
            title = clean_title(title)
        except UnusableItem:
            raise VisitorMistake(EMPTY_TITLE) from None
        top_k = _whole("the number of results", top_k, 1, MAX_TOP_K)
        return self._search(title, "text-to-image", top_k, _whole("the candidates", rerank, 0, MAX_RERANK), chosen)

    def by_photo(self, file: str | Image.Image | None, top_k: int, chosen: Mapping[str, Any] | None = None) -> Found:
        """The photos most similar to the one in a file, by ITC alone.

        Args:
            file: an upload, whose path has been checked.

        Raises:
            VisitorMistake: no photo, one that can't be read, a number out of its bounds, a filter that is not there.
        """
        if file is None:
            raise VisitorMistake("Drop a photo first")
        top_k = _whole("the number of results", top_k, 1, MAX_TOP_K)
        try:  # the file and not its picture, which is large and would be held by each of many visitors
            return self._search(file, "image-to-image", top_k, 0, chosen)
        except ValueError as error:
            if not isinstance(error.__cause__, UnusableItem):
                raise
            # In brackets stands what the system said, paths included.
            reason = str(error.__cause__).partition(" (")[0]
            raise VisitorMistake(f"This photo can't be used: {reason}") from None

    def _search(self, query: Any, direction: str, top_k: int, rerank: int, chosen: Mapping[str, Any] | None) -> Found:
        condition = condition_of(self.filters, chosen or {})
        view = self.current()
        options = {"gallery": view, "direction": direction, "top_k": top_k, "fusion_weight": self.fusion_weight}
        if condition.where is not None:
            options |= {"where": condition.where, "values": condition.values}
        failed = False
        try:
            results = self.pipe(query, rerank=rerank, **options)
        except UsageError as error:
            if not rerank:
                raise
            # The photo of some candidate can't be read. The similarities need none.
            logger.warning("not re-ranked: %s", error)
            results, rerank, failed = self.pipe(query, rerank=0, **options), 0, True
        order = order_told(self.fusion_weight if rerank else None)
        if failed:
            order += "; not re-ranked, since a photo can't be read"
        return Found(results, view, order, condition.told, bool(rerank))

    # what is shown of the results

    def heading(self, found: Found) -> str:
        """How many were found among how many, by which filters, and what orders them."""
        chosen = f" with {', '.join(found.told)}" if found.told else ""
        if not found.results:
            return f"No photo{chosen} was found"
        return f"{len(found.results):,} of {len(found.view):,} photos{chosen}, ordered by {found.order}"

    def tiles(self, found: Found) -> list[Tile]:
        """The results as the page shows them."""
        pictures = self._readers.map(functools.partial(self._thumbnail, found.view), found.results)
        return [
            Tile(rank, self.caption(result), score_told(result), *picture)
            for rank, (result, picture) in enumerate(zip(found.results, pictures, strict=True), 1)
        ]

    def table(self, found: Found) -> tuple[list[str], list[list]]:
        """Names of columns, and the results as rows below them."""
        shown = self.show_columns or ["id"]
        names = {"itc": "ITC similarity", "itm_logit": "match logit", "itm_probability": "match probability"}
        numbers = [*names, "score"] if found.is_reranked else ["itc"]
        rows = [
            [rank, *(text_of(result[name]) if result.get(name) is not None else "" for name in shown)]
            + [result[name] for name in numbers]
            for rank, result in enumerate(found.results, 1)
        ]
        return ["rank", *shown, *(names.get(name, name) for name in numbers)], rows

    def answer(self, found: Found) -> list[dict]:
        """What a program gets: scores and the shown columns, no paths."""
        return [
            {name: result[name] for name in SCORES}
            | {"columns": {name: _plain(result.get(name)) for name in self.show_columns if name != "id"}}
            for result in found.results
        ]

    def caption(self, result: Mapping[str, Any]) -> list[str]:
        """The lines below a photo: the first shown column as it is, the others with their names; else the id."""
        lines = []
        for name in self.show_columns:
            value = result.get(name)
            if value is not None and text_of(value).strip():
                lines.append(text_of(value) if name == self.show_columns[0] else f"{name}: {text_of(value)}")
        return lines or [text_of(result["id"])]

    def _thumbnail(self, view: Any, item: Mapping[str, Any]) -> tuple[bytes | None, str | None]:
        """The JPEG of an item's photo, and where there is none what a visitor may know of the reason."""
        key = (view.version, item["id"])
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key], None
        try:
            made = to_jpeg(view.photo(item))
        except UnusableItem as error:
            return None, problem_told(str(error))
        with self._lock:
            self._kept[key] = made
            if len(self._kept) > _KEPT_THUMBNAILS:
                self._kept.popitem(last=False)
        return made, None

    # before the first search

    def examples(self) -> list[str] | list[bytes]:
        """Titles of some photos; where there are none, words of their ids; else some thumbnails."""
        rows = self.gallery.sample(min(_EXAMPLE_ROWS, len(self.gallery)))
        captions = [name for name in self.show_columns if name in _captions(self.gallery)] or _captions(self.gallery)
        titles = [text_of(row[name]).strip() for name in captions[:1] for row in rows if row.get(name)]
        titles = [title for title in titles if title and len(title) <= _MOST_EXAMPLE_CHARACTERS]
        if found := list(dict.fromkeys(titles)) or example_words(row["id"] for row in rows):
            return found[:EXAMPLES]
        pictures = (self._thumbnail(self.gallery, row)[0] for row in rows[: 2 * EXAMPLES])
        return [picture for picture in pictures if picture is not None][:EXAMPLES]

    def unreadable(self) -> str | None:
        """Why no photo of the gallery can be shown, from some of them; None: some can."""
        problems = []
        for row in self.gallery.sample(min(_READABLE_ROWS, len(self.gallery))):
            try:
                self.gallery.photo(row)
                return None
            except UnusableItem as error:
                problems.append(str(error))
        return problems[0] if problems else None


def problem_told(reason: str) -> str:
    """Why a photo can't be shown, without paths and addresses of the server."""
    word = next((word for sign, word in _PROBLEMS if sign in reason), "unreadable")
    return f"no photo: {word}"


def order_told(fusion_weight: float | None) -> str:
    """What results are ordered by; None: nothing was re-ranked."""
    if fusion_weight is None:
        return "ITC similarity"
    if fusion_weight == 0:
        return "match logit"
    weight = "" if fusion_weight == 1 else f"{fusion_weight:.3g} × "
    return f"match logit + {weight}ITC similarity"


def score_told(result: Mapping[str, Any]) -> str:
    """The scores of a result, the one that orders first."""
    parts = [f"ITC {result['itc']:.2f}"]
    if result["itm_probability"] is not None:
        parts = [f"score {result['score']:.2f}", *parts, f"match {100 * result['itm_probability']:.0f} %"]
    return "\N{NO-BREAK SPACE}· ".join(part.replace(" ", "\N{NO-BREAK SPACE}") for part in parts)


def example_words(ids: Any) -> list[str]:
    """Titles to try, of photos whose names are words: "striped_blue_mug_2.jpg"; none where names are numbers."""
    titles = {}
    for value in ids:
        stem = os.path.splitext(os.path.basename(str(value)))[0]
        words = [word for word in re.findall(r"[^\W_]+", stem) if not word.isdigit()]
        if len(words) > 1 and all(word.isalpha() for word in words):
            titles[" ".join(words)] = None
    return list(titles)[:EXAMPLES]


def _captions(gallery: Any) -> list[str]:
    return [name for name in _CAPTION_COLUMNS if name in gallery.columns and kind_of(gallery, name) == "text"][:1]


def _plain(value: Any) -> Any:
    """A value that JSON has; others as text."""
    return value if value is None or isinstance(value, (bool, int, float, str)) else text_of(value)


def _whole(name: str, value: Any, low: int, high: int) -> int:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not low <= value <= high
        or value != int(value)
    ):
        raise VisitorMistake(f"{name}: a whole number from {low} to {high} is accepted, not {value!r}")
    return int(value)


__all__ = ["Found", "Searcher", "order_told", "problem_told", "score_told"]
