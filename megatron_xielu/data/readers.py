"""datatrove's readers, made strict: what they log and drop is an error here, with file and row.

A row without text ("" or null) is counted and left out. Everything else that is wrong with a row is
a `BadInputError`, or with ``skip_bad_rows`` logged and counted.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.readers import JsonlReader, ParquetReader
from datatrove.pipeline.readers.base import BaseDiskReader
from datatrove.utils.logging import logger

from megatron_xielu.data.errors import BadInputError
from megatron_xielu.data.sources import Group

# fsspec takes it too, and only with it finds a file that is cut off, or all frames of one.
if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_DAMAGED = (OSError, EOFError, zlib.error, zstd.ZstdError)


class _Strict(BaseDiskReader):
    """What the three have in common.

    Args:
        group: the files.
        paths_file: holds their paths, one a line: a task reads every ``tasks``-th.
        tasks: tasks of the whole recipe, of which an executor may run the first few only.
        text_key: column of the text.
    """

    def __init__(
        self, group: Group, *, paths_file: str, tasks: int, text_key: str, skip_bad_rows: bool
    ) -> None:
        super().__init__(group.folder, paths_file=paths_file, text_key=text_key)
        self.tasks = tasks
        self.skip_bad_rows = skip_bad_rows
        self.row = self.empty_rows = self.bad_rows = 0

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        self.empty_rows = self.bad_rows = 0
        yield from super().run(data, rank, self.tasks)

    def get_document_from_dict(
        self, data: Any, source_file: str, id_in_file: int | str
    ) -> Document | None:
        """A document of the text alone: nothing else of a row is used."""
        self.row += 1
        if not isinstance(data, dict) or self.text_key not in data:
            there = f"; there are: {', '.join(data)}" if isinstance(data, dict) else ""
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
        message = f"{self.data_folder.resolve_paths(path)}: row {row or self.row}: {problem}"
        if not self.skip_bad_rows:
            raise BadInputError(f"{message} (--skip-bad-rows leaves such rows out)")
        self.bad_rows += 1
        logger.warning(f"left out: {message}")

    def read_files_shard(self, shard: list[str]) -> Iterator[Document]:
        for path in shard:
            self.row = 0
            yield from super().read_files_shard([path])
            if not self.row:
                self.row = 1
                self.bad(path, "the file has no rows")


class StrictParquetReader(_Strict, ParquetReader):
    """Rows of the text column."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.batch_size = 1000
        self.read_metadata = False
        self.id_key = self.text_key  # no other column is read

    def read_file(self, filepath: str) -> Iterator[Document]:
        import pyarrow
        import pyarrow.parquet

        try:
            with self.data_folder.open(filepath, "rb") as stream:
                columns = pyarrow.parquet.read_schema(stream).names
            if self.text_key not in columns:
                self.row = 1
                self.bad(
                    filepath, f"no column {self.text_key!r} (--text-key); there are: {columns}"
                )
                return
            yield from super().read_file(filepath)
        except UnicodeDecodeError:
            yield from self._one_by_one(filepath, self.row)
        except pyarrow.ArrowException as error:
            raise BadInputError(
                f"{self.data_folder.resolve_paths(filepath)}: row {self.row + 1}: {error}"
            ) from error

    def _one_by_one(self, filepath: str, done: int) -> Iterator[Document]:
        """The rows after the first ``done``: one that is not UTF-8 fails its whole batch."""
        import pyarrow.parquet

        row = 0
        with (
            self.data_folder.open(filepath, "rb") as stream,
            pyarrow.parquet.ParquetFile(stream) as file,
        ):
            for batch in file.iter_batches(batch_size=self.batch_size, columns=[self.text_key]):
                for value in batch.column(0):
                    row += 1
                    if row <= done:
                        continue
                    try:
                        line = {self.text_key: value.as_py()}
                    except UnicodeDecodeError as error:
                        self.row += 1
                        self.bad(filepath, f"not UTF-8: {error}")
                        continue
                    if document := self.get_document_from_dict(line, filepath, row):
                        yield document


class StrictJsonlReader(_Strict, JsonlReader):
    """One JSON object a line; datatrove's own loop ends a file at the first invalid UTF-8."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.compression = "infer"

    def read_file(self, filepath: str) -> Iterator[Document]:
        import orjson

        lines = 0
        with self.data_folder.open(filepath, "rb", compression=self.compression) as stream:
            try:
                for line in stream:
                    lines += 1
                    if not line.strip():
                        continue
                    self.row = lines - 1
                    try:
                        data = orjson.loads(line)
                    except orjson.JSONDecodeError as error:
                        self.row = lines
                        self.bad(filepath, f"{_utf8_problem(line) or 'not JSON'}: {error}")
                        continue
                    if document := self.get_document_from_dict(data, filepath, lines):
                        yield document
            except _DAMAGED as error:
                path = self.data_folder.resolve_paths(filepath)
                raise BadInputError(f"{path}: row {lines + 1}: cannot be read: {error}") from error


class TextReader(_Strict):
    """Plain text: a file is a document. datatrove has no such reader."""

    name = "plain text"

    def read_file(self, filepath: str) -> Iterator[Document]:
        try:
            with self.data_folder.open(filepath, "rb", compression="infer") as stream:
                content = stream.read()
        except _DAMAGED as error:
            path = self.data_folder.resolve_paths(filepath)
            raise BadInputError(f"{path}: row 1: cannot be read: {error}") from error
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            self.row = 1
            self.bad(filepath, f"not UTF-8: {error}", row=line)
            return
        if document := self.get_document_from_dict({self.text_key: text}, filepath, 1):
            yield document


def _utf8_problem(line: bytes) -> str | None:
    try:
        line.decode()
    except UnicodeDecodeError:
        return "not UTF-8"
    return None


def make_reader(group: Group, **options: Any) -> _Strict:
    """The reader of the group's format; options as for `_Strict`."""
    readers = {"parquet": StrictParquetReader, "jsonl": StrictJsonlReader, "text": TextReader}
    return readers[group.format](group, **options)
