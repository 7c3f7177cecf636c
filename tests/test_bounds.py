"""What comes from outside is bounded while it is read: time and bytes of an address, and what files unpack to."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import socket
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_stub import encoded, photo

import reading_aliblip
from aliblip.data import encodings, fetching, parquet_pages, remote
from aliblip.data.columns import Asked, Reading, Roles
from aliblip.data.fetching import read_address
from aliblip.data.remote import RemoteReadError
from aliblip.data.rows import Row, decode
from aliblip.data.sources import open_source
from aliblip.data.tables import may_hold_rows
from aliblip.runtime.mistakes import UsageError
from reading_aliblip import UnusableItem


@contextmanager
def server(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """The address of a server that answers each connection in its own way, in a thread, until the other side ends."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    one, _ = listening.accept()
                except OSError:
                    return
                threading.Thread(target=talk, args=(one,), daemon=True).start()

        def talk(one: socket.socket) -> None:
            with one:
                one.recv(65536)
                with suppress(OSError):
                    answer(one)

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/a.jpg"


OK = b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\n"


def drip_body(one: socket.socket) -> None:
    one.sendall(OK + b"Content-Length: 1000000\r\n\r\n")
    while True:
        one.sendall(b"\xff")
        time.sleep(0.02)


def drip_without_length(one: socket.socket) -> None:
    one.sendall(OK + b"\r\n")
    while True:
        one.sendall(b"\xff")
        time.sleep(0.02)


def drip_headers(one: socket.socket) -> None:
    one.sendall(OK)
    while True:
        one.sendall(b"x")
        time.sleep(0.02)


def say_nothing(one: socket.socket) -> None:
    one.recv(1)  # until the other side hangs up


@pytest.mark.parametrize("answer", [drip_body, drip_without_length, drip_headers, say_nothing])
def test_an_address_has_an_end_whatever_its_server_does(monkeypatch, answer):
    monkeypatch.setattr(fetching, "SECONDS_OF_A_TRY", 0.5)
    with server(answer) as address:
        with pytest.raises(RemoteReadError, match=rf"{address} can't be read: it took longer than 0.5 seconds$"):
            read_address(address, 2**20)
        with pytest.raises(UnusableItem, match="the image can't be fetched .* longer than 0.5 seconds"):
            decode(Row(0, address, "a title", 0, "a"))


@pytest.mark.parametrize("answer", [drip_body, drip_without_length, drip_headers, say_nothing])
def test_what_runs_from_the_hub_ends_it_too(monkeypatch, answer):
    monkeypatch.setattr(reading_aliblip, "TIMEOUT_SECONDS", 0.5)
    with server(answer) as address, pytest.raises(UnusableItem, match=rf"{address}: (not within 0.5 s|.*timed out)"):
        reading_aliblip.fetch(address, 2**20)


def test_what_runs_from_the_hub_reads_whole_answers_and_parts():
    data = bytes(range(256)) * 2000
    whole = OK + f"Content-Length: {len(data)}\r\n\r\n".encode() + data
    chunked = OK + b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(b"3\r\nabc\r\n" for _ in range(9)) + b"0\r\n\r\n"
    for answer, expected in ((whole, data), (chunked, b"abc" * 9), (OK + b"\r\n" + data, data)):
        with server(lambda one, answer=answer: one.sendall(answer)) as address:
            assert reading_aliblip.fetch(address, 2**20) == expected
            assert reading_aliblip.fetch(address, 10) == expected[:10]
    with server(lambda one: one.sendall(b"nonsense\r\n\r\n")) as address, pytest.raises(UnusableItem):
        reading_aliblip.fetch(address, 10)


def test_a_connection_that_tls_takes_over_is_ended_all_the_same():
    """`ssl` makes a new socket of the one that was opened, which then is nobody's."""
    with server(say_nothing) as address:
        place, sockets = urlsplit(address), []
        opened = fetching._connector(True, sockets, time.monotonic() + 60)((place.hostname, place.port))
        with socket.socket(fileno=opened.detach()) as taken_over:
            taken_over.settimeout(20)
            fetching._hang_up(sockets)
            assert taken_over.recv(1) == b""
        for each in sockets:
            each.close()


def test_an_endless_answer_is_cut_off():
    taken = 0

    def endless(one: socket.socket) -> None:
        nonlocal taken
        one.sendall(OK + b"\r\n")
        while True:
            taken += one.send(b"\xff" * 65536)

    with server(endless) as address, pytest.raises(RemoteReadError, match=r"the photo is larger than 1 MB$"):
        read_address(address, 2**20)
    assert taken < 2**26  # what the buffers of the system hold, and no more


def test_a_photo_is_read_from_an_address_as_ever(monkeypatch):
    monkeypatch.setattr(remote, "WAITS", (0.0, 0.0))
    data, answers = encoded(photo(1)), [b"HTTP/1.1 503 busy\r\n\r\n", OK + b"Content-Length: 9999\r\n\r\nhalf"]
    whole = OK.replace(b"image/jpeg", b"text/plain") + f"Content-Length: {len(data)}\r\n\r\n".encode() + data
    with server(lambda one: one.sendall(answers.pop(0) if answers else whole)) as address:
        assert read_address(address, 2**20) == data
        answers += [b"HTTP/1.1 403 Forbidden\r\n\r\n"]
        with pytest.raises(RemoteReadError, match=r"can't be read: 403 Forbidden$"):
            read_address(address, 2**20)
        answers += [b"HTTP/1.1 404 Not Found\r\n\r\n"]
        with pytest.raises(FileNotFoundError):
            read_address(address, 2**20)
        answers += [b"HTTP/1.1 503 busy\r\n\r\n"] * 9
        with pytest.raises(RemoteReadError, match=r"can't be read: 503 busy \(tried 3 times in 0 seconds\)$"):
            read_address(address, 2**20)


PACKERS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.Codec("zstd").compress(data, asbytes=True),
}


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("form", ["csv", "json"])
def test_a_table_that_unpacks_to_absurdly_more_is_refused_while_it_is_read(tmp_path, monkeypatch, packing, form):
    monkeypatch.setattr(encodings, "MOST_UNPACKED", 2**20)
    heads = {"csv": (b"image,caption\n", b"\n"), "json": (b'[{"image":"', b'","caption":"x"}]')}
    begin, end = heads[form]
    file = tmp_path / f"train.{form}{packing}"
    file.write_bytes(PACKERS[packing](begin + b"a" * 20_000_000 + end))
    with pytest.raises(UsageError, match=r"unpacks to more than .* times its size .* unpack it yourself"):
        open_source(data_files=str(file), split="train")


@pytest.mark.parametrize("packing", PACKERS)
def test_a_table_that_repeats_itself_is_read(tmp_path, packing):
    rows = "".join(f"p{i}.png,a red mug with a white handle\n" for i in range(20_000))
    (tmp_path / f"train.csv{packing}").write_bytes(PACKERS[packing](b"image,caption\n" + rows.encode()))
    assert open_source(data_files=str(tmp_path / f"train.csv{packing}"), split="train").num_rows == 20_000


def test_a_parquet_cell_that_unpacks_to_absurdly_more_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(encodings, "MOST_UNPACKED", 2**20)
    file = tmp_path / "train-00000-of-00001.parquet"
    table = pa.table({"image": [b"\0" * 8_000_000], "caption": ["a title"], "other": [b"\0" * 9_000_000]})
    pq.write_table(table, file, compression="zstd")
    with pytest.raises(UsageError, match=r"column 'image' of .* unpacks to more than .* times its size"):
        open_source(data_dir=str(tmp_path), split="train")
    # A column that is not read does no harm.
    table = table.set_column(0, "image", pa.array([encoded(photo(0))]))
    pq.write_table(table, file, compression="zstd")
    assert open_source(data_dir=str(tmp_path), split="train").num_rows == 1


@pytest.mark.parametrize("packing", [".gz", ".bz2", ".xz"])
def test_a_packed_tar_that_unpacks_to_absurdly_more_is_refused_while_it_is_read(tmp_path, monkeypatch, packing):
    monkeypatch.setattr(encodings, "MOST_UNPACKED", 2**20)
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as tar:
        for number in range(3):
            for ending, data in (("jpg", encoded(photo(0)) + bytes(7_000_000)), ("txt", b"a title")):
                info = tarfile.TarInfo(f"{number}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    file = tmp_path / f"train.tar{packing}"
    file.write_bytes(PACKERS[packing](held.getvalue()))
    with pytest.raises(UsageError, match=rf"{file} unpacks to more than .* times its size"):
        open_source(data_files=str(file), split="train")


def test_a_key_with_an_escape_that_is_none_is_no_end(tmp_path):
    (tmp_path / "a.json").write_text('[{"a\\x": "' + "y" * 100_000 + '"}]')
    assert not may_hold_rows(str(tmp_path / "a.json"), Reading(), Roles(Asked(None, None, None)))


# --- Parquet: what is stored once, and stands in many rows ------------------------------------------------------------


def dictionary_of(value: bytes | str, rows: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([value]))


def repeated(column: str, rows: int = 2000, size: int = 200_000) -> pa.Table:
    """A table of so many rows with one photo and one title, of which one is large."""
    image, caption = encoded(photo(0)), "a title"
    if column == "image":
        image += bytes(size)
    elif column != "image.bytes":
        caption += " x" * (size // 2)
    images, captions = dictionary_of(image, rows), dictionary_of(caption, rows)
    if column == "image.bytes":
        images = pa.StructArray.from_arrays([dictionary_of(image + bytes(size), rows)], ["bytes"])
    if column == "list of captions":
        lists = pa.ListArray.from_arrays(pa.array(range(rows + 1), pa.int32()), captions)
        return pa.table({"image": images, "caption": lists})
    return pa.table({"image": images, "caption": captions})


@pytest.fixture
def small_bounds(monkeypatch):
    for module in (encodings, parquet_pages):
        monkeypatch.setattr(module, "MOST_UNPACKED", 2**20)


def write(folder: Path, table: pa.Table) -> Path:
    file = folder / "train-00000-of-00001.parquet"
    options = {"compression": "zstd", "dictionary_pagesize_limit": 2**30, "store_schema": False}
    pq.write_table(table, file, **options)
    return file


def read_all(folder: Path) -> int:
    source = open_source(data_dir=str(folder), split="train")
    return sum(1 for _ in source.read_range(0, source.num_rows))


@pytest.mark.parametrize("column", ["image", "image.bytes", "caption", "list of captions"])
def test_a_value_that_stands_in_many_rows_is_refused_before_it_is_written_out(tmp_path, small_bounds, column):
    file = write(tmp_path, repeated(column))
    assert file.stat().st_size < 10_000  # for 400 MB
    name = column.partition(".")[0].rpartition(" ")[2].removesuffix("s")
    with pytest.raises(UsageError, match=rf"column '{name}' of {file} unpacks to more than .* times its size"):
        read_all(tmp_path)


def test_a_value_that_is_the_beginning_of_many_others_is_refused(tmp_path, small_bounds):
    table = pa.table({"image": [encoded(photo(0))] * 2000, "caption": ["a title" + " x" * 100_000] * 2000})
    file = tmp_path / "train-00000-of-00001.parquet"
    encodings_of = {"caption": "DELTA_BYTE_ARRAY", "image": "PLAIN"}
    pq.write_table(table, file, compression="zstd", use_dictionary=False, column_encoding=encodings_of)
    assert file.stat().st_size < 100_000  # for 400 MB
    with pytest.raises(UsageError, match=rf"column 'caption' of {file} unpacks to more than .* times its size"):
        read_all(tmp_path)
    titles = [f"a title that is written out as {i}" for i in range(2000)]
    table = table.set_column(1, "caption", pa.array(titles))
    pq.write_table(table, file, compression="zstd", use_dictionary=False, column_encoding=encodings_of)
    assert read_all(tmp_path) == 2000


def test_lists_of_nothing_are_refused_before_they_are_written_out(tmp_path, small_bounds):
    lists = pa.ListArray.from_arrays(pa.array([0, 500_000], pa.int32()), pa.nulls(500_000, pa.string()))
    file = write(tmp_path, pa.table({"image": [encoded(photo(0))], "caption": lists}))
    with pytest.raises(UsageError, match=rf"column 'caption' of {file} unpacks to more than .* times its size"):
        read_all(tmp_path)


def test_rows_that_take_no_bytes_are_refused(tmp_path, monkeypatch):
    table = pa.table({"image": pa.nulls(10_000, pa.binary()), "caption": pa.nulls(10_000, pa.string())})
    file = write(tmp_path, table)
    monkeypatch.setattr(parquet_pages, "MOST_ROWS", 1000)
    monkeypatch.setattr(parquet_pages, "MOST_ROWS_OF_A_BYTE", 2)
    with pytest.raises(UsageError, match=rf"{file} has 10,000 rows in [\d,]+ bytes, as no photos and titles have"):
        read_all(tmp_path)
    with pytest.raises(UsageError, match="numbers of rows contradict each other"):
        parquet_pages.check_rows("it", 1, 5, [2, 2])


@pytest.mark.parametrize("rows", [1, 3000])
def test_usual_repetition_is_read(tmp_path, small_bounds, rows):
    """Titles, names of categories, and five titles a photo."""
    words = [f"title {i % 7}" for i in range(rows)]
    table = pa.table(
        {
            "image": pa.array([encoded(photo(i // 5)) for i in range(rows)]).dictionary_encode(),
            "caption": pa.array(words).dictionary_encode(),
            "product_id": pa.array([1] * rows),
        }
    )
    write(tmp_path, table)
    assert read_all(tmp_path) == rows


def test_sizes_are_those_of_the_pages_and_not_of_the_footer(tmp_path):
    table = pa.table({"image": [bytes(3_000_000)] * 3, "caption": ["a title", None, "b"]})
    file = write(tmp_path, table)
    for use_dictionary, version in ((False, "1.0"), (True, "2.0")):
        pq.write_table(table, file, compression="zstd", use_dictionary=use_dictionary, data_page_version=version)
        group = pq.read_metadata(file).row_group(0)
        with file.open("rb") as stream:
            for number in range(2):
                pages = list(parquet_pages._pages(stream, group.column(number), first_only=False))
                total = sum(page.unpacked for page in pages)
                assert 0 < group.column(number).total_uncompressed_size - total < 200 * len(pages)
                assert sum(page.values for page in pages if page.kind != 2) == 3
                assert [page.repeats for page in pages].count(True) == use_dictionary
    assert parquet_pages._header_at(io.BytesIO(b"\xff" * 3000), 0) is None
    assert parquet_pages._header_at(io.BytesIO(b""), 0) is None
