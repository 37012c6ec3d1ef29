"""Sums the ranks over gloo, ``all_reduce.py TIMES``, as started by torchrun; a sum every 0.1 s."""

import datetime
import socket
import sys
import time

import torch
import torch.distributed as dist

dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=5))
for _ in range(int(sys.argv[1])):
    total = torch.tensor([dist.get_rank() + 1.0])
    dist.all_reduce(total)
    print(f"{socket.gethostname()} has {total.item():g} of {dist.get_world_size()}", flush=True)
    time.sleep(0.1)
dist.destroy_process_group()
