"""The two checkpoint formats of Megatron's distributed optimizer: what they cost, and tie a run to.

``dp_reshardable``
    Megatron's default. Each rank writes the part of every gradient bucket that it owns. A resume
    may have another data-parallel size, but needs the same model-parallel layout and buckets.
``fully_reshardable`` (``--dist-ckpt-optim-fully-reshardable``)
    Every rank first gathers the whole state of its model-parallel slice
    (`DistributedOptimizer.get_parameter_state_dp_zero`). A resume may have any layout.

Of one rank, N parameters in its slice, D ranks that share them, g of these on its node, w bytes of
weights and o of optimizer state a parameter (2 and 12 in 16 bits); docs/checkpoint-formats.md has
them counted in real saves and loads:

    save                       dp_reshardable      fully_reshardable
    received                   0                   o·N·(1 − 1/D)
    received by its node       0                   o·N·(1 − g/D), once a slice on the node
    from the device to host    (w + o)·N/D         o·N·(1 + 1/D) + w·N/D
    host memory                (w + o)·N/D         o·N + (w + o)·N/D
    written                    (w + o)·N/D         (w + o)·N/D

    load                       dp_reshardable      fully_reshardable
    read                       w·N + o·N/D         (w + o)·N
      fully parallel           (w + o)·N/D         (w + o)·N/D
    exchanged, fully parallel  w·N                 (w + o)·N
    host memory                –                   o·N; fully parallel 2·o·N

Standard library only, until a checkpoint is looked at.
"""

from __future__ import annotations

import math
import re
from argparse import Namespace
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_xielu.common.flags import argument_of

DP, FULL = "dp_reshardable", "fully_reshardable"

# Passes of fully_reshardable over the state in host memory, by one thread: zeros, off the device,
# concatenated, and copied to its place.
_PASSES = 4


@dataclass(frozen=True)
class Save:
    """Bytes of a save on a rank; ``received_by_node``: by all ranks of a node."""

    received: float
    received_by_node: float
    to_host: float
    host_memory: float
    written: float
    host_copied: float  # passes over host memory, while training waits

    def seconds(self, *, node_network: float, host_copy: float) -> float:
        """An estimate of how long training waits.

        The files are written beside the training, and not counted; neither are planning and
        barriers.

        Args:
            node_network: bytes a second into a node.
            host_copy: bytes a second that one thread copies.
        """
        return self.received_by_node / node_network + self.host_copied / host_copy


@dataclass(frozen=True)
class Load:
    """Bytes of a load on a rank."""

    read: float
    exchanged: float
    host_memory: float


def save_of_rank(
    kind: str, *, numel: float, weights: float, state: float, ranks: int, on_node: int, slices: int
) -> Save:
    """What a save costs a rank.

    Args:
        kind: `DP` or `FULL`.
        numel, weights, state, ranks, on_node: N, w, o, D and g.
        slices: model-parallel slices of which a node has ranks.
    """
    part = (weights + state) * numel / ranks
    if kind == DP:
        return Save(0.0, 0.0, part, part, part, part)
    whole = state * numel
    share = weights * numel / ranks
    return Save(
        received=whole * (1 - 1 / ranks),
        received_by_node=slices * whole * (1 - on_node / ranks),
        to_host=whole * (1 + 1 / ranks) + share,
        host_memory=whole + part,
        written=part,
        host_copied=_PASSES * whole + share,
    )


def load_of_rank(
    kind: str, *, parallel: bool, numel: float, weights: float, state: float, ranks: int
) -> Load:
    """What a load costs a rank, with or without ``--ckpt-fully-parallel-load``."""
    every = weights * numel + (state * numel if kind == FULL else 0.0)  # that every rank needs
    own = state * numel / ranks if kind == DP else 0.0
    held = state * numel if kind == FULL else 0.0
    if not parallel or ranks == 1:
        return Load(every + own, 0.0, held)
    return Load(every / ranks + own, every, 2 * held)


# Resuming

# Optimizers that Megatron 0.17 to 0.19 cannot resume in the format torch_dist, of whatever model.
_NOT_IN_TORCH_DIST = {
    "sgd": "loading its momentum fails",
    "soap": "its preconditioners have other shapes than the weights, and saving them fails",
}


def check_optimizer(args: Namespace) -> None:
    """Refuse an optimizer that Megatron would fail with at the first step, save or restart.

    Raises:
        ValueError: naming the flag.
    """
    flag = f"--optimizer {args.optimizer}"
    if args.optimizer == "adaptive_muon":
        raise ValueError(
            f"{flag} fails at its first step with Megatron 0.19.2 and emerging-optimizers 0.3.0; "
            "choose muon"
        )
    if args.optimizer == "muon" and _is_distributed(args) and not args.bf16:
        raise ValueError(f"{flag} with --use-distributed-optimizer needs --bf16; add it")
    if args.optimizer == "sgd" and args.use_distributed_optimizer:
        raise ValueError(f"{flag} does not work with --use-distributed-optimizer; drop that")
    is_saved = args.save and not args.no_save_optim
    is_loaded = args.load and not (args.no_load_optim or args.finetune)
    reason = _NOT_IN_TORCH_DIST.get(args.optimizer)
    if reason and args.ckpt_format == "torch_dist" and (is_saved or is_loaded):
        raise ValueError(
            f"{flag} cannot be resumed with --ckpt-format torch_dist: {reason}; use --ckpt-format "
            "torch, or --no-save-optim and --no-load-optim"
        )


# Flags of the model-parallel layout, and of which layers a pipeline stage has.
_SIZES = (
    "--tensor-model-parallel-size",
    "--pipeline-model-parallel-size",
    "--expert-model-parallel-size",
)
UNEVEN_STAGES = (
    "--decoder-first-pipeline-num-layers",
    "--decoder-last-pipeline-num-layers",
    "--pipeline-model-parallel-layout",
    "--account-for-embedding-in-pipeline-split",
    "--account-for-loss-in-pipeline-split",
)
_STAGES = (
    "--num-layers-per-virtual-pipeline-stage",
    "--num-virtual-stages-per-pipeline-rank",
    *UNEVEN_STAGES,
)


def check_resume(args: Namespace, saved: Namespace, folder: str) -> None:
    """Refuse to resume an optimizer state that this run's optimizer and layout cannot read.

    Megatron would end, too: with a traceback whose advice is another flag's, or an assertion.

    Args:
        args: of this run, whether or not Megatron has validated them.
        saved: of the checkpoint.
        folder: of the checkpoints.

    Raises:
        ValueError: what to do, in one line.
    """
    sizes = bucket_size(args), bucket_size(saved)
    layouts = _layout(args), _layout(saved)
    same = _kind(args) == _kind(saved) and layouts[0] == layouts[1] and sizes[0] == sizes[1]
    if same or starts_anew(args, folder):
        return  # without a look at the checkpoint, which all ranks would take
    tensors = _tensors(args, folder)
    if not any("optimizer." in key for key in tensors):
        return  # a converted model, or saved with --no-save-optim: there is nothing to read
    if _kind(args) != _kind(saved):
        raise ValueError(
            f"the checkpoint in {folder} was saved with {_kind(saved)}, and its optimizer state "
            f"can only be read so, not with {_kind(args)}; give {_kind(saved)}, or add "
            "--no-load-optim"
        )
    apart = _experts_are_apart(args), _experts_are_apart(saved)
    if apart[0] != apart[1]:
        raise ValueError(
            f"the checkpoint in {folder} was saved with {_expert_sizes(saved)}, where experts have "
            f"{_EXPERTS_HAVE[apart[1]]}, and this run has {_expert_sizes(args)}, where they have "
            f"{_EXPERTS_HAVE[apart[0]]}: Megatron cannot read the optimizer state; give the "
            "checkpoint's, or add --no-load-optim"
        )
    if not _is_dp_reshardable(saved):
        return
    if not any("gbuf_idx" in key for key in tensors):
        return  # Muon's: a state for each parameter
    for now, then, variable in zip(*layouts, _LAYOUT_VARIABLES, strict=True):
        if now != then:
            raise ValueError(
                f"the checkpoint in {folder} was saved with {then}, and its optimizer state can "
                f"only be read so ({DP}), not with {now}; go back to {then}{variable}; to change "
                "it, go on as before, with "
                "--dist-ckpt-optim-fully-reshardable (pretrain.sh: OPTIMIZER_FORMAT=full), until "
                "the next checkpoint, which any layout reads; or add --no-load-optim"
            )
    if sizes[0] != sizes[1] and not _in_one_bucket(tensors, sizes[0]):
        raise ValueError(
            f"the checkpoint in {folder} was saved with {_bucket_flags(saved)}, and its optimizer "
            f"state can only be read so ({DP}), not with {_bucket_flags(args)}; give "
            f"{_bucket_flags(saved)} (pretrain.sh: BUCKET_SIZE), or add --no-load-optim"
        )


def starts_anew(args: Namespace, folder: str) -> bool:
    """Whether a run takes no optimizer state from the checkpoints in ``folder``."""
    return bool(
        getattr(args, "no_load_optim", None)
        or getattr(args, "finetune", False)
        or folder == getattr(args, "pretrained_checkpoint", None)
    )


def _kind(args: Namespace) -> str:
    """The optimizer, as flags; of others than Adam the state is the same in both cases."""
    name = getattr(args, "optimizer", "adam").removeprefix("dist_")
    shared = "with" if _is_distributed(args) else "without"
    return f"--optimizer {name}" + f", {shared} --use-distributed-optimizer" * (name == "adam")


def _is_distributed(args: Namespace) -> bool:
    # With Muon and the like Megatron exchanges the first for the second.
    flags = ("use_distributed_optimizer", "use_layer_wise_distributed_optimizer")
    return any(getattr(args, flag, False) for flag in flags)


# What pretrain.sh calls what `_layout` lists.
_LAYOUT_VARIABLES = (" (pretrain.sh: TP)", " (pretrain.sh: PP)", "", " (pretrain.sh: PRECISION)")


def _layout(args: Namespace) -> list[str]:
    """What a ``dp_reshardable`` state is tied to, beside its buckets, as flags."""
    half = next((f"--{kind}" for kind in ("bf16", "fp16") if getattr(args, kind, False)), "fp32")
    bf16_grads = "--grad-reduce-in-bf16" if getattr(args, "grad_reduce_in_bf16", False) else ""
    tensor, pipeline = (f"{flag} {_value(args, flag) or 1}" for flag in _SIZES[:2])
    for flag in _STAGES:
        value = _value(args, flag)
        if value:
            pipeline += f" {flag}" if value is True else f" {flag} {value}"
    expert = _expert_sizes(args)
    if getattr(args, "num_experts", None) and getattr(args, "moe_grouped_gemm", False):
        expert += " --moe-grouped-gemm"  # their parameters have another order
    return [tensor, pipeline, expert, f"{half} {bf16_grads}".strip()]


_EXPERTS_HAVE = {True: "an optimizer of their own", False: "the same as the rest"}


def _experts_are_apart(args: Namespace) -> bool:
    """Whether Megatron makes an optimizer for experts alone, as their groups are other ranks."""
    apart = (_value(args, _SIZES[2]) or 1) > 1 or _own_expert_tensor(args) is not None
    return bool(getattr(args, "num_experts", None)) and apart


def _expert_sizes(args: Namespace) -> str:
    tensor = _own_expert_tensor(args)
    return f"{_SIZES[2]} {_value(args, _SIZES[2]) or 1}" + (
        "" if tensor is None else f" --expert-tensor-parallel-size {tensor}"
    )


def _own_expert_tensor(args: Namespace) -> int | None:
    """The expert-TP of a run, where it is not its TP."""
    size = _value(args, "--expert-tensor-parallel-size")
    return None if size == args.tensor_model_parallel_size else size


def _value(args: Namespace, flag: str) -> Any:
    return getattr(args, argument_of(flag), None)


def _is_dp_reshardable(saved: Namespace) -> bool:
    return (
        _is_distributed(saved)
        and getattr(saved, "ckpt_format", None) == "torch_dist"
        and not getattr(saved, "dist_ckpt_optim_fully_reshardable", False)
        and not getattr(saved, "no_save_optim", None)
    )


def bucket_size(args: Namespace) -> float | str:
    """Elements at which a gradient bucket is closed; infinite for one bucket.

    As `resolve_ddp_bucket_size` of megatron/training/training.py has it: one bucket without
    ``--overlap-grad-reduce``; the default grows with the data-parallel size. What
    ``--ddp-num-buckets`` makes of the model is not known here, and is named instead.
    """
    if not getattr(args, "overlap_grad_reduce", False):
        return math.inf
    if getattr(args, "ddp_num_buckets", None):
        return f"--ddp-num-buckets {args.ddp_num_buckets}"
    if getattr(args, "ddp_bucket_size", None):
        return float(args.ddp_bucket_size)
    tensor, pipeline = (_value(args, flag) or 1 for flag in _SIZES[:2])
    return float(default_bucket_size(args.world_size // (tensor * pipeline)))


def default_bucket_size(ranks: int) -> int:
    """Megatron's, for so many data × context-parallel ranks."""
    return max(40_000_000, 1_000_000 * ranks)


def _bucket_flags(args: Namespace) -> str:
    size = bucket_size(args)
    if size == math.inf:
        return "no --overlap-grad-reduce (one gradient bucket)"
    if isinstance(size, str):
        return f"--overlap-grad-reduce {size}"
    return f"--overlap-grad-reduce --ddp-bucket-size {size:.0f}" + (
        "" if getattr(args, "ddp_bucket_size", None) else " (Megatron's default at that DP)"
    )


def _in_one_bucket(tensors: dict[str, Any], size: float | str) -> bool:
    """Whether each buffer in a checkpoint is one bucket, and is one at this size."""
    buckets: Counter[str] = Counter()
    largest = 0
    for key, entry in tensors.items():
        found = re.search(r"(dp_group_idx_\d+\.gbuf_idx_\d+)\..*bucket_idx_\d+\.param$", key)
        if found:
            buckets[found[1]] += 1
            largest = max(largest, entry.size.numel())
    if not buckets:
        return True  # no such checkpoint: Megatron's to say
    return set(buckets.values()) == {1} and not isinstance(size, str) and size >= largest


def _tensors(args: Namespace, folder: str) -> dict[str, Any]:
    """The tensors of the checkpoint that would be loaded, by key; none where it is not found."""
    from megatron_xielu.checkpoints.folder import NoCheckpoint, find
    from megatron_xielu.checkpoints.source import Refused
    from megatron_xielu.checkpoints.torch_dist import read_metadata

    try:
        checkpoint = find(Path(folder), getattr(args, "ckpt_step", None))
        return read_metadata(checkpoint / ".metadata").state_dict_metadata
    except (NoCheckpoint, Refused, OSError):
        return {}
