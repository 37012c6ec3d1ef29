"""The package's training entry with scales: it counts the bytes of a save and of a load.

Run by `launch` in place of ``python -m megatron_xielu.pretrain_gpt``; ``DUMP_FOLDER``
receives ``dump_<rank>.json``.
"""

import json
import os
from collections import Counter
from pathlib import Path

from megatron_xielu import pretrain_gpt

BYTES: Counter = Counter()


def count() -> None:
    """Put the scales in: collectives, what is gathered and held, and the records that are read."""
    import torch
    import torch.distributed as dist
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.training import checkpointing, training
    from torch.distributed.checkpoint import FileSystemReader

    during = []
    all_gather, broadcast, to_cpu = dist.all_gather, dist.broadcast, torch.Tensor.cpu
    gather, read = DistributedOptimizer.get_parameter_state_dp_zero, FileSystemReader.read_data

    def add(what: str, number: int) -> None:
        if during:
            BYTES[f"{during[-1]} {what}"] += number

    def counted_all_gather(received, tensor, *args, **kwargs):
        add("received", tensor.nbytes * (len(received) - 1))
        return all_gather(received, tensor, *args, **kwargs)

    def counted_broadcast(tensor, *args, **kwargs):
        add("exchanged", tensor.nbytes)
        return broadcast(tensor, *args, **kwargs)

    def counted_cpu(self, *args, **kwargs):
        add("to_host", self.nbytes)
        return to_cpu(self, *args, **kwargs)

    def counted_gather(self, *args, **kwargs):
        state = gather(self, *args, **kwargs)
        buffers = [buffer for index, buffer in state.items() if isinstance(index, int)]
        tensors = [t for b in buffers for world in b.values() for t in world.values()]
        add("held", sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor)))
        return state

    def counted_read(self, plan, planner):
        records = {item.storage_index for item in plan.items}
        add("read", sum(self.storage_data[record].length for record in records))
        return read(self, plan, planner)

    def phase(name, function):
        def counted(*args, **kwargs):
            during.append(name)
            try:
                return function(*args, **kwargs)
            finally:
                during.pop()

        return counted

    dist.all_gather, dist.broadcast = counted_all_gather, counted_broadcast
    torch.Tensor.cpu = counted_cpu
    DistributedOptimizer.get_parameter_state_dp_zero = counted_gather
    FileSystemReader.read_data = counted_read
    training.save_checkpoint = phase("save", checkpointing.save_checkpoint)
    training.load_checkpoint = phase("load", checkpointing.load_checkpoint)


def main() -> None:
    """Train, then dump."""
    train = pretrain_gpt._train

    def counted_train(args) -> None:
        count()
        train(args)

    pretrain_gpt._train = counted_train
    pretrain_gpt.main()
    Path(os.environ["DUMP_FOLDER"], f"dump_{os.environ['RANK']}.json").write_text(json.dumps(BYTES))


if __name__ == "__main__":
    main()
