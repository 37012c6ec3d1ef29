"""Which element of what each element of a tensor is, for tensors that have no memory.

Inside the mode `Provenance` every tensor is made on PyTorch's meta device, and copies are followed:
a tensor of eight billion elements costs nothing, and still says which elements of which parameters
it consists of. What the mode does not know to be a copy leaves its result without provenance, so
that a gap is found where there may be none, but never the reverse.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

_META = torch.device("meta")
_COPIES = {aten.clone, aten._to_copy, aten.lift_fresh_copy}


class Piece(NamedTuple):
    """Elements ``start`` to ``stop`` of a tensor are those of ``source`` from ``first`` on."""

    start: int
    stop: int
    source: Any  # whatever it was called in `Provenance.write`
    first: int

    def shifted(self, by: int) -> Piece:
        """The same, in a tensor that begins ``by`` elements earlier."""
        return self._replace(start=self.start + by, stop=self.stop + by)

    def cut(self, start: int, stop: int) -> Piece:
        """The part of it inside ``start`` to ``stop``, which it overlaps."""
        begin = max(self.start, start)
        return Piece(begin, min(self.stop, stop), self.source, self.first + begin - self.start)


def joined(pieces: Iterable[Piece]) -> list[Piece]:
    """The same pieces with neighbours that belong together made one; sorted by ``start``."""
    result: list[Piece] = []
    for piece in pieces:
        if result:
            last = result[-1]
            ends_at = last.first + last.stop - last.start
            if (last.stop, last.source, ends_at) == (piece.start, piece.source, piece.first):
                result[-1] = last._replace(stop=piece.stop)
                continue
        result.append(piece)
    return result


def cut(pieces: Sequence[Piece], start: int, stop: int) -> list[Piece]:
    """The parts of sorted ``pieces`` inside ``start`` to ``stop``."""
    found = []
    for index in range(bisect.bisect_right(pieces, start, key=lambda p: p.stop), len(pieces)):
        if pieces[index].start >= stop:
            break
        found.append(pieces[index].cut(start, stop))
    return found


class Provenance(TorchDispatchMode):
    """While it is active, tensors have no memory, and `read` says what they are copies of."""

    def __init__(self) -> None:
        super().__init__()
        # By storage. Views share it; a dead one's address is used again, by a tensor that is made
        # in this mode and so starts anew.
        self._storages: dict[int, list[Piece]] = {}

    def read(self, tensor: torch.Tensor) -> list[Piece]:
        """What the elements of ``tensor``, in their order, are; nothing if that is not known."""
        pieces = self._storages.get(_storage(tensor))
        if not pieces or not tensor.is_contiguous():
            return []
        start = int(tensor.storage_offset())
        return [piece.shifted(-start) for piece in cut(pieces, start, start + tensor.numel())]

    def write(self, tensor: torch.Tensor, pieces: Iterable[Piece]) -> None:
        """Say what the elements of ``tensor`` are; those not mentioned are nothing known."""
        old = self._storages.get(_storage(tensor), [])
        start = int(tensor.storage_offset())
        stop = start + tensor.numel()
        if not tensor.is_contiguous():
            start, stop, pieces = 0, tensor.untyped_storage().nbytes(), []
        left = bisect.bisect_right(old, start, key=lambda piece: piece.stop)
        right = bisect.bisect_left(old, stop, key=lambda piece: piece.start)
        # The first and the last of them may reach out of what is written.
        kept = [piece.cut(piece.start, start) for piece in old[left:right] if piece.start < start]
        rest = [piece.cut(stop, piece.stop) for piece in old[left:right] if piece.stop > stop]
        new = [piece.shifted(start) for piece in pieces]
        self._storages[_storage(tensor)] = [
            *old[:left],
            *joined([*kept, *new, *rest]),
            *old[right:],
        ]

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = _META
        operation = function.overloadpacket
        if operation is aten.lift_fresh:  # torch.tensor(…)
            return args[0].to(_META)
        result = function(*args, **kwargs)
        if operation is aten.copy_:
            same_size = args[0].numel() == args[1].numel()
            self.write(args[0], self.read(args[1]) if same_size else [])
        elif function._schema.is_mutable:
            for argument, value in zip(function._schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    for tensor in _tensors(value):
                        self.write(tensor, [])
        else:
            inputs = {_storage(tensor) for value in args for tensor in _tensors(value)}
            for tensor in _tensors(result):
                if _storage(tensor) not in inputs:  # a view keeps what is known
                    self._storages.pop(_storage(tensor), None)
            pieces = self._copied(operation, args)
            if pieces:
                self.write(result, pieces)
        return result

    def _copied(self, operation: Any, args: Sequence[Any]) -> list[Piece]:
        if operation in _COPIES:
            return self.read(args[0])
        if operation is aten.cat and (len(args) < 2 or args[1] == 0):
            start, pieces = 0, []
            for tensor in args[0]:
                pieces += [piece.shifted(start) for piece in self.read(tensor)]
                start += tensor.numel()
            return pieces
        if operation is aten.constant_pad_nd and args[0].dim() == 1 and args[1][0] >= 0:
            return [piece.shifted(args[1][0]) for piece in self.read(args[0])]
        return []


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(value: Any) -> list[torch.Tensor]:
    values = value if isinstance(value, list | tuple) else [value]
    return [v for v in values if isinstance(v, torch.Tensor)]
