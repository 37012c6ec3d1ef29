"""A small part of the Hugging Face Hub's HTTP interface, for one dataset from a folder here."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

SHA = "5e1f" * 10
REVISION = "(?:refs/convert/parquet|[^/]+)"  # all have the same files here


@contextmanager
def serve(folder: Path, name: str, configs: list[dict]) -> Iterator[str]:
    """Serve the folder's files as dataset ``name``; yields the endpoint."""

    def entry(path: Path) -> dict:
        return {
            "type": "file",
            "path": str(path.relative_to(folder)),
            "oid": "0" * 40,
            "size": path.stat().st_size,
        }

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Repo-Commit", SHA)
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(self.path.partition("?")[0])
            everything = [entry(p) for p in sorted(folder.rglob("*")) if p.is_file()]
            if match := re.fullmatch(rf"/api/datasets/{name}/tree/{REVISION}(/.*)?", path):
                below = (match[1] or "/").strip("/")
                found = [e for e in everything if e["path"].startswith(below)]
                self.answer(json.dumps(found).encode())
            elif re.fullmatch(rf"/api/datasets/{name}(/revision/.*)?", path):
                info = {"id": name, "sha": SHA, "cardData": {"configs": configs}, "siblings": []}
                self.answer(json.dumps(info).encode())
            elif match := re.fullmatch(rf"(?:/datasets)?/{name}/resolve/{REVISION}/(.*)", path):
                content = (folder / match[1]).read_bytes()
                etag = f'"{hashlib.sha1(content).hexdigest()}"'
                asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                if asked:
                    start, end = int(asked[1]), int(asked[2] or len(content) - 1)
                    part = content[start : end + 1]
                    place = f"bytes {start}-{start + len(part) - 1}/{len(content)}"
                    self.answer(part, 206, Content_Range=place, ETag=etag)
                else:
                    self.answer(content, ETag=etag)
            else:
                self.answer(b"{}", 404)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
