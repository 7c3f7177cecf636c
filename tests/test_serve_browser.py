"""The search page in a real browser, at the widths of a screen, a tablet and a phone."""

from __future__ import annotations

import re
import shutil
from urllib.parse import urlsplit

import pytest
import tiny
from served import HOSTILE, LONG, ROWS, WEIGHT, catalogue_server, needs_gradio

TITLE = tiny.titles(1, seed=1)[0]
SIZES = {1280: (4, 800), 768: (3, 1024), 390: (2, 844)}  # width: columns, height
TOLD = f"ordered by match logit + {WEIGHT} × ITC similarity"

pytestmark = needs_gradio


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with catalogue_server(tmp_path_factory.mktemp("browser"), "--top_k", ROWS) as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = next((path for name in names if (path := shutil.which(name))), None)
    with api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        except api.Error as error:
            pytest.skip(f"no browser can be started: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture
def opened(server, browser):
    """Opens the page at a width; fails where the page asks another host, or a text of the data runs as a script."""
    pages, hosts, dialogs = [], set(), []

    def open_page(width: int):
        page = browser.new_page(viewport={"width": width, "height": SIZES[width][1]})
        pages.append(page)
        page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
        page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
        # The page has to work without the internet.
        page.route(lambda url: urlsplit(url).hostname not in ("127.0.0.1", None), lambda route: route.abort())
        page.goto(server.url)
        page.get_by_label("Title").wait_for()
        return page

    yield open_page
    told = [page.title() for page in pages]
    for page in pages:
        page.close()
    assert hosts - {None} == {"127.0.0.1"} and not dialogs and set(told) == {"Photo search"}


def enter(page, label: str, text: str) -> None:
    """Type into a field and press Enter, no faster than the page takes over what was typed."""
    page.get_by_label(label).fill(text)
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    page.get_by_label(label).press("Enter")


def search(page, title: str) -> None:
    enter(page, "Title", title)
    page.get_by_text(TOLD).wait_for(timeout=60_000)
    shown(page)


def shown(page) -> None:
    page.wait_for_function("[...document.querySelectorAll('.tile img')].every(image => image.naturalWidth > 0)")


BOXES = """() => [...document.querySelectorAll('.tile')].map(tile => {
  const box = element => { const {left, right, top, bottom} = element.getBoundingClientRect();
    return {left, right, top, bottom}; };
  const image = tile.querySelector('img'), style = getComputedStyle(image);
  return {tile: box(tile), photo: box(image), caption: box(tile.querySelector('figcaption')),
    text: tile.querySelector('figcaption').innerText, size: [image.naturalWidth, image.naturalHeight],
    fit: style.objectFit};
})"""


@pytest.mark.parametrize("width", SIZES)
def test_whole_photos_with_captions_below_them_at_every_width(server, opened, width, tmp_path):
    columns, height = SIZES[width]
    page = opened(width)
    search(page, TITLE)
    page.screenshot(path=tmp_path / f"{width}.png")
    tiles = page.evaluate(BOXES)
    wanted = server.pipe(TITLE, gallery=server.gallery, top_k=ROWS, rerank=64, fusion_weight=WEIGHT)
    assert len(tiles) == ROWS
    for rank, (tile, result) in enumerate(zip(tiles, wanted, strict=True), 1):
        first, price, score = tile["text"].replace("\N{NO-BREAK SPACE}", " ").splitlines()
        assert first == f"{rank}. {result['title']}" and price.startswith("price: ")
        assert re.fullmatch(rf"score {result['score']:.2f} · ITC {result['itc']:.2f} · match \d+ %", score)
        assert tile["caption"]["top"] >= tile["photo"]["bottom"] - 1
        assert tile["caption"]["bottom"] - tile["caption"]["top"] >= 40
        for box in (tile["tile"], tile["photo"], tile["caption"]):
            assert 0 <= box["left"] < box["right"] <= width
        assert tile["fit"] == "contain"
    places = [tile["tile"]["left"] for tile in tiles]
    assert len(set(places)) == columns and places[:columns] == sorted(set(places))
    # Of the first result photo and caption can be seen without a step further, and nothing is wider than the window.
    assert tiles[0]["photo"]["top"] >= 0 and tiles[0]["caption"]["top"] + 40 <= height
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_every_text_is_shown_as_it_is_and_every_photo_whole(server, opened):
    page = opened(390)
    search(page, TITLE)
    tiles = page.evaluate(BOXES)
    texts = [tile["text"] for tile in tiles]
    assert len(tiles) == ROWS and all(any(title in text for text in texts) for title in (HOSTILE, LONG))
    assert {(240, 60), (60, 240)} <= {tuple(tile["size"]) for tile in tiles}
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.get_by_text("All scores").click()
    page.get_by_role("columnheader", name="match probability").wait_for()
    assert page.locator(".scores tbody tr").count() == ROWS
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_photo_is_searched_for_without_columns_of_itm(server, opened, tmp_path):
    page = opened(390)
    page.get_by_role("tab", name="By photo").click()
    page.locator("input[accept='image/*']").first.set_input_files(server.photos[7])
    page.get_by_text("24 of 24 photos, ordered by ITC similarity").wait_for(timeout=60_000)
    texts = page.locator(".tile figcaption").all_inner_texts()
    assert texts[0].startswith(f"1. {server.rows[7]['title']}") and texts[0].endswith("ITC\N{NO-BREAK SPACE}1.00")
    assert not [text for text in texts if "match" in text or "score" in text]
    page.get_by_text("All scores").click()
    page.get_by_role("columnheader", name="ITC similarity").wait_for()
    heads = page.locator(".scores th").all_inner_texts()
    assert heads == ["rank", "title", "price", "ITC similarity"]
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a photo")
    page.get_by_label("Remove Image").or_(page.get_by_label("Clear")).first.click()
    page.locator("input[accept='image/*']").first.set_input_files(broken)
    page.get_by_text("This photo can't be used").wait_for(timeout=60_000)
    assert page.locator(".tile").count() == 0 and "Traceback" not in page.content()


def test_filters_narrow_the_search_and_search_again(server, opened):
    page = opened(1280)
    page.get_by_label("price from").wait_for()  # where there is room, the filters are open
    search(page, TITLE)
    page.get_by_label("category").click()
    page.get_by_role("option", name="lamp").click()
    page.get_by_text("photos with category lamp, ordered by").wait_for(timeout=60_000)
    enter(page, "price from", "20")
    page.get_by_text("photos with category lamp, price at least 20, ordered by").wait_for(timeout=60_000)
    titles = [text.splitlines()[0].split(". ", 1)[1] for text in page.locator(".tile figcaption").all_inner_texts()]
    rows = [row for row in server.rows if row["category"] == "lamp" and row["price"] >= 20]
    assert sorted(titles) == sorted(row["title"] for row in rows) and len(rows) < 8
    enter(page, "price from", "cheap")
    page.get_by_role("alert").get_by_text("'price' takes numbers").wait_for(timeout=60_000)


def test_examples_are_titles_of_the_gallery_and_are_searched_for_by_a_click(server, opened):
    page = opened(390)
    page.locator("[data-example]").first.wait_for()
    examples = page.locator("[data-example]").all_inner_texts()
    assert len(examples) == 5 and set(examples) <= {row["title"] for row in server.rows}
    page.locator("[data-example]").nth(1).click()
    page.get_by_text(TOLD).wait_for(timeout=60_000)
    assert page.get_by_label("Title").input_value() == examples[1]


def test_a_click_enlarges_a_photo_and_another_one_closes_it(opened):
    page = opened(768)
    search(page, TITLE)
    photo = page.locator(".tile img").first
    small = photo.bounding_box()
    photo.click()
    page.wait_for_function("document.querySelector('.tile img').getBoundingClientRect().width > 700")
    photo.click()
    page.wait_for_function("document.querySelector('.tile img').getBoundingClientRect().width < 300")
    assert photo.bounding_box() == small
