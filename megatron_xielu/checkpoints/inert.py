"""Reads pickles without executing anything from them: classes become inert objects.

Neither PyTorch is needed for that nor Megatron, whose classes stand in its state. A name that no
checkpoint needs (`pickled_names`) is refused, though it would do nothing here: PyTorch unpickles
``.metadata`` without any restriction, and what is called good here is loaded there.
"""

from __future__ import annotations

import functools
import io
import math
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_xielu.checkpoints.source import Refused
from megatron_xielu.common import pickled_names
from megatron_xielu.common.text import reason

_READ = """
import sys
from pathlib import Path
from megatron_xielu.checkpoints import inert
inert.unpickle(Path(sys.argv[1]))
"""
_SLOWEST = 1e5  # bytes a second; a twentieth of what any disk and processor do


class Inert:
    """Stands in for another class: has its attributes, runs none of its code."""

    value: Any  # of an enumeration

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        instance = super().__new__(cls)
        instance.value = args[0] if args else None
        return instance

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __repr__(self) -> str:  # the same of the same value
        return f"{type(self).__name__}({self.value!r})"

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def stand_in(module: str, name: str) -> Any:
    """An inert class of the same name, for one of ``.metadata``; containers stay what they are.

    Raises:
        pickle.UnpicklingError: it does not belong there.
    """
    if not pickled_names.in_metadata(module, name):
        raise pickled_names.foreign(f"{module}.{name}")
    return _class(name)


def _class(name: str) -> Any:
    return {"OrderedDict": dict, "Size": tuple}.get(name) or _inert(name)


@functools.cache
def _inert(name: str) -> type[Inert]:
    return type(name, (Inert,), {})


@dataclass(frozen=True)
class SavedTensor:
    """What the pickle of a tensor by ``torch.save`` says of it.

    Attributes:
        kind: of its storage, as ``FloatStorage``.
        storage: the file beside the pickle that holds it.
        elements: of the tensor.
        fills_its_storage: whether there is nothing else in that file.
    """

    kind: str
    storage: str
    elements: int
    fills_its_storage: bool


class _TensorUnpickler(pickled_names.Unpickler):
    def persistent_load(self, pid: Any) -> Any:
        return pid


def unpickle(path: Path, find: Callable[[str, str], Any] = stand_in) -> Any:
    """A pickle's content.

    Args:
        path: its file.
        find: what stands for a class, by module and name; may raise.

    Raises:
        Exception: whatever wrong bytes make a pickle raise.
    """
    with path.open("rb") as file:
        return pickled_names.Unpickler(file, find).load()


def survives(path: Path) -> bool:
    """Whether a process can read a pickle and go on: deep nesting ends it, some take for ever."""
    command = [sys.executable, "-c", _READ, str(path)]
    try:
        longest = 30.0 + path.stat().st_size / _SLOWEST
        done = subprocess.run(command, stderr=subprocess.DEVNULL, timeout=longest)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode >= 0


def saved_tensor(pickled: bytes) -> SavedTensor | None:
    """What is said of a tensor; None of what is no plain tensor.

    Raises:
        Exception: whatever wrong bytes make a pickle raise.
    """

    def find(module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *rebuilt_from: rebuilt_from
        if not pickled_names.in_state(f"{module}.{name}"):
            raise pickled_names.foreign(f"{module}.{name}")
        if module == "torch" and name.endswith("Storage"):
            return name
        return _class(name)

    match _TensorUnpickler(io.BytesIO(pickled), find).load():
        case (("storage", str(kind), str(storage), _, int(held)), _, tuple(size), *_):
            elements = math.prod(size)
            return SavedTensor(kind, storage, elements, elements == held)
    return None


def load(data: io.BytesIO | Path, what: str) -> Any:
    """``torch.load`` without running code: Megatron's classes become inert objects.

    Args:
        data: a file by ``torch.save``; its tensors stay on the disk (mapped) where it is a path.
        what: its name, for messages.

    Raises:
        Refused: it names something that no checkpoint needs, or cannot be read.
    """
    import torch  # not needed by `unpickle`, which goes beside a training

    mapped = isinstance(data, Path)
    try:
        if isinstance(data, io.BytesIO):
            data.seek(0)
        names = torch.serialization.get_unsafe_globals_in_checkpoint(data)
        for name in names:
            if not pickled_names.in_state(name):
                raise Refused(
                    f"{what} names {name}, which does not belong into a checkpoint; nothing of it "
                    "was executed"
                )
        inert: list[Any] = [
            (Namespace if name == "argparse.Namespace" else _inert(name), name) for name in names
        ]
        if isinstance(data, io.BytesIO):
            data.seek(0)
        with torch.serialization.safe_globals(inert):
            return torch.load(data, map_location="cpu", weights_only=True, mmap=mapped)
    except Refused:
        raise
    except Exception as error:  # whatever wrong bytes make torch.load raise
        raise Refused(f"{what} cannot be read: {reason(error)}") from error
