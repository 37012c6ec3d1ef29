"""One rank of two: a bfloat16 model with fused activations trains as on one rank."""

import os

import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import ArceeConfig, ArceeForCausalLM

from megatron_xielu.hf import use_fused_activation
from megatron_xielu.hf.fused import FusedActivation

torch.distributed.init_process_group("gloo")
rank = int(os.environ["RANK"])
tokens = torch.arange(3, 27).reshape(2, 12)


def model(dtype: torch.dtype = torch.bfloat16) -> ArceeForCausalLM:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = ArceeConfig(**sizes, num_attention_heads=4, hidden_act="xielu", pad_token_id=0)
    return ArceeForCausalLM(config).to(dtype)


def loss(of: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return of(tokens).logits.float().square().mean()


def alpha_gradients(of: torch.nn.Module) -> list[torch.Tensor]:
    gradients = [p.grad for name, p in of.named_parameters() if "alpha" in name]
    return [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients]


def is_refused(of: torch.nn.Module, words: str) -> None:
    try:
        use_fused_activation(of)
    except ValueError as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"not refused: {words}")


# FSDP2
whole, sharded = model(), model()
for one in (whole, sharded):
    use_fused_activation(one)
for module in sharded.modules():
    if isinstance(module, FusedActivation):
        fully_shard(module)
for layer in sharded.model.layers:
    fully_shard(layer)
fully_shard(sharded)
((loss(whole, tokens[:1]) + loss(whole, tokens[1:])) / 2).backward()
loss(sharded, tokens[rank : rank + 1]).backward()
torch.testing.assert_close(alpha_gradients(sharded), alpha_gradients(whole), rtol=0.02, atol=1e-6)
torch.nn.utils.clip_grad_norm_(sharded.parameters(), 1.0)
torch.optim.AdamW(sharded.parameters()).step()

late = model()
fully_shard(late)
is_refused(late, "is sharded: use_fused_activation comes before that")

# DDP that has the parameters already reduces their gradients, of float32 ones alone.
late = DistributedDataParallel(model(torch.float32).float())
use_fused_activation(late)
loss(late, tokens[rank : rank + 1]).backward()
for gradient in alpha_gradients(late):
    total = gradient.clone()
    torch.distributed.all_reduce(total)
    assert torch.equal(total, 2 * gradient) and total != 0
is_refused(DistributedDataParallel(model()), "torch.bfloat16, and DistributedDataParallel")
