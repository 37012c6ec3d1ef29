"""The Triton kernels beyond `test_functional`: large tensors, and the code they are compiled to.

Without a GPU the kernels run in Triton's interpreter, and are compiled for one all the same.
`test_gpu` has what only a GPU can show.
"""

import os
import subprocess
import sys

import pytest
import torch
from interpreter import like_hardware
from launch import REPOSITORY
from triton.runtime.interpreter import GridExecutor

from megatron_xielu.kernels import gpu_triton, grouped_triton, reference

HAS_GPU = torch.cuda.is_available()
ALPHAS = (0.2, -1.1)


@pytest.mark.gpu
@pytest.mark.parametrize("is_beyond", [True, False])
@pytest.mark.parametrize("name", ["xielu", "xiprelu"])
def test_offsets_beyond_31_bits(name, is_beyond, monkeypatch):
    """One program walks two rows that are 2^31 elements apart, in memory that nothing else
    touches: it is reserved, but only the pages of those rows are ever filled. Or two that are not
    quite so far apart, of which the next would be beyond: numel and cols fit 32 bits then."""
    # The interpreter would copy every argument back to where it already is.
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *args: None)
    device = "cuda" if HAS_GPU else "cpu"
    block = gpu_triton.BLOCK
    far = 2**31 if is_beyond else 2**31 - 2 * block
    cols, row_programs = (far, 1) if is_beyond else (block, far // block)
    used = 1000  # less than a block: the last row is ragged
    alpha_p, alpha_n = (torch.tensor([a], device=device) for a in ALPHAS)
    x, dy, y, dx = (torch.empty(far + used, dtype=torch.bfloat16, device=device) for _ in range(4))
    starts = ((0, block), (far, used))
    for start, count in starts:
        x[start : start + count] = torch.randn(count, device=device)
        dy[start : start + count] = torch.randn(count, device=device)
        y[start : start + count] = dx[start : start + count] = float("nan")
    sums = torch.empty(2, 1, device=device)
    layout = {"numel": far + used, "cols": cols, "row_programs": row_programs, "beta": 0.5}
    constants = {"NAME": name, "HAS_BIAS": False, "BLOCK": block}
    with like_hardware():
        gpu_triton._forward_kernel[(1,)](
            x_ptr=x,
            bias_ptr=None,
            alpha_p_ptr=alpha_p,
            alpha_n_ptr=alpha_n,
            y_ptr=y,
            **layout,
            **constants,
        )
        gpu_triton._backward_kernel[(1,)](
            dy_ptr=dy,
            x_ptr=x,
            bias_ptr=None,
            alpha_p_ptr=alpha_p,
            alpha_n_ptr=alpha_n,
            dx_ptr=dx,
            alpha_sums_ptr=sums,
            bias_sums_ptr=None,
            **layout,
            **constants,
        )
    near_and_far = [torch.cat([t[start : start + n] for start, n in starts]) for t in (x, dy)]
    got_y, got_dx = (torch.cat([t[start : start + n] for start, n in starts]) for t in (y, dx))
    exact_y = getattr(reference, name)(near_and_far[0], alpha_p, alpha_n)
    exact_dx = getattr(reference, f"{name}_backward")(
        near_and_far[1], near_and_far[0], alpha_p, alpha_n
    )[0]
    torch.testing.assert_close(got_y.double(), exact_y, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(got_dx.double(), exact_dx, rtol=2**-8, atol=1e-6)
    if HAS_GPU:  # 16 GiB that the tests beside it may need
        del x, dy, y, dx
        torch.cuda.empty_cache()


@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_programs_cover_every_row_and_column_once(multiprocessors, monkeypatch):
    monkeypatch.setattr(gpu_triton, "_multiprocessors", lambda device: multiprocessors)
    block, programs = gpu_triton.BLOCK, {False: 8, True: 6}
    for rows, cols in ((1, 1), (3, block), (1000, 1500), (7, 200 * block), (8192, 9216)):
        x = torch.empty(rows, cols, device="meta")
        layout = gpu_triton._Layout(x, torch.empty(cols, device="meta"), programs)
        col_blocks = -(-cols // block)
        assert layout.programs == col_blocks * layout.row_programs
        assert 1 <= layout.row_programs <= rows
        assert layout.programs <= max(6 * multiprocessors, col_blocks)
        flat = gpu_triton._Layout(x, None, programs)
        assert (flat.cols, flat.numel) == (block, rows * cols)
        assert flat.programs == min(8 * multiprocessors, -(-rows * cols // block))


@pytest.fixture(scope="module")
def compiled_code():
    """The table of tools/bench/inspect_kernels.py: a list of cells for each kernel."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, REPOSITORY / "tools/bench/inspect_kernels.py"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_compiled_code_is_the_one_in_the_docs(compiled_code):
    documented = (REPOSITORY / "docs" / "benchmarks" / "sm90-code.md").read_text()
    version = documented.split("Triton ")[1].split(",")[0]
    if f"Triton {version}," in compiled_code:
        assert compiled_code == documented


def tables(compiled_code: str) -> list[list[list[str]]]:
    """The cells of each table, without its heading."""
    return [
        [line.strip("| ").split(" | ") for line in part.splitlines() if "|" in line][2:]
        for part in compiled_code.split("## Rows of experts")
    ]


def test_compiled_code_is_limited_by_memory(compiled_code):
    dense, grouped = tables(compiled_code)
    assert len(dense) == len(grouped) == 2 * 2 * 3 * 2
    for module, rows in ((gpu_triton, dense), (grouped_triton, grouped)):
        for kernel, _, _, has_extra, _, fit, spilled, access, _, *shares in rows:
            assert spilled == "0"
            assert access == "16"
            programs = {
                "forward": module.FORWARD_PROGRAMS,
                "backward": module.BACKWARD_PROGRAMS,
            }[kernel]
            assert programs[has_extra == "yes"] <= int(fit)
            limit = 1.0 if (module, has_extra) == (grouped_triton, "yes") else 0.9
            assert all(float(share) < limit for share in shares[:2])


def test_rows_of_experts_take_no_more_instructions(compiled_code):
    """Without weights at most 1.1 times those of the kernel for one pair of alphas."""
    ratios = [float(row[-1]) for row in tables(compiled_code)[1] if row[3] == "no"]
    assert len(ratios) == 2 * 2 * 3
    assert max(ratios) <= 1.10


def test_every_specialisation_compiles():
    """What Triton makes of sizes of 1 and above 2^31, and of a missing bias."""
    script = """
import inspect_kernels
for has_bias in (False, True):
    for constants in ({}, {"cols": 1}, {"cols": 1, "numel": 1}):
        for kernel in ("_forward_kernel", "_backward_kernel", "_finish_kernel"):
            for numel_type in ("i32", "i64"):
                function = getattr(inspect_kernels.gpu_triton, kernel)
                inspect_kernels.compile_for_sm90(
                    function, "xielu", "bf16", has_bias, numel_type=numel_type, **constants
                )
    for constants in ({}, {"cols": 1}):
        for kernel in ("_forward_kernel", "_backward_kernel", "_finish_kernel"):
            for experts in (1, 256):
                function = getattr(inspect_kernels.grouped_triton, kernel)
                inspect_kernels.compile_for_sm90(
                    function, "xielu", "bf16", has_bias, EXPERTS=experts, **constants
                )
print("all compiled")
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**environment, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tools/bench'}"},
    )
    assert result.stdout == "all compiled\n", result.stderr
