"""The one way to embed a source: in units of rows, so that a second start does only what is left.

    with undisturbed(model):
        for unit in embedded_units(model, loader, todo):           # the units of this process that are still to do
            write(unit.number, unit.rows, unit.image_embeds)

    photos, titles, resumed = embed(model, loader, parts=parts)    # both sides of an evaluation, on all ranks

A unit is a fixed range of rows (see `EvalLoader`) and is computed whole by one process. What is computed together,
padding included, therefore depends neither on the number of processes nor on what an earlier start had finished.

Legend: n usable rows of a unit, E embedding, P image tokens, D width, L text tokens.
"""

import contextlib
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
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

logger = logging.getLogger(__name__)

_TENSORS = ("rows", "product_id", "image_embeds", "text_embeds", "input_ids", "attention_mask")
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
        image_embeds, text_embeds: (n, E) fp32 of length 1; None: that side was not asked for, or no row is usable.
        image_tokens: (n, P, D) in the type of the pass; None as above, and in a unit read from a part.
        input_ids, attention_mask: (n, L) int64, L that of the unit's longest title; None as `text_embeds`.
        skipped: the unusable rows as {"row", "name", "reason"}.
        names, texts, others, paths, thumbnails: of the usable rows, as the collator describes them; empty if it does
            not, and the last two in a unit read from a part.
    """

    number: int
    rows: Tensor
    product_id: Tensor
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
    """
    if any(module.training for module in model.modules()):
        raise ValueError("the model is in training mode, where dropout changes what it sees: use undisturbed(model)")
    for number, batch in unit_bar(loader.units(units), len(units), f"embedding {what}", progress):
        lists = {name: batch[key] for key, name in (_LISTS | _OF_BATCHES).items() if key in batch}
        unit = EmbeddedUnit(number, batch["row"], batch["product_id"], **lists)
        if len(unit) and "pixel_values" in batch:
            embeds, unit.image_tokens = engine.embed_images(model, batch["pixel_values"], dtype)
            unit.image_embeds = embeds.cpu()
        if len(unit) and "input_ids" in batch:
            unit.input_ids, unit.attention_mask = batch["input_ids"], batch["attention_mask"]
            unit.text_embeds = engine.embed_texts(model, unit.input_ids, unit.attention_mask, dtype).cpu()
        yield unit


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


class TokenMemory:
    """Image tokens of this process's units between the stages: on the device while they fit, then in host memory.

    Args:
        host_limit: bytes of host memory that they may fill.
        device_limit: bytes of the device.
    """

    def __init__(self, host_limit: float, device_limit: float = 0.0):
        self.host_limit, self.device_limit = host_limit, device_limit
        self.host_bytes, self.device_bytes, self.all_bytes, self.units = 0, 0, 0, 0
        self._kept: dict[int, Tensor] = {}

    def offer(self, unit: int, tokens: Tensor) -> None:
        """Keep the tokens of a unit, if there is room."""
        size = tokens.numel() * tokens.element_size()
        self.units += 1
        self.all_bytes += size
        if tokens.device.type != "cpu" and self.device_bytes + size <= self.device_limit:
            self._kept[unit] = tokens
            self.device_bytes += size
        elif self.host_bytes + size <= self.host_limit:
            self._kept[unit] = tokens.cpu()
            self.host_bytes += size

    def take(self, unit: int) -> Tensor | None:
        """The tokens of a unit, which are no longer kept then; None: they are not there."""
        return self._kept.pop(unit, None)

    def tell(self) -> None:
        """Say how many units' tokens are kept, and where."""
        whole = len(self._kept) == self.units
        logger.info(
            "image tokens of %d of %d units of this process stay (%.2f GB of %.2f on the device, %.2f in host memory, "
            "at most %g and %g GB); %s",
            len(self._kept),
            self.units,
            self.device_bytes / 1e9,
            self.all_bytes / 1e9,
            self.host_bytes / 1e9,
            self.device_limit / 1e9,
            self.host_limit / 1e9,
            "nothing is encoded twice" if whole else "the others are read and encoded again to re-rank",
        )


def embed(
    model,
    loader,
    queries=None,
    *,
    dtype: torch.dtype | None,
    memory: TokenMemory,
    parts: Parts | None,
    progress: bool,
) -> tuple[Side, Side, int]:
    """Embed the photos and titles of one table, or the photos of one source and the titles of another (collective).

    Args:
        loader: an `EvalLoader` of photos and titles or, with `queries`, of photos.
        queries: an `EvalLoader` of titles, or None.
        dtype: as in `embedded_units`.
        memory: gets the image tokens of this process's units.
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
        images, titles = _side(units, "image_embeds"), _side(units, "text_embeds")
        titles.skipped, titles.others = images.skipped, images.others
    else:
        units, resumed = _embed_side(model, loader, "photos", dtype, memory, parts, progress)
        images = _side(units, "image_embeds")
        units, again = _embed_side(model, queries, "titles", dtype, memory, parts, progress)
        titles, resumed = _side(units, "text_embeds"), resumed + again
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
                memory.offer(unit.number, unit.image_tokens)
            stage.add(unit.number, *unit.as_part())
            results.append((unit.number, _plain(unit)))
    return gather_units("embedding", results, loader.num_units), len(done)  # collective


def _plain(unit: EmbeddedUnit) -> dict[str, Any]:
    # as arrays: a pickled tensor may drag along the whole storage that it is a view of
    tensors, lists = unit.as_part()
    return {key: value.numpy() for key, value in tensors.items()} | lists


def _side(units: list[dict], embeds: str) -> Side:
    """The photos or the titles (by the name of their embeddings) of all units."""
    skipped = [row for unit in units for row in unit["skipped"]]
    usable = [unit for unit in units if len(unit["rows"])]
    if not usable:
        reason = f"; the first: row {skipped[0]['row']}, {skipped[0]['reason']}" if skipped else ""
        raise UsageError(f"none of the {len(skipped)} rows is usable{reason}")

    def joined(key: str) -> Tensor:
        # Cloned into torch's own memory: NumPy aligns its arrays by chance, and matrix products depend on it in the
        # last digit.
        return torch.from_numpy(np.concatenate([unit[key] for unit in usable])).clone()

    rows = joined("rows")
    if not (rows[1:] > rows[:-1]).all():
        raise RuntimeError("the gathered rows are not in source order: a row was embedded twice")
    side = Side(
        rows=rows,
        product_id=joined("product_id"),
        embeds=joined(embeds),
        first=np.cumsum([0] + [len(unit["rows"]) for unit in units]).tolist(),
        skipped=skipped,
        names=[name for unit in usable for name in unit["name"]],
        texts=[text for unit in usable for text in unit["text"]],
        others=[others for unit in usable for others in unit["others"]],
    )
    if embeds == "text_embeds":
        longest = max(unit["input_ids"].shape[1] for unit in usable)
        for key in ("input_ids", "attention_mask"):
            padded = [np.pad(unit[key], ((0, 0), (0, longest - unit[key].shape[1]))) for unit in usable]
            setattr(side, key, torch.from_numpy(np.concatenate(padded)))
    return side


__all__ = ["EmbeddedUnit", "TokenMemory", "embed", "embedded_units", "undisturbed"]
