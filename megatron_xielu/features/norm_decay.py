"""Weight decay of the gains of norms, which Megatron leaves out with all that has one dimension.

The runs of the paper decay every parameter but the alphas. With ``--apply-wd-to-norms`` so do ours,
of any activation: matrices, embeddings and the gains of RMSNorm or LayerNorm; alphas and biases
stay without. Megatron's own ``--apply-wd-to-qk-layernorm`` does it for queries and keys alone.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch

FLAG = "--apply-wd-to-norms"
ARGUMENT = "apply_wd_to_norms"

# Of a norm on its own, and of one that Transformer Engine keeps in the linear layer after it.
_GAINS = ("norm.weight", "layer_norm_weight")


def is_asked(args: Namespace) -> bool:
    """Whether the flag is given."""
    return getattr(args, ARGUMENT, False)


def decaying_norms(overrides: dict[Any, Any]) -> dict[Any, Any]:
    """Megatron's overrides, where what has no weight decay are alphas and biases alone.

    Args:
        overrides: of `get_standard_config_overrides`: by key of parameters, what their group has.
    """
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate

    undecayed = ParamWithNamePredicate(name="s1_not_a_gain", fn=_is_undecayed)
    return {
        ParamKey(with_name_predicate=undecayed) if override.get("wd_mult") == 0 else key: override
        for key, override in overrides.items()
    }


def _is_undecayed(parameter: torch.nn.Parameter, name: str) -> bool:
    return (parameter.dim() == 1 or name.endswith(".bias")) and not name.endswith(_GAINS)
