"""datatrove's readers, made strict: what they log and drop is an error here, with file and row.

A row without text ("" or null) is counted and left out. Everything else that is wrong with a row is
a `BadInputError`, or with ``skip_bad_rows`` logged and counted.
"""

from __future__ import annotations

import io
import json
import math
import sys
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, BinaryIO

import orjson
from datatrove.data import Document
from datatrove.io import DataFolder
from datatrove.pipeline.readers.base import BaseDiskReader
from datatrove.utils.logging import logger
from fsspec.compression import compr
from fsspec.utils import infer_compression

from megatron_xielu.common.text import describe
from megatron_xielu.data import credentials
from megatron_xielu.data.errors import BadInputError
from megatron_xielu.data.sources import File, Group, Part, open_folder, parts

# fsspec takes it too, and only with it finds a file that is cut off, or all frames of one.
if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd  # noqa: F401

_LONGEST = 1 << 30  # bytes of a row; tokenising it would take a hundred times as much memory
# What is UTF-8 as well and no text: where it says so, and what it is.
_NO_TEXT = (
    (257, b"ustar", "a tar archive; unpack it"),
    (0, b"version https://git-lfs", "a pointer of Git LFS; fetch the file with git lfs pull"),
)
_SKIPPED = 1 << 20  # bytes of a line of the part before that are read at a time
_PIECE = 1 << 10  # bytes of a compressed file that are read at a time


class _InPieces:
    """A compressed file whose position is not far ahead of what has become of it."""

    def __init__(self, stored: BinaryIO) -> None:
        self._stored = stored

    def read(self, size: int) -> bytes:
        return self._stored.read(min(size, _PIECE))


class _Strict(BaseDiskReader):
    """What the three have in common.

    Args:
        group: the files, of which a task reads every ``tasks``-th, or every such part.
        tasks: tasks of the whole recipe, of which an executor may run the first few only.
        text_key: column of the text.
        skip_bad_rows: log and count them, do not raise.
        part_bytes: as `sources.parts` takes it.
    """

    def __init__(
        self,
        group: Group,
        *,
        tasks: int,
        text_key: str,
        skip_bad_rows: bool,
        part_bytes: int | None = None,
    ) -> None:
        super().__init__(open_folder("/"), text_key=text_key)
        del self.data_folder  # for the one below
        self.folder = group.folder
        self.parts = parts(group, part_bytes)
        self.tasks = tasks
        self.skip_bad_rows = skip_bad_rows
        self.row = self.empty_rows = self.bad_rows = 0

    @cached_property
    def data_folder(self) -> DataFolder:
        """Opened by who reads: executors write this object to files, and it has no secrets."""
        return open_folder(self.folder)

    def open(self, path: str) -> Any:
        """A file as it is stored."""
        return self.data_folder.open(credentials.real_path(self.folder, path), "rb")

    def place(self, path: str) -> str:
        """A file in the words of a message."""
        return f"{self.folder.rstrip('/')}/{path}"

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        self.empty_rows = self.bad_rows = 0
        yield from data or ()
        for document in self.read_files_shard(self.parts[rank :: self.tasks]):
            self.update_doc_stats(document)
            yield document

    def part(self, file: File) -> float:
        """How much of the file is read, from 0 to 1."""
        return 1.0

    def checked(self, reading: Part, documents: Iterator[Document]) -> Iterator[Document]:
        """The documents of a file, which must have a row, or of a part, which need not."""
        self.reading, self.row = reading, 0
        path = reading.file.path
        try:
            yield from documents
        except BadInputError:
            raise
        except Exception as error:  # every file system and every format has exceptions of its own
            self.row += 1
            raise self.unreadable(path, describe(error)) from error
        if not self.row and not reading.start and reading.end is None:
            self.row = 1
            self.bad(path, "the file has no rows")

    @contextmanager
    def plain(self, path: str) -> Iterator[BinaryIO]:
        """The file without its compression; all of gzip's members and zstd's frames."""
        compression = infer_compression(path)
        with self.open(path) as self.stored:
            if compression is None:  # files of remote systems know no readline with a limit
                yield io.BufferedReader(self.stored)
            elif compression == "zip":  # fsspec would read the first of its files
                self.row = 1
                raise self.unreadable(path, "a zip archive; unpack it")
            else:
                with compr[compression](_InPieces(self.stored), mode="r") as stream:
                    yield stream

    def unreadable(self, path: str, problem: object) -> BadInputError:
        """The error of a file that cannot be read on from a row, even with ``skip_bad_rows``."""
        return BadInputError(f"{self.place(path)}: row {self.row}: cannot be read: {problem}")

    def too_long(self, path: str) -> BadInputError:
        """The error of a row that is no document any more."""
        return self.unreadable(path, f"longer than {_LONGEST:,} bytes")

    def get_document_from_dict(
        self, data: Any, source_file: str, id_in_file: int | str
    ) -> Document | None:
        """A document of the text alone: nothing else of a row is used."""
        self.row += 1
        if not isinstance(data, dict) or self.text_key not in data:
            there = f"; there are: {list(data)}"[:300] if isinstance(data, dict) else ""
            self.bad(source_file, f"no column {self.text_key!r} (--text-key){there}")
            return None
        text = data[self.text_key]
        if text is None or text == "":
            self.empty_rows += 1
            return None
        if not isinstance(text, str):
            self.bad(source_file, f"{self.text_key!r} is not text but {type(text).__name__}")
            return None
        return Document(text=text, id=f"{source_file}:{self.row}")

    def bad(self, path: str, problem: str, row: int | None = None) -> None:
        """Raise, or count and log."""
        message = f"{self.place(path)}: row {row or self.row}: {problem}"
        if not self.skip_bad_rows:
            raise BadInputError(f"{message} (--skip-bad-rows leaves such rows out)")
        self.bad_rows += 1
        logger.warning(f"left out: {message}")

    def read_files_shard(self, shard: list[Part]) -> Iterator[Document]:
        for part in shard:
            yield from self.checked(part, super().read_files_shard([part.file.path]))


class StrictParquetReader(_Strict):
    """Rows of the text column. datatrove's own loop fails a batch for a row that is not UTF-8."""

    name = "parquet"

    def part(self, file: File) -> float:
        return self.row / max(self.rows, self.row, 1)

    def read_file(self, filepath: str) -> Iterator[Document]:
        import pyarrow.parquet

        with (
            self.open(filepath) as stream,
            pyarrow.parquet.ParquetFile(stream) as file,
        ):
            self.rows = file.metadata.num_rows
            columns = file.schema_arrow.names
            if columns.count(self.text_key) != 1:
                problem = "two columns" if self.text_key in columns else "no column"
                problem += f" {self.text_key!r} (--text-key); there are: {columns}"[:300]
                self.row = 1
                self.bad(filepath, problem)
                return
            groups = self._row_groups(file.metadata)
            self.row = sum(
                file.metadata.row_group(i).num_rows for i in range(min(groups, default=0))
            )
            for batch in file.iter_batches(1000, row_groups=groups, columns=[self.text_key]):
                for value in batch.column(0):
                    try:
                        data = {self.text_key: value.as_py()}
                    except (ValueError, OverflowError) as error:
                        self.row += 1
                        self.bad(filepath, f"not UTF-8 text: {error}")
                        continue
                    if document := self.get_document_from_dict(data, filepath, self.row):
                        yield document

    def _row_groups(self, metadata: Any) -> list[int]:
        """Those that begin in the part."""
        groups = list(range(metadata.num_row_groups))
        start, end = self.reading.start, self.reading.end
        if not start and end is None:
            return groups

        def begins(group: int) -> int:
            column = metadata.row_group(group).column(0)
            return int(column.dictionary_page_offset or column.data_page_offset)

        return [i for i in groups if start <= begins(i) and (end is None or begins(i) < end)]


class StrictJsonlReader(_Strict):
    """One JSON object a line; datatrove's own loop ends a file at the first invalid UTF-8."""

    name = "jsonl"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        names = {json.dumps(self.text_key, ensure_ascii=ascii) for ascii in (False, True)}
        self.names = [name.encode() for name in names]
        self.first = 0  # byte at which rows are counted from

    def part(self, file: File) -> float:
        return self.stored.tell() / file.size

    def place(self, path: str) -> str:
        where = super().place(path)
        return f"{where}, from byte {self.first:,}" if self.first else where

    def _to_first_line(self, stream: BinaryIO) -> int:
        """Go to the first line that begins in the part; returns its byte."""
        if not self.reading.start:
            return 0
        stream.seek(self.reading.start - 1)  # where the line before may end
        place = self.reading.start - 1
        for piece in iter(partial(stream.readline, _SKIPPED), b""):
            place += len(piece)
            if piece.endswith(b"\n"):
                break
        return place

    def read_file(self, filepath: str) -> Iterator[Document]:
        self.first = lines = 0
        end = math.inf if self.reading.end is None else self.reading.end
        with self.plain(filepath) as stream:
            place = self.first = self._to_first_line(stream)
            while place < end and (line := stream.readline(_LONGEST)):
                place += len(line)
                lines += 1
                if len(line) == _LONGEST:
                    self.row = lines
                    raise self.too_long(filepath)
                if not line.strip():
                    continue
                self.row = lines - 1
                try:
                    data = self._parse(line)
                except ValueError as error:
                    self.row = lines
                    self.bad(filepath, str(error))
                    continue
                if document := self.get_document_from_dict(data, filepath, lines):
                    yield document

    def _parse(self, line: bytes) -> Any:
        """A row; raises a ValueError that says what is wrong with it."""
        try:
            data = orjson.loads(line)
        except orjson.JSONDecodeError:
            data = self._parse_leniently(line)
        if sum(map(line.count, self.names)) > 1 and isinstance(data, dict):
            pairs = json.loads(line.removeprefix(BOM_UTF8), object_pairs_hook=list)
            if [name for name, _ in pairs].count(self.text_key) > 1:
                raise ValueError(f"two columns {self.text_key!r}")
        return data

    def _parse_leniently(self, line: bytes) -> Any:
        """As Python's json, which writes NaN, too; other columns may hold what is no text."""
        try:
            data = json.loads(_decode(line))
            if isinstance(data, dict) and isinstance(text := data.get(self.text_key), str):
                text.encode()  # not so half of a pair of surrogates
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8: {error}") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not JSON: {error}") from None
        return data


class TextReader(_Strict):
    """Plain text: a file is a document. datatrove has no such reader."""

    name = "plain text"

    def read_file(self, filepath: str) -> Iterator[Document]:
        with self.plain(filepath) as stream:
            content = stream.read(_LONGEST)
        if len(content) == _LONGEST:
            self.row = 1
            raise self.too_long(filepath)
        for place, magic, what in _NO_TEXT:
            if content.startswith(magic, place):
                self.row = 1
                raise self.unreadable(filepath, what)
        try:
            text = _decode(content)
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            self.row = 1
            self.bad(filepath, f"not UTF-8: {error}", row=line)
            return
        if document := self.get_document_from_dict({self.text_key: text}, filepath, 1):
            yield document


def _decode(content: bytes) -> str:
    """Text without its byte-order mark.

    Raises:
        UnicodeDecodeError: it is not UTF-8. Without a mark UTF-16 may look as if it were.
    """
    start = content[:2]
    if start in (BOM_UTF16_LE, BOM_UTF16_BE) or start.count(0) == 1:
        problem = "it is UTF-16; convert it, with iconv -f UTF-16 -t UTF-8 for example"
        raise UnicodeDecodeError("utf-8", start, 0, 1, problem)
    return content.removeprefix(BOM_UTF8).decode()


def make_reader(group: Group, **options: Any) -> _Strict:
    """The reader of the group's format; options as for `_Strict`."""
    readers = {"parquet": StrictParquetReader, "jsonl": StrictJsonlReader, "text": TextReader}
    return readers[group.format](group, **options)
