"""Files that a server has: all formats are read, and what the server does wrong is one line."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import pyarrow
import pyarrow.parquet
import pytest

from megatron_xielu.data import sources
from megatron_xielu.data.errors import DataError
from megatron_xielu.data.readers import make_reader

TEXTS = [f"text {i} é" for i in range(500)]
ROWS = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)


def parquet() -> bytes:
    stream = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), stream)
    return stream.getvalue().to_pybytes()


FILES = {
    "a.jsonl": ROWS,
    "a.jsonl.gz": gzip.compress(ROWS),
    "a.parquet": parquet(),
    "a.txt": "".join(TEXTS).encode(),
}


class Handler(BaseHTTPRequestHandler):
    """``/FAULT/NAME``; parts of a file are asked for by their range of bytes."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        _, fault, name = unquote(self.path).split("/")
        if fault == "gone":
            self.send_error(404)
            return
        if fault == "broken":
            self.send_error(500)
            return
        body, first = FILES[name], 0
        whole = len(body)
        ranges = self.headers.get("Range") if fault == "none" else None
        if ranges:
            first, last = map(int, ranges.removeprefix("bytes=").split("-"))
            body = body[first : last + 1]
        self.send_response(206 if ranges else 200)
        if fault == "none":
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{whole}")
        if fault != "no size":
            self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if fault == "breaks off" else body)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def read(source: str) -> list[str]:
    (group,) = sources.find(source, subset=None, format=None, glob=None)
    reader = make_reader(group, tasks=1, text_key="text", skip_bad_rows=False)
    return [document.text for document in reader.run()]


@pytest.mark.parametrize("name", FILES)
def test_read(url: str, name: str):
    assert read(f"{url}/none/{name}") == (["".join(TEXTS)] if name == "a.txt" else TEXTS)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("gone", "FileNotFoundError"),
        ("broken", "500, message='Internal Server Error'"),
        ("no size", "its server does not say its size: download it first"),
        ("breaks off", "row 1: cannot be read: ClientPayloadError"),
    ],
)
def test_faults_of_a_server(url: str, name: str, fault: str, message: str):
    source = f"{url}/{fault.replace(' ', '%20')}/{name}"
    with pytest.raises(DataError) as error:
        read(source)
    assert source in str(error.value) and message in str(error.value)
    assert "\n" not in str(error.value)
