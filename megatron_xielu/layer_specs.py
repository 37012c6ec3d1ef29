"""Puts an activation into Megatron's layer specs, and audits that the built model has it.

Megatron's dense MLP has a slot for an activation module, ``MLPSubmodules.activation_func``, used
when ``config.use_te_activation_func`` is set. `with_activation` copies a spec with that slot
filled, whatever its backend (local, Transformer Engine) and form (``ModuleSpec``,
``functools.partial``). No Megatron class is patched for it.

Megatron builds some MLPs from specs of its own (routed and shared experts, MTP blocks) and would
silently leave GELU there, so `audit` looks at the model that was really built.

From an unmodified Megatron-LM script::

    --spec megatron_xielu.layer_specs xielu_layer_spec --use-te-activation-func
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_xielu import arguments, bias_fusion, fp32_parameters, recompute
from megatron_xielu.activations import ACTIVATIONS, ActivationBuilder, TrainableActivation

# TransformerConfig fields that make Megatron build other MLPs than the dense one: flag.
_UNSUPPORTED = {
    "num_moe_experts": "--num-experts",
    "mtp_num_layers": "--mtp-num-layers",
    "use_transformer_engine_op_fuser": "--use-transformer-engine-op-fuser",
    "use_grouped_gemm_for_dense_mlp": "--use-grouped-gemm-for-dense-mlp",
    "use_kitchen": "--use-kitchen",
}


def with_activation(spec: Any, builder: ActivationBuilder) -> Any:
    """Copy a layer or block spec with ``builder`` in the activation slot of every dense MLP.

    Args:
        spec: ``ModuleSpec`` of a transformer layer, or ``TransformerBlockSubmodules``.
        builder: called by Megatron as ``builder(config=config)``.

    Raises:
        ValueError: a layer's MLP is of a kind whose activation cannot be replaced.
    """
    if isinstance(spec, TransformerBlockSubmodules):
        assert spec.layer_specs is not None
        return dataclasses.replace(
            spec, layer_specs=[with_activation(layer, builder) for layer in spec.layer_specs]
        )
    layer = spec.submodules
    mlp = _mlp_with_activation(layer.mlp, builder)
    return dataclasses.replace(spec, submodules=dataclasses.replace(layer, mlp=mlp))


def _mlp_with_activation(mlp: Any, builder: ActivationBuilder) -> Any:
    if mlp is IdentityOp:  # a layer without an MLP
        return mlp
    is_partial = isinstance(mlp, partial)
    submodules = mlp.keywords.get("submodules") if is_partial else getattr(mlp, "submodules", None)
    # A partial wraps the class or a class method of it.
    module = getattr(mlp.func, "__self__", mlp.func) if is_partial else getattr(mlp, "module", None)
    if not isinstance(submodules, MLPSubmodules) or module is not MLP:
        raise ValueError(
            f"the activation of {getattr(module, '__name__', mlp)} cannot be replaced: only the "
            "dense MLP is supported, without --num-experts and --use-transformer-engine-op-fuser"
        )
    submodules = dataclasses.replace(submodules, activation_func=builder)
    if is_partial:
        return partial(mlp.func, *mlp.args, **{**mlp.keywords, "submodules": submodules})
    return dataclasses.replace(mlp, submodules=submodules)


def audit(
    model: Iterable[torch.nn.Module], activation: type[TrainableActivation]
) -> list[TrainableActivation]:
    """Check that every MLP of the built model owns ``activation``; return those it found.

    Args:
        model: model chunks of this rank, before or after wrapping.
        activation: the class that every MLP must own.

    Raises:
        RuntimeError: naming the modules that have another activation, or whose activation sums
            its gradients over other ranks than those that hold the MLP's columns.
    """
    found, wrong = [], []
    for chunk in model:
        for name, module in chunk.named_modules():
            if not hasattr(module, "activation_func"):
                continue
            owned = module.activation_func
            if not isinstance(owned, activation):
                wrong.append(f"{name} has {getattr(owned, '__name__', type(owned).__name__)}")
            elif _ranks(owned.tp_group) != _ranks(getattr(module, "tp_group", owned.tp_group)):
                wrong.append(f"{name} sums alpha gradients over {_ranks(owned.tp_group)}")
            else:
                found.append(owned)
    if wrong:
        raise RuntimeError(
            f"not every MLP has {activation.__name__}: {'; '.join(wrong)}. Experts, multi-token "
            "prediction and fused MLPs are not supported yet"
        )
    return found


def _ranks(group: torch.distributed.ProcessGroup | None) -> list[int]:
    return [0] if group is None else torch.distributed.get_process_group_ranks(group)


@dataclasses.dataclass(frozen=True)
class _AuditHook:
    """`audit` in the form of Megatron's ``pre_wrap_hooks``."""

    activation: type[TrainableActivation]

    def __call__(self, model: list) -> list:
        audit(model, self.activation)
        return model


def layer_spec(
    builder: ActivationBuilder,
    config: Any,
    vp_stage: int | None = None,
    *,
    fuse_bias: bool = False,
    recompute_output: bool = False,
) -> Any:
    """The spec that Megatron would use for this model, with our activation, and the audit armed.

    Args:
        builder: see `with_activation`.
        config: Megatron's ``GPTModelConfig``.
        vp_stage: virtual pipeline stage.
        fuse_bias: have the built model add the bias of fc1 inside the activation.
        recompute_output: have the built model recompute the activation's output in backward.

    Raises:
        ValueError: the configuration needs an MLP that is not supported; names the flag.
    """
    from megatron.training.models.gpt import default_layer_spec

    transformer = config.transformer
    if not transformer.use_te_activation_func:
        raise ValueError(
            "add --use-te-activation-func: without it Megatron's MLP ignores the activation slot "
            "and would train with GELU"
        )
    if transformer.gated_linear_unit:
        raise ValueError("drop --swiglu (or --quick-geglu): xIELU and xIPReLU are not gated")
    for field, flag in _UNSUPPORTED.items():
        if getattr(transformer, field, None):
            raise ValueError(f"{flag} is not supported with xIELU and xIPReLU yet")
    fp32_parameters.mend_distributed_optimizer()
    # Megatron calls this once per virtual pipeline stage, and the hooks after the last one.
    hooks: list[Any] = [_AuditHook(builder.activation)]
    if fuse_bias:
        hooks.append(bias_fusion.install)
    if recompute_output:
        hooks.append(recompute.install)
    config.pre_wrap_hooks += [hook for hook in hooks if hook not in config.pre_wrap_hooks]
    return with_activation(default_layer_spec(config, vp_stage), builder)


def _script_layer_spec(name: str, config: Any, vp_stage: int | None) -> Any:
    """`layer_spec` for a script that parsed its flags without us, after what we can still check."""
    from megatron.training import get_args

    args = get_args()
    if not vp_stage:  # Megatron asks once per virtual pipeline stage; the answer is the same
        fp32_parameters.check_optimizer(args)
        arguments.check_checkpoint(args)
    builder = arguments.activation_builder(args) or ActivationBuilder(ACTIVATIONS[name])
    return layer_spec(builder, config, vp_stage)


def xielu_layer_spec(config: Any, vp_stage: int | None = None) -> Any:
    """For ``--spec megatron_xielu.layer_specs xielu_layer_spec --use-te-activation-func``."""
    return _script_layer_spec("xielu", config, vp_stage)


def xiprelu_layer_spec(config: Any, vp_stage: int | None = None) -> Any:
    """For ``--spec megatron_xielu.layer_specs xiprelu_layer_spec --use-te-activation-func``."""
    return _script_layer_spec("xiprelu", config, vp_stage)
