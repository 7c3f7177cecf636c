"""Rows to batches: decode, augment, process; a row that can't be used leaves a hole, and shifts nothing.

Shapes: `B` rows, `L` tokens of the longest title, `H` side of the photos in pixels.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from aliblip.data.rows import Example, Row, decode
from aliblip.runtime.mistakes import UsageError
from reading_aliblip import UnusableItem

__all__ = ["Collator", "NoUsableRow", "Normalisation", "as_bytes", "printable", "sample_rng", "thumbnail"]

THUMBNAIL_QUALITY = 85


class NoUsableRow(UsageError):
    """No row of a batch is usable, and no spare either; the first reasons are in the message."""


def sample_rng(seed: int, epoch: int, row: int) -> random.Random:
    """The generator of one sample in one epoch, whatever rank, worker or batch it falls to."""
    digest = hashlib.blake2b(f"{seed} {epoch} {row}".encode(), digest_size=8).digest()
    return random.Random(int.from_bytes(digest, "little"))


class Collator:
    """Turns undecoded rows into a batch.

    Args:
        processor: called as `processor(images=[PIL], text=[str], return_tensors="pt", padding=True, truncation=True)`,
            returns `pixel_values`, `input_ids`, `attention_mask`.
        augment: `augment(image, rng) -> image`, a `TrainAugmentation`, or None. Its views have the processor's size,
            and stay bytes: `Normalisation` makes of them on the device what the processor would have made.
        seed: of the augmentation.
        max_length: longest title in tokens; None leaves it to the processor.
        sides: "both", or the only side that is read: "images" or "titles". The other side's tensors are absent.
        describe: whether batches that are not filled also hold what people read: `name`, `text`, `path` (of the photo,
            or its address; None where the row holds the photo itself) and `others`, lists of B values of `Row`.
        others_as_text: whether the values of `others` become text, or stay as the data has them.
        thumbnail_side: longest side, in pixels, of a small copy of each photo, which such batches then hold too:
            `thumbnail`, a list of B JPEG files in bytes. The whole photo, never enlarged; None makes none.
    """

    def __init__(
        self,
        processor: Callable[..., Any],
        augment: Callable[..., Any] | None = None,
        seed: int = 0,
        max_length: int | None = None,
        sides: str = "both",
        describe: bool = False,
        others_as_text: bool = True,
        thumbnail_side: int | None = None,
    ):
        self.processor = processor
        self.augment = augment
        self.seed = seed
        self.max_length = max_length
        self.sides = sides
        self.describe = describe
        self.others_as_text = others_as_text
        self.thumbnail_side = thumbnail_side

    def __call__(
        self,
        rows: Sequence[Row],
        epoch: int = 0,
        fill: bool = True,
        spares: Callable[[int], Iterable[Row]] | None = None,
    ) -> dict[str, Any]:
        """A batch of `rows`.

        Args:
            rows: undecoded rows.
            epoch: of the augmentation.
            fill: whether the hole of an unusable row is filled by another row (training: the batch keeps its size
                B = len(rows)), or left out (evaluation: B = usable rows, maybe 0).
            spares: `spares(slot)` gives the rows that may fill the hole in a slot; the first usable one does. None: the
                following rows of the batch, round its end.

        Returns:
            `pixel_values` (B, 3, H, H) float32, or uint8 where they are augmented, `input_ids` and `attention_mask`
            (B, L) int64, `product_id` and `row` (B,) int64, `photo_id` (B,) int64, equal for equal photos, and
            `skipped`, a list of {"row", "name", "reason"} of the rows that are not in the batch.

        Raises:
            NoUsableRow: `fill` is asked for, and neither a row nor a spare of it is usable.
        """
        skipped: list[dict[str, Any]] = []
        slots = [self._example(row, epoch, skipped) for row in rows]  # None is a hole
        usable = [index for index, example in enumerate(slots) if example is not None]
        examples = [slots[index] for index in usable]
        places = list(range(len(examples)))
        if fill and len(examples) < len(rows):
            places = self._fill(rows, slots, examples, epoch, spares, skipped)
        batch = self._process(examples)
        index = torch.tensor(places, dtype=torch.int64)
        if places != list(range(len(examples))):
            batch = {key: value[index] for key, value in batch.items()}
        batch["skipped"] = skipped
        if self.describe and not fill:
            batch |= self._description([rows[index] for index in usable], examples)
        return batch

    def _fill(self, rows, slots, examples, epoch, spares, skipped) -> list[int]:
        """The place among `examples` of each slot; those of further rows are added to them."""
        spares = spares or (lambda slot: (rows[(slot + i) % len(rows)] for i in range(1, len(rows))))
        numbers = itertools.count()
        known: dict[int, int | None] = {  # by the number of a row: its place, None of one that can't be used
            row.row: None if example is None else next(numbers) for row, example in zip(rows, slots, strict=True)
        }
        places = []
        for slot, row in enumerate(rows):
            place = known[row.row]
            candidates = iter(spares(slot)) if place is None else iter(())
            while place is None and (spare := next(candidates, None)) is not None:
                if spare.row not in known:
                    # What is wrong with it belongs to the batch that holds it, which reports it.
                    example = self._example(spare, epoch, [])
                    known[spare.row] = None if example is None else len(examples)
                    examples += [] if example is None else [example]
                place = known[spare.row]
            if place is None:
                reasons = "; ".join(f"{entry['name']}: {entry['reason']}" for entry in skipped[:3])
                raise NoUsableRow(f"none of {len(rows)} rows is usable ({reasons}): check the columns and the files")
            places.append(place)
        return places

    def _example(self, row: Row, epoch: int, skipped: list[dict[str, Any]]) -> Example | None:
        try:
            example = decode(row, self.sides, self.augment.suffices if self.augment is not None else None)
        except UnusableItem as error:
            skipped.append({"row": row.row, "name": printable(row.name), "reason": str(error)})
            return None
        if self.augment is not None:
            example.image = self.augment(example.image, sample_rng(self.seed, epoch, row.row))
        return example

    def _description(self, rows: Sequence[Row], examples: Sequence[Example]) -> dict[str, list]:
        described: dict[str, list] = {
            "name": [printable(row.name) for row in rows],
            "text": [example.text for example in examples],
            "path": [row.image if isinstance(row.image, str) else None for row in rows],
            "others": [row.others for row in rows],
        }
        if self.others_as_text:
            described["others"] = [{key: printable(str(value)) for key, value in row.others.items()} for row in rows]
        if self.thumbnail_side is not None and self.sides != "titles":
            described["thumbnail"] = [thumbnail(example.image, self.thumbnail_side) for example in examples]
        return described

    def _process(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        batch: dict[str, torch.Tensor] = {}
        images, titles = self.sides != "titles", self.sides != "images"
        bytes_stay = images and self.augment is not None and bool(examples)
        if examples:
            options: dict[str, Any] = {"padding": True, "truncation": True} if titles else {}
            if titles and self.max_length is not None:  # otherwise the processor's own longest title holds
                options["max_length"] = self.max_length
            encoded = self.processor(
                images=[example.image for example in examples] if images and not bytes_stay else None,
                text=[example.text for example in examples] if titles else None,
                return_tensors="pt",
                **options,
            )
        else:
            size = self.processor.image_processor.size
            encoded = {
                "pixel_values": torch.zeros(0, 3, size["height"], size["width"]),
                "input_ids": torch.zeros(0, 1),
                "attention_mask": torch.zeros(0, 1),
            }
        if images:
            batch["photo_id"] = torch.tensor([example.photo_id for example in examples], dtype=torch.int64)
        if bytes_stay:
            batch["pixel_values"] = as_bytes([example.image for example in examples])
        elif images:
            batch["pixel_values"] = encoded["pixel_values"].to(torch.float32)
        if titles:
            batch["input_ids"] = encoded["input_ids"].to(torch.int64)
            batch["attention_mask"] = encoded["attention_mask"].to(torch.int64)
        batch["product_id"] = torch.tensor([example.product_id for example in examples], dtype=torch.int64)
        batch["row"] = torch.tensor([example.row for example in examples], dtype=torch.int64)
        return batch


def as_bytes(photos: Sequence[Image.Image]) -> torch.Tensor:
    """RGB photos of one size as a tensor (B, 3, H, W) of uint8."""
    stacked = torch.stack([torch.from_numpy(np.array(photo)) for photo in photos])  # (B, H, W, 3)
    return stacked.permute(0, 3, 1, 2).contiguous()


class Normalisation:
    """Bytes to the pixels that a processor makes of a photo of the right size, bit by bit.

    A quarter of the bytes goes from readers to device, and the arithmetic is the device's.

    Args:
        image_processor: its `rescale_factor`, `image_mean` and `image_std` hold where `do_rescale` and `do_normalize`
            are on.
    """

    def __init__(self, image_processor: Any):
        self.scale = image_processor.rescale_factor if image_processor.do_rescale else 1.0
        # The processor multiplies in double precision. Where a division in single precision rounds to the same, it is
        # taken: a device for training is slow in double precision.
        levels = torch.arange(256, dtype=torch.uint8)
        self.divisor = float(np.float32(1.0 / self.scale))
        self.divides = torch.equal(levels / self.divisor, self._scaled(levels))
        self.mean, self.std = (
            torch.tensor(values, dtype=torch.float32).view(3, 1, 1) if image_processor.do_normalize else None
            for values in (image_processor.image_mean, image_processor.image_std)
        )

    def _scaled(self, pixels: torch.Tensor) -> torch.Tensor:
        return (pixels.double() * self.scale).to(torch.float32)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) of uint8 to float32, on their device; pixels in float32 are normalised already and stay."""
        if pixels.dtype != torch.uint8:
            return pixels
        values = pixels / self.divisor if self.divides else self._scaled(pixels)
        if self.mean is not None:
            if self.mean.device != pixels.device:
                self.mean, self.std = self.mean.to(pixels.device), self.std.to(pixels.device)
            values = values.sub_(self.mean).div_(self.std)
        return values


def thumbnail(photo: Image.Image, side: int) -> bytes:
    """A JPEG file of the whole photo, its longest side at most `side` pixels; a smaller photo keeps its size."""
    small = photo.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=THUMBNAIL_QUALITY)
    return stream.getvalue()


def printable(text: str) -> str:
    """Text that files and terminals take: that of a catalogue may hold half a surrogate pair."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
