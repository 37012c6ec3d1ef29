"""The preflight on a node with a fault that cannot be had on one machine: FAULT names it.

clock:SECONDS   this node's time of day is that much ahead
sum             all-reduce gives this rank a wrong element
dies            this rank is killed while the collectives are checked
hangs           this rank stops answering while the data is checked
"""

import os
import signal
import time

import torch.distributed as dist

from megatron_xielu.cluster.preflight import __main__ as preflight
from megatron_xielu.cluster.preflight import data_files


def install(fault: str) -> None:
    kind, _, value = fault.partition(":")
    if kind == "clock":
        now = time.time
        time.time = lambda: now() + float(value)
    elif kind in ("sum", "dies"):
        all_reduce = dist.all_reduce

        def faulty(tensor, *args, **kwargs):
            if kind == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            result = all_reduce(tensor, *args, **kwargs)
            tensor.view(-1)[-1] += 1
            return result

        dist.all_reduce = faulty
    elif kind == "hangs":
        data_files.data = lambda board, args: time.sleep(600)


if __name__ == "__main__":
    install(os.environ.get("FAULT", ""))
    preflight.main()
