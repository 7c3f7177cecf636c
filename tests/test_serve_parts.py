"""The parts of the search page: filters, tiles and what visitors may send and fetch, without a server."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import re
from html.parser import HTMLParser

import pyarrow as pa
import pytest
from PIL import Image

from aliblip.retrieval.page_filters import Filter, VisitorMistake, choices_of, choose_filters, condition_of, text_of
from aliblip.retrieval.page_search import example_words, order_told, problem_told, score_told
from aliblip.retrieval.page_tiles import (
    MOST_CHARACTERS,
    THUMBNAIL_SIDE,
    Tile,
    examples_html,
    mistake_html,
    table_html,
    tiles_html,
    to_jpeg,
)
from aliblip.retrieval.page_uploads import NamelessUploads, OwnFilesOnly, uploaded
from aliblip.runtime.mistakes import UsageError

HOSTILE = (
    """</h3><script>alert(1)</script><img src=x onerror='alert(2)'>&lt;b&gt; " onload="x" ${alert(3)} {{value}} `x`"""
)


class Table:
    """As much of a gallery as tells columns and values."""

    def __init__(self, **columns: list):
        self._table = pa.table(columns)
        self.columns, self.schema = list(columns), self._table.schema

    def __len__(self) -> int:
        return len(self._table)

    def values(self, column: str, limit: int = 50) -> list | None:
        found = self._table[column].unique().to_pylist()
        return None if len(found) > limit else found


@pytest.fixture
def table() -> Table:
    rows = 200
    return Table(
        category=[("mug", "lamp", "", None)[row % 4] for row in range(rows)],
        title=[f"title {row}" for row in range(rows)],
        price=pa.array([row / 10 for row in range(rows)], pa.float32()),
        stock=list(range(rows)),
        size=[row % 3 for row in range(rows)],
        sold=[row % 2 == 0 for row in range(rows)],
        brand=["one"] * rows,
        tags=[["a"]] * rows,
    )


# --- filters ----------------------------------------------------------------------------------------------------------


def test_the_default_filters_are_columns_with_few_values(table):
    found = choose_filters(table, None)
    assert found == [
        Filter("category", "text", ("lamp", "mug")),  # neither nothing nor null
        Filter("size", "integer", ("0", "1", "2")),
        Filter("sold", "flag", ("no", "yes")),
    ]
    assert choose_filters(table, None, left_out=["size", "sold"]) == found[:1]
    assert choose_filters(table, []) == []
    assert choose_filters(Table(name=["a", "b", "c"], kind=["x", "x", "x"]), None) == []


def test_named_filters_take_numbers_by_their_bounds(table):
    named = choose_filters(table, ["price", "stock", "size", "brand"])
    assert [(one.column, one.choices) for one in named] == [
        ("price", None),
        ("stock", None),
        ("size", ("0", "1", "2")),
        ("brand", ("one",)),
    ]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("colour", "no column 'colour'; it has category, title, price"),
        ("title", "'title' has neither numbers nor at most 50 different texts"),
        ("tags", "'tags' has neither numbers"),
    ],
)
def test_filters_that_make_no_sense_are_refused(table, name, told):
    with pytest.raises(UsageError, match=re.escape(told)):
        choose_filters(table, [name])


def test_choices_follow_the_gallery(table):
    before = choose_filters(table, ["category"])[0]
    more = Table(category=["mug", "cup"])
    assert choices_of(more, before) == ("cup", "mug")
    assert choices_of(Table(category=list(map(str, range(60)))), before) == before.choices


def test_what_was_chosen_reaches_the_gallery_as_values(table):
    filters = choose_filters(table, ["category", "price", "size", "sold"])
    hostile = "mug' OR 1=1 --"
    found = condition_of(filters, {"category": [hostile, "lamp"], "price": (2, "7.5"), "size": ["1"], "sold": "yes"})
    assert found.where == "`category` IN (:v0, :v1) AND `price` >= :v2 AND `price` <= :v3 AND `size` IN (:v4)" + (
        " AND `sold` IN (:v5)"
    )
    assert found.values == {"v0": hostile, "v1": "lamp", "v2": 2, "v3": 7.5, "v4": 1, "v5": True}
    assert found.told == [
        f"category {hostile} or lamp",
        "price at least 2",
        "price at most 7.5",
        "size 1",
        "sold yes",
    ]
    nothing = condition_of(filters, {"category": [], "price": (None, ""), "size": None, "sold": None})
    assert (nothing.where, nothing.values, nothing.told) == (None, {}, [])
    assert condition_of(filters, {"price": {"max": 3}}).where == "`price` <= :v0"
    whole = condition_of(choose_filters(table, ["stock"]), {"stock": (1.5, 7.5)})
    assert list(whole.values.values()) == [2, 7]


@pytest.mark.parametrize(
    ("chosen", "told"),
    [
        ({"title": "x"}, "'title' is no filter of this page; filters: category, price, size, sold"),
        ({"price": (5, 2)}, "price: the least, 5, is more than the most, 2"),
        ({"price": ("five", None)}, "'price' takes numbers"),
        ({"price": (float("nan"), None)}, "'price' takes numbers"),
        ({"price": True}, "'price' takes numbers"),
        ({"price": {"least": 2}}, '"min"'),
        ({"size": 1.5}, "'size' takes whole numbers"),
        ({"category": (1, 2)}, "'category' has no numbers"),
        ({"category": 5}, "'category' takes text"),
        ({"category": [["mug"]]}, "'category' takes text"),
        ({"sold": "perhaps"}, "'sold' takes yes or no"),
        ("category", "filters: give"),
    ],
)
def test_wrong_choices_are_told(table, chosen, told):
    with pytest.raises(VisitorMistake, match=re.escape(told)):
        condition_of(choose_filters(table, ["category", "price", "size", "sold"]), chosen)


def test_values_are_shown_as_people_write_them():
    single = pa.array([12.9], pa.float32()).to_pylist()[0]
    shown = [text_of(value) for value in (single, 12.9, 0.0, 3.0, 1234567.5, 7, True, ["a", 1.5], b"1234")]
    assert shown == ["12.9", "12.9", "0", "3", "1234567.5", "7", "yes", "a, 1.5", "4 bytes"]


# --- what is shown ----------------------------------------------------------------------------------------------------


class Elements(HTMLParser):
    """The elements of a piece of HTML, and the text outside of tags; fails where tags are not balanced."""

    def __init__(self, source: str):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text, self._open = [], [], "", []
        self.feed(source)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in ("img", "input"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_every_text_is_escaped():
    shown = tiles_html(HOSTILE, [Tile(1, [HOSTILE, HOSTILE], HOSTILE, None, HOSTILE), Tile(2, [HOSTILE], "", b"jpeg")])
    shown += mistake_html(HOSTILE) + table_html([HOSTILE], [[HOSTILE]]) + examples_html([HOSTILE])
    found = Elements(shown)
    assert set(found.tags) <= {
        *("div", "p", "figure", "figcaption", "label", "input", "img", "span", "button"),
        *("table", "thead", "tbody", "tr", "th", "td"),
    }
    assert found.text.count(HOSTILE) == 10 and ("img", "alt", HOSTILE) in found.attributes
    assert {name for _, name, _ in found.attributes} <= {
        *("class", "role", "alt", "src", "type", "aria-label", "data-example"),
    }
    assert not set("{}$`") & set(shown)  # nothing that a template would read


def test_a_tile_has_the_whole_photo_and_its_caption_below():
    photo = to_jpeg(Image.new("RGBA", (1200, 300), (200, 30, 30, 255)))
    found = Elements(tiles_html("2 photos", [Tile(1, ["mug", "price: 3"], "ITC 0.95", photo)]))
    assert found.text == "2 photos1. mugprice: 3ITC 0.95"
    assert found.tags.index("img") < found.tags.index("figcaption")
    source = dict((tag, value) for tag, name, value in found.attributes if name == "src")["img"]
    with Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/jpeg;base64,")))) as shown:
        assert shown.size == (THUMBNAIL_SIDE, THUMBNAIL_SIDE // 4)


def test_a_photo_that_cannot_be_shown_says_why():
    found = Elements(tiles_html("", [Tile(1, ["mug"], "", None, problem_told("the image file is missing"))]))
    assert "no photo: missing" in found.text and "img" not in found.tags
    for reason in ("can't be decoded (OSError: /srv/secret.jpg)", "can't be fetched (http://10.0.0.1/x: 403)", "?"):
        told = problem_told(reason)
        assert told.startswith("no photo: ") and "secret" not in told and "10.0" not in told


def test_long_texts_are_cut_in_tiles_and_whole_in_the_table():
    text = "x" * (2 * MOST_CHARACTERS)
    assert len(Elements(tiles_html("", [Tile(1, [text], "", None)])).text) < MOST_CHARACTERS + 20
    assert Elements(table_html(["title"], [[text]])).text == f"title{text}"


def test_the_order_is_told_with_the_weight_in_use():
    told = [order_told(weight) for weight in (None, 0, 1, 22.627416997969522)]
    assert told == [
        "ITC similarity",
        "match logit",
        "match logit + ITC similarity",
        "match logit + 22.6 × ITC similarity",
    ]
    result = {"score": 23.4711, "itc": 0.951, "itm_logit": 2.0, "itm_probability": 0.88}
    assert score_told(result).replace("\N{NO-BREAK SPACE}", " ") == "score 23.47 · ITC 0.95 · match 88 %"
    assert score_told(result | {"itm_probability": None}).split() == ["ITC", "0.95"]


def test_examples_are_titles_made_of_the_names_of_photos():
    assert example_words(["a/striped_blue-mug-2.jpg", "7.jpg", "IMG_0042.jpg", 3, "mug.png"]) == ["striped blue mug"]


# --- what visitors send and fetch -------------------------------------------------------------------------------------


@pytest.fixture
def uploads(tmp_path):
    folder = tmp_path / "uploads"
    (folder / "abc").mkdir(parents=True)
    (folder / "abc" / "photo.png").write_bytes(b"mine")
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "uploads-of-others").mkdir()
    (tmp_path / "uploads-of-others" / "photo.png").write_bytes(b"secret")
    os.symlink(tmp_path / "secret.png", folder / "link.png")
    os.mkfifo(folder / "pipe.png")
    return folder


def bad_paths(uploads) -> list:
    outside = uploads.parent
    return [
        *(outside / "secret.png", uploads / "link.png", uploads / "abc" / ".." / ".." / "secret.png"),
        *(outside / "uploads-of-others" / "photo.png", uploads, uploads / "pipe.png", uploads / "gone.png"),
        *("/etc/passwd", "secret.png", "http://127.0.0.1/x.png", f"{uploads}/abc/photo.png\0"),
    ]


def test_only_files_of_the_upload_folder_are_read(uploads):
    assert uploaded(f"{uploads}/abc/photo.png", uploads) == str(uploads / "abc" / "photo.png")
    assert uploaded(None, uploads) is None
    told = set()
    for path in bad_paths(uploads):
        with pytest.raises(ValueError) as error:
            uploaded(str(path), uploads)
        told.add(str(error.value))
    assert told == {"Send the photo itself: no upload has this path"}  # the same whatever is there


def answer(app, path: str, query: bytes = b"") -> dict:
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(app({"type": "http", "path": path, "query_string": query, "headers": []}, None, send))
    return {"status": sent[0]["status"], "body": b"".join(message.get("body", b"") for message in sent)}


def test_only_uploads_are_given_out_and_other_files_all_get_the_same_answer(uploads):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"open"})

    guarded = OwnFilesOnly(app, uploads)
    closed = {"status": 404, "body": b"not found"}
    for path in bad_paths(uploads):
        for route in ("file=", "file/"):
            assert answer(guarded, f"/gradio_api/{route}{path}") == closed, path
            assert answer(guarded, f"/at/some/root/gradio_api/{route}{path}") == closed, path
    for route in (
        "proxy=http://127.0.0.1/",
        "component_server",
        "process_recording/",
        "deep_link",
        "runs",
        "dev/reload",
    ):
        assert answer(guarded, f"/gradio_api/{route}") == closed
    assert answer(guarded, "/", b"deep_link=abc") == closed
    for path in (f"/gradio_api/file={uploads}/abc/photo.png", "/", "/gradio_api/queue/join", "/assets/index.js"):
        assert answer(guarded, path)["body"] == b"open"


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
    asyncio.run(NamelessUploads(app)(scope, receive, None))
    assert b"".join(got) == form(b'"photo.png"', b'"photo"')
