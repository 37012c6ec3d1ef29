"""Which backend computes what, and what happens where one cannot."""

import logging
import os
import subprocess
import sys

import pytest
import torch
from launch import REPOSITORY
from torch._inductor.utils import fresh_inductor_cache, run_and_get_code
from transformers.activations import XIELUActivation

from megatron_xielu import functional
from megatron_xielu.kernels import choose, cpu_compiled, eager, gpu_triton

LARGE = choose._COMPILE_FROM


@pytest.fixture(autouse=True)
def not_forced(monkeypatch):
    monkeypatch.delenv(choose.VARIABLE, raising=False)
    choose._log_fallback.cache_clear()


def test_default_on_a_cpu():
    assert choose.choose(torch.zeros(LARGE)) is cpu_compiled
    assert choose.choose(torch.zeros(LARGE, dtype=torch.bfloat16)) is cpu_compiled
    assert choose.choose(torch.zeros(LARGE - 1)) is eager
    assert choose.choose(torch.zeros(LARGE, dtype=torch.float64)) is eager


def test_another_device_is_eager_and_says_so_once(caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert choose.choose(torch.zeros(LARGE, device="meta")) is eager
    assert caplog.messages == [
        "megatron_xielu: using the eager backend: there is no kernel for meta tensors"
    ]


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("cuda", torch.zeros(1), "must be triton, compiled or eager, not 'cuda'"),
        ("triton", torch.zeros(1).double(), "=triton computes in float32"),
        ("compiled", torch.zeros(1).double(), "unset it for float64"),
        ("compiled", torch.zeros(1, device="meta"), "=compiled is for CPU tensors"),
    ],
)
def test_what_cannot_be_forced(name, tensor, message, monkeypatch):
    monkeypatch.setenv(choose.VARIABLE, name)
    with pytest.raises(ValueError, match=f"^MEGATRON_XIELU_BACKEND.*{message}"):
        choose.choose(tensor)


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setenv(choose.VARIABLE, "triton")
    monkeypatch.setattr(gpu_triton, "is_interpreted", lambda: False)
    with pytest.raises(ValueError, match="set TRITON_INTERPRET=1"):
        choose.choose(torch.zeros(1))


def run_python(script: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def test_without_a_compiler_it_is_eager_and_says_so_once(tmp_path):
    output = run_python(
        f"""
import torch
from megatron_xielu import functional
from megatron_xielu.kernels import eager, choose
x, alpha = torch.randn({LARGE}), torch.zeros(1)
for _ in range(2):
    y = functional.xielu(x, alpha, alpha)
    assert torch.equal(y, eager.forward("xielu", x, alpha, alpha, 0.5, None))
""",
        CXX="/no/such/compiler",
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path),
    )
    assert output.count("using the eager backend: torch.compile does not work here") == 1


@pytest.mark.parametrize("has_bias", [False, True])
def test_compiled_loops_use_threads(has_bias):
    """Whatever the first size was: here it is that of the call which tries the compiler."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch._dynamo.reset()
    choose._compiler_works.cache_clear()
    alphas = [torch.tensor([a], requires_grad=True) for a in (0.2, -1.1)]
    x = torch.randn(LARGE // 64, 64, requires_grad=True)
    bias = torch.zeros(64, requires_grad=True) if has_bias else None

    def forward_and_backward():
        functional.xielu(x, *alphas, bias=bias).sum().backward()

    try:
        with fresh_inductor_cache():
            _, code = run_and_get_code(forward_and_backward)
    finally:
        torch.set_num_threads(threads)
    kernels = [text for text in code if 'extern "C"' in text]
    assert len(kernels) >= 2
    assert all("#pragma omp parallel" in text for text in kernels)


def test_importing_needs_no_triton():
    output = run_python(
        """
import sys
from megatron_xielu import functional
assert "megatron_xielu.kernels.gpu_triton" not in sys.modules
assert "megatron_xielu.kernels.cpu_compiled" not in sys.modules
print("imported")
"""
    )
    assert "imported" in output


@pytest.mark.parametrize("has_bias", [False, True])
def test_one_compilation_for_every_batch_size_and_rank(has_bias):
    torch._dynamo.reset()
    alphas = [torch.tensor([a], requires_grad=True) for a in (0.2, -1.1)]
    bias = torch.zeros(64, requires_grad=True) if has_bias else None

    def step(*shape):
        x = torch.randn(*shape, requires_grad=True)
        functional.xielu(x, *alphas, bias=bias).sum().backward()

    step(1024, 64)
    with torch._dynamo.config.patch(error_on_recompile=True):
        step(2048, 64)
        step(3, 512, 64)
        step(1111, 2, 64)
        with torch.no_grad():
            functional.xielu(torch.randn(4096, 64), *alphas, bias=bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_add_up(dtype, monkeypatch):
    """Several chunks and a longer last one give what one gives, to float32 accuracy."""
    monkeypatch.setenv(choose.VARIABLE, "compiled")
    torch.manual_seed(0)
    x, dy = torch.randn(2, 3001, 16).to(dtype)
    alpha_p, alpha_n = torch.tensor([0.2]), torch.tensor([-1.1])
    for bias in (None, torch.randn(16)):
        results = []
        for chunk in (2**22, 4096):
            monkeypatch.setattr(cpu_compiled, "_CHUNK", chunk)
            results.append(cpu_compiled.backward("xielu", dy, x, alpha_p, alpha_n, 0.5, bias))
        (dx, *sums), (chunked_dx, *chunked_sums) = results
        assert torch.equal(dx, chunked_dx)
        for a, b in zip(sums, chunked_sums, strict=True):
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-3)


def test_saves_one_tensor_where_a_module_of_eager_operations_saves_many():
    def saved_bytes(function) -> int:
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            function(x)
        return sum(storages.values())

    x = torch.randn(64, 256, requires_grad=True)
    peer = XIELUActivation(dtype=torch.float32)
    alphas = [torch.tensor([a], requires_grad=True) for a in (0.2, -1.1)]
    ours = saved_bytes(lambda x: functional.xielu(x, *alphas))
    assert ours == x.numel() * 4 + 2 * 4
    assert saved_bytes(peer) > 3 * ours
