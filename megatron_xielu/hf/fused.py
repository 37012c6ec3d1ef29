"""Makes a loaded Hugging Face model compute xIELU or xIPReLU with this package's kernels.

transformers' own ``XIELUActivation`` computes in the model's dtype, keeps several full-size
temporaries for backward, and has bfloat16 alphas: Apertus' are in the model's dtype (always
bfloat16 in transformers 4), Arcee's are bfloat16 even in a float32 model, and loading rounds what
the file says. The module here has the same parameters and buffers by the same names, so that
checkpoints stay the same, with alphas in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.activations import XIELUActivation

from megatron_xielu import functional
from megatron_xielu.common import safetensors_index
from megatron_xielu.hf.modeling_xiprelu import Float32Module, XIPReLUActivation

_FUNCTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    XIELUActivation: functional.xielu,
    XIPReLUActivation: functional.xiprelu,
}


class FusedActivation(Float32Module):
    """The activation of one MLP, with float32 alphas.

    Args:
        original: the module to stand for. Its buffers are kept for checkpoints; its ``eps``, a
            clamp that the closed form does without, has no effect.
        function: of `megatron_xielu.functional`.
        stored: values that replace those of ``original``, by name.

    The parameters are those of ``original`` where they stay on their device, so that an optimizer
    that has them keeps them.
    """

    def __init__(
        self, original: nn.Module, function: Callable[..., Tensor], stored: dict[str, Tensor]
    ) -> None:
        super().__init__()
        self.function = function
        for name, parameter in original.named_parameters():
            value = stored.get(name, parameter.detach())
            # A copy: what is offloaded to a disk may be a read-only map of it.
            value = value.to(parameter.device, torch.float32, copy=True)
            grad, parameter.grad = parameter.grad, None
            parameter.data = value.view(parameter.shape)
            parameter.grad = None if grad is None else grad.to(value.dtype)
            self.register_parameter(name, parameter)
        for name, buffer in original.named_buffers():
            self.register_buffer(name, stored.get(name, buffer).to(buffer.device))
        # A Python number: reading it from a buffer in forward would break torch.compile's graph.
        beta: Any = original.beta
        self._beta = float(stored.get("beta", beta))

    def forward(self, input: Tensor) -> Tensor:
        """Any shape, floating point; the result has the same shape and dtype."""
        return self.function(input, self.alpha_p, self.alpha_n, beta=self._beta)


def use_fused_activation(model: nn.Module, *, alphas_from: str | Path | None = None) -> int:
    """Replace every xIELU and xIPReLU module of ``model``, in place.

    Args:
        model: loaded by transformers, perhaps with parts offloaded, and perhaps within PEFT's
            model or torch.compile's. Shard it (FSDP, tensor parallelism) after this.
        alphas_from: folder with the model's safetensors, to take the alphas from it as they are
            stored. Without it they are those that transformers loaded, perhaps rounded.

    Returns:
        How many modules were replaced.

    Raises:
        ValueError: there is none; a module is on the meta device or sharded, or has an alpha that
            is not finite; DDP has alphas that are not in float32; ``alphas_from`` holds what is not
            a model's.
        FileNotFoundError: ``alphas_from`` holds no safetensors.
        KeyError: they lack an alpha of the model.
    """
    found = {name: module for name, module in model.named_modules() if type(module) in _FUNCTIONS}
    if not found:
        done = any(isinstance(module, FusedActivation) for module in model.modules())
        raise ValueError(
            f"{type(model).__name__} has no xIELU and no xIPReLU activation"
            + (" but fused ones: load the model again to take other alphas" if done else "")
        )
    stored = {} if alphas_from is None else _read(Path(alphas_from))
    of_module = {
        name: {} if alphas_from is None else _stored_for(name, stored, alphas_from)
        for name in found
    }
    in_ddp = any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules())
    with ExitStack() as offloaded_are_here:
        for module in found.values():
            offloaded_are_here.enter_context(_loaded(module))
        for name, module in found.items():
            _check(name, module, in_ddp, of_module[name])
        fused = {
            module: FusedActivation(module, _FUNCTIONS[type(module)], of_module[name])
            for name, module in found.items()
        }
    # MLPs may share one.
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in fused:
            model.set_submodule(name, fused[module])
    return len(fused)


def _loaded(module: nn.Module) -> AbstractContextManager[None]:
    """While this is open, the module's parameters are there, even if accelerate offloads them."""
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


def _check(name: str, module: nn.Module, in_ddp: bool, stored: dict[str, Tensor]) -> None:
    """Raise on parameters that cannot become those of a `FusedActivation`."""
    for alpha in ("alpha_p", "alpha_n"):
        tensor = getattr(module, alpha, torch.empty(0)).data
        if tensor.is_meta:
            raise ValueError(f"{name}.{alpha} is on the meta device: load the model first")
        if type(tensor) is not Tensor or tensor.numel() != 1:
            raise ValueError(f"{name}.{alpha} is sharded: use_fused_activation comes before that")
        if alpha not in stored and not _is_value(alpha, tensor):
            raise ValueError(f"{name}.{alpha} is {tensor.item()}: load a model with a finite one")
        if in_ddp and tensor.dtype != torch.float32:
            raise ValueError(
                f"{name}.{alpha} is {tensor.dtype}, and DistributedDataParallel would not reduce "
                "the gradient of a float32 one: use_fused_activation comes before that"
            )
    beta: Any = module.beta
    if "beta" not in stored and not _is_value("beta", torch.as_tensor(beta)):
        raise ValueError(f"{name}.beta is {float(beta)}: load a model with a positive one")


def _is_value(name: str, value: Tensor) -> bool:
    """Whether the activation can compute with it."""
    return value.numel() == 1 and bool(value.float().isfinite() and (name != "beta" or value > 0))


def _read(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The stored tensors of every module that has a tensor alpha_p or alpha_n."""
    files = safetensors_index.files(folder)
    if files == [folder / safetensors_index.ALONE] and not files[0].exists():
        raise FileNotFoundError(f"{folder} holds no model.safetensors and no index of several")
    modules: dict[str, dict[str, Tensor]] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (not a dictionary)
                    module, _, name = key.rpartition(".")
                    if name in ("alpha_p", "alpha_n", "beta", "eps"):
                        modules.setdefault(module, {})[name] = tensors.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: it cannot be read: {error}") from None
    return modules


def _stored_for(
    name: str, stored: dict[str, dict[str, Tensor]], folder: str | Path
) -> dict[str, Tensor]:
    """The tensors of the module of this name in the model: what wraps the model, or a part of it,
    adds to names in front and within."""
    parts = [p for p in name.split(".") if p not in ("_orig_mod", "_checkpoint_wrapped_module")]
    names = (".".join(parts[i:]) for i in range(len(parts)))
    values = next((stored[name] for name in names if name in stored), {})
    for alpha in ("alpha_p", "alpha_n"):
        if alpha not in values:
            raise KeyError(f"{name}.{alpha} is not in the safetensors of {folder}")
    for key, value in values.items():
        if not _is_value(key, value):
            raise ValueError(
                f"{folder}: {name}.{key} holds no number that fits "
                f"({value.dtype}, shape {tuple(value.shape)})"
            )
    return values
