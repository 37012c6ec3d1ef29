"""safetensors files, one tensor in memory at a time.

The format: 8 bytes of length (little endian), a JSON header with each tensor's dtype, shape and
place, and the data. Shapes are known before any tensor is read, so that the header can be written
first; the library's own ``save_file`` wants all tensors of a file at once.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_xielu.checkpoints.source import Refused
from megatron_xielu.common import safetensors_index
from megatron_xielu.common.schema import Malformed

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class Entry:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Its size."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Writer:
    """Writes one model into a folder, as one file or several with an index.

    Args:
        folder: exists.
        files: the tensors of each file. They must be written in this order.
    """

    def __init__(self, folder: Path, files: Sequence[Sequence[Entry]]) -> None:
        self._folder = folder
        count = len(files)
        self._names = (
            [safetensors_index.ALONE]
            if count == 1
            else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        )
        self._files = [list(entries) for entries in files]
        self._at = (0, 0)
        self._file = self._begin(0)

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor."""
        file, index = self._at
        if index == len(self._files[file]):
            self._file.close()
            file, index = file + 1, 0
            self._file = self._begin(file)
        entry = self._files[file][index]
        assert (name, tuple(tensor.shape), tensor.dtype) == (entry.name, entry.shape, entry.dtype)
        self._file.write(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))
        self._at = (file, index + 1)

    def finish(self) -> None:
        """Write the index, where there are several files."""
        assert self._at == (len(self._files) - 1, len(self._files[-1]))
        self._file.close()
        if len(self._files) == 1:
            return
        index = {
            "metadata": {"total_size": sum(e.bytes for entries in self._files for e in entries)},
            "weight_map": {
                entry.name: name
                for name, entries in zip(self._names, self._files, strict=True)
                for entry in entries
            },
        }
        (self._folder / safetensors_index.INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _begin(self, number: int):  # type: ignore[no-untyped-def]
        header: dict = {"__metadata__": {"format": "pt"}}
        end = 0
        for entry in self._files[number]:
            start, end = end, end + entry.bytes
            header[entry.name] = {
                "dtype": _NAMES[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file = (self._folder / self._names[number]).open("wb")
        file.write(struct.pack("<Q", len(text)) + text)
        return file


class Reader:
    """The tensors of a Hugging Face model's folder.

    Args:
        folder: holds ``model.safetensors``, or several files and an index.

    Raises:
        Refused: it has no safetensors, or a file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        try:
            paths = safetensors_index.files(folder)
        except Malformed as error:
            raise Refused(str(error)) from None
        self._entries: dict[str, tuple[Path, tuple[int, ...], torch.dtype]] = {}
        dtypes = {name: dtype for dtype, name in _NAMES.items()}
        for path in paths:
            if not path.is_file():
                raise Refused(f"{path} is missing; weights are read from safetensors only")
            try:
                with safe_open(path, framework="pt") as file:
                    for key in file.keys():  # noqa: SIM118 (it is no mapping)
                        view = file.get_slice(key)
                        dtype = dtypes.get(view.get_dtype())
                        if dtype is None:
                            raise Refused(
                                f"{path}: {key} is {view.get_dtype()}; all tensors must be "
                                f"{', '.join(dtypes)} (a quantized model cannot be converted)"
                            )
                        if key in self._entries:
                            raise Refused(f"{path}: {key} is in {self._entries[key][0].name}, too")
                        self._entries[key] = (path, tuple(view.get_shape()), dtype)
            except Refused:
                raise
            except Exception as error:  # safetensors' own error, or the system's
                raise Refused(f"{path} cannot be read: {error}") from error

    @property
    def names(self) -> set[str]:
        """Of all tensors."""
        return set(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor."""
        return self._entries[name][1]

    def dtype(self, name: str) -> torch.dtype:
        """Of one tensor."""
        return self._entries[name][2]

    def read(self, name: str) -> Tensor:
        """One tensor."""
        with safe_open(self._entries[name][0], framework="pt") as file:
            return file.get_tensor(name)
