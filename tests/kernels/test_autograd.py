"""What becomes of the operators elsewhere in PyTorch: vmap, exporters, a reload."""

import importlib

import pytest
import torch
from torch import Tensor

from megatron_xielu import functional

BOTH = pytest.mark.parametrize("name", ["xielu", "xiprelu"])


@BOTH
def test_vmap(name: str) -> None:
    """Of a batch of models, each with its alphas, and of a batch of upstream gradients."""
    function = getattr(functional, name)
    x, alphas = torch.randn(3, 5), torch.randn(2, 3, 1).requires_grad_()
    y = torch.func.vmap(function)(x, *alphas)
    each = torch.stack([function(*one) for one in zip(x, *alphas, strict=True)])
    torch.testing.assert_close(y, each)
    dys = torch.randn(2, *y.shape)
    (batched,) = torch.autograd.grad(y, alphas, dys, is_grads_batched=True)
    for dy, gradient in zip(dys, batched, strict=True):
        (expected,) = torch.autograd.grad(each, alphas, dy, retain_graph=True)
        torch.testing.assert_close(gradient, expected)


def test_a_reload_and_the_names_of_nodes() -> None:
    """What was imported before a notebook's reload works on."""
    old = functional.xielu
    importlib.reload(functional)
    x, alpha = torch.randn(3, requires_grad=True), torch.zeros(1)
    for function in (old, functional.xielu, functional.xiprelu):
        y = function(x, alpha, alpha)
        assert y.grad_fn is not None and y.grad_fn.name() == f"{function.__name__}Backward"
        y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@BOTH
def test_exports_without_the_operator(name: str, dtype: torch.dtype) -> None:
    """As ONNX's exporter does it: by what is registered as the operator's decomposition."""

    class Model(torch.nn.Module):
        def forward(self, x: Tensor, alpha_p: Tensor, alpha_n: Tensor, bias: Tensor) -> Tensor:
            y = getattr(functional, name)(x, alpha_p, alpha_n, beta=0.3)
            return y + getattr(functional, name)(x, alpha_p, alpha_n, bias=bias)

    x = torch.linspace(-8, 8, 60).to(dtype).view(6, 10)
    inputs = (x, torch.tensor([0.2]), torch.tensor([-1.1]), torch.randn(10))
    exported = torch.export.export(
        Model(), inputs, dynamic_shapes=({0: torch.export.Dim("rows")}, None, None, None)
    )
    operator = getattr(torch.ops.megatron_xielu, name).default
    exported = exported.run_decompositions(torch._decomp.get_decompositions([operator]))
    assert "megatron_xielu" not in exported.graph_module.code
    result, expected = exported.module()(*inputs), Model()(*inputs)
    assert result.dtype == dtype
    torch.testing.assert_close(result, expected)
