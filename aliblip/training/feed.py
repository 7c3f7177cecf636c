"""Batches on their way from the loader to the device.

feed = Feed(loader.batches(start, stop), device)
batch = feed.take()
...give the device its work...
feed.fetch()  # the next one is copied while the device works
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

from aliblip.training.profiling import READ, record_function

ON_DEVICE = ("pixel_values", "input_ids", "attention_mask", "product_id", "photo_id")


class Feed:
    """The batches of a run, where they are computed with.

    On a GPU a batch can be fetched ahead: it is copied from pinned memory on a stream of its own, while the device
    computes. On a CPU there is nothing to copy, and a batch is read when it is taken.

    Args:
        batches: from the loader, in pinned memory where there is a GPU.
        device: where the tensors of `ON_DEVICE` go. What the host alone asks for stays: `row`, `skipped`, and
            `title_lengths`, the tokens of each title.
    """

    def __init__(self, batches: Iterator[dict[str, Any]], device: torch.device):
        self.batches = batches
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.waited = 0.0  # seconds that the batch taken last was waited for
        self._ahead: tuple[dict[str, Any] | Exception, float] | None = None

    def fetch(self) -> None:
        """Read the next batch and begin its copy. What goes wrong is raised when the batch is taken: the step before is
        brought to its end first."""
        if self.stream is None or self._ahead is not None:
            return
        start = time.perf_counter()
        try:
            with torch.cuda.stream(self.stream):
                fetched = self._read()
        except Exception as error:
            fetched = error
        self._ahead = (fetched, time.perf_counter() - start)

    def take(self) -> dict[str, Any]:
        """The next batch.

        Raises:
            StopIteration: there is none.
        """
        self.fetch()
        if self._ahead is None:
            start = time.perf_counter()
            batch = self._read()
            self.waited = time.perf_counter() - start
            return batch
        (batch, self.waited), self._ahead = self._ahead, None
        if isinstance(batch, Exception):
            raise batch
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self.stream)
        for name in ON_DEVICE:
            batch[name].record_stream(computing)  # its memory is not given away while the device computes with it
        return batch

    @record_function(READ)
    def _read(self) -> dict[str, Any]:
        batch = next(self.batches)
        title_lengths = batch["attention_mask"].sum(dim=1).tolist()
        moved = {name: batch[name].to(self.device, non_blocking=True) for name in ON_DEVICE}
        return {**batch, **moved, "title_lengths": title_lengths}


__all__ = ["Feed"]
