"""Names of a model's MLPs that are the same in every parallel layout."""

from __future__ import annotations

from typing import Any


def layer_label(name: str, modules: dict[str, Any]) -> str:
    """What to call the MLP that a module is, or is a part of.

    ``layer_07`` is the MLP of the layer with index 7 in a checkpoint; ``layer_07.experts.003`` an
    expert of it, ``layer_07.shared_experts`` its shared experts, ``mtp_0`` the MLP of a prediction
    block.

    Args:
        name: of the module in its model chunk.
        modules: ``named_modules()`` of the chunk.
    """
    path = name.split(".")
    label = []
    for place, part in enumerate(path):
        if path[place - 1 : place] == ["layers"]:
            number = getattr(modules[".".join(path[: place + 1])], "layer_number", 1)
            label.append(f"mtp_{part}" if "mtp" in path[:place] else f"layer_{number - 1:02d}")
        elif path[place - 1 : place] == ["local_experts"]:
            experts = modules[".".join(path[: place - 2])].local_expert_indices
            label.append(f"{experts[int(part)]:03d}")
        elif part in ("experts", "shared_experts"):
            label.append(part)
    return ".".join(label)


def mlp_labels(name: str, modules: dict[str, Any]) -> list[str]:
    """`layer_label` of each MLP that a module is, or is a part of, in the order of its alphas.

    That is one, unless the module is of grouped experts: those of this rank.

    Args:
        name: of the module in its model chunk.
        modules: ``named_modules()`` of the chunk.
    """
    label = layer_label(name, modules)
    if not label.endswith(".experts"):
        return [label]
    path = name.split(".")
    layer = modules[".".join(path[: path.index("experts")])]
    return [f"{label}.{expert:03d}" for expert in layer.local_expert_indices]
