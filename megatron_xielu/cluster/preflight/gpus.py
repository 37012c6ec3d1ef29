"""Preflight check of the GPUs: number, model, memory, health, results and speed.

See `megatron_xielu.cluster.preflight`.
"""

from __future__ import annotations

import csv
import shutil
import statistics
import subprocess
import time
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import torch

from megatron_xielu.cluster.preflight.exchange import GIB, MIB, Answers, Board, Problem, most_common
from megatron_xielu.common import fp8

SLOW_GPU = 0.15  # below the median of all GPUs
OTHERS_MEMORY = 1.0  # GiB that somebody else may hold on a GPU
_MATMUL_SIZE = {"cuda": 8192, "cpu": 384}
# nvidia-smi prints figures by field name; what a card or driver does not know is left out.
_HEALTH_FIELDS = ("ecc.errors.uncorrected.volatile.total", "retired_pages.pending")
_THROTTLE_REASONS = ("hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown")


def gpus(board: Board, args: Namespace) -> None:
    """As many as asked, of one model, free, healthy, right and equally fast.

    On CPUs only the result of the matrix product is judged.
    """
    if not args.cpu:
        # Before any rank touches its GPU: what is in use then is somebody else's.
        used = board.ask(
            "gpus",
            lambda: _nvidia_smi("uuid,memory.used"),
            stage="memory",
            only=board.one_per_node(),
        )
        found = board.ask("gpus", lambda: _gpu_here(board), stage="found")
        _judge_gpus(board, used, found)
        for rank, gpu in found.items() if args.fp8_recipe else ():
            if fault := fp8.gpu_fault(args.fp8_recipe, tuple(gpu["capability"]), gpu["cuda"]):
                board.fail("gpus", fault, rank=rank)
    device = "cpu" if args.cpu else "cuda"
    speeds = board.ask("gpus", lambda: matmul(board, device), stage="matmul")
    if not speeds:
        return
    median = statistics.median(speeds.values())
    slowest = min(speeds, key=lambda rank: speeds[rank])
    figures = (
        f"matmul right, median {median:.3g} TFLOP/s, slowest {speeds[slowest]:.3g} "
        f"({board.node_of(slowest)} rank {slowest})"
    )
    if args.cpu:
        board.done("gpus", f"skipped: --cpu; {figures}")
        return
    for rank, speed in slow_ones(speeds, SLOW_GPU).items():
        board.fail(
            "gpus",
            f"GPU {rank % board.local_size} computes {speed:.0f} TFLOP/s, the median is "
            f"{median:.0f}; look for heat, a power limit or another process (nvidia-smi "
            "-q -d PERFORMANCE,POWER), or leave the node out",
            rank=rank,
        )
    health = board.ask("gpus", _health_here, stage="health", only=board.one_per_node())
    for rank, problems in health.items():
        for text in problems:
            board.fail("gpus", text, rank=rank)
    name = found[min(found)]["name"] if found else "?"
    board.done("gpus", f"{len(found)} × {name}; {figures}")


def slow_ones(speeds: Mapping[int, float], share: float) -> dict[int, float]:
    """Those more than ``share`` below the median."""
    median = statistics.median(speeds.values())
    return {rank: speed for rank, speed in speeds.items() if speed < (1 - share) * median}


def _gpu_here(board: Board) -> dict[str, Any]:
    count = torch.cuda.device_count()
    if board.local_rank >= count:
        raise Problem(
            f"{board.local_size} GPUs asked of this node, PyTorch sees {count}: compare "
            "nvidia-smi, CUDA_VISIBLE_DEVICES and the scheduler's request"
        )
    properties = torch.cuda.get_device_properties(board.local_rank)
    name = f"{properties.name} {properties.total_memory / GIB:.0f} GiB"
    return {
        "name": name,
        "uuid": str(getattr(properties, "uuid", "")),
        "capability": (properties.major, properties.minor),
        "cuda": torch.version.cuda,
    }


def _judge_gpus(board: Board, used: Answers, found: Answers) -> None:
    if found:
        usual = most_common({rank: gpu["name"] for rank, gpu in found.items()})
        for rank, gpu in found.items():
            if gpu["name"] != usual:
                text = f"{gpu['name']}, where most have {usual}; do not mix models in one run"
                board.fail("gpus", text, rank=rank)
    for leader, rows in used.items():
        memory = {row["uuid"].removeprefix("GPU-"): row["memory.used"] for row in rows}
        for rank in board.ranks_of(board.node_of(leader)):
            text = memory.get(found[rank]["uuid"] if rank in found else "", "")
            if text.isdigit() and int(text) * MIB > OTHERS_MEMORY * GIB:
                board.fail(
                    "gpus",
                    f"GPU {rank % board.local_size} has {int(text) / 1024:.1f} GiB in use by "
                    "another process: end it (nvidia-smi shows its number), or restart the node",
                    rank=rank,
                )


def _nvidia_smi(fields: str) -> list[dict[str, str]]:
    """One row a GPU, by field; none where nvidia-smi or one of the fields is not there."""
    if shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(
        ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        timeout=20,
    )
    if done.returncode:
        return []
    names = fields.split(",")
    rows = csv.reader(done.stdout.splitlines(), skipinitialspace=True)
    return [dict(zip(names, row, strict=False)) for row in rows]


def _health_here() -> list[str]:
    """Problems that this node's driver reports."""
    problems = []
    for field in _HEALTH_FIELDS:
        for row in _nvidia_smi(f"index,{field}"):
            if row[field] not in ("0", "No") and not row[field].startswith(("[", "N/A")):
                problems.append(
                    f"GPU {row['index']}: {field} is {row[field]}; reset the GPU or restart the "
                    "node, and have it replaced if that comes back"
                )
    for reason in _THROTTLE_REASONS:
        field = f"clocks_event_reasons.{reason}"
        rows = _nvidia_smi(f"index,{field}")
        if not rows:  # the name before driver 535
            field = f"clocks_throttle_reasons.{reason}"
            rows = _nvidia_smi(f"index,{field}")
        problems += [
            f"GPU {row['index']} is slowed down: {reason}; look at its cooling and power supply"
            for row in rows
            if row[field] == "Active"
        ]
    return problems


def matmul(board: Board, kind: str) -> float:
    """Multiply two matrices of small integers; TFLOP/s, the best of three.

    In bf16 on a GPU, fp32 on a CPU. Products are so sparse that every sum is an integer below 256,
    exact even in bf16: row and column sums of the result must be equal to the bit.

    Raises:
        Problem: they are not.
    """
    device = use_device(board, kind)
    size = _MATMUL_SIZE[kind]
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(3)
    sign = torch.randint(0, 8, (2, size, size), generator=generator, dtype=torch.int8)
    values = ((sign == 1).to(dtype) - (sign == 2).to(dtype)).to(device)  # -1, 0 or 1
    a, b = values[0], values[1]
    repeats = 20 if kind == "cuda" else 4
    result = a @ b
    seconds = []
    for _ in range(3):
        synchronize(kind)
        start = time.perf_counter()
        for _ in range(repeats):
            torch.mm(a, b, out=result)
        synchronize(kind)
        seconds.append((time.perf_counter() - start) / repeats)
    ones = torch.ones(size, dtype=torch.float64, device=device)
    a, b, result = (t.double() for t in (a, b, result))
    same = torch.equal(result @ ones, a @ (b @ ones)) and torch.equal(ones @ result, (ones @ a) @ b)
    if not same:
        raise Problem(
            f"a matrix product of {size} × {size} is wrong: leave the node out and have the "
            f"{'GPU' if kind == 'cuda' else 'processor'} tested (dcgmi diag -r 3)"
        )
    return 2.0 * size**3 / min(seconds) / 1e12


def use_device(board: Board, kind: str) -> torch.device:
    """The device (``cuda`` or ``cpu``) of this rank, made current for this thread."""
    if kind == "cpu":
        return torch.device("cpu")
    torch.cuda.set_device(board.local_rank)
    return torch.device("cuda", board.local_rank)


def synchronize(kind: str) -> None:
    """Wait for the GPU, if there is one."""
    if kind == "cuda":
        torch.cuda.synchronize()
