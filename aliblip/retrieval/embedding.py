"""The one way to embed a source: in units of rows, so that a second start does only what is left.

    with undisturbed(model):
        for unit in embedded_units(model, loader, todo):           # the units of this process that are still to do
            write(unit.number, unit.rows, unit.image_embeds)

    photos, titles, resumed = embed(model, loader, parts=parts)    # both sides of an evaluation, on all ranks

A unit is a fixed range of rows (see `EvalLoader`) and is computed whole by one process. What is computed together,
padding included, therefore depends neither on the number of processes nor on what an earlier start had finished.

A photo that several rows of a unit name, or copies of it, is encoded once; the same photo in another unit is found
when all units are put together.

Legend: n usable rows of a unit, m different photos of these, E embedding, P image tokens, D width, L text tokens.
"""

import contextlib
import logging
import random
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import retrieval_aliblip as engine
from aliblip.retrieval.rankings import Side
from aliblip.runtime.distributed import is_main
from aliblip.runtime.mistakes import UsageError
from aliblip.runtime.parts import Parts, stage_of
from aliblip.runtime.units import gather_units, own_units, unit_bar
from encoder_aliblip import cause_of, is_finite

logger = logging.getLogger(__name__)

_TENSORS = ("rows", "product_id", "photo_id", "photo", "image_embeds", "text_embeds", "input_ids", "attention_mask")
# Names in a part and in a batch of the collator -> fields of a unit.
_LISTS = {"skipped": "skipped", "name": "names", "text": "texts", "others": "others"}
# The same, of what a part does not keep.
_OF_BATCHES = {"path": "paths", "thumbnail": "thumbnails"}


@dataclass
class EmbeddedUnit:
    """The rows of one unit, embedded. Tensors are on the CPU, the image tokens on the model's device.

    Attributes:
        number: of the unit.
        rows: (n,) int64, the usable source rows, rising; a unit may have none.
        product_id: (n,) int64.
        photo_id: (n,) int64, equal for equal photos; None: no photos were asked for.
        photo: (n,) int64, which of the m photos is that of a row; None as above.
        image_embeds: (m, E) fp32 of length 1; None: no photos were asked for, or no row is usable.
        text_embeds: (n, E) likewise, of the titles.
        image_tokens: (m, P, D) in the type of the pass; None as above, and in a unit read from a part.
        input_ids, attention_mask: (n, L) int64, L that of the unit's longest title; None as `text_embeds`.
        skipped: the unusable rows as {"row", "name", "reason"}.
        names, texts, others, paths, thumbnails: of the usable rows, as the collator describes them; empty if it does
            not, and the last two in a unit read from a part.
    """

    number: int
    rows: Tensor
    product_id: Tensor
    photo_id: Tensor | None = None
    photo: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    image_tokens: Tensor | None = None
    input_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    skipped: list[dict[str, Any]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    others: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str | None] = field(default_factory=list)
    thumbnails: list[bytes] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def as_part(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors, and what JSON can hold, as `Stage.add` takes them. Image tokens are left out."""
        tensors = {name: getattr(self, name) for name in _TENSORS}
        lists = {key: getattr(self, name) for key, name in _LISTS.items()}
        return {name: value for name, value in tensors.items() if value is not None}, lists

    @classmethod
    def from_part(cls, number: int, tensors: dict[str, Tensor], info: dict[str, Any]) -> "EmbeddedUnit":
        """The unit that `as_part` gave."""
        return cls(number, **tensors, **{name: info[key] for key, name in _LISTS.items() if key in info})


@torch.no_grad()
def embedded_units(
    model,
    loader,
    units: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    progress: bool = False,
    what: str = "rows",
) -> Iterator[EmbeddedUnit]:
    """Embed units of a loader, in the given order: the photos, the titles or both, as the loader's collator has them.

    Args:
        model: the plain model (unwrapped), in evaluation mode; see `undisturbed`.
        loader: an `EvalLoader`.
        units: numbers of units, as a rule those of this process that no earlier start has finished.
        dtype: type of the autocast of the passes; None: the type of the weights.
        progress: show a progress bar on the main process.
        what: is embedded, for that bar.

    Raises:
        ValueError: the model, or a module of it, is in training mode.
        UsageError: as `embed_batch`.
    """
    if any(module.training for module in model.modules()):
        raise ValueError("the model is in training mode, where dropout changes what it sees: use undisturbed(model)")
    for number, batch in unit_bar(loader.units(units), len(units), f"embedding {what}", progress):
        yield embed_batch(model, number, batch, dtype)


def encode_photos(model, batch: dict[str, Any], dtype: torch.dtype | None) -> tuple[Tensor, "UnitTokens"]:
    """The features (m, E) of the different photos of a batch, and their tokens, both on the model's device."""
    first, photo = first_of_each(batch["photo_id"].tolist())
    pixel_values = batch["pixel_values"] if len(first) == len(photo) else batch["pixel_values"][first]
    embeds, tokens = engine.embed_images(model, pixel_values, dtype)
    return embeds, UnitTokens(batch["row"], batch["photo_id"], photo, tokens)


@torch.no_grad()
def embed_batch(model, number: int, batch: dict[str, Any], dtype: torch.dtype | None) -> EmbeddedUnit:
    """Embed a batch of the loader, as the unit of that number.

    Raises:
        UsageError: features that are not finite; the message has the row and the weights that are not.
    """
    lists = {name: batch[key] for key, name in (_LISTS | _OF_BATCHES).items() if key in batch}
    unit = EmbeddedUnit(number, batch["row"], batch["product_id"], **lists)
    if "photo_id" in batch:
        unit.photo_id = unit.photo = batch["photo_id"]  # of no rows, if there are none
        if len(unit):
            embeds, tokens = encode_photos(model, batch, dtype)
            unit.photo, unit.image_tokens, unit.image_embeds = tokens.photo, tokens.tokens, embeds.cpu()
            _require_finite(model, unit, unit.image_embeds[unit.photo], "photo")
    if len(unit) and "input_ids" in batch:
        unit.input_ids, unit.attention_mask = batch["input_ids"], batch["attention_mask"]
        unit.text_embeds = engine.embed_texts(model, unit.input_ids, unit.attention_mask, dtype).cpu()
        _require_finite(model, unit, unit.text_embeds, "title")
    return unit


def _require_finite(model, unit: EmbeddedUnit, embeds: Tensor, what: str) -> None:
    if is_finite(embeds):
        return
    place = int((~embeds.isfinite().all(dim=1)).nonzero()[0])
    row = int(unit.rows[place])
    named = f" ({unit.names[place]})" if unit.names and unit.names[place] != f"row {row}" else ""
    raise UsageError(f"the features of the {what} of row {row}{named} are not finite: {cause_of(model)}")


def first_of_each(keys: Sequence[Hashable]) -> tuple[Tensor, Tensor]:
    """Where each of the different keys comes first, rising, and for every key its number among them."""
    numbers: dict[Hashable, int] = {}
    of_key = [numbers.setdefault(key, len(numbers)) for key in keys]
    first = dict(zip(reversed(of_key), reversed(range(len(keys)))))  # noqa: B905  (as long as each other)
    places = [first[number] for number in range(len(numbers))]
    return torch.tensor(places, dtype=torch.int64), torch.tensor(of_key, dtype=torch.int64)


@contextlib.contextmanager
def undisturbed(model) -> Iterator[None]:
    """Evaluation mode inside; modes of all modules and all random states afterwards as before."""
    training = [module for module in model.modules() if module.training]
    states = random.getstate(), np.random.get_state()
    device = next(model.parameters()).device
    # The iterator of a DataLoader draws from torch's generator. Only the own device: naming another one would occupy
    # it.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            model.eval()
            yield
        finally:
            for module in training:
                module.training = True
            random.setstate(states[0])
            np.random.set_state(states[1])


# --- both sides of an evaluation --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UnitTokens:
    """The image tokens of a unit: `rows` (n,) and `photo_id` (n,), `photo` (n,) of each row, `tokens` (m, P, D)."""

    rows: Tensor
    photo_id: Tensor
    photo: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, unit: EmbeddedUnit) -> "UnitTokens":
        return cls(unit.rows, unit.photo_id, unit.photo, unit.image_tokens)

    def of_photos(self, rows: Tensor, photo_id: Tensor) -> Tensor | None:
        """The tokens of the photos of some rows, which are these photos; None: the unit has no such rows."""
        place = torch.searchsorted(self.rows, rows).clamp(max=max(len(self.rows) - 1, 0))
        if not len(self.rows) or not torch.equal(self.rows[place], rows):
            return None
        if not torch.equal(self.photo_id[place], photo_id):
            return None
        photo = self.photo[place]
        if torch.equal(photo, torch.arange(len(self.tokens))):
            return self.tokens
        if self.tokens.device.type == "cuda":
            photo = photo.pin_memory()  # or its copy would wait for the device
        return self.tokens[photo.to(self.tokens.device, non_blocking=True)]


class TokenMemory:
    """Image tokens of this process's units between the stages: on the device while they fit, then in host memory.

    Args:
        host_limit: bytes of host memory that they may fill.
        device_limit: bytes of the device.
    """

    def __init__(self, host_limit: float, device_limit: float = 0.0):
        self.host_limit, self.device_limit = host_limit, device_limit
        self.host_bytes, self.device_bytes, self.all_bytes, self.units = 0, 0, 0, 0
        self._kept: dict[int, UnitTokens] = {}

    def offer(self, unit: EmbeddedUnit) -> None:
        """Keep the tokens of a unit, if there is room."""
        tokens = unit.image_tokens
        size = tokens.numel() * tokens.element_size()
        self.units += 1
        self.all_bytes += size
        if tokens.device.type != "cpu" and self.device_bytes + size <= self.device_limit:
            self._kept[unit.number] = UnitTokens.of(unit)
            self.device_bytes += size
        elif self.host_bytes + size <= self.host_limit:
            self._kept[unit.number] = replace(UnitTokens.of(unit), tokens=tokens.cpu())
            self.host_bytes += size

    def take(self, unit: int) -> UnitTokens | None:
        """The tokens of a unit, which are no longer kept then; None: they are not there."""
        return self._kept.pop(unit, None)

    def tell(self) -> None:
        """Say how many units' tokens are kept, and where."""
        places = [("in host memory", self.host_bytes, self.host_limit)]
        if self.device_limit:
            places.insert(0, ("on the device", self.device_bytes, self.device_limit))
        kept = ", ".join(f"{held / 1e9:.2f} GB {place} (at most {limit / 1e9:.3g})" for place, held, limit in places)
        logger.info(
            "image tokens of %d of %d units of this process stay, %.2f GB: %s; %s",
            len(self._kept),
            self.units,
            self.all_bytes / 1e9,
            kept,
            "nothing is encoded twice"
            if len(self._kept) == self.units
            else "the others are read and encoded again to re-rank",
        )


def embed(
    model,
    loader,
    queries=None,
    *,
    dtype: torch.dtype | None,
    memory: TokenMemory,
    photos_by_name: bool,
    parts: Parts | None,
    progress: bool,
) -> tuple[Side, Side, int]:
    """Embed the photos and titles of one table, or the photos of one source and the titles of another (collective).

    Args:
        loader: an `EvalLoader` of photos and titles or, with `queries`, of photos.
        queries: an `EvalLoader` of titles, or None.
        dtype: as in `embedded_units`.
        memory: gets the image tokens of this process's units.
        photos_by_name: whether copies of a photo under several names are several photos.
        parts: where finished units are kept and found; None: nowhere.
        progress: as in `embedded_units`.

    Returns:
        Photos and titles on all ranks, and the units of this rank that an earlier start had finished.

    Raises:
        UsageError: no row is usable.
        RuntimeError: a unit was lost or done twice.
    """
    if queries is None:
        units, resumed = _embed_side(model, loader, "rows", dtype, memory, parts, progress)
        (images, photo_of_row), titles = _photos(units, photos_by_name), _titles(units)
        titles.skipped = images.skipped
        if loader.source.selected.product_id is None:  # then a photo is a product
            titles.product_id, images.further = images.product_id[photo_of_row], None
    else:
        units, resumed = _embed_side(model, loader, "photos", dtype, memory, parts, progress)
        images, _ = _photos(units, photos_by_name)
        units, again = _embed_side(model, queries, "titles", dtype, memory, parts, progress)
        titles, resumed = _titles(units), resumed + again
    if is_main():
        memory.tell()
    return images, titles, resumed


def _embed_side(
    model, loader, what: str, dtype, memory: TokenMemory, parts: Parts | None, progress: bool
) -> tuple[list[dict], int]:
    """Tensors (as arrays) and descriptions of all units of a loader, in unit order, on all ranks."""
    own = own_units(loader.num_units)
    with stage_of(parts, f"embed-{what}") as stage:  # collective
        done = [unit for unit in own if unit in stage]
        results = [(unit, _plain(EmbeddedUnit.from_part(unit, *stage.load(unit)))) for unit in done]
        todo = [unit for unit in own if unit not in stage]
        for unit in embedded_units(model, loader, todo, dtype=dtype, progress=progress, what=what):
            if unit.image_tokens is not None:
                memory.offer(unit)
            stage.add(unit.number, *unit.as_part())
            results.append((unit.number, _plain(unit)))
    return gather_units("embedding", results, loader.num_units), len(done)  # collective


def _plain(unit: EmbeddedUnit) -> dict[str, Any]:
    # as arrays: a pickled tensor may drag along the whole storage that it is a view of
    tensors, lists = unit.as_part()
    return {key: value.numpy() for key, value in tensors.items()} | lists


def _titles(units: list[dict]) -> Side:
    """The titles of all units."""
    side, usable = _rows(units, "text_embeds")
    longest = max(unit["input_ids"].shape[1] for unit in usable)
    for key in ("input_ids", "attention_mask"):
        padded = [np.pad(unit[key], ((0, 0), (0, longest - unit[key].shape[1]))) for unit in usable]
        setattr(side, key, torch.from_numpy(np.concatenate(padded)))
    return side


def _photos(units: list[dict], by_name: bool) -> tuple[Side, Tensor]:
    """The different photos of all units, each by the first row that names it; and for every usable row its photo.

    Args:
        by_name: whether copies under several names are several photos.
    """
    side, usable = _rows(units, "image_embeds")
    ends = np.cumsum([0] + [len(unit["image_embeds"]) for unit in usable])
    embedded = torch.from_numpy(
        np.concatenate([unit["photo"] + end for unit, end in zip(usable, ends[:-1], strict=True)])
    )
    photo_id = _joined(usable, "photo_id")
    keys = list(zip(photo_id.tolist(), side.names, strict=True)) if by_name else photo_id.tolist()
    first, photo_of_row = first_of_each(keys)
    product_id = side.product_id[first]
    others = side.product_id != product_id[photo_of_row]
    further = torch.stack([photo_of_row[others], side.product_id[others]], dim=1).unique(dim=0)
    photos = Side(
        rows=side.rows[first],
        product_id=product_id,
        embeds=side.embeds[embedded[first]],
        first=np.searchsorted(first.numpy(), side.first).tolist(),
        skipped=side.skipped,
        **{name: [values[row] for row in first.tolist()] for name in _DESCRIBED if (values := getattr(side, name))},
        photo_id=photo_id[first],
        further=further,
    )
    if is_main() and len(photos) < len(side):
        _tell_photos(side, photos, photo_of_row)
    return photos, photo_of_row


_DESCRIBED = ("names", "texts", "others")


def _tell_photos(rows: Side, photos: Side, photo_of_row: Tensor) -> None:
    copies = ""
    if rows.names:
        firsts = [photos.names[photo] for photo in photo_of_row.tolist()]
        count = sum(name != first for name, first in zip(rows.names, firsts, strict=True))
        copies = f" ({count:,} by another name: copies)" if count else ""
    logger.info(
        "%s rows name a photo of a row before them%s: %s different photos",
        f"{len(rows) - len(photos):,}",
        copies,
        f"{len(photos):,}",
    )


def _rows(units: list[dict], embeds: str) -> tuple[Side, list[dict]]:
    """All usable rows, with the embeddings of that name as they were made; and the units that have any."""
    skipped = [row for unit in units for row in unit["skipped"]]
    usable = [unit for unit in units if len(unit["rows"])]
    if not usable:
        reason = f"; the first: row {skipped[0]['row']}, {skipped[0]['reason']}" if skipped else ""
        raise UsageError(f"none of the {len(skipped)} rows is usable{reason}")
    rows = _joined(usable, "rows")
    if not (rows[1:] > rows[:-1]).all():
        raise RuntimeError("the gathered rows are not in source order: a row was embedded twice")
    side = Side(
        rows=rows,
        product_id=_joined(usable, "product_id"),
        embeds=_joined(usable, embeds),
        first=np.cumsum([0] + [len(unit["rows"]) for unit in units]).tolist(),
        skipped=skipped,
        names=[name for unit in usable for name in unit["name"]],
        texts=[text for unit in usable for text in unit["text"]],
        others=[others for unit in usable for others in unit["others"]],
    )
    return side, usable


def _joined(units: list[dict], key: str) -> Tensor:
    # Cloned into torch's own memory: NumPy aligns its arrays by chance, and matrix products depend on it in the last
    # digit.
    return torch.from_numpy(np.concatenate([unit[key] for unit in units])).clone()


__all__ = ["EmbeddedUnit", "TokenMemory", "UnitTokens", "embed", "embedded_units", "encode_photos", "undisturbed"]
