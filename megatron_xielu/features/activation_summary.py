"""One line at the start of a training that says which activation the built model has::

    megatron_xielu: xIELU in 24 MLPs, αp 0.8, αn 0.8, β 0.5; alphas fp32, summed over TP=2

The MLPs are counted where they are, on all pipeline stages and expert-parallel ranks.
"""

from __future__ import annotations

import dataclasses
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_xielu import catalog
from megatron_xielu.common import per_layer, text
from megatron_xielu.features.layer_names import layer_label, mlp_labels
from megatron_xielu.megatron_activations import MegatronActivation

# Two of the ways to train can meet: ``--spec`` or this package's entry, in a patched checkout.
_said = False

_KINDS = ("MLP", "expert", "grouped expert")


@dataclass(frozen=True)
class Found:
    """What is in the activation slot of an MLP."""

    activation: str
    settings: str = ""
    ranks: int = 1  # over which the gradients of its alphas are summed
    kind: str = "MLP"


def announce(args: Namespace, model: Sequence[torch.nn.Module]) -> Any:
    """Count the MLPs of all ranks, and `say` what they have. Collective over all ranks.

    Args:
        args: Megatron's arguments.
        model: model chunks of this rank, built but not yet wrapped or loaded.

    Returns:
        ``model``, so that this is one of Megatron's ``pre_wrap_hooks``.
    """
    if _said:
        return model
    mine: dict[tuple[str, str], Found] = {}
    for chunk in model:
        modules = dict(chunk.named_modules())
        for name, module in modules.items():
            if hasattr(module, "activation_func"):
                # T5 has a layer 0 in its encoder, and one in its decoder.
                part, found = name.partition(".")[0], found_in(module.activation_func, args)
                found = dataclasses.replace(found, kind=_kind(layer_label(name, modules)))
                mine |= {(part, label): found for label in mlp_labels(name, modules)}
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    say({place: found for of_rank in everyone for place, found in of_rank.items()})
    return model


def _kind(label: str) -> str:
    """Which of `_KINDS` a module with this `layer_label` is."""
    if label.endswith(".experts"):
        return "grouped expert"
    return "expert" if ".experts." in label else "MLP"


def found_in(activation: Any, args: Namespace) -> Found:
    """What ``activation`` is, of a model that was built for ``args``."""
    if not isinstance(activation, MegatronActivation):
        named = catalog.activation_of(args)
        if isinstance(activation, torch.nn.Module):
            return Found(type(activation).__name__)
        reason = ": neither --xielu nor --xiprelu is given" if named == "gelu" else ""
        return Found(f"{catalog.ACTIVATIONS[named].label} (Megatron's)", reason)
    dtype = str(activation.alpha_p.dtype).removeprefix("torch.")
    alphas = ["fp32" if dtype == "float32" else dtype]
    trained = activation.alpha_p.requires_grad
    alphas += [] if trained else ["frozen"]
    alphas += ["one pair for all MLPs"] if getattr(args, "xielu_shared_alphas", False) else []
    alphas += catalog.alpha_group_of(args)
    loads = getattr(args, "load", None) or getattr(args, "pretrained_checkpoint", None)
    return Found(
        catalog.ACTIVATIONS[activation.name].label,
        f", αp {_start(args, activation, 'alpha_p_init')}"
        f", αn {_start(args, activation, 'alpha_n_init')}"
        + (" (or as loaded from a checkpoint)" if loads else "")
        + f", β {activation.beta:g}; alphas {', '.join(alphas)}",
        activation.tp_group.size() if trained and activation.tp_group is not None else 1,
    )


def _start(args: Namespace, activation: MegatronActivation, setting: str) -> str:
    values = getattr(args, f"xielu_{setting}", None)
    return per_layer.in_words(values if isinstance(values, list) else getattr(activation, setting))


def say(mlps: dict[tuple[str, str], Found]) -> None:
    """Print the line on rank 0, once in a process. See `line` for the argument."""
    global _said
    if not _said and mlps and torch.distributed.get_rank() == 0:
        print(text.printable(line(mlps), sys.stdout), flush=True)
    _said = True


def line(mlps: dict[tuple[str, str], Found]) -> str:
    """What was found, in one line.

    Args:
        mlps: of the whole model, by the part that each is in, and its `mlp_labels`.
    """
    said = []
    for activation, settings in dict.fromkeys((f.activation, f.settings) for f in mlps.values()):
        counts: list[str] = []
        sums = ""
        for kind in _KINDS:
            ranks = [
                found.ranks
                for found in mlps.values()
                if (found.activation, found.settings, found.kind) == (activation, settings, kind)
            ]
            if ranks:
                counts.append(f"{len(ranks)} {kind}{'s' * (len(ranks) > 1)}")
            if max(ranks, default=1) > 1:
                sums += f", {'those of experts ' * (kind != 'MLP')}summed over TP={max(ranks)}"
        said.append(f"{activation} in {' and '.join(counts)}{settings}{sums}")
    return f"megatron_xielu: {'; '.join(said)}"
