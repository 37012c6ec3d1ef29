"""Routed experts in a report: of a layer's the mean stands for all, and a map has each of them.

`megatron_xielu.features.alpha_logging` writes of each layer's experts their mean, deviation, least
and greatest alpha. Which expert has what is in checkpoints alone. The mean is also that of the
functions: f is linear in its alphas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_xielu.checkpoints.alphas import Alphas
from megatron_xielu.report.events import Series
from megatron_xielu.report.nonlinearity import trained

Array = NDArray[np.float64]

_ONE, ALL = ".experts.", ".experts"  # layer_07.experts.003 is one, layer_07.experts are all
_MEAN = ".mean"


@dataclass(frozen=True)
class Experts:
    """Effective alphas of each routed expert: [layers, experts], NaN where a layer has none.

    Attributes:
        iteration: of the checkpoint that they are of.
        layers: ``layer_07``, ``mtp_0``, in order.
        alpha_p: αp.
        alpha_n: αn.
        nonlinearity: on a standard normal.
    """

    iteration: int
    layers: list[str]
    alpha_p: Array
    alpha_n: Array
    nonlinearity: Array


def one_a_layer(written: Mapping[str, Series]) -> dict[str, Series]:
    """Rows of event files with one for all experts of a layer: ``layer_07.experts``."""
    return {
        name.removesuffix(_MEAN): row
        for name, row in written.items()
        if _ONE not in name or name.endswith(_MEAN)
    }


def means(alphas: Alphas) -> Alphas:
    """The same with the mean of a layer's experts in place of each."""
    columns: dict[str, list[int]] = {}
    for column, name in enumerate(alphas.names):
        together = name.rpartition(".")[0] if _ONE in name else name
        columns.setdefault(together, []).append(column)

    def of(rows: list[list[float]]) -> list[list[float]]:
        array = np.array(rows)
        return np.stack([array[:, own].mean(axis=1) for own in columns.values()], axis=1).tolist()

    return Alphas(alphas.iterations, of(alphas.positive), of(alphas.negative), [*columns])


def of_last(alphas: Alphas, activation: str, beta: float) -> Experts | None:
    """The experts of the last checkpoint; None of a model without, or of no numbers.

    Args:
        alphas: of checkpoints.
        activation: ``xielu`` or ``xiprelu``.
        beta: β.
    """
    places = [name.split(_ONE) for name in alphas.names if _ONE in name]
    layers = list(dict.fromkeys(layer for layer, _ in places))
    count = max((int(expert) for _, expert in places), default=-1) + 1
    p, n = np.full((2, len(layers), count), np.nan)
    for name, *pair in zip(alphas.names, alphas.positive[-1], alphas.negative[-1], strict=True):
        layer, found, expert = name.partition(_ONE)
        if found and all(np.isfinite(pair)) and min(pair) >= 0:
            p[layers.index(layer), int(expert)], n[layers.index(layer), int(expert)] = pair
    known = ~np.isnan(p).all(axis=1)
    if not known.any():
        return None
    layers = [layer for layer, is_known in zip(layers, known, strict=True) if is_known]
    p, n = p[known], n[known]
    return Experts(alphas.iterations[-1], layers, p, n, trained(activation, p, n, beta))


def has_experts(names: Sequence[str]) -> bool:
    """Whether one of these activations stands for the experts of its layer."""
    return any(name.endswith(ALL) for name in names)
