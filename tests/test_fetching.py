"""Photos of addresses: whatever a server does, good photos arrive, and all others are explained within their time."""

import csv
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from helpers import instead_of_sleep
from prepare_case import encoded, needs_prepare, picture, rejected_of, rows_of

from aliblip.data import fetching
from aliblip.data.fetching import PoliteFetch
from aliblip.prepare import main
from reading_aliblip import UnusableItem

SECONDS = 1.5
MOST = 200_000


class Server(ThreadingHTTPServer):
    """Answers by what the path says."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.asked: list[str] = []
        self.ended = threading.Event()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.ended.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        pass  # a client that has gone


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.asked.append(self.path)
        name, _, number = self.path.strip("/").split("?")[0].partition("-")
        getattr(self, f"answer_{name}")(encoded(picture(int(number or 0))))

    def send(self, data, status=200, size=None, kind="image/jpeg", **headers):
        self.send_response(status)
        for key, value in {"Content-Type": kind, "Content-Length": size, **headers}.items():
            if value is not None:
                self.send_header(key, str(value))
        self.end_headers()
        self.wfile.write(data)

    def drip(self, data, pause=0.05):
        for place in range(len(data)):
            if self.server.ended.wait(pause):
                return
            self.wfile.write(data[place : place + 1])

    def answer_good(self, photo):
        self.send(photo, size=len(photo))

    def answer_untold(self, photo):
        self.send(photo, kind="application/octet-stream")

    def answer_silent(self, photo):
        self.server.ended.wait(30)

    def answer_dripping(self, photo):
        self.send(b"", size=len(photo))
        self.drip(photo)

    def answer_headers(self, photo):
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        self.drip(b"X-Header: x\r\n" * 1000)

    def answer_endless(self, photo):
        self.send(photo)
        while not self.server.ended.is_set():
            self.wfile.write(b"x" * 65536)

    def answer_large(self, photo):
        self.send(b"", size=10**9)

    def answer_broken(self, photo):
        self.send(photo[: len(photo) // 2], size=len(photo))

    def answer_page(self, photo):
        self.send(b"<html>not found</html>", kind="text/html; charset=utf-8")

    def answer_lying(self, photo):
        self.send(b"<html>not found</html>", size=22)

    def answer_empty(self, photo):
        self.send(b"", size=0)

    def answer_moved(self, photo):
        self.send(b"", 302, Location="/good-7")

    def answer_circle(self, photo):
        self.send(b"", 302, Location="/circle")

    def answer_file(self, photo):
        self.send(b"", 302, Location="file:///etc/hostname")

    def answer_ftp(self, photo):
        self.send(b"", 302, Location="ftp://127.0.0.1/a.jpg")

    def answer_private(self, photo):
        self.send(b"", 302, Location="http://169.254.169.254/latest/meta-data")

    def answer_refused(self, photo):
        self.send(b"", 403)

    def answer_busy(self, photo):
        if self.server.asked.count(self.path) == 1:
            self.send(b"", 503)
        else:
            self.send(photo, size=len(photo))


@pytest.fixture
def server():
    with Server() as server:
        yield server


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(fetching, "WAITS", (0.05, 0.1))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def fetch_of(**changed):
    return PoliteFetch(**{"rate": 1000, "seconds": SECONDS, "most_bytes": MOST, "private": True} | changed)


@pytest.mark.parametrize(
    ("name", "number"), [("good-3", 3), ("untold-4", 4), ("moved", 7), ("busy-5", 5), ("good-6?a=ü b", 6)]
)
def test_good_photos_arrive(server, name, number):
    assert fetch_of(seconds=60)(f"{server.url}/{name}", 2**30) == encoded(picture(number))


BAD = {
    "silent": "took longer than 1.5 seconds",
    "dripping": "took longer than 1.5 seconds",
    "headers": "took longer than 1.5 seconds",
    "endless": "larger than 0.190735 MB",
    "large": "larger than 0.190735 MB",
    "broken": "IncompleteRead",
    "page": "the answer is no photo but text/html",
    "circle": "redirect",
    "file": "Redirection to url 'file:///etc/hostname' is not allowed",
    "ftp": "it is redirected to ftp://127.0.0.1/a.jpg",
    "refused": "403",
}


@pytest.mark.parametrize("name", BAD)
def test_what_a_server_may_do_instead_is_explained(server, name):
    with pytest.raises(UnusableItem, match="the photo can't be fetched") as refused:
        fetch_of()(f"{server.url}/{name}", 2**30)
    assert BAD[name] in str(refused.value)
    assert name == "circle" or server.asked.count(f"/{name}") == {"broken": 3}.get(name, 1)


def test_no_way_leads_into_the_private_network(server, monkeypatch):
    for address in (server.url, f"http://localhost:{server.server_port}", "http://[::1]/a", "http://10.0.0.1/a"):
        with pytest.raises(UnusableItem, match="private network"):
            fetch_of(private=False)(f"{address}/good", 2**30)
    # By a name that is looked up, and by a redirect from a server of the open network.
    real, looked_up = socket.getaddrinfo, []

    def lookup(host, *given, **named):
        looked_up.append(host)
        return real("127.0.0.1", *given, **named)

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    with pytest.raises(UnusableItem, match="shop.example is 127.0.0.1, of a private network"):
        fetch_of(private=False)(f"http://shop.example:{server.server_port}/good", 2**30)
    assert not server.asked and looked_up == ["shop.example"]
    monkeypatch.setattr(fetching, "_is_open", lambda address: True)
    with pytest.raises(UnusableItem, match="169.254.169.254 is an address of a private network"):
        fetch_of(private=False)(f"http://shop.example:{server.server_port}/private", 2**30)
    assert server.asked == ["/private"]


@pytest.mark.parametrize("address", ["simplecache::file:///etc/hostname", "ftp://127.0.0.1/a", "file:///etc/hostname"])
def test_only_web_servers_buckets_and_the_hub_are_asked(address):
    with pytest.raises(UnusableItem, match="is none of hf, s3,"):
        fetch_of(private=False)(address, 2**30)


def test_addresses_are_asked_for_at_the_rate(server, monkeypatch):
    waits = []
    instead_of_sleep(monkeypatch, waits.append)
    fetch = fetch_of(rate=0.01, seconds=60)
    for _ in range(3):
        fetch(f"{server.url}/good", 2**30)
    assert [round(wait / 100) for wait in waits] == [0, 1, 2]


@needs_prepare
def test_a_catalogue_of_addresses_is_prepared(server, tmp_path, monkeypatch):
    """Good ones arrive in their order, and all others are listed with their reasons."""
    monkeypatch.setattr("aliblip.data.prepare_card._Titles.languages", lambda titles: ())
    names = [*(f"good-{i}" for i in range(20)), *BAD, "lying", "empty", "moved", *(f"good-{i}" for i in range(20, 30))]
    with open(tmp_path / "list.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image_url", "title"])
        writer.writerows([f"{server.url}/{name}", f"thing {name}"] for name in names)
    flags = ["--train_file", str(tmp_path / "list.csv"), "--fetch_photos", "true", "--fetch_private", "true"]
    flags += ["--fetch_seconds", "5", "--fetch_mb", "0.19", "--fetch_rate", "1000", "--workers", "1"]
    main([*flags, "--output_dir", str(tmp_path / "out")])
    good = [number for number, name in enumerate(names) if name.startswith("good") or name == "moved"]
    rows = rows_of(tmp_path / "out")
    assert [row["source_row"] for row in rows] == good
    assert [row["image"]["bytes"] for row in rows[:20]] == [encoded(picture(i)) for i in range(20)]
    rejected = rejected_of(tmp_path / "out")
    assert sorted(rejected) == [number for number in range(len(names)) if number not in good]
    assert rejected[names.index("lying")] == "the file is not an image of a known format"
    assert rejected[names.index("empty")] == "the image file is empty"
    assert "403" in rejected[names.index("refused")]
