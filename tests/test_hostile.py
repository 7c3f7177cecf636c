"""Of hostile rows, each is used as a person sees it, or skipped, counted and listed; none ends or hangs a run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import hostile
import pytest
import tiny
from helpers import ROOT, assert_succeeded, run, run_forked
from PIL import Image, features
from runs import TINY

import reading_aliblip
from aliblip.data.products import product_id_of
from aliblip.data.rows import Row, decode
from aliblip.data.sources import open_source
from reading_aliblip import UnusableItem

BATCH = 8
CASES = hostile.corpus(multiple_of=BATCH)
WRITERS = {"folder": hostile.write_image_folder, "parquet": hostile.write_parquet}
PARAMETERS = [("folder", case.name) for case in CASES] + [
    ("parquet", case.name) for case in CASES if case.parquet is not None
]


@pytest.fixture(scope="module")
def layouts(tmp_path_factory) -> dict[str, tuple[Path, list[hostile.Case]]]:
    """layout -> its folder and the cases it holds, in row order."""
    root = tmp_path_factory.mktemp("hostile")
    return {name: (root / name, write(root / name, CASES)) for name, write in WRITERS.items()}


@pytest.fixture(scope="module")
def rows(layouts) -> dict[tuple[str, str], tuple[hostile.Case, Row]]:
    """(layout, name of the case) -> the case and the row that the source gives."""
    found = {}
    for layout, (folder, cases) in layouts.items():
        source = open_source(data_dir=str(folder), split="train")
        assert source.num_rows == len(cases)
        for case, row in zip(cases, source.read_range(0, source.num_rows), strict=True):
            found[layout, case.name] = case, row
    return found


def test_the_corpus_is_the_same_every_time_and_large_enough():
    assert hostile.corpus(multiple_of=BATCH) == CASES and hostile.corpus(seed=1) != CASES
    kinds = [case for case in CASES if not case.name.startswith("good")]
    assert len(kinds) >= 45
    assert sum(case.reason is None for case in kinds) >= 45 and sum(case.reason is not None for case in kinds) >= 45


@pytest.mark.parametrize(("layout", "name"), PARAMETERS)
def test_a_row_is_used_as_a_person_sees_it_or_skipped_with_the_reason(rows, layout, name):
    case, row = rows[layout, name]
    if case.reason is not None:
        with pytest.raises(UnusableItem) as raised:
            decode(row)
        assert case.reason in str(raised.value) and "\n" not in str(raised.value)
        return
    example = decode(row)
    image = example.image
    assert image.mode == "RGB" and image.size == case.size and not image.info
    for point, colour in case.colours.items():
        seen = image.getpixel(point)
        assert max(abs(a - b) for a, b in zip(seen, colour, strict=True)) <= case.tolerance, (point, seen, colour)
    assert example.text == case.title
    if case.reads_like is not None:
        encode = tiny.processor()
        assert encode(text=[example.text])["input_ids"] == encode(text=[case.reads_like])["input_ids"]
    if case.id is not None:
        assert example.product_id == case.id
    else:
        assert [key for key, (_, other) in rows.items() if other.product_id == example.product_id] == [(layout, name)]


def test_a_title_of_a_megabyte_is_cut_before_the_tokenizer(rows):
    long = [row for case, row in rows.values() if isinstance(case.caption, str) and len(case.caption) > 100_000]
    assert len(long) == 8
    assert all(len(decode(row).text) <= reading_aliblip.MAX_TITLE_CHARACTERS for row in long)


def test_what_no_file_can_hold():
    with pytest.raises(UnusableItem, match="no pixels"):
        decode(Row(0, Image.new("RGB", (0, 5)), "red cup", 0, "row 0"))
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 0, 255, 255], "RGBA")
    palette.putpixel((1, 0), 1)
    image = decode(Row(0, palette, "red cup", 0, "row 0")).image
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 255)]


def test_what_has_no_json_form_is_no_id():
    deep: Any = "id"
    for _ in range(5000):
        deep = [deep]
    for value in (deep, {1: "a", "b": 2}):
        assert product_id_of(value) is None


@pytest.mark.skipif(not features.check("littlecms2"), reason="Pillow without LittleCMS")
def test_a_profile_costs_nothing_where_it_changes_nothing():
    srgb = hostile.rgb_profile(hostile.SRGB, None)
    assert reading_aliblip._conversion(srgb, "RGB") is None
    assert reading_aliblip._conversion(hostile.grey_profile(1.0), "L") is not None
    assert reading_aliblip._conversion(hostile.grey_profile(1.0), "RGB") is None  # of other colours
    wide = hostile.rgb_profile(hostile.DISPLAY_P3, None)
    convert = reading_aliblip._conversion(wide, "RGB")
    assert convert is not None and convert is reading_aliblip._conversion(bytes(bytearray(wide)), "RGB")


@pytest.mark.skipif(not features.check("littlecms2"), reason="Pillow without LittleCMS")
def test_without_littlecms_colours_are_as_stored(monkeypatch):
    stored = Image.new("RGB", (9, 9), (200, 60, 40))
    wide = hostile.encoded(stored, "PNG", icc_profile=hostile.rgb_profile(hostile.DISPLAY_P3, None))
    row = Row(0, wide, "red cup", 0, "row 0")
    assert decode(row).image.getpixel((0, 0)) != (200, 60, 40)
    reading_aliblip._conversion.cache_clear()
    monkeypatch.delattr("PIL.ImageCms")
    monkeypatch.setitem(sys.modules, "PIL.ImageCms", None)
    try:
        assert decode(row).image.getpixel((0, 0)) == (200, 60, 40)
    finally:
        reading_aliblip._conversion.cache_clear()


# --- bombs ------------------------------------------------------------------------------------------------------------

BOMBS = """
import io, resource, struct, sys
import numpy as np
from PIL import Image
import hostile
from aliblip.data.rows import Row, decode
from reading_aliblip import UnusableItem

folder = sys.argv[1]
cases = [case for case in hostile.corpus() if "bomb" in case.name or "huge" in case.name or "scans" in case.name]
cases = [(case.name, case.image) for case in cases] + [("file", folder + "/sparse_file_of_600_MiB.jpg")]
# Photos of 36 megapixels that are fine: 72 MB of grey, and transparency in 36 MB.
side = 6000
cases.append(("16 bits", hostile.png(side, side, 16, 0, bytes(side * (1 + 2 * side)))))
palette = (b"PLTE", bytes(6)), (b"tRNS", b"\\0")
cases.append(("palette", hostile.png(side, side, 8, 3, bytes(side * (1 + side)), *palette)))
decode(Row(0, hostile.encoded(Image.new("RGB", (9, 9)), "JPEG"), "red cup", 0, "what is loaded once"))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]),) * 2)
for name, image in cases:
    try:
        print(name, decode(Row(0, image, "red cup", 0, name)).image.size, sep=": ")
    except UnusableItem as error:
        print(name, error, sep=": ")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, and limits the address space")
def test_bombs_are_refused_and_large_photos_used_within_512_mb(layouts):
    """More address space fails, and what can't be allocated is a reason that says MemoryError."""
    folder, _ = layouts["folder"]
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    result = run([sys.executable, "-c", BOMBS, folder / "train", str(512 * 2**20)], env=env)
    assert_succeeded(result)
    outcomes = dict(line.split(": ", 1) for line in result.stdout.splitlines())
    wanted = {case.name: case.reason for case in CASES if case.name in outcomes}
    wanted |= {"file": "larger than 512 MiB", "16 bits": "(6000, 6000)", "palette": "(6000, 6000)"}
    assert len(wanted) == len(outcomes) == 8
    for name, part in wanted.items():
        assert part in outcomes[name], (name, outcomes[name])


# --- whole runs -------------------------------------------------------------------------------------------------------


def skipped_rows(folder: Path) -> dict[tuple[int, str], str]:
    lines = (folder / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    skipped = [json.loads(line) for line in lines]
    found = {(entry["row"], entry["name"]): entry["reason"] for entry in skipped}
    assert len(found) == len(skipped)
    return found


def expected_rows(cases: list[hostile.Case]) -> dict[tuple[int, str], str]:
    return {(row, case.listed_as(row)): case.reason for row, case in enumerate(cases) if case.reason is not None}


def assert_listed(folder: Path, cases: list[hostile.Case]) -> None:
    found, expected = skipped_rows(folder), expected_rows(cases)
    assert found.keys() == expected.keys()
    for key, part in expected.items():
        assert part in found[key], key


@pytest.fixture(scope="module")
def training(layouts, tmp_path_factory):
    """One epoch over the folder, every row of it in a batch, with augmentation."""
    folder, cases = layouts["folder"]
    assert len(cases) % BATCH == 0
    root = tmp_path_factory.mktemp("training")
    tiny.tokenizer().save_pretrained(root / "tokenizer")
    flags = ["--data_dir", folder, "--tokenizer_name", root / "tokenizer", "--output_dir", root / "run"]
    flags += ["--per_device_train_batch_size", str(BATCH), "--num_train_epochs", "1", "--evaluate_every", "0"]
    flags += ["--max_skipped_fraction", "0.9"]
    return root / "run", run_forked([sys.executable, "train.py", *TINY, *flags])


def test_a_training_run_uses_or_lists_every_row(training, layouts):
    output, result = training
    assert_succeeded(result)
    _, cases = layouts["folder"]
    assert f"{len(cases) // BATCH} steps" in result.stdout
    assert_listed(output, cases)
    assert f"{len(expected_rows(cases))} rows could not be used" in result.stdout


def test_an_evaluation_uses_or_lists_every_row(training, layouts, tmp_path):
    model, result = training
    assert_succeeded(result)
    folder, cases = layouts["parquet"]
    flags = ["--model_name_or_path", model / "last", "--data_dir", folder, "--split_name", "train"]
    flags += ["--k_rerank", "4", "--per_device_eval_batch_size", "16", "--output_dir", tmp_path]
    flags += ["--contact_sheet", tmp_path / "sheet.png"]
    assert_succeeded(run_forked([sys.executable, "evaluate_retrieval.py", *flags]))
    assert_listed(tmp_path, cases)
    results = json.loads((tmp_path / "results.json").read_text())
    usable = [case for case in cases if case.reason is None]
    assert results["num_texts"] == len(usable)
    assert results["num_images"] == len({case.image for case in usable}) < len(usable)
