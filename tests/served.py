"""For several tests: a search page in a process of its own, over a catalogue that the gallery's command embedded."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from helpers import ROOT, assert_succeeded, environment, free_port, run
from PIL import Image

needs_gradio = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="gradio is not installed")
HOSTILE = """<script>document.title='taken'</script><img src=x onerror="alert(1)"> ${alert(2)} {{value}}"""
LONG = "supercalifragilisticexpialidocious" * 4
WEIGHT = 22.6
ROWS = 24
CATEGORIES = ("cup", "lamp", "bag")


def make_model(folder: Path) -> Path:
    tiny.spread_model(vocab_size=20).save_pretrained(folder)
    tiny.processor().save_pretrained(folder)
    return folder


@contextmanager
def started(command: list, log: Path, **env: str) -> Iterator[None]:
    """A process that serves a page, from when it answers until the end of the block."""
    with open(log, "w") as output:
        process = subprocess.Popen([*map(str, command)], cwd=ROOT, env=environment(**env), stdout=output, stderr=output)
    try:
        until = time.monotonic() + 180
        while "Running on" not in log.read_text():
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)


def catalogue(folder: Path) -> list[dict]:
    """A Parquet file of photos and columns in a new folder; its rows without the photos, which lie beside it."""
    photos = tiny.photos(folder / "photos", ROWS, seed=5)
    titles = [*tiny.titles(ROWS - 2, seed=2), HOSTILE, LONG]
    for number, size in ((1, (240, 60)), (2, (60, 240))):  # a wide and a high one
        Image.open(photos[number]).resize(size).save(photos[number])
    rows = [
        {
            "sku": f"sku-{number:02}",
            "title": titles[number],
            "category": CATEGORIES[number % 3],
            "price": number * 5.5,
        }
        for number in range(ROWS)
    ]
    (folder / "data").mkdir()
    stored = [row | {"image": {"bytes": Path(photo).read_bytes()}} for row, photo in zip(rows, photos, strict=True)]
    pq.write_table(pa.Table.from_pylist(stored), folder / "data" / "train.parquet")
    return rows


@contextmanager
def catalogue_server(folder: Path, *flags) -> Iterator[SimpleNamespace]:
    """A page over the catalogue: `url`, the `rows`, the `photos`, and the `pipe` and `gallery` to compare with."""
    from aliblip.models.loading import load_pretrained
    from aliblip.retrieval.galleries import Gallery
    from pipeline_aliblip import AliBlipImageTextRetrievalPipeline

    model, rows = make_model(folder / "model"), catalogue(folder)
    build = [sys.executable, "-m", "aliblip.gallery", "--model_name_or_path", model, "--data_dir", folder / "data"]
    build += ["--id_column", "sku", "--thumbnails", "384", "--output_dir", folder / "gallery"]
    assert_succeeded(run(build))
    port, log = free_port(), folder / "server.log"
    command = [sys.executable, "-m", "aliblip.serve", "--model_name_or_path", model, "--gallery", folder / "gallery"]
    command += ["--show_columns", "title,price", "--filter_columns", "category,price", "--fusion_weight", WEIGHT]
    command += ["--server_port", port, *flags]
    with started(command, log, GRADIO_TEMP_DIR=str(folder / "uploads"), HF_HUB_OFFLINE="1"):
        loaded, processor, _ = load_pretrained(str(model))
        yield SimpleNamespace(
            url=f"http://127.0.0.1:{port}",
            folder=folder,
            rows=rows,
            photos=sorted(map(str, (folder / "photos").iterdir())),
            pipe=AliBlipImageTextRetrievalPipeline(model=loaded, processor=processor),
            gallery=Gallery.open(folder / "gallery"),
            log=log,
        )


def jpeg_size(data: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(data)) as photo:
        return photo.size
