"""The search page over a gallery that `python -m aliblip.gallery` wrote: one server, asked by Gradio's client.

(In a browser: test_serve_browser. Started from photos: test_serve_start. Its parts: test_serve_parts.)
"""

from __future__ import annotations

import importlib
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
import tiny
from helpers import ROOT, free_port
from PIL import Image
from served import WEIGHT, catalogue_server, needs_gradio, started

from aliblip.retrieval.galleries import Gallery
from aliblip.retrieval.page_layout import page
from retrieval_aliblip import embed_texts

TITLES = tiny.titles(6, seed=1)
FIELDS = {"id", "score", "itc", "itm_logit", "itm_probability"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with catalogue_server(tmp_path_factory.mktemp("serve"), "--max_upload_mb", 1) as server:
        yield server


def connected(server):
    """A client, for one thread: in several at once it takes the end of one answer for that of all."""
    return importlib.import_module("gradio_client").Client(server.url, verbose=False)


@pytest.fixture(scope="module")
def client(server):
    return connected(server)


def upload(path: str | Path):
    return importlib.import_module("gradio_client").handle_file(str(path))


def wanted(server, query, **options) -> list[dict]:
    """What the pipeline finds."""
    return server.pipe(query, gallery=server.gallery, fusion_weight=WEIGHT, **options)


def assert_same(found: list[dict], wanted: list[dict]) -> None:
    assert [result["id"] for result in found] == [result["id"] for result in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert set(one) == FIELDS | {"columns"}
        assert {name: one[name] for name in FIELDS} == pytest.approx({name: other[name] for name in FIELDS}, abs=1e-4)
        assert one["columns"] == pytest.approx({name: other[name] for name in ("title", "price")})


@needs_gradio
def test_titles_and_photos_are_answered_as_by_the_pipeline(server, client):
    for title in TITLES[:2]:
        for top_k, rerank in ((3, 12), (5, 5), (4, 0)):
            found = client.predict(title, top_k, rerank, api_name="/search_by_title")
            assert_same(found, wanted(server, title, top_k=top_k, rerank=rerank))
            assert len(found) == top_k
    for number in (0, 5):
        photo = server.photos[number]
        found = client.predict(upload(photo), 4, api_name="/search_by_photo")
        assert found[0]["id"] == f"sku-{number:02}" and found[0]["itc"] == pytest.approx(1, abs=1e-5)
        assert_same(found, wanted(server, Image.open(photo), direction="image-to-image", top_k=4, rerank=0))


@needs_gradio
def test_filters_are_applied_before_the_search(server, client):
    filters = {"category": ["lamp", "cup"], "price": {"min": 20, "max": 90.5}}
    found = client.predict(TITLES[0], 100, 8, filters, api_name="/search_by_title")
    rows = [row for row in server.rows if row["category"] in ("lamp", "cup") and 20 <= row["price"] <= 90.5]
    assert {result["id"] for result in found} == {row["sku"] for row in rows} and 3 < len(rows) < len(server.rows)
    where = {"where": "category IN ('lamp', 'cup') AND price >= 20 AND price <= 90.5"}
    assert_same(found, wanted(server, TITLES[0], top_k=100, rerank=8, **where))
    found = client.predict(upload(server.photos[0]), 100, {"category": "bag"}, api_name="/search_by_photo")
    assert {result["id"] for result in found} == {row["sku"] for row in server.rows if row["category"] == "bag"}
    assert client.predict(TITLES[0], 9, 8, {"category": "x' OR '1'='1"}, api_name="/search_by_title") == []


@needs_gradio
def test_searches_at_once_get_each_their_own_answer(server):
    right = [wanted(server, title, top_k=3, rerank=8) for title in TITLES]
    assert len({tuple(result["id"] for result in results) for results in right}) > 1
    clients = [connected(server) for _ in range(4)]

    def ask(number: int) -> list:
        """The titles in another order for each."""
        return [
            clients[number].predict(TITLES[(number + step) % 6], 3, 8, api_name="/search_by_title") for step in range(6)
        ]

    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(ask, range(4)))
    for number, results in enumerate(answers):
        for step, result in enumerate(results):
            assert_same(result, right[(number + step) % 6])


@needs_gradio
def test_mistakes_are_told_in_words(server, client, tmp_path):
    from gradio_client.exceptions import AppError

    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(server.photos[0]).read_bytes()[:120])
    text = tmp_path / "text.jpg"
    text.write_text("not a photo")
    bomb = tmp_path / "bomb.png"
    Image.new("1", (30_000, 30_000)).save(bomb)
    for file, message in ((broken, "can't be decoded"), (text, "not an image"), (bomb, "more than 89,478,485 pixels")):
        with pytest.raises(AppError, match=f"This photo can't be used: .*{message}") as error:
            client.predict(upload(file), 3, api_name="/search_by_photo")
        assert "/" not in str(error.value)
    with pytest.raises(AppError, match="Drop a photo first"):
        client.predict(None, 3, api_name="/search_by_photo")
    with pytest.raises(AppError, match="Type what you are looking for"):
        client.predict(" \n", 3, 8, api_name="/search_by_title")
    for top_k, rerank in ((101, 8), (0, 8), (2.5, 8), (3, 513), (3, -1)):
        with pytest.raises(AppError, match="maximum|minimum|whole number"):
            client.predict("cup", top_k, rerank, api_name="/search_by_title")
    for filters, message in (
        ({"title": "x"}, "no filter of this page; filters: category, price"),
        ({"price": {"min": "cheap"}}, "takes numbers"),
        ("category", "give {"),
    ):
        with pytest.raises(AppError, match=message):
            client.predict("cup", 3, 8, filters, api_name="/search_by_title")


@needs_gradio
def test_only_uploads_can_be_reached(server):
    import httpx

    address = f"{server.url}/gradio_api/upload"

    def posted(name: str, body: bytes) -> str:
        (stored,) = httpx.post(address, files={"files": (name, body)}).json()
        return stored

    def ask(photo: dict) -> str:
        """What the page answers to a photo, as raw events."""
        call = httpx.post(f"{server.url}/gradio_api/call/search_by_photo", json={"data": [photo, 3, None]})
        if call.status_code != 200:
            return "refused"
        return httpx.get(f"{server.url}/gradio_api/call/search_by_photo/{call.json()['event_id']}", timeout=60).text

    marked = {"meta": {"_type": "gradio.FileData"}}
    mine = posted("mine.png", Path(server.photos[0]).read_bytes())
    assert "event: complete" in ask({"path": mine} | marked)
    for photo in (
        {"path": server.photos[0]},
        {"path": str(server.folder / "server.log")},
        {"path": str(server.folder / "gone.png")},
        {"path": f"{mine}/../../../../photos/000.png"},
        {"path": f"{server.url}/x.png"},
        {"path": None, "url": "data:image/png;base64,aGVsbG8="},
    ):
        # Without its mark Gradio takes a path for plain data, and looks at none.
        for sent in (photo, photo | marked, photo | {"meta": {}}, photo | marked | {"is_stream": True}):
            told = ask(sent)
            assert "event: complete" not in told and str(server.folder) not in told, sent

    # The functions of the page itself are hidden, not closed.
    config = httpx.get(f"{server.url}/config").json()
    kinds = {one["id"]: one["type"] for one in config["components"]}

    def ask_the_page(photo: dict) -> str:
        """What all of its functions that take a photo answer."""
        given, told = {"image": photo, "slider": 3, "textbox": "", "dropdown": [], "state": "photo", "json": None}, ""
        for one in config["dependencies"]:
            asked = [kinds[number] for number in one["inputs"]]
            if "image" in asked:
                session = f"s{one['id']}"
                call = {"data": [given[kind] for kind in asked], "fn_index": one["id"], "session_hash": session}
                assert httpx.post(f"{server.url}/gradio_api/queue/join", json=call).status_code == 200
                told += httpx.get(f"{server.url}/gradio_api/queue/data?session_hash={session}", timeout=60).text
        return told

    assert "ordered by ITC similarity" in ask_the_page({"path": mine} | marked)
    for sent in ({"path": server.photos[0]}, {"path": server.photos[0]} | marked):
        told = ask_the_page(sent)
        assert "ordered by" not in told and '"success":true' not in told.replace(" ", "")
    files = [server.photos[0], str(server.folder / "model" / "config.json"), str(server.folder / "none"), "/etc/passwd"]
    answers = [httpx.get(f"{server.url}/gradio_api/file={file}") for file in (*files, "http://127.0.0.1/")]
    assert {(answer.status_code, answer.text) for answer in answers} == {(404, "not found")}
    assert httpx.get(f"{server.url}/gradio_api/file={mine}").content == Path(server.photos[0]).read_bytes()
    # Too large; and a small one under a name that should not be written anywhere.
    assert httpx.post(address, files={"files": ("a.png", b"0" * (2**20 + 1))}).status_code == 413
    for name, kept in (("my secret.PNG", "photo.png"), ("../../x.sh", "photo"), ('q"uo"te.jpg', "photo.jpg")):
        stored = Path(posted(name, name.encode()))
        assert stored.name == kept and stored.read_bytes() == name.encode()
        assert stored.is_relative_to(server.folder / "uploads")
    two = [("files", (f"secret {number}.png", f"{number}".encode() * 10**5)) for number in (1, 2)]
    stored = [Path(file) for file in httpx.post(address, files=two).json()]
    assert [(file.name, file.read_bytes()) for file in stored] == [("photo.png", body) for _, (_, body) in two]
    assert not [file for file in server.folder.rglob("*") if "secret" in file.name]


@needs_gradio
def test_a_space_is_two_lines_and_variables(server, tmp_path):
    """`app.py` as the documentation gives it; a Space says where to listen."""
    told = "".join(file.read_text() for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))))
    lines = re.search(r"`app\.py` is `(.*?)` and `(.*?)`", told).groups()
    (tmp_path / "app.py").write_text("\n".join(lines))
    port = free_port()
    variables = {"MODEL_NAME_OR_PATH": server.folder / "model", "GALLERY": server.folder / "gallery"}
    variables |= {"FUSION_WEIGHT": WEIGHT, "SHOW_COLUMNS": "title,price"}
    env = {f"ALIBLIP_{name}": str(value) for name, value in variables.items()}
    env |= {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1"}
    with started([sys.executable, tmp_path / "app.py"], tmp_path / "log", **env):
        client = importlib.import_module("gradio_client").Client(f"http://127.0.0.1:{port}", verbose=False)
        found = client.predict(TITLES[0], 3, 12, api_name="/search_by_title")
        assert_same(found, wanted(server, TITLES[0], top_k=3, rerank=12))


@needs_gradio
def test_what_other_processes_put_in_is_found_and_no_search_fails_meanwhile(server, client):
    """The gallery is changed here, in another process than the page's, while threads search."""
    gallery = Gallery.open(server.gallery.uri)
    tokens = server.pipe.encoder.tokenize([TITLES[5]])
    vector = embed_texts(server.pipe.model, *tokens)[0].tolist()  # as similar as can be
    names, known = {row["sku"] for row in server.rows}, set()
    stop, answers = threading.Event(), []

    def ask(client) -> None:
        while not stop.is_set():
            answers.append([result["id"] for result in client.predict(TITLES[5], 100, 0, api_name="/search_by_title")])

    with ThreadPoolExecutor(3) as threads:
        jobs = [threads.submit(ask, connected(server)) for _ in range(3)]
        try:
            for number in range(6):
                new = {"id": [f"new-{number}"], "title": ["cup"], "category": ["vase"], "price": [1.0]}
                gallery.upsert_vectors(pa.table(new | {"vector": pa.array([vector], pa.list_(pa.float32(), 16))}))
                known.add(f"new-{number}")
                found = client.predict(TITLES[5], 100, 0, api_name="/search_by_title")
                assert {result["id"] for result in found} == names | known
                assert found[0]["itc"] == pytest.approx(1, abs=1e-5)
            gallery.remove(where={"category": "vase"})
            assert len(client.predict(TITLES[5], 100, 0, api_name="/search_by_title")) == len(names)
        finally:
            stop.set()
    assert all(job.result() is None for job in jobs) and len(answers) > 6
    for answer in answers:  # each is one version: the new ones came one after another, and went together
        new = {name for name in answer if name not in names}
        assert set(answer) - new == names and new == {f"new-{number}" for number in range(len(new))}


class NoGallery:
    columns, version = (), 1

    def __len__(self) -> int:
        return 3

    def sample(self, n: int) -> list:
        return []


@needs_gradio
def test_the_api_is_two_named_endpoints_and_nothing_of_the_page():
    gallery = NoGallery()
    searcher = SimpleNamespace(gallery=gallery, by_title=None, by_photo=None, filters=[], examples=list)
    searcher.current = lambda: gallery
    info = page(searcher).get_api_info()
    assert set(info["named_endpoints"]) == {"/search_by_title", "/search_by_photo"} and not info["unnamed_endpoints"]
    parameters = info["named_endpoints"]["/search_by_title"]["parameters"]
    assert [given["parameter_name"] for given in parameters] == ["title", "top_k", "rerank", "filters"]
    assert parameters[-1]["parameter_has_default"]
