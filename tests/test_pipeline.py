"""The pipeline: equal to the engine, in every form of input, from a folder in a process of its own."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from helpers import environment
from http_stub import FileServer
from PIL import Image
from transformers import pipeline
from transformers.pipelines.pt_utils import KeyDataset

import reading_aliblip
import retrieval_aliblip as engine
from aliblip import AliBlipImageTextRetrievalPipeline, Gallery

TASK = "image-text-retrieval"
COUNT, K = 20, 6
FIELDS = {"id", "position", "score", "itc", "itm_logit", "itm_probability"}


@pytest.fixture(scope="module")
def pipe():
    return pipeline(TASK, model=tiny.spread_model(), processor=tiny.processor(), device="cpu")


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return tiny.photos(tmp_path_factory.mktemp("pipeline") / "photos", COUNT)


@pytest.fixture(scope="module")
def titles():
    return tiny.titles(COUNT)


def build(pipe, rows, place, **options):
    return Gallery.build(rows, place, model=pipe.model, processor=pipe.processor, num_workers=0, **options)


@pytest.fixture(scope="module")
def folder(pipe, paths, tmp_path_factory):
    made = tmp_path_factory.mktemp("pipeline") / "gallery"
    build(pipe, paths, made, store_tokens=True)
    return made


@pytest.fixture(scope="module")
def gallery(folder):
    return Gallery.open(folder)


@pytest.fixture(scope="module")
def text_gallery(pipe, titles, tmp_path_factory):
    return build(pipe, titles, tmp_path_factory.mktemp("pipeline") / "titles", kind="text")


def assert_close(results, expected):
    """Scores in the last digits depend on what was computed together."""
    assert len(results) == len(expected)
    for one, other in zip(results, expected, strict=True):
        if isinstance(one, list):
            assert_close(one, other)
        else:
            assert one["id"] == other["id"] and one.keys() - {"path"} == other.keys() - {"path"}
            for name in FIELDS - {"id", "position"}:
                assert one[name] == pytest.approx(other[name], abs=1e-5), name


@torch.no_grad()
def by_the_engine(pipe, paths, titles, direction):
    """Both stages by the engine, image tokens rounded as the pipeline does; {"id", ...} of the K best, re-ranked."""
    model, batch = pipe.model, pipe.processor(text=titles, return_tensors="pt")
    pixels = pipe.processor(images=[Image.open(path) for path in paths], return_tensors="pt")["pixel_values"]
    image_embeds, tokens = engine.embed_images(model, pixels)
    text_embeds = engine.embed_texts(model, **batch)
    tokens = tokens.bfloat16().float()
    everything = [torch.arange(len(titles))] * len(paths)
    logits = engine.rerank(model, tokens, everything, **batch)[:, 1].reshape(len(paths), len(titles))
    queries, gallery, ids = image_embeds, text_embeds, list(range(len(titles)))
    if direction == "text-to-image":
        queries, gallery, ids, logits = text_embeds, image_embeds, paths, logits.t()
    itc, found = engine.search(queries, gallery, K)
    scores, order = engine.order_by_score(engine.fuse(itc, logits.gather(1, found)), found)
    assert not torch.equal(order, found)  # the example can tell the stages apart
    similarity = queries @ gallery.t()
    return [
        [
            {"id": ids[i], "score": score, "itc": float(similarity[q, i]), "itm_logit": float(logits[q, i])}
            for i, score in zip(order[q].tolist(), scores[q].tolist(), strict=True)
        ]
        for q in range(len(queries))
    ]


def test_the_fusion_weight_orders_the_results(pipe, titles, gallery):
    for weight in (0, 2.5, 300.0):
        results = pipe(titles[:3], gallery=gallery, top_k=K, rerank=K, fusion_weight=weight)
        for found in results:
            scores = [result["score"] for result in found]
            assert scores == sorted(scores, reverse=True)
            assert scores == pytest.approx([r["itm_logit"] + weight * r["itc"] for r in found], rel=1e-4)
    for wrong in (-1, "1"):
        with pytest.raises(ValueError, match="fusion_weight is .*: give a number of at least 0"):
            pipe(titles[0], gallery=gallery, fusion_weight=wrong)


@pytest.mark.parametrize("direction", ["text-to-image", "image-to-text"])
def test_both_directions_equal_the_engine(direction, pipe, paths, titles, gallery, text_gallery):
    expected = by_the_engine(pipe, paths, titles, direction)
    if direction == "text-to-image":
        results = pipe(titles, gallery=gallery, top_k=K, rerank=K, batch_size=7)
    else:
        results = pipe(paths, gallery=text_gallery, top_k=K, rerank=K, batch_size=7)
    for found, wanted in zip(results, expected, strict=True):
        assert [entry["id"] for entry in found] == [entry["id"] for entry in wanted]
        for one, other in zip(found, wanted, strict=True):
            for name in ("score", "itc", "itm_logit"):
                assert one[name] == pytest.approx(other[name], abs=2e-5), name
            assert one["score"] == pytest.approx(one["itc"] + one["itm_logit"])


@torch.no_grad()
def test_the_probability_is_that_of_the_model(pipe, paths, titles):
    pipe.model.itm_head.bias.data[0] += 1  # so that the probability is not a function of the match logit alone
    try:
        result = pipe(titles[0], gallery=[Image.open(paths[0])], top_k=1)[0]
        output = pipe.model(**pipe.processor(images=[Image.open(paths[0])], text=[titles[0]], return_tensors="pt"))
    finally:
        pipe.model.itm_head.bias.data[0] -= 1
    assert result["itm_probability"] == pytest.approx(float(output.itm_logits.softmax(1)[0, 1]), abs=2e-3)  # bf16
    assert result["itm_probability"] != pytest.approx(1 / (1 + 2.718281828 ** -result["itm_logit"]), abs=0.05)


def test_every_form_of_queries(pipe, paths, titles, gallery, text_gallery):
    options = {"gallery": gallery, "top_k": 3, "rerank": 5}
    expected = [pipe(title, **options) for title in titles]
    assert all(set(entry) == {*FIELDS, "path"} for entry in expected[0]) and len(expected[0]) == 3
    assert pipe([], **options) == []
    table = Dataset.from_dict({"title": titles, "photo": paths}).cast_column("photo", ImageFeature())
    for batch_size in (1, 4):
        options["batch_size"] = batch_size
        assert_close(pipe(titles, **options), expected)
        assert_close(pipe(tuple(titles), **options), expected)
        assert_close(list(pipe((title for title in titles), **options)), expected)
        assert_close(list(pipe(table["title"], **options)), expected)
        assert_close(list(pipe(KeyDataset(table, "title"), **options)), expected)
        assert_close(list(pipe(table, query_column="title", **options)), expected)
        assert_close(list(pipe(table.to_iterable_dataset(), query_column="title", **options)), expected)
    options = {"gallery": text_gallery, "top_k": 3}
    expected = [pipe(path, **options) for path in paths]
    assert all(set(entry) == {*FIELDS, "text"} for entry in expected[0])
    with open(paths[0], "rb") as file:
        data = file.read()
    with FileServer(Path(paths[0]).parent) as server:
        address = f"{server.url}/{Path(paths[0]).name}"
        photos = [Path(paths[0]), Image.open(paths[0]), data, {"bytes": data, "path": None}, address]
        for photo in photos:
            assert_close(pipe(photo, **options), expected[0])
        with pytest.raises(ValueError, match=r"the query 'http.*' can't be used: .*404"):
            pipe(f"{server.url}/gone.png", **options)
    assert_close(list(pipe(table["photo"], batch_size=3, **options)), expected)


def test_every_form_of_gallery(pipe, paths, titles, folder, gallery, text_gallery):
    expected = pipe(titles[0], gallery=gallery)
    assert len(expected) == 5
    assert_close(pipe(titles[0], gallery=str(folder)), expected)
    assert_close(pipe(titles[0], gallery=paths, direction="text-to-image"), expected)
    images = pipe(titles[0], gallery=[Image.open(path) for path in paths])
    assert [paths[entry["id"]] for entry in images] == [entry["id"] for entry in expected]
    assert_close(pipe(paths[0], gallery=titles), pipe(paths[0], gallery=text_gallery))
    # Of `datasets`, with one damaged photo, the first.
    with open(paths[0], "rb") as file:
        torn = file.read()[:60]
    rows = [{"bytes": torn, "path": None}, *({"bytes": Path(path).read_bytes(), "path": None} for path in paths[1:])]
    table = Dataset.from_dict({"image": rows}).cast_column("image", ImageFeature())
    expected_rows = [paths.index(entry["id"]) for entry in pipe(titles[0], gallery=gallery, top_k=COUNT)]
    for source in (table, table["image"]):
        found = pipe(titles[0], gallery=source, top_k=COUNT)
        assert [entry["id"] for entry in found] == [row for row in expected_rows if row]
    preset = AliBlipImageTextRetrievalPipeline(pipe.model, pipe.processor, device="cpu", gallery=folder, top_k=2)
    assert_close(preset(titles[0]), expected[:2])
    assert_close(preset(titles[0], top_k=4), expected[:4])


def test_itc_alone(pipe, paths, titles, gallery, text_gallery):
    results = pipe(titles, gallery=gallery, rerank=0, top_k=4)
    vectors = pipe.encoder.embed_titles(titles)
    for found, hits in zip(results, gallery.search(vectors, 4), strict=True):
        assert (
            [entry["id"] for entry in found] == [paths[hit["position"]] for hit in hits] == [hit["id"] for hit in hits]
        )
        for entry, hit in zip(found, hits, strict=True):
            assert entry["score"] == pytest.approx(entry["itc"]) == pytest.approx(hit["itc"], abs=1e-5)
            assert entry["itm_logit"] is None and entry["itm_probability"] is None
    similar = pipe(Path(paths[3]), gallery=gallery, rerank=0, top_k=1)[0]
    assert similar["id"] == paths[3] and similar["score"] == pytest.approx(1, abs=1e-5)
    same = pipe(titles[3], gallery=text_gallery, direction="text-to-text", rerank=0, top_k=1)[0]
    assert same["id"] == 3
    # candidates are at least as many as results, and no more than there are
    assert len(pipe(titles[0], gallery=gallery, rerank=2, top_k=99)) == COUNT


def test_photos_are_read_again_with_equal_logits(pipe, paths, titles, gallery, folder, tmp_path):
    without = build(pipe, paths, tmp_path / "g")
    assert not without.has_tokens
    read_again = pipe(titles, gallery=without, top_k=COUNT)
    stored = pipe(titles, gallery=gallery, top_k=COUNT)
    for one, other in zip(read_again, stored, strict=True):
        logits = [{entry["id"]: entry["itm_logit"] for entry in found} for found in (one, other)]
        # A token next to the edge between two bf16 values may round otherwise in a batch of another size.
        assert logits[0] == pytest.approx(logits[1], abs=2e-3)
    names = [Path(path).name for path in paths]
    moved = build(pipe, rows_of(paths, names), tmp_path / "moved")
    told = "needs the photo of item '0.*neither its path, nor a thumbnail, nor image tokens.*store_tokens=True"
    with pytest.raises(ValueError, match=told):
        pipe(titles[0], gallery=moved)
    assert len(pipe(titles[0], gallery=moved, rerank=0)) == 5
    relative = Gallery.open(tmp_path / "g", photo_root=tmp_path)  # absolute paths stay what they are
    assert_close(pipe(titles[:2], gallery=relative), pipe(titles[:2], gallery=without))


def rows_of(paths, names):
    """Photos as bytes, of which nobody can say later where they were."""
    return [{"image": Path(path).read_bytes(), "id": name} for path, name in zip(paths, names, strict=True)]


def test_thumbnails_stand_in_for_photos_that_nobody_can_read(pipe, paths, titles, gallery, tmp_path):
    names = [Path(path).name for path in paths]
    small = build(pipe, rows_of(paths, names), tmp_path / "g", thumbnails=True)
    found = {entry["id"]: entry["itm_logit"] for entry in pipe(titles[0], gallery=small, top_k=COUNT)}
    expected = {Path(entry["id"]).name: entry["itm_logit"] for entry in pipe(titles[0], gallery=gallery, top_k=COUNT)}
    assert found == pytest.approx(expected, abs=0.3) and found != expected  # JPEG


def test_relative_paths(pipe, paths, titles, gallery, tmp_path, monkeypatch):
    root = Path(paths[0]).parent
    monkeypatch.chdir(root)
    names = [Path(path).name for path in paths]
    build(pipe, names, tmp_path / "g")
    monkeypatch.chdir(tmp_path)
    expected = pipe(titles[0], gallery=gallery)
    for found in (pipe(titles[0], gallery="g"), pipe(titles[0], gallery=Gallery.open("g", photo_root=root))):
        assert [str(root / entry["id"]) for entry in found] == [entry["id"] for entry in expected]
        assert found[0]["path"] == found[0]["id"]
    with pytest.raises(
        ValueError, match=r"item '0\d\d.png', 0\d\d.png: the image file is missing: .*/0\d\d.png. Set the gal"
    ):
        pipe(titles[0], gallery=Gallery.open("g", photo_root=tmp_path))


def test_filters_and_columns(pipe, paths, titles, tmp_path):
    rows = [{"image": path, "id": place, "price": place * 1.5} for place, path in enumerate(paths)]
    gallery = build(pipe, rows, tmp_path / "g")
    everything = pipe(titles[:2], gallery=gallery, top_k=COUNT)
    cheap = pipe(titles[:2], gallery=gallery, top_k=COUNT, where="price < :most", values={"most": 8}, batch_size=2)
    assert_close(cheap, [[entry for entry in found if entry["price"] < 8] for found in everything])
    assert [len(found) for found in cheap] == [6, 6]
    assert pipe(titles[:2], gallery=gallery, where={"price": -1.0}) == [[], []]
    preset = AliBlipImageTextRetrievalPipeline(
        pipe.model, pipe.processor, device="cpu", gallery=gallery, where={"price": ("<", 8)}, top_k=COUNT
    )
    assert_close(preset(titles[0]), cheap[0])
    with pytest.raises(ValueError, match="'colour'.*the columns are id .int64., price .double."):
        pipe(titles[0], gallery=gallery, where={"colour": "red"})
    with pytest.raises(ValueError, match="a list has no filters"):
        pipe(titles[0], gallery=paths, direction="text-to-image", where={"price": 1})


def test_mistakes(pipe, paths, titles, gallery, text_gallery, tmp_path):
    for call, message in (
        ({}, "nothing to search in: give gallery="),
        ({"gallery": gallery, "direction": "image-to-text"}, "'image-to-text', but the gallery holds images"),
        ({"gallery": gallery, "direction": "sideways"}, "choose one of text-to-image, image-to-text"),
        ({"gallery": gallery, "top_k": 0}, "top_k is 0: give a whole number of at least 1"),
        ({"gallery": gallery, "rerank": -1}, "rerank is -1"),
        ({"gallery": gallery, "approximate": True}, "the gallery has no index: call create_index"),
        ({"gallery": tmp_path / "nowhere"}, "nowhere does not exist: give the folder of a gallery"),
        ({"gallery": tmp_path}, "is no gallery: give what python -m aliblip.gallery or Gallery.build made"),
        ({"gallery": 7}, "gallery is a int: give a gallery, its folder, or a list"),
        ({"gallery": text_gallery}, "the image file is missing .a str is a path or an address here, because the"),
        ({"gallery": text_gallery, "direction": "text-to-text"}, "titles with titles can be compared by ITC only"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(titles[0], **call)
    with pytest.raises(ValueError, match="photos with photos can be compared by ITC only: search with rerank=0"):
        pipe(Path(paths[0]), gallery=gallery)
    with pytest.raises(ValueError, match="the query '  ' can't be used: the title has no visible character"):
        pipe("  ", gallery=gallery)
    with pytest.raises(ValueError, match="needs a processor"):
        AliBlipImageTextRetrievalPipeline(pipe.model)
    with pytest.raises(TypeError, match="topk"):
        pipe(titles[0], gallery=gallery, topk=3)
    other = pipeline(TASK, model=tiny.spread_model(seed=1), processor=pipe.processor, device="cpu")
    with pytest.raises(ValueError, match="built with another model"):
        other(titles[0], gallery=gallery)


def test_a_title_is_never_opened_as_a_file(pipe, paths, gallery, monkeypatch):
    monkeypatch.setattr(reading_aliblip, "open_image", None)
    for title in (paths[0], "http://127.0.0.1/cup.png", "/etc/hostname"):
        assert pipe(title, gallery=gallery)


def test_many_threads_get_what_one_gets(pipe, paths, titles, gallery, text_gallery):
    calls = [(title, gallery) for title in titles] + [(path, text_gallery) for path in paths]
    expected = [pipe(query, gallery=among) for query, among in calls]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda call: pipe(call[0], gallery=call[1]), calls * 3))
    assert_close(results, expected * 3)


def test_positions_mean_the_same_from_the_search_to_the_results(pipe, paths, titles, tmp_path, monkeypatch):
    changing = build(pipe, paths, tmp_path / "g", store_tokens=True)
    preset = AliBlipImageTextRetrievalPipeline(pipe.model, pipe.processor, device="cpu", gallery=changing)
    expected, plain = preset(titles[0], top_k=COUNT), Gallery.search

    def search(gallery, *args, **options):
        found = plain(gallery, *args, **options)
        changing.remove([found[0][0]["id"]])
        return found

    monkeypatch.setattr(Gallery, "search", search)
    assert_close(preset(titles[0], top_k=COUNT), expected)
    monkeypatch.undo()
    assert len(preset(titles[0], top_k=COUNT)) == COUNT - 1  # the next call sees the change


def test_half_precision(paths, titles, gallery):
    half = pipeline(TASK, model=tiny.spread_model().bfloat16(), processor=tiny.processor(), device="cpu")
    for found in half(titles[:3], gallery=gallery):  # of the fp32 model, with stored tokens
        assert len(found) == 5 and all(entry["itm_logit"] is not None for entry in found)
    assert len(half(paths[0], gallery=titles)) == 5


FROM_THE_FOLDER = """
import json, sys
from transformers import pipeline

model, gallery, title, photo, *paths = sys.argv[1:]
pipe = pipeline("image-text-retrieval", model=model, trust_remote_code=True, device="cpu")
try:
    pipe(title, gallery=gallery)
except ValueError as error:
    refused = str(error)
by_title = pipe(title, gallery=paths, direction="text-to-image")
by_photo = pipe(photo, gallery=["red cup", "blue lamp"])
print(json.dumps([by_title, by_photo, type(pipe).__module__, refused]))
pipe.save_pretrained(model + "-again")
"""


def test_saved_and_opened_in_a_process_without_this_code(pipe, paths, titles, folder, gallery, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["custom_pipelines"][TASK]["impl"] == "pipeline_aliblip.AliBlipImageTextRetrievalPipeline"
    env = environment(HF_MODULES_CACHE=str(tmp_path / "modules"), PYTHONSAFEPATH="1")
    del env["PYTHONPATH"]
    # -I -S would lose the installed libraries; an editable install of this project is hidden instead.
    hide = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
    hide += "sys.path = [p for p in sys.path if 'site-packages' in p or 'python3' in p]\n"
    hide += "assert __import__('importlib.util').util.find_spec('aliblip') is None\n"
    command = [sys.executable, "-c", hide + FROM_THE_FOLDER, tmp_path / "model", folder, titles[0], paths[0], *paths]
    ended = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    by_title, by_photo, module, refused = json.loads(
        next(line for line in ended.stdout.splitlines() if line.startswith("[["))
    )
    assert module.startswith("transformers_modules.") and module.endswith(".pipeline_aliblip")
    assert_close(by_title, pipe(titles[0], gallery=gallery))
    assert 'opened by the package aliblip: install it (pip install "aliblip[gallery]")' in refused
    assert_close(by_photo, pipe(paths[0], gallery=["red cup", "blue lamp"]))
    names = {path.name for path in (tmp_path / "model-again").iterdir()}
    assert names == {path.name for path in (tmp_path / "model").iterdir()}
    assert {"gallery_aliblip.py", "retrieval_aliblip.py", "processing_aliblip.py", "processor_config.json"} <= names
