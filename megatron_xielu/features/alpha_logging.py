"""The alphas of every layer in TensorBoard and Weights & Biases, while they train.

With ``--tensorboard-dir`` (which Weights & Biases needs too), at ``--tensorboard-log-interval`` and
on Megatron's step axis, one curve a layer, named by the layer's index in a checkpoint::

    alpha_p/layer_00        effective, as in the formula     alpha_p_raw/layer_00   as trained
    alpha_n/layer_00                                         alpha_n_raw/layer_00
    alpha_grad_norm/layer_00   of the pair of raw alphas, as the optimizer applied it

Routed experts have a pair each, hundreds a layer, which checkpoints hold. Of all experts of a
layer, whichever ranks have them, there are::

    alpha_p/layer_07.experts.mean, .std, .min, .max      effective; the same of alpha_n
    alpha_grad_norm/layer_07.experts                     of all their raw alphas together

Each pipeline stage, expert-parallel rank and shard of the distributed optimizer holds a part. One
all-reduce a log step brings the parts to the rank that writes, and only that rank waits for them;
other steps cost nothing.
"""

from __future__ import annotations

import functools
import itertools
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_xielu.features import scalars
from megatron_xielu.features.after_log import call_after_training_log
from megatron_xielu.features.layer_names import mlp_labels
from megatron_xielu.kernels import reference
from megatron_xielu.megatron_activations import MegatronActivation

_COLUMNS = 4  # raw alpha_p, raw alpha_n, and the gradient of each
# Of a layer's experts; the deviation is of these and not of others like them, so that one has 0.
_STATISTICS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": torch.mean,
    "std": functools.partial(torch.std, correction=0),
    "min": torch.min,
    "max": torch.max,
}


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
            write(trained[0], iteration)

    training.train = train_and_log
    call_after_training_log(write_if_due)


def write(table: AlphaTable, iteration: int) -> None:
    """Write what ``table`` holds now. Collective over all ranks."""
    values = table.gather()
    scalars.write(lambda: table.scalars(values), iteration)


class AlphaTable:
    """What all ranks together know of a model's alphas: a row for each pair, in layer order.

    Args:
        model: the wrapped model chunks of this rank. Collective over all ranks.
    """

    def __init__(self, model: Sequence[torch.nn.Module]) -> None:
        mine: dict[str, tuple[MegatronActivation, int]] = {}  # by label: whose pair, and which
        for chunk in model:
            modules = dict(chunk.named_modules())
            for name, module in modules.items():
                if isinstance(module, MegatronActivation):
                    labels = mlp_labels(name, modules)
                    mine |= {label: (module, element) for element, label in enumerate(labels)}
        known = {
            label: (
                module.alpha_n_floor(module.beta),
                element in _up_to_date_here(module.alpha_p, model),
                element in _up_to_date_here(module.alpha_n, model),
            )
            for label, (module, element) in mine.items()
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
        self._device = next(model[0].parameters()).device
        self._speak_for(
            {
                row * _COLUMNS + which: ((module.alpha_p, module.alpha_n)[which], element)
                for row, name in enumerate(self.names)
                for which in (0, 1)
                if speaker[name, which] == torch.distributed.get_rank()
                for module, element in [mine[name]]
            }
        )

    def _speak_for(self, spoken: dict[int, tuple[torch.nn.Parameter, int]]) -> None:
        """Remember what `gather` takes from here: by place in the table, an element of an alpha."""
        self._alphas: list[torch.Tensor] = list(
            dict.fromkeys(alpha for alpha, _ in spoken.values())
        )
        sizes = [alpha.numel() for alpha in self._alphas]
        starts = dict(zip(self._alphas, itertools.accumulate(sizes, initial=0), strict=False))
        self._elements, self._places = (
            torch.tensor(numbers, dtype=torch.int64, device=self._device)
            for numbers in ([starts[alpha] + e for alpha, e in spoken.values()], list(spoken))
        )

    @torch.no_grad()
    def gather(self) -> torch.Tensor:
        """Raw alphas and gradients [pairs, 4], float64, on every rank; no host waits."""
        shape = len(self.names) * _COLUMNS
        table = torch.zeros(shape, dtype=torch.float64, device=self._device)
        if self._alphas:
            gradients = [
                a.main_grad if hasattr(a, "main_grad") else torch.zeros_like(a)  # frozen
                for a in self._alphas
            ]
            table[self._places] = torch.cat(self._alphas).double()[self._elements]
            table[self._places + 2] = torch.cat(gradients).double()[self._elements]
        torch.distributed.all_reduce(table)
        return table.view(-1, _COLUMNS)

    def scalars(self, table: torch.Tensor) -> dict[str, float]:
        """Tags and values to write, from what `gather` returned; waits for the device."""
        table = table.cpu()
        raw_p, raw_n = table[:, 0], table[:, 1]
        effective = {
            "alpha_p": reference.softplus(raw_p),
            "alpha_n": reference.softplus(raw_n) + self._floors,
        }
        columns = effective | {
            "alpha_p_raw": raw_p,
            "alpha_n_raw": raw_n,
            "alpha_grad_norm": table[:, 2:].norm(dim=1),
        }
        experts = _rows_of_experts(self.names)
        others = sorted(set(range(len(self.names))).difference(*experts.values()))
        values = {
            f"{what}/{self.names[row]}": column[row].item()
            for what, column in columns.items()
            for row in others
        }
        for layer, rows in experts.items():
            for what, column in effective.items():
                own = column[rows]
                for statistic, of in _STATISTICS.items():
                    values[f"{what}/{layer}.{statistic}"] = of(own).item()
            values[f"alpha_grad_norm/{layer}"] = table[rows, 2:].norm().item()
        return values


def _rows_of_experts(names: Sequence[str]) -> dict[str, list[int]]:
    """By layer (``layer_07.experts``), the places of its experts among ``names``."""
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        layer, _, _ = name.rpartition(".")
        if layer.endswith(".experts"):
            rows.setdefault(layer, []).append(row)
    return rows


def _up_to_date_here(parameter: torch.nn.Parameter, model: Sequence[Any]) -> range:
    """Of which elements this rank has the reduced gradient, and the value after the step.

    The distributed optimizer reduces a bucket of gradients into shards, one a data-parallel rank,
    and may send the updated parameters to the other ranks only in the next forward pass. A shard
    may end within a parameter.
    """
    for chunk in model:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            if parameter in buffer.param_index_map and buffer.ddp_config.use_distributed_optimizer:
                start, _, bucket_id = buffer.param_index_map[parameter]
                bucket = buffer.buckets[bucket_id]
                return elements_in_shard(
                    start - bucket.offset,
                    parameter.numel(),
                    shard=bucket.grad_data.numel() // buffer.data_parallel_world_size,
                    rank=torch.distributed.get_rank(buffer.data_parallel_group),
                )
    return range(parameter.numel())


def elements_in_shard(start: int, count: int, *, shard: int, rank: int) -> range:
    """Which of ``count`` elements from ``start`` on are in a rank's shard.

    Args:
        start: of the elements in their bucket, of which each rank has ``shard`` in turn.
        count: of elements.
        shard: elements of a rank.
        rank: whose.
    """
    first, end = (min(max(at * shard - start, 0), count) for at in (rank, rank + 1))
    return range(first, end)
