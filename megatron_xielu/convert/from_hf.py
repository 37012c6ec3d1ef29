"""Hugging Face → Megatron: a ``torch_dist`` checkpoint to continue pre-training from.

It is written as ``OUT/release``: Megatron starts from it at iteration 0 with a new optimizer, at
any tensor- and pipeline-parallel size that divides the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_xielu import catalog
from megatron_xielu.checkpoints import writer
from megatron_xielu.checkpoints.folder import RELEASE, TRACKER
from megatron_xielu.checkpoints.source import Refused
from megatron_xielu.checkpoints.writer import Chunk
from megatron_xielu.convert import hf_config, megatron_arguments, output
from megatron_xielu.convert.architecture import Architecture, describe
from megatron_xielu.convert.safetensors_files import Reader
from megatron_xielu.convert.tensors import Part, check_finite, constants, parts

CONTENT = (TRACKER, RELEASE)
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Options:
    """Of an import.

    Attributes:
        dtype: of the weights; None as stored. Alphas are fp32 in any case.
        divisor: pad the vocabulary with rows of zeros to a multiple of it.
        force: replace an existing output.
    """

    dtype: torch.dtype | None = None
    divisor: int = 1
    force: bool = False


def convert(
    folder: Path, out: Path, options: Options, report: Callable[[str], None] = print
) -> None:
    """Write a Megatron checkpoints folder.

    Args:
        folder: a Hugging Face model.
        out: the folder for Megatron's ``--load`` to be.
        options: how.
        report: told what is done, a line each.

    Raises:
        Refused: it cannot be expressed, or may not be written; nothing is left behind.
    """
    output.check(out, folder, force=options.force, content=CONTENT)
    config = hf_config.read(folder)
    reader = Reader(folder)
    stored = hf_config.architecture_of(config, beta(reader))
    _check_tensors(reader, stored)
    rows = -(-stored.vocabulary // options.divisor) * options.divisor
    architecture = replace(stored, vocabulary=rows)
    report(f"{config['model_type']}: {describe(architecture)}")
    if rows != stored.vocabulary:
        report(f"the vocabulary of {stored.vocabulary} is padded to {rows} rows, with zeros")
    arguments = megatron_arguments.arguments_of(architecture, _dtype(reader, options))
    for problem in catalog.out_of_range(arguments):
        raise Refused(f"{folder}: a training would refuse it: {problem}")
    arguments.tokenizer_type = arguments.tokenizer_model = None
    tokenizer_flags: list[str] = []
    if (folder / "tokenizer_config.json").is_file():
        arguments.tokenizer_type = "HuggingFaceTokenizer"
        arguments.tokenizer_model = str(folder.absolute())
        tokenizer_flags = ["--tokenizer-type", "HuggingFaceTokenizer"]
        tokenizer_flags += ["--tokenizer-model", arguments.tokenizer_model]

    both = list(zip(parts(stored), parts(architecture), strict=True))
    total = sum(torch.Size(part.shape).numel() for _, part in both)
    with (
        output.written(out, force=options.force, content=CONTENT) as staging,
        tqdm(total=total, unit=" parameters", unit_scale=True, desc="from-hf") as progress,
    ):
        chunks = [
            _chunk(reader, old, new, architecture.layers, options, progress) for old, new in both
        ]
        writer.write(staging / RELEASE, chunks, arguments)
        (staging / TRACKER).write_text(RELEASE)
    report(f"written: {out}")
    flags = [
        "--load",
        str(out),
        "--use-checkpoint-args",
        *megatron_arguments.flags_of(architecture),
    ]
    report("continue pre-training with: " + " ".join([*flags, *tokenizer_flags]))


def beta(reader: Reader) -> float | None:
    """xIELU's β, which every layer has as a buffer; None if none has."""
    names = [name for name in reader.names if name.endswith(".mlp.act_fn.beta")]
    for name in names:
        if reader.shape(name) not in ((), (1,)):
            raise Refused(f"{name} is {reader.shape(name)}, not one number")
    values = {float(reader.read(name)) for name in names}
    if len(values) > 1 or not all(map(math.isfinite, values)):
        raise Refused(f"act_fn.beta differs between layers, or is no number: {sorted(values)}")
    return values.pop() if values else None


def _check_tensors(reader: Reader, architecture: Architecture) -> None:
    names = reader.names
    used = set()
    for part in parts(architecture):
        for name, shape in zip(part.names, part.shapes, strict=True):
            if name not in names:
                raise Refused(f"the model has no tensor {name}")
            if reader.shape(name) != shape:
                raise Refused(f"{name} is {reader.shape(name)}, but config.json says {shape}")
            used.add(name)
    used |= constants(architecture).keys()
    if architecture.tied and _HEAD in names:
        # Transformers 4 would drop it, 5 keep it.
        if not torch.equal(reader.read(_HEAD), reader.read(_EMBEDDING)):
            raise Refused(
                f"config.json: tie_word_embeddings is set, and {_HEAD} is another matrix than "
                f"{_EMBEDDING}; write false, or leave that tensor out"
            )
        used.add(_HEAD)
    left = sorted(name for name in names - used if not name.endswith("rotary_emb.inv_freq"))
    if left:
        raise Refused(f"the model has {left[0]}, for which config.json has no place")


def _dtype(reader: Reader, options: Options) -> torch.dtype:
    return options.dtype or reader.dtype(_EMBEDDING)


def _chunk(
    reader: Reader, old: Part, new: Part, layers: int, options: Options, progress: Any
) -> Chunk:
    dtype = torch.float32 if new.fp32 else options.dtype or reader.dtype(old.names[0])

    def read() -> Tensor:
        tensor = old.join([reader.read(name) for name in old.names]).to(dtype)
        check_finite(old.names[0], tensor)
        missing = new.shape[0] - tensor.shape[0]
        if missing:
            tensor = torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])
        progress.update(tensor.numel())
        return tensor

    key = new.megatron if new.layer is None else f"decoder.layers.{new.megatron}"
    return Chunk(key, new.layer, layers, new.shape, dtype, read)
