"""What goes into the activation of every layer's MLP: share of negatives, mean, spread, histogram.

It is read off fc1, as `features.activation_inputs` does while a model trains.

Dimensions: s sequence, b micro-batch, f local ffn columns (times two with a gate).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_xielu.evaluate.result import Layer
from megatron_xielu.features.activation_inputs import activation_inputs, standard_deviation

_BINS, _RANGE = 64, 8.0
_NUMBER, _NEGATIVE, _SUM, _SQUARES, _MOMENTS = range(5)


class Statistics:
    """Sums over everything that the model sees while it is in force.

    Args:
        model: chunks of this rank, as Megatron built them.
        layers: of the whole model.

    Attributes:
        mask: bool of shape [s, b], which tokens of the current micro-batch count; None for all.

    Raises:
        ValueError: an MLP of another kind.
    """

    def __init__(self, model: list, layers: int) -> None:
        from megatron.core.utils import unwrap_model

        self.mask: Tensor | None = None
        # [layer, moments and counts], of float64: counts are exact up to 2**53.
        self.sums = torch.zeros(layers, _MOMENTS + _BINS, dtype=torch.float64, device="cuda")
        for chunk in unwrap_model(model):
            for layer in chunk.decoder.layers:
                fc1 = getattr(layer.mlp, "linear_fc1", None)
                if fc1 is None:
                    raise ValueError(
                        f"--activation-statistics: layer {layer.layer_number - 1} has "
                        f"{type(layer.mlp).__name__}, not one MLP; leave it out"
                    )
                # First of all hooks: one of ours keeps the bias back for the activation.
                fc1.register_forward_hook(
                    self._hook(layer.layer_number - 1, layer.config.gated_linear_unit), prepend=True
                )

    def _hook(self, layer: int, gated: bool) -> Any:
        def add(fc1: torch.nn.Module, inputs: tuple, outputs: tuple[Tensor, Tensor | None]) -> None:
            output, bias = outputs  # [s, b, f], [f]
            if self.mask is not None:
                output = output[self.mask.to(output.device)]
            for x in activation_inputs(output, bias, gated=gated):
                self._add(layer, x)

        return add

    def _add(self, layer: int, x: Tensor) -> None:
        sums = self.sums[layer]
        sums[_NUMBER] += x.numel()
        sums[_NEGATIVE] += (x < 0).sum()
        exact = x.double()
        sums[_SUM] += exact.sum()
        sums[_SQUARES] += exact.square().sum()
        inside = x.clamp(-_RANGE, _RANGE)
        sums[_MOMENTS:] += torch.histc(inside, bins=_BINS, min=-_RANGE, max=_RANGE).double()

    def gather(self) -> list[Layer]:
        """The statistics over all ranks, of which each has other layers, columns or tokens."""
        torch.distributed.all_reduce(self.sums)
        width = 2 * _RANGE / _BINS
        edges = [-_RANGE + width * i for i in range(_BINS + 1)]
        layers = []
        for number, sums in enumerate(self.sums.tolist()):
            n = sums[_NUMBER]
            layers.append(
                Layer(
                    layer=number,
                    negative_share=sums[_NEGATIVE] / n,
                    mean=sums[_SUM] / n,
                    std=standard_deviation(n, sums[_SUM], sums[_SQUARES]),
                    histogram={"edges": edges, "counts": [int(c) for c in sums[_MOMENTS:]]},
                )
            )
        return layers
