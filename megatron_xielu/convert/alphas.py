"""The effective alphas of a trained model in a file, for another one to start from them.

The file is that of `megatron_xielu.common.per_layer`, which ``--xielu-alpha-p-init`` and
``--xielu-alpha-n-init`` take. Nothing of the model is read but its alphas.
"""

from __future__ import annotations

import json
import shlex
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_xielu.catalog import (
    PER_LAYER,
    TRAINABLE,
    activation_of,
    alpha_n_fault,
    alpha_n_floor,
    out_of_range,
)
from megatron_xielu.checkpoints.alphas import beta, effective_alphas, in_order
from megatron_xielu.checkpoints.reader import open_source
from megatron_xielu.checkpoints.source import Refused
from megatron_xielu.common import files
from megatron_xielu.common.flags import flag_of
from megatron_xielu.common.per_layer import SIDES
from megatron_xielu.convert import from_hf, hf_config, to_hf
from megatron_xielu.convert.safetensors_files import Reader
from megatron_xielu.kernels.reference import softplus


@dataclass(frozen=True)
class _Model:
    """A model's ``alphas[l]``: effective (αp, αn) of layer l; ``folder`` is what messages name."""

    folder: Path
    activation: str
    beta: float
    alphas: list[tuple[float, float]]


def write(
    model: Path, out: Path, *, trust_pickle: bool = False, report: Callable[[str], None] = print
) -> None:
    """Write the alphas of every layer of ``model``.

    Args:
        model: a Hugging Face folder; or a checkpoint of Megatron's, as `open_source` takes it.
        out: the file.
        trust_pickle: as `open_source` has it.
        report: told what is done, a line each, and how to start with the file.

    Raises:
        Refused: it has none, or several in a layer, or such as a start would refuse.
    """
    is_hf = (model / to_hf.MARKER).is_file()
    read = _of_hugging_face(model) if is_hf else _of_megatron(model, trust_pickle, report)
    for problem in _problems(read):
        raise Refused(
            f"{read.folder}: a start would refuse its alphas: {problem}; take another checkpoint"
        )
    sides = map(list, zip(*read.alphas, strict=True))
    content = {**dict(zip(SIDES, sides, strict=True)), "beta": read.beta}
    files.write(out, json.dumps(content, indent=2) + "\n")
    words = [f"--{read.activation}", "--xielu-beta", str(read.beta)]
    words += [word for argument in PER_LAYER for word in (flag_of(argument), str(out))]
    report(f"written: {out}")
    report(f"start with them: {shlex.join(words)}")


def _problems(model: _Model) -> Iterator[str]:
    """One line for each number that a start with its alphas would refuse."""
    yield from out_of_range(Namespace(xielu_beta=model.beta))
    for layer, both in enumerate(model.alphas):
        for problem in out_of_range(Namespace(**dict(zip(PER_LAYER, both, strict=True)))):
            yield f"layer {layer}: {problem}"
        if fault := alpha_n_fault(model.activation, both[1], model.beta):
            yield f"layer {layer}: --xielu-alpha-n-init {fault}, not {both[1]}"


def _of_hugging_face(model: Path) -> _Model:
    config, reader = hf_config.read(model), Reader(model)
    a = hf_config.architecture_of(config, from_hf.beta(reader))
    _check_activation(model, a.activation)
    sides = []
    for side, floor in zip(SIDES, (0.0, alpha_n_floor(a.activation, a.beta)), strict=True):
        names = [f"model.layers.{layer}.mlp.act_fn.{side}" for layer in range(a.layers)]
        sides.append([softplus(_number(reader, name)).item() + floor for name in names])
    return _Model(model, a.activation, a.beta, list(zip(*sides, strict=True)))


def _number(reader: Reader, name: str) -> Tensor:
    if name not in reader.names or reader.shape(name) != (1,):
        raise Refused(f"the model has no tensor {name} of one number")
    return reader.read(name)


def _of_megatron(model: Path, trust_pickle: bool, report: Callable[[str], None]) -> _Model:
    source = open_source(model, trust_pickle=trust_pickle, report=report)
    folder, name = source.folder, activation_of(source.arguments)
    _check_activation(folder, name)
    layers = getattr(source.arguments, "num_layers", None)
    if layers is None:
        raise Refused(f"{folder}: its arguments have no num_layers")
    found = {
        label: both
        for label, both in effective_alphas(source, name).items()
        if not label.startswith("mtp_")
    }
    if any("experts" in label for label in found):
        raise Refused(f"{folder}: it has not one pair of alphas in each layer")
    for label in in_order(found.keys() ^ {f"layer_{layer:02d}" for layer in range(layers)}):
        has = "alphas" if label in found else "no alphas"
        raise Refused(f"{folder}: it has {has} of {label}, and num_layers is {layers}")
    return _Model(folder, name, beta(source.arguments), list(found.values()))


def _check_activation(model: Path, name: str) -> None:
    if name not in TRAINABLE:
        raise Refused(f"{model}: its activation is {name}, which has no alphas")
