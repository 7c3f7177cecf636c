"""An object store on loopback: enough of S3 for Lance to keep tables in it."""

from __future__ import annotations

import hashlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


class ObjectStore(ThreadingHTTPServer):
    """Objects by "bucket/key"; anybody may do anything.

    Attributes:
        objects: "bucket/key" -> bytes.
        storage_options: for Lance.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, bytes] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.lock = threading.Lock()
        self.storage_options = {
            "endpoint": f"http://127.0.0.1:{self.server_port}",
            "allow_http": "true",
            "region": "here",
            "access_key_id": "nobody",
            "secret_access_key": "nothing",
            "virtual_hosted_style_request": "false",
        }

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        pass  # a client that has gone


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ObjectStore

    def log_message(self, *args):
        pass

    def _parts(self) -> tuple[str, dict[str, str], bytes]:
        address = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(address.query, keep_blank_values=True).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return unquote(address.path).lstrip("/"), query, body

    def _answer(self, status: int, data: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_GET(self):
        name, query, _ = self._parts()
        if "list-type" in query:
            return self._list(name.rstrip("/"), query)
        data = self.server.objects.get(name)
        if data is None:
            return self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        headers = {"ETag": _tag(data), "Last_Modified": "Thu, 01 Jan 2026 00:00:00 GMT", "Accept_Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if not wanted:
            return self._answer(200, data, **headers)
        start = int(wanted[1]) if wanted[1] else len(data) - int(wanted[2])
        stop = min(int(wanted[2]) + 1 if wanted[1] and wanted[2] else len(data), len(data))
        if start >= len(data):
            return self._answer(416)
        self._answer(206, data[start:stop], Content_Range=f"bytes {start}-{stop - 1}/{len(data)}", **headers)

    def do_HEAD(self):
        name, _, _ = self._parts()
        data = self.server.objects.get(name)
        if data is None:
            return self._answer(404)
        self.send_response(200)
        headers = {"Content-Length": len(data), "ETag": _tag(data), "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
        for key, value in headers.items():
            self.send_header(key, str(value))
        self.end_headers()

    def do_PUT(self):
        name, query, body = self._parts()
        with self.server.lock:
            if "partNumber" in query:
                self.server.uploads[query["uploadId"]][int(query["partNumber"])] = body
            elif "x-amz-copy-source" in self.headers:
                source = unquote(self.headers["x-amz-copy-source"]).lstrip("/")
                if source not in self.server.objects:
                    return self._answer(404)
                self.server.objects[name] = self.server.objects[source]
                return self._answer(200, b"<CopyObjectResult><ETag>x</ETag></CopyObjectResult>")
            elif self.headers.get("If-None-Match") == "*" and name in self.server.objects:
                return self._answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
            else:
                self.server.objects[name] = body
        self._answer(200, ETag=_tag(body))

    def do_POST(self):
        name, query, body = self._parts()
        with self.server.lock:
            if "uploads" in query:
                key = hashlib.sha1(f"{name} {len(self.server.uploads)}".encode()).hexdigest()
                self.server.uploads[key] = {}
                answer = f"<InitiateMultipartUploadResult><UploadId>{key}</UploadId></InitiateMultipartUploadResult>"
            elif "uploadId" in query:
                parts = self.server.uploads.pop(query["uploadId"])
                self.server.objects[name] = b"".join(parts[number] for number in sorted(parts))
                answer = "<CompleteMultipartUploadResult><ETag>x</ETag></CompleteMultipartUploadResult>"
            else:  # delete of many
                for key in re.findall(r"<Key>(.*?)</Key>", body.decode()):
                    self.server.objects.pop(f"{name.rstrip('/')}/{key}", None)
                answer = "<DeleteResult></DeleteResult>"
        self._answer(200, answer.encode())

    def do_DELETE(self):
        name, _, _ = self._parts()
        with self.server.lock:
            self.server.objects.pop(name, None)
        self._answer(204)

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        with self.server.lock:
            found = {
                name.split("/", 1)[1]: data for name, data in self.server.objects.items() if name.startswith(bucket)
            }
        keys, folders = [], set()
        for key in sorted(key for key in found if key.startswith(prefix) and key > query.get("start-after", "")):
            rest = key[len(prefix) :]
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                keys.append(key)
        contents = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>{_tag(found[key])}</ETag><Size>{len(found[key])}</Size></Contents>"
            for key in keys
        )
        prefixes = "".join(
            f"<CommonPrefixes><Prefix>{escape(one)}</Prefix></CommonPrefixes>" for one in sorted(folders)
        )
        answer = f"<ListBucketResult><IsTruncated>false</IsTruncated>{contents}{prefixes}</ListBucketResult>"
        self._answer(200, answer.encode(), Content_Type="application/xml")


def _tag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'
