"""The effective alphas of a trained model in a file, for another one to start from them.

The file is that of `megatron_xielu.common.per_layer`, which ``--xielu-alpha-p-init`` and
``--xielu-alpha-n-init`` take. Nothing of the model is read but its alphas.
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from megatron_xielu.catalog import TRAINABLE, activation_of, alpha_n_floor
from megatron_xielu.checkpoints.alphas import read_alphas
from megatron_xielu.checkpoints.reader import open_source
from megatron_xielu.checkpoints.source import Refused
from megatron_xielu.common import files
from megatron_xielu.common.per_layer import SIDES
from megatron_xielu.convert import from_hf, hf_config, to_hf
from megatron_xielu.convert.safetensors_files import Reader
from megatron_xielu.convert.tensors import check_finite
from megatron_xielu.kernels.reference import softplus


def write(model: Path, out: Path) -> None:
    """Write the alphas of every layer of ``model``.

    Args:
        model: a Hugging Face folder; or a checkpoint of Megatron's, as `open_source` takes it.
        out: the file.

    Raises:
        Refused: it has none, or several in a layer.
    """
    is_hf = (model / to_hf.MARKER).is_file()
    values = _of_hugging_face(model) if is_hf else _of_megatron(model)
    files.write(out, json.dumps(dict(zip(SIDES, values, strict=True)), indent=2) + "\n")


def _of_hugging_face(model: Path) -> list[list[float]]:
    config, reader = hf_config.read(model), Reader(model)
    a = hf_config.architecture_of(config, from_hf.beta(reader))
    _check_activation(model, a.activation)
    values = []
    for side, floor in zip(SIDES, (0.0, alpha_n_floor(a.activation, a.beta)), strict=True):
        names = [f"model.layers.{layer}.mlp.act_fn.{side}" for layer in range(a.layers)]
        values.append([softplus(_number(reader, name)).item() + floor for name in names])
    return values


def _number(reader: Reader, name: str) -> Tensor:
    if name not in reader.names or reader.shape(name) != (1,):
        raise Refused(f"the model has no tensor {name} of one number")
    tensor = reader.read(name)
    check_finite(name, tensor)
    return tensor


def _of_megatron(model: Path) -> list[list[float]]:
    source = open_source(model)
    name = activation_of(source.arguments)
    _check_activation(model, name)
    alphas = read_alphas({1: source.folder}, name)
    rows = {label: row for row, label in enumerate(alphas.names) if not label.startswith("mtp_")}
    if not rows or any("experts" in label for label in rows):
        raise Refused(f"{source.folder}: it has not one pair of alphas in each layer")
    both = (alphas.positive, alphas.negative)
    return [[of_side[-1][row] for row in rows.values()] for of_side in both]


def _check_activation(model: Path, name: str) -> None:
    if name not in TRAINABLE:
        raise Refused(f"{model}: its activation is {name}, which has no alphas")
