"""Building a gallery: embed all rows of a source, in one process or several, and commit them as one table.

    build = Build(source, "my_gallery", kind="image")     # looks at everything that can be wrong before the work
    build.run(model, processor)                           # collective; the same call goes on after a kill

Rows are embedded in blocks of `unit_size`. A block is computed whole by one process, which writes it into the table's
folder once, as a fragment of Lance; `Parts` notes what is written. At the end the main process commits all fragments in
the order of the rows: until then there is no table, or the one from before. What is computed together depends neither
on the number of processes nor on what an earlier start had finished, so the rows are equal, to the last bit.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import secrets
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from aliblip.data.collate import Collator, printable
from aliblip.data.loader import EvalLoader
from aliblip.data.rows import Source
from aliblip.retrieval.embedding import EmbeddedUnit, embedded_units, undisturbed
from aliblip.retrieval.plan import tokens_per_image
from aliblip.retrieval.table_columns import FromTool, KeptColumns, Lost, ids_told_ahead, kept_columns
from aliblip.retrieval.tables import (
    FORMAT,
    ID,
    ITEMS,
    KINDS,
    LARGEST_THUMBNAIL,
    PATH,
    PHOTO_ROOT,
    SKIPPED,
    TEXT,
    THUMBNAIL,
    TOKENS,
    VECTOR,
    WRITER_LOCK,
    Facts,
    changed,
    enough_room,
    indexed_columns,
    is_address,
    is_conflict,
    lance_options,
    library,
    one_writer,
    open_dataset,
    table_exists,
    table_uri,
    tidy_uri,
)
from aliblip.runtime.distributed import is_main, rank, together, world_size
from aliblip.runtime.mistakes import UsageError, usage_errors
from aliblip.runtime.owners import OWNER, Owner
from aliblip.runtime.parts import Parts
from encoder_aliblip import TOKEN_TYPE, fingerprint, is_finite

__all__ = ["BUILD", "Build", "BuildPlan", "EmbeddedRows", "check_options", "check_place", "embedded_rows", "in_python"]

# The folder of parts in that of the gallery.
BUILD = "build"
DUPLICATES = ("error", "first")
THUMBNAIL_SIDE = 384
# A fragment after compaction: rows, and bytes, since image tokens make rows of a megabyte.
FRAGMENT_ROWS, FRAGMENT_BYTES = 2**20, 2 * 2**30
# Of a batch that compaction reads at once.
BATCH_BYTES = 64 * 2**20

_SKIPPED_SCHEMA = pa.schema(
    [("build", pa.string()), ("row", pa.int64()), ("name", pa.string()), ("reason", pa.string())]
)
logger = logging.getLogger(__name__)


def in_python(name: str, value: Any = None) -> str:
    """How an argument is written in Python."""
    return name if value is None else f"{name}={value!r}"


def some_of(values: Sequence[Any]) -> str:
    """The first of some values, and how many more there are."""
    return ", ".join(map(repr, values[:5])) + (f" and {len(values) - 5:,} more" if len(values) > 5 else "")


def token_shape(config) -> tuple[int, int]:
    """(P, D) of the image tokens of one photo."""
    return tokens_per_image(config), config.vision_config.hidden_size


@dataclass(frozen=True)
class BuildPlan:
    """What a build will write.

    Attributes:
        rows: of the data.
        vectors, tokens: bytes of all vectors, and of all image tokens.
    """

    rows: int
    vectors: int
    tokens: int


class Build:
    """One build of a gallery. Making it checks what can be checked before a model is there.

    Args:
        source: of photos or titles, its further columns as `other_columns`.
        uri: folder or address of the gallery.
        kind: "image" or "text".
        columns: of the data, to keep; None: all that the source gives.
        id_column: see `kept_columns`.
        thumbnails: longest side of JPEG thumbnails; True: 384, False: none.
        store_tokens: keep image tokens.
        batch_size: rows of one pass of the model.
        unit_size: rows that one process computes and writes together.
        dtype: type of the autocast of the passes; None: the type of the weights.
        duplicates: what to do where an id comes twice: "error", or "first" to keep the first and list the others.
        overwrite: replace a gallery, or the beginning of another one, that is there.
        num_workers: processes that read and decode photos ahead.
        storage_options: for an address, as Lance takes them.
        parts_dir: folder that all processes see, where finished blocks are noted; None: in the gallery's folder, or,
            for an address, in the user's cache.
        flag: how the tool that was called writes its arguments.

    Raises:
        UsageError: a wrong option or column, an id that comes twice, a place that holds something else.
    """

    def __init__(
        self,
        source: Source,
        uri: str | os.PathLike,
        *,
        kind: str = "image",
        columns: Sequence[str] | None = None,
        id_column: str | None = None,
        thumbnails: bool | int = False,
        store_tokens: bool = False,
        batch_size: int = 32,
        unit_size: int = 256,
        dtype: torch.dtype | None = None,
        duplicates: str = "error",
        overwrite: bool = False,
        num_workers: int = 2,
        storage_options: Mapping[str, Any] | None = None,
        parts_dir: str | os.PathLike | None = None,
        flag: FromTool = in_python,
    ):
        check_options(kind, thumbnails, store_tokens, batch_size, unit_size, duplicates, num_workers, flag)
        self.source, self.uri, self.kind, self.flag = source, tidy_uri(uri), kind, flag
        self.thumbnail_side = THUMBNAIL_SIDE if thumbnails is True else (thumbnails or None)
        self.store_tokens, self.dtype, self.duplicates = store_tokens, dtype, duplicates
        self.batch_size, self.num_workers = min(batch_size, unit_size), num_workers
        self.passes = unit_size // self.batch_size  # of a block
        self.overwrite, self.storage_options = overwrite, storage_options
        self.parts_dir = _parts_dir(self.uri) if parts_dir is None else Path(parts_dir)
        self._check_place()
        self.kept = kept_columns(source, columns=columns, id_column=id_column, flag=flag, kind=kind)
        self.ids_are_checked = self._check_ids()

    def _check_place(self) -> None:
        """Refuse a place that holds something else, or a gallery that is not to be replaced."""
        # A build that has not come to its end may have been killed after its commit.
        is_begun = os.path.isfile(self.parts_dir / f"{BUILD}.json")
        check_place(self.uri, self.overwrite or is_begun, self.storage_options, self.flag)

    def _check_ids(self) -> bool:
        """Look at the ids where they cost little; whether they are each once."""
        told = ids_told_ahead(self.source, self.kept)
        if told is None:
            return self.kept.ids == "row"
        rows, ids = [], []
        for row, value in told:
            rows.append(row)
            ids.append(value)
        missing = [row for row, value in zip(rows, ids, strict=True) if value is None]
        if len(missing) == len(ids):
            raise UsageError(
                f"the column {self.kept.id_column!r} of {self.source.name} is null in every row: name another one with "
                f"{self.flag('id_column')}"
            )
        if missing:
            self.kept.notes.append(
                f"{len(missing):,} of {len(ids):,} rows are left out for lack of an id, the first is row {missing[0]}"
            )
        if self.duplicates == "first":
            return False
        twice = [value for value, count in Counter(ids).items() if count > 1 and value is not None]
        if twice:
            raise UsageError(self._told_twice(twice))
        return True

    def _told_twice(self, twice: Sequence[Any]) -> str:
        which = {"name": "the names of the photos", "row": "the numbers of the rows"}.get(
            self.kept.ids, f"the column {self.kept.id_column!r}"
        )
        return (
            f"some ids come twice ({which}): {some_of(twice)}. Make them unique, name another column with "
            f"{self.flag('id_column')}, or keep the first of each with {self.flag('duplicates', 'first')}"
        )

    @property
    def num_blocks(self) -> int:
        return -(-self.source.num_rows // (self.batch_size * self.passes))

    def plan(self, config) -> BuildPlan:
        """What will be written with a model of this configuration."""
        rows = self.source.num_rows
        tokens = int(np.prod(token_shape(config))) * TOKEN_TYPE.itemsize if self.store_tokens else 0
        return BuildPlan(rows, rows * config.image_text_hidden_size * 4, rows * tokens)

    # --- the work -----------------------------------------------------------------------------------------------------

    def run(self, model, processor, *, progress: bool = False, before_end: Callable[[], None] | None = None) -> Lost:
        """Build the gallery (collective).

        Args:
            model: the plain model (unwrapped), with the weights of every rank equal.
            processor: an `AliBlipProcessor`.
            progress: show a bar on the main process.
            before_end: what the main process does when the table is there, and again after a kill in it: an index.

        Returns:
            What of the rows' columns is not in the table, on all ranks.

        Raises:
            UsageError: no usable row, ids that come twice, the beginning of another gallery.
            RuntimeError: another rank has failed; the message says which and why.
        """
        with ExitStack() as stack:
            together(True, lambda: stack.enter_context(self._alone()), "begin the build")  # collective
            stack.enter_context(enough_room())
            return self._run(model, processor, progress, before_end)

    def _run(self, model, processor, progress: bool, before_end: Callable[[], None] | None) -> Lost:
        config = model.config
        facts = self._facts(config)
        model_print = together(is_main(), lambda: fingerprint(model, processor), "look at the model")  # collective
        facts = replace(facts, model=model_print)
        parts = Parts(self.parts_dir, self._made_from(facts, processor))
        together(is_main(), lambda: self._begin(parts), "begin the build")  # collective
        number = parts.settle(BUILD, secrets.randbits(48))  # collective
        facts = replace(facts, build=f"{number:012x}")
        schema = self._schema(facts)
        there = together(is_main(), lambda: self._committed(facts), "look at the gallery")  # collective
        if not there:
            stage = parts.stage("blocks", needed=True)  # collective
            part = functools.partial(self._embed, stage, model, processor, schema, facts, progress)
            together(True, part, "build its part of the gallery")  # collective
            stage = parts.stage("blocks", needed=True)  # collective

        def finish() -> Lost:
            lost = Lost() if there else self._commit(stage, schema, facts)
            self._tidy_up()
            if before_end is not None:
                before_end()
            parts.remove()
            return lost

        return together(is_main(), finish, "put the gallery together")  # collective

    def _facts(self, config) -> Facts:
        return Facts(
            kind=self.kind,
            width=config.image_text_hidden_size,
            ids=self.kept.ids,
            id_column=self.kept.id_column,
            columns=tuple(self.kept.names.values()),
            renamed=self.kept.renamed,
            token_shape=token_shape(config) if self.store_tokens else None,
            thumbnail_side=self.thumbnail_side,
        )

    def _schema(self, facts: Facts) -> pa.Schema:
        return self.kept.schema(
            kind=self.kind,
            width=facts.width,
            token_shape=facts.token_shape,
            thumbnails=self.thumbnail_side is not None,
        )

    def _made_from(self, facts: Facts, processor) -> dict[str, Any]:
        """What has to be equal for a build to go on."""
        manifest = json.dumps(self.source.manifest(), sort_keys=True, default=str).encode()
        digest = hashlib.blake2b(manifest, digest_size=6).hexdigest()
        made_from = {
            "format": FORMAT,
            "model": facts.model,
            "data": f"{self.source.name}, {self.source.num_rows} rows, {digest}",
            "kind": self.kind,
            "ids": [self.kept.ids, self.kept.id_column],
            "columns": {kept: str(self.kept.types[name]) for name, kept in self.kept.names.items()},
            "image tokens": self.store_tokens,
            "thumbnails": self.thumbnail_side,
            "batch_size": self.batch_size,
            "unit_size": self.batch_size * self.passes,
            "autocast": None if self.dtype is None else str(self.dtype).removeprefix("torch."),
        }
        return made_from | ({"max_length": processor.max_length} if self.kind == "text" else {})

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Refuse to build beside another build of the same gallery, whose files this one would take for left ones."""
        if not is_main():
            yield
            return
        if is_address(self.uri):
            place = Path(tempfile.gettempdir(), f"aliblip-{_digest(self.uri)}{OWNER}")
        else:
            with usage_errors(OSError, told=f"the folder {self.uri} can't be made ({{}}): give another place"):
                os.makedirs(self.uri, exist_ok=True)
            place = Path(self.uri, OWNER)
        with Owner.of(self.uri, "a build of the gallery", tell=logger.warning, place=place):
            yield

    def _begin(self, parts: Parts) -> None:
        """Look again, since it may be long ago, and find whether what is there can go on. Main process only."""
        self._check_place()
        if self.overwrite:
            parts.drop_others()
        parts.check(f"give another place ({self.flag('uri')}), or {self.flag('overwrite', True)} to drop it")
        told = f"{self.parts_dir} can't take the notes of this build ({{}}): give another {self.flag('parts_dir')}"
        with usage_errors(OSError, told=told):
            parts.begin()

    def _committed(self, facts: Facts) -> bool:
        """Whether a start before this one was killed after its commit."""
        if not table_exists(self.uri, storage_options=self.storage_options):
            return False
        schema = open_dataset(self.uri, storage_options=self.storage_options).schema
        with suppress(UsageError):  # a table of somebody else, which is to be overwritten
            return Facts.of(schema, self.uri).build == facts.build
        return False

    def _embed(self, stage, model, processor, schema: pa.Schema, facts: Facts, progress: bool) -> None:
        """Embed and write the blocks of this rank that no earlier start has written."""
        todo = [block for block in range(self.num_blocks) if block not in stage]
        own = todo[rank() :: world_size()]
        with undisturbed(model), stage:
            for block, units in self._blocks(model, processor, own, progress):
                stage.add(block, {}, self._write(units, schema, facts))

    def _blocks(
        self, model, processor, blocks: Sequence[int], progress: bool
    ) -> Iterator[tuple[int, list[EmbeddedUnit]]]:
        loader = EvalLoader(
            self.source,
            collator_of(processor, self.kind, self.thumbnail_side),
            unit_size=self.batch_size,
            rank=rank(),
            world_size=world_size(),
            num_workers=self.num_workers,
        )
        last_of = {block: min((block + 1) * self.passes, loader.num_units) - 1 for block in blocks}
        units = [unit for block in blocks for unit in range(block * self.passes, last_of[block] + 1)]
        what = "photos" if self.kind == "image" else "titles"
        of_block: list[EmbeddedUnit] = []
        for unit in embedded_units(model, loader, units, dtype=self.dtype, progress=progress, what=what):
            of_block.append(_on_the_cpu(unit))
            block = unit.number // self.passes
            if unit.number == last_of[block]:
                yield block, of_block
                of_block = []

    def _write(self, units: list[EmbeddedUnit], schema: pa.Schema, facts: Facts) -> dict[str, Any]:
        """Write a block as a fragment; what `Parts` keeps of it."""
        rows = embedded_rows(units, self.kept, schema, facts, photo_root(self.source))
        return {
            "fragments": [json.dumps(one.to_json()) for one in self._fragments(rows.table, schema)],
            "rows": rows.numbers,
            "skipped": rows.skipped,
            "misfits": rows.lost.misfits,
            "columns": rows.lost.columns,
        }

    def _fragments(self, table: pa.Table, schema: pa.Schema) -> list:
        if not len(table):
            return []
        library()  # before the name below
        from lance.fragment import write_fragments

        # "overwrite": with the field ids of a new table; nothing that is there is touched.
        return write_fragments(
            table,
            table_uri(self.uri, ITEMS),
            schema=schema,
            mode="overwrite",
            storage_options=lance_options(self.storage_options),
        )

    # --- the commit, by the main process ------------------------------------------------------------------------------

    def _commit(self, stage, schema: pa.Schema, facts: Facts) -> Lost:
        """Put all fragments together in one commit."""
        missing = [block for block in range(self.num_blocks) if block not in stage]
        if missing:
            raise RuntimeError(f"the build of {self.uri} lacks {len(missing)} blocks, the first is {missing[0]}")
        infos = [stage.load(block)[1] for block in range(self.num_blocks)]
        from lance.fragment import FragmentMetadata

        blocks = [[FragmentMetadata.from_json(one) for one in info["fragments"]] for info in infos]
        self._check_files(blocks)
        skipped = [entry for info in infos for entry in info["skipped"]]
        rows = sum(len(info["rows"]) for info in infos)
        if not rows:
            reason = f", the first because {skipped[0]['reason']}" if skipped else ""
            raise UsageError(f"none of {len(skipped):,} rows can be used{reason}")
        if not self.ids_are_checked:
            blocks, dropped = self._each_id_once(blocks, [info["rows"] for info in infos], schema)
            skipped += dropped
            rows -= len(dropped)
        skipped.sort(key=lambda entry: entry["row"])
        facts = replace(facts, skipped=len(skipped))
        write_skipped(self.uri, facts.build, skipped, self.storage_options)
        lance = library()
        operation = lance.LanceOperation.Overwrite(
            facts.in_metadata(schema), [one for fragments in blocks for one in fragments]
        )
        with one_writer(self.uri) as alone:
            dataset = lance.LanceDataset.commit(
                table_uri(self.uri, ITEMS),
                operation,
                storage_options=lance_options(self.storage_options),
                enable_stable_row_ids=True,
            )
            if alone:
                # What dead processes left: no other writer is there, and old versions stay.
                dataset.cleanup_old_versions(timedelta(days=36_500), delete_unverified=True)
        lost = Lost()
        for info in infos:
            lost.update(info["misfits"], info["columns"])
        return lost

    def _check_files(self, blocks: list[list]) -> None:
        """A machine that lost its power may have lost what was written last."""
        if is_address(self.uri):
            return
        folder = Path(table_uri(self.uri, ITEMS)) / "data"
        for fragment in (one for fragments in blocks for one in fragments):
            for file in fragment.files:
                size = file.file_size_bytes
                if not (folder / file.path).is_file() or (size and (folder / file.path).stat().st_size != size):
                    raise UsageError(
                        f"{folder / file.path} is damaged or gone: remove the folder {self.parts_dir} and build again"
                    )

    def _each_id_once(
        self, blocks: list[list], numbers: list[list[int]], schema: pa.Schema
    ) -> tuple[list[list], list[dict]]:
        """Find ids that come twice; the blocks with the first of each, and what was dropped.

        Raises:
            UsageError: there are some, and they are an error.
        """
        ids = [self._read(fragments, [ID]).column(ID) for fragments in blocks]
        chunks = [chunk for column in ids for chunk in column.chunks]
        counts = pc.value_counts(pa.chunked_array(chunks, schema.field(ID).type))
        twice = set(counts.field("values").filter(pc.greater(counts.field("counts"), 1)).to_pylist())
        if not twice:
            return blocks, []
        if self.duplicates == "error":
            raise UsageError(self._told_twice(sorted(twice)))
        seen, kept_blocks, dropped = set(), [], []
        for fragments, column, rows in zip(blocks, ids, numbers, strict=True):
            keep = []
            for value, row in zip(column.to_pylist(), rows, strict=True):
                keep.append(value not in seen)
                if not keep[-1]:
                    dropped.append({"row": row, "name": str(value), "reason": "the id comes twice"})
                elif value in twice:
                    seen.add(value)
            if not all(keep):
                fragments = self._fragments(self._read(fragments, None).filter(pa.array(keep)), schema)
            kept_blocks.append(fragments)
        return kept_blocks, dropped

    def _read(self, fragments: list, columns: list[str] | None) -> pa.Table:
        """Columns of fragments that are not committed yet."""
        from lance.file import LanceFileReader

        tables = [pa.table({ID: pa.array([], self.kept.id_type)})] if not fragments else []
        for file in (file for fragment in fragments for file in fragment.files):
            path = f"{table_uri(self.uri, ITEMS)}/data/{file.path}"
            tables.append(
                LanceFileReader(path, lance_options(self.storage_options), columns).read_all(batch_size=64).to_table()
            )
        return pa.concat_tables(tables)

    def _tidy_up(self) -> None:
        """After the commit: few large fragments, and an index on the ids, for changes by id."""
        compact(self.uri, self.storage_options)

        def complete() -> None:
            dataset = open_dataset(self.uri, storage_options=self.storage_options)
            if ID not in indexed_columns(dataset):
                dataset.create_scalar_index(ID, "BTREE")
            if self.kind == "image" and dataset.config().get(PHOTO_ROOT) != photo_root(self.source):
                dataset.update_config({PHOTO_ROOT: photo_root(self.source)})

        changed(complete)
        remove_skipped_of_others(self.uri, self.storage_options)


def check_options(
    kind: str,
    thumbnails: bool | int,
    store_tokens: bool,
    batch_size: int,
    unit_size: int,
    duplicates: str,
    num_workers: int,
    flag: FromTool = in_python,
) -> None:
    """Raises UsageError for options of `Build` that can't be, without opening anything."""
    for name, value, choices in (("kind", kind, KINDS), ("duplicates", duplicates, DUPLICATES)):
        if value not in choices:
            raise UsageError(f"{flag(name)} is {value!r}: choose one of {', '.join(choices)}")
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("unit_size", unit_size, 1),
        ("num_workers", num_workers, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UsageError(f"{flag(name)} is {value!r}: give a whole number of at least {least}")
    is_side = isinstance(thumbnails, int) and 16 <= thumbnails <= LARGEST_THUMBNAIL
    if not (isinstance(thumbnails, bool) or is_side):
        raise UsageError(
            f"{flag('thumbnails')} is {thumbnails!r}: give the longest side, 16 to {LARGEST_THUMBNAIL} pixels"
        )
    if kind == "text" and (store_tokens or thumbnails):
        name, what = ("store_tokens", "image tokens") if store_tokens else ("thumbnails", "thumbnails")
        raise UsageError(f"{flag(name)}: titles have no {what}, leave it out")


def check_place(
    uri: str, overwrite: bool, storage_options: Mapping[str, Any] | None, flag: FromTool = in_python
) -> None:
    """Look whether a gallery may be built there.

    Raises:
        UsageError: the place holds something else, or a gallery that is not to be replaced.
    """
    if not is_address(uri):
        _refuse_something_else(Path(uri))
    if not overwrite and table_exists(uri, storage_options=storage_options):
        raise UsageError(
            f"{uri} holds a gallery: give a new place ({flag('uri')}), put rows into it ({flag('upsert')}), or "
            f"{flag('overwrite', True)} to replace it"
        )


def _refuse_something_else(folder: Path) -> None:
    if not os.path.isdir(folder):
        there = next(place for place in (folder, *folder.parents) if os.path.exists(place))
        if not os.path.isdir(there):
            raise UsageError(f"{there} is a file: give a folder, in another place")
        return
    ours = (f"{ITEMS}.lance", f"{SKIPPED}.lance", BUILD)
    found = [path.name for path in folder.iterdir() if path.name != WRITER_LOCK and not path.name.startswith(OWNER)]
    if "gallery.json" in found:
        raise UsageError(f"{folder} holds a gallery of version 0.1, in another format: give a new folder")
    if found and not any(name in found for name in ours):
        raise UsageError(f"{folder} holds something else than a gallery: give a new or an empty folder")


def _parts_dir(uri: str) -> Path:
    if not is_address(uri):
        return Path(uri) / BUILD
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "aliblip" / "galleries" / _digest(uri)


def _digest(uri: str) -> str:
    return hashlib.blake2b(uri.encode(), digest_size=8).hexdigest()


# --- rows of a table --------------------------------------------------------------------------------------------------


def photo_root(source: Source) -> str:
    """The folder that the relative paths of its photos are of."""
    return str(Path(source.folder or ".").absolute())


def collator_of(processor, kind: str, thumbnail_side: int | None) -> Collator:
    """What makes batches of the rows of a gallery."""
    return Collator(
        processor,
        sides="images" if kind == "image" else "titles",
        describe=True,
        others_as_text=False,
        thumbnail_side=thumbnail_side,
    )


def _on_the_cpu(unit: EmbeddedUnit) -> EmbeddedUnit:
    """A unit that keeps nothing on the model's device while its block is not complete."""
    if unit.image_tokens is not None:
        unit.image_tokens = unit.image_tokens.to(TOKEN_TYPE).cpu()
    return unit


@dataclass
class EmbeddedRows:
    """Embedded rows as the table has them.

    Attributes:
        table: of the gallery's schema.
        numbers: of the rows in the source.
        skipped: rows that were left out, as {"row", "name", "reason"}.
        lost: what of the columns is not in the table.
    """

    table: pa.Table
    numbers: list[int]
    skipped: list[dict]
    lost: Lost


def embedded_rows(
    units: Sequence[EmbeddedUnit], kept: KeptColumns, schema: pa.Schema, facts: Facts, root: str | None
) -> EmbeddedRows:
    """Embedded units as rows of the table.

    Args:
        root: the folder that paths of photos in it are kept relative to.

    Raises:
        UsageError: vectors that are not finite, an id of another type.
    """
    rows, tables = EmbeddedRows(schema.empty_table(), [], [], Lost()), []
    for unit in units:
        unit.paths = [_stored_path(path, root, rows.lost) for path in unit.paths]
        rows.skipped += [{name: entry[name] for name in ("row", "name", "reason")} for entry in unit.skipped]
        unit.others = unit.others or [{}] * len(unit)
        numbers = unit.rows.tolist()
        ids = [kept.id_of(*of_row) for of_row in zip(numbers, unit.names, unit.others, strict=True)]
        chosen = [place for place, value in enumerate(ids) if value is not None]
        for place in range(len(ids)):
            if ids[place] is None:
                rows.skipped.append({"row": numbers[place], "name": unit.names[place], "reason": "the id is null"})
        if chosen:
            rows.numbers += [numbers[place] for place in chosen]
            tables.append(_unit_table(unit, chosen, [ids[place] for place in chosen], kept, schema, facts, rows.lost))
    if tables:
        rows.table = pa.concat_tables(tables)
    return rows


def _unit_table(
    unit: EmbeddedUnit, chosen: list[int], ids: list, kept: KeptColumns, schema: pa.Schema, facts: Facts, lost: Lost
) -> pa.Table:
    def taken(values: Sequence | Tensor) -> Any:
        if len(chosen) == len(unit):
            return values
        return values[chosen] if isinstance(values, Tensor) else [values[place] for place in chosen]

    of_photos = facts.kind == "image"  # whose rows may share one
    embeds = unit.image_embeds[unit.photo] if of_photos else unit.text_embeds
    columns = kept.columns(schema, taken(unit.others), lost)
    columns[ID] = pa.array(ids, schema.field(ID).type)
    columns[VECTOR] = vector_column(taken(embeds), schema)
    if PATH in schema.names and of_photos:
        columns[PATH] = pa.array(taken(unit.paths), pa.string())
    if facts.kind == "text":
        columns[TEXT] = pa.array(taken(unit.texts), pa.string())
    if facts.thumbnail_side is not None:
        columns[THUMBNAIL] = pa.array(taken(unit.thumbnails), pa.binary())
    for name in schema.names:  # somebody else's, of which no row knows
        columns.setdefault(name, pa.nulls(len(chosen), schema.field(name).type))
    if facts.token_shape is not None:
        bits = taken(unit.image_tokens[unit.photo]).contiguous().view(torch.int16).numpy().reshape(-1)
        columns[TOKENS] = pa.FixedSizeListArray.from_arrays(pa.array(bits), schema.field(TOKENS).type.list_size)
    return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)


def vector_column(vectors: Tensor, schema: pa.Schema) -> pa.Array:
    """(n, E) fp32 as a column.

    Raises:
        UsageError: values that are not finite.
    """
    if not is_finite(vectors):
        raise UsageError("the vectors are not all finite: the model's weights or its precision are broken")
    return pa.FixedSizeListArray.from_arrays(
        pa.array(vectors.contiguous().numpy().reshape(-1)), schema.field(VECTOR).type.list_size
    )


def _stored_path(path: str | None, root: str | None, lost: Lost) -> str | None:
    """A photo's path as the table has it: relative to the data's folder where it lies in there."""
    if path is None or "://" in path or root is None:
        return path
    if printable(path) != path:  # a name that is no text; the photo can't be found again by another one
        lost.misfits[PATH] += 1
        return None
    relative = os.path.relpath(os.path.abspath(path), root)
    if relative.startswith(os.pardir):
        return os.path.abspath(path)
    return path if os.path.isabs(path) and root == os.getcwd() else relative


# --- rows that were left out ------------------------------------------------------------------------------------------


def write_skipped(uri: str, build: str, skipped: Sequence[Mapping], storage_options: Mapping | None) -> None:
    """List them under the build, in place of what a start before this one has listed."""
    lance = library()
    rows = [{"build": build, **{name: entry[name] for name in ("row", "name", "reason")}} for entry in skipped]
    if table_exists(uri, SKIPPED, storage_options):
        open_dataset(uri, SKIPPED, storage_options=storage_options).delete(f"build = '{build}'")
    if rows:
        mode = "append" if table_exists(uri, SKIPPED, storage_options) else "create"
        table = pa.Table.from_pylist(rows, _SKIPPED_SCHEMA)
        lance.write_dataset(table, table_uri(uri, SKIPPED), mode=mode, storage_options=lance_options(storage_options))


def read_skipped(uri: str, build: str, storage_options: Mapping | None) -> list[dict]:
    """{"row", "name", "reason"} of the rows that a build left out, in their order."""
    if not table_exists(uri, SKIPPED, storage_options):
        return []
    dataset = open_dataset(uri, SKIPPED, storage_options=storage_options)
    rows = dataset.to_table(columns=["row", "name", "reason"], filter=f"build = '{build}'")
    return rows.to_pylist()


def remove_skipped_of_others(uri: str, storage_options: Mapping | None) -> None:
    """Drop the lists of builds that were replaced."""
    if table_exists(uri, SKIPPED, storage_options):
        facts = Facts.of(open_dataset(uri, storage_options=storage_options).schema, uri)
        dataset = open_dataset(uri, SKIPPED, storage_options=storage_options)
        if dataset.count_rows(f"build != '{facts.build}'"):
            dataset.delete(f"build != '{facts.build}'")


def compact(uri: str, storage_options: Mapping | None) -> None:
    """Join small fragments, as far as the size of the rows allows."""

    def joined() -> None:
        dataset = open_dataset(uri, storage_options=storage_options)
        fragments = dataset.get_fragments()
        rows = dataset.count_rows()
        if len(fragments) < 2 and not any(one.num_deletions for one in fragments):
            return
        size = max(bytes_of(dataset) // max(rows, 1), 1)
        dataset.optimize.compact_files(
            target_rows_per_fragment=int(min(max(FRAGMENT_BYTES // size, 64), FRAGMENT_ROWS)),
            batch_size=int(min(max(BATCH_BYTES // size, 16), 8192)),
        )

    try:
        changed(joined, tries=3)
    except (OSError, RuntimeError, ValueError) as error:
        if not is_conflict(error):
            raise
        with one_writer(uri):  # which keeps the others waiting
            changed(joined)


def bytes_of(dataset) -> int:
    """Of the data files of a table's version."""
    return sum(file.file_size_bytes or 0 for one in dataset.get_fragments() for file in one.metadata.files)
