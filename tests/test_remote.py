"""Data over a bad connection: the same rows in the same order, or a plain error after so many tries."""

import itertools
import json
import logging
import ssl

import fsspec
import pytest
import torch
from data_stub import StubProcessor, records, write_json_list, write_parquet, write_tars
from helpers import free_port, instead_of_sleep
from http_stub import FileServer
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import httpx

import reading_aliblip
from aliblip.data import http_answers, parquet, remote, tables
from aliblip.data.collate import Collator
from aliblip.data.loader import EvalLoader, TrainLoader
from aliblip.data.remote import RemoteReadError, read_file, resumed
from aliblip.data.rows import Row, decode
from aliblip.data.sources import open_source
from aliblip.runtime.mistakes import UsageError
from reading_aliblip import UnusableItem

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

COUNT = 41
LIMIT = 2**20


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(remote, "WAITS", (0.001, 0.002, *[0.004] * 5))
    # Otherwise each of the small files of the tests is one request.
    monkeypatch.setitem(fsspec.config.conf, "http", {"block_size": 1500})
    monkeypatch.setattr(tables, "COPY_BYTES", 500)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    rows, root = records(COUNT), tmp_path_factory.mktemp("served")
    write_parquet(root / "parquet", rows, [9, 2, 30], row_group_size=5)
    write_tars(root / "tars", rows, [9, 2, 30])
    write_json_list(root / "list", rows)
    lines = [json.dumps({"file_name": f"images/{r['file']}", "caption": r["caption"], "sku": r["file"]}) for r in rows]
    (root / "list" / "metadata.jsonl").write_text("\n".join(lines), "utf-8")
    return root


LAYOUTS = {
    "parquet": {"data_files": [f"parquet/train-0000{i}-of-00003.parquet" for i in range(3)]},
    "tars": {"data_files": [f"tars/train-0000{i}.tar" for i in range(3)]},
    "list": {"data_files": ["list/train.json"], "image_dir": "list/images"},
    "metadata": {"data_files": ["list/metadata.jsonl"], "product_id_column": "sku"},
}


def open_below(base, layout, **options):
    arguments = dict(LAYOUTS[layout])
    arguments["data_files"] = [f"{base}/{file}" for file in arguments["data_files"]]
    if "image_dir" in arguments:
        arguments["image_dir"] = f"{base}/{arguments['image_dir']}"
    return open_source(split="train", **arguments, **options)


def loader_of(source, workers=0):
    collator = Collator(StubProcessor())
    return TrainLoader(source, collator, batch_size=3, seed=5, rank=0, world_size=1, num_workers=workers, window=12)


# ------------------------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_rows_in_the_same_order_over_a_bad_connection(folder, layout, workers):
    expected = list(loader_of(open_below(folder, layout), workers).epoch(1))
    assert len(expected) == COUNT // 3 and not any(batch["skipped"] for batch in expected)
    with FileServer(folder, seed=workers + 1) as server:
        source = open_below(server.url, layout)
        assert server.failed.total() > 0
        server.failed.clear()
        batches = list(loader_of(source, workers).epoch(1))
        assert server.failed.total() > 5 and len(server.failed) >= 3, server.failed
    assert len(batches) == len(expected)
    for got, wanted in zip(batches, expected, strict=True):
        assert got["skipped"] == []
        assert all(torch.equal(got[key], wanted[key]) for key in wanted if key != "skipped")


def test_evaluation_units_over_a_bad_connection(folder):
    def units(source):
        loader = EvalLoader(source, Collator(StubProcessor()), unit_size=4, rank=0, world_size=1)
        return [(unit, batch["row"].tolist(), batch["input_ids"].tolist()) for unit, batch in loader]

    with FileServer(folder, seed=3) as server:
        assert units(open_below(server.url, "parquet")) == units(open_below(folder, "parquet"))
        assert server.failed.total() > 5


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fault", ["503", "drop", "reset"])
@pytest.mark.parametrize("layout", ["parquet", "tars"])
def test_a_server_that_fails_for_good_ends_the_run(folder, layout, fault, workers, monkeypatch):
    waits = []
    instead_of_sleep(monkeypatch, waits.append)  # of datasets too
    with FileServer(folder) as server:
        batches = loader_of(open_below(server.url, layout), workers).epoch(0)
        server.always = fault
        server.requests.clear()
        with pytest.raises(
            RemoteReadError, match=r"http://127.* can't be read: .*\(tried 8 times in \d+ seconds\)"
        ) as caught:
            list(batches)
        assert "\n" not in str(caught.value)
        # A look at the file is a HEAD and a GET, and aiohttp itself asks once more where a kept connection is gone.
        # With the tries inside of datasets it would be 20 times as many, and they wait 5 seconds and more.
        assert 8 <= len(server.requests) <= 8 * 4 * max(workers, 1)
        assert max(waits, default=0) < 1


def test_a_server_that_fails_for_good_at_the_start_is_one_line(folder):
    with FileServer(folder) as server:
        server.always = "500"
        for layout in LAYOUTS:
            server.requests.clear()
            with pytest.raises(UsageError) as caught:
                open_below(server.url, layout)
            message = str(caught.value)
            assert server.url in message and "500 Internal Server Error (tried 8 times" in message
            assert "\n" not in message
            assert len(server.requests) <= 3 * 8 * 3
        server.always = None
        with pytest.raises(UsageError, match=r"gone\.parquet can't be read: .*No such file"):
            open_source(data_files=[f"{server.url}/parquet/gone.parquet"], split="train")
    with pytest.raises(UsageError, match="Connect call failed.*tried 8 times"):
        open_below(f"http://127.0.0.1:{free_port()}", "tars")


def test_a_server_without_ranges_is_one_line(folder, monkeypatch):
    monkeypatch.setattr(parquet, "TAIL_BYTES", 64)  # else the small files are read whole
    with FileServer(folder, ranges=False) as server, pytest.raises(UsageError, match=r"HTTP Range"):
        open_below(server.url, "tars")


def test_a_list_of_addresses_and_an_address_with_a_query(folder):
    with FileServer(folder) as server:
        one = open_source(data_files=f"{server.url}/parquet/train-00000-of-00003.parquet?token=x", split="train")
        assert one.num_rows == 9 and [row.row for row in one.read(0)] == list(range(9))
        by_split = {"train": [f"{server.url}/tars/train-00000.tar"], "validation": f"{server.url}/tars/train-00001.tar"}
        assert open_source(data_files=by_split, split="validation").num_rows == 2
        # A segment costs a look at the file and a footer per row group, not a search for the file as well; and, before
        # they are unpacked, a look at its pages.
        source = open_below(server.url, "parquet")
        server.requests.clear()
        list(source.read(0, 0, 5))
        assert [method for method, _, _ in server.requests].count("HEAD") <= 3


def test_workers_leave_the_connections_of_their_parent_alone(folder, monkeypatch):
    monkeypatch.setattr(remote, "READ_TIMEOUT", 10)
    with FileServer(folder) as server:
        source = open_below(server.url, "parquet")
        loader = loader_of(source, workers=2)
        whole = [row.text for row in source.read(0)]
        server.requests.clear()
        for epoch in range(2):
            assert len(list(loader.epoch(epoch))) == COUNT // 3
            assert [row.text for row in source.read(0)] == whole
        # An answer that the parent waited for in vain would have made it ask for the whole file.
        assert not [request for request in server.requests if request[0] == "GET" and request[2] is None]


def test_a_silent_server_is_a_dropped_connection(folder, monkeypatch):
    monkeypatch.setattr(remote, "READ_TIMEOUT", 0.3)
    with FileServer(folder) as server:
        server.first = ("hang", 2)
        assert read_file(f"{server.url}/list/train.json", LIMIT) == (folder / "list" / "train.json").read_bytes()
        assert server.failed == {"hang": 2}


@pytest.mark.parametrize("fault", ["drip", "drip headers"])
def test_a_server_that_drips_is_a_dropped_connection(fault, folder, monkeypatch):
    monkeypatch.setattr(http_answers, "SECONDS", 0.3)
    with FileServer(folder) as server:
        server.first = (fault, 2)
        assert read_file(f"{server.url}/list/train.json", LIMIT) == (folder / "list" / "train.json").read_bytes()
        assert server.failed == {fault: 2}


@pytest.mark.parametrize("layout", ["parquet", "tars"])
def test_a_server_that_drips_for_good_ends_the_run(folder, layout, monkeypatch):
    monkeypatch.setattr(http_answers, "SECONDS", 0.1)
    instead_of_sleep(monkeypatch, lambda seconds: None)
    with FileServer(folder) as server:
        source = open_below(server.url, layout)
        server.always = "drip"
        with pytest.raises(RemoteReadError, match=r"can't be read: .* came in 0\.1 seconds \(tried 8 times"):
            list(source.read(0))


def test_a_file_that_comes_slowly_is_read(folder, monkeypatch):
    """Each minute has its bytes, and the minutes have no limit."""
    monkeypatch.setattr(http_answers, "SECONDS", 0.5)
    monkeypatch.setattr(http_answers, "LEAST_BYTES", 2)
    with FileServer(folder) as server:
        server.first = ("drip", 1)
        assert len(read_file(f"{server.url}/list/train.json", 2**8)) == 2**8
        assert server.failed == {"drip": 1}


def test_a_server_gives_no_more_than_it_is_asked_for(folder):
    with FileServer(folder) as server:
        server.always = "more"
        with pytest.raises(RemoteReadError, match=r"train\.json can't be read: .*more bytes than it was asked for"):
            read_file(f"{server.url}/list/train.json", 1000)
        assert server.failed == {"more": 1}


def test_no_network_is_said_at_once(monkeypatch):
    """conftest forbids the Hub; its client then raises an error of the connection."""
    instead_of_sleep(monkeypatch, lambda seconds: pytest.fail("waited"))
    with pytest.raises(UsageError, match="nobody/nothing can't be opened"):
        open_source(dataset_name="nobody/nothing", split="train")


# -------------------------------------------------------------------------------------------------------------- photos


def photo_row(address):
    return Row(0, address, "a title", 0, "row 0")


def test_a_photo_is_missing_or_the_server_is_in_trouble(folder):
    with FileServer(folder) as server:
        address = f"{server.url}/list/images/p003.png"
        wanted = decode(photo_row(str(folder / "list" / "images" / "p003.png"))).image
        for fault in ("503", "429", "drop", "reset"):
            server.first = (fault, 7)
            assert decode(photo_row(address)).image.tobytes() == wanted.tobytes()
            assert server.failed[fault] == 7
        server.requests.clear()
        with pytest.raises(UnusableItem, match="^the image file is missing$"):
            decode(photo_row(f"{server.url}/list/images/gone.png"))
        assert len(server.requests) == 1
        server.always = "403"
        with pytest.raises(UnusableItem, match=r"can't be fetched \(http://.* can't be read: 403 Forbidden\)$"):
            decode(photo_row(address))
        assert len(server.requests) == 2
        server.always = "503"
        with pytest.raises(UnusableItem, match=r"503 Service Unavailable \(tried 8 times in \d+ seconds\)"):
            decode(photo_row(address))
        assert len(server.requests) == 10


def test_a_photo_larger_than_the_limit_is_not_read_whole(folder, monkeypatch):
    monkeypatch.setattr(reading_aliblip, "MAX_FILE_BYTES", 100)
    with FileServer(folder) as server:
        with pytest.raises(UnusableItem, match="larger than"):
            decode(photo_row(f"{server.url}/list/images/p003.png"))
        assert server.requests == [("GET", "/list/images/p003.png", "bytes=0-100")]


# ------------------------------------------------------------------------------------------------------------- resumed


class Flaky:
    """Items 0 to 9; fails before item n as often as `failures[n]`."""

    def __init__(self, failures, error=None):
        self.failures, self.error, self.starts = dict(failures), error or ConnectionResetError("gone"), []

    def __call__(self, done):
        self.starts.append(done)
        for item in range(done, 10):
            if self.failures.get(item):
                self.failures[item] -= 1
                raise self.error
            yield item


@pytest.fixture
def waits(monkeypatch):
    monkeypatch.undo()  # the real waits, which nobody waits for
    seconds = []
    instead_of_sleep(monkeypatch, seconds.append)
    return seconds


ADDRESS = "http://127.0.0.1/x"


@pytest.mark.parametrize("places", [(), (0,), (9,), (0, 1, 2, 3), (5, 9), range(10)])
@pytest.mark.parametrize("times", [1, 2, 7])
def test_every_item_comes_once(places, times, waits, caplog):
    flaky = Flaky(dict.fromkeys(places, times))
    assert list(resumed(flaky, ADDRESS)) == list(range(10))
    assert flaky.starts == [0, *itertools.chain.from_iterable([place] * times for place in places)]
    assert len(waits) == len(places) * times
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * len(places)  # one per incident
    assert all("gone; trying again, up to 7 times" in record.message for record in caplog.records)


def test_giving_up(waits, caplog):
    flaky = Flaky({4: 8})
    read = []
    with pytest.raises(
        RemoteReadError, match=r"http://127.0.0.1/x can't be read: gone \(tried 8 times in \d+ seconds\)"
    ):
        read.extend(resumed(flaky, ADDRESS))
    assert len(caplog.records) == 1
    bounds = (1, 2, 4, 8, 16, 30, 30)
    assert len(waits) == 7
    assert all(bound / 2 <= seconds <= bound for seconds, bound in zip(waits, bounds, strict=True))
    assert len(set(waits)) == 7  # with jitter, so that processes don't come back all at once


def test_what_is_no_trouble_of_the_connection_is_raised_at_once(waits):
    for error in (ValueError("bad"), KeyError("x"), FileNotFoundError("gone"), PermissionError("no"), OSError("disk")):
        with pytest.raises(type(error)):
            list(resumed(Flaky({4: 1}, error), ADDRESS))
    with pytest.raises(ConnectionResetError):
        list(resumed(Flaky({4: 1}), "/data/a.tar"))
    # A failure that was given up already is not multiplied by a second layer of tries.
    with pytest.raises(RemoteReadError):
        list(resumed(Flaky({4: 1}, RemoteReadError("given up")), ADDRESS))
    assert not waits


class ClientError(Exception):
    """As botocore's."""

    def __init__(self, status):
        super().__init__(f"An error occurred ({status})")
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}}


def of_the_hub(status):
    request = httpx.Request("GET", "https://localhost/x")
    return HfHubHTTPError(f"{status} of the Hub", response=httpx.Response(status, request=request))


def caused(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (of_the_hub(503), True),
        (of_the_hub(429), True),
        (of_the_hub(404), False),
        (of_the_hub(401), False),
        (httpx.ReadTimeout("slow"), True),
        (httpx.ConnectError("nobody"), True),
        (caused(OSError(5, "S3"), ClientError(503)), True),
        (caused(OSError(5, "S3"), ClientError(400)), False),
        (caused(ConnectionError("Server Disconnected"), ClientError(403)), False),
        (caused(FileNotFoundError(ADDRESS), ClientError(500)), True),
        (caused(FileNotFoundError(ADDRESS), ConnectionRefusedError("nobody")), True),
        (caused(FileNotFoundError(ADDRESS), ssl.SSLCertVerificationError("expired")), False),
        (TimeoutError(), True),
    ],
)
def test_the_innermost_error_decides(error, passes, waits):
    flaky = Flaky({4: 1}, error)
    if passes:
        assert list(resumed(flaky, ADDRESS)) == list(range(10))
    else:
        with pytest.raises((OSError, type(error))) as caught:
            list(resumed(flaky, ADDRESS))
        assert str(caught.value) != ADDRESS  # which says nothing
    assert len(waits) == passes
