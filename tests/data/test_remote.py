"""Files that a server has: all formats are read, what the server does wrong is one line, and what
gives access to them is nowhere afterwards."""

from __future__ import annotations

import base64
import gzip
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_xielu.data import command, credentials, executors, scheduler, sources
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


USER, PASSWORD, SIGNATURE = "u5er", "pa55word", "s1gnature"
SECRETS = (USER, PASSWORD, SIGNATURE, "t0ken")


class Handler(BaseHTTPRequestHandler):
    """``/FAULT/NAME``; parts of a file are asked for by their range of bytes."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        _, fault, name = unquote(path).split("/")
        if fault == "private":
            known = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
            if self.headers["Authorization"] != f"Basic {known}" or (
                name and SIGNATURE not in query
            ):
                self.send_error(403)
                return
            fault = self.server.private
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
        server.private = "none"
        Handler.server = server
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def private(url: str) -> str:
    """Of a file that is there for one user, with a signature."""
    credentials.forget()
    host = url.partition("://")[2]
    return f"http://{USER}:{PASSWORD}@{host}/private/a.jsonl?X-Amz-Signature={SIGNATURE}"


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


def told(*places: str | Path) -> list[str]:
    """Secrets that stand in texts, or in a folder's files, but for the one that is private."""
    files = [path for place in places if isinstance(place, Path) for path in place.rglob("*")]
    contents = [place.encode() for place in places if isinstance(place, str)]
    contents += [f.read_bytes() for f in files if f.is_file() and f.name != "urls.json"]
    return [secret for secret in SECRETS for content in contents if secret.encode() in content]


def test_what_gives_access_is_written_nowhere(private: str, tmp_path: Path, monkeypatch, capsys):
    tokenizer = Tokenizer(models.WordLevel({"?": 0, "end": 1}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    output = tmp_path / "data"
    monkeypatch.setenv("HF_TOKEN", "t0ken")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "t0ken")

    def prepare(source: str) -> str:
        command.main(
            [
                *("--source", source, "--tokenizer", str(tmp_path / "tokenizer.json")),
                *("--eod-token", "end", "--workers", "1", "--output", str(output)),
            ]
        )
        return "".join(capsys.readouterr())

    def run(*arguments: object) -> object:
        Handler.server.private = "broken"
        return real(*arguments)

    real = scheduler.run
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(scheduler, "run", run)
        prepare(private)
    assert "/private/a.jsonl: row 1: cannot be read: FileNotFoundError: http" in end.value.code
    assert not told(end.value.code, "".join(capsys.readouterr()), output)
    assert (output / "work/urls.json").stat().st_mode & 0o777 == 0o600

    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 71\n")
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho node\n")
    for name in ("sbatch", "scontrol"):
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    shutil.rmtree(output / "work/logs/completions")
    executors.make_executor(output, executors.Request("slurm", workers=1, tasks=1)).run()
    assert not told(output)
    done = subprocess.run(
        [
            Path(sys.executable).with_name("launch_pickled_pipeline"),
            output / "work/logs/executor.pik",
        ],
        env=os.environ | {"SLURM_ARRAY_TASK_ID": "0", "SLURM_NODELIST": "node"},
        capture_output=True,
        text=True,
    )
    assert "BadInputError: http://127.0.0.1:" in done.stderr
    assert not told(done.stdout, done.stderr, output)

    Handler.server.private = "none"
    renewed = private.replace(SIGNATURE, f"new-{SIGNATURE}")
    assert " training tokens in 49" in prepare(renewed)
    assert not told(output) and not (output / "work/urls.json").exists()
    sources_of = json.loads((output / "manifest.json").read_bytes())["sources"]
    assert sources_of == [private.partition("?")[0].replace(f"{USER}:{PASSWORD}@", "")]


def test_one_file_by_two_signatures(private: str):
    message = "/private/a.jsonl is given with two users, passwords or queries; leave one out"
    sources.find(private, subset=None, format=None, glob=None)
    with pytest.raises(DataError, match=message) as error:
        sources.find(private + "&x", subset=None, format=None, glob=None)
    assert not told(str(error.value))
