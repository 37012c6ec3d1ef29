"""Megatron → Hugging Face: one tensor at a time, from slices of the checkpoint into safetensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_xielu.checkpoints.source import Refused, Source
from megatron_xielu.common import safetensors_index
from megatron_xielu.convert import hf_config, megatron_arguments, output, tokenizer
from megatron_xielu.convert.architecture import Architecture, describe
from megatron_xielu.convert.safetensors_files import Entry, Writer
from megatron_xielu.convert.tensors import Part, check_finite, constants, parts

MARKER = "config.json"
CONTENT = (
    *(MARKER, "generation_config.json", "*.safetensors", safetensors_index.INDEX),
    *(pattern.partition("/")[0] for pattern in tokenizer.FILES),
    "modeling_xiprelu.py",
)
_EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class Options:
    """Of an export.

    Attributes:
        tokenizer: path or name; None for no tokenizer.
        dtype: of the weights; None as stored. Alphas are fp32 in any case.
        shard_bytes: the most in one file, if no tensor is larger.
        vocabulary: keep that many rows of the vocabulary; None for all.
        force: replace an existing output.
    """

    tokenizer: str | None = None
    dtype: torch.dtype | None = None
    shard_bytes: int = 5 * 10**9
    vocabulary: int | None = None
    force: bool = False


def export(
    source: Source, out: Path, options: Options, report: Callable[[str], None] = print
) -> None:
    """Write a Hugging Face model.

    Args:
        source: a checkpoint.
        out: a folder to be.
        options: how.
        report: told what is done, a line each.

    Raises:
        Refused: it cannot be expressed, or may not be written; nothing is left behind.
    """
    output.check(out, source.folder, force=options.force, content=CONTENT)
    full = architecture_of(source)
    _check_tensors(source, full)
    words = tokenizer.load(options.tokenizer, source.arguments, full.vocabulary, report)
    rows = options.vocabulary or full.vocabulary
    least = 1 if words is None else words.entries
    if not least <= rows <= full.vocabulary:
        raise Refused(
            f"--trim-vocab {rows}: the model has {full.vocabulary} rows, "
            f"{'the least is 1' if words is None else f'its tokenizer {least} entries'}; "
            + (
                "there is nothing to trim, leave it out"
                if least == full.vocabulary
                else f"give {least} to {full.vocabulary}"
            )
        )
    architecture = replace(full, vocabulary=rows)

    files = _plan(source, architecture, options)
    dtype = options.dtype or source.dtype(_EMBEDDING)
    config = hf_config.config_of(architecture, dtype)
    report(f"{config['architectures'][0]}: {describe(architecture)}")
    with output.written(out, force=options.force, content=CONTENT) as folder:
        _write_json(folder / MARKER, config)
        config |= tokenizer.write(folder, words, rows, report)
        _write_json(folder / MARKER, config)
        if architecture.activation == "xiprelu":
            from megatron_xielu.hf import remote_code

            for path in remote_code.files():
                shutil.copy(path, folder)
        _write(source, architecture, folder, files)
    report(f"written: {out}")
    if architecture.activation == "gelu" and architecture.family == "arcee":
        report(
            "transformers computes GELU, as config.json says; llama.cpp runs every Arcee model "
            "with ReLU² without a word, and vLLM and SGLang refuse one with GELU"
        )
    if architecture.activation == "xielu":
        report(
            "alphas are float32 in the files; transformers rounds them to bfloat16 on loading "
            + ("Arcee" if architecture.family == "arcee" else "in bfloat16")
            + ", and megatron_xielu.hf.use_fused_activation(model, alphas_from=…) restores them"
        )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def architecture_of(source: Source) -> Architecture:
    """The architecture of a checkpoint.

    Raises:
        Refused: Hugging Face cannot express it; names the argument.
    """
    keys = source.keys()
    if _EMBEDDING not in keys or not source.shape(_EMBEDDING):
        raise Refused(f"{source.folder} has no {_EMBEDDING}: it is no GPT checkpoint")
    return megatron_arguments.architecture_of(source.arguments, source.shape(_EMBEDDING)[0])


def _check_tensors(source: Source, architecture: Architecture) -> None:
    keys, used = source.keys(), set()
    for part in parts(architecture):
        try:
            key, layer = part.key(keys)
        except KeyError as error:
            raise Refused(f"{source.folder} has no tensor {error.args[0]}") from None
        used.add(key)
        expected = part.shape if layer is None else (architecture.layers, *part.shape)
        if source.shape(key) != expected:
            raise Refused(f"{source.folder}: {key} is {source.shape(key)}, not {expected}")
    # The name under which alphas that all layers share stand once more (`shared_alphas`).
    passed_over = ("_extra_state", "shared_activation.")
    left = sorted(key for key in keys - used if not any(name in key for name in passed_over))
    if left:
        raise Refused(
            f"{source.folder} has {left[0]}, for which {architecture.family} has no place"
            + (f" (and {len(left) - 1} more such tensors)" if left[1:] else "")
        )


def _dtype(part: Part, source: Source, options: Options) -> torch.dtype:
    key, _ = part.key(source.keys())
    return torch.float32 if part.fp32 else options.dtype or source.dtype(key)


def _plan(source: Source, architecture: Architecture, options: Options) -> list[list[Entry]]:
    """The tensors of each file. What comes of one of Megatron's stays in one file."""
    fixed = [Entry(name, tuple(x.shape), x.dtype) for name, x in constants(architecture).items()]
    files: list[list[Entry]] = [fixed]
    size = sum(entry.bytes for entry in fixed)
    for part in parts(architecture):
        dtype = _dtype(part, source, options)
        entries = [Entry(n, s, dtype) for n, s in zip(part.names, part.shapes, strict=True)]
        more = sum(entry.bytes for entry in entries)
        if files[-1] and size + more > options.shard_bytes:
            files.append([])
            size = 0
        files[-1] += entries
        size += more
    return files


def _write(
    source: Source, architecture: Architecture, folder: Path, files: list[list[Entry]]
) -> None:
    keys = source.keys()
    dtypes = {entry.name: entry.dtype for entries in files for entry in entries}
    total = sum(entry.bytes for entries in files for entry in entries)
    with (
        Writer(folder, files) as writer,
        tqdm(total=total, unit="B", unit_scale=True, desc="to-hf") as progress,
    ):
        for name, constant in constants(architecture).items():
            writer.write(name, constant)
            progress.update(constant.nbytes)
        for part in parts(architecture):
            tensor = source.read(*part.key(keys))[: part.shape[0]]
            for name, piece in zip(part.names, part.split(tensor), strict=True):
                piece = piece.to(dtypes[name])
                check_finite(name, piece)
                writer.write(name, piece)
                progress.update(piece.nbytes)
        writer.finish()
