"""Preflight checks of the network: collectives, and that alphas stay equal over it.

See `megatron_xielu.cluster.preflight`. Collectives run only while every rank answers and none has
failed, each in a thread with a time limit (see `exchange`).
"""

from __future__ import annotations

import statistics
import time
from argparse import Namespace
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, ProcessGroup

from megatron_xielu.cluster.preflight.exchange import MIB, Answers, Board, Problem
from megatron_xielu.cluster.preflight.gpus import synchronize, use_device
from megatron_xielu.selftest import check_alpha_sync

SLOW_NODE = 0.30  # below the median bandwidth inside a node: a warning
_REDUCED_BYTES = {"cuda": 256 * MIB, "cpu": 8 * MIB}


def network(board: Board, args: Namespace) -> None:
    """Connect all ranks; check and time all-reduce; check the alphas of a tensor-parallel layer."""
    groups: dict[str, ProcessGroup] = {}
    if _connect(board, args, groups):
        _collectives(board, args, groups)
    _alphas(board, args, groups)


def _connect(board: Board, args: Namespace, groups: dict[str, ProcessGroup]) -> bool:
    """Make the process groups; whether all ranks have them."""
    if not board.complete:
        board.fail("collectives", "not run: not every rank answers")
        return False

    def connect() -> None:
        # Longer than the board's limit, which then comes first and names the rank.
        timeout = timedelta(seconds=3 * board.limit)
        backend = "gloo" if args.cpu else "cpu:gloo,cuda:nccl"
        if not args.cpu:
            use_device(board, "cuda")
        store = PrefixStore("collectives", board.new_client(timeout=board.limit))
        dist.init_process_group(
            backend, store=store, rank=board.rank, world_size=board.world_size, timeout=timeout
        )
        by_node = [board.ranks_of(node) for node in board.leaders]
        size = args.tensor_model_parallel_size
        if size == 1:  # nothing is split in training: the check is the network's, over all
            size = board.world_size
        by_tensor_rank = [
            list(range(start, start + size)) for start in range(0, board.world_size, size)
        ]
        for what, members in (("a node's ranks", by_node), ("tensor", by_tensor_rank)):
            mine, _ = dist.new_subgroups_by_enumeration(members, timeout=timeout)
            assert isinstance(mine, ProcessGroup)
            groups[what] = mine
        assert dist.group.WORLD is not None
        groups["all ranks"] = dist.group.WORLD

    connected = board.ask("collectives", connect, stage="connect")
    if len(connected) < board.world_size:
        board.fail(
            "collectives",
            "the ranks named cannot reach the others: open the ports between the nodes, or set "
            "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the network that joins them "
            "(examples/network.env.sh)",
        )
        return False

    def sum_over_gloo() -> None:  # Megatron's groups on the CPU; a network of gloo's own choice
        _check_sum(board.rank, torch.device("cpu"), groups["all ranks"], elements=1024)

    return len(board.ask("collectives", sum_over_gloo, stage="gloo")) == board.world_size


def _collectives(board: Board, args: Namespace, groups: Mapping[str, ProcessGroup]) -> None:
    kind = "cpu" if args.cpu else "cuda"
    figures = []
    for what, ranks in (("all ranks", board.world_size), ("a node's ranks", board.local_size)):
        if ranks == 1:
            continue
        if not board.complete or board.failed("collectives"):
            return  # a rank may still be in the collective that failed
        speeds = board.ask(
            "collectives",
            lambda what=what: _all_reduce(board, kind, groups[what]),  # type: ignore[misc]
            stage=what,
        )
        if len(speeds) == board.world_size:
            figures.append(f"{what} {min(speeds.values()):.3g} GB/s")
            _judge_bandwidth(board, args, what, speeds)
    shown = ", ".join(figures) or "one rank, nothing to measure"
    board.done("collectives", f"all-reduce right, bus bandwidth: {shown}")


def _check_sum(
    rank: int, device: torch.device, group: ProcessGroup, *, elements: int
) -> torch.Tensor:
    """All-reduce whole numbers; the buffer.

    Raises:
        Problem: an element is not the sum.
    """
    pattern = torch.arange(elements, device=device, dtype=torch.float32).remainder_(13).add_(1)
    members = dist.get_process_group_ranks(group)
    buffer = pattern * (rank + 1)
    dist.all_reduce(buffer, group=group)
    wrong = int((buffer != pattern * sum(member + 1 for member in members)).sum())
    if wrong:
        raise Problem(
            f"all-reduce over {len(members)} ranks: {wrong} of {elements} elements are not the "
            "sum; leave out the node named in every such group, and test its memory and network"
        )
    return buffer


def _all_reduce(board: Board, kind: str, group: ProcessGroup) -> float:
    """Check the sum, then measure bus bandwidth in GB/s: 2(n-1)/n bytes a second, as nccl-tests."""
    device = use_device(board, kind)
    size = _REDUCED_BYTES[kind]
    buffer = _check_sum(board.rank, device, group, elements=size // 4).zero_()
    repeats = 10 if kind == "cuda" else 3
    dist.all_reduce(buffer, group=group)
    synchronize(kind)
    start = time.perf_counter()
    for _ in range(repeats):
        dist.all_reduce(buffer, group=group)
    synchronize(kind)
    seconds = (time.perf_counter() - start) / repeats
    ranks = group.size()
    return 2 * (ranks - 1) / ranks * size / seconds / 1e9


def _judge_bandwidth(board: Board, args: Namespace, what: str, speeds: Answers) -> None:
    if what == "all ranks":
        slowest = min(speeds.values())
        if args.min_bandwidth is not None and slowest < args.min_bandwidth:
            nodes = ", ".join(board.leaders)
            board.fail(
                "collectives",
                f"all-reduce over {nodes}: {slowest:.3g} GB/s, below --min-bandwidth "
                f"{args.min_bandwidth:g}; NCCL_DEBUG=INFO says which network is used; run this on "
                "half of the nodes to find the slow one",
            )
        return
    by_node = {leader: speeds[leader] for leader in board.leaders.values()}
    median = statistics.median(by_node.values())
    for leader, speed in by_node.items():
        if args.min_node_bandwidth is not None and speed < args.min_node_bandwidth:
            board.fail(
                "collectives",
                f"all-reduce inside the node: {speed:.3g} GB/s, below --min-node-bandwidth "
                f"{args.min_node_bandwidth:g}; look at nvidia-smi nvlink --status and topo -m",
                rank=leader,
            )
        elif not args.cpu and speed < (1 - SLOW_NODE) * median:
            board.warn(
                "collectives",
                f"all-reduce inside the node: {speed:.3g} GB/s, the median is {median:.3g}; look "
                "at nvidia-smi nvlink --status and topo -m",
                rank=leader,
            )


def _alphas(board: Board, args: Namespace, groups: Mapping[str, ProcessGroup]) -> None:
    if not board.complete or board.failed("collectives"):
        board.fail("alphas", "not run: the collectives failed")
        return
    device = "cpu" if args.cpu else "cuda"

    def check() -> str:
        try:
            return check_alpha_sync(groups["tensor"], use_device(board, device))
        except AssertionError as error:
            ranks = dist.get_process_group_ranks(groups["tensor"])
            nodes = ", ".join(dict.fromkeys(board.node_of(rank) for rank in ranks))
            raise Problem(
                f"tensor-parallel ranks {ranks} on {nodes}: {error}; if these nodes' versions are "
                "equal, test their memory and network"
            ) from error

    results = board.ask("alphas", check)
    if results:
        count = board.world_size // groups["tensor"].size()
        board.done("alphas", f"{count} tensor-parallel groups of {results[min(results)]}")
