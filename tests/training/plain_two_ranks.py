"""One rank of two, without Megatron: a bfloat16 model with plain XIELU trains as on one rank."""

import os
import sys

import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from megatron_xielu import XIELU

torch.distributed.init_process_group("gloo")
rank = int(os.environ["RANK"])
torch.manual_seed(0)
x = torch.randn(2, 16, 8).bfloat16()


def model() -> torch.nn.Module:
    torch.manual_seed(1)
    layers = [(torch.nn.Linear(8, 32), XIELU(), torch.nn.Linear(32, 8)) for _ in range(2)]
    return torch.nn.Sequential(*(module for layer in layers for module in layer)).bfloat16()


def gradients(of: torch.nn.Module, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """Of the alphas, of the mean loss."""
    sum(of(x).float().square().mean() / len(inputs) for x in inputs).backward()
    found = [p.grad for name, p in of.named_parameters() if "alpha" in name]
    return [g.full_tensor() if hasattr(g, "full_tensor") else g for g in found]


expected = gradients(model(), *x)
assert len(expected) == 4 and all(g.dtype == torch.float32 for g in expected)

torch.testing.assert_close(
    gradients(DistributedDataParallel(model()), x[rank]), expected, rtol=0.02, atol=1e-6
)

sharded = model()
for module in sharded.modules():
    if isinstance(module, XIELU):
        fully_shard(module)
fully_shard(sharded)
torch.testing.assert_close(gradients(sharded, x[rank]), expected, rtol=0.02, atol=1e-6)
torch.optim.AdamW(sharded.parameters()).step()
assert "megatron" not in sys.modules
