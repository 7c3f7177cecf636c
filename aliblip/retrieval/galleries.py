"""A gallery: the photos or titles that are searched among, embedded once and kept in a table of LanceDB.

    from aliblip import Gallery

    gallery = Gallery.build(rows_or_source, uri, model=model, processor=processor)     # killed? the same call goes on
    gallery = Gallery.open(uri, version=None, photo_root=None, storage_options=None)   # folder, s3://, or "me/gallery"

    gallery.kind .model .uri .version .columns .schema .width .is_foreign .has_tokens .photo_root .skipped  len(gallery)

    hits = gallery.search(vectors, k, where="price < :most", values={"most": 50}, columns=["price"])   # a list a query
    hits[0][0]  # {"id": ..., "itc": ..., "position": ..., "price": ...}, best first

    gallery.upsert(rows, model=model, processor=processor)      # put rows in, in place of those of equal id
    gallery.remove(ids=["sku-7"]); gallery.remove(where={"category": "mug"})                # -> how many
    gallery.create_index(kind=None, columns=["price"])          # settings by size, recall@10 measured and printed
    gallery.optimize(); gallery.versions(); gallery.snapshot(); gallery.refresh()

    gallery.check_model(fingerprint)                            # refuses the queries of another model
    gallery.photo(hit); gallery.image_tokens(hits, encoder)     # of search results
    gallery.get(ids); gallery.sample(n); gallery.values("category", limit=50)
    gallery.push_to_hub("me/gallery"); gallery.save(other_uri)

A gallery that is opened without a `version` follows the table: each call sees the newest version (at an address, one
that is at most `REFRESH_SECONDS` old), whoever made it. A call sees the table before or after a change, never between.
A `snapshot()` stays at its version. Everything may be called from many threads, and in several processes at once; a
gallery can be pickled, and opens again where it is unpickled.

A table's columns: `id` (text or whole numbers), those of the data, `path` (of the photo, or its address) or `text` (the
title), `vector`, and if asked for `thumbnail` and `image_tokens`. See `aliblip.retrieval.tables` for the files.

Paths and addresses in a gallery from the Hub were written by somebody else, who could name any file or address that
this machine can reach: of such a gallery only photos within `photo_root` are read. It stays so after `save`.

Legend: Q queries, E width, k results of a query, n photos, P image tokens, D their width.
"""

from __future__ import annotations

import copy
import logging
import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from aliblip.data.columns import ALL
from aliblip.data.python_rows import open_rows
from aliblip.data.rows import Source
from aliblip.retrieval.building import Build, compact, in_python, read_skipped
from aliblip.retrieval.exact import VectorCache
from aliblip.retrieval.indexing import IndexSettings, create_index, index_settings
from aliblip.retrieval.sharing import check_foreign, downloaded, is_download, is_hub_name, push, save_copy
from aliblip.retrieval.table_columns import FromTool
from aliblip.retrieval.tables import (
    ID,
    ITEMS,
    PATH,
    THUMBNAIL,
    VECTOR,
    Facts,
    LanceMissing,
    changed,
    enough_room,
    indexed_columns,
    is_address,
    is_damage,
    is_from_lance,
    lance_options,
    library,
    one_writer,
    open_dataset,
    reason_of,
    tidy_uri,
)
from aliblip.retrieval.upserting import UpsertReport, merged, upserted
from aliblip.retrieval.vector_rows import as_rows, write_vectors
from aliblip.retrieval.views import AT_ONCE, IndexReport, View, checked_ids, checked_queries, photo_at
from aliblip.retrieval.where import Where, literal
from aliblip.runtime.installation import install_hint
from aliblip.runtime.mistakes import UsageError
from encoder_aliblip import Encoder, fingerprint
from reading_aliblip import UnusableItem, read_photo

__all__ = ["Gallery", "IndexReport", "UpsertReport"]

# How old the version may be that a gallery at an address answers from, where each look costs a request.
REFRESH_SECONDS = 5.0
# Versions that a read tries, each of which was removed while it read.
READ_TRIES = 20
# Rows that came after the last `optimize` are compared one by one.
_MANY_FRAGMENTS = 200

logger = logging.getLogger(__name__)


# --- the gallery ------------------------------------------------------------------------------------------------------


class Gallery:
    """A stored gallery; made by `open`, `build`, `from_vectors` or `from_hub`.

    Attributes:
        uri: its folder or address.
        photo_root: folder that relative paths of photos are of; None: the one that it was built with, if that was here.
    """

    def __init__(
        self,
        uri: str,
        *,
        version: int | None = None,
        photo_root: str | os.PathLike | None = None,
        storage_options: Mapping[str, Any] | None = None,
        from_hub: bool = False,
    ):
        self.uri, self.photo_root = uri, photo_root
        self._pinned, self._options, self._from_hub = version, storage_options, from_hub
        self._is_download = is_download(uri)
        self._prepare(None)

    def _prepare(self, view: View | None) -> None:
        self._view, self._looked = view, time.monotonic()
        self._lock, self._cache = threading.Lock(), VectorCache()

    def __getstate__(self) -> dict[str, Any]:
        left = ("_view", "_looked", "_lock", "_cache")
        return {name: value for name, value in vars(self).items() if name not in left}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._prepare(None)

    @classmethod
    def open(
        cls,
        uri: str | os.PathLike,
        version: int | None = None,
        *,
        photo_root: str | os.PathLike | None = None,
        storage_options: Mapping[str, Any] | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> Gallery:
        """Open a gallery.

        Args:
            uri: a folder, an address such as s3://bucket/gallery, or the name of a data set on the Hub.
            version: an older version, at which the gallery then stays; see `versions`.
            photo_root: folder that relative paths of photos are of.
            storage_options: of an address, as Lance takes them: keys, region, endpoint.
            revision, token: for the Hub.

        Raises:
            UsageError: no gallery, one that was not built to its end, an unknown version; LanceDB is not installed.
        """
        library()
        if version is not None and (isinstance(version, bool) or not isinstance(version, int) or version < 1):
            raise UsageError(f"version is {version!r}: give the number of one, see Gallery.versions()")
        from_hub = is_hub_name(uri)
        place = downloaded(uri, revision, token) if from_hub else tidy_uri(uri)
        if from_hub or is_download(place):
            check_foreign(place)
        gallery = cls(place, version=version, photo_root=photo_root, storage_options=storage_options, from_hub=from_hub)
        gallery._now()
        return gallery

    @classmethod
    def from_hub(cls, name: str, **options: Any) -> Gallery:
        """`open` of a data set on the Hub."""
        if not is_hub_name(name):
            raise UsageError(f"{name!r} is no name of the Hub: give one such as me/gallery")
        return cls.open(name, **options)

    @classmethod
    def build(
        cls,
        rows: Any,
        uri: str | os.PathLike,
        *,
        model,
        processor,
        kind: str = "image",
        columns: Sequence[str] | None = None,
        id_column: str | None = None,
        image_column: str | None = None,
        caption_column: str | None = None,
        thumbnails: bool | int = False,
        store_tokens: bool = False,
        batch_size: int = 32,
        unit_size: int = 256,
        dtype: torch.dtype | None = None,
        overwrite: bool = False,
        duplicates: str = "error",
        num_workers: int = 2,
        storage_options: Mapping[str, Any] | None = None,
        parts_dir: str | os.PathLike | None = None,
        progress: bool = False,
    ) -> Gallery:
        """Embed rows and keep them in a table (collective: every process of a launch calls it, and gets the gallery).

        A build that was killed goes on when it is called again, with any number of processes. Rows that can't be used
        are left out and listed in `skipped`.

        Args:
            rows: a list or data set of photos, of titles or of dictionaries with columns, see `open_rows`; or a
                `Source`, opened with its further columns as `other_columns`.
            uri: a folder or address.
            model, processor: of AliBLIP; the model on the device that is to do the work.
            kind: "image" for photos, "text" for titles.
            columns: of the rows, to keep; None: all.
            id_column: of the ids, text or whole numbers, each once; None: "id" where there is one, otherwise the paths
                of photos that come without other columns, otherwise the numbers of the rows.
            image_column, caption_column: of the photo and the title; default "image", and "caption", then "text".
            thumbnails: keep a JPEG of each photo, with this longest side; True: 384.
            store_tokens: keep the image tokens too, so that re-ranking needs no photo: 0.9 MB a photo with a ViT-B/16
                at 384 pixels.
            batch_size: rows of one pass of the model.
            unit_size: rows that one process computes and writes together.
            dtype: type of the autocast of the passes.
            overwrite: replace a gallery, or the beginning of another one, that is there. The old one can be read until
                the new one is complete, and as an older version until `optimize` removes it.
            duplicates: what to do where an id comes twice: "error", or "first" to keep the first and list the others.
            num_workers: processes that read and decode photos ahead.
            storage_options: of an address.
            parts_dir: see `Build`.
            progress: show a bar.

        Raises:
            UsageError: a wrong argument, no usable row, ids that come twice, a place that holds something else.
            RuntimeError: another process has failed; the message says which and why.
        """
        library()
        source = rows
        if not isinstance(rows, Source):
            others: Any = ALL
            if columns is not None and hasattr(rows, "column_names"):  # of a data set, read no more than is needed
                ids = [id_column] if id_column is not None else [name for name in rows.column_names if name == ID]
                others = list(dict.fromkeys([*columns, *ids]))
            source = open_rows(
                rows,
                sides="images" if kind == "image" else "titles",
                image_column=image_column,
                caption_column=caption_column,
                other_columns=others,
            )
        build = Build(
            source,
            uri,
            kind=kind,
            columns=columns,
            id_column=id_column,
            thumbnails=thumbnails,
            store_tokens=store_tokens,
            batch_size=batch_size,
            unit_size=unit_size,
            dtype=dtype,
            overwrite=overwrite,
            duplicates=duplicates,
            num_workers=num_workers,
            storage_options=storage_options,
            parts_dir=parts_dir,
        )
        lost = build.run(model, processor, progress=progress)
        gallery = cls.open(build.uri, storage_options=storage_options)
        skipped = gallery._now().facts.skipped
        if skipped:
            logger.warning("%d of %d rows can't be used, see Gallery.skipped", skipped, source.num_rows)
        for line in (*build.kept.notes, *lost.told()):
            logger.warning(line)
        return gallery

    # --- what it is ---------------------------------------------------------------------------------------------------

    def _now(self) -> View:
        """The version to work on: the newest one, or the one that this gallery stays at."""
        library()
        with self._lock:
            view = self._view
            if view is None:
                view = self._opened(open_dataset(self.uri, ITEMS, self._pinned, self._options))
            elif self._pinned is None:
                wait = REFRESH_SECONDS if is_address(self.uri) else 0.0
                if time.monotonic() - self._looked >= wait:
                    view = self._newest(view)
            self._view = view
            return view

    def _newest(self, view: View) -> View:
        self._looked = time.monotonic()
        try:
            if view.dataset.latest_version == view.dataset.version:
                return view
            dataset = copy.copy(view.dataset)  # others may be reading the old one
            dataset.checkout_latest()
        except OSError:  # the folder is gone; maybe another gallery was put there
            self._cache = VectorCache()
            dataset = open_dataset(self.uri, storage_options=self._options)
        return self._opened(dataset)

    def _opened(self, dataset) -> View:
        return View(dataset, Facts.of(dataset.schema, self.uri), self._cache)

    def refresh(self) -> Gallery:
        """Look for a newer version now, at an address too."""
        with self._lock:
            self._looked = float("-inf")
        self._now()
        return self

    def snapshot(self) -> Gallery:
        """The gallery as it is now, at no cost; it stays at this version."""
        view = self._now()
        pinned = Gallery(
            self.uri,
            version=view.dataset.version,
            photo_root=self.photo_root,
            storage_options=self._options,
            from_hub=self._from_hub,
        )
        pinned._view, pinned._cache = view, self._cache
        return pinned

    def __len__(self) -> int:
        return self._now().rows

    def __repr__(self) -> str:
        view = self._now()
        tokens = ", with image tokens" if self.has_tokens else ""
        index = f", index {view.index.kind}" if view.index else ""
        return f"Gallery of {view.rows:,} {view.facts.items}, {self.width} wide{tokens}{index}: {self.uri}"

    @property
    def kind(self) -> str:
        """ "image" or "text", what the items are."""
        return self._now().facts.kind

    @property
    def model(self) -> str | None:
        """Fingerprint of the model and processor; None: not known, every query is taken."""
        return self._now().facts.model

    @property
    def width(self) -> int:
        return self._now().facts.width

    @property
    def version(self) -> int:
        return self._now().dataset.version

    @property
    def columns(self) -> list[str]:
        """Columns of the data, as the table calls them; see `schema` for their types."""
        return list(self._now().facts.columns)

    @property
    def schema(self) -> pa.Schema:
        """Of the whole table."""
        return self._now().schema.remove_metadata()

    @property
    def table(self):
        """LanceDB's own table, at the gallery's version now, for what a gallery has no method for.

        Raises:
            LanceMissing: its client is not installed.
        """
        version = self.version
        try:
            import lancedb
        except ImportError as error:
            raise LanceMissing(f"the client of LanceDB is missing: {install_hint('gallery')}") from error
        table = lancedb.connect(self.uri, storage_options=lance_options(self._options)).open_table(ITEMS)
        table.checkout(version)
        return table

    @property
    def has_tokens(self) -> bool:
        """Whether re-ranking needs no photo."""
        return self._now().facts.token_shape is not None

    @property
    def has_index(self) -> bool:
        """Whether there is an approximate index."""
        return self._now().index is not None

    @property
    def is_foreign(self) -> bool:
        """Whether it came from the Hub, once."""
        return self._from_hub or self._is_download or self._now().facts.is_foreign

    @property
    def skipped(self) -> list[dict[str, Any]]:
        """Rows of the build that could not be used, as {"row", "name", "reason"}."""
        return read_skipped(self.uri, self._now().facts.build, self._options)

    def check_model(self, model: str) -> None:
        """Refuse the queries of another model.

        Raises:
            UsageError: `model`, a fingerprint, is not that of the gallery.
        """
        own = self.model
        if own not in (None, model):
            raise UsageError(
                f"the gallery was built with another model or processor ({own[:8]}, not {model[:8]}), whose vectors "
                "can't be compared: load that one, or build the gallery again with this one"
            )

    # --- search -------------------------------------------------------------------------------------------------------

    def search(
        self,
        vectors: Tensor,
        k: int,
        *,
        where: Where | None = None,
        values: Mapping[str, Any] | None = None,
        approximate: bool | None = None,
        columns: Sequence[str] | None = None,
    ) -> list[list[dict[str, Any]]]:
        """The `k` items of highest dot product for each query, best first; of equal scores the lower position first.

        Args:
            vectors: (Q, E) unit vectors, or (E,) of one query.
            k: at least 1. Where the gallery or the filter leaves fewer items, there are fewer results.
            where: which items are searched among: SQL text with `:name` for `values`, or a mapping from columns to
                values, see `aliblip.retrieval.where`. Applied before the search.
            values: for the placeholders of `where`.
            approximate: by the index, or exactly; None: by the index where there is one.
            columns: that the hits have; None: all, but for thumbnails.

        Returns:
            For each query a list of hits, {"id", "itc", "position", and the columns}.

        Raises:
            UsageError: another width, values that are not finite, an unknown column, a filter that can't be used, or
                `approximate` without an index.
        """
        queries = checked_queries(vectors, self.width)
        if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
            raise UsageError(f"k is {k!r}: give a whole number of at least 1")
        return self._reading(lambda view: view.hits(queries, int(k), where, values, approximate, columns))

    def _reading(self, work: Any) -> Any:
        """Do `work(view)`; again, at a newer version, where the files of that one have meanwhile been removed."""
        tried: list[int | None] = []
        while True:
            version = None
            try:
                view = self._now()
                version = view.dataset.version
                return work(view)
            except UsageError:
                raise
            except (OSError, ValueError, RuntimeError) as error:  # Arrow makes ValueErrors of some of Lance's
                is_gone = "not found" in str(error).lower()
                if not is_from_lance(error) or not (is_gone or is_damage(error)):
                    raise
                if is_gone and self._pinned is not None:
                    raise UsageError(
                        f"version {self._pinned} of the gallery {self.uri} is no longer there, optimize() removes old "
                        "ones: open the gallery again"
                    ) from error
                if not is_gone or version in tried or len(tried) == READ_TRIES:
                    raise UsageError(
                        f"files of the gallery {self.uri} are gone or damaged ({reason_of(error)}): open an older "
                        "version, or build it again"
                    ) from error
            tried.append(version)
            with self._lock:  # the folder may hold another gallery by now
                self._view, self._cache = None, VectorCache()

    def count(self, where: Where | None = None, values: Mapping[str, Any] | None = None) -> int:
        """How many items a filter leaves."""

        def counted(view: View) -> int:
            with view.filtered(where, values) as text:
                return view.dataset.count_rows(text)

        return self._reading(counted)

    def get(self, ids: Sequence[str | int], columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """The rows of some ids, in the order of the ids, as {"id", "position", and the columns}; unknown ids have none.

        Raises:
            UsageError: an unknown column, or an id of another type.
        """
        ids = checked_ids(ids, self._now().schema)

        def got(view: View) -> list[dict[str, Any]]:
            found = view.with_ids(ids, view.names(columns))
            return [found[value] for value in ids if value in found]

        return self._reading(got)

    def sample(self, n: int, seed: int = 0, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """`n` rows, randomly chosen, or all where there are fewer: {"id", "position", and the columns} by position."""

        def sampled(view: View) -> list[dict[str, Any]]:
            chosen = view.some_positions(n, seed).tolist()
            rows = view.take(chosen, view.names(columns))
            return [{ID: rows[position][ID], "position": position, **rows[position]} for position in chosen]

        return self._reading(sampled)

    def values(self, column: str, limit: int = 50) -> list[Any] | None:
        """The distinct values of a column, sorted, without null; None: more than `limit`, or lists and such."""

        return self._reading(lambda view: view.distinct(column, limit))

    # --- photos and tokens --------------------------------------------------------------------------------------------

    def photo_path(self, hit: Mapping[str, Any]) -> str | None:
        """Where the photo of a hit can be read: a path or an address; None: it is not known.

        Raises:
            UnusableItem: a path that leads out of `photo_root`, or one of a gallery from the Hub that leads anywhere.
        """
        path = hit.get(PATH)
        if path is None:
            return None
        root = self.photo_root
        is_relative = "://" not in path and not os.path.isabs(path)
        if self.is_foreign and (root is None or not is_relative):
            raise UnusableItem("a gallery from the Hub reads photos only from its photo_root")
        if not is_relative:
            return path
        if root is None:
            return os.path.join(self._now().photo_root or "", path)
        if os.path.normpath(path).split(os.sep)[0] == os.pardir:
            raise UnusableItem("its path leads out of the photo_root")
        return os.path.join(root, path)

    def photo(self, hit: Mapping[str, Any]):
        """The photo of a hit as a PIL image: its thumbnail where there is one, otherwise the photo itself.

        Raises:
            UnusableItem: there is neither, the photo can't be read (any more), or may not be.
        """
        row = self._stored(hit, (THUMBNAIL, PATH))
        if row.get(THUMBNAIL) is not None:
            return read_photo(row[THUMBNAIL])
        path = self.photo_path(row)
        if path is None:
            raise UnusableItem("the gallery has neither its path nor a thumbnail")
        return photo_at(path)

    def _stored(self, hit: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """Columns of a hit's row, read where the hit does not have them."""
        view = self._now()
        names = [name for name in names if name in view.schema.names]
        if all(name in hit for name in names):
            return dict(hit)
        rows = self._reading(lambda view: view.take([hit["position"]], [ID, *names]))
        row = rows.get(hit["position"])
        if row is None or row[ID] != hit[ID]:
            raise UnusableItem("it is no longer in the gallery")
        return row

    def image_tokens(self, hits: Sequence[Mapping[str, Any]], encoder) -> Tensor:
        """Image tokens (n, P, D) bf16 of some hits: the stored ones, or those of the photos, which are read again (of
        thumbnails, where the gallery knows no paths).

        Args:
            hits: of a search.
            encoder: an `Encoder`, for photos.

        Raises:
            UsageError: a photo can't be read, or is no longer in the gallery.
        """
        if self.has_tokens:
            return self._stored_tokens(hits)
        pixels = []
        for hit in hits:
            try:
                pixels.append(encoder.pixels(self._original(hit)))
            except UnusableItem as error:
                where = f", {hit[PATH]}" if hit.get(PATH) else ""
                raise UsageError(
                    f"re-ranking needs the photo of item {hit[ID]!r}{where}: {error}. Set the gallery's photo_root if "
                    "the photos were moved, build it with store_tokens=True, or search with rerank=0"
                ) from error
        return encoder.embed_pixels(torch.stack(pixels))[1]

    def _stored_tokens(self, hits: Sequence[Mapping[str, Any]]) -> Tensor:
        wanted = [int(hit["position"]) for hit in hits]
        positions, tokens = self._reading(lambda view: view.take_tokens(wanted))
        places = {position: place for place, position in enumerate(positions)}
        if missing := [hit[ID] for hit in hits if int(hit["position"]) not in places]:
            raise UsageError(
                f"the item {missing[0]!r} is no longer in the gallery, or has no image tokens (upsert_vectors() puts "
                "none in): search again, or with rerank=0"
            )
        return tokens[[places[position] for position in wanted]]

    def _original(self, hit: Mapping[str, Any]):
        row = self._stored(hit, (PATH,))
        path = self.photo_path(row)
        if path is not None:
            return photo_at(path)
        if THUMBNAIL in self._now().schema.names:
            return self.photo(hit)
        raise UnusableItem("the gallery has neither its path, nor a thumbnail, nor image tokens")

    # --- changes ------------------------------------------------------------------------------------------------------

    def upsert(
        self,
        rows: Any,
        *,
        model=None,
        processor=None,
        encoder: Encoder | None = None,
        id_column: str | None = None,
        image_column: str | None = None,
        caption_column: str | None = None,
        batch_size: int = 32,
        dtype: torch.dtype | None = None,
        num_workers: int = 0,
        duplicates: str = "error",
        progress: bool = False,
        flag: FromTool = in_python,
    ) -> UpsertReport:
        """Embed rows and put them in, in place of rows of equal id, in one commit (collective, as `build`).

        The rows need the gallery's ids and have the columns that the gallery keeps. A column that they lack is null.

        Args:
            model, processor, and the others: as in `build`.
            encoder: instead of model and processor; it knows the model's fingerprint, which takes a second or two to
                compute. A pipeline has one.

        Raises:
            UsageError: another model than the gallery's, rows without its ids, an id that comes twice; nothing is
                changed then.
        """
        view = self._writable()
        source = rows
        if not isinstance(rows, Source):
            source = open_rows(
                rows,
                sides="images" if view.facts.kind == "image" else "titles",
                image_column=image_column,
                caption_column=caption_column,
                other_columns=ALL,
            )
        if encoder is not None:
            model, processor, dtype = encoder.model, encoder.processor, dtype or encoder.dtype
        if model is None or processor is None:
            raise UsageError("upsert needs model and processor, or encoder: give those that the gallery was built with")
        self.check_model(fingerprint(model, processor) if encoder is None else encoder.fingerprint)
        with enough_room():
            report = upserted(
                source,
                self.uri,
                view.schema,
                view.facts,
                view.photo_root,
                model,
                processor,
                id_column=id_column,
                batch_size=batch_size,
                dtype=dtype,
                num_workers=num_workers,
                duplicates=duplicates,
                progress=progress,
                storage_options=self._options,
                flag=flag,
            )
        if report.skipped or report.lost.told():
            logger.warning(str(report))
        self._tell_of_many_fragments()
        return report

    def upsert_vectors(self, table: pa.Table) -> UpsertReport:
        """`upsert` of rows that are embedded already: an Arrow table with the columns `id`, `vector`, and others of the
        gallery's. The vectors have length 1."""
        view = self._writable()
        rows = as_rows(table, view.schema, {})
        report = UpsertReport(*merged(rows, self.uri, self._options))
        self.refresh()
        return report

    def _tell_of_many_fragments(self) -> None:
        fragments = len(self.refresh()._now().dataset.get_fragments())
        if fragments > _MANY_FRAGMENTS:
            logger.warning("the gallery lies in %d pieces: optimize() joins them, searches are faster then", fragments)

    def _writable(self) -> View:
        if self._from_hub:
            raise UsageError("a gallery from the Hub can't be changed: save it to a folder, and change that one")
        if self._pinned is not None:
            raise UsageError(
                f"this is version {self._pinned} of the gallery, which stays as it is: open the newest one"
            )
        return self.refresh()._now()

    def remove(
        self,
        ids: Iterable[str | int] | None = None,
        *,
        where: Where | None = None,
        values: Mapping[str, Any] | None = None,
    ) -> int:
        """Take rows out, by id or by a filter, in one commit, and return how many there were.

        Raises:
            UsageError: neither or both are given, or a filter or an id can't be used.
        """
        if (ids is None) == (where is None):
            raise UsageError("remove takes either ids or where: give one of them")
        view = self._writable()
        text = None
        if ids is not None:
            ids = pa.array(list(dict.fromkeys(checked_ids(ids, view.schema))), view.schema.field(ID).type)
        elif not where:
            raise UsageError("the filter is empty: give a condition")
        else:
            with view.filtered(where, values) as text:
                view.dataset.count_rows(text)  # a mistake is told before the table is opened for the change

        def delete() -> int:
            with one_writer(self.uri):
                dataset = open_dataset(self.uri, storage_options=self._options)
                if text is not None:
                    return dataset.delete(text)["num_deleted_rows"]
                if len(ids) <= AT_ONCE:
                    return (
                        dataset.delete(f"{ID} IN {literal(ids.to_pylist(), ID)}")["num_deleted_rows"] if len(ids) else 0
                    )
                merge = dataset.merge_insert(ID).when_matched_delete()
                return merge.execute(pa.table({ID: ids}))["num_deleted_rows"]

        count = changed(delete)
        self.refresh()
        return count

    def create_index(
        self,
        kind: str | None = None,
        *,
        columns: Sequence[str] = (),
        measure_recall: int = 1000,
        settings: IndexSettings | None = None,
        vectors: bool = True,
        quiet: bool = False,
    ) -> IndexReport:
        """Make an approximate index, and indices of columns for filters. Searches go on meanwhile, and changes too.

        Args:
            kind: one of `INDEX_KINDS`; None: the best for the size of the gallery, none below 50,000 rows.
            columns: that filters name: each gets an index, the ids have one already.
            measure_recall: how many of the gallery's vectors are searched for in both ways; 0: none.
            settings: instead of those that `index_settings` chooses.
            vectors: False: only the columns are indexed.
            quiet: don't print the report.

        Returns:
            The settings, and the recall@10 against exact search.

        Raises:
            UsageError: an unknown kind or column, too few rows for the kind.
        """
        if isinstance(measure_recall, bool) or not isinstance(measure_recall, int) or measure_recall < 0:
            raise UsageError(f"measure_recall is {measure_recall!r}: give a number of vectors, or 0")
        view, start = self._writable(), time.perf_counter()
        names = view.names(columns)[1:]
        if not vectors:
            settings = None
        elif settings is None:
            settings = index_settings(view.rows, view.facts.width, kind)
        for name in dict.fromkeys([ID, *names]):
            changed(lambda name=name: self._index_column(name))
        if settings is not None:
            changed(lambda: create_index(open_dataset(self.uri, storage_options=self._options), settings), tries=3)
            changed(lambda: self._keep_index_settings(settings))
        seconds = time.perf_counter() - start
        view = self.refresh()._now()
        indexed = tuple(name for name in indexed_columns(view.dataset) if name != VECTOR)
        report = IndexReport(view.rows, settings, indexed, seconds)
        if settings is not None and measure_recall:
            report = replace(report, **view.measured_recall(measure_recall))
        if not quiet:
            print(report, flush=True)
        return report

    def _index_column(self, name: str) -> None:
        dataset = open_dataset(self.uri, storage_options=self._options)
        if name != ID or ID not in indexed_columns(dataset):
            kind = dataset.schema.field(name).type
            if pa.types.is_nested(kind):
                raise UsageError(f"the column {name!r} holds {kind}, which has no index: leave it out")
            few = name != ID and self.values(name, limit=1000) is not None
            dataset.create_scalar_index(name, "BITMAP" if few else "BTREE", replace=True)

    def _keep_index_settings(self, settings: IndexSettings) -> None:
        dataset = open_dataset(self.uri, storage_options=self._options)
        facts = replace(Facts.of(dataset.schema, self.uri), index=settings.as_json())
        dataset.update_schema_metadata(facts.as_lance_metadata())

    def optimize(self, keep: timedelta = timedelta(days=7)) -> None:
        """Join small pieces, put new rows into the indices, and remove versions that are older than `keep`.

        Call it after many changes. Searches and changes go on meanwhile.
        """
        if not isinstance(keep, timedelta) or keep < timedelta(0):
            raise UsageError(f"keep is {keep!r}: give a timedelta, such as timedelta(days=7)")
        self._writable()
        compact(self.uri, self._options)

        def update() -> None:
            open_dataset(self.uri, storage_options=self._options).optimize.optimize_indices()

        changed(update)
        dataset = open_dataset(self.uri, storage_options=self._options)
        dataset.cleanup_old_versions(keep, error_if_tagged_old_versions=False)
        self.refresh()

    def versions(self) -> list[dict[str, Any]]:
        """All versions that can be opened, the oldest first: {"version", "timestamp", "rows"}."""
        return [
            {
                "version": one["version"],
                "timestamp": one["timestamp"],
                "rows": int(one["metadata"]["total_rows"]) if "total_rows" in one.get("metadata", {}) else None,
            }
            for one in self._now().dataset.versions()
        ]

    # --- other places -------------------------------------------------------------------------------------------------

    def save(self, uri: str | os.PathLike, *, storage_options: Mapping[str, Any] | None = None) -> Gallery:
        """Copy the gallery as it is now, its index included, to a place that holds none. What came from the Hub stays
        distrusted there."""
        view = self._now()
        place = tidy_uri(uri)
        facts = replace(view.facts, is_foreign=self.is_foreign)
        save_copy(view.dataset, facts, place, storage_options, self._options)
        return Gallery.open(place, photo_root=self.photo_root, storage_options=storage_options)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | bool | None = None, commit_message: str = ""
    ) -> str:
        """Upload the gallery as it is now as a data set of the Hub, and return the commit's address. All its columns
        go with it. Tried again where the Hub or the connection fails."""
        view = self._now()
        message = commit_message or f"A gallery of {view.rows:,} {view.facts.items}"
        options = {"private": private, "token": token, "message": message, "of_source": self._options}
        return push(view.dataset, view.facts, repo_id, **options)

    @classmethod
    def from_vectors(
        cls,
        rows: pa.Table | pa.RecordBatchReader,
        uri: str | os.PathLike,
        *,
        kind: str = "image",
        model: str | None = None,
        overwrite: bool = False,
        storage_options: Mapping[str, Any] | None = None,
    ) -> Gallery:
        """A gallery of rows that are embedded already, in one commit.

        Args:
            rows: an Arrow table, or a reader of batches, with the columns `id` (text or whole numbers, each once),
                `vector` (a list of E numbers, of length 1 as vectors go), and any others.
            uri, kind, overwrite, storage_options: as in `build`.
            model: fingerprint of the model that the vectors are of; None: every query is taken.

        Raises:
            UsageError: columns that are missing or of other types, ids that come twice, a place that holds something
                else.
        """
        place = tidy_uri(uri)
        with enough_room():
            write_vectors(rows, place, kind=kind, model=model, overwrite=overwrite, storage_options=storage_options)
        return cls.open(place, storage_options=storage_options)
