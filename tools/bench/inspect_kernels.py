"""Compiles the Triton kernels for an H100 (sm_90), without one, and tells what came out.

    python tools/bench/inspect_kernels.py [--output docs/benchmarks/sm90-code.md]

For each kernel: registers of a thread, programs that a multiprocessor's registers hold, bytes
spilled, bytes of its widest and narrowest access to the tensors, and the machine instructions of
the main loop for each element. The last is what decides whether memory or the instruction units are
the limit. An H100 issues 128 a cycle on each of 132 multiprocessors, so that while one element
moves to and from memory it can issue

    132 * 128 * clock / (bandwidth / bytes an element)

instructions; the table gives the share of that which the kernel needs, at the copy bandwidth of an
H100 (3.0 TB/s) and an H200 (4.3 TB/s) and 1.7 GHz, which both hold under such a load.

In the kernels for rows of experts the main loop is inside of two others: over the experts, and with
weights over rows. What the loop over rows adds is counted, divided by the elements of a row of
GROUPED_COLS columns; what the loop over experts adds is not.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import triton
from triton.backends.compiler import GPUTarget

from megatron_xielu.common import files
from megatron_xielu.common.flags import output_file
from megatron_xielu.common.text import ready_output
from megatron_xielu.kernels import gpu_triton, grouped_triton

MULTIPROCESSORS, LANES, CLOCK = 132, 128, 1.7e9
BANDWIDTHS = {"H100": 3.0e12, "H200": 4.3e12}
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
# What instructions are counted for, and compiled for, in the kernels for rows of experts.
GROUPED_COLS, EXPERTS = 2048, 64
TENSORS = {"_forward_kernel": ("x_ptr", "y_ptr"), "_backward_kernel": ("x_ptr", "dy_ptr", "dx_ptr")}


_HEADING = """\
# What the kernels compile to for sm_90

Triton {version}, without a GPU: `python tools/bench/inspect_kernels.py --output FILE`. Nothing here
was timed. Programs are what the registers of a multiprocessor hold. Instructions are those of the
main loop for each element. Share is what part that is of the instructions that an H100 or H200 can
issue while the element's bytes move at copy bandwidth (3.0 and 4.3 TB/s; 132 multiprocessors, 128
instructions a cycle, 1.7 GHz): below 1, memory is the limit.

| kernel | activation | dtype | bias | registers | programs | spilled bytes | bytes an access \
| instructions | {shares} |"""
_GROUPED_HEADING = """
## Rows of experts

The kernels of `kernels/grouped_triton.py`, for up to {experts} experts, weights in fp32.
Instructions are those of the innermost loop for each element, and with weights what the loop over
rows adds in rows of {cols} columns; what comes once for each expert that a program meets is not
among them. The last column divides them by those of the kernel above for the same activation and
dtype, without a bias.

| kernel | activation | dtype | weights | registers | programs | spilled bytes | bytes an access \
| instructions | {shares} | of the above |"""


@dataclass(frozen=True)
class Code:
    """What a kernel was compiled to."""

    module: ModuleType

    kernel: str
    activation: str
    dtype: str
    has_extra: bool  # a bias, or weights
    registers: int
    spilled: int  # bytes of stack and local memory
    access_bytes: tuple[int, ...]  # widths of the loop's loads and stores, each once
    instructions: float  # of the main loop, for each element

    def share(self, bandwidth: float) -> float:
        """Of the instructions that can be issued while an element moves at this bandwidth."""
        moved = len(TENSORS[self.kernel]) * BYTES[self.dtype]
        return self.instructions / (MULTIPROCESSORS * LANES * CLOCK / (bandwidth / moved))


def main() -> None:
    """Print the table, and write it where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=output_file, help="a Markdown file to write")
    options = parser.parse_args()
    if gpu_triton.is_interpreted():
        parser.error("unset TRITON_INTERPRET: the interpreter compiles nothing")
    text = report(list(inspect_all()))
    print(text, end="", flush=True)
    if options.output is not None:
        files.keep(options.output, text)


def inspect_all() -> Iterator[Code]:
    """Both kernels of both modules, for each activation and dtype, with a bias or weights and
    without."""
    for module in (gpu_triton, grouped_triton):
        for kernel in TENSORS:
            for activation in ("xielu", "xiprelu"):
                for dtype in BYTES:
                    for has_extra in (False, True):
                        yield inspect(module, kernel, activation, dtype, has_extra)


def inspect(module: ModuleType, kernel: str, activation: str, dtype: str, has_extra: bool) -> Code:
    """Compile one kernel as a launch on aligned tensors of a multiple of 16 elements would."""
    compiled = compile_for_sm90(getattr(module, kernel), activation, dtype, has_extra)
    registers, spilled, assembly = read(compiled)
    loops = _loops(assembly)
    if module is grouped_triton:
        loop, around = sorted(filter(_loads_and_stores, loops), key=len)[:2]
    else:
        loop = max(loops, key=len)
    instructions = len(loop) / _elements(loop, dtype)
    if module is grouped_triton and has_extra:  # a row is a warp's
        instructions += (len(around) - len(loop)) * 32 / GROUPED_COLS
    return Code(
        module,
        kernel,
        activation,
        dtype,
        has_extra,
        registers,
        spilled,
        tuple(sorted({_width(line) for line in loop if _is_access(line)})),
        instructions,
    )


def compile_for_sm90(
    kernel: triton.runtime.JITFunction,
    activation: str,
    dtype: str,
    has_extra: bool,
    *,
    numel_type: str = "i32",
    num_warps: int = gpu_triton.NUM_WARPS,
    maxnreg: int | None = None,
    **constants: int,
) -> triton.compiler.CompiledKernel:
    """A kernel of `gpu_triton` or `grouped_triton`, or one with such arguments.

    Args:
        has_extra: whether there is a bias, or weights.
        numel_type: the integer type of numel, as Triton chooses it by its value.
        constants: other values of its constexpr arguments, and arguments that Triton compiles in
            because they are 1.
    """
    values = {
        "NAME": activation,
        "HAS_BIAS": has_extra,
        "HAS_WEIGHTS": has_extra,
        "BLOCK": gpu_triton.BLOCK,
        "EXPERTS": EXPERTS,
        **grouped_triton.tile(BYTES[dtype], has_extra),
        **gpu_triton.FINISH_BLOCKS,
        **constants,
    }
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        is_extra = name.endswith("_ptr") and ("bias" in name or "weights" in name)
        if is_extra and not has_extra:
            values[name] = None
        if name in values:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            is_fp32 = any(part in name for part in ("alpha", "sums", "weights"))
            signature[name] = "*fp32" if is_fp32 else f"*{dtype}"
            if name == "ranges_ptr":
                signature[name] = "*i64"
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif name == "beta":
            signature[name] = "fp32"
        else:
            signature[name] = numel_type if name == "numel" else "i32"
            if name in ("numel", "cols"):
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={k: v for k, v in values.items() if k in kernel.arg_names},
        attrs=attributes,
    )
    options = {"num_warps": num_warps, "maxnreg": maxnreg, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def read(compiled: triton.compiler.CompiledKernel) -> tuple[int, int, str]:
    """Registers of a thread, bytes that it spills to stack and local memory, and the assembly."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", str(cubin))
        assembly = _tool("nvdisasm", "-c", str(cubin))
    spilled = sum(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))
    return int(re.search(r"REG:(\d+)", usage)[1]), spilled, assembly


def programs_that_fit(registers: int, num_warps: int) -> int:
    """Programs resident on a multiprocessor of sm_90: 65,536 registers, 2,048 threads, 32 programs.

    A warp's registers are given out 256 at a time.
    """
    of_a_warp = -(-registers * 32 // 256) * 256
    return min(32, 64 // num_warps, 65536 // of_a_warp // num_warps)


def _tool(name: str, *arguments: str) -> str:
    """Run one of the CUDA tools that come with Triton."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def _loops(assembly: str) -> list[list[str]]:
    """The instructions between each backward jump and its target."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loops: list[list[str]] = []
    for line in assembly.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            instructions.append(instruction[1])
            jump = re.search(r"\bBRA.*`\((\.L_\w+)\)", instruction[1])
            if jump and jump[1] in labels:
                loops.append(instructions[labels[jump[1]] :])
    return loops


def _loads_and_stores(loop: list[str]) -> bool:
    return all(any(f"{access}." in line for line in loop) for access in ("LDG", "STG"))


def _elements(loop: list[str], dtype: str) -> int:
    """How many a thread takes each time round: those that it stores."""
    return sum(_width(line) for line in loop if "STG." in line) // BYTES[dtype]


def _is_access(instruction: str) -> bool:
    return bool(re.search(r"\b(LDG|STG)\.", instruction))


def _width(instruction: str) -> int:
    bits = re.search(r"\.(128|64|U16|U8|S16|S8)\b", instruction)
    return int(re.sub(r"\D", "", bits[1])) // 8 if bits else 4


def report(codes: list[Code]) -> str:
    """The tables in Markdown, with what made them."""
    shares = " | ".join(f"share, {name}" for name in BANDWIDTHS)
    lines = [_HEADING.format(version=triton.__version__, shares=shares), "|---" * 11 + "|"]
    dense = {}
    for code in codes:
        if code.module is gpu_triton:
            dense[code.kernel, code.activation, code.dtype, code.has_extra] = code.instructions
            lines.append(f"| {' | '.join(_cells(code))} |")
    lines += [_GROUPED_HEADING.format(experts=EXPERTS, cols=GROUPED_COLS, shares=shares)]
    lines += ["|---" * 12 + "|"]
    for code in codes:
        if code.module is grouped_triton:
            ratio = code.instructions / dense[code.kernel, code.activation, code.dtype, False]
            lines.append(f"| {' | '.join([*_cells(code), f'{ratio:.2f}'])} |")
    return "\n".join(lines) + "\n"


def _cells(code: Code) -> list[str]:
    return [
        code.kernel.strip("_").removesuffix("_kernel"),
        code.activation,
        code.dtype,
        "yes" if code.has_extra else "no",
        str(code.registers),
        str(programs_that_fit(code.registers, gpu_triton.NUM_WARPS)),
        str(code.spilled),
        "–".join(map(str, code.access_bytes)),
        f"{code.instructions:.1f}",
        *(f"{code.share(bandwidth):.2f}" for bandwidth in BANDWIDTHS.values()),
    ]


if __name__ == "__main__":
    ready_output()
    sys.exit(main())
