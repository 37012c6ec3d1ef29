"""Makes a loaded Hugging Face model compute xIELU or xIPReLU with this package's kernels.

transformers' own ``XIELUActivation`` computes in the model's dtype, keeps several full-size
temporaries for backward, and has bfloat16 alphas: Apertus' are in the model's dtype (always
bfloat16 in transformers 4), Arcee's are bfloat16 even in a float32 model, and loading rounds what
the file says. The module here has the same parameters and buffers by the same names, so that
checkpoints stay the same, with alphas in float32.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn
from transformers.activations import XIELUActivation

from megatron_xielu import functional
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
    """

    def __init__(
        self, original: nn.Module, function: Callable[..., Tensor], stored: dict[str, Tensor]
    ) -> None:
        super().__init__()
        self.function = function
        for name, parameter in original.named_parameters():
            value = stored.get(name, parameter.detach()).to(parameter.device).float()
            self.register_parameter(name, nn.Parameter(value, parameter.requires_grad))
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
        model: loaded by transformers; make an optimizer, and compile, after this.
        alphas_from: folder with the model's safetensors, to take the alphas from it as they are
            stored. Without it they are those that transformers loaded, perhaps rounded.

    Returns:
        How many modules were replaced.

    Raises:
        ValueError: there is none.
        FileNotFoundError: ``alphas_from`` holds no safetensors.
        KeyError: they lack an alpha of the model.
    """
    found = [
        (name, module, _FUNCTIONS[type(module)])
        for name, module in model.named_modules()
        if type(module) in _FUNCTIONS
    ]
    if not found:
        raise ValueError(f"{type(model).__name__} has no xIELU and no xIPReLU activation")
    stored: dict[str, dict[str, Tensor]] = {name: {} for name, *_ in found}
    if alphas_from is not None:
        _read(Path(alphas_from), stored)
    for name, module, function in found:
        model.set_submodule(name, FusedActivation(module, function, stored[name]))
    return len(found)


def _read(folder: Path, modules: dict[str, dict[str, Tensor]]) -> None:
    """Fill in the stored tensors of the named modules."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = set(json.loads(index.read_text())["weight_map"].values())
    elif (folder / "model.safetensors").exists():
        files = {"model.safetensors"}
    else:
        raise FileNotFoundError(f"{folder} holds no model.safetensors and no index of several")
    for file in sorted(files):
        with safe_open(folder / file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (not a dictionary)
                module, _, name = key.rpartition(".")
                if module in modules:
                    modules[module][name] = tensors.get_tensor(key)
    for module, values in modules.items():
        for alpha in ("alpha_p", "alpha_n"):
            if alpha not in values:
                raise KeyError(f"{module}.{alpha} is not in the safetensors of {folder}")
