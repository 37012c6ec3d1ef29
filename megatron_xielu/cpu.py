"""Megatron on a CPU: run any Megatron training script over gloo, for tests and debugging.

Megatron-core assumes CUDA in a few hundred places: it allocates with ``device="cuda"``, asks for
streams and events, compares ``param.type()`` with ``"torch.cuda.FloatTensor"``. `activate` sends
those calls to the CPU, in this process only, and refuses to where a GPU is usable unless it is
hidden first (``--cpu`` hides it). Nothing here is imported when a GPU is used.

What is redirected:

===============================  ===============================================================
``torch.cuda``, ``.accelerator`` device, stream, event, memory, nvtx, RNG and synchronisation
``Tensor/Module.cuda``, ``.to``  ``"cuda"`` means the CPU
factories (``torch.zeros``, …)   ``device="cuda"`` means the CPU; nothing is pinned
``Tensor.type()``                says ``torch.cuda.…Tensor``, which Megatron's optimizers ask for
``torch.distributed``            ``nccl`` becomes ``gloo``; ``ReduceOp.AVG`` divides, then sums
``jit_fuser`` and its warm-up    do nothing: compiling small fusions takes longer than a test
``WrappedTorchNorm``             accepts sequence parallelism and marks its weights for it
``DotProductAttention``          accepts context parallelism, by gathering keys and values
checkpoint writer                is forked, and gets a copy of the tensors
===============================  ===============================================================

What cannot run is refused by flag: Transformer Engine, FP8 and FP4, CUDA graphs, flash attention,
communication in user buffers, FSDP, NCCL extras. Numbers from here say nothing about speed.

Use from the shell, with any script of a Megatron-LM checkout::

    torchrun --nproc-per-node 2 -m megatron_xielu.cpu pretrain_gpt.py …
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import runpy
import sys
import types
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

# The flags without which Megatron picks a CUDA-only implementation.
_REQUIRED_FLAGS = [
    *("--transformer-impl", "local"),
    *("--distributed-backend", "gloo"),
    *("--num-workers", "0"),
    "--use-cpu-initialization",
    "--no-persist-layer-norm",
    "--no-gradient-accumulation-fusion",
    "--no-masked-softmax-fusion",
    "--no-bias-dropout-fusion",
    "--no-rope-fusion",
]

# flag -> the values that need a GPU (an empty set: any use of the flag does).
_REFUSED_FLAGS: dict[str, frozenset[str]] = {
    "--transformer-impl": frozenset({"transformer_engine", "inference_optimized"}),
    "--distributed-backend": frozenset({"nccl"}),
    "--attention-backend": frozenset({"flash", "fused"}),
    "--cuda-graph-impl": frozenset({"local", "transformer_engine"}),
    "--use-flash-attn": frozenset(),
    "--use-transformer-engine-op-fuser": frozenset(),
    "--fp8-format": frozenset(),
    "--fp4-format": frozenset(),
    "--enable-cuda-graph": frozenset(),
    "--tp-comm-overlap": frozenset(),
    "--moe-grouped-gemm": frozenset(),
    "--use-megatron-fsdp": frozenset(),
    "--use-torch-fsdp2": frozenset(),
    "--use-nccl-ub": frozenset(),
    "--use-precision-aware-optimizer": frozenset(),
    "--optimizer-cpu-offload": frozenset(),
    "--cpu-offloading-num-layers": frozenset(),
}

NOTICE = (
    "megatron_xielu.cpu: running Megatron on the CPU over gloo. "
    "This is for tests and debugging: speed and memory figures of this run mean nothing."
)

_active = False


def add_cpu_flags(argv: Sequence[str]) -> list[str]:
    """Return Megatron arguments for a CPU run: the flags it needs, then ``argv``.

    Args:
        argv: arguments as the user gave them, without the program's name.

    Raises:
        SystemExit: a flag that needs a GPU is in ``argv``; the message names it.
    """
    for position, word in enumerate(argv):
        flag, _, value = word.partition("=")
        if flag not in _REFUSED_FLAGS:
            continue
        if not value and position + 1 < len(argv):
            value = argv[position + 1]
        if not _REFUSED_FLAGS[flag] or value in _REFUSED_FLAGS[flag]:
            shown = f"{flag} {value}" if _REFUSED_FLAGS[flag] else flag
            raise SystemExit(f"megatron_xielu.cpu: {shown} needs a GPU; drop it for a CPU run")
    return [*_REQUIRED_FLAGS, *argv]


def hide_gpus() -> None:
    """Make this process see no GPU. Call before CUDA is initialised."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def activate() -> None:
    """Redirect the CUDA calls that Megatron makes to the CPU, for the rest of this process.

    Idempotent. Call it before anything of ``megatron`` is imported: Megatron reads ``torch.cuda``
    types and binds its fusion decorator at import.

    Raises:
        RuntimeError: a GPU is visible, or Megatron was imported before.
    """
    global _active
    if _active:
        return
    import torch

    if torch.cuda.is_available():
        raise RuntimeError(
            "megatron_xielu.cpu: a GPU is visible; run without --cpu, or set CUDA_VISIBLE_DEVICES="
        )
    if "megatron.core" in sys.modules:
        raise RuntimeError("megatron_xielu.cpu: call activate() before importing megatron.core")
    import torch._dynamo  # inspects torch.cuda at import, so before anything is redirected

    # Megatron insists on it for tensor parallelism; on a CPU it has no effect.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # As `jit_fuser` below: compiling takes longer than a test, and torch.compile does not know its
    # way around the redirections.
    os.environ.setdefault("MEGATRON_XIELU_BACKEND", "eager")
    _redirect_cuda_module(torch)
    _keep_random_numbers(torch)
    _redirect_tensors(torch)
    _redirect_distributed(torch)
    _redirect_megatron(torch)
    _active = True
    if os.environ.get("RANK", "0") == "0":
        print(f"\n{'=' * 100}\n{NOTICE}\n{'=' * 100}\n", file=sys.stderr, flush=True)


# --- torch.cuda ---------------------------------------------------------------------------------


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
    """An event that has always happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Any) -> float:
        return 0.0


def _redirect_cuda_module(torch: Any) -> None:
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
        "get_device_capability": constant((0, 0)),
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


def _keep_random_numbers(torch: Any) -> None:
    """Data loaders draw seeds from the CPU's generator, which here is the GPU's of dropout as well:
    a run that resumes makes them after it has loaded the generator's state."""
    iterate = torch.utils.data.DataLoader.__iter__

    @functools.wraps(iterate)
    def wrapper(self: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            return iterate(self)

    torch.utils.data.DataLoader.__iter__ = wrapper


# --- tensors and modules ------------------------------------------------------------------------


def _is_cuda(device: Any) -> bool:
    return getattr(device, "type", device) == "cuda" or str(device).startswith("cuda")


_FACTORIES = (
    *("tensor", "as_tensor", "empty", "empty_strided", "zeros", "ones", "full", "eye"),
    *("arange", "linspace", "rand", "randn", "randint", "randperm"),
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"),
)


def _redirect_tensors(torch: Any) -> None:
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


# --- torch.distributed --------------------------------------------------------------------------


def _redirect_distributed(torch: Any) -> None:
    dist = torch.distributed

    def with_gloo(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if "nccl" in str(kwargs.get("backend")):
                kwargs["backend"] = "gloo"
            for name in ("device_id", "pg_options"):
                kwargs.pop(name, None)
            return function(*args, **kwargs)

        return wrapper

    dist.init_process_group = with_gloo(dist.init_process_group)
    dist.new_group = with_gloo(dist.new_group)

    barrier = dist.barrier

    @functools.wraps(barrier)
    def barrier_without_device(
        group: Any = None, async_op: bool = False, device_ids: Any = None
    ) -> Any:
        return barrier(group=group, async_op=async_op)

    dist.barrier = barrier_without_device

    def with_average(function: Callable[..., Any], source: int) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("op") == dist.ReduceOp.AVG:
                # Before the call: inside a coalescing manager it only records the operation.
                args[source].div_(dist.get_world_size(kwargs.get("group")))
                kwargs["op"] = dist.ReduceOp.SUM
            return function(*args, **kwargs)

        return wrapper

    coalescing_manager = dist._coalescing_manager

    @contextlib.contextmanager
    def coalesce_by_dtype(group: Any = None, device: Any = None, async_ops: bool = False) -> Any:
        # Of tensors of several types, gloo takes all to be of the first one's.
        c10d = dist.distributed_c10d
        group = group or c10d._get_default_group()
        recording = c10d._world.pg_coalesce_state
        recording[group] = []
        manager = c10d._CoalescingManager()
        yield manager
        operations = recording.pop(group)
        for dtype in dict.fromkeys(operation.tensor.dtype for operation in operations):
            with coalescing_manager(group, async_ops=async_ops) as of_one_type:
                recording[group] += [o for o in operations if o.tensor.dtype == dtype]
            for work in of_one_type.works:
                manager.append(work)

    dist._coalescing_manager = coalesce_by_dtype

    dist.all_reduce = with_average(dist.all_reduce, source=0)
    dist.reduce_scatter_tensor = with_average(dist.reduce_scatter_tensor, source=1)

    from megatron_xielu import cpu_expert_parallel

    cpu_expert_parallel.redirect()


# --- Megatron -----------------------------------------------------------------------------------


def _redirect_megatron(torch: Any) -> None:
    torch_compile = torch.compile
    torch.compile = lambda model=None, **kwargs: model if model is not None else (lambda f: f)
    try:
        import megatron.core.jit  # noqa: F401  (binds jit_fuser to torch.compile at import)
    finally:
        torch.compile = torch_compile

    from megatron.core.models import backends
    from megatron.core.transformer import torch_norm

    from megatron_xielu.cpu_context_parallel import ContextParallelAttention
    from megatron_xielu.workarounds import megatron_wheel

    megatron_wheel.prepare()
    backends.DotProductAttention = ContextParallelAttention
    torch_norm.WrappedTorchNorm.__new__ = _norm_for_sequence_parallel(
        torch_norm.WrappedTorchNorm.__new__
    )
    _redirect_checkpoint_writer()
    # Nothing is compiled here, so nothing needs a warm-up; and its dropouts would take random
    # numbers from the generator of the initial weights, as many as the parallel layout asks for.
    from megatron.training import initialize

    initialize._warmup_jit_function = lambda **kwargs: None
    # Here the "GPU" random state is the CPU's, so this warning would follow every dropout.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


def _redirect_checkpoint_writer() -> None:
    """Let ``--async-save --use-persistent-ckpt-worker --async-strategy mcore`` work."""
    from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async

    caller, writer = async_utils.PersistentAsyncCaller, filesystem_async.FileSystemWriterAsync
    start, preload = caller._get_process, writer.preload_tensors

    # A fresh process would lack the redirections; a forked one has them.
    @functools.wraps(start)
    def fork(rank: int, mp_mode: str = "fork", *args: Any, **kwargs: Any) -> Any:
        return start(rank, "fork", *args, **kwargs)

    # What comes from a GPU is a copy. From here the writer would get the memory of the parameters,
    # and write what training has made of them meanwhile.
    @functools.wraps(preload)
    def copy(buckets: Any, non_blocking: bool = True) -> Any:
        return [
            (name, key, (blobs, [(item, tensor.clone()) for item, tensor in tensors]))
            for name, key, (blobs, tensors) in preload(buckets, non_blocking)
        ]

    caller._get_process = fork
    writer.preload_tensors = staticmethod(copy)


def _norm_for_sequence_parallel(build: Callable[..., Any]) -> Callable[..., Any]:
    """Let the torch norm be built under sequence parallelism, with its weights marked for it."""

    @functools.wraps(build)
    def wrapper(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        with _set(config, "sequence_parallel", False) as sequence_parallel:
            norm = build(cls, config, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = sequence_parallel
        return norm

    return wrapper


@contextlib.contextmanager
def _set(owner: Any, name: str, value: Any):
    """Set an attribute for the length of a block; yields what it was."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield before
    finally:
        setattr(owner, name, before)


def main() -> None:
    """Run the script named on the command line with the redirections and CPU flags in place."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        raise SystemExit("usage: python -m megatron_xielu.cpu SCRIPT.py [MEGATRON ARGUMENTS …]")
    script = Path(sys.argv[1])
    if not script.is_file():
        raise SystemExit(f"megatron_xielu.cpu: no such script: {script}")
    sys.argv = [str(script), *add_cpu_flags(sys.argv[2:])]
    # As for `python SCRIPT.py`: a Megatron-LM checkout beside the script is the one to import.
    sys.path.insert(0, str(script.resolve().parent))
    hide_gpus()
    activate()
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
