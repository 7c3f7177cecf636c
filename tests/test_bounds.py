"""What comes from outside is bounded while it is read: time and bytes of an address, and what files unpack to."""

from __future__ import annotations

import bz2
import gzip
import lzma
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_stub import encoded, photo

from aliblip.data import encodings, fetching, remote
from aliblip.data.fetching import read_address
from aliblip.data.remote import RemoteReadError
from aliblip.data.rows import Row, decode
from aliblip.data.sources import open_source
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
