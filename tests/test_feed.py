"""Batches go to the device one ahead, and nothing about them changes by it."""

from __future__ import annotations

import pytest
import tiny
import torch
from pretended import DEVICE, PretendedDevice

from aliblip.training.feed import Feed


def batches(count: int, read: list[int], fails_at: int | None = None):
    for number in range(count):
        read.append(number)
        if number == fails_at:
            raise ValueError("broken on purpose")
        of_host = {"row": torch.tensor([number] * 3), "skipped": [{"row": number}]}
        yield {**tiny.batch(3, seed=number), "photo_id": torch.arange(3), **of_host}


def test_on_a_cpu_a_batch_is_read_when_it_is_taken():
    read = []
    feed = Feed(batches(2, read), torch.device("cpu"))
    for number in range(2):
        feed.fetch()
        assert read == list(range(number))
        batch, expected = feed.take(), tiny.batch(3, seed=number)
        assert all(torch.equal(batch[name], value) for name, value in expected.items())
        assert batch["title_lengths"] == expected["attention_mask"].sum(1).tolist()
        assert batch["row"].tolist() == [number] * 3 and batch["skipped"] == [{"row": number}]
    with pytest.raises(StopIteration):
        feed.take()


def test_on_a_gpu_the_next_batch_is_there_before_it_is_taken():
    read = []
    with PretendedDevice() as device:
        feed = Feed(batches(3, read), DEVICE)
        for number in range(3):
            batch = feed.take()
            feed.fetch()
            feed.fetch()  # one ahead, and no more
            assert read == list(range(min(number + 2, 3)))
            assert all(batch[name].device == DEVICE for name in ("pixel_values", "product_id", "photo_id"))
            assert batch["row"].device.type == "cpu"
        assert device.waits.total() == 0
        assert torch.equal(batch["pixel_values"].cpu(), tiny.batch(3, seed=2)["pixel_values"])
        with pytest.raises(StopIteration):
            feed.take()


def test_what_fails_while_fetching_is_raised_when_it_is_taken():
    read = []
    with PretendedDevice():
        feed = Feed(batches(3, read, fails_at=1), DEVICE)
        feed.take()
        feed.fetch()
        assert read == [0, 1]
        with pytest.raises(ValueError, match="broken on purpose"):
            feed.take()
