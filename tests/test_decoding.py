"""Memory of all photos that the threads of a process decode together: one bound, however many there are."""

from __future__ import annotations

import io
import os
import sys
import threading

import pytest
from helpers import ROOT, assert_succeeded, run
from PIL import Image

import reading_aliblip
from reading_aliblip import MAX_PIXELS, UnusableItem, decoded_photo, read_photo

# Six photos of 12 megapixels with transparency: each takes 170 MB, and as much stays in the heap of each thread with
# Pillow's own blocks.
TOGETHER = """
import resource, sys, threading
import aliblip.data.rows  # which has Pillow give large blocks back
import reading_aliblip
import tiny
from encoder_aliblip import Encoder

reading_aliblip.MAX_PIXELS = 12_000_000
reading_aliblip._room.__init__()
processor = tiny.processor()
encoder = Encoder(tiny.model(vocab_size=len(processor.tokenizer)).eval(), processor)
encoder.pixels(sys.argv[1])
used = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
threads = [threading.Thread(target=encoder.pixels, args=(sys.argv[2],)) for _ in range(6)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
# Not `ru_maxrss`, which begins at what the process had that started this one.
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(int(peak.split()[1]) * 1024 - used)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_six_large_photos_at_once_take_the_memory_of_one(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "small.png")
    Image.new("RGBA", (4000, 3000), (1, 2, 3, 128)).save(tmp_path / "large.png")
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    result = run([sys.executable, "-c", TOGETHER, tmp_path / "small.png", tmp_path / "large.png"], env=env)
    assert_succeeded(result)
    assert int(result.stdout) < 400 * 2**20  # 800 without the bound


def png(width: int, height: int) -> bytes:
    stream = io.BytesIO()
    Image.new("1", (width, height)).save(stream, "PNG")
    return stream.getvalue()


def free() -> int:
    return reading_aliblip._room._free


def test_a_photo_counts_while_it_is_in_use_and_never_after(monkeypatch):
    photo = png(3000, 1000)
    with decoded_photo(photo) as image:
        assert image.size == (3000, 1000) and free() == MAX_PIXELS - 3_000_000
    assert free() == MAX_PIXELS
    assert read_photo(photo).size == (3000, 1000) and free() == MAX_PIXELS
    with pytest.raises(UnusableItem):
        read_photo(photo[:60])
    with pytest.raises(UnusableItem, match="more than"):
        read_photo(png(10_000, 9_000))
    with pytest.raises(KeyError), decoded_photo(photo):  # of the one who uses it: not a reason of the photo's
        raise KeyError("own")
    assert free() == MAX_PIXELS


def test_who_finds_no_room_waits_in_turn_and_small_ones_do_not_overtake():
    order, first, second = [], threading.Event(), threading.Event()

    def use(name: str, photo: bytes) -> None:
        with decoded_photo(photo):
            order.append(name)

    large = threading.Thread(target=use, args=("large", png(9_000, 9_000)))
    small = threading.Thread(target=use, args=("small", png(9, 9)))
    with decoded_photo(png(3000, 3000)):
        large.start()
        while not reading_aliblip._room._turn.locked():
            first.wait(0.01)
        small.start()
        assert not second.wait(0.2) and order == []  # both wait: there would be room for the small one
    large.join(), small.join()
    assert sorted(order) == ["large", "small"] and free() == MAX_PIXELS


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_process_has_all_its_room():
    with decoded_photo(png(3000, 1000)):
        child = os.fork()
        if not child:
            os._exit(0 if free() == MAX_PIXELS else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
