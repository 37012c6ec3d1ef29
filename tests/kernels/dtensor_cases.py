"""One rank of two: the operators on DTensors equal the same on the whole tensors."""

import itertools

import torch
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)

from megatron_xielu import functional

mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
x, dy = torch.randn(2, 4, 3, 6)
alphas, bias = [torch.tensor([0.2]), torch.tensor([-1.1])], torch.randn(6)


def distributed(tensor: torch.Tensor, placement) -> DTensor:
    if placement == Partial():
        return DTensor.from_local(tensor / 2, mesh, [placement])
    return distribute_tensor(tensor, mesh, [placement])


for name, placement, with_bias in itertools.product(
    ("xielu", "xiprelu"),
    (Shard(0), Shard(1), Shard(2), Replicate(), Partial()),
    (False, True),
):
    function = getattr(functional, name)
    whole = [t.clone().requires_grad_() for t in (x, *alphas, *([bias] if with_bias else []))]
    parts = [distributed(whole[0].detach(), placement)]
    parts += [distributed(t.detach(), Replicate()) for t in whole[1:]]
    for part in parts:
        part.requires_grad_()
    results = []
    for inputs in (whole, parts):
        y = function(*inputs[:3], bias=inputs[3] if with_bias else None)
        if isinstance(y, DTensor) and placement != Partial():  # computed where it lies
            assert y.placements == (placement,), (name, y.placements, placement)
        upstream = distributed(dy, y.placements[0]) if isinstance(y, DTensor) else dy
        y.backward(upstream)
        results.append([y, *(t.grad for t in inputs)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other.full_tensor(), one)

# What was made for inference never comes to autograd.
with torch.inference_mode():
    y = functional.xielu(distribute_tensor(x, mesh, [Shard(0)]), *alphas)
torch.testing.assert_close(y.full_tensor(), functional.xielu(x, *alphas))
