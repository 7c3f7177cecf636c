"""Photos a second and core of the training loader's work, against the plain Pillow order.

    python benchmarks/bench_loader.py --json benchmarks/results/loader.json
    python benchmarks/bench_loader.py --photos FOLDER              # of your own, instead of drawn ones
    python benchmarks/bench_loader.py --borders --json benchmarks/results/loader_borders.json
    python benchmarks/bench_loader.py --count 2 --rounds 1 --image_size 64             # seconds, to try it

Both sides make training views of 384 px from the same JPEG files, in turn, in one process and thread. The plain order:
decode whole, crop, resize, every operation of RandAugment as Pillow has it, the processor's float arithmetic. Ours:
JPEGs at the smallest scale that no crop enlarges, resized by torch, operations without an effect left out, bytes to the
device. What the device then does to the bytes is no work of a reader; its time on this CPU stands beside. Photos are
drawn: smooth colours with noise, 0.5, 1.2 and 2 megapixels, quality 90. The last line is the ratio of the sums over all
sizes.

`--borders` measures something else: how long a step waits for its batch where one epoch ends and the next begins. The
drawn photos are a small catalogue that `--workers` readers read for `--epochs` epochs, and a step is a pause of
`--step_seconds`. The old way starts readers for each epoch; ours lets them go on from one to the next. Both have to
give the same rows. The ratio is the seconds of a border the old way over those of ours, of medians; what the other
batches were waited for stands beside: where readers are too slow for the steps, that is no border's fault.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image, ImageEnhance
from transformers import BertTokenizer, BlipImageProcessorPil

from aliblip.data import augment
from aliblip.data.augment import OPERATIONS, TrainAugmentation, crop_box
from aliblip.data.collate import Collator, Normalisation, as_bytes
from aliblip.data.loader import TrainLoader
from aliblip.data.sources import open_source
from benchmarks.common import finish, parser
from processing_aliblip import AliBlipProcessor
from reading_aliblip import read_photo

MEGAPIXELS = (0.5, 1.2, 2.0)
ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
PLAIN = {
    **OPERATIONS,
    "Brightness": lambda image, level, rng: ImageEnhance.Brightness(image).enhance(augment._enhancement(level)),
    "Sharpness": lambda image, level, rng: ImageEnhance.Sharpness(image).enhance(augment._enhancement(level)),
    "TranslateX": lambda image, level, rng: augment._affine(image, 1, 0, augment._signed(level, rng), 0, 1, 0),
    "TranslateY": lambda image, level, rng: augment._affine(image, 1, 0, 0, 0, 1, augment._signed(level, rng)),
}


def main(command_line: list[str] | None = None) -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--image_size", type=int, default=384)
    arguments.add_argument("--count", type=int, default=16, help="photos of each size")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--photos", type=Path, help="a folder of photos to read instead")
    arguments.add_argument("--borders", action="store_true", help="what the border of two epochs costs, instead")
    arguments.add_argument("--workers", type=int, default=2, help="readers of --borders")
    arguments.add_argument("--epochs", type=int, default=6, help="of --borders, each round")
    arguments.add_argument("--batch_size", type=int, default=8, help="of --borders")
    arguments.add_argument("--step_seconds", type=float, default=0.2, help="of --borders, a step's computing")
    args = arguments.parse_args(command_line)
    torch.set_num_threads(1)
    settings = {name: value for name, value in vars(args).items() if name not in ("json", "photos")}
    if args.borders:
        report = measure_borders(args)
        for way, seconds in report["ways"].items():
            print(f"{way:<12} {seconds['border']:.4f} s at a border, {seconds['within']:.4f} s at other steps")
        ratio = report["ways"]["started anew"]["border"] / report["ways"]["going on"]["border"]
        finish("epoch_border", ratio, {**report, "settings": settings}, args.json)
        return
    if args.photos is not None:
        files = sorted(file for file in args.photos.rglob("*") if file.suffix.lower() in ENDINGS)
        groups = {args.photos.name: [file.read_bytes() for file in files[: 3 * args.count]]}
    else:
        groups = {f"{size} megapixels": [drawn(size, seed) for seed in range(args.count)] for size in MEGAPIXELS}
    rows = []
    for name, photos in groups.items():
        sides = {"plain": Plain(args.image_size), "ours": Ours(args.image_size)}
        seconds = {side: [] for side in sides}
        for _ in range(args.rounds):
            for side, make in sides.items():
                start = time.process_time()  # of this core: others may be busy
                make(photos)
                seconds[side].append((time.process_time() - start) / len(photos))
        medians = {side: statistics.median(times) for side, times in seconds.items()}
        rows.append(
            {
                "photos": name,
                "count": len(photos),
                "kilobytes": round(sum(map(len, photos)) / len(photos) / 1e3),
                "seconds_per_photo": medians,
                "photos_per_second": {side: 1 / median for side, median in medians.items()},
                "ratio": medians["plain"] / medians["ours"],
            }
        )
        print(f"{name}: {1 / medians['plain']:.0f} -> {1 / medians['ours']:.0f} photos a second and core")
    pixels, normalise = (
        as_bytes([Image.new("RGB", (args.image_size,) * 2)] * args.count),
        Normalisation(BlipImageProcessorPil()),
    )
    start = time.process_time()
    for _ in range(args.rounds):
        normalise(pixels)
    on_device = (time.process_time() - start) / args.rounds / args.count
    total = {side: sum(row["seconds_per_photo"][side] for row in rows) for side in ("plain", "ours")}
    finish(
        "loader",
        total["plain"] / total["ours"],
        {"sizes": rows, "normalisation_seconds_per_photo": on_device, "settings": settings},
        args.json,
    )


def drawn(megapixels: float, seed: int) -> bytes:
    """A JPEG file of smooth colours with noise, four to three."""
    generator = np.random.default_rng(seed)
    width = round((megapixels * 1e6 * 4 / 3) ** 0.5)
    height = round(width * 3 / 4)
    coarse = Image.fromarray(generator.integers(0, 256, (height // 32, width // 32, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float32)
    noisy = smooth + generator.normal(0, 8, smooth.shape)
    stream = io.BytesIO()
    Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


class Plain:
    """The order in which one would write it down."""

    def __init__(self, image_size: int):
        self.size = (image_size, image_size)
        self.processor = BlipImageProcessorPil(size={"height": image_size, "width": image_size})

    def __call__(self, photos: list[bytes]) -> torch.Tensor:
        views = []
        for number, data in enumerate(photos):
            rng = random.Random(number)
            image = read_photo(data)
            image = image.crop(crop_box(image.width, image.height, (0.5, 1.0), rng))
            image = image.resize(self.size, Image.Resampling.BICUBIC)
            if rng.random() < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            for name in rng.choices(list(PLAIN), k=2):
                if rng.random() <= augment.PROBABILITY:
                    image = PLAIN[name](image, 5, rng)
            views.append(image)
        return self.processor(images=views, return_tensors="pt")["pixel_values"]


class Ours:
    """As the collator makes a batch, and the step its pixels."""

    def __init__(self, image_size: int):
        self.augment = TrainAugmentation(image_size)

    def __call__(self, photos: list[bytes]) -> torch.Tensor:
        views = [
            self.augment(read_photo(data, suffices=self.augment.suffices), random.Random(number))
            for number, data in enumerate(photos)
        ]
        return as_bytes(views)


# --- borders of epochs ------------------------------------------------------------------------------------------------


def measure_borders(args: argparse.Namespace) -> dict:
    """Seconds that steps wait for their batches, at borders of epochs and elsewhere, of both ways."""
    ways = {"started anew": started_anew, "going on": going_on}
    waits: dict[str, list[float]] = {way: [] for way in ways}
    rows: dict[str, list[list[int]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        write_catalogue(Path(folder), [drawn(size, seed) for size in MEGAPIXELS for seed in range(args.count)])
        loader = small_loader(folder, args)
        steps = loader.steps_per_epoch
        for _ in range(args.rounds):
            for way, batches_of in ways.items():
                with closing(batches_of(loader, args.epochs)) as batches:
                    for _ in range(args.epochs * steps):
                        start = time.perf_counter()
                        batch = next(batches)
                        waits[way].append(time.perf_counter() - start)
                        rows[way].append(batch["row"].tolist())
                        time.sleep(args.step_seconds)
    if rows["started anew"] != rows["going on"]:
        raise RuntimeError("the two ways do not give the same rows")
    whole = range(len(rows["going on"]))
    borders = [number for number in whole if number % steps == 0 and number % (args.epochs * steps)]
    within = [number for number in whole if number % steps]
    report = {
        way: {
            "border": statistics.median(seconds[number] for number in borders),
            "within": statistics.median(seconds[number] for number in within),
            "borders": [seconds[number] for number in borders],
        }
        for way, seconds in waits.items()
    }
    return {"ways": report, "steps_per_epoch": steps}


def started_anew(loader: TrainLoader, epochs: int) -> Iterator[dict]:
    for epoch in range(epochs):
        yield from loader.epoch(epoch)


def going_on(loader: TrainLoader, epochs: int) -> Iterator[dict]:
    return loader.batches(0, epochs * loader.steps_per_epoch)


def write_catalogue(folder: Path, photos: list[bytes]) -> None:
    """A folder of photos with a title each, as `datasets` has them."""
    (folder / "train").mkdir()
    with (folder / "train" / "metadata.jsonl").open("w") as file:
        for number, photo in enumerate(photos):
            (folder / "train" / f"{number:04}.jpg").write_bytes(photo)
            file.write(json.dumps({"file_name": f"{number:04}.jpg", "caption": f"a drawn photo {number}"}) + "\n")


def small_loader(folder: str, args: argparse.Namespace) -> TrainLoader:
    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])}
    processor = AliBlipProcessor(
        BlipImageProcessorPil(size={"height": args.image_size, "width": args.image_size}), BertTokenizer(vocab=words)
    )
    return TrainLoader(
        open_source(data_dir=folder, split="train"),
        Collator(processor, TrainAugmentation(args.image_size)),
        batch_size=args.batch_size,
        seed=0,
        rank=0,
        world_size=1,
        num_workers=args.workers,
    )


if __name__ == "__main__":
    main()
