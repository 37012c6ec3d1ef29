"""The alphas of every layer in TensorBoard and Weights & Biases, while they train.

With ``--tensorboard-dir`` (which Weights & Biases needs too), at ``--tensorboard-log-interval`` and
on Megatron's step axis, one curve a layer, named by the layer's index in a checkpoint::

    alpha_p/layer_00        effective, as in the formula     alpha_p_raw/layer_00   as trained
    alpha_n/layer_00                                         alpha_n_raw/layer_00
    alpha_grad_norm/layer_00   of the pair of raw alphas, as the optimizer applied it

Each pipeline stage, expert-parallel rank and shard of the distributed optimizer holds a part. One
all-reduce a log step brings the parts to the rank that writes, and only that rank waits for them;
other steps cost nothing.
"""

from __future__ import annotations

import functools
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch

from megatron_xielu.features import scalars
from megatron_xielu.features.after_log import call_after_training_log
from megatron_xielu.features.layer_names import layer_label
from megatron_xielu.kernels import reference
from megatron_xielu.megatron_activations import MegatronActivation

_COLUMNS = 4  # raw alpha_p, raw alpha_n, and the gradient of each


def install_if_asked(args: Namespace) -> None:
    """`install` where there is a TensorBoard to write to.

    Not for FSDP, which ``--spec`` cannot refuse: its wrappers do not say who has which parameter.
    """
    if args.tensorboard_dir and not (args.use_megatron_fsdp or args.use_torch_fsdp2):
        install()


@functools.cache
def install() -> None:
    """Have Megatron's training loop write the alphas of the model that it trains.

    ``megatron.training.training.train``, which has the model, is wrapped in this process, and so is
    what has the step (`after_log`). Its ``pretrain`` looks it up when it comes to it: whoever
    builds the model is in time.
    """
    from megatron.training import get_args, training

    train = training.train
    trained: list[AlphaTable] = []

    def train_and_log(forward_step_func: Any, model: Any, *rest: Any, **named: Any) -> Any:
        trained[:] = [AlphaTable(model)]
        return train(forward_step_func, model, *rest, **named)

    def write_if_due(iteration: int) -> None:
        if iteration % get_args().tensorboard_log_interval == 0:
            values = trained[0].gather()
            scalars.write(lambda: trained[0].scalars(values), iteration)

    training.train = train_and_log
    call_after_training_log(write_if_due)


class AlphaTable:
    """What all ranks together know of a model's alphas: a row per activation, in layer order.

    Args:
        model: the wrapped model chunks of this rank. Collective over all ranks.
    """

    def __init__(self, model: Sequence[torch.nn.Module]) -> None:
        mine: dict[str, MegatronActivation] = {}
        for chunk in model:
            modules = dict(chunk.named_modules())
            mine |= {
                layer_label(name, modules): module
                for name, module in modules.items()
                if isinstance(module, MegatronActivation)
            }
        known = {
            name: (
                module.alpha_n_floor(module.beta),
                _is_up_to_date_here(module.alpha_p, model),
                _is_up_to_date_here(module.alpha_n, model),
            )
            for name, module in mine.items()
        }
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, known)

        floors = {name: known[0] for of_rank in everyone for name, known in of_rank.items()}
        self.names = sorted(floors)
        self._floors = torch.tensor([floors[name] for name in self.names], dtype=torch.float64)
        # Of the ranks that have a number, the first speaks for it.
        speaker: dict[tuple[str, int], int] = {}
        for rank, of_rank in enumerate(everyone):
            for name, (_, *has) in of_rank.items():
                for which in (0, 1):
                    if has[which]:
                        speaker.setdefault((name, which), rank)
        self._spoken: list[tuple[int, torch.Tensor]] = []  # place in the table, whose
        for row, name in enumerate(self.names):
            for which in (0, 1):
                if speaker[name, which] == torch.distributed.get_rank():
                    alpha = (mine[name].alpha_p, mine[name].alpha_n)[which]
                    self._spoken.append((row * _COLUMNS + which, alpha))
        self._device = next(model[0].parameters()).device
        self._places = torch.tensor([place for place, _ in self._spoken], device=self._device)

    @torch.no_grad()
    def gather(self) -> torch.Tensor:
        """Raw alphas and gradients [activations, 4], float64, on every rank; no host waits."""
        shape = len(self.names) * _COLUMNS
        table = torch.zeros(shape, dtype=torch.float64, device=self._device)
        if self._spoken:
            alphas = [alpha for _, alpha in self._spoken]
            gradients = [getattr(a, "main_grad", torch.zeros_like(a)) for a in alphas]  # 0: frozen
            table[self._places] = torch.cat(alphas).double()
            table[self._places + 2] = torch.cat(gradients).double()
        torch.distributed.all_reduce(table)
        return table.view(-1, _COLUMNS)

    def scalars(self, table: torch.Tensor) -> dict[str, float]:
        """Tags and values to write, from what `gather` returned; waits for the device."""
        table = table.cpu()
        raw_p, raw_n = table[:, 0], table[:, 1]
        columns = {
            "alpha_p": reference.softplus(raw_p),
            "alpha_n": reference.softplus(raw_n) + self._floors,
            "alpha_p_raw": raw_p,
            "alpha_n_raw": raw_n,
            "alpha_grad_norm": table[:, 2:].norm(dim=1),
        }
        return {
            f"{what}/{name}": value
            for what, column in columns.items()
            for name, value in zip(self.names, column.tolist(), strict=True)
        }


def _is_up_to_date_here(parameter: torch.nn.Parameter, model: Sequence[Any]) -> bool:
    """Whether this rank has the reduced gradient of ``parameter`` and its value after the step.

    The distributed optimizer reduces a bucket of gradients into shards, one a data-parallel rank,
    and may send the updated parameters to the other ranks only in the next forward pass.
    """
    for chunk in model:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            if parameter in buffer.param_index_map and buffer.ddp_config.use_distributed_optimizer:
                start, _, bucket_id = buffer.param_index_map[parameter]
                bucket = buffer.buckets[bucket_id]
                shard = bucket.grad_data.numel() // buffer.data_parallel_world_size
                owner = (start - bucket.offset) // shard
                return owner == torch.distributed.get_rank(buffer.data_parallel_group)
    return True
