"""A container's health check: does this package compute the right numbers here?

``python3 -m megatron_xielu.selftest``, or, to check tensor parallelism too, one process a GPU::

    torchrun --nproc-per-node 2 -m megatron_xielu.selftest

One line a check, with its result and seconds; exit code 1 if one failed, naming it. Needs no GPU,
compiler, network or writable home, and leaves no files: what cannot run here is skipped, with the
reason. Every result is judged against `reference`, in float64:

    y, dx       0.51 units in the last place + 2^-22 of the largest term of the formula
    alphas      1e-6 of the sum of magnitudes, + 0.51 units in the last place

which is what float32 arithmetic and one rounding leave. `check_alpha_sync` is used by
`megatron_xielu.cluster.preflight` across nodes.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_xielu.catalog import DEFAULT_BETA as BETA
from megatron_xielu.catalog import TRAINABLE
from megatron_xielu.common import text, torchrun

if TYPE_CHECKING:  # imported by a check, so that a broken PyTorch or Megatron is reported by name
    import torch
    from torch import Tensor
    from torch.distributed import ProcessGroup

# Raw alphas of both signs of softplus's bend, and as large as training makes them (activations.py).
RAW_ALPHAS = ((0.2, -0.3), (41.0, 1.1))
_ARITHMETIC_EPS = 2.0**-22
_COLUMNS = 96  # of a rank


class Skipped(Exception):
    """What a check needs is not here, and need not be."""


# --- the activations against the oracle -----------------------------------------------------------


def check_activation(name: str, dtype: torch.dtype, backend: str, device: str) -> str:
    """Forward and backward of one activation on one backend, against float64.

    Args:
        name: ``xielu`` or ``xiprelu``.
        dtype: of x and dy; alphas are float32, as in a model.
        backend: ``triton``, ``compiled`` or ``eager``.
        device: ``cpu`` or ``cuda``.

    Returns:
        The largest error found, as a share of what is allowed.

    Raises:
        AssertionError: a result is not within its bound.
    """
    import torch

    from megatron_xielu import functional
    from megatron_xielu.kernels import reference

    generator = torch.Generator().manual_seed(1)
    grid = torch.linspace(-12, 12, 3001)
    tiny = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e-6, -1e-6, -1.0, -0.5, -60.0, 20.0])
    x = torch.cat((grid, tiny, torch.randn(1085, generator=generator))).reshape(64, 64)
    # Of mean 1: alpha gradients that cancel would hide an error in them.
    dy = 1.0 + torch.randn(x.shape, generator=generator)
    x, dy = (t.to(device=device, dtype=dtype) for t in (x, dy))
    worst = 0.0
    for raw_p, raw_n in RAW_ALPHAS:
        alphas = [torch.tensor([raw], device=device) for raw in (raw_p, raw_n)]
        inputs = [t.clone().requires_grad_() for t in (x, *alphas)]
        with _backend(backend):
            y = getattr(functional, name)(*inputs, beta=BETA)
            dx, *d_alphas = torch.autograd.grad(y, inputs, dy)
        backward = getattr(reference, f"{name}_backward")
        exact_dx, *exact_alphas = backward(dy, x, *alphas, beta=BETA)
        exact_y = getattr(reference, name)(x, *alphas, beta=BETA)
        term, slope = _largest_terms(name, x, *alphas)
        shares = {
            "y": _share(y.detach(), exact_y, term),
            "dx": _share(dx, exact_dx, 2.0 * dy.double().abs() * slope),
        }
        magnitudes = backward(dy.abs(), x, *alphas, beta=BETA)[1:]
        for alpha, got, exact, magnitude in zip(
            ("alpha_p", "alpha_n"), d_alphas, exact_alphas, magnitudes, strict=True
        ):
            shares[f"d{alpha}"] = _share(got, exact, 1e-6 / _ARITHMETIC_EPS * magnitude)
        for what, share in shares.items():
            if not share <= 1.0:  # also for NaN
                raise AssertionError(
                    f"{what} is off by {share:.3g} times what rounding explains "
                    f"(alphas {raw_p}, {raw_n})"
                )
        worst = max(worst, *shares.values())
    return f"{worst:.2f} of the allowed error"


def _share(got: Tensor, exact: Tensor, term: Tensor) -> float:
    """Largest ``|got - exact| / bound``; NaN if there is one anywhere."""
    import torch

    info = torch.finfo(got.dtype)
    exponent = torch.frexp(exact.abs().clamp_min(info.smallest_normal)).exponent - 1
    ulp = torch.ldexp(torch.full_like(exact, info.eps), exponent)
    eps = 2.0**-50 if got.dtype == torch.float64 else _ARITHMETIC_EPS
    return float(((got.double() - exact).abs() / (0.51 * ulp + eps * term)).max())


def _largest_terms(name: str, x: Tensor, alpha_p: Tensor, alpha_n: Tensor) -> tuple[Tensor, Tensor]:
    """Largest term of the formula and, twice over, of its slope, for each x."""
    import torch

    from megatron_xielu.kernels import reference

    x = x.double()
    pos, neg = x.clamp_min(0.0), -x.clamp_max(0.0)
    soft_p, soft_n = reference.softplus(alpha_p), reference.softplus(alpha_n)
    if name == "xielu":
        term_n, slope_n = (soft_n + BETA) * neg, (soft_n + BETA) * -torch.expm1(-neg)
    else:
        term_n, slope_n = soft_n * neg * neg, 2.0 * soft_n * neg
    term = torch.stack((soft_p * pos * pos, BETA * x.abs(), term_n)).amax(0)
    return term, 2.0 * soft_p * pos + slope_n + BETA


@contextlib.contextmanager
def _backend(name: str) -> Iterator[None]:
    """Have `choose` choose this one."""
    from megatron_xielu.kernels import choose

    before = os.environ.get(choose.VARIABLE)
    os.environ[choose.VARIABLE] = name
    try:
        yield
    finally:
        del os.environ[choose.VARIABLE]
        if before is not None:
            os.environ[choose.VARIABLE] = before


def check_compiled(name: str, dtype: torch.dtype) -> str:
    """`check_activation` on the compiled backend, where this machine can compile.

    Raises:
        AssertionError: a result is not within its bound.
        Skipped: there is no compiler, or it does not work; training uses the eager backend then.
    """
    compiler = os.environ.get("CXX", "").split() or ["g++", "clang++", "c++"]
    if not any(shutil.which(word) for word in compiler):
        raise Skipped("no C++ compiler; the eager backend is used")
    try:
        return check_activation(name, dtype, "compiled", "cpu")
    except AssertionError:
        raise
    except Exception as error:
        raise Skipped(f"torch.compile does not work here: {text.describe(error)}") from error


def check_triton(name: str, dtype: torch.dtype) -> str:
    """`check_activation` on the GPU's kernels.

    Raises:
        AssertionError: a result is not within its bound.
        Skipped: there is no GPU, or no Triton.
    """
    import torch

    if not torch.cuda.is_available():
        raise Skipped("no GPU")
    if importlib.util.find_spec("triton") is None:
        raise Skipped("the package triton is not installed; the eager backend is used")
    return check_activation(name, dtype, "triton", "cuda")


# --- imports ------------------------------------------------------------------------------------


def check_torch() -> str:
    """PyTorch can be imported, and a visible GPU be used."""
    import torch

    if not torch.cuda.is_available():
        return f"{torch.__version__}, no GPU"
    torch.cuda.set_device(_local_rank() % torch.cuda.device_count())
    torch.ones(1, device="cuda").item()
    return f"{torch.__version__}, {torch.cuda.get_device_name()}"


def check_megatron() -> str:
    """Megatron-core can be imported, and this package's modules on top of it."""
    from importlib.metadata import PackageNotFoundError, version

    import megatron.core

    from megatron_xielu import layer_specs  # noqa: F401

    try:
        return version("megatron-core")
    except PackageNotFoundError:  # a checkout on the path
        return str(megatron.core.__version__)


def check_helpers() -> str:
    """Megatron's C++ helpers, which build the index of the training samples.

    Raises:
        Skipped: a checkout in which they are still to be built, as Megatron does at its start.
    """
    from megatron.core.datasets import utils

    try:
        importlib.import_module("megatron.core.datasets.helpers_cpp")
    except ModuleNotFoundError:
        if (Path(utils.__file__).parent / "Makefile").exists():
            raise Skipped(
                "not built; Megatron builds it when training starts, with make and a C++ compiler"
            ) from None
        raise
    return ""


# --- tensor parallelism ---------------------------------------------------------------------------


def check_alpha_sync(group: ProcessGroup, device: torch.device | str) -> str:
    """The alphas of a `MegatronXIELU` split over ``group``, against the unsplit one in float64.

    Every rank applies the module to its slice of the columns. The alpha gradients must be the whole
    sums on every rank, and the alphas the same bits after an optimizer step. Collective: call it on
    all ranks of the group.

    Args:
        group: a tensor-parallel group.
        device: where this rank computes; of the group's backend.

    Returns:
        The largest error of a gradient, relative.

    Raises:
        AssertionError: a gradient is not the sum, or alphas differ; says which.
    """
    import torch

    from megatron_xielu.features.tp_sync import gather_alphas
    from megatron_xielu.kernels import reference
    from megatron_xielu.megatron_activations import MegatronXIELU

    rank, size = group.rank(), group.size()
    generator = torch.Generator().manual_seed(2)
    x = 3.0 * torch.randn(16, _COLUMNS * size, generator=generator)  # [rows, all columns]
    # Positive: nothing cancels in the sums, so their error is relative to the result.
    dy = torch.rand(x.shape, generator=generator) + 0.5
    module = MegatronXIELU(tp_group=group).to(device)
    alphas = (module.alpha_p, module.alpha_n)
    exact = reference.xielu_backward(dy, x, *(a.detach().cpu() for a in alphas), beta=BETA)[1:]
    mine = slice(rank * _COLUMNS, (rank + 1) * _COLUMNS)
    module(x[:, mine].to(device)).backward(dy[:, mine].to(device))
    gradients = [alpha.grad for alpha in alphas if alpha.grad is not None]
    errors = [
        abs(float(got) / float(whole) - 1.0) for got, whole in zip(gradients, exact, strict=True)
    ]
    torch.optim.Adam(module.parameters(), lr=1e-2).step()

    # Compared after the collective, so that no rank is left waiting in it by a failure of another.
    values, differs = gather_alphas([module], group)
    for name, error in zip(("alpha_p", "alpha_n"), errors, strict=True):
        assert error <= 2e-6, (
            f"the gradient of {name} is off by {error:.3g}: not the sum of all ranks"
        )
    assert not any(differs), f"alphas differ after a step: {values.tolist()}"
    return f"{size} ranks, gradient within {max(errors):.1e}, alphas bitwise equal"


# --- running them -------------------------------------------------------------------------------


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


class _Report:
    """Runs checks and prints a line for each; on ranks above 0 only for those that fail."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.failed: list[str] = []

    def run(self, name: str, check: Callable[[], str]) -> bool:
        """Run one check; whether it did not fail."""
        start = time.perf_counter()
        try:
            result, detail = "ok", check()
        except Skipped as reason:
            result, detail = "skipped", str(reason)
        except Exception as error:
            result, detail = "FAIL", text.describe(error)
            self.failed.append(name)
        seconds = time.perf_counter() - start
        if result == "FAIL" or self.rank == 0:
            where = f"rank {self.rank}: " if self.rank else ""
            shown = f"{result}: {detail}" if detail else result
            # One write: ranks share the terminal, and print() may write the line end apart.
            print(f"{where}{name:<26} {shown} [{seconds:.2f} s]\n", end="", flush=True)
        return result != "FAIL"


def _check_all(report: _Report) -> None:
    if not report.run("torch", check_torch):
        return
    import torch

    has_megatron = report.run("megatron.core", check_megatron)
    if has_megatron:
        report.run("megatron helpers_cpp", check_helpers)

    for name in TRAINABLE:
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            report.run(
                f"eager {name} {str(dtype)[6:]}",
                lambda n=name, d=dtype: check_activation(n, d, "eager", "cpu"),  # type: ignore[misc]
            )
    if _local_rank() == 0:
        # A compilation takes seconds, so not every pair; test_functional.py has them all.
        report.run("compiled xielu float32", lambda: check_compiled("xielu", torch.float32))
    for name in TRAINABLE:
        for dtype in (torch.float32, torch.bfloat16):
            report.run(
                f"triton {name} {str(dtype)[6:]}",
                lambda n=name, d=dtype: check_triton(n, d),  # type: ignore[misc]
            )
    if "RANK" in os.environ and has_megatron:
        report.run("alphas over ranks", _check_alpha_sync_of_all)


def _check_alpha_sync_of_all() -> str:
    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available()
    # The others wait while rank 0 compiles, on a busy machine for more than a minute.
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(minutes=5))
    try:
        assert dist.group.WORLD is not None
        return check_alpha_sync(dist.group.WORLD, "cuda" if on_gpu else "cpu")
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _temporary_caches() -> Iterator[None]:
    """Have compilers write where it is removed again; where nothing is writable, they say so."""
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        except OSError:
            yield
            return
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/inductor"
        os.environ["TRITON_CACHE_DIR"] = f"{folder}/triton"
        yield


def main() -> int:
    """Run every check; the exit code."""
    argparse.ArgumentParser(
        prog="python3 -m megatron_xielu.selftest",
        description="Check that this package computes the right numbers here.",
        epilog="With several ranks: torchrun --nproc-per-node N -m megatron_xielu.selftest",
    ).parse_args()
    try:
        torchrun.check(os.environ)
    except ValueError as error:
        raise SystemExit(f"selftest: error: {error}") from None
    warnings.simplefilter("ignore")
    # Compiler workers would take longer to start than there is to compile.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    report = _Report()
    start = time.perf_counter()
    with _temporary_caches():
        _check_all(report)
    seconds = time.perf_counter() - start
    if report.failed:
        print(
            f"selftest: FAIL in {seconds:.1f} s: {', '.join(report.failed)}\n", end="", flush=True
        )
    elif report.rank == 0:
        print(f"selftest: ok in {seconds:.1f} s", flush=True)
    return 1 if report.failed else 0


if __name__ == "__main__":
    text.ready_output()
    sys.exit(main())
