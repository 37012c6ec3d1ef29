"""What of ``evaluation.json`` a report shows; `megatron_xielu.evaluate` writes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from megatron_xielu.common.flags import Limits
from megatron_xielu.common.schema import Count
from megatron_xielu.report.nonlinearity import Inputs

_WIDEST = 1e6  # of pre-activations; their squares are still far from infinity


@dataclass(frozen=True)
class Histogram:
    """Of pre-activations: n + 1 rising edges and n counts."""

    edges: list[Annotated[float, Limits(-_WIDEST, _WIDEST, whole=False)]]
    counts: list[Annotated[float, Limits(0, 2**63, whole=False)]]

    def __post_init__(self) -> None:
        self.inputs()

    def inputs(self) -> Inputs:
        """As a distribution.

        Raises:
            ValueError: it is none.
        """
        return Inputs.histogram(self.edges, self.counts)


@dataclass(frozen=True)
class MeasuredLayer:
    """Pre-activations of a layer's MLP (``--activation-statistics``)."""

    layer: Annotated[int, Limits(0, 10**6)]
    negative_share: Annotated[float, Limits(0, 1, whole=False)]
    histogram: Histogram | None = None

    @property
    def inputs(self) -> Inputs | None:
        """Their distribution, if it was measured."""
        return self.histogram.inputs() if self.histogram else None


@dataclass(frozen=True)
class Evaluation:
    """Loss in nats per token."""

    loss: float | None = None
    iteration: Count | None = None
    bits_per_byte: float | None = None
    data: list[str] | None = None
    bytes: Count | None = None
    eval_iters: Count | None = None
    sequence_length: Count | None = None
    layers: list[MeasuredLayer] | None = None

    def __post_init__(self) -> None:
        if self.layers and min(layer.layer for layer in self.layers) > 0:
            raise ValueError(
                "its layers count from 1, as those of older versions did; run "
                "python -m megatron_xielu.evaluate again"
            )
