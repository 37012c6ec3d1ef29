"""Which files hold the weights of a Hugging Face model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_xielu.common import schema

INDEX, ALONE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True)
class _Index:
    weight_map: dict[str, str]

    def __post_init__(self) -> None:
        for file in self.weight_map.values():
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise ValueError(f"weight_map names {file!r}, no safetensors file beside it")


def files(folder: Path) -> list[Path]:
    """The files that the index of a model's folder names; the one beside or without an index, as
    transformers has it.

    Raises:
        Malformed: the index is damaged, or names files elsewhere.
        OSError: it cannot be read.
    """
    index = folder / INDEX
    if (folder / ALONE).exists() or not index.exists():
        return [folder / ALONE]
    return [folder / name for name in sorted(set(schema.load(_Index, index).weight_map.values()))]
