"""``--log-activation-inputs N``: how large the inputs of every MLP's activation are.

In TensorBoard (and Weights & Biases) at iteration 1, whose forward pass is of the initial weights,
and every N iterations: their standard deviation, one curve a layer, named by the layer's index in a
checkpoint::

    activation_input_std/layer_00        of a gated MLP: of the half that the activation gets

It is read off fc1, with its bias, for our activations and Megatron's, which are no modules. What
counts is the first micro-batch of the step on every data-parallel rank, so that a forward pass that
is repeated for the backward pass does not count again. One all-reduce in such a step brings the
parts of all ranks together; other steps cost nothing.

Dimensions: s sequence, b micro-batch, f local ffn columns (times two with a gate).
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_xielu.catalog import INPUTS_TAG
from megatron_xielu.features import scalars
from megatron_xielu.features.after_log import call_after_training_log
from megatron_xielu.features.layer_names import layer_label

# Numbers: copies of them in fp64 stay small, and torch.histc, which counts in fp32, exact (2**24).
_AT_A_TIME = 1 << 22


def activation_inputs(output: Tensor, bias: Tensor | None, *, gated: bool) -> Iterator[Tensor]:
    """What the activation gets of fc1's output, in fp32 [tokens, f], some tokens at a time.

    Args:
        output: [..., f], before the bias is added.
        bias: [f], or None.
        gated: whether the activation gets the first half of the columns alone.
    """
    output = output.detach()
    if gated:
        output = output.chunk(2, dim=-1)[0]
        bias = None if bias is None else bias.chunk(2, dim=-1)[0]
    columns = output.shape[-1]
    for rows in output.reshape(-1, columns).split(max(_AT_A_TIME // columns, 1)):
        yield rows.float() if bias is None else rows.float() + bias.detach().float()


def standard_deviation(number: float, total: float, squares: float) -> float:
    """Of ``number`` values, from their sum and the sum of their squares."""
    mean = total / number
    return max(squares / number - mean * mean, 0.0) ** 0.5


def install_if_asked(args: Namespace, model: list) -> list:
    """Have the inputs of a model written, where the flag is given. Collective over all ranks.

    Args:
        args: Megatron's arguments.
        model: model chunks of this rank, built but not yet wrapped.

    Returns:
        ``model``, so that this is one of Megatron's ``pre_wrap_hooks``.
    """
    if args.log_activation_inputs:
        call_after_training_log(InputSums(model, args).write_if_due)
    return model


class InputSums:
    """Sums over the inputs of each MLP's activation in a step that is logged.

    Args:
        model: model chunks of this rank. Collective over all ranks.
        args: Megatron's arguments, in which its training loop counts iterations.
    """

    def __init__(self, model: Sequence[torch.nn.Module], args: Namespace) -> None:
        self._args = args
        mine: dict[str, Any] = {}
        for chunk in model:
            modules = dict(chunk.named_modules())
            mine |= {
                layer_label(name, modules): module
                for name, module in modules.items()
                if hasattr(module, "linear_fc1")
            }
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, list(mine))
        self._names = sorted({name for of_rank in everyone for name in of_rank})
        # [MLP, (number, sum, sum of squares)]
        self._sums = torch.zeros(len(self._names), 3, dtype=torch.float64, device="cuda")
        self._summed_in = dict.fromkeys(range(len(self._names)), 0)
        for name, mlp in mine.items():
            hook = partial(self._add, self._names.index(name), mlp.config.gated_linear_unit)
            # First of all hooks: one of ours keeps the bias back for the activation.
            mlp.linear_fc1.register_forward_hook(hook, prepend=True)

    def _is_due(self, iteration: int) -> bool:
        return iteration == 1 or iteration % self._args.log_activation_inputs == 0

    def _add(
        self, row: int, gated: bool, fc1: torch.nn.Module, inputs: tuple, outputs: tuple
    ) -> None:
        if not fc1.training:
            return
        iteration = self._args.curr_iteration + 1  # that many are done after this one
        if not self._is_due(iteration) or self._summed_in[row] == iteration:
            return
        self._summed_in[row] = iteration
        for x in activation_inputs(*outputs, gated=gated):
            exact = x.double()
            self._sums[row, 0] += x.numel()
            self._sums[row, 1] += exact.sum()
            self._sums[row, 2] += exact.square().sum()

    def write_if_due(self, iteration: int) -> None:
        """Bring the sums together, and write what they say. Collective where it is due."""
        if not self._is_due(iteration):
            return
        torch.distributed.all_reduce(self._sums)  # ranks have other tokens, columns or layers
        scalars.write(self._scalars, iteration)
        self._sums.zero_()

    def _scalars(self) -> dict[str, float]:
        return {
            f"{INPUTS_TAG}/{name}": standard_deviation(*sums)
            for name, sums in zip(self._names, self._sums.tolist(), strict=True)
            if sums[0]
        }
