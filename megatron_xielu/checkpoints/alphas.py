"""What checkpoints say of a model without Megatron or a GPU: its parameters, and its alphas.

Alphas are effective ones, as they stand in the formula. Nothing in a checkpoint is executed.
"""

from __future__ import annotations

import math
import re
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_xielu.catalog import DEFAULT_ALPHA_INIT, DEFAULT_BETA, PER_LAYER, alpha_n_floor
from megatron_xielu.checkpoints import fork
from megatron_xielu.checkpoints.source import Refused, Source
from megatron_xielu.checkpoints.torch_dist import TorchDist
from megatron_xielu.common.per_layer import of_layer
from megatron_xielu.kernels.reference import softplus

# Of alphas in a checkpoint. Megatron stacks layers that are all alike, and routed experts: the
# global shape is (layers or nothing, experts or nothing, 1).
_ALPHA_KEY = re.compile(
    r"(?P<stack>decoder|mtp)\.layers\.((?P<layer>\d+)\.)?(\w+\.)?"
    r"mlp\.((?P<experts>experts)\.experts\.|(?P<shared>shared_experts)\.)?"
    r"activation_func\.alpha_(?P<side>[pn])"
)
_SHARED_ALPHA_KEY = "shared_activation.alpha_p"  # see `megatron_xielu.features.shared_alphas`


@dataclass(frozen=True)
class Alphas:
    """Effective alphas: ``positive[i][l]`` is αp of activation l after ``iterations[i]``.

    ``names[l]`` is what `features.alpha_logging` calls it: ``layer_00`` for a dense layer.
    """

    iterations: list[int]
    positive: list[list[float]]
    negative: list[list[float]]
    names: list[str] = field(default_factory=list)


def count_parameters(checkpoint: Path) -> int:
    """How many numbers the model in a checkpoint has, over all ranks.

    Alphas that all layers share count once, though every layer has its slot of them.
    """
    source = TorchDist(checkpoint)
    keys = set(source.keys())
    if _SHARED_ALPHA_KEY in keys:
        keys = {key for key in keys if ".activation_func.alpha_" not in key}
    return sum(math.prod(source.shape(key)) for key in keys)


def in_order(names: Iterable[str]) -> list[str]:
    """Names of activations by depth: ``layer_100`` behind ``layer_99``."""
    return sorted(
        names, key=lambda name: re.sub(r"[0-9]+", lambda digits: digits[0].zfill(9), name)
    )


def read_alphas(checkpoints: dict[int, Path], name: str) -> Alphas:
    """Effective alphas of every layer in every checkpoint; nothing else is read.

    Args:
        checkpoints: folders by iteration, at least one.
        name: ``"xielu"`` or ``"xiprelu"``.

    Raises:
        Refused: a checkpoint cannot be read; a line that names the file.
    """
    positive: list[list[float]] = []
    negative: list[list[float]] = []
    names: list[str] = []
    for checkpoint in checkpoints.values():
        source = fork.adapt(TorchDist(checkpoint), lambda line: None)
        found = effective_alphas(source, name)
        names = list(found)
        positive.append([both[0] for both in found.values()])
        negative.append([both[1] for both in found.values()])
    return Alphas([*checkpoints], positive, negative, names)


def effective_alphas(source: Source, name: str) -> dict[str, tuple[float, float]]:
    """Effective (αp, αn) of every activation of a model, by name and in order of depth.

    Args:
        source: a checkpoint.
        name: ``"xielu"`` or ``"xiprelu"``.

    Raises:
        Refused: it cannot be read, or one of a pair is missing; a line that names the folder.
    """
    positive = dict(_effective(source, "p", 0.0))
    negative = dict(_effective(source, "n", alpha_n_floor(name, beta(source.arguments))))
    for label in in_order(positive.keys() ^ negative.keys()):
        missing = "alpha_n" if label in positive else "alpha_p"
        raise Refused(f"{source.folder}: it has no {missing} of {label}")
    return {label: (positive[label], negative[label]) for label in in_order(positive)}


def _effective(source: Source, side: str, floor: float) -> Iterator[tuple[str, float]]:
    """(name, effective alpha) of every activation."""
    for key in sorted(source.keys()):
        match = _ALPHA_KEY.fullmatch(key)
        if match is None or match["side"] != side:
            continue
        dimensions = 1 + (match["layer"] is None) + bool(match["experts"])
        if len(shape := source.shape(key)) != dimensions or shape[-1] != 1:
            raise Refused(f"{source.folder}: {key} has the shape {shape}, which no alphas have")
        values = (softplus(source.read(key)) + floor).squeeze(-1)  # [layers?, experts?]
        if match["layer"] is not None:
            values = values.unsqueeze(0)
        for row, values_of_layer in enumerate(values):
            layer = row if match["layer"] is None else int(match["layer"])
            label = f"mtp_{layer}" if match["stack"] == "mtp" else f"layer_{layer:02d}"
            if match["experts"]:
                for expert, value in enumerate(values_of_layer.tolist()):
                    yield f"{label}.experts.{expert:03d}", value
            else:
                yield (
                    f"{label}.shared_experts" if match["shared"] else label,
                    values_of_layer.item(),
                )


def beta(arguments: Namespace | None) -> float:
    """The slope at 0 of a run with these arguments; the default where they do not say."""
    return float(getattr(arguments, "xielu_beta", DEFAULT_BETA))


def initial_alphas(
    arguments: Namespace | None, names: Sequence[str]
) -> tuple[list[float], list[float]] | None:
    """Effective (αp, αn) of a new model with these arguments, each in the order of ``names``.

    None where the alphas of the run began otherwise: see `megatron_xielu.arguments`.
    """
    starts = [getattr(arguments, name, DEFAULT_ALPHA_INIT) for name in PER_LAYER]
    if None in starts:
        return None
    positive, negative = ([of_layer(start, name) for name in names] for start in starts)
    return positive, negative
