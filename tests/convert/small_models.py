"""Small models in Hugging Face's format, of random weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from megatron_xielu.convert import hf_config
from megatron_xielu.convert.architecture import Architecture
from megatron_xielu.convert.safetensors_files import Entry, Writer
from megatron_xielu.convert.tensors import parts


def small(**changes: object) -> Architecture:
    """A model of two layers."""
    sizes = dict(layers=2, hidden=16, ffn=32, heads=2, groups=2, head_dim=8, vocabulary=32)
    rest = dict(positions=32, norm_epsilon=1e-5, rope_theta=1e4, rope_factor=None, tied=True)
    names = dict(qk_layernorm=False, activation="relu2", beta=0.5, init_std=0.02)
    return Architecture(**{**sizes, **rest, **names, **changes})


def write_hf(folder: Path, architecture: Architecture, **changes: object) -> Path:
    """A model of random weights, with ``changes`` of its config.json."""
    folder.mkdir()
    entries = [
        Entry(name, shape, torch.float32)
        for part in parts(architecture)
        for name, shape in zip(part.names, part.shapes, strict=True)
    ]
    with Writer(folder, [entries]) as writer:
        for entry in entries:
            writer.write(entry.name, torch.randn(entry.shape))
        writer.finish()
    config = hf_config.config_of(architecture, torch.float32) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder
