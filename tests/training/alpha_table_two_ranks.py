"""One rank of two: what is logged of experts whose alphas are elements of one tensor.

Run by test_alpha_logging.py in processes of their own, since CPU mode changes torch for good; a
case that fails ends its process with an AssertionError.
"""

import math
from argparse import Namespace

import one_rank
import torch

from megatron_xielu import cpu

EXPERTS = (
    100  # so that, after the layout's padding, the second shard begins at element 64 of alpha_p
)


def main() -> None:
    """Both cases."""
    cpu.activate()
    one_rank.start()
    from megatron_xielu.features import activation_summary, alpha_logging

    rank = torch.distributed.get_rank()
    # Ranks that have the same experts, and of each alpha a shard.
    model = wrapped(range(EXPERTS), use_distributed_optimizer=True)
    (buffer,) = model.buffers
    ends = [
        alpha_logging.elements_in_shard(start, end - start, shard=buffer.numel // 2, rank=0).stop
        for start, end, _ in buffer.param_index_map.values()
    ]
    assert sorted(ends) == [0, 0, 64, EXPERTS], ends  # of all four; 64: experts' alpha_p
    expected = known(model)
    for data in (buffer.param_data, buffer.grad_data):  # what another rank has alone
        data.view(2, -1)[1 - rank] = math.nan
    assert_told(alpha_logging.AlphaTable([model]), expected)

    # Ranks that have other experts, and the dense pair both.
    model = wrapped(range(rank * EXPERTS, (rank + 1) * EXPERTS), use_distributed_optimizer=False)
    activation_summary.announce(Namespace(), [model])
    of_all = [None, None]
    torch.distributed.all_gather_object(of_all, known(model))
    one, other = of_all  # the dense pair, of which the first rank tells, is the first of each
    expected = {name: torch.cat([one[name], other[name][1:]]) for name in one}
    assert_told(alpha_logging.AlphaTable([model]), expected)

    # Frozen ones have no gradient.
    model = wrapped(range(EXPERTS), use_distributed_optimizer=True, frozen=True)
    assert_told(alpha_logging.AlphaTable([model]), known(model))


def wrapped(experts: range, *, use_distributed_optimizer: bool, frozen: bool = False):
    """Two layers, a dense one and one of these experts, in Megatron's DDP."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.module import MegatronModule

    from megatron_xielu.megatron_activations import MegatronXIELU

    config = one_rank.config(params_dtype=torch.float32)
    torch.manual_seed(experts.start)
    layers = []
    for number in (1, 2):
        activation = MegatronXIELU(config)
        if number == 2:
            for side in ("alpha_p", "alpha_n"):
                setattr(activation, side, torch.nn.Parameter(torch.randn(len(experts))))
        activation.requires_grad_(not frozen)
        layer, layer.mlp = MegatronModule(config), MegatronModule(config)
        owner = layer.mlp
        if number == 2:
            layer.mlp.local_expert_indices = list(experts)
            layer.mlp.experts = owner = MegatronModule(config)
        layer.layer_number, owner.activation_func = number, activation
        layers.append(layer)
    chunk, chunk.decoder = MegatronModule(config), MegatronModule(config)
    chunk.other = torch.nn.Linear(1, 1).bfloat16()  # DDP wants something to train
    chunk.decoder.layers = torch.nn.ModuleList(layers)
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=False, use_distributed_optimizer=use_distributed_optimizer
    )
    model = DistributedDataParallel(config, settings, chunk)
    model.buffers = [b for b in model.buffers if b.param_dtype == torch.float32]
    for buffer in model.buffers:
        buffer.grad_data.copy_(torch.arange(buffer.numel) / 7 + experts.start)
    return model


def known(model) -> dict[str, torch.Tensor]:
    """Raw alphas, [dense pair and experts], and the gradients of a pair, [.., 2]."""
    (dense, experts) = (layer.mlp for layer in model.module.decoder.layers)
    activations = (dense.activation_func, experts.experts.activation_func)
    pairs = [(one.alpha_p, one.alpha_n) for one in activations]

    def gradient(alpha: torch.Tensor) -> torch.Tensor:
        return getattr(alpha, "main_grad", torch.zeros_like(alpha)).clone()

    return {
        "p": torch.cat([p.detach().clone() for p, _ in pairs]),
        "n": torch.cat([n.detach().clone() for _, n in pairs]),
        "grad": torch.cat([torch.stack([gradient(p), gradient(n)], 1) for p, n in pairs]),
    }


def assert_told(table, expected: dict[str, torch.Tensor]) -> None:
    """What is written is of all these, and of nothing else."""
    values = table.scalars(table.gather())
    softplus = torch.nn.functional.softplus
    wanted = {
        "alpha_p_raw/layer_00": expected["p"][0],
        "alpha_n_raw/layer_00": expected["n"][0],
        "alpha_p/layer_00": softplus(expected["p"][0].double()),
        "alpha_n/layer_00": softplus(expected["n"][0].double()) + 0.5,
        "alpha_grad_norm/layer_00": expected["grad"][0].double().norm(),
        "alpha_grad_norm/layer_01.experts": expected["grad"][1:].double().norm(),
    }
    for side, floor in (("p", 0.0), ("n", 0.5)):
        effective = softplus(expected[side][1:].double()) + floor
        tag = f"alpha_{side}/layer_01.experts"
        wanted |= {
            f"{tag}.mean": effective.mean(),
            f"{tag}.std": (effective - effective.mean()).square().mean().sqrt(),
            f"{tag}.min": effective.min(),
            f"{tag}.max": effective.max(),
        }
    assert values.keys() == wanted.keys(), values.keys() ^ wanted.keys()
    for tag, value in wanted.items():
        assert math.isclose(values[tag], value.item(), rel_tol=1e-12), (tag, values[tag], value)


if __name__ == "__main__":
    main()
