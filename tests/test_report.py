"""The page of an evaluation: complete in one file, whatever the titles are; and the contact sheet."""

from __future__ import annotations

import base64
import io
import math
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from aliblip.retrieval.report import Chart, Curve, Examples, Hit, SheetRow, Table, contact_sheet, html_report

HOSTILE = """</h3><script>alert("1")</script><img src=x onerror='alert(2)'>&lt;b&gt; " onload="x" BODY TITLE {_STYLE}"""
VOID = {"meta", "img", "br", "line", "circle", "polyline"}


class Page(HTMLParser):
    """Elements of a page as (tag, attributes, text inside); fails where tags are not balanced."""

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.elements, self.stack = [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names))
        element = [tag, dict(attributes), ""]
        self.elements.append(element)
        if tag not in VOID:
            self.stack.append(element)

    def handle_startendtag(self, tag, attributes):
        assert tag in VOID
        self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag):
        assert self.stack.pop()[0] == tag

    def handle_data(self, data):
        for element in self.stack:
            element[2] += data

    def all(self, tag, kind=None):
        return [element for element in self.elements if element[0] == tag and kind in (None, element[1].get("class"))]

    def texts(self, tag, kind=None):
        return [" ".join(text.split()) for _, _, text in self.all(tag, kind)]

    def assert_self_contained(self):
        allowed = {"html", "head", "meta", "title", "style", "body", "section", "article", "div", "p", "h1", "h2", "h3"}
        allowed |= {"table", "thead", "tbody", "tr", "th", "td", "dl", "dt", "dd", "ul", "li", "details", "summary"}
        allowed |= {"svg", "line", "text", "polyline", "circle", "figure", "figcaption", "img", "span"}
        assert {tag for tag, _, _ in self.elements} <= allowed
        for tag, attributes, _ in self.elements:
            assert not [name for name in attributes if name.startswith("on") or name in ("href", "style", "srcset")]
            assert tag != "img" or attributes["src"].startswith("data:image/jpeg;base64,")
        assert "url(" not in self.source and "@import" not in self.source
        assert not re.search("https?://", self.source)


def photo(seed, size=(400, 300)):
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def curve(name, first=0.5, last=1.0, most=128, **options):
    k = range(1, most + 1)
    return Curve(name, k, [first + (last - first) * math.log(n) / math.log(most) for n in k], **options)


@pytest.fixture
def parts():
    miss = [Hit(photo(n), 3.0 - n, False) for n in range(3)] + [Hit(photo(3), -1.25, True, place=57, name="3.jpg")]
    hit = [Hit(photo(4), 5.5, True, name="4.jpg"), Hit(photo(0), 1.0, False)]
    directions = ("text to image", "image to text")
    return {
        "heading": "demo/best on catalogue",
        "note": "400 photos, 400 titles",
        "tables": [
            Table(
                "Results",
                ["", "R@1", "R@5", "median rank", "rows"],
                [["ITC", 75.25, 99.84, 1, 1234], ["ITM", None, float("nan"), 1, 0]],
            )
        ],
        "charts": [
            Chart("Recall at k", [curve(f"{name} {stage}") for name in directions for stage in ("ITC", "ITM")]),
            Chart(
                "Recall@1 by depth",
                [
                    Curve("re-ranked", [8, 16, 32, 64], [0.7, 0.73, 0.74, 0.732]),
                    Curve("ceiling", [8, 16, 32, 64], [0.8, 0.9, 0.97, 1.0], dashed=True),
                ],
                x_label="k_rerank",
            ),
        ],
        "slices": [Table("By length of title", ["words", "titles", "R@1"], [["1-5", 100, 80.0]], note="text to image")],
        "examples": [
            Examples("Worst misses", [SheetRow("red cap", miss, rank=57)]),
            Examples("Best hits", [SheetRow("blue mug", hit, rank=1), SheetRow("nothing found")]),
        ],
        "run": {"seconds": 12.345, "versions": {"python": "3.11", "torch": "2.13"}, "fusion weight": 1.0},
    }


def test_a_whole_page(parts, tmp_path):
    path = html_report(tmp_path / "new" / "report.html", **parts)
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    page = Page(path)
    page.assert_self_contained()
    assert page.texts("h1") == page.texts("title") == ["demo/best on catalogue"]
    assert page.texts("h2") == [
        *("Results", "Recall at k", "Recall@1 by depth"),
        *("By length of title", "Worst misses", "Best hits", "This run"),
    ]
    assert page.texts("td")[:10] == ["ITC", "75.2", "99.8", "1", "1,234", "ITM", "–", "–", "1", "0"]
    assert page.texts("dd") == ["12.345", "python 3.11, torch 2.13", "1"]
    assert path.stat().st_size < 100_000
    assert html_report(tmp_path / "again.html", **parts).read_bytes() == path.read_bytes()


def test_photos_are_small_and_the_right_ones_are_marked(parts, tmp_path):
    page = Page(html_report(tmp_path / "report.html", **parts))
    assert page.texts("figcaption") == [
        *("1. 3.00", "2. 2.00", "3. 1.00", "57. ✓ right -1.25"),
        *("1. ✓ right 5.50", "2. 1.00"),
    ]
    assert [attributes.get("class") for _, attributes, _ in page.all("figure")] == [
        None,
        None,
        None,
        "right",
        "right",
        None,
    ]
    assert page.texts("h3") == ["red cap", "blue mug", "nothing found"]
    assert page.texts("p", "rank found") == ["right photo at place 57", "right photo at place 1"]
    images = page.all("img")
    assert images[3][1]["alt"] == "right photo at place 57: 3.jpg" and images[0][1]["alt"] == "photo at place 1"
    for (_, attributes, _), seed in zip(images, (0, 1, 2, 3, 4, 0), strict=True):
        data = base64.b64decode(attributes["src"].removeprefix("data:image/jpeg;base64,"), validate=True)
        with Image.open(io.BytesIO(data)) as small:
            assert small.format == "JPEG" and small.size == (160, 120)
            assert (attributes["width"], attributes["height"]) == ("160", "120")
            difference = np.abs(np.asarray(small, float) - np.asarray(photo(seed, (160, 120)), float))
        assert difference.mean() < 6  # JPEG alone; another photo is about 50 away
    assert "#14924a" in page.source  # the frame of the contact sheet


def test_lines_of_a_chart_lie_where_the_numbers_are(tmp_path):
    one = Chart("c", [Curve("up", [1, 10, 100], [0.5, 0.75, 1.0])], x_label="k")
    page = Page(html_report(tmp_path / "report.html", heading="h", charts=[one]))
    (_, attributes, _) = page.all("polyline")[0]
    points = np.array([[float(part) for part in point.split(",")] for point in attributes["points"].split()])
    assert np.allclose(np.diff(points, n=2, axis=0), 0, atol=0.2), "k in powers of ten lie on a line"
    assert points[2, 0] > points[0, 0] and points[2, 1] < points[0, 1], "right is more, and up is more"
    labels = {text: (float(at["x"]), float(at["y"])) for _, at, text in page.all("text")}
    assert list(labels) == ["50%", "60%", "70%", "80%", "90%", "100%", "1", "10", "100", "k"]
    assert [labels[k][0] for k in ("1", "10", "100")] == points[:, 0].tolist()
    assert [labels["50%"][1] - 4, labels["100%"][1] - 4] == points[[0, 2], 1].tolist()
    assert page.texts("td") == ["1", "50.0", "10", "75.0", "100", "100.0"]


@pytest.mark.parametrize(
    "curves",
    [
        [Curve("one", [1], [0.0])],
        [Curve("one", [1], [1.0]), Curve("two", [1, 2, 3], [0.0, 0.5, 1.0])],
        [Curve("chance", [1, 5, 10], [0.001, 0.004, 0.009])],
        [Curve("depth", [50_000], [0.5])],
        [curve("gallery", 0.0, 1.0, most=50_000)],
        [Curve("all right", range(1, 130), [1.0] * 129)],
    ],
)
def test_odd_curves_stay_inside(curves, tmp_path):
    page = Page(html_report(tmp_path / "report.html", heading="h", charts=[Chart("c", curves)]))
    for line, drawn in zip(page.all("polyline"), curves, strict=True):
        points = [tuple(map(float, point.split(","))) for point in line[1]["points"].split()]
        assert 1 <= len(points) <= 121 and len(points) in (len(drawn.k), *range(60, 122))
        assert all(46 <= x <= 466 and 12 <= y <= 236 for x, y in points)
        lowest = min(range(len(points)), key=lambda n: points[n][1])
        assert points[lowest][1] <= points[0][1] and points[-1][0] == max(x for x, _ in points)
    numbers = [(float(at["x"]), len(text)) for _, at, text in page.all("text") if at["y"] == "254"]
    for (x, length), (other, other_length) in zip(numbers, numbers[1:], strict=False):
        assert other - x > 3.6 * (length + other_length), "numbers below the axis don't touch"
    assert 1 <= len(numbers) <= 16 and len(page.source) < 20_000


def test_titles_can_do_nothing(parts, tmp_path):
    odd = f"{HOSTILE}\x00\ud83d\x1b\u202e"
    shown = " ".join(odd.replace("\x00", "\ufffd").replace("\ud83d", "\ufffd").replace("\x1b", "\ufffd").split())
    page = Page(
        html_report(
            tmp_path / "report.html",
            heading=odd,
            note=odd,
            tables=[Table(odd, [odd], [[odd]], note=odd)],
            charts=[Chart(odd, [Curve(odd, [1], [0.5])], x_label=odd, note=odd)],
            examples=[Examples(odd, [SheetRow(odd, [Hit(photo(0), 1.0, True, name=odd)], rank=1)], note=odd)],
            run={odd: odd},
        )
    )
    page.assert_self_contained()
    for tag in ("title", "h1", "h2", "h3", "p", "th", "td", "dt", "dd", "li"):
        assert shown in page.texts(tag), tag
    assert page.all("img")[0][1]["alt"].endswith(HOSTILE + "\ufffd\ufffd\ufffd\u202e")
    assert HOSTILE in page.all("svg", "chart")[0][1]["aria-label"]
    assert len(page.all("img")) == 1 and "<script" not in page.source


def test_parts_may_be_absent(parts, tmp_path):
    alone = Page(html_report(tmp_path / "alone.htm", heading="h"))
    assert alone.texts("h1") == ["h"] and alone.texts("h2") == []
    # no truth: rankings only
    rows = [SheetRow("red cap", [Hit(photo(0), 1.0, False)])]
    empty = {"tables": [Table("t", ["a"], [])], "charts": [Chart("c", [])]}
    page = Page(
        html_report(tmp_path / "report.html", heading="h", examples=[Examples("g", rows), Examples("n", [])], **empty)
    )
    assert page.texts("h2") == ["g"] and page.texts("figcaption") == ["1. 1.00"]
    assert not page.all("figure", "right") and "at place" not in " ".join(page.texts("article"))


def test_many_photos_and_long_titles_stay_small(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (160, 160, 3), dtype=np.uint8)
    noisy = [Image.fromarray(np.roll(noise, n, axis=0)) for n in range(240)]  # nothing compresses worse
    noisy[0].info["comment"] = b"c" * 60_000
    rows = [SheetRow("word " * 2000, [Hit(image, 0.0, False)]) for image in noisy]
    path = html_report(tmp_path / "report.html", heading="h", examples=[Examples("g", rows)])
    page = Page(path)
    assert len(page.all("img")) == 240 and {at["width"] for _, at, _ in page.all("img")} == {"80"}
    assert path.stat().st_size < 1_500_000
    assert all(len(title) <= 403 and title.endswith("...") for title in page.texts("h3"))
    few = html_report(tmp_path / "few.html", heading="h", examples=[Examples("g", rows[:1])])
    assert Page(few).all("img")[0][1]["width"] == "160"
    assert few.stat().st_size < 40_000, "the comment of the original is left out"


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_photos_of_any_mode_and_shape(mode, tmp_path):
    rows = [SheetRow("t", [Hit(photo(0, size).convert(mode), 0.0, False) for size in ((2000, 1), (1, 1), (40, 30))])]
    page = Page(html_report(tmp_path / "report.html", heading="h", examples=[Examples("g", rows)]))
    sizes = [(at["width"], at["height"]) for _, at, _ in page.all("img")]
    assert sizes == [("160", "1"), ("1", "1"), ("40", "30")], "small ones are not enlarged"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Curve("a", [], []), "'a' has 0 k and 0 recalls"),
        (lambda: Curve("a", [1, 2], [0.5]), "has 2 k and 1 recalls"),
        (lambda: Curve("a", [0, 1], [0.5, 0.5]), "ascend from at least 1"),
        (lambda: Curve("a", [1, 5, 5], [0.5, 0.5, 0.5]), "ascend from at least 1"),
        (lambda: Curve("a", [1], [75.2]), "fractions from 0 to 1"),
        (lambda: Curve("a", [1], [float("nan")]), "fractions from 0 to 1"),
        (lambda: Table("t", ["a", "b"], [[1, 2], [3]]), r"'t' has 2 columns, but a row of 1: \[3\]"),
        (lambda: html_report("report.txt", heading="h"), "report.txt is not a page's file name"),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_failed_write_leaves_the_old_page_and_the_old_sheet(parts, tmp_path, monkeypatch):
    page = html_report(tmp_path / "report.html", heading="old")
    sheet = contact_sheet(parts["examples"][0].rows, tmp_path / "sheet.png")
    before = page.read_bytes(), sheet.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        html_report(page, **parts)
    with pytest.raises(OSError):
        contact_sheet(parts["examples"][1].rows, sheet)
    assert (page.read_bytes(), sheet.read_bytes()) == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["report.html", "sheet.png"]


# --- the contact sheet ------------------------------------------------------------------------------------------------


def test_contact_sheet_frames_the_right_photo_and_wraps_titles(tmp_path):
    grey = Image.new("RGB", (300, 200), (128, 128, 128))
    rows = [
        SheetRow("red cap", [Hit(grey, 3.0, False), Hit(grey, 2.0, True), Hit(grey, -1.0, False)], rank=2),
        SheetRow("a very long title " * 30 + "W" * 200, [Hit(grey.convert("L"), 1.0, False)], rank=99),
    ]
    path = contact_sheet(rows, tmp_path / "new" / "sheet.png", heading="heading " * 40)
    with Image.open(path) as sheet:
        green = (np.asarray(sheet) == (0x14, 0x92, 0x4A)).all(axis=2)
    columns = np.flatnonzero(green.sum(axis=0) > 100)
    assert columns.min() >= 340 + 194 and columns.max() < 340 + 2 * 194, "the frame is around the second photo"
    assert [file.name for file in path.parent.iterdir()] == ["sheet.png"]


def test_contact_sheet_refuses_what_it_cannot_draw(tmp_path):
    with pytest.raises(ValueError, match="at least one query"):
        contact_sheet([], tmp_path / "sheet.png")
    with pytest.raises(ValueError, match="not a picture file name"):
        contact_sheet([SheetRow("red cap")], tmp_path / "sheet.txt")
