"""Fills the slot for an activation in Megatron's MLPs, and audits that the built model has it.

Megatron's MLP has a slot for an activation module, ``MLPSubmodules.activation_func``, used when
``config.use_te_activation_func`` is set. `with_activation` copies a spec with that slot filled in
every MLP, expert and shared expert, whatever its backend (local, Transformer Engine) and form
(``ModuleSpec``, ``functools.partial``). No Megatron class is patched for it.

Megatron builds some MLPs from specs of its own (those of multi-token prediction: see
`fill_prediction_layers`) and would silently leave GELU there, so `audit` looks at the model that
was really built. ``docs/moe.md`` has the kinds of MLPs and models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_xielu import megatron_grouped, workarounds
from megatron_xielu.activations import TrainableActivation
from megatron_xielu.megatron_activations import ActivationBuilder, MegatronActivation, of_megatron

# Fields of Megatron's spec dataclasses that lead to MLPs: of blocks, of layers, of hybrid stacks
# and of multi-token prediction.
_LEADING_TO_MLPS = (
    "layer_specs",
    "mlp",
    "mlp_layer",
    "moe_layer",
    "mtp_block_spec",
    "mtp_model_layer",
)


def with_activation(spec: Any, builder: ActivationBuilder) -> Any:
    """Copy a layer, block or stack spec with ``builder`` in the activation slot of every MLP.

    Args:
        spec: ``ModuleSpec`` of a layer (GPT, BERT), of a hybrid stack, or of a multi-token
            prediction layer; or submodules such as ``TransformerBlockSubmodules`` (GPT, T5).
        builder: called by Megatron as ``builder(config=config)``. Routed experts get a copy of it
            that is marked as theirs.

    Raises:
        ValueError: an MLP is of a kind whose activation cannot be replaced, or there is no place
            for one. A hybrid stack lists layers of all kinds: it raises when such a layer is built.
    """
    workarounds.mend_optimizers()  # every way in leads here, before there is an optimizer
    if isinstance(spec, ModuleSpec):
        return dataclasses.replace(spec, submodules=with_activation(spec.submodules, builder))
    filled = {
        field: _filled(field, getattr(spec, field), builder)
        for field in _LEADING_TO_MLPS
        if hasattr(spec, field)
    }
    if not filled:
        raise ValueError(f"{type(spec).__name__} is not a spec of layers that have an MLP")
    return dataclasses.replace(spec, **filled)


def _filled(field: str, value: Any, builder: ActivationBuilder) -> Any:
    if value is None or value is IdentityOp:  # a layer without an MLP
        return value
    if field == "layer_specs":
        return [with_activation(layer, builder) for layer in value]
    if field == "mlp":
        return _mlp_with_activation(value, builder)
    if field != "moe_layer":
        return with_activation(value, builder)
    try:
        return with_activation(value, builder)
    except ValueError as error:
        refusing = dataclasses.replace(value.submodules, mlp=partial(_refuse, str(error)))
        return dataclasses.replace(value, submodules=refusing)


def _refuse(message: str, **kwargs: Any) -> None:
    raise ValueError(message)


def _mlp_with_activation(mlp: Any, builder: ActivationBuilder) -> Any:
    module, submodules = _parts(mlp)
    if module is MLP and isinstance(submodules, MLPSubmodules):
        return _with_submodules(mlp, dataclasses.replace(submodules, activation_func=builder))
    if module is not MoELayer:
        raise ValueError(
            f"the activation of {_name(module, mlp)} cannot be replaced; drop "
            "--use-transformer-engine-op-fuser and --use-grouped-gemm-for-dense-mlp"
        )
    filled = {"experts": _experts_with_activation(submodules.experts, builder)}
    if submodules.shared_experts is not None:
        _, shared = _parts(submodules.shared_experts)
        shared = dataclasses.replace(shared, activation_func=builder)
        filled["shared_experts"] = _with_submodules(submodules.shared_experts, shared)
    return _with_submodules(mlp, dataclasses.replace(submodules, **filled))


def _experts_with_activation(spec: Any, builder: ActivationBuilder) -> Any:
    """Of routed experts, with an MLP each (`SequentialMLP`) or all in one (`TEGroupedMLP`)."""
    module, experts = _parts(spec)
    if module is SequentialMLP:
        own = dataclasses.replace(builder, is_expert=True)
        return _with_submodules(spec, dataclasses.replace(experts, activation_func=own))
    if module is TEGroupedMLP:
        filled = dataclasses.replace(experts, activation_func=_grouped(builder))
        return partial(megatron_grouped.build, TEGroupedMLP, submodules=filled)
    raise ValueError(
        f"the activation of {_name(module, spec)} cannot be replaced; of experts those of "
        "SequentialMLP and TEGroupedMLP can"
    )


def _grouped(builder: ActivationBuilder) -> ActivationBuilder:
    activation = megatron_grouped.of_grouped_experts(builder.activation)
    return dataclasses.replace(builder, activation=activation, is_expert=True)


def _parts(spec: Any) -> tuple[Any, Any]:
    """Class and submodules of a ``ModuleSpec``, or of a partial of a class or class method."""
    if isinstance(spec, partial) and spec.func is megatron_grouped.build:
        return spec.args[0], spec.keywords["submodules"]
    if isinstance(spec, partial):
        return getattr(spec.func, "__self__", spec.func), spec.keywords.get("submodules")
    return getattr(spec, "module", None), getattr(spec, "submodules", None)


def _with_submodules(spec: Any, submodules: Any) -> Any:
    if isinstance(spec, partial):
        return partial(spec.func, *spec.args, **{**spec.keywords, "submodules": submodules})
    return dataclasses.replace(spec, submodules=submodules)


def _name(module: Any, spec: Any) -> str:
    return getattr(module, "__name__", str(spec))


def fill_prediction_layers(model: list, builder: ActivationBuilder) -> list:
    """Give every MLP of the multi-token prediction layers of ``model`` the activation.

    Megatron 0.19 makes the spec of these layers itself, whatever spec it was given for the others.

    Args:
        model: model chunks of this rank, before wrapping.
        builder: see `with_activation`.

    Returns:
        ``model``, so that this is one of Megatron's ``pre_wrap_hooks``.
    """
    for chunk in model:
        modules = list(chunk.mtp.modules()) if getattr(chunk, "mtp", None) is not None else []
        experts = {e for m in modules if isinstance(m, SequentialMLP) for e in m.local_experts}
        for mlp in modules:
            is_grouped = isinstance(mlp, TEGroupedMLP)
            if not (is_grouped or isinstance(mlp, MLP)):
                continue
            if isinstance(mlp.activation_func, MegatronActivation):
                continue
            if is_grouped:
                own = _grouped(builder)
            else:
                own = dataclasses.replace(builder, is_expert=mlp in experts)
            mlp.activation_func = own(config=mlp.config)
            # As in an MLP that was built with it: parameters have an order.
            mlp._modules["linear_fc2"] = mlp._modules.pop("linear_fc2")
            if is_grouped:
                megatron_grouped.connect(mlp)
    return model


def audit(
    model: Iterable[torch.nn.Module], activation: type[TrainableActivation]
) -> list[MegatronActivation]:
    """Check that every MLP of the built model owns ``activation``; return those it found.

    Args:
        model: model chunks of this rank, before or after wrapping.
        activation: what every MLP must own, in Megatron's class or in the plain one's name.

    Raises:
        RuntimeError: naming the modules that have another activation, or whose activation sums
            its gradients over other ranks than those that hold the MLP's columns, or has its
            copies on other ranks than the MLP's weights.
    """
    wanted = of_megatron(activation)
    found, wrong = [], []
    for chunk in model:
        for name, module in chunk.named_modules():
            if not hasattr(module, "activation_func"):
                continue
            owned = module.activation_func
            if not isinstance(owned, wanted):
                wrong.append(f"{name} has {getattr(owned, '__name__', type(owned).__name__)}")
            elif _ranks(owned.tp_group) != _ranks(getattr(module, "tp_group", owned.tp_group)):
                wrong.append(f"{name} sums alpha gradients over {_ranks(owned.tp_group)}")
            elif _is_replicated(owned.alpha_p) != _is_replicated(
                next(module.linear_fc1.parameters())
            ):
                wrong.append(f"{name} is reduced over other data-parallel ranks than its alphas")
            else:
                found.append(owned)
    if wrong:
        raise RuntimeError(
            f"not every MLP has {wanted.__name__}: {'; '.join(wrong)}. See docs/moe.md for the "
            "kinds that are supported"
        )
    return found


def _is_replicated(parameter: torch.nn.Parameter) -> bool:
    """Over all data-parallel ranks; Megatron marks experts that are not."""
    return getattr(parameter, "allreduce", True)


def _ranks(group: torch.distributed.ProcessGroup | None) -> list[int]:
    return [0] if group is None else torch.distributed.get_process_group_ranks(group)
