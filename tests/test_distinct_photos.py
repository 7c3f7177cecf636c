"""A photo is one image however many rows name it: against the protocol of several titles a photo, counted by hand."""

from __future__ import annotations

import json
import random

import pyarrow.parquet as pq
import pytest
import torch
from evaluation_fixtures import NAMES, UNIT, flags, retrieve, without_run
from PIL import Image

from aliblip.data.collate import Collator
from aliblip.data.loader import EvalLoader
from aliblip.data.sources import open_source
from aliblip.retrieval import results as numbers
from aliblip.retrieval.plan import count_photos
from aliblip.runtime.parts import Parts

PHOTOS, TITLES = 9, 31
WORDS = ["red", "green", "blue", "white", "black", "pink", "cap", "lamp", "shirt", "mug", "chair"]
COPY = 4  # this photo lies there twice, under two names
# Two photos a product, but for one photo that two products share; the titles of a product are those of its rows.
PRODUCTS = {photo: [photo // 2] for photo in range(PHOTOS)} | {6: [3, 0]}


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    """Photos with several titles each, in the order of chance; with a product column, and without."""
    folder = tmp_path_factory.mktemp("captions")
    (folder / "validation").mkdir()
    generator = random.Random(3)
    for photo in range(PHOTOS):
        image = Image.new("RGB", (40, 30), tuple(generator.randrange(256) for _ in range(3)))
        for _ in range(6):
            box = [generator.randrange(30) for _ in range(2)]
            image.paste(tuple(generator.randrange(256) for _ in range(3)), (*box, box[0] + 9, box[1] + 9))
        image.save(folder / "validation" / f"{photo}.png")
    copy = folder / "validation" / "copy.png"
    copy.write_bytes((folder / "validation" / f"{COPY}.png").read_bytes())
    photos = [*range(PHOTOS), *(generator.randrange(PHOTOS) for _ in range(TITLES - PHOTOS))]
    generator.shuffle(photos)
    lines, named = [], 0
    for photo in photos:
        name = f"{photo}.png"
        if photo == COPY:
            named += 1
            name = "copy.png" if named % 2 == 0 else name
        title = " ".join(generator.choice(WORDS) for _ in range(generator.randrange(3, 12)))
        product = generator.choice(PRODUCTS[photo])
        lines.append({"file_name": name, "caption": title, "photo": photo, "product_id": product})
    assert len({line["caption"] for line in lines}) == TITLES and named > 1
    assert {line["product_id"] for line in lines if line["photo"] == 6} == {0, 3}
    (folder / "validation" / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder, lines


def loader_of(folder, processor, with_products, unit_size=UNIT):
    if with_products:
        source = open_source(data_dir=str(folder), split="validation")
    else:
        lines = [json.loads(line) for line in (folder / "validation" / "metadata.jsonl").read_text().splitlines()]
        table = folder / "no_products.json"
        table.write_text(json.dumps([{"product": line["file_name"], "caption": line["caption"]} for line in lines]))
        source = open_source(data_files=str(table), image_dir=str(folder / "validation"), split="validation")
    return EvalLoader(source, Collator(processor, describe=True), unit_size=unit_size, rank=0, world_size=1)


@torch.no_grad()
def scores_of(model, processor, folder, lines):
    """(titles, photos) ITC and fused scores, pair by pair; the photos in the order of the first row of each."""
    order = list(dict.fromkeys(line["photo"] for line in lines))
    pictures = [Image.open(folder / "validation" / f"{photo}.png").convert("RGB") for photo in order]
    pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
    itc, itm = torch.zeros(2, len(lines), len(order), dtype=torch.float64)
    model.eval()
    for t, line in enumerate(lines):
        title = processor(text=[line["caption"]], return_tensors="pt")
        for i in range(len(order)):
            output = model(pixels[i : i + 1], title["input_ids"], title["attention_mask"])
            itc[t, i] = float(output.image_embeds[0] @ output.text_embeds[0])
            itm[t, i] = itc[t, i] + float(output.itm_logits[0, 1])
    return order, itc, itm


def recalls(scores, positive):
    """Of (queries, items) scores: the share of queries that have any of their positives among the k best."""
    measured = []
    for k in (1, 5, 10):
        found = 0
        for row, right in zip(scores.tolist(), positive.tolist(), strict=True):
            best = sorted(range(len(row)), key=lambda item: -row[item])[:k]
            found += any(right[item] for item in best)
        measured.append(found / len(scores))
    return measured


@pytest.mark.parametrize("with_products", [False, True])
def test_both_directions_equal_the_protocol_of_several_titles_a_photo(model, processor, captions, with_products):
    folder, lines = captions
    order, itc, itm = scores_of(model, processor, folder, lines)
    positive = torch.zeros(TITLES, PHOTOS, dtype=torch.bool)
    for t, line in enumerate(lines):
        for i, photo in enumerate(order):
            rows_of_photo = [row for row in lines if row["photo"] == photo]
            same = any(row["product_id"] == line["product_id"] for row in rows_of_photo)
            positive[t, i] = same if with_products else photo == line["photo"]
    assert positive.sum(dim=1).max() == (3 if with_products else 1), "the titles of product 0 have three photos"
    found = retrieve(model, loader_of(folder, processor, with_products), k_rerank=TITLES)
    results = numbers.measure(found, **NAMES)
    assert (results["num_images"], results["num_texts"]) == (PHOTOS, TITLES)
    assert f"{PHOTOS} photos, {TITLES} titles" in numbers.format_table(results)
    six = []
    for direction, turn in (("text_to_image", False), ("image_to_text", True)):
        truth = positive.T if turn else positive
        for stage, scores in (("itc", itc), ("itm", itm)):
            expected = recalls(scores.T if turn else scores, truth)
            assert [results[direction][stage][f"recall@{k}"] for k in (1, 5, 10)] == pytest.approx(expected)
        six += expected
    assert results["mean_recall"] == pytest.approx(sum(six) / 6)
    assert results["text_to_image"]["itm"]["recall@1"] not in (0, 1) and len(set(six)) > 3, "the example can tell"
    # what was found, item by item
    assert found.images.rows.tolist() == [[line["photo"] for line in lines].index(photo) for photo in order]
    ids = found.text_to_image.rankings.ids
    assert ids.tolist() == [sorted(range(PHOTOS), key=lambda i: -row[i]) for row in itm.tolist()]
    right = [[found.is_right(t, i) for i in range(PHOTOS)] for t in range(TITLES)]
    assert right == positive.tolist()


def test_units_memory_parts_and_all_pairs_change_nothing(model, processor, captions, tmp_path):
    folder, _ = captions
    loader = loader_of(folder, processor, True)
    expected = retrieve(model, loader, k_rerank=5)
    parts = Parts(tmp_path / "parts", {"model": "m"})
    for options in (
        {"image_token_memory_gb": 0.0},
        {"image_token_memory_gb": 3e-6},
        {"parts": parts},
        {"parts": parts},
    ):
        found = retrieve(model, loader, k_rerank=5, **options)
        for direction in ("text_to_image", "image_to_text"):
            got, wanted = getattr(found, direction).rankings, getattr(expected, direction).rankings
            assert torch.equal(got.ids, wanted.ids) and torch.equal(got.scores, wanted.scores)
            assert torch.equal(got.ranks, wanted.ranks)
    assert found.resumed_units > 0
    every = retrieve(model, loader, k_rerank="all", parts=Parts(tmp_path / "all", {"model": "m"}))
    whole = retrieve(model, loader_of(folder, processor, True, unit_size=TITLES), k_rerank=TITLES)
    for direction, depth in (("text_to_image", PHOTOS), ("image_to_text", TITLES)):
        got, wanted = getattr(every, direction).rankings, getattr(whole, direction).rankings
        assert got.ids.shape[1] == wanted.ids.shape[1] == depth
        assert torch.equal(got.ids, wanted.ids) and torch.equal(got.ranks, wanted.ranks)
        torch.testing.assert_close(got.scores, wanted.scores, atol=1e-4, rtol=0)


def test_the_depth_is_that_of_each_gallery(model, processor, captions):
    found = retrieve(model, loader_of(captions[0], processor, False), k_rerank=(4, 20))
    assert found.depths == [4, 20]
    assert found.text_to_image.rankings.ids.shape[1] == PHOTOS and found.image_to_text.rankings.ids.shape[1] == 20
    results = numbers.measure(found, **NAMES)
    assert results["text_to_image"]["itc_recall@k_rerank"] == 1.0 > results["text_to_image"]["by_k"][0]["ceiling"]


def test_a_photo_that_changed_between_the_stages_is_noticed(model, processor, captions, tmp_path, monkeypatch):
    folder, _ = captions
    loader = loader_of(folder, processor, False)
    read, again = loader.read_unit, []

    def changed(unit):
        batch = read(unit)
        again.append(unit)
        if len(again) > loader.num_units:  # the second reading
            batch["photo_id"] = batch["photo_id"] + 1
        return batch

    monkeypatch.setattr(loader, "read_unit", changed)
    with pytest.raises(RuntimeError, match="the data changed during the run"):
        retrieve(model, loader, image_token_memory_gb=0.0)


def test_the_script_says_photos_and_titles_and_its_files_have_each_photo_once(
    model_folder, captions, tmp_path, run_script
):
    folder, lines = captions
    out = tmp_path / "out"
    more = ("--report", out / "report.html", "--contact_sheet", out / "sheet.png", "--slices", "title_length")
    more += ("--k_rerank", 20, "--product_id_column", "photo", "--submission", out / "submission.json")
    arguments = flags(model_folder, folder, out, *more)
    code, printed = run_script(*arguments)
    assert code == 0
    # an answer file asks for names: the copy is a photo of its own there
    assert f"{PHOTOS + 1} photos, {TITLES} titles" in printed.out
    assert all(len(set(row["top10"])) == 10 for row in json.loads((out / "submission.json").read_text()))
    assert f"{PHOTOS + 1} images x {TITLES} titles" in printed.out, "the plan counts files"
    code, printed = run_script(*arguments[:-2], "--overwrite_output_dir")
    assert code == 0 and f"{PHOTOS} photos, {TITLES} titles" in printed.out
    assert f"{PHOTOS} photos, {TITLES} titles" in (out / "report.html").read_text()
    table = pq.read_table(out / "rankings_text_to_image.parquet").to_pylist()
    photos = [[lines[row]["photo"] for row in query["ids"]] for query in table]
    assert all(len(set(row)) == len(row) == PHOTOS for row in photos)
    assert [row["product_id"] for row in table] == [line["photo"] for line in lines]
    assert pq.read_table(out / "rankings_image_to_text.parquet").num_rows == PHOTOS
    slices = json.loads((out / "results.json").read_text())["slices"]["title_length"]
    for direction, count in (("text_to_image", TITLES), ("image_to_text", PHOTOS)):
        assert sum(row[direction]["num_queries"] for row in slices) == count
    first = json.loads((out / "results.json").read_text())
    again = [*arguments[:-2], "--output_dir", tmp_path / "again", "--compare", out / "results.json"]
    code, printed = run_script(*again)
    assert code == 0 and "difference +0.0" in printed.out
    assert without_run(json.loads((tmp_path / "again" / "results.json").read_text())) == without_run(first)


def test_the_photos_of_a_table_are_counted_by_their_files(captions):
    folder, _ = captions
    assert count_photos(open_source(data_dir=str(folder), split="validation")) == PHOTOS + 1
