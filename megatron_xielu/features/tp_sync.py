"""A cheap check that tensor-parallel ranks hold the same alphas (``--xielu-check-tp-sync N``).

An alpha is replicated on every tensor-parallel rank; an expert's, on every expert-tensor-parallel
rank. If its copies ever differ, each rank computes another function, and a checkpoint keeps only
one of them: training goes on and is wrong.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from megatron_xielu.megatron_activations import MegatronActivation


def gather_alphas(
    modules: Iterable[MegatronActivation], group: torch.distributed.ProcessGroup
) -> tuple[torch.Tensor, list[bool]]:
    """The alphas of all ranks of ``group``; collective.

    Returns:
        Values of shape [ranks, alphas], for each module its alpha_p and then its alpha_n, and for
        each column whether the ranks' bits differ.
    """
    mine = torch.cat([a.detach() for m in modules for a in (m.alpha_p, m.alpha_n)])
    gathered = [torch.empty_like(mine) for _ in range(group.size())]
    torch.distributed.all_gather(gathered, mine, group=group)
    values = torch.stack(gathered)
    bits = values.view(torch.int32 if values.dtype == torch.float32 else torch.int64)
    return values, (bits != bits[0]).any(dim=0).tolist()


def check_tp_sync(model: torch.nn.Module, iteration: int) -> None:
    """Stop unless all tensor-parallel ranks hold bitwise equal alphas in ``model``.

    One all-gather of 8 bytes for each pair and one host synchronisation, and another for experts.
    Call it on all ranks.

    Args:
        model: a model chunk of this rank.
        iteration: for the error message.

    Raises:
        RuntimeError: naming the parameters that differ and their values by rank.
    """
    activations = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, MegatronActivation)
    }
    found = []
    # In the order of the layers, which all ranks share, so that their collectives match.
    for group in dict.fromkeys(module.tp_group for module in activations.values()):
        if group is None or group.size() == 1:
            continue
        members = {name: m for name, m in activations.items() if m.tp_group is group}
        names = [
            f"{name}.{side}" + (f"[{expert}]" if module.alpha_p.numel() > 1 else "")
            for name, module in members.items()
            for side in ("alpha_p", "alpha_n")
            for expert in range(module.alpha_p.numel())
        ]
        values, differs = gather_alphas(members.values(), group)
        found += [f"{name}: {values[:, i].tolist()}" for i, name in enumerate(names) if differs[i]]
    if found:
        raise RuntimeError(
            f"--xielu-check-tp-sync: at iteration {iteration} alphas differ between "
            f"tensor-parallel ranks (values by rank): {'; '.join(found)}"
        )
