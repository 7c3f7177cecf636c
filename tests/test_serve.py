"""The search page: one server process, asked over HTTP by Gradio's client and by a real browser."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
import tiny
from helpers import ROOT, environment, free_port
from PIL import Image

from aliblip import serve
from aliblip.runtime.mistakes import UsageError
from aliblip.serve import ServeArguments
from gallery_aliblip import Gallery
from pipeline_aliblip import AliBlipImageTextRetrievalPipeline

needs_gradio = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="gradio is not installed")
TITLES = tiny.titles(6, seed=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "model"
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
        process.wait(30)


@pytest.fixture(scope="module")
def server(model):
    """A started page over twelve photos, with the pipeline and the gallery that its answers have to be those of."""
    folder = model.parent
    photos = tiny.photos(folder / "photos", 12)
    Path(folder / "photos" / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 torn")
    port, log = free_port(), folder / "server.log"
    command = [sys.executable, "-m", "aliblip.serve", "--model_name_or_path", model, "--gallery", folder / "photos"]
    command += ["--gallery_dir", folder / "gallery", "--server_port", port, "--max_upload_mb", 1]
    with started(command, log, GRADIO_TEMP_DIR=str(folder / "uploads"), HF_HUB_OFFLINE="1"):
        loaded, processor, _ = serve.load_pretrained(str(model))
        pipe = AliBlipImageTextRetrievalPipeline(model=loaded, processor=processor)
        yield SimpleNamespace(
            url=f"http://127.0.0.1:{port}",
            folder=folder,
            photos=photos,
            pipe=pipe,
            gallery=Gallery.load(folder / "gallery"),
            log=log,
        )


@pytest.fixture(scope="module")
def client(server):
    return importlib.import_module("gradio_client").Client(server.url, verbose=False)


def upload(path: str | Path):
    return importlib.import_module("gradio_client").handle_file(str(path))


def assert_same(found: list[dict], wanted: list[dict]) -> None:
    assert [result["id"] for result in found] == [result["id"] for result in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx({name: other[name] for name in one}, abs=1e-5)


@needs_gradio
def test_titles_and_photos_are_answered_as_by_the_pipeline(server, client):
    assert len(server.gallery) == 12 and [entry["id"] for entry in server.gallery.skipped] == ["torn.jpg"]
    for title in TITLES[:2]:
        for top_k, rerank in ((3, 12), (5, 5), (4, 0)):
            found = client.predict(title, top_k, rerank, api_name="/search_by_title")
            assert_same(found, server.pipe(title, gallery=server.gallery, top_k=top_k, rerank=rerank))
            assert len(found) == top_k and "path" not in found[0]
    for photo in server.photos[:2]:
        found = client.predict(upload(photo), 4, api_name="/search_by_photo")
        assert found[0]["id"] == Path(photo).name and found[0]["itc"] == pytest.approx(1, abs=1e-5)
        wanted = server.pipe(Image.open(photo), gallery=server.gallery, direction="image-to-image", top_k=4, rerank=0)
        assert_same(found, wanted)


@needs_gradio
def test_a_space_is_two_lines_and_variables(server, model, tmp_path):
    """`app.py` as the README gives it, over a gallery that is there already; a Space says where to listen."""
    lines = re.search(r"`app\.py` is `(.*?)` and `(.*?)`", (ROOT / "README.md").read_text()).groups()
    (tmp_path / "app.py").write_text("\n".join(lines))
    port = free_port()
    variables = {
        "MODEL_NAME_OR_PATH": model,
        "GALLERY": server.folder / "gallery",
        "PHOTO_ROOT": server.folder / "photos",
    }
    env = {f"ALIBLIP_{name}": str(value) for name, value in variables.items()}
    env |= {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1"}
    with started([sys.executable, tmp_path / "app.py"], tmp_path / "log", **env):
        client = importlib.import_module("gradio_client").Client(f"http://127.0.0.1:{port}", verbose=False)
        found = client.predict(TITLES[0], 3, 12, api_name="/search_by_title")
        assert_same(found, server.pipe(TITLES[0], gallery=server.gallery, top_k=3, rerank=12))


@needs_gradio
def test_searches_at_once_get_each_their_own_answer(server, client):
    wanted = [server.pipe(title, gallery=server.gallery, top_k=3, rerank=8) for title in TITLES]
    assert len({tuple(result["id"] for result in results) for results in wanted}) > 1
    with ThreadPoolExecutor(4) as threads:
        jobs = [threads.submit(client.predict, title, 3, 8, api_name="/search_by_title") for title in TITLES * 2]
    for job, results in zip(jobs, wanted * 2, strict=True):
        assert_same(job.result(), results)


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
        with pytest.raises(AppError, match=f"This photo can't be used: .*{message}"):
            client.predict(upload(file), 3, api_name="/search_by_photo")
    with pytest.raises(AppError, match="Drop a photo first"):
        client.predict(None, 3, api_name="/search_by_photo")
    with pytest.raises(AppError, match="Type what you are looking for"):
        client.predict(" \n", 3, 8, api_name="/search_by_title")
    for top_k, rerank in ((101, 8), (0, 8), (2.5, 8), (3, 513), (3, -1)):
        with pytest.raises(AppError, match="maximum|minimum|whole number"):
            client.predict("cup", top_k, rerank, api_name="/search_by_title")


@needs_gradio
def test_only_uploads_and_thumbnails_can_be_reached(server):
    import httpx

    def ask(photo: dict) -> str:
        """What the page answers to a photo that no upload made, as raw events."""
        data = {"data": [{"meta": {"_type": "gradio.FileData"}} | photo, 3]}
        call = httpx.post(f"{server.url}/gradio_api/call/search_by_photo", json=data)
        if call.status_code != 200:
            return "refused"
        return httpx.get(f"{server.url}/gradio_api/call/search_by_photo/{call.json()['event_id']}", timeout=60).text

    for photo in (
        {"path": server.photos[0]},
        {"path": str(server.folder / "server.log")},
        {"path": f"{server.url}/x.png"},
        {"path": None, "url": "data:image/png;base64,aGVsbG8="},
    ):
        assert "event: complete" not in ask(photo), photo
    for file in (server.photos[0], str(server.folder / "model" / "config.json"), "/etc/passwd"):
        assert httpx.get(f"{server.url}/gradio_api/file={file}").status_code in (403, 404)
    # Too large; and a small one under a name that should not be written anywhere.
    address = f"{server.url}/gradio_api/upload"
    assert httpx.post(address, files={"files": ("a.png", b"0" * (2**20 + 1))}).status_code == 413
    for name, kept in (("my secret.PNG", "photo.png"), ("../../x.sh", "photo"), ('q"uo"te.jpg', "photo.jpg")):
        (stored,) = httpx.post(address, files={"files": (name, name.encode())}).json()
        assert Path(stored).name == kept and Path(stored).read_bytes() == name.encode()
        assert Path(stored).is_relative_to(server.folder / "uploads")
    two = [("files", (f"secret {number}.png", f"{number}".encode() * 10**5)) for number in (1, 2)]
    stored = [Path(file) for file in httpx.post(address, files=two).json()]
    assert [(file.name, file.read_bytes()) for file in stored] == [("photo.png", body) for _, (_, body) in two]
    assert not [file for file in server.folder.rglob("*") if "secret" in file.name]


@pytest.mark.parametrize("size", [1, 100, 10**4, 10**6])
def test_uploads_are_nameless_however_they_arrive(size):
    def form(*names: bytes) -> bytes:
        parts = [
            b'--frontier\r\nContent-Disposition: form-data; name="files"; filename=' + name + b"\r\n"
            b"Content-Type: image/png\r\n\r\n" + body + b"\r\n"
            for name, body in zip(names, (b"one \r\n\r\n --front" * 5000, b'filename="kept.txt"'), strict=True)
        ]
        return b"".join(parts) + b"--frontier--\r\n"

    sent = form(b'"my.png"', b"plain.sh")
    pieces = [sent[start : start + size] for start in range(0, len(sent), size)]
    messages = [
        {"type": "http.request", "body": piece, "more_body": number < len(pieces)}
        for number, piece in enumerate(pieces, 1)
    ]
    got = []

    async def app(scope, receive, send):
        more = True
        while more:
            message = await receive()
            got.append(message["body"])
            more = message["more_body"]

    async def receive():
        return messages.pop(0)

    scope = {"type": "http", "path": "/gradio_api/upload"}
    scope["headers"] = [(b"content-type", b"multipart/form-data; boundary=frontier")]
    asyncio.run(serve.NamelessUploads(app)(scope, receive, None))
    assert b"".join(got) == form(b'"photo.png"', b'"photo"')


def browser_path() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((path for name in names if (path := shutil.which(name))), None)


@needs_gradio
def test_in_a_browser(server, tmp_path):
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        try:
            options = {"executable_path": browser_path(), "args": ["--no-sandbox", "--disable-gpu"]}
            browser = playwright.chromium.launch(**options)
        except api.Error as error:
            pytest.skip(f"no browser can be started: {str(error).splitlines()[0]}")
        page = browser.new_page(viewport={"width": 1200, "height": 860})
        hosts = set()
        page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
        page.route(
            lambda url: urlsplit(url).hostname not in ("127.0.0.1", None), lambda route: route.abort()
        )  # the page has to work without the internet
        page.goto(server.url)
        page.get_by_label("Title").fill(TITLES[0])
        page.get_by_label("Title").press("Enter")
        wanted = server.pipe(TITLES[0], gallery=server.gallery, top_k=12, rerank=64)
        page.get_by_text(re.compile(rf"^1\. {wanted[0]['id']}  ?ITC")).first.wait_for(timeout=60_000)
        captions = [text.strip() for text in page.locator(".caption-label").all_inner_texts()]
        assert [caption.split()[1] for caption in captions] == [result["id"] for result in wanted]
        assert all("ITC" in caption and re.search(r"match \d+ %$", caption) for caption in captions)
        page.wait_for_function(
            "[...document.querySelectorAll('.grid-container img')].filter(i => i.naturalWidth > 0).length == 12"
        )
        page.screenshot(path=tmp_path / "search.png")

        page.get_by_role("tab", name="By photo").click()
        page.locator("input[accept='image/*']").first.set_input_files(server.photos[7])
        page.get_by_text(re.compile(r"^1\. 007\.png  ?ITC 1\.00$")).first.wait_for(timeout=60_000)

        broken = tmp_path / "broken.png"
        broken.write_bytes(b"not a photo")
        page.get_by_label("Remove Image").or_(page.get_by_label("Clear")).first.click()
        page.locator("input[accept='image/*']").first.set_input_files(broken)
        page.get_by_text("This photo can't be used").first.wait_for(timeout=60_000)
        assert "Traceback" not in page.content()
        assert hosts - {None} == {"127.0.0.1"}
        browser.close()


@needs_gradio
def test_a_second_start_takes_the_kept_gallery_and_notices_other_photos(server, model, monkeypatch):
    monkeypatch.setenv("ALIBLIP_MODEL_NAME_OR_PATH", str(model))
    monkeypatch.setenv("ALIBLIP_TOP_K", "7")
    options = serve.from_environment(
        ServeArguments(gallery=str(server.folder / "photos"), gallery_dir=str(server.folder / "gallery"))
    )
    assert (options.model_name_or_path, options.top_k, options.rerank) == (str(model), 7, 64)
    before = {file.name: file.stat().st_mtime_ns for file in (server.folder / "gallery").iterdir()}
    searcher = serve.open_searcher(options)
    assert {file.name: file.stat().st_mtime_ns for file in (server.folder / "gallery").iterdir()} == before
    found = searcher.by_title(TITLES[3], 3, 6)
    assert_same(found, server.pipe(TITLES[3], gallery=server.gallery, top_k=3, rerank=6))
    picture = searcher.picture(searcher.gallery.item(2))
    assert picture.tobytes() == Image.open(server.photos[2]).convert("RGB").tobytes()
    grey = searcher.picture({"id": "gone.png", "path": None})
    assert grey.getcolors() == [(grey.width * grey.height, (200, 200, 200))]
    other = server.folder / "others"
    tiny.photos(other, 3)
    with pytest.raises(UsageError, match="other photos than .*(0 photos are new, 10 are gone).*--update_gallery"):
        serve.open_searcher(dataclasses.replace(options, gallery=str(other)))


@needs_gradio
def test_a_kept_gallery_is_brought_up_to_date(model, tmp_path, capsys):
    photos = [Path(path) for path in tiny.photos(tmp_path / "photos", 9)]
    aside = [path.rename(tmp_path / path.name) for path in photos[6:]]
    options = ServeArguments(
        model_name_or_path=str(model), gallery=str(tmp_path / "photos"), gallery_dir=str(tmp_path / "kept")
    )
    assert len(serve.open_searcher(options).gallery) == 6
    for path in aside[:2]:
        path.rename(tmp_path / "photos" / path.name)
    (tmp_path / "photos" / "torn.jpg").write_bytes(b"torn")
    photos[1].unlink()
    options.update_gallery = True
    for told in (["updating", "3 photos are new, 1 are gone"], []):  # the second time there is nothing to do
        searcher = serve.open_searcher(options)
        printed = capsys.readouterr().out
        assert all(part in printed for part in told) and ("updating" in printed) == bool(told)
        assert searcher.gallery.ids == [f"00{number}.png" for number in (0, 2, 3, 4, 5, 6, 7)]
        assert [entry["id"] for entry in searcher.gallery.skipped] == ["torn.jpg"]
    assert len(searcher.by_title(TITLES[0], 7, 7)) == 7
    assert searcher.picture(searcher.gallery.item(5)).tobytes() == Image.open(photos[6].parent / "006.png").tobytes()


@needs_gradio
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model_name_or_path": None}, "--model_name_or_path is missing"),
        ({"gallery": None}, "--gallery is missing (or the variable ALIBLIP_GALLERY)"),
        ({"gallery": "/none/here"}, "--gallery: /none/here does not exist"),
        ({"gallery": __file__}, "is a file"),
        ({"top_k": 0}, "--top_k is 0: it must be from 1 to 100"),
        ({"rerank": 10_000}, "--rerank is 10000"),
        ({"server_port": 99_999}, "--server_port is 99999"),
        ({"max_upload_mb": 0}, "--max_upload_mb is 0"),
        ({"photo_root": "/none/here"}, "--photo_root"),
    ],
)
def test_bad_flags_are_told_before_anything_is_loaded(given, message, tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "load_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    fine = {"model_name_or_path": str(tmp_path), "gallery": str(tmp_path)}
    with pytest.raises(UsageError, match=re.escape(message)):
        serve.open_searcher(ServeArguments(**(fine | given)))


def test_without_gradio_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=re.escape("pip install aliblip[serve]")):
        serve.check(ServeArguments())


class Named:
    """As much of a gallery as tells ids."""

    def __init__(self, *ids):
        self._ids = ids

    def __len__(self):
        return len(self._ids)

    def item(self, position):
        return {"id": self._ids[position]}


NAMED = Named("a/striped_blue-mug.jpg", "7.jpg", "IMG_0042.jpg", 3, "mug.png")


def test_examples_are_titles_made_of_the_names_of_photos():
    assert serve.example_titles(NAMED) == ["striped blue mug"]


@needs_gradio
def test_the_api_is_two_named_endpoints_and_nothing_of_the_page():
    searcher = SimpleNamespace(gallery=NAMED, by_title=None, by_photo=None)
    info = serve.page(searcher, ServeArguments()).get_api_info()
    assert set(info["named_endpoints"]) == {"/search_by_title", "/search_by_photo"} and not info["unnamed_endpoints"]
    names = [given["parameter_name"] for given in info["named_endpoints"]["/search_by_title"]["parameters"]]
    assert names == ["title", "top_k", "rerank"]
