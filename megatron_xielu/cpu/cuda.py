"""``torch.cuda``, tensors and modules in a process without a GPU: ``"cuda"`` means the CPU."""

# mypy: disable-error-code="assignment, method-assign"

from __future__ import annotations

import functools
import os
import time
import types
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch


def redirect() -> None:
    """Send what Megatron asks of a GPU to the CPU, for the rest of this process."""
    _redirect_cuda_module()
    _keep_random_numbers()
    _redirect_tensors()


class _Stream:
    """A stream that is always idle: CPU operations are done when they return."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def synchronize(self) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return False


class _Event:
    """An event that has happened when it is recorded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._seconds = 0.0

    def record(self, stream: Any = None) -> None:
        self._seconds = time.perf_counter()

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: _Event) -> float:
        return (end._seconds - self._seconds) * 1000


def _redirect_cuda_module() -> None:
    cuda, cpu = torch.cuda, torch.device("cpu")
    stream = _Stream()

    def nothing(*args: Any, **kwargs: Any) -> None: ...

    def constant(value: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: value

    def get_rng_state(device: Any = None) -> Any:
        return torch.default_generator.get_state()

    def set_rng_state(state: Any, device: Any = None) -> None:
        torch.default_generator.set_state(state)

    def manual_seed(seed: int) -> None:
        torch.default_generator.manual_seed(int(seed))

    replacements = {
        "is_available": constant(True),
        "is_initialized": constant(True),
        "is_bf16_supported": constant(True),
        "_lazy_init": nothing,
        "_lazy_call": lambda call, **kwargs: call(),
        "device_count": constant(int(os.environ.get("LOCAL_WORLD_SIZE", "1"))),
        "current_device": constant(cpu),
        "set_device": nothing,
        "device": constant(nullcontext()),
        "synchronize": nothing,
        "empty_cache": nothing,
        "Stream": _Stream,
        "Event": _Event,
        "stream": constant(nullcontext()),
        "current_stream": constant(stream),
        "default_stream": constant(stream),
        "set_stream": nothing,
        "is_current_stream_capturing": constant(False),
        "get_device_name": constant("cpu"),
        "get_device_capability": constant((8, 0)),  # what --moe-grouped-gemm asks for
        "get_device_properties": constant(
            types.SimpleNamespace(
                name="cpu", major=0, minor=0, multi_processor_count=1, total_memory=0
            )
        ),
        "manual_seed": manual_seed,
        "manual_seed_all": manual_seed,
        "get_rng_state": get_rng_state,
        "set_rng_state": set_rng_state,
        "default_generators": defaultdict(lambda: torch.default_generator),
        "memory_allocated": constant(0),
        "max_memory_allocated": constant(0),
        "memory_reserved": constant(0),
        "max_memory_reserved": constant(0),
        "memory_stats": constant(defaultdict(int)),
        "device_memory_used": constant(0),
        "reset_peak_memory_stats": nothing,
        "HalfTensor": torch.HalfTensor,
        "BFloat16Tensor": torch.BFloat16Tensor,
        "FloatTensor": torch.FloatTensor,
        "DoubleTensor": torch.DoubleTensor,
        "LongTensor": torch.LongTensor,
        "IntTensor": torch.IntTensor,
        "ByteTensor": torch.ByteTensor,
    }
    for name, value in replacements.items():
        setattr(cuda, name, value)
    cuda.random.get_rng_state = get_rng_state
    cuda.random.set_rng_state = set_rng_state
    cuda.nvtx.range_push = cuda.nvtx.range_pop = nothing
    cuda.nvtx.range = constant(nullcontext())
    # torch.optim and the data loader ask here; told of no accelerator, they use their CPU paths.
    torch.accelerator.is_available = constant(False)
    torch.accelerator.current_accelerator = constant(None)
    torch.accelerator.current_stream = constant(stream)


def _keep_random_numbers() -> None:
    """Data loaders draw seeds from the CPU's generator, which here is the GPU's of dropout as well:
    a run that resumes makes them after it has loaded the generator's state."""
    iterate = torch.utils.data.DataLoader.__iter__

    @functools.wraps(iterate)
    def wrapper(self: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            return iterate(self)

    torch.utils.data.DataLoader.__iter__ = wrapper


def _is_cuda(device: Any) -> bool:
    return getattr(device, "type", device) == "cuda" or str(device).startswith("cuda")


_FACTORIES = (
    *("tensor", "as_tensor", "empty", "empty_strided", "zeros", "ones", "full", "eye"),
    *("arange", "linspace", "rand", "randn", "randint", "randperm"),
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"),
)


def _redirect_tensors() -> None:
    cpu = torch.device("cpu")

    def with_cpu_device(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if "device" in kwargs and _is_cuda(kwargs["device"]):
                kwargs["device"] = cpu
            kwargs.pop("pin_memory", None)  # pinning memory takes a CUDA driver
            return function(*args, **kwargs)

        return wrapper

    for name in _FACTORIES:
        setattr(torch, name, with_cpu_device(getattr(torch, name)))
    for name in ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"):
        setattr(torch.Tensor, name, with_cpu_device(getattr(torch.Tensor, name)))
    to_empty = with_cpu_device(torch.nn.Module.to_empty)
    torch.nn.Module.to_empty = to_empty

    def with_cpu_target(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            args = tuple(
                cpu if isinstance(arg, str | torch.device) and _is_cuda(arg) else arg
                for arg in args
            )
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = cpu
            return function(self, *args, **kwargs)

        return wrapper

    torch.Tensor.to = with_cpu_target(torch.Tensor.to)
    torch.nn.Module.to = with_cpu_target(torch.nn.Module.to)

    def unchanged(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self

    torch.Tensor.cuda = torch.nn.Module.cuda = torch.Tensor.pin_memory = unchanged

    tensor_type = torch.Tensor.type

    @functools.wraps(tensor_type)
    def cuda_type(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = tensor_type(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.") if isinstance(result, str) else result

    torch.Tensor.type = cuda_type
