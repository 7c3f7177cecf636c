"""A gallery: the photos (or titles) that are searched among, embedded once, kept in a folder, loaded in no time.

    gallery = Gallery.build(model, processor, paths, "my_gallery", store_tokens=True)   # killed? the same call goes on
    gallery = Gallery.load("my_gallery")                                                # memory-mapped
    scores, positions = gallery.search(query_vectors, k=10)                             # exact, ITC
    gallery.add(model, processor, more_paths); gallery.remove(["old.jpg"]); gallery.save("my_gallery")

What its folder holds: `storage_aliblip`.

Single process. Several processes build one gallery through `encode_units` (each its own units) and then `join_units`
(one process); a unit is computed whole by one process, so that the result does not depend on their number.

Reading is safe from many threads, also while `add` or `remove` runs: a search sees the gallery before or after it.

Legend: N items, Q queries, k results, E embedding, P image tokens, D width.
"""

import hashlib
import json
import operator
import os
import re
import secrets
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi, snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor
from transformers import logging

try:
    from .encoder_aliblip import Encoder, finite
    from .reading_aliblip import UnusableItem, clean_title
    from .retrieval_aliblip import GALLERY_CHUNK, QUERY_BLOCK, order_by_score, running_top_k
    from .storage_aliblip import (
        BUILD,
        FORMAT,
        MANIFEST,
        VECTOR_TYPES,
        FaissIndex,
        Segment,
        State,
        TokenFiles,
        plain,
        quantise,
        read_gallery,
        read_json,
        refuse_foreign,
        some,
        write,
        write_gallery,
        write_json,
        write_named,
    )
except ImportError:
    if __package__:  # inside a package (the Hub cache) a failure is real
        raise
    from encoder_aliblip import Encoder, finite
    from reading_aliblip import UnusableItem, clean_title
    from retrieval_aliblip import GALLERY_CHUNK, QUERY_BLOCK, order_by_score, running_top_k
    from storage_aliblip import (
        BUILD,
        FORMAT,
        MANIFEST,
        VECTOR_TYPES,
        FaissIndex,
        Segment,
        State,
        TokenFiles,
        plain,
        quantise,
        read_gallery,
        read_json,
        refuse_foreign,
        some,
        write,
        write_gallery,
        write_json,
        write_named,
    )

try:
    from PIL import Image
except ImportError:  # titles and stored vectors can be searched without it
    Image = None

KINDS = ("image", "text")
_GO_ON = "give the same settings to go on, or build with overwrite=True"
_UPLOAD_WAITS = (1.0, 5.0, 20.0)  # seconds before the second, third ... try

logger = logging.get_logger(__name__)


class _Rows:
    """fp32 rows of a gallery for `datasets`, which wants an array but reads it slice by slice: no copy of the whole."""

    def __init__(self, gallery: "Gallery"):
        self._gallery = gallery

    def __len__(self) -> int:
        return len(self._gallery)

    def astype(self, dtype: type) -> "_Rows":
        return self  # fp32 is what is asked for

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(len(self))
        return self._gallery.vectors(start, stop).cpu().numpy()


# --- the gallery ------------------------------------------------------------------------------------------------------


class Gallery:
    """Photos or titles to search among. Made by `build`, `load` or `from_vectors`.

    Attributes:
        kind: "image" or "text", what the items are.
        model: fingerprint of model and processor, None if it is not known (then every query is taken).
        dtype: how vectors are stored: "float32", "float16" or "int8" (one scale per vector).
        skipped: items that could not be read, as {"id", "reason"}.
        photo_root: folder that relative paths of photos are read from; None: the working directory.
        is_foreign: whether it came from the Hub. Of such a gallery only photos within `photo_root` are read: its paths
            were written by somebody else, who could name any file or address that this machine can reach.
    """

    def __init__(self, state: State, kind: str, model: str | None, dtype: str, skipped: Sequence[dict] = ()):
        self._state, self._lock = state, threading.Lock()
        self.kind, self.model, self.dtype, self.skipped = kind, model, dtype, list(skipped)
        self.photo_root: str | os.PathLike | None = None
        self.is_foreign = False

    @classmethod
    def from_vectors(
        cls,
        vectors: Tensor,
        ids: Sequence[str | int] | None = None,
        *,
        kind: str = "image",
        dtype: str = "float32",
        model: str | None = None,
    ) -> "Gallery":
        """A gallery of vectors (N, E) that are there already, of length 1; `ids`: by default 0 to N - 1.

        Raises:
            ValueError: vectors that are not finite, ids given twice or too few, an unknown kind or type.
        """
        _check_choice("kind", kind, KINDS)
        _check_choice("dtype", dtype, VECTOR_TYPES)
        if vectors.dim() != 2 or not len(vectors):
            raise ValueError(f"vectors of shape {tuple(vectors.shape)} given: a gallery takes (N, E), N at least 1")
        ids = range(len(vectors)) if ids is None else [_checked_id(value) for value in ids]
        if len(ids) != len(vectors):
            raise ValueError(f"{len(vectors)} vectors and {len(ids)} ids given: as many of both are needed")
        if None in ids:
            raise ValueError(f"the id of vector {list(ids).index(None)} is null: every item needs one")
        _refuse_duplicates(ids)
        items = [{"id": value} for value in ids]
        segment = Segment(finite(vectors.detach().cpu().float(), "vectors"), None, items)
        return cls(State((segment,)), kind, model, "float32").astype(dtype)

    def __len__(self) -> int:
        return len(self._state)

    def __repr__(self) -> str:
        tokens = ", with image tokens" if self.has_tokens else ""
        return f"Gallery of {len(self):,} {self.kind} items, {self.width} wide in {self.dtype}{tokens}"

    @property
    def width(self) -> int:
        return self._state.segments[0].vectors.shape[1]

    @property
    def has_tokens(self) -> bool:
        """Whether re-ranking needs no photo."""
        return self._state.segments[0].tokens is not None

    @property
    def ids(self) -> list[str | int]:
        """All ids by position; reads them all."""
        return [item["id"] for item in self._state.items()]

    def item(self, position: int) -> dict:
        """{"id", "path" or "text"} of one item; `path` only where the photo was given as one."""
        segment, row = self._state.find(position)
        return segment.items[row]

    def vectors(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Vectors of positions [start, stop) as fp32 (n, E)."""
        state = self._state
        return plain(*state.read(start, len(state) if stop is None else min(stop, len(state))))

    def check_model(self, model: str) -> None:
        """Refuse the queries of another model.

        Raises:
            ValueError: `model`, a fingerprint, is not that of the gallery.
        """
        if self.model not in (None, model):
            raise ValueError(
                f"the gallery was built with another model or processor ({self.model[:8]}, not {model[:8]}), whose "
                "vectors can't be compared: load that one, or build the gallery again with this one"
            )

    def to(self, device: torch.device | str) -> "Gallery":
        """The same gallery with its vectors, as they are stored, on `device`, where searches then run."""
        state = self._state
        return self._like(replace(state, segments=tuple(segment.to(device) for segment in state.segments)))

    def astype(self, dtype: str) -> "Gallery":
        """The same gallery with vectors of another type, in memory. Searched as "float16" it needs half of the memory
        of "float32", as "int8" a quarter; `recall` says what that costs."""
        _check_choice("dtype", dtype, VECTOR_TYPES)
        if dtype == self.dtype:
            return self
        segments = []
        for segment in self._state.segments:
            parts = [
                quantise(plain(segment.vectors[i : i + GALLERY_CHUNK], _cut(segment.scales, i)), dtype)
                for i in range(0, len(segment.vectors), GALLERY_CHUNK)
            ]
            vectors, scales = zip(*parts, strict=True)
            scales = torch.cat(scales) if dtype == "int8" else None
            segments.append(replace(segment, vectors=torch.cat(vectors), scales=scales))
        changed = self._like(replace(self._state, segments=tuple(segments), index=None))
        changed.dtype = dtype
        return changed

    def _like(self, state: State) -> "Gallery":
        made = Gallery(state, self.kind, self.model, self.dtype, self.skipped)
        made.photo_root, made.is_foreign = self.photo_root, self.is_foreign
        return made

    def snapshot(self) -> "Gallery":
        """The gallery as it is now, at no cost: `add` and `remove` no longer move its positions."""
        return self._like(self._state)

    # search

    def search(self, queries: Tensor, k: int, approximate: bool = False) -> tuple[Tensor, Tensor]:
        """The `k` items of highest dot product, best first; of equal scores the lower position comes first.

        Exact: as the engine's `search` over all vectors in fp32, of which no more than one chunk exists at a time.

        Args:
            queries: (Q, E) unit vectors.
            k: 1 to N.
            approximate: ask the index of `add_faiss_index` instead. Queries for which it finds fewer than `k` items are
                searched exactly.

        Returns:
            Scores (Q, k) fp32 and positions (Q, k) int64, on the CPU.

        Raises:
            ValueError: a `k` out of range, another width, queries that are not finite, or no index.
        """
        state = self._state
        if queries.dim() != 2 or queries.shape[1] != self.width:
            raise ValueError(f"queries of shape {tuple(queries.shape)} given, the gallery takes (Q, {self.width})")
        if not 1 <= k <= len(state):
            raise ValueError(f"k is {k}, but the gallery has {len(state)} items: give a k from 1 to {len(state)}")
        queries = finite(queries.detach().float(), "queries")
        if approximate:
            if state.index is None:
                raise ValueError("the gallery has no approximate index: call add_faiss_index() first")
            scores, positions = state.index.search(queries, k)
            lacking = (positions < 0).any(dim=1)
            if lacking.any():
                scores[lacking], positions[lacking] = _search_exactly(state, queries[lacking.to(queries.device)], k)
            return order_by_score(scores, positions)
        return _search_exactly(state, queries, k)

    def add_faiss_index(
        self,
        string_factory: str | None = None,
        *,
        nprobe: int = 32,
        train_size: int | None = None,
        measure_recall: int = 0,
        seed: int = 0,
    ) -> float | None:
        """Make an approximate index with FAISS, through `datasets`. Saved with the gallery; `add` and `remove` drop it.

        The index holds a copy of all vectors in memory, by default in the type of the gallery.

        Args:
            string_factory: FAISS's description of the index; None: an inverted file of about sqrt(N) lists, or a flat
                one below 10,000 items.
            nprobe: lists of an inverted file that are searched per query.
            train_size: vectors, randomly chosen, from which the lists are learned; None: 65,536, or 40 for each list.
            measure_recall: so many items are searched for in both ways; 0: none.

        Returns:
            The recall@10 against exact search, if it was measured.

        Raises:
            ImportError: FAISS or `datasets` is missing.
        """
        try:
            import faiss
            from datasets import Dataset
        except ImportError as error:
            raise ImportError(f"an approximate index needs more: pip install faiss-cpu datasets ({error})") from error
        state = self._state
        count = len(state)
        if string_factory is None:
            codes = {"float32": "Flat", "float16": "SQfp16", "int8": "SQ8"}[self.dtype]
            string_factory = codes if count < 10_000 else f"IVF{int(count**0.5)},{codes}"
        index = faiss.index_factory(self.width, string_factory, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            train_size = train_size or max(65_536, 40 * getattr(index, "nlist", 0))
            index.train(self._sample(train_size, seed).numpy())
        if hasattr(index, "nprobe"):
            index.nprobe = min(nprobe, index.nlist)
        holder = Dataset.from_dict({"position": range(count)})
        holder.add_faiss_index_from_external_arrays(_Rows(self), "itc", custom_index=index, batch_size=GALLERY_CHUNK)
        with self._lock:
            if self._state is not state:
                raise RuntimeError("the gallery was changed while its index was made: make it again")
            self._state = replace(state, index=FaissIndex(holder.get_index("itc").faiss_index))
        if measure_recall:
            return self.recall(self, measure_recall, approximate=True)
        return None

    def recall(
        self, reference: "Gallery", queries: Tensor | int = 1000, k: int = 10, approximate: bool = False, seed: int = 0
    ) -> float:
        """Share of the `k` best of `reference`, searched exactly, that are among the `k` best of this gallery.

        Args:
            reference: a gallery of the same items, such as the fp32 one, or this one itself for `approximate`.
            queries: (Q, E), or how many of the reference's own items are searched for.
        """
        if len(reference) != len(self):
            raise ValueError(f"galleries of {len(self)} and {len(reference)} items can't be compared")
        if isinstance(queries, int):
            queries = reference._sample(queries, seed)
        k = min(k, len(self))
        found = self.search(queries, k, approximate)[1]
        wanted = reference.search(queries, k)[1]
        return (found[:, :, None] == wanted[:, None, :]).any(dim=1).float().mean().item()

    def _sample(self, count: int, seed: int) -> Tensor:
        """fp32 vectors of `count` items, randomly chosen, or of all where there are fewer."""
        state, generator = self._state, torch.Generator().manual_seed(seed)
        return plain(*state.take(torch.randperm(len(state), generator=generator)[:count].sort().values)).cpu()

    def photo_path(self, item: dict) -> str | None:
        """Where the photo of an item can be read: a path or an http(s) address; None if it was not built of paths.

        Raises:
            UnusableItem: a path that leads out of `photo_root`, or one of a gallery from the Hub that leads anywhere.
        """
        path, root = item.get("path"), self.photo_root
        if path is None:
            return None
        is_relative = "://" not in path and not os.path.isabs(path)
        if root is None or not is_relative:
            if self.is_foreign:
                raise UnusableItem("a gallery from the Hub reads photos only from its photo_root")
            return path
        if os.path.normpath(path).split(os.sep)[0] == os.pardir:
            raise UnusableItem("its path leads out of the photo_root")
        return os.path.join(root, path)

    # tokens for the second stage

    def image_tokens(self, positions: Sequence[int], encoder: Encoder) -> Tensor:
        """Image tokens (n, P, D) bf16 of some photos: the stored ones, or from the photos, which are read again.

        Raises:
            ValueError: there are no stored tokens, and a photo has no path or can't be read any more.
        """
        state = self._state
        found = [state.find(position) for position in positions]
        if self.has_tokens:
            return torch.stack([segment.tokens[row] for segment, row in found])
        pixels = []
        for segment, row in found:
            item = segment.items[row]
            if item.get("path") is None:
                raise ValueError(
                    f"re-ranking needs the photo of item {item['id']!r}, and the gallery has neither its path nor "
                    "image tokens: build it with store_tokens=True, or search with rerank=0"
                )
            try:
                pixels.append(encoder.pixels(self.photo_path(item)))
            except UnusableItem as error:
                raise ValueError(
                    f"re-ranking needs the photo of item {item['id']!r}, {item['path']}: {error}. Set the gallery's "
                    "photo_root if the photos were moved, build it with store_tokens=True, or search with rerank=0"
                ) from error
        return encoder.embed_pixels(torch.stack(pixels))[1]

    # changes

    def add(self, model, processor, items: Iterable, *, batch_size: int = 32, dtype=None, **columns) -> list[dict]:
        """Embed more items and put them at the end; they get image tokens if the others have them.

        Args:
            model, processor, items, dtype: as in `build`.
            columns: `image_column`, `text_column`, `id_column` as in `build`.

        Returns:
            What could not be read, as {"id", "reason"}; also appended to `skipped`.

        Raises:
            ValueError: another model than the gallery's, or an id that is there already.
        """
        encoder = Encoder(model, processor, dtype)
        self.check_model(encoder.fingerprint)
        plan = _Plan(kind=self.kind, store_tokens=self.has_tokens, batch_size=batch_size, **columns)
        items = _open(items, plan, self.ids)
        units = [unit for _, unit in _encode(encoder, items, plan, lambda number: True)]
        skipped = [entry for unit in units for entry in unit.skipped]
        device = self._state.segments[0].vectors.device
        added = [_segment(unit, self.dtype).to(device) for unit in units if unit.items]
        with self._lock:
            state = self._state
            new = [item["id"] for segment in added for item in segment.items]
            _refuse_duplicates([*(item["id"] for item in state.items()), *new])
            rows = state.rows
            if rows is not None:
                rows = torch.cat([rows, torch.arange(state.starts[-1], state.starts[-1] + len(new))])
            self._state = State((*state.segments, *added), rows)
            self.skipped = [*self.skipped, *skipped]
        return skipped

    def remove(self, ids: Iterable[str | int]) -> None:
        """Take items out; those after them move up.

        Raises:
            KeyError: an id that is not there; nothing is removed then.
            ValueError: no item would be left.
        """
        ids = set(ids)
        with self._lock:
            state = self._state
            kept, missing = [], set(ids)
            for position, item in enumerate(state.items()):
                if item["id"] in ids:
                    missing.discard(item["id"])
                else:
                    kept.append(position)
            if missing:
                raise KeyError(f"not in the gallery: {some(missing)}")
            if not kept:
                raise ValueError("all items would be removed: a gallery has at least one")
            kept = torch.tensor(kept)
            self._state = replace(state, rows=kept if state.rows is None else state.rows[kept], index=None)

    # files

    def save(self, folder: str | os.PathLike) -> None:
        """Write the gallery to a folder, over the one that is there if it is a gallery's. Whole or not at all."""
        folder, state = Path(folder), self._state
        write_gallery(folder, state, kind=self.kind, model=self.model, dtype=self.dtype, skipped=self.skipped)
        if state.reads_tokens_from(folder):
            # Files that held removed items have been written anew, and are gone.
            saved = Gallery.load(folder).to(state.segments[0].vectors.device)._state
            with self._lock:
                if self._state is state:
                    self._state = replace(saved, index=state.index)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike,
        *,
        verify: bool = False,
        photo_root: str | os.PathLike | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> "Gallery":
        """Open a gallery; its files are memory-mapped and read only where they are used.

        Args:
            folder: a folder, or the name of a data set on the Hub that `push_to_hub` made.
            verify: also compare all checksums, which reads everything. Sizes are always compared.
            photo_root: where relative paths of photos are read from.
            revision, token: for the Hub.

        Raises:
            ValueError: no gallery, an unfinished build, or files that were cut off or changed.
        """
        folder, is_foreign = Path(folder), False
        if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)):
            patterns = [MANIFEST, "*.npy", "*.jsonl", "tokens-*.safetensors", "faiss-*.index"]
            options = {"repo_type": "dataset", "revision": revision, "token": token, "allow_patterns": patterns}
            try:
                folder, is_foreign = Path(snapshot_download(str(folder), **options)), True
            except Exception as error:  # of many kinds, from the connection to the name
                reason = " ".join(str(error).split())[:300]
                raise ValueError(
                    f"{folder} is neither a folder nor a data set that the Hub gives ({reason})"
                ) from error
        gallery = cls(*read_gallery(folder, verify))
        gallery.photo_root, gallery.is_foreign = photo_root, is_foreign
        return gallery

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | bool | None = None, commit_message: str = ""
    ) -> str:
        """Upload the gallery as a data set of the Hub and return the commit's address. Paths and titles of the items
        go with it. Tried again where the Hub or the connection fails."""
        api = HfApi(token=token)
        api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        with TemporaryDirectory() as folder:
            self.save(folder)
            for wait in (*_UPLOAD_WAITS, None):
                try:
                    commit = api.upload_folder(
                        repo_id=repo_id,
                        repo_type="dataset",
                        folder_path=folder,
                        commit_message=commit_message or f"{self!r}",
                        delete_patterns=["*.npy", "*.jsonl", "tokens-*.safetensors", "faiss-*.index"],
                    )
                    return str(commit)
                except Exception as error:  # of each version's HTTP client
                    status = getattr(getattr(error, "response", None), "status_code", None)
                    may_pass = isinstance(error, OSError) if status is None else status in (408, 429) or status >= 500
                    if wait is None or not may_pass:
                        raise
                    logger.warning(f"the upload has failed ({str(error).splitlines()[0]}); again in {wait:g} seconds")
                    time.sleep(wait)
        raise AssertionError("the last try returns or raises")

    # building

    @classmethod
    def build(
        cls,
        model,
        processor,
        items: Iterable,
        folder: str | os.PathLike | None = None,
        *,
        kind: str = "image",
        image_column: str = "image",
        text_column: str = "caption",
        id_column: str | None = None,
        dtype: str = "float32",
        store_tokens: bool = False,
        batch_size: int = 32,
        unit_size: int = 256,
        autocast: torch.dtype | None = None,
        duplicates: str = "error",
        measure_recall: int = 0,
        overwrite: bool = False,
        progress: bool = True,
        num_workers: int = 0,
    ) -> "Gallery":
        """Embed items and, with a `folder`, keep them there. A build that was killed goes on when called again.

        Items that can't be read are left out and listed in `skipped`.

        Args:
            model: in evaluation mode, on the device that is to do the work.
            processor: the model's.
            items: photos (paths, addresses, PIL images, bytes) or titles; or rows with columns, as a list or generator
                of dictionaries or as a `datasets` data set, map-style or iterable.
            folder: None: everything stays in memory.
            kind: "image" for photos, "text" for titles.
            image_column, text_column: the column of the photo and of the title, in rows.
            id_column: the column of the id (text or whole numbers); None: "id" where there is one. Without it the id is
                the path as given, else the position in `items`.
            dtype: how vectors are stored: "float32", "float16" or "int8".
            store_tokens: keep image tokens too (bf16), so that re-ranking needs no photo: 2 x P x D bytes a photo, 0.9
                MB with a ViT-B/16 at 384 pixels.
            batch_size: photos or titles of one pass.
            unit_size: items that are computed, and after a kill lost, together.
            autocast: type of the autocast of the passes.
            duplicates: what to do where an id comes twice: "error", or "first" to keep the first and list the others as
                skipped.
            measure_recall: so many items are searched for in all types of vectors; the recall@10 of each against fp32
                is printed. 0: none.
            overwrite: replace a gallery, or the beginning of another one, that is in `folder`.
            progress: show a bar.
            num_workers: threads that read and decode photos ahead; 0: one after another.

        Raises:
            ValueError: no usable item, an id that comes twice, a model in training mode, columns that are not there, a
                finished gallery in the folder, or the beginning of another one.
        """
        options = {
            "kind": kind,
            "image_column": image_column,
            "text_column": text_column,
            "id_column": id_column,
            "dtype": dtype,
            "store_tokens": store_tokens,
            "batch_size": batch_size,
            "unit_size": unit_size,
            "autocast": autocast,
            "duplicates": duplicates,
            "progress": progress,
            "num_workers": num_workers,
        }
        if folder is not None:
            begin_units(model, processor, items, folder, overwrite=overwrite, **options)
            encode_units(model, processor, items, folder, **options)
            join_units(folder, measure_recall=measure_recall)
            return cls.load(folder)
        return build_in_memory(Encoder(model, processor, autocast), items, measure_recall=measure_recall, **options)


def _search_exactly(state: State, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    queries = queries.to(state.segments[0].vectors.device)
    blocks = [running_top_k(_score_chunks(state, block), k) for block in queries.split(QUERY_BLOCK)]
    return torch.cat([scores for scores, _ in blocks]).cpu(), torch.cat([ids for _, ids in blocks]).cpu()


def _score_chunks(state: State, queries: Tensor) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(state), GALLERY_CHUNK):
        vectors, scales = state.read(start, min(start + GALLERY_CHUNK, len(state)))
        scores = queries @ vectors.float().t()
        if scales is not None:
            scores.mul_(scales)  # n products instead of n x E
        yield start, scores


# --- building ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """What the vectors of a build depend on, beside model and items."""

    kind: str = "image"
    image_column: str = "image"
    text_column: str = "caption"
    id_column: str | None = None
    dtype: str = "float32"
    store_tokens: bool = False
    batch_size: int = 32
    unit_size: int = 256
    autocast: str | None = None
    duplicates: str = "error"

    def __post_init__(self):
        _check_choice("kind", self.kind, KINDS)
        _check_choice("dtype", self.dtype, VECTOR_TYPES)
        _check_choice("duplicates", self.duplicates, ("error", "first"))
        if min(self.batch_size, self.unit_size) < 1:
            raise ValueError(f"batch_size is {self.batch_size}, unit_size {self.unit_size}: both are at least 1")
        if self.kind == "text" and self.store_tokens:
            raise ValueError("titles have no image tokens: leave store_tokens out")


@dataclass
class _Unit:
    """The embedded items of one unit: `vectors` (n, E) fp32, `tokens` n times (P, D) or None; `ends`: the marks of its
    first and last item, readable or not."""

    vectors: Tensor
    tokens: Sequence[Tensor] | None
    items: list[dict] = field(default_factory=list)
    skipped: list[dict] = field(default_factory=list)
    ends: list = field(default_factory=list)


def build_in_memory(
    encoder: Encoder,
    items: Iterable,
    *,
    measure_recall: int = 0,
    progress: bool = True,
    num_workers: int = 0,
    **options,
) -> Gallery:
    """`Gallery.build` without a folder, for who has an `Encoder`: the model's fingerprint is not computed again."""
    plan = _plan(**options)
    items = _open(items, plan)
    bar = _bar(items, plan, progress)
    units = []
    for _, unit in _encode(encoder, items, plan, lambda number: True, num_workers):
        units.append(unit)
        bar.update(len(unit.items) + len(unit.skipped))
    bar.close()
    return _join(units, plan, encoder.fingerprint, measure_recall)


def begin_units(
    model, processor, items: Iterable, folder: str | os.PathLike, *, overwrite: bool = False, **options
) -> None:
    """Begin a build in `folder`, or find that it can go on. One process calls it, before any calls `encode_units`.

    Arguments and errors are those of `Gallery.build`.
    """
    folder, plan = Path(folder), _plan(**options)
    refuse_foreign(folder)
    if (folder / MANIFEST).exists() and not overwrite:
        raise ValueError(f"{folder} holds a gallery: open it with Gallery.load(), or build with overwrite=True")
    settings = _settings(Encoder(model, processor), _open(items, plan), plan)
    build = folder / BUILD
    found = read_json(build / "build.json") if (build / "build.json").exists() else None
    if found is not None and (differences := _differences(found, settings)):
        if not overwrite:
            raise ValueError(f"{folder} holds the beginning of another gallery ({differences}): {_GO_ON}")
        found = None
    if found is None:
        _remove_build(folder)
        build.mkdir(parents=True)
    write_json(build / "build.json", settings)  # of which some may be others than before: see _AT_THE_END


def encode_units(
    model,
    processor,
    items: Iterable,
    folder: str | os.PathLike,
    *,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = True,
    num_workers: int = 0,
    **options,
) -> None:
    """The share of process `rank` in a build by `world_size` processes: every `world_size`-th unit that is not in the
    folder yet. Where all have returned, one calls `join_units`.

    Arguments and errors are those of `Gallery.build`. A generator is read by every process as a whole.
    """
    folder, plan = Path(folder), _plan(**options)
    build = folder / BUILD
    encoder = Encoder(model, processor, None if plan.autocast is None else getattr(torch, plan.autocast))
    items = _open(items, plan)
    if differences := _differences(read_json(build / "build.json"), _settings(encoder, items, plan)):
        raise ValueError(f"the build in {folder} was begun otherwise ({differences}): {_GO_ON}")
    bar = _bar(items, plan, progress and rank == 0)
    seen = 0

    def wanted(number: int) -> bool:
        return number % world_size == rank and not (build / _unit_name(number)).exists()

    for number, unit in _encode(encoder, items, plan, wanted, num_workers, lambda *ends: _check_ends(build, *ends)):
        if isinstance(unit, int):
            seen += unit
        else:
            seen += len(unit.items) + len(unit.skipped)
            _write_unit(build, number, unit)
        bar.update(seen - bar.n)
    bar.close()
    write_json(build / "end.json", {"count": seen})


def join_units(folder: str | os.PathLike, *, measure_recall: int = 0) -> None:
    """Make the gallery of the units that all processes have left in `folder`.

    Raises:
        ValueError: units are missing, an id comes twice, or no item is usable.
    """
    folder = Path(folder)
    build = folder / BUILD
    if not (build / "end.json").exists():
        raise ValueError(f"the build of {folder} has not come to its end: call it again, it goes on where it was")
    settings, count = read_json(build / "build.json"), read_json(build / "end.json")["count"]
    plan = _Plan(**{name: settings[name] for name in _Plan.__dataclass_fields__})
    numbers = range(-(-count // plan.unit_size))
    missing = [number for number in numbers if not (build / _unit_name(number)).exists()]
    if missing:
        raise ValueError(f"the build of {folder} lacks the units {some(missing)} of {len(numbers)}: call it again")
    gallery = _join([_gathered(folder, numbers)], plan, settings["model"], measure_recall)
    gallery.save(folder)
    _remove_build(folder)


def _plan(*, autocast: torch.dtype | None = None, progress: bool = True, num_workers: int = 0, **options) -> _Plan:
    return _Plan(autocast=None if autocast is None else str(autocast).removeprefix("torch."), **options)


def _join(units: Sequence[_Unit], plan: _Plan, model: str, measure_recall: int) -> Gallery:
    skipped = [entry for unit in units for entry in unit.skipped]
    segments = [_segment(unit, "float32") for unit in units if unit.items]
    if not segments:
        reasons = f", the first because {skipped[0]['reason']}" if skipped else ""
        raise ValueError(f"none of {len(skipped)} items can be used{reasons}")
    state = State(tuple(segments))
    ids = [item["id"] for segment in segments for item in segment.items]
    if plan.duplicates == "error":
        _refuse_duplicates(ids)
    else:
        seen, rows = set(), []
        for row, value in enumerate(ids):
            if value in seen:
                skipped.append({"id": value, "reason": "the id comes twice"})
            else:
                rows.append(row)
                seen.add(value)
        if len(rows) < len(ids):
            state = replace(state, rows=torch.tensor(rows))
    plain = Gallery(state, plan.kind, model, "float32", skipped)
    if skipped:
        logger.warning(
            f"{len(skipped)} of {len(skipped) + len(plain)} items can't be used, the first {skipped[0]['id']!r}: "
            f"{skipped[0]['reason']}; see Gallery.skipped"
        )
    if measure_recall:
        for dtype in ("float16", "int8"):
            print(f"recall@10 of {dtype} vectors: {plain.astype(dtype).recall(plain, measure_recall):.4f} of float32's")
    return plain.astype(plan.dtype)


def _segment(unit: _Unit, dtype: str) -> Segment:
    return Segment(*quantise(unit.vectors, dtype), unit.items, unit.tokens)


def _is_sequence(items: Any) -> bool:
    return hasattr(items, "__len__") and hasattr(items, "__getitem__")


def _open(items: Any, plan: _Plan, others: Sequence[str | int] = ()) -> Any:
    """Look at the items before long work starts: columns and, where they cost nothing, ids, beside `others`."""
    if isinstance(items, (str, bytes, dict)):
        raise ValueError(
            f"one {type(items).__name__} given: items are a list, a data set or a generator; of a folder, "
            "sorted(Path(folder).rglob('*.jpg'))"
        )
    column = plan.image_column if plan.kind == "image" else plan.text_column
    features = getattr(items, "features", None)
    if features is not None and not isinstance(features, dict):  # a column of a data set
        source, name, features = items.source, items.column_name, None
        if getattr(source.features[name], "decode", False):
            items = source.cast_column(name, replace(source.features[name], decode=False))[name]
    if features is not None:  # of `datasets`
        for name in (column, *([] if plan.id_column is None else [plan.id_column])):
            if name not in features:
                raise ValueError(f"the data set has no column {name!r}, but {', '.join(map(repr, features))}")
        # Only what is needed, and undecoded, since one damaged photo would end the iteration.
        id_column = plan.id_column or "id"
        items = items.select_columns([column, *([id_column] if id_column in features and id_column != column else [])])
        if getattr(features[column], "decode", False):
            items = items.cast_column(column, replace(features[column], decode=False))
    if not _is_sequence(items):
        return items
    if not len(items):
        raise ValueError("no items given: a gallery has at least one")
    id_column = plan.id_column or "id"
    ids = None
    if features is not None:
        ids = [_checked_id(value) for value in items[id_column]] if id_column in features else None
    elif isinstance(items, (list, tuple)):
        ids = [_id_of(item, position, plan) for position, item in enumerate(items)]
    if ids is not None and plan.duplicates == "error":
        _refuse_duplicates([*others, *(value for value in ids if value is not None)])
    return items


def _bar(items: Any, plan: _Plan, progress: bool):
    return logging.tqdm(total=len(items) if _is_sequence(items) else None, desc="embedding", disable=not progress)


def _encode(
    encoder: Encoder,
    items: Any,
    plan: _Plan,
    wanted: Callable[[int], bool],
    workers: int = 0,
    check: Callable = lambda *_: None,
) -> Iterator[tuple[int, "_Unit | int"]]:
    """All units in order: embedded where they are wanted, else (`check`ed and) only the number of their items."""
    if _is_sequence(items):
        for number, first in enumerate(range(0, len(items), plan.unit_size)):
            positions = range(first, min(first + plan.unit_size, len(items)))
            if wanted(number):
                yield number, _encode_unit(encoder, first, (items[position] for position in positions), plan, workers)
            else:
                check(number, *(_mark(items[position], position, plan) for position in (first, positions[-1])))
                yield number, len(positions)
    else:
        rows = iter(items)
        for number, row in enumerate(rows):  # the first of each unit; the others are taken below, one by one
            first, unit = number * plan.unit_size, chain([row], islice(rows, plan.unit_size - 1))
            if wanted(number):
                yield number, _encode_unit(encoder, first, unit, plan, workers)
            else:
                begin = _mark(row, first, plan)
                for last, row in enumerate(unit, first):  # noqa: B007
                    pass
                check(number, begin, _mark(row, last, plan))
                yield number, last - first + 1


def _encode_unit(encoder: Encoder, first: int, rows: Iterable, plan: _Plan, workers: int) -> _Unit:
    items, skipped, ends, pending, vectors, tokens = [], [], [], [], [], []

    def prepare(numbered: tuple[int, Any]) -> tuple[tuple[int, Any], dict, Any]:
        """What was given, the item and what is embedded of it; of an item that can't be used the reason and None."""
        position, row = numbered
        value = _id_of(row, position, plan)
        try:
            content = _content(row, plan)
            if value is None:
                raise UnusableItem("the id is null")
            if plan.kind == "text":
                title = clean_title(content)
                return numbered, {"id": value, "text": title}, title
            path = _path_of(content)
            return numbered, {"id": value} if path is None else {"id": value, "path": path}, encoder.pixels(content)
        except UnusableItem as error:
            return numbered, {"id": value, "reason": str(error)}, None

    def flush() -> None:
        if not pending:
            return
        if plan.kind == "text":
            vectors.append(encoder.embed_titles(pending))
        else:
            embedded, its_tokens = encoder.embed_pixels(torch.stack(pending))
            vectors.append(embedded)
            tokens.extend(its_tokens if plan.store_tokens else ())
        pending.clear()

    for numbered, item, content in _ahead(prepare, enumerate(rows, first), workers, plan.batch_size):
        ends = [*ends[:1], numbered]
        if content is None:
            skipped.append(item)
            continue
        items.append(item)
        pending.append(content)
        if len(pending) == plan.batch_size:
            flush()
    flush()
    vectors = torch.cat(vectors) if vectors else torch.empty(0, 0)
    tokens = torch.stack(tokens) if tokens else None
    return _Unit(vectors, tokens, items, skipped, [_mark(row, at, plan) for at, row in (ends[0], ends[-1])])


def _ahead(function: Callable, items: Iterable, workers: int, ahead: int) -> Iterator:
    """`map`, by threads that are so many items ahead of what is taken. Pillow works without the interpreter's lock."""
    if not workers:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _mark(item: Any, position: int, plan: _Plan) -> list:
    """What tells an item from another at the same place, in JSON: its id and a digest of what it holds."""
    value = _id_of(item, position, plan)
    content = None
    with suppress(UnusableItem):
        content = _content(item, plan)
    if isinstance(content, dict):
        content = content.get("bytes") or content.get("path")
    if Image is not None and isinstance(content, Image.Image):
        content = b"%d %d %s " % (*content.size, content.mode.encode()) + content.tobytes()
    if isinstance(content, (str, os.PathLike)):
        content = os.fspath(content).encode("utf-8", "surrogatepass")
    if not isinstance(content, (bytes, bytearray, memoryview)):
        content = b""
    return [value, hashlib.blake2b(content, digest_size=8).hexdigest()]


def _is_row(item: Any) -> bool:
    return isinstance(item, dict) and not set(item) <= {"bytes", "path"}


def _content(item: Any, plan: _Plan) -> Any:
    if not _is_row(item):
        return item
    column = plan.image_column if plan.kind == "image" else plan.text_column
    if column not in item:
        raise ValueError(f"a row has no column {column!r}, but {', '.join(map(repr, item))}")
    if item[column] is None:
        raise UnusableItem(f"the {'photo' if plan.kind == 'image' else 'title'} is null")
    if isinstance(item[column], Exception):  # whoever made the row knows why there is none
        raise item[column]
    return item[column]


def _id_of(item: Any, position: int, plan: _Plan) -> str | int | None:
    if _is_row(item):
        if plan.id_column is not None and plan.id_column not in item:
            raise ValueError(f"a row has no column {plan.id_column!r}, but {', '.join(map(repr, item))}")
        return _checked_id(item.get(plan.id_column or "id", position))
    path = _path_of(item) if plan.kind == "image" else None
    return position if path is None else path


def _path_of(content: Any) -> str | None:
    """Where a photo can be read again, if it can."""
    if isinstance(content, dict):
        content = None if content.get("bytes") else content.get("path")
    return os.fspath(content) if isinstance(content, (str, os.PathLike)) else None


def _checked_id(value: Any) -> str | int | None:
    if value is None or isinstance(value, str):
        return value
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"an id is text or a whole number, not {type(value).__name__}") from None


def _refuse_duplicates(ids: Sequence) -> None:
    if len(set(ids)) < len(ids):
        seen: set = set()
        twice = {value for value in ids if value in seen or seen.add(value)}
        raise ValueError(
            f"{len(twice)} ids come twice, such as {some(twice)}: make them unique (or build with duplicates='first')"
        )


def _gathered(folder: Path, numbers: Iterable[int]) -> _Unit:
    """All units as one. The vectors are copied into one file, which is mapped: in memory are only ids and paths, about
    half a kilobyte an item. (A map for each unit would be more than Linux gives to a process.)"""
    path, count, width, whole = folder / BUILD / "vectors", 0, 0, _Unit(torch.empty(0, 0), None)
    token_files = []
    with open(path, "wb") as file:
        for number in numbers:
            unit = _read_unit(folder, number)
            whole.items += unit.items
            whole.skipped += unit.skipped
            if unit.items:
                file.write(unit.vectors.numpy().data.cast("B"))
                count, width = count + len(unit.vectors), unit.vectors.shape[1]
            if unit.tokens is not None:
                token_files += unit.tokens.files
    if count:
        whole.vectors = torch.from_numpy(np.memmap(path, dtype=np.float32, mode="c", shape=(count, width)))
    if token_files:
        whole.tokens = TokenFiles(folder / BUILD, token_files)
    return whole


def _cut(scales: Tensor | None, start: int) -> Tensor | None:
    return None if scales is None else scales[start : start + GALLERY_CHUNK]


def _check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}: choose one of {', '.join(choices)}")


def _unit_name(number: int) -> str:
    return f"unit-{number:06}.safetensors"


def _settings(encoder: Encoder, items: Any, plan: _Plan) -> dict:
    """What has to be equal for a build to go on."""
    count = len(items) if _is_sequence(items) else None
    settings = {"format": FORMAT, "model": encoder.fingerprint, "count": count, **asdict(plan)}
    if plan.kind == "text":
        settings["max_length"] = encoder.processor.max_length
    return settings


# No unit depends on them: a build may go on with others.
_AT_THE_END = ("dtype", "duplicates")


def _differences(found: dict, settings: dict) -> str:
    names = [name for name in settings if found.get(name) != settings[name] and name not in _AT_THE_END]
    return ", ".join(f"{name} was {found.get(name)!r}, is {settings[name]!r}" for name in names)


def _remove_build(folder: Path) -> None:
    """In one step, so that a kill leaves no units without their settings."""
    for left in folder.glob(f".{BUILD}-*"):
        shutil.rmtree(left, ignore_errors=True)
    if (folder / BUILD).exists():
        aside = folder / f".{BUILD}-{secrets.token_hex(4)}"
        (folder / BUILD).rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def _write_unit(build: Path, number: int, unit: _Unit) -> None:
    entry = None
    if unit.tokens is not None:
        data = to_safetensors({"tokens": unit.tokens})
        entry = {**write_named(build, "tokens", ".safetensors", [data]), "items": len(unit.items)}
    header = {"items": unit.items, "skipped": unit.skipped, "ends": unit.ends, "tokens": entry}
    data = to_safetensors({"vectors": unit.vectors}, metadata={"unit": json.dumps(header)})
    write(build / _unit_name(number), [data])


def _read_unit(folder: Path, number: int) -> _Unit:
    path = folder / BUILD / _unit_name(number)
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["unit"])
            vectors = file.get_tensor("vectors")
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it and call the build again") from error
    tokens = None if header["tokens"] is None else TokenFiles(folder / BUILD, [header["tokens"]])
    return _Unit(vectors, tokens, header["items"], header["skipped"], header["ends"])


def _check_ends(build: Path, number: int, first: Any, last: Any) -> None:
    """Compare a unit that is there with the items that are given now."""
    if not (build / _unit_name(number)).exists():
        return  # another process's
    ends = _read_unit(build.parent, number).ends
    if ends != [first, last]:
        (first_id, _), (last_id, _), before = first, last, [mark[0] for mark in ends]
        now = "the same with other contents" if before == [first_id, last_id] else f"{first_id!r} to {last_id!r}"
        raise ValueError(
            f"the items have changed since the build began: unit {number} went from {before[0]!r} to {before[1]!r}, "
            f"now it is {now}. Give the same items, or build with overwrite=True"
        )


__all__ = [
    "Gallery",
    "begin_units",
    "build_in_memory",
    "encode_units",
    "join_units",
]
