"""`make bench`: what it writes, what it refuses, and that it measures what it says it does."""

from __future__ import annotations

import csv
import dataclasses
import gc
import itertools
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import bench_activation
import bench_measure
import bench_providers
import bench_report
import pytest
import torch
import tune_kernels
from bench_measure import Step
from bench_providers import Candidate, Request
from torch import Tensor

from megatron_xielu import functional

X_BYTES = 4_000_000


def run(folder: Path, *flags: str) -> tuple[int, list[dict[str, str]]]:
    """Exit status and the rows of the CSV file."""
    status = bench_activation.main(["--device", "cpu", "--quick", "--output", str(folder), *flags])
    return status, rows_in(folder)


def rows_in(folder: Path) -> list[dict[str, str]]:
    with (folder / "cpu.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_table_csv_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    providers = ["copy", "hf", "eager", "ours-eager", "ours-triton", "swiglu"]
    flags = ["--dtypes", "bfloat16", "--providers", *providers, "--shapes", "64x96"]
    status, rows = run(tmp_path, *flags)
    assert status == 0
    printed = capsys.readouterr().out
    found = {(r["what"], r["shape"], r["mode"], r["provider"]) for r in rows}
    measured = [name for name in providers if name != "ours-triton"]
    assert found == {
        (what, shape, mode, name)
        for what, shape in (("op", "64x96"), ("block", "32x96x576"))
        for mode in bench_providers.MODES
        for name in measured
        if (what, name) != ("block", "copy")
    }
    for row in rows:
        assert row["status"] == "ok"
        assert float(row["median_ms"]) > 0
        assert int(row["rounds"]) == bench_activation.QUICK_ROUNDS
        assert bench_providers.LABELS[row["provider"]] in printed
        if row["what"] == "op":
            assert float(row["of_copy"]) > 0
            assert float(row["faster_than_hf"]) == 1.0 or row["provider"] != "hf"
        else:
            assert (row["of_copy"], row["gb_per_s"]) == ("", "")
            assert float(row["time_over_swiglu"]) > 0
    assert "ours, Triton is not there in bfloat16: it needs a CUDA device" in printed
    assert "not measured  ours, eager vs HF, 2048x9216" in printed
    assert printed.index("versions: torch") < printed.index("checking")
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")
    assert "REFUSED" not in (tmp_path / "cpu.txt").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cpu.csv", "cpu.png", "cpu.txt"]


def test_a_killed_run_has_its_finished_cases(tmp_path: Path) -> None:
    shapes = ["64x96", "64x192", "64x384"]
    flags = ["--device", "cpu", "--quick", "--op", "--dtypes", "float32", "--providers", "eager"]
    command = [sys.executable, bench_activation.__file__, *flags, "--shapes", *shapes]
    with subprocess.Popen(
        [*command, "--output", str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        # Once the third is announced, two are finished.
        third = f"op {shapes[2]} float32\n"
        printed = list(itertools.takewhile(lambda line: line != third, process.stdout))
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert "median" not in "".join(printed)
    rows = rows_in(tmp_path)
    modes = len(bench_providers.MODES)
    assert [row["shape"] for row in rows] == [shapes[0]] * modes + [shapes[1]] * modes
    text = (tmp_path / "cpu.txt").read_text()
    assert f"op {shapes[1]} float32" in text
    assert shapes[2] not in text.split("\n\n", 1)[1]
    assert (tmp_path / "cpu.png").read_bytes().endswith(b"IEND\xaeB`\x82")


def test_the_table_is_printed_where_the_files_cannot_be_written(tmp_path, capsys):
    (tmp_path / "cpu.csv").mkdir()
    with pytest.raises(SystemExit, match=r"^error: .*/cpu\.csv'; what it was to hold is printed"):
        run(tmp_path, "--op", "--dtypes", "float32", "--providers", "eager", "--shapes", "64x96")
    assert "op 64x96 float32" in capsys.readouterr().out.split("median")[0].split("checking")[-1]


def test_no_picture_is_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cpu.png").write_text("of an earlier run")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, rows = run(tmp_path, "--op", "--dtypes", "float32", "--providers", "eager")
    assert (status, {row["status"] for row in rows}) == (0, {"ok"})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cpu.csv", "cpu.txt"]
    assert "cpu.csv, .txt; no picture: ModuleNotFoundError: " in capsys.readouterr().out


def test_nothing_measured_is_nothing_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench_providers.PROVIDERS, "eager", spoiled("eager", torch.zeros_like))
    (tmp_path / "cpu.png").write_text("of an earlier run")
    flags = ["--op", "--dtypes", "float32", "--providers", "eager"]
    assert run(tmp_path, *flags)[0] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cpu.csv", "cpu.txt"]


def spoiled(name: str, spoil: Callable[[Tensor], Tensor]) -> Callable[[Request], Candidate]:
    """A provider whose y is something else."""

    def build(request: Request) -> Candidate:
        right = PROVIDERS[name](request)
        return dataclasses.replace(right, call=lambda x: spoil(right.call(x)))

    return build


PROVIDERS = dict(bench_providers.PROVIDERS)


@pytest.mark.parametrize(
    ("name", "spoil", "status", "reason"),
    [
        ("ours-eager", lambda y: y * (1 + 1e-5), 1, "excess_y is"),
        ("ours-eager", lambda y: y[:1].repeat(64, 1), 1, "y is off by"),
        ("ours-eager", lambda y: y * float("nan"), 1, "y is off by nan"),
        ("ours-eager", lambda y: y.bfloat16(), 1, "y is (64, 768) in torch.bfloat16"),
        # A peer may be as inexact as it is, but it must be the same function.
        ("eager", lambda y: y * (1 + 1e-3), 0, None),
        ("eager", lambda y: y * 2, 0, "y is off by"),
    ],
)
def test_refuses_a_wrong_result(
    name: str,
    spoil: Callable[[Tensor], Tensor],
    status: int,
    reason: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(bench_providers.PROVIDERS, name, spoiled(name, spoil))
    flags = ["--op", "--dtypes", "float32", "--modes", "forward", "--providers", name, "copy"]
    got, rows = run(tmp_path, *flags)
    assert got == status
    (row,) = (r for r in rows if r["provider"] == name)
    if reason is None:
        assert row["status"] == "ok"
        assert float(row["error_y"]) > 1e-4
    else:
        assert row["status"] == "refused"
        assert row["reason"].startswith(reason)
        assert row["median_ms"] == ""
        assert f"REFUSED, {reason}" in capsys.readouterr().out
    assert [r["status"] for r in rows if r["provider"] == "copy"] == ["ok"]


def out_of_memory_on_a_gpu() -> None:
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 5.25 GiB. GPU 0 has a total capacity of 79.19 GiB "
        "of which 2.00 GiB is free. Process 1 has 77.00 GiB memory in use. See documentation for "
        "Memory Management"
    )


def out_of_memory_here() -> None:
    torch.empty(2**50, dtype=torch.uint8)


def another_error() -> None:
    raise ValueError("this is why\nand here is a page of it")


def failing(
    name: str, fail: Callable[[], None], at: int, held: list[weakref.ref]
) -> Callable[[Request], Candidate]:
    """A provider that fails when it is built, or in call `at`; `held` are tensors it has then."""
    calls = itertools.count(1)

    def build(request: Request) -> Candidate:
        right, weights = PROVIDERS[name](request), torch.ones(1000)
        held.append(weakref.ref(weights))

        def call(x: Tensor) -> Tensor:
            if next(calls) < at:
                return right.call(x) + 0 * weights[0]
            buffer = torch.ones(1000)
            held.append(weakref.ref(buffer))
            try:
                fail()
            except Exception as error:
                again = error
            # Its traceback leads to this frame, which holds it: a circle, and the buffer.
            raise again

        return dataclasses.replace(right, call=call if at else call(torch.ones(1)))

    return build


@pytest.mark.parametrize(
    "at",
    [
        pytest.param(0, id="built"),
        pytest.param(1, id="checked"),
        pytest.param(len(bench_measure.SIGMAS) + 1, id="peaks"),
        pytest.param(len(bench_measure.SIGMAS) + 3, id="second-round"),
    ],
)
@pytest.mark.parametrize(
    ("name", "status", "fail", "reason"),
    [
        ("hf", 0, out_of_memory_on_a_gpu, "out of memory, asking for 5.25 GiB"),
        ("copy", 0, another_error, "ValueError: this is why"),
        ("ours-eager", 1, out_of_memory_here, f"out of memory, asking for {2**50} bytes"),
    ],
    ids=["hf", "copy", "ours"],
)
def test_a_provider_that_fails_is_alone_in_it(
    name: str,
    status: int,
    fail: Callable[[], None],
    reason: str,
    at: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    held: list[weakref.ref] = []
    monkeypatch.setitem(bench_providers.PROVIDERS, name, failing(name, fail, at, held))

    def witness(y: Tensor) -> Tensor:
        if len(held) > 1:  # after the failure
            assert [ref() for ref in held] == [None, None]
        return y

    monkeypatch.setitem(bench_providers.PROVIDERS, "relu2", spoiled("relu2", witness))
    others = [other for other in ("copy", "hf", "ours-eager", "relu2") if other != name]
    flags = ["--op", "--dtypes", "float32", "--shapes", "64x96"]
    gc.disable()  # so that none but the benchmark can have collected the circle
    try:
        got, rows = run(tmp_path, *flags, "--providers", name, *others)
    finally:
        gc.enable()
    assert got == status
    assert len(held) == 2
    (lost,) = (row for row in rows if row["provider"] == name)
    assert (lost["status"], lost["reason"]) == ("failed", reason)
    assert (lost["median_ms"], lost["peak_extra_bytes"]) == ("", "")
    assert f"{bench_providers.LABELS[name]}: FAILED, {reason}\n" in capsys.readouterr().out
    rest = [row for row in rows if row["provider"] != name]
    assert len(rest) == len(bench_providers.MODES) * len(others)
    for row in rest:
        assert (row["status"], int(row["rounds"])) == ("ok", bench_activation.QUICK_ROUNDS)
        assert (row["of_copy"] == "") == (name == "copy")
        assert (row["faster_than_hf"] == "") == (name == "hf")
        assert float(row["time_over_relu2"]) > 0
    # The copy allocates nothing, whatever was released before its turn.
    assert {r["peak_extra_bytes"] for r in rest if r["provider"] == "copy"} <= {"0"}


def test_a_case_whose_inputs_do_not_fit_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = bench_measure.rotating

    def rotating(count: int, shapes: tuple, dtype: torch.dtype, device: str) -> Iterator:
        if shapes[0] == (64, 96):
            out_of_memory_here()
        return right(count, shapes, dtype, device)

    monkeypatch.setattr(bench_measure, "rotating", rotating)
    flags = ["--op", "--dtypes", "float32", "--shapes", "64x96", "64x192"]
    status, rows = run(tmp_path, *flags, "--providers", "eager", "ours-eager")
    assert status == 0
    assert {(row["shape"], row["status"]) for row in rows} == {("64x192", "ok")}
    line = f"op 64x96 float32 is skipped: out of memory, asking for {2**50} bytes\n"
    assert line in (tmp_path / "cpu.txt").read_text()
    assert line in capsys.readouterr().out


def test_a_case_that_takes_more_memory_than_is_free_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_measure, "free_bytes", lambda device: 1e6)
    flags = ["--op", "--dtypes", "float32", "--shapes", "64x9600", "64x96"]
    status, rows = run(tmp_path, *flags, "--providers", "copy", "hf", "swiglu")
    assert status == 0
    assert {(row["shape"], row["status"]) for row in rows} == {("64x96", "ok")}
    # Two copies; two sets of x and dy for SwiGLU and two for the others; ten buffers.
    needed = (2 + 2 * 2 * 2 + 10) * 64 * 9600 * 4
    line = f"op 64x9600 float32 is skipped: it takes up to {needed / 1e6:.1f} MB, 1.0 MB are free"
    assert line in (tmp_path / "cpu.txt").read_text()


@pytest.mark.parametrize("what", ["op", "block"])
def test_the_estimate_of_memory_is_not_below_the_truth(what: str, tmp_path: Path) -> None:
    flags = ["--shapes", "512x768"] if what == "op" else ["--block-shapes", "512x96x768"]
    providers = ["hf", "eager", "relu2", "swiglu"]
    _, rows = run(tmp_path, f"--{what}", *flags, "--providers", *providers)
    assert len(rows) == 2 * len(providers) * len(bench_providers.MODES)
    for row in (row for row in rows if row["mode"] == "both"):
        case = bench_activation.Case(what, row["shape"], row["dtype"])
        dtype = bench_activation.DTYPES[case.dtype]
        request = Request("cpu", dtype, case.rows, case.ffn)
        estimate = bench_activation.bytes_needed(case, request, [row["provider"]])
        columns = case.ffn if what == "op" else case.hidden
        inputs = 2 * request.sets * case.rows * columns * dtype.itemsize
        weights = 0 if what == "op" else 2 * case.hidden * case.ffn * dtype.itemsize
        truth = inputs + weights + int(row["peak_extra_bytes"])
        assert truth <= estimate <= 2 * truth


def test_on_a_gpu_what_is_of_most_value_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    options = bench_activation.parse(["--device", "cuda", "--output", str(tmp_path)])
    assert list(map(str, options.cases)) == [
        "op 8192x9216 bfloat16",
        "op 16384x43008 bfloat16",
        "op 8192x9216 float32",
        "op 16384x43008 float32",
        "block 8192x1536x9216 bfloat16",
        "block 16384x8192x43008 bfloat16",
    ]


@pytest.mark.parametrize(
    ("factors", "reason"),
    [
        (itertools.repeat(1.0), None),
        (itertools.repeat(1.0 + 1e-4), "alpha is 1.00e-04, over 1.00e-05"),
        (itertools.count(1.0, 1e-6), "alpha gradients differ in repetition 1"),
    ],
    ids=["right", "biased", "not repeatable"],
)
def test_refuses_alpha_gradients(factors: Iterator[float], reason: str | None) -> None:
    class Scaled(torch.autograd.Function):
        """Identity with a gradient that is multiplied by the next factor."""

        @staticmethod
        def forward(ctx, alpha: Tensor) -> Tensor:
            return alpha.clone()

        @staticmethod
        def backward(ctx, gradient: Tensor) -> Tensor:
            return gradient * next(factors)

    right = PROVIDERS["ours-eager"](Request("cpu", torch.float32, 64, 96))
    scaled = dataclasses.replace(
        right, call=lambda x: functional.xielu(x, *map(Scaled.apply, right.alphas))
    )
    if reason is None:
        errors = bench_measure.check(scaled, (64, 96), torch.float32, "cpu")
        assert errors.repeats == bench_measure.REPEATS["eager"] < bench_measure.REPEATS["triton"]
        return
    with pytest.raises(bench_measure.RefusedError, match=reason):
        bench_measure.check(scaled, (64, 96), torch.float32, "cpu")


@pytest.mark.parametrize("compiled", [False, True])
def test_peak_memory_of_a_known_function(compiled: bool) -> None:
    class Known(torch.autograd.Function):
        """Forward: y and one temporary, x kept. Backward: dx and two temporaries."""

        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            temporary = x + 1
            return temporary + 1

        @staticmethod
        def backward(ctx, dy: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            first = x + dy
            second = first + dy
            return second + first

    function = torch.compile(lambda x: x.sin() + 1) if compiled else Known.apply
    x, dy = torch.randn(2, 1000, 1000).unbind()
    step = Step(function, (x.requires_grad_(),), dy)
    step.backward(step.forward())  # what compilation allocates is not of interest
    peaks = bench_measure.peak_on_cpu(step, True)
    # Compiled, both passes are one fused loop that allocates its result only.
    expected = (1, 1, 2) if compiled else (2, 3, 4)
    for mode, buffers in zip(("forward", "backward", "both"), expected, strict=True):
        assert peaks[mode] == pytest.approx(buffers * X_BYTES, rel=0.01)


def test_bytes_moved() -> None:
    count = bench_providers.bytes_moved
    # bf16, 8192 x 9216: 4 bytes an element forward, 6 backward.
    elements = 8192 * 9216
    assert count("forward", 8192, 9216, 2, gated=False) == 4 * elements
    assert count("backward", 8192, 9216, 2, gated=False) == 6 * elements
    assert count("both", 8192, 9216, 2, gated=False) == 10 * elements
    # SwiGLU at equal parameters: x has 12288 columns, y 6144.
    assert count("forward", 8192, 9216, 2, gated=True) == 2 * 8192 * (12288 + 6144)
    assert count("backward", 8192, 9216, 2, gated=True) == 2 * 8192 * (2 * 12288 + 6144)


def test_ratios_are_formed_within_a_round() -> None:
    # Twice as fast in every round, on a machine whose speed drifts: medians would say 1.5.
    times = {"hf": [2.0, 6.0, 40.0], "ours-eager": [1.0, 3.0, 20.0], "copy": []}
    assert bench_report.ratio(times, "hf", "ours-eager") == 2.0
    assert bench_report.ratio(times, "copy", "hf") != bench_report.ratio(times, "copy", "hf")


def test_inputs_rotate_through_more_than_the_cache() -> None:
    cache = bench_measure.last_level_cache("cpu")
    for per_set in (2**10, 10 * cache):
        sets = bench_measure.sets_needed("cpu", per_set)
        assert sets >= 2
        assert sets * per_set >= 3 * cache
    buffers = bench_measure.rotating(3, ((4, 6), (4, 6)), torch.float32, "cpu")
    pointers = [next(buffers)[0].data_ptr() for _ in range(6)]
    assert len(set(pointers)) == 3
    assert pointers[:3] == pointers[3:]


def test_targets_say_what_was_met() -> None:
    def measured(provider: str, faster: float, peak: float) -> bench_report.Row:
        return bench_report.Row(
            "op",
            "2048x9216",
            "float32",
            "both",
            provider,
            faster_than_hf=faster,
            peak_extra_buffers=peak,
        )

    rows = [measured("ours-compiled", 10.5, 2.0), measured("ours-eager", 1.9, 3.0)]
    lines = [str(t) for t in bench_report.targets(rows, "cpu")]
    assert [line[:12].strip() for line in lines] == ["met", "NOT met", "met", *["not measured"] * 3]
    # On a GPU every target has a line, measured or not.
    assert len(bench_report.targets([], "cuda")) == 2 * (2 * 5 + 2 + 3) + 4
    assert {str(t)[:12] for t in bench_report.targets([], "cuda")} == {"not measured"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shapes", "12"], "--shapes: 12: give 2 positive sizes joined by x"),
        (["--shapes", "0x8"], "--shapes: 0x8"),
        (["--block-shapes", "4x8"], "--block-shapes: 4x8: give 3 positive sizes"),
        (["--op", "--block-shapes", "4x8x9"], "--block-shapes has no effect without --block"),
        (["--rounds", "1"], "--rounds 1: a spread needs at least 2"),
        (["--providers", "nobody"], "--providers"),
        (["--output", __file__], "--output"),
    ],
)
def test_bad_flags(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        bench_activation.main(["--device", "cpu", *flags])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_no_cuda_device(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for main, flags in ((bench_activation.main, ["--device", "cuda"]), (tune_kernels.main, [])):
        monkeypatch.setattr(sys, "argv", ["tool.py", *flags])
        with pytest.raises(SystemExit) as end:
            main()
        assert str(end.value).startswith("tool.py: error: PyTorch sees no CUDA device here; ")
        assert capsys.readouterr().err == ""  # not how it is used


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_the_gpu_run_needs_one(tmp_path: Path) -> None:
    """It says so before it makes or deletes anything; also where there is no PyTorch.

    Of PATH's Python, until one is set up in the checkout."""
    script = tmp_path / "tools" / "bench" / "on_gpu.sh"
    script.parent.mkdir(parents=True)
    shutil.copy(Path(bench_activation.__file__).with_name("on_gpu.sh"), script)
    for place, python, why in (
        ("python3", sys.executable, "on_gpu.sh: PyTorch sees no CUDA device here"),
        ("python3", f"{sys.executable} -S", "on_gpu.sh: No module named 'torch'"),
        (".venv/bin/python", sys.executable, "on_gpu.sh: PyTorch sees no CUDA device here"),
    ):
        command = tmp_path / place
        command.parent.mkdir(parents=True, exist_ok=True)
        command.write_text(f'#!/bin/sh\nexec {python} "$@"\n')
        command.chmod(0o755)
        if command.parent != tmp_path:
            (tmp_path / ".venv" / "installed").touch()
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "OUT": str(tmp_path / "out")}
        done = subprocess.run([script, "check"], env=environment, capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr == f"{why}\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(tmp_path: Path) -> None:
    status = bench_activation.main(["--device", "cuda", "--quick", "--output", str(tmp_path)])
    assert status == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cuda.csv", "cuda.png", "cuda.txt"]


@pytest.mark.parametrize("megabytes", ["0", "1", "-1", "nan", "inf"])
def test_of_data_takes_whole_megabytes(
    megabytes: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A slice is one, and their spread needs two."""
    import bench_data

    monkeypatch.setattr(sys, "argv", ["bench_data.py", "--megabytes", megabytes])
    with pytest.raises(SystemExit):
        bench_data.main()
    assert "argument --megabytes: must be" in capsys.readouterr().err.splitlines()[-1]


def test_what_logging_alphas_costs_is_measured() -> None:
    """On a model so small that it takes seconds; the numbers are what they are."""
    tool = Path(bench_activation.__file__).with_name("measure_alpha_logging.py")
    small = "--num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --seq-length 32 --train-iters 48"
    done = subprocess.run([sys.executable, tool, *small.split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "pairs of steps, medians" in done.stdout and "the writing alone" in done.stdout
