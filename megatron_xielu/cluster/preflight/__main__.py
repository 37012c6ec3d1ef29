"""Checks before a run on many nodes: seconds here instead of a failure hours later.

Run under torchrun on every node, one rank a GPU, or with ``--cpu`` any number;
`examples/preflight.sh` does that::

    python3 -m torch.distributed.run --nnodes 2 --nproc-per-node 8 … \\
        -m megatron_xielu.cluster.preflight --run-dir /shared/run1 --tensor-model-parallel-size 2

Rank 0 prints one line a check, ``ok`` with its figures, or one ``FAIL`` or ``warn`` line for each
node or rank that is at fault, with what to do. All checks run, then every rank exits with 1 if any
failed. A rank that dies or hangs is named like any other fault (`exchange`).

=============  ===================================================  =======================
check          what is compared                                     file
=============  ===================================================  =======================
versions       Python to this package, and the image                `nodes`
clocks         time of day                                          `nodes`
run-dir        shared, writable, fast, with space                   `nodes`
data           .bin, .idx, tokenizer                                `data_files`
gpus           number, model, memory, health, results, speed        `gpus`
collectives    all-reduce over all and inside nodes: sum, speed     `network`
alphas         gradients and alphas over tensor-parallel ranks      `network`
layout         do checkpoints keep the optimizer's state            `layout`
=============  ===================================================  =======================

A node is named by ``MEGATRON_XIELU_NODE`` if that is set, else by its host name. The image is known
by ``MEGATRON_XIELU_IMAGE`` or the file ``/etc/megatron_xielu-image``. The layout is checked if the
arguments of the training follow after ``--``.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import NoReturn

from megatron_xielu.common import event_log, text, torchrun
from megatron_xielu.common.flags import POSITIVE, Limits


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """In one line: the usage is two dozen more."""
        self.exit(2, f"preflight: error: {message}\n")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; what it says must be the same on all nodes."""
    parser = _Parser(
        prog="python3 -m megatron_xielu.cluster.preflight",
        description="Check nodes before a training run.",
        allow_abbrev=False,
    )
    add, count = parser.add_argument, POSITIVE.read
    seconds = Limits(1e-3, 86400, whole=False).read
    amount = Limits(0, 1e12, whole=False).read
    add("--cpu", action="store_true", help="no GPUs: gloo, and no check of GPUs")
    add("--tensor-model-parallel-size", type=count, default=1, metavar="N")
    add("--limit", type=seconds, default=60.0, metavar="S", help="seconds for one check (60)")
    add("--layout-limit", type=seconds, default=300.0, metavar="S", help="for the layout (300)")
    add("--run-dir", metavar="DIR", help="where the run writes; shared by all nodes")
    add("--need-gib", type=amount, default=0.0, metavar="GIB", help="free space that the run needs")
    add("--disk-mib", type=count, default=64, metavar="MIB", help="size of the write test (64)")
    add("--min-disk-mbps", type=amount, metavar="MB/S", help="least write speed of a node")
    add("--min-bandwidth", type=amount, metavar="GB/S", help="least bus bandwidth over all ranks")
    add("--min-node-bandwidth", type=amount, metavar="GB/S", help="the same inside a node")
    for name in ("data-path", "train-data-path", "valid-data-path", "test-data-path"):
        add(f"--{name}", nargs="*", default=[], metavar="PREFIX", help="as Megatron's")
    add("--data-args-path", metavar="FILE", help="as Megatron's")
    add("--per-split-data-args-path", metavar="FILE", help="as Megatron's")
    add("--tokenizer-model", metavar="NAME", help="file, folder or Hugging Face name")
    add("--tokenizer-type", metavar="TYPE", help="as Megatron's")
    add("--padded-vocab-size", type=count, metavar="N", help="as Megatron's: no token beyond it")
    add("--fp8-format", metavar="FORMAT", help="as Megatron's: the nodes must have its recipe")
    add("--fp8-recipe", metavar="RECIPE", help="as Megatron's; alone it is checked, too")
    words = list(sys.argv[1:] if arguments is None else arguments)
    end = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:end])
    args.training = words[end + 1 :]
    parser.parse_known_args(args.training, args)  # what both have is the training's
    if args.fp8_format and not args.fp8_recipe:
        args.fp8_recipe = "delayed"  # Megatron's default
    try:
        torchrun.check(os.environ)
    except ValueError as error:
        parser.error(str(error))
    if "RANK" not in os.environ:
        parser.error("run it with torchrun (examples/preflight.sh does)")
    size, ranks = args.tensor_model_parallel_size, int(os.environ["WORLD_SIZE"])
    if ranks % size:
        parser.error(f"--tensor-model-parallel-size {size} does not divide {ranks} ranks")
    return args


def main() -> None:
    """Run every check and exit; see the top of this file."""
    args = parse()
    if os.environ["LOCAL_RANK"] == "0":
        # Tells examples/preflight.sh that the nodes have found each other.
        print(f"preflight: {event_log.node()} has joined", file=sys.stderr, flush=True)
    warnings.simplefilter("ignore")
    from megatron_xielu.cluster.preflight import data_files, gpus, network, nodes
    from megatron_xielu.cluster.preflight.exchange import Board
    from megatron_xielu.cluster.preflight.layout import Layout

    try:
        board = Board(limit=args.limit, connect=max(args.limit, 60.0))
        names = ", ".join(board.leaders)
        board.done("ranks", f"{len(board.leaders)} nodes, {board.world_size} ranks: {names}")
        layout = Layout(board, args)
        nodes.versions(board, args)
        nodes.clocks(board, args)
        nodes.run_directory(board, args)
        data_files.data(board, args)
        gpus.gpus(board, args)
        network.network(board, args)
        layout.check(board)
        board.finish()
    except BaseException as error:  # rank 0 does not answer, or a check is broken
        print(f"preflight: rank {os.environ['RANK']}: {error}", file=sys.stderr)
        if not isinstance(error, TimeoutError):
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # a thread stuck in a collective cannot be joined


if __name__ == "__main__":
    text.ready_output()
    main()
