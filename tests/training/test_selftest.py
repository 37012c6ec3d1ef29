"""The container's health check, run as a container runs it; and that it fails when it should."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launch import start, wait

from megatron_xielu import selftest
from megatron_xielu.kernels import eager

# Puts a fault into a rank, then runs the self-test.
BREAK_SUM = """
from megatron_xielu import megatron_activations, selftest
megatron_activations._SumGradientOverGroup.backward = staticmethod(lambda ctx, grad: (grad, None))
raise SystemExit(selftest.main())
"""
BREAK_ALPHA = """
import os, torch
from megatron_xielu import selftest
step = torch.optim.Adam.step
def uneven_step(self, *args):
    step(self, *args)
    with torch.no_grad():
        self.param_groups[0]["params"][0].add_(1e-6 * int(os.environ["RANK"]))
torch.optim.Adam.step = uneven_step
raise SystemExit(selftest.main())
"""


def test_needs_no_compiler_and_no_home(tmp_path):
    """As in a slim container: no compiler on the path, a home that cannot be written to."""
    environment = {
        "PATH": str(tmp_path / "empty"),
        "HOME": "/proc/absent",
        "TMPDIR": str(tmp_path),
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "megatron_xielu.selftest"],
        capture_output=True,
        text=True,
        env=environment,
        cwd="/",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert all(re.search(r"(ok|skipped)\b.* \[\d+\.\d\d s\]$", line) for line in lines[:-1])
    assert "selftest: ok" in lines[-1]
    assert "compiled xielu float32     skipped: no C++ compiler" in done.stdout
    for name in ("torch", "megatron.core", "megatron helpers_cpp", "eager xiprelu bfloat16"):
        assert re.search(rf"^{re.escape(name)} +ok", done.stdout, re.MULTILINE), done.stdout
    if not torch.cuda.is_available():
        assert "triton xielu float32       skipped: no GPU" in done.stdout
    assert not list(tmp_path.iterdir())  # nothing is left behind


def test_compiled_backend_is_checked():
    """Where this machine can compile."""
    try:
        assert "of the allowed error" in selftest.check_compiled("xiprelu", torch.float32)
    except selftest.Skipped as reason:
        pytest.skip(str(reason))


def scaled(original: Callable, factor: float, result: int | None) -> Callable:
    def wrong(*args):
        output = original(*args)
        if result is None:
            return output * factor
        return tuple(
            t * factor if i == result and t is not None else t for i, t in enumerate(output)
        )

    return wrong


@pytest.mark.parametrize(
    "function, result, named",
    [
        ("forward", None, "y is off"),
        ("backward", 0, "dx is off"),
        ("backward", 1, "dalpha_p is off"),
        ("backward", 2, "dalpha_n is off"),
    ],
)
def test_wrong_numbers_fail_by_name(monkeypatch, capsys, function, result, named):
    """Off by one part in 2^16, which a careless comparison would let pass."""
    original = getattr(eager, function)
    monkeypatch.setattr(eager, function, scaled(original, 1 + 2**-16, result))
    report = selftest._Report()
    passed = report.run(
        "eager xielu float32",
        lambda: selftest.check_activation("xielu", torch.float32, "eager", "cpu"),
    )
    assert not passed
    assert report.failed == ["eager xielu float32"]
    assert f"FAIL: AssertionError: {named}" in capsys.readouterr().out


def run_two_ranks(folder: Path, command: tuple[str, ...]) -> tuple[list[int], str]:
    log = folder / "log.txt"
    ranks = start([], ranks=2, log=log, command=command, environment={"PATH": "", "HOME": "/proc"})
    return wait(ranks, timeout=100), log.read_text()


def test_alphas_over_two_ranks(tmp_path):
    codes, output = run_two_ranks(tmp_path, ("-m", "megatron_xielu.selftest"))
    assert codes == [0, 0], output
    assert re.search(
        r"^alphas over ranks +ok: 2 ranks, gradient within \S+, alphas bitwise equal", output, re.M
    )


@pytest.mark.parametrize(
    "script, reason",
    [(BREAK_SUM, "not the sum of all ranks"), (BREAK_ALPHA, "alphas differ after a step")],
)
def test_broken_alpha_sync_fails(tmp_path, script, reason):
    codes, output = run_two_ranks(tmp_path, ("-c", script))
    assert codes == [1, 1], output
    for rank in ("", "rank 1: "):
        assert re.search(rf"^{rank}alphas over ranks +FAIL: .*{reason}", output, re.MULTILINE), (
            output
        )
    assert re.search(r"^selftest: FAIL in .*: alphas over ranks$", output, re.MULTILINE)


def test_forced_backend_is_restored(monkeypatch):
    monkeypatch.setenv("MEGATRON_XIELU_BACKEND", "compiled")
    selftest.check_activation("xielu", torch.float64, "eager", "cpu")
    assert os.environ["MEGATRON_XIELU_BACKEND"] == "compiled"
