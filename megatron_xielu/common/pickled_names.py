"""Which names the pickles of a checkpoint may hold. A pickle calls what it names while it is read.

Two kinds. ``.metadata`` has PyTorch's own data classes and nothing else: `METADATA`. The records
that are no tensors, ``common.pt`` and the files of the format ``torch`` have tensors, numpy's
arrays, Megatron's arguments with its enumerations: `in_state`. As text, since a check beside a
training imports no torch; a test compares them with what torch and Megatron write.
"""

from __future__ import annotations

import importlib
import pickle
import pickletools
import re
from collections.abc import Callable, Mapping
from typing import IO, Any

_DCP = "torch.distributed.checkpoint"
_METADATA = f"{_DCP}.metadata"
_PLANNER = f"{_DCP}.planner"

# By name, not by form: a bit that flips makes float33 of float32.
_DTYPES = (
    *("float16", "float32", "float64", "bfloat16", "complex32", "complex64", "complex128", "bool"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    *("float4_e2m1fn_x2", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))),
)

# Data classes and enumerations; Megatron keeps the plans of the save there, too.
METADATA = frozenset(
    [
        *((_METADATA, f"{kind}StorageMetadata") for kind in ("Bytes", "Chunk", "Tensor")),
        *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta")),
        *((_METADATA, name) for name in ("TensorProperties", "_MEM_FORMAT_ENCODING")),
        *((_PLANNER, name) for name in ("SavePlan", "LoadPlan", "WriteItem", "ReadItem")),
        *((_PLANNER, name) for name in ("WriteItemType", "LoadItemType")),
        *((_PLANNER, name) for name in ("TensorWriteData", "BytesIOWriteData")),
        *((f"{_DCP}.filesystem", name) for name in ("_StorageInfo", "_StoragePrefix")),
        *(("torch", name) for name in ("Size", *_DTYPES)),
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
        *((module, "PosixPath") for module in ("pathlib", "pathlib._local")),
    ]
)

_STATE = re.compile(
    r"argparse\.Namespace|types\.SimpleNamespace|signal\.Signals|_io\.BytesIO"
    r"|pathlib\.(_local\.)?(Pure)?PosixPath"
    r"|collections\.(OrderedDict|Counter|defaultdict|deque)"
    r"|_codecs\.encode|(builtins|__builtin__)\.(bytearray|complex|set|frozenset|slice|range|dict)"
    # Each function makes a tensor or an array of what stands behind it, and calls nothing else.
    rf"|torch\.((cuda\.)?(sparse\.)?\w*(Storage|Tensor)|Size|device|{'|'.join(_DTYPES)})"
    r"|torch\.storage\.(Typed|Untyped)Storage|torch\.nn\.parameter\.Parameter|torch\._C\.Generator"
    r"|torch\.serialization\._get_layout|torch\._tensor\._rebuild_from_type_v2"
    r"|torch\._utils\._rebuild_\w+"
    r"|numpy\.(ndarray|dtype|bool_|(u?int|float)\d+)|numpy\.dtypes\.\w+DType"
    r"|numpy\._?core\.multiarray\.(_reconstruct|scalar)"
    # Of any release: a class, by its name. Their functions do more than make a value.
    r"|(megatron|transformer_engine)(\.\w+)+\.[A-Z]\w*"
)

# What else looks up a name; torch.save writes none of them.
_OTHER_LOOKUPS = ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4")


def in_metadata(module: str, name: str) -> bool:
    """Whether ``.metadata`` may name this."""
    return (module, name) in METADATA


def in_state(name: str) -> bool:
    """Whether the state in a checkpoint may name this (``module.name``)."""
    return _STATE.fullmatch(name) is not None


def metadata_class(module: str, name: str) -> Any:
    """What ``.metadata`` means by a name.

    Raises:
        pickle.UnpicklingError: it does not belong there; nothing of it is imported.
    """
    if not in_metadata(module, name):
        raise foreign(f"{module}.{name}")
    return getattr(importlib.import_module(module), name)


def foreign(name: str, where: str = "it") -> pickle.UnpicklingError:
    """The error at a name that is not one of these."""
    return pickle.UnpicklingError(
        f"{where} names {name}, which does not belong there; nothing of it was executed"
    )


def check_state(data: bytes) -> None:
    """Refuse a pickle by torch.save (``data.pkl``) that names anything else than state needs.

    Raises:
        pickle.UnpicklingError: naming it.
        ValueError: it is no such pickle.
    """
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "GLOBAL" and not in_state(".".join(str(argument).split(" "))):
            raise foreign(str(argument).replace(" ", "."))
        if opcode.name in _OTHER_LOOKUPS:
            raise foreign(f"something by {opcode.name}")


class Unpickler(pickle.Unpickler):
    """Unpickles with what a function of module and name finds, and may refuse.

    A pickle can also set attributes of what it names: of a class, for the whole process. Those are
    put back, and it is refused.
    """

    def __init__(self, file: IO[bytes], find: Callable[[str, str], Any]) -> None:
        super().__init__(file)
        self._find = find
        self._named: dict[int, tuple[Any, dict[str, Any]]] = {}  # with its attributes

    def find_class(self, module: str, name: str) -> Any:
        """See `pickle.Unpickler`."""
        found = self._find(module, name)
        for one in (found, *getattr(found, "__members__", {}).values()):
            if hasattr(one, "__dict__"):
                self._named.setdefault(id(one), (one, dict(vars(one))))
        return found

    def load(self) -> Any:
        """See `pickle.Unpickler`.

        Raises:
            pickle.UnpicklingError: it would change something that is not its own.
        """
        try:
            content = super().load()
        finally:
            changed = [name for one, before in self._named.values() for name in _undo(one, before)]
        if changed:
            raise pickle.UnpicklingError(
                f"it sets {min(changed)} of what is not its own; that was undone"
            )
        return content


def _undo(one: Any, before: Mapping[str, Any]) -> list[str]:
    """Give back its attributes to what a pickle named; those that were changed."""
    now = vars(one)
    changed = [name for name in {*now, *before} if now.get(name) is not before.get(name)]
    for name in changed:
        if name in before:
            setattr(one, name, before[name])
        else:
            delattr(one, name)
    return changed
